//! Packets that need inspection: their punt headers, and when they are not punted.

mod program;

use palisade_abi::{
    Config, CtEntry, CtKey, Decision, Direction, FlowCommand, Inspector, MAX_PUNT_FRAME, PolicyEntry,
    PuntHeader, Reason, ReinjectTrailer, SEND_LIMIT_DISTANCE, config_flags, ct_flags, entry_flags, flow_op,
    identity, punt_flags, punt_hook, reinject_flags, reinject_path, send_limit_code,
};
use program::packets::*;
use program::*;
use zerocopy::{FromBytes as _, IntoBytes as _};

const INGRESS: Direction = Direction::Ingress;
const EGRESS: Direction = Direction::Egress;
const COOKIE: u64 = 0x1122_3344_5566_7788;
const MARK: u32 = 0x5a5a_0001;
const CLIENT: (&str, u16) = (WORLD_V4, 4000);
const SERVER: (&str, u16) = (HOST_V4, 80);

fn carrying(config: &mut Config) {
    config.cookie = COOKIE;
    config.worker_timeout = 500_000_000;
    config.punt_ifindex = IFINDEX;
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

/// A node whose ingress to port 80 is inspected, with a live worker.
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

fn carried(got: &Outcome, frame: &[u8]) -> PuntHeader {
    assert!(got.carried, "{:?}", got.reason);
    let prefix = size_of::<PuntHeader>();
    assert_eq!(got.frame[prefix..], *frame, "the frame itself is untouched");
    PuntHeader::read_from_bytes(&got.frame[..prefix]).unwrap()
}

#[test]
fn a_punted_packet_has_a_punt_header() {
    for (hook, expected) in [
        (Hook::Xdp, punt_hook::XDP_INGRESS),
        (Hook::TcIn, punt_hook::TC_INGRESS),
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
                (Inspector::Dns as u8, punt_flags::INGRESS | punt_flags::NEW)
            );
            assert_eq!(first.slots[1].endpoint, 0);
            let flow: CtEntry = world.flow(&key(HOST, 17, (server, 80), (client, 4000))).unwrap();
            assert_eq!(
                (flow.serial, flow.inspector, flow.ruleset),
                (slot.serial, Inspector::Dns as u8, 21)
            );
            // The reply goes to the same worker with the same serial and the other direction.
            let answer = udp((server, 80), (client, 4000), b"answer");
            let got = world.run_local(&answer);
            assert_eq!(got.reason, Reason::Established);
            let second = carried(&got, &answer);
            assert_eq!(
                (second.hash, second.slots[0].serial, second.hook),
                (first.hash, slot.serial, punt_hook::TC_EGRESS)
            );
            assert_eq!(second.slots[0].flags, punt_flags::REPLY);
        }
    }
}

#[test]
fn a_packet_is_punted_for_both_policies() {
    let mut world = reading(WORKLOAD, A);
    let question = udp((A_V4, 4000), (HOST_V4, 80), b"question");
    let first = carried(&world.run(Hook::TcIn, &question), &question);
    assert_eq!(first.slots.map(|slot| slot.endpoint), [A, HOST]);
    assert_eq!(first.slots.map(|slot| slot.ruleset), [22, 21]);
    assert_eq!(first.slots[0].flags, punt_flags::NEW);
    assert_eq!(first.slots[1].flags, punt_flags::NEW | punt_flags::INGRESS);
    // If only the policy of the node punts it, it goes to the same worker.
    let mut world = reading(WORKLOAD, A);
    world.rule(A, EGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
    let alone = carried(&world.run(Hook::TcIn, &question), &question);
    assert_eq!(alone.slots.map(|slot| slot.endpoint), [HOST, 0]);
    assert_eq!(alone.hash, first.hash);
}

#[test]
fn without_a_worker_packets_are_dropped_unless_fail_open() {
    let question = udp(CLIENT, SERVER, b"question");
    for hook in ENTRIES {
        let mut world = reading(NIC, HOST);
        world.beat(palisade_datapath::monotonic_coarse() - 2_000_000_000);
        let got = world.run(hook, &question);
        assert_eq!((got.passed, got.reason), (false, Reason::NoWorker));
        // The flow that it opened does not bypass inspection.
        assert_eq!(world.run(hook, &question).reason, Reason::NoWorker);
        world.config(|config| {
            carrying(config);
            config.flags = config_flags::FAIL_OPEN;
        });
        let got = world.run(hook, &question);
        assert!(got.passed && !got.carried);
        assert_eq!(got.reason, Reason::FailedOpen);
        world.beat(palisade_datapath::monotonic_coarse());
        carried(&world.run(hook, &question), &question);
    }
}

#[test]
fn packets_that_cannot_be_punted_are_dropped() {
    for hook in ENTRIES {
        let mut world = reading(NIC, HOST);
        // A packet without a flow.
        let got = world.run(hook, &tcp((WORLD_V4, 5000), SERVER, RST));
        assert_eq!(got.reason, Reason::CtInvalidState);
        // A rule with an unknown inspector.
        let mut world = reading(NIC, HOST);
        world.config(|config| {
            carrying(config);
            config.inspectors = 1 << Inspector::Http as u32;
        });
        let question = udp(CLIENT, SERVER, b"question");
        assert_eq!(world.run(hook, &question).reason, Reason::NoDnsInspector);
    }
}

/// In both directions the longest frame with its headers fits the MTU of the punt link.
#[test]
fn the_longest_frame_is_punted_and_reinjected() {
    const LONGEST: usize = MAX_PUNT_FRAME as usize;
    // veth accepts its MTU plus an Ethernet header.
    let room = palisade_abi::PUNT_MTU as usize + 14;
    for (client, server, headers) in [(WORLD_V4, HOST_V4, 42), (WORLD_V6, HOST_V6, 62)] {
        let datagram = |length: usize| udp((client, 4000), (server, 80), &vec![1; length - headers]);
        for hook in ENTRIES {
            let mut world = reading(NIC, HOST);
            let longest = datagram(LONGEST);
            assert_eq!(longest.len(), LONGEST);
            let there = world.run(hook, &longest);
            carried(&there, &longest);
            assert!(longest.len() + size_of::<PuntHeader>() <= room);
            for path in [reinject_path::INGRESS, reinject_path::EGRESS] {
                let behind = ReinjectTrailer {
                    cookie: COOKIE,
                    ifindex: IFINDEX,
                    path,
                    flags: reinject_flags::COMMAND | reinject_flags::SECOND_COMMAND,
                    zero: [0; 2],
                };
                let command = FlowCommand::default();
                let back = [
                    &longest[..],
                    command.as_bytes(),
                    command.as_bytes(),
                    behind.as_bytes(),
                ]
                .concat();
                assert!(back.len() <= room, "{} bytes", back.len());
                let (retval, out, _) = world.run_back(&back);
                assert_eq!((retval, out), (REDIRECT, longest.clone()));
            }
            let longer = datagram(LONGEST + 1);
            assert_eq!(world.run(hook, &longer).reason, Reason::PuntUnsupported);
        }
    }
}

/// Packets of the node's sockets must not use the queues to and from the workers.
#[test]
fn at_the_egress_of_the_punt_link_only_redirected_packets_pass() {
    const UNSPEC: u32 = 0xffff_ffff;
    let mut world = reading(NIC, HOST);
    let frame = udp(CLIENT, SERVER, b"question");
    let ours = [&COOKIE.to_ne_bytes()[..], &[0; 64], &frame].concat();
    let (retval, out, counted) = world.run_at_punt_link(palisade_abi::programs::PUNT_FILTER, &ours);
    assert_eq!((retval, out, counted), (UNSPEC, ours.clone(), vec![]));
    let mut other_cookie = ours;
    other_cookie[7] ^= 1;
    for foreign in [other_cookie, frame, vec![0; 60]] {
        let (retval, _, counted) = world.run_at_punt_link(palisade_abi::programs::PUNT_FILTER, &foreign);
        assert_eq!((retval, counted), (SHOT, vec![(Reason::PuntForeign, 1)]));
    }
    // Before the daemon has written the cookie, no packet passes.
    world.config(|config| config.cookie = 0);
    let (retval, ..) = world.run_at_punt_link(palisade_abi::programs::PUNT_FILTER, &[0; 128]);
    assert_eq!(retval, SHOT);
}

#[test]
fn audit_mode_inspects_and_does_not_deny() {
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
        punt_flags::INGRESS | punt_flags::NEW | punt_flags::AUDIT
    );
    // Without inspection it passes as before.
    world.config(|config| {
        carrying(config);
        config.inspectors = 0;
    });
    let other = udp((WORLD_V4, 4001), SERVER, b"question");
    assert_eq!(world.run(Hook::Xdp, &other).reason, Reason::Audited);
}

