//! Server names in policies, with real programs: which names pass, in which form, on which path.

use std::{
    io::ErrorKind,
    net::SocketAddr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use palisade_testbed::{
    Daemon,
    daemon::Hooks,
    output,
    process::output_with_input,
    recorder::{End, Recorder},
    server::Program,
    tls::{Handshake, Hello, records, retry_request, server_hello},
    topology::{FAMILIES, Family},
    web::{Caddy, Curl, Talk, Web, by_name, curl, random_file, sha256},
};
use palisade_tests::{
    OPEN,
    fixtures::apps::{Apps, PAIRS, apps, has_default_offloads, packets_read, tracked},
    fixtures::dns::counted,
    opaque_tls,
    setup::{TCX, XDP_AND_CLSACT, XDP_AT_THE_NIC, client_only, client_only_with, on_all_pairs, tables, webs},
};

const HTTPS: u16 = 443;
const RULES: &str = "      serverNames: [www.allowed.example, \"*.wild.example\", \"**.deep.example\"]\n";

/// Requests a name at an address with curl.
fn ask(apps: &Apps, from: &str, name: &str, to: SocketAddr) -> Curl {
    let args = by_name(name, to, "/");
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    curl(apps.ns(from), &args, OPEN).expect("curl")
}

#[track_caller]
fn answers(apps: &Apps, daemon: &Daemon, from: &str, to: (&str, Family), name: &str) {
    let got = ask(apps, from, name, apps.at(to.0, to.1, HTTPS));
    assert!(
        got.status == 200 && got.body == format!("hello from {}\n", to.0),
        "{from} -> {to:?} {name}: {got:?}\n{}",
        daemon.report()
    );
}

#[track_caller]
fn is_reset(apps: &Apps, daemon: &Daemon, from: &str, to: (&str, Family), name: &str) {
    let got = ask(apps, from, name, apps.at(to.0, to.1, HTTPS));
    assert!(
        got.status == 0 && got.code == 35 && got.error.contains("reset"),
        "{from} -> {to:?} {name}: {got:?}\n{}",
        daemon.report()
    );
}

fn all_pairs(hooks: Hooks) {
    let apps = apps();
    let names = ["server", "node", "internet"];
    let servers = webs(&apps, names, &[], &[HTTPS]);
    let daemon = on_all_pairs(&apps, hooks, &[HTTPS], RULES);
    for family in FAMILIES {
        for (from, to) in PAIRS {
            for name in ["www.allowed.example", "a.wild.example", "a.b.deep.example"] {
                answers(&apps, &daemon, from, (to, family), name);
            }
            for name in ["evil.example", "a.b.wild.example", "deep.example", "wild.example"] {
                is_reset(&apps, &daemon, from, (to, family), name);
            }
        }
    }
    for (name, web) in names.iter().zip(&servers) {
        let seen = web.seen();
        assert!(seen.len() >= 6, "{name}: {seen:?}");
        for seen in seen {
            assert!(
                ["www.allowed.example", "a.wild.example", "a.b.deep.example"]
                    .contains(&seen.server_name.as_str()),
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

/// Connects from `client` to the internet with openssl.
fn s_client(apps: &Apps, to: SocketAddr, args: &[&str]) -> Handshake {
    let mut command = apps.ns("client").command("openssl");
    let at = match to {
        SocketAddr::V4(_) => to.to_string(),
        SocketAddr::V6(v6) => format!("[{}]:{}", v6.ip(), v6.port()),
    };
    command.args(["s_client", "-connect", &at]).args(args);
    Handshake::of(&output_with_input(&mut command, b"Q\n", OPEN).expect("openssl"))
}

/// Placeholders for lists of protocols, which make a hello long: about as long as one with post-quantum keys, of several
/// segments, and longer than the inspector accepts.
const POST_QUANTUM: &str = "1400";
const LONG: &str = "12000";
const LONGER: &str = "40000";

/// Hellos that [`RULES`] allow: what they are, and arguments of `openssl s_client`.
const ALLOWED: &[(&str, &[&str])] = &[
    ("as it is", &["-servername", "www.allowed.example"]),
    ("in capitals", &["-servername", "WWW.ALLOWED.Example"]),
    ("with a dot behind it", &["-servername", "www.allowed.example."]),
    ("TLS 1.2", &["-servername", "www.allowed.example", "-tls1_2"]),
    ("TLS 1.3", &["-servername", "www.allowed.example", "-tls1_3"]),
    ("one label", &["-servername", "x-1_y.wild.example"]),
    ("many labels", &["-servername", "a.b.c.d.e.f.deep.example"]),
    (
        "in small records",
        &["-servername", "www.allowed.example", "-max_send_frag", "512"],
    ),
    (
        "as long as with post-quantum keys",
        &["-servername", "www.allowed.example", "-alpn", POST_QUANTUM],
    ),
    ("long", &["-servername", "www.allowed.example", "-alpn", LONG]),
    (
        "long, in small records",
        &[
            "-servername",
            "www.allowed.example",
            "-alpn",
            LONG,
            "-max_send_frag",
            "512",
        ],
    ),
    (
        "with a ticket extension, a status request and few ciphers",
        &[
            "-servername",
            "www.allowed.example",
            "-status",
            "-cipher",
            "ECDHE-ECDSA-AES128-GCM-SHA256",
        ],
    ),
];

/// Hellos that [`RULES`] deny.
const REFUSED: &[(&str, &[&str])] = &[
    ("another name", &["-servername", "evil.example"]),
    ("another name in capitals", &["-servername", "EVIL.EXAMPLE"]),
    (
        "another name with a dot behind it",
        &["-servername", "evil.example."],
    ),
    ("no name", &["-noservername"]),
    ("no name, TLS 1.2", &["-noservername", "-tls1_2"]),
    ("an address", &["-servername", "198.51.100.2"]),
    ("an address of IPv6", &["-servername", "2001:db8:f::2"]),
    ("one label more", &["-servername", "a.b.wild.example"]),
    ("one label less", &["-servername", "deep.example"]),
    (
        "the name within another",
        &["-servername", "www.allowed.example.evil.example"],
    ),
    (
        "the name as the end of another",
        &["-servername", "xwww.allowed.example"],
    ),
    ("two dots", &["-servername", "www..allowed.example"]),
    ("a dot in front", &["-servername", ".allowed.example"]),
    (
        "a hello longer than the inspector reads",
        &["-servername", "www.allowed.example", "-alpn", LONGER],
    ),
    (
        "another name in small records",
        &[
            "-servername",
            "evil.example",
            "-alpn",
            LONG,
            "-max_send_frag",
            "512",
        ],
    ),
];

/// Connects from `client` to the internet with openssl, with a list of protocols for each placeholder.
fn s_client_with_list(apps: &Apps, to: SocketAddr, args: &[&str]) -> Handshake {
    let list = |bytes: usize| vec!["x".repeat(200); bytes / 201].join(",") + ",http/1.1";
    let args: Vec<String> = args
        .iter()
        .map(|arg| match *arg {
            POST_QUANTUM | LONG | LONGER => list(arg.parse().expect("a length")),
            arg => arg.to_owned(),
        })
        .collect();
    s_client(apps, to, &args.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn every_form_of_server_name_from_openssl() {
    let apps = apps();
    let [web] = webs(&apps, ["internet"], &[], &[HTTPS]);
    let daemon = client_only(&apps, &[HTTPS], RULES);
    thread::scope(|scope| {
        for family in FAMILIES {
            let (apps, daemon) = (&apps, &daemon);
            scope.spawn(move || {
                let to = apps.at("internet", family, HTTPS);
                for (what, args) in ALLOWED {
                    let shook = s_client_with_list(apps, to, args);
                    assert!(
                        shook.version.starts_with("TLSv1."),
                        "{what} {family:?}: {}\n{}",
                        shook.text,
                        daemon.report()
                    );
                }
                for (what, args) in REFUSED {
                    let shook = s_client_with_list(apps, to, args);
                    assert!(
                        shook.version.is_empty() && !shook.text.contains("Server certificate"),
                        "{what} {family:?}: {}\n{}",
                        shook.text,
                        daemon.report()
                    );
                    assert!(
                        shook.text.contains("errno=104") || shook.text.contains("unable"),
                        "{what} {family:?} was not reset: {}\n{}",
                        shook.text,
                        daemon.report()
                    );
                }
            });
        }
    });
    assert!(web.seen().is_empty(), "no page was requested");
    drop(daemon);
    for (version, args) in [("TLSv1.2", ["-tls1_2"]), ("TLSv1.3", ["-tls1_3"])] {
        let shook = s_client(&apps, apps.at("internet", Family::V4, HTTPS), &args);
        assert_eq!(shook.version, version, "{}", shook.text);
    }
}

#[test]
fn other_protocols_than_tls_are_reset() {
    let apps = apps();
    let hears = Recorder::start(apps.ns("internet"), &apps.both("internet"), &[HTTPS], |_, _| {
        b"220 ready\r\n".to_vec()
    })
    .expect("recorder");
    let daemon = client_only(&apps, &[HTTPS], RULES);
    let name = "www.allowed.example";
    let hello = Hello::to(name);
    let ssl2 = {
        // RFC 6101, appendix E.1.
        let mut hello = vec![0x80, 46, 1, 3, 3, 0, 3, 0, 0, 0, 16];
        hello.resize(48, 7);
        hello
    };
    let two_names = {
        let one = [&[0, 0, name.len() as u8], name.as_bytes()].concat();
        let all = [&one[..], &one].concat();
        [&[0, all.len() as u8], &all[..]].concat()
    };
    let odd: Vec<(&str, Vec<u8>)> = vec![
        (
            "HTTP",
            b"GET / HTTP/1.1\r\nHost: www.allowed.example\r\n\r\n".to_vec(),
        ),
        ("SSH", b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()),
        ("zeros", vec![0; 600]),
        ("a hello in the form of SSL 2", ssl2),
        ("an alert", b"\x15\x03\x01\x00\x02\x02\x28".to_vec()),
        ("application data", b"\x17\x03\x03\x00\x05hello".to_vec()),
        ("a change of cipher", b"\x14\x03\x03\x00\x01\x01".to_vec()),
        ("a hello of the server", palisade_testbed::tls::server_hello()),
        (
            "an empty record",
            [b"\x16\x03\x01\x00\x00", &hello.bytes()[..]].concat(),
        ),
        ("an empty name", Hello::to("").bytes()),
        ("two names", Hello::nameless().with(0, &two_names).bytes()),
        (
            "the name twice",
            hello
                .clone()
                .with(0, &{
                    let mut list = vec![0, name.len() as u8 + 3, 0, 0, name.len() as u8];
                    list.extend_from_slice(name.as_bytes());
                    list
                })
                .bytes(),
        ),
        (
            "a NUL in the name",
            Hello::to("www.allowed.example\0.evil.example").bytes(),
        ),
        (
            "bytes behind the hello",
            records(&[&hello.message()[..], b"more"].concat(), 1 << 14),
        ),
        ("an alert within the hello", {
            let message = hello.message();
            let (begin, end) = message.split_at(50);
            let alert = b"\x15\x03\x01\x00\x02\x01\x00";
            [&records(begin, 50)[..], alert, &records(end, 500)].concat()
        }),
    ];
    thread::scope(|scope| {
        for family in FAMILIES {
            let (apps, odd, hears, daemon) = (&apps, &odd, &hears, &daemon);
            scope.spawn(move || {
                for (what, bytes) in odd {
                    let mut talk = Talk::open(apps.ns("client"), apps.at("internet", family, HTTPS), OPEN)
                        .expect("connection");
                    let local = talk.stream().local_addr().expect("address");
                    talk.send(bytes).expect("bytes");
                    let end = talk.receive_all(OPEN);
                    assert!(
                        end.as_ref()
                            .is_err_and(|e| e.kind() == ErrorKind::ConnectionReset),
                        "{what} {family:?}: {end:?} {}\n{}",
                        talk.text(),
                        daemon.report()
                    );
                    let heard = hears
                        .wait(local, "its end", OPEN, |heard| heard.end == End::Reset)
                        .expect("reset on the server's side");
                    assert!(heard.bytes.is_empty(), "{what} {family:?}: {heard:?}");
                }
            });
        }
    });
    // The server sends first: not TLS either.
    for (what, detail) in [("not TLS", "not TLS"), ("several", "several server names")] {
        let text = format!("Unreadable: {detail}");
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
                what,
                |flows| flows.iter().any(|flow| flow["Summary"] == text.as_str()),
            )
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    }
}

#[test]
fn an_endless_hello_is_aborted() {
    let apps = apps();
    let server = opaque_tls::server(apps.ns("internet"), &apps.both("internet"), &[HTTPS]).expect("server");
    let daemon = client_only_with(&apps, &tables("[tls]\nhello_timeout = \"2s\"\n"), &[HTTPS], RULES);
    let hello = Hello::to("www.allowed.example").bytes();
    thread::scope(|scope| {
        for family in FAMILIES {
            for length in [1, 5, 60, hello.len() - 1] {
                let (apps, server, daemon, begun) = (&apps, &server, &daemon, &hello[..length]);
                scope.spawn(move || {
                    let mut talk = Talk::open(apps.ns("client"), apps.at("internet", family, HTTPS), OPEN)
                        .expect("connection");
                    let local = talk.stream().local_addr().expect("address");
                    let begin = Instant::now();
                    talk.send(begun).expect("bytes");
                    let end = talk.receive_all(Duration::from_secs(60));
                    let took = begin.elapsed();
                    assert!(
                        end.is_err() && (1_500..50_000).contains(&took.as_millis()),
                        "{length} {family:?}: {end:?} after {took:?}\n{}",
                        daemon.report()
                    );
                    let heard = server
                        .wait(local, "its end", OPEN, |heard| heard.end == End::Reset)
                        .expect("reset on the server's side");
                    assert!(heard.bytes.is_empty(), "{heard:?}");
                });
            }
        }
    });
}

#[test]
fn a_second_hello_is_inspected_too() {
    let apps = apps();
    let servers: Vec<Program> = FAMILIES
        .iter()
        .map(|family| {
            let at = apps.at("internet", *family, HTTPS);
            let text = match at {
                SocketAddr::V4(_) => at.to_string(),
                SocketAddr::V6(v6) => format!("[{}]:{}", v6.ip(), v6.port()),
            };
            let (cert, key) = (
                apps.certificate.cert.display().to_string(),
                apps.certificate.key.display().to_string(),
            );
            // The server accepts one group only, for which clients do not send a key share at first.
            let args = [
                "s_server", "-accept", &text, "-www", "-groups", "P-384", "-cert", &cert, "-key", &key,
            ];
            Program::start(apps.ns("internet"), "openssl", &args, Some(at)).expect("s_server")
        })
        .collect();
    let asks_again = Recorder::start(
        apps.ns("internet"),
        &apps.both("internet"),
        &[8443],
        |dealt_with, all| {
            let first = *dealt_with == 0 && !all.is_empty();
            *dealt_with = all.len();
            if first { retry_request() } else { Vec::new() }
        },
    )
    .expect("recorder");
    let daemon = client_only(&apps, &[HTTPS, 8443], RULES);
    for family in FAMILIES {
        let to = apps.at("internet", family, HTTPS);
        let args = ["-tls1_3", "-groups", "X25519:P-384", "-msg", "-servername"];
        let shook = s_client(&apps, to, &[&args[..], &["www.allowed.example"]].concat());
        let hellos = shook
            .text
            .lines()
            .filter(|line| line.starts_with(">>>") && line.ends_with("ClientHello"))
            .count();
        assert!(
            shook.version == "TLSv1.3" && hellos == 2,
            "{hellos} {}\n{}",
            shook.text,
            daemon.report()
        );
        let shook = s_client(&apps, to, &[&args[..], &["evil.example"]].concat());
        assert!(shook.version.is_empty(), "{}\n{}", shook.text, daemon.report());

        // A client sends another name after a HelloRetryRequest.
        for (name, goes_on) in [("a.wild.example", true), ("evil.example", false)] {
            let at = apps.at("internet", family, 8443);
            let mut talk = Talk::open(apps.ns("client"), at, OPEN).expect("connection");
            let local = talk.stream().local_addr().expect("address");
            let first = Hello::to("www.allowed.example").bytes();
            talk.send(&first).expect("a hello");
            talk.receive(OPEN, |heard| heard == retry_request())
                .expect("an answer");
            let second = Hello::to(name).bytes();
            // With a ChangeCipherSpec before it, as clients send it (RFC 8446, appendix D.4).
            let change = b"\x14\x03\x03\x00\x01\x01";
            talk.send(&[change, &second[..]].concat()).expect("another hello");
            if goes_on {
                let all = [&first[..], change, &second].concat();
                asks_again
                    .wait(local, "both arrive", OPEN, |heard| heard.bytes == all)
                    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
                continue;
            }
            let end = talk.receive_all(OPEN);
            assert!(end.is_err(), "{end:?}\n{}", daemon.report());
            let heard = asks_again
                .wait(local, "its end", OPEN, |heard| heard.end == End::Reset)
                .expect("reset on the server's side");
            assert!(
                [&first[..], change].concat().starts_with(&heard.bytes),
                "{heard:?}"
            );
        }
    }
    drop(servers);
}

#[test]
fn encrypted_hellos_are_matched_by_their_outer_name_or_refused() {
    let apps = apps();
    let server = opaque_tls::server(apps.ns("internet"), &apps.both("internet"), &[HTTPS]).expect("server");
    // RFC 9849: outer, a cipher suite, a configuration, a key, an encrypted payload.
    let mut encrypted = vec![0, 0, 1, 0, 1, 9, 0, 32];
    encrypted.extend_from_slice(&[3; 32]);
    encrypted.extend_from_slice(&[0, 64]);
    encrypted.extend_from_slice(&[5; 64]);
    // With a GREASE extension (RFC 8701), and a key share of post-quantum length.
    let hello = |name: &str| {
        let hello = Hello::to(name).with(0x0a0a, b"").with(0xfe0d, &encrypted);
        hello.with(51, &[9; 1250]).with(0x1a1a, b"\0").bytes()
    };
    let passes = |daemon: &Daemon, family: Family, name: &str, allowed: bool| {
        let at = apps.at("internet", family, HTTPS);
        let mut talk = Talk::open(apps.ns("client"), at, OPEN).expect("connection");
        let local = talk.stream().local_addr().expect("address");
        talk.send(&hello(name)).expect("a hello");
        let answer = talk.receive(OPEN, |heard| heard.len() == server_hello().len());
        assert_eq!(answer.is_ok(), allowed, "{name} {family:?}\n{}", daemon.report());
        let heard = server.bytes(local);
        let expected = if allowed { hello(name) } else { vec![] };
        assert_eq!(heard, expected, "{name} {family:?}\n{}", daemon.report());
    };
    let daemon = client_only(&apps, &[HTTPS], RULES);
    for family in FAMILIES {
        passes(&daemon, family, "www.allowed.example", true);
        passes(&daemon, family, "evil.example", false);
    }
    drop(daemon);
    let daemon = client_only_with(&apps, &tables("[tls]\nech = \"deny\"\n"), &[HTTPS], RULES);
    for family in FAMILIES {
        passes(&daemon, family, "www.allowed.example", false);
        let shook = s_client(
            &apps,
            apps.at("internet", family, HTTPS),
            &["-servername", "evil.example"],
        );
        assert!(shook.version.is_empty(), "{}", shook.text);
    }
}

#[test]
fn other_tls_clients_and_servers() {
    let apps = apps();
    let _web = Web::start(apps.ns("internet"), "nginx", &[], &[HTTPS], &apps.certificate).expect("nginx");
    let _caddy = Caddy::start(apps.ns("internet"), "caddy", 8080, 8443, &apps.certificate).expect("caddy");
    let daemon = client_only(&apps, &[HTTPS, 8443], RULES);
    let script = "import ssl, socket, sys\n\
        c = ssl.create_default_context(); c.check_hostname = False; c.verify_mode = ssl.CERT_NONE\n\
        s = c.wrap_socket(socket.create_connection((sys.argv[1], int(sys.argv[2])), 5), server_hostname=sys.argv[3])\n\
        s.sendall(b'GET / HTTP/1.0\\r\\nHost: x\\r\\n\\r\\n')\n\
        t = b''\n\
        while b := s.recv(999): t += b\n\
        print(t.decode().split('\\r\\n\\r\\n')[1])";
    // The same, with the hello in records of one byte.
    let small = "import ssl, socket, sys\n\
        c = ssl.create_default_context(); c.check_hostname = False; c.verify_mode = ssl.CERT_NONE\n\
        s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)\n\
        i, o = ssl.MemoryBIO(), ssl.MemoryBIO()\n\
        t = c.wrap_bio(i, o, server_hostname=sys.argv[3])\n\
        try: t.do_handshake()\n\
        except ssl.SSLWantReadError: pass\n\
        h = o.read()\n\
        s.sendall(b''.join(h[:3] + b'\\0\\1' + h[n:n+1] for n in range(5, len(h))))\n\
        while True:\n\
        \x20 i.write(s.recv(9999) or sys.exit('closed'))\n\
        \x20 try: t.do_handshake(); break\n\
        \x20 except ssl.SSLWantReadError: pass\n\
        print('shook hands')";
    for family in FAMILIES {
        for (port, who) in [(HTTPS, "nginx"), (8443, "caddy")] {
            let at = apps.at("internet", family, port);
            for (name, allowed) in [("www.allowed.example", true), ("evil.example", false)] {
                let got = ask(&apps, "client", name, at);
                let expected = format!("hello from {who}\n");
                assert_eq!(
                    got.status == 200 && got.body == expected,
                    allowed,
                    "{who} {name}: {got:?}\n{}",
                    daemon.report()
                );
                for (script, said) in [(script, "hello from"), (small, "shook hands")] {
                    let mut python = apps.ns("client").command("python3");
                    python.args(["-c", script, &at.ip().to_string(), &port.to_string(), name]);
                    let out = output(&mut python, OPEN).expect("python");
                    let text = String::from_utf8_lossy(&out.stdout);
                    assert_eq!(
                        text.starts_with(said),
                        allowed,
                        "{who} {name}: {out:?}\n{}",
                        daemon.report()
                    );
                }
            }
        }
    }
}

#[test]
fn large_transfers_are_offloaded() {
    const SIZE: u64 = 60_000_000;
    let apps = apps();
    let servers = webs(&apps, ["internet", "node"], &[], &[HTTPS]);
    for web in &servers {
        random_file(&web.files().join("down"), SIZE).expect("file");
    }
    let up = apps.topology.dir().join("up");
    random_file(&up, SIZE).expect("file");
    let daemon = on_all_pairs(&apps, Hooks::default(), &[HTTPS], RULES);
    let sum_up = sha256(&up).expect("sum");
    for (from, to, web, family) in [
        ("client", "internet", &servers[0], Family::V4),
        ("internet", "node", &servers[1], Family::V6),
        ("node", "internet", &servers[0], Family::V6),
    ] {
        let at = apps.at(to, family, HTTPS);
        let before = packets_read(&daemon).expect("status");
        let got = apps.topology.dir().join("got");
        let (got_text, up_text) = (got.display().to_string(), up.display().to_string());
        let mut args = by_name("www.allowed.example", at, "/files/down");
        args.extend(["-o".into(), got_text]);
        let mut upload = by_name("www.allowed.example", at, &format!("/files/up-{from}"));
        upload.extend(["-T".into(), up_text]);
        for args in [args, upload] {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let got = curl(apps.ns(from), &args, Duration::from_secs(60)).expect("curl");
            assert!(
                got.code == 0 && [200, 201].contains(&got.status),
                "{from} -> {to}: {got:?}\n{}",
                daemon.report()
            );
        }
        let sum = |path: &Path| sha256(path).expect("sum");
        assert_eq!(sum(&got), sum(&web.files().join("down")), "{from} -> {to}: down");
        assert_eq!(
            sum(&web.files().join(format!("up-{from}"))),
            sum_up,
            "{from} -> {to}: up"
        );
        let read = packets_read(&daemon).expect("status") - before;
        assert!(
            read < 100,
            "{from} -> {to}: {read} packets were read\n{}",
            daemon.report()
        );
        let most = tracked(&daemon, HTTPS)
            .expect("ct list")
            .iter()
            .filter_map(|entry| entry["reply_bytes"].as_u64())
            .max();
        assert!(most > Some(SIZE), "{most:?}\n{}", daemon.report());
    }
}

#[test]
fn flow_records_name_server_name_verdict_and_rule() {
    let apps = apps();
    let [_web] = webs(&apps, ["internet"], &[], &[HTTPS]);
    let daemon = client_only(&apps, &[HTTPS], RULES);
    for family in FAMILIES {
        answers(&apps, &daemon, "client", ("internet", family), "a.wild.example");
        is_reset(&apps, &daemon, "client", ("internet", family), "evil.example");
        let (from, to) = (
            apps.topology.addr("client", family).to_string(),
            apps.topology.addr("internet", family).to_string(),
        );
        let filters = ["--type", "l7", "--from-ip", &from, "--to-ip", &to];
        for (verdict, summary, by) in [
            (
                "FORWARDED",
                "TLS Hello a.wild.example (TLS 1.3)",
                "egress_allowed_by",
            ),
            ("DROPPED", "TLS Hello evil.example (TLS 1.3)", "egress_denied_by"),
        ] {
            daemon
                .wait_flows(&filters, summary, |flows| {
                    flows.iter().any(|flow| {
                        flow["Summary"] == summary
                            && flow["verdict"] == verdict
                            && flow[by][0]["name"] == "client-egress"
                            && flow["palisade"]["rule"]["policies"][0] == "default/client-egress"
                    })
                })
                .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
        }
    }
    // The conntrack entry of a reset connection has a short timeout.
    for entry in tracked(&daemon, HTTPS).expect("ct list") {
        assert!(entry["expires_in_seconds"].as_u64() < Some(60), "{entry:#}");
    }
    daemon
        .wait_status("denied names are counted", |status| counted(status, 240) >= 2)
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
}
