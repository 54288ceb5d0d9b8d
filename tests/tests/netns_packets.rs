//! Packets other than plain datagrams: fragments, ICMP errors, spoofed sources.

use std::fs;

use palisade_testbed::{
    Outcome,
    capture::Capture,
    daemon::{Hooks, Settings},
    packet::{self, Packet, protocol},
    probe::{send_ip, send_raw, udp},
    topology::{FAMILIES, Family, INNER, NIC},
};
use palisade_tests::{CLOSED, OPEN, flows, world};

const HOOKS: [Hooks; 2] = [
    Hooks {
        endpoint: "tc",
        host: "xdp",
        tc: "tcx",
    },
    Hooks {
        endpoint: "xdp",
        host: "tc",
        tc: "clsact",
    },
];

const UDP_53_AND_PING: &str = "
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: udp-53}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - fromEntities: [all]
    toPorts:
    - ports: [{port: \"53\", protocol: UDP}]
  - fromEntities: [all]
    icmps:
    - fields: [{type: 8, family: IPv4}, {type: 128, family: IPv6}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: db}
spec:
  endpointSelector: {matchLabels: {app: db}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
";

#[test]
fn fragments_take_the_verdict_of_their_first_fragment() {
    let world = world();
    for hooks in HOOKS {
        let daemon = world
            .daemon(
                Settings {
                    hooks,
                    ..Settings::default()
                },
                &[("udp-53.yaml", UDP_53_AND_PING)],
            )
            .expect("daemon");
        let capture = Capture::start(world.ns("back"), INNER).expect("capture");
        world.expect(
            &daemon,
            "front -> back udp/53/4000 open
             far -> back udp/53/4000 open
             node -> back udp/53/4000 open
             front -> back ping/4000 open
             far -> back ping/4000 open
             front -> back udp/80/4000 drop
             far -> back udp/8080/4000 drop
             front -> db udp/80/4000 open
             front -> db ping/4000 open
             back -> far udp/80/4000 open
             front -> node udp/53/4000 open
             far -> node ping/4000 open",
        );
        // Only first fragments have ports, so fragments of a denied datagram are recognised by their content.
        let allowed_ports = |p: &Packet| {
            p.ports
                .is_none_or(|(source, destination)| destination == 53 || source == 80)
        };
        let stray = capture
            .packets()
            .into_iter()
            .find(|p| !p.outgoing && p.protocol == protocol::UDP && !allowed_ports(p));
        assert_eq!(stray, None, "{hooks:?}");
    }
}

#[test]
fn no_fragment_of_a_denied_datagram_arrives() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("udp-53.yaml", UDP_53_AND_PING)])
        .expect("daemon");
    let capture = Capture::start(world.ns("back"), INNER).expect("capture");
    for family in FAMILIES {
        for (from, port) in [("front", 80), ("far", 8080)] {
            let source = world.addr(from, family);
            let to = world.at("back", family, port);
            assert_eq!(
                udp(world.ns(from), Some(source), to, 6000, CLOSED),
                Outcome::TimedOut
            );
            assert_eq!(
                capture.count(|p| !p.outgoing && p.source == source && p.protocol == protocol::UDP),
                0,
                "{}",
                daemon.report()
            );
        }
    }
}

#[test]
fn a_fragment_without_its_first_passes_only_where_every_port_is_allowed() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("udp-53.yaml", UDP_53_AND_PING)])
        .expect("daemon");
    for family in FAMILIES {
        let source = world.addr("front", family);
        for (to, passes) in [("back", false), ("db", true)] {
            let destination = world.addr(to, family);
            let capture = Capture::start(world.ns(to), INNER).expect("capture");
            let lone = packet::later_fragment(source, destination, 0x7001, 1480, &[7; 64]);
            send_ip(world.ns("front"), destination, &lone).expect("fragment");
            let from_front = |p: &Packet| !p.outgoing && p.source == source && p.fragment;
            let wait = if passes { OPEN } else { CLOSED };
            assert_eq!(
                capture.wait("the fragment", wait, from_front).is_ok(),
                passes,
                "{family:?} {to}\n{}",
                daemon.report()
            );
        }
    }
    let status = daemon.status().expect("status");
    let dropped = status["drops"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|d| d["reason"] == 175);
    assert!(
        dropped.is_some_and(|d| d["packets"].as_u64() >= Some(2)),
        "{status:#}"
    );
}

/// `front` denies ingress and allows all egress.
const FRONT_DENIES_INGRESS: &str = "
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: front}
spec:
  endpointSelector: {matchLabels: {app: front}}
  ingress:
  - {}
---
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {}
  ingress:
  - {}
";

