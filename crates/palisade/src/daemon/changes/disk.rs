//! Files of a change: each is replaced atomically, and no symbolic link is followed. Tests interrupt the operations at
//! every step.

#[cfg(test)]
use std::cell::Cell;
use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use nix::fcntl::OFlag;

use crate::{daemon::watcher::policy_file_names, trusted_path::is_own};

/// Mode of a policy file that was not there before.
pub(super) const NEW_FILE_MODE: u32 = 0o644;
/// End of the names of temporary files. They begin with a dot, so they are no policy files.
const TEMPORARY: &str = ".palisade-tmp";

/// Access to the disk.
#[derive(Debug, Default)]
pub(super) struct Disk {
    /// Number of steps until all further steps fail, as if the process had ended.
    #[cfg(test)]
    pub steps_left: Option<Cell<usize>>,
}

/// Content and mode of a policy file.
pub(super) type Content<'a> = (&'a str, u32);

impl Disk {
    /// Counts a step that changes the disk.
    #[cfg_attr(not(test), allow(clippy::unused_self, reason = "tests count"))]
    fn step(&self) -> io::Result<()> {
        #[cfg(test)]
        if let Some(left) = &self.steps_left {
            let Some(fewer) = left.get().checked_sub(1) else {
                return Err(io::Error::other("interrupted"));
            };
            left.set(fewer);
        }
        Ok(())
    }

    /// Replaces a file atomically.
    pub(super) fn write(&self, path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
        let temporary = temporary(path)?;
        let written = self.write_temporary(&temporary, bytes, mode).and_then(|()| {
            self.step()?;
            fs::rename(&temporary, path)
        });
        if written.is_err() && self.step().is_ok() {
            // A partly written file takes space on a disk that can be full.
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    fn write_temporary(&self, path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
        self.step()?;
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            // O_EXCL: a file or link that another process puts there is not opened.
            .create_new(true)
            .mode(0o600)
            .custom_flags(OFlag::O_NOFOLLOW.bits())
            .open(path)?;
        let half = bytes.len() / 2;
        file.write_all(&bytes[..half])?;
        self.step()?;
        file.write_all(&bytes[half..])?;
        file.set_permissions(Permissions::from_mode(mode))?;
        self.step()?;
        file.sync_all()
    }

    /// Removes a file; a missing file is no error.
    pub(super) fn remove(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Flushes the entries of a directory to the disk.
    pub(super) fn sync(&self, dir: &Path) -> io::Result<()> {
        self.step()?;
        File::open(dir)?.sync_all()
    }

    /// Makes the policy files of a folder be exactly `files`.
    ///
    /// # Errors
    /// The path of the file that could not be written or removed, with the reason.
    pub(super) fn make(&self, dir: &Path, files: &BTreeMap<&str, Content<'_>>) -> io::Result<()> {
        let at = |path: &Path, error: io::Error| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        };
        if let Some(problem) = unsuitable(dir) {
            return Err(io::Error::other(problem));
        }
        for (name, (text, mode)) in files {
            let path = dir.join(name);
            if has(&path, text) {
                continue;
            }
            self.write(&path, text.as_bytes(), *mode)
                .map_err(|error| at(&path, error))?;
        }
        for name in policy_file_names(dir).map_err(|error| at(dir, error))? {
            if !files.contains_key(&*name) {
                let path = dir.join(name);
                self.remove(&path).map_err(|error| at(&path, error))?;
            }
        }
        self.sync(dir).map_err(|error| at(dir, error))
    }
}

fn temporary(path: &Path) -> io::Result<PathBuf> {
    let mut name = OsString::from(".");
    name.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(TEMPORARY);
    Ok(path.with_file_name(name))
}

/// Returns whether the daemon reads this text from a file. A symbolic link is followed, as the daemon does, so that an
/// unchanged link stays a link.
fn has(path: &Path, text: &str) -> bool {
    let is_there =
        fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.len() == text.len() as u64);
    is_there && fs::read(path).is_ok_and(|there| there == text.as_bytes())
}

/// Returns the mode that a written file gets: that of the present file without write permissions of others.
pub(super) fn mode_of(path: &Path) -> u32 {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() => metadata.mode() & 0o755 | 0o400,
        _ => NEW_FILE_MODE,
    }
}

