//! Numbers for rules and rule sets.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{Hash as _, Hasher},
    sync::Arc,
};

use palisade_model::snapshot::{RuleInfo, RuleKey, RuleSet};

#[derive(Clone, Debug, Default)]
pub(super) struct RuleIds {
    pub(super) numbers: HashMap<String, u32>,
    pub(super) last: u32,
    pub(super) infos: Arc<BTreeMap<u32, Arc<RuleInfo>>>,
}

impl RuleIds {
    pub(super) fn number(&mut self, file: &str, info: RuleInfo) -> u32 {
        let key = format!("{file}\u{1f}{:?}", info.key);
        let id = *self.numbers.entry(key).or_insert_with(|| {
            self.last += 1;
            self.last
        });
        let info = RuleInfo { id, ..info };
        if self.infos.get(&id).is_none_or(|known| **known != info) {
            Arc::make_mut(&mut self.infos).insert(id, Arc::new(info));
        }
        id
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
