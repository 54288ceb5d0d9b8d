//! `palisade policy apply` with confirmation, `rollback`, `history` and `diff`, with real traffic.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    path::Path,
    process::Output,
    time::Duration,
};

use palisade_testbed::{
    Daemon,
    daemon::Settings,
    load::Leak,
    ns::wait_until,
    process::output,
    topology::{FAMILIES, Family, INNER},
};
use palisade_tests::{
    CLOSED, OPEN, World,
    fixtures::back::{FROM_FRONT, ONLY_DB, ONLY_FRONT, from_db},
    tmux::Tmux,
    with_peers, world,
};
use serde_json::Value;

/// Time within which a rollback, a start or a write must have happened.
const LONG: Duration = Duration::from_secs(120);

struct Bed {
    world: World,
    daemon: Daemon,
}

impl Bed {
    fn new() -> Self {
        let world = world();
        let daemon = world
            .daemon(Settings::default(), &[("back.yaml", FROM_FRONT)])
            .expect("daemon");
        Self { world, daemon }
    }

    /// Writes a candidate file outside the policy folder and returns its path.
    fn candidate(&self, name: &str, text: &str) -> String {
        let path = self.world.topology.dir().join(name);
        fs::write(&path, text).expect("candidate");
        path.display().to_string()
    }

    fn run(&self, args: &[&str]) -> Output {
        self.daemon.try_cli(args).expect("command")
    }

    fn apply(&self, args: &[&str]) -> Value {
        let mut all = vec!["policy", "apply"];
        all.extend(args);
        self.daemon
            .json(&all)
            .unwrap_or_else(|error| panic!("{error:#}\n{}", self.daemon.log()))
    }

    fn folder(&self, name: &str) -> String {
        fs::read_to_string(self.daemon.policies().join(name)).unwrap_or_default()
    }

    fn rolled_back(&self) {
        self.daemon
            .wait_status("the change is rolled back", |status| {
                let warnings = status["warnings"].to_string();
                status["pending_change"].is_null()
                    && warnings.contains("was rolled back")
                    && !warnings.contains("not back in the policy folder")
            })
            .unwrap_or_else(|error| panic!("{error:#}\n{}", self.daemon.log()));
    }

