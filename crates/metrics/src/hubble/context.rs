//! Labels that describe the ends of a flow: `sourceContext`, `destinationContext` and `labelsContext` of Cilium's Hubble.

use std::borrow::Cow;

use palisade_flowlog::flow::{Endpoint, Flow, TrafficDirection};

use super::{sample::Sample, values::Values};
use crate::identifier::Identifier;

/// A label of `labelsContext`. The order is that of the labels of a metric.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Label {
    SourceIp,
    SourcePod,
    SourceNamespace,
    SourceWorkload,
    SourceWorkloadKind,
    SourceApp,
    DestinationIp,
    DestinationPod,
    DestinationNamespace,
    DestinationWorkload,
    DestinationWorkloadKind,
    DestinationApp,
    TrafficDirection,
}

impl Label {
    pub(super) const ALL: [(&str, Self); 13] = [
        ("source_ip", Self::SourceIp),
        ("source_pod", Self::SourcePod),
        ("source_namespace", Self::SourceNamespace),
        ("source_workload", Self::SourceWorkload),
        ("source_workload_kind", Self::SourceWorkloadKind),
        ("source_app", Self::SourceApp),
        ("destination_ip", Self::DestinationIp),
        ("destination_pod", Self::DestinationPod),
        ("destination_namespace", Self::DestinationNamespace),
        ("destination_workload", Self::DestinationWorkload),
        ("destination_workload_kind", Self::DestinationWorkloadKind),
        ("destination_app", Self::DestinationApp),
        ("traffic_direction", Self::TrafficDirection),
    ];

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, it)| *it)
    }

    fn name(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(_, it)| *it == self)
            .map_or("", |(name, _)| name)
    }

    /// Returns whether the label describes the source, and what it shows; `None` if its values are from a fixed list.
    const fn shows(self) -> (bool, Option<Identifier>) {
        match self {
            Self::SourceIp => (true, Some(Identifier::Ip)),
            Self::SourcePod => (true, Some(Identifier::PodName)),
            Self::SourceNamespace => (true, Some(Identifier::Namespace)),
            Self::SourceWorkload => (true, Some(Identifier::WorkloadName)),
            Self::SourceWorkloadKind => (true, None),
            Self::SourceApp => (true, Some(Identifier::App)),
            Self::DestinationIp => (false, Some(Identifier::Ip)),
            Self::DestinationPod => (false, Some(Identifier::PodName)),
            Self::DestinationNamespace => (false, Some(Identifier::Namespace)),
            Self::DestinationWorkload => (false, Some(Identifier::WorkloadName)),
            Self::DestinationWorkloadKind => (false, None),
            Self::DestinationApp => (false, Some(Identifier::App)),
            Self::TrafficDirection => (true, None),
        }
    }
}

/// The identifiers of one end, in the order of preference: the first that is not empty is the value of the label.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Side {
    pub(super) both: Option<Vec<Identifier>>,
    /// Instead of `both`, for egress flows.
    pub(super) egress: Option<Vec<Identifier>>,
    /// Instead of `both`, for ingress flows.
    pub(super) ingress: Option<Vec<Identifier>>,
}

impl Side {
    fn all(&self) -> impl Iterator<Item = Identifier> {
        [&self.both, &self.egress, &self.ingress]
            .into_iter()
            .flatten()
            .flatten()
            .copied()
    }

    fn is_used(&self) -> bool {
        self.all().next().is_some()
    }

    fn of(&self, direction: TrafficDirection) -> &[Identifier] {
        let special = match direction {
            TrafficDirection::Egress => &self.egress,
            TrafficDirection::Ingress => &self.ingress,
            TrafficDirection::Unknown => &None,
        };
        special.as_ref().or(self.both.as_ref()).map_or(&[], Vec::as_slice)
    }
}

/// The context labels of a metric.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Context {
    pub(super) labels: Vec<Label>,
    pub(super) source: Side,
    pub(super) destination: Side,
}

