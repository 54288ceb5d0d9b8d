//! The daemon's log: levels that change while it runs, and the inspection of connections step by step.

use std::time::Duration;

use palisade_testbed::{
    Daemon,
    daemon::Settings,
    ns::wait_until,
    topology::{FAMILIES, Family},
    web::curl,
};
use palisade_tests::{
    fixtures::apps::{Apps, apps, borrowed, policies},
    setup::{daemon_with, tables, webs},
};

const RULES: &str = "      rules:\n        http:\n        - {method: \"GET\", path: \"/open\"}\n        - {method: \"PUT\", \
                     path: \"/open\"}\n";
const TIMEOUT: Duration = Duration::from_secs(30);

/// Returns the status of a request of `from` to the internet.
fn status(apps: &Apps, from: &str, family: Family, path: &str) -> u16 {
    let url = format!("http://{}{path}", apps.at("internet", family, 80));
    curl(apps.ns(from), &[&url], TIMEOUT).expect("curl").status
}

/// Returns the lines of the log about inspected connections.
fn steps(daemon: &Daemon) -> Vec<String> {
    let log = daemon.log();
    let lines = log.lines().filter(|line| line.contains("component=inspect"));
    lines.map(str::to_owned).collect()
}

#[track_caller]
fn wait_step(daemon: &Daemon, parts: &[&str]) {
    wait_until(parts[0], TIMEOUT, || {
        let steps = steps(daemon);
        steps
            .iter()
            .any(|line| parts.iter().all(|part| line.contains(part)))
    })
    .unwrap_or_else(|error| panic!("{error:#}: {parts:?}\n{}", daemon.log()));
}

#[test]
fn a_denied_request_of_one_endpoint_is_logged_step_by_step_for_a_limited_time() {
    let apps = apps();
    let daemon = daemon_with(
        &apps.topology,
        &Settings::default(),
        &borrowed(&policies(&[80], RULES)),
    );
    let _webs = webs(&apps, ["internet"], &[80], &[]);
    for family in FAMILIES {
        assert_eq!(status(&apps, "client", family, "/closed"), 403);
    }
    assert!(steps(&daemon).is_empty(), "{}", daemon.log());

    // Wrong requests.
    for (args, text) in [
        (&["inspect"][..], "write COMPONENT=LEVEL"),
        (&["inspekt=debug"], "the log has no component 'inspekt'"),
        (&["inspect=debug", "--endpoint", "default/nobody"], "nobody"),
        (&["inspect=debug", "--for", "25h"], "--for must be between"),
        (&["policy=debug", "--address", "192.0.2.1"], "leave out policy"),
    ] {
        let out = daemon
            .try_cli(&[&["log", "set"], args].concat())
            .expect("log set");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains(text), "{args:?}: {said}");
    }

    let set = daemon
        .cli(&["log", "set", "inspect=debug", "--endpoint", "default/client"])
        .expect("log set");
    assert!(
        set.contains("For another 10m") && set.contains("default/client"),
        "{set}"
    );
    for family in FAMILIES {
        assert_eq!(status(&apps, "client", family, "/open"), 200);
        assert_eq!(status(&apps, "client", family, "/closed?token=abc123"), 403);
        assert_eq!(status(&apps, "node", family, "/closed"), 403);
        let server = format!("server={}", apps.at("internet", family, 80));
        let client = "endpoint=\"default/client\" direction=\"egress\"";
        wait_step(
            &daemon,
            &["the inspection of a connection begins", client, &server],
        );
        wait_step(&daemon, &["the rule matches the request", client, &server]);
        wait_step(
            &daemon,
            &[
                "/open: forwarded",
                client,
                &server,
                "file=\"",
                "client-egress.yaml",
            ],
        );
        wait_step(
            &daemon,
            &[
                "the rule does not match the request: it requires path \"/open\", method \"PUT\"",
                client,
                &server,
            ],
        );
        wait_step(&daemon, &["/closed?token=[redacted]: denied (", client, &server]);
        wait_step(&daemon, &["the client gets a response of", client, &server]);
    }
    let all = steps(&daemon).join("\n");
    assert!(!all.contains("abc123"), "{all}");
    assert!(!all.contains("endpoint=\"node1\""), "{all}");

    // The limit ends it, without a restart.
    daemon
        .cli(&["log", "set", "inspect=debug,fqdn=debug", "--for", "1s"])
        .expect("log set");
    wait_until("the usual levels", TIMEOUT, || {
        let status = daemon.json(&["log", "get"]).expect("log get");
        status["remaining_seconds"].is_null()
    })
    .expect("the end of the setting");
    assert!(
        daemon.log().contains("the log has its usual levels again"),
        "{}",
        daemon.log()
    );
    let before = steps(&daemon).len();
    assert_eq!(status(&apps, "client", Family::V4, "/closed"), 403);
    assert_eq!(steps(&daemon).len(), before);

    // So does a reset. An address chooses connections of all endpoints.
    let address = apps.topology.addr("internet", Family::V6).to_string();
    daemon
        .cli(&["log", "set", "inspect=trace", "--address", &address])
        .expect("log set");
    assert_eq!(status(&apps, "node", Family::V4, "/closed"), 403);
    assert_eq!(status(&apps, "node", Family::V6, "/closed"), 403);
    wait_step(&daemon, &["/closed: denied", "endpoint=\"node1\"", &address]);
    daemon.cli(&["log", "reset"]).expect("log reset");
    let traced = steps(&daemon)[before..].join("\n");
    let v4 = apps.topology.addr("internet", Family::V4).to_string();
    assert!(!traced.contains(&v4), "{traced}");
    let get = daemon.cli(&["log", "get"]).expect("log get");
    assert!(get.contains("inspect") && !get.contains("another"), "{get}");
}

