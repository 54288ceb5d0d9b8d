//! Identities of addresses that are learned by name.
//!
//! They are no ordinary identities: only endpoints that use all their selectors can meet them, and only where they
//! send to. So they have rows in the egress tables of those endpoints and nowhere else, however many there are.

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

/// What [`Compiler::learned`] came to.
#[derive(Clone, Debug, Default)]
pub struct LearnedUpdate {
    /// The identity of each wanted set. One that cannot be (nobody uses one of its selectors any more, its base is
    /// gone) is missing.
    pub numbers: BTreeMap<LearnedSet, Identity>,
    /// What has to be written before an address may be mapped to one of them: from the snapshot before to the one now.
    pub ops: Vec<Op>,
    /// Whether there are new sets of application rules, which whoever inspects has to know before `ops` are carried out.
    pub rulesets: bool,
}

impl Compiler {
    /// Makes the learned identities that are wanted beyond the standing ones (one selector, on the world): gives them
    /// numbers and rows in the tables as they are. Nothing maps to a new one yet, so no packet notices; the entries of
    /// [`LearnedUpdate::ops`] are only added.
    ///
    /// `wanted` replaces what was wanted before: a set that is not among them any more is dropped by the next
    /// [`Self::update`]. Costs what the new sets cost, and a look at the rules of the endpoints that use their selectors.
    ///
    /// # Errors
    /// If there is no number left.
    pub fn learned(&mut self, wanted: &BTreeSet<LearnedSet>) -> Result<LearnedUpdate, Vec<Diagnostic>> {
        if self.names.wanted != *wanted {
            self.names.wanted.clone_from(wanted);
            self.names.wanted_changed = true;
        }
        let mut update = LearnedUpdate::default();
        // A change that was rejected may have left the subjects with other numbers than the snapshot.
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

    /// What was asked for by [`Self::learned`].
    #[must_use]
    pub fn wanted(&self) -> &BTreeSet<LearnedSet> {
        &self.names.wanted
    }

    /// Whether the snapshot holds the tables that the subjects have.
    fn in_step(&self) -> bool {
        self.subjects.iter().all(|subject| {
            self.snapshot
                .tables
                .get(&subject.policy)
                .is_some_and(|table| Arc::ptr_eq(table, &subject.table))
        })
    }

    /// The number and the labels of a set; none if the set cannot be.
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

    /// The subjects that use all of some selectors.
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

    /// Who uses which selectors now, which learned identities there are, and which rows of which subjects differ.
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
                .flat_map(|selecting| selecting.unit.selectors.iter().copied())
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
                // Those that used it and do not any more have changed themselves.
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

    /// Makes the sets anew. Returns the identities that are others than before.
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
        // Until this comes to an end, `sets` are not what they were made for.
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

    /// The learned identities that a subject can meet.
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

    /// The rows of some learned identities in the table of a subject.
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

    /// What the snapshot says about names.
    pub(super) fn finish_names(&mut self, before: &palisade_model::snapshot::Snapshot) {
        // Selectors that no rule uses any more; their numbers never come back.
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
