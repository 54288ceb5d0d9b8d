//! The flow exporter: files that other programs read, restarts, and disks that are full.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use palisade_testbed::{
    Daemon,
    daemon::Settings,
    ns::wait_until,
    process::{Process, output},
};
use palisade_tests::{
    World,
    fixtures::back::{FROM_FRONT, ONLY_FRONT},
    with_peers, world,
};
use serde_json::Value;

const TIMEOUT: Duration = Duration::from_secs(60);

/// Returns a daemon, not started yet, whose export has further options.
fn prepared(world: &World, file: &Path, options: &str) -> Daemon {
    let tables = format!("[[export]]\nname = \"flows\"\nfile = {file:?}\n{options}\n");
    let settings = Settings {
        tables,
        ..Settings::default()
    };
    let policies = [("front.yaml", FROM_FRONT)];
    Daemon::prepare(&world.topology, &with_peers(settings), &policies).expect("a daemon")
}

fn boot(daemon: &mut Daemon) {
    daemon.spawn().expect("spawn");
    daemon
        .wait()
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.log()));
}

fn lines(file: &Path) -> Vec<Value> {
    fs::read_to_string(file)
        .unwrap_or_default()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

/// Waits for the state of the export in the daemon's status.
fn wait_state(daemon: &Daemon, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let status = daemon
        .wait_status(what, |status| wanted(&status["exports"][0]))
        .unwrap_or_else(|error| panic!("{error:#}"));
    status["exports"][0].clone()
}

fn is_drop_of_db(line: &Value) -> bool {
    line["flow"]["verdict"] == "DROPPED" && line["flow"]["source"]["pod_name"] == "db"
}

#[test]
fn flows_are_exported_across_restarts_and_reloads_for_other_programs() {
    let world = world();
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("flows.log");
    let mut daemon = prepared(&world, &file, "");
    boot(&mut daemon);
    world.expect(&daemon, ONLY_FRONT);
    wait_until("the denied flow is in the file", TIMEOUT, || {
        lines(&file).iter().any(is_drop_of_db)
    })
    .expect("export");
    let mode = fs::metadata(&file).expect("file").permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let first = lines(&file);
    for line in &first {
        assert_eq!(line["node_name"], "node1", "{line:#}");
        assert_eq!(line["time"], line["flow"]["time"], "{line:#}");
    }
    // jq reads every line of both address families.
    let mut jq = Command::new("jq");
    jq.args(["-r", "select(.flow.verdict == \"DROPPED\") | .flow.IP.ipVersion"])
        .arg(&file);
    let read = output(&mut jq, TIMEOUT).expect("jq");
    let read = String::from_utf8_lossy(&read.stdout).into_owned();
    assert!(read.contains("IPv4\n") && read.contains("IPv6\n"), "{read}");

    // A restart appends.
    daemon.terminate().expect("end");
    let before = lines(&file).len();
    assert!(before >= first.len());
    // Read back, the file gives the same lines, and its filters choose among them.
    let path = file.display().to_string();
    let all = daemon.cli(&["observe", "--input-file", &path, "-o", "json"]);
    assert_eq!(
        all.expect("observe"),
        fs::read_to_string(&file).expect("the file")
    );
    let dropped = daemon.cli(&[
        "observe",
        "--input-file",
        &path,
        "-o",
        "json",
        "--verdict",
        "dropped",
    ]);
    let dropped = dropped.expect("observe");
    let wanted = |line: &&Value| line["flow"]["verdict"] == "DROPPED";
    assert_eq!(
        dropped.lines().count(),
        lines(&file).iter().filter(wanted).count(),
        "{dropped}"
    );
    boot(&mut daemon);
    world.expect(&daemon, ONLY_FRONT);
    wait_until("more flows", TIMEOUT, || {
        lines(&file)[before..].iter().any(is_drop_of_db)
    })
    .expect("export");
    assert_eq!(lines(&file)[..first.len()], first);
    let state = wait_state(&daemon, "lines are counted", |export| export["written"] != 0);
    assert_eq!(
        (&state["state"], &state["lost"]),
        (&"running".into(), &0.into()),
        "{state:#}"
    );
    let text = daemon.cli(&["status"]).expect("status");
    assert!(
        text.contains("Flow exports") && text.contains("flows.log"),
        "{text}"
    );

    // A reload changes the fields without a restart; an error leaves everything as it was.
    let config = fs::read_to_string(daemon.config()).expect("configuration");
    let with = |options: &str| {
        let text = config.replace("name = \"flows\"\n", &format!("name = \"flows\"\n{options}\n"));
        fs::write(daemon.config(), text).expect("configuration");
    };
    with("field_mask = [\"verdit\"]");
    let refused = daemon.try_cli(&["reload"]).expect("reload");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && said.contains("a flow has no field 'verdit'") && said.contains(".toml:"),
        "{said}"
    );
    with("field_mask = [\"verdict\", \"destination.pod_name\"]");
    daemon.cli(&["reload"]).expect("reload");
    let before = lines(&file).len();
    world.expect(&daemon, ONLY_FRONT);
    wait_until("flows with two fields", TIMEOUT, || {
        lines(&file)[before..].iter().any(|line| {
            let fields = line["flow"].as_object().map_or(0, serde_json::Map::len);
            fields == 2 && line["flow"]["destination"]["pod_name"] == "back"
        })
    })
    .expect("export");
}

