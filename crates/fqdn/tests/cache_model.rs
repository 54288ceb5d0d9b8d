//! The cache compared with a naive model over random histories: pending answers, writes that fail half-way, sweeps,
//! policies, limits. The maps are a set, which must contain all addresses of each released answer.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
    net::IpAddr,
    sync::Arc,
};

use palisade_fqdn::{
    Cache, Change, ChangeKind, Config, EndpointId, Millis, Pending, SelectorId, Selectors,
    SniAddressIndex as Looked, Uncommitted, Update,
};
use palisade_model::rule::FqdnPattern;
use palisade_policy::l7::name_matches;
use palisade_protocols::dns::{Address, Answer, Question, Source, rtype};
use proptest::prelude::*;

const NAMES: [&str; 6] = ["a.test", "b.test", "x.a.test", "y.a.test", "x.b.test", "z"];
const PATTERNS: [&str; 6] = ["a.test", "*.a.test", "**.test", "*", "x.*.test", "b.test"];
const ADDRESSES: [&str; 7] = [
    "192.0.2.1",
    "192.0.2.2",
    "192.0.2.3",
    "192.0.2.4",
    "2001:db8::1",
    "2001:db8::2",
    "192.0.2.5",
];
const ENDPOINTS: EndpointId = 2;

fn pattern(index: usize) -> FqdnPattern {
    let text = PATTERNS[index].to_owned();
    if text.contains('*') {
        FqdnPattern::Pattern(text)
    } else {
        FqdnPattern::Name(text)
    }
}

fn ip(index: usize) -> IpAddr {
    ADDRESSES[index].parse().unwrap()
}

#[derive(Clone, Debug)]
enum Step {
    Learn {
        endpoint: EndpointId,
        name: usize,
        alias: Option<usize>,
        addresses: u8,
        ttl: u32,
    },
    Write,
    Fail {
        written: usize,
    },
    Wait(Millis),
    Mark {
        endpoint: EndpointId,
        addresses: u8,
    },
    Sweep {
        endpoint: EndpointId,
    },
    Policy {
        endpoint: EndpointId,
        patterns: u8,
    },
    Clean {
        endpoint: Option<EndpointId>,
        name: usize,
    },
    RemoveEndpoint {
        endpoint: EndpointId,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let endpoint = 0..ENDPOINTS;
    let name = 0..NAMES.len();
    prop_oneof![
        8 => (endpoint.clone(), name.clone(), prop::option::of(name.clone()), 1..128_u8, 0..4_u32)
            .prop_map(|(endpoint, name, alias, addresses, ttl)| Step::Learn { endpoint, name, alias, addresses, ttl }),
        10 => Just(Step::Write),
        1 => (0..4_usize).prop_map(|written| Step::Fail { written }),
        2 => (1..2500_u64).prop_map(Step::Wait),
        2 => (endpoint.clone(), any::<u8>()).prop_map(|(endpoint, addresses)| Step::Mark { endpoint, addresses }),
        3 => endpoint.clone().prop_map(|endpoint| Step::Sweep { endpoint }),
        2 => (endpoint.clone(), any::<u8>()).prop_map(|(endpoint, patterns)| Step::Policy { endpoint, patterns }),
        1 => (prop::option::of(endpoint.clone()), name).prop_map(|(endpoint, name)| Step::Clean { endpoint, name }),
        1 => endpoint.prop_map(|endpoint| Step::RemoveEndpoint { endpoint }),
    ]
}

#[derive(Clone, Debug)]
struct SniAddressIndex {
    endpoint: EndpointId,
    name: usize,
    ip: IpAddr,
    expires: Millis,
    learned: u64,
    born: u64,
    idle: u8,
}

/// A model of the cache: a list that is searched linearly.
#[derive(Default)]
struct Model {
    known: Vec<SniAddressIndex>,
    policies: BTreeMap<EndpointId, BTreeSet<usize>>,
    /// Number of the last answer that added or refreshed an address of the name, and the position of the name in it.
    ages: BTreeMap<(EndpointId, usize), (u64, usize)>,
    /// Sweeps since an address was marked.
    marked: BTreeMap<(EndpointId, IpAddr), u32>,
}

impl Model {
    fn in_use(&self, endpoint: EndpointId, ip: IpAddr) -> bool {
        self.marked
            .get(&(endpoint, ip))
            .is_some_and(|&sweeps| sweeps <= 1)
    }

