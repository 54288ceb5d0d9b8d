//! The published state: names for the numbers in events, and texts for the content of maps.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock},
};

use ipnet::IpNet;
use palisade_abi::{CLASS_ANY, CLASS_SLOTS, Class, Identity, protocol};
use palisade_flowlog::{FlowResolver, Owner, Policy as FlowPolicy, RuleInfo as FlowRule, flow::Workload};
use palisade_model::{
    inventory::Inventory,
    rule::PolicyKind,
    snapshot::{RuleInfo, RuleKey, Snapshot},
};

use super::{fqdn::FqdnManager, units::Units};

/// The state in force.
#[derive(Debug, Default)]
pub(super) struct View {
    /// Name of the node.
    pub node: Arc<str>,
    /// Content of the maps.
    pub snapshot: Snapshot,
    /// Names of interfaces by index.
    pub interfaces: BTreeMap<u32, Arc<str>>,
    /// Learned names of endpoints.
    pub learned: Option<Arc<FqdnManager>>,
    /// Units of the node's sockets.
    units: Option<Arc<Units>>,
    /// Number of changes that were put in force: the revision in flow records.
    revision: u64,
    /// Labels of the node, `key=value`.
    node_labels: Arc<[Arc<str>]>,
    /// Kinds of policies by their names, made at the first use.
    kinds: OnceLock<HashMap<Arc<str>, PolicyKind>>,
    owners: HashMap<u16, Owner>,
    addresses: HashMap<IpAddr, Owner>,
}

impl View {
    /// Returns the view of a state.
    pub(super) fn new(
        node: &str,
        snapshot: Snapshot,
        inventory: &Inventory,
        links: &BTreeMap<String, u32>,
        (learned, units): (Option<Arc<FqdnManager>>, Option<Arc<Units>>),
        revision: u64,
    ) -> Self {
        let mut owners = HashMap::new();
        let mut addresses = HashMap::new();
        for peer in &inventory.peers {
            let name = peer.name.as_str().into();
            let owner = Owner {
                workloads: Workload::of_endpoint(&name),
                name,
                namespace: peer
                    .labels
                    .get("k8s", "io.kubernetes.pod.namespace")
                    .unwrap_or_default()
                    .into(),
                ..Owner::default()
            };
            for prefix in &peer.prefixes {
                if prefix.prefix_len() == prefix.max_prefix_len() {
                    let identity = snapshot.identity_of(prefix.addr()).identity;
                    addresses.insert(
                        prefix.addr(),
                        Owner {
                            identity,
                            ..owner.clone()
                        },
                    );
                }
            }
        }
        for endpoint in &inventory.endpoints {
            let name = endpoint.name.as_str().into();
            let owner = Owner {
                workloads: if endpoint.is_node() {
                    Arc::default()
                } else {
                    Workload::of_endpoint(&name)
                },
                endpoint: endpoint.id,
                identity: snapshot
                    .endpoints
                    .get(&endpoint.id)
                    .map_or(0, |state| state.identity),
                namespace: endpoint.namespace.as_str().into(),
                name,
            };
            for address in &endpoint.addresses {
                addresses.insert(*address, owner.clone());
            }
            owners.insert(endpoint.id, owner);
        }
        Self {
            node: node.into(),
            snapshot,
            interfaces: links
                .iter()
                .map(|(name, index)| (*index, name.as_str().into()))
                .collect(),
            learned,
            units,
            revision,
            node_labels: node_labels(inventory),
            kinds: OnceLock::new(),
            owners,
            addresses,
        }
    }

    /// Returns the owner of an endpoint number.
    pub(super) fn owner(&self, endpoint: u16) -> Option<&Owner> {
        self.owners.get(&endpoint)
    }

    /// Returns the owner of an address.
    pub(super) fn owner_of(&self, address: IpAddr) -> Option<&Owner> {
        self.addresses.get(&address)
    }

    /// Returns the endpoints and the named peers, one for each of their addresses, and endpoints without an address.
    pub(super) fn owners(&self) -> impl Iterator<Item = (&Owner, Option<IpAddr>)> {
        let of_addresses = self
            .addresses
            .iter()
            .map(|(address, owner)| (owner, Some(*address)));
        let endpoints = self.owners.values().map(|owner| (owner, None));
        of_addresses.chain(endpoints)
    }

