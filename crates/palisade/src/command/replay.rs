//! `palisade replay`.

use std::{
    fs::File,
    hash::{BuildHasher as _, RandomState},
    io::{self, BufWriter, IsTerminal as _, Read, Write},
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, bail};
use palisade_abi::Reason;
use palisade_flowlog::{FilterBuilder, Filters, Flow, Timestamp, Uuid, format::Listing};
use palisade_replay::{Reader, Replay, Report, Summary};
use serde_json::json;

use super::{
    output::{EXIT_NO, EXIT_OK, load_config},
    policy,
};
use crate::{
    cli::{FlowOutput, ReplayArgs},
    daemon::Offline,
    text::count,
};

/// Number of packets between two reads of the clock.
const PROGRESS_PACKETS: u64 = 65_536;
/// Interval between two progress reports.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// Runs `palisade replay`.
pub(super) fn replay(config: &Path, args: &ReplayArgs) -> anyhow::Result<u8> {
    let Some(config) = load_config(config) else {
        return Ok(EXIT_NO);
    };
    let policies = if args.policies.is_empty() {
        std::slice::from_ref(&config.policy.dir)
    } else {
        &args.policies
    };
    let files = policy::policy_files(policies)?;
    if let Some(name) = &args.captured_at
        && !config.interfaces.iter().any(|nic| nic.name == *name)
        && !config
            .endpoints
            .iter()
            .any(|endpoint| endpoint.interface == *name)
    {
        bail!("--captured-at {name}: the configuration has no such interface");
    }
    let mut builder = FilterBuilder::new(Timestamp::from_system_time(SystemTime::now()));
    for (flag, value) in &args.filters.0 {
        builder.flag(flag, value)?;
    }
    let filters = builder.finish()?;
    let (offline, replay) = Offline::new(&config, files, &args.node_addresses)?;
    let shown = args.file.display();
    let source: Box<dyn Read> = if args.file.as_os_str() == "-" {
        Box::new(io::stdin().lock())
    } else {
        Box::new(File::open(&args.file).with_context(|| shown.to_string())?)
    };
    let mut run = Run {
        offline,
        replay,
        listing: Listing::new(args.printer()),
        out: BufWriter::with_capacity(1 << 16, io::stdout().lock()),
        shows_flows: !args.summary,
        filters,
        key: RandomState::new().hash_one(0),
        number: 0,
        progress: Progress::new(io::stderr().is_terminal() && args.file.as_os_str() != "-"),
        reports: Vec::new(),
    };
    let outcome = run.read(Reader::new(source), args.captured_at.as_deref())?;
    let summary = run.replay.summary();
    if !args.summary {
        run.out.flush()?;
        write_summary(&summary, &mut io::stderr().lock())?;
    } else if matches!(args.output, FlowOutput::Json | FlowOutput::Jsonpb) {
        serde_json::to_writer_pretty(&mut run.out, &as_json(&summary))?;
        writeln!(run.out)?;
    } else {
        write_summary(&summary, &mut run.out)?;
    }
    run.out.flush()?;
    match outcome {
        None => Ok(EXIT_OK),
        Some(error) => {
            eprintln!("palisade: {shown}: {error}; the packets before it have their verdicts");
            Ok(EXIT_NO)
        }
    }
}

/// A replay in progress.
struct Run<'a> {
    offline: Offline,
    replay: Replay,
    listing: Listing,
    out: BufWriter<io::StdoutLock<'a>>,
    shows_flows: bool,
    filters: Filters,
    /// Random key of the identifiers of the flows, and number of the next flow.
    key: u64,
    number: u64,
    progress: Progress,
    reports: Vec<Report>,
}

