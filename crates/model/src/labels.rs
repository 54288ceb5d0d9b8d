//! Label sets, and how selectors match them.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::rule::{Label, LabelSource, Requirement, Selector, Test};

/// A sorted set of labels. Cloning is cheap.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Labels(Arc<[Label]>);

impl Labels {
    /// Creates a set from labels in any order. Of two labels with the same source and key, the later one is kept.
    #[must_use]
    pub fn new(labels: impl IntoIterator<Item = Label>) -> Self {
        let mut sorted: Vec<Label> = Vec::new();
        for label in labels {
            match sorted.binary_search_by(|l| (&l.source, &l.key).cmp(&(&label.source, &label.key))) {
                Ok(at) => sorted[at] = label,
                Err(at) => sorted.insert(at, label),
            }
        }
        Self(sorted.into())
    }

    /// Creates a set of one label of the `reserved` source.
    #[must_use]
    pub fn reserved(key: &str) -> Self {
        Self::new([reserved(key)])
    }

    /// Returns the labels, sorted by source and key.
    pub fn iter(&self) -> impl Iterator<Item = &Label> {
        self.0.iter()
    }

    /// Returns whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns whether the set has a label of this source and key, with any value.
    #[must_use]
    pub fn has(&self, source: &str, key: &str) -> bool {
        self.get(source, key).is_some()
    }

    /// Returns the value of the label with this source and key.
    #[must_use]
    pub fn get(&self, source: &str, key: &str) -> Option<&str> {
        self.0
            .binary_search_by(|l| (l.source.as_str(), l.key.as_str()).cmp(&(source, key)))
            .ok()
            .map(|at| self.0[at].value.as_str())
    }

    /// Returns whether the set has the label `reserved:KEY`.
    #[must_use]
    pub fn has_reserved(&self, key: &str) -> bool {
        self.has("reserved", key)
    }
}

impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, label) in self.0.iter().enumerate() {
            if n > 0 {
                f.write_str(",")?;
            }
            write!(f, "{label}")?;
        }
        Ok(())
    }
}

impl Serialize for Labels {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(ToString::to_string))
    }
}

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        Ok(Self::new(texts.iter().map(|text| parse_label(text))))
    }
}

/// Returns a label of the `reserved` source.
#[must_use]
pub fn reserved(key: &str) -> Label {
    Label {
        source: "reserved".into(),
        key: key.into(),
        value: String::new(),
    }
}

/// Parses `source:key=value`. The default source is `k8s`, the default value is empty. `$key` means `reserved:key`.
///
/// The first colon before the first `=` ends the source; the value can contain colons.
#[must_use]
pub fn parse_label(text: &str) -> Label {
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    let (source, key) = match name.split_once(':') {
        // Only the first colon ends the source, as in `cidr:2001:db8::/32`. An empty source means `k8s`.
        Some((source, key)) if !source.is_empty() => (source, key),
        Some((_, key)) => ("k8s", key),
        None => match name.strip_prefix('$') {
            Some(key) => ("reserved", key),
            None => ("k8s", name),
        },
    };
    Label {
        source: source.into(),
        key: key.into(),
        value: value.into(),
    }
}

impl Selector {
    /// Returns whether the labels meet every requirement.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements
            .iter()
            .all(|requirement| requirement.holds(labels))
    }
}

impl Requirement {
    /// Returns whether the labels meet the requirement.
    ///
    /// If the source of the requirement is `Any`, the first label with the key decides (labels are sorted by source).
    #[must_use]
    pub fn holds(&self, labels: &Labels) -> bool {
        let value = match &self.source {
            LabelSource::Named(source) => labels.get(source, &self.key),
            LabelSource::Any => labels
                .iter()
                .find(|label| label.key == self.key)
                .map(|label| label.value.as_str()),
        };
        match (&self.test, value) {
            (Test::In(values), Some(value)) => values.iter().any(|v| v == value),
            (Test::In(_), None) | (Test::Exists, None) | (Test::DoesNotExist, Some(_)) => false,
            (Test::NotIn(values), Some(value)) => values.iter().all(|v| v != value),
            (Test::NotIn(_), None) | (Test::DoesNotExist, None) | (Test::Exists, Some(_)) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(texts: &[&str]) -> Labels {
        Labels::new(texts.iter().map(|text| parse_label(text)))
    }

    fn holds(source: LabelSource, key: &str, test: Test, on: &Labels) -> bool {
        Requirement {
            source,
            key: key.into(),
            test,
        }
        .holds(on)
    }

    #[test]
    fn labels_parse_with_and_without_source() {
        assert_eq!(parse_label("k8s:app=a").to_string(), "k8s:app=a");
        assert_eq!(parse_label("app=a").to_string(), "k8s:app=a");
        assert_eq!(parse_label("reserved:host").to_string(), "reserved:host");
        assert_eq!(parse_label("$host").to_string(), "reserved:host");
        assert_eq!(parse_label("k8s:a=b=c").value, "b=c");
        assert_eq!(parse_label("fqdn:*.example.com").key, "*.example.com");
    }

    #[test]
    fn requirements_match_by_operator_and_source() {
        let on = labels(&["k8s:app=a", "container:tier=x"]);
        let k8s = || LabelSource::Named("k8s".into());
        assert!(holds(LabelSource::Any, "tier", Test::In(vec!["x".into()]), &on));
        assert!(!holds(k8s(), "tier", Test::Exists, &on));
        assert!(holds(k8s(), "tier", Test::DoesNotExist, &on));
        assert!(holds(k8s(), "tier", Test::NotIn(vec!["x".into()]), &on));
        assert!(!holds(
            LabelSource::Any,
            "app",
            Test::NotIn(vec!["b".into(), "a".into()]),
            &on
        ));
        assert!(Selector::default().matches(&Labels::default()));
    }
}
