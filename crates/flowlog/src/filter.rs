//! Filters, with the flags that flow clients have.
//!
//! A [`FlowFilter`] has the members of the flow API's message of that name, those about one end of a flow put
//! together: within a member any value may match, all members that are set must. A flow passes [`Filters`] if the whitelist is empty or one of its filters
//! matches, and none of the blacklist does.
//!
//! Flags become filters in [`FilterBuilder`], in the order in which they stand on the command line, since `--not`
//! is about the flag after it. The command line is not parsed here: [`FLAGS`] lists every flag with its help, the
//! binary makes its arguments from it (each repeatable) and hands over name and value by position.
//!
//! A flag without a side, `--ip 10.0.1.10`, means either side. Several of them are independent:
//! `--ip 10.0.1.10 --port 80` is "10.0.1.10 is at one end, and port 80 is at one end".

use std::net::IpAddr;

use ipnet::IpNet;
use palisade_abi::{Reason, identity, protocol};
use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

use crate::{
    ParseTimeError, Timestamp, duration,
    flow::{
        DropReason, Endpoint, Flow, HttpHeader, IpVersion, Layer4, TcpFlags, TracePoint, TrafficDirection,
        Verdict, event_type, reserved_name,
    },
};

/// A flag that makes filters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flag {
    /// Its long name, without dashes.
    pub name: &'static str,
    /// Its short name.
    pub short: Option<char>,
    /// What its value is called; empty: it takes none.
    pub value: &'static str,
    /// What it does.
    pub help: &'static str,
}

const fn flag(name: &'static str, value: &'static str, help: &'static str) -> Flag {
    Flag {
        name,
        short: None,
        value,
        help,
    }
}

const fn short(name: &'static str, short: char, value: &'static str, help: &'static str) -> Flag {
    Flag {
        name,
        short: Some(short),
        value,
        help,
    }
}

/// Every flag that [`FilterBuilder::flag`] takes.
pub const FLAGS: &[Flag] = &[
    flag(
        "not",
        "",
        "Reverse the next filter: flows that match it are not shown",
    ),
    flag(
        "ip",
        "ADDRESS",
        "Flows from or to an address or prefix (10.0.1.10, fd00::/64)",
    ),
    flag("from-ip", "ADDRESS", "Flows from an address or prefix"),
    flag("to-ip", "ADDRESS", "Flows to an address or prefix"),
    short(
        "label",
        'l',
        "SELECTOR",
        "Flows from or to labels (app=web, k8s:app in (a,b), !tier, reserved:world)",
    ),
    flag("from-label", "SELECTOR", "Flows from labels"),
    flag("to-label", "SELECTOR", "Flows to labels"),
    flag(
        "identity",
        "IDENTITY",
        "Flows from or to a numeric identity or a reserved one (world)",
    ),
    flag("from-identity", "IDENTITY", "Flows from an identity"),
    flag("to-identity", "IDENTITY", "Flows to an identity"),
    flag(
        "endpoint",
        "[NAMESPACE/]NAME",
        "Flows from or to endpoints or peers whose name begins so, or by number",
    ),
    flag("from-endpoint", "[NAMESPACE/]NAME", "Flows from endpoints"),
    flag("to-endpoint", "[NAMESPACE/]NAME", "Flows to endpoints"),
    flag("pod", "[NAMESPACE/]NAME", "The same as --endpoint"),
    flag("from-pod", "[NAMESPACE/]NAME", "The same as --from-endpoint"),
    flag("to-pod", "[NAMESPACE/]NAME", "The same as --to-endpoint"),
    short("namespace", 'n', "NAMESPACE", "Flows from or to a namespace"),
    flag("from-namespace", "NAMESPACE", "Flows from a namespace"),
    flag("to-namespace", "NAMESPACE", "Flows to a namespace"),
    flag(
        "port",
        "PORT",
        "Flows from or to a port or a range (80, 8000-8999)",
    ),
    flag("from-port", "PORT", "Flows from a port"),
    flag("to-port", "PORT", "Flows to a port"),
    flag(
        "protocol",
        "PROTOCOL",
        "Flows of a protocol: tcp, udp, sctp, icmp, icmpv4, icmpv6, dns, http, tls, or a number",
    ),
    flag(
        "verdict",
        "VERDICT",
        "Flows with a verdict: forwarded, dropped, audit, ...",
    ),
    flag(
        "drop-reason-desc",
        "REASON",
        "Drops with a reason, by name, text or number (POLICY_DENIED)",
    ),
    short(
        "type",
        't',
        "TYPE[:SUBTYPE]",
        "Events of a type: trace, drop, policy-verdict, l7; trace:to-endpoint, drop:133",
    ),
    flag(
        "traffic-direction",
        "DIRECTION",
        "Flows whose connection is ingress or egress",
    ),
    flag(
        "reply",
        "true|false",
        "Packets that answer a connection, or that do not",
    ),
    flag("ip-version", "VERSION", "Flows of IP version 4 or 6"),
    flag(
        "tcp-flags",
        "FLAGS",
        "Packets with all of these TCP flags (SYN,ACK)",
    ),
    flag(
        "interface",
        "NAME",
        "Flows seen on an interface, by name or index",
    ),
    flag(
        "dns-query",
        "REGEX",
        "DNS messages about a name that matches ('example\\.com\\.?$')",
    ),
    flag(
        "http-status",
        "STATUS",
        "HTTP answers with a status, or whose status begins so (404, 5+, 40+)",
    ),
    flag(
        "http-method",
        "METHOD",
        "HTTP requests with a method, and their answers",
    ),
    flag(
        "http-path",
        "REGEX",
        "HTTP requests whose path, without its query, matches, and their answers ('^/page/[0-9]+$')",
    ),
    flag(
        "http-url",
        "REGEX",
        "HTTP requests whose URL matches, and their answers ('^http://[^/]*example\\.com/')",
    ),
    flag(
        "http-header",
        "NAME:VALUE",
        "HTTP messages with a field that flows show ([http] record_headers)",
    ),
    flag(
        "sni",
        "NAME",
        "TLS hellos for a server name; * stands for any text",
    ),
    flag(
        "fqdn",
        "NAME",
        "Flows from or to an address that was learned for a name; * stands for any text",
    ),
    flag(
        "from-fqdn",
        "NAME",
        "Flows from an address that was learned for a name",
    ),
    flag(
        "to-fqdn",
        "NAME",
        "Flows to an address that was learned for a name",
    ),
    flag(
        "node-name",
        "NAME",
        "Flows that a node saw; * stands for any text",
    ),
    flag(
        "since",
        "TIME",
        "Flows from then on: RFC 3339, a date, or how long ago (5m, 1h30m)",
    ),
    flag("until", "TIME", "Flows up to then"),
];

