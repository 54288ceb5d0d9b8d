//! Removal of programs, pins, filters and qdiscs.

use std::{
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use palisade_abi::{Direction, Interface};

use crate::{
    AttachError, Datapath,
    hook::{AttachPoint, find_device, has_programs, slot},
    occupants::occupants,
    pin::{links_dir, pinned_link, remove_dir_of_pins, remove_empty, staging_dirs, unpin, version_dirs},
    present::{our_filter, recorded_interfaces},
    proxy_link::{proxy_link_names, remove_proxy_links},
    punt_link::remove_punt_link,
    sys::{
        SyscallError, bpf, clsact,
        link::{Device, delete, link},
    },
};

type Result<T> = std::result::Result<T, AttachError>;

/// Directory that records that Palisade added the clsact qdisc.
pub(crate) const QDISC_FILE: &str = "clsact_qdisc";

impl Datapath {
    /// Detaches the programs of an interface. An interface without programs, or one that does not exist, is not an
    /// error.
    ///
    /// # Errors
    /// [`AttachError`] if a program, pin or filter cannot be removed.
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

    /// Detaches all programs, removes the punt link, and removes every pin. The kernel frees the maps when this value
    /// is dropped.
    ///
    /// # Errors
    /// The first [`AttachError`]; the removal continues after an error.
    pub fn detach_all(self) -> Result<()> {
        detach_all(&self.pin_dir)
    }

    /// Removes the records of interfaces that no longer exist, and returns the indexes of these interfaces. Records
    /// with a link to an interface of another network namespace are kept.
    ///
    /// # Errors
    /// [`AttachError`] if a record cannot be removed.
    pub fn forget_dead(&self) -> Result<Vec<u32>> {
        let mut dead = Vec::new();
        for ifindex in recorded_interfaces(&self.pin_dir)? {
            if find_device(ifindex)?.is_some() {
                continue;
            }
            let dir = self.link_dir(ifindex);
            let mut alive_elsewhere = false;
            for point in [
                AttachPoint::Xdp,
                AttachPoint::Tcx(Direction::Ingress),
                AttachPoint::Tcx(Direction::Egress),
            ] {
                alive_elsewhere |= pinned_link(&dir.join(point.file()), ifindex)?.is_some();
            }
            if !alive_elsewhere {
                self.detach(ifindex)?;
                dead.push(ifindex);
            }
        }
        Ok(dead)
    }

    /// Undoes a failed attachment. `before`: attach points that had a program of Palisade before. `foreign`: attach
    /// points whose pin belongs to an interface of another network namespace. `slot_before`: earlier entry of the
    /// interface table.
    pub(crate) fn undo(
        &self,
        device: &Device,
        before: &[AttachPoint],
        foreign: &[AttachPoint],
        slot_before: &Interface,
    ) -> Result<()> {
        let dir = self.link_dir(device.ifindex);
        for point in AttachPoint::ALL {
            // A direction that had a program before keeps one, even if the program has moved to another attach point
            // (XDP, tcx or clsact).
            let had_program = before.iter().any(|b| b.direction() == point.direction());
            if !had_program && !foreign.contains(&point) {
                remove(&dir, device.ifindex, Some(device), point)?;
            }
        }
        if before.is_empty() && foreign.is_empty() {
            remove_qdisc(&dir, device.ifindex, Some(device))?;
            let ours = self.interfaces.get(&slot(device.ifindex))?.unwrap_or_default();
            if ours.ifindex == device.ifindex && has_programs(&ours) {
                let restored = if has_programs(slot_before) && slot_before.ifindex == device.ifindex {
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

    pub(crate) fn link_dir(&self, ifindex: u32) -> PathBuf {
        links_dir(&self.pin_dir).join(ifindex.to_string())
    }
}

/// Detaches the programs of every interface of which a pin directory has records, removes the punt link and the proxy
/// links, and removes the directory with its maps. The function opens no maps, so it works for maps of every version.
///
/// # Errors
/// The first [`AttachError`]; the removal continues after an error.
pub fn detach_all(pin_dir: &Path) -> Result<()> {
    let mut outcome = Ok(());
    let mut note = |result: Result<()>| {
        if outcome.is_ok() {
            outcome = result;
        }
    };
    for ifindex in recorded_interfaces(pin_dir)? {
        note(detach_interface(
            &links_dir(pin_dir).join(ifindex.to_string()),
            ifindex,
        ));
    }
    note(remove_punt_link(pin_dir));
    note(remove_proxy_links(pin_dir));
    let mut map_dirs = version_dirs(pin_dir).map_err(Box::new)?;
    map_dirs.extend(staging_dirs(pin_dir).map_err(Box::new)?);
    for dir in map_dirs {
        note(remove_dir_of_pins(&dir).map_err(|e| Box::new(e).into()));
    }
    for dir in [links_dir(pin_dir), pin_dir.to_owned()] {
        note(remove_empty(&dir));
    }
    outcome
}

/// Returns the names of the punt link's and proxy links' ends that exist in this network namespace. `name`: the prefix of
/// the names.
///
/// # Errors
/// [`SyscallError`] if the interfaces cannot be read.
pub fn left_links(name: &str) -> std::result::Result<Vec<String>, SyscallError> {
    let [ingress, egress] = proxy_link_names(name);
    let mut found = Vec::new();
    for end in [format!("{name}0"), format!("{name}1"), ingress, egress] {
        if link(&end)?.is_some_and(|link| link.kind == "veth") {
            found.push(end);
        }
    }
    Ok(found)
}

/// Removes punt link and proxy links whose pins are lost. A link with a program stays: another daemon can use it.
///
/// # Errors
/// [`SyscallError`] if an interface cannot be read or removed.
pub fn remove_left_links(name: &str) -> std::result::Result<(), SyscallError> {
    let used = |end: &str| -> std::result::Result<bool, SyscallError> {
        let Some(link) = link(end)? else { return Ok(false) };
        Ok(!occupants(link.ifindex)?.is_empty())
    };
    if used(&format!("{name}0"))? || used(&format!("{name}1"))? {
        return Ok(());
    }
    for end in left_links(name)? {
        // The other end of a veth pair is removed together with the first one.
        if !used(&end)?
            && let Some(link) = link(&end)?
        {
            delete(link.ifindex)?;
        }
    }
    Ok(())
}

fn detach_interface(dir: &Path, ifindex: u32) -> Result<()> {
    let device = find_device(ifindex)?;
    for point in AttachPoint::ALL {
        remove(dir, ifindex, device.as_ref(), point)?;
    }
    remove_qdisc(dir, ifindex, device.as_ref())?;
    remove_empty(dir)
}

/// Removes the program of Palisade at an attach point. `device` is `None` if the interface is gone.
pub(crate) fn remove(dir: &Path, ifindex: u32, device: Option<&Device>, point: AttachPoint) -> Result<()> {
    let path = dir.join(point.file());
    match point {
        AttachPoint::Xdp | AttachPoint::Tcx(_) => {
            if let Some((link, _)) = pinned_link(&path, ifindex)? {
                // Unpinning alone detaches only after every process has closed the link.
                bpf::link_detach(link.as_fd()).map_err(|source| AttachError::Syscall {
                    name: path.display().to_string(),
                    source,
                })?;
                unpin(&path)?;
            }
        }
        AttachPoint::Clsact(direction) => {
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

/// Removes the clsact qdisc if Palisade added it and it has no filters.
pub(crate) fn remove_qdisc(dir: &Path, ifindex: u32, device: Option<&Device>) -> Result<()> {
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
            let ours = dir.join(AttachPoint::Clsact(direction).file()).is_dir();
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
