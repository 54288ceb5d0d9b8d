//! The daemon against hostile users and broken files: directories that another user made first, a second daemon, a full
//! disk, files that a power failure has truncated.

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt as _, chown},
        net::UnixDatagram,
    },
    path::PathBuf,
    process::{Command, Output},
    time::{Duration, Instant},
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

const NOBODY: &str = "front -> back tcp/80 drop\ndb -> back tcp/80 drop";
const EVERYBODY: &str = "front -> back tcp/80 open\ndb -> back tcp/80 open";
/// An unprivileged user.
const USER: u32 = 65_534;
const TIMEOUT: Duration = Duration::from_secs(60);

fn prepared(world: &World, tables: &str, policies: &[(&str, &str)]) -> Daemon {
    let settings = Settings {
        tables: tables.to_owned(),
        ..Settings::default()
    };
    Daemon::prepare(&world.topology, &with_peers(settings), policies).expect("a daemon")
}

fn beside(daemon: &Daemon, name: &str) -> PathBuf {
    daemon.config().with_file_name(name)
}

fn change_config(daemon: &Daemon, from: &str, to: &str) {
    let text = fs::read_to_string(daemon.config()).expect("configuration");
    assert!(text.contains(from), "{from} is not in {text}");
    fs::write(daemon.config(), text.replacen(from, to, 1)).expect("configuration");
}

/// Adds a line to the table `[node]`.
fn set_node(daemon: &Daemon, line: &str) {
    change_config(daemon, "[node]\n", &format!("[node]\n{line}\n"));
}

/// Returns the error of a daemon that does not start.
fn refusal(daemon: &mut Daemon) -> String {
    daemon.spawn().expect("spawn");
    let error = daemon.wait().expect_err("it has started");
    format!("{error:#}")
}

/// Starts the daemon as after a boot: nothing is pinned.
fn boot(daemon: &mut Daemon) {
    daemon.spawn().expect("spawn");
    daemon
        .wait()
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.log()));
}

