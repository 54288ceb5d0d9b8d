//! Updates of the compiler: a change of files or of the inventory is applied completely, or rolled back.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use ipnet::IpNet;
use palisade_abi::Direction;
use palisade_model::{
    diagnostic::Diagnostic,
    rule::{CidrGroup, L7Rules, Peer, Peers, PolicyKind, Ports, Rule, Section, Spec},
    snapshot::{RuleInfo, RuleKey, RulePlace, Snapshot},
};
use palisade_protocols::http1::re2;

use super::{
    changes::{Changes, Progress, SharedChanges},
    compiler::Compiler,
    learned_index::SubjectNames,
    named_prefixes::NamedPrefixes,
    peers::PeerCache,
    select::{IdentityIndex, ResolvedSelector},
    spec::{CompiledPeers, CompiledRule, CompiledSpec, FileContent, default_deny, selects, spec_keys},
    subject::{AppliedSpec, Subject},
};

/// Largest number of regular expressions whose cost is cached.
const REMEMBERED_EXPRESSIONS: usize = 1 << 16;

impl Compiler {
    /// Applies changes, and recompiles the subjects that they affect.
    ///
    /// # Errors
    /// Errors of the changes, with their places. The compiler keeps its previous state.
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
        match self.apply(intake) {
            Ok(()) => self.own_resources(&replaced),
            Err(errors) => {
                // The previous content compiled before, so it compiles again. Numbers of port classes and policies can
                // differ from those in the maps; the plan after the next update includes the difference.
                let _ = self.apply(undo);
                self.snapshot = before;
                return Err(errors);
            }
        }
        Ok(&self.snapshot)
    }

    fn apply(&mut self, changes: SharedChanges) -> Result<(), Vec<Diagnostic>> {
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

    /// Recreates all subjects. A subject that existed before keeps its table and, unless an endpoint moves from or to
    /// another subject, its policy id.
    fn start_over(&mut self, progress: &mut Progress) -> Result<(), Vec<Diagnostic>> {
        self.specs.clear();
        self.peers = PeerCache::default();
        self.prefixes.clear();
        self.identity_index = IdentityIndex::default();
        self.named = NamedPrefixes::of(&self.inventory);

        let mut before: Vec<Subject> = std::mem::take(&mut self.subjects);
        for applied in before
            .iter()
            .flat_map(|subject| subject.specs.values().chain(&subject.retired))
        {
            self.classes.release(&applied.sets);
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
        // If an endpoint moves to another subject, both the old and the new subject get tables with new policy ids. So
        // the rules of one subject modify no table that endpoints of the other still use.
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

        // Collect the prefixes before the identities, so that the members of selectors are computed only once.
        let groups = self.groups();
        let groups: Vec<&CidrGroup> = groups.iter().collect();
        let policies = self.files.values().flat_map(|content| &content.policies);
        let rules = policies
            .flat_map(|policy| &policy.specs)
            .flat_map(Spec::all_rules);
        let prefixes = |peer: &Peer| match peer {
            Peer::Cidr(_) | Peer::CidrGroup { .. } | Peer::CidrGroupSelector { .. } => {
                ResolvedSelector::of(peer, &groups).prefixes().collect()
            }
            _ => Vec::new(),
        };
        let mentioned: BTreeSet<IpNet> = rules
            .flat_map(|rule| rule.peers.list())
            .flat_map(prefixes)
            .collect();
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

    /// Returns the cost of the regular expressions of a spec, in automaton states.
    fn expressions_of(&mut self, spec: &Spec) -> usize {
        if self.expressions.len() > REMEMBERED_EXPRESSIONS {
            self.expressions.clear();
        }
        let entries = spec
            .all_rules()
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

    pub(super) fn groups(&self) -> Vec<CidrGroup> {
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
            let rules = unit.sections.iter().flatten();
            for number in rules.flat_map(|rule| rule.peers.numbers()) {
                self.release_peer(*number, progress);
            }
        }
    }

    /// Counts one use less of a peer. After its last use, the peer no longer counts for the prefixes that it names.
    fn release_peer(&mut self, number: u32, progress: &mut Progress) {
        let Some(resolved) = self.peers.release(number) else {
            return;
        };
        for prefix in resolved.prefixes() {
            let Some(users) = self.prefixes.get_mut(&prefix) else {
                continue;
            };
            *users -= 1;
            if *users == 0 {
                self.prefixes.remove(&prefix);
                progress.prefix(prefix, -1);
            }
        }
    }

    /// Counts one more use of a peer. A new peer also counts for each prefix that it names. Returns the number of the
    /// peer.
    fn retain_peer(&mut self, peer: &Peer, groups: &[&CidrGroup], progress: &mut Progress) -> u32 {
        let (number, new) = self.peers.retain(peer, groups, &self.identity_index);
        if new && let Some(slot) = self.peers.slot(number) {
            for prefix in slot.resolved.prefixes() {
                let users = self.prefixes.entry(prefix).or_insert_with(|| {
                    progress.prefix(prefix, 1);
                    0
                });
                *users += 1;
            }
        }
        number
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
            let sections = Section::ALL.map(|section| {
                let rules = spec.rules(section).iter().enumerate();
                rules
                    .map(|(index, rule)| {
                        let place = RulePlace {
                            kind: policy.kind,
                            policy: Arc::clone(&key.policy),
                            spec: key.position.1,
                            section,
                            index: index as u32,
                        };
                        CompiledRule {
                            id: self.rule_id(name, place, rule, spec),
                            peers: self.compile_peers(&rule.peers, groups, progress),
                        }
                    })
                    .collect()
            });
            let egress = Section::of(Direction::Egress).into_iter();
            let selectors = egress
                .flat_map(|section| spec.rules(section))
                .flat_map(|rule| rule.peers.list())
                .filter_map(|peer| match peer {
                    Peer::Fqdn(pattern) => Some(self.names.selector(pattern)),
                    _ => None,
                })
                .collect();
            let has_l7_rules = spec.all_rules().any(|rule| match &rule.ports {
                Ports::Any => false,
                Ports::OneOf(entries) => entries.iter().any(|entry| !entry.l7.is_none()),
            });
            let unit = Arc::new(CompiledSpec {
                content: Arc::clone(&content),
                policy: policy_at,
                spec: spec_at,
                sections,
                selectors,
                has_l7_rules,
                expressions: if has_l7_rules {
                    self.expressions_of(spec)
                } else {
                    0
                },
                audit: policy.audit,
                // A failsafe port allows, and enforces nothing.
                denies: palisade_abi::DIRECTIONS.map(|direction| match policy.kind {
                    PolicyKind::Failsafe => None,
                    _ => default_deny(spec, direction),
                }),
                subjects,
            });
            for at in &unit.subjects {
                let applied = AppliedSpec {
                    unit: Arc::clone(&unit),
                    stale: true,
                    regrouped: false,
                    rules: Default::default(),
                    sets: Vec::new(),
                    remarks: Default::default(),
                };
                self.subjects[*at].specs.insert(key.clone(), applied);
                progress.dirty.insert(*at);
            }
            self.specs.insert(key, unit);
        }
        self.files.insert(name.to_owned(), content);
    }

    fn rule_id(&mut self, file: &str, place: RulePlace, rule: &Rule, spec: &Spec) -> u32 {
        let info = RuleInfo {
            id: 0,
            key: RuleKey::Rule(place),
            location: Some(rule.location.clone()),
            description: spec.description.clone(),
        };
        self.rule_ids.number(file, info)
    }

    fn compile_peers(
        &mut self,
        peers: &Peers,
        groups: &[&CidrGroup],
        progress: &mut Progress,
    ) -> CompiledPeers {
        match peers {
            Peers::Any => CompiledPeers::Any,
            Peers::None => CompiledPeers::None,
            Peers::OneOf(peers) => {
                let peers = peers.iter();
                CompiledPeers::OneOf(
                    peers
                        .map(|peer| self.retain_peer(peer, groups, progress))
                        .collect(),
                )
            }
        }
    }
}
