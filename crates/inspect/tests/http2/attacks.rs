//! Floods and other attacks: each ends the connection or costs no memory.

use palisade_abi::Reason;
use palisade_inspect::{
    Side,
    http2::{Http2Limits, Output, Rate},
};
use palisade_protocols::http2::{ErrorCode, PREFACE, ParseError, encode, flags, kind};

use crate::link::*;

/// Memory that a connection may hold besides its streams, bytes.
const BOUND: usize = 300_000;

/// Sends `bytes` of a peer until the connection ends. Returns the number of calls and the error.
fn flood(
    link: &mut Link,
    side: Side,
    most: usize,
    mut bytes: impl FnMut(u32) -> Vec<u8>,
) -> (usize, ParseError) {
    let mut sizes = (0, 0);
    for n in 0..most {
        let bytes = bytes(n as u32);
        let result = match side {
            Side::Client => link.client(&bytes),
            Side::Server => link.server(&bytes),
        };
        sizes.0 += bytes.len();
        sizes.1 += link.out.to_client.len() + link.out.to_server.len();
        link.out = Default::default();
        link.records.clear();
        assert!(link.filter.held() <= BOUND, "{}", link.filter.held());
        assert!(link.filter.streams() <= 256);
        // A response is a few times as long as the shortest request.
        assert!(sizes.1 <= 20 * sizes.0 + 1_000, "{sizes:?}");
        if let Err(end) = result {
            let (by, error) = end.error.unwrap();
            assert_eq!(by, side);
            return (n + 1, error);
        }
    }
    panic!("the connection did not end");
}

#[test]
fn rapid_reset_ends_the_connection() {
    let mut link = Link::new();
    let (count, error) = flood(&mut link, Side::Client, 5_000, |n| {
        [get(2 * n + 1, "/public/a"), reset(2 * n + 1, ErrorCode::Cancel)].concat()
    });
    assert_eq!((count, error), (1_001, ParseError::TooManyResets));
    // At a permitted rate the connection continues, and resets after a response do not count.
    let mut link = Link::new();
    for n in 0..3_000 {
        link.now += 5;
        let id = 2 * n + 1;
        link.client(&[get(id, "/public/a"), reset(id, ErrorCode::Cancel)].concat())
            .unwrap();
    }
    for n in 3_000..9_000 {
        let id = 2 * n + 1;
        link.client(&get(id, "/public/a")).unwrap();
        link.server(&headers(id, false, &[(":status", "200")])).unwrap();
        link.client(&reset(id, ErrorCode::Cancel)).unwrap();
    }
}

#[test]
fn denied_and_malformed_requests_are_limited() {
    let limits = Http2Limits {
        denials: Rate {
            burst: 100,
            per_second: 100,
        },
        ..Http2Limits::default()
    };
    for path in ["/secret", ""] {
        let mut link = Link::with(&limits);
        let (count, error) = flood(&mut link, Side::Client, 5_000, |n| get(2 * n + 1, path));
        assert_eq!((count, error), (101, ParseError::TooManyDenied));
    }
    // The default permits what a busy client can be denied.
    let mut link = Link::new();
    for n in 0..30_000 {
        link.client(&get(2 * n + 1, "/secret")).unwrap();
        link.out = Default::default();
        link.records.clear();
    }
}

#[test]
fn floods_of_frames_without_content_end_the_connection() {
    let ping = frame(kind::PING, 0, 0, &[0; 8]);
    let ping_ack = frame(kind::PING, flags::ACK, 0, &[0; 8]);
    let goaway = frame(kind::GOAWAY, 0, 0, &[0; 8]);
    for bytes in [
        ping,
        ping_ack,
        goaway,
        window(0, 1),
        window(1, 1),
        data(1, 0, false),
        frame(kind::DATA, flags::PADDED, 1, &[0]),
        frame(kind::PRIORITY, 0, 1, &[0, 0, 0, 0, 1]),
        frame(77, 0, 0, &[]),
        frame(77, 0, 0, &[0; 200]),
    ] {
        for side in [Side::Client, Side::Server] {
            let mut link = Link::new();
            link.client(&request(1, false, "POST", "/public/a", &[])).unwrap();
            let (count, error) = flood(&mut link, side, 20_000, |_| bytes.clone());
            assert_eq!(error, ParseError::TooManyFrames, "{bytes:?}");
            assert!((9_900..10_100).contains(&count), "{count}");
        }
    }
    // SETTINGS that the other peer does not acknowledge.
    let mut link = Link::new();
    let (count, error) = flood(&mut link, Side::Client, 100, |_| settings(&[]));
    assert_eq!((count, error), (65, ParseError::TooManyFrames));
    let mut link = Link::new();
    let (_, error) = flood(&mut link, Side::Client, 20_000, |_| reset(1, ErrorCode::Cancel));
    assert_eq!(error, ParseError::IdleStream);
    let mut link = Link::new();
    link.client(&get(1, "/public/a")).unwrap();
    let (_, error) = flood(&mut link, Side::Client, 20_000, |_| reset(1, ErrorCode::Cancel));
    assert_eq!(error, ParseError::TooManyFrames);
}

