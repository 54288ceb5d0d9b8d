//! Programs that copy packets for a capture: they give the verdicts of the ordinary programs, and copy each packet as it
//! came.

mod program;

use palisade_abi::{
    CaptureCondition, CaptureEnd, CaptureHeader, CaptureSettings, Config, Decision, Direction, EventKind,
    Inspector, PolicyEntry, Reason, capture_flags, captured_flags, event_flags, identity, punt_hook,
};
use palisade_datapath::{CAPTURE_OBJECT, OBJECT};
use program::packets::*;
use program::*;

/// A place at which frames run: hook, and whether the node itself sent them.
type Run = fn(&mut World, &[u8]) -> Outcome;

const XDP: Run = |world, frame| world.run(Hook::Xdp, frame);
const IN: Run = |world, frame| world.run(Hook::TcIn, frame);
const OUT: Run = |world, frame| world.run_local(frame);

/// A node whose ingress to port 80 has a policy entry, with a live worker.
fn world(object: &[u8], role: u8, endpoint: u16, entry: PolicyEntry) -> World {
    let world = World::of(object, role, endpoint, 1024);
    world.config(|config: &mut Config| {
        config.cookie = 0x1122_3344_5566_7788;
        config.worker_timeout = 60_000_000_000;
        config.punt_ifindex = IFINDEX;
        config.workers = 1;
        config.inspectors = 1 << Inspector::Dns as u32;
    });
    set_rules(&world, entry);
    world.beat(palisade_datapath::monotonic_coarse());
    world
}

fn set_rules(world: &World, entry: PolicyEntry) {
    for id in [HOST, A] {
        world.rule(id, Direction::Ingress, identity::ANY, 5, entry);
        world.rule(id, Direction::Egress, identity::ANY, 5, entry);
    }
}

fn everything() -> CaptureSettings {
    CaptureSettings::all(u64::MAX, 65_536)
}

fn only(condition: CaptureCondition) -> CaptureSettings {
    CaptureSettings {
        conditions: [condition; 2],
        ..everything()
    }
}

fn allowed() -> PolicyEntry {
    entry(Decision::Allow, 7)
}

fn inspected() -> PolicyEntry {
    PolicyEntry {
        inspector: Inspector::Dns as u8,
        ruleset: 3,
        ..entry(Decision::Inspect, 8)
    }
}

/// Frames of flows, malformed frames, link control, fragments and ICMP errors.
fn frames(client: &str, server: &str) -> Vec<Vec<u8>> {
    let (from, to) = ((client, 4000), (server, 80));
    let syn = tcp(from, to, SYN);
    let mut frames = vec![
        syn.clone(),
        syn[..syn.len() - 2].to_vec(),
        tcp(to, from, SYN | ACK),
        tcp(from, to, ACK),
        segment(from, to, ACK, &[7; 1200]),
        segment(from, to, ACK, &[7; 1]),
        tcp(from, (server, 81), SYN),
        tcp(from, to, SYN | 1),
        udp(from, to, b"a question"),
        udp((client, 4001), (server, 9), b""),
        echo(client, server, 5, false),
        raw(client, server, 47, 64, &[1; 40]),
        unreachable(client, server, &udp((server, 80), (client, 4000), b"answer")),
        tagged(&syn, &[5]),
        tagged(&syn, &[5, 6, 7]),
        frame([0xff; 6], 0x88cc),
        vec![0; 60],
    ];
    if client.contains(':') {
        frames.push(neighbour(135, client, server, server));
    } else {
        frames.push(arp(1, client, server));
    }
    frames
}

