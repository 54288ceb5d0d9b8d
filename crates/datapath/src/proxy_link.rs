//! The proxy links: for each direction of the verdict, a network namespace for the proxy's sockets, and a veth pair
//! between the node and the namespace.
//!
//! The programs redirect the packets of intercepted flows to the node's end, `<name>pi` or `<name>pe`, and
//! `palisade_proxy` at its ingress sends the packets of the proxy on. At its egress, `palisade_proxy_filter` drops
//! packets that no program has redirected. In the namespace, the other end `px0` accepts packets to every address, and
//! `palisade_lookup` assigns connections to the proxy's listeners.
//!
//! The namespaces have no name: they, and the links with them, end when the daemon and its sockets are gone. The
//! programs then drop the packets of intercepted flows, because the interface of [`palisade_abi::Config`] is gone.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
};

use palisade_abi::{DIRECTIONS, Direction, PROXY_IFINDEX, PROXY_MAC, listener_slot};

use crate::{
    AttachError, Datapath, MapError, SyscallError,
    hook::find_device,
    pin::{make_dir, remove_empty, unpin},
    punt_link::attach_tc,
    sys::{
        bpf,
        link::{
            ChosenEnd, Link, create_across, delete, link, link_by_index, set_flags, set_no_link_local,
            set_quiet, set_up,
        },
        route::{add_default, add_input_rule, add_local_default},
    },
};

type Result<T> = std::result::Result<T, AttachError>;

/// Name of the proxy's end of each link, in its namespace.
const PROXY_END: &str = "px0";
/// Index of the loopback interface, the first interface of each namespace.
const LOOPBACK: u32 = 1;
/// Routing table by which every address is local.
const TABLE: u8 = 100;
/// Priority of the rule that selects [`TABLE`], before the rule of the main table (32766).
const PRIORITY: u32 = 100;
/// Gateways of the default routes. With a gateway, all destinations share one neighbour entry; the neighbour tables of
/// all namespaces together are limited (`gc_thresh3`). `px0` has no ARP, so the gateways are never resolved.
const GATEWAY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 0, 1));
const GATEWAY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));
/// Lowest MTU of a link with IPv6 (RFC 8200, section 5), bytes.
const MIN_MTU: u32 = 1_280;

/// The proxy links of a node.
#[derive(Debug)]
pub struct ProxyLinks {
    /// Network namespaces of the proxy, by [`Direction`].
    pub namespaces: [OwnedFd; 2],
    ifindexes: [u32; 2],
    listeners: OwnedFd,
}

impl ProxyLinks {
    /// Returns the indexes of the node's ends, by [`Direction`]: the value of [`palisade_abi::Config::proxy_ifindex`].
    #[must_use]
    pub fn ifindexes(&self) -> [u32; 2] {
        self.ifindexes
    }

    /// Sets the node's ends up if they are down. Returns the number of ends that were down; `None` if an end is gone,
    /// because it or its namespace was deleted.
    ///
    /// # Errors
    /// [`AttachError`] if the interfaces cannot be read or set up.
    pub fn repair(&self) -> Result<Option<usize>> {
        let mut were_down = 0;
        for ifindex in self.ifindexes {
            let Some(device) = find_device(ifindex)? else {
                return Ok(None);
            };
            if !device.up {
                set_up(ifindex).map_err(|source| AttachError::Syscall {
                    name: device.name,
                    source,
                })?;
                were_down += 1;
            }
        }
        Ok(Some(were_down))
    }

    /// Registers a listening socket, which then gets the connections of one direction and address family. If the socket
    /// has SO_REUSEPORT, the kernel distributes the connections over the sockets of its group. The socket leaves the
    /// map when it is closed.
    ///
    /// # Errors
    /// [`MapError`] if the kernel refuses the socket.
    pub fn register(
        &self,
        direction: Direction,
        ipv6: bool,
        listener: BorrowedFd<'_>,
    ) -> std::result::Result<(), MapError> {
        bpf::update(
            self.listeners.as_fd(),
            &listener_slot(direction, ipv6).to_ne_bytes(),
            &listener.as_raw_fd().to_ne_bytes(),
            0,
        )
        .map_err(|source| MapError::Syscall {
            map: "proxy_listeners".to_owned(),
            source,
        })
    }
}

/// Returns the names of the node's ends, by [`Direction`]. `name`: name of the punt link without the digit of its end.
#[must_use]
pub fn proxy_link_names(name: &str) -> [String; 2] {
    [format!("{name}pi"), format!("{name}pe")]
}

