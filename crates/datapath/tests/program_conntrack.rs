//! Conntrack: states, timeouts, repeated policy evaluation.
#![allow(unsafe_code, reason = "system calls")]

mod program;

use palisade_abi::{
    CtEntry, Decision, Direction, EventKind, PolicyEntry, Reason, Share, TracePoint, ct_flags, entry_flags,
    event_flags, identity,
};
use program::packets::*;
use program::*;

const INGRESS: Direction = Direction::Ingress;
const EGRESS: Direction = Direction::Egress;
const SERVER: (&str, u16) = (HOST_V4, 80);
const CLIENT: (&str, u16) = (WORLD_V4, 4000);

/// A node that allows ingress to port 80 and denies everything else.
fn server() -> World {
    let world = World::new(NIC, HOST);
    world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    world
}

fn to_server(world: &mut World, flags: u8) -> Outcome {
    world.run(Hook::Xdp, &tcp(CLIENT, SERVER, flags))
}

fn from_server(world: &mut World, flags: u8) -> Outcome {
    world.run_local(&tcp(SERVER, CLIENT, flags))
}

fn flow(world: &World) -> CtEntry {
    world.flow(&key(HOST, 6, SERVER, CLIENT)).unwrap()
}

/// Returns the remaining lifetime of a flow after a packet, s.
fn seconds_left(entry: &CtEntry) -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: fills the given structure.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &mut now) };
    let left = entry.expires - (now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64);
    left.div_ceil(1_000_000_000)
}

#[test]
fn a_connection_passes_through_all_states() {
    let mut world = server();
    assert_eq!(to_server(&mut world, SYN).reason, Reason::Allowed);
    assert_eq!(seconds_left(&flow(&world)), 60);
    assert_eq!(from_server(&mut world, SYN | ACK).reason, Reason::Established);
    assert_eq!(to_server(&mut world, ACK).reason, Reason::Established);
    let entry = flow(&world);
    assert_eq!(seconds_left(&entry), 3600);
    assert_eq!(entry.flags, ct_flags::INGRESS | ct_flags::REPLIED);
    assert_eq!((entry.forward_packets, entry.reply_packets), (2, 1));
    assert_eq!((entry.forward_bytes, entry.reply_bytes), (80, 40));
    assert_eq!((entry.forward_tcp, entry.reply_tcp), (SYN | ACK, SYN | ACK));
    // A half-closed connection is still active.
    assert!(to_server(&mut world, FIN | ACK).events.is_empty());
    assert_eq!(seconds_left(&flow(&world)), 3600);
    let got = from_server(&mut world, FIN | ACK);
    assert_eq!(seconds_left(&flow(&world)), 10);
    let trace = got.event(EventKind::Trace).unwrap();
    assert_eq!(trace.trace_point, TracePoint::End as u8);
    assert_eq!((trace.forward_packets, trace.reply_packets), (3, 2));
    assert_eq!(
        trace.flags & (event_flags::REPLY | event_flags::EGRESS),
        event_flags::REPLY | event_flags::EGRESS
    );
    // The last acknowledgement passes, and the end is reported once.
    let got = to_server(&mut world, ACK);
    assert_eq!(got.reason, Reason::Established);
    assert!(got.events.is_empty());
}

#[test]
fn a_simultaneous_close_shortens_the_timeout() {
    let mut world = server();
    to_server(&mut world, SYN);
    from_server(&mut world, SYN | ACK);
    to_server(&mut world, ACK);
    for _ in 0..2 {
        assert!(to_server(&mut world, FIN | ACK).passed);
        assert!(from_server(&mut world, FIN | ACK).passed);
    }
    assert!(from_server(&mut world, ACK).passed);
    assert_eq!(seconds_left(&flow(&world)), 10);
}

#[test]
fn a_reset_shortens_the_timeout_until_the_next_valid_packet() {
    let mut world = server();
    to_server(&mut world, SYN);
    from_server(&mut world, SYN | ACK);
    to_server(&mut world, ACK);
    assert_eq!(to_server(&mut world, RST | ACK).reason, Reason::Established);
    assert_eq!(seconds_left(&flow(&world)), 10);
    // The peer may still send segments in flight.
    assert!(from_server(&mut world, ACK).passed);
    assert_eq!(seconds_left(&flow(&world)), 10);
    // An end that sends again has not sent the reset.
    assert!(to_server(&mut world, ACK).passed);
    assert_eq!(seconds_left(&flow(&world)), 3600);
}

