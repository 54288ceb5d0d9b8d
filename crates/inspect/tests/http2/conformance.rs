//! What RFC 9113 requires of a peer that receives invalid frames, by section, as far as it concerns an intermediary.

use palisade_protocols::http2::{ErrorCode, PREFACE, flags, kind};

use crate::link::*;

/// What the client gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Gets {
    /// A GOAWAY with this code.
    Goaway(ErrorCode),
    /// A RST_STREAM with this code.
    Reset(ErrorCode),
    /// Neither.
    Nothing,
}

use ErrorCode::{CompressionError, FlowControlError, FrameSizeError, ProtocolError, StreamClosed};
use Gets::{Goaway, Nothing, Reset};

fn got(lines: &[String]) -> Gets {
    let codes = [
        ErrorCode::NoError,
        ProtocolError,
        FlowControlError,
        StreamClosed,
        FrameSizeError,
        ErrorCode::RefusedStream,
        CompressionError,
        ErrorCode::EnhanceYourCalm,
    ];
    for line in lines {
        let words: Vec<&str> = line.split(' ').collect();
        let code = |text: &str| {
            let number: u32 = text.parse().unwrap();
            codes.into_iter().find(|code| *code as u32 == number).unwrap()
        };
        match words[0] {
            "GOAWAY" => return Goaway(code(words[2])),
            "RST_STREAM" => return Reset(code(words[2])),
            _ => {}
        }
    }
    Nothing
}

fn open(id: u32) -> Vec<u8> {
    request(id, false, "POST", "/public/a", &[])
}

fn raw_headers(flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    frame(kind::HEADERS, flags, stream, payload)
}

const ITEM: [(&str, &str); 4] = [
    (":method", "GET"),
    (":scheme", "https"),
    (":path", "/public/a"),
    (":authority", "a.test"),
];

/// Returns a request with a further field in this representation.
fn raw_field(stream: u32, field: &[u8]) -> Vec<u8> {
    let block = [&block(&ITEM), field].concat();
    raw_headers(flags::END_HEADERS | flags::END_STREAM, stream, &block)
}

/// Returns a request with a field whose value is a Huffman code.
fn huffman(code: &[u8]) -> Vec<u8> {
    let length = 0x80 | code.len() as u8;
    raw_field(1, &[&[0, 1, b'x', length], code].concat())
}

