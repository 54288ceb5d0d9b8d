//! NetworkPolicy: meaning and errors.

use palisade_model::rule::{
    CidrRule, Entity, L4Protocol, L7, Peer, Peers, PortSpec, Ports, Rule, Spec, Subject, Test,
};

use super::{all, diagnostics_of, in_namespace, is, requirement, spec};

fn text(spec: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: shop}}\nspec:\n{spec}"
    )
}

fn knp(rest: &str) -> Spec {
    spec(&text(rest))
}

/// Asserts that a direction has only the rule that matches no peer.
#[track_caller]
fn assert_denies_all(section: Option<&Vec<Rule>>) {
    let Some(
        [
            Rule {
                peers: Peers::None,
                ports: Ports::Any,
                auth_required: false,
                ..
            },
        ],
    ) = section.map(Vec::as_slice)
    else {
        panic!("{section:?}");
    };
}

#[test]
fn the_subject_is_in_the_namespace_with_k8s_labels() {
    let spec =
        knp("  podSelector: {matchLabels: {app: a}, matchExpressions: [{key: x/y, operator: Exists}]}\n");
    let selector = all([
        in_namespace("shop"),
        is("k8s", "app", "a"),
        requirement("k8s", "x/y", Test::Exists),
    ]);
    let Subject::Endpoints(mut found) = spec.subject else {
        panic!()
    };
    found.requirements.sort();
    let mut selector = selector;
    selector.requirements.sort();
    assert_eq!(found, selector);
    assert_eq!(
        knp("  policyTypes: [Egress]\n").subject,
        Subject::Endpoints(all([in_namespace("shop")]))
    );
}

#[test]
fn policy_types_select_the_directions() {
    let none = knp("  podSelector: {}\n");
    assert_denies_all(none.ingress.as_ref());
    assert_eq!(none.egress, None);

    let egress_rules = knp("  podSelector: {}\n  egress: [{}]\n");
    assert_denies_all(egress_rules.ingress.as_ref());
    assert_eq!(egress_rules.egress.map(|rules| rules.len()), Some(1));

    let only_egress = knp("  podSelector: {}\n  policyTypes: [Egress]\n");
    assert_eq!(only_egress.ingress, None);
    assert_denies_all(only_egress.egress.as_ref());

    let both = knp("  podSelector: {}\n  policyTypes: [Ingress, Egress]\n  ingress: []\n");
    assert_denies_all(both.ingress.as_ref());
    assert_denies_all(both.egress.as_ref());

    assert_eq!(
        diagnostics_of(&text(
            "  podSelector: {}\n  policyTypes: [Egress]\n  ingress: [{}]\n"
        )),
        ["7:12: warning: these rules do nothing: policyTypes does not name ingress"]
    );
}

#[test]
fn an_empty_rule_allows_everything() {
    for rule in ["{}", "{from: [], ports: []}", "{from: null}"] {
        let rules = knp(&format!("  podSelector: {{}}\n  ingress: [{rule}]\n"))
            .ingress
            .expect("a section");
        assert_eq!(
            rules[0].peers,
            Peers::OneOf(vec![Peer::Entity(Entity::All)]),
            "{rule}"
        );
        assert_eq!(rules[0].ports, Ports::Any);
    }
}

#[test]
fn peers() {
    let spec = knp("  podSelector: {}
  egress:
  - to:
    - podSelector: {matchLabels: {app: b}}
    - namespaceSelector: {}
    - namespaceSelector: {matchLabels: {team: x, kubernetes.io/metadata.name: other}}
      podSelector: {matchLabels: {app: c}}
    - ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}
");
    let rules = spec.egress.expect("a section");
    let somewhere = requirement("k8s", "io.kubernetes.pod.namespace", Test::Exists);
    assert_eq!(
        rules[0].peers,
        Peers::OneOf(vec![
            Peer::Labels(all([in_namespace("shop"), is("k8s", "app", "b")])),
            Peer::Labels(all([somewhere.clone()])),
            Peer::Labels(all([
                is("k8s", "io.cilium.k8s.namespace.labels.team", "x"),
                in_namespace("other"),
                somewhere,
                is("k8s", "app", "c"),
            ])),
            Peer::Cidr(CidrRule {
                cidr: "10.0.0.0/8".parse().expect("a prefix"),
                except: vec!["10.1.0.0/16".parse().expect("a prefix")],
            }),
        ])
    );
}

