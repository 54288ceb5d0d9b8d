//! Rows of learned identities in the policy tables.
//!
//! A peer of an endpoint can have a learned identity only on egress, and only if the policies of the endpoint use all
//! selectors of the identity. So the rows of a learned identity are only in the egress part of the tables of such
//! endpoints, which bounds the size of all other tables.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use palisade_abi::{Direction, Identity, PolicyEntry, PolicyKey};
use palisade_model::{
    diagnostic::Diagnostic,
    identity::is_combined,
    inventory::Enforcement,
    labels::Labels,
    learned_identities::{LearnedIdentities, LearnedSet, SelectorNumber, Sets, learnable},
    op::Op,
    rule::Location,
    snapshot::TableKey,
};

use super::{
    changes::Progress,
    compiler::Compiler,
    learned_index::{LearnedIdentity, LearnedRows, text},
    subject::Subject,
};
use crate::plan::plan;

/// Result of [`Compiler::learned`].
#[derive(Clone, Debug, Default)]
pub struct LearnedUpdate {
    /// Identity of each requested set. A set that cannot have an identity is missing, for example because no endpoint
    /// uses all of its selectors.
    pub numbers: BTreeMap<LearnedSet, Identity>,
    /// Operations that must be carried out before an address is mapped to one of these identities.
    pub ops: Vec<Op>,
    /// Whether there are new rule sets, which the inspectors must have before `ops` are carried out.
    pub rulesets: bool,
}

impl Compiler {
    /// Creates the requested learned identities, beyond those that always exist (one selector, and the world as base):
    /// assigns numbers and adds rows to the current tables. No address maps to a new identity yet, so the added entries
    /// of [`LearnedUpdate::ops`] affect no packet.
    ///
    /// `wanted` replaces the sets requested before: the next [`Self::update`] drops sets that are not in `wanted`. The
    /// cost grows with the number of new sets, and with the rules of the endpoints that use their selectors.
    ///
    /// # Errors
    /// An error if no identity number is left.
    pub fn learned(&mut self, wanted: &BTreeSet<LearnedSet>) -> Result<LearnedUpdate, Vec<Diagnostic>> {
        if self.names.wanted != *wanted {
            self.names.wanted.clone_from(wanted);
            self.names.wanted_changed = true;
        }
        let mut update = LearnedUpdate::default();
        // After a rejected change, subjects can have policy ids that differ from those in the snapshot. Then `ops` must
        // be a plan that starts from this snapshot.
        let before = (!self.in_step()).then(|| self.snapshot.clone());
        let mut touched: BTreeMap<usize, BTreeSet<Identity>> = BTreeMap::new();
        let mut more = Vec::new();
        for set in wanted {
            if let Some(number) = self.names.sets.get(set) {
                update.numbers.insert(set.clone(), *number);
                continue;
            }
            let Some((number, labels)) = self.number_of(set)? else {
                continue;
            };
            let ordinary = self.identity_index.labels().contains_key(&number);
            self.names.put(set.clone(), number, labels, ordinary);
            update.numbers.insert(set.clone(), number);
            more.push((set.clone(), number));
            for at in self.users_of(&set.selectors) {
                if let Some(identity) = self.names.identities.get(&number) {
                    self.subjects[at].names.rows.add(number, identity);
                    touched.entry(at).or_default().insert(number);
                }
            }
        }
        if more.is_empty() && before.is_none() {
            return Ok(update);
        }
        let rulesets = Arc::clone(&self.rulesets.sets);
        let mut puts: Vec<(PolicyKey, PolicyEntry)> = Vec::new();
        for (at, rows) in touched {
            let entries = self.rows_of(at, &rows);
            let subject = &mut self.subjects[at];
            puts.extend(
                entries
                    .iter()
                    .map(|(key, entry)| (key.with_policy(subject.policy), *entry)),
            );
            self.snapshot.tables.remove(&subject.policy);
            Arc::make_mut(&mut subject.table).entries.extend(entries);
            self.snapshot
                .tables
                .insert(subject.policy, Arc::clone(&subject.table));
        }
        update.rulesets = !Arc::ptr_eq(&rulesets, &self.rulesets.sets);
        self.snapshot.rulesets = Arc::clone(&self.rulesets.sets);
        self.snapshot.rules = Arc::clone(&self.rule_ids.infos);
        let identities = Arc::make_mut(&mut self.snapshot.identities);
        for (_, number) in &more {
            if let Some(identity) = self.names.identities.get(number) {
                identities.insert(*number, identity.labels.clone());
            }
        }
        let sets = Arc::make_mut(&mut self.snapshot.names.wanted);
        for (set, number) in more {
            sets.entry(set.base).or_default().insert(set.selectors, number);
        }
        match before {
            Some(before) => {
                self.finish(before.clone());
                update.ops = plan(&before, &self.snapshot);
            }
            None if puts.is_empty() => {}
            None => update.ops.push(Op::PolicyPut(puts)),
        }
        Ok(update)
    }