#[test]
fn the_steps_of_the_proxy_are_logged_with_the_reason_of_a_503() {
    let apps = apps();
    let rules = policies(&[80, 81], RULES);
    let daemon = daemon_with(
        &apps.topology,
        &tables("[http]\nclear_text_http2 = true\n"),
        &borrowed(&rules),
    );
    let _webs = webs(&apps, ["internet"], &[80], &[]);
    daemon
        .cli(&["log", "set", "inspect=debug", "--endpoint", "default/client"])
        .expect("log set");
    for family in FAMILIES {
        assert_eq!(status(&apps, "client", family, "/closed"), 403);
        let at = apps.at("internet", family, 80);
        let server = format!("server={at}");
        wait_step(&daemon, &["the proxy has accepted the connection", &server]);
        wait_step(&daemon, &["the rule does not match the request", &server]);
        wait_step(&daemon, &["/closed: denied (", &server]);
        // Nothing listens at the second port.
        let closed = apps.at("internet", family, 81);
        let answer = curl(apps.ns("client"), &[&format!("http://{closed}/open")], TIMEOUT).expect("curl");
        assert_eq!(answer.status, 503);
        wait_step(&daemon, &["refused", "failed", &format!("server={closed}")]);
    }
}

#[test]
fn lines_about_interfaces_and_policies_name_them_in_fields() {
    let mut apps = apps();
    let rules = policies(&[80], RULES);
    let client = rules.iter().find(|(name, _)| name == "client-egress.yaml");
    let (name, text) = client.expect("the policy of the client").clone();
    let daemon = daemon_with(&apps.topology, &Settings::default(), &[(&name, &text)]);
    let lines = |parts: &[&str]| {
        let log = daemon.log();
        let found = log
            .lines()
            .filter(|line| parts.iter().all(|part| line.contains(part)));
        found.count()
    };
    let wait_line = |parts: &[&str], count: usize| {
        wait_until(parts[0], TIMEOUT, || lines(parts) == count)
            .unwrap_or_else(|error| panic!("{error:#}: {parts:?}\n{}", daemon.log()));
    };
    for (interface, role) in [
        ("veth-client", "endpoint"),
        ("veth-server", "endpoint"),
        ("nic0", "host"),
    ] {
        let fields = format!(
            "component=network event=\"interface-guarded\" interface=\"{interface}\" role=\"{role}\""
        );
        wait_line(&["the interface is guarded", &fields], 1);
    }
    let fields = "file=\"client-egress.yaml\" policy=\"default/client-egress\" revision=";
    let of = |event: &str| format!("component=control event=\"{event}\" {fields}");
    for (event, text) in [
        ("changed", text.replace("/open", "/other")),
        ("refused", text.replace("http:", "htpt:")),
    ] {
        daemon.write(&name, &text).expect("a file");
        wait_line(&["policy ", &of(event)], 1);
    }
    std::fs::remove_file(daemon.policies().join(&name)).expect("removed");
    wait_line(
        &["policy removed", &of("removed"), "endpoints=\"default/client\""],
        1,
    );
    apps.topology.unplug("server").expect("unplug");
    apps.topology.plug("server").expect("plug");
    wait_line(&["the interface is guarded", "interface=\"veth-server\""], 2);
}
