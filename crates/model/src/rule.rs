//! Policies after parsing and validation: the output of the parser and the input of the compiler.
//!
//! Equivalent ways to write a policy have one form here. Labels have a source, namespaces are requirements of
//! selectors, prefixes are masked, ports are ranges. References to groups of prefixes stay references; the compiler
//! resolves them against the `CiliumCIDRGroup`s of the node.

use std::{fmt, sync::Arc};

use ipnet::IpNet;
use palisade_abi::Direction;

/// A place in a file. Lines and columns count from 1; 0 if unknown.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Location {
    /// File name, or `<input>`.
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

/// Kind of the resource that defines a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PolicyKind {
    /// `CiliumNetworkPolicy`: applies to one namespace.
    Cnp,
    /// `CiliumClusterwideNetworkPolicy`: applies to all namespaces, and can select the node.
    Ccnp,
    /// Kubernetes `NetworkPolicy`.
    Knp,
    /// A bare rule of a case file, which no namespace scopes.
    Raw,
    /// A failsafe port of the configuration (`[failsafe]`): its rules allow before all policies, at NICs only.
    Failsafe,
}

/// A policy resource.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Kind of the resource.
    pub kind: PolicyKind,
    /// `metadata.name`; `rules[N]` for bare rules.
    pub name: String,
    /// Namespace of a CNP or NetworkPolicy (`default` if the resource names none); `None` for other kinds.
    pub namespace: Option<String>,
    /// Whether the policy is in audit mode (Palisade's annotation `palisade.io/audit: "true"`): packets that its rules
    /// deny pass and are reported.
    pub audit: bool,
    /// The one `spec`, or all `specs`.
    pub specs: Vec<Spec>,
    /// Start of the document.
    pub location: Location,
}

impl Policy {
    /// Returns `namespace/name`, or `name` for a policy without namespace, as reports show it.
    #[must_use]
    pub fn qualified_name(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("{namespace}/{}", self.name),
            None => self.name.clone(),
        }
    }
}

/// One `spec`: the selected endpoints, and the rules.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Endpoints that the spec selects.
    pub subject: Subject,
    /// `ingress` rules, in the order of the file. `None` if the section is absent, null or empty. If a NetworkPolicy
    /// denies the direction without any rule, the section has one rule that matches no peer.
    pub ingress: Option<Vec<Rule>>,
    /// `ingressDeny` rules.
    pub ingress_deny: Option<Vec<Rule>>,
    /// `egress` rules.
    pub egress: Option<Vec<Rule>>,
    /// `egressDeny` rules.
    pub egress_deny: Option<Vec<Rule>>,
    /// `enableDefaultDeny.ingress`.
    pub default_deny_ingress: Option<bool>,
    /// `enableDefaultDeny.egress`.
    pub default_deny_egress: Option<bool>,
    /// `description`.
    pub description: String,
    /// Start of the spec.
    pub location: Location,
}

impl Spec {
    /// Returns the rules of a section, in the order of the file; an empty slice if the section is absent.
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

    /// Returns the rules of all sections.
    pub fn all_rules(&self) -> impl Iterator<Item = &Rule> {
        Section::ALL.into_iter().flat_map(|section| self.rules(section))
    }
}

/// Section of a spec.
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

    /// Returns the two sections of a direction: first the one that allows, then the one that denies.
    #[must_use]
    pub const fn of(direction: Direction) -> [Self; 2] {
        match direction {
            Direction::Ingress => [Self::Ingress, Self::IngressDeny],
            Direction::Egress => [Self::Egress, Self::EgressDeny],
        }
    }

    /// Returns the direction of the section.
    #[must_use]
    pub const fn direction(self) -> Direction {
        match self {
            Self::Ingress | Self::IngressDeny => Direction::Ingress,
            Self::Egress | Self::EgressDeny => Direction::Egress,
        }
    }

    /// Returns whether rules of the section deny.
    #[must_use]
    pub const fn denies(self) -> bool {
        matches!(self, Self::IngressDeny | Self::EgressDeny)
    }

    /// Returns the name of the section in policies.
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

