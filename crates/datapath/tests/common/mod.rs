//! A node with one veth pair in its own namespaces, and the minimal maps for its packets to pass.
#![allow(dead_code, reason = "each test file uses a part")]

use std::{
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Stdio},
};

use palisade_abi::{
    Addr, Config, Decision, EndpointState, Interface, IpcacheEntry, PolicyEntry, PolicyKey, identity,
};
use palisade_datapath::{
    Attachment, Connection, Datapath, End, Hook, HookKind, Limits, LocalEndpoints, Options, Progress, Role,
    TcMode, XdpMode,
};
use palisade_model::op::Op;
use palisade_testbed::ns::{Ns, ensure_bpffs, pin_dir};

pub const HOST_ENDPOINT: u16 = 1;
pub const WORKLOAD: u16 = 2;
pub const NODE_ADDR: [u8; 4] = [10, 0, 0, 1];
pub const PEER_ADDR: [u8; 4] = [10, 0, 0, 2];

/// Namespaces `node`, with `v0`, and `peer`, with its other end `eth0`. The calling thread is in `node`.
pub struct World {
    pub node: Ns,
    pub peer: Ns,
    pub options: Options,
}

impl World {
    pub fn new() -> Self {
        ensure_bpffs().unwrap();
        let node = Ns::new("node").unwrap();
        let peer = Ns::new("peer").unwrap();
        node.ip(&format!(
            "link add v0 type veth peer name eth0 netns {}\naddr add 10.0.0.1/24 dev v0\nlink set v0 up",
            peer.name()
        ))
        .unwrap();
        peer.ip("addr add 10.0.0.2/24 dev eth0\nlink set eth0 up")
            .unwrap();
        node.join().unwrap();
        // Small maps, since many tests run at the same time.
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
        Self {
            node,
            peer,
            options: Options {
                pin_dir: pin_dir(),
                limits,
            },
        }
    }

    /// Returns the same options for another daemon.
    pub fn beside(&self) -> Self {
        let options = Options {
            pin_dir: pin_dir(),
            ..self.options.clone()
        };
        Self {
            node: self.node.clone(),
            peer: self.peer.clone(),
            options,
        }
    }

    /// Returns a data path whose maps a later one finds.
    pub fn open(&self) -> Datapath {
        let datapath = Datapath::open(&self.options).unwrap();
        datapath.commit().unwrap();
        datapath
    }

    /// Returns a data path that allows or denies everything at a veth of this role.
    pub fn open_with(&self, role: Role, decision: Decision) -> Datapath {
        let datapath = self.open();
        datapath.set_config(&config()).unwrap();
        datapath.apply(&whole_policy(1, role, decision)).unwrap();
        datapath
    }

    pub fn ifindex(&self) -> u32 {
        self.node.ifindex("v0").unwrap()
    }

    pub fn attachment(&self, role: Role, ingress: Hook, tc: TcMode) -> Attachment {
        Attachment {
            ifindex: self.ifindex(),
            role,
            endpoint: if role == Role::Host {
                HOST_ENDPOINT
            } else {
                WORKLOAD
            },
            ingress,
            xdp_mode: XdpMode::Native,
            tc,
            link: 0,
            ether_types: [0; palisade_abi::ETHER_TYPES],
            no_failsafe: false,
        }
    }

    /// Returns the loss in percent of `count` packets from the peer to the node, one every two milliseconds.
    pub fn start_pings(&self, count: u32) -> Pings {
        let child = self
            .peer
            .command("ping")
            .args([
                "-q",
                "-n",
                "-i",
                "0.002",
                "-W",
                "1",
                "-c",
                &count.to_string(),
                "10.0.0.1",
            ])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Pings(child)
    }

    pub fn lost(&self, count: u32) -> u32 {
        self.start_pings(count).lost()
    }

    pub fn tc_show(&self, what: &str) -> String {
        self.node.run("tc", &[what, "show", "dev", "v0"]).unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The kernel detaches the programs of deleted interfaces; this removes the pins, also after a failed test.
        let _ = palisade_datapath::detach_all(&self.options.pin_dir);
        palisade_testbed::ns::remove_pins(&self.options.pin_dir);
    }
}

pub struct Pings(Child);

impl Pings {
    /// Number of packets without a reply.
    pub fn lost(self) -> u32 {
        let out = self.0.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let number = |word: &str| {
            let before = text.split(word).next().unwrap();
            before.rsplit(char::is_whitespace).next()?.parse::<u32>().ok()
        };
        match (number(" packets transmitted"), number(" received")) {
            (Some(sent), Some(received)) => sent - received,
            _ => panic!("{text}"),
        }
    }

