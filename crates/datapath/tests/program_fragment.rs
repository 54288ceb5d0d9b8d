//! Fragments, and ICMP errors.

mod program;

use palisade_abi::{Decision, Direction, Reason, class_slot, class_slot_unknown_port, event_flags, identity};
use program::packets::*;
use program::*;

const INGRESS: Direction = Direction::Ingress;
const EGRESS: Direction = Direction::Egress;
const FAMILIES: [(&str, &str); 2] = [(WORLD_V4, HOST_V4), (WORLD_V6, HOST_V6)];

/// A node that allows ingress to port 80.
fn server() -> World {
    let world = World::new(NIC, HOST);
    world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    world
}

/// The first 24 bytes of a UDP datagram of 40.
fn udp_start(port: u16) -> Vec<u8> {
    let mut bytes = vec![0x0f, 0xa0];
    bytes.extend_from_slice(&port.to_be_bytes());
    bytes.extend_from_slice(&[0, 40, 0, 0]);
    bytes.resize(24, 1);
    bytes
}

#[test]
fn later_fragments_take_the_ports_of_the_first() {
    for (client, server_addr) in FAMILIES {
        for hook in ENTRIES {
            let mut world = server();
            let first = fragment(client, server_addr, 17, 1, 0, true, &udp_start(80));
            let later = fragment(client, server_addr, 17, 1, 3, false, &[2; 16]);
            // The later fragment arrives first.
            let got = world.run(hook, &later);
            assert_eq!(got.reason, Reason::FragmentNotFound);
            assert_eq!(got.events[0].flags & event_flags::FRAGMENT, event_flags::FRAGMENT);
            assert_eq!(world.run(hook, &first).reason, Reason::Allowed);
            assert_eq!(world.run(hook, &later).reason, Reason::Established);
            let flow = world
                .flow(&key(HOST, 17, (server_addr, 80), (client, 4000)))
                .unwrap();
            assert_eq!(flow.forward_packets, 2);
            // Another datagram, and the same one at another hook.
            let other = fragment(client, server_addr, 17, 2, 3, false, &[2; 16]);
            assert_eq!(world.run(hook, &other).reason, Reason::FragmentNotFound);
            // All fragments of a denied datagram are dropped by the same rule.
            let first = fragment(client, server_addr, 17, 3, 0, true, &udp_start(81));
            let later = fragment(client, server_addr, 17, 3, 3, false, &[2; 16]);
            assert_eq!(world.run(hook, &first).reason, Reason::PolicyDenied);
            assert_eq!(world.run(hook, &later).reason, Reason::PolicyDenied);
        }
    }
}

#[test]
fn a_first_fragment_expires() {
    let mut world = server();
    world.config(|config| config.fragment = 0);
    let first = fragment(WORLD_V4, HOST_V4, 17, 1, 0, true, &udp_start(80));
    let later = fragment(WORLD_V4, HOST_V4, 17, 1, 3, false, &[2; 16]);
    assert!(world.run(Hook::Xdp, &first).passed);
    assert_eq!(world.run(Hook::Xdp, &later).reason, Reason::FragmentNotFound);
}

#[test]
fn a_fragment_without_its_first_passes_by_rules_for_every_port() {
    for (client, server_addr) in FAMILIES {
        let mut world = server();
        world.classes(&[(class_slot(17, 80), 5), (class_slot_unknown_port(17), 8)]);
        let later = fragment(client, server_addr, 17, 1, 3, false, &[2; 16]);
        assert_eq!(world.run(Hook::Xdp, &later).reason, Reason::FragmentNotFound);
        world.rule(HOST, INGRESS, identity::ANY, 8, entry(Decision::Allow, 9));
        assert_eq!(world.run(Hook::Xdp, &later).reason, Reason::Allowed);
        assert!(world.flows().is_empty());
        world.rule(HOST, INGRESS, identity::ANY, 8, entry(Decision::DenyExplicit, 9));
        assert_eq!(
            world.run(Hook::Xdp, &later).reason,
            Reason::PolicyDeniedByDenylist
        );
    }
}

