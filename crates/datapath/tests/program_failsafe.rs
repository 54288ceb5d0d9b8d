//! Failsafe ports of the node in the programs: which packets pass before the policy, and which do not.

mod program;

use palisade_abi::{
    CtEntry, Decision, Direction, EventKind, Inspector, PolicyEntry, Reason, class_slot, ct_flags,
    entry_flags, event_flags, identity, interface_flags, protocol,
};
use program::packets::*;
use program::*;

const INGRESS: Direction = Direction::Ingress;
const EGRESS: Direction = Direction::Egress;
const SSH: u16 = 5;
const DNS: u16 = 6;

fn failsafe(rule: u32) -> PolicyEntry {
    PolicyEntry {
        flags: entry_flags::FAILSAFE,
        ..entry(Decision::Allow, rule)
    }
}

/// The node denies everything but failsafe tcp/22 inbound (rule 20) and udp/53 outbound (rule 21).
fn world(role: u8, endpoint: u16) -> World {
    let world = World::new(role, endpoint);
    world.classes(&[
        (class_slot(protocol::TCP, 22), SSH),
        (class_slot(protocol::UDP, 53), DNS),
    ]);
    for direction in [INGRESS, EGRESS] {
        world.rule(
            HOST,
            direction,
            identity::ANY,
            0,
            entry(Decision::DenyExplicit, 9),
        );
        world.rule_inside(
            HOST,
            direction,
            identity::ANY,
            0,
            entry(Decision::DenyExplicit, 9),
        );
    }
    world.rule(HOST, INGRESS, identity::ANY, SSH, failsafe(20));
    world.rule(HOST, EGRESS, identity::ANY, DNS, failsafe(21));
    world
}

const PAIRS: [(&str, &str, &str); 2] = [(HOST_V4, WORLD_V4, A_V4), (HOST_V6, WORLD_V6, A_V6)];

#[test]
fn a_failsafe_port_passes_at_a_nic_with_its_own_reason_rule_and_counter() {
    for (host, peer, _) in PAIRS {
        for hook in ENTRIES {
            let mut world = world(NIC, HOST);
            let got = world.run(hook, &tcp((peer, 4000), (host, 22), SYN));
            assert_eq!(got.reason, Reason::Failsafe);
            let event = got.event(EventKind::PolicyVerdict).unwrap();
            assert_eq!((event.rule, event.reason), (20, Reason::Failsafe as u8));
            assert_eq!(event.flags & event_flags::AUDIT, 0);
            assert_eq!(world.rule_counter(20).packets, 1);
            // The connection continues by conntrack, in both directions.
            let got = world.run_local(&tcp((host, 22), (peer, 4000), SYN | ACK));
            assert_eq!(got.reason, Reason::Established);
            let got = world.run(hook, &tcp((peer, 4000), (host, 22), ACK));
            assert_eq!(got.reason, Reason::Established);
            // No other port or protocol.
            for frame in [
                tcp((peer, 4000), (host, 23), SYN),
                udp((peer, 4000), (host, 22), b"x"),
                udp((peer, 4000), (host, 53), b"x"),
            ] {
                let got = world.run(hook, &frame);
                assert_eq!(got.reason, Reason::PolicyDeniedByDenylist);
            }
        }
    }
}

#[test]
fn an_outbound_failsafe_port_opens_no_way_in_from_that_port() {
    for (host, peer, _) in PAIRS {
        let mut world = world(NIC, HOST);
        // The peer sends first, from the failsafe port.
        for port in [8080, 40_000] {
            let got = world.run(Hook::Xdp, &udp((peer, 53), (host, port), b"x"));
            assert_eq!(got.reason, Reason::PolicyDeniedByDenylist);
        }
        // An answer to a query of the node passes, to the port of the query only.
        let got = world.run_local(&udp((host, 40_000), (peer, 53), b"x"));
        assert_eq!(got.reason, Reason::Failsafe);
        let got = world.run(Hook::Xdp, &udp((peer, 53), (host, 40_000), b"x"));
        assert_eq!(got.reason, Reason::Established);
        let got = world.run(Hook::Xdp, &udp((peer, 53), (host, 40_001), b"x"));
        assert_eq!(got.reason, Reason::PolicyDeniedByDenylist);
        // The node answers no query of a peer by that rule.
        let got = world.run_local(&udp((host, 53), (peer, 40_000), b"x"));
        assert_eq!(got.reason, Reason::PolicyDeniedByDenylist);
    }
}

