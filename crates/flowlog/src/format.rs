//! Output of flows as text and as JSON.

use std::{fmt::Write as _, net::IpAddr};

use jiff::tz::TimeZone;
use palisade_abi::{Reason, identity};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    DropReason, FieldMask, TimeFormat, Timestamp, Uuid,
    flow::{
        Endpoint, Flow, L7Type, Layer4, Layer7, Moment, Policy, TracePoint, TrafficDirection, Verdict,
        event_type, reserved_name,
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
    /// Columns.
    Table,
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
#[derive(Clone, Debug)]
pub struct Printer {
    /// Output format.
    pub format: Format,
    /// Whether to use ANSI colours; tables have none.
    pub colour: bool,
    /// Whether to write the name of the node.
    pub node: bool,
    /// Whether to write the deciding policy and rule with their location.
    pub rules: bool,
    /// Whether to write the names of the policies that allow or deny, after the verdict of a policy.
    pub policy_names: bool,
    /// Whether to write addresses instead of names.
    pub numeric: bool,
    /// Format of times, except in JSON.
    pub time: TimeFormat,
    /// Time zone of times, except in JSON.
    pub zone: TimeZone,
    /// Fields of flows in JSON; all if it is empty.
    pub mask: FieldMask,
}

impl Default for Printer {
    fn default() -> Self {
        Self {
            format: Format::default(),
            colour: false,
            node: false,
            rules: false,
            policy_names: false,
            numeric: false,
            time: TimeFormat::default(),
            zone: TimeZone::UTC,
            mask: FieldMask::default(),
        }
    }
}

/// Rows of a table that are aligned together. A longer table has several blocks, each with its own widths, so that the
/// memory of a table is bounded.
const TABLE_BLOCK: usize = 10_000;

/// Text between the blocks of [`Format::Dict`].
const DICT_SEPARATOR: &str = "------------\n";

/// Output of several flows, with what is between them.
#[derive(Debug)]
pub struct Listing {
    printer: Printer,
    /// Whether something was written.
    begun: bool,
    rows: Vec<Vec<String>>,
}

impl Listing {
    /// Returns an empty listing.
    #[must_use]
    pub const fn new(printer: Printer) -> Self {
        Self {
            printer,
            begun: false,
            rows: Vec::new(),
        }
    }

    /// Returns the text of a flow; each line ends with a newline. `original`: the flow in JSON, if it comes from a file and
    /// can have fields that [`Flow`] does not have. A table is returned by [`Listing::finish`] or in large blocks.
    pub fn flow(&mut self, flow: &Flow, original: Option<&Value>) -> String {
        match self.printer.format {
            Format::Compact => self.printer.compact(flow),
            Format::Dict => {
                let block = self.printer.dict(flow);
                self.block(block)
            }
            Format::Table => {
                let row = self.printer.row(flow);
                self.row(row)
            }
            Format::Json => match original {
                Some(original) => self.printer.foreign_json(flow, original),
                None => self.printer.json(flow),
            },
        }
    }

    /// Returns whether the output is the JSON of whole flows, for [`Listing::raw`].
    #[must_use]
    pub fn is_raw(&self) -> bool {
        self.printer.format == Format::Json && self.printer.mask.is_empty()
    }

    /// Returns the line of a flow whose JSON is printed without changes, if [`Self::is_raw`].
    #[must_use]
    pub fn raw(&self, flow: &RawFlow<'_>) -> String {
        let mut text = String::with_capacity(flow.json.len() + 128);
        text.push_str("{\"flow\":");
        text.push_str(flow.json);
        // The conversion of a string never fails.
        let node_name = serde_json::to_string(&flow.node_name).unwrap_or_default();
        if !flow.node_name.is_empty() {
            let _ = write!(text, ",\"node_name\":{node_name}");
        }
        let _ = writeln!(text, ",\"time\":\"{}\"}}", flow.time);
        text
    }

    /// Returns the text about flows that were lost. `source`: where, as the flow API names it.
    pub fn lost(&mut self, source: &str, count: u64) -> String {
        let source = clean(source);
        let summary = format!("CPU(0) - {count}");
        match self.printer.format {
            Format::Compact => format!("EVENTS LOST: {source} CPU(0) {count}\n"),
            Format::Dict => {
                let node = if self.printer.node { "       NODE: \n" } else { "" };
                self.block(format!(
                    "  TIMESTAMP: \n{node}     SOURCE: {source}\n       TYPE: EVENTS LOST\n    VERDICT: \n    SUMMARY: {summary}\n"
                ))
            }
            Format::Table => {
                let mut row = vec![String::new()];
                if self.printer.node {
                    row.push(String::new());
                }
                row.extend([
                    source,
                    String::new(),
                    "EVENTS LOST".into(),
                    String::new(),
                    summary,
                ]);
                self.row(row)
            }
            Format::Json => {
                let lost = json!({"lost_events": {"source": source, "num_events_lost": count.to_string()}});
                format!("{lost}\n")
            }
        }
    }

    /// Returns what is not written yet.
    #[must_use]
    pub fn finish(mut self) -> String {
        self.table()
    }

    fn block(&mut self, block: String) -> String {
        if std::mem::replace(&mut self.begun, true) {
            format!("{DICT_SEPARATOR}{block}")
        } else {
            block
        }
    }

    fn row(&mut self, row: Vec<String>) -> String {
        if !std::mem::replace(&mut self.begun, true) {
            let mut head = vec!["TIMESTAMP"];
            if self.printer.node {
                head.push("NODE");
            }
            head.extend(["SOURCE", "DESTINATION", "TYPE", "VERDICT", "SUMMARY"]);
            self.rows.push(head.into_iter().map(str::to_owned).collect());
        }
        self.rows.push(row);
        if self.rows.len() < TABLE_BLOCK {
            return String::new();
        }
        self.table()
    }

    /// Returns the rows with aligned columns, three spaces between, as Go's `text/tabwriter` aligns them for Hubble.
    fn table(&mut self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in self.rows.drain(..) {
            let last = row.len().saturating_sub(1);
            for (column, cell) in row.iter().enumerate() {
                if column == last {
                    text.push_str(cell);
                } else {
                    let _ = write!(text, "{cell:0$}   ", widths[column]);
                }
            }
            text.push('\n');
        }
        text
    }
}

/// ANSI colours by purpose, as Hubble uses them.
#[derive(Clone, Copy)]
enum Paint {
    Host,
    Port,
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
            Self::Port | Self::Warning => "33",
            Self::Dim => "2",
        }
    }
}

