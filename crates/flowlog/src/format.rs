//! Output of flows as text and as JSON.

use std::{fmt::Write as _, net::IpAddr};

use serde::{Deserialize, Serialize};

use crate::{
    Timestamp,
    flow::{
        Endpoint, EventType, Flow, L7Type, Layer4, Layer7, Moment, TrafficDirection, Verdict, event_type,
        reserved_name,
    },
};

/// Output format of flows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Format {
    /// One line per flow.
    #[default]
    Compact,
    /// One block of `KEY: value` lines per flow.
    Dict,
    /// One JSON object per line, with `flow`, `node_name` and `time`.
    Json,
}

/// Response of the flow API: a flow with the name of the node and the time.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Response<F> {
    /// The flow.
    pub flow: F,
    /// Name of the node that recorded the flow.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node_name: String,
    /// Time of the flow.
    pub time: Timestamp,
}

/// Formatter of flows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Printer {
    /// Output format.
    pub format: Format,
    /// Whether to use ANSI colours.
    pub colour: bool,
    /// Whether to write the name of the node.
    pub node: bool,
    /// Whether to write the deciding policy and rule with their location.
    pub rules: bool,
    /// Whether to write addresses instead of names.
    pub numeric: bool,
}

/// ANSI colours by purpose.
#[derive(Clone, Copy)]
enum Paint {
    Host,
    Identity,
    Good,
    Bad,
    Warning,
    Dim,
}

impl Paint {
    const fn code(self) -> &'static str {
        match self {
            Self::Host => "36",
            Self::Identity => "35",
            Self::Good => "32",
            Self::Bad => "31",
            Self::Warning => "33",
            Self::Dim => "2",
        }
    }
}

impl Printer {
    /// Returns a flow as text; each line ends with a newline.
    #[must_use]
    pub fn flow(&self, flow: &Flow) -> String {
        match self.format {
            Format::Compact => self.compact(flow),
            Format::Dict => self.dict(flow),
            Format::Json => json(flow),
        }
    }

    fn compact(&self, flow: &Flow) -> String {
        let mut source = (self.host(flow, true), self.identity(&flow.source));
        let mut destination = (self.host(flow, false), self.identity(&flow.destination));
        let arrow = match flow.is_reply {
            None => "<>",
            Some(false) => "->",
            Some(true) => {
                std::mem::swap(&mut source, &mut destination);
                "<-"
            }
        };
        let node = if self.node {
            format!(" [{}]", flow.node_name)
        } else {
            String::new()
        };
        let mut line = format!(
            "{}{node}: {} {} {arrow} {} {} {} {} ({})",
            flow.time.stamp(),
            source.0,
            source.1,
            destination.0,
            destination.1,
            type_text(flow),
            self.verdict(flow),
            flow.summary,
        );
        if self.rules
            && let Some(why) = why(flow)
        {
            let _ = write!(line, " {}", self.paint(Paint::Dim, &why));
        }
        line.push('\n');
        line
    }

    fn dict(&self, flow: &Flow) -> String {
        let mut block = format!("  TIMESTAMP: {}\n", flow.time.stamp());
        let mut field = |name: &str, value: &str| {
            let _ = writeln!(block, "{name:>11}: {value}");
        };
        if self.node {
            field("NODE", &flow.node_name);
        }
        field("SOURCE", &self.host(flow, true));
        field("DESTINATION", &self.host(flow, false));
        field("TYPE", &type_text(flow));
        field("VERDICT", &self.verdict(flow));
        field("SUMMARY", &flow.summary);
        if self.rules
            && let Some(why) = why(flow)
        {
            field("RULE", &why);
        }
        block.push_str("------------\n");
        block
    }

    fn host(&self, flow: &Flow, source: bool) -> String {
        let text = match (flow.ip, &flow.ethernet) {
            (Some(ip), _) => {
                let (end, names, address) = if source {
                    (&flow.source, &flow.source_names, ip.source)
                } else {
                    (&flow.destination, &flow.destination_names, ip.destination)
                };
                let ports = flow.l4.and_then(Layer4::ports);
                let port = ports.map(|(from, to)| if source { from } else { to });
                match names.first().filter(|_| end.pod_name.is_empty() && !self.numeric) {
                    Some(name) => match port {
                        Some(port) => format!("{name}:{port}"),
                        None => name.to_string(),
                    },
                    None => self.host_and_port(end, address, port),
                }
            }
            (None, Some(ethernet)) => if source {
                ethernet.source
            } else {
                ethernet.destination
            }
            .to_string(),
            (None, None) => "-".into(),
        };
        self.paint(Paint::Host, &text)
    }

