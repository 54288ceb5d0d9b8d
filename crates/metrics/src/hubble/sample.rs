//! What the metrics use of a flow. It can be made from a record of an inspector, without the texts of its flow.

use std::{borrow::Cow, net::IpAddr};

use palisade_abi::{Reason, protocol};
use palisade_flowlog::{
    DropReason,
    flow::{
        Flow, Ip, IpVersion, L7Type, Layer4, Layer7, TcpFlags, TracePoint, TrafficDirection, Verdict,
        event_type,
    },
};
use palisade_inspect::record::{Record, Verdict as Seen, What};
use palisade_protocols::{dns::rtype, kafka};

/// What the metrics use of a flow.
#[derive(Clone, PartialEq, Debug)]
pub struct Sample<'a> {
    pub(super) verdict: Verdict,
    pub(super) reason: DropReason,
    /// Number of the event type ([`event_type`]).
    pub(super) event: i32,
    pub(super) trace_point: TracePoint,
    pub(super) direction: TrafficDirection,
    pub(super) is_reply: Option<bool>,
    pub(super) ip: Option<Ip>,
    pub(super) l4: Option<Layer4>,
    pub(super) match_type: u32,
    pub(super) message: Option<Message<'a>>,
    /// The flow record, if names are needed.
    pub(super) flow: Option<&'a Flow>,
    /// Number of flows that the sample stands for.
    pub(super) times: u64,
}

/// An application message.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Message<'a> {
    pub(super) kind: L7Type,
    /// Time from the request to this response, s, if it is known.
    pub(super) latency: Option<f64>,
    pub(super) content: Content<'a>,
}

#[derive(Clone, PartialEq, Debug)]
pub(super) enum Content<'a> {
    Dns {
        /// Name of the question, with its final dot.
        query: Cow<'a, str>,
        qtype: Cow<'a, str>,
        rcode: u32,
        addresses: usize,
        types: Vec<Cow<'a, str>>,
    },
    Http {
        method: Cow<'a, str>,
        protocol: Cow<'a, str>,
        status: u32,
    },
    Kafka {
        topic: Cow<'a, str>,
        key: Cow<'a, str>,
        error: i32,
    },
    /// A message for which the flow API has no type.
    Other,
}

impl<'a> Sample<'a> {
    /// Returns the sample of a flow record.
    #[must_use]
    pub fn of_flow(flow: &'a Flow) -> Self {
        let content = |l7: &'a Layer7| {
            if let Some(dns) = &l7.dns {
                Content::Dns {
                    query: Cow::Borrowed(&dns.query),
                    qtype: match dns.qtypes.as_slice() {
                        [one] => Cow::Borrowed(&**one),
                        many => many.join(",").into(),
                    },
                    rcode: dns.rcode,
                    addresses: dns.ips.len(),
                    types: dns.rrtypes.iter().map(|name| Cow::Borrowed(&**name)).collect(),
                }
            } else if let Some(http) = &l7.http {
                Content::Http {
                    method: Cow::Borrowed(&http.method),
                    protocol: Cow::Borrowed(&http.protocol),
                    status: http.code,
                }
            } else if let Some(kafka) = &l7.kafka {
                Content::Kafka {
                    topic: Cow::Borrowed(&kafka.topic),
                    key: Cow::Borrowed(&kafka.api_key),
                    error: kafka.error_code,
                }
            } else {
                Content::Other
            }
        };
        Self {
            verdict: flow.verdict,
            reason: flow.drop_reason_desc,
            event: flow.event_type.kind,
            trace_point: flow.trace_observation_point,
            direction: flow.traffic_direction,
            is_reply: flow.is_reply,
            ip: flow.ip,
            l4: flow.l4,
            match_type: flow.policy_match_type,
            message: flow.l7.as_deref().map(|l7| Message {
                kind: l7.kind,
                latency: (l7.latency_ns != 0).then(|| l7.latency_ns as f64 / 1e9),
                content: content(l7),
            }),
            flow: Some(flow),
            times: 1,
        }
    }

    /// Returns the sample of a record, equal to that of its flow record but without the names of its ends.
    #[must_use]
    pub fn of_record(record: &'a Record) -> Self {
        let verdict = match record.verdict {
            Seen::Forwarded => Verdict::Forwarded,
            Seen::Dropped => Verdict::Dropped,
            Seen::Audit => Verdict::Audit,
        };
        let ((source, source_port), (destination, destination_port)) = (record.source, record.destination);
        Self {
            verdict,
            reason: DropReason(if verdict == Verdict::Dropped {
                record.reason as u8
            } else {
                0
            }),
            event: event_type::ACCESS_LOG,
            trace_point: TracePoint::Unknown,
            // The connection is ingress of the endpoint if a request arrives at the endpoint or a response leaves it.
            direction: if record.ingress == record.reply {
                TrafficDirection::Egress
            } else {
                TrafficDirection::Ingress
            },
            is_reply: Some(record.reply),
            ip: Some(Ip {
                source: source.into(),
                destination: destination.into(),
                version: if source.is_v4() {
                    IpVersion::V4
                } else {
                    IpVersion::V6
                },
            }),
            l4: match record.protocol {
                protocol::UDP => Some(Layer4::Udp {
                    source_port,
                    destination_port,
                }),
                protocol::TCP => Some(Layer4::Tcp {
                    source_port,
                    destination_port,
                    flags: TcpFlags::default(),
                }),
                _ => None,
            },
            match_type: 0,
            message: Some(Message {
                kind: if record.reply {
                    L7Type::Response
                } else {
                    L7Type::Request
                },
                latency: record.latency.filter(|ms| *ms != 0).map(|ms| f64::from(ms) / 1e3),
                content: content(&record.what),
            }),
            flow: None,
            times: 1,
        }
    }

    /// Returns the protocol by which Hubble's metrics describe a flow.
    pub(super) fn protocol(&self) -> &'static str {
        if self.event == event_type::ACCESS_LOG {
            return match self.message.as_ref().map(|message| &message.content) {
                Some(Content::Dns { .. }) => "DNS",
                Some(Content::Http { .. }) => "HTTP",
                Some(Content::Kafka { .. }) => "Kafka",
                Some(Content::Other) | None => "Unknown L7",
            };
        }
        match self.l4 {
            Some(Layer4::Tcp { .. }) => "TCP",
            Some(Layer4::Udp { .. }) => "UDP",
            Some(Layer4::Icmpv4 { .. }) => "ICMPv4",
            Some(Layer4::Icmpv6 { .. }) => "ICMPv6",
            Some(Layer4::Sctp { .. }) => "SCTP",
            None => "Unknown L4",
        }
    }

    /// Returns the IP version as Hubble writes it.
    pub(super) fn family(&self) -> &'static str {
        match self.ip.map(|ip| ip.version) {
            Some(IpVersion::V4) => "IPv4",
            Some(IpVersion::V6) => "IPv6",
            Some(IpVersion::NotUsed) | None => "IP_NOT_USED",
        }
    }

    pub(super) fn dropped_by_policy(&self) -> bool {
        self.reason == DropReason(Reason::PolicyDenied as u8)
    }
}

