//! Failures of servers: what the client, the records and the counters say.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    sync::Arc,
    time::Duration,
};

use palisade_abi::{Inspector, Reason};
use palisade_inspect::record::What;
use palisade_intercept::FailureKind;
use palisade_model::snapshot::{Alternative, Matcher};
use rcgen::date_time_ymd;
use rustls::sign::CertifiedKey;
use socket2::SockRef;

use crate::world::{
    Answer, NAME, World, accept, field, get, http_rules, read_head, send, serve_http, server_config,
};

fn reset(socket: &TcpStream) {
    SockRef::from(socket)
        .set_linger(Some(Duration::ZERO))
        .expect("the option");
}

/// Makes a request, and checks that the answer, a record, a counter and the upstream say `words`.
fn expect(world: &World, kind: FailureKind, words: &str) -> Answer {
    let answer = get(&mut world.client(), "/a");
    assert_eq!(answer.status, 503, "{}", answer.head);
    let header = field(&answer.head, "x-palisade-error").expect("the field");
    assert!(
        header.starts_with(kind.text()) && header.contains(words),
        "{header}"
    );
    assert!(answer.body.contains(words), "{}", answer.body);
    let record = world.record("the failure", |record| {
        matches!(record.what, What::Intercept { error, .. } if error.bytes().starts_with(kind.text().as_bytes()))
    });
    let reason = match kind {
        FailureKind::Secret => Reason::SecretUnusable,
        _ => Reason::InterceptFailed,
    };
    assert_eq!(record.reason, reason);
    assert!(matches!(record.what, What::Intercept { name, .. } if name.bytes() == NAME.as_bytes()));
    assert!(world.proxy.stats().failures[kind as usize] > 0);
    let upstreams = world.proxy.upstreams();
    assert!(
        upstreams.iter().any(|upstream| upstream.name == NAME
            && upstream.failures[kind as usize] > 0
            && upstream
                .last_failure
                .as_ref()
                .is_some_and(|last| last.contains(words))),
        "{upstreams:?}"
    );
    answer
}

fn with_certificate(world: &World, own: Arc<CertifiedKey>) {
    let config = server_config(own);
    world.server(move |socket| {
        let mut stream = accept(config.clone(), socket);
        // The proxy refuses the certificate with an alert.
        assert!(read_head_of(&mut stream).is_none());
    });
}

fn read_head_of(stream: &mut impl std::io::Read) -> Option<u8> {
    let mut byte = [0];
    matches!(stream.read(&mut byte), Ok(1)).then_some(byte[0])
}

#[test]
fn certificates_that_fail_the_check_are_told_apart() {
    let world = World::new(http_rules(&["/.*"]));
    let expired = world.server_ca.issue(NAME, |params| {
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(2002, 1, 1);
    });
    with_certificate(&world, expired);
    expect(&world, FailureKind::CertificateExpired, "certificate expired");
    let early = world.server_ca.issue(NAME, |params| {
        params.not_before = date_time_ymd(2101, 1, 1);
        params.not_after = date_time_ymd(2102, 1, 1);
    });
    with_certificate(&world, early);
    expect(&world, FailureKind::CertificateNotYetValid, "not yet valid");
    with_certificate(&world, world.client_ca.issue(NAME, |_| {}));
    expect(&world, FailureKind::UnknownCa, "unknown CA");
    with_certificate(&world, world.server_ca.issue("other.test", |_| {}));
    expect(&world, FailureKind::NameMismatch, "other.test");
    let chain = vec![vec![48, 3, 2, 1, 1].into()];
    let broken = CertifiedKey::new(chain, world.server_ca.issue(NAME, |_| {}).key.clone());
    with_certificate(&world, Arc::new(broken));
    expect(&world, FailureKind::CertificateInvalid, "invalid certificate");
}

#[test]
fn a_missing_intermediate_certificate_is_said_in_words() {
    let world = World::new(http_rules(&["/.*"]));
    let intermediate = world.server_ca.intermediate("the intermediate");
    let leaf = intermediate.issue(NAME, |_| {});
    with_certificate(&world, leaf.clone());
    expect(&world, FailureKind::UnknownCa, "the intermediate");
    let chain = vec![leaf.cert[0].clone(), intermediate.der.clone()];
    let config = server_config(Arc::new(CertifiedKey::new(chain, leaf.key.clone())));
    world.server(move |socket| serve_http(&mut accept(config.clone(), socket)));
    assert_eq!(get(&mut world.client(), "/a").status, 200);
}

