//! Operation: broken files, interfaces that appear and disappear, and detaching without a trace.

use std::{fs, time::Duration};

use palisade_testbed::{
    attached,
    daemon::{Hooks, Settings},
    process::output,
    topology::{FAMILIES, WorkloadSpec},
};
use palisade_tests::{
    OPEN,
    fixtures::back::{FROM_FRONT, ONLY_DB, ONLY_FRONT, from_db},
    with_peers, world,
};
use serde_json::Value;

fn file<'a>(status: &'a Value, name: &str) -> &'a Value {
    let files = status["policy_files"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    files.iter().find(|f| f["file"] == name).unwrap_or(&Value::Null)
}

#[test]
fn a_broken_file_leaves_the_last_good_state_and_is_named_with_line_and_reason() {
    let world = world();
    let mut daemon = world
        .daemon(Settings::default(), &[("front.yaml", FROM_FRONT)])
        .expect("daemon");
    world.expect(&daemon, ONLY_FRONT);

    // The policy's own file breaks.
    let broken = FROM_FRONT.replace("fromEndpoints", "fromEndpoint");
    daemon.write("front.yaml", &broken).expect("write");
    let status = daemon
        .wait_status("the broken file is seen", |s| {
            file(s, "front.yaml")["state"] == "last-good"
        })
        .expect("status");
    let said = file(&status, "front.yaml")["diagnostics"][0]
        .as_str()
        .unwrap_or_default();
    assert!(
        said.contains("front.yaml:7:") && said.contains("fromEndpoint"),
        "{said}"
    );
    world.expect(&daemon, ONLY_FRONT);

    // After a restart the last good state is still in force, and the text output shows it.
    daemon.kill9().expect("kill -9");
    daemon.restart().expect("restart");
    world.expect(&daemon, ONLY_FRONT);
    let text = daemon.cli(&["status"]).expect("status");
    assert!(text.contains("front.yaml:7:"), "{text}");

    // Another broken file does not stop changes of the good ones.
    daemon
        .write(
            "other.yaml",
            "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nspec: [\n",
        )
        .expect("write");
    daemon
        .wait_status("the other file is seen", |s| {
            file(s, "other.yaml")["state"] == "unused"
        })
        .expect("status");
    daemon.write("front.yaml", &from_db()).expect("write");
    daemon
        .wait_status("the repaired file is in force", |s| {
            file(s, "front.yaml")["state"] == "in-force"
        })
        .expect("status");
    world.expect(&daemon, ONLY_DB);

    // Removing a file removes its policies.
    daemon.apply(&[]).expect("apply");
    world.expect(&daemon, "front -> back tcp/80 open\ndb -> back tcp/80 open");
}

#[test]
fn many_files_changed_at_once_are_one_change() {
    let world = world();
    let daemon = world.daemon(Settings::default(), &[]).expect("daemon");
    let before = daemon.status().expect("status")["revision"]
        .as_u64()
        .expect("revision");
    let files: Vec<(String, String)> = (0..100)
        .map(|n| {
            (
                format!("{n}.yaml"),
                FROM_FRONT.replace("from-front", &format!("from-front-{n}")),
            )
        })
        .collect();
    let files: Vec<(&str, &str)> = files.iter().map(|(n, c)| (n.as_str(), c.as_str())).collect();
    daemon.apply(&files).expect("apply");
    let after = daemon.status().expect("status")["revision"]
        .as_u64()
        .expect("revision");
    assert!(after > before && after - before < 20, "{before} -> {after}");
    world.expect(&daemon, ONLY_FRONT);
}

