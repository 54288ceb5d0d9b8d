//! The life of the daemon on a node of network namespaces: start, reload, crash, restart, broken files, detach.

use std::{fs, io, net::SocketAddr, process::Command, time::Duration};

use palisade_testbed::{
    Outcome, Topology,
    daemon::{Daemon, Settings},
    ns::wait_until,
    probe,
    server::Echo,
    topology::{Family, WorkloadSpec},
};
use serde_json::Value;

const SHORT: Duration = Duration::from_millis(400);
/// Longest wait for anything that the daemon does, on a machine under load.
const LONG: Duration = Duration::from_secs(60);

fn policy(from: &str, port: u16) -> String {
    format!(
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata:\n  name: web\nspec:\n  \
         endpointSelector:\n    matchLabels:\n      app: web\n  ingress:\n  - fromEndpoints:\n    - matchLabels:\n        \
         app: {from}\n    toPorts:\n    - ports:\n      - port: \"{port}\"\n        protocol: TCP\n"
    )
}

/// Workloads `client` and `web`; `web` has echo servers at two ports.
struct Node {
    topology: Topology,
    _echo: Echo,
}

impl Node {
    fn new() -> Self {
        let topology = Topology::new().unwrap().apps(&["client", "web"]).unwrap();
        let web = topology.get("web");
        let addresses = [web.addr(Family::V4), web.addr(Family::V6)];
        let echo = Echo::start(&web.ns, &addresses, &[80, 81], &[]).unwrap();
        Self {
            topology,
            _echo: echo,
        }
    }

    fn at(&self, port: u16, family: Family) -> SocketAddr {
        (self.topology.get("web").addr(family), port).into()
    }

    fn reach(&self, port: u16, family: Family) -> Outcome {
        probe::connect(&self.topology.get("client").ns, self.at(port, family), SHORT)
    }

    /// Checks that only port `open` of 80 and 81 is reachable.
    fn only(&self, open: u16, when: &str) {
        for family in [Family::V4, Family::V6] {
            let shut = if open == 80 { 81 } else { 80 };
            assert_eq!(
                self.reach(open, family),
                Outcome::Open,
                "{when}: {open}, {family:?}"
            );
            assert_eq!(
                self.reach(shut, family),
                Outcome::TimedOut,
                "{when}: {shut}, {family:?}"
            );
        }
    }
}

fn file<'a>(status: &'a Value, name: &str) -> &'a Value {
    let files = status["policy_files"].as_array().unwrap();
    files.iter().find(|file| file["file"] == name).unwrap()
}

#[test]
fn a_policy_is_enforced_through_crash_and_broken_file_until_detached() {
    let node = Node::new();
    let mut daemon = Daemon::start(
        &node.topology,
        &Settings::default(),
        &[("web.yaml", &policy("client", 80))],
    )
    .unwrap();
    node.only(80, "started");
    let status = daemon.status().unwrap();
    for interface in status["interfaces"].as_array().unwrap() {
        assert!(
            interface["ingress"].is_string() && interface["egress"].is_string(),
            "{interface}"
        );
    }

    // Another policy is enforced without a restart.
    let revision = status["revision"].as_u64().unwrap();
    daemon.write("web.yaml", &policy("client", 81)).unwrap();
    daemon
        .wait_status("the change is in force", |status| {
            status["revision"].as_u64() > Some(revision)
        })
        .unwrap();
    node.only(81, "changed");

    // A broken file changes nothing and is reported with its location.
    daemon
        .write(
            "web.yaml",
            "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nspec: [\n",
        )
        .unwrap();
    let status = daemon
        .wait_status("the broken file is noticed", |status| {
            file(status, "web.yaml")["state"] == "last-good"
        })
        .unwrap();
    let message = file(&status, "web.yaml")["diagnostics"][0].as_str().unwrap();
    assert!(message.contains("web.yaml:4:1: "), "{message}");
    assert_eq!(status["ready"], true, "{status:#}");
    node.only(81, "broken");

    // After SIGKILL the programs go on enforcing, and an open connection stays open, also over the restart.
    let mut open = probe::open(
        &node.topology.get("client").ns,
        None,
        node.at(81, Family::V4),
        Duration::from_secs(2),
    )
    .unwrap();
    daemon.kill9().unwrap();
    node.only(81, "killed");
    assert_eq!(probe::exchange(&mut open, SHORT), Outcome::Open);
    daemon.restart().unwrap();
    node.only(81, "restarted with the file still broken");
    assert_eq!(probe::exchange(&mut open, SHORT), Outcome::Open);
    assert_eq!(file(&daemon.status().unwrap(), "web.yaml")["state"], "last-good");

    // The same after SIGTERM.
    daemon.terminate().unwrap();
    node.only(81, "ended");
    daemon.restart().unwrap();

    // The policies of a removed file are removed.
    fs::remove_file(daemon.policies().join("web.yaml")).unwrap();
    wait_until("nothing is enforced", LONG, || {
        node.reach(80, Family::V4) == Outcome::Open
    })
    .unwrap();

    daemon.write("web.yaml", &policy("client", 80)).unwrap();
    wait_until("enforced again", LONG, || {
        node.reach(81, Family::V4) == Outcome::TimedOut
    })
    .unwrap();
    daemon.detach().unwrap();
    assert_eq!(node.reach(81, Family::V4), Outcome::Open);
    assert!(!daemon.pins().exists(), "pins are left");
}

