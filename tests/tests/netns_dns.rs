//! DNS rules and egress by name, with real programs: which queries pass, what they are answered, and which addresses are
//! reachable afterwards.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use palisade_testbed::{
    Daemon, Outcome,
    daemon::{Hooks, Settings},
    dns::{self, Server, ask, getaddrinfo, query, rcode, resolving, rtype},
    output,
    probe::connect,
    server::Nginx,
    topology::{FAMILIES, Family},
};
use palisade_tests::{
    OPEN,
    fixtures::dns::{EVIL, Names, WEB, counted, names, other_resolver, resolver, site},
    setup::{TCX, XDP_AND_CLSACT, XDP_AT_THE_NIC, daemon, daemon_with},
};

const SOON: Duration = Duration::from_millis(300);

/// The client may query some names and connect to their addresses.
const CLIENT: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [world, host]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules:
        dns:
        - matchName: www.example
        - matchName: mail.example
        - matchName: alias.example
        - matchName: zero.example
        - matchName: short.example
        - matchName: service.example
        - matchName: cut.example
        - matchName: long.example
        - matchName: twice.example
        - matchPattern: "other-*.example"
        - matchName: greedy.example
        - matchName: slow.example
        - matchName: silent.example
        - matchPattern: "*.wild.example"
        - matchPattern: "*.race.example"
  - toEndpoints: [{matchLabels: {app: dns}}]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules:
        dns: [{matchName: www.example}, {matchName: mail.example}]
  - toFQDNs:
    - matchName: www.example
    - matchName: alias.example
    - matchName: zero.example
    - matchName: short.example
    - matchName: service.example
    - matchName: cut.example
    - matchName: long.example
    - matchName: twice.example
    - matchPattern: "other-*.example"
    - matchName: greedy.example
    - matchName: slow.example
    - matchPattern: "*.wild.example"
    - matchPattern: "*.race.example"
    toPorts:
    - ports: [{port: "80", protocol: ANY}]
"#;

/// Any endpoint may query the server in the workload, which may query some names itself.
const SERVER: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {app: dns}}
  ingress:
  - fromEntities: [all]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
  egress:
  - toEntities: [all]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules:
        dns: [{matchName: api.example}]
"#;

/// The node may query some names only.
const NODE: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {}
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules:
        dns: [{matchName: www.example}, {matchName: mail.example}]
  - toEndpoints: [{matchLabels: {app: dns}}]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules:
        dns: [{matchName: mail.example}]
  - toFQDNs: [{matchName: www.example}]
    toPorts:
    - ports: [{port: "80", protocol: TCP}]
  ingress:
  - fromEntities: [all]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
"#;

fn client_only(names: &Names) -> Daemon {
    daemon(&names.topology, &[("client.yaml", CLIENT)])
}

