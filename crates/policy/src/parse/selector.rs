//! Label selectors, with namespaces as requirements.

use palisade_model::rule::{LabelSource, PolicyKind, Requirement, Selector, Test};
use palisade_yaml::quoted;

use super::{
    name_syntax::{check_label_key, check_label_value},
    reader::{At, hint},
};

/// Label with the namespace of an endpoint.
pub(super) const NAMESPACE: &str = "io.kubernetes.pod.namespace";
/// Prefix of the endpoint labels that hold the labels of the endpoint's namespace.
pub(super) const NAMESPACE_LABELS: &str = "io.cilium.k8s.namespace.labels";

/// Interpretation of the keys of a selector.
#[derive(Clone, Copy)]
pub(super) enum Keys {
    /// `SOURCE:KEY`. Without a source any source matches; `$KEY` and `reserved.KEY` are `reserved:KEY`.
    Sourced,
    /// Keys without a source; all labels have this source.
    Of(&'static str),
    /// Labels of the endpoint's namespace.
    Namespace,
}

/// Parses a selector, without adding a namespace.
pub(super) fn read(at: At<'_>, keys: Keys) -> Option<Selector> {
    let (mut requirements, expressions) = read_parts(at, keys)?;
    requirements.extend(expressions);
    Some(Selector { requirements })
}

/// Returns the requirements of `matchLabels`, and those of `matchExpressions`.
fn read_parts(at: At<'_>, keys: Keys) -> Option<(Vec<Requirement>, Vec<Requirement>)> {
    let object = at.object()?;
    let mut labels = Vec::new();
    if let Some(members) = object.field("matchLabels").and_then(|at| at.object()) {
        for (key, value) in members.members() {
            let key = label_key(key, keys, at.is_bare()).map_err(|why| members.error_at_key(key, why));
            let value = label_value(value);
            if let (Ok((source, key)), Some(value)) = (key, value) {
                labels.push(Requirement {
                    source,
                    key,
                    test: Test::In(vec![value]),
                });
            }
        }
    }
    let expressions = object
        .field("matchExpressions")
        .and_then(|at| at.list())
        .map(|list| list.read(|at| expression(at, keys)))
        .unwrap_or_default();
    object.finish();
    Some((labels, expressions))
}

const OPERATORS: [&str; 4] = ["In", "NotIn", "Exists", "DoesNotExist"];

fn expression(at: At<'_>, keys: Keys) -> Option<Requirement> {
    let object = at.object()?;
    let key = object.required("key").and_then(|at| {
        let text = at.string()?;
        label_key(text, keys, at.is_bare())
            .map_err(|why| at.error(why))
            .ok()
    });
    let operator = object.required("operator").and_then(|at| {
        let text = at.string()?;
        if !OPERATORS.contains(&text) {
            at.error(format!(
                "unknown operator {}{}",
                quoted(text),
                hint(text, &OPERATORS)
            ));
            return None;
        }
        Some(text)
    });
    let values = object.field("values");
    let list = match values {
        Some(at) => at.list().map(|list| list.read(label_value)),
        None => Some(Vec::new()),
    };
    object.finish();
    let (source, key) = key?;
    let (operator, list) = (operator?, list?);
    let takes_values = matches!(operator, "In" | "NotIn");
    let has_values = values.is_some_and(|at| at.list().is_some_and(|list| !list.is_empty()));
    if takes_values && !has_values {
        at.error(format!("{operator} needs values"));
        return None;
    }
    if !takes_values && has_values {
        values.unwrap_or(at).error(format!("{operator} takes no values"));
        return None;
    }
    let test = match operator {
        "In" => Test::In(list),
        "NotIn" => Test::NotIn(list),
        "Exists" => Test::Exists,
        _ => Test::DoesNotExist,
    };
    Some(Requirement { source, key, test })
}

fn label_value(at: At<'_>) -> Option<String> {
    if at.node.is_null() {
        at.error("a label's value must be a string; for the empty one write \"\"");
        return None;
    }
    let text = at.string()?;
    match check_label_value(text) {
        Ok(()) => Some(text.to_owned()),
        Err(why) => {
            at.error(format!("{} cannot be a label's value: {why}", quoted(text)));
            None
        }
    }
}

fn label_key(text: &str, keys: Keys, bare: bool) -> Result<(LabelSource, String), String> {
    let (source, key) = match keys {
        Keys::Of(source) => (Some(source), text),
        Keys::Namespace => (Some("k8s"), text),
        Keys::Sourced => match text.strip_prefix('$').or_else(|| text.strip_prefix("reserved.")) {
            Some(key) => (Some("reserved"), key),
            None => match text.split_once(':') {
                Some((source, key)) => (Some(source), key),
                None => (None, text),
            },
        },
    };
    let refused = |why| format!("{} cannot be a label's key: {why}", quoted(text));
    if !bare
        && let Some(source) = source
        && (source.is_empty() || !source.bytes().all(|b| b.is_ascii_alphanumeric()))
    {
        return Err(refused("the part before the \":\" is not a source"));
    }
    if !bare || key.is_empty() {
        check_label_key(key).map_err(refused)?;
    }
    if let Keys::Sourced = keys {
        // Cilium validates the key in the form `SOURCE.KEY` by the rules of Kubernetes.
        let source = source.filter(|source| !source.is_empty()).unwrap_or("any");
        check_label_key(&format!("{source}.{key}")).map_err(refused)?;
    }
    let source = match source {
        None | Some("any" | "") => LabelSource::Any,
        Some(source) => LabelSource::Named(source.to_owned()),
    };
    let key = match keys {
        // Kubernetes gives each namespace this label with the name of the namespace. Endpoints have that name in the
        // label `NAMESPACE`.
        Keys::Namespace if key == "kubernetes.io/metadata.name" => NAMESPACE.to_owned(),
        Keys::Namespace => format!("{NAMESPACE_LABELS}.{key}"),
        _ => key.to_owned(),
    };
    Ok((source, key))
}

/// Kind and namespace of the resource of a selector.
#[derive(Clone, Copy)]
pub(super) struct Scope<'a> {
    pub kind: PolicyKind,
    pub namespace: Option<&'a str>,
    /// Whether the policy selects endpoints without labels (`reserved:init`), which have no namespace either.
    pub selects_init: bool,
}

