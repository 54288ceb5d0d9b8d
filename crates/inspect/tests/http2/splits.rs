//! The output does not depend on how the streams of the peers are cut, and the server gets what the client has sent.

use palisade_inspect::Side;
use palisade_protocols::http2::{ErrorCode, PREFACE, flags, kind};
use proptest::{collection::vec, prelude::*, sample::select};

use crate::{join::join, link::*};

/// Frames that a peer sends at once.
type Call = (Side, Vec<u8>);

/// Stream identifier that stands for the next stream of the client.
const NEXT: u32 = 0x7fff_fff1;

/// Returns the calls with stream identifiers: [`NEXT`] becomes the next stream, and others become one that is open or
/// was open, with few exceptions. Otherwise most connections would end at once.
fn number(script: Vec<(Side, Vec<Vec<u8>>)>) -> Vec<Call> {
    let mut opened = 0;
    let mut calls = Vec::new();
    for (side, frames) in script {
        let mut bytes = Vec::new();
        for mut frame in frames {
            let mut at = 0;
            let mut is_valid = true;
            while let Some(header) = frame.get_mut(at..at + 9) {
                at += 9 + u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
                let id = match u32::from_be_bytes(header[5..].try_into().unwrap()) {
                    NEXT => {
                        opened += u32::from(header[3] == kind::HEADERS);
                        2 * opened - 1
                    }
                    id if id % 2 == 1 && opened == 0 => {
                        is_valid = false;
                        id
                    }
                    id if id % 2 == 1 && id < 9 => 2 * (id / 2 % opened) + 1,
                    id => id,
                };
                header[5..].copy_from_slice(&id.to_be_bytes());
            }
            if is_valid {
                bytes.extend(frame);
            }
        }
        calls.push((side, bytes));
    }
    calls
}

fn of_client() -> impl Strategy<Value = Vec<u8>> {
    let id = || prop_oneof![60 => select(vec![1_u32, 3, 5, 7]), 1 => select(vec![0, 2, 11])];
    prop_oneof![
        8 => (any::<bool>(), select(vec!["/public/a", "/public/a", "/secret", "", "/public/../x"])).prop_map(
            |(end, path)| request(NEXT, end, "POST", path, &[])
        ),
        1 => (id(), any::<bool>()).prop_map(|(id, end)| headers(id, end, &[("x-trailer", "y")])),
        4 => (id(), 0_usize..200, any::<bool>()).prop_map(|(id, length, end)| data(id, length, end)),
        1 => (id(), 0_u8..20).prop_map(|(id, pad)| frame(kind::DATA, flags::PADDED, id, &[pad; 20])),
        1 => (id(), select(vec![2_u8, 6, 8, 12]), any::<u8>(), vec(any::<u8>(), 0..20)).prop_map(
            |(id, kind, flags, payload)| frame(kind, flags, id, &payload)
        ),
        1 => id().prop_map(|id| reset(id, ErrorCode::Cancel)),
        1 => (id(), 1_u32..9_000).prop_map(|(id, increment)| window(id, increment)),
        1 => (1_u16..10, select(vec![0_u32, 1, 20_000])).prop_map(|(id, value)| settings(&[(id, value)])),
        1 => Just(settings_ack()),
        // Blocks with a dynamic table, in pieces.
        2 => (0_usize..30).prop_map(|cut| {
            let mut fields = block(&[(":method", "GET"), (":scheme", "https"), (":authority", "a.test")]);
            fields.extend([0x44, 9]);
            fields.extend(b"/public/b");
            fields.extend([0x40, 1, b'n', 1, b'v', 0xbe]);
            let (begin, rest) = fields.split_at(cut.min(fields.len()));
            let begin = frame(kind::HEADERS, flags::END_STREAM, NEXT, begin);
            [begin, frame(kind::CONTINUATION, flags::END_HEADERS, NEXT, rest)].concat()
        }),
    ]
}

fn of_server() -> impl Strategy<Value = Vec<u8>> {
    let id = || prop_oneof![60 => select(vec![1_u32, 3, 5, 7]), 1 => select(vec![0, 9, 11])];
    prop_oneof![
        4 => (id(), any::<bool>()).prop_map(|(id, end)| headers(id, end, &[(":status", "200"), ("x", "y")])),
        1 => (id(), any::<bool>()).prop_map(|(id, end)| {
            let block = [&block(&[(":status", "200")])[..], &[0x40, 1, b'n', 1, b'v', 0xbe]].concat();
            let flags = flags::END_HEADERS | u8::from(end);
            frame(kind::HEADERS, flags, id, &block)
        }),
        4 => (id(), 0_usize..200, any::<bool>()).prop_map(|(id, length, end)| data(id, length, end)),
        1 => id().prop_map(|id| reset(id, ErrorCode::Cancel)),
        1 => (id(), 1_u32..9_000).prop_map(|(id, increment)| window(id, increment)),
        1 => (1_u16..10, select(vec![0_u32, 1, 20_000])).prop_map(|(id, value)| settings(&[(id, value)])),
        1 => Just(frame(kind::PING, 0, 0, &[0; 8])),
    ]
}

