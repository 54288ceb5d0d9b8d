//! Hooks of interfaces: what is to be attached, what is attached, and the errors of attaching.

use std::{fmt, io, path::PathBuf};

use palisade_abi::{Direction, ETHER_TYPES, Interface, role};

use crate::{
    MapError, OpenError, SyscallError,
    sys::{
        bpf::{self, AttachType},
        link::{Device, device},
    },
};

/// What an interface is to the node.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    /// A NIC of the node.
    Host,
    /// The host side of a workload's veth.
    Endpoint,
}

impl Role {
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Host => role::HOST,
            Self::Endpoint => role::ENDPOINT,
        }
    }
}

/// Where packets that enter are judged.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Hook {
    /// At a NIC native XDP, or tc if the driver has none; at an endpoint tc, which keeps super-frames.
    #[default]
    Auto,
    /// XDP.
    Xdp,
    /// tc.
    Tc,
}

/// Which XDP.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum XdpMode {
    /// In the driver.
    #[default]
    Native,
    /// In the driver, or generic if the driver refuses.
    NativeOrGeneric,
    /// Generic ("skb"): works everywhere, slow.
    Generic,
}

/// Which tc.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum TcMode {
    /// tcx if the kernel has it (6.6), else clsact.
    #[default]
    Auto,
    /// tcx.
    Tcx,
    /// A filter of the clsact qdisc.
    Clsact,
}

/// An interface to be guarded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attachment {
    /// Its index, in the network namespace of the calling thread.
    pub ifindex: u32,
    /// What it is to the node.
    pub role: Role,
    /// The endpoint behind it; of a NIC: the node's own.
    pub endpoint: u16,
    /// Where packets that enter are judged.
    pub ingress: Hook,
    /// Which XDP, if it is XDP.
    pub xdp_mode: XdpMode,
    /// Which tc.
    pub tc: TcMode,
    /// The bridge or VRF that it is a port of; 0: none.
    pub link: u32,
    /// EtherTypes that pass unjudged; see [`Interface::ether_types`].
    pub ether_types: [u16; ETHER_TYPES],
}

/// What a program is attached by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum HookKind {
    /// XDP in the driver.
    XdpNative,
    /// Generic XDP.
    XdpGeneric,
    /// tcx.
    Tcx,
    /// clsact.
    Clsact,
}

impl fmt::Display for HookKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::XdpNative => "xdp-native",
            Self::XdpGeneric => "xdp-generic",
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        })
    }
}

/// A guarded interface, as it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attached {
    /// Its index.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// What the programs are told about it; role none if nothing.
    pub interface: Interface,
    /// What judges packets that enter; none: nothing does.
    pub ingress: Option<HookKind>,
    /// What judges packets that leave; none: nothing does.
    pub egress: Option<HookKind>,
    /// Why it is not what was asked for first.
    pub note: Option<String>,
}

