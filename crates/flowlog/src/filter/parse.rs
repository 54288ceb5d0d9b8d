//! Construction of filters from command-line flags, and parsers of their values.

use std::{borrow::Cow, net::IpAddr};

use ipnet::IpNet;
use palisade_abi::{Reason, identity, protocol};
use regex::RegexBuilder;
use strum::VariantArray as _;

use super::{
    flags::FLAGS,
    model::{
        EndpointName, EventTypeFilter, Filters, FlowFilter, LabelSelector, Pattern, PortRange,
        ProtocolFilter, QueryPattern, Requirement, Side, StatusFilter, Test, TextPattern,
    },
};
use crate::{
    Timestamp, duration,
    flow::{
        DropReason, HttpHeader, IpVersion, TcpFlags, TracePoint, TrafficDirection, Verdict, event_type,
        reserved_name,
    },
};

/// Error for a flag or its value.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FilterError {
    /// The value of a flag is invalid.
    #[error("--{flag} {value}: {problem}")]
    Value {
        /// Flag, without dashes.
        flag: String,
        /// Value as given.
        value: String,
        /// Description of the problem, with a valid example.
        problem: ValueError,
    },
    /// No such flag.
    #[error("--{0} is not a filter")]
    Unknown(String),
    /// `--not` is not followed by a filter.
    #[error("--not must stand before the filter that it reverses; there is none after it")]
    DanglingNot,
    /// `--not` precedes `--since` or `--until`.
    #[error("--not cannot reverse --{0}: use --since for a beginning and --until for an end")]
    NotReversible(String),
}

/// Description of the problem with a value, and a valid example. It is a text and not an enum, since only users read
/// it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(Cow<'static, str>);

impl From<&'static str> for ValueError {
    fn from(text: &'static str) -> Self {
        Self(text.into())
    }
}

impl From<String> for ValueError {
    fn from(text: String) -> Self {
        Self(text.into())
    }
}

type Result<T> = std::result::Result<T, ValueError>;