fn script() -> impl Strategy<Value = Vec<Call>> {
    let calls = prop_oneof![
        2 => vec(of_client(), 1..4).prop_map(|frames| (Side::Client, frames)),
        1 => vec(of_server(), 1..4).prop_map(|frames| (Side::Server, frames)),
    ];
    vec(calls, 1..25).prop_map(number)
}

/// Output for the server and for the client, records, and whether the connection has ended.
type Outcome = (Vec<u8>, Vec<u8>, Vec<String>, bool);

/// Runs the calls, each in parts of the given lengths.
fn run(script: &[Call], mut lengths: impl Iterator<Item = usize>) -> Outcome {
    let mut link = Link::fresh(&Default::default());
    let preface = (Side::Client, [PREFACE, &settings(&[])].concat());
    let answer = (Side::Server, [settings(&[]), settings_ack()].concat());
    let mut ended = false;
    'all: for (side, bytes) in [preface, answer].iter().chain(script) {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (part, after) = rest.split_at(lengths.next().unwrap_or(rest.len()).clamp(1, rest.len()));
            rest = after;
            let result = match side {
                Side::Client => link.client(part),
                Side::Server => link.server(part),
            };
            if result.is_err() {
                ended = true;
                break 'all;
            }
        }
    }
    let records = link.records();
    (link.out.to_server, link.out.to_client, records, ended)
}

/// Returns an outcome in a form that does not depend on how frames were cut.
fn joined((to_server, to_client, records, ended): Outcome) -> Outcome {
    let to_server = to_server.strip_prefix(PREFACE).unwrap();
    (join(to_server), join(&to_client), records, ended)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn the_output_is_the_same_wherever_the_streams_are_cut(
        script in script(),
        lengths in vec(1_usize..40, 1..20),
    ) {
        let whole = run(&script, std::iter::empty());
        let expected = joined(whole.clone());
        prop_assert_eq!(&joined(run(&script, lengths.iter().copied().cycle())), &expected);
        prop_assert_eq!(&joined(run(&script, std::iter::repeat(1))), &expected);
        // The server gets whole frames of allowed requests only.
        let to_server = whole.0.strip_prefix(PREFACE).unwrap();
        for line in show(to_server) {
            prop_assert!(!line.contains("/secret") && !line.contains("/public/../x"), "{}", line);
        }
    }

    #[test]
    fn the_server_gets_the_allowed_requests_as_sent(
        requests in vec((
            any::<bool>(),
            vec(("[a-z]{1,9}|accept|user-agent|x-[a-z]{1,4}", "[!-~]([ -~]{0,40}[!-~])?", any::<bool>()), 0..8),
            1_usize..60,
        ), 1..20),
    ) {
        let mut link = Link::new();
        let mut expected = Vec::new();
        for (n, (allowed, fields, cut)) in requests.iter().enumerate() {
            let id = 2 * n as u32 + 1;
            let path = if *allowed { "/public/a" } else { "/secret" };
            // Names that the rules of HTTP forbid or restrict are tested elsewhere.
            let names = ["te", "host", "expect", "connection", "upgrade", "trailer"];
            let fields: Vec<_> = fields.iter().filter(|(name, ..)| !names.contains(&&**name)).collect();
            let mut bytes = block(&[
                (":method", "GET"), (":scheme", "https"), (":path", path), (":authority", "a.test"),
            ]);
            let mut line = format!("HEADERS {id} end :method=GET :scheme=https :path={path} :authority=a.test");
            for (name, value, indexed) in &fields {
                // The client adds some fields to its dynamic table, twice, the second time by reference.
                if *indexed {
                    bytes.extend([0x40, name.len() as u8]);
                    bytes.extend(name.bytes());
                    bytes.push(value.len() as u8);
                    bytes.extend(value.bytes());
                    bytes.push(0xbe);
                    line += &format!(" {name}={value}");
                } else {
                    bytes.extend(block(&[(name, value)]));
                }
                line += &format!(" {name}={value}");
            }
            if *allowed {
                expected.push(line);
            }
            let (begin, rest) = bytes.split_at(bytes.len().min(*cut));
            link.client(&frame(kind::HEADERS, flags::END_STREAM, id, begin)).unwrap();
            link.client(&frame(kind::CONTINUATION, flags::END_HEADERS, id, rest)).unwrap();
        }
        prop_assert_eq!(link.server_gets(), expected);
    }
}
