//! The flow record. Names, enumerations and their numbers are those of the public flow API (`flow.proto`) in its JSON
//! form: proto field names, no fields with default values, 64-bit integers as strings. Fields that the API does not
//! have are in the object `palisade`.

use std::{borrow::Cow, fmt, net::IpAddr, sync::Arc};

use palisade_abi::{identity, protocol};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use strum::{AsRefStr, EnumString, VariantArray};

use crate::{Timestamp, Uuid, drop_reason::DropReason};

/// Verdict on a packet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, AsRefStr, EnumString, VariantArray)]
#[strum(ascii_case_insensitive, serialize_all = "SCREAMING_SNAKE_CASE")]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Verdict {
    /// Unknown verdict.
    #[default]
    #[strum(serialize = "VERDICT_UNKNOWN")]
    #[serde(rename = "VERDICT_UNKNOWN")]
    Unknown = 0,
    /// Forwarded.
    Forwarded = 1,
    /// Dropped.
    Dropped = 2,
    /// An error in processing.
    Error = 3,
    /// Forwarded only because of audit mode.
    Audit = 4,
    /// Punted to an inspector.
    Redirected = 5,
    /// Reported by a trace, without a verdict.
    Traced = 6,
    /// Translated by NAT.
    Translated = 7,
}

/// Kind of record.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, AsRefStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum FlowType {
    /// Record of a packet.
    #[default]
    #[strum(serialize = "L3_L4")]
    #[serde(rename = "L3_L4")]
    L3L4 = 1,
    /// Record of an application message.
    L7 = 2,
    /// Record of a socket operation. Palisade makes none.
    Sock = 3,
}

/// Direction of an application message.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, AsRefStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum L7Type {
    /// Unknown direction.
    #[default]
    #[strum(serialize = "UNKNOWN_L7_TYPE")]
    #[serde(rename = "UNKNOWN_L7_TYPE")]
    Unknown = 0,
    /// Request or query.
    Request = 1,
    /// Response.
    Response = 2,
    /// Sample of a stream. Palisade makes none.
    Sample = 3,
}

/// Direction of the connection, seen from the endpoint whose policy decided.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, AsRefStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TrafficDirection {
    /// Unknown direction.
    #[default]
    #[strum(serialize = "TRAFFIC_DIRECTION_UNKNOWN")]
    #[serde(rename = "TRAFFIC_DIRECTION_UNKNOWN")]
    Unknown = 0,
    /// Towards the endpoint.
    Ingress = 1,
    /// From the endpoint.
    Egress = 2,
}

/// Point where a packet was observed, named after its next hop or the previous one. Palisade reports `ToHost`,
/// `ToStack`, `ToNetwork` and `ToEndpoint`; the others are in flows of Cilium.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, AsRefStr, VariantArray)]
#[strum(serialize_all = "kebab-case")]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TracePoint {
    /// Not a trace.
    #[default]
    #[strum(serialize = "unknown-point")]
    #[serde(rename = "UNKNOWN_POINT")]
    Unknown = 0,
    /// Towards a proxy.
    ToProxy = 1,
    /// Towards the node itself.
    ToHost = 2,
    /// From a workload towards the network stack of the node.
    ToStack = 3,
    /// Towards a tunnel.
    ToOverlay = 4,
    /// From a workload.
    FromEndpoint = 5,
    /// From a proxy.
    FromProxy = 6,
    /// From the node itself.
    FromHost = 7,
    /// From the network stack of the node.
    FromStack = 8,
    /// From a tunnel.
    FromOverlay = 9,
    /// From a NIC.
    FromNetwork = 10,
    /// From the node towards a NIC.
    ToNetwork = 11,
    /// From decryption.
    FromCrypto = 12,
    /// Towards encryption.
    ToCrypto = 13,
    /// Towards a workload.
    ToEndpoint = 101,
}

impl TracePoint {
    /// Returns the number for the `sub_type` of an event. Hubble uses 0 for `TO_ENDPOINT` there.
    #[must_use]
    pub const fn sub_type(self) -> i32 {
        match self {
            Self::ToEndpoint | Self::Unknown => 0,
            other => other as i32,
        }
    }
}