fn lines(status: &Value, list: &str) -> String {
    let lines = status[list].as_array().into_iter().flatten();
    lines.filter_map(Value::as_str).collect::<Vec<_>>().join("\n")
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// A mount namespace that lives as long as this process.
struct Mounts(Process);

impl Mounts {
    /// Creates the namespace; `script` mounts file systems in it.
    fn new(daemon: &Daemon, script: &str) -> Self {
        let mut command = Command::new("unshare");
        let ready = beside(daemon, "mounted");
        command
            .args(["-m", "sh", "-ec"])
            .arg(format!("{script}\ntouch {}\nexec sleep 600", ready.display()));
        let process = Process::spawn("mounts", command, &beside(daemon, "")).expect("unshare");
        let mounts = Self(process);
        wait_until("the mounts are there", TIMEOUT, || ready.exists())
            .unwrap_or_else(|error| panic!("{error:#}\n{}", mounts.0.log()));
        mounts
    }

    fn enter(&self) -> Vec<String> {
        ["nsenter", &format!("--mount=/proc/{}/ns/mnt", self.0.pid()), "--"]
            .map(str::to_owned)
            .to_vec()
    }

    fn run(&self, script: &str) -> Output {
        let [nsenter, mount, rest] = self.enter().try_into().expect("three");
        let mut command = Command::new(nsenter);
        command.args([mount.as_str(), &rest, "sh", "-c", script]);
        output(&mut command, TIMEOUT).expect("nsenter")
    }
}

/// Returns a script that runs as the unprivileged user.
fn as_user(script: &str) -> String {
    format!("setpriv --reuid={USER} --regid={USER} --clear-groups sh -c '{script}'")
}

#[test]
fn a_pin_directory_that_an_unprivileged_user_made_first_is_refused() {
    let world = world();
    let mut daemon = prepared(&world, "", &[("front.yaml", FROM_FRONT)]);
    let pins = daemon.pins().display().to_string();
    for (made, says) in [
        (as_user(&format!("mkdir {pins}")), pins.clone()),
        // A directory of root in which the unprivileged user created a directory before root restricted it.
        (
            format!(
                "mkdir -m 1777 {pins}\n{}",
                as_user(&format!("mkdir -m 777 {pins}/links"))
            ),
            format!("{pins}/links"),
        ),
    ] {
        let mounts = Mounts::new(
            &daemon,
            &format!("mount -t bpf -o mode=1777 bpf /sys/fs/bpf\n{made}"),
        );
        daemon.start_through(mounts.enter());
        let refusal = refusal(&mut daemon);
        assert!(
            refusal.contains(&format!("{says} belongs to user {USER}")) && refusal.contains("pin_dir"),
            "{refusal}"
        );
        fs::remove_file(beside(&daemon, "mounted")).expect("mark");
    }
    // A directory that is world-writable without the sticky bit lets any user replace the entries in it.
    let mounts = Mounts::new(&daemon, "mount -t bpf bpf /sys/fs/bpf\nchmod 0777 /sys/fs/bpf");
    daemon.start_through(mounts.enter());
    let refusal = refusal(&mut daemon);
    assert!(
        refusal.contains("/sys/fs/bpf can be written by other users"),
        "{refusal}"
    );
}

#[test]
fn an_unprivileged_user_cannot_unpin_programs_on_a_world_writable_bpffs() {
    let world = world();
    let mut daemon = prepared(&world, "", &[("front.yaml", FROM_FRONT)]);
    let mounts = Mounts::new(&daemon, "mount -t bpf -o mode=1777 bpf /sys/fs/bpf");
    daemon.start_through(mounts.enter());
    boot(&mut daemon);
    world.expect(&daemon, ONLY_FRONT);
    let pins = daemon.pins().display();
    for attempt in [
        format!("ls {pins}"),
        format!("rm -rf {pins}; test ! -e {pins}"),
        format!("mv {pins} {pins}-away"),
        format!("mkdir {pins}/x"),
    ] {
        let done = mounts.run(&as_user(&attempt));
        assert!(!done.status.success(), "{attempt}: {}", text(&done));
    }
    let modes = mounts.run(&format!("find {pins} -type d ! -perm 700 -o ! -uid 0"));
    assert_eq!(text(&modes), "");
    world.expect(&daemon, ONLY_FRONT);
    daemon.kill9().expect("kill");
    boot(&mut daemon);
    world.expect(&daemon, ONLY_FRONT);
}

#[test]
fn a_state_directory_or_socket_directory_that_another_user_can_change_is_refused() {
    let world = world();
    let mut daemon = prepared(&world, "", &[]);
    let state = beside(&daemon, "state");
    fs::create_dir(&state).expect("state");
    chown(&state, Some(USER), None).expect("chown");
    let said = refusal(&mut daemon);
    assert!(
        said.contains("state_dir") && said.contains(&format!("user {USER}")),
        "{said}"
    );
    chown(&state, Some(0), None).expect("chown");
    // A symbolic link of another user, as it can be made in /tmp.
    fs::remove_dir(&state).expect("state");
    std::os::unix::fs::symlink("/var", &state).expect("link");
    std::os::unix::fs::lchown(&state, Some(USER), None).expect("chown");
    let said = refusal(&mut daemon);
    assert!(said.contains("a link of user"), "{said}");
    fs::remove_file(&state).expect("state");

    let open = beside(&daemon, "open");
    fs::create_dir(&open).expect("directory");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).expect("chmod");
    let socket = daemon.socket();
    change_config(
        &daemon,
        &format!("{socket:?}"),
        &format!("{:?}", open.join("palisade.sock")),
    );
    let said = refusal(&mut daemon);
    assert!(
        said.contains("socket") && said.contains("can be written by other users"),
        "{said}"
    );
}

