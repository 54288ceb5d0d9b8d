//! Files of a change: each is replaced atomically, and no symbolic link is followed. Tests interrupt the operations at
//! every step.

#[cfg(test)]
use std::cell::Cell;
use std::{
    cell::RefCell,
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use nix::fcntl::OFlag;
use rustix::fs::RenameFlags;
use tracing::warn;

use crate::{
    daemon::{policies::MAX_FILE, watcher::policy_file_names},
    trusted_path::{is_own, walk},
};

/// Mode of a policy file that was not there before.
pub(super) const NEW_FILE_MODE: u32 = 0o644;
/// End of the names of temporary files. They begin with a dot, so they are no policy files.
const TEMPORARY: &str = ".palisade-tmp";
/// Largest number of files that one change puts aside under the same name; the last one is replaced.
const MAX_ASIDE: u32 = 100;

/// Access to the disk.
#[derive(Debug, Default)]
pub(super) struct Disk {
    /// New paths of files that were put aside since the last [`Self::take_aside`].
    pub aside: RefCell<Vec<PathBuf>>,
    /// Number of steps until all further steps fail, as if the process had ended.
    #[cfg(test)]
    pub steps_left: Option<Cell<usize>>,
}

/// Content and mode of a policy file.
pub(super) type Content<'a> = (&'a str, u32);