impl Printer {
    /// Returns one flow as text; each line ends with a newline. [`Listing`] has what is between several flows.
    #[must_use]
    pub fn flow(&self, flow: &Flow) -> String {
        match self.format {
            Format::Compact => self.compact(flow),
            Format::Dict => self.dict(flow),
            Format::Table => {
                let mut listing = Listing::new(self.clone());
                let begin = listing.flow(flow, None);
                begin + &listing.finish()
            }
            Format::Json => self.json(flow),
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
            format!(" [{}]", clean(&flow.node_name))
        } else {
            String::new()
        };
        let mut line = format!(
            "{}{node}: {} {} {arrow} {} {} {} {} ({})",
            self.time(flow),
            source.0,
            source.1,
            destination.0,
            destination.1,
            type_text(flow),
            self.verdict(flow),
            clean(&flow.summary),
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
        let mut block = format!("  TIMESTAMP: {}\n", self.time(flow));
        let mut field = |name: &str, value: &str| {
            let _ = writeln!(block, "{name:>11}: {value}");
        };
        if self.node {
            field("NODE", &clean(&flow.node_name));
        }
        field("SOURCE", &self.host(flow, true));
        field("DESTINATION", &self.host(flow, false));
        field("TYPE", &type_text(flow));
        field("VERDICT", &self.verdict(flow));
        field("SUMMARY", &clean(&flow.summary));
        if self.rules
            && let Some(why) = why(flow)
        {
            field("RULE", &why);
        }
        block
    }

    /// Returns the cells of a row of a table.
    fn row(&self, flow: &Flow) -> Vec<String> {
        let plain = Self {
            colour: false,
            ..self.clone()
        };
        let mut row = vec![plain.time(flow)];
        if self.node {
            row.push(clean(&flow.node_name));
        }
        let mut summary = clean(&flow.summary);
        if self.rules
            && let Some(why) = why(flow)
        {
            let _ = write!(summary, " {why}");
        }
        row.extend([
            plain.host(flow, true),
            plain.host(flow, false),
            type_text(flow),
            plain.verdict(flow),
            summary,
        ]);
        row
    }

    fn json(&self, flow: &Flow) -> String {
        if self.mask.is_empty() {
            return json(flow);
        }
        // The conversion never fails: serde_json fails only for map keys that are not strings.
        let all = serde_json::to_value(flow).unwrap_or_default();
        self.foreign_json(flow, &all)
    }

    /// Returns a flow with all fields of `original` that the mask names.
    fn foreign_json(&self, flow: &Flow, original: &Value) -> String {
        let mut masked = original.clone();
        self.mask.apply(&mut masked);
        let response = Response {
            flow: masked,
            node_name: flow.node_name.to_string(),
            time: flow.time,
        };
        line(&response)
    }

    fn time(&self, flow: &Flow) -> String {
        flow.time.text(self.time, &self.zone)
    }

    fn host(&self, flow: &Flow, source: bool) -> String {
        let text = match (flow.ip, &flow.ethernet) {
            (Some(ip), _) => {
                let (end, names, address) = if source {
                    (&flow.source, &flow.source_names, ip.source)
                } else {
                    (&flow.destination, &flow.destination_names, ip.destination)
                };
                // The address is what is wrong: the name of the endpoint that has sent the packet would hide it.
                let is_foreign = source && flow.drop_reason == u32::from(Reason::InvalidSourceIp as u8);
                let name = match &*end.namespace {
                    "" => end.pod_name.to_string(),
                    namespace => format!("{namespace}/{}", end.pod_name),
                };
                let sender = if is_foreign && !self.numeric && !end.pod_name.is_empty() {
                    format!(" sent by {}", clean(&name))
                } else {
                    String::new()
                };
                let host = if self.numeric || is_foreign {
                    address.to_string()
                } else if !end.pod_name.is_empty() {
                    name
                } else if names.is_empty() {
                    address.to_string()
                } else {
                    names.join(",")
                };
                let host = clean(&host);
                let ports = flow.l4.and_then(Layer4::ports);
                let host = match ports.map(|(from, to)| if source { from } else { to }) {
                    None | Some(0) => host,
                    Some(port) => {
                        let port = self.paint(Paint::Port, &port.to_string());
                        if host.contains(':') {
                            format!("[{host}]:{port}")
                        } else {
                            format!("{host}:{port}")
                        }
                    }
                };
                host + &sender
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

    fn identity(&self, end: &Endpoint) -> String {
        // Only the node's own sockets have a unit, and the node has no other workloads.
        let unit = end
            .workloads
            .first()
            .filter(|_| end.identity == identity::HOST && !self.numeric);
        let text = match (reserved_name(end.identity), unit) {
            (Some(name), Some(unit)) => format!("({name}: {})", clean(&unit.name)),
            (Some(name), None) => format!("({name})"),
            (None, _) => format!("(ID:{})", end.identity),
        };
        self.paint(Paint::Identity, &text)
    }

    fn verdict(&self, flow: &Flow) -> String {
        let of_policy = flow.event_type.kind == event_type::POLICY_VERDICT;
        let egress = flow.traffic_direction == TrafficDirection::Egress;
        let (text, policies, paint) = match flow.verdict {
            Verdict::Forwarded | Verdict::Redirected if of_policy => (
                "ALLOWED",
                if egress {
                    &flow.egress_allowed_by
                } else {
                    &flow.ingress_allowed_by
                },
                Paint::Good,
            ),
            Verdict::Dropped | Verdict::Error if of_policy => (
                "DENIED",
                if egress {
                    &flow.egress_denied_by
                } else {
                    &flow.ingress_denied_by
                },
                Paint::Bad,
            ),
            Verdict::Audit if of_policy => return self.paint(Paint::Warning, "AUDITED"),
            Verdict::Unknown => return flow.verdict.as_ref().into(),
            Verdict::Dropped | Verdict::Error => return self.paint(Paint::Bad, flow.verdict.as_ref()),
            Verdict::Audit | Verdict::Traced | Verdict::Translated => {
                return self.paint(Paint::Warning, flow.verdict.as_ref());
            }
            Verdict::Forwarded | Verdict::Redirected => {
                return self.paint(Paint::Good, flow.verdict.as_ref());
            }
        };
        let names = if self.policy_names {
            policies_text(policies)
        } else {
            String::new()
        };
        self.paint(paint, &format!("{text}{names}"))
    }

    fn paint(&self, paint: Paint, text: &str) -> String {
        if self.colour {
            format!("\x1b[{}m{text}\x1b[0m", paint.code())
        } else {
            text.into()
        }
    }
}

/// Returns ` BY NAME (KIND), NAME (KIND)`, or nothing if no policy has a name and a kind.
fn policies_text(policies: &[Policy]) -> String {
    let named = policies
        .iter()
        .filter(|policy| !policy.name.is_empty() && !policy.kind.is_empty());
    let names: Vec<_> = named
        .map(|policy| format!("{} ({})", clean(&policy.name), clean(&policy.kind)))
        .collect();
    if names.is_empty() {
        return String::new();
    }
    format!(" BY {}", names.join(", "))
}

/// Returns a text with its control characters escaped. Flows of files can contain any text, and control characters could
/// forge lines or control the terminal.
fn clean(text: &str) -> String {
    if !text.contains(char::is_control) {
        return text.to_owned();
    }
    let mut cleaned = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if c.is_control() {
            cleaned.extend(c.escape_default());
        } else {
            cleaned.push(c);
        }
    }
    cleaned
}

/// Returns the part of a line between the two ends and the verdict: the kind of an application message, a trace point, a
/// drop reason, or the kind of match and direction of a policy verdict.
fn type_text(flow: &Flow) -> String {
    let sub_type = flow.event_type.sub_type;
    match flow.event_type.kind {
        _ if flow.l7.is_some() => l7_text(flow),
        event_type::ACCESS_LOG => "l7".into(),
        // Flows of other versions can have a trace point without a name here.
        event_type::TRACE if flow.trace_observation_point == TracePoint::Unknown => {
            let point = match sub_type {
                0 => Some(TracePoint::ToEndpoint),
                number => TracePoint::from_number(number.into()),
            };
            point.map_or_else(|| sub_type.to_string(), |point| point.as_ref().into())
        }
        event_type::TRACE => flow.trace_observation_point.as_ref().into(),
        event_type::DROP => match u8::try_from(sub_type) {
            Ok(reason) if reason != 0 => DropReason(reason).text().into_owned(),
            _ => flow.drop_reason_desc.text().into_owned(),
        },
        event_type::POLICY_VERDICT => format!(
            "policy-verdict:{} {}",
            match_text(flow.policy_match_type),
            flow.traffic_direction.as_ref()
        ),
        _ => "UNKNOWN".into(),
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
        Layer7 { dns: Some(dns), .. } => format!("dns-{side} {}", clean(&dns.observation_source)),
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
    Some(clean(&format!("[{text}{place}]")))
}

/// A flow in JSON, of which only those members are parsed that are repeated beside it.
#[derive(Clone, PartialEq, Debug)]
pub struct RawFlow<'a> {
    json: &'a str,
    node_name: String,
    /// Time of the flow.
    pub time: Timestamp,
    /// Identifier.
    pub uuid: Uuid,
}

impl<'a> RawFlow<'a> {
    /// Reads a flow in JSON, without white space around it.
    ///
    /// # Errors
    /// The error of the JSON parser.
    pub fn new(json: &'a str) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        struct Head {
            #[serde(default)]
            node_name: String,
            time: Timestamp,
            #[serde(default)]
            uuid: Uuid,
        }
        let Head {
            node_name,
            time,
            uuid,
        } = serde_json::from_str(json)?;
        Ok(Self {
            json,
            node_name,
            time,
            uuid,
        })
    }
}

/// Returns a flow as one line of JSON, with `flow`, `node_name` and `time`.
#[must_use]
pub fn json(flow: &Flow) -> String {
    let response = Response {
        flow,
        node_name: flow.node_name.to_string(),
        time: flow.time,
    };
    line(&response)
}

fn line<F: Serialize>(response: &Response<F>) -> String {
    // The conversion never fails: serde_json fails only for I/O errors and for map keys that are not strings.
    let mut line = serde_json::to_string(response).unwrap_or_default();
    line.push('\n');
    line
}

/// How `palisade monitor` prints reserved identities. It prints all others as numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReservedAs {
    /// `world`.
    Names,
    /// `2`.
    Numbers,
}

/// Returns a flow as a line of `palisade monitor`, with numbers and addresses instead of names.
#[must_use]
pub fn monitor(flow: &Flow, reserved: ReservedAs) -> String {
    let identities = || identities(flow, reserved);
    let local_is_source = flow.source_is_local();
    let (local, remote) = if local_is_source {
        (&flow.source, &flow.destination)
    } else {
        (&flow.destination, &flow.source)
    };
    let interface = flow.interface.as_ref();
    let ifindex = interface.map_or(0, |i| i.index);
    let packet = packet_text(flow);
    let hash = flow_hash(flow);
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
                "Policy verdict log: flow {hash:#x} local EP ID {}, remote ID {}, proto {}, {direction}, action {action}, auth: disabled, match {}, {packet}",
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
            "xx drop ({}) flow {hash:#x} to endpoint {}, ifindex {ifindex}, {}: {packet}",
            flow.drop_reason_desc.text(),
            flow.destination.id,
            identities(),
        ),
        _ => {
            let state = connection_state(flow);
            let to = match flow.trace_observation_point.as_ref() {
                "to-endpoint" => format!("endpoint {}", local.id),
                point => point.trim_start_matches("to-").to_owned(),
            };
            let name = interface.map_or("", |i| &*i.name);
            format!(
                "-> {to} flow {hash:#x}, {} state {state} ifindex {name}: {packet}",
                identities()
            )
        }
    };
    line.push('\n');
    line
}