impl Context {
    /// Returns the names of the labels.
    pub(super) fn names(&self) -> impl Iterator<Item = &'static str> {
        let labels = self.labels.iter().map(|label| label.name());
        let source = self.source.is_used().then_some("source");
        let destination = self.destination.is_used().then_some("destination");
        labels.chain(source).chain(destination)
    }

    /// Returns what the labels can show.
    pub(super) fn identifiers(&self) -> impl Iterator<Item = Identifier> {
        let labels = self.labels.iter().filter_map(|label| label.shows().1);
        labels.chain(self.source.all()).chain(self.destination.all())
    }

    /// Returns whether the labels need names that only a flow record has, not a record of an inspector.
    pub(super) fn needs_names(&self) -> bool {
        let of_address = |label: &Label| {
            matches!(
                label,
                Label::SourceIp | Label::DestinationIp | Label::TrafficDirection
            )
        };
        !self.labels.iter().all(of_address)
            || self
                .source
                .all()
                .chain(self.destination.all())
                .any(|identifier| identifier != Identifier::Ip)
    }

    /// Appends the values of the labels. `inverted`: the destination is the source, for metrics that describe the
    /// request and are counted at the response.
    pub(super) fn values<'a>(&self, sample: &Sample<'a>, inverted: bool, values: &mut Values<'a>) {
        for label in &self.labels {
            let (source, identifier) = label.shows();
            let end = End {
                sample,
                source: source != inverted,
            };
            let value = match (label, identifier) {
                (_, Some(identifier)) => end.value(identifier),
                (Label::TrafficDirection, None) => match sample.direction {
                    TrafficDirection::Unknown => "unknown",
                    TrafficDirection::Ingress => "ingress",
                    TrafficDirection::Egress => "egress",
                }
                .into(),
                (_, None) => end.workload_kind(),
            };
            values.push(identifier, value);
        }
        // Cilium determines both values before it swaps them, so each end has the identifiers of its own context.
        let value = |side: &Side, source: bool| {
            let end = End { sample, source };
            let identifiers = side.of(sample.direction).iter().copied();
            let mut values = identifiers.map(|identifier| (Some(identifier), end.value(identifier)));
            values.find(|(_, value)| !value.is_empty()).unwrap_or_default()
        };
        let source = self.source.is_used().then(|| value(&self.source, true));
        let destination = self
            .destination
            .is_used()
            .then(|| value(&self.destination, false));
        let (source, destination) = match (source, destination) {
            (Some(source), Some(destination)) if inverted => (Some(destination), Some(source)),
            // With one label only, the end that the label names is the other one of this flow.
            (Some(_), None) if inverted => (Some(value(&self.source, false)), None),
            (None, Some(_)) if inverted => (None, Some(value(&self.destination, true))),
            as_they_are => as_they_are,
        };
        for (identifier, value) in source.into_iter().chain(destination) {
            values.push(identifier, value);
        }
    }
}

/// One end of a flow.
struct End<'s, 'a> {
    sample: &'s Sample<'a>,
    source: bool,
}

impl<'a> End<'_, 'a> {
    fn workload_kind(&self) -> Cow<'a, str> {
        let end = self.sample.flow.map(|flow| ends(flow, self.source).0);
        let workload = end.and_then(|end| end.workloads.first());
        workload.map_or_else(Cow::default, |workload| Cow::Borrowed(&*workload.kind))
    }

    fn value(&self, identifier: Identifier) -> Cow<'a, str> {
        if identifier == Identifier::Ip {
            let address = self
                .sample
                .ip
                .map(|ip| if self.source { ip.source } else { ip.destination });
            return address
                .map(|address| address.to_string())
                .unwrap_or_default()
                .into();
        }
        let Some(flow) = self.sample.flow else {
            return Cow::default();
        };
        let (end, names) = ends(flow, self.source);
        if identifier == Identifier::Dns {
            joined(names)
        } else {
            value_of(end, identifier)
        }
    }
}