#[test]
fn ports() {
    let spec = knp("  podSelector: {}
  ingress:
  - ports: [{port: 80}, {port: dns, protocol: UDP}, {port: 100, endPort: 200, protocol: SCTP}, {protocol: UDP}, {}]
");
    let Ports::OneOf(found) = &spec.ingress.expect("a section")[0].ports else {
        panic!()
    };
    assert!(found.iter().all(|rule| rule.l7 == L7::default()));
    let range = |protocol, first, last| PortSpec::Range {
        protocol,
        first,
        last,
    };
    let found: Vec<_> = found.iter().flat_map(|rule| rule.ports.clone()).collect();
    assert_eq!(
        found,
        [
            range(L4Protocol::Tcp, 80, 80),
            PortSpec::Named {
                protocol: L4Protocol::Udp,
                name: "dns".into(),
                last: 0,
            },
            range(L4Protocol::Sctp, 100, 200),
            range(L4Protocol::Udp, 0, 65535),
            range(L4Protocol::Tcp, 0, 65535),
        ]
    );
}

#[test]
fn errors() {
    let ingress = |rule: &str| diagnostics_of(&text(&format!("  podSelector: {{}}\n  ingress: [{rule}]\n")));
    assert_eq!(
        ingress("{from: [{}]}"),
        ["6:21: one of podSelector, namespaceSelector and ipBlock is needed"]
    );
    assert_eq!(
        ingress("{from: [{podSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}"),
        ["6:48: ipBlock cannot be combined with a selector; write a peer for each"]
    );
    assert_eq!(
        ingress("{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}"),
        ["6:59: \"10.0.0.0/8\" is not inside of 10.0.0.0/8"]
    );
    assert_eq!(ingress("{from: [{ipBlock: {}}]}"), ["6:31: cidr is missing"]);
    assert_eq!(
        ingress("{to: []}"),
        ["6:14: unknown field \"to\"; known here: from, ports"]
    );
    assert_eq!(
        ingress("{from: [{podSelector: {matchLabels: {'k8s:app': a}}}]}"),
        [
            "6:50: \"k8s:app\" cannot be a label's key: only letters, digits, \"-\", \"_\" and \".\" are allowed in it, \
          a letter or digit at both ends"
        ]
    );
    let port = |port: &str| ingress(&format!("{{ports: [{{{port}}}]}}"));
    assert_eq!(
        port("port: 0"),
        ["6:29: port must be a number from 1 to 65535, found 0"]
    );
    assert_eq!(
        port("port: '80'"),
        ["6:29: \"80\" cannot be the name of a port; a number has no quotes"]
    );
    assert_eq!(
        port("port: HTTP"),
        ["6:29: \"HTTP\" cannot be the name of a port"]
    );
    assert_eq!(
        port("port: 80, protocol: tcp"),
        ["6:43: unknown protocol \"tcp\", did you mean \"TCP\"?"]
    );
    assert_eq!(
        port("port: 80, endPort: 79"),
        ["6:42: endPort 79 is less than port 80"]
    );
    assert_eq!(
        port("port: http, endPort: 90"),
        ["6:44: endPort needs a port that is a number"]
    );
    assert_eq!(port("endPort: 90"), ["6:32: endPort needs port"]);
    assert_eq!(
        diagnostics_of("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\n"),
        ["1:1: spec is missing"]
    );
}
