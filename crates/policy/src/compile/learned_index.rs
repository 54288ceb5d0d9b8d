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

/// A learned identity.
#[derive(Debug, PartialEq)]
pub(super) struct LearnedIdentity {
    pub(super) base: Identity,
    pub(super) selectors: Arc<[SelectorNumber]>,
    pub(super) labels: Labels,
}

/// Numbers of selectors, and the learned identities.
#[derive(Clone, Debug, Default)]
pub(super) struct LearnedNames {
    /// Selector numbers by the text of the selector.
    pub(super) numbers: HashMap<String, SelectorNumber>,
    pub(super) last: SelectorNumber,
    pub(super) patterns: BTreeMap<SelectorNumber, FqdnPattern>,
    /// Subjects that use each selector.
    pub(super) users: BTreeMap<SelectorNumber, BTreeSet<usize>>,
    /// Sets that the daemon requested in addition to the standing sets (one selector, and the world as base).
    pub(super) wanted: BTreeSet<LearnedSet>,
    /// Identities of all sets.
    pub(super) sets: BTreeMap<LearnedSet, Identity>,
    /// Learned identities by number, except those that are also ordinary identities.
    pub(super) identities: BTreeMap<Identity, Arc<LearnedIdentity>>,
    pub(super) by_selector: HashMap<SelectorNumber, BTreeSet<Identity>>,
    /// Selectors in use, and identities of the world, from which `sets` was computed.
    pub(super) made_for: Option<(BTreeSet<SelectorNumber>, [Identity; 2])>,
    pub(super) wanted_changed: bool,
    /// Whether any identity has changed since the last snapshot.
    pub(super) changed: bool,
}

pub(super) fn text(pattern: &FqdnPattern) -> &str {
    match pattern {
        FqdnPattern::Name(text) | FqdnPattern::Pattern(text) => text,
    }
}

impl LearnedNames {
    /// Returns the number of a selector, and assigns one to a new selector.
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

    /// Returns whether one of the identities `moved` is the base or the number of a set.
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

    /// Clears the users of all selectors, before all subjects are recreated.
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

/// The selectors of one subject, and the learned identities in the table of the subject.
#[derive(Clone, Debug, Default)]
pub(super) struct SubjectNames {
    pub(super) selectors: BTreeSet<SelectorNumber>,
    /// The selectors as in the snapshot.
    pub(super) list: Option<SelectorList>,
    pub(super) rows: LearnedRows,
    /// Whether the endpoint states with the subject's current policy id have the flag LEARNS (the programs look up
    /// learned addresses).
    pub(super) learns: bool,
}

/// Learned identities, indexed by base and by selector.
#[derive(Clone, Debug, Default)]
pub(super) struct LearnedRows {
    pub(super) identities: BTreeMap<Identity, Arc<LearnedIdentity>>,
    pub(super) by_base: BTreeMap<Identity, Vec<Identity>>,
    pub(super) by_selector: HashMap<SelectorNumber, Vec<Identity>>,
    /// Texts of the selectors, because a label selector can require a `fqdn` label.
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
