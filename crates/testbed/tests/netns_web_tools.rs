//! Web servers and clients, and the client that writes its own segments, without Palisade, to show that tests can rely
//! on them.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use palisade_testbed::{
    Topology,
    process::output_with_input,
    rawtcp::{self, Delivered, RawTcp, Segment, flags, pieces},
    recorder::{End, Recorder},
    tls::{Handshake, Hello, certificate, records, retry_request},
    topology::{FAMILIES, Family},
    web::{Caddy, Peer, Talk, Web, Wrk, by_name, curl, h2load, random_file, sha256},
};

const SOON: Duration = Duration::from_secs(5);

fn topology() -> Topology {
    let t = Topology::new().and_then(|t| t.apps(&["client", "server"]));
    let t = t.expect("topology");
    t.meet().expect("neighbours");
    t
}

fn both(t: &Topology) -> [IpAddr; 2] {
    FAMILIES.map(|family| t.addr("server", family))
}

#[test]
fn forged_segments_arrive_unchanged() {
    let t = topology();
    let client = t.ns("client");
    rawtcp::prepare(client).expect("nft");
    rawtcp::prepare(client).expect("nft, again");
    let server = Recorder::start(t.ns("server"), &both(&t), &[80], |dealt_with, all| {
        let said = all[*dealt_with..].to_vec();
        *dealt_with = all.len();
        said
    })
    .expect("recorder");
    for family in FAMILIES {
        let (from, to) = (
            t.addr("client", family),
            SocketAddr::new(t.addr("server", family), 80),
        );
        let data: Vec<u8> = (0..3_000_u32).map(|n| n as u8).collect();
        let end = data.len() as i64;
        for (what, timestamps) in [("plain", false), ("timestamps", true)] {
            let open = if timestamps {
                RawTcp::connect_with_timestamps
            } else {
                RawTcp::connect
            };
            let mut raw = open(client, from, to).expect("connection");
            // Backwards, in fragments, and together with segments that receivers discard.
            let mut all = vec![
                Segment::data(0, b"###").bad_checksum(),
                Segment::data(0, b"###").ttl(1),
                Segment::data(0, b"###").flags(0),
                Segment::data(0, b"###").ack(raw.next().wrapping_add(99_999)),
                Segment::data(0x2000_0000, b"###"),
                Segment::data(0, b"").flags(flags::RST).ttl(1),
            ];
            let mut pieces = pieces(0, &data, 700);
            pieces.reverse();
            for (n, piece) in pieces.into_iter().enumerate() {
                let piece = match n % 3 {
                    0 => piece.fragments(200),
                    1 => piece.fragments(200).backwards(),
                    _ => piece,
                };
                all.push(piece);
            }
            assert_eq!(
                raw.deliver(&all, end, SOON).expect("raw"),
                Delivered::Whole,
                "{what} {family:?}"
            );
            let heard = server.wait(raw.local(), "all of it", SOON, |h| h.bytes.len() >= data.len());
            assert_eq!(heard.expect("bytes").bytes, data, "{what} {family:?}");
            // The echo comes back and is acknowledged.
            assert!(raw.listen(SOON, |raw| raw.received() == data).expect("raw"));
            raw.send(&Segment::data(end, b"").flags(flags::ACK | flags::FIN))
                .expect("raw");
            assert!(raw.listen(SOON, RawTcp::is_finished).expect("raw"));
            let heard = server.wait(raw.local(), "its end", SOON, |h| h.end == End::Finished);
            heard.expect("end");
        }
        // Each end receives the reset of the other.
        let mut raw = RawTcp::connect(client, from, to).expect("connection");
        raw.send(&Segment::data(0, b"").flags(flags::RST)).expect("raw");
        server
            .wait(raw.local(), "its end", SOON, |h| h.end == End::Reset)
            .expect("reset");
        assert_eq!(
            raw.deliver(&[Segment::data(0, b"late")], 4, SOON).expect("raw"),
            Delivered::Reset
        );
        // Sequence numbers that wrap around.
        let mut raw = RawTcp::new(client, from, to).expect("raw");
        raw.set_isn(0_u32.wrapping_sub(5));
        raw.open().expect("connection");
        let outcome = raw.deliver_pieces(0, b"over the edge", 4, SOON).expect("raw");
        assert_eq!(outcome, Delivered::Whole);
    }
    let refused = RawTcp::connect(
        client,
        t.addr("client", Family::V4),
        SocketAddr::new(t.addr("server", Family::V4), 81),
    );
    assert!(refused.is_err());
}