#[test]
fn reused_ports_are_a_new_flow() {
    let mut world = server();
    to_server(&mut world, SYN);
    from_server(&mut world, RST | ACK);
    let got = to_server(&mut world, SYN);
    assert_eq!(got.reason, Reason::Allowed);
    assert!(got.event(EventKind::PolicyVerdict).is_some());
    let entry = flow(&world);
    assert_eq!(
        (entry.forward_packets, entry.reply_packets, entry.reply_tcp),
        (1, 0, 0)
    );
    // The current rules count: for an expired entry, a denied SYN is dropped.
    from_server(&mut world, RST | ACK);
    world.rule(HOST, INGRESS, identity::ANY, 5, entry_denied(9));
    assert_eq!(to_server(&mut world, SYN).reason, Reason::PolicyDenied);
}

fn entry_denied(rule: u32) -> PolicyEntry {
    entry(Decision::Deny, rule)
}

#[test]
fn a_retransmitted_syn_is_no_new_flow() {
    let mut world = server();
    to_server(&mut world, SYN);
    assert_eq!(to_server(&mut world, SYN).reason, Reason::Established);
    from_server(&mut world, SYN | ACK);
    to_server(&mut world, ACK);
    // The challenge ACK is sent by the server (RFC 5961, section 4).
    assert_eq!(to_server(&mut world, SYN).reason, Reason::Established);
    assert_eq!(flow(&world).forward_packets, 4);
}

#[test]
fn a_syn_of_the_responder_is_evaluated_as_a_new_flow() {
    let mut world = server();
    to_server(&mut world, SYN);
    from_server(&mut world, SYN | ACK);
    to_server(&mut world, ACK);
    assert_eq!(from_server(&mut world, SYN).reason, Reason::PolicyDenied);
    // The connection is unaffected.
    assert_eq!(from_server(&mut world, ACK).reason, Reason::Established);
    // If the policy allows it, it opens a flow of its own.
    world.rule(HOST, EGRESS, identity::ANY, 0, entry(Decision::Allow, 8));
    assert_eq!(from_server(&mut world, SYN).reason, Reason::Allowed);
    assert_eq!(flow(&world).flags & ct_flags::INGRESS, 0);
}

#[test]
fn a_simultaneous_open_is_one_flow() {
    let mut world = server();
    to_server(&mut world, SYN);
    assert_eq!(from_server(&mut world, SYN).reason, Reason::Established);
    assert_eq!(to_server(&mut world, SYN | ACK).reason, Reason::Established);
    assert_eq!(from_server(&mut world, SYN | ACK).reason, Reason::Established);
    assert_eq!(seconds_left(&flow(&world)), 3600);
    // The connection is open now; another SYN of the responder is not part of it.
    assert_eq!(from_server(&mut world, SYN).reason, Reason::PolicyDenied);
}

/// The source of a SYN may be forged, and so may that of an acknowledgement before the SYN+ACK.
#[test]
fn a_connection_is_established_when_its_opener_acknowledges_the_syn_ack() {
    let mut world = server();
    to_server(&mut world, SYN);
    to_server(&mut world, ACK);
    from_server(&mut world, SYN | ACK);
    from_server(&mut world, SYN | ACK);
    assert_eq!(seconds_left(&flow(&world)), 60);
    to_server(&mut world, SYN);
    assert_eq!(seconds_left(&flow(&world)), 60);
    to_server(&mut world, ACK);
    assert_eq!(seconds_left(&flow(&world)), 3600);
}

