//! Learned identities.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use palisade_abi::{Decision, Direction, endpoint_flags, identity};
use palisade_model::{
    inventory::{Endpoint, Inventory, Peer},
    labels::{Labels, parse_label},
    learned_identities::{LearnedSet, SelectorNumber},
    op::Op,
    rule::{self, FqdnPattern},
    snapshot::Snapshot,
};
use palisade_policy::{
    compile::{Changes, Compiler, CompilerState, FileContent},
    parse::parse,
    plan::plan,
};

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
        endpoints: vec![endpoint(1, "a"), endpoint(2, "b"), endpoint(3, "c")],
        peers: vec![Peer {
            name: "db".into(),
            labels: labels(&["k8s:app=db", "k8s:io.kubernetes.pod.namespace=default"]),
            named_ports: BTreeMap::new(),
            prefixes: vec!["10.7.0.0/24".parse().unwrap()],
        }],
        ..Inventory::default()
    }
}

fn file(name: &str, app: &str, rules: &str) -> FileContent {
    let text = format!(
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata:\n  name: {name}\nspec:\n  endpointSelector: \
         {{matchLabels: {{app: {app}}}}}\n{rules}\n"
    );
    let parsed = parse(name, &text);
    assert!(!parsed.has_errors(), "{:?}", parsed.diagnostics);
    FileContent {
        policies: parsed.policies,
        cidr_groups: parsed.cidr_groups,
    }
}

const A: &str = "  egress:
  - toFQDNs: [{matchName: api.example.com}]
    toPorts: [{ports: [{port: '443', protocol: TCP}]}]
  - toFQDNs: [{matchPattern: '*.example.com'}]
    toPorts: [{ports: [{port: '80', protocol: TCP}]}]
  - toCIDR: [192.0.2.0/24]
    toPorts: [{ports: [{port: '22', protocol: TCP}]}]
";

const B: &str = "  egress:
  - toFQDNs: [{matchPattern: '*.example.com'}]
  - toEntities: [world]
    toPorts: [{ports: [{port: '53', protocol: UDP}]}]
";

fn compiler() -> Compiler {
    let mut compiler = Compiler::new(&CompilerState::default());
    compiler
        .update(Changes {
            inventory: Some(inventory()),
            files: BTreeMap::from([
                ("a".into(), Some(file("a", "a", A))),
                ("b".into(), Some(file("b", "b", B))),
            ]),
        })
        .unwrap();
    compiler
}