/// Why an interface could not be guarded.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// There is no such interface in this network namespace.
    #[error("no interface with index {ifindex} in this network namespace")]
    NoSuchInterface {
        /// The index.
        ifindex: u32,
    },
    /// The interface table has one slot for two interfaces.
    #[error(
        "{name}: its index {ifindex} and {other}, which is guarded, have the same slot (they differ by a multiple of \
         65536); create {name} anew to give it another index"
    )]
    SlotCollision {
        /// The interface.
        name: String,
        /// Its index.
        ifindex: u32,
        /// The guarded one.
        other: u32,
    },
    /// Somebody else's XDP program is there.
    #[error(
        "{name}: another XDP program (id {prog_id}, `{prog_name}`) is attached; remove it (`ip link set dev {name} \
         xdp off`, or end the program that holds it), or set `ingress = \"tc\"` for this interface"
    )]
    ForeignXdp {
        /// The interface.
        name: String,
        /// Number of the program.
        prog_id: u32,
        /// Its name, if it could be read.
        prog_name: String,
    },
    /// The driver does not take the program.
    #[error(
        "{name}: the driver refuses native XDP ({source}); set `ingress = \"tc\"` or `xdp_mode = \"skb\"` for \
         this interface{}", mtu_hint(.source)
    )]
    NativeRefused {
        /// The interface.
        name: String,
        /// What the kernel answered.
        #[source]
        source: SyscallError,
    },
    /// The kernel has no tcx.
    #[error("{name}: this kernel has no tcx (it needs 6.6); set `tc = \"auto\"` or `\"clsact\"`")]
    NoTcx {
        /// The interface.
        name: String,
    },
    /// The pin belongs to an interface of another network namespace.
    #[error(
        "{path}: holds a program at an interface of another network namespace; give each daemon a [node] pin_dir of \
         its own"
    )]
    PinnedElsewhere {
        /// The pin.
        path: PathBuf,
    },
    /// A qdisc without an egress hook stands where clsact should.
    #[error(
        "{name}: an `ingress` qdisc is in the way of clsact; remove it with `tc qdisc del dev {name} ingress`"
    )]
    IngressQdisc {
        /// The interface.
        name: String,
    },
    /// A filter of somebody else stands where ours should.
    #[error("{name}: {kind} filter `{filter}` has priority 1 at {direction:?}; give it a later one")]
    ForeignFilter {
        /// The interface.
        name: String,
        /// Kind of the filter.
        kind: String,
        /// Its name.
        filter: String,
        /// The hook.
        direction: Direction,
    },
    /// A system call failed.
    #[error("{name}: {source}")]
    Syscall {
        /// The interface.
        name: String,
        /// Which call, and why.
        #[source]
        source: SyscallError,
    },
    /// A pin could not be read or removed.
    #[error("{path}: {source}")]
    Io {
        /// The pin or its directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The interface table refused.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The pin directory could not be used.
    #[error(transparent)]
    PinDir(#[from] Box<OpenError>),
}

type Result<T> = std::result::Result<T, AttachError>;

fn mtu_hint(source: &SyscallError) -> &'static str {
    if source.errno() == libc::ERANGE {
        "; or lower its MTU, which is too large for XDP"
    } else {
        ""
    }
}

/// Where in the kernel a program of ours can be. The order is that of removal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum AttachPoint {
    Xdp,
    Tcx(Direction),
    Clsact(Direction),
}

impl AttachPoint {
    pub(crate) const ALL: [Self; 5] = [
        Self::Xdp,
        Self::Tcx(Direction::Ingress),
        Self::Tcx(Direction::Egress),
        Self::Clsact(Direction::Ingress),
        Self::Clsact(Direction::Egress),
    ];

    pub(crate) fn direction(self) -> Direction {
        match self {
            Self::Xdp => Direction::Ingress,
            Self::Tcx(direction) | Self::Clsact(direction) => direction,
        }
    }

    pub(crate) fn file(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::Tcx(Direction::Ingress) => "tcx_ingress",
            Self::Tcx(Direction::Egress) => "tcx_egress",
            Self::Clsact(Direction::Ingress) => "clsact_ingress",
            Self::Clsact(Direction::Egress) => "clsact_egress",
        }
    }
}

pub(crate) fn tcx_type(direction: Direction) -> AttachType {
    match direction {
        Direction::Ingress => AttachType::TcxIngress,
        Direction::Egress => AttachType::TcxEgress,
    }
}

/// Whether programs of ours judge by this entry.
pub(crate) fn is_guarded(interface: &Interface) -> bool {
    matches!(interface.role, role::HOST | role::ENDPOINT)
}

/// The programs' slot of an interface.
pub(crate) fn slot(ifindex: u32) -> u32 {
    ifindex & 0xffff
}

pub(crate) fn resolve_tc(mode: TcMode, device: &Device) -> Result<HookKind> {
    let has_tcx = || {
        bpf::has_tcx(device.ifindex).map_err(|source| AttachError::Syscall {
            name: device.name.clone(),
            source,
        })
    };
    match mode {
        TcMode::Clsact => Ok(HookKind::Clsact),
        TcMode::Auto if !has_tcx()? => Ok(HookKind::Clsact),
        TcMode::Tcx if !has_tcx()? => Err(AttachError::NoTcx {
            name: device.name.clone(),
        }),
        TcMode::Auto | TcMode::Tcx => Ok(HookKind::Tcx),
    }
}

pub(crate) fn find_device(ifindex: u32) -> Result<Option<Device>> {
    device(ifindex).map_err(|source| AttachError::Syscall {
        name: format!("interface {ifindex}"),
        source,
    })
}
