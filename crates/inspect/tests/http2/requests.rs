//! Verdicts on requests, the responses to denied ones, and records.

use palisade_abi::Reason;
use palisade_inspect::http2::{ConnectionEnd, Http2Limits};
use palisade_model::{
    rule::{HeaderMatch, HttpRule, MismatchAction},
    snapshot::Matcher,
};
use palisade_protocols::http2::{ErrorCode, flags, kind, setting};

use crate::link::*;

const RESPONSE: &str = "content-type=text/plain content-length";

#[test]
fn an_allowed_request_and_its_response_pass() {
    let mut link = Link::new();
    link.client(&get(1, "/public/a?token=x")).unwrap();
    assert_eq!(
        link.server_gets(),
        ["HEADERS 1 end :method=GET :scheme=https :path=/public/a?token=x :authority=a.test"]
    );
    link.now += 7;
    let response = headers(1, false, &[(":status", "200"), ("content-length", "5")]);
    link.server(&[response, data(1, 5, true)].concat()).unwrap();
    assert_eq!(
        link.client_gets(),
        ["HEADERS 1 :status=200 content-length=5", "DATA 1 end 5"]
    );
    assert_eq!(
        link.records(),
        [
            "Forwarded Allowed 100 request 2 GET https://a.test/public/a?token=[redacted]",
            "Forwarded Allowed 9 response 2 200 GET https://a.test/public/a?token=[redacted] Some(5) 7ms",
        ]
    );
    assert_eq!((link.stats.requests, link.stats.responses), (1, 1));
    assert_eq!((link.filter.streams(), link.filter.held()), (0, 0));
}

#[test]
fn a_denied_request_gets_403_and_the_server_sees_nothing() {
    let mut link = Link::new();
    link.client(&get(1, "/secret")).unwrap();
    // Without a window that the server does not know, there is no content.
    assert_eq!(
        link.client_gets(),
        [format!("HEADERS 1 end :status=403 {RESPONSE}=0")]
    );
    link.client(&window(0, 5_000)).unwrap();
    assert_eq!(link.server_gets(), ["WINDOW_UPDATE 0 3976"]);
    link.client(&get(3, "/secret")).unwrap();
    assert_eq!(
        link.client_gets(),
        [
            format!("HEADERS 3 :status=403 {RESPONSE}=15"),
            "DATA 3 end 15".into()
        ]
    );
    link.client(&request(5, true, "HEAD", "/secret", &[])).unwrap();
    assert_eq!(
        link.client_gets(),
        [format!("HEADERS 5 end :status=403 {RESPONSE}=15")]
    );
    // The client returns the window of the content, and the reserve takes it.
    link.client(&window(0, 15)).unwrap();
    assert_eq!(link.server_gets(), [""; 0]);
    link.client(&window(0, 15)).unwrap();
    assert_eq!(link.server_gets(), ["WINDOW_UPDATE 0 15"]);
    let records = link.records();
    assert_eq!(
        records[0],
        "Dropped AppDenied 9 request 2 GET https://a.test/secret"
    );
    assert_eq!((records.len(), link.stats.denied), (3, 3));
    assert_eq!(link.filter.streams(), 0);
}

#[test]
fn no_form_of_a_request_bypasses_the_rules() {
    for path in [
        "/public/../secret",
        "/public/%2e%2e/secret",
        "/public/..;/secret",
        "/public\\..\\secret",
        "//public/a",
    ] {
        let mut link = Link::new();
        link.client(&get(1, path)).unwrap();
        assert_eq!(link.server_gets(), [""; 0], "{path}");
        assert!(link.client_gets()[0].contains(":status=403"), "{path}");
    }
    // Rules on header fields, also by the names of pseudo-header fields.
    let with = |name: &str, value: &str| {
        Matcher::Http(HttpRule {
            headers: vec![(name.into(), Some(value.into()))],
            ..HttpRule::default()
        })
    };
    for (name, value, allowed, denied) in [
        (":authority", "a.test", vec![], vec![(":authority", "b.test")]),
        ("host", "a.test", vec![], vec![(":authority", "b.test")]),
        (
            "x-role",
            "user",
            vec![("x-role", "user")],
            vec![("x-role", "user"), ("x-role", "admin")],
        ),
        (
            "x-role",
            "user",
            vec![("x-role", "user")],
            vec![("x-role", "user"), ("x_role", "admin")],
        ),
        (
            "cookie",
            "a=1; b=2",
            vec![("cookie", "a=1"), ("cookie", "b=2")],
            vec![("cookie", "a=1")],
        ),
    ] {
        for (more, passes) in [(allowed, true), (denied, false)] {
            let mut link = Link::new();
            link.rules = prepare(vec![with(name, value)]);
            let mut fields = vec![(":method", "GET"), (":scheme", "https"), (":path", "/")];
            if !more.iter().any(|(name, _)| *name == ":authority") {
                fields.push((":authority", "a.test"));
            }
            fields.extend(&more);
            link.client(&headers(1, true, &fields)).unwrap();
            assert_eq!(link.server_gets().len(), usize::from(passes), "{name} {more:?}");
        }
    }
}