#[test]
fn a_new_policy_changes_whether_a_live_flow_is_inspected() {
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
fn an_offload_window_passes_without_inspection() {
    let flow_key = key(HOST, 6, SERVER, CLIENT);
    // Every frame of these tests has the sequence number 1000.
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
        flow.decided = CtEntry::windowed(flow.serial, flow.ruleset, flow.punt_flags, flow.windows);
        world.set_flow(&flow_key, &flow);
        let data_carried = world.run(Hook::Xdp, &data).carried;
        let ack_carried = world.run_local(&ack(of)).carried;
        (data_carried, ack_carried)
    };
    assert_eq!(windows(1000, 1100, 1000), (false, false));
    assert_eq!(windows(900, 2000, 1100), (false, false));
    // The window wraps at 2^32.
    assert_eq!(windows(0xffff_ff00, 1100, 5), (false, false));
    // The window lacks one byte at either end.
    assert_eq!(windows(1001, 1100, 1001), (true, false));
    assert_eq!(windows(1000, 1099, 1098), (true, false));
    assert_eq!(windows(0, 0, 0), (true, true));
    // Half of the sequence space is not a valid window.
    assert_eq!(windows(1000, 1000 + (1 << 31), 1000), (true, true));
    // The inspector gets the acknowledgement of the whole window, and of bytes outside.
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
fn reinjected_packets_are_not_evaluated_again() {
    let mut world = reading(NIC, HOST);
    world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Deny, 9));
    let frame = udp(CLIENT, SERVER, b"question");
    assert_eq!(world.run(Hook::TcIn, &frame).reason, Reason::PolicyDenied);
    assert!(world.passes_marked(Hook::TcIn, &frame, MARK));
    assert!(!world.passes_marked(Hook::TcIn, &frame, MARK + 1));
}

/// Result of the kernel for a reinjected packet.
const SHOT: u32 = 2;
const REDIRECT: u32 = 7;

