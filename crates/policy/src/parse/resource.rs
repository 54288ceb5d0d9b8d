//! Conversion of documents to resources: the kind, and the members that all kinds have in common.

use std::collections::HashMap;

use palisade_model::rule::{CidrGroup, Location, Policy, PolicyKind, Spec};
use palisade_yaml::quoted;

use super::{
    cidr_group,
    metadata::{self, Metadata},
    network_policy,
    parsed::Parsed,
    reader::{At, Context, Object},
    spec,
};
use crate::suggest::nearest;

/// Known kinds, with group and versions.
const KINDS: [(&str, &str, &[&str]); 4] = [
    ("CiliumNetworkPolicy", "cilium.io", &["v2"]),
    ("CiliumClusterwideNetworkPolicy", "cilium.io", &["v2"]),
    ("CiliumCIDRGroup", "cilium.io", &["v2", "v2alpha1"]),
    ("NetworkPolicy", "networking.k8s.io", &["v1"]),
];

/// Resources parsed so far.
#[derive(Default)]
pub(super) struct Resources {
    pub policies: Vec<Policy>,
    cidr_groups: Vec<CidrGroup>,
    /// First place of each resource, by kind, namespace and name.
    seen: HashMap<(&'static str, Option<String>, String), Location>,
}

/// `apiVersion` and `kind` that a list declares for its elements.
#[derive(Clone, Copy)]
struct Inherited<'a> {
    api_version: &'a str,
    kind: &'a str,
}

impl Resources {
    pub(super) fn into_parsed(self, context: Context) -> Parsed {
        Parsed {
            policies: self.policies,
            cidr_groups: self.cidr_groups,
            diagnostics: context.into_diagnostics(),
        }
    }

    /// Parses a document. An empty document is ignored.
    pub(super) fn read(&mut self, document: At<'_>) {
        if !document.node.is_null() {
            self.resource(document, None);
        }
    }

    fn resource(&mut self, at: At<'_>, inherited: Option<Inherited<'_>>) {
        let Some(object) = at.object() else {
            return;
        };
        let kind = object.text("kind").or(inherited.map(|inherited| inherited.kind));
        let api_version = object
            .text("apiVersion")
            .or(inherited.map(|inherited| inherited.api_version));
        let Some(kind) = kind else {
            at.error("kind is missing: this is no resource");
            return;
        };
        let api_version = api_version.unwrap_or_default();
        // Kinds and versions of Kubernetes are ASCII. A look-alike of a known kind must not be skipped as a foreign
        // resource: the policy would silently have no effect.
        for (name, text) in [("kind", kind), ("apiVersion", api_version)] {
            if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
                object.error_at_value(
                    name,
                    format!("{name} {} holds a character that no {name} has", escaped(text)),
                );
                return;
            }
        }
        let known = KINDS
            .iter()
            .find(|(name, group, _)| *name == kind && belongs(api_version, group));
        match (known, kind.strip_suffix("List")) {
            (Some((name, group, versions)), _) => {
                let version = api_version.rsplit('/').next().unwrap_or_default();
                if versions.contains(&version) {
                    self.known(name, &object);
                } else {
                    let message = format!("apiVersion of a {kind} must be {group}/{}", versions[0]);
                    if object.text("apiVersion").is_some() {
                        object.error_at_value("apiVersion", message);
                    } else {
                        at.error(message);
                    }
                }
            }
            (None, Some(element))
                if object.field("items").is_some() || (element.is_empty() && api_version == "v1") =>
            {
                // `kind: List` declares no kind for its elements.
                let inherited = Some(Inherited {
                    api_version,
                    kind: element,
                })
                .filter(|_| !element.is_empty());
                self.items(&object, inherited);
            }
            _ => skipped(&object, kind, api_version),
        }
    }

    /// Parses the elements of `kind: List`, `kind: CiliumNetworkPolicyList` and the like.
    fn items(&mut self, object: &Object<'_>, inherited: Option<Inherited<'_>>) {
        if let Some(items) = object.required("items").and_then(|at| at.list()) {
            items.read(|at| {
                self.resource(at, inherited);
                None::<()>
            });
        }
        object.ignore(&["apiVersion", "kind", "metadata"]);
        object.finish();
    }

    fn known(&mut self, kind: &'static str, object: &Object<'_>) {
        let context = object.at.context;
        let errors = context.errors();
        context.begin_policy();
        let metadata = metadata::read(object);
        object.ignore(&["apiVersion", "kind", "status"]);
        match (kind, metadata) {
            ("CiliumCIDRGroup", metadata) => {
                let spec = object.required("spec");
                object.finish();
                let group = spec.zip(metadata).and_then(|(spec, metadata)| {
                    self.remember(kind, object, &metadata, None);
                    cidr_group::read(object.at, spec, metadata)
                });
                self.cidr_groups
                    .extend(group.filter(|_| context.errors() == errors));
            }
            (_, metadata) => {
                let policy = self.policy(kind, object, metadata);
                self.policies
                    .extend(policy.filter(|_| context.errors() == errors));
            }
        }
    }

    fn policy(
        &mut self,
        kind: &'static str,
        object: &Object<'_>,
        metadata: Option<Metadata<'_>>,
    ) -> Option<Policy> {
        let written = metadata.as_ref().and_then(|metadata| metadata.namespace);
        let (policy_kind, namespace) = match kind {
            "CiliumNetworkPolicy" => (PolicyKind::Cnp, Some(written.unwrap_or("default"))),
            "NetworkPolicy" => (PolicyKind::Knp, Some(written.unwrap_or("default"))),
            _ => {
                if written.is_some() {
                    object.at.warning(format!(
                        "a {kind} is of no namespace; metadata.namespace is ignored"
                    ));
                }
                (PolicyKind::Ccnp, None)
            }
        };
        let specs = match (policy_kind, namespace) {
            (PolicyKind::Knp, Some(namespace)) => object
                .required("spec")
                .and_then(|at| network_policy::spec(at, namespace))
                .into_iter()
                .collect(),
            _ => cilium_specs(object, policy_kind, namespace),
        };
        object.finish();
        let metadata = metadata?;
        self.remember(kind, object, &metadata, namespace);
        Some(Policy {
            kind: policy_kind,
            name: metadata.name.to_owned(),
            namespace: namespace.map(str::to_owned),
            audit: metadata.audit,
            specs,
            location: object.at.location(),
        })
    }

    /// Reports a second resource of the same kind, namespace and name. In a cluster the second would replace the first,
    /// so it is a mistake.
    fn remember(
        &mut self,
        kind: &'static str,
        object: &Object<'_>,
        metadata: &Metadata<'_>,
        namespace: Option<&str>,
    ) {
        let key = (kind, namespace.map(str::to_owned), metadata.name.to_owned());
        let location = object.at.location();
        if let Some(first) = self.seen.get(&key) {
            let at = if first.line == 0 {
                String::new()
            } else {
                format!(", first in line {}", first.line)
            };
            object
                .at
                .error(format!("{kind} {} is there twice{at}", quoted(metadata.name)));
        } else {
            self.seen.insert(key, location);
        }
    }
}

