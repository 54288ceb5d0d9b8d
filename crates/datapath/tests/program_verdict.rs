//! Policy evaluation, step by step.

mod program;

use palisade_abi::{
    Decision, Direction, EventKind, Inspector, PolicyEntry, Reason, TracePoint, ct_flags, entry_flags,
    event_flags, identity, interface_flags,
};
use program::packets::*;
use program::*;

const INGRESS: Direction = Direction::Ingress;
const EGRESS: Direction = Direction::Egress;

fn addresses(v6: bool) -> [&'static str; 5] {
    if v6 {
        [HOST_V6, A_V6, B_V6, WORLD_V6, PREFIX_V6]
    } else {
        [HOST_V4, A_V4, B_V4, WORLD_V4, PREFIX_V4]
    }
}

#[test]
fn empty_maps_deny_everything() {
    let mut world = World::new(0, 0);
    for hook in [Hook::Xdp, Hook::TcIn, Hook::TcOut] {
        let got = world.run(hook, &tcp((WORLD_V4, 4000), (HOST_V4, 80), SYN));
        assert_eq!(got.reason, Reason::NoInterface);
        assert_eq!(
            got.event(EventKind::Drop).unwrap().reason,
            Reason::NoInterface as u8
        );
    }
    world.interface(NIC, HOST, 0);
    world.state(HOST, 0, 0, 0);
    let got = world.run(Hook::Xdp, &tcp((WORLD_V4, 4000), (HOST_V4, 80), SYN));
    assert_eq!(got.reason, Reason::NoPolicy);
    // A policy without even its last entry.
    world.state(HOST, 77, 1, 0);
    let got = world.run(Hook::Xdp, &tcp((WORLD_V4, 4000), (HOST_V4, 80), SYN));
    assert_eq!(got.reason, Reason::NoPolicy);
}

#[test]
fn a_configuration_of_zeros_tracks_and_reports_nothing() {
    let mut world = World::new(NIC, HOST);
    world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    world.config(|config| {
        config.tcp_opening = 0;
        config.tcp_established = 0;
        config.events_per_second = 0;
    });
    let got = world.run(Hook::Xdp, &tcp((WORLD_V4, 4000), (HOST_V4, 80), SYN));
    assert_eq!(got.reason, Reason::Allowed);
    assert!(got.events.is_empty());
    // The entry expires at once, so the reply is evaluated by itself and denied.
    let got = world.run_local(&tcp((HOST_V4, 80), (WORLD_V4, 4000), SYN | ACK));
    assert_eq!(got.reason, Reason::CtInvalidState);
    assert!(world.suppressed(EventKind::Drop, Reason::CtInvalidState) > 0);
}

