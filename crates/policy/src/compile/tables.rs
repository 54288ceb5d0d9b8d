//! The policy tables of subjects. A change rebuilds only the rows that it affects.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use palisade_abi::{CLASS_ANY, Class, Direction, INSIDE, Identity, PolicyEntry, entry_flags, identity};
use palisade_model::{
    diagnostic::Diagnostic,
    inventory::Enforcement,
    rule::{Entity, Location},
    snapshot::{RuleKey, Snapshot, Table, TableKey, differing},
};

use super::{
    changes::Progress,
    compiler::Compiler,
    conflict::ConflictFinder,
    numbers::plain,
    precedence::Builder,
    rules::RuleContext,
    select::ResolvedSelector,
    spec::SpecKey,
    subject::DirtyRows,
    table_rule::{DefaultVerdict, Learned, Member, Members, TablePorts, TableRule},
};
use crate::classes::PortSet;

/// Bound on the cost of the regular expressions of all policies that select an endpoint, in automaton states. The
/// inspector combines these expressions into one automaton. Without the bound, the policies of one endpoint could use
/// up the memory and time that the inspection of other endpoints needs.
const MAX_ENDPOINT_EXPRESSIONS: usize = 1_000_000;
impl Compiler {
    /// Compiles the dirty subjects and the subjects whose port classes change as a result, and assembles the snapshot.
    pub(super) fn compile(
        &mut self,
        mut progress: Progress,
        before: Snapshot,
    ) -> Result<(), Vec<Diagnostic>> {
        let mut errors: Vec<Diagnostic> = Vec::new();
        self.hold_port_sets(&progress.dirty);
        let mut touched: BTreeMap<usize, DirtyRows> = BTreeMap::new();
        match self.classes.refresh() {
            Ok(protocols) if protocols.is_empty() => {}
            Ok(protocols) => self.follow_classes(&protocols, &mut progress.dirty, &mut touched),
            Err(error) => errors.push(Diagnostic::error(Location::default(), error.to_string())),
        }
        let learned = self.refresh_learned(&mut progress)?;
        for (at, identities) in learned {
            touched
                .entry(at)
                .or_insert_with(|| DirtyRows::Only(BTreeSet::new()))
                .add_identities(identities.into_iter());
        }
        for at in &progress.dirty {
            let rows = touched
                .remove(at)
                .unwrap_or_else(|| DirtyRows::Only(BTreeSet::new()));
            match self.compile_subject(*at, rows, &progress.moved) {
                Ok(table) => self.install_table(*at, table),
                Err(mut conflicts) => errors.append(&mut conflicts),
            }
        }
        if !errors.is_empty() {
            errors.sort_by(|a, b| (&a.location, &a.message).cmp(&(&b.location, &b.message)));
            errors.dedup();
            return Err(errors);
        }
        self.finish(before);
        Ok(())
    }

    /// Stores the table of a subject, under a new policy id unless the live table is changed in place.
    fn install_table(&mut self, at: usize, table: Table) {
        let subject = &mut self.subjects[at];
        // If an endpoint starts or stops learning names, one store must change the flag LEARNS and the policy id
        // together, so the table gets a new policy id.
        let learns = !subject.names.selectors.is_empty();
        let anew = subject.policy == 0 || subject.names.learns != learns;
        subject.names.learns = learns;
        if !anew && *subject.table == table {
            return;
        }
        if anew || !small_step(&subject.table, &table) {
            subject.policy = self.next_policy;
            self.next_policy = self.next_policy.wrapping_add(1).max(1);
        }
        subject.plain = table.plain();
        subject.table = Arc::new(table);
    }

    /// Retains the port sets of specs that are new to a subject, and releases the port sets of specs that no longer
    /// select the subject.
    pub(super) fn hold_port_sets(&mut self, dirty: &BTreeSet<usize>) {
        for at in dirty {
            let subject = &self.subjects[*at];
            let new: Vec<(SpecKey, Vec<PortSet>)> = subject
                .applied_specs()
                .filter(|(_, applied)| applied.stale)
                .map(|(key, applied)| (key.clone(), self.port_sets(&applied.unit, &subject.named_ports)))
                .collect();
            let subject = &mut self.subjects[*at];
            for (key, sets) in new {
                self.classes.retain(&sets);
                if let Some(applied) = subject.specs.get_mut(&key) {
                    self.classes.release(&std::mem::replace(&mut applied.sets, sets));
                }
            }
            for applied in &mut subject.retired {
                self.classes.release(&std::mem::take(&mut applied.sets));
            }
        }
    }