impl Run<'_> {
    /// Replays all packets. Returns the error of the capture, if there is one.
    fn read(
        &mut self,
        mut reader: Reader<Box<dyn Read>>,
        interface: Option<&str>,
    ) -> io::Result<Option<palisade_replay::capture::CaptureError>> {
        let mut packets = 0;
        let outcome = loop {
            match reader.packet() {
                Ok(Some(packet)) => {
                    self.replay.packet(&packet, interface);
                    packets += 1;
                }
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
            if self.replay.has_reports() {
                self.write()?;
            }
            if packets % PROGRESS_PACKETS == 0 {
                self.progress.report(packets, reader.offset());
            }
        };
        self.progress.end();
        Ok(outcome)
    }

    /// Writes the flows of the reports so far.
    fn write(&mut self) -> io::Result<()> {
        self.reports.clear();
        self.reports.extend(self.replay.reports());
        if !self.shows_flows {
            return Ok(());
        }
        let names = self.offline.names(&self.replay);
        for report in &self.reports {
            let mut flow = match report {
                Report::Event(event) => Flow::from_event(event, &names, 0),
                Report::Record { time, record } => {
                    let time = Timestamp(i64::try_from(*time).unwrap_or(i64::MAX));
                    Flow::from_record(record, &names, time)
                }
            };
            if !self.filters.matches(&flow) {
                continue;
            }
            flow.uuid = Uuid::new(self.key, self.number);
            self.number += 1;
            let text = self.listing.flow(&flow, None);
            self.out.write_all(text.as_bytes())?;
            if !text.ends_with('\n') {
                self.out.write_all(b"\n")?;
            }
        }
        Ok(())
    }
}

/// Reports progress on a terminal.
struct Progress {
    is_shown: bool,
    start: Instant,
    last: Instant,
    written: bool,
}

impl Progress {
    fn new(is_shown: bool) -> Self {
        let now = Instant::now();
        Self {
            is_shown,
            start: now,
            last: now,
            written: false,
        }
    }

    fn report(&mut self, packets: u64, bytes: u64) {
        if !self.is_shown || self.last.elapsed() < PROGRESS_INTERVAL {
            return;
        }
        self.last = Instant::now();
        self.written = true;
        let seconds = self.start.elapsed().as_secs_f64().max(f64::EPSILON);
        let rate = packets as f64 / seconds;
        eprint!("\r{packets} packets, {} MiB, {rate:.0} packets/s ", bytes >> 20);
    }

    fn end(&self) {
        if self.written {
            eprint!("\r\x1b[K");
        }
    }
}

/// Writes the counters as text.
fn write_summary(summary: &Summary, out: &mut impl Write) -> io::Result<()> {
    let (number, inspected) = (numbers(summary), &summary.inspected);
    writeln!(
        out,
        "{}, {} bytes{}",
        count(
            usize::try_from(summary.packets).unwrap_or(usize::MAX),
            "packet",
            "packets"
        ),
        summary.bytes,
        summary.time.map_or_else(String::new, |(first, last)| {
            format!(" in {:.3} s", Duration::from_nanos(last - first).as_secs_f64())
        })
    )?;
    for (text, value) in number {
        if value != 0 {
            writeln!(out, "  {text}: {value}")?;
        }
    }
    let drops = |title: &str, drops: &std::collections::BTreeMap<Reason, u64>, out: &mut dyn Write| {
        if !drops.is_empty() {
            writeln!(out, "{title}:")?;
        }
        drops
            .iter()
            .try_for_each(|(reason, count)| writeln!(out, "  {} ({}): {count}", reason.text(), *reason as u8))
    };
    drops("packets that the programs drop, by reason", &summary.drops, out)?;
    drops(
        "packets that the inspectors drop, by reason",
        &inspected.drops,
        out,
    )?;
    for (link, count) in &summary.unsupported {
        writeln!(out, "packets of {link}, which is not supported: {count}")?;
    }
    if !summary.midstream_examples.is_empty() {
        writeln!(out, "flows that begin before the capture, for example:")?;
        for (source, destination) in &summary.midstream_examples {
            let end = |end: &(std::net::IpAddr, u16)| std::net::SocketAddr::from(*end);
            writeln!(out, "  {} -> {}", end(source), end(destination))?;
        }
    }
    Ok(())
}

