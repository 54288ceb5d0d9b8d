//! An attacker reuses ports, forges resets and lets flows expire so that inspected traffic passes without inspection. The
//! same events without an attacker must work.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use palisade_testbed::{
    Ns,
    daemon::Settings,
    dns::query,
    forge::{Checksum, Wire},
    rawtcp::{Delivered, RawTcp, Segment, flags},
    recorder::Recorder,
    tls::{Hello, server_hello},
    topology::{FAMILIES, INNER},
};
use palisade_tests::{
    OPEN,
    fixtures::apps::{OK, answers_requests, apps, borrowed, policies, policy},
    setup::tables,
};

const PORT: u16 = 443;
const PATHS: &str = "      rules:\n        http: [{path: /good.*}, {path: /good.*, method: POST}]\n";
const NAMES: &str = "      serverNames: [good.example]\n";
/// Out of a workload, into one, and into the node.
const PAIRS: [(&str, &str); 3] = [
    ("client", "internet"),
    ("internet", "server"),
    ("internet", "node"),
];

fn hello(name: &str) -> Vec<u8> {
    Hello::to(name).with(16, b"\x00\x09\x08http/1.1").bytes()
}

fn contains(all: &[u8], part: &[u8]) -> bool {
    all.windows(part.len()).any(|window| window == part)
}

/// Ends a connection on behalf of the server, hides the reset from the programs, and opens another one with the same ports.
fn open_again(client: &mut RawTcp, at: i64, isn: u32) {
    client
        .send(&Segment::data(at, b"").flags(flags::RST))
        .expect("reset");
    client
        .send(&Segment::data(at, b"").bad_checksum())
        .expect("segment");
    thread::sleep(Duration::from_millis(20));
    client.begin_anew(isn);
    client.open().expect("another connection by the same ports");
}

#[test]
fn a_connection_that_reuses_the_ports_of_an_offloaded_one_is_inspected() {
    let apps = apps();
    let recorders = ["server", "node", "internet"].map(|name| {
        let recorder = Recorder::start(apps.ns(name), &apps.both(name), &[PORT], |done, all: &[u8]| {
            if *done == 0 && all.len() >= hello("good.example").len() {
                *done = all.len();
                return server_hello();
            }
            Vec::new()
        });
        (name, recorder.expect("recorder"))
    });
    let daemon = apps
        .daemon(&Settings::default(), &borrowed(&policies(&[PORT], NAMES)))
        .expect("daemon");
    for (from, to) in PAIRS {
        let (_, recorder) = recorders.iter().find(|(name, _)| *name == to).expect("recorder");
        for family in FAMILIES {
            let (source, to) = (apps.source(from, to, family), apps.at(to, family, PORT));
            let mut client = RawTcp::connect(apps.ns(from), source, to).expect("connection");
            let good = hello("good.example");
            let tunnel = |client: &mut RawTcp| {
                let outcome = client.deliver_pieces(0, &good, 1_000, OPEN).expect("hello");
                assert_eq!(outcome, Delivered::Whole, "{}", daemon.report());
                let answered = client.listen(OPEN, |c| c.received() == server_hello());
                assert!(answered.expect("answer"), "{}", daemon.report());
                let at = good.len() as i64;
                client.send(&Segment::data(at, b"")).expect("acknowledgement");
                thread::sleep(Duration::from_millis(50));
                at
            };
            let at = tunnel(&mut client);
            open_again(&mut client, at, 0x1111_0000);
            let evil = hello("evil.example");
            let outcome = client
                .deliver_pieces(0, &evil, 1_000, Duration::from_secs(2))
                .expect("hello");
            assert_eq!(outcome, Delivered::Reset, "{from} -> {to}\n{}", daemon.report());
            // Allowed requests pass, with the same ports.
            client.begin_anew(0x2222_0000);
            client.open().expect("a third connection");
            let at = tunnel(&mut client);
            let data = client
                .deliver_pieces(at, &[b'x'; 5_000], 1_000, OPEN)
                .expect("data");
            assert_eq!(data, Delivered::Whole, "{}", daemon.report());
            for heard in recorder.heard() {
                assert!(
                    !contains(&heard.bytes, b"evil.example"),
                    "{from} -> {to}\n{}",
                    daemon.report()
                );
            }
        }
    }
}