    fn history(&self) -> Vec<Value> {
        let rows = self.daemon.json(&["policy", "history"]).expect("history");
        rows.as_array().cloned().expect("rows")
    }
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn a_confirmed_change_stays_and_an_unconfirmed_one_goes() {
    let bed = Bed::new();
    let (world, daemon) = (&bed.world, &bed.daemon);
    world.expect(daemon, ONLY_FRONT);
    let file = bed.candidate("back.yaml", &from_db());

    // What would change is shown as verdicts, and nothing is changed.
    let diff = bed.run(&["policy", "diff", &file, "-o", "json"]);
    let diff: Value = serde_json::from_slice(&diff.stdout).expect("JSON");
    let rows = diff["verdicts"].as_array().expect("rows");
    let row = |peer: &str, to: &str| {
        rows.iter().any(|row| {
            row["direction"] == "ingress"
                && row["to"] == to
                && row["endpoints"].to_string().contains("back")
                && row["peers"].to_string().contains(peer)
        })
    };
    assert!(row("app=front", "deny") && row("app=db", "allow"), "{diff:#}");
    assert_eq!(
        diff["policies"]["changed"][0],
        "CiliumNetworkPolicy default/from-front"
    );
    let dry = bed.run(&["policy", "apply", &file, "--dry-run"]);
    assert!(
        dry.status.success() && text(&dry).contains("Verdicts:"),
        "{}",
        text(&dry)
    );
    // Without a terminal it asks for --yes.
    let asked = bed.run(&["policy", "apply", &file]);
    assert!(
        !asked.status.success() && text(&asked).contains("--yes"),
        "{}",
        text(&asked)
    );
    world.expect(daemon, ONLY_FRONT);

    // Confirmed in time.
    let applied = bed.apply(&[&file, "--yes", "--confirm", "1h", "-m", "db instead of front"]);
    assert!(
        applied["applied"]["confirm_within_seconds"].as_u64() > Some(3_000),
        "{applied:#}"
    );
    world.expect(daemon, ONLY_DB);
    assert_eq!(bed.folder("back.yaml"), from_db());
    let second = bed.run(&["policy", "apply", &file, "--yes"]);
    assert!(
        text(&second).contains("waits for its confirmation"),
        "{}",
        text(&second)
    );
    // The change of another operator is neither confirmed nor cancelled by its number.
    for command in ["confirm", "cancel"] {
        let said = text(&bed.run(&["policy", command, "1"]));
        assert!(
            said.contains("change 1 does not wait")
                && said.contains("change 2 of root (\"db instead of front\")"),
            "{said}"
        );
    }
    daemon.cli(&["policy", "confirm", "2"]).expect("confirm");
    assert!(!bed.run(&["policy", "confirm"]).status.success());
    world.expect(daemon, ONLY_DB);

    // Not confirmed. The command that applied it has ended long before.
    let old = bed.candidate("back.yaml", FROM_FRONT);
    bed.apply(&[&old, "--yes", "--confirm", "2s"]);
    bed.rolled_back();
    world.expect(daemon, ONLY_DB);
    assert_eq!(bed.folder("back.yaml"), from_db());

    // Cancelled.
    bed.apply(&[&old, "--yes", "--confirm", "1h"]);
    world.expect(daemon, ONLY_FRONT);
    daemon.cli(&["policy", "cancel"]).expect("cancel");
    world.expect(daemon, ONLY_DB);
    assert_eq!(bed.folder("back.yaml"), from_db());

    // Edited by hand; then a set of the history comes back.
    daemon
        .write("more.yaml", &FROM_FRONT.replace("name: from-front", "name: more"))
        .expect("write");
    daemon.settle().expect("settle");
    let history = bed.history();
    let states: Vec<(&str, &str)> = history
        .iter()
        .map(|row| {
            (
                row["kind"].as_str().unwrap_or(""),
                row["state"].as_str().unwrap_or(""),
            )
        })
        .collect();
    assert_eq!(
        states,
        [
            ("file-change", "enforced"),
            ("apply", "confirmed"),
            ("apply", "rolled-back"),
            ("rolled-back", "enforced"),
            ("apply", "rolled-back"),
            ("rolled-back", "enforced"),
            ("file-change", "enforced"),
        ],
        "{history:#?}"
    );
    assert_eq!(history[1]["message"], "db instead of front");
    assert_eq!(history[1]["author"]["user"], "root");
    assert_eq!(history[6]["files"]["added"][0], "more.yaml");
    let diff = bed.run(&["policy", "diff", "1", "2"]);
    assert!(text(&diff).contains("app=db"), "{}", text(&diff));
    // Without the daemon, which knows the same endpoints and peers.
    let (first, second) = (
        bed.candidate("first.yaml", FROM_FRONT),
        bed.candidate("second.yaml", &from_db()),
    );
    let offline = bed.run(&["policy", "diff", "--offline", &first, &second, "-o", "json"]);
    let offline: Value = serde_json::from_slice(&offline.stdout).expect("JSON");
    let diff = bed.run(&["policy", "diff", "1", "2", "-o", "json"]);
    let diff: Value = serde_json::from_slice(&diff.stdout).expect("JSON");
    assert!(
        offline["verdicts"]
            .as_array()
            .is_some_and(|rows| !rows.is_empty())
    );
    let without = |plan: &Value| -> Vec<Value> {
        let rows = plan["verdicts"]
            .as_array()
            .cloned()
            .unwrap_or_default()
            .into_iter();
        rows.map(|mut row| {
            row["decided_by"].take();
            row
        })
        .collect()
    };
    assert_eq!(without(&offline), without(&diff));
    let unknown = bed.run(&["policy", "diff", "--offline", "1", &second]);
    assert!(
        text(&unknown).contains("known to the daemon only"),
        "{}",
        text(&unknown)
    );
    daemon
        .cli(&["policy", "rollback", "1", "--yes", "-m", "front again"])
        .expect("rollback");
    world.expect(daemon, ONLY_FRONT);
    assert_eq!(
        (bed.folder("back.yaml").as_str(), bed.folder("more.yaml").as_str()),
        (FROM_FRONT, "")
    );
    let history = bed.history();
    let last = history.last().expect("row");
    assert_eq!(
        (&last["of"], &last["message"]),
        (&1.into(), &"front again".into())
    );
    // Who made both sets, and why.
    let number = last["number"].to_string();
    let said = text(&bed.run(&["policy", "diff", "2", &number]));
    for (set, message) in [("2", "db instead of front"), (&number, "front again")] {
        let line = said
            .lines()
            .find(|line| line.starts_with(&format!("Set {set}: ")));
        let line = line.unwrap_or_else(|| panic!("{said}"));
        assert!(line.ends_with(&format!(" by root: {message}")), "{line}");
    }
    let diff = bed.run(&["policy", "diff", "2", &number, "-o", "json"]);
    let diff: Value = serde_json::from_slice(&diff.stdout).expect("JSON");
    assert_eq!(
        (&diff["from"]["message"], &diff["to"]["message"]),
        (&"db instead of front".into(), &"front again".into())
    );
}

#[test]
fn a_dry_run_lists_recorded_flows_that_would_get_another_verdict() {
    let bed = Bed::new();
    let file = bed.candidate("back.yaml", &from_db());
    let dry = |file: &str| -> Value {
        let mut dry = bed.apply(&[file, "--dry-run"]);
        dry["plan"].take()
    };
    bed.world.expect(&bed.daemon, ONLY_FRONT);
    for verdict in ["FORWARDED", "DROPPED"] {
        let args = ["--to-port", "80", "--verdict", verdict];
        bed.daemon
            .wait_flows(&args, verdict, |flows| !flows.is_empty())
            .expect("recorded flows");
    }
    let plan = dry(&file);
    let has = |peer: &str, now: &str, then: &str| {
        plan["flows"].as_array().is_some_and(|rows| {
            rows.iter().any(|row| {
                row["direction"] == "ingress"
                    && row["endpoint"].to_string().contains("back")
                    && row["peer"].to_string().contains(peer)
                    && (&row["now"], &row["then"]) == (&now.into(), &then.into())
                    && row["flows"].as_u64() > Some(0)
            })
        })
    };
    assert!(
        has("front", "ALLOWED", "DENIED") && has("db", "DENIED", "ALLOWED"),
        "{plan:#}"
    );
    assert!(plan["flows_evaluated"].as_u64() > Some(0), "{plan:#}");
    assert_eq!(plan["flows_lost"], 0, "{plan:#}");
    let since = plan["flows_since"].as_str().expect("a time");
    let flows = bed.daemon.flows(&[]).expect("flows");
    assert!(flows.iter().any(|flow| flow["time"] == since), "{flows:#?}");
    let shown = text(&bed.run(&["policy", "apply", &file, "--dry-run"]));
    let line = shown.lines().find(|line| line.starts_with("Recorded flows: "));
    let line = line.unwrap_or_else(|| panic!("{shown}"));
    assert!(
        line.contains(&format!("since {since} evaluated")) && line.ends_with("with another verdict:"),
        "{line}"
    );
    // The same policies give the same verdicts.
    let same = bed.candidate("back.yaml", &format!("# a comment\n{FROM_FRONT}"));
    let plan = dry(&same);
    assert_eq!(plan["flows"], Value::Array(Vec::new()), "{plan:#}");
    let shown = text(&bed.run(&["policy", "apply", &same, "--dry-run"]));
    assert!(shown.contains("none gets another verdict"), "{shown}");
    bed.world.expect(&bed.daemon, ONLY_FRONT);
}

#[test]
fn on_a_terminal_a_change_is_made_only_after_a_yes() {
    let bed = Bed::new();
    let file = bed.candidate("back.yaml", &from_db());
    let dir = tempfile::tempdir().expect("directory");
    let apply = Tmux::words(&bed.daemon.command(&["policy", "apply", &file]));
    let script = format!(
        "for n in 1 2 3; do {apply} > {}/$n; echo ended $n $?; done; sleep 600",
        dir.path().display()
    );
    let tmux = Tmux::start(dir.path(), &script);
    // "No" is the default, too.
    for (number, answer) in [("1", "n"), ("2", ""), ("3", "y")] {
        let asked = || tmux.screen().matches("apply? [y/N]").count().to_string() == number;
        wait_until("the question", LONG, asked)
            .unwrap_or_else(|error| panic!("{error:#}\n{}", tmux.screen()));
        bed.world.expect(&bed.daemon, ONLY_FRONT);
        tmux.run(&["send-keys", answer, "Enter"]);
        let code = if answer == "y" { 0 } else { 1 };
        tmux.wait("the end", &format!("ended {number} {code}"));
    }
    assert_eq!(tmux.screen().matches("nothing was changed").count(), 2);
    let said = fs::read_to_string(dir.path().join("3")).expect("output");
    assert!(said.contains("is in force"), "{said}");
    bed.world.expect(&bed.daemon, ONLY_DB);
}

#[test]
fn a_rollback_keeps_edits_that_no_daemon_has_read() {
    let mut bed = Bed::new();
    let file = bed.candidate("back.yaml", &from_db());
    bed.apply(&[&file, "--yes", "--confirm", "2s"]);
    bed.daemon.kill9().expect("kill -9");
    let edited = format!("# edited while no daemon ran\n{}", from_db());
    bed.daemon.write("back.yaml", &edited).expect("write");
    std::thread::sleep(Duration::from_secs(2));
    bed.daemon.restart().expect("restart");
    assert_eq!(bed.folder("back.yaml"), FROM_FRONT);
    assert_eq!(bed.folder("back.yaml.edited-2"), edited);
    let warnings = bed.daemon.status().expect("status")["warnings"].to_string();
    assert!(warnings.contains("back.yaml.edited-2"), "{warnings}");
    bed.world.expect(&bed.daemon, ONLY_FRONT);
}

#[test]
fn status_lists_the_live_connections_that_the_policies_deny() {
    let bed = Bed::new();
    let denied = |bed: &Bed| bed.daemon.json(&["status"]).expect("status")["denied_connections"].clone();
    let mut sessions = FAMILIES.map(|family| {
        let to = bed.world.at("back", family, 80);
        palisade_testbed::probe::open(bed.world.ns("front"), None, to, OPEN).expect("session")
    });
    sessions.iter_mut().for_each(|session| assert!(echoes(session)));
    assert_eq!(denied(&bed)["total"], 0, "{}", denied(&bed));
    bed.daemon.write("back.yaml", &from_db()).expect("write");
    bed.daemon.settle().expect("settle");
    // Both an idle connection, and one whose packets are dropped already.
    sessions[0].write_all(b"more").expect("write");
    let found = denied(&bed);
    assert_eq!(found["total"], 2, "{found:#}");
    for session in &sessions {
        let source = session.local_addr().expect("address").to_string();
        let row = |row: &Value| {
            row["source"] == source
                && row["effect"] == "denied"
                && row["decided_by"]
                    .as_str()
                    .is_some_and(|by| by.contains("back.yaml"))
        };
        assert!(
            found["connections"]
                .as_array()
                .is_some_and(|rows| rows.iter().any(row)),
            "{found:#}"
        );
    }
    let shown = text(&bed.run(&["status"]));
    assert!(
        shown.contains("Live connections that the policies deny:"),
        "{shown}"
    );
    // Once they are allowed again, they go on, and are not listed.
    bed.daemon.write("back.yaml", FROM_FRONT).expect("write");
    bed.daemon.settle().expect("settle");
    assert_eq!(denied(&bed)["total"], 0);
}

#[test]
fn errors_change_nothing_and_name_the_line_of_the_given_file() {
    let bed = Bed::new();
    let broken = bed.candidate("back.yaml", &from_db().replace("fromEndpoints", "fromEndpoint"));
    let refused = bed.run(&["policy", "apply", &broken, "--yes"]);
    let said = text(&refused);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        said.contains(&format!("{broken}:7:")) && said.contains("nothing was changed"),
        "{said}"
    );
    // A file with the same policy as another one.
    let twin = bed.candidate("twin.yaml", FROM_FRONT);
    let said = text(&bed.run(&["policy", "apply", &twin, "--yes"]));
    assert!(said.contains("twin.yaml:") && said.contains("already"), "{said}");
    // A link in the folder is not followed.
    let outside = bed.candidate("outside", FROM_FRONT);
    let link = bed.daemon.policies().join("link.yaml");
    std::os::unix::fs::symlink(&outside, &link).expect("link");
    let new = bed.candidate("link.yaml", &from_db().replace("name: from-front", "name: other"));
    let said = text(&bed.run(&["policy", "apply", &new, "--yes"]));
    assert!(said.contains("symbolic link"), "{said}");
    assert_eq!(fs::read_to_string(&outside).expect("file"), FROM_FRONT);
    fs::remove_file(&link).expect("unlink");
    bed.daemon.settle().expect("settle");
    assert_eq!(bed.folder("back.yaml"), FROM_FRONT);
    bed.world.expect(&bed.daemon, ONLY_FRONT);
}

