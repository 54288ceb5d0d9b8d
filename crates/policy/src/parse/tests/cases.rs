//! Case files: JSON, whose nodes have no places.

use palisade_model::rule::{Peers, PolicyKind, Subject};
use serde_json::json;

use super::errors_of;
use crate::parse::{parse_rules_json, yaml_to_json};

/// Rules that Cilium rejects.
#[test]
fn rejected_rules() {
    let subject = json!({"matchLabels": {"app": "a"}});
    let egress = |rule: serde_json::Value| json!([{"endpointSelector": subject, "egress": [rule]}]);
    let rules = [
        json!([{"endpointSelector": subject}]),
        json!([{"endpointSelector": subject,
                "egressDeny": [{"toCIDR": ["10.0.0.0/8"], "toCIDRSet": [{"cidr": "1.0.0.0/8"}]}]}]),
        json!([{"endpointSelector": subject, "ingress": [{"fromCIDR": ["300.1.1.1/32"]}]}]),
        egress(json!({"toCIDRSet": [{}]})),
        egress(json!({"toPorts": [{"ports": [{"port": "65536", "protocol": "TCP"}]}]})),
        egress(json!({"toPorts": [{"ports": [{"port": "80", "protocol": "HTTP"}]}]})),
        egress(
            json!({"toPorts": [{"ports": [{"port": "80", "protocol": "UDP"}], "rules": {"http": [{"method": "GET"}]}}]}),
        ),
        egress(
            json!({"toPorts": [{"ports": [{"port": "53", "protocol": "UDP"}], "rules": {"dns": [{"matchPattern": "[a-z].com"}]}}]}),
        ),
        egress(json!({"toFQDNs": [{"matchPattern": "a+.io"}]})),
        json!([{"endpointSelector": subject, "egressDeny": [{"toFQDNs": [{"matchName": "a.io"}]}]}]),
        json!([{"endpointSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["ok", "not ok"]}]},
                "ingress": [{}]}]),
        json!({"endpointSelector": {}}),
        json!(["rule"]),
    ];
    for rules in rules {
        let parsed = parse_rules_json("c", None, Some(&rules));
        assert!(parsed.has_errors() && parsed.policies.is_empty(), "{rules}");
    }
}

#[test]
fn messages_name_the_case_and_the_path() {
    let rules =
        json!([{}, {"endpointSelector": {}, "egress": [{}, {"toPorts": [{"ports": [{"port": 80}]}]}]}]);
    let policies = json!([{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "p"},
                           "spec": {"endpointSelector": {}, "ingress": [{"fromEntities": ["al"]}]}}]);
    assert_eq!(
        errors_of(&parse_rules_json("case-1", Some(&policies), Some(&rules))),
        [
            "case-1:0:0: policies[0].spec.ingress[0].fromEntities[0]: unknown entity \"al\", did you mean \"all\"?",
            "case-1:0:0: rules[0]: one of endpointSelector and nodeSelector is needed; {} selects every endpoint",
            "case-1:0:0: rules[0]: one of ingress, ingressDeny, egress and egressDeny must hold a rule; \
             to deny everything of a direction write the empty rule, as in ingress: [{}]",
            "case-1:0:0: rules[1].egress[1].toPorts[0].ports[0].port: port must be a string; write port: \"80\"",
        ]
    );
    assert_eq!(
        errors_of(&parse_rules_json("c", Some(&json!("p")), None)),
        ["c:0:0: policies must be a list, found the string \"p\""]
    );
}

#[test]
fn bare_rules_are_not_scoped() {
    let rules = json!([
        {"endpointSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"fromEndpoints": [{}]}]},
        {"nodeSelector": {}, "egress": [{}]},
    ]);
    let parsed = parse_rules_json("c", None, Some(&rules));
    assert_eq!(parsed.diagnostics, []);
    let [first, second] = parsed.policies.as_slice() else {
        panic!()
    };
    assert_eq!(
        (first.kind, first.name.as_str(), &first.namespace),
        (PolicyKind::Raw, "rules[0]", &None)
    );
    assert_eq!(first.qualified_name(), "rules[0]");
    assert_eq!(
        first.specs[0].subject,
        Subject::Endpoints(super::all([super::is("any", "app", "a")]))
    );
    let peers = &first.specs[0].ingress.as_ref().expect("a section")[0].peers;
    assert_eq!(
        *peers,
        Peers::OneOf(vec![palisade_model::rule::Peer::Labels(super::all([]))])
    );
    assert_eq!(second.specs[0].subject, Subject::Node(super::all([])));
}

#[test]
fn yaml_documents_as_json() {
    assert_eq!(
        yaml_to_json(
            "f",
            "{a: [1, -2, 1.5, x, null, true]}\n---\nb: 18446744073709551615\n"
        )
        .expect("valid"),
        [
            json!({"a": [1, -2, 1.5, "x", null, true]}),
            json!({"b": u64::MAX})
        ]
    );
    let errors = yaml_to_json("f", "a: [1\n").expect_err("no end");
    assert_eq!(errors.len(), 1);
}