#[test]
fn malformed_packets_have_their_own_reasons() {
    let mut world = World::new(NIC, HOST);
    let good = tcp((WORLD_V4, 4000), (HOST_V4, 80), SYN);
    let good6 = tcp((WORLD_V6, 4000), (HOST_V6, 80), SYN);
    let change = |frame: &[u8], at: usize, to: u8| {
        let mut frame = frame.to_vec();
        frame[at] = to;
        frame
    };
    // With header options.
    let options = |options: &[u8]| {
        let mut frame = good.clone();
        frame[14] += (options.len() / 4) as u8;
        frame[17] += options.len() as u8;
        frame.splice(34..34, options.iter().copied());
        frame
    };
    let cases = [
        ("IPv4 cut", good[..14 + 19].to_vec(), Reason::TruncatedL3),
        ("IPv4 version", change(&good, 14, 0x55), Reason::InvalidIpv4),
        ("IPv4 header length", change(&good, 14, 0x44), Reason::InvalidIpv4),
        ("IPv4 total length", change(&good, 17, 200), Reason::InvalidIpv4),
        ("TCP cut", change(&good, 17, 39), Reason::TruncatedL4),
        (
            "TCP data offset",
            change(&good, 14 + 20 + 12, 0xf0),
            Reason::TruncatedL4,
        ),
        (
            "TCP data offset too small",
            change(&good, 14 + 20 + 12, 0x40),
            Reason::CtInvalidHeader,
        ),
        (
            "TCP without flags",
            change(&good, 14 + 20 + 13, 0),
            Reason::CtInvalidHeader,
        ),
        (
            "TCP SYN and FIN",
            change(&good, 14 + 20 + 13, SYN | FIN),
            Reason::CtInvalidHeader,
        ),
        ("IPv6 cut", good6[..14 + 39].to_vec(), Reason::TruncatedL3),
        ("IPv6 version", change(&good6, 14, 0x50), Reason::InvalidIpv6),
        (
            "IPv6 payload length",
            change(&good6, 19, 200),
            Reason::InvalidIpv6,
        ),
        ("IPv6 TCP cut", change(&good6, 19, 19), Reason::TruncatedL4),
        (
            "IPv4-mapped source",
            raw("::ffff:10.0.1.10", HOST_V6, 59, 64, &[]),
            Reason::InvalidIpv6,
        ),
        (
            "ICMP in IPv6",
            raw(WORLD_V6, HOST_V6, 1, 64, &[8; 16]),
            Reason::UnknownL4,
        ),
        (
            "three tags",
            tagged(&good, &[0x88a8, 0x8100, 0x8100]),
            Reason::TooManyVlans,
        ),
        (
            "a second hop-by-hop",
            raw(WORLD_V6, HOST_V6, 0, 64, &[0; 24]),
            Reason::InvalidIpv6Extension,
        ),
        (
            "routing type 0",
            raw(WORLD_V6, HOST_V6, 43, 64, &[6, 0, 0, 1, 0, 0, 0, 0]),
            Reason::InvalidIpv6Extension,
        ),
        (
            "routing type 2 with a segment left",
            raw(WORLD_V6, HOST_V6, 43, 64, &[6, 2, 2, 1, 0, 0, 0, 0]),
            Reason::InvalidIpv6Extension,
        ),
        (
            "routing type 3 with a segment left",
            raw(WORLD_V6, HOST_V6, 43, 64, &[6, 2, 3, 1, 0, 0, 0, 0]),
            Reason::InvalidIpv6Extension,
        ),
        (
            "segment routing with a segment left",
            raw(WORLD_V6, HOST_V6, 43, 64, &[6, 2, 4, 1, 1, 0, 0, 0]),
            Reason::InvalidIpv6Extension,
        ),
        (
            "an unassigned routing type",
            raw(WORLD_V6, HOST_V6, 43, 64, &[6, 0, 5, 0, 0, 0, 0, 0]),
            Reason::InvalidIpv6Extension,
        ),
        (
            "a loose source route",
            options(&[131, 7, 4, 10, 0, 0, 9, 0]),
            Reason::InvalidIpv4,
        ),
        (
            "a strict source route behind other options",
            options(&[1, 148, 4, 0, 0, 137, 3, 4]),
            Reason::InvalidIpv4,
        ),
        (
            "an option that does not fit",
            options(&[1, 1, 1, 1, 1, 1, 148, 4]),
            Reason::InvalidIpv4,
        ),
        (
            "an option of no length",
            options(&[148, 0, 0, 0]),
            Reason::InvalidIpv4,
        ),
        (
            "an option without its length",
            options(&[1, 1, 1, 148]),
            Reason::InvalidIpv4,
        ),
        (
            "UDP length",
            change(&udp((WORLD_V4, 1), (HOST_V4, 2), &[]), 14 + 20 + 5, 7),
            Reason::CtInvalidHeader,
        ),
    ];
    for hook in ENTRIES {
        for (name, frame, reason) in &cases {
            // The kernel builds no socket buffer from a truncated network header.
            if hook == Hook::TcIn && *reason == Reason::TruncatedL3 {
                continue;
            }
            let got = world.run(hook, frame);
            assert_eq!(got.reason, *reason, "{name} at {hook:?}");
            assert_eq!(
                got.event(EventKind::Drop).unwrap().reason,
                *reason as u8,
                "{name} at {hook:?}"
            );
        }
    }
}

