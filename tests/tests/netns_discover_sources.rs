//! Workloads that are found: those that are not known yet (`unknown = "init"`), CNI results, containers of containerd.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use palisade_testbed::{
    Daemon, Ns, Outcome, Topology,
    daemon::Settings,
    ns::wait_until,
    probe::{ping, udp},
    server::{Echo, Program},
};
use serde_json::{Value, json};

mod fake_containerd;
mod found;

use fake_containerd::{Container, Containerd, Mode};
use found::{Workload, endpoint, status_of, unplugged, wait_found, wait_gone, web};

const OPEN: Duration = Duration::from_secs(8);
const CLOSED: Duration = Duration::from_millis(600);

/// The server is a named network namespace.
fn server_section() -> String {
    format!(
        "[[discover]]\nkind = \"netns\"\nnames = [\"pal-{}-*-app-server\"]\nname = \"server\"\n\
         labels = {{ app = \"server\" }}\naddresses = [\"10.0.1.0/24\", \"fd00:1::/64\"]\n",
        std::process::id()
    )
}

/// Without labels a workload may reach the web port of the server, with the label `app=client` its echo port.
const INIT: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {"reserved:init": ""}}]
    toPorts: [{ports: [{port: "8000", protocol: TCP}]}]
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "7", protocol: UDP}]}]
---
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: not-known-yet}
spec:
  endpointSelector: {matchLabels: {"reserved:init": ""}}
  egress:
  - toEndpoints: [{matchLabels: {app: server}}]
"#;

fn has_label(endpoint: &Value, label: &str) -> bool {
    let labels = endpoint["labels"].as_array();
    labels.is_some_and(|labels| labels.contains(&label.into()))
}

fn echoed(from: &Ns, to: IpAddr, timeout: Duration) -> bool {
    udp(from, None, SocketAddr::new(to, 7), 8, timeout) == Outcome::Open
}

