//! An attacker opens as many flows as it can. Connections of other endpoints survive, including idle ones.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use palisade_testbed::{
    Ns,
    daemon::Settings,
    packet,
    topology::{FAMILIES, Family},
};
use palisade_tests::{OPEN, World, world};
use socket2::{Domain, Protocol, Socket, Type};

/// `back` and `front` deny all ingress and allow all egress; `db` allows ingress from everywhere.
const POLICY: &str = "
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: nobody-in}
spec:
  endpointSelector: {matchExpressions: [{key: app, operator: In, values: [back, front]}]}
  ingress: [{}]
";

/// Entries of the conntrack map.
const ROOM: u32 = 4096;
/// Flows of a flood.
const FLOOD: u32 = 3 * ROOM;

fn settings() -> Settings {
    Settings {
        tables: format!("[limits]\nconntrack = {ROOM}\n"),
        ..Settings::default()
    }
}

/// A connection with both of its ends.
struct Pair {
    client: TcpStream,
    server: TcpStream,
}

impl Pair {
    fn open(from: &Ns, to: &Ns, address: SocketAddr) -> Self {
        let listener = to.enter(|| TcpListener::bind(address)).expect("listener");
        let address = listener.local_addr().expect("address");
        let client = from
            .enter(|| TcpStream::connect_timeout(&address, OPEN))
            .expect("connection");
        let (server, _) = listener.accept().expect("accepted");
        Self { client, server }
    }

    /// Sends bytes from the answering side. Without a conntrack entry the packet would be a flow of its own, and the client
    /// denies ingress.
    fn server_speaks(&mut self) -> bool {
        let mut byte = [0];
        self.client.set_read_timeout(Some(OPEN)).expect("timeout");
        self.server.write_all(b"x").expect("write");
        self.client.read_exact(&mut byte).is_ok()
    }
}

/// Sends a datagram from each of many ports to many ports, each of which the other end answers.
fn flood(world: &World, from: &str, to: &str, family: Family, port: u16) {
    let (source, destination) = (world.addr(from, family), world.addr(to, family));
    world.ns(from).enter(|| {
        let address = SocketAddr::new(destination, 0);
        // IPPROTO_RAW: the caller supplies the IP header.
        let protocol = Protocol::from(255);
        let socket = Socket::new(Domain::for_address(address), Type::RAW, Some(protocol)).expect("socket");
        if address.is_ipv6() {
            socket.set_header_included_v6(true).expect("option");
        }
        for flow in 0..FLOOD {
            let datagram = packet::whole_udp(source, destination, 10_000 + flow as u16, port, b"flood");
            socket.send_to(&datagram, &address.into()).expect("datagram");
            // Paced, so that the receiver's queue does not overflow.
            if flow % 64 == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
}

#[test]
fn a_flood_from_a_workload_evicts_no_idle_connection() {
    let world = world();
    let daemon = world
        .daemon(settings(), &[("deny-ingress.yaml", POLICY)])
        .expect("daemon");
    for family in FAMILIES {
        let db = |port| world.at("db", family, port);
        let mut pairs = [
            Pair::open(world.ns("back"), world.ns("db"), db(0)),
            Pair::open(world.ns("back"), world.ns("far"), world.at("far", family, 0)),
            // A connection of the flooding workload.
            Pair::open(world.ns("front"), world.ns("db"), db(0)),
            // A connection of the node.
            Pair::open(world.ns("node"), world.ns("far"), world.at("far", family, 0)),
        ];
        flood(&world, "front", "db", family, 53);
        flood(&world, "front", "far", family, 53);
        let status = daemon.status().expect("status");
        assert!(
            status["conntrack"]["evicted"].as_u64() > Some(u64::from(ROOM)),
            "{status:#}"
        );
        for (n, pair) in pairs.iter_mut().enumerate() {
            assert!(pair.server_speaks(), "{family:?} {n}\n{}", daemon.report());
        }
    }
}

#[test]
fn a_flood_to_a_workload_and_the_node_evicts_no_idle_connection() {
    let world = world();
    let daemon = world
        .daemon(settings(), &[("deny-ingress.yaml", POLICY)])
        .expect("daemon");
    for family in FAMILIES {
        let mut pairs = [
            Pair::open(world.ns("db"), world.ns("far"), world.at("far", family, 0)),
            Pair::open(world.ns("far"), world.ns("db"), world.at("db", family, 0)),
            Pair::open(world.ns("back"), world.ns("far"), world.at("far", family, 0)),
            Pair::open(world.ns("far"), world.ns("node"), world.at("node", family, 0)),
        ];
        flood(&world, "far", "db", family, 53);
        flood(&world, "far", "node", family, 53);
        for (n, pair) in pairs.iter_mut().enumerate() {
            assert!(pair.server_speaks(), "{family:?} {n}\n{}", daemon.report());
        }
        // Another workload can still open connections.
        let mut pair = Pair::open(world.ns("back"), world.ns("far"), world.at("far", family, 0));
        assert!(pair.server_speaks());
    }
}

#[test]
fn protected_flows_survive_a_restart_and_a_resized_map() {
    let world = world();
    let mut daemon = world
        .daemon(settings(), &[("deny-ingress.yaml", POLICY)])
        .expect("daemon");
    let mut pairs =
        FAMILIES.map(|family| Pair::open(world.ns("back"), world.ns("db"), world.at("db", family, 0)));
    daemon.restart().expect("restart");
    flood(&world, "front", "db", Family::V4, 53);
    let larger = Settings {
        tables: format!("[limits]\nconntrack = {}\n", 2 * ROOM),
        ..Settings::default()
    };
    daemon
        .configure(&world.topology, &palisade_tests::with_peers(larger))
        .expect("configuration");
    daemon.restart().expect("restart");
    flood(&world, "front", "db", Family::V4, 53);
    flood(&world, "front", "db", Family::V6, 53);
    for pair in &mut pairs {
        assert!(pair.server_speaks(), "{}", daemon.report());
    }
    let status = daemon.status().expect("status");
    assert_eq!(
        status["conntrack"]["capacity"].as_u64(),
        Some(u64::from(2 * ROOM))
    );
    assert!(status["conntrack"]["protected"].as_u64() >= Some(2), "{status:#}");
}
