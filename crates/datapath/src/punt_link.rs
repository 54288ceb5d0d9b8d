//! The punt link: the veth pair on which packets are punted to the workers and reinjected.
//!
//! `<name>0` is the node's end. The programs redirect punted packets to it, and `palisade_reinject` at its ingress
//! receives the packets that workers send. `<name>1` is the workers' end, with `palisade_punt` and one AF_XDP socket
//! for each queue. At the egress of both ends, `palisade_punt_filter` drops packets that neither a program of Palisade
//! nor a worker sends.
//!
//! The pair and the BPF links of its programs (pinned below `<pin_dir>/punt_link/`) stay when the daemon ends. While no
//! worker writes heartbeats, the programs drop packets that need inspection, or let them pass without inspection if
//! fail open is configured.

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    path::{Path, PathBuf},
};

use palisade_abi::{MAX_WORKERS, PUNT_MTU as MTU};

use crate::{
    AttachError, Datapath, HookKind, MapError, SyscallError, TcMode,
    hook::{find_device, resolve_tc},
    maps::Heartbeats,
    pin::{make_dir, pinned_link, unpin},
    programs::Program,
    sys::{
        bpf::{self, AttachType},
        clsact, kernel_release,
        link::{Link, create, delete, link, link_by_index, set_quiet, set_up},
    },
};
use palisade_abi::Direction;

type Result<T> = std::result::Result<T, AttachError>;

/// Names of the pins below `<pin_dir>/punt_link/`.
const XDP_PIN: &str = "xdp";
const PASS_PIN: &str = "xdp_node";
const REINJECT_PIN: &str = "tcx_ingress";
const NODE_FILTER_PIN: &str = "tcx_egress_node";
const WORKER_FILTER_PIN: &str = "tcx_egress_worker";

/// Punt link of a node, ready for AF_XDP sockets.
#[derive(Clone, Copy, Debug)]
pub struct PuntLink {
    ifindex: u32,
    workers: u32,
}

/// Maps in which workers register their sockets and write their heartbeats. The maps exist even without a punt link.
#[derive(Debug)]
pub struct SocketMap {
    sockets: std::os::fd::OwnedFd,
    heartbeats: Heartbeats,
}

impl PuntLink {
    /// Returns the interface index of the node's end.
    #[must_use]
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    /// Returns the number of queues, one for each worker.
    #[must_use]
    pub fn workers(&self) -> u32 {
        self.workers
    }
}

impl SocketMap {
    /// Registers the AF_XDP socket of a queue. The kernel removes the socket from the map when the socket is closed.
    ///
    /// # Errors
    /// [`MapError`] if the kernel refuses the socket.
    pub fn insert_socket(&self, queue: u32, socket: BorrowedFd<'_>) -> std::result::Result<(), MapError> {
        bpf::update(
            self.sockets.as_fd(),
            &queue.to_ne_bytes(),
            &socket.as_raw_fd().to_ne_bytes(),
            0,
        )
        .map_err(|source| MapError::Syscall {
            map: "xsks".to_owned(),
            source,
        })
    }

    /// Writes the heartbeat of the worker of a queue. `now`: coarse monotonic time, ns.
    pub fn heartbeat(&self, queue: u32, now: u64) {
        self.heartbeats.heartbeat(queue, now);
    }
}

impl Datapath {
    /// Returns the maps for sockets and heartbeats of the workers.
    ///
    /// # Errors
    /// [`MapError`] if a descriptor cannot be duplicated or a map cannot be memory-mapped.
    pub fn socket_map(&self) -> std::result::Result<SocketMap, MapError> {
        let sockets = bpf::duplicate(&self.sockets.fd).map_err(|source| MapError::Syscall {
            map: "xsks".to_owned(),
            source,
        })?;
        Ok(SocketMap {
            sockets,
            heartbeats: Heartbeats::new(&self.workers)?,
        })
    }