    fn victim(&self, endpoint: EndpointId, name: usize, number: u64) -> Option<usize> {
        (0..self.known.len())
            .filter(|&i| {
                let known = &self.known[i];
                known.endpoint == endpoint
                    && known.name == name
                    && known.learned != number
                    && !self.in_use(endpoint, known.ip)
            })
            .min_by_key(|&i| self.known[i].learned)
    }

    fn count(&self, endpoint: EndpointId, name: Option<usize>) -> usize {
        let of = |known: &&SniAddressIndex| {
            known.endpoint == endpoint && name.is_none_or(|name| known.name == name)
        };
        self.known.iter().filter(of).count()
    }

    fn tidy(&mut self) {
        let known = &self.known;
        self.marked
            .retain(|key, _| known.iter().any(|k| (k.endpoint, k.ip) == *key));
        self.ages
            .retain(|key, _| known.iter().any(|k| (k.endpoint, k.name) == *key));
    }

    fn take(
        &mut self,
        config: &Config,
        (endpoint, name): (EndpointId, usize),
        ip: IpAddr,
        expires: Millis,
        number: u64,
    ) -> bool {
        if let Some(known) = self
            .known
            .iter_mut()
            .find(|k| (k.endpoint, k.name, k.ip) == (endpoint, name, ip))
        {
            known.expires = known.expires.max(expires);
            known.learned = number;
            known.idle = 0;
            return true;
        }
        if self.count(endpoint, Some(name)) >= config.addresses_per_name {
            let Some(victim) = self.victim(endpoint, name, number) else {
                return false;
            };
            self.known.remove(victim);
        }
        if self.count(endpoint, None) >= config.addresses_per_endpoint {
            let mut ages: Vec<_> = self.ages.iter().filter(|(key, _)| key.0 == endpoint).collect();
            ages.sort_by_key(|(_, age)| **age);
            let victim = ages
                .iter()
                .find_map(|(key, _)| self.victim(endpoint, key.1, number));
            let Some(victim) = victim else { return false };
            self.known.remove(victim);
        }
        let known = &self.known;
        self.marked
            .retain(|key, _| known.iter().any(|k| (k.endpoint, k.ip) == *key));
        self.known.push(SniAddressIndex {
            endpoint,
            name,
            ip,
            expires,
            learned: number,
            born: number,
            idle: 0,
        });
        true
    }

    fn matches(&self, endpoint: EndpointId, name: usize) -> impl Iterator<Item = SelectorId> + '_ {
        let patterns = self.policies.get(&endpoint).into_iter().flatten();
        patterns
            .filter(move |&&index| name_matches(&pattern(index), NAMES[name]))
            .map(|&index| SelectorId(index as u32))
    }

    fn live(&self) -> HashSet<(EndpointId, SelectorId, IpAddr)> {
        self.known
            .iter()
            .flat_map(|k| {
                self.matches(k.endpoint, k.name)
                    .map(|selector| (k.endpoint, selector, k.ip))
            })
            .collect()
    }
}

enum InFlight {
    Answer(Pending, EndpointId, Vec<(usize, IpAddr)>),
    Update(Update),
}

impl InFlight {
    fn changes(&self) -> &[Change] {
        match self {
            Self::Answer(pending, ..) => pending.changes(),
            Self::Update(update) => update.changes(),
        }
    }
}

struct World {
    config: Config,
    cache: Cache,
    /// The index for other threads.
    looked: Arc<Looked>,
    model: Model,
    maps: HashSet<(EndpointId, SelectorId, IpAddr)>,
    queue: VecDeque<InFlight>,
    /// A write failed, and no sweep has repaired it since.
    dirty: bool,
    now: Millis,
    released: usize,
}

impl World {
    fn new(aliases: bool) -> Self {
        let config = Config {
            min_ttl: 1000,
            max_ttl: 2500,
            addresses_per_name: 3,
            addresses_per_endpoint: 7,
            aliases,
            ..Config::default()
        };
        let looked = Arc::<Looked>::default();
        Self {
            cache: Cache::new(config.clone()).with_sni_index(looked.clone()),
            looked,
            config,
            model: Model::default(),
            maps: HashSet::new(),
            queue: VecDeque::new(),
            dirty: false,
            now: 0,
            released: 0,
        }
    }

    fn apply(&mut self, changes: &[Change]) {
        for change in changes {
            let triple = (change.endpoint, change.selector, change.address);
            match change.kind {
                ChangeKind::Live => self.maps.insert(triple),
                ChangeKind::Gone => self.maps.remove(&triple),
            };
        }
    }

