//! The punt link: the veth pair on which packets go to the workers and come back.
//!
//! `<name>0` is the node's end: the programs redirect what is to be read to it, and `palisade_reinject` at its ingress
//! takes what comes back. `<name>1` is the workers' end, with `palisade_punt` and one AF_XDP socket for each
//! queue. At the egress of both, `palisade_punt_filter` drops what sockets of this machine send. The pair and the links (below `<pin_dir>/punt_link/`) outlive the daemon like everything else:
//! without workers what must be read is dropped by the programs, which then see no sign of life.

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    path::{Path, PathBuf},
};

use palisade_abi::{MAX_WORKERS, PUNT_MTU as MTU};

use crate::{
    AttachError, Datapath, HookKind, MapError, SyscallError, TcMode,
    attach::{find_device, pinned_link, resolve_tc, unpin},
    loader::{Program, kernel_release, make_dir},
    maps::Heartbeats,
    sys::{
        bpf::{self, AttachType},
        clsact,
        netlink::{Request, Socket, find, text, u32_at},
    },
};
use palisade_abi::Direction;

type Result<T> = std::result::Result<T, AttachError>;

const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_NUM_TX_QUEUES: u16 = 31;
const IFLA_NUM_RX_QUEUES: u16 = 32;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// Names of the pins below `<pin_dir>/punt_link/`.
const XDP_PIN: &str = "xdp";
const PASS_PIN: &str = "xdp_node";
const REINJECT_PIN: &str = "tcx_ingress";
const NODE_FILTER_PIN: &str = "tcx_egress_node";
const WORKER_FILTER_PIN: &str = "tcx_egress_worker";

/// The punt link of a node, ready for sockets.
#[derive(Clone, Copy, Debug)]
pub struct PuntLink {
    ifindex: u32,
    workers: u32,
}

/// Where workers leave their sockets and signs of life, whether there is a punt link or not.
#[derive(Debug)]
pub struct SocketMap {
    sockets: std::os::fd::OwnedFd,
    heartbeats: Heartbeats,
}

impl PuntLink {
    /// Index of the node's end.
    #[must_use]
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    /// Queues, one for each worker.
    #[must_use]
    pub fn workers(&self) -> u32 {
        self.workers
    }
}

impl SocketMap {
    /// Gives a queue its AF_XDP socket. One that is closed leaves by itself.
    ///
    /// # Errors
    /// If it is no socket of that queue of the workers' end.
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

    /// Says that the worker of a queue lives. `now`: coarse monotonic clock, ns.
    pub fn heartbeat(&self, queue: u32, now: u64) {
        self.heartbeats.heartbeat(queue, now);
    }
}

impl Datapath {
    /// Where workers leave their sockets and signs of life.
    ///
    /// # Errors
    /// If a map cannot be had once more.
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

