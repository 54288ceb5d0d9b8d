//! Workloads that are found: named network namespaces become endpoints by `[[discover]]`, and nothing passes before.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use palisade_testbed::{
    Daemon, Ns, Outcome, Topology,
    daemon::Settings,
    ns::wait_until,
    probe::{ping, udp},
    server::{Echo, Program},
    topology::{INNER, INTERNET_V4, INTERNET_V6},
};
use serde_json::{Value, json};

mod found;

use found::{WAIT, Workload, endpoint, status_of, unplugged, wait_found, wait_gone, web};

/// Clients may reach the server's web port and its echo port, and no other peer may; workloads called late may do nothing.
const POLICIES: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts:
    - ports: [{port: "8000", protocol: TCP}, {port: "7", protocol: UDP}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: late}
spec:
  endpointSelector: {matchLabels: {app: late}}
  ingress:
  - {}
  egress:
  - {}
  ingressDeny:
  - fromEntities: [all]
  egressDeny:
  - toEntities: [all]
"#;

const OPEN: Duration = Duration::from_secs(8);
const CLOSED: Duration = Duration::from_millis(600);

fn settings() -> Settings {
    // Other tests have namespaces of their own in the same directory.
    let tables = format!(
        "[[discover]]\nkind = \"netns\"\nnames = [\"pal-{}-*-app-*\"]\nname = \"{{2}}\"\nlabels = {{ app = \"{{2}}\" }}\n\
         addresses = [\"10.0.0.0/16\", \"fd00::/16\"]\n",
        std::process::id()
    );
    Settings {
        tables,
        ..Settings::default()
    }
}

fn start(topology: &Topology) -> Daemon {
    Daemon::start(topology, &settings(), &[("policies.yaml", POLICIES)])
        .unwrap_or_else(|error| panic!("{error:#}"))
}

