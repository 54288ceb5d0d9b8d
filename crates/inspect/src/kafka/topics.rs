//! Names of topic ids, from the Metadata responses of servers.
//!
//! A client asks one broker for the metadata and then names the topics by id to all brokers of the cluster. The brokers
//! of a cluster can have different identities, for example if a policy names them by `toCIDR`. So the names are kept per
//! endpoint and rule set, not per connection or identity. A server under another rule set cannot give an id a name that
//! this rule set allows. Names of servers in the world are kept per server, because such a policy names no cluster.
//!
//! For requests to a server that has told a name itself, only that name counts. Once two servers
//! have told different names, the id has no name at servers that have told none.

mod handover;

use std::{
    cmp::Reverse,
    collections::VecDeque,
    net::SocketAddr,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use foldhash::HashMap;
use palisade_protocols::kafka::TopicId;

/// Maximum number of topic ids of one endpoint and rule set. The oldest one is removed for a new one.
const MAX_PER_OWNER: usize = 4096;
/// Maximum number of topic ids. Beyond it the endpoint with the most ids loses its oldest ones.
const MAX_IDS: usize = 65_536;
/// Number of ids below that maximum down to which ids are removed.
const SHRINK: usize = MAX_IDS / 16;
/// Maximum number of topic ids of an owner with which a name is learned that no rule of the rule set has. Such a name only
/// decides about the error code of a denial.
const MAX_OTHERS: usize = 512;
/// Maximum number of servers whose names are kept for an id that has different names.
const MAX_SERVERS: usize = 16;
/// Longest name of a topic, bytes. Kafka allows 249.
const MAX_NAME: usize = 255;

/// Connections that use the same names of topic ids.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Owner {
    pub(super) endpoint: u16,
    pub(super) ruleset: u32,
    /// Whether the endpoint is the server. Servers to which it connects cannot give names to its own topics.
    pub(super) is_server: bool,
    /// The only server, if names are not shared between servers.
    pub(super) only: Option<SocketAddr>,
}

/// Names of topic ids, shared by all workers.
#[derive(Debug, Default)]
pub struct TopicIds {
    known: RwLock<Known>,
    /// Increases with each change, so that workers drop their copies.
    generation: AtomicU64,
    /// Whether a worker has handed the names over.
    is_handed_over: AtomicBool,
}

#[derive(Debug, Default)]
struct Known {
    owners: HashMap<Owner, Owned>,
    count: usize,
}

#[derive(Debug, Default)]
struct Owned {
    ids: HashMap<TopicId, Names>,
    /// The ids in the order in which they were learned.
    order: VecDeque<TopicId>,
}

/// Name of a topic id that a response tells.
#[derive(Clone, Copy, Debug)]
pub(super) struct Told<'a> {
    pub(super) id: TopicId,
    pub(super) name: &'a [u8],
    /// Whether a rule of the rule set has the name.
    pub(super) is_in_rules: bool,
}

/// What one server has told about a topic id.
#[derive(Debug)]
struct Word {
    server: SocketAddr,
    name: Arc<[u8]>,
}

impl Word {
    fn new(server: SocketAddr, name: &[u8]) -> Self {
        Self {
            server,
            name: name.into(),
        }
    }
}

/// Names of one topic id.
#[derive(Debug)]
struct Names {
    first: Word,
    /// Names of other servers, from the first one on that contradicts. While all servers agree, they are not kept.
    others: Vec<Word>,
}

/// Effect of a told name on a known id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Effect {
    /// The name is known, or the server has told another one before. A topic id never gets another name.
    None { contradicts: bool },
    /// The name is to be kept.
    Keep { contradicts: bool },
}

impl Names {
    /// Returns the name that `server` has told, or the one on which all other servers agree.
    fn at(&self, server: SocketAddr) -> Option<&Arc<[u8]>> {
        let own = self.of(server);
        own.or_else(|| self.others.is_empty().then_some(&self.first.name))
    }

