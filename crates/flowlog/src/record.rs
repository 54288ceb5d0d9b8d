//! Conversion of the records of inspectors to flow records.

use std::{borrow::Cow, fmt::Write as _, net::IpAddr};

use palisade_abi::{Reason, identity, protocol};
use palisade_inspect::record::{Record, Text, Verdict as Seen, What, Word};
use palisade_protocols::{dns::rtype, kafka};

use crate::{
    DropReason, FlowResolver, Timestamp,
    flow::{
        Dns, EventType, Extra, Flow, FlowType, Http, HttpHeader, Ip, IpVersion, Kafka, L7Type, Layer4,
        Layer7, NetworkInterface, TcpFlags, Tls, TraceContext, TraceParent, TrafficDirection, Verdict,
        event_type,
    },
    resolve::{end, rule_of},
};

/// Value of `observation_source` for inspectors in the flow API.
const OBSERVER: &str = "proxy";

impl Flow {
    /// Returns the flow record of an inspector's record. `time`: time of the record.
    #[must_use]
    pub fn from_record(record: &Record, names: &(impl FlowResolver + ?Sized), time: Timestamp) -> Self {
        let verdict = match record.verdict {
            Seen::Forwarded => Verdict::Forwarded,
            Seen::Dropped => Verdict::Dropped,
            Seen::Audit => Verdict::Audit,
        };
        let dropped = verdict == Verdict::Dropped;
        let drop_reason = DropReason(if dropped { record.reason as u8 } else { 0 });
        let (source, source_port) = record.source;
        let (destination, destination_port) = record.destination;
        // The connection is ingress of the endpoint if a request arrives at the endpoint or a response leaves it.
        let ingress = record.ingress != record.reply;
        let own = names.endpoint(record.endpoint);
        let own_is_host = own.as_ref().is_some_and(|own| own.identity == identity::HOST);
        let (own_source, own_destination) = if record.ingress { (None, own) } else { (own, None) };
        let (source_identity, destination_identity) = if record.ingress {
            (record.remote_identity, 0)
        } else {
            (0, record.remote_identity)
        };
        let rule = (record.rule != 0).then(|| names.rule(record.rule).unwrap_or_default());
        let read = read(record);
        let trace_context = read.http.as_ref().and_then(trace_context);
        let mut flow = Self {
            time,
            verdict,
            drop_reason: drop_reason.0.into(),
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
            source: end(names, true, source, source_identity, own_source),
            destination: end(names, true, destination, destination_identity, own_destination),
            l7: Some(Box::new(Layer7 {
                kind: if record.reply {
                    L7Type::Response
                } else {
                    L7Type::Request
                },
                latency_ns: record.latency.map_or(0, |ms| u64::from(ms) * 1_000_000),
                dns: read.dns,
                http: read.http,
                kafka: read.kafka,
            })),
            flow_type: FlowType::L7,
            node_name: names.node(),
            node_labels: names.node_labels(),
            event_type: EventType {
                kind: event_type::ACCESS_LOG,
                sub_type: 0,
            },
            traffic_direction: if ingress {
                TrafficDirection::Ingress
            } else {
                TrafficDirection::Egress
            },
            drop_reason_desc: drop_reason,
            is_reply: Some(record.reply),
            interface: (record.ifindex != 0).then(|| NetworkInterface {
                index: record.ifindex,
                name: names.interface(record.ifindex).unwrap_or_default(),
            }),
            trace_context,
            palisade: Extra {
                reason: if verdict == Verdict::Forwarded && record.reason.is_drop() {
                    Reason::Allowed.text().into()
                } else {
                    record.reason.text().into()
                },
                rule: rule.as_ref().map(|info| rule_of(record.rule, info)),
                audit: verdict == Verdict::Audit,
                protocol: record.protocol,
                tls: read.tls,
                client_id: read.client_id,
                body_length: read.body_length,
                ..Extra::default()
            },
            summary: read.summary,
            ..Self::default()
        };
        if let Some(info) = rule {
            flow.decided_by(info.policies, verdict != Verdict::Forwarded);
        }
        flow.name_remote_end(names, record.endpoint, !record.ingress);
        if own_is_host {
            flow.name_unit(names, !record.ingress);
        }
        flow
    }
}