#[test]
fn invalid_frames_of_the_client_get_the_error_of_rfc_9113() {
    let priority = |stream: u32, payload: &[u8]| frame(kind::PRIORITY, 0, stream, payload);
    let end_headers = flags::END_HEADERS;
    let cases: Vec<(&str, Vec<Vec<u8>>, Gets)> = vec![
        (
            "4.1 unknown frame type",
            vec![frame(0x16, 0xff, 0, &[0; 8])],
            Nothing,
        ),
        (
            "4.1 undefined flags",
            vec![frame(kind::PING, 0x16, 0, &[0; 8])],
            Nothing,
        ),
        (
            "4.1 reserved bit",
            vec![frame(kind::PING, 0, 1 << 31, &[0; 8])],
            Nothing,
        ),
        (
            "4.2 DATA of the maximum size",
            vec![open(1), data(1, 16_384, false)],
            Nothing,
        ),
        (
            "4.2 DATA beyond the maximum size",
            vec![open(1), data(1, 16_385, false)],
            Goaway(FrameSizeError),
        ),
        (
            "4.2 HEADERS beyond the maximum size",
            vec![raw_headers(end_headers, 1, &[0; 16_385])],
            Goaway(FrameSizeError),
        ),
        (
            "4.3 invalid header block",
            vec![raw_headers(end_headers, 1, &[0xff; 5])],
            Goaway(CompressionError),
        ),
        (
            "4.3 PRIORITY within a block",
            vec![raw_headers(0, 1, &[0x82]), priority(1, &[0, 0, 0, 3, 1])],
            Goaway(ProtocolError),
        ),
        (
            "4.3 HEADERS of another stream within a block",
            vec![raw_headers(0, 1, &[0x82]), open(3)],
            Goaway(ProtocolError),
        ),
        (
            "4.3 unknown frame within a block",
            vec![raw_headers(0, 1, &[0x82]), frame(0x16, 0, 0, &[])],
            Goaway(ProtocolError),
        ),
        ("5.1 idle: DATA", vec![data(1, 1, true)], Goaway(ProtocolError)),
        (
            "5.1 idle: RST_STREAM",
            vec![reset(1, ErrorCode::Cancel)],
            Goaway(ProtocolError),
        ),
        (
            "5.1 idle: WINDOW_UPDATE",
            vec![window(1, 100)],
            Goaway(ProtocolError),
        ),
        (
            "5.1 idle: CONTINUATION",
            vec![frame(kind::CONTINUATION, end_headers, 1, &[0x82])],
            Goaway(ProtocolError),
        ),
        ("5.1 idle: PRIORITY", vec![priority(1, &[0, 0, 0, 3, 1])], Nothing),
        (
            "5.1 half-closed: DATA",
            vec![get(1, "/public/a"), data(1, 1, true)],
            Reset(StreamClosed),
        ),
        (
            "5.1 half-closed: HEADERS",
            vec![get(1, "/public/a"), get(1, "/public/a")],
            Reset(StreamClosed),
        ),
        (
            "5.1 half-closed: WINDOW_UPDATE",
            vec![get(1, "/public/a"), window(1, 1)],
            Nothing,
        ),
        (
            "5.1 closed by reset: DATA",
            vec![open(1), reset(1, ErrorCode::Cancel), data(1, 1, true)],
            Reset(StreamClosed),
        ),
        (
            "5.1 closed by reset: HEADERS",
            vec![open(1), reset(1, ErrorCode::Cancel), open(1)],
            Goaway(StreamClosed),
        ),
        (
            "5.1 closed by reset: WINDOW_UPDATE",
            vec![open(1), reset(1, ErrorCode::Cancel), window(1, 1)],
            Nothing,
        ),
        (
            "5.1.1 PRIORITY of a higher stream",
            vec![priority(3, &[0, 0, 0, 0, 255]), get(1, "/public/a")],
            Nothing,
        ),
        ("5.1.1 even stream", vec![open(2)], Goaway(ProtocolError)),
        (
            "5.1.1 lower stream",
            vec![get(5, "/public/a"), get(3, "/public/a")],
            Goaway(ProtocolError),
        ),
        (
            "5.3.1 HEADERS depend on themselves",
            vec![raw_headers(
                end_headers | flags::PRIORITY,
                1,
                &[0, 0, 0, 1, 1, 0x82],
            )],
            Goaway(ProtocolError),
        ),
        (
            "5.3.1 PRIORITY depends on itself",
            vec![open(1), priority(1, &[0, 0, 0, 1, 1])],
            Goaway(ProtocolError),
        ),
        (
            "6.1 DATA on stream 0",
            vec![data(0, 1, true)],
            Goaway(ProtocolError),
        ),
        (
            "6.1 padding of DATA",
            vec![open(1), frame(kind::DATA, flags::PADDED, 1, &[2, 0])],
            Goaway(ProtocolError),
        ),
        ("6.2 HEADERS on stream 0", vec![open(0)], Goaway(ProtocolError)),
        (
            "6.2 padding of HEADERS",
            vec![raw_headers(end_headers | flags::PADDED, 1, &[2, 0x82])],
            Goaway(ProtocolError),
        ),
        (
            "6.3 PRIORITY on stream 0",
            vec![priority(0, &[0, 0, 0, 3, 1])],
            Goaway(ProtocolError),
        ),
        (
            "6.3 PRIORITY of 4 bytes",
            vec![open(1), priority(1, &[0; 4])],
            Goaway(FrameSizeError),
        ),
        (
            "6.4 RST_STREAM on stream 0",
            vec![reset(0, ErrorCode::Cancel)],
            Goaway(ProtocolError),
        ),
        (
            "6.4 RST_STREAM of 3 bytes",
            vec![open(1), frame(kind::RST_STREAM, 0, 1, &[0; 3])],
            Goaway(FrameSizeError),
        ),
        (
            "6.5 acknowledgement with a payload",
            vec![frame(kind::SETTINGS, flags::ACK, 0, &[0; 6])],
            Goaway(FrameSizeError),
        ),
        (
            "6.5 SETTINGS on a stream",
            vec![frame(kind::SETTINGS, 0, 1, &[0; 6])],
            Goaway(ProtocolError),
        ),
        (
            "6.5 SETTINGS of 5 bytes",
            vec![frame(kind::SETTINGS, 0, 0, &[0; 5])],
            Goaway(FrameSizeError),
        ),
        ("6.5 unknown setting", vec![settings(&[(0xff, 1)])], Nothing),
        (
            "6.5.3 acknowledgement without SETTINGS",
            vec![settings_ack()],
            Goaway(ProtocolError),
        ),
        (
            "6.6 PUSH_PROMISE",
            vec![frame(kind::PUSH_PROMISE, end_headers, 1, &[0, 0, 0, 2])],
            Goaway(ProtocolError),
        ),
        (
            "6.7 PING on a stream",
            vec![frame(kind::PING, 0, 1, &[0; 8])],
            Goaway(ProtocolError),
        ),
        (
            "6.7 PING of 6 bytes",
            vec![frame(kind::PING, 0, 0, &[0; 6])],
            Goaway(FrameSizeError),
        ),
        (
            "6.8 GOAWAY on a stream",
            vec![frame(kind::GOAWAY, 0, 1, &[0; 8])],
            Goaway(ProtocolError),
        ),
        (
            "6.8 GOAWAY of 7 bytes",
            vec![frame(kind::GOAWAY, 0, 0, &[0; 7])],
            Goaway(FrameSizeError),
        ),
        (
            "6.9 increment 0 of the connection",
            vec![window(0, 0)],
            Goaway(ProtocolError),
        ),
        (
            "6.9 increment 0 of a stream",
            vec![open(1), window(1, 0)],
            Reset(ProtocolError),
        ),
        (
            "6.9 WINDOW_UPDATE of 3 bytes",
            vec![frame(kind::WINDOW_UPDATE, 0, 0, &[0; 3])],
            Goaway(FrameSizeError),
        ),
        (
            "6.10 CONTINUATION after END_HEADERS",
            vec![
                get(1, "/public/a"),
                frame(kind::CONTINUATION, end_headers, 1, &[0x82]),
            ],
            Goaway(ProtocolError),
        ),
        (
            "6.10 DATA before CONTINUATION",
            vec![raw_headers(0, 1, &[0x82]), data(1, 1, true)],
            Goaway(ProtocolError),
        ),
        (
            "6.10 CONTINUATION on stream 0",
            vec![
                raw_headers(0, 1, &[0x82]),
                frame(kind::CONTINUATION, end_headers, 0, &[]),
            ],
            Goaway(ProtocolError),
        ),
        (
            "8.1 second HEADERS without END_STREAM",
            vec![open(1), headers(1, false, &[("x", "y")])],
            Reset(ProtocolError),
        ),
        (
            "8.2.1 upper-case name",
            vec![request(1, true, "GET", "/public/a", &[("X", "y")])],
            Reset(ProtocolError),
        ),
        (
            "8.2.2 Connection",
            vec![request(1, true, "GET", "/public/a", &[("connection", "close")])],
            Reset(ProtocolError),
        ),
        (
            "8.2.2 TE",
            vec![request(1, true, "GET", "/public/a", &[("te", "gzip")])],
            Reset(ProtocolError),
        ),
        (
            "8.3 unknown pseudo-header field",
            vec![request(1, true, "GET", "/public/a", &[(":x", "y")])],
            Reset(ProtocolError),
        ),
        (
            "8.3 pseudo-header field of responses",
            vec![request(1, true, "GET", "/public/a", &[(":status", "200")])],
            Reset(ProtocolError),
        ),
        (
            "8.3 pseudo-header field after a field",
            vec![request(
                1,
                true,
                "GET",
                "/public/a",
                &[("x", "y"), (":authority", "b")],
            )],
            Reset(ProtocolError),
        ),
        (
            "8.3 pseudo-header field in trailers",
            vec![open(1), headers(1, true, &[(":method", "GET")])],
            Reset(ProtocolError),
        ),
        ("8.3.1 empty path", vec![get(1, "")], Reset(ProtocolError)),
        (
            "8.3.1 no method",
            vec![headers(
                1,
                true,
                &[(":scheme", "https"), (":path", "/"), (":authority", "a")],
            )],
            Reset(ProtocolError),
        ),
        (
            "8.1.1 length differs",
            vec![
                request(1, false, "POST", "/public/a", &[("content-length", "1")]),
                data(1, 4, true),
            ],
            Reset(ProtocolError),
        ),
        (
            "RFC 7541 4.2 size update at the end",
            vec![raw_headers(end_headers, 1, &[0x82, 0x3f, 0xe1, 0x1f])],
            Goaway(CompressionError),
        ),
        (
            "RFC 7541 6.3 size update beyond the setting",
            vec![raw_headers(end_headers, 1, &[0x3f, 0xe2, 0x1f])],
            Goaway(CompressionError),
        ),
        (
            "RFC 7541 2.3.3 index beyond the tables",
            vec![raw_headers(end_headers, 1, &[0xc6])],
            Goaway(CompressionError),
        ),
        (
            "5.1 half-closed: CONTINUATION",
            vec![
                get(1, "/public/a"),
                frame(kind::CONTINUATION, end_headers, 1, &[0x82]),
            ],
            Goaway(ProtocolError),
        ),
        (
            "5.1 half-closed: PRIORITY",
            vec![get(1, "/public/a"), priority(1, &[0, 0, 0, 3, 1])],
            Nothing,
        ),
        (
            "5.1 half-closed: RST_STREAM",
            vec![get(1, "/public/a"), reset(1, ErrorCode::Cancel)],
            Nothing,
        ),
        (
            "5.1 closed by reset: CONTINUATION",
            vec![
                open(1),
                reset(1, ErrorCode::Cancel),
                frame(kind::CONTINUATION, end_headers, 1, &[0x82]),
            ],
            Goaway(ProtocolError),
        ),
        (
            "6.1 several DATA",
            vec![open(1), data(1, 5, false), data(1, 0, false), data(1, 5, true)],
            Nothing,
        ),
        (
            "6.1 DATA with padding",
            vec![
                open(1),
                frame(kind::DATA, flags::PADDED | flags::END_STREAM, 1, &[3, 1, 0, 0, 0]),
            ],
            Nothing,
        ),
        (
            "6.3 PRIORITY with weight 1",
            vec![open(1), priority(1, &[0, 0, 0, 0, 0])],
            Nothing,
        ),
        (
            "6.3 PRIORITY with weight 256",
            vec![open(1), priority(1, &[0, 0, 0, 0, 255])],
            Nothing,
        ),
        (
            "6.3 exclusive PRIORITY",
            vec![open(1), priority(1, &[0x80, 0, 0, 3, 15])],
            Nothing,
        ),
        (
            "6.9.1 window of the connection beyond its maximum: the server refuses the update",
            vec![window(0, 0x7fff_ffff), window(0, 0x7fff_ffff)],
            Nothing,
        ),
        (
            "6.10 CONTINUATION after a CONTINUATION with END_HEADERS",
            vec![
                raw_headers(0, 1, &block(&ITEM)),
                frame(kind::CONTINUATION, end_headers, 1, &[]),
                frame(kind::CONTINUATION, end_headers, 1, &[0x82]),
            ],
            Goaway(ProtocolError),
        ),
        (
            "6.10 CONTINUATION after DATA",
            vec![
                open(1),
                data(1, 1, false),
                frame(kind::CONTINUATION, end_headers, 1, &[0x82]),
            ],
            Goaway(ProtocolError),
        ),
        (
            "7 GOAWAY with an unknown code",
            vec![frame(kind::GOAWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 0xff])],
            Nothing,
        ),
        (
            "7 RST_STREAM with an unknown code",
            vec![open(1), frame(kind::RST_STREAM, 0, 1, &[0, 0, 0, 0xff])],
            Nothing,
        ),
        (
            "8.3.1 no scheme",
            vec![headers(
                1,
                true,
                &[(":method", "GET"), (":path", "/public/a"), (":authority", "a")],
            )],
            Reset(ProtocolError),
        ),
        (
            "8.3.1 no path",
            vec![headers(
                1,
                true,
                &[(":method", "GET"), (":scheme", "https"), (":authority", "a")],
            )],
            Reset(ProtocolError),
        ),
        (
            "8.3.1 two methods",
            vec![headers(
                1,
                true,
                &[
                    (":method", "GET"),
                    (":method", "GET"),
                    (":scheme", "https"),
                    (":path", "/public/a"),
                    (":authority", "a"),
                ],
            )],
            Reset(ProtocolError),
        ),
        (
            "8.3.1 two schemes",
            vec![headers(
                1,
                true,
                &[
                    (":method", "GET"),
                    (":scheme", "https"),
                    (":scheme", "https"),
                    (":path", "/public/a"),
                    (":authority", "a"),
                ],
            )],
            Reset(ProtocolError),
        ),
        (
            "8.3.1 two paths",
            vec![headers(
                1,
                true,
                &[
                    (":method", "GET"),
                    (":scheme", "https"),
                    (":path", "/public/a"),
                    (":path", "/public/a"),
                    (":authority", "a"),
                ],
            )],
            Reset(ProtocolError),
        ),
        (
            "8.1.1 length of several DATA differs",
            vec![
                request(1, false, "POST", "/public/a", &[("content-length", "9")]),
                data(1, 4, false),
                data(1, 4, true),
            ],
            Reset(ProtocolError),
        ),
        (
            "RFC 7541 2.3.3 index of a name beyond the tables",
            vec![raw_headers(end_headers, 1, &[0x7f, 7, 0])],
            Goaway(CompressionError),
        ),
        (
            "RFC 7541 5.2 padding of more than 7 bits",
            vec![huffman(&[0x07, 0xff])],
            Goaway(CompressionError),
        ),
        (
            "RFC 7541 5.2 padding of zeros",
            vec![huffman(&[0])],
            Goaway(CompressionError),
        ),
        (
            "RFC 7541 5.2 end of string",
            vec![huffman(&[0xff; 4])],
            Goaway(CompressionError),
        ),
        ("RFC 7541 5.2 Huffman", vec![huffman(&[0x07])], Nothing),
        (
            "RFC 7541 6.1 index 0",
            vec![raw_headers(end_headers, 1, &[0x80])],
            Goaway(CompressionError),
        ),
        (
            "RFC 7541 6.2.1 literal with incremental indexing, used again",
            vec![raw_field(1, &[0x40, 1, b'x', 1, b'y']), raw_field(3, &[0xbe])],
            Nothing,
        ),
        (
            "RFC 7541 6.2.2 literal without indexing",
            vec![raw_field(1, &[0, 1, b'x', 1, b'y'])],
            Nothing,
        ),
    ];
    for (name, frames, expected) in cases {
        let mut link = Link::new();
        let result = frames.iter().try_for_each(|bytes| link.client(bytes));
        let lines = link.client_gets();
        assert_eq!(got(&lines), expected, "{name}: {lines:?}");
        assert_eq!(result.is_err(), matches!(expected, Goaway(_)), "{name}");
        if result.is_err() {
            assert_eq!(
                link.server_gets().last().map(String::as_str),
                Some("GOAWAY 0 0"),
                "{name}"
            );
            assert!(link.client(&[]).is_err(), "{name}");
        }
    }
}

