//! Faults of the machine under traffic: a state directory that is full or read-only, a disk that hangs, a daemon that is
//! killed for its memory, a clock that jumps, and very many endpoints. Nothing denied passes, and nothing allowed is lost.
//! Flaps of interfaces are in `netns_churn`, crashes and hangs of the daemon in `netns_operations`.

use std::{
    fs,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use palisade_testbed::{
    Daemon, Ns, Outcome,
    daemon::Settings,
    ns::wait_until,
    probe::connect,
    topology::{FAMILIES, Family},
};
use palisade_tests::{
    CLOSED, OPEN, World,
    fixtures::back::{FROM_FRONT, ONLY_DB, ONLY_FRONT, from_db},
    fixtures::traffic::{Traffic, policy},
    with_peers, world,
};
use serde_json::Value;

/// Time within which a start or a write must have happened.
const LONG: Duration = Duration::from_secs(60);

/// What the policies of `traffic` deny.
const DENIED: &str = "far -> back tcp/80 drop\ndb -> back tcp/80 drop";

/// Returns a wrapper that runs a script in a mount namespace of its own, and then the daemon.
fn after(script: &str) -> Vec<String> {
    let command = ["unshare", "--mount", "--propagation", "private", "sh", "-c"];
    let mut command = command.map(str::to_owned).to_vec();
    command.extend([format!("{script} && exec \"$@\""), "sh".to_owned()]);
    command
}

fn prepared(world: &World, policies: &[(&str, &str)]) -> Daemon {
    Daemon::prepare(&world.topology, &with_peers(Settings::default()), policies).expect("daemon")
}

fn state(daemon: &Daemon) -> PathBuf {
    daemon.policies().with_file_name("state")
}

fn start(daemon: &mut Daemon) {
    daemon.spawn().expect("spawn");
    if let Err(error) = daemon.wait() {
        panic!("{error:#}\n{}", daemon.log());
    }
}

fn warnings(daemon: &Daemon) -> String {
    daemon.status().expect("status")["warnings"].to_string()
}

/// The state directory cannot be written from before the start on: the daemon starts, enforces, follows changed files, and
/// takes over the live connections after a crash. `script` makes a file system at the state directory.
fn unwritable_state(script: impl FnOnce(&Path) -> String) {
    let world = world();
    let mut daemon = prepared(&world, &[("loads.yaml", &policy(0))]);
    fs::create_dir(state(&daemon)).expect("state");
    daemon.start_through(after(&script(&state(&daemon))));
    start(&mut daemon);
    let traffic = FAMILIES.map(|family| Traffic::start(&world, family));
    let everyone = |daemon: &Daemon| traffic.iter().for_each(|t| t.moves(daemon));
    everyone(&daemon);
    for n in 1..=2 {
        daemon.write("loads.yaml", &policy(n)).expect("write");
        daemon.settle().expect("settle");
        everyone(&daemon);
        world.expect(&daemon, DENIED);
        daemon
            .wait_status("what cannot be written is named", |status| {
                status["warnings"].to_string().contains("state")
            })
            .expect("status");
        let candidate = world.topology.dir().join("other.yaml");
        fs::write(&candidate, policy(3)).expect("candidate");
        let refused = daemon
            .try_cli(&["policy", "apply", &candidate.display().to_string(), "--yes"])
            .expect("command");
        assert!(!refused.status.success(), "a change without a journal");
        daemon.kill9().expect("kill -9");
        everyone(&daemon);
        assert_eq!(world.check(DENIED).expect("check"), [""; 0]);
        start(&mut daemon);
    }
    everyone(&daemon);
    world.expect(&daemon, DENIED);
    traffic
        .into_iter()
        .for_each(|t| t.finish("unwritable state directory"));
}

#[test]
fn a_full_state_directory_loses_no_packet_and_leaks_none() {
    unwritable_state(|state| {
        let state = state.display();
        format!(
            "mount -t tmpfs -o size=64k,mode=0700 none {state} && (head -c 1m /dev/zero > {state}/filler 2> /dev/null; true)"
        )
    });
}

#[test]
fn a_read_only_state_directory_loses_no_packet_and_leaks_none() {
    unwritable_state(|state| {
        let state = state.display();
        format!("mount -t tmpfs -o mode=0700 none {state} && mount -o remount,ro {state}")
    });
}

/// A file system that hangs when it is written (fsfreeze(8)), until this value is dropped. The open folder can be named
/// also when the process in whose mount namespace it is has ended.
struct Frozen(fs::File);

impl Frozen {
    fn freeze(path: &Path) -> Self {
        let frozen = Self(fs::File::open(path).expect("folder"));
        frozen.run("-f");
        frozen
    }

    fn run(&self, option: &str) {
        let folder = format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd());
        let status = Command::new("fsfreeze").args([option, &folder]).status();
        assert!(status.expect("fsfreeze").success(), "fsfreeze {option}");
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.run("-u");
    }
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn begun(daemon: &Daemon, args: &[&str]) -> Child {
    let mut command = daemon.command(args);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("command")
}

/// Starts a daemon with its policy folder on a file system of its own. Returns the folder as the daemon sees it.
fn with_folder_on_a_disk(world: &World) -> (Daemon, PathBuf) {
    let mut daemon = prepared(world, &[("back.yaml", FROM_FRONT)]);
    let (image, folder) = (world.topology.dir().join("disk.img"), daemon.policies());
    let disk = fs::File::create(&image).expect("image");
    disk.set_len(16 << 20).expect("image");
    drop(disk);
    world
        .topology
        .node
        .run("mkfs.ext4", &["-q", &image.display().to_string()])
        .expect("mkfs");
    let (image, dir) = (image.display(), folder.display());
    daemon.start_through(after(&format!(
        "mv {dir}/back.yaml {dir}/../kept && mount -o loop {image} {dir} && cp {dir}/../kept {dir}/back.yaml"
    )));
    start(&mut daemon);
    world.expect(&daemon, ONLY_FRONT);
    let inside = PathBuf::from(format!("/proc/{}/root{dir}", daemon.pid().expect("pid")));
    (daemon, inside)
}

/// Begins a change with a confirmation, and waits until it is in force but not written.
fn apply_to_a_hanging_folder(world: &World, daemon: &Daemon) -> Child {
    let file = world.topology.dir().join("back.yaml");
    fs::write(&file, from_db()).expect("candidate");
    let file = file.display().to_string();
    let applying = begun(daemon, &["policy", "apply", &file, "--yes", "--confirm", "1h"]);
    daemon
        .wait_status("the change is enforced before it is written", |status| {
            status["warnings"]
                .to_string()
                .contains("not in the policy folder yet")
        })
        .expect("status");
    world.expect(daemon, ONLY_DB);
    applying
}

#[test]
fn a_change_whose_folder_hangs_is_in_force_and_can_be_cancelled() {
    let world = world();
    let (daemon, inside) = with_folder_on_a_disk(&world);
    let frozen = Frozen::freeze(&inside);
    let applying = apply_to_a_hanging_folder(&world, &daemon);
    let refused = |args: &[&str], reason: &str| {
        let output = daemon.try_cli(args).expect("command");
        let said = text(&output);
        assert!(
            !output.status.success() && said.contains(reason),
            "{args:?}: {said}"
        );
    };
    refused(&["policy", "confirm"], "are still being written");
    refused(&["policy", "confirm", "77"], "pending is change 2 of root");
    refused(&["policy", "cancel", "77"], "pending is change 2 of root");
    let cancelling = begun(&daemon, &["policy", "cancel", "2"]);
    // The rollback does not wait for the disk either.
    let applied = applying.wait_with_output().expect("command");
    assert!(
        text(&applied).contains("change 2 was rolled back, because it was cancelled"),
        "{}",
        text(&applied)
    );
    world.expect(&daemon, ONLY_FRONT);
    refused(&["policy", "confirm"], "change 2 is being rolled back");
    drop(frozen);
    let cancelled = cancelling.wait_with_output().expect("command");
    assert!(cancelled.status.success(), "{}", text(&cancelled));
    assert_eq!(
        fs::read_to_string(inside.join("back.yaml")).expect("file"),
        FROM_FRONT
    );
    refused(
        &["policy", "confirm", "2"],
        "no change waits for its confirmation",
    );
    world.expect(&daemon, ONLY_FRONT);
}

#[test]
fn a_stop_while_the_folder_hangs_rolls_back_at_once() {
    let world = world();
    let (mut daemon, inside) = with_folder_on_a_disk(&world);
    let frozen = Frozen::freeze(&inside);
    let applying = apply_to_a_hanging_folder(&world, &daemon);
    let pid = daemon.pid().expect("pid").to_string();
    world
        .topology
        .node
        .run("kill", &["-TERM", &pid])
        .expect("SIGTERM");
    // The rollback does not wait for the disk, and the process ends once the disk answers.
    let applied = applying.wait_with_output().expect("command");
    assert!(
        text(&applied).contains("change 2 was rolled back, because the daemon was stopped"),
        "{}",
        text(&applied)
    );
    world.expect(&daemon, ONLY_FRONT);
    drop(frozen);
    daemon.terminate().expect("the end");
    world.expect(&daemon, ONLY_FRONT);
    let journal = daemon
        .policies()
        .with_file_name("state")
        .join("policy-change.json");
    assert!(!journal.exists(), "{}", daemon.log());
}

/// Returns a group with a limit of its memory, and the file with the processes of it. cgroup v2, or the memory controller
/// of v1; `None` if the machine has neither with a memory controller.
fn memory_group(limit: u64) -> Option<PathBuf> {
    let name = format!("palisade-test-{}", std::process::id());
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.subtree_control").unwrap_or_default();
    let (dir, file) = if controllers.split_whitespace().any(|known| known == "memory") {
        (Path::new("/sys/fs/cgroup").join(name), "memory.max")
    } else if Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists() {
        (
            Path::new("/sys/fs/cgroup/memory").join(name),
            "memory.limit_in_bytes",
        )
    } else {
        return None;
    };
    fs::create_dir(&dir).expect("group");
    fs::write(dir.join(file), limit.to_string()).expect("limit");
    Some(dir)
}

#[test]
fn a_daemon_that_is_killed_for_its_memory_leaves_the_policy_enforced_and_starts_again() {
    let world = world();
    let mut daemon = prepared(&world, &[("loads.yaml", &policy(0))]);
    start(&mut daemon);
    let traffic = FAMILIES.map(|family| Traffic::start(&world, family));
    let everyone = |daemon: &Daemon| traffic.iter().for_each(|t| t.moves(daemon));
    everyone(&daemon);
    let pid = daemon.pid().expect("pid");
    // Memory that the process has already is charged elsewhere, so any limit is reached by what it requests from now on.
    match memory_group(1 << 20) {
        Some(group) => {
            fs::write(group.join("cgroup.procs"), pid.to_string()).expect("group");
            let long = format!("# {}\n{}", "x".repeat(8 << 20), policy(1));
            let gone = wait_until("the kernel ends the daemon", LONG, || {
                let _ = daemon.write("loads.yaml", &long);
                !Path::new(&format!("/proc/{pid}/maps")).exists()
                    || fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
            });
            daemon.kill9().expect("reap");
            wait_until("the group is empty", LONG, || fs::remove_dir(&group).is_ok()).expect("group");
            gone.expect("the daemon goes on");
        }
        None => {
            println!(
                "NOT TESTED: this machine has no memory controller of cgroups, so the kernel does not end the daemon for its \
                 memory; kill -9 stands for that here"
            );
            daemon.kill9().expect("kill -9");
        }
    }
    everyone(&daemon);
    assert_eq!(world.check(DENIED).expect("check"), [""; 0]);
    daemon.write("loads.yaml", &policy(1)).expect("write");
    start(&mut daemon);
    everyone(&daemon);
    world.expect(&daemon, DENIED);
    traffic
        .into_iter()
        .for_each(|t| t.finish("killed for its memory"));
}

/// The wall clock of a machine cannot be set for one process; no deadline depends on it. The boot clock can, in a time
/// namespace: it jumps forward after hours of suspension, and backward after a boot.
#[test]
fn a_change_is_rolled_back_whichever_way_the_boot_clock_has_jumped() {
    let world = world();
    let mut daemon = prepared(&world, &[("back.yaml", FROM_FRONT)]);
    let file = world.topology.dir().join("back.yaml");
    fs::write(&file, from_db()).expect("candidate");
    let file = file.display().to_string();
    let at = |hours: u64| {
        let offset = (hours * 3_600).to_string();
        ["unshare", "--time", "--boottime", &offset]
            .map(str::to_owned)
            .to_vec()
    };
    for (before, then) in [(0, 3), (3, 0)] {
        daemon.start_through(at(before));
        start(&mut daemon);
        daemon
            .cli(&["policy", "apply", &file, "--yes", "--confirm", "1h"])
            .expect("apply");
        world.expect(&daemon, ONLY_DB);
        daemon.kill9().expect("kill -9");
        assert_eq!(world.check(ONLY_DB).expect("check"), [""; 0]);
        daemon.start_through(at(then));
        start(&mut daemon);
        world.expect(&daemon, ONLY_FRONT);
        assert!(
            warnings(&daemon).contains("was rolled back"),
            "{}",
            warnings(&daemon)
        );
        daemon.kill9().expect("kill -9");
    }
}

/// Root in a workload can add any number of addresses: no more than a bounded number of them is read, and the workload is no
/// endpoint until there are fewer.
#[test]
fn a_workload_with_more_addresses_than_are_read_is_no_endpoint_and_does_not_delay_a_reload() {
    let world = world();
    let crowd = Ns::new("app-crowd").expect("namespace");
    world
        .topology
        .node
        .ip(&format!(
            "link add crowd0 type veth peer name eth0 netns {}\nlink set crowd0 up",
            crowd.name()
        ))
        .expect("interface");
    let addresses: String = (0..20_000)
        .map(|n| format!("addr add 10.98.{}.{}/32 dev eth0\n", n / 250, n % 250 + 1))
        .collect();
    crowd
        .ip(&format!("{addresses}link set eth0 up"))
        .expect("addresses");
    let settings = Settings {
        tables: format!(
            "[[discover]]\nkind = \"netns\"\nnames = [\"pal-{}-*-app-*\"]\nname = \"{{2}}\"\n\
             interfaces = [\"crowd*\"]\naddresses = [\"10.98.0.0/16\"]\nlabels = {{ app = \"{{2}}\" }}\n",
            std::process::id()
        ),
        ..Settings::default()
    };
    let policies = [("back.yaml", FROM_FRONT)];
    let mut daemon = Daemon::prepare(&world.topology, &with_peers(settings), &policies).expect("daemon");
    start(&mut daemon);
    let named = |status: &Value| {
        let warnings = status["warnings"].to_string();
        warnings.contains("more than 4096 addresses")
    };
    daemon
        .wait_status("the workload is named", named)
        .expect("status");
    let begun = Instant::now();
    daemon.cli(&["reload"]).expect("reload");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(named(&daemon.status().expect("status")), "{}", daemon.report());
    world.expect(&daemon, ONLY_FRONT);
    crowd
        .ip("addr flush dev eth0\naddr add 10.98.0.1/24 dev eth0")
        .expect("addresses");
    wait_until("the workload is an endpoint", LONG, || {
        let all = daemon.json(&["endpoint", "list"]).expect("endpoints");
        all.to_string().contains("default/crowd")
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    assert!(!named(&daemon.status().expect("status")));
}

/// Link address of the last interface of [`many_endpoints`].
const MAC: &str = "02:00:00:00:00:01";

/// Configures `number` endpoints whose interfaces are in one namespace of the node, starts the daemon, and checks the
/// verdict of the last one.
fn many_endpoints(number: usize) -> (Duration, u64) {
    let world = world();
    let node = &world.topology.node;
    let names = |n: usize| (format!("many{n}"), format!("10.99.{}.{}", n / 250, n % 250 + 1));
    let mut tables = String::new();
    let mut lines = String::new();
    let inside = world.topology.ns("pfront").name().to_owned();
    for n in 0..number {
        let (name, address) = names(n);
        lines.push_str(&format!(
            "link add {name} type veth peer name in{n} netns {inside}\nlink set {name} up\n"
        ));
        tables.push_str(&format!(
            "[[endpoint]]\nname = \"{name}\"\nnamespace = \"default\"\ninterface = \"{name}\"\n\
             addresses = [\"{address}\"]\nlabels = {{ app = \"{}\" }}\n\n",
            if n + 1 == number { "last" } else { "many" }
        ));
    }
    node.ip(&lines).expect("interfaces");
    let (last, address) = names(number - 1);
    node.ip(&format!(
        "link set {last} address {MAC}\nroute add {address} dev {last}"
    ))
    .expect("route");
    let front = world.addr("front", Family::V4);
    world
        .topology
        .ns("pfront")
        .ip(&format!(
            "addr add {address}/32 dev in{0}\nlink set in{0} up\nroute add {front} dev in{0}\n\
             neigh add {front} lladdr {MAC} dev in{0}",
            number - 1
        ))
        .expect("address");
    let settings = Settings {
        tables,
        ..Settings::default()
    };
    let last_only = FROM_FRONT.replace("app: back", "app: last");
    let policies = [("last.yaml", last_only.as_str())];
    let mut daemon = Daemon::prepare(&world.topology, &with_peers(settings), &policies).expect("daemon");
    let begun = Instant::now();
    start(&mut daemon);
    let took = begun.elapsed();
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid().expect("pid"))).expect("status");
    let memory = status
        .lines()
        .find_map(|line| {
            line.strip_prefix("VmRSS:")?
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()
        })
        .expect("VmRSS");
    let reaches = |from: &str, within: Duration| {
        let to = format!("{address}:80").parse().expect("address");
        connect(world.ns(from), to, within)
    };
    // No program listens at the address.
    assert_eq!(reaches("front", OPEN), Outcome::Refused, "{}", daemon.report());
    assert_eq!(reaches("db", CLOSED), Outcome::TimedOut, "{}", daemon.report());
    let attached = daemon.status().expect("status");
    let guarded = |status: &Value| {
        let interfaces = status["interfaces"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        interfaces.iter().filter(|i| i["ingress"].is_string()).count()
    };
    assert!(guarded(&attached) >= number, "{}", guarded(&attached));
    (took, memory)
}

#[test]
fn a_hundred_endpoints_start_and_the_last_one_has_its_verdict() {
    many_endpoints(100);
}

#[test]
#[ignore = "a thousand interfaces take more than a minute"]
fn a_thousand_endpoints_start_and_the_last_one_has_its_verdict() {
    let (took, memory) = many_endpoints(1_000);
    println!("1,000 endpoints: ready after {took:?}, {memory} kB resident");
}
