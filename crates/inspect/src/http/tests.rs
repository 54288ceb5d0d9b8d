//! Tests of HTTP inspection through the engine, with a client and a server that exchange segments.

use std::{collections::BTreeMap, sync::Arc};

use palisade_abi::{Inspector, PuntRequest, Reason};
use palisade_model::{
    rule::HttpRule,
    snapshot::{Alternative, Matcher, RuleSet},
};
use proptest::prelude::*;

use super::*;
use crate::{
    Engine, Limits, Rules,
    record::{Verdict, What},
    tcp::tests::{ACK, FIN, Out, RST, SYN, Seg},
};

mod handover;

const RULESET: u32 = 4;
const OTHER: u32 = 5;

fn rule(method: &str, path: &str) -> Matcher {
    Matcher::Http(HttpRule {
        method: Some(method.into()),
        path: Some(path.into()),
        ..HttpRule::default()
    })
}

fn set(matchers: Vec<Matcher>) -> Arc<RuleSet> {
    Arc::new(RuleSet {
        reads: Inspector::Http as u8,
        alternatives: (11..)
            .zip(matchers)
            .map(|(rule, matcher)| Alternative { rule, matcher })
            .collect(),
        ..RuleSet::default()
    })
}

/// Returns an engine with the rule sets [`RULESET`] and [`OTHER`].
fn engine(limits: &Limits) -> Engine<Vec<u8>> {
    let allowed = set(vec![
        rule("GET|HEAD|POST|CONNECT", "/public/.*"),
        // The request has no path that a rule could match.
        Matcher::Http(HttpRule {
            method: Some("CONNECT".into()),
            ..HttpRule::default()
        }),
    ]);
    let sets = BTreeMap::from([(RULESET, allowed), (OTHER, set(vec![rule("GET", "/other")]))]);
    let mut engine = Engine::new(limits);
    engine.set_rules(Arc::new(Rules::prepare(&sets, None)));
    engine
}

/// A client, a server, and the engine between them. Each side acknowledges the bytes that reach it.
struct Talk {
    engine: Engine<Vec<u8>>,
    out: Out,
    now: Millis,
    ruleset: u32,
    flags: u8,
    /// Next sequence number of the client and of the server.
    sent: [u32; 2],
    /// Bytes that have reached the other side.
    got: [Vec<u8>; 2],
    /// Whether the FIN has reached the other side.
    closed: [bool; 2],
    reset: bool,
}

impl Talk {
    fn new() -> Self {
        Self::with(&Limits::default())
    }

    fn before_handshake(limits: &Limits) -> Self {
        Self {
            engine: engine(limits),
            out: Out::default(),
            now: 0,
            ruleset: RULESET,
            flags: 0,
            sent: [0, 0],
            got: [vec![], vec![]],
            closed: [false; 2],
            reset: false,
        }
    }

    fn with(limits: &Limits) -> Self {
        let mut talk = Self::before_handshake(limits);
        talk.put(Side::Client, SYN, b"");
        talk.put(Side::Server, SYN | ACK, b"");
        talk.put(Side::Client, ACK, b"");
        talk.take();
        talk
    }

    fn put(&mut self, side: Side, flags: u8, data: &[u8]) {
        let seq = self.sent[side as usize];
        let syn = u32::from(self.sent[side.other() as usize] != 0);
        let ack = syn + self.got[side.other() as usize].len() as u32 + u32::from(self.closed[side as usize]);
        let seg = Seg::new(side, flags, seq, if flags & ACK == 0 { 0 } else { ack }, data);
        self.sent[side as usize] += data.len() as u32 + u32::from(flags & (SYN | FIN) != 0);
        let slot = PuntRequest {
            inspector: Inspector::Http as u8,
            ruleset: self.ruleset,
            rule: 3,
            flags: self.flags,
            ..PuntRequest::default()
        };
        let (engine, out, now) = (&mut self.engine, &mut self.out, self.now);
        seg.view(slot, |view, frame| engine.packet(now, view, frame, out));
        self.deliver();
    }

    /// Delivers the forwarded and generated packets to their receivers.
    fn deliver(&mut self) {
        let made = std::mem::take(&mut self.out.emitted);
        let released = std::mem::take(&mut self.out.released);
        // Generated and forwarded packets are in separate lists: the receiver sorts them.
        let mut segs: Vec<Seg> = made.into_iter().map(|(seg, _)| seg).chain(released).collect();
        segs.sort_by_key(|seg| seg.seq.wrapping_sub(1));
        for seg in segs {
            self.reset |= seg.flags & RST != 0;
            let got = &mut self.got[seg.from as usize];
            let at = seg.seq.wrapping_sub(1) as usize;
            if seg.flags & (SYN | RST) != 0 || at > got.len() {
                continue;
            }
            let new = seg.data.get(got.len() - at..).unwrap_or_default();
            got.extend_from_slice(new);
            self.closed[seg.from.other() as usize] |= seg.flags & FIN != 0;
        }
    }

