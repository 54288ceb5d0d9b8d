//! Matching of flows against filters.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{
    api::{EventTypeFilter, InterfaceFilter},
    model::{
        EndpointName, Filters, FlowFilter, LabelSelector, PortRange, ProtocolFilter, Requirement, Sided, Test,
    },
};
use crate::flow::{Endpoint, EventType, Flow, IpVersion, Layer4, NetworkInterface, Workload};

impl Filters {
    /// Returns whether the flow passes all filters.
    #[must_use]
    pub fn matches(&self, flow: &Flow) -> bool {
        self.since.is_none_or(|since| flow.time >= since)
            && self.until.is_none_or(|until| flow.time <= until)
            && (self.whitelist.is_empty() || self.whitelist.iter().any(|filter| filter.matches(flow)))
            && !self.blacklist.iter().any(|filter| filter.matches(flow))
    }
}

impl FlowFilter {
    /// Returns whether each field that is not empty matches the flow.
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

        any(&self.uuid, |want| *want == flow.uuid)
            && any(&self.event_type, |want| want.matches(flow.event_type))
            && any(&self.verdict, |want| *want == flow.verdict)
            && any(&self.drop_reason_desc, |want| *want == flow.drop_reason_desc)
            && any(&self.traffic_direction, |want| *want == flow.traffic_direction)
            && any(&self.reply, |want| Some(*want) == flow.is_reply)
            && any(&self.protocol, |want| match want {
                ProtocolFilter::Ip(number) => flow.ip.is_some() && *number == flow.protocol(),
                ProtocolFilter::Dns => dns.is_some(),
                ProtocolFilter::Http => http.is_some(),
                ProtocolFilter::Kafka => flow.l7.as_ref().is_some_and(|l7| l7.kafka.is_some()),
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
            && any(&self.trace_id, |want| flow.trace_id() == Some(want))
            && any(&self.sni, |want| {
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
                flow.ip.map_or(IpVersion::NotUsed, |ip| ip.version) == *want
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
            && self.pod.matches(source, destination, |want, end| {
                !(end.namespace.is_empty() && end.pod_name.is_empty()) && want.matches(end)
            })
            && self.endpoint.matches(source, destination, EndpointName::matches)
            && self.workload.matches(source, destination, |want, end| {
                end.workloads.iter().any(|have| want.selects(have))
            })
            && self
                .label
                .matches(source, destination, |want, end| want.matches(&end.labels))
            && any(&self.interface, |want| {
                flow.interface.as_ref().is_some_and(|have| want.matches(have))
            })
            && any(&self.node_labels, |want| want.matches(&flow.node_labels))
            && any(&self.node_name, |want| matches_pattern(want, &flow.node_name))
    }
}

/// Returns the percent-decoded path of a URL, without its query.
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

/// Returns whether a field of a filter is empty or one of its values matches.
fn any<T>(wanted: &[T], matches: impl FnMut(&T) -> bool) -> bool {
    wanted.is_empty() || wanted.iter().any(matches)
}

/// Returns whether the text matches a pattern with `*` for any text, in a time proportional to the sum of the lengths:
/// each part between two `*` is taken at its first place, which leaves the most text to the later ones, and `str::find`
/// is linear.
fn matches_pattern(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else {
        return false;
    };
    let Some(last) = parts.next_back() else {
        return rest.is_empty();
    };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
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

impl EventTypeFilter {
    fn matches(&self, have: EventType) -> bool {
        (self.kind == 0 || self.kind == have.kind) && (!self.match_sub_type || self.sub_type == have.sub_type)
    }
}

impl InterfaceFilter {
    fn matches(&self, have: &NetworkInterface) -> bool {
        (self.index == 0 || self.index == have.index) && (self.name.is_empty() || *self.name == *have.name)
    }
}

impl Workload {
    /// Returns whether each part of this workload that is not empty is the same in another one.
    fn selects(&self, have: &Self) -> bool {
        (self.name.is_empty() || self.name == have.name) && (self.kind.is_empty() || self.kind == have.kind)
    }
}

impl LabelSelector {
    /// Returns whether the labels, each `source:key[=value]`, meet all requirements.
    #[must_use]
    pub fn matches<L: AsRef<str>>(&self, labels: &[L]) -> bool {
        self.0.iter().all(|requirement| requirement.holds(labels))
    }
}

impl Requirement {
    fn holds<L: AsRef<str>>(&self, labels: &[L]) -> bool {
        let mut values = labels.iter().filter_map(|label| self.value_of(label.as_ref()));
        match &self.test {
            Test::Exists => values.next().is_some(),
            Test::Missing => values.next().is_none(),
            Test::In(wanted) => values.any(|have| wanted.iter().any(|want| want == have)),
            Test::NotIn(unwanted) => !values.any(|have| unwanted.iter().any(|want| want == have)),
        }
    }

    /// Returns the value of a label if the label has the source and key of this requirement; an empty text if the label
    /// has no value. The first colon separates source and key; a key can contain more colons.
    fn value_of<'a>(&self, label: &'a str) -> Option<&'a str> {
        let (name, value) = label.split_once('=').unwrap_or((label, ""));
        let (source, key) = name.split_once(':').unwrap_or(("", name));
        (key == self.key && self.source.as_ref().is_none_or(|want| want == source)).then_some(value)
    }
}

impl<T> Sided<T> {
    fn matches<H: Copy>(&self, source: H, destination: H, test: impl Fn(&T, H) -> bool) -> bool {
        any(&self.source, |want| test(want, source)) && any(&self.destination, |want| test(want, destination))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_texts() {
        for (pattern, text, expected) in [
            ("a", "a", true),
            ("a", "ab", false),
            ("", "", true),
            ("*", "", true),
            ("*", "x.y", true),
            ("*.example.com", "a.b.example.com", true),
            ("*.example.com", "example.com", false),
            ("a*b*c", "abbbxbc", true),
            ("a*b*c", "abbbxb", false),
            ("a**c", "ac", true),
            ("*é", "aé", true),
        ] {
            assert_eq!(matches_pattern(pattern, text), expected, "{pattern} {text}");
        }
        // With a search of every combination of places this would not end.
        let pattern = "*a".repeat(100) + "b";
        assert!(!matches_pattern(&pattern, &"a".repeat(250)));
    }

    /// Tries every length of the text of a `*`.
    fn naive(pattern: &[u8], text: &[u8]) -> bool {
        match pattern {
            [] => text.is_empty(),
            [b'*', rest @ ..] => (0..=text.len()).any(|length| naive(rest, &text[length..])),
            [byte, rest @ ..] => text.first() == Some(byte) && naive(rest, &text[1..]),
        }
    }

    proptest::proptest! {
        #[test]
        fn a_pattern_matches_what_a_search_of_all_places_finds(pattern in "[ab*]{0,6}", text in "[ab]{0,8}") {
            assert_eq!(matches_pattern(&pattern, &text), naive(pattern.as_bytes(), text.as_bytes()));
        }
    }
}