#[test]
fn verdicts_are_the_same_with_and_without_a_capture() {
    let mut punted = 0;
    let mut worlds =
        [OBJECT, CAPTURE_OBJECT, CAPTURE_OBJECT].map(|object| world(object, NIC, HOST, allowed()));
    worlds[2].capture(&everything());
    let [plain, idle, capturing] = &mut worlds;
    for entry in [allowed(), inspected()] {
        for (role, endpoint, run) in [
            (NIC, HOST, XDP),
            (NIC, HOST, IN),
            (NIC, HOST, OUT),
            (WORKLOAD, A, XDP),
            (WORKLOAD, A, IN),
        ] {
            for (client, server) in [(WORLD_V4, HOST_V4), (WORLD_V6, HOST_V6), (A_V4, HOST_V4)] {
                for world in [&mut *plain, &mut *idle, &mut *capturing] {
                    set_rules(world, entry);
                    world.interface(role, endpoint, 0);
                    world.forget_flows();
                }
                for frame in frames(client, server) {
                    let expected = run(plain, &frame);
                    for other in [&mut *idle, &mut *capturing] {
                        let got = run(other, &frame);
                        assert_eq!(
                            (got.passed, got.carried, got.reason, got.direction),
                            (
                                expected.passed,
                                expected.carried,
                                expected.reason,
                                expected.direction
                            ),
                            "{frame:02x?}"
                        );
                        // A punted frame has the random serial of its flow in its punt header.
                        if !got.carried {
                            assert_eq!(got.frame, expected.frame);
                        }
                        assert_eq!(got.events.len(), expected.events.len());
                    }
                    punted += u32::from(expected.carried);
                    let records = capturing.take_captured();
                    let [(header, bytes)] = &records[..] else {
                        panic!("one record for one packet: {}", records.len());
                    };
                    assert_eq!(*bytes, frame, "the packet as it came");
                    assert_eq!(header.frame_length as usize, frame.len());
                    assert_eq!(header.event.reason, expected.reason as u8);
                    assert_eq!(header.flags & captured_flags::PUNTED != 0, expected.carried);
                    assert_eq!(header.event.kind == EventKind::Drop as u8, !expected.passed);
                    assert!(idle.take_captured().is_empty());
                }
            }
        }
    }
    assert!(punted > 10, "{punted}");
}

/// Returns the record of one packet.
fn one(world: &mut World, run: Run, frame: &[u8]) -> CaptureHeader {
    run(world, frame);
    let records = world.take_captured();
    assert_eq!(records.len(), 1);
    records[0].0
}

#[test]
fn a_record_names_rule_direction_and_hook_of_new_and_known_flows() {
    for (client, server) in [(WORLD_V4, HOST_V4), (WORLD_V6, HOST_V6)] {
        let mut world = world(CAPTURE_OBJECT, NIC, HOST, allowed());
        world.capture(&everything());
        let syn = one(&mut world, XDP, &tcp((client, 4000), (server, 80), SYN));
        assert_eq!(
            (syn.event.kind, syn.event.rule),
            (EventKind::PolicyVerdict as u8, 7)
        );
        assert_eq!(syn.hook, punt_hook::XDP_INGRESS);
        let answer = one(&mut world, OUT, &tcp((server, 80), (client, 4000), SYN | ACK));
        assert_eq!(
            (answer.event.kind, answer.event.rule),
            (EventKind::Trace as u8, 7)
        );
        assert_eq!(answer.event.reason, Reason::Established as u8);
        assert_eq!(answer.hook, punt_hook::TC_EGRESS);
        assert_ne!(answer.event.flags & event_flags::REPLY, 0);
        assert_ne!(answer.event.flags & event_flags::EGRESS, 0);
        let denied = one(&mut world, IN, &tcp((client, 4000), (server, 81), SYN));
        assert_eq!((denied.event.kind, denied.event.rule), (EventKind::Drop as u8, 1));
        assert_eq!(denied.event.reason, Reason::PolicyDenied as u8);
        assert_eq!(denied.hook, punt_hook::TC_INGRESS);
    }
}

#[test]
fn an_icmp_error_is_captured_before_it_is_cut() {
    for (client, server) in [(WORLD_V4, HOST_V4), (WORLD_V6, HOST_V6)] {
        for run in [XDP, IN] {
            let mut world = world(CAPTURE_OBJECT, NIC, HOST, inspected());
            world.capture(&everything());
            one(&mut world, run, &udp((client, 4000), (server, 80), b"question"));
            let quoted = udp((server, 80), (client, 4000), &[9; 100]);
            let error = unreachable(client, server, &quoted);
            let got = run(&mut world, &error);
            assert_eq!(got.reason, Reason::Related);
            assert!(got.frame.len() < error.len());
            let (header, bytes) = world.take_captured().remove(0);
            assert_eq!(bytes, error);
            assert_ne!(header.event.flags & event_flags::RELATED, 0);
        }
    }
}