#[test]
fn an_empty_file_is_changed_only_without_a_confirmation() {
    let bed = Bed::new();
    bed.daemon.write("more.yaml", "---\n").expect("write");
    bed.daemon.settle().expect("settle");
    let more = from_db().replace("name: from-front", "name: more");
    let file = bed.candidate("more.yaml", &more);
    let refused = bed.run(&["policy", "apply", &file, "--yes", "--confirm", "1h"]);
    let said = text(&refused);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(
        said.contains("more.yaml is empty: a change cannot be rolled back to it"),
        "{said}"
    );
    assert_eq!(bed.folder("more.yaml"), "---\n");
    bed.world.expect(&bed.daemon, ONLY_FRONT);
    bed.apply(&[&file, "--yes"]);
    assert_eq!(bed.folder("more.yaml"), more);
    bed.world
        .expect(&bed.daemon, "front -> back tcp/80 open\ndb -> back tcp/80 open");
}

#[test]
fn an_uninstall_takes_back_a_change_that_is_not_confirmed() {
    let bed = Bed::new();
    let file = bed.candidate("back.yaml", &from_db());
    bed.apply(&[&file, "--yes", "--confirm", "1h"]);
    bed.world.expect(&bed.daemon, ONLY_DB);
    let removed = bed.run(&["uninstall"]);
    let said = text(&removed);
    assert!(
        removed.status.success() && said.contains("is rolled back"),
        "{said}"
    );
    assert_eq!(bed.folder("back.yaml"), FROM_FRONT);
    let state = bed.daemon.policies().with_file_name("state");
    assert!(!state.exists(), "{}", state.display());
}