/// Separator of [`monitor_verbose`].
const MONITOR_SEPARATOR: &str =
    "------------------------------------------------------------------------------\n";

/// Returns a flow as `palisade monitor -v` prints it: drops and traces with length, headers and the deciding rule; other
/// events as [`monitor`].
#[must_use]
pub fn monitor_verbose(flow: &Flow, reserved: ReservedAs) -> String {
    if matches!(
        flow.event_type.kind,
        event_type::POLICY_VERDICT | event_type::ACCESS_LOG
    ) {
        return monitor(flow, reserved);
    }
    let mut text = String::from(MONITOR_SEPARATOR);
    // Writing to a string does not fail.
    let _ = write!(text, "MARK {:#x} FROM {} ", flow_hash(flow), flow.source.id);
    let _ = match flow.event_type.kind {
        event_type::DROP => write!(
            text,
            "DROP: {} bytes, reason {}",
            flow.palisade.length,
            flow.drop_reason_desc.text()
        ),
        _ => write!(
            text,
            "{}: {} bytes, state {}",
            flow.trace_observation_point.as_ref(),
            flow.palisade.length,
            connection_state(flow)
        ),
    };
    if let Some(interface) = &flow.interface {
        let _ = write!(text, ", interface {}", clean(&interface.name));
    }
    let _ = write!(text, ", {}", identities(flow, reserved));
    if flow.destination.id != 0 {
        let _ = write!(text, ", to endpoint {}", flow.destination.id);
    }
    text.push('\n');
    if let Some(ethernet) = &flow.ethernet {
        let _ = writeln!(text, "Ethernet {} -> {}", ethernet.source, ethernet.destination);
    }
    let what = packet_text(flow);
    let _ = match flow.ip {
        Some(ip) => writeln!(text, "{} {what}", ip.version.as_ref()),
        None => writeln!(text, "{what}"),
    };
    if let Some(progress) = &flow.palisade.progress {
        let _ = writeln!(
            text,
            "Flow {} packets, {} bytes; replies {} packets, {} bytes",
            progress.forward_packets, progress.forward_bytes, progress.reply_packets, progress.reply_bytes
        );
    }
    if let Some(rule) = &flow.palisade.rule {
        let _ = write!(text, "Rule {}", clean(&rule.text));
        if !rule.location.is_empty() {
            let _ = write!(text, " ({})", clean(&rule.location));
        }
        text.push('\n');
    }
    text
}

