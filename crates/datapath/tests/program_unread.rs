//! No byte of a flow that must be inspected passes uninspected without a flow command of the worker for this very
//! connection, whatever both ends send, whatever is forged in their names, and however late flow commands arrive.
//!
//! Random histories run over the real programs. The test is the worker: it sends flow commands about packets that it
//! received, also at unusual times, and forwards a SYN+ACK only with the command that the connection replaces the one
//! before.

mod program;

use std::cell::RefCell;
use std::collections::HashSet;

use palisade_abi::{
    Config, CtEntry, CtKey, Decision, Direction, FlowCommand, Inspector, PolicyEntry, PuntHeader,
    ReinjectTrailer, flow_op, identity, punt_flags, reinject_flags, reinject_path,
};
use program::packets::*;
use program::*;
use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, RngAlgorithm, TestRng, TestRunner};
use zerocopy::{FromBytes as _, IntoBytes as _};

const COOKIE: u64 = 0x1122_3344_5566_7788;
const REDIRECT: u32 = 7;

/// Number of histories for each scene.
const HISTORIES: u32 = 150;

#[derive(Clone, Debug)]
enum Step {
    /// A segment. `own`: sent by the endpoint. `place`: position in the sequence space.
    Tcp {
        own: bool,
        flags: u8,
        place: u8,
        length: u8,
        spoilt: bool,
    },
    Udp {
        own: bool,
    },
    /// Flow command about a connection that was punted; 0 is the last one.
    Order {
        what: u32,
        which: u8,
        from: u8,
        length: u8,
    },
    /// The worker forwards the last punted SYN+ACK.
    Answered,
    /// The entry expires, or another flow evicts it.
    Expire,
    Evict,
    /// Other rules: inspected by this or another rule set, or not inspected.
    Rules(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let flags = prop_oneof![
        6 => Just(ACK),
        4 => Just(SYN),
        4 => Just(SYN | ACK),
        2 => Just(RST),
        1 => Just(RST | ACK),
        1 => Just(FIN | ACK),
    ];
    let what = prop_oneof![
        3 => Just(flow_op::OFFLOAD),
        3 => Just(flow_op::WINDOWS),
        1 => Just(flow_op::OPENED),
        1 => Just(flow_op::CLOSE),
    ];
    let step = prop_oneof![
        16 => (any::<bool>(), flags, 0u8..6, 0u8..3, prop::bool::weighted(0.3)).prop_map(
            |(own, flags, place, length, spoilt)| Step::Tcp { own, flags, place, length, spoilt }
        ),
        2 => any::<bool>().prop_map(|own| Step::Udp { own }),
        5 => (what, prop_oneof![4 => Just(0u8), 1 => 1u8..3], 0u8..6, 1u8..4).prop_map(
            |(what, which, from, length)| Step::Order { what, which, from, length }
        ),
        3 => Just(Step::Answered),
        1 => Just(Step::Expire),
        1 => Just(Step::Evict),
        1 => (0u8..3).prop_map(Step::Rules),
    ];
    prop::collection::vec(step, 1..30)
}

/// Two ends, and the direction in which their traffic is inspected.
#[derive(Clone, Copy, Debug)]
struct Scene {
    role: u8,
    endpoint: u16,
    own: (&'static str, u16),
    other: (&'static str, u16),
    /// Inspected direction; the other one is allowed without inspection.
    read: Direction,
}

/// Flow command of the worker, and the connection for which it was sent.
struct Given {
    connection: u64,
    command: FlowCommand,
}

struct Play<'a> {
    world: &'a mut World,
    scene: Scene,
    rules: u8,
    revision: u32,
    /// Serial, rule set and flags of punted packets.
    told: Vec<(u32, u32, u32)>,
    answer: Option<(Vec<u8>, u32)>,
    orders: Vec<Given>,
    /// Number of connections so far.
    connection: u64,
    /// Serials of flows that were opened in the direction without inspection.
    plain: HashSet<u32>,
    unread: u64,
}

fn reading(config: &mut Config) {
    config.cookie = COOKIE;
    config.worker_timeout = 5_000_000_000;
    config.punt_ifindex = IFINDEX;
    config.workers = 1;
    config.mark = 0x5a5a_0001;
    config.inspectors = 1 << Inspector::Dns as u32;
}

const fn sequence(place: u8) -> u32 {
    // Around the wrap of the sequence numbers.
    0xffff_ff00_u32.wrapping_add(place as u32 * 100)
}

impl Play<'_> {
    fn key(&self, protocol: u8) -> CtKey {
        key(self.scene.endpoint, protocol, self.scene.own, self.scene.other)
    }

