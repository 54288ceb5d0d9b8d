//! Names of topic ids, from the Metadata responses of servers.
//!
//! A client asks one broker for the metadata and then names the topics by id to all brokers of the cluster. The brokers
//! of a cluster can have different identities, for example if a policy names them by `toCIDR`. So the names are kept per
//! endpoint and rule set, not per connection or identity. A server under another rule set cannot give an id a name that
//! this rule set allows.

use std::{
    collections::VecDeque,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use foldhash::HashMap;
use palisade_protocols::kafka::TopicId;

/// Maximum number of topic ids of one endpoint and rule set. The oldest one is removed for a new one.
pub(super) const MAX_PER_OWNER: usize = 4096;
/// Maximum number of topic ids. Beyond it the endpoint with the most ids loses its oldest ones.
const MAX_IDS: usize = 65_536;
/// Maximum number of topic ids of an owner with which a name is learned that no rule of the rule set has. Such a name only
/// decides about the error code of a denial.
pub(super) const MAX_OTHERS: usize = 512;
/// Longest name of a topic, bytes. Kafka allows 249.
const MAX_NAME: usize = 255;

/// Connections that use the same names of topic ids.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Owner {
    pub(super) endpoint: u16,
    pub(super) ruleset: u32,
    /// Whether the endpoint is the server. Servers to which it connects cannot give names to its own topics.
    pub(super) is_server: bool,
}

/// Names of topic ids, shared by all workers.
#[derive(Debug, Default)]
pub struct TopicIds {
    known: RwLock<Known>,
    /// Increases with each change, so that workers drop their copies.
    generation: AtomicU64,
}

#[derive(Debug, Default)]
struct Known {
    owners: HashMap<Owner, Owned>,
    count: usize,
}

#[derive(Debug, Default)]
struct Owned {
    names: HashMap<TopicId, Arc<[u8]>>,
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

impl Told<'_> {
    /// Returns whether the name may be kept. `length`: number of ids of the owner; `count`: number of all ids.
    fn has_room(&self, length: usize, count: usize) -> bool {
        let is_free = length < MAX_OTHERS && count < MAX_IDS / 2;
        self.name.len() <= MAX_NAME && (self.is_in_rules || is_free)
    }
}

impl Known {
    /// Adds new names. Returns whether it has added any.
    fn insert(&mut self, owner: Owner, told: &[Told<'_>]) -> bool {
        let Self { owners, count } = self;
        let before = *count;
        let owned = owners.entry(owner).or_default();
        let mut has_added = false;
        for told in told {
            if !told.has_room(owned.names.len(), before) || owned.names.contains_key(&told.id) {
                continue;
            }
            owned.names.insert(told.id, told.name.into());
            owned.order.push_back(told.id);
            *count += 1;
            has_added = true;
            if owned.order.len() > MAX_PER_OWNER {
                *count -= owned.remove_oldest();
            }
        }
        owners.retain(|_, owned| !owned.names.is_empty());
        self.shrink();
        has_added
    }

    /// Removes ids beyond the limit, so that one endpoint cannot prevent others from learning.
    fn shrink(&mut self) {
        while self.count > MAX_IDS {
            let mut sizes: HashMap<u16, usize> = HashMap::default();
            for (owner, owned) in &self.owners {
                *sizes.entry(owner.endpoint).or_default() += owned.names.len();
            }
            let largest = sizes.into_iter().max_by_key(|(_, size)| *size);
            let owned = self
                .owners
                .iter_mut()
                .filter(|(owner, _)| Some(owner.endpoint) == largest.map(|(endpoint, _)| endpoint))
                .map(|(_, owned)| owned)
                .max_by_key(|owned| owned.names.len());
            let Some(owned) = owned else {
                return;
            };
            for _ in 0..(self.count - MAX_IDS).min(owned.names.len()) {
                self.count -= owned.remove_oldest();
            }
            self.owners.retain(|_, owned| !owned.names.is_empty());
        }
    }
}

impl Owned {
    /// Removes the id that was learned first. Returns the number of removed ids.
    fn remove_oldest(&mut self) -> usize {
        let oldest = self.order.pop_front();
        usize::from(oldest.is_some_and(|id| self.names.remove(&id).is_some()))
    }
}

impl TopicIds {
    /// Learns the names that one response tells. Returns the number of names that contradict a known one, which stays:
    /// a topic id never gets another name, so the response is false.
    fn learn(&self, owner: Owner, told: &[Told<'_>]) -> u64 {
        let mut contradictions = 0;
        let has_new = {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            let names = known.owners.get(&owner).map(|owned| &owned.names);
            let length = names.map_or(0, HashMap::len);
            let mut has_new = false;
            for told in told {
                match names.and_then(|names| names.get(&told.id)) {
                    Some(name) => contradictions += u64::from(**name != *told.name),
                    None => has_new |= told.has_room(length, known.count),
                }
            }
            has_new
        };
        // Clients ask for the metadata again and again. A response without news must not stop the other workers.
        if has_new {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            if known.insert(owner, told) {
                self.generation.fetch_add(1, Ordering::Release);
            }
        }
        contradictions
    }

    fn find(&self, owner: Owner, id: &TopicId) -> Option<Arc<[u8]>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.owners.get(&owner)?.names.get(id).cloned()
    }