/// The endpoints that a spec selects.
#[derive(Clone, Debug, PartialEq)]
pub enum Subject {
    /// Workloads whose labels the selector matches; never the node.
    Endpoints(Selector),
    /// The node, if the selector matches its labels.
    Node(Selector),
}

/// One rule of a section. A packet matches the rule if its peer matches `peers` and its protocol and port match
/// `ports`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Peers of the rule.
    pub peers: Peers,
    /// Protocols and ports of the rule.
    pub ports: Ports,
    /// `fromRequires` or `toRequires`: requirements that are added to every `fromEndpoints` or `toEndpoints` selector
    /// of this section, in all specs that select the same endpoint. They allow no peer by themselves.
    pub requires: Vec<Selector>,
    /// Whether the rule allows only authenticated peers (`authentication.mode`).
    pub auth_required: bool,
    /// Start of the rule.
    pub location: Location,
}

/// Peers of a rule, with the empty forms resolved.
#[derive(Clone, Debug, PartialEq)]
pub enum Peers {
    /// Every peer: the rule has `toPorts` or `icmps`, but names no peer.
    Any,
    /// No peer: for example, the rule is `{}`, or has an empty list of peers, or its peers could be resolved only in a
    /// cluster (`toServices`, `fromGroups`). The rule still counts for default deny.
    None,
    /// Peers that at least one member of the list selects.
    OneOf(Vec<Peer>),
}

impl Peers {
    /// Returns the members of the list; an empty slice for `Any` and `None`.
    #[must_use]
    pub fn list(&self) -> &[Peer] {
        match self {
            Self::Any | Self::None => &[],
            Self::OneOf(peers) => peers,
        }
    }
}

/// One member of a list of peers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    /// `fromEndpoints` or `toEndpoints`; the namespace is a requirement of the selector.
    Labels(Selector),
    /// `fromNodes` or `toNodes`: identities of nodes (`reserved:remote-node`, or the node itself) whose labels the
    /// selector matches.
    Nodes(Selector),
    /// `fromEntities` or `toEntities`.
    Entity(Entity),
    /// `fromCIDR`, `toCIDR`, an entry of `fromCIDRSet` or `toCIDRSet` with `cidr`, or `ipBlock`.
    Cidr(CidrRule),
    /// An entry of `fromCIDRSet` or `toCIDRSet` with `cidrGroupRef`.
    CidrGroup {
        /// `metadata.name` of the `CiliumCIDRGroup`.
        name: String,
        /// `except` of the entry.
        except: Vec<IpNet>,
    },
    /// An entry of `fromCIDRSet` or `toCIDRSet` with `cidrGroupSelector`.
    CidrGroupSelector {
        /// Selector over the labels of `CiliumCIDRGroup` resources.
        selector: Selector,
        /// `except` of the entry.
        except: Vec<IpNet>,
    },
    /// `toFQDNs`.
    Fqdn(FqdnPattern),
}

/// A prefix without some of its parts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CidrRule {
    /// The prefix, with host bits masked.
    pub cidr: IpNet,
    /// Parts of the prefix that the rule does not match. Other rules can allow or deny these parts.
    pub except: Vec<IpNet>,
}

/// The entities of the policy language.
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

/// A DNS name or pattern of `toFQDNs` or of a dns rule, in lower case and without the trailing dot.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FqdnPattern {
    /// `matchName`.
    Name(String),
    /// `matchPattern`. `*` matches any number of characters within a label, `**.` at the start one or more labels, and
    /// the pattern `*` every name.
    Pattern(String),
}

/// Protocols and ports of a rule.
#[derive(Clone, Debug, PartialEq)]
pub enum Ports {
    /// Every protocol, ICMP included: the rule has neither `toPorts` nor `icmps`, or they are null or empty.
    Any,
    /// Packets that one of the entries matches. An empty list (`toPorts: [{}]` alone) matches no packet.
    OneOf(Vec<PortRule>),
}

