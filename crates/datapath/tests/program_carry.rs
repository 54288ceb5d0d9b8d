//! Packets that must be read: what the programs put before them, and when they are not carried.

mod program;

use palisade_abi::{
    Carried, Config, CtEntry, Decision, Direction, Inspector, MAX_CARRIED_FRAME, PolicyEntry, Reason,
    carry_flags, carry_hook, config_flags, entry_flags, identity,
};
use program::packets::*;
use program::*;

const INGRESS: Direction = Direction::Ingress;
const EGRESS: Direction = Direction::Egress;
const COOKIE: u64 = 0x1122_3344_5566_7788;
const MARK: u32 = 0x5a5a_0001;
const CLIENT: (&str, u16) = (WORLD_V4, 4000);
const SERVER: (&str, u16) = (HOST_V4, 80);

fn carrying(config: &mut Config) {
    config.cookie = COOKIE;
    config.worker_patience = 500_000_000;
    config.carrier = IFINDEX;
    config.workers = 1;
    config.mark = MARK;
    config.inspectors = 1 << Inspector::Dns as u32;
}

fn inspected(rule: u32, ruleset: u32) -> PolicyEntry {
    PolicyEntry {
        inspector: Inspector::Dns as u8,
        ruleset,
        ..entry(Decision::Inspect, rule)
    }
}

/// A node whose port 80 is read, with a worker that lives.
fn reading(role: u8, endpoint: u16) -> World {
    let world = World::new(role, endpoint);
    world.config(carrying);
    for id in [HOST, A] {
        for direction in [INGRESS, EGRESS] {
            world.rule(
                id,
                direction,
                identity::ANY,
                5,
                inspected(10 + u32::from(id), 20 + u32::from(id)),
            );
        }
    }
    world.beat(palisade_datapath::monotonic_coarse());
    world
}

fn carried(got: &Outcome, frame: &[u8]) -> Carried {
    assert!(got.carried, "{:?}", got.reason);
    let prefix = size_of::<Carried>();
    assert_eq!(got.frame[prefix..], *frame, "the frame itself is untouched");
    zerocopy::FromBytes::read_from_bytes(&got.frame[..prefix]).unwrap()
}

#[test]
fn what_stands_before_a_carried_packet() {
    for (hook, expected) in [
        (Hook::Xdp, carry_hook::XDP_INGRESS),
        (Hook::TcIn, carry_hook::TC_INGRESS),
    ] {
        for (client, server) in [(WORLD_V4, HOST_V4), (WORLD_V6, HOST_V6)] {
            let mut world = reading(NIC, HOST);
            let question = udp((client, 4000), (server, 80), b"question");
            let got = world.run(hook, &question);
            assert_eq!(got.reason, Reason::Allowed);
            let first = carried(&got, &question);
            assert_eq!(
                (first.cookie, first.ifindex, first.hook),
                (COOKIE, IFINDEX, expected)
            );
            let slot = first.slots[0];
            assert_eq!((slot.endpoint, slot.rule, slot.ruleset), (HOST, 11, 21));
            assert_eq!(
                (slot.inspector, slot.flags),
                (Inspector::Dns as u8, carry_flags::INGRESS | carry_flags::NEW)
            );
            assert_eq!(first.slots[1].endpoint, 0);
            let flow: CtEntry = world.flow(&key(HOST, 17, (server, 80), (client, 4000))).unwrap();
            assert_eq!(
                (flow.serial, flow.inspector, flow.ruleset),
                (slot.serial, Inspector::Dns as u8, 21)
            );
            // The answer: the same worker, the same connection, the other direction.
            let answer = udp((server, 80), (client, 4000), b"answer");
            let got = world.run_local(&answer);
            assert_eq!(got.reason, Reason::Established);
            let second = carried(&got, &answer);
            assert_eq!(
                (second.hash, second.slots[0].serial, second.hook),
                (first.hash, slot.serial, carry_hook::TC_EGRESS)
            );
            assert_eq!(second.slots[0].flags, carry_flags::REPLY);
        }
    }
}