    /// Removes the topic ids of one endpoint.
    fn forget(&self, endpoint: u16) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let Known { owners, count } = &mut *known;
        owners.retain(|owner, owned| {
            if owner.endpoint == endpoint {
                *count -= owned.names.len();
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
    copies: HashMap<(Owner, TopicId), Arc<[u8]>>,
}

impl TopicNames {
    pub(super) fn share(&mut self, shared: Arc<TopicIds>) {
        *self = Self {
            shared,
            ..Self::default()
        };
    }

    /// Learns the names that one response tells. Returns the number of names that contradict a known one.
    pub(super) fn learn(&self, owner: Owner, told: &[Told<'_>]) -> u64 {
        self.shared.learn(owner, told)
    }

    pub(super) fn forget(&self, endpoint: u16) {
        self.shared.forget(endpoint);
    }

    /// Returns the name of a topic id.
    pub(super) fn name(&mut self, owner: Owner, id: TopicId) -> Option<Arc<[u8]>> {
        let generation = self.shared.generation.load(Ordering::Acquire);
        if generation != self.generation || self.copies.len() > MAX_PER_OWNER {
            self.copies.clear();
            self.generation = generation;
        }
        if let Some(name) = self.copies.get(&(owner, id)) {
            return Some(name.clone());
        }
        let name = self.shared.find(owner, &id)?;
        self.copies.insert((owner, id), name.clone());
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
        }
    }

    fn told(number: u32, name: &[u8]) -> Told<'_> {
        Told {
            id: id(number),
            name,
            is_in_rules: true,
        }
    }

    #[test]
    fn names_are_those_of_one_endpoint_rule_set_and_direction() {
        let shared = Arc::new(TopicIds::default());
        let (mut one, mut two) = (TopicNames::default(), TopicNames::default());
        one.share(shared.clone());
        two.share(shared);
        one.learn(owner(1, 7), &[told(1, b"a")]);
        assert_eq!(two.name(owner(1, 7), id(1)).as_deref(), Some(&b"a"[..]));
        assert_eq!(two.name(owner(2, 7), id(1)), None);
        assert_eq!(two.name(owner(1, 8), id(1)), None);
        let served = Owner {
            is_server: true,
            ..owner(1, 7)
        };
        assert_eq!(two.name(served, id(1)), None);
        one.forget(1);
        assert_eq!(two.name(owner(1, 7), id(1)), None);
    }

    #[test]
    fn a_topic_id_keeps_its_first_name() {
        let mut names = TopicNames::default();
        assert_eq!(names.learn(owner(1, 7), &[told(1, b"secret")]), 0);
        assert_eq!(names.learn(owner(1, 7), &[told(1, b"a"), told(2, b"b")]), 1);
        assert_eq!(names.name(owner(1, 7), id(1)).as_deref(), Some(&b"secret"[..]));
        assert_eq!(names.name(owner(1, 7), id(2)).as_deref(), Some(&b"b"[..]));
        assert_eq!(names.learn(owner(1, 7), &[told(1, b"secret")]), 0);
    }

    #[test]
    fn a_server_that_tells_many_ids_replaces_only_its_own() {
        let mut names = TopicNames::default();
        names.learn(owner(1, 1), &[told(0, b"a")]);
        let many: Vec<_> = (0..=MAX_PER_OWNER as u32)
            .map(|number| told(number, b"b"))
            .collect();
        names.learn(owner(1, 2), &many);
        assert!(names.name(owner(1, 1), id(0)).is_some());
        assert!(names.name(owner(1, 2), id(0)).is_none());
        assert!(names.name(owner(1, 2), id(MAX_PER_OWNER as u32)).is_some());
    }

    #[test]
    fn an_endpoint_with_many_ids_does_not_prevent_others_from_learning() {
        let mut names = TopicNames::default();
        names.learn(owner(2, 1), &[told(0, b"first")]);
        let many: Vec<_> = (0..MAX_PER_OWNER as u32)
            .map(|number| told(number, b"b"))
            .collect();
        for ruleset in 0..40 {
            names.learn(owner(1, ruleset), &many);
        }
        names.learn(owner(3, 1), &[told(0, b"last")]);
        for endpoint in [2, 3] {
            assert!(names.name(owner(endpoint, 1), id(0)).is_some(), "{endpoint}");
        }
        let known = names.shared.known.read().unwrap();
        let sum: usize = known.owners.values().map(|owned| owned.names.len()).sum();
        assert_eq!((known.count, sum), (MAX_IDS, MAX_IDS));
    }

    #[test]
    fn names_that_no_rule_has_do_not_replace_those_of_rules() {
        let mut names = TopicNames::default();
        names.learn(owner(1, 1), &[told(0, b"a")]);
        let others: Vec<_> = (1..=MAX_PER_OWNER as u32)
            .map(|number| Told {
                is_in_rules: false,
                ..told(number, b"b")
            })
            .collect();
        names.learn(owner(1, 1), &others);
        assert!(names.name(owner(1, 1), id(0)).is_some());
        assert!(names.name(owner(1, 1), id(1)).is_some());
        assert_eq!(names.shared.known.read().unwrap().count, MAX_OTHERS);
    }
}
