//! HTTP rules with real programs: which requests reach a server, on which path, in which form, and the responses to denied
//! ones.

use std::{
    collections::BTreeMap,
    io::{ErrorKind, Write},
    net::SocketAddr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use palisade_testbed::{
    Daemon,
    daemon::Hooks,
    output, probe,
    recorder::{End, RecordedConnection, Recorder},
    topology::{FAMILIES, Family},
    web::{Caddy, Curl, Peer, Talk, curl, h2load, random_file, sha256},
};
use palisade_tests::{
    OPEN,
    fixtures::apps::{Apps, PAIRS, answers_requests, apps, has_default_offloads, packets_read},
    fixtures::dns::counted,
    setup::{TCX, XDP_AND_CLSACT, XDP_AT_THE_NIC, client_only, client_only_with, on_all_pairs, tables, webs},
};

const WEB: u16 = 80;
const PEER: u16 = 8080;
const RAW: u16 = 8081;
const CADDY: u16 = 8082;
const PORTS: &[u16] = &[WEB, PEER, RAW, CADDY];

/// The reason for dropping HTTP/2.
const HTTP2: u64 = 250;
const DENIED: &str = "Access denied\r\n";

/// Allows everything below `/allowed`, uploads and downloads of files, and some requests by their header fields.
const RULES: &str = "      rules:
        http:
        - {method: \"GET|HEAD|POST|PUT|OPTIONS\", path: \"/allowed(/.*)?\"}
        - {method: GET, path: \"/query\\\\?a=[0-9]+\"}
        - {method: \"GET|PUT\", path: \"/files/.*\"}
        - {path: /token, headers: [\"X-Token: secret\"]}
        - {path: /present, headers: [\"X-Present\"]}
        - {path: /matched, headerMatches: [{name: X-Match, value: \"yes\"}]}
        - {path: /logged, headerMatches: [{name: X-Match, value: \"yes\", mismatch: LOG}]}
        - {path: /hosted, host: \"good[.]example(:[0-9]+)?\"}
        - {method: CONNECT, host: \"good[.]example:443\"}
";

fn url(to: SocketAddr, path: &str) -> String {
    format!("http://{to}{path}")
}

fn get(apps: &Apps, from: &str, to: SocketAddr, args: &[&str], path: &str) -> Curl {
    let url = url(to, path);
    curl(apps.ns(from), &[args, &[&url]].concat(), OPEN).expect("curl")
}

fn peer(apps: &Apps) -> Peer {
    Peer::start(apps.ns("internet"), PEER, &apps.both("internet")).expect("peer")
}

/// Starts a server that records what it receives and answers each head with a few bytes.
fn recorder(apps: &Apps) -> Recorder {
    Recorder::start(
        apps.ns("internet"),
        &apps.both("internet"),
        &[RAW],
        answers_requests,
    )
    .expect("recorder")
}

fn all_pairs(hooks: Hooks) {
    let apps = apps();
    let names = ["server", "node", "internet"];
    let servers = webs(&apps, names, &[WEB], &[]);
    let daemon = on_all_pairs(&apps, hooks, PORTS, RULES);
    for family in FAMILIES {
        for (from, to) in PAIRS {
            let at = apps.at(to, family, WEB);
            for path in ["/allowed", "/allowed/x?y=z", "/query?a=17"] {
                let got = get(&apps, from, at, &[], path);
                assert!(
                    got.status == 200 && got.body == format!("hello from {to}\n"),
                    "{from} -> {at} {path}: {got:?}\n{}",
                    daemon.report()
                );
            }
            for (args, path) in [
                (&[][..], "/denied"),
                (&[], "/"),
                (&[], "/query?a=b"),
                (&[], "/allowedx"),
                (&["-X", "DELETE"], "/allowed/x"),
                (&["-d", "some=thing"], "/denied"),
            ] {
                let got = get(&apps, from, at, args, path);
                assert!(
                    (got.code, got.status, got.body.as_str()) == (0, 403, DENIED),
                    "{from} -> {at} {path}: {got:?}\n{}",
                    daemon.report()
                );
            }
            // Several requests on one connection, until one is denied.
            let urls = ["/allowed/1", "/denied/2", "/allowed/3"].map(|path| url(at, path));
            let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
            let got = curl(apps.ns(from), &urls, OPEN).expect("curl");
            let hello = format!("hello from {to}\n");
            assert_eq!(
                got.body,
                [&hello, DENIED, &hello].concat(),
                "{from} -> {at}: {got:?}\n{}",
                daemon.report()
            );
        }
    }
    for (name, web) in names.iter().zip(&servers) {
        let seen = web.seen();
        assert!(seen.len() >= 10, "{name}: {seen:?}");
        for seen in seen {
            let good = ["GET /allowed", "GET /query?a=17 "];
            assert!(
                good.iter().any(|good| seen.request.starts_with(good)) && seen.status == 200,
                "{name}: {seen:?}"
            );
        }
    }
    has_default_offloads(&apps);
}

#[test]
fn all_paths_with_tcx_and_xdp_at_the_nic() {
    all_pairs(XDP_AT_THE_NIC);
}

#[test]
fn all_paths_with_tcx_at_every_interface() {
    all_pairs(TCX);
}

#[test]
fn all_paths_with_xdp_and_clsact() {
    all_pairs(XDP_AND_CLSACT);
}

/// A client under [`RULES`] and a server that reports what it received.
struct Messages {
    // Dropped in this order: the daemon ends before the namespaces are removed.
    daemon: Daemon,
    peer: Peer,
    apps: Apps,
}

impl Messages {
    fn new() -> Self {
        let apps = apps();
        let peer = peer(&apps);
        let daemon = client_only(&apps, PORTS, RULES);
        Self { daemon, peer, apps }
    }

    fn get(&self, to: SocketAddr, args: &[&str], path: &str) -> Curl {
        get(&self.apps, "client", to, args, path)
    }

    #[track_caller]
    fn expect(&self, what: &str, got: &Curl, good: bool) {
        assert!(good, "{what}: {got:?}\n{}", self.daemon.report());
    }

    #[track_caller]
    fn expect_denied(&self, what: &str, got: &Curl) {
        self.expect(what, got, got.status == 403 && got.body == DENIED);
    }

    /// Asserts that the server has received allowed requests only.
    #[track_caller]
    fn expect_no_denied_request(&self) {
        for request in self.peer.requests() {
            let path = request["path"].as_str().unwrap_or_default();
            assert!(path.starts_with("/allowed"), "{request}");
        }
    }
}

#[test]
fn request_bodies_of_every_framing_pass() {
    let messages = Messages::new();
    let body = messages.apps.topology.dir().join("body");
    random_file(&body, 300_000).expect("file");
    let sum = sha256(&body).expect("sum");
    let (from_body, file) = (format!("@{}", body.display()), body.display().to_string());
    let cases = [
        ("length", &["-H", "Expect:", "--data-binary", &from_body][..]),
        (
            "expectation",
            &["-H", "Expect: 100-continue", "--data-binary", &from_body],
        ),
        (
            "chunks",
            &["-H", "Transfer-Encoding: chunked", "-H", "Expect:", "-T", &file],
        ),
        (
            "chunks, expectation",
            &["-H", "Transfer-Encoding: chunked", "-T", &file],
        ),
    ];
    for family in FAMILIES {
        let at = messages.apps.at("internet", family, PEER);
        for (what, args) in cases {
            let got = messages.get(at, args, "/allowed/up");
            messages.expect(what, &got, got.status == 200 && got.body.contains(&sum));
            messages.expect_denied(what, &messages.get(at, args, "/denied/up"));
        }
    }
    messages.expect_no_denied_request();
}

#[test]
fn responses_of_every_framing_pass() {
    let messages = Messages::new();
    let client = messages.apps.ns("client");
    for family in FAMILIES {
        let at = messages.apps.at("internet", family, PEER);
        let got = messages.get(at, &["-i"], "/allowed/chunked?40,3000");
        let chunks = got.body.matches("AAA").count() > 900 && got.body.contains("X-Sum: ");
        messages.expect("chunks", &got, got.status == 200 && chunks);
        for (path, status, body) in [
            ("/allowed/nothing", 204, ""),
            ("/allowed/same", 304, ""),
            ("/allowed/hints", 200, "after hints\n"),
            ("/allowed/until-close", 200, "until the end\n"),
            ("/allowed/slow", 200, "slow\n"),
        ] {
            // Twice where the connection persists, so that the parser must find the next message.
            let url = url(at, path);
            let got = curl(client, &[&url, &url], OPEN).expect("curl");
            messages.expect(
                path,
                &got,
                got.code == 0 && got.status == status && got.body == body.repeat(2),
            );
        }
        // A response to HEAD has no body, whatever its head says.
        let (head, plain) = (url(at, "/allowed/head"), url(at, "/allowed/plain"));
        let got = curl(client, &["-I", &head, "--next", "-sS", &plain], OPEN).expect("curl");
        let next = got.body.contains("\"GET\", \"path\": \"/allowed/plain\"");
        messages.expect("HEAD", &got, got.code == 0 && next);
        let got = messages.get(at, &["-I"], "/denied/head");
        messages.expect("HEAD, denied", &got, got.code == 0 && got.status == 403);
    }
    messages.expect_no_denied_request();
}

#[test]
fn http_1_0_an_unaccepted_upgrade_and_another_server() {
    let messages = Messages::new();
    let certificate = &messages.apps.certificate;
    let _caddy =
        Caddy::start(messages.apps.ns("internet"), "caddy", CADDY, 8443, certificate).expect("caddy");
    for family in FAMILIES {
        let at = messages.apps.at("internet", family, PEER);
        for (what, args) in [
            ("HTTP/1.0", &["-0"][..]),
            ("HTTP/1.0, keep-alive", &["-0", "-H", "Connection: keep-alive"]),
        ] {
            let got = messages.get(at, args, "/allowed/old");
            messages.expect(what, &got, got.status == 200);
            messages.expect_denied(what, &messages.get(at, args, "/denied/old"));
        }
        // The server does not accept the upgrade to HTTP/2.
        let got = messages.get(at, &["--http2"], "/allowed/offer");
        messages.expect("h2c", &got, got.status == 200);
        let caddy = messages.apps.at("internet", family, CADDY);
        let got = messages.get(caddy, &[], "/allowed");
        let hello = got.status == 200 && got.body == "hello from caddy\n";
        messages.expect("caddy", &got, hello);
        messages.expect_denied("caddy", &messages.get(caddy, &[], "/denied"));
    }
    messages.expect_no_denied_request();
}

#[test]
fn upgrades_to_other_protocols() {
    let apps = apps();
    let peer = peer(&apps);
    let daemon = client_only(&apps, PORTS, RULES);
    let client = apps.ns("client");
    for family in FAMILIES {
        let at = apps.at("internet", family, PEER);
        let said = peer.websocket(client, at, "/allowed/ws").expect("websocket");
        assert!(
            said.starts_with("HTTP/1.1 101") && said.contains("echoed 351"),
            "{said}\n{}",
            daemon.report()
        );
        let said = peer.websocket(client, at, "/denied/ws").expect("websocket");
        assert!(
            said.starts_with("HTTP/1.1 403") && said.contains("Access denied"),
            "{said}\n{}",
            daemon.report()
        );
        // Without a request for it there is no upgrade.
        let got = get(&apps, "client", at, &[], "/allowed/ws");
        assert_eq!(got.status, 426, "{got:?}\n{}", daemon.report());
        let got = get(&apps, "client", at, &[], "/allowed/liar");
        assert!(
            got.code != 0 && !got.body.contains("no HTTP"),
            "{got:?}\n{}",
            daemon.report()
        );
        // A request after an Upgrade request waits for the response.
        let mut talk = Talk::open(client, at, OPEN).expect("connection");
        talk.send(
            b"GET /allowed/slow HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\
              GET /denied/behind HTTP/1.1\r\nHost: x\r\n\r\n",
        )
        .expect("requests");
        let ended = talk.receive_all(OPEN).expect("answers");
        let text = talk.text();
        assert!(
            ended && text.starts_with("HTTP/1.1 200") && text.ends_with(DENIED),
            "{text}\n{}",
            daemon.report()
        );

        // A tunnel, by CONNECT.
        for (host, allowed) in [("good.example:443", true), ("evil.example:443", false)] {
            let mut talk = Talk::open(client, at, OPEN).expect("connection");
            talk.send(format!("CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes())
                .expect("a request");
            talk.receive(OPEN, |heard| heard.windows(4).any(|w| w == b"\r\n\r\n"))
                .expect("an answer");
            if !allowed {
                assert!(talk.text().starts_with("HTTP/1.1 403"), "{}", talk.text());
                continue;
            }
            assert!(
                talk.text().starts_with("HTTP/1.1 200"),
                "{}\n{}",
                talk.text(),
                daemon.report()
            );
            let before = packets_read(&daemon).expect("status");
            for n in 0..50 {
                // Arbitrary bytes, also such that look like a request.
                let said = format!("GET /denied/{n} HTTP/1.1\r\n\r\n");
                talk.send(said.as_bytes()).expect("bytes");
                talk.receive(OPEN, |heard| heard.ends_with(said.as_bytes()))
                    .expect("an echo");
                assert!(
                    talk.text().ends_with(&said),
                    "{}\n{}",
                    talk.text(),
                    daemon.report()
                );
            }
            let read = packets_read(&daemon).expect("status") - before;
            assert!(read < 20, "{read} packets\n{}", daemon.report());
        }
    }
    assert_eq!(
        peer.requests_for("/denied/ws") + peer.requests_for("/denied/behind"),
        0
    );
    assert_eq!(peer.requests_for("evil.example:443"), 0);
}

#[test]
fn pipelined_requests() {
    let apps = apps();
    let peer = peer(&apps);
    let daemon = client_only(&apps, PORTS, RULES);
    for family in FAMILIES {
        let at = apps.at("internet", family, PEER);
        let requests = |paths: &[&str]| -> Vec<u8> {
            paths
                .iter()
                .flat_map(|path| format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").into_bytes())
                .collect()
        };
        let all = requests(&[
            "/allowed/1",
            "/allowed/slow",
            "/allowed/chunked?3,500",
            "/allowed/nothing",
            "/allowed/5",
            "/denied/6",
            "/allowed/7",
        ]);
        // At once, in pieces, and byte by byte.
        for size in [all.len(), 60, 1] {
            let before = peer.requests().len();
            let mut talk = Talk::open(apps.ns("client"), at, OPEN).expect("connection");
            for piece in all.chunks(size) {
                // The connection may end before all bytes are sent.
                if talk.send(piece).is_err() {
                    break;
                }
            }
            let ended = talk.receive_all(OPEN).expect("answers");
            let text = talk.text();
            let statuses: Vec<&str> = text
                .split("HTTP/1.1 ")
                .skip(1)
                .map(|answer| &answer[..3])
                .collect();
            assert_eq!(
                (ended, &statuses[..]),
                (true, &["200", "200", "200", "204", "200", "403"][..]),
                "{size} {family:?}: {text}\n{}",
                daemon.report()
            );
            assert!(text.ends_with(DENIED), "{text}");
            let seen: Vec<String> = peer.requests()[before..]
                .iter()
                .map(|r| r["path"].as_str().unwrap_or_default().to_owned())
                .collect();
            let asked = [
                "/allowed/1",
                "/allowed/slow",
                "/allowed/chunked?3,500",
                "/allowed/nothing",
                "/allowed/5",
            ];
            assert_eq!(seen, asked, "{size} {family:?}\n{}", daemon.report());
        }
    }
}

#[test]
fn paths_are_matched_as_sent_and_as_normalized() {
    let apps = apps();
    let peer = peer(&apps);
    let daemon = client_only(&apps, PORTS, RULES);
    let bad = [
        "/allowed/../denied",
        "/allowed/..",
        "/allowed/./../denied",
        "/allowed/x/../../denied",
        "/allowed/%2e%2e/denied",
        "/allowed/%2E%2e/denied",
        "/allowed/.%2e/denied",
        "/allowed/%2e%2e%2fdenied",
        "/allowed/..%2fdenied",
        "/allowed%2f..%2fdenied",
        "/allowed/%252e%252e/denied",
        "/allowed/%25%32%65%25%32%65/denied",
        "/allowed//../../denied",
        "/allowed/..//denied",
        "/allowed/..\\denied",
        "/allowed\\..\\denied",
        "/allowed/%5c..%5cdenied",
        "/allowed/..;/denied",
        "/allowed/..;x=y/denied",
        "/allowed/%00",
        "/allowed/%zz",
        "/denied/../allowed/x",
        "/./allowed/x",
        "//allowed/x",
        "/%61llowed/x",
        "/ALLOWED/x",
    ];
    let good = [
        "/allowed/./x",
        "/allowed/x/../y",
        "/allowed//x",
        "/allowed/%41",
        "/allowed/a%20b",
        "/allowed/x?/../../denied",
        "/allowed/x?%2e%2e/denied",
        "/allowed/...",
        "/allowed/..x",
    ];
    for family in FAMILIES {
        let at = apps.at("internet", family, PEER);
        for path in bad {
            let got = get(&apps, "client", at, &[], path);
            assert!(
                (got.status, got.body.as_str()) == (403, DENIED),
                "{path} {family:?}: {got:?}\n{}",
                daemon.report()
            );
        }
        for path in good {
            let got = get(&apps, "client", at, &[], path);
            assert_eq!(got.status, 200, "{path} {family:?}: {got:?}\n{}", daemon.report());
        }
    }
    for request in peer.requests() {
        assert!(good.iter().any(|path| request["path"] == *path), "{request}");
    }
    drop(daemon);
    // An operator with a known server can match paths as sent.
    let settings = tables("[http]\npath_normalization = \"raw\"\n");
    let daemon = client_only_with(&apps, &settings, PORTS, RULES);
    let at = apps.at("internet", Family::V4, PEER);
    let got = get(&apps, "client", at, &[], "/allowed/../denied");
    assert_eq!(got.status, 200, "{got:?}\n{}", daemon.report());
    let got = get(&apps, "client", at, &[], "/denied/../allowed/x");
    assert_eq!(got.status, 403, "{got:?}\n{}", daemon.report());
}

#[test]
fn rules_on_hosts_and_header_fields() {
    let apps = apps();
    let peer = peer(&apps);
    let daemon = client_only(&apps, PORTS, RULES);
    let cases: &[(&str, &[&str], u16)] = &[
        ("/token", &["X-Token: secret"], 200),
        ("/token", &["x-tOKEN: secret"], 200),
        ("/token", &["X-Token:secret"], 200),
        ("/token", &["X-Token: secret", "X-Token: secret"], 200),
        ("/token", &[], 403),
        ("/token", &["X-Token: Secret"], 403),
        ("/token", &["X-Token: secret2"], 403),
        ("/token", &["X-Token: other", "X-Token: secret"], 403),
        ("/token", &["X-Token: secret", "X-Token: other"], 403),
        ("/token", &["X-Token: secret, other"], 403),
        ("/token", &["X-Tokens: secret"], 403),
        ("/present", &["X-Present: whatever"], 200),
        ("/present", &["X-Present: a", "X-Present: b"], 200),
        ("/present", &[], 403),
        ("/matched", &["X-Match: yes"], 200),
        ("/matched", &["X-Match: no"], 403),
        ("/matched", &["X-Match: yes", "X-Match: no"], 403),
        ("/matched", &[], 403),
        ("/logged", &["X-Match: yes"], 200),
        ("/logged", &["X-Match: no"], 200),
        ("/logged", &[], 200),
        ("/hosted", &["Host: good.example"], 200),
        ("/hosted", &["Host: good.example:8080"], 200),
        ("/hosted", &["Host: evil.example"], 403),
        ("/hosted", &["Host: good.example.evil.example"], 403),
        (
            "/hosted",
            &["Host: evil.example", "X-Forwarded-Host: good.example"],
            403,
        ),
    ];
    for family in FAMILIES {
        let at = apps.at("internet", family, PEER);
        for (path, fields, status) in cases {
            // Written by hand, because curl adds a Host field.
            let mut head = format!("GET {path} HTTP/1.1\r\nConnection: close\r\n");
            if !fields.iter().any(|field| field.starts_with("Host:")) {
                head += "Host: x\r\n";
            }
            for field in *fields {
                head += &format!("{field}\r\n");
            }
            let mut talk = Talk::open(apps.ns("client"), at, OPEN).expect("connection");
            talk.send((head + "\r\n").as_bytes()).expect("a request");
            let ended = talk.receive_all(OPEN).expect("an answer");
            let text = talk.text();
            assert!(
                ended && text.starts_with(&format!("HTTP/1.1 {status} ")),
                "{path} {fields:?}: {text}\n{}",
                daemon.report()
            );
        }
    }
    let allowed = cases.iter().filter(|(_, _, status)| *status == 200).count();
    assert_eq!(peer.requests().len(), 2 * allowed);
}

/// Returns heads that are ambiguous or malformed.
fn ambiguous() -> Vec<(&'static str, Vec<u8>)> {
    let with = |fields: &str| -> Vec<u8> {
        format!("POST /allowed/x HTTP/1.1\r\nHost: x\r\n{fields}\r\n").into_bytes()
    };
    let smuggled = "GET /denied/smuggled HTTP/1.1\r\nHost: x\r\n\r\n";
    let body = |fields: &str, body: &str| [with(fields), body.as_bytes().to_vec()].concat();
    let mut cases = vec![
        (
            "length and chunks",
            body(
                "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
                &format!("0\r\n\r\n{smuggled}"),
            ),
        ),
        (
            "chunks and length",
            body(
                &format!(
                    "Transfer-Encoding: chunked\r\nContent-Length: {}\r\n",
                    smuggled.len() + 5
                ),
                &format!("0\r\n\r\n{smuggled}"),
            ),
        ),
        (
            "two lengths",
            body("Content-Length: 5\r\nContent-Length: 6\r\n", "hello"),
        ),
        (
            "the same length twice",
            body("Content-Length: 5\r\nContent-Length: 5\r\n", "hello"),
        ),
        ("a list of lengths", body("Content-Length: 5, 5\r\n", "hello")),
        ("a length with a sign", body("Content-Length: +5\r\n", "hello")),
        ("a negative length", body("Content-Length: -1\r\n", "hello")),
        (
            "a length in hexadecimal",
            body("Content-Length: 0x5\r\n", "hello"),
        ),
        ("an empty length", body("Content-Length:\r\n", "hello")),
        (
            "a length beyond all numbers",
            body("Content-Length: 99999999999999999999999\r\n", "hello"),
        ),
        ("a length in quotes", body("Content-Length: \"5\"\r\n", "hello")),
        ("chunks twice", with("Transfer-Encoding: chunked, chunked\r\n")),
        (
            "chunks in two fields",
            with("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"),
        ),
        ("identity", with("Transfer-Encoding: identity\r\n")),
        ("another coding", with("Transfer-Encoding: gzip\r\n")),
        (
            "another coding below",
            with("Transfer-Encoding: gzip, chunked\r\n"),
        ),
        ("nearly chunks", with("Transfer-Encoding: xchunked\r\n")),
        ("chunks and more", with("Transfer-Encoding: chunked;q=1\r\n")),
        (
            "chunks after a vertical tab",
            with("Transfer-Encoding: \x0bchunked\r\n"),
        ),
        (
            "white space before a colon",
            with("Transfer-Encoding : chunked\r\n"),
        ),
        ("white space in a name", with("X Y: z\r\n")),
        ("a field without a name", with(": x\r\n")),
        ("a field without a colon", with("nothing\r\n")),
        ("a folded field", with("X-Folded: a\r\n b\r\n")),
        (
            "a folded first field",
            b"GET /allowed HTTP/1.1\r\n Host: x\r\n\r\n".to_vec(),
        ),
        (
            "a line feed alone",
            b"GET /allowed HTTP/1.1\nHost: x\n\n".to_vec(),
        ),
        ("a line feed alone among others", with("X: y\nZ: z\r\n")),
        ("a carriage return alone", with("X: y\rZ: z\r\n")),
        ("a NUL", with("X: a\0b\r\n")),
        (
            "a NUL in the path",
            b"GET /allowed\0 HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        ),
        ("two hosts", with("Host: y\r\n")),
        ("no host", b"GET /allowed HTTP/1.1\r\n\r\n".to_vec()),
        (
            "a host with a path",
            b"GET /allowed HTTP/1.1\r\nHost: x/y\r\n\r\n".to_vec(),
        ),
        (
            "a host with a name before it",
            b"GET /allowed HTTP/1.1\r\nHost: a@x\r\n\r\n".to_vec(),
        ),
        (
            "a whole URI and another host",
            b"GET http://y/allowed HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        ),
        (
            "two spaces",
            b"GET  /allowed HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        ),
        (
            "a tab for a space",
            b"GET\t/allowed HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        ),
        (
            "something behind the version",
            b"GET /allowed HTTP/1.1 x\r\nHost: x\r\n\r\n".to_vec(),
        ),
        (
            "another version",
            b"GET /allowed HTTP/1.2\r\nHost: x\r\n\r\n".to_vec(),
        ),
        ("version 2", b"GET /allowed HTTP/2.0\r\nHost: x\r\n\r\n".to_vec()),
        (
            "chunks in version 1.0",
            b"POST /allowed HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_vec(),
        ),
        ("no version", b"GET /allowed\r\n\r\n".to_vec()),
        (
            "a relative path",
            b"GET allowed HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        ),
    ];
    cases.push((
        "a long line",
        with(&format!("X-Long: {}\r\n", "y".repeat(17_000))),
    ));
    cases.push((
        "a long head",
        with(&format!("X-Long: {}\r\n", "y".repeat(9_000)).repeat(8)),
    ));
    cases.push(("many fields", with(&"X: y\r\n".repeat(130))));
    cases
}

#[test]
fn ambiguous_requests_are_refused() {
    let apps = apps();
    let hears = recorder(&apps);
    let daemon = client_only(&apps, PORTS, RULES);
    let cases = ambiguous();
    thread::scope(|scope| {
        for family in FAMILIES {
            let (apps, hears, daemon, cases) = (&apps, &hears, &daemon, &cases);
            scope.spawn(move || {
                let at = apps.at("internet", family, RAW);
                for (what, bytes) in cases {
                    // Alone, and after an allowed request.
                    let first = b"GET /allowed/first HTTP/1.1\r\nHost: x\r\n\r\n";
                    for before in [&b""[..], first] {
                        let mut talk = Talk::open(apps.ns("client"), at, OPEN).expect("connection");
                        let local = talk.stream().local_addr().expect("address");
                        talk.send(&[before, bytes].concat()).expect("bytes");
                        let ended = talk.receive_all(OPEN);
                        let text = talk.text();
                        let answers = if before.is_empty() {
                            ""
                        } else {
                            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
                        };
                        let refused = text.strip_prefix(answers).unwrap_or_default();
                        // RFC 6585, section 5: too large a head has its own status.
                        let status = match *what {
                            "a long line" | "a long head" | "many fields" => "HTTP/1.1 431 ",
                            _ => "HTTP/1.1 400 ",
                        };
                        assert!(
                            ended.as_ref().is_ok_and(|ended| *ended) && refused.starts_with(status),
                            "{what}, {} before, {family:?}: {ended:?} {text}\n{}",
                            before.len(),
                            daemon.report()
                        );
                        let heard = hears
                            .wait(local, "its end", OPEN, |heard| heard.end != End::Open)
                            .expect("the server's side is closed");
                        assert_eq!(
                            heard.bytes,
                            before,
                            "{what} {family:?}: the server has heard {:?}",
                            String::from_utf8_lossy(&heard.bytes)
                        );
                    }
                }
            });
        }
    });
    daemon
        .wait_flows(
            &[
                "--type",
                "l7",
                "--verdict",
                "DROPPED",
                "--drop-reason-desc",
                "241",
            ],
            "the kinds are named",
            |flows| {
                [
                    "Content-Length with Transfer-Encoding",
                    "bare CR or LF",
                    "several Hosts",
                ]
                .iter()
                .all(|kind| {
                    let summary = format!("Unreadable: {kind}");
                    flows.iter().any(|flow| flow["Summary"] == summary.as_str())
                })
            },
        )
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
}

#[test]
fn a_body_ends_at_its_first_invalid_chunk() {
    let apps = apps();
    let hears = recorder(&apps);
    let daemon = client_only(&apps, PORTS, RULES);
    let head = "POST /allowed/body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    let good = "5\r\nhello\r\n";
    let smuggled = "GET /denied/smuggled HTTP/1.1\r\nHost: x\r\n\r\n";
    let cases = [
        ("no number", "hello\r\n"),
        ("a sign", "+5\r\nhello\r\n"),
        ("a prefix", "0x5\r\nhello\r\n"),
        ("white space before", " 5\r\nhello\r\n"),
        ("white space behind", "5 \r\nhello\r\n"),
        ("an extension", "5;a=b\r\nhello\r\n"),
        ("a line feed alone", "5\nhello\r\n"),
        ("too large a number", "fffffffffffffffff\r\nhello\r\n"),
        ("a number that turns negative", "ffffffffffffffff\r\nhello\r\n"),
        ("content that is too long", "5\r\nhello!\r\n"),
        ("content that is too short", "6\r\nhello\r\n0\r\n\r\n"),
        ("a trailer that frames", "0\r\nContent-Length: 5\r\n\r\n"),
        ("a trailer that is folded", "0\r\nX: y\r\n z\r\n\r\n"),
        ("a trailer without a colon", "0\r\nnothing\r\n\r\n"),
    ];
    for family in FAMILIES {
        let at = apps.at("internet", family, RAW);
        for (what, bad) in cases {
            let mut talk = Talk::open(apps.ns("client"), at, OPEN).expect("connection");
            let local = talk.stream().local_addr().expect("address");
            talk.send([head, good, bad, smuggled].concat().as_bytes())
                .expect("bytes");
            // By FIN or by a reset: the server may have begun to answer.
            let _ = talk.receive_all(OPEN);
            let heard = hears
                .wait(local, "its end", OPEN, |heard| heard.end != End::Open)
                .unwrap_or_else(|error| panic!("{what}: {error:#}\n{}", daemon.report()));
            let text = String::from_utf8_lossy(&heard.bytes).into_owned();
            assert!(
                text.starts_with(&[head, good].concat()[..text.len().min(head.len() + good.len())])
                    && !text.contains("smuggled"),
                "{what} {family:?}: {text}\n{}",
                daemon.report()
            );
        }
        // Valid chunks with a trailer, and a request after them.
        let all = [
            head,
            good,
            "A\r\n0123456789\r\n0\r\nX-Sum: y\r\n\r\n",
            &smuggled.replace("denied", "allowed"),
        ]
        .concat();
        let mut talk = Talk::open(apps.ns("client"), at, OPEN).expect("connection");
        let local = talk.stream().local_addr().expect("address");
        talk.send(all.as_bytes()).expect("bytes");
        hears
            .wait(local, "all of it", OPEN, |heard| heard.bytes == all.as_bytes())
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    }
}

#[test]
fn other_protocols_are_reset_and_http2_has_its_own_reason() {
    let apps = apps();
    let hears = recorder(&apps);
    let [web] = webs(&apps, ["internet"], &[WEB], &[]);
    let daemon = client_only(&apps, PORTS, RULES);
    for family in FAMILIES {
        let at = apps.at("internet", family, RAW);
        for (what, bytes) in [
            ("TLS", palisade_testbed::tls::Hello::to("good.example").bytes()),
            ("zeros", vec![0; 100]),
            ("white space", b"  GET /allowed HTTP/1.1\r\n".to_vec()),
            ("empty lines", b"\r\n\r\n\r\n\r\n\r\n\r\n\r\n\r\n".to_vec()),
            (
                "HTTP/2",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec(),
            ),
        ] {
            let mut talk = Talk::open(apps.ns("client"), at, OPEN).expect("connection");
            let local = talk.stream().local_addr().expect("address");
            talk.send(&bytes).expect("bytes");
            let end = talk.receive_all(OPEN);
            assert!(
                end.as_ref()
                    .is_err_and(|error| error.kind() == ErrorKind::ConnectionReset),
                "{what} {family:?}: {end:?} {}\n{}",
                talk.text(),
                daemon.report()
            );
            let heard: RecordedConnection = hears
                .wait(local, "its end", OPEN, |heard| heard.end == End::Reset)
                .expect("reset on the server's side");
            assert!(heard.bytes.is_empty(), "{what}: {heard:?}");
        }
        let at = apps.at("internet", family, WEB);
        let url = url(at, "/allowed");
        let counted = h2load(apps.ns("client"), &["-n", "20", "-c", "2", "-m", "4", &url]).expect("h2load");
        assert_eq!(counted.answered, 0, "{counted:?}\n{}", daemon.report());
        let got = curl(apps.ns("client"), &["--http2-prior-knowledge", &url], OPEN).expect("curl");
        assert!(got.code != 0 && got.status == 0, "{got:?}\n{}", daemon.report());
        assert_eq!(web.seen().len(), if family == Family::V4 { 0 } else { 400 });
        // The same program over HTTP/1.1 gets everything, with several pipelined requests.
        let args = ["--h1", "-n", "400", "-c", "4", "-m", "8", &url];
        let counted = h2load(apps.ns("client"), &args).expect("h2load");
        assert_eq!(
            (counted.answered, counted.other_status, counted.failed),
            (400, 0, 0),
            "{counted:?}\n{}",
            daemon.report()
        );
    }
    daemon
        .wait_status("HTTP/2 is counted", |status| counted(status, HTTP2) >= 4)
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
}

#[test]
fn an_endless_head_is_aborted() {
    let apps = apps();
    let hears = recorder(&apps);
    let settings = tables("[http]\nheader_timeout = \"2s\"\n");
    let daemon = client_only_with(&apps, &settings, PORTS, RULES);
    let head = b"GET /allowed/never HTTP/1.1\r\nHost: x\r\nX-Slow: y\r\n";
    thread::scope(|scope| {
        for family in FAMILIES {
            for slowly in [false, true] {
                let (apps, hears, daemon) = (&apps, &hears, &daemon);
                scope.spawn(move || {
                    let at = apps.at("internet", family, RAW);
                    let mut talk = Talk::open(apps.ns("client"), at, OPEN).expect("connection");
                    let local = talk.stream().local_addr().expect("address");
                    // A complete head first, and then a longer one that does not end.
                    talk.send(b"GET /allowed/1 HTTP/1.1\r\nHost: x\r\n\r\n")
                        .expect("bytes");
                    talk.receive(OPEN, |heard| heard.ends_with(b"ok"))
                        .expect("an answer");
                    thread::sleep(Duration::from_millis(2_600));
                    talk.send(b"GET /allowed/2 HTTP/1.1\r\nHost: x\r\n\r\n")
                        .expect("bytes");
                    talk.receive(OPEN, |heard| {
                        heard.ends_with(b"okHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                    })
                    .expect("an answer");
                    let begin = Instant::now();
                    if slowly {
                        // Each byte in time, but never a complete head.
                        for byte in head.iter().cycle() {
                            let said = talk.send(&[*byte]);
                            if said.is_err() || begin.elapsed() > OPEN {
                                break;
                            }
                            thread::sleep(Duration::from_millis(100));
                        }
                    } else {
                        talk.send(head).expect("bytes");
                    }
                    let end = talk.receive_all(OPEN);
                    let took = begin.elapsed();
                    assert!(
                        !matches!(end, Ok(false)) && (1_500..18_000).contains(&took.as_millis()),
                        "slowly: {slowly} {family:?}: {end:?} after {took:?}\n{}",
                        daemon.report()
                    );
                    let heard = hears
                        .wait(local, "its end", OPEN, |heard| heard.end != End::Open)
                        .expect("the server's side is closed");
                    let text = String::from_utf8_lossy(&heard.bytes).into_owned();
                    assert!(!text.contains("never"), "{text}");
                });
            }
        }
    });
}

#[test]
fn clients_that_wait_for_acknowledgements_are_not_stalled() {
    let apps = apps();
    let _peer = peer(&apps);
    let daemon = client_only(&apps, PORTS, RULES);
    let script = "import http.client, sys, time\n\
        t = time.time()\n\
        c = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=9)\n\
        for n in range(10):\n\
        \x20 c.putrequest('POST', '/allowed/python'); c.putheader('Transfer-Encoding', 'chunked'); c.endheaders()\n\
        \x20 for m in range(5): c.send(b'5\\r\\nhello\\r\\n')\n\
        \x20 c.send(b'0\\r\\n\\r\\n')\n\
        \x20 r = c.getresponse(); assert r.status == 200, r.status; assert b'\"size\": 25' in r.read()\n\
        print(time.time() - t)";
    for family in FAMILIES {
        let at = apps.at("internet", family, PEER);
        // Nagle's algorithm is on unless a program turns it off.
        let mut stream = probe::open(apps.ns("client"), None, at, OPEN).expect("connection");
        stream.set_read_timeout(Some(OPEN)).expect("timeout");
        let begin = Instant::now();
        for _ in 0..10 {
            for piece in [
                "GET /allowed/pie",
                "ces HTTP/1.1\r\nHo",
                "st: x\r\nX-More: y\r\n",
                "\r\n",
            ] {
                stream.write_all(piece.as_bytes()).expect("a piece");
            }
            let mut answer = Vec::new();
            let mut buffer = [0; 4096];
            while !answer.ends_with(b"}\n") {
                let n = std::io::Read::read(&mut stream, &mut buffer).expect("an answer");
                assert!(n > 0, "closed\n{}", daemon.report());
                answer.extend_from_slice(&buffer[..n]);
            }
        }
        let took = begin.elapsed();
        assert!(took < Duration::from_secs(2), "{took:?}\n{}", daemon.report());
        let mut python = apps.ns("client").command("python3");
        python.args(["-c", script, &at.ip().to_string(), &at.port().to_string()]);
        let out = output(&mut python, OPEN * 2).expect("python");
        let text = String::from_utf8_lossy(&out.stdout);
        let took: f64 = text.trim().parse().unwrap_or(99.0);
        assert!(took < 4.0, "{out:?}\n{}", daemon.report());
    }
}

#[test]
fn large_bodies_are_offloaded() {
    const SIZE: u64 = 120_000_000;
    let apps = apps();
    let servers = webs(&apps, ["internet", "node"], &[WEB], &[]);
    for web in &servers {
        random_file(&web.files().join("down"), SIZE).expect("file");
    }
    let up = apps.topology.dir().join("up");
    random_file(&up, SIZE).expect("file");
    let sum_up = sha256(&up).expect("sum");
    let daemon = on_all_pairs(&apps, Hooks::default(), PORTS, RULES);
    for (from, to, web, family) in [
        ("client", "internet", &servers[0], Family::V4),
        ("internet", "node", &servers[1], Family::V6),
        ("node", "internet", &servers[0], Family::V6),
    ] {
        let at = apps.at(to, family, WEB);
        let before = packets_read(&daemon).expect("status");
        let got = apps.topology.dir().join("got");
        let (got_text, up_text) = (got.display().to_string(), up.display().to_string());
        // Both directions on one connection, with a request after them.
        let name = format!("up-{from}");
        let urls = [
            url(at, "/files/down"),
            url(at, &format!("/files/{name}")),
            url(at, "/allowed/behind"),
            url(at, "/denied/behind"),
        ];
        let args = [
            &urls[0], "-o", &got_text, "--next", "-sS", "-T", &up_text, &urls[1], "--next", "-sS", &urls[2],
            &urls[3],
        ];
        let got_all = curl(apps.ns(from), &args, Duration::from_secs(60)).expect("curl");
        assert!(
            got_all.code == 0 && got_all.body == format!("hello from {to}\n{DENIED}"),
            "{from} -> {to}: {got_all:?}\n{}",
            daemon.report()
        );
        let sum = |path: &Path| sha256(path).expect("sum");
        assert_eq!(sum(&got), sum(&web.files().join("down")), "{from} -> {to}: down");
        assert_eq!(sum(&web.files().join(&name)), sum_up, "{from} -> {to}: up");
        let read = packets_read(&daemon).expect("status") - before;
        assert!(
            read < 1_000,
            "{from} -> {to}: {read} packets were read\n{}",
            daemon.report()
        );
    }
    // Large and small chunks.
    let peer = peer(&apps);
    let at = apps.at("internet", Family::V4, PEER);
    for (count, size, most) in [(4, 20_000_000, 15_000), (5_000, 1_000, 10_000)] {
        let before = packets_read(&daemon).expect("status");
        let url = url(at, &format!("/allowed/chunked?{count},{size}"));
        // Long enough for a busy machine.
        let patience = Duration::from_secs(40);
        let got = curl(apps.ns("client"), &["-H", "X: y", &url], patience).expect("curl");
        let expected: usize = count * size;
        assert_eq!(
            (got.code, got.body.len()),
            (0, expected),
            "{}\n{}",
            got.error,
            daemon.report()
        );
        let read = packets_read(&daemon).expect("status") - before;
        assert!(read < most, "{read} packets were read\n{}", daemon.report());
    }
    assert_eq!(peer.requests().len(), 2);
}

#[test]
fn flow_records_name_request_response_verdict_and_rule() {
    let apps = apps();
    let _peer = peer(&apps);
    let daemon = client_only(&apps, PORTS, RULES);
    for family in FAMILIES {
        let at = apps.at("internet", family, PEER);
        let secrets = [
            "-A",
            "test/1",
            "-H",
            "Authorization: Bearer hidden",
            "-H",
            "X-Request-Id: 42",
        ];
        get(&apps, "client", at, &secrets, "/allowed/flow?token=hidden&n=1");
        get(&apps, "client", at, &[], "/allowed/slow");
        get(&apps, "client", at, &[], "/denied/flow");
        get(&apps, "client", at, &["-H", "X-Match: no"], "/logged");
        let from = apps.topology.addr("client", family).to_string();
        let to = at.ip().to_string();
        let wait = |filters: &[&str], what: &str, wanted: &dyn Fn(&serde_json::Value) -> bool| {
            daemon
                .wait_flows(&[&["--type", "l7"], filters].concat(), what, |flows| {
                    flows.iter().any(wanted)
                })
                .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
        };
        wait(
            &["--from-ip", &from, "--to-ip", &to, "--verdict", "FORWARDED"],
            "the request",
            &|flow| {
                let http = &flow["l7"]["http"];
                flow["l7"]["type"] == "REQUEST"
                    && http["method"] == "GET"
                    && http["protocol"] == "HTTP/1.1"
                    && http["url"].as_str().is_some_and(|url| {
                        url.starts_with(&format!("http://{at}/allowed/flow?")) && !url.contains("hidden")
                    })
                    && flow["egress_allowed_by"][0]["name"] == "client-egress"
                    && !flow.to_string().contains("hidden")
                    && flow.to_string().contains("test/1")
            },
        );
        wait(
            &["--from-ip", &to, "--to-ip", &from, "--reply", "true"],
            "the answer",
            &|flow| {
                let latency = &flow["l7"]["latency_ns"];
                let latency = latency.as_u64().or_else(|| latency.as_str()?.parse().ok());
                flow["l7"]["type"] == "RESPONSE"
                    && flow["l7"]["http"]["code"] == 200
                    && flow["l7"]["http"]["url"] == format!("http://{at}/allowed/slow")
                    && latency.is_some_and(|ns| (250_000_000..5_000_000_000_u64).contains(&ns))
            },
        );
        wait(
            &["--from-ip", &from, "--to-ip", &to, "--verdict", "DROPPED"],
            "the refusal",
            &|flow| {
                flow["drop_reason"] == 240
                    && flow["l7"]["http"]["url"] == format!("http://{at}/denied/flow")
                    && flow["egress_denied_by"][0]["name"] == "client-egress"
            },
        );
    }
    let shown = daemon
        .cli(&["observe", "--type", "l7", "--all"])
        .expect("observe");
    for part in [
        "http-request DROPPED (HTTP/1.1 GET http://",
        "/denied/flow",
        "http-response FORWARDED (HTTP/1.1 200 ",
    ] {
        assert!(shown.contains(part), "{part}\n{shown}");
    }
    let by_code: BTreeMap<&str, usize> = ["2+", "403"]
        .into_iter()
        .map(|code| {
            let flows = daemon.flows(&["--http-status", code]).expect("observe");
            (code, flows.len())
        })
        .collect();
    assert!(by_code["2+"] >= 6, "{by_code:?}");
}
