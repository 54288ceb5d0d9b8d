//! What an operator sees: who decided, and why.

use palisade_testbed::{
    daemon::Settings,
    ns::wait_until,
    process::Process,
    topology::{FAMILIES, Family},
};
use palisade_tests::{OPEN, flows, world};

const POLICIES: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: allow-front}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts:
    - ports: [{port: \"80\", protocol: TCP}, {port: \"81\", protocol: TCP}]
  - fromEndpoints: [{matchLabels: {app: db}}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: no-db}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingressDeny:
  - fromEndpoints: [{matchLabels: {app: db}}]
    toPorts:
    - ports: [{port: \"80\", protocol: TCP}]
---
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node-in}
spec:
  nodeSelector: {}
  ingress:
  - fromEntities: [world]
    toPorts:
    - ports: [{port: \"22\", protocol: TCP}]
";

#[test]
fn observe_names_the_policy_that_decided() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("p.yaml", POLICIES)])
        .expect("daemon");
    world.expect(
        &daemon,
        "front -> back tcp/80 open
         db -> back tcp/80 drop
         far -> back tcp/80 drop
         far -> node tcp/22 open
         far -> node tcp/80 drop",
    );
    flows::expect(
        &daemon,
        &world,
        ("front", "back"),
        80,
        "FORWARDED",
        Some("default/allow-front"),
    );
    flows::expect(
        &daemon,
        &world,
        ("db", "back"),
        80,
        "DROPPED",
        Some("default/no-db"),
    );
    // the default deny, by the policies that caused it
    flows::expect(
        &daemon,
        &world,
        ("far", "back"),
        80,
        "DROPPED",
        Some("default/allow-front"),
    );
    flows::expect(&daemon, &world, ("far", "node"), 22, "FORWARDED", Some("node-in"));
    flows::expect(&daemon, &world, ("far", "node"), 80, "DROPPED", Some("node-in"));

    let back = world.addr("back", Family::V4).to_string();
    let by = |reason| {
        let filters = ["--to-ip", &back, "--drop-reason-desc", reason];
        daemon
            .wait_flows(&filters, reason, |flows| !flows.is_empty())
            .expect("flows")
    };
    let denied = &by("POLICY_DENIED")[0];
    assert_eq!(denied["palisade"]["rule"]["default_deny"], true, "{denied:#}");
    assert_eq!(denied["source"]["identity"], 9, "{denied:#}");
    let listed = &by("POLICY_DENY")[0];
    assert_eq!(listed["ingress_denied_by"][0]["name"], "no-db", "{listed:#}");
    assert_eq!(listed["source"]["pod_name"], "db", "{listed:#}");
    let location = listed["palisade"]["rule"]["location"]
        .as_str()
        .unwrap_or_default();
    assert!(location.contains("p.yaml:18"), "{listed:#}");

    // the same on a line
    let lines = daemon
        .cli(&[
            "observe",
            "--verdict",
            "DROPPED",
            "--to-ip",
            &back,
            "-o",
            "compact",
        ])
        .expect("observe");
    assert!(
        lines.contains("default/db:") && lines.contains("default/back:80"),
        "{lines}"
    );
    assert!(
        lines.contains("Policy denied by denylist") && lines.contains("DROPPED"),
        "{lines}"
    );
    assert!(lines.contains("policy-verdict:none INGRESS DENIED"), "{lines}");
}

#[test]
fn filters_by_label_identity_endpoint_protocol_and_count() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("p.yaml", POLICIES)])
        .expect("daemon");
    world.expect(
        &daemon,
        "front -> back tcp/80 open\nfar -> back ping drop\nfar -> back udp/53 drop",
    );
    flows::expect(&daemon, &world, ("far", "back"), 53, "DROPPED", None);
    let some = |filters: &[&str]| {
        daemon
            .wait_flows(filters, &filters.join(" "), |flows| !flows.is_empty())
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()))
    };
    let all_from =
        |flows: &[serde_json::Value], name: &str| flows.iter().all(|f| f["source"]["pod_name"] == name);
    assert!(all_from(&some(&["--from-label", "app=front"]), "front"));
    assert!(all_from(&some(&["--from-endpoint", "default/front"]), "front"));
    assert!(
        some(&["--from-identity", "world-ipv4"])
            .iter()
            .all(|f| f["verdict"] == "DROPPED")
    );
    assert!(
        some(&["--protocol", "icmp"])
            .iter()
            .all(|f| f["verdict"] == "DROPPED")
    );
    assert!(
        some(&["--type", "policy-verdict"])
            .iter()
            .all(|f| f["event_type"]["type"] == 5)
    );
    assert_eq!(daemon.flows(&["--last", "2"]).expect("flows").len(), 2);
    flows::expect_none(&daemon, &["--to-port", "4711"]);
    flows::expect_none(&daemon, &["--verdict", "AUDIT"]);
    let wrong = daemon
        .try_cli(&["observe", "--from-ip", "nonsense"])
        .expect("run");
    assert!(!wrong.status.success() && String::from_utf8_lossy(&wrong.stderr).contains("nonsense"));
}

