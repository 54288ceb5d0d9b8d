//! Verdicts of the path: policies of both ends, conntrack, fragments, ICMP, link control, interfaces.

#[path = "../../packet/tests/packets/mod.rs"]
mod packets;

mod common;

use common::{A, AS, B, BS, HOST, HOSTS, Outcome, WORLDS, World, replay_with};
use packets::{ACK, FIN, RST, SYN, arp, echo, fragment, neighbour, segment, tcp, udp, unreachable};
use palisade_abi::{EventKind, Reason, TracePoint, event_flags};
use palisade_replay::capture::{Captured, LinkType, PathHint};

/// `b` accepts TCP port 80 from `a`; `a` may reach port 80 of `b`.
const WEB: &[(&str, &str, &str)] = &[
    (
        "to-b",
        "b",
        "  ingress: [{fromEndpoints: [{matchLabels: {app: a}}], toPorts: [{ports: [{port: '80', protocol: TCP}]}]}]",
    ),
    (
        "from-a",
        "a",
        "  egress: [{toEndpoints: [{matchLabels: {app: b}}], toPorts: [{ports: [{port: '80', protocol: TCP}, {port: '81', \
         protocol: TCP}]}]}]",
    ),
];

#[test]
fn a_packet_between_endpoints_gets_the_verdicts_of_both() {
    for (a, b) in AS.into_iter().zip(BS) {
        let mut world = World::new(WEB);
        let syn = world.send(&tcp((a, 4000), (b, 80), SYN));
        assert_eq!(syn.verdicts(), [(A, Reason::Allowed), (B, Reason::Allowed)]);
        assert_eq!(syn.drops(), []);
        // Egress denies it: the packet does not reach the other endpoint.
        let other = world.send(&tcp((a, 4000), (b, 443), SYN));
        assert_eq!(other.verdicts(), [(A, Reason::PolicyDenied)]);
        assert_eq!(other.drops(), [(A, Reason::PolicyDenied)]);
        // Egress allows it, ingress denies it.
        let other = world.send(&tcp((a, 4000), (b, 81), SYN));
        assert_eq!(
            other.verdicts(),
            [(A, Reason::Allowed), (B, Reason::PolicyDenied)]
        );
        let summary = world.replay.summary();
        assert_eq!(summary.flows, [3, 0, 2]);
        assert_eq!(summary.drops.values().sum::<u64>(), 2);
    }
}

#[test]
fn replies_and_errors_belong_to_their_flow() {
    for (a, b) in AS.into_iter().zip(BS) {
        let mut world = World::new(WEB);
        world.send(&tcp((a, 4000), (b, 80), SYN));
        for (frame, flags) in [
            (tcp((b, 80), (a, 4000), SYN | ACK), SYN | ACK),
            (tcp((a, 4000), (b, 80), ACK), ACK),
            (segment((a, 4000), (b, 80), ACK, b"x"), ACK),
        ] {
            let outcome = world.send(&frame);
            assert!(outcome.events.is_empty(), "{flags}: {outcome:?}");
        }
        let quoted = tcp((a, 4000), (b, 80), ACK);
        assert_eq!(world.send(&unreachable(b, a, &quoted)).drops(), []);
        // An error about another flow is dropped, where it is not allowed.
        let quoted = tcp((a, 4001), (b, 80), ACK);
        assert_eq!(world.send(&unreachable(b, a, &quoted)).drops(), []);
        let quoted = tcp((b, 80), (a, 4001), ACK);
        assert_eq!(
            world.send(&unreachable(a, b, &quoted)).drops(),
            [(A, Reason::UnrelatedIcmp)]
        );
        // Both ends close: the end is reported once for each endpoint.
        world.send(&tcp((a, 4000), (b, 80), FIN | ACK));
        let closed = world.send(&tcp((b, 80), (a, 4000), FIN | ACK));
        let ends: Vec<_> = closed
            .events
            .iter()
            .map(|event| (event.endpoint, event.trace_point))
            .collect();
        assert_eq!(ends, [(B, TracePoint::End as u8), (A, TracePoint::End as u8)]);
    }
}