#[test]
fn a_capture_of_drops_has_an_icmp_error_as_it_was_before_it_was_cut() {
    for (client, server) in [(WORLD_V4, HOST_V4), (WORLD_V6, HOST_V6)] {
        for run in [XDP, IN] {
            let mut world = world(CAPTURE_OBJECT, NIC, HOST, inspected());
            world.capture(&only(CaptureCondition {
                flags: capture_flags::DROPS_ONLY,
                ..CaptureCondition::ANY
            }));
            let (from, to) = ((client, 4000), (server, 80));
            assert!(run(&mut world, &tcp(from, to, SYN)).carried);
            let error = unreachable(client, server, &segment(to, from, ACK, &[9; 100]));
            assert!(run(&mut world, &error).carried);
            assert!(world.take_captured().is_empty(), "nothing was dropped");
            // Without a worker, the error is dropped after it was cut.
            world.beat(0);
            let got = run(&mut world, &error);
            assert_eq!(got.reason, Reason::NoWorker);
            let records = world.take_captured();
            let [(header, bytes)] = &records[..] else {
                panic!("one record for one drop: {}", records.len());
            };
            assert_eq!(header.event.reason, Reason::NoWorker as u8);
            assert_eq!(*bytes, error);
        }
    }
}

#[test]
fn a_punt_that_fails_is_captured_as_a_drop() {
    let mut world = world(CAPTURE_OBJECT, NIC, HOST, inspected());
    world.capture(&everything());
    world.beat(0);
    let record = one(
        &mut world,
        XDP,
        &udp((WORLD_V4, 4000), (HOST_V4, 80), b"question"),
    );
    assert_eq!(record.event.reason, Reason::NoWorker as u8);
    assert_eq!(record.event.kind, EventKind::Drop as u8);
    assert_eq!(record.flags & captured_flags::PUNTED, 0);
}

#[test]
fn the_conditions_of_a_capture_exclude_packets() {
    let mut world = world(CAPTURE_OBJECT, NIC, HOST, allowed());
    let denied = tcp((WORLD_V4, 4000), (HOST_V4, 81), SYN);
    let passing = udp((WORLD_V6, 5000), (HOST_V6, 80), b"");
    let end = |text: &str| {
        let mask = palisade_abi::Addr([u32::MAX; 4]);
        CaptureEnd {
            addr: addr_of(text),
            mask,
            ..CaptureEnd::ANY
        }
    };
    let port = |port| CaptureEnd {
        first_port: port,
        last_port: port,
        ..CaptureEnd::ANY
    };
    let any = CaptureCondition::ANY;
    let ended = CaptureSettings {
        until: 1,
        ..everything()
    };
    for (settings, takes_denied, takes_passing) in [
        (everything(), true, true),
        (ended, false, false),
        (
            only(CaptureCondition {
                ifindex: IFINDEX,
                ..any
            }),
            true,
            true,
        ),
        (only(CaptureCondition { ifindex: 99, ..any }), false, false),
        (
            only(CaptureCondition {
                flags: capture_flags::DROPS_ONLY,
                ..any
            }),
            true,
            false,
        ),
        (only(CaptureCondition { protocol: 18, ..any }), false, true),
        (
            only(CaptureCondition {
                source: end(WORLD_V4),
                ..any
            }),
            true,
            false,
        ),
        (
            only(CaptureCondition {
                destination: end(WORLD_V4),
                ..any
            }),
            false,
            false,
        ),
        (
            only(CaptureCondition {
                destination: end(HOST_V6),
                ..any
            }),
            false,
            true,
        ),
        (
            only(CaptureCondition {
                source: port(4000),
                ..any
            }),
            true,
            false,
        ),
        (
            only(CaptureCondition {
                destination: port(80),
                ..any
            }),
            false,
            true,
        ),
        (
            CaptureSettings {
                conditions: [
                    CaptureCondition {
                        source: port(5000),
                        ..any
                    },
                    CaptureCondition {
                        destination: port(81),
                        ..any
                    },
                ],
                ..everything()
            },
            true,
            true,
        ),
    ] {
        world.capture(&settings);
        for run in [XDP, IN] {
            run(&mut world, &denied);
            assert_eq!(!world.take_captured().is_empty(), takes_denied, "{settings:?}");
            run(&mut world, &passing);
            assert_eq!(!world.take_captured().is_empty(), takes_passing, "{settings:?}");
        }
    }
}

#[test]
fn at_most_snap_length_bytes_are_copied() {
    let mut world = world(CAPTURE_OBJECT, NIC, HOST, allowed());
    let frame = segment((WORLD_V4, 4000), (HOST_V4, 80), ACK, &[7; 1000]);
    for snap in [1, 64, 65_535, 65_536] {
        world.capture(&CaptureSettings::all(u64::MAX, snap));
        for run in [XDP, IN] {
            run(&mut world, &frame);
            let (header, bytes) = world.take_captured().remove(0);
            assert_eq!(bytes, frame[..frame.len().min(snap as usize)]);
            assert_eq!(header.frame_length as usize, frame.len());
        }
    }
}
