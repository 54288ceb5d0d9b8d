//! The output of the compiler: the content of the BPF maps, and the meaning of the numbers in them.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::Arc,
};

use palisade_abi::{
    Addr, CLASS_ANY, Class, Decision, Direction, EndpointState, INSIDE, Identity, Inspector, IpcacheEntry,
    LearnedKey, PolicyEntry, PolicyKey, PrefixKey, endpoint_flags, entry_flags, identity,
};

use crate::{
    diagnostic::Diagnostic,
    labels::Labels,
    learned_identities::{LearnedIdentities, SelectorList},
    rule::{FqdnPattern, HttpRule, KafkaRule, Listener, Location, PolicyKind, Section, TlsContext},
};

/// The desired content of the maps, and the meaning of the numbers in them.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Every identity in use, by number.
    pub identities: Arc<BTreeMap<Identity, Labels>>,
    /// Single addresses (the ipcache map).
    pub addresses: Arc<HashMap<Addr, IpcacheEntry>>,
    /// Prefixes that are shorter than an address (the trie).
    pub prefixes: Arc<HashMap<PrefixKey, IpcacheEntry>>,
    /// Class of every slot ([`palisade_abi::CLASS_SLOTS`] elements).
    pub classes: Arc<Vec<Class>>,
    /// Compiled tables by policy id.
    pub tables: BTreeMap<u32, Arc<Table>>,
    /// State of every endpoint, the node included, by endpoint number.
    pub endpoints: BTreeMap<u16, EndpointState>,
    /// Meaning of rule ids. Ids of removed rules stay, so that late events still have a rule name.
    pub rules: Arc<BTreeMap<u32, Arc<RuleInfo>>>,
    /// Application rules by the id in [`PolicyEntry::ruleset`].
    pub rulesets: Arc<BTreeMap<u32, Arc<RuleSet>>>,
    /// Identity of IPv4 addresses that no prefix contains.
    pub world_ipv4: Identity,
    /// Identity of IPv6 addresses that no prefix contains.
    pub world_ipv6: Identity,
    /// `toFQDNs` selectors in the egress rules of each endpoint; endpoints without selectors are absent.
    pub fqdn: BTreeMap<u16, SelectorList>,
    /// Identities of learned addresses.
    pub names: LearnedIdentities,
    /// Learned addresses that a plan must consider. The compiler leaves the field empty; the daemon fills it.
    pub learned: Learned,
    /// Highest revision that an endpoint has or had. Revisions grow in steps of two: a plan can use the numbers in
    /// between temporarily.
    pub revision: u32,
    /// Warnings of the compiler, such as port names without effect.
    pub diagnostics: Vec<Diagnostic>,
}

/// Content of the maps, read back after a restart.
#[derive(Clone, Debug, Default)]
pub struct MapContents {
    /// The ipcache map.
    pub addresses: HashMap<Addr, IpcacheEntry>,
    /// The prefix trie.
    pub prefixes: HashMap<PrefixKey, IpcacheEntry>,
    /// Class of every slot.
    pub classes: Vec<Class>,
    /// The policy map.
    pub policy: Vec<(PolicyKey, PolicyEntry)>,
    /// Endpoints that have a state.
    pub endpoints: Vec<(u16, EndpointState)>,
    /// Identity of IPv4 addresses that no prefix contains.
    pub world_ipv4: Identity,
    /// Identity of IPv6 addresses that no prefix contains.
    pub world_ipv6: Identity,
}