#[test]
fn both_policies_ask() {
    let mut world = reading(WORKLOAD, A);
    let question = udp((A_V4, 4000), (HOST_V4, 80), b"question");
    let first = carried(&world.run(Hook::TcIn, &question), &question);
    assert_eq!(first.slots.map(|slot| slot.endpoint), [A, HOST]);
    assert_eq!(first.slots.map(|slot| slot.ruleset), [22, 21]);
    assert_eq!(first.slots[0].flags, carry_flags::NEW);
    assert_eq!(first.slots[1].flags, carry_flags::NEW | carry_flags::INGRESS);
    // Where only the node asks it is still the same worker.
    let mut world = reading(WORKLOAD, A);
    world.rule(A, EGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    let alone = carried(&world.run(Hook::TcIn, &question), &question);
    assert_eq!(alone.slots.map(|slot| slot.endpoint), [HOST, 0]);
    assert_eq!(alone.hash, first.hash);
}

#[test]
fn without_a_worker_nothing_passes_unless_that_is_wanted() {
    let question = udp(CLIENT, SERVER, b"question");
    for hook in ENTRIES {
        let mut world = reading(NIC, HOST);
        world.beat(palisade_datapath::monotonic_coarse() - 2_000_000_000);
        let got = world.run(hook, &question);
        assert_eq!((got.passed, got.reason), (false, Reason::NoWorker));
        // The flow that it made is no way round.
        assert_eq!(world.run(hook, &question).reason, Reason::NoWorker);
        world.config(|config| {
            carrying(config);
            config.flags = config_flags::PASS_WITHOUT_WORKER;
        });
        let got = world.run(hook, &question);
        assert!(got.passed && !got.carried);
        assert_eq!(got.reason, Reason::PassedUnread);
        world.beat(palisade_datapath::monotonic_coarse());
        carried(&world.run(hook, &question), &question);
    }
}

#[test]
fn what_cannot_be_carried() {
    for hook in ENTRIES {
        let mut world = reading(NIC, HOST);
        let fits = udp(CLIENT, SERVER, &vec![1; MAX_CARRIED_FRAME as usize - 42]);
        assert_eq!(fits.len(), MAX_CARRIED_FRAME as usize);
        carried(&world.run(hook, &fits), &fits);
        let longer = udp(CLIENT, SERVER, &vec![1; MAX_CARRIED_FRAME as usize - 41]);
        assert_eq!(world.run(hook, &longer).reason, Reason::CarryUnsupported);
        // What belongs to no flow.
        let got = world.run(hook, &tcp((WORLD_V4, 5000), SERVER, RST));
        assert_eq!(got.reason, Reason::CtInvalidState);
        // An inspector that does not exist.
        let mut world = reading(NIC, HOST);
        world.config(|config| {
            carrying(config);
            config.inspectors = 1 << Inspector::Http as u32;
        });
        let question = udp(CLIENT, SERVER, b"question");
        assert_eq!(world.run(hook, &question).reason, Reason::NoDnsInspector);
    }
}

#[test]
fn audit_reads_and_does_not_deny() {
    let mut world = reading(NIC, HOST);
    let audited = PolicyEntry {
        flags: entry_flags::AUDIT,
        ..inspected(11, 21)
    };
    world.rule(HOST, INGRESS, identity::ANY, 5, audited);
    let question = udp(CLIENT, SERVER, b"question");
    let first = carried(&world.run(Hook::Xdp, &question), &question);
    assert_eq!(
        first.slots[0].flags,
        carry_flags::INGRESS | carry_flags::NEW | carry_flags::AUDIT
    );
    // Without the inspector it passes as before.
    world.config(|config| {
        carrying(config);
        config.inspectors = 0;
    });
    let other = udp((WORLD_V4, 4001), SERVER, b"question");
    assert_eq!(world.run(Hook::Xdp, &other).reason, Reason::Audited);
}

#[test]
fn a_new_policy_changes_whether_a_live_flow_is_read() {
    let mut world = reading(NIC, HOST);
    world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    let question = udp(CLIENT, SERVER, b"question");
    assert!(!world.run(Hook::Xdp, &question).carried);
    world.rule(HOST, INGRESS, identity::ANY, 5, inspected(8, 33));
    world.state(HOST, u32::from(HOST), 2, identity::HOST);
    let got = world.run(Hook::Xdp, &question);
    assert_eq!(carried(&got, &question).slots[0].ruleset, 33);
    world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    world.state(HOST, u32::from(HOST), 3, identity::HOST);
    let got = world.run(Hook::Xdp, &question);
    assert!(got.passed && !got.carried);
}

#[test]
fn a_window_needs_no_reading() {
    let flow_key = key(HOST, 6, SERVER, CLIENT);
    // Every frame of these tests has sequence number 1000.
    let segment = |from: (&str, u16), to: (&str, u16), flags: u8, payload: &[u8]| {
        let mut frame = tcp(from, to, flags);
        let length = (frame.len() - 14 + payload.len()) as u16;
        frame[16..18].copy_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(payload);
        frame
    };
    let mut world = reading(NIC, HOST);
    assert!(world.run(Hook::Xdp, &tcp(CLIENT, SERVER, SYN)).carried);
    let data = segment(CLIENT, SERVER, ACK, &[7; 100]);
    let ack = |of: u32| {
        let mut frame = tcp((HOST_V4, 80), CLIENT, ACK);
        frame[42..46].copy_from_slice(&of.to_be_bytes());
        frame
    };
    assert!(world.run(Hook::Xdp, &data).carried);
    let mut windows = |from: u32, to: u32, of: u32| {
        let mut flow = world.flow(&flow_key).unwrap();
        flow.windows = [from, to, 0, 0];
        world.set_flow(&flow_key, &flow);
        let data_carried = world.run(Hook::Xdp, &data).carried;
        let ack_carried = world.run_local(&ack(of)).carried;
        (data_carried, ack_carried)
    };
    assert_eq!(windows(1000, 1100, 1000), (false, false));
    assert_eq!(windows(900, 2000, 1100), (false, false));
    // Wrapped round.
    assert_eq!(windows(0xffff_ff00, 1100, 5), (false, false));
    // One byte short, at either end.
    assert_eq!(windows(1001, 1100, 1001), (true, false));
    assert_eq!(windows(1000, 1099, 1098), (true, false));
    assert_eq!(windows(0, 0, 0), (true, true));
    // Half the space is no window.
    assert_eq!(windows(1000, 1000 + (1 << 31), 1000), (true, true));
    // The acknowledgement of all of it, and one of something else, are for the inspector.
    assert_eq!(windows(1000, 1100, 1099), (false, false));
    assert_eq!(windows(1000, 1100, 1100), (false, true));
    assert_eq!(windows(1000, 1100, 999), (false, true));
    for flags in [SYN | ACK, FIN | ACK, RST | ACK, 32 | ACK] {
        let mut frame = segment(CLIENT, SERVER, flags & !32, &[7; 100]);
        frame[14 + 20 + 13] |= flags & 32;
        assert!(world.run(Hook::Xdp, &frame).carried, "{flags:#x}");
    }
}

#[test]
fn what_comes_back_is_not_judged_again() {
    let mut world = reading(NIC, HOST);
    world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Deny, 9));
    let frame = udp(CLIENT, SERVER, b"question");
    assert_eq!(world.run(Hook::TcIn, &frame).reason, Reason::PolicyDenied);
    assert!(world.passes_marked(Hook::TcIn, &frame, MARK));
    assert!(!world.passes_marked(Hook::TcIn, &frame, MARK + 1));
}