/// Returns the number of a selector of an endpoint.
fn selector(snapshot: &Snapshot, endpoint: u16, text: &str) -> SelectorNumber {
    snapshot.fqdn[&endpoint]
        .iter()
        .find(|(_, pattern)| {
            let (FqdnPattern::Name(known) | FqdnPattern::Pattern(known)) = pattern;
            known == text
        })
        .unwrap_or_else(|| panic!("endpoint {endpoint} does not use {text}"))
        .0
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn passes(snapshot: &Snapshot, endpoint: u16, other: u32, protocol: u8, port: u16) -> bool {
    let entry = snapshot
        .policy_entry(endpoint, Direction::Egress, other, protocol, Some(port))
        .unwrap();
    entry.decision == Decision::Allow as u8
}

#[test]
fn standing_learned_identities_need_no_request() {
    let compiler = compiler();
    let snapshot = compiler.snapshot();
    assert_eq!(snapshot.fqdn.keys().copied().collect::<Vec<_>>(), [1, 2]);
    assert_eq!(snapshot.fqdn[&1].len(), 2);
    let (api, any) = (
        selector(snapshot, 1, "api.example.com"),
        selector(snapshot, 1, "*.example.com"),
    );
    assert_eq!(any, selector(snapshot, 2, "*.example.com"));
    // Rows of learned identities join a live egress table, so a table that can have them is not plain.
    let plain = endpoint_flags::PLAIN_INGRESS | endpoint_flags::PLAIN_EGRESS;
    let learns = endpoint_flags::LEARNS | endpoint_flags::PLAIN_INGRESS;
    for (id, flags) in [(1, learns), (2, learns), (3, plain)] {
        assert_eq!(snapshot.endpoints[&id].flags, flags);
    }
    for address in ["198.51.100.7", "2001:db8::7"] {
        let learned = snapshot.names.identity(ip(address), &[api]).unwrap();
        assert!(learned >= identity::FIRST_LOCAL);
        assert!(snapshot.identities[&learned].has("fqdn", "api.example.com"));
        assert!(passes(snapshot, 1, learned, 6, 443));
        assert!(!passes(snapshot, 1, learned, 6, 80));
        let other = snapshot.names.identity(ip(address), &[any]).unwrap();
        assert!(passes(snapshot, 1, other, 6, 80));
        assert!(!passes(snapshot, 1, other, 6, 443));
        // Rules about the world apply to learned addresses as well.
        assert!(passes(snapshot, 2, other, 6, 8080) && passes(snapshot, 2, other, 17, 53));
    }
    // Only endpoints that use the selector have rows for it.
    let api = snapshot.names.identity(ip("198.51.100.7"), &[api]).unwrap();
    let rows = |id: u16| {
        let table = &snapshot.tables[&snapshot.endpoints[&id].policy];
        table.row(Direction::Egress as u8, api).count()
    };
    assert!(rows(1) > 0);
    assert_eq!((rows(2), rows(3)), (0, 0));
}

#[test]
fn names_do_not_change_the_identity_of_endpoints_and_peers() {
    let compiler = compiler();
    let snapshot = compiler.snapshot();
    let any = selector(snapshot, 1, "*.example.com");
    for address in ["10.7.0.9", "10.0.0.3"] {
        let known = snapshot.identity_of(ip(address)).identity;
        assert_eq!(snapshot.names.base(ip(address)), known);
        assert_eq!(snapshot.names.identity(ip(address), &[any]), Some(known));
        assert_eq!(snapshot.names.set(ip(address), &[any]), None);
    }
    let world = snapshot.identity_of(ip("198.51.100.7")).identity;
    assert_eq!(snapshot.names.identity(ip("198.51.100.7"), &[]), Some(world));
    assert_eq!(
        snapshot.names.identity(ip("198.51.100.7"), &[any + 1000]),
        Some(world)
    );
}

#[test]
fn requested_sets_only_add_entries() {
    let mut compiler = compiler();
    let before = compiler.snapshot().clone();
    let (api, any) = (
        selector(&before, 1, "api.example.com"),
        selector(&before, 1, "*.example.com"),
    );
    let mut both = [api, any];
    both.sort_unstable();
    let wanted: BTreeSet<LearnedSet> = [("198.51.100.7", &both[..]), ("192.0.2.7", &[api][..])]
        .into_iter()
        .map(|(address, selectors)| {
            assert_eq!(before.names.identity(ip(address), selectors), None);
            before.names.set(ip(address), selectors).unwrap()
        })
        .collect();
    let update = compiler.learned(&wanted).unwrap();
    assert_eq!(update.numbers.len(), 2);
    let after = compiler.snapshot().clone();
    let both_number = after.names.identity(ip("198.51.100.7"), &both).unwrap();
    assert!(passes(&after, 1, both_number, 6, 443) && passes(&after, 1, both_number, 6, 80));
    assert!(!passes(&after, 1, both_number, 6, 22));
    let inside = after.names.identity(ip("192.0.2.7"), &[api]).unwrap();
    assert!(passes(&after, 1, inside, 6, 443) && passes(&after, 1, inside, 6, 22));
    assert!(!passes(&after, 1, inside, 6, 80));
    // `policy selectors` lists a combined identity under each of its selectors.
    let members = |text: &str| {
        let found = compiler.selectors().find_map(|(peer, _, members)| match peer {
            rule::Peer::Fqdn(FqdnPattern::Name(name) | FqdnPattern::Pattern(name)) if name == text => {
                Some(members)
            }
            _ => None,
        });
        found.unwrap_or_else(|| panic!("no selector {text}"))
    };
    let (of_api, of_any) = (members("api.example.com"), members("*.example.com"));
    assert!(
        of_api.contains(&both_number) && of_api.contains(&inside),
        "{of_api:?}"
    );
    assert!(
        of_any.contains(&both_number) && !of_any.contains(&inside),
        "{of_any:?}"
    );
    // The operations equal the difference of the snapshots, and only add entries.
    let [Op::PolicyPut(entries)] = &update.ops[..] else {
        panic!("{:?}", update.ops);
    };
    assert!(
        entries
            .iter()
            .all(|(key, _)| key.policy == before.endpoints[&1].policy)
    );
    let old = &before.tables[&before.endpoints[&1].policy];
    assert!(
        entries
            .iter()
            .all(|(key, _)| !old.entries.contains_key(&(*key).into()))
    );
    assert_eq!(after.endpoints, before.endpoints);
    let planned: usize = plan(&before, &after)
        .iter()
        .map(|op| match op {
            Op::PolicyPut(entries) => entries.len(),
            other => panic!("{other:?}"),
        })
        .sum();
    assert_eq!(planned, entries.len());
    // A second request creates nothing.
    let again = compiler.learned(&wanted).unwrap();
    assert_eq!((again.numbers, again.ops.len()), (update.numbers, 0));

    // An update keeps requested sets and drops the others.
    let no_change = || Changes {
        inventory: None,
        files: BTreeMap::from([("b".into(), Some(file("b", "b", B)))]),
    };
    let kept = compiler.update(no_change()).unwrap().clone();
    assert_eq!(kept.names.identity(ip("192.0.2.7"), &[api]), Some(inside));
    assert!(passes(&kept, 1, inside, 6, 22));
    compiler.learned(&BTreeSet::new()).unwrap();
    let dropped = compiler.update(no_change()).unwrap().clone();
    assert_eq!(dropped.names.identity(ip("192.0.2.7"), &[api]), None);
    let table = &dropped.tables[&dropped.endpoints[&1].policy];
    assert_eq!(table.row(Direction::Egress as u8, inside).count(), 0);
    assert!(!dropped.identities.contains_key(&inside));
}

#[test]
fn selector_numbers_are_stable_while_used() {
    let mut compiler = compiler();
    let any = selector(compiler.snapshot(), 1, "*.example.com");
    let api = selector(compiler.snapshot(), 1, "api.example.com");
    let mut update = |name: &str, rules: Option<&str>| {
        compiler
            .update(Changes {
                inventory: None,
                files: BTreeMap::from([(name.into(), rules.map(|rules| file(name, name, rules)))]),
            })
            .unwrap()
            .clone()
    };
    let without = update("a", Some("  egress:\n  - toEntities: [world]"));
    assert_eq!(
        without.endpoints[&1].flags & palisade_abi::endpoint_flags::LEARNS,
        0
    );
    assert!(!without.fqdn.contains_key(&1));
    assert_eq!(selector(&without, 2, "*.example.com"), any);
    let again = update("a", Some(A));
    assert_eq!(selector(&again, 1, "*.example.com"), any);
    assert!(selector(&again, 1, "api.example.com") > api.max(any));
}