/// Changes the boot id that the daemon sees, by a file over it in a mount namespace of its own.
fn with_boot_id(daemon: &mut Daemon, dir: &Path, id: &str) {
    let file = dir.join("boot_id");
    fs::write(&file, format!("{id}\n")).expect("boot id");
    let script = format!(
        "mount --bind {} /proc/sys/kernel/random/boot_id && exec \"$@\"",
        file.display()
    );
    // `--propagation unchanged` would mount on the machine; private mounts end with the process.
    let command = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        &script,
        "sh",
    ];
    daemon.start_through(command.map(str::to_owned).to_vec());
}

#[test]
fn a_daemon_that_is_killed_rolls_back_at_its_start_and_a_boot_does_at_once() {
    let mut bed = Bed::new();
    let file = bed.candidate("back.yaml", &from_db());

    // Killed, and started again after the deadline.
    bed.apply(&[&file, "--yes", "--confirm", "2s"]);
    bed.daemon.kill9().expect("kill -9");
    std::thread::sleep(Duration::from_secs(3));
    bed.daemon.restart().expect("restart");
    assert_eq!(bed.folder("back.yaml"), FROM_FRONT);
    bed.world.expect(&bed.daemon, ONLY_FRONT);
    bed.rolled_back();
    let log = bed.daemon.log();
    assert!(log.contains("rolled back before the policies were read"), "{log}");

    // Killed, and started again before the deadline: the change still waits.
    bed.apply(&[&file, "--yes", "--confirm", "1h"]);
    bed.daemon.kill9().expect("kill -9");
    bed.daemon.restart().expect("restart");
    bed.world.expect(&bed.daemon, ONLY_DB);
    assert!(
        bed.daemon.status().expect("status")["pending_change"]["remaining_seconds"].as_u64() > Some(3_000)
    );

    // Booted: an hour is left, but the change is rolled back.
    bed.daemon.kill9().expect("kill -9");
    let dir = bed.world.topology.dir().to_owned();
    with_boot_id(&mut bed.daemon, &dir, "00000000-1111-2222-3333-444444444444");
    bed.daemon.restart().expect("restart");
    assert_eq!(bed.folder("back.yaml"), FROM_FRONT);
    bed.world.expect(&bed.daemon, ONLY_FRONT);
    let history = bed.history();
    assert_eq!(
        history.last().expect("row")["kind"],
        "rolled-back",
        "{history:#?}"
    );
}