#[test]
fn the_first_frame_of_each_peer_is_settings() {
    let ping = frame(kind::PING, 0, 0, &[0; 8]);
    for first in [ping, settings_ack(), get(1, "/public/a"), frame(99, 0, 0, &[])] {
        let mut link = Link::fresh(&Default::default());
        assert!(link.client(&[PREFACE, &first].concat()).is_err());
        // The first frame that the client gets is SETTINGS too.
        assert_eq!(link.client_gets(), ["SETTINGS ", "GOAWAY 0 1"]);
        let mut link = Link::fresh(&Default::default());
        link.client(&[PREFACE, &settings(&[])].concat()).unwrap();
        link.out.to_server.clear();
        assert!(link.server(&first).is_err());
        assert_eq!(got(&link.server_gets()), Goaway(ProtocolError));
        assert_eq!(link.client_gets(), ["SETTINGS ", "GOAWAY 0 2"]);
    }
}

#[test]
fn a_response_of_the_filter_waits_for_the_settings_of_the_server() {
    let mut link = Link::fresh(&Default::default());
    let first = [
        PREFACE,
        &settings(&[]),
        &get(1, "/secret"),
        &request(3, false, "POST", "/secret", &[]),
        &data(3, 9, true),
    ];
    link.client(&first.concat()).unwrap();
    assert_eq!(link.out.to_client, []);
    link.server(&settings(&[])).unwrap();
    let lines = link.client_gets();
    let kinds: Vec<&str> = lines.iter().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(kinds, ["SETTINGS", "HEADERS", "HEADERS", "WINDOW_UPDATE"]);
}