#[test]
fn programs_are_attached_when_an_interface_appears_and_when_it_is_recreated() {
    let mut world = world();
    world
        .topology
        .declare(WorkloadSpec::new("late").label("app", "back"))
        .expect("declare");
    let daemon = palisade_testbed::Daemon::prepare(
        &world.topology,
        &with_peers(Settings::default()),
        &[("front.yaml", FROM_FRONT)],
    );
    let mut daemon = daemon.expect("daemon");
    daemon.spawn().expect("spawn");
    let attached = |status: &Value| {
        let interfaces = status["interfaces"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        interfaces
            .iter()
            .any(|i| i["name"] == "veth-late" && i["ingress"].is_string() && i["egress"].is_string())
    };
    let status = daemon
        .wait_status("the others are attached", |s| {
            let interfaces = s["interfaces"].as_array().map(Vec::as_slice).unwrap_or_default();
            interfaces.iter().filter(|i| i["ingress"].is_string()).count() == 5
        })
        .expect("status");
    assert!(!attached(&status));
    world.expect(&daemon, ONLY_FRONT);
    for _ in 0..2 {
        world.topology.plug("late").expect("plug");
        daemon
            .wait_status("veth-late is attached", attached)
            .expect("attached");
        // No server listens: a packet that passes is refused with a reset, which counts as open.
        let at = |family| world.at("late", family, 80);
        for family in palisade_testbed::topology::FAMILIES {
            use palisade_testbed::{Outcome, probe::connect};
            let patience = Duration::from_secs(5);
            assert_eq!(
                connect(world.ns("front"), at(family), patience),
                Outcome::Refused,
                "{}",
                daemon.report()
            );
            assert_eq!(
                connect(world.ns("db"), at(family), palisade_tests::CLOSED),
                Outcome::TimedOut,
                "{}",
                daemon.report()
            );
        }
        world.topology.unplug("late").expect("unplug");
        daemon
            .wait_status("veth-late is gone", |s| !attached(s))
            .expect("gone");
    }
}

const INTERFACES: [&str; 5] = ["nic0", "veth-front", "veth-back", "veth-db", "veth-pfront"];

fn stop_leaves_all_and_detach_leaves_nothing(hooks: Hooks, host: [&str; 2], endpoint: [&str; 2]) {
    let world = world();
    let mut daemon = world
        .daemon(
            Settings {
                hooks,
                ..Settings::default()
            },
            &[("front.yaml", FROM_FRONT)],
        )
        .expect("daemon");
    let node = &world.topology.node;
    let attached = || INTERFACES.map(|name| attached::hooks(node, name).expect("hooks"));
    let all = INTERFACES.map(|name| {
        if name == "nic0" {
            host.to_vec()
        } else {
            endpoint.to_vec()
        }
    });
    assert_eq!(attached(), all);
    daemon.cli(&["stop"]).expect("stop");
    assert!(daemon.pins().exists());
    assert_eq!(world.check(ONLY_FRONT).expect("check"), [""; 0]);
    assert_eq!(attached(), all);
    daemon.restart().expect("restart");
    world.expect(&daemon, ONLY_FRONT);
    assert_eq!(attached(), all);
    daemon.detach().expect("stop --detach");
    assert_eq!(attached(), [const { Vec::<&str>::new() }; 5]);
    assert!(!daemon.pins().exists(), "pins are left");
    let qdiscs = node.run("tc", &["qdisc", "show"]).expect("tc");
    assert!(!qdiscs.contains("clsact"), "{qdiscs}");
    assert_eq!(
        world
            .check("front -> back tcp/80 open\ndb -> back tcp/80 open\nfar -> back ping open")
            .expect("check"),
        [""; 0]
    );
}

#[test]
fn stop_leaves_the_policy_enforced_and_detach_removes_everything_tcx_and_xdp() {
    stop_leaves_all_and_detach_leaves_nothing(
        Hooks {
            endpoint: "tc",
            host: "xdp",
            tc: "tcx",
        },
        ["xdp", "tcx egress"],
        ["tcx ingress", "tcx egress"],
    );
}

#[test]
fn stop_leaves_the_policy_enforced_and_detach_removes_everything_clsact_and_xdp() {
    stop_leaves_all_and_detach_leaves_nothing(
        Hooks {
            endpoint: "xdp",
            host: "tc",
            tc: "clsact",
        },
        ["clsact ingress", "clsact egress"],
        ["xdp", "clsact egress"],
    );
}

#[test]
fn detach_works_when_the_daemon_is_dead() {
    let world = world();
    let mut daemon = world
        .daemon(Settings::default(), &[("front.yaml", FROM_FRONT)])
        .expect("daemon");
    daemon.kill9().expect("kill -9");
    world
        .check(ONLY_FRONT)
        .map(|failures| assert_eq!(failures, [""; 0]))
        .expect("check");
    daemon.cli(&["stop", "--detach"]).expect("stop --detach");
    for name in INTERFACES {
        assert_eq!(
            attached::hooks(&world.topology.node, name).expect("hooks"),
            [""; 0],
            "{name}"
        );
    }
    assert!(!daemon.pins().exists(), "pins are left");
}

#[test]
fn the_maps_are_listed_from_the_pins_while_no_daemon_runs() {
    let world = world();
    let mut daemon = world
        .daemon(Settings::default(), &[("front.yaml", FROM_FRONT)])
        .expect("daemon");
    world.expect(&daemon, ONLY_FRONT);
    // Connections are listed in any order, and time and counters go on.
    let connections = |rows: &Value| -> std::collections::BTreeSet<String> {
        let rows = rows.as_array().expect("rows").iter();
        rows.map(|row| format!("{} {} {}", row["source"], row["destination"], row["identity"]))
            .collect()
    };
    let lists = [
        &["bpf", "ipcache", "list"][..],
        &["bpf", "policy", "get", "default/back"],
        &["bpf", "policy", "get", "back"],
        &["bpf", "policy", "get", "--all"],
        &["bpf", "ct", "list", "default/back"],
    ];
    let read = |daemon: &palisade_testbed::Daemon, args: &[&str]| daemon.json(args).expect("a list");
    let before = lists.map(|args| read(&daemon, args));
    daemon.kill9().expect("kill -9");
    for (args, before) in lists.into_iter().zip(before) {
        let after = read(&daemon, args);
        if args[1] == "ct" {
            assert!(
                connections(&before).is_superset(&connections(&after)),
                "{before:#} {after:#}"
            );
            assert!(!connections(&after).is_empty());
            continue;
        }
        // Texts of rules are in the policies, and labels of the node in the configuration, which only the daemon reads.
        let without_texts = |list: &Value| {
            let text = serde_json::to_string_pretty(list).expect("JSON");
            let other = [
                "\"decided_by\"",
                "\"bytes\"",
                "\"packets\"",
                "node-role.kubernetes.io/worker",
            ];
            let lines = text
                .lines()
                .filter(|line| !other.iter().any(|key| line.contains(key)));
            lines.map(|line| format!("{line}\n")).collect::<String>()
        };
        let name_of_node = before[0]["name"].as_str().unwrap_or_default();
        let before =
            without_texts(&before).replace(&format!("\"name\": \"{name_of_node}\""), "\"name\": \"host\"");
        assert_eq!(without_texts(&after), before, "{args:?}");
    }
    let out = daemon.try_cli(&["bpf", "ipcache", "list"]).expect("palisade");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        said.contains("the daemon does not run") && said.contains(&*daemon.pins().to_string_lossy()),
        "{said}"
    );
    let out = daemon
        .try_cli(&["bpf", "policy", "get", "nope"])
        .expect("palisade");
    assert!(!out.status.success());
    // Without pins there is nothing to list.
    daemon.try_cli(&["stop", "--detach"]).expect("detach");
    let out = daemon.try_cli(&["bpf", "ipcache", "list"]).expect("palisade");
    assert_eq!(out.status.code(), Some(3));
}

