//! `palisade explain`: from a denied connection to the policy that allows it. `palisade policy suggest` and
//! `palisade policy test --flows`: from recorded traffic to policies.

use std::fs;

use palisade_testbed::{Daemon, daemon::Settings, topology::Family};
use palisade_tests::{
    fixtures::apps::apps,
    setup::{client_only, request, webs},
    world,
};

const POLICY: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: back}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts:
    - ports: [{port: \"80\", protocol: TCP}]
  ingressDeny:
  - fromEntities: [remote-node]
";

#[test]
fn the_printed_policy_allows_the_denied_connection_and_no_other() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("p.yaml", POLICY)])
        .expect("daemon");
    world.expect(
        &daemon,
        "front -> back tcp/80 open
         front -> back tcp/81 drop
         far -> back tcp/80 drop
         node2 -> back tcp/80 drop",
    );
    let mut additions = Vec::new();
    for (number, (from, port, family)) in [
        ("front", "81", Family::V4),
        ("front", "81", Family::V6),
        ("far", "80", Family::V6),
    ]
    .into_iter()
    .enumerate()
    {
        let source = world.addr(from, family).to_string();
        let back = world.addr("back", family).to_string();
        let filters = [
            "--from-ip",
            &source,
            "--to-ip",
            &back,
            "--to-port",
            port,
            "--verdict",
            "DROPPED",
        ];
        let flows = daemon
            .wait_flows(&filters, "the denied connection", |flows| !flows.is_empty())
            .expect("flows");
        let uuid = flows[0]["uuid"].as_str().expect("a uuid");
        let output = daemon.try_cli(&["explain", uuid]).expect("explain");
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{text}");
        for part in [
            "ingress of default/back: DENIED (nothing allows it)",
            "decided by default deny of ingress by policy default/back (",
            "nearly: policy default/back ingress rule 1 (",
            "with this addition it is ALLOWED",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        assert!(text.contains(&format!("p.yaml:{}", 1)), "{text}");
        let json = daemon.try_cli(&["explain", uuid, "-o", "json"]).expect("explain");
        let json: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON");
        let yaml = json["addition"]["yaml"].as_str().expect("an addition").to_owned();
        assert!(text.contains(&yaml), "{text}");
        additions.push((format!("addition-{number}.yaml"), yaml));
    }
    // Both families of one workload have the same policy.
    assert_eq!(additions[0].1, additions[1].1);
    let policies: Vec<(&str, &str)> = [("p.yaml", POLICY)]
        .into_iter()
        .chain(
            [&additions[0], &additions[2]]
                .into_iter()
                .map(|(name, yaml)| (name.as_str(), yaml.as_str())),
        )
        .collect();
    daemon.apply(&policies).expect("the additions");
    world.expect(
        &daemon,
        "front -> back tcp/81 open
         6 far -> back tcp/80 open
         4 far -> back tcp/80 drop
         db -> back tcp/81 drop
         front -> back tcp/8080 drop
         pfront -> back tcp/81 drop
         node2 -> back tcp/80 drop",
    );
    // A deny rule: nothing is printed that could be applied.
    let denied = daemon
        .try_cli(&[
            "explain",
            "--from",
            "node2",
            "--to",
            "default/back",
            "--port",
            "80",
        ])
        .expect("explain");
    let text = String::from_utf8_lossy(&denied.stdout);
    assert_eq!(denied.status.code(), Some(1));
    assert!(
        text.contains("change or remove policy default/back ingressDeny rule 1")
            && !text.contains("apiVersion"),
        "{text}"
    );
    let unknown = daemon.try_cli(&["explain", "0"]).expect("explain");
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("there is no flow 0"));
}