#[test]
fn a_second_daemon_takes_neither_the_socket_nor_the_pins_of_the_first() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("front.yaml", FROM_FRONT)])
        .expect("daemon");
    for shared in ["socket", "pin_dir"] {
        let mut second = prepared(&world, "[worker]\ninterface = \"second\"\n", &[]);
        let (its, ours) = if shared == "socket" {
            (second.socket(), daemon.socket())
        } else {
            (second.pins().to_owned(), daemon.pins().to_owned())
        };
        change_config(&second, &format!("{its:?}"), &format!("{ours:?}"));
        let said = refusal(&mut second);
        assert!(
            said.contains("another palisade daemon") && said.contains(&format!("[node] {shared}")),
            "{said}"
        );
        // A command that detaches without a daemon refuses it as well.
        if shared == "pin_dir" {
            let detach = second.try_cli(&["stop", "--detach"]).expect("stop");
            assert!(
                !detach.status.success() && text(&detach).contains("another palisade daemon"),
                "{}",
                text(&detach)
            );
        }
        daemon.status().expect("the first daemon answers");
        world.expect(&daemon, ONLY_FRONT);
    }
    let lock = format!("{}.lock", daemon.socket().display());
    assert!(fs::metadata(lock).is_ok());
}

/// Mounts a state directory on a file system of its own, which can be filled.
fn small_disk(daemon: &Daemon) -> (Mounts, String) {
    let state = beside(daemon, "state");
    fs::create_dir_all(&state).expect("state");
    let state = state.display().to_string();
    let mounts = Mounts::new(
        daemon,
        &format!("mount -t tmpfs -o size=1m,mode=700 none {state}"),
    );
    (mounts, state)
}

fn fill(state: &str) -> String {
    format!(
        "dd if=/dev/zero of={state}/filler bs=4k 2>/dev/null; test $(df --output=avail {state} | tail -1) = 0"
    )
}

#[test]
fn a_setting_that_cannot_be_saved_fails_and_is_saved_once_the_disk_has_space() {
    let world = world();
    let mut daemon = prepared(&world, "", &[("front.yaml", FROM_FRONT)]);
    let (mounts, state) = small_disk(&daemon);
    daemon.start_through(mounts.enter());
    boot(&mut daemon);
    daemon
        .wait_status("everything is kept", |status| {
            lines(status, "warnings").is_empty()
                && mounts
                    .run(&format!(
                        "cd {state} && test -e config.kept && test -e state.json"
                    ))
                    .status
                    .success()
        })
        .expect("status");
    let full = mounts.run(&fill(&state));
    assert!(full.status.success(), "{}", text(&full));
    let set = daemon
        .try_cli(&["endpoint", "config", "default/back", "PolicyAuditMode=Enabled"])
        .expect("endpoint config");
    assert!(!set.status.success(), "{}", text(&set));
    let said = text(&set);
    assert!(
        said.contains("state.json") && said.contains("No space left") && said.contains("NOT KEPT"),
        "{said}"
    );
    let status = daemon.status().expect("status");
    assert!(lines(&status, "warnings").contains("NOT KEPT"), "{status:#}");
    assert!(daemon.log().contains("NOT KEPT"), "{}", daemon.log());
    // The previous content is complete.
    let whole = mounts.run(&format!("head -c 17 {state}/state.json; ls -A {state}"));
    assert!(text(&whole).starts_with("# kept by palisad"), "{}", text(&whole));

    mounts.run(&format!("rm {state}/filler"));
    daemon
        .wait_status("it is written", |status| {
            !lines(status, "warnings").contains("NOT KEPT")
        })
        .expect("status");
    daemon.kill9().expect("kill");
    boot(&mut daemon);
    let back = daemon
        .json(&["endpoint", "get", "default/back"])
        .expect("endpoint");
    assert_eq!(back["options"]["PolicyAuditMode"], true, "{back:#}");
}

#[test]
fn a_full_or_read_only_state_directory_does_not_leave_a_booting_node_open() {
    let world = world();
    let mut daemon = prepared(&world, "", &[("front.yaml", FROM_FRONT)]);
    let (mounts, state) = small_disk(&daemon);
    daemon.start_through(mounts.enter());
    for (trouble, what) in [
        (fill(&state), "No space left"),
        (format!("mount -o remount,ro {state}"), "Read-only file system"),
    ] {
        let done = mounts.run(&trouble);
        assert!(done.status.success(), "{}", text(&done));
        boot(&mut daemon);
        world.expect(&daemon, ONLY_FRONT);
        let status = daemon
            .wait_status("status reports it", |status| {
                lines(status, "warnings").contains(what)
            })
            .expect("status");
        for file in ["state.json", "names.journal"] {
            let path = format!("{state}/{file}: {what}");
            assert!(lines(&status, "warnings").contains(&path), "{path}: {status:#}");
        }
        daemon.detach().expect("detach");
    }
}

