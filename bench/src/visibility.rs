//! Cost of visibility: events, records, metrics and a reader that follows all flows, against as little of them as the
//! configuration allows; memory of the flow ring. The flow API is in `api`, the soak with slow readers in `soak`.

pub mod api;
pub mod soak;

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    process::{Child, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sched::{CloneFlags, setns};
use palisade_abi::{Addr, Event, EventKind, MatchKind, Reason, protocol};
use palisade_flowlog::{Flow, FlowResolver, Owner, Resolver, Ring, RuleInfo, Timestamp};
use palisade_inspect::record::{Record, Text, Verdict, What, Word};
use palisade_testbed::{
    Topology,
    daemon::{Daemon, Settings},
    ns::wait_until,
    topology::{INNER, INTERNET_V4, NIC, WorkloadSpec},
};
use serde_json::Value;
use zerocopy::FromZeros as _;

use crate::{
    Effort,
    forward::packets_received,
    memory::count,
    policies::files,
    progress,
    report::{Goal, Measure, Samples, Table, number},
    traffic::{Frame, Sender, Stream, mac},
    web::{Between, Path},
};

/// Configuration with as little visibility as possible: one event per second, CPU, kind and reason.
const OFF: &str = "[limits]\nevents_per_second = 1\nflows = 16\n";
/// Configuration with the default events and all metrics.
const ON: &str = "[metrics]\nlisten = \"127.0.0.1:9965\"\nhubble = [\"dns\", \"drop\", \"flow\", \"httpV2\", \"icmp\", \
                  \"policy\", \"port-distribution\", \"tcp\"]\n";
/// The variants, for the report.
const VARIANTS: &str = "Off: at most one event per second, CPU, kind and reason, no metrics, no reader. On: the default events, the metrics of all kinds, requested each second, and `palisade observe --follow -o json`.";
/// Address of the metrics.
const METRICS: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 9_965);
/// Request of a scraper.
const SCRAPE: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
/// Time between two scrapes.
const SCRAPE_INTERVAL: Duration = Duration::from_secs(1);
/// Port of the packets.
const PORT: u16 = 5_000;
/// Flows of the traffic with established flows.
const ESTABLISHED_FLOWS: u16 = 64;
/// Flows of the traffic with new flows. The conntrack map of that measure has fewer entries, so a flow is evicted
/// before its next packet.
const NEW_FLOWS: u16 = 40_000;
/// Limit of the conntrack map for new flows.
const SMALL_CONNTRACK: &str = "conntrack = 4096\n";
/// Connections that wrk keeps open.
const CONNECTIONS: usize = 16;

/// What makes use of the visibility of a daemon: a process that follows all flows, and a thread that requests the
/// metrics each second, as a scraper on another machine does. Dropping the value ends them.
struct Readers {
    observe: Child,
    scraper: Option<JoinHandle<Result<()>>>,
    ends: Arc<AtomicBool>,
}

impl Readers {
    fn start(daemon: &Daemon, topology: &Topology) -> Result<Self> {
        let null = || Stdio::null();
        let mut observe = daemon.command(&["observe", "--follow", "-o", "json"]);
        let observe = observe.stdin(null()).stdout(null()).stderr(null()).spawn();
        let observe = observe.context("starting palisade observe")?;
        let ends = Arc::new(AtomicBool::new(false));
        let node = topology.node.fd().try_clone_to_owned()?;
        let scraper = thread::spawn({
            let ends = Arc::clone(&ends);
            move || {
                setns(node, CloneFlags::CLONE_NEWNET)?;
                scrape(&ends)
            }
        });
        let mut readers = Self {
            observe,
            scraper: Some(scraper),
            ends,
        };
        thread::sleep(Duration::from_millis(300));
        readers.check()?;
        Ok(readers)
    }

    /// Fails if a reader has ended.
    fn check(&mut self) -> Result<()> {
        let ended = self.observe.try_wait()?;
        ensure!(ended.is_none(), "the following reader has ended: {ended:?}");
        if let Some(scraper) = self.scraper.take_if(|scraper| scraper.is_finished()) {
            scraper
                .join()
                .map_err(|_| anyhow!("the scraper has panicked"))??;
        }
        Ok(())
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.ends.store(true, Relaxed);
        let _ = self.observe.kill();
        let _ = self.observe.wait();
        if let Some(scraper) = self.scraper.take() {
            let _ = scraper.join();
        }
    }
}

