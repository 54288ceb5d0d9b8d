//! Random histories over a map whose writes fail half-way. Every address of a committed answer must be in the map.

use std::{collections::BTreeSet, sync::PoisonError};

use palisade_fqdn::Config;
use palisade_inspect::{CommitRequest, commit::commit_queue};
use palisade_model::rule::FqdnPattern;
use palisade_protocols::dns::{Address, CLASS_IN, Question, Source as RecordSource, rtype};
use proptest::prelude::*;

use super::*;

const NAMES: [&str; 3] = ["a.test", "x.a.test", "b.test"];
const PATTERNS: [&str; 3] = ["a.test", "*.a.test", "*.test"];
/// Whether each pattern matches each name.
const MATCHES: [[bool; 3]; 3] = [[true, false, false], [false, true, false], [true, false, true]];
/// Selectors of each policy.
const POLICIES: [&[u32]; 4] = [&[0, 1], &[1, 2], &[0, 1, 2], &[]];
const ADDRESSES: usize = 4;

fn address(number: usize) -> IpAddr {
    [192, 0, 2, number as u8 + 1].into()
}

/// Resolver with identities of the form generation × 8 + selectors as bits.
struct Fake {
    generation: u32,
    known: u8,
}

impl IdentityResolver for Fake {
    fn identity(&self, _: IpAddr, selectors: &[SelectorId]) -> Option<Identity> {
        let bits: u32 = selectors.iter().map(|id| 1 << id.0).sum();
        (self.known >> bits & 1 == 1).then_some(self.generation * 8 + bits)
    }
}

#[derive(Default)]
struct Map {
    entries: BTreeMap<LearnedKey, Identity>,
    /// Number of entries that can be written before a write fails.
    good_for: Option<usize>,
}

#[derive(Clone, Default)]
struct FakeMap(Arc<Mutex<Map>>);

impl FakeMap {
    fn lock(&self) -> MutexGuard<'_, Map> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write<T>(
        &self,
        all: &[T],
        mut write: impl FnMut(&mut BTreeMap<LearnedKey, Identity>, &T),
    ) -> Result<(), String> {
        let mut map = self.lock();
        let good_for = map.good_for.take();
        for one in all.iter().take(good_for.unwrap_or(usize::MAX)) {
            write(&mut map.entries, one);
        }
        match good_for {
            Some(_) => Err("refused".to_owned()),
            None => Ok(()),
        }
    }

    /// Applies a transition, or only its first `steps` entries.
    fn go(&self, transition: &Transition, steps: usize) {
        let mut map = self.lock();
        let gone = transition
            .old
            .entries
            .keys()
            .filter(|key| !transition.new.entries.contains_key(key));
        let gone: Vec<_> = gone.copied().map(|key| (key, None)).collect();
        let there = transition
            .new
            .entries
            .iter()
            .map(|(key, identity)| (*key, Some(*identity)));
        for (key, identity) in there.chain(gone).take(steps) {
            match identity {
                Some(identity) => map.entries.insert(key, identity),
                None => map.entries.remove(&key),
            };
        }
    }
}

impl Writer for FakeMap {
    fn put(&self, entries: &[(LearnedKey, Identity)]) -> Result<(), String> {
        self.write(entries, |map, (key, identity)| {
            map.insert(*key, *identity);
        })
    }

    fn remove(&self, keys: &[LearnedKey]) -> Result<(), String> {
        self.write(keys, |map, key| {
            map.remove(key);
        })
    }
}

