//! Metrics of flow records under the names and labels of Cilium's Hubble.
//!
//! Each metric of the configuration counts into one to three tables. Label values and the flows that are counted are
//! those of `pkg/hubble/metrics` of Cilium; docs/METRICS.md lists the differences.

mod batch;
mod config;
mod context;
mod ends;
mod plugin;
mod sample;
mod values;

use std::{borrow::Cow, time::Duration};

use palisade_flowlog::{
    flow::{L7Type, Layer4, TrafficDirection, Verdict, event_type},
    icmp_text,
};

use self::{
    plugin::Plugin,
    sample::{Content, Message},
    values::Values,
};
use crate::{Definition, Family, Kind, Table, identifier::Identifier};

pub use self::{
    batch::Batch,
    config::{HubbleMetric, check},
    ends::Ends,
    sample::{Sample, reason_name},
};

/// Bounds of the buckets of durations, s: the default of Prometheus' client for Go, which Hubble uses.
const DURATION_BOUNDS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

macro_rules! definitions {
    ($($constant:ident = $name:literal, $kind:ident, $unit:expr, [$($label:literal),*], $help:literal;)*) => {
        $(static $constant: Definition = Definition {
            name: $name,
            help: $help,
            kind: Kind::$kind,
            unit: $unit,
            labels: &[$($label),*],
        };)*
        /// The metrics of Hubble.
        pub static ALL: &[&Definition] = &[$(&$constant),*];
    };
}

definitions! {
    DNS_QUERIES = "hubble_dns_queries_total", Counter, None, ["rcode", "qtypes", "ips_returned"],
        "Number of DNS queries observed";
    DNS_RESPONSES = "hubble_dns_responses_total", Counter, None, ["rcode", "qtypes", "ips_returned"],
        "Number of DNS queries observed";
    DNS_RESPONSE_TYPES = "hubble_dns_response_types_total", Counter, None, ["type", "qtypes"],
        "Number of DNS queries observed";
    DROP = "hubble_drop_total", Counter, None, ["reason", "protocol"], "Number of drops";
    FLOWS = "hubble_flows_processed_total", Counter, None, ["protocol", "type", "subtype", "verdict"],
        "Total number of flows processed";
    FLOWS_TO_WORLD = "hubble_flows_to_world_total", Counter, None, ["protocol", "verdict"],
        "Total number of flows to reserved:world";
    HTTP_REQUESTS = "hubble_http_requests_total", Counter, None, ["method", "protocol", "reporter"],
        "Count of HTTP requests";
    HTTP_RESPONSES = "hubble_http_responses_total", Counter, None, ["method", "protocol", "status", "reporter"],
        "Count of HTTP responses";
    HTTP_DURATION = "hubble_http_request_duration_seconds", Histogram, Some("seconds"), ["method", "reporter"],
        "Quantiles of HTTP request duration in seconds";
    ICMP = "hubble_icmp_total", Counter, None, ["family", "type"], "Number of ICMP messages";
    KAFKA_REQUESTS = "hubble_kafka_requests_total", Counter, None, ["topic", "api_key", "error_code", "reporter"],
        "Count of Kafka requests";
    KAFKA_DURATION = "hubble_kafka_request_duration_seconds", Histogram, Some("seconds"),
        ["topic", "api_key", "reporter"], "Quantiles of Kafka request duration in seconds";
    LOST_EVENTS = "hubble_lost_events_total", Counter, None, ["source"], "Number of lost events";
    POLICY_VERDICTS = "hubble_policy_verdicts_total", Counter, None, ["direction", "match", "action"],
        "Total number of Cilium network policy verdicts";
    PORT_DISTRIBUTION = "hubble_port_distribution_total", Counter, None, ["protocol", "port"],
        "Numbers of packets distributed by destination port";
    TCP_FLAGS = "hubble_tcp_flags_total", Counter, None, ["flag", "family"], "TCP flag occurrences";
}

/// Labels whose values are from a fixed list.
const FIXED: &[&str] = &[
    "reason",
    "protocol",
    "type",
    "subtype",
    "verdict",
    "reporter",
    "family",
    "direction",
    "match",
    "action",
    "flag",
    "source",
    "rcode",
    "ips_returned",
];

/// Labels of the world, and of its parts by IP version.
const WORLD: [&str; 3] = ["reserved:world", "reserved:world-ipv4", "reserved:world-ipv6"];