/// Parts of a flow record that describe the application message, in the terms of the flow API.
#[derive(Default)]
struct Read {
    dns: Option<Dns>,
    http: Option<Http>,
    kafka: Option<Kafka>,
    client_id: String,
    tls: Option<Box<Tls>>,
    body_length: Option<u64>,
    summary: String,
}

impl From<Dns> for Read {
    fn from(dns: Dns) -> Self {
        Self {
            dns: Some(dns),
            ..Self::default()
        }
    }
}

fn read(record: &Record) -> Read {
    match &record.what {
        What::DnsQuery { name, kind } => {
            let dns = Dns {
                query: with_last_dot(name),
                qtypes: vec![type_name(*kind)],
                observation_source: OBSERVER.into(),
                ..Dns::default()
            };
            Read {
                summary: format!("DNS Query {} {}", dns.query, type_name(*kind)),
                ..dns.into()
            }
        }
        What::DnsAnswer {
            name,
            kind,
            rcode,
            addresses,
            count,
            ttl,
            cname,
        } => {
            let ips: Vec<IpAddr> = addresses
                .iter()
                .take((*count).into())
                .map(|address| (*address).into())
                .collect();
            let cnames: Vec<String> = (!cname.bytes().is_empty())
                .then(|| with_last_dot(cname))
                .into_iter()
                .collect();
            let families = [
                (!cnames.is_empty(), rtype::CNAME),
                (ips.iter().any(IpAddr::is_ipv4), rtype::A),
                (ips.iter().any(IpAddr::is_ipv6), rtype::AAAA),
            ];
            let dns = Dns {
                query: with_last_dot(name),
                ttl: *ttl,
                rcode: (*rcode).into(),
                qtypes: vec![type_name(*kind)],
                rrtypes: families
                    .into_iter()
                    .filter(|(there, _)| *there)
                    .map(|(_, rtype)| type_name(rtype))
                    .collect(),
                observation_source: OBSERVER.into(),
                ips,
                cnames,
            };
            Read {
                summary: answer_text(&dns),
                ..dns.into()
            }
        }
        What::TlsHello { name, version, ech } => {
            let tls = Tls {
                server_name: text(name.bytes()),
                version: tls_version(*version),
                ech: *ech,
            };
            let name = match &*tls.server_name {
                "" => "without a name",
                name => name,
            };
            let ech = if tls.ech { ", ECH" } else { "" };
            Read {
                summary: format!("TLS Hello {name} ({}{ech})", tls.version),
                tls: Some(Box::new(tls)),
                ..Read::default()
            }
        }
        What::HttpRequest {
            method,
            version,
            url,
            headers,
            mismatch,
        } => {
            let http = http(0, method, *version, url, headers);
            let mismatch = if *mismatch { ", headerMatches differ" } else { "" };
            Read {
                summary: format!("{} {} {}{mismatch}", http.protocol, http.method, http.url),
                http: Some(http),
                ..Read::default()
            }
        }
        What::HttpResponse {
            method,
            url,
            version,
            status,
            length,
            headers,
        } => {
            let http = http(*status, method, *version, url, headers);
            let latency = record.latency.unwrap_or_default();
            Read {
                summary: format!(
                    "{} {} {latency}ms ({} {})",
                    http.protocol, http.code, http.method, http.url
                ),
                http: Some(http),
                body_length: *length,
                ..Read::default()
            }
        }
        What::Kafka {
            key,
            version,
            correlation,
            error,
            topic,
            client,
        } => {
            let kafka = Kafka {
                error_code: (*error).into(),
                api_version: (*version).into(),
                api_key: kafka::api_name(*key).map_or_else(|| Cow::Owned(key.to_string()), Cow::Borrowed),
                correlation_id: *correlation,
                topic: visible(topic.bytes()),
            };
            let side = if record.reply { "response" } else { "request" };
            let mut summary = format!(
                "Kafka {side} {} v{version} correlation id {correlation} topic '{}'",
                kafka.api_key, kafka.topic
            );
            if *error != 0 || record.reply {
                let _ = write!(summary, " error {error}");
            }
            Read {
                summary,
                kafka: Some(kafka),
                client_id: visible(client.bytes()),
                ..Read::default()
            }
        }
        What::Intercept { name, error } => Read {
            summary: match &*visible(name.bytes()) {
                "" => format!("Interception failed: {}", visible(error.bytes())),
                name => format!("Interception failed for {name}: {}", visible(error.bytes())),
            },
            ..Read::default()
        },
        What::Unreadable { detail } => Read {
            summary: format!("Unreadable: {detail}"),
            ..Read::default()
        },
    }
}