#[test]
fn a_workload_that_is_not_known_yet_has_the_identity_init_until_its_labels_are_known() {
    let topology = Topology::new().unwrap_or_else(|error| panic!("{error:#}"));
    let (server, client) = (Workload::new("server", 1), Workload::new("client", 2));
    let elsewhere = Workload::new("elsewhere", 3);
    server.plug(&topology, "veth-a");
    let dir = topology.dir().join("results");
    fs::create_dir(&dir).expect("directory");
    let section = |unknown: &str| {
        format!(
            "{}interfaces = [\"veth-a\"]\n[[discover]]\nkind = \"cni\"\ndir = {dir:?}\n\
             container_labels = [\"app\"]\n{unknown}addresses = [\"10.0.2.0/24\", \"fd00:2::/64\"]\n\
             labels = {{ app = \"{{label:app}}\" }}\n",
            // The first section that matches an interface decides about it.
            server_section()
        )
    };
    let mut settings = Settings {
        tables: section("unknown = \"init\"\n"),
        ..Settings::default()
    };
    let mut daemon = Daemon::start(&topology, &settings, &[("policies.yaml", INIT)])
        .unwrap_or_else(|error| panic!("{error:#}"));
    wait_found(&daemon, "server", &server);
    let _web = web(&server.ns);
    let _echo = Echo::start(&server.ns, &server.addresses(), &[], &[7]).expect("echo");
    client.plug(&topology, "veth-b");
    elsewhere.plug(&topology, "veth-c");
    let first = wait_found(&daemon, "init-veth-b", &client);
    assert!(has_label(&first, "reserved:init"), "{first}");
    assert_eq!(first["source"], "init:veth-b");
    let as_init = |daemon: &Daemon| {
        for (gateway, to) in [client.gateways().0.into(), client.gateways().1.into()]
            .into_iter()
            .zip(server.addresses())
        {
            assert_eq!(status_of(&client.ns, to, OPEN), 200, "{to}\n{}", daemon.report());
            assert!(!echoed(&client.ns, to, CLOSED), "{to}\n{}", daemon.report());
            // What no policy allows stays denied in both directions, also without a policy that selects the endpoint.
            assert_eq!(ping(&client.ns, None, gateway, 8, CLOSED), Outcome::TimedOut);
            assert_eq!(status_of(&elsewhere.ns, to, CLOSED), 0, "{}", daemon.report());
        }
        for to in client.addresses() {
            assert_eq!(ping(&server.ns, None, to, 8, CLOSED), Outcome::TimedOut);
        }
    };
    as_init(&daemon);
    // An address outside of `addresses` gives no endpoint.
    assert!(endpoint(&daemon, "init-veth-c").is_none());
    daemon.kill9().expect("kill");
    as_init(&daemon);
    daemon.restart().unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(wait_found(&daemon, "init-veth-b", &client)["id"], first["id"]);
    as_init(&daemon);

    // The labels come: the flows of the endpoint without labels count no more.
    fs::write(dir.join("net-c1-eth0"), result("c1", &client, "client")).expect("result");
    let found = wait_found(&daemon, "client", &client);
    assert!(has_label(&found, "k8s:app=client"), "{found}");
    wait_gone(&daemon, "init-veth-b");
    for to in server.addresses() {
        assert!(echoed(&client.ns, to, OPEN), "{to}\n{}", daemon.report());
        assert_eq!(status_of(&client.ns, to, CLOSED), 0, "{to}\n{}", daemon.report());
    }

    // Without the option, which a reload can change, nothing passes.
    settings.tables = section("");
    daemon
        .configure(&topology, &settings)
        .and_then(|()| daemon.cli(&["reload"]))
        .unwrap_or_else(|error| panic!("{error:#}"));
    fs::remove_file(dir.join("net-c1-eth0")).expect("result");
    wait_gone(&daemon, "client");
    assert!(endpoint(&daemon, "init-veth-b").is_none());
    for to in server.addresses() {
        assert_eq!(status_of(&client.ns, to, CLOSED), 0, "{to}\n{}", daemon.report());
    }
}

