//! Policies and a world to what the maps hold; a change recompiles only what it touches.
//!
//! What is kept between changes: for each peer of a rule the identities it means; for each subject (a set of
//! labels that an endpoint has, with its named ports) the specs that select it and its table. A changed file
//! costs its own specs, the subjects they select, and a look at the peers if a prefix appears or goes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use ipnet::{IpNet, Ipv6Net};
use palisade_abi::{
    Addr, Class, Direction, EndpointState, Identity, IpcacheEntry, PrefixKey, identity, protocol,
};
use serde::{Deserialize, Serialize};

use crate::{
    classes::{Classes, PortSet},
    conflict::ConflictFinder,
    diagnostic::{Diagnostic, Severity},
    identity::{Allocator, AllocatorState, cidr_label, prefix_labels},
    labels::Labels,
    rule::{
        CidrGroup, Entity, L4Protocol, Location, Peer, Peers, Policy, PolicyKind, PortSpec, Ports, Rule,
        Selector, Spec, Subject as SpecSubject,
    },
    select::{Known, Meaning},
    snapshot::{RuleInfo, RuleKey, RulePlace, RuleSet, Section, Snapshot, Table, TableKey, differing},
    table::{Builder, Members, Otherwise, Reading, RuleSets, TablePorts, TableRule},
    world::{Enforcement, NamedPort, NamedPorts, World},
};

pub use crate::conflict::conflicts;

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
    pub world: Option<World>,
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
#[derive(Debug, Default)]
pub struct Compiler {
    world: World,
    files: BTreeMap<String, Arc<FileContent>>,
    identities: Allocator,
    rule_ids: RuleIds,
    rulesets: RuleSetIds,
    classes: Classes,
    known: Known,
    /// Prefixes that policies mention, and how often.
    prefixes: BTreeMap<IpNet, u32>,
    peers: PeerCache,
    /// Prefixes and addresses that the world names.
    named: NamedPrefixes,
    specs: BTreeMap<SpecKey, Arc<SpecUnit>>,
    subjects: Vec<Subject>,
    /// Ports by name over all endpoints and peers.
    named_ports: BTreeMap<String, BTreeSet<NamedPort>>,
    next_policy: u32,
    snapshot: Snapshot,
}

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
struct SpecUnit {
    content: Arc<FileContent>,
    /// Which policy of the file.
    policy: usize,
    spec: usize,
    /// By section in the order of [`SECTIONS`].
    sections: [Vec<UnitRule>; 4],
    /// Whether a rule asks for traffic to be read.
    reads: bool,
    /// The policy is in audit mode.
    audit: bool,
    /// By direction: whether it denies by default; none without rules.
    denies: [Option<bool>; 2],
    subjects: Vec<usize>,
}

impl SpecUnit {
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

/// The sections in the order of [`SpecUnit::sections`].
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

/// Endpoints that policies cannot tell apart.
#[derive(Clone, Debug)]
struct Subject {
    labels: Labels,
    named_ports: NamedPorts,
    audit: bool,
    node: bool,
    /// Endpoint ids with their identity.
    endpoints: Vec<(u16, Identity)>,
    specs: BTreeMap<SpecKey, Selecting>,
    /// Specs that do not select it any more, since the table was made.
    retired: Vec<Selecting>,
    /// For each direction what the table was made with.
    otherwise: [Option<Otherwise>; 2],
    policy: u32,
    table: Arc<Table>,
}

impl Subject {
    fn selecting(&self) -> impl Iterator<Item = (&SpecKey, &Selecting)> {
        self.specs.iter()
    }
}

/// A spec as it applies to a subject.
#[derive(Clone, Debug)]
struct Selecting {
    unit: Arc<SpecUnit>,
    /// Whether `rules` are still to be made from it (they are of before).
    stale: bool,
    /// Whether only its peers mean others than when `rules` were made.
    regrouped: bool,
    /// By direction.
    rules: [Vec<TableRule>; 2],
    /// Port sets held in [`Classes`].
    sets: Vec<PortSet>,
    remarks: Vec<Diagnostic>,
}

/// The rows of a table that a change may touch.
enum Touched {
    Everything,
    Only(BTreeSet<Identity>),
}

impl Touched {
    /// More rows than this are not worth picking out.
    const MANY: usize = 64;

    /// Verdicts change towards whom the rules mean.
    fn add(&mut self, rules: &[Vec<TableRule>; 2]) {
        for rule in rules.iter().flatten() {
            match &rule.members {
                Members::Everybody => *self = Self::Everything,
                Members::Of(peers) => {
                    for (_, members) in peers {
                        self.add_identities(members.iter().copied());
                    }
                }
            }
        }
    }

