//! The flow record. Names, enumerations and their numbers are those of the public flow API (`flow.proto`) in its
//! JSON form: proto field names, nothing that has its default value, 64-bit integers as strings. What that API
//! has no field for is under `palisade`.

use std::{borrow::Cow, fmt, net::IpAddr, sync::Arc};

use palisade_abi::{Reason, identity};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use strum::{AsRefStr, EnumString, VariantArray};

use crate::Timestamp;

/// What happened to the packet.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    Debug,
    Default,
    Serialize,
    Deserialize,
    AsRefStr,
    EnumString,
    VariantArray,
)]
#[strum(ascii_case_insensitive, serialize_all = "SCREAMING_SNAKE_CASE")]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Verdict {
    /// Not known.
    #[default]
    #[strum(serialize = "VERDICT_UNKNOWN")]
    #[serde(rename = "VERDICT_UNKNOWN")]
    Unknown = 0,
    /// Passed.
    Forwarded = 1,
    /// Dropped.
    Dropped = 2,
    /// An error in processing.
    Error = 3,
    /// Passed because of audit mode only.
    Audit = 4,
    /// Sent to an inspector.
    Redirected = 5,
    /// Seen, no verdict yet.
    Traced = 6,
    /// Address translated.
    Translated = 7,
}

/// Kind of record.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum FlowType {
    /// About packets.
    #[default]
    #[serde(rename = "L3_L4")]
    L3L4 = 1,
    /// About what was read of application traffic.
    L7 = 2,
}

/// Which side of an application's exchange a record is about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum L7Type {
    /// Not known.
    #[default]
    #[serde(rename = "UNKNOWN_L7_TYPE")]
    Unknown = 0,
    /// What was asked.
    Request = 1,
    /// What was answered.
    Response = 2,
}

/// Direction of the connection, as the endpoint sees it whose policy was asked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize, AsRefStr)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TrafficDirection {
    /// Not known.
    #[default]
    #[strum(serialize = "TRAFFIC_DIRECTION_UNKNOWN")]
    #[serde(rename = "TRAFFIC_DIRECTION_UNKNOWN")]
    Unknown = 0,
    /// Towards the endpoint.
    Ingress = 1,
    /// From the endpoint.
    Egress = 2,
}

/// Where a packet was seen, and where it goes next.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize, AsRefStr, VariantArray,
)]
#[strum(serialize_all = "kebab-case")]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TracePoint {
    /// Not a trace.
    #[default]
    #[serde(rename = "UNKNOWN_POINT")]
    Unknown = 0,
    /// To the node itself.
    ToHost = 2,
    /// From a workload into the node's network stack.
    ToStack = 3,
    /// From the node out of a NIC.
    ToNetwork = 11,
    /// To a workload.
    ToEndpoint = 101,
}

impl TracePoint {
    /// The number in an event's `sub_type`, where "to an endpoint" is 0.
    #[must_use]
    pub const fn sub_type(self) -> i32 {
        match self {
            Self::ToEndpoint | Self::Unknown => 0,
            other => other as i32,
        }
    }
}

/// IP version.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum IpVersion {
    /// No IP.
    #[default]
    #[serde(rename = "IP_NOT_USED")]
    NotUsed = 0,
    /// IPv4.
    #[serde(rename = "IPv4")]
    V4 = 1,
    /// IPv6.
    #[serde(rename = "IPv6")]
    V6 = 2,
}

/// Why a packet was dropped, by its number; 0: it was not. The JSON form has the API's name, or the number where
/// the API has no name for it (which is how JSON shows any enumeration value that is not known).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct DropReason(pub u8);

const DROP_REASON_NAMES: &[(Reason, &str)] = &[
    (Reason::InvalidSourceIp, "INVALID_SOURCE_IP"),
    (Reason::PolicyDenied, "POLICY_DENIED"),
    (Reason::InvalidPacket, "INVALID_PACKET_DROPPED"),
    (Reason::CtInvalidHeader, "CT_TRUNCATED_OR_INVALID_HEADER"),
    (Reason::UnknownL4, "CT_UNKNOWN_L4_PROTOCOL"),
    (Reason::UnsupportedL3, "UNSUPPORTED_L3_PROTOCOL"),
    (Reason::CtInsertionFailed, "CT_MAP_INSERTION_FAILED"),
    (Reason::InvalidIpv6Extension, "INVALID_IPV6_EXTENSION_HEADER"),
    (
        Reason::FragmentNotFound,
        "FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND",
    ),
    (Reason::PolicyDeniedByDenylist, "POLICY_DENY"),
    (Reason::AuthRequired, "AUTH_REQUIRED"),
];

