//! Kinds, versions, metadata, lists.

use palisade_model::rule::{PolicyKind, Subject};

use super::{cnp, diagnostics_of, errors_of, is};
use crate::parse::parse;

const SPEC: &str = "spec: {endpointSelector: {}, ingress: [{}]}\n";

fn resource(api_version: &str, kind: &str, metadata: &str) -> String {
    format!("apiVersion: {api_version}\nkind: {kind}\nmetadata: {metadata}\n{SPEC}")
}

#[test]
fn kinds_and_names() {
    let text = [
        resource("cilium.io/v2", "CiliumNetworkPolicy", "{name: a}"),
        resource("cilium.io/v2", "CiliumNetworkPolicy", "{name: a, namespace: shop}"),
        resource("cilium.io/v2", "CiliumClusterwideNetworkPolicy", "{name: a}"),
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: a}\nspec: {podSelector: {}}\n".into(),
    ]
    .join("---\n");
    let parsed = parse("f", &text);
    assert_eq!(errors_of(&parsed), [""; 0]);
    let found: Vec<_> = parsed
        .policies
        .iter()
        .map(|policy| {
            (
                policy.kind,
                policy.qualified_name(),
                policy.location.line,
                policy.audit,
            )
        })
        .collect();
    assert_eq!(
        found,
        [
            (PolicyKind::Cnp, "default/a".to_owned(), 1, false),
            (PolicyKind::Cnp, "shop/a".to_owned(), 6, false),
            (PolicyKind::Ccnp, "a".to_owned(), 11, false),
            (PolicyKind::Knp, "default/a".to_owned(), 16, false),
        ]
    );
}

#[test]
fn metadata_fields_of_the_api_server_are_accepted() {
    let metadata = "
  name: a
  uid: 0b4d
  generation: 2
  resourceVersion: '12'
  creationTimestamp: 2024-01-01T00:00:00Z
  labels: {app: x}
  annotations: {kubectl.kubernetes.io/last-applied-configuration: '{}', palisade.io/audit: 'true'}
  ownerReferences: [{kind: X}]
  finalizers: []
  managedFields: [{manager: kubectl}]";
    let text = resource("cilium.io/v2", "CiliumNetworkPolicy", metadata) + "status: {conditions: []}\n";
    let parsed = parse("f", &text);
    assert_eq!(errors_of(&parsed), [""; 0]);
    assert!(parsed.policies[0].audit);
}

#[test]
fn metadata_errors() {
    let metadata =
        |metadata: &str| diagnostics_of(&resource("cilium.io/v2", "CiliumNetworkPolicy", metadata));
    assert_eq!(metadata("null"), ["1:1: metadata is missing"]);
    assert_eq!(metadata("{}"), ["3:11: name is missing"]);
    assert_eq!(metadata("{name: ''}"), ["3:18: name must not be empty"]);
    assert_eq!(
        metadata("{name: 1}"),
        ["3:18: name must be a string, found the number 1; put it in quotes: \"1\""]
    );
    assert_eq!(
        metadata("{name: A_b}"),
        ["3:18: \"A_b\" cannot be a name: it must be a DNS name in lower case"]
    );
    assert_eq!(
        metadata("{name: a, namespace: a.b}"),
        ["3:32: \"a.b\" cannot be a namespace: it must be one label of a DNS name in lower case"]
    );
    assert_eq!(
        metadata("{name: a, label: {}}"),
        ["3:21: unknown field \"label\", did you mean \"labels\"?"]
    );
    assert_eq!(
        metadata("{name: a, annotations: {palisade.io/audit: true}}"),
        ["3:54: palisade.io/audit must be a string, found the boolean true; put it in quotes: \"true\""]
    );
    assert_eq!(
        metadata("{name: a, annotations: {palisade.io/audit: 'yes'}}"),
        ["3:54: palisade.io/audit must be \"true\" or \"false\", found \"yes\""]
    );
    assert_eq!(
        metadata("{name: a, annotations: {palisade.io/audt: 'true'}}"),
        ["3:35: unknown annotation \"palisade.io/audt\", did you mean \"palisade.io/audit\"?"]
    );
}

#[test]
fn other_kinds_are_skipped() {
    assert_eq!(
        diagnostics_of(
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec: {whatever: [1]}\n"
        ),
        ["1:1: note: Deployment \"web\" is no policy: skipped"]
    );
    assert_eq!(
        diagnostics_of("kind: Service\n"),
        ["1:1: note: Service is no policy: skipped"]
    );
    assert_eq!(
        diagnostics_of(&resource("cilium.io/v2", "CiliumEnvoyConfig", "{name: a}")),
        ["1:1: note: CiliumEnvoyConfig \"a\" is no policy: skipped"]
    );
    assert_eq!(
        diagnostics_of(&resource("projectcalico.org/v3", "NetworkPolicy", "{name: a}")),
        ["1:1: warning: NetworkPolicy of \"projectcalico.org/v3\" is not supported: it is skipped"]
    );
}