    /// Updates the classes in resolved rules after slots of `protocols` have changed class, and marks the affected
    /// subjects dirty.
    pub(super) fn follow_classes(
        &mut self,
        protocols: &[u8],
        dirty: &mut BTreeSet<usize>,
        touched: &mut BTreeMap<usize, DirtyRows>,
    ) {
        let mut known: HashMap<PortSet, Option<Arc<[Class]>>> = HashMap::new();
        for (at, subject) in self.subjects.iter_mut().enumerate() {
            for applied in subject.specs.values_mut().filter(|applied| !applied.stale) {
                let concerned = applied.sets.iter().any(|set| match set {
                    PortSet::All => false,
                    PortSet::Protocol(protocol) | PortSet::Range { protocol, .. } => {
                        protocols.contains(protocol)
                    }
                });
                if !concerned {
                    continue;
                }
                let mut changed = false;
                for ports in applied
                    .rules
                    .iter_mut()
                    .flatten()
                    .flat_map(|rule| &mut rule.ports)
                {
                    let classes = known
                        .entry(ports.set)
                        .or_insert_with(|| self.classes.of(ports.set));
                    if ports.classes != *classes {
                        ports.classes = classes.clone();
                        changed = true;
                    }
                }
                if changed {
                    dirty.insert(at);
                    touched
                        .entry(at)
                        .or_insert_with(|| DirtyRows::Only(BTreeSet::new()))
                        .add(&applied.rules);
                }
            }
        }
    }

    /// Builds the table of a subject. If possible, only the affected rows are rebuilt.
    pub(super) fn compile_subject(
        &mut self,
        at: usize,
        mut dirty_rows: DirtyRows,
        moved: &BTreeSet<Identity>,
    ) -> Result<Table, Vec<Diagnostic>> {
        // A requirement (`fromRequires`, `toRequires`) of one spec applies to the rules of all specs. Few policies have
        // requirements, so the whole table is rebuilt.
        let subject = &mut self.subjects[at];
        if subject.renew_required() {
            for applied in subject.specs.values_mut() {
                applied.stale = true;
            }
            dirty_rows = DirtyRows::Everything;
        }
        if let Some(error) = self.too_many_expressions(at) {
            self.subjects[at].default_verdict = [None, None];
            return Err(vec![error]);
        }
        self.resolve_rules(at, &mut dirty_rows, moved);
        if let Err(errors) = self.check_conflicts(at) {
            // The next update must rebuild the whole table.
            self.subjects[at].default_verdict = [None, None];
            return Err(errors);
        }
        let default_verdict = palisade_abi::DIRECTIONS.map(|direction| self.default_verdict(at, direction));
        if self.subjects[at].default_verdict != default_verdict.map(Some) {
            dirty_rows = DirtyRows::Everything;
        }
        let rows = match &dirty_rows {
            DirtyRows::Everything => None,
            DirtyRows::Only(identities) => Some(identities),
        };
        let mut entries = Vec::new();
        for direction in palisade_abi::DIRECTIONS {
            let default_verdict = default_verdict[direction as usize];
            self.build(at, direction, default_verdict, rows, &mut entries);
        }
        self.subjects[at].default_verdict = default_verdict.map(Some);
        let old = &self.subjects[at].table;
        Ok(match rows {
            None => {
                entries.sort_unstable_by_key(|(key, _)| *key);
                Table {
                    entries: entries.into_iter().collect(),
                }
            }
            Some(identities) => with_rows(old, identities, entries),
        })
    }