    /// Returns the sets that were requested by [`Self::learned`].
    #[must_use]
    pub fn wanted(&self) -> &BTreeSet<LearnedSet> {
        &self.names.wanted
    }

    /// Returns whether the snapshot holds the current tables of all subjects.
    fn in_step(&self) -> bool {
        self.subjects.iter().all(|subject| {
            self.snapshot
                .tables
                .get(&subject.policy)
                .is_some_and(|table| Arc::ptr_eq(table, &subject.table))
        })
    }

    /// Returns the identity and the labels of a set; `None` if the set cannot have an identity.
    fn number_of(&mut self, set: &LearnedSet) -> Result<Option<(Identity, Labels)>, Vec<Diagnostic>> {
        let ascending = set.selectors.windows(2).all(|two| two[0] < two[1]);
        if !ascending || set.selectors.is_empty() || !learnable(set.base) {
            return Ok(None);
        }
        if self.users_of(&set.selectors).is_empty() {
            return Ok(None);
        }
        let Some(base) = self.identity_index.labels().get(&set.base) else {
            return Ok(None);
        };
        let Some(labels) = self.names.labels(base, &set.selectors) else {
            return Ok(None);
        };
        let (known, learned) = (&self.snapshot.identities, &self.names.identities);
        let number = self
            .identities
            .number(&labels, &|number| {
                known.contains_key(&number) || learned.contains_key(&number)
            })
            .map_err(|error| vec![Diagnostic::error(Location::default(), error.to_string())])?;
        Ok(Some((number, labels)))
    }

    /// Returns the subjects that use all of the selectors.
    fn users_of(&self, selectors: &[SelectorNumber]) -> Vec<usize> {
        let users: Option<Vec<&BTreeSet<usize>>> = selectors
            .iter()
            .map(|selector| self.names.users.get(selector))
            .collect();
        let Some(fewest) = users
            .as_ref()
            .and_then(|users| users.iter().min_by_key(|users| users.len()))
        else {
            return Vec::new();
        };
        fewest
            .iter()
            .copied()
            .filter(|at| users.iter().flatten().all(|users| users.contains(at)))
            .collect()
    }

