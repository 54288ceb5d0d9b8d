//! A node with a NIC and two workloads, clients and servers in namespaces, and a relay as the proxy.
#![allow(dead_code, reason = "each test file uses a part")]
#![allow(unsafe_code, reason = "socket options that std does not have, and setns")]

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use palisade_abi::{
    Config, DIRECTIONS, Decision, Direction, EndpointState, Inspector, IpcacheEntry, PolicyEntry, PolicyKey,
    ProxiedKey, Reason, identity,
};
use palisade_datapath::{
    Attachment, Datapath, Hook, Limits, Options, ProxiedFlows, ProxyLinks, Role, TcMode, XdpMode,
    monotonic_coarse,
};
use palisade_inspect::{Engine, Rules};
use palisade_model::op::Op;
use palisade_testbed::ns::{Ns, ensure_bpffs, pin_dir};
use palisade_worker::{Handle, Mode, Pool, Setup};
use palisade_xsk::{Config as SocketConfig, Socket};

pub const INGRESS: Direction = Direction::Ingress;
pub const EGRESS: Direction = Direction::Egress;
pub const HOST: u16 = 1;
pub const A: u16 = 2;
pub const B: u16 = 3;
pub const PORT: u16 = 8443;
const MARK: u32 = 0x7a31_55c3;
pub const LINK: &str = "plt";
/// Rule set of the flows that an endpoint's policy intercepts.
pub const RULESET: u32 = 40;
pub const TIMEOUT: Duration = Duration::from_secs(20);
/// Time after which a connection attempt counts as failed: two retransmissions of a SYN.
pub const GIVE_UP: Duration = Duration::from_millis(3_500);

/// A place that connections come from or go to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    Node,
    World,
    A,
    B,
}

impl Place {
    /// Returns the address as others reach the place.
    pub fn address(self, ipv6: bool) -> IpAddr {
        let text = match (self, ipv6) {
            (Self::Node, false) => "10.0.0.1",
            (Self::World, false) => "10.0.0.2",
            (Self::A, false) => "10.0.1.2",
            (Self::B, false) => "10.0.2.2",
            (Self::Node, true) => "fd00::1",
            (Self::World, true) => "fd00::2",
            (Self::A, true) => "fd00:1::2",
            (Self::B, true) => "fd00:2::2",
        };
        text.parse().unwrap()
    }
}

/// A node with a NIC to the world and two workloads.
pub struct World {
    pub node: Ns,
    pub world: Ns,
    pub a: Ns,
    pub b: Ns,
    pub datapath: Datapath,
    pub config: Config,
    pin_dir: std::path::PathBuf,
}

