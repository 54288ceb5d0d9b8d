//! Conflicts: rules for the same peer and port whose application rules exclude each other.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
};

use palisade_abi::{Direction, protocol};
use palisade_model::{
    diagnostic::Diagnostic,
    rule::{
        Entity, L4Protocol, LabelSource, Location, Peer, Peers, Policy, PortSpec, Ports, Requirement, Rule,
        Section, Spec, Subject as SpecSubject, Test,
    },
};

use super::{l7_policy::L7Policy, select::ResolvedSelector};

/// A port as written, one of its protocols, and a peer (`None`: any peer). Two application rules for the same spot
/// must not contradict each other.
type Spot<'a> = (Port<'a>, L4Protocol, Option<Cow<'a, Peer>>);

/// A port as written, without its protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Port<'a> {
    Range(u16, u16),
    Named(&'a str),
    Icmp(u8),
}

/// Finds conflicts ([`L7Policy::conflict`]) between the rules of several specs.
#[derive(Default)]
pub(super) struct ConflictFinder<'a> {
    seen: HashMap<Spot<'a>, Vec<(L7Policy, String, &'a Location)>>,
    denied: HashSet<Spot<'a>>,
    errors: Vec<Diagnostic>,
}

impl<'a> ConflictFinder<'a> {
    pub(super) fn add(&mut self, policy: &str, spec: &'a Spec, direction: Direction) {
        for section in Section::of(direction) {
            for rule in spec.rules(section) {
                self.add_rule(policy, rule, section);
            }
        }
    }

    fn add_rule(&mut self, policy: &str, rule: &'a Rule, section: Section) {
        let Ports::OneOf(entries) = &rule.ports else {
            return;
        };
        if !section.denies() && entries.iter().all(|entry| entry.l7.is_none()) {
            return;
        }
        // All ways to select any peer count as the same peer.
        let any = |peer: &Peer| ResolvedSelector::of(peer, &[]) == ResolvedSelector::Any;
        let peers: Vec<Option<Cow<'_, Peer>>> = match &rule.peers {
            Peers::None => return,
            Peers::Any => vec![None],
            Peers::OneOf(peers) if peers.iter().any(any) => vec![None],
            Peers::OneOf(peers) => peers.iter().flat_map(parts).map(Some).collect(),
        };
        for entry in entries {
            let l7 = L7Policy::of(&entry.l7);
            if l7.is_none() && !section.denies() {
                continue;
            }
            let spots = entry.ports.iter().flat_map(split).flat_map(|(port, protocol)| {
                let peers = peers.iter().cloned();
                peers.map(move |peer| (port, protocol, peer))
            });
            for spot in spots {
                match &l7 {
                    None => {
                        self.denied.insert(spot);
                    }
                    Some(l7) => self.check(spot, l7, policy, &entry.location),
                }
            }
        }
    }

    fn check(&mut self, key: Spot<'a>, l7: &L7Policy, policy: &str, location: &'a Location) {
        // A deny takes precedence over all application rules of the spot, so these rules cannot conflict.
        if self.denied.contains(&key) {
            return;
        }
        let seen = self.seen.entry(key).or_default();
        for (other, other_policy, other_location) in seen.iter() {
            if let Some(what) = l7.conflict(other) {
                self.errors.push(Diagnostic::error(
                    location.clone(),
                    format!(
                        "policy {policy} and policy {other_policy} ({other_location}) conflict for the same peer and \
                         port: {what}; give one of them other ports or peers"
                    ),
                ));
                return;
            }
        }
        if !seen.iter().any(|(other, _, _)| other == l7) {
            seen.push((l7.clone(), policy.to_owned(), location));
        }
    }

    pub(super) fn finish(self) -> Result<(), Vec<Diagnostic>> {
        if self.errors.is_empty() {
            Ok(())
        } else {
            Err(self.errors)
        }
    }
}

/// Returns the peer and the entities that it consists of. A selector that requires only `reserved:X` becomes the entity
/// X.
fn parts(peer: &Peer) -> Vec<Cow<'_, Peer>> {
    const CLUSTER: [Entity; 7] = [
        Entity::Host,
        Entity::RemoteNode,
        Entity::Init,
        Entity::Ingress,
        Entity::Health,
        Entity::Unmanaged,
        Entity::KubeApiserver,
    ];
    const WORLD: [Entity; 2] = [Entity::WorldIpv4, Entity::WorldIpv6];
    let made_of: &[Entity] = match peer {
        Peer::Entity(Entity::Cluster) => &CLUSTER,
        Peer::Entity(Entity::World) => &WORLD,
        Peer::Labels(selector) => {
            if let [requirement] = selector.requirements.as_slice()
                && let Some(entity) = entity_of(requirement)
            {
                return vec![Cow::Owned(Peer::Entity(entity))];
            }
            &[]
        }
        _ => &[],
    };
    let made_of = made_of.iter().map(|entity| Cow::Owned(Peer::Entity(*entity)));
    std::iter::once(Cow::Borrowed(peer)).chain(made_of).collect()
}

