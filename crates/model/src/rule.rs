//! A policy after it has been read and validated: what the parser makes and the compiler takes.
//!
//! Everything that the language lets people write in several ways has one form here: labels have a source,
//! namespaces have been put into the selectors, prefixes are masked, ports are ranges, groups of prefixes that
//! are known by name only stay names (they are resolved against the `CiliumCIDRGroup`s of the same world).

use std::{fmt, sync::Arc};

use ipnet::IpNet;
use palisade_abi::Direction;

/// Where something was written. Lines and columns count from 1; 0 where it is not known.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Location {
    /// The file as it was named, or `<input>`.
    pub file: Arc<str>,
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

/// The kind of resource a policy was written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PolicyKind {
    /// `CiliumNetworkPolicy`: of one namespace.
    Cnp,
    /// `CiliumClusterwideNetworkPolicy`: not scoped; may select the node.
    Ccnp,
    /// Kubernetes `NetworkPolicy`.
    Knp,
    /// A bare rule of a case file: no scoping at all.
    Raw,
}

/// One resource.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// As what it was written.
    pub kind: PolicyKind,
    /// `metadata.name`; `rules[N]` for raw rules.
    pub name: String,
    /// The namespace of a CNP or NetworkPolicy (`default` if the resource names none); none for the others.
    pub namespace: Option<String>,
    /// Palisade's own: annotation `palisade.io/audit: "true"`. What this policy's rules would drop passes, and is reported.
    pub audit: bool,
    /// `spec` gives one, `specs` several.
    pub specs: Vec<Spec>,
    /// Where the document starts.
    pub location: Location,
}

impl Policy {
    /// `namespace/name`, or `name` where there is no namespace: how people and reports name it.
    #[must_use]
    pub fn qualified_name(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("{namespace}/{}", self.name),
            None => self.name.clone(),
        }
    }
}

/// One `spec`: who it is about, and its sections.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Who it selects.
    pub subject: Subject,
    /// Ingress rules that allow, in the order they were written. `None`: the section is absent, null or empty.
    /// (A direction that a NetworkPolicy denies without any rule has one rule here, for nobody.)
    pub ingress: Option<Vec<Rule>>,
    /// Ingress rules that deny.
    pub ingress_deny: Option<Vec<Rule>>,
    /// Egress rules that allow.
    pub egress: Option<Vec<Rule>>,
    /// Egress rules that deny.
    pub egress_deny: Option<Vec<Rule>>,
    /// `enableDefaultDeny.ingress`.
    pub default_deny_ingress: Option<bool>,
    /// `enableDefaultDeny.egress`.
    pub default_deny_egress: Option<bool>,
    /// `description`.
    pub description: String,
    /// Where the spec starts.
    pub location: Location,
}

impl Spec {
    /// Returns the rules of a section, in the order in which they are written; none if the section is absent.
    #[must_use]
    pub fn rules(&self, section: Section) -> &[Rule] {
        match section {
            Section::Ingress => &self.ingress,
            Section::IngressDeny => &self.ingress_deny,
            Section::Egress => &self.egress,
            Section::EgressDeny => &self.egress_deny,
        }
        .as_deref()
        .unwrap_or_default()
    }
}

/// Which section of a spec a rule stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are the language's own")]
pub enum Section {
    Ingress,
    IngressDeny,
    Egress,
    EgressDeny,
}

impl Section {
    /// All sections, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Ingress, Self::IngressDeny, Self::Egress, Self::EgressDeny];

    /// Returns the sections of a direction: the one that allows, then the one that denies.
    #[must_use]
    pub const fn of(direction: Direction) -> [Self; 2] {
        match direction {
            Direction::Ingress => [Self::Ingress, Self::IngressDeny],
            Direction::Egress => [Self::Egress, Self::EgressDeny],
        }
    }

    /// The direction it is about.
    #[must_use]
    pub const fn direction(self) -> Direction {
        match self {
            Self::Ingress | Self::IngressDeny => Direction::Ingress,
            Self::Egress | Self::EgressDeny => Direction::Egress,
        }
    }

    /// Whether its rules deny.
    #[must_use]
    pub const fn denies(self) -> bool {
        matches!(self, Self::IngressDeny | Self::EgressDeny)
    }

    /// As it is written in a policy.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::IngressDeny => "ingressDeny",
            Self::Egress => "egress",
            Self::EgressDeny => "egressDeny",
        }
    }
}

/// Whom a spec is about.
#[derive(Clone, Debug, PartialEq)]
pub enum Subject {
    /// Endpoints with these labels (never the node).
    Endpoints(Selector),
    /// The node, if its labels match.
    Node(Selector),
}

