//! Compiles policies and inventory, and changes the maps from one compiled state to the next.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use anyhow::Context as _;
use ipnet::IpNet;
use palisade_abi::{CLASS_ANY, Decision, Direction, Identity, entry_flags, identity};
use palisade_datapath::{ApplyError, Datapath, Dump};
use palisade_fqdn::{EndpointId, ListedPrefixes, SelectorId, Selectors};
use palisade_model::{
    inventory::{Endpoint, Inventory, NamedPorts, Options, Peer},
    labels::{Labels, reserved},
    learned_identities::{LearnedIdentities, LearnedSet, SelectorList},
    rule::{FqdnPattern, Peer as RulePeer, Peers},
    snapshot::{MapContents, RuleSet, Snapshot, TableKey},
};
use palisade_policy::{
    compile::{Changes, Compiler, FAILSAFE_FILE, FileContent},
    plan::plan,
};
use tracing::error;

use super::{
    fqdn::{self, Change, ControlRequest, FqdnManager, IdentityResolver, Transition},
    network::Network,
    policies::{ParsedFiles, PolicyFiles},
    state::{NODE, State},
};
use crate::config::{Config, with_option};

/// Rule sets by number.
pub(super) type RuleSets = BTreeMap<u32, Arc<RuleSet>>;

/// Maximum number of selector sets of learned addresses per endpoint for which identities are made on request. An
/// address of the world that matches a single selector always has an identity.
const MAX_SETS_PER_ENDPOINT: usize = 256;

/// The compiler, and which of its results the maps hold.
#[derive(Debug)]
pub(super) struct Enforcer {
    /// The compiler.
    pub compiler: Compiler,
    /// Content of the maps.
    in_maps: Snapshot,
    /// Last state that the maps held completely.
    good: Option<Snapshot>,
    /// Selector sets of learned addresses for which identities are made: the sets in `granted` of all endpoints.
    wanted: BTreeSet<LearnedSet>,
    /// Granted selector sets, by endpoint; see [`Enforcer::grant`].
    granted: HashMap<EndpointId, HashSet<LearnedSet>>,
    /// Compiled selectors, keyed by the memory address of their source list.
    compiled: CompiledSelectors,
    /// Failsafe ports that the compiler does not have yet.
    failsafe: Option<FileContent>,
    /// The failsafe ports of the last [`Self::set_failsafe`].
    known_failsafe: Option<FileContent>,
    /// Why the maps do not hold the compiler's state.
    pub problem: Option<String>,
}

impl Enforcer {
    /// Returns whether the maps do not hold the compiler's state, so that [`Self::enforce`] is due.
    pub(super) const fn is_behind(&self) -> bool {
        self.problem.is_some() || self.good.is_none()
    }

    /// Returns an enforcer that starts from the current content of the maps.
    pub(super) fn new(mut compiler: Compiler, datapath: &Datapath) -> anyhow::Result<Self> {
        let in_maps = found(datapath.dump()?);
        let learned = palisade_model::snapshot::Learned {
            entries: datapath.learned()?.into_iter().collect(),
            ..Default::default()
        };
        compiler.avoid(&Snapshot {
            learned,
            ..in_maps.clone()
        });
        Ok(Self {
            compiler,
            in_maps,
            good: None,
            wanted: BTreeSet::new(),
            granted: HashMap::new(),
            compiled: HashMap::new(),
            failsafe: None,
            known_failsafe: None,
            problem: None,
        })
    }

    /// Makes the next [`Self::compile`] use these failsafe ports.
    pub(super) fn set_failsafe(&mut self, content: FileContent) {
        if self.known_failsafe.as_ref() != Some(&content) {
            self.known_failsafe = Some(content.clone());
            self.failsafe = Some(content);
        }
    }

