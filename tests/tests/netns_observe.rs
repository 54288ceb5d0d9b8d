//! The operator's view: which policy decided, and why.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, Stdio},
};

use palisade_abi::identity;
use palisade_testbed::{
    daemon::Settings,
    ns::wait_until,
    output,
    process::Process,
    topology::{FAMILIES, Family},
    web::{Web, by_name, curl},
};
use palisade_tests::{
    OPEN,
    fixtures::apps::{apps, policy},
    flows,
    setup::tables,
    world,
};

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
    // Default deny, with the policies that cause it.
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

    // The same in the text output.
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
fn observe_and_monitor_follow_new_flows() {
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

#[test]
fn monitor_shows_events_of_the_daemon_and_outlives_it() {
    let world = world();
    let mut daemon = world
        .daemon(Settings::default(), &[("p.yaml", POLICIES)])
        .expect("daemon");
    let dir = world.topology.dir();
    let start = |name: &str, args: &[&str]| {
        let command = daemon.command(&[&["monitor", "--type"], args].concat());
        Process::spawn(name, command, dir).expect("monitor")
    };
    let all = start("monitor", &["drop,agent"]);
    let to_back = start("monitor-v", &["drop", "-v", "--to", "default/back"]);
    let numbers = start("monitor-n", &["drop", "-n"]);
    let from_back = start("monitor-from", &["drop", "-v", "--from", "default/back"]);
    let seen = || {
        world
            .check("far -> back tcp/80 drop\nfront -> back tcp/80 open")
            .map(drop)
            .expect("check")
    };
    let drops = |process: &Process| process.log().matches("drop (Policy denied)").count();
    wait_until("monitor shows the drop", OPEN, || {
        seen();
        drops(&all) > 0 && drops(&numbers) > 0 && to_back.log().contains(" DROP: ")
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}{}", all.log(), to_back.log()));
    assert!(all.log().contains(", identity world-ipv4->"), "{}", all.log());
    let (log, world_ipv4) = (numbers.log(), identity::WORLD_IPV4);
    assert!(log.contains(&format!(", identity {world_ipv4}->")), "{log}");
    assert!(!log.contains("world"), "{log}");
    let log = to_back.log();
    for part in [
        ", reason Policy denied, ",
        "\nRule default deny of ingress",
        " tcp SYN\n",
    ] {
        assert!(log.contains(part), "{part}\n{log}");
    }
    assert_eq!(from_back.log(), "");
    assert!(!all.log().contains("flow 0x0"), "{}", all.log());

    daemon.apply(&[("q.yaml", POLICIES)]).expect("the same policies");
    wait_until("monitor shows the change", OPEN, || {
        all.log().contains(">> Policy updated: {\"labels\":")
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", all.log()));

    daemon.kill9().expect("kill");
    daemon.restart().expect("restart");
    wait_until("monitor shows the start", OPEN, || {
        all.log().contains(">> Palisade started: {\"time\":")
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", all.log()));
    let before = drops(&all);
    wait_until("monitor shows drops of the next daemon", OPEN, || {
        seen();
        drops(&all) > before
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", all.log()));
    assert!(all.log().contains("the daemon answers again"), "{}", all.log());
}

const INSPECTED: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: parser-only}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts:
    - ports: [{port: \"80\", protocol: TCP}]
      rules: {l7proto: memcached, l7: [{command: get}]}
    - ports: [{port: \"81\", protocol: TCP}]
    - ports: [{port: \"82\", protocol: TCP}]
      rules:
        http: [{method: GET}]
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
      rules: {l7proto: memcached, l7: [{command: get}]}
    - ports: [{port: \"444\", protocol: TCP}]
      serverNames: [www.example.org]
";

#[test]
fn flows_without_an_inspector_are_dropped_with_their_own_reason() {
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
        (216, "front", "back", 80),
        (216, "front", "far", 443),
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
    for part in ["listener", "default/parser-only", "default/names"] {
        assert!(missing.contains(part), "{part}: {missing}");
    }
    // These have inspectors, which drop what is not their protocol.
    for part in ["dns", "http", "kafka", "tls"] {
        assert!(!missing.contains(part), "{part}: {missing}");
    }
    let text = daemon.cli(&["status"]).expect("status").to_lowercase();
    assert!(
        text.contains("listener") && text.contains("default/parser-only"),
        "{text}"
    );
    let trace = [
        "policy", "trace", "--from", "front", "--to", "back", "--port", "80",
    ];
    let out = daemon.try_cli(&trace).expect("trace");
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.code() == Some(1) && text.contains("inspected as listener, which is not implemented"),
        "{text}"
    );
}

/// Requests and hellos of real programs: filtered, shown and counted.
#[test]
fn inspected_traffic_is_shown_and_counted() {
    let apps = apps();
    let _web = Web::start(apps.ns("internet"), "internet", &[80], &[443], &apps.certificate).expect("nginx");
    let policies = format!(
        "{}---\n{}",
        policy(
            "client",
            "egress",
            &[80],
            "      rules: {http: [{method: GET, path: \"/allowed/.*\"}]}\n"
        ),
        policy("client", "egress", &[443], "      serverNames: [good.example]\n")
            .replace("client-egress", "client-names"),
    );
    let settings = Settings {
        tables: "[http]\nrecord_headers = [\"X-Trace\", \"authorization\"]\n".to_owned(),
        ..Settings::default()
    };
    let daemon = apps
        .daemon(&settings, &[("client.yaml", &policies)])
        .expect("daemon");
    let at = |port| apps.at("internet", Family::V4, port);
    let get = |args: &[&str]| curl(apps.ns("client"), args, OPEN).expect("curl");
    let url = |path: &str| format!("http://{}{path}", at(80).ip());
    let fields = ["-H", "X-Trace: a b", "-H", "Authorization: Bearer hidden"];
    let with_key = url("/allowed/none?api_key=hidden");
    let traced = [&fields[..], &[&with_key]].concat();
    assert_eq!(get(&[&url("/allowed/x")]).status, 200);
    assert_eq!(get(&traced).status, 200);
    assert_eq!(get(&["-X", "PUT", &url("/allowed/x")]).status, 403);
    for name in ["good.example", "evil.example"] {
        let by_name = by_name(name, at(443), "/");
        let args: Vec<&str> = by_name.iter().map(String::as_str).collect();
        let got = get(&args);
        assert_eq!(got.status == 200, name == "good.example", "{got:?}");
    }
    let shown = |filters: &[&str], count: usize| {
        let what = format!("{filters:?}");
        daemon
            .wait_flows(filters, &what, |flows| flows.len() == count)
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()))
    };
    let all = shown(&["--protocol", "http", "--reply", "false"], 3);
    assert!(!format!("{all:?}").contains("hidden"), "{all:#?}");
    shown(&["--http-status", "2+"], 2);
    shown(&["--http-path", "^/allowed/x$", "--verdict", "DROPPED"], 1);
    shown(&["--http-method", "put", "--reply", "false"], 1);
    let traced = shown(&["--http-header", "x-trace:a b"], 1);
    assert_eq!(
        traced[0]["l7"]["http"]["headers"],
        serde_json::json!([
            {"key": "x-trace", "value": "a b"},
            {"key": "authorization", "value": "[redacted]"},
        ])
    );
    shown(
        &["--http-url", "none\\?api_key=.redacted.$", "--reply", "false"],
        1,
    );
    shown(&["--protocol", "tls"], 2);
    let evil = shown(&["--sni", "evil.*"], 1);
    assert_eq!(evil[0]["verdict"], "DROPPED");
    assert_eq!(evil[0]["palisade"]["tls"]["server_name"], "evil.example");
    let lines = daemon
        .cli(&["observe", "--type", "l7", "--all"])
        .expect("observe");
    for part in [
        format!("http-request FORWARDED (HTTP/1.1 GET {})", url("/allowed/x")),
        format!("http-request DROPPED (HTTP/1.1 PUT {})", url("/allowed/x")),
        format!("ms (GET {}))", url("/allowed/none?api_key=[redacted]")),
        "tls-request FORWARDED (TLS Hello good.example (TLS 1.3))".to_owned(),
        "tls-request DROPPED (TLS Hello evil.example (TLS 1.3))".to_owned(),
    ] {
        assert!(lines.contains(&part), "{part}\n{lines}");
    }
    let counted = daemon
        .wait_status("workers tell what they have counted", |status| {
            let inspection = &status["workers"]["inspection"];
            inspection["http"]["requests"] == 3
                && inspection["http"]["denied"] == 1
                && inspection["http"]["responses"] == 2
                && inspection["http.tcp"]["opened"] == 3
                && inspection["http.malformed"]["HTTP/2 preface"] == 0
                && inspection["tls"]["hellos"] == 2
                && inspection["tls"]["denied"] == 1
                && inspection["tls.tcp"]["offloaded"] == 1
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    let keeps = &counted["workers"]["keeps"];
    assert!(
        keeps["connections"].is_u64() && keeps["bytes"].is_u64(),
        "{keeps}"
    );
    let text = daemon.cli(&["status"]).expect("status");
    for part in [
        "  http: denied 1, requests 3, responses 2\n",
        "Inspection: ",
        "hellos 2",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
}

#[test]
fn a_changed_inspection_limit_needs_a_restart() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("p.yaml", POLICIES)])
        .expect("daemon");
    let changed = Settings {
        tables: "[http]\npath_normalization = \"raw\"\n[tls]\nech = \"deny\"\n".to_owned(),
        ..Settings::default()
    };
    daemon
        .configure(&world.topology, &changed)
        .expect("configuration");
    daemon.cli(&["reload"]).expect("reload");
    let status = daemon.status().expect("status");
    let warnings = status["warnings"].to_string();
    assert!(
        warnings.contains("only used after a restart: [http] path_normalization, [tls] ech"),
        "{warnings}"
    );
}

#[test]
fn list_commands_show_the_current_state() {
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
    // The policy in force is shown rule by rule, also while its file is broken.
    daemon.write("p.yaml", "kind: [").expect("a broken file");
    daemon
        .wait_status("the file is broken", |status| {
            status["policy_files"].to_string().contains("last-good")
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    let shown = daemon
        .json(&["policy", "get", "default/allow-front"])
        .expect("policy");
    let policy = &shown[0];
    assert_eq!(policy["file_broken"], true, "{policy:#}");
    assert!(policy["text"].is_null(), "{policy:#}");
    assert_eq!(
        policy["resource"]["metadata"]["name"], "allow-front",
        "{policy:#}"
    );
    let rules = policy["rules"].as_array().expect("rules");
    assert_eq!(rules.len(), 2, "{policy:#}");
    for rule in rules {
        let is_first = rule["rule"].to_string().contains("ingress rule 1 ");
        let written = &policy["resource"]["spec"]["ingress"][usize::from(!is_first)];
        assert!(rule["spec"]["fromEndpoints"].is_array(), "{policy:#}");
        assert_eq!(&rule["spec"], written, "{policy:#}");
    }
    let text = daemon
        .cli(&["policy", "get", "default/allow-front", "-o", "yaml"])
        .expect("text");
    assert!(text.contains("name: allow-front"), "{text}");
    daemon.write("p.yaml", POLICIES).expect("the good file");
    daemon
        .wait_status("the file is good", |status| {
            !status["policy_files"].to_string().contains("last-good")
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    // The counters of the rules increase.
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

/// Returns the flows of JSON lines, without other lines.
fn json_flows(text: &str) -> Vec<serde_json::Value> {
    let lines = text.lines().filter(|line| line.starts_with('{'));
    let values = lines.map(|line| serde_json::from_str::<serde_json::Value>(line).expect(line));
    values
        .map(|mut value| value["flow"].take())
        .filter(|flow| !flow.is_null())
        .collect()
}

fn uuid(flow: &serde_json::Value) -> String {
    flow["uuid"].as_str().expect("a uuid").to_owned()
}

#[test]
fn flows_are_chosen_by_number_time_and_identifier_and_read_from_a_file() {
    let world = world();
    let mut daemon = world
        .daemon(Settings::default(), &[("p.yaml", POLICIES)])
        .expect("daemon");
    world.expect(
        &daemon,
        "front -> back tcp/80 open
         far -> back tcp/80 drop
         far -> back udp/53 drop",
    );
    flows::expect(&daemon, &world, ("far", "back"), 53, "DROPPED", None);
    let observe = |daemon: &palisade_testbed::Daemon, args: &[&str]| {
        let all = [&["observe"], args].concat();
        daemon.cli(&all).expect("observe")
    };

    // The oldest ones, in the order of their times.
    let all = json_flows(&observe(&daemon, &["--all", "-o", "json"]));
    let first = json_flows(&observe(&daemon, &["--first", "3", "-o", "jsonpb"]));
    let ids = |flows: &[serde_json::Value]| flows.iter().map(uuid).collect::<Vec<_>>();
    assert_eq!(ids(&first), ids(&all[..3]));
    // With all digits of the fraction, times are sorted as texts are.
    let padded = |flow: &serde_json::Value| {
        let time = flow["time"].as_str().expect("a time").trim_end_matches('Z');
        let (seconds, fraction) = time.split_once('.').unwrap_or((time, ""));
        format!("{seconds}.{fraction:0<9}")
    };
    let times: Vec<_> = all.iter().map(padded).collect();
    assert!(times.is_sorted(), "{times:?}");

    // One by its identifier, as JSON and as a line. Both families have flows.
    for family in FAMILIES {
        let back = world.addr("back", family).to_string();
        let dropped = daemon
            .wait_flows(&["--to-ip", &back, "--verdict", "DROPPED"], "drops", |flows| {
                !flows.is_empty()
            })
            .expect("flows");
        let one = &dropped[0];
        assert_eq!(one["destination"]["workloads"][0]["name"], "back", "{one:#}");
        assert!(one["drop_reason_desc"].is_string(), "{one:#}");
        let found = daemon.flows(&["--uuid", &uuid(one)]).expect("flows");
        assert!(found.len() == 1 && found[0] == *one, "{found:#?}");
        let line = observe(&daemon, &["--uuid", &uuid(one)]);
        assert!(line.contains("default/back:"), "{line}");

        // From the printed time on, in local time and in UTC.
        for zone in [&[][..], &["--utc"]] {
            let printed = observe(&daemon, &[&["--uuid", &uuid(one)], zone].concat());
            let stamp = &printed[.."Apr 28 01:04:16.656".len()];
            let since = [&["--since", stamp, "-o", "json"], zone].concat();
            let since = json_flows(&observe(&daemon, &since));
            assert!(ids(&since).contains(&uuid(one)), "{stamp}: {since:#?}");
            let until = [&["--until", stamp, "-o", "json"], zone].concat();
            let until = json_flows(&observe(&daemon, &until));
            assert!(!ids(&until).contains(&uuid(one)) || one["time"].to_string().contains(".000Z"));
        }
    }

    // A saved listing is read without a daemon, with the same lines and filters.
    let last = uuid(all.last().expect("a flow"));
    let saved = observe(&daemon, &["--all", "-o", "json"]);
    let file = world.topology.dir().join("flows.json");
    std::fs::write(&file, &saved).expect("write");
    let file = file.to_str().expect("UTF-8");
    let drops = ["--verdict", "DROPPED", "--protocol", "udp"];
    let live = observe(&daemon, &[&["--all"], &drops[..]].concat());
    daemon.terminate().expect("end");
    let read = observe(&daemon, &[&["--input-file", file], &drops[..]].concat());
    assert!(!read.is_empty() && live.starts_with(&read), "{live}\n{read}");
    let again = observe(&daemon, &["--input-file", file, "-o", "json"]);
    assert_eq!(json_flows(&again), json_flows(&saved));
    let one = observe(&daemon, &["--input-file", file, "--uuid", &last, "-o", "table"]);
    assert!(one.starts_with("TIMESTAMP ") && one.lines().count() == 2, "{one}");
    let masked = observe(
        &daemon,
        &[
            "--input-file",
            file,
            "--last",
            "1",
            "-o",
            "json",
            "--field-mask",
            "verdict",
        ],
    );
    assert_eq!(
        json_flows(&masked)[0].as_object().map(serde_json::Map::len),
        Some(1),
        "{masked}"
    );
    let filters = observe(&daemon, &["--pod", "shop/web", "--print-raw-filters"]);
    assert_eq!(
        filters,
        "allowlist:\n    - '{\"source_pod\":[\"shop/web\"]}'\n    - '{\"destination_pod\":[\"shop/web\"]}'\n"
    );

    // A line that is no flow is named.
    std::fs::write(world.topology.dir().join("bad.json"), format!("{saved}{{\n")).expect("write");
    let bad = world.topology.dir().join("bad.json");
    let bad = daemon
        .try_cli(&[
            "observe",
            "--input-file",
            bad.to_str().expect("UTF-8"),
            "-o",
            "json",
        ])
        .expect("observe");
    let errors = String::from_utf8_lossy(&bad.stderr);
    let line = saved.lines().count() + 1;
    assert!(
        bad.status.code() == Some(1) && errors.contains(&format!("bad.json:{line}:")),
        "{errors}"
    );
    assert_eq!(
        json_flows(&String::from_utf8_lossy(&bad.stdout)),
        json_flows(&saved)
    );
    for (args, why) in [
        (&["--service", "shop/web"][..], "Kubernetes services"),
        (
            &["--allowlist", "{\"source_cluster_name\":[\"prod\"]}"],
            "source_cluster_name",
        ),
    ] {
        let refused = daemon.try_cli(&[&["observe"], args].concat()).expect("observe");
        let text = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && text.contains(why), "{text}");
    }
}

#[test]
fn a_command_whose_reader_needs_no_more_ends_quietly() {
    let world = world();
    let daemon = world
        .daemon(
            tables("[limits]\nevents_per_second = 100000\n"),
            &[("p.yaml", POLICIES)],
        )
        .expect("daemon");
    // The flows of these datagrams are more text than a pipe has room for.
    let flood = |count: u32| {
        let flood = format!(
            "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nfor _ in range({count}): s.sendto(b'x', ('{}', 9))",
            world.addr("back", Family::V4)
        );
        let out = output(world.ns("far").command("python3").args(["-c", &flood]), OPEN).expect("python3");
        assert!(out.status.success(), "{out:?}");
    };
    flood(1_500);
    let many = |flows: &[serde_json::Value]| flows.len() > 1_500;
    daemon
        .wait_flows(&["--protocol", "udp", "--verdict", "dropped"], "the flows", many)
        .expect("flows");
    let begin = |args: &[&str]| -> Child {
        let mut command = daemon.command(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("palisade")
    };
    // As `palisade ARGS | head -1` does.
    let head = |child: &mut Child| {
        let mut line = String::new();
        let stdout = child.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        line
    };
    let ends = |mut child: Child, args: &[&str]| {
        let ended = wait_until("the end of the command", OPEN, || {
            child.try_wait().is_ok_and(|status| status.is_some())
        });
        if ended.is_err() {
            let _ = child.kill();
        }
        let status = child.wait().expect("the status");
        let mut said = String::new();
        let mut stderr = child.stderr.take().expect("a pipe");
        stderr.read_to_string(&mut said).expect("text");
        assert_eq!((status.code(), said.as_str()), (Some(0), ""), "{args:?}");
    };
    let listings: [&[&str]; 7] = [
        &["observe", "--all"],
        &["observe", "--all", "-o", "dict"],
        &["observe", "--all", "-o", "table"],
        &["observe", "--all", "-o", "json"],
        &["observe", "--all", "-o", "jsonpb"],
        &["endpoint", "list"],
        &["status"],
    ];
    for args in listings {
        let mut child = begin(args);
        assert_ne!(head(&mut child), "", "{args:?}");
        ends(child, args);
        // The reader has gone before the first line.
        let mut child = begin(args);
        drop(child.stdout.take());
        ends(child, args);
    }
    // A follower notices that the reader has gone when there is another flow.
    for args in [&["observe", "--follow"][..], &["monitor"]] {
        let mut child = begin(args);
        let before = std::thread::scope(|scope| {
            let line = scope.spawn(|| head(&mut child));
            wait_until("the first line", OPEN, || {
                flood(1);
                line.is_finished()
            })
            .expect("a line");
            line.join().expect("a line")
        });
        assert_ne!(before, "", "{args:?}");
        wait_until("the end of the follower", OPEN, || {
            flood(1);
            child.try_wait().is_ok_and(|status| status.is_some())
        })
        .unwrap_or_else(|error| panic!("{args:?}: {error:#}"));
        ends(child, args);
    }
}

#[test]
fn a_follower_continues_after_a_restart_of_the_daemon() {
    let world = world();
    let mut daemon = world
        .daemon(Settings::default(), &[("p.yaml", POLICIES)])
        .expect("daemon");
    let dir = world.topology.dir();
    let follow = Process::spawn(
        "observe",
        daemon.command(&["observe", "--follow", "--verdict", "DROPPED", "-o", "json"]),
        dir,
    )
    .expect("observe");
    let drops = || {
        let flows = json_flows(&follow.log());
        flows.iter().map(uuid).collect::<Vec<_>>()
    };
    let cause = || world.check("far -> back tcp/80 drop").map(drop).expect("check");
    wait_until("the follower shows a drop", OPEN, || {
        cause();
        !drops().is_empty()
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", follow.log()));
    daemon.restart().expect("restart");
    wait_until(
        "the follower has said that the daemon was gone and is there again",
        OPEN,
        || {
            let log = follow.log();
            log.contains("waiting for the daemon") && log.contains("the daemon answers again")
        },
    )
    .unwrap_or_else(|error| panic!("{error:#}: {}", follow.log()));
    cause();
    // The follower has what the new daemon has recorded, each flow once.
    wait_until("the follower shows the drops of the new daemon", OPEN, || {
        let recorded = daemon.flows(&["--verdict", "DROPPED"]).unwrap_or_default();
        let shown = drops();
        !recorded.is_empty() && recorded.iter().all(|flow| shown.contains(&uuid(flow)))
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", follow.log()));
    let mut once = drops();
    let count = once.len();
    once.sort();
    once.dedup();
    assert_eq!(once.len(), count, "a flow was printed twice: {}", follow.log());
    assert!(follow.log().contains("was restarted"), "{}", follow.log());
}
