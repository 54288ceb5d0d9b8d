//! The tables of subjects: which rules apply to them, what of a table a change touches.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use palisade_abi::{
    Class, Direction, EndpointState, Identity, PolicyEntry, endpoint_flags, identity, protocol,
};
use palisade_model::{
    diagnostic::{Diagnostic, Severity},
    inventory::{Enforcement, NamedPorts},
    labels::Labels,
    rule::{Entity, L4Protocol, Location, Peer, PolicyKind, PortSpec, Ports, Selector, Spec},
    snapshot::{RuleInfo, RuleKey, Section, Snapshot, Table, TableKey, differing},
};

use super::{
    CompiledSpec, Compiler, MAX_ENDPOINT_EXPRESSIONS, Progress, SECTIONS, SpecKey, SubjectNames, UnitPeers,
    named_ports::Numbers, peers::PeerSlot, problem, section_rules, sections_of,
};
use crate::{
    classes::PortSet,
    conflict::ConflictFinder,
    select::ResolvedSelector,
    table::{Builder, DefaultVerdict, L7Policy, Learned, Member, Members, TablePorts, TableRule},
};

/// Endpoints that policies cannot tell apart.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    pub(super) labels: Labels,
    pub(super) named_ports: NamedPorts,
    pub(super) audit: bool,
    pub(super) node: bool,
    /// Endpoint ids with their identity.
    pub(super) endpoints: Vec<(u16, Identity)>,
    pub(super) specs: BTreeMap<SpecKey, AppliedSpec>,
    /// Specs that do not select it any more, since the table was made.
    pub(super) retired: Vec<AppliedSpec>,
    /// What the specs require of the endpoints that rules select, by section in the order of [`SECTIONS`].
    pub(super) required: [Selector; 4],
    /// For each direction what the table was made with.
    pub(super) default_verdict: [Option<DefaultVerdict>; 2],
    pub(super) names: SubjectNames,
    pub(super) policy: u32,
    pub(super) table: Arc<Table>,
    /// [`Table::plain`] of it.
    pub(super) plain: u32,
}

impl Subject {
    /// Takes down what the specs require now. Returns whether every rule has to be looked at again for it.
    fn renew_required(&mut self) -> bool {
        let required = SECTIONS.map(|section| Selector {
            requirements: self
                .specs
                .values()
                .flat_map(|selecting| section_rules(selecting.unit.spec(), section))
                .flat_map(|rule| &rule.requires)
                .flat_map(|selector| selector.requirements.iter().cloned())
                .collect(),
        });
        let changed = self.required != required;
        self.required = required;
        changed || self.requires_something()
    }

    /// Whether any spec has requirements.
    pub(super) fn requires_something(&self) -> bool {
        self.required
            .iter()
            .any(|selector| !selector.requirements.is_empty())
    }

    pub(super) fn selecting(&self) -> impl Iterator<Item = (&SpecKey, &AppliedSpec)> {
        self.specs.iter()
    }
}

/// A spec as it applies to a subject.
#[derive(Clone, Debug)]
pub(super) struct AppliedSpec {
    pub(super) unit: Arc<CompiledSpec>,
    /// Whether `rules` are still to be made from it (they are of before).
    pub(super) stale: bool,
    /// Whether only its peers mean others than when `rules` were made.
    pub(super) regrouped: bool,
    /// By direction.
    pub(super) rules: [Vec<TableRule>; 2],
    /// Port sets held in [`Classes`].
    pub(super) sets: Vec<PortSet>,
    /// By direction.
    pub(super) remarks: [Vec<Diagnostic>; 2],
}

/// What a port of a rule comes to.
#[derive(Default)]
struct Resolved {
    /// Towards every peer.
    sets: Vec<PortSet>,
    /// For names that peers number differently, by protocol.
    apart: Vec<NumberedDistinctPorts>,
}

/// What a name of a port comes to where peers number it differently.
struct NumberedDistinctPorts {
    /// Towards peers that have it, by their number.
    own: Vec<(PortSet, Arc<BTreeSet<Identity>>)>,
    /// Those peers.
    owners: Arc<BTreeSet<Identity>>,
    /// Towards all other peers.
    others: Vec<PortSet>,
}