#[test]
fn results_of_cni_are_endpoints_from_their_addition_to_their_deletion_also_over_restarts() {
    let topology = Topology::new().unwrap_or_else(|error| panic!("{error:#}"));
    let (server, client) = (Workload::new("server", 1), Workload::new("client", 2));
    let other = Workload::new("other", 3);
    // The runtime makes the directory with the first result.
    let dir = topology.dir().join("cni/results");
    fs::create_dir(topology.dir().join("cni")).expect("directory");
    let settings = Settings {
        tables: format!(
            "[[discover]]\nkind = \"cni\"\ndir = {dir:?}\ncontainer_labels = [\"K8S_POD_*\"]\n\
             labels = {{ app = \"{{name}}\" }}\n"
        ),
        ..Settings::default()
    };
    let policy = INIT
        .replace("reserved:init", "container:K8S_POD_NAMESPACE")
        .replace("\"\"", "shop");
    let mut daemon = Daemon::start(&topology, &settings, &[("policies.yaml", &policy)])
        .unwrap_or_else(|error| panic!("{error:#}"));
    // A runtime writes the result after the plugins have made the interface.
    let add = |container: &str, workload: &Workload, interface: &str, name: &str| {
        workload.plug(&topology, interface);
        fs::create_dir_all(&dir).expect("directory");
        let file = dir.join(format!("net-{container}-eth0"));
        fs::write(file, result(container, workload, name)).expect("result");
    };
    add("c1", &server, "veth-a", "server");
    add("c2", &client, "veth-b", "client");
    other.plug(&topology, "veth-c");
    let first = wait_found(&daemon, "server", &server);
    assert_eq!(first["source"], "cni:c1", "{first}");
    assert!(
        has_label(&first, "k8s:app=server") && has_label(&first, "container:K8S_POD_NAMESPACE=shop"),
        "{first}"
    );
    wait_found(&daemon, "client", &client);
    let _web = web(&server.ns);
    let decide = |daemon: &Daemon| {
        for to in server.addresses() {
            assert_eq!(status_of(&client.ns, to, OPEN), 200, "{to}\n{}", daemon.report());
            assert_eq!(status_of(&other.ns, to, CLOSED), 0, "{to}\n{}", daemon.report());
        }
    };
    decide(&daemon);

    // While the daemon is down one container goes and another comes.
    daemon.kill9().expect("kill");
    decide(&daemon);
    fs::remove_file(dir.join("net-c2-eth0")).expect("result");
    unplugged(&topology, client, "veth-b");
    let client = Workload::new("client", 4);
    add("c3", &client, "veth-b", "client");
    assert_eq!(status_of(&client.ns, server.v4.into(), CLOSED), 0);
    daemon.restart().unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(wait_found(&daemon, "client", &client)["source"], "cni:c3");
    assert_eq!(wait_found(&daemon, "server", &server)["id"], first["id"]);
    for to in server.addresses() {
        assert_eq!(status_of(&client.ns, to, OPEN), 200, "{to}\n{}", daemon.report());
    }

    // A deleted result closes the interface, though the namespace is still there; a broken one is named.
    fs::remove_file(dir.join("net-c3-eth0")).expect("result");
    wait_gone(&daemon, "client");
    for to in server.addresses() {
        assert_eq!(status_of(&client.ns, to, CLOSED), 0, "{to}\n{}", daemon.report());
    }
    fs::write(
        dir.join("net-c4-eth0"),
        "{\"kind\": \"cniCacheV1\", \"containerId\"",
    )
    .expect("result");
    daemon
        .wait_status("the broken result is named", |status| {
            let warnings = status["warnings"].as_array();
            warnings.is_some_and(|all| {
                all.iter()
                    .any(|w| w.to_string().contains("net-c4-eth0: cannot be parsed"))
            })
        })
        .unwrap_or_else(|error| panic!("{error:#}"));
    wait_found(&daemon, "server", &server);
}

/// A result as libcni keeps it after an ADD of the bridge plugin.
fn result(container: &str, workload: &Workload, app: &str) -> String {
    let (v4, v6) = workload.gateways();
    let netns = format!("/run/netns/{}", workload.ns.name());
    json!({
        "kind": "cniCacheV1",
        "containerId": container,
        "config": "eyJjbmlWZXJzaW9uIjoiMS4wLjAiLCJuYW1lIjoibmV0IiwidHlwZSI6ImJyaWRnZSJ9",
        "ifName": "eth0",
        "networkName": "net",
        "netns": netns,
        "cniArgs": [["IgnoreUnknown", "1"], ["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", app], ["app", app]],
        "result": {
            "cniVersion": "1.0.0",
            "dns": {},
            "interfaces": [
                {"name": "cni0", "mac": "9a:10:2f:b1:5e:01"},
                {"name": "veth0a1b2c3d", "mac": "9a:10:2f:b1:5e:02"},
                {"name": "eth0", "mac": "9a:10:2f:b1:5e:03", "sandbox": netns},
            ],
            "ips": [
                {"interface": 2, "address": format!("{}/24", workload.v4), "gateway": v4.to_string()},
                {"interface": 2, "address": format!("{}/64", workload.v6), "gateway": v6.to_string()},
            ],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        },
    })
    .to_string()
}

/// A process in the network namespace of a workload, in a cgroup that has the name of a container.
struct FirstProcess {
    _program: Program,
    pid: u32,
    cgroup: PathBuf,
}