/// Requests the metrics, each second, until `ends`.
fn scrape(ends: &AtomicBool) -> Result<()> {
    let mut response = Vec::new();
    while !ends.load(Relaxed) {
        let mut stream = TcpStream::connect(METRICS)?;
        stream.write_all(SCRAPE)?;
        response.clear();
        stream.read_to_end(&mut response)?;
        ensure!(response.starts_with(b"HTTP/1.1 200"), "no metrics");
        let begun = Instant::now();
        while !ends.load(Relaxed) && begun.elapsed() < SCRAPE_INTERVAL {
            thread::park_timeout(Duration::from_millis(50));
        }
    }
    Ok(())
}

/// A node with Palisade between the internet and a workload, and frames from the internet.
struct Forwarding {
    topology: Topology,
    daemon: Daemon,
    frames: Vec<Frame>,
    readers: Option<Readers>,
}

impl Forwarding {
    fn new(flows: u16, visible: bool) -> Result<Self> {
        let mut tables = String::from(if visible { ON } else { OFF });
        if flows == NEW_FLOWS {
            let limits = if visible { "[limits]\n" } else { "" };
            tables.push_str(limits);
            tables.push_str(SMALL_CONNTRACK);
        }
        let mut node = Self::configured(flows, tables)?;
        if visible {
            node.readers = Some(Readers::start(&node.daemon, &node.topology)?);
        }
        Ok(node)
    }

    /// Returns a node whose configuration has these tables, without readers.
    fn configured(flows: u16, tables: String) -> Result<Self> {
        let topology = Topology::new()?.workload(WorkloadSpec::new("server").label("app", "server"))?;
        let server = topology.get("server");
        let stream = Stream {
            from_mac: mac(&topology.internet, INNER)?,
            to_mac: mac(&topology.node, NIC)?,
            from: INTERNET_V4,
            to: server.v4,
        };
        // The server receives frames with the MAC address of another host: its kernel counts and drops them at once.
        topology.node.ip(&format!(
            "neigh replace {} lladdr 02:00:5e:00:53:ff dev {} nud permanent\n",
            server.v4, server.interface
        ))?;
        let files = files(10, "server", &INTERNET_V4.to_string(), PORT);
        let policies: Vec<_> = files
            .iter()
            .map(|(name, text)| (name.as_str(), text.as_str()))
            .collect();
        let settings = Settings {
            nic: false,
            tables,
            ..Settings::default()
        };
        let daemon = Daemon::start(&topology, &settings, &policies)?;
        Ok(Self {
            frames: (20_000..20_000 + flows)
                .map(|port| stream.frame(port, PORT))
                .collect(),
            topology,
            daemon,
            readers: None,
        })
    }

    fn received(&self) -> Result<u64> {
        packets_received(&self.topology.get("server").ns, INNER)
    }

    /// Sends one packet of each flow and waits until all have arrived.
    fn establish(&self) -> Result<()> {
        let before = self.received()?;
        self.topology
            .internet
            .enter(|| Sender::open(INNER)?.send(&self.frames))?;
        let all = || {
            self.received()
                .is_ok_and(|now| now >= before + self.frames.len() as u64)
        };
        wait_until("a packet of each flow arrives", Duration::from_secs(5), all)
    }

    /// Returns packets that arrived per CPU second of the sender, and per second.
    fn sample(&mut self, duration: Duration) -> Result<(f64, f64)> {
        let before = self.received()?;
        let begin = Instant::now();
        let (sent, took) = self
            .topology
            .internet
            .enter(|| Sender::open(INNER)?.send_for(&self.frames, duration))?;
        let elapsed = begin.elapsed();
        thread::sleep(Duration::from_millis(20));
        let arrived = self.received()? - before;
        ensure!(
            arrived * 10 >= sent * 9,
            "{sent} packets were sent and {arrived} arrived\n{}",
            self.daemon.report()
        );
        if let Some(readers) = &mut self.readers {
            readers.check()?;
        }
        Ok((
            arrived as f64 / took.as_secs_f64(),
            arrived as f64 / elapsed.as_secs_f64(),
        ))
    }
}

/// Returns a number in the daemon's status. `path`: a JSON pointer (RFC 6901).
fn status_number(status: &Value, path: &str) -> Result<f64> {
    let value = status.pointer(path).and_then(Value::as_f64);
    value.with_context(|| format!("{path} is not in the status: {status}"))
}