#[test]
fn a_broken_configuration_at_boot_leaves_the_last_good_one_in_force() {
    let world = world();
    let mut daemon = prepared(&world, "", &[("front.yaml", FROM_FRONT)]);
    boot(&mut daemon);
    daemon.detach().expect("detach");
    let good = fs::read_to_string(daemon.config()).expect("configuration");
    let line = good
        .lines()
        .position(|line| line == "[[interface]]")
        .expect("a NIC")
        + 1;

    for broken in [
        good.replacen("[[interface]]", "[[interface", 1),
        good.replacen("role =", "roll =", 1),
    ] {
        fs::write(daemon.config(), broken).expect("configuration");
        boot(&mut daemon);
        world.expect(&daemon, ONLY_FRONT);
        let status = daemon.status().expect("status");
        let warnings = lines(&status, "warnings");
        assert!(
            warnings.contains("the configuration is BROKEN") && warnings.contains("palisade.toml:"),
            "{status:#}"
        );
        assert!(daemon.log().contains(&format!("palisade.toml:{line}:")) || warnings.contains("role"));
        daemon.detach().expect("detach");
    }
    // The last good copies of the policies are used too.
    daemon
        .write("front.yaml", "apiVersion: cilium.io/v2\nkind: [\n")
        .expect("policy");
    boot(&mut daemon);
    world.expect(&daemon, ONLY_FRONT);
    // A corrected file needs no restart.
    fs::write(daemon.config(), &good).expect("configuration");
    // The configuration takes effect, and the command reports the policy file that is still broken.
    let reload = daemon.try_cli(&["reload"]).expect("reload");
    let reported = String::from_utf8_lossy(&reload.stderr).into_owned();
    assert_eq!(reload.status.code(), Some(1), "{reported}");
    assert!(reported.contains("front.yaml is broken"), "{reported}");
    let status = daemon.status().expect("status");
    assert!(!lines(&status, "warnings").contains("BROKEN"), "{status:#}");
    world.expect(&daemon, ONLY_FRONT);
    daemon.detach().expect("detach");

    // A truncated copy is not used, and is reported.
    let kept = beside(&daemon, "state/config.kept");
    let whole = fs::read(&kept).expect("copy");
    fs::write(daemon.config(), good.replacen("[[interface]]", "[[interface", 1)).expect("configuration");
    for content in [&whole[..whole.len() - 40], &vec![0; whole.len()], &[]] {
        fs::write(&kept, content).expect("copy");
        let said = refusal(&mut daemon);
        assert!(
            said.contains(&*kept.to_string_lossy())
                && said.contains("truncated")
                && said.contains("EVERYTHING PASSES"),
            "{said}"
        );
    }
    fs::write(&kept, whole).expect("copy");
    boot(&mut daemon);
    world.expect(&daemon, ONLY_FRONT);
}

#[test]
fn without_a_readable_policy_on_failure_opens_or_closes_the_node() {
    let world = world();
    for (setting, reach) in [("", EVERYBODY), ("on_failure = \"closed\"", NOBODY)] {
        let mut daemon = prepared(&world, "", &[]);
        set_node(&daemon, setting);
        let policies = daemon.policies();
        fs::remove_dir(&policies).expect("folder");
        daemon.spawn().expect("spawn");
        let status = daemon
            .wait_status("status reports it", |status| {
                lines(status, "missing").contains("[node] on_failure")
            })
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.log()));
        assert_eq!(status["ready"], false);
        assert!(
            lines(&status, "missing").contains(&*policies.to_string_lossy()),
            "{status:#}"
        );
        world.expect(&daemon, reach);
        fs::create_dir(&policies).expect("folder");
        daemon.write("front.yaml", FROM_FRONT).expect("policy");
        daemon
            .wait_status("the folder is read", |status| status["ready"] == true)
            .expect("status");
        world.expect(&daemon, ONLY_FRONT);
        world.expect(&daemon, "front -> db tcp/80 open");
    }
}

