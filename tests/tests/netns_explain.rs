//! `palisade explain`: from a denied connection to the policy that allows it.

use palisade_testbed::{daemon::Settings, topology::Family};
use palisade_tests::world;

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
