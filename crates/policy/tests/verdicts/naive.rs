//! Evaluation of the rules one by one, as the policy language defines them: without identities, classes and tables.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use palisade_abi::Direction;
use palisade_model::{
    inventory::{Endpoint, Enforcement, Inventory, NamedPorts},
    labels::Labels,
    rule::{
        CidrGroup, CidrRule, Entity, FqdnPattern, L4Protocol, L7, L7Rules, LabelSource, Peer, Peers, Policy,
        PolicyKind, PortSpec, Ports, Requirement, Rule, Selector, Spec, Subject, Test,
    },
};
use palisade_policy::compile::FileContent;

use crate::random::{Fact, Packet};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Allow,
    Deny,
    DenyExplicit,
    Auth,
    DenyQuic,
    Inspect(&'static str),
}

/// A verdict, and whether the packet passes because of audit mode.
pub type AuditedVerdict = (Verdict, bool);

/// The peer: its labels and, for an address of the world, the longest prefix that a policy names.
struct Other {
    labels: Labels,
    prefix: Option<IpNet>,
    /// Names by which the endpoint has learned the address.
    names: Vec<&'static str>,
}

pub struct Naive<'a> {
    inventory: &'a Inventory,
    policies: Vec<&'a Policy>,
    groups: Vec<&'a CidrGroup>,
    facts: &'a [Fact],
}

impl<'a> Naive<'a> {
    pub fn new(
        inventory: &'a Inventory,
        files: &'a BTreeMap<String, FileContent>,
        facts: &'a [Fact],
    ) -> Self {
        Self {
            facts,
            inventory,
            policies: files.values().flat_map(|file| &file.policies).collect(),
            groups: files.values().flat_map(|file| &file.cidr_groups).collect(),
        }
    }

    fn cidr_rules(&self, peer: &Peer) -> Vec<CidrRule> {
        let groups = |chosen: &dyn Fn(&CidrGroup) -> bool, except: &Vec<IpNet>| {
            self.groups
                .iter()
                .filter(|group| chosen(group))
                .flat_map(|group| &group.cidrs)
                .map(|cidr| CidrRule {
                    cidr: *cidr,
                    except: except.clone(),
                })
                .collect()
        };
        match peer {
            Peer::Cidr(rule) => vec![rule.clone()],
            Peer::CidrGroup { name, except } => groups(&|group| group.name == *name, except),
            // The only group selector of the generator requires kind=lab.
            Peer::CidrGroupSelector { except, .. } => groups(
                &|group| group.labels.contains(&("kind".into(), "lab".into())),
                except,
            ),
            _ => Vec::new(),
        }
    }