#[test]
fn fragments_that_hide_or_overlap_headers_are_dropped() {
    for (client, server_addr) in FAMILIES {
        let mut world = server();
        let mut cases = vec![
            (
                "a tiny first TCP fragment",
                fragment(client, server_addr, 6, 1, 0, true, &[0; 16]),
            ),
            (
                "a tiny first UDP fragment",
                fragment(client, server_addr, 17, 1, 0, true, &[0; 0]),
            ),
            (
                "into the TCP header",
                fragment(client, server_addr, 6, 1, 1, false, &[0; 16]),
            ),
            (
                "into the TCP flags",
                fragment(client, server_addr, 6, 1, 2, true, &[0; 16]),
            ),
            (
                "into the SCTP header",
                fragment(client, server_addr, 132, 1, 1, true, &[0; 16]),
            ),
            (
                "no multiple of eight",
                fragment(client, server_addr, 17, 1, 3, true, &[0; 15]),
            ),
            (
                "beyond 65,535",
                fragment(client, server_addr, 17, 1, 8191, false, &[0; 24]),
            ),
        ];
        if client.contains(':') {
            // Destination options fill the first fragment.
            cases.push((
                "no transport header",
                fragment(client, server_addr, 60, 1, 0, true, &[17, 1, 1, 4, 0, 0, 0, 0]),
            ));
        }
        for hook in ENTRIES {
            for (name, frame) in &cases {
                let got = world.run(hook, frame);
                assert_eq!(got.reason, Reason::InvalidFragment, "{name} {client} {hook:?}");
            }
        }
    }
}

#[test]
fn every_first_fragment_is_evaluated() {
    let mut world = server();
    let first = |port| fragment(WORLD_V4, HOST_V4, 17, 1, 0, true, &udp_start(port));
    let later = fragment(WORLD_V4, HOST_V4, 17, 1, 3, false, &[2; 16]);
    assert!(world.run(Hook::Xdp, &first(80)).passed);
    // A second first fragment changes the ports: it and the later fragments are denied.
    assert_eq!(world.run(Hook::Xdp, &first(22)).reason, Reason::PolicyDenied);
    assert_eq!(world.run(Hook::Xdp, &later).reason, Reason::PolicyDenied);
}

#[test]
fn a_whole_packet_with_a_fragment_header_is_no_fragment() {
    let mut world = server();
    let datagram = [0x0f, 0xa0, 0, 80, 0, 8, 0, 0];
    let frame = fragment(WORLD_V6, HOST_V6, 17, 1, 0, false, &datagram);
    assert_eq!(world.run(Hook::Xdp, &frame).reason, Reason::Allowed);
    // No sender writes two fragment headers.
    let mut twice = vec![17, 0, 0, 0, 0, 0, 0, 1];
    twice.extend_from_slice(&datagram);
    let frame = fragment(WORLD_V6, HOST_V6, 44, 1, 0, false, &twice);
    assert_eq!(world.run(Hook::Xdp, &frame).reason, Reason::InvalidIpv6Extension);
}

#[test]
fn fragments_of_ipv6_need_not_name_the_same_protocol() {
    let mut world = server();
    let mut start = vec![17, 0, 1, 4, 0, 0, 0, 0];
    start.extend_from_slice(&udp_start(80));
    let first = fragment(WORLD_V6, HOST_V6, 60, 1, 0, true, &start);
    let later = fragment(WORLD_V6, HOST_V6, 60, 1, 4, false, &[2; 16]);
    assert_eq!(world.run(Hook::Xdp, &first).reason, Reason::Allowed);
    assert_eq!(world.run(Hook::Xdp, &later).reason, Reason::Established);
}

#[test]
fn a_fragmented_echo_is_one_flow() {
    let mut world = World::new(NIC, HOST);
    world.rule(HOST, INGRESS, identity::ANY, 6, entry(Decision::Allow, 7));
    let mut message = vec![8, 0, 0, 0, 0, 9, 0, 1];
    message.resize(24, 0);
    assert_eq!(
        world
            .run(Hook::Xdp, &fragment(WORLD_V4, HOST_V4, 1, 1, 0, true, &message))
            .reason,
        Reason::Allowed
    );
    let later = fragment(WORLD_V4, HOST_V4, 1, 1, 3, false, &[2; 16]);
    assert_eq!(world.run(Hook::Xdp, &later).reason, Reason::Established);
    assert!(world.flow(&key(HOST, 1, (HOST_V4, 9), (WORLD_V4, 1))).is_some());
}