/// The part of a rule about a name of a port that peers number differently, towards some of them.
struct DistinctPorts {
    members: Members,
    except: Option<Arc<BTreeSet<Identity>>>,
    ports: TablePorts,
}

impl NumberedDistinctPorts {
    fn sets(&self) -> impl Iterator<Item = PortSet> {
        self.own
            .iter()
            .map(|(set, _)| *set)
            .chain(self.others.iter().copied())
    }
}

/// The rows of a table that a change may touch.
pub(super) enum DirtyRows {
    Everything,
    Only(BTreeSet<Identity>),
}

impl DirtyRows {
    /// More rows than this are not worth picking out.
    const MANY: usize = 64;

    /// Verdicts change towards whom the rules mean.
    pub(super) fn add(&mut self, rules: &[Vec<TableRule>; 2]) {
        for rule in rules.iter().flatten() {
            match &rule.members {
                Members::Everybody => *self = Self::Everything,
                Members::Of(peers) => {
                    for peer in peers {
                        self.add_identities(peer.members.iter().copied());
                    }
                }
            }
        }
    }

    pub(super) fn add_identities(&mut self, more: impl ExactSizeIterator<Item = Identity>) {
        match self {
            Self::Only(identities) if identities.len() + more.len() <= Self::MANY => identities.extend(more),
            _ => *self = Self::Everything,
        }
    }
}

impl Compiler {
    /// Compiles the dirty subjects, and those whose port classes change with them, and makes the snapshot.
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
            Err(error) => errors.push(problem(Location::default(), error.to_string())),
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
                Ok(table) => {
                    let subject = &mut self.subjects[*at];
                    // Who begins to look at names (or ends) does so at once with the table made for that.
                    let learns = !subject.names.selectors.is_empty();
                    let anew = subject.policy == 0 || subject.names.learns != learns;
                    subject.names.learns = learns;
                    if anew || *subject.table != table {
                        if anew || !small_step(&subject.table, &table) {
                            subject.policy = self.next_policy;
                            self.next_policy = self.next_policy.wrapping_add(1).max(1);
                        }
                        subject.plain = table.plain();
                        subject.table = Arc::new(table);
                    }
                }
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

    /// The port sets of specs that are new to a subject are held, those of specs that are gone released.
    pub(super) fn hold_port_sets(&mut self, dirty: &BTreeSet<usize>) {
        for at in dirty {
            let subject = &self.subjects[*at];
            let new: Vec<(SpecKey, Vec<PortSet>)> = subject
                .selecting()
                .filter(|(_, selecting)| selecting.stale)
                .map(|(key, selecting)| (key.clone(), self.port_sets(&selecting.unit, &subject.named_ports)))
                .collect();
            let subject = &mut self.subjects[*at];
            for (key, sets) in new {
                self.classes.retain(&sets);
                if let Some(selecting) = subject.specs.get_mut(&key) {
                    self.classes
                        .release(&std::mem::replace(&mut selecting.sets, sets));
                }
            }
            for selecting in &mut subject.retired {
                self.classes.release(&std::mem::take(&mut selecting.sets));
            }
        }
    }