    /// Returns the labels of an identity as `source:key=value`.
    pub(super) fn labels(&self, identity: Identity) -> Vec<String> {
        let labels = self.snapshot.identities.get(&identity);
        labels.map_or_else(Vec::new, |labels| {
            labels.iter().map(ToString::to_string).collect()
        })
    }

    /// Returns the kind of a policy, if a rule of this policy is or was in force.
    fn kind_of(&self, policy: &str) -> Option<PolicyKind> {
        let kinds = self.kinds.get_or_init(|| {
            let places = self.snapshot.rules.values().filter_map(|rule| match &rule.key {
                RuleKey::Rule(place) => Some((Arc::clone(&place.policy), place.kind)),
                _ => None,
            });
            places.collect()
        });
        kinds.get(policy).copied()
    }

    /// Returns the text of a rule.
    pub(super) fn rule(&self, id: u32) -> String {
        self.snapshot
            .rules
            .get(&id)
            .map_or_else(|| format!("rule {id}"), ToString::to_string)
    }
}

/// Names of the numbers in the maps.
pub(super) trait MapNames {
    /// Returns the labels of an identity; empty if they are not known.
    fn labels(&self, identity: Identity) -> Vec<String>;

    /// Returns the text of a rule.
    fn rule(&self, rule: u32) -> String;
}

impl MapNames for View {
    fn labels(&self, identity: Identity) -> Vec<String> {
        self.labels(identity)
    }

    fn rule(&self, rule: u32) -> String {
        self.rule(rule)
    }
}

/// The current view. Readers take a reference and never wait for a compilation.
#[derive(Debug, Default)]
pub(super) struct Shared(RwLock<Arc<View>>);

impl Shared {
    /// Returns the current view.
    pub(super) fn get(&self) -> Arc<View> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the current view.
    pub(super) fn set(&self, view: View) {
        let view = Arc::new(view);
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = view;
    }
}

/// Names for the numbers in events, cached for one view.
pub(super) struct EventNames {
    view: Arc<View>,
    /// Whether the units of sockets are looked up.
    has_units: bool,
    labels: Mutex<HashMap<Identity, Arc<[Arc<str>]>>>,
    rules: Mutex<HashMap<u32, FlowRule>>,
}

/// Locks the mutex. A poisoned mutex is used too, because no panic can leave the map that it protects inconsistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EventNames {
    /// Returns the names of a view, without the units of the node's sockets.
    pub(super) fn new(view: Arc<View>) -> Self {
        Self {
            view,
            has_units: false,
            labels: Mutex::default(),
            rules: Mutex::default(),
        }
    }

    /// Returns the names of a view for flows of the ring, with the units of the node's sockets. Each flow of the node costs a
    /// lookup.
    pub(super) fn with_units(view: Arc<View>) -> Self {
        Self {
            has_units: true,
            ..Self::new(view)
        }
    }

    /// Returns whether these are the names of this view.
    pub(super) fn is_of(&self, view: &Arc<View>) -> bool {
        Arc::ptr_eq(&self.view, view)
    }
}

impl FlowResolver for EventNames {
    fn node(&self) -> Arc<str> {
        Arc::clone(&self.view.node)
    }

    fn node_labels(&self) -> Arc<[Arc<str>]> {
        Arc::clone(&self.view.node_labels)
    }

    fn labels(&self, identity: u32) -> Option<Arc<[Arc<str>]>> {
        if let Some(known) = lock(&self.labels).get(&identity) {
            return Some(Arc::clone(known));
        }
        let labels = self.view.snapshot.identities.get(&identity)?;
        let texts: Arc<[Arc<str>]> = labels.iter().map(|label| label.to_string().into()).collect();
        lock(&self.labels).insert(identity, Arc::clone(&texts));
        Some(texts)
    }

    fn endpoint(&self, id: u16) -> Option<Owner> {
        self.view.owners.get(&id).cloned()
    }

    fn address(&self, address: IpAddr) -> Option<Owner> {
        self.view.addresses.get(&address).cloned()
    }

