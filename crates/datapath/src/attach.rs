//! Attaching of programs to interfaces.
//!
//! XDP and tcx programs are attached by BPF links, pinned below `<pin_dir>/links/<ifindex>/`; BPF_LINK_UPDATE replaces
//! the program of a link atomically. clsact filters have no link: they belong to the interface, and an empty directory
//! at the path of the pin records that Palisade added the filter. A filter is replaced atomically, too.
//!
//! ```text
//! links/7/xdp              pinned link
//! links/7/tcx_egress       pinned link
//! links/8/clsact_ingress/  record of a filter at interface 8
//! links/8/clsact_qdisc/    record that Palisade added the qdisc
//! ```

use std::{collections::BTreeMap, os::fd::AsFd as _};

use palisade_abi::{Direction, Interface, interface_flags, role};

use crate::{
    AttachError, Attached, Attachment, Datapath, Hook, HookKind, Role, XdpMode,
    hook::{AttachPoint, find_device, has_programs, resolve_tc, slot, tcx_type},
    pin::{make_dir, pinned_link, unpin},
    present::{attached_points, on_tcx},
    programs::Program,
    sys::{
        bpf::{self, AttachType},
        clsact,
        link::Device,
    },
    teardown::{QDISC_FILE, remove, remove_qdisc},
};

type Result<T> = std::result::Result<T, AttachError>;

impl Datapath {
    /// Attaches the programs to an interface. Programs that this or an earlier process has attached are replaced
    /// atomically, so every packet meets a program; afterwards, programs at hooks that are no longer wanted are
    /// detached.
    ///
    /// The interface table is written first, because a program drops packets of an interface that the table does not
    /// have.
    ///
    /// # Errors
    /// [`AttachError`]. Programs that were attached before stay attached. A direction that had no program before has
    /// none after the error: with a program for one direction only, conntrack would not see the other direction of each
    /// flow, and the node would be cut off.
    pub fn attach(&self, wanted: &Attachment) -> Result<Attached> {
        let ifindex = wanted.ifindex;
        self.commit().map_err(Box::new)?;
        let device = find_device(ifindex)?.ok_or(AttachError::NoSuchInterface { ifindex })?;
        let dir = self.link_dir(ifindex);
        let before = attached_points(&dir, &device)?;
        // `attached_points` has removed the pins of links whose interface is gone. A remaining pin without a program at
        // this interface is treated as the pin of an interface in another network namespace.
        let foreign: Vec<AttachPoint> = AttachPoint::ALL
            .into_iter()
            .filter(|point| dir.join(point.file()).exists() && !before.contains(point))
            .collect();
        let slot_before = self.interfaces.get(&slot(ifindex))?.unwrap_or_default();
        self.attach_hooks(wanted, &device).inspect_err(|_| {
            // An error of `undo` is ignored: the next call of `attach` finds the remaining programs.
            let _ = self.undo(&device, &before, &foreign, &slot_before);
        })
    }

    /// Closes the failsafe ports of the node at an interface that has programs. Returns whether they were open there.
    ///
    /// Must be called before a policy for the closed interface takes effect: a flow that is evaluated while the ports are
    /// still open gets the revision of that policy, and is not evaluated again. [`Self::attach`] opens them.
    ///
    /// # Errors
    /// [`MapError`](crate::MapError) if the interface table cannot be read or written.
    pub fn close_failsafe(&self, ifindex: u32) -> std::result::Result<bool, crate::MapError> {
        let mut interface = self.interfaces.get(&slot(ifindex))?.unwrap_or_default();
        let is_open = interface.flags & interface_flags::NO_FAILSAFE == 0;
        if !has_programs(&interface) || interface.ifindex != ifindex || !is_open {
            return Ok(false);
        }
        interface.flags |= interface_flags::NO_FAILSAFE;
        self.interfaces.insert(&slot(ifindex), &interface)?;
        Ok(true)
    }

    /// Waits until all runs of the programs that have begun before have ended. What was closed in a map before is then
    /// closed for all packets: a run can use a value that it has read before the write until it ends.
    ///
    /// # Errors
    /// [`MapError`](crate::MapError) if the kernel refuses the maps that the wait needs.
    pub fn wait_for_programs(&self) -> std::result::Result<(), crate::MapError> {
        crate::sys::bpf::wait_for_programs().map_err(|source| crate::MapError::Syscall {
            map: "palisade_wait".to_owned(),
            source,
        })
    }

