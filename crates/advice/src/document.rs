//! Policies as YAML documents: the subject, the peers, the ports and the application rules of a rule.

use std::{collections::BTreeSet, net::IpAddr};

use palisade_abi::{Direction, protocol};
use palisade_model::{labels::Labels, rule::TlsContext};
use palisade_protocols::kafka::api_name;

use crate::{
    labels::{LabelSelector, NAMESPACE, namespace},
    yaml::{Item, Yaml, list, map},
};

/// The endpoints that a policy selects.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Subject {
    /// Namespace of the policy; `None` for a cluster-wide policy.
    pub(crate) namespace: Option<String>,
    /// Whether the policy selects the node.
    pub(crate) node: bool,
    pub(crate) selector: LabelSelector,
}

impl Subject {
    /// Returns the subject of a policy for endpoints with these labels, which does not select `others` as far as labels
    /// can tell them apart.
    pub(crate) fn exact<'l>(labels: &Labels, others: impl Iterator<Item = &'l Labels>) -> Self {
        Self::of(labels, LabelSelector::exact(labels, others))
    }

    /// Returns the subject of a policy for the workload with these labels.
    pub(crate) fn stable(labels: &Labels) -> Self {
        Self::of(labels, LabelSelector::stable(labels))
    }

    fn of(labels: &Labels, selector: LabelSelector) -> Self {
        let node = labels.has_reserved("host");
        Self {
            namespace: namespace(labels).filter(|_| !node).map(str::to_owned),
            node,
            selector,
        }
    }

    /// Returns the endpoints in words.
    pub(crate) fn text(&self) -> String {
        let labels: Vec<String> = self
            .selector
            .labels()
            .iter()
            .filter(|label| label.key != NAMESPACE)
            .map(|label| match label.source.as_str() {
                "k8s" => format!("{}={}", label.key, label.value),
                "reserved" => label.key.clone(),
                _ => label.to_string(),
            })
            .collect();
        let endpoints = match (self.node, labels.is_empty()) {
            (true, _) => "the node".to_owned(),
            (false, true) => "all endpoints".to_owned(),
            (false, false) => labels.join(","),
        };
        match &self.namespace {
            Some(namespace) => format!("{endpoints} in namespace {namespace}"),
            None => endpoints,
        }
    }

    /// Returns the policy with the rules of both directions. Without rules of a direction its section is missing.
    pub(crate) fn policy(&self, name: &str, ingress: Vec<Item>, egress: Vec<Item>) -> Yaml {
        let kind = match self.namespace {
            Some(_) => "CiliumNetworkPolicy",
            None => "CiliumClusterwideNetworkPolicy",
        };
        let mut metadata = vec![("name".to_owned(), Yaml::from(name))];
        metadata.extend(
            self.namespace
                .as_deref()
                .map(|namespace| ("namespace".to_owned(), namespace.into())),
        );
        let selector = if self.node {
            "nodeSelector"
        } else {
            "endpointSelector"
        };
        let mut spec = vec![(selector.to_owned(), self.selector.yaml(self.namespace.as_deref()))];
        for (section, rules) in [("ingress", ingress), ("egress", egress)] {
            if !rules.is_empty() {
                spec.push((section.to_owned(), Yaml::List(rules)));
            }
        }
        map([
            ("apiVersion", "cilium.io/v2".into()),
            ("kind", kind.into()),
            ("metadata", Yaml::Map(metadata)),
            ("spec", Yaml::Map(spec)),
        ])
    }
}

/// The peers of a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PeerForm {
    /// `fromEndpoints` or `toEndpoints`.
    Labels(LabelSelector),
    /// `fromEntities` or `toEntities`.
    Entity(&'static str),
    /// `toFQDNs`.
    Names(BTreeSet<Name>),
    /// `fromCIDR` or `toCIDR`, an address.
    Address(IpAddr),
}

/// A DNS name or pattern.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Name {
    /// `matchName`.
    Exact(String),
    /// `matchPattern`.
    Pattern(String),
}

impl Name {
    pub(crate) fn yaml(&self) -> Yaml {
        match self {
            Self::Exact(name) => map([("matchName", name.as_str().into())]),
            Self::Pattern(pattern) => map([("matchPattern", pattern.as_str().into())]),
        }
    }
}

