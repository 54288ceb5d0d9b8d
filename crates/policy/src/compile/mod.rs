//! Policies and a world to what the maps hold; a change recompiles only what it touches.
//!
//! What is kept between changes: for each peer of a rule the identities it means; for each subject (a set of
//! labels that an endpoint has, with its named ports) the specs that select it and its table. A changed file
//! costs its own specs, the subjects they select, and a look at the peers if a prefix appears or goes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use ipnet::IpNet;
use palisade_abi::{Direction, Identity};
use palisade_model::{
    diagnostic::{Diagnostic, Severity},
    inventory::{Enforcement, Inventory},
    labels::Labels,
    learned_identities::SelectorNumber,
    rule::{
        CidrGroup, L7Rules, Location, Peer, Peers, Policy, PolicyKind, Ports, Rule, Selector, Spec,
        Subject as SpecSubject,
    },
    snapshot::{RuleInfo, RuleKey, RulePlace, Section, Snapshot},
};
use palisade_protocols::http1::re2;
use serde::{Deserialize, Serialize};

use crate::{
    classes::Classes,
    identity::{Allocator, AllocatorState},
    select::{IdentityIndex, ResolvedSelector},
    table::Members,
};

mod addresses;
mod learned;
mod named_ports;
mod numbers;
mod peers;
mod resources;
mod subject;

pub use crate::conflict::conflicts;
use addresses::NamedPrefixes;
pub use addresses::prefix_key;
pub use learned::LearnedUpdate;
pub(crate) use learned::{LearnedIdentity, LearnedRows};
use learned::{LearnedNames, SubjectNames};
use named_ports::NamedPortOwners;
use numbers::{RuleIds, RuleSetIds};
use peers::PeerCache;
pub use resources::{ResourceName, already_there};
use subject::{AppliedSpec, Subject, default_deny};

/// What is in one policy file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FileContent {
    /// Its policies, in their order.
    pub policies: Vec<Policy>,
    /// Its groups of prefixes.
    pub cidr_groups: Vec<CidrGroup>,
}

/// What has changed since the last [`Compiler::update`].
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// The world as it is now, if it has changed.
    pub inventory: Option<Inventory>,
    /// Files as they are now, by name; `None`: the file is gone.
    pub files: BTreeMap<String, Option<FileContent>>,
}

/// What has to be kept over a restart, so that numbers mean the same afterwards.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CompilerState {
    /// Identity numbers.
    pub identities: AllocatorState,
    /// Rule ids by what they stand for.
    pub rules: BTreeMap<String, u32>,
    /// Policy ids below this one have been used.
    pub next_policy: u32,
    /// The last revision that has been used.
    pub revision: u32,
}

/// Turns policies and a world into [`Snapshot`]s.
#[derive(Clone, Debug, Default)]
pub struct Compiler {
    inventory: Inventory,
    files: BTreeMap<String, Arc<FileContent>>,
    /// In which file each resource is, and where.
    owners: HashMap<ResourceName, (Arc<str>, Location)>,
    identities: Allocator,
    rule_ids: RuleIds,
    rulesets: RuleSetIds,
    classes: Classes,
    identity_index: IdentityIndex,
    /// Prefixes that policies mention, and how often.
    prefixes: BTreeMap<IpNet, u32>,
    peers: PeerCache,
    /// Prefixes and addresses that the world names.
    named: NamedPrefixes,
    specs: BTreeMap<SpecKey, Arc<CompiledSpec>>,
    names: LearnedNames,
    subjects: Vec<Subject>,
    /// Ports by name over all endpoints and peers, with the identities of those that have them.
    named_ports: NamedPortOwners,
    next_policy: u32,
    /// What regular expressions cost that have been asked for.
    expressions: HashMap<String, usize>,
    snapshot: Snapshot,
}

