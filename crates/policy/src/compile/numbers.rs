//! Numbers for rules and rule sets.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    hash::{Hash as _, Hasher},
    sync::Arc,
};

use palisade_model::snapshot::{RuleInfo, RuleKey, RuleSet};

/// Numbers of rules. A removed rule keeps its number, because its number is still in records, conntrack entries and
/// counters, until [`Self::release`] says that it is not.
#[derive(Clone, Debug, Default)]
pub(super) struct RuleIds {
    pub(super) numbers: HashMap<String, u32>,
    pub(super) last: u32,
    pub(super) infos: Arc<BTreeMap<u32, Arc<RuleInfo>>>,
    /// Number from which on the programs have no counters; 0 if there is none.
    pub(super) limit: u32,
    /// Released numbers that have counters.
    pub(super) free: BTreeSet<u32>,
}

impl RuleIds {
    pub(super) fn number(&mut self, file: &str, info: RuleInfo) -> u32 {
        let key = format!("{file}\u{1f}{:?}", info.key);
        let known = self.numbers.get(&key).copied();
        let id = match known {
            // A rule without a counter gets a number with one as soon as there is one.
            Some(id) if !self.is_beyond(id) || self.free.is_empty() => id,
            _ => {
                let id = self.free.pop_first().unwrap_or_else(|| {
                    self.last += 1;
                    self.last
                });
                self.numbers.insert(key, id);
                id
            }
        };
        let info = RuleInfo { id, ..info };
        if self.infos.get(&id).is_none_or(|known| **known != info) {
            Arc::make_mut(&mut self.infos).insert(id, Arc::new(info));
        }
        id
    }

    const fn is_beyond(&self, id: u32) -> bool {
        self.limit != 0 && id >= self.limit
    }

    /// Returns the numbers up to the last one that are neither in `used` nor free.
    pub(super) fn others(&self, used: &HashSet<u32>) -> BTreeSet<u32> {
        let all = 1..=self.last;
        all.filter(|id| !used.contains(id) && !self.free.contains(id))
            .collect()
    }

    /// Forgets the rules of these numbers. New rules can get the numbers.
    pub(super) fn release(&mut self, ids: &BTreeSet<u32>) {
        self.numbers.retain(|_, id| !ids.contains(id));
        let infos = Arc::make_mut(&mut self.infos);
        infos.retain(|id, _| !ids.contains(id));
        let limit = self.limit;
        self.free
            .extend(ids.iter().filter(|id| limit == 0 || **id < limit));
    }
}

/// Numbers of rule sets. If possible, the number is a hash of the content, so that a rule set has the same number after
/// a restart. Connections that were offloaded under the rule set then stay offloaded.
#[derive(Clone, Debug, Default)]
pub(super) struct RuleSetIds {
    pub(super) numbers: HashMap<RuleSet, u32>,
    pub(super) sets: Arc<BTreeMap<u32, Arc<RuleSet>>>,
}

impl RuleSetIds {
    pub(super) fn number(&mut self, set: RuleSet) -> u32 {
        if let Some(&id) = self.numbers.get(&set) {
            return id;
        }
        let id = self.free_id(&set);
        Arc::make_mut(&mut self.sets).insert(id, Arc::new(set.clone()));
        self.numbers.insert(set, id);
        id
    }

    /// Forgets rule sets. A set that is used again gets the number that it had, unless another set has it by then.
    pub(super) fn forget(&mut self, ids: &BTreeSet<u32>) {
        self.numbers.retain(|_, id| !ids.contains(id));
        Arc::make_mut(&mut self.sets).retain(|id, _| !ids.contains(id));
    }

    /// Returns the hash of a set or, if that number is 0 or taken, the next free number.
    fn free_id(&self, set: &RuleSet) -> u32 {
        let mut hasher = Fnv::default();
        set.hash(&mut hasher);
        let hash = hasher.finish();
        let mut id = (hash ^ hash >> 32) as u32;
        while id == 0 || self.sets.contains_key(&id) {
            id = id.wrapping_add(1);
        }
        id
    }
}

/// FNV-1a hash, which is the same in every process and build.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

pub(super) fn plain(key: RuleKey) -> RuleInfo {
    RuleInfo {
        id: 0,
        key,
        location: None,
        description: String::new(),
    }
}