#[test]
fn workloads_do_not_pass_by_a_failsafe_port_of_the_node() {
    for (host, _, workload) in PAIRS {
        let mut world = world(WORKLOAD, A);
        world.address(workload, A, A_IDENTITY);
        for direction in [INGRESS, EGRESS] {
            world.rule(A, direction, identity::ANY, 0, entry(Decision::Allow, 1));
        }
        let got = world.run(Hook::TcIn, &tcp((workload, 4000), (host, 22), SYN));
        assert_eq!(got.reason, Reason::PolicyDeniedByDenylist);
        let got = world.run_local(&udp((host, 4000), (workload, 53), b"x"));
        assert_eq!(got.reason, Reason::PolicyDeniedByDenylist);
        // What the policy allows to workloads stays allowed.
        world.rule_inside(HOST, INGRESS, A_IDENTITY, SSH, entry(Decision::Allow, 8));
        let got = world.run(Hook::TcIn, &tcp((workload, 4001), (host, 22), SYN));
        assert!(got.passed && got.reason != Reason::Failsafe, "{:?}", got.reason);
    }
}

#[test]
fn failsafe_ports_do_not_pass_at_a_nic_without_them() {
    for (host, peer, _) in PAIRS {
        for hook in ENTRIES {
            let mut world = world(NIC, HOST);
            world.interface(NIC, HOST, interface_flags::NO_FAILSAFE);
            let got = world.run(hook, &tcp((peer, 4000), (host, 22), SYN));
            assert_eq!(got.reason, Reason::PolicyDeniedByDenylist);
            let got = world.run_local(&udp((host, 40_000), (peer, 53), b"x"));
            assert_eq!(got.reason, Reason::PolicyDeniedByDenylist);
            assert_eq!(world.rule_counter(20).packets + world.rule_counter(21).packets, 0);
            // What the policy allows without a failsafe port passes here too.
            world.rule_inside(HOST, INGRESS, identity::ANY, SSH, entry(Decision::Allow, 22));
            let got = world.run(hook, &tcp((peer, 4001), (host, 22), SYN));
            assert_eq!(got.reason, Reason::Allowed);
            assert_eq!(world.rule_counter(22).packets, 1);
        }
    }
}

#[test]
fn spoofed_sources_stay_dropped_and_forwarded_packets_get_no_failsafe_verdict() {
    for (host, peer, workload) in PAIRS {
        let mut world = world(NIC, HOST);
        world.address(workload, A, A_IDENTITY);
        for source in [host, workload] {
            let got = world.run(Hook::Xdp, &tcp((source, 4000), (host, 22), SYN));
            assert_eq!(got.reason, Reason::InvalidSourceIp);
        }
        let got = world.run(Hook::Xdp, &tcp((peer, 4000), (workload, 22), SYN));
        assert_ne!(got.reason, Reason::Failsafe);
    }
}

/// A packet from a NIC must not give a failsafe verdict to a flow between the node and a workload, by which the workload
/// would then pass.
#[test]
fn packets_from_a_nic_renew_no_verdict_on_a_flow_of_a_workload() {
    for (host, peer, workload) in PAIRS {
        let mut world = world(NIC, HOST);
        world.address(workload, A, A_IDENTITY);
        world.run(Hook::Xdp, &tcp((peer, 4000), (host, 22), SYN));
        let mut flow = world.flow(&key(HOST, 6, (host, 22), (peer, 4000))).unwrap();
        // A change of policy has denied the flow of the workload.
        flow.revision = 0;
        flow.flags |= ct_flags::REMOTE_IS_LOCAL;
        let of_workload = key(HOST, 6, (host, 22), (workload, 4000));
        world.set_flow(&of_workload, &flow);
        let answer = tcp((host, 22), (workload, 4000), ACK);
        for frame in [
            tcp((workload, 4000), (host, 22), ACK),
            unreachable(peer, host, &answer),
        ] {
            let got = world.run(Hook::Xdp, &frame);
            assert!(!got.passed, "{:?}", got.reason);
            assert_eq!(world.flow(&of_workload).unwrap().revision, 0);
        }
    }
}

#[test]
fn a_flow_that_a_packet_from_a_nic_has_opened_gives_workloads_nothing() {
    for (host, _, workload) in PAIRS {
        let mut world = world(WORKLOAD, A);
        world.address(workload, A, A_IDENTITY);
        for direction in [INGRESS, EGRESS] {
            world.rule(A, direction, identity::ANY, 0, entry(Decision::Allow, 1));
        }
        world.rule_inside(HOST, INGRESS, A_IDENTITY, SSH, entry(Decision::Allow, 8));
        world.run(Hook::TcIn, &tcp((workload, 4000), (host, 22), SYN));
        let of_node = key(HOST, 6, (host, 22), (workload, 4000));
        let mut flow = world.flow(&of_node).unwrap();
        assert_ne!(flow.flags & ct_flags::REMOTE_IS_LOCAL, 0);
        // As a packet with this source at a NIC would have made it.
        flow.flags &= !ct_flags::REMOTE_IS_LOCAL;
        world.set_flow(&of_node, &flow);
        world.rule_inside(HOST, INGRESS, A_IDENTITY, SSH, entry(Decision::DenyExplicit, 8));
        let got = world.run(Hook::TcIn, &tcp((workload, 4000), (host, 22), ACK));
        assert_eq!(got.reason, Reason::PolicyDeniedByDenylist);
    }
}

