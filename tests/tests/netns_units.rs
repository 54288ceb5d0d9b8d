//! systemd units in the flow records of the node: the cgroup of the local socket names the unit.

use std::{fs, path::PathBuf};

use palisade_testbed::{
    Process,
    daemon::Settings,
    ns::temp_dir,
    probe::{Outcome, connect},
    topology::FAMILIES,
};
use palisade_tests::{CLOSED, OPEN, world};
use serde_json::Value;

/// Listens on a port for both families. Connects to port 80 of the peer of each connection.
const SERVER: &str = "
import os, socket, sys
with open(sys.argv[1] + '/cgroup.procs', 'w') as procs:
    procs.write(str(os.getpid()))
server = socket.create_server(('', 8088), family=socket.AF_INET6, dualstack_ipv6=True)
# Kept open: the daemon of a busy machine can read the first event when a short connection is over.
kept = []
while True:
    connection, peer = server.accept()
    back = socket.create_connection((peer[0].removeprefix('::ffff:'), 80), timeout=5)
    back.sendall(b'hello')
    back.recv(5)
    kept.append((back, connection))
";

const DENY: &str = "apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: host}
spec:
  nodeSelector: {}
  ingress:
  - toPorts: [{ports: [{port: '22', protocol: TCP}]}]
";

/// Cgroups as systemd makes them for a service, removed at the end.
struct Cgroup(Vec<PathBuf>);

impl Cgroup {
    /// Returns the cgroup of a service in a slice; `None` if cgroup2 is not mounted.
    fn new(slice: &str, service: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let line = mounts.lines().find(|line| line.contains(" - cgroup2 "))?;
        let slice = PathBuf::from(line.split(' ').nth(4)?).join(slice);
        let service = slice.join(service);
        fs::create_dir_all(&service).ok()?;
        Some(Self(vec![service, slice]))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process can take a moment to leave.
        for _ in 0..50 {
            if self
                .0
                .iter()
                .all(|dir| fs::remove_dir(dir).is_ok() || !dir.exists())
            {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}

#[test]
fn records_of_the_node_name_the_unit_of_the_socket() {
    let slice = format!("palisade-test-{}.slice", std::process::id());
    let Some(cgroup) = Cgroup::new(&slice, "hello.service") else {
        eprintln!("no cgroup2: not tested");
        return;
    };
    let world = world();
    let dir = temp_dir("units").expect("folder");
    let mut command = world.topology.node.command("python3");
    command.args(["-c", SERVER]).arg(&cgroup.0[0]);
    let mut server = Process::spawn("server", command, dir.path()).expect("server");
    let daemon = world.daemon(Settings::default(), &[]).expect("daemon");
    let unit = |end: &Value| {
        let workloads = end["workloads"].as_array().cloned().unwrap_or_default();
        workloads
            .iter()
            .any(|workload| workload["name"] == "hello.service" && workload["kind"] == "SystemdUnit")
    };
    for family in FAMILIES {
        let to = world.at("node", family, 8088);
        palisade_testbed::ns::wait_until("the server listens", OPEN, || {
            connect(world.ns("far"), to, OPEN) == Outcome::Open
        })
        .expect("listens");
        let node = to.ip().to_string();
        // What it accepts, and what it opens.
        for (filters, end) in [
            (["--to-ip", &node, "--to-port", "8088"], "destination"),
            (["--from-ip", &node, "--to-port", "80"], "source"),
        ] {
            daemon
                .wait_flows(&filters, "the unit is named", |flows| {
                    flows.iter().any(|flow| unit(&flow[end]))
                })
                .unwrap_or_else(|error| panic!("{family:?}: {error:#}\n{}", daemon.report()));
        }
        let by_unit = ["--workload", "SystemdUnit/hello.service", "--ip", &node];
        assert!(!daemon.flows(&by_unit).expect("flows").is_empty());
        let text = daemon
            .cli(&["observe", "--to-ip", &node, "--to-port", "8088"])
            .expect("observe");
        assert!(text.contains("(host: hello.service)"), "{text}");
        // A socket of another cgroup, and an address without a socket, have none.
        for port in ["22", "81"] {
            let _ = connect(
                world.ns("far"),
                world.at("node", family, port.parse().expect("port")),
                CLOSED,
            );
            let others = daemon
                .flows(&["--to-ip", &node, "--to-port", port])
                .expect("flows");
            assert!(
                !others.iter().any(|flow| unit(&flow["destination"])),
                "{others:#?}"
            );
        }
    }
    // What the policy denies names the unit that would have got it, and so does its explanation.
    daemon.apply(&[("host.yaml", DENY)]).expect("apply");
    for family in FAMILIES {
        let to = world.at("node", family, 8088);
        assert_ne!(connect(world.ns("far"), to, CLOSED), Outcome::Open);
        let node = to.ip().to_string();
        let denied = ["--to-ip", &node, "--to-port", "8088", "--verdict", "dropped"];
        let flows = daemon
            .wait_flows(&denied, "the drop is recorded", |flows| !flows.is_empty())
            .expect("flows");
        let flow = flows.iter().find(|flow| unit(&flow["destination"]));
        let uuid = flow.unwrap_or_else(|| panic!("{flows:#?}"))["uuid"]
            .as_str()
            .expect("uuid");
        let explained = daemon.try_cli(&["explain", uuid]).expect("explain");
        let said = String::from_utf8_lossy(&explained.stdout);
        assert!(said.contains("socket of hello.service"), "{said}");
    }
    server.kill9().expect("kill");
    drop(server);
}