/// What the regular expressions of all policies that select an endpoint may cost together, in states: they are matched
/// as one automaton, with which an endpoint could take memory and time from all others.
const MAX_ENDPOINT_EXPRESSIONS: usize = 1_000_000;
/// Of more expressions than these it is forgotten what they cost.
const REMEMBERED_EXPRESSIONS: usize = 1 << 16;

/// Where a spec stands; also the order in which rules are considered.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct SpecKey {
    policy: Arc<str>,
    kind: PolicyKind,
    file: Arc<str>,
    /// Of the policy in the file, and of the spec in the policy.
    position: (u32, u32),
}

/// A spec with its peers looked up.
#[derive(Clone, Debug)]
struct CompiledSpec {
    content: Arc<FileContent>,
    /// Which policy of the file.
    policy: usize,
    spec: usize,
    /// By section in the order of [`SECTIONS`].
    sections: [Vec<UnitRule>; 4],
    /// The `toFQDNs` selectors of its egress rules.
    selectors: Vec<SelectorNumber>,
    /// Whether a rule asks for traffic to be read.
    reads: bool,
    /// What the regular expressions of its http rules cost together, in states.
    expressions: usize,
    /// The policy is in audit mode.
    audit: bool,
    /// By direction: whether it denies by default; none without rules.
    denies: [Option<bool>; 2],
    subjects: Vec<usize>,
}

impl CompiledSpec {
    fn policy(&self) -> &Policy {
        &self.content.policies[self.policy]
    }

    fn spec(&self) -> &Spec {
        &self.policy().specs[self.spec]
    }
}

#[derive(Clone, Debug)]
struct UnitRule {
    id: u32,
    peers: UnitPeers,
}

#[derive(Clone, Debug)]
enum UnitPeers {
    Everybody,
    Nobody,
    OneOf(Vec<u32>),
}

/// The sections in the order of [`CompiledSpec::sections`].
const SECTIONS: [Section; 4] = [
    Section::Ingress,
    Section::IngressDeny,
    Section::Egress,
    Section::EgressDeny,
];

pub(crate) fn section_rules(spec: &Spec, section: Section) -> &[Rule] {
    match section {
        Section::Ingress => &spec.ingress,
        Section::IngressDeny => &spec.ingress_deny,
        Section::Egress => &spec.egress,
        Section::EgressDeny => &spec.egress_deny,
    }
    .as_deref()
    .unwrap_or_default()
}

/// The sections of a direction: what allows, what denies.
pub(crate) const fn sections_of(direction: Direction) -> [Section; 2] {
    match direction {
        Direction::Ingress => [Section::Ingress, Section::IngressDeny],
        Direction::Egress => [Section::Egress, Section::EgressDeny],
    }
}

/// [`Changes`], with the contents shared.
struct SharedChanges {
    inventory: Option<Inventory>,
    files: BTreeMap<String, Option<Arc<FileContent>>>,
}

/// What went on during one update.
#[derive(Default)]
struct Progress {
    /// Subjects to compile again.
    dirty: BTreeSet<usize>,
    /// Identities that came or went.
    moved: BTreeSet<Identity>,
    /// Prefixes that policies mention and did not before (or the other way round).
    prefixes: BTreeMap<IpNet, i8>,
}

impl Progress {
    fn prefix(&mut self, prefix: IpNet, step: i8) {
        let sum = self.prefixes.entry(prefix).or_insert(0);
        *sum += step;
        if *sum == 0 {
            self.prefixes.remove(&prefix);
        }
    }
}

impl Compiler {
    /// A compiler without policies or a world.
    #[must_use]
    pub fn new(state: &CompilerState) -> Self {
        Self {
            identities: Allocator::from_state(&state.identities),
            rule_ids: RuleIds {
                numbers: state.rules.iter().map(|(key, id)| (key.clone(), *id)).collect(),
                last: state.rules.values().copied().max().unwrap_or(0),
                ..RuleIds::default()
            },
            next_policy: state.next_policy.max(1),
            snapshot: Snapshot {
                revision: state.revision,
                ..Snapshot::default()
            },
            ..Self::default()
        }
    }