/// Where events were lost: the names of `LostEventSource` of the flow API.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Lost {
    /// Events for which the programs' event ring had no space.
    pub perf_event_ring_buffer: u64,
    /// Records of inspectors for which the queue had no space.
    pub observer_events_queue: u64,
    /// Flows that were overwritten in the flow ring before they were counted.
    pub hubble_ring_buffer: u64,
}

impl Lost {
    /// Returns the metric.
    #[must_use]
    pub fn family(self) -> Family {
        let mut table = Table::new(&LOST_EVENTS, &[("source", true)], 3, &[]);
        for (source, count) in [
            ("perf_event_ring_buffer", self.perf_event_ring_buffer),
            ("observer_events_queue", self.observer_events_queue),
            ("hubble_ring_buffer", self.hubble_ring_buffer),
        ] {
            table.add(&[source.into()], count);
        }
        table.family()
    }
}

/// Counters of flows.
#[derive(Debug)]
pub struct Hubble {
    counted: Vec<Counted>,
    needs_names: bool,
}

#[derive(Debug)]
struct Counted {
    metric: HubbleMetric,
    tables: Vec<Table>,
}

impl Hubble {
    /// Returns counters at zero. `limit`: the largest number of time series of one metric.
    #[must_use]
    pub fn new(metrics: Vec<HubbleMetric>, limit: usize) -> Self {
        let needs_names = metrics
            .iter()
            .any(|metric| metric.context.needs_names() || metric.plugin == Plugin::FlowsToWorld);
        let counted = metrics.into_iter().map(|metric| Counted {
            tables: tables(&metric, limit),
            metric,
        });
        Self {
            counted: counted.collect(),
            needs_names,
        }
    }

    /// Returns whether no metric is configured.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.counted.is_empty()
    }

    /// Returns whether a sample needs its flow record. Otherwise [`Sample::of_record`] suffices for records.
    #[must_use]
    pub const fn needs_names(&self) -> bool {
        self.needs_names
    }

    /// Counts a flow.
    pub fn count(&mut self, sample: &Sample<'_>) {
        for counted in &mut self.counted {
            counted.count(sample);
        }
    }

    /// Returns the metrics with all time series.
    #[must_use]
    pub fn families(&self) -> Vec<Family> {
        self.tables().map(Table::family).collect()
    }

    /// Returns whether a label shows ends of flows that can cease to exist. Otherwise [`Self::end`] does nothing.
    #[must_use]
    pub fn shows_ends(&self) -> bool {
        let mut metrics = self.counted.iter().map(|counted| &counted.metric);
        metrics.any(|metric| metric.context.identifiers().any(Identifier::can_end))
    }

    /// Returns an empty list of ends, for what the labels of these metrics show.
    #[must_use]
    pub fn ends(&self) -> Ends {
        let metrics = self.counted.iter().map(|counted| &counted.metric);
        Ends::new(metrics.flat_map(|metric| metric.context.identifiers()))
    }

    /// Removes each time series of which a label shows an end that is not in the list, once this was so for `grace`. `now`:
    /// a clock that does not go backwards.
    pub fn end(&mut self, ends: &Ends, now: Duration, grace: Duration) {
        for table in self.counted.iter_mut().flat_map(|counted| &mut counted.tables) {
            table.end(now, grace, |identifier, value| ends.has(identifier, value));
        }
    }

    /// Returns the name of each metric, and how many of its time series [`Self::end`] has removed.
    pub fn ended(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.tables().map(|table| (table.name(), table.ended()))
    }

    /// Returns the name of each metric, and how many times a time series beyond its limit was counted.
    pub fn overflows(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.tables().map(|table| (table.name(), table.overflowed()))
    }

    fn tables(&self) -> impl Iterator<Item = &Table> {
        self.counted.iter().flat_map(|counted| &counted.tables)
    }
}

