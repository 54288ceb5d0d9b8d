//! Compiled filters.

use ipnet::IpNet;
use regex::Regex;

use crate::{
    DropReason, Timestamp, Uuid,
    flow::{HttpHeader, IpVersion, TcpFlags, TrafficDirection, Verdict, Workload},
};

use super::api::{EventTypeFilter, InterfaceFilter};

/// Accepted values of a property that both ends of a flow have. Each list that is not empty must match.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Sided<T> {
    /// Values for the source.
    pub(super) source: Vec<T>,
    /// Values for the destination.
    pub(super) destination: Vec<T>,
}

impl<T> Default for Sided<T> {
    fn default() -> Self {
        Self {
            source: Vec::new(),
            destination: Vec::new(),
        }
    }
}

/// A compiled filter: for each field that is not empty, one of its values must match the flow.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct FlowFilter {
    /// Identifier of the flow.
    pub(super) uuid: Vec<Uuid>,
    /// Address.
    pub(super) ip: Sided<IpNet>,
    /// Labels of the identity.
    pub(super) label: Sided<LabelSelector>,
    /// Identity.
    pub(super) identity: Sided<u32>,
    /// Namespace and beginning of the name.
    pub(super) pod: Sided<EndpointName>,
    /// Name or number of the endpoint.
    pub(super) endpoint: Sided<EndpointName>,
    /// Workload of the endpoint.
    pub(super) workload: Sided<Workload>,
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
    pub(super) interface: Vec<InterfaceFilter>,
    /// Name of the node, with `*` for any text.
    pub(super) node_name: Vec<String>,
    /// Labels of the node.
    pub(super) node_labels: Vec<LabelSelector>,
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
    /// Identifier of a distributed trace.
    pub(super) trace_id: Vec<String>,
    /// Server name of a TLS ClientHello, with `*` for any text.
    pub(super) sni: Vec<String>,
    /// Name for which the address was learned, with `*` for any text.
    pub(super) fqdn: Sided<String>,
}

/// Protocol of a flow: an IP protocol, or one that an inspector reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
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
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct StatusFilter {
    /// Lowest code.
    pub(super) first: u32,
    /// Highest code.
    pub(super) last: u32,
}

/// Regular expression that matches anywhere in a text.
#[derive(Clone, Debug)]
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

/// Inclusive range of ports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct PortRange {
    /// First port.
    pub(super) first: u16,
    /// Last port.
    pub(super) last: u16,
}

/// Number, or beginning of the name, by which a filter selects endpoints.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct EndpointName {
    /// Number of an endpoint of this node, if the value is a number.
    pub(super) id: Option<u32>,
    /// Namespace; `None` for any.
    pub(super) namespace: Option<String>,
    /// Beginning of the name; empty for all endpoints of the namespace.
    pub(super) prefix: String,
}

/// Label selector in Kubernetes syntax, with label sources. All requirements must hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LabelSelector(pub(super) Vec<Requirement>);

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Requirement {
    /// Label source; `None` accepts every source.
    pub(super) source: Option<String>,
    pub(super) key: String,
    pub(super) test: Test,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Test {
    Exists,
    Missing,
    In(Vec<String>),
    NotIn(Vec<String>),
}

/// Compiled filters of one request: which flows to show.
#[derive(Clone, PartialEq, Debug, Default)]
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
