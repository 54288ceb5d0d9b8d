//! Enforcement modes, and audit mode globally, per endpoint and per policy.

use palisade_testbed::daemon::Settings;
use palisade_tests::{World, flows, world};

const DENY_ALL: &str = "
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: deny-all}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - {}
";

const DENY_FRONT: &str = "
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: deny-front}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - fromEntities: [all]
  ingressDeny:
  - fromEndpoints:
    - matchLabels: {app: front}
";

#[test]
fn enforcement_never_passes_everything() {
    let world = world();
    let daemon = world
        .daemon(
            Settings {
                enforcement: "never",
                ..Settings::default()
            },
            &[("deny.yaml", DENY_ALL)],
        )
        .expect("daemon");
    world.expect(
        &daemon,
        "front -> back tcp/80 open
         far -> back ping open
         node -> back udp/53 open",
    );
}

#[test]
fn enforcement_always_denies_both_directions_until_a_policy_allows() {
    let world = world();
    let daemon = world
        .daemon(
            Settings {
                enforcement: "always",
                ..Settings::default()
            },
            &[],
        )
        .expect("daemon");
    world.expect(
        &daemon,
        "front -> back tcp/80 drop
         front -> far tcp/80 drop
         far -> back ping drop",
    );
    daemon
        .apply(&[(
            "allow.yaml",
            "
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: out}
spec:
  endpointSelector: {matchLabels: {app: front}}
  egress:
  - toEndpoints: [{matchLabels: {app: back}}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: in}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
",
        )])
        .expect("apply");
    world.expect(
        &daemon,
        "front -> back tcp/80 open
         front -> back ping open
         db -> back tcp/80 drop
         back -> front tcp/80 drop
         front -> far tcp/80 drop",
    );
}

#[test]
fn allow_localhost_always_overrides_default_deny_and_no_deny_rule() {
    let world = world();
    let settings = || Settings {
        allow_localhost: "always",
        ..Settings::default()
    };
    let daemon = world
        .daemon(settings(), &[("deny.yaml", DENY_ALL)])
        .expect("daemon");
    world.expect(
        &daemon,
        "node -> back tcp/80 open
         node -> back ping open
         front -> back tcp/80 drop",
    );
    daemon
        .apply(&[(
            "deny.yaml",
            "
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: deny-host}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingressDeny:
  - fromEntities: [host]
",
        )])
        .expect("apply");
    world.expect(&daemon, "node -> back tcp/80 drop");
}

#[test]
fn global_audit_mode_passes_everything_and_names_what_would_drop_it() {
    let world = world();
    let daemon = world
        .daemon(
            Settings {
                audit: true,
                ..Settings::default()
            },
            &[("deny.yaml", DENY_FRONT)],
        )
        .expect("daemon");
    world.expect(
        &daemon,
        "front -> back tcp/80 open
         front -> back ping open
         db -> back tcp/80 open",
    );
    flows::expect(
        &daemon,
        &world,
        ("front", "back"),
        80,
        "AUDIT",
        Some("default/deny-front"),
    );
    flows::expect_none(&daemon, &["--verdict", "DROPPED"]);
}

#[test]
fn audit_mode_of_an_endpoint_is_set_by_command_and_survives_a_restart() {
    let world = world();
    let policies =
        DENY_ALL.to_owned() + "---\n" + &DENY_ALL.replace("back", "db").replace("deny-all", "deny-db");
    let mut daemon = world
        .daemon(Settings::default(), &[("deny.yaml", &policies)])
        .expect("daemon");
    let both_dropped = "front -> back tcp/80 drop\nfront -> db tcp/80 drop";
    let back_audited = "front -> back tcp/80 open\nfront -> back ping open\nfront -> db tcp/80 drop";
    world.expect(&daemon, both_dropped);
    let id = flows::endpoint_id(&daemon, "default/back");
    let said = daemon
        .cli(&["endpoint", "config", &id, "PolicyAuditMode=Enabled"])
        .expect("config");
    assert!(
        said.contains("PolicyAuditMode") && said.contains("Enabled"),
        "{said}"
    );
    world.expect(&daemon, back_audited);
    flows::expect(
        &daemon,
        &world,
        ("front", "back"),
        80,
        "AUDIT",
        Some("default/deny-all"),
    );
    daemon.terminate().expect("stop");
    world
        .check(back_audited)
        .map(|failures| assert!(failures.is_empty(), "{failures:#?}"))
        .expect("check");
    daemon.restart().expect("restart");
    world.expect(&daemon, back_audited);
    daemon
        .cli(&["endpoint", "config", &id, "PolicyAuditMode=Disabled"])
        .expect("config");
    world.expect(&daemon, both_dropped);
}

#[test]
fn audit_mode_of_a_policy_leaves_other_policies_enforced() {
    let world: World = world();
    let audited = DENY_FRONT.replace(
        "metadata: {name: deny-front}",
        "metadata: {name: deny-front, annotations: {palisade.io/audit: \"true\"}}",
    );
    let daemon = world
        .daemon(Settings::default(), &[("audited.yaml", &audited)])
        .expect("daemon");
    world.expect(
        &daemon,
        "front -> back tcp/80 open
         db -> back tcp/80 open",
    );
    flows::expect(
        &daemon,
        &world,
        ("front", "back"),
        80,
        "AUDIT",
        Some("default/deny-front"),
    );
    let deny_db = DENY_FRONT.replace("front", "db");
    daemon
        .apply(&[("audited.yaml", &audited), ("deny.yaml", &deny_db)])
        .expect("apply");
    world.expect(
        &daemon,
        "front -> back tcp/80 open
         db -> back tcp/80 drop",
    );
}
