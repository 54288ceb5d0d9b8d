//! `palisade uninstall`: nothing is left in the kernel and on disk, whatever the state of daemon and configuration.

use std::{fs, path::Path};

use palisade_testbed::{Daemon, attached, daemon::Settings};
use palisade_tests::{World, world};
use serde_json::Value;

/// Policy with an application rule, so that the punt link and the proxy links are in use.
const HTTP: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts:
    - ports: [{port: "80", protocol: TCP}]
      rules:
        http: [{path: /ok}]
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts:
    - ports: [{port: "81", protocol: TCP}]
"#;

const ENFORCED: &str = "front -> back tcp/81 open\ndb -> back tcp/81 drop";
const OPEN: &str = "front -> back tcp/81 open\ndb -> back tcp/81 open";
const INTERFACES: [&str; 5] = ["nic0", "veth-front", "veth-back", "veth-db", "veth-pfront"];

/// Starts the daemon with an export of flows to `logs`.
fn enforcing(world: &World, logs: &Path) -> Daemon {
    let settings = Settings {
        tables: format!(
            "[[export]]\nname = \"flows\"\nfile = {:?}\n",
            logs.join("flows.log")
        ),
        ..Settings::default()
    };
    let daemon = world.daemon(settings, &[("web.yaml", HTTP)]).expect("daemon");
    world.expect(&daemon, ENFORCED);
    daemon
}

/// Returns the kinds of what `palisade uninstall --check` lists, and its exit code.
fn left(daemon: &Daemon, more: &[&str]) -> (Vec<String>, Option<i32>) {
    let mut args = vec!["uninstall", "--check", "-o", "json"];
    args.extend(more);
    let out = daemon.try_cli(&args).expect("uninstall --check");
    let parts: Value = serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&out.stderr)));
    let mut kinds: Vec<String> = parts
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|part| part["kind"].as_str().map(str::to_owned))
        .collect();
    kinds.dedup();
    (kinds, out.status.code())
}

/// Asks the kernel for everything that a daemon makes.
#[track_caller]
fn nothing_is_left(world: &World, daemon: &Daemon, logs: &Path) {
    let node = &world.topology.node;
    for name in INTERFACES {
        assert_eq!(attached::hooks(node, name).expect("hooks"), [""; 0], "{name}");
    }
    let links = node.run("ip", &["-o", "link"]).expect("ip link");
    assert!(!links.contains("palisade"), "{links}");
    let tables = node.run("nft", &["list", "tables"]).expect("nft");
    assert!(!tables.contains("palisade"), "{tables}");
    let qdiscs = node.run("tc", &["qdisc", "show"]).expect("tc");
    assert!(!qdiscs.contains("clsact"), "{qdiscs}");
    let dir = daemon.config().parent().expect("a directory").to_owned();
    assert!(!daemon.pins().exists() && !dir.join("state").exists());
    for name in [
        "palisade.sock",
        "palisade.sock.lock",
        "hubble.sock",
        "hubble.sock.lock",
    ] {
        assert!(!dir.join(name).exists(), "{name}");
    }
    let names: Vec<_> = fs::read_dir(logs)
        .into_iter()
        .flatten()
        .map(|entry| entry.expect("entry").file_name())
        .collect();
    assert_eq!(names, [""; 0]);
    assert_eq!(left(daemon, &[]), (vec![], Some(0)));
    assert_eq!(world.check(OPEN).expect("check"), [""; 0]);
}

#[test]
fn uninstall_of_a_running_daemon_leaves_nothing_and_purge_removes_the_files_too() {
    let world = world();
    let logs = tempfile::tempdir().expect("directory");
    let daemon = enforcing(&world, logs.path());
    let all = [
        "daemon",
        "program",
        "pins",
        "nftables-table",
        "interface",
        "state",
        "socket",
        "log",
    ];
    assert_eq!(left(&daemon, &[]), (all.map(str::to_owned).to_vec(), Some(1)));
    // A dry run changes nothing.
    let listed = daemon.cli(&["uninstall", "--dry-run"]).expect("dry run");
    assert!(
        listed.contains("palisade_out") && listed.contains("palisade0"),
        "{listed}"
    );
    world.expect(&daemon, ENFORCED);

    daemon.cli(&["uninstall"]).expect("uninstall");
    nothing_is_left(&world, &daemon, logs.path());
    assert!(daemon.config().exists() && daemon.policies().join("web.yaml").exists());
    // A second time there is nothing to do.
    daemon.cli(&["uninstall"]).expect("uninstall");

    let kinds = ["policy", "configuration"].map(str::to_owned).to_vec();
    assert_eq!(left(&daemon, &["--purge"]), (kinds, Some(1)));
    let refused = daemon.try_cli(&["uninstall", "--purge"]).expect("purge");
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1));
    assert!(text.contains("--yes") && text.contains("web.yaml"), "{text}");
    assert!(daemon.config().exists());
    daemon.cli(&["uninstall", "--purge", "--yes"]).expect("purge");
    assert!(!daemon.config().exists() && !daemon.policies().exists());
}

#[test]
fn uninstall_works_with_a_dead_daemon_and_a_broken_configuration() {
    let world = world();
    let logs = tempfile::tempdir().expect("directory");
    let mut daemon = enforcing(&world, logs.path());
    daemon.kill9().expect("kill -9");
    // The state directory can still be read from the file; the pins and the rest are those of the last good copy.
    let text = fs::read_to_string(daemon.config()).expect("configuration");
    fs::write(
        daemon.config(),
        format!("{text}\n[[interface]]\nnam = \"nic0\"\n"),
    )
    .expect("write");
    assert_eq!(world.check(ENFORCED).expect("check"), [""; 0]);
    let out = daemon.try_cli(&["uninstall"]).expect("uninstall");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && said.contains("last good copy"), "{said}");
    fs::write(daemon.config(), text).expect("write");
    nothing_is_left(&world, &daemon, logs.path());
}

#[test]
fn stop_detach_of_a_dead_daemon_works_with_a_broken_configuration() {
    let world = world();
    let logs = tempfile::tempdir().expect("directory");
    let mut daemon = enforcing(&world, logs.path());
    daemon.kill9().expect("kill -9");
    let text = fs::read_to_string(daemon.config()).expect("configuration");
    fs::write(
        daemon.config(),
        format!("{text}\n[[interface]]\nnam = \"nic0\"\n"),
    )
    .expect("write");
    daemon.cli(&["stop", "--detach"]).expect("stop --detach");
    assert!(!daemon.pins().exists());
    assert_eq!(world.check(OPEN).expect("check"), [""; 0]);
    fs::write(daemon.config(), text).expect("write");
}
