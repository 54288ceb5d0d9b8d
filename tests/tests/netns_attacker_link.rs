//! A workload with root in its own namespace attacks what its interface passes without a rule: neighbour discovery,
//! addresses of others, an interface that is recreated or renamed.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use palisade_testbed::{
    Daemon, Outcome, Topology,
    capture::Capture,
    daemon::Settings,
    forge::{self, Checksum, Wire},
    packet::protocol,
    probe::{connect, ping, udp},
    server::Echo,
    topology::{FAMILIES, Family, INNER, NIC},
};

const DENY_CLIENT: &str = "
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: deny-all}
spec:
  endpointSelector: {matchLabels: {app: client}}
  ingress:
  - {}
  egress:
  - {}
";

const TIMEOUT: Duration = Duration::from_secs(8);
/// Time to wait before a test concludes that a packet does not arrive.
const SHORT: Duration = Duration::from_millis(400);

fn topology() -> Topology {
    let topology = Topology::new()
        .and_then(|topology| topology.apps(&["client", "server"]))
        .unwrap_or_else(|error| panic!("{error:#}"));
    topology.meet().expect("the workloads reach the node");
    topology
}

fn daemon(topology: &Topology, policies: &[(&str, &str)]) -> Daemon {
    Daemon::start(topology, &Settings::default(), policies).unwrap_or_else(|error| panic!("{error:#}"))
}

/// Sends datagrams from a namespace to both addresses of a name, as fast as possible, for `duration`. Continues after
/// errors (no route, no interface yet).
fn flood(topology: &Topology, from: &str, to: &[IpAddr], duration: Duration) -> u32 {
    topology.ns(from).enter(|| {
        let begun = Instant::now();
        let mut sent = 0;
        while begun.elapsed() < duration {
            for to in to {
                let any: IpAddr = match to {
                    IpAddr::V4(_) => [0, 0, 0, 0].into(),
                    IpAddr::V6(_) => [0u16; 8].into(),
                };
                let Ok(socket) = UdpSocket::bind((any, 0)) else {
                    continue;
                };
                for _ in 0..8 {
                    sent += u32::from(socket.send_to(b"out", SocketAddr::new(*to, 9)).is_ok());
                }
            }
        }
        sent
    })
}

fn datagrams(capture: &Capture, from: [IpAddr; 2]) -> usize {
    capture
        .count(|packet| !packet.outgoing && packet.protocol == protocol::UDP && from.contains(&packet.source))
}

fn both(topology: &Topology, name: &str) -> [IpAddr; 2] {
    FAMILIES.map(|family| topology.addr(name, family))
}

#[test]
fn neighbour_discovery_is_not_forwarded_off_the_link() {
    let topology = topology();
    let _daemon = daemon(&topology, &[("deny.yaml", DENY_CLIENT)]);
    let client = topology.get("client");
    let (own, outside) = (
        topology.addr("client", Family::V6),
        topology.addr("internet", Family::V6),
    );
    let server = topology.addr("server", Family::V6);
    let wire = Wire::open(&client.ns, INNER, client.gateway(Family::V6)).expect("wire");
    let captures = [
        Capture::start(&topology.internet, INNER).expect("capture"),
        Capture::start(topology.ns("server"), INNER).expect("capture"),
    ];
    let secret = [0x53; 1000];
    for to in [outside, server] {
        for from in [own, server, topology.addr("node", Family::V6)] {
            for kind in [133, 134, 135, 136, 137] {
                let mut body = vec![0; 4];
                body.extend_from_slice(&secret);
                let message = forge::icmp(from, to, kind, 0, &body, Checksum::Right);
                wire.send(&forge::ip(from, to, protocol::ICMPV6, 255, &message))
                    .expect("send");
            }
        }
    }
    thread::sleep(SHORT);
    for capture in &captures {
        let leaked = capture.count(|packet| packet.payload.windows(8).any(|bytes| bytes == [0x53; 8]));
        assert_eq!(leaked, 0, "{:#?}", capture.packets());
    }
    // Neighbour discovery on the link still works.
    let gateway = client.gateway(Family::V6);
    client.ns.ip(&format!("neigh flush dev {INNER}")).expect("flush");
    Wire::open(&client.ns, INNER, gateway).expect("the gateway answers a solicitation");
}

