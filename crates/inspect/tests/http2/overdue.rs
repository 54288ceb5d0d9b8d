//! Requests whose response is overdue: the answer, the stream at the server, and what the server sends afterwards.

use palisade_inspect::http2::{Http2Limits, Output};
use palisade_protocols::http2::{Decoder, ErrorCode, Fields, flags, fragment_of, headers_of, kind};

use crate::link::*;

const ANSWER: &str =
    "content-type=text/plain; charset=utf-8 content-length=0 x-palisade-error=response timeout";

/// Returns a response head that the client's decoder has to remember: `:status: 200`, and a field that is added to the
/// dynamic table.
fn indexed(stream: u32, end: bool, value: &str) -> Vec<u8> {
    let mut block = block(&[(":status", "200")]);
    block.extend_from_slice(&[0x40, 4]);
    block.extend_from_slice(b"x-id");
    block.push(value.len() as u8);
    block.extend_from_slice(value.as_bytes());
    let mut out = Vec::new();
    headers_of(stream, end, None, &block, 16_384, &mut out);
    out
}

/// Returns a response head whose second field is the newest one of the dynamic table.
fn newest(stream: u32, end: bool) -> Vec<u8> {
    let mut block = block(&[(":status", "200")]);
    block.push(0x80 | 62);
    let mut out = Vec::new();
    headers_of(stream, end, None, &block, 16_384, &mut out);
    out
}

#[test]
fn an_overdue_request_is_answered_and_others_go_on() {
    let mut link = Link::new();
    link.client(&[get(1, "/public/a"), request(3, false, "POST", "/public/b", &[])].concat())
        .unwrap();
    link.now += 500;
    link.client(&get(5, "/public/c")).unwrap();
    let _ = link.server_gets();
    assert_eq!(link.filter.waits_since(), Some(1_000));
    link.now += 500;
    // The request that the client has not ended is not overdue, and the last one not yet.
    assert_eq!(link.answer_overdue(1_000), 1);
    assert_eq!(
        link.client_gets(),
        [format!("HEADERS 1 end :status=504 {ANSWER}")]
    );
    assert_eq!(link.server_gets(), ["RST_STREAM 1 8"]);
    assert_eq!(
        (link.filter.streams(), link.filter.waits_since()),
        (2, Some(1_500))
    );
    // The end of the request begins the wait.
    link.client(&data(3, 0, true)).unwrap();
    link.server(&headers(5, true, &[(":status", "200")])).unwrap();
    assert_eq!(link.client_gets(), ["HEADERS 5 end :status=200"]);
    assert_eq!(link.answer_overdue(1_999), 0);
    assert_eq!(link.filter.waits_since(), Some(2_000));
    assert_eq!(link.answer_overdue(2_000), 1);
    assert_eq!((link.filter.streams(), link.filter.waits_since()), (0, None));
}

#[test]
fn interim_responses_begin_the_wait_again_and_a_head_ends_it() {
    let mut link = Link::new();
    let grpc = [("content-type", "application/grpc"), ("te", "trailers")];
    link.client(&get(1, "/public/a")).unwrap();
    link.client(&request(3, true, "POST", "/public/b", &grpc))
        .unwrap();
    link.now += 100;
    link.server(&headers(1, false, &[(":status", "103")])).unwrap();
    link.server(&headers(3, false, &[(":status", "200"), grpc[0]]))
        .unwrap();
    assert_eq!(link.answer_overdue(1_099), 0);
    assert_eq!(link.filter.waits_since(), Some(1_100));
    let _ = link.client_gets();
    assert_eq!(link.answer_overdue(1_100), 1);
    assert_eq!(
        link.client_gets(),
        [format!("HEADERS 1 end :status=504 {ANSWER}")]
    );
    assert_eq!(link.answer_overdue(u64::MAX), 0);
    assert_eq!(link.filter.streams(), 1);
}

