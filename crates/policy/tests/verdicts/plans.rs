//! Changes that are easy to get wrong. Each is planned, and all verdicts are checked after every write.

use std::{collections::BTreeMap, net::IpAddr};

use palisade_abi::{DIRECTIONS, Decision, Direction, PolicyEntry, entry_flags};
use palisade_model::{
    inventory::{Endpoint, Inventory, Options, Peer},
    labels::{Labels, parse_label},
    op::Op,
};
use palisade_policy::{
    compile::{Changes, Compiler, CompilerState, FileContent},
    parse::parse,
    plan::plan,
};

use crate::{maps::Maps, random::Packet};

const ADDRESSES: [&str; 9] = [
    "10.0.0.2",
    "10.0.0.3",
    "10.1.2.3",
    "10.1.2.4",
    "10.1.9.9",
    "10.9.9.9",
    "192.0.2.1",
    "2001:db8::1",
    "10.0.7.7",
];

fn labels(texts: &[&str]) -> Labels {
    Labels::new(texts.iter().map(|text| parse_label(text)))
}

fn endpoint(id: u16, app: &str) -> Endpoint {
    Endpoint {
        id,
        name: app.into(),
        namespace: "default".into(),
        labels: labels(&[
            &format!("k8s:app={app}"),
            "k8s:io.kubernetes.pod.namespace=default",
        ]),
        named_ports: BTreeMap::new(),
        addresses: vec![format!("10.0.0.{id}").parse().unwrap()],
        audit: false,
    }
}

fn inventory() -> Inventory {
    Inventory {
        options: Options::default(),
        endpoints: vec![endpoint(2, "a"), endpoint(3, "b")],
        peers: vec![Peer {
            name: "db".into(),
            labels: labels(&["k8s:app=db", "k8s:io.kubernetes.pod.namespace=default"]),
            named_ports: BTreeMap::new(),
            prefixes: vec!["10.0.7.0/24".parse().unwrap()],
        }],
    }
}

/// Returns a policy for app=a with these rules, in YAML indented by two.
fn policy(rules: &str) -> FileContent {
    let text = format!(
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata:\n  name: p\nspec:\n  endpointSelector: \
         {{matchLabels: {{app: a}}}}\n{rules}\n"
    );
    let parsed = parse("p.yaml", &text);
    assert!(!parsed.has_errors(), "{:?}", parsed.diagnostics);
    FileContent {
        policies: parsed.policies,
        cidr_groups: parsed.cidr_groups,
    }
}

fn packets() -> Vec<Packet> {
    let mut packets = Vec::new();
    for endpoint in [2, 3] {
        for direction in DIRECTIONS {
            for address in ADDRESSES {
                for port in [80, 443, 8080, 9000] {
                    packets.push(Packet {
                        endpoint,
                        direction,
                        remote: address.parse().unwrap(),
                        protocol: 6,
                        port: Some(port),
                    });
                }
            }
        }
    }
    packets
}

fn noticed(entry: Option<PolicyEntry>) -> Option<(u8, u8)> {
    entry.map(|entry| (entry.decision, entry.flags & entry_flags::AUDIT))
}

/// A node whose maps follow the compiler.
struct Node {
    compiler: Compiler,
    maps: Maps,
}

impl Node {
    fn new(rules: &str) -> Self {
        let mut compiler = Compiler::new(&CompilerState::default());
        let changes = Changes {
            inventory: Some(inventory()),
            files: BTreeMap::from([("p.yaml".into(), Some(policy(rules)))]),
        };
        compiler.update(changes).unwrap();
        let snapshot = compiler.snapshot();
        let mut maps = Maps::empty(snapshot.world_ipv4, snapshot.world_ipv6);
        for op in plan(&maps.read_back(), snapshot) {
            maps.apply(&op, |_| {});
        }
        maps.assert_equal(snapshot);
        Self { compiler, maps }
    }