fn entity_of(requirement: &Requirement) -> Option<Entity> {
    let reserved = matches!(&requirement.source, LabelSource::Named(source) if source == "reserved");
    if !reserved || requirement.test != Test::In(vec![String::new()]) {
        return None;
    }
    Some(match requirement.key.as_str() {
        "host" => Entity::Host,
        "remote-node" => Entity::RemoteNode,
        "init" => Entity::Init,
        "ingress" => Entity::Ingress,
        "health" => Entity::Health,
        "unmanaged" => Entity::Unmanaged,
        "kube-apiserver" => Entity::KubeApiserver,
        "world" => Entity::World,
        "world-ipv4" => Entity::WorldIpv4,
        "world-ipv6" => Entity::WorldIpv6,
        _ => return None,
    })
}

/// Splits a port into its protocols, so that an entry for `ANY` and an entry for `TCP` with the same port are compared.
fn split(port: &PortSpec) -> Vec<(Port<'_>, L4Protocol)> {
    let (port, protocol) = match port {
        PortSpec::Range {
            protocol,
            first,
            last,
        } => (Port::Range(*first, *last), *protocol),
        PortSpec::Named { protocol, name, .. } => (Port::Named(name), *protocol),
        PortSpec::Icmp { v6, kind } => {
            let protocol = if *v6 { protocol::ICMPV6 } else { protocol::ICMP };
            (Port::Icmp(*kind), L4Protocol::Other(protocol))
        }
    };
    match protocol {
        L4Protocol::Any => [L4Protocol::Tcp, L4Protocol::Udp, L4Protocol::Sctp]
            .map(|protocol| (port, protocol))
            .into(),
        one => vec![(port, one)],
    }
}

/// Returns the conflicts between specs with equal selectors of endpoints or nodes, even if the selectors match no
/// endpoint of this node. The compiler itself finds the conflicts between all policies that select an endpoint.
pub fn conflicts(policies: &[Policy]) -> Vec<Diagnostic> {
    let mut errors = Vec::new();
    let mut subjects: Vec<&SpecSubject> = Vec::new();
    for spec in policies.iter().flat_map(|policy| &policy.specs) {
        if !subjects.contains(&&spec.subject) {
            subjects.push(&spec.subject);
        }
    }
    for subject in subjects {
        for direction in palisade_abi::DIRECTIONS {
            let mut finder = ConflictFinder::default();
            for policy in policies {
                let name = policy.qualified_name();
                for spec in policy.specs.iter().filter(|spec| spec.subject == *subject) {
                    finder.add(&name, spec, direction);
                }
            }
            if let Err(mut found) = finder.finish() {
                errors.append(&mut found);
            }
        }
    }
    errors
}

/// Returns the conflicts within each spec, and between any two specs that could select the same endpoint. Used for an
/// inventory without endpoints.
pub(crate) fn possible_conflicts(policies: &[Policy]) -> Vec<Diagnostic> {
    let specs: Vec<(String, &Spec)> = policies
        .iter()
        .flat_map(|policy| policy.specs.iter().map(|spec| (policy.qualified_name(), spec)))
        .collect();
    let mut errors = Vec::new();
    for (number, (policy, spec)) in specs.iter().enumerate() {
        for (other_policy, other) in &specs[number..] {
            if !can_overlap(&spec.subject, &other.subject) {
                continue;
            }
            for direction in palisade_abi::DIRECTIONS {
                let mut finder = ConflictFinder::default();
                finder.add(policy, spec, direction);
                if !std::ptr::eq(*spec, *other) {
                    finder.add(other_policy, other, direction);
                }
                if let Err(mut found) = finder.finish() {
                    errors.append(&mut found);
                }
            }
        }
    }
    errors
}