#[test]
fn icmp_errors_about_a_live_flow_pass_and_others_do_not() {
    let world = world();
    for hooks in HOOKS {
        let daemon = world
            .daemon(
                Settings {
                    hooks,
                    ..Settings::default()
                },
                &[("front.yaml", FRONT_DENIES_INGRESS)],
            )
            .expect("daemon");
        for family in FAMILIES {
            // A closed port: its port unreachable makes the socket fail at once.
            for to in ["back", "far"] {
                let at = world.at(to, family, 9999);
                assert_eq!(
                    udp(world.ns("front"), None, at, 64, OPEN),
                    Outcome::Refused,
                    "{to}\n{}",
                    daemon.report()
                );
            }
            assert_eq!(
                udp(world.ns("node"), None, world.at("far", family, 9999), 64, OPEN),
                Outcome::Refused,
                "the node's own flow\n{}",
                daemon.report()
            );
            // As traceroute: the node's time exceeded.
            let capture = Capture::start(world.ns("front"), INNER).expect("capture");
            let far = world.at("far", family, 33434);
            world.ns("front").enter(|| {
                let any = if family == Family::V4 {
                    "0.0.0.0:0"
                } else {
                    "[::]:0"
                };
                let socket = std::net::UdpSocket::bind(any).expect("socket");
                match family {
                    Family::V4 => socket.set_ttl(1).expect("ttl"),
                    Family::V6 => palisade_testbed::probe::set_hop_limit_v6(&socket, 1).expect("hop limit"),
                }
                socket.send_to(b"how far", far).expect("send");
            });
            let (exceeded, unreachable) = match family {
                Family::V4 => (11, 3),
                Family::V6 => (3, 1),
            };
            let of_type = |kind: u8| move |p: &Packet| !p.outgoing && p.icmp.is_some_and(|(k, _)| k == kind);
            capture
                .wait("time exceeded", OPEN, of_type(exceeded))
                .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
            // An error about a flow that does not exist.
            let quoted = packet::later_fragment(
                world.addr("front", family),
                world.addr("far", family),
                1,
                0,
                &[0; 8],
            );
            let mut body = vec![0; 4];
            body.extend_from_slice(&quoted);
            let (number, front) = match family {
                Family::V4 => (protocol::ICMP, world.addr("front", family)),
                Family::V6 => (protocol::ICMPV6, world.addr("front", family)),
            };
            send_raw(
                world.ns("far"),
                Some(world.addr("far", family)),
                front,
                number,
                &packet::icmp(unreachable, 1, &body),
            )
            .expect("raw");
            assert!(
                capture
                    .wait("a forged error", CLOSED, of_type(unreachable))
                    .is_err(),
                "{hooks:?} {family:?}: it arrived"
            );
        }
    }
}

#[test]
fn path_mtu_discovery_works_with_denied_ingress() {
    let world = world();
    let t = &world.topology;
    for hooks in HOOKS {
        let daemon = world
            .daemon(
                Settings {
                    hooks,
                    ..Settings::default()
                },
                &[("front.yaml", FRONT_DENIES_INGRESS)],
            )
            .expect("daemon");
        t.node.ip(&format!("link set {NIC} mtu 1300")).expect("mtu");
        let body = t.dir().join("body");
        fs::write(&body, vec![b'x'; 300_000]).expect("body");
        let _nginx = palisade_testbed::server::Nginx::start(&t.internet, "far", &[8888], 1).expect("nginx");
        for family in FAMILIES {
            let capture = Capture::start(world.ns("front"), INNER).expect("capture");
            let url = format!("http://{}/upload", world.at("far", family, 8888));
            let data = format!("@{}", body.display());
            let said = world
                .ns("front")
                .run(
                    "curl",
                    &["-sS", "-m", "8", "-H", "Expect:", "--data-binary", &data, &url],
                )
                .unwrap_or_else(|error| panic!("{hooks:?}: {error:#}\n{}", daemon.report()));
            assert_eq!(said, "hello from far\n");
            let (kind, code) = if family == Family::V4 { (3, 4) } else { (2, 0) };
            assert!(
                capture.count(|p| !p.outgoing && p.icmp == Some((kind, code))) > 0,
                "the node had to say that packets are too big"
            );
        }
        t.node
            .ip(&format!("link set {NIC} mtu 1500\nroute flush cache"))
            .expect("mtu");
        t.ns("front")
            .run("ip", &["route", "flush", "cache"])
            .expect("flush");
        t.ns("front")
            .run("ip", &["-6", "route", "flush", "cache"])
            .expect("flush");
    }
}

#[test]
fn spoofed_sources_from_workloads_and_from_the_world_are_dropped() {
    let world = world();
    let daemon = world.daemon(Settings::default(), &[]).expect("daemon");
    for family in FAMILIES {
        let back = world.addr("back", family);
        let capture = Capture::start(world.ns("back"), INNER).expect("capture");
        let forged = [
            ("front", "db"),
            ("front", "node"),
            ("front", "far"),
            ("internet", "front"),
            ("internet", "node"),
        ];
        for (from, as_whom) in forged {
            let source = world.addr(as_whom, family);
            let whole = packet::whole_udp(source, back, 4000, 53, b"forged");
            send_ip(world.ns(from), back, &whole).expect("packet");
            assert!(
                capture
                    .wait("the packet", CLOSED / 2, |p| !p.outgoing
                        && p.payload.ends_with(b"forged"))
                    .is_err(),
                "{family:?}: {from} spoke as {as_whom}"
            );
        }
        let own = packet::whole_udp(world.addr("front", family), back, 4000, 53, b"own");
        send_ip(world.ns("front"), back, &own).expect("packet");
        capture
            .wait("the packet with the own address", OPEN, |p| {
                !p.outgoing && p.payload.ends_with(b"own")
            })
            .expect("arrival");
    }
    let status = daemon.status().expect("status");
    let dropped: u64 = status["drops"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|d| d["reason"] == 132)
        .filter_map(|d| d["packets"].as_u64())
        .sum();
    assert!(dropped >= 6, "{status:#}");
    flows::expect_between(
        &daemon,
        world.addr("db", Family::V4),
        world.addr("back", Family::V4),
        53,
        "DROPPED",
        None,
    );
}