/// What happens to files that are replaced or removed.
pub(super) struct Replaced<'a> {
    /// Number of the change.
    pub number: u64,
    /// Whether a content is stored elsewhere. Files with another content are put aside, under a name that no
    /// policy file has: the daemon has not read them, so their content would be lost.
    pub is_stored: &'a dyn Fn(&[u8]) -> bool,
}

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

    /// Returns the new paths of files that were put aside since the last call.
    pub(super) fn take_aside(&self) -> Vec<PathBuf> {
        self.aside.take()
    }

    /// Replaces a policy file. An edit that is saved between the read by [`Self::put_aside`] and the replacement is put
    /// aside too: the files are exchanged, and what comes out is compared again.
    fn replace(&self, path: &Path, bytes: &[u8], mode: u32, replaced: &Replaced<'_>) -> io::Result<()> {
        self.put_aside(path, path, replaced)?;
        let temporary = temporary(path)?;
        let written = self
            .write_temporary(&temporary, bytes, mode)
            .and_then(|()| self.put_in_place(&temporary, path));
        match written {
            Ok(true) => self.discard(&temporary, path, replaced),
            Ok(false) => Ok(()),
            Err(error) => {
                if self.step().is_ok() {
                    let _ = fs::remove_file(&temporary);
                }
                Err(error)
            }
        }
    }

    /// Renames a file to `path`. Returns whether there was a file; it is at `temporary` then. Where the file system cannot
    /// exchange two files (NFS), the file that was there is replaced.
    fn put_in_place(&self, temporary: &Path, path: &Path) -> io::Result<bool> {
        /// Attempts while another process creates and removes the file.
        const ATTEMPTS: usize = 16;
        for _ in 0..ATTEMPTS {
            self.step()?;
            match rename_with(temporary, path, RenameFlags::NOREPLACE) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) if is_unsupported(&error) => return fs::rename(temporary, path).map(|()| false),
                other => return other.map(|()| false),
            }
            match rename_with(temporary, path, RenameFlags::EXCHANGE) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if is_unsupported(&error) => return fs::rename(temporary, path).map(|()| false),
                other => return other.map(|()| true),
            }
        }
        Err(io::Error::other(
            "another process creates and removes the file again and again",
        ))
    }

    /// Removes a policy file. As in [`Self::replace`], an edit at the last moment is put aside.
    fn take_out(&self, path: &Path, replaced: &Replaced<'_>) -> io::Result<()> {
        self.put_aside(path, path, replaced)?;
        let temporary = temporary(path)?;
        self.step()?;
        match fs::rename(path, &temporary) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => self.discard(&temporary, path, replaced),
        }
    }

    /// Removes the file that was at `path` and is at `temporary` now, or puts it aside.
    fn discard(&self, temporary: &Path, path: &Path, replaced: &Replaced<'_>) -> io::Result<()> {
        self.put_aside(temporary, path, replaced)?;
        self.remove(temporary)
    }

    /// Renames a file whose content is stored nowhere else. `path`: its path; `of`: the path of the policy file.
    fn put_aside(&self, path: &Path, of: &Path, replaced: &Replaced<'_>) -> io::Result<()> {
        let Ok(there) = fs::symlink_metadata(path) else {
            return Ok(());
        };
        // A directory is no policy file; an empty file has nothing that could be lost.
        if there.is_dir() || (there.is_file() && there.len() == 0) {
            return Ok(());
        }
        let content = match fs::metadata(path) {
            Ok(metadata) if metadata.is_file() && metadata.len() <= MAX_FILE => fs::read(path).ok(),
            _ => None,
        };
        if content.is_some_and(|content| (replaced.is_stored)(&content)) {
            return Ok(());
        }
        let mut name = of.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        name.push(format!(".edited-{}", replaced.number));
        let mut to = of.with_file_name(&name);
        for other in 2..=MAX_ASIDE {
            if fs::symlink_metadata(&to).is_err() {
                break;
            }
            let mut next = name.clone();
            next.push(format!("-{other}"));
            to = of.with_file_name(next);
        }
        self.step()?;
        fs::rename(path, &to)?;
        warn!(
            event = "policy-edit-kept",
            number = replaced.number,
            file = %of.display(),
            kept = %to.display(),
            "a change of the policies replaces a file that the daemon had not read; the file is kept under another name"
        );
        self.aside.borrow_mut().push(to);
        Ok(())
    }

    /// Makes the policy files of a folder be exactly `files`.
    ///
    /// # Errors
    /// The path of the file that could not be written or removed, with the reason.
    pub(super) fn make(
        &self,
        dir: &Path,
        files: &BTreeMap<&str, Content<'_>>,
        replaced: &Replaced<'_>,
    ) -> io::Result<()> {
        let at = |path: &Path, error: io::Error| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        };
        if let Some(problem) = unsuitable(dir) {
            return Err(io::Error::other(problem));
        }
        for (name, (text, mode)) in files {
            let path = dir.join(name);
            if has(&path, text.as_bytes()) {
                continue;
            }
            self.replace(&path, text.as_bytes(), *mode, replaced)
                .map_err(|error| at(&path, error))?;
        }
        for name in policy_file_names(dir).map_err(|error| at(dir, error))? {
            if !files.contains_key(&*name) {
                let path = dir.join(name);
                self.take_out(&path, replaced).map_err(|error| at(&path, error))?;
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
fn has(path: &Path, text: &[u8]) -> bool {
    let is_there =
        fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.len() == text.len() as u64);
    is_there && fs::read(path).is_ok_and(|there| there == text)
}

fn rename_with(from: &Path, to: &Path, flags: RenameFlags) -> io::Result<()> {
    rustix::fs::renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, flags).map_err(Into::into)
}