/// Measures the packet path with visibility off and on.
pub fn packets(effort: Effort) -> Result<Measure> {
    let rounds = effort.pick(5, 11);
    let duration = effort.pick(Duration::from_millis(300), Duration::from_millis(800));
    let mut goals = Vec::new();
    let mut packets = Table::new(
        "Packets",
        &[
            "flows",
            "off",
            "on",
            "on against off",
            "spread",
            "wall clock, on against off",
        ],
    );
    for (name, flows) in [("established", ESTABLISHED_FLOWS), ("new", NEW_FLOWS)] {
        progress(format_args!("visibility: {name} flows, {rounds} rounds"));
        let mut variants = [Forwarding::new(flows, false)?, Forwarding::new(flows, true)?];
        let [mut cpu, mut wall] = [const { [Samples::new(), Samples::new()] }; 2];
        for variant in &variants {
            variant.establish()?;
        }
        for round in 0..=rounds {
            for (n, variant) in variants.iter_mut().enumerate() {
                let (of_cpu, of_wall) = variant.sample(duration)?;
                if round > 0 {
                    cpu[n].push(of_cpu);
                    wall[n].push(of_wall);
                }
            }
        }
        let ratio = cpu[1].against(&cpu[0]);
        packets.row(
            name,
            &[
                cpu[0].median(),
                cpu[1].median(),
                ratio.median(),
                ratio.spread(),
                wall[1].against(&wall[0]).median(),
            ],
        );
        goals.push(Goal::at_least(
            format!("packets per CPU second, {name} flows, visibility on against off"),
            0.95,
            ratio.median(),
            " ×",
        ));
    }

    Ok(Measure {
        name: "visibility",
        title: "Cost of visibility: packets",
        method: format!(
            "{VARIANTS} Packets: {ESTABLISHED_FLOWS} established UDP flows, or {NEW_FLOWS} flows with a conntrack map of 4,096 entries, so that nearly each packet begins a flow; as in \"Packets a second through namespaces\", per CPU time of the sending thread. {rounds} rounds, the variants in turn."
        ),
        goals,
        tables: vec![packets],
        plot: None,
        notes: Vec::new(),
    })
}

/// Measures HTTP requests with visibility off and on.
pub fn http(effort: Effort) -> Result<Measure> {
    let (starts, rounds, seconds) = effort.pick((3, 3, 1), (7, 3, 3));
    let [mut without, mut metrics, mut all] = [const { Samples::new() }; 3];
    for start in 1..=starts {
        let off = Path::configured(Between::Palisade, 10, 1 << 20, OFF)?;
        let on = Path::configured(Between::Palisade, 10, 1 << 20, ON)?;
        // The first round warms up.
        for round in 0..=rounds {
            let rate =
                |path: &Path| Ok::<_, anyhow::Error>(path.load(CONNECTIONS, seconds, false, false)?.rate);
            let daemon = on.daemon.as_ref().context("no daemon")?;
            let quiet = rate(&off)?;
            let scraped = rate(&on)?;
            let mut readers = Readers::start(daemon, &on.topology)?;
            let followed = rate(&on)?;
            readers.check()?;
            if round > 0 {
                without.push(quiet);
                metrics.push(scraped);
                all.push(followed);
            }
        }
        progress(format_args!("visibility-http: start {start} of {starts}"));
    }
    let columns = [
        "visibility",
        "requests/s",
        "against off",
        "spread",
        "against the row before",
        "spread",
    ];
    let mut http = Table::new("HTTP requests/s on persistent connections", &columns);
    http.row("off", &[without.median(), 1.0, 0.0, 1.0, 0.0]);
    for (name, samples, before) in [
        ("events and metrics", &metrics, &without),
        ("and a reader of all flows", &all, &metrics),
    ] {
        let (ratio, step) = (samples.against(&without), samples.against(before));
        let row = [
            samples.median(),
            ratio.median(),
            ratio.spread(),
            step.median(),
            step.spread(),
        ];
        http.row(name, &row);
    }
    let goal = |what: &str, samples: &Samples| {
        let ratio = samples.against(&without).median();
        Goal::at_least(format!("HTTP requests/s, {what} against off"), 0.95, ratio, " ×")
    };
    Ok(Measure {
        name: "visibility-http",
        title: "Cost of visibility: HTTP",
        method: format!(
            "{VARIANTS} As in \"HTTP through policy\", wall clock; with two CPUs, client, server, worker and readers share them. Both daemons are started {starts} times, because a start has a rate of its own; each time {rounds} rounds of {seconds} s, the variants in turn, after one that is not counted."
        ),
        goals: vec![
            goal("events and metrics", &metrics),
            goal("events, metrics and a following reader", &all),
        ],
        tables: vec![http],
        plot: None,
        notes: Vec::new(),
    })
}

/// Names of one workload and one peer.
struct Names;

