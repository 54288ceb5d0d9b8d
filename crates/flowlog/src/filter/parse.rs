//! Parsers of the values of filters.

use std::{borrow::Cow, collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use jiff::tz::TimeZone;
use palisade_abi::{identity, protocol};
use regex::RegexBuilder;
use strum::VariantArray as _;

use super::{
    api::{ApiFilter, EventTypeFilter},
    model::{LabelSelector, Pattern, PortRange, ProtocolFilter, Requirement, StatusFilter, Test},
};
use crate::{
    DropReason, Timestamp, duration,
    flow::{IpVersion, TcpFlags, TracePoint, TrafficDirection, Verdict, event_type as types, reserved_name},
};

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

pub(super) type Result<T> = std::result::Result<T, ValueError>;

/// Splits a comma-separated list. Returns at least one value; none is empty.
pub(super) fn list(value: &str) -> Result<Vec<String>> {
    value
        .split(',')
        .map(|part| match part.trim() {
            "" => Err("a value is missing".into()),
            part => Ok(part.to_owned()),
        })
        .collect()
}

/// Parses filters of the flow API: one or more JSON objects.
pub(super) fn raw_filters(text: &str) -> Result<Vec<ApiFilter>> {
    let filters: std::result::Result<Vec<ApiFilter>, _> =
        serde_json::Deserializer::from_str(text).into_iter().collect();
    match filters {
        Ok(filters) if filters.is_empty() => {
            Err("a filter is missing, such as {\"source_ip\":[\"10.0.0.0/8\"]}".into())
        }
        Ok(filters) => Ok(filters),
        Err(error) => Err(format!(
            "not a filter, such as {{\"source_ip\":[\"10.0.0.0/8\"],\"verdict\":[\"DROPPED\"]}}: {error}"
        )
        .into()),
    }
}

pub(super) fn net(text: &str) -> Result<IpNet> {
    let net = text
        .parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    net.map_err(|_| "not an address or a prefix, such as 10.0.1.10, 10.0.0.0/8 or fd00::/64".into())
}

pub(super) fn identity(text: &str) -> Result<u32> {
    let reserved = text.strip_prefix("reserved:").unwrap_or(text);
    let by_name = || (0..=identity::WORLD_IPV6).find(|number| reserved_name(*number) == Some(reserved));
    text.parse().ok().or_else(by_name).ok_or_else(|| {
        let names: Vec<_> = (1..=identity::WORLD_IPV6).filter_map(reserved_name).collect();
        format!("neither a number nor one of {}", names.join(", ")).into()
    })
}

pub(super) fn port(text: &str) -> Result<PortRange> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.trim().parse(), last.trim().parse()) {
        (Ok(first), Ok(last)) if first <= last => Ok(PortRange { first, last }),
        (Ok(first), Ok(last)) => Err(format!("the range ends before it begins; write {last}-{first}").into()),
        _ => Err("not a port (0 to 65535) or a range such as 8000-8999".into()),
    }
}

/// IP protocol number of VRRP (RFC 9568).
const VRRP: u8 = 112;

pub(super) fn protocol(text: &str) -> Result<Vec<ProtocolFilter>> {
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
            "igmp" => wanted.push(Ip(protocol::IGMP)),
            "vrrp" => wanted.push(Ip(VRRP)),
            "dns" => wanted.push(Dns),
            "http" => wanted.push(Http),
            "kafka" => wanted.push(Kafka),
            "tls" => wanted.push(Tls),
            other => wanted.push(Ip(other.parse().map_err(
                |_| "none of tcp, udp, sctp, icmp, icmpv4, icmpv6, igmp, vrrp, dns, http, kafka, tls, or an IP protocol number",
            )?)),
        }
    }
    Ok(wanted)
}

/// Parses `404`, `40+` or `4+`.
pub(super) fn status(text: &str) -> Result<StatusFilter> {
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

pub(super) fn method(text: &str) -> Result<String> {
    if text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(text.to_owned())
    } else {
        Err("not a method, such as GET".into())
    }
}

/// Returns a name in the form of the learned names and server names of flow records: in lower case, without a final
/// dot.
pub(super) fn name(text: &str) -> Result<String> {
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    if name.is_empty() {
        return Err("a name is missing".into());
    }
    bounded_name(name)
}

/// Returns a name or a pattern of names. The time of a match grows with the product of the lengths of pattern and name.
///
/// # Errors
/// Fails if the name is longer than any name can be.
pub(super) fn bounded_name(name: String) -> Result<String> {
    if name.len() > MAX_NAME_BYTES {
        return Err(format!(
            "a name of {} bytes; at most {MAX_NAME_BYTES} are possible",
            name.len()
        )
        .into());
    }
    Ok(name)
}

pub(super) fn verdict(text: &str) -> Result<Verdict> {
    enum_value(text, Verdict::from_name, Verdict::from_number)
        .ok_or_else(|| one_of(Verdict::VARIANTS.iter().map(|verdict| verdict.as_ref())))
}

/// Returns the value of an enumeration by its name or number.
fn enum_value<T>(
    text: &str,
    by_name: impl Fn(&str) -> Option<T>,
    by_number: impl Fn(i64) -> Option<T>,
) -> Option<T> {
    by_name(text).or_else(|| text.parse().ok().and_then(by_number))
}

