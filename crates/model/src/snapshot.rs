//! What a compilation comes to: everything the BPF maps are to hold, and what the numbers in them mean.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::Arc,
};

use palisade_abi::{
    Addr, CLASS_ANY, Class, Decision, Direction, EndpointState, Identity, Inspector, IpcacheEntry,
    LearnedKey, PolicyEntry, PolicyKey, PrefixKey, endpoint_flags, identity,
};

use crate::{
    diagnostic::Diagnostic,
    labels::Labels,
    learned_identities::{LearnedIdentities, SelectorList},
    rule::{FqdnPattern, HttpRule, KafkaRule, Listener, Location, PolicyKind, Section, TlsContext},
};

/// The state of the node: what the maps hold once a plan has been carried out.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Every identity in use, by number.
    pub identities: Arc<BTreeMap<Identity, Labels>>,
    /// Full-length addresses (the ipcache map).
    pub addresses: Arc<HashMap<Addr, IpcacheEntry>>,
    /// Shorter prefixes (the trie).
    pub prefixes: Arc<HashMap<PrefixKey, IpcacheEntry>>,
    /// The class of every slot; [`palisade_abi::CLASS_SLOTS`] of them.
    pub classes: Arc<Vec<Class>>,
    /// The compiled tables by policy id.
    pub tables: BTreeMap<u32, Arc<Table>>,
    /// The state of every endpoint (the node among them) by its id.
    pub endpoints: BTreeMap<u16, EndpointState>,
    /// What rule ids stand for. Ids of rules that are gone may linger, so that late events can still be named.
    pub rules: Arc<BTreeMap<u32, Arc<RuleInfo>>>,
    /// Application rules by the id that [`PolicyEntry::ruleset`] holds.
    pub rulesets: Arc<BTreeMap<u32, Arc<RuleSet>>>,
    /// What an address is that no prefix knows, IPv4.
    pub world_ipv4: Identity,
    /// The same for IPv6.
    pub world_ipv6: Identity,
    /// The `toFQDNs` selectors that the egress rules of an endpoint use; endpoints without any are not listed.
    pub fqdn: BTreeMap<u16, SelectorList>,
    /// Who learned addresses are.
    pub names: LearnedIdentities,
    /// Learned addresses, where a plan has to look at them. The compiler leaves it empty.
    pub learned: Learned,
    /// The highest revision that an endpoint has or had. The number before it is free.
    pub revision: u32,
    /// What there is to say about the policies as a whole: ports nobody has, conflicts, services nobody resolves.
    pub diagnostics: Vec<Diagnostic>,
}

/// What the maps hold, read back after a restart.
#[derive(Clone, Debug, Default)]
pub struct MapContents {
    /// The ipcache map.
    pub addresses: HashMap<Addr, IpcacheEntry>,
    /// The prefix trie.
    pub prefixes: HashMap<PrefixKey, IpcacheEntry>,
    /// The class of every slot.
    pub classes: Vec<Class>,
    /// The policy map.
    pub policy: Vec<(PolicyKey, PolicyEntry)>,
    /// The endpoints that have a state.
    pub endpoints: Vec<(u16, EndpointState)>,
    /// The identity of unknown addresses, IPv4.
    pub world_ipv4: Identity,
    /// The same for IPv6.
    pub world_ipv6: Identity,
}

impl Snapshot {
    /// The state of maps that were read back: what to plan from after a restart. The
    /// compiler must avoid its numbers (`Compiler::avoid`) before the first update: then new tables have policy ids and
    /// revisions of their own, and the old tables enforce until each endpoint is switched.
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

/// What endpoints have learned by names (the LEARNED map): only what differs between the two states of a plan has to
/// be listed.
#[derive(Clone, Debug, Default)]
pub struct Learned {
    /// Address of an endpoint -> its identity.
    pub entries: BTreeMap<LearnedKey, Identity>,
    /// Identities that learned addresses have which are not listed.
    pub others: BTreeSet<Identity>,
}

/// A key of a [`Table`]: a [`PolicyKey`] without the policy id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableKey {
    /// 0 ingress, 1 egress, as [`Direction`].
    pub direction: u8,
    /// Identity of the other end, [`identity::ANY`] for every one.
    pub identity: Identity,
    /// Class of protocol and port, [`CLASS_ANY`] for every one.
    pub class: Class,
}

impl TableKey {
    /// The key as the map has it.
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

/// The verdicts of one subject, or of several that cannot be told apart.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// Sorted by direction, identity, class, so that an identity's entries are neighbours.
    pub entries: BTreeMap<TableKey, PolicyEntry>,
}

