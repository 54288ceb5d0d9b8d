//! `metadata` of a resource.

use palisade_yaml::quoted;

use super::{
    name_syntax::{is_dns_subdomain, is_namespace},
    reader::{At, Object},
};
use crate::suggest::nearest;

/// The metadata that Palisade uses.
pub(super) struct Metadata<'a> {
    pub name: &'a str,
    pub namespace: Option<&'a str>,
    pub labels: Vec<(String, String)>,
    pub audit: bool,
}

/// Prefix of Palisade's annotations.
const ANNOTATIONS: &str = "palisade.io/";
/// Annotation for audit mode of a policy: packets that the policy denies pass and are reported.
const AUDIT: &str = "palisade.io/audit";

/// Fields of `metadata` that Palisade ignores. Resources exported from a cluster contain most of them.
const OTHERS: [&str; 13] = [
    "generateName",
    "selfLink",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "ownerReferences",
    "finalizers",
    "managedFields",
    "clusterName",
    "initializers",
];

/// Parses the metadata of a resource.
pub(super) fn read<'d>(document: &'d Object<'_>) -> Option<Metadata<'d>> {
    let object = document.required("metadata")?.object()?;
    let name = object.required_text("name").filter(|name| {
        let valid = is_dns_subdomain(name);
        if !valid {
            object.error_at_value(
                "name",
                format!(
                    "{} cannot be a name: it must be a DNS name in lower case",
                    quoted(name)
                ),
            );
        }
        valid
    });
    let namespace = object.text("namespace").filter(|namespace| {
        let valid = is_namespace(namespace);
        if !valid {
            object.error_at_value(
                "namespace",
                format!(
                    "{} cannot be a namespace: it must be one label of a DNS name in lower case",
                    quoted(namespace)
                ),
            );
        }
        valid
    });
    let mut labels = Vec::new();
    if let Some(members) = object.field("labels").and_then(|at| at.object()) {
        for (key, value) in members.members() {
            if let Some(value) = value.string() {
                labels.push((key.to_owned(), value.to_owned()));
            }
        }
    }
    let audit = object.field("annotations").is_some_and(annotations);
    object.ignore(&OTHERS);
    object.finish();
    Some(Metadata {
        name: name?,
        namespace,
        labels,
        audit,
    })
}

/// Parses the annotations. Returns whether the policy is in audit mode. Annotations of other tools are ignored.
fn annotations(at: At<'_>) -> bool {
    let Some(object) = at.object() else {
        return false;
    };
    let mut audit = false;
    for (key, value) in object.members() {
        if key == AUDIT {
            match value.string() {
                Some("true") => audit = true,
                Some("false") | None => {}
                Some(other) => value.error(format!(
                    "{AUDIT} must be \"true\" or \"false\", found {}",
                    quoted(other)
                )),
            }
        } else if key.starts_with(ANNOTATIONS) || nearest(key, [AUDIT]).is_some() {
            object.error_at_key(
                key,
                format!("unknown annotation {}, did you mean \"{AUDIT}\"?", quoted(key)),
            );
        }
    }
    audit
}
