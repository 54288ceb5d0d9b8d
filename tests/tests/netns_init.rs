//! `palisade init` and `palisade doctor` on a node with listening sockets.

use std::{fs, net::IpAddr, process::Stdio, time::Duration};

use palisade_testbed::{
    Outcome,
    daemon::binary,
    ns::{temp_dir, wait_until},
    probe::connect,
    process::{Process, output},
    server::Echo,
    topology::{FAMILIES, Family, INTERNET_V4, INTERNET_V6},
};
use palisade_tests::{CLOSED, OPEN, World, world};
use serde_json::Value;

const TIMEOUT: Duration = Duration::from_secs(60);
/// Port that nothing listens on while `palisade init` runs.
const UNLISTED: u16 = 9_999;

/// Mounts empty directories over those of an installation, in the mount namespace of the shell, and runs the rest of its
/// arguments.
const OWN_DIRECTORIES: &str = "set -e
mount -t tmpfs tmpfs /etc
mount -t tmpfs tmpfs /var/lib
mount -t tmpfs tmpfs /run
mount -t bpf -o mode=0700 bpf /sys/fs/bpf
exec sleep 1000";

/// A process whose mount namespace has directories of its own for an installation.
struct Node<'a> {
    world: &'a World,
    holder: Process,
    _dir: tempfile::TempDir,
}

impl<'a> Node<'a> {
    fn new(world: &'a World) -> Self {
        let dir = temp_dir("init").expect("directory");
        let mut command = world.topology.node.command("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", OWN_DIRECTORIES]);
        let holder = Process::spawn("holder", command, dir.path()).expect("unshare");
        let node = Self {
            world,
            holder,
            _dir: dir,
        };
        wait_until("the mounts", TIMEOUT, || {
            node.sh("mountpoint -q /sys/fs/bpf && test ! -e /etc/passwd").0
        })
        .expect("mounts");
        node
    }

    fn command(&self, program: &str, args: &[&str]) -> std::process::Command {
        let mut command = self.world.topology.node.command("nsenter");
        command
            .args(["-t", &self.holder.pid().to_string(), "-m", "--", program])
            .args(args)
            .env_remove("SSH_CONNECTION")
            .stdin(Stdio::null());
        command
    }

    /// Returns whether a shell command has succeeded, and its output.
    fn sh(&self, script: &str) -> (bool, String) {
        let out = output(&mut self.command("sh", &["-c", script]), TIMEOUT).expect("a shell");
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        (out.status.success(), text)
    }

    /// Runs `palisade` and returns whether it has succeeded, and its output.
    fn palisade(&self, arguments: &str) -> (bool, String) {
        self.sh(&format!(
            "exec {} {arguments}",
            binary().expect("binary").display()
        ))
    }

    #[track_caller]
    fn must(&self, arguments: &str) -> String {
        let (done, text) = self.palisade(arguments);
        assert!(done, "palisade {arguments}: {text}");
        text
    }
}

/// Ends the daemon and removes what it has attached, also if the test has failed.
impl Drop for Node<'_> {
    fn drop(&mut self) {
        let _ = self.palisade("uninstall");
        let _ = self.holder.kill9();
    }
}

fn own_addresses(world: &World) -> Vec<IpAddr> {
    FAMILIES.map(|family| world.addr("node", family)).to_vec()
}

