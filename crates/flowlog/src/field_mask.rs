//! Selection of the fields of a flow by their paths in the public flow definition, as `google.protobuf.FieldMask`:
//! `source.pod_name`, `IP`, `l4.TCP.destination_port`. Works on the JSON form of a flow, whose keys are the names of
//! the definition.

use std::collections::BTreeMap;

use serde_json::Value;

/// A message of the definition: names of its fields, each with the fields below it. Repeated fields and scalar values
/// have none, because a mask ends at a repeated field.
type Schema = &'static [(&'static str, &'static [&'static str])];

/// Fields of a flow. Paths with more than two parts are in [`DEEP`].
const FIELDS: Schema = &[
    ("time", &[]),
    ("uuid", &[]),
    ("emitter", &["name", "version"]),
    ("verdict", &[]),
    ("drop_reason", &[]),
    ("auth_type", &[]),
    ("ethernet", &["source", "destination"]),
    (
        "IP",
        &["source", "source_xlated", "destination", "ipVersion", "encrypted"],
    ),
    ("tunnel", &["protocol", "IP", "l4", "vni"]),
    ("l4", &["TCP", "UDP", "ICMPv4", "ICMPv6", "SCTP", "VRRP", "IGMP"]),
    ("source", ENDPOINT),
    ("destination", ENDPOINT),
    ("Type", &[]),
    ("node_name", &[]),
    ("node_labels", &[]),
    ("source_names", &[]),
    ("destination_names", &[]),
    ("l7", &["type", "latency_ns", "dns", "http", "kafka"]),
    ("reply", &[]),
    ("event_type", &["type", "sub_type"]),
    ("source_service", &["name", "namespace"]),
    ("destination_service", &["name", "namespace"]),
    ("traffic_direction", &[]),
    ("policy_match_type", &[]),
    ("trace_observation_point", &[]),
    ("trace_reason", &[]),
    ("file", &["name", "line"]),
    ("ip_trace_id", &["trace_id", "ip_option_type"]),
    ("drop_reason_desc", &[]),
    ("is_reply", &[]),
    ("debug_capture_point", &[]),
    ("interface", &["index", "name"]),
    ("proxy_port", &[]),
    ("trace_context", &["parent"]),
    ("sock_xlate_point", &[]),
    ("socket_cookie", &[]),
    ("cgroup_id", &[]),
    ("Summary", &[]),
    ("extensions", &[]),
    ("egress_allowed_by", &[]),
    ("ingress_allowed_by", &[]),
    ("egress_denied_by", &[]),
    ("ingress_denied_by", &[]),
    ("policy_log", &[]),
    ("aggregate", &[]),
    // Fields that the public definition does not have.
    ("palisade", &[]),
];

/// Fields of an end of a flow.
const ENDPOINT: &[&str] = &[
    "ID",
    "identity",
    "cluster_name",
    "namespace",
    "labels",
    "pod_name",
    "workloads",
];

const PORTS: &[&str] = &["source_port", "destination_port"];

/// Fields below the second part of a path.
const DEEP: Schema = &[
    ("l4.TCP", &["source_port", "destination_port", "flags"]),
    ("l4.UDP", PORTS),
    ("l4.SCTP", PORTS),
    ("l4.ICMPv4", &["type", "code"]),
    ("l4.ICMPv6", &["type", "code"]),
    (
        "l7.dns",
        &[
            "query",
            "ips",
            "ttl",
            "cnames",
            "observation_source",
            "rcode",
            "qtypes",
            "rrtypes",
        ],
    ),
    ("l7.http", &["code", "method", "url", "protocol", "headers"]),
    (
        "l7.kafka",
        &["error_code", "api_version", "api_key", "correlation_id", "topic"],
    ),
];

/// A field, and the fields below it that paths select.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Node {
    /// Whether a path ends here, so that everything below is selected.
    is_whole: bool,
    below: BTreeMap<String, Node>,
}

/// Fields of a flow to keep.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldMask(Node);

impl FieldMask {
    /// Adds a path to the mask.
    ///
    /// # Errors
    /// A text if a flow has no such field.
    pub fn add(&mut self, path: &str) -> Result<(), String> {
        check(path)?;
        let mut node = &mut self.0;
        for part in path.split('.') {
            if node.is_whole {
                return Ok(());
            }
            node = node.below.entry(part.to_owned()).or_default();
        }
        node.is_whole = true;
        node.below.clear();
        Ok(())
    }

