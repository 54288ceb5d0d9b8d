//! Paths that only root and the user of this process can replace, and locks on such paths. In this file "another user"
//! is a user other than these two. A user that can rename an entry of a directory above a file controls what the daemon
//! opens: an unprivileged user that made the pin directory first could unlink the pins that hold the programs at their
//! interfaces.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    fmt,
    fs::{self, DirBuilder, File, Metadata, OpenOptions, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Component, Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag},
    unistd::geteuid,
};
use rustix::fs::{Access, AtFlags, CWD, accessat};

/// Longest wait for a lock that a daemon holds while it ends.
const LOCK_TIMEOUT: Duration = Duration::from_millis(500);
/// Largest number of symbolic links that are followed in a path, as in the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;
/// Deepest accepted level below a private directory. The daemon makes at most two levels.
const MAX_DEPTH: usize = 8;

/// Why a path is not used.
#[derive(Debug)]
pub(crate) enum UnsafePath {
    /// It is not certain that only root and the user of this process can change the path and the entries of the
    /// directory.
    Untrusted(String),
    /// The path cannot be made, read or used as a directory.
    Failed(String),
}

impl fmt::Display for UnsafePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Untrusted(text) | Self::Failed(text)) = self;
        f.write_str(text)
    }
}

impl std::error::Error for UnsafePath {}

/// Returns the path of a directory with symbolic links resolved. A missing directory is made. The function removes the
/// permissions of group and others from the directory and from all directories below it. It fails if another user owns
/// or can write an entry of the directory, or could replace the directory itself.
///
/// # Errors
/// See [`UnsafePath`]. `setting`: the option that error messages name.
pub(crate) fn private_dir(path: &Path, setting: &str) -> Result<PathBuf, UnsafePath> {
    let found = walk(path)?;
    if !found.missing.as_os_str().is_empty() {
        let whole = found.there.join(&found.missing);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&whole)
            .map_err(|error| failed(&whole, &error))?;
        // The path is walked again, because another process can have made the directory at the same time.
        let again = walk(&whole)?;
        return private(again.there, setting);
    }
    private(found.there, setting)
}

fn private(dir: PathBuf, setting: &str) -> Result<PathBuf, UnsafePath> {
    let metadata = fs::symlink_metadata(&dir).map_err(|error| failed(&dir, &error))?;
    if !metadata.is_dir() {
        return Err(UnsafePath::Failed(format!(
            "{} is not a directory",
            dir.display()
        )));
    }
    if !is_own(&metadata) {
        return Err(UnsafePath::Untrusted(format!(
            "{} belongs to user {}, which could remove or replace its entries: remove it, or set {setting} to a directory of \
             root",
            dir.display(),
            metadata.uid()
        )));
    }
    restrict_mode(&dir, &metadata)?;
    check_entries(&dir, setting, 0)?;
    Ok(dir)
}

/// Removes the permissions of group and others from a directory. [`check_entries`] must run afterwards: it finds the
/// entries that other users have made before.
fn restrict_mode(dir: &Path, metadata: &Metadata) -> Result<(), UnsafePath> {
    if metadata.mode() & 0o077 == 0 {
        return Ok(());
    }
    match fs::set_permissions(dir, Permissions::from_mode(0o700)) {
        Ok(()) => Ok(()),
        // A directory that only its owner can write is accepted, because the file system can be read-only.
        Err(_) if metadata.mode() & 0o022 == 0 => Ok(()),
        Err(error) => Err(failed(dir, &error)),
    }
}

/// Checks that no other user owns or can write an entry below the directory.
fn check_entries(dir: &Path, setting: &str, depth: usize) -> Result<(), UnsafePath> {
    if depth > MAX_DEPTH {
        return Err(UnsafePath::Untrusted(format!(
            "{}: directories nested deeper than Palisade makes them: remove it, or set another {setting}",
            dir.display()
        )));
    }
    for entry in fs::read_dir(dir).map_err(|error| failed(dir, &error))? {
        let path = entry.map_err(|error| failed(dir, &error))?.path();
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(&path, &error)),
        };
        if !is_own(&metadata) {
            return Err(UnsafePath::Untrusted(format!(
                "{} belongs to user {}, not to root: remove it, or set another {setting}",
                path.display(),
                metadata.uid()
            )));
        }
        if metadata.is_dir() {
            restrict_mode(&path, &metadata)?;
            check_entries(&path, setting, depth + 1)?;
        } else if metadata.is_file() && metadata.mode() & 0o022 != 0 {
            return Err(UnsafePath::Untrusted(format!(
                "{} can be written by other users than root (mode {:04o}): remove it, or set another {setting}",
                path.display(),
                metadata.mode() & 0o7777
            )));
        }
    }
    Ok(())
}