    fn set_rules(&mut self, rules: u8) {
        let scene = self.scene;
        let entry = match rules {
            0 | 1 => PolicyEntry {
                inspector: Inspector::Dns as u8,
                ruleset: 21 + u32::from(rules),
                ..entry(Decision::Inspect, 11)
            },
            _ => entry(Decision::Allow, 7),
        };
        self.world
            .rule(scene.endpoint, scene.read, identity::ANY, 5, entry);
        self.rules = rules;
        self.revision += 1;
        let identity = if scene.endpoint == HOST {
            identity::HOST
        } else {
            A_IDENTITY
        };
        self.world
            .state(scene.endpoint, u32::from(scene.endpoint), self.revision, identity);
    }

    /// Runs a frame.
    fn run(&mut self, own: bool, frame: &[u8]) -> Outcome {
        self.world.beat(palisade_datapath::monotonic_coarse());
        match (self.scene.role, own) {
            (NIC, false) => self.world.run(Hook::Xdp, frame),
            (NIC, true) => self.world.run_local(frame),
            (_, true) => self.world.run(Hook::TcIn, frame),
            (_, false) => self.world.run(Hook::TcOut, frame),
        }
    }

    fn frame(&self, own: bool, flags: u8, place: u8, length: u8, spoilt: bool) -> Vec<u8> {
        let (from, to) = if own {
            (self.scene.own, self.scene.other)
        } else {
            (self.scene.other, self.scene.own)
        };
        let mut frame = segment(from, to, flags, &vec![7; usize::from(length) * 50]);
        let at = if from.0.contains(':') { 14 + 40 } else { 14 + 20 };
        frame[at + 4..at + 8].copy_from_slice(&sequence(place).to_be_bytes());
        if spoilt {
            frame[at + 16] ^= 0xff;
        }
        frame
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Tcp {
                own,
                flags,
                place,
                length,
                spoilt,
            } => {
                let frame = self.frame(own, flags, place, length, spoilt);
                let got = self.run(own, &frame);
                let entry = self.world.flow(&self.key(6));
                if got.carried {
                    let slot = PuntHeader::read_from_bytes(&got.frame[..size_of::<PuntHeader>()])
                        .unwrap()
                        .slots[0];
                    prop_assert_eq!(slot.endpoint, self.scene.endpoint);
                    if slot.flags & punt_flags::NEW != 0 {
                        self.connection += 1;
                        self.answer = None;
                    }
                    let audit = u32::from(slot.flags & punt_flags::AUDIT);
                    self.told.push((slot.serial, slot.ruleset, audit));
                    if flags == SYN | ACK && !spoilt {
                        self.answer = Some((frame, slot.serial));
                    }
                    return Ok(());
                }
                let opens_plain =
                    flags & (SYN | ACK) == SYN && own == (self.scene.read == Direction::Ingress);
                if let Some(entry) = entry
                    && got.passed
                    && opens_plain
                    && entry.inspector == 0
                {
                    self.plain.insert(entry.serial);
                }
                if got.passed && self.rules != 2 {
                    self.check(entry, own, flags, place, length)?;
                }
            }
            Step::Udp { own } => {
                let (from, to) = if own {
                    (self.scene.own, self.scene.other)
                } else {
                    (self.scene.other, self.scene.own)
                };
                let got = self.run(own, &udp(from, to, b"datagram"));
                prop_assert!(got.carried || !got.passed || self.rules == 2, "{:?}", got.reason);
            }
            Step::Order {
                what,
                which,
                from,
                length,
            } => {
                let Some(&(serial, ruleset, punt_flags)) = self.told.iter().nth_back(usize::from(which))
                else {
                    return Ok(());
                };
                let (from, to) = (sequence(from), sequence(from + length));
                let command = FlowCommand {
                    key: self.key(6),
                    serial,
                    op: what,
                    ruleset,
                    punt_flags,
                    windows: if what == flow_op::WINDOWS {
                        [from, to, from, to]
                    } else {
                        [0; 4]
                    },
                };
                let frame = [
                    &[0; 14],
                    command.as_bytes(),
                    self.behind(reinject_path::NONE).as_bytes(),
                ]
                .concat();
                self.world.run_back(&frame);
                self.orders.push(Given {
                    connection: self.connection,
                    command,
                });
            }
            Step::Answered => {
                let Some((frame, serial)) = self.answer.take() else {
                    return Ok(());
                };
                let next = serial.wrapping_add(0x9e37_79b9);
                let command = FlowCommand {
                    key: self.key(6),
                    serial,
                    op: flow_op::REPLACE,
                    windows: [next, 0, 0, 0],
                    ..FlowCommand::default()
                };
                let behind = self.behind(reinject_path::EGRESS);
                let frame = [&frame[..], command.as_bytes(), behind.as_bytes()].concat();
                let (retval, ..) = self.world.run_back(&frame);
                let is_of_it = self
                    .world
                    .flow(&self.key(6))
                    .is_some_and(|entry| entry.serial == next);
                // The SYN+ACK is forwarded exactly if the flow command was executed.
                prop_assert_eq!(retval == REDIRECT, is_of_it);
                if is_of_it {
                    self.connection += 1;
                }
            }
            Step::Expire => {
                for protocol in [6, 17] {
                    let key = self.key(protocol);
                    if let Some(mut entry) = self.world.flow(&key) {
                        entry.expires = 1;
                        self.world.set_flow(&key, &entry);
                    }
                }
            }
            Step::Evict => self.world.forget_flows(),
            Step::Rules(rules) => self.set_rules(rules),
        }
        Ok(())
    }