    /// Updates which subject uses which selectors and which learned identities exist. Returns the identities whose
    /// rows change, by subject.
    pub(super) fn refresh_learned(
        &mut self,
        progress: &mut Progress,
    ) -> Result<BTreeMap<usize, BTreeSet<Identity>>, Vec<Diagnostic>> {
        let mut differing: BTreeMap<usize, BTreeSet<Identity>> = BTreeMap::new();
        let enforced = self.inventory.options.enforcement != Enforcement::Never;
        let mut changed_users: BTreeSet<usize> = BTreeSet::new();
        for at in &progress.dirty {
            let subject = &mut self.subjects[*at];
            let selectors: BTreeSet<SelectorNumber> = subject
                .specs
                .values()
                .filter(|_| enforced)
                .flat_map(|applied| applied.unit.selectors.iter().copied())
                .collect();
            if selectors == subject.names.selectors && (subject.names.list.is_some() != selectors.is_empty())
            {
                continue;
            }
            changed_users.insert(*at);
            for gone in subject.names.selectors.difference(&selectors) {
                if let Some(users) = self.names.users.get_mut(gone) {
                    users.remove(at);
                }
            }
            for selector in &selectors {
                self.names.users.entry(*selector).or_default().insert(*at);
            }
            subject.names.list = (!selectors.is_empty()).then(|| {
                let patterns = &self.names.patterns;
                selectors
                    .iter()
                    .filter_map(|number| Some((*number, patterns.get(number)?.clone())))
                    .collect()
            });
            subject.names.selectors = selectors;
        }
        self.names.users.retain(|_, users| !users.is_empty());

        let in_use: BTreeSet<SelectorNumber> = self.names.users.keys().copied().collect();
        let worlds = [self.snapshot.world_ipv4, self.snapshot.world_ipv6];
        let made_for = Some((in_use, worlds));
        let mut affected: BTreeSet<usize> = changed_users;
        if made_for != self.names.made_for
            || self.names.wanted_changed
            || self.names.concerned(&progress.moved)
        {
            for (number, identity) in self.renew_sets(&made_for, progress)? {
                for at in self.users_of(&identity.selectors) {
                    affected.insert(at);
                    differing.entry(at).or_default().insert(number);
                }
                // `changed_users` already holds the subjects that stopped using a selector.
            }
            self.names.made_for = made_for;
            self.names.wanted_changed = false;
        }
        for at in affected {
            let rows = self.learned_rows(&self.subjects[at]);
            let subject = &mut self.subjects[at];
            let old = std::mem::replace(&mut subject.names.rows, rows);
            let new = &subject.names.rows;
            let differs = differing.entry(at).or_default();
            differs.extend(
                old.identities
                    .iter()
                    .filter(|(number, identity)| new.identities.get(number) != Some(identity))
                    .map(|(number, _)| *number),
            );
            differs.extend(
                new.identities
                    .iter()
                    .filter(|(number, identity)| old.identities.get(number) != Some(identity))
                    .map(|(number, _)| *number),
            );
            if differs.is_empty() {
                differing.remove(&at);
            }
        }
        progress.dirty.extend(differing.keys().copied());
        Ok(differing)
    }

    /// Recomputes the sets. Returns the identities that are new, gone, or have another base or other labels.
    fn renew_sets(
        &mut self,
        made_for: &Option<(BTreeSet<SelectorNumber>, [Identity; 2])>,
        progress: &Progress,
    ) -> Result<Vec<(Identity, Arc<LearnedIdentity>)>, Vec<Diagnostic>> {
        let mut sets: BTreeSet<LearnedSet> = self.names.wanted.clone();
        if let Some((in_use, worlds)) = made_for {
            for base in worlds {
                sets.extend(in_use.iter().map(|selector| LearnedSet {
                    base: *base,
                    selectors: [*selector].into(),
                }));
            }
        }
        // If no number is left, this function returns early, and the next update must recompute the sets.
        self.names.made_for = None;
        self.names.changed = true;
        let old_sets = std::mem::take(&mut self.names.sets);
        let old = std::mem::take(&mut self.names.identities);
        self.names.by_selector.clear();
        for set in sets {
            let same = old_sets
                .get(&set)
                .filter(|_| !progress.moved.contains(&set.base))
                .and_then(|number| Some((*number, old.get(number)?.labels.clone())));
            let found = match same {
                Some(found) if !self.users_of(&set.selectors).is_empty() => Some(found),
                _ => self.number_of(&set)?,
            };
            if let Some((number, labels)) = found {
                let ordinary = self.identity_index.labels().contains_key(&number);
                self.names.put(set, number, labels, ordinary);
            }
        }
        for (number, identity) in &old {
            if !self.names.identities.contains_key(number) && is_combined(&identity.labels) {
                self.identities.release(&identity.labels);
            }
        }
        let new = &self.names.identities;
        let gone = old.iter().filter(|(number, identity)| {
            new.get(number) != Some(identity) || progress.moved.contains(&identity.base)
        });
        let come = new.iter().filter(|(number, identity)| {
            old.get(number) != Some(identity) || progress.moved.contains(&identity.base)
        });
        let changes: Vec<(Identity, Arc<LearnedIdentity>)> = gone
            .chain(come)
            .map(|(number, identity)| (*number, Arc::clone(identity)))
            .collect();
        Ok(changes)
    }

