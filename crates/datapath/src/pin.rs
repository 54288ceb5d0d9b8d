//! Pin directory on a bpffs, and its entries.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use crate::{AttachError, OpenError, sys::bpf};

type Result<T> = std::result::Result<T, OpenError>;

/// Magic number of a bpffs (`BPF_FS_MAGIC`).
const BPF_FS_MAGIC: libc::c_long = 0xcafe_4a11;

/// End of the name of a directory of maps that are being filled.
pub(crate) const STAGED: &str = "_new";

/// Returns the directory of the maps of this version of `palisade_abi`.
pub(crate) fn version_dir(pin_dir: &Path) -> PathBuf {
    pin_dir.join(format!("v{}", palisade_abi::VERSION))
}

/// Returns the number of every directory `v<number>` of a pin directory, in ascending order.
pub(crate) fn versions(pin_dir: &Path) -> Result<Vec<u32>> {
    let mut found: Vec<u32> = version_dirs(pin_dir)?
        .iter()
        .filter_map(|path| path.file_name()?.to_str()?.strip_prefix('v')?.parse().ok())
        .collect();
    found.sort_unstable();
    Ok(found)
}

/// Returns every directory `v<number>` of a pin directory.
pub(crate) fn version_dirs(pin_dir: &Path) -> Result<Vec<PathBuf>> {
    dirs_of_versions(pin_dir, "")
}

/// Returns every directory `v<number>_new` of a pin directory: maps that a process of any version was filling.
pub(crate) fn staging_dirs(pin_dir: &Path) -> Result<Vec<PathBuf>> {
    dirs_of_versions(pin_dir, STAGED)
}

fn dirs_of_versions(pin_dir: &Path, end: &str) -> Result<Vec<PathBuf>> {
    let io = |source| OpenError::Io {
        path: pin_dir.to_owned(),
        source,
    };
    let mut dirs = Vec::new();
    let entries = match fs::read_dir(pin_dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(dirs),
        other => other.map_err(io)?,
    };
    for entry in entries {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if name
            .strip_prefix('v')
            .and_then(|rest| rest.strip_suffix(end))
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        {
            dirs.push(path);
        }
    }
    Ok(dirs)
}

/// Start of the name of a pin in the directory of the maps of this version, while maps of an earlier version exist. The
/// rest is the time of the coarse monotonic clock, ns, before which every flow of the earlier version has been copied:
/// a start after a crash in the middle of an upgrade does not copy flows that have ended since.
pub(crate) const TAKEN: &str = "taken_";

/// Returns the time in the pin of a directory; 0 if it has none.
pub(crate) fn taken_until(map_dir: &Path) -> u64 {
    taken_pins(map_dir)
        .iter()
        .filter_map(|path| path.file_name()?.to_str()?.strip_prefix(TAKEN)?.parse().ok())
        .max()
        .unwrap_or(0)
}

/// Returns the pins whose name begins with [`TAKEN`].
pub(crate) fn taken_pins(map_dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(map_dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(TAKEN))
        .map(|entry| entry.path())
        .collect()
}

/// Removes a directory that contains pins only.
pub(crate) fn remove_dir_of_pins(dir: &Path) -> Result<()> {
    let io = |source| OpenError::Io {
        path: dir.to_owned(),
        source,
    };
    for entry in fs::read_dir(dir).map_err(io)? {
        fs::remove_file(entry.map_err(io)?.path()).map_err(io)?;
    }
    fs::remove_dir(dir).map_err(io)
}

pub(crate) fn make_dir(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o700)))
        .map_err(|source| OpenError::Io {
            path: path.to_owned(),
            source,
        })
}

/// Returns the longest ancestor of a path that exists.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"))
}

/// Returns whether a path, or its longest existing ancestor, is on a bpffs.
pub(crate) fn is_on_bpffs(path: &Path) -> io::Result<bool> {
    use std::os::unix::ffi::OsStrExt as _;
    let c_path = std::ffi::CString::new(existing(path).as_os_str().as_bytes())?;
    // SAFETY: `statfs` consists of integers, for which zero is a valid value.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for the call.
    if unsafe { libc::statfs(c_path.as_ptr(), &mut stat) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.f_type as libc::c_long == BPF_FS_MAGIC)
}

/// Checks that a directory, which need not exist yet, can hold pins.
///
/// # Errors
/// [`OpenError::NotBpffs`] if the directory is not on a bpffs, [`OpenError::BadPinDir`] if the path is relative or a
/// part of it that does not exist yet has a dot, [`OpenError::Io`] if statfs fails.
pub fn check_pin_dir(pin_dir: &Path) -> Result<()> {
    // bpffs refuses dots only in names that are created on it, so the existing part of the path, such as the mount
    // point, can have dots.
    let dots = |p: &Path| p.to_str().is_none_or(|p| p.contains('.'));
    let to_be_made = pin_dir.strip_prefix(existing(pin_dir)).unwrap_or(pin_dir);
    if !pin_dir.is_absolute() || dots(to_be_made) {
        return Err(OpenError::BadPinDir {
            path: pin_dir.to_owned(),
        });
    }
    match is_on_bpffs(pin_dir) {
        Ok(true) => Ok(()),
        Ok(false) => Err(OpenError::NotBpffs {
            path: pin_dir.to_owned(),
        }),
        Err(source) => Err(OpenError::Io {
            path: pin_dir.to_owned(),
            source,
        }),
    }
}

pub(crate) fn links_dir(pin_dir: &Path) -> PathBuf {
    pin_dir.join("links")
}

/// Returns the link that is pinned at a path, if it is attached to the interface. Unpins a link that is not attached to
/// the interface: the interface is gone, or the link was detached.
pub(crate) fn pinned_link(
    path: &Path,
    ifindex: u32,
) -> std::result::Result<Option<(OwnedFd, bpf::LinkInfo)>, AttachError> {
    let syscall = |source| AttachError::Syscall {
        name: path.display().to_string(),
        source,
    };
    let Some(link) = bpf::get_pinned(path).map_err(syscall)? else {
        return Ok(None);
    };
    let info = bpf::link_info(link.as_fd()).map_err(syscall)?;
    if info.ifindex != ifindex {
        // The kernel reports index 0 after the interface was deleted or the link was detached (BPF_LINK_DETACH).
        unpin(path)?;
        return Ok(None);
    }
    Ok(Some((link, info)))
}

pub(crate) fn unpin(path: &Path) -> std::result::Result<(), AttachError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(AttachError::Io {
            path: path.to_owned(),
            source: e,
        }),
        _ => Ok(()),
    }
}

pub(crate) fn remove_empty(path: &Path) -> std::result::Result<(), AttachError> {
    match fs::remove_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(AttachError::Io {
            path: path.to_owned(),
            source: e,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_directory_elsewhere_is_refused_with_the_fix() {
        let error = check_pin_dir(Path::new("/tmp/palisade")).unwrap_err().to_string();
        assert!(error.contains("mount -t bpf"), "{error}");
        for bad in [
            "relative/dir",
            "/sys/fs/bpf/pali.sade",
            "/sys/fs/bpf/palisade/../x",
        ] {
            assert!(
                matches!(check_pin_dir(Path::new(bad)), Err(OpenError::BadPinDir { .. })),
                "{bad}"
            );
        }
    }
}