#[test]
fn headers_are_found_behind_tags_options_and_extensions() {
    let mut world = World::new(NIC, HOST);
    world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    let plain = udp((WORLD_V4, 4000), (HOST_V4, 80), &[0; 4]);
    let mut options = plain.clone();
    options[14] = 0x47;
    options[17] += 8;
    options.splice(34..34, [1; 8]);
    let udp6 = &udp((WORLD_V6, 4000), (HOST_V6, 80), &[0; 4])[54..];
    // Hop-by-hop options, destination options of 16 bytes, authentication header, routing header of a type other than
    // 0.
    let mut extended = vec![60, 0, 1, 4, 0, 0, 0, 0];
    extended.extend_from_slice(&[51, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    extended.extend_from_slice(&[
        43, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ]);
    extended.extend_from_slice(&[17, 0, 2, 0, 0, 0, 0, 0]);
    extended.extend_from_slice(udp6);
    for frame in [
        tagged(&plain, &[0x8100]),
        tagged(&plain, &[0x88a8, 0x8100]),
        options,
        raw(WORLD_V6, HOST_V6, 0, 64, &extended),
    ] {
        for hook in ENTRIES {
            let got = world.run(hook, &frame);
            assert!(got.passed, "{hook:?}: {:?}", got.reason);
        }
    }
}

#[test]
fn a_protocol_that_linux_delivers_is_evaluated_as_that_protocol() {
    let mut world = World::new(NIC, HOST);
    world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    let datagram = &udp((WORLD_V6, 4000), (HOST_V6, 80), &[0; 4])[54..];
    // For Mobility, HIP and Shim6 the bytes that look like a UDP header to port 80 are payload.
    for protocol in [135, 139, 140] {
        let mut message = vec![17, 0, 0, 0, 0, 0, 0, 0];
        message.extend_from_slice(datagram);
        for hook in ENTRIES {
            let got = world.run(hook, &raw(WORLD_V6, HOST_V6, protocol, 64, &message));
            assert_eq!(got.reason, Reason::PolicyDenied, "{protocol}");
            assert_eq!(got.event(EventKind::Drop).unwrap().protocol, protocol);
        }
    }
    assert!(world.flows().is_empty());
}

#[test]
fn link_control_frames_pass_by_rule() {
    let lldp = frame([1, 0x80, 0xc2, 0, 0, 0x0e], 0x88cc);
    let cases = [
        ("ARP", arp(1, "0.0.0.0", A_V4), true, true),
        ("LLDP", lldp, true, false),
        ("LLDP elsewhere", frame([2; 6], 0x88cc), false, false),
        (
            "neighbour solicitation",
            icmp("fe80::1", "ff02::1:ff00:1", 135, 255, &[0; 16]),
            true,
            true,
        ),
        (
            "a solicitation from afar",
            icmp("fe80::1", "ff02::1:ff00:1", 135, 254, &[0; 16]),
            false,
            false,
        ),
        (
            "neighbour advertisement",
            icmp("fe80::1", "ff02::1", 136, 255, &FE80_1),
            true,
            true,
        ),
        (
            "router solicitation",
            icmp("fe80::1", "ff02::2", 133, 255, &[]),
            true,
            true,
        ),
        (
            "router advertisement",
            icmp("fe80::1", "ff02::1", 134, 255, &[0; 8]),
            true,
            false,
        ),
        ("MLD report", mld_report("fe80::1", 1, &[0; 20]), true, true),
        (
            "MLD from a global address",
            mld_report(WORLD_V6, 1, &[0; 20]),
            false,
            false,
        ),
        (
            "IGMP",
            raw("0.0.0.0", "224.0.0.22", 2, 1, &[0x16, 0, 0, 0, 224, 0, 0, 22]),
            true,
            true,
        ),
        (
            "IGMP to one address",
            raw(WORLD_V4, HOST_V4, 2, 1, &[0x22; 8]),
            false,
            false,
        ),
        (
            "IGMP from afar",
            raw(WORLD_V4, "224.0.0.22", 2, 2, &[0x22; 8]),
            false,
            false,
        ),
    ];
    for (role, endpoint, on_nic) in [(NIC, HOST, true), (WORKLOAD, A, false)] {
        let mut world = World::new(role, endpoint);
        for (name, frame, nic, workload) in &cases {
            for hook in ENTRIES {
                let got = world.run(hook, frame);
                let passes = if on_nic { *nic } else { *workload };
                assert_eq!(
                    got.passed, passes,
                    "{name} at {hook:?}, NIC {on_nic}: {:?}",
                    got.reason
                );
                assert_eq!(
                    got.reason == Reason::LinkControl,
                    passes,
                    "{name}: {:?}",
                    got.reason
                );
            }
        }
    }
}

#[test]
fn source_addresses_are_checked() {
    let mut world = World::new(NIC, HOST);
    for v6 in [false, true] {
        let [host, a, b, outside, _] = addresses(v6);
        for hook in ENTRIES {
            for spoofed in [host, a, b] {
                world.interface(NIC, HOST, 0);
                let got = world.run(hook, &tcp((spoofed, 4000), (host, 80), SYN));
                assert_eq!(got.reason, Reason::InvalidSourceIp, "{spoofed} from a NIC");
            }
            for spoofed in [host, b, outside] {
                world.interface(WORKLOAD, A, 0);
                let got = world.run(hook, &tcp((spoofed, 4000), (b, 80), SYN));
                assert_eq!(got.reason, Reason::InvalidSourceIp, "{spoofed} from a workload");
                assert_eq!(got.direction, EGRESS);
            }
        }
    }
}

#[test]
fn the_first_existing_key_decides() {
    let mut world = World::new(NIC, HOST);
    let frame = tcp((PREFIX_V4, 4000), (HOST_V4, 80), SYN);
    let keys = [
        (PREFIX_IDENTITY, 5),
        (PREFIX_IDENTITY, 0),
        (identity::ANY, 5),
        (identity::ANY, 0),
    ];
    for (index, &(identity, class)) in keys.iter().enumerate() {
        world.rule(
            HOST,
            INGRESS,
            identity,
            class,
            entry(Decision::DenyExplicit, 10 + index as u32),
        );
    }
    for (index, &(identity, class)) in keys.iter().enumerate() {
        let got = world.run(Hook::Xdp, &frame);
        assert_eq!(got.reason, Reason::PolicyDeniedByDenylist);
        let event = got.event(EventKind::PolicyVerdict).unwrap();
        assert_eq!(event.rule, 10 + index as u32);
        assert_eq!(event.source_identity, PREFIX_IDENTITY);
        assert_eq!(event.destination_identity, identity::HOST);
        world.remove_rule(HOST, INGRESS, identity, class);
    }
    assert_eq!(world.run(Hook::Xdp, &frame).reason, Reason::NoPolicy);
}

#[test]
fn an_unknown_address_is_the_world_of_its_family() {
    let mut world = World::new(NIC, HOST);
    for (v6, expected) in [(false, identity::WORLD_IPV4), (true, identity::WORLD_IPV6)] {
        let [host, _, _, outside, prefix] = addresses(v6);
        let got = world.run(Hook::Xdp, &tcp((outside, 4000), (host, 80), SYN));
        assert_eq!(got.event(EventKind::Drop).unwrap().source_identity, expected);
        let got = world.run(Hook::Xdp, &tcp((prefix, 4000), (host, 80), SYN));
        assert_eq!(
            got.event(EventKind::Drop).unwrap().source_identity,
            PREFIX_IDENTITY
        );
    }
}

#[test]
fn every_decision_has_its_reason() {
    let inspect = |inspector: Inspector| PolicyEntry {
        inspector: inspector as u8,
        ruleset: 1,
        ..entry(Decision::Inspect, 7)
    };
    let cases = [
        (entry(Decision::Allow, 7), Reason::Allowed),
        (entry(Decision::Deny, 7), Reason::PolicyDenied),
        (entry(Decision::DenyExplicit, 7), Reason::PolicyDeniedByDenylist),
        (entry(Decision::AuthRequired, 7), Reason::AuthRequired),
        (entry(Decision::DenyQuic, 7), Reason::QuicIntercepted),
        (inspect(Inspector::Http), Reason::NoHttpInspector),
        (inspect(Inspector::Dns), Reason::NoDnsInspector),
        (inspect(Inspector::Tls), Reason::NoTlsInspector),
        (inspect(Inspector::Kafka), Reason::NoKafkaInspector),
        (inspect(Inspector::Listener), Reason::NoListener),
        (inspect(Inspector::TlsTerminate), Reason::NoTlsTermination),
        (
            PolicyEntry {
                decision: 200,
                ..entry(Decision::Allow, 7)
            },
            Reason::PolicyDenied,
        ),
    ];
    let mut world = World::new(NIC, HOST);
    for (port, &(policy, reason)) in (4000..).zip(&cases) {
        for audit in [false, true] {
            let flags = if audit { entry_flags::AUDIT } else { 0 };
            world.rule(HOST, INGRESS, identity::ANY, 5, PolicyEntry { flags, ..policy });
            let port = port + if audit { 100 } else { 0 };
            let before = world.rule_counter(7).packets;
            let got = world.run(Hook::Xdp, &tcp((WORLD_V4, port), (HOST_V4, 80), SYN));
            let expected = if audit && reason.is_drop() {
                Reason::Audited
            } else {
                reason
            };
            assert_eq!(got.reason, expected);
            assert_eq!(world.rule_counter(7).packets, before + 1);
            let event = got.event(EventKind::PolicyVerdict).unwrap();
            assert_eq!((event.rule, event.decision), (7, policy.decision));
            assert_eq!(event.flags & event_flags::AUDIT != 0, expected == Reason::Audited);
            let flow = world.flow(&key(HOST, 6, (HOST_V4, 80), (WORLD_V4, port)));
            assert_eq!(flow.is_some(), got.passed);
            if let Some(flow) = flow {
                assert_eq!(flow.flags & ct_flags::AUDIT != 0, expected == Reason::Audited);
            }
        }
    }
}

#[test]
fn a_rule_beyond_the_counters_counts_at_zero() {
    let mut world = World::new(NIC, HOST);
    world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 5000));
    world.run(Hook::Xdp, &tcp((WORLD_V4, 4000), (HOST_V4, 80), SYN));
    assert_eq!(world.rule_counter(0).packets, 1);
}