    /// Creates the punt link with one queue for each worker and attaches its programs. The link of an earlier daemon is
    /// reused if it has the same number of queues and the same MTU; otherwise it is replaced.
    ///
    /// # Errors
    /// [`AttachError`] if the pair cannot be created or a program cannot be attached.
    pub fn punt_link(&self, name: &str, workers: u32) -> Result<PuntLink> {
        let workers = workers.clamp(1, MAX_WORKERS as u32);
        let [node_end, worker_end] = [format!("{name}0"), format!("{name}1")];
        let failed = |source| AttachError::Syscall {
            name: node_end.clone(),
            source,
        };
        let usable = match (
            link(&node_end).map_err(failed)?,
            link(&worker_end).map_err(failed)?,
        ) {
            (Some(node), Some(worker)) if node.is_veth(workers, MTU) && worker.is_veth(workers, MTU) => true,
            (None, None) => false,
            (one, other) => {
                if let Some(foreign) = [&one, &other]
                    .into_iter()
                    .flatten()
                    .find(|link| link.kind != "veth")
                {
                    return Err(AttachError::Syscall {
                        name: foreign.name.clone(),
                        source: SyscallError::new(
                            "an interface of this name exists and is not a veth; set [worker] interface to another name",
                            io::Error::from_raw_os_error(libc::EEXIST),
                        ),
                    });
                }
                for link in [one, other].into_iter().flatten() {
                    delete(link.ifindex).map_err(failed)?;
                }
                false
            }
        };
        if !usable {
            create(&node_end, &worker_end, workers, MTU).map_err(failed)?;
        }
        let find_end = |name: &str| {
            link(name).and_then(|link| {
                link.ok_or_else(|| {
                    SyscallError::new(
                        format!("RTM_GETLINK of {name}"),
                        io::Error::from_raw_os_error(libc::ENODEV),
                    )
                })
            })
        };
        let node = find_end(&node_end).map_err(failed)?;
        let worker = find_end(&worker_end).map_err(failed)?;
        for end in [&node, &worker] {
            set_quiet(end).map_err(failed)?;
        }
        // The programs are attached before the link is up, so that the link never accepts a packet without them.
        self.attach_punt_link(&node, &worker)?;
        for end in [&node, &worker] {
            set_up(end.ifindex).map_err(failed)?;
        }
        Ok(PuntLink {
            ifindex: node.ifindex,
            workers,
        })
    }

    fn attach_punt_link(&self, node: &Link, worker: &Link) -> Result<()> {
        let dir = punt_link_dir(&self.pin_dir);
        make_dir(&dir).map_err(Box::new)?;
        attach_xdp(&dir.join(XDP_PIN), worker, &self.programs.punt)?;
        let release = kernel_release();
        if panics_after_reinjection(&release) {
            attach_xdp(&dir.join(PASS_PIN), node, &self.programs.pass).map_err(|error| match error {
                AttachError::Syscall { name, source } => AttachError::Syscall {
                    name,
                    source: SyscallError::new(
                        format!(
                            "Linux {} panics with the first packet that a worker reinjects (fixed in 6.17.11 and \
                             6.18), and the XDP program that prevents it cannot be attached: {}",
                            release.trim(),
                            source.call
                        ),
                        source.io_error,
                    ),
                },
                other => other,
            })?;
        }
        let (programs, ingress, egress) = (&self.programs, Direction::Ingress, Direction::Egress);
        attach_tc(&dir.join(REINJECT_PIN), node, ingress, &programs.reinject)?;
        attach_tc(&dir.join(NODE_FILTER_PIN), node, egress, &programs.punt_filter)?;
        attach_tc(
            &dir.join(WORKER_FILTER_PIN),
            worker,
            egress,
            &programs.punt_filter,
        )
    }
}

/// Returns whether Linux of this release panics when a frame from an AF_XDP socket reaches tc or IP with its
/// destructor: 6.16.8 to 6.17.10. Upstream commit 30f241fcf52a, in 6.17 and 6.16.8, makes the destructor read
/// `skb->cb`; commit 0ebc27a4c67d, in 6.18 and 6.17.11, fixes that; 6.16 ended with 6.16.12. Distribution kernels that
/// always report 6.17.0 count as affected, which costs a copy of each reinjected packet.
#[must_use]
pub fn panics_after_reinjection(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse::<u32>().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    let version = (next(), next(), next());
    ((6, 16, 8)..=(6, 17, 10)).contains(&version)
}