    fn add_identities(&mut self, more: impl ExactSizeIterator<Item = Identity>) {
        match self {
            Self::Only(identities) if identities.len() + more.len() <= Self::MANY => identities.extend(more),
            _ => *self = Self::Everything,
        }
    }
}

#[derive(Clone, Debug, Default)]
struct RuleIds {
    numbers: HashMap<String, u32>,
    last: u32,
    infos: Arc<BTreeMap<u32, Arc<RuleInfo>>>,
}

impl RuleIds {
    fn number(&mut self, file: &str, info: RuleInfo) -> u32 {
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
struct RuleSetIds {
    numbers: HashMap<RuleSet, u32>,
    last: u32,
    sets: Arc<BTreeMap<u32, Arc<RuleSet>>>,
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

/// The identities that each distinct peer means.
#[derive(Clone, Debug, Default)]
struct PeerCache {
    numbers: HashMap<Peer, u32>,
    slots: Vec<Option<PeerSlot>>,
    free: Vec<u32>,
}

#[derive(Clone, Debug)]
struct PeerSlot {
    peer: Peer,
    meaning: Meaning,
    members: Arc<BTreeSet<Identity>>,
    users: u32,
}

impl PeerCache {
    fn slot(&self, number: u32) -> Option<&PeerSlot> {
        self.slots.get(number as usize).and_then(Option::as_ref)
    }

    /// Returns the number and whether the peer is new.
    fn retain(&mut self, peer: &Peer, groups: &[&CidrGroup], known: &Known) -> (u32, bool) {
        if let Some(&number) = self.numbers.get(peer) {
            if let Some(Some(slot)) = self.slots.get_mut(number as usize) {
                slot.users += 1;
            }
            return (number, false);
        }
        let meaning = Meaning::of(peer, groups);
        let slot = PeerSlot {
            peer: peer.clone(),
            members: Arc::new(known.select(&meaning)),
            meaning,
            users: 1,
        };
        let number = match self.free.pop() {
            Some(number) => {
                self.slots[number as usize] = Some(slot);
                number
            }
            None => {
                self.slots.push(Some(slot));
                (self.slots.len() - 1) as u32
            }
        };
        self.numbers.insert(peer.clone(), number);
        (number, true)
    }

    /// Returns the meaning of the peer if this was its last user.
    fn release(&mut self, number: u32) -> Option<Meaning> {
        let entry = self.slots.get_mut(number as usize)?;
        let slot = entry.as_mut()?;
        slot.users -= 1;
        if slot.users > 0 {
            return None;
        }
        let slot = entry.take()?;
        self.numbers.remove(&slot.peer);
        self.free.push(number);
        Some(slot.meaning)
    }
}

/// Prefixes and addresses that the world names.
#[derive(Clone, Debug, Default)]
struct NamedPrefixes {
    all: HashSet<IpNet>,
    /// Those of labelled peers that are not part of the world.
    labelled: HashSet<IpNet>,
    /// Family (is IPv6) and length of those.
    lengths: BTreeSet<(bool, u8)>,
}

impl NamedPrefixes {
    fn of(world: &World) -> Self {
        let peers = |chosen: fn(&Labels) -> bool| {
            world
                .peers
                .iter()
                .filter(move |peer| chosen(&peer.labels))
                .flat_map(|peer| peer.prefixes.iter().map(IpNet::trunc))
        };
        let addresses = world.endpoints.iter().flat_map(|endpoint| &endpoint.addresses);
        let labelled: HashSet<IpNet> = peers(|labels| !is_world(labels)).collect();
        Self {
            all: peers(|_| true)
                .chain(addresses.map(|address| IpNet::from(*address)))
                .collect(),
            lengths: labelled
                .iter()
                .map(|prefix| (matches!(prefix, IpNet::V6(_)), prefix.prefix_len()))
                .collect(),
            labelled,
        }
    }

    /// An address of a labelled peer is the peer, however narrow a prefix a policy mentions.
    fn shadows(&self, prefix: IpNet) -> bool {
        let v6 = matches!(prefix, IpNet::V6(_));
        self.lengths
            .iter()
            .filter(|(family, length)| *family == v6 && *length <= prefix.prefix_len())
            .any(|(_, length)| shorten(prefix, *length).is_some_and(|wider| self.labelled.contains(&wider)))
    }
}

/// [`Changes`], with the contents shared.
struct Intake {
    world: Option<World>,
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
        let revisions = found.endpoints.values().map(|state| state.revision);
        self.snapshot.revision = revisions.max().unwrap_or(0).max(self.snapshot.revision);
    }

    /// The result of the last update.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The world of the last update.
    #[must_use]
    pub fn world(&self) -> &World {
        &self.world
    }

    /// The policies in use, file by file.
    pub fn files(&self) -> impl Iterator<Item = (&str, &FileContent)> {
        self.files
            .iter()
            .map(|(name, content)| (name.as_str(), &**content))
    }

    /// For each distinct peer of the policies: how it is written, how many rules use it, whom it means.
    pub fn selectors(&self) -> impl Iterator<Item = (&Peer, u32, &BTreeSet<Identity>)> {
        self.peers
            .slots
            .iter()
            .flatten()
            .map(|slot| (&slot.peer, slot.users, &*slot.members))
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
        let Some(at) = subject.filter(|_| self.world.options.enforcement != Enforcement::Never) else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for rule in self.subjects[at]
            .selecting()
            .flat_map(|(_, selecting)| &selecting.rules[direction as usize])
        {
            let named = match &rule.members {
                Members::Everybody => true,
                Members::Of(peers) => peers.iter().any(|(_, members)| members.contains(&other)),
            };
            let ports = rule
                .ports
                .iter()
                .filter(|ports| ports.set.contains(protocol, Some(port)));
            for ports in ports.filter(|_| named) {
                let effect = match &ports.reading {
                    _ if rule.denies => "deny".to_owned(),
                    _ if rule.auth_required => "authenticate".to_owned(),
                    Some(reading) => {
                        format!("inspect {}", crate::snapshot::inspector_name(reading.kind as u8))
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
        let intake = Intake {
            world: changes.world,
            files: changes
                .files
                .into_iter()
                .map(|(name, content)| (name, content.map(Arc::new)))
                .collect(),
        };
        let undo = Intake {
            world: intake.world.as_ref().map(|_| self.world.clone()),
            files: intake
                .files
                .keys()
                .map(|name| (name.clone(), self.files.get(name).cloned()))
                .collect(),
        };
        let before = self.snapshot.clone();
        match self.take_in(intake) {
            Ok(()) => {}
            Err(errors) => {
                // What was there before compiled; it compiles again.
                let _ = self.take_in(undo);
                self.restore(before);
                return Err(errors);
            }
        }
        Ok(&self.snapshot)
    }

    /// After a failed update: the tables, ids and revision that are in the maps.
    fn restore(&mut self, before: Snapshot) {
        for subject in &mut self.subjects {
            let policy = subject
                .endpoints
                .first()
                .and_then(|(id, _)| before.endpoints.get(id))
                .map(|state| state.policy);
            if let Some(policy) = policy
                && let Some(table) = before.tables.get(&policy)
            {
                subject.policy = policy;
                subject.table = Arc::clone(table);
            }
        }
        self.snapshot = before;
    }

    fn take_in(&mut self, changes: Intake) -> Result<(), Vec<Diagnostic>> {
        let mut progress = Progress::default();
        let groups_change = changes.files.iter().any(|(name, content)| {
            let before = self.files.get(name).map(|content| content.cidr_groups.as_slice());
            let after = content.as_ref().map(|content| content.cidr_groups.as_slice());
            before.unwrap_or_default() != after.unwrap_or_default()
        });
        if changes.world.is_some() || groups_change {
            if let Some(world) = changes.world {
                self.world = world;
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
        self.compile(progress)
    }

    /// Everything anew, but with the numbers and, where it comes to the same, the tables of before.
    fn start_over(&mut self, progress: &mut Progress) -> Result<(), Vec<Diagnostic>> {
        self.specs.clear();
        self.peers = PeerCache::default();
        self.prefixes.clear();
        self.known = Known::default();
        self.named = NamedPrefixes::of(&self.world);
        self.named_ports.clear();
        let ports = self
            .world
            .endpoints
            .iter()
            .map(|endpoint| &endpoint.named_ports)
            .chain(self.world.peers.iter().map(|peer| &peer.named_ports));
        for (name, port) in ports.flatten() {
            self.named_ports.entry(name.clone()).or_default().insert(*port);
        }

        let mut before: Vec<Subject> = std::mem::take(&mut self.subjects);
        for selecting in before
            .iter()
            .flat_map(|subject| subject.specs.values().chain(&subject.retired))
        {
            self.classes.release(&selecting.sets);
        }
        let mut subjects: Vec<Subject> = Vec::new();
        for endpoint in &self.world.endpoints {
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
                        labels: endpoint.labels.clone(),
                        named_ports: endpoint.named_ports.clone(),
                        audit: endpoint.audit,
                        node: endpoint.is_node(),
                        endpoints: vec![(endpoint.id, 0)],
                        specs: BTreeMap::new(),
                        retired: Vec::new(),
                        otherwise: [None, None],
                        policy: known.as_ref().map_or(0, |known| known.policy),
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
                            mentioned.extend(Meaning::of(peer, &groups).prefixes());
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
                    let Some(meaning) = self.peers.release(*number) else {
                        continue;
                    };
                    for prefix in meaning.prefixes() {
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
                                        let (number, new) = self.peers.retain(peer, groups, &self.known);
                                        if new && let Some(slot) = self.peers.slot(number) {
                                            for prefix in slot.meaning.prefixes() {
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
            let reads = SECTIONS
                .iter()
                .flat_map(|section| section_rules(spec, *section))
                .any(|rule| match &rule.ports {
                    Ports::Any => false,
                    Ports::OneOf(entries) => entries.iter().any(|entry| !entry.l7.is_none()),
                });
            let unit = Arc::new(SpecUnit {
                content: Arc::clone(&content),
                policy: policy_at,
                spec: spec_at,
                sections,
                reads,
                audit: policy.audit,
                denies: palisade_abi::DIRECTIONS.map(|direction| default_deny(spec, direction)),
                subjects,
            });
            for at in &unit.subjects {
                let selecting = Selecting {
                    unit: Arc::clone(&unit),
                    stale: true,
                    regrouped: false,
                    rules: Default::default(),
                    sets: Vec::new(),
                    remarks: Vec::new(),
                };
                self.subjects[*at].specs.insert(key.clone(), selecting);
                progress.dirty.insert(*at);
            }
            self.specs.insert(key, unit);
        }
        self.files.insert(name.to_owned(), content);
    }

    /// Who exists, who has which address; what peers mean if that has changed.
    fn refresh_identities(&mut self, progress: &mut Progress) -> Result<(), Vec<Diagnostic>> {
        let mut wanted: BTreeMap<Identity, Labels> = BTreeMap::new();
        let mut addresses: HashMap<Addr, IpcacheEntry> = HashMap::new();
        let mut prefixes: HashMap<PrefixKey, IpcacheEntry> = HashMap::new();
        let options = self.world.options;

        // The node's own labels have the node's own number, whatever they are.
        let node_labels = self
            .world
            .endpoints
            .iter()
            .find(|endpoint| endpoint.is_node())
            .map(|endpoint| &endpoint.labels)
            .or_else(|| {
                let peers = self.world.peers.iter().map(|peer| &peer.labels);
                peers.into_iter().find(|labels| labels.has_reserved("host"))
            })
            .cloned();
        let in_use: HashSet<Identity> = self.snapshot.identities.keys().copied().collect();
        let identities = &mut self.identities;
        let mut number = |labels: &Labels| -> Result<Identity, Vec<Diagnostic>> {
            if node_labels.as_ref() == Some(labels) {
                return Ok(identity::HOST);
            }
            let number = identities
                .number(labels, &|number| in_use.contains(&number))
                .map_err(|error| vec![problem(Location::default(), error.to_string())])?;
            Ok(number)
        };
        let mut put = |prefix: IpNet, entry: IpcacheEntry| match full_length(prefix) {
            Some(address) => {
                addresses.insert(address, entry);
            }
            None => {
                prefixes.insert(prefix_key(prefix), entry);
            }
        };

        let families: &[bool] = if options.dual_stack {
            &[false, true]
        } else {
            &[false]
        };
        for v6 in families {
            let labels = options.world_labels(*v6);
            wanted.insert(number(&labels)?, labels);
        }
        if node_labels.is_none() {
            wanted.insert(identity::HOST, Labels::reserved("host"));
        }

        // Later ones replace earlier ones: what policies mention, then peers, then what is on this node.
        let mapped = IpNet::V6(V4_MAPPED);
        for prefix in self.prefixes.keys().filter(|prefix| prefix.prefix_len() > 0) {
            // In the trie IPv4 addresses are mapped ones. No packet has such an address as IPv6.
            if mapped.contains(prefix) {
                continue;
            }
            if prefix.contains(&mapped) {
                put(mapped, entry(number(&options.world_labels(false))?, 0));
            }
            if self.named.shadows(*prefix) {
                continue;
            }
            let labels = prefix_labels(*prefix, &options);
            let identity = number(&labels)?;
            wanted.insert(identity, labels);
            put(*prefix, entry(identity, 0));
        }
        for peer in &self.world.peers {
            if peer.prefixes.is_empty() || !is_world(&peer.labels) {
                let identity = number(&peer.labels)?;
                wanted.insert(identity, peer.labels.clone());
                for prefix in &peer.prefixes {
                    put(prefix.trunc(), entry(identity, 0));
                }
            } else {
                // Part of the world, with labels on top: prefixes of policies mean it too.
                for prefix in &peer.prefixes {
                    let labels = Labels::new(peer.labels.iter().cloned().chain([cidr_label(*prefix)]));
                    let identity = number(&labels)?;
                    wanted.insert(identity, labels);
                    put(prefix.trunc(), entry(identity, 0));
                }
            }
        }
        let mut of_endpoint: HashMap<u16, Identity> = HashMap::new();
        for endpoint in &self.world.endpoints {
            let identity = number(&endpoint.labels)?;
            wanted.insert(identity, endpoint.labels.clone());
            of_endpoint.insert(endpoint.id, identity);
            for address in &endpoint.addresses {
                put(IpNet::from(*address), entry(identity, endpoint.id));
            }
        }
        if let Some(labels) = &node_labels {
            // A peer that is only called `reserved:host` is the node too.
            wanted.insert(identity::HOST, labels.clone());
        }
        let world = |v6| number(&options.world_labels(v6));
        let [world_ipv4, world_ipv6] = [false, true].map(world);
        self.snapshot.world_ipv4 = world_ipv4?;
        self.snapshot.world_ipv6 = world_ipv6?;
        for subject in &mut self.subjects {
            for (id, identity) in &mut subject.endpoints {
                *identity = of_endpoint.get(id).copied().unwrap_or(0);
            }
        }

        let gone: Vec<Identity> = self
            .known
            .labels()
            .iter()
            .filter(|(number, labels)| wanted.get(number) != Some(labels))
            .map(|(number, _)| *number)
            .collect();
        let new: Vec<(Identity, Labels)> = wanted
            .iter()
            .filter(|(number, labels)| self.known.labels().get(number) != Some(labels))
            .map(|(number, labels)| (*number, labels.clone()))
            .collect();
        self.change_identities(&gone, &new, progress);
        if *self.snapshot.identities != wanted {
            self.snapshot.identities = Arc::new(wanted);
        }
        if *self.snapshot.addresses != addresses {
            self.snapshot.addresses = Arc::new(addresses);
        }
        if *self.snapshot.prefixes != prefixes {
            self.snapshot.prefixes = Arc::new(prefixes);
        }
        Ok(())
    }

    /// The same where only prefixes that policies mention came or went, and stand alone: what they add or take away.
    fn refresh_prefixes(&mut self, progress: &mut Progress) -> Result<(), Vec<Diagnostic>> {
        let mapped = IpNet::V6(V4_MAPPED);
        let involved = |prefix: &IpNet| prefix.contains(&mapped) || self.named.all.contains(prefix);
        if progress.prefixes.keys().any(involved) {
            return self.refresh_identities(progress);
        }
        let mut gone: Vec<Identity> = Vec::new();
        let mut new: Vec<(Identity, Labels)> = Vec::new();
        let changes: Vec<(IpNet, i8)> = progress
            .prefixes
            .iter()
            .map(|(prefix, step)| (*prefix, *step))
            .filter(|(prefix, _)| {
                prefix.prefix_len() > 0 && !mapped.contains(prefix) && !self.named.shadows(*prefix)
            })
            .collect();
        for (prefix, step) in changes {
            let labels = prefix_labels(prefix, &self.world.options);
            let known = &self.snapshot.identities;
            let identity = self
                .identities
                .number(&labels, &|number| known.contains_key(&number))
                .map_err(|error| vec![problem(Location::default(), error.to_string())])?;
            let identities = Arc::make_mut(&mut self.snapshot.identities);
            if step > 0 {
                identities.insert(identity, labels.clone());
                new.push((identity, labels));
            } else {
                identities.remove(&identity);
                gone.push(identity);
            }
            match full_length(prefix) {
                Some(address) => {
                    let addresses = Arc::make_mut(&mut self.snapshot.addresses);
                    if step > 0 {
                        addresses.insert(address, entry(identity, 0));
                    } else {
                        addresses.remove(&address);
                    }
                }
                None => {
                    let prefixes = Arc::make_mut(&mut self.snapshot.prefixes);
                    if step > 0 {
                        prefixes.insert(prefix_key(prefix), entry(identity, 0));
                    } else {
                        prefixes.remove(&prefix_key(prefix));
                    }
                }
            }
        }
        self.change_identities(&gone, &new, progress);
        Ok(())
    }

    /// Identities that exist no more, and others that do now: which peers mean somebody else?
    fn change_identities(&mut self, gone: &[Identity], new: &[(Identity, Labels)], progress: &mut Progress) {
        if gone.is_empty() && new.is_empty() {
            return;
        }
        progress
            .moved
            .extend(gone.iter().chain(new.iter().map(|(number, _)| number)));
        for number in gone {
            self.known.remove(*number);
        }
        for (number, labels) in new {
            self.known.add(*number, labels.clone());
        }
        let mut changed: HashSet<u32> = HashSet::new();
        for (number, slot) in self.peers.slots.iter_mut().enumerate() {
            let Some(slot) = slot else { continue };
            if matches!(slot.meaning, Meaning::Everybody) {
                continue;
            }
            let left: Vec<Identity> = gone
                .iter()
                .copied()
                .filter(|id| slot.members.contains(id))
                .collect();
            let joined: Vec<Identity> = new
                .iter()
                .filter(|(_, labels)| slot.meaning.matches(labels))
                .map(|(id, _)| *id)
                .collect();
            if !left.is_empty() || !joined.is_empty() {
                let members = Arc::make_mut(&mut slot.members);
                for id in left {
                    members.remove(&id);
                }
                members.extend(joined);
                changed.insert(number as u32);
            }
        }
        if !changed.is_empty() {
            for (key, unit) in &self.specs {
                let touched = unit.sections.iter().flatten().any(|rule| match &rule.peers {
                    UnitPeers::OneOf(peers) => peers.iter().any(|number| changed.contains(number)),
                    _ => false,
                });
                if touched {
                    for at in &unit.subjects {
                        if let Some(selecting) = self.subjects[*at].specs.get_mut(key) {
                            selecting.regrouped = true;
                        }
                        progress.dirty.insert(*at);
                    }
                }
            }
        }
    }

    /// Compiles the dirty subjects, and those whose port classes change with them, and makes the snapshot.
    fn compile(&mut self, mut progress: Progress) -> Result<(), Vec<Diagnostic>> {
        let before = self.snapshot.clone();
        let mut errors: Vec<Diagnostic> = Vec::new();
        self.hold_port_sets(&progress.dirty);
        let mut touched: BTreeMap<usize, Touched> = BTreeMap::new();
        match self.classes.refresh() {
            Ok(protocols) if protocols.is_empty() => {}
            Ok(protocols) => self.follow_classes(&protocols, &mut progress.dirty, &mut touched),
            Err(error) => errors.push(problem(Location::default(), error.to_string())),
        }
        for at in &progress.dirty {
            let rows = touched
                .remove(at)
                .unwrap_or_else(|| Touched::Only(BTreeSet::new()));
            match self.compile_subject(*at, rows, &progress.moved) {
                Ok(table) => {
                    let subject = &mut self.subjects[*at];
                    if subject.policy == 0 || *subject.table != table {
                        if subject.policy == 0 || !small_step(&subject.table, &table) {
                            subject.policy = self.next_policy;
                            self.next_policy = self.next_policy.wrapping_add(1).max(1);
                        }
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
    fn hold_port_sets(&mut self, dirty: &BTreeSet<usize>) {
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
    fn follow_classes(
        &mut self,
        protocols: &[u8],
        dirty: &mut BTreeSet<usize>,
        touched: &mut BTreeMap<usize, Touched>,
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
                        .or_insert_with(|| Touched::Only(BTreeSet::new()))
                        .add(&selecting.rules);
                }
            }
        }
    }

    /// Makes the snapshot from the compiled subjects.
    fn finish(&mut self, before: Snapshot) {
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
                subject
                    .endpoints
                    .iter()
                    .map(move |(id, identity)| (*id, policy, *identity))
            })
            .map(|(id, policy, identity)| {
                let known = before.endpoints.get(&id);
                let same_table = || match (before.tables.get(&policy), self.snapshot.tables.get(&policy)) {
                    (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                    _ => false,
                };
                let keep = known.filter(|state| {
                    !moved && state.policy == policy && state.identity == identity && same_table()
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
                    zero: 0,
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
            .flat_map(|selecting| selecting.remarks.iter().cloned())
            .collect();
        remarks.sort_by(|a, b| (&a.location, &a.message).cmp(&(&b.location, &b.message)));
        remarks.dedup();
        self.snapshot.diagnostics = remarks;
    }

    /// The port sets that the rules of a spec use.
    fn port_sets(&self, unit: &SpecUnit, own: &NamedPorts) -> Vec<PortSet> {
        let mut sets: HashSet<PortSet> = HashSet::new();
        for section in SECTIONS {
            for rule in section_rules(unit.spec(), section) {
                let Ports::OneOf(entries) = &rule.ports else {
                    continue;
                };
                for spec in entries.iter().flat_map(|entry| &entry.ports) {
                    sets.extend(self.resolve(spec, section.direction(), own));
                }
            }
        }
        sets.into_iter().collect()
    }

    /// A port of a rule with its name looked up: for ingress among the subject's own, for egress among everybody's.
    fn resolve(&self, spec: &PortSpec, direction: Direction, own: &NamedPorts) -> Vec<PortSet> {
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
        match spec {
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
            PortSpec::Named { protocol, name, last } => {
                let found: Vec<NamedPort> = match direction {
                    Direction::Ingress => own.get(name).copied().into_iter().collect(),
                    Direction::Egress => self
                        .named_ports
                        .get(name)
                        .into_iter()
                        .flatten()
                        .copied()
                        .collect(),
                };
                protocols(*protocol)
                    .into_iter()
                    .filter_map(|protocol| {
                        let mut ports = found
                            .iter()
                            .filter(|port| {
                                port.port != 0 && (port.protocol == 0 || port.protocol == protocol)
                            })
                            .map(|port| port.port);
                        let port = ports.next()?;
                        // Different ports of one name: nobody can say which is meant.
                        ports
                            .all(|other| other == port)
                            .then(|| range(protocol, port, port.max(*last)))
                    })
                    .collect()
            }
        }
    }

    /// The table of a subject. Of a table that is there, only the rows that a change touches are made anew.
    fn compile_subject(
        &mut self,
        at: usize,
        mut touched: Touched,
        moved: &BTreeSet<Identity>,
    ) -> Result<Table, Vec<Diagnostic>> {
        // Specs that are new, or whose peers mean others now: towards whom they meant and whom they mean.
        let subject = &self.subjects[at];
        let mut made: Vec<(SpecKey, [Vec<TableRule>; 2], Vec<Diagnostic>)> = Vec::new();
        let mut classes = HashMap::new();
        let remade = subject
            .selecting()
            .filter(|(_, selecting)| selecting.stale || selecting.regrouped);
        for (key, selecting) in remade {
            let mut remarks = Vec::new();
            let rules = palisade_abi::DIRECTIONS.map(|direction| {
                self.table_rules(subject, key, selecting, direction, &mut classes, &mut remarks)
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
        let enforced = self.world.options.enforcement != Enforcement::Never;
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
                self.subjects[at].otherwise = [None, None];
                return Err(errors);
            }
        }

        let otherwise = palisade_abi::DIRECTIONS.map(|direction| self.otherwise(at, direction));
        let options = self.world.options;
        let localhost = TableRule {
            id: self.rule_ids.number("", plain(RuleKey::LocalhostAlways)),
            denies: false,
            audit: false,
            auth_required: false,
            members: Members::Of(vec![(
                u32::MAX,
                Arc::new(self.known.select(&Meaning::Entity(Entity::Host))),
            )]),
            ports: vec![TablePorts {
                set: PortSet::All,
                classes: None,
                reading: None,
            }],
        };
        let subject = &self.subjects[at];
        if subject.otherwise != otherwise.map(Some) {
            touched = Touched::Everything;
        }
        let rows = match &touched {
            Touched::Everything => None,
            Touched::Only(identities) => Some(identities),
        };
        let mut entries = Vec::new();
        for direction in palisade_abi::DIRECTIONS {
            let otherwise = otherwise[direction as usize];
            let mut rules: Vec<&TableRule> = Vec::new();
            if options.enforcement != Enforcement::Never {
                rules.extend(
                    subject
                        .specs
                        .values()
                        .flat_map(|selecting| &selecting.rules[direction as usize]),
                );
            }
            if direction == Direction::Ingress
                && options.allow_localhost
                && !subject.node
                && !otherwise.unenforced
            {
                rules.push(&localhost);
            }
            Builder {
                direction,
                rules: &rules,
                rows,
                otherwise,
                audit: options.audit || subject.audit,
                rulesets: &mut self.rulesets,
            }
            .build(&mut entries);
        }
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
        self.subjects[at].otherwise = otherwise.map(Some);
        Ok(table)
    }

    /// The rules of one spec and direction, in their order, with everything looked up.
    fn table_rules(
        &self,
        subject: &Subject,
        key: &SpecKey,
        selecting: &Selecting,
        direction: Direction,
        classes: &mut HashMap<PortSet, Option<Arc<[Class]>>>,
        remarks: &mut Vec<Diagnostic>,
    ) -> Vec<TableRule> {
        let unit = &selecting.unit;
        let spec = unit.spec();
        let lenient = match direction {
            Direction::Ingress => spec.default_deny_ingress,
            Direction::Egress => spec.default_deny_egress,
        } == Some(false);
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
                        for (number, slot) in slots {
                            everybody |= matches!(slot.meaning, Meaning::Everybody);
                            remarks.extend(self.missing_group(slot, &rule.location));
                            members.push((number, Arc::clone(&slot.members)));
                        }
                        if everybody {
                            Members::Everybody
                        } else {
                            Members::Of(members)
                        }
                    }
                };
                let mut ports = Vec::new();
                match &rule.ports {
                    Ports::Any => ports.push(TablePorts {
                        set: PortSet::All,
                        classes: None,
                        reading: None,
                    }),
                    Ports::OneOf(list) => {
                        for entry in list {
                            let reading = Reading::of(&entry.l7, lenient).map(Arc::new);
                            for port in &entry.ports {
                                let sets = self.resolve(port, direction, &subject.named_ports);
                                if sets.is_empty()
                                    && let PortSpec::Named { name, .. } = port
                                {
                                    remarks.push(self.unresolved(
                                        name,
                                        direction,
                                        key,
                                        &entry.location,
                                        subject,
                                    ));
                                }
                                for set in sets {
                                    let classes =
                                        classes.entry(set).or_insert_with(|| self.classes.of(set)).clone();
                                    ports.push(TablePorts {
                                        set,
                                        classes,
                                        reading: reading.clone(),
                                    });
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
                    ports,
                });
            }
        }
        rules
    }

    /// A remark about a group of prefixes by name that does not exist, or is empty.
    fn missing_group(&self, slot: &PeerSlot, location: &Location) -> Option<Diagnostic> {
        match (&slot.peer, &slot.meaning) {
            (Peer::CidrGroup { name, .. }, Meaning::Cidrs(rules)) if rules.is_empty() => Some(Diagnostic {
                severity: Severity::Warning,
                location: location.clone(),
                message: format!(
                    "there is no CiliumCIDRGroup {name} with prefixes; the reference means nobody"
                ),
            }),
            _ => None,
        }
    }

    fn unresolved(
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
                let endpoint = self.world.endpoints.iter().find(|e| Some(e.id) == endpoint);
                let endpoint = endpoint.map_or("", |endpoint| endpoint.name.as_str());
                format!("endpoint {endpoint} has no port of that name and protocol")
            }
            Direction::Egress if self.named_ports.contains_key(name) => {
                "endpoints disagree about it, or have it for another protocol".into()
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
    fn otherwise(&mut self, at: usize, direction: Direction) -> Otherwise {
        let number = direction as u8;
        let subject = &self.subjects[at];
        let mut any_rules: Option<&SpecKey> = None;
        let mut denying: Vec<(&SpecKey, bool)> = Vec::new();
        for (key, Selecting { unit, .. }) in subject.selecting() {
            let Some(denies) = unit.denies[direction as usize] else {
                continue;
            };
            any_rules.get_or_insert(key);
            if denies {
                denying.push((key, unit.audit));
            }
        }
        let enforcement = self.world.options.enforcement;
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
        Otherwise {
            allow,
            unenforced: not_enforced,
            rule,
            audit: !allow && audit,
        }
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

/// Whether the difference is better written into the live table, entry by entry, than as a table of its own: it
/// is small, and the table is large. Each packet finds one verdict, the old or the new one, either way (see
/// `plan`); a table of its own makes them change all at once.
fn small_step(old: &Table, new: &Table) -> bool {
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
fn default_deny(spec: &Spec, direction: Direction) -> Option<bool> {
    let rules = sections_of(direction).map(|section| section_rules(spec, section).len());
    let denies = match direction {
        Direction::Ingress => spec.default_deny_ingress,
        Direction::Egress => spec.default_deny_egress,
    };
    (rules != [0, 0]).then_some(denies.unwrap_or(true))
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

fn plain(key: RuleKey) -> RuleInfo {
    RuleInfo {
        id: 0,
        key,
        location: None,
        description: String::new(),
    }
}

pub(crate) fn problem(location: Location, message: String) -> Diagnostic {
    Diagnostic {
        severity: Severity::Error,
        location,
        message,
    }
}

fn is_world(labels: &Labels) -> bool {
    ["world", "world-ipv4", "world-ipv6"]
        .iter()
        .any(|key| labels.has_reserved(key))
}

/// Where IPv4 addresses are among the IPv6 ones (RFC 4291, 2.5.5.2).
const V4_MAPPED: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96);

const fn entry(identity: Identity, endpoint: u16) -> IpcacheEntry {
    IpcacheEntry {
        identity,
        endpoint,
        flags: 0,
    }
}

fn full_length(prefix: IpNet) -> Option<Addr> {
    (prefix.prefix_len() == prefix.max_prefix_len()).then(|| Addr::from(prefix.addr()))
}

fn shorten(prefix: IpNet, length: u8) -> Option<IpNet> {
    IpNet::new(prefix.addr(), length).ok().map(|net| net.trunc())
}

/// A prefix as the trie has it.
#[must_use]
pub fn prefix_key(prefix: IpNet) -> PrefixKey {
    let shift = match prefix {
        IpNet::V4(_) => 96,
        IpNet::V6(_) => 0,
    };
    let network: IpAddr = prefix.network();
    PrefixKey {
        length: shift + u32::from(prefix.prefix_len()),
        addr: Addr::from(network),
    }
}