fn tables(metric: &HubbleMetric, limit: usize) -> Vec<Table> {
    let context = || {
        metric
            .context
            .names()
            .map(|name| (name, name == "traffic_direction"))
    };
    let fixed = |name: &'static str| (name, FIXED.contains(&name));
    let table = |definition: &'static Definition, more: &[&'static str]| {
        // The order of the labels is that in which `Counted::count` lists the values.
        let labels: Vec<_> = definition
            .labels
            .iter()
            .chain(more)
            .map(|name| match (metric.plugin, *name) {
                // The type of an ICMP message is chosen by its sender.
                (Plugin::Icmp, "type") => ("type", false),
                _ => fixed(name),
            })
            .chain(context())
            .collect();
        let bounds = match definition.kind {
            Kind::Histogram => DURATION_BOUNDS,
            _ => &[],
        };
        Table::new(definition, &labels, limit, bounds)
    };
    match metric.plugin {
        Plugin::Dns => {
            let query: &[_] = if metric.flags.query { &["query"] } else { &[] };
            let all = [&DNS_QUERIES, &DNS_RESPONSES, &DNS_RESPONSE_TYPES];
            all.map(|definition| table(definition, query)).into()
        }
        Plugin::Drop => vec![table(&DROP, &[])],
        Plugin::Flow => vec![table(&FLOWS, &[])],
        Plugin::FlowsToWorld => {
            vec![table(
                &FLOWS_TO_WORLD,
                if metric.flags.port { &["port"] } else { &[] },
            )]
        }
        Plugin::Http => vec![
            table(&HTTP_REQUESTS, &[]),
            table(&HTTP_RESPONSES, &[]),
            table(&HTTP_DURATION, &[]),
        ],
        Plugin::HttpV2 => vec![table(&HTTP_REQUESTS, &["status"]), table(&HTTP_DURATION, &[])],
        Plugin::Icmp => vec![table(&ICMP, &[])],
        Plugin::Kafka => vec![table(&KAFKA_REQUESTS, &[]), table(&KAFKA_DURATION, &[])],
        Plugin::Policy => vec![table(&POLICY_VERDICTS, &[])],
        Plugin::PortDistribution => vec![table(&PORT_DISTRIBUTION, &[])],
        Plugin::Tcp => vec![table(&TCP_FLAGS, &[])],
    }
}

impl Counted {
    fn count(&mut self, sample: &Sample<'_>) {
        match self.metric.plugin {
            Plugin::Dns => self.dns(sample),
            Plugin::Drop if sample.verdict == Verdict::Dropped => {
                self.increment(
                    0,
                    sample,
                    [sample::reason_name(sample.reason), sample.protocol().into()],
                );
            }
            Plugin::Drop => {}
            Plugin::Flow => {
                let (kind, sub_kind) = type_of(sample);
                let values = [sample.protocol(), kind, sub_kind, sample.verdict.as_ref()].map(Cow::Borrowed);
                self.increment(0, sample, values);
            }
            Plugin::FlowsToWorld => self.flows_to_world(sample),
            Plugin::Http => self.http(sample),
            Plugin::HttpV2 => self.http_v2(sample),
            Plugin::Icmp => {
                if let Some(text) = sample.l4.and_then(icmp_text) {
                    self.increment(0, sample, [sample.family().into(), text.into()]);
                }
            }
            Plugin::Kafka => self.kafka(sample),
            Plugin::Policy => self.policy(sample),
            Plugin::PortDistribution => self.port_distribution(sample),
            Plugin::Tcp => self.tcp(sample),
        }
    }

    fn increment<'a, const N: usize>(
        &mut self,
        table: usize,
        sample: &Sample<'a>,
        values: [Cow<'a, str>; N],
    ) {
        self.increment_with(table, sample, false, values.into());
    }