#[test]
fn an_error_about_an_inspected_flow_that_the_programs_cannot_cut_is_dropped() {
    const HTTP: &[(&str, &str, &str)] = &[(
        "http",
        "a",
        "  egress: [{toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{method: GET}]}}]}]",
    )];
    for (a, server) in AS.into_iter().zip(WORLDS) {
        let mut world = World::new(HTTP);
        let syn = tcp((a, 4000), (server, 80), SYN);
        assert_eq!(world.send(&syn).verdicts(), [(A, Reason::Allowed)]);
        assert_eq!(world.send(&unreachable(server, a, &syn)).drops(), []);
        // The quoted header has options (IPv4), or a destination options header follows it (IPv6).
        let mut quoted = syn.clone();
        if a.contains(':') {
            quoted[14 + 6] = 60;
            quoted.splice(14 + 40..14 + 40, [6, 0, 1, 4, 0, 0, 0, 0]);
        } else {
            quoted[14] = 0x46;
            quoted.splice(14 + 20..14 + 20, [1, 1, 1, 1]);
        }
        assert_eq!(
            world.send(&unreachable(server, a, &quoted)).drops(),
            [(A, Reason::UnrelatedIcmp)]
        );
    }
}

#[test]
fn flows_expire_in_the_time_of_the_capture() {
    let dns = "  egress: [{toCIDR: [192.0.2.0/24], toPorts: [{ports: [{port: '53', protocol: UDP}]}]}]\n  ingress: [{fromEntities: [all]}]";
    let mut world = World::new(&[("dns", "a", dns), ("none", "b", "  ingress: [{}]")]);
    let query = udp((AS[0], 5000), (WORLDS[0], 53), b"q");
    let answer = udp((WORLDS[0], 53), (AS[0], 5000), b"a");
    assert_eq!(world.send(&query).verdicts(), [(A, Reason::Allowed)]);
    assert!(world.send(&answer).events.is_empty());
    world.wait(59);
    assert!(world.send(&answer).events.is_empty());
    world.wait(61);
    // The sweep reports the end of the silent flow, then the packet is a flow of its own.
    let later = world.send(&answer);
    let first = later.events.first().unwrap();
    assert_eq!(
        (first.kind, first.trace_point),
        (EventKind::Trace as u8, TracePoint::End as u8)
    );
    assert_eq!((first.forward_packets, first.reply_packets), (1, 2));
    assert_eq!(later.verdicts(), [(A, Reason::Allowed)]);
    let last = later.events.last().unwrap();
    assert_eq!(last.flags & (event_flags::EGRESS | event_flags::FLOW_EGRESS), 0);
}

#[test]
fn a_flow_from_the_middle_is_reported_as_such() {
    let mut world = World::new(WEB);
    let outcome = world.send(&segment((AS[0], 4000), (BS[0], 80), ACK, b"data"));
    assert_eq!(outcome.verdicts(), [(A, Reason::Allowed), (B, Reason::Allowed)]);
    let summary = world.replay.summary();
    assert_eq!(summary.midstream, 2);
    assert_eq!(
        summary.midstream_examples[0],
        (common::end(AS[0], 4000), common::end(BS[0], 80))
    );
    // Neither a SYN+ACK nor a reset begins a flow.
    let outcome = world.send(&tcp((BS[0], 80), (AS[0], 4001), SYN | ACK));
    assert_eq!(outcome.drops(), []);
    let outcome = world.send(&tcp((AS[0], 4002), (BS[0], 443), RST));
    assert_eq!(outcome.drops(), [(A, Reason::PolicyDenied)]);
}

#[test]
fn later_fragments_get_the_ports_of_the_first() {
    for (a, b) in AS.into_iter().zip(BS) {
        let udp_rule = "  egress: [{toPorts: [{ports: [{port: '53', protocol: UDP}]}]}]";
        let mut world = World::new(&[("dns", "a", udp_rule)]);
        let payload = |port: u16| {
            let mut bytes = 4000_u16.to_be_bytes().to_vec();
            bytes.extend(port.to_be_bytes());
            bytes.extend(40_u16.to_be_bytes());
            bytes.extend([0; 2]);
            bytes.resize(24, 0);
            bytes
        };
        let first = |id, port| fragment(a, b, 17, id, 0, true, &payload(port));
        let later = |id| fragment(a, b, 17, id, 3, false, &[0; 16]);
        assert_eq!(world.send(&later(7)).drops(), [(A, Reason::FragmentNotFound)]);
        assert_eq!(world.send(&first(8, 53)).drops(), []);
        assert_eq!(world.send(&later(8)).drops(), []);
        assert_eq!(world.send(&first(9, 54)).drops(), [(A, Reason::PolicyDenied)]);
        assert_eq!(world.send(&later(9)).drops(), [(A, Reason::PolicyDenied)]);
        world.wait(6);
        assert_eq!(world.send(&later(8)).drops(), [(A, Reason::FragmentNotFound)]);
    }
}