#[test]
fn a_connection_that_reuses_the_ports_of_an_offload_window_is_inspected() {
    let apps = apps();
    let recorders = ["server", "node", "internet"].map(|name| {
        let recorder = Recorder::start(apps.ns(name), &apps.both(name), &[PORT], answers_requests);
        (name, recorder.expect("recorder"))
    });
    let daemon = apps
        .daemon(&Settings::default(), &borrowed(&policies(&[PORT], PATHS)))
        .expect("daemon");
    for (from, to) in PAIRS {
        let (_, recorder) = recorders.iter().find(|(name, _)| *name == to).expect("recorder");
        for family in FAMILIES {
            let (source, to) = (apps.source(from, to, family), apps.at(to, family, PORT));
            let mut client = RawTcp::connect(apps.ns(from), source, to).expect("connection");
            let head = b"POST /good HTTP/1.1\r\nHost: x.example\r\nContent-Length: 1000000000\r\n\r\n";
            let begin = [&head[..], &[b'b'; 3_000]].concat();
            let outcome = client.deliver_pieces(0, &begin, 1_000, OPEN).expect("request");
            assert_eq!(outcome, Delivered::Whole, "{}", daemon.report());
            let at = begin.len() as i64;
            // A sequence number within the offload window.
            let inside = client.seq(at).wrapping_add(500_000);
            open_again(&mut client, at, inside);
            let evil = b"POST /evil/delete-all HTTP/1.1\r\nHost: x.example\r\nContent-Length: 0\r\n\r\n";
            client
                .deliver_pieces(0, evil, 1_000, Duration::from_secs(2))
                .expect("request");
            client.begin_anew(inside.wrapping_add(1 << 20));
            client.open().expect("a third connection");
            let good = b"GET /good HTTP/1.1\r\nHost: x.example\r\n\r\n";
            client.deliver_pieces(0, good, 1_000, OPEN).expect("request");
            let answered = client.listen(OPEN, |c| c.received() == OK).expect("answer");
            assert!(answered, "{from} -> {to}\n{}", daemon.report());
            for heard in recorder.heard() {
                assert!(
                    !contains(&heard.bytes, b"/evil"),
                    "{from} -> {to}\n{}",
                    daemon.report()
                );
            }
        }
    }
}

/// The server may send to port 443 of any host. An attacker at such a port lets the entry of its SYN expire and waits until
/// the server retransmits its SYN+ACK.
#[test]
fn an_expired_inspected_flow_is_not_recreated_in_the_servers_direction() {
    let apps = apps();
    let recorder = Recorder::start(apps.ns("server"), &apps.both("server"), &[PORT], answers_requests)
        .expect("recorder");
    let daemon = apps
        .daemon(
            &tables("[timeouts]\ntcp_opening = \"1s\"\ntcp_closing = \"1s\"\n"),
            &[("a.yaml", &policy("server", "ingress", &[PORT], PATHS))],
        )
        .expect("daemon");
    for family in FAMILIES {
        let (source, to) = (
            apps.source("internet", "server", family),
            apps.at("server", family, PORT),
        );
        let mut client = RawTcp::new(apps.ns("internet"), source, to).expect("client");
        client.acknowledges = false;
        client.send(&client.syn()).expect("SYN");
        client
            .send(&Segment::data(0, b"").flags(flags::RST).bad_checksum())
            .expect("reset");
        let answered = client.listen(OPEN, |c| c.acked() >= 0).expect("answer");
        assert!(answered, "{}", daemon.report());
        // The server retransmits its SYN+ACK after one, three and seven seconds.
        thread::sleep(Duration::from_millis(4_000));
        let evil = b"GET /evil HTTP/1.1\r\nHost: x.example\r\n\r\n";
        client
            .deliver_pieces(0, evil, 1_000, Duration::from_secs(2))
            .expect("request");
        for heard in recorder.heard() {
            assert!(!contains(&heard.bytes, b"/evil"), "{}", daemon.report());
        }
    }
}

/// A forged datagram from the resolver's port to the port from which the workload then sends its query.
#[test]
fn a_spoofed_resolver_datagram_does_not_disable_inspection_of_queries() {
    let apps = apps();
    let rules = "      rules:\n        dns: [{matchName: good.example}]\n";
    let policy = policy("client", "egress", &[53], rules).replace("protocol: TCP", "protocol: ANY");
    let daemon = apps
        .daemon(&Settings::default(), &[("a.yaml", &policy)])
        .expect("daemon");
    for family in FAMILIES {
        let resolver = apps.at("internet", family, 53);
        let server = apps
            .ns("internet")
            .enter(|| UdpSocket::bind(resolver))
            .expect("resolver");
        server
            .set_read_timeout(Some(Duration::from_millis(500)))
            .expect("timeout");
        let own = apps.at("client", family, 5_353 + 20_000);
        let client = apps.ns("client").enter(|| UdpSocket::bind(own)).expect("client");
        let wire = Wire::open(apps.ns("internet"), INNER, apps.topology.addr("node", family)).expect("wire");
        for _ in 0..3 {
            wire.udp(resolver, own, b"not an answer", Checksum::Right)
                .expect("datagram");
        }
        thread::sleep(Duration::from_millis(100));
        let mut buffer = [0; 512];
        for (name, passes) in [("evil.example", false), ("good.example", true)] {
            client
                .send_to(&query(7, &[(name, 1)]), resolver)
                .expect("question");
            let got = server.recv_from(&mut buffer);
            assert_eq!(got.is_ok(), passes, "{name}\n{}", daemon.report());
        }
    }
}