/// An inspected TCP connection to the node, and its bytes 1000 to 1100.
struct Read {
    world: World,
    key: CtKey,
    client: (&'static str, u16),
    server: (&'static str, u16),
    data: Vec<u8>,
}

/// Returns the same for both address families.
fn read_connections(entry: PolicyEntry) -> impl Iterator<Item = Read> {
    let families = [(WORLD_V4, HOST_V4), (WORLD_V6, HOST_V6)];
    families.into_iter().map(move |(client, server)| {
        let (client, server) = ((client, 4000), (server, 80));
        let mut world = reading(NIC, HOST);
        world.rule(HOST, INGRESS, identity::ANY, 5, entry);
        let data = segment(client, server, ACK, &[7; 100]);
        assert!(world.run(Hook::Xdp, &tcp(client, server, SYN)).carried);
        assert!(world.run(Hook::Xdp, &data).carried);
        Read {
            world,
            key: key(HOST, 6, server, client),
            client,
            server,
            data,
        }
    })
}

impl Read {
    fn flow(&self) -> CtEntry {
        self.world.flow(&self.key).unwrap()
    }

    /// Runs a packet from the client while the worker is alive.
    fn run(&mut self, frame: &[u8]) -> Outcome {
        self.world.beat(palisade_datapath::monotonic_coarse());
        self.world.run(Hook::Xdp, frame)
    }

    /// Returns a flow command that matches the flow.
    fn command(&self, op: u32) -> FlowCommand {
        let flow = self.flow();
        FlowCommand {
            key: self.key,
            serial: flow.serial,
            op,
            ruleset: flow.ruleset,
            punt_flags: u32::from(flow.punt_flags),
            windows: [1000, 1100, 0, 0],
        }
    }

    /// Runs a flow command of a worker. It is never an error; the programs decide whether it is still valid.
    fn give(&mut self, command: &FlowCommand) {
        let alone = released(&[0; 14], reinject_path::NONE, Some(command));
        let (retval, _, counted) = self.world.run_back(&alone);
        assert_eq!((retval, counted), (SHOT, vec![]));
    }

    /// Returns whether data is punted. The packet counts for the flow in both cases.
    fn is_read(&mut self) -> bool {
        let got = self.run(&self.data.clone());
        assert_eq!((got.passed, got.reason), (true, Reason::Established));
        got.carried
    }
}

/// Returns a packet as a worker sends it.
fn released(packet: &[u8], path: u8, command: Option<&FlowCommand>) -> Vec<u8> {
    let behind = ReinjectTrailer {
        cookie: COOKIE,
        ifindex: IFINDEX,
        path,
        flags: if command.is_some() {
            reinject_flags::COMMAND
        } else {
            0
        },
        zero: [0; 2],
    };
    let command = command.map_or(&[][..], |command| command.as_bytes());
    [packet, command, behind.as_bytes()].concat()
}

#[test]
fn a_flow_command_that_matches_its_flow_is_executed() {
    for mut flow in read_connections(inspected(11, 21)) {
        // Segments inside the window pass, others are punted.
        let longer = segment(flow.client, flow.server, ACK, &[7; 101]);
        flow.give(&flow.command(flow_op::WINDOWS));
        assert!(!flow.is_read());
        assert!(flow.run(&longer).carried);
        // With offload, all segments of both directions pass.
        flow.give(&flow.command(flow_op::OFFLOAD));
        let answer = segment(flow.server, flow.client, ACK, &[8; 100]);
        let end = tcp(flow.client, flow.server, FIN | ACK);
        assert!(!flow.is_read());
        assert!(!flow.run(&longer).carried);
        assert!(!flow.world.run_local(&answer).carried);
        let got = flow.run(&end);
        assert!(got.passed && !got.carried);
    }
    for mut flow in read_connections(inspected(11, 21)) {
        let before = flow.flow();
        flow.give(&flow.command(flow_op::CLOSE));
        // After a reset the entry lives for ten seconds. A new connection on the same ports is another flow, which is
        // inspected.
        let after = flow.flow();
        assert_eq!(after.forward_tcp, before.forward_tcp | RST);
        assert!(after.expires < before.expires);
        let got = flow.run(&tcp(flow.client, flow.server, SYN));
        assert_eq!((got.carried, got.reason), (true, Reason::Allowed));
        assert_ne!(flow.flow().serial, before.serial);
    }
    // In audit mode, with the audit flag.
    let audited = PolicyEntry {
        flags: entry_flags::AUDIT,
        ..inspected(11, 21)
    };
    for mut flow in read_connections(audited) {
        let command = flow.command(flow_op::OFFLOAD);
        assert_eq!(command.punt_flags, u32::from(punt_flags::AUDIT));
        flow.give(&command);
        assert!(!flow.is_read());
    }
}

#[test]
fn acknowledgements_in_a_limited_window_offer_no_more_than_its_end() {
    const LENGTH: u32 = 1 << 20;
    for mut flow in read_connections(inspected(11, 21)) {
        let (client, server) = (flow.client, flow.server);
        let transport = if client.0.contains(':') { 54 } else { 34 };
        let answer = |flow: &mut Read, hook: Hook, acked: u32, window: u16, payload: &[u8]| {
            let mut frame = segment(server, client, ACK, payload);
            frame[transport + 8..transport + 12].copy_from_slice(&acked.to_be_bytes());
            frame[transport + 14..transport + 16].copy_from_slice(&window.to_be_bytes());
            flow.world.beat(palisade_datapath::monotonic_coarse());
            let got = match hook {
                Hook::TcOut => flow.world.run_local(&frame),
                hook => flow.world.run(hook, &frame),
            };
            assert_eq!(got.reason, Reason::Established);
            if got.carried {
                assert!(got.frame.ends_with(&frame));
                return None;
            }
            let seen = u16::from_be_bytes([got.frame[transport + 14], got.frame[transport + 15]]);
            assert_eq!(
                sum(&[&got.frame[transport..]]),
                sum(&[&frame[transport..]]),
                "its checksum is corrected"
            );
            let mut same = got.frame;
            same[transport + 14..transport + 18].copy_from_slice(&frame[transport + 14..transport + 18]);
            assert_eq!(same, frame, "nothing else is changed");
            Some(seen)
        };
        for (scale, base) in [(0_u8, 0_u32), (7, 0), (10, 0), (7, 0xfff8_0000)] {
            let from = base + send_limit_code(scale);
            let end = base.wrapping_add(LENGTH);
            flow.give(&FlowCommand {
                windows: [from, end, 0, 0],
                ..flow.command(flow_op::LIMITED_WINDOWS)
            });
            for left in [
                LENGTH - 100,
                SEND_LIMIT_DISTANCE + 1,
                SEND_LIMIT_DISTANCE,
                1_448,
                1,
            ] {
                let most = u16::try_from(left >> scale).unwrap_or(u16::MAX);
                let acked = end.wrapping_sub(left);
                for window in [
                    0,
                    1,
                    most.saturating_sub(1),
                    most,
                    most.saturating_add(1),
                    u16::MAX,
                ] {
                    let seen = answer(&mut flow, Hook::TcOut, acked, window, b"");
                    // Near the end the worker lowers the window.
                    let expected = (left > SEND_LIMIT_DISTANCE).then_some(window.min(most));
                    assert_eq!(seen, expected, "{scale} {left}");
                }
            }
            // The end, and what lies behind it, is acknowledged through the worker, and so are other segments.
            assert_eq!(answer(&mut flow, Hook::TcOut, end, u16::MAX, b""), None);
            assert_eq!(
                answer(&mut flow, Hook::TcOut, end.wrapping_add(1), u16::MAX, b""),
                None
            );
            assert_eq!(
                answer(&mut flow, Hook::TcOut, end.wrapping_sub(1), u16::MAX, b"x"),
                None
            );
        }
        // Without a limit the window is that of the receiver.
        flow.give(&FlowCommand {
            windows: [8, LENGTH, 0, 0],
            ..flow.command(flow_op::WINDOWS)
        });
        assert_eq!(
            answer(&mut flow, Hook::TcOut, 1_000, u16::MAX, b""),
            Some(u16::MAX)
        );
        // Neither is a decision valid that differs in anything else.
        let mut entry = flow.flow();
        entry.decided ^= CtEntry::LIMITED | 1 << 40;
        flow.world.set_flow(&flow.key, &entry);
        assert_eq!(answer(&mut flow, Hook::TcOut, 1_000, u16::MAX, b""), None);
    }
}

type Change = fn(&mut FlowCommand);

#[test]
fn a_flow_command_that_does_not_match_its_flow_is_ignored() {
    let audited = PolicyEntry {
        flags: entry_flags::AUDIT,
        ..inspected(11, 21)
    };
    let changes: [(&str, Change); 6] = [
        ("another connection", |command| command.serial ^= 1),
        ("rules that hold no more", |command| command.ruleset += 1),
        ("no rules", |command| command.ruleset = 0),
        ("audit, or not", |command| {
            command.punt_flags ^= u32::from(punt_flags::AUDIT);
        }),
        // A value that exceeds the bits for it in a flow.
        ("a flag beyond", |command| command.punt_flags |= 256),
        ("another endpoint's", |command| command.key.endpoint = A),
    ];
    for entry in [inspected(11, 21), audited] {
        for mut flow in read_connections(entry) {
            for (what, change) in changes {
                for op in [flow_op::WINDOWS, flow_op::OFFLOAD, flow_op::CLOSE] {
                    let mut command = flow.command(op);
                    change(&mut command);
                    // A reset is valid whatever the rule set.
                    if op == flow_op::CLOSE && command.serial == flow.flow().serial && command.key == flow.key
                    {
                        continue;
                    }
                    let before = flow.flow();
                    flow.give(&command);
                    assert_eq!(flow.flow(), before, "{what}, op {op}");
                    assert!(flow.is_read(), "{what}, op {op}");
                }
            }
            // The mismatch is the only reason why they were ignored.
            flow.give(&flow.command(flow_op::OFFLOAD));
            assert!(!flow.is_read());
        }
    }
}

#[test]
fn a_reset_counts_whatever_the_rules() {
    for mut flow in read_connections(inspected(11, 21)) {
        let command = FlowCommand {
            ruleset: 20,
            punt_flags: u32::from(punt_flags::AUDIT),
            ..flow.command(flow_op::CLOSE)
        };
        flow.give(&command);
        // It reports the end of the connection, and decides nothing about inspection.
        let after = flow.flow();
        assert_eq!(after.forward_tcp & RST, RST);
        assert_eq!((after.inspector, after.windows), (Inspector::Dns as u8, [0; 4]));
        assert!(flow.is_read());
    }
}

/// The worker has decided with the rule set of the packet; when its flow command arrives, the flow has been evaluated
/// with another one.
#[test]
fn a_flow_command_of_an_old_rule_set_is_ignored() {
    let audited = PolicyEntry {
        flags: entry_flags::AUDIT,
        ..inspected(12, 21)
    };
    for new in [inspected(12, 33), audited] {
        for mut flow in read_connections(inspected(11, 21)) {
            for op in [flow_op::WINDOWS, flow_op::OFFLOAD] {
                flow.world
                    .rule(HOST, INGRESS, identity::ANY, 5, inspected(11, 21));
                flow.world.state(HOST, u32::from(HOST), 2, identity::HOST);
                assert!(flow.is_read());
                let command = flow.command(op);
                flow.world.rule(HOST, INGRESS, identity::ANY, 5, new);
                flow.world.state(HOST, u32::from(HOST), 3, identity::HOST);
                assert!(flow.is_read());
                flow.give(&command);
                assert!(flow.is_read(), "op {op}");
                // If the command arrives first, the next packet is evaluated again and punted.
                flow.world
                    .rule(HOST, INGRESS, identity::ANY, 5, inspected(11, 21));
                flow.world.state(HOST, u32::from(HOST), 4, identity::HOST);
                assert!(flow.is_read());
                flow.world.rule(HOST, INGRESS, identity::ANY, 5, new);
                flow.world.state(HOST, u32::from(HOST), 5, identity::HOST);
                flow.give(&command);
                assert_ne!(flow.flow().windows[1] + u32::from(flow.flow().is_offloaded()), 0);
                assert!(flow.is_read(), "op {op}");
            }
        }
    }
}

/// The same race on two CPUs: the command was compared with the old rule set, the new one is written, and only then
/// the entry is changed. The test writes the resulting entry to the map.
#[test]
fn a_decision_for_another_rule_set_or_serial_is_not_used() {
    for mut flow in read_connections(inspected(11, 21)) {
        let now = flow.flow();
        let old = (21, 0);
        assert_eq!((now.ruleset, now.punt_flags), old, "the rules of the world");
        for (ruleset, flags) in [(20, 0), (21, punt_flags::AUDIT), (0, 0), old] {
            // The entry may belong to another connection by now.
            for serial in [now.serial, now.serial ^ 1] {
                let windows = [1000, 1100, 0, 0];
                for decided in [
                    CtEntry::offload(serial, ruleset, flags),
                    CtEntry::windowed(serial, ruleset, flags, windows),
                ] {
                    let late = CtEntry {
                        windows,
                        decided,
                        ..now
                    };
                    flow.world.set_flow(&flow.key, &late);
                    assert_eq!(
                        flow.is_read(),
                        (ruleset, flags, serial) != (old.0, old.1, now.serial),
                        "{ruleset} {flags} {serial}"
                    );
                }
                // Windows of another flow command.
                let other = CtEntry {
                    windows: [900, 1200, 0, 0],
                    decided: CtEntry::windowed(now.serial, old.0, old.1, windows),
                    ..now
                };
                flow.world.set_flow(&flow.key, &other);
                assert!(flow.is_read());
            }
        }
    }
}

#[test]
fn a_packet_is_forwarded_whether_its_command_is_valid_or_not() {
    for mut flow in read_connections(inspected(11, 21)) {
        for (way, stale) in [(reinject_path::INGRESS, true), (reinject_path::EGRESS, false)] {
            let mut command = flow.command(flow_op::OFFLOAD);
            command.serial ^= u32::from(stale);
            let (retval, out, counted) = flow.world.run_back(&released(&flow.data, way, Some(&command)));
            assert_eq!((retval, counted), (REDIRECT, vec![]));
            assert_eq!(out, flow.data, "what stood behind it is off");
            assert_eq!(flow.is_read(), stale);
        }
    }
}

#[test]
fn a_flow_command_with_a_wrong_cookie_is_foreign() {
    for mut flow in read_connections(inspected(11, 21)) {
        let command = flow.command(flow_op::OFFLOAD);
        let ours = released(&[0; 14], reinject_path::NONE, Some(&command));
        let trailer = ours.len() - size_of::<ReinjectTrailer>();
        let mut other_cookie = ours.clone();
        other_cookie[trailer] ^= 1;
        // It claims to have a flow command, but is too short for one.
        let without = [&[0; 30][..], &ours[trailer..]].concat();
        for frame in [other_cookie, without, vec![0; 40]] {
            let (retval, _, counted) = flow.world.run_back(&frame);
            assert_eq!((retval, counted), (SHOT, vec![(Reason::PuntForeign, 1)]));
            assert!(flow.is_read());
        }
        let (_, _, counted) = flow.world.run_back(&ours);
        assert_eq!(counted, []);
        assert!(!flow.is_read());
    }
}

/// Breaks the checksum of a punted packet, so that the receiver and the worker drop it.
fn spoilt(mut frame: Vec<u8>) -> Vec<u8> {
    let at = if frame[12..14] == [0x86, 0xdd] {
        14 + 40
    } else {
        14 + 20
    };
    frame[at + 16] ^= 0xff;
    frame
}

/// Client and server of both address families.
const FAMILIES: [(&str, &str); 2] = [(WORLD_V4, HOST_V4), (WORLD_V6, HOST_V6)];

/// A node whose ingress to port 80 is inspected, and whose egress is allowed.
fn one_way() -> World {
    let world = reading(NIC, HOST);
    for class in [0, 5] {
        world.rule(HOST, EGRESS, identity::ANY, class, entry(Decision::Allow, 7));
    }
    world
}

fn expire(world: &World, key: &CtKey) {
    let mut flow = world.flow(key).unwrap();
    flow.expires = 1;
    world.set_flow(key, &flow);
}

#[test]
fn tcp_state_changes_only_by_verified_packets() {
    for (client, server) in FAMILIES {
        let (client, server) = ((client, 4000), (server, 80));
        let mut world = one_way();
        let key = key(HOST, 6, server, client);
        assert!(world.run(Hook::Xdp, &tcp(client, server, SYN)).carried);
        let serial = world.flow(&key).unwrap().serial;
        for flags in [RST, RST | ACK, FIN | ACK, ACK, SYN] {
            assert!(world.run(Hook::Xdp, &spoilt(tcp(client, server, flags))).carried);
            assert!(
                world.run_local(&spoilt(tcp(server, client, flags))).carried,
                "{flags}"
            );
        }
        let flow = world.flow(&key).unwrap();
        assert_eq!((flow.forward_tcp, flow.reply_tcp, flow.serial), (SYN, 0, serial));
        let left = flow.expires - palisade_datapath::monotonic_coarse();
        assert!((50_000_000_000..=60_000_000_000).contains(&left), "{left}");
        // The worker reports the open and the end of the connection.
        let command = |op| FlowCommand {
            key,
            serial,
            op,
            ruleset: 21,
            punt_flags: 0,
            windows: [0; 4],
        };
        let give = |world: &mut World, op| {
            world.run_back(&released(&[0; 14], reinject_path::NONE, Some(&command(op))));
            world.flow(&key).unwrap().expires - palisade_datapath::monotonic_coarse()
        };
        assert!(give(&mut world, flow_op::OPENED) > 3_500_000_000_000);
        for flags in [RST, FIN | ACK] {
            world.run(Hook::Xdp, &tcp(client, server, flags));
            world.run_local(&tcp(server, client, flags));
        }
        let flow = world.flow(&key).unwrap();
        assert!(flow.expires - palisade_datapath::monotonic_coarse() > 3_500_000_000_000);
        assert!(give(&mut world, flow_op::CLOSE) <= 10_000_000_000);
        // A late flow command does not open an ended connection again.
        assert!(give(&mut world, flow_op::OPENED) <= 10_000_000_000);
    }
}

#[test]
fn an_expired_flow_is_not_created_again_in_the_other_direction() {
    for (client, server) in FAMILIES {
        let (client, server) = ((client, 4000), (server, 80));
        let mut world = one_way();
        let key = key(HOST, 6, server, client);
        let answer = tcp(server, client, SYN | ACK);
        let data = segment(server, client, ACK, b"data");
        // A flow that was never seen, and one that has expired.
        for died in [false, true] {
            if died {
                assert!(world.run(Hook::Xdp, &tcp(client, server, SYN)).carried);
                world.run(Hook::Xdp, &spoilt(tcp(client, server, RST)));
                expire(&world, &key);
            }
            for odd in [&answer, &segment(server, client, RST | ACK, b"data")] {
                assert_eq!(world.run_local(odd).reason, Reason::CtInvalidState);
            }
            // A packet in mid-stream belongs to the inspected direction, and the inspector ends the connection for
            // both ends.
            let first = carried(&world.run_local(&data), &data).slots[0];
            assert_eq!(
                first.flags,
                punt_flags::NEW | punt_flags::MIDSTREAM | punt_flags::REPLY
            );
            assert_eq!((first.ruleset, first.rule), (21, 11));
            let flow = world.flow(&key).unwrap();
            assert_eq!(flow.flags & (ct_flags::INGRESS | ct_flags::MIDSTREAM), 65);
            let request = segment(client, server, ACK, b"GET /admin");
            let second = carried(&world.run(Hook::Xdp, &request), &request).slots[0];
            assert_eq!((second.serial, second.ruleset), (first.serial, 21));
            assert_eq!(second.flags, punt_flags::INGRESS | punt_flags::MIDSTREAM);
            expire(&world, &key);
        }
        // Without the inspector the packet is dropped.
        world.config(|config| {
            carrying(config);
            config.inspectors = 0;
        });
        assert_eq!(world.run_local(&data).reason, Reason::NoDnsInspector);
        // Connections that the node opens are not inspected, on any port.
        assert_eq!(world.run_local(&tcp(server, client, SYN)).reason, Reason::Allowed);
    }
}

#[test]
fn an_unsolicited_datagram_does_not_choose_the_direction() {
    for (resolver, own) in FAMILIES {
        let (resolver, own) = ((resolver, 80), (own, 5000));
        // Requests of the node to port 80 are inspected; its ingress is allowed.
        let mut world = reading(NIC, HOST);
        for class in [0, 5] {
            world.rule(HOST, INGRESS, identity::ANY, class, entry(Decision::Allow, 7));
        }
        let (answer, question) = (udp(resolver, own, b"answer"), udp(own, resolver, b"question"));
        for hook in ENTRIES {
            assert_eq!(world.run(hook, &answer).reason, Reason::CtInvalidState);
        }
        assert!(world.flows().is_empty());
        let flow_key = key(HOST, 17, own, resolver);
        carried(&world.run_local(&question), &question);
        carried(&world.run(Hook::Xdp, &answer), &answer);
        expire(&world, &flow_key);
        assert_eq!(world.run(Hook::Xdp, &answer).reason, Reason::CtInvalidState);
        carried(&world.run_local(&question), &question);
        // Datagrams to other ports are unaffected.
        assert_eq!(
            world.run(Hook::Xdp, &udp((resolver.0, 81), own, b"x")).reason,
            Reason::Allowed
        );
        // A flow that is older than the rule is dropped in both directions until it expires; the next one is
        // inspected.
        let mut world = reading(NIC, HOST);
        for direction in [INGRESS, EGRESS] {
            for class in [0, 5] {
                world.rule(HOST, direction, identity::ANY, class, entry(Decision::Allow, 7));
            }
        }
        assert!(world.run(Hook::Xdp, &answer).passed);
        assert_eq!(world.run_local(&question).reason, Reason::Established);
        world.rule(HOST, EGRESS, identity::ANY, 5, inspected(12, 22));
        world.state(HOST, u32::from(HOST), 2, identity::HOST);
        assert_eq!(world.run_local(&question).reason, Reason::CtInvalidState);
        assert_eq!(world.run(Hook::Xdp, &answer).reason, Reason::CtInvalidState);
        expire(&world, &flow_key);
        carried(&world.run_local(&question), &question);
    }
}

#[test]
fn a_flow_seen_in_mid_stream_is_inspected_for_rules_of_both_directions() {
    for seeded in [0, ct_flags::SEEDED] {
        for (client, server) in FAMILIES {
            let (client, server) = ((client, 4000), (server, 80));
            let mut world = one_way();
            world.rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Allow, 7));
            let data = segment(server, client, ACK, b"data");
            let key = key(HOST, 6, server, client);
            assert!(world.run_local(&data).passed);
            let mut flow = world.flow(&key).unwrap();
            assert_eq!(flow.flags & ct_flags::INGRESS, 0);
            flow.flags |= seeded;
            world.set_flow(&key, &flow);
            world.rule(HOST, INGRESS, identity::ANY, 5, inspected(11, 21));
            world.state(HOST, u32::from(HOST), 2, identity::HOST);
            let slot = carried(&world.run_local(&data), &data).slots[0];
            assert_eq!(slot.flags, punt_flags::REPLY | punt_flags::MIDSTREAM);
            assert_eq!(slot.ruleset, 21);
        }
    }
}