fn http(status: u16, method: &Word, version: u8, url: &Text, headers: &Text) -> Http {
    Http {
        code: status.into(),
        method: text(method.bytes()),
        url: text(url.bytes()),
        protocol: Cow::Borrowed(match version {
            0 => "HTTP/1.0",
            1 => "HTTP/1.1",
            _ => "HTTP/2",
        }),
        // A field that was truncated before its value is left out.
        headers: text(headers.bytes())
            .lines()
            .filter_map(|line| line.split_once(": "))
            .map(|(key, value)| HttpHeader {
                key: key.to_ascii_lowercase(),
                value: value.to_owned(),
            })
            .collect(),
    }
}

/// Returns the trace that the header field `traceparent` names (W3C Trace Context, section 3.2): version, trace, parent and
/// flags in hexadecimal digits, with `-` between.
fn trace_context(http: &Http) -> Option<Box<TraceContext>> {
    let field = http.headers.iter().find(|field| field.key == "traceparent")?;
    let mut parts = field.value.split('-');
    let is_hex = |part: &str, digits| part.len() == digits && part.bytes().all(|b| b.is_ascii_hexdigit());
    let (version, trace_id) = (parts.next()?, parts.next()?);
    let names_a_trace = trace_id.bytes().any(|digit| digit != b'0');
    (is_hex(version, 2) && is_hex(trace_id, 32) && names_a_trace && parts.next().is_some()).then(|| {
        Box::new(TraceContext {
            parent: Some(TraceParent {
                trace_id: trace_id.to_owned(),
            }),
        })
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Returns bytes of a peer as text. Bytes other than visible ASCII are escaped, so that they cannot control a terminal.
fn visible(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

/// Returns the usual name of a TLS version.
fn tls_version(version: u16) -> Cow<'static, str> {
    Cow::Borrowed(match version {
        0x0301 => "TLS 1.0",
        0x0302 => "TLS 1.1",
        0x0303 => "TLS 1.2",
        0x0304 => "TLS 1.3",
        other => return Cow::Owned(format!("version {other:#06x}")),
    })
}

/// Returns a text such as `DNS Answer "192.0.2.1" TTL: 30 CNAMEs: "a.example." (Proxy www.example. A)`.
fn answer_text(dns: &Dns) -> String {
    let mut text = String::from("DNS Answer ");
    let quoted = |text: &mut String, list: &mut dyn Iterator<Item = String>| {
        let list: Vec<_> = list.collect();
        let _ = write!(text, "\"{}\" ", list.join(","));
    };
    if dns.rcode == 0 {
        if !dns.ips.is_empty() {
            quoted(&mut text, &mut dns.ips.iter().map(ToString::to_string));
            let _ = write!(text, "TTL: {} ", dns.ttl);
        }
        if !dns.cnames.is_empty() {
            text.push_str("CNAMEs: ");
            quoted(&mut text, &mut dns.cnames.iter().cloned());
        }
    } else {
        let _ = write!(text, "RCode: {} ", rcode_text(dns.rcode));
    }
    let _ = write!(text, "(Proxy {} {})", dns.query, dns.qtypes.join(","));
    text
}

/// Returns the name that Hubble uses for a response code (RFC 1035, RFC 2136, RFC 6891).
fn rcode_text(rcode: u32) -> Cow<'static, str> {
    Cow::Borrowed(match rcode {
        0 => "No Error",
        1 => "Format Error",
        2 => "Server Failure",
        3 => "Non-Existent Domain",
        4 => "Not Implemented",
        5 => "Query Refused",
        6 => "Name Exists when it should not",
        7 => "RR Set Exists when it should not",
        8 => "RR Set that should exist does not",
        9 => "Server Not Authoritative for zone",
        10 => "Name not contained in zone",
        16 => "Bad OPT Version",
        other => return Cow::Owned(other.to_string()),
    })
}

/// Returns the name of a record type, or `TYPEn` (RFC 3597, section 5) if it has none.
fn type_name(number: u16) -> Cow<'static, str> {
    rtype::name(number).map_or_else(|| Cow::Owned(format!("TYPE{number}")), Cow::Borrowed)
}

fn with_last_dot(name: &Text) -> String {
    let mut text = text(name.bytes());
    if !text.ends_with('.') {
        text.push('.');
    }
    text
}