#[test]
fn a_stop_rolls_back_a_change_that_waits_for_its_confirmation() {
    let mut bed = Bed::new();
    let file = bed.candidate("back.yaml", &from_db());
    let journal = bed
        .daemon
        .policies()
        .with_file_name("state")
        .join("policy-change.json");
    for stop in ["SIGTERM", "palisade stop"] {
        bed.apply(&[&file, "--yes", "--confirm", "1h"]);
        bed.world.expect(&bed.daemon, ONLY_DB);
        assert!(journal.exists());
        if stop == "SIGTERM" {
            bed.daemon.terminate().expect("SIGTERM");
        } else {
            bed.daemon.cli(&["stop"]).expect("stop");
        }
        // No daemon runs: what is attached has the policies from before the change, and so has the folder.
        bed.world.expect(&bed.daemon, ONLY_FRONT);
        assert_eq!(bed.folder("back.yaml"), FROM_FRONT, "{stop}");
        assert!(!journal.exists(), "{stop}");
        let log = bed.daemon.log();
        assert!(
            log.contains("the daemon was stopped before it was confirmed"),
            "{log}"
        );
        bed.daemon.restart().expect("restart");
        bed.world.expect(&bed.daemon, ONLY_FRONT);
        let status = bed.daemon.status().expect("status");
        assert!(status["pending_change"].is_null(), "{status:#}");
        let history = bed.history();
        let last: Vec<&Value> = history.iter().rev().take(2).collect();
        assert_eq!(
            (&last[0]["kind"], &last[1]["state"]),
            (&"rolled-back".into(), &"rolled-back".into()),
            "{history:#?}"
        );
    }
    // A change that needs no confirmation, or has it, stays.
    bed.apply(&[&file, "--yes"]);
    bed.daemon.terminate().expect("SIGTERM");
    bed.world.expect(&bed.daemon, ONLY_DB);
    assert_eq!((bed.folder("back.yaml"), journal.exists()), (from_db(), false));
    bed.daemon.restart().expect("restart");
    let old = bed.candidate("back.yaml", FROM_FRONT);
    bed.apply(&[&old, "--yes", "--confirm", "1h"]);
    bed.daemon.cli(&["policy", "confirm"]).expect("confirm");
    bed.daemon.terminate().expect("SIGTERM");
    bed.world.expect(&bed.daemon, ONLY_FRONT);
    assert_eq!(
        (bed.folder("back.yaml").as_str(), journal.exists()),
        (FROM_FRONT, false)
    );
}

#[test]
fn a_stop_while_the_folder_cannot_be_written_keeps_the_rollback_for_the_next_start() {
    let world = world();
    let mut daemon = Daemon::prepare(
        &world.topology,
        &with_peers(Settings::default()),
        &[("back.yaml", FROM_FRONT)],
    )
    .expect("daemon");
    let folder = daemon.policies().display().to_string();
    let script = format!("mount --bind {folder} {folder} && exec \"$@\"");
    let command = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        &script,
        "sh",
    ];
    daemon.start_through(command.map(str::to_owned).to_vec());
    daemon.spawn().expect("spawn");
    daemon.wait().expect("ready");
    let mut bed = Bed { world, daemon };
    let file = bed.candidate("back.yaml", &from_db());
    // Stopped while the rollback at the deadline writes, and while the change still waits.
    for wait in ["2s", "1h"] {
        bed.apply(&[&file, "--yes", "--confirm", wait]);
        let mut mount = std::process::Command::new("nsenter");
        mount.args([
            &format!("--mount=/proc/{}/ns/mnt", bed.daemon.pid().expect("pid")),
            "mount",
            "-o",
            "remount,bind,ro",
            &folder,
        ]);
        let mounted = output(&mut mount, LONG).expect("mount");
        assert!(mounted.status.success(), "{}", text(&mounted));
        if wait == "2s" {
            bed.daemon
                .wait_status("the rollback cannot be written", |status| {
                    status["warnings"]
                        .to_string()
                        .contains("not back in the policy folder")
                })
                .expect("status");
        }
        bed.daemon.terminate().expect("SIGTERM");
        bed.world.expect(&bed.daemon, ONLY_FRONT);
        assert_eq!(bed.folder("back.yaml"), from_db());
        bed.daemon.restart().expect("restart");
        assert_eq!(bed.folder("back.yaml"), FROM_FRONT);
        bed.world.expect(&bed.daemon, ONLY_FRONT);
    }
}

const HOST: &str = "apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: host}
spec:
  nodeSelector: {}
  ingress:
  - toPorts: [{ports: [{port: '8080', protocol: TCP}]}]
";

/// Sends a line over a session and returns whether it came back.
fn echoes(session: &mut TcpStream) -> bool {
    session.set_read_timeout(Some(OPEN)).expect("timeout");
    let mut answer = [0; 5];
    session.write_all(b"hello").is_ok() && session.read_exact(&mut answer).is_ok() && &answer == b"hello"
}