#[test]
fn a_syn_ack_opens_no_flow() {
    for (client, server) in [(WORLD_V4, HOST_V4), (WORLD_V6, HOST_V6)] {
        let (client, server) = ((client, 4000), (server, 80));
        let mut world = World::new(NIC, HOST);
        world.rule(HOST, EGRESS, identity::ANY, 0, entry(Decision::Allow, 8));
        // The SYN may have taken another path. Without inspection the SYN+ACK passes, and each later packet is
        // evaluated by itself.
        let answer = tcp(server, client, SYN | ACK);
        assert_eq!(world.run_local(&answer).reason, Reason::Allowed);
        assert!(world.flows().is_empty());
        assert_eq!(
            world.run(Hook::Xdp, &tcp(client, server, ACK)).reason,
            Reason::PolicyDenied
        );
        // If a deny rule matches the SYN, the SYN+ACK is dropped.
        world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::DenyExplicit, 9));
        assert_eq!(world.run_local(&answer).reason, Reason::CtInvalidState);
        // A packet in mid-stream opens no flow that would allow the denied direction.
        let data = segment(server, client, ACK, b"answer");
        assert_eq!(world.run_local(&data).reason, Reason::CtInvalidState);
        assert!(world.flows().is_empty());
        // UDP packets do not show which end opened the flow.
        assert_eq!(
            world.run_local(&udp(server, client, b"x")).reason,
            Reason::Allowed
        );
    }
}

#[test]
fn tcp_packets_without_a_flow_are_evaluated() {
    let mut world = server();
    // A packet in mid-stream that a rule allows continues an evicted flow.
    assert_eq!(to_server(&mut world, ACK).reason, Reason::Allowed);
    assert_eq!(flow(&world).flags & ct_flags::MIDSTREAM, ct_flags::MIDSTREAM);
    // Without such a rule it is denied; a SYN+ACK without a flow has its own reason.
    assert_eq!(
        world.run_local(&tcp((HOST_V4, 81), CLIENT, ACK)).reason,
        Reason::PolicyDenied
    );
    assert_eq!(
        world.run_local(&tcp((HOST_V4, 81), CLIENT, SYN | ACK)).reason,
        Reason::CtInvalidState
    );
    // A reset opens no flow.
    let got = world.run(Hook::Xdp, &tcp((WORLD_V4, 5000), SERVER, RST));
    assert_eq!(got.reason, Reason::Allowed);
    assert!(world.flow(&key(HOST, 6, SERVER, (WORLD_V4, 5000))).is_none());
}

#[test]
fn an_expired_flow_is_not_used() {
    let mut world = server();
    to_server(&mut world, SYN);
    let mut entry = flow(&world);
    entry.expires = 1;
    world.set_flow(&key(HOST, 6, SERVER, CLIENT), &entry);
    assert_eq!(from_server(&mut world, ACK).reason, Reason::PolicyDenied);
    assert_eq!(to_server(&mut world, ACK).reason, Reason::Allowed);
}

#[test]
fn flows_of_other_protocols_have_timeouts() {
    for (client, server) in [(WORLD_V4, HOST_V4), (WORLD_V6, HOST_V6)] {
        let mut world = World::new(NIC, HOST);
        world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
        world.rule(HOST, INGRESS, identity::ANY, 6, entry(Decision::Allow, 8));
        // UDP.
        assert_eq!(
            world
                .run(Hook::Xdp, &udp((client, 4000), (server, 80), &[1]))
                .reason,
            Reason::Allowed
        );
        assert_eq!(
            world.run_local(&udp((server, 80), (client, 4000), &[1])).reason,
            Reason::Established
        );
        assert_eq!(
            world.run_local(&udp((server, 80), (client, 4001), &[1])).reason,
            Reason::PolicyDenied
        );
        assert_eq!(
            seconds_left(&world.flow(&key(HOST, 17, (server, 80), (client, 4000))).unwrap()),
            60
        );
        // SCTP.
        let sctp = |source: u16, destination: u16| {
            let mut chunk = [0; 12];
            chunk[..2].copy_from_slice(&source.to_be_bytes());
            chunk[2..4].copy_from_slice(&destination.to_be_bytes());
            chunk
        };
        let got = world.run(Hook::Xdp, &raw(client, server, 132, 64, &sctp(4000, 80)));
        assert_eq!(got.reason, Reason::Allowed);
        let got = world.run_local(&raw(server, client, 132, 64, &sctp(80, 4000)));
        assert_eq!(got.reason, Reason::Established);
        // An echo reply passes only as the reply to a request; a request never passes as a reply.
        assert_eq!(
            world.run_local(&echo(server, client, 9, true)).reason,
            Reason::PolicyDenied
        );
        assert_eq!(
            world.run(Hook::Xdp, &echo(client, server, 9, false)).reason,
            Reason::Allowed
        );
        assert_eq!(
            world.run_local(&echo(server, client, 9, true)).reason,
            Reason::Established
        );
        assert_eq!(
            world.run_local(&echo(server, client, 10, true)).reason,
            Reason::PolicyDenied
        );
        assert_eq!(
            world.run_local(&echo(server, client, 9, false)).reason,
            Reason::PolicyDenied
        );
        let icmp_protocol = if client.contains(':') { 58 } else { 1 };
        let entry_key = key(HOST, icmp_protocol, (server, 9), (client, 1));
        assert_eq!(seconds_left(&world.flow(&entry_key).unwrap()), 30);
        // A protocol without ports.
        world.rule(HOST, EGRESS, identity::ANY, 0, entry(Decision::Allow, 9));
        assert_eq!(
            world.run(Hook::Xdp, &raw(client, server, 47, 64, &[0; 8])).reason,
            Reason::PolicyDenied
        );
        assert_eq!(
            world.run_local(&raw(server, client, 47, 64, &[0; 8])).reason,
            Reason::Allowed
        );
        assert_eq!(
            world.run(Hook::Xdp, &raw(client, server, 47, 64, &[0; 8])).reason,
            Reason::Established
        );
    }
}

