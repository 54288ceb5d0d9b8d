//! Output of fixed flows of every kind in every format, compared with the files in `tests/golden`. With UPDATE_GOLDEN=1
//! in the environment the files are written instead; then read the difference before you commit it.

use std::{env, fmt::Write as _, fs, path::PathBuf};

use jiff::tz::TimeZone;
use palisade_abi::{Event, EventKind, MatchKind, Reason, TracePoint, event_flags, identity, protocol};
use palisade_flowlog::{
    FieldMask, Flow, LostSource, TimeFormat, Timestamp, Uuid,
    format::{Format, Listing, Printer, ReservedAs, monitor, monitor_verbose},
    input::{self, Line},
};
use palisade_inspect::record::{Record, Text, Verdict, What, Word};

use crate::world::{ALLOW_DNS, ALLOW_WEB, OFFSET, WEB, World, address, denied, event, flow};

/// Compares a text with a golden file.
#[track_caller]
fn check(name: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, text).expect("writable");
        return;
    }
    let wanted = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(
        text == wanted,
        "{} differs:\n{}",
        path.display(),
        diff(&wanted, text)
    );
}

/// Returns the lines that differ, with their numbers.
fn diff(wanted: &str, got: &str) -> String {
    let (wanted, got): (Vec<_>, Vec<_>) = (wanted.lines().collect(), got.lines().collect());
    let mut text = String::new();
    for at in 0..wanted.len().max(got.len()) {
        let (wanted, got) = (wanted.get(at), got.get(at));
        if wanted != got {
            for (sign, line) in [('-', wanted), ('+', got)] {
                if let Some(line) = line {
                    let _ = writeln!(text, "{:>4} {sign} {line}", at + 1);
                }
            }
        }
    }
    text
}

fn trace(point: TracePoint, flags: u8) -> Event {
    Event {
        kind: EventKind::Trace as u8,
        trace_point: point as u8,
        flags,
        ..event()
    }
}

fn events() -> Vec<Event> {
    let answer = Event {
        source: event().destination,
        destination: event().source,
        source_port: 80,
        destination_port: 54006,
        source_identity: event().destination_identity,
        destination_identity: event().source_identity,
        tcp_flags: 0x12,
        ..trace(TracePoint::Start, event_flags::EGRESS | event_flags::REPLY)
    };
    let v6 = |event: Event, destination: &str, identity| Event {
        source: address("fd00::10"),
        destination: address(destination),
        destination_identity: identity,
        flags: event.flags | event_flags::IPV6,
        ..event
    };
    let ports_of = |protocol, from, to| Event {
        protocol,
        source_port: from,
        destination_port: to,
        tcp_flags: 0,
        ..event()
    };
    let audited = Event {
        flags: denied(EventKind::PolicyVerdict).flags | event_flags::AUDIT,
        reason: Reason::Audited as u8,
        ..denied(EventKind::PolicyVerdict)
    };
    let no_ip = Event {
        kind: EventKind::Drop as u8,
        reason: Reason::UnsupportedL3 as u8,
        flags: event_flags::REPLY_UNKNOWN,
        ether_type: 0x88cc,
        protocol: 0,
        endpoint: 0,
        rule: 0,
        source_identity: 0,
        destination_identity: 0,
        ..event()
    };
    vec![
        event(),
        v6(event(), "fd00::20", WEB),
        trace(TracePoint::Start, 0),
        answer,
        Event {
            forward_packets: 4,
            forward_bytes: 400,
            reply_packets: 3,
            reply_bytes: 5_000_000_000,
            tcp_flags: 0x11,
            ..trace(TracePoint::End, 0)
        },
        denied(EventKind::PolicyVerdict),
        denied(EventKind::Drop),
        v6(
            denied(EventKind::PolicyVerdict),
            "2001:db8::5",
            identity::WORLD_IPV6,
        ),
        v6(denied(EventKind::Drop), "2001:db8::5", identity::WORLD_IPV6),
        audited,
        v6(audited, "2001:db8::5", identity::WORLD_IPV6),
        Event {
            reason: Reason::PolicyDeniedByDenylist as u8,
            match_kind: MatchKind::L3Only as u8,
            rule: ALLOW_WEB,
            ..denied(EventKind::PolicyVerdict)
        },
        Event {
            reason: Reason::NoTlsInspector as u8,
            ..denied(EventKind::Drop)
        },
        ports_of(protocol::UDP, 5353, 53),
        ports_of(protocol::SCTP, 7, 9),
        v6(ports_of(protocol::SCTP, 7, 9), "fd00::20", WEB),
        ports_of(protocol::ICMP, 8, 0),
        ports_of(protocol::ICMP, 3, 3),
        v6(ports_of(protocol::ICMPV6, 128, 0), "fd00::20", WEB),
        v6(ports_of(protocol::ICMPV6, 1, 4), "fd00::20", WEB),
        ports_of(47, 0, 0),
        Event {
            flags: event_flags::FRAGMENT,
            ..ports_of(protocol::UDP, 0, 0)
        },
        no_ip,
    ]
}

