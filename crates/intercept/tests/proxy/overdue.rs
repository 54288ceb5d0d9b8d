//! Responses that do not begin, or stop, and idle connections: what the client, the records and the counters say.

use std::{
    io::{Read as _, Write as _},
    thread,
    time::{Duration, Instant},
};

use palisade_abi::Reason;
use palisade_inspect::record::{Verdict, What};
use palisade_intercept::{FailureKind, Options};

use crate::world::{
    Answer, NAME, World, field, get, http_rules, read_answer, read_head, read_to_end, send, serve_http,
};

/// Time for a response.
const RESPONSE: Duration = Duration::from_millis(400);

fn world(change: impl FnOnce(&mut Options)) -> World {
    World::with(http_rules(&["/.*"]), |_, options| {
        options.response = RESPONSE;
        change(options);
    })
}

/// Checks an answer in the server's place, and that a record, a counter and the upstream say why.
fn is_late(world: &World, answer: &Answer) {
    let kind = FailureKind::ResponseTimeout;
    let header = field(&answer.head, "x-palisade-error").unwrap_or_default();
    assert!(
        answer.status == 504 && header.starts_with("response timeout: no head of a response within 400ms"),
        "{answer:?}"
    );
    let record = world.record("the failure", |record| {
        matches!(record.what, What::Intercept { error, .. } if error.bytes().starts_with(kind.text().as_bytes()))
    });
    assert_eq!(record.reason, Reason::InterceptFailed);
    assert!(world.proxy.stats().failures[kind as usize] > 0);
    let upstreams = world.proxy.upstreams();
    let is_counted = |kind: FailureKind| {
        upstreams
            .iter()
            .any(|upstream| upstream.name == NAME && upstream.failures[kind as usize] > 0)
    };
    assert!(is_counted(kind), "{upstreams:?}");
}

#[test]
fn a_response_that_does_not_begin_is_answered_after_its_time() {
    let world = world(|_| {});
    // The first request is answered.
    world.tls_server(|stream| {
        read_head(stream).expect("a request");
        send(stream, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        let _ = read_to_end(stream);
    });
    for method in ["GET", "HEAD"] {
        let mut client = world.client();
        assert_eq!(get(&mut client, "/a").body, "ok");
        let begin = Instant::now();
        send(
            &mut client,
            format!("{method} /b HTTP/1.1\r\nHost: {NAME}\r\n\r\n"),
        );
        let head = read_head(&mut client).expect("an answer");
        let took = begin.elapsed();
        assert!(took >= RESPONSE && took < RESPONSE * 4, "{took:?}");
        let (body, end) = read_to_end(&mut client);
        end.expect("close_notify");
        let body = String::from_utf8_lossy(&body).into_owned();
        assert_eq!(body.is_empty(), method == "HEAD", "{body}");
        let status = 504 * u16::from(head.starts_with("HTTP/1.1 504 "));
        is_late(&world, &Answer { status, head, body });
    }
    world.wait("the connections are gone", |world| world.proxy.stats().open == 0);
}

#[test]
fn neither_a_slow_head_nor_further_requests_extend_the_time() {
    let world = world(|_| {});
    world.tls_server(|stream| {
        read_head(stream).expect("a request");
        for byte in b"HTTP/1.1 200 OK\r\nX: ".iter().chain([b'a'; 1_000].iter()) {
            if stream.write_all(&[*byte]).and_then(|()| stream.flush()).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    });
    let begin = Instant::now();
    let mut client = world.client();
    let answer = get(&mut client, "/a");
    assert!(begin.elapsed() < RESPONSE * 4, "{:?}", begin.elapsed());
    is_late(&world, &answer);

    // A further request every 100 ms, and the beginning of one that does not end.
    let begin = Instant::now();
    let mut client = world.client();
    let request = format!("GET /a HTTP/1.1\r\nHost: {NAME}\r\n\r\n");
    send(&mut client, &request);
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(100));
        send(&mut client, &request);
    }
    send(&mut client, "GET /b HT");
    let answer = read_answer(&mut client);
    assert!(begin.elapsed() < RESPONSE * 4, "{:?}", begin.elapsed());
    is_late(&world, &answer);
    let (rest, end) = read_to_end(&mut client);
    end.expect("close_notify");
    assert_eq!(rest, b"");
}