#[test]
fn a_new_policy_is_evaluated_for_live_flows_in_their_original_direction() {
    for changed in ["rule", "deny", "audit"] {
        let mut world = server();
        to_server(&mut world, SYN);
        from_server(&mut world, SYN | ACK);
        // Egress is allowed completely, which must not allow an ingress flow.
        world.rule(HOST, EGRESS, identity::ANY, 0, entry(Decision::Allow, 20));
        // The same rule with a new revision is not reported.
        world.state(HOST, u32::from(HOST), 2, identity::HOST);
        let got = from_server(&mut world, ACK);
        assert_eq!(got.reason, Reason::Established);
        assert!(got.events.is_empty());
        assert_eq!(flow(&world).revision, 2);
        let new = match changed {
            "rule" => entry(Decision::Allow, 30),
            "deny" => entry(Decision::Deny, 30),
            _ => PolicyEntry {
                flags: entry_flags::AUDIT,
                ..entry(Decision::Deny, 30)
            },
        };
        world.rule(HOST, INGRESS, identity::ANY, 5, new);
        // Without a new revision the flow continues.
        assert_eq!(from_server(&mut world, ACK).reason, Reason::Established);
        world.state(HOST, u32::from(HOST), 3, identity::HOST);
        let got = from_server(&mut world, ACK);
        let verdict = *got.event(EventKind::PolicyVerdict).unwrap();
        assert_eq!((verdict.rule, verdict.decision), (30, new.decision));
        assert_eq!(verdict.flags & event_flags::REPLY, event_flags::REPLY);
        assert_eq!(verdict.flags & event_flags::FLOW_EGRESS, 0);
        if changed == "deny" {
            for _ in 0..2 {
                let got = from_server(&mut world, ACK);
                assert_eq!(got.reason, Reason::PolicyDenied);
                assert!(got.event(EventKind::PolicyVerdict).is_none(), "told once");
                assert_eq!(to_server(&mut world, ACK).reason, Reason::PolicyDenied);
            }
            // The flow continues when it is allowed again.
            world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
            world.state(HOST, u32::from(HOST), 4, identity::HOST);
            assert_eq!(to_server(&mut world, ACK).reason, Reason::Established);
        } else {
            assert_eq!(got.reason, Reason::Established);
            let entry = flow(&world);
            assert_eq!((entry.revision, entry.rule), (3, 30));
            assert_eq!(entry.flags & ct_flags::AUDIT != 0, changed == "audit");
        }
    }
}

#[test]
fn no_flow_of_an_endpoint_that_has_left_the_inventory_passes() {
    for denied_before in [false, true] {
        let mut world = server();
        to_server(&mut world, SYN);
        from_server(&mut world, SYN | ACK);
        if denied_before {
            world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Deny, 30));
            world.state(HOST, u32::from(HOST), 2, identity::HOST);
            assert_eq!(to_server(&mut world, ACK).reason, Reason::PolicyDenied);
        }
        // The state of an endpoint that does not exist: no table, revision 0, as a flow has that was denied.
        world.state(HOST, 0, 0, 0);
        for _ in 0..3 {
            assert_eq!(to_server(&mut world, ACK).reason, Reason::NoPolicy);
            assert_eq!(from_server(&mut world, ACK).reason, Reason::NoPolicy);
        }
    }
}

