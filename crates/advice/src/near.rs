//! Rules that nearly match a packet, and the requirements that fail.

use std::collections::{BTreeMap, HashMap};

use palisade_abi::{Direction, protocol};
use palisade_model::{
    inventory::Endpoint,
    labels::Labels,
    request::Request,
    rule::{
        Entity, FqdnPattern, HttpRule, KafkaRule, L4Protocol, L7Rules, LabelSource, Peer, Peers, PolicyKind,
        PortRule, PortSpec, Ports, Requirement, Rule, Section, Selector, Subject, Test,
    },
    snapshot::{Alternative, Matcher, RuleInfo, RuleKey, RulePlace, RuleSet, inspector_name},
};
use palisade_policy::{
    compile::{Compiler, RuleMatch},
    l7::{name_matches, passing},
    trace::{End, Question},
};
use palisade_protocols::kafka::api_name;
use serde::Serialize;

/// Largest number of rules in an answer.
const MAX_RULES: usize = 5;
/// Largest number of texts of a list in one message.
const MAX_LISTED: usize = 4;
/// Largest distance ([`Failed::distance`]) of a rule that is reported.
const MAX_DISTANCE: u32 = 7;

/// A rule that nearly matches a packet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NearMiss {
    /// Policy, rule and `FILE:LINE`.
    pub rule: String,
    /// Requirements that the packet does not meet.
    pub failed: Vec<Failed>,
    /// Sum of the distances of the failed requirements, by which the rules are sorted.
    pub distance: u32,
}

/// A requirement of a rule that a packet does not meet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failed {
    /// Kind of the requirement: `subject`, `selector`, `entity`, `cidr`, `dns name`, `protocol`, `port`, `method`,
    /// `path`, `host`, `header`, `server name`, `query`, `api key`, `api version`, `client id`, `topic`,
    /// `application protocol`, or `peers` for a rule without peers.
    pub requirement: &'static str,
    /// What the rule requires, and what the packet has.
    pub text: String,
}

impl Failed {
    const fn new(requirement: &'static str, text: String) -> Self {
        Self { requirement, text }
    }

    /// Returns the distance: 1 for a part of a request, up to 4 for another workload.
    fn distance(&self) -> u32 {
        match self.requirement {
            "subject" | "peers" => 4,
            "selector" | "port" | "dns name" => 2,
            "cidr" | "entity" | "protocol" | "application protocol" => 3,
            _ => 1,
        }
    }
}

/// The endpoint and the direction of a verdict, and the peer.
#[derive(Clone, Copy)]
pub(crate) struct SideOf<'a> {
    pub(crate) compiler: &'a Compiler,
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) direction: Direction,
    pub(crate) other: &'a End,
    pub(crate) question: &'a Question,
}

/// Returns the rules that nearly allow the packet, the closest first.
pub(crate) fn near_misses(side: SideOf<'_>) -> Vec<NearMiss> {
    let infos: HashMap<&RulePlace, &RuleInfo> = side
        .compiler
        .snapshot()
        .rules
        .values()
        .filter_map(|info| match &info.key {
            RuleKey::Rule(place) => Some((place, &**info)),
            _ => None,
        })
        .collect();
    let matches = side.compiler.rule_matches(
        side.endpoint.id,
        side.direction,
        side.other.identity,
        side.question.protocol,
        side.question.port,
    );
    let [allows, _] = Section::of(side.direction);
    let mut found: BTreeMap<(u32, String), NearMiss> = BTreeMap::new();
    for (_, content) in side.compiler.files() {
        for policy in &content.policies {
            for (number, spec) in policy.specs.iter().enumerate() {
                let subject = subject_failures(&spec.subject, side.endpoint);
                if subject.len() > 1 {
                    continue;
                }
                for (index, rule) in spec.rules(allows).iter().enumerate() {
                    let place = RulePlace {
                        kind: policy.kind,
                        policy: policy.qualified_name().into(),
                        spec: number as u32,
                        section: allows,
                        index: index as u32,
                    };
                    let info = infos.get(&place).copied();
                    let known = info
                        .filter(|_| subject.is_empty())
                        .and_then(|info| matches.get(&info.id).copied());
                    let mut failed = subject.clone();
                    failed.extend(rule_failures(side, rule, known, policy.kind));
                    let distance = failed.iter().map(Failed::distance).sum();
                    if failed.is_empty() || distance > MAX_DISTANCE {
                        continue;
                    }
                    let text = match info {
                        Some(info) => info.to_string(),
                        None => format!(
                            "policy {} {} rule {} ({}:{})",
                            policy.qualified_name(),
                            allows.name(),
                            index + 1,
                            rule.location.file,
                            rule.location.line
                        ),
                    };
                    found.insert(
                        (distance, text.clone()),
                        NearMiss {
                            rule: text,
                            failed,
                            distance,
                        },
                    );
                    while found.len() > MAX_RULES {
                        found.pop_last();
                    }
                }
            }
        }
    }
    found.into_values().collect()
}