    fn write(&mut self) -> Result<(), TestCaseError> {
        let Some(next) = self.queue.pop_front() else {
            return Ok(());
        };
        self.apply(next.changes());
        let (pending, endpoint, taught) = match next {
            InFlight::Update(update) => {
                self.cache.written(update);
                return Ok(());
            }
            InFlight::Answer(pending, endpoint, taught) => (pending, endpoint, taught),
        };
        let known = |model: &Model, name, ip| {
            model
                .known
                .iter()
                .any(|k| (k.endpoint, k.name, k.ip) == (endpoint, name, ip))
        };
        let number = pending.number();
        match self.cache.commit(pending) {
            Ok(committed) => {
                prop_assert_eq!(committed.number(), number);
                self.released += 1;
                for (name, ip) in taught {
                    prop_assert!(known(&self.model, name, ip));
                    for selector in self.model.matches(endpoint, name) {
                        prop_assert!(
                            self.maps.contains(&(endpoint, selector, ip)),
                            "released {} {ip} without {selector:?}",
                            NAMES[name],
                        );
                    }
                }
            }
            Err(Uncommitted::Missing(pending)) => {
                prop_assert!(!pending.changes().is_empty());
                // The changes were returned again, so they are appended to the writes.
                self.queue.push_back(InFlight::Answer(pending, endpoint, taught));
            }
            Err(Uncommitted::Superseded) => {
                prop_assert!(taught.iter().any(|&(name, ip)| !known(&self.model, name, ip)));
            }
        }
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let Self { cache, model, .. } = self;
        match *step {
            Step::Learn {
                endpoint,
                name,
                alias,
                addresses,
                ttl,
            } => {
                let question = Question {
                    name: NAMES[name].parse().unwrap(),
                    rtype: rtype::A,
                    class: 1,
                };
                let chosen: BTreeSet<_> = (0..7).filter(|bit| addresses >> bit & 1 == 1).map(ip).collect();
                let alias = alias.filter(|alias| *alias != name);
                let answer = Answer {
                    question: Some(question),
                    aliases: alias.iter().map(|&alias| NAMES[alias].parse().unwrap()).collect(),
                    addresses: chosen
                        .iter()
                        .map(|&ip| Address {
                            ip,
                            ttl,
                            source: Source::Record,
                        })
                        .collect(),
                    ttl: Some(ttl),
                    ..Answer::default()
                };
                let pending = cache.learn(endpoint, &answer, self.now);
                let number = pending.number();
                let expires = self.now + (u64::from(ttl) * 1000).clamp(1000, 2500);
                let aliases = alias.filter(|_| self.config.aliases);
                let (mut taught, mut refused) = (vec![], 0);
                for (place, name) in std::iter::once(name).chain(aliases).enumerate() {
                    let mut any = false;
                    for &ip in &chosen {
                        if model.take(&self.config, (endpoint, name), ip, expires, number) {
                            taught.push((name, ip));
                            any = true;
                        } else {
                            refused += 1;
                        }
                    }
                    if any {
                        model.ages.insert((endpoint, name), (number, place));
                    }
                }
                model.tidy();
                prop_assert_eq!(pending.refused(), refused);
                self.queue.push_back(InFlight::Answer(pending, endpoint, taught));
            }
            Step::Write => self.write()?,
            Step::Fail { written } => {
                let Some(next) = self.queue.pop_front() else {
                    return Ok(());
                };
                let changes = next.changes().to_vec();
                if let InFlight::Answer(pending, endpoint, taught) = next {
                    let number = pending.number();
                    cache.abort(pending);
                    model.known.retain(|k| {
                        k.endpoint != endpoint
                            || !taught.contains(&(k.name, k.ip))
                            || (k.born, k.learned) != (number, number)
                    });
                    model.tidy();
                }
                self.apply(&changes[..written.min(changes.len())]);
                self.dirty = true;
            }
            Step::Wait(time) => self.now += time,
            Step::Mark { endpoint, addresses } => {
                let marked: Vec<_> = (0..7).filter(|bit| addresses >> bit & 1 == 1).map(ip).collect();
                for ip in &marked {
                    if model.known.iter().any(|k| (k.endpoint, k.ip) == (endpoint, *ip)) {
                        model.marked.insert((endpoint, *ip), 0);
                    }
                }
                cache.mark_in_use(endpoint, marked);
            }
            Step::Sweep { endpoint } => {
                let marked = &model.marked;
                model.known.retain_mut(|k| {
                    if k.endpoint != endpoint {
                        return true;
                    }
                    if k.expires > self.now || marked.get(&(endpoint, k.ip)) == Some(&0) {
                        k.idle = 0;
                    } else {
                        k.idle += 1;
                    }
                    k.idle < 2
                });
                for (_, sweeps) in model.marked.iter_mut().filter(|(key, _)| key.0 == endpoint) {
                    *sweeps += 1;
                }
                model.tidy();
                self.queue
                    .push_back(InFlight::Update(cache.sweep(endpoint, self.now)));
            }
            Step::Policy { endpoint, patterns } => {
                let chosen: BTreeSet<_> = (0..PATTERNS.len())
                    .filter(|bit| patterns >> bit & 1 == 1)
                    .collect();
                let compiled: Vec<_> = chosen
                    .iter()
                    .map(|&index| (SelectorId(index as u32), pattern(index)))
                    .collect();
                let selectors = Selectors::new(compiled.iter().map(|(id, p)| (*id, p))).unwrap();
                let both = |model: &Model| model.live();
                let before = both(model);
                model.policies.insert(endpoint, chosen);
                let update = cache.set_selectors(endpoint, Arc::new(selectors));
                let after = both(model);
                // An address that the old and the new policy allow is never removed in between.
                for change in update
                    .changes()
                    .iter()
                    .filter(|change| change.kind == ChangeKind::Gone)
                {
                    let triple = (change.endpoint, change.selector, change.address);
                    prop_assert!(before.contains(&triple) && !after.contains(&triple));
                }
                self.queue.push_back(InFlight::Update(update));
            }
            Step::Clean { endpoint, name } => {
                let update = cache.clean(endpoint, |asked| asked.to_string() == NAMES[name]);
                model
                    .known
                    .retain(|k| k.name != name || endpoint.is_some_and(|wanted| wanted != k.endpoint));
                model.tidy();
                self.queue.push_back(InFlight::Update(update));
            }
            Step::RemoveEndpoint { endpoint } => {
                self.queue
                    .push_back(InFlight::Update(cache.remove_endpoint(endpoint)));
                model.known.retain(|k| k.endpoint != endpoint);
                model.policies.remove(&endpoint);
                model.tidy();
            }
        }
        self.compare()
    }