fn records() -> Vec<Record> {
    let text = |text: &str| Text::from(text.as_bytes());
    let to_web = |port, protocol, what| Record {
        endpoint: 11,
        ingress: false,
        reply: false,
        source: (address("10.0.1.10"), 60700),
        destination: (address("10.0.1.20"), port),
        protocol,
        remote_identity: WEB,
        ifindex: 5,
        verdict: Verdict::Forwarded,
        reason: Reason::Allowed,
        rule: ALLOW_DNS,
        latency: None,
        what,
    };
    let answer_to = |record: &Record, what| Record {
        ingress: true,
        reply: true,
        source: record.destination,
        destination: record.source,
        latency: Some(12),
        what,
        ..*record
    };
    let denied = |record: Record| Record {
        verdict: Verdict::Dropped,
        reason: Reason::AppDenied,
        ..record
    };
    let v6 = |record: Record| Record {
        source: (address("fd00::10"), record.source.1),
        destination: (address("fd00::20"), record.destination.1),
        ..record
    };
    let query = |name: &str| {
        to_web(
            53,
            protocol::UDP,
            What::DnsQuery {
                name: text(name),
                kind: 1,
            },
        )
    };
    let mut addresses = [palisade_abi::Addr::UNSPECIFIED; 8];
    addresses[0] = address("34.117.118.44");
    addresses[1] = address("2001:db8::44");
    let answer = |rcode, count, cname: &str| What::DnsAnswer {
        name: text("ifconfig.me"),
        kind: 1,
        rcode,
        addresses,
        count,
        ttl: 30,
        cname: text(cname),
    };
    let get = to_web(
        80,
        protocol::TCP,
        What::HttpRequest {
            method: Word::from(&b"GET"[..]),
            version: 1,
            url: text("http://web.shop/a%20list?token=[redacted]"),
            headers: text(
                "x-request-id: 4711\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\n",
            ),
            mismatch: false,
        },
    );
    let ok = What::HttpResponse {
        method: Word::from(&b"GET"[..]),
        url: text("http://web.shop/a%20list?token=[redacted]"),
        version: 1,
        status: 200,
        length: Some(512),
        headers: text("content-type: text/html\n"),
    };
    let kafka = |error| What::Kafka {
        key: 0,
        version: 9,
        correlation: 7,
        error,
        topic: text("orders\n"),
        client: text("shop"),
    };
    let produce = to_web(9092, protocol::TCP, kafka(0));
    let hello = |name: &str, ech| {
        to_web(
            443,
            protocol::TCP,
            What::TlsHello {
                name: text(name),
                version: 0x0304,
                ech,
            },
        )
    };
    vec![
        query("ifconfig.me"),
        answer_to(&query("ifconfig.me"), answer(0, 2, "edge.example")),
        answer_to(&query("ifconfig.me"), answer(3, 0, "")),
        denied(query("evil.example")),
        v6(query("ifconfig.me")),
        get,
        answer_to(&get, ok),
        denied(v6(get)),
        Record {
            verdict: Verdict::Audit,
            reason: Reason::AppDenied,
            ..get
        },
        produce,
        answer_to(&produce, kafka(29)),
        denied(Record {
            what: kafka(29),
            ..produce
        }),
        hello("good.example", false),
        denied(hello("", true)),
        Record {
            verdict: Verdict::Dropped,
            reason: Reason::InterceptFailed,
            what: What::Intercept {
                name: text("good.example"),
                error: text("certificate expired"),
            },
            ..hello("", false)
        },
        Record {
            verdict: Verdict::Dropped,
            reason: Reason::AppMalformed,
            what: What::Unreadable {
                detail: "opcode other than QUERY",
            },
            ..query("")
        },
    ]
}

