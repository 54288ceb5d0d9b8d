//! Finds the network namespace of a workload: its inode, and the number that the kernel gives it in the node's namespace.

use std::{
    fs::{self, OpenOptions},
    io,
    os::{
        fd::AsFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use nix::fcntl::OFlag;
use palisade_discover::Workload;

use super::links::Numbers;

/// Where the network namespace of a workload is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Namespace {
    /// A file on which the namespace is mounted.
    File(PathBuf),
    /// The namespace of a process of the container with this id.
    Process(u32, String),
}

/// A workload by its source, before its interfaces are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Described {
    pub workload: Workload,
    pub namespace: Namespace,
}

impl Described {
    /// Returns a container that cannot be described and stays denied.
    pub(super) fn refused(id: &str, problem: String) -> Self {
        Self {
            workload: Workload {
                name: id.to_owned(),
                container: Some(id.to_owned()),
                problem: Some(problem),
                ..Workload::default()
            },
            namespace: Namespace::File(PathBuf::new()),
        }
    }
}

impl Namespace {
    /// Returns inode and number; `None` if there is no namespace, because it is being made or is gone.
    ///
    /// # Errors
    /// The file cannot be opened, or the process is not one of the container.
    pub(super) fn find(&self, numbers: &mut Numbers) -> io::Result<Option<(u64, Option<i32>)>> {
        match self {
            // Another file than a namespace must neither block nor lead elsewhere.
            Self::File(path) => open(path, OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW, numbers),
            Self::Process(pid, id) => {
                // `ns/net` is a link by its nature.
                let found = open(
                    &PathBuf::from(format!("/proc/{pid}/ns/net")),
                    OFlag::empty(),
                    numbers,
                )?;
                // The number of an ended process is used again. The cgroup of a container contains its id, and a process
                // of another container cannot have it.
                let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
                if found.is_some() && !cgroup.contains(id) {
                    return Err(io::Error::other(format!(
                        "process {pid} is not in the cgroup of the container"
                    )));
                }
                Ok(found)
            }
        }
    }
}

fn open(path: &Path, flags: OFlag, numbers: &mut Numbers) -> io::Result<Option<(u64, Option<i32>)>> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags((flags | OFlag::O_CLOEXEC).bits())
        .open(path);
    let file = match opened {
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