/// Otherwise the workload could have the flow marked as its own, and packets of the real peer would be dropped.
#[test]
fn a_workload_reports_no_error_about_a_flow_of_the_node_with_another_peer() {
    for (host, peer, workload) in PAIRS {
        let mut world = world(WORKLOAD, A);
        world.address(workload, A, A_IDENTITY);
        world.rule(A, EGRESS, identity::ANY, 0, entry(Decision::Allow, 1));
        world.rule_inside(HOST, INGRESS, A_IDENTITY, SSH, entry(Decision::Allow, 8));
        world.run(Hook::TcIn, &tcp((workload, 4000), (host, 22), SYN));
        let flow = world.flow(&key(HOST, 6, (host, 22), (workload, 4000))).unwrap();
        let of_peer = key(HOST, 6, (host, 22), (peer, 4000));
        let flow = CtEntry {
            flags: flow.flags & !ct_flags::REMOTE_IS_LOCAL,
            revision: 0,
            ..flow
        };
        world.set_flow(&of_peer, &flow);
        let sent = tcp((host, 22), (peer, 4000), ACK);
        let got = world.run(Hook::TcIn, &unreachable(workload, host, &sent));
        assert!(!got.passed, "{:?}", got.reason);
        let after = world.flow(&of_peer).unwrap();
        assert_eq!((after.revision, after.flags), (0, flow.flags));
    }
}

#[test]
fn icmp_errors_do_not_pass_as_a_failsafe_port() {
    for (host, peer, _) in PAIRS {
        let mut world = world(NIC, HOST);
        let number = if host == HOST_V4 {
            protocol::ICMP
        } else {
            protocol::ICMPV6
        };
        // Destination unreachable without a quote.
        let kind = if number == protocol::ICMP { 3 } else { 1 };
        let got = world.run(
            Hook::Xdp,
            &raw(peer, host, number, 64, &[kind, 1, 0, 0, 0, 0, 0, 0]),
        );
        assert!(!got.passed);
    }
}

#[test]
fn a_failsafe_flow_is_not_inspected_and_survives_a_change_of_policy() {
    for (host, peer, _) in PAIRS {
        let mut world = world(NIC, HOST);
        world.rule_inside(
            HOST,
            INGRESS,
            identity::ANY,
            SSH,
            PolicyEntry {
                inspector: Inspector::Http as u8,
                ruleset: 3,
                ..entry(Decision::Inspect, 12)
            },
        );
        let got = world.run(Hook::Xdp, &tcp((peer, 4000), (host, 22), SYN));
        assert_eq!((got.reason, got.carried), (Reason::Failsafe, false));
        world.run_local(&tcp((host, 22), (peer, 4000), SYN | ACK));
        // A new revision: the flow is evaluated again, by packets of both directions.
        for (revision, inbound) in [(11, true), (13, false)] {
            world.state(HOST, u32::from(HOST), revision, identity::HOST);
            let got = if inbound {
                world.run(Hook::Xdp, &tcp((peer, 4000), (host, 22), ACK))
            } else {
                world.run_local(&tcp((host, 22), (peer, 4000), ACK))
            };
            assert_eq!(got.reason, Reason::Established);
        }
        // Without the failsafe port, the policy denies it.
        world.rule(
            HOST,
            INGRESS,
            identity::ANY,
            SSH,
            entry(Decision::DenyExplicit, 9),
        );
        world.state(HOST, u32::from(HOST), 15, identity::HOST);
        let got = world.run(Hook::Xdp, &tcp((peer, 4000), (host, 22), ACK));
        assert_eq!(got.reason, Reason::PolicyDeniedByDenylist);
    }
}

#[test]
fn a_packet_in_mid_stream_to_a_failsafe_port_passes_though_the_other_direction_is_denied() {
    for (host, peer, _) in PAIRS {
        let mut world = world(NIC, HOST);
        let got = world.run(Hook::Xdp, &tcp((peer, 4000), (host, 22), ACK));
        assert_eq!(got.reason, Reason::Failsafe);
    }
}