/// IP version.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, AsRefStr, VariantArray)]
pub enum IpVersion {
    /// Not an IP packet.
    #[default]
    #[strum(serialize = "IP_NOT_USED")]
    #[serde(rename = "IP_NOT_USED")]
    NotUsed = 0,
    /// IPv4.
    #[strum(serialize = "IPv4")]
    #[serde(rename = "IPv4")]
    V4 = 1,
    /// IPv6.
    #[strum(serialize = "IPv6")]
    #[serde(rename = "IPv6")]
    V6 = 2,
}

/// Implements `Deserialize` for an enumeration of the API: from a name or a number, as the JSON form of protobuf allows.
/// A value that is not known, from a newer version of the API, becomes the default.
macro_rules! api_enum {
    ($($name:ident),*) => {
        $(impl $name {
            /// Returns the value with this number in the API.
            #[must_use]
            pub fn from_number(number: i64) -> Option<Self> {
                Self::VARIANTS.iter().copied().find(|value| *value as i64 == number)
            }

            /// Returns the value with this name in the API, case-insensitively, with `-` or `_` between words.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                Self::VARIANTS.iter().copied().find(|value| same_name(value.as_ref(), name))
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(EnumVisitor {
                    by_name: Self::from_name,
                    by_number: Self::from_number,
                })
            }
        })*
    };
}

api_enum!(Verdict, FlowType, L7Type, TrafficDirection, TracePoint, IpVersion);

fn same_name(known: &str, name: &str) -> bool {
    let letter = |byte: u8| match byte {
        b'-' => b'_',
        other => other.to_ascii_uppercase(),
    };
    known.len() == name.len() && known.bytes().map(letter).eq(name.bytes().map(letter))
}

struct EnumVisitor<T> {
    by_name: fn(&str) -> Option<T>,
    by_number: fn(i64) -> Option<T>,
}

impl<T: Default> de::Visitor<'_> for EnumVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name or number of a value")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<T, E> {
        Ok((self.by_name)(name).unwrap_or_default())
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        Ok((self.by_number)(number).unwrap_or_default())
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        Ok(i64::try_from(number)
            .ok()
            .and_then(self.by_number)
            .unwrap_or_default())
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Values of [`EventType::kind`].
pub mod event_type {
    /// Drop; the sub-type is the reason.
    pub const DROP: i32 = 1;
    /// Captured packet of a debug build of Cilium. Palisade reports none.
    pub const CAPTURE: i32 = 3;
    /// Trace; the sub-type is the trace point.
    pub const TRACE: i32 = 4;
    /// Policy verdict.
    pub const POLICY_VERDICT: i32 = 5;
    /// Trace of a socket operation. Palisade reports none.
    pub const TRACE_SOCK: i32 = 7;
    /// Record of an application message.
    pub const ACCESS_LOG: i32 = 129;
    /// Names of the types on the command line, and their numbers.
    pub const NAMES: &[(&str, i32)] = &[
        ("trace", TRACE),
        ("drop", DROP),
        ("policy-verdict", POLICY_VERDICT),
        ("l7", ACCESS_LOG),
        ("capture", CAPTURE),
        ("trace-sock", TRACE_SOCK),
    ];
}