/// Returns the name of a drop reason, as in flow records, or its number if it has no name.
#[must_use]
pub fn reason_name(reason: DropReason) -> Cow<'static, str> {
    let number = || reason.0.to_string().into();
    reason.name().map_or_else(number, Cow::Borrowed)
}

fn content(what: &What) -> Content<'_> {
    match what {
        What::DnsQuery { name, kind } => Content::Dns {
            query: with_last_dot(name.bytes()),
            qtype: type_name(*kind),
            rcode: 0,
            addresses: 0,
            types: Vec::new(),
        },
        What::DnsAnswer {
            name,
            kind,
            rcode,
            addresses,
            count,
            cname,
            ..
        } => {
            let addresses = addresses.get(..usize::from(*count)).unwrap_or(addresses);
            let any = |v4: bool| {
                addresses
                    .iter()
                    .any(|address| IpAddr::from(*address).is_ipv4() == v4)
            };
            let types = [
                (!cname.bytes().is_empty(), rtype::CNAME),
                (any(true), rtype::A),
                (any(false), rtype::AAAA),
            ];
            Content::Dns {
                query: with_last_dot(name.bytes()),
                qtype: type_name(*kind),
                rcode: (*rcode).into(),
                addresses: addresses.len(),
                types: types
                    .into_iter()
                    .filter(|(there, _)| *there)
                    .map(|(_, number)| type_name(number))
                    .collect(),
            }
        }
        What::HttpRequest { method, version, .. } => http(method.bytes(), *version, 0),
        What::HttpResponse {
            method,
            version,
            status,
            ..
        } => http(method.bytes(), *version, *status),
        What::Kafka {
            key, error, topic, ..
        } => Content::Kafka {
            topic: topic.bytes().escape_ascii().to_string().into(),
            key: kafka::api_name(*key).map_or_else(|| key.to_string().into(), Cow::Borrowed),
            error: (*error).into(),
        },
        What::TlsHello { .. } | What::Intercept { .. } | What::Unreadable { .. } => Content::Other,
    }
}

fn http(method: &[u8], version: u8, status: u16) -> Content<'_> {
    Content::Http {
        method: String::from_utf8_lossy(method),
        protocol: match version {
            0 => "HTTP/1.0",
            1 => "HTTP/1.1",
            _ => "HTTP/2",
        }
        .into(),
        status: status.into(),
    }
}

fn type_name(number: u16) -> Cow<'static, str> {
    rtype::name(number).map_or_else(|| format!("TYPE{number}").into(), Cow::Borrowed)
}

fn with_last_dot(name: &[u8]) -> Cow<'_, str> {
    let name = String::from_utf8_lossy(name);
    if name.ends_with('.') {
        name
    } else {
        format!("{name}.").into()
    }
}