#[test]
fn a_transfer_may_update_windows_after_each_frame() {
    let mut link = Link::new();
    link.client(&request(1, false, "POST", "/public/a", &[])).unwrap();
    link.server(&headers(1, false, &[(":status", "200")])).unwrap();
    for _ in 0..50_000 {
        link.client(&data(1, 1, false)).unwrap();
        link.server(&[window(0, 1), window(1, 1), frame(kind::PING, 0, 0, &[0; 8])].concat())
            .unwrap();
        link.out = Default::default();
    }
}

#[test]
fn header_blocks_are_bounded() {
    // CONTINUATION frames without END_HEADERS, empty and full.
    for (payload, most) in [(0, 40), (1, 40), (16_000, 6)] {
        for side in [Side::Client, Side::Server] {
            let mut link = Link::new();
            let begin = frame(kind::HEADERS, flags::END_STREAM, 1, &block(&[("x", "y")]));
            match side {
                Side::Client => link.client(&begin).unwrap(),
                Side::Server => {
                    link.client(&get(1, "/public/a")).unwrap();
                    link.server(&begin).unwrap();
                }
            }
            let (count, error) = flood(&mut link, side, 100, |_| {
                frame(kind::CONTINUATION, 0, 1, &vec![0; payload])
            });
            assert_eq!(error, ParseError::BlockTooLong);
            assert!(count < most, "{payload}: {count}");
        }
    }
}

#[test]
fn a_header_block_that_expands_is_not_stored() {
    for side in [Side::Client, Side::Server] {
        let mut link = Link::new();
        if side == Side::Server {
            link.client(&get(1, "/public/a")).unwrap();
        }
        let id = 1;
        let mut block = vec![0x40, 1, b'n', 0x7f, 0x81, 0x1e];
        block.extend([b'v'; 127 + 1 + (30 << 7)]);
        block.extend([0xbe; 12_000]);
        let bytes = frame(kind::HEADERS, flags::END_STREAM | flags::END_HEADERS, id, &block);
        let (count, error) = flood(&mut link, side, 1, |_| bytes.clone());
        assert_eq!((count, error), (1, ParseError::ListTooLong));
    }
}

#[test]
fn a_server_without_settings_does_not_make_responses_pile_up() {
    let mut link = Link::fresh(&Default::default());
    link.client(&[PREFACE, &settings(&[])].concat()).unwrap();
    let (count, error) = flood(&mut link, Side::Client, 5_000, |n| get(2 * n + 1, "/secret"));
    assert_eq!(error, ParseError::Backlog);
    assert!(count > 500, "{count}");
}

#[test]
fn a_server_that_stalls_within_a_frame_does_not_make_responses_pile_up() {
    let mut link = Link::new();
    link.client(&get(1, "/public/a")).unwrap();
    link.server(&headers(1, false, &[(":status", "200")])).unwrap();
    link.server(&data(1, 10_000, false)[..20]).unwrap();
    link.out = Output::default();
    for n in 0..5_000 {
        link.client(&get(2 * n + 3, "/secret")).unwrap();
        assert_eq!(link.filter.held(), 0);
    }
    assert_eq!(link.client_gets().len(), 5_000);
}

#[test]
fn open_streams_are_bounded() {
    let mut link = Link::new();
    for n in 0..2_000 {
        link.client(&request(2 * n + 1, false, "POST", "/public/a", &[]))
            .unwrap();
    }
    assert_eq!(link.filter.streams(), 256);
    assert_eq!(link.server_gets().len(), 256);
    assert_eq!(link.client_gets().len(), 2_000 - 256);
}