/// Returns the entity that stands for exactly the reserved identity of these labels, if there is one.
pub(crate) fn entity(labels: &Labels) -> Option<&'static str> {
    // The world comes last: an address of the world that is also the API server has both labels.
    const ENTITIES: [&str; 10] = [
        "host",
        "remote-node",
        "kube-apiserver",
        "ingress",
        "health",
        "init",
        "unmanaged",
        "world-ipv4",
        "world-ipv6",
        "world",
    ];
    ENTITIES.into_iter().find(|name| labels.has_reserved(name))
}

impl PeerForm {
    /// Returns the member of the rule for peers.
    pub(crate) fn yaml(&self, direction: Direction, implied_namespace: Option<&str>) -> (String, Yaml) {
        let towards = match direction {
            Direction::Ingress => "from",
            Direction::Egress => "to",
        };
        let (what, members) = match self {
            // In a cluster-wide policy, and for a peer of another namespace, the selector names the namespace.
            Self::Labels(selector) => ("Endpoints", list([selector.yaml(implied_namespace)])),
            Self::Entity(name) => ("Entities", list([Yaml::from(*name)])),
            Self::Names(names) => ("FQDNs", list(names.iter().map(Name::yaml))),
            Self::Address(address) => {
                let length = if address.is_ipv4() { 32 } else { 128 };
                ("CIDR", list([format!("{address}/{length}").into()]))
            }
        };
        (format!("{towards}{what}"), members)
    }
}

/// The ports of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PortForm {
    /// IP protocol number.
    pub(crate) protocol: u8,
    /// Port, or ICMP type.
    pub(crate) port: u16,
}

impl PortForm {
    /// Returns whether the policy language has a port or type for the protocol.
    pub(crate) const fn has_port(self) -> bool {
        matches!(
            self.protocol,
            protocol::TCP | protocol::UDP | protocol::SCTP | protocol::ICMP | protocol::ICMPV6
        )
    }

    /// Returns whether the protocol is ICMP or ICMPv6.
    pub(crate) const fn is_icmp(self) -> bool {
        matches!(self.protocol, protocol::ICMP | protocol::ICMPV6)
    }

    /// Returns the element of `icmps`, or of `ports`; `None` if the language has no name for the protocol.
    pub(crate) fn yaml(self) -> Option<Yaml> {
        let name = match self.protocol {
            protocol::ICMP | protocol::ICMPV6 => {
                let family = if self.protocol == protocol::ICMP {
                    "IPv4"
                } else {
                    "IPv6"
                };
                return Some(map([
                    ("family", family.into()),
                    ("type", Yaml::Number(u64::from(self.port))),
                ]));
            }
            protocol::TCP => "TCP",
            protocol::UDP => "UDP",
            protocol::SCTP => "SCTP",
            112 => "VRRP",
            2 => "IGMP",
            _ => return None,
        };
        let port = if self.has_port() { self.port } else { 0 };
        Some(map([
            ("port", port.to_string().into()),
            ("protocol", name.into()),
        ]))
    }
}

/// The application rules of a rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct L7Form {
    /// `rules.http`: method, path and host, each as a regular expression.
    pub(crate) http: BTreeSet<HttpForm>,
    /// `rules.dns`.
    pub(crate) dns: BTreeSet<Name>,
    /// `serverNames`.
    pub(crate) server_names: BTreeSet<String>,
    /// `rules.kafka`: API key, topic and client id.
    pub(crate) kafka: BTreeSet<(i16, Option<String>, Option<String>)>,
    /// `terminatingTLS` and `originatingTLS`.
    pub(crate) tls: Option<(TlsContext, Option<TlsContext>)>,
}

/// An http rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HttpForm {
    pub(crate) method: String,
    pub(crate) path: Option<String>,
    pub(crate) host: Option<String>,
}

