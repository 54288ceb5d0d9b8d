//! Packets between the node and its workloads that the policies of both ends inspect.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use palisade_testbed::{
    daemon::Settings,
    output,
    topology::FAMILIES,
    web::{Web, curl},
};
use palisade_tests::{
    OPEN,
    fixtures::apps::{apps, policy},
};

const WEB: u16 = 80;
const DENIED: &str = "Access denied\r\n";

fn paths(one: &str, other: &str) -> String {
    format!(
        "      rules:\n        http:\n        - {{path: \"/{one}(/.*)?\"}}\n        - {{path: \"/{other}(/.*)?\"}}\n"
    )
}

#[test]
fn a_request_is_forwarded_only_if_both_endpoints_allow_it() {
    let apps = apps();
    let web = Web::start(apps.ns("server"), "server", &[WEB], &[], &apps.certificate).expect("nginx");
    let node = policy("node", "egress", &[WEB], &paths("both", "node"));
    let server = policy("server", "ingress", &[WEB], &paths("both", "server"));
    let daemon = apps
        .daemon(
            &Settings::default(),
            &[("node.yaml", &node), ("server.yaml", &server)],
        )
        .expect("daemon");
    for family in FAMILIES {
        let at: SocketAddr = apps.at("server", family, WEB);
        let url = |path: &str| format!("http://{at}{path}");
        for (from, path, status) in [
            ("node", "/both", 200),
            ("node", "/both/x", 200),
            ("node", "/node", 403),
            ("node", "/server", 403),
            ("node", "/other", 403),
            // Packets of other hosts are subject to one policy.
            ("internet", "/server", 200),
            ("internet", "/node", 403),
        ] {
            let begun = Instant::now();
            let got = curl(apps.ns(from), &[&url(path)], OPEN).expect("curl");
            assert_eq!(
                (got.code, got.status),
                (0, status),
                "{from} {path}: {got:?}\n{}",
                daemon.report()
            );
            assert_eq!(got.body == DENIED, status == 403, "{got:?}");
            assert!(begun.elapsed() < Duration::from_secs(1), "{from} {path}: {got:?}");
        }
        // Several requests on one connection, until one is denied.
        for denied in ["/node", "/server"] {
            let urls = ["/both/1", "/both/2", denied, "/both/3"].map(url);
            let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
            let got = curl(apps.ns("node"), &urls, OPEN).expect("curl");
            let hello = "hello from server\n";
            assert_eq!(
                got.body,
                [hello, hello, DENIED, hello].concat(),
                "{denied}: {got:?}\n{}",
                daemon.report()
            );
        }
    }
    let seen = web.seen();
    assert!(
        seen.iter()
            .all(|seen| seen.request.starts_with("GET /both") || seen.request.starts_with("GET /server")),
        "{seen:?}"
    );
    // Each of the two policies is named in its own flow record.
    for (policy, path) in [("node-egress", "/server$"), ("server-ingress", "/node$")] {
        daemon
            .wait_flows(
                &[
                    "--type",
                    "l7",
                    "--verdict",
                    "DROPPED",
                    "--http-path",
                    path,
                    "--from-label",
                    "reserved:host",
                ],
                "refused requests name the policy that refuses them",
                |flows| flows.iter().any(|flow| flow.to_string().contains(policy)),
            )
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    }
    // Neither end may keep a connection that the other end does not know.
    std::thread::sleep(Duration::from_secs(1));
    for name in ["node", "server"] {
        let mut ss = apps.ns(name).command("ss");
        ss.args([
            "-Htno",
            "state",
            "connected",
            "exclude",
            "time-wait",
            "( sport = :80 or dport = :80 )",
        ]);
        let out = output(&mut ss, OPEN).expect("ss");
        let left = String::from_utf8_lossy(&out.stdout);
        assert!(left.trim().is_empty(), "{name}: {left}\n{}", daemon.report());
    }
}