/// Returns the path of the socket's directory with symbolic links resolved. A missing directory is made with mode 0755.
///
/// # Errors
/// See [`UnsafePath`].
pub(crate) fn socket_dir(dir: &Path) -> Result<PathBuf, UnsafePath> {
    checked_dir(dir, 0o755)
}

/// Returns the path of a directory with symbolic links resolved, in which other users cannot replace entries. A missing
/// directory is made with `mode`.
///
/// # Errors
/// See [`UnsafePath`].
pub(crate) fn checked_dir(dir: &Path, mode: u32) -> Result<PathBuf, UnsafePath> {
    let found = walk(dir)?;
    let whole = found.there.join(&found.missing);
    if !found.missing.as_os_str().is_empty() {
        DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(&whole)
            .map_err(|error| failed(&whole, &error))?;
    }
    let metadata = fs::symlink_metadata(&whole).map_err(|error| failed(&whole, &error))?;
    check_ancestor(&whole, &metadata)?;
    Ok(whole)
}

/// The existing and the missing part of a path.
#[derive(Debug)]
pub(crate) struct Found {
    /// Longest existing part, with symbolic links resolved.
    pub there: PathBuf,
    /// The missing rest.
    pub missing: PathBuf,
}

impl Found {
    /// Returns why this process could not make the missing part and write there; `None` if nothing speaks against it.
    /// Makes nothing.
    pub(crate) fn cannot_be_made(&self) -> Option<String> {
        let problem = match fs::symlink_metadata(&self.there) {
            Ok(metadata) if metadata.is_dir() => match accessat(
                CWD,
                &self.there,
                Access::WRITE_OK | Access::EXEC_OK,
                AtFlags::EACCESS,
            ) {
                Ok(()) if self.missing.as_os_str().is_empty() => return None,
                Ok(()) => kernel_file_system(&self.there)?,
                Err(error) => return Some(failed(&self.there, &error.into()).to_string()),
            },
            Ok(_) => "is not a directory".to_owned(),
            Err(error) => return Some(failed(&self.there, &error).to_string()),
        };
        Some(format!("{}: {problem}", self.there.display()))
    }
}

/// Returns a text if the files below a directory are the kernel's. There, a directory that is missing cannot be made,
/// whatever its mode says.
fn kernel_file_system(dir: &Path) -> Option<String> {
    const SYSFS_MAGIC: u64 = 0x6265_6572;
    const PROC_MAGIC: u64 = 0x9fa0;
    let kind = rustix::fs::statfs(dir).ok()?.f_type;
    let is_kernel = matches!(u64::try_from(kind), Ok(PROC_MAGIC | SYSFS_MAGIC));
    is_kernel.then(|| "the kernel lets no directory be made there".to_owned())
}

/// Resolves the symbolic links and `..` of a path like the kernel. Fails if another user could replace a component of
/// the path. The entries of the last component are not checked.
pub(crate) fn walk(path: &Path) -> Result<Found, UnsafePath> {
    let mut here = PathBuf::from("/");
    let mut rest: VecDeque<OsString> = parts(path).collect();
    let mut links = 0;
    loop {
        let Some(next) = rest.pop_front() else {
            return Ok(Found {
                there: here,
                missing: PathBuf::new(),
            });
        };
        let metadata = fs::symlink_metadata(&here).map_err(|error| failed(&here, &error))?;
        check_ancestor(&here, &metadata)?;
        if next == ".." {
            here.pop();
            continue;
        }
        let path = here.join(&next);
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_symlink() => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(failed(&path, &Errno::ELOOP.into()));
                }
                if !is_own(&metadata) {
                    return Err(UnsafePath::Untrusted(format!(
                        "{}: a link of user {}, which can point it elsewhere: remove it",
                        path.display(),
                        metadata.uid()
                    )));
                }
                let target = fs::read_link(&path).map_err(|error| failed(&path, &error))?;
                if target.is_absolute() {
                    here = PathBuf::from("/");
                }
                parts(&target)
                    .collect::<Vec<_>>()
                    .into_iter()
                    .rev()
                    .for_each(|part| rest.push_front(part));
            }
            Ok(_) => here = path,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Found {
                    there: here,
                    missing: std::iter::once(next).chain(rest).collect(),
                });
            }
            Err(error) => return Err(failed(&path, &error)),
        }
    }
}