/// Every path of a query and its answer: out of a workload and into it, out of the node and into it, and between guarded
/// endpoints.
fn all_pairs(hooks: Hooks) {
    let names = names();
    let settings = Settings {
        hooks,
        ..Settings::default()
    };
    let policies = [
        ("client.yaml", CLIENT),
        ("server.yaml", SERVER),
        ("node.yaml", NODE),
    ];
    let daemon = daemon_with(&names.topology, &settings, &policies);
    for family in FAMILIES {
        let at = |server: &str| names.server(server, family).ip();
        let www = site(10, family);
        for (from, server, allowed, refused) in [
            (
                "client",
                "internet",
                &["www.example", "mail.example"][..],
                &["evil.example", "api.example"][..],
            ),
            (
                "client",
                "dns",
                &["www.example", "mail.example"],
                &["api.example", "alias.example", "evil.example"],
            ),
            ("client", "node", &["www.example"], &["api.example"]),
            (
                "node",
                "internet",
                &["www.example", "mail.example"],
                &["api.example"],
            ),
            ("node", "dns", &["mail.example"], &["www.example", "api.example"]),
            ("dns", "internet", &["api.example"], &["www.example"]),
            ("dns", "node", &["api.example"], &["www.example"]),
            ("internet", "dns", &["mail.example", "api.example"], &[]),
            ("internet", "node", &["mail.example"], &[]),
        ] {
            for name in allowed {
                let address = match *name {
                    "www.example" => www,
                    "mail.example" => site(19, family),
                    _ => site(20, family),
                };
                names.resolves(&daemon, from, at(server), name, address);
            }
            for name in refused {
                names.is_refused(&daemon, from, at(server), name);
            }
        }
        // The client that queried reaches the site; other endpoints do not.
        names.reaches(&daemon, "client", 10, family);
        names.does_not_reach(&daemon, "client", EVIL, family);
        names.reaches(&daemon, "node", 10, family);
        names.does_not_reach(&daemon, "node", 19, family);
    }
    for ns in [names.ns("client"), names.ns("dns"), names.ns("internet")] {
        let features = ns.run("ethtool", &["-k", "eth0"]).expect("ethtool");
        assert!(
            features.contains("tx-checksumming: on"),
            "checksums were left to the offload: {features}"
        );
    }
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

#[test]
fn an_address_is_reachable_only_after_its_own_client_resolved_it() {
    let names = names();
    let daemon = daemon(
        &names.topology,
        &[
            ("client.yaml", CLIENT),
            (
                "dns.yaml",
                &CLIENT
                    .replace("app: client", "app: dns")
                    .replace("name: client", "name: other"),
            ),
        ],
    );
    for family in FAMILIES {
        names.does_not_reach(&daemon, "client", 10, family);
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "www.example",
            site(10, family),
        );
        names.reaches(&daemon, "client", 10, family);
        // The other endpoint has the same policy but has not queried the name.
        names.does_not_reach(&daemon, "dns", 10, family);
        names.resolves(&daemon, "dns", resolver(family), "www.example", site(10, family));
        names.reaches(&daemon, "dns", 10, family);
        // The rule by name allows other ports only.
        let to = SocketAddr::new(site(10, family), 443);
        assert_eq!(
            connect(names.ns("client"), to, SOON),
            Outcome::TimedOut,
            "{}",
            daemon.report()
        );
        // The name may be queried, but no rule allows its address.
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "mail.example",
            site(19, family),
        );
        names.does_not_reach(&daemon, "client", 19, family);
    }
}

#[test]
fn from_every_kind_of_answer_only_addresses_of_the_queried_name_are_learned() {
    let names = names();
    let daemon = client_only(&names);
    for family in FAMILIES {
        let server = resolver(family);
        let resolves = |name: &str, n: u8| names.resolves(&daemon, "client", server, name, site(n, family));
        resolves("zero.example", 12);
        names.reaches(&daemon, "client", 12, family);
        resolves("alias.example", 11);
        names.reaches(&daemon, "client", 11, family);
        resolves("a.wild.example", 21);
        names.reaches(&daemon, "client", 21, family);
        resolves("slow.example", 23);
        names.reaches(&daemon, "client", 23, family);

        // Truncated: the client repeats the query over TCP, where it is inspected too.
        let kind = if family == Family::V4 { "A" } else { "AAAA" };
        let dug = names.dig("client", server, &["cut.example", kind]);
        assert!(
            dug.tcp && dug.answers == [site(14, family).to_string()],
            "{}\n{}",
            dug.text,
            daemon.report()
        );
        names.reaches(&daemon, "client", 14, family);
        let dug = names.dig("client", server, &["www.example", kind, "+tcp"]);
        assert_eq!(dug.answers, [site(10, family).to_string()], "{}", dug.text);
        names.reaches(&daemon, "client", 10, family);
        names.is_refused_over_tcp(&daemon, "client", server, "evil.example");

        // In fragments.
        let dug = names.dig("client", server, &["long.example", kind, "+bufsize=8192"]);
        assert_eq!(
            dug.answers,
            [site(15, family).to_string()],
            "{}\n{}",
            dug.text,
            daemon.report()
        );
        names.reaches(&daemon, "client", 15, family);

        // Records of other names and other sections are not learned.
        let dug = names.dig("client", server, &["greedy.example", kind]);
        assert_eq!(dug.status, "NOERROR", "{}\n{}", dug.text, daemon.report());
        names.reaches(&daemon, "client", 18, family);
        names.does_not_reach(&daemon, "client", EVIL, family);
    }
    // One answer has hints of both address families.
    let dug = names.dig("client", resolver(Family::V4), &["service.example", "HTTPS"]);
    assert!(dug.answers[0].contains("ipv6hint"), "{}", dug.text);
    for family in FAMILIES {
        names.reaches(&daemon, "client", 13, family);
    }
}