impl World {
    /// `intercepting`: endpoints and directions whose TCP is intercepted; everything else is allowed.
    pub fn new(ingress: Hook, nic: Hook, intercepting: &[(u16, Direction)]) -> Self {
        ensure_bpffs().unwrap();
        let [node, world, a, b] = ["node", "world", "a", "b"].map(|name| Ns::new(name).unwrap());
        let link = |name: &str, other: &Ns, network: &str, prefix: &str| {
            node.ip(&format!(
                "link add {name} type veth peer name eth0 netns {}\n\
                 addr add {network}.1/24 dev {name}\n\
                 addr add {prefix}1/64 dev {name} nodad\n\
                 link set {name} up",
                other.name()
            ))
            .unwrap();
            other
                .ip(&format!(
                    "addr add {network}.2/24 dev eth0\naddr add {prefix}2/64 dev eth0 nodad\n\
                     link set eth0 up\nroute add default via {network}.1\n\
                     route add ::/0 via {prefix}1"
                ))
                .unwrap();
        };
        link("n0", &world, "10.0.0", "fd00::");
        link("va", &a, "10.0.1", "fd00:1::");
        link("vb", &b, "10.0.2", "fd00:2::");
        node.sysctl("ipv4/ip_forward", "1").unwrap();
        node.sysctl("ipv6/conf/all/forwarding", "1").unwrap();
        node.join().unwrap();
        let pin_dir = pin_dir();
        let limits = Limits {
            conntrack_entries: 4096,
            fragment_entries: 64,
            policy_entries: 1024,
            ipcache_entries: 1024,
            prefix_entries: 1024,
            learned_entries: 1024,
            rules: 1024,
            event_ring_bytes: 1 << 16,
        };
        let datapath = Datapath::open(&Options {
            pin_dir: pin_dir.clone(),
            limits,
        })
        .unwrap();
        const SECOND: u64 = 1_000_000_000;
        let config = Config {
            tcp_opening: 60 * SECOND,
            tcp_established: 3600 * SECOND,
            tcp_closing: 10 * SECOND,
            udp: 60 * SECOND,
            other: 30 * SECOND,
            fragment: 5 * SECOND,
            events_per_second: 1000,
            host_endpoint: u32::from(HOST),
            world_ipv4: identity::WORLD,
            world_ipv6: identity::WORLD,
            rules: 1024,
            cookie: 0x1234_5678_9abc_def1,
            mark: MARK,
            worker_timeout: SECOND,
            inspectors: 1 << Inspector::TlsTerminate as u32,
            ..Config::default()
        };
        let made = Self {
            node,
            world,
            a,
            b,
            datapath,
            config,
            pin_dir,
        };
        made.datapath.set_config(&made.config).unwrap();
        made.policy(1, intercepting);
        for (name, role, endpoint, ingress) in [
            ("n0", Role::Host, HOST, nic),
            ("va", Role::Endpoint, A, ingress),
            ("vb", Role::Endpoint, B, ingress),
        ] {
            made.datapath
                .attach(&Attachment {
                    ifindex: made.node.ifindex(name).unwrap(),
                    role,
                    endpoint,
                    ingress,
                    xdp_mode: XdpMode::Native,
                    tc: TcMode::Auto,
                    link: 0,
                    ether_types: [0; palisade_abi::ETHER_TYPES],
                    no_failsafe: false,
                })
                .unwrap();
        }
        made
    }

    /// Puts a policy in force.
    pub fn policy(&self, revision: u32, intercepting: &[(u16, Direction)]) {
        self.put(revision, intercepting, 0);
    }

    /// Puts a policy in force that denies everything to one endpoint.
    pub fn deny(&self, revision: u32, endpoint: u16) {
        self.put(revision, &[], endpoint);
    }

    fn put(&self, revision: u32, intercepting: &[(u16, Direction)], denied: u16) {
        let mut ops = Vec::new();
        for endpoint in [HOST, A, B] {
            let entries = DIRECTIONS.map(|direction| {
                let is_intercepted = intercepting.contains(&(endpoint, direction));
                let key = PolicyKey {
                    policy: u32::from(endpoint) + 16 * revision,
                    identity: identity::ANY,
                    class: 0,
                    direction: direction as u8,
                    zero: 0,
                };
                let entry = PolicyEntry {
                    decision: if is_intercepted {
                        Decision::Inspect
                    } else if endpoint == denied {
                        Decision::Deny
                    } else {
                        Decision::Allow
                    } as u8,
                    flags: 0,
                    inspector: if is_intercepted {
                        Inspector::TlsTerminate as u8
                    } else {
                        0
                    },
                    match_kind: 0,
                    rule: 1,
                    ruleset: if is_intercepted {
                        RULESET + u32::from(endpoint)
                    } else {
                        0
                    },
                };
                (key, entry)
            });
            ops.push(Op::PolicyPut(entries.to_vec()));
        }
        for (place, endpoint) in [(Place::Node, HOST), (Place::A, A), (Place::B, B)] {
            for ipv6 in [false, true] {
                ops.push(Op::AddressPut(
                    place.address(ipv6).into(),
                    IpcacheEntry {
                        identity: identity_of(endpoint),
                        endpoint,
                        flags: 0,
                    },
                ));
            }
        }
        for endpoint in [HOST, A, B] {
            ops.push(Op::EndpointPut(
                endpoint,
                EndpointState {
                    policy: u32::from(endpoint) + 16 * revision,
                    revision,
                    identity: identity_of(endpoint),
                    flags: 0,
                },
            ));
        }
        self.datapath.apply(&ops).unwrap();
    }

    pub fn links(&mut self) -> ProxyLinks {
        let links = self.datapath.proxy_links(LINK, 1500).unwrap();
        self.config.proxy_ifindex = links.ifindexes();
        self.datapath.set_config(&self.config).unwrap();
        links
    }