    fn increment_with<'a>(
        &mut self,
        table: usize,
        sample: &Sample<'a>,
        inverted: bool,
        values: Vec<Cow<'a, str>>,
    ) {
        let mut values = Values::from(values);
        self.metric.context.values(sample, inverted, &mut values);
        if let Some(table) = self.tables.get_mut(table) {
            table.add_to(&values.texts, &values.shows, sample.times);
        }
    }

    fn observe<'a>(
        &mut self,
        table: usize,
        sample: &Sample<'a>,
        inverted: bool,
        values: Vec<Cow<'a, str>>,
        value: f64,
    ) {
        let mut values = Values::from(values);
        self.metric.context.values(sample, inverted, &mut values);
        if let Some(table) = self.tables.get_mut(table) {
            table.observe(&values.texts, &values.shows, value, sample.times);
        }
    }

    fn dns(&mut self, sample: &Sample<'_>) {
        let Some(Message {
            content:
                Content::Dns {
                    query,
                    qtype,
                    rcode,
                    addresses,
                    types,
                },
            ..
        }) = &sample.message
        else {
            return;
        };
        if self.metric.flags.ignore_aaaa && qtype == "AAAA" {
            return;
        }
        let is_reply = sample.is_reply == Some(true);
        let dropped = sample.verdict == Verdict::Dropped;
        let rcode = match (dropped, is_reply) {
            (true, _) => "Policy denied",
            (false, false) => "",
            (false, true) => rcode_name(*rcode),
        };
        let with_query = self.metric.flags.query;
        let name = || with_query.then(|| query.clone());
        let mut values = vec![rcode.into(), qtype.clone(), addresses.to_string().into()];
        values.extend(name());
        let table = usize::from(is_reply && !dropped);
        self.increment_with(table, sample, false, values);
        if table == 1 {
            for answered in types {
                let mut values = vec![answered.clone(), qtype.clone()];
                values.extend(name());
                self.increment_with(2, sample, false, values);
            }
        }
    }

    fn flows_to_world(&mut self, sample: &Sample<'_>) {
        let flags = self.metric.flags;
        let (Some(flow), Some(l4)) = (sample.flow, sample.l4) else {
            return;
        };
        let mut labels = flow.destination.labels.iter();
        if !labels.any(|label| WORLD.contains(&&**label)) {
            return;
        }
        let dropped = sample.verdict == Verdict::Dropped;
        if dropped && !flags.any_drop && !sample.dropped_by_policy() {
            return;
        }
        let is_reply = sample.is_reply == Some(true);
        // The destination port of a forwarded reply is the ephemeral port of a client.
        if !dropped && is_reply {
            return;
        }
        if flags.syn_only && (!has_flag(l4, SYN) || is_reply) {
            return;
        }
        let mut values = vec![sample.protocol().into(), sample.verdict.as_ref().into()];
        if flags.port {
            let port = l4.ports().map(|(_, destination)| destination.to_string());
            values.push(port.unwrap_or_default().into());
        }
        self.increment_with(0, sample, false, values);
    }

    fn http(&mut self, sample: &Sample<'_>) {
        let Some(Message {
            kind,
            latency,
            content:
                Content::Http {
                    method,
                    protocol,
                    status,
                },
        }) = &sample.message
        else {
            return;
        };
        let reporter = reporter(sample);
        match kind {
            L7Type::Request => {
                self.increment(0, sample, [method.clone(), protocol.clone(), reporter.into()]);
            }
            L7Type::Response => {
                let status = status.to_string().into();
                self.increment(
                    1,
                    sample,
                    [method.clone(), protocol.clone(), status, reporter.into()],
                );
                let values = vec![method.clone(), reporter.into()];
                self.observe(2, sample, false, values, latency.unwrap_or_default());
            }
            _ => {}
        }
    }

    /// Counts a request at its response, so that the status is known.
    fn http_v2(&mut self, sample: &Sample<'_>) {
        let Some(Message {
            kind: L7Type::Response,
            latency,
            content:
                Content::Http {
                    method,
                    protocol,
                    status,
                },
        }) = &sample.message
        else {
            return;
        };
        let reporter = reporter(sample);
        let values = vec![
            method.clone(),
            protocol.clone(),
            reporter.into(),
            status.to_string().into(),
        ];
        self.increment_with(0, sample, true, values);
        let values = vec![method.clone(), reporter.into()];
        self.observe(1, sample, true, values, latency.unwrap_or_default());
    }

    fn kafka(&mut self, sample: &Sample<'_>) {
        let Some(Message {
            kind,
            latency,
            content: Content::Kafka { topic, key, error },
        }) = &sample.message
        else {
            return;
        };
        let reporter = reporter(sample);
        if *kind == L7Type::Request {
            let error = error.to_string().into();
            self.increment(0, sample, [topic.clone(), key.clone(), error, reporter.into()]);
        } else if let Some(latency) = latency {
            let values = vec![topic.clone(), key.clone(), reporter.into()];
            self.observe(1, sample, true, values, *latency);
        }
    }

    fn policy(&mut self, sample: &Sample<'_>) {
        let matched = match sample.event {
            event_type::POLICY_VERDICT => {
                // The node may connect to its own workloads without a rule.
                let from_host = sample
                    .flow
                    .is_some_and(|flow| flow.source.identity == palisade_abi::identity::HOST);
                if from_host {
                    return;
                }
                match_name(sample.match_type)
            }
            event_type::ACCESS_LOG => match sample.message.as_ref().map(|message| &message.content) {
                Some(Content::Dns { .. }) => "l7/dns",
                Some(Content::Http { .. }) => "l7/http",
                Some(Content::Kafka { .. }) => "l7/kafka",
                Some(Content::Other) | None => "l7/",
            },
            _ => return,
        };
        let direction = match sample.direction {
            TrafficDirection::Unknown => "traffic_direction_unknown",
            TrafficDirection::Ingress => "ingress",
            TrafficDirection::Egress => "egress",
        };
        let action = sample.verdict.as_ref().to_ascii_lowercase();
        self.increment(0, sample, [direction.into(), matched.into(), action.into()]);
    }

    fn port_distribution(&mut self, sample: &Sample<'_>) {
        let forwarded = matches!(sample.verdict, Verdict::Forwarded | Verdict::Redirected);
        // The destination port of a packet that may be a reply may be the ephemeral port of a client.
        if let (true, Some(l4), Some(false)) = (forwarded, sample.l4, sample.is_reply) {
            let port = l4.ports().map_or(0, |(_, destination)| destination).to_string();
            self.increment(0, sample, [layer4_name(l4).into(), port.into()]);
        }
    }

    fn tcp(&mut self, sample: &Sample<'_>) {
        let forwarded = matches!(sample.verdict, Verdict::Forwarded | Verdict::Redirected);
        let Some(l4) = sample.l4.filter(|_| forwarded) else {
            return;
        };
        let opening = if has_flag(l4, ACK) { "SYN-ACK" } else { "SYN" };
        for (flag, name) in [(FIN, "FIN"), (SYN, opening), (RST, "RST")] {
            if has_flag(l4, flag) {
                self.increment(0, sample, [name.into(), sample.family().into()]);
            }
        }
    }
}