    fn host_and_port(&self, end: &Endpoint, address: IpAddr, port: Option<u16>) -> String {
        let name = if self.numeric { "" } else { &*end.pod_name };
        match (name, end.namespace.is_empty(), address, port) {
            ("", _, _, None) => address.to_string(),
            ("", _, IpAddr::V4(v4), Some(port)) => format!("{v4}:{port}"),
            ("", _, IpAddr::V6(v6), Some(port)) => format!("[{v6}]:{port}"),
            (name, true, _, None) => name.into(),
            (name, true, _, Some(port)) => format!("{name}:{port}"),
            (name, false, _, None) => format!("{}/{name}", end.namespace),
            (name, false, _, Some(port)) => format!("{}/{name}:{port}", end.namespace),
        }
    }

    fn identity(&self, end: &Endpoint) -> String {
        let text = match reserved_name(end.identity) {
            Some(name) => format!("({name})"),
            None => format!("(ID:{})", end.identity),
        };
        self.paint(Paint::Identity, &text)
    }

    fn verdict(&self, flow: &Flow) -> String {
        let of_policy = flow.event_type.kind == event_type::POLICY_VERDICT;
        let (text, paint) = match flow.verdict {
            Verdict::Forwarded | Verdict::Redirected if of_policy => ("ALLOWED", Paint::Good),
            Verdict::Dropped | Verdict::Error if of_policy => ("DENIED", Paint::Bad),
            Verdict::Audit if of_policy => ("AUDITED", Paint::Warning),
            Verdict::Dropped | Verdict::Error => (flow.verdict.as_ref(), Paint::Bad),
            Verdict::Audit => (flow.verdict.as_ref(), Paint::Warning),
            Verdict::Unknown
            | Verdict::Forwarded
            | Verdict::Redirected
            | Verdict::Traced
            | Verdict::Translated => (flow.verdict.as_ref(), Paint::Good),
        };
        self.paint(paint, text)
    }

    fn paint(&self, paint: Paint, text: &str) -> String {
        if self.colour {
            format!("\x1b[{}m{text}\x1b[0m", paint.code())
        } else {
            text.into()
        }
    }
}

/// Returns the part of a line between the two ends and the verdict: a trace point, a drop reason, the kind of match and
/// direction of a policy verdict, or the kind of an application message.
fn type_text(flow: &Flow) -> String {
    match flow.event_type {
        EventType {
            kind: event_type::TRACE,
            ..
        } => flow.trace_observation_point.as_ref().into(),
        EventType {
            kind: event_type::DROP,
            ..
        } => flow.drop_reason_desc.text().into_owned(),
        EventType {
            kind: event_type::POLICY_VERDICT,
            ..
        } => {
            format!(
                "policy-verdict:{} {}",
                match_text(flow.policy_match_type),
                flow.traffic_direction.as_ref()
            )
        }
        EventType {
            kind: event_type::ACCESS_LOG,
            ..
        } => l7_text(flow),
        EventType { kind, .. } => format!("event {kind}"),
    }
}

/// Returns protocol and kind of an application message, such as `http-response`. For DNS, the source of the record
/// follows: `dns-request proxy`. The protocol is `l7` if the message could not be parsed.
fn l7_text(flow: &Flow) -> String {
    let Some(l7) = &flow.l7 else {
        return "l7".into();
    };
    let side = match l7.kind {
        L7Type::Request => "request",
        L7Type::Response => "response",
        L7Type::Sample => "sample",
        L7Type::Unknown => "unknown_l7_type",
    };
    match &**l7 {
        Layer7 { dns: Some(dns), .. } => format!("dns-{side} {}", dns.observation_source),
        Layer7 { http: Some(_), .. } => format!("http-{side}"),
        Layer7 { kafka: Some(_), .. } => format!("kafka-{side}"),
        _ if flow.palisade.tls.is_some() => format!("tls-{side}"),
        _ => format!("l7-{side}"),
    }
}

fn match_text(number: u32) -> String {
    const TEXTS: [&str; 7] = [
        "none",
        "L3-Only",
        "L3-L4",
        "L4-Only",
        "all",
        "L3-Proto",
        "Proto-Only",
    ];
    let known = usize::try_from(number).ok().and_then(|number| TEXTS.get(number));
    known.map_or_else(|| format!("unknown ({number})"), |text| (*text).into())
}

/// Returns the deciding policy and rule as text: `[policy shop/web ingress rule 2, shop.yaml:12]`.
fn why(flow: &Flow) -> Option<String> {
    let rule = flow.palisade.rule.as_ref()?;
    let unknown = || format!("rule {}", rule.id);
    let text = if rule.text.is_empty() {
        unknown()
    } else {
        rule.text.to_string()
    };
    let place = if rule.location.is_empty() {
        String::new()
    } else {
        format!(", {}", rule.location)
    };
    Some(format!("[{text}{place}]"))
}