    /// Makes the punt link and starts a worker, which carries the packets of XDP hooks.
    pub fn worker(&mut self) -> Pool<Rules> {
        let punt_link = self.datapath.punt_link(LINK, 1).unwrap();
        let sockets = Arc::new(self.datapath.socket_map().unwrap());
        let (of_port, of_heartbeat) = (Arc::clone(&sockets), sockets);
        let netns = self.node.clone();
        let (pool, ..) = Pool::start(Setup {
            workers: 1,
            mode: Mode::Poll,
            cookie: self.config.cookie,
            clock: monotonic_coarse,
            max_handoff: 4_096,
            port: Arc::new(move |number| {
                netns.join().map_err(io::Error::other)?;
                let config = SocketConfig {
                    queue: number as u32,
                    ..SocketConfig::new(&format!("{LINK}1"), 0)
                };
                let socket = Socket::new(&config)?;
                of_port
                    .insert_socket(number as u32, socket.as_fd())
                    .map_err(io::Error::other)?;
                Ok((socket, config.frames as usize))
            }),
            engine: Arc::new(|_| Engine::<Handle>::new(&palisade_inspect::Limits::default())),
            heartbeat: Arc::new(move |number, now| of_heartbeat.heartbeat(number as u32, now)),
            rules: Arc::default(),
            max_commits: 16,
            records: 16,
        })
        .unwrap();
        assert!(pool.wait_until_running(TIMEOUT));
        self.config.punt_ifindex = punt_link.ifindex();
        self.config.workers = punt_link.workers();
        self.datapath.set_config(&self.config).unwrap();
        pool
    }

    pub fn ns(&self, place: Place) -> &Ns {
        match place {
            Place::Node => &self.node,
            Place::World => &self.world,
            Place::A => &self.a,
            Place::B => &self.b,
        }
    }

    pub fn listen(&self, place: Place, ipv6: bool) -> TcpListener {
        let address = SocketAddr::new(place.address(ipv6), PORT);
        self.ns(place).enter(|| TcpListener::bind(address)).unwrap()
    }

    pub fn connect(&self, from: Place, to: Place, ipv6: bool) -> io::Result<TcpStream> {
        let address = SocketAddr::new(to.address(ipv6), PORT);
        let stream = self
            .ns(from)
            .enter(|| TcpStream::connect_timeout(&address, GIVE_UP))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        Ok(stream)
    }

    pub fn drops(&self, reason: Reason) -> u64 {
        let counters = self.datapath.counters().reasons().unwrap();
        counters
            .iter()
            .filter(|(found, ..)| *found == reason)
            .map(|(.., counter)| counter.packets)
            .sum()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = palisade_datapath::detach_all(&self.pin_dir);
        palisade_testbed::ns::remove_pins(&self.pin_dir);
    }
}

fn identity_of(endpoint: u16) -> u32 {
    if endpoint == HOST {
        identity::HOST
    } else {
        1000 + u32::from(endpoint)
    }
}

/// A connection that the relay has accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Relayed {
    pub direction: Direction,
    pub client: SocketAddr,
    pub server: SocketAddr,
    pub endpoint: u16,
    pub ruleset: u32,
}

impl Relayed {
    pub fn key(&self) -> ProxiedKey {
        ProxiedKey {
            client: self.client.ip().into(),
            server: self.server.ip().into(),
            client_port: self.client.port(),
            server_port: self.server.port(),
            direction: self.direction,
        }
    }
}

