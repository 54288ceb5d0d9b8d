//! Actual attachments, as the kernel reports them.

use std::{fs, io, path::Path};

use palisade_abi::{Direction, programs};

use crate::{
    AttachError, Attached, Datapath, HookKind, SyscallError,
    hook::{AttachPoint, find_device, slot, tcx_type},
    pin::{links_dir, pinned_link},
    sys::{bpf, clsact, link::Device},
};

type Result<T> = std::result::Result<T, AttachError>;

impl Datapath {
    /// Returns the interfaces of which the pin directory has records, with their programs as the kernel reports them.
    ///
    /// # Errors
    /// [`AttachError`] if a pin or an interface cannot be read.
    pub fn attachments(&self) -> Result<Vec<Attached>> {
        let mut attached = Vec::new();
        for ifindex in recorded_interfaces(&self.pin_dir)? {
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
            for point in AttachPoint::ALL {
                let Some(kind) = present(&dir, &device, point)? else {
                    continue;
                };
                match point {
                    AttachPoint::Xdp
                    | AttachPoint::Tcx(Direction::Ingress)
                    | AttachPoint::Clsact(Direction::Ingress) => {
                        found.ingress = Some(kind);
                    }
                    AttachPoint::Tcx(Direction::Egress) | AttachPoint::Clsact(Direction::Egress) => {
                        found.egress = Some(kind)
                    }
                }
            }
            attached.push(found);
        }
        attached.sort_by_key(|a| a.ifindex);
        Ok(attached)
    }
}

/// Returns the attach points of an interface that have a program of Palisade.
pub(crate) fn attached_points(dir: &Path, device: &Device) -> Result<Vec<AttachPoint>> {
    let mut points = Vec::new();
    for point in AttachPoint::ALL {
        if present(dir, device, point)?.is_some() {
            points.push(point);
        }
    }
    Ok(points)
}

/// Returns the indexes of the interfaces of which a pin directory has records.
pub(crate) fn recorded_interfaces(pin_dir: &Path) -> Result<Vec<u32>> {
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

/// Returns how the program of Palisade at an attach point is attached; `None` if there is no such program.
pub(crate) fn present(dir: &Path, device: &Device, point: AttachPoint) -> Result<Option<HookKind>> {
    let path = dir.join(point.file());
    let syscall = |source| AttachError::Syscall {
        name: device.name.clone(),
        source,
    };
    Ok(match point {
        AttachPoint::Xdp => {
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
        AttachPoint::Tcx(direction) => match pinned_link(&path, device.ifindex)? {
            Some((_, info)) if on_tcx(device.ifindex, direction, info.id).map_err(syscall)? => {
                Some(HookKind::Tcx)
            }
            _ => None,
        },
        AttachPoint::Clsact(direction) => {
            (path.is_dir() && our_filter(device, direction)?).then_some(HookKind::Clsact)
        }
    })
}

pub(crate) fn our_filter(device: &Device, direction: Direction) -> Result<bool> {
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
        .any(|filter| filter.is_own_slot() && filter.name == name))
}

pub(crate) fn on_tcx(
    ifindex: u32,
    direction: Direction,
    link_id: u32,
) -> std::result::Result<bool, SyscallError> {
    Ok(bpf::tcx_query(ifindex, tcx_type(direction))?.contains(&link_id))
}
