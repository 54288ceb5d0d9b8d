//! Configuration of the metrics in the syntax of Cilium's `hubble-metrics` option: `NAME:OPTION;OPTION=VALUE`.

use super::{
    context::{Context, Label},
    plugin::Plugin,
};
use crate::identifier::Identifier;

/// A metric with its options.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HubbleMetric {
    pub(super) plugin: Plugin,
    pub(super) context: Context,
    pub(super) flags: Flags,
}

/// Options of single metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Flags {
    /// `dns:query`: the name of the question is a label.
    pub(super) query: bool,
    /// `dns:ignoreAAAA`: questions for AAAA records are not counted.
    pub(super) ignore_aaaa: bool,
    /// `flows-to-world:any-drop`: drops for any reason are counted, not only those by policy.
    pub(super) any_drop: bool,
    /// `flows-to-world:port`: the destination port is a label.
    pub(super) port: bool,
    /// `flows-to-world:syn-only`: only the first packets of TCP connections are counted.
    pub(super) syn_only: bool,
}

/// Names that Cilium has and that a node without Kubernetes or without this data cannot fill, each with the reason.
const UNAVAILABLE: &[(&str, &str)] = &[
    ("sctp", "flow records do not have the chunk types of SCTP packets"),
    ("exemplars", "exemplars are not exported"),
    ("source_cluster", "a standalone node belongs to no cluster"),
    ("destination_cluster", "a standalone node belongs to no cluster"),
    ("source_service", "a standalone node knows no Kubernetes services"),
    (
        "destination_service",
        "a standalone node knows no Kubernetes services",
    ),
];

impl std::str::FromStr for HubbleMetric {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, options) = text.split_once(':').unwrap_or((text, ""));
        let name = name.trim();
        let plugin = Plugin::from_name(name).ok_or_else(|| {
            let known: Vec<&str> = Plugin::ALL.iter().map(|plugin| plugin.name()).collect();
            unavailable(name)
                .unwrap_or_else(|| format!("'{name}' is no metric: it is one of {}", known.join(", ")))
        })?;
        let mut metric = Self {
            plugin,
            context: Context::default(),
            flags: Flags::default(),
        };
        for option in options
            .split(';')
            .map(str::trim)
            .filter(|option| !option.is_empty())
        {
            let (key, value) = match option.split_once('=') {
                Some((key, value)) => (key.trim(), Some(value.trim())),
                None => (option, None),
            };
            metric.option(key, value)?;
        }
        Ok(metric)
    }
}

impl HubbleMetric {
    fn option(&mut self, key: &str, value: Option<&str>) -> Result<(), String> {
        let name = self.plugin.name();
        let flag = match (self.plugin, key.to_ascii_lowercase().as_str()) {
            (Plugin::Dns, "query") => Some(&mut self.flags.query),
            (Plugin::Dns, "ignoreaaaa") => Some(&mut self.flags.ignore_aaaa),
            (Plugin::FlowsToWorld, "any-drop") => Some(&mut self.flags.any_drop),
            (Plugin::FlowsToWorld, "port") => Some(&mut self.flags.port),
            (Plugin::FlowsToWorld, "syn-only") => Some(&mut self.flags.syn_only),
            _ => None,
        };
        if let Some(flag) = flag {
            *flag = match value {
                None | Some("" | "true") => true,
                Some("false") => false,
                Some(other) => return Err(format!("{name}: {key} cannot be '{other}': it is true or false")),
            };
            return Ok(());
        }
        let context = &mut self.context;
        let list = match key.to_ascii_lowercase().as_str() {
            "labelscontext" => {
                context.labels = labels(name, value.unwrap_or_default())?;
                return Ok(());
            }
            "sourcecontext" => &mut context.source.both,
            "sourceegresscontext" => &mut context.source.egress,
            "sourceingresscontext" => &mut context.source.ingress,
            "destinationcontext" => &mut context.destination.both,
            "destinationegresscontext" => &mut context.destination.egress,
            "destinationingresscontext" => &mut context.destination.ingress,
            "exemplars" if value == Some("false") => return Ok(()),
            _ => {
                return Err(unavailable(key).unwrap_or_else(|| {
                    format!(
                        "{name}: '{key}' is no option: options are sourceContext, destinationContext, \
                         source{{Egress,Ingress}}Context, destination{{Egress,Ingress}}Context, labelsContext{}",
                        self.plugin.flags()
                    )
                }));
            }
        };
        *list = Some(identifiers(name, key, value.unwrap_or_default())?);
        Ok(())
    }
}