    /// Compiles a new inventory and all new policy files. If the compiler refuses them together, inventory and files
    /// are tried separately, so that one bad file does not prevent the others from taking effect.
    pub(super) fn compile(&mut self, inventory: Option<Inventory>, files: &mut PolicyFiles) {
        let failsafe = self.failsafe.take();
        let with_failsafe = |mut files: ParsedFiles| {
            if let Some(content) = &failsafe {
                files.insert(FAILSAFE_FILE.to_owned(), Some(content.clone()));
            }
            files
        };
        let parsed = files.parsed_files();
        let names: Vec<String> = parsed.keys().cloned().collect();
        let parsed = with_failsafe(parsed);
        let Err(problems) = self.compiler.update(Changes {
            inventory: inventory.clone(),
            files: parsed,
        }) else {
            for name in names {
                files.accepted(&name);
            }
            return;
        };
        if (inventory.is_some() || failsafe.is_some())
            && let Err(problems) = self.compiler.update(Changes {
                inventory,
                files: with_failsafe(ParsedFiles::new()),
            })
        {
            for problem in problems {
                error!(
                    error = problem.message,
                    "the configured endpoints, peers and failsafe ports cannot be compiled"
                );
            }
        }
        if let [name] = names.as_slice() {
            return self.refuse(name, problems, files);
        }
        // Usually all files that the errors do not name compile together. Trying each file alone takes long with
        // thousands of files.
        let is_named = |name: &String| {
            let shown = files.shown(name);
            problems.iter().any(|problem| *problem.location.file == *shown)
        };
        let (named, rest): (Vec<String>, Vec<String>) = names.iter().cloned().partition(is_named);
        if !named.is_empty() && !rest.is_empty() {
            let parsed = rest
                .iter()
                .map(|name| (name.clone(), files.parsed(name)))
                .collect();
            let changes = Changes {
                inventory: None,
                files: parsed,
            };
            if self.compiler.update(changes).is_ok() {
                for name in &rest {
                    files.accepted(name);
                }
                return self.one_by_one(&named, files);
            }
        }
        self.one_by_one(&names, files);
    }

    fn one_by_one(&mut self, names: &[String], files: &mut PolicyFiles) {
        let parsed = names.iter().map(|name| (name, files.parsed(name)));
        // Removals come first, because a removed file can resolve a conflict of an added one.
        let (gone, here): (Vec<_>, Vec<_>) = parsed.partition(|(_, content)| content.is_none());
        for (name, content) in gone.into_iter().chain(here) {
            let changes = Changes {
                inventory: None,
                files: [(name.clone(), content)].into(),
            };
            match self.compiler.update(changes) {
                Ok(_) => files.accepted(name),
                Err(problems) => self.refuse(name, problems, files),
            }
        }
    }

    /// Handles a file that the compiler refuses. The last good copy of the file is compiled, unless content of the file
    /// is in force already.
    fn refuse(
        &mut self,
        name: &str,
        problems: Vec<palisade_model::diagnostic::Diagnostic>,
        files: &mut PolicyFiles,
    ) {
        let Some(kept) = files.rejected(name, problems) else {
            return;
        };
        let changes = Changes {
            inventory: None,
            files: [(name.to_owned(), Some(kept))].into(),
        };
        match self.compiler.update(changes) {
            Ok(_) => files.accepted(name),
            Err(problems) => drop(files.rejected(name, problems)),
        }
    }