/// Returns the counters with their descriptions.
fn numbers(summary: &Summary) -> Vec<(&'static str, u64)> {
    let wide = |value: usize| u64::try_from(value).unwrap_or(u64::MAX);
    let inspected = &summary.inspected;
    let [allowed, audited, denied] = summary.flows;
    let [forwarded, audited_records, dropped] = summary.records;
    vec![
        ("flows allowed", allowed),
        ("flows passed by audit mode", audited),
        ("flows denied (each denied packet counts)", denied),
        ("flows that begin before the capture", summary.midstream),
        ("flows open at the end", wide(summary.open)),
        ("flows evicted from the table, which was full", summary.evicted),
        ("verdicts: packets passed", summary.passed),
        ("verdicts: packets passed by audit mode", summary.audited),
        ("packets forwarded between others", summary.forwarded),
        ("packets of no endpoint", summary.foreign),
        (
            "packets that are not IP, at no configured interface",
            summary.not_ip,
        ),
        ("packets truncated by the capture", summary.truncated),
        ("packets that cannot be decoded", summary.undecodable),
        ("packets older than an earlier packet", summary.out_of_order),
        ("packets inspected", inspected.packets),
        ("requests, answers and hellos forwarded", forwarded),
        (
            "requests, answers and hellos passed by audit mode",
            audited_records,
        ),
        ("requests, answers and hellos denied", dropped),
        ("DNS answers learned", summary.answers[0]),
        ("DNS answers not learned", summary.answers[1]),
        (
            "connections not inspected to their end",
            inspected.undecided_flows,
        ),
        (
            "packets not inspected: their connection begins before the capture",
            inspected.midstream,
        ),
        (
            "packets not inspected: truncated by the capture",
            inspected.truncated,
        ),
        ("packets not inspected: after such a packet", inspected.undecided),
        ("packets not inspected: of intercepted TLS", inspected.intercepted),
        ("packets that Palisade itself sent", inspected.generated),
        (
            "packets without a verdict when the capture ends",
            wide(summary.held),
        ),
    ]
}

/// Returns the counters as JSON.
fn as_json(summary: &Summary) -> serde_json::Value {
    let drops = |drops: &std::collections::BTreeMap<Reason, u64>| {
        let list = drops.iter();
        list.map(|(reason, count)| json!({"reason": *reason as u8, "text": reason.text(), "packets": count}))
            .collect::<Vec<_>>()
    };
    let [allowed, audited, denied] = summary.flows;
    let [forwarded, audited_records, dropped] = summary.records;
    let inspected = &summary.inspected;
    let time = |time: u64| Timestamp(i64::try_from(time).unwrap_or(i64::MAX));
    json!({
        "packets": summary.packets,
        "bytes": summary.bytes,
        "first": summary.time.map(|(first, _)| time(first)),
        "last": summary.time.map(|(_, last)| time(last)),
        "flows": {"allowed": allowed, "audited": audited, "denied": denied, "midstream": summary.midstream,
                  "open": summary.open, "evicted": summary.evicted},
        "verdicts": {"passed": summary.passed, "audited": summary.audited,
                     "dropped": summary.drops.values().sum::<u64>()},
        "drops": drops(&summary.drops),
        "forwarded": summary.forwarded,
        "foreign": summary.foreign,
        "not_ip": summary.not_ip,
        "truncated": summary.truncated,
        "undecodable": summary.undecodable,
        "out_of_order": summary.out_of_order,
        "unsupported": summary.unsupported.iter().map(|(link, count)| json!({"link_type": link.to_string(), "packets": count})).collect::<Vec<_>>(),
        "records": {"forwarded": forwarded, "audited": audited_records, "dropped": dropped},
        "inspection": {"packets": inspected.packets, "drops": drops(&inspected.drops),
                       "undecided_connections": inspected.undecided_flows, "midstream": inspected.midstream,
                       "truncated": inspected.truncated, "undecided": inspected.undecided,
                       "intercepted": inspected.intercepted, "own": inspected.generated, "held": summary.held},
        "answers": {"learned": summary.answers[0], "refused": summary.answers[1]},
    })
}