#[test]
fn a_policy_that_denies_the_session_it_is_applied_from_is_refused() {
    let bed = Bed::new();
    let file = bed.candidate("host.yaml", HOST);
    for family in FAMILIES {
        let node: SocketAddr = bed.world.at("node", family, 22);
        let far: IpAddr = bed.world.addr("far", family);
        let mut session =
            palisade_testbed::probe::open(bed.world.ns("far"), Some(far), node, OPEN).expect("session");
        assert!(echoes(&mut session));
        let peer = session.local_addr().expect("address");
        let connection = format!("{} {} {} {}", peer.ip(), peer.port(), node.ip(), node.port());
        let run = |args: &[&str]| {
            let mut command = bed.daemon.command(args);
            output(command.env("SSH_CONNECTION", &connection), LONG).expect("command")
        };
        let refused = run(&["policy", "apply", &file, "--yes"]);
        let said = text(&refused);
        assert_eq!(refused.status.code(), Some(1), "{said}");
        assert!(
            said.contains("DENY YOUR OWN SESSION") && said.contains("--force"),
            "{said}"
        );
        assert!(
            said.contains("It would CUT") && said.contains(&peer.to_string()),
            "{said}"
        );
        assert!(echoes(&mut session), "{family:?}");
        // The variable of a parent process counts too, as under sudo.
        let mut shell = bed.daemon.command(&["policy", "apply", &file, "--yes"]);
        let (program, args) = (
            shell.get_program().to_owned(),
            shell.get_args().map(ToOwned::to_owned).collect::<Vec<_>>(),
        );
        shell = bed.world.topology.node.command("sh");
        shell
            .args(["-c", "env -u SSH_CONNECTION \"$@\"; exit $?", "sh"])
            .arg(program)
            .args(args);
        let refused = output(shell.env("SSH_CONNECTION", &connection), LONG).expect("command");
        assert!(
            text(&refused).contains("DENY YOUR OWN SESSION"),
            "{}",
            text(&refused)
        );

        // A policy that allows the session is applied, and the session goes on.
        let allowing = bed.candidate("ok.yaml", &HOST.replace("'8080'", "'22'"));
        let applied = run(&["policy", "apply", &allowing, "--yes"]);
        assert!(applied.status.success(), "{}", text(&applied));
        assert!(echoes(&mut session), "{family:?}");
        fs::remove_file(bed.daemon.policies().join("ok.yaml")).expect("remove");
        bed.daemon.settle().expect("settle");
    }
    // With --force it is applied, cuts the session, and is rolled back: the session goes on.
    let node = bed.world.at("node", Family::V4, 22);
    let mut session = palisade_testbed::probe::open(bed.world.ns("far"), None, node, OPEN).expect("session");
    let peer = session.local_addr().expect("address");
    let connection = format!("{} {} {} {}", peer.ip(), peer.port(), node.ip(), node.port());
    let mut command = bed
        .daemon
        .command(&["policy", "apply", &file, "--force", "--confirm", "3s"]);
    let applied = output(command.env("SSH_CONNECTION", &connection), LONG).expect("command");
    assert!(applied.status.success(), "{}", text(&applied));
    bed.rolled_back();
    assert!(echoes(&mut session));
}

#[test]
fn a_cancellation_that_denies_the_session_it_is_ordered_from_is_refused() {
    let bed = Bed::new();
    bed.daemon.write("host.yaml", HOST).expect("write");
    bed.daemon.settle().expect("settle");
    let allowing = bed.candidate("host.yaml", &HOST.replace("'8080'", "'22'"));
    for family in FAMILIES {
        bed.apply(&[&allowing, "--yes", "--confirm", "1h"]);
        let node = bed.world.at("node", family, 22);
        let mut session =
            palisade_testbed::probe::open(bed.world.ns("far"), None, node, OPEN).expect("session");
        assert!(echoes(&mut session));
        let peer = session.local_addr().expect("address");
        let cancel = |args: &[&str], port: u16| {
            let connection = format!("{} {port} {} {}", peer.ip(), node.ip(), node.port());
            let mut command = bed.daemon.command(&[&["policy", "cancel"], args].concat());
            output(command.env("SSH_CONNECTION", connection), LONG).expect("command")
        };
        let refused = cancel(&[], peer.port());
        let said = text(&refused);
        assert_eq!(refused.status.code(), Some(1), "{said}");
        assert!(
            said.contains("deny your own session") && said.contains(&peer.to_string()),
            "{said}"
        );
        assert!(echoes(&mut session), "{family:?}");
        match family {
            // The variable is that of a connection that has ended, as in tmux; the rollback is made.
            Family::V4 => {
                drop(session);
                let is_made = || cancel(&[], peer.port()).status.success();
                wait_until("the rollback is made", LONG, is_made).expect("cancel");
            }
            Family::V6 => {
                let made = cancel(&["--force"], peer.port());
                assert!(made.status.success(), "{}", text(&made));
            }
        }
        bed.rolled_back();
        assert_eq!(bed.folder("host.yaml"), HOST);
    }
    // No session can answer at the deadline, so the rollback is made although it denies the session.
    bed.apply(&[&allowing, "--yes", "--confirm", "3s"]);
    bed.rolled_back();
    assert_eq!(bed.folder("host.yaml"), HOST);
}