#[test]
fn detach_works_without_a_daemon_and_a_second_daemon_is_refused() {
    let node = Node::new();
    let mut daemon = Daemon::start(
        &node.topology,
        &Settings::default(),
        &[("web.yaml", &policy("nobody", 80))],
    )
    .unwrap();
    let second = daemon.try_cli(&["run"]).unwrap();
    assert_eq!(second.status.code(), Some(4));
    let error = String::from_utf8(second.stderr).unwrap();
    assert!(error.contains("another palisade daemon"), "{error}");

    daemon.kill9().unwrap();
    assert_eq!(node.reach(80, Family::V4), Outcome::TimedOut);
    // Without a daemon the exit code is 3.
    let out = daemon.try_cli(&["endpoint", "list"]).unwrap();
    assert_eq!(out.status.code(), Some(3));
    daemon.detach().unwrap();
    assert_eq!(node.reach(80, Family::V4), Outcome::Open);
    assert!(!daemon.pins().exists(), "pins are left");
}

#[test]
fn a_late_interface_is_guarded_and_audit_mode_survives_a_restart() {
    let mut node = Node::new();
    node.topology
        .declare(WorkloadSpec::new("late").label("app", "late"))
        .unwrap();
    let text = format!(
        "{}---\n{}",
        policy("client", 80),
        policy("client", 80).replace("web", "late")
    );
    let settings = Settings {
        seed: false,
        ..Settings::default()
    };
    let mut daemon = Daemon::prepare(&node.topology, &settings, &[("web.yaml", &text)]).unwrap();
    daemon.spawn().unwrap();
    daemon
        .wait_status("only the interface is missing", |status| {
            let missing = status["missing"].as_array();
            missing.is_some_and(|missing| {
                missing.len() == 1
                    && missing[0]
                        .as_str()
                        .is_some_and(|m| m.contains("no such interface"))
            })
        })
        .unwrap();
    let wait = daemon.try_cli(&["status", "--wait", "100ms"]).unwrap();
    assert_eq!(wait.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&wait.stderr).contains("no such interface"),
        "{wait:?}"
    );

    node.topology.plug("late").unwrap();
    daemon.wait().unwrap();
    let late = node.topology.get("late");
    let _echo = Echo::start(&late.ns, &[late.addr(Family::V4)], &[80, 81], &[]).unwrap();
    let reach = |port| {
        let to = (late.addr(Family::V4), port).into();
        probe::connect(&node.topology.get("client").ns, to, SHORT)
    };
    assert_eq!((reach(80), reach(81)), (Outcome::Open, Outcome::TimedOut));

    let set = daemon
        .cli(&["endpoint", "config", "default/late", "PolicyAuditMode=Enabled"])
        .unwrap();
    assert_eq!(set.trim(), "PolicyAuditMode : Enabled");
    assert_eq!(reach(81), Outcome::Open);
    let before = daemon.json(&["endpoint", "get", "default/late"]).unwrap();
    assert_eq!(before["ingress_enforcement"], "Disabled (Audit)");
    daemon.kill9().unwrap();
    daemon.restart().unwrap();
    let after = daemon.json(&["endpoint", "get", "default/late"]).unwrap();
    for member in ["id", "identity", "ingress_enforcement"] {
        assert_eq!(
            after[member], before[member],
            "{member} is not the same after a restart"
        );
    }
    assert_eq!(reach(81), Outcome::Open);
    daemon
        .cli(&["endpoint", "config", "default/late", "PolicyAuditMode=Disabled"])
        .unwrap();
    assert_eq!(reach(81), Outcome::TimedOut);
    daemon.detach().unwrap();
}