#[test]
fn the_changes_of_a_rule_are_made_in_the_forwarded_request() {
    let change = |name: &str, value: &str, mismatch| HeaderMatch {
        name: name.into(),
        value: Some(value.into()),
        secret: None,
        mismatch,
    };
    let mut link = Link::new();
    link.rules = prepare(vec![Matcher::Http(HttpRule {
        header_matches: vec![
            change("X-Add", "added", MismatchAction::Add),
            change("x-gone", "", MismatchAction::Delete),
            change("x-set", "set", MismatchAction::Replace),
        ],
        ..HttpRule::default()
    })]);
    let fields = [
        ("x-add", "1"),
        ("x-gone", "2"),
        ("x-set", "3"),
        ("x-set", "4"),
        ("x-kept", "5"),
    ];
    link.client(&request(1, true, "GET", "/a", &fields)).unwrap();
    assert_eq!(
        link.server_gets(),
        [
            "HEADERS 1 end :method=GET :scheme=https :path=/a :authority=a.test x-add=1 x-kept=5 !x-add=added !x-set=set"
        ]
    );
}

#[test]
fn trailers_do_not_repeat_a_header_that_a_rule_changes() {
    for (name, passes) in [("x-sum", true), ("x-tenant", false), ("x_tenant", false)] {
        let mut link = Link::new();
        link.rules = prepare(vec![Matcher::Http(HttpRule {
            header_matches: vec![HeaderMatch {
                name: "X-Tenant".into(),
                value: Some("a".into()),
                secret: None,
                mismatch: MismatchAction::Replace,
            }],
            ..HttpRule::default()
        })]);
        link.client(&request(1, false, "POST", "/a", &[])).unwrap();
        link.client(&headers(1, true, &[(name, "b")])).unwrap();
        let last = if passes {
            format!("HEADERS 1 end {name}=b")
        } else {
            "RST_STREAM 1 1".to_owned()
        };
        assert_eq!(link.server_gets().last(), Some(&last), "{name}");
    }
}

#[test]
fn a_denied_grpc_call_gets_trailers_only() {
    let mut link = Link::new();
    let grpc = [("content-type", "application/grpc+proto"), ("te", "trailers")];
    link.client(&request(1, false, "POST", "/pkg.Service/Method", &grpc))
        .unwrap();
    assert_eq!(
        link.client_gets(),
        ["HEADERS 1 end :status=200 content-type=application/grpc grpc-status=7 grpc-message=Access denied",]
    );
    assert_eq!(link.server_gets(), [""; 0]);
}

#[test]
fn the_status_of_a_grpc_call_is_recorded() {
    let mut link = Link::new();
    let grpc = [("content-type", "application/grpc")];
    link.client(&request(1, false, "POST", "/public/M", &grpc))
        .unwrap();
    link.client(&data(1, 9, true)).unwrap();
    link.server(&headers(1, false, &[(":status", "200")])).unwrap();
    link.server(&data(1, 9, false)).unwrap();
    assert_eq!(link.records().len(), 1);
    link.server(&headers(1, true, &[("grpc-status", "14")])).unwrap();
    assert_eq!(
        link.records(),
        ["Forwarded Allowed 9 response 2 200 POST https://a.test/public/M None grpc-status: 14; 0ms"]
    );
    assert_eq!(link.filter.streams(), 0);
    // A call that the client cancels is recorded without a status of gRPC.
    link.client(&request(3, false, "POST", "/public/M", &grpc))
        .unwrap();
    link.server(&headers(3, false, &[(":status", "200")])).unwrap();
    link.client(&reset(3, ErrorCode::Cancel)).unwrap();
    assert!(link.records()[1].contains("response 2 200 POST"));
}