impl Snapshot {
    /// Creates a snapshot from maps that were read back, as the start of the first plan after a restart.
    ///
    /// `Compiler::avoid` must be called with this snapshot before the first update, so that new tables get unused
    /// policy ids. Each endpoint then keeps its old table until the plan switches it to the new table.
    #[must_use]
    pub fn from_maps(contents: MapContents) -> Self {
        let mut tables: BTreeMap<u32, Table> = BTreeMap::new();
        for (key, entry) in contents.policy {
            tables
                .entry(key.policy)
                .or_default()
                .entries
                .insert(TableKey::from(key), entry);
        }
        Self {
            addresses: Arc::new(contents.addresses),
            prefixes: Arc::new(contents.prefixes),
            classes: Arc::new(contents.classes),
            tables: tables
                .into_iter()
                .map(|(id, table)| (id, Arc::new(table)))
                .collect(),
            endpoints: contents.endpoints.into_iter().collect(),
            world_ipv4: contents.world_ipv4,
            world_ipv6: contents.world_ipv6,
            ..Self::default()
        }
    }
}

/// Addresses that endpoints have learned by name (the LEARNED map). Only entries that differ between the two snapshots
/// of a plan need to be listed.
#[derive(Clone, Debug, Default)]
pub struct Learned {
    /// Identity of each learned address of an endpoint.
    pub entries: BTreeMap<LearnedKey, Identity>,
    /// Identities of learned addresses that are not listed in `entries`.
    pub others: BTreeSet<Identity>,
}

/// A key of a [`Table`]: a [`PolicyKey`] without the policy id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableKey {
    /// A [`Direction`] as a number, with or without [`INSIDE`].
    pub direction: u8,
    /// Identity of the peer; [`identity::ANY`] for any.
    pub identity: Identity,
    /// Class of protocol and port; [`CLASS_ANY`] for any.
    pub class: Class,
}

impl TableKey {
    /// Returns the key of the policy map.
    #[must_use]
    pub const fn with_policy(self, policy: u32) -> PolicyKey {
        PolicyKey {
            policy,
            identity: self.identity,
            class: self.class,
            direction: self.direction,
            zero: 0,
        }
    }
}

impl From<PolicyKey> for TableKey {
    fn from(key: PolicyKey) -> Self {
        Self {
            direction: key.direction,
            identity: key.identity,
            class: key.class,
        }
    }
}

/// Policy table of one subject, or of several subjects with equal tables.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// Entries sorted by direction, identity and class, so that the entries of one identity are adjacent.
    pub entries: BTreeMap<TableKey, PolicyEntry>,
}

impl Table {
    /// Returns the flags `PLAIN_INGRESS` and `PLAIN_EGRESS` ([`endpoint_flags`]). Each is set if no entry of the
    /// direction inspects or denies explicitly.
    #[must_use]
    pub fn plain(&self) -> u32 {
        let mut plain = endpoint_flags::PLAIN_INGRESS | endpoint_flags::PLAIN_EGRESS;
        for (key, entry) in &self.entries {
            if matches!(
                Decision::from_u8(entry.decision),
                Decision::Inspect | Decision::DenyExplicit
            ) {
                plain &= !(endpoint_flags::PLAIN_INGRESS << (key.direction & 1));
            }
        }
        plain
    }

    /// Returns the entries of one direction and identity.
    pub fn row(&self, direction: u8, identity: Identity) -> impl Iterator<Item = (&TableKey, &PolicyEntry)> {
        let key = |class| TableKey {
            direction,
            identity,
            class,
        };
        self.entries.range(key(CLASS_ANY)..=key(Class::MAX))
    }

    /// Returns the entry that the programs find: the first that exists of (identity, class), (identity, any class),
    /// (any identity, class), (any identity, any class).
    #[must_use]
    pub fn lookup(&self, direction: Direction, identity: Identity, class: Class) -> Option<&PolicyEntry> {
        self.find(direction as u8, identity, class)
    }

    /// Returns the entry that the programs find at a hook other than those of a NIC, where failsafe ports do not apply.
    #[must_use]
    pub fn lookup_inside(
        &self,
        direction: Direction,
        identity: Identity,
        class: Class,
    ) -> Option<&PolicyEntry> {
        let found = self.lookup(direction, identity, class)?;
        if found.flags & entry_flags::FAILSAFE == 0 {
            return Some(found);
        }
        self.find(direction as u8 | INSIDE, identity, class)
    }