/// Makes [`Filters`] from flags, in the order of the command line.
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
    /// Returns a builder without filters. Relative times are subtracted from `now`.
    #[must_use]
    pub fn new(now: Timestamp) -> Self {
        Self {
            now,
            filters: Filters::default(),
            wanted: FlowFilter::default(),
            negate: false,
        }
    }

    /// Adds a flag, one of [`FLAGS`], with its value. A value can be a comma-separated list, except for flags whose
    /// single values can contain commas: selectors, regular expressions and header fields.
    ///
    /// # Errors
    /// [`FilterError`] if the flag is unknown, its value is invalid, or the flag cannot follow `--not`.
    pub fn flag(&mut self, flag: &str, value: &str) -> std::result::Result<(), FilterError> {
        let bad = |problem: ValueError| FilterError::Value {
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

    /// Returns the filters.
    ///
    /// # Errors
    /// [`FilterError::DanglingNot`] if the last flag was `--not`.
    pub fn finish(mut self) -> std::result::Result<Filters, FilterError> {
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
    fn set(&mut self, flag: &str, value: &str) -> std::result::Result<(), FilterError> {
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

fn each<T>(value: &str, parse: impl Fn(&str) -> Result<T>, into: &mut Vec<T>) -> Result<()> {
    for part in value.split(',') {
        let part = part.trim();
        if part.is_empty() {
            return Err("a value is missing".into());
        }
        into.push(parse(part)?);
    }
    Ok(())
}

fn parse_net(text: &str) -> Result<IpNet> {
    let net = text
        .parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    net.map_err(|_| "not an address or a prefix, such as 10.0.1.10, 10.0.0.0/8 or fd00::/64".into())
}

fn parse_identity(text: &str) -> Result<u32> {
    let reserved = text.strip_prefix("reserved:").unwrap_or(text);
    let by_name = || (0..=identity::WORLD_IPV6).find(|number| reserved_name(*number) == Some(reserved));
    text.parse().ok().or_else(by_name).ok_or_else(|| {
        let names: Vec<_> = (1..=identity::WORLD_IPV6).filter_map(reserved_name).collect();
        format!("neither a number nor one of {}", names.join(", ")).into()
    })
}

fn parse_endpoint(text: &str) -> Result<EndpointName> {
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

fn parse_port(text: &str) -> Result<PortRange> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.trim().parse(), last.trim().parse()) {
        (Ok(first), Ok(last)) if first <= last => Ok(PortRange { first, last }),
        (Ok(first), Ok(last)) => Err(format!("the range ends before it begins; write {last}-{first}").into()),
        _ => Err("not a port (0 to 65535) or a range such as 8000-8999".into()),
    }
}

fn parse_protocol(text: &str) -> Result<Vec<ProtocolFilter>> {
    use ProtocolFilter::{Dns, Http, Ip, Kafka, Tls};
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
            "kafka" => wanted.push(Kafka),
            "tls" => wanted.push(Tls),
            other => wanted.push(Ip(other.parse().map_err(
                |_| "none of tcp, udp, sctp, icmp, icmpv4, icmpv6, dns, http, kafka, tls, or an IP protocol number",
            )?)),
        }
    }
    Ok(wanted)
}

/// Parses `404`, `40+` or `4+`.
fn parse_status(text: &str) -> Result<StatusFilter> {
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

fn parse_method(text: &str) -> Result<String> {
    if text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(text.to_owned())
    } else {
        Err("not a method, such as GET".into())
    }
}

fn parse_header(text: &str) -> Result<HttpHeader> {
    match text.split_once(':') {
        Some((name, value)) if !name.trim().is_empty() => Ok(HttpHeader {
            key: name.trim().into(),
            value: value.trim().into(),
        }),
        _ => Err("not a field, such as content-type:text/html".into()),
    }
}

/// Returns a name in the form of the learned names and server names of flow records: in lower case, without a final
/// dot.
fn parse_name(text: &str) -> Result<String> {
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    if name.is_empty() {
        return Err("a name is missing".into());
    }
    Ok(name)
}

fn parse_verdict(text: &str) -> Result<Verdict> {
    text.parse()
        .map_err(|_| one_of(Verdict::VARIANTS.iter().map(|verdict| verdict.as_ref())))
}

fn parse_drop_reason(text: &str) -> Result<DropReason> {
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

fn parse_type(text: &str) -> Result<EventTypeFilter> {
    let (name, sub) = match text.split_once(':') {
        Some((name, sub)) => (name, Some(sub)),
        None => (text, None),
    };
    let (kind, sub_type) = match (name.to_ascii_lowercase().as_str(), sub) {
        ("drop", None) => (event_type::DROP, None),
        ("drop", Some(sub)) => (event_type::DROP, Some(parse_drop_reason(sub)?.0.into())),
        ("trace", None) => (event_type::TRACE, None),
        ("trace", Some(sub)) => {
            let point = TracePoint::VARIANTS
                .iter()
                .skip(1)
                .find(|point| point.as_ref().eq_ignore_ascii_case(sub));
            let points = || one_of(TracePoint::VARIANTS.iter().skip(1).map(|point| point.as_ref()));
            (event_type::TRACE, Some(point.ok_or_else(points)?.sub_type()))
        }
        ("policy-verdict", None) => (event_type::POLICY_VERDICT, None),
        ("l7", None) => (event_type::ACCESS_LOG, None),
        ("policy-verdict" | "l7", Some(_)) => return Err(format!("{name} has no sub-types").into()),
        _ => return Err("none of trace, drop, policy-verdict, l7".into()),
    };
    Ok(EventTypeFilter { kind, sub_type })
}

fn parse_direction(text: &str) -> Result<TrafficDirection> {
    match text.to_ascii_lowercase().as_str() {
        "ingress" => Ok(TrafficDirection::Ingress),
        "egress" => Ok(TrafficDirection::Egress),
        _ => Err("neither ingress nor egress".into()),
    }
}

fn parse_bool(text: &str) -> Result<bool> {
    text.parse().map_err(|_| "neither true nor false".into())
}

fn parse_version(text: &str) -> Result<IpVersion> {
    match text.to_ascii_lowercase().as_str() {
        "4" | "v4" | "ipv4" => Ok(IpVersion::V4),
        "6" | "v6" | "ipv6" => Ok(IpVersion::V6),
        _ => Err("neither 4 nor 6".into()),
    }
}

fn parse_tcp_flags(text: &str) -> Result<TcpFlags> {
    text.split(',').try_fold(TcpFlags(0), |all, name| {
        let flag = TcpFlags::from_name(name.trim());
        flag.map(|flag| TcpFlags(all.0 | flag.0))
            .ok_or_else(|| one_of(TcpFlags(0xff).names()))
    })
}

fn one_of<T: Into<String>>(names: impl Iterator<Item = T>) -> ValueError {
    let names: Vec<String> = names.map(Into::into).collect();
    format!("none of {}", names.join(", ")).into()
}

/// Parses a time in RFC 3339, a date, or a duration, which is subtracted from `now`.
fn parse_time(text: &str, now: Timestamp) -> Result<Timestamp> {
    let relative = || duration::parse(text).map(|ago| now.before(ago));
    text.parse().or_else(|_| relative()).map_err(|_| {
        "neither a time such as 2026-04-28T01:04:16Z nor how long ago, such as 30s, 5m, 1h30m or 2d".into()
    })
}

impl LabelSelector {
    /// Parses a comma-separated list of `app=web`, `app==web`, `app!=web`, `app in (a, b)`, `app notin (a, b)`, `app`
    /// and `!app`. Each key can have a source: `k8s:app`.
    ///
    /// # Errors
    /// [`ValueError`] if the text does not follow this syntax.
    pub fn parse(text: &str) -> Result<Self> {
        let parts = split_outside_parentheses(text)?;
        parts
            .into_iter()
            .map(Requirement::parse)
            .collect::<Result<_>>()
            .map(Self)
    }
}

fn split_outside_parentheses(text: &str) -> Result<Vec<&str>> {
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
    fn parse(text: &str) -> Result<Self> {
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
}

impl<const IGNORE_CASE: bool> TryFrom<String> for Pattern<IGNORE_CASE> {
    type Error = ValueError;

    fn try_from(text: String) -> Result<Self> {
        Self::parse(&text)
    }
}

impl<const IGNORE_CASE: bool> Pattern<IGNORE_CASE> {
    fn parse(text: &str) -> Result<Self> {
        let regex = RegexBuilder::new(text)
            .case_insensitive(IGNORE_CASE)
            .size_limit(PATTERN_SIZE)
            .build();
        regex
            .map(Self)
            .map_err(|_| "not a regular expression, such as example\\.com, or one that is too large".into())
    }
}

/// Size limit of a compiled pattern, bytes: the daemon compiles the patterns of every client of the control socket.
const PATTERN_SIZE: usize = 1 << 20;
