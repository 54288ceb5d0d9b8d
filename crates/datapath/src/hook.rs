//! Types of attachments: the wanted and the actual programs of an interface, and the errors of attaching.

use std::{io, path::PathBuf};

use palisade_abi::{Direction, ETHER_TYPES, Interface, role};

use crate::{
    MapError, OpenError, SyscallError,
    sys::{
        bpf::{self, AttachType},
        link::{Device, device},
    },
};

/// Role of an interface.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    /// NIC of the node.
    Host,
    /// Host side of a workload's veth pair.
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

/// Hook for packets that enter by the interface.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Hook {
    /// At an Ethernet NIC: XDP, or tc if [`XdpMode::Native`] is wanted and the driver refuses it. At every other
    /// interface: tc, because XDP on a veth makes the kernel split GSO packets.
    #[default]
    Auto,
    /// XDP.
    Xdp,
    /// tc.
    Tc,
}

/// Mode of XDP.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum XdpMode {
    /// Native XDP, in the driver.
    #[default]
    Native,
    /// Native XDP, or generic XDP if the driver refuses the program.
    NativeOrGeneric,
    /// Generic XDP ("skb"): every driver has it, but it is slow.
    Generic,
}

/// Kind of tc hook.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum TcMode {
    /// tcx if the kernel has it (since 6.6), else clsact.
    #[default]
    Auto,
    /// tcx.
    Tcx,
    /// Filter of the clsact qdisc.
    Clsact,
}

/// Wanted programs of an interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attachment {
    /// Interface index in the network namespace of the calling thread.
    pub ifindex: u32,
    /// Role of the interface.
    pub role: Role,
    /// Endpoint behind the interface; for a NIC the endpoint of the node.
    pub endpoint: u16,
    /// Hook for packets that enter.
    pub ingress: Hook,
    /// Mode of XDP, if the ingress hook is XDP.
    pub xdp_mode: XdpMode,
    /// Kind of tc hook.
    pub tc: TcMode,
    /// Index of the bridge or VRF of which the interface is a port; 0 if there is none.
    pub link: u32,
    /// EtherTypes that pass without policy evaluation; see [`Interface::ether_types`].
    pub ether_types: [u16; ETHER_TYPES],
    /// Whether failsafe ports of the node do not pass at the interface (role host).
    pub no_failsafe: bool,
}

/// Actual hook of a program.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, strum::Display)]
#[strum(serialize_all = "kebab-case")]
pub enum HookKind {
    /// Native XDP.
    XdpNative,
    /// Generic XDP.
    XdpGeneric,
    /// tcx.
    Tcx,
    /// clsact.
    Clsact,
}

/// Actual programs of an interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attached {
    /// Interface index.
    pub ifindex: u32,
    /// Interface name.
    pub name: String,
    /// Entry of the interface table; its role is [`role::NONE`] if the table has no entry.
    pub interface: Interface,
    /// Hook for packets that enter; `None` if no program is attached.
    pub ingress: Option<HookKind>,
    /// Hook for packets that leave; `None` if no program is attached.
    pub egress: Option<HookKind>,
    /// Reason why a hook other than the preferred one is used.
    pub note: Option<String>,
}

/// Error of attaching or detaching.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The interface does not exist in this network namespace.
    #[error("no interface with index {ifindex} in this network namespace")]
    NoSuchInterface {
        /// Interface index.
        ifindex: u32,
    },
    /// The interface table has the same slot for two interfaces.
    #[error(
        "{name}: its index {ifindex} and the index {other} of another interface with programs have the same slot (they \
         differ by a multiple of 65536); create {name} anew to give it another index"
    )]
    SlotCollision {
        /// Interface name.
        name: String,
        /// Interface index.
        ifindex: u32,
        /// Index of the interface that has the slot.
        other: u32,
    },
    /// The interface has an XDP program that Palisade has not attached.
    #[error(
        "{name}: another XDP program (id {prog_id}, `{prog_name}`) is attached; remove it (`ip link set dev {name} \
         xdp off`, or end the program that holds it), or set `ingress = \"tc\"` for this interface"
    )]
    ForeignXdp {
        /// Interface name.
        name: String,
        /// Id of the program.
        prog_id: u32,
        /// Name of the program, empty if it cannot be read.
        prog_name: String,
    },
    /// The driver refuses native XDP.
    #[error(
        "{name}: the driver refuses native XDP ({source}); set `ingress = \"tc\"` or `xdp_mode = \"skb\"` for \
         this interface{}", mtu_hint(.source)
    )]
    NativeRefused {
        /// Interface name.
        name: String,
        /// Refused system call.
        #[source]
        source: SyscallError,
    },
    /// The kernel has no tcx.
    #[error("{name}: this kernel has no tcx (it needs 6.6); set `tc = \"auto\"` or `\"clsact\"`")]
    NoTcx {
        /// Interface name.
        name: String,
    },
    /// The pin belongs to an interface of another network namespace.
    #[error(
        "{path}: holds a program at an interface of another network namespace; give each daemon a [node] pin_dir of \
         its own"
    )]
    PinnedElsewhere {
        /// Path of the pin.
        path: PathBuf,
    },
    /// The interface has an `ingress` qdisc, which has no egress hook and excludes clsact.
    #[error("{name}: an `ingress` qdisc excludes clsact; remove it with `tc qdisc del dev {name} ingress`")]
    IngressQdisc {
        /// Interface name.
        name: String,
    },
    /// A foreign filter has the priority of Palisade's filter, and either another kind or the same handle.
    #[error("{name}: {kind} filter `{filter}` has priority 1 at {direction:?}; give it a higher number")]
    ForeignFilter {
        /// Interface name.
        name: String,
        /// Kind of the filter, such as `flower`.
        kind: String,
        /// Name of the filter.
        filter: String,
        /// Direction of the hook.
        direction: Direction,
    },
    /// A system call failed.
    #[error("{name}: {source}")]
    Syscall {
        /// Interface name.
        name: String,
        /// Failed system call.
        #[source]
        source: SyscallError,
    },
    /// A pin could not be read or removed.
    #[error("{path}: {source}")]
    Io {
        /// Path of the pin or its directory.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The interface table could not be read or written.
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

/// Attach point of a program. Programs are removed in the order of [`Self::ALL`].
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

/// Returns whether the entry is of an interface with programs.
pub(crate) fn has_programs(interface: &Interface) -> bool {
    matches!(interface.role, role::HOST | role::ENDPOINT)
}

/// Returns the slot of an interface in the interface table.
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