#[test]
fn the_policy_of_the_node_is_evaluated_at_its_nic() {
    for v6 in [false, true] {
        let [host, a, _, outside, _] = addresses(v6);
        for hook in ENTRIES {
            let mut world = World::new(NIC, HOST);
            world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
            let got = world.run(hook, &tcp((outside, 4000), (host, 80), SYN));
            assert_eq!((got.reason, got.direction), (Reason::Allowed, INGRESS));
            let flow = world.flow(&key(HOST, 6, (host, 80), (outside, 4000))).unwrap();
            assert_eq!(flow.flags, ct_flags::INGRESS);
            assert_eq!((flow.rule, flow.revision, flow.ifindex), (7, 1, IFINDEX));
            let verdict = got.event(EventKind::PolicyVerdict).unwrap();
            assert_eq!((verdict.endpoint, verdict.reason), (HOST, Reason::Allowed as u8));
            assert_eq!(verdict.flags & event_flags::IPV6 != 0, v6);
            assert_eq!(verdict.source_mac, [2, 0, 0, 0, 0, 1]);
            assert_eq!(
                got.event(EventKind::Trace).unwrap().trace_point,
                TracePoint::Start as u8
            );
            // The reply and the next packet pass by the entry, without a rule for their direction.
            let got = world.run_local(&tcp((host, 80), (outside, 4000), SYN | ACK));
            assert_eq!((got.reason, got.direction), (Reason::Established, EGRESS));
            let got = world.run(hook, &tcp((outside, 4000), (host, 80), ACK));
            assert_eq!(got.reason, Reason::Established);
            assert_eq!(world.rule_counter(7).packets, 3);
            // Another port.
            let got = world.run(hook, &tcp((outside, 4000), (host, 81), SYN));
            assert_eq!(got.reason, Reason::PolicyDenied);
            // To a workload and to a host behind the node: not evaluated at the NIC.
            for other in [a, if v6 { "2001:db8:2::1" } else { "203.0.113.1" }] {
                let got = world.run(hook, &tcp((outside, 4000), (other, 80), SYN));
                assert_eq!(got.reason, Reason::Forwarded, "to {other}");
                assert!(got.events.is_empty());
            }
            // An address of the node that is only in the routing table, and multicast.
            for other in if v6 {
                ["fd00::99", "ff02::fb"]
            } else {
                ["10.0.0.99", "224.0.0.251"]
            } {
                let got = world.run(hook, &udp((outside, 5353), (other, 5353), &[0; 8]));
                assert_eq!(got.reason, Reason::PolicyDenied, "to {other}");
            }
        }
    }
}