    /// Makes the maps hold the compiler's state, learned addresses included, in an order in which every packet meets
    /// either the old rules or the new ones. Returns whether the maps have changed. After a failure the last complete
    /// state, if there is one, is put back.
    ///
    /// `set_rules` is called with the rule sets before any map entry refers to them.
    pub(super) fn enforce(
        &mut self,
        datapath: &Datapath,
        names: &FqdnManager,
        mut set_rules: impl FnMut(&RuleSets),
    ) -> bool {
        let policy = self.names_policy();
        let endpoints = endpoint_names(self.compiler.inventory());
        let snapshot = self.compiler.snapshot();
        let all = self.good.as_ref().is_none_or(|good| may_differ(good, snapshot));
        // The FQDN manager is locked from here to the end, so no DNS answer is committed between two states.
        let mut change = names.change(&policy, &endpoints, all);
        let resolver = resolver(snapshot);
        if all {
            // Sets that no learned address uses any more get no identity in the new state.
            self.granted.clear();
            for (endpoint, address, set) in change.state.learned_map.in_use() {
                if let Some(set) = set_of(&resolver, address, set) {
                    self.grant(endpoint, set);
                }
            }
            self.collect_granted();
        }
        let missing = change.missing(&resolver);
        if !missing.is_empty() {
            for (endpoint, address, set) in &missing {
                if let Some(set) = set_of(&resolver, *address, set) {
                    self.grant(*endpoint, set);
                }
            }
            self.collect_granted();
            if let Err(problems) = self.compiler.learned(&self.wanted) {
                problems.iter().for_each(|problem| {
                    error!(
                        error = problem.message,
                        "identities of learned addresses cannot be compiled"
                    )
                });
            }
        }
        let wanted = self.compiler.snapshot().clone();
        let resolver = self::resolver(&wanted);
        let transition = change.plan(&resolver);
        set_rules(&wanted.rulesets);
        match self.apply(datapath, &wanted, &transition) {
            Ok(changed) => {
                self.problem = None;
                self.good = Some(wanted);
                change.done(&transition, Arc::new(resolver));
                changed
            }
            Err(problem) => {
                let problem = with_option(&problem);
                error!(
                    error = problem,
                    "the change is rolled back, the last policy stays in force"
                );
                self.problem = Some(problem);
                self.read_back(datapath);
                change.failed(&transition);
                self.roll_back(datapath, change);
                true
            }
        }
    }

    /// Puts back the last complete state of the maps. If that fails too, the next attempt starts from the actual
    /// content of the maps.
    fn roll_back(&mut self, datapath: &Datapath, mut change: Change<'_>) {
        let Some(good) = self.good.clone() else { return };
        let resolver = resolver(&good);
        let transition = change.plan(&resolver);
        match self.apply(datapath, &good, &transition) {
            Ok(_) => change.done(&transition, Arc::new(resolver)),
            Err(problem) => {
                error!(
                    error = with_option(&problem),
                    "the rollback to the last policy failed and is tried again"
                );
                self.read_back(datapath);
                change.failed(&transition);
            }
        }
    }

    /// Returns whether the node's policy drops packets of a direction by default; false in audit mode. The condition is
    /// that of `is_enforced` in xdp/src/link.rs.
    pub(super) fn node_enforces(&self, direction: Direction) -> bool {
        let snapshot = self.good.as_ref().unwrap_or_else(|| self.compiler.snapshot());
        let otherwise = TableKey {
            direction: direction as u8,
            identity: identity::ANY,
            class: CLASS_ANY,
        };
        let policy = snapshot.endpoints.get(&NODE).map(|state| state.policy);
        let table = policy.and_then(|policy| snapshot.tables.get(&policy));
        table
            .and_then(|table| table.entries.get(&otherwise))
            .is_none_or(|entry| {
                let is_open = entry.flags & entry_flags::UNENFORCED != 0
                    && Decision::from_u8(entry.decision) == Decision::Allow;
                !is_open && entry.flags & entry_flags::AUDIT == 0
            })
    }

    /// Applies the plan from the current content of the maps to another state. Returns whether the plan had any
    /// operation.
    fn apply(
        &mut self,
        datapath: &Datapath,
        to: &Snapshot,
        transition: &Transition,
    ) -> Result<bool, ApplyError> {
        let with = |snapshot: &Snapshot, learned: &palisade_model::snapshot::Learned| Snapshot {
            learned: learned.clone(),
            ..snapshot.clone()
        };
        let steps = plan(&with(&self.in_maps, &transition.old), &with(to, &transition.new));
        datapath.apply(&steps)?;
        self.in_maps = to.clone();
        Ok(!steps.is_empty())
    }

