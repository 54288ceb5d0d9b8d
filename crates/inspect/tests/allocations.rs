//! Inspection allocates nothing once the tables have grown: for DNS queries, answers, responses, fragments and
//! segments, for HTTP requests and responses, also of HTTP/2, and for evaluating them.
#![allow(unsafe_code, reason = "a counting allocator")]

mod common;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    collections::BTreeMap,
    sync::Arc,
};

use common::{
    A, ACK, SYN, Udp, address, answer, asks, framed, is_told, query, rules, segment, to_client, to_server,
};
use palisade_abi::{Direction, FlowCommand, Inspector, PuntRequest, Reason, punt_hook};
use palisade_inspect::{
    CommitRequest, Engine, HttpScratch, Limits, PacketView, Paths, Route, Rules, Sink,
    http2::{Buffers, Context, Filter, Http2Limits, Http2Stats, Output},
    record::Record,
    stream::StreamContext,
};
use palisade_model::{
    rule::HttpRule,
    snapshot::{Alternative, Matcher, RuleSet},
};
use palisade_packet::{Packet, Start, decode};
use palisade_protocols::{
    http1::{HeaderBuffer, Request},
    http2::{PREFACE, encode, headers_of},
};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: each call is passed to the system's allocator unchanged. The counter is a thread-local without a
// destructor, which allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller upholds the contract of `GlobalAlloc`, which is passed to the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the block is from `alloc` above, which is the system's.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[derive(Default)]
struct Counts {
    learn: Option<CommitRequest>,
    released: usize,
    discarded: usize,
    emitted: usize,
    records: usize,
}

impl Sink<u32> for Counts {
    fn release(&mut self, _frame: u32) {
        self.released += 1;
    }

    fn release_with(&mut self, _frame: u32, _command: &FlowCommand) {
        self.released += 1;
    }

    fn discard(&mut self, _frame: u32, _reason: Reason) {
        self.discarded += 1;
    }

    fn emit(&mut self, _frame: &[u8], _route: Route) {
        self.emitted += 1;
    }

    fn commit(&mut self, learn: CommitRequest) -> Result<(), CommitRequest> {
        self.learn = Some(learn);
        Ok(())
    }

    fn record(&mut self, _record: &Record) {
        self.records += 1;
    }
}

/// Handles frames with their slots. After each, all commit requests succeed.
fn run(engine: &mut Engine<u32>, sink: &mut Counts, now: u64, frames: &[(PuntRequest, Vec<u8>)]) {
    for (slot, frame) in frames {
        let mut packet = Packet::default();
        decode(&frame[..], Start::Ethernet { tags_removed: 0 }, &mut packet).unwrap();
        let transport = usize::from(packet.transport_offset);
        let header = match packet.protocol {
            6 => usize::from(frame[transport + 12] >> 4) * 4,
            _ => 8,
        };
        let view = PacketView {
            slot,
            ifindex: 7,
            hook: punt_hook::TC_EGRESS,
            packet: &packet,
            frame,
            network: usize::from(packet.network_offset),
            transport,
            payload: (transport + header, frame.len()),
        };
        engine.packet(now, &view, 1, sink);
        if let Some(learn) = sink.learn.take() {
            let learned = learn.done(true, None);
            engine.committed(now, learned, sink);
        }
    }
    engine.tick(now, sink);
}