fn parts(path: &Path) -> impl Iterator<Item = OsString> + '_ {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsStr::new("..").to_owned()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

/// Checks that no other user can replace the entries of a directory. In a directory with the sticky bit only the owner
/// of an entry or of the directory can rename or remove the entry (unlink(2): EPERM).
fn check_ancestor(dir: &Path, metadata: &Metadata) -> Result<(), UnsafePath> {
    let (mode, sticky) = (metadata.mode(), metadata.mode() & 0o1000 != 0);
    if !is_own(metadata) {
        return Err(UnsafePath::Untrusted(format!(
            "{} belongs to user {}, which could replace its entries: a directory of root is needed",
            dir.display(),
            metadata.uid()
        )));
    }
    let by_group = mode & 0o020 != 0 && metadata.gid() != 0;
    if !sticky && (by_group || mode & 0o002 != 0) {
        return Err(UnsafePath::Untrusted(format!(
            "{} can be written by other users than root (mode {:04o}): they could replace its entries; \
             `chmod go-w {}`",
            dir.display(),
            mode & 0o7777,
            dir.display()
        )));
    }
    Ok(())
}

/// Returns whether a file is owned by root or by the user of this process.
pub(crate) fn is_own(metadata: &Metadata) -> bool {
    metadata.uid() == 0 || metadata.uid() == geteuid().as_raw()
}

fn failed(path: &Path, error: &io::Error) -> UnsafePath {
    let fix = match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => "; `mount -o remount,rw` makes its file system writable",
        io::ErrorKind::StorageFull => "; its file system is full",
        _ => "",
    };
    UnsafePath::Failed(format!("{}: {error}{fix}", path.display()))
}

/// Locks a directory itself instead of a file in it, because no lock file can be made in bpffs or on a full or
/// read-only file system.
pub(crate) fn lock_dir(path: &Path, setting: &str) -> anyhow::Result<Flock<File>> {
    loop {
        let dir = OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_DIRECTORY.bits())
            .open(path)
            .with_context(|| path.display().to_string())?;
        let lock = lock_file(dir, path, &format!("[node] {setting}"))?;
        let locked = lock.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
        let named = fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()));
        match (locked, named) {
            (Ok(locked), Ok(named)) if locked == named => return Ok(lock),
            // The path no longer leads to the open directory, for example after `palisade stop --detach` has removed
            // it. The directory is made again if it is missing.
            _ => DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .with_context(|| path.display().to_string())?,
        }
    }
}