    fn of(&self, server: SocketAddr) -> Option<&Arc<[u8]>> {
        self.words()
            .find(|word| word.server == server)
            .map(|word| &word.name)
    }

    fn words(&self) -> impl Iterator<Item = &Word> + Clone {
        std::iter::once(&self.first).chain(&self.others)
    }

    fn effect(&self, server: SocketAddr, name: &[u8]) -> Effect {
        let contradicts = *self.first.name != *name;
        match self.of(server) {
            Some(own) => Effect::None {
                contradicts: **own != *name,
            },
            None if !contradicts && self.others.is_empty() => Effect::None { contradicts },
            None if self.others.len() + 1 >= MAX_SERVERS => Effect::None { contradicts },
            None => Effect::Keep { contradicts },
        }
    }
}

impl Told<'_> {
    /// Returns whether the name of a new id may be kept. `length`: number of ids of the owner; `count`: number of all ids.
    fn has_room(&self, length: usize, count: usize) -> bool {
        let is_free = length < MAX_OTHERS && count < MAX_IDS / 2;
        self.name.len() <= MAX_NAME && (self.is_in_rules || is_free)
    }
}

impl Known {
    /// Adds names that a server has told. Returns whether it has added any.
    fn insert(&mut self, owner: Owner, server: SocketAddr, told: &[Told<'_>]) -> bool {
        let Self { owners, count } = self;
        let before = *count;
        let owned = owners.entry(owner).or_default();
        let mut has_added = false;
        for told in told {
            if let Some(names) = owned.ids.get_mut(&told.id) {
                if let Effect::Keep { .. } = names.effect(server, told.name) {
                    names.others.push(Word::new(server, told.name));
                    *count += 1;
                    has_added = true;
                }
                continue;
            }
            if !told.has_room(owned.ids.len(), before) {
                continue;
            }
            let names = Names {
                first: Word::new(server, told.name),
                others: Vec::new(),
            };
            owned.ids.insert(told.id, names);
            owned.order.push_back(told.id);
            *count += 1;
            has_added = true;
            if owned.order.len() > MAX_PER_OWNER {
                *count -= owned.remove_oldest();
            }
        }
        if owned.ids.is_empty() {
            owners.remove(&owner);
        }
        self.shrink();
        has_added
    }

    /// Removes ids if there are too many, so that one endpoint cannot prevent others from learning. All owners are
    /// scanned, so room for many further ids is made at once.
    fn shrink(&mut self) {
        if self.count <= MAX_IDS {
            return;
        }
        while self.count > MAX_IDS - SHRINK {
            let mut sizes: HashMap<u16, usize> = HashMap::default();
            for (owner, owned) in &self.owners {
                *sizes.entry(owner.endpoint).or_default() += owned.ids.len();
            }
            let Some((largest, _)) = sizes.into_iter().max_by_key(|(_, size)| *size) else {
                return;
            };
            let mut of_largest: Vec<_> = self
                .owners
                .iter_mut()
                .filter(|(owner, _)| owner.endpoint == largest)
                .map(|(_, owned)| owned)
                .collect();
            of_largest.sort_by_key(|owned| Reverse(owned.ids.len()));
            for owned in of_largest {
                while self.count > MAX_IDS - SHRINK && !owned.ids.is_empty() {
                    self.count -= owned.remove_oldest();
                }
            }
            self.owners.retain(|_, owned| !owned.ids.is_empty());
        }
    }
}

impl Owned {
    /// Removes the id that was learned first. Returns the number of removed names.
    fn remove_oldest(&mut self) -> usize {
        let oldest = self.order.pop_front();
        let names = oldest.and_then(|id| self.ids.remove(&id));
        names.map_or(0, |names| names.len())
    }
}

impl Names {
    fn len(&self) -> usize {
        1 + self.others.len()
    }
}

impl TopicIds {
    /// Learns the names that one response tells. `each` calls its argument with each of them. Returns the number of names
    /// that contradict a known one: a topic id never gets another name, so a response is false.
    fn learn<'a>(
        &self,
        owner: Owner,
        server: SocketAddr,
        each: impl FnOnce(&mut dyn FnMut(Told<'a>)),
    ) -> u64 {
        let (mut news, mut others, mut contradictions) = (Vec::new(), Vec::new(), 0);
        {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            let ids = known.owners.get(&owner).map(|owned| &owned.ids);
            let length = ids.map_or(0, HashMap::len);
            each(&mut |told| {
                let Some(names) = ids.and_then(|ids| ids.get(&told.id)) else {
                    let (list, most) = if told.is_in_rules {
                        (&mut news, MAX_PER_OWNER)
                    } else {
                        (&mut others, MAX_OTHERS)
                    };
                    if list.len() < most && told.has_room(length, known.count) {
                        list.push(told);
                    }
                    return;
                };
                let effect = names.effect(server, told.name);
                let (Effect::None { contradicts } | Effect::Keep { contradicts }) = effect;
                contradictions += u64::from(contradicts);
                // A known id takes no room of the others. A response can repeat an id, so this list needs its limit too.
                if matches!(effect, Effect::Keep { .. }) && news.len() < 2 * MAX_PER_OWNER {
                    news.push(told);
                }
            });
        }
        // Names that rules have are learned first: the others get the room that is left.
        news.append(&mut others);
        // Clients ask for the metadata again and again. A response without news must not stop the other workers.
        if !news.is_empty() {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            if known.insert(owner, server, &news) {
                self.generation.fetch_add(1, Ordering::Release);
            }
        }
        contradictions
    }

    fn find(&self, owner: Owner, server: SocketAddr, id: &TopicId) -> Option<Arc<[u8]>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.owners.get(&owner)?.ids.get(id)?.at(server).cloned()
    }