/// All flows, one per millisecond, with the identifiers that a ring gives.
fn flows() -> Vec<Flow> {
    let events = events();
    let of_events = events.iter().map(flow);
    let records = records();
    let of_records = records
        .iter()
        .map(|record| Flow::from_record(record, &World, Timestamp(OFFSET)));
    let numbered = of_events.chain(of_records).enumerate().map(|(number, mut flow)| {
        flow.uuid = Uuid::new(0x0123_4567_89ab_cdef, number as u64);
        flow.time = Timestamp(OFFSET + number as i64 * 1_000_000);
        flow
    });
    numbered.collect()
}

fn listing(printer: Printer, flows: &[Flow]) -> String {
    let mut listing = Listing::new(printer);
    let mut text: String = flows.iter().map(|flow| listing.flow(flow, None)).collect();
    for (source, count) in [
        (LostSource::HubbleRingBuffer, 3),
        (LostSource::PerfEventRingBuffer, 4),
        (LostSource::ObserverEventsQueue, 5),
    ] {
        text += &listing.lost(source.as_ref(), count);
    }
    text + &listing.finish()
}

#[test]
fn every_format() {
    let flows = flows();
    for (name, format) in [
        ("compact", Format::Compact),
        ("dict", Format::Dict),
        ("table", Format::Table),
        ("json", Format::Json),
    ] {
        let printer = Printer {
            format,
            ..Printer::default()
        };
        check(&format!("flows.{name}"), &listing(printer.clone(), &flows));
        let with_all = Printer {
            node: true,
            rules: true,
            policy_names: true,
            time: TimeFormat::Rfc3339Milli,
            zone: TimeZone::fixed(jiff::tz::offset(2)),
            ..printer
        };
        if format != Format::Json {
            check(&format!("flows-all.{name}"), &listing(with_all, &flows));
        }
    }
    let numeric = Printer {
        numeric: true,
        colour: true,
        ..Printer::default()
    };
    check("flows-numeric-colour.compact", &listing(numeric, &flows));
    let mut mask = FieldMask::default();
    mask.add_list("time,uuid,verdict,source.pod_name,l7.dns,drop_reason_desc")
        .expect("a mask");
    let masked = Printer {
        format: Format::Json,
        mask,
        ..Printer::default()
    };
    check("flows-mask.json", &listing(masked, &flows));
    type Line = fn(&Flow, ReservedAs) -> String;
    for (name, reserved) in [("", ReservedAs::Names), ("-numeric", ReservedAs::Numbers)] {
        for (kind, line) in [("monitor", monitor as Line), ("monitor-verbose", monitor_verbose)] {
            let lines: String = flows.iter().map(|flow| line(flow, reserved)).collect();
            check(&format!("flows.{kind}{name}"), &lines);
        }
    }
}

#[test]
fn json_is_read_back() {
    for flow in flows() {
        let printer = Printer {
            format: Format::Json,
            ..Printer::default()
        };
        let text = Listing::new(printer).flow(&flow, None);
        let Ok(Line::Flow { flow: read, .. }) = input::line(&text) else {
            panic!("not a flow: {text}");
        };
        assert_eq!(*read, flow);
    }
}

#[test]
fn flows_of_a_cilium_cluster() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/hubble.jsonl");
    let lines = fs::read_to_string(path).expect("a file");
    for (name, format) in [
        ("compact", Format::Compact),
        ("dict", Format::Dict),
        ("table", Format::Table),
        ("json", Format::Json),
    ] {
        let printer = Printer {
            format,
            node: true,
            policy_names: true,
            ..Printer::default()
        };
        let mut listing = Listing::new(printer);
        let mut text = String::new();
        for line in lines.lines() {
            text += &match input::line(line).expect(line) {
                Line::Flow { flow, json } => listing.flow(&flow, Some(&json)),
                Line::Lost { source, count } => listing.lost(&source, count),
                Line::Other => String::new(),
            };
        }
        check(&format!("hubble.{name}"), &(text + &listing.finish()));
    }
}

#[test]
fn a_difference_shows_the_lines() {
    assert_eq!(
        diff("a\nb\nc\n", "a\nx\nc\nd\n"),
        "   2 - b\n   2 + x\n   4 + d\n"
    );
}