#[test]
fn a_configuration_that_denies_the_session_it_is_reloaded_from_is_refused() {
    let world = world();
    let audit = Settings {
        audit: true,
        ..Settings::default()
    };
    let daemon = world.daemon(audit, &[("host.yaml", HOST)]).expect("daemon");
    let bed = Bed { world, daemon };
    let with = |audit: bool, inbound: &str| {
        let mut settings = with_peers(Settings {
            audit,
            ..Settings::default()
        });
        let failsafe = format!("\n[failsafe]\ninbound = [{inbound}]\noutbound = []\n");
        settings.tables.push_str(&failsafe);
        bed.daemon
            .configure(&bed.world.topology, &settings)
            .expect("configuration");
    };
    for family in FAMILIES {
        with(true, "");
        bed.daemon.cli(&["reload"]).expect("reload");
        let node: SocketAddr = bed.world.at("node", family, 22);
        let mut session =
            palisade_testbed::probe::open(bed.world.ns("far"), None, node, OPEN).expect("session");
        let peer = session.local_addr().expect("address");
        let connection = format!("{} {} {} {}", peer.ip(), peer.port(), node.ip(), node.port());
        let reload = |args: &[&str]| {
            let mut command = bed.daemon.command(&[&["reload"], args].concat());
            output(command.env("SSH_CONNECTION", &connection), LONG).expect("command")
        };
        let refused = |what: &str| {
            let refused = reload(&[]);
            let said = text(&refused);
            assert_eq!(refused.status.code(), Some(1), "{what}: {said}");
            assert!(
                said.contains("DENY YOUR OWN SESSION")
                    && said.contains(&format!("{peer} -> {node} ("))
                    && said.contains("--force"),
                "{what}: {said}"
            );
        };
        // Enforcement begins: the policy accepts port 8080 only.
        with(false, "");
        refused("without audit");
        assert!(echoes(&mut session), "{family:?}");
        let status = bed.daemon.status().expect("status");
        assert_eq!(status["audit"], true);
        assert!(
            status["warnings"].to_string().contains("DENY YOUR OWN SESSION"),
            "{status:#}"
        );
        // A failsafe port allows the session.
        with(false, "\"tcp/22\"");
        let reloaded = reload(&[]);
        assert!(reloaded.status.success(), "{}", text(&reloaded));
        assert!(echoes(&mut session), "{family:?}");
        let status = bed.daemon.status().expect("status");
        assert!(
            !status["warnings"].to_string().contains("DENY YOUR OWN SESSION"),
            "{status:#}"
        );
        // Without it, and with one for other peers only.
        for narrow in ["", "\"tcp/22 from 192.0.2.254,2001:db8:ffff::1\""] {
            with(false, narrow);
            refused("a narrower failsafe port");
            assert!(echoes(&mut session), "{family:?}");
        }
        with(false, "");
        let forced = reload(&["--force"]);
        assert!(forced.status.success(), "{}", text(&forced));
        assert_eq!(
            palisade_testbed::probe::connect(bed.world.ns("far"), node, CLOSED),
            palisade_testbed::Outcome::TimedOut
        );
        // The session is denied already, which a further reload does not change.
        let again = reload(&[]);
        assert!(again.status.success(), "{}", text(&again));
    }
}

#[test]
fn a_reload_is_refused_if_it_guards_the_interface_of_the_session_and_not_if_another_one() {
    let world = world();
    for name in ["other8", "other9"] {
        let node = &world.topology.node;
        node.ip(&format!("link add {name} type veth peer name p{name}"))
            .expect("veth");
        node.ip(&format!("link set {name} up")).expect("up");
    }
    let settings = |nic: bool, others: &[&str]| {
        let mut settings = Settings {
            nic,
            ..Settings::default()
        };
        settings.tables += "\n[failsafe]\ninbound = []\noutbound = []\n";
        for name in others {
            settings.tables += &format!("\n[[interface]]\nname = \"{name}\"\nrole = \"host\"\n");
        }
        settings
    };
    // The policy denies port 22, and the NIC has no programs.
    let daemon = world
        .daemon(settings(false, &["other9"]), &[("host.yaml", HOST)])
        .expect("daemon");
    let bed = Bed { world, daemon };
    let configure = |nic: bool, others: &[&str]| {
        let settings = with_peers(settings(nic, others));
        let configured = bed.daemon.configure(&bed.world.topology, &settings);
        configured.expect("configuration");
    };
    for family in FAMILIES {
        configure(false, &["other9"]);
        bed.daemon.cli(&["reload"]).expect("reload");
        let node: SocketAddr = bed.world.at("node", family, 22);
        let mut session =
            palisade_testbed::probe::open(bed.world.ns("far"), None, node, OPEN).expect("session");
        assert!(echoes(&mut session), "{family:?}");
        let peer = session.local_addr().expect("address");
        let connection = format!("{} {} {} {}", peer.ip(), peer.port(), node.ip(), node.port());
        let reload = || {
            let mut command = bed.daemon.command(&["reload"]);
            output(command.env("SSH_CONNECTION", &connection), LONG).expect("command")
        };
        for others in [&["other9", "other8"][..], &["other8"], &["other8", "other9"]] {
            configure(false, others);
            let reloaded = reload();
            assert!(
                reloaded.status.success(),
                "{family:?} {others:?}: {}",
                text(&reloaded)
            );
            assert!(echoes(&mut session), "{family:?}");
        }
        configure(true, &["other9"]);
        let refused = reload();
        assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
        let said = text(&refused);
        assert!(
            said.contains(&format!("DENY YOUR OWN SESSION {peer} -> {node} (")),
            "{said}"
        );
        assert!(echoes(&mut session), "{family:?}");
    }
}

