//! The commands of the documents for operators, run as a reader would run them: in their order, on a node with directories
//! and interfaces of its own, with the printed output compared. systemd does not run in a namespace: `systemctl` and
//! `journalctl` stand for it here.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command, time::Duration};

use palisade_abi::Reason;
use palisade_testbed::{
    Ns,
    daemon::binary,
    ns::{temp_dir, wait_until},
    process::{Process, output},
};
use palisade_tests::guide::{Step, missing, steps};
use tempfile::TempDir;

/// Longest time of one command.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Starts and stops the daemon as the unit does.
const SYSTEMCTL: &str = r#"#!/bin/bash
set -u
command=$1; shift
start() {
    setsid palisade run >>/run/palisade.log 2>&1 </dev/null & echo $! >/run/palisade.pid
    # Type=notify: systemctl returns when the daemon is ready.
    palisade status --wait 30s >/dev/null
}
running() { [ -e /run/palisade.pid ] && kill -0 "$(cat /run/palisade.pid)" 2>/dev/null; }
case $command in
enable) [ "${1-}" = --now ] && start || true ;;
start) running || start ;;
stop) palisade stop >/dev/null; for _ in {1..100}; do running || break; sleep 0.1; done ;;
restart) running && palisade stop >/dev/null; start ;;
reload) palisade reload ;;
is-active) running && echo active || { echo inactive; exit 3; } ;;
*) echo "systemctl $command is not known here" >&2; exit 1 ;;
esac
"#;

/// A mount namespace with empty directories of Palisade, and the machine's programs.
const MOUNTS: &str = r#"set -e
mount --make-rprivate /
mkdir -p "$D/etc" "$D/lib" "$D/run/palisade" "$D/log" "$D/bin" "$D/root"
cp -a /etc/. "$D/etc/"; rm -rf "$D/etc/palisade"; mkdir -p -m 755 "$D/etc/palisade/policies.d"
mount --bind "$D/etc" /etc; mount --bind "$D/lib" /var/lib; mount --bind "$D/run" /run; mount --bind "$D/log" /var/log
mount --bind "$D/bin" /usr/local/sbin; mount --bind "$D/root" /root
mount -t bpf -o nosuid,nodev,noexec,mode=0700 bpf /sys/fs/bpf
touch "$D/ready"
exec sleep 3600
"#;

/// The machines of a document: `node` with the NIC `eth0` and the workloads `web` and `db`, and `client` beyond the NIC.
struct Machines {
    node: Ns,
    client: Ns,
    web: Ns,
    db: Ns,
    mounts: Process,
    _servers: Vec<Process>,
    dir: TempDir,
}

impl Machines {
    fn new() -> Self {
        let dir = temp_dir("guide").expect("folder");
        let path = dir.path();
        // Palisade refuses directories that others could change.
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("mode");
        let [node, client, web, db] =
            ["node", "client", "web", "db"].map(|name| Ns::new(name).expect("namespace"));
        let ends = [
            (
                &client,
                "eth0",
                "192.0.2.10/24",
                "2001:db8::10/64",
                "192.0.2.20/24",
                "2001:db8::20/64",
            ),
            (
                &web,
                "veth-web",
                "10.0.1.1/24",
                "fd00:1::1/64",
                "10.0.1.10/24",
                "fd00:1::10/64",
            ),
            (
                &db,
                "veth-db",
                "10.0.2.1/24",
                "fd00:2::1/64",
                "10.0.2.10/24",
                "fd00:2::10/64",
            ),
        ];
        for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            node.sysctl(setting, "1").expect("forwarding");
        }
        for (peer, interface, v4, v6, peer_v4, peer_v6) in ends {
            let other = peer.name();
            node.ip(&format!(
                "link add {interface} type veth peer name eth0 netns {other}\n\
                 addr add {v4} dev {interface}\naddr add {v6} dev {interface} nodad\nlink set {interface} up"
            ))
            .expect("link");
            let gateway = |address: &str| address.split('/').next().unwrap_or_default().to_owned();
            peer.ip(&format!(
                "addr add {peer_v4} dev eth0\naddr add {peer_v6} dev eth0 nodad\nlink set eth0 up\n\
                 route add default via {}\nroute add default via {}",
                gateway(v4),
                gateway(v6)
            ))
            .expect("addresses");
        }
        let servers = [
            (&node, 22),
            (&node, 8080),
            (&web, 80),
            (&db, 5432),
            (&client, 443),
        ]
        .map(|(ns, port)| serve(ns, port, path));
        let mut command = Command::new("unshare");
        command.args(["--mount", "bash", "-c", MOUNTS]).env("D", path);
        let mounts = Process::spawn("mounts", command, path).expect("unshare");
        wait_until("the mounts are there", TIMEOUT, || path.join("ready").exists()).expect("mounts");
        let bin = path.join("bin");
        fs::copy(binary().expect("palisade"), bin.join("palisade")).expect("copy");
        for (name, text) in [
            ("systemctl", SYSTEMCTL),
            ("journalctl", "#!/bin/sh\ncat /run/palisade.log\n"),
        ] {
            fs::write(bin.join(name), text).expect("script");
            fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).expect("mode");
        }
        Self {
            node,
            client,
            web,
            db,
            mounts,
            _servers: servers.into(),
            dir,
        }
    }

    /// Returns a command of a place, for a shell.
    fn command(&self, place: &str, text: &str) -> Command {
        let ns = match place {
            "node" => &self.node,
            "client" => &self.client,
            "web" => &self.web,
            "db" => &self.db,
            other => panic!("no machine is named {other}"),
        };
        let mut command = ns.command("nsenter");
        command
            .arg(format!("--mount=/proc/{}/ns/mnt", self.mounts.pid()))
            .args(["--", "bash", "-c", text])
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("NO_COLOR", "1")
            .env_remove("PALISADE_CONFIG")
            .env_remove("PALISADE_SOCKET")
            .current_dir("/");
        command
    }

    /// Returns the path of a node's file outside of its mount namespace.
    fn outside(&self, path: &str) -> std::path::PathBuf {
        let root = format!("/proc/{}/root", self.mounts.pid());
        Path::new(&root).join(path.trim_start_matches('/'))
    }

    /// Writes a file of the node.
    fn write(&self, path: &str, content: &str) {
        let path = self.outside(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("folder");
        fs::write(path, content).expect("file");
    }

    /// Follows a document.
    fn follow(&self, name: &str) {
        let steps = steps_of(name);
        let mut commands = 0;
        for step in steps {
            match step {
                Step::Write { path, content, .. } => self.write(&path, &content),
                Step::Run {
                    line,
                    place,
                    command,
                    output: printed,
                } => {
                    commands += 1;
                    let out = output(&mut self.command(&place, &command), TIMEOUT)
                        .unwrap_or_else(|error| panic!("{name}:{line}: {command}: {error:#}"));
                    let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
                    let log =
                        || fs::read_to_string(self.dir.path().join("run/palisade.log")).unwrap_or_default();
                    if let Some(wanted) = missing(&printed, &text) {
                        panic!(
                            "{name}:{line}: {command}\nprints no line like: {wanted}\nbut:\n{text}\nlog:\n{}",
                            log()
                        );
                    }
                    assert!(
                        out.status.success() || !printed.is_empty(),
                        "{name}:{line}: {command}: {}\n{text}\nlog:\n{}",
                        out.status,
                        log()
                    );
                }
            }
        }
        assert!(commands > 3, "{name} has {commands} commands");
    }
}