    fn tick(&mut self, to: Millis) {
        self.now = to;
        self.engine.tick(to, &mut self.out);
        self.deliver();
    }

    fn take(&mut self) -> Out {
        std::mem::take(&mut self.out)
    }

    fn client(&mut self, data: &[u8]) {
        self.put(Side::Client, ACK, data);
    }

    fn server(&mut self, data: &[u8]) {
        self.put(Side::Server, ACK, data);
        // The client acknowledges the response.
        self.put(Side::Client, ACK, b"");
    }

    /// Returns the bytes that have reached the server.
    fn at_server(&self) -> &str {
        std::str::from_utf8(&self.got[0]).unwrap()
    }

    /// Returns the bytes that have reached the client.
    fn at_client(&self) -> &str {
        std::str::from_utf8(&self.got[1]).unwrap()
    }
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: a.test\r\n\r\n")
}

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";

#[test]
fn an_allowed_request_and_its_response_are_forwarded() {
    let mut talk = Talk::new();
    talk.client(get("/public/a?token=1").as_bytes());
    assert_eq!(talk.at_server(), get("/public/a?token=1"));
    talk.now = 7;
    talk.server(OK.as_bytes());
    assert_eq!(talk.at_client(), OK);
    let records = talk.take().records;
    let What::HttpRequest { url, .. } = records[0].what else {
        panic!("{:?}", records[0])
    };
    assert_eq!(url.bytes(), b"http://a.test/public/a?token=[redacted]");
    assert_eq!((records[0].verdict, records[0].rule), (Verdict::Forwarded, 11));
    let What::HttpResponse { status, length, .. } = records[1].what else {
        panic!("{:?}", records[1])
    };
    assert_eq!((status, length, records[1].latency), (200, Some(2), Some(7)));
    assert!(records[1].reply && !records[0].reply);
}

#[test]
fn a_denied_request_gets_a_response_and_is_not_forwarded() {
    let mut talk = Talk::new();
    talk.client(get("/public/a").as_bytes());
    talk.server(OK.as_bytes());
    talk.client(b"GET /secret HTTP/1.1\r\n");
    talk.client(b"Host: a.test\r\n\r\n");
    assert_eq!(talk.at_server(), get("/public/a"));
    let answer = &talk.at_client()[OK.len()..];
    assert!(answer.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{answer}");
    assert!(answer.ends_with("\r\n\r\nAccess denied\r\n"), "{answer}");
    assert_eq!(talk.closed, [true, true], "both get the end");
    assert!(!talk.reset);
    let last = *talk.take().records.last().unwrap();
    assert_eq!(
        (last.verdict, last.reason, last.rule),
        (Verdict::Dropped, Reason::AppDenied, 3)
    );
    let stats = talk.engine.stats().http;
    assert_eq!((stats.requests, stats.denied, stats.responses), (2, 1, 1));
}

#[test]
fn pipelined_requests_get_responses_in_order() {
    let mut talk = Talk::new();
    let stream = [
        get("/public/1"),
        get("/public/2"),
        get("/secret"),
        get("/public/3"),
    ]
    .concat();
    talk.client(stream.as_bytes());
    let fine = [get("/public/1"), get("/public/2")].concat();
    // A denied request is not delivered together with an allowed one.
    assert_eq!(talk.at_server(), fine);
    talk.tick(10);
    talk.server(OK.as_bytes());
    assert!(
        !talk.at_client().contains("403"),
        "the second is not answered yet"
    );
    talk.server(OK.as_bytes());
    assert!(talk.at_client().contains("403"));
    assert!(!talk.at_server().contains("secret") && !talk.at_server().contains("/3"));
}

#[test]
fn paths_are_matched_as_sent_and_as_resolved() {
    for path in [
        "/public/../secret",
        "/public/%2e%2e/secret",
        "/public/..%2fsecret",
        "/public\\..\\secret",
        "//secret",
    ] {
        let mut talk = Talk::new();
        talk.client(get(path).as_bytes());
        assert_eq!(talk.at_server(), "", "{path}");
        assert!(talk.at_client().starts_with("HTTP/1.1 40"), "{path}");
    }
    let raw = Limits {
        http: HttpLimits {
            paths: Paths::Raw,
            ..HttpLimits::default()
        },
        ..Limits::default()
    };
    let mut talk = Talk::with(&raw);
    talk.client(get("/public/../secret").as_bytes());
    assert_ne!(talk.at_server(), "");
}

#[test]
fn an_ambiguous_request_gets_400() {
    for head in [
        "GET /public/a HTTP/1.1\nHost: a\n\n",
        "GET /public/a HTTP/1.1\r\nHost: a\r\n x: y\r\n\r\n",
        "GET /public/a HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        "GET /public/a HTTP/1.1\r\n\r\n",
        "GET /public/a HTTP/1.1\r\nHost : a\r\n\r\n",
        "GET http://b/public/a HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST /public/a HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST /public/a HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "POST /public/a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    ] {
        let mut talk = Talk::new();
        talk.client(head.as_bytes());
        assert_eq!(talk.at_server(), "", "{head:?}");
        assert!(
            talk.at_client().starts_with("HTTP/1.1 400 Bad Request\r\n"),
            "{head:?}"
        );
        assert_eq!(talk.closed, [true, true]);
        assert_eq!(talk.engine.stats().http.malformed.iter().sum::<u64>(), 1);
        assert_eq!(talk.take().records.last().unwrap().reason, Reason::AppMalformed);
    }
}

#[test]
fn other_protocols_are_reset() {
    for (bytes, reason) in [
        (&b"\x16\x03\x01\x02\x00\x01"[..], Reason::AppMalformed),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Reason::AppHttp2),
    ] {
        let mut talk = Talk::new();
        talk.client(bytes);
        assert!(talk.reset);
        assert_eq!(talk.at_server(), "");
        assert_eq!(talk.take().records[0].reason, reason);
    }
}