    /// What has to be kept for [`Self::new`].
    #[must_use]
    pub fn state(&self) -> CompilerState {
        CompilerState {
            identities: self.identities.state(),
            rules: self
                .rule_ids
                .numbers
                .iter()
                .map(|(key, id)| (key.clone(), *id))
                .collect(),
            next_policy: self.next_policy,
            revision: self.snapshot.revision,
        }
    }

    /// Keeps away from the policy ids and revisions that are in the kernel already (after a restart).
    pub fn avoid(&mut self, found: &Snapshot) {
        let policies = found.tables.keys().copied();
        let in_use = found.endpoints.values().map(|state| state.policy);
        self.next_policy = policies
            .chain(in_use)
            .max()
            .map_or(self.next_policy, |last| {
                self.next_policy.max(last.wrapping_add(1))
            })
            .max(1);
        let in_tables = found
            .tables
            .values()
            .flat_map(|table| table.entries.keys().map(|key| key.identity));
        let learned = found.learned.entries.values().copied();
        self.identities.avoid(in_tables.chain(learned));
        let revisions = found.endpoints.values().map(|state| state.revision);
        self.snapshot.revision = revisions.max().unwrap_or(0).max(self.snapshot.revision);
    }

    /// Has the connections of endpoints judged again: the next plan raises their revisions.
    pub fn judge_again(&mut self, endpoints: impl IntoIterator<Item = u16>) {
        // Two at a time: a plan may need one in between.
        let revision = self.snapshot.revision.wrapping_add(2);
        for endpoint in endpoints {
            if let Some(state) = self.snapshot.endpoints.get_mut(&endpoint) {
                state.revision = revision;
                self.snapshot.revision = revision;
            }
        }
    }

    /// The result of the last update.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The world of the last update.
    #[must_use]
    pub fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// The policies in use, file by file.
    pub fn files(&self) -> impl Iterator<Item = (&str, &FileContent)> {
        self.files
            .iter()
            .map(|(name, content)| (name.as_str(), &**content))
    }

    /// For each distinct peer of the policies: how it is written, how many rules use it, whom it means. A name means
    /// the identities of the addresses that have been learned by it.
    pub fn selectors(&self) -> impl Iterator<Item = (&Peer, u32, BTreeSet<Identity>)> {
        self.peers.slots.iter().flatten().map(|slot| {
            let mut members = (*slot.members).clone();
            if let ResolvedSelector::Fqdn(text) = &*slot.resolved
                && let Some(selector) = self.names.selector_of(text)
            {
                let learned = self.names.identities().iter();
                members.extend(
                    learned
                        .filter(|(_, identity)| identity.selectors.binary_search(&selector).is_ok())
                        .map(|(number, _)| *number),
                );
            }
            (&slot.peer, slot.users, members)
        })
    }

    /// The policies that select an endpoint, with whether they have rules for ingress and egress.
    #[must_use]
    pub fn policies_of(&self, endpoint: u16) -> Vec<&Policy> {
        let subject = self
            .subjects
            .iter()
            .find(|subject| subject.endpoints.iter().any(|(id, _)| *id == endpoint));
        let Some(subject) = subject else {
            return Vec::new();
        };
        let mut policies: Vec<&Policy> = Vec::new();
        for (_, selecting) in subject.selecting() {
            let policy = selecting.unit.policy();
            if policies.last().is_none_or(|last| !std::ptr::eq(*last, policy)) {
                policies.push(policy);
            }
        }
        policies
    }

    /// What there is to say about the policies that select an endpoint, for one direction: names of ports without
    /// effect, groups that do not exist.
    pub fn remarks_of(&self, endpoint: u16, direction: Direction) -> impl Iterator<Item = &Diagnostic> {
        self.subjects
            .iter()
            .filter(move |subject| subject.endpoints.iter().any(|(id, _)| *id == endpoint))
            .flat_map(Subject::selecting)
            .flat_map(move |(_, selecting)| &selecting.remarks[direction as usize])
    }