fn identities(flow: &Flow, reserved: ReservedAs) -> String {
    let identity = |end: &Endpoint| match reserved_name(end.identity) {
        Some(name) if reserved == ReservedAs::Names => name.to_owned(),
        _ => end.identity.to_string(),
    };
    format!(
        "identity {}->{}",
        identity(&flow.source),
        identity(&flow.destination)
    )
}

fn connection_state(flow: &Flow) -> &'static str {
    match (flow.palisade.progress.map(|progress| progress.at), flow.is_reply) {
        (Some(Moment::Start), _) => "new",
        (Some(Moment::End), _) => "closed",
        (_, Some(true)) => "reply",
        (_, Some(false)) => "established",
        (_, None) => "unknown",
    }
}

/// Returns a number that is the same for all packets of a flow, of both directions: FNV-1a over protocol, addresses and
/// ports; 0 if the packet is not IP. Cilium prints the hash of the kernel, which the programs do not read.
fn flow_hash(flow: &Flow) -> u32 {
    let Some(ip) = flow.ip else { return 0 };
    let (from, to) = flow.l4.and_then(Layer4::ports).unwrap_or_default();
    let mut ends = [(ip.source, from), (ip.destination, to)];
    ends.sort_unstable();
    let mut hash = 0x811c_9dc5_u32;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
        }
    };
    add(&[flow.palisade.protocol]);
    for (address, port) in ends {
        match address {
            IpAddr::V4(address) => add(&address.octets()),
            IpAddr::V6(address) => add(&address.octets()),
        }
        add(&port.to_be_bytes());
    }
    hash
}

impl Flow {
    /// Returns whether the endpoint whose policy decided is the source of the packet: an original packet of an egress
    /// connection, or a reply of an ingress connection. A packet of unknown direction counts as an original packet.
    fn source_is_local(&self) -> bool {
        let egress = self.traffic_direction == TrafficDirection::Egress;
        egress != (self.is_reply == Some(true) || self.palisade.reply)
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