#[test]
fn bodies_are_followed_and_the_next_request_is_evaluated() {
    for (head, body) in [
        (
            "Content-Length: 30",
            "GET /secret HTTP/1.1\r\n\r\n123456".to_owned(),
        ),
        (
            "Transfer-Encoding: chunked",
            "18\r\nGET /secret HTTP/1.1\r\n\r\n\r\n0\r\nX-Sum: 1\r\n\r\n".to_owned(),
        ),
        ("Transfer-Encoding: chunked", "0\r\n\r\n".to_owned()),
    ] {
        let mut talk = Talk::new();
        let stream = format!("POST /public/a HTTP/1.1\r\nHost: a\r\n{head}\r\n\r\n{body}");
        for part in stream.as_bytes().chunks(7) {
            talk.client(part);
        }
        assert_eq!(talk.at_server(), stream);
        talk.client(get("/secret").as_bytes());
        talk.server(OK.as_bytes());
        assert_eq!(talk.at_server(), stream);
        assert!(talk.at_client().contains("403 Forbidden"));
    }
}

#[test]
fn a_bad_chunk_ends_the_request() {
    let mut talk = Talk::new();
    let head = "POST /public/a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    talk.client(head.as_bytes());
    talk.client(b"5;x =y\r\nhello\r\n0\r\n\r\n");
    assert!(
        !talk.at_client().contains("400"),
        "not before the head is delivered"
    );
    talk.put(Side::Server, ACK, b"");
    assert_eq!(talk.at_server(), head);
    assert!(talk.at_client().starts_with("HTTP/1.1 400"));
}

#[test]
fn long_bodies_are_offload_windows() {
    let mut talk = Talk::new();
    let head = b"POST /public/a HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n";
    talk.client(head);
    talk.client(&[b'x'; 1000]);
    let commands = talk.take().commands;
    let [command] = &commands[..] else {
        panic!("{commands:?}")
    };
    assert_eq!(command.op, 0);
    assert_eq!(command.windows[1].wrapping_sub(command.windows[0]), 1_000_000);
    assert_eq!(command.windows[2..], [0, 0]);
    // The bytes after the body are inspected again.
    talk.sent[0] += 999_000;
    talk.got[0].resize(head.len() + 1_000_000, b'x');
    talk.client(get("/secret").as_bytes());
    talk.server(OK.as_bytes());
    assert!(talk.at_client().contains("403"));
    assert_eq!(talk.got[0].len(), head.len() + 1_000_000);
}

#[test]
fn responses_end_where_their_heads_say() {
    let head = |method: &str| format!("{method} /public/a HTTP/1.1\r\nHost: a\r\n\r\n");
    for (method, answer) in [
        ("HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"),
        ("GET", "HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n"),
        (
            "GET",
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        ),
        (
            "GET",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        ),
        ("GET", OK),
    ] {
        let mut talk = Talk::new();
        for round in 1..3 {
            talk.client(head(method).as_bytes());
            talk.server(answer.as_bytes());
            assert_eq!(talk.at_client(), answer.repeat(round), "{answer}");
        }
        assert_eq!(talk.engine.stats().http.responses, 2);
    }
    let mut talk = Talk::new();
    talk.client(head("GET").as_bytes());
    let endless = "HTTP/1.0 200 OK\r\n\r\nuntil the end HTTP/1.1 101 x\r\n\r\n";
    talk.server(endless.as_bytes());
    talk.put(Side::Server, ACK | FIN, b"");
    assert_eq!((talk.at_client(), talk.closed[0]), (endless, true));
}