impl Table {
    /// The [`endpoint_flags`] of the directions in which no entry has anything read or denies by name.
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

    /// The entries of one direction and identity.
    pub fn row(&self, direction: u8, identity: Identity) -> impl Iterator<Item = (&TableKey, &PolicyEntry)> {
        let key = |class| TableKey {
            direction,
            identity,
            class,
        };
        self.entries.range(key(CLASS_ANY)..=key(Class::MAX))
    }

    /// What the programs find: the first key that exists of (identity, class), (identity, any), (any, class),
    /// (any, any).
    #[must_use]
    pub fn lookup(&self, direction: Direction, identity: Identity, class: Class) -> Option<&PolicyEntry> {
        let direction = direction as u8;
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

/// The keys whose entries differ, in their order, with the entry of each side. One walk along both.
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

/// A place in a policy: what a rule id stands for if it stands for a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RulePlace {
    /// What kind of resource.
    pub kind: PolicyKind,
    /// `namespace/name` of the policy.
    pub policy: Arc<str>,
    /// Which of its specs, from 0.
    pub spec: u32,
    /// Which section.
    pub section: Section,
    /// Which rule of the section, from 0.
    pub index: u32,
}

/// What a rule id stands for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RuleKey {
    /// A rule of a policy.
    Rule(RulePlace),
    /// Denied because a policy has a section for the direction and nothing allows the packet.
    DefaultDeny {
        /// The direction, as [`Direction`].
        direction: u8,
        /// `namespace/name` of the policy that causes it, the first by name.
        policy: Arc<str>,
        /// How many others cause it too.
        others: u32,
    },
    /// Allowed because the policies of the direction say `enableDefaultDeny: false`.
    DefaultAllow {
        /// The direction, as [`Direction`].
        direction: u8,
        /// `namespace/name` of a policy that says so (the first by name).
        policy: Arc<str>,
    },
    /// Denied because enforcement is `always` and nothing allows the packet.
    AlwaysEnforced {
        /// The direction, as [`Direction`].
        direction: u8,
    },
    /// Allowed because no policy enforces the direction, or enforcement is `never`.
    NotEnforced {
        /// The direction, as [`Direction`].
        direction: u8,
    },
    /// Allowed because the node may always reach its workloads (`allow_localhost = "always"`).
    LocalhostAlways,
    /// Denied because the endpoint's labels are not known yet.
    InitEndpoint {
        /// The direction, as [`Direction`].
        direction: u8,
    },
}

/// A rule id explained.
#[derive(Clone, Debug, PartialEq)]
pub struct RuleInfo {
    /// The id; never 0.
    pub id: u32,
    /// What it stands for.
    pub key: RuleKey,
    /// Where the rule, or the policy, is written; for the first policy of a default-deny.
    pub location: Option<Location>,
    /// `description` of the spec, if it has one.
    pub description: String,
}

impl fmt::Display for RuleInfo {
    /// `policy default/web ingress rule 2 (web.yaml:12:5)`, or in words what decided if no rule did.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = |d: u8| {
            if d == Direction::Ingress as u8 {
                "ingress"
            } else {
                "egress"
            }
        };
        match &self.key {
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

/// The application rules of an `inspect` entry: a request passes if one of them matches.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct RuleSet {
    /// What the traffic is read as ([`inspector_name`]); an [`Inspector`]. Differs from the entry's inspector where
    /// TLS has to be terminated first.
    pub reads: u8,
    /// The alternatives, each with the rule it came from.
    pub alternatives: Vec<Alternative>,
    /// Where rules of another protocol stand beside `serverNames`: one of these must match too (none: not asked for).
    pub server_names: Vec<FqdnPattern>,
    /// `terminatingTLS` of the entry.
    pub terminating_tls: Option<TlsContext>,
    /// `originatingTLS` of the entry.
    pub originating_tls: Option<TlsContext>,
    /// `listener` of the entry.
    pub listener: Option<Listener>,
}

/// One way to pass.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Alternative {
    /// The rule it came from.
    pub rule: u32,
    /// What a request must be like.
    pub matcher: Matcher,
}

/// What a request must be like.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Matcher {
    /// Everything passes (and is read all the same): a plain allow beside application rules, or an empty list.
    Everything,
    /// An http rule.
    Http(HttpRule),
    /// A name that may be asked for.
    Dns(FqdnPattern),
    /// A server name of TLS.
    ServerName(FqdnPattern),
    /// A kafka rule.
    Kafka(KafkaRule),
    /// A rule of another parser, by its name.
    Generic {
        /// The parser.
        parser: String,
        /// Keys and values.
        rule: Vec<(String, String)>,
    },
}

/// The name of an inspector in reports and case files.
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