    fn rule(&self, id: u32) -> Option<FlowRule> {
        if let Some(known) = lock(&self.rules).get(&id) {
            return Some(known.clone());
        }
        let rule = flow_rule(self.view.snapshot.rules.get(&id)?, &self.view);
        lock(&self.rules).insert(id, rule.clone());
        Some(rule)
    }

    fn dns_names(&self, endpoint: u16, address: IpAddr) -> Arc<[Arc<str>]> {
        let learned = self.view.learned.as_ref();
        learned
            .map(|names| names.names_of(endpoint, address))
            .unwrap_or_default()
    }

    fn unit(&self, protocol: u8, local: SocketAddr, remote: SocketAddr) -> Arc<[Workload]> {
        let units = self.view.units.as_ref().filter(|_| self.has_units);
        units
            .map(|units| units.of(protocol, local, remote))
            .unwrap_or_default()
    }

    fn interface(&self, ifindex: u32) -> Option<Arc<str>> {
        self.view.interfaces.get(&ifindex).cloned()
    }
}

/// Returns the `kind` of a policy in its file.
pub(super) const fn kind_name(kind: PolicyKind) -> &'static str {
    match kind {
        PolicyKind::Cnp => "CiliumNetworkPolicy",
        PolicyKind::Ccnp => "CiliumClusterwideNetworkPolicy",
        PolicyKind::Knp => "NetworkPolicy",
        PolicyKind::Raw => "rule",
        PolicyKind::Failsafe => "failsafe",
    }
}

/// Returns the labels of the node's endpoint, without those that Palisade itself sets.
fn node_labels(inventory: &Inventory) -> Arc<[Arc<str>]> {
    let node = inventory.endpoints.iter().find(|endpoint| endpoint.is_node());
    let labels = node.into_iter().flat_map(|node| node.labels.iter());
    labels
        .filter(|label| label.source != "reserved")
        .map(|label| format!("{}={}", label.key, label.value).into())
        .collect()
}

fn flow_rule(rule: &RuleInfo, view: &View) -> FlowRule {
    let policy = |qualified: &str, kind: &str| {
        let (namespace, name) = match qualified.split_once('/') {
            Some(parts) if kind != kind_name(PolicyKind::Failsafe) => parts,
            _ => ("", qualified),
        };
        FlowPolicy {
            name: name.into(),
            namespace: namespace.into(),
            kind: kind.into(),
            revision: view.revision,
            ..FlowPolicy::default()
        }
    };
    let default_deny = matches!(
        rule.key,
        RuleKey::DefaultDeny { .. } | RuleKey::AlwaysEnforced { .. } | RuleKey::InitEndpoint { .. }
    );
    let policies = match &rule.key {
        RuleKey::Rule(place) => vec![policy(&place.policy, kind_name(place.kind))],
        RuleKey::DefaultDeny { policy: name, .. } | RuleKey::DefaultAllow { policy: name, .. } => {
            vec![policy(name, view.kind_of(name).map_or("", kind_name))]
        }
        RuleKey::AlwaysEnforced { .. }
        | RuleKey::NotEnforced { .. }
        | RuleKey::LocalhostAlways
        | RuleKey::InitEndpoint { .. } => Vec::new(),
    };
    let location = rule.location.as_ref().filter(|location| location.line > 0);
    FlowRule {
        policies: policies.into(),
        text: RuleInfo {
            location: None,
            ..rule.clone()
        }
        .to_string()
        .into(),
        location: location.map_or_else(Arc::default, |at| format!("{}:{}", at.file, at.line).into()),
        default_deny,
    }
}