    /// The rules that match a packet of an endpoint, whatever they come to together, each with what it says by itself.
    #[must_use]
    pub fn matching_rules(
        &self,
        endpoint: u16,
        direction: Direction,
        other: Identity,
        protocol: u8,
        port: u16,
    ) -> Vec<(u32, String)> {
        let subject = self
            .subjects
            .iter()
            .position(|subject| subject.endpoints.iter().any(|(id, _)| *id == endpoint));
        let Some(at) = subject.filter(|_| self.inventory.options.enforcement != Enforcement::Never) else {
            return Vec::new();
        };
        let learned = self.names.identities().get(&other);
        let mut found = Vec::new();
        for rule in self.subjects[at]
            .selecting()
            .flat_map(|(_, selecting)| &selecting.rules[direction as usize])
        {
            let named = match &rule.members {
                Members::Everybody => !rule.excepts(other),
                Members::Of(peers) => match &learned {
                    Some(identity) => peers.iter().any(|peer| peer.means(identity)),
                    None => peers.iter().any(|peer| peer.members.contains(&other)),
                },
            };
            let ports = rule
                .ports
                .iter()
                .filter(|ports| ports.set.contains(protocol, Some(port)));
            for ports in ports.filter(|_| named) {
                let effect = match &ports.l7 {
                    _ if rule.denies => "deny".to_owned(),
                    _ if rule.auth_required => "authenticate".to_owned(),
                    Some(l7) => {
                        format!(
                            "inspect {}",
                            palisade_model::snapshot::inspector_name(l7.kind as u8)
                        )
                    }
                    None => "allow".to_owned(),
                };
                if !found.contains(&(rule.id, effect.clone())) {
                    found.push((rule.id, effect));
                }
            }
        }
        found
    }

    /// Takes the changes in. On errors (each with its place) everything stays as it was.
    pub fn update(&mut self, changes: Changes) -> Result<&Snapshot, Vec<Diagnostic>> {
        let intake = SharedChanges {
            inventory: changes.inventory,
            files: changes
                .files
                .into_iter()
                .map(|(name, content)| (name, content.map(Arc::new)))
                .collect(),
        };
        let twice = self.resources_in_two_files(&intake.files);
        if !twice.is_empty() {
            return Err(twice);
        }
        let undo = SharedChanges {
            inventory: intake.inventory.as_ref().map(|_| self.inventory.clone()),
            files: intake
                .files
                .keys()
                .map(|name| (name.clone(), self.files.get(name).cloned()))
                .collect(),
        };
        let before = self.snapshot.clone();
        let replaced = undo.files.clone();
        match self.take_in(intake) {
            Ok(()) => self.own_resources(&replaced),
            Err(errors) => {
                // What was there before compiled; it compiles again. It may come to other numbers (of port classes, of
                // policies); they become visible with the next update, as its difference to what is in the maps.
                let _ = self.take_in(undo);
                self.snapshot = before;
                return Err(errors);
            }
        }
        Ok(&self.snapshot)
    }

    fn take_in(&mut self, changes: SharedChanges) -> Result<(), Vec<Diagnostic>> {
        let before = self.snapshot.clone();
        let mut progress = Progress::default();
        let groups_change = changes.files.iter().any(|(name, content)| {
            let before = self.files.get(name).map(|content| content.cidr_groups.as_slice());
            let after = content.as_ref().map(|content| content.cidr_groups.as_slice());
            before.unwrap_or_default() != after.unwrap_or_default()
        });
        if changes.inventory.is_some() || groups_change {
            if let Some(inventory) = changes.inventory {
                self.inventory = inventory;
            }
            for (name, content) in changes.files {
                match content {
                    Some(content) => self.files.insert(name, content),
                    None => self.files.remove(&name),
                };
            }
            self.start_over(&mut progress)?;
        } else {
            let groups = self.groups();
            let groups: Vec<&CidrGroup> = groups.iter().collect();
            for (name, content) in changes.files {
                self.remove_file(&name, &mut progress);
                if let Some(content) = content {
                    self.add_file(&name, content, &groups, &mut progress);
                }
            }
            if !progress.prefixes.is_empty() {
                self.refresh_prefixes(&mut progress)?;
            }
        }
        self.compile(progress, before)
    }

