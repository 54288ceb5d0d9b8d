//! The DNS servers and clients of the testbed without Palisade, to show that tests can rely on them.

use std::{fs, net::SocketAddr, time::Duration};

use palisade_testbed::{
    Topology,
    capture::Capture,
    dns::{
        self, PORT, PerfPlan, Scripted, ScriptedResponse, Server, ask, dig, getaddrinfo, query, rcode,
        resolving, rtype,
    },
    output,
    packet::protocol,
    server::Nginx,
    topology::{FAMILIES, INNER},
};

const SOON: Duration = Duration::from_millis(300);

const RECORDS: &[&str] = &[
    "www.example. 60 IN A 192.0.2.1",
    "www.example. 60 IN AAAA 2001:db8::1",
    "alias.example. 30 IN CNAME www.example.",
];

fn topology() -> Topology {
    let t = Topology::new().and_then(|t| t.apps(&["client", "server"]));
    let t = t.expect("topology");
    t.meet().expect("neighbours");
    t
}

#[test]
fn dns_servers_answer_dig_over_udp_and_tcp() {
    let t = topology();
    let (client, ns) = (t.ns("client"), t.ns("server"));
    let addresses = FAMILIES.map(|family| t.addr("server", family));
    for name in ["unbound", "dnsmasq", "knot"] {
        let _server = match name {
            "unbound" => Server::unbound(ns, &addresses, RECORDS),
            "dnsmasq" => Server::dnsmasq(ns, &addresses, RECORDS),
            _ => Server::knot(ns, &addresses, RECORDS),
        }
        .expect(name);
        for address in addresses {
            for transport in ["+notcp", "+tcp"] {
                let dug = dig(client, address, &["www.example", "A", transport]).expect("dig");
                let (status, question) = (dug.status.as_str(), dug.question.as_str());
                assert_eq!(
                    (status, question),
                    ("NOERROR", "www.example. IN A"),
                    "{name}: {}",
                    dug.text
                );
                assert_eq!(dug.answers, ["192.0.2.1"], "{name}: {}", dug.text);
                assert_eq!(dug.tcp, transport == "+tcp", "{name}: {}", dug.text);
                let dug = dig(client, address, &["alias.example", "AAAA", transport]).expect("dig");
                // unbound does not follow aliases in its local data.
                let expected = &["www.example.", "2001:db8::1"][..if name == "unbound" { 1 } else { 2 }];
                assert_eq!(dug.answers, expected, "{name}: {}", dug.text);
                let dug = dig(client, address, &["nobody.example", "A", transport]).expect("dig");
                assert_eq!(dug.status, "NXDOMAIN", "{name}: {}", dug.text);
            }
        }
    }
}

#[test]
fn a_scripted_server_sends_its_script() {
    let t = topology();
    let (client, ns) = (t.ns("client"), t.ns("server"));
    let addresses = FAMILIES.map(|family| t.addr("server", family));
    let server = Scripted::start(ns, &addresses, |asked| {
        let www = ScriptedResponse::records(&[format!("{}. 60 IN A 192.0.2.1", asked.name)]);
        match asked.name.as_str() {
            "www.example" => vec![www],
            "slow.example" => vec![ScriptedResponse {
                delay: Duration::from_millis(200),
                ..www
            }],
            "cut.example" if !asked.tcp => vec![ScriptedResponse {
                truncated: true,
                ..ScriptedResponse::default()
            }],
            "cut.example" => vec![www],
            "long.example" => vec![ScriptedResponse {
                additional: vec![format!("long.example. 60 IN TXT {}", "x".repeat(4000))],
                ..www
            }],
            "other-id.example" => vec![ScriptedResponse { id_xor: 1, ..www }],
            "other-question.example" => vec![ScriptedResponse {
                question: Some("evil.example".into()),
                ..www
            }],
            "other-port.example" => vec![ScriptedResponse {
                port: Some(5353),
                ..www
            }],
            "twice.example" => vec![www.clone(), www],
            "service.example" => vec![ScriptedResponse::records(&[
                "service.example. 60 IN HTTPS 1 . alpn=h2,h3 port=8443 ipv4hint=192.0.2.7 ipv6hint=2001:db8::7",
            ])],
            "silent.example" => vec![],
            _ => vec![ScriptedResponse::rcode(3)],
        }
    })
    .expect("server");
    for family in FAMILIES {
        let to = t.addr("server", family);
        let at = SocketAddr::new(to, PORT);
        let from = SocketAddr::new(t.addr("client", family), 0);
        let raw = |name: &str| ask(client, from, at, &query(77, &[(name, rtype::A)]), SOON).expect("ask");
        let dug = dig(client, to, &["www.example"]).expect("dig");
        assert_eq!(
            (dug.status.as_str(), &dug.answers[..]),
            ("NOERROR", &["192.0.2.1".to_owned()][..])
        );
        let dug = dig(client, to, &["cut.example"]).expect("dig");
        assert!(dug.tcp && dug.answers == ["192.0.2.1"], "{}", dug.text);
        let dug = dig(client, to, &["service.example", "HTTPS"]).expect("dig");
        assert!(
            dug.answers[0].contains("ipv4hint=192.0.2.7 ipv6hint=2001:db8::7"),
            "{}",
            dug.text
        );
        assert_eq!(
            dig(client, to, &["nobody.example"]).expect("dig").status,
            "NXDOMAIN"
        );
        assert_eq!(dig(client, to, &["silent.example"]).expect("dig").status, "");
        let capture =
            Capture::start_where(client, INNER, move |p| !p.outgoing && p.source == to).expect("capture");
        let dug = dig(client, to, &["long.example", "+bufsize=4096"]).expect("dig");
        assert_eq!(dug.answers, ["192.0.2.1"], "{}", dug.text);
        assert!(
            capture.count(|p| p.protocol == protocol::UDP) >= 3,
            "it came in fragments"
        );

        assert_eq!(raw("twice.example").len(), 2);
        assert_eq!(raw("www.example")[0][..2], [0, 77]);
        assert_eq!(raw("other-id.example")[0][..2], [0, 76]);
        assert_eq!(raw("other-port.example").len(), 1);
        assert!(
            raw("other-question.example")[0]
                .windows(5)
                .any(|w| w == b"\x04evil")
        );
        assert_eq!(rcode(&raw("nobody.example")[0]), Some(3));
        let start = std::time::Instant::now();
        assert_eq!(raw("slow.example").len(), 1);
        assert!(start.elapsed() >= Duration::from_millis(200));
        assert_eq!(server.requests_for("slow.example"), 1 + family as usize);
    }
    // This datagram is unsolicited.
    for family in FAMILIES {
        let from = SocketAddr::new(t.addr("server", family), 5300);
        let to = SocketAddr::new(t.addr("client", family), 4242);
        let capture =
            Capture::start_where(client, INNER, move |p| p.ports == Some((5300, 4242))).expect("capture");
        let message = dns::answer(1, "www.example", rtype::A, &["www.example. 9 IN A 192.0.2.1"]);
        server.push(from, to, &message.expect("message")).expect("push");
        capture
            .wait("the datagram", SOON * 3, |_| true)
            .expect("it comes");
    }
}

