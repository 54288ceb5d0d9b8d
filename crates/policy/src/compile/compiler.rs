//! The state of the compiler, and queries about it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use ipnet::IpNet;
use palisade_abi::{Direction, Identity};
use palisade_model::{
    diagnostic::Diagnostic,
    inventory::{Enforcement, Inventory},
    labels::Labels,
    rule::{Location, Peer, Policy, PolicyKind},
    snapshot::{RuleKey, Snapshot, inspector_name},
};
use serde::{Deserialize, Serialize};

use super::{
    learned_index::LearnedNames,
    named_ports::NamedPortOwners,
    named_prefixes::NamedPrefixes,
    numbers::{RuleIds, RuleSetIds},
    peers::PeerCache,
    resource_name::ResourceName,
    select::{IdentityIndex, ResolvedSelector},
    spec::{CompiledSpec, FileContent, SpecKey},
    subject::Subject,
    table_rule::{Members, TableRule},
};
use crate::{
    classes::Classes,
    identity::{Allocator, AllocatorState},
};

/// Name of the file in [`Changes::files`](super::Changes::files) that has the failsafe ports of the configuration
/// ([`PolicyKind::Failsafe`]). The name ends like no policy file.
pub const FAILSAFE_FILE: &str = "[failsafe]";

/// State to keep over a restart, so that numbers keep their meaning.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CompilerState {
    /// Identity numbers.
    pub identities: AllocatorState,
    /// Rule ids by file name and `RuleKey`, both in one text.
    pub rules: BTreeMap<String, u32>,
    /// First policy id that has never been used.
    pub next_policy: u32,
    /// Last revision that has been used.
    pub revision: u32,
}

/// Compiles policies and an inventory to [`Snapshot`]s.
#[derive(Clone, Debug, Default)]
pub struct Compiler {
    pub(super) inventory: Inventory,
    pub(super) files: BTreeMap<String, Arc<FileContent>>,
    /// File and place of each resource.
    pub(super) owners: HashMap<ResourceName, (Arc<str>, Location)>,
    pub(super) identities: Allocator,
    pub(super) rule_ids: RuleIds,
    pub(super) rulesets: RuleSetIds,
    pub(super) classes: Classes,
    pub(super) identity_index: IdentityIndex,
    /// Prefixes that policies name, with the number of distinct peers that name each.
    pub(super) prefixes: BTreeMap<IpNet, u32>,
    pub(super) peers: PeerCache,
    /// Prefixes and addresses of the inventory.
    pub(super) named: NamedPrefixes,
    pub(super) specs: BTreeMap<SpecKey, Arc<CompiledSpec>>,
    pub(super) names: LearnedNames,
    pub(super) subjects: Vec<Subject>,
    /// Named ports of all endpoints and peers.
    pub(super) named_ports: NamedPortOwners,
    pub(super) next_policy: u32,
    /// Cached cost of regular expressions, in automaton states.
    pub(super) expressions: HashMap<String, usize>,
    pub(super) snapshot: Snapshot,
}

impl Compiler {
    /// Creates a compiler without policies and with an empty inventory.
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

    /// Returns the state to keep for [`Self::new`].
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

    /// Tells the compiler from which rule number on the programs have no counters.
    pub const fn limit_rules(&mut self, limit: u32) {
        self.rule_ids.limit = limit;
    }

    /// Returns the highest rule number that was given to a rule.
    #[must_use]
    pub const fn last_rule(&self) -> u32 {
        self.rule_ids.last
    }

