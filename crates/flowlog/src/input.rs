//! Lines of flow files: the JSON of `palisade observe`, of Hubble's command line and of Cilium's flow exporter.

use serde::Deserialize;
use serde_json::Value;

use crate::{Flow, Timestamp};

/// Content of a line.
#[derive(Clone, PartialEq, Debug)]
pub enum Line {
    /// A flow.
    Flow {
        /// The flow, without the fields that Palisade does not have.
        flow: Box<Flow>,
        /// The flow with all fields.
        json: Value,
    },
    /// Number of flows that the writer of the file had lost, and where.
    Lost {
        /// Where, as the flow API names it.
        source: String,
        /// Number of flows.
        count: u64,
    },
    /// A message that is not a flow, such as the state of a node.
    Other,
}

/// Members of a line beside its flow.
#[derive(Deserialize)]
struct Response {
    flow: Option<Value>,
    lost_events: Option<Lost>,
    #[serde(default)]
    node_name: String,
    time: Option<Timestamp>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Lost {
    source: String,
    num_events_lost: Value,
}

/// Parses a line: an object with a member `flow`, or a flow itself.
///
/// # Errors
/// The error of the JSON parser.
pub fn line(text: &str) -> Result<Line, serde_json::Error> {
    let response: Response = serde_json::from_str(text)?;
    if let Some(lost) = response.lost_events {
        let count = match &lost.num_events_lost {
            Value::String(text) => text.parse().unwrap_or_default(),
            other => other.as_u64().unwrap_or_default(),
        };
        return Ok(Line::Lost {
            source: lost.source,
            count,
        });
    }
    let json = match response.flow {
        Some(flow) => flow,
        None => {
            let whole: Value = serde_json::from_str(text)?;
            if whole.get("verdict").is_none() && whole.get("event_type").is_none() {
                return Ok(Line::Other);
            }
            whole
        }
    };
    let mut flow = Flow::deserialize(&json)?;
    if flow.time == Timestamp::default() {
        flow.time = response.time.unwrap_or_default();
    }
    if flow.node_name.is_empty() {
        flow.node_name = response.node_name.into();
    }
    Ok(Line::Flow {
        flow: Box::new(flow),
        json,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{Layer4, TracePoint, Verdict};

    fn flow(text: &str) -> Flow {
        match line(text) {
            Ok(Line::Flow { flow, .. }) => *flow,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flows_of_other_versions_are_read() {
        let text = r#"{"flow":{"time":"2026-04-28T01:04:16.656Z","uuid":"x","emitter":{"name":"Hubble"},
            "verdict":"FORWARDED","ethernet":{"source":"","destination":"02:00:00:00:00:01"},
            "IP":{"source":"10.0.0.1","destination":"10.0.0.2","ipVersion":"IPv4","encrypted":true},
            "l4":{"TCP":{"source_port":1,"destination_port":2,"flags":{"SYN":true,"NS":true}}},
            "source":{"ID":7,"identity":4711,"cluster_name":"prod","workloads":[{"name":"web","kind":"Deployment"}]},
            "Type":"L3_L4","event_type":{"type":4,"sub_type":2},"trace_observation_point":"TO_HOST",
            "trace_reason":"ESTABLISHED","aggregate":{"ingress_flow_count":2},"is_reply":false,
            "policy_log":["x"],"drop_reason_desc":"SOMETHING_NEW","traffic_direction":"SIDEWAYS",
            "Summary":"TCP Flags: SYN"},"node_name":"prod/n1","time":"2026-04-28T01:04:16.656Z"}"#;
        let flow = flow(text);
        assert_eq!(flow.verdict, Verdict::Forwarded);
        assert_eq!(flow.trace_observation_point, TracePoint::ToHost);
        assert_eq!(&*flow.source.workloads[0].kind, "Deployment");
        assert_eq!(
            (&*flow.source.cluster_name, &*flow.node_name),
            ("prod", "prod/n1")
        );
        assert_eq!(flow.protocol(), 6);
        let Ok(Line::Flow { json, .. }) = line(text) else {
            panic!("no flow")
        };
        assert_eq!(json["trace_reason"], "ESTABLISHED");
    }

    #[test]
    fn fields_that_do_not_fit_are_left_out() {
        let flow = flow(
            r#"{"verdict":7,"IP":{"source":"","destination":""},"l4":{"VRRP":{"vrid":1}},
               "l7":{"type":"SAMPLE","latency_ns":5,"dns":{"query":"a.","ips":["x","::1"]}}}"#,
        );
        assert_eq!(flow.verdict, Verdict::Translated);
        assert!(flow.ip.is_none() && flow.l4.is_none());
        let l7 = flow.l7.expect("a message");
        assert_eq!((l7.latency_ns, l7.dns.expect("DNS").ips.len()), (5, 1));
        assert!(matches!(
            self::flow(r#"{"verdict":"DROPPED","l4":{"SCTP":{"source_port":9,"chunk_type":"INIT"}}}"#).l4,
            Some(Layer4::Sctp { source_port: 9, .. })
        ));
    }

    #[test]
    fn other_messages_are_told_apart() {
        assert_eq!(
            line(r#"{"lost_events":{"source":"HUBBLE_RING_BUFFER","num_events_lost":"12"},"time":"2026-04-28T01:04:16Z"}"#)
                .expect("a line"),
            Line::Lost {
                source: "HUBBLE_RING_BUFFER".into(),
                count: 12
            }
        );
        assert_eq!(
            line(r#"{"node_status":{"state_change":"NODE_CONNECTED"},"node_name":"relay"}"#).expect("a line"),
            Line::Other
        );
        for bad in [
            "",
            "{",
            "[]",
            "7",
            r#"{"flow":7}"#,
            r#"{"flow":{"time":"never"}}"#,
        ] {
            assert!(line(bad).is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_line_is_read_or_refused(text in "\\PC{0,60}") {
            let _ = line(&text);
        }
    }
}