    /// Adds paths with commas between.
    ///
    /// # Errors
    /// A text if a flow has no such field.
    pub fn add_list(&mut self, paths: &str) -> Result<(), String> {
        paths.split(',').try_for_each(|path| self.add(path.trim()))
    }

    /// Returns whether the mask selects no field, which stands for all fields.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.below.is_empty()
    }

    /// Removes the fields that the mask does not select from the JSON form of a flow.
    pub fn apply(&self, flow: &mut Value) {
        if !self.is_empty() {
            keep(&self.0, flow);
        }
    }
}

fn keep(node: &Node, value: &mut Value) {
    let Value::Object(fields) = value else {
        return;
    };
    fields.retain(|name, value| {
        let Some(below) = node.below.get(name) else {
            return false;
        };
        if !below.is_whole {
            keep(below, value);
        }
        true
    });
}

fn check(path: &str) -> Result<(), String> {
    let unknown = |known: &mut dyn Iterator<Item = &'static str>| {
        Err(format!(
            "a flow has no field '{path}'; known here: {}",
            known.collect::<Vec<_>>().join(", ")
        ))
    };
    let parts: Vec<&str> = path.split('.').collect();
    let Some((_, below)) = FIELDS.iter().find(|(name, _)| *name == parts[0]) else {
        return unknown(&mut FIELDS.iter().map(|(name, _)| *name));
    };
    let Some(second) = parts.get(1) else {
        return Ok(());
    };
    if !below.contains(second) {
        return if below.is_empty() {
            Err(format!("'{path}': {} has no fields below it", parts[0]))
        } else {
            unknown(&mut below.iter().copied())
        };
    }
    let Some(third) = parts.get(2) else {
        return Ok(());
    };
    let upper = format!("{}.{second}", parts[0]);
    match DEEP.iter().find(|(name, _)| *name == upper) {
        Some((_, below)) if !below.contains(third) => unknown(&mut below.iter().copied()),
        Some(_) if parts.len() == 3 => Ok(()),
        _ => Err(format!("'{path}': a mask does not reach below {upper}")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn mask(paths: &[&str]) -> FieldMask {
        let mut mask = FieldMask::default();
        paths.iter().for_each(|path| mask.add(path).unwrap());
        mask
    }

    fn masked(paths: &[&str]) -> Value {
        let mut flow = json!({
            "time": "t",
            "verdict": "DROPPED",
            "IP": {"source": "10.0.0.1", "destination": "10.0.0.2"},
            "l4": {"TCP": {"source_port": 1, "destination_port": 2}},
            "source": {"pod_name": "a", "labels": ["x"]},
        });
        mask(paths).apply(&mut flow);
        flow
    }

    #[test]
    fn only_selected_fields_are_kept() {
        assert_eq!(
            masked(&["verdict", "l4.TCP.destination_port", "source.pod_name"]),
            json!({
                "verdict": "DROPPED",
                "l4": {"TCP": {"destination_port": 2}},
                "source": {"pod_name": "a"},
            })
        );
        assert_eq!(masked(&["uuid"]), json!({}));
        assert_eq!(masked(&[])["time"], "t");
    }

    #[test]
    fn of_two_paths_the_shorter_one_selects_more() {
        let whole = json!({"IP": {"source": "10.0.0.1", "destination": "10.0.0.2"}});
        for paths in [["IP", "IP.source"], ["IP.source", "IP"]] {
            assert_eq!(masked(&paths), whole);
        }
        assert_eq!(masked(&["IP.source", "IP.destination"]), whole);
        assert_eq!(
            masked(&["l4.TCP.source_port", "l4.TCP"])["l4"]["TCP"]["destination_port"],
            2
        );
    }

    #[test]
    fn unknown_fields_are_errors_that_name_the_known_ones() {
        for (path, text) in [
            ("", "a flow has no field ''; known here: time, uuid"),
            ("pod", "a flow has no field 'pod'"),
            ("source.name", "known here: ID, identity"),
            ("verdict.x", "verdict has no fields below it"),
            ("l4.TCP.port", "known here: source_port, destination_port, flags"),
            ("l4.TCP.flags.SYN", "a mask does not reach below l4.TCP"),
            ("source.labels.x", "a mask does not reach below source.labels"),
        ] {
            let problem = FieldMask::default().add(path).unwrap_err();
            assert!(problem.contains(text), "{path}: {problem}");
        }
    }
}
