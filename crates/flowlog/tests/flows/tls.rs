//! Text and JSON of TLS ClientHellos.

use palisade_abi::{Reason, protocol};
use palisade_flowlog::{
    Flow, Timestamp,
    format::{Printer, Response, json},
};
use palisade_inspect::record::{Record, Text, Verdict, What};
use serde_json::{Value, json};

use crate::world::{ALLOW_WEB, DATABASE, OFFSET, World, address, event, passing};

/// ClientHello from client:54006 to db-1:443.
fn hello(name: &str, version: u16, ech: bool) -> Record {
    Record {
        endpoint: 11,
        ingress: false,
        reply: false,
        source: (address("10.0.1.10"), 54006),
        destination: (address("10.0.9.5"), 443),
        protocol: protocol::TCP,
        remote_identity: DATABASE,
        ifindex: 5,
        verdict: Verdict::Forwarded,
        reason: Reason::Allowed,
        rule: ALLOW_WEB,
        latency: None,
        what: What::TlsHello {
            name: Text::from(name.as_bytes()),
            version,
            ech,
        },
    }
}

fn denied(record: Record) -> Record {
    Record {
        verdict: Verdict::Dropped,
        reason: Reason::AppDenied,
        ..record
    }
}

fn flow(record: &Record) -> Flow {
    Flow::from_record(record, &World, Timestamp(OFFSET))
}

#[test]
fn lines() {
    const START: &str =
        "Apr 28 01:04:16.656: default/internal-client:54006 (ID:23217) -> db-1:443 (ID:16777219)";
    for (record, line) in [
        (
            hello("api.example.com", 0x0304, false),
            "tls-request FORWARDED (TLS Hello api.example.com (TLS 1.3))",
        ),
        (
            denied(hello("public.example", 0x0304, true)),
            "tls-request DROPPED (TLS Hello public.example (TLS 1.3, ECH))",
        ),
        (
            Record {
                verdict: Verdict::Audit,
                ..denied(hello("", 0x0303, false))
            },
            "tls-request AUDIT (TLS Hello without a name (TLS 1.2))",
        ),
        (
            denied(hello("a.example", 0x0a0a, false)),
            "tls-request DROPPED (TLS Hello a.example (version 0x0a0a))",
        ),
    ] {
        assert_eq!(
            Printer::default().flow(&flow(&record)),
            format!("{START} {line}\n")
        );
    }
}

#[test]
fn json_has_a_member_of_its_own() {
    let flow = flow(&hello("api.example.com", 0x0304, true));
    let text = json(&flow);
    let value: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(value["flow"]["l7"], json!({"type": "REQUEST"}));
    assert_eq!(
        value["flow"]["palisade"]["tls"],
        json!({"server_name": "api.example.com", "version": "TLS 1.3", "ech": true})
    );
    let response: Response<Flow> = serde_json::from_str(&text).expect("JSON");
    assert_eq!(response.flow, flow);
}

#[test]
fn filters_distinguish_the_records() {
    let flows = [
        ('a', flow(&hello("api.example.com", 0x0304, false))),
        ('w', flow(&denied(hello("www.example.com", 0x0304, false)))),
        ('n', flow(&denied(hello("", 0x0303, false)))),
        ('v', Flow::from_event(&event(), &World, OFFSET)),
    ];
    for (flags, expected) in [
        (&[("protocol", "tls")][..], "awn"),
        (&[("protocol", "tls"), ("protocol", "http")], "awn"),
        (&[("protocol", "http")], ""),
        (&[("sni", "API.example.com.")], "a"),
        (&[("sni", "*.example.com")], "aw"),
        (&[("sni", "api.example.com,www.example.com")], "aw"),
        (&[("sni", "*")], "awn"),
        (&[("not", ""), ("sni", "www.*")], "anv"),
        (&[("sni", "*"), ("verdict", "dropped")], "wn"),
    ] {
        assert_eq!(passing(&flows, flags), expected, "{flags:?}");
    }
}