#[test]
fn a_refused_connection_and_a_stalled_one_are_told_apart() {
    let world = World::with(http_rules(&["/.*"]), |_, options| {
        options.connect = Duration::from_millis(300);
        options.handshake = Duration::from_millis(300);
    });
    let closed = TcpListener::bind("127.0.0.1:0").expect("a listener").local_addr();
    world.set_server(closed.expect("an address"));
    expect(&world, FailureKind::Refused, "connection refused");
    let silent = TcpListener::bind("127.0.0.1:0").expect("a listener");
    world.set_server(silent.local_addr().expect("an address"));
    expect(&world, FailureKind::HandshakeTimeout, "handshake timeout");
    // A full accept queue leaves SYNs without an answer.
    let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    full.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into())
        .expect("an address");
    full.listen(0).expect("a listener");
    let address = full
        .local_addr()
        .expect("an address")
        .as_socket()
        .expect("an address");
    let mut fillers = Vec::new();
    for _ in 0..4 {
        if let Ok(filler) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
            fillers.push(filler);
        }
    }
    world.set_server(address);
    expect(&world, FailureKind::ConnectTimeout, "connect timeout");
}

#[test]
fn a_client_that_gives_up_ends_the_connection_to_the_server() {
    let world = World::new(http_rules(&["/.*"]));
    let (to, from) = std::sync::mpsc::channel();
    world.server(move |mut socket| {
        let (_, end) = crate::world::read_to_end(&mut socket);
        to.send(end.map_err(|error| error.kind()))
            .expect("the test waits");
    });
    let mut client = world.client();
    client.conn.write_tls(&mut client.sock).expect("the hello");
    world.wait("the proxy shakes hands with the server", |world| {
        let views = world.proxy.connections(10);
        views
            .iter()
            .any(|view| view.state == "TLS handshake with the server")
    });
    reset(&client.sock);
    drop(client);
    assert_eq!(
        from.recv_timeout(crate::world::PATIENCE).expect("the end"),
        Err(std::io::ErrorKind::ConnectionReset)
    );
}

#[test]
fn an_alert_of_the_server_is_named() {
    let world = World::new(http_rules(&["/.*"]));
    world.server(|mut socket| {
        let _ = socket.read(&mut [0; 4096]);
        // unrecognized_name, as routers send it that have no certificate for the name.
        let _ = socket.write_all(&[21, 3, 3, 0, 2, 2, 112]);
        let _ = socket.read(&mut [0; 64]);
    });
    expect(&world, FailureKind::Alert, "alert received: unrecognized_name");
}

#[test]
fn a_server_without_a_shared_application_protocol_is_said_in_words() {
    let world = World::new(http_rules(&["/.*"]));
    let mut config = server_config(world.server_ca.issue(NAME, |_| {}));
    config.alpn_protocols = vec![b"h2".to_vec()];
    world.server(move |socket| {
        let mut stream = accept(config.clone(), socket);
        let _ = stream.flush();
        let _ = stream.read(&mut [0]);
    });
    let mut config = world.client_config();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let answer = get(&mut world.client_with(config, NAME), "/a");
    assert_eq!(answer.status, 503);
    assert!(answer.body.contains("no shared protocol"), "{}", answer.body);
}

#[test]
fn a_server_that_ends_the_handshake_is_said_in_words() {
    let world = World::new(http_rules(&["/.*"]));
    world.server(|mut socket| {
        let _ = socket.read(&mut [0; 4096]);
        reset(&socket);
    });
    expect(&world, FailureKind::HandshakeReset, "reset in the TLS handshake");
    world.server(|mut socket| {
        let _ = socket.read(&mut [0; 4096]);
        let _ = socket.shutdown(Shutdown::Write);
        let _ = socket.read(&mut [0; 4096]);
    });
    expect(
        &world,
        FailureKind::HandshakeClosed,
        "closed in the TLS handshake",
    );
    world.server(|mut socket| {
        let _ = socket.write_all(b"220 mail.example.test ESMTP\r\n");
        let _ = socket.read(&mut [0; 4096]);
        let _ = socket.read(&mut [0; 4096]);
    });
    expect(&world, FailureKind::HandshakeInvalid, "invalid TLS handshake");
    // After the server's first flight.
    let config = server_config(world.server_ca.issue(NAME, |_| {}));
    world.server(move |mut socket| {
        let mut conn = rustls::ServerConnection::new(Arc::new(config.clone())).expect("a server");
        let _ = conn.read_tls(&mut socket);
        let _ = conn.process_new_packets();
        let mut flight = Vec::new();
        while conn.wants_write() {
            let _ = conn.write_tls(&mut flight);
        }
        let _ = socket.write_all(flight.get(..200).unwrap_or_default());
        let _ = socket.read(&mut [0; 0]);
        reset(&socket);
    });
    expect(&world, FailureKind::HandshakeReset, "reset in the TLS handshake");
}