#[test]
fn icmp_errors_about_flows_are_related() {
    for (client, server_addr) in FAMILIES {
        let router = if client.contains(':') {
            "2001:db8:9::1"
        } else {
            "203.0.113.9"
        };
        for hook in ENTRIES {
            let mut world = server();
            let request = udp((client, 4000), (server_addr, 80), &[1; 8]);
            let answer = udp((server_addr, 80), (client, 4000), &[1; 8]);
            // There is no flow yet.
            assert_eq!(
                world.run(hook, &unreachable(router, server_addr, &answer)).reason,
                Reason::UnrelatedIcmp
            );
            assert_eq!(
                world
                    .run_local(&unreachable(server_addr, client, &request))
                    .reason,
                Reason::UnrelatedIcmp
            );
            world.run(hook, &request);
            // From a router on the path of the reply, and from the node about the request.
            assert_eq!(
                world.run(hook, &unreachable(router, server_addr, &answer)).reason,
                Reason::Related
            );
            assert_eq!(
                world
                    .run_local(&unreachable(server_addr, client, &request))
                    .reason,
                Reason::Related
            );
            assert_eq!(world.rule_counter(7).packets, 3);
            // To a host that did not send the quoted packet; with a quote of the wrong direction; with another port.
            for quoted in [&request, &udp((server_addr, 81), (client, 4000), &[])] {
                let got = world.run(hook, &unreachable(router, server_addr, quoted));
                assert_eq!(got.reason, Reason::UnrelatedIcmp);
            }
            // To another address of the node than the source of the quoted packet.
            let other = if client.contains(':') {
                "fd00::99"
            } else {
                "10.0.0.99"
            };
            let got = world.run(hook, &unreachable(router, other, &answer));
            assert_eq!(got.reason, Reason::UnrelatedIcmp);
            // Truncated before the ports.
            let header = if client.contains(':') { 40 } else { 20 };
            let got = world.run(
                hook,
                &unreachable(router, server_addr, &answer[..14 + header + 3]),
            );
            assert_eq!(got.reason, Reason::UnrelatedIcmp);
            // From an address that cannot arrive at a NIC.
            let spoofed = if client.contains(':') { A_V6 } else { A_V4 };
            let got = world.run(hook, &unreachable(spoofed, server_addr, &answer));
            assert_eq!(got.reason, Reason::InvalidSourceIp);
            // If the flow is denied, so are errors about it.
            world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Deny, 9));
            world.state(HOST, u32::from(HOST), 2, identity::HOST);
            let got = world.run(hook, &unreachable(router, server_addr, &answer));
            assert_eq!(got.reason, Reason::PolicyDenied);
        }
    }
}

#[test]
fn icmp_errors_longer_than_routers_send_are_dropped() {
    for ((client, server_addr), longest) in FAMILIES.into_iter().zip([576, 1280]) {
        for hook in ENTRIES {
            let mut world = server();
            assert!(
                world
                    .run(hook, &udp((client, 4000), (server_addr, 80), &[]))
                    .passed
            );
            // Network and ICMP header, and network and UDP header of the quoted packet.
            let headers = 2 * (if client.contains(':') { 40 } else { 20 } + 8);
            for (surplus, reason) in [(0, Reason::Related), (1, Reason::UnrelatedIcmp)] {
                let payload = vec![0; longest - headers + surplus];
                let answer = udp((server_addr, 80), (client, 4000), &payload);
                let got = world.run(hook, &unreachable(client, server_addr, &answer));
                assert_eq!(got.reason, reason);
            }
        }
    }
}