#[test]
fn a_command_resolves_with_its_own_resolv_conf() {
    let t = topology();
    let (client, ns) = (t.ns("client"), t.ns("server"));
    let addresses = FAMILIES.map(|family| t.addr("server", family));
    let (v4, v6) = (addresses[0], addresses[1]);
    let records = [
        format!("web.shop.example. 60 IN A {v4}"),
        format!("web.shop.example. 60 IN AAAA {v6}"),
    ];
    let records: Vec<&str> = records.iter().map(String::as_str).collect();
    let _server = Server::unbound(ns, &addresses, &records).expect("unbound");
    let _web = Nginx::start(ns, "web", &[8080], 1).expect("nginx");
    let machine = fs::read("/etc/resolv.conf").unwrap_or_default();
    for server in addresses {
        let conf = t.dir().join("resolv.conf");
        fs::write(
            &conf,
            format!("nameserver {server}\nsearch shop.example other.example\noptions ndots:2 timeout:1 attempts:1\n"),
        )
        .expect("resolv.conf");
        assert_eq!(getaddrinfo(client, &conf, "web").expect("python"), [v4, v6]);
        assert_eq!(
            getaddrinfo(client, &conf, "web.shop.example").expect("python"),
            [v4, v6]
        );
        assert_eq!(getaddrinfo(client, &conf, "nobody").expect("python"), [v4; 0]);
        for family in ["-4", "-6"] {
            let mut curl = resolving(client, "curl", &conf).expect("curl");
            curl.args(["-sS", "-m", "3", family, "http://web.shop.example:8080/"]);
            let out = output(&mut curl, Duration::from_secs(5)).expect("curl");
            assert_eq!(
                String::from_utf8_lossy(&out.stdout),
                "hello from web\n",
                "{out:?}"
            );
        }
    }
    assert_eq!(fs::read("/etc/resolv.conf").unwrap_or_default(), machine);
}

#[test]
fn dnsperf_counts_answered_and_lost_queries() {
    let t = topology();
    let (client, ns) = (t.ns("client"), t.ns("server"));
    let server = t.addr("server", FAMILIES[0]);
    let _server = Scripted::start(ns, &[server], |asked| match asked.name.as_str() {
        "lost.example" => vec![],
        "refused.example" => vec![ScriptedResponse::rcode(5)],
        _ => vec![ScriptedResponse::records(&[format!(
            "{}. 60 IN A 192.0.2.1",
            asked.name
        )])],
    })
    .expect("server");
    let queries = [
        "a.example A",
        "refused.example A",
        "lost.example A",
        "b.example A",
    ]
    .map(str::to_owned);
    let plan = PerfPlan {
        server: SocketAddr::new(server, PORT),
        queries: &queries,
        seconds: 1,
        clients: 2,
        rate: Some(200),
        outstanding: 500,
        listed: true,
        tcp: false,
    };
    let perf = plan.run(client).expect("dnsperf");
    assert!(perf.sent >= 100, "{perf:?}");
    assert_eq!(perf.completed + perf.lost, perf.sent, "{perf:?}");
    assert!(perf.lost.abs_diff(perf.sent / 4) <= 2, "{perf:?}");
    assert!(perf.rcodes["NOERROR"] > perf.rcodes["REFUSED"], "{perf:?}");
    assert!(perf.p50 > 0.0 && perf.p50 <= perf.p99, "{perf:?}");
}
