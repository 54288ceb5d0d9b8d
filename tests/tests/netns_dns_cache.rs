//! Lifetime of learned addresses: TTL, connections in use, restarts, cleaning, prefetch.

use std::{fs, net::SocketAddr, time::Duration};

use palisade_testbed::{
    Daemon,
    daemon::Settings,
    dns::{Server, getaddrinfo},
    load::TcpLoad,
    ns::wait_until,
    topology::{FAMILIES, Family},
};
use palisade_tests::{
    CLOSED, OPEN,
    fixtures::dns::{EVIL, Names, names, resolver, site},
};

const PACE: Duration = Duration::from_millis(2);
const LOAD: u16 = 8082;

const CLIENT: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules:
        dns: [{matchPattern: "*.example"}, {matchPattern: "*.shop.example"}]
  - toFQDNs:
    - matchName: www.example
    - matchName: short.example
    - matchName: target.example
    - matchPattern: "*.shop.example"
    toPorts:
    - ports: [{port: "80", endPort: 8090, protocol: ANY}]
"#;

fn daemon(names: &Names, tables: &str, policy: &str) -> Daemon {
    let settings = Settings {
        tables: tables.into(),
        ..Settings::default()
    };
    names
        .daemon(&settings, &[("client.yaml", policy)])
        .expect("daemon")
}

fn load(names: &Names, n: u8, family: Family) -> TcpLoad {
    let to = SocketAddr::new(site(n, family), LOAD);
    TcpLoad::start(names.ns("client"), &names.topology.internet, to, PACE).expect("connection")
}

/// Lets an address expire soon, but not before the test has connected to it, also on a busy machine.
const SHORT_TTL: &str = "[dns]\nmin_ttl = \"5s\"\n[timeouts]\nsweep = \"500ms\"\ntcp_closing = \"1s\"\n";

#[test]
fn an_expired_address_is_removed_unless_a_connection_uses_it() {
    let names = names();
    let daemon = daemon(&names, SHORT_TTL, CLIENT);
    // One family is in use, the other is not.
    let (used, unused) = (Family::V4, Family::V6);
    for family in FAMILIES {
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "short.example",
            site(22, family),
        );
    }
    let live = load(&names, 22, used);
    names.reaches(&daemon, "client", 22, unused);
    let in_map = |what: &str, addresses: u64| {
        daemon
            .wait_status(what, |status| status["names"]["in_map"] == addresses)
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    };
    in_map("the unused address expires", 1);
    assert!(live.moves(100, OPEN), "{}", daemon.report());
    names.reaches(&daemon, "client", 22, used);
    names.does_not_reach(&daemon, "client", 22, unused);
    assert!(live.finish(OPEN).whole());
    in_map("the address expires after its connection", 0);
    names.does_not_reach(&daemon, "client", 22, used);
    // After another query the address is reachable again.
    names.resolves(&daemon, "client", resolver(used), "short.example", site(22, used));
    names.reaches(&daemon, "client", 22, used);
}

#[test]
fn learned_addresses_survive_a_restart() {
    let names = names();
    let mut daemon = daemon(&names, "", CLIENT);
    for family in FAMILIES {
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "www.example",
            site(10, family),
        );
    }
    let live = load(&names, 10, Family::V4);
    for end in [Daemon::kill9, Daemon::terminate] {
        end(&mut daemon).expect("end");
        for family in FAMILIES {
            // The map needs no running daemon.
            names.reaches(&daemon, "client", 10, family);
            names.does_not_reach(&daemon, "client", EVIL, family);
        }
        daemon.restart().expect("restart");
        for family in FAMILIES {
            names.reaches(&daemon, "client", 10, family);
            names.does_not_reach(&daemon, "client", EVIL, family);
        }
        let list = daemon.cli(&["fqdn", "cache", "list"]).expect("list");
        assert!(
            list.contains("www.example") && list.contains("203.0.113.10"),
            "{list}"
        );
    }
    assert!(live.moves(50, OPEN), "{}", daemon.report());
    assert!(live.finish(OPEN).whole());
}