    /// Gives the rules their new classes where slots have changed.
    pub(super) fn follow_classes(
        &mut self,
        protocols: &[u8],
        dirty: &mut BTreeSet<usize>,
        touched: &mut BTreeMap<usize, DirtyRows>,
    ) {
        let mut known: HashMap<PortSet, Option<Arc<[Class]>>> = HashMap::new();
        for (at, subject) in self.subjects.iter_mut().enumerate() {
            for selecting in subject.specs.values_mut().filter(|selecting| !selecting.stale) {
                let concerned = selecting.sets.iter().any(|set| match set {
                    PortSet::All => false,
                    PortSet::Protocol(protocol) | PortSet::Range { protocol, .. } => {
                        protocols.contains(protocol)
                    }
                });
                if !concerned {
                    continue;
                }
                let mut changed = false;
                for ports in selecting
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
                        .add(&selecting.rules);
                }
            }
        }
    }

    /// Makes the snapshot from the compiled subjects.
    pub(super) fn finish(&mut self, before: Snapshot) {
        self.finish_names(&before);
        self.snapshot.classes = Arc::clone(self.classes.slots());
        self.snapshot.rules = Arc::clone(&self.rule_ids.infos);
        self.snapshot.rulesets = Arc::clone(&self.rulesets.sets);
        self.snapshot.tables = self
            .subjects
            .iter()
            .map(|subject| (subject.policy, Arc::clone(&subject.table)))
            .collect();
        // Who an address is has changed, so any flow may have to be judged anew.
        let moved = !Arc::ptr_eq(&before.addresses, &self.snapshot.addresses)
            || !Arc::ptr_eq(&before.prefixes, &self.snapshot.prefixes);
        // Two at a time: a plan may need one in between.
        let revision = before.revision.wrapping_add(2);
        let mut used = false;
        self.snapshot.endpoints = self
            .subjects
            .iter()
            .flat_map(|subject| {
                let policy = subject.policy;
                let flags = if subject.names.selectors.is_empty() {
                    subject.plain
                } else {
                    // Rows for learned identities join the live egress table under the same flags.
                    endpoint_flags::LEARNS | (subject.plain & !endpoint_flags::PLAIN_EGRESS)
                };
                subject
                    .endpoints
                    .iter()
                    .map(move |(id, identity)| (*id, policy, *identity, flags))
            })
            .map(|(id, policy, identity, flags)| {
                let known = before.endpoints.get(&id);
                let same_table = || match (before.tables.get(&policy), self.snapshot.tables.get(&policy)) {
                    (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                    _ => false,
                };
                let keep = known.filter(|state| {
                    !moved
                        && state.policy == policy
                        && state.identity == identity
                        && state.flags == flags
                        && same_table()
                });
                let revision = keep.map_or_else(
                    || {
                        used = true;
                        revision
                    },
                    |state| state.revision,
                );
                let state = EndpointState {
                    policy,
                    revision,
                    identity,
                    flags,
                };
                (id, state)
            })
            .collect();
        if used {
            self.snapshot.revision = revision;
        }
        let mut remarks: Vec<Diagnostic> = self
            .subjects
            .iter()
            .flat_map(|subject| subject.specs.values())
            .flat_map(|selecting| selecting.remarks.iter().flatten().cloned())
            .collect();
        remarks.extend(self.unselected_nodes());
        remarks.sort_by(|a, b| (&a.location, &a.message).cmp(&(&b.location, &b.message)));
        remarks.dedup();
        self.snapshot.diagnostics = remarks;
    }

    /// Remarks about specs for nodes that do not select this one. On a node that has other labels this is as it should be;
    /// but a label's value that differs a little leaves the node without its policy, and nothing else says so.
    fn unselected_nodes(&self) -> Vec<Diagnostic> {
        let Some(node) = self
            .inventory
            .endpoints
            .iter()
            .find(|endpoint| endpoint.is_node())
        else {
            return Vec::new();
        };
        let units = self.specs.values().filter(|unit| {
            unit.subjects.is_empty() && matches!(unit.spec().subject, palisade_model::rule::Subject::Node(_))
        });
        units
            .map(|unit| Diagnostic {
                severity: Severity::Warning,
                location: unit.spec().location.clone(),
                message: format!(
                    "policy {}: nodeSelector does not select this node, which has the labels {}",
                    unit.policy().qualified_name(),
                    node.labels
                ),
            })
            .collect()
    }

    /// The port sets that the rules of a spec use.
    pub(super) fn port_sets(&self, unit: &CompiledSpec, own: &NamedPorts) -> Vec<PortSet> {
        let mut sets: HashSet<PortSet> = HashSet::new();
        for section in SECTIONS {
            for rule in section_rules(unit.spec(), section) {
                let Ports::OneOf(entries) = &rule.ports else {
                    continue;
                };
                for spec in entries.iter().flat_map(|entry| &entry.ports) {
                    let resolved = self.resolve(spec, section, unit.policy().kind, own);
                    let apart = resolved.apart.iter().flat_map(NumberedDistinctPorts::sets);
                    sets.extend(resolved.sets.iter().copied().chain(apart));
                }
            }
        }
        sets.into_iter().collect()
    }

    /// A port of a rule with its name looked up: for ingress among the subject's own, for egress among those of the
    /// peers.
    ///
    /// Bare rules of case files are those of the original: there an allow by a name that peers number differently means
    /// nothing.
    fn resolve(&self, spec: &PortSpec, section: Section, kind: PolicyKind, own: &NamedPorts) -> Resolved {
        let protocols = |wanted: L4Protocol| -> Vec<u8> {
            match wanted {
                L4Protocol::Any => vec![protocol::TCP, protocol::UDP, protocol::SCTP],
                L4Protocol::Tcp => vec![protocol::TCP],
                L4Protocol::Udp => vec![protocol::UDP],
                L4Protocol::Sctp => vec![protocol::SCTP],
                L4Protocol::Other(number) => vec![number],
            }
        };
        let range = |protocol: u8, first: u16, last: u16| {
            let with_ports = matches!(protocol, protocol::TCP | protocol::UDP | protocol::SCTP);
            if (first == 0 && last == u16::MAX) || !with_ports {
                PortSet::Protocol(protocol)
            } else {
                PortSet::Range {
                    protocol,
                    first,
                    last,
                }
            }
        };
        let sets = match spec {
            PortSpec::Range {
                protocol,
                first,
                last,
            } => protocols(*protocol)
                .into_iter()
                .map(|protocol| range(protocol, *first, *last))
                .collect(),
            PortSpec::Icmp { v6, kind } => vec![PortSet::Range {
                protocol: if *v6 { protocol::ICMPV6 } else { protocol::ICMP },
                first: u16::from(*kind),
                last: u16::from(*kind),
            }],
            PortSpec::Named { protocol, name, last } if section.direction() == Direction::Ingress => {
                let port = own.get(name).filter(|port| port.port != 0);
                protocols(*protocol)
                    .into_iter()
                    .filter_map(|protocol| {
                        let port = port.filter(|port| port.protocol == 0 || port.protocol == protocol)?;
                        Some(range(protocol, port.port, port.port.max(*last)))
                    })
                    .collect()
            }
            PortSpec::Named { protocol, name, last } => {
                let mut resolved = Resolved::default();
                for protocol in protocols(*protocol) {
                    let set = |port: u16| range(protocol, port, port.max(*last));
                    match self.named_ports.numbers(name, protocol) {
                        Numbers::Unknown => {}
                        Numbers::Agreed(port) => resolved.sets.push(set(port)),
                        Numbers::Own { .. } if kind == PolicyKind::Raw && !section.denies() => {}
                        Numbers::Own {
                            by_number,
                            several,
                            owners,
                        } => {
                            let mut own: Vec<_> = by_number
                                .into_iter()
                                .map(|(port, owners)| (set(port), owners))
                                .collect();
                            // Of peers that cannot be told apart an allow must not open a number that one of them
                            // does not mean. A denial may not leave out a number: it takes all that come into question.
                            let mut others = Vec::new();
                            if section.denies() {
                                own.extend(several.into_iter().map(|(port, owners)| (set(port), owners)));
                                others = own.iter().map(|(set, _)| *set).collect();
                                others.sort_unstable();
                                others.dedup();
                            }
                            resolved.apart.push(NumberedDistinctPorts { own, owners, others });
                        }
                    }
                }
                return resolved;
            }
        };
        Resolved {
            sets,
            apart: Vec::new(),
        }
    }

    /// The table of a subject. Of a table that is there, only the rows that a change touches are made anew.
    pub(super) fn compile_subject(
        &mut self,
        at: usize,
        mut touched: DirtyRows,
        moved: &BTreeSet<Identity>,
    ) -> Result<Table, Vec<Diagnostic>> {
        // A requirement of one spec is one of all of them. Few have any, so all is made anew where one has.
        let subject = &mut self.subjects[at];
        if subject.renew_required() {
            for selecting in subject.specs.values_mut() {
                selecting.stale = true;
            }
            touched = DirtyRows::Everything;
        }
        if let Some(error) = self.too_many_expressions(at) {
            self.subjects[at].default_verdict = [None, None];
            return Err(vec![error]);
        }
        // Specs that are new, or whose peers mean others now: towards whom they meant and whom they mean.
        let subject = &self.subjects[at];
        let mut made = Vec::new();
        let mut classes = HashMap::new();
        let remade = subject
            .selecting()
            .filter(|(_, selecting)| selecting.stale || selecting.regrouped);
        for (key, selecting) in remade {
            let mut remarks: [Vec<Diagnostic>; 2] = Default::default();
            let rules = palisade_abi::DIRECTIONS.map(|direction| {
                let remarks = &mut remarks[direction as usize];
                self.table_rules(subject, key, selecting, direction, &mut classes, remarks)
            });
            if selecting.stale {
                touched.add(&rules);
                touched.add(&selecting.rules);
            } else {
                touched.add_identities(moved.iter().copied());
            }
            made.push((key.clone(), rules, remarks));
        }
        let subject = &mut self.subjects[at];
        for (key, rules, remarks) in made {
            if let Some(selecting) = subject.specs.get_mut(&key) {
                selecting.stale = false;
                selecting.regrouped = false;
                selecting.rules = rules;
                selecting.remarks = remarks;
            }
        }
        for selecting in subject.retired.drain(..) {
            touched.add(&selecting.rules);
        }

        // Where nothing is enforced nothing is read either.
        let enforced = self.inventory.options.enforcement != Enforcement::Never;
        if enforced && subject.specs.values().any(|selecting| selecting.unit.reads) {
            let mut errors = Vec::new();
            for direction in palisade_abi::DIRECTIONS {
                let mut finder = ConflictFinder::default();
                for (key, selecting) in self.subjects[at].selecting() {
                    finder.add(&key.policy, selecting.unit.spec(), direction);
                }
                if let Err(mut conflicts) = finder.finish() {
                    errors.append(&mut conflicts);
                }
            }
            if !errors.is_empty() {
                // The next table is made from the ground up.
                self.subjects[at].default_verdict = [None, None];
                return Err(errors);
            }
        }

        let default_verdict = palisade_abi::DIRECTIONS.map(|direction| self.default_verdict(at, direction));
        let subject = &self.subjects[at];
        if subject.default_verdict != default_verdict.map(Some) {
            touched = DirtyRows::Everything;
        }
        let rows = match &touched {
            DirtyRows::Everything => None,
            DirtyRows::Only(identities) => Some(identities),
        };
        let mut entries = Vec::new();
        for direction in palisade_abi::DIRECTIONS {
            self.build(
                at,
                direction,
                default_verdict[direction as usize],
                rows,
                &mut entries,
            );
        }
        let subject = &self.subjects[at];
        let table = match rows {
            None => {
                entries.sort_unstable_by_key(|(key, _)| *key);
                Table {
                    entries: entries.into_iter().collect(),
                }
            }
            Some(identities) => {
                let mut table = (*subject.table).clone();
                for identity in identities.iter().chain([&identity::ANY]) {
                    for direction in palisade_abi::DIRECTIONS {
                        let old: Vec<TableKey> = table
                            .row(direction as u8, *identity)
                            .map(|(key, _)| *key)
                            .collect();
                        for key in old {
                            table.entries.remove(&key);
                        }
                    }
                }
                table.entries.extend(entries);
                table
            }
        };
        self.subjects[at].default_verdict = default_verdict.map(Some);
        Ok(table)
    }

    /// The error about expressions that cost too much together, at a spec that is new to the subject if one is.
    fn too_many_expressions(&self, at: usize) -> Option<Diagnostic> {
        let subject = &self.subjects[at];
        let units = || {
            subject
                .selecting()
                .filter(|(_, selecting)| selecting.unit.expressions > 0)
        };
        let sum = units().fold(0usize, |sum, (_, selecting)| {
            sum.saturating_add(selecting.unit.expressions)
        });
        if sum <= MAX_ENDPOINT_EXPRESSIONS {
            return None;
        }
        let (key, selecting) =
            units().max_by_key(|(_, selecting)| (selecting.stale, selecting.unit.expressions))?;
        let endpoint = subject.endpoints.first().map(|(id, _)| *id);
        let endpoint = self
            .inventory
            .endpoints
            .iter()
            .find(|known| Some(known.id) == endpoint);
        Some(problem(
            selecting.unit.spec().location.clone(),
            format!(
                "policy {}: the regular expressions of the policies that select endpoint {} are too large together: they \
                 need about {sum} states, of at most {MAX_ENDPOINT_EXPRESSIONS}",
                key.policy,
                endpoint.map_or("", |endpoint| endpoint.name.as_str()),
            ),
        ))
    }

    /// The entries of one direction: all of them, or those of some rows and those towards everybody.
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
                    .flat_map(|selecting| &selecting.rules[direction as usize]),
            );
        }
        rules.extend(&localhost);
        Builder {
            direction,
            rules: &rules,
            rows,
            learned: egress.then_some(&subject.names.rows),
            default_verdict,
            audit: options.audit || subject.audit,
            rulesets: &mut self.rulesets,
        }
        .build(entries);
    }

    /// The rule by which the node may always reach its workloads.
    fn localhost(&mut self) -> TableRule {
        TableRule {
            id: self.rule_ids.number("", plain(RuleKey::LocalhostAlways)),
            denies: false,
            audit: false,
            auth_required: false,
            members: Members::Of(vec![Member {
                peer: u32::MAX,
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
            }],
        }
    }

    /// The rules of one spec and direction, in their order, with everything looked up.
    pub(super) fn table_rules(
        &self,
        subject: &Subject,
        key: &SpecKey,
        selecting: &AppliedSpec,
        direction: Direction,
        classes: &mut HashMap<PortSet, Option<Arc<[Class]>>>,
        remarks: &mut Vec<Diagnostic>,
    ) -> Vec<TableRule> {
        let unit = &selecting.unit;
        let spec = unit.spec();
        let mut rules = Vec::new();
        for section in sections_of(direction) {
            let looked_up = &unit.sections[section as usize];
            for (rule, looked_up) in section_rules(spec, section).iter().zip(looked_up) {
                if rule.auth_required && !section.denies() {
                    remarks.push(Diagnostic {
                        severity: Severity::Warning,
                        location: rule.location.clone(),
                        message: "authentication is required, and nobody can authenticate yet: \
                                  what this rule allows is dropped (189)"
                            .into(),
                    });
                }
                let members = match &looked_up.peers {
                    UnitPeers::Nobody => continue,
                    UnitPeers::Everybody => Members::Everybody,
                    UnitPeers::OneOf(peers) => {
                        let slots = peers
                            .iter()
                            .filter_map(|number| Some((*number, self.peers.slot(*number)?)));
                        let mut members = Vec::with_capacity(peers.len());
                        let mut everybody = false;
                        let required = &subject.required[section as usize];
                        for (number, slot) in slots {
                            if let Peer::Labels(selector) = &slot.peer
                                && !required.requirements.is_empty()
                            {
                                let mut narrowed = selector.clone();
                                narrowed
                                    .requirements
                                    .extend(required.requirements.iter().cloned());
                                let resolved = ResolvedSelector::of(&Peer::Labels(narrowed), &[]);
                                members.push(Member {
                                    peer: number,
                                    members: Arc::new(self.identity_index.select(&resolved)),
                                    learned: Learned::Labels(Arc::new(resolved)),
                                });
                                continue;
                            }
                            everybody |= matches!(*slot.resolved, ResolvedSelector::Everybody);
                            remarks.extend(self.missing_group(slot, &rule.location));
                            let selector = match &*slot.resolved {
                                ResolvedSelector::Fqdn(text) => self.names.selector_of(text),
                                _ => None,
                            };
                            let learned = match (&*slot.resolved, selector) {
                                (_, Some(selector)) => Learned::Selector(selector),
                                (ResolvedSelector::Labels(_) | ResolvedSelector::Nodes(_), _) => {
                                    Learned::Labels(Arc::clone(&slot.resolved))
                                }
                                _ => Learned::Base,
                            };
                            members.push(Member {
                                peer: number,
                                members: Arc::clone(&slot.members),
                                learned,
                            });
                        }
                        if everybody {
                            Members::Everybody
                        } else {
                            Members::Of(members)
                        }
                    }
                };
                // Rules of their own for names that peers number differently.
                let mut apart: Vec<DistinctPorts> = Vec::new();
                let mut ports = Vec::new();
                match &rule.ports {
                    Ports::Any => ports.push(TablePorts {
                        set: PortSet::All,
                        classes: None,
                        l7: None,
                    }),
                    Ports::OneOf(list) => {
                        for entry in list {
                            let l7 = L7Policy::of(&entry.l7).map(Arc::new);
                            for port in &entry.ports {
                                let resolved =
                                    self.resolve(port, section, unit.policy().kind, &subject.named_ports);
                                let mut made = |set: PortSet| TablePorts {
                                    set,
                                    classes: classes
                                        .entry(set)
                                        .or_insert_with(|| self.classes.of(set))
                                        .clone(),
                                    l7: l7.clone(),
                                };
                                let mut has_effect = !resolved.sets.is_empty();
                                ports.extend(resolved.sets.iter().map(|set| made(*set)));
                                for name in &resolved.apart {
                                    for (set, owners) in &name.own {
                                        let members = members.among(owners);
                                        if !matches!(&members, Members::Of(peers) if peers.is_empty()) {
                                            has_effect = true;
                                            apart.push(DistinctPorts {
                                                members,
                                                except: None,
                                                ports: made(*set),
                                            });
                                        }
                                    }
                                    for set in &name.others {
                                        has_effect = true;
                                        let except = matches!(members, Members::Everybody)
                                            .then(|| Arc::clone(&name.owners));
                                        apart.push(DistinctPorts {
                                            members: members.without(&name.owners),
                                            except,
                                            ports: made(*set),
                                        });
                                    }
                                }
                                if !has_effect && let PortSpec::Named { name, .. } = port {
                                    remarks.push(self.unresolved(
                                        name,
                                        direction,
                                        key,
                                        &entry.location,
                                        subject,
                                    ));
                                }
                            }
                        }
                    }
                }
                rules.push(TableRule {
                    id: looked_up.id,
                    denies: section.denies(),
                    audit: unit.audit,
                    auth_required: rule.auth_required,
                    members,
                    except: None,
                    ports,
                });
                rules.extend(apart.into_iter().map(
                    |DistinctPorts {
                         members,
                         except,
                         ports,
                     }| TableRule {
                        id: looked_up.id,
                        denies: section.denies(),
                        audit: unit.audit,
                        auth_required: rule.auth_required,
                        members,
                        except,
                        ports: vec![ports],
                    },
                ));
            }
        }
        rules
    }

    /// A remark about a group of prefixes by name that does not exist, or is empty.
    pub(super) fn missing_group(&self, slot: &PeerSlot, location: &Location) -> Option<Diagnostic> {
        match (&slot.peer, &*slot.resolved) {
            (Peer::CidrGroup { name, .. }, ResolvedSelector::Cidrs(rules)) if rules.is_empty() => {
                Some(Diagnostic {
                    severity: Severity::Warning,
                    location: location.clone(),
                    message: format!(
                        "there is no CiliumCIDRGroup {name} with prefixes; the reference means nobody"
                    ),
                })
            }
            _ => None,
        }
    }

    pub(super) fn unresolved(
        &self,
        name: &str,
        direction: Direction,
        key: &SpecKey,
        location: &Location,
        subject: &Subject,
    ) -> Diagnostic {
        let whom = match direction {
            Direction::Ingress => {
                let endpoint = subject.endpoints.first().map(|(id, _)| *id);
                let endpoint = self.inventory.endpoints.iter().find(|e| Some(e.id) == endpoint);
                let endpoint = endpoint.map_or("", |endpoint| endpoint.name.as_str());
                format!("endpoint {endpoint} has no port of that name and protocol")
            }
            Direction::Egress if self.named_ports.knows(name) => {
                "endpoints number it differently and no peer of this rule has a port of that name, or they have it for \
                 another protocol"
                    .into()
            }
            Direction::Egress => "no endpoint has a port of that name".into(),
        };
        Diagnostic {
            severity: Severity::Warning,
            location: location.clone(),
            message: format!("policy {}: port {name:?} has no effect: {whom}", key.policy),
        }
    }

    /// What holds for a direction of a subject where no rule matches.
    pub(super) fn default_verdict(&mut self, at: usize, direction: Direction) -> DefaultVerdict {
        let number = direction as u8;
        let subject = &self.subjects[at];
        let mut any_rules: Option<&SpecKey> = None;
        let mut denying: Vec<(&SpecKey, bool)> = Vec::new();
        for (key, AppliedSpec { unit, .. }) in subject.selecting() {
            let Some(denies) = unit.denies[direction as usize] else {
                continue;
            };
            any_rules.get_or_insert(key);
            if denies {
                denying.push((key, unit.audit));
            }
        }
        let enforcement = self.inventory.options.enforcement;
        let init = subject.labels.has_reserved("init");
        let not_enforced = enforcement == Enforcement::Never
            || (enforcement == Enforcement::Default && !init && any_rules.is_none());
        let strict = enforcement == Enforcement::Always || init;
        let audit = !strict && denying.iter().all(|(_, audit)| *audit);
        // Who really denies is named first: policies in audit mode only if all are.
        denying.retain(|(_, in_audit)| audit || !*in_audit);
        let mut policies: Vec<&SpecKey> = denying.into_iter().map(|(key, _)| key).collect();
        policies.dedup_by(|a, b| (&a.policy, a.kind, &a.file) == (&b.policy, b.kind, &b.file));

        let mut location = None;
        let mut file = Arc::<str>::from("");
        let (allow, key) = if not_enforced {
            (true, RuleKey::NotEnforced { direction: number })
        } else if let Some(first) = policies.first() {
            location = self.specs.get(*first).map(|unit| unit.policy().location.clone());
            file = Arc::clone(&first.file);
            let key = RuleKey::DefaultDeny {
                direction: number,
                policy: Arc::clone(&first.policy),
                others: (policies.len() - 1) as u32,
            };
            (false, key)
        } else if init {
            (false, RuleKey::InitEndpoint { direction: number })
        } else if enforcement == Enforcement::Always {
            (false, RuleKey::AlwaysEnforced { direction: number })
        } else {
            let first = any_rules.map_or_else(|| Arc::from(""), |key| Arc::clone(&key.policy));
            location = any_rules
                .and_then(|key| self.specs.get(key))
                .map(|unit| unit.policy().location.clone());
            file = any_rules.map_or_else(|| Arc::from(""), |key| Arc::clone(&key.file));
            let key = RuleKey::DefaultAllow {
                direction: number,
                policy: first,
            };
            (true, key)
        };
        let rule = self.rule_ids.number(
            &file,
            RuleInfo {
                location,
                ..plain(key)
            },
        );
        DefaultVerdict {
            allow,
            unenforced: not_enforced,
            rule,
            audit: !allow && audit,
        }
    }
}