#[test]
fn icmp_errors_may_quote_options_extensions_and_echoes() {
    let mut world = server();
    world.rule(HOST, EGRESS, identity::ANY, 6, entry(Decision::Allow, 8));
    // IPv4 options.
    world.run(Hook::Xdp, &udp((WORLD_V4, 4000), (HOST_V4, 80), &[]));
    let mut quoted = udp((HOST_V4, 80), (WORLD_V4, 4000), &[]);
    quoted[14] = 0x46;
    quoted[17] += 4;
    quoted.splice(34..34, [1; 4]);
    let got = world.run(Hook::Xdp, &unreachable("203.0.113.9", HOST_V4, &quoted));
    assert_eq!(got.reason, Reason::Related);
    // IPv6 extension headers.
    world.run(Hook::Xdp, &udp((WORLD_V6, 4000), (HOST_V6, 80), &[]));
    let mut extended = vec![17, 0, 1, 4, 0, 0, 0, 0];
    extended.extend_from_slice(&udp((HOST_V6, 80), (WORLD_V6, 4000), &[])[54..]);
    let quoted = raw(HOST_V6, WORLD_V6, 60, 64, &extended);
    let got = world.run(Hook::Xdp, &unreachable("2001:db8:9::1", HOST_V6, &quoted));
    assert_eq!(got.reason, Reason::Related);
    // Echo.
    for (host, outside, router) in [
        (HOST_V4, WORLD_V4, "203.0.113.9"),
        (HOST_V6, WORLD_V6, "2001:db8:9::1"),
    ] {
        let question = echo(host, outside, 9, false);
        let got = world.run(Hook::Xdp, &unreachable(router, host, &question));
        assert_eq!(got.reason, Reason::UnrelatedIcmp);
        assert_eq!(world.run_local(&question).reason, Reason::Allowed);
        let got = world.run(Hook::Xdp, &unreachable(router, host, &question));
        assert_eq!(got.reason, Reason::Related);
    }
}

#[test]
fn other_icmp_messages_are_evaluated_by_type() {
    let mut world = World::new(NIC, HOST);
    world.classes(&[
        (class_slot(1, 13), 5),
        (class_slot(58, 137), 5),
        (class_slot(1, 3), 8),
    ]);
    world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    assert_eq!(
        world
            .run(Hook::Xdp, &icmp(WORLD_V4, HOST_V4, 13, 64, &[0; 12]))
            .reason,
        Reason::Allowed
    );
    assert_eq!(
        world
            .run(Hook::Xdp, &icmp(WORLD_V4, HOST_V4, 5, 64, &[0; 28]))
            .reason,
        Reason::PolicyDenied
    );
    assert_eq!(
        world
            .run(Hook::Xdp, &icmp(WORLD_V6, HOST_V6, 137, 255, &[0; 32]))
            .reason,
        Reason::Allowed
    );
    assert!(world.flows().is_empty());
    // An error that a rule allows needs no flow.
    let error = unreachable(WORLD_V4, HOST_V4, &udp((HOST_V4, 1), (WORLD_V4, 2), &[]));
    assert_eq!(world.run(Hook::Xdp, &error).reason, Reason::UnrelatedIcmp);
    world.rule(HOST, INGRESS, identity::ANY, 8, entry(Decision::Allow, 9));
    assert_eq!(world.run(Hook::Xdp, &error).reason, Reason::Allowed);
}

#[test]
fn icmp_errors_at_an_interface_of_a_workload() {
    for (a, outside, router) in [(A_V4, WORLD_V4, "203.0.113.9"), (A_V6, WORLD_V6, "2001:db8:9::1")] {
        let mut world = World::new(WORKLOAD, A);
        world.rule(A, EGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
        let request = udp((a, 4000), (outside, 80), &[]);
        assert!(world.run(Hook::TcIn, &request).passed);
        let got = world.run(Hook::TcOut, &unreachable(router, a, &request));
        assert_eq!((got.reason, got.direction), (Reason::Related, INGRESS));
        // The workload may report errors about packets that it received, but only with its own address.
        let answer = udp((outside, 80), (a, 4000), &[]);
        assert_eq!(
            world.run(Hook::TcIn, &unreachable(a, outside, &answer)).reason,
            Reason::Related
        );
        assert_eq!(
            world
                .run(Hook::TcIn, &unreachable(router, outside, &answer))
                .reason,
            Reason::InvalidSourceIp
        );
    }
}