#[test]
fn unsolicited_answers_are_dropped_and_nothing_is_learned() {
    let names = names();
    let daemon = client_only(&names);
    for family in FAMILIES {
        let from = SocketAddr::new(names.topology.addr("client", family), 0);
        let kind = if family == Family::V4 {
            rtype::A
        } else {
            rtype::AAAA
        };
        let heard = |name: &str| {
            let server = SocketAddr::new(resolver(family), dns::PORT);
            ask(names.ns("client"), from, server, &query(7, &[(name, kind)]), SOON).expect("ask")
        };
        let has = |message: &[u8], address: IpAddr| match address {
            IpAddr::V4(v4) => message.windows(4).any(|w| w == v4.octets()),
            IpAddr::V6(v6) => message.windows(16).any(|w| w == v6.octets()),
        };
        for (name, good) in [
            ("twice.example", 16),
            ("other-id.example", 17),
            ("other-question.example", 17),
        ] {
            let answers = heard(name);
            assert_eq!(answers.len(), 1, "{name} {family:?}\n{}", daemon.report());
            assert!(has(&answers[0], site(good, family)), "{name} {family:?}");
            names.reaches(&daemon, "client", good, family);
            names.does_not_reach(&daemon, "client", EVIL, family);
        }
        // From another address or port: not an answer of this flow. It may arrive if ingress is open, but nothing is
        // learned from it.
        for name in ["other-port.example", "other-address.example"] {
            let answers = heard(name);
            assert!(
                answers.iter().any(|answer| has(answer, site(17, family))),
                "{name} {family:?}\n{}",
                daemon.report()
            );
            names.does_not_reach(&daemon, "client", EVIL, family);
        }
        // Unsolicited, to a port without a query.
        let message = dns::answer(
            1,
            "www.example",
            kind,
            &[&match family {
                Family::V4 => format!("www.example. 60 IN A {}", site(EVIL, family)),
                Family::V6 => format!("www.example. 60 IN AAAA {}", site(EVIL, family)),
            }],
        )
        .expect("message");
        let to = SocketAddr::new(from.ip(), 4444);
        let pushed = names
            .resolver
            .push(SocketAddr::new(other_resolver(family), 5301), to, &message);
        pushed.expect("push");
        names.does_not_reach(&daemon, "client", EVIL, family);
    }
    daemon
        .wait_flows(
            &["--type", "l7", "--verdict", "DROPPED", "--reply", "true"],
            "the drops are reported",
            |flows| flows.iter().any(|flow| flow["drop_reason"] == 242),
        )
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    daemon
        .wait_status("the drops are counted", |status| counted(status, 242) >= 6)
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
}