    /// Plans a change, carries it out and checks the verdicts. Returns the operations.
    fn change(&mut self, changes: Changes) -> Vec<Op> {
        let old = self.compiler.snapshot().clone();
        let new = self.compiler.update(changes).unwrap().clone();
        let watched: Vec<_> = packets()
            .into_iter()
            .map(|packet| {
                let other = new.identity_of(packet.remote).identity;
                let after = new.policy_entry(
                    packet.endpoint,
                    packet.direction,
                    other,
                    packet.protocol,
                    packet.port,
                );
                (packet, [noticed(self.maps.entry(&packet)), noticed(after)])
            })
            .collect();
        let ops = plan(&old, &new);
        for (step, op) in ops.iter().enumerate() {
            self.maps.apply(op, |maps| {
                for (packet, allowed) in &watched {
                    let now = noticed(maps.entry(packet));
                    assert!(
                        allowed.contains(&now),
                        "step {step} ({op:?}): {packet:?} gets {now:?}, not one of {allowed:?}"
                    );
                }
            });
        }
        self.maps.assert_equal(&new);
        ops
    }

    fn rules(&mut self, rules: &str) -> Vec<Op> {
        self.change(Changes {
            inventory: None,
            files: BTreeMap::from([("p.yaml".into(), Some(policy(rules)))]),
        })
    }

    fn inventory(&mut self, inventory: Inventory, rules: &str) -> Vec<Op> {
        self.change(Changes {
            inventory: Some(inventory),
            files: BTreeMap::from([("p.yaml".into(), Some(policy(rules)))]),
        })
    }

    fn allows(&self, endpoint: u16, direction: Direction, remote: &str, port: u16) -> bool {
        let packet = Packet {
            endpoint,
            direction,
            remote: remote.parse::<IpAddr>().unwrap(),
            protocol: 6,
            port: Some(port),
        };
        self.maps
            .entry(&packet)
            .is_some_and(|entry| entry.decision == Decision::Allow as u8)
    }
}

const WIDE: &str =
    "  egress:\n  - toCIDR: [10.0.0.0/8]\n    toPorts: [{ports: [{port: '80', protocol: TCP}]}]";
const WIDE_AND_NARROW: &str = "  egress:\n  - toCIDR: [10.0.0.0/8]\n    toPorts: [{ports: [{port: '80', protocol: \
                               TCP}]}]\n  egressDeny:\n  - toCIDR: [10.1.2.0/24]";

#[test]
fn a_narrower_prefix_is_added_and_removed() {
    let mut node = Node::new(WIDE);
    assert!(node.allows(2, Direction::Egress, "10.1.2.3", 80));
    node.rules(WIDE_AND_NARROW);
    assert!(!node.allows(2, Direction::Egress, "10.1.2.3", 80));
    assert!(node.allows(2, Direction::Egress, "10.1.9.9", 80));
    node.rules(WIDE);
    assert!(node.allows(2, Direction::Egress, "10.1.2.3", 80));
}

#[test]
fn prefixes_are_replaced_by_others() {
    let narrow = |prefix: &str, port: &str| {
        format!(
            "  egress:\n  - toCIDR: [{prefix}]\n    toPorts: [{{ports: [{{port: '{port}', protocol: TCP}}]}}]\n  - \
             toEntities: [world]\n    toPorts: [{{ports: [{{port: '443', protocol: TCP}}]}}]"
        )
    };
    let mut node = Node::new(&narrow("10.1.2.0/24", "80"));
    node.rules(&narrow("10.1.0.0/16", "80"));
    assert!(node.allows(2, Direction::Egress, "10.1.2.3", 80));
    node.rules(&narrow("10.1.2.3/32", "8080"));
    assert!(!node.allows(2, Direction::Egress, "10.1.2.4", 80));
    assert!(node.allows(2, Direction::Egress, "10.1.2.3", 8080));
    node.rules(&narrow("10.0.0.0/8", "80"));
    assert!(node.allows(2, Direction::Egress, "10.9.9.9", 80));
}

