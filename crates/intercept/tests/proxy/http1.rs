//! HTTP/1 requests through TLS on both sides.

use std::{
    io::{Read as _, Write as _},
    net::Shutdown,
    thread,
};

use palisade_inspect::record::{Verdict, What};
use palisade_model::{
    rule::{HeaderMatch, MismatchAction},
    snapshot::Matcher,
};

use crate::world::{
    NAME, World, field, get, http_rules, read_answer, read_head, read_to_end, send, serve_http,
};

#[test]
fn an_allowed_request_passes_and_a_denied_one_gets_403() {
    let world = World::new(http_rules(&["/public/.*"]));
    world.http_server();
    let mut client = world.client();
    let answer = get(&mut client, "/public/a");
    assert_eq!((answer.status, &*answer.body), (200, "GET /public/a 0"));
    let answer = get(&mut client, "/secret");
    assert_eq!((answer.status, &*answer.body), (403, "Access denied\r\n"));
    let (rest, end) = read_to_end(&mut client);
    assert!(
        rest.is_empty() && end.is_ok(),
        "the 403 ends the connection with close_notify: {end:?}"
    );
    let record = world.record("the denied request", |record| record.verdict == Verdict::Dropped);
    assert!(
        matches!(record.what, What::HttpRequest { url, .. } if url.bytes() == b"https://api.example.test/secret")
    );
    assert_eq!((record.endpoint, record.rule, record.ifindex), (9, 5, 3));
    let stats = world.proxy.stats();
    assert_eq!((stats.requests, stats.denied), (2, 1));
}

#[test]
fn many_requests_share_one_connection_on_both_sides() {
    let world = World::new(http_rules(&["/.*"]));
    world.http_server();
    let mut client = world.client();
    for number in 0..200 {
        let answer = get(&mut client, &format!("/{number}"));
        assert_eq!(answer.body, format!("GET /{number} 0"));
    }
    assert_eq!(world.proxy.stats().upstream_handshakes, 1);
}

#[test]
fn the_answer_to_a_denied_request_follows_the_responses_to_the_requests_before() {
    let world = World::new(http_rules(&["/a/.*"]));
    world.http_server();
    let mut client = world.client();
    let request = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: {NAME}\r\n\r\n");
    send(
        &mut client,
        [request("/a/1"), request("/a/2"), request("/b"), request("/a/3")].concat(),
    );
    let bodies: Vec<String> = (0..3).map(|_| read_answer(&mut client).body).collect();
    assert_eq!(bodies, ["GET /a/1 0", "GET /a/2 0", "Access denied\r\n"]);
    let (rest, end) = read_to_end(&mut client);
    assert!(rest.is_empty() && end.is_ok(), "{end:?}");
}

#[test]
fn a_head_in_single_bytes_is_read() {
    let world = World::new(http_rules(&["/.*"]));
    world.http_server();
    let mut client = world.client();
    for byte in format!("GET /slow HTTP/1.1\r\nHost: {NAME}\r\n\r\n").bytes() {
        send(&mut client, [byte]);
    }
    assert_eq!(read_answer(&mut client).body, "GET /slow 0");
}

#[test]
fn a_response_to_head_has_no_body() {
    let world = World::new(http_rules(&["/.*"]));
    world.http_server();
    let mut client = world.client();
    send(&mut client, format!("HEAD /a HTTP/1.1\r\nHost: {NAME}\r\n\r\n"));
    let head = read_head(&mut client).expect("a response");
    assert_eq!(field(&head, "content-length"), Some("9"));
    assert_eq!(get(&mut client, "/b").body, "GET /b 0");
}

#[test]
fn chunked_bodies_pass_with_their_trailers_in_both_directions() {
    let world = World::new(http_rules(&["/.*"]));
    world.tls_server(|stream| {
        let head = read_head(stream).expect("a request");
        assert!(head.contains("chunked"));
        let mut body = Vec::new();
        while !body.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("the body");
            body.push(byte[0]);
        }
        send(stream, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        send(stream, &body);
        assert_eq!(get_line(stream), "GET /next HTTP/1.1");
        send(stream, "HTTP/1.1 204 No Content\r\n\r\n");
    });
    let mut client = world.client();
    send(
        &mut client,
        format!("POST /a HTTP/1.1\r\nHost: {NAME}\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"),
    );
    send(&mut client, "3;x=y\r\nyou\r\n0\r\nT: v\r\n\r\n");
    read_head(&mut client).expect("a response");
    let expected = b"5\r\nhello\r\n3;x=y\r\nyou\r\n0\r\nT: v\r\n\r\n";
    let mut body = vec![0; expected.len()];
    client.read_exact(&mut body).expect("the body");
    assert_eq!(body, expected);
    send(&mut client, format!("GET /next HTTP/1.1\r\nHost: {NAME}\r\n\r\n"));
    assert!(
        read_head(&mut client)
            .expect("a response")
            .starts_with("HTTP/1.1 204")
    );
}

