//! Recorded flows as evidence for policies: those of Palisade's ring, exported files, and the JSON of Hubble.
//!
//! JSON is read more tolerantly than by `palisade-flowlog`, because a newer Cilium has enumeration values and members
//! that this crate does not need. Control characters in texts become U+FFFD: the texts are printed.

use std::{borrow::Cow, net::IpAddr};

use palisade_abi::{Direction, Reason, protocol};
use palisade_flowlog::Flow;
use palisade_model::{
    labels::{Labels, parse_label},
    request::{HttpRequest, KafkaRequest, Request},
};
use palisade_protocols::kafka::api_key;
use serde::Deserialize;

/// Largest number of labels, names or topics of one flow that are kept.
const MAX_LIST: usize = 256;

/// A recorded flow.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recorded {
    /// UUID; empty if the record has none.
    pub uuid: String,
    /// Time, RFC 3339.
    pub time: String,
    /// What happened to the packet or request.
    pub verdict: Happened,
    /// Number of the drop reason; 0 if the record has none.
    pub drop_reason: u32,
    /// Source of the packet.
    pub source: RecordedEnd,
    /// Destination of the packet.
    pub destination: RecordedEnd,
    /// Names by which the source has learned the destination.
    pub destination_names: Vec<String>,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port or ICMP type.
    pub port: u16,
    /// Direction of the connection at the endpoint whose policy decided; `None` if unknown.
    pub direction: Option<Direction>,
    /// Whether the record is of a reply, a response or an answer.
    pub is_reply: bool,
    /// Request, if the record is of an application message.
    pub request: Request,
    /// Why the record cannot be evaluated; `None` if it can be.
    pub unusable: Option<&'static str>,
    /// Rule that decided, as recorded, with `FILE:LINE`; empty if the record has none.
    pub decided_by: String,
}

/// What happened to a recorded packet or request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Happened {
    /// Unknown, or an error.
    #[default]
    Unknown,
    /// It passed.
    Forwarded,
    /// It passed, as a trace reports: the record does not show whether because of audit mode, or by an inspector.
    Passed,
    /// It passed only because of audit mode.
    Audited,
    /// It was passed to an inspector.
    Inspected,
    /// It was dropped.
    Dropped,
}

/// One end of a recorded flow.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RecordedEnd {
    /// Number of the endpoint on its node; 0 for none.
    pub id: u32,
    /// Namespace.
    pub namespace: String,
    /// Name of the endpoint or peer.
    pub name: String,
    /// Labels of the identity.
    pub labels: Labels,
    /// Address.
    pub address: Option<IpAddr>,
    /// systemd unit of the node's socket; empty if it is not known.
    pub unit: String,
}

impl RecordedEnd {
    /// Returns `namespace/name`, the name, or the address.
    #[must_use]
    pub fn text(&self) -> String {
        match (self.namespace.as_str(), self.name.as_str(), self.address) {
            (_, "", Some(address)) => address.to_string(),
            (_, "", None) => self.labels.to_string(),
            ("", name, _) => name.to_owned(),
            (namespace, name, _) => format!("{namespace}/{name}"),
        }
    }
}

/// The members of a flow that are read, in the JSON form of `flow.proto`.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Json<'a> {
    uuid: Text<'a>,
    time: Text<'a>,
    verdict: Text<'a>,
    drop_reason: Option<serde_json::Value>,
    #[serde(rename = "IP")]
    ip: Option<JsonIp<'a>>,
    l4: Option<JsonL4>,
    source: JsonEnd<'a>,
    destination: JsonEnd<'a>,
    destination_names: Vec<Text<'a>>,
    l7: Option<JsonL7<'a>>,
    traffic_direction: Text<'a>,
    is_reply: Option<bool>,
    drop_reason_desc: Option<serde_json::Value>,
    event_type: JsonEvent,
    palisade: JsonExtra<'a>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct JsonEvent {
    #[serde(rename = "type")]
    kind: i64,
}

type Text<'a> = Cow<'a, str>;

#[derive(Deserialize, Default)]
#[serde(default)]
struct JsonIp<'a> {
    source: Text<'a>,
    destination: Text<'a>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct JsonL4 {
    #[serde(rename = "TCP")]
    tcp: Option<JsonPorts>,
    #[serde(rename = "UDP")]
    udp: Option<JsonPorts>,
    #[serde(rename = "SCTP")]
    sctp: Option<JsonPorts>,
    #[serde(rename = "ICMPv4")]
    icmpv4: Option<JsonIcmp>,
    #[serde(rename = "ICMPv6")]
    icmpv6: Option<JsonIcmp>,
}

