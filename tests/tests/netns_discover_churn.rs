//! Network namespaces that are made and deleted as fast as the machine can, up to a hundred a second, while `[[discover]]`
//! looks for them: nothing denied passes into or out of one, connections of other workloads lose nothing, and nothing is
//! left behind.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};
use palisade_testbed::{
    Daemon, Ns, Topology,
    daemon::Settings,
    load::{TcpLoad, UdpLoad},
    ns::wait_until,
    topology::{INNER, INTERNET_V4, INTERNET_V6},
    web::curl,
};
use palisade_tests::OPEN;

#[expect(dead_code, reason = "the tests of sources use the rest")]
mod found;

use found::{WAIT, Workload, wait_found};

/// Namespaces that are made at once.
const BATCH: usize = 20;
/// Time for which a namespace exists at least.
const LIFE: Duration = Duration::from_secs(1);
/// The rate that is aimed at, namespaces a second.
const RATE: usize = 100;
/// Numbers of addresses: more than namespaces exist at once, because the kernel removes an interface later.
const SLOTS: usize = 200;
const TCP: u16 = 7001;
const UDP: u16 = 7002;
/// Long, so that a receiver that gets little CPU is not behind at the end.
const PACE: Duration = Duration::from_millis(20);
/// Address of the metrics, in the node's namespace.
const METRICS: &str = "127.0.0.1:9965";
/// A port at which nothing may arrive.
const DENIED: u16 = 9;

const POLICIES: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "7001", endPort: 7002, protocol: ANY}]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: late}
spec:
  endpointSelector: {matchLabels: {app: late}}
  ingressDeny:
  - fromEntities: [all]
  egressDeny:
  - toEntities: [all]
"#;

/// Returns the addresses of the node and of a workload at their link.
fn addresses(slot: usize) -> [[IpAddr; 2]; 2] {
    let octet = u8::try_from(slot).expect("a slot is less than 256");
    [1, 10].map(|last| {
        [
            Ipv4Addr::new(10, 0, octet, last).into(),
            Ipv6Addr::new(0xfd00, octet.into(), 0, 0, 0, 0, 0, last.into()).into(),
        ]
    })
}

