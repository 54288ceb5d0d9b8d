//! Programs at interfaces.
//!
//! XDP and tcx programs are held by links, pinned below `<pin_dir>/links/<ifindex>/`; another program takes a link
//! over in one step (BPF_LINK_UPDATE). clsact has no links: its filters belong to the interface, and a directory in
//! the same place remembers that they are ours. They are replaced in one step, too.
//!
//! ```text
//! links/7/xdp              link
//! links/7/tcx_egress       link
//! links/8/clsact_ingress/  a filter at interface 8
//! links/8/clsact_qdisc/    the qdisc was made by us
//! ```

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use palisade_abi::{Direction, ETHER_TYPES, Interface, interface_flags, programs, role};

use crate::{
    Datapath, MapError, OpenError, SyscallError,
    loader::{Program, make_dir, remove_dir_of_pins, version_dirs},
    punt_link::remove_punt_link,
    sys::{
        bpf::{self, AttachType},
        clsact,
        device::{Device, device},
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
    fn number(self) -> u8 {
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
enum Place {
    Xdp,
    Tcx(Direction),
    Clsact(Direction),
}

impl Place {
    const ALL: [Self; 5] = [
        Self::Xdp,
        Self::Tcx(Direction::Ingress),
        Self::Tcx(Direction::Egress),
        Self::Clsact(Direction::Ingress),
        Self::Clsact(Direction::Egress),
    ];

    fn direction(self) -> Direction {
        match self {
            Self::Xdp => Direction::Ingress,
            Self::Tcx(direction) | Self::Clsact(direction) => direction,
        }
    }

    fn file(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::Tcx(Direction::Ingress) => "tcx_ingress",
            Self::Tcx(Direction::Egress) => "tcx_egress",
            Self::Clsact(Direction::Ingress) => "clsact_ingress",
            Self::Clsact(Direction::Egress) => "clsact_egress",
        }
    }
}

/// The directory that says that the clsact qdisc was made by us.
const QDISC_FILE: &str = "clsact_qdisc";

fn tcx_type(direction: Direction) -> AttachType {
    match direction {
        Direction::Ingress => AttachType::TcxIngress,
        Direction::Egress => AttachType::TcxEgress,
    }
}

/// Whether programs of ours judge by this entry.
fn is_guarded(interface: &Interface) -> bool {
    matches!(interface.role, role::HOST | role::ENDPOINT)
}

/// The places of an interface where programs of ours are.
fn attached_places(dir: &Path, device: &Device) -> Result<Vec<Place>> {
    let mut places = Vec::new();
    for place in Place::ALL {
        if present(dir, device, place)?.is_some() {
            places.push(place);
        }
    }
    Ok(places)
}

/// The programs' slot of an interface.
fn slot(ifindex: u32) -> u32 {
    ifindex & 0xffff
}

impl Datapath {
    /// Guards an interface. If it is guarded already, by this process or one before, the programs are exchanged for
    /// this process's without an instant in which there is none, and what is no longer asked for is removed after.
    ///
    /// The programs are told about the interface before they are there.
    ///
    /// # Errors
    /// What was attached before stays attached; a hook that had nothing before has nothing after. (A program at one hook
    /// alone would judge packets of flows whose other direction it never sees, and cut the node off.)
    pub fn attach(&self, wanted: &Attachment) -> Result<Attached> {
        let ifindex = wanted.ifindex;
        let device = find_device(ifindex)?.ok_or(AttachError::NoSuchInterface { ifindex })?;
        let dir = self.link_dir(ifindex);
        let before = attached_places(&dir, &device)?;
        // A pin that is left now without a program here belongs to an interface of another network namespace.
        let foreign: Vec<Place> = Place::ALL
            .into_iter()
            .filter(|place| dir.join(place.file()).exists() && !before.contains(place))
            .collect();
        let slot_before = self.interfaces.get(&slot(ifindex))?.unwrap_or_default();
        self.attach_hooks(wanted, &device).inspect_err(|_| {
            // What could not be removed stays, and is found again as half of an attachment.
            let _ = self.undo(&device, &before, &foreign, &slot_before);
        })
    }

    /// Takes back what a failed attachment has left.
    fn undo(
        &self,
        device: &Device,
        before: &[Place],
        foreign: &[Place],
        slot_before: &Interface,
    ) -> Result<()> {
        let dir = self.link_dir(device.ifindex);
        for place in Place::ALL {
            // A hook may have been handed over from one kind of program to another: then the new one stays.
            let judged_before = before.iter().any(|b| b.direction() == place.direction());
            if !judged_before && !foreign.contains(&place) {
                remove(&dir, device.ifindex, Some(device), place)?;
            }
        }
        if before.is_empty() && foreign.is_empty() {
            remove_qdisc(&dir, device.ifindex, Some(device))?;
            let ours = self.interfaces.get(&slot(device.ifindex))?.unwrap_or_default();
            if ours.ifindex == device.ifindex && is_guarded(&ours) {
                let restored = if is_guarded(slot_before) && slot_before.ifindex == device.ifindex {
                    Interface::default()
                } else {
                    *slot_before
                };
                self.interfaces.insert(&slot(device.ifindex), &restored)?;
            }
            remove_empty(&dir)?;
        }
        Ok(())
    }

    /// Tells the programs of the interfaces that are present and not guarded: by index, with whether they are above the
    /// interface of a workload ([`role::LINK`], else [`role::SEEN`]). `before` is what was told last; `None`: not known, the
    /// whole table is read. Nothing that enters by an interface that the programs were not told of is forwarded.
    ///
    /// # Errors
    /// If the interface table cannot be read or written.
    pub fn set_others(
        &self,
        before: Option<&BTreeMap<u32, bool>>,
        others: &BTreeMap<u32, bool>,
    ) -> Result<()> {
        let stale: Vec<u32> = match before {
            Some(before) => before.keys().copied().collect(),
            None => self.interfaces()?.iter().map(|i| i.ifindex).collect(),
        };
        for ifindex in stale {
            let told = self.interfaces.get(&slot(ifindex))?.unwrap_or_default();
            if !others.contains_key(&ifindex) && told.ifindex == ifindex && !is_guarded(&told) {
                self.interfaces.insert(&slot(ifindex), &Interface::default())?;
            }
        }
        for (&ifindex, &is_link) in others {
            if before.and_then(|before| before.get(&ifindex)) == Some(&is_link) {
                continue;
            }
            let told = self.interfaces.get(&slot(ifindex))?.unwrap_or_default();
            // A guarded interface keeps its slot. What enters by the other one is then not forwarded.
            if is_guarded(&told) && (told.ifindex == ifindex || find_device(told.ifindex)?.is_some()) {
                continue;
            }
            let interface = Interface {
                ifindex,
                role: if is_link { role::LINK } else { role::SEEN },
                link: ifindex,
                ..Interface::default()
            };
            self.interfaces.insert(&slot(ifindex), &interface)?;
        }
        Ok(())
    }

    fn attach_hooks(&self, wanted: &Attachment, device: &Device) -> Result<Attached> {
        let ifindex = wanted.ifindex;
        let mut interface = self.claim_slot(wanted, device)?;
        make_dir(&self.link_dir(ifindex)).map_err(Box::new)?;
        let tc = resolve_tc(wanted.tc, device)?;

        let mut note = None;
        let ingress = match (wanted.ingress, wanted.role) {
            (Hook::Xdp, _) => self.attach_xdp(device, wanted.xdp_mode, tc)?,
            (Hook::Auto, Role::Host) if device.ethernet => {
                match self.attach_xdp(device, wanted.xdp_mode, tc) {
                    Err(AttachError::NativeRefused { source, .. }) => {
                        note = Some(format!("the driver refuses native XDP: {source}"));
                        self.attach_tc(device, Direction::Ingress, tc)?
                    }
                    other => other?,
                }
            }
            (Hook::Auto | Hook::Tc, _) => self.attach_tc(device, Direction::Ingress, tc)?,
        };
        if ingress == HookKind::XdpGeneric && interface.flags & interface_flags::XDP_GENERIC == 0 {
            interface.flags |= interface_flags::XDP_GENERIC;
            self.interfaces.insert(&slot(ifindex), &interface)?;
        }
        let egress = self.attach_tc(device, Direction::Egress, tc)?;
        if interface.flags & interface_flags::PENDING != 0 {
            interface.flags &= !interface_flags::PENDING;
            self.interfaces.insert(&slot(ifindex), &interface)?;
        }

        let in_use = |place| match place {
            Place::Xdp => matches!(ingress, HookKind::XdpNative | HookKind::XdpGeneric),
            Place::Tcx(Direction::Ingress) => ingress == HookKind::Tcx,
            Place::Tcx(Direction::Egress) => egress == HookKind::Tcx,
            Place::Clsact(Direction::Ingress) => ingress == HookKind::Clsact,
            Place::Clsact(Direction::Egress) => egress == HookKind::Clsact,
        };
        let dir = self.link_dir(ifindex);
        for place in Place::ALL {
            if !in_use(place) {
                remove(&dir, ifindex, Some(device), place)?;
            }
        }
        remove_qdisc(&dir, ifindex, Some(device))?;
        self.follow_old_conntrack()?;
        Ok(Attached {
            ifindex,
            name: device.name.clone(),
            interface,
            ingress: Some(ingress),
            egress: Some(egress),
            note,
        })
    }

    /// Stops guarding an interface. No error if it is not guarded or no longer exists.
    ///
    /// # Errors
    /// If something could not be removed.
    pub fn detach(&self, ifindex: u32) -> Result<()> {
        detach_interface(&self.link_dir(ifindex), ifindex)?;
        if self
            .interfaces
            .get(&slot(ifindex))?
            .is_some_and(|i| i.ifindex == ifindex)
        {
            self.interfaces.insert(&slot(ifindex), &Interface::default())?;
        }
        Ok(())
    }

    /// Stops guarding everything and removes every pin: nothing is left of Palisade in the kernel once this value is
    /// dropped.
    ///
    /// # Errors
    /// If something could not be removed; what could be is.
    pub fn detach_all(self) -> Result<()> {
        detach_all(&self.pin_dir)
    }

    /// What is guarded, as the kernel has it now.
    ///
    /// # Errors
    /// If a pin or an interface cannot be read.
    pub fn attachments(&self) -> Result<Vec<Attached>> {
        let mut attached = Vec::new();
        for ifindex in guarded(&self.pin_dir)? {
            let Some(device) = find_device(ifindex)? else {
                continue;
            };
            let dir = self.link_dir(ifindex);
            let mut found = Attached {
                ifindex,
                name: device.name.clone(),
                interface: self
                    .interfaces
                    .get(&slot(ifindex))?
                    .filter(|i| i.ifindex == ifindex)
                    .unwrap_or_default(),
                ingress: None,
                egress: None,
                note: None,
            };
            for place in Place::ALL {
                let Some(kind) = present(&dir, &device, place)? else {
                    continue;
                };
                match place {
                    Place::Xdp | Place::Tcx(Direction::Ingress) | Place::Clsact(Direction::Ingress) => {
                        found.ingress = Some(kind);
                    }
                    Place::Tcx(Direction::Egress) | Place::Clsact(Direction::Egress) => {
                        found.egress = Some(kind)
                    }
                }
            }
            attached.push(found);
        }
        attached.sort_by_key(|a| a.ifindex);
        Ok(attached)
    }

    /// Removes what is left of interfaces that no longer exist; answers their indexes.
    ///
    /// # Errors
    /// If something could not be removed.
    pub fn forget_dead(&self) -> Result<Vec<u32>> {
        let mut dead = Vec::new();
        for ifindex in guarded(&self.pin_dir)? {
            if find_device(ifindex)?.is_some() {
                continue;
            }
            let dir = self.link_dir(ifindex);
            let mut alive_elsewhere = false;
            for place in [
                Place::Xdp,
                Place::Tcx(Direction::Ingress),
                Place::Tcx(Direction::Egress),
            ] {
                alive_elsewhere |= pinned_link(&dir.join(place.file()), ifindex)?.is_some();
            }
            if !alive_elsewhere {
                self.detach(ifindex)?;
                dead.push(ifindex);
            }
        }
        Ok(dead)
    }

    fn link_dir(&self, ifindex: u32) -> PathBuf {
        links_dir(&self.pin_dir).join(ifindex.to_string())
    }

    /// Writes what the programs must know of the interface.
    fn claim_slot(&self, wanted: &Attachment, device: &Device) -> Result<Interface> {
        let slot = slot(wanted.ifindex);
        let generic = wanted.xdp_mode == XdpMode::Generic
            && (wanted.ingress == Hook::Xdp || wanted.ingress == Hook::Auto && wanted.role == Role::Host);
        let interface = Interface {
            ifindex: wanted.ifindex,
            endpoint: wanted.endpoint,
            role: wanted.role.number(),
            flags: if device.ethernet {
                0
            } else {
                interface_flags::LAYER3
            } | if generic { interface_flags::XDP_GENERIC } else { 0 },
            link: if wanted.link == 0 {
                wanted.ifindex
            } else {
                wanted.link
            },
            ether_types: wanted.ether_types,
        };
        let present = self.interfaces.get(&slot)?.unwrap_or_default();
        let attached = is_guarded(&present)
            && present.ifindex == wanted.ifindex
            && present.flags & interface_flags::PENDING == 0;
        let interface = Interface {
            flags: interface.flags | if attached { 0 } else { interface_flags::PENDING },
            ..interface
        };
        if is_guarded(&present) && present.ifindex != wanted.ifindex {
            let other = present.ifindex;
            if find_device(other)?.is_some() {
                return Err(AttachError::SlotCollision {
                    name: device.name.clone(),
                    ifindex: wanted.ifindex,
                    other,
                });
            }
        }
        if present != interface {
            self.interfaces.insert(&slot, &interface)?;
        }
        Ok(interface)
    }

    fn attach_xdp(&self, device: &Device, mode: XdpMode, tc: HookKind) -> Result<HookKind> {
        let path = self.link_dir(device.ifindex).join(Place::Xdp.file());
        let syscall = |source| AttachError::Syscall {
            name: device.name.clone(),
            source,
        };
        if let Some((link, info)) = pinned_link(&path, device.ifindex)? {
            let Some(on_device) = device.xdp.filter(|xdp| xdp.prog_id == info.prog_id) else {
                return Err(AttachError::PinnedElsewhere { path });
            };
            let fits = match mode {
                XdpMode::Native => !on_device.generic,
                XdpMode::Generic => on_device.generic,
                XdpMode::NativeOrGeneric => true,
            };
            if fits {
                bpf::link_update(link.as_fd(), self.programs.xdp.fd()).map_err(syscall)?;
                return Ok(if on_device.generic {
                    HookKind::XdpGeneric
                } else {
                    HookKind::XdpNative
                });
            }
            // Native and generic XDP exclude each other. Until the other one is there, tc judges; if it does not
            // come, tc goes on.
            self.attach_tc(device, Direction::Ingress, tc)?;
            bpf::link_detach(link.as_fd()).map_err(syscall)?;
            unpin(&path)?;
        } else if let Some(foreign) = device.xdp {
            return Err(AttachError::ForeignXdp {
                name: device.name.clone(),
                prog_id: foreign.prog_id,
                prog_name: bpf::program_name(foreign.prog_id).unwrap_or_default(),
            });
        }

        let create = |flags| {
            bpf::link_create(self.programs.xdp.fd(), device.ifindex, AttachType::Xdp, flags)
                .and_then(|link| bpf::pin(link.as_fd(), &path))
        };
        let native = |source| AttachError::NativeRefused {
            name: device.name.clone(),
            source,
        };
        match mode {
            XdpMode::Native => create(bpf::XDP_FLAGS_DRV_MODE)
                .map_err(native)
                .map(|()| HookKind::XdpNative),
            XdpMode::Generic => create(bpf::XDP_FLAGS_SKB_MODE)
                .map_err(syscall)
                .map(|()| HookKind::XdpGeneric),
            XdpMode::NativeOrGeneric => create(bpf::XDP_FLAGS_DRV_MODE)
                .map(|()| HookKind::XdpNative)
                .or_else(|_| {
                    create(bpf::XDP_FLAGS_SKB_MODE)
                        .map_err(syscall)
                        .map(|()| HookKind::XdpGeneric)
                }),
        }
    }

    fn attach_tc(&self, device: &Device, direction: Direction, kind: HookKind) -> Result<HookKind> {
        let program = match direction {
            Direction::Ingress => &self.programs.tc_ingress,
            Direction::Egress => &self.programs.tc_egress,
        };
        if kind == HookKind::Clsact {
            self.attach_clsact(device, direction, program)?;
        } else {
            self.attach_tcx(device, direction, program)?;
        }
        Ok(kind)
    }

    fn attach_tcx(&self, device: &Device, direction: Direction, program: &Program) -> Result<()> {
        let path = self.link_dir(device.ifindex).join(Place::Tcx(direction).file());
        let syscall = |source| AttachError::Syscall {
            name: device.name.clone(),
            source,
        };
        if let Some((link, info)) = pinned_link(&path, device.ifindex)? {
            if !on_tcx(device.ifindex, direction, info.id).map_err(syscall)? {
                return Err(AttachError::PinnedElsewhere { path });
            }
            return bpf::link_update(link.as_fd(), program.fd()).map_err(syscall);
        }
        // Before all others: a program that runs earlier could let packets pass that are never judged.
        bpf::link_create(
            program.fd(),
            device.ifindex,
            tcx_type(direction),
            bpf::BPF_F_BEFORE,
        )
        .and_then(|link| bpf::pin(link.as_fd(), &path))
        .map_err(syscall)
    }

    fn attach_clsact(&self, device: &Device, direction: Direction, program: &Program) -> Result<()> {
        let syscall = |source| AttachError::Syscall {
            name: device.name.clone(),
            source,
        };
        let dir = self.link_dir(device.ifindex);
        match clsact::qdisc(device.ifindex).map_err(syscall)?.as_deref() {
            Some("clsact") => {}
            Some(_) => {
                return Err(AttachError::IngressQdisc {
                    name: device.name.clone(),
                });
            }
            None => {
                make_dir(&dir.join(QDISC_FILE)).map_err(Box::new)?;
                clsact::add_qdisc(device.ifindex).map_err(syscall)?;
            }
        }
        let foreign = clsact::filters(device.ifindex, direction)
            .map_err(syscall)?
            .into_iter()
            .find(|filter| {
                let other_kind = filter.priority == clsact::PRIORITY && filter.kind != "bpf";
                other_kind || (filter.in_our_place() && filter.name != program.name)
            });
        if let Some(filter) = foreign {
            return Err(AttachError::ForeignFilter {
                name: device.name.clone(),
                kind: filter.kind,
                filter: filter.name,
                direction,
            });
        }
        // The record first: a filter without one would be forgotten, a record without a filter does no harm.
        make_dir(&dir.join(Place::Clsact(direction).file())).map_err(Box::new)?;
        clsact::set_filter(device.ifindex, direction, program.fd(), program.name).map_err(syscall)
    }
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

/// Stops guarding every interface that a pin directory knows, and removes the directory with its maps. Needs no maps
/// and no programs, so it works whatever version made them.
///
/// # Errors
/// The first thing that could not be removed, after everything else was.
pub fn detach_all(pin_dir: &Path) -> Result<()> {
    let mut outcome = Ok(());
    let mut note = |result: Result<()>| {
        if outcome.is_ok() {
            outcome = result;
        }
    };
    for ifindex in guarded(pin_dir)? {
        note(detach_interface(
            &links_dir(pin_dir).join(ifindex.to_string()),
            ifindex,
        ));
    }
    note(remove_punt_link(pin_dir));
    for dir in version_dirs(pin_dir).map_err(Box::new)? {
        note(remove_dir_of_pins(&dir).map_err(|e| Box::new(e).into()));
    }
    for dir in [links_dir(pin_dir), pin_dir.to_owned()] {
        note(remove_empty(&dir));
    }
    outcome
}

fn links_dir(pin_dir: &Path) -> PathBuf {
    pin_dir.join("links")
}

/// The interfaces that a pin directory has records of.
fn guarded(pin_dir: &Path) -> Result<Vec<u32>> {
    let dir = links_dir(pin_dir);
    let failed = |source| AttachError::Io {
        path: dir.clone(),
        source,
    };
    let entries = match fs::read_dir(&dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        found.extend(
            entry
                .map_err(failed)?
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<u32>().ok()),
        );
    }
    Ok(found)
}

fn detach_interface(dir: &Path, ifindex: u32) -> Result<()> {
    let device = find_device(ifindex)?;
    for place in Place::ALL {
        remove(dir, ifindex, device.as_ref(), place)?;
    }
    remove_qdisc(dir, ifindex, device.as_ref())?;
    remove_empty(dir)
}

/// What of ours is at a place of an interface.
fn present(dir: &Path, device: &Device, place: Place) -> Result<Option<HookKind>> {
    let path = dir.join(place.file());
    let syscall = |source| AttachError::Syscall {
        name: device.name.clone(),
        source,
    };
    Ok(match place {
        Place::Xdp => {
            let link = pinned_link(&path, device.ifindex)?;
            device
                .xdp
                .filter(|xdp| link.is_some_and(|(_, info)| info.prog_id == xdp.prog_id))
                .map(|xdp| {
                    if xdp.generic {
                        HookKind::XdpGeneric
                    } else {
                        HookKind::XdpNative
                    }
                })
        }
        Place::Tcx(direction) => match pinned_link(&path, device.ifindex)? {
            Some((_, info)) if on_tcx(device.ifindex, direction, info.id).map_err(syscall)? => {
                Some(HookKind::Tcx)
            }
            _ => None,
        },
        Place::Clsact(direction) => {
            (path.is_dir() && our_filter(device, direction)?).then_some(HookKind::Clsact)
        }
    })
}

/// Removes what of ours is at a place. `device` is none if the interface is gone.
fn remove(dir: &Path, ifindex: u32, device: Option<&Device>, place: Place) -> Result<()> {
    let path = dir.join(place.file());
    match place {
        Place::Xdp | Place::Tcx(_) => {
            if let Some((link, _)) = pinned_link(&path, ifindex)? {
                // At once, and not when the last process that has it open ends.
                bpf::link_detach(link.as_fd()).map_err(|source| AttachError::Syscall {
                    name: path.display().to_string(),
                    source,
                })?;
                unpin(&path)?;
            }
        }
        Place::Clsact(direction) => {
            if !path.is_dir() {
                return Ok(());
            }
            if let Some(device) = device
                && our_filter(device, direction)?
            {
                clsact::delete_filter(ifindex, direction).map_err(|source| AttachError::Syscall {
                    name: device.name.clone(),
                    source,
                })?;
            }
            remove_empty(&path)?;
        }
    }
    Ok(())
}

/// Removes the clsact qdisc if we made it and nobody uses it.
fn remove_qdisc(dir: &Path, ifindex: u32, device: Option<&Device>) -> Result<()> {
    let path = dir.join(QDISC_FILE);
    if !path.is_dir() {
        return Ok(());
    }
    if let Some(device) = device {
        let syscall = |source| AttachError::Syscall {
            name: device.name.clone(),
            source,
        };
        for direction in palisade_abi::DIRECTIONS {
            let ours = dir.join(Place::Clsact(direction).file()).is_dir();
            if ours || !clsact::filters(ifindex, direction).map_err(syscall)?.is_empty() {
                return Ok(());
            }
        }
        if clsact::qdisc(ifindex).map_err(syscall)?.as_deref() == Some("clsact") {
            clsact::delete_qdisc(ifindex).map_err(syscall)?;
        }
    }
    remove_empty(&path)
}

fn our_filter(device: &Device, direction: Direction) -> Result<bool> {
    let name = match direction {
        Direction::Ingress => programs::TC_INGRESS,
        Direction::Egress => programs::TC_EGRESS,
    };
    let filters = clsact::filters(device.ifindex, direction).map_err(|source| AttachError::Syscall {
        name: device.name.clone(),
        source,
    })?;
    Ok(filters
        .iter()
        .any(|filter| filter.in_our_place() && filter.name == name))
}

fn on_tcx(ifindex: u32, direction: Direction, link_id: u32) -> std::result::Result<bool, SyscallError> {
    Ok(bpf::tcx_query(ifindex, tcx_type(direction))?.contains(&link_id))
}

/// The link that is pinned at a path, if it still holds an interface. One whose interface is gone is unpinned.
pub(crate) fn pinned_link(path: &Path, ifindex: u32) -> Result<Option<(OwnedFd, bpf::LinkInfo)>> {
    let syscall = |source| AttachError::Syscall {
        name: path.display().to_string(),
        source,
    };
    let Some(link) = bpf::get_pinned(path).map_err(syscall)? else {
        return Ok(None);
    };
    let info = bpf::link_info(link.as_fd()).map_err(syscall)?;
    if info.ifindex != ifindex {
        // The kernel shows index 0 once the interface is gone (or somebody detached the link by force).
        unpin(path)?;
        return Ok(None);
    }
    Ok(Some((link, info)))
}

pub(crate) fn unpin(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(AttachError::Io {
            path: path.to_owned(),
            source: e,
        }),
        _ => Ok(()),
    }
}

fn remove_empty(path: &Path) -> Result<()> {
    match fs::remove_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(AttachError::Io {
            path: path.to_owned(),
            source: e,
        }),
        _ => Ok(()),
    }
}

pub(crate) fn find_device(ifindex: u32) -> Result<Option<Device>> {
    device(ifindex).map_err(|source| AttachError::Syscall {
        name: format!("interface {ifindex}"),
        source,
    })
}
