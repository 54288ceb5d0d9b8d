//! Types of filters. A client sends filters to the daemon as JSON.

use ipnet::IpNet;
use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::{
    Timestamp,
    flow::{DropReason, HttpHeader, IpVersion, TcpFlags, TrafficDirection, Verdict},
};

/// Accepted values of a property that both ends of a flow have. Each list that is not empty must match.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Sided<T> {
    /// Values for the source.
    pub(super) source: Vec<T>,
    /// Values for the destination.
    pub(super) destination: Vec<T>,
    /// Values, one of which must match the source or the destination.
    pub(super) either: Vec<T>,
}

impl<T> Default for Sided<T> {
    fn default() -> Self {
        Self {
            source: Vec::new(),
            destination: Vec::new(),
            either: Vec::new(),
        }
    }
}

/// End of a flow to which a flag refers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
    Either,
}

impl<T> Sided<T> {
    pub(super) fn side(&mut self, side: Side) -> &mut Vec<T> {
        match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
            Side::Either => &mut self.either,
        }
    }
}

/// A filter: for each field that is not empty, one of its values must match the flow.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct FlowFilter {
    /// Address.
    pub(super) ip: Sided<IpNet>,
    /// Labels of the identity.
    pub(super) label: Sided<LabelSelector>,
    /// Identity.
    pub(super) identity: Sided<u32>,
    /// Name of the endpoint.
    pub(super) endpoint: Sided<EndpointName>,
    /// Namespace of the endpoint.
    pub(super) namespace: Sided<String>,
    /// Port.
    pub(super) port: Sided<PortRange>,
    /// Protocol.
    pub(super) protocol: Vec<ProtocolFilter>,
    /// Verdict.
    pub(super) verdict: Vec<Verdict>,
    /// Drop reason.
    pub(super) drop_reason_desc: Vec<DropReason>,
    /// Type of event.
    pub(super) event_type: Vec<EventTypeFilter>,
    /// Direction of the connection.
    pub(super) traffic_direction: Vec<TrafficDirection>,
    /// Whether the packet is of the reply direction; a flow without a known direction matches neither value.
    pub(super) reply: Vec<bool>,
    /// IP version.
    pub(super) ip_version: Vec<IpVersion>,
    /// TCP flags; a flow must have all flags of a value.
    pub(super) tcp_flags: Vec<TcpFlags>,
    /// Interface.
    pub(super) interface: Vec<String>,
    /// Name of the node, with `*` for any text.
    pub(super) node_name: Vec<String>,
    /// Name in the question of a DNS message.
    pub(super) dns_query: Vec<QueryPattern>,
    /// Status of an HTTP response.
    pub(super) http_status_code: Vec<StatusFilter>,
    /// Method of an HTTP request.
    pub(super) http_method: Vec<String>,
    /// Path of an HTTP request, percent-decoded, without its query.
    pub(super) http_path: Vec<TextPattern>,
    /// URL of an HTTP request.
    pub(super) http_url: Vec<TextPattern>,
    /// Header field of an HTTP message.
    pub(super) http_header: Vec<HttpHeader>,
    /// Server name of a TLS ClientHello, with `*` for any text.
    pub(super) tls_server_name: Vec<String>,
    /// Name for which the address was learned, with `*` for any text.
    pub(super) fqdn: Sided<String>,
}

/// Protocol of a flow: an IP protocol, or one that an inspector reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ProtocolFilter {
    /// IP protocol number.
    Ip(u8),
    /// DNS messages of an inspector.
    Dns,
    /// HTTP messages of an inspector.
    Http,
    /// Kafka messages of an inspector.
    Kafka,
    /// TLS ClientHellos of an inspector.
    Tls,
}

/// Range of HTTP status codes: one code, or all codes with the same first digits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct StatusFilter {
    /// Lowest code.
    pub(super) first: u32,
    /// Highest code.
    pub(super) last: u32,
}

/// Regular expression that matches anywhere in a text.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct Pattern<const IGNORE_CASE: bool>(pub(super) Regex);

/// Regular expression for domain names.
pub(super) type QueryPattern = Pattern<true>;
/// Regular expression for case-sensitive texts.
pub(super) type TextPattern = Pattern<false>;

impl<const IGNORE_CASE: bool> PartialEq for Pattern<IGNORE_CASE> {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl<const IGNORE_CASE: bool> From<Pattern<IGNORE_CASE>> for String {
    fn from(pattern: Pattern<IGNORE_CASE>) -> Self {
        pattern.0.as_str().into()
    }
}

/// Inclusive range of ports.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct PortRange {
    /// First port.
    pub(super) first: u16,
    /// Last port.
    pub(super) last: u16,
}

/// Number, or beginning of the name, by which a flag selects endpoints.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct EndpointName {
    /// Number of an endpoint of this node, if the value of the flag is a number.
    pub(super) id: Option<u32>,
    /// Namespace, if the value of the flag has one.
    pub(super) namespace: Option<String>,
    /// Beginning of the name; empty for all endpoints of the namespace.
    pub(super) prefix: String,
}

/// Event type, optionally with a sub-type.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct EventTypeFilter {
    /// Number of the event type.
    pub(super) kind: i32,
    /// Drop reason or trace point.
    pub(super) sub_type: Option<i32>,
}

/// Label selector in Kubernetes syntax, with label sources. All requirements must hold.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LabelSelector(pub(super) Vec<Requirement>);

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Requirement {
    /// Label source; `None` accepts every source.
    pub(super) source: Option<String>,
    pub(super) key: String,
    pub(super) test: Test,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) enum Test {
    Exists,
    Missing,
    In(Vec<String>),
    NotIn(Vec<String>),
}

/// Filters of one request: which flows to show.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Filters {
    /// Filters, one of which must match unless the list is empty.
    pub whitelist: Vec<FlowFilter>,
    /// Filters that must not match.
    pub blacklist: Vec<FlowFilter>,
    /// Earliest time.
    pub since: Option<Timestamp>,
    /// Latest time.
    pub until: Option<Timestamp>,
}
