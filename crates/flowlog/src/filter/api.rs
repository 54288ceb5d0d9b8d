//! Filters in the form of the flow API: what clients send, what `--print-raw-filters` prints and what `--allowlist` and
//! `--denylist` accept.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::{Timestamp, flow::HttpHeader, flow::Workload};

/// Declares a message whose fields are lists, in JSON left out while they are empty. A field that is not declared is an
/// error.
macro_rules! message {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $item:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $(
                $(#[$field_doc])*
                #[serde(skip_serializing_if = "Vec::is_empty")]
                pub $field: Vec<$item>,
            )*
            /// Fields that the API does not have.
            #[serde(skip_serializing_if = "is_default")]
            pub palisade: PalisadeFilter,
            /// Fields of the API that are not stable.
            #[serde(skip_serializing_if = "is_default")]
            pub experimental: Experimental,
        }
    };
}

message! {
    /// A filter with the fields of `flow.FlowFilter` under their names. For each field that is not empty, one of its values
    /// must match the flow. [`FlowFilter::compile`](super::FlowFilter::compile) checks the values.
    ApiFilter {
        /// Identifiers of flows.
        uuid: String,
        /// Addresses or prefixes of the source.
        source_ip: String,
        /// Addresses of the source after NAT. Palisade does not support this field.
        source_ip_xlated: String,
        /// `[NAMESPACE/]PREFIX` of the name of the source; without a namespace `default`, with an empty one any.
        source_pod: String,
        /// Names of the source address; `*` stands for any text.
        source_fqdn: String,
        /// Label selectors of the source.
        source_label: String,
        /// Kubernetes services of the source. Palisade does not support this field.
        source_service: String,
        /// Workloads of the source.
        source_workload: Workload,
        /// Clusters of the source. Palisade does not support this field.
        source_cluster_name: String,
        /// Addresses or prefixes of the destination.
        destination_ip: String,
        /// `[NAMESPACE/]PREFIX` of the name of the destination, as in `source_pod`.
        destination_pod: String,
        /// Names of the destination address; `*` stands for any text.
        destination_fqdn: String,
        /// Label selectors of the destination.
        destination_label: String,
        /// Kubernetes services of the destination. Palisade does not support this field.
        destination_service: String,
        /// Workloads of the destination.
        destination_workload: Workload,
        /// Clusters of the destination. Palisade does not support this field.
        destination_cluster_name: String,
        /// `INGRESS` or `EGRESS`, or their numbers.
        traffic_direction: EnumValue,
        /// Names or numbers of verdicts.
        verdict: EnumValue,
        /// Names or numbers of drop reasons.
        drop_reason_desc: EnumValue,
        /// Interfaces.
        interface: InterfaceFilter,
        /// Types of events.
        event_type: EventTypeFilter,
        /// HTTP status codes, or their first digits with a `+`.
        http_status_code: String,
        /// Protocols: `tcp`, `dns`, ...
        protocol: String,
        /// Ports of the source, or ranges such as `8000-8999`.
        source_port: String,
        /// Ports of the destination, or ranges.
        destination_port: String,
        /// Whether the packet is of the reply direction.
        reply: bool,
        /// Regular expressions for the name in a DNS message.
        dns_query: String,
        /// Identities of the source.
        source_identity: u32,
        /// Identities of the destination.
        destination_identity: u32,
        /// HTTP methods.
        http_method: String,
        /// Regular expressions for the path of an HTTP request.
        http_path: String,
        /// Regular expressions for the URL of an HTTP request.
        http_url: String,
        /// Header fields of an HTTP message.
        http_header: HttpHeader,
        /// TCP flags by name; a packet must have all flags that are true.
        tcp_flags: BTreeMap<String, bool>,
        /// Names of nodes; `*` stands for any text.
        node_name: String,
        /// Label selectors of nodes.
        node_labels: String,
        /// `IPv4`, `IPv6`, or `IP_NOT_USED` for frames that are not IP, or their numbers.
        ip_version: EnumValue,
        /// Identifiers of distributed traces.
        trace_id: String,
        /// Trace identifiers in IP options. Palisade does not support this field.
        ip_trace_id: u64,
        /// Types of IP options with trace identifiers. Palisade does not support this field.
        ip_trace_option: u32,
        /// Whether the packet is encrypted. Palisade does not support this field.
        encrypted: bool,
    }
}

/// Fields of a filter that the API does not have.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PalisadeFilter {
    /// Sources: `[NAMESPACE/]PREFIX` of the name, where no namespace means any, or the number of an endpoint.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub source_endpoint: Vec<String>,
    /// Destinations, as in `source_endpoint`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destination_endpoint: Vec<String>,
    /// Server names of TLS ClientHellos; `*` stands for any text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sni: Vec<String>,
}

/// Fields of a filter that the API calls experimental. Palisade supports none of them.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Experimental {
    /// Expressions in the Common Expression Language.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cel_expression: Vec<String>,
}

/// Type of event (`flow.EventTypeFilter`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EventTypeFilter {
    /// Number of the type; 0 matches every type.
    #[serde(rename = "type", skip_serializing_if = "is_default")]
    pub kind: i32,
    /// Whether `sub_type` must match.
    #[serde(skip_serializing_if = "is_default")]
    pub match_sub_type: bool,
    /// Drop reason or trace point.
    #[serde(skip_serializing_if = "is_default")]
    pub sub_type: i32,
}

/// Interface, by its name, its index or both (`flow.NetworkInterface`).
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InterfaceFilter {
    /// Index; 0 matches every index.
    #[serde(skip_serializing_if = "is_default")]
    pub index: u32,
    /// Name; an empty name matches every interface.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
}

/// Value of an enumeration: a name, or a number as text. JSON can contain both, as protobuf allows.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
#[serde(transparent)]
pub struct EnumValue(pub String);

impl From<&str> for EnumValue {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl From<i32> for EnumValue {
    fn from(number: i32) -> Self {
        Self(number.to_string())
    }
}

impl<'de> Deserialize<'de> for EnumValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = EnumValue;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a name or a number")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<EnumValue, E> {
                Ok(EnumValue(text.into()))
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<EnumValue, E> {
                Ok(EnumValue(number.to_string()))
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<EnumValue, E> {
                Ok(EnumValue(number.to_string()))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

/// Filters of one request, in the form of the flow API.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ApiFilters {
    /// Filters, one of which must match unless the list is empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allowlist: Vec<ApiFilter>,
    /// Filters that must not match.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub denylist: Vec<ApiFilter>,
    /// Earliest time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// Latest time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