#[test]
fn an_unsolicited_response_resets_the_connection() {
    let mut talk = Talk::new();
    talk.server(OK.as_bytes());
    assert!(talk.reset);
    assert_eq!(talk.at_client(), "");
    let mut talk = Talk::new();
    let late = "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n\r\n";
    talk.server(late.as_bytes());
    assert_eq!(talk.at_client(), late);
    talk.client(get("/public/a").as_bytes());
    assert_eq!(talk.at_server(), "");
}

#[test]
fn a_requested_protocol_switch_becomes_a_tunnel() {
    let upgrade = |to: &str| {
        format!("GET /public/ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: {to}\r\n\r\n")
    };
    let switch = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n\r\n";
    let mut talk = Talk::new();
    talk.client(upgrade("websocket").as_bytes());
    // Nothing is forwarded before the server agrees.
    talk.client(b"\x81\x01x");
    assert_eq!(talk.at_server(), upgrade("websocket"));
    talk.server(switch.as_bytes());
    assert_eq!(
        talk.got[0],
        [upgrade("websocket").as_bytes(), b"\x81\x01x"].concat()
    );
    let out = talk.take();
    assert!(out.commands.iter().any(|command| command.op == 1));
    talk.client(b"anything");
    assert!(talk.got[0].ends_with(b"anything"));
    // The tunnel continues under the same rule set, and ends under another one.
    talk.tick(10);
    assert_eq!(talk.engine.stats().http.tcp.offloaded_flows, 1);
    talk.client(b"more");
    assert!(talk.got[0].ends_with(b"more") && !talk.reset);
    talk.ruleset = OTHER;
    talk.client(b"again");
    // The server answers the probe.
    talk.put(Side::Server, ACK, b"");
    assert!(talk.reset && !talk.got[0].ends_with(b"again"));

    for (request, answer) in [(upgrade("h2c"), switch), (get("/public/a"), switch)] {
        let mut talk = Talk::new();
        talk.client(request.as_bytes());
        talk.server(answer.as_bytes());
        assert!(talk.reset, "{request}");
        assert_eq!(talk.at_client(), "");
    }
    // A server that declines the upgrade continues with HTTP.
    let mut talk = Talk::new();
    talk.client([upgrade("h2c"), get("/secret")].concat().as_bytes());
    talk.server(OK.as_bytes());
    assert!(talk.at_client().contains("403"));
    // CONNECT
    let mut talk = Talk::new();
    talk.client(b"CONNECT b.test:443 HTTP/1.1\r\nHost: b.test:443\r\n\r\n");
    talk.server(b"HTTP/1.1 200 OK\r\n\r\n");
    talk.client(b"\x16\x03\x01");
    assert!(talk.got[0].ends_with(b"\x16\x03\x01"));
}