    fn compare(&self) -> Result<(), TestCaseError> {
        let mut expected: Vec<_> = self
            .model
            .known
            .iter()
            .map(|k| {
                let left = k.expires.checked_sub(self.now).filter(|left| *left > 0);
                (
                    k.endpoint,
                    NAMES[k.name].to_owned(),
                    k.ip,
                    left,
                    self.model.in_use(k.endpoint, k.ip),
                )
            })
            .collect();
        expected.sort();
        let mut listed: Vec<_> = self
            .cache
            .list(None, self.now)
            .into_iter()
            .flat_map(|name| {
                name.addresses
                    .into_iter()
                    .map(move |a| (name.endpoint, name.name.clone(), a.ip, a.left, a.in_use))
            })
            .collect();
        listed.sort();
        prop_assert_eq!(listed, expected);
        prop_assert_eq!(self.cache.memory().addresses, self.model.known.len());
        prop_assert_eq!(self.looked.len(), self.model.known.len());
        for known in &self.model.known {
            let name = NAMES[known.name].parse().unwrap();
            prop_assert!(self.looked.has(known.endpoint, known.ip, &name));
        }
        if self.queue.is_empty() && !self.dirty {
            prop_assert_eq!(&self.maps, &self.model.live());
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases.max(600)))]
    #[test]
    fn an_answer_is_released_only_after_the_maps_hold_its_addresses(
        aliases in any::<bool>(),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut world = World::new(aliases);
        for patterns in [0b111111, 0b000110] {
            let endpoint = u16::from(patterns == 0b000110);
            world.step(&Step::Policy { endpoint, patterns })?;
        }
        for step in &steps {
            world.step(step)?;
        }
        // After all writes and sweeps the maps hold exactly the addresses of the cache.
        for round in 0..2 {
            for _ in 0..200 {
                world.write()?;
            }
            prop_assert!(world.queue.is_empty(), "answers that can never be committed");
            if round == 0 {
                for endpoint in 0..ENDPOINTS {
                    world.step(&Step::Sweep { endpoint })?;
                }
            }
        }
        prop_assert_eq!(&world.maps, &world.model.live());
        // No entry remains after everything is removed.
        for endpoint in 0..ENDPOINTS {
            world.step(&Step::RemoveEndpoint { endpoint })?;
        }
        world.write()?;
        world.write()?;
        prop_assert!(world.maps.is_empty());
        prop_assert_eq!(world.cache.memory().endpoints, 0);
        prop_assert_eq!(world.cache.memory().triples, 0);
    }
}