#[test]
fn the_end_of_audit_mode_that_denies_the_session_it_is_ordered_from_is_refused() {
    let bed = Bed::new();
    let node = bed.daemon.json(&["endpoint", "list"]).expect("endpoints");
    let node = node.as_array().expect("rows").iter();
    let node = node
        .clone()
        .find(|row| row["labels"].to_string().contains("reserved:host"));
    let id = node.expect("node")["id"].to_string();
    for family in FAMILIES {
        bed.run(&["endpoint", "config", &id, "PolicyAuditMode=Enabled"]);
        let file = bed.candidate("host.yaml", HOST);
        bed.apply(&[&file, "--yes"]);
        let at: SocketAddr = bed.world.at("node", family, 22);
        let mut session =
            palisade_testbed::probe::open(bed.world.ns("far"), None, at, OPEN).expect("session");
        let peer = session.local_addr().expect("address");
        let connection = format!("{} {} {} {}", peer.ip(), peer.port(), at.ip(), at.port());
        let end = |args: &[&str]| {
            let all = [&["endpoint", "config", &id, "PolicyAuditMode=Disabled"], args].concat();
            let mut command = bed.daemon.command(&all);
            output(command.env("SSH_CONNECTION", &connection), LONG).expect("command")
        };
        let refused = end(&[]);
        let said = text(&refused);
        assert!(!refused.status.success(), "{said}");
        assert!(
            said.contains(&format!("DENY YOUR OWN SESSION {peer} -> {at} (")) && said.contains("--force"),
            "{said}"
        );
        assert!(echoes(&mut session), "{family:?}");
        let forced = end(&["--force"]);
        assert!(forced.status.success(), "{}", text(&forced));
        assert_eq!(
            palisade_testbed::probe::connect(bed.world.ns("far"), at, CLOSED),
            palisade_testbed::Outcome::TimedOut
        );
        fs::remove_file(bed.daemon.policies().join("host.yaml")).expect("remove");
        bed.daemon.settle().expect("settle");
    }
}

#[test]
fn what_both_sets_deny_never_passes_while_they_are_switched() {
    let bed = Bed::new();
    let leaks: Vec<Leak> = FAMILIES
        .into_iter()
        .map(|family| {
            let back = bed.world.topology.get("back");
            Leak::start(
                bed.world.ns("pfront"),
                bed.world.addr("pfront", family),
                (&back.ns, INNER),
                bed.world.at("back", family, 81),
                Duration::from_millis(1),
            )
            .expect("leak")
        })
        .collect();
    let file = bed.candidate("back.yaml", &from_db());
    for round in 0..6 {
        bed.apply(&[&file, "--yes", "--confirm", "1h"]);
        leaks
            .iter()
            .for_each(|leak| leak.keep_trying(20, LONG).expect("attempts"));
        if round % 2 == 0 {
            bed.daemon.cli(&["policy", "cancel"]).expect("cancel");
        } else {
            bed.daemon.cli(&["policy", "confirm"]).expect("confirm");
            bed.daemon
                .cli(&["policy", "rollback", "1", "--yes"])
                .expect("rollback");
        }
        leaks
            .iter()
            .for_each(|leak| leak.keep_trying(20, LONG).expect("attempts"));
    }
    bed.world.expect(&bed.daemon, ONLY_FRONT);
    for leak in leaks {
        let report = leak.finish();
        assert_eq!(report.leaked, 0, "{report:?}");
        assert!(report.tried >= 400, "{report:?}");
    }
}

#[test]
fn a_full_disk_refuses_changes_and_never_stops_enforcement() {
    let world = world();
    let mut daemon = Daemon::prepare(
        &world.topology,
        &with_peers(Settings::default()),
        &[("back.yaml", FROM_FRONT)],
    )
    .expect("daemon");
    let state = daemon.policies().with_file_name("state");
    fs::create_dir(&state).expect("state");
    // The state directory is a small file system that another file fills.
    let script = format!(
        "mount -t tmpfs -o size=1m,mode=0700 none {0} && exec \"$@\"",
        state.display()
    );
    let command = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        &script,
        "sh",
    ];
    daemon.start_through(command.map(str::to_owned).to_vec());
    daemon.spawn().expect("spawn");
    daemon.wait().expect("ready");
    let inside = format!("/proc/{}/root{}", daemon.pid().expect("pid"), state.display());
    wait_until("the first set is recorded", LONG, || {
        Path::new(&inside).join("policy-history/index.json").exists()
    })
    .expect("history");
    let mut filler = fs::File::create(format!("{inside}/filler")).expect("filler");
    while filler.write_all(&[0; 4_096]).is_ok() {}

    let bed = Bed { world, daemon };
    let file = bed.candidate("back.yaml", &from_db());
    let refused = bed.run(&["policy", "apply", &file, "--yes", "--confirm", "1h"]);
    assert!(
        text(&refused).contains("nothing was changed"),
        "{}",
        text(&refused)
    );
    assert_eq!(bed.folder("back.yaml"), FROM_FRONT);
    bed.world.expect(&bed.daemon, ONLY_FRONT);
    // Files that are changed directly are enforced all the same.
    bed.daemon.write("back.yaml", &from_db()).expect("write");
    bed.daemon
        .wait_status("the problem is named", |status| {
            status["warnings"]
                .to_string()
                .contains("history of the policies cannot be written")
        })
        .expect("status");
    bed.world.expect(&bed.daemon, ONLY_DB);
    // The space is free once no descriptor refers to the file.
    drop(filler);
    fs::remove_file(format!("{inside}/filler")).expect("remove");
    bed.daemon
        .wait_status("the history is written", |status| {
            !status["warnings"].to_string().contains("history of the policies")
        })
        .expect("status");
    bed.daemon
        .cli(&["policy", "rollback", "1", "--yes"])
        .expect("rollback");
    bed.world.expect(&bed.daemon, ONLY_FRONT);
}