/// One entry of `toPorts` or `icmps`: ports, and the application rules on them.
#[derive(Clone, Debug, PartialEq)]
pub struct PortRule {
    /// Protocols and ports; an empty list matches no packet.
    pub ports: Vec<PortSpec>,
    /// Application rules; `L7::default()` if the entry has none.
    pub l7: L7,
    /// Start of the entry.
    pub location: Location,
}

/// A protocol with its ports.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PortSpec {
    /// A range of port numbers. `0..=65535` is every port; the parser converts port 0 without a range end to that
    /// range, and a reversed range to its first port.
    Range {
        /// Protocol of the ports.
        protocol: L4Protocol,
        /// First port.
        first: u16,
        /// Last port, inclusive; not less than `first`.
        last: u16,
    },
    /// A port by name, which is resolved for each endpoint.
    Named {
        /// Protocol of the port; [`L4Protocol::Any`] means the protocol of the named port.
        protocol: L4Protocol,
        /// Name of the port, in lower case.
        name: String,
        /// Last port of a range that begins at the named port. If `last` is not above the named port, as with 0, only
        /// the named port matches.
        last: u16,
    },
    /// One ICMP type, from an element of `icmps`.
    Icmp {
        /// Whether the protocol is ICMPv6 instead of ICMP.
        v6: bool,
        /// ICMP type.
        kind: u8,
    },
}

/// Protocol of a port rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum L4Protocol {
    /// TCP, UDP and SCTP, but not ICMP.
    Any,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// All packets of another protocol of the policy language, by IP protocol number (ICMP, ICMPv6, VRRP 112, IGMP 2,
    /// ...).
    Other(u8),
}

/// Application rules of one `toPorts` entry.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct L7 {
    /// `rules`.
    pub rules: L7Rules,
    /// `serverNames`; an empty list does not restrict names.
    pub server_names: Vec<FqdnPattern>,
    /// `terminatingTLS`.
    pub terminating_tls: Option<TlsContext>,
    /// `originatingTLS`.
    pub originating_tls: Option<TlsContext>,
    /// `listener`.
    pub listener: Option<Listener>,
}

impl L7 {
    /// Returns whether the entry has no application rules.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// The `rules` member of a `toPorts` entry. An empty list of rules counts as no rules, except for a parser by name.
#[derive(Clone, Debug, PartialEq, Default)]
pub enum L7Rules {
    /// No rules.
    #[default]
    None,
    /// `http`.
    Http(Vec<HttpRule>),
    /// `dns`.
    Dns(Vec<FqdnPattern>),
    /// `kafka`.
    Kafka(Vec<KafkaRule>),
    /// `l7proto` and `l7`: a parser by name, with key/value rules.
    Generic {
        /// Name of the parser.
        parser: String,
        /// Rules: keys and values.
        rules: Vec<Vec<(String, String)>>,
    },
}

/// One http rule. A request must match all members that are set.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct HttpRule {
    /// Regular expression over path and query, which must match as a whole.
    pub path: Option<String>,
    /// Regular expression over the method, which must match as a whole.
    pub method: Option<String>,
    /// Regular expression over the host, which must match as a whole.
    pub host: Option<String>,
    /// `headers`: name and exact value; `None` requires only that the header is present.
    pub headers: Vec<(String, Option<String>)>,
    /// `headerMatches`.
    pub header_matches: Vec<HeaderMatch>,
}

impl HttpRule {
    /// Returns whether requests that match the rule can be changed, or are compared with a secret. Only the intercepting
    /// proxy does that, so it must terminate the connection.
    #[must_use]
    pub fn needs_proxy(&self) -> bool {
        self.header_matches.iter().any(|header| {
            header.secret.is_some()
                || matches!(
                    header.mismatch,
                    MismatchAction::Add | MismatchAction::Delete | MismatchAction::Replace
                )
        })
    }
}

/// One entry of `headerMatches`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HeaderMatch {
    /// Header name.
    pub name: String,
    /// Expected value; with `secret`, the value to use if the secret is missing. If both are `None`, any value matches.
    pub value: Option<String>,
    /// `namespace/name` of a secret that has the expected value.
    pub secret: Option<String>,
    /// Action if the header is absent or has another value.
    pub mismatch: MismatchAction,
}