#[test]
fn observe_and_monitor_follow_what_comes() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("p.yaml", POLICIES)])
        .expect("daemon");
    let dir = world.topology.dir();
    let follow = Process::spawn(
        "observe",
        daemon.command(&["observe", "--follow", "--verdict", "DROPPED"]),
        dir,
    )
    .expect("observe");
    let monitor = Process::spawn(
        "monitor",
        daemon.command(&["monitor", "--type", "drop,policy-verdict"]),
        dir,
    )
    .expect("monitor");
    let seen = || {
        world
            .check("far -> back tcp/80 drop\nfront -> back tcp/80 open")
            .map(drop)
            .expect("check")
    };
    wait_until("observe --follow shows the drop", OPEN, || {
        seen();
        follow.log().contains("default/back:80") && follow.log().contains("DROPPED")
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", follow.log()));
    assert!(!follow.log().contains("FORWARDED"), "{}", follow.log());
    wait_until("monitor shows both", OPEN, || {
        seen();
        let log = monitor.log();
        log.contains("action allow") && log.contains("action deny")
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", monitor.log()));
}

const INSPECTED: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: http-only}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts:
    - ports: [{port: \"80\", protocol: TCP}]
      rules:
        http: [{method: GET, path: \"/public\"}]
    - ports: [{port: \"81\", protocol: TCP}]
  - fromEndpoints: [{matchLabels: {app: db}}]
    authentication: {mode: required}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: names}
spec:
  endpointSelector: {matchLabels: {app: front}}
  egress:
  - toEndpoints: [{}]
  - toEntities: [world]
    toPorts:
    - ports: [{port: \"53\", protocol: UDP}]
      rules:
        dns: [{matchPattern: \"*\"}]
    - ports: [{port: \"443\", protocol: TCP}]
      serverNames: [www.example.org]
";

#[test]
fn what_must_be_inspected_is_dropped_with_a_reason_of_its_own_until_somebody_can() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("l7.yaml", INSPECTED)])
        .expect("daemon");
    world.expect(
        &daemon,
        "front -> back tcp/80 drop
         front -> back tcp/81 open
         db -> back tcp/80 drop
         front -> far udp/53 drop
         front -> far tcp/443 drop
         front -> far tcp/80 drop",
    );
    let status = daemon.status().expect("status");
    for (reason, from, to, port) in [
        (212, "front", "back", 80),
        (214, "front", "far", 443),
        (189, "db", "back", 80),
        (133, "front", "far", 80),
    ] {
        let counted = status["drops"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|d| d["reason"] == reason);
        assert!(counted, "{reason} is not in {:#}", status["drops"]);
        for family in FAMILIES {
            let (from, to) = (
                world.addr(from, family).to_string(),
                world.addr(to, family).to_string(),
            );
            let (port, reason) = (port.to_string(), reason.to_string());
            let filters = [
                "--from-ip",
                &from,
                "--to-ip",
                &to,
                "--to-port",
                &port,
                "--drop-reason-desc",
                &reason,
            ];
            daemon
                .wait_flows(&filters, &filters.join(" "), |flows| !flows.is_empty())
                .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
        }
    }
    let missing = status["missing_inspectors"].to_string();
    for part in ["http", "tls", "default/http-only", "default/names"] {
        assert!(missing.contains(part), "{part}: {missing}");
    }
    // DNS is read: what is none is dropped by the reader.
    assert!(!missing.contains("dns"), "{missing}");
    let text = daemon.cli(&["status"]).expect("status").to_lowercase();
    assert!(
        text.contains("http") && text.contains("default/http-only"),
        "{text}"
    );
}

#[test]
fn listings_show_the_world_as_it_is() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("p.yaml", POLICIES)])
        .expect("daemon");
    world.expect(&daemon, "front -> back tcp/80 open\nfront -> back ping drop");
    let endpoints = daemon.cli(&["endpoint", "list"]).expect("list");
    for part in [
        "ENDPOINT",
        "IDENTITY",
        "k8s:app=front",
        "10.0.1.10",
        "fd00:1::10",
        "Enabled",
        "Disabled",
    ] {
        assert!(endpoints.contains(part), "{part}: {endpoints}");
    }
    let id = flows::endpoint_id(&daemon, "default/back");
    let table = daemon.cli(&["bpf", "policy", "get", &id]).expect("policy");
    assert!(
        table.contains("k8s:app=front") && table.contains("80/TCP"),
        "{table}"
    );
    let connections = daemon.cli(&["bpf", "ct", "list"]).expect("ct");
    assert!(connections.contains("10.0.2.10:80"), "{connections}");
    let ipcache = daemon.cli(&["bpf", "ipcache", "list"]).expect("ipcache");
    for part in ["10.0.1.10", "fd00:2::10", "192.0.2.20", "198.51.100.1"] {
        assert!(ipcache.contains(part), "{part}: {ipcache}");
    }
    let identities = daemon.cli(&["identity", "list"]).expect("identities");
    assert!(
        identities.contains("reserved:host") && identities.contains("k8s:app=db"),
        "{identities}"
    );
    let selectors = daemon.cli(&["policy", "selectors"]).expect("selectors");
    assert!(selectors.contains("front"), "{selectors}");
    let policies = daemon.cli(&["policy", "get"]).expect("policies");
    for part in ["default/allow-front", "default/no-db", "node-in"] {
        assert!(policies.contains(part), "{part}: {policies}");
    }
    // the counters of the rules move
    let before = daemon
        .json(&["policy", "get", "default/allow-front"])
        .expect("policy")
        .to_string();
    world.expect(&daemon, "front -> back tcp/80 open");
    let after = daemon
        .json(&["policy", "get", "default/allow-front"])
        .expect("policy")
        .to_string();
    assert_ne!(before, after);
}