#[test]
fn status_names_hook_and_mode_of_each_attachment() {
    let world = world();
    for (hooks, endpoint, host) in [
        (
            Hooks {
                endpoint: "tc",
                host: "xdp",
                tc: "tcx",
            },
            ["tcx", "tcx"],
            ["xdp (native)", "tcx"],
        ),
        (
            Hooks {
                endpoint: "xdp",
                host: "tc",
                tc: "clsact",
            },
            ["xdp (native)", "clsact"],
            ["clsact", "clsact"],
        ),
        (Hooks::default(), ["tcx", "tcx"], ["xdp (native)", "tcx"]),
    ] {
        let daemon = world
            .daemon(
                Settings {
                    hooks,
                    ..Settings::default()
                },
                &[],
            )
            .expect("daemon");
        let status = daemon.status().expect("status");
        let interfaces = status["interfaces"].as_array().expect("interfaces");
        assert_eq!(interfaces.len(), 5);
        for interface in interfaces {
            let expected = if interface["role"] == "host" {
                host
            } else {
                endpoint
            };
            assert_eq!(
                [&interface["ingress"], &interface["egress"]],
                expected,
                "{interface}"
            );
        }
    }
}

#[test]
fn scripts_get_the_state_in_one_line_and_values_by_templates() {
    let world = world();
    let mut daemon = world
        .daemon(Settings::default(), &[("front.yaml", FROM_FRONT)])
        .expect("daemon");
    assert_eq!(daemon.cli(&["status", "--brief"]).expect("status"), "OK\n");
    let host = "jsonpath={[?(@.identity==1)].id}";
    assert_eq!(
        daemon.cli(&["endpoint", "list", "-o", host]).expect("list"),
        "1\n"
    );
    daemon.write("bad.yaml", "kind: [\n").expect("write");
    daemon
        .wait_status("the broken file is seen", |status| status["ready"] == false)
        .expect("status");
    let brief = daemon.try_cli(&["status", "--brief"]).expect("status");
    assert_eq!(brief.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&brief.stdout).contains("bad.yaml"),
        "{brief:?}"
    );
    daemon.kill9().expect("kill");
    let brief = daemon.try_cli(&["status", "--brief"]).expect("status");
    assert_eq!(brief.status.code(), Some(3));
    let wrong = daemon
        .try_cli(&["endpoint", "list", "-o", "jsonpath={x}"])
        .expect("list");
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn identities_and_endpoint_numbers_are_the_same_after_a_restart() {
    let world = world();
    let mut daemon = world
        .daemon(Settings::default(), &[("front.yaml", FROM_FRONT)])
        .expect("daemon");
    let numbers = |daemon: &palisade_testbed::Daemon| {
        let list = daemon.json(&["endpoint", "list"]).expect("list");
        let mut rows: Vec<_> = list
            .as_array()
            .expect("rows")
            .iter()
            .map(|e| format!("{} {} {}", e["name"], e["id"], e["identity"]))
            .collect();
        rows.sort();
        rows
    };
    let before = numbers(&daemon);
    assert!(before.len() >= 5, "{before:?}");
    let identities = daemon.json(&["identity", "list"]).expect("identities");
    daemon.kill9().expect("kill -9");
    daemon
        .write("a-first.yaml", &FROM_FRONT.replace("from-front", "first"))
        .expect("write");
    daemon.restart().expect("restart");
    assert_eq!(numbers(&daemon), before);
    assert_eq!(
        daemon.json(&["identity", "list"]).expect("identities"),
        identities
    );
}