/// Policies in audit mode, under which all traffic to `back` passes and is reported.
const AUDIT: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: audit, annotations: {palisade.io/audit: \"true\"}}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress: [{}]
";

/// Returns the policies that the daemon's flows need.
fn suggested(daemon: &Daemon) -> String {
    let output = daemon.try_cli(&["policy", "suggest"]).expect("suggest");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{error}");
    text
}

#[test]
fn suggested_policies_allow_the_recorded_traffic_and_no_other() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("audit.yaml", AUDIT)])
        .expect("daemon");
    world.expect(
        &daemon,
        "front -> back tcp/80 open
         pfront -> back tcp/81 open
         6 far -> back tcp/443 open
         4 remote-db -> back udp/53 open
         node2 -> back tcp/22 open",
    );
    for port in ["80", "81", "443", "53", "22"] {
        daemon
            .wait_flows(&["--verdict", "AUDIT", "--to-port", port], port, |flows| {
                !flows.is_empty()
            })
            .expect("audited flows");
    }
    let yaml = suggested(&daemon);
    let flows = daemon.policies().with_file_name("flows.json");
    let recorded = daemon.cli(&["observe", "--all", "-o", "json"]).expect("flows");
    fs::write(&flows, &recorded).expect("file");
    let candidate = flows.with_file_name("suggested.yaml");
    fs::write(&candidate, &yaml).expect("file");
    let [flows, candidate] = [flows, candidate].map(|path| path.to_str().expect("UTF-8").to_owned());
    // The same flows from a file give the same policies.
    let of_file = daemon
        .try_cli(&["policy", "suggest", "--input-file", &flows])
        .expect("suggest");
    assert!(of_file.status.success());
    let of_file = String::from_utf8_lossy(&of_file.stdout).into_owned();
    let rules = |yaml: &str| -> Vec<String> {
        yaml.lines()
            .filter(|line| !line.trim_start().starts_with('#'))
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(rules(&of_file), rules(&yaml));
    // All flows were audited, and would be allowed.
    let test = |policies: &str, more: &[&str]| {
        let args = [
            "policy",
            "test",
            "--flows",
            &flows,
            "--policies",
            policies,
            "-o",
            "json",
        ];
        let output = daemon.try_cli(&[&args, more].concat()).expect("test");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
        (output.status.code(), report)
    };
    let (code, report) = test(&candidate, &[]);
    assert_eq!(code, Some(1));
    let changes = report["changes"].as_array().expect("changes");
    assert!(!changes.is_empty(), "{report:#}");
    for change in changes {
        assert_eq!(
            (&change["now"], &change["then"]),
            (&"AUDITED".into(), &"ALLOWED".into()),
            "{change:#}"
        );
        let rule = change["then_by"].as_str().expect("a rule");
        assert!(rule.contains("suggested.yaml:"), "{rule}");
    }
    // Under the policies in force nothing changes.
    let (code, report) = test(daemon.policies().to_str().expect("UTF-8"), &["--report-only"]);
    assert_eq!((code, &report["changed"]), (Some(0), &0.into()), "{report:#}");

    daemon.apply(&[("audit.yaml", &yaml)]).expect("the suggestion");
    world.expect(
        &daemon,
        "front -> back tcp/80 open
         pfront -> back tcp/81 open
         6 far -> back tcp/443 open
         4 remote-db -> back udp/53 open
         node2 -> back tcp/22 open
         front -> back tcp/81 drop
         pfront -> back tcp/80 drop
         4 far -> back tcp/443 drop
         db -> back tcp/80 drop
         far -> back tcp/80 drop
         node2 -> back tcp/80 drop",
    );
}

#[test]
fn suggested_rules_for_requests_allow_the_recorded_ones() {
    let apps = apps();
    let [_web] = webs(&apps, ["internet"], &[80], &[]);
    let daemon = client_only(&apps, &[80], "      rules: {http: [{}]}\n");
    for family in [Family::V4, Family::V6] {
        assert_eq!(request(&apps, family, "/"), Some(200));
        assert_eq!(request(&apps, family, "/items/7?x=1"), Some(200));
    }
    daemon
        .wait_flows(&["--type", "l7"], "requests", |flows| {
            flows
                .iter()
                .filter(|flow| flow["l7"]["type"] == "REQUEST")
                .count()
                >= 4
        })
        .expect("requests");
    let yaml = suggested(&daemon);
    assert!(yaml.contains("path: \"/items/[0-9]+([?].*)?\""), "{yaml}");
    daemon.apply(&[("client.yaml", &yaml)]).expect("the suggestion");
    for family in [Family::V4, Family::V6] {
        assert_eq!(request(&apps, family, "/"), Some(200));
        assert_eq!(request(&apps, family, "/items/8"), Some(200));
        assert_eq!(request(&apps, family, "/secret"), Some(403));
    }
    // The denied request, explained by its record, gets a rule for itself.
    let filters = ["--type", "l7", "--verdict", "DROPPED"];
    let denied = daemon
        .wait_flows(&filters, "a denied request", |flows| !flows.is_empty())
        .expect("flows");
    let uuid = denied[0]["uuid"].as_str().expect("a uuid");
    let output = daemon.try_cli(&["explain", uuid, "-o", "json"]).expect("explain");
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        answer["details"][0]["nearly"][0]["failed"][0]["requirement"], "path",
        "{answer:#}"
    );
    let addition = answer["addition"]["yaml"].as_str().expect("an addition");
    assert!(addition.contains("path: \"/secret\""), "{addition}");
    daemon
        .apply(&[("client.yaml", &yaml), ("addition.yaml", addition)])
        .expect("the addition");
    let family = if denied[0]["IP"]["ipVersion"] == "IPv6" {
        Family::V6
    } else {
        Family::V4
    };
    assert_eq!(request(&apps, family, "/secret"), Some(200));
    assert_eq!(request(&apps, family, "/secret2"), Some(403));
}