impl DropReason {
    /// The API's name of it, if it has one.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        DROP_REASON_NAMES
            .iter()
            .find(|(reason, _)| *reason as u8 == self.0)
            .map(|(_, name)| *name)
    }

    /// What people read.
    #[must_use]
    pub fn text(self) -> Cow<'static, str> {
        match Reason::from_u8(self.0) {
            Some(reason) => Cow::Borrowed(reason.text()),
            None => Cow::Owned(self.0.to_string()),
        }
    }

    /// By number, by the API's name, or by the text people read.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        if let Ok(number) = name.parse() {
            return Some(Self(number));
        }
        let by_name = DROP_REASON_NAMES
            .iter()
            .find(|(_, known)| known.eq_ignore_ascii_case(name))
            .map(|(r, _)| *r);
        let by_text = || {
            Reason::ALL
                .iter()
                .copied()
                .find(|r| r.is_drop() && r.text().eq_ignore_ascii_case(name))
        };
        by_name.or_else(by_text).map(|reason| Self(reason as u8))
    }
}

impl Serialize for DropReason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.name() {
            Some(name) => serializer.serialize_str(name),
            None => serializer.serialize_u8(self.0),
        }
    }
}

impl<'de> Deserialize<'de> for DropReason {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form<'a> {
            Number(u8),
            Name(Cow<'a, str>),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(number) => Ok(Self(number)),
            Form::Name(name) => {
                Self::from_name(&name).ok_or_else(|| de::Error::custom(format!("unknown drop reason {name}")))
            }
        }
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Numbers of [`EventType::kind`].
pub mod event_type {
    /// A drop; the sub-type is the reason.
    pub const DROP: i32 = 1;
    /// A trace; the sub-type is the trace point.
    pub const TRACE: i32 = 4;
    /// A policy verdict.
    pub const POLICY_VERDICT: i32 = 5;
    /// A record of application traffic.
    pub const ACCESS_LOG: i32 = 129;
}

/// What a program saw of one packet, and what became of it.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Flow {
    /// When.
    pub time: Timestamp,
    /// What became of it.
    pub verdict: Verdict,
    /// The reason's number, if dropped.
    #[serde(skip_serializing_if = "is_default")]
    pub drop_reason: u32,
    /// Link layer, where the interface has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ethernet: Option<Ethernet>,
    /// Network layer; absent for frames that are not IP.
    #[serde(rename = "IP", skip_serializing_if = "Option::is_none")]
    pub ip: Option<Ip>,
    /// Transport, where it is one of those the API knows and its header was there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub l4: Option<Layer4>,
    /// Who sent the packet.
    pub source: Endpoint,
    /// To whom.
    pub destination: Endpoint,
    /// Names that the endpoint whose policy was asked got the source's address for.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub source_names: Arc<[Arc<str>]>,
    /// Names that it got the destination's address for.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub destination_names: Arc<[Arc<str>]>,
    /// What was read of application traffic.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub l7: Option<Box<Layer7>>,
    /// Kind of record.
    #[serde(rename = "Type")]
    pub flow_type: FlowType,
    /// The node that saw it.
    #[serde(skip_serializing_if = "is_empty")]
    pub node_name: Arc<str>,
    /// Kind of event.
    pub event_type: EventType,
    /// Direction of the connection.
    #[serde(skip_serializing_if = "is_default")]
    pub traffic_direction: TrafficDirection,
    /// How specific the deciding rule was ([`palisade_abi::MatchKind`]); of policy verdicts.
    #[serde(skip_serializing_if = "is_default")]
    pub policy_match_type: u32,
    /// Where it was seen; of traces.
    #[serde(skip_serializing_if = "is_default")]
    pub trace_observation_point: TracePoint,
    /// Why it was dropped.
    #[serde(skip_serializing_if = "is_default")]
    pub drop_reason_desc: DropReason,
    /// Whether the packet answers the connection; absent if that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_reply: Option<bool>,
    /// Where it was seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interface: Option<NetworkInterface>,
    /// The policy that let it leave the source.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub egress_allowed_by: Arc<[Policy]>,
    /// The policy that let it reach the destination.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub ingress_allowed_by: Arc<[Policy]>,
    /// The policies that did not let it leave the source: by a deny rule, or as the causes of the default deny.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub egress_denied_by: Arc<[Policy]>,
    /// The policies that did not let it reach the destination.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub ingress_denied_by: Arc<[Policy]>,
    /// What the API has no field for.
    pub palisade: Extra,
    /// The packet in words.
    #[serde(rename = "Summary", skip_serializing_if = "String::is_empty")]
    pub summary: String,
}