/// One rule of a section.
///
/// Semantics: a peer matches if `peers` says so; a packet matches if `ports` says so; both must.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Whom it is about.
    pub peers: Peers,
    /// What traffic it is about.
    pub ports: Ports,
    /// fromRequires / toRequires: every selector of endpoints in this section of every policy of the subject must
    /// match these too. Lets nobody in by itself.
    pub requires: Vec<Selector>,
    /// `authentication.mode: required`.
    pub auth_required: bool,
    /// Where it starts.
    pub location: Location,
}

/// The L3 members of a rule, after the empty forms have been resolved.
#[derive(Clone, Debug, PartialEq)]
pub enum Peers {
    /// No L3 member, but the rule has toPorts or icmps: every peer.
    Any,
    /// The empty rule `{}`, an empty list, or members that cannot be resolved here: nobody.
    /// (The section counts for default deny all the same.)
    None,
    /// Whoever one of them matches.
    OneOf(Vec<Peer>),
}

/// One L3 member.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    /// fromEndpoints / toEndpoints, namespace scoping already put in.
    Labels(Selector),
    /// fromNodes / toNodes: nodes (identities with `reserved:remote-node`, or the node itself) with these labels.
    Nodes(Selector),
    /// fromEntities / toEntities.
    Entity(Entity),
    /// fromCIDR / toCIDR, fromCIDRSet / toCIDRSet with `cidr`, ipBlock.
    Cidr(CidrRule),
    /// fromCIDRSet / toCIDRSet with `cidrGroupRef`: by name.
    CidrGroup {
        /// `metadata.name` of the `CiliumCIDRGroup`.
        name: String,
        /// `except` of the entry.
        except: Vec<IpNet>,
    },
    /// fromCIDRSet / toCIDRSet with `cidrGroupSelector`: by the labels of the group.
    CidrGroupSelector {
        /// Over the labels of `CiliumCIDRGroup` resources.
        selector: Selector,
        /// `except` of the entry.
        except: Vec<IpNet>,
    },
    /// toFQDNs.
    Fqdn(FqdnPattern),
}

/// A prefix with holes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CidrRule {
    /// The prefix, host bits masked.
    pub cidr: IpNet,
    /// Parts of it that do not match (not a denial).
    pub except: Vec<IpNet>,
}

/// The entities of the language.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are the language's own")]
pub enum Entity {
    All,
    World,
    WorldIpv4,
    WorldIpv6,
    Cluster,
    Host,
    RemoteNode,
    KubeApiserver,
    Health,
    Init,
    Unmanaged,
    Ingress,
    None,
}

/// A DNS name or pattern of toFQDNs or of a dns rule. Lower case, without the trailing dot.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FqdnPattern {
    /// `matchName`.
    Name(String),
    /// `matchPattern`, as written (lower case): `*` within a label, `**.` one or more labels, `*` alone everything.
    Pattern(String),
}

/// The L4 members of a rule.
#[derive(Clone, Debug, PartialEq)]
pub enum Ports {
    /// No restriction: every protocol, ICMP included (no toPorts, null, or an empty list, and no icmps).
    Any,
    /// Whatever one of them matches. Empty: nothing (`toPorts: [{}]` alone).
    OneOf(Vec<PortRule>),
}

/// One entry of toPorts or icmps: some ports, and what is to be read on them.
#[derive(Clone, Debug, PartialEq)]
pub struct PortRule {
    /// The protocols and ports. Empty: the entry allows nothing.
    pub ports: Vec<PortSpec>,
    /// Application rules; `L7::default()` for plain L4.
    pub l7: L7,
    /// Where it starts.
    pub location: Location,
}

/// Protocol and ports.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PortSpec {
    /// Numeric: first to last port, inclusive. `0..=65535` is the wildcard (port 0 has become that, a reversed range its first port).
    Range {
        /// Which protocol.
        protocol: L4Protocol,
        /// First port.
        first: u16,
        /// Last port, inclusive; not less than `first`.
        last: u16,
    },
    /// By name; resolved per endpoint.
    Named {
        /// Which protocol; [`L4Protocol::Any`] takes the port's own.
        protocol: L4Protocol,
        /// The name, lower case.
        name: String,
        /// The end of a range that begins at the port of that name; there is none if it is not above (as 0 is not).
        last: u16,
    },
    /// `icmps`: one type of one family.
    Icmp {
        /// ICMPv6; else ICMP.
        v6: bool,
        /// The type.
        kind: u8,
    },
}

/// A protocol of a port rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum L4Protocol {
    /// TCP, UDP and SCTP (never ICMP).
    Any,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// One of the other protocols of the language by its IP number (ICMP, ICMPv6, VRRP 112, IGMP 2, ...): every packet of it.
    Other(u8),
}