#[test]
fn a_reload_applies_a_valid_configuration_and_no_broken_one() {
    let node = Node::new();
    let mut daemon = Daemon::start(
        &node.topology,
        &Settings::default(),
        &[("web.yaml", &policy("nobody", 80))],
    )
    .unwrap();
    assert_eq!(node.reach(80, Family::V4), Outcome::TimedOut);
    let good = fs::read_to_string(daemon.config()).unwrap();
    fs::write(daemon.config(), format!("{good}\n[polcy]\n")).unwrap();
    let out = daemon.try_cli(&["reload"]).unwrap();
    assert_eq!(out.status.code(), Some(1));
    let error = String::from_utf8(out.stderr).unwrap();
    assert!(error.contains("did you mean 'policy'?"), "{error}");
    assert_eq!(node.reach(80, Family::V4), Outcome::TimedOut);

    daemon.write("web.yaml", "spec: *x\n").unwrap();
    fs::write(daemon.config(), &good).unwrap();
    let out = daemon.try_cli(&["reload"]).unwrap();
    let error = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{error}");
    let lines = [
        "web.yaml:1:7: ",
        "web.yaml is broken: its last good content stays in force",
    ];
    assert!(lines.iter().all(|line| error.contains(line)), "{error}");
    assert_eq!(node.reach(80, Family::V4), Outcome::TimedOut);
    daemon.write("web.yaml", &policy("nobody", 80)).unwrap();

    fs::write(daemon.config(), good.replace("audit = false", "audit = true")).unwrap();
    daemon.cli(&["reload"]).unwrap();
    assert_eq!(daemon.status().unwrap()["audit"], true);
    assert_eq!(node.reach(80, Family::V4), Outcome::Open);

    fs::write(daemon.config(), good).unwrap();
    let pid = daemon.pid().unwrap().to_string();
    assert!(
        Command::new("kill")
            .args(["-HUP", &pid])
            .status()
            .unwrap()
            .success()
    );
    daemon
        .wait_status("it is enforced again", |status| status["audit"] == false)
        .unwrap();
    assert_eq!(node.reach(80, Family::V4), Outcome::TimedOut);
    daemon.detach().unwrap();
}

/// Returns the log lines with all of these words.
fn logged(daemon: &Daemon, words: &[&str]) -> Vec<String> {
    let log = daemon.log();
    let lines = log
        .lines()
        .filter(|line| line.contains(" INFO ") && words.iter().all(|word| line.contains(word)));
    lines.map(str::to_owned).collect()
}

#[test]
fn each_change_of_enforcement_is_one_log_line() {
    let mut node = Node::new();
    let settings = Settings {
        tables: "[limits]\npolicy = 64\n".to_owned(),
        ..Settings::default()
    };
    let mut daemon =
        Daemon::start(&node.topology, &settings, &[("web.yaml", &policy("client", 80))]).unwrap();
    assert_eq!(
        logged(&daemon, &["event=\"applied\""]),
        [""; 0],
        "a start is one line"
    );
    assert_eq!(logged(&daemon, &["1 policy in force"]).len(), 1);
    let one = |words: &[&str]| {
        let found = wait_until("a line", LONG, || !logged(&daemon, words).is_empty());
        let lines = logged(&daemon, words);
        assert!(
            found.is_ok() && lines.len() == 1,
            "{words:?}: {lines:?}\n{}",
            daemon.log()
        );
    };
    daemon
        .write(
            "new.yaml",
            &policy("client", 81).replace("name: web", "name: new"),
        )
        .unwrap();
    let fields = ["revision=", "endpoints=\"default/web\"", "enforced_after_ms="];
    one(&[&["event=\"applied\"", "new.yaml", "default/new"], &fields[..]].concat());
    daemon.write("web.yaml", &policy("nobody", 80)).unwrap();
    one(&[&["event=\"changed\"", "web.yaml", "default/web"], &fields[..]].concat());
    daemon.write("web.yaml", "kind: [\n").unwrap();
    one(&["event=\"refused\"", "web.yaml"]);
    // More entries than the policy map can hold: the last policy stays in force.
    let ports: Vec<String> = (0..40)
        .map(|n| format!("{{port: \"{}\", protocol: TCP}}", 1_000 + 2 * n))
        .collect();
    let (first, second) = ports.split_at(20);
    let large = policy("client", 82).replace("name: web", "name: large")
        + &format!(
            "  - fromEndpoints: [{{}}]\n    toPorts: [{{ports: [{}]}}, {{ports: [{}]}}]\n",
            first.join(", "),
            second.join(", ")
        );
    daemon.write("large.yaml", &large).unwrap();
    one(&[
        "event=\"rolled-back\"",
        "wanted=\"applied\"",
        "large.yaml",
        "default/large",
        "revision=",
        "problem=",
        "the last state stays in force",
    ]);
    node.only(81, "after a change that was rolled back");
    fs::remove_file(daemon.policies().join("large.yaml")).unwrap();
    one(&["event=\"removed\"", "large.yaml"]);
    fs::remove_file(daemon.policies().join("new.yaml")).unwrap();
    one(&[&["event=\"removed\"", "new.yaml", "default/new"], &fields[..]].concat());
    daemon
        .cli(&["endpoint", "config", "default/web", "PolicyAuditMode=Enabled"])
        .unwrap();
    one(&["event=\"audit\"", "default/web", "audit=true"]);
    node.topology.unplug("client").unwrap();
    one(&["event=\"interface-gone\"", "veth-client"]);
    node.topology.plug("client").unwrap();
    let came = ["event=\"interface-guarded\"", "veth-client"];
    wait_until("it is guarded again", LONG, || logged(&daemon, &came).len() == 2).unwrap();
    // Changes that a reload applies to all endpoints, and one that needs a restart.
    let text = fs::read_to_string(daemon.config()).unwrap();
    let text = text.replace("audit = false", "audit = true");
    let text = text.replace("policy = 64", "policy = 64\nrules = 128");
    fs::write(daemon.config(), text).unwrap();
    let out = daemon.try_cli(&["reload"]).unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    // web.yaml is still broken.
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(
        said.contains("only used after a restart: [limits] rules"),
        "{said}"
    );
    one(&["event=\"audit\"", "endpoints=\"all\"", "audit=true"]);
    one(&["event=\"reload\"", "revision="]);
    let out = daemon
        .try_cli(&["endpoint", "config", "default/web", "PolicyAuditMode=Disabled"])
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        out.status.success() && said.contains("every endpoint is in audit mode"),
        "{said}"
    );
    daemon.detach().unwrap();
}