    /// Returns the learned identities all of whose selectors the subject uses.
    fn learned_rows(&self, subject: &Subject) -> LearnedRows {
        let mut rows = LearnedRows::default();
        for selector in &subject.names.selectors {
            rows.texts
                .extend(self.names.patterns.get(selector).map(|p| text(p).to_owned()));
            for number in self.names.by_selector.get(selector).into_iter().flatten() {
                if let Some(identity) = self.names.identities.get(number)
                    && identity
                        .selectors
                        .iter()
                        .all(|selector| subject.names.selectors.contains(selector))
                {
                    rows.add(*number, identity);
                }
            }
        }
        rows
    }

    /// Returns the entries of the given learned identities in the table of a subject.
    fn rows_of(&mut self, at: usize, identities: &BTreeSet<Identity>) -> Vec<(TableKey, PolicyEntry)> {
        let default_verdict = self.default_verdict(at, Direction::Egress);
        let mut entries = Vec::new();
        self.build(
            at,
            Direction::Egress,
            default_verdict,
            Some(identities),
            &mut entries,
        );
        entries.retain(|(key, _)| identities.contains(&key.identity));
        entries
    }

    /// Updates the selectors and learned identities of the snapshot.
    pub(super) fn finish_names(&mut self, before: &palisade_model::snapshot::Snapshot) {
        // Remove the selectors that no rule uses any more. Their numbers are not reused.
        let used: HashSet<SelectorNumber> = self
            .specs
            .values()
            .flat_map(|unit| unit.selectors.iter().copied())
            .collect();
        if used.len() != self.names.patterns.len() {
            self.names.numbers.retain(|_, number| used.contains(number));
            self.names.patterns.retain(|number, _| used.contains(number));
        }
        self.snapshot.fqdn = self
            .subjects
            .iter()
            .filter_map(|subject| Some((subject, subject.names.list.as_ref()?)))
            .flat_map(|(subject, list)| {
                subject
                    .endpoints
                    .iter()
                    .map(move |(id, _)| (*id, Arc::clone(list)))
            })
            .collect();
        let old = &before.names;
        let lengths = if Arc::ptr_eq(&old.prefixes, &self.snapshot.prefixes) {
            Arc::clone(&old.lengths)
        } else {
            let lengths: BTreeSet<u32> = self.snapshot.prefixes.keys().map(|key| key.length).collect();
            lengths.into_iter().rev().collect()
        };
        let mut names = LearnedIdentities {
            addresses: Arc::clone(&self.snapshot.addresses),
            prefixes: Arc::clone(&self.snapshot.prefixes),
            lengths,
            worlds: [self.snapshot.world_ipv4, self.snapshot.world_ipv6],
            selectors: Arc::clone(&old.selectors),
            standing: Arc::clone(&old.standing),
            wanted: Arc::clone(&old.wanted),
        };
        let worlds = names.worlds;
        if !names.selectors.iter().eq(self.names.users.keys()) {
            names.selectors = Arc::new(self.names.users.keys().copied().collect());
        }
        if !self.names.changed {
            self.snapshot.names = names;
            return;
        }
        let (mut standing, mut wanted) = (Sets::new(), Sets::new());
        for (set, number) in &self.names.sets {
            let stands = set.selectors.len() == 1 && worlds.contains(&set.base);
            let sets = if stands { &mut standing } else { &mut wanted };
            sets.entry(set.base)
                .or_default()
                .insert(Arc::clone(&set.selectors), *number);
        }
        if *names.standing != standing {
            names.standing = Arc::new(standing);
        }
        if *names.wanted != wanted {
            names.wanted = Arc::new(wanted);
        }
        self.snapshot.names = names;

        let ordinary = self.identity_index.labels();
        let learned = &self.names.identities;
        let all = || {
            ordinary.iter().map(|(number, labels)| (*number, labels)).chain(
                learned
                    .iter()
                    .map(|(number, identity)| (*number, &identity.labels)),
            )
        };
        let same = self.snapshot.identities.len() == ordinary.len() + learned.len()
            && all().all(|(number, labels)| self.snapshot.identities.get(&number) == Some(labels));
        if !same {
            self.snapshot.identities =
                Arc::new(all().map(|(number, labels)| (number, labels.clone())).collect());
        }
        self.names.changed = false;
    }
}