/// A flag's value that cannot be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FilterError {
    /// The value means nothing.
    #[error("--{flag} {value}: {problem}")]
    Value {
        /// The flag, without dashes.
        flag: String,
        /// Its value.
        value: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// No such flag.
    #[error("--{0} is not a filter")]
    Unknown(String),
    /// `--not` with nothing that it could reverse.
    #[error("--not must stand before the filter that it reverses; there is none after it")]
    DanglingNot,
    /// `--not --since` and the like.
    #[error("--not cannot reverse --{0}: use --since for a beginning and --until for an end")]
    NotReversible(String),
}

/// Wanted values of a member that both ends of a flow have. Each list that is not empty must match.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Sided<T> {
    /// Of the source.
    pub source: Vec<T>,
    /// Of the destination.
    pub destination: Vec<T>,
    /// Of one of the two, whichever.
    pub either: Vec<T>,
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

impl<T> Sided<T> {
    fn matches<H: Copy>(&self, source: H, destination: H, test: impl Fn(&T, H) -> bool) -> bool {
        any(&self.source, |want| test(want, source))
            && any(&self.destination, |want| test(want, destination))
            && any(&self.either, |want| test(want, source) || test(want, destination))
    }

    fn side(&mut self, side: Side) -> &mut Vec<T> {
        match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
            Side::Either => &mut self.either,
        }
    }
}

/// Which end of a flow a flag is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
    Either,
}

