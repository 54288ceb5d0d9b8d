//! Enumerates the counters and gauges of an engine, so that callers can store, add and show them without knowing each
//! field.

use palisade_fqdn::Unsolicited;
use palisade_protocols::{dns, http1, http2, kafka, tls};

use crate::{DnsStats, FragmentStats, HttpStats, KafkaStats, Stats, TcpStats, TlsStats, http2::Http2Stats};

/// Name and kind of a counter or gauge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Metric {
    /// Group: `dns`, `tls.tcp` and so on.
    pub group: &'static str,
    /// Name of the field. In a group that counts by kind (`dns.malformed`), the text of the kind.
    pub name: &'static str,
    /// Whether the value is a gauge; otherwise it is a counter.
    pub now: bool,
}

/// Visits the fields of a struct. Each field must be in one of the lists, so that a new field is not forgotten: `so
/// far` are counters, `now` gauges, and fields `by hand` are visited by other code.
macro_rules! metrics {
    ($f:expr, $group:literal, $stats:expr => $type:ident {
        so far: $($name:ident)*;
        now: $($now:ident)*;
        by hand: $($hand:ident)*;
    }) => {{
        let $type { $($name,)* $($now,)* $($hand: _,)* } = $stats;
        let number = |name, now| Metric { group: $group, name, now };
        $($f(number(stringify!($name), false), *$name);)*
        $($f(number(stringify!($now), true), *$now);)*
    }};
}

impl Stats {
    /// Calls `f` for each value. The number of values and their order never change.
    pub fn visit(&self, f: &mut dyn FnMut(Metric, u64)) {
        metrics!(f, "inspection", self => Stats {
            so far: unsupported;
            now: ;
            by hand: dns http tls kafka fragments;
        });
        metrics!(f, "dns", &self.dns => DnsStats {
            so far: queries denied too_many replies answers transferred committed fast_path uncommitted overdue not_held audited;
            now: held;
            by hand: tcp malformed unsolicited;
        });
        let kinds = dns::ParseError::ALL.iter().map(|kind| kind.text());
        each_kind("dns.malformed", kinds, &self.dns.malformed, f);
        let kinds = Unsolicited::ALL.iter().map(|kind| kind.text());
        each_kind("dns.unsolicited", kinds, &self.dns.unsolicited, f);
        each_of_tcp("dns.tcp", &self.dns.tcp, f);
        metrics!(f, "http", &self.http => HttpStats {
            so far: requests denied responses unsolicited tunnels audited;
            now: ;
            by hand: tcp malformed;
        });
        let kinds = http1::ParseError::ALL.iter().map(|kind| kind.text());
        each_kind("http.malformed", kinds, &self.http.malformed, f);
        each_of_tcp("http.tcp", &self.http.tcp, f);
        metrics!(f, "tls", &self.tls => TlsStats {
            so far: hellos denied ech_denied sni_mismatches audited;
            now: ;
            by hand: tcp malformed;
        });
        let kinds = tls::ParseError::ALL.iter().map(|kind| kind.text());
        each_kind("tls.malformed", kinds, &self.tls.malformed, f);
        each_of_tcp("tls.tcp", &self.tls.tcp, f);
        metrics!(f, "kafka", &self.kafka => KafkaStats {
            so far: requests denied unknown_topic_ids unknown_sessions responses topic_ids contradicting_topic_ids audited;
            now: ;
            by hand: tcp malformed;
        });
        let kinds = kafka::ParseError::ALL.iter().map(|kind| kind.text());
        each_kind("kafka.malformed", kinds, &self.kafka.malformed, f);
        each_of_tcp("kafka.tcp", &self.kafka.tcp, f);
        metrics!(f, "fragments", &self.fragments => FragmentStats {
            so far: fragments complete incomplete contradicting duplicates limited;
            now: held;
            by hand: ;
        });
    }
}

impl Http2Stats {
    /// Calls `f` for each value, as [`Stats::visit`] does.
    pub fn visit(&self, f: &mut dyn FnMut(Metric, u64)) {
        metrics!(f, "http2", self => Http2Stats {
            so far: requests denied responses tunnels audited;
            now: ;
            by hand: malformed;
        });
        let kinds = http2::ParseError::ALL.iter().map(|kind| kind.text());
        each_kind("http2.malformed", kinds, &self.malformed, f);
    }
}

fn each_of_tcp(group: &'static str, stats: &TcpStats, f: &mut dyn FnMut(Metric, u64)) {
    let of_group = |number: Metric, value| f(Metric { group, ..number }, value);
    let mut f = of_group;
    metrics!(f, "tcp", stats => TcpStats {
        so far: opened retransmitted overlaps out_of_window invalid midstream limited overdue cut answered offloaded
            windows acknowledged delivered repeated split half_open_evicted replaced icmp_errors icmp_unrelated
            icmp_narrowed;
        now: connections half_open bytes frames offloaded_flows;
        by hand: ;
    });
}

fn each_kind(
    group: &'static str,
    kinds: impl Iterator<Item = &'static str>,
    counts: &[u64],
    f: &mut dyn FnMut(Metric, u64),
) {
    for (name, count) in kinds.zip(counts) {
        let number = Metric {
            group,
            name,
            now: false,
        };
        f(number, *count);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_value_has_a_unique_name() {
        let stats = Stats {
            tls: TlsStats {
                tcp: TcpStats {
                    connections: 7,
                    ..TcpStats::default()
                },
                ..TlsStats::default()
            },
            ..Stats::default()
        };
        let (mut names, mut found) = (HashSet::new(), 0);
        stats.visit(&mut |number, value| {
            assert!(names.insert((number.group, number.name)), "{number:?}");
            if value != 0 {
                let connections = Metric {
                    group: "tls.tcp",
                    name: "connections",
                    now: true,
                };
                assert_eq!((number, value), (connections, 7));
                found += 1;
            }
        });
        assert_eq!(found, 1);
        let mut again = Vec::new();
        Stats::default().visit(&mut |number, _| again.push(number));
        assert_eq!(again.len(), names.len());
        Http2Stats::default().visit(&mut |number, _| {
            assert!(names.insert((number.group, number.name)), "{number:?}");
        });
    }
}