impl FirstProcess {
    fn start(workload: &Workload, id: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
        let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let cgroups = mounts
            .find(|mount| mount.get(2) == Some(&"cgroup2"))
            .expect("cgroup2 is mounted");
        let cgroup = Path::new(cgroups[1]).join(id);
        fs::create_dir(&cgroup).expect("cgroup");
        let program =
            Program::start(&workload.ns, "sleep", &["600"], None).unwrap_or_else(|error| panic!("{error:#}"));
        let pid = program.process.pid();
        fs::write(cgroup.join("cgroup.procs"), pid.to_string()).expect("cgroup.procs");
        Self {
            _program: program,
            pid,
            cgroup,
        }
    }
}

impl Drop for FirstProcess {
    fn drop(&mut self) {
        // An empty cgroup can be removed.
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
        let _ = wait_until("the cgroup is removed", OPEN, || {
            fs::remove_dir(&self.cgroup).is_ok()
        });
    }
}

/// A pod may reach the web port of the server by its label, a container by its id.
fn containerd_policy(client: &str) -> String {
    format!(
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: server}}
spec:
  endpointSelector: {{matchLabels: {{"container:app": server}}}}
  ingress:
  - fromEndpoints: [{{matchLabels: {{instance: {client}}}}}, {{matchLabels: {{"container:app": client}}}}]
    toPorts: [{{ports: [{{port: "8000", protocol: TCP}}]}}]
"#
    )
}

#[test]
fn containers_of_containerd_are_found_whatever_the_engine_does() {
    let topology = Topology::new().unwrap_or_else(|error| panic!("{error:#}"));
    let (server, client, other) = (
        Workload::new("server", 1),
        Workload::new("client", 2),
        Workload::new("other", 3),
    );
    server.plug(&topology, "veth-a");
    client.plug(&topology, "veth-b");
    other.plug(&topology, "veth-c");
    let id = |name: &str| format!("pal{}-{name}", std::process::id());
    let processes = [(&server, "server"), (&client, "client"), (&other, "other")]
        .map(|(workload, name)| FirstProcess::start(workload, &id(name)));
    let own = r#",{"type":"network"}"#;
    let container = |namespace, n: usize, name: &str, app: &str, is_pod| Container {
        namespace,
        id: id(name),
        labels: vec![
            ("app", app.to_owned()),
            ("io.kubernetes.pod.name", name.to_owned()),
        ],
        pid: Some(processes[n].pid),
        // The CNI plugins of a pod get a named namespace, and runc makes those of other containers.
        network: match is_pod {
            true => format!(
                r#",{{"type":"network","path":"/run/netns/{}"}}"#,
                server.ns.name()
            ),
            false => own.to_owned(),
        },
        is_pod,
    };
    let mut shared = container("k8s.io", 0, "server", "client", false);
    shared.id = id("sidecar");
    shared.network = r#",{"type":"network","path":"/proc/1/ns/net"}"#.to_owned();
    let mut stopped = container("default", 2, "stopped", "client", false);
    stopped.pid = None;
    let all = [
        container("k8s.io", 0, "server", "server", true),
        container("default", 1, "client", "any", false),
        // The label can come from the image.
        container("default", 2, "other", "client", false),
        shared,
        stopped,
        // Another namespace does not count.
        Container {
            id: "elsewhere".to_owned(),
            ..container("moby", 2, "other", "server", true)
        },
    ];
    let without_other = [all[0].clone(), all[1].clone()];
    let socket = topology.dir().join("containerd.sock");
    let settings = Settings {
        tables: format!(
            "[[discover]]\nkind = \"containerd\"\nsocket = {socket:?}\ncontainer_labels = [\"app\"]\n\
             addresses = [\"10.0.0.0/16\", \"fd00::/16\"]\nlabels = {{ instance = \"{{name}}\" }}\n"
        ),
        ..Settings::default()
    };
    let policy = containerd_policy(&id("client"));
    let mut daemon = Daemon::start(&topology, &settings, &[("policies.yaml", &policy)])
        .unwrap_or_else(|error| panic!("{error:#}"));
    let _web = web(&server.ns);
    let says = |daemon: &Daemon, text: &str| {
        daemon
            .wait_status(text, |status| {
                let warnings = status["warnings"].as_array();
                warnings.is_some_and(|all| all.iter().filter_map(Value::as_str).any(|w| w.contains(text)))
            })
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    };
    says(&daemon, "containerd.sock does not answer since");
    assert_eq!(status_of(&client.ns, server.v4.into(), CLOSED), 0);

    let engine = Containerd::start(&socket, Mode::Right, &all);
    let found = wait_found(&daemon, "server", &server);
    assert_eq!(
        found["source"].as_str(),
        Some(&*format!("containerd:{:.12}", id("server")))
    );
    assert!(has_label(&found, "container:app=server"), "{found}");
    wait_found(&daemon, &id("client"), &client);
    let image = wait_found(&daemon, &id("other"), &other);
    assert!(!has_label(&image, "container:app=client"), "{image}");
    let decide = |daemon: &Daemon| {
        for to in server.addresses() {
            assert_eq!(status_of(&client.ns, to, OPEN), 200, "{to}\n{}", daemon.report());
            assert_eq!(status_of(&other.ns, to, CLOSED), 0, "{to}\n{}", daemon.report());
        }
    };
    decide(&daemon);
    let status = daemon.status().expect("status");
    assert!(!status["warnings"].to_string().contains("discover:"), "{status}");

    // An event is followed at once, not by the regular list.
    engine.set(&without_other);
    let begun = Instant::now();
    wait_gone(&daemon, &id("other"));
    engine.set(&all);
    wait_found(&daemon, &id("other"), &other);
    assert!(begun.elapsed() < Duration::from_secs(15));

    // An engine that is gone, also over a restart of the daemon, and one that answers wrongly: what was found stays.
    drop(engine);
    says(&daemon, "containerd.sock does not answer since");
    decide(&daemon);
    daemon.kill9().expect("kill");
    decide(&daemon);
    daemon.restart().unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(wait_found(&daemon, "server", &server)["id"], found["id"]);
    for mode in [Mode::Garbage, Mode::Endless, Mode::Refusing, Mode::Hanging] {
        let engine = Containerd::start(&socket, mode, &[]);
        thread::sleep(Duration::from_millis(500));
        says(&daemon, "containerd.sock does not answer since");
        decide(&daemon);
        drop(engine);
    }
    let _engine = Containerd::start(&socket, Mode::Right, &without_other);
    wait_gone(&daemon, &id("other"));
    for to in server.addresses() {
        assert_eq!(status_of(&client.ns, to, OPEN), 200, "{to}\n{}", daemon.report());
    }
}