/// `mismatch` of an entry of `headerMatches`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MismatchAction {
    /// The rule does not match (the default).
    Fail,
    /// The rule matches, and the mismatch is reported.
    Log,
    /// The rule matches. The expected value is added to the header, the mismatch is reported.
    Add,
    /// The rule matches. The header is removed, the mismatch is reported.
    Delete,
    /// The rule matches. The header gets the expected value alone, the mismatch is reported.
    Replace,
}

/// Returns whether a mismatch action may change a header of this name. The request line, the host and the framing of a
/// message may not be changed: the rules evaluate them as the client has sent them, and servers must find the same ends of
/// messages as the proxy.
#[must_use]
pub fn is_editable_header(name: &str) -> bool {
    const FIXED: [&str; 11] = [
        "connection",
        "contentlength",
        "expect",
        "host",
        "http2settings",
        "keepalive",
        "proxyconnection",
        "te",
        "trailer",
        "transferencoding",
        "upgrade",
    ];
    // Some servers treat `Transfer_Encoding` as `Transfer-Encoding`.
    let folded: String = name
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .map(|c| c.to_ascii_lowercase())
        .collect();
    !name.starts_with(':') && !folded.is_empty() && !FIXED.contains(&folded.as_str())
}

/// Returns whether a text can be the value of a header (RFC 9110, section 5.5): no control character but tab.
#[must_use]
pub fn is_header_value(bytes: &[u8]) -> bool {
    bytes
        .iter()
        .all(|byte| *byte == b'\t' || !byte.is_ascii_control())
}

/// One kafka rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct KafkaRule {
    /// API keys; an empty list allows all. The parser expands `role: produce` and `role: consume`.
    pub api_keys: Vec<i16>,
    /// API version; `None` allows all.
    pub api_version: Option<i16>,
    /// Client id; `None` allows all.
    pub client_id: Option<String>,
    /// Topic; `None` allows all.
    pub topic: Option<String>,
}

/// `terminatingTLS` or `originatingTLS`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct TlsContext {
    /// `namespace/name` of the secret.
    pub secret: String,
    /// Key of the trusted CA in the secret (`trustedCA`).
    pub trusted_ca: String,
    /// Key of the certificate in the secret.
    pub certificate: String,
    /// Key of the private key in the secret.
    pub private_key: String,
}

/// `listener`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Listener {
    /// Kind of the resource (`CiliumEnvoyConfig` or `CiliumClusterwideEnvoyConfig`).
    pub kind: String,
    /// Name of the resource.
    pub resource: String,
    /// Name of the listener.
    pub name: String,
    /// Priority; 0 if the policy sets none.
    pub priority: u8,
}

/// A `CiliumCIDRGroup`.
#[derive(Clone, Debug, PartialEq)]
pub struct CidrGroup {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.labels`; their source is `cidrgroup`.
    pub labels: Vec<(String, String)>,
    /// `spec.externalCIDRs`, masked.
    pub cidrs: Vec<IpNet>,
    /// Start of the document.
    pub location: Location,
}

/// A label selector. A selector without requirements selects every label set.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Selector {
    /// Requirements, all of which must be met.
    pub requirements: Vec<Requirement>,
}

/// One requirement of a selector.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Requirement {
    /// Source of the label.
    pub source: LabelSource,
    /// Key of the label, without source.
    pub key: String,
    /// Test of the label.
    pub test: Test,
}

/// Operator of a requirement, with its values.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Test {
    /// The label exists and has one of the values (`matchLabels`: one value).
    In(Vec<String>),
    /// The label does not exist, or has none of the values.
    NotIn(Vec<String>),
    /// The label exists.
    Exists,
    /// The label does not exist.
    DoesNotExist,
}

/// Source of a label in a selector.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LabelSource {
    /// Any source.
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
    /// Value; can be empty.
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