#[test]
fn the_content_of_a_denied_upload_is_dropped_and_its_window_returned() {
    let mut link = Link::new();
    link.client(&get(1, "/public/a")).unwrap();
    link.client(&request(3, false, "POST", "/secret", &[])).unwrap();
    assert_eq!(link.server_gets().len(), 1);
    assert_eq!(
        link.client_gets(),
        [format!("HEADERS 3 end :status=403 {RESPONSE}=0")]
    );
    // The rest of the request: content, a priority, a window update, and trailers.
    let padded = frame(kind::DATA, flags::PADDED, 3, &[4, b'd', 0, 0, 0, 0]);
    link.client(&[data(3, 10_000, false), padded].concat()).unwrap();
    link.client(&window(3, 10)).unwrap();
    link.client(&frame(kind::PRIORITY, 0, 3, &[0, 0, 0, 0, 1]))
        .unwrap();
    link.client(&headers(3, true, &[("x", "y")])).unwrap();
    assert_eq!(link.server_gets(), [""; 0]);
    assert_eq!(
        link.client_gets(),
        [
            "WINDOW_UPDATE 0 10000",
            "WINDOW_UPDATE 3 10000",
            "WINDOW_UPDATE 0 6",
            "WINDOW_UPDATE 3 6"
        ]
    );
    // The client has ended the stream.
    link.client(&data(3, 1, true)).unwrap();
    assert_eq!(link.client_gets(), ["WINDOW_UPDATE 0 1", "RST_STREAM 3 5"]);
    // The last frame of a request needs no window of its stream.
    link.client(&request(5, false, "POST", "/secret", &[])).unwrap();
    link.client_gets();
    link.client(&data(5, 10, true)).unwrap();
    assert_eq!(link.client_gets(), ["WINDOW_UPDATE 0 10"]);
    // A client that resets the stream sends nothing more.
    link.client(&request(7, false, "POST", "/secret", &[])).unwrap();
    link.client(&reset(7, ErrorCode::Cancel)).unwrap();
    link.client_gets();
    link.client(&data(7, 1, false)).unwrap();
    assert_eq!(link.client_gets(), ["WINDOW_UPDATE 0 1", "RST_STREAM 7 5"]);
    assert_eq!(link.server_gets(), [""; 0]);
}

#[test]
fn an_endless_denied_upload_is_reset() {
    let mut link = Link::new();
    link.client(&request(1, false, "POST", "/secret", &[])).unwrap();
    link.client_gets();
    let part = data(1, 16_384, false);
    for n in 1..5_000 {
        link.client(&part).unwrap();
        let lines = link.client_gets();
        if n < 4_096 {
            assert_eq!(lines, ["WINDOW_UPDATE 0 16384", "WINDOW_UPDATE 1 16384"]);
        } else if n == 4_096 {
            assert_eq!(lines, ["WINDOW_UPDATE 0 16384", "RST_STREAM 1 0"]);
        } else {
            assert_eq!(lines, ["WINDOW_UPDATE 0 16384"]);
        }
    }
    // Many uploads at the same time: those beyond the limit of streams are reset at once.
    let mut link = Link::new();
    for n in 0..300 {
        link.client(&request(2 * n + 1, false, "POST", "/secret", &[]))
            .unwrap();
    }
    let resets = link
        .client_gets()
        .iter()
        .filter(|line| line.starts_with("RST"))
        .count();
    assert_eq!(resets, 300 - 256);
    assert_eq!(link.out.to_server, []);
}

#[test]
fn a_denied_stream_does_not_touch_the_others() {
    let mut link = Link::new();
    link.client(&request(1, false, "POST", "/public/up", &[]))
        .unwrap();
    // The block of the denied request adds an entry to the client's table, to which the next request refers.
    let mut denied = block(&[
        (":method", "GET"),
        (":scheme", "https"),
        (":path", "/secret"),
        (":authority", "a.test"),
    ]);
    denied.extend([0x40, 3, b'x', b'-', b'a', 1, b'1']);
    link.client(&frame(
        kind::HEADERS,
        flags::END_STREAM | flags::END_HEADERS,
        3,
        &denied,
    ))
    .unwrap();
    let mut allowed = block(&[
        (":method", "GET"),
        (":scheme", "https"),
        (":path", "/public/b"),
        (":authority", "a.test"),
    ]);
    allowed.push(0xbe);
    link.client(&frame(
        kind::HEADERS,
        flags::END_STREAM | flags::END_HEADERS,
        5,
        &allowed,
    ))
    .unwrap();
    link.client(&data(1, 10, true)).unwrap();
    assert_eq!(
        link.server_gets(),
        [
            "HEADERS 1 :method=POST :scheme=https :path=/public/up :authority=a.test",
            "HEADERS 5 end :method=GET :scheme=https :path=/public/b :authority=a.test x-a=1",
            "DATA 1 end 10",
        ]
    );
    link.server(&headers(5, true, &[(":status", "204")])).unwrap();
    link.server(&headers(1, true, &[(":status", "201")])).unwrap();
    assert_eq!(
        link.client_gets(),
        [
            &*format!("HEADERS 3 end :status=403 {RESPONSE}=0"),
            "HEADERS 5 end :status=204",
            "HEADERS 1 end :status=201",
        ]
    );
}