/// Returns a flow as one line of JSON, with `flow`, `node_name` and `time`.
#[must_use]
pub fn json(flow: &Flow) -> String {
    let response = Response {
        flow,
        node_name: flow.node_name.to_string(),
        time: flow.time,
    };
    // The conversion never fails: serde_json fails only for I/O errors and for map keys that are not strings.
    let mut line = serde_json::to_string(&response).unwrap_or_default();
    line.push('\n');
    line
}

/// Returns a flow as a line of `palisade monitor`, with numbers and addresses instead of names.
#[must_use]
pub fn monitor(flow: &Flow) -> String {
    let identity = |end: &Endpoint| match reserved_name(end.identity) {
        Some(name) => name.to_owned(),
        None => end.identity.to_string(),
    };
    let identities = || {
        format!(
            "identity {}->{}",
            identity(&flow.source),
            identity(&flow.destination)
        )
    };
    let local_is_source = flow.source_is_local();
    let (local, remote) = if local_is_source {
        (&flow.source, &flow.destination)
    } else {
        (&flow.destination, &flow.source)
    };
    let interface = flow.interface.as_ref();
    let ifindex = interface.map_or(0, |i| i.index);
    let packet = packet_text(flow);
    let mut line = match flow.event_type.kind {
        event_type::POLICY_VERDICT => {
            let action = match flow.verdict {
                Verdict::Audit => "audit",
                Verdict::Dropped => "deny",
                _ => "allow",
            };
            let direction = match flow.traffic_direction {
                TrafficDirection::Egress => "egress",
                TrafficDirection::Ingress | TrafficDirection::Unknown => "ingress",
            };
            format!(
                "Policy verdict log: flow 0x0 local EP ID {}, remote ID {}, proto {}, {direction}, action {action}, auth: disabled, match {}, {packet}",
                local.id,
                remote.identity,
                flow.palisade.protocol,
                match_text(flow.policy_match_type),
            )
        }
        event_type::ACCESS_LOG => {
            let what = match flow.verdict {
                Verdict::Dropped => format!("dropped ({})", flow.drop_reason_desc.text()),
                other => other.as_ref().to_ascii_lowercase(),
            };
            format!(
                "-> {} from endpoint {} to endpoint {}, {}, verdict {what}, {packet}: {}",
                l7_text(flow),
                flow.source.id,
                flow.destination.id,
                identities(),
                flow.summary
            )
        }
        event_type::DROP => format!(
            "xx drop ({}) flow 0x0 to endpoint {}, ifindex {ifindex}, {}: {packet}",
            flow.drop_reason_desc.text(),
            flow.destination.id,
            identities(),
        ),
        _ => {
            let state = match (flow.palisade.progress.map(|p| p.at), flow.is_reply) {
                (Some(Moment::Start), _) => "new",
                (Some(Moment::End), _) => "closed",
                (_, Some(true)) => "reply",
                (_, Some(false)) => "established",
                (_, None) => "unknown",
            };
            let to = match flow.trace_observation_point.as_ref() {
                "to-endpoint" => format!("endpoint {}", local.id),
                point => point.trim_start_matches("to-").to_owned(),
            };
            let name = interface.map_or("", |i| &*i.name);
            format!(
                "-> {to} flow 0x0, {} state {state} ifindex {name}: {packet}",
                identities()
            )
        }
    };
    line.push('\n');
    line
}

impl Flow {
    /// Returns whether the endpoint whose policy decided is the source of the packet: an original packet of an egress
    /// connection, or a reply of an ingress connection. A packet of unknown direction counts as an original packet.
    fn source_is_local(&self) -> bool {
        let egress = self.traffic_direction == TrafficDirection::Egress;
        egress != (self.is_reply == Some(true))
    }
}

/// Returns a text such as `10.0.1.10:4711 -> 10.0.1.20:80 tcp SYN`.
fn packet_text(flow: &Flow) -> String {
    let numeric = Printer {
        numeric: true,
        ..Printer::default()
    };
    let (source, destination) = (numeric.host(flow, true), numeric.host(flow, false));
    let what = match flow.l4 {
        Some(Layer4::Tcp { .. }) if flow.l7.is_some() => "tcp".into(),
        Some(Layer4::Tcp { flags, .. }) => format!("tcp {}", flags.names().collect::<Vec<_>>().join(", ")),
        Some(Layer4::Udp { .. }) => "udp".into(),
        Some(Layer4::Sctp { .. }) => "sctp".into(),
        Some(Layer4::Icmpv4 { .. } | Layer4::Icmpv6 { .. }) | None => flow
            .summary
            .trim_start_matches("ICMPv4 ")
            .trim_start_matches("ICMPv6 ")
            .to_owned(),
    };
    format!("{source} -> {destination} {what}")
}