fn is_empty(text: &str) -> bool {
    text.is_empty()
}

/// What Palisade knows and the flow API has no field for.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Extra {
    /// The verdict's reason in words.
    #[serde(skip_serializing_if = "is_empty")]
    pub reason: Cow<'static, str>,
    /// What decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<Rule>,
    /// Would have been dropped, but for audit mode.
    #[serde(skip_serializing_if = "is_default")]
    pub audit: bool,
    /// IP protocol number; 0 if it is not known.
    #[serde(skip_serializing_if = "is_default")]
    pub protocol: u8,
    /// EtherType of a frame that is not IP.
    #[serde(skip_serializing_if = "is_default")]
    pub ether_type: u16,
    /// From the network header on, bytes.
    #[serde(skip_serializing_if = "is_default")]
    pub length: u32,
    /// A fragment whose ports are not known.
    #[serde(skip_serializing_if = "is_default")]
    pub fragment: bool,
    /// An ICMP error about another flow.
    #[serde(skip_serializing_if = "is_default")]
    pub related: bool,
    /// A TLS ClientHello, of which the flow API has no type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Box<Tls>>,
    /// Length of the body of an HTTP answer, where its head says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_length: Option<u64>,
    /// How far the flow is; of traces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
}

/// The rule that decided, or the default.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Rule {
    /// Its number in the policy table.
    pub id: u32,
    /// What decided, in words.
    #[serde(skip_serializing_if = "is_empty")]
    pub text: Arc<str>,
    /// `FILE:LINE` where it is written.
    #[serde(skip_serializing_if = "is_empty")]
    pub location: Arc<str>,
    /// No rule names it: the policies make everything denied that nothing allows.
    #[serde(skip_serializing_if = "is_default")]
    pub default_deny: bool,
    /// The policies, as [`Policy::qualified_name`]; empty if no policy had a say.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<Arc<str>>,
}

/// How far a flow is, and what it has carried.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// Which moment.
    pub at: Moment,
    /// Packets from the side that opened it.
    pub forward_packets: u64,
    /// Bytes from the side that opened it.
    pub forward_bytes: u64,
    /// Packets from the other side.
    pub reply_packets: u64,
    /// Bytes from the other side.
    pub reply_bytes: u64,
}

/// A moment of a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Moment {
    /// It begins.
    Start,
    /// It goes on.
    Interval,
    /// It ended.
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

/// A MAC address, written `02:00:5e:00:53:01`.
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
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
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
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Layer4 {
    /// TCP.
    #[serde(rename = "TCP")]
    Tcp {
        /// Source port.
        #[serde(default, skip_serializing_if = "is_default")]
        source_port: u16,
        /// Destination port.
        #[serde(default, skip_serializing_if = "is_default")]
        destination_port: u16,
        /// Flags.
        #[serde(default)]
        flags: TcpFlags,
    },
    /// UDP.
    #[serde(rename = "UDP")]
    Udp {
        /// Source port.
        #[serde(default, skip_serializing_if = "is_default")]
        source_port: u16,
        /// Destination port.
        #[serde(default, skip_serializing_if = "is_default")]
        destination_port: u16,
    },
    /// ICMP.
    #[serde(rename = "ICMPv4")]
    Icmpv4 {
        /// Type.
        #[serde(rename = "type", default, skip_serializing_if = "is_default")]
        kind: u8,
        /// Code.
        #[serde(default, skip_serializing_if = "is_default")]
        code: u8,
    },
    /// ICMP for IPv6.
    #[serde(rename = "ICMPv6")]
    Icmpv6 {
        /// Type.
        #[serde(rename = "type", default, skip_serializing_if = "is_default")]
        kind: u8,
        /// Code.
        #[serde(default, skip_serializing_if = "is_default")]
        code: u8,
    },
    /// SCTP.
    #[serde(rename = "SCTP")]
    Sctp {
        /// Source port.
        #[serde(default, skip_serializing_if = "is_default")]
        source_port: u16,
        /// Destination port.
        #[serde(default, skip_serializing_if = "is_default")]
        destination_port: u16,
    },
}

impl Layer4 {
    /// Source and destination port, where the protocol has ports.
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

/// Flags byte of a TCP header (RFC 9293, section 3.1). Not `bitflags`: Hubble lists the flags in another order than that
/// of the bits, and as a JSON object.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TcpFlags(pub u8);

/// Flag bits, in the order in which flow clients list them.
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
    /// Names of the flags that are set.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        TCP_FLAG_NAMES
            .iter()
            .filter(move |(bit, _)| self.0 & bit != 0)
            .map(|(_, name)| *name)
    }

    /// The bit of a flag's name, whatever its case.
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

