//! Soak of the flow records: a fast, a slow and a stopped reader and an export at 50,000 flow records per second.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, ChildStdout, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use palisade_flowlog::Uuid;
use palisade_testbed::{daemon::Daemon, ns::temp_dir, topology::INNER};
use serde_json::Value;

use super::{Forwarding, NEW_FLOWS};
use crate::{
    Effort, progress,
    report::{Goal, Measure, Table, number},
    traffic::Sender,
};

/// Wanted flow records per second.
const RATE: f64 = 50_000.0;
/// Time between two batches of packets.
const STEP: Duration = Duration::from_millis(10);
/// Lines that the slow reader reads per second.
const SLOW_LINES: u32 = 500;
/// Longest wait for the rest of the flows after the last packet.
const DRAIN_TIME: Duration = Duration::from_secs(60);
/// Interval between two samples of the daemon's memory.
const MEMORY_INTERVAL: Duration = Duration::from_secs(1);

/// What a reader has received.
#[derive(Default)]
struct Received {
    flows: AtomicU64,
    /// Flows whose loss was reported to the reader.
    lost: AtomicU64,
    /// Reports of losses before the ring. Each has a number in the ring, like a flow.
    reports: AtomicU64,
    /// Numbers in the ring of the first and of the last flow.
    first: OnceLock<u64>,
    last: AtomicU64,
    /// Whether the reader reads as fast as possible.
    is_unpaced: AtomicBool,
}

impl Received {
    fn line(&self, line: &str) {
        if line.starts_with("{\"lost_events\"") {
            let value: Value = serde_json::from_str(line).unwrap_or_default();
            let lost = &value["lost_events"];
            if lost["source"] == "HUBBLE_RING_BUFFER" {
                let count = lost["num_events_lost"]
                    .as_str()
                    .and_then(|text| text.parse().ok());
                self.lost.fetch_add(count.unwrap_or_default(), Ordering::Relaxed);
            } else {
                self.reports.fetch_add(1, Ordering::Relaxed);
            }
            return;
        }
        let uuid = line
            .split_once("\"uuid\":\"")
            .and_then(|(_, rest)| rest.get(..36));
        if let Some(number) = uuid.and_then(Uuid::parse).and_then(|uuid| uuid.number()) {
            self.flows.fetch_add(1, Ordering::Relaxed);
            self.first.get_or_init(|| number);
            self.last.fetch_max(number, Ordering::Relaxed);
        }
    }

    fn get(counter: &AtomicU64) -> f64 {
        counter.load(Ordering::Relaxed) as f64
    }

    /// Returns how many numbers the ring has assigned from the first to the last flow, and how many of them this reader
    /// has received or has a report about.
    fn account(&self) -> (u64, u64) {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let first = self.first.get().copied().unwrap_or_default();
        let known = of(&self.flows) + of(&self.lost) + of(&self.reports);
        (of(&self.last) + 1 - first, known)
    }
}

/// `palisade observe --follow -o json`. Dropping the value ends it.
struct Follower(Child);

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Follower {
    fn start(daemon: &Daemon) -> Result<(Self, ChildStdout)> {
        let mut command = daemon.command(&["observe", "--follow", "-o", "json"]);
        let command = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().context("palisade observe")?;
        let out = child.stdout.take().context("the output of palisade observe")?;
        Ok((Self(child), out))
    }

    fn stop(&self) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.0.id())?), Signal::SIGSTOP).context("stopping a reader")
    }
}

/// Counts the lines of a reader; `pace`: lines per second until [`Received::is_unpaced`]; `None`: as fast as possible.
fn count(out: ChildStdout, pace: Option<u32>) -> Arc<Received> {
    let received = Arc::<Received>::default();
    let of_thread = Arc::clone(&received);
    thread::spawn(move || {
        for (n, line) in (1_u32..).zip(BufReader::new(out).lines().map_while(Result::ok)) {
            of_thread.line(&line);
            // A tenth of the lines each 100 ms, so that the reader is slow and not stopped.
            if let Some(pace) = pace
                && n % (pace / 10) == 0
                && !of_thread.is_unpaced.load(Ordering::Relaxed)
            {
                thread::sleep(Duration::from_millis(100));
            }
        }
    });
    received
}

/// Returns VmRSS, MiB.
fn memory_of(daemon: &Daemon) -> Result<f64> {
    let pid = daemon.pid().context("no daemon")?;
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let rss = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = rss.and_then(|rss| rss.trim().trim_end_matches(" kB").parse::<f64>().ok());
    Ok(kib.context("no VmRSS")? / 1_024.0)
}

/// Counters of the daemon.
#[derive(Clone, Copy)]
struct Sample {
    events: f64,
    exported: f64,
    export_lost: f64,
    slow_clients: f64,
    /// VmRSS, MiB.
    memory: f64,
}

impl Sample {
    fn of(daemon: &Daemon) -> Result<Self> {
        let status = daemon.status()?;
        let number = |path: &str| {
            let value = status.pointer(path).and_then(Value::as_f64);
            value.with_context(|| format!("{path} is not in the status: {status}"))
        };
        Ok(Self {
            events: number("/events/read")?,
            exported: number("/exports/0/written")?,
            export_lost: number("/exports/0/lost")?,
            slow_clients: number("/events/slow_clients")?,
            memory: memory_of(daemon)?,
        })
    }
}