fn subject_failures(subject: &Subject, endpoint: &Endpoint) -> Vec<Failed> {
    let (selector, node) = match subject {
        Subject::Endpoints(selector) => (selector, false),
        Subject::Node(selector) => (selector, true),
    };
    if node != endpoint.is_node() {
        let what = if node { "the node" } else { "workloads" };
        // Two failures, so that the rule is not reported.
        let failed = Failed::new("subject", format!("the policy selects {what}"));
        return vec![failed.clone(), failed];
    }
    selector_failures(selector, &endpoint.labels)
        .into_iter()
        .map(|text| Failed::new("subject", format!("the policy selects endpoints with {text}")))
        .collect()
}

fn rule_failures(side: SideOf<'_>, rule: &Rule, known: Option<RuleMatch>, kind: PolicyKind) -> Vec<Failed> {
    let mut failed = match &known {
        Some(known) if known.peer => Vec::new(),
        _ => peer_failures(side, rule),
    };
    let Ports::OneOf(entries) = &rule.ports else {
        return failed;
    };
    let has_port = |entry: &PortRule| {
        entry
            .ports
            .iter()
            .any(|port| port_failure(side, port, kind).is_none())
    };
    let matching: Vec<&PortRule> = entries.iter().filter(|entry| has_port(entry)).collect();
    match known {
        // The compiler has resolved the names of ports.
        Some(known) if known.port => {}
        _ if !matching.is_empty() && known.is_none() => {}
        _ => {
            let ports = entries.iter().flat_map(|entry| &entry.ports);
            let closest = ports
                .filter_map(|port| port_failure(side, port, kind))
                .min_by_key(|(far, _)| *far);
            failed.push(match closest {
                Some((_, failure)) => failure,
                None => Failed::new("port", "the rule has no port".into()),
            });
            return failed;
        }
    }
    failed.extend(
        matching
            .into_iter()
            .map(|entry| l7_failures(entry, side.question))
            .min_by_key(|failed| failed.iter().map(Failed::distance).sum::<u32>())
            .unwrap_or_default(),
    );
    failed
}

fn peer_failures(side: SideOf<'_>, rule: &Rule) -> Vec<Failed> {
    let labels = &side.other.labels;
    let peers = match &rule.peers {
        Peers::Any => return Vec::new(),
        Peers::None => {
            return vec![Failed::new(
                "peers",
                "the rule names no peer that this node can resolve".into(),
            )];
        }
        Peers::OneOf(peers) => peers,
    };
    let mut closest: Option<Vec<Failed>> = None;
    for peer in peers {
        let mut failed = if side.compiler.selects(peer, labels) {
            Vec::new()
        } else {
            peer_failure(side, peer)
        };
        if let Peer::Labels(_) = peer {
            let required = rule
                .requires
                .iter()
                .flat_map(|selector| selector_failures(selector, labels));
            failed
                .extend(required.map(|text| Failed::new("selector", format!("the section requires {text}"))));
        }
        let distance = |failed: &[Failed]| failed.iter().map(Failed::distance).sum::<u32>();
        if closest
            .as_ref()
            .is_none_or(|closest| distance(&failed) < distance(closest))
        {
            closest = Some(failed);
        }
    }
    closest.unwrap_or_default()
}