#[test]
fn a_pipelined_request_is_answered_after_the_response_before_it() {
    let world = world(|_| {});
    world.tls_server(|stream| {
        read_head(stream).expect("a request");
        read_head(stream).expect("a request");
        // The body takes longer than the head of the next response may.
        send(stream, "HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n");
        for _ in 0..8 {
            thread::sleep(RESPONSE / 5);
            send(stream, "b");
        }
        let _ = read_to_end(stream);
    });
    let mut client = world.client();
    send(
        &mut client,
        format!("GET /a HTTP/1.1\r\nHost: {NAME}\r\n\r\n").repeat(2),
    );
    let first = read_answer(&mut client);
    assert_eq!((first.status, first.body.as_str()), (200, "bbbbbbbb"));
    is_late(&world, &read_answer(&mut client));
}

#[test]
fn what_is_no_stall_is_not_cut() {
    let world = world(|_| {});
    world.tls_server(|stream| {
        while let Some(head) = read_head(stream) {
            let path = head.split(' ').nth(1).expect("a path");
            match path {
                "/interim" => {
                    for _ in 0..4 {
                        thread::sleep(RESPONSE * 2 / 3);
                        send(stream, "HTTP/1.1 102 Processing\r\n\r\n");
                    }
                    send(stream, "HTTP/1.1 204 No Content\r\n\r\n");
                }
                "/unchanged" => send(stream, "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n"),
                "/head" => send(stream, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"),
                // Before the body of the request has arrived.
                "/early" => {
                    send(stream, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
                    stream.read_exact(&mut [0; 2]).expect("the body");
                }
                "/body" => {
                    send(stream, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbo");
                    thread::sleep(RESPONSE * 2);
                    send(stream, "dy");
                }
                "/upload" => {
                    stream.read_exact(&mut [0; 2]).expect("the body");
                    send(stream, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
                }
                _ => {
                    send(
                        stream,
                        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n",
                    );
                    let mut bytes = [0; 4];
                    while stream.read_exact(&mut bytes).is_ok() {
                        send(stream, bytes);
                    }
                }
            }
        }
    });
    let mut client = world.client();
    let ask = |method: &str, path: &str, more: &str| {
        format!("{method} {path} HTTP/1.1\r\nHost: {NAME}\r\n{more}\r\n")
    };
    send(&mut client, ask("GET", "/interim", ""));
    for _ in 0..4 {
        assert!(
            read_head(&mut client)
                .expect("a head")
                .starts_with("HTTP/1.1 102 ")
        );
    }
    assert_eq!(read_answer(&mut client).status, 204);
    // After each of these responses, nothing is awaited.
    for (method, path) in [("GET", "/unchanged"), ("HEAD", "/head")] {
        thread::sleep(RESPONSE * 3 / 2);
        send(&mut client, ask(method, path, ""));
        assert!(
            !read_head(&mut client)
                .expect("a head")
                .contains("x-palisade-error")
        );
    }
    assert_eq!(get(&mut client, "/body").body, "body");
    // The client takes its time for the body.
    for path in ["/early", "/upload"] {
        send(&mut client, ask("POST", path, "Content-Length: 2\r\n"));
        if path == "/early" {
            assert_eq!(read_answer(&mut client).status, 200);
        }
        for _ in 0..2 {
            thread::sleep(RESPONSE * 3 / 2);
            send(&mut client, "b");
        }
        if path == "/upload" {
            assert_eq!(read_answer(&mut client).status, 200);
        }
    }
    send(
        &mut client,
        ask("GET", "/switch", "Connection: upgrade\r\nUpgrade: echo\r\n"),
    );
    assert!(
        read_head(&mut client)
            .expect("a head")
            .starts_with("HTTP/1.1 101 ")
    );
    for _ in 0..2 {
        thread::sleep(RESPONSE * 3 / 2);
        send(&mut client, "echo");
        let mut bytes = [0; 4];
        client.read_exact(&mut bytes).expect("the bytes");
    }
    assert_eq!(world.proxy.stats().failures, [0; FailureKind::ALL.len()]);
}

#[test]
fn a_server_that_does_not_ask_for_an_announced_body_is_late() {
    let world = world(|_| {});
    world.tls_server(|stream| drop(read_to_end(stream)));
    let mut client = world.client();
    let lines = "Content-Length: 2\r\nExpect: 100-continue";
    send(
        &mut client,
        format!("POST /a HTTP/1.1\r\nHost: {NAME}\r\n{lines}\r\n\r\n"),
    );
    is_late(&world, &read_answer(&mut client));
}

#[test]
fn without_a_time_a_response_may_begin_late() {
    let world = world(|options| options.response = Duration::ZERO);
    world.tls_server(|stream| {
        thread::sleep(RESPONSE * 3);
        serve_http(stream);
    });
    assert_eq!(get(&mut world.client(), "/a").status, 200);
}

#[test]
fn a_message_that_an_idle_connection_cuts_is_recorded() {
    let world = world(|options| {
        options.response = Duration::ZERO;
        options.idle = RESPONSE;
    });
    world.tls_server(|stream| {
        while let Some(head) = read_head(stream) {
            if head.contains("/body") {
                send(stream, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbo");
            } else if head.contains("/chunks") {
                send(
                    stream,
                    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbo",
                );
            } else if head.contains("/between") {
                send(stream, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
            }
        }
    });
    let stalled = FailureKind::ResponseStalled;
    for (number, path) in [(1, "/body"), (2, "/chunks")] {
        let mut client = world.client();
        send(
            &mut client,
            format!("GET {path} HTTP/1.1\r\nHost: {NAME}\r\n\r\n"),
        );
        let (_, end) = read_to_end(&mut client);
        end.expect_err("reset");
        world.wait("the failure is counted", |world| {
            world.proxy.stats().failures[stalled as usize] == number
        });
    }
    let record = world.record("the failure", |record| {
        matches!(record.what, What::Intercept { error, .. } if error.bytes() == b"stalled within response: no byte within 400ms")
    });
    assert_eq!(record.reason, Reason::InterceptFailed);
    // A response that has not begun is answered at that time too.
    let answer = get(&mut world.client(), "/nothing");
    assert_eq!(answer.status, 504, "{answer:?}");
    assert!(
        answer.body.contains("response timeout: no byte within 400ms"),
        "{answer:?}"
    );
    // A client that stops is told apart.
    let mut client = world.client();
    send(
        &mut client,
        format!("POST /a HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: 9\r\n\r\nabc"),
    );
    let (_, end) = read_to_end(&mut client);
    end.expect_err("reset");
    let detail = "stream stops within a request";
    let record = world.record(
        "the request",
        |record| matches!(record.what, What::Unreadable { detail: of } if of == detail),
    );
    assert_eq!(record.reason, Reason::InspectDeadline);
    // Nothing is cut between two messages.
    let dropped = || {
        let records = world.reports.0.lock().expect("the records");
        records
            .iter()
            .filter(|record| record.verdict == Verdict::Dropped)
            .count()
    };
    let before = dropped();
    let mut client = world.client();
    assert_eq!(get(&mut client, "/between").status, 200);
    let (_, end) = read_to_end(&mut client);
    end.expect_err("reset");
    world.wait("the connection is gone", |world| world.proxy.stats().open == 0);
    assert_eq!(dropped(), before);
}