#[test]
fn namespaces_are_found_and_their_labels_decide_also_over_restarts() {
    let topology = Topology::new().unwrap_or_else(|error| panic!("{error:#}"));
    let (server, client) = (Workload::new("server", 1), Workload::new("client", 2));
    server.plug(&topology, "veth-a");
    // One is there before the daemon, the others come while it runs.
    let mut daemon = start(&topology);
    let first = wait_found(&daemon, "server", &server);
    assert_eq!(first["source"], format!("netns:{}", server.ns.name()));
    assert_eq!(
        first["labels"]
            .as_array()
            .map(|labels| labels.contains(&"k8s:app=server".into())),
        Some(true),
        "{first}"
    );
    let other = Workload::new("other", 3);
    client.plug(&topology, "veth-b");
    other.plug(&topology, "veth-c");
    wait_found(&daemon, "client", &client);
    wait_found(&daemon, "other", &other);
    let _web = web(&server.ns);
    let both = |allowed: &Ns, denied: &Ns, daemon: &Daemon| {
        for to in server.addresses() {
            assert_eq!(status_of(allowed, to, OPEN), 200, "{to}\n{}", daemon.report());
            assert_eq!(status_of(denied, to, CLOSED), 0, "{to}\n{}", daemon.report());
        }
    };
    both(&client.ns, &other.ns, &daemon);

    // Without a daemon the last state stays enforced, and a new workload stays closed.
    daemon.kill9().expect("kill");
    both(&client.ns, &other.ns, &daemon);
    let new = Workload::new("client2", 4);
    new.plug(&topology, "veth-d");
    for to in new
        .gateways()
        .0
        .to_string()
        .parse::<IpAddr>()
        .into_iter()
        .chain(server.addresses())
    {
        assert_eq!(ping(&new.ns, None, to, 8, CLOSED), Outcome::TimedOut, "{to}");
    }
    daemon.restart().unwrap_or_else(|error| panic!("{error:#}"));
    wait_found(&daemon, "client2", &new);
    let again = wait_found(&daemon, "server", &server);
    assert_eq!(again["id"], first["id"]);
    both(&client.ns, &other.ns, &daemon);
    let gateway: IpAddr = new.gateways().0.into();
    wait_until("the new workload is open", WAIT, || {
        ping(&new.ns, None, gateway, 8, OPEN) == Outcome::Open
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
}

#[test]
fn an_address_that_another_workload_gets_has_its_identity_and_none_of_the_old_flows() {
    let topology = Topology::new().unwrap_or_else(|error| panic!("{error:#}"));
    let (server, client) = (Workload::new("server", 1), Workload::new("client", 2));
    server.plug(&topology, "veth-a");
    client.plug(&topology, "veth-b");
    let daemon = start(&topology);
    wait_found(&daemon, "server", &server);
    wait_found(&daemon, "client", &client);
    let echo = Echo::start(&server.ns, &server.addresses(), &[], &[7]).expect("echo");
    let source = |address: IpAddr| SocketAddr::new(address, 4_000);
    let exchange = |ns: &Ns, from: SocketAddr, to: IpAddr| {
        ns.enter(|| {
            let socket = UdpSocket::bind(from).expect("bind");
            socket.set_read_timeout(Some(OPEN)).expect("timeout");
            socket.send_to(b"hello", SocketAddr::new(to, 7)).expect("send");
            socket.recv_from(&mut [0; 8]).is_ok()
        })
    };
    for (own, to) in client.addresses().into_iter().zip(server.addresses()) {
        wait_until("the client is answered", WAIT, || {
            exchange(&client.ns, source(own), to)
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    }
    // Another workload with the addresses of the client takes its place.
    unplugged(&topology, client, "veth-b");
    let thief = Workload::new("other", 2);
    thief.plug(&topology, "veth-b");
    wait_gone(&daemon, "client");
    wait_found(&daemon, "other", &thief);
    let before = echo.contacts().len();
    for (own, to) in thief.addresses().into_iter().zip(server.addresses()) {
        thief.ns.enter(|| {
            let socket = UdpSocket::bind(source(own)).expect("bind");
            socket.set_read_timeout(Some(CLOSED)).expect("timeout");
            for _ in 0..5 {
                socket.send_to(b"hello", SocketAddr::new(to, 7)).expect("send");
            }
            assert!(socket.recv_from(&mut [0; 8]).is_err(), "{}", daemon.report());
        });
    }
    assert_eq!(echo.contacts().len(), before, "{}", daemon.report());

    // The same name again, in another namespace: a new run of the workload, which is allowed what the client was.
    unplugged(&topology, thief, "veth-b");
    wait_gone(&daemon, "other");
    let client = Workload::new("client", 2);
    client.plug(&topology, "veth-b");
    wait_found(&daemon, "client", &client);
    for (own, to) in client.addresses().into_iter().zip(server.addresses()) {
        wait_until("the new client is answered", WAIT, || {
            exchange(&client.ns, source(own), to)
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    }

    // A second claim on an address stays denied and is reported; the first one keeps working.
    let second = Workload::new("zz", 2);
    topology
        .node
        .ip(&format!(
            "link add veth-z type veth peer name {INNER} netns {}\nlink set veth-z up\n",
            second.ns.name()
        ))
        .expect("veth");
    second
        .ns
        .ip(&format!(
            "addr add {}/24 dev {INNER}\nlink set {INNER} up\nroute add default dev {INNER}\n",
            second.v4
        ))
        .expect("address");
    daemon
        .wait_status("the conflict is reported", |status| {
            status["warnings"].as_array().is_some_and(|warnings| {
                warnings.iter().filter_map(Value::as_str).any(|text| {
                    text.contains("10.0.2.10 belongs to default/client") && text.contains("veth-z")
                })
            })
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    assert!(endpoint(&daemon, "zz").is_none());
    assert_eq!(
        udp(&client.ns, None, SocketAddr::new(server.v4.into(), 7), 8, OPEN),
        Outcome::Open,
        "{}",
        daemon.report()
    );
}

#[test]
fn a_workload_with_an_address_of_the_configuration_or_the_node_is_denied_and_the_node_stays_ready() {
    let topology = Topology::new().and_then(|topology| topology.apps(&["front"]));
    let topology = topology.unwrap_or_else(|error| panic!("{error:#}"));
    let mut settings = settings();
    settings.tables = settings
        .tables
        .replace("\"10.0.0.0/16\", \"fd00::/16\"", "\"10.0.0.0/8\", \"fd00::/8\"");
    let daemon = Daemon::start(&topology, &settings, &[("policies.yaml", POLICIES)])
        .unwrap_or_else(|error| panic!("{error:#}"));
    let configured = topology.get("front");
    let front = "endpoint default/front of the configuration";
    let (gateway, gateway6) = (configured.gateway_v4, configured.gateway_v6);
    let mut conflicts = 0;
    for (address, prefix, owner) in [
        (configured.v4.to_string(), 32, front),
        (configured.v6.to_string(), 128, front),
        (gateway.to_string(), 32, "the node"),
        (gateway6.to_string(), 128, "the node"),
    ] {
        let thief = Workload::new("thief", 5);
        thief.plug(&topology, "veth-t");
        wait_found(&daemon, "thief", &thief);
        let gateway: IpAddr = thief.gateways().0.into();
        assert_eq!(ping(&thief.ns, None, gateway, 8, OPEN), Outcome::Open);
        thief
            .ns
            .ip(&format!("addr add {address}/{prefix} dev {INNER} nodad"))
            .expect("address");
        let conflict = format!(
            "discover: netns:{}: address {address} belongs to {owner} already; veth-t stays denied",
            thief.ns.name()
        );
        let status = daemon
            .wait_status("the conflict is a warning", |status| {
                let warnings = status["warnings"].as_array();
                warnings.is_some_and(|all| all.contains(&conflict.as_str().into()))
            })
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
        // A workload must not be able to make the node unready.
        assert_eq!(status["ready"], true, "{status:#}");
        assert_eq!(status["missing"], json!([]));
        conflicts += 1;
        let refused = json!({"now": 1, "conflicts_total": conflicts});
        assert_eq!(status["refused_workloads"], refused);
        let brief = daemon.try_cli(&["status", "--brief"]).expect("status");
        assert_eq!(brief.status.code(), Some(0));
        // The configured endpoint stays, and no packet of the other workload passes.
        let front = endpoint(&daemon, "front").expect("front");
        assert_eq!(front["source"], "config");
        let addresses = front["addresses"].to_string();
        for own in [configured.v4.to_string(), configured.v6.to_string()] {
            assert!(addresses.contains(own.as_str()), "{front}");
        }
        assert!(endpoint(&daemon, "thief").is_none());
        assert_eq!(ping(&thief.ns, None, gateway, 8, CLOSED), Outcome::TimedOut);
        // Without the address it is an endpoint again.
        thief
            .ns
            .ip(&format!("addr del {address}/{prefix} dev {INNER}"))
            .expect("address");
        wait_found(&daemon, "thief", &thief);
        daemon
            .wait_status("the node is ready", |status| status["ready"] == true)
            .expect("status");
        assert_eq!(ping(&thief.ns, None, gateway, 8, OPEN), Outcome::Open);
        unplugged(&topology, thief, "veth-t");
        wait_gone(&daemon, "thief");
    }
}

#[test]
fn no_packet_passes_between_the_appearance_of_an_interface_and_the_labels() {
    const ROUNDS: usize = 12;
    let topology = Topology::new().unwrap_or_else(|error| panic!("{error:#}"));
    let daemon = start(&topology);
    // What the workloads send arrives here, if it passes: at the node's own addresses and behind the NIC.
    let sinks: Vec<UdpSocket> = [
        (&topology.internet, IpAddr::from(Ipv4Addr::UNSPECIFIED)),
        (&topology.internet, Ipv6Addr::UNSPECIFIED.into()),
        (&topology.node, Ipv4Addr::UNSPECIFIED.into()),
        (&topology.node, Ipv6Addr::UNSPECIFIED.into()),
    ]
    .into_iter()
    .enumerate()
    .map(|(n, (ns, any))| {
        ns.enter(|| {
            let domain = if any.is_ipv4() {
                socket2::Domain::IPV4
            } else {
                socket2::Domain::IPV6
            };
            let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None).expect("socket");
            if n % 2 == 1 {
                socket.set_only_v6(true).expect("IPv6 only");
            }
            socket.bind(&SocketAddr::new(any, 9).into()).expect("bind");
            socket.set_nonblocking(true).expect("non-blocking");
            socket.into()
        })
    })
    .collect();
    for round in 0..ROUNDS {
        let late = Workload::new("late", 5);
        let inside: Vec<UdpSocket> = late.ns.enter(|| {
            [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()]
                .into_iter()
                .filter_map(|any| UdpSocket::bind((any, 9)).ok())
                .collect()
        });
        let stop = AtomicBool::new(false);
        let (gateway4, gateway6) = late.gateways();
        let targets: [IpAddr; 4] = [
            INTERNET_V4.into(),
            INTERNET_V6.into(),
            gateway4.into(),
            gateway6.into(),
        ];
        thread::scope(|scope| {
            // Floods in both directions begin before the interface is there.
            scope.spawn(|| {
                late.ns.enter(|| {
                    let sockets = [
                        UdpSocket::bind("0.0.0.0:0").expect("socket"),
                        UdpSocket::bind("[::]:0").expect("socket"),
                    ];
                    while !stop.load(Ordering::Relaxed) {
                        for to in targets {
                            let socket = &sockets[usize::from(to.is_ipv6())];
                            // Fails until there is a route.
                            let _ = socket.send_to(b"out", (to, 9));
                        }
                    }
                });
            });
            for ns in [&topology.internet, &topology.node] {
                let (late, stop) = (&late, &stop);
                scope.spawn(move || {
                    ns.enter(|| {
                        let sockets = [
                            UdpSocket::bind("0.0.0.0:0").expect("socket"),
                            UdpSocket::bind("[::]:0").expect("socket"),
                        ];
                        while !stop.load(Ordering::Relaxed) {
                            for to in late.addresses() {
                                let _ = sockets[usize::from(to.is_ipv6())].send_to(b"in", (to, 9));
                            }
                            thread::sleep(Duration::from_micros(200));
                        }
                    });
                });
            }
            late.plug(&topology, "veth-late");
            if round % 3 != 2 {
                wait_found(&daemon, "late", &late);
                thread::sleep(Duration::from_millis(50));
            }
            stop.store(true, Ordering::Relaxed);
        });
        for socket in sinks.iter().chain(&inside) {
            socket.set_nonblocking(true).expect("non-blocking");
            let got = socket.recv_from(&mut [0; 8]);
            assert!(got.is_err(), "round {round}: {got:?}\n{}", daemon.report());
        }
        drop(inside);
        unplugged(&topology, late, "veth-late");
    }
    // The flood is real: it was dropped at the interface, by the table before and by the programs after.
    let status = daemon.status().expect("status");
    let drops = status["drops"].as_array().expect("drops");
    for reason in [219, 181] {
        assert!(
            drops.iter().any(|drop| drop["reason"] == reason),
            "{reason}: {status}"
        );
    }
}

#[test]
fn no_packet_passes_while_a_workload_removes_and_adds_its_address() {
    const ROUNDS: usize = 8;
    let topology = Topology::new().unwrap_or_else(|error| panic!("{error:#}"));
    let late = Workload::new("late", 5);
    late.plug(&topology, "veth-late");
    let daemon = start(&topology);
    wait_found(&daemon, "late", &late);
    let sink = topology.node.enter(|| UdpSocket::bind("[::]:9").expect("socket"));
    sink.set_nonblocking(true).expect("non-blocking");
    // Addresses outside `addresses` of the section stay, and the gateway need not be resolved, so that the workload can send
    // at every moment.
    let (gateway4, gateway6) = late.gateways();
    let link = topology.node.run("ip", &["-o", "link", "show", "veth-late"]);
    let link = link.expect("link");
    let (_, rest) = link.split_once("link/ether ").expect("an Ethernet device");
    let mac = rest.split_whitespace().next().expect("an address");
    late.ns
        .ip(&format!(
            "addr add 198.18.77.9/32 dev {INNER}\n\
             addr add fd77::9/128 dev {INNER} nodad\n\
             route add {gateway4}/32 dev {INNER} src 198.18.77.9\n\
             route add {gateway6}/128 dev {INNER}\n\
             neigh replace {gateway4} lladdr {mac} dev {INNER} nud permanent\n\
             neigh replace {gateway6} lladdr {mac} dev {INNER} nud permanent\n"
        ))
        .expect("addresses");
    let change = |verb: &str, nodad: &str| {
        late.ns
            .ip(&format!(
                "addr {verb} {}/24 dev {INNER}\naddr {verb} {}/64 dev {INNER}{nodad}\n",
                late.v4, late.v6
            ))
            .expect("addresses");
    };
    let stop = AtomicBool::new(false);
    let end = Instant::now() + 10 * WAIT;
    thread::scope(|scope| {
        scope.spawn(|| {
            late.ns.enter(|| {
                let sockets = [
                    UdpSocket::bind("198.18.77.9:0").expect("socket"),
                    UdpSocket::bind("[fd77::9]:0").expect("socket"),
                ];
                while !stop.load(Ordering::Relaxed) && Instant::now() < end {
                    let _ = sockets[0].send_to(b"out", (gateway4, 9));
                    let _ = sockets[1].send_to(b"out", (gateway6, 9));
                    thread::sleep(Duration::from_micros(50));
                }
            });
        });
        for _ in 0..ROUNDS {
            change("del", "");
            wait_gone(&daemon, "late");
            change("add", " nodad");
            wait_found(&daemon, "late", &late);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let got = sink.recv_from(&mut [0; 8]);
    assert!(got.is_err(), "{got:?}\n{}", daemon.report());
    // The flood is real: the table dropped it while the workload was no endpoint.
    let status = daemon.status().expect("status");
    let drops = status["drops"].as_array().expect("drops");
    assert!(drops.iter().any(|drop| drop["reason"] == 219), "{status}");
}

/// A container of the fake engine in the network namespace of a workload.
fn container(n: u8, name: &str, workload: &Workload, labels: &Value, running: bool) -> (String, Value) {
    let id = format!("{n:064x}");
    let description = json!({
        "Id": id, "Name": format!("/{name}"), "Image": "sha256:aa",
        "State": {"Running": running, "Pid": 0},
        "Config": {"Image": "web:1", "Labels": labels},
        "HostConfig": {"NetworkMode": "bridge"},
        "NetworkSettings": {
            "SandboxKey": format!("/run/netns/{}", workload.ns.name()),
            "Networks": {"bridge": {"IPAddress": workload.v4.to_string(), "GlobalIPv6Address": workload.v6.to_string()}}
        }
    });
    (id, description)
}

/// Replaces the state of the fake engine.
fn engine_has(dir: &std::path::Path, mode: &str, containers: &[(String, Value)]) {
    let containers: serde_json::Map<String, Value> = containers.iter().cloned().collect();
    let state = json!({
        "mode": mode,
        "containers": containers,
        // Whoever makes an image can set any label in it.
        "images": {"sha256:aa": {"Config": {"Labels": {"app": "client"}}}}
    });
    let new = dir.join("state.new");
    std::fs::write(&new, state.to_string()).expect("state");
    std::fs::rename(new, dir.join("state")).expect("state");
}

fn engine(topology: &Topology) -> Program {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_docker.py");
    let path = |name: &str| topology.dir().join(name).display().to_string();
    Program::start(
        &topology.internet,
        "python3",
        &[script, &path("docker.sock"), &path("state")],
        None,
    )
    .unwrap_or_else(|error| panic!("{error:#}"))
}

#[test]
fn containers_are_found_with_the_labels_of_their_engine_whatever_the_engine_does() {
    let topology = Topology::new().unwrap_or_else(|error| panic!("{error:#}"));
    let (server, client, other) = (
        Workload::new("server", 1),
        Workload::new("client", 2),
        Workload::new("other", 3),
    );
    server.plug(&topology, "veth-a");
    client.plug(&topology, "veth-b");
    other.plug(&topology, "veth-c");
    let settings = Settings {
        tables: format!(
            "[[discover]]\nkind = \"docker\"\nsocket = {:?}\ncontainer_labels = [\"app\"]\nlabels = {{ image = \"{{image}}\" }}\n",
            topology.dir().join("docker.sock")
        ),
        ..Settings::default()
    };
    let all = [
        container(
            1,
            "server",
            &server,
            &json!({"app": "server", "note": "any, text"}),
            true,
        ),
        container(2, "client", &client, &json!({"app": "client2"}), true),
        // The label comes from the image.
        container(3, "other", &other, &json!({"app": "client"}), true),
    ];
    let policy = POLICIES.replace("app: client", "container:app: client2");
    // The engine is not there yet: nothing passes.
    let mut daemon = Daemon::start(&topology, &settings, &[("policies.yaml", &policy)])
        .unwrap_or_else(|error| panic!("{error:#}"));
    let _web = web(&server.ns);
    for to in server.addresses() {
        assert_eq!(status_of(&client.ns, to, CLOSED), 0);
    }
    let says = |daemon: &Daemon, text: &str| {
        daemon
            .wait_status(text, |status| {
                let warnings = status["warnings"].as_array();
                warnings.is_some_and(|all| all.iter().filter_map(Value::as_str).any(|w| w.contains(text)))
            })
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    };
    says(&daemon, "docker.sock does not answer since");

    engine_has(topology.dir(), "ok", &all);
    let running = engine(&topology);
    let found = wait_found(&daemon, "server", &server);
    assert_eq!(found["source"], "docker:000000000000", "{found}");
    wait_found(&daemon, "client", &client);
    let without = wait_found(&daemon, "other", &other);
    let has = |endpoint: &Value, label: &str| {
        endpoint["labels"]
            .as_array()
            .is_some_and(|labels| labels.contains(&label.into()))
    };
    assert!(
        has(&found, "container:app=server") && has(&found, "k8s:image=web:1"),
        "{found}"
    );
    assert!(!has(&without, "container:app=client"), "{without}");
    let decide = |daemon: &Daemon| {
        for to in server.addresses() {
            assert_eq!(status_of(&client.ns, to, OPEN), 200, "{to}\n{}", daemon.report());
            assert_eq!(status_of(&other.ns, to, CLOSED), 0, "{to}\n{}", daemon.report());
        }
    };
    decide(&daemon);

    // A stopped container is closed.
    engine_has(topology.dir(), "ok", &all[..2]);
    wait_gone(&daemon, "other");
    engine_has(topology.dir(), "ok", &all);
    wait_found(&daemon, "other", &other);

    // An engine that is gone, also over a restart of the daemon, and one that answers nonsense: what was found stays.
    drop(running);
    says(&daemon, "docker.sock does not answer since");
    decide(&daemon);
    daemon.kill9().expect("kill");
    decide(&daemon);
    daemon.restart().unwrap_or_else(|error| panic!("{error:#}"));
    let again = wait_found(&daemon, "server", &server);
    assert_eq!(again["id"], found["id"]);
    decide(&daemon);
    for mode in ["garbage", "endless", "hang"] {
        engine_has(topology.dir(), mode, &[]);
        let running = engine(&topology);
        thread::sleep(Duration::from_millis(500));
        says(&daemon, "docker.sock does not answer since");
        decide(&daemon);
        drop(running);
    }
    let new = Workload::new("client", 4);
    new.plug(&topology, "veth-d");
    assert_eq!(status_of(&new.ns, server.v4.into(), CLOSED), 0);
    // The engine comes back without one of the containers.
    engine_has(topology.dir(), "ok", &all[..2]);
    let _running = engine(&topology);
    wait_gone(&daemon, "other");
    decide(&daemon);
}