#[test]
fn misspelled_policies_are_errors() {
    assert_eq!(
        diagnostics_of(&resource("cilium.io/v2", "CiliumNetworkpolicy", "{name: a}")),
        [
            "2:7: unknown kind \"CiliumNetworkpolicy\", did you mean \"CiliumNetworkPolicy\" (apiVersion cilium.io/v2)?"
        ]
    );
    assert_eq!(
        diagnostics_of(&resource("cilium.io/v1", "CiliumNetworkPolicy", "{name: a}")),
        ["1:13: apiVersion of a CiliumNetworkPolicy must be cilium.io/v2"]
    );
    assert_eq!(
        diagnostics_of(&format!(
            "kind: CiliumNetworkPolicy\nmetadata: {{name: a}}\n{SPEC}"
        )),
        ["1:1: apiVersion of a CiliumNetworkPolicy must be cilium.io/v2"]
    );
    assert_eq!(
        diagnostics_of(&resource(
            "networking.k8s.io/v1",
            "CiliumNetworkPolicy",
            "{name: a}"
        )),
        ["2:7: a CiliumNetworkPolicy is of apiVersion cilium.io/v2"]
    );
    assert_eq!(
        diagnostics_of(&resource("extensions/v1beta1", "NetworkPolicy", "{name: a}")),
        ["1:13: this version of NetworkPolicy is gone; write apiVersion: networking.k8s.io/v1"]
    );
    assert_eq!(
        diagnostics_of("spec: {}\n"),
        ["1:1: kind is missing: this is no resource"]
    );
    assert_eq!(
        diagnostics_of("- a\n"),
        ["1:1: this must be an object, found a list"]
    );
    assert_eq!(
        diagnostics_of("text\n"),
        ["1:1: this must be an object, found the string \"text\""]
    );
}

#[test]
fn spec_and_specs() {
    let head = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: a}\n";
    let spec = "{endpointSelector: {}, ingress: [{}]}";
    let parsed = parse("f", &format!("{head}spec: {spec}\nspecs: [{spec}, {spec}]\n"));
    assert_eq!(errors_of(&parsed), [""; 0]);
    assert_eq!(parsed.policies[0].specs.len(), 3);
    assert_eq!(
        diagnostics_of(head),
        ["1:1: spec is missing (or specs, a list of them)"]
    );
    assert_eq!(
        diagnostics_of(&format!("{head}specs: []\n")),
        ["1:1: spec is missing (or specs, a list of them)"]
    );
    assert_eq!(
        diagnostics_of(&format!("{head}spec: []\n")),
        ["4:7: spec must be an object, found a list"]
    );
}

#[test]
fn clusterwide_policies() {
    let text = resource(
        "cilium.io/v2",
        "CiliumClusterwideNetworkPolicy",
        "{name: a, namespace: b}",
    );
    assert_eq!(
        diagnostics_of(&text),
        ["1:1: warning: a CiliumClusterwideNetworkPolicy is of no namespace; metadata.namespace is ignored"]
    );
    let text = text
        .replace(", namespace: b", "")
        .replace("endpointSelector: {}", "nodeSelector: {matchLabels: {a: b}}");
    let parsed = parse("f", &text);
    assert_eq!(errors_of(&parsed), [""; 0]);
    assert_eq!(
        parsed.policies[0].specs[0].subject,
        Subject::Node(super::all([is("any", "a", "b")]))
    );
}

#[test]
fn cidr_groups() {
    let group = |spec: &str| {
        format!(
            "apiVersion: cilium.io/v2alpha1\nkind: CiliumCIDRGroup\nmetadata: {{name: g, labels: {{a: b}}}}\nspec: {spec}\n"
        )
    };
    let parsed = parse("f", &group("{externalCIDRs: [10.1.2.3/8, '2001:db8::/32']}"));
    assert_eq!(errors_of(&parsed), [""; 0]);
    let group_read = &parsed.cidr_groups[0];
    assert_eq!(
        (group_read.name.as_str(), group_read.labels.as_slice()),
        ("g", &[("a".to_owned(), "b".to_owned())][..])
    );
    assert_eq!(
        group_read
            .cidrs
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>(),
        ["10.0.0.0/8", "2001:db8::/32"]
    );

    assert_eq!(diagnostics_of(&group("{}")), ["4:7: externalCIDRs is missing"]);
    assert_eq!(
        diagnostics_of(&group("{externalCIDRs: [10.0.0.1]}")),
        ["4:24: \"10.0.0.1\" is not a prefix; write ADDRESS/LENGTH"]
    );
    assert!(parse("f", &group("{externalCIDRs: [x]}")).cidr_groups.is_empty());
}

#[test]
fn lists_are_expanded() {
    let items = "items:
- apiVersion: cilium.io/v2
  kind: CiliumNetworkPolicy
  metadata: {name: a}
  spec: {endpointSelector: {}, ingress: [{}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: b}
";
    let parsed = parse("f", &format!("apiVersion: v1\nkind: List\n{items}"));
    assert_eq!(
        errors_of(&parsed),
        ["f:8:3: note: Pod \"b\" is no policy: skipped"]
    );
    assert_eq!((parsed.policies.len(), parsed.policies[0].location.line), (1, 4));

    // Elements of a typed list need no `kind` and `apiVersion`.
    let text = "apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicyList
items:
- metadata: {name: a}
  spec: {endpointSelector: {}, ingress: [{}]}
- metadata: {name: a}
  spec: {endpointSelector: {}, ingres: [{}]}
";
    assert_eq!(
        diagnostics_of(text),
        [
            "6:3: CiliumClusterwideNetworkPolicy \"a\" is there twice, first in line 4",
            "7:32: unknown field \"ingres\", did you mean \"ingress\"?",
        ]
    );
}

#[test]
fn two_resources_of_one_name_are_an_error() {
    let text = cnp("  ingress: [{}]\n");
    let other = text.replace("shop", "other");
    assert_eq!(diagnostics_of(&format!("{text}---\n{other}")), [""; 0]);
    assert_eq!(
        diagnostics_of(&format!("{text}---\n{other}---\n{text}")),
        ["15:1: CiliumNetworkPolicy \"p\" is there twice, first in line 1"]
    );
}