impl FlowResolver for Names {
    fn node(&self) -> Arc<str> {
        "node1".into()
    }

    fn labels(&self, _: u32) -> Option<Arc<[Arc<str>]>> {
        None
    }

    fn endpoint(&self, id: u16) -> Option<Owner> {
        (id == 1).then(|| Owner {
            endpoint: 1,
            identity: 256,
            namespace: "default".into(),
            name: "server".into(),
            ..Owner::default()
        })
    }

    fn address(&self, _: std::net::IpAddr) -> Option<Owner> {
        None
    }

    fn rule(&self, _: u32) -> Option<RuleInfo> {
        None
    }

    fn interface(&self, _: u32) -> Option<Arc<str>> {
        None
    }

    fn dns_names(&self, _: u16, _: std::net::IpAddr) -> Arc<[Arc<str>]> {
        Arc::default()
    }
}

/// Returns the event of an allowed TCP connection to the workload; `n` selects the source.
fn event(n: u32) -> Event {
    Event {
        source: Addr::from(std::net::IpAddr::from(Ipv4Addr::from(0xcb00_7100 | (n & 0xff)))),
        destination: Addr::from(std::net::IpAddr::from(Ipv4Addr::new(10, 0, 1, 10))),
        source_port: 1_024 + (n % 60_000) as u16,
        destination_port: 443,
        source_identity: palisade_abi::identity::WORLD_IPV4,
        length: 60,
        endpoint: 1,
        kind: EventKind::PolicyVerdict as u8,
        reason: Reason::Allowed as u8,
        protocol: protocol::TCP,
        tcp_flags: 2,
        match_kind: MatchKind::L3L4 as u8,
        ..Event::new_zeroed()
    }
}

/// Returns the record of a request to the workload; `n` selects the source.
fn record(n: u32) -> Record {
    let event = event(n);
    Record {
        endpoint: 1,
        ingress: true,
        reply: false,
        source: (event.source, event.source_port),
        destination: (event.destination, event.destination_port),
        protocol: protocol::TCP,
        remote_identity: event.source_identity,
        ifindex: 5,
        verdict: Verdict::Forwarded,
        reason: Reason::Allowed,
        rule: 1,
        latency: None,
        what: What::HttpRequest {
            method: Word::from(&b"GET"[..]),
            version: 1,
            url: Text::from(&b"http://api.bench.example/api/v1/items/4711?limit=20"[..]),
            headers: Text::default(),
            mismatch: false,
        },
    }
}

/// Measures the memory of a full ring.
pub fn memory(effort: Effort) -> Result<Measure> {
    const SIZES: [usize; 2] = [16_384, 1_000_000];
    progress(format_args!("flow-memory: {SIZES:?} flows"));
    let _ = effort;
    let names: Resolver = Arc::new(Names);
    let mut table = Table::new(
        "Memory of a full ring, MiB",
        &[
            "flows",
            "events",
            "records of HTTP, not converted",
            "the same, converted",
        ],
    );
    let mut goals = Vec::new();
    for size in SIZES {
        let numbers = || 0..size as u32;
        let (ring, events, _) = count(|| {
            let ring = Ring::new(size);
            for n in numbers() {
                ring.push(Flow::from_event(&event(n), &*names, 0));
            }
            ring
        });
        ensure!(ring.len() == size, "{} flows are in the ring", ring.len());
        drop(ring);
        let (ring, records, _) = count(|| {
            let ring = Ring::new(size);
            for n in numbers() {
                ring.push_record(&record(n), &names, Timestamp(u64::from(n).cast_signed()));
            }
            ring
        });
        drop(ring);
        let (ring, converted, _) = count(|| {
            let ring = Ring::new(size);
            for n in numbers() {
                ring.push_record(&record(n), &names, Timestamp(u64::from(n).cast_signed()));
            }
            ring.settle(Timestamp::MAX);
            ring
        });
        drop(ring);
        let [events, records, converted] =
            [events, records, converted].map(|bytes| bytes / f64::from(1 << 20));
        table.row(number(size as f64), &[events, records, converted]);
        goals.push(Goal::reported(
            format!("memory of {} recorded flows", number(size as f64)),
            format!("{} MiB", number(events.max(records).max(converted))),
        ));
    }
    Ok(Measure {
        name: "flow-memory",
        title: "Memory of recorded flows",
        method: "The ring of flow records is filled in this process, with events of allowed TCP connections, or with records of HTTP requests that no reader has converted yet, or that are converted; bytes are counted at the allocator.".into(),
        goals,
        tables: vec![table],
        plot: None,
        notes: Vec::new(),
    })
}