#[test]
fn a_process_outside_of_the_cgroup_of_its_container_gives_no_endpoint() {
    let topology = Topology::new().unwrap_or_else(|error| panic!("{error:#}"));
    let client = Workload::new("client", 2);
    client.plug(&topology, "veth-b");
    let id = format!("pal{}-reused", std::process::id());
    let process = FirstProcess::start(&client, &format!("{id}2"));
    let socket = topology.dir().join("containerd.sock");
    let container = Container {
        namespace: "default",
        id: id.clone(),
        labels: Vec::new(),
        // The number of a process that has ended is used again.
        pid: Some(process.pid),
        network: r#",{"type":"network"}"#.to_owned(),
        is_pod: false,
    };
    let _engine = Containerd::start(&socket, Mode::Right, &[container]);
    let settings = Settings {
        tables: format!("[[discover]]\nkind = \"containerd\"\nsocket = {socket:?}\n"),
        ..Settings::default()
    };
    let daemon = Daemon::start(&topology, &settings, &[]).unwrap_or_else(|error| panic!("{error:#}"));
    daemon
        .wait_status("the problem is reported", |status| {
            let warnings = status["warnings"].to_string();
            warnings.contains("is not in the cgroup of the container")
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    assert!(endpoint(&daemon, &id).is_none());
}