#[test]
fn the_first_configuration_keeps_every_listener_reachable_and_denies_other_ports() {
    let world = world();
    let node = Node::new(&world);
    // A socket at the loopback address gets no rule.
    let _local = Echo::start(
        &world.topology.node,
        &[IpAddr::from([127, 0, 0, 1])],
        &[7_777],
        &[],
    )
    .expect("echo");

    let (ready, text) = node.palisade("doctor");
    assert!(!ready && text.contains("palisade init"), "{text}");
    // A dry run writes nothing.
    let text = node.must("init --dry-run");
    assert!(
        text.contains("[[interface]]") && text.contains("port: \"8085\""),
        "{text}"
    );
    assert!(!node.sh("ls /etc/palisade").0);

    let text = node.must("init");
    assert!(
        text.contains("palisade.toml: valid: 1 interface") && text.contains("Next:"),
        "{text}"
    );
    let policy = node.sh("cat /etc/palisade/policies.d/node.yaml").1;
    assert!(!policy.contains("7777"), "{policy}");
    let config = node.sh("cat /etc/palisade/palisade.toml").1;
    assert!(
        config.contains("audit = true") && config.contains("name = \"nic0\""),
        "{config}"
    );
    // The second time nothing is overwritten.
    let (done, text) = node.palisade("init");
    assert!(
        !done && text.contains("there already") && text.contains("--force"),
        "{text}"
    );
    assert_eq!(node.sh("cat /etc/palisade/palisade.toml").1, config);

    let dir = temp_dir("daemon").expect("directory");
    let binary = binary().expect("binary");
    let command = node.command(&binary.display().to_string(), &["run"]);
    let mut daemon = Process::spawn("palisade", command, dir.path()).expect("daemon");
    let log = || fs::read_to_string(dir.path().join("palisade.log")).unwrap_or_default();
    wait_until("the daemon enforces", TIMEOUT, || {
        node.palisade("status --wait 5s").0
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", log()));
    let late = Echo::start(&world.topology.node, &own_addresses(&world), &[UNLISTED], &[]).expect("echo");
    let unlisted = |family: Family, wait| connect(world.ns("far"), world.at("node", family, UNLISTED), wait);
    // Audit mode passes everything, and reports.
    for family in FAMILIES {
        assert_eq!(unlisted(family, OPEN), Outcome::Open, "{family:?}: {}", log());
    }
    let reported = node.must("observe --all --verdict audit");
    assert!(reported.contains(&UNLISTED.to_string()), "{reported}");
    // A second init for a running daemon is refused.
    let (done, text) = node.palisade("init --force");
    assert!(!done && text.contains("a daemon listens"), "{text}");

    assert!(node.sh("sed -i '/^audit = true/d' /etc/palisade/palisade.toml").0);
    node.must("reload");
    node.must("status --wait 10s");
    let open = "far -> node tcp/22 open
        far -> node tcp/80 open
        far -> node tcp/443 open
        far -> node tcp/8085 open
        far -> node udp/53 open
        far -> node udp/8080 open
        far -> node ping open
        near -> node tcp/22 open
        node -> far tcp/443 open
        node -> far udp/53 open";
    assert_eq!(world.check(open).expect("check"), [""; 0], "{}", log());
    for family in FAMILIES {
        assert_eq!(unlisted(family, CLOSED), Outcome::TimedOut, "{family:?}");
    }
    drop(late);

    // The facts that doctor reports are those of this node.
    let findings: Value = serde_json::from_str(&node.palisade("doctor -o json").1).expect("JSON");
    let of = |check: &str| -> Vec<(String, String)> {
        let all = findings.as_array().into_iter().flatten();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        all.filter(|finding| finding["check"] == check)
            .map(|finding| (text(&finding["level"]), text(&finding["text"])))
            .collect()
    };
    for check in ["configuration", "policies", "daemon", "bpffs", "bpf", "af_xdp"] {
        assert!(
            of(check).iter().any(|(level, _)| level == "ok"),
            "{check}: {findings:#}"
        );
    }
    let nic = of("interface nic0");
    assert!(
        nic.iter()
            .any(|(level, text)| level == "ok" && text.contains("guarded")),
        "{nic:?}"
    );

    // Nothing is left after uninstall, not even the files.
    node.must("uninstall --purge --yes");
    let status = daemon.wait(TIMEOUT).expect("end");
    assert!(status.success(), "{status}: {}", log());
    let (done, text) = node.palisade("uninstall --check --purge");
    assert!(done && text.contains("nothing of Palisade is left"), "{text}");
    assert_eq!(
        node.sh("ls -A /etc /var/lib /run /sys/fs/bpf")
            .1
            .matches("palisade")
            .count(),
        0
    );
}

#[test]
fn a_daemon_that_guards_nothing_takes_the_first_configuration_by_a_reload() {
    let world = world();
    let node = Node::new(&world);
    assert!(node.sh("mkdir -p -m 755 /etc/palisade/policies.d").0);
    let empty = "[node]\nlabels = {}\n[policy]\ndir = \"/etc/palisade/policies.d\"\n";
    assert!(
        node.sh(&format!("printf '{empty}' >/etc/palisade/palisade.toml"))
            .0
    );
    let dir = temp_dir("daemon").expect("directory");
    let binary = binary().expect("binary");
    let command = node.command(&binary.display().to_string(), &["run"]);
    let _daemon = Process::spawn("palisade", command, dir.path()).expect("daemon");
    wait_until("the daemon runs", TIMEOUT, || node.palisade("status --wait 5s").0).expect("daemon");
    let text = node.must("init");
    assert!(text.contains("palisade reload"), "{text}");
    assert!(node.sh("grep -q 'labels = {}' /etc/palisade/palisade.toml.old").0);
    node.must("reload");
    let text = node.must("status --wait 30s");
    assert!(
        text.contains("nic0") && text.contains("audit: what would be dropped passes"),
        "{text}"
    );
}

#[test]
fn doctor_names_a_program_of_other_software_and_what_to_do() {
    let world = world();
    let node = Node::new(&world);
    node.must("init");
    assert!(
        node.sh("tc qdisc add dev nic0 clsact && tc filter add dev nic0 ingress prio 5 u32 match u32 0 0 flowid 1:1")
            .0
    );
    let text = node.palisade("doctor").1;
    assert!(text.contains("`u32` of other software is at ingress"), "{text}");
    assert!(node.sh("nft 'add table ip n; add chain ip n c { type nat hook postrouting priority 100; }; add rule ip n c masquerade'").0);
    let text = node.palisade("doctor").1;
    assert!(text.contains("nat chains with rules (1)"), "{text}");
    // doctor has changed nothing.
    assert!(node.sh("tc filter show dev nic0 ingress").1.contains("u32"));
    assert!(!node.sh("ls /sys/fs/bpf/palisade").0);
}

#[test]
fn the_proposal_names_routes_rules_and_sources_of_workloads() {
    let world = world();
    let node = Node::new(&world);
    world
        .topology
        .node
        .ip(&format!(
            "route add 198.18.0.0/15 via {INTERNET_V4}\nroute add 2001:db8:77::/48 via {INTERNET_V6}"
        ))
        .expect("routes");
    let (done, text) = node.sh("nft 'table inet fw {
            set admins { type ipv4_addr; elements = { 192.0.2.9 }; }
            chain input { type filter hook input priority 0; policy drop;
                ct state established,related accept
                ip saddr @admins tcp dport 22 accept
                tcp dport { 80, 443 } counter accept
                udp dport 53 drop
            }
        }'");
    assert!(done, "{text}");
    let made = node.sh("mkdir -p /run/netns && touch /run/netns/blue /run/docker.sock");
    assert!(made.0, "{}", made.1);
    // As under sudo: only the parent process has the variable.
    let (client, server) = (world.addr("far", Family::V4), world.addr("node", Family::V4));
    let script = format!(
        "env -u SSH_CONNECTION {} init --dry-run; exit $?",
        binary().expect("binary").display()
    );
    let mut command = node.command("sh", &["-c", &script]);
    command.env("SSH_CONNECTION", format!("{client} 4711 {server} 22"));
    let out = output(&mut command, TIMEOUT).expect("a shell");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{text}");
    let (config, policy) = text.split_once("node.yaml\n").expect("both files");
    for part in [
        ", default route\n[[interface]]\nname = \"nic0\"",
        &format!("#   route: 198.18.0.0/15 by {INTERNET_V4} at nic0\n"),
        &format!("#   route: 2001:db8:77::/48 by {INTERNET_V6} at nic0\n"),
        "# [[discover]]\n# kind = \"docker\"\n# socket = \"/run/docker.sock\"\n",
        "# [[discover]]\n# kind = \"netns\"\n# names = [\"blue\"]\n",
        "#   firewall: nftables: the tables inet fw\n",
    ] {
        assert!(config.contains(part), "{part}: {config}");
    }
    assert!(!config.contains("route: 0.0.0.0/0"), "{config}");
    for part in [
        "#   inet fw input: ct state established,related accept\n".to_owned(),
        "#   inet fw input: ip saddr @admins tcp dport 22 accept\n".to_owned(),
        "#   inet fw input: tcp dport { 80, 443 } counter accept\n".to_owned(),
        format!("  # Your ssh session comes from {client} by this port."),
    ] {
        assert!(policy.contains(&part), "{part}: {policy}");
    }
    assert!(!policy.contains("udp dport 53"), "{policy}");
}

#[test]
fn doctor_reads_limits_mtu_and_reverse_path_filter_and_says_what_to_do() {
    let world = world();
    let node = Node::new(&world);
    node.must("init");
    let policy = "apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\nmetadata: {name: web}\n\
        spec:\n  nodeSelector: {}\n  ingress:\n  - toPorts:\n    - ports: [{port: \"80\", protocol: TCP}]\n\
        \x20     rules: {http: [{method: GET}]}\n";
    let written = node.sh(&format!(
        "cat >/etc/palisade/policies.d/web.yaml <<'E'\n{policy}E"
    ));
    assert!(written.0, "{}", written.1);
    world.topology.node.ip("link set nic0 mtu 9000").expect("MTU");
    world
        .topology
        .node
        .sysctl("ipv4/conf/nic0/rp_filter", "1")
        .expect("sysctl");
    let doctor = format!("{} doctor -o json", binary().expect("binary").display());
    let (done, text) = node.sh(&format!("ulimit -l 64 && exec {doctor}"));
    assert!(done, "{text}");
    let findings: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    for (check, level, part, fix) in [
        (
            "locked memory",
            "warning",
            "may lock 64 KiB",
            "ulimit -l unlimited",
        ),
        (
            "interface nic0",
            "note",
            "MTU of 9000 exceeds",
            "an MTU of at most",
        ),
        (
            "interface nic0",
            "note",
            "rp_filter is 1",
            "net.ipv4.conf.nic0.rp_filter=2",
        ),
        ("daemon", "warning", "is not running", "systemctl start palisade"),
    ] {
        let has = |finding: &Value, key: &str, part: &str| {
            finding[key].as_str().is_some_and(|text| text.contains(part))
        };
        assert!(
            findings.iter().any(|finding| finding["check"] == check
                && finding["level"] == level
                && has(finding, "text", part)
                && has(finding, "fix", fix)),
            "{check}, {part}: {findings:#?}"
        );
    }
    for finding in findings.iter().filter(|finding| finding["level"] != "ok") {
        assert!(
            finding["fix"].as_str().is_some_and(|fix| !fix.is_empty()),
            "{finding:#}"
        );
    }
}