/// Returns the ports of each port class, in the form `80/TCP`, `8000-8999/UDP`, `ANY/SCTP`, `ICMP 8`.
pub(super) fn class_names(classes: &[Class]) -> HashMap<Class, Vec<String>> {
    let mut names: HashMap<Class, Vec<String>> = HashMap::new();
    names.insert(CLASS_ANY, vec!["ANY".to_owned()]);
    if classes.len() != CLASS_SLOTS {
        return names;
    }
    for (number, name) in [
        (protocol::TCP, "TCP"),
        (protocol::UDP, "UDP"),
        (protocol::SCTP, "SCTP"),
    ] {
        let class = |port: u16| classes[palisade_abi::class_slot(number, port) as usize];
        for (class, first, last) in runs(class, u16::MAX) {
            let ports = match (first, last) {
                (0, u16::MAX) => "ANY".to_owned(),
                (first, last) if first == last => first.to_string(),
                (first, last) => format!("{first}-{last}"),
            };
            names.entry(class).or_default().push(format!("{ports}/{name}"));
        }
    }
    for (number, name) in [(protocol::ICMP, "ICMP"), (protocol::ICMPV6, "ICMPv6")] {
        let class = |kind: u16| classes[palisade_abi::class_slot(number, kind) as usize];
        for (class, first, last) in runs(class, 255) {
            let kinds = match (first, last) {
                (0, 255) => format!("ANY/{name}"),
                (first, last) if first == last => format!("{name} {first}"),
                (first, last) => format!("{name} {first}-{last}"),
            };
            names.entry(class).or_default().push(kinds);
        }
    }
    let with_slots_of_their_own = [
        protocol::TCP,
        protocol::UDP,
        protocol::SCTP,
        protocol::ICMP,
        protocol::ICMPV6,
    ];
    let class = |number: u16| {
        let number = u8::try_from(number).unwrap_or(u8::MAX);
        if with_slots_of_their_own.contains(&number) {
            CLASS_ANY
        } else {
            classes[palisade_abi::class_slot(number, 0) as usize]
        }
    };
    for (class, first, last) in runs(class, 255) {
        if class != CLASS_ANY {
            let protocols = if first == last {
                format!("protocol {first}")
            } else {
                format!("protocols {first}-{last}")
            };
            names.entry(class).or_default().push(protocols);
        }
    }
    names
}

/// Returns the ranges of numbers with equal class, each as class, first number and last number.
fn runs(class: impl Fn(u16) -> Class, last: u16) -> Vec<(Class, u16, u16)> {
    let mut runs: Vec<(Class, u16, u16)> = Vec::new();
    for at in 0..=last {
        let class = class(at);
        match runs.last_mut() {
            Some(run) if run.0 == class => run.2 = at,
            _ => runs.push((class, at, at)),
        }
    }
    runs
}

/// Returns a key of the prefix trie as a prefix of its address family.
pub(super) fn prefix_text(key: palisade_abi::PrefixKey) -> String {
    let address = IpAddr::from(key.addr);
    let length = match address {
        IpAddr::V4(_) => key.length.saturating_sub(96),
        IpAddr::V6(_) => key.length,
    };
    let length = u8::try_from(length).unwrap_or(u8::MAX);
    IpNet::new(address, length).map_or_else(|_| format!("{address}/{length}"), |net| net.to_string())
}

#[cfg(test)]
mod tests {
    use palisade_abi::{PrefixKey, class_slot};

    use super::*;

    #[test]
    fn classes_are_named_by_their_ports() {
        let mut classes = vec![1; CLASS_SLOTS];
        let mut set = |protocol, port, class| classes[class_slot(protocol, port) as usize] = class;
        set(protocol::TCP, 80, 2);
        for port in 8_000..=8_999 {
            set(protocol::TCP, port, 3);
        }
        set(protocol::UDP, 53, 2);
        set(protocol::ICMP, 8, 4);
        set(112, 0, 5);
        let names = class_names(&classes);
        assert_eq!(names[&CLASS_ANY], ["ANY"]);
        assert_eq!(names[&2], ["80/TCP", "53/UDP"]);
        assert_eq!(names[&3], ["8000-8999/TCP"]);
        assert_eq!(names[&4], ["ICMP 8"]);
        assert_eq!(names[&5], ["protocol 112"]);
        assert!(names[&1].contains(&"ANY/SCTP".to_owned()));
        assert!(names[&1].contains(&"0-79/TCP".to_owned()));
    }

    #[test]
    fn prefixes_are_written_in_their_family() {
        let key = |addr: &str, length| PrefixKey {
            length,
            addr: addr.parse::<IpAddr>().unwrap().into(),
        };
        assert_eq!(prefix_text(key("10.0.0.0", 104)), "10.0.0.0/8");
        assert_eq!(prefix_text(key("2001:db8::", 32)), "2001:db8::/32");
        // The IPv6 prefix that covers all IPv4-mapped addresses.
        assert_eq!(prefix_text(key("::", 0)), "::/0");
    }
}