/// Flow record: one packet or application message, and its verdict.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Flow {
    /// Time of the packet or message.
    pub time: Timestamp,
    /// Identifier; the ring sets it.
    #[serde(skip_serializing_if = "Uuid::is_none")]
    pub uuid: Uuid,
    /// Verdict.
    pub verdict: Verdict,
    /// Number of the drop reason; 0 if not dropped.
    #[serde(skip_serializing_if = "is_default")]
    pub drop_reason: u32,
    /// Link layer addresses, if the interface has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ethernet: Option<Ethernet>,
    /// Network layer; absent for frames that are not IP.
    #[serde(
        rename = "IP",
        skip_serializing_if = "Option::is_none",
        deserialize_with = "foreign::ip"
    )]
    pub ip: Option<Ip>,
    /// Transport layer; absent if the API has no type for the protocol or the packet has no transport header.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "foreign::layer4")]
    pub l4: Option<Layer4>,
    /// Sender of the packet.
    pub source: Endpoint,
    /// Receiver of the packet.
    pub destination: Endpoint,
    /// Names that the endpoint whose policy decided has resolved to the source address.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub source_names: Arc<[Arc<str>]>,
    /// Names that the endpoint whose policy decided has resolved to the destination address.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub destination_names: Arc<[Arc<str>]>,
    /// Application message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub l7: Option<Box<Layer7>>,
    /// Kind of record.
    #[serde(rename = "Type")]
    pub flow_type: FlowType,
    /// Name of the node that recorded the flow.
    #[serde(skip_serializing_if = "is_empty")]
    pub node_name: Arc<str>,
    /// Labels of that node, `key=value`.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub node_labels: Arc<[Arc<str>]>,
    /// Kind of event.
    pub event_type: EventType,
    /// Direction of the connection.
    #[serde(skip_serializing_if = "is_default")]
    pub traffic_direction: TrafficDirection,
    /// Kind of match of the deciding rule ([`palisade_abi::MatchKind`]), for policy verdicts.
    #[serde(skip_serializing_if = "is_default")]
    pub policy_match_type: u32,
    /// Trace point, for traces.
    #[serde(skip_serializing_if = "is_default")]
    pub trace_observation_point: TracePoint,
    /// Drop reason.
    #[serde(skip_serializing_if = "is_default")]
    pub drop_reason_desc: DropReason,
    /// Whether the packet is of the reply direction; absent if the direction is unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_reply: Option<bool>,
    /// Interface at which the packet was observed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interface: Option<NetworkInterface>,
    /// Distributed trace of an HTTP message, if its recorded header fields have one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_context: Option<Box<TraceContext>>,
    /// Policies that allowed the packet, if the connection is egress of the endpoint.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub egress_allowed_by: Arc<[Policy]>,
    /// Policies that allowed the packet, if the connection is ingress of the endpoint.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub ingress_allowed_by: Arc<[Policy]>,
    /// Policies that denied the packet, if the connection is egress of the endpoint: by a deny rule, or because they
    /// cause the default deny. A packet that passed because of audit mode counts as denied.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub egress_denied_by: Arc<[Policy]>,
    /// Policies that denied the packet, as in `egress_denied_by`, if the connection is ingress of the endpoint.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub ingress_denied_by: Arc<[Policy]>,
    /// Fields that the API does not have.
    pub palisade: Extra,
    /// Summary of the packet or message as text.
    #[serde(rename = "Summary", skip_serializing_if = "String::is_empty")]
    pub summary: String,
}

impl Flow {
    /// Returns whether this is the record of an application message.
    #[must_use]
    pub fn is_l7(&self) -> bool {
        self.flow_type == FlowType::L7
    }

    /// Returns the IP protocol number; that of the transport layer in flows of other programs, 0 if unknown.
    #[must_use]
    pub fn protocol(&self) -> u8 {
        match (self.palisade.protocol, self.l4) {
            (0, Some(Layer4::Tcp { .. })) => protocol::TCP,
            (0, Some(Layer4::Udp { .. })) => protocol::UDP,
            (0, Some(Layer4::Sctp { .. })) => protocol::SCTP,
            (0, Some(Layer4::Icmpv4 { .. })) => protocol::ICMP,
            (0, Some(Layer4::Icmpv6 { .. })) => protocol::ICMPV6,
            (known, _) => known,
        }
    }

    /// Returns the identifier of the distributed trace, if there is one.
    #[must_use]
    pub fn trace_id(&self) -> Option<&str> {
        let parent = self.trace_context.as_ref()?.parent.as_ref()?;
        Some(&parent.trace_id)
    }
}

/// Distributed trace to which a message belongs (W3C Trace Context).
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TraceContext {
    /// Request of the trace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<TraceParent>,
}

/// Request of a distributed trace.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TraceParent {
    /// Identifier of the trace, 32 hexadecimal digits.
    pub trace_id: String,
}

fn is_empty(text: &str) -> bool {
    text.is_empty()
}