/// Attaches a native XDP program to an end of the punt link, or replaces the program of an earlier daemon.
fn attach_xdp(path: &Path, end: &Link, program: &Program) -> Result<()> {
    let failed = refused(end);
    match pinned_link(path, end.ifindex)? {
        Some((link, _)) => bpf::link_update(link.as_fd(), program.fd()).map_err(failed),
        None => bpf::link_create(
            program.fd(),
            end.ifindex,
            AttachType::Xdp,
            bpf::XDP_FLAGS_DRV_MODE,
        )
        .and_then(|link| bpf::pin(link.as_fd(), path))
        .map_err(failed),
    }
}

/// Attaches a program to a tc hook of an end of the punt link or a proxy link, or replaces the program of an earlier daemon. A clsact
/// filter has no pin.
pub(crate) fn attach_tc(path: &Path, end: &Link, direction: Direction, program: &Program) -> Result<()> {
    let failed = refused(end);
    let device = find_device(end.ifindex)?.ok_or(AttachError::NoSuchInterface { ifindex: end.ifindex })?;
    if resolve_tc(TcMode::Auto, &device)? == HookKind::Clsact {
        let attached = (|| {
            if clsact::qdisc(end.ifindex)?.is_none() {
                clsact::add_qdisc(end.ifindex)?;
            }
            clsact::set_filter(end.ifindex, direction, program.fd(), program.name)
        })();
        return attached.map_err(failed);
    }
    match pinned_link(path, end.ifindex)? {
        Some((link, _)) => bpf::link_update(link.as_fd(), program.fd()).map_err(failed),
        None => {
            let hook = match direction {
                Direction::Ingress => AttachType::TcxIngress,
                Direction::Egress => AttachType::TcxEgress,
            };
            bpf::link_create(program.fd(), end.ifindex, hook, bpf::BPF_F_BEFORE)
                .and_then(|link| bpf::pin(link.as_fd(), path))
                .map_err(failed)
        }
    }
}

fn refused(end: &Link) -> impl FnOnce(SyscallError) -> AttachError {
    let name = end.name.clone();
    move |source| AttachError::Syscall { name, source }
}

fn punt_link_dir(pin_dir: &Path) -> PathBuf {
    pin_dir.join("punt_link")
}

/// Removes the veth pair with its programs, and the pins.
pub(crate) fn remove_punt_link(pin_dir: &Path) -> Result<()> {
    let dir = punt_link_dir(pin_dir);
    if !dir.is_dir() {
        return Ok(());
    }
    for file in [
        XDP_PIN,
        PASS_PIN,
        REINJECT_PIN,
        NODE_FILTER_PIN,
        WORKER_FILTER_PIN,
    ] {
        let path = dir.join(file);
        let failed = |source| AttachError::Syscall {
            name: path.display().to_string(),
            source,
        };
        let Some(link) = bpf::get_pinned(&path).map_err(failed)? else {
            continue;
        };
        let info = bpf::link_info(link.as_fd()).map_err(failed)?;
        bpf::link_detach(link.as_fd()).map_err(failed)?;
        unpin(&path)?;
        // `info.ifindex` is an index in the network namespace of the punt link. If this thread is in another namespace,
        // the index can belong to another interface. So the interface is deleted only if it can be the workers' end: a
        // veth whose name ends with 1 and which has no XDP program after `link_detach`.
        if file == XDP_PIN
            && let Some(device) = find_device(info.ifindex)?
            && device.xdp.is_none()
            && link_by_index(info.ifindex)
                .map_err(failed)?
                .is_some_and(|link| link.kind == "veth" && link.name.ends_with('1'))
        {
            delete(info.ifindex).map_err(failed)?;
        }
    }
    fs::remove_dir(&dir).map_err(|source| AttachError::Io { path: dir, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_panic_after_reinjection_are_known_by_their_release() {
        for (release, panics) in [
            ("6.12.117+deb12-amd64", false),
            ("6.16.7", false),
            ("6.16.8", true),
            ("6.16.12+deb13-cloud-amd64\n", true),
            ("6.17.0-8-generic", true),
            ("6.17.10-300.fc43.x86_64", true),
            ("6.17.11", false),
            ("6.18.0-rc1", false),
            ("7.3.4+deb13-amd64", false),
            ("", false),
        ] {
            assert_eq!(panics_after_reinjection(release), panics, "{release}");
        }
    }
}
