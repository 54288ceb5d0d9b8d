//! Accepted texts, refused texts with the place of the error, and malicious texts.

mod cases;
mod errors;
mod hostile;
mod meaning;
mod network_policy;
mod resources;

use palisade_model::rule::{LabelSource, PortRule, PortSpec, Requirement, Rule, Selector, Spec, Test};

use super::{Parsed, parse};

/// Returns a CiliumNetworkPolicy of the namespace `shop` for every endpoint; `spec` is the rest of its spec.
fn cnp(spec: &str) -> String {
    format!(
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {{name: p, namespace: shop}}\nspec:\n  endpointSelector: {{}}\n{spec}"
    )
}

/// Returns the diagnostics of a text, one per line, without the file name.
fn diagnostics_of(text: &str) -> Vec<String> {
    parse("f", text)
        .diagnostics
        .iter()
        .map(|diagnostic| diagnostic.to_string().trim_start_matches("f:").to_owned())
        .collect()
}

/// Returns the only spec of a text without errors.
#[track_caller]
fn spec(text: &str) -> Spec {
    let parsed = parse("f", text);
    assert!(!parsed.has_errors(), "{:#?}", parsed.diagnostics);
    let mut specs: Vec<Spec> = parsed
        .policies
        .into_iter()
        .flat_map(|policy| policy.specs)
        .collect();
    assert_eq!(specs.len(), 1);
    specs.remove(0)
}

/// Returns the only egress rule of a CiliumNetworkPolicy.
#[track_caller]
fn egress(rule: &str) -> Rule {
    let mut rules = spec(&cnp(&format!("  egress:\n  - {rule}\n")))
        .egress
        .expect("a section");
    assert_eq!(rules.len(), 1);
    rules.remove(0)
}

/// Returns the only `toPorts` entry of an egress rule.
#[track_caller]
fn port_rule(entry: &str) -> PortRule {
    match egress(&format!("toPorts: [{entry}]")).ports {
        palisade_model::rule::Ports::OneOf(mut rules) if rules.len() == 1 => rules.remove(0),
        other => panic!("{other:?}"),
    }
}

fn requirement(source: &str, key: &str, test: Test) -> Requirement {
    let source = if source == "any" {
        LabelSource::Any
    } else {
        LabelSource::Named(source.into())
    };
    Requirement {
        source,
        key: key.into(),
        test,
    }
}

fn is(source: &str, key: &str, value: &str) -> Requirement {
    requirement(source, key, Test::In(vec![value.into()]))
}

fn in_namespace(namespace: &str) -> Requirement {
    is("k8s", "io.kubernetes.pod.namespace", namespace)
}

fn all(requirements: impl Into<Vec<Requirement>>) -> Selector {
    Selector {
        requirements: requirements.into(),
    }
}

fn ports(rule: PortRule) -> Vec<PortSpec> {
    rule.ports
}

fn errors_of(parsed: &Parsed) -> Vec<String> {
    parsed.diagnostics.iter().map(ToString::to_string).collect()
}