pub(super) fn drop_reason(text: &str) -> Result<DropReason> {
    DropReason::from_name(text).ok_or_else(|| one_of(DropReason::of_palisade().filter_map(DropReason::name)))
}

/// Parses `TYPE[:SUBTYPE]`, both by name or number.
pub(super) fn event_type(text: &str) -> Result<EventTypeFilter> {
    let (name, sub) = match text.split_once(':') {
        Some((name, sub)) => (name, Some(sub)),
        None => (text, None),
    };
    let name = name.to_ascii_lowercase();
    let known = types::NAMES.iter().find(|(known, _)| *known == name);
    let kind = known
        .map(|(_, number)| *number)
        .or_else(|| name.parse().ok())
        .ok_or_else(|| one_of(types::NAMES.iter().map(|(known, _)| *known)))?;
    let sub_type = match (kind, sub) {
        (_, None) => None,
        (types::DROP, Some(sub)) => Some(drop_reason(sub)?.0.into()),
        (types::TRACE, Some(sub)) => {
            let known = TracePoint::from_name(sub).filter(|point| *point != TracePoint::Unknown);
            let number = known.map(TracePoint::sub_type).or_else(|| sub.parse().ok());
            Some(
                number
                    .ok_or_else(|| one_of(TracePoint::VARIANTS.iter().skip(1).map(|point| point.as_ref())))?,
            )
        }
        (_, Some(sub)) => Some(
            sub.parse()
                .map_err(|_| format!("{name} has no sub-types with names"))?,
        ),
    };
    Ok(EventTypeFilter {
        kind,
        match_sub_type: sub_type.is_some(),
        sub_type: sub_type.unwrap_or_default(),
    })
}

pub(super) fn direction(text: &str) -> Result<TrafficDirection> {
    enum_value(text, TrafficDirection::from_name, TrafficDirection::from_number)
        .ok_or_else(|| "neither ingress nor egress".into())
}

pub(super) fn boolean(text: &str) -> Result<bool> {
    text.parse().map_err(|_| "neither true nor false".into())
}

pub(super) fn version(text: &str) -> Result<IpVersion> {
    match text.to_ascii_lowercase().as_str() {
        "4" | "v4" | "ipv4" | "ip4" | "1" => Ok(IpVersion::V4),
        "6" | "v6" | "ipv6" | "ip6" | "2" => Ok(IpVersion::V6),
        "none" | "ip_not_used" | "0" => Ok(IpVersion::NotUsed),
        _ => Err("neither 4 nor 6 nor none".into()),
    }
}

/// Parses TCP flags by name; those that are false are not required.
pub(super) fn tcp_flags(flags: &BTreeMap<String, bool>) -> Result<TcpFlags> {
    let wanted = flags.iter().filter(|(_, on)| **on);
    let bits = wanted.map(|(name, _)| match TcpFlags::from_name(name) {
        Some(flag) => Ok(flag.0),
        None if name.eq_ignore_ascii_case("NS") => {
            Err("Palisade does not record the NS flag, which RFC 8311 made a reserved bit".into())
        }
        None => Err(one_of(TcpFlags(0xff).names())),
    });
    let bits: Vec<u8> = bits.collect::<Result<_>>()?;
    Ok(TcpFlags(bits.into_iter().fold(0, |all, bit| all | bit)))
}

fn one_of<T: Into<String>>(names: impl Iterator<Item = T>) -> ValueError {
    let names: Vec<String> = names.map(Into::into).collect();
    format!("none of {}", names.join(", ")).into()
}

/// Parses a time as [`Timestamp::parse_in`], or a duration, which is subtracted from `now`.
pub(super) fn time(text: &str, now: Timestamp, zone: &TimeZone) -> Result<Timestamp> {
    let relative = || duration::parse(text).map(|ago| now.before(ago));
    Timestamp::parse_in(text, now, zone)
        .or_else(|_| relative())
        .map_err(|_| {
            "neither how long ago, such as 30s, 5m, 1h30m or 2d, nor a time such as 2026-04-28T01:04:16Z, 2026-04-28 \
             01:04 or 'Apr 28 01:04:16.656'"
                .into()
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

impl<const IGNORE_CASE: bool> Pattern<IGNORE_CASE> {
    pub(super) fn parse(text: &str) -> Result<Self> {
        let regex = RegexBuilder::new(text)
            .case_insensitive(IGNORE_CASE)
            .size_limit(PATTERN_SIZE)
            .dfa_size_limit(PATTERN_CACHE_SIZE)
            .build();
        regex
            .map(Self)
            .map_err(|_| "not a regular expression, such as example\\.com, or one that is too large".into())
    }
}

/// Size limit of a compiled pattern, bytes: the daemon compiles the patterns of every client.
pub(super) const PATTERN_SIZE: usize = 64 << 10;
/// Size limit of the states of a pattern that are computed while texts are searched, bytes for each thread.
const PATTERN_CACHE_SIZE: usize = 256 << 10;
/// Longest name in a filter, bytes: that of a domain name (RFC 1035, section 2.3.4), also enough for names of nodes.
const MAX_NAME_BYTES: usize = 255;
