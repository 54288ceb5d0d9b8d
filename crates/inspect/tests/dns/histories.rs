//! Random histories of several clients against a naive model of verdicts, reasons and times.

use std::collections::BTreeMap;

use palisade_abi::{PuntRequest, Reason};
use palisade_inspect::{CommitRequest, DnsLimits, Limits, Millis, TrackLimits};
use proptest::prelude::*;

use crate::common::*;

const NAMES: [&str; 3] = ["allowed.test", "x.wild.test", "denied.test"];
const HELD: usize = 4;
const HELD_PER_ENDPOINT: usize = 3;
const OPEN: usize = 7;
const OPEN_PER_ENDPOINT: usize = 5;
const QUERY_TIMEOUT: Millis = 10_000;
const DEADLINE: Millis = 2000;

#[derive(Clone, Debug)]
enum Step {
    Ask {
        who: Who,
        audit: bool,
    },
    Answer {
        who: Who,
        kind: AnswerKind,
        audit: bool,
    },
    CommitResult {
        which: prop::sample::Index,
        committed: bool,
    },
    Wait {
        time: Millis,
    },
    Forget {
        endpoint: u16,
    },
    QueueFull {
        full: bool,
    },
}

/// Endpoint (3 is the resolver), port, ID, name.
type Who = (u16, u16, u16, usize);

#[derive(Clone, Copy, Debug)]
enum AnswerKind {
    Address,
    NoAddress,
    Garbage,
}

fn who() -> impl Strategy<Value = Who> {
    (1_u16..4, 4000_u16..4002, 0_u16..3, 0..NAMES.len())
}

fn step() -> impl Strategy<Value = Step> {
    let audit = || prop::bool::weighted(0.1);
    let kind = prop_oneof![
        6 => Just(AnswerKind::Address),
        2 => Just(AnswerKind::NoAddress),
        1 => Just(AnswerKind::Garbage),
    ];
    prop_oneof![
        8 => (who(), audit()).prop_map(|(who, audit)| Step::Ask { who, audit }),
        8 => (who(), kind, audit()).prop_map(|(who, kind, audit)| Step::Answer { who, kind, audit }),
        5 => (any::<prop::sample::Index>(), prop::bool::weighted(0.7))
            .prop_map(|(which, committed)| Step::CommitResult { which, committed }),
        3 => (0..3 * DEADLINE).prop_map(|time| Step::Wait { time }),
        1 => (1_u16..4).prop_map(|endpoint| Step::Forget { endpoint }),
        1 => any::<bool>().prop_map(|full| Step::QueueFull { full }),
    ]
}

#[derive(Default)]
struct Model {
    open: BTreeMap<Who, Millis>,
    /// Handle, endpoint, time and audit mode of each held answer, by ticket.
    held: BTreeMap<u64, (usize, u16, Millis, bool)>,
}

impl Model {
    fn expire(&mut self, now: Millis) {
        self.open.retain(|_, at| now - *at <= QUERY_TIMEOUT);
    }

    fn ask(&mut self, who: Who, audit: bool, now: Millis) -> Fate {
        let denied = NAMES[who.3] == "denied.test";
        if denied && !audit {
            return Fate::Discarded(Reason::AppDenied);
        }
        self.expire(now);
        self.open.remove(&who);
        let of_endpoint = self.open.keys().filter(|other| other.0 == who.0).count();
        if self.open.len() >= OPEN || of_endpoint >= OPEN_PER_ENDPOINT {
            return if audit {
                Fate::Released
            } else {
                Fate::Discarded(Reason::InspectLimit)
            };
        }
        self.open.insert(who, now);
        Fate::Released
    }

    /// None if the answer is held for its commit.
    fn answer(&mut self, who: Who, kind: AnswerKind, full: bool, now: Millis) -> Result<Fate, ()> {
        if matches!(kind, AnswerKind::Garbage) {
            return Ok(Fate::Discarded(Reason::AppMalformed));
        }
        self.expire(now);
        if self.open.remove(&who).is_none() {
            return Ok(Fate::Discarded(Reason::DnsUnsolicited));
        }
        if matches!(kind, AnswerKind::NoAddress) || who.0 == 3 {
            return Ok(Fate::Released);
        }
        let of_endpoint = self.held.values().filter(|held| held.1 == who.0).count();
        if self.held.len() >= HELD || of_endpoint >= HELD_PER_ENDPOINT {
            return Ok(Fate::Discarded(Reason::InspectLimit));
        }
        if full {
            return Ok(Fate::Discarded(Reason::DnsUncommitted));
        }
        Err(())
    }
}

fn audited(fate: Fate, audit: bool) -> Fate {
    if audit { Fate::Released } else { fate }
}