    /// Removes the topic ids of one endpoint.
    fn forget(&self, endpoint: u16) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let Known { owners, count } = &mut *known;
        owners.retain(|owner, owned| {
            if owner.endpoint == endpoint {
                *count -= owned.ids.values().map(Names::len).sum::<usize>();
            }
            owner.endpoint != endpoint
        });
        self.generation.fetch_add(1, Ordering::Release);
    }
}

/// Copy of the names that one worker has looked up. It spares requests the lock.
#[derive(Debug, Default)]
pub(super) struct TopicNames {
    shared: Arc<TopicIds>,
    generation: u64,
    copies: HashMap<(Owner, SocketAddr, TopicId), Arc<[u8]>>,
}

impl TopicNames {
    pub(super) fn share(&mut self, shared: Arc<TopicIds>) {
        *self = Self {
            shared,
            ..Self::default()
        };
    }

    /// Learns the names that one response tells. `each` calls its argument with each of them. Returns the number of names
    /// that contradict a known one.
    pub(super) fn learn<'a>(
        &self,
        owner: Owner,
        server: SocketAddr,
        each: impl FnOnce(&mut dyn FnMut(Told<'a>)),
    ) -> u64 {
        self.shared.learn(owner, server, each)
    }

    pub(super) fn forget(&self, endpoint: u16) {
        self.shared.forget(endpoint);
    }

    pub(super) fn hand_over(&self, out: &mut Vec<u8>) -> bool {
        self.shared.hand_over(out)
    }

    pub(super) fn take_over(&self, bytes: &[u8]) -> bool {
        self.shared.take_over(bytes)
    }

    /// Returns the name of a topic id in requests to a server.
    pub(super) fn name(&mut self, owner: Owner, server: SocketAddr, id: TopicId) -> Option<Arc<[u8]>> {
        let generation = self.shared.generation.load(Ordering::Acquire);
        if generation != self.generation || self.copies.len() > MAX_PER_OWNER {
            self.copies.clear();
            self.generation = generation;
        }
        let key = (owner, server, id);
        if let Some(name) = self.copies.get(&key) {
            return Some(name.clone());
        }
        let name = self.shared.find(owner, server, &id)?;
        self.copies.insert(key, name.clone());
        Some(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u32) -> TopicId {
        let mut id = [0; 16];
        id[..4].copy_from_slice(&number.to_be_bytes());
        id
    }

    fn owner(endpoint: u16, ruleset: u32) -> Owner {
        Owner {
            endpoint,
            ruleset,
            is_server: false,
            only: None,
        }
    }

    fn server(number: u8) -> SocketAddr {
        SocketAddr::from(([198, 51, 100, number], 9092))
    }

    fn told(number: u32, name: &[u8]) -> Told<'_> {
        Told {
            id: id(number),
            name,
            is_in_rules: true,
        }
    }

    fn learn(names: &TopicNames, owner: Owner, at: u8, told: &[Told<'_>]) -> u64 {
        names.learn(owner, server(at), |learn| told.iter().copied().for_each(learn))
    }

    fn name(names: &mut TopicNames, owner: Owner, at: u8, number: u32) -> Option<String> {
        let name = names.name(owner, server(at), id(number))?;
        Some(String::from_utf8_lossy(&name).into_owned())
    }

    /// Returns the counted names and the kept ones.
    fn counts(names: &TopicNames) -> (usize, usize) {
        let known = names.shared.known.read().unwrap();
        let kept = known.owners.values().flat_map(|owned| owned.ids.values());
        (known.count, kept.map(Names::len).sum())
    }

    #[test]
    fn names_are_those_of_one_endpoint_rule_set_and_direction() {
        let shared = Arc::new(TopicIds::default());
        let (mut one, mut two) = (TopicNames::default(), TopicNames::default());
        one.share(shared.clone());
        two.share(shared);
        learn(&one, owner(1, 7), 1, &[told(1, b"a")]);
        assert_eq!(name(&mut two, owner(1, 7), 1, 1).as_deref(), Some("a"));
        assert_eq!(name(&mut two, owner(2, 7), 1, 1), None);
        assert_eq!(name(&mut two, owner(1, 8), 1, 1), None);
        let served = Owner {
            is_server: true,
            ..owner(1, 7)
        };
        assert_eq!(name(&mut two, served, 1, 1), None);
        one.forget(1);
        assert_eq!(name(&mut two, owner(1, 7), 1, 1), None);
    }

    #[test]
    fn a_topic_id_keeps_the_first_name_of_a_server() {
        let mut names = TopicNames::default();
        let owner = owner(1, 7);
        assert_eq!(learn(&names, owner, 1, &[told(1, b"secret")]), 0);
        assert_eq!(learn(&names, owner, 1, &[told(1, b"a"), told(2, b"b")]), 1);
        assert_eq!(name(&mut names, owner, 1, 1).as_deref(), Some("secret"));
        assert_eq!(name(&mut names, owner, 1, 2).as_deref(), Some("b"));
        assert_eq!(learn(&names, owner, 1, &[told(1, b"secret")]), 0);
    }

    #[test]
    fn a_server_decides_about_the_names_of_its_own_topic_ids() {
        let owner = owner(1, 7);
        for first_is_false in [true, false] {
            let mut names = TopicNames::default();
            let mut words = [(1, &b"a"[..], "a"), (2, b"secret", "secret")];
            if !first_is_false {
                words.reverse();
            }
            learn(&names, owner, words[0].0, &[told(1, words[0].1)]);
            for at in 1..=3 {
                assert_eq!(
                    name(&mut names, owner, at, 1).as_deref(),
                    Some(words[0].2),
                    "{at}"
                );
            }
            assert_eq!(learn(&names, owner, words[1].0, &[told(1, words[1].1)]), 1);
            assert_eq!(name(&mut names, owner, 1, 1).as_deref(), Some("a"));
            assert_eq!(name(&mut names, owner, 2, 1).as_deref(), Some("secret"));
            assert_eq!(name(&mut names, owner, 3, 1), None, "the others disagree");
            learn(&names, owner, 3, &[told(1, b"secret")]);
            assert_eq!(name(&mut names, owner, 3, 1).as_deref(), Some("secret"));
            assert_eq!(counts(&names), (3, 3));
            names.forget(1);
            assert_eq!(counts(&names), (0, 0));
        }
    }

    #[test]
    fn a_name_that_no_rule_has_contradicts_a_false_one_also_when_there_is_no_room_for_others() {
        let mut names = TopicNames::default();
        let owner = owner(1, 7);
        let other = |number| Told {
            is_in_rules: false,
            ..told(number, b"secret")
        };
        learn(&names, owner, 1, &[told(0, b"a")]);
        let many: Vec<_> = (1..=MAX_PER_OWNER as u32).chain([0]).map(other).collect();
        assert_eq!(learn(&names, owner, 2, &many), 1);
        assert_eq!(name(&mut names, owner, 2, 0).as_deref(), Some("secret"));
    }

    #[test]
    fn an_id_with_the_names_of_too_many_servers_is_unknown_at_further_ones() {
        let mut names = TopicNames::default();
        let owner = owner(1, 7);
        for at in 0..=MAX_SERVERS as u8 {
            learn(&names, owner, at, &[told(1, &[b'a' + at])]);
        }
        assert_eq!(counts(&names), (MAX_SERVERS, MAX_SERVERS));
        assert_eq!(name(&mut names, owner, 1, 1).as_deref(), Some("b"));
        assert_eq!(name(&mut names, owner, MAX_SERVERS as u8, 1), None);
    }

    #[test]
    fn a_server_that_tells_many_ids_replaces_only_its_own() {
        let mut names = TopicNames::default();
        learn(&names, owner(1, 1), 1, &[told(0, b"a")]);
        let many: Vec<_> = (0..=MAX_PER_OWNER as u32)
            .map(|number| told(number, b"b"))
            .collect();
        learn(&names, owner(1, 2), 1, &many[..1]);
        learn(&names, owner(1, 2), 1, &many[1..]);
        assert!(name(&mut names, owner(1, 1), 1, 0).is_some());
        assert!(name(&mut names, owner(1, 2), 1, 0).is_none());
        assert!(name(&mut names, owner(1, 2), 1, MAX_PER_OWNER as u32).is_some());
    }

    #[test]
    fn an_endpoint_with_many_ids_does_not_prevent_others_from_learning() {
        let mut names = TopicNames::default();
        learn(&names, owner(2, 1), 1, &[told(0, b"first")]);
        let many: Vec<_> = (0..MAX_PER_OWNER as u32)
            .map(|number| told(number, b"b"))
            .collect();
        for ruleset in 0..40 {
            learn(&names, owner(1, ruleset), 1, &many);
        }
        learn(&names, owner(3, 1), 1, &[told(0, b"last")]);
        for endpoint in [2, 3] {
            assert!(name(&mut names, owner(endpoint, 1), 1, 0).is_some(), "{endpoint}");
        }
        let (count, kept) = counts(&names);
        assert!(
            count == kept && (MAX_IDS - SHRINK..=MAX_IDS).contains(&count),
            "{count} {kept}"
        );
    }

    #[test]
    fn an_endpoint_with_many_servers_slows_no_other_one() {
        let mut names = TopicNames::default();
        learn(&names, owner(2, 1), 1, &[told(0, b"first")]);
        // A scan of all owners for each of them would take minutes.
        for port in 0..MAX_IDS as u32 + 10_000 {
            let only = SocketAddr::from(([192, 0, (port >> 16) as u8, 1], port as u16));
            let of_server = Owner {
                only: Some(only),
                ..owner(1, 1)
            };
            names.learn(of_server, only, |learn| learn(told(0, b"a")));
        }
        assert_eq!(name(&mut names, owner(2, 1), 1, 0).as_deref(), Some("first"));
        let (count, kept) = counts(&names);
        assert!(count == kept && count <= MAX_IDS, "{count} {kept}");
    }

    #[test]
    fn names_that_no_rule_has_do_not_replace_those_of_rules() {
        let mut names = TopicNames::default();
        learn(&names, owner(1, 1), 1, &[told(0, b"a")]);
        let others: Vec<_> = (1..=MAX_PER_OWNER as u32)
            .map(|number| Told {
                is_in_rules: false,
                ..told(number, b"b")
            })
            .collect();
        learn(&names, owner(1, 1), 1, &others);
        assert!(name(&mut names, owner(1, 1), 1, 0).is_some());
        assert!(name(&mut names, owner(1, 1), 1, 1).is_some());
        assert_eq!(counts(&names), (MAX_OTHERS, MAX_OTHERS));
    }

    #[test]
    fn the_names_of_all_workers_are_handed_over_once() {
        let shared = Arc::new(TopicIds::default());
        let mut names = TopicNames::default();
        names.share(Arc::clone(&shared));
        assert!(!shared.hand_over(&mut Vec::new()), "there are none");
        learn(&names, owner(1, 2), 1, &[told(1, b"a"), told(2, b"b")]);
        learn(&names, owner(1, 2), 2, &[told(2, b"c")]);
        let of_server = Owner {
            is_server: true,
            only: Some("[2001:db8::1]:9092".parse().unwrap()),
            ..owner(3, 4)
        };
        learn(&names, of_server, 1, &[told(1, b"d")]);
        let mut bytes = Vec::new();
        assert!(shared.hand_over(&mut bytes));
        assert!(
            !shared.hand_over(&mut Vec::new()),
            "another worker has written them"
        );

        let mut after = TopicNames::default();
        assert!(after.take_over(&bytes));
        for _ in 0..2 {
            assert_eq!(name(&mut after, owner(1, 2), 9, 1).as_deref(), Some("a"));
            assert_eq!(name(&mut after, owner(1, 2), 1, 2).as_deref(), Some("b"));
            assert_eq!(name(&mut after, owner(1, 2), 2, 2).as_deref(), Some("c"));
            assert_eq!(name(&mut after, owner(1, 2), 9, 2), None, "the servers disagree");
            assert_eq!(name(&mut after, of_server, 1, 1).as_deref(), Some("d"));
            assert_eq!(name(&mut after, owner(3, 4), 1, 1), None);
            assert_eq!(after.shared.known.read().unwrap().count, 4);
            // Twice the same names.
            assert!(after.take_over(&bytes));
        }
        for length in 1..bytes.len() {
            let cut = TopicNames::default();
            cut.take_over(&bytes[..length]);
            let known = cut.shared.known.read().unwrap();
            assert!(known.count <= 4, "{length}");
        }
    }

    #[test]
    fn names_beyond_the_limits_are_not_taken_over() {
        let shared = TopicIds::default();
        for endpoint in 0..20 {
            let ids: Vec<_> = (0..MAX_PER_OWNER as u32)
                .map(|number| told(number, b"a"))
                .collect();
            let mut known = shared.known.write().unwrap();
            known.insert(owner(endpoint, 1), server(1), &ids);
        }
        let mut bytes = Vec::new();
        assert!(shared.hand_over(&mut bytes));
        let after = TopicIds::default();
        assert!(after.take_over(&bytes) && after.take_over(&bytes));
        let known = after.known.read().unwrap();
        let sum: usize = known.owners.values().map(|owned| owned.ids.len()).sum();
        assert!(
            known.count <= MAX_IDS && sum == known.count,
            "{} {sum}",
            known.count
        );
    }
}