/// Rules of policies that are renamed again and again have the numbers of removed ones, with counters that begin at zero. A
/// number that a flow record has is not among them.
#[test]
fn numbers_of_removed_rules_are_used_again_and_explain_no_recorded_flow() {
    const LIMIT: u64 = 64;
    let settings = Settings {
        tables: format!("[limits]\nrules = {LIMIT}\n[timeouts]\nsweep = \"1s\"\n"),
        ..Settings::default()
    };
    let world = world();
    let mut daemon = world
        .daemon(settings, &[("front.yaml", FROM_FRONT)])
        .expect("daemon");
    let rename = |daemon: &palisade_testbed::Daemon, name: &str| -> u64 {
        daemon
            .write("front.yaml", &FROM_FRONT.replace("from-front", name))
            .expect("write");
        daemon.settle().expect("settle");
        let policy = daemon
            .json(&["policy", "get", &format!("default/{name}")])
            .expect("policy");
        policy[0]["rules"][0]["id"].as_u64().expect("a number")
    };
    // Recorded flows, by a rule that is removed afterwards.
    world.expect(&daemon, ONLY_FRONT);
    let recorded = daemon
        .flows(&[
            "--verdict",
            "forwarded",
            "--to-pod",
            "default/back",
            "--traffic-direction",
            "ingress",
        ])
        .expect("flows");
    let rule = |flow: &Value| flow["palisade"]["rule"].clone();
    let old = rule(recorded.first().expect("a flow"));
    assert!(old["text"].to_string().contains("from-front"), "{old}");

    let mut highest = 0;
    for n in 0..40 {
        highest = highest.max(rename(&daemon, &format!("p{n}")));
    }
    assert!(highest >= LIMIT, "{highest}: the numbers are not scarce");
    daemon
        .wait_log("numbers of removed rules can be used for new ones")
        .expect("log");
    for family in FAMILIES {
        let _ = palisade_testbed::probe::connect(world.ns("front"), world.at("back", family, 80), OPEN);
    }
    let mut used = Vec::new();
    for n in 0..8 {
        let number = rename(&daemon, &format!("q{n}"));
        assert!(number < LIMIT && old["id"] != number, "{number}");
        used.push(number);
    }
    let policy = |daemon: &palisade_testbed::Daemon| {
        daemon.json(&["policy", "get", "default/q7"]).expect("policy")[0].clone()
    };
    assert_eq!(policy(&daemon)["rules"][0]["packets"], 0, "{}", daemon.report());
    world.expect(&daemon, ONLY_FRONT);
    let packets = policy(&daemon)["rules"][0]["packets"].as_u64();
    assert!(packets > Some(0), "{}", daemon.report());
    // The old records have the text of the old rule.
    let uuid = recorded[0]["uuid"].as_str().expect("uuid");
    let again = daemon.flows(&["--uuid", uuid]).expect("flows");
    assert_eq!(rule(&again[0]), old);

    // After a restart each rule has its number, and its counter.
    daemon.terminate().expect("SIGTERM");
    daemon.restart().expect("restart");
    let rules = policy(&daemon)["rules"][0].clone();
    assert_eq!(rules["id"].as_u64(), used.last().copied(), "{rules}");
    assert!(rules["packets"].as_u64() >= packets, "{rules}");
}