#[test]
fn a_server_that_ends_the_connection_instead_of_a_response_is_said_in_words() {
    let world = World::new(http_rules(&["/.*"]));
    world.tls_server(|stream| {
        read_head(stream).expect("a request");
        reset(&stream.sock);
    });
    expect(&world, FailureKind::ResponseReset, "reset before response");
    world.tls_server(|stream| {
        read_head(stream).expect("a request");
        stream.conn.send_close_notify();
        let _ = stream.flush();
        let _ = stream.sock.shutdown(Shutdown::Write);
        let _ = stream.read(&mut [0]);
    });
    expect(&world, FailureKind::ResponseClosed, "closed before response");
}

#[test]
fn a_server_that_closes_an_idle_connection_is_no_failure() {
    let world = World::new(http_rules(&["/.*"]));
    world.tls_server(|stream| {
        read_head(stream).expect("a request");
        send(stream, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        read_head(stream).expect("a second request");
        stream.conn.send_close_notify();
        let _ = stream.flush();
    });
    let mut client = world.client();
    assert_eq!(get(&mut client, "/a").body, "ok");
    send(&mut client, format!("GET /b HTTP/1.1\r\nHost: {NAME}\r\n\r\n"));
    // The client may send the request again on another connection, which a 503 would prevent.
    let (bytes, end) = crate::world::read_to_end(&mut client);
    assert!(bytes.is_empty(), "{:?} {end:?}", String::from_utf8_lossy(&bytes));
    assert_eq!(world.proxy.stats().failures.iter().sum::<u64>(), 0);
}

#[test]
fn a_failed_server_does_not_open_what_the_rules_deny() {
    let world = World::new(http_rules(&["/a"]));
    let closed = TcpListener::bind("127.0.0.1:0").expect("a listener").local_addr();
    world.set_server(closed.expect("an address"));
    let mut client = world.client();
    assert_eq!(get(&mut client, "/b").status, 403);
    let mut client = world.client();
    send(&mut client, format!("HEAD /a HTTP/1.1\r\nHost: {NAME}\r\n\r\n"));
    let head = read_head(&mut client).expect("a response");
    assert!(head.starts_with("HTTP/1.1 503"), "{head}");
    let (rest, _) = crate::world::read_to_end(&mut client);
    assert!(rest.is_empty(), "a response to HEAD has no body");
}

#[test]
fn without_http_rules_a_failure_reaches_the_client_as_an_alert() {
    let mut set = http_rules(&[]);
    set.reads = Inspector::Tls as u8;
    set.alternatives = vec![Alternative {
        rule: 7,
        matcher: Matcher::Everything,
    }];
    let world = World::new(set);
    world.server(|mut socket| {
        let _ = socket.read(&mut [0; 4096]);
        let _ = socket.write_all(&[21, 3, 3, 0, 2, 2, 112]);
        let _ = socket.read(&mut [0; 64]);
    });
    let error = world.client().write_all(b"hello").expect_err("refused");
    assert!(error.to_string().contains("UnrecognisedName"), "{error}");
    let closed = TcpListener::bind("127.0.0.1:0").expect("a listener").local_addr();
    world.set_server(closed.expect("an address"));
    let error = world.client().write_all(b"hello").expect_err("refused");
    assert!(error.to_string().contains("InternalError"), "{error}");
}

#[test]
fn a_missing_secret_is_said_where_it_can_be() {
    let mut set = http_rules(&["/.*"]);
    set.originating_tls.as_mut().expect("originating").secret = "ns/missing".into();
    let world = World::new(set);
    world.http_server();
    expect(&world, FailureKind::Secret, "no such secret");
    let mut set = http_rules(&["/.*"]);
    set.terminating_tls.as_mut().expect("terminating").secret = "ns/missing".into();
    let world = World::new(set);
    world.http_server();
    let error = world.client().write_all(b"hello").expect_err("refused");
    assert!(error.to_string().contains("InternalError"), "{error}");
    assert_eq!(world.proxy.stats().failures[FailureKind::Secret as usize], 1);
}

#[test]
fn a_client_that_does_not_trust_the_certificate_is_recorded() {
    let world = World::new(http_rules(&["/.*"]));
    world.http_server();
    let config = rustls::ClientConfig::builder_with_provider(crate::world::provider())
        .with_protocol_versions(rustls::ALL_VERSIONS)
        .expect("versions")
        .with_root_certificates(world.server_ca.roots())
        .with_no_client_auth();
    let mut client = world.client_with(config, NAME);
    client.write_all(b"GET").expect_err("the client does not trust");
    let _ = client.flush();
    let record = world.record("the client's alert", |record| {
        matches!(record.what, What::Intercept { .. })
    });
    assert!(
        matches!(record.what, What::Intercept { error, .. }
            if String::from_utf8_lossy(error.bytes()).contains("alert unknown_ca")),
        "{record:?}"
    );
}