#[test]
fn a_response_is_sent_while_the_server_is_within_a_frame() {
    let mut link = Link::new();
    link.client(&get(1, "/public/a")).unwrap();
    let response = [headers(1, false, &[(":status", "200")]), data(1, 100, true)].concat();
    let (begin, rest) = response.split_at(response.len() - 60);
    link.server(begin).unwrap();
    link.client(&get(3, "/secret")).unwrap();
    assert_eq!(link.filter.held(), 0);
    link.server(rest).unwrap();
    let refusal = format!("HEADERS 3 end :status=403 {RESPONSE}=0");
    assert_eq!(
        link.client_gets(),
        ["HEADERS 1 :status=200", "DATA 1 40", &*refusal, "DATA 1 end 60"]
    );
    // Between HEADERS and CONTINUATION of the server.
    link.client(&get(5, "/public/a")).unwrap();
    let block = block(&[(":status", "200"), ("a", "b")]);
    link.server(&frame(kind::HEADERS, flags::END_STREAM, 5, &block[..2]))
        .unwrap();
    link.client(&get(7, "/secret")).unwrap();
    link.server(&frame(kind::CONTINUATION, flags::END_HEADERS, 5, &block[2..]))
        .unwrap();
    let refusal = format!("HEADERS 7 end :status=403 {RESPONSE}=0");
    assert_eq!(link.client_gets(), [&*refusal, "HEADERS 5 end :status=200 a=b"]);
}

#[test]
fn a_verdict_waits_for_the_end_of_the_header_block() {
    let mut link = Link::new();
    let fields = block(&[
        (":method", "GET"),
        (":scheme", "https"),
        (":path", "/public/a"),
        (":authority", "a.test"),
    ]);
    link.client(&frame(kind::HEADERS, flags::END_STREAM, 1, &fields[..3]))
        .unwrap();
    link.client(&frame(kind::CONTINUATION, 0, 1, &fields[3..5]))
        .unwrap();
    assert_eq!(link.out.to_server, []);
    assert_eq!(link.records.len(), 0);
    link.client(&frame(kind::CONTINUATION, flags::END_HEADERS, 1, &fields[5..]))
        .unwrap();
    assert_eq!(
        link.server_gets(),
        ["HEADERS 1 end :method=GET :scheme=https :path=/public/a :authority=a.test"]
    );
}

#[test]
fn padding_and_priority_of_a_request_are_read() {
    let mut link = Link::new();
    let mut payload = vec![3, 0x80, 0, 0, 0, 15];
    payload.extend(block(&[
        (":method", "GET"),
        (":scheme", "https"),
        (":path", "/public/a"),
        (":authority", "a.test"),
    ]));
    payload.extend([0; 3]);
    let all = flags::PADDED | flags::PRIORITY | flags::END_STREAM | flags::END_HEADERS;
    link.client(&frame(kind::HEADERS, all, 1, &payload)).unwrap();
    link.client(&frame(kind::PRIORITY, 0, 1, &[0, 0, 0, 0, 9]))
        .unwrap();
    link.client(&frame(kind::PRIORITY, 0, 9, &[0, 0, 0, 0, 9]))
        .unwrap();
    assert_eq!(
        link.server_gets(),
        [
            "HEADERS 1 end [128, 0, 0, 0, 15] :method=GET :scheme=https :path=/public/a :authority=a.test",
            "PRIORITY 1 [0, 0, 0, 0, 9]",
        ]
    );
}

