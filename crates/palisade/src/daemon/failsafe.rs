//! The failsafe ports of the configuration as rules for the compiler.
//!
//! Each port is a policy of its own with the node as its subject, in a file of its own for the compiler
//! (`palisade_policy::compile::FAILSAFE_FILE`), so that reports, counters and flows name the port and its line in the
//! configuration. Start at [`content`].

use ipnet::IpNet;
use palisade_abi::{DIRECTIONS, Direction};
use palisade_model::{
    labels::Labels,
    rule::{
        CidrRule, L7, LabelSource, Location, Peer, Peers, Policy, PolicyKind, PortRule, PortSpec, Ports,
        Requirement, Rule, Selector, Spec, Subject, Test,
    },
};
use palisade_policy::compile::FileContent;

use crate::config::{Config, FailsafePort};

/// Returns the failsafe ports of the configuration as a file for the compiler.
pub(super) fn content(config: &Config) -> FileContent {
    let policies = DIRECTIONS
        .into_iter()
        .flat_map(|direction| {
            let ports = config.failsafe.ports(direction).iter();
            ports.map(move |port| policy(config, port, direction))
        })
        .collect();
    FileContent {
        policies,
        cidr_groups: Vec::new(),
    }
}

fn policy(config: &Config, port: &FailsafePort, direction: Direction) -> Policy {
    let location = Location {
        file: config.path.display().to_string().into(),
        line: port.line,
        column: u32::from(port.line != 0),
    };
    let rule = Rule {
        peers: peers(config, &port.prefixes),
        ports: Ports::OneOf(vec![PortRule {
            ports: vec![PortSpec::Range {
                protocol: port.protocol,
                first: port.port,
                last: port.port,
            }],
            l7: L7::default(),
            location: location.clone(),
        }]),
        requires: Vec::new(),
        auth_required: false,
        location: location.clone(),
    };
    let mut spec = Spec {
        subject: Subject::Node(Selector::default()),
        ingress: None,
        ingress_deny: None,
        egress: None,
        egress_deny: None,
        default_deny_ingress: None,
        default_deny_egress: None,
        description: String::new(),
        location: location.clone(),
    };
    match direction {
        Direction::Ingress => spec.ingress = Some(vec![rule]),
        Direction::Egress => spec.egress = Some(vec![rule]),
    }
    Policy {
        kind: PolicyKind::Failsafe,
        name: config.failsafe.name(port, direction),
        namespace: None,
        audit: false,
        specs: vec![spec],
        location,
    }
}

/// Returns the peers with an address in one of the prefixes. A prefix of a rule does not match an address that the
/// configuration gives labels ([`crate::config::Peer`]), so such peers are named by their labels, if all addresses with
/// these labels are in the prefixes.
fn peers(config: &Config, prefixes: &[IpNet]) -> Peers {
    if prefixes.is_empty() {
        return Peers::Any;
    }
    let cidrs = prefixes.iter().map(|prefix| {
        Peer::Cidr(CidrRule {
            cidr: *prefix,
            except: Vec::new(),
        })
    });
    let mut peers: Vec<Peer> = cidrs.collect();
    let is_inside = |address: &IpNet| prefixes.iter().any(|prefix| prefix.contains(address));
    for peer in &config.peers {
        let selector = exactly(&peer.labels);
        let selected = config.peers.iter().filter(|peer| selector.matches(&peer.labels));
        if selected.flat_map(|peer| &peer.addresses).all(is_inside) {
            peers.push(Peer::Labels(selector));
        }
    }
    peers.sort_unstable();
    peers.dedup();
    Peers::OneOf(peers)
}