#[test]
fn malformed_and_unusual_queries_never_reach_a_server() {
    let names = names();
    let daemon = client_only(&names);
    let www = ("www.example", rtype::A);
    let good = query(9, &[www]);
    let with = |at: usize, bytes: &[u8]| {
        let mut message = good.clone();
        message[at..at + bytes.len()].copy_from_slice(bytes);
        message
    };
    // Name, message, and the response code if there is a response.
    let odd: &[(&str, Vec<u8>, Option<u8>)] = &[
        (
            "two questions, both allowed",
            query(9, &[www, ("mail.example", rtype::A)]),
            Some(1),
        ),
        (
            "two questions, one not allowed",
            query(9, &[www, ("evil.example", rtype::A)]),
            Some(1),
        ),
        ("no question", query(9, &[]), Some(1)),
        ("an update", with(2, &[0x28, 0]), Some(4)),
        ("a notification", with(2, &[0x20, 0]), Some(4)),
        ("an answer in place of a question", with(2, &[0x81, 0]), None),
        ("an answer in a question", with(6, &[0, 1]), None),
        ("cut short", good[..20].to_vec(), None),
        ("a header cut short", good[..7].to_vec(), None),
        ("empty", vec![], None),
        ("no DNS", b"GET / HTTP/1.1\r\n\r\n".to_vec(), None),
        ("bytes after the end", [&good[..], b"evil"].concat(), None),
        (
            "a pointer to itself",
            [&good[..12], &[0xc0, 12, 0, 1, 0, 1]].concat(),
            None,
        ),
    ];
    for family in FAMILIES {
        let from = SocketAddr::new(names.topology.addr("client", family), 0);
        let server = SocketAddr::new(resolver(family), dns::PORT);
        for (what, message, code) in odd {
            let before = names.resolver.queries().len();
            let answers = ask(names.ns("client"), from, server, message, SOON / 2).expect("ask");
            assert!(answers.len() <= 1, "{what}");
            if code.is_some() {
                let said = answers.first().and_then(|answer| rcode(answer));
                assert_eq!(said, *code, "{what} {family:?}\n{}", daemon.report());
            }
            assert_eq!(
                names.resolver.queries().len(),
                before,
                "{what} {family:?} has reached the server\n{}",
                daemon.report()
            );
        }
        // The plain query still passes, in any letter case, with and without EDNS.
        let answers = ask(names.ns("client"), from, server, &good, SOON).expect("ask");
        assert_eq!(answers.len(), 1, "{}", daemon.report());
        for how in [["WwW.eXaMpLe", "+noedns"], ["www.example.", "+bufsize=4096"]] {
            let dug = names.dig("client", server.ip(), &how);
            assert_eq!(dug.status, "NOERROR", "{how:?}: {}", dug.text);
        }
        // A refusal echoes the letter case of the query.
        let dug = names.dig("client", server.ip(), &["eViL.eXaMpLe"]);
        assert_eq!(
            (dug.status.as_str(), dug.question.as_str()),
            ("REFUSED", "eViL.eXaMpLe. IN A")
        );
        assert!(dug.text.contains("EDNS: version: 0"), "{}", dug.text);
    }
    daemon
        .wait_status("malformed messages are counted", |status| {
            counted(status, 241) >= 16
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
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
            "malformed messages are reported",
            |flows| {
                flows
                    .iter()
                    .any(|flow| flow["Summary"] == "Unreadable: more than one question")
            },
        )
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
}

#[test]
fn flow_records_name_query_answer_verdict_and_rule() {
    let names = names();
    let daemon = client_only(&names);
    for family in FAMILIES {
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "alias.example",
            site(11, family),
        );
        names.is_refused(&daemon, "client", resolver(family), "evil.example");
        names.reaches(&daemon, "client", 11, family);
    }
    let wait = |filters: &[&str], what: &str, wanted: &dyn Fn(&serde_json::Value) -> bool| {
        daemon
            .wait_flows(filters, what, |flows| flows.iter().any(wanted))
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    };
    wait(
        &["--type", "l7", "--dns-query", "^alias", "--reply", "false"],
        "the question",
        &|flow| {
            flow["l7"]["type"] == "REQUEST"
                && flow["l7"]["dns"]["qtypes"][0] == "A"
                && flow["verdict"] == "FORWARDED"
                && flow["egress_allowed_by"][0]["name"] == "client"
                && flow["source"]["pod_name"] == "client"
        },
    );
    wait(
        &["--protocol", "dns", "--dns-query", "^alias", "--reply", "true"],
        "the answer",
        &|flow| {
            let dns = &flow["l7"]["dns"];
            flow["l7"]["type"] == "RESPONSE"
                && dns["ips"][0] == site(11, Family::V6).to_string()
                && dns["cnames"][0] == "target.example."
                && dns["ttl"] == 60
                && dns["rrtypes"] == serde_json::json!(["CNAME", "AAAA"])
        },
    );
    wait(
        &["--type", "l7", "--verdict", "DROPPED", "--dns-query", "^evil"],
        "the refusal",
        &|flow| flow["drop_reason"] == 240 && flow["l7"]["dns"]["query"] == "evil.example.",
    );
    let shown = daemon
        .cli(&["observe", "--type", "l7", "--all", "--rules"])
        .expect("observe");
    for part in [
        "dns-request proxy FORWARDED (DNS Query alias.example. A)",
        "dns-request proxy DROPPED (DNS Query evil.example. AAAA)",
        "dns-response proxy FORWARDED (DNS Answer \"203.0.113.11\" TTL: 60 CNAMEs: \"target.example.\" (Proxy alias.example. A))",
    ] {
        assert!(shown.contains(part), "{part}\n{shown}");
    }
    daemon
        .wait_status("denied names are counted", |status| counted(status, 240) >= 4)
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    let cache = daemon.cli(&["fqdn", "cache", "list"]).expect("fqdn cache list");
    for part in ["alias.example", "203.0.113.11", "2001:db8:a::b"] {
        assert!(cache.contains(part), "{part}: {cache}");
    }
    assert!(!cache.contains("evil"), "{cache}");
}

#[test]
fn audit_mode_passes_and_reports_everything() {
    let names = names();
    let settings = Settings {
        audit: true,
        ..Settings::default()
    };
    let daemon = daemon_with(&names.topology, &settings, &[("client.yaml", CLIENT)]);
    for family in FAMILIES {
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "evil.example",
            site(EVIL, family),
        );
        names.reaches(&daemon, "client", EVIL, family);
        let from = SocketAddr::new(names.topology.addr("client", family), 0);
        let server = SocketAddr::new(resolver(family), dns::PORT);
        let before = names.resolver.queries().len();
        let two = query(9, &[("www.example", rtype::A), ("evil.example", rtype::A)]);
        ask(names.ns("client"), from, server, &two, SOON).expect("ask");
        assert!(names.resolver.queries().len() > before, "{}", daemon.report());
    }
    daemon
        .wait_flows(
            &["--type", "l7", "--verdict", "AUDIT", "--dns-query", "^evil"],
            "it is reported",
            |flows| !flows.is_empty(),
        )
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
}