fn run(steps: Vec<Step>) -> Result<(), TestCaseError> {
    let mut world = World::new(&Limits {
        dns: DnsLimits {
            held: HELD,
            held_per_endpoint: HELD_PER_ENDPOINT,
            deadline: DEADLINE,
            track: TrackLimits {
                total: OPEN,
                per_endpoint: OPEN_PER_ENDPOINT,
                timeout: QUERY_TIMEOUT,
            },
            ..DnsLimits::default()
        },
        ..Limits::default()
    });
    let mut model = Model::default();
    // Open commit requests.
    let mut out: Vec<CommitRequest> = vec![];
    let mut committed_before_release = vec![];
    for step in steps {
        match step {
            Step::Ask { who, audit: mode } => {
                let (endpoint, port, id, name) = who;
                let slot: PuntRequest = if endpoint == 3 {
                    is_asked(3)
                } else {
                    asks(endpoint)
                };
                let slot = if mode { audit(slot) } else { slot };
                let frame = to_server(port, &query(id, NAMES[name], A)).frame();
                let emitted = world.sink.emitted.len();
                let handle = world.send(&slot, &frame);
                let expected = model.ask(who, mode, world.now);
                prop_assert_eq!(world.fate(handle), Some(&expected), "{:?}", who);
                let replied = world.sink.emitted.len() - emitted;
                prop_assert_eq!(
                    replied,
                    usize::from(expected == Fate::Discarded(Reason::AppDenied))
                );
            }
            Step::Answer {
                who,
                kind,
                audit: mode,
            } => {
                let (endpoint, port, id, name) = who;
                let slot = if endpoint == 3 {
                    tells(3)
                } else {
                    is_told(endpoint)
                };
                let slot = if mode { audit(slot) } else { slot };
                let message = match kind {
                    AnswerKind::Address => address(id, NAMES[name]),
                    AnswerKind::NoAddress => answer(id, NAMES[name], A, 0, &[]),
                    AnswerKind::Garbage => vec![0; 13],
                };
                let handle = world.send(&slot, &to_client(port, &message).frame());
                let full = world.sink.room == Some(0);
                match model.answer(who, kind, full, world.now) {
                    Ok(fate) => prop_assert_eq!(world.fate(handle), Some(&audited(fate, mode)), "{:?}", who),
                    Err(()) => {
                        prop_assert_eq!(world.fate(handle), None);
                        let learn = world.sink.learns.pop_back().expect("a question");
                        prop_assert_eq!(learn.endpoint, endpoint);
                        prop_assert_eq!(learn.answer.addresses.len(), 1);
                        model
                            .held
                            .insert(learn.ticket, (handle, endpoint, world.now, mode));
                        out.push(learn);
                    }
                }
                prop_assert!(world.sink.learns.is_empty());
            }
            Step::CommitResult { which, committed } => {
                if out.is_empty() {
                    continue;
                }
                let learn = out.swap_remove(which.index(out.len()));
                let ticket = learn.ticket;
                let before = world.sink.fates.len();
                world.learned_one(learn, committed);
                match model.held.remove(&ticket) {
                    Some((handle, _, _, mode)) => {
                        let fate = if committed {
                            committed_before_release.push(handle);
                            Fate::Released
                        } else {
                            audited(Fate::Discarded(Reason::DnsUncommitted), mode)
                        };
                        prop_assert_eq!(world.fate(handle), Some(&fate));
                        prop_assert_eq!(world.sink.fates.len(), before + 1);
                    }
                    None => prop_assert_eq!(world.sink.fates.len(), before),
                }
            }
            Step::Wait { time } => {
                let deadline = model.held.values().map(|held| held.2 + DEADLINE).min();
                prop_assert_eq!(world.engine.deadline(), deadline);
                world.wait(time);
                let now = world.now;
                let overdue: Vec<_> = model
                    .held
                    .extract_if(.., |_, held| now - held.2 >= DEADLINE)
                    .collect();
                for (_, (handle, _, _, mode)) in overdue {
                    let fate = audited(Fate::Discarded(Reason::DnsUncommitted), mode);
                    prop_assert_eq!(world.fate(handle), Some(&fate));
                }
            }
            Step::Forget { endpoint } => {
                world.engine.forget_endpoint(endpoint, &mut world.sink);
                model.open.retain(|who, _| who.0 != endpoint);
                let gone: Vec<_> = model.held.extract_if(.., |_, held| held.1 == endpoint).collect();
                for (_, (handle, ..)) in gone {
                    prop_assert_eq!(world.fate(handle), Some(&Fate::Discarded(Reason::DnsUncommitted)));
                }
            }
            Step::QueueFull { full } => world.sink.room = full.then_some(0),
        }
        for (handle, ..) in model.held.values() {
            prop_assert_eq!(world.fate(*handle), None);
        }
        prop_assert_eq!(world.sink.fates.len() + model.held.len(), world.sent);
        prop_assert_eq!(world.engine.stats().dns.held, model.held.len() as u64);
    }
    world.end();
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn as_a_naive_model_does(steps in prop::collection::vec(step(), 1..120)) {
        run(steps)?;
    }
}
