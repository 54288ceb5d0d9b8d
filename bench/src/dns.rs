//! DNS through policy: queries per second and latency, against no firewall and against a forwarding resolver; and the time
//! from an answer to its forwarding, once its addresses are in the maps.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use palisade_testbed::{
    Topology,
    daemon::{Daemon, Settings},
    dns::{PORT, Perf, PerfPlan, Server, query, rtype},
    topology::{INTERNET_V4, NODE_V4, WorkloadSpec},
};

use crate::{
    Effort,
    memory::resident,
    progress,
    report::{Goal, Measure, Samples, Table, number},
};

/// Names that are queried, each with an address of its own.
const NAMES: usize = 20_000;
/// Queries per second at which latency is measured.
const CALM: u32 = 2_000;

/// Returns a policy that allows the client every name below `bench.example` and its addresses, with `selectors` further
/// names.
fn policy(selectors: usize) -> String {
    let mut text = String::from(
        "\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: names}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [world, host]
    toPorts:
    - ports: [{port: \"53\", protocol: ANY}]
      rules:
        dns: [{matchPattern: \"*.bench.example\"}]
  - toFQDNs:
    - matchPattern: \"*.bench.example\"
",
    );
    for n in 1..selectors {
        text.push_str(&format!("    - matchName: host-{n}.other.example\n"));
    }
    text.push_str("    toPorts: [{ports: [{port: \"443\", protocol: TCP}]}]\n");
    text
}

fn topology() -> Result<Topology> {
    let topology = Topology::new()?.workload(WorkloadSpec::new("client").label("app", "client"))?;
    topology.meet()?;
    Ok(topology)
}

fn guard(topology: &Topology, selectors: usize) -> Result<Daemon> {
    let unguarded_nic = Settings {
        nic: false,
        // Room for the addresses learned before the measurement and for those that are timed.
        tables: "[dns]\naddresses_per_endpoint = 200000\n".into(),
        ..Settings::default()
    };
    Daemon::start(topology, &unguarded_nic, &[("names.yaml", &policy(selectors))])
}

fn address(n: usize) -> Ipv4Addr {
    Ipv4Addr::from(0x6440_0000 + n as u32)
}

/// What is between the client and the name server.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Between {
    Nothing,
    Palisade,
    /// unbound on the node queries the name server for each query.
    Forwarder,
    /// unbound on the node answers repeated queries from its cache.
    Cache,
}

impl Between {
    const ALL: [Self; 4] = [Self::Nothing, Self::Palisade, Self::Forwarder, Self::Cache];

    const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "no firewall",
            Self::Palisade => "Palisade",
            Self::Forwarder => "unbound forwards",
            Self::Cache => "unbound, from its cache",
        }
    }
}

/// A client, a name server, and what is between them.
struct Path {
    topology: Topology,
    asked: SocketAddr,
    daemon: Option<Daemon>,
    _server: Server,
    _forwarder: Option<Server>,
}

impl Path {
    fn new(between: Between) -> Result<Self> {
        let topology = topology()?;
        let upstream = IpAddr::from(INTERNET_V4);
        // A TTL of 0 keeps the forwarder from caching.
        let ttl = if between == Between::Forwarder { 0 } else { 3600 };
        let records: Vec<String> = (0..NAMES)
            .map(|n| format!("h{n}.bench.example. {ttl} IN A {}", address(n)))
            .collect();
        let records: Vec<&str> = records.iter().map(String::as_str).collect();
        let server = Server::knot(&topology.internet, &[upstream], &records)?;
        let daemon = (between == Between::Palisade)
            .then(|| guard(&topology, 10))
            .transpose()?;
        let forwards = matches!(between, Between::Forwarder | Between::Cache);
        let node = IpAddr::from(NODE_V4);
        let forwarder = forwards
            .then(|| Server::unbound_forwarder(&topology.node, &[node], SocketAddr::new(upstream, PORT)))
            .transpose()?;
        Ok(Self {
            topology,
            asked: SocketAddr::new(if forwards { node } else { upstream }, PORT),
            daemon,
            _server: server,
            _forwarder: forwarder,
        })
    }

    fn ask(&self, queries: &[String], seconds: u32, rate: Option<u32>) -> Result<Perf> {
        let plan = PerfPlan {
            server: self.asked,
            queries,
            seconds,
            clients: 4,
            rate,
            outstanding: 100,
            listed: rate.is_some(),
            tcp: false,
        };
        let perf = plan.run(self.topology.ns("client"))?;
        ensure!(
            perf.rcodes.get("NOERROR") == Some(&perf.completed),
            "not all were answered: {perf:?}{}",
            self.daemon.as_ref().map_or_else(String::new, Daemon::report)
        );
        Ok(perf)
    }
}

/// Measures queries per second and latency.
pub fn throughput(effort: Effort) -> Result<Measure> {
    let (rounds, seconds) = effort.pick((3, 1), (9, 2));
    progress(format_args!(
        "dns: {rounds} rounds of {seconds} s, and as many of latency, {} variants",
        Between::ALL.len()
    ));
    let queries: Vec<String> = (0..NAMES).map(|n| format!("h{n}.bench.example A")).collect();
    let paths = Between::ALL
        .map(|between| Path::new(between).with_context(|| between.name()))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    // Fills caches and learns all addresses before the measurement.
    for path in &paths {
        path.ask(&queries, seconds, None)?;
    }
    let mut rates = [const { Samples::new() }; 4];
    let mut p50 = [const { Samples::new() }; 4];
    let mut p99 = [const { Samples::new() }; 4];
    let mut lost = [0_u64; 4];
    for _ in 0..rounds {
        for (n, path) in paths.iter().enumerate() {
            let perf = path.ask(&queries, seconds, None)?;
            rates[n].push(perf.rate);
            lost[n] += perf.lost;
        }
        for (n, path) in paths.iter().enumerate() {
            let perf = path.ask(&queries, seconds, Some(CALM))?;
            p50[n].push(perf.p50 * 1e6);
            p99[n].push(perf.p99 * 1e6);
            lost[n] += perf.lost;
        }
    }
    let mut table = Table::new(
        format!("Queries a second with 100 open, and latency at {CALM} a second"),
        &[
            "between client and name server",
            "queries/s",
            "against none",
            "spread",
            "p50, µs",
            "p99, µs",
            "lost",
        ],
    );
    for (n, between) in Between::ALL.into_iter().enumerate() {
        let against = rates[n].against(&rates[0]);
        table.row(
            between.name(),
            &[
                rates[n].median(),
                against.median(),
                against.spread(),
                p50[n].median(),
                p99[n].median(),
                lost[n] as f64,
            ],
        );
    }
    let ahead = rates[1].against(&rates[2]).median();
    let goals = vec![
        Goal::at_least(
            "DNS queries/s through policy against unbound as a forwarder",
            1.0,
            ahead,
            " ×",
        ),
        Goal::reported(
            "DNS queries/s through policy against none",
            format!("{} ×", number(rates[1].against(&rates[0]).median())),
        ),
        Goal::reported(
            format!("DNS p99 at {CALM} queries/s through policy, none, unbound as a forwarder"),
            format!(
                "{}, {}, {} µs",
                number(p99[1].median()),
                number(p99[0].median()),
                number(p99[2].median())
            ),
        ),
        Goal::at_most(
            "DNS queries that were not answered, through policy",
            0.0,
            lost[1] as f64,
            "",
        ),
    ];
    Ok(Measure {
        name: "dns",
        title: "DNS through policy",
        method: format!(
            "dnsperf in a workload queries knot behind the NIC for {NAMES} names, each with an address of its own; {rounds} rounds of {seconds} s for each figure, the variants in turn. unbound runs on the node, with one thread; \"forwards\": it may cache nothing, so it queries knot each time, as queries that Palisade passes reach knot each time."
        ),
        goals,
        tables: vec![table],
        plot: None,
        notes: Vec::new(),
    })
}

/// A name server that records when it sends each answer.
struct Stamping {
    begin: Instant,
    /// ns since the start.
    sent: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Returns `first` and `count` of `a<first>-<count>.bench.example`, which has `count` addresses from `first` on.
fn asked_range(message: &[u8]) -> Option<(usize, usize)> {
    let length = usize::from(*message.get(12)?);
    let label = std::str::from_utf8(message.get(13..13 + length)?).ok()?;
    let (first, count) = label.strip_prefix('a')?.split_once('-')?;
    Some((first.parse().ok()?, count.parse().ok()?))
}

fn answer(query: &[u8]) -> Option<Vec<u8>> {
    let (first, count) = asked_range(query)?;
    let name_end = 12 + query.get(12..)?.iter().position(|byte| *byte == 0)? + 5;
    let mut message = query.get(..name_end)?.to_vec();
    message[2..4].copy_from_slice(&[0x84, 0x80]);
    message[6..8].copy_from_slice(&(count as u16).to_be_bytes());
    message[8..12].copy_from_slice(&[0; 4]);
    for n in first..first + count {
        message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0x0e, 0x10, 0, 4]);
        message.extend(address(n).octets());
    }
    Some(message)
}