impl Scope<'_> {
    /// Parses the endpoint selector of a policy. A namespaced policy selects endpoints of its own namespace only,
    /// whatever namespace `matchLabels` names.
    pub(super) fn subject(&self, at: At<'_>, keys: Keys) -> Option<Selector> {
        let (mut requirements, expressions) = read_parts(at, keys)?;
        if let (PolicyKind::Cnp | PolicyKind::Knp, Some(namespace)) = (self.kind, self.namespace) {
            requirements.retain(|requirement| {
                let of_namespace = is_k8s(&requirement.source) && requirement.key == NAMESPACE;
                if of_namespace && requirement.test != Test::In(vec![namespace.to_owned()]) {
                    at.warning(format!(
                        "a policy selects endpoints of its own namespace, {namespace}; the other one is ignored"
                    ));
                }
                !of_namespace
            });
            requirements.push(in_namespace(namespace));
        }
        requirements.extend(expressions);
        Some(Selector { requirements })
    }

    /// Parses a selector of peers. In a namespaced policy, a selector that names no namespace, no label of a namespace
    /// and no reserved label selects only peers in the namespace of the policy.
    pub(super) fn peer(&self, at: At<'_>) -> Option<Selector> {
        let selector = read(at, Keys::Sourced)?;
        let is_about_endpoints = |selector: &Selector| selector.requirements.contains(&has_namespace());
        let written = is_about_endpoints(&selector);
        let excludes = selector
            .requirements
            .iter()
            .any(|requirement| names_a_namespace(requirement) && is_negative(&requirement.test));
        let scoped = self.scoped(selector);
        if excludes && !written && is_about_endpoints(&scoped) {
            at.note(
                "this selects endpoints of the other namespaces, never the world, the node or other nodes; \
                 to select those too, add entities",
            );
        }
        Some(scoped)
    }

    fn scoped(&self, mut selector: Selector) -> Selector {
        let names_reserved = selector
            .requirements
            .iter()
            .any(|requirement| is_reserved(&requirement.source));
        let names_namespace = selector
            .requirements
            .iter()
            .any(|requirement| names_a_namespace(requirement) && requirement.key == NAMESPACE);
        let names_namespace_labels = selector
            .requirements
            .iter()
            .any(|requirement| names_a_namespace(requirement) && requirement.key != NAMESPACE);
        // A selector that only excludes namespaces selects endpoints. The world and nodes have no namespace, so the
        // negative requirement alone would match them as well.
        let only_negative = !names_reserved
            && (names_namespace || names_namespace_labels)
            && !selector
                .requirements
                .iter()
                .any(|requirement| names_a_namespace(requirement) && !is_negative(&requirement.test));
        match (self.kind, self.namespace) {
            (PolicyKind::Cnp | PolicyKind::Ccnp, _) if only_negative => {
                selector.requirements.push(has_namespace());
            }
            _ if names_reserved || names_namespace => {}
            (PolicyKind::Cnp, Some(namespace)) if !names_namespace_labels => {
                selector.requirements.push(in_namespace(namespace));
            }
            // Without this requirement an empty selector would also match the world.
            (PolicyKind::Ccnp, _) if !self.selects_init => selector.requirements.push(has_namespace()),
            _ => {}
        }
        selector
    }
}

pub(super) fn in_namespace(namespace: &str) -> Requirement {
    Requirement {
        source: LabelSource::Named("k8s".into()),
        key: NAMESPACE.into(),
        test: Test::In(vec![namespace.to_owned()]),
    }
}

pub(super) fn has_namespace() -> Requirement {
    Requirement {
        source: LabelSource::Named("k8s".into()),
        key: NAMESPACE.into(),
        test: Test::Exists,
    }
}

/// Returns whether a selector requires `reserved:init`.
pub(super) fn names_init(selector: &Selector) -> bool {
    selector
        .requirements
        .iter()
        .any(|requirement| is_reserved(&requirement.source) && requirement.key == "init")
}

/// Returns whether a requirement is about the namespace of an endpoint, or about the labels of its namespace.
fn names_a_namespace(requirement: &Requirement) -> bool {
    is_k8s_or_any(&requirement.source)
        && (requirement.key == NAMESPACE || requirement.key.starts_with(NAMESPACE_LABELS))
}

/// Returns whether a label set without the label meets the test.
const fn is_negative(test: &Test) -> bool {
    matches!(test, Test::NotIn(_) | Test::DoesNotExist)
}

fn is_k8s(source: &LabelSource) -> bool {
    matches!(source, LabelSource::Named(name) if name == "k8s")
}

fn is_k8s_or_any(source: &LabelSource) -> bool {
    *source == LabelSource::Any || is_k8s(source)
}

fn is_reserved(source: &LabelSource) -> bool {
    matches!(source, LabelSource::Named(name) if name == "reserved")
}