/// A SYN is forged with the address of the peer, and the workload then replies with a SYN of its own.
#[test]
fn a_forged_syn_does_not_choose_the_opener() {
    for (other, own) in FAMILIES {
        let (other, own) = ((other, 80), (own, 5000));
        let mut world = reading(NIC, HOST);
        for class in [0, 5] {
            world.rule(HOST, INGRESS, identity::ANY, class, entry(Decision::Allow, 7));
        }
        let key = key(HOST, 6, own, other);
        assert_eq!(
            world.run(Hook::Xdp, &tcp(other, own, SYN)).reason,
            Reason::Allowed
        );
        let syn = tcp(own, other, SYN);
        let slot = carried(&world.run_local(&syn), &syn).slots[0];
        assert_eq!((slot.flags, slot.ruleset), (punt_flags::NEW, 21));
        assert_eq!(world.flow(&key).unwrap().flags & ct_flags::INGRESS, 0);
        // Conversely, a SYN of the responder does not change the direction of an inspected flow.
        let serial = world.flow(&key).unwrap().serial;
        for flags in [SYN, RST, SYN] {
            assert!(world.run(Hook::Xdp, &tcp(other, own, flags)).carried);
        }
        let request = segment(own, other, ACK, b"GET /admin");
        assert_eq!(
            carried(&world.run_local(&request), &request).slots[0].serial,
            serial
        );
    }
}

