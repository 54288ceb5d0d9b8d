//! Speed of `palisade replay` without inspection, with HTTP and with DNS, and its memory.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    path::Path,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use palisade_testbed::{
    Topology,
    daemon::{Daemon, Settings},
    ns::temp_dir,
    topology::{INTERNET_V4, WorkloadSpec},
};
use serde_json::Value;

use crate::{
    Effort,
    memory::peak_resident,
    parsers::{dns_exchange, http_connection},
    policies::files,
    progress,
    report::{Goal, Measure, Samples, Table, number},
    traffic::Stream,
};

/// Flows of the capture without inspection.
const FLOWS: u16 = 1_000;
/// Port of these flows.
const PORT: u16 = 5_000;
/// Flows that are live at a time while memory is measured, and source ports of that capture. There are more ports, so
/// that each packet begins a flow.
const LIVE_FLOWS: u16 = 16_384;
const PORTS: u16 = 60_000;
/// First port of the clients whose traffic is inspected.
const FIRST_PORT: u16 = 1_024;
/// Application rules for what the workload sends.
const INSPECTED: &str = "\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: inspected}
spec:
  endpointSelector: {matchLabels: {app: server}}
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{port: \"53\", protocol: UDP}]
      rules: {dns: [{matchPattern: \"*.bench.example\"}]}
    - ports: [{port: \"80\", protocol: TCP}]
      rules: {http: [{method: GET, path: \"/api/v1/items/[0-9]+([?].*)?\"}]}
";

/// A capture file.
struct Capture {
    out: BufWriter<File>,
    packets: u32,
}

impl Capture {
    fn create(file: &Path) -> Result<Self> {
        let mut out = BufWriter::new(File::create(file)?);
        // Magic number, version 2.4, time zone, accuracy, snapshot length, link type Ethernet.
        for word in [0xa1b2_3c4d_u32, 0x0004_0002, 0, 0, 65_535, 1] {
            out.write_all(&word.to_le_bytes())?;
        }
        Ok(Self { out, packets: 0 })
    }

    /// Adds a frame, 1 µs after the last one.
    fn push(&mut self, frame: &[u8]) -> Result<()> {
        let length = frame.len() as u32;
        let (seconds, microseconds) = (self.packets / 1_000_000, self.packets % 1_000_000);
        for word in [1_700_000_000 + seconds, microseconds * 1_000, length, length] {
            self.out.write_all(&word.to_le_bytes())?;
        }
        self.out.write_all(frame)?;
        self.packets += 1;
        Ok(())
    }

    /// Returns the number of packets, and the size of the file in bytes.
    fn finish(mut self) -> Result<(u32, u64)> {
        self.out.flush()?;
        Ok((self.packets, self.out.get_ref().metadata()?.len()))
    }
}

/// A capture of one kind of packets.
struct Kind {
    name: &'static str,
    /// Messages that are inspected.
    messages: u64,
    packets: u32,
    /// Size of the file, bytes.
    size: u64,
    file: String,
}

/// Replays a capture. Returns its packets per second.
fn rate(daemon: &Daemon, folder: &str, kind: &Kind) -> Result<f64> {
    let begin = Instant::now();
    let text = daemon.cli(&[
        "replay",
        &kind.file,
        "--policy",
        folder,
        "--summary",
        "-o",
        "json",
    ])?;
    let took = begin.elapsed().as_secs_f64();
    let summary: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    ensure!(
        summary["packets"] == kind.packets && summary["records"]["forwarded"] == kind.messages,
        "not all packets were replayed, or not all messages were inspected and allowed: {text}"
    );
    Ok(f64::from(kind.packets) / took)
}

/// Replays a capture. Returns the largest resident memory of the command, MiB.
fn peak(daemon: &Daemon, folder: &str, kind: &Kind) -> Result<f64> {
    let mut command = daemon.command(&["replay", &kind.file, "--policy", folder, "--summary"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    let mut peak = 0.0;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        // A process that has ended and was not waited for has no such value.
        peak = peak_resident(child.id()).unwrap_or(peak);
        thread::sleep(Duration::from_millis(2));
    };
    ensure!(status.success(), "palisade replay: {status}");
    ensure!(peak > 0.0, "the memory of palisade replay was not read");
    Ok(peak / f64::from(1 << 20))
}

/// Writes a capture. `fill` returns the number of messages that are inspected.
fn write(dir: &Path, name: &'static str, fill: impl FnOnce(&mut Capture) -> Result<u64>) -> Result<Kind> {
    let file = dir.join(format!("{}.pcap", name.replace(' ', "-")));
    let mut capture = Capture::create(&file)?;
    let messages = fill(&mut capture)?;
    let (packets, size) = capture.finish()?;
    Ok(Kind {
        name,
        messages,
        packets,
        size,
        file: file.display().to_string(),
    })
}

/// Measures `palisade replay`.
pub fn measure(effort: Effort) -> Result<Measure> {
    let (rounds, packets, clients) = effort.pick((3, 1_000_000_u32, 20_000_u16), (7, 4_000_000, 60_000));
    progress(format_args!(
        "replay: {rounds} rounds of {packets} packets, and of {clients} connections and queries"
    ));
    let topology = Topology::new()?.workload(WorkloadSpec::new("server").label("app", "server"))?;
    let mut files = files(10, "server", &INTERNET_V4.to_string(), PORT);
    files.push(("inspected.yaml".to_owned(), INSPECTED.to_owned()));
    let policies: Vec<_> = files
        .iter()
        .map(|(name, text)| (name.as_str(), text.as_str()))
        .collect();
    let daemon = Daemon::prepare(&topology, &Settings::default(), &policies)?;
    let address = topology.get("server").v4;
    let stream = Stream {
        from_mac: [2, 0, 0, 0, 0, 1],
        to_mac: [2, 0, 0, 0, 0, 2],
        from: INTERNET_V4,
        to: address,
    };
    let dir = temp_dir("replay")?;
    let exchanges = |capture: &mut Capture, exchange: &dyn Fn(u16) -> Vec<(bool, Vec<u8>)>| {
        for port in (FIRST_PORT..).take(clients.into()) {
            for (_, frame) in exchange(port) {
                capture.push(&frame)?;
            }
        }
        // A request and its response.
        Ok(2 * u64::from(clients))
    };
    let kinds = [
        write(dir.path(), "UDP without inspection", |capture| {
            let frames: Vec<_> = (20_000..20_000 + FLOWS)
                .map(|port| stream.frame(port, PORT))
                .collect();
            let mut all = frames.iter().cycle().take(packets as usize);
            all.try_for_each(|frame| capture.push(frame))?;
            Ok(0)
        })?,
        write(dir.path(), "HTTP connections of nine packets", |capture| {
            exchanges(capture, &|port| http_connection((address, port)))
        })?,
        write(dir.path(), "DNS queries and answers", |capture| {
            exchanges(capture, &dns_exchange)
        })?,
    ];
    let folder = daemon.policies().display().to_string();
    let mut rates = [const { Samples::new() }; 3];
    for round in 0..=rounds {
        for (kind, samples) in kinds.iter().zip(&mut rates) {
            let rate = rate(&daemon, &folder, kind).with_context(|| kind.name)?;
            if round > 0 {
                samples.push(rate);
            }
        }
    }
    let mut table = Table::new("Replay", &["capture", "packets", "packets/s", "spread", "MB/s"]);
    let mut goals = Vec::new();
    for (kind, samples) in kinds.iter().zip(&rates) {
        let rate = samples.median();
        let megabytes = rate * kind.size as f64 / f64::from(kind.packets) / 1e6;
        table.row(
            kind.name,
            &[kind.packets.into(), rate, samples.spread(), megabytes],
        );
        goals.push(if kind.messages == 0 {
            Goal::at_least("packets/s of a replayed capture, L3 and L4 only", 1e6, rate, "")
        } else {
            Goal::reported(
                format!("replay with inspection, {}", kind.name),
                format!("{} packets/s, {} MB/s", number(rate), number(megabytes)),
            )
        });
    }
    let limits = Settings {
        tables: format!("[limits]\nconntrack = {LIVE_FLOWS}\n"),
        ..Settings::default()
    };
    daemon.configure(&topology, &limits)?;
    let mut memory = Table::new(
        "Largest resident memory, each packet a new flow",
        &["packets", "MiB"],
    );
    let sizes = [packets / 4, packets];
    let mut peaks = [0.0; 2];
    for (packets, peak_of) in sizes.into_iter().zip(&mut peaks) {
        let kind = write(dir.path(), "new flows", |capture| {
            let frames: Vec<_> = (FIRST_PORT..FIRST_PORT + PORTS)
                .map(|port| stream.frame(port, PORT))
                .collect();
            let mut all = frames.iter().cycle().take(packets as usize);
            all.try_for_each(|frame| capture.push(frame))?;
            Ok(0)
        })?;
        *peak_of = peak(&daemon, &folder, &kind)?;
        memory.row(number(packets.into()), &[*peak_of]);
    }
    goals.push(Goal::at_most(
        format!("memory of a replay, {packets} packets against a quarter of them"),
        1.1,
        peaks[1] / peaks[0],
        " ×",
    ));
    goals.push(Goal::reported(
        format!("memory of a replay, {packets} packets"),
        format!("{} MiB", number(peaks[1])),
    ));
    Ok(Measure {
        name: "replay",
        title: "Replay of a capture",
        method: format!(
            "`palisade replay --summary` of pcap files under eleven policies: frames of 60 bytes of {FLOWS} flows, and {clients} HTTP connections and DNS queries that application rules allow; the time is that of the whole command, with compilation. {rounds} rounds. Memory: VmHWM of one command, with a conntrack table of {LIVE_FLOWS} flows and {PORTS} flows in turn, so that each packet begins a flow and ends another."
        ),
        goals,
        tables: vec![table, memory],
        plot: None,
        notes: Vec::new(),
    })
}