/// Returns whether a label set can exist that both subjects select. Sources of labels are ignored.
fn can_overlap(a: &SpecSubject, b: &SpecSubject) -> bool {
    let (a, b) = match (a, b) {
        (SpecSubject::Endpoints(a), SpecSubject::Endpoints(b))
        | (SpecSubject::Node(a), SpecSubject::Node(b)) => (a, b),
        _ => return false,
    };
    let all = || a.requirements.iter().chain(&b.requirements);
    all().all(|one| {
        let about_it = || {
            all()
                .filter(|other| other.key == one.key)
                .map(|other| &other.test)
        };
        match &one.test {
            Test::In(values) => values.iter().any(|value| {
                about_it().all(|test| match test {
                    Test::In(values) => values.contains(value),
                    Test::NotIn(values) => !values.contains(value),
                    Test::Exists => true,
                    Test::DoesNotExist => false,
                })
            }),
            Test::Exists => about_it().all(|test| *test != Test::DoesNotExist),
            Test::NotIn(_) | Test::DoesNotExist => true,
        }
    })
}

#[cfg(test)]
mod tests {
    use palisade_model::rule::Selector;

    use super::*;
    use crate::parse::parse_rules_json;

    /// Returns the conflicts between two `toPorts` entries of two rules with the same peers.
    fn together(a: &str, b: &str) -> Vec<String> {
        let rules = format!(
            r#"[{{"endpointSelector":{{}},"egress":[{{"toEntities":["world"],"toPorts":[{a}]}}]}},
                {{"endpointSelector":{{}},"egress":[{{"toEntities":["world"],"toPorts":[{b}]}}]}}]"#
        );
        let parsed = parse_rules_json("case", None, Some(&serde_json::from_str(&rules).unwrap()));
        assert!(!parsed.has_errors(), "{:?}", parsed.diagnostics);
        conflicts(&parsed.policies)
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    const NAMES: &str = r#"{"ports":[{"port":"443"}],"serverNames":["a.test"]}"#;
    const HTTP: &str = r#"{"ports":[{"port":"443","protocol":"TCP"}],"rules":{"http":[{"method":"GET"}]}}"#;
    const DNS: &str = r#"{"ports":[{"port":"443","protocol":"ANY"}],"rules":{"dns":[{"matchPattern":"*"}]}}"#;
    const PLAIN: &str = r#"{"ports":[{"port":"443","protocol":"TCP"}]}"#;
    const ELSEWHERE: &str =
        r#"{"ports":[{"port":"80","protocol":"TCP"}],"rules":{"http":[{"method":"GET"}]}}"#;

    #[test]
    fn protocols_on_one_port_exclude_each_other() {
        for (a, b) in [(NAMES, HTTP), (HTTP, DNS), (NAMES, DNS)] {
            let errors = together(a, b);
            assert!(!errors.is_empty(), "{a} {b}");
            assert!(
                errors[0].contains("policy rules[1] and policy rules[0]"),
                "{}",
                errors[0]
            );
        }
        for (a, b) in [
            (NAMES, NAMES),
            (HTTP, HTTP),
            (HTTP, PLAIN),
            (NAMES, ELSEWHERE),
            (DNS, ELSEWHERE),
        ] {
            assert_eq!(together(a, b), [] as [String; 0]);
        }
    }

    #[test]
    fn server_names_combine_with_http_if_tls_is_terminated() {
        let tls = r#""terminatingTLS":{"secret":{"namespace":"n","name":"s"}}"#;
        let http = format!(
            r#"{{"ports":[{{"port":"443","protocol":"TCP"}}],{tls},"rules":{{"http":[{{"method":"GET"}}]}}}}"#
        );
        assert_eq!(together(NAMES, &http), [] as [String; 0]);
        let other = http.replace("\"name\":\"s\"", "\"name\":\"other\"");
        assert!(together(&other, &http)[0].contains("terminatingTLS"));
    }

    #[test]
    fn subjects_overlap_unless_their_labels_contradict() {
        let subject = |key: &str, test: Test| {
            SpecSubject::Endpoints(Selector {
                requirements: vec![Requirement {
                    source: LabelSource::Any,
                    key: key.into(),
                    test,
                }],
            })
        };
        let is = |value: &str| Test::In(vec![value.into()]);
        let a = subject("app", is("a"));
        assert!(can_overlap(&a, &subject("tier", is("b"))));
        assert!(can_overlap(
            &a,
            &subject("app", Test::In(vec!["b".into(), "a".into()]))
        ));
        assert!(can_overlap(&a, &subject("app", Test::NotIn(vec!["b".into()]))));
        for test in [is("b"), Test::NotIn(vec!["a".into()]), Test::DoesNotExist] {
            assert!(!can_overlap(&a, &subject("app", test)));
        }
        assert!(!can_overlap(
            &subject("app", Test::Exists),
            &subject("app", Test::DoesNotExist)
        ));
        let SpecSubject::Endpoints(selector) = a.clone() else {
            return;
        };
        assert!(!can_overlap(&a, &SpecSubject::Node(selector)));
    }
}