/// Runs lines of ip(8) as one batch, in the network namespace of the calling thread.
fn ip(lines: &str) {
    let mut command = Command::new("ip");
    command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("ip");
    let mut input = child.stdin.take().expect("a pipe");
    input.write_all(lines.as_bytes()).expect("ip reads");
    drop(input);
    let out = child.wait_with_output().expect("ip ends");
    assert!(
        out.status.success(),
        "{lines}\n{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

fn socket(any: IpAddr) -> UdpSocket {
    let domain = socket2::Domain::for_address((any, 0).into());
    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None).expect("socket");
    if any.is_ipv6() {
        socket.set_only_v6(true).expect("IPv6 only");
    }
    socket.set_nonblocking(true).expect("non-blocking");
    socket.bind(&SocketAddr::new(any, DENIED).into()).expect("bind");
    socket.into()
}

/// Sockets at which nothing may arrive.
fn sinks() -> [UdpSocket; 2] {
    [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()].map(socket)
}

/// Returns what has arrived at the sockets.
fn arrived(sinks: &[UdpSocket; 2]) -> Vec<SocketAddr> {
    let next = |socket: &UdpSocket| socket.recv_from(&mut [0; 8]).ok();
    sinks
        .iter()
        .flat_map(|socket| std::iter::from_fn(move || next(socket)))
        .map(|(_, from)| from)
        .collect()
}

/// Makes the addresses of a namespace, sends to all `targets` until `stop`, and returns what has arrived from elsewhere.
fn live_in(
    name: &str,
    slot: usize,
    targets: &[IpAddr],
    (stop, sent): (&AtomicBool, &AtomicU64),
) -> Vec<SocketAddr> {
    let file = File::open(format!("/run/netns/{name}")).expect("namespace");
    setns(file, CloneFlags::CLONE_NEWNET).expect("setns");
    let [[gateway4, gateway6], [v4, v6]] = addresses(slot);
    let sockets = sinks();
    ip(&format!(
        "addr add {v4}/24 dev {INNER}\naddr add {v6}/64 dev {INNER} nodad\nlink set {INNER} up\n\
         route add default via {gateway4}\nroute add default via {gateway6}\n"
    ));
    let mut round = 0_u64;
    // The first packets follow each other closely, since the interface has just appeared.
    while round < 20 || !stop.load(Relaxed) {
        for &to in targets.iter().chain(&[gateway4, gateway6]) {
            let socket = &sockets[usize::from(to.is_ipv6())];
            sent.fetch_add(u64::from(socket.send_to(b"out", (to, DENIED)).is_ok()), Relaxed);
        }
        round += 1;
        thread::sleep(Duration::from_millis(if round < 20 { 2 } else { 100 }));
    }
    arrived(&sockets)
}

/// Some namespaces, and the threads in them.
struct Batch {
    names: Vec<String>,
    threads: Vec<JoinHandle<Vec<SocketAddr>>>,
    stop: Arc<AtomicBool>,
    made: Instant,
}

impl Batch {
    fn make(node: &Ns, first: usize, targets: &[IpAddr], sent: &Arc<AtomicU64>) -> Self {
        let numbers = first..first + BATCH;
        let name = |n: usize| format!("pal-{}-{}-app-late", std::process::id(), 1_000_000 + n);
        let names: Vec<String> = numbers.clone().map(name).collect();
        ip(&names
            .iter()
            .map(|name| format!("netns add {name}\n"))
            .collect::<String>());
        let mut lines = String::new();
        for (n, name) in numbers.clone().zip(&names) {
            let [[v4, v6], _] = addresses(slot(n));
            lines.push_str(&format!(
                "link add veth-{n} type veth peer name {INNER} netns {name}\naddr add {v4}/24 dev veth-{n}\n\
                 addr add {v6}/64 dev veth-{n} nodad\nlink set veth-{n} up\n"
            ));
        }
        node.ip(&lines).expect("links");
        let stop = Arc::new(AtomicBool::new(false));
        let threads = numbers
            .zip(names.clone())
            .map(|(n, name)| {
                let (targets, stop, sent) = (targets.to_vec(), stop.clone(), sent.clone());
                thread::spawn(move || live_in(&name, slot(n), &targets, (&stop, &sent)))
            })
            .collect();
        Self {
            names,
            threads,
            stop,
            made: Instant::now(),
        }
    }

    fn delete(self) {
        thread::sleep(LIFE.saturating_sub(self.made.elapsed()));
        self.stop.store(true, Relaxed);
        for (thread, name) in self.threads.into_iter().zip(&self.names) {
            let arrived = thread.join().expect("the thread in the namespace");
            assert!(arrived.is_empty(), "{name} has got packets of {arrived:?}");
        }
        let lines: String = self
            .names
            .iter()
            .map(|name| format!("netns del {name}\n"))
            .collect();
        ip(&lines);
    }
}

/// Returns the number of a namespace's addresses; 1 to 9 belong to the workloads that stay.
fn slot(number: usize) -> usize {
    10 + number % SLOTS
}

/// Returns the endpoint's name: `LABEL-NUMBER`.
fn name_of(workload: &Workload) -> String {
    let mut parts = workload.ns.name().split('-').skip(2);
    let number = parts.next().expect("a number");
    format!("{}-{number}", parts.last().expect("a label"))
}

fn process(daemon: &Daemon) -> (u64, usize, usize) {
    let pid = daemon.pid().expect("the daemon runs");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("/proc");
    let resident = status
        .lines()
        .find_map(|line| {
            line.strip_prefix("VmRSS:")?
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()
        })
        .expect("VmRSS");
    let count = |dir: &std::path::Path| fs::read_dir(dir).expect("directory").count();
    let descriptors = count(format!("/proc/{pid}/fd").as_ref());
    (resident, descriptors, count(&daemon.pins().join("links")))
}

/// Returns the metrics.
fn metrics(node: &Ns) -> String {
    let got = curl(node, &[&format!("http://{METRICS}/metrics")], OPEN).expect("curl");
    got.body
}

/// Sends packets that are denied until a time series shows the workload.
fn count_drops(node: &Ns, workload: &Workload) {
    let name = format!("source=\"default/{}\"", name_of(workload));
    wait_until("a time series of the endpoint", WAIT, || {
        workload.ns.enter(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("socket");
            socket.send_to(b"out", (INTERNET_V4, DENIED)).expect("sent");
        });
        metrics(node).contains(&name)
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", metrics(node)));
}

/// Waits until no time series shows an endpoint that is gone. Returns how many have ended.
fn ended_series(node: &Ns) -> f64 {
    const ENDED: &str = "palisade_metrics_ended_series_total{metric=\"hubble_drop_total\"} ";
    let mut text = String::new();
    wait_until("the time series of removed endpoints end", WAIT, || {
        text = metrics(node);
        text.contains(ENDED) && !text.contains("default/late-")
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{text}"));
    let ended = text.lines().find_map(|line| line.strip_prefix(ENDED));
    ended.and_then(|value| value.parse().ok()).expect("a number")
}

/// Runs for PALISADE_CHURN seconds, 4 without it.
#[test]
fn namespaces_that_come_and_go_quickly_pass_nothing_that_is_denied() {
    let seconds = std::env::var("PALISADE_CHURN")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(4);
    let topology = Topology::new().unwrap_or_else(|error| panic!("{error:#}"));
    let tables = format!(
        "[[discover]]\nkind = \"netns\"\nnames = [\"pal-{}-*-app-*\"]\nname = \"{{2}}-{{1}}\"\nlabels = {{ app = \"{{2}}\" }}\n\
         addresses = [\"10.0.0.0/16\", \"fd00::/16\"]\n\
         [metrics]\nlisten = \"{METRICS}\"\nseries_grace = \"1s\"\nhubble = [\"drop:sourceContext=pod\"]\n",
        std::process::id()
    );
    let settings = Settings {
        tables,
        ..Settings::default()
    };
    let (server, client) = (Workload::new("server", 1), Workload::new("client", 2));
    server.plug(&topology, "veth-server");
    client.plug(&topology, "veth-client");
    let daemon = Daemon::start(&topology, &settings, &[("policies.yaml", POLICIES)])
        .unwrap_or_else(|error| panic!("{error:#}"));
    for workload in [&server, &client] {
        wait_found(&daemon, &name_of(workload), workload);
    }
    let loads: Vec<_> = server
        .addresses()
        .into_iter()
        .map(|to| {
            let at = |port| SocketAddr::new(to, port);
            (
                TcpLoad::start(&client.ns, &server.ns, at(TCP), PACE).expect("tcp"),
                UdpLoad::start(&client.ns, &server.ns, at(UDP), PACE).expect("udp"),
            )
        })
        .collect();
    let before = process(&daemon);
    let watched = [&topology.internet, &topology.node, &server.ns];
    let sockets = watched.map(|ns| ns.enter(sinks));
    let [v4, v6] = server.addresses();
    let targets = [INTERNET_V4.into(), INTERNET_V6.into(), v4, v6];
    let (sent, tried, stop) = (
        Arc::new(AtomicU64::new(0)),
        AtomicU64::new(0),
        AtomicBool::new(false),
    );
    let mut seen = BTreeSet::new();
    let (mut made, mut begun) = (0, Instant::now());
    thread::scope(|scope| {
        // From the node and from outside to every address that a namespace can have.
        for ns in [&topology.internet, &topology.node] {
            let (tried, stop) = (&tried, &stop);
            scope.spawn(move || {
                ns.join().expect("namespace");
                let sockets = ["0.0.0.0:0", "[::]:0"].map(|any| UdpSocket::bind(any).expect("socket"));
                for n in (0..).take_while(|_| !stop.load(Relaxed)) {
                    let [_, inside] = addresses(slot(n));
                    for (socket, to) in sockets.iter().zip(inside) {
                        tried.fetch_add(u64::from(socket.send_to(b"in", (to, DENIED)).is_ok()), Relaxed);
                    }
                    thread::sleep(Duration::from_micros(500));
                }
            });
        }
        let watcher = scope.spawn(|| {
            let mut seen = BTreeSet::new();
            while !stop.load(Relaxed) {
                let all = daemon.json(&["endpoint", "list"]).expect("endpoints");
                let names = all.as_array().into_iter().flatten();
                seen.extend(names.filter_map(|e| {
                    e["name"]
                        .as_str()?
                        .strip_prefix("default/late-")
                        .map(str::to_owned)
                }));
                thread::sleep(Duration::from_millis(300));
            }
            seen
        });
        begun = Instant::now();
        let (alive, ended) = mpsc::sync_channel::<Batch>(RATE / BATCH);
        let deleter = scope.spawn(|| ended.into_iter().for_each(Batch::delete));
        while begun.elapsed() < Duration::from_secs(seconds) {
            let batch = Batch::make(&topology.node, made, &targets, &sent);
            alive.send(batch).expect("the other thread deletes it");
            made += BATCH;
            let due = Duration::from_secs_f64(made as f64 / RATE as f64);
            thread::sleep(due.saturating_sub(begun.elapsed()));
        }
        drop(alive);
        deleter.join().expect("all are deleted");
        // The kernel removes the interfaces later.
        wait_until("all interfaces are gone", 3 * WAIT, || {
            let links = topology.node.run("ip", &["-o", "link", "show", "type", "veth"]);
            links.is_ok_and(|text| !(0..made).any(|n| text.contains(&format!(" veth-{n}@"))))
        })
        .expect("interfaces");
        stop.store(true, Relaxed);
        seen = watcher.join().expect("watcher");
    });
    let took = begun.elapsed();
    let late = Workload::new("late", 5);
    late.plug(&topology, "veth-late");
    wait_found(&daemon, &name_of(&late), &late);
    let found = begun.elapsed() - took;
    count_drops(&topology.node, &late);
    drop(late);
    for (socket, ns) in sockets.iter().zip(watched) {
        let arrived = arrived(socket);
        assert!(arrived.is_empty(), "{} has got packets of {arrived:?}", ns.name());
    }
    let (mut blocks, mut datagrams) = (0, 0);
    for (tcp, udp) in loads {
        let tcp = tcp.finish(OPEN);
        assert!(tcp.whole(), "{tcp:?}");
        blocks += tcp.returned;
        let udp = udp.finish();
        assert_eq!((udp.lost(), udp.duplicated, udp.changed), (0, 0, 0), "{udp:?}");
        datagrams += udp.received;
    }
    let status = daemon.status().expect("status");
    let drops = status["drops"].as_array().expect("drops");
    assert!(
        drops
            .iter()
            .any(|drop| drop["reason"] == 219 || drop["reason"] == 181),
        "{status}"
    );
    wait_until("nothing of the namespaces is left", WAIT, || {
        let (_, descriptors, links) = process(&daemon);
        descriptors <= before.1 + 4 && links <= before.2
    })
    .unwrap_or_else(|error| {
        panic!(
            "{error:#}: {before:?}, {:?}\n{}",
            process(&daemon),
            daemon.report()
        )
    });
    let ended = ended_series(&topology.node);
    assert!(ended > 0.0, "the time series of the last endpoint has not ended");
    let after = process(&daemon);
    println!(
        "{made} namespaces made and deleted in {:.1} s ({:.0} a second), {} of them seen as endpoints; a further one is \
         found after {:.1} s; {} packets out of them and {} to them, none passed; {blocks} TCP blocks and {datagrams} \
         datagrams of others, none lost; resident {} KiB before, {} KiB after; descriptors {}, {}; links {}, {}; \
         {ended} time series of endpoints have ended",
        took.as_secs_f64(),
        made as f64 / took.as_secs_f64(),
        seen.len(),
        found.as_secs_f64(),
        sent.load(Relaxed),
        tried.load(Relaxed),
        before.0,
        after.0,
        before.1,
        after.1,
        before.2,
        after.2,
    );
    assert!(!seen.is_empty(), "no namespace was found in time");
}