#[test]
fn a_port_range_is_split_and_merged() {
    let whole = "  ingress:\n  - toPorts: [{ports: [{port: '80', endPort: 9000, protocol: TCP}]}]";
    let cut = "  ingress:\n  - toPorts: [{ports: [{port: '80', endPort: 9000, protocol: TCP}]}]\n  ingressDeny:\n  - \
               toPorts: [{ports: [{port: '443', protocol: TCP}]}]";
    let moved = "  ingress:\n  - toPorts: [{ports: [{port: '443', endPort: 8080, protocol: TCP}]}]\n  ingressDeny:\n  - \
                 fromCIDR: [10.1.2.0/24]\n    toPorts: [{ports: [{port: '8080', protocol: TCP}]}]";
    let mut node = Node::new(whole);
    for rules in [cut, whole, moved, cut, moved, whole] {
        node.rules(rules);
    }
    assert!(node.allows(2, Direction::Ingress, "192.0.2.1", 443));
}

#[test]
fn an_address_gets_the_labels_of_other_addresses() {
    let rules = "  egress:\n  - toEndpoints: [{matchLabels: {app: db}}]\n    toPorts: [{ports: [{port: '80', protocol: \
                 TCP}]}]\n  - toCIDR: [10.1.2.0/24]";
    let denied = "  egress:\n  - toEntities: [world]\n  egressDeny:\n  - toEndpoints: [{matchLabels: {app: db}}]\n    \
                  toPorts: [{ports: [{port: '8080', protocol: TCP}]}]";
    let mut node = Node::new(rules);
    let mut wider = inventory();
    wider.peers[0].prefixes.push("10.1.2.3/32".parse().unwrap());
    node.inventory(wider.clone(), rules);
    assert!(!node.allows(2, Direction::Egress, "10.1.2.3", 443));
    assert!(node.allows(2, Direction::Egress, "10.1.2.4", 443));
    node.inventory(inventory(), denied);
    node.inventory(wider, rules);
    node.inventory(inventory(), rules);
    assert!(node.allows(2, Direction::Egress, "10.1.2.3", 443));
}

#[test]
fn endpoints_swap_their_labels() {
    let rules = "  ingress:\n  - fromEndpoints: [{matchLabels: {app: b}}]";
    let mut node = Node::new(rules);
    let mut exchanged = inventory();
    exchanged.endpoints = vec![endpoint(2, "b"), endpoint(3, "a")];
    node.inventory(exchanged, rules);
    assert!(node.allows(3, Direction::Ingress, "10.0.0.2", 80));
    assert!(!node.allows(3, Direction::Ingress, "192.0.2.1", 80));
    assert!(node.allows(2, Direction::Ingress, "192.0.2.1", 80));
    let mut alone = inventory();
    alone.endpoints.truncate(1);
    node.inventory(alone, rules);
    node.inventory(inventory(), rules);
    assert!(node.allows(2, Direction::Ingress, "10.0.0.3", 80));
}

#[test]
fn a_change_of_another_endpoint_writes_nothing() {
    let mut node = Node::new(WIDE);
    let other = FileContent {
        policies: parse(
            "q.yaml",
            "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: q}\nspec:\n  endpointSelector: \
             {matchLabels: {app: b}}\n  ingress: [{fromEndpoints: [{matchLabels: {app: a}}]}]\n",
        )
        .policies,
        cidr_groups: Vec::new(),
    };
    let before = node.compiler.snapshot().endpoints[&2];
    let ops = node.change(Changes {
        inventory: None,
        files: BTreeMap::from([("q.yaml".into(), Some(other))]),
    });
    assert_eq!(node.compiler.snapshot().endpoints[&2], before);
    let writes = ops.iter().filter(|op| match op {
        Op::PolicyPut(entries) => entries.iter().any(|(key, _)| key.policy == before.policy),
        Op::EndpointPut(id, _) => *id == 2,
        Op::PolicyDelete(keys) => keys.iter().any(|key| key.policy == before.policy),
        _ => true,
    });
    assert_eq!(writes.count(), 0, "{ops:?}");
}