/// A filter: every member that is not empty must match, by one of its values.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct FlowFilter {
    /// Address.
    pub ip: Sided<IpNet>,
    /// Labels of the identity.
    pub label: Sided<LabelSelector>,
    /// Identity.
    pub identity: Sided<u32>,
    /// Name of the endpoint.
    pub endpoint: Sided<EndpointName>,
    /// Namespace of the endpoint.
    pub namespace: Sided<String>,
    /// Port.
    pub port: Sided<PortRange>,
    /// Protocol.
    pub protocol: Vec<ProtocolFilter>,
    /// Verdict.
    pub verdict: Vec<Verdict>,
    /// Drop reason.
    pub drop_reason_desc: Vec<DropReason>,
    /// Type of event.
    pub event_type: Vec<EventTypeFilter>,
    /// Direction of the connection.
    pub traffic_direction: Vec<TrafficDirection>,
    /// Whether it answers; a flow of which that is not known matches neither.
    pub reply: Vec<bool>,
    /// IP version.
    pub ip_version: Vec<IpVersion>,
    /// TCP flags: all of a value's.
    pub tcp_flags: Vec<TcpFlags>,
    /// Interface.
    pub interface: Vec<String>,
    /// Node, with `*` for any text.
    pub node_name: Vec<String>,
    /// The name that a DNS message is about.
    pub dns_query: Vec<QueryPattern>,
    /// Status of an HTTP answer.
    pub http_status_code: Vec<StatusFilter>,
    /// Method of an HTTP request.
    pub http_method: Vec<String>,
    /// Path of an HTTP request, decoded, without its query.
    pub http_path: Vec<TextPattern>,
    /// URL of an HTTP request.
    pub http_url: Vec<TextPattern>,
    /// A field of an HTTP message.
    pub http_header: Vec<HttpHeader>,
    /// Server name of a TLS hello, with `*` for any text.
    pub tls_server_name: Vec<String>,
    /// Name that an address was learned for, with `*` for any text.
    pub fqdn: Sided<String>,
}

/// A protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProtocolFilter {
    /// By its IP protocol number.
    Ip(u8),
    /// DNS messages that were read.
    Dns,
    /// HTTP messages that were read.
    Http,
    /// TLS hellos that were read.
    Tls,
}

/// A status code, or the digits that it begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StatusFilter {
    /// Lowest code.
    pub first: u32,
    /// Highest code.
    pub last: u32,
}

/// A regular expression, found anywhere in a text.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern<const IGNORE_CASE: bool>(Regex);

/// Of names.
pub type QueryPattern = Pattern<true>;
/// Of texts in which upper and lower case differ.
pub type TextPattern = Pattern<false>;

impl<const IGNORE_CASE: bool> PartialEq for Pattern<IGNORE_CASE> {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl<const IGNORE_CASE: bool> TryFrom<String> for Pattern<IGNORE_CASE> {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)
    }
}

impl<const IGNORE_CASE: bool> From<Pattern<IGNORE_CASE>> for String {
    fn from(pattern: Pattern<IGNORE_CASE>) -> Self {
        pattern.0.as_str().into()
    }
}

impl<const IGNORE_CASE: bool> Pattern<IGNORE_CASE> {
    fn parse(text: &str) -> Result<Self, String> {
        let regex = RegexBuilder::new(text)
            .case_insensitive(IGNORE_CASE)
            .size_limit(PATTERN_SIZE)
            .build();
        regex
            .map(Self)
            .map_err(|_| "not a regular expression, such as example\\.com, or one that is too large".into())
    }
}

/// What a compiled pattern may need: filters come from whoever may ask the daemon.
const PATTERN_SIZE: usize = 1 << 20;

/// Ports from one to another, both included.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PortRange {
    /// First.
    pub first: u16,
    /// Last.
    pub last: u16,
}

/// Endpoints by name: those whose name begins so.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EndpointName {
    /// The number of an endpoint of this node, if the name was a number.
    pub id: Option<u32>,
    /// The namespace, if one was named.
    pub namespace: Option<String>,
    /// Beginning of the name; empty for all of the namespace.
    pub prefix: String,
}

/// A type of event, and perhaps a sub-type.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EventTypeFilter {
    /// One of [`event_type`].
    pub kind: i32,
    /// Drop reason or trace point.
    pub sub_type: Option<i32>,
}

/// A label selector in the syntax of Kubernetes, with label sources: all requirements must hold.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LabelSelector(Vec<Requirement>);

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Requirement {
    /// `None`: whatever the source.
    source: Option<String>,
    key: String,
    test: Test,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Test {
    Exists,
    Missing,
    In(Vec<String>),
    NotIn(Vec<String>),
}

/// What is shown.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Filters {
    /// If not empty: one of these must match.
    pub whitelist: Vec<FlowFilter>,
    /// None of these may match.
    pub blacklist: Vec<FlowFilter>,
    /// Nothing older.
    pub since: Option<Timestamp>,
    /// Nothing younger.
    pub until: Option<Timestamp>,
}

impl Filters {
    /// Whether a flow is to be shown.
    #[must_use]
    pub fn matches(&self, flow: &Flow) -> bool {
        self.since.is_none_or(|since| flow.time >= since)
            && self.until.is_none_or(|until| flow.time <= until)
            && (self.whitelist.is_empty() || self.whitelist.iter().any(|filter| filter.matches(flow)))
            && !self.blacklist.iter().any(|filter| filter.matches(flow))
    }
}