    fn read_back(&mut self, datapath: &Datapath) {
        match datapath.dump() {
            Ok(dump) => self.in_maps = found(dump),
            Err(error) => error!(%error, "the maps cannot be read back"),
        }
    }

    /// Makes the identities that pending DNS answers need. The cost depends on the number of these identities, not on
    /// the size of the policies. `set_rules`: see [`Self::enforce`].
    pub(super) fn extend(
        &mut self,
        datapath: &Datapath,
        names: &FqdnManager,
        mut set_rules: impl FnMut(&RuleSets),
    ) {
        names.rearm(ControlRequest::Identities);
        let mut state = names.lock();
        let before = resolver(self.compiler.snapshot());
        let missing = state.learned_map.missing(&state.view, false);
        let mut full = BTreeSet::new();
        for (endpoint, address, set) in missing {
            if let Some(set) = set_of(&before, address, &set)
                && !self.grant(endpoint, set)
            {
                full.insert(endpoint);
            }
        }
        if !full.is_empty() {
            // The sets in use are counted again before an answer is refused, because sets that are no longer used must
            // not count against the limit.
            self.count_granted(&state.learned_map, &before);
            let missing = state.learned_map.missing(&state.view, false);
            full.clear();
            for (endpoint, address, set) in missing {
                if let Some(set) = set_of(&before, address, &set)
                    && !self.grant(endpoint, set)
                {
                    full.insert(endpoint);
                }
            }
        }
        self.collect_granted();
        let outcome = match self.compiler.learned(&self.wanted) {
            Ok(update) => {
                if update.rulesets {
                    set_rules(&self.compiler.snapshot().rulesets);
                }
                datapath
                    .apply(&update.ops)
                    .map_err(|problem| with_option(&problem))
            }
            Err(problems) => Err(problems
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join("; ")),
        };
        match outcome {
            Ok(()) => {
                let now = self.compiler.snapshot().clone();
                names.extended(&mut state, Arc::new(resolver(&now)), &full);
                self.in_maps = now.clone();
                self.good = Some(now);
            }
            Err(problem) => {
                error!(
                    error = problem,
                    "DNS answers that need new identities are withheld"
                );
                self.problem = Some(problem);
                self.read_back(datapath);
            }
        }
    }

    /// Grants an identity to a selector set of an endpoint. Returns whether the set is granted. An endpoint can have at
    /// most [`MAX_SETS_PER_ENDPOINT`] sets: DNS servers choose which addresses share which names, and could otherwise
    /// choose the size of the endpoint's policy table.
    fn grant(&mut self, endpoint: EndpointId, set: LearnedSet) -> bool {
        let granted = self.granted.entry(endpoint).or_default();
        granted.contains(&set) || (granted.len() < MAX_SETS_PER_ENDPOINT && granted.insert(set))
    }

    /// Removes granted sets that no learned address of the endpoint uses any more.
    fn count_granted(&mut self, learned_map: &fqdn::LearnedMap, resolver: &SnapshotResolver) {
        let mut used: HashMap<EndpointId, HashSet<LearnedSet>> = HashMap::new();
        for (endpoint, address, set) in learned_map.in_use() {
            if let Some(set) = set_of(resolver, address, set) {
                used.entry(endpoint).or_default().insert(set);
            }
        }
        self.granted.retain(|endpoint, granted| {
            let used = used.get(endpoint);
            granted.retain(|set| used.is_some_and(|used| used.contains(set)));
            !granted.is_empty()
        });
    }

    fn collect_granted(&mut self) {
        self.wanted = self.granted.values().flatten().cloned().collect();
    }

