//! Labels, names and namespaces of the configuration.

use std::collections::HashMap;

use palisade_model::{labels, rule::Label};

use super::reader::{At, Section};

/// Key of the label that holds the namespace of an endpoint.
pub(super) const NAMESPACE_LABEL: &str = "io.kubernetes.pod.namespace";
/// Prefix of the labels that an endpoint has from its namespace.
const NAMESPACE_LABEL_PREFIX: &str = "io.cilium.k8s.namespace.labels.";
/// Key of the label that holds the name of a Kubernetes namespace.
const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";
/// Label sources that only Palisade assigns.
const RESERVED_SOURCES: [&str; 5] = ["reserved", "cidr", "cidrgroup", "fqdn", "any"];

/// Returns the labels of each `[[namespace]]` by its name. The label that holds the name is not included.
pub(super) fn namespaces(sections: Vec<Section<'_, '_>>) -> HashMap<String, Vec<Label>> {
    let mut namespaces = HashMap::new();
    for section in sections {
        let name = dns_name(&section, "name", "\"prod\"");
        let labels = own_labels(&section);
        if let Some(name) = name
            && namespaces.insert(name.value.clone(), labels).is_some()
        {
            section.error_at(name.offset, format!("there is another namespace {}", name.value));
        }
        section.finish();
    }
    namespaces
}

/// Returns the name at `key`. A name that is not valid in `namespace/name` or as the value of a label is an error.
pub(super) fn dns_name(section: &Section<'_, '_>, key: &'static str, example: &str) -> Option<At<String>> {
    let at = section.required_string(key, example)?;
    if valid_name(&at.value) {
        return Some(at);
    }
    section.error_at(
        at.offset,
        format!(
            "'{}' cannot be a name: letters, digits, '-', '_' and '.', at most 253 of them",
            at.value
        ),
    );
    None
}

pub(super) fn valid_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 253
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

pub(super) fn namespace_of(section: &Section<'_, '_>) -> Option<String> {
    let at = section.string("namespace")?;
    if !valid_name(&at.value) {
        section.error_at(at.offset, format!("'{}' cannot be a namespace", at.value));
        return None;
    }
    Some(at.value)
}

/// Returns the `labels` of a section.
pub(super) fn own_labels(section: &Section<'_, '_>) -> Vec<Label> {
    let mut list = Vec::new();
    for (name, value) in section.strings("labels") {
        list.extend(label(section, &name, &value));
    }
    list
}

/// Returns one label of a section; `None` after an error.
pub(super) fn label(section: &Section<'_, '_>, name: &At<String>, value: &At<String>) -> Option<Label> {
    let label = labels::parse_label(&format!("{}={}", name.value, value.value));
    if name.value.is_empty() || label.key.is_empty() || name.value.contains(['=', ' ']) {
        section.error_at(
            name.offset,
            format!("'{}' cannot be the key of a label", name.value),
        );
        return None;
    }
    if RESERVED_SOURCES.contains(&label.source.as_str()) {
        section.error_at(
            name.offset,
            format!(
                "labels of source '{}' are given by Palisade and cannot be configured",
                label.source
            ),
        );
        return None;
    }
    Some(label)
}

/// Returns the labels that an endpoint has from its namespace.
pub(super) fn namespace_labels(namespace: &str, namespaces: &HashMap<String, Vec<Label>>) -> Vec<Label> {
    let k8s = |key: String, value: &str| Label {
        source: "k8s".into(),
        key,
        value: value.to_owned(),
    };
    let mut list = vec![
        k8s(NAMESPACE_LABEL.into(), namespace),
        k8s(
            format!("{NAMESPACE_LABEL_PREFIX}{NAMESPACE_NAME_LABEL}"),
            namespace,
        ),
    ];
    for label in namespaces.get(namespace).into_iter().flatten() {
        list.push(k8s(
            format!("{NAMESPACE_LABEL_PREFIX}{}", label.key),
            &label.value,
        ));
    }
    list
}