#[test]
fn sensitive_fields_stay_sensitive() {
    let mut link = Link::new();
    let mut fields = block(&[
        (":method", "GET"),
        (":scheme", "https"),
        (":path", "/public/a"),
        (":authority", "a.test"),
    ]);
    fields.extend([0x1f, 8, 1, b'k']);
    link.client(&frame(
        kind::HEADERS,
        flags::END_STREAM | flags::END_HEADERS,
        1,
        &fields,
    ))
    .unwrap();
    assert!(link.server_gets()[0].ends_with(" !authorization=k"));
}

#[test]
fn trailers_and_interim_responses_pass() {
    let mut link = Link::new();
    link.client(&request(
        1,
        false,
        "POST",
        "/public/a",
        &[("expect", "100-continue")],
    ))
    .unwrap();
    link.server(&headers(1, false, &[(":status", "100")])).unwrap();
    link.client(&data(1, 5, false)).unwrap();
    link.client(&headers(1, true, &[("x-sum", "1")])).unwrap();
    link.server(&headers(1, false, &[(":status", "200")])).unwrap();
    link.server(&headers(1, true, &[("x-end", "1")])).unwrap();
    assert_eq!(link.server_gets()[1..], ["DATA 1 5", "HEADERS 1 end x-sum=1"]);
    assert_eq!(
        link.client_gets(),
        [
            "HEADERS 1 :status=100",
            "HEADERS 1 :status=200",
            "HEADERS 1 end x-end=1"
        ]
    );
    assert_eq!((link.stats.responses, link.filter.streams()), (1, 0));
}

#[test]
fn malformed_trailers_reset_the_stream_at_both_peers() {
    for (end, fields) in [
        (true, vec![(":path", "/secret")]),
        (true, vec![("content-length", "5")]),
        (true, vec![("host", "b.test")]),
        (true, vec![("X", "y")]),
        (true, vec![("transfer-encoding", "chunked")]),
        (false, vec![("x", "y")]),
    ] {
        let mut link = Link::new();
        link.client(&request(1, false, "POST", "/public/a", &[])).unwrap();
        link.server_gets();
        link.client(&headers(1, end, &fields)).unwrap();
        assert_eq!(link.server_gets(), ["RST_STREAM 1 1"], "{fields:?}");
        assert_eq!(link.client_gets(), ["RST_STREAM 1 1"], "{fields:?}");
        assert_eq!(link.filter.streams(), 0);
    }
}

#[test]
fn content_must_have_the_announced_length() {
    let length = [("content-length", "10")];
    for (frames, passes) in [
        (vec![data(1, 4, false), data(1, 6, true)], true),
        (vec![data(1, 10, false), headers(1, true, &[("x", "y")])], true),
        (vec![data(1, 11, false)], false),
        (vec![data(1, 4, true)], false),
        (vec![data(1, 10, false), data(1, 1, true)], false),
        (vec![headers(1, true, &[("x", "y")])], false),
        // Padding does not count.
        (
            vec![frame(kind::DATA, flags::PADDED | flags::END_STREAM, 1, &[2; 13])],
            true,
        ),
        (
            vec![frame(kind::DATA, flags::PADDED | flags::END_STREAM, 1, &[3; 13])],
            false,
        ),
    ] {
        let mut link = Link::new();
        link.client(&request(1, false, "POST", "/public/a", &length))
            .unwrap();
        link.client(&frames.concat()).unwrap();
        let was_reset = link.server_gets().contains(&"RST_STREAM 1 1".to_owned());
        assert_eq!(was_reset, !passes, "{frames:?}");
        assert_eq!(link.client_gets().contains(&"RST_STREAM 1 1".to_owned()), !passes);
    }
}

#[test]
fn unexpected_bodies_are_refused_as_in_http1() {
    let mut link = Link::new();
    link.client(&request(1, false, "GET", "/public/a", &[])).unwrap();
    link.client(&request(3, false, "GET", "/public/a", &[("content-length", "5")]))
        .unwrap();
    assert_eq!(link.server_gets(), [""; 0]);
    let refusal = |id| format!("HEADERS {id} end :status=400 {RESPONSE}=0");
    assert_eq!(link.client_gets(), [refusal(1), refusal(3)]);
}