    fn behind(&self, path: u8) -> ReinjectTrailer {
        ReinjectTrailer {
            cookie: COOKIE,
            ifindex: IFINDEX,
            path,
            flags: reinject_flags::COMMAND,
            zero: [0; 2],
        }
    }

    /// Checks a packet that has passed without inspection.
    fn check(
        &mut self,
        entry: Option<CtEntry>,
        own: bool,
        flags: u8,
        place: u8,
        length: u8,
    ) -> Result<(), TestCaseError> {
        let Some(entry) = entry else {
            return Err(TestCaseError::fail("passed without an entry"));
        };
        if entry.inspector == 0 {
            prop_assert!(self.plain.contains(&entry.serial), "{:?}", entry);
            return Ok(());
        }
        prop_assert_eq!(flags & SYN, 0, "a SYN");
        // The last flow command for the connection with this serial, under the rules in force.
        let last = self.orders.iter().rev().find(|given| {
            let command = &given.command;
            command.serial == entry.serial
                && command.ruleset == entry.ruleset
                && matches!(command.op, flow_op::OFFLOAD | flow_op::WINDOWS)
        });
        let Some(Given { connection, command }) = last else {
            return Err(TestCaseError::fail(format!("no command: {entry:?}")));
        };
        prop_assert_eq!(*connection, self.connection, "a command for another connection");
        if command.op == flow_op::WINDOWS && length > 0 {
            let reply = (entry.flags & palisade_abi::ct_flags::INGRESS != 0) == own;
            let at = usize::from(reply) * 2;
            let start = sequence(place).wrapping_sub(command.windows[at]);
            let room = command.windows[at + 1].wrapping_sub(command.windows[at]);
            prop_assert!(
                start < room && u32::from(length) * 50 <= room - start,
                "outside the window"
            );
        }
        self.unread += 1;
        Ok(())
    }
}

#[test]
fn nothing_passes_uninspected_without_a_flow_command_for_this_connection() {
    let mut scenes = Vec::new();
    for (host, world) in [(HOST_V4, WORLD_V4), (HOST_V6, WORLD_V6)] {
        scenes.push(Scene {
            role: NIC,
            endpoint: HOST,
            own: (host, 80),
            other: (world, 4000),
            read: Direction::Ingress,
        });
        scenes.push(Scene {
            role: NIC,
            endpoint: HOST,
            own: (host, 5000),
            other: (world, 80),
            read: Direction::Egress,
        });
    }
    for (workload, world) in [(A_V4, WORLD_V4), (A_V6, WORLD_V6)] {
        scenes.push(Scene {
            role: WORKLOAD,
            endpoint: A,
            own: (workload, 5000),
            other: (world, 80),
            read: Direction::Egress,
        });
        scenes.push(Scene {
            role: WORKLOAD,
            endpoint: A,
            own: (workload, 80),
            other: (world, 4000),
            read: Direction::Ingress,
        });
    }
    let mut unread = 0;
    for scene in scenes {
        let world = World::new(scene.role, scene.endpoint);
        world.config(reading);
        for direction in [Direction::Ingress, Direction::Egress] {
            for class in [0, 5] {
                world.rule(
                    scene.endpoint,
                    direction,
                    identity::ANY,
                    class,
                    entry(Decision::Allow, 7),
                );
            }
        }
        let world = RefCell::new(world);
        let (revision, passed) = (RefCell::new(1), RefCell::new(0));
        let cases = Cases {
            cases: HISTORIES,
            failure_persistence: None,
            ..Cases::default()
        };
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        TestRunner::new_with_rng(cases, rng)
            .run(&steps(), |steps| {
                let mut world = world.borrow_mut();
                world.forget_flows();
                let mut play = Play {
                    world: &mut world,
                    scene,
                    rules: 0,
                    revision: *revision.borrow(),
                    told: Vec::new(),
                    answer: None,
                    orders: Vec::new(),
                    connection: 0,
                    plain: HashSet::new(),
                    unread: 0,
                };
                play.set_rules(0);
                let outcome = steps.iter().try_for_each(|step| play.step(step));
                *revision.borrow_mut() = play.revision;
                *passed.borrow_mut() += play.unread;
                outcome
            })
            .unwrap_or_else(|problem| panic!("{scene:?}: {problem}"));
        unread += passed.into_inner();
    }
    // The histories contain packets that offload lets pass.
    println!("{unread} packets passed unread, by command");
    assert!(unread > 100, "{unread}");
}