/// A proxy that connects to the server from the client's address and port and copies all bytes.
pub struct Relay {
    seen: Arc<Mutex<Vec<Relayed>>>,
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Relay {
    pub fn start(links: &ProxyLinks, flows: Arc<ProxiedFlows>) -> Self {
        let seen = Arc::<Mutex<Vec<Relayed>>>::default();
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for direction in DIRECTIONS {
            for ipv6 in [false, true] {
                let netns = links.namespaces[direction as usize].try_clone().unwrap();
                let any = if ipv6 { "[::]:2" } else { "0.0.0.0:1" };
                let listener = in_namespace(&netns, || TcpListener::bind(any)).unwrap();
                set_transparent(listener.as_raw_fd(), ipv6);
                listener.set_nonblocking(true).unwrap();
                links.register(direction, ipv6, listener.as_fd()).unwrap();
                let (seen, stop, flows) = (Arc::clone(&seen), Arc::clone(&stop), Arc::clone(&flows));
                threads.push(thread::spawn(move || {
                    enter(&netns);
                    while !stop.load(Ordering::Relaxed) {
                        let Ok((client, client_addr)) = listener.accept() else {
                            thread::sleep(Duration::from_millis(2));
                            continue;
                        };
                        client.set_nonblocking(false).unwrap();
                        let server_addr = client.local_addr().unwrap();
                        let key = ProxiedKey {
                            client: client_addr.ip().into(),
                            server: server_addr.ip().into(),
                            client_port: client_addr.port(),
                            server_port: server_addr.port(),
                            direction,
                        };
                        let flow = flows.find(&key).unwrap();
                        seen.lock().unwrap().push(Relayed {
                            direction,
                            client: client_addr,
                            server: server_addr,
                            endpoint: flow.map_or(0, |flow| flow.request.endpoint),
                            ruleset: flow.map_or(0, |flow| flow.request.ruleset),
                        });
                        thread::spawn(move || relay(client, client_addr, server_addr));
                    }
                }));
            }
        }
        Self { seen, stop, threads }
    }

    /// Returns the connections since the last call.
    pub fn take(&self) -> Vec<Relayed> {
        std::mem::take(&mut *self.seen.lock().unwrap())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn relay(client: TcpStream, client_addr: SocketAddr, server_addr: SocketAddr) {
    let started = Instant::now();
    let server = loop {
        match connect_from(client_addr, server_addr) {
            Ok(server) => break server,
            // The earlier connection of the same ports is still closing.
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && started.elapsed() < TIMEOUT => {
                thread::sleep(Duration::from_millis(2));
            }
            Err(_) => return,
        }
    };
    let (mut client_read, mut server_read) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    let (mut client, mut server) = (client, server);
    let other = thread::spawn(move || {
        let _ = io::copy(&mut server_read, &mut client);
        let _ = client.shutdown(Shutdown::Write);
    });
    let _ = io::copy(&mut client_read, &mut server);
    let _ = server.shutdown(Shutdown::Write);
    let _ = other.join();
}

pub fn set_option(fd: i32, level: i32, option: i32) {
    let on: libc::c_int = 1;
    // SAFETY: `on` is valid for its own size.
    let answer = unsafe {
        libc::setsockopt(
            fd,
            level,
            option,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    assert_eq!(answer, 0, "{}", io::Error::last_os_error());
}

pub fn set_transparent(fd: i32, ipv6: bool) {
    if ipv6 {
        set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT);
    } else {
        set_option(fd, libc::IPPROTO_IP, libc::IP_TRANSPARENT);
    }
}

/// Connects from the address and port of another host.
pub fn connect_from(from: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let family = if to.is_ipv6() {
        libc::AF_INET6
    } else {
        libc::AF_INET
    };
    // SAFETY: socket takes no pointers, and no other value owns the new descriptor.
    let stream = unsafe {
        let fd = libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        TcpStream::from_raw_fd(fd)
    };
    set_transparent(stream.as_raw_fd(), to.is_ipv6());
    set_option(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR);
    for (connects, address) in [(false, from), (true, to)] {
        let (bytes, length) = raw_address(address);
        let at = (&raw const bytes).cast();
        // SAFETY: `bytes` holds a socket address of `length` bytes.
        let answer = unsafe {
            if connects {
                libc::connect(stream.as_raw_fd(), at, length)
            } else {
                libc::bind(stream.as_raw_fd(), at, length)
            }
        };
        if answer < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(stream)
}

fn raw_address(address: SocketAddr) -> (libc::sockaddr_in6, libc::socklen_t) {
    // SAFETY: zero is a valid value of every field of both types.
    let mut out: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
    match address {
        SocketAddr::V6(address) => {
            out.sin6_family = libc::AF_INET6 as u16;
            out.sin6_port = address.port().to_be();
            out.sin6_addr.s6_addr = address.ip().octets();
            (out, size_of::<libc::sockaddr_in6>() as u32)
        }
        SocketAddr::V4(address) => {
            out.sin6_family = libc::AF_INET as u16;
            out.sin6_port = address.port().to_be();
            // `sin_addr` is where IPv6 has the flow information.
            out.sin6_flowinfo = u32::from_ne_bytes(address.ip().octets());
            (out, size_of::<libc::sockaddr_in>() as u32)
        }
    }
}

/// Moves the calling thread into a network namespace.
pub fn enter(netns: &OwnedFd) {
    // SAFETY: setns takes no pointers.
    let answer = unsafe { libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) };
    assert_eq!(answer, 0, "{}", io::Error::last_os_error());
}

pub fn in_namespace<T: Send>(netns: &OwnedFd, run: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            enter(netns);
            run()
        });
        inside.join().unwrap()
    })
}

