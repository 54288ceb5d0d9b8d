//! Numbers for rules and rule sets.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use crate::{
    snapshot::{RuleInfo, RuleSet},
    table::RuleSets,
};

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

#[derive(Clone, Debug, Default)]
pub(super) struct RuleSetIds {
    pub(super) numbers: HashMap<RuleSet, u32>,
    pub(super) last: u32,
    pub(super) sets: Arc<BTreeMap<u32, Arc<RuleSet>>>,
}

impl RuleSets for RuleSetIds {
    fn number(&mut self, set: RuleSet) -> u32 {
        if let Some(&id) = self.numbers.get(&set) {
            return id;
        }
        self.last += 1;
        let id = self.last;
        Arc::make_mut(&mut self.sets).insert(id, Arc::new(set.clone()));
        self.numbers.insert(set, id);
        id
    }
}