#[derive(Clone, Debug)]
enum Step {
    CommitRequest {
        endpoint: u16,
        name: usize,
        addresses: u8,
        ttl: u32,
    },
    FailNext {
        after: usize,
    },
    Sweep {
        in_use: u8,
    },
    Clean {
        name: usize,
    },
    /// Makes the identities that answers wait for.
    Extend,
    Policy {
        policies: [usize; 2],
        known: u8,
    },
    /// A policy change that fails after some steps. The old state is put back, completely or for some steps.
    FailedPolicy {
        policies: [usize; 2],
        after: usize,
        back: Option<usize>,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let policies = || [0..POLICIES.len(), 0..POLICIES.len()];
    prop_oneof![
        8 => (1..3_u16, 0..3_usize, 1..16_u8, prop_oneof![Just(0), Just(3600)])
            .prop_map(|(endpoint, name, addresses, ttl)| Step::CommitRequest { endpoint, name, addresses, ttl }),
        2 => (0..3_usize).prop_map(|after| Step::FailNext { after }),
        2 => any::<u8>().prop_map(|in_use| Step::Sweep { in_use }),
        1 => (0..3_usize).prop_map(|name| Step::Clean { name }),
        2 => Just(Step::Extend),
        2 => (policies(), any::<u8>()).prop_map(|(policies, known)| Step::Policy { policies, known }),
        2 => (policies(), 0..6_usize, prop::option::of(0..6_usize))
            .prop_map(|(policies, after, back)| Step::FailedPolicy { policies, after, back }),
    ]
}

fn policy_of(policies: [usize; 2]) -> Policy {
    let mut policy = Policy::default();
    for (at, which) in policies.into_iter().enumerate() {
        let patterns: Vec<(SelectorId, FqdnPattern)> = POLICIES[which]
            .iter()
            .map(|id| {
                let text = PATTERNS[*id as usize].to_owned();
                let pattern = if text.contains('*') {
                    FqdnPattern::Pattern(text)
                } else {
                    FqdnPattern::Name(text)
                };
                (SelectorId(*id), pattern)
            })
            .collect();
        let selectors = Selectors::new(patterns.iter().map(|(id, pattern)| (*id, pattern))).unwrap();
        policy.selectors.insert(at as u16 + 1, Arc::new(selectors));
    }
    policy
}

fn answer(name: usize, addresses: u8, ttl: u32) -> Box<Answer> {
    let addresses = (0..ADDRESSES).filter(|n| addresses >> n & 1 == 1);
    Box::new(Answer {
        question: Some(Question {
            name: NAMES[name].parse().unwrap(),
            rtype: rtype::A,
            class: CLASS_IN,
        }),
        ttl: Some(ttl),
        addresses: addresses
            .map(|n| Address {
                ip: address(n),
                ttl,
                source: RecordSource::Record,
            })
            .collect(),
        ..Answer::default()
    })
}

proptest! {
    #[test]
    fn an_answer_is_released_only_if_the_map_holds_what_it_implies(steps in prop::collection::vec(step(), 0..60)) {
        let map = FakeMap::default();
        // An entry of a previous daemon that is not in the journal.
        map.lock().entries.insert(key(1, address(0)), 99_999);
        let found = map.lock().entries.clone().into_iter().collect();
        let config = Config { min_ttl: 0, ..Config::default() };
        let names = FqdnManager::new(Cache::new(config), found, map.clone(), |_| {});
        let endpoints: BTreeMap<u16, String> = [(1, "a".to_owned()), (2, "b".to_owned())].into();
        let (queue, questions) = commit_queue(256);
        names.set_epoch(questions.epoch());
        let mut committer = queue.committer(256, Arc::new(|| {}));
        let mut asked: Vec<(u16, usize, u8)> = Vec::new();
        // Leases of answers that can be forwarded again without a commit.
        let mut leases: Vec<(Lease, u64)> = Vec::new();
        let mut policies = [3, 3];
        let (mut generation, mut known) = (1, 0xff_u8);
        let begin = Step::Policy { policies: [0, 1], known: 0b0000_0110 };
        let end = [Step::Policy { policies: [2, 1], known: 0xff }, Step::Sweep { in_use: 0 }];
        for step in std::iter::once(begin).chain(steps).chain(end) {
            match step {
                Step::CommitRequest { endpoint, name, addresses, ttl } => {
                    let ticket = asked.len() as u64;
                    asked.push((endpoint, name, addresses));
                    committer.submit(CommitRequest { ticket, endpoint, answer: answer(name, addresses, ttl) }).unwrap();
                    let mut batch = vec![questions.next_waiting().unwrap()];
                    names.commit_answers(&mut batch);
                }
                Step::FailNext { after } => map.lock().good_for = Some(after),
                Step::Sweep { in_use } => {
                    let used = |n: &usize| in_use >> n & 1 == 1;
                    let used: HashSet<IpAddr> = (0..ADDRESSES).filter(used).map(address).collect();
                    names.sweep(&[(1, used.clone()), (2, used)].into());
                }
                Step::Clean { name } => {
                    names.clean(None, |known| *known == NAMES[name].parse::<Name>().unwrap());
                }
                Step::Extend => {
                    known = 0xff;
                    names.extended(&mut names.lock(), Arc::new(Fake { generation, known }), &BTreeSet::new());
                }
                Step::Policy { policies: new, known: first } => {
                    map.lock().good_for = None;
                    let change = names.change(&policy_of(new), &endpoints, true);
                    generation += 1;
                    // As in the control thread, missing identities are made before the transition is planned.
                    known = first;
                    if !change.missing(&Fake { generation, known }).is_empty() {
                        known = 0xff;
                    }
                    let resolver = Fake { generation, known };
                    let transition = change.plan(&resolver);
                    map.go(&transition, usize::MAX);
                    policies = new;
                    change.done(&transition, Arc::new(resolver));
                }
                Step::FailedPolicy { policies: new, after, back } => {
                    map.lock().good_for = None;
                    let mut change = names.change(&policy_of(new), &endpoints, true);
                    let other = Fake { generation: generation + 1_000, known: 0xff };
                    let transition = change.plan(&other);
                    map.go(&transition, after);
                    change.failed(&transition);
                    let old = Fake { generation, known };
                    let transition = change.plan(&old);
                    match back {
                        None => {
                            map.go(&transition, usize::MAX);
                            change.done(&transition, Arc::new(old));
                        }
                        Some(steps) => {
                            map.go(&transition, steps);
                            change.failed(&transition);
                        }
                    }
                }
            }
            let mut committed = Vec::new();
            while let Some(learned) = committer.take() {
                if !learned.committed {
                    prop_assert_eq!(learned.lease, None);
                    continue;
                }
                committed.push(learned.ticket);
                // Only leases of more than a quarter of an hour are kept, because they cannot expire while the test
                // runs.
                leases.extend(learned.lease.filter(|lease| lease.good_for > 900_000).map(|lease| (lease, learned.ticket)));
            }
            leases.retain(|(lease, _)| lease.epoch == committer.epoch());
            for ticket in leases.iter().map(|(_, ticket)| *ticket).chain(committed) {
                let (endpoint, name, addresses) = asked[ticket as usize];
                let implied: u32 = POLICIES[policies[usize::from(endpoint) - 1]]
                    .iter()
                    .filter(|id| MATCHES[**id as usize][name])
                    .map(|id| 1 << id)
                    .sum();
                for n in (0..ADDRESSES).filter(|n| implied != 0 && addresses >> n & 1 == 1) {
                    let held = map.lock().entries.get(&key(endpoint, address(n))).copied();
                    let held = held.unwrap_or_default();
                    prop_assert_eq!(held / 8, generation, "of another policy: {}", held);
                    prop_assert_eq!((held % 8) & implied, implied);
                }
            }
        }
        // No write fails any more: the map must hold exactly what the cache implies.
        names.sweep(&HashMap::new());
        prop_assert_eq!(committer.open(), 0, "answers that nobody brings to an end");
        let mut wanted: BTreeMap<LearnedKey, BTreeSet<u32>> = BTreeMap::new();
        for (name, _) in names.list(None) {
            for address in &name.addresses {
                let selectors = name.selectors.iter().map(|id| id.0);
                wanted.entry(key(name.endpoint, address.ip)).or_default().extend(selectors);
            }
        }
        wanted.retain(|_, selectors| !selectors.is_empty());
        let wanted: BTreeMap<LearnedKey, Identity> = wanted
            .into_iter()
            .map(|(key, selectors)| (key, generation * 8 + selectors.iter().map(|id| 1 << id).sum::<u32>()))
            .collect();
        prop_assert_eq!(&map.lock().entries, &wanted);
    }
}

#[test]
fn learned_names_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let endpoints: BTreeMap<u16, String> = [(1, "a".to_owned())].into();
    let map = FakeMap::default();
    let open = |map: &FakeMap| {
        let found = map.lock().entries.clone().into_iter().collect();
        let mut names = FqdnManager::new(Cache::new(Config::default()), found, map.clone(), |_| {});
        names.remember(dir.path(), endpoints.clone()).unwrap();
        let change = names.change(&policy_of([0, 3]), &endpoints, true);
        let resolver = Fake {
            generation: 1,
            known: 0xff,
        };
        let transition = change.plan(&resolver);
        map.go(&transition, usize::MAX);
        change.done(&transition, Arc::new(resolver));
        names
    };
    let names = open(&map);
    let (queue, questions) = commit_queue(8);
    let mut committer = queue.committer(8, Arc::new(|| {}));
    committer
        .submit(CommitRequest {
            ticket: 7,
            endpoint: 1,
            answer: answer(0, 3, 0),
        })
        .unwrap();
    names.commit_answers(&mut vec![questions.next_waiting().unwrap()]);
    let back = committer.take().unwrap();
    assert!(back.committed && back.ticket == 7);
    assert_eq!(*names.names_of(1, address(0)), [Arc::from("a.test")]);
    let before = map.lock().entries.clone();
    assert_eq!(before.len(), 2);
    names.flush();
    // The manager is leaked, as after a crash: only the journal survives.
    std::mem::forget(names);
    let stranger = key(1, address(3));
    map.lock().entries.insert(stranger, 9);
    let names = open(&map);
    assert_eq!(
        map.lock().entries,
        before,
        "what nobody remembers goes, the rest stays"
    );
    let list = names.list(Some(1));
    assert_eq!(list.len(), 1);
    assert_eq!(list[0].1, [Source::Restored, Source::Restored]);
    assert_eq!(names.clean(None, |_| true), 2);
    assert!(map.lock().entries.is_empty());
    assert_eq!(names.take_reevaluated(), [1].into());
}