/// Returns the steps of a document.
fn steps_of(name: &str) -> Vec<Step> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    let document = fs::read_to_string(&path).expect("document");
    steps(&document).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Starts a web server on a port of both families.
fn serve(ns: &Ns, port: u16, dir: &Path) -> Process {
    let mut command = ns.command("python3");
    let web = dir.join(format!("www-{port}"));
    fs::create_dir_all(&web).expect("folder");
    fs::write(web.join("index.html"), "hello\n").expect("page");
    command
        .args(["-m", "http.server", "--bind", "::", "--directory"])
        .arg(&web)
        .arg(port.to_string());
    let process = Process::spawn(&format!("server-{port}"), command, dir).expect("server");
    let listens = || {
        ns.run("ss", &["-Hltn", &format!("sport = :{port}")])
            .is_ok_and(|text| !text.trim().is_empty())
    };
    wait_until("the server listens", TIMEOUT, listens).expect("server");
    process
}

#[test]
fn troubleshooting_explains_every_reason_for_a_drop() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/TROUBLESHOOTING.md");
    let document = fs::read_to_string(path).expect("document");
    for reason in Reason::ALL.iter().filter(|reason| reason.is_drop()) {
        let row = format!("| {} | {} |", *reason as u8, reason.text());
        assert!(document.contains(&row), "{row}");
    }
}

#[test]
fn the_quick_start_protects_a_host() {
    Machines::new().follow("QUICKSTART.md");
}

#[test]
fn the_commands_for_users_of_nftables_work() {
    Machines::new().follow("FROM-NFTABLES.md");
}

#[test]
fn the_commands_for_users_of_cilium_work() {
    Machines::new().follow("FROM-CILIUM.md");
}

#[test]
fn workloads_on_a_bridge_are_guarded_as_the_page_says() {
    let machines = Machines::new();
    let node = &machines.node;
    node.ip(
        "link add docker0 type bridge\naddr add 10.0.3.1/24 dev docker0\nlink set docker0 up\n\
         addr flush dev veth-web\naddr flush dev veth-db\nlink set veth-web master docker0\nlink set veth-db master docker0",
    )
    .expect("bridge");
    for (workload, address) in [(&machines.web, "10.0.3.10/24"), (&machines.db, "10.0.3.20/24")] {
        workload
            .ip(&format!(
                "addr flush dev eth0\naddr add {address} dev eth0\nroute add default via 10.0.3.1"
            ))
            .expect("addresses");
    }
    node.nft(
        "table ip nat {\n\
         chain prerouting { type nat hook prerouting priority dstnat; iifname \"eth0\" tcp dport 8888 dnat to 10.0.3.10:80; }\n\
         chain postrouting { type nat hook postrouting priority srcnat; ip saddr 10.0.3.0/24 oifname \"eth0\" masquerade; }\n}",
    )
    .expect("nat");
    machines.follow("INTERFACES.md");
}

#[test]
fn the_symptoms_of_troubleshooting_look_as_printed() {
    Machines::new().follow("TROUBLESHOOTING.md");
}

#[test]
fn the_commands_for_the_operation_work() {
    let machines = Machines::new();
    // The node of the quick start, as its last files leave it.
    let mut policy = String::new();
    for step in steps_of("QUICKSTART.md") {
        if let Step::Write { path, content, .. } = step {
            machines.write(&path, &content);
            if path.ends_with(".yaml") {
                policy = content;
            }
        }
    }
    let ssh = "- {port: \"22\", protocol: TCP}";
    let changed = policy.replacen(ssh, &format!("{ssh}\n      {}", ssh.replace("22", "8080")), 1);
    assert!(changed.contains("8080"), "{policy}");
    machines.write("/root/policies.new/node.yaml", &changed);
    let started = output(&mut machines.command("node", "systemctl start palisade"), TIMEOUT);
    assert!(started.expect("start").status.success());
    machines.follow("OPERATIONS.md");
}