#[test]
fn dns_allocates_nothing_in_the_steady_state() {
    let mut engine = Engine::new(&Limits::default());
    engine.set_rules(Arc::new(rules()));
    let mut sink = Counts::default();
    let records: Vec<_> = (0..40_u8).map(|n| [192, 0, 2, n]).collect();
    let records: Vec<_> = records.iter().map(|ip| ("x.wild.test", A, 60, &ip[..])).collect();
    let long = to_client(4001, &answer(8, "x.wild.test", A, 0, &records));
    let cut = |udp: &Udp, id| {
        let bytes = udp.datagram();
        [
            udp.around(&bytes[..400], Some((0, true, id))),
            udp.around(&bytes[400..], Some((400, false, id))),
        ]
    };
    let round = |round: u32| {
        let id = round as u16;
        let mut frames = vec![
            (asks(1), to_server(4000, &query(id, "allowed.test", A)).frame()),
            (is_told(1), to_client(4000, &address(id, "allowed.test")).frame()),
            (asks(1), to_server(4000, &query(id, "denied.test", A)).frame()),
            (is_told(1), to_client(4000, &address(id, "denied.test")).frame()),
            (asks(1), to_server(4001, &query(8, "x.wild.test", A)).frame()),
        ];
        frames.extend(cut(&long, id).map(|frame| (is_told(1), frame)));
        // A query and its answer on a connection, each acknowledging the other side's bytes.
        let asked = framed(&[query(id, "allowed.test", A)]);
        let told = framed(&[address(id, "allowed.test")]);
        let (at, back) = (1 + round * asked.len() as u32, 1 + round * told.len() as u32);
        let there = to_server(4002, &[]);
        frames.push((asks(1), segment(&there, at, back, ACK, &asked)));
        let next = at + asked.len() as u32;
        frames.push((is_told(1), segment(&there.turned(&[]), back, next, ACK, &told)));
        frames
    };
    let there = to_server(4002, &[]);
    let syn = vec![
        (asks(1), segment(&there, 0, 0, SYN, &[])),
        (is_told(1), segment(&there.turned(&[]), 0, 1, SYN | ACK, &[])),
    ];
    run(&mut engine, &mut sink, 0, &syn);
    let mut now = 0;
    let mut allocated = 0;
    for number in 0..3000 {
        let frames = round(number);
        now += 3;
        let before = ALLOCATIONS.get();
        run(&mut engine, &mut sink, now, &frames);
        if number >= 1500 {
            allocated += ALLOCATIONS.get() - before;
        }
    }
    assert_eq!(
        (sink.released, sink.discarded, sink.emitted),
        (3000 * 7 + 2, 3000 * 2, 3000)
    );
    assert_eq!(engine.stats().dns.committed, 3000 * 3);
    assert_eq!(allocated, 0);
}

/// A connection that stays open: a request in one packet, one in two, a response with a body, one in chunks.
#[test]
fn http_requests_on_an_open_connection_allocate_nothing() {
    const SET: u32 = 3;
    let rule = |path: &str| Alternative {
        rule: 21,
        matcher: Matcher::Http(HttpRule {
            method: Some("GET".into()),
            path: Some(path.into()),
            headers: vec![("x-team".into(), Some("a".into()))],
            ..HttpRule::default()
        }),
    };
    let set = RuleSet {
        reads: Inspector::Http as u8,
        alternatives: vec![rule("/other/[0-9]+"), rule("/public/.*")],
        ..RuleSet::default()
    };
    let mut engine = Engine::new(&Limits::default());
    let sets = BTreeMap::from([(SET, Arc::new(set))]);
    engine.set_rules(Arc::new(Rules::prepare(&sets, None)));
    let slot = |slot: PuntRequest| PuntRequest {
        inspector: Inspector::Http as u8,
        ruleset: SET,
        ..slot
    };
    let (client, server) = (slot(asks(1)), slot(is_told(1)));
    let there = to_server(4002, &[]);
    let mut sink = Counts::default();
    let syn = vec![
        (client, segment(&there, 0, 0, SYN, &[])),
        (server, segment(&there.turned(&[]), 0, 1, SYN | ACK, &[])),
    ];
    run(&mut engine, &mut sink, 0, &syn);
    let request = b"GET /public/a%20b?q=1 HTTP/1.1\r\nHost: a.test\r\nX-Team: a\r\nUser-Agent: x\r\n\r\n";
    let plain = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
    let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    let (mut at, mut back, mut allocated) = (1, 1, 0);
    for number in 0..2000_u64 {
        let mut frames = Vec::new();
        for (cut, answer) in [(request.len(), &plain[..]), (20, &chunked[..])] {
            for part in [&request[..cut], &request[cut..]] {
                if !part.is_empty() {
                    frames.push((client, segment(&there, at, back, ACK, part)));
                    at += part.len() as u32;
                }
            }
            frames.push((server, segment(&there.turned(&[]), back, at, ACK, answer)));
            back += answer.len() as u32;
        }
        let before = ALLOCATIONS.get();
        run(&mut engine, &mut sink, number * 4, &frames);
        if number >= 1000 {
            allocated += ALLOCATIONS.get() - before;
        }
    }
    let stats = engine.stats().http;
    assert_eq!((stats.requests, stats.responses, stats.denied), (4000, 4000, 0));
    assert_eq!((sink.discarded, sink.emitted), (0, 0));
    assert_eq!(allocated, 0);
}