#[test]
fn an_active_flow_is_reported_at_intervals() {
    let mut world = server();
    world.config(|config| config.trace_interval = 1_000_000_000);
    to_server(&mut world, SYN);
    assert!(to_server(&mut world, ACK).events.is_empty());
    let mut entry = flow(&world);
    entry.reported -= 2_000_000_000;
    world.set_flow(&key(HOST, 6, SERVER, CLIENT), &entry);
    let got = to_server(&mut world, ACK);
    let trace = got.event(EventKind::Trace).unwrap();
    assert_eq!(
        (trace.trace_point, trace.forward_packets),
        (TracePoint::Interval as u8, 3)
    );
    assert_eq!((trace.rule, trace.source_identity), (7, identity::WORLD_IPV4));
    assert!(to_server(&mut world, ACK).events.is_empty());
}

#[test]
fn a_full_table_evicts_flows_and_denies_as_before() {
    let mut world = server();
    let room = 64;
    let mut world_small = World::with_conntrack(NIC, HOST, room);
    world_small.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    for port in 0..4 * room as u16 {
        let got = world_small.run(Hook::Xdp, &udp((WORLD_V4, 10_000 + port), (HOST_V4, 80), &[]));
        // Packets pass only by a rule; if the map is full for a moment, the packet is dropped.
        assert!(
            matches!(got.reason, Reason::Allowed | Reason::CtInsertionFailed),
            "{:?}",
            got.reason
        );
    }
    assert!(world_small.flows().len() <= room as usize);
    // Replies pass only for flows that are still in the map.
    let (mut answered, mut denied) = (0, 0);
    for port in 0..4 * room as u16 {
        match world_small
            .run_local(&udp((HOST_V4, 80), (WORLD_V4, 10_000 + port), &[]))
            .reason
        {
            Reason::Established => answered += 1,
            Reason::PolicyDenied => denied += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(answered > 0 && answered <= room, "{answered}");
    assert_eq!(answered + denied, 4 * room);
    assert!(to_server(&mut world, SYN).passed);
}

/// Returns the object with plain hash maps in the place of LRU hash maps, which reject entries instead of evicting.
/// (In BTF, the type of a map is the length of an array type: `[i32; BPF_MAP_TYPE_LRU_HASH]`.)
fn without_lru() -> Vec<u8> {
    const ARRAY: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0];
    const LRU_HASH: [u8; 4] = [9, 0, 0, 0];
    const HASH: [u8; 4] = [1, 0, 0, 0];
    let mut object = palisade_datapath::OBJECT.to_vec();
    let mut changed = 0;
    for at in (0..object.len() - 24).step_by(4) {
        if object[at..at + 12] == ARRAY && object[at + 20..at + 24] == LRU_HASH {
            object[at + 20..at + 24].copy_from_slice(&HASH);
            changed += 1;
        }
    }
    assert!(changed > 0);
    object
}

#[test]
fn a_flow_that_the_map_refuses_is_dropped() {
    let mut world = World::of(&without_lru(), NIC, HOST, 2);
    // The share is that of a larger map, so that no earlier flow is evicted.
    let share = Share {
        flows: 1000,
        flow_slots: 1000,
        ..Share::default()
    };
    world.set_share(HOST, INGRESS, share);
    world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    let mut reasons = Vec::new();
    for port in 4000..4004 {
        let got = world.run(Hook::Xdp, &udp((WORLD_V4, port), (HOST_V4, 80), &[]));
        assert_eq!(got.event(EventKind::Drop).is_some(), !got.passed);
        reasons.push(got.reason);
    }
    let refused = Reason::CtInsertionFailed;
    assert_eq!(reasons, [Reason::Allowed, Reason::Allowed, refused, refused]);
    // Flows in the map continue.
    assert_eq!(
        world
            .run(Hook::Xdp, &udp((WORLD_V4, 4001), (HOST_V4, 80), &[]))
            .reason,
        Reason::Established
    );
}
