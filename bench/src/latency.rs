//! Latency that inspection adds: a query and its answer, one after the other, in each waiting mode of the workers, against
//! a node without a firewall.
//!
//! The result depends on the CPUs of client and server. On one CPU the kernel does the whole exchange in a few µs: the
//! sender's thread puts the packet into the receiver's socket, then sleeps, and the receiver runs; no other CPU is woken.
//! The ends of a real network are on different CPUs, and waking an idle one costs more than all of that, most of all in a
//! virtual machine. So client and server run on two CPUs, to which the goal applies, and on one CPU, the worst case for a
//! worker: only the worker must be woken on another CPU.

use std::{
    net::{Ipv4Addr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::{Pid, gettid},
};
use palisade_testbed::{
    Ns, Topology,
    daemon::{Daemon, Settings},
    dns,
    topology::{INTERNET_V4, WorkloadSpec},
};

use crate::{
    Effort, progress,
    report::{Goal, Measure, Samples, Table, number},
};

/// Port of the inspected flow; every query is for a name.
const READ: u16 = dns::PORT;
/// Port of the flow that is allowed without inspection.
const UNREAD: u16 = 5_000;

const POLICY: &str = "\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: latency}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{port: \"53\", protocol: UDP}]
      rules:
        dns: [{matchPattern: \"*.bench.example\"}]
  - toEntities: [world]
    toPorts:
    - ports: [{port: \"5000\", protocol: UDP}]
";

/// Answers every query with NXDOMAIN: nothing is learned from that.
struct Denier {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    ids: Vec<Pid>,
}

/// Pins a thread to a CPU.
fn pin(thread: Pid, processor: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(processor)?;
    sched_setaffinity(thread, &set).with_context(|| format!("processor {processor}"))
}

impl Denier {
    fn start(ns: &Ns, address: Ipv4Addr) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut denier = Self {
            stop: Arc::clone(&stop),
            threads: Vec::new(),
            ids: Vec::new(),
        };
        for port in [READ, UNREAD] {
            let socket = ns
                .enter(|| UdpSocket::bind((address, port)))
                .context("name server")?;
            socket.set_read_timeout(Some(Duration::from_millis(50)))?;
            let stop = Arc::clone(&stop);
            let (tell, told) = mpsc::sync_channel(1);
            denier.threads.push(thread::spawn(move || {
                // The receiver waits.
                let _ = tell.send(gettid());
                let mut buffer = [0; 1500];
                while !stop.load(Relaxed) {
                    let Ok((length, from)) = socket.recv_from(&mut buffer) else {
                        continue;
                    };
                    if let Some(flags) = buffer[..length].get_mut(2..4) {
                        flags.copy_from_slice(&[0x84, 0x83]);
                        // The client counts a lost answer.
                        let _ = socket.send_to(&buffer[..length], from);
                    }
                }
            }));
            denier.ids.push(told.recv()?);
        }
        Ok(denier)
    }
}

impl Drop for Denier {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A client, a server, and the node between them.
struct Path {
    topology: Topology,
    socket: UdpSocket,
    server: Denier,
    next: u16,
}

impl Path {
    fn new() -> Result<Self> {
        let topology = Topology::new()?.workload(WorkloadSpec::new("client").label("app", "client"))?;
        topology.meet()?;
        let server = Denier::start(&topology.internet, INTERNET_V4)?;
        let client = topology.get("client");
        let socket = client.ns.enter(|| UdpSocket::bind((client.v4, 0)))?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        Ok(Self {
            topology,
            socket,
            server,
            next: 0,
        })
    }

    fn guard(&self, mode: &str) -> Result<Daemon> {
        let settings = Settings {
            nic: false,
            tables: format!("[worker]\nmode = {mode:?}\nthreads = 1\n"),
            ..Settings::default()
        };
        Daemon::start(&self.topology, &settings, &[("latency.yaml", POLICY)])
    }

    /// Sends `count` queries. Returns the µs from each query to its answer.
    fn ask(&mut self, kind: &Kind, count: usize) -> Result<Samples> {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        // In its own thread, so that a daemon started later does not inherit the CPU affinity.
        thread::scope(|scope| {
            let thread = scope.spawn(|| self.ask_pinned(kind, count, processors));
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn ask_pinned(&mut self, kind: &Kind, count: usize, processors: usize) -> Result<Samples> {
        pin(Pid::from_raw(0), 0)?;
        for thread in &self.server.ids {
            pin(*thread, usize::from(kind.apart && processors > 1))?;
        }
        let &Kind { port, pause, .. } = kind;
        self.socket.connect((INTERNET_V4, port))?;
        let mut samples = Samples::new();
        for _ in 0..count {
            self.next = self.next.wrapping_add(1);
            let message = dns::query(self.next, &[("www.bench.example", dns::rtype::A)]);
            let mut buffer = [0; 1500];
            let begin = Instant::now();
            self.socket.send(&message)?;
            let length = self.socket.recv(&mut buffer).context("no answer")?;
            samples.push(begin.elapsed().as_nanos() as f64 / 1e3);
            ensure!(
                length == message.len() && buffer[..2] == message[..2] && buffer[3] == 0x83,
                "another answer: {:?}",
                &buffer[..length]
            );
            if !pause.is_zero() {
                thread::sleep(pause);
            }
        }
        Ok(samples)
    }
}

/// What is measured.
struct Kind {
    name: &'static str,
    port: u16,
    /// Whether client and server run on two CPUs.
    apart: bool,
    /// Time between an answer and the next query.
    pause: Duration,
}

const KINDS: [Kind; 4] = [
    Kind {
        name: "inspected, two processors",
        port: READ,
        apart: true,
        pause: Duration::ZERO,
    },
    Kind {
        name: "not inspected, two processors",
        port: UNREAD,
        apart: true,
        pause: Duration::ZERO,
    },
    Kind {
        name: "inspected, two processors, calm",
        port: READ,
        apart: true,
        pause: Duration::from_millis(1),
    },
    Kind {
        name: "inspected, one processor",
        port: READ,
        apart: false,
        pause: Duration::ZERO,
    },
];

/// Quantiles of one variant: their medians over the rounds.
#[derive(Default)]
struct Figures {
    p50: Samples,
    p99: Samples,
}

impl Figures {
    fn take(&mut self, samples: &Samples) {
        self.p50.push(samples.median());
        self.p99.push(samples.quantile(0.99));
    }
}

/// Runs the measure.
pub fn measure(effort: Effort) -> Result<Measure> {
    const MODES: [&str; 3] = ["poll", "spin", "busy-poll"];
    let (rounds, turns, count) = effort.pick((2, 3, 300), (5, 5, 1_000));
    progress(format_args!(
        "latency: {rounds} rounds of {turns} turns of {count} queries, {} modes",
        MODES.len()
    ));
    let (mut open, mut guarded) = (Path::new()?, Path::new()?);
    let mut table = Table::new(
        "From a query to its answer, µs; two punts. \"Calm\": a millisecond between an answer and the next query, so that all threads sleep",
        &[
            "mode, what",
            "p50",
            "p99",
            "no firewall, p50",
            "no firewall, p99",
            "p50 against none",
            "p99 against none",
        ],
    );
    let mut goals = Vec::new();
    for mode in MODES {
        let mut figures: [[Figures; 2]; KINDS.len()] = Default::default();
        for _ in 0..rounds {
            // A worker that spins takes CPU time from all others: only one daemon runs at a time.
            let daemon = guarded.guard(mode)?;
            for turn in 0..turns {
                for (kind, [none, ours]) in KINDS.iter().zip(&mut figures) {
                    let count = if kind.pause.is_zero() { count } else { count / 3 };
                    if turn == 0 {
                        guarded.ask(kind, 50).with_context(|| daemon.report())?;
                    }
                    none.take(&open.ask(kind, count)?);
                    let samples = guarded.ask(kind, count);
                    ours.take(&samples.with_context(|| daemon.report())?);
                }
            }
        }
        for (kind, [none, ours]) in KINDS.iter().zip(&figures) {
            table.row(
                format!("{mode}, {}", kind.name),
                &[
                    ours.p50.median(),
                    ours.p99.median(),
                    none.p50.median(),
                    none.p99.median(),
                    ours.p50.against(&none.p50).median(),
                    ours.p99.against(&none.p99).median(),
                ],
            );
        }
        for (kind, [none, ours]) in KINDS.iter().zip(&figures) {
            if kind.port != READ || !kind.pause.is_zero() {
                continue;
            }
            let p50 = ours.p50.against(&none.p50).median();
            let what = format!(
                "latency of an exchange against kernel forwarding, p50, {mode} mode, {}",
                kind.name
            );
            goals.push(if mode == "poll" && kind.apart {
                Goal::at_most(what, 1.3, p50, " ×")
            } else {
                Goal::reported(what, format!("{} ×", number(p50)))
            });
        }
        let [none, ours] = &figures[0];
        goals.push(Goal::reported(
            format!("the same, p99, {mode} mode, {}", KINDS[0].name),
            format!("{} ×", number(ours.p99.against(&none.p99).median())),
        ));
    }
    Ok(Measure {
        name: "latency",
        title: "Latency of inspected packets",
        method: format!(
            "A workload asks a server behind the NIC by UDP, one query after the other; both are threads that sleep in the kernel. Each exchange has two packets that are punted, inspected and reinjected. Modes are those of `[worker] mode`, with one worker; {rounds} daemons for each, {turns} turns of {count} queries with each, in turn with a node that has no firewall."
        ),
        goals,
        tables: vec![table],
        plot: None,
        notes: Vec::new(),
    })
}