#[test]
fn a_new_connection_on_offloaded_ports_is_inspected() {
    for decided in [flow_op::OFFLOAD, flow_op::WINDOWS] {
        for mut flow in read_connections(inspected(11, 21)) {
            let (client, server) = (flow.client, flow.server);
            flow.give(&flow.command(decided));
            assert!(!flow.is_read());
            let before = flow.flow();
            // A reset, and a segment that clears its mark; the receiver would accept neither.
            flow.run(&spoilt(tcp(client, server, RST)));
            flow.run(&spoilt(tcp(client, server, ACK)));
            for closing in [false, true] {
                if closing {
                    flow.run(&tcp(client, server, RST));
                    flow.world.run_local(&tcp(server, client, RST));
                }
                for hook in ENTRIES {
                    let got = flow.world.run(hook, &tcp(client, server, SYN));
                    assert!(got.carried, "{:?}", got.reason);
                }
                assert!(flow.world.run_local(&tcp(server, client, SYN | ACK)).carried);
                assert!(flow.world.run_local(&tcp(server, client, SYN)).carried);
                assert_eq!(flow.flow().serial, before.serial);
            }
            // The worker has seen the SYN+ACK of the server.
            let replace = FlowCommand {
                windows: [before.serial ^ 77, 0, 0, 0],
                ..flow.command(flow_op::REPLACE)
            };
            let late = flow.command(decided);
            let answer = tcp(server, client, SYN | ACK);
            let (retval, out, counted) =
                flow.world
                    .run_back(&released(&answer, reinject_path::EGRESS, Some(&replace)));
            assert_eq!((retval, out, counted), (REDIRECT, answer.clone(), vec![]));
            let after = flow.flow();
            assert_eq!((after.serial, after.forward_tcp), (before.serial ^ 77, SYN));
            assert!(flow.is_read());
            // Flow commands for the old connection are late, and a packet that would open a connection by one is not
            // forwarded.
            flow.give(&late);
            assert!(flow.is_read());
            let (retval, _, counted) =
                flow.world
                    .run_back(&released(&answer, reinject_path::EGRESS, Some(&replace)));
            assert_eq!((retval, counted), (SHOT, vec![(Reason::CtInvalidState, 1)]));
        }
    }
}