    /// Everything anew, but with the numbers and, where it comes to the same, the tables of before.
    fn start_over(&mut self, progress: &mut Progress) -> Result<(), Vec<Diagnostic>> {
        self.specs.clear();
        self.peers = PeerCache::default();
        self.prefixes.clear();
        self.identity_index = IdentityIndex::default();
        self.named = NamedPrefixes::of(&self.inventory);

        let mut before: Vec<Subject> = std::mem::take(&mut self.subjects);
        for selecting in before
            .iter()
            .flat_map(|subject| subject.specs.values().chain(&subject.retired))
        {
            self.classes.release(&selecting.sets);
        }
        let mut subjects: Vec<Subject> = Vec::new();
        for endpoint in &self.inventory.endpoints {
            let same = |subject: &Subject| {
                subject.labels == endpoint.labels
                    && subject.named_ports == endpoint.named_ports
                    && subject.audit == endpoint.audit
            };
            match subjects.iter_mut().find(|subject| same(subject)) {
                Some(subject) => subject.endpoints.push((endpoint.id, 0)),
                None => {
                    let known = before.iter().position(same).map(|at| before.swap_remove(at));
                    subjects.push(Subject {
                        required: Default::default(),
                        labels: endpoint.labels.clone(),
                        named_ports: endpoint.named_ports.clone(),
                        audit: endpoint.audit,
                        node: endpoint.is_node(),
                        endpoints: vec![(endpoint.id, 0)],
                        specs: BTreeMap::new(),
                        retired: Vec::new(),
                        default_verdict: [None, None],
                        names: SubjectNames {
                            learns: known.as_ref().is_some_and(|known| known.names.learns),
                            ..SubjectNames::default()
                        },
                        policy: known.as_ref().map_or(0, |known| known.policy),
                        plain: known.as_ref().map_or(0, |known| known.plain),
                        table: known.map(|known| known.table).unwrap_or_default(),
                    });
                }
            }
        }
        // An endpoint that changes its subject must not meet the old table changing under it, nor change the table
        // of others by joining them: then the subjects it leaves and joins get tables of their own.
        let before = &self.snapshot.endpoints;
        let changed: HashSet<u32> = subjects
            .iter()
            .flat_map(|subject| subject.endpoints.iter().map(|(id, _)| (id, subject.policy)))
            .filter_map(|(id, policy)| before.get(id).map(|state| (state.policy, policy)))
            .filter(|(old, new)| old != new)
            .flat_map(|(old, new)| [old, new])
            .collect();
        for subject in subjects
            .iter_mut()
            .filter(|subject| changed.contains(&subject.policy))
        {
            subject.policy = 0;
        }
        self.subjects = subjects;
        self.names.forget_users();
        progress.dirty = (0..self.subjects.len()).collect();

        // Prefixes first, then identities, so that the peers are looked up once.
        let groups = self.groups();
        let groups: Vec<&CidrGroup> = groups.iter().collect();
        let mut mentioned: BTreeSet<IpNet> = BTreeSet::new();
        for content in self.files.values() {
            let specs = content.policies.iter().flat_map(|policy| &policy.specs);
            let rules =
                specs.flat_map(|spec| SECTIONS.iter().flat_map(|section| section_rules(spec, *section)));
            for rule in rules {
                if let Peers::OneOf(peers) = &rule.peers {
                    for peer in peers {
                        if matches!(
                            peer,
                            Peer::Cidr(_) | Peer::CidrGroup { .. } | Peer::CidrGroupSelector { .. }
                        ) {
                            mentioned.extend(ResolvedSelector::of(peer, &groups).prefixes());
                        }
                    }
                }
            }
        }
        self.prefixes = mentioned.into_iter().map(|prefix| (prefix, 0)).collect();
        self.refresh_identities(progress)?;
        let files: Vec<(String, Arc<FileContent>)> = self
            .files
            .iter()
            .map(|(name, content)| (name.clone(), Arc::clone(content)))
            .collect();
        for (name, content) in files {
            self.add_file(&name, content, &groups, progress);
        }
        Ok(())
    }