#[test]
fn a_101_may_only_switch_to_a_requested_and_permitted_protocol() {
    let request = |fields: &str| format!("GET /public/ws HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
    let switch = |fields: &str| format!("HTTP/1.1 101 Switching Protocols\r\n{fields}\r\n");
    let both = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: websocket\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n";
    for (asked, answered, passes) in [
        (both, "Connection: Upgrade\r\nUpgrade: websocket\r\n", true),
        (both, "Connection: Upgrade\r\nUpgrade: h2c\r\n", false),
        (both, "Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n", false),
        (
            both,
            "Connection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n",
            false,
        ),
        (both, "Connection: Upgrade\r\n", false),
        (both, "Connection: Upgrade\r\nUpgrade: ,\r\n", false),
        (both, "Connection: Upgrade\r\nUpgrade: spdy/3.1\r\n", false),
        (
            "Connection: Upgrade\r\nUpgrade: h2c,, WebSocket\r\n",
            "Upgrade: websocket\r\n",
            true,
        ),
        (
            "Connection: Upgrade\r\nUpgrade: HTTP/2.0\r\n",
            "Upgrade: HTTP/2.0\r\n",
            false,
        ),
        (
            "Connection: Upgrade\r\nUpgrade: TLS/1.2, HTTP/1.1\r\n",
            "Upgrade: TLS/1.2, HTTP/1.1\r\n",
            false,
        ),
        // Upgrade without the option in Connection requests nothing.
        ("Upgrade: websocket\r\n", "Upgrade: websocket\r\n", false),
        (
            "Connection: keep-alive\r\nUpgrade: websocket\r\n",
            "Upgrade: websocket\r\n",
            false,
        ),
        (
            "Connection: Upgraded\r\nUpgrade: websocket\r\n",
            "Upgrade: websocket\r\n",
            false,
        ),
    ] {
        let mut talk = Talk::new();
        talk.client(request(asked).as_bytes());
        assert_eq!(talk.at_server(), request(asked));
        // The bytes after the request wait for the response, whichever protocol was requested.
        talk.client(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        assert_eq!(talk.at_server(), request(asked), "{asked}");
        talk.server(switch(answered).as_bytes());
        assert_eq!(!talk.reset, passes, "{asked} {answered}");
        assert_eq!(talk.at_server().contains("PRI"), passes, "{asked} {answered}");
    }
    // HTTP/1.0 has no upgrade (RFC 9110, 7.8)
    let mut talk = Talk::new();
    talk.client(b"GET /public/ws HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
    talk.server(switch("Upgrade: websocket\r\n").as_bytes());
    assert!(talk.reset);
    // A server that lists protocols without 101 does not switch.
    for status in ["426 Upgrade Required", "200 OK"] {
        let answer =
            format!("HTTP/1.1 {status}\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n");
        let mut talk = Talk::new();
        talk.client([request(both), get("/secret")].concat().as_bytes());
        talk.server(answer.as_bytes());
        talk.tick(10);
        assert!(talk.at_client().starts_with(&answer) && talk.at_client().contains("403"));
        assert!(!talk.at_server().contains("secret"));
    }
}

#[test]
fn bytes_behind_a_response_do_not_answer_an_upgrade() {
    // The body with which a faulty server answers HEAD looks like a response, and the client has chosen its content.
    let upgrade = "GET /public/ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    for next in [upgrade, "CONNECT b:443 HTTP/1.1\r\nHost: b:443\r\n\r\n"] {
        let mut talk = Talk::new();
        let head = "HEAD /public/echo HTTP/1.1\r\nHost: a\r\n\r\n";
        talk.client(head.as_bytes());
        talk.client(next.as_bytes());
        assert_eq!(talk.at_server(), head);
        talk.server(
            b"HTTP/1.1 200 OK\r\nContent-Length: 56\r\n\r\nHTTP/1.1 101 x\r\nUpgrade: websocket\r\n\r\n",
        );
        talk.client(get("/secret").as_bytes());
        talk.tick(10);
        assert!(talk.reset && !talk.at_server().contains("secret"));
        // After a response with the announced length the connection continues.
        let mut talk = Talk::new();
        talk.client(head.as_bytes());
        talk.client(next.as_bytes());
        talk.server(b"HTTP/1.1 200 OK\r\nContent-Length: 56\r\n\r\n");
        assert_eq!(talk.at_server(), [head, next].concat());
    }
}

#[test]
fn an_unexpected_body_needs_a_rule_that_names_its_framing() {
    let smuggled = get("/secret");
    let request = |method: &str, path: &str| {
        let length = smuggled.len();
        format!("{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{smuggled}")
    };
    for method in ["GET", "HEAD"] {
        let mut talk = Talk::new();
        talk.client(request(method, "/public/a").as_bytes());
        assert_eq!(talk.at_server(), "", "{method}");
        assert!(talk.at_client().starts_with("HTTP/1.1 400"), "{method}");
        assert_eq!(talk.take().records.last().unwrap().reason, Reason::AppMalformed);
        // Audit mode records the body and follows it.
        let mut talk = Talk::new();
        talk.flags = palisade_abi::punt_flags::AUDIT;
        talk.client(request(method, "/public/a").as_bytes());
        assert_eq!(talk.at_server(), request(method, "/public/a"));
        let records = talk.take().records;
        assert!(
            records
                .iter()
                .any(|record| record.reason == Reason::AppMalformed && record.verdict == Verdict::Audit)
        );
        talk.server(OK.as_bytes());
        talk.client(get("/public/b").as_bytes());
        assert_eq!(talk.engine.stats().http.requests, 2);
    }
    let mut talk = Talk::new();
    let chunked = "GET /public/a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    talk.client(chunked.as_bytes());
    assert!(talk.at_client().starts_with("HTTP/1.1 400"));
    let mut talk = Talk::new();
    let empty = "GET /public/a HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n";
    talk.client(empty.as_bytes());
    assert_eq!(talk.at_server(), empty);
    // Allowed by the option.
    let allow = Limits {
        http: HttpLimits {
            get_bodies: GetBodies::Allow,
            ..HttpLimits::default()
        },
        ..Limits::default()
    };
    let mut talk = Talk::with(&allow);
    talk.client(request("GET", "/public/a").as_bytes());
    assert_eq!(talk.at_server(), request("GET", "/public/a"));
    // The body is allowed if any rule that allows the request names a framing header, not only if the first one does.
    let named = Matcher::Http(HttpRule {
        method: Some("GET".into()),
        path: Some("/public/_search".into()),
        headers: vec![("content-LENGTH".into(), None)],
        ..HttpRule::default()
    });
    let sets = [
        (vec![rule("GET", "/public/.*"), named], "/public/_search", true),
        (vec![rule("GET", "/.*")], "/public/_search", false),
        (vec![Matcher::Http(HttpRule::default())], "/any", true),
        (vec![rule("GET", "/.*"), Matcher::Everything], "/any", true),
    ];
    for (matchers, path, passes) in sets {
        let mut talk = Talk::new();
        let sets = BTreeMap::from([(RULESET, set(matchers.clone()))]);
        talk.engine.set_rules(Arc::new(Rules::prepare(&sets, None)));
        talk.client(request("GET", path).as_bytes());
        assert_eq!(talk.at_server() != "", passes, "{matchers:?}");
        let mut talk = Talk::new();
        talk.engine.set_rules(Arc::new(Rules::prepare(&sets, None)));
        talk.client(request("GET", "/public/a").as_bytes());
        assert_eq!(talk.at_server() != "", passes && path == "/any", "{matchers:?}");
    }
}

#[test]
fn a_body_behind_the_final_answer_to_expect_is_refused() {
    let head = "POST /public/a HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 200\r\n\r\n";
    let early = "HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n";
    let mut talk = Talk::new();
    talk.client(head.as_bytes());
    talk.server(early.as_bytes());
    talk.client(get("/secret").as_bytes());
    assert_eq!(talk.at_server(), head);
    assert!(talk.at_client().contains("HTTP/1.1 400"));
    // A body that the server has asked for, or that the client has begun, is forwarded.
    for interim in ["HTTP/1.1 100 Continue\r\n\r\n", ""] {
        let mut talk = Talk::new();
        talk.client(head.as_bytes());
        if !interim.is_empty() {
            talk.server(interim.as_bytes());
        }
        talk.client(&[b'x'; 100]);
        talk.server(OK.as_bytes());
        talk.client(&[b'x'; 100]);
        talk.client(get("/public/b").as_bytes());
        let body = "x".repeat(200);
        assert_eq!(talk.at_server(), [head, &body, &get("/public/b")].concat());
    }
}

#[test]
fn too_long_requests_get_414_and_431() {
    let long = "a".repeat(20_000);
    let many = "X: y\r\n".repeat(6_000);
    for (text, status) in [
        (format!("GET /public/{long} HTTP/1.1\r\n"), "414 "),
        (format!("GET /public/a HTTP/1.1\r\nX: {long}\r\n"), "431 "),
        (format!("GET /public/a HTTP/1.1\r\nHost: a\r\n{many}"), "431 "),
        (
            "GET /public/a HTTP/1.1\r\nHost: a\r\nExpect: x\r\n\r\n".to_owned(),
            "417 ",
        ),
    ] {
        let mut talk = Talk::new();
        for part in text.as_bytes().chunks(1_400) {
            talk.client(part);
        }
        assert!(
            talk.at_client().starts_with(&format!("HTTP/1.1 {status}")),
            "{}",
            talk.at_client()
        );
        assert_eq!(talk.at_server(), "");
    }
}

#[test]
fn a_disguised_copy_of_a_matched_header_denies_the_request() {
    let role = Matcher::Http(HttpRule {
        headers: vec![("X-Role".into(), Some("reader".into()))],
        ..HttpRule::default()
    });
    let sets = BTreeMap::from([(RULESET, set(vec![role]))]);
    for (fields, passes) in [
        ("X-Role: reader\r\n", true),
        ("x-role: reader\r\nX-Roles: admin\r\n", true),
        ("X-Role: reader\r\nX_Role: admin\r\n", false),
        ("X-Role: reader\r\nX.Role: reader\r\n", false),
        ("X-Role: reader\r\nConnection: x-role\r\n", false),
    ] {
        let mut talk = Talk::new();
        talk.engine.set_rules(Arc::new(Rules::prepare(&sets, None)));
        talk.client(format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n").as_bytes());
        assert_eq!(talk.at_server() != "", passes, "{fields}");
    }
}

#[test]
fn a_trailer_does_not_repeat_a_matched_header() {
    let role = Matcher::Http(HttpRule {
        headers: vec![("X-Role".into(), Some("reader".into()))],
        ..HttpRule::default()
    });
    let sets = BTreeMap::from([(RULESET, set(vec![role]))]);
    for (trailer, passes) in [
        ("X-Sum: 1", true),
        ("X-Role: admin", false),
        ("x_role: admin", false),
    ] {
        let mut talk = Talk::new();
        talk.engine.set_rules(Arc::new(Rules::prepare(&sets, None)));
        let head = "POST / HTTP/1.1\r\nHost: a\r\nX-Role: reader\r\nTransfer-Encoding: chunked\r\n\r\n";
        talk.client(format!("{head}1\r\na\r\n0\r\n{trailer}\r\n\r\n").as_bytes());
        assert_eq!(talk.at_server().contains(trailer), passes, "{trailer}");
    }
}

/// Returns a head, the body of an upload with this length, and then a request that no rule allows.
fn upload(length: usize) -> (String, Vec<u8>, String) {
    let head = format!("POST /public/up HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n");
    (
        head,
        (0..length).map(|n| b'a' + (n % 23) as u8).collect(),
        get("/secret"),
    )
}

#[test]
fn allowed_bytes_are_delivered_before_a_refusal_in_the_same_packet() {
    for answers_early in [false, true] {
        for behind in [
            get("/secret"),
            "GET /public/a HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n".to_owned(),
        ] {
            let (head, body, _) = upload(30);
            let whole = [head.as_bytes(), &body].concat();
            let mut talk = Talk::new();
            talk.client(&[head.as_bytes(), &body[..20]].concat());
            if answers_early {
                talk.server(OK.as_bytes());
            }
            let last = [&body[20..], behind.as_bytes()].concat();
            talk.client(&last);
            assert_eq!(
                talk.got[0], whole,
                "at once: the server may wait for it before it answers"
            );
            assert!(
                !talk.at_client().contains("HTTP/1.1 40"),
                "not before it is delivered"
            );
            // The generated packet is lost: the sender retransmits its own.
            talk.got[0].truncate(whole.len() - 10);
            talk.sent[0] -= last.len() as u32;
            talk.client(&last);
            assert_eq!(talk.got[0], whole);
            if answers_early {
                talk.put(Side::Server, ACK, b"");
            } else {
                talk.server(OK.as_bytes());
            }
            assert!(talk.at_client().starts_with(OK) && talk.at_client().contains("HTTP/1.1 40"));
            assert_eq!(
                (talk.got[0].clone(), talk.closed, talk.reset),
                (whole, [true; 2], false)
            );
        }
    }
}

#[test]
fn the_end_of_a_window_is_delivered_when_a_refused_request_shares_its_packet() {
    for answers_early in [false, true] {
        let (head, body, behind) = upload(1_000_000);
        let mut talk = Talk::new();
        talk.client(head.as_bytes());
        talk.client(&body[..1000]);
        assert_eq!(talk.take().commands.len(), 1);
        if answers_early {
            talk.server(OK.as_bytes());
        }
        // All but the last bytes are in an offload window.
        talk.got[0].extend_from_slice(&body[1000..999_000]);
        talk.sent[0] += 998_000;
        talk.client(&[&body[999_000..], behind.as_bytes()].concat());
        assert_eq!(talk.got[0].len(), head.len() + body.len());
        assert!(talk.got[0].ends_with(&body), "in its order");
        assert!(!talk.at_client().contains("403"));
        if answers_early {
            talk.put(Side::Server, ACK, b"");
        } else {
            talk.server(OK.as_bytes());
        }
        assert!(talk.at_client().contains("403") && !talk.reset);
        assert_eq!(talk.got[0].len(), head.len() + body.len());
    }
}

#[test]
fn allowed_bytes_are_sent_before_a_reset_in_the_same_packet() {
    let (head, body, _) = upload(30);
    let mut talk = Talk::new();
    talk.client(&[head.as_bytes(), &body[..20]].concat());
    talk.client(&[&body[20..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"].concat());
    assert!(talk.reset && talk.got[0] == [head.as_bytes(), &body].concat());
}

#[test]
fn with_two_inspectors_no_packet_is_built_and_the_deadline_holds() {
    let (head, body, behind) = upload(30);
    let mut talk = Talk::new();
    talk.flags = palisade_abi::punt_flags::SHARED;
    talk.client(&[head.as_bytes(), &body[..20]].concat());
    talk.client(&[&body[20..], behind.as_bytes()].concat());
    assert_eq!(talk.got[0], [head.as_bytes(), &body[..20]].concat());
    talk.tick(31_000);
    assert!(talk.reset);
}

#[test]
fn audit_mode_forwards_and_records() {
    let mut talk = Talk::new();
    talk.flags = palisade_abi::punt_flags::AUDIT;
    talk.client(get("/secret").as_bytes());
    assert_eq!(talk.at_server(), get("/secret"));
    let record = talk.take().records[0];
    assert_eq!(
        (record.verdict, record.reason),
        (Verdict::Audit, Reason::AppDenied)
    );
    talk.server(OK.as_bytes());
    // A malformed stream is offloaded until audit mode ends.
    talk.client(b"GET /x HTTP/1.1\n\n");
    assert!(talk.at_server().ends_with("\n\n"));
    talk.tick(10);
    talk.client(b"x");
    assert!(talk.at_server().ends_with('x'));
    talk.flags = 0;
    talk.client(b"y");
    // The server answers the probe with the sequence number that it expects.
    talk.put(Side::Server, ACK, b"");
    assert!(talk.reset && !talk.at_server().ends_with('y'));
}

#[test]
fn the_next_request_is_evaluated_by_the_new_rules() {
    let mut talk = Talk::new();
    talk.client(get("/public/a").as_bytes());
    talk.server(OK.as_bytes());
    talk.ruleset = OTHER;
    talk.client(get("/other").as_bytes());
    talk.server(OK.as_bytes());
    talk.client(get("/public/a").as_bytes());
    assert_eq!(talk.at_server(), [get("/public/a"), get("/other")].concat());
    assert!(talk.at_client().contains("403"));
}

#[test]
fn an_incomplete_head_ends_at_the_deadline() {
    let mut talk = Talk::new();
    for at in 0..31 {
        talk.tick(at * 1000);
        if !talk.reset {
            talk.client(b"a");
        }
    }
    assert!(talk.reset);
    assert_eq!(talk.at_server(), "");
    let records = talk.take().records;
    assert!(
        records
            .iter()
            .any(|record| record.reason == Reason::InspectDeadline)
    );
}

#[test]
fn a_refused_request_waits_for_a_long_poll_without_a_deadline() {
    let mut talk = Talk::new();
    talk.client(get("/public/poll").as_bytes());
    talk.client(get("/secret").as_bytes());
    talk.tick(120_000);
    assert!(!talk.reset);
    talk.server(OK.as_bytes());
    assert!(talk.at_client().starts_with(OK) && talk.at_client().contains("403"));
}

#[test]
fn a_client_that_sends_on_after_a_refusal_is_reset_after_a_limit() {
    let mut talk = Talk::new();
    talk.client(b"POST /secret HTTP/1.1\r\nHost: a\r\nContent-Length: 5000000\r\n\r\n");
    assert!(talk.at_client().contains("403"));
    for _ in 0..1500 {
        if !talk.reset {
            talk.client(&[b'x'; 1000]);
        }
    }
    assert!(talk.reset, "but not for ever");
    assert_eq!(talk.at_server(), "");
}

/// Returns a message, and whether it is allowed.
fn message() -> impl Strategy<Value = (Vec<u8>, bool)> {
    prop_oneof![
        4 => "[a-z]{0,9}".prop_map(|name| (get(&format!("/public/{name}")).into_bytes(), true)),
        1 => "[a-z]{0,9}".prop_map(|name| (get(&format!("/private/{name}")).into_bytes(), false)),
        2 => prop::collection::vec(any::<u8>(), 0..200).prop_map(|body| {
            let head = format!("POST /public/b HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len());
            ([head.into_bytes(), body].concat(), true)
        }),
        2 => prop::collection::vec(prop::collection::vec(any::<u8>(), 1..80), 0..4).prop_map(|chunks| {
            let mut all = b"POST /public/c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
            for chunk in chunks {
                all.extend(format!("{:x}\r\n", chunk.len()).bytes());
                all.extend(chunk);
                all.extend(b"\r\n");
            }
            all.extend(b"0\r\n\r\n");
            (all, true)
        }),
        1 => Just((b"GET /public/a HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n".to_vec(), false)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// However a stream of requests is segmented, the server gets exactly the allowed requests.
    #[test]
    fn the_server_gets_what_is_allowed_however_it_is_cut(
        messages in prop::collection::vec(message(), 1..6),
        cuts in prop::collection::vec((1_usize..120, 0_u64..15), 1..40),
    ) {
        let stream: Vec<u8> = messages.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
        let fine: Vec<u8> =
            messages.iter().take_while(|(_, fine)| *fine).flat_map(|(bytes, _)| bytes.clone()).collect();
        let refused = messages.iter().any(|(_, fine)| !fine);
        let answers = messages.iter().take_while(|(_, fine)| *fine).count();
        let mut talk = Talk::new();
        let mut rest = &stream[..];
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let (size, pause) = cuts.next().unwrap();
            let (part, tail) = rest.split_at(rest.len().min(*size));
            talk.client(part);
            talk.tick(talk.now + pause);
            rest = tail;
        }
        talk.tick(talk.now + 10);
        for _ in 0..answers {
            talk.server(OK.as_bytes());
        }
        let got = talk.got[0].clone();
        prop_assert_eq!(String::from_utf8_lossy(&got), String::from_utf8_lossy(&fine));
        prop_assert_eq!(talk.closed[0], refused, "an answer, and the end");
        prop_assert!(!talk.reset);
    }

    /// For random streams of both sides nothing panics, and the sink gets every frame back.
    #[test]
    fn nothing_panics(
        moves in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..60), 0_u8..8, 0_u64..200), 0..30),
        begin in message(),
    ) {
        let mut talk = Talk::new();
        talk.client(&begin.0);
        for (client, data, kind, pause) in moves {
            talk.tick(talk.now + pause);
            let data = match kind {
                0 => OK.as_bytes(),
                1 => b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
                2 => b"GET /public/a HTTP/1.1\r\nHost: a\r\n\r\n",
                3 => b"\r\n",
                _ => &data,
            };
            if client { talk.client(data) } else { talk.server(data) }
        }
        talk.engine.drain(&mut talk.out);
        prop_assert_eq!(talk.engine.stats().http.tcp.frames, 0);
    }
}