/// Returns whether the file system, or the kernel, has no such flag of renameat2(2).
fn is_unsupported(error: &io::Error) -> bool {
    use nix::errno::Errno;
    let known = [Errno::EINVAL, Errno::ENOSYS, Errno::EOPNOTSUPP];
    error
        .raw_os_error()
        .is_some_and(|number| known.contains(&Errno::from_raw(number)))
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
    // A user that can rename a directory above the folder chooses the files that are enforced, and where they are written.
    if let Err(problem) = walk(dir) {
        return Some(problem.to_string());
    }
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

    const STORED: Replaced<'static> = Replaced {
        number: 7,
        is_stored: &|_| true,
    };

    #[test]
    fn a_file_whose_content_is_stored_nowhere_else_is_put_aside() {
        let (_root, dir) = folder();
        let put = |name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
        let names = || -> Vec<String> {
            let entries = fs::read_dir(&dir).unwrap();
            let mut names: Vec<String> = entries
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        let replaced = Replaced {
            number: 7,
            is_stored: &|content| content == b"known",
        };
        let files = BTreeMap::from([("a.yaml", ("new", 0o644)), ("known.yaml", ("new", 0o644))]);
        put("a.yaml", "edited");
        put("known.yaml", "known");
        put("b.yaml", "edited too");
        put("gone.yaml", "known");
        put("empty.yaml", "");
        symlink("nowhere", dir.join("link.yaml")).unwrap();
        let disk = Disk::default();
        disk.make(&dir, &files, &replaced).unwrap();
        let kept = ["a.yaml.edited-7", "b.yaml.edited-7", "link.yaml.edited-7"];
        assert_eq!(
            names(),
            ["a.yaml", kept[0], kept[1], "known.yaml", kept[2]],
            "only edits are kept"
        );
        assert_eq!(fs::read_to_string(dir.join(kept[0])).unwrap(), "edited");
        assert_eq!(disk.take_aside(), kept.map(|name| dir.join(name)));
        assert!(disk.take_aside().is_empty());
        // Another edit of the same file does not replace the first one.
        put("a.yaml", "again");
        disk.make(&dir, &files, &replaced).unwrap();
        assert_eq!(
            fs::read_to_string(dir.join("a.yaml.edited-7-2")).unwrap(),
            "again"
        );
        assert_eq!(fs::read_to_string(dir.join(kept[0])).unwrap(), "edited");
        assert!(policy_file_names(&dir).unwrap().len() == 2);
    }

    #[test]
    fn an_edit_that_is_saved_while_the_file_is_replaced_or_removed_is_kept() {
        let (_root, dir) = folder();
        for (name, is_link) in [
            ("a.yaml", false),
            ("gone.yaml", false),
            ("a.yaml", true),
            ("gone.yaml", true),
        ] {
            let path = dir.join(name);
            fs::write(&path, "known").unwrap();
            // The edit is saved after the content was read: in place, or by a rename.
            let is_first = Cell::new(true);
            let is_stored = |content: &[u8]| {
                if is_first.replace(false) {
                    let edited = dir.join("saving");
                    fs::write(&edited, "edited").unwrap();
                    match is_link {
                        true => fs::rename(&edited, &path).unwrap(),
                        false => {
                            fs::write(&path, "edited").unwrap();
                            fs::remove_file(&edited).unwrap();
                        }
                    }
                }
                content == b"known"
            };
            let replaced = Replaced {
                number: 7,
                is_stored: &is_stored,
            };
            let files = match name {
                "a.yaml" => BTreeMap::from([(name, ("new", 0o644))]),
                _ => BTreeMap::new(),
            };
            let disk = Disk::default();
            disk.make(&dir, &files, &replaced).unwrap();
            let kept = dir.join(format!("{name}.edited-7"));
            assert_eq!(disk.take_aside(), std::slice::from_ref(&kept));
            assert_eq!(fs::read_to_string(&kept).unwrap(), "edited");
            let now = fs::read_to_string(&path).ok();
            assert_eq!(now.as_deref(), files.get(name).map(|(text, _)| *text));
            fs::remove_file(kept).unwrap();
            let _ = fs::remove_file(path);
            assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "nothing else stays");
        }
    }

    #[test]
    fn a_folder_gets_exactly_the_files_with_their_modes() {
        let (_root, dir) = folder();
        fs::write(dir.join("old.yaml"), "o").unwrap();
        fs::write(dir.join("notes.txt"), "n").unwrap();
        let files = BTreeMap::from([("a.yaml", ("a", 0o640)), ("b.yaml", ("b", NEW_FILE_MODE))]);
        Disk::default().make(&dir, &files, &STORED).unwrap();
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
        Disk::default().make(&dir, &files, &STORED).unwrap();
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
        fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
        assert!(unsuitable(&dir.join("gone")).unwrap().contains("make the folder"));
        // A parent directory in which another user can rename the folder.
        fs::set_permissions(root.path(), Permissions::from_mode(0o777)).unwrap();
        let problem = unsuitable(&dir).unwrap();
        assert!(
            problem.contains("mode 0777") && problem.contains(&*root.path().to_string_lossy()),
            "{problem}"
        );
        fs::set_permissions(root.path(), Permissions::from_mode(0o755)).unwrap();
        assert_eq!(unsuitable(&dir), None);
    }
}
