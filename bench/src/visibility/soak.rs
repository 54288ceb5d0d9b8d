//! Soak of the flow records: fast, slow and stopped readers, of the command line and of the flow API, and an export at
//! 50,000 flow records per second.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use palisade_flowlog::Uuid;
use palisade_hubble::proto::{
    flow::LostEventSource,
    observer::{GetFlowsRequest, GetFlowsResponse, get_flows_response::ResponseTypes},
};
use palisade_testbed::{daemon::Daemon, ns::temp_dir, topology::INNER};
use prost::Message as _;
use serde_json::Value;
use tokio::runtime;

use super::{
    Forwarding, NEW_FLOWS,
    api::{self, Responses, WIDE_WINDOWS},
    status_number,
};
use crate::{
    Effort,
    memory::resident,
    progress,
    report::{Goal, Measure, Table, number},
    traffic::Sender,
};

/// Wanted flow records per second.
const RATE: f64 = 50_000.0;
/// Time between two batches of packets.
const STEP: Duration = Duration::from_millis(10);
/// Flow records that a slow reader reads per second.
const SLOW_RATE: u32 = 500;
/// Interval at which a slow reader reads.
const SLOW_INTERVAL: Duration = Duration::from_millis(100);
/// HTTP/2 windows of a slow or stopped reader: the initial ones of the protocol (RFC 9113, 6.9.2), bytes.
const NARROW_WINDOWS: (u32, u32) = (65_535, 65_535);
/// Position of the stopped gRPC reader among the readers.
const STOPPED: usize = 4;
/// End of a stream of which the server has not been able to send anything for a minute.
const DEADLINE_EXCEEDED: &str = "gRPC status 4";
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
    /// Whether the stream of the reader has ended, and how.
    ended: OnceLock<String>,
}

impl Received {
    /// Notes a line of `palisade observe -o json`.
    fn line(&self, line: &str) {
        if line.starts_with("{\"lost_events\"") {
            let value: Value = serde_json::from_str(line).unwrap_or_default();
            let lost = &value["lost_events"];
            let count = lost["num_events_lost"]
                .as_str()
                .and_then(|text| text.parse().ok());
            self.lost(lost["source"] == "HUBBLE_RING_BUFFER", count.unwrap_or_default());
            return;
        }
        let uuid = line
            .split_once("\"uuid\":\"")
            .and_then(|(_, rest)| rest.get(..36));
        self.flow(uuid.unwrap_or_default());
    }

    /// Notes a message of `GetFlows`.
    fn message(&self, message: Bytes) -> Result<()> {
        match GetFlowsResponse::decode(message)?.response_types {
            Some(ResponseTypes::Flow(flow)) => self.flow(&flow.uuid),
            Some(ResponseTypes::LostEvents(lost)) => {
                let of_ring = lost.source() == LostEventSource::HubbleRingBuffer;
                self.lost(of_ring, lost.num_events_lost);
            }
            _ => {}
        }
        Ok(())
    }