/// Returns the selector that requires all of the labels.
fn exactly(labels: &Labels) -> Selector {
    Selector {
        requirements: labels
            .iter()
            .map(|label| Requirement {
                source: LabelSource::Named(label.source.clone()),
                key: label.key.clone(),
                test: Test::In(vec![label.value.clone()]),
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use palisade_abi::{Decision, PolicyEntry, entry_flags, protocol};
    use palisade_policy::{
        compile::{Changes, Compiler, CompilerState, FAILSAFE_FILE},
        cuts::{Connection, CutReason, cuts},
        parse::parse,
        trace,
    };

    use super::*;
    use crate::daemon::{
        enforcer::inventory,
        network::Network,
        state::{NODE, State},
    };

    const DENY_ALL: &str = "
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: closed}
spec:
  nodeSelector: {}
  ingress: [{}]
  egress: [{}]
---
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: deny}
spec:
  nodeSelector: {}
  ingressDeny: [{fromEntities: [world]}, {fromEndpoints: [{matchLabels: {app: web}}]}]
";

    fn compiled(config: &str, policies: &str) -> Compiler {
        let config = Config::parse(Path::new("/etc/p.toml"), config).unwrap();
        let parsed = parse("node.yaml", policies);
        assert!(!parsed.has_errors(), "{:?}", parsed.diagnostics);
        let policies = FileContent {
            policies: parsed.policies,
            cidr_groups: parsed.cidr_groups,
        };
        let inventory = inventory(&config, &Network::default(), &mut State::<()>::default()).unwrap();
        let mut compiler = Compiler::new(&CompilerState::default());
        compiler
            .update(Changes {
                inventory: Some(inventory),
                files: [
                    ("node.yaml".to_owned(), Some(policies)),
                    (FAILSAFE_FILE.to_owned(), Some(content(&config))),
                ]
                .into(),
            })
            .unwrap();
        compiler
    }

    const CONFIG: &str = "[node]\nname = \"n\"\naddresses = [\"192.0.2.1\", \"2001:db8::1\"]\n\
        [failsafe]\ninbound = [\"tcp/22\", \"tcp/2222 from 10.0.0.0/8,fd00::/8\"]\noutbound = [\"udp/53\"]\n\
        [[endpoint]]\nname = \"web\"\ninterface = \"v\"\naddresses = [\"10.1.0.2\"]\nlabels = { app = \"web\" }\n\
        [[peer]]\nname = \"bastion\"\naddresses = [\"10.9.9.9/32\"]\nlabels = { app = \"bastion\" }\n\
        [[peer]]\nname = \"split1\"\naddresses = [\"10.9.9.10/32\"]\nlabels = { app = \"split\" }\n\
        [[peer]]\nname = \"split2\"\naddresses = [\"198.51.100.1/32\"]\nlabels = { app = \"split\" }\n";

    struct Lookup {
        nic: PolicyEntry,
        inside: PolicyEntry,
    }

    fn look_up(compiler: &Compiler, direction: Direction, peer: &str, number: u8, port: u16) -> Lookup {
        let snapshot = compiler.snapshot();
        let identity = snapshot.identity_of(peer.parse().unwrap()).identity;
        Lookup {
            nic: snapshot
                .policy_entry(NODE, direction, identity, number, Some(port))
                .unwrap(),
            inside: snapshot
                .policy_entry_inside(NODE, direction, identity, number, Some(port))
                .unwrap(),
        }
    }

    fn is_failsafe(entry: PolicyEntry) -> bool {
        let flagged = entry.flags & entry_flags::FAILSAFE != 0;
        assert_eq!(flagged, entry.decision == Decision::Allow as u8, "{entry:?}");
        flagged
    }

    #[test]
    fn a_failsafe_port_wins_over_default_deny_and_deny_rules_at_nics_only() {
        let compiler = compiled(CONFIG, DENY_ALL);
        for peer in ["203.0.113.7", "2001:db8:9::7", "10.9.9.9", "10.1.0.2"] {
            let found = look_up(&compiler, Direction::Ingress, peer, protocol::TCP, 22);
            assert!(is_failsafe(found.nic), "{peer}");
            assert!(!is_failsafe(found.inside), "{peer}");
            let rule = &compiler.snapshot().rules[&found.nic.rule];
            assert_eq!(rule.to_string(), "failsafe tcp/22 inbound (/etc/p.toml:5)");
            for (number, port) in [(protocol::TCP, 23), (protocol::UDP, 22), (protocol::UDP, 53)] {
                let found = look_up(&compiler, Direction::Ingress, peer, number, port);
                assert!(
                    !is_failsafe(found.nic) && !is_failsafe(found.inside),
                    "{peer} {port}"
                );
            }
            let found = look_up(&compiler, Direction::Egress, peer, protocol::UDP, 53);
            assert!(is_failsafe(found.nic) && !is_failsafe(found.inside), "{peer}");
            let found = look_up(&compiler, Direction::Egress, peer, protocol::TCP, 22);
            assert!(!is_failsafe(found.nic), "{peer}");
        }
    }

    #[test]
    fn what_the_policy_allows_keeps_the_name_of_its_rule_and_denials_of_one_peer_hold_inside() {
        let policies = "
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {}
  ingress:
  - fromEntities: [world]
    toPorts: [{ports: [{port: '22', protocol: TCP}]}]
  - fromEndpoints: [{matchLabels: {app: web}}]
  - fromEndpoints: [{matchLabels: {app: bastion}}]
  ingressDeny:
  - toPorts: [{ports: [{port: '2222', protocol: TCP}]}]
";
        let config = CONFIG.replace("tcp/2222 from 10.0.0.0/8,fd00::/8", "tcp/2222");
        let compiler = compiled(&config, policies);
        let found = look_up(&compiler, Direction::Ingress, "203.0.113.7", protocol::TCP, 22);
        assert_eq!((found.nic.flags, found.nic.decision), (0, Decision::Allow as u8));
        // The peers are allowed on all ports, but a deny rule without peers names 2222.
        for peer in ["10.1.0.2", "10.9.9.9"] {
            let found = look_up(&compiler, Direction::Ingress, peer, protocol::TCP, 2222);
            assert!(is_failsafe(found.nic), "{peer}");
            assert_eq!(found.inside.decision, Decision::DenyExplicit as u8, "{peer}");
            let found = look_up(&compiler, Direction::Ingress, peer, protocol::TCP, 80);
            assert_eq!((found.nic.flags, found.nic.decision), (0, Decision::Allow as u8));
        }
    }

    #[test]
    fn prefixes_limit_a_failsafe_port_to_peers_inside_with_and_without_labels() {
        let compiler = compiled(CONFIG, DENY_ALL);
        for (peer, open) in [
            ("10.0.0.1", true),
            ("fd00::1", true),
            ("10.9.9.9", true),
            ("11.0.0.1", false),
            ("fe00::1", false),
            ("198.51.100.1", false),
            // Another address with the same labels is outside.
            ("10.9.9.10", false),
        ] {
            let found = look_up(&compiler, Direction::Ingress, peer, protocol::TCP, 2222);
            assert_eq!(is_failsafe(found.nic), open, "{peer}");
            assert!(!is_failsafe(found.inside), "{peer}");
        }
    }

    #[test]
    fn a_session_by_a_failsafe_port_counts_as_cut_unless_every_interface_has_the_port() {
        let config = |interfaces: &str| {
            let interfaces = format!("interfaces = [{interfaces}]\n[[endpoint]]");
            let nics = "[[interface]]\nname = \"nic0\"\n[[interface]]\nname = \"nic1\"\n";
            CONFIG.replacen("[[endpoint]]", &interfaces, 1) + nics
        };
        let session = |remote: &str, local: &str, local_port| Connection {
            endpoint: NODE,
            direction: Direction::Ingress,
            protocol: protocol::TCP,
            local: local.parse().unwrap(),
            local_port,
            remote: remote.parse().unwrap(),
            remote_port: 40_000,
            inspector: 0,
            names: Vec::new(),
        };
        let sessions = [
            session("203.0.113.7", "192.0.2.1", 22),
            session("2001:db8:9::7", "2001:db8::1", 22),
        ];
        assert_eq!(cuts(&compiled(CONFIG, DENY_ALL), &sessions), []);
        assert_eq!(cuts(&compiled(&config("\"nic*\""), DENY_ALL), &sessions), []);
        let limited = compiled(&config("\"nic1\""), DENY_ALL);
        let cut = cuts(&limited, &sessions);
        assert_eq!(cut.len(), 2, "{cut:?}");
        for cut in &cut {
            assert_eq!(cut.reason, CutReason::Denied);
            assert!(
                cut.decided_by.contains("policy deny ingressDeny")
                    && cut
                        .decided_by
                        .contains("except by failsafe tcp/22 inbound at nic1"),
                "{}",
                cut.decided_by
            );
        }
        // What the policy allows itself passes everywhere.
        assert_eq!(cuts(&compiled(&config("\"nic1\""), ""), &sessions), []);
        let question = trace::Question {
            source: "203.0.113.7".to_owned(),
            destination: "host".to_owned(),
            protocol: protocol::TCP,
            port: 22,
            ..trace::Question::default()
        };
        let traced = |compiler: &Compiler| {
            let inspectors = palisade_inspect::Inspectors::default();
            trace::trace(compiler, &question, &inspectors)
                .unwrap()
                .to_string()
        };
        let text = traced(&limited);
        assert!(
            text.contains("at interfaces of [failsafe] only; elsewhere DENIED"),
            "{text}"
        );
        let text = traced(&compiled(&config("\"nic*\""), DENY_ALL));
        assert!(!text.contains("elsewhere"), "{text}");
    }

    #[test]
    fn failsafe_ports_do_nothing_where_nothing_is_enforced() {
        let compiler = compiled(CONFIG, "");
        let found = look_up(&compiler, Direction::Ingress, "203.0.113.7", protocol::TCP, 22);
        assert_eq!(found.nic.flags, entry_flags::UNENFORCED);
        assert!(compiler.policies_of(NODE).is_empty());
    }

    #[test]
    fn a_later_policy_or_another_list_of_ports_changes_every_row() {
        let mut compiler = compiled(CONFIG, "");
        let parsed = parse("node.yaml", DENY_ALL);
        let policies = FileContent {
            policies: parsed.policies,
            cidr_groups: parsed.cidr_groups,
        };
        compiler
            .update(Changes {
                inventory: None,
                files: [("node.yaml".to_owned(), Some(policies))].into(),
            })
            .unwrap();
        let found = look_up(&compiler, Direction::Ingress, "10.0.0.1", protocol::TCP, 2222);
        assert!(is_failsafe(found.nic) && !is_failsafe(found.inside));
        compiler
            .update(Changes {
                inventory: None,
                files: [(FAILSAFE_FILE.to_owned(), Some(FileContent::default()))].into(),
            })
            .unwrap();
        for port in [22, 2222] {
            let found = look_up(&compiler, Direction::Ingress, "10.0.0.1", protocol::TCP, port);
            assert!(!is_failsafe(found.nic) && !is_failsafe(found.inside), "{port}");
        }
        let tables = &compiler.snapshot().tables;
        let inside = tables.values().flat_map(|table| table.entries.keys());
        assert!(inside.into_iter().all(|key| key.direction < palisade_abi::INSIDE));
    }
}