/// Measures readers and memory at a constant rate of flow records.
pub fn measure(effort: Effort) -> Result<Measure> {
    let duration = effort.pick(Duration::from_secs(20), Duration::from_secs(300));
    progress(format_args!("soak-flows: {} s", duration.as_secs()));
    let dir = temp_dir("soak")?;
    let export = format!(
        "[[export]]\nname = \"soak\"\nfile = \"{}\"\nmax_size = 100\nmax_backups = 1\n",
        dir.path().join("flows.log").display()
    );
    let limits = "[limits]\nevents_per_second = 1000000\nflows = 65536\nconntrack = 4096\n";
    let node = Forwarding::configured(NEW_FLOWS, format!("{limits}{export}"))?;
    let daemon = &node.daemon;
    // Records per packet: a new flow has an event of its verdict and one of its begin.
    let before = Sample::of(daemon)?.events;
    let probe = &node.frames[..5_000];
    node.topology
        .internet
        .enter(|| Sender::open(INNER)?.send(probe))?;
    thread::sleep(Duration::from_secs(1));
    let per_packet = (Sample::of(daemon)?.events - before) / probe.len() as f64;
    ensure!(per_packet > 0.5, "{per_packet} flow records per packet");

    let (_fast, out) = Follower::start(daemon)?;
    let fast = count(out, None);
    let (_slow, out) = Follower::start(daemon)?;
    let slow = count(out, Some(SLOW_LINES));
    let (stopped, _never_read) = Follower::start(daemon)?;
    thread::sleep(Duration::from_secs(1));
    stopped.stop()?;
    let begin = Sample::of(daemon)?;
    let packets = (RATE / per_packet * STEP.as_secs_f64()).round() as usize;
    let ended = AtomicBool::new(false);
    let (took, memory) = thread::scope(|scope| {
        let memory = scope.spawn(|| {
            let mut samples = Vec::new();
            while !ended.load(Ordering::Relaxed) {
                samples.push(memory_of(daemon)?);
                thread::sleep(MEMORY_INTERVAL);
            }
            Ok::<_, anyhow::Error>(samples)
        });
        let took = send(&node, packets, duration);
        ended.store(true, Ordering::Relaxed);
        let memory = memory
            .join()
            .map_err(|_| anyhow!("the sampling of the memory has failed"));
        Ok::<_, anyhow::Error>((took?, memory??))
    })?;
    let made = Sample::of(daemon)?.events - begin.events;
    slow.is_unpaced.store(true, Ordering::Relaxed);
    let drained = Instant::now();
    let last = || [&fast, &slow].map(|reader| reader.last.load(Ordering::Relaxed));
    let mut before = last();
    loop {
        thread::sleep(Duration::from_secs(2));
        let now = last();
        if now == before && now[0] == now[1] {
            break;
        }
        ensure!(
            drained.elapsed() < DRAIN_TIME,
            "the readers do not catch up: {now:?}"
        );
        before = now;
    }
    let end = Sample::of(daemon)?;
    let mut table = Table::new(
        "Flow records",
        &[
            "reader",
            "received",
            "lost, as reported to the reader",
            "received/s",
        ],
    );
    let seconds = took.as_secs_f64();
    let mut row = |name: &str, received: f64, lost: f64| {
        table.row(name, &[received, lost, received / seconds]);
    };
    row("recorded", made, 0.0);
    for (name, reader) in [("fast", &fast), ("slow", &slow)] {
        row(name, Received::get(&reader.flows), Received::get(&reader.lost));
    }
    row(
        "export",
        end.exported - begin.exported,
        end.export_lost - begin.export_lost,
    );
    let accounted = |name: &str, reader: &Received| {
        let (numbers, known) = reader.account();
        Goal::at_most(
            format!(
                "flow records that the {name} reader neither received nor has a report about, of {numbers}"
            ),
            0.0,
            numbers as f64 - known as f64,
            "",
        )
    };
    // The first fifth of the time: buffers and rings become full.
    let settled = &memory[memory.len() / 5..];
    let (low, high) = settled.iter().fold((f64::MAX, 0.0_f64), |(low, high), sample| {
        (low.min(*sample), high.max(*sample))
    });
    let grown = settled.last().unwrap_or(&high) - settled.first().unwrap_or(&low);
    Ok(Measure {
        name: "soak-flows",
        title: "Readers at a constant rate of flow records",
        method: format!(
            "UDP packets of {NEW_FLOWS} flows in turn, with a conntrack map of 4,096 entries, so that nearly each packet begins a flow ({} flow records per packet), at a rate for 50,000 records per second, for {seconds:.0} s. Readers: `palisade observe --follow -o json`; the slow one reads {SLOW_LINES} lines per second, a third one is stopped (SIGSTOP). All run on the same CPUs. Memory is VmRSS, each second.",
            number(per_packet)
        ),
        goals: vec![
            accounted("fast", &fast),
            accounted("slow", &slow),
            Goal::reported("flow records per second", number(made / seconds)),
            Goal::reported(
                "memory of the daemon before the load, and lowest and highest after a fifth of the time",
                format!(
                    "{}, {} and {} MiB",
                    number(begin.memory),
                    number(low),
                    number(high)
                ),
            ),
            Goal::at_most(
                "growth of the memory after a fifth of the time",
                8.0,
                grown,
                " MiB",
            ),
            Goal::reported(
                "readers that were disconnected because they did not read",
                number(end.slow_clients - begin.slow_clients),
            ),
        ],
        tables: vec![table],
        plot: None,
        notes: Vec::new(),
    })
}

/// Sends `packets` packets each [`STEP`].
fn send(node: &Forwarding, packets: usize, duration: Duration) -> Result<Duration> {
    node.topology.internet.enter(|| {
        let sender = Sender::open(INNER)?;
        let begun = Instant::now();
        let mut turn = node.frames.chunks(packets).cycle();
        for step in 1.. {
            if begun.elapsed() >= duration {
                break;
            }
            if let Some(frames) = turn.next() {
                sender.send(frames)?;
            }
            thread::sleep((STEP * step).saturating_sub(begun.elapsed()));
        }
        Ok(begun.elapsed())
    })
}