#[test]
fn a_restarted_daemon_takes_over_without_a_gap() {
    let mut node = Node::new(WIDE_AND_NARROW);
    let state = serde_json::to_string(&node.compiler.state()).unwrap();
    let found = node.maps.read_back();
    let mut compiler = Compiler::new(&serde_json::from_str(&state).unwrap());
    compiler.avoid(&found);
    let changes = Changes {
        inventory: Some(inventory()),
        files: BTreeMap::from([("p.yaml".into(), Some(policy(WIDE)))]),
    };
    let new = compiler.update(changes).unwrap().clone();
    for (id, state) in &found.endpoints {
        assert_ne!(new.endpoints[id].policy, state.policy);
        assert_ne!(new.endpoints[id].revision, state.revision);
    }
    let watched: Vec<_> = packets()
        .into_iter()
        .map(|packet| {
            let other = new.identity_of(packet.remote).identity;
            let after = new.policy_entry(
                packet.endpoint,
                packet.direction,
                other,
                packet.protocol,
                packet.port,
            );
            (packet, [noticed(node.maps.entry(&packet)), noticed(after)])
        })
        .collect();
    for op in plan(&found, &new) {
        node.maps.apply(&op, |maps| {
            for (packet, allowed) in &watched {
                assert!(
                    allowed.contains(&noticed(maps.entry(packet))),
                    "{op:?}: {packet:?}"
                );
            }
        });
    }
    node.maps.assert_equal(&new);
}

#[test]
fn conflicting_rules_leave_the_snapshot_unchanged() {
    let mut node = Node::new(WIDE);
    let before = node.compiler.snapshot().clone();
    let conflicting = policy(
        "  egress:\n  - toPorts: [{ports: [{port: '8080', protocol: TCP}], rules: {http: [{method: GET}]}}]\n  - toPorts: \
         [{ports: [{port: '8080', protocol: TCP}], serverNames: [a.test]}]",
    );
    let errors = node
        .compiler
        .update(Changes {
            inventory: None,
            files: BTreeMap::from([("p.yaml".into(), Some(conflicting))]),
        })
        .unwrap_err();
    assert!(
        errors[0]
            .to_string()
            .contains("tls and http cannot both be inspected"),
        "{}",
        errors[0]
    );
    assert!(errors[0].location.line > 0);
    assert!(plan(&before, node.compiler.snapshot()).is_empty());
    // The next change, of another file, starts from the unchanged state.
    let other = parse(
        "q.yaml",
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: q}\nspec:\n  endpointSelector: {matchLabels: \
         {app: b}}\n  ingress: [{fromEntities: [world], toPorts: [{ports: [{port: '443', protocol: TCP}]}]}]\n",
    );
    node.change(Changes {
        inventory: None,
        files: BTreeMap::from([(
            "q.yaml".into(),
            Some(FileContent {
                policies: other.policies,
                cidr_groups: Vec::new(),
            }),
        )]),
    });
    assert!(node.allows(2, Direction::Egress, "10.1.2.3", 80));
    assert!(!node.allows(2, Direction::Egress, "10.1.2.3", 443));
    assert!(node.allows(3, Direction::Ingress, "10.1.2.3", 443));
    node.rules(WIDE_AND_NARROW);
    node.rules(WIDE);
}

#[test]
fn flows_are_evaluated_again_when_an_address_changes_identity() {
    let rules = "  egress:\n  - toEndpoints: [{matchLabels: {app: db}}]";
    let mut node = Node::new(rules);
    assert!(!node.allows(2, Direction::Egress, "10.1.2.3", 80));
    let before = node.compiler.snapshot().clone();
    let mut wider = inventory();
    wider.peers[0].prefixes.push("10.1.2.3/32".parse().unwrap());
    node.inventory(wider, rules);
    assert!(node.allows(2, Direction::Egress, "10.1.2.3", 80));
    let after = node.compiler.snapshot();
    assert_eq!(
        after.endpoints[&2].policy, before.endpoints[&2].policy,
        "the rules are the same"
    );
    for id in [2, 3] {
        assert_ne!(after.endpoints[&id].revision, before.endpoints[&id].revision);
    }
}
