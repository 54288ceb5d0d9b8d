//! Forged socket lists: conntrack is seeded from the kernel's tables, some of which workloads and unprivileged users can
//! fill.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::UdpSocket,
    process::{Child, ChildStdin, Stdio},
    time::Duration,
};

use palisade_testbed::{
    Outcome,
    daemon::Settings,
    ns::Ns,
    probe::{exchange, open},
    topology::{FAMILIES, Family},
};
use palisade_tests::{CLOSED, OPEN, world};

/// The node allows all ingress, and egress only to port 443; `back` denies ingress and allows all egress.
const ONE_WAY: &str = "
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {}
  ingress:
  - fromEntities: [all]
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{port: \"443\", protocol: ANY}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: back}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - {}
";

/// Connects a UDP socket. As `ordinary-user-called`, drops root and binds a second socket to the same local port, which
/// looks like a server's socket in the socket list. As `root-calls`, a client's socket. Sends one datagram to the peer for
/// each line of its input.
const SOCKETS: &str = r#"
import os, socket, sys
local, remote = sys.argv[1], sys.argv[2]
family = socket.AF_INET6 if ":" in local else socket.AF_INET
role = sys.argv[5]
if role == "ordinary-user-called":
    os.setgid(65534); os.setuid(65534)
def bound():
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind((local, int(sys.argv[3])))
    return s
idle = bound() if role == "ordinary-user-called" else None
connected = bound()
connected.connect((remote, int(sys.argv[4])))
print("ready", flush=True)
for _ in sys.stdin:
    try:
        connected.send(b"palisade")
    except OSError:
        pass
"#;

const LOCAL_PORT: u16 = 5000;
const REMOTE_PORT: u16 = 5300;

/// The Python program in a namespace.
struct Sockets {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Sockets {
    fn new(ns: &Ns, local: &str, remote: &str, role: &str) -> Self {
        let mut command = ns.command("python3");
        command.args([
            "-c",
            SOCKETS,
            local,
            remote,
            &LOCAL_PORT.to_string(),
            &REMOTE_PORT.to_string(),
        ]);
        command.arg(role).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("python3");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("stdout");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n");
        let stdin = child.stdin.take();
        Self { child, stdin }
    }

    fn send(&mut self) {
        writeln!(self.stdin.as_mut().expect("stdin")).expect("a request to send");
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        // The end of its input ends the program.
        self.stdin.take();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn receiver(ns: &Ns, address: &str, port: u16) -> UdpSocket {
    let socket = ns
        .enter(|| UdpSocket::bind((address, port)))
        .expect("a UDP socket");
    socket.set_read_timeout(Some(CLOSED)).expect("a timeout");
    socket
}

fn receives(socket: &UdpSocket) -> bool {
    socket.recv(&mut [0; 64]).is_ok()
}

#[test]
fn two_udp_sockets_of_an_ordinary_user_do_not_open_the_nodes_egress() {
    let world = world();
    let mut attempts: Vec<_> = FAMILIES
        .iter()
        .map(|&family| {
            let (node, far) = (
                world.addr("node", family).to_string(),
                world.addr("far", family).to_string(),
            );
            let receiver = receiver(world.ns("far"), &far, REMOTE_PORT);
            let mut sockets = Sockets::new(world.ns("node"), &node, &far, "ordinary-user-called");
            // The first datagrams may be lost during neighbour resolution.
            let arrives = (0..10).any(|_| {
                sockets.send();
                receives(&receiver)
            });
            assert!(arrives, "{family:?}: without a firewall the datagram arrives");
            // Datagrams that waited for the resolution must not count below.
            while receives(&receiver) {}
            (family, receiver, sockets)
        })
        .collect();
    let daemon = world
        .daemon(Settings::default(), &[("one-way.yaml", ONE_WAY)])
        .expect("daemon");
    for (family, receiver, sockets) in &mut attempts {
        sockets.send();
        assert!(!receives(receiver), "{family:?}\n{}", daemon.report());
    }
}

#[test]
fn sockets_with_another_workloads_address_do_not_open_that_workloads_ingress() {
    let world = world();
    let mut sockets = Vec::new();
    for family in FAMILIES {
        let (back, far) = (
            world.addr("back", family).to_string(),
            world.addr("far", family).to_string(),
        );
        let length = if family == Family::V4 { 32 } else { 128 };
        // Root in `front` adds the address of `back` to its loopback interface and connects from it to `far`.
        let nodad = if family == Family::V6 { " nodad" } else { "" };
        world
            .ns("front")
            .ip(&format!("addr add {back}/{length} dev lo{nodad}"))
            .expect("an address on the loopback");
        sockets.push(Sockets::new(world.ns("front"), &back, &far, "root-calls"));
    }
    let daemon = world
        .daemon(Settings::default(), &[("one-way.yaml", ONE_WAY)])
        .expect("daemon");
    for family in FAMILIES {
        let (back, far) = (
            world.addr("back", family).to_string(),
            world.addr("far", family).to_string(),
        );
        let receiver = receiver(world.ns("back"), &back, LOCAL_PORT);
        let sender = world
            .ns("far")
            .enter(|| UdpSocket::bind((far.as_str(), REMOTE_PORT)))
            .expect("a UDP socket");
        sender
            .send_to(b"palisade", (back.as_str(), LOCAL_PORT))
            .expect("a datagram");
        assert!(!receives(&receiver), "{family:?}\n{}", daemon.report());
    }
}

#[test]
fn conntrack_is_seeded_at_the_first_start_only() {
    let world = world();
    let mut daemon = world
        .daemon(Settings::default(), &[("one-way.yaml", ONE_WAY)])
        .expect("daemon");
    let seeded = |daemon: &palisade_testbed::Daemon| {
        daemon.status().expect("status")["conntrack"]["seeded"]
            .as_u64()
            .expect("a number")
    };
    let before = seeded(&daemon);
    let mut streams: Vec<_> = FAMILIES
        .iter()
        .map(|&family| open(world.ns("back"), None, world.at("far", family, 443), OPEN).expect("connection"))
        .collect();
    daemon.kill9().expect("kill -9");
    // The pinned programs decide on a connection that begins while no daemon runs.
    for &family in FAMILIES.iter() {
        streams.push(open(world.ns("back"), None, world.at("far", family, 80), OPEN).expect("connection"));
    }
    daemon.restart().expect("restart");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(seeded(&daemon), before);
    for stream in &mut streams {
        assert_eq!(exchange(stream, OPEN), Outcome::Open, "{}", daemon.report());
    }
}
