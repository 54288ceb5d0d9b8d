//! Text and JSON of HTTP requests and responses.

use std::fmt::Write as _;

use palisade_abi::{Reason, protocol};
use palisade_flowlog::{
    FilterBuilder, Flow, Timestamp,
    format::{Format, Printer, ReservedAs, Response, json, monitor},
};
use palisade_inspect::record::{Record, Text, Verdict, What, Word};
use serde_json::{Value, json};

use crate::world::{ALLOW_WEB, DEFAULT_DENY, OFFSET, WEB, World, address, event, passing};

fn text(text: &str) -> Text {
    let mut into = Text::default();
    into.write_str(text).expect("room");
    into
}

/// Request from client:54006 to web:80, allowed by the policy of web.
fn request() -> Record {
    Record {
        endpoint: 12,
        ingress: true,
        reply: false,
        source: (address("10.0.1.10"), 54006),
        destination: (address("10.0.1.20"), 80),
        protocol: protocol::TCP,
        remote_identity: 23217,
        ifindex: 5,
        verdict: Verdict::Forwarded,
        reason: Reason::Allowed,
        rule: ALLOW_WEB,
        latency: None,
        what: What::HttpRequest {
            method: Word::from(&b"GET"[..]),
            version: 1,
            url: text("http://web.shop/a%20list?x=1&token=[redacted]"),
            headers: text("User-Agent: curl/8.5.0\nx-request-id: 4711: 12\n"),
            mismatch: false,
        },
    }
}

/// Response to [`request`].
fn response() -> Record {
    Record {
        ingress: false,
        reply: true,
        source: request().destination,
        destination: request().source,
        latency: Some(12),
        what: answered(200, Some(5_000_000_000)),
        ..request()
    }
}

fn answered(status: u16, length: Option<u64>) -> What {
    What::HttpResponse {
        method: Word::from(&b"GET"[..]),
        url: text("http://web.shop/a%20list?x=1&token=[redacted]"),
        version: 1,
        status,
        length,
        headers: text("content-type: text/html\nuser-a"),
    }
}

fn denied() -> Record {
    Record {
        verdict: Verdict::Dropped,
        reason: Reason::AppDenied,
        rule: DEFAULT_DENY,
        what: What::HttpRequest {
            method: Word::from(&b"DELETE"[..]),
            version: 0,
            url: text("http://web.shop/admin"),
            headers: Text::default(),
            mismatch: false,
        },
        ..request()
    }
}

fn flow(record: &Record) -> Flow {
    Flow::from_record(record, &World, Timestamp(OFFSET))
}

fn compact(record: &Record) -> String {
    Printer::default().flow(&flow(record))
}

#[test]
fn lines() {
    const START: &str = "Apr 28 01:04:16.656: default/internal-client:54006 (ID:23217)";
    assert_eq!(
        compact(&request()),
        format!(
            "{START} -> shop/web:80 (ID:17513) http-request FORWARDED (HTTP/1.1 GET http://web.shop/a%20list?x=1&token=[redacted])\n"
        )
    );
    assert_eq!(
        compact(&response()),
        format!(
            "{START} <- shop/web:80 (ID:17513) http-response FORWARDED (HTTP/1.1 200 12ms (GET http://web.shop/a%20list?x=1&token=[redacted]))\n"
        )
    );
    assert_eq!(
        compact(&denied()),
        format!(
            "{START} -> shop/web:80 (ID:17513) http-request DROPPED (HTTP/1.0 DELETE http://web.shop/admin)\n"
        )
    );
    let audited = Record {
        verdict: Verdict::Audit,
        ..denied()
    };
    assert!(compact(&audited).contains("http-request AUDIT (HTTP/1.0 DELETE http://web.shop/admin)"));
    assert_eq!(
        monitor(&flow(&denied()), ReservedAs::Names),
        "-> http-request from endpoint 11 to endpoint 12, identity 23217->17513, verdict dropped (Denied by application rules), 10.0.1.10:54006 -> 10.0.1.20:80 tcp: HTTP/1.0 DELETE http://web.shop/admin\n"
    );
    let dict = Printer {
        format: Format::Dict,
        rules: true,
        ..Printer::default()
    };
    let text = dict.flow(&flow(&response()));
    for line in [
        "       TYPE: http-response\n",
        "    VERDICT: FORWARDED\n",
        "    SUMMARY: HTTP/1.1 200 12ms (GET ",
        "       RULE: [policy shop/allow-web ingress rule 1, shop.yaml:12]\n",
    ] {
        assert!(text.contains(line), "{line}{text}");
    }
}