/// Removes the socket of one end without a packet on the wire.
fn forget(ns: &Ns, stream: TcpStream) {
    ns.nft(
        "table inet mute {}\ndelete table inet mute\ntable inet mute {\nchain output {\n\
         type filter hook output priority 10;\ntcp flags & (rst | fin) != 0 drop;\n}\n}\n",
    )
    .expect("nft");
    let socket = socket2::Socket::from(stream);
    socket
        .set_linger(Some(Duration::ZERO))
        .expect("a close that resets");
    drop(socket);
    ns.nft("delete table inet mute\n").expect("nft");
}

/// Opens a connection from a given port. Returns it and how long the handshake took.
fn connect(ns: &Ns, from: SocketAddr, to: SocketAddr) -> (TcpStream, Duration) {
    let begun = Instant::now();
    let stream = ns
        .enter(|| -> std::io::Result<TcpStream> {
            let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.bind(&from.into())?;
            socket.connect_timeout(&to.into(), Duration::from_secs(10))?;
            Ok(socket.into())
        })
        .expect("connection");
    (stream, begun.elapsed())
}

/// Returns whether a request gets its response.
fn is_served(stream: &mut TcpStream, path: &str) -> bool {
    stream.set_read_timeout(Some(OPEN)).expect("timeout");
    let request = format!("GET {path} HTTP/1.1\r\nHost: x.example\r\n\r\n");
    let mut answer = [0; 15];
    stream.write_all(request.as_bytes()).is_ok()
        && stream.read_exact(&mut answer).is_ok()
        && answer.starts_with(b"HTTP/1.1 200 OK")
}

#[test]
fn ports_can_be_reused_when_one_end_has_lost_the_connection() {
    let apps = apps();
    let daemon = apps
        .daemon(&Settings::default(), &borrowed(&policies(&[PORT], PATHS)))
        .expect("daemon");
    let mut port = 33_000;
    for server_forgets in [false, true] {
        for (from, to) in PAIRS {
            for family in FAMILIES {
                let at = apps.at(to, family, PORT);
                port += 1;
                let own = SocketAddr::new(apps.source(from, to, family), port);
                let listener = apps.ns(to).enter(|| TcpListener::bind(at)).expect("listener");
                // Accepts connections and keeps them open until the end.
                let serve = |listener: &TcpListener| {
                    let (mut stream, _) = listener.accept().expect("accept");
                    let mut request = [0; 400];
                    let n = stream.read(&mut request).expect("request");
                    assert!(n > 0);
                    stream.write_all(OK).expect("answer");
                    stream
                };
                thread::scope(|scope| {
                    let served = scope.spawn(|| serve(&listener));
                    let (mut first, _) = connect(apps.ns(from), own, at);
                    assert!(is_served(&mut first, "/good/1"), "{}", daemon.report());
                    let first_served = served.join().expect("server");
                    forget(apps.ns(from), first);
                    let kept = if server_forgets {
                        forget(apps.ns(to), first_served);
                        None
                    } else {
                        Some(first_served)
                    };
                    let served = scope.spawn(|| serve(&listener));
                    let (mut second, took) = connect(apps.ns(from), own, at);
                    assert!(
                        is_served(&mut second, "/good/2"),
                        "{from} -> {to}\n{}",
                        daemon.report()
                    );
                    // A server with the old connection answers the SYN with a challenge ACK, and the client retransmits its
                    // SYN.
                    assert!(
                        took < Duration::from_millis(2_900),
                        "{from} -> {to}: {took:?}\n{}",
                        daemon.report()
                    );
                    let second_served = served.join().expect("server");
                    // The new connection is inspected.
                    assert!(!is_served(&mut second, "/evil"), "{from} -> {to}");
                    let _ = second.shutdown(Shutdown::Both);
                    drop((second, second_served, kept));
                });
            }
        }
    }
}