fn peer_failure(side: SideOf<'_>, peer: &Peer) -> Vec<Failed> {
    let other = side.other;
    let one = |requirement, text| vec![Failed::new(requirement, text)];
    match peer {
        Peer::Labels(selector) | Peer::Nodes(selector) => {
            let mut failed: Vec<Failed> = selector_failures(selector, &other.labels)
                .into_iter()
                .map(|text| Failed::new("selector", format!("the rule requires {text}")))
                .collect();
            if failed.is_empty() {
                failed = one(
                    "selector",
                    format!("it selects nodes, and {} is none", other.name),
                );
            }
            failed
        }
        Peer::Entity(entity) => one(
            "entity",
            format!("{} is not of the entity {}", other.name, entity_name(*entity)),
        ),
        Peer::Cidr(rule) => one(
            "cidr",
            if rule.except.is_empty() {
                format!("{} is not in {}", other.name, rule.cidr)
            } else {
                format!("{} is not in {} without its exceptions", other.name, rule.cidr)
            },
        ),
        Peer::CidrGroup { name, .. } => one("cidr", format!("{} is not in the group {name}", other.name)),
        Peer::CidrGroupSelector { .. } => one(
            "cidr",
            format!("{} is in none of the selected groups", other.name),
        ),
        Peer::Fqdn(pattern) => {
            let text = pattern_text(pattern);
            let names: Vec<&str> = side
                .question
                .to_fqdn
                .iter()
                .chain(&side.question.more_names)
                .map(String::as_str)
                .collect();
            one(
                "dns name",
                if names.is_empty() {
                    format!(
                        "{} has not been learned by a name that {text} matches",
                        other.name
                    )
                } else {
                    format!("{text} does not match {}", some(&names))
                },
            )
        }
    }
}

/// Returns the requirements that the labels do not meet, in words.
fn selector_failures(selector: &Selector, labels: &Labels) -> Vec<String> {
    selector
        .requirements
        .iter()
        .filter(|requirement| !requirement.holds(labels))
        .map(|requirement| requirement_text(requirement, labels))
        .collect()
}

fn requirement_text(requirement: &Requirement, labels: &Labels) -> String {
    let key = match &requirement.source {
        LabelSource::Any => requirement.key.clone(),
        LabelSource::Named(source) => format!("{source}:{}", requirement.key),
    };
    let value = labels.iter().find(|label| {
        label.key == requirement.key
            && match &requirement.source {
                LabelSource::Any => true,
                LabelSource::Named(source) => *source == label.source,
            }
    });
    let has = match value {
        Some(label) if label.value.is_empty() => "it is there".to_owned(),
        Some(label) => format!("it is {}", label.value),
        None => "there is none".to_owned(),
    };
    match &requirement.test {
        Test::In(values) if values.len() == 1 => format!("{key}={}, and {has}", values[0]),
        Test::In(values) => format!("{key} in ({}), and {has}", some(values)),
        Test::NotIn(values) => format!("{key} not in ({}), and {has}", some(values)),
        Test::Exists => format!("the label {key}, and {has}"),
        Test::DoesNotExist => format!("no label {key}, and {has}"),
    }
}

/// Returns why a port does not match, with a measure of the difference.
fn port_failure(side: SideOf<'_>, port: &PortSpec, kind: PolicyKind) -> Option<(u32, Failed)> {
    let (protocol, number) = (side.question.protocol, side.question.port);
    let has = packet_port(protocol, number);
    let fits = |wanted: L4Protocol| match wanted {
        L4Protocol::Any => matches!(protocol, protocol::TCP | protocol::UDP | protocol::SCTP),
        L4Protocol::Tcp => protocol == protocol::TCP,
        L4Protocol::Udp => protocol == protocol::UDP,
        L4Protocol::Sctp => protocol == protocol::SCTP,
        L4Protocol::Other(wanted) => protocol == wanted,
    };
    let (fits, first, last, wanted) = match port {
        PortSpec::Range {
            protocol,
            first,
            last,
        } => {
            let wanted = if first == last {
                format!("{first}/{}", l4_name(*protocol))
            } else {
                format!("{first}-{last}/{}", l4_name(*protocol))
            };
            (fits(*protocol), *first, *last, wanted)
        }
        PortSpec::Named { protocol, name, last } => {
            let own = side.endpoint.named_ports.get(name);
            let wanted = format!("{name}/{}", l4_name(*protocol));
            // For egress, and for bare rules, only the compiler resolves names.
            let resolved = own.filter(|_| side.direction == Direction::Ingress && kind != PolicyKind::Raw);
            let Some(own) = resolved else {
                return Some((
                    u32::from(u16::MAX),
                    Failed::new("port", format!("{has} is not the port {wanted}")),
                ));
            };
            (
                fits(*protocol),
                own.port,
                own.port.max(*last),
                format!("{wanted}, which is {}", own.port),
            )
        }
        PortSpec::Icmp { v6, kind } => {
            let wanted = if *v6 { protocol::ICMPV6 } else { protocol::ICMP };
            let kind = u16::from(*kind);
            (protocol == wanted, kind, kind, packet_port(wanted, kind))
        }
    };
    if !fits {
        return Some((1 << 20, Failed::new("protocol", format!("{has} is not {wanted}"))));
    }
    let with_ports = PortSpec::Range {
        protocol: L4Protocol::Any,
        first: 0,
        last: u16::MAX,
    } != *port;
    if (first..=last).contains(&number)
        || !with_ports
        || matches!(
            port,
            PortSpec::Range {
                protocol: L4Protocol::Other(_),
                ..
            }
        )
    {
        return None;
    }
    let far = u32::from(first.abs_diff(number).min(last.abs_diff(number)));
    Some((far, Failed::new("port", format!("{has} is not {wanted}"))))
}