    /// Returns the rule numbers that no present rule has, without those of [`Self::reuse_rules`]. Records, conntrack entries
    /// and counters can still have them.
    #[must_use]
    pub fn unused_rules(&self) -> BTreeSet<u32> {
        let tables = self.snapshot.tables.values();
        let of_tables = tables.flat_map(|table| table.entries.values().map(|entry| entry.rule));
        let specs = self.specs.values();
        let of_specs = specs.flat_map(|spec| spec.sections.iter().flatten().map(|rule| rule.id));
        let verdicts = self.subjects.iter().flat_map(|subject| &subject.default_verdict);
        let of_verdicts = verdicts.flatten().map(|verdict| verdict.rule);
        // The others are few, and the same whatever the policies are.
        let of_policies = |key: &RuleKey| {
            matches!(
                key,
                RuleKey::Rule(_) | RuleKey::DefaultDeny { .. } | RuleKey::DefaultAllow { .. }
            )
        };
        let infos = self.rule_ids.infos.iter();
        let fixed = infos
            .filter(|(_, info)| !of_policies(&info.key))
            .map(|(id, _)| *id);
        let used = of_tables
            .chain(of_specs)
            .chain(of_verdicts)
            .chain(fixed)
            .collect();
        self.rule_ids.others(&used)
    }

    /// Lets new rules have these numbers of [`Self::unused_rules`], and forgets the rules that had them. The caller warrants
    /// that no record, conntrack entry or counter has them.
    pub fn reuse_rules(&mut self, numbers: &BTreeSet<u32>) {
        self.rule_ids.release(numbers);
        self.snapshot.rules = Arc::clone(&self.rule_ids.infos);
    }

    /// Returns the numbers of the rule sets that no policy table has any more. Conntrack entries can still have them.
    #[must_use]
    pub fn unused_rule_sets(&self) -> BTreeSet<u32> {
        let tables = self.snapshot.tables.values();
        let used: BTreeSet<u32> = tables
            .flat_map(|table| table.entries.values().map(|entry| entry.ruleset))
            .collect();
        let known = self.rulesets.sets.keys();
        known.filter(|id| !used.contains(id)).copied().collect()
    }

    /// Forgets rule sets of [`Self::unused_rule_sets`] that nothing refers to any more. An inspector drops what still does.
    pub fn forget_rule_sets(&mut self, numbers: &BTreeSet<u32>) {
        self.rulesets.forget(numbers);
        self.snapshot.rulesets = Arc::clone(&self.rulesets.sets);
    }

    /// Makes the compiler avoid the policy ids, identities and revisions that the maps hold after a restart of the daemon.
    /// Rule numbers stay: with other numbers a rule set would be another one, and connections that were inspected under it
    /// before would need an inspection again.
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

    /// Raises the revisions of endpoints in the snapshot. Once a plan has written the new revisions, the flows of the
    /// endpoints are evaluated again.
    pub fn reevaluate_flows(&mut self, endpoints: impl IntoIterator<Item = u16>) {
        // A revision grows in steps of two: a plan can write the number in between first, and raise it once more at its
        // end.
        let revision = self.snapshot.revision.wrapping_add(2);
        for endpoint in endpoints {
            if let Some(state) = self.snapshot.endpoints.get_mut(&endpoint) {
                state.revision = revision;
                self.snapshot.revision = revision;
            }
        }
    }

    /// Returns the result of the last update.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Returns the inventory of the last update.
    #[must_use]
    pub fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// Returns the content of each policy file in use, with the name of the file. [`FAILSAFE_FILE`] is left out.
    pub fn files(&self) -> impl Iterator<Item = (&str, &Arc<FileContent>)> {
        self.files
            .iter()
            .filter(|(name, _)| *name != FAILSAFE_FILE)
            .map(|(name, content)| (name.as_str(), content))
    }

    /// Returns each distinct peer of the policies, with the number of its uses in rules and the identities that the
    /// peer selects. A `toFQDNs` selector selects the identities of addresses that were learned through it.
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