/// Fields that the flow API does not have.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Extra {
    /// Text of the reason of the verdict.
    #[serde(skip_serializing_if = "is_empty")]
    pub reason: Cow<'static, str>,
    /// Rule that decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<Rule>,
    /// Whether the packet would have been dropped without audit mode.
    #[serde(skip_serializing_if = "is_default")]
    pub audit: bool,
    /// IP protocol number; 0 if unknown.
    #[serde(skip_serializing_if = "is_default")]
    pub protocol: u8,
    /// EtherType of a frame that is not IP.
    #[serde(skip_serializing_if = "is_default")]
    pub ether_type: u16,
    /// Length of the packet from the network header to the end, bytes.
    #[serde(skip_serializing_if = "is_default")]
    pub length: u32,
    /// Whether the packet is a fragment without a transport header.
    #[serde(skip_serializing_if = "is_default")]
    pub fragment: bool,
    /// Whether the packet is an ICMP error about another flow.
    #[serde(skip_serializing_if = "is_default")]
    pub related: bool,
    /// Whether a dropped packet is of the reply direction. The API reports the direction of drops as unknown.
    #[serde(skip_serializing_if = "is_default")]
    pub reply: bool,
    /// TLS ClientHello, for which the flow API has no type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Box<Tls>>,
    /// Client id of a Kafka request, for which the flow API has no field.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub client_id: String,
    /// Content length of an HTTP response, bytes, if its header has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_length: Option<u64>,
    /// Progress of the flow, for traces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
}

/// Rule that decided, or the default deny.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Rule {
    /// Number of the rule in the policy table.
    pub id: u32,
    /// Description of the rule.
    #[serde(skip_serializing_if = "is_empty")]
    pub text: Arc<str>,
    /// `FILE:LINE` of the rule.
    #[serde(skip_serializing_if = "is_empty")]
    pub location: Arc<str>,
    /// Whether the default deny decided: no rule allows the packet.
    #[serde(skip_serializing_if = "is_default")]
    pub default_deny: bool,
    /// Policies of the decision, as [`Policy::qualified_name`]; empty if no policy applies.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<Arc<str>>,
}

/// Progress of a flow: its packets and bytes so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// Occasion of the report.
    pub at: Moment,
    /// Packets of the original direction.
    pub forward_packets: u64,
    /// Bytes of the original direction.
    pub forward_bytes: u64,
    /// Packets of the reply direction.
    pub reply_packets: u64,
    /// Bytes of the reply direction.
    pub reply_bytes: u64,
}

/// Occasion of a progress report.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Moment {
    /// First packet of the flow.
    Start,
    /// Periodic report of an active flow.
    Interval,
    /// End of the flow.
    End,
}

/// Link layer addresses.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Ethernet {
    /// Sender.
    pub source: Mac,
    /// Receiver.
    pub destination: Mac,
}

/// MAC address, written `02:00:5e:00:53:01`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        let mut mac = [0; 6];
        if text.is_empty() {
            return Ok(Self(mac));
        }
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts
                .next()
                .ok_or_else(|| de::Error::custom("a MAC address has six bytes"))?;
            *byte = u8::from_str_radix(part, 16).map_err(de::Error::custom)?;
        }
        Ok(Self(mac))
    }
}

/// Network layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Ip {
    /// Sender.
    pub source: IpAddr,
    /// Receiver.
    pub destination: IpAddr,
    /// Version.
    #[serde(rename = "ipVersion")]
    pub version: IpVersion,
}

/// Transport layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub enum Layer4 {
    /// TCP.
    #[serde(rename = "TCP")]
    Tcp {
        /// Source port.
        #[serde(skip_serializing_if = "is_default")]
        source_port: u16,
        /// Destination port.
        #[serde(skip_serializing_if = "is_default")]
        destination_port: u16,
        /// Flags.
        flags: TcpFlags,
    },
    /// UDP.
    #[serde(rename = "UDP")]
    Udp {
        /// Source port.
        #[serde(skip_serializing_if = "is_default")]
        source_port: u16,
        /// Destination port.
        #[serde(skip_serializing_if = "is_default")]
        destination_port: u16,
    },
    /// ICMP.
    #[serde(rename = "ICMPv4")]
    Icmpv4 {
        /// Type.
        #[serde(rename = "type", skip_serializing_if = "is_default")]
        kind: u8,
        /// Code.
        #[serde(skip_serializing_if = "is_default")]
        code: u8,
    },
    /// ICMPv6.
    #[serde(rename = "ICMPv6")]
    Icmpv6 {
        /// Type.
        #[serde(rename = "type", skip_serializing_if = "is_default")]
        kind: u8,
        /// Code.
        #[serde(skip_serializing_if = "is_default")]
        code: u8,
    },
    /// SCTP.
    #[serde(rename = "SCTP")]
    Sctp {
        /// Source port.
        #[serde(skip_serializing_if = "is_default")]
        source_port: u16,
        /// Destination port.
        #[serde(skip_serializing_if = "is_default")]
        destination_port: u16,
    },
}