#[test]
fn the_answer_fits_the_request() {
    let mut link = Link::new();
    let grpc = [("content-type", "application/grpc"), ("te", "trailers")];
    link.client(&window(0, 5_000)).unwrap();
    link.client(&request(1, true, "HEAD", "/public/a", &[])).unwrap();
    link.client(&get(3, "/public/a")).unwrap();
    link.client(&request(5, true, "POST", "/public/b", &grpc))
        .unwrap();
    let _ = (link.server_gets(), link.client_gets());
    assert_eq!(link.answer_overdue(1_000), 3);
    let full = ANSWER.replace("length=0", "length=4");
    assert_eq!(
        link.client_gets(),
        [
            format!("HEADERS 1 end :status=504 {full}"),
            format!("HEADERS 3 :status=504 {full}"),
            "DATA 3 end 4".to_owned(),
            "HEADERS 5 end :status=200 content-type=application/grpc grpc-status=4 grpc-message=response timeout \
             x-palisade-error=response timeout"
                .to_owned(),
        ]
    );
}

#[test]
fn a_tunnel_without_a_response_is_overdue_too() {
    let mut link = Link::new();
    let connect = headers(1, false, &[(":method", "CONNECT"), (":authority", "a.test:443")]);
    link.client(&connect).unwrap();
    let _ = link.server_gets();
    assert_eq!(link.answer_overdue(1_000), 1);
    assert_eq!(
        link.client_gets(),
        [
            format!("HEADERS 1 end :status=504 {ANSWER}"),
            "RST_STREAM 1 0".to_owned()
        ]
    );
    assert_eq!(link.server_gets(), ["RST_STREAM 1 8"]);
    // What the client has sent meanwhile is dropped.
    link.client(&data(1, 10, false)).unwrap();
    assert_eq!(link.server_gets(), [""; 0]);
    assert_eq!(link.client_gets(), ["WINDOW_UPDATE 0 10"]);

    let connect = headers(3, false, &[(":method", "CONNECT"), (":authority", "a.test:443")]);
    link.client(&connect).unwrap();
    link.server(&headers(3, false, &[(":status", "200")])).unwrap();
    assert_eq!(link.answer_overdue(u64::MAX), 0);
}

#[test]
fn late_frames_do_not_reach_the_client_and_its_decoder_follows_later_responses() {
    let mut link = Link::new();
    let mut decoder = Decoder::lenient();
    link.client(&[get(1, "/public/a"), get(3, "/public/b"), get(5, "/public/c")].concat())
        .unwrap();
    link.server(&indexed(3, false, "first")).unwrap();
    let mut fields_of = |bytes: &[u8]| {
        let mut frames = palisade_protocols::http2::Frames::new(1 << 16);
        let mut input = bytes;
        let mut all = Vec::new();
        while let Some(piece) = frames.next(&mut input).unwrap() {
            let palisade_protocols::http2::Piece::Frame(header, payload) = piece else {
                continue;
            };
            let mut fields = Fields::default();
            let (_, fragment) = fragment_of(header, payload).unwrap();
            decoder.decode(fragment, 1 << 16, &mut fields).unwrap();
            let text = fields
                .value(b"x-id")
                .map(|v| String::from_utf8_lossy(v).into_owned());
            all.push((header.stream, text));
        }
        all
    };
    let taken = std::mem::take(&mut link.out.to_client);
    assert_eq!(fields_of(&taken), [(3, Some("first".to_owned()))]);
    // Stream 3 has its head.
    link.now += 1;
    link.client(&get(7, "/public/d")).unwrap();
    assert_eq!(link.answer_overdue(1_000), 2);
    let taken = std::mem::take(&mut link.out.to_client);
    assert_eq!(fields_of(&taken), [(1, None), (5, None)]);
    let _ = link.server_gets();
    // The server has answered before it got the reset. Its next block refers to the late one.
    let late = [
        indexed(1, false, "late"),
        data(1, 16_384, false),
        data(1, 10, true),
    ]
    .concat();
    link.server(&late).unwrap();
    assert_eq!(link.out.to_client, []);
    assert_eq!(link.server_gets(), ["WINDOW_UPDATE 0 16384"]);
    link.server(&newest(7, true)).unwrap();
    let taken = std::mem::take(&mut link.out.to_client);
    assert_eq!(fields_of(&taken), [(7, Some("late".to_owned()))]);
    link.server(&[reset(5, ErrorCode::NoError), window(5, 10)].concat())
        .unwrap();
    assert_eq!(link.out.to_client, []);
    link.server(&data(3, 5, true)).unwrap();
    assert_eq!(link.client_gets(), ["DATA 3 end 5"]);
    assert_eq!((link.filter.streams(), link.filter.held()), (0, 0));
}