impl FlowFilter {
    /// Whether a flow has what the filter wants.
    #[must_use]
    pub fn matches(&self, flow: &Flow) -> bool {
        let ip = |net: &IpNet, have: Option<IpAddr>| have.is_some_and(|address| net.contains(&address));
        let port =
            |want: &PortRange, have: Option<u16>| have.is_some_and(|p| want.first <= p && p <= want.last);
        let (source, destination) = (&flow.source, &flow.destination);
        let ports = flow.l4.and_then(Layer4::ports);
        let dns = flow.l7.as_ref().and_then(|l7| l7.dns.as_ref());
        let http = flow.l7.as_ref().and_then(|l7| l7.http.as_ref());
        let tls = flow.palisade.tls.as_ref();
        let flags = match flow.l4 {
            Some(Layer4::Tcp { flags, .. }) => Some(flags.0),
            _ => None,
        };

        any(&self.event_type, |want| {
            want.kind == flow.event_type.kind
                && want.sub_type.is_none_or(|sub| sub == flow.event_type.sub_type)
        }) && any(&self.verdict, |want| *want == flow.verdict)
            && any(&self.drop_reason_desc, |want| *want == flow.drop_reason_desc)
            && any(&self.traffic_direction, |want| *want == flow.traffic_direction)
            && any(&self.reply, |want| Some(*want) == flow.is_reply)
            && any(&self.protocol, |want| match want {
                ProtocolFilter::Ip(number) => flow.ip.is_some() && *number == flow.palisade.protocol,
                ProtocolFilter::Dns => dns.is_some(),
                ProtocolFilter::Http => http.is_some(),
                ProtocolFilter::Tls => tls.is_some(),
            })
            && any(&self.http_status_code, |want| {
                http.is_some_and(|http| (want.first..=want.last).contains(&http.code))
            })
            && any(&self.http_method, |want| {
                http.is_some_and(|http| http.method.eq_ignore_ascii_case(want))
            })
            && (self.http_path.is_empty()
                || http.is_some_and(|http| {
                    let path = path_of(&http.url);
                    self.http_path.iter().any(|want| want.0.is_match(&path))
                }))
            && any(&self.http_url, |want| {
                http.is_some_and(|http| want.0.is_match(&http.url))
            })
            && any(&self.http_header, |want| {
                http.is_some_and(|http| {
                    let mut fields = http.headers.iter();
                    fields.any(|have| have.key.eq_ignore_ascii_case(&want.key) && have.value == want.value)
                })
            })
            && any(&self.tls_server_name, |want| {
                tls.is_some_and(|tls| matches_pattern(want, &tls.server_name))
            })
            && any(&self.dns_query, |want| {
                dns.is_some_and(|dns| want.0.is_match(&dns.query))
            })
            && self
                .fqdn
                .matches(&flow.source_names, &flow.destination_names, |want, names| {
                    names.iter().any(|name| matches_pattern(want, name))
                })
            && any(&self.ip_version, |want| {
                flow.ip.is_some_and(|ip| ip.version == *want)
            })
            && any(&self.tcp_flags, |want| {
                flags.is_some_and(|have| have & want.0 == want.0)
            })
            && self.port.matches(ports.map(|p| p.0), ports.map(|p| p.1), port)
            && self
                .ip
                .matches(flow.ip.map(|ip| ip.source), flow.ip.map(|ip| ip.destination), ip)
            && self
                .identity
                .matches(source, destination, |want, end| *want == end.identity)
            && self.endpoint.matches(source, destination, EndpointName::matches)
            && self
                .namespace
                .matches(source, destination, |want, end| **want == *end.namespace)
            && self
                .label
                .matches(source, destination, |want, end| want.matches(&end.labels))
            && any(&self.interface, |want| {
                flow.interface
                    .as_ref()
                    .is_some_and(|have| *want == *have.name || want.parse() == Ok(have.index))
            })
            && any(&self.node_name, |want| matches_pattern(want, &flow.node_name))
    }
}