/// TCP flags (RFC 9293, section 3.1).
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

fn has_flag(l4: Layer4, flag: u8) -> bool {
    matches!(l4, Layer4::Tcp { flags, .. } if flags.0 & flag != 0)
}

const fn layer4_name(l4: Layer4) -> &'static str {
    match l4 {
        Layer4::Tcp { .. } => "TCP",
        Layer4::Udp { .. } => "UDP",
        Layer4::Icmpv4 { .. } => "ICMPv4",
        Layer4::Icmpv6 { .. } => "ICMPv6",
        Layer4::Sctp { .. } => "SCTP",
    }
}

/// Returns type and sub-type of a flow in `hubble_flows_processed_total`.
fn type_of<'a>(sample: &'a Sample<'_>) -> (&'static str, &'a str) {
    match sample.event {
        event_type::ACCESS_LOG => {
            let kind = match sample.message.as_ref().map(|message| &message.content) {
                Some(Content::Dns { .. }) => "DNS",
                Some(Content::Http { .. }) => "HTTP",
                Some(Content::Kafka { .. }) => "Kafka",
                Some(Content::Other) | None => "",
            };
            ("L7", kind)
        }
        event_type::DROP => ("Drop", ""),
        event_type::TRACE => ("Trace", sample.trace_point.as_ref()),
        event_type::POLICY_VERDICT => ("PolicyVerdict", ""),
        _ => ("Unknown", ""),
    }
}

/// Returns Cilium's name of [`palisade_abi::MatchKind`], in lower case.
const fn match_name(kind: u32) -> &'static str {
    match kind {
        0 => "none",
        1 => "l3-only",
        2 => "l3-l4",
        3 => "l4-only",
        4 => "all",
        5 => "l3-proto",
        6 => "proto-only",
        _ => "unknown",
    }
}

/// Returns which side of the connection has reported the message.
const fn reporter(sample: &Sample<'_>) -> &'static str {
    match sample.direction {
        TrafficDirection::Unknown => "unknown",
        TrafficDirection::Egress => "client",
        TrafficDirection::Ingress => "server",
    }
}

/// Returns Hubble's text for a response code (IANA, DNS RCODEs); empty for an unassigned one.
const fn rcode_name(code: u32) -> &'static str {
    match code {
        0 => "No Error",
        1 => "Format Error",
        2 => "Server Failure",
        3 => "Non-Existent Domain",
        4 => "Not Implemented",
        5 => "Query Refused",
        6 => "Name Exists when it should not",
        7 => "RR Set Exists when it should not",
        8 => "RR Set that should exist does not",
        9 => "Not Authorized",
        10 => "Name not contained in zone",
        11 => "DSO-TYPE Not Implemented",
        16 => "Bad OPT Version",
        17 => "Key not recognized",
        18 => "Signature out of time window",
        19 => "Bad TKEY Mode",
        20 => "Duplicate key name",
        21 => "Algorithm not supported",
        22 => "Bad Truncation",
        23 => "Bad/missing Server Cookie",
        _ => "",
    }
}

#[cfg(test)]
mod tests;