#[test]
fn a_lost_policy_closes_the_node_only_if_configured() {
    let world = world();
    let broken = "apiVersion: cilium.io/v2\nkind: [\n";
    for (setting, reach) in [
        ("", "front -> db tcp/80 open"),
        ("on_failure = \"closed\"", "front -> db tcp/80 drop"),
    ] {
        let mut daemon = prepared(&world, "", &[("front.yaml", FROM_FRONT), ("db.yaml", broken)]);
        set_node(&daemon, setting);
        daemon.spawn().expect("spawn");
        daemon
            .wait_status("status reports it", |status| {
                lines(status, "missing").contains("db.yaml: broken since")
            })
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.log()));
        world.expect(&daemon, reach);
        daemon.apply(&[("front.yaml", FROM_FRONT)]).expect("apply");
        world.expect(&daemon, ONLY_FRONT);
        world.expect(&daemon, "front -> db tcp/80 open");
    }
}

#[test]
fn no_command_waits_for_a_hung_daemon() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("front.yaml", FROM_FRONT)])
        .expect("daemon");
    let pid = daemon.pid().expect("it runs");
    let signal = |signal: &str| {
        let sent = Command::new("kill").args([signal, &pid.to_string()]).status();
        assert!(sent.expect("kill").success());
    };
    let started = Instant::now();
    let mut follower = daemon.command(&["observe", "--follow"]);
    let follower = Process::spawn(
        "follower",
        {
            follower.env("RUST_BACKTRACE", "0");
            follower
        },
        &beside(&daemon, ""),
    );
    let follower = follower.expect("observe");
    std::thread::sleep(Duration::from_secs(1));
    signal("-STOP");
    let commands: [&[&str]; 8] = [
        &["status"],
        &["status", "--wait", "3s"],
        &["observe"],
        &["policy", "get"],
        &["endpoint", "config", "default/back", "PolicyAuditMode=Enabled"],
        &["reload"],
        &["stop"],
        &["stop", "--detach"],
    ];
    std::thread::scope(|scope| {
        for args in commands {
            let mut command = daemon.command(args);
            scope.spawn(move || {
                let begun = Instant::now();
                let done = output(&mut command, TIMEOUT).expect("a command");
                let (took, said) = (begun.elapsed(), text(&done));
                let most = if args.contains(&"3s") { 20 } else { 40 };
                assert!(took < Duration::from_secs(most), "{args:?} took {took:?}: {said}");
                assert_eq!(done.status.code(), Some(3), "{args:?}: {said}");
                assert!(
                    said.contains(&format!("process {pid}")) && said.contains("goes on enforcing"),
                    "{args:?}: {said}"
                );
            });
        }
    });
    wait_until("the follower reports the hang", TIMEOUT, || {
        follower.log().contains("goes on enforcing")
    })
    .unwrap_or_else(|error| panic!("{error}: {}", follower.log()));
    // The kernel connects clients to the stopped daemon; that is no answer.
    assert!(!follower.log().contains("answers again"), "{}", follower.log());
    // The attached programs do not depend on the daemon.
    assert_eq!(world.check(ONLY_FRONT).expect("check"), [""; 0]);
    signal("-CONT");
    let status = daemon.status().expect("it answers again");
    wait_until("the follower continues", TIMEOUT, || {
        follower.log().contains("answers again")
    })
    .unwrap_or_else(|error| panic!("{error}: {}", follower.log()));
    // The commands that timed out had no effect later.
    assert!(status["uptime_seconds"].as_u64() <= Some(started.elapsed().as_secs() + 30));
    let back = daemon
        .json(&["endpoint", "get", "default/back"])
        .expect("endpoint");
    assert_eq!(back["options"]["PolicyAuditMode"], false, "{back:#}");
    world.expect(&daemon, ONLY_FRONT);
}