    /// Notes a report of `count` lost flows. `of_ring`: the reader was too slow.
    fn lost(&self, of_ring: bool, count: u64) {
        if of_ring {
            self.lost.fetch_add(count, Ordering::Relaxed);
        } else {
            self.reports.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flow(&self, uuid: &str) {
        if let Some(number) = Uuid::parse(uuid).and_then(|uuid| uuid.number()) {
            self.flows.fetch_add(1, Ordering::Relaxed);
            self.first.get_or_init(|| number);
            self.last.fetch_max(number, Ordering::Relaxed);
        }
    }

    fn get(counter: &AtomicU64) -> f64 {
        counter.load(Ordering::Relaxed) as f64
    }

    /// Returns how the stream of the reader has ended; an empty text if it has not.
    fn end(&self) -> &str {
        self.ended.get().map_or("", String::as_str)
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

/// How a reader reads until [`Received::is_unpaced`]; then each reads as fast as possible.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pace {
    Fast,
    /// [`SLOW_RATE`].
    Slow,
    /// Only the first record.
    Stopped,
}

/// Returns whether a slow reader pauses after its `n`th record.
fn pauses_after(n: u32) -> bool {
    n.is_multiple_of(SLOW_RATE / 10)
}

/// Counts the lines of a reader of the command line.
fn count(out: ChildStdout, pace: Pace) -> Arc<Received> {
    let received = Arc::<Received>::default();
    let of_thread = Arc::clone(&received);
    thread::spawn(move || {
        for (n, line) in (1_u32..).zip(BufReader::new(out).lines().map_while(Result::ok)) {
            of_thread.line(&line);
            if pace == Pace::Slow && pauses_after(n) && !of_thread.is_unpaced.load(Ordering::Relaxed) {
                thread::sleep(SLOW_INTERVAL);
            }
        }
        let _ = of_thread.ended.set("the command has ended".to_owned());
    });
    received
}

/// Counts the messages of a reader of the flow API. Returns once the server has the request.
fn follow(path: PathBuf, pace: Pace) -> Result<Arc<Received>> {
    let received = Arc::<Received>::default();
    let of_thread = Arc::clone(&received);
    let (opened, is_open) = mpsc::channel();
    thread::spawn(move || {
        let end = follow_to_end(&path, pace, &of_thread, &opened);
        let text = end.unwrap_or_else(|error| format!("{error:#}"));
        let _ = of_thread.ended.set(text);
    });
    if is_open.recv().is_err() {
        bail!("GetFlows: {}", received.end());
    }
    Ok(received)
}

/// Returns the status with which the stream has ended.
fn follow_to_end(path: &Path, pace: Pace, received: &Received, opened: &mpsc::Sender<()>) -> Result<String> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let request = GetFlowsRequest {
            follow: true,
            ..GetFlowsRequest::default()
        };
        let windows = match pace {
            Pace::Fast => WIDE_WINDOWS,
            Pace::Slow | Pace::Stopped => NARROW_WINDOWS,
        };
        let mut responses = Responses::open(path, &request, windows).await?;
        opened.send(())?;
        let mut n = 0;
        while let Some(message) = responses.next().await? {
            received.message(message)?;
            n += 1;
            let is_unpaced = || received.is_unpaced.load(Ordering::Relaxed);
            match pace {
                Pace::Fast => {}
                Pace::Slow if pauses_after(n) && !is_unpaced() => tokio::time::sleep(SLOW_INTERVAL).await,
                Pace::Slow => {}
                // The connection answers the server's pings, but the window stays full.
                Pace::Stopped => {
                    while !is_unpaced() {
                        tokio::time::sleep(SLOW_INTERVAL).await;
                    }
                }
            }
        }
        Ok(format!("gRPC status {}", responses.status().await?))
    })
}

/// Returns VmRSS, MiB.
fn memory_of(daemon: &Daemon) -> Result<f64> {
    Ok(resident(daemon.pid().context("no daemon")?)? / f64::from(1 << 20))
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
        let number = |path: &str| status_number(&status, path);
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
    let fast = count(out, Pace::Fast);
    let (_slow, out) = Follower::start(daemon)?;
    let slow = count(out, Pace::Slow);
    let (stopped, _never_read) = Follower::start(daemon)?;
    let of_api = |pace| follow(api::socket(daemon), pace);
    let readers = [
        ("fast", fast),
        ("slow", slow),
        ("fast, gRPC", of_api(Pace::Fast)?),
        ("slow, gRPC", of_api(Pace::Slow)?),
        ("stopped, gRPC", of_api(Pace::Stopped)?),
    ];
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
    let stalled = &readers[STOPPED].1;
    for (_, reader) in &readers {
        reader.is_unpaced.store(true, Ordering::Relaxed);
    }
    let drained = Instant::now();
    let mut before = Vec::new();
    loop {
        thread::sleep(Duration::from_secs(2));
        let mut now = Vec::new();
        for (name, reader) in &readers {
            // The server ends a stream of which nothing was read for a minute.
            if Arc::ptr_eq(reader, stalled) && reader.end() == DEADLINE_EXCEEDED {
                continue;
            }
            ensure!(
                reader.ended.get().is_none(),
                "the {name} reader has ended: {}",
                reader.end()
            );
            now.push(reader.last.load(Ordering::Relaxed));
        }
        if now == before && now.iter().all(|last| *last == now[0]) {
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
    for (name, reader) in &readers {
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
            "UDP packets of {NEW_FLOWS} flows in turn, with a conntrack map of 4,096 entries, so that nearly each packet begins a flow ({} flow records per packet), at a rate for 50,000 records per second, for {seconds:.0} s. Readers: `palisade observe --follow -o json`, and `GetFlows` over the unix socket of the flow API; the slow ones read {SLOW_RATE} records per second. A third command is stopped (SIGSTOP). A third gRPC reader reads one record and the rest after the last packet. All run on the same CPUs. Memory is VmRSS, each second.",
            number(per_packet)
        ),
        goals: readers
            .iter()
            .map(|(name, reader)| accounted(name, reader))
            .chain([
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
                Goal::reported(
                    "end of the stream that the gRPC reader did not read meanwhile",
                    if stalled.end().is_empty() {
                        "none"
                    } else {
                        stalled.end()
                    },
                ),
            ])
            .collect(),
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