#[test]
fn long_heads_get_the_status_of_http1() {
    let mut link = Link::new();
    let long = "a".repeat(17_000);
    link.client(&get(1, &format!("/public/{long}"))).unwrap();
    link.client(&request(3, true, "GET", "/public/a", &[("x", &long)]))
        .unwrap();
    let part = "b".repeat(9_000);
    let parts: Vec<(&str, &str)> = ["w", "x", "y", "z"]
        .into_iter()
        .map(|name| (name, &*part))
        .collect();
    link.client(&request(5, true, "GET", "/public/a", &parts))
        .unwrap();
    link.client(&get(7, "/public/a")).unwrap();
    assert_eq!(link.server_gets().len(), 1);
    let status: Vec<String> = link
        .client_gets()
        .iter()
        .map(|line| line[..26].to_owned())
        .collect();
    assert_eq!(
        status,
        [
            "HEADERS 1 end :status=414 ",
            "HEADERS 3 end :status=431 ",
            "HEADERS 5 end :status=431 "
        ]
    );
}

#[test]
fn connect_is_evaluated_as_a_method_and_becomes_a_tunnel() {
    let mut link = Link::new();
    let connect = [(":method", "CONNECT"), (":authority", "b.test:22")];
    link.client(&headers(1, false, &connect)).unwrap();
    link.server(&headers(1, false, &[(":status", "200")])).unwrap();
    link.client(&data(1, 100, false)).unwrap();
    link.server(&data(1, 100, false)).unwrap();
    assert_eq!(
        link.server_gets(),
        ["HEADERS 1 :method=CONNECT :authority=b.test:22", "DATA 1 100"]
    );
    assert_eq!(link.client_gets(), ["HEADERS 1 :status=200", "DATA 1 100"]);
    assert_eq!(link.stats.tunnels, 1);
    let extended = |protocol: &'static str| {
        [
            (":method", "CONNECT"),
            (":protocol", protocol),
            (":scheme", "https"),
            (":path", "/chat"),
            (":authority", "a.test"),
        ]
    };
    link.client(&headers(3, false, &extended("websocket"))).unwrap();
    assert!(link.server_gets()[0].contains(":protocol=websocket"));
    link.client(&headers(5, false, &extended("h2c"))).unwrap();
    assert_eq!(link.server_gets(), [""; 0]);
    assert_eq!(link.client_gets(), ["RST_STREAM 5 1"]);
    // A change of the rule set ends the tunnels, not other streams.
    link.client(&request(7, false, "POST", "/public/a", &[])).unwrap();
    link.server_gets();
    link.recheck();
    assert_eq!(link.server_gets(), [""; 0]);
    link.stream.request.ruleset = SET + 1;
    link.recheck();
    assert_eq!(link.server_gets(), ["RST_STREAM 1 8", "RST_STREAM 3 8"]);
    assert_eq!(link.client_gets(), ["RST_STREAM 1 8", "RST_STREAM 3 8"]);
    assert_eq!(link.filter.streams(), 1);
    // A request under a rule set that is not known is denied.
    link.client(&get(9, "/public/a")).unwrap();
    assert!(link.client_gets()[0].starts_with("HEADERS 9 end :status=403"));
    assert!(
        link.records()
            .last()
            .unwrap()
            .starts_with("Dropped UnknownRuleset")
    );
}

#[test]
fn a_tunnel_that_only_audit_mode_allows_ends_with_it() {
    let mut link = Link::new().audit();
    link.rules = prepare(vec![]);
    let connect = [(":method", "CONNECT"), (":authority", "b.test:22")];
    link.client(&headers(1, false, &connect)).unwrap();
    link.recheck();
    assert_eq!(link.filter.streams(), 1);
    link.stream.request.flags = 0;
    link.recheck();
    assert_eq!(link.filter.streams(), 0);
    assert_eq!(link.client_gets(), ["RST_STREAM 1 8"]);
}

#[test]
fn audit_mode_forwards_and_reports() {
    let mut link = Link::new().audit();
    link.client(&get(1, "/secret")).unwrap();
    link.client(&request(3, false, "GET", "/public/a", &[])).unwrap();
    link.client(&request(5, true, "GET", "/public/a", &[("X-Upper", "1")]))
        .unwrap();
    assert_eq!(link.server_gets().len(), 3);
    assert_eq!(link.client_gets(), [""; 0]);
    assert_eq!(
        link.records(),
        [
            "Audit AppDenied 9 request 2 GET https://a.test/secret",
            "Forwarded Allowed 100 request 2 GET https://a.test/public/a",
            "Audit AppMalformed 9 unreadable body of a method without a body",
            "Audit AppMalformed 9 unreadable malformed field name",
        ]
    );
    assert_eq!(link.stats.audited, 3);
}