#[test]
fn openssl_accepts_the_hellos() {
    let t = topology();
    let names = certificate(t.dir(), &["www.example"]).expect("certificate");
    let _web = Web::start(t.ns("server"), "web", &[], &[443], &names).expect("nginx");
    for family in FAMILIES {
        let at = SocketAddr::new(t.addr("server", family), 443);
        for hello in [
            Hello::to("www.example"),
            Hello::nameless(),
            Hello::to("www.example").padded(2_000).in_records(100),
        ] {
            let mut talk = Talk::open(t.ns("client"), at, SOON).expect("connection");
            // The hello lacks extensions that the server needs. The server reports that, and not a malformed hello.
            let hello = hello.with(10, &[0, 2, 0, 0x1d]).with(13, &[0, 2, 4, 3]).bytes();
            talk.send(&hello).expect("hello");
            let _ = talk.receive(SOON, |heard| heard.len() >= 7);
            let heard = talk.text().into_bytes();
            let is_decode_error = heard.get(6) == Some(&50);
            assert!(!heard.is_empty() && !is_decode_error, "{heard:?}");
        }
    }
    assert_eq!(records(b"abc", 2), b"\x16\x03\x01\0\x02ab\x16\x03\x01\0\x01c");
    assert_eq!(retry_request().len(), 5 + 4 + 46);
    let mut s_client = t.ns("client").command("openssl");
    s_client.args(["s_client", "-connect"]);
    s_client.arg(format!("{}:443", t.addr("server", Family::V4)));
    let out = output_with_input(&mut s_client, b"Q\n", SOON).expect("openssl");
    assert_eq!(Handshake::of(&out).version, "TLSv1.3");
}

#[test]
fn web_servers_and_clients_work() {
    let t = topology();
    let (client, ns) = (t.ns("client"), t.ns("server"));
    let names = certificate(t.dir(), &["www.example"]).expect("certificate");
    let web = Web::start(ns, "nginx", &[80], &[443], &names).expect("nginx");
    let _caddy = Caddy::start(ns, "caddy", 8080, 8443, &names).expect("caddy");
    let peer = Peer::start(ns, 8081, &both(&t)).expect("peer");
    for family in FAMILIES {
        let at = |port| SocketAddr::new(t.addr("server", family), port);
        for (port, name) in [(80, "nginx"), (8080, "caddy")] {
            let got = curl(client, &[&format!("http://{}/x", at(port))], SOON).expect("curl");
            assert_eq!((got.code, got.status), (0, 200), "{got:?}");
            assert_eq!(got.body, format!("hello from {name}\n"));
        }
        for (port, name) in [(443, "nginx"), (8443, "caddy")] {
            let args = by_name("www.example", at(port), "/y");
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let got = curl(client, &args, SOON).expect("curl");
            assert_eq!(got.body, format!("hello from {name}\n"), "{got:?}");
        }
        let file = t.dir().join("file");
        random_file(&file, 100_000).expect("file");
        let target = format!("http://{}/files/{family:?}", at(80));
        let got = curl(client, &["-T", &file.display().to_string(), &target], SOON).expect("curl");
        assert_eq!(got.status, 201, "{got:?}");
        let stored = web.files().join(format!("{family:?}"));
        assert_eq!(sha256(&stored).expect("sum"), sha256(&file).expect("sum"));

        let url = format!("http://{}", at(8081));
        let got = curl(client, &[&format!("{url}/chunked?5,100")], SOON).expect("curl");
        assert_eq!((got.status, got.body.len()), (200, 500), "{got:?}");
        let said = peer.websocket(client, at(8081), "/ws").expect("websocket");
        assert!(said.contains("echoed"), "{said}");
        let mut talk = Talk::open(client, at(8081), SOON).expect("connection");
        talk.send(b"GET /until-close HTTP/1.1\r\nHost: x\r\n\r\n")
            .expect("request");
        assert!(talk.receive_all(SOON).expect("answer"), "{}", talk.text());
        assert!(talk.text().ends_with("until the end\n"));

        let url = format!("http://{}/load", at(80));
        let counted = Wrk::start(client, &url, 4, 1).and_then(Wrk::finish).expect("wrk");
        assert!(
            counted.answered > 50 && counted.failed + counted.other_status == 0,
            "{counted:?}"
        );
        for (args, other) in [(&["--h1"][..], 0), (&["--h1", "-H", "x: y"], 0)] {
            let args = [args, &["-n", "40", "-c", "2", &url]].concat();
            let counted = h2load(client, &args).expect("h2load");
            assert_eq!(
                (counted.answered, counted.other_status, counted.failed),
                (40, other, 0),
                "{counted:?}"
            );
        }
        // The servers do not speak HTTP/2.
        let counted = h2load(client, &["-n", "4", &url]).expect("h2load");
        assert_eq!(counted.answered, 0, "{counted:?}");
    }
    assert_eq!(peer.requests_for("/ws"), 2);
    let seen = web.seen();
    let by_tls = seen.iter().filter(|s| s.server_name == "www.example").count();
    let put = seen
        .iter()
        .filter(|s| s.request.starts_with("PUT ") && s.status == 201)
        .count();
    assert_eq!((by_tls, put), (2, 2), "{seen:?}");
}
