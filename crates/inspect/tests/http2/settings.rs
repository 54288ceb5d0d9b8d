//! Settings as the other peer gets them, and the dynamic tables that they bound.

use palisade_inspect::http2::Http2Limits;
use palisade_protocols::http2::{PREFACE, flags, kind, setting};

use crate::link::*;

#[test]
fn settings_are_rewritten_to_what_the_filter_can_follow() {
    let limits = Http2Limits {
        streams: 50,
        ..Http2Limits::default()
    };
    let mut link = Link::fresh(&limits);
    let list = [
        (setting::HEADER_TABLE_SIZE, 65_536),
        (setting::ENABLE_PUSH, 1),
        (setting::MAX_CONCURRENT_STREAMS, 100),
        (setting::INITIAL_WINDOW_SIZE, 1 << 20),
        (setting::MAX_FRAME_SIZE, 1 << 20),
        (setting::MAX_HEADER_LIST_SIZE, 262_144),
        (setting::NO_RFC7540_PRIORITIES, 1),
        // An unknown setting.
        (0x4a4a, 7),
    ];
    link.client(&[PREFACE, &settings(&list)].concat()).unwrap();
    assert!(link.out.to_server.starts_with(PREFACE));
    link.out.to_server.drain(..PREFACE.len());
    assert_eq!(
        link.server_gets(),
        ["SETTINGS 1=4096 3=100 4=1048576 5=65536 6=262144 9=1 2=0"]
    );
    let list = [
        (setting::HEADER_TABLE_SIZE, 8_192),
        (setting::ENABLE_PUSH, 0),
        (setting::MAX_CONCURRENT_STREAMS, 128),
        (setting::MAX_HEADER_LIST_SIZE, 1 << 20),
        (setting::ENABLE_CONNECT_PROTOCOL, 1),
    ];
    link.server(&settings(&list)).unwrap();
    assert_eq!(link.client_gets(), ["SETTINGS 1=4096 3=50 6=32768 8=1"]);
    // A later frame is not completed.
    link.server(&settings(&[(setting::MAX_CONCURRENT_STREAMS, 10)]))
        .unwrap();
    assert_eq!(link.client_gets(), ["SETTINGS 3=10"]);
    link.client(&[settings_ack(), settings_ack()].concat()).unwrap();
    assert_eq!(link.server_gets(), ["SETTINGS ack", "SETTINGS ack"]);
    // Without limits of the server, the client gets those of the filter.
    let mut link = Link::fresh(&limits);
    link.server(&settings(&[])).unwrap();
    assert_eq!(link.client_gets(), ["SETTINGS 3=50 6=32768"]);
}

#[test]
fn frames_may_have_the_length_that_the_receiver_has_announced() {
    let mut link = Link::new();
    let long = data(1, 20_000, true);
    link.client(&request(1, false, "POST", "/public/a", &[])).unwrap();
    assert!(link.client(&long).is_err());
    let mut link = Link::new();
    link.server(&settings(&[(setting::MAX_FRAME_SIZE, 20_000)]))
        .unwrap();
    link.client(&request(1, false, "POST", "/public/a", &[])).unwrap();
    link.server_gets();
    link.client(&long).unwrap();
    assert_eq!(link.server_gets(), ["DATA 1 end 20000"]);
    // The server may send long frames only if the client permits them.
    assert!(
        link.server(&[headers(1, false, &[(":status", "200")]), long].concat())
            .is_err()
    );
}

fn get_with(tail: &[u8]) -> Vec<u8> {
    let fields = [
        (":method", "GET"),
        (":scheme", "https"),
        (":path", "/public/a"),
        (":authority", "a.test"),
    ];
    [&block(&fields)[..], tail].concat()
}

fn send(link: &mut Link, stream: u32, block: &[u8]) -> bool {
    let flags = flags::END_STREAM | flags::END_HEADERS;
    link.client(&frame(kind::HEADERS, flags, stream, block)).is_ok()
}