impl Layer4 {
    /// Returns source and destination port, if the protocol has ports.
    #[must_use]
    pub const fn ports(self) -> Option<(u16, u16)> {
        match self {
            Self::Tcp {
                source_port,
                destination_port,
                ..
            }
            | Self::Udp {
                source_port,
                destination_port,
            }
            | Self::Sctp {
                source_port,
                destination_port,
            } => Some((source_port, destination_port)),
            Self::Icmpv4 { .. } | Self::Icmpv6 { .. } => None,
        }
    }
}

/// Flags byte of a TCP header (RFC 9293, section 3.1). The crate `bitflags` does not fit: Hubble lists the flags in an
/// order other than that of the bits, and as a JSON object.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TcpFlags(pub u8);

/// Flag bits and names, in the order in which Hubble lists them.
const TCP_FLAG_NAMES: [(u8, &str); 8] = [
    (0x02, "SYN"),
    (0x10, "ACK"),
    (0x04, "RST"),
    (0x01, "FIN"),
    (0x08, "PSH"),
    (0x20, "URG"),
    (0x40, "ECE"),
    (0x80, "CWR"),
];

impl TcpFlags {
    /// Returns the names of the set flags.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        TCP_FLAG_NAMES
            .iter()
            .filter(move |(bit, _)| self.0 & bit != 0)
            .map(|(_, name)| *name)
    }

    /// Returns the bit of a flag by its name, case-insensitively.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        TCP_FLAG_NAMES
            .iter()
            .find(|(_, known)| known.eq_ignore_ascii_case(name))
            .map(|(bit, _)| Self(*bit))
    }
}

impl Serialize for TcpFlags {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.names().map(|name| (name, true)))
    }
}

impl<'de> Deserialize<'de> for TcpFlags {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let set = std::collections::BTreeMap::<Cow<'de, str>, bool>::deserialize(deserializer)?;
        let bits = set
            .iter()
            .filter(|(_, on)| **on)
            .filter_map(|(name, _)| Self::from_name(name));
        Ok(Self(bits.fold(0, |flags, bit| flags | bit.0)))
    }
}

/// Application message.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Layer7 {
    /// Request or response.
    #[serde(rename = "type", skip_serializing_if = "is_default")]
    pub kind: L7Type,
    /// Time from the request to this response, ns; 0 for requests.
    #[serde(with = "u64_text", skip_serializing_if = "is_default")]
    pub latency_ns: u64,
    /// DNS message. This field, `http` and `kafka` are absent if the message could not be parsed, or if the API has no
    /// type for its protocol (see [`Extra::tls`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns: Option<Dns>,
    /// HTTP message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<Http>,
    /// Kafka message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kafka: Option<Kafka>,
}

/// Kafka message.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Kafka {
    /// Error code of the response, or of the one that denies the request.
    #[serde(skip_serializing_if = "is_default")]
    pub error_code: i32,
    /// API version.
    #[serde(skip_serializing_if = "is_default")]
    pub api_version: i32,
    /// Name of the API key, or its number.
    #[serde(skip_serializing_if = "is_empty")]
    pub api_key: Cow<'static, str>,
    /// Correlation id.
    #[serde(skip_serializing_if = "is_default")]
    pub correlation_id: i32,
    /// First topic of the request, or the one that is denied, with visible ASCII characters only.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub topic: String,
}

/// HTTP message.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Http {
    /// Status code, for responses.
    #[serde(skip_serializing_if = "is_default")]
    pub code: u32,
    /// Method of the request. The record of the response repeats the method.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub method: String,
    /// URL of the request, without secrets and with visible ASCII characters only. The record of the response repeats
    /// the URL.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub url: String,
    /// Protocol version, such as `HTTP/1.1`.
    #[serde(skip_serializing_if = "is_empty")]
    pub protocol: Cow<'static, str>,
    /// Configured header fields, without secrets.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<HttpHeader>,
}

/// Header field of an HTTP message.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HttpHeader {
    /// Name, in lower case.
    pub key: String,
    /// Value.
    pub value: String,
}