/// Checks that metrics can be configured together.
///
/// # Errors
/// Returns the index of the metric that conflicts with an earlier one, and why.
pub fn check(metrics: &[HubbleMetric]) -> Result<(), (usize, String)> {
    for (index, metric) in metrics.iter().enumerate() {
        for earlier in metrics.iter().take(index) {
            let (this, other) = (metric.plugin, earlier.plugin);
            let http = [Plugin::Http, Plugin::HttpV2];
            if this == other || (http.contains(&this) && http.contains(&other)) {
                return Err((
                    index,
                    format!(
                        "'{}' counts the same metrics as '{}'; keep one of them",
                        this.name(),
                        other.name()
                    ),
                ));
            }
        }
    }
    Ok(())
}

fn unavailable(name: &str) -> Option<String> {
    let (name, reason) = UNAVAILABLE
        .iter()
        .find(|(known, _)| known.eq_ignore_ascii_case(name))?;
    Some(format!("'{name}' is not available: {reason}"))
}

fn identifiers(name: &str, key: &str, value: &str) -> Result<Vec<Identifier>, String> {
    let parse = |text: &str| {
        Identifier::from_name(text).ok_or_else(|| {
            let known: Vec<&str> = Identifier::ALL.iter().map(|(name, _)| *name).collect();
            format!(
                "{name}: {key} cannot be '{text}': it is a list of {}, separated by |",
                known.join(", ")
            )
        })
    };
    value.split('|').map(|text| parse(text.trim())).collect()
}

fn labels(name: &str, value: &str) -> Result<Vec<Label>, String> {
    let mut labels = Vec::new();
    for text in value.split(',').map(str::trim) {
        let label = Label::from_name(text).ok_or_else(|| {
            let known: Vec<&str> = Label::ALL.iter().map(|(name, _)| *name).collect();
            let why = unavailable(text);
            why.map_or_else(
                || {
                    format!(
                        "{name}: labelsContext cannot be '{text}': it is a list of {}, separated by commas",
                        known.join(", ")
                    )
                },
                |why| format!("{name}: {why}"),
            )
        })?;
        labels.push(label);
    }
    labels.sort_unstable();
    labels.dedup();
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<HubbleMetric, String> {
        text.parse()
    }

    #[test]
    fn options_are_read_as_cilium_reads_them() {
        let dns = parse("dns:query;ignoreAAAA").unwrap();
        assert!(dns.flags.query && dns.flags.ignore_aaaa);
        let http = parse(
            "httpV2:sourceContext=workload-name|reserved-identity;destinationContext=app;labelsContext=traffic_direction,source_ip",
        )
        .unwrap();
        assert_eq!(http.context.labels, [Label::SourceIp, Label::TrafficDirection]);
        assert_eq!(
            http.context.source.both,
            Some(vec![Identifier::WorkloadName, Identifier::ReservedIdentity])
        );
        assert_eq!(http.context.destination.both, Some(vec![Identifier::App]));
        for plugin in Plugin::ALL {
            parse(plugin.name()).unwrap();
            parse(&format!("{}:", plugin.name())).unwrap();
        }
    }

    #[test]
    fn errors_name_what_is_wrong_and_what_is_possible() {
        for (text, part) in [
            ("flows", "'flows' is no metric: it is one of dns, drop, flow,"),
            ("", "'' is no metric"),
            ("sctp", "'sctp' is not available: flow records do not have"),
            (
                "http:exemplars=true",
                "'exemplars' is not available: exemplars are not exported",
            ),
            (
                "flow:sourceContext=workload|foo",
                "sourceContext cannot be 'foo': it is a list of identity,",
            ),
            ("flow:sourceContext=", "sourceContext cannot be ''"),
            (
                "flow:labelsContext=source_pod,source_cluster",
                "'source_cluster' is not available: a standalone node",
            ),
            (
                "flow:labelsContext=pod",
                "labelsContext cannot be 'pod': it is a list of source_ip,",
            ),
            ("flow:query", "'query' is no option"),
            ("dns:query=maybe", "query cannot be 'maybe'"),
            ("drop:sourcecontext=ip;colour=red", "'colour' is no option"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn metrics_that_count_the_same_conflict() {
        let all = |texts: &[&str]| {
            let metrics: Vec<HubbleMetric> = texts.iter().map(|text| parse(text).unwrap()).collect();
            check(&metrics)
        };
        assert_eq!(all(&["dns", "drop", "http", "tcp"]), Ok(()));
        assert_eq!(all(&["dns", "http", "httpV2"]).unwrap_err().0, 2);
        assert_eq!(all(&["dns", "dns:query"]).unwrap_err().0, 1);
    }

    proptest::proptest! {
        #[test]
        fn no_text_of_a_configuration_panics(text in "[a-z2V:;=|,. -]{0,60}") {
            let _ = parse(&text);
            let _ = parse(&format!("dns:{text}"));
        }
    }
}