/// Returns bytes that differ at every offset that a lost or repeated segment could shift.
fn pattern(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

/// Sends `length` bytes each way at the same time and compares them.
pub fn exchange(client: &TcpStream, server: &TcpStream, length: usize) {
    let (up, down) = (pattern(length, 1), pattern(length, 2));
    let write = |mut stream: &TcpStream, bytes: &[u8]| {
        stream.write_all(bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    };
    let read = |mut stream: &TcpStream, expected: &[u8]| {
        let mut got = Vec::with_capacity(expected.len());
        stream.read_to_end(&mut got).unwrap();
        assert!(got == expected, "{} of {} bytes", got.len(), expected.len());
    };
    thread::scope(|scope| {
        scope.spawn(|| write(client, &up));
        scope.spawn(|| write(server, &down));
        scope.spawn(|| read(client, &down));
        scope.spawn(|| read(server, &up));
    });
}

/// Client, server, and where the connection is intercepted.
pub type Case = (Place, Place, &'static [(u16, Direction)]);

pub const CASES: [Case; 10] = [
    (Place::A, Place::World, &[(A, EGRESS)]),
    (Place::A, Place::B, &[(A, EGRESS)]),
    (Place::A, Place::B, &[(A, EGRESS), (B, INGRESS)]),
    (Place::Node, Place::World, &[(HOST, EGRESS)]),
    (Place::World, Place::A, &[(A, INGRESS)]),
    (Place::World, Place::Node, &[(HOST, INGRESS)]),
    (Place::A, Place::Node, &[(A, EGRESS)]),
    (Place::A, Place::Node, &[(HOST, INGRESS)]),
    (Place::Node, Place::A, &[(HOST, EGRESS)]),
    (Place::Node, Place::A, &[(A, INGRESS)]),
];

/// Both ends see the original addresses and ports, whatever intercepts the connection.
pub fn check(world: &World, relay: &Relay, case: Case, ipv6: bool, length: usize) {
    let (from, to, intercepting) = case;
    let listener = world.listen(to, ipv6);
    let client = world
        .connect(from, to, ipv6)
        .unwrap_or_else(|error| panic!("{case:?} IPv6 {ipv6}: {error}"));
    let (server, seen_by_server) = listener.accept().unwrap();
    server.set_read_timeout(Some(TIMEOUT)).unwrap();
    server.set_write_timeout(Some(TIMEOUT)).unwrap();
    let client_addr = client.local_addr().unwrap();
    // To a workload the node uses the address of the workload's network. It is not in the ipcache, as a new address of
    // the node.
    if from != Place::Node || to == Place::World {
        assert_eq!(client_addr.ip(), from.address(ipv6), "{case:?}");
    }
    assert_eq!(seen_by_server, client_addr, "{case:?}");
    let server_addr = SocketAddr::new(to.address(ipv6), PORT);
    assert_eq!(client.peer_addr().unwrap(), server_addr);
    assert_eq!(server.local_addr().unwrap(), server_addr);
    exchange(&client, &server, length);
    let mut expected: Vec<_> = intercepting
        .iter()
        .map(|&(endpoint, direction)| Relayed {
            direction,
            client: client_addr,
            server: server_addr,
            endpoint,
            ruleset: RULESET + u32::from(endpoint),
        })
        .collect();
    let mut got = relay.take();
    expected.sort_by_key(|relayed| relayed.direction);
    got.sort_by_key(|relayed| relayed.direction);
    assert_eq!(got, expected, "{case:?} IPv6 {ipv6}");
}

pub fn flows(world: &World) -> Arc<ProxiedFlows> {
    Arc::new(world.datapath.proxied_flows(HOST).unwrap())
}