#[test]
fn late_content_and_waits_are_bounded() {
    let limits = Http2Limits::default();
    let mut link = Link::with(&limits);
    for round in 0..2_000_u32 {
        let id = round * 2 + 1;
        link.now += 1;
        link.client(&get(id, "/public/a")).unwrap();
        if round % 2 == 0 {
            assert_eq!(link.answer_overdue(link.now), 1);
        } else {
            link.server(&headers(id, true, &[(":status", "200")])).unwrap();
        }
        link.out = Output::default();
    }
    assert_eq!((link.filter.streams(), link.filter.held()), (0, 0));
    // The server gets its window back, but not without end.
    link.client(&get(4_001, "/public/a")).unwrap();
    assert_eq!(link.answer_overdue(u64::MAX), 1);
    let mut sent = 0_u64;
    while link.server(&data(4_001, 16_384, false)).is_ok() {
        sent += 16_384;
        assert!(sent <= 32 << 20);
    }
    assert_eq!(sent, 16 << 20);
}

#[test]
fn a_server_that_stalls_within_content_delays_no_other_answer() {
    let mut link = Link::new();
    let post = request(5, false, "POST", "/public/a", &[]);
    link.client(&[get(1, "/public/a"), get(3, "/public/b"), post].concat())
        .unwrap();
    let response = [headers(1, false, &[(":status", "200")]), data(1, 10_000, true)].concat();
    let (begin, end) = response.split_at(response.len() - 9_989);
    link.server(begin).unwrap();
    let _ = link.server_gets();
    assert_eq!(link.client_gets(), ["HEADERS 1 :status=200", "DATA 1 11"]);
    assert_eq!(link.filter.waits_since(), Some(1_000));
    assert_eq!(link.answer_overdue(1_000), 1);
    assert_eq!(
        link.client_gets(),
        [format!("HEADERS 3 end :status=504 {ANSWER}")]
    );
    // The client stalls within its content too.
    let content = data(5, 100, true);
    link.client(&content[..29]).unwrap();
    assert_eq!(link.server_gets(), ["RST_STREAM 3 8", "DATA 5 20"]);
    assert_eq!((link.filter.streams(), link.filter.waits_since()), (2, None));
    // The wait for the response begins with the end of the request.
    link.now += 500;
    link.client(&content[29..]).unwrap();
    assert_eq!(link.server_gets(), ["DATA 5 end 80"]);
    assert_eq!(link.filter.waits_since(), Some(1_500));
    link.server(end).unwrap();
    assert_eq!(link.client_gets(), ["DATA 1 end 9989"]);
    assert_eq!((link.filter.streams(), link.filter.held()), (1, 0));
}