    fn rules(&self) -> impl Iterator<Item = &'a Rule> {
        self.policies
            .iter()
            .flat_map(|policy| &policy.specs)
            .flat_map(|spec| [&spec.ingress, &spec.ingress_deny, &spec.egress, &spec.egress_deny])
            .flatten()
            .flatten()
    }

    fn who(&self, address: IpAddr) -> Other {
        let endpoints = &self.inventory.endpoints;
        if let Some(endpoint) = endpoints
            .iter()
            .find(|endpoint| endpoint.addresses.contains(&address))
        {
            return Other {
                labels: endpoint.labels.clone(),
                prefix: None,
                names: Vec::new(),
            };
        }
        let is_world = |labels: &Labels| {
            labels
                .iter()
                .any(|l| l.source == "reserved" && l.key.starts_with("world"))
        };
        let peer = self
            .inventory
            .peers
            .iter()
            .flat_map(|peer| peer.prefixes.iter().map(move |prefix| (prefix, peer)))
            .filter(|(prefix, _)| prefix.contains(&address))
            .max_by_key(|(prefix, _)| prefix.prefix_len());
        let labelled = |inner: &IpNet| {
            let peers = self.inventory.peers.iter().filter(|peer| !is_world(&peer.labels));
            peers
                .flat_map(|peer| &peer.prefixes)
                .any(|outer| outer.contains(inner))
        };
        let mentioned = self
            .rules()
            .filter_map(|rule| match &rule.peers {
                Peers::OneOf(peers) => Some(peers),
                _ => None,
            })
            .flatten()
            .flat_map(|peer| self.cidr_rules(peer))
            .flat_map(|rule| rule.except.into_iter().chain([rule.cidr]))
            .filter(|prefix| prefix.contains(&address) && prefix.prefix_len() > 0 && !labelled(prefix))
            .max_by_key(IpNet::prefix_len);
        let peer_length = peer.map_or(0, |(prefix, _)| prefix.prefix_len());
        match (peer, mentioned) {
            (Some((prefix, peer)), mentioned) if mentioned.is_none_or(|m| m.prefix_len() <= peer_length) => {
                Other {
                    labels: peer.labels.clone(),
                    prefix: is_world(&peer.labels).then_some(*prefix),
                    names: Vec::new(),
                }
            }
            (_, mentioned) => Other {
                labels: self.inventory.options.world_labels(address.is_ipv6()),
                prefix: mentioned,
                names: Vec::new(),
            },
        }
    }

    pub fn evaluate(&self, packet: &Packet) -> Option<AuditedVerdict> {
        let subject = self
            .inventory
            .endpoints
            .iter()
            .find(|endpoint| endpoint.id == packet.endpoint)?;
        let mut other = self.who(packet.remote);
        // Names add to the identity of world addresses only.
        let world = other
            .labels
            .iter()
            .any(|label| label.source == "reserved" && label.key.starts_with("world"));
        if world && packet.direction == Direction::Egress {
            let learned = self
                .facts
                .iter()
                .filter(|fact| fact.endpoint == packet.endpoint && fact.address == packet.remote);
            other.names = learned.map(|fact| fact.name).collect();
        }
        Some(self.evaluate_peer(subject, packet, &other))
    }

    fn evaluate_peer(&self, subject: &Endpoint, packet: &Packet, other: &Other) -> AuditedVerdict {
        let options = self.inventory.options;
        if options.enforcement == Enforcement::Never {
            return (Verdict::Allow, false);
        }
        let selected: Vec<(&Policy, &Spec)> = self
            .policies
            .iter()
            .flat_map(|policy| policy.specs.iter().map(move |spec| (*policy, spec)))
            .filter(|(_, spec)| match &spec.subject {
                Subject::Endpoints(selector) => !subject.is_node() && selects(selector, &subject.labels),
                Subject::Node(selector) => subject.is_node() && selects(selector, &subject.labels),
            })
            .collect();
        let ingress = packet.direction == Direction::Ingress;
        let sections = |spec: &'a Spec| -> (&'a [Rule], &'a [Rule]) {
            let (allow, deny) = if ingress {
                (&spec.ingress, &spec.ingress_deny)
            } else {
                (&spec.egress, &spec.egress_deny)
            };
            (
                allow.as_deref().unwrap_or_default(),
                deny.as_deref().unwrap_or_default(),
            )
        };
        let default_deny = |spec: &Spec| {
            if ingress {
                spec.default_deny_ingress
            } else {
                spec.default_deny_egress
            }
            .unwrap_or(true)
        };
        let with_rules: Vec<(&Policy, &Spec)> = selected
            .iter()
            .map(|(policy, spec)| (*policy, *spec))
            .filter(|(_, spec)| {
                let (allow, deny) = if ingress {
                    (&spec.ingress, &spec.ingress_deny)
                } else {
                    (&spec.egress, &spec.egress_deny)
                };
                !allow.as_deref().unwrap_or_default().is_empty()
                    || !deny.as_deref().unwrap_or_default().is_empty()
            })
            .collect();
        let denying: Vec<&Policy> = with_rules
            .iter()
            .filter(|(_, spec)| default_deny(spec))
            .map(|(policy, _)| *policy)
            .collect();
        let strict = options.enforcement == Enforcement::Always
            || subject.labels.iter().any(|label| label.key == "init");
        if with_rules.is_empty() && !strict {
            return (Verdict::Allow, false);
        }
        let audit_all = options.audit || subject.audit;
        let default_allow = !strict && denying.is_empty();

        let mut deny_enforced = false;
        let mut deny_audited = false;
        let mut allows: Vec<(&Policy, &Rule, &L7)> = Vec::new();
        let mut plain = default_allow;
        static NONE: L7 = L7 {
            rules: L7Rules::None,
            server_names: Vec::new(),
            terminating_tls: None,
            originating_tls: None,
            listener: None,
        };
        let specs = self.spec_refs(&selected);
        let required = |of_deny: bool| -> Vec<&Selector> {
            let rules = specs.iter().flat_map(|(_, spec)| {
                let (allow, deny) = sections(spec);
                if of_deny { deny } else { allow }
            });
            rules.flat_map(|rule| &rule.requires).collect()
        };
        let (allow_required, deny_required) = (required(false), required(true));
        for (policy, spec) in specs.iter().copied() {
            let (allow, deny) = sections(spec);
            for rule in deny {
                if self
                    .rule_matches(rule, (true, policy.kind), &deny_required, subject, packet, other)
                    .next()
                    .is_some()
                {
                    if policy.audit {
                        deny_audited = true
                    } else {
                        deny_enforced = true
                    }
                }
            }
            for rule in allow {
                for l7 in self.rule_matches(
                    rule,
                    (false, policy.kind),
                    &allow_required,
                    subject,
                    packet,
                    other,
                ) {
                    allows.push((policy, rule, l7.unwrap_or(&NONE)));
                }
            }
        }
        if ingress
            && options.allow_localhost
            && !subject.is_node()
            && other
                .labels
                .iter()
                .any(|l| l.source == "reserved" && l.key == "host")
        {
            plain = true;
        }
        if deny_enforced {
            return (Verdict::DenyExplicit, audit_all);
        }
        let kinds = ["http", "kafka", "tls", "dns"];
        let kind_of = |l7: &L7| match l7.rules {
            L7Rules::Http(_) => Some("http"),
            L7Rules::Dns(_) => Some("dns"),
            L7Rules::Kafka(_) => Some("kafka"),
            _ if !l7.server_names.is_empty() => Some("tls"),
            _ => None,
        };
        let read = kinds
            .into_iter()
            .find(|wanted| allows.iter().any(|(_, _, l7)| kind_of(l7) == Some(*wanted)));
        let rest = if allows
            .iter()
            .any(|(policy, rule, _)| rule.auth_required && !policy.audit)
        {
            (Verdict::Auth, audit_all)
        } else if allows.iter().any(|(_, rule, _)| rule.auth_required) {
            (Verdict::Auth, true)
        } else if let Some(kind) = read {
            // A request that no application rule allows gets the default verdict.
            let audited = !strict && !denying.is_empty() && denying.iter().all(|policy| policy.audit);
            // If only policies in audit mode have application rules and others allow the packet, it passes in any
            // case.
            let unread = allows
                .iter()
                .all(|(policy, _, l7)| policy.audit || kind_of(l7).is_none());
            let unread = unread && (plain || allows.iter().any(|(policy, _, _)| !policy.audit));
            (Verdict::Inspect(kind), audit_all || audited || unread)
        } else if plain || !allows.is_empty() {
            (Verdict::Allow, false)
        } else {
            let audited = !strict && denying.iter().all(|policy| policy.audit);
            (Verdict::Deny, audit_all || audited)
        };
        if deny_audited && (rest.1 || rest.0 == Verdict::Allow) {
            return (Verdict::DenyExplicit, true);
        }
        rest
    }

    fn spec_refs(&self, selected: &[(&Policy, &Spec)]) -> Vec<(&'a Policy, &'a Spec)> {
        self.policies
            .iter()
            .flat_map(|policy| policy.specs.iter().map(move |spec| (*policy, spec)))
            .filter(|(_, spec)| selected.iter().any(|(_, other)| std::ptr::eq(*other, *spec)))
            .collect()
    }

    /// Returns the L7 rules of each port entry that matches; one entry if the rule matches every port.
    fn rule_matches<'r>(
        &self,
        rule: &'r Rule,
        of: (bool, PolicyKind),
        required: &[&Selector],
        subject: &Endpoint,
        packet: &Packet,
        other: &Other,
    ) -> std::vec::IntoIter<Option<&'r L7>> {
        let peer = match &rule.peers {
            Peers::Any => true,
            Peers::None => false,
            Peers::OneOf(peers) => peers.iter().any(|peer| {
                self.peer_matches(peer, other)
                    && (!matches!(peer, Peer::Labels(_))
                        || required.iter().all(|selector| selects(selector, &other.labels)))
            }),
        };
        let mut found = Vec::new();
        if peer {
            match &rule.ports {
                Ports::Any => found.push(None),
                Ports::OneOf(entries) => {
                    for entry in entries {
                        if entry
                            .ports
                            .iter()
                            .any(|port| self.port_matches(port, of, subject, packet, other))
                        {
                            found.push(Some(&entry.l7));
                        }
                    }
                }
            }
        }
        found.into_iter()
    }

    fn port_matches(
        &self,
        port: &PortSpec,
        (denies, kind): (bool, PolicyKind),
        subject: &Endpoint,
        packet: &Packet,
        other: &Other,
    ) -> bool {
        let is = |protocol: L4Protocol| match protocol {
            L4Protocol::Any => matches!(packet.protocol, 6 | 17 | 132),
            L4Protocol::Tcp => packet.protocol == 6,
            L4Protocol::Udp => packet.protocol == 17,
            L4Protocol::Sctp => packet.protocol == 132,
            L4Protocol::Other(number) => packet.protocol == number,
        };
        match port {
            PortSpec::Range {
                protocol,
                first,
                last,
            } => {
                is(*protocol)
                    && ((*first, *last) == (0, u16::MAX)
                        || packet.port.is_some_and(|port| (*first..=*last).contains(&port)))
            }
            PortSpec::Icmp { v6, kind } => {
                packet.protocol == if *v6 { 58 } else { 1 } && packet.port == Some(u16::from(*kind))
            }
            PortSpec::Named { protocol, name, last } => {
                let number = |ports: &NamedPorts| {
                    let named = ports.get(name)?;
                    (named.protocol == 0 || named.protocol == packet.protocol).then_some(named.port)
                };
                let matches = |number: &u16| {
                    packet
                        .port
                        .is_some_and(|port| port == *number || (*number..=*last).contains(&port))
                };
                if !is(*protocol) {
                    return false;
                }
                if packet.direction == Direction::Ingress {
                    return number(&subject.named_ports).is_some_and(|number| matches(&number));
                }
                // All that have a port of this name, and the peer among them.
                let endpoints = self
                    .inventory
                    .endpoints
                    .iter()
                    .map(|e| (&e.labels, &e.named_ports));
                let peers = self.inventory.peers.iter().map(|p| (&p.labels, &p.named_ports));
                let owners: Vec<(&Labels, u16)> = endpoints
                    .chain(peers)
                    .filter_map(|(labels, ports)| Some((labels, number(ports)?)))
                    .collect();
                let all: BTreeSet<u16> = owners.iter().map(|(_, number)| *number).collect();
                let own: BTreeSet<u16> = owners
                    .iter()
                    .filter(|(labels, _)| **labels == other.labels)
                    .map(|(_, number)| *number)
                    .collect();
                match (all.len(), own.len()) {
                    (0 | 1, _) => all.iter().any(matches),
                    // Bare rules follow Cilium.
                    _ if kind == PolicyKind::Raw && !denies => false,
                    (_, 1) => own.iter().any(matches),
                    // The peer's number is ambiguous: an allow matches none, a deny each.
                    (_, 0) => denies && all.iter().any(matches),
                    _ => denies && own.iter().any(matches),
                }
            }
        }
    }

    fn peer_matches(&self, peer: &Peer, other: &Other) -> bool {
        let reserved = |key: &str| {
            other
                .labels
                .iter()
                .any(|label| label.source == "reserved" && label.key == key)
        };
        match peer {
            Peer::Labels(selector) => selects(selector, &other.labels),
            Peer::Nodes(selector) => {
                (reserved("host") || reserved("remote-node")) && selects(selector, &other.labels)
            }
            Peer::Entity(entity) => match entity {
                Entity::All => true,
                Entity::World => reserved("world") || reserved("world-ipv4") || reserved("world-ipv6"),
                Entity::WorldIpv4 => reserved("world-ipv4"),
                Entity::Cluster => {
                    ["host", "remote-node", "init", "kube-apiserver"]
                        .into_iter()
                        .any(reserved)
                        || other.labels.iter().any(|label| label.source == "k8s")
                }
                Entity::Host => reserved("host"),
                Entity::RemoteNode => reserved("remote-node"),
                Entity::KubeApiserver => reserved("kube-apiserver"),
                Entity::Init => reserved("init"),
                _ => false,
            },
            Peer::Cidr(_) | Peer::CidrGroup { .. } | Peer::CidrGroupSelector { .. } => {
                let inside = |prefix: &IpNet| other.prefix.is_some_and(|inner| prefix.contains(&inner));
                let covers = |prefix: &IpNet| {
                    let v6 = matches!(prefix, IpNet::V6(_));
                    inside(prefix)
                        || (prefix.prefix_len() == 0
                            && (reserved("world")
                                || (reserved("world-ipv4") && !v6)
                                || (reserved("world-ipv6") && v6)))
                };
                // A world identity without a prefix is in `/0`, whatever the rule excludes.
                self.cidr_rules(peer)
                    .iter()
                    .any(|rule| covers(&rule.cidr) && !rule.except.iter().any(inside))
            }
            Peer::Fqdn(pattern) => {
                let (FqdnPattern::Name(text) | FqdnPattern::Pattern(text)) = pattern;
                let labelled = other
                    .labels
                    .iter()
                    .any(|label| label.source == "fqdn" && label.key == *text);
                labelled || other.names.iter().any(|name| name_fits(text, name))
            }
        }
    }
}

/// Returns whether a name matches one of the patterns of the generator.
pub fn name_fits(pattern: &str, name: &str) -> bool {
    match pattern.strip_prefix("*.") {
        _ if pattern == "*" => true,
        Some(end) => name
            .strip_suffix(end)
            .and_then(|start| start.strip_suffix('.'))
            .is_some_and(|label| !label.contains('.')),
        None => pattern == name,
    }
}

fn selects(selector: &Selector, labels: &Labels) -> bool {
    selector
        .requirements
        .iter()
        .all(|requirement| holds(requirement, labels))
}

fn holds(requirement: &Requirement, labels: &Labels) -> bool {
    let value = labels
        .iter()
        .find(|label| {
            label.key == requirement.key
                && match &requirement.source {
                    LabelSource::Any => true,
                    LabelSource::Named(source) => label.source == *source,
                }
        })
        .map(|label| &label.value);
    match &requirement.test {
        Test::In(values) => value.is_some_and(|value| values.contains(value)),
        Test::NotIn(values) => !value.is_some_and(|value| values.contains(value)),
        Test::Exists => value.is_some(),
        Test::DoesNotExist => value.is_none(),
    }
}
