//! Named network namespaces: the files that `ip netns` and container engines mount in a directory.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::Path,
};

use nix::fcntl::OFlag;

use super::links::Numbers;
use crate::config::{Discover, DiscoverSource};

/// Maximum number of names of one directory that are read.
const MAX_NAMES: usize = 65_536;

/// A named network namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Named {
    /// Number of the section.
    pub rule: usize,
    pub name: String,
    pub inode: u64,
    /// Number in the node's namespace; `None` if no interface leads there.
    pub nsid: Option<i32>,
}

/// The named network namespaces of all sections.
#[derive(Debug, Default)]
pub(super) struct Names {
    pub found: BTreeSet<Named>,
    /// Whether a name has no network namespace yet.
    pub is_unsettled: bool,
    /// Names that cannot be read, for `status`.
    pub problems: Vec<String>,
}

/// Reads the directories. A name belongs to the first section that it matches.
///
/// # Errors
/// A directory exists and cannot be read, so that the namespaces that it has are not known.
pub(super) fn read(sections: &[Discover], numbers: &mut Numbers) -> io::Result<Names> {
    let mut names = Names::default();
    let mut seen = BTreeSet::new();
    for (rule, section) in sections.iter().enumerate() {
        let DiscoverSource::Netns(dir) = &section.source;
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            // The first `ip netns add` makes the directory.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => {
                return Err(io::Error::new(
                    error.kind(),
                    format!("{}: {error}", dir.display()),
                ));
            }
        };
        for (n, entry) in entries.enumerate() {
            if n >= MAX_NAMES {
                names.problems.push(format!(
                    "{} has more than {MAX_NAMES} names; the rest stays denied",
                    dir.display()
                ));
                break;
            }
            let Ok(name) = entry?.file_name().into_string() else {
                continue;
            };
            if !section.rule.names.iter().any(|names| names.matches(&name))
                || !seen.insert((dir.clone(), name.clone()))
            {
                continue;
            }
            match named(dir, &name, numbers) {
                Ok(Some((inode, nsid))) => {
                    names.found.insert(Named {
                        rule,
                        name,
                        inode,
                        nsid,
                    });
                }
                Ok(None) => names.is_unsettled = true,
                Err(error) => names
                    .problems
                    .push(format!("{}: {error}; it stays denied", dir.join(&name).display())),
            }
        }
    }
    Ok(names)
}

/// Returns inode and number of the namespace with this name; `None` if there is no namespace under the name, because it
/// is being made or is gone.
fn named(dir: &Path, name: &str, numbers: &mut Numbers) -> io::Result<Option<(u64, Option<i32>)>> {
    let opened = OpenOptions::new()
        .read(true)
        // Another file than a namespace must neither block nor lead elsewhere.
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).bits())
        .open(dir.join(name));
    let file: File = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match numbers.of(file.as_fd()) {
        Ok(nsid) => Ok(Some((file.metadata()?.ino(), nsid))),
        // The file exists before the namespace is mounted on it.
        Err(error) if error.raw_os_error() == Some(nix::errno::Errno::EINVAL as i32) => Ok(None),
        Err(error) => Err(error),
    }
}