/// Returns what an identifier shows of an end. Addresses and their names are not part of an end: empty for them.
pub(super) fn value_of(end: &Endpoint, identifier: Identifier) -> Cow<'_, str> {
    match identifier {
        Identifier::Identity => joined(&end.labels),
        Identifier::Namespace => Cow::Borrowed(&end.namespace),
        Identifier::Pod => qualified(&end.namespace, &end.pod_name),
        Identifier::PodShort => qualified(&end.namespace, short(&end.pod_name)),
        Identifier::PodName => Cow::Borrowed(&end.pod_name),
        Identifier::ReservedIdentity => Cow::Borrowed(reserved(end)),
        Identifier::Workload => qualified(&end.namespace, workload(end)),
        Identifier::WorkloadName => Cow::Borrowed(workload(end)),
        Identifier::App => Cow::Borrowed(app(end)),
        Identifier::Ip | Identifier::Dns => Cow::default(),
    }
}

fn ends(flow: &Flow, source: bool) -> (&Endpoint, &[std::sync::Arc<str>]) {
    if source {
        (&flow.source, &flow.source_names)
    } else {
        (&flow.destination, &flow.destination_names)
    }
}

fn joined(texts: &[std::sync::Arc<str>]) -> Cow<'_, str> {
    match texts {
        [] => Cow::default(),
        [one] => Cow::Borrowed(one),
        // The value of a label is truncated, so a few texts suffice, however many names an address has.
        many => many
            .iter()
            .take(16)
            .map(|text| &**text)
            .collect::<Vec<_>>()
            .join(",")
            .into(),
    }
}

fn qualified<'a>(namespace: &str, name: &'a str) -> Cow<'a, str> {
    if namespace.is_empty() || name.is_empty() {
        Cow::Borrowed(name)
    } else {
        format!("{namespace}/{name}").into()
    }
}

/// Returns the name of a pod without the one or two last parts that a replica set and its pod append.
fn short(name: &str) -> &str {
    let is_part = |part: &str| {
        !part.is_empty()
            && part
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    };
    let cut = |name: &'_ str| {
        let (rest, part) = name.rsplit_once('-')?;
        (is_part(part) && !rest.is_empty()).then_some(rest.len())
    };
    let Some(once) = cut(name) else { return name };
    let rest = name.get(..once).unwrap_or(name);
    let twice = cut(rest).unwrap_or(once);
    name.get(..twice).unwrap_or(name)
}

/// Returns the first reserved label; of several, `reserved:kube-apiserver` first.
fn reserved(end: &Endpoint) -> &str {
    const API_SERVER: &str = "reserved:kube-apiserver";
    let mut labels = end.labels.iter().map(|label| &**label);
    if labels.clone().any(|label| label == API_SERVER) {
        return API_SERVER;
    }
    labels
        .find(|label| label.starts_with("reserved:"))
        .unwrap_or_default()
}

fn app(end: &Endpoint) -> &str {
    const KEYS: [&str; 3] = ["k8s:app.kubernetes.io/name=", "k8s:k8s-app=", "k8s:app="];
    let value = |label: &'_ std::sync::Arc<str>| {
        let at = KEYS.iter().find(|key| label.starts_with(**key))?.len();
        (label.len() > at).then_some(at)
    };
    end.labels
        .iter()
        .find_map(|label| label.get(value(label)?..))
        .unwrap_or_default()
}

fn workload(end: &Endpoint) -> &str {
    end.workloads.first().map_or("", |workload| &workload.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_that_a_replica_set_appends_are_removed() {
        for (name, wanted) in [
            ("web-5d4f8c7b9-x2x4z", "web"),
            ("web-0", "web"),
            ("web", "web"),
            ("my-web-5d4f8c7b9-x2x4z", "my-web"),
            ("web-Aa", "web-Aa"),
            ("-a", "-a"),
            ("web-", "web-"),
            ("", ""),
        ] {
            assert_eq!(short(name), wanted, "{name}");
        }
    }
}