/// Application rules of one toPorts entry.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct L7 {
    /// What is to be read, if anything.
    pub rules: L7Rules,
    /// `serverNames`; empty: not asked for.
    pub server_names: Vec<FqdnPattern>,
    /// `terminatingTLS`.
    pub terminating_tls: Option<TlsContext>,
    /// `originatingTLS`.
    pub originating_tls: Option<TlsContext>,
    /// `listener`.
    pub listener: Option<Listener>,
}

impl L7 {
    /// Whether nothing above L4 is asked for.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// The `rules` member of toPorts. An empty list of rules is the same as none; only a parser by name needs no rules.
#[derive(Clone, Debug, PartialEq, Default)]
pub enum L7Rules {
    /// None.
    #[default]
    None,
    /// `http`.
    Http(Vec<HttpRule>),
    /// `dns`.
    Dns(Vec<FqdnPattern>),
    /// `kafka`.
    Kafka(Vec<KafkaRule>),
    /// `l7proto` / `l7`: a parser by name, with key/value rules.
    Generic {
        /// The parser.
        parser: String,
        /// The rules.
        rules: Vec<Vec<(String, String)>>,
    },
}

/// One http rule. All members that are there must match.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct HttpRule {
    /// Full-match regular expression over path and query.
    pub path: Option<String>,
    /// Full-match regular expression.
    pub method: Option<String>,
    /// Full-match regular expression.
    pub host: Option<String>,
    /// `headers`: name, and the exact value (`None`: present).
    pub headers: Vec<(String, Option<String>)>,
    /// `headerMatches`.
    pub header_matches: Vec<HeaderMatch>,
}

/// One entry of headerMatches.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HeaderMatch {
    /// Header name.
    pub name: String,
    /// Expected value (`None` with `secret`: not resolved here).
    pub value: Option<String>,
    /// `namespace/name` of a secret.
    pub secret: Option<String>,
    /// What to do on a mismatch.
    pub mismatch: MismatchAction,
}

/// `mismatch` of headerMatches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MismatchAction {
    /// The rule does not match (the default).
    Fail,
    /// Match all the same, and say so.
    Log,
    /// Append the header.
    Add,
    /// Remove the header.
    Delete,
    /// Set the header.
    Replace,
}

/// One kafka rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct KafkaRule {
    /// API keys; empty: all. (`role: produce` and `consume` have been expanded.)
    pub api_keys: Vec<i16>,
    /// API version; none: all.
    pub api_version: Option<i16>,
    /// Client id; none: all.
    pub client_id: Option<String>,
    /// Topic; none: all.
    pub topic: Option<String>,
}

/// terminatingTLS / originatingTLS.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct TlsContext {
    /// `namespace/name` of the secret.
    pub secret: String,
    /// `trustedCA`, `certificate`, `privateKey` as written.
    pub trusted_ca: String,
    /// Key of the certificate in the secret.
    pub certificate: String,
    /// Key of the private key in the secret.
    pub private_key: String,
}

/// listener.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Listener {
    /// Kind of the resource (CiliumEnvoyConfig, CiliumClusterwideEnvoyConfig).
    pub kind: String,
    /// Its name.
    pub resource: String,
    /// The listener's name.
    pub name: String,
    /// Priority, 0 if not given.
    pub priority: u8,
}

/// A `CiliumCIDRGroup`.
#[derive(Clone, Debug, PartialEq)]
pub struct CidrGroup {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.labels`, source `cidrgroup`.
    pub labels: Vec<(String, String)>,
    /// `spec.externalCIDRs`, masked.
    pub cidrs: Vec<IpNet>,
    /// Where the document starts.
    pub location: Location,
}

/// A label selector: a conjunction. Empty: everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Selector {
    /// All must hold.
    pub requirements: Vec<Requirement>,
}

/// One requirement of a selector.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Requirement {
    /// The label's source; `any` matches every source.
    pub source: LabelSource,
    /// The label's key, without source.
    pub key: String,
    /// What must hold of it.
    pub test: Test,
}

/// The operator of a requirement with its values.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Test {
    /// The label exists and has one of the values (matchLabels: one value).
    In(Vec<String>),
    /// The label does not exist, or has none of the values.
    NotIn(Vec<String>),
    /// The label exists.
    Exists,
    /// The label does not exist.
    DoesNotExist,
}

/// Where a label comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LabelSource {
    /// In a selector: any source.
    Any,
    /// A source by name: `k8s`, `reserved`, `container`, `cni`, `cidr`, `cidrgroup`, `node`, `fqdn`, `unspec`, ...
    Named(String),
}

/// A label of an identity.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Label {
    /// Source: `k8s`, `reserved`, `cidr`, ...
    pub source: String,
    /// Key.
    pub key: String,
    /// Value, may be empty.
    pub value: String,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.source, self.key)?;
        if self.value.is_empty() {
            Ok(())
        } else {
            write!(f, "={}", self.value)
        }
    }
}
