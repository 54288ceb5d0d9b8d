//! The daemon is killed and started again while clients send allowed and denied requests: nothing denied gets through.

use std::fs;

use palisade_testbed::{
    Daemon,
    topology::FAMILIES,
    web::{Peer, Web},
};
use palisade_tests::{
    fixtures::{
        apps::{apps, policy},
        intercept::{RULES, lab},
        kafka::{Broker, client, load},
        python::{GrpcServer, Load, packages},
    },
    setup::client_only,
};

const HTTPS: u16 = 443;
const CLEAR: u16 = 80;
const KAFKA: u16 = 9092;
const NAME: &str = "www.web.example";

/// Kills the daemon twice under load, each time after `count` denied requests of each load, and asserts that its clients
/// have got the expected results.
#[track_caller]
fn is_enforced_across_kills(daemon: &mut Daemon, loads: &[Load], count: u64) {
    for _ in 0..2 {
        for load in loads {
            load.grows("denied", count)
                .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
        }
        daemon.kill9().expect("kill -9");
        for load in loads {
            load.grows("failed", 2).expect("attempts without the daemon");
        }
        daemon.restart().expect("restart");
        for load in loads {
            load.grows("allowed", count)
                .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
        }
    }
    for load in loads {
        let counts = load.counts();
        assert!(
            counts["leaked"] == 0 && counts["unread"].as_u64().unwrap_or(0) == 0,
            "{counts}\n{}",
            daemon.report()
        );
    }
}

#[test]
fn nothing_denied_gets_through_over_http_1_1() {
    let lab = lab();
    let internet = lab.apps.ns("internet");
    let peer = Peer::start_tls(internet, HTTPS, &lab.apps.both("internet"), &lab.server).expect("peer");
    let mut daemon = lab.client_only(&[HTTPS], RULES);
    let loads = FAMILIES.map(|family| {
        let at = lab.apps.at("internet", family, HTTPS);
        Load::start(lab.apps.ns("client"), NAME, at, &lab.server, 2).expect("load")
    });
    is_enforced_across_kills(&mut daemon, &loads, 20);
    drop(loads);
    assert!(peer.requests_for("/allowed/load") >= 80);
    assert_eq!(peer.requests_for("/denied/load"), 0, "{}", daemon.report());
}

#[test]
fn nothing_denied_gets_through_over_http2() {
    let lab = lab();
    let web = Web::start_http2(lab.apps.ns("internet"), "nginx", &[], &[HTTPS], &lab.server).expect("nginx");
    let mut daemon = lab.client_only(&[HTTPS], RULES);
    let loads = FAMILIES.map(|family| {
        let at = lab.apps.at("internet", family, HTTPS);
        Load::start_http2(lab.apps.ns("client"), NAME, at, &lab.server, 1).expect("load")
    });
    is_enforced_across_kills(&mut daemon, &loads, 20);
    drop(loads);
    let seen = web.seen();
    assert!(
        seen.len() >= 80
            && seen
                .iter()
                .all(|seen| seen.request == "GET /allowed/load HTTP/2.0"),
        "{}",
        daemon.report()
    );
}

/// With gRPC over TLS and in clear text.
#[test]
fn no_denied_grpc_call_gets_through() {
    packages().expect("the packages");
    let lab = lab();
    let (internet, addresses) = (lab.apps.ns("internet"), lab.apps.both("internet"));
    // A connection that is not intercepted would succeed too.
    let ca = lab.apps.topology.dir().join("both.pem");
    let both = [&lab.ours.cert, &lab.root.cert].map(|path| fs::read(path).expect("certificate"));
    fs::write(&ca, both.concat()).expect("certificates");
    let server =
        |port, certificate| GrpcServer::start(internet, port, &addresses, certificate).expect("server");
    let servers = [server(HTTPS, Some(&lab.server)), server(CLEAR, None)];
    let clear = "      rules:\n        http: [{method: POST, path: /test.Echo/Unary}]\n";
    let (tls, _) = RULES.split_once("      rules:").expect("rules");
    let rule = |port, rules: &str| {
        policy("client", "egress", &[port], rules).replace("client-egress", &format!("client-{port}"))
    };
    let mut settings = lab.settings();
    settings.tables.push_str("[http]\nclear_text_http2 = true\n");
    let mut daemon = lab.daemon(
        &settings,
        &[
            ("tls.yaml", &rule(HTTPS, &format!("{tls}{clear}"))),
            ("clear.yaml", &rule(CLEAR, clear)),
        ],
    );
    let client = lab.apps.ns("client");
    let loads: Vec<Load> = FAMILIES
        .into_iter()
        .flat_map(|family| [(family, HTTPS, Some(ca.as_path())), (family, CLEAR, None)])
        .map(|(family, port, ca)| {
            let at = lab.apps.at("internet", family, port);
            Load::start_grpc(client, "api.web.example", ca, at, 1).expect("load")
        })
        .collect();
    is_enforced_across_kills(&mut daemon, &loads, 20);
    drop(loads);
    for server in &servers {
        let calls = server.calls();
        assert!(
            calls.len() >= 80 && calls.iter().all(|call| call.starts_with("Unary ")),
            "{}",
            daemon.report()
        );
    }
}

#[test]
fn nothing_gets_into_a_denied_topic() {
    packages().expect("the packages");
    let apps = apps();
    let internet = apps.ns("internet");
    let brokers = FAMILIES.map(|family| {
        let at = apps.at("internet", family, KAFKA);
        let broker = Broker::start(internet, at, &["orders", "secret"]).expect("broker");
        (at, broker)
    });
    // Producers learn of both topics, so they send messages to both.
    let rules = "      rules:\n        kafka: [{apiKey: metadata}, {role: produce, topic: orders}]\n";
    let mut daemon = client_only(&apps, &[KAFKA], rules);
    let loads =
        [0, 1].map(|n: usize| load(apps.ns("client"), brokers[n].0, "orders", "secret").expect("load"));
    is_enforced_across_kills(&mut daemon, &loads, 10);
    drop(loads);
    for (at, _) in &brokers {
        let read = |topic: &str| client(internet, "confluent", "consume", *at, topic, "").expect("client");
        assert_eq!(read("orders"), "hello");
        assert_eq!(read("secret"), "nothing", "{}", daemon.report());
    }
}