impl Stamping {
    fn start(topology: &Topology) -> Result<Self> {
        let socket = topology
            .internet
            .enter(|| UdpSocket::bind((INTERNET_V4, PORT)))
            .context("name server")?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let begin = Instant::now();
        let (sent, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let thread = thread::spawn({
            let (sent, stop) = (Arc::clone(&sent), Arc::clone(&stop));
            move || {
                let mut buffer = [0; 1500];
                while !stop.load(SeqCst) {
                    let Ok((length, from)) = socket.recv_from(&mut buffer) else {
                        continue;
                    };
                    if let Some(message) = answer(&buffer[..length]) {
                        sent.store(begin.elapsed().as_nanos() as u64, SeqCst);
                        // A lost answer is queried again, and counted.
                        let _ = socket.send_to(&message, from);
                    }
                }
            }
        });
        Ok(Self {
            begin,
            sent,
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Stamping {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A client that sends one query after the other.
struct Asking {
    _topology: Topology,
    server: Stamping,
    socket: UdpSocket,
    daemon: Option<Daemon>,
    next: usize,
}

impl Asking {
    fn new(selectors: Option<usize>) -> Result<Self> {
        let topology = topology()?;
        let server = Stamping::start(&topology)?;
        let daemon = selectors
            .map(|selectors| guard(&topology, selectors))
            .transpose()?;
        let client = topology.get("client");
        let socket = client.ns.enter(|| UdpSocket::bind((client.v4, 0)))?;
        socket.connect((INTERNET_V4, PORT))?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        Ok(Self {
            _topology: topology,
            server,
            socket,
            daemon,
            next: 0,
        })
    }

    /// Queries a new name with `count` addresses. Returns the time from the sending of the answer to its arrival, µs.
    fn ask(&mut self, count: usize) -> Result<f64> {
        let name = format!("a{}-{count}.bench.example", self.next);
        self.next += count;
        let message = query(self.next as u16, &[(&name, rtype::A)]);
        self.socket.send(&message)?;
        let mut buffer = [0; 1500];
        let length = self.socket.recv(&mut buffer).with_context(|| {
            let report = self.daemon.as_ref().map_or_else(String::new, Daemon::report);
            format!("no answer for {name}\n{report}")
        })?;
        let now = self.server.begin.elapsed().as_nanos() as u64;
        ensure!(
            length > message.len() && buffer[..2] == message[..2] && buffer[3] & 15 == 0,
            "another answer to {name}: {:?}",
            &buffer[..length]
        );
        Ok((now - self.server.sent.load(SeqCst)) as f64 / 1e3)
    }

    /// Returns the daemon's resident memory, bytes.
    fn memory(&self) -> Result<f64> {
        let pid = self.daemon.as_ref().and_then(Daemon::pid).context("no daemon")?;
        resident(pid)
    }
}

/// Measures the time from an answer to its forwarding.
pub fn committed(effort: Effort) -> Result<Measure> {
    const LEARNED: usize = 100_000;
    const AT_ONCE: usize = 64;
    let (rounds, questions) = effort.pick((5, 200), (20, 250));
    progress(format_args!(
        "committed: {} answers with nothing, 10 and 10,000 selectors, {LEARNED} addresses",
        rounds * questions
    ));
    let names = [
        "no firewall",
        "10 selectors",
        "10,000 selectors",
        "10,000 selectors, 100,000 addresses",
    ];
    let mut variants = [None, Some(10), Some(10_000), Some(10_000)]
        .into_iter()
        .map(Asking::new)
        .collect::<Result<Vec<_>>>()?;
    let full = &mut variants[3];
    let before = full.memory()?;
    while full.next < LEARNED {
        full.ask(AT_ONCE)?;
    }
    let each = (full.memory()? - before) / full.next as f64;
    let mut samples = [const { Samples::new() }; 4];
    for _ in 0..rounds {
        for (variant, samples) in variants.iter_mut().zip(&mut samples) {
            for _ in 0..questions {
                samples.push(variant.ask(1)?);
            }
        }
    }
    let mut table = Table::new(
        "From the server's sending of an answer to its arrival at the client, µs",
        &["variant", "median", "p99", "longest"],
    );
    for (name, samples) in names.iter().zip(&samples) {
        table.row(
            *name,
            &[samples.median(), samples.quantile(0.99), samples.quantile(1.0)],
        );
    }
    let p99 = |n: usize| samples[n].quantile(0.99);
    Ok(Measure {
        name: "committed",
        title: "From an answer to its forwarding",
        method: format!(
            "A client sends one query after the other, each for a new name with an address of its own. The time is from the sending of the answer to its arrival at the client: two veths, punt, inspection, learning, writes of the maps, and reinjection. {rounds} rounds of {questions}, the variants in turn."
        ),
        goals: vec![
            Goal::reported(
                "answer sent to answer forwarded, p99, 10 and 10,000 selectors, 100,000 addresses beside",
                format!("{}, {}, {} µs", number(p99(1)), number(p99(2)), number(p99(3))),
            ),
            Goal::reported("the same without a firewall", format!("{} µs", number(p99(0)))),
            Goal::reported(
                "memory of the daemon for a learned address, several to a name",
                format!("{} bytes", number(each)),
            ),
        ],
        tables: vec![table],
        plot: None,
        notes: Vec::new(),
    })
}
