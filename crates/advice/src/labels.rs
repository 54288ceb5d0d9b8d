//! Labels that name a workload for longer than one of its instances, and selectors made of them.

use palisade_model::{labels::Labels, rule::Label};

use crate::yaml::{Yaml, list, map};

/// Label with the namespace of an endpoint.
pub(crate) const NAMESPACE: &str = "io.kubernetes.pod.namespace";

/// Keys of labels that differ between the instances or releases of one workload, or that repeat another label.
const UNSTABLE: [&str; 20] = [
    "app.kubernetes.io/managed-by",
    "app.kubernetes.io/version",
    "apps.kubernetes.io/pod-index",
    "batch.kubernetes.io/controller-uid",
    "batch.kubernetes.io/job-completion-index",
    "batch.kubernetes.io/job-name",
    "chart",
    "controller-revision-hash",
    "controller-uid",
    "heritage",
    "helm.sh/chart",
    "io.cilium.k8s.policy.cluster",
    "io.cilium.k8s.policy.serviceaccount",
    "job-name",
    "pod-template-generation",
    "pod-template-hash",
    "release",
    "rollouts-pod-template-hash",
    "statefulset.kubernetes.io/pod-name",
    "topology.kubernetes.io/zone",
];
/// Prefixes of keys that repeat labels of the namespace, or belong to tools.
const UNSTABLE_PREFIXES: [&str; 3] = [
    "io.cilium.k8s.namespace.labels.",
    "io.cilium.",
    "kubectl.kubernetes.io/",
];
/// Sources of labels that describe addresses.
const ADDRESS_SOURCES: [&str; 3] = ["cidr", "cidrgroup", "fqdn"];

/// Returns whether a label describes a workload, in the same way for all of its instances.
fn is_stable(label: &Label) -> bool {
    !ADDRESS_SOURCES.contains(&label.source.as_str())
        && !UNSTABLE.contains(&label.key.as_str())
        && !UNSTABLE_PREFIXES
            .iter()
            .any(|prefix| label.key.starts_with(prefix))
}

/// Returns the stable labels of a set. If there are none but that of the namespace, returns the whole set.
pub(crate) fn stable(labels: &Labels) -> Labels {
    let kept = Labels::new(labels.iter().filter(|label| is_stable(label)).cloned());
    if kept.iter().any(|label| label.key != NAMESPACE) {
        kept
    } else {
        labels.clone()
    }
}

/// Returns the namespace in a label set.
pub(crate) fn namespace(labels: &Labels) -> Option<&str> {
    labels.get("k8s", NAMESPACE)
}

/// Returns whether the labels are those of the world, which no label of a workload describes.
pub(crate) fn is_world(labels: &Labels) -> bool {
    labels.is_empty()
        || ["world", "world-ipv4", "world-ipv6"]
            .into_iter()
            .any(|key| labels.has_reserved(key))
}

/// A selector: labels that must be present, and keys that must be absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LabelSelector {
    labels: Labels,
    absent: Vec<(String, String)>,
}

impl LabelSelector {
    /// Returns a selector of `labels` without the unstable ones.
    pub(crate) fn stable(labels: &Labels) -> Self {
        Self {
            labels: stable(labels),
            absent: Vec::new(),
        }
    }

    /// Returns a selector of `target` that selects none of `others`, as far as labels can tell them apart.
    pub(crate) fn exact<'l>(target: &Labels, others: impl Iterator<Item = &'l Labels>) -> Self {
        let mut selector = Self::stable(target);
        for other in others {
            if other == target || !selector.selects(other) {
                continue;
            }
            // Label sets that differ only in unstable labels are of the same workload.
            let extra = other
                .iter()
                .find(|label| is_stable(label) && !target.has(&label.source, &label.key));
            if let Some(label) = extra {
                selector.absent.push((label.source.clone(), label.key.clone()));
            }
        }
        selector
    }

    /// Returns whether the selector selects a label set.
    pub(crate) fn selects(&self, labels: &Labels) -> bool {
        self.labels
            .iter()
            .all(|label| labels.get(&label.source, &label.key) == Some(label.value.as_str()))
            && !self.absent.iter().any(|(source, key)| labels.has(source, key))
    }

    /// Returns the labels that must be present.
    pub(crate) const fn labels(&self) -> &Labels {
        &self.labels
    }

    /// Returns the selector as YAML. The namespace label is left out if its value is `implied`.
    pub(crate) fn yaml(&self, implied: Option<&str>) -> Yaml {
        let mut parts = Vec::new();
        let labels: Vec<(String, Yaml)> = self
            .labels
            .iter()
            .filter(|label| {
                !(label.source == "k8s" && label.key == NAMESPACE && implied == Some(label.value.as_str()))
            })
            .map(|label| (key(&label.source, &label.key), label.value.as_str().into()))
            .collect();
        if !labels.is_empty() {
            parts.push(("matchLabels".to_owned(), Yaml::Map(labels)));
        }
        if !self.absent.is_empty() {
            let absent = self.absent.iter().map(|(source, name)| {
                map([
                    ("key", key(source, name).into()),
                    ("operator", "DoesNotExist".into()),
                ])
            });
            parts.push(("matchExpressions".to_owned(), list(absent)));
        }
        Yaml::Map(parts)
    }
}

/// Returns the key of a label in a selector.
fn key(source: &str, key: &str) -> String {
    match (source, key) {
        // Kubernetes policies are usually written with the source of this label.
        ("k8s", NAMESPACE) => format!("k8s:{NAMESPACE}"),
        // Without a source the label of any source matches, which is how policies are written by hand.
        ("k8s", key) => key.to_owned(),
        (source, key) => format!("{source}:{key}"),
    }
}

#[cfg(test)]
mod tests {
    use palisade_model::labels::parse_label;

    use super::*;

    fn set(texts: &[&str]) -> Labels {
        Labels::new(texts.iter().map(|text| parse_label(text)))
    }

    #[test]
    fn labels_of_instances_are_left_out() {
        let labels = set(&[
            "app=web",
            "pod-template-hash=5d8",
            "io.kubernetes.pod.namespace=shop",
        ]);
        assert_eq!(
            stable(&labels),
            set(&["app=web", "io.kubernetes.pod.namespace=shop"])
        );
        let only = set(&["pod-template-hash=5d8", "io.kubernetes.pod.namespace=shop"]);
        assert_eq!(stable(&only), only);
    }

    #[test]
    fn a_selector_tells_a_workload_from_one_with_more_labels() {
        let front = set(&["app=front", "pod-template-hash=1"]);
        let canary = set(&["app=front", "track=canary"]);
        let others = [front.clone(), canary.clone(), set(&["app=back"])];
        let selector = LabelSelector::exact(&front, others.iter());
        assert!(selector.selects(&front) && !selector.selects(&canary));
        let alone = LabelSelector::exact(&canary, others.iter());
        assert!(alone.selects(&canary) && !alone.selects(&front) && alone.absent.is_empty());
        let front = set(&["app=front"]);
        let selector = LabelSelector::exact(&front, [canary.clone()].iter());
        assert!(!selector.selects(&canary));
        assert!(selector.yaml(None).emit().contains("operator: DoesNotExist"));
    }
}