    /// Removes from the compiler the identities of sets that no learned address uses any more, if there are enough of
    /// them to be worth a compilation. Returns whether any identity was removed; [`Self::enforce`] then removes these
    /// identities from the maps.
    pub(super) fn prune(&mut self, names: &FqdnManager) -> bool {
        /// Fewest unused sets that are worth a compilation.
        const MIN_PRUNED_SETS: usize = 32;
        if self.wanted.len() < MIN_PRUNED_SETS || self.problem.is_some() {
            return false;
        }
        let before = self.wanted.len();
        let resolver = resolver(self.compiler.snapshot());
        self.count_granted(&names.lock().learned_map, &resolver);
        self.collect_granted();
        if before - self.wanted.len() < MIN_PRUNED_SETS.max(self.wanted.len() / 4) {
            return false;
        }
        let outcome = self.compiler.learned(&self.wanted).and_then(|_| {
            // An update removes unused sets even if nothing else changes.
            self.compiler.update(Changes {
                inventory: None,
                files: BTreeMap::new(),
            })
        });
        match outcome {
            Ok(_) => true,
            Err(problems) => {
                for problem in problems {
                    error!(
                        error = problem.message,
                        "unused identities of learned addresses cannot be removed"
                    );
                }
                false
            }
        }
    }

    /// Returns the part of the policies that concerns names, for every endpoint with name selectors.
    fn names_policy(&mut self) -> fqdn::Policy {
        let (policy, compiled) = names_policy(&self.compiler, &self.compiled);
        self.compiled = compiled;
        policy
    }

    /// Returns the names in `matchName` selectors, each with the endpoints whose policies contain the selector.
    pub(super) fn full_names(&self) -> BTreeMap<String, BTreeSet<EndpointId>> {
        let mut names: BTreeMap<String, BTreeSet<EndpointId>> = BTreeMap::new();
        for (endpoint, list) in &self.compiler.snapshot().fqdn {
            for (_, pattern) in list.iter() {
                if let FqdnPattern::Name(name) = pattern {
                    names.entry(name.clone()).or_default().insert(*endpoint);
                }
            }
        }
        names
    }
}

/// Compiled selectors, keyed by the memory address of their source list.
pub(super) type CompiledSelectors = HashMap<usize, (SelectorList, Arc<Selectors>)>;

/// Returns the part of the policies that concerns names, for every endpoint with name selectors, and the compiled
/// selectors. Selectors in `known` are not compiled again.
pub(super) fn names_policy(
    compiler: &Compiler,
    known: &CompiledSelectors,
) -> (fqdn::Policy, CompiledSelectors) {
    let snapshot = compiler.snapshot();
    let mut policy = fqdn::Policy::default();
    let mut compiled = HashMap::new();
    for (endpoint, list) in &snapshot.fqdn {
        let at = Arc::as_ptr(list).cast::<u8>() as usize;
        let selectors = match compiled.get(&at).or_else(|| known.get(&at)) {
            Some((_, selectors)) => Arc::clone(selectors),
            None => {
                let numbered = list
                    .iter()
                    .map(|(number, pattern)| (SelectorId(*number), pattern));
                match Selectors::new(numbered) {
                    Ok(selectors) => Arc::new(selectors),
                    Err(problem) => {
                        error!(endpoint, error = %problem, "the name selectors of an endpoint cannot be compiled");
                        continue;
                    }
                }
            }
        };
        compiled.insert(at, (Arc::clone(list), Arc::clone(&selectors)));
        policy.selectors.insert(*endpoint, selectors);
        let denied = denied_patterns(compiler, *endpoint);
        let denied = list.iter().filter(|(_, pattern)| denied.contains(&pattern));
        let denied: Vec<SelectorId> = denied.map(|(number, _)| SelectorId(*number)).collect();
        policy
            .denied
            .extend(denied.iter().map(|selector| (*endpoint, *selector)));
        let prefixes = listed_prefixes(compiler, *endpoint);
        policy
            .listed
            .insert(*endpoint, Arc::new(ListedPrefixes { prefixes, denied }));
    }
    (policy, compiled)
}

/// Returns the names of endpoints by number.
pub(super) fn endpoint_names(inventory: &Inventory) -> BTreeMap<EndpointId, String> {
    let endpoints = inventory.endpoints.iter();
    endpoints
        .map(|endpoint| (endpoint.id, format!("{}/{}", endpoint.namespace, endpoint.name)))
        .collect()
}