#[derive(Deserialize, Default, Clone, Copy)]
#[serde(default)]
struct JsonPorts {
    destination_port: u16,
}

#[derive(Deserialize, Default, Clone, Copy)]
#[serde(default)]
struct JsonIcmp {
    #[serde(rename = "type")]
    kind: u16,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct JsonEnd<'a> {
    #[serde(rename = "ID")]
    id: u32,
    namespace: Text<'a>,
    labels: Vec<Text<'a>>,
    pod_name: Text<'a>,
    workloads: Vec<JsonWorkload<'a>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct JsonWorkload<'a> {
    name: Text<'a>,
    kind: Text<'a>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct JsonL7<'a> {
    #[serde(rename = "type")]
    kind: Text<'a>,
    dns: Option<JsonDns<'a>>,
    http: Option<JsonHttp<'a>>,
    kafka: Option<JsonKafka<'a>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct JsonDns<'a> {
    query: Text<'a>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct JsonHttp<'a> {
    method: Text<'a>,
    url: Text<'a>,
    protocol: Text<'a>,
    headers: Vec<JsonHeader<'a>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct JsonHeader<'a> {
    key: Text<'a>,
    value: Text<'a>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct JsonKafka<'a> {
    api_version: i16,
    api_key: Text<'a>,
    topic: Text<'a>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct JsonExtra<'a> {
    protocol: u8,
    reason: Text<'a>,
    fragment: bool,
    related: bool,
    tls: Option<JsonTls<'a>>,
    client_id: Text<'a>,
    rule: Option<JsonRule<'a>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct JsonTls<'a> {
    server_name: Text<'a>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct JsonRule<'a> {
    text: Text<'a>,
    location: Text<'a>,
}

/// A line of Hubble: a flow inside the message of the API.
#[derive(Deserialize)]
struct Wrapped<'a> {
    #[serde(borrow)]
    flow: Option<Json<'a>>,
}

impl Recorded {
    /// Parses one line of JSON: a flow, or the API's message with a flow in it. Returns `None` if the line is another
    /// message of the API, such as lost events.
    ///
    /// # Errors
    /// The text of the error, with the column.
    pub fn parse(line: &str) -> Result<Option<Self>, String> {
        let text = |error: serde_json::Error| format!("column {}: {error}", error.column());
        let flow: Json<'_> = serde_json::from_str(line).map_err(text)?;
        if !flow.verdict.is_empty() {
            return Ok(Some(flow.into()));
        }
        let wrapped: Wrapped<'_> = serde_json::from_str(line).map_err(text)?;
        Ok(wrapped.flow.map(Self::from))
    }

    /// Returns the evidence of a flow of Palisade's own ring.
    ///
    /// # Errors
    /// The text of the error if the flow cannot be represented.
    pub fn of_flow(flow: &Flow) -> Result<Self, String> {
        let line = serde_json::to_string(flow).map_err(|error| error.to_string())?;
        Self::parse(&line)?.ok_or_else(|| "the record has no verdict".to_owned())
    }

    /// Returns the end whose policy decided, and the other one; `None` if the direction is unknown.
    #[must_use]
    pub fn ends(&self) -> Option<(Direction, &RecordedEnd, &RecordedEnd)> {
        Some(match self.direction? {
            Direction::Egress => (Direction::Egress, &self.source, &self.destination),
            Direction::Ingress => (Direction::Ingress, &self.destination, &self.source),
        })
    }
}

impl From<Json<'_>> for Recorded {
    fn from(json: Json<'_>) -> Self {
        const TRACE: i64 = 4;
        let verdict = match &*json.verdict {
            "FORWARDED" if json.event_type.kind == TRACE => Happened::Passed,
            "FORWARDED" | "TRACED" | "TRANSLATED" => Happened::Forwarded,
            "DROPPED" => Happened::Dropped,
            "AUDIT" => Happened::Audited,
            "REDIRECTED" => Happened::Inspected,
            _ => Happened::Unknown,
        };
        let (protocol, port) = transport(&json);
        let (source_address, destination_address) = match &json.ip {
            Some(ip) => (ip.source.parse().ok(), ip.destination.parse().ok()),
            None => (None, None),
        };
        let kind = json.l7.as_ref().map_or("", |l7| &*l7.kind);
        let is_reply = json.is_reply == Some(true) || matches!(kind, "RESPONSE" | "SAMPLE");
        let drop_reason = match &json.drop_reason {
            Some(serde_json::Value::Number(number)) => number.as_u64().unwrap_or_default() as u32,
            _ => 0,
        };
        let direction = match &*json.traffic_direction {
            "INGRESS" => Some(Direction::Ingress),
            "EGRESS" => Some(Direction::Egress),
            _ => None,
        };
        let is_request = kind == "REQUEST";
        let by_policy = drop_reason == 0 && json.drop_reason_desc.is_none()
            || [
                Reason::PolicyDenied,
                Reason::PolicyDeniedByDenylist,
                Reason::AuthRequired,
                Reason::AppDenied,
            ]
            .iter()
            .any(|reason| *reason as u32 == drop_reason)
            || matches!(
                &json.drop_reason_desc,
                Some(serde_json::Value::String(name)) if matches!(name.as_str(), "POLICY_DENIED" | "POLICY_DENY" | "AUTH_REQUIRED" | "DROP_REASON_UNKNOWN")
            );
        let unusable = if is_reply {
            Some("replies, which conntrack passes")
        } else if verdict == Happened::Unknown {
            Some("records without a verdict")
        } else if direction.is_none() {
            Some("records without a traffic direction")
        } else if json.ip.is_none() {
            Some("frames that are not IP")
        } else if protocol == 0 {
            Some("records without a transport protocol")
        } else if matches!(&*json.palisade.reason, "Forwarded" | "Link control") {
            Some("packets of the link or of other nodes, about which no policy decides")
        } else if json.palisade.fragment || json.palisade.related {
            Some("fragments and ICMP errors, which follow their flow")
        } else if verdict == Happened::Dropped && !by_policy {
            Some("drops for reasons other than policies")
        } else {
            None
        };
        Self {
            uuid: clean(&json.uuid),
            time: clean(&json.time),
            verdict,
            drop_reason,
            destination_names: json
                .destination_names
                .iter()
                .take(MAX_LIST)
                .map(|name| clean(name))
                .collect(),
            request: if is_request {
                request(&json)
            } else {
                Request::default()
            },
            decided_by: json.palisade.rule.as_ref().map(decided_by).unwrap_or_default(),
            source: end(&json.source, source_address),
            destination: end(&json.destination, destination_address),
            protocol,
            port,
            direction,
            is_reply,
            unusable,
        }
    }
}

fn decided_by(rule: &JsonRule<'_>) -> String {
    match (&*rule.text, &*rule.location) {
        (text, "") => clean(text),
        (text, location) => format!("{} ({})", clean(text), clean(location)),
    }
}

fn transport(json: &Json<'_>) -> (u8, u16) {
    match &json.l4 {
        Some(JsonL4 { tcp: Some(ports), .. }) => (protocol::TCP, ports.destination_port),
        Some(JsonL4 { udp: Some(ports), .. }) => (protocol::UDP, ports.destination_port),
        Some(JsonL4 {
            sctp: Some(ports), ..
        }) => (protocol::SCTP, ports.destination_port),
        Some(JsonL4 {
            icmpv4: Some(icmp), ..
        }) => (protocol::ICMP, icmp.kind),
        Some(JsonL4 {
            icmpv6: Some(icmp), ..
        }) => (protocol::ICMPV6, icmp.kind),
        _ => (json.palisade.protocol, 0),
    }
}

fn end(json: &JsonEnd<'_>, address: Option<IpAddr>) -> RecordedEnd {
    RecordedEnd {
        id: json.id,
        namespace: clean(&json.namespace),
        name: clean(&json.pod_name),
        labels: Labels::new(
            json.labels
                .iter()
                .take(MAX_LIST)
                .map(|text| parse_label(&clean(text))),
        ),
        address,
        unit: json
            .workloads
            .iter()
            .find(|workload| workload.kind == "SystemdUnit")
            .map(|workload| clean(&workload.name))
            .unwrap_or_default(),
    }
}

fn request(json: &Json<'_>) -> Request {
    let mut request = Request::default();
    if let Some(l7) = &json.l7 {
        if let Some(http) = &l7.http {
            let (scheme, host, path) = split_url(&http.url);
            if scheme == "https" {
                request.tls = Some(host.rsplit_once(':').map_or(host, |(name, _)| name).to_owned());
            }
            request.http = Some(HttpRequest {
                method: clean(&http.method),
                path: clean(path),
                host: clean(host),
                headers: http
                    .headers
                    .iter()
                    .take(MAX_LIST)
                    .map(|header| (clean(&header.key), clean(&header.value)))
                    .filter(|(name, _)| !name.starts_with(':') && !name.eq_ignore_ascii_case("host"))
                    .collect(),
                is_http10: http.protocol == "HTTP/1.0",
            });
        } else if let Some(dns) = &l7.dns {
            request.dns = Some(clean(dns.query.strip_suffix('.').unwrap_or(&dns.query)));
        } else if let Some(kafka) = &l7.kafka {
            let key = kafka.api_key.parse().ok().or_else(|| api_key(&kafka.api_key));
            request.kafka = Some(KafkaRequest {
                api_key: key.unwrap_or(-1),
                api_version: kafka.api_version,
                client_id: Some(clean(&json.palisade.client_id)).filter(|id| !id.is_empty()),
                topics: Some(clean(&kafka.topic))
                    .filter(|topic| !topic.is_empty())
                    .into_iter()
                    .collect(),
            });
        }
    }
    if let Some(tls) = &json.palisade.tls {
        request.tls = Some(clean(&tls.server_name));
    }
    request
}

/// Returns scheme, host and path with query of a recorded URL.
fn split_url(url: &str) -> (&str, &str, &str) {
    let Some((scheme, rest)) = url.split_once("://") else {
        return ("", "", url);
    };
    let (host, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    (scheme, host, if path.is_empty() { "/" } else { path })
}

/// Returns a text without control characters.
fn clean(text: &str) -> String {
    text.chars()
        .map(|character| {
            if character.is_control() {
                char::REPLACEMENT_CHARACTER
            } else {
                character
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_of_hubble_and_of_palisade_are_read() {
        let hubble = r#"{"flow":{"time":"2026-01-01T00:00:00Z","uuid":"u1","verdict":"DROPPED","drop_reason":133,
            "IP":{"source":"10.0.0.1","destination":"10.0.0.2","ipVersion":"IPv4","encrypted":true},
            "l4":{"TCP":{"source_port":40000,"destination_port":8080,"flags":{"SYN":true}}},
            "source":{"ID":7,"identity":300,"namespace":"shop","labels":["k8s:app=front"],"pod_name":"front-1",
              "workloads":[{"name":"front","kind":"Deployment"}]},
            "destination":{"identity":301,"namespace":"shop","labels":["k8s:app=back"],"pod_name":"back-1"},
            "Type":"SOCK","event_type":{"type":5},"traffic_direction":"EGRESS","drop_reason_desc":"POLICY_DENIED",
            "trace_observation_point":"TO_PROXY","Summary":"TCP Flags: SYN"},"node_name":"n","time":"t"}"#;
        let flow = Recorded::parse(hubble).unwrap().unwrap();
        assert_eq!(
            (flow.verdict, flow.protocol, flow.port),
            (Happened::Dropped, 6, 8080)
        );
        assert_eq!((flow.direction, flow.unusable), (Some(Direction::Egress), None));
        assert_eq!(flow.source.text(), "shop/front-1");
        let own = r#"{"time":"t","verdict":"FORWARDED","IP":{"source":"fd00::1","destination":"fd00::2"},
            "l4":{"TCP":{"destination_port":80}},"traffic_direction":"INGRESS","is_reply":false,
            "l7":{"type":"REQUEST","http":{"method":"GET","url":"http://a.test/x?y","headers":[{"key":"x-a","value":"1"}]}},
            "palisade":{"protocol":6}}"#;
        let flow = Recorded::parse(own).unwrap().unwrap();
        let http = flow.request.http.unwrap();
        assert_eq!(
            (http.method.as_str(), http.path.as_str(), http.host.as_str()),
            ("GET", "/x?y", "a.test")
        );
        assert_eq!(http.headers, [("x-a".to_owned(), "1".to_owned())]);
        assert!(
            Recorded::parse(r#"{"lost_events":{"num_events_lost":"3"}}"#)
                .unwrap()
                .is_none()
        );
        assert!(Recorded::parse("{").unwrap_err().starts_with("column 1: "));
    }

    #[test]
    fn records_that_say_nothing_about_policies_are_told_apart() {
        let flow = |members: &str| {
            let text = format!(
                r#"{{"IP":{{"source":"10.0.0.1","destination":"10.0.0.2"}},"l4":{{"TCP":{{"destination_port":80}}}},
                   "traffic_direction":"EGRESS",{members}}}"#
            );
            Recorded::parse(&text).unwrap().unwrap().unusable
        };
        assert_eq!(flow(r#""verdict":"FORWARDED""#), None);
        assert!(
            flow(r#""verdict":"FORWARDED","is_reply":true"#)
                .unwrap()
                .contains("replies")
        );
        assert!(
            flow(r#""verdict":"DROPPED","drop_reason":134"#)
                .unwrap()
                .contains("other than policies")
        );
        assert!(
            flow(r#""verdict":"ERROR""#)
                .unwrap()
                .contains("without a verdict")
        );
    }

    #[test]
    fn control_characters_are_replaced() {
        assert_eq!(clean("a\u{1b}[31m\n"), "a\u{fffd}[31m\u{fffd}");
    }
}