    fn find(&self, direction: u8, identity: Identity, class: Class) -> Option<&PolicyEntry> {
        [
            (identity, class),
            (identity, CLASS_ANY),
            (identity::ANY, class),
            (identity::ANY, CLASS_ANY),
        ]
        .into_iter()
        .find_map(|(identity, class)| {
            self.entries.get(&TableKey {
                direction,
                identity,
                class,
            })
        })
    }
}

/// Returns the keys whose entries differ, in ascending order, with the old and the new entry.
pub fn differing<'a>(
    old: &'a BTreeMap<TableKey, PolicyEntry>,
    new: &'a BTreeMap<TableKey, PolicyEntry>,
) -> impl Iterator<Item = (&'a TableKey, Option<&'a PolicyEntry>, Option<&'a PolicyEntry>)> {
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    std::iter::from_fn(move || {
        loop {
            let order = match (old.peek(), new.peek()) {
                (None, None) => return None,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some((a, _)), Some((b, _))) => a.cmp(b),
            };
            match order {
                Ordering::Less => return old.next().map(|(key, entry)| (key, Some(entry), None)),
                Ordering::Greater => return new.next().map(|(key, entry)| (key, None, Some(entry))),
                Ordering::Equal => {
                    let ((key, a), (_, b)) = (old.next()?, new.next()?);
                    if a != b {
                        return Some((key, Some(a), Some(b)));
                    }
                }
            }
        }
    })
}

/// Place of a rule: policy, spec, section and index.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RulePlace {
    /// Kind of the resource.
    pub kind: PolicyKind,
    /// `namespace/name` of the policy.
    pub policy: Arc<str>,
    /// Index of the spec in the policy, from 0.
    pub spec: u32,
    /// Section of the spec.
    pub section: Section,
    /// Index of the rule in the section, from 0.
    pub index: u32,
}

/// Meaning of a rule id.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RuleKey {
    /// A rule of a policy.
    Rule(RulePlace),
    /// Denied: a policy has rules for the direction, and no rule allows the packet.
    DefaultDeny {
        /// A [`Direction`] as a number.
        direction: u8,
        /// `namespace/name` of the policy that causes the default deny; of several, the first by name. A policy in
        /// audit mode counts only if every policy that causes the default deny is in audit mode.
        policy: Arc<str>,
        /// Number of further policies that count as causes.
        others: u32,
    },
    /// Allowed: all policies with rules for the direction have `enableDefaultDeny: false` for it.
    DefaultAllow {
        /// A [`Direction`] as a number.
        direction: u8,
        /// `namespace/name` of one of these policies: the first by name.
        policy: Arc<str>,
    },
    /// Denied: enforcement is `always`, and no rule allows the packet.
    AlwaysEnforced {
        /// A [`Direction`] as a number.
        direction: u8,
    },
    /// Allowed: no policy enforces the direction, or enforcement is `never`.
    NotEnforced {
        /// A [`Direction`] as a number.
        direction: u8,
    },
    /// Allowed: the node may always reach its workloads (`allow_localhost = "always"`).
    LocalhostAlways,
    /// Denied: the labels of the endpoint are not known yet.
    InitEndpoint {
        /// A [`Direction`] as a number.
        direction: u8,
    },
}

/// Description of a rule id.
#[derive(Clone, Debug, PartialEq)]
pub struct RuleInfo {
    /// Rule id; never 0.
    pub id: u32,
    /// Meaning of the id.
    pub key: RuleKey,
    /// Place of the rule, or of the policy that `key` names, in its file.
    pub location: Option<Location>,
    /// `description` of the spec; empty if it has none.
    pub description: String,
}