#[test]
fn http2_requests_allowed_and_denied_allocate_nothing() {
    let matcher = Matcher::Http(HttpRule {
        path: Some("/public/.*".into()),
        ..HttpRule::default()
    });
    let set = RuleSet {
        alternatives: vec![Alternative { rule: 1, matcher }],
        ..RuleSet::default()
    };
    let rules = Rules::prepare(&BTreeMap::from([(1, Arc::new(set))]), None);
    let stream = StreamContext {
        request: PuntRequest {
            ruleset: 1,
            ..PuntRequest::default()
        },
        direction: Direction::Egress,
        client: ([10, 0, 0, 1], 4_000).into(),
        server: ([10, 0, 0, 2], 443).into(),
        ifindex: 1,
    };
    let mut filter = Filter::new(&Http2Limits::default(), true);
    let (mut scratch, mut buffers) = (HttpScratch::default(), Buffers::default());
    let (mut stats, mut out) = (Http2Stats::default(), Output::default());
    let mut records = 0;
    let mut call = |of_client: bool, bytes: &[u8]| {
        let before = ALLOCATIONS.get();
        let mut cx = Context {
            now: 1,
            rules: &rules,
            stream: &stream,
            scratch: &mut scratch,
            buffers: &mut buffers,
            stats: &mut stats,
            record: &mut |_| records += 1,
        };
        if of_client {
            filter.client(bytes, &mut cx, &mut out).unwrap();
        } else {
            filter.server(bytes, &mut cx, &mut out).unwrap();
        }
        let allocated = ALLOCATIONS.get() - before;
        out.to_client.clear();
        out.to_server.clear();
        allocated
    };
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    call(true, &[PREFACE, &settings].concat());
    call(false, &settings);
    let headers = |stream: u32, fields: &[(&str, &str)]| {
        let (mut block, mut frame) = (Vec::new(), Vec::new());
        for (name, value) in fields {
            encode::field(name.as_bytes(), value.as_bytes(), false, &mut block);
        }
        headers_of(stream, true, None, &block, 16_384, &mut frame);
        frame
    };
    let mut allocated = 0;
    for number in 0..4_000 {
        let id = 4 * number + 1;
        let request = |stream, path| {
            let fields = [
                (":method", "GET"),
                (":scheme", "https"),
                (":path", path),
                (":authority", "a.test"),
                ("user-agent", "curl/8.14.1"),
            ];
            headers(stream, &fields)
        };
        // The server's header block arrives in two parts.
        let response = headers(id, &[(":status", "200"), ("server", "nginx")]);
        let (begin, rest) = response.split_at(12);
        let parts = [
            (true, request(id, "/public/a")),
            (true, request(id + 2, "/secret")),
            (false, begin.to_vec()),
            (false, rest.to_vec()),
        ];
        for (of_client, bytes) in parts {
            let count = call(of_client, &bytes);
            if number >= 1_000 {
                allocated += count;
            }
        }
    }
    assert_eq!(
        (stats.requests, stats.denied, stats.responses),
        (8_000, 4_000, 4_000)
    );
    assert_eq!(records, 12_000);
    assert_eq!(allocated, 0);
}

#[test]
fn evaluating_requests_allocates_nothing() {
    let alternatives = (0..300_u32)
        .map(|rule| Alternative {
            rule,
            matcher: Matcher::Http(HttpRule {
                method: Some("GET|P.*".into()),
                path: Some(format!("/(a|b)+//?{rule}(/[^/]+)*")),
                host: Some(r"[^x]+\.test".into()),
                headers: vec![("X-A".into(), None)],
                ..HttpRule::default()
            }),
        })
        .collect();
    let set = RuleSet {
        alternatives,
        ..RuleSet::default()
    };
    let rules = Rules::prepare(&BTreeMap::from([(1, Arc::new(set))]), None);
    let rules = rules.http(1).unwrap();
    let heads: Vec<String> = (0..600)
        .map(|n| format!("PUT /ab//{n}/%61 HTTP/1.1\r\nHost: A.test\r\nX-A: 1\r\n\r\n"))
        .chain(["GET /%zz HTTP/1.1\r\nHost: x.test\r\n\r\n".to_owned()])
        .collect();
    let mut scratch = HttpScratch::default();
    let mut round = || {
        let before = ALLOCATIONS.get();
        let allowed = heads
            .iter()
            .filter(|head| {
                let mut room = HeaderBuffer::new();
                let request = Request::parse(head.as_bytes(), &mut room).unwrap();
                rules.evaluate(&request, Paths::Both, &mut scratch).is_ok()
            })
            .count();
        assert_eq!(allowed, 300);
        ALLOCATIONS.get() - before
    };
    assert!(round() > 0);
    assert_eq!(round(), 0);
}