#[test]
fn a_cleaned_name_must_be_resolved_again() {
    let names = names();
    let daemon = daemon(&names, "", CLIENT);
    let family = Family::V4;
    names.resolves(
        &daemon,
        "client",
        resolver(family),
        "www.example",
        site(10, family),
    );
    names.resolves(
        &daemon,
        "client",
        resolver(family),
        "short.example",
        site(22, family),
    );
    let live = load(&names, 10, family);
    assert!(live.moves(50, OPEN));
    daemon
        .cli(&["fqdn", "cache", "clean", "--name", "www.example"])
        .expect("clean");
    wait_until("the connection is denied", OPEN, || !live.moves(1, CLOSED))
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    names.does_not_reach(&daemon, "client", 10, family);
    names.reaches(&daemon, "client", 22, family);
    names.resolves(
        &daemon,
        "client",
        resolver(family),
        "www.example",
        site(10, family),
    );
    assert!(live.moves(50, OPEN), "{}", daemon.report());
    names.reaches(&daemon, "client", 10, family);
    daemon.cli(&["fqdn", "cache", "clean"]).expect("clean");
    names.does_not_reach(&daemon, "client", 10, family);
    names.does_not_reach(&daemon, "client", 22, family);
    let _ = live.finish(Duration::ZERO);
}

#[test]
fn cname_targets_count_only_with_follow_cname() {
    let names = names();
    let family = Family::V4;
    for (tables, open) in [("", false), ("[dns]\nfollow_cname = true\n", true)] {
        let daemon = daemon(&names, tables, CLIENT);
        // An alias of target.example, which the policy names.
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "alias.example",
            site(11, family),
        );
        if open {
            names.reaches(&daemon, "client", 11, family);
        } else {
            names.does_not_reach(&daemon, "client", 11, family);
        }
    }
}

#[test]
fn prefetch_resolves_names_for_clients_that_send_no_queries() {
    let names = names();
    let daemon = daemon(
        &names,
        "[dns]\nprefetch = true\nservers = [\"192.0.2.53\"]\n",
        CLIENT,
    );
    daemon
        .wait_status("names are resolved", |status| {
            status["names"]["in_map"].as_u64() >= Some(2)
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    for family in FAMILIES {
        names.reaches(&daemon, "client", 10, family);
        names.does_not_reach(&daemon, "client", 19, family);
        names.does_not_reach(&daemon, "client", EVIL, family);
    }
}

#[test]
fn a_resolver_continues_its_search_list_after_nxdomain_for_a_denied_name() {
    let names = names();
    let internet = &names.topology.internet;
    internet.ip("addr add 192.0.2.61/32 dev lo").expect("address");
    let server = "192.0.2.61".parse().expect("address");
    let record = format!("web.shop.example. 60 IN A {}", site(10, Family::V4));
    let _server = Server::knot(internet, &[server], &[&record]).expect("knot");
    let daemon = daemon(&names, "[dns]\ndeny_answer = \"nxdomain\"\n", CLIENT);
    let conf = names.topology.dir().join("resolv.conf");
    fs::write(
        &conf,
        "nameserver 192.0.2.61\nsearch a.elsewhere b.elsewhere shop.example\noptions ndots:3 timeout:1 attempts:1\n",
    )
    .expect("resolv.conf");
    for name in ["web", "web.shop.example"] {
        let found = getaddrinfo(names.ns("client"), &conf, name).expect("python");
        assert_eq!(found, [site(10, Family::V4)], "{name}\n{}", daemon.report());
    }
    names.reaches(&daemon, "client", 10, Family::V4);
    daemon
        .wait_flows(
            &["--type", "l7", "--verdict", "DROPPED", "--dns-query", "elsewhere"],
            "the denied ones are reported",
            |flows| flows.len() >= 2,
        )
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
}

#[test]
fn an_egress_deny_rule_by_name_overrides_a_wide_allow_rule() {
    let names = names();
    let policy = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules:
        dns: [{matchPattern: "*"}]
  - toEntities: [world]
  egressDeny:
  - toFQDNs: [{matchPattern: "evil.*"}]
"#;
    let daemon = daemon(&names, "", policy);
    for family in FAMILIES {
        names.reaches(&daemon, "client", EVIL, family);
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "www.example",
            site(10, family),
        );
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "evil.example",
            site(EVIL, family),
        );
        names.does_not_reach(&daemon, "client", EVIL, family);
        names.reaches(&daemon, "client", 10, family);
    }
}