/// A private mount namespace.
struct Mounts(Process);

impl Mounts {
    fn new(dir: &Path, script: &str) -> Self {
        let mut command = Command::new("unshare");
        let ready = dir.join("mounted");
        command
            .args(["-m", "sh", "-ec"])
            .arg(format!("{script}\ntouch {}\nexec sleep 600", ready.display()));
        let process = Process::spawn("mounts", command, dir).expect("unshare");
        wait_until("the mounts are there", TIMEOUT, || ready.exists()).expect("mounts");
        Self(process)
    }

    fn enter(&self) -> Vec<String> {
        ["nsenter", &format!("--mount=/proc/{}/ns/mnt", self.0.pid()), "--"]
            .map(str::to_owned)
            .to_vec()
    }

    fn run(&self, script: &str) -> Output {
        let enter = self.enter();
        let mut command = Command::new(&enter[0]);
        command.args(&enter[1..]).args(["sh", "-c", script]);
        output(&mut command, TIMEOUT).expect("nsenter")
    }

    /// Returns the file with this path in the namespace.
    fn path(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.0.pid()));
        root.join(path.strip_prefix("/").expect("absolute"))
    }
}

#[test]
fn a_full_disk_stops_only_the_export_which_goes_on_when_there_is_space() {
    let world = world();
    let dir = tempfile::tempdir().expect("directory");
    let disk = dir.path().join("disk");
    fs::create_dir(&disk).expect("directory");
    let shown = disk.display().to_string();
    let mounts = Mounts::new(
        dir.path(),
        &format!("mount -t tmpfs -o size=1m,mode=700 none {shown}"),
    );
    let file = disk.join("flows.log");
    let mut daemon = prepared(&world, &file, "");
    daemon.start_through(mounts.enter());
    boot(&mut daemon);
    world.expect(&daemon, ONLY_FRONT);
    wait_state(&daemon, "lines are written", |export| export["written"] != 0);
    let full = mounts.run(&format!(
        "dd if=/dev/zero of={shown}/filler bs=4k 2>/dev/null; test $(df --output=avail {shown} | tail -1) = 0"
    ));
    assert!(full.status.success(), "{full:?}");
    // What is left in the last page of the file is used first.
    let mut rounds = 0;
    wait_until("the export fails", TIMEOUT, || {
        world.expect(&daemon, ONLY_FRONT);
        rounds += 1;
        let status = daemon.status().expect("status");
        status["exports"][0]["state"] == "failing"
    })
    .expect("a failing export");
    let status = daemon.status().expect("status");
    let warnings = status["warnings"].to_string();
    assert!(
        warnings.contains("export flows: ") && warnings.contains("No space left"),
        "{status:#}"
    );
    // Policies are enforced, and flows observed, as before.
    world.expect(&daemon, ONLY_FRONT);
    assert!(!daemon.flows(&["--last", "1"]).expect("observe").is_empty());
    // The file has only whole lines at any time.
    lines(&mounts.path(&file));

    mounts.run(&format!("rm {shown}/filler"));
    let state = wait_state(&daemon, "the export is written again", |export| {
        export["state"] == "running"
    });
    assert_eq!(state["lost"], 0, "{state:#}");
    assert!(state["failed_writes"].as_u64() > Some(0), "{state:#}");
    let written = lines(&mounts.path(&file));
    let drops = written.iter().filter(|line| is_drop_of_db(line)).count();
    assert!(drops > rounds, "{drops} of {rounds}");
    assert!(
        daemon.log().contains("an export is written again"),
        "{}",
        daemon.log()
    );

    // A directory that was removed is made again.
    let removed = mounts.run(&format!("umount -l {shown} && rmdir {shown}"));
    assert!(removed.status.success(), "{removed:?}");
    world.expect(&daemon, ONLY_FRONT);
    wait_until("a new file", TIMEOUT, || {
        lines(&mounts.path(&file)).iter().any(is_drop_of_db)
    })
    .expect("export");
}
