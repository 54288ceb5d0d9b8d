//! Failsafe ports: an operator keeps access to the node whatever the policy says, and nothing else is open.

use std::{
    fs,
    net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use palisade_testbed::{
    Daemon, Ns, Outcome,
    capture::Capture,
    daemon::Settings,
    packet::{self, Packet},
    probe::{connect as connects, exchange, open, send_ip, udp},
    server::{Echo, Program},
    topology::{FAMILIES, INNER, NIC},
};
use palisade_tests::{CLOSED as SHORT, OPEN, TCP, UDP, World, flows, with_peers, world};
use serde_json::Value;

/// The node denies everything, by default and by deny rules.
const CLOSED: &str = "
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {}
  ingress:
  - {}
  ingressDeny:
  - fromEntities: [all]
  egress:
  - {}
  egressDeny:
  - toEntities: [all]
";

fn settings(failsafe: &str) -> Settings {
    Settings {
        tables: format!("[failsafe]\n{failsafe}\n"),
        ..Settings::default()
    }
}

const LISTS: &str = "inbound = [\n  \"tcp/22\",\n  \"tcp/443 from 203.0.113.10,2001:db8:a::10\",\n  \
    \"tcp/81 from 192.0.2.0/24,2001:db8:c::/48\",\n]\noutbound = [\"udp/53\"]";

fn connect(world: &World, from: &str, to: &str, port: u16) -> Vec<TcpStream> {
    FAMILIES
        .map(|family| {
            let to = world.at(to, family, port);
            let mut stream = open(world.ns(from), None, to, OPEN).expect("connection");
            assert_eq!(exchange(&mut stream, OPEN), Outcome::Open);
            stream
        })
        .into()
}

fn all_answer(streams: &mut [TcpStream], daemon: &Daemon) {
    for stream in streams {
        assert_eq!(exchange(stream, OPEN), Outcome::Open, "{}", daemon.report());
    }
}

fn texts(list: &Value) -> Vec<String> {
    let list = list.as_array();
    let texts = list.into_iter().flatten().filter_map(Value::as_str);
    texts.map(str::to_owned).collect()
}

const EXPECTED: &str = "far -> node tcp/22 open
     near -> node tcp/22 open
     far -> node tcp/80 drop
     far -> node udp/53 drop
     far -> node tcp/443 open
     near -> node tcp/443 drop
     remote-db -> node tcp/81 open
     node2 -> node tcp/81 open
     far -> node tcp/81 drop
     node -> far udp/53 open
     node -> far udp/80 drop
     node -> far tcp/22 drop
     front -> node tcp/22 drop
     node -> front udp/53 drop";

#[test]
fn a_node_that_denies_everything_stays_reachable_by_its_failsafe_ports_only() {
    let world = world();
    let mut sessions = connect(&world, "far", "node", 22);
    let _cut = connect(&world, "far", "node", 80);
    let mut daemon = world.daemon(settings(LISTS), &[]).expect("daemon");
    daemon.apply(&[("node.yaml", CLOSED)]).expect("apply");
    all_answer(&mut sessions, &daemon);
    world.expect(&daemon, EXPECTED);
    let log = daemon.log();
    let line = log.lines().find(|line| line.contains("that are established"));
    let line = line.unwrap_or_else(|| panic!("{log}"));
    assert!(line.contains(":80 by ") && !line.contains(":22 by "), "{line}");
    flows::expect(&daemon, &world, ("far", "node"), 22, "FORWARDED", None);
    let flow = daemon
        .flows(&["--to-port", "22", "--verdict", "FORWARDED", "--last", "50"])
        .expect("flows");
    let text = serde_json::to_string(&flow).expect("json");
    assert!(text.contains("failsafe tcp/22 inbound"), "{text}");

    let rows = daemon.json(&["bpf", "policy", "get", "host"]).expect("rows");
    let rows = rows.as_array().expect("rows");
    let row = rows
        .iter()
        .find(|row| row["decided_by"].to_string().contains("failsafe tcp/22 inbound"));
    let row = row.expect("the entry of the failsafe port");
    assert!(row["packets"].as_u64() > Some(0), "{row}");

    let status = daemon.status().expect("status");
    let notes = texts(&status["notes"]);
    assert!(
        notes
            .iter()
            .any(|text| text.contains("node.yaml:") && text.contains("failsafe tcp/22 inbound")),
        "{notes:?}"
    );
    let traced = daemon
        .cli(&[
            "policy",
            "trace",
            "--from",
            "203.0.113.10",
            "--to",
            "host",
            "--port",
            "22",
        ])
        .expect("trace");
    assert!(
        traced.contains("ALLOWED (a failsafe port of the node"),
        "{traced}"
    );
    assert!(traced.contains("failsafe tcp/22 inbound"), "{traced}");

    // A daemon that dies or starts again changes nothing.
    daemon.kill9().expect("kill");
    all_answer(&mut sessions, &daemon);
    world.expect(
        &daemon,
        "far -> node tcp/22 open\n far -> node tcp/80 drop\n front -> node tcp/22 drop",
    );
    daemon.restart().expect("restart");
    all_answer(&mut sessions, &daemon);
    world.expect(&daemon, EXPECTED);
}

#[test]
fn a_reload_opens_and_closes_failsafe_ports() {
    let world = world();
    let daemon = world
        .daemon(settings("inbound = []"), &[("node.yaml", CLOSED)])
        .expect("daemon");
    world.expect(&daemon, "far -> node tcp/22 drop");
    let status = daemon.status().expect("status");
    assert!(
        texts(&status["warnings"])
            .iter()
            .any(|text| text.contains("no TCP connection from outside can reach this node")),
        "{status}"
    );
    daemon
        .configure(&world.topology, &with_peers(settings("inbound = [\"tcp/22\"]")))
        .expect("configure");
    daemon.cli(&["reload"]).expect("reload");
    world.expect(
        &daemon,
        "far -> node tcp/22 open\n far -> node tcp/80 drop\n front -> node tcp/22 drop",
    );
    daemon
        .configure(&world.topology, &with_peers(settings("inbound = []")))
        .expect("configure");
    daemon.cli(&["reload"]).expect("reload");
    world.expect(&daemon, "far -> node tcp/22 drop");
}

#[test]
fn failsafe_ports_hold_under_enforcement_always_and_are_not_needed_without_enforcement() {
    let world = world();
    let daemon = world
        .daemon(
            Settings {
                enforcement: "always",
                ..settings(LISTS)
            },
            &[],
        )
        .expect("daemon");
    world.expect(&daemon, EXPECTED);
}

/// A host that the node reaches by a second NIC `nic1`. Addresses of node and host are IPv4, then IPv6.
struct Lan {
    ns: Ns,
    node: [IpAddr; 2],
    peer: [IpAddr; 2],
    _echo: [Echo; 2],
}

fn lan(world: &World) -> Lan {
    let ns = Ns::new("lan").expect("namespace");
    let node: [IpAddr; 2] = ["198.18.0.1", "fd00:18::1"].map(|text| text.parse().expect("address"));
    let peer: [IpAddr; 2] = ["198.18.0.2", "fd00:18::2"].map(|text| text.parse().expect("address"));
    let addresses = |[v4, v6]: [IpAddr; 2], device: &str| {
        format!("addr add {v4}/24 dev {device}\naddr add {v6}/64 dev {device} nodad\nlink set {device} up\n")
    };
    let link = format!("link add nic1 type veth peer name {INNER} netns {}\n", ns.name());
    let node_ns = &world.topology.node;
    node_ns.ip(&(link + &addresses(node, "nic1"))).expect("link");
    ns.ip(&addresses(peer, INNER)).expect("addresses");
    let at_node = Echo::start(node_ns, &node, TCP, UDP).expect("echo");
    let at_peer = Echo::start(&ns, &peer, TCP, UDP).expect("echo");
    Lan {
        ns,
        node,
        peer,
        _echo: [at_node, at_peer],
    }
}

/// Opens failsafe ports at NICs that `interfaces`, a line of `[failsafe]`, names.
fn with_nics(interfaces: &str) -> Settings {
    Settings {
        tables: format!(
            "[failsafe]\ninbound = [\"tcp/22\"]\noutbound = [\"udp/53\"]\n{interfaces}\n[[interface]]\nname = \"nic1\"\n"
        ),
        ..Settings::default()
    }
}

/// Returns a thread that sends and receives on a connection without a pause. The thread returns whether the connection
/// still passes after `end`, or false once an answer is missing.
fn busy(mut session: TcpStream, end: &Arc<AtomicBool>) -> JoinHandle<bool> {
    let end = Arc::clone(end);
    thread::spawn(move || {
        loop {
            let is_last = end.load(Ordering::SeqCst);
            if exchange(&mut session, SHORT) != Outcome::Open {
                return false;
            }
            if is_last {
                return true;
            }
        }
    })
}

#[test]
fn busy_connections_end_when_their_interface_is_closed_to_failsafe_ports() {
    let world = world();
    let lan = lan(&world);
    let mut daemon = world
        .daemon(with_nics("interfaces = [\"nic*\"]"), &[("node.yaml", CLOSED)])
        .expect("daemon");
    let configure = |daemon: &Daemon, interfaces: &str| {
        daemon
            .configure(&world.topology, &with_peers(with_nics(interfaces)))
            .expect("configure");
    };
    for round in ["reload", "reload", "reload", "restart"] {
        configure(&daemon, "interfaces = [\"nic*\"]");
        daemon.cli(&["reload"]).expect("reload");
        let end = Arc::new(AtomicBool::new(false));
        let threads: Vec<JoinHandle<bool>> = (0..4)
            .map(|number| {
                let to = SocketAddr::new(lan.node[number % 2], 22);
                busy(open(&lan.ns, None, to, OPEN).expect("connection"), &end)
            })
            .collect();
        configure(&daemon, "interfaces = [\"nic0\"]");
        match round {
            // The connections are those of this process, from which the command is called, so it asks for --force.
            "reload" => drop(daemon.cli(&["reload", "--force"]).expect("reload")),
            _ => {
                daemon.kill9().expect("kill");
                daemon.restart().expect("restart");
            }
        }
        end.store(true, Ordering::SeqCst);
        for thread in threads {
            assert!(!thread.join().expect("thread"), "{round}\n{}", daemon.report());
        }
    }
}

#[test]
fn failsafe_ports_pass_only_at_the_interfaces_that_the_configuration_names() {
    let world = world();
    let lan = lan(&world);
    let (node, peer, node_ns) = (lan.node, lan.peer, &world.topology.node);
    let (lan, with) = (&lan.ns, with_nics);
    let daemon = world
        .daemon(with("interfaces = [\"nic1\"]"), &[("node.yaml", CLOSED)])
        .expect("daemon");
    let lan_passes = |expected: bool, daemon: &Daemon| {
        let wait = if expected { OPEN } else { SHORT };
        for (own, other) in node.into_iter().zip(peer) {
            let inbound = connects(lan, SocketAddr::new(own, 22), wait) == Outcome::Open;
            let outbound = udp(node_ns, None, SocketAddr::new(other, 53), 8, wait) == Outcome::Open;
            assert_eq!(
                (inbound, outbound),
                (expected, expected),
                "{own}\n{}",
                daemon.report()
            );
            let denied = connects(lan, SocketAddr::new(own, 80), SHORT);
            assert_ne!(denied, Outcome::Open, "{}", daemon.report());
        }
    };
    lan_passes(true, &daemon);
    world.expect(
        &daemon,
        "far -> node tcp/22 drop\n node -> far udp/53 drop\n front -> node tcp/22 drop",
    );
    let notes = texts(&daemon.status().expect("status")["notes"]);
    assert!(
        notes
            .iter()
            .any(|text| text.contains("failsafe tcp/22 inbound at nic1 passes although")),
        "{notes:?}"
    );
    let policies = daemon.policies().display().to_string();
    let validated = daemon.cli(&["policy", "validate", &policies]).expect("validate");
    assert!(
        validated.contains("failsafe tcp/22 inbound at nic1"),
        "{validated}"
    );

    // A reload moves them to the other interface, and the connection that they had allowed gets no more packets.
    let mut session = open(lan, None, SocketAddr::new(node[0], 22), OPEN).expect("connection");
    assert_eq!(exchange(&mut session, OPEN), Outcome::Open);
    let reload = |interfaces: &str| {
        daemon
            .configure(&world.topology, &with_peers(with(interfaces)))
            .and_then(|()| daemon.cli(&["reload", "--force"]))
            .expect("reload");
    };
    // The test, a parent process of the command, has the connection, so the command is refused without `--force`.
    let nic0 = "interfaces = [\"nic0\"]";
    daemon
        .configure(&world.topology, &with_peers(with(nic0)))
        .expect("configuration");
    let refused = daemon
        .cli(&["reload"])
        .expect_err("a reload that ends the session");
    assert!(
        format!("{refused:#}").contains("DENY YOUR OWN SESSION"),
        "{refused:#}"
    );
    assert_eq!(exchange(&mut session, OPEN), Outcome::Open);
    reload(nic0);
    assert_ne!(
        exchange(&mut session, SHORT),
        Outcome::Open,
        "{}",
        daemon.report()
    );
    lan_passes(false, &daemon);
    world.expect(&daemon, "far -> node tcp/22 open\n node -> far udp/53 open");
    reload("interfaces = [\"nic*\"]");
    lan_passes(true, &daemon);
    world.expect(&daemon, "far -> node tcp/22 open\n node -> far udp/53 open");
}

/// Adds a line to `[node]`.
fn set_node(daemon: &Daemon, line: &str) {
    let text = fs::read_to_string(daemon.config()).expect("configuration");
    let text = text.replacen("[node]\n", &format!("[node]\n{line}\n"), 1);
    fs::write(daemon.config(), text).expect("configuration");
}

#[test]
fn failsafe_ports_hold_if_the_node_is_closed_because_its_policies_cannot_be_read() {
    let world = world();
    let broken = "apiVersion: cilium.io/v2\nkind: [\n";
    let mut daemon = Daemon::prepare(
        &world.topology,
        &with_peers(settings(LISTS)),
        &[("node.yaml", broken)],
    )
    .expect("daemon");
    set_node(&daemon, "on_failure = \"closed\"");
    daemon.spawn().expect("spawn");
    daemon
        .wait_status("status reports the policy", |status| {
            texts(&status["missing"])
                .iter()
                .any(|text| text.contains("node.yaml"))
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.log()));
    world.expect(&daemon, EXPECTED);
}

#[test]
fn failsafe_ports_of_the_last_good_configuration_hold_while_the_file_is_broken() {
    let world = world();
    let mut daemon = world
        .daemon(settings(LISTS), &[("node.yaml", CLOSED)])
        .expect("daemon");
    let mut sessions = connect(&world, "far", "node", 22);
    let text = fs::read_to_string(daemon.config()).expect("configuration");
    // What the broken file says about ports does not count either.
    let broken = text.replace("\"tcp/22\"", "\"tcp/80\"") + "\n[failsafe]\ninbound = [\n";
    fs::write(daemon.config(), broken).expect("configuration");
    assert!(daemon.cli(&["reload"]).is_err());
    all_answer(&mut sessions, &daemon);
    world.expect(&daemon, EXPECTED);
    daemon.kill9().expect("kill");
    daemon.restart().expect("restart");
    all_answer(&mut sessions, &daemon);
    world.expect(&daemon, EXPECTED);
}

#[test]
fn fragments_of_a_flow_by_a_failsafe_port_pass_and_others_do_not() {
    let world = world();
    let lists = "inbound = [\"udp/53\"]\noutbound = [\"udp/80\"]";
    let daemon = world
        .daemon(settings(lists), &[("node.yaml", CLOSED)])
        .expect("daemon");
    // The answer has as many bytes, so later fragments pass in both directions.
    world.expect(
        &daemon,
        "far -> node udp/53/4000 open
         far -> node udp/80/4000 drop
         node -> far udp/80/4000 open
         node -> far udp/53/4000 drop",
    );
    // A later fragment without a first one shows no port.
    for family in FAMILIES {
        let (source, destination) = (world.addr("far", family), world.addr("node", family));
        let capture = Capture::start(&world.topology.node, NIC).expect("capture");
        let lone = packet::later_fragment(source, destination, 0x7001, 1480, &[7; 64]);
        send_ip(world.ns("far"), destination, &lone).expect("fragment");
        let from_far = |p: &Packet| !p.outgoing && p.source == source && p.fragment;
        // XDP drops before the capture.
        assert!(
            capture.wait("the fragment", SHORT, from_far).is_err(),
            "{family:?}\n{}",
            daemon.report()
        );
    }
}

/// Requests an address by a client at the NIC. Returns whether a server has given one.
fn has_lease(world: &World) -> bool {
    let client = [
        "udhcpc",
        "-i",
        NIC,
        "-n",
        "-q",
        "-f",
        "-t",
        "6",
        "-T",
        "1",
        "-s",
        "/bin/true",
    ];
    let mut program = Program::start(&world.topology.node, "busybox", &client, None).expect("busybox udhcpc");
    let status = program.process.wait(OPEN).expect("the client ends");
    let log = program.process.log();
    assert_eq!(status.success(), log.contains("lease of 198.51.100."), "{log}");
    status.success()
}

/// Sends a request to the group of DHCPv6 servers (RFC 8415, section 7.1), and returns whether an answer arrives.
fn has_answer_v6(world: &World) -> bool {
    let node = &world.topology.node;
    let local = |ns: &Ns, interface: &str| {
        let text = ns.run(
            "ip",
            &["-6", "-o", "addr", "show", "dev", interface, "scope", "link"],
        );
        let text = text.expect("addresses");
        let address = text.split_whitespace().find_map(|word| word.strip_suffix("/64"));
        address
            .expect("a link-local address")
            .parse::<Ipv6Addr>()
            .expect("an address")
    };
    let scoped = |address, port, scope| SocketAddr::V6(SocketAddrV6::new(address, port, 0, scope));
    let inside = world.topology.internet.ifindex(INNER).expect("interface");
    let server = world.topology.internet.enter(|| {
        let socket = UdpSocket::bind("[::]:547").expect("server");
        socket
            .join_multicast_v6(&Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2), inside)
            .expect("group");
        socket
            .set_read_timeout(Some(Duration::from_secs(1)))
            .expect("timeout");
        socket
    });
    let nic = node.ifindex(NIC).expect("interface");
    let own = local(node, NIC);
    let client = node.enter(|| UdpSocket::bind(scoped(own, 546, nic)).expect("client"));
    client
        .set_read_timeout(Some(Duration::from_secs(1)))
        .expect("timeout");
    let servers = scoped(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2), 547, nic);
    // The node's own programs can refuse to send.
    if client.send_to(b"solicit", servers).is_err() {
        return false;
    }
    let Ok((_, from)) = server.recv_from(&mut [0; 16]) else {
        return false;
    };
    server.send_to(b"advertise", from).expect("answer");
    client.recv_from(&mut [0; 16]).is_ok()
}

#[test]
fn a_node_that_denies_everything_gets_its_address_by_dhcp() {
    let world = world();
    let server = [
        "--keep-in-foreground",
        "--port=0",
        "--bind-interfaces",
        "--interface=eth0",
        "--dhcp-authoritative",
        "--no-ping",
        "--dhcp-range=198.51.100.100,198.51.100.150,1h",
        "--dhcp-leasefile=leases",
        "--pid-file=",
        "--conf-file=/dev/null",
        "--user=root",
    ];
    let _server = Program::start(&world.topology.internet, "dnsmasq", &server, None).expect("dnsmasq");
    let daemon = world
        .daemon(settings(""), &[("node.yaml", CLOSED)])
        .expect("daemon");
    assert!(has_lease(&world), "{}", daemon.report());
    assert!(has_answer_v6(&world), "{}", daemon.report());
    // Without the default ports there is no address: the test would see it.
    daemon
        .configure(
            &world.topology,
            &with_peers(settings("inbound = []\noutbound = []")),
        )
        .and_then(|()| daemon.cli(&["reload"]))
        .expect("reload");
    assert!(!has_lease(&world), "{}", daemon.report());
    assert!(!has_answer_v6(&world), "{}", daemon.report());
}