/// The path in a URL, decoded, without its query.
fn path_of(url: &str) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let path = rest.find('/').map_or("", |begin| &rest[begin..]);
    let path = path.split('?').next().unwrap_or_default();
    let mut decoded = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let [byte, after @ ..] = rest {
        rest = after;
        let escaped = match after {
            [high, low, ..] if *byte == b'%' => hex(*high).zip(hex(*low)),
            _ => None,
        };
        if let Some((high, low)) = escaped {
            decoded.push(high << 4 | low);
            rest = &after[2..];
        } else {
            decoded.push(*byte);
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

fn hex(digit: u8) -> Option<u8> {
    let value = char::from(digit).to_digit(16)?;
    u8::try_from(value).ok()
}

/// A member of a filter: empty, or one of its values matches.
fn any<T>(wanted: &[T], matches: impl FnMut(&T) -> bool) -> bool {
    wanted.is_empty() || wanted.iter().any(matches)
}

fn matches_pattern(pattern: &str, text: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(rest) = text.strip_prefix(head) else {
        return false;
    };
    (0..=rest.len())
        .filter(|at| rest.is_char_boundary(*at))
        .any(|at| matches_pattern(tail, &rest[at..]))
}

impl EndpointName {
    fn matches(&self, end: &Endpoint) -> bool {
        if self.id.is_some_and(|id| id != 0 && id == end.id) {
            return true;
        }
        self.namespace
            .as_ref()
            .is_none_or(|namespace| **namespace == *end.namespace)
            && (self.prefix.is_empty() || end.pod_name.starts_with(&self.prefix))
    }
}

impl LabelSelector {
    /// Whether labels, each `source:key[=value]`, meet all requirements.
    #[must_use]
    pub fn matches<L: AsRef<str>>(&self, labels: &[L]) -> bool {
        self.0.iter().all(|requirement| requirement.holds(labels))
    }

    /// Reads a selector: `app=web`, `app==web`, `app!=web`, `app in (a, b)`, `app notin (a, b)`, `app`, `!app`, several
    /// with commas between them; each key may have a source, `k8s:app`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parts = split_outside_parentheses(text)?;
        parts
            .into_iter()
            .map(Requirement::parse)
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

fn split_outside_parentheses(text: &str) -> Result<Vec<&str>, String> {
    let (mut parts, mut start, mut inside) = (Vec::new(), 0, false);
    for (at, c) in text.char_indices() {
        match c {
            '(' if !inside => inside = true,
            ')' if inside => inside = false,
            '(' | ')' => return Err("the parentheses do not match; write key in (a,b)".into()),
            ',' if !inside => {
                parts.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    if inside {
        return Err("a ) is missing; write key in (a,b)".into());
    }
    parts.push(text[start..].trim());
    Ok(parts)
}

impl Requirement {
    fn parse(text: &str) -> Result<Self, String> {
        let (key, test) = if let Some(key) = text.strip_prefix('!') {
            (key, Test::Missing)
        } else if let Some((key, value)) = text.split_once("!=") {
            (key, Test::NotIn(vec![value.trim().into()]))
        } else if let Some((key, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
            (key, Test::In(vec![value.trim().into()]))
        } else if let Some(list) = text.strip_suffix(')') {
            let (head, values) = list.split_once('(').ok_or("a ( is missing; write key in (a,b)")?;
            let values = values.split(',').map(|value| value.trim().to_owned()).collect();
            match head.trim().rsplit_once(char::is_whitespace) {
                Some((key, "in")) => (key, Test::In(values)),
                Some((key, "notin")) => (key, Test::NotIn(values)),
                _ => return Err("a list of values needs in or notin before it; write key in (a,b)".into()),
            }
        } else {
            (text, Test::Exists)
        };
        let key = key.trim();
        let (source, key) = match key.split_once(':') {
            Some(("any", key)) => (None, key),
            Some((source, key)) => (Some(source.to_owned()), key),
            None => (None, key),
        };
        let value_is_odd = |value: &String| value.contains(['=', '!', '(', ')', ' ']);
        let odd = match &test {
            Test::In(values) | Test::NotIn(values) => values.iter().any(value_is_odd),
            Test::Exists | Test::Missing => false,
        };
        if key.is_empty() || key.contains([' ', '=', '!', '(', ')']) || odd {
            return Err("write key, key=value, key!=value, !key, key in (a,b) or key notin (a,b), with commas between".into());
        }
        Ok(Self {
            source,
            key: key.into(),
            test,
        })
    }

    fn holds<L: AsRef<str>>(&self, labels: &[L]) -> bool {
        let mut values = labels.iter().filter_map(|label| self.value_of(label.as_ref()));
        match &self.test {
            Test::Exists => values.next().is_some(),
            Test::Missing => values.next().is_none(),
            Test::In(wanted) => values.any(|have| wanted.iter().any(|want| want == have)),
            Test::NotIn(unwanted) => !values.any(|have| unwanted.iter().any(|want| want == have)),
        }
    }

    /// The label's value, if it is one with this key. A key may itself have a colon in it where its source has not.
    fn value_of<'a>(&self, label: &'a str) -> Option<&'a str> {
        let (name, value) = label.split_once('=').unwrap_or((label, ""));
        let (source, key) = name.split_once(':').unwrap_or(("", name));
        (key == self.key && self.source.as_ref().is_none_or(|want| want == source)).then_some(value)
    }
}

/// Makes [`Filters`] from flags, in the order in which they are given.
///
/// ```
/// use palisade_flowlog::{FilterBuilder, Timestamp};
/// let mut builder = FilterBuilder::new(Timestamp(0));
/// builder.flag("to-port", "443")?;
/// builder.flag("not", "")?;
/// builder.flag("from-ip", "10.0.0.0/8")?;
/// let filters = builder.finish()?;
/// assert_eq!((filters.whitelist.len(), filters.blacklist.len()), (1, 1));
/// # Ok::<(), palisade_flowlog::FilterError>(())
/// ```
#[derive(Clone, Debug)]
pub struct FilterBuilder {
    now: Timestamp,
    filters: Filters,
    wanted: FlowFilter,
    negate: bool,
}

impl FilterBuilder {
    /// Nothing filtered yet. Times that are relative are so to `now`.
    #[must_use]
    pub fn new(now: Timestamp) -> Self {
        Self {
            now,
            filters: Filters::default(),
            wanted: FlowFilter::default(),
            negate: false,
        }
    }

    /// The next flag, one of [`FLAGS`], and its value. Values may be several with commas between, where a comma
    /// can be no part of one.
    ///
    /// # Errors
    /// What is wrong with the value, and what would be right.
    pub fn flag(&mut self, flag: &str, value: &str) -> Result<(), FilterError> {
        let bad = |problem: String| FilterError::Value {
            flag: flag.into(),
            value: value.into(),
            problem,
        };
        match flag {
            "not" => {
                if self.negate {
                    return Err(FilterError::DanglingNot);
                }
                self.negate = true;
            }
            "since" | "until" => {
                if self.negate {
                    return Err(FilterError::NotReversible(flag.into()));
                }
                let time = Some(parse_time(value, self.now).map_err(bad)?);
                if flag == "since" {
                    self.filters.since = time;
                } else {
                    self.filters.until = time;
                }
            }
            _ if std::mem::take(&mut self.negate) => {
                let mut filter = FlowFilter::default();
                filter.set(flag, value)?;
                self.filters.blacklist.push(filter);
            }
            _ => self.wanted.set(flag, value)?,
        }
        Ok(())
    }

    /// The filters.
    ///
    /// # Errors
    /// If the last flag was `--not`.
    pub fn finish(mut self) -> Result<Filters, FilterError> {
        if self.negate {
            return Err(FilterError::DanglingNot);
        }
        if self.wanted != FlowFilter::default() {
            self.filters.whitelist.push(self.wanted);
        }
        Ok(self.filters)
    }
}

impl FlowFilter {
    fn set(&mut self, flag: &str, value: &str) -> Result<(), FilterError> {
        if !FLAGS.iter().any(|known| known.name == flag) {
            return Err(FilterError::Unknown(flag.into()));
        }
        let (side, member) = match flag.split_once('-') {
            Some(("from", member)) => (Side::Source, member),
            Some(("to", member)) => (Side::Destination, member),
            _ => (Side::Either, flag),
        };
        let result = match member {
            "ip" => each(value, parse_net, self.ip.side(side)),
            "label" => LabelSelector::parse(value).map(|selector| self.label.side(side).push(selector)),
            "identity" => each(value, parse_identity, self.identity.side(side)),
            "endpoint" | "pod" => each(value, parse_endpoint, self.endpoint.side(side)),
            "namespace" => each(value, |v| Ok(v.to_owned()), self.namespace.side(side)),
            "port" => each(value, parse_port, self.port.side(side)),
            "protocol" => parse_protocol(value).map(|numbers| self.protocol.extend(numbers)),
            "verdict" => each(value, parse_verdict, &mut self.verdict),
            "drop-reason-desc" => each(value, parse_drop_reason, &mut self.drop_reason_desc),
            "type" => each(value, parse_type, &mut self.event_type),
            "traffic-direction" => each(value, parse_direction, &mut self.traffic_direction),
            "reply" => each(value, parse_bool, &mut self.reply),
            "ip-version" => each(value, parse_version, &mut self.ip_version),
            "tcp-flags" => parse_tcp_flags(value).map(|flags| self.tcp_flags.push(flags)),
            "interface" => each(value, |v| Ok(v.to_owned()), &mut self.interface),
            "node-name" => each(value, |v| Ok(v.to_owned()), &mut self.node_name),
            "fqdn" => each(value, parse_name, self.fqdn.side(side)),
            "http-status" => each(value, parse_status, &mut self.http_status_code),
            "http-method" => each(value, parse_method, &mut self.http_method),
            "http-path" => TextPattern::parse(value).map(|pattern| self.http_path.push(pattern)),
            "http-url" => TextPattern::parse(value).map(|pattern| self.http_url.push(pattern)),
            "http-header" => parse_header(value).map(|header| self.http_header.push(header)),
            "sni" => each(value, parse_name, &mut self.tls_server_name),
            "dns-query" => QueryPattern::parse(value).map(|pattern| self.dns_query.push(pattern)),
            _ => return Err(FilterError::Unknown(flag.into())),
        };
        result.map_err(|problem| FilterError::Value {
            flag: flag.into(),
            value: value.into(),
            problem,
        })
    }
}

fn each<T>(value: &str, parse: impl Fn(&str) -> Result<T, String>, into: &mut Vec<T>) -> Result<(), String> {
    for part in value.split(',') {
        let part = part.trim();
        if part.is_empty() {
            return Err("a value is missing".into());
        }
        into.push(parse(part)?);
    }
    Ok(())
}

fn parse_net(text: &str) -> Result<IpNet, String> {
    let net = text
        .parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    net.map_err(|_| "not an address or a prefix, such as 10.0.1.10, 10.0.0.0/8 or fd00::/64".into())
}

fn parse_identity(text: &str) -> Result<u32, String> {
    let reserved = text.strip_prefix("reserved:").unwrap_or(text);
    let by_name = || (0..=identity::WORLD_IPV6).find(|number| reserved_name(*number) == Some(reserved));
    text.parse().ok().or_else(by_name).ok_or_else(|| {
        let names: Vec<_> = (1..=identity::WORLD_IPV6).filter_map(reserved_name).collect();
        format!("neither a number nor one of {}", names.join(", "))
    })
}

fn parse_endpoint(text: &str) -> Result<EndpointName, String> {
    Ok(match text.split_once('/') {
        Some((namespace, prefix)) => EndpointName {
            id: None,
            namespace: Some(namespace.into()),
            prefix: prefix.into(),
        },
        None => EndpointName {
            id: text.parse().ok(),
            namespace: None,
            prefix: text.into(),
        },
    })
}

fn parse_port(text: &str) -> Result<PortRange, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.trim().parse(), last.trim().parse()) {
        (Ok(first), Ok(last)) if first <= last => Ok(PortRange { first, last }),
        (Ok(first), Ok(last)) => Err(format!("the range ends before it begins; write {last}-{first}")),
        _ => Err("not a port (0 to 65535) or a range such as 8000-8999".into()),
    }
}

fn parse_protocol(text: &str) -> Result<Vec<ProtocolFilter>, String> {
    use ProtocolFilter::{Dns, Http, Ip, Tls};
    let mut wanted = Vec::new();
    for name in text.split(',') {
        match name.trim().to_ascii_lowercase().as_str() {
            "tcp" => wanted.push(Ip(protocol::TCP)),
            "udp" => wanted.push(Ip(protocol::UDP)),
            "sctp" => wanted.push(Ip(protocol::SCTP)),
            "icmp" => wanted.extend([Ip(protocol::ICMP), Ip(protocol::ICMPV6)]),
            "icmpv4" => wanted.push(Ip(protocol::ICMP)),
            "icmpv6" => wanted.push(Ip(protocol::ICMPV6)),
            "dns" => wanted.push(Dns),
            "http" => wanted.push(Http),
            "tls" => wanted.push(Tls),
            other => wanted.push(Ip(other.parse().map_err(
                |_| "none of tcp, udp, sctp, icmp, icmpv4, icmpv6, dns, http, tls, or an IP protocol number",
            )?)),
        }
    }
    Ok(wanted)
}

/// `404`, `40+` or `4+`.
fn parse_status(text: &str) -> Result<StatusFilter, String> {
    let (digits, more) = match text.strip_suffix('+') {
        Some(digits) => (digits, true),
        None => (text, false),
    };
    let number = digits
        .parse::<u32>()
        .ok()
        .filter(|_| digits.bytes().all(|byte| byte.is_ascii_digit()));
    let scale = match (digits.len(), more) {
        (1, true) => 100,
        (2, true) => 10,
        (3, false) => 1,
        _ => 0,
    };
    match number {
        Some(number) if scale != 0 && (100..600).contains(&(number * scale)) => Ok(StatusFilter {
            first: number * scale,
            last: (number + 1) * scale - 1,
        }),
        _ => Err("neither a status from 100 to 599 nor its first digits with a + (404, 40+, 4+)".into()),
    }
}

fn parse_method(text: &str) -> Result<String, String> {
    if text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(text.to_owned())
    } else {
        Err("not a method, such as GET".into())
    }
}

fn parse_header(text: &str) -> Result<HttpHeader, String> {
    match text.split_once(':') {
        Some((name, value)) if !name.trim().is_empty() => Ok(HttpHeader {
            key: name.trim().into(),
            value: value.trim().into(),
        }),
        _ => Err("not a field, such as content-type:text/html".into()),
    }
}

/// A name as flows have it: small letters, without its last dot.
fn parse_name(text: &str) -> Result<String, String> {
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    if name.is_empty() {
        return Err("a name is missing".into());
    }
    Ok(name)
}

fn parse_verdict(text: &str) -> Result<Verdict, String> {
    Verdict::from_name(text).ok_or_else(|| one_of(Verdict::ALL.iter().map(|v| v.name())))
}

fn parse_drop_reason(text: &str) -> Result<DropReason, String> {
    DropReason::from_name(text).ok_or_else(|| {
        let known = Reason::ALL
            .iter()
            .filter(|r| r.is_drop())
            .map(|r| DropReason(*r as u8));
        one_of(known.map(|reason| {
            reason
                .name()
                .map_or_else(|| format!("{:?}", reason.text()), str::to_owned)
        }))
    })
}

fn parse_type(text: &str) -> Result<EventTypeFilter, String> {
    let (name, sub) = match text.split_once(':') {
        Some((name, sub)) => (name, Some(sub)),
        None => (text, None),
    };
    let (kind, sub_type) = match (name.to_ascii_lowercase().as_str(), sub) {
        ("drop", None) => (event_type::DROP, None),
        ("drop", Some(sub)) => (event_type::DROP, Some(parse_drop_reason(sub)?.0.into())),
        ("trace", None) => (event_type::TRACE, None),
        ("trace", Some(sub)) => {
            let point = TracePoint::ALL
                .iter()
                .skip(1)
                .find(|point| point.text().eq_ignore_ascii_case(sub));
            let points = || one_of(TracePoint::ALL.iter().skip(1).map(|point| point.text()));
            (event_type::TRACE, Some(point.ok_or_else(points)?.sub_type()))
        }
        ("policy-verdict", None) => (event_type::POLICY_VERDICT, None),
        ("l7", None) => (event_type::ACCESS_LOG, None),
        ("policy-verdict" | "l7", Some(_)) => return Err(format!("{name} has no sub-types")),
        _ => return Err("none of trace, drop, policy-verdict, l7".into()),
    };
    Ok(EventTypeFilter { kind, sub_type })
}

fn parse_direction(text: &str) -> Result<TrafficDirection, String> {
    match text.to_ascii_lowercase().as_str() {
        "ingress" => Ok(TrafficDirection::Ingress),
        "egress" => Ok(TrafficDirection::Egress),
        _ => Err("neither ingress nor egress".into()),
    }
}

fn parse_bool(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| "neither true nor false".into())
}

fn parse_version(text: &str) -> Result<IpVersion, String> {
    match text.to_ascii_lowercase().as_str() {
        "4" | "v4" | "ipv4" => Ok(IpVersion::V4),
        "6" | "v6" | "ipv6" => Ok(IpVersion::V6),
        _ => Err("neither 4 nor 6".into()),
    }
}

fn parse_tcp_flags(text: &str) -> Result<TcpFlags, String> {
    text.split(',').try_fold(TcpFlags(0), |all, name| {
        let flag = TcpFlags::from_name(name.trim());
        flag.map(|flag| TcpFlags(all.0 | flag.0))
            .ok_or_else(|| one_of(TcpFlags(0xff).names()))
    })
}

fn one_of<T: Into<String>>(names: impl Iterator<Item = T>) -> String {
    let names: Vec<String> = names.map(Into::into).collect();
    format!("none of {}", names.join(", "))
}

/// RFC 3339, a date, or a duration before `now`.
fn parse_time(text: &str, now: Timestamp) -> Result<Timestamp, String> {
    let absolute: Result<Timestamp, ParseTimeError> = text.parse();
    let relative = || duration::parse(text).map(|ago| now.before(ago));
    absolute.or_else(|_| relative()).map_err(|_| {
        "neither a time such as 2026-04-28T01:04:16Z nor how long ago, such as 30s, 5m, 1h30m or 2d".into()
    })
}