#[test]
fn eviction_ends_the_epoch() {
    let map = FakeMap::default();
    let config = Config {
        addresses_per_name: 1,
        ..Config::default()
    };
    let names = FqdnManager::new(Cache::new(config), Vec::new(), map.clone(), |_| {});
    let (queue, questions) = commit_queue(8);
    names.set_epoch(questions.epoch());
    let mut committer = queue.committer(8, Arc::new(|| {}));
    let endpoints: BTreeMap<u16, String> = [(1, "a".to_owned())].into();
    let change = names.change(&policy_of([0, 3]), &endpoints, true);
    let resolver = Fake {
        generation: 1,
        known: 0xff,
    };
    let transition = change.plan(&resolver);
    map.go(&transition, usize::MAX);
    change.done(&transition, Arc::new(resolver));
    let mut learn = |addresses| {
        let learn = CommitRequest {
            ticket: 0,
            endpoint: 1,
            answer: answer(0, addresses, 3600),
        };
        committer.submit(learn).unwrap();
        names.commit_answers(&mut vec![questions.next_waiting().unwrap()]);
        let learned = committer.take().unwrap();
        assert!(learned.committed);
        (learned.lease, committer.epoch())
    };
    let (first, epoch) = learn(1);
    assert_eq!(
        first,
        Some(Lease {
            good_for: 3_600_000,
            epoch
        })
    );
    assert_eq!(learn(1), (first, epoch), "told again, nothing has changed");
    let (second, after) = learn(2);
    assert_ne!(after, epoch, "the first address had to go");
    assert_eq!(second.map(|lease| lease.epoch), Some(after));
    assert_eq!(map.lock().entries.len(), 1);
}