#[test]
fn a_malformed_request_resets_its_stream_only() {
    let mut link = Link::new();
    link.client(&request(1, true, "GET", "/public/a", &[("X-Upper", "1")]))
        .unwrap();
    link.client(&get(3, "/public/a")).unwrap();
    assert_eq!(link.client_gets(), ["RST_STREAM 1 1"]);
    assert_eq!(link.server_gets().len(), 1);
    assert_eq!(
        link.records()[0],
        "Dropped AppMalformed 9 unreadable malformed field name"
    );
}

#[test]
fn streams_beyond_the_limit_are_refused_and_can_be_retried() {
    let limits = Http2Limits {
        streams: 2,
        ..Http2Limits::default()
    };
    let mut link = Link::with(&limits);
    for id in [1, 3, 5] {
        link.client(&request(id, false, "POST", "/public/a", &[]))
            .unwrap();
    }
    assert_eq!(link.server_gets().len(), 2);
    assert_eq!(link.client_gets(), ["RST_STREAM 5 7"]);
    link.server(&headers(1, true, &[(":status", "200")])).unwrap();
    link.client(&data(1, 0, true)).unwrap();
    link.client(&request(7, false, "POST", "/public/a", &[])).unwrap();
    assert_eq!(link.server_gets().len(), 2);
}

#[test]
fn the_server_ends_a_stream_before_the_upload_is_complete() {
    let mut link = Link::new();
    link.client(&request(1, false, "POST", "/public/a", &[])).unwrap();
    link.server(
        &[
            headers(1, true, &[(":status", "413")]),
            reset(1, ErrorCode::NoError),
        ]
        .concat(),
    )
    .unwrap();
    assert_eq!(
        link.client_gets(),
        ["HEADERS 1 end :status=413", "RST_STREAM 1 0"]
    );
    link.server_gets();
    // Content that was under way: the server does not expect it, and the client gets its window back.
    link.client(&data(1, 100, true)).unwrap();
    assert_eq!(link.server_gets(), [""; 0]);
    assert_eq!(link.client_gets(), ["WINDOW_UPDATE 0 100"]);
}

#[test]
fn frames_of_the_server_after_a_reset_of_the_client_reach_the_client() {
    let mut link = Link::new();
    link.client(&[get(1, "/public/a"), reset(1, ErrorCode::Cancel)].concat())
        .unwrap();
    // The client decodes the header block and counts the content.
    link.server(&[headers(1, false, &[(":status", "200")]), data(1, 9, true)].concat())
        .unwrap();
    assert_eq!(link.client_gets(), ["HEADERS 1 :status=200", "DATA 1 end 9"]);
}

#[test]
fn goaway_of_the_policy_reaches_both_peers_and_ends_the_connection() {
    let mut link = Link::new();
    link.client(&get(1, "/public/a")).unwrap();
    link.server_gets();
    let mut out = std::mem::take(&mut link.out);
    link.filter.goaway(Reason::AppDenied, &mut out);
    link.out = out;
    assert_eq!(link.client_gets(), ["GOAWAY 1 0"]);
    assert_eq!(link.server_gets(), ["GOAWAY 0 0"]);
    let end = Err(ConnectionEnd {
        reason: Reason::AppDenied,
        error: None,
    });
    assert_eq!(link.client(&get(3, "/public/a")), end);
    assert_eq!(link.server(&[]), end);
    assert_eq!(link.out.to_server, []);
}

#[test]
fn a_response_does_not_exceed_a_small_window_of_the_client() {
    let mut link = Link::new();
    link.client(&window(0, 5_000)).unwrap();
    link.client(&settings(&[(setting::INITIAL_WINDOW_SIZE, 14)]))
        .unwrap();
    link.client(&get(1, "/secret")).unwrap();
    assert_eq!(
        link.client_gets(),
        [format!("HEADERS 1 end :status=403 {RESPONSE}=0")]
    );
    link.client(&settings(&[(setting::INITIAL_WINDOW_SIZE, 15)]))
        .unwrap();
    link.client(&get(3, "/secret")).unwrap();
    assert_eq!(link.client_gets().len(), 1);
    link.server(&[settings_ack(), settings_ack()].concat()).unwrap();
    link.client_gets();
    link.client(&get(5, "/secret")).unwrap();
    assert_eq!(link.client_gets().len(), 2);
}