    /// What the regular expressions of a spec cost.
    fn expressions_of(&mut self, spec: &Spec) -> usize {
        if self.expressions.len() > REMEMBERED_EXPRESSIONS {
            self.expressions.clear();
        }
        let entries = SECTIONS
            .iter()
            .flat_map(|section| section_rules(spec, *section))
            .filter_map(|rule| match &rule.ports {
                Ports::Any => None,
                Ports::OneOf(entries) => Some(entries),
            })
            .flatten();
        let rules = entries.filter_map(|entry| match &entry.l7.rules {
            L7Rules::Http(rules) => Some(rules),
            _ => None,
        });
        let patterns: HashSet<&String> = rules
            .flatten()
            .flat_map(|rule| [&rule.path, &rule.method, &rule.host])
            .flatten()
            .collect();
        let mut sum = 0usize;
        for pattern in patterns {
            let cost = match self.expressions.get(pattern) {
                Some(cost) => *cost,
                None => {
                    let cost = re2::cost(pattern).unwrap_or(0);
                    self.expressions.insert(pattern.clone(), cost);
                    cost
                }
            };
            sum = sum.saturating_add(cost);
        }
        sum
    }

    fn groups(&self) -> Vec<CidrGroup> {
        self.files
            .values()
            .flat_map(|content| content.cidr_groups.iter().cloned())
            .collect()
    }

    fn remove_file(&mut self, name: &str, progress: &mut Progress) {
        let Some(content) = self.files.remove(name) else {
            return;
        };
        for key in spec_keys(name, &content) {
            let Some(unit) = self.specs.remove(&key) else {
                continue;
            };
            for at in &unit.subjects {
                let subject = &mut self.subjects[*at];
                subject.retired.extend(subject.specs.remove(&key));
                progress.dirty.insert(*at);
            }
            for rule in unit.sections.iter().flatten() {
                let UnitPeers::OneOf(peers) = &rule.peers else {
                    continue;
                };
                for number in peers {
                    let Some(resolved) = self.peers.release(*number) else {
                        continue;
                    };
                    for prefix in resolved.prefixes() {
                        if let Some(users) = self.prefixes.get_mut(&prefix) {
                            *users -= 1;
                            if *users == 0 {
                                self.prefixes.remove(&prefix);
                                progress.prefix(prefix, -1);
                            }
                        }
                    }
                }
            }
        }
    }

