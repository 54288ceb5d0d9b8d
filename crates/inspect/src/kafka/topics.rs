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
const MAX_PER_OWNER: usize = 4096;
/// Maximum number of topic ids. New ones are not learned beyond it.
const MAX_IDS: usize = 65_536;
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

impl TopicIds {
    fn learn(&self, owner: Owner, id: TopicId, name: &[u8]) {
        if name.len() > MAX_NAME {
            return;
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let Known { owners, count } = &mut *known;
        let is_full = *count >= MAX_IDS;
        if is_full && !owners.contains_key(&owner) {
            return;
        }
        let owned = owners.entry(owner).or_default();
        if owned.names.get(&id).is_some_and(|known| **known == *name) {
            return;
        }
        if owned.names.insert(id, name.into()).is_none() {
            owned.order.push_back(id);
            *count += 1;
            if (owned.order.len() > MAX_PER_OWNER || is_full)
                && let Some(oldest) = owned.order.pop_front()
            {
                owned.names.remove(&oldest);
                *count -= 1;
            }
        }
        self.generation.fetch_add(1, Ordering::Release);
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

    pub(super) fn learn(&self, owner: Owner, id: TopicId, name: &[u8]) {
        self.shared.learn(owner, id, name);
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

    #[test]
    fn names_are_those_of_one_endpoint_rule_set_and_direction() {
        let shared = Arc::new(TopicIds::default());
        let (mut one, mut two) = (TopicNames::default(), TopicNames::default());
        one.share(shared.clone());
        two.share(shared);
        one.learn(owner(1, 7), id(1), b"a");
        assert_eq!(two.name(owner(1, 7), id(1)).as_deref(), Some(&b"a"[..]));
        assert_eq!(two.name(owner(2, 7), id(1)), None);
        assert_eq!(two.name(owner(1, 8), id(1)), None);
        let served = Owner {
            is_server: true,
            ..owner(1, 7)
        };
        assert_eq!(two.name(served, id(1)), None);
        one.learn(owner(1, 7), id(1), b"b");
        assert_eq!(two.name(owner(1, 7), id(1)).as_deref(), Some(&b"b"[..]));
        one.forget(1);
        assert_eq!(two.name(owner(1, 7), id(1)), None);
    }

    #[test]
    fn a_server_that_tells_many_ids_replaces_only_its_own() {
        let mut names = TopicNames::default();
        names.learn(owner(1, 1), id(0), b"a");
        for number in 0..=MAX_PER_OWNER as u32 {
            names.learn(owner(1, 2), id(number), b"b");
        }
        assert!(names.name(owner(1, 1), id(0)).is_some());
        assert!(names.name(owner(1, 2), id(0)).is_none());
        assert!(names.name(owner(1, 2), id(MAX_PER_OWNER as u32)).is_some());
        for ruleset in 3..40 {
            for number in 0..MAX_PER_OWNER as u32 {
                names.learn(owner(1, ruleset), id(number), b"c");
            }
        }
        let known = names.shared.known.read().unwrap();
        assert!(known.count <= MAX_IDS, "{}", known.count);
        assert_eq!(
            known.count,
            known
                .owners
                .values()
                .map(|owned| owned.names.len())
                .sum::<usize>()
        );
    }
}