fn get_line(stream: &mut impl std::io::Read) -> String {
    let head = read_head(stream).expect("a request");
    head.lines().next().expect("a line").to_owned()
}

#[test]
fn an_announced_body_waits_for_100_continue() {
    let world = World::new(http_rules(&["/.*"]));
    world.tls_server(|stream| {
        read_head(stream).expect("a request");
        send(stream, "HTTP/1.1 100 Continue\r\n\r\n");
        let mut body = [0; 5];
        stream.read_exact(&mut body).expect("the body");
        assert_eq!(&body, b"hello");
        send(stream, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    });
    let mut client = world.client();
    send(
        &mut client,
        format!("POST / HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"),
    );
    assert!(
        read_head(&mut client)
            .expect("an interim response")
            .starts_with("HTTP/1.1 100")
    );
    send(&mut client, "hello");
    assert_eq!(read_answer(&mut client).body, "ok");
}

#[test]
fn bytes_after_an_upgrade_pass_in_both_directions() {
    let world = World::new(http_rules(&["/ws"]));
    world.tls_server(|stream| {
        read_head(stream).expect("a request");
        send(
            stream,
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x01first",
        );
        let mut frame = [0; 6];
        stream.read_exact(&mut frame).expect("a frame");
        send(stream, frame);
        let _ = stream.read(&mut frame);
    });
    let mut client = world.client();
    send(
        &mut client,
        format!("GET /ws HTTP/1.1\r\nHost: {NAME}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"),
    );
    assert!(
        read_head(&mut client)
            .expect("a response")
            .starts_with("HTTP/1.1 101")
    );
    let mut frame = [0; 6];
    client.read_exact(&mut frame).expect("the first frame");
    assert_eq!(&frame, b"\x01first");
    send(&mut client, "\x02again");
    client.read_exact(&mut frame).expect("the second frame");
    assert_eq!(&frame, b"\x02again");
}

/// Returns `length` bytes that repeat only after many records.
fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (at % 251) as u8 ^ (at >> 13) as u8)
        .collect()
}

#[test]
fn large_bodies_arrive_unchanged_in_both_directions() {
    const LENGTH: usize = 24 << 20;
    let world = World::new(http_rules(&["/.*"]));
    world.tls_server(|stream| {
        read_head(stream).expect("a request");
        let mut body = vec![0; LENGTH];
        stream.read_exact(&mut body).expect("the body");
        assert!(body == pattern(LENGTH), "the upload has changed");
        send(
            stream,
            format!("HTTP/1.1 200 OK\r\nContent-Length: {LENGTH}\r\n\r\n"),
        );
        send(stream, &body);
        let _ = stream.read(&mut [0]);
    });
    let mut client = world.client();
    send(
        &mut client,
        format!("PUT /a HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: {LENGTH}\r\n\r\n"),
    );
    send(&mut client, pattern(LENGTH));
    let answer = read_answer(&mut client);
    assert_eq!(answer.status, 200);
    let mut client = world.client();
    send(
        &mut client,
        format!("PUT /a HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: {LENGTH}\r\n\r\n"),
    );
    send(&mut client, pattern(LENGTH));
    let head = read_head(&mut client).expect("a response");
    assert!(head.starts_with("HTTP/1.1 200"));
    let mut body = vec![0; LENGTH];
    client.read_exact(&mut body).expect("the body");
    assert!(body == pattern(LENGTH), "the download has changed");
}