/// TLS ClientHello.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Tls {
    /// Server name (SNI), in lower case and without a final dot; absent if the ClientHello has none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub server_name: String,
    /// Highest offered version, such as `TLS 1.3`.
    #[serde(skip_serializing_if = "is_empty")]
    pub version: Cow<'static, str>,
    /// Whether the ClientHello contains an encrypted ClientHello (ECH). If so, `server_name` is the name in the outer
    /// ClientHello.
    #[serde(skip_serializing_if = "is_default")]
    pub ech: bool,
}

/// DNS message.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Name of the question, with its final dot.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub query: String,
    /// First addresses of the answer.
    #[serde(
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "foreign::addresses"
    )]
    pub ips: Vec<IpAddr>,
    /// Lowest TTL of the answer, s.
    #[serde(skip_serializing_if = "is_default")]
    pub ttl: u32,
    /// Targets of the CNAME records.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cnames: Vec<String>,
    /// Source of the record: `proxy`, which is what the API calls an inspector.
    #[serde(skip_serializing_if = "is_empty")]
    pub observation_source: Cow<'static, str>,
    /// Response code.
    #[serde(skip_serializing_if = "is_default")]
    pub rcode: u32,
    /// Types of the question.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub qtypes: Vec<Cow<'static, str>>,
    /// Types of the records of the answer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rrtypes: Vec<Cow<'static, str>>,
}

/// One end of a flow.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Endpoint {
    /// Number of the endpoint; 0 if this end is not an endpoint of this node.
    #[serde(rename = "ID", skip_serializing_if = "is_default")]
    pub id: u32,
    /// Numeric identity; 0 if it was not looked up.
    #[serde(skip_serializing_if = "is_default")]
    pub identity: u32,
    /// Name of the cluster; empty in flows of Palisade, since a node belongs to no cluster.
    #[serde(skip_serializing_if = "is_empty")]
    pub cluster_name: Arc<str>,
    /// Namespace.
    #[serde(skip_serializing_if = "is_empty")]
    pub namespace: Arc<str>,
    /// Labels of the identity, `source:key=value`.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub labels: Arc<[Arc<str>]>,
    /// Name of the endpoint, or of the peer.
    #[serde(skip_serializing_if = "is_empty")]
    pub pod_name: Arc<str>,
    /// Workloads of the endpoint.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub workloads: Arc<[Workload]>,
}

/// Workload to which an endpoint belongs.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Workload {
    /// Name.
    #[serde(skip_serializing_if = "is_empty")]
    pub name: Arc<str>,
    /// Kind, such as `Pod` or `Deployment`.
    #[serde(skip_serializing_if = "is_empty")]
    pub kind: Arc<str>,
}

impl Workload {
    /// Returns the workloads of an endpoint or peer with this name: one of kind `Pod`, which is the kind that Cilium
    /// reports for a pod without a controller.
    #[must_use]
    pub fn of_endpoint(name: &Arc<str>) -> Arc<[Self]> {
        if name.is_empty() {
            return Arc::default();
        }
        [Self {
            name: Arc::clone(name),
            kind: "Pod".into(),
        }]
        .into()
    }
}

fn is_slice_empty<T>(slice: &[T]) -> bool {
    slice.is_empty()
}

/// Returns the name of a reserved identity.
#[must_use]
pub const fn reserved_name(number: u32) -> Option<&'static str> {
    Some(match number {
        0 => "unknown",
        identity::HOST => "host",
        identity::WORLD => "world",
        identity::UNMANAGED => "unmanaged",
        identity::HEALTH => "health",
        identity::INIT => "init",
        identity::REMOTE_NODE => "remote-node",
        identity::KUBE_APISERVER => "kube-apiserver",
        identity::INGRESS => "ingress",
        identity::WORLD_IPV4 => "world-ipv4",
        identity::WORLD_IPV6 => "world-ipv6",
        _ => return None,
    })
}

/// Kind of event.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct EventType {
    /// Number of the event type.
    #[serde(rename = "type")]
    pub kind: i32,
    /// Drop reason or trace point.
    #[serde(skip_serializing_if = "is_default")]
    pub sub_type: i32,
}

/// Network interface.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkInterface {
    /// Index.
    pub index: u32,
    /// Name, if known.
    #[serde(skip_serializing_if = "is_empty")]
    pub name: Arc<str>,
}