#[test]
fn fragments_at_different_interfaces_belong_to_different_datagrams() {
    let rule = "  egress: [{toPorts: [{ports: [{port: '53', protocol: UDP}]}]}]";
    let compiled = |settings: &mut palisade_replay::Settings| {
        let nic = settings.interfaces[0].clone();
        settings.interfaces.push(palisade_replay::Interface {
            name: "eth1".into(),
            index: 4,
            ..nic
        });
    };
    let mut world = World::of(replay_with(&[("dns", "a", rule)], compiled));
    let later = fragment(WORLDS[0], HOSTS[0], 17, 8, 3, false, &[0; 16]);
    let mut payload = 4000_u16.to_be_bytes().to_vec();
    payload.extend([0, 53, 0, 40, 0, 0]);
    payload.resize(24, 0);
    let first = fragment(WORLDS[0], HOSTS[0], 17, 8, 0, true, &payload);
    world.send_at("eth0", PathHint::Inbound, &first);
    let ports = |outcome: Outcome| outcome.events.iter().map(|event| event.destination_port).max();
    let known = world.send_at("eth0", PathHint::Inbound, &later);
    assert_eq!(ports(known), None, "the flow is known");
    let unknown = world.send_at("eth1", PathHint::Inbound, &later);
    assert_eq!(ports(unknown), Some(0));
}

#[test]
fn the_node_is_an_endpoint_too() {
    for ((a, host), world_address) in AS.into_iter().zip(HOSTS).zip(WORLDS) {
        let mut world = World::new(WEB);
        // Nothing enforces the node: its flows pass, at the NIC and at the workload.
        let out = world.send(&tcp((host, 4000), (world_address, 80), SYN));
        assert_eq!(out.verdicts(), [(HOST, Reason::Allowed)]);
        let inside = world.send(&tcp((world_address, 4000), (host, 22), SYN));
        assert_eq!(inside.verdicts(), [(HOST, Reason::Allowed)]);
        // From the node to a workload: both policies, at the interface of the workload.
        let both = world.send(&tcp((host, 4000), (a, 80), SYN));
        assert_eq!(both.verdicts(), [(A, Reason::Allowed), (HOST, Reason::Allowed)]);
        assert!(both.events.iter().all(|event| event.ifindex == 2));
        // Neither end is an endpoint.
        let foreign = world.send(&tcp(
            (world_address, 1),
            (WORLDS[usize::from(a.contains(':'))], 2),
            SYN,
        ));
        assert!(foreign.events.is_empty());
        assert_eq!(world.replay.summary().foreign, 1);
    }
}

#[test]
fn echo_needs_a_rule_and_its_reply_none() {
    for (a, b) in AS.into_iter().zip(BS) {
        let ping = "  ingress: [{fromEndpoints: [{}], icmps: [{fields: [{type: 8, family: IPv4}, {type: 128, family: \
                    IPv6}]}]}]";
        let mut world = World::new(&[("ping", "b", ping)]);
        assert_eq!(world.send(&echo(a, b, 9, false)).drops(), []);
        assert!(world.send(&echo(b, a, 9, true)).events.is_empty());
        let reply = world.send(&echo(a, b, 10, true));
        assert_eq!(reply.drops(), [(B, Reason::PolicyDenied)]);
    }
}