/// Returns the prefixes that the egress rules of an endpoint list: `toCIDR`, `cidr` in `toCIDRSet`, and `ipBlock`.
fn listed_prefixes(compiler: &Compiler, endpoint: EndpointId) -> Vec<IpNet> {
    let policies = compiler.policies_of(endpoint);
    let prefixes: BTreeSet<IpNet> = policies
        .into_iter()
        .flat_map(|policy| &policy.specs)
        .flat_map(|spec| spec.egress.as_deref().unwrap_or_default())
        .filter_map(|rule| match &rule.peers {
            Peers::OneOf(peers) => Some(peers),
            Peers::Any | Peers::None => None,
        })
        .flatten()
        .filter_map(|peer| match peer {
            RulePeer::Cidr(rule) => Some(rule.cidr),
            _ => None,
        })
        .collect();
    prefixes.into_iter().collect()
}

/// Returns the name patterns in the egress deny rules of an endpoint.
fn denied_patterns(compiler: &Compiler, endpoint: EndpointId) -> Vec<&FqdnPattern> {
    let policies = compiler.policies_of(endpoint);
    let rules = policies.into_iter().flat_map(|policy| &policy.specs);
    rules
        .flat_map(|spec| spec.egress_deny.as_deref().unwrap_or_default())
        .filter_map(|rule| match &rule.peers {
            Peers::OneOf(peers) => Some(peers),
            Peers::Any | Peers::None => None,
        })
        .flatten()
        .filter_map(|peer| match peer {
            RulePeer::Fqdn(pattern) => Some(pattern),
            _ => None,
        })
        .collect()
}

/// Resolves learned addresses to identities, according to one snapshot of the compiler.
struct SnapshotResolver(LearnedIdentities);

fn resolver(snapshot: &Snapshot) -> SnapshotResolver {
    SnapshotResolver(snapshot.names.clone())
}

fn numbers(selectors: &[SelectorId]) -> Vec<u32> {
    selectors.iter().map(|id| id.0).collect()
}

/// Returns the set for which an address needs a granted identity; `None` if it needs none.
fn set_of(resolver: &SnapshotResolver, address: IpAddr, selectors: &[SelectorId]) -> Option<LearnedSet> {
    resolver.0.requested_set(address, &numbers(selectors))
}

impl IdentityResolver for SnapshotResolver {
    fn identity(&self, address: IpAddr, selectors: &[SelectorId]) -> Option<Identity> {
        // Nearly every address has one selector, so this case avoids an allocation.
        match selectors {
            [one] => self.0.identity(address, &[one.0]),
            several => self.0.identity(address, &numbers(several)),
        }
    }
}

/// Returns whether an address can have another identity in the new snapshot although its learned names are the same.
fn may_differ(old: &Snapshot, new: &Snapshot) -> bool {
    !Arc::ptr_eq(&old.addresses, &new.addresses)
        || !Arc::ptr_eq(&old.prefixes, &new.prefixes)
        || !Arc::ptr_eq(&old.identities, &new.identities)
        || (old.world_ipv4, old.world_ipv6) != (new.world_ipv4, new.world_ipv6)
}

/// Returns the snapshot that the maps hold.
fn found(dump: Dump) -> Snapshot {
    Snapshot::from_maps(MapContents {
        addresses: dump.addresses.into_iter().collect(),
        prefixes: dump.prefixes.into_iter().collect(),
        classes: dump.classes,
        policy: dump.policy,
        endpoints: dump.endpoints.into_iter().collect(),
        world_ipv4: dump.config.map_or(0, |config| config.world_ipv4),
        world_ipv6: dump.config.map_or(0, |config| config.world_ipv6),
    })
}