#[test]
fn subfolders_and_edits_behind_links_are_named_or_read_as_the_page_says() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("back.yaml", FROM_FRONT)])
        .expect("daemon");
    let team = daemon.policies().join("team");
    let warns = |status: &Value| {
        status["warnings"]
            .to_string()
            .contains("subfolders are not read: team;")
    };
    fs::create_dir(&team).expect("folder");
    daemon
        .wait_status("the subfolder is named", warns)
        .unwrap_or_else(|error| panic!("{error:#}"));
    fs::write(team.join("more.yaml"), from_db()).expect("file");
    world.expect(&daemon, ONLY_FRONT);
    fs::remove_dir_all(&team).expect("remove");
    daemon
        .wait_status("the warning ends", |status| !warns(status))
        .unwrap_or_else(|error| panic!("{error:#}"));

    // An edit of the file to which a link leads is read at a reload, or when the link is replaced.
    let target = world.topology.dir().join("target.yaml");
    fs::write(&target, FROM_FRONT).expect("target");
    let link = daemon.policies().join("back.yaml");
    let replace_link = || {
        let new = daemon.policies().join(".new");
        std::os::unix::fs::symlink(&target, &new).expect("link");
        fs::rename(new, &link).expect("rename");
        daemon.settle().expect("settle");
    };
    replace_link();
    world.expect(&daemon, ONLY_FRONT);
    fs::write(&target, from_db()).expect("edit");
    daemon.cli(&["reload"]).expect("reload");
    world.expect(&daemon, ONLY_DB);
    fs::write(&target, FROM_FRONT).expect("edit");
    replace_link();
    world.expect(&daemon, ONLY_FRONT);
}

#[test]
fn what_is_broken_is_red_on_a_terminal_only() {
    const RED: &str = "\x1b[31mBROKEN";
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("back.yaml", FROM_FRONT)])
        .expect("daemon");
    daemon.write("broken.yaml", "kind: [").expect("write");
    let missing = |status: &Value| status["ready"] == false;
    daemon
        .wait_status("the broken file is named", missing)
        .expect("status");
    let plain = daemon.cli(&["status"]).expect("status");
    assert!(plain.contains("BROKEN") && !plain.contains('\x1b'), "{plain}");
    // script(1) runs a command on a terminal of its own.
    let words: Vec<String> = {
        let command = daemon.command(&["status"]);
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words
            .map(|word| format!("'{}'", word.to_string_lossy()))
            .collect()
    };
    let on_a_terminal = |no_color: Option<&str>| {
        let mut script = std::process::Command::new("script");
        script.args(["-qec", &words.join(" "), "/dev/null"]);
        script.env_remove("NO_COLOR").stdin(std::process::Stdio::null());
        script.envs(no_color.map(|value| ("NO_COLOR", value)));
        let out = output(&mut script, Duration::from_secs(60)).expect("script");
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    let (red, plain) = (on_a_terminal(None), on_a_terminal(Some("1")));
    assert!(red.contains(RED) && red.contains("\x1b[31mNOT READY"), "{red}");
    assert!(plain.contains("BROKEN") && !plain.contains("\x1b[31m"), "{plain}");
}