/// Whether the difference is better written into the live table, entry by entry, than as a table of its own: it
/// is small, and the table is large. Each packet finds one verdict, the old or the new one, either way (see
/// `plan`); a table of its own makes them change all at once.
pub(super) fn small_step(old: &Table, new: &Table) -> bool {
    const LARGE: usize = 2048;
    let size = old.entries.len().max(new.entries.len());
    let known = |key: &TableKey| {
        palisade_abi::DIRECTIONS
            .iter()
            .any(|direction| old.row(*direction as u8, key.identity).next().is_some())
    };
    let mut changed = 0usize;
    let mut only_new_identities = true;
    let mut note = |key: &TableKey, in_old: bool| {
        changed += 1;
        only_new_identities &= !in_old && changed < 64 && !known(key);
    };
    for (key, before, _) in differing(&old.entries, &new.entries) {
        note(key, before.is_some());
    }
    only_new_identities || (size >= LARGE && changed <= size / 8)
}

/// Whether a spec denies by default in a direction; none if it has no rules for it.
pub(super) fn default_deny(spec: &Spec, direction: Direction) -> Option<bool> {
    let rules = sections_of(direction).map(|section| section_rules(spec, section).len());
    let denies = match direction {
        Direction::Ingress => spec.default_deny_ingress,
        Direction::Egress => spec.default_deny_egress,
    };
    (rules != [0, 0]).then_some(denies.unwrap_or(true))
}

pub(super) fn plain(key: RuleKey) -> RuleInfo {
    RuleInfo {
        id: 0,
        key,
        location: None,
        description: String::new(),
    }
}