/// Parses `spec` and `specs`, at least one of which must be present.
fn cilium_specs(object: &Object<'_>, kind: PolicyKind, namespace: Option<&str>) -> Vec<Spec> {
    let one = object.field("spec");
    let several = object.field("specs");
    if one.is_none() && several.is_none_or(|at| at.is_empty_list()) {
        object.at.error("spec is missing (or specs, a list of them)");
    }
    let mut specs: Vec<Spec> = one
        .and_then(|at| spec::read(at, kind, namespace))
        .into_iter()
        .collect();
    if let Some(list) = several.and_then(|at| at.list()) {
        specs.extend(list.read(|at| spec::read(at, kind, namespace)));
    }
    specs
}

/// Returns whether an apiVersion has the group. A missing apiVersion counts as any group.
fn belongs(api_version: &str, group: &str) -> bool {
    api_version.is_empty() || api_version.split_once('/').is_some_and(|(of, _)| of == group)
}

/// Reports a resource that is not parsed. The report is an error if the resource was probably meant as a supported
/// kind, a warning for network policies of other products, else a note.
fn skipped(object: &Object<'_>, kind: &str, api_version: &str) {
    let group = api_version
        .split_once('/')
        .map_or(api_version, |(group, _)| group);
    let ours = api_version.is_empty()
        || KINDS
            .iter()
            .any(|(_, own, _)| belongs(api_version, own) || nearest(group, [*own]).is_some())
        || api_version.starts_with("cilium/")
        // No other API group has kinds with this prefix.
        || kind.starts_with("Cilium") && KINDS.iter().any(|(name, _, _)| *name == kind);
    let meant = nearest(kind, KINDS.map(|(name, _, _)| name)).filter(|_| ours);
    if let Some(name) = meant {
        let (_, group, versions) = KINDS
            .iter()
            .find(|(known, _, _)| *known == name)
            .unwrap_or(&KINDS[0]);
        let message = if name == kind {
            format!("a {kind} is of apiVersion {group}/{}", versions[0])
        } else {
            format!(
                "unknown kind {}, did you mean \"{name}\" (apiVersion {group}/{})?",
                quoted(kind),
                versions[0]
            )
        };
        object.error_at_value("kind", message);
    } else if kind == "NetworkPolicy" && belongs(api_version, "extensions") {
        object.error_at_value(
            "apiVersion",
            "this version of NetworkPolicy is gone; write apiVersion: networking.k8s.io/v1",
        );
    } else if kind.ends_with("NetworkPolicy") || kind.ends_with("NetworkPolicyList") {
        object.at.warning(format!(
            "{kind} of {} is not supported: it is skipped",
            quoted(api_version)
        ));
    } else {
        let name = object
            .field("metadata")
            .and_then(|at| at.node.get("name"))
            .and_then(|name| name.as_str());
        let name = name.map(|name| format!(" {}", quoted(name))).unwrap_or_default();
        object
            .at
            .note(format!("{}{name} is no policy: skipped", shown(kind)));
    }
}

/// Quotes a text, with escapes for all characters that are not ASCII.
fn escaped(text: &str) -> String {
    let ascii: String = text.chars().take(60).flat_map(char::escape_default).collect();
    format!("\"{ascii}\"")
}

/// Returns a kind for a message, escaped like a quoted text but without quotes. The kind comes from the file, so it can
/// contain any character.
fn shown(kind: &str) -> String {
    let quoted = quoted(kind);
    quoted.trim_matches('"').to_owned()
}