/// Locks an open file. Waits up to [`LOCK_TIMEOUT`] for a daemon that is ending.
pub(crate) fn lock_file(mut file: File, path: &Path, setting: &str) -> anyhow::Result<Flock<File>> {
    let until = Instant::now() + LOCK_TIMEOUT;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((same, Errno::EWOULDBLOCK)) if Instant::now() < until => {
                file = same;
                thread::sleep(Duration::from_millis(10));
            }
            Err((_, Errno::EWOULDBLOCK)) => bail!(
                "{}: another palisade daemon uses it; end that one with `palisade stop`, or give this one another \
                 {setting}",
                path.display()
            ),
            Err((_, error)) => {
                return Err(io::Error::from(error)).with_context(|| path.display().to_string());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{chown, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    fn refused(path: &Path) -> String {
        match private_dir(path, "[node] state_dir").unwrap_err() {
            UnsafePath::Untrusted(text) => text,
            UnsafePath::Failed(text) => panic!("{text}"),
        }
    }

    #[test]
    fn a_new_directory_and_its_parents_are_private() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("a/b");
        assert_eq!(private_dir(&dir, "x").unwrap(), fs::canonicalize(&dir).unwrap());
        assert_eq!((mode(&dir), mode(&root.path().join("a"))), (0o700, 0o700));
    }

    #[test]
    fn existing_directories_become_private() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("state");
        fs::create_dir_all(dir.join("policies")).unwrap();
        for open in [&dir, &dir.join("policies")] {
            fs::set_permissions(open, Permissions::from_mode(0o777)).unwrap();
        }
        private_dir(&dir, "x").unwrap();
        assert_eq!((mode(&dir), mode(&dir.join("policies"))), (0o700, 0o700));
    }

    #[test]
    fn entries_of_another_user_are_refused_at_every_level() {
        if !geteuid().is_root() {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("state");
        fs::create_dir_all(dir.join("below")).unwrap();
        let file = dir.join("below/file");
        fs::write(&file, "x").unwrap();
        private_dir(&dir, "x").unwrap();
        for path in [&dir, &dir.join("below"), &file, &root.path().to_owned()] {
            chown(path, Some(4711), None).unwrap();
            let text = refused(&dir);
            assert!(
                text.contains("user 4711") && text.contains(&*path.to_string_lossy()),
                "{text}"
            );
            chown(path, Some(0), None).unwrap();
        }
        fs::set_permissions(&file, Permissions::from_mode(0o666)).unwrap();
        assert!(refused(&dir).contains("0666"));
        fs::remove_file(&file).unwrap();
        // A parent directory that other users can write is safe only with the sticky bit.
        fs::set_permissions(root.path(), Permissions::from_mode(0o777)).unwrap();
        assert!(refused(&dir).contains("0777"));
        fs::set_permissions(root.path(), Permissions::from_mode(0o1777)).unwrap();
        private_dir(&dir, "x").unwrap();
    }

    #[test]
    fn only_links_of_root_are_followed() {
        let root = tempfile::tempdir().unwrap();
        let (real, link) = (root.path().join("real"), root.path().join("link"));
        fs::create_dir(&real).unwrap();
        symlink("real", &link).unwrap();
        let found = private_dir(&link.join("state"), "x").unwrap();
        assert_eq!(found, fs::canonicalize(&real).unwrap().join("state"));
        symlink(root.path().join("loop"), root.path().join("loop")).unwrap();
        assert!(private_dir(&root.path().join("loop/x"), "x").is_err());
        if geteuid().is_root() {
            std::os::unix::fs::lchown(&link, Some(4711), None).unwrap();
            assert!(refused(&link.join("state")).contains("a link of user 4711"));
            assert!(refused(&link).contains("a link of user 4711"));
        }
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_known_without_making_it() {
        let root = tempfile::tempdir().unwrap();
        let problem = |path: &Path| walk(path).unwrap().cannot_be_made();
        let missing = root.path().join("a/b");
        assert_eq!(problem(root.path()), None);
        assert_eq!(problem(&missing), None);
        assert!(!root.path().join("a").exists());
        let file = root.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(problem(&file).unwrap().ends_with("file: is not a directory"));
        let below_a_file = walk(&file.join("b")).unwrap_err().to_string();
        assert!(below_a_file.contains("Not a directory"), "{below_a_file}");
        for kernel in ["/proc/no-such/state", "/sys/no-such/state"] {
            let text = problem(Path::new(kernel)).unwrap();
            assert!(
                // Without root, the mode of the directory says it, too.
                text.contains("lets no directory be made") || text.contains("Permission denied"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_directory_is_locked_by_one_daemon() {
        let root = tempfile::tempdir().unwrap();
        let first = lock_dir(root.path(), "state_dir").unwrap();
        let error = lock_dir(root.path(), "state_dir").unwrap_err().to_string();
        assert!(
            error.contains("another palisade daemon") && error.contains("state_dir"),
            "{error}"
        );
        drop(first);
        lock_dir(root.path(), "state_dir").unwrap();
    }
}