/// Returns the inventory: the node, its endpoints and peers, from the configuration and the node's own addresses. New
/// endpoints get a number in `state`.
pub(super) fn inventory<C>(
    config: &Config,
    network: &Network,
    state: &mut State<C>,
) -> anyhow::Result<Inventory> {
    let names: BTreeSet<String> = config
        .endpoints
        .iter()
        .map(crate::config::Endpoint::qualified_name)
        .collect();
    let names: BTreeSet<String> = names
        .into_iter()
        .chain(state.discovered.keys().cloned())
        .collect();
    let mut endpoints = Vec::new();
    for (name, found) in state.discovered.clone() {
        let id = state
            .endpoint(&name, |known| names.contains(known))
            .context("there are more endpoints than numbers for them (65,534)")?;
        endpoints.push(Endpoint {
            id,
            audit: state.audit.contains(&name),
            name: found.name,
            namespace: found.namespace,
            labels: found.labels,
            named_ports: NamedPorts::new(),
            addresses: found.addresses,
        });
    }
    for endpoint in &config.endpoints {
        let name = endpoint.qualified_name();
        let id = state
            .endpoint(&name, |known| names.contains(known))
            .context("there are more endpoints than numbers for them (65,534)")?;
        endpoints.push(Endpoint {
            id,
            name: endpoint.name.clone(),
            namespace: endpoint.namespace.clone(),
            labels: endpoint.labels.clone(),
            named_ports: endpoint.named_ports.clone(),
            addresses: endpoint.addresses.clone(),
            audit: state.audit.contains(&name),
        });
    }
    // An address of a configured endpoint belongs to the endpoint even if an interface of the node has it.
    let taken: BTreeSet<IpAddr> = endpoints
        .iter()
        .flat_map(|endpoint| endpoint.addresses.iter().copied())
        .collect();
    let own = network.addresses.iter().chain(&config.node.addresses).copied();
    let addresses: BTreeSet<IpAddr> = own.filter(|address| !taken.contains(address)).collect();
    endpoints.insert(
        0,
        Endpoint {
            id: NODE,
            name: config.node.name.clone(),
            namespace: String::new(),
            labels: Labels::new(config.node.labels.iter().cloned().chain([reserved("host")])),
            named_ports: NamedPorts::new(),
            addresses: addresses.into_iter().collect(),
            audit: state.audit.contains(&config.node.name),
        },
    );
    let peers = config.peers.iter().map(|peer| Peer {
        name: peer.name.clone(),
        labels: peer.labels.clone(),
        named_ports: NamedPorts::new(),
        prefixes: peer.addresses.clone(),
    });
    Ok(Inventory {
        options: Options {
            enforcement: config.policy.enforcement,
            allow_localhost: config.policy.allow_localhost,
            dual_stack: true,
            audit: config.policy.audit,
            clear_text_http2: config.http.clear_text_http2,
            some_nics_closed: config
                .interfaces
                .iter()
                .any(|nic| !config.failsafe.is_open_at(&nic.name)),
        },
        endpoints,
        peers: peers.collect(),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_node_has_its_interface_addresses_but_not_those_of_workloads() {
        let text = "[node]\nname = \"n1\"\naddresses = [\"192.0.2.9\"]\nlabels = { zone = \"a\" }\n\
                    [[endpoint]]\nname = \"web\"\ninterface = \"v\"\naddresses = [\"10.0.0.2\"]\n";
        let config = Config::parse(Path::new("/x"), text).unwrap();
        let network = Network {
            addresses: ["192.0.2.1", "10.0.0.2", "fe80::1"]
                .map(|a| a.parse().unwrap())
                .into(),
            ..Network::default()
        };
        let mut state = State::<()>::default();
        state.audit.insert("default/web".into());
        let inventory = inventory(&config, &network, &mut state).unwrap();
        let node = &inventory.endpoints[0];
        assert_eq!((node.id, node.is_node()), (NODE, true));
        assert_eq!(node.labels.to_string(), "k8s:zone=a,reserved:host");
        let addresses: Vec<String> = node.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["192.0.2.1", "192.0.2.9", "fe80::1"]);
        assert!(inventory.endpoints[1].audit && !node.audit);
        assert_eq!(inventory.endpoints[1].id, state.endpoints["default/web"]);
    }
}