#[test]
fn real_dns_servers_and_clients() {
    let names = names();
    let t = &names.topology;
    let web = |family| site(10, family);
    let records = [
        format!("www.shop.example. 60 IN A {}", web(Family::V4)),
        format!("www.shop.example. 60 IN AAAA {}", web(Family::V6)),
        format!("evil.shop.example. 60 IN A {}", site(EVIL, Family::V4)),
    ];
    let records: Vec<&str> = records.iter().map(String::as_str).collect();
    let nameservers = ["192.0.2.61", "192.0.2.62", "192.0.2.63", "2001:db8:53::61"];
    let lines: String = nameservers
        .iter()
        .map(|a| {
            if a.contains(':') {
                format!("addr add {a}/128 dev lo nodad\n")
            } else {
                format!("addr add {a}/32 dev lo\n")
            }
        })
        .collect();
    t.internet.ip(&lines).expect("addresses");
    let addresses: Vec<IpAddr> = nameservers.iter().map(|a| a.parse().expect("address")).collect();
    let _servers = [
        Server::unbound(&t.internet, &[addresses[0], addresses[3]], &records).expect("unbound"),
        Server::dnsmasq(&t.internet, &[addresses[1]], &records).expect("dnsmasq"),
        Server::knot(&t.internet, &[addresses[2]], &records).expect("knot"),
    ];
    let _web = Nginx::start(&t.internet, "web", &[8080], 1).expect("nginx");
    let policy = CLIENT
        .replace(
            "matchPattern: \"*.wild.example\"",
            "matchPattern: \"www*.shop.example\"",
        )
        .replace("port: \"80\"", "port: \"8080\"");
    let daemon = daemon(&names.topology, &[("client.yaml", &policy)]);
    let client = names.ns("client");
    for server in addresses {
        let conf = t.dir().join("resolv.conf");
        // The resolver tries `www` below the first search domain, and a name with one dot too (ndots:2).
        fs::write(
            &conf,
            format!("nameserver {server}\nsearch shop.example\noptions ndots:2 timeout:1 attempts:2\n"),
        )
        .expect("resolv.conf");
        for name in ["www", "www.shop.example"] {
            assert_eq!(
                getaddrinfo(client, &conf, name).expect("python"),
                [web(Family::V4), web(Family::V6)],
                "{server} {name}\n{}",
                daemon.report()
            );
        }
        for name in ["evil", "evil.shop.example", "nobody.shop.example"] {
            let found = getaddrinfo(client, &conf, name).expect("python");
            assert!(
                found.is_empty(),
                "{server} {name}: {found:?}\n{}",
                daemon.report()
            );
        }
        for family in ["-4", "-6"] {
            let mut curl = resolving(client, "curl", &conf).expect("curl");
            curl.args(["-sS", "-m", "4", family, "http://www.shop.example:8080/"]);
            let out = output(&mut curl, OPEN).expect("curl");
            assert_eq!(
                String::from_utf8_lossy(&out.stdout),
                "hello from web\n",
                "{server} {family} {out:?}\n{}",
                daemon.report()
            );
        }
        // By an address that no query resolved.
        let mut curl = client.command("curl");
        curl.args([
            "-sS",
            "-m",
            "0.5",
            &format!("http://{}:8080/", site(EVIL, Family::V4)),
        ]);
        let out = output(&mut curl, OPEN).expect("curl");
        assert_eq!(out.status.code(), Some(28), "{out:?}");
    }
}

#[test]
fn without_dns_rules_every_name_can_be_queried_and_nothing_is_learned() {
    let names = names();
    let policy = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: plain}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
  - toFQDNs: [{matchName: www.example}]
    toPorts: [{ports: [{port: "80", protocol: TCP}]}]
"#;
    let daemon = daemon(&names.topology, &[("plain.yaml", policy)]);
    for family in FAMILIES {
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "www.example",
            site(10, family),
        );
        names.does_not_reach(&daemon, "client", 10, family);
        assert_eq!(
            connect(names.ns("client"), SocketAddr::new(site(10, family), WEB), SOON),
            Outcome::TimedOut
        );
    }
}