    /// Resolves the rules of specs that are new to a subject or whose members changed, and adds the affected rows to
    /// `dirty_rows`.
    fn resolve_rules(&mut self, at: usize, dirty_rows: &mut DirtyRows, moved: &BTreeSet<Identity>) {
        let subject = &self.subjects[at];
        let mut made = Vec::new();
        let mut classes = HashMap::new();
        let remade = subject
            .applied_specs()
            .filter(|(_, applied)| applied.stale || applied.regrouped);
        for (key, applied) in remade {
            let mut remarks: [Vec<Diagnostic>; 2] = Default::default();
            let rules = palisade_abi::DIRECTIONS.map(|direction| {
                let mut cx = RuleContext {
                    subject,
                    key,
                    direction,
                    classes: &mut classes,
                    remarks: &mut remarks[direction as usize],
                };
                self.table_rules(&applied.unit, &mut cx)
            });
            if applied.stale {
                dirty_rows.add(&rules);
                dirty_rows.add(&applied.rules);
            } else {
                dirty_rows.add_identities(moved.iter().copied());
            }
            made.push((key.clone(), rules, remarks));
        }
        let subject = &mut self.subjects[at];
        for (key, rules, remarks) in made {
            if let Some(applied) = subject.specs.get_mut(&key) {
                applied.stale = false;
                applied.regrouped = false;
                applied.rules = rules;
                applied.remarks = remarks;
            }
        }
        for applied in subject.retired.drain(..) {
            dirty_rows.add(&applied.rules);
        }
    }