/// What was read of application traffic.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Layer7 {
    /// Question or answer.
    #[serde(rename = "type", skip_serializing_if = "is_default")]
    pub kind: L7Type,
    /// From the question to this answer, ns; of answers.
    #[serde(with = "u64_text", skip_serializing_if = "is_default")]
    pub latency_ns: u64,
    /// A DNS message. Absent, as every other protocol: nothing could be read, or it is one that the API does not
    /// know ([`Extra::tls`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns: Option<Dns>,
    /// An HTTP message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<Http>,
}

/// An HTTP message.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Http {
    /// Status code; of answers.
    #[serde(skip_serializing_if = "is_default")]
    pub code: u32,
    /// Method; of an answer, that of the request.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub method: String,
    /// URL, without secrets and without what is no visible ASCII; of an answer, that of the request.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub url: String,
    /// `HTTP/1.1`.
    #[serde(skip_serializing_if = "is_empty")]
    pub protocol: Cow<'static, str>,
    /// The fields that are to be shown, without secrets.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<HttpHeader>,
}

/// A field of an HTTP message.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HttpHeader {
    /// Name, in lower case.
    pub key: String,
    /// Value.
    pub value: String,
}

/// A TLS ClientHello.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Tls {
    /// The server name, in lower case and without its last dot; absent if the hello has none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub server_name: String,
    /// The highest version that is offered: `TLS 1.3`.
    #[serde(skip_serializing_if = "is_empty")]
    pub version: Cow<'static, str>,
    /// The hello hides another one (ECH); the name is the outer one.
    #[serde(skip_serializing_if = "is_default")]
    pub ech: bool,
}

/// A DNS message.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// The name that is asked for, with its last dot.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub query: String,
    /// Addresses of the answer, the first of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<IpAddr>,
    /// Lowest time to live of the answer, s.
    #[serde(skip_serializing_if = "is_default")]
    pub ttl: u32,
    /// Where the aliases of the name lead.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cnames: Vec<String>,
    /// Who saw it: `proxy`, what flow clients call everything that stands in the way and reads.
    #[serde(skip_serializing_if = "is_empty")]
    pub observation_source: Cow<'static, str>,
    /// Response code.
    #[serde(skip_serializing_if = "is_default")]
    pub rcode: u32,
    /// Types that are asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub qtypes: Vec<Cow<'static, str>>,
    /// Types of the records that were answered.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rrtypes: Vec<Cow<'static, str>>,
}

/// One end of a flow.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Endpoint {
    /// The endpoint of this node, 0 if it is none.
    #[serde(rename = "ID", skip_serializing_if = "is_default")]
    pub id: u32,
    /// Numeric identity, 0 if it was not looked up.
    #[serde(skip_serializing_if = "is_default")]
    pub identity: u32,
    /// Namespace.
    #[serde(skip_serializing_if = "is_empty")]
    pub namespace: Arc<str>,
    /// Labels of the identity, `source:key=value`.
    #[serde(skip_serializing_if = "is_slice_empty")]
    pub labels: Arc<[Arc<str>]>,
    /// Name of the endpoint, or of the peer.
    #[serde(skip_serializing_if = "is_empty")]
    pub pod_name: Arc<str>,
}

fn is_slice_empty<T>(slice: &[T]) -> bool {
    slice.is_empty()
}

/// The name of a reserved identity.
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
    /// One of [`event_type`].
    #[serde(rename = "type")]
    pub kind: i32,
    /// Drop reason or trace point.
    #[serde(skip_serializing_if = "is_default")]
    pub sub_type: i32,
}

/// A network interface.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkInterface {
    /// Index.
    pub index: u32,
    /// Name, if it is known.
    #[serde(skip_serializing_if = "is_empty")]
    pub name: Arc<str>,
}

/// A policy that decided.
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
    /// The state of the policies in which it decided.
    #[serde(with = "u64_text", skip_serializing_if = "is_default")]
    pub revision: u64,
    /// `CiliumNetworkPolicy`, `NetworkPolicy`, ...
    #[serde(skip_serializing_if = "is_empty")]
    pub kind: Arc<str>,
}

impl Policy {
    /// `namespace/name`, or the name alone.
    #[must_use]
    pub fn qualified_name(&self) -> Arc<str> {
        if self.namespace.is_empty() {
            Arc::clone(&self.name)
        } else {
            format!("{}/{}", self.namespace, self.name).into()
        }
    }
}

/// 64-bit integers are strings in the JSON form of protobuf, since JavaScript's numbers do not hold them.
mod u64_text {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        std::borrow::Cow::<'de, str>::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}