/// Policy that decided.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// Name.
    pub name: Arc<str>,
    /// Namespace, if it has one.
    #[serde(skip_serializing_if = "is_empty")]
    pub namespace: Arc<str>,
    /// Labels of the policy itself.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub labels: Arc<[Arc<str>]>,
    /// Revision of the policies in force when the flow was recorded; 0 if unknown.
    #[serde(with = "u64_text", skip_serializing_if = "is_default")]
    pub revision: u64,
    /// Kind of resource, such as `CiliumNetworkPolicy` or `NetworkPolicy`.
    #[serde(skip_serializing_if = "is_empty")]
    pub kind: Arc<str>,
}

impl Policy {
    /// Returns `namespace/name`, or only the name if there is no namespace.
    #[must_use]
    pub fn qualified_name(&self) -> Arc<str> {
        if self.namespace.is_empty() {
            Arc::clone(&self.name)
        } else {
            format!("{}/{}", self.namespace, self.name).into()
        }
    }
}

/// 64-bit integers are strings in the JSON form of protobuf, because JavaScript numbers have 53 bits.
mod u64_text {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form<'a> {
            Number(u64),
            Text(std::borrow::Cow<'a, str>),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(number) => Ok(number),
            Form::Text(text) => text.parse().map_err(de::Error::custom),
        }
    }
}

/// Fields of flows that other programs wrote: values that [`Flow`] cannot hold are left out, instead of making the flow
/// unreadable.
mod foreign {
    use std::net::IpAddr;

    use serde::{Deserialize, Deserializer};

    use super::{Ip, IpVersion, Layer4, TcpFlags};

    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Addresses<'a> {
        #[serde(borrow)]
        source: std::borrow::Cow<'a, str>,
        #[serde(borrow)]
        destination: std::borrow::Cow<'a, str>,
    }

    pub(super) fn ip<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Ip>, D::Error> {
        let addresses = Option::<Addresses<'de>>::deserialize(deserializer)?.unwrap_or_default();
        let ends = (addresses.source.parse(), addresses.destination.parse());
        Ok(match ends {
            (Ok(source), Ok(destination)) => Some(Ip {
                source,
                destination,
                version: match source {
                    IpAddr::V4(_) => IpVersion::V4,
                    IpAddr::V6(_) => IpVersion::V6,
                },
            }),
            _ => None,
        })
    }

    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Ports {
        source_port: u16,
        destination_port: u16,
        flags: TcpFlags,
    }

    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Icmp {
        #[serde(rename = "type")]
        kind: u8,
        code: u8,
    }

    #[derive(Deserialize, Default)]
    #[serde(default, rename_all = "UPPERCASE")]
    struct Protocols {
        tcp: Option<Ports>,
        udp: Option<Ports>,
        sctp: Option<Ports>,
        #[serde(rename = "ICMPv4")]
        icmpv4: Option<Icmp>,
        #[serde(rename = "ICMPv6")]
        icmpv6: Option<Icmp>,
    }

    pub(super) fn layer4<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Layer4>, D::Error> {
        let protocols = Option::<Protocols>::deserialize(deserializer)?.unwrap_or_default();
        let udp = |ports: Ports| Layer4::Udp {
            source_port: ports.source_port,
            destination_port: ports.destination_port,
        };
        let sctp = |ports: Ports| Layer4::Sctp {
            source_port: ports.source_port,
            destination_port: ports.destination_port,
        };
        let tcp = protocols.tcp.map(|tcp| Layer4::Tcp {
            source_port: tcp.source_port,
            destination_port: tcp.destination_port,
            flags: tcp.flags,
        });
        let icmpv4 = protocols.icmpv4.map(|icmp| Layer4::Icmpv4 {
            kind: icmp.kind,
            code: icmp.code,
        });
        let icmpv6 = protocols.icmpv6.map(|icmp| Layer4::Icmpv6 {
            kind: icmp.kind,
            code: icmp.code,
        });
        Ok(tcp
            .or(protocols.udp.map(udp))
            .or(protocols.sctp.map(sctp))
            .or(icmpv4)
            .or(icmpv6))
    }

    pub(super) fn addresses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpAddr>, D::Error> {
        let texts = Vec::<std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        Ok(texts.iter().filter_map(|text| text.parse().ok()).collect())
    }
}