#[test]
fn a_packet_carries_the_flow_commands_of_both_policies() {
    let mut world = reading(WORKLOAD, A);
    let (client, server) = ((A_V4, 4000), (HOST_V4, 80));
    let syn = tcp(client, server, SYN);
    let slots = carried(&world.run(Hook::TcIn, &syn), &syn).slots;
    let keys = [key(A, 6, client, server), key(HOST, 6, server, client)];
    let command = |at: usize, op, windows| FlowCommand {
        key: keys[at],
        serial: slots[at].serial,
        op,
        ruleset: slots[at].ruleset,
        punt_flags: 0,
        windows,
    };
    let both = |first: FlowCommand, second: FlowCommand| {
        let behind = ReinjectTrailer {
            cookie: COOKIE,
            ifindex: IFINDEX,
            path: reinject_path::INGRESS,
            flags: reinject_flags::COMMAND | reinject_flags::SECOND_COMMAND,
            zero: [0; 2],
        };
        [&syn[..], first.as_bytes(), second.as_bytes(), behind.as_bytes()].concat()
    };
    let replace = |at| command(at, flow_op::REPLACE, [5, 0, 0, 0]);
    let (retval, out, _) = world.run_back(&both(replace(0), command(1, flow_op::OFFLOAD, [0; 4])));
    assert_eq!((retval, out), (REDIRECT, syn.clone()));
    assert_eq!(world.flow(&keys[0]).unwrap().serial, 5);
    assert!(world.flow(&keys[1]).unwrap().is_offloaded());
    // One of the two commands is for another flow.
    let (retval, _, counted) = world.run_back(&both(replace(0), replace(1)));
    assert_eq!((retval, counted), (SHOT, vec![(Reason::CtInvalidState, 1)]));
}