#[test]
fn a_named_interface_is_the_only_site() {
    let mut world = World::new(WEB);
    let frame = tcp((AS[0], 4000), (BS[0], 80), SYN);
    let at = |world: &mut World, interface, hint| -> Outcome { world.send_at(interface, hint, &frame) };
    assert_eq!(
        at(&mut world, "veth-a", PathHint::Unknown).verdicts(),
        [(A, Reason::Allowed)]
    );
    assert_eq!(
        at(&mut world, "veth-b", PathHint::Unknown).verdicts(),
        [(B, Reason::Allowed)]
    );
    // A workload must not use the address of another one.
    let spoofed = at(&mut world, "veth-b", PathHint::Inbound);
    assert_eq!(spoofed.drops(), [(B, Reason::InvalidSourceIp)]);
    let spoofed = at(&mut world, "eth0", PathHint::Inbound);
    assert_eq!(spoofed.drops(), [(HOST, Reason::InvalidSourceIp)]);
    // At a NIC the node forwards packets of workloads.
    assert!(at(&mut world, "eth0", PathHint::Outbound).events.is_empty());
    assert_eq!(world.replay.summary().forwarded, 1);
}

#[test]
fn link_control_passes_without_a_rule() {
    let closed = [("closed", "a", "  ingress: [{}]\n  egress: [{}]")];
    let mut world = World::new(&closed);
    let mut at = |frame: &[u8], hint| world.send_at("veth-a", hint, frame).drops();
    assert_eq!(at(&arp(1, AS[0], HOSTS[0]), PathHint::Inbound), []);
    assert_eq!(
        at(&arp(1, BS[0], HOSTS[0]), PathHint::Inbound),
        [(A, Reason::InvalidSourceIp)]
    );
    assert_eq!(
        at(
            &neighbour(135, AS[1], "ff02::1:ff00:1", "fd00::1"),
            PathHint::Inbound
        ),
        []
    );
    assert_eq!(
        at(
            &neighbour(135, BS[1], "ff02::1:ff00:1", "fd00::1"),
            PathHint::Inbound
        ),
        [(A, Reason::InvalidSourceIp)]
    );
    assert_eq!(
        at(&packets::frame([255; 6], 0x88cc), PathHint::Inbound),
        [(A, Reason::UnsupportedL3)]
    );
    // Without an interface, frames that are not IP get no verdict.
    assert!(world.send(&arp(1, AS[0], HOSTS[0])).events.is_empty());
    assert_eq!(world.replay.summary().not_ip, 1);
}

#[test]
fn malformed_and_truncated_packets_are_told_apart() {
    let mut world = World::new(WEB);
    let frame = tcp((AS[0], 4000), (BS[0], 80), SYN | FIN);
    assert_eq!(world.send(&frame).drops(), [(A, Reason::CtInvalidHeader)]);
    let frame = segment((AS[0], 4000), (BS[0], 80), SYN, &[0; 100]);
    let mut captured = |length| {
        world.packet(&Captured {
            time: Some(1),
            interface: 0,
            interface_name: "",
            link: LinkType::ETHERNET,
            hint: PathHint::Unknown,
            data: &frame[..length],
            length: frame.len() as u32,
        })
    };
    // The headers are enough for a verdict.
    assert_eq!(
        captured(60).verdicts(),
        [(A, Reason::Allowed), (B, Reason::Allowed)]
    );
    assert!(captured(40).events.is_empty());
    let summary = world.replay.summary();
    assert_eq!((summary.truncated, summary.undecodable), (2, 1));
}

#[test]
fn the_table_of_flows_is_bounded() {
    let mut world = World::of(replay_with(&[], |settings| settings.max_flows = 10));
    for port in 1..=50 {
        world.send(&tcp((AS[0], port), (WORLDS[0], 80), SYN));
    }
    let summary = world.replay.summary();
    assert_eq!((summary.open, summary.evicted), (10, 40));
}

#[test]
fn raw_and_cooked_packets_get_the_same_verdicts() {
    let mut world = World::new(WEB);
    let frame = tcp((AS[0], 4000), (BS[0], 443), SYN);
    let mut cooked = vec![0, 0, 0, 1, 0, 6, 2, 0, 0, 0, 0, 1, 0, 0, 8, 0];
    cooked.extend(&frame[14..]);
    for (link, data) in [(LinkType::RAW, &frame[14..]), (LinkType::LINUX_SLL, &cooked)] {
        let outcome = world.packet(&Captured {
            time: Some(1),
            interface: 0,
            interface_name: "",
            link,
            hint: PathHint::Unknown,
            data,
            length: data.len() as u32,
        });
        assert_eq!(outcome.drops(), [(A, Reason::PolicyDenied)]);
    }
}