impl L7Form {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the members of the entry of `toPorts`, beside `ports`.
    pub(crate) fn yaml(&self) -> Vec<(String, Yaml)> {
        let mut members = Vec::new();
        if let Some((terminating, originating)) = &self.tls {
            members.push(("terminatingTLS".to_owned(), context(terminating)));
            members.extend(
                originating
                    .as_ref()
                    .map(|originating| ("originatingTLS".to_owned(), context(originating))),
            );
        }
        if !self.server_names.is_empty() {
            let names = self.server_names.iter().map(|name| name.as_str().into());
            members.push(("serverNames".to_owned(), list(names)));
        }
        let http = self.http.iter().map(|rule| {
            let mut parts = vec![("method".to_owned(), Yaml::from(rule.method.as_str()))];
            let optional = [("path", &rule.path), ("host", &rule.host)];
            parts.extend(
                optional
                    .into_iter()
                    .filter_map(|(name, value)| Some((name.to_owned(), value.as_deref()?.into()))),
            );
            Yaml::Map(parts)
        });
        let kafka = self.kafka.iter().map(|(key, topic, client)| {
            let mut parts: Vec<(String, Yaml)> = api_name(*key)
                .map(|name| ("apiKey".to_owned(), name.into()))
                .into_iter()
                .collect();
            let optional = [("topic", topic), ("clientID", client)];
            parts.extend(
                optional
                    .into_iter()
                    .filter_map(|(name, value)| Some((name.to_owned(), value.as_deref()?.into()))),
            );
            Yaml::Map(parts)
        });
        let rules = if !self.http.is_empty() {
            Some(("http", list(http)))
        } else if !self.dns.is_empty() {
            Some(("dns", list(self.dns.iter().map(Name::yaml))))
        } else if !self.kafka.is_empty() {
            Some(("kafka", list(kafka)))
        } else {
            None
        };
        members.extend(
            rules.map(|(name, rules)| ("rules".to_owned(), Yaml::Map(vec![(name.to_owned(), rules)]))),
        );
        members
    }
}

/// Returns `terminatingTLS` or `originatingTLS`.
fn context(tls: &TlsContext) -> Yaml {
    let (namespace, name) = tls.secret.split_once('/').unwrap_or(("", &tls.secret));
    let mut secret = Vec::new();
    if !namespace.is_empty() {
        secret.push(("namespace".to_owned(), Yaml::from(namespace)));
    }
    secret.push(("name".to_owned(), name.into()));
    let mut members = vec![("secret".to_owned(), Yaml::Map(secret))];
    let optional = [
        ("trustedCA", &tls.trusted_ca),
        ("certificate", &tls.certificate),
        ("privateKey", &tls.private_key),
    ];
    members.extend(
        optional
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| (name.to_owned(), value.as_str().into())),
    );
    Yaml::Map(members)
}

/// Returns a rule: peers, ports (an empty list stands for every port), and application rules.
pub(crate) fn rule(peer: (String, Yaml), ports: &[PortForm], l7: &L7Form) -> Option<Yaml> {
    let mut members = vec![peer];
    members.extend(ports_of(ports, l7)?);
    Some(Yaml::Map(members))
}

/// Returns the members of a rule for ports: `toPorts` or `icmps`, which a rule cannot combine.
fn ports_of(ports: &[PortForm], l7: &L7Form) -> Option<Vec<(String, Yaml)>> {
    if ports.is_empty() {
        return Some(Vec::new());
    }
    let elements: Vec<Yaml> = ports.iter().map(|port| port.yaml()).collect::<Option<_>>()?;
    if ports.iter().all(|port| port.is_icmp()) {
        return Some(vec![(
            "icmps".to_owned(),
            list([map([("fields", list(elements))])]),
        )]);
    }
    Some(vec![("toPorts".to_owned(), list([entry(elements, l7)]))])
}

/// Returns an entry of `toPorts`.
pub(crate) fn entry(ports: Vec<Yaml>, l7: &L7Form) -> Yaml {
    let mut members = vec![("ports".to_owned(), list(ports))];
    members.extend(l7.yaml());
    Yaml::Map(members)
}

/// Returns whether `selector` selects peers in a policy of this namespace: such a policy adds its own namespace to a
/// selector that names none.
pub(crate) fn can_be_peer(selector: &LabelSelector) -> bool {
    selector.labels().has("k8s", NAMESPACE)
        || selector.labels().iter().any(|label| label.source == "reserved")
}

/// Returns a name of a policy: lower case letters, digits and hyphens (RFC 1123), at most 63 characters.
pub(crate) fn resource_name(parts: &[&str]) -> String {
    const LONGEST: usize = 56;
    let mut name = String::new();
    for part in parts {
        for character in part.chars().chain(['-']) {
            let character = character.to_ascii_lowercase();
            if character.is_ascii_alphanumeric() {
                name.push(character);
            } else if !name.ends_with('-') && !name.is_empty() {
                name.push('-');
            }
        }
    }
    name.truncate(LONGEST);
    let trimmed = name.trim_matches('-');
    if trimmed.is_empty() {
        "policy".to_owned()
    } else {
        trimmed.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_policies_are_dns_labels() {
        assert_eq!(resource_name(&["explain", "Web_1/x", "80"]), "explain-web-1-x-80");
        assert_eq!(resource_name(&["é\n"]), "policy");
        assert!(resource_name(&[&"a".repeat(99)]).len() <= 63);
    }
}