#[test]
fn a_stream_that_both_peers_have_ended_is_closed() {
    let ended = || {
        let mut link = Link::new();
        link.client(&get(1, "/public/a")).unwrap();
        link.server(&headers(1, true, &[(":status", "200")])).unwrap();
        link.client_gets();
        link
    };
    let mut link = ended();
    link.client(&data(1, 5, true)).unwrap();
    assert_eq!(link.client_gets(), ["WINDOW_UPDATE 0 5", "RST_STREAM 1 5"]);
    let mut link = ended();
    assert!(link.client(&get(1, "/public/a")).is_err());
    assert_eq!(got(&link.client_gets()), Goaway(StreamClosed));
    let mut link = ended();
    let more = frame(kind::CONTINUATION, flags::END_HEADERS, 1, &[0x82]);
    assert!(link.client(&more).is_err());
    assert_eq!(got(&link.client_gets()), Goaway(ProtocolError));
    for harmless in [
        window(1, 1),
        reset(1, ErrorCode::Cancel),
        frame(kind::PRIORITY, 0, 1, &[0, 0, 0, 3, 1]),
    ] {
        let mut link = ended();
        link.server_gets();
        link.client(&harmless).unwrap();
        assert_eq!((link.client_gets().len(), link.server_gets().len()), (0, 0));
    }
}

#[test]
fn unknown_frames_are_dropped() {
    let mut link = Link::new();
    let unknown = frame(0x42, 0xff, 7, &[1; 5_000]);
    link.client(&[unknown.clone(), get(1, "/public/a"), unknown.clone()].concat())
        .unwrap();
    link.server(&[unknown.clone(), headers(1, true, &[(":status", "200")]), unknown].concat())
        .unwrap();
    assert_eq!((link.server_gets().len(), link.client_gets().len()), (1, 1));
}

#[test]
fn pings_and_goaway_pass_in_both_directions() {
    let mut link = Link::new();
    let ping = frame(kind::PING, 0, 0, &[7; 8]);
    let ack = frame(kind::PING, flags::ACK, 0, &[7; 8]);
    let goaway = frame(kind::GOAWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 0, b'b', b'y', b'e']);
    let all = [ping, ack, goaway].concat();
    link.client(&all).unwrap();
    link.server(&all).unwrap();
    assert_eq!(link.out.to_server, all);
    assert_eq!(link.out.to_client, all);
}