#[test]
fn a_workload_neither_receives_nor_answers_packets_of_a_poisoned_neighbour_entry() {
    let topology = topology();
    let _daemon = daemon(&topology, &[]);
    let client = topology.get("client");
    let mac = Wire::open(&client.ns, INNER, client.gateway(Family::V4))
        .expect("wire")
        .own;
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    let capture = Capture::start(&client.ns, INNER).expect("capture");
    for family in FAMILIES {
        // A route and a neighbour entry of the node send the other workload's address to the client's link.
        let server = topology.addr("server", family);
        let length = if server.is_ipv4() { 32 } else { 128 };
        topology
            .node
            .ip(&format!(
                "route add {server}/{length} dev veth-client\nneigh replace {server} lladdr {mac} dev veth-client nud permanent"
            ))
            .expect("poison");
        for from in [&topology.internet, &topology.node] {
            let got = udp(from, None, SocketAddr::new(server, 53), 20, SHORT);
            assert_ne!(got, Outcome::Open);
        }
        assert_eq!(
            capture.count(|packet| !packet.outgoing && packet.destination == server),
            0
        );
        // The client sends from the other workload's address nevertheless.
        let wire = Wire::open(&client.ns, INNER, client.gateway(family)).expect("wire");
        let outside = Capture::start(&topology.internet, INNER).expect("capture");
        wire.udp(
            SocketAddr::new(server, 53),
            SocketAddr::new(topology.addr("internet", family), 4000),
            b"forged",
            Checksum::Right,
        )
        .expect("send");
        thread::sleep(SHORT);
        assert_eq!(outside.count(|packet| packet.payload.ends_with(b"forged")), 0);
    }
}

#[test]
fn a_recreated_interface_passes_nothing_before_it_is_guarded() {
    let mut topology = topology();
    let mut daemon = daemon(&topology, &[("deny.yaml", DENY_CLIENT)]);
    let from = both(&topology, "client");
    let to = [both(&topology, "internet"), both(&topology, "server")].concat();
    let outside = Capture::start(&topology.internet, INNER).expect("capture");
    let beside = Capture::start(topology.ns("server"), INNER).expect("capture");
    let leaked = || datagrams(&outside, from) + datagrams(&beside, from);
    for _ in 0..5 {
        topology.unplug("client").expect("unplug");
        topology.plug("client").expect("plug");
        assert!(flood(&topology, "client", &to, Duration::from_millis(60)) > 0);
    }
    assert_eq!(leaked(), 0, "while the daemon lives");

    daemon.kill9().expect("kill -9");
    topology.unplug("client").expect("unplug");
    topology.plug("client").expect("plug");
    let inside = Capture::start(topology.ns("client"), INNER).expect("capture");
    assert!(flood(&topology, "client", &to, Duration::from_millis(500)) > 0);
    assert_eq!(leaked(), 0, "while the daemon is dead");
    for (name, source) in [
        ("internet", both(&topology, "internet")),
        ("server", both(&topology, "server")),
    ] {
        assert!(flood(&topology, name, &from, Duration::from_millis(100)) > 0);
        thread::sleep(Duration::from_millis(100));
        assert_eq!(
            datagrams(&inside, source),
            0,
            "from {name} while the daemon is dead"
        );
    }

    // After the restart the policy decides again, and allowed packets pass.
    daemon.restart().expect("restart");
    let internet = both(&topology, "internet");
    let servers = Echo::start(&topology.internet, &internet, &[], &[53]).expect("server");
    flood(&topology, "client", &to, Duration::from_millis(60));
    assert_eq!(leaked(), 0);
    daemon.apply(&[]).expect("apply");
    topology.meet().expect("the client reaches its gateway");
    for family in FAMILIES {
        let server = SocketAddr::new(topology.addr("internet", family), 53);
        assert_eq!(
            udp(topology.ns("client"), None, server, 20, TIMEOUT),
            Outcome::Open
        );
    }
    drop(servers);
}

#[test]
fn a_renamed_interface_stays_guarded_across_a_restart() {
    let topology = topology();
    let policies = [
        (
            "node.yaml",
            "
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {}
  ingress:
  - fromEntities: [host]
",
        ),
        ("deny.yaml", DENY_CLIENT),
    ];
    let mut daemon = daemon(&topology, &policies);
    let to = both(&topology, "internet");
    let outside = Capture::start(&topology.internet, INNER).expect("capture");
    let check = |when: &str| {
        for family in FAMILIES {
            let got = ping(&topology.internet, None, topology.addr("node", family), 8, SHORT);
            assert_ne!(got, Outcome::Open, "the NIC, {when}");
        }
        assert!(flood(&topology, "client", &to, Duration::from_millis(100)) > 0);
        assert_eq!(datagrams(&outside, both(&topology, "client")), 0, "{when}");
    };
    check("before");
    for (old, new) in [("veth-client", "renamed0"), (NIC, "renamed1")] {
        topology
            .node
            .ip(&format!("link set {old} name {new}"))
            .expect("rename");
    }
    thread::sleep(Duration::from_millis(300));
    check("renamed");
    daemon.kill9().expect("kill -9");
    check("renamed, and the daemon dead");
    daemon.restart().expect("restart");
    check("renamed, and the daemon started again");
    let status = daemon.status().expect("status");
    let interfaces = status["interfaces"].as_array().expect("interfaces");
    assert!(
        interfaces.iter().all(|i| i["problem"].is_null()),
        "{interfaces:#?}"
    );
}