    /// Returns the policies that select an endpoint.
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
        for (_, applied) in subject.applied_specs() {
            let policy = applied.unit.policy();
            if policy.kind == PolicyKind::Failsafe {
                continue;
            }
            if policies.last().is_none_or(|last| !std::ptr::eq(*last, policy)) {
                policies.push(policy);
            }
        }
        policies
    }

    /// Returns the warnings about policies that select an endpoint, for one direction, such as port names without
    /// effect and groups of prefixes that do not exist.
    pub fn remarks_of(&self, endpoint: u16, direction: Direction) -> impl Iterator<Item = &Diagnostic> {
        self.subjects
            .iter()
            .filter(move |subject| subject.endpoints.iter().any(|(id, _)| *id == endpoint))
            .flat_map(Subject::applied_specs)
            .flat_map(move |(_, applied)| &applied.remarks[direction as usize])
    }

    /// Returns whether a peer of a rule selects an identity with these labels. A `toFQDNs` selector selects identities
    /// by their `fqdn` labels.
    #[must_use]
    pub fn selects(&self, peer: &Peer, labels: &Labels) -> bool {
        let groups = match peer {
            Peer::CidrGroup { .. } | Peer::CidrGroupSelector { .. } => self.groups(),
            _ => Vec::new(),
        };
        ResolvedSelector::of(peer, &groups.iter().collect::<Vec<_>>()).matches(labels)
    }

    /// Returns how far each rule of an endpoint's policies for one direction matches a packet. Rules that name no peer
    /// are missing.
    #[must_use]
    pub fn rule_matches(
        &self,
        endpoint: u16,
        direction: Direction,
        other: Identity,
        protocol: u8,
        port: u16,
    ) -> BTreeMap<u32, RuleMatch> {
        let mut found: BTreeMap<u32, RuleMatch> = BTreeMap::new();
        for rule in self.table_rules_of(endpoint, direction) {
            let peer = self.names_peer(rule, other);
            let port = rule
                .ports
                .iter()
                .any(|ports| ports.set.contains(protocol, Some(port)));
            let known = found.entry(rule.id).or_default();
            known.peer |= peer;
            known.port |= port;
            known.both |= peer && port;
        }
        found
    }

    /// Returns the ids of the rules that match a packet of an endpoint, each with the effect that the rule would have
    /// alone.
    #[must_use]
    pub fn matching_rules(
        &self,
        endpoint: u16,
        direction: Direction,
        other: Identity,
        protocol: u8,
        port: u16,
    ) -> Vec<(u32, String)> {
        let mut found = Vec::new();
        for rule in self.table_rules_of(endpoint, direction) {
            let ports = rule
                .ports
                .iter()
                .filter(|ports| ports.set.contains(protocol, Some(port)));
            let named = self.names_peer(rule, other);
            for ports in ports.filter(|_| named) {
                let effect = match &ports.l7 {
                    _ if rule.failsafe => "pass before the policy at a NIC".to_owned(),
                    _ if rule.denies => "deny".to_owned(),
                    _ if rule.auth_required => "authenticate".to_owned(),
                    Some(l7) => {
                        format!("inspect {}", inspector_name(l7.kind as u8))
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

    /// Returns the rules of the policies that select an endpoint, for one direction; none if nothing is enforced.
    fn table_rules_of(&self, endpoint: u16, direction: Direction) -> impl Iterator<Item = &TableRule> {
        self.subjects
            .iter()
            .filter(|_| self.inventory.options.enforcement != Enforcement::Never)
            .find(|subject| subject.endpoints.iter().any(|(id, _)| *id == endpoint))
            .into_iter()
            .flat_map(Subject::applied_specs)
            .flat_map(move |(_, applied)| &applied.rules[direction as usize])
    }

    fn names_peer(&self, rule: &TableRule, other: Identity) -> bool {
        match &rule.members {
            Members::Any => !rule.excepts(other),
            Members::Of(peers) => match self.names.identities().get(&other) {
                Some(identity) => peers.iter().any(|peer| peer.means(identity)),
                None => peers.iter().any(|peer| peer.members.contains(&other)),
            },
        }
    }
}

/// How far a rule matches a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleMatch {
    /// Whether the rule selects the peer.
    pub peer: bool,
    /// Whether the rule has the protocol and port.
    pub port: bool,
    /// Whether the rule has the protocol and port towards this peer: peers can number a port name differently.
    pub both: bool,
}
