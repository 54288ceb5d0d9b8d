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

use nix::{errno::Errno, fcntl::OFlag, sys::signal::kill, unistd::Pid};
use palisade_discover::{Wildcard, Workload};

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
    /// Returns a container that cannot be described and stays denied. With its last description (`known`), its
    /// interfaces are known.
    pub(super) fn refused(id: &str, problem: String, known: Option<&Self>) -> Self {
        let nowhere = || Namespace::File(PathBuf::new());
        Self {
            workload: Workload {
                name: id.to_owned(),
                container: Some(id.to_owned()),
                problem: Some(problem),
                ..Workload::default()
            },
            namespace: known.map_or_else(nowhere, |known| known.namespace.clone()),
        }
    }

    /// Returns whether a section with these patterns of names is for the workload. The name of a refused container may
    /// not be known, and then its id is in its place: it counts, so that its interface is not one without a workload.
    pub(super) fn is_for(&self, names: &[Wildcard]) -> bool {
        let Workload {
            name,
            container,
            problem,
            ..
        } = &self.workload;
        let is_nameless = problem.is_some() && container.as_ref() == Some(name);
        is_nameless || names.iter().any(|pattern| pattern.matches(name))
    }
}

impl Namespace {
    /// Returns whether the namespace exists.
    ///
    /// # Errors
    /// Those of [`Self::find`].
    pub(super) fn exists(&self) -> io::Result<bool> {
        self.find(&mut Numbers::open()?).map(|found| found.is_some())
    }

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
                if found.is_none() && is_hidden(*pid) {
                    return Err(io::Error::other(format!(
                        "process {pid} is hidden from the daemon: the service needs CAP_SYS_PTRACE"
                    )));
                }
                // The number of an ended process is used again. The cgroup of a container contains its id, and a process
                // of another container cannot have it.
                let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
                if found.is_some() && !names(&cgroup, id) {
                    return Err(io::Error::other(format!(
                        "process {pid} is not in the cgroup of the container"
                    )));
                }
                Ok(found)
            }
        }
    }
}

/// Returns whether a process exists and `/proc` does not show it (`ProtectProc=` of the unit).
fn is_hidden(pid: u32) -> bool {
    let number = i32::try_from(pid).ok().filter(|number| *number > 0);
    let exists = number.is_some_and(|number| kill(Pid::from_raw(number), None) != Err(Errno::ESRCH));
    exists && !Path::new(&format!("/proc/{pid}")).exists()
}

/// What engines put before the id of a container in the name of its cgroup: `docker-ID.scope`.
const PREFIXES: [&str; 8] = [
    "docker-",
    "libpod-",
    "libpod-payload-",
    "nerdctl-",
    "cri-containerd-",
    "containerd-",
    "crio-",
    "podman-",
];
/// Cgroups that a container runtime or the container's init makes within that of a container, for its first process:
/// crun, systemd, and Docker in a container.
const CHILDREN: [&str; 3] = ["container", "init.scope", "init"];

/// Returns whether the cgroups of a process name a container: `/docker/ID`, `/system.slice/docker-ID.scope`. Only the last
/// component counts, since a container can name cgroups within its own.
fn names(cgroup: &str, id: &str) -> bool {
    let mut paths = cgroup.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    paths.any(|path| {
        let mut last = path.rsplit('/').peekable();
        if last
            .peek()
            .is_some_and(|name| *name != id && CHILDREN.contains(name))
        {
            last.next();
        }
        let name = last.next().unwrap_or_default();
        is_named(name, last.next().unwrap_or_default(), id)
    })
}

/// Returns whether `name`, below `parent`, is the cgroup of a container.
fn is_named(name: &str, parent: &str, id: &str) -> bool {
    // An id has no colon: `SLICE:PREFIX:ID`.
    if name.rsplit(':').next() == Some(id) {
        return true;
    }
    // An id can have `-` and `.`: without systemd, `docker-web.scope` can be the whole id of another container. Random ids
    // are no part of another one.
    let scope = name.strip_suffix(".scope").filter(|_| parent.ends_with(".slice"));
    let is_random = id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit());
    let Some(rest) = scope.or_else(|| is_random.then_some(name)) else {
        return false;
    };
    PREFIXES
        .iter()
        .any(|prefix| rest.strip_prefix(prefix) == Some(id))
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
        Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_container_counts_for_sections_with_any_names_and_keeps_its_place() {
        let names = [Wildcard::parse("web-*").unwrap()];
        let mut known = Described::refused("0123", "x".to_owned(), None);
        assert!(known.is_for(&names));
        known.workload.problem = None;
        assert!(!known.is_for(&names));
        known.namespace = Namespace::Process(7, "0123".to_owned());
        let refused = Described::refused("0123", "x".to_owned(), Some(&known));
        assert_eq!(refused.namespace, known.namespace);
        known.workload.name = "db".to_owned();
        known.workload.problem = Some("x".to_owned());
        assert!(!known.is_for(&names));
    }

    #[test]
    fn a_cgroup_names_a_container_by_its_whole_id() {
        for cgroup in [
            "0::/docker/web",
            "4:memory:/x\n0::/system.slice/docker-web.scope\n",
            "0::/machine.slice/libpod-web.scope/container",
            "0::/system.slice:cri-containerd:web",
            "0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-web.scope",
            "0::/system.slice/nerdctl-web.scope/init.scope",
            "0::/default/web",
        ] {
            assert!(names(cgroup, "web"), "{cgroup}");
        }
        for cgroup in [
            "",
            "0::/default/web2",
            "0::/default/xweb",
            "0::/init",
            "0::/default/web-2",
            "0::/default/my.web",
            "0::/default/docker-web.scope",
            "0::/system.slice/nerdctl-my-web.scope",
            "0::/system.slice/web.service",
            // Made by the container `db`.
            "0::/default/db/web/x",
            "0::/web/db",
        ] {
            assert!(!names(cgroup, "web"), "{cgroup}");
        }
        let id = "0123456789abcdef".repeat(4);
        for cgroup in [
            "libpod_parent/libpod-",
            "system.slice/x.service/libpod-payload-",
            "docker/",
        ] {
            assert!(names(&format!("0::/{cgroup}{id}"), &id), "{cgroup}");
        }
        assert!(!names(&format!("0::/default/x-{id}"), &id));
    }
}