/// Returns why commands do not write into a policy folder; `None` if they do.
pub(super) fn unsuitable(dir: &Path) -> Option<String> {
    let shown = dir.display();
    let metadata = match fs::symlink_metadata(dir) {
        Ok(metadata) => metadata,
        Err(error) => return Some(format!("{shown}: {error}; make the folder ([policy] dir)")),
    };
    if metadata.is_symlink() {
        let to = fs::read_link(dir).unwrap_or_default();
        return Some(format!(
            "{shown} is a symbolic link to {}: set [policy] dir to the folder itself, or change the files there",
            to.display()
        ));
    }
    if !metadata.is_dir() {
        return Some(format!("{shown} is not a folder: set [policy] dir to a folder"));
    }
    if !is_own(&metadata) || metadata.mode() & 0o022 != 0 {
        return Some(format!(
            "{shown} belongs to user {} and has mode {:04o}: another user than root could replace the files while they are \
             written; use chown root and chmod 0755",
            metadata.uid(),
            metadata.mode() & 0o7777
        ));
    }
    if fs::symlink_metadata(dir.join("..data")).is_ok() {
        return Some(format!(
            "{shown} has a link ..data: it is a mounted ConfigMap, whose files are replaced by its owner; change the \
             ConfigMap"
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Returns content and mode of a regular file.
    fn read(path: &Path) -> io::Result<(Vec<u8>, u32)> {
        let metadata = fs::symlink_metadata(path)?;
        assert!(metadata.is_file());
        Ok((fs::read(path)?, metadata.mode() & 0o7777))
    }

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("policies.d");
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
        (root, dir)
    }

    #[test]
    fn a_folder_gets_exactly_the_files_with_their_modes() {
        let (_root, dir) = folder();
        fs::write(dir.join("old.yaml"), "o").unwrap();
        fs::write(dir.join("notes.txt"), "n").unwrap();
        let files = BTreeMap::from([("a.yaml", ("a", 0o640)), ("b.yaml", ("b", NEW_FILE_MODE))]);
        Disk::default().make(&dir, &files).unwrap();
        let names: Vec<_> = policy_file_names(&dir).unwrap().into_iter().collect();
        assert_eq!(names, ["a.yaml", "b.yaml"]);
        assert_eq!(read(&dir.join("a.yaml")).unwrap(), (b"a".to_vec(), 0o640));
        assert_eq!(read(&dir.join("b.yaml")).unwrap(), (b"b".to_vec(), 0o644));
        assert!(dir.join("notes.txt").exists());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 3);
    }

    #[test]
    fn links_are_replaced_and_never_followed() {
        let (root, dir) = folder();
        let outside = root.path().join("outside");
        fs::write(&outside, "keep").unwrap();
        symlink(&outside, dir.join("a.yaml")).unwrap();
        symlink(&outside, dir.join(format!(".a.yaml{TEMPORARY}"))).unwrap();
        let files = BTreeMap::from([("a.yaml", ("new", 0o644))]);
        Disk::default().make(&dir, &files).unwrap();
        assert_eq!(fs::read_to_string(&outside).unwrap(), "keep");
        assert!(fs::symlink_metadata(dir.join("a.yaml")).unwrap().is_file());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn unsuitable_folders_are_named_with_the_remedy() {
        let (root, dir) = folder();
        assert_eq!(unsuitable(&dir), None);
        let link = root.path().join("link");
        symlink(&dir, &link).unwrap();
        assert!(unsuitable(&link).unwrap().contains("symbolic link"));
        symlink("x", dir.join("..data")).unwrap();
        assert!(unsuitable(&dir).unwrap().contains("ConfigMap"));
        fs::remove_file(dir.join("..data")).unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o777)).unwrap();
        assert!(unsuitable(&dir).unwrap().contains("mode 0777"));
        assert!(unsuitable(&dir.join("gone")).unwrap().contains("make the folder"));
    }
}