#[test]
fn the_server_gets_the_size_update_that_its_setting_requires() {
    let mut link = Link::new();
    link.server(&settings(&[(setting::HEADER_TABLE_SIZE, 0)]))
        .unwrap();
    // Before its acknowledgement the client uses the old table.
    assert!(send(&mut link, 1, &get_with(&[0x40, 1, b'x', 1, b'y'])));
    link.client(&settings_ack()).unwrap();
    link.server_gets();
    // The first block after the acknowledgement opens a denied stream: the server does not see its size update.
    let denied = [
        &[0x20][..],
        &block(&[
            (":method", "GET"),
            (":scheme", "https"),
            (":path", "/x"),
            (":authority", "a"),
        ]),
    ]
    .concat();
    assert!(send(&mut link, 3, &denied));
    assert!(send(&mut link, 5, &get_with(&[])));
    let lines = link.server_gets();
    assert!(
        lines[0].starts_with("HEADERS 5 end table 0..0 :method=GET"),
        "{lines:?}"
    );
    // Each size update is forwarded once.
    assert!(send(&mut link, 7, &get_with(&[])));
    assert!(link.server_gets()[0].starts_with("HEADERS 7 end :method=GET"));
    // A block that refers to the table of before, or that lacks the size update.
    assert!(!send(&mut link, 9, &get_with(&[0xbe])));
    let mut link = Link::new();
    link.server(&settings(&[(setting::HEADER_TABLE_SIZE, 0)]))
        .unwrap();
    link.client(&settings_ack()).unwrap();
    assert!(!send(&mut link, 1, &get_with(&[])));
    assert!(link.client_gets().contains(&"GOAWAY 0 9".to_owned()));
}

#[test]
fn a_table_that_one_frame_shrinks_and_grows_again_is_emptied() {
    let mut link = Link::new();
    let list = [
        (setting::HEADER_TABLE_SIZE, 0),
        (setting::HEADER_TABLE_SIZE, 4_096),
    ];
    link.server(&settings(&list)).unwrap();
    assert_eq!(link.client_gets(), ["SETTINGS 1=0 1=4096"]);
    link.client(&settings_ack()).unwrap();
    link.server_gets();
    assert!(send(
        &mut link,
        1,
        &[&[0x20, 0x3f, 0xe1, 0x1f], &get_with(&[])[..]].concat()
    ));
    assert!(link.server_gets()[0].starts_with("HEADERS 1 end table 0..4096 :method=GET"));
    let mut link = Link::new();
    link.server(&settings(&list)).unwrap();
    link.client(&settings_ack()).unwrap();
    assert!(!send(&mut link, 1, &get_with(&[])));
}

#[test]
fn a_response_of_the_filter_has_the_size_update_that_the_client_requires() {
    let mut link = Link::new();
    link.client(&settings(&[(setting::HEADER_TABLE_SIZE, 0)]))
        .unwrap();
    link.client(&get(1, "/secret")).unwrap();
    link.server(&settings_ack()).unwrap();
    link.client(&get(3, "/secret")).unwrap();
    let lines = link.client_gets();
    assert!(lines[0].starts_with("HEADERS 1 end :status"), "{lines:?}");
    assert!(
        lines[2].starts_with("HEADERS 3 end table 0..0 :status"),
        "{lines:?}"
    );
    // The server announces the size itself; from then on it is not required.
    link.client(&get(5, "/public/a")).unwrap();
    let block = [&[0x20][..], &block(&[(":status", "200")])].concat();
    let flags = flags::END_STREAM | flags::END_HEADERS;
    link.server(&frame(kind::HEADERS, flags, 5, &block)).unwrap();
    link.client(&get(7, "/secret")).unwrap();
    let lines = link.client_gets();
    assert!(
        lines[0].starts_with("HEADERS 5 end table 0..0 :status=200"),
        "{lines:?}"
    );
    assert!(lines[1].starts_with("HEADERS 7 end :status=403"), "{lines:?}");
}

#[test]
fn invalid_settings_end_the_connection() {
    for (list, of_server, code) in [
        (vec![(setting::ENABLE_PUSH, 2)], false, 1),
        (vec![(setting::ENABLE_PUSH, 1)], true, 1),
        (vec![(setting::INITIAL_WINDOW_SIZE, 1 << 31)], false, 3),
        (vec![(setting::MAX_FRAME_SIZE, 16_383)], false, 1),
        (vec![(setting::MAX_FRAME_SIZE, 1 << 24)], true, 1),
        (vec![(setting::ENABLE_CONNECT_PROTOCOL, 2)], true, 1),
    ] {
        let mut link = Link::new();
        let bytes = settings(&list);
        let result = if of_server {
            link.server(&bytes)
        } else {
            link.client(&bytes)
        };
        assert!(result.is_err(), "{list:?}");
        let lines = if of_server {
            link.server_gets()
        } else {
            link.client_gets()
        };
        assert_eq!(lines, [format!("GOAWAY 0 {code}")], "{list:?}");
    }
}