impl Datapath {
    /// Creates both network namespaces and both links and attaches the programs. Links of an earlier daemon are deleted
    /// first: their namespaces can have sockets of that daemon until these have closed. `mtu`: largest packet that
    /// every guarded interface can send, bytes.
    ///
    /// # Errors
    /// [`AttachError`] if a namespace or link cannot be created, or a program cannot be attached. Nothing of the links
    /// is left then, except links of an earlier daemon that cannot be deleted.
    pub fn proxy_links(&self, name: &str, mtu: u32) -> Result<ProxyLinks> {
        let names = proxy_link_names(name);
        let failed = |source| AttachError::Syscall {
            name: names[0].clone(),
            source,
        };
        let listeners = bpf::duplicate(&self.listeners.fd).map_err(failed)?;
        let dir = dir(&self.pin_dir);
        make_dir(&dir).map_err(Box::new)?;
        let (ingress, ingress_end) = self.make(&dir, Direction::Ingress, &names, mtu)?;
        let (egress, egress_end) = match self.make(&dir, Direction::Egress, &names, mtu) {
            Ok(made) => made,
            Err(error) => {
                let _ = delete(ingress_end);
                return Err(error);
            }
        };
        Ok(ProxyLinks {
            namespaces: [ingress, egress],
            ifindexes: [ingress_end, egress_end],
            listeners,
        })
    }

    /// Creates the namespace and the link of one direction. Returns the namespace and the index of the node's end.
    fn make(
        &self,
        dir: &Path,
        direction: Direction,
        names: &[String; 2],
        mtu: u32,
    ) -> Result<(OwnedFd, u32)> {
        let name = &names[direction as usize];
        let failed = |source| AttachError::Syscall {
            name: name.clone(),
            source,
        };
        if let Some(former) = link(name).map_err(failed)? {
            if former.kind != "veth" {
                return Err(failed(SyscallError::new(
                    "an interface of this name exists and is not a veth; set [worker] interface to another name",
                    io::Error::from_raw_os_error(libc::EEXIST),
                )));
            }
            delete(former.ifindex).map_err(failed)?;
        }
        let netns = new_namespace().map_err(failed)?;
        let node_netns = own_namespace().map_err(failed)?;
        let proxy_end = ChosenEnd {
            name: PROXY_END,
            ifindex: PROXY_IFINDEX + direction as u32,
            mac: PROXY_MAC,
        };
        in_namespace(&netns, || {
            create_across(&proxy_end, name, node_netns.as_fd(), mtu.max(MIN_MTU))
        })
        .map_err(failed)?;
        let node = link(name).map_err(failed)?.ok_or_else(|| {
            failed(SyscallError::new(
                format!("RTM_GETLINK of {name}"),
                io::Error::from_raw_os_error(libc::ENODEV),
            ))
        })?;
        match self.prepare(dir, direction, &node, &netns) {
            Ok(()) => Ok((netns, node.ifindex)),
            Err(error) => {
                let _ = delete(node.ifindex);
                Err(error)
            }
        }
    }

    /// Attaches the programs, configures the namespace, and sets both ends up.
    fn prepare(&self, dir: &Path, direction: Direction, node: &Link, netns: &OwnedFd) -> Result<()> {
        let failed = |source| AttachError::Syscall {
            name: node.name.clone(),
            source,
        };
        set_quiet(node).map_err(failed)?;
        // The programs are attached before the link is up, so that the link never accepts a packet without them.
        let [proxy_pin, filter_pin, lookup_pin] = pins(direction);
        let programs = &self.programs;
        attach_tc(&dir.join(proxy_pin), node, Direction::Ingress, &programs.proxy)?;
        attach_tc(
            &dir.join(filter_pin),
            node,
            Direction::Egress,
            &programs.proxy_filter,
        )?;
        // A pinned link of an earlier daemon belongs to the namespace of that daemon.
        let lookup_pin = dir.join(lookup_pin);
        unpin(&lookup_pin)?;
        bpf::link_create_netns(programs.lookup.fd(), netns.as_fd())
            .and_then(|link| bpf::pin(link.as_fd(), &lookup_pin))
            .map_err(failed)?;
        in_namespace(netns, || configure(PROXY_IFINDEX + direction as u32)).map_err(failed)?;
        set_up(node.ifindex).map_err(failed)
    }
}