/// Returns the one's complement sum of all 16-bit words: 0xffff if they include a valid checksum.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for pair in parts.concat().chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[test]
fn an_icmp_error_about_an_inspected_flow_is_cut_to_its_quote() {
    for (client, server, router) in [
        (WORLD_V4, HOST_V4, "203.0.113.9"),
        (WORLD_V6, HOST_V6, "2001:db8:9::1"),
    ] {
        let v6 = client.contains(':');
        let header = if v6 { 40 } else { 20 };
        let transport = 14 + header;
        // Type, code, the second word, and the second word after the cut.
        let cases: &[(u8, u8, [u8; 4], [u8; 4])] = if v6 {
            &[
                (1, 4, [1, 2, 3, 4], [0; 4]),
                (2, 0, [0, 0, 5, 0], [0, 0, 5, 0]),
                (3, 0, [9; 4], [0; 4]),
                (4, 1, [0, 0, 0, 6], [0, 0, 0, 6]),
            ]
        } else {
            &[
                (3, 3, [1, 2, 3, 4], [0; 4]),
                (3, 4, [1, 2, 5, 0], [0, 0, 5, 0]),
                (11, 0, [9; 4], [0; 4]),
                (12, 0, [6, 7, 8, 9], [6, 0, 0, 0]),
            ]
        };
        for hook in ENTRIES {
            let mut world = reading(NIC, HOST);
            let question = udp((client, 4000), (server, 80), b"question");
            carried(&world.run(hook, &question), &question);
            let quoted = udp((server, 80), (client, 4000), &[0x55; 400]);
            for &(kind, code, word, left) in cases {
                let mut error = unreachable(router, server, &quoted);
                error[transport] = kind;
                error[transport + 1] = code;
                error[transport + 4..transport + 8].copy_from_slice(&word);
                if !v6 {
                    error[24..26].fill(0);
                    let checksum = !sum(&[&error[14..34]]);
                    error[24..26].copy_from_slice(&checksum.to_be_bytes());
                }
                let got = world.run(hook, &error);
                assert_eq!((got.reason, got.carried), (Reason::Related, false), "{kind}");
                let cut = got.frame;
                assert_eq!(cut.len(), transport + 8 + header + 8, "{kind} {hook:?}");
                let message = &cut[transport..];
                assert_eq!((message[0], message[1]), (kind, code));
                assert_eq!(message[4..8], left, "{kind}");
                assert_eq!(message[8..], quoted[14..14 + header + 8]);
                if v6 {
                    let length = [0, message.len() as u8];
                    assert_eq!(cut[18..20], length);
                    let pseudo: &[&[u8]] = &[&cut[22..54], &length, &[0, 58], message];
                    assert_eq!(sum(pseudo), 0xffff);
                } else {
                    assert_eq!(cut[16..18], [0, cut.len() as u8 - 14]);
                    assert_eq!((sum(&[&cut[14..34]]), sum(&[message])), (0xffff, 0xffff));
                }
                // Such an error passes unchanged.
                let got = world.run(hook, &cut);
                assert_eq!((got.reason, got.frame), (Reason::Related, cut));
            }
            // An error that quotes less, or a packet with options or extension headers, matches no flow.
            let short = unreachable(router, server, &quoted[..14 + header + 7]);
            assert_eq!(world.run(hook, &short).reason, Reason::UnrelatedIcmp);
            let longer = if v6 {
                let mut extended = vec![17, 0, 1, 4, 0, 0, 0, 0];
                extended.extend_from_slice(&quoted[54..]);
                raw(server, client, 60, 64, &extended)
            } else {
                let mut longer = quoted.clone();
                longer[14] = 0x46;
                longer.splice(34..34, [1; 4]);
                longer
            };
            let error = unreachable(router, server, &longer);
            assert_eq!(world.run(hook, &error).reason, Reason::UnrelatedIcmp);
        }
    }
}

#[test]
fn a_workload_sends_no_data_in_icmp_errors_about_an_inspected_flow() {
    for (a, outside) in [(A_V4, WORLD_V4), (A_V6, WORLD_V6)] {
        let mut world = reading(WORKLOAD, A);
        let question = udp((a, 4000), (outside, 80), b"question");
        carried(&world.run(Hook::TcIn, &question), &question);
        // About a reply that the workload may have received, with any bytes after the ports.
        let answer = udp((outside, 80), (a, 4000), &[0xdd; 300]);
        let got = world.run(Hook::TcIn, &unreachable(a, outside, &answer));
        assert_eq!(got.reason, Reason::Related);
        assert!(!got.frame.windows(4).any(|bytes| bytes == [0xdd; 4]));
    }
}

/// Returns an error of a router about a packet of the receiver of the error.
fn error_about(router: &str, quoted: &[u8]) -> Vec<u8> {
    let (from, to) = if router.contains(':') { (22, 38) } else { (26, 30) };
    let bytes = &quoted[from..to];
    let destination = match <[u8; 4]>::try_from(bytes) {
        Ok(v4) => std::net::Ipv4Addr::from(v4).to_string(),
        Err(_) => std::net::Ipv6Addr::from(<[u8; 16]>::try_from(bytes).unwrap()).to_string(),
    };
    let mut error = unreachable(router, &destination, quoted);
    if !router.contains(':') {
        // The builder has written the checksum of the other protocol.
        error[24..26].fill(0);
        let checksum = !sum(&[&error[14..34]]);
        error[24..26].copy_from_slice(&checksum.to_be_bytes());
    }
    error
}

/// Returns the punted form of an error: cut to its mandatory quote.
fn carried_error(got: &Outcome, error: &[u8]) -> PuntHeader {
    assert!(got.carried, "{:?}", got.reason);
    assert_eq!(got.reason, Reason::Related);
    let v6 = error[12..14] == [0x86, 0xdd];
    let header = if v6 { 40 } else { 20 };
    let (prefix, transport) = (size_of::<PuntHeader>(), 14 + header);
    let cut = &got.frame[prefix..];
    assert_eq!(cut.len(), transport + 8 + header + 8);
    assert_eq!(cut[..14], error[..14]);
    assert_eq!(
        cut[transport + 8..],
        error[transport + 8..transport + 8 + header + 8],
        "what is quoted"
    );
    if !v6 {
        assert_eq!((sum(&[&cut[14..34]]), sum(&[&cut[34..]])), (0xffff, 0xffff));
    }
    PuntHeader::read_from_bytes(&got.frame[..prefix]).unwrap()
}

fn router_of(client: (&str, u16)) -> &'static str {
    if client.0.contains(':') {
        "2001:db8:9::1"
    } else {
        "203.0.113.9"
    }
}

