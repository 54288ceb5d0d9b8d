//! Numbers of `toFQDNs` selectors, and the identities of the addresses that are learned through them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use palisade_abi::Identity;
use palisade_model::{
    labels::Labels,
    learned_identities::{LearnedSet, SelectorList, SelectorNumber},
    rule::{FqdnPattern, Label},
};

/// An identity of learned addresses.
#[derive(Debug, PartialEq)]
pub(super) struct LearnedIdentity {
    pub(super) base: Identity,
    pub(super) selectors: Arc<[SelectorNumber]>,
    pub(super) labels: Labels,
}

/// Selectors and the identities that come of them.
#[derive(Clone, Debug, Default)]
pub(super) struct LearnedNames {
    /// Selector by its text.
    pub(super) numbers: HashMap<String, SelectorNumber>,
    pub(super) last: SelectorNumber,
    pub(super) patterns: BTreeMap<SelectorNumber, FqdnPattern>,
    /// Who uses a selector.
    pub(super) users: BTreeMap<SelectorNumber, BTreeSet<usize>>,
    /// What was asked for beyond the standing sets.
    pub(super) wanted: BTreeSet<LearnedSet>,
    /// Every set there is.
    pub(super) sets: BTreeMap<LearnedSet, Identity>,
    /// What the numbers stand for; without those that ordinary identities have too.
    pub(super) identities: BTreeMap<Identity, Arc<LearnedIdentity>>,
    pub(super) by_selector: HashMap<SelectorNumber, BTreeSet<Identity>>,
    /// The selectors and the wanted sets that `sets` were made for.
    pub(super) made_for: Option<(BTreeSet<SelectorNumber>, [Identity; 2])>,
    pub(super) wanted_changed: bool,
    /// Identities, ordinary ones or learned ones, have changed since the snapshot was made.
    pub(super) changed: bool,
}

pub(super) fn text(pattern: &FqdnPattern) -> &str {
    match pattern {
        FqdnPattern::Name(text) | FqdnPattern::Pattern(text) => text,
    }
}

impl LearnedNames {
    /// The number of a selector, a new one if nobody uses it yet.
    pub(super) fn selector(&mut self, pattern: &FqdnPattern) -> SelectorNumber {
        if let Some(number) = self.numbers.get(text(pattern)) {
            return *number;
        }
        self.last += 1;
        self.numbers.insert(text(pattern).to_owned(), self.last);
        self.patterns.insert(self.last, pattern.clone());
        self.last
    }

    pub(super) fn selector_of(&self, text: &str) -> Option<SelectorNumber> {
        self.numbers.get(text).copied()
    }

    pub(super) fn identities(&self) -> &BTreeMap<Identity, Arc<LearnedIdentity>> {
        &self.identities
    }

    /// Whether any of these identities is the base of a set or has the number of one.
    pub(super) fn concerned(&self, moved: &BTreeSet<Identity>) -> bool {
        let bases = |set: &LearnedSet| moved.contains(&set.base);
        !moved.is_empty()
            && (self.wanted.iter().any(bases)
                || self
                    .sets
                    .iter()
                    .any(|(set, number)| bases(set) || moved.contains(number)))
    }

    pub(super) fn labels(&self, base: &Labels, selectors: &[SelectorNumber]) -> Option<Labels> {
        let names: Option<Vec<Label>> = selectors
            .iter()
            .map(|number| {
                Some(Label {
                    source: "fqdn".into(),
                    key: text(self.patterns.get(number)?).to_owned(),
                    value: String::new(),
                })
            })
            .collect();
        Some(Labels::new(base.iter().cloned().chain(names?)))
    }

    /// The subjects are made anew: nobody has said yet which selectors it uses.
    pub(super) fn forget_users(&mut self) {
        self.users.clear();
        self.made_for = None;
    }

    pub(super) fn put(&mut self, set: LearnedSet, number: Identity, labels: Labels, ordinary: bool) {
        if !ordinary {
            for selector in &*set.selectors {
                self.by_selector.entry(*selector).or_default().insert(number);
            }
            let identity = LearnedIdentity {
                base: set.base,
                selectors: Arc::clone(&set.selectors),
                labels,
            };
            self.identities.insert(number, Arc::new(identity));
        }
        self.sets.insert(set, number);
    }
}

/// The learned identities that one subject can meet.
#[derive(Clone, Debug, Default)]
pub(super) struct SubjectNames {
    pub(super) selectors: BTreeSet<SelectorNumber>,
    /// The same as snapshots have it.
    pub(super) list: Option<SelectorList>,
    pub(super) rows: LearnedRows,
    /// Whether the endpoints learn, as the table's policy id has it.
    pub(super) learns: bool,
}

/// Learned identities, findable by what rules ask for.
#[derive(Clone, Debug, Default)]
pub(super) struct LearnedRows {
    pub(super) identities: BTreeMap<Identity, Arc<LearnedIdentity>>,
    pub(super) by_base: BTreeMap<Identity, Vec<Identity>>,
    pub(super) by_selector: HashMap<SelectorNumber, Vec<Identity>>,
    /// The texts of the selectors: a label selector can ask for them too.
    pub(super) texts: HashSet<String>,
}

impl LearnedRows {
    pub(super) fn add(&mut self, number: Identity, identity: &Arc<LearnedIdentity>) {
        if self.identities.insert(number, Arc::clone(identity)).is_some() {
            return;
        }
        self.by_base.entry(identity.base).or_default().push(number);
        for selector in &*identity.selectors {
            self.by_selector.entry(*selector).or_default().push(number);
        }
    }
}