#[test]
fn a_packet_that_leaves_by_a_nic_is_of_the_node_or_forwarded() {
    for v6 in [false, true] {
        let [host, a, _, outside, _] = addresses(v6);
        let mut world = World::new(NIC, HOST);
        world.set_interface(&interface(GUARDED, WORKLOAD, A));
        let got = world.run_entered(&tcp((a, 4000), (outside, 80), SYN), GUARDED);
        assert_eq!(got.reason, Reason::Forwarded);
        let got = world.run(Hook::TcOut, &tcp((host, 4000), (outside, 80), SYN));
        assert_eq!((got.reason, got.direction), (Reason::PolicyDenied, EGRESS));
        // Sent by the node with an address that is not its own.
        let got = world.run_local(&tcp((a, 4000), (outside, 80), SYN));
        assert_eq!(got.reason, Reason::Translated);
        world.rule(HOST, EGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
        let got = world.run_local(&tcp((host, 4000), (outside, 80), SYN));
        assert_eq!(got.reason, Reason::Allowed);
        let got = world.run(Hook::Xdp, &tcp((outside, 80), (host, 4000), SYN | ACK));
        assert_eq!(got.reason, Reason::Established);
    }
}

#[test]
fn the_policy_of_a_workload_is_evaluated_at_its_interface() {
    for v6 in [false, true] {
        let [_, a, b, outside, _] = addresses(v6);
        for hook in ENTRIES {
            let mut world = World::new(WORKLOAD, A);
            let got = world.run(hook, &tcp((a, 4000), (b, 80), SYN));
            assert_eq!((got.reason, got.direction), (Reason::PolicyDenied, EGRESS));
            world.rule(A, EGRESS, B_IDENTITY, 5, entry(Decision::Allow, 7));
            let got = world.run(hook, &tcp((a, 4000), (b, 80), SYN));
            assert_eq!(got.reason, Reason::Allowed);
            let flow = world.flow(&key(A, 6, (a, 4000), (b, 80))).unwrap();
            assert_eq!(flow.flags, ct_flags::REMOTE_IS_LOCAL);
            let event = got.event(EventKind::PolicyVerdict).unwrap();
            assert_eq!(
                (event.source_identity, event.destination_identity),
                (A_IDENTITY, B_IDENTITY)
            );
            assert_eq!(event.flags & event_flags::EGRESS, event_flags::EGRESS);
            assert_eq!(
                world.run(hook, &tcp((a, 4000), (outside, 80), SYN)).reason,
                Reason::PolicyDenied
            );
            // At the interface of the other workload the flow is evaluated as its ingress.
            world.interface(WORKLOAD, B, 0);
            let got = world.run(Hook::TcOut, &tcp((a, 4000), (b, 80), SYN));
            assert_eq!((got.reason, got.direction), (Reason::PolicyDenied, INGRESS));
            world.rule(B, INGRESS, A_IDENTITY, 5, entry(Decision::Allow, 8));
            assert_eq!(
                world.run(Hook::TcOut, &tcp((a, 4000), (b, 80), SYN)).reason,
                Reason::Allowed
            );
            assert_eq!(
                world.run(hook, &tcp((b, 80), (a, 4000), SYN | ACK)).reason,
                Reason::Established
            );
            world.interface(WORKLOAD, A, 0);
            assert_eq!(
                world.run(Hook::TcOut, &tcp((b, 80), (a, 4000), SYN | ACK)).reason,
                Reason::Established
            );
        }
    }
}

#[test]
fn between_a_workload_and_the_node_both_policies_are_evaluated() {
    for v6 in [false, true] {
        let [host, a, ..] = addresses(v6);
        for hook in ENTRIES {
            let mut world = World::new(WORKLOAD, A);
            world.rule(A, EGRESS, identity::HOST, 5, entry(Decision::Allow, 7));
            let got = world.run(hook, &tcp((a, 4000), (host, 80), SYN));
            assert_eq!((got.reason, got.direction), (Reason::PolicyDenied, INGRESS));
            assert_eq!(got.event(EventKind::Drop).unwrap().endpoint, HOST);
            world.rule(HOST, INGRESS, A_IDENTITY, 5, entry(Decision::Allow, 8));
            let got = world.run(hook, &tcp((a, 4001), (host, 80), SYN));
            assert_eq!(got.reason, Reason::Allowed);
            let flow = world.flow(&key(A, 6, (a, 4001), (host, 80))).unwrap();
            assert_eq!(flow.flags & ct_flags::REMOTE_IS_HOST, ct_flags::REMOTE_IS_HOST);
            let flow = world.flow(&key(HOST, 6, (host, 80), (a, 4001))).unwrap();
            assert_eq!(flow.flags, ct_flags::INGRESS | ct_flags::REMOTE_IS_LOCAL);
            let got = world.run_local(&tcp((host, 80), (a, 4001), SYN | ACK));
            assert_eq!(got.reason, Reason::Established);
            // When the node denies the flow, the established flow is dropped in both directions.
            world.rule(HOST, INGRESS, A_IDENTITY, 5, entry(Decision::Deny, 9));
            world.state(HOST, u32::from(HOST), 2, identity::HOST);
            let got = world.run(hook, &tcp((a, 4001), (host, 80), ACK));
            assert_eq!(got.reason, Reason::PolicyDenied);
            let got = world.run_local(&tcp((host, 80), (a, 4001), ACK));
            assert_eq!(got.reason, Reason::PolicyDenied);
            // Connections of the node to the workload: egress of the node and ingress of the workload.
            let got = world.run_local(&udp((host, 5000), (a, 80), &[1]));
            assert_eq!(got.reason, Reason::PolicyDenied);
            world.rule(A, INGRESS, identity::HOST, 5, entry(Decision::Allow, 10));
            let got = world.run_local(&udp((host, 5000), (a, 80), &[1]));
            assert_eq!((got.reason, got.direction), (Reason::PolicyDenied, EGRESS));
            world.rule(HOST, EGRESS, A_IDENTITY, 5, entry(Decision::Allow, 11));
            let got = world.run_local(&udp((host, 5000), (a, 80), &[1]));
            assert!(got.passed);
            assert_eq!(
                world.run(hook, &udp((a, 80), (host, 5000), &[1])).reason,
                Reason::Established
            );
            // The same flow cannot arrive at a NIC.
            world.interface(NIC, HOST, 0);
            let got = world.run(hook, &udp((a, 80), (host, 5000), &[1]));
            assert_eq!(got.reason, Reason::InvalidSourceIp);
        }
    }
}

#[test]
fn a_workload_does_not_reach_a_node_without_a_policy() {
    let mut world = World::new(WORKLOAD, A);
    world.rule(A, EGRESS, identity::HOST, 5, entry(Decision::Allow, 7));
    world.state(HOST, 0, 1, identity::HOST);
    let got = world.run(Hook::TcIn, &udp((A_V4, 4000), (HOST_V4, 80), &[]));
    assert_eq!(got.reason, Reason::NoPolicy);
    // The rule of the workload allowed the packet and is not reported as the cause of the drop.
    let drop = got.event(EventKind::Drop).unwrap();
    assert_eq!((drop.endpoint, drop.rule), (HOST, 0));
    assert_eq!(world.rule_counter(7).packets, 1);
}

#[test]
fn an_unconfigured_address_of_the_node_is_the_node() {
    let mut world = World::new(WORKLOAD, A);
    world.rule(A, EGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    for hook in ENTRIES {
        for (from, to) in [(A_V4, "10.0.0.99"), (A_V6, "fd00::99"), (A_V4, "224.0.0.251")] {
            let got = world.run(hook, &udp((from, 4000), (to, 80), &[]));
            assert_eq!(
                (got.reason, got.direction),
                (Reason::PolicyDenied, INGRESS),
                "{to}"
            );
        }
        assert!(world.run(hook, &udp((A_V4, 4000), (WORLD_V4, 80), &[])).passed);
    }
}

#[test]
fn a_device_without_ethernet_is_evaluated_from_the_ip_header() {
    let mut world = World::new(NIC, HOST);
    world.interface(NIC, HOST, interface_flags::LAYER3);
    world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    for (source, destination) in [(WORLD_V4, HOST_V4), (WORLD_V6, HOST_V6)] {
        let frame = udp((source, 4000), (destination, 80), &[]);
        for hook in ENTRIES {
            let got = world.run(hook, &frame[14..]);
            assert!(got.passed, "{:?}", got.reason);
        }
    }
    let got = world.run(Hook::Xdp, &[0; 60]);
    assert_eq!(got.reason, Reason::UnsupportedL3);
}

#[test]
fn a_frame_of_several_buffers_is_evaluated() {
    let mut world = World::new(NIC, HOST);
    world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    for (source, destination, header) in [(WORLD_V4, HOST_V4, 20), (WORLD_V6, HOST_V6, 40)] {
        let before = world.rule_counter(7).bytes;
        let frame = udp((source, 4000), (destination, 80), &[1; 8900]);
        assert_eq!(world.run(Hook::Xdp, &frame).reason, Reason::Allowed);
        assert_eq!(world.run(Hook::Xdp, &frame).reason, Reason::Established);
        assert_eq!(world.rule_counter(7).bytes - before, 2 * (header + 8 + 8900));
        // The IP header claims more bytes than the frame has.
        let got = world.run(Hook::Xdp, &frame[..9000 - 100]);
        assert!(
            matches!(got.reason, Reason::InvalidIpv4 | Reason::InvalidIpv6),
            "{:?}",
            got.reason
        );
    }
}

#[test]
fn events_are_rate_limited() {
    let mut world = World::new(NIC, HOST);
    world.config(|config| config.events_per_second = 3);
    let mut drops = 0;
    for port in 0..20 {
        let got = world.run(Hook::Xdp, &udp((WORLD_V4, 4000 + port), (HOST_V4, 81), &[]));
        drops += got
            .events
            .iter()
            .filter(|event| event.kind == EventKind::Drop as u8)
            .count();
    }
    // Three for each CPU on which the test ran, and again after a second.
    assert!((3..=3 * 2 * sys::possible_cpus()).contains(&drops), "{drops}");
    assert_eq!(
        world.suppressed(EventKind::Drop, Reason::PolicyDenied),
        20 - drops as u64
    );
}

#[test]
fn bytes_are_counted_from_the_network_header_without_padding() {
    let mut world = World::new(NIC, HOST);
    world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    let mut frame = udp((WORLD_V4, 4000), (HOST_V4, 80), &[1]);
    frame.resize(60, 0);
    world.run(Hook::Xdp, &frame);
    world.run(Hook::Xdp, &frame);
    assert_eq!(world.rule_counter(7).bytes, 2 * 29);
    let flow = world
        .flow(&key(HOST, 17, (HOST_V4, 80), (WORLD_V4, 4000)))
        .unwrap();
    assert_eq!((flow.forward_packets, flow.forward_bytes), (2, 2 * 29));
}