#[test]
fn status_without_a_daemon_reports_what_is_enforced() {
    let node = Node::new();
    let mut daemon = Daemon::start(
        &node.topology,
        &Settings::default(),
        &[("web.yaml", &policy("client", 80))],
    )
    .unwrap();
    let said = daemon.cli(&["stop"]).unwrap();
    assert!(said.contains("GOES ON ENFORCING the last policy"), "{said}");
    let out = daemon.try_cli(&["status"]).unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(3));
    assert!(
        said.contains("not running") && said.contains("STILL ENFORCED at 3 interfaces"),
        "{said}"
    );
    daemon.restart().unwrap();
    let said = daemon.cli(&["stop", "--detach"]).unwrap();
    assert!(said.contains("nothing is enforced any more"), "{said}");
    let out = daemon.try_cli(&["status"]).unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(said.contains("nothing is enforced"), "{said}");
    // With many files `status` shows only a sum.
    let many: Vec<(String, String)> = (0..60)
        .map(|n| {
            (
                format!("{n}.yaml"),
                policy("client", 80).replace("name: web", &format!("name: p{n}")),
            )
        })
        .collect();
    for (name, text) in &many {
        daemon.write(name, text).unwrap();
    }
    daemon.write("broken.yaml", "kind: [\n").unwrap();
    daemon.spawn().unwrap();
    daemon
        .wait_status("all are read", |status| {
            status["policy_files"]
                .as_array()
                .is_some_and(|all| all.len() == 62)
        })
        .unwrap();
    let said = daemon.cli(&["status"]).unwrap();
    assert!(
        said.contains("(61 files)") && said.contains("broken.yaml") && !said.contains("17.yaml"),
        "{said}"
    );
}

#[test]
fn signals_during_the_start_are_handled_after_it() {
    let node = Node::new();
    let mut daemon = Daemon::prepare(
        &node.topology,
        &Settings::default(),
        &[("web.yaml", &policy("client", 80))],
    )
    .unwrap();
    for (signal, goes_on) in [("-HUP", true), ("-TERM", false)] {
        daemon.spawn().unwrap();
        let pid = daemon.pid().unwrap().to_string();
        // The daemon handles signals before it makes its state directory. The handlers are set before the thread starts;
        // the first further thread is one of the allocator.
        let is_signals = |task: io::Result<fs::DirEntry>| {
            let name = task.and_then(|task| fs::read_to_string(task.path().join("comm")));
            name.is_ok_and(|name| name.trim_end() == "signals")
        };
        let made = daemon.config().with_file_name("state").join("state.json");
        wait_until("it has begun", LONG, || {
            fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("palisade"))
                && fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|mut tasks| tasks.any(is_signals))
        })
        .unwrap();
        assert!(
            Command::new("kill")
                .args([signal, &pid])
                .status()
                .unwrap()
                .success()
        );
        if goes_on {
            daemon.wait().unwrap();
            assert_eq!(
                logged(&daemon, &["event=\"reload\""]).len(),
                1,
                "{}",
                daemon.log()
            );
            daemon.terminate().unwrap();
        } else {
            wait_until("it has ended in order", Duration::from_secs(30), || {
                logged(&daemon, &["ended; what is attached goes on"]).len() == 2
            })
            .unwrap();
            assert!(made.exists());
            node.only(80, "ended while it started");
        }
    }
}
