//! The HTTP/2 filter between two hostile peers: the server gets nothing but allowed requests in a form that every decoder
//! reads, wherever the streams are cut, and memory and output are bounded.
//!
//! The first byte of the input selects the cuts. Records follow: side (even: client), length (2 bytes), bytes.

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
};

use palisade_abi::{Direction, Inspector, PuntRequest};
use palisade_inspect::{
    HttpScratch, Rules,
    http2::{Buffers, Context, Filter, Http2Limits, Http2Stats, Output},
    stream::StreamContext,
};
use palisade_model::{
    rule::HttpRule,
    snapshot::{Alternative, Matcher, RuleSet},
};
use palisade_protocols::http2::{Decoder, Fields, FrameHeader, PREFACE, fragment_of};

#[path = "../../../crates/inspect/tests/http2/join.rs"]
mod join;

/// A connection has few bytes of its own, besides those of incomplete frames.
const HELD: usize = 300_000;

/// Runs one history.
pub fn run(input: &[u8]) {
    let Some((&cut, mut rest)) = input.split_first() else {
        return;
    };
    let mut calls: Vec<(bool, Vec<u8>)> = Vec::new();
    while let Some((&[side, high, low], after)) = rest.split_first_chunk::<3>() {
        let length = usize::from(u16::from_be_bytes([high, low])).min(after.len());
        let (bytes, after) = after.split_at(length);
        calls.push((side % 2 == 0, bytes.to_vec()));
        rest = after;
    }
    static RULES: LazyLock<Rules> = LazyLock::new(rules);
    let whole = play(&RULES, &calls, usize::MAX);
    let parts = play(&RULES, &calls, usize::from(cut % 32) + 1);
    for (parts, whole) in [
        (&parts.to_server, &whole.to_server),
        (&parts.to_client, &whole.to_client),
    ] {
        assert_eq!(joined(parts), joined(whole));
    }
    check_server_gets(whole.to_server.strip_prefix(PREFACE).unwrap_or(&whole.to_server));
    check_client_gets(&whole.to_client);
}

/// Returns the frames in a form that does not depend on the cuts.
fn joined(stream: &[u8]) -> Vec<u8> {
    join::join(stream.strip_prefix(PREFACE).unwrap_or(stream))
}

fn rules() -> Rules {
    let rule = HttpRule {
        method: Some("GET|POST".into()),
        path: Some("/public/[a-z]*".into()),
        host: Some("a\\.test".into()),
        ..HttpRule::default()
    };
    let set = RuleSet {
        reads: Inspector::Http as u8,
        alternatives: vec![Alternative {
            rule: 1,
            matcher: Matcher::Http(rule),
        }],
        ..RuleSet::default()
    };
    Rules::prepare(&BTreeMap::from([(1, Arc::new(set))]), None)
}

fn play(rules: &Rules, calls: &[(bool, Vec<u8>)], step: usize) -> Output {
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
    let mut sent = 0;
    for (of_client, bytes) in calls {
        for part in bytes.chunks(step) {
            let mut cx = Context {
                now: 1,
                rules,
                stream: &stream,
                scratch: &mut scratch,
                buffers: &mut buffers,
                stats: &mut stats,
                record: &mut |_| {},
            };
            let result = if *of_client {
                filter.client(part, &mut cx, &mut out)
            } else {
                filter.server(part, &mut cx, &mut out)
            };
            sent += part.len();
            assert!(filter.held() <= HELD && filter.streams() <= 256);
            assert!(out.to_client.len() + out.to_server.len() <= 40 * sent + 1_000);
            if result.is_err() {
                return out;
            }
        }
    }
    out
}

/// Returns the complete frames.
fn frames(mut stream: &[u8]) -> Vec<(FrameHeader, &[u8])> {
    let mut frames = Vec::new();
    while let Some((head, rest)) = stream.split_first_chunk::<9>() {
        let header = FrameHeader::parse(*head);
        let Some((payload, rest)) = rest.split_at_checked(header.length as usize) else {
            break;
        };
        frames.push((header, payload));
        stream = rest;
    }
    frames
}

fn check_server_gets(stream: &[u8]) {
    let mut last = 0;
    let mut block: Option<(u32, Vec<u8>)> = None;
    for (header, payload) in frames(stream) {
        let id = header.stream;
        match (header.kind, &mut block) {
            (1, None) => {
                let (_, fragment) = fragment_of(header, payload).unwrap();
                block = Some((id, fragment.to_vec()));
            }
            (9, Some((of, bytes))) if *of == id => bytes.extend_from_slice(payload),
            (1 | 9, _) => panic!("header blocks overlap"),
            (_, Some(_)) => panic!("a frame within a header block"),
            // Frames on streams that the server does not know, pushes, and unknown frames.
            (0 | 2 | 3, None) => assert!(id % 2 == 1 && id <= last),
            (4, None) => assert!(id == 0 && !payload.chunks(6).any(|s| s[..2] == [0, 2] && s[5] != 0)),
            (6 | 7, None) => assert_eq!(id, 0),
            (8, None) => assert!(id <= last),
            (kind, None) => panic!("frame of type {kind}"),
        }
        if !matches!(header.kind, 1 | 9) || header.flags & 4 == 0 {
            continue;
        }
        let (_, bytes) = block.take().unwrap();
        let mut fields = Fields::default();
        // Each block is complete in itself: a decoder without entries in its dynamic table reads it.
        Decoder::lenient().decode(&bytes, 1 << 20, &mut fields).unwrap();
        let names: Vec<&[u8]> = fields.iter().map(|(name, ..)| name).collect();
        for (name, value, _) in fields.iter() {
            assert!(!name.iter().any(u8::is_ascii_uppercase));
            assert!(
                !value
                    .iter()
                    .chain(name)
                    .any(|byte| matches!(byte, b'\r' | b'\n' | 0))
            );
        }
        for never in [
            &b"connection"[..],
            b"transfer-encoding",
            b"upgrade",
            b"keep-alive",
        ] {
            assert!(!names.contains(&never));
        }
        if id > last {
            last = id;
            assert_eq!(id % 2, 1);
            let path = fields.value(b":path").unwrap();
            assert!(path.starts_with(b"/public/") && path[8..].iter().all(u8::is_ascii_lowercase));
            let method = fields.value(b":method").unwrap();
            assert!(method == b"GET" || method == b"POST");
            let host = fields.value(b":authority").or(fields.value(b"host")).unwrap();
            assert!(host.eq_ignore_ascii_case(b"a.test"));
        } else {
            // Trailers.
            assert!(header.kind == 9 || header.flags & 1 != 0);
            assert!(!names.iter().any(|name| name.starts_with(b":")));
        }
    }
}

fn check_client_gets(stream: &[u8]) {
    let mut block = None;
    let frames = frames(stream);
    // The first frame of a server is SETTINGS, even if the filter has an answer before.
    assert!(
        frames
            .first()
            .is_none_or(|(header, _)| header.kind == 4 && header.flags & 1 == 0)
    );
    for (header, _) in frames {
        match (header.kind, block) {
            (9, Some(id)) => assert_eq!(header.stream, id),
            (9, None) => panic!("CONTINUATION without HEADERS"),
            (_, Some(_)) => panic!("a frame within a header block"),
            (5 | 10.., None) => panic!("frame of type {}", header.kind),
            _ => {}
        }
        if matches!(header.kind, 1 | 9) {
            block = (header.flags & 4 == 0).then_some(header.stream);
        }
    }
}