/// Configures the network namespace of the calling thread. `px0`: index of the proxy's end of the link.
fn configure(px0: u32) -> std::result::Result<(), SyscallError> {
    // Packets are accepted whatever their source and destination, and nothing is forwarded. Errors are ignored: files
    // are missing without IPv6 and can be read-only, but the defaults of a new namespace are the same or do no harm.
    for (file, value) in [
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/px0/rp_filter", "0"),
        ("ipv4/conf/all/forwarding", "0"),
        ("ipv4/conf/px0/forwarding", "0"),
        ("ipv4/conf/all/route_localnet", "0"),
        ("ipv4/conf/px0/route_localnet", "0"),
        ("ipv4/conf/all/accept_redirects", "0"),
        ("ipv4/conf/px0/accept_redirects", "0"),
        ("ipv6/conf/all/forwarding", "0"),
        ("ipv6/conf/px0/forwarding", "0"),
        ("ipv6/conf/px0/disable_ipv6", "0"),
        ("ipv6/conf/px0/accept_ra", "0"),
        ("ipv6/conf/px0/accept_dad", "0"),
        ("ipv6/conf/px0/accept_redirects", "0"),
        // A client can reuse its port at once. The connection to the server has the same address and port, so a socket
        // in TIME-WAIT must not block it.
        ("ipv4/tcp_tw_reuse", "1"),
    ] {
        let _ = fs::write(format!("/proc/sys/net/{file}"), value);
    }
    set_no_link_local(px0)?;
    set_up(LOOPBACK)?;
    set_flags(px0, (libc::IFF_NOARP | libc::IFF_UP) as u32)?;
    add_input_rule(false, PROXY_END, TABLE, PRIORITY)?;
    add_local_default(false, TABLE, LOOPBACK)?;
    add_default(GATEWAY_V4, px0)?;
    if !Path::new("/proc/sys/net/ipv6/conf/px0").exists() {
        return Ok(());
    }
    add_input_rule(true, PROXY_END, TABLE, PRIORITY)?;
    add_local_default(true, TABLE, LOOPBACK)?;
    add_default(GATEWAY_V6, px0)
}

/// Returns a new network namespace.
fn new_namespace() -> std::result::Result<OwnedFd, SyscallError> {
    in_thread(|| {
        // SAFETY: unshare takes no pointers, and only the calling thread changes its namespace; the thread ends here.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
            return Err(SyscallError::last("unshare(CLONE_NEWNET)"));
        }
        own_namespace()
    })
}

/// Returns the network namespace of the calling thread.
fn own_namespace() -> std::result::Result<OwnedFd, SyscallError> {
    let path = "/proc/thread-self/ns/net";
    File::open(path)
        .map(OwnedFd::from)
        .map_err(|error| SyscallError::new(format!("open of {path}"), error))
}

/// Runs a closure in a network namespace.
fn in_namespace<T: Send>(
    netns: &OwnedFd,
    run: impl FnOnce() -> std::result::Result<T, SyscallError> + Send,
) -> std::result::Result<T, SyscallError> {
    in_thread(|| {
        // SAFETY: setns takes no pointers, and only the calling thread changes its namespace; the thread ends after
        // `run`.
        if unsafe { libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) } < 0 {
            return Err(SyscallError::last("setns(CLONE_NEWNET)"));
        }
        run()
    })
}

/// Runs a closure in a thread of its own, whose network namespace it can change.
fn in_thread<T: Send>(
    run: impl FnOnce() -> std::result::Result<T, SyscallError> + Send,
) -> std::result::Result<T, SyscallError> {
    thread::scope(|scope| {
        let started = thread::Builder::new()
            .name("palisade-netns".to_owned())
            .spawn_scoped(scope, run);
        started
            .map_err(|error| SyscallError::new("clone of a thread", error))?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn dir(pin_dir: &Path) -> PathBuf {
    pin_dir.join("proxy_link")
}

/// Returns the names of the pins of one direction below `<pin_dir>/proxy_link/`: the programs at ingress and egress of
/// the node's end, and the program of the namespace.
fn pins(direction: Direction) -> [&'static str; 3] {
    match direction {
        Direction::Ingress => ["ingress_tcx_ingress", "ingress_tcx_egress", "ingress_lookup"],
        Direction::Egress => ["egress_tcx_ingress", "egress_tcx_egress", "egress_lookup"],
    }
}

/// Removes the pins, and the veth pairs if they still exist.
pub(crate) fn remove_proxy_links(pin_dir: &Path) -> Result<()> {
    let dir = dir(pin_dir);
    if !dir.is_dir() {
        return Ok(());
    }
    for direction in DIRECTIONS {
        for file in pins(direction) {
            let path = dir.join(file);
            let failed = |source| AttachError::Syscall {
                name: path.display().to_string(),
                source,
            };
            // The veth pair still exists while sockets of the ended daemon close. It is deleted together with its
            // programs, so that it never accepts a packet without them. If this thread is in another network namespace
            // than the veth pair, the pinned interface index can belong to another interface here, so kind and name are
            // compared.
            if file == pins(direction)[0]
                && let Some(pinned) = bpf::get_pinned(&path).map_err(failed)?
            {
                let ifindex = bpf::link_info(pinned.as_fd()).map_err(failed)?.ifindex;
                let is_ours = |link: &Link| {
                    link.kind == "veth"
                        && proxy_link_names("")
                            .iter()
                            .any(|end| link.name.ends_with(end.as_str()))
                };
                if ifindex != 0
                    && link_by_index(ifindex)
                        .map_err(failed)?
                        .as_ref()
                        .is_some_and(is_ours)
                {
                    delete(ifindex).map_err(failed)?;
                }
            }
            unpin(&path)?;
        }
    }
    remove_empty(&dir)
}