#[test]
fn a_half_closed_client_still_gets_its_response() {
    let world = World::new(http_rules(&["/.*"]));
    world.tls_server(|stream| {
        read_head(stream).expect("a request");
        let (rest, end) = read_to_end(stream);
        assert!(
            rest.is_empty() && end.is_ok(),
            "the client's close_notify arrives: {end:?}"
        );
        send(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nlate");
        stream.conn.send_close_notify();
        stream.flush().expect("the close_notify is sent");
    });
    let mut client = world.client();
    send(&mut client, format!("GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n"));
    client.conn.send_close_notify();
    client.flush().expect("the close_notify is sent");
    client.sock.shutdown(Shutdown::Write).expect("the FIN is sent");
    let (bytes, end) = read_to_end(&mut client);
    assert!(
        bytes.ends_with(b"\r\n\r\nlate"),
        "{:?}",
        String::from_utf8_lossy(&bytes)
    );
    assert!(end.is_ok(), "the server's close_notify arrives: {end:?}");
}

#[test]
fn a_truncated_response_stays_truncated() {
    let world = World::new(http_rules(&["/.*"]));
    world.tls_server(|stream| {
        read_head(stream).expect("a request");
        send(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf");
        // A FIN without close_notify, as an attacker on the path can send it.
        stream.sock.shutdown(Shutdown::Write).expect("the FIN is sent");
        let _ = stream.read(&mut [0]);
    });
    let mut client = world.client();
    send(&mut client, format!("GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n"));
    let (bytes, end) = read_to_end(&mut client);
    assert!(bytes.ends_with(b"half"));
    assert_eq!(
        end.expect_err("no close_notify").kind(),
        std::io::ErrorKind::UnexpectedEof
    );
}

#[test]
fn a_truncated_request_does_not_look_complete_to_a_server_without_tls() {
    let mut set = http_rules(&["/.*"]);
    set.originating_tls = None;
    let world = World::new(set);
    let (to, from) = std::sync::mpsc::channel();
    world.server(move |mut socket| {
        read_head(&mut socket).expect("a request");
        let (_, end) = read_to_end(&mut socket);
        to.send(end.map_err(|error| error.kind()))
            .expect("the test waits");
    });
    let mut client = world.client();
    send(
        &mut client,
        format!("POST / HTTP/1.0\r\nHost: {NAME}\r\nContent-Length: 9\r\n\r\nhalf"),
    );
    // A FIN without close_notify.
    client.sock.shutdown(Shutdown::Write).expect("the FIN is sent");
    assert_eq!(
        from.recv_timeout(crate::world::PATIENCE).expect("the end"),
        Err(std::io::ErrorKind::ConnectionReset)
    );
}

#[test]
fn a_head_and_its_short_body_are_one_record() {
    let world = World::new(http_rules(&["/.*"]));
    world.http_server();
    let mut client = world.client();
    // The first response follows the session ticket.
    assert_eq!(get(&mut client, "/a").status, 200);
    send(&mut client, format!("GET /a HTTP/1.1\r\nHost: {NAME}\r\n\r\n"));
    let mut header = [0; 5];
    client.sock.read_exact(&mut header).expect("a record");
    let response = "HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nGET /a 0";
    // Application data: the content, its type, and a tag of 16 bytes (RFC 8446, section 5.2).
    assert_eq!(header[0], 23);
    assert_eq!(
        usize::from(u16::from_be_bytes([header[3], header[4]])),
        response.len() + 1 + 16
    );
}

#[test]
fn without_tls_towards_the_server_a_request_arrives_in_plain_text() {
    let mut set = http_rules(&["/a"]);
    set.originating_tls = None;
    let world = World::new(set);
    world.server(|mut socket| serve_http(&mut socket));
    let mut client = world.client();
    assert_eq!(get(&mut client, "/a").body, "GET /a 0");
    assert_eq!(get(&mut client, "/b").status, 403);
}

#[test]
fn without_tls_towards_the_client_the_host_names_the_server() {
    let mut set = http_rules(&["/a"]);
    set.terminating_tls = None;
    let world = World::new(set);
    world.http_server();
    let mut client = world.socket();
    assert_eq!(get(&mut client, "/a").body, "GET /a 0");
    let upstreams = world.proxy.upstreams();
    assert_eq!((upstreams.len(), &*upstreams[0].name), (1, NAME));
    // The certificate was not checked for another host.
    send(&mut client, "GET /a HTTP/1.1\r\nHost: other.test\r\n\r\n");
    assert_eq!(read_answer(&mut client).status, 421);
    // A Host that names no server does not either: the first request had a name.
    for host in ["a..b", "", "-"] {
        let mut client = world.socket();
        assert_eq!(get(&mut client, "/a").body, "GET /a 0");
        send(&mut client, format!("GET /a HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        let status = read_answer(&mut client).status;
        assert!(matches!(status, 400 | 421), "{host}: {status}");
    }
}

#[test]
fn a_request_for_another_host_leaves_the_responses_before_as_they_are() {
    let mut set = http_rules(&["/.*"]);
    set.terminating_tls = None;
    let world = World::new(set);
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Mutex::new(wait);
    world.tls_server(move |stream| {
        read_head(stream).expect("a request");
        wait.lock().expect("the channel").recv().expect("the denial");
        send(stream, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst");
        let _ = stream.read(&mut [0]);
    });
    let mut client = world.socket();
    send(
        &mut client,
        format!("GET /1 HTTP/1.1\r\nHost: {NAME}\r\n\r\nGET /2 HTTP/1.1\r\nHost: other.test\r\n\r\n"),
    );
    world.record("the other host", |record| {
        record.verdict == palisade_inspect::record::Verdict::Dropped
    });
    go.send(()).expect("the server waits");
    let first = read_answer(&mut client);
    assert_eq!((first.status, &*first.body), (200, "first"));
    assert_eq!(read_answer(&mut client).status, 421);
}

#[test]
fn without_tls_on_both_sides_requests_are_inspected() {
    let mut set = http_rules(&["/a"]);
    (set.terminating_tls, set.originating_tls) = (None, None);
    let world = World::new(set);
    world.server(|mut socket| serve_http(&mut socket));
    let mut client = world.socket();
    assert_eq!(get(&mut client, "/a").body, "GET /a 0");
    assert_eq!(get(&mut client, "/b").status, 403);
}

#[test]
fn an_upload_and_a_download_at_the_same_time_do_not_block_each_other() {
    const LENGTH: usize = 8 << 20;
    let world = World::new(http_rules(&["/.*"]));
    world.tls_server(|stream| {
        read_head(stream).expect("a request");
        // The response precedes the body of the request.
        send(
            stream,
            format!("HTTP/1.1 200 OK\r\nContent-Length: {LENGTH}\r\n\r\n"),
        );
        let mut part = vec![0; 64 << 10];
        for _ in 0..LENGTH / part.len() {
            stream.read_exact(&mut part).expect("the body");
            send(stream, &part);
        }
        let _ = stream.read(&mut [0]);
    });
    let mut client = world.client();
    send(
        &mut client,
        format!("PUT /a HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: {LENGTH}\r\n\r\n"),
    );
    let body = pattern(LENGTH);
    let mut received = 0;
    read_head(&mut client).expect("a response");
    for part in body.chunks(64 << 10) {
        send(&mut client, part);
        let mut echo = vec![0; part.len()];
        client.read_exact(&mut echo).expect("the body");
        assert!(echo == part, "the body has changed after {received} bytes");
        received += echo.len();
    }
}

#[test]
fn many_connections_at_once_are_served() {
    let world = World::new(http_rules(&["/.*"]));
    world.http_server();
    thread::scope(|scope| {
        for number in 0..16 {
            let world = &world;
            scope.spawn(move || {
                for turn in 0..10 {
                    let path = format!("/{number}/{turn}");
                    assert_eq!(get(&mut world.client(), &path).body, format!("GET {path} 0"));
                }
            });
        }
    });
    world.wait("all connections are closed", |world| {
        world.proxy.stats().open == 0
    });
}

#[test]
fn a_rule_can_change_the_fields_of_a_request() {
    let mut set = http_rules(&["/.*"]);
    let Matcher::Http(rule) = &mut set.alternatives[0].matcher else {
        panic!("an HTTP rule");
    };
    rule.header_matches = vec![
        HeaderMatch {
            name: "X-Tenant".into(),
            value: Some("blue".into()),
            secret: None,
            mismatch: MismatchAction::Replace,
        },
        HeaderMatch {
            name: "X-Debug".into(),
            value: Some("off".into()),
            secret: None,
            mismatch: MismatchAction::Delete,
        },
    ];
    let world = World::new(set);
    world.tls_server(|stream| {
        while let Some(head) = read_head(stream) {
            send(
                stream,
                format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{head}", head.len()),
            );
        }
    });
    let mut client = world.client();
    for fields in ["", "X-Tenant: red\r\nx-tenant: blue\r\nX-Debug: on\r\n"] {
        send(
            &mut client,
            format!("GET /a HTTP/1.1\r\nHost: {NAME}\r\n{fields}\r\n"),
        );
        assert_eq!(
            read_answer(&mut client).body,
            format!("GET /a HTTP/1.1\r\nHost: {NAME}\r\nx-tenant: blue\r\n\r\n")
        );
    }
}