/// Returns protocol and port of a packet in words.
pub(crate) fn packet_port(number: u8, port: u16) -> String {
    match number {
        protocol::TCP => format!("{port}/TCP"),
        protocol::UDP => format!("{port}/UDP"),
        protocol::SCTP => format!("{port}/SCTP"),
        protocol::ICMP => format!("ICMP type {port}"),
        protocol::ICMPV6 => format!("ICMPv6 type {port}"),
        other => format!("protocol {other}"),
    }
}

fn l4_name(protocol: L4Protocol) -> String {
    match protocol {
        L4Protocol::Any => "ANY".into(),
        L4Protocol::Tcp => "TCP".into(),
        L4Protocol::Udp => "UDP".into(),
        L4Protocol::Sctp => "SCTP".into(),
        L4Protocol::Other(number) => packet_port(number, 0),
    }
}

/// Returns why the application rules of an entry do not allow the request; empty if they do, or without a request.
fn l7_failures(entry: &PortRule, question: &Question) -> Vec<Failed> {
    let request = &question.request;
    if request.is_empty() || entry.l7.is_none() {
        return Vec::new();
    }
    let mut failed = Vec::new();
    if let Some(name) = &request.tls {
        let names = &entry.l7.server_names;
        let allows = |pattern: &FqdnPattern| !name.is_empty() && name_matches(pattern, name);
        if !names.is_empty() && !names.iter().any(allows) {
            let texts: Vec<&str> = names.iter().map(pattern_text).collect();
            let has = match name.as_str() {
                "" => "a hello without a name",
                name => name,
            };
            failed.push(Failed::new(
                "server name",
                format!("{has} is not {}", some(&texts)),
            ));
        }
    }
    let other = |inspector: &str| {
        vec![Failed::new(
            "application protocol",
            format!(
                "the rule is about {inspector}, the request about {}",
                inspector_name(request.inspector())
            ),
        )]
    };
    failed.extend(match (&entry.l7.rules, request) {
        (L7Rules::None, _) => Vec::new(),
        (L7Rules::Http(rules), Request { http: Some(_), .. }) => {
            closest(rules.iter().map(|rule| http_failures(rule, request)))
        }
        (L7Rules::Dns(patterns), Request { dns: Some(name), .. }) => {
            if patterns.iter().any(|pattern| name_matches(pattern, name)) {
                Vec::new()
            } else {
                let texts: Vec<&str> = patterns.iter().map(pattern_text).collect();
                vec![Failed::new("query", format!("{name} is not {}", some(&texts)))]
            }
        }
        (L7Rules::Kafka(rules), Request { kafka: Some(_), .. }) => {
            closest(rules.iter().map(|rule| kafka_failures(rule, request)))
        }
        (L7Rules::Http(_), Request { tls: Some(_), .. }) if entry.l7.terminating_tls.is_some() => Vec::new(),
        (L7Rules::Http(_), _) => other("http"),
        (L7Rules::Dns(_), _) => other("dns"),
        (L7Rules::Kafka(_), _) => other("kafka"),
        (L7Rules::Generic { parser, .. }, _) => other(parser),
    });
    failed
}

fn closest(all: impl Iterator<Item = Vec<Failed>>) -> Vec<Failed> {
    all.min_by_key(Vec::len).unwrap_or_default()
}

/// Returns whether a rule with only this matcher allows the request.
fn allows(matcher: Matcher, request: &Request) -> bool {
    let set = RuleSet {
        reads: request.inspector(),
        alternatives: vec![Alternative { rule: 1, matcher }],
        ..RuleSet::default()
    };
    passing(&set, request).is_some()
}