#[test]
fn the_watchdog_is_notified_unless_the_daemon_hangs() {
    let world = world();
    let mut daemon = prepared(&world, "", &[]);
    let path = beside(&daemon, "notify");
    let socket = UnixDatagram::bind(&path).expect("notify socket");
    socket
        .set_read_timeout(Some(Duration::from_millis(900)))
        .expect("timeout");
    let heard = || {
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).unwrap_or(0);
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    daemon.start_through(
        [
            "env",
            &format!("NOTIFY_SOCKET={}", path.display()),
            "WATCHDOG_USEC=400000",
        ]
        .map(str::to_owned)
        .to_vec(),
    );
    boot(&mut daemon);
    wait_until("it is ready", TIMEOUT, || heard().contains("READY=1")).expect("READY=1");
    let mut fed = 0;
    for _ in 0..20 {
        fed += u32::from(heard().contains("WATCHDOG=1"));
    }
    assert!(fed > 10, "{fed}");
    let pid = daemon.pid().expect("it runs").to_string();
    let signal = |signal: &str| Command::new("kill").args([signal, &pid]).status().expect("kill");
    signal("-STOP");
    while !heard().is_empty() {}
    assert_eq!(heard(), "");
    signal("-CONT");
    wait_until("it is fed again", TIMEOUT, || heard().contains("WATCHDOG=1")).expect("WATCHDOG=1");
}

#[test]
fn stop_detach_does_not_remove_another_users_files_in_place_of_pins() {
    let world = world();
    let daemon = prepared(&world, "", &[]);
    let precious = beside(&daemon, "precious");
    fs::create_dir(&precious).expect("directory");
    fs::write(precious.join("file"), "x").expect("file");
    let pins = daemon.pins().display();
    let mounts = Mounts::new(
        &daemon,
        &format!(
            "mount -t bpf -o mode=1777 bpf /sys/fs/bpf\n{}",
            as_user(&format!("mkdir {pins} && ln -s {} {pins}/v1", precious.display()))
        ),
    );
    let program = daemon.command(&[]).get_program().to_owned();
    let done = mounts.run(&format!(
        "{} stop --detach --config {}",
        program.display(),
        daemon.config().display()
    ));
    assert!(
        !done.status.success() && text(&done).contains(&format!("belongs to user {USER}")),
        "{}",
        text(&done)
    );
    assert!(precious.join("file").exists());
}

#[test]
fn commands_of_root_refuse_a_socket_of_another_user() {
    let world = world();
    let daemon = prepared(&world, "", &[]);
    let dir = beside(&daemon, "run");
    fs::create_dir(&dir).expect("directory");
    chown(&dir, Some(USER), None).expect("chown");
    let parent = beside(&daemon, "");
    fs::set_permissions(&parent, fs::Permissions::from_mode(0o755)).expect("chmod");
    let path = dir.join("palisade.sock");
    let mut listener = Command::new("setpriv");
    // perl is part of every Debian system and readable for every user.
    listener
        .arg(format!("--reuid={USER}"))
        .args(["--clear-groups", "perl", "-MIO::Socket::UNIX", "-e"])
        .arg("my $s = IO::Socket::UNIX->new(Local => $ARGV[0], Listen => 5) or die $!; sleep 600")
        .arg(&path);
    let listener = Process::spawn("listener", listener, &parent).expect("perl");
    wait_until("it listens", TIMEOUT, || path.exists())
        .unwrap_or_else(|error| panic!("{error:#}\n{}", listener.log()));
    for args in [&["status"][..], &["stop"], &["endpoint", "list"]] {
        let mut own = Command::new(daemon.command(&[]).get_program());
        own.args(args)
            .arg("--config")
            .arg(daemon.config())
            .arg("--socket")
            .arg(&path);
        let done = output(&mut own, TIMEOUT).expect("a command");
        let said = text(&done);
        assert!(
            done.status.code() == Some(3) && said.contains(&format!("a process of user {USER}")),
            "{args:?}: {said}"
        );
    }
}