#[test]
fn the_router_may_use_a_link_local_address_that_the_node_has_on_another_link() {
    let topology = topology();
    topology
        .node
        .ip("addr add fe80::1/64 dev veth-client nodad")
        .expect("address");
    topology
        .internet
        .ip(&format!("addr add fe80::1/64 dev {INNER} nodad"))
        .expect("address");
    let policy = "
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {}
  ingress:
  - fromEntities: [world]
    icmps: [{fields: [{type: 128, family: IPv6}]}]
  egress:
  - toEntities: [world]
    icmps: [{fields: [{type: 128, family: IPv6}]}]
";
    let daemon = daemon(&topology, &[("node.yaml", policy)]);
    for (ns, to) in [
        (&topology.node, format!("fe80::1%{NIC}")),
        (&topology.internet, topology.addr("node", Family::V6).to_string()),
    ] {
        let from = if to.starts_with("fe80") {
            vec![]
        } else {
            vec!["-I", "fe80::1%eth0"]
        };
        let mut args = vec!["-6", "-c", "1", "-W", "5"];
        args.extend(from);
        args.push(&to);
        if let Err(error) = ns.run("ping", &args) {
            panic!("{to}: {error:#}\n{}", daemon.report());
        }
    }
}

#[test]
fn a_service_address_translated_to_the_node_does_not_bypass_its_policy() {
    let topology = topology();
    let policy = "
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {}
  ingress:
  - fromEntities: [all]
    toPorts:
    - ports: [{port: \"81\", protocol: TCP}, {port: \"81\", protocol: UDP}]
";
    let daemon = daemon(&topology, &[("node.yaml", policy)]);
    let node = both(&topology, "node");
    let _servers = Echo::start(&topology.node, &node, &[80, 81], &[80, 81]).expect("servers");
    let services: [IpAddr; 2] = [
        "203.0.113.5".parse().expect("v4"),
        "2001:db8:5::5".parse().expect("v6"),
    ];
    topology
        .internet
        .ip(&format!(
            "route add {} via {}\nroute add {} via {}",
            services[0], node[0], services[1], node[1]
        ))
        .expect("routes");
    topology
        .node
        .nft(&format!(
            "table inet services {{\n\
             chain before {{ type nat hook prerouting priority -100; ip daddr {} dnat ip to {}; ip6 daddr {} dnat ip6 to {}; }}\n\
             }}\n",
            services[0], node[0], services[1], node[1]
        ))
        .expect("nat");
    for (own, service) in node.iter().zip(&services) {
        for port in [80, 81] {
            for from in ["internet", "client"] {
                let (ns, to) = (topology.ns(from), SocketAddr::new(*service, port));
                assert_ne!(connect(ns, to, SHORT), Outcome::Open, "{from} tcp {to}");
                assert_ne!(udp(ns, None, to, 20, SHORT), Outcome::Open, "{from} udp {to}");
            }
        }
        let allowed = SocketAddr::new(*own, 81);
        assert_eq!(connect(&topology.internet, allowed, TIMEOUT), Outcome::Open);
        assert_eq!(udp(&topology.internet, None, allowed, 20, TIMEOUT), Outcome::Open);
    }
    let said = daemon.cli(&["status"]).expect("status");
    assert!(said.contains("nat chains with rules (1)"), "{said}");
    let trace = [
        "policy",
        "trace",
        "--from",
        "default/client",
        "--to",
        "node1",
        "--port",
        "81/tcp",
    ];
    let said = daemon.cli(&trace).expect("trace");
    let note = said
        .lines()
        .find(|line| line.starts_with("note: this node translates or redirects ("));
    let note = note.unwrap_or_else(|| panic!("{said}"));
    for part in [
        "nat chains with rules (1)",
        "policies see the addresses and ports of an incoming packet before DNAT",
        "`policy trace` does not know these rules",
    ] {
        assert!(note.contains(part), "{part}: {said}");
    }
    let json = daemon.json(&trace).expect("trace");
    assert_eq!(json["notes"][0].as_str(), note.strip_prefix("note: "), "{json:#}");
}