impl fmt::Display for RuleInfo {
    /// Writes `policy default/web ingress rule 2 (web.yaml:12)`, or the cause in words if no rule decided.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = |d: u8| {
            if d == Direction::Ingress as u8 {
                "ingress"
            } else {
                "egress"
            }
        };
        match &self.key {
            // The name says everything: each failsafe port is a policy of its own.
            RuleKey::Rule(place) if place.kind == PolicyKind::Failsafe => f.write_str(&place.policy)?,
            RuleKey::Rule(place) => {
                write!(f, "policy {}", place.policy)?;
                if place.spec > 0 {
                    write!(f, " spec {}", place.spec + 1)?;
                }
                write!(f, " {} rule {}", place.section.name(), place.index + 1)?;
            }
            RuleKey::DefaultDeny {
                direction: d,
                policy,
                others,
            } => {
                write!(f, "default deny of {} by policy {policy}", direction(*d))?;
                match others {
                    0 => {}
                    1 => write!(f, " and 1 other")?,
                    n => write!(f, " and {n} others")?,
                }
            }
            RuleKey::DefaultAllow { direction: d, policy } => {
                write!(f, "enableDefaultDeny.{}: false of policy {policy}", direction(*d))?;
            }
            RuleKey::AlwaysEnforced { direction: d } => {
                write!(f, "{} denied by enforcement mode always", direction(*d))?;
            }
            RuleKey::NotEnforced { direction: d } => write!(f, "no policy enforces {}", direction(*d))?,
            RuleKey::LocalhostAlways => f.write_str("the node may always reach its workloads")?,
            RuleKey::InitEndpoint { direction: d } => {
                write!(f, "{} of an endpoint whose labels are not known", direction(*d))?;
            }
        }
        if let Some(location) = &self.location
            && location.line > 0
        {
            write!(f, " ({}:{})", location.file, location.line)?;
        }
        Ok(())
    }
}

/// Application rules of an `inspect` entry. A request passes only if one of the alternatives matches; `server_names`
/// can restrict requests further.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct RuleSet {
    /// Protocol of the requests: an [`Inspector`] as a number. It differs from the inspector of the policy table entry
    /// if TLS is terminated or originated.
    pub reads: u8,
    /// Alternatives, each with the rule that it comes from.
    pub alternatives: Vec<Alternative>,
    /// `serverNames` in addition to rules of another protocol: one of the names must match as well. An empty list does
    /// not restrict names.
    pub server_names: Vec<FqdnPattern>,
    /// `terminatingTLS` of the entry.
    pub terminating_tls: Option<TlsContext>,
    /// `originatingTLS` of the entry.
    pub originating_tls: Option<TlsContext>,
    /// `listener` of the entry.
    pub listener: Option<Listener>,
}

/// One alternative of a rule set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Alternative {
    /// Id of the rule that the alternative comes from.
    pub rule: u32,
    /// Condition that a request must meet.
    pub matcher: Matcher,
}

/// Condition that a request must meet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Matcher {
    /// Matches every request; used, for example, if another rule allows the same packets without application rules.
    /// The traffic is still inspected.
    Everything,
    /// An http rule.
    Http(HttpRule),
    /// A name or pattern that DNS queries are allowed to ask for.
    Dns(FqdnPattern),
    /// A server name or pattern of TLS.
    ServerName(FqdnPattern),
    /// A kafka rule.
    Kafka(KafkaRule),
    /// A rule of another parser.
    Generic {
        /// Name of the parser.
        parser: String,
        /// Keys and values.
        rule: Vec<(String, String)>,
    },
}

/// Returns the name of an inspector in reports and case files.
#[must_use]
pub const fn inspector_name(inspector: u8) -> &'static str {
    const HTTP: u8 = Inspector::Http as u8;
    const DNS: u8 = Inspector::Dns as u8;
    const TLS: u8 = Inspector::Tls as u8;
    const KAFKA: u8 = Inspector::Kafka as u8;
    const LISTENER: u8 = Inspector::Listener as u8;
    const TERMINATE: u8 = Inspector::TlsTerminate as u8;
    match inspector {
        HTTP => "http",
        DNS => "dns",
        TLS => "tls",
        KAFKA => "kafka",
        LISTENER => "listener",
        TERMINATE => "tls-terminate",
        _ => "none",
    }
}