#[test]
fn content_beyond_the_window_ends_the_connection() {
    let mut link = Link::new();
    link.client(&request(1, false, "POST", "/public/a", &[])).unwrap();
    for _ in 0..4 {
        link.client(&data(1, 16_383, false)).unwrap();
    }
    let end = link.client(&data(1, 16_383, false)).unwrap_err();
    assert_eq!(end.error, Some((Side::Client, ParseError::Window)));
    assert!(link.client_gets().contains(&"GOAWAY 1 3".to_owned()));
    // The server must not exceed the window of the client; the client's updates raise it.
    let mut link = Link::new();
    link.client(&[get(1, "/public/a"), window(0, 20_000)].concat())
        .unwrap();
    link.server(&headers(1, false, &[(":status", "200")])).unwrap();
    // The filter keeps 1,024 bytes for its own responses.
    let window = 65_535 + 20_000 - 1_024;
    for _ in 0..window / 16_000 {
        link.server(&data(1, 16_000, false)).unwrap();
    }
    link.server(&data(1, window % 16_000, false)).unwrap();
    let end = link.server(&data(1, 1, false)).unwrap_err();
    assert_eq!(end.error, Some((Side::Server, ParseError::Window)));
}

#[test]
fn a_push_of_the_server_ends_the_connection() {
    let mut link = Link::new();
    link.client(&get(1, "/public/a")).unwrap();
    let promise = frame(kind::PUSH_PROMISE, flags::END_HEADERS, 1, &[0, 0, 0, 2, 0x82]);
    let end = link.server(&promise).unwrap_err();
    assert_eq!(end.error, Some((Side::Server, ParseError::Push)));
    assert_eq!(end.reason, Reason::AppMalformed);
    assert_eq!(link.client_gets(), ["GOAWAY 1 2"]);
}

#[test]
fn a_server_cannot_answer_streams_that_it_does_not_know() {
    for bytes in [
        headers(3, true, &[(":status", "200")]),
        data(3, 1, true),
        reset(3, ErrorCode::Cancel),
        window(3, 1),
        // Streams that the client has not opened, and one of the server.
        headers(5, true, &[(":status", "200")]),
        data(2, 1, true),
    ] {
        let mut link = Link::new();
        link.client(&[get(1, "/public/a"), get(3, "/secret")].concat())
            .unwrap();
        link.client_gets();
        let end = link.server(&bytes).unwrap_err();
        assert_eq!(end.error, Some((Side::Server, ParseError::Unsolicited)));
        assert_eq!(link.client_gets(), ["GOAWAY 3 2"]);
    }
}

#[test]
fn a_server_cannot_continue_a_stream_that_it_has_ended() {
    for bytes in [data(1, 1, false), headers(1, true, &[("x", "y")])] {
        let mut link = Link::new();
        link.client(&request(1, false, "POST", "/public/a", &[])).unwrap();
        link.server(&headers(1, true, &[(":status", "200")])).unwrap();
        let end = link.server(&bytes).unwrap_err();
        assert_eq!(end.error, Some((Side::Server, ParseError::ClosedStream)));
    }
}

#[test]
fn bytes_that_are_not_http2_end_the_connection() {
    for bytes in [&b"GET / HTTP/1.1\r\n"[..], &PREFACE[..20], b"\x16\x03\x01"] {
        let mut link = Link::fresh(&Http2Limits::default());
        let result = link.client(&[bytes, b"x"].concat());
        assert_eq!(
            result.unwrap_err().error,
            Some((Side::Client, ParseError::Preface))
        );
        assert!(!link.filter.has_begun());
        assert_eq!((link.server_gets().len(), link.client_gets().len()), (0, 0));
    }
}

#[test]
fn nothing_of_a_request_with_a_split_head_is_forwarded() {
    // A header block that would smuggle a second request into an HTTP/1 server behind the HTTP/2 server.
    for (name, value) in [
        ("x", "y\r\nGET /secret HTTP/1.1"),
        ("x\r\nhost", "b"),
        ("transfer-encoding", "chunked"),
        ("content-length", "5, 5"),
        ("te", "chunked"),
    ] {
        let mut link = Link::new();
        let mut fields = block(&[
            (":method", "POST"),
            (":scheme", "https"),
            (":path", "/public/a"),
            (":authority", "a.test"),
        ]);
        encode::field(name.as_bytes(), value.as_bytes(), false, &mut fields);
        link.client(&frame(kind::HEADERS, flags::END_HEADERS, 1, &fields))
            .unwrap();
        assert_eq!(link.server_gets(), [""; 0], "{name}");
        assert_eq!(link.client_gets(), ["RST_STREAM 1 1"]);
    }
}