fn http_failures(rule: &HttpRule, request: &Request) -> Vec<Failed> {
    let Some(http) = &request.http else {
        return Vec::new();
    };
    let mut failed = Vec::new();
    let mut check = |part: HttpRule, requirement, text: &dyn Fn() -> String| {
        if !allows(Matcher::Http(part), request) {
            failed.push(Failed::new(requirement, text()));
        }
    };
    if let Some(method) = &rule.method {
        let part = HttpRule {
            method: Some(method.clone()),
            ..HttpRule::default()
        };
        check(part, "method", &|| {
            format!("{} does not match {method}", http.method)
        });
    }
    if let Some(path) = &rule.path {
        let part = HttpRule {
            path: Some(path.clone()),
            ..HttpRule::default()
        };
        check(part, "path", &|| {
            format!(
                "{} does not match {path}, as sent or as a server would resolve it",
                http.path
            )
        });
    }
    if let Some(host) = &rule.host {
        let part = HttpRule {
            host: Some(host.clone()),
            ..HttpRule::default()
        };
        let has = if http.host.is_empty() {
            "no host"
        } else {
            &http.host
        };
        check(part, "host", &|| format!("{has} does not match {host}"));
    }
    for header in &rule.headers {
        let part = HttpRule {
            headers: vec![header.clone()],
            ..HttpRule::default()
        };
        check(part, "header", &|| match &header.1 {
            Some(value) => format!("{} must be {value}", header.0),
            None => format!("{} must be there", header.0),
        });
    }
    for header in &rule.header_matches {
        let part = HttpRule {
            header_matches: vec![header.clone()],
            ..HttpRule::default()
        };
        // The expected value can be a secret.
        check(part, "header", &|| {
            format!("{} must have the expected value", header.name)
        });
    }
    failed
}

fn kafka_failures(rule: &KafkaRule, request: &Request) -> Vec<Failed> {
    let Some(kafka) = &request.kafka else {
        return Vec::new();
    };
    if allows(Matcher::Kafka(rule.clone()), request) {
        return Vec::new();
    }
    let name = |key: i16| api_name(key).map_or_else(|| key.to_string(), str::to_owned);
    let mut failed = Vec::new();
    if !rule.api_keys.is_empty() && !rule.api_keys.contains(&kafka.api_key) {
        let keys: Vec<String> = rule.api_keys.iter().map(|key| name(*key)).collect();
        failed.push(Failed::new(
            "api key",
            format!("{} is not {}", name(kafka.api_key), some(&keys)),
        ));
    }
    if let Some(version) = rule.api_version.filter(|version| *version != kafka.api_version) {
        failed.push(Failed::new(
            "api version",
            format!("{} is not {version}", kafka.api_version),
        ));
    }
    if let Some(id) = rule
        .client_id
        .as_ref()
        .filter(|id| kafka.client_id.as_ref() != Some(*id))
    {
        let has = kafka.client_id.as_deref().unwrap_or("no client id");
        failed.push(Failed::new("client id", format!("{has} is not {id}")));
    }
    if failed.is_empty() {
        failed.push(Failed::new(
            "topic",
            match &rule.topic {
                Some(topic) => format!(
                    "the request must be about {topic} alone, and it is about {}",
                    some(&kafka.topics)
                ),
                None => "the API key is not known".into(),
            },
        ));
    }
    failed
}

fn pattern_text(pattern: &FqdnPattern) -> &str {
    match pattern {
        FqdnPattern::Name(text) | FqdnPattern::Pattern(text) => text,
    }
}

const fn entity_name(entity: Entity) -> &'static str {
    match entity {
        Entity::All => "all",
        Entity::World => "world",
        Entity::WorldIpv4 => "world-ipv4",
        Entity::WorldIpv6 => "world-ipv6",
        Entity::Cluster => "cluster",
        Entity::Host => "host",
        Entity::RemoteNode => "remote-node",
        Entity::KubeApiserver => "kube-apiserver",
        Entity::Health => "health",
        Entity::Init => "init",
        Entity::Unmanaged => "unmanaged",
        Entity::Ingress => "ingress",
        Entity::None => "none",
    }
}

/// Returns the first texts of a list.
fn some<T: AsRef<str>>(texts: &[T]) -> String {
    let mut shown: Vec<&str> = texts.iter().take(MAX_LISTED).map(AsRef::as_ref).collect();
    if texts.len() > MAX_LISTED {
        shown.push("...");
    }
    if shown.is_empty() {
        return "none".into();
    }
    shown.join(", ")
}