    fn add_file(
        &mut self,
        name: &str,
        content: Arc<FileContent>,
        groups: &[&CidrGroup],
        progress: &mut Progress,
    ) {
        for key in spec_keys(name, &content) {
            let (policy_at, spec_at) = (key.position.0 as usize, key.position.1 as usize);
            let policy = &content.policies[policy_at];
            let spec = &policy.specs[spec_at];
            let subjects: Vec<usize> = (0..self.subjects.len())
                .filter(|at| selects(&spec.subject, &self.subjects[*at].labels, self.subjects[*at].node))
                .collect();
            let sections = SECTIONS.map(|section| {
                let rules = section_rules(spec, section).iter().enumerate();
                rules
                    .map(|(index, rule)| {
                        let place = RulePlace {
                            kind: policy.kind,
                            policy: Arc::clone(&key.policy),
                            spec: key.position.1,
                            section,
                            index: index as u32,
                        };
                        let id = self.rule_ids.number(
                            name,
                            RuleInfo {
                                id: 0,
                                key: RuleKey::Rule(place),
                                location: Some(rule.location.clone()),
                                description: spec.description.clone(),
                            },
                        );
                        let peers = match &rule.peers {
                            Peers::Any => UnitPeers::Everybody,
                            Peers::Nobody => UnitPeers::Nobody,
                            Peers::OneOf(peers) => {
                                let numbers: Vec<u32> = peers
                                    .iter()
                                    .map(|peer| {
                                        let (number, new) =
                                            self.peers.retain(peer, groups, &self.identity_index);
                                        if new && let Some(slot) = self.peers.slot(number) {
                                            for prefix in slot.resolved.prefixes() {
                                                let users =
                                                    self.prefixes.entry(prefix).or_insert_with(|| {
                                                        progress.prefix(prefix, 1);
                                                        0
                                                    });
                                                *users += 1;
                                            }
                                        }
                                        number
                                    })
                                    .collect();
                                UnitPeers::OneOf(numbers)
                            }
                        };
                        UnitRule { id, peers }
                    })
                    .collect()
            });
            let selectors = [Section::Egress, Section::EgressDeny]
                .iter()
                .flat_map(|section| section_rules(spec, *section))
                .filter_map(|rule| match &rule.peers {
                    Peers::OneOf(peers) => Some(peers),
                    Peers::Any | Peers::Nobody => None,
                })
                .flatten()
                .filter_map(|peer| match peer {
                    Peer::Fqdn(pattern) => Some(self.names.selector(pattern)),
                    _ => None,
                })
                .collect();
            let reads = SECTIONS
                .iter()
                .flat_map(|section| section_rules(spec, *section))
                .any(|rule| match &rule.ports {
                    Ports::Any => false,
                    Ports::OneOf(entries) => entries.iter().any(|entry| !entry.l7.is_none()),
                });
            let unit = Arc::new(CompiledSpec {
                content: Arc::clone(&content),
                policy: policy_at,
                spec: spec_at,
                sections,
                selectors,
                reads,
                expressions: if reads { self.expressions_of(spec) } else { 0 },
                audit: policy.audit,
                denies: palisade_abi::DIRECTIONS.map(|direction| default_deny(spec, direction)),
                subjects,
            });
            for at in &unit.subjects {
                let selecting = AppliedSpec {
                    unit: Arc::clone(&unit),
                    stale: true,
                    regrouped: false,
                    rules: Default::default(),
                    sets: Vec::new(),
                    remarks: Default::default(),
                };
                self.subjects[*at].specs.insert(key.clone(), selecting);
                progress.dirty.insert(*at);
            }
            self.specs.insert(key, unit);
        }
        self.files.insert(name.to_owned(), content);
    }
}

/// Whether a spec is about somebody with these labels.
pub(crate) fn selects(subject: &SpecSubject, labels: &Labels, node: bool) -> bool {
    let matches = |selector: &Selector| selector.matches(labels);
    match subject {
        SpecSubject::Endpoints(selector) => !node && matches(selector),
        SpecSubject::Node(selector) => node && matches(selector),
    }
}

fn spec_keys(file: &str, content: &FileContent) -> Vec<SpecKey> {
    let file: Arc<str> = file.into();
    let mut keys = Vec::new();
    for (policy_at, policy) in content.policies.iter().enumerate() {
        let name: Arc<str> = policy.qualified_name().into();
        for spec_at in 0..policy.specs.len() {
            keys.push(SpecKey {
                policy: Arc::clone(&name),
                kind: policy.kind,
                file: Arc::clone(&file),
                position: (policy_at as u32, spec_at as u32),
            });
        }
    }
    keys
}

pub(crate) fn problem(location: Location, message: String) -> Diagnostic {
    Diagnostic {
        severity: Severity::Error,
        location,
        message,
    }
}