#[test]
fn the_parts_of_a_frame_charge_the_windows_with_its_length() {
    let mut link = Link::new();
    link.client(&request(1, false, "POST", "/public/a", &[])).unwrap();
    let _ = link.server_gets();
    let padded = |content: usize, pad: u8| {
        let payload = [vec![pad], vec![b'd'; content], vec![0; pad.into()]].concat();
        frame(kind::DATA, flags::END_STREAM | flags::PADDED, 1, &payload)
    };
    let bytes = padded(10, 5);
    for part in [&bytes[..14], &bytes[14..18], &bytes[18..22], &bytes[22..]] {
        link.client(part).unwrap();
    }
    assert_eq!(
        link.server_gets(),
        ["DATA 1 padding 5 9", "DATA 1 4", "DATA 1 end 2"]
    );
    // Padding only.
    link.server(&[headers(1, false, &[(":status", "200")]), padded(0, 9)].concat())
        .unwrap();
    assert_eq!(
        link.client_gets(),
        ["HEADERS 1 :status=200", "DATA 1 end padding 9 9"]
    );
    assert_eq!((link.filter.streams(), link.filter.held()), (0, 0));
}

#[test]
fn the_rest_of_a_frame_is_dropped_when_its_stream_is_reset() {
    let connect = headers(1, false, &[(":method", "CONNECT"), (":authority", "a.test:443")]);
    let mut link = Link::new();
    link.client(&connect).unwrap();
    link.client(&data(1, 100, false)[..59]).unwrap();
    let _ = link.server_gets();
    assert_eq!(link.answer_overdue(1_000), 1);
    assert_eq!(link.server_gets(), ["RST_STREAM 1 8"]);
    assert_eq!(
        link.client_gets(),
        [
            &*format!("HEADERS 1 end :status=504 {ANSWER}"),
            "RST_STREAM 1 0",
            "WINDOW_UPDATE 0 50"
        ]
    );
    link.client(&[b'd'; 50]).unwrap();
    assert_eq!((link.server_gets(), link.client_gets()), (vec![], vec![]));

    // A tunnel that the policy ends while both peers are within a frame.
    let mut link = Link::new();
    link.client(&connect).unwrap();
    link.server(&headers(1, false, &[(":status", "200")])).unwrap();
    link.client(&data(1, 100, false)[..59]).unwrap();
    link.server(&data(1, 100, false)[..39]).unwrap();
    let _ = (link.server_gets(), link.client_gets());
    link.stream.request.ruleset += 1;
    link.recheck();
    assert_eq!(link.server_gets(), ["RST_STREAM 1 8", "WINDOW_UPDATE 0 70"]);
    assert_eq!(link.client_gets(), ["RST_STREAM 1 8", "WINDOW_UPDATE 0 50"]);
    link.client(&[b'd'; 50]).unwrap();
    link.server(&[b'd'; 70]).unwrap();
    assert_eq!((link.server_gets(), link.client_gets()), (vec![], vec![]));
}

#[test]
fn a_server_that_is_left_learns_of_each_stream_and_another_one_can_take_its_place() {
    let response = headers(1, false, &[(":status", "200")]);
    let incomplete = [
        data(1, 100, false)[..40].to_vec(),
        frame(kind::HEADERS, 0, 3, &block(&[(":status", "200")])),
        response[..4].to_vec(),
        data(1, 100, false)[..9].to_vec(),
        Vec::new(),
    ];
    for incomplete in incomplete {
        let mut link = Link::new();
        link.client(&[get(1, "/public/a"), get(3, "/public/b"), get(5, "/secret")].concat())
            .unwrap();
        link.server(&response).unwrap();
        link.server(&incomplete).unwrap();
        let _ = (link.server_gets(), link.client_gets());
        let unanswered: Vec<_> = link.filter.unanswered().iter().map(|stream| stream.id).collect();
        assert_eq!(unanswered, [3]);
        link.filter.leave_server(&mut link.out);
        assert_eq!(
            link.server_gets(),
            ["RST_STREAM 1 8", "RST_STREAM 3 8", "GOAWAY 0 0"]
        );
        let answer = [settings(&[]), headers(3, true, &[(":status", "504")])].concat();
        link.server(&answer).unwrap();
        assert_eq!(link.client_gets()[1..], ["HEADERS 3 end :status=504"]);
        assert_eq!((link.filter.streams(), link.filter.held()), (1, 0));
    }
}