#[test]
fn an_icmp_error_goes_to_the_worker_of_its_connection() {
    for mut flow in read_connections(inspected(11, 21)) {
        let (client, server) = (flow.client, flow.server);
        let data = flow.run(&flow.data.clone());
        let of_flow = carried(&data, &flow.data);
        // About a packet of the server: the error arrives like packets of the client.
        let error = error_about(router_of(client), &segment(server, client, ACK, &[7; 400]));
        for hook in ENTRIES {
            flow.world.beat(palisade_datapath::monotonic_coarse());
            let got = carried_error(&flow.world.run(hook, &error), &error);
            assert_eq!(got.hash, of_flow.hash, "{hook:?}");
            assert_eq!(got.slots[1].endpoint, 0);
            let slot = got.slots[0];
            assert_eq!(slot, of_flow.slots[0], "{hook:?}");
            assert_eq!(slot.flags, punt_flags::INGRESS);
        }
        // About a packet of the client: the node sends the error.
        let error = error_about(server.0, &flow.data);
        let got = carried_error(&flow.world.run_local(&error), &error);
        assert_eq!((got.hash, got.hook), (of_flow.hash, punt_hook::TC_EGRESS));
        assert_eq!(got.slots[0].flags, punt_flags::REPLY);
        assert_eq!(got.slots[0].serial, of_flow.slots[0].serial);
        // The error does not count as a packet of the flow.
        let before = flow.flow();
        flow.run(&error_about(
            router_of(client),
            &segment(server, client, ACK, &[7; 400]),
        ));
        assert_eq!(flow.flow(), before);
    }
}

#[test]
fn icmp_errors_are_inspected_as_long_as_their_connection() {
    for mut flow in read_connections(inspected(11, 21)) {
        let (client, server) = (flow.client, flow.server);
        let error = error_about(router_of(client), &segment(server, client, ACK, &[7; 400]));
        flow.give(&flow.command(flow_op::WINDOWS));
        assert!(!flow.is_read());
        assert!(flow.run(&error).carried, "in a window, too");
        // No other quote matches the flow.
        for foreign in [
            segment((server.0, 81), client, ACK, &[7; 400]),
            segment(server, (client.0, 4001), ACK, &[7; 400]),
        ] {
            let got = flow.run(&error_about(router_of(client), &foreign));
            assert_eq!((got.carried, got.reason), (false, Reason::UnrelatedIcmp));
        }
        flow.give(&flow.command(flow_op::OFFLOAD));
        let got = flow.run(&error);
        assert_eq!(
            (got.passed, got.carried, got.reason),
            (true, false, Reason::Related)
        );
    }
    // In audit mode it is inspected as well.
    let audited = PolicyEntry {
        flags: entry_flags::AUDIT,
        ..inspected(11, 21)
    };
    for mut flow in read_connections(audited) {
        let quoted = segment(flow.server, flow.client, ACK, &[7; 400]);
        let error = error_about(router_of(flow.client), &quoted);
        let slot = carried_error(&flow.run(&error), &error).slots[0];
        assert_eq!(slot.flags, punt_flags::INGRESS | punt_flags::AUDIT);
    }
}

#[test]
fn an_unreadable_icmp_error_is_dropped() {
    for mut flow in read_connections(inspected(11, 21)) {
        let quoted = segment(flow.server, flow.client, ACK, &[7; 400]);
        let error = error_about(router_of(flow.client), &quoted);
        let late = palisade_datapath::monotonic_coarse() - 2_000_000_000;
        flow.world.beat(late);
        let got = flow.world.run(Hook::Xdp, &error);
        assert_eq!((got.passed, got.reason), (false, Reason::NoWorker));
        flow.world.config(|config| {
            carrying(config);
            config.flags = config_flags::FAIL_OPEN;
        });
        let got = flow.world.run(Hook::Xdp, &error);
        assert_eq!(
            (got.passed, got.carried, got.reason),
            (true, false, Reason::FailedOpen)
        );
        assert!(got.frame.len() < 120, "it is cut all the same");
        // Errors about a denied connection are dropped.
        flow.world
            .rule(HOST, INGRESS, identity::ANY, 5, entry(Decision::Deny, 9));
        flow.world.state(HOST, u32::from(HOST), 2, identity::HOST);
        let got = flow.run(&error);
        assert_eq!((got.passed, got.reason), (false, Reason::PolicyDenied));
    }
}

/// Between a workload and the node both policies inspect the flow; errors of a workload are inspected like all others.
#[test]
fn an_icmp_error_is_punted_for_both_policies() {
    for (a, host, outside) in [(A_V4, HOST_V4, WORLD_V4), (A_V6, HOST_V6, WORLD_V6)] {
        let mut world = reading(WORKLOAD, A);
        let (client, server) = ((a, 4000), (host, 80));
        let syn = tcp(client, server, SYN);
        let of_flow = carried(&world.run(Hook::TcIn, &syn), &syn);
        assert_eq!(of_flow.slots.map(|slot| slot.endpoint), [A, HOST]);
        // The node rejects the SYN.
        let error = error_about(host, &syn);
        let got = carried_error(&world.run_local(&error), &error);
        assert_eq!((got.hash, got.hook), (of_flow.hash, punt_hook::TC_EGRESS));
        assert_eq!(got.slots.map(|slot| slot.endpoint), [A, HOST]);
        assert_eq!(
            got.slots.map(|slot| slot.serial),
            of_flow.slots.map(|slot| slot.serial)
        );
        assert_eq!(
            got.slots.map(|slot| slot.flags),
            [punt_flags::INGRESS | punt_flags::REPLY, punt_flags::REPLY]
        );
        // A workload about a reply that it may have received.
        let mut world = reading(WORKLOAD, A);
        let server = (outside, 80);
        let syn = tcp(client, server, SYN);
        let of_flow = carried(&world.run(Hook::TcIn, &syn), &syn);
        let error = error_about(a, &segment(server, client, ACK, &[0xdd; 300]));
        let got = world.run(Hook::TcIn, &error);
        assert_eq!(carried_error(&got, &error).slots, {
            let mut slots = of_flow.slots;
            slots[0].flags = 0;
            slots
        });
        assert!(!got.frame.windows(4).any(|bytes| bytes == [0xdd; 4]));
        // With the address of another workload, or about a packet that it has not received, the error is dropped.
        let other = if a == A_V4 { B_V4 } else { B_V6 };
        let forged = error_about(other, &segment(server, client, ACK, &[0xdd; 300]));
        assert!(!world.run(Hook::TcIn, &forged).passed);
    }
}