    pub fn running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

pub fn config() -> Config {
    const SECOND: u64 = 1_000_000_000;
    Config {
        tcp_opening: 30 * SECOND,
        tcp_established: 8 * 3600 * SECOND,
        tcp_closing: 10 * SECOND,
        udp: 60 * SECOND,
        other: 30 * SECOND,
        fragment: 30 * SECOND,
        trace_interval: 5 * SECOND,
        events_per_second: 1000,
        host_endpoint: u32::from(HOST_ENDPOINT),
        world_ipv4: identity::WORLD,
        world_ipv6: identity::WORLD,
        rules: 1024,
        ..Config::default()
    }
}

/// One policy for all endpoints, and the node and the peer under it: the peer is a workload if the veth has that role,
/// else a foreign host.
pub fn whole_policy(policy: u32, role: Role, decision: Decision) -> Vec<Op> {
    let entry = PolicyEntry {
        decision: decision as u8,
        flags: 0,
        inspector: 0,
        match_kind: 0,
        rule: 1,
        ruleset: 0,
    };
    let entries = [0, 1]
        .map(|direction| {
            (
                PolicyKey {
                    policy,
                    identity: 0,
                    class: 0,
                    direction,
                    zero: 0,
                },
                entry,
            )
        })
        .to_vec();
    let address = |addr, identity, endpoint| {
        Op::AddressPut(
            Addr::from_v4(addr),
            IpcacheEntry {
                identity,
                endpoint,
                flags: 0,
            },
        )
    };
    let endpoint = |id, identity| {
        Op::EndpointPut(
            id,
            EndpointState {
                policy,
                revision: policy,
                identity,
                flags: 0,
            },
        )
    };
    vec![
        Op::PolicyPut(entries),
        address(NODE_ADDR, identity::HOST, HOST_ENDPOINT),
        address(PEER_ADDR, 256, if role == Role::Endpoint { WORKLOAD } else { 0 }),
        endpoint(HOST_ENDPOINT, identity::HOST),
        endpoint(WORKLOAD, 256),
    ]
}

pub fn interface(ifindex: u32, endpoint: u16, role: u8) -> Interface {
    Interface {
        ifindex,
        endpoint,
        role,
        link: ifindex,
        ..Interface::default()
    }
}

pub fn pins_below(dir: &std::path::Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(pins_below(&path));
        }
        found.push(path);
    }
    found
}

pub fn end(addr: [u8; 4], port: u16) -> End {
    End {
        addr: Addr::from_v4(addr),
        port,
    }
}

pub fn endpoints() -> LocalEndpoints {
    let addresses = [(Addr::from_v4(NODE_ADDR), HOST_ENDPOINT)].into_iter().collect();
    LocalEndpoints {
        addresses,
        host: HOST_ENDPOINT,
    }
}

/// A connection that the peer has opened to the node, and one that the node has opened to the peer.
pub struct Live {
    pub incoming: (TcpStream, TcpStream),
    pub outgoing: (TcpStream, TcpStream),
    _listeners: [TcpListener; 2],
}

impl Live {
    pub fn new(world: &World) -> Self {
        let here = TcpListener::bind("10.0.0.1:8080").unwrap();
        let client = world.peer.enter(|| TcpStream::connect("10.0.0.1:8080")).unwrap();
        let (server, _) = here.accept().unwrap();
        let there = world.peer.enter(|| TcpListener::bind("10.0.0.2:9090")).unwrap();
        let outgoing = TcpStream::connect("10.0.0.2:9090").unwrap();
        let (remote, _) = there.accept().unwrap();
        Self {
            incoming: (server, client),
            outgoing: (outgoing, remote),
            _listeners: [here, there],
        }
    }

    pub fn expected(&self) -> [Connection; 2] {
        let tcp = |opener, responder| Connection {
            opener,
            responder,
            progress: Progress::Established,
        };
        let client_port = self.incoming.1.local_addr().unwrap().port();
        let own_port = self.outgoing.0.local_addr().unwrap().port();
        [
            tcp(end(PEER_ADDR, client_port), end(NODE_ADDR, 8080)),
            tcp(end(NODE_ADDR, own_port), end(PEER_ADDR, 9090)),
        ]
    }
}

/// Wanted mode and expected result.
pub type Case = (Role, Hook, XdpMode, TcMode, HookKind, HookKind);

pub const CASES: [Case; 7] = [
    (
        Role::Host,
        Hook::Auto,
        XdpMode::Native,
        TcMode::Auto,
        HookKind::XdpNative,
        HookKind::Tcx,
    ),
    (
        Role::Endpoint,
        Hook::Auto,
        XdpMode::Native,
        TcMode::Auto,
        HookKind::Tcx,
        HookKind::Tcx,
    ),
    (
        Role::Endpoint,
        Hook::Auto,
        XdpMode::Native,
        TcMode::Clsact,
        HookKind::Clsact,
        HookKind::Clsact,
    ),
    (
        Role::Endpoint,
        Hook::Xdp,
        XdpMode::Native,
        TcMode::Clsact,
        HookKind::XdpNative,
        HookKind::Clsact,
    ),
    (
        Role::Host,
        Hook::Xdp,
        XdpMode::Generic,
        TcMode::Tcx,
        HookKind::XdpGeneric,
        HookKind::Tcx,
    ),
    (
        Role::Host,
        Hook::Xdp,
        XdpMode::NativeOrGeneric,
        TcMode::Tcx,
        HookKind::XdpNative,
        HookKind::Tcx,
    ),
    (
        Role::Host,
        Hook::Tc,
        XdpMode::Native,
        TcMode::Tcx,
        HookKind::Tcx,
        HookKind::Tcx,
    ),
];

pub fn attachment(world: &World, &(role, ingress, xdp_mode, tc, _, _): &Case) -> Attachment {
    Attachment {
        xdp_mode,
        ..world.attachment(role, ingress, tc)
    }
}