#[test]
fn json_has_the_names_of_the_flow_api() {
    let value =
        |record: &Record| serde_json::from_str::<Value>(&json(&flow(record))).expect("JSON")["flow"].take();
    let asked = value(&request());
    assert_eq!(asked["Type"], "L7");
    assert_eq!(asked["event_type"], json!({"type": 129}));
    assert_eq!(asked["traffic_direction"], "INGRESS");
    assert_eq!(
        asked["l7"],
        json!({
            "type": "REQUEST",
            "http": {
                "method": "GET",
                "url": "http://web.shop/a%20list?x=1&token=[redacted]",
                "protocol": "HTTP/1.1",
                "headers": [
                    {"key": "user-agent", "value": "curl/8.5.0"},
                    {"key": "x-request-id", "value": "4711: 12"},
                ],
            },
        })
    );
    assert_eq!(asked["ingress_allowed_by"][0]["name"], "allow-web");

    let answer = value(&response());
    assert_eq!(
        answer["l7"],
        json!({
            "type": "RESPONSE",
            "latency_ns": "12000000",
            "http": {
                "code": 200,
                "method": "GET",
                "url": "http://web.shop/a%20list?x=1&token=[redacted]",
                "protocol": "HTTP/1.1",
                // A header field that was truncated before its value is left out.
                "headers": [{"key": "content-type", "value": "text/html"}],
            },
        })
    );
    assert_eq!(answer["palisade"]["body_length"], 5_000_000_000_u64);
    assert_eq!(answer["is_reply"], true);
    assert_eq!(answer["source"]["ID"], 12);
    assert_eq!(answer["traffic_direction"], "INGRESS");

    let refused = value(&denied());
    assert_eq!(refused["verdict"], "DROPPED");
    assert_eq!(refused["drop_reason"], Reason::AppDenied as u8);
    assert_eq!(refused["ingress_denied_by"].as_array().map(Vec::len), Some(2));
    assert_eq!(refused["palisade"]["rule"]["id"], DEFAULT_DENY);
    assert_eq!(refused["palisade"]["body_length"], Value::Null);

    for record in [request(), response(), denied()] {
        let flow = flow(&record);
        let response: Response<Flow> = serde_json::from_str(&json(&flow)).expect("JSON");
        assert_eq!(response.flow, flow);
    }
}

#[test]
fn filters_distinguish_the_records() {
    // q: the request, a: its response, d: a denied request, n: not found, e: an error, t: a request of a distributed
    // trace, z: one whose trace has an invalid identifier, v: a policy verdict
    let with = |status| {
        flow(&Record {
            what: answered(status, None),
            ..response()
        })
    };
    let traced = |traceparent: &str| {
        flow(&Record {
            what: What::HttpRequest {
                method: Word::from(&b"POST"[..]),
                version: 1,
                url: text("http://web.shop/traced"),
                headers: text(&format!("Traceparent: {traceparent}\n")),
                mismatch: false,
            },
            ..request()
        })
    };
    let flows = [
        ('q', flow(&request())),
        ('a', flow(&response())),
        ('d', flow(&denied())),
        ('n', with(404)),
        ('e', with(503)),
        (
            't',
            traced("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ),
        (
            'z',
            traced("00-00000000000000000000000000000000-b7ad6b7169203331-01"),
        ),
        ('v', Flow::from_event(&event(), &World, OFFSET)),
    ];
    assert_eq!(flows[0].1.destination.identity, WEB);
    for (flags, expected) in [
        (&[("protocol", "http")][..], "qadnetz"),
        (&[("trace-id", "0af7651916cd43dd8448eb211c80319c")], "t"),
        (
            &[(
                "trace-id",
                "ffffffffffffffffffffffffffffffff,0af7651916cd43dd8448eb211c80319c",
            )],
            "t",
        ),
        (&[("trace-id", "0af7651916cd43dd8448eb211c80319")], ""),
        (&[("trace-id", "00000000000000000000000000000000")], ""),
        (
            &[("not", ""), ("trace-id", "0af7651916cd43dd8448eb211c80319c")],
            "qadnezv",
        ),
        (&[("protocol", "HTTP,dns,tls")], "qadnetz"),
        (&[("protocol", "tcp")], "qadnetzv"),
        (&[("not", ""), ("protocol", "http")], "v"),
        (&[("http-status", "404")], "n"),
        (&[("http-status", "4+")], "n"),
        (&[("http-status", "50+")], "e"),
        (&[("http-status", "2+,5+")], "ae"),
        (&[("http-status", "200"), ("http-status", "404")], "an"),
        (&[("http-status", "1+")], ""),
        (&[("not", ""), ("http-status", "4+")], "qadetzv"),
        (&[("http-method", "get")], "qane"),
        (&[("http-method", "DELETE,PUT")], "d"),
        (&[("http-method", "GET"), ("reply", "true")], "ane"),
        (&[("http-path", "^/a list$")], "qane"),
        (&[("http-path", "^/Admin")], ""),
        (&[("http-path", "^/admin"), ("http-path", "list")], "qadne"),
        (&[("http-path", "token")], ""),
        (&[("http-url", "^http://web\\.shop/a%20list\\?x=1&")], "qane"),
        (&[("http-url", "(?i)ADMIN")], "d"),
        (&[("http-header", "User-Agent:curl/8.5.0")], "q"),
        (&[("http-header", "x-request-id: 4711: 12")], "q"),
        (&[("http-header", "content-type:text/html")], "ane"),
        (&[("http-header", "content-type:text")], ""),
        (&[("verdict", "dropped"), ("type", "l7")], "d"),
        (&[("http-status", "4+"), ("http-method", "PUT")], ""),
    ] {
        assert_eq!(passing(&flows, flags), expected, "{flags:?}");
    }
    let mut builder = FilterBuilder::new(Timestamp(OFFSET));
    for (flag, value) in [
        ("http-status", "4"),
        ("http-status", "40"),
        ("http-status", "404+"),
        ("http-status", "600"),
        ("http-status", "6+"),
        ("http-status", "099"),
        ("http-status", "+"),
        ("http-status", "++4"),
        ("http-status", "+40"),
        ("http-status", ""),
        ("http-method", "a b"),
        ("http-path", "("),
        ("http-path", "(a{1000}){1000}"),
        ("http-url", "["),
        ("http-header", "accept"),
        ("http-header", ":x"),
        ("protocol", "htp"),
    ] {
        assert!(builder.flag(flag, value).is_err(), "{flag} {value}");
    }
}