    /// Finds conflicts between the application rules of all specs that select a subject.
    fn check_conflicts(&self, at: usize) -> Result<(), Vec<Diagnostic>> {
        let subject = &self.subjects[at];
        // If enforcement is off, no traffic is inspected, and conflicts do not matter.
        let enforced = self.inventory.options.enforcement != Enforcement::Never;
        if !enforced || !subject.specs.values().any(|applied| applied.unit.has_l7_rules) {
            return Ok(());
        }
        let mut errors = Vec::new();
        for direction in palisade_abi::DIRECTIONS {
            let mut finder = ConflictFinder::default();
            for (key, applied) in subject.applied_specs() {
                finder.add(&key.policy, applied.unit.spec(), direction);
            }
            if let Err(mut conflicts) = finder.finish() {
                errors.append(&mut conflicts);
            }
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    /// Returns the error about regular expressions that cost too much together, preferably at a spec that is new to the
    /// subject; `None` within the bound.
    fn too_many_expressions(&self, at: usize) -> Option<Diagnostic> {
        let subject = &self.subjects[at];
        let units = || {
            subject
                .applied_specs()
                .filter(|(_, applied)| applied.unit.expressions > 0)
        };
        let sum = units().fold(0usize, |sum, (_, applied)| {
            sum.saturating_add(applied.unit.expressions)
        });
        if sum <= MAX_ENDPOINT_EXPRESSIONS {
            return None;
        }
        let (key, applied) = units().max_by_key(|(_, applied)| (applied.stale, applied.unit.expressions))?;
        let endpoint = subject.endpoints.first().map(|(id, _)| *id);
        let endpoint = self
            .inventory
            .endpoints
            .iter()
            .find(|known| Some(known.id) == endpoint);
        Some(Diagnostic::error(
            applied.unit.spec().location.clone(),
            format!(
                "policy {}: the regular expressions of the policies that select endpoint {} are too large together: they \
                 need about {sum} states, of at most {MAX_ENDPOINT_EXPRESSIONS}",
                key.policy,
                endpoint.map_or("", |endpoint| endpoint.name.as_str()),
            ),
        ))
    }

    /// Appends the entries of one direction to `entries`: all entries, or those of the identities in `rows` and those
    /// for any identity.
    pub(super) fn build(
        &mut self,
        at: usize,
        direction: Direction,
        default_verdict: DefaultVerdict,
        rows: Option<&BTreeSet<Identity>>,
        entries: &mut Vec<(TableKey, PolicyEntry)>,
    ) {
        let options = self.inventory.options;
        let egress = direction == Direction::Egress;
        let localhost =
            (!egress && options.allow_localhost && !self.subjects[at].node && !default_verdict.unenforced)
                .then(|| self.localhost());
        let subject = &self.subjects[at];
        let mut rules: Vec<&TableRule> = Vec::new();
        if options.enforcement != Enforcement::Never {
            rules.extend(
                subject
                    .specs
                    .values()
                    .flat_map(|applied| &applied.rules[direction as usize]),
            );
        }
        rules.extend(&localhost);
        // Where nothing is enforced, there is nothing to keep open.
        if default_verdict.unenforced {
            rules.retain(|rule| !rule.failsafe);
        }
        let failsafe_classes: BTreeSet<Class> = rules
            .iter()
            .filter(|rule| rule.failsafe)
            .flat_map(|rule| &rule.ports)
            .flat_map(|ports| ports.classes.iter().flat_map(|classes| classes.iter()))
            .copied()
            .collect();
        let mut build = |rules: &[&TableRule], layer, entries: &mut Vec<(TableKey, PolicyEntry)>| {
            Builder {
                direction,
                layer,
                rules,
                rows,
                learned: egress.then_some(&subject.names.rows),
                default_verdict,
                audit: options.audit || subject.audit,
                clear_text_http2: options.clear_text_http2,
                rulesets: &mut self.rulesets,
            }
            .build(entries);
        };
        build(&rules, 0, entries);
        if failsafe_classes.is_empty() {
            return;
        }
        // The programs look up a class of these entries only after they have found a failsafe port of the class.
        rules.retain(|rule| !rule.failsafe);
        let mut inside = Vec::new();
        build(&rules, INSIDE, &mut inside);
        inside.retain(|(key, _)| key.class == CLASS_ANY || failsafe_classes.contains(&key.class));
        entries.append(&mut inside);
    }

    /// Returns the rule by which the node may always reach its workloads.
    fn localhost(&mut self) -> TableRule {
        TableRule {
            id: self.rule_ids.number("", plain(RuleKey::LocalhostAlways)),
            failsafe: false,
            denies: false,
            audit: false,
            auth_required: false,
            members: Members::Of(vec![Member {
                peer: Member::LOCALHOST,
                members: Arc::new(
                    self.identity_index
                        .select(&ResolvedSelector::Entity(Entity::Host)),
                ),
                learned: Learned::Base,
            }]),
            except: None,
            ports: vec![TablePorts {
                set: PortSet::All,
                classes: None,
                l7: None,
                quic: false,
            }],
        }
    }
}

/// Returns whether to change the live table entry by entry instead of writing a new table: if only a few rows of new
/// identities are added, or if the table is large and the difference small. Both ways give each packet the old or the
/// new verdict (see [`plan`](crate::plan)), but only a new table changes all verdicts at once.
pub(super) fn small_step(old: &Table, new: &Table) -> bool {
    const LARGE: usize = 2048;
    let size = old.entries.len().max(new.entries.len());
    let known = |key: &TableKey| {
        palisade_abi::DIRECTIONS
            .iter()
            .any(|direction| old.row(*direction as u8, key.identity).next().is_some())
    };
    // A failsafe entry and those that decide inside the node must take effect together.
    let mut has_failsafe = false;
    let mut changed = 0usize;
    let mut only_new_identities = true;
    let mut note = |key: &TableKey, in_old: bool| {
        changed += 1;
        only_new_identities &= !in_old && changed < 64 && !known(key);
    };
    for (key, before, after) in differing(&old.entries, &new.entries) {
        let entries = [before, after].into_iter().flatten();
        has_failsafe |= key.direction & INSIDE != 0
            || entries
                .into_iter()
                .any(|entry| entry.flags & entry_flags::FAILSAFE != 0);
        note(key, before.is_some());
    }
    only_new_identities || (!has_failsafe && size >= LARGE && changed <= size / 8)
}

/// Returns a table in which `entries` replace the rows of the given identities and the row for any identity.
fn with_rows(old: &Table, identities: &BTreeSet<Identity>, entries: Vec<(TableKey, PolicyEntry)>) -> Table {
    let mut table = old.clone();
    for identity in identities.iter().chain([&identity::ANY]) {
        for direction in palisade_abi::DIRECTIONS.map(|direction| direction as u8) {
            let row = old
                .row(direction, *identity)
                .chain(old.row(direction | INSIDE, *identity));
            for (key, _) in row {
                table.entries.remove(key);
            }
        }
    }
    table.entries.extend(entries);
    table
}