    /// Finds or makes the punt link with one queue for each worker, and attaches its programs. What a former daemon
    /// left is used again if it has as many queues.
    ///
    /// # Errors
    /// If the pair cannot be made or the programs not be attached.
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
            (Some(node), Some(worker)) if node.fits(workers) && worker.fits(workers) => true,
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
                            "an interface of this name is no punt link; set [worker] interface to another name",
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
            create(&node_end, &worker_end, workers).map_err(failed)?;
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
        // Guarded before it is up.
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
        place_xdp(&dir.join(XDP_PIN), worker, &self.programs.punt)?;
        let release = kernel_release();
        if panics_after_reinjection(&release) {
            place_xdp(&dir.join(PASS_PIN), node, &self.programs.pass).map_err(|error| match error {
                AttachError::Syscall { name, source } => AttachError::Syscall {
                    name,
                    source: SyscallError::new(
                        format!(
                            "Linux {} panics with the first packet that a worker sends back (fixed in 6.17.11 and \
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
        place_tc(&dir.join(REINJECT_PIN), node, ingress, &programs.reinject)?;
        place_tc(&dir.join(NODE_FILTER_PIN), node, egress, &programs.punt_filter)?;
        place_tc(
            &dir.join(WORKER_FILTER_PIN),
            worker,
            egress,
            &programs.punt_filter,
        )
    }
}

/// Whether Linux of this release panics when a frame that AF_XDP has sent reaches tc or IP with its destructor: 6.16.8
/// to 6.17.10. (Upstream commit 30f241fcf52a, in 6.17 and 6.16.8, has the destructor read `skb->cb`; commit
/// 0ebc27a4c67d, in 6.18 and 6.17.11, mends it. 6.16 ended with 6.16.12.) Distributions that always say 6.17.0 count as
/// affected, which costs a copy of each packet that comes back.
fn panics_after_reinjection(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse::<u32>().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    let version = (next(), next(), next());
    ((6, 16, 8)..=(6, 17, 10)).contains(&version)
}

/// Puts native XDP at an end of the punt link, or in the place of what a former daemon left there.
fn place_xdp(path: &Path, end: &Link, program: &Program) -> Result<()> {
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

/// Puts a program at a tc hook of an end of the punt link, or in the place of what a former daemon left there. A filter
/// of clsact has no pin.
fn place_tc(path: &Path, end: &Link, direction: Direction, program: &Program) -> Result<()> {
    let failed = refused(end);
    let device = find_device(end.ifindex)?.ok_or(AttachError::NoSuchInterface { ifindex: end.ifindex })?;
    if resolve_tc(TcMode::Auto, &device)? == HookKind::Clsact {
        let placed = (|| {
            if clsact::qdisc(end.ifindex)?.is_none() {
                clsact::add_qdisc(end.ifindex)?;
            }
            clsact::set_filter(end.ifindex, direction, program.fd(), program.name)
        })();
        return placed.map_err(failed);
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

/// Removes the pair with its programs, and the pins.
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
        // The end of another network namespace's punt link may have the same index: the program tells.
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

/// What rtnetlink says of an end.
#[derive(Debug)]
struct Link {
    ifindex: u32,
    name: String,
    kind: String,
    tx_queues: u32,
    rx_queues: u32,
    mtu: u32,
}

impl Link {
    fn fits(&self, workers: u32) -> bool {
        self.kind == "veth" && self.tx_queues == workers && self.rx_queues == workers && self.mtu == MTU
    }
}

fn ifinfo(ifindex: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut info = [0; 16];
    info[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    info[8..12].copy_from_slice(&flags.to_ne_bytes());
    info[12..16].copy_from_slice(&change.to_ne_bytes());
    info
}

fn c_string(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn link(name: &str) -> std::result::Result<Option<Link>, SyscallError> {
    ask(
        Request::new(libc::RTM_GETLINK, 0)
            .fixed(&ifinfo(0, 0, 0))
            .attr(IFLA_IFNAME, &c_string(name)),
        &format!("RTM_GETLINK of {name}"),
    )
}

fn link_by_index(ifindex: u32) -> std::result::Result<Option<Link>, SyscallError> {
    ask(
        Request::new(libc::RTM_GETLINK, 0).fixed(&ifinfo(ifindex, 0, 0)),
        &format!("RTM_GETLINK of interface {ifindex}"),
    )
}

fn ask(request: Request, call: &str) -> std::result::Result<Option<Link>, SyscallError> {
    let mut found = None;
    let answer = Socket::open(libc::NETLINK_ROUTE)?.query(request, 0, call, &mut |kind, payload| {
        if kind != libc::RTM_NEWLINK {
            return;
        }
        let attributes = payload.get(16..).unwrap_or_default();
        let number = |kind| find(attributes, kind).and_then(|v| u32_at(v, 0)).unwrap_or(0);
        let info = find(attributes, IFLA_LINKINFO).unwrap_or_default();
        found = u32_at(payload, 4).map(|ifindex| Link {
            ifindex,
            name: find(attributes, IFLA_IFNAME).map(text).unwrap_or_default(),
            kind: find(info, IFLA_INFO_KIND).map(text).unwrap_or_default(),
            tx_queues: number(IFLA_NUM_TX_QUEUES),
            rx_queues: number(IFLA_NUM_RX_QUEUES),
            mtu: number(IFLA_MTU),
        });
    });
    match answer {
        Ok(()) => Ok(found),
        Err(e) if e.errno() == libc::ENODEV => Ok(None),
        Err(e) => Err(e),
    }
}

fn create(node_end: &str, worker_end: &str, workers: u32) -> std::result::Result<(), SyscallError> {
    let end = |request: Request, name: &str| {
        request
            .attr(IFLA_IFNAME, &c_string(name))
            .attr(IFLA_MTU, &MTU.to_ne_bytes())
            .attr(IFLA_NUM_TX_QUEUES, &workers.to_ne_bytes())
            .attr(IFLA_NUM_RX_QUEUES, &workers.to_ne_bytes())
    };
    let request =
        Request::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL).fixed(&ifinfo(0, 0, 0));
    let request = end(request, node_end).nested(IFLA_LINKINFO, |info| {
        info.attr(IFLA_INFO_KIND, b"veth\0")
            .nested(IFLA_INFO_DATA, |data| {
                data.nested(VETH_INFO_PEER, |peer| {
                    end(peer.fixed(&ifinfo(0, 0, 0)), worker_end)
                })
            })
    });
    let call = format!("RTM_NEWLINK of {node_end} and {worker_end}");
    Socket::open(libc::NETLINK_ROUTE)?
        .execute(request, &call)
        .map_err(without_veth)
}

/// Names what the kernel lacks if that is why a veth pair cannot be made: a kind of interface that it does not know, after
/// it has tried to load the module.
fn without_veth(error: SyscallError) -> SyscallError {
    if error.errno() != libc::EOPNOTSUPP {
        return error;
    }
    SyscallError {
        call: format!(
            "Linux {} has no veth interfaces (module veth, CONFIG_VETH): {}",
            kernel_release(),
            error.call
        ),
        ..error
    }
}

/// No IPv6 and no ARP: no protocol of this machine sends on the punt link. Without IPv6 there are no reports of multicast
/// groups either, which a node that forwards IPv6 otherwise sends from every interface (ff02::2; RFC 3810).
fn set_quiet(end: &Link) -> std::result::Result<(), SyscallError> {
    let call = format!("RTM_NEWLINK of interface {}", end.ifindex);
    let mut socket = Socket::open(libc::NETLINK_ROUTE)?;
    let quiet = Request::new(libc::RTM_NEWLINK, 0)
        .fixed(&ifinfo(end.ifindex, 0, 0))
        .nested(IFLA_AF_SPEC, |families| {
            families.nested(libc::AF_INET6 as u16, |family| {
                family.attr(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE])
            })
        });
    match socket.execute(quiet, &call) {
        // A kernel without IPv6, or with it switched off.
        Err(e) if matches!(e.errno(), libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL) => {}
        other => other?,
    }
    // Where it cannot be written (no IPv6; /proc/sys is read-only), `palisade_punt_filter` drops what IPv6 sends.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", end.name), "1");
    let flags = libc::IFF_NOARP as u32;
    socket.execute(
        Request::new(libc::RTM_NEWLINK, 0).fixed(&ifinfo(end.ifindex, flags, flags)),
        &call,
    )
}

fn set_up(ifindex: u32) -> std::result::Result<(), SyscallError> {
    let flags = libc::IFF_UP as u32;
    Socket::open(libc::NETLINK_ROUTE)?.execute(
        Request::new(libc::RTM_NEWLINK, 0).fixed(&ifinfo(ifindex, flags, flags)),
        &format!("RTM_NEWLINK of interface {ifindex}"),
    )
}

fn delete(ifindex: u32) -> std::result::Result<(), SyscallError> {
    let request = Request::new(libc::RTM_DELLINK, 0).fixed(&ifinfo(ifindex, 0, 0));
    match Socket::open(libc::NETLINK_ROUTE)?.execute(request, &format!("RTM_DELLINK of interface {ifindex}"))
    {
        // Gone with its other end.
        Err(e) if e.errno() == libc::ENODEV => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_veth_is_named_with_what_it_lacks() {
        let error = |errno| {
            without_veth(SyscallError {
                call: "RTM_NEWLINK of palisade0 and palisade1".into(),
                io_error: std::io::Error::from_raw_os_error(errno),
            })
            .to_string()
        };
        let said = error(libc::EOPNOTSUPP);
        for part in [
            kernel_release().as_str(),
            "has no veth interfaces (module veth, CONFIG_VETH)",
            "RTM_NEWLINK of palisade0 and palisade1",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert!(error(libc::EEXIST).starts_with("RTM_NEWLINK of palisade0"));
    }

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