    /// Writes the interfaces without programs to the interface table, because packets that enter by an interface
    /// outside the table are not forwarded. `others` maps the index of each interface to whether it is stacked on an
    /// interface of a workload ([`role::LINK`], else [`role::SEEN`]). `before` is the value of `others` in the last
    /// call; `None` compares with the whole table.
    ///
    /// # Errors
    /// [`MapError`](crate::MapError) if the interface table cannot be read or written.
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
            let entry = self.interfaces.get(&slot(ifindex))?.unwrap_or_default();
            if !others.contains_key(&ifindex) && entry.ifindex == ifindex && !has_programs(&entry) {
                self.interfaces.insert(&slot(ifindex), &Interface::default())?;
            }
        }
        for (&ifindex, &is_link) in others {
            if before.and_then(|before| before.get(&ifindex)) == Some(&is_link) {
                continue;
            }
            let entry = self.interfaces.get(&slot(ifindex))?.unwrap_or_default();
            // Two interfaces share a slot if their indexes differ by a multiple of 65536. The interface with programs
            // keeps the slot; packets that enter by the other interface are not forwarded.
            if has_programs(&entry) && (entry.ifindex == ifindex || find_device(entry.ifindex)?.is_some()) {
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
        let flags = match ingress {
            HookKind::XdpGeneric => interface_flags::XDP_GENERIC | interface_flags::XDP,
            HookKind::XdpNative => interface_flags::XDP,
            HookKind::Tcx | HookKind::Clsact => 0,
        };
        let flags = interface.flags & !interface_flags::XDP | flags;
        if interface.flags != flags {
            interface.flags = flags;
            self.interfaces.insert(&slot(ifindex), &interface)?;
        }
        let egress = self.attach_tc(device, Direction::Egress, tc)?;
        if interface.flags & interface_flags::PENDING != 0 {
            interface.flags &= !interface_flags::PENDING;
            self.interfaces.insert(&slot(ifindex), &interface)?;
        }

        let in_use = |point| match point {
            AttachPoint::Xdp => matches!(ingress, HookKind::XdpNative | HookKind::XdpGeneric),
            AttachPoint::Tcx(Direction::Ingress) => ingress == HookKind::Tcx,
            AttachPoint::Tcx(Direction::Egress) => egress == HookKind::Tcx,
            AttachPoint::Clsact(Direction::Ingress) => ingress == HookKind::Clsact,
            AttachPoint::Clsact(Direction::Egress) => egress == HookKind::Clsact,
        };
        let dir = self.link_dir(ifindex);
        for point in AttachPoint::ALL {
            if !in_use(point) {
                remove(&dir, ifindex, Some(device), point)?;
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

    /// Writes the interface to the interface table, with the flag [`interface_flags::PENDING`] until its programs are
    /// attached.
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
            } | if generic { interface_flags::XDP_GENERIC } else { 0 }
                | if wanted.no_failsafe {
                    interface_flags::NO_FAILSAFE
                } else {
                    0
                },
            link: if wanted.link == 0 {
                wanted.ifindex
            } else {
                wanted.link
            },
            ether_types: wanted.ether_types,
        };
        let present = self.interfaces.get(&slot)?.unwrap_or_default();
        let attached = has_programs(&present)
            && present.ifindex == wanted.ifindex
            && present.flags & interface_flags::PENDING == 0;
        let interface = Interface {
            flags: interface.flags
                | if attached {
                    // Until the hook has changed, packets of the proxy enter as before.
                    present.flags & interface_flags::XDP
                } else {
                    interface_flags::PENDING
                },
            ..interface
        };
        if has_programs(&present) && present.ifindex != wanted.ifindex {
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
        let capturing = self.capturing().clone();
        let program = capturing
            .as_deref()
            .map_or(&self.programs.xdp, |capture| &capture.xdp);
        let path = self.link_dir(device.ifindex).join(AttachPoint::Xdp.file());
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
                bpf::link_update(link.as_fd(), program.fd()).map_err(syscall)?;
                return Ok(if on_device.generic {
                    HookKind::XdpGeneric
                } else {
                    HookKind::XdpNative
                });
            }
            // An interface cannot have native and generic XDP at once, so XDP is detached before the other mode is
            // attached. Meanwhile, and if attaching the other mode fails, the tc program filters the packets.
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
            bpf::link_create(program.fd(), device.ifindex, AttachType::Xdp, flags)
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
        let capturing = self.capturing().clone();
        let program = match (direction, capturing.as_deref()) {
            (Direction::Ingress, None) => &self.programs.tc_ingress,
            (Direction::Ingress, Some(capture)) => &capture.tc_ingress,
            (Direction::Egress, None) => &self.programs.tc_egress,
            (Direction::Egress, Some(capture)) => &capture.tc_egress,
        };
        if kind == HookKind::Clsact {
            self.attach_clsact(device, direction, program)?;
        } else {
            self.attach_tcx(device, direction, program)?;
        }
        Ok(kind)
    }

    fn attach_tcx(&self, device: &Device, direction: Direction, program: &Program) -> Result<()> {
        let path = self
            .link_dir(device.ifindex)
            .join(AttachPoint::Tcx(direction).file());
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
        // The program must run before all other programs of the hook: an earlier program could accept packets
        // (TCX_PASS) without a verdict of Palisade.
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
                other_kind || (filter.is_own_slot() && filter.name != program.name)
            });
        if let Some(filter) = foreign {
            return Err(AttachError::ForeignFilter {
                name: device.name.clone(),
                kind: filter.kind,
                filter: filter.name,
                direction,
            });
        }
        // The record is written before the filter: a filter without a record would never be removed, while a record
        // without a filter does no harm.
        make_dir(&dir.join(AttachPoint::Clsact(direction).file())).map_err(Box::new)?;
        clsact::set_filter(device.ifindex, direction, program.fd(), program.name).map_err(syscall)
    }
}
