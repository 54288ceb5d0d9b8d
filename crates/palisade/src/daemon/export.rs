//! Exports of flows: each `[[export]]` section has a thread that reads the flow ring and appends JSON lines to a file,
//! in the format of Cilium's flow exporter: `{"flow":{…},"node_name":"…","time":"…"}`, and
//! `{"lost_events":{…},"node_name":"…","time":"…"}` for flows that were overwritten before the thread could read them.
//!
//! A thread that cannot write (a full disk, a missing directory, a file system that does not answer) keeps at most one
//! buffer of lines and its position in the ring, and tries again; flows that the ring overwrites meanwhile are lost to
//! it. Nothing else waits for the thread: the control thread only sends it a request to end.
//!
//! Start at [`Exports::update`] and [`Exporter::run`]; the file is in `file`.

mod file;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use palisade_flowlog::{Cursor, Flow, Lost, LostSource, Next, Ring, Timestamp, format};
use serde::Serialize;
use serde_json::json;
use tracing::{error, info, warn};

use self::file::RotatedFile;
pub(crate) use self::file::backups;
use crate::{config, control::api::ExportStatus, priority};

/// Size of the buffered lines at which they are written, bytes.
const BUFFER_SIZE: usize = 256 << 10;
/// Interval between two reads of the ring while flows arrive. The thread sleeps instead of waiting for the next flow,
/// because a waiting reader costs the writers of the ring a notification for each flow.
const BUSY_INTERVAL: Duration = Duration::from_millis(50);
/// Interval between two reads of the ring after a read without a flow.
const IDLE_INTERVAL: Duration = Duration::from_millis(200);
/// Wait before the first repetition of a failed write. Each further wait is twice as long.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(200);
/// Longest wait before the repetition of a failed write.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(10);
/// Longest wait for the last write of all exports when the daemon ends.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// The running exports. The control thread has them.
#[derive(Default)]
pub(super) struct Exports {
    /// The ring to read; `None` until the ring exists.
    ring: Option<Arc<Ring>>,
    running: Vec<Running>,
}

/// An export and its thread.
struct Running {
    config: config::Export,
    node_name: String,
    counts: Arc<Counts>,
    /// A message ends the thread because another one replaces it, the loss of the sender ends it after the last flow.
    end: SyncSender<()>,
    /// `None` if the thread could not be started.
    thread: Option<JoinHandle<Cursor>>,
}

/// Counters of one export.
#[derive(Default)]
struct Counts {
    written: AtomicU64,
    lost: AtomicU64,
    failed_writes: AtomicU64,
    rotations: AtomicU64,
    /// Why the last write failed; `None` if it succeeded.
    problem: Mutex<Option<String>>,
    backup_problem: Mutex<Option<String>>,
}

impl Exports {
    /// Returns exports of the flows in `ring`. None runs yet.
    pub(super) fn new(ring: Arc<Ring>) -> Self {
        Self {
            ring: Some(ring),
            running: Vec::new(),
        }
    }

    /// Starts, replaces and ends exports so that the given ones run. An export that has changed continues at the
    /// position at which the previous thread has ended.
    pub(super) fn update(&mut self, wanted: &[config::Export], node_name: &str) {
        let Some(ring) = self.ring.clone() else {
            return;
        };
        let mut before = std::mem::take(&mut self.running);
        for config in wanted {
            let same = before.iter().position(|old| old.config.name == config.name);
            let old = same.map(|at| before.swap_remove(at));
            self.running.push(match old {
                Some(old) if old.config == *config && old.node_name == node_name && old.thread.is_some() => {
                    old
                }
                old => start(&ring, config, node_name, old),
            });
        }
        for old in &before {
            info!(
                component = "export",
                export = old.config.name,
                "an export has ended"
            );
        }
        // Dropping the senders ends the threads of the others.
    }

    /// Returns the state of each export.
    pub(super) fn report(&self) -> Vec<ExportStatus> {
        let now = Timestamp::from_system_time(SystemTime::now());
        self.running
            .iter()
            .map(|export| {
                let counts = &export.counts;
                let problem = lock(&counts.problem).clone();
                let state = match &problem {
                    _ if export.config.end.is_some_and(|end| end <= now) => "ended",
                    None => "running",
                    Some(_) => "failing",
                };
                ExportStatus {
                    name: export.config.name.clone(),
                    file: export.config.file.display().to_string(),
                    state: state.to_owned(),
                    written: counts.written.load(Ordering::Relaxed),
                    lost: counts.lost.load(Ordering::Relaxed),
                    failed_writes: counts.failed_writes.load(Ordering::Relaxed),
                    rotations: counts.rotations.load(Ordering::Relaxed),
                    problem: problem.or_else(|| lock(&counts.backup_problem).clone()),
                }
            })
            .collect()
    }

    /// Ends all threads and waits for their last writes, at most [`END_TIMEOUT`].
    pub(super) fn end(&mut self) {
        let threads: Vec<_> = self
            .running
            .drain(..)
            .filter_map(|export| export.thread) // drops the sender
            .collect();
        let until = Instant::now() + END_TIMEOUT;
        while threads.iter().any(|thread| !thread.is_finished()) && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Starts the thread of an export. `old`: the export that it replaces.
fn start(ring: &Arc<Ring>, config: &config::Export, node_name: &str, old: Option<Running>) -> Running {
    let counts = Arc::<Counts>::default();
    // The capacity of one lets the control thread send without waiting.
    let (end, ended) = mpsc::sync_channel(1);
    let mut exporter = Exporter {
        config: config.clone(),
        node_name: node_name.to_owned(),
        file: RotatedFile::new(&config.file, config.max_size, config.max_backups),
        cursor: ring.follow(),
        counts: Arc::clone(&counts),
        ended,
        lines: Vec::new(),
        line_count: 0,
    };
    let old_thread = old.and_then(|old| {
        let _ = old.end.try_send(());
        old.thread
    });
    // The new thread, not the control thread, waits for the old one, which can hang in a write.
    let run = move || {
        priority::lower();
        if let Some(Ok(cursor)) = old_thread.map(JoinHandle::join) {
            exporter.cursor = cursor;
        }
        exporter.run()
    };
    let thread = thread::Builder::new()
        .name(format!("export-{}", config.name))
        .spawn(run);
    match &thread {
        Ok(_) => info!(
            component = "export",
            export = config.name,
            file = %config.file.display(),
            "an export has begun"
        ),
        Err(problem) => {
            error!(component = "export", export = config.name, error = %problem, "the thread of an export cannot be started");
            *lock(&counts.problem) = Some(format!("its thread cannot be started: {problem}"));
        }
    }
    Running {
        config: config.clone(),
        node_name: node_name.to_owned(),
        counts,
        end,
        thread: thread.ok(),
    }
}

/// The thread of an export.
struct Exporter {
    config: config::Export,
    node_name: String,
    file: RotatedFile,
    cursor: Cursor,
    counts: Arc<Counts>,
    ended: Receiver<()>,
    /// Lines that are not written yet.
    lines: Vec<u8>,
    /// Number of lines in `lines`.
    line_count: u64,
}

impl Exporter {
    /// Writes flows until the export ends. Returns the position in the ring after the last flow that was read.
    fn run(mut self) -> Cursor {
        let mut retry_delay = MIN_RETRY_DELAY;
        loop {
            let before = self.lines.len();
            let is_behind = self.read();
            let is_idle = self.lines.len() == before;
            let wait = if self.write() {
                retry_delay = MIN_RETRY_DELAY;
                match (is_behind, is_idle) {
                    (true, _) => Duration::ZERO,
                    (false, false) => BUSY_INTERVAL,
                    (false, true) => IDLE_INTERVAL,
                }
            } else {
                let delay = retry_delay;
                retry_delay = (retry_delay * 2).min(MAX_RETRY_DELAY);
                delay
            };
            let now = Timestamp::from_system_time(SystemTime::now());
            let is_over = self.config.end.is_some_and(|end| end <= now);
            if self.lines.is_empty() && is_over {
                // Only the request to end the thread can follow.
                let _ = self.ended.recv();
                return self.cursor;
            }
            match self.ended.recv_timeout(wait) {
                Err(RecvTimeoutError::Timeout) => {}
                // The export that replaces this one reads the further flows.
                Ok(()) => {
                    self.write();
                    return self.cursor;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    while self.read() && self.write() {}
                    self.write();
                    return self.cursor;
                }
            }
        }
    }

    /// Adds flows from the ring to the buffered lines until the buffer is full. Returns whether the ring can have more
    /// flows.
    fn read(&mut self) -> bool {
        while self.lines.len() < BUFFER_SIZE {
            match self.cursor.read() {
                None => return false,
                Some(Next::Flow(flow)) => {
                    let is_in_time = self.config.end.is_none_or(|end| flow.time < end);
                    if is_in_time && self.config.filters.matches(&flow) {
                        self.flow(&flow);
                    }
                }
                Some(Next::Lost(Lost { source, count })) => {
                    if source == LostSource::HubbleRingBuffer {
                        self.counts.lost.fetch_add(count, Ordering::Relaxed);
                    }
                    let lost = json!({
                        "lost_events": {
                            "source": source,
                            // The JSON mapping of protobuf writes 64-bit integers as strings.
                            "num_events_lost": count.to_string(),
                        },
                        "node_name": self.node_name,
                        "time": Timestamp::from_system_time(SystemTime::now()),
                    });
                    self.line(&lost);
                }
            }
        }
        true
    }

    fn flow(&mut self, flow: &Flow) {
        let mask = &self.config.field_mask;
        if mask.is_empty() {
            self.lines.extend_from_slice(format::json(flow).as_bytes());
            self.line_count += 1;
            return;
        }
        // The conversion never fails: serde_json fails only for map keys that are not strings.
        let mut masked = serde_json::to_value(flow).unwrap_or_default();
        mask.apply(&mut masked);
        let response = json!({"flow": masked, "node_name": &*flow.node_name, "time": flow.time});
        self.line(&response);
    }

    fn line(&mut self, line: &impl Serialize) {
        // Writing to memory never fails.
        let _ = serde_json::to_writer(&mut self.lines, line);
        self.lines.push(b'\n');
        self.line_count += 1;
    }

    /// Writes the buffered lines. Returns whether all were written.
    fn write(&mut self) -> bool {
        if self.lines.is_empty() {
            return true;
        }
        let result = self.file.append(&mut self.lines);
        let left = self.lines.iter().filter(|byte| **byte == b'\n').count() as u64;
        self.counts
            .written
            .fetch_add(self.line_count.saturating_sub(left), Ordering::Relaxed);
        self.line_count = left;
        self.counts
            .rotations
            .store(self.file.rotations, Ordering::Relaxed);
        self.report_backups();
        let name = &self.config.name;
        let mut problem = lock(&self.counts.problem);
        match result {
            Ok(()) => {
                if problem.take().is_some() {
                    info!(component = "export", export = name, "an export is written again");
                }
                true
            }
            Err(error) => {
                self.counts.failed_writes.fetch_add(1, Ordering::Relaxed);
                if problem.is_none() {
                    error!(
                        component = "export",
                        export = name,
                        error,
                        "an export cannot be written; the write is repeated"
                    );
                }
                *problem = Some(error);
                false
            }
        }
    }

    fn report_backups(&self) {
        let mut known = lock(&self.counts.backup_problem);
        if *known != self.file.backup_problem {
            if let Some(error) = &self.file.backup_problem {
                let name = &self.config.name;
                warn!(
                    component = "export",
                    export = name,
                    error,
                    "old files of an export stay"
                );
            }
            known.clone_from(&self.file.backup_problem);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use palisade_flowlog::{Filters, Flow, FlowFilter, filter::ApiFilter, flow::Verdict};
    use serde_json::Value;

    use super::*;
    use palisade_flowlog::FieldMask;

    const TIMEOUT: Duration = Duration::from_secs(30);

    fn export(name: &str, file: &Path) -> config::Export {
        config::Export {
            name: name.to_owned(),
            file: file.to_owned(),
            filters: Filters::default(),
            field_mask: FieldMask::default(),
            max_size: 1 << 20,
            max_backups: 2,
            end: None,
        }
    }

    fn push(ring: &Ring, second: i64) {
        ring.push(Flow {
            time: Timestamp(second * 1_000_000_000),
            node_name: "n".into(),
            summary: format!("flow {second}"),
            ..Flow::default()
        });
    }

    fn lines(path: &Path) -> Vec<Value> {
        let text = fs::read_to_string(path).unwrap_or_default();
        assert!(text.is_empty() || text.ends_with('\n'), "{text:?}");
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// Returns the number of complete lines. While a write is in progress, readers can see a part of it: the kernel
    /// raises the size of a file page by page (`generic_perform_write`).
    fn line_count(path: &Path) -> usize {
        let bytes = fs::read(path).unwrap_or_default();
        bytes.iter().filter(|byte| **byte == b'\n').count()
    }

    #[track_caller]
    fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
        let until = Instant::now() + TIMEOUT;
        while !done() {
            assert!(Instant::now() < until, "{what}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn flows_are_written_as_lines_of_the_flow_api() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows.log");
        let ring = Ring::new(100);
        push(&ring, 1); // before the export
        let mut exports = Exports::new(Arc::clone(&ring));
        exports.update(&[export("all", &path)], "n");
        push(&ring, 2);
        push(&ring, 3);
        wait_until("two lines", || line_count(&path) == 2);
        let line = &lines(&path)[0];
        let keys: Vec<&String> = line.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["flow", "node_name", "time"]);
        assert_eq!(
            (&line["time"], &line["node_name"], &line["flow"]["Summary"]),
            (&"1970-01-01T00:00:02Z".into(), &"n".into(), &"flow 2".into())
        );
        push(&ring, 4);
        exports.end();
        assert_eq!(lines(&path).len(), 3, "the last flow is written at the end");
    }

    #[test]
    fn a_mask_and_an_end_limit_what_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows.log");
        let ring = Ring::new(100);
        let mut limited = export("limited", &path);
        limited.field_mask.add("Summary").unwrap();
        limited.end = Some(Timestamp(i64::MAX - 1));
        let mut exports = Exports::new(Arc::clone(&ring));
        exports.update(&[limited.clone()], "n");
        push(&ring, 2);
        wait_until("a line", || line_count(&path) == 1);
        assert_eq!(lines(&path)[0]["flow"], json!({"Summary": "flow 2"}));
        assert_eq!(lines(&path)[0]["time"], "1970-01-01T00:00:02Z");
        exports.end();
        limited.end = Some(Timestamp(3_000_000_000));
        exports.update(&[limited], "n");
        assert_eq!(exports.report()[0].state, "ended");
        push(&ring, 4);
        exports.end();
        assert_eq!(lines(&path).len(), 1);
    }

    #[test]
    fn only_flows_that_the_filters_choose_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows.log");
        let ring = Ring::new(100);
        let filter = |text: &str| {
            let filter: ApiFilter = serde_json::from_str(text).unwrap();
            vec![FlowFilter::compile(&filter).unwrap()]
        };
        let mut chosen = export("chosen", &path);
        chosen.filters = Filters {
            whitelist: filter("{\"verdict\":[\"DROPPED\"]}"),
            blacklist: filter("{\"node_name\":[\"quiet\"]}"),
            ..Filters::default()
        };
        let mut exports = Exports::new(Arc::clone(&ring));
        exports.update(&[chosen], "n");
        for (verdict, node) in [
            (Verdict::Forwarded, "n"),
            (Verdict::Dropped, "quiet"),
            (Verdict::Dropped, "n"),
        ] {
            ring.push(Flow {
                verdict,
                node_name: node.into(),
                ..Flow::default()
            });
        }
        exports.end();
        let lines = lines(&path);
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert_eq!(
            (&lines[0]["flow"]["verdict"], &lines[0]["node_name"]),
            (&"DROPPED".into(), &"n".into())
        );
    }

    #[test]
    fn a_changed_export_loses_and_repeats_no_flow() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows.log");
        let ring = Ring::new(10_000);
        let mut exports = Exports::new(Arc::clone(&ring));
        let mut changing = export("all", &path);
        exports.update(&[changing.clone()], "n");
        for change in 0..10 {
            for flow in 0..100 {
                push(&ring, change * 100 + flow);
            }
            changing.max_backups += 1;
            exports.update(&[changing.clone()], "n");
        }
        wait_until("all flows", || line_count(&path) >= 1_000);
        exports.end();
        let seconds: Vec<i64> = lines(&path)
            .iter()
            .map(|line| line["flow"]["Summary"].as_str().unwrap()[5..].parse().unwrap())
            .collect();
        assert_eq!(seconds, (0..1_000).collect::<Vec<i64>>());
        exports.update(&[], "n");
        assert!(exports.report().is_empty());
    }

    #[test]
    fn a_file_that_cannot_be_written_is_reported_and_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("a-file");
        fs::write(&below, "").unwrap();
        let path = below.join("flows.log");
        let ring = Ring::new(4);
        let mut exports = Exports::new(Arc::clone(&ring));
        exports.update(&[export("all", &path)], "n");
        push(&ring, 0);
        wait_until("failing", || exports.report()[0].state == "failing");
        let report = &exports.report()[0];
        assert!(report.problem.as_ref().unwrap().contains("a-file"), "{report:?}");
        assert_eq!(report.written, 0);
        fs::remove_file(&below).unwrap();
        wait_until("running", || exports.report()[0].state == "running");
        assert_eq!(lines(&path).len(), 1);
        let report = &exports.report()[0];
        assert!(report.failed_writes > 0 && report.written == 1, "{report:?}");
        exports.end();
    }

    #[test]
    fn flows_that_were_overwritten_are_counted_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows.log");
        let ring = Ring::new(4);
        let (end, ended) = mpsc::sync_channel(1);
        let counts = Arc::<Counts>::default();
        let exporter = Exporter {
            config: export("all", &path),
            node_name: "n".to_owned(),
            file: RotatedFile::new(&path, 1 << 20, 1),
            cursor: ring.follow(),
            counts: Arc::clone(&counts),
            ended,
            lines: Vec::new(),
            line_count: 0,
        };
        (0..10).for_each(|second| push(&ring, second));
        drop(end);
        exporter.run();
        let lines = lines(&path);
        assert_eq!(
            lines[0]["lost_events"],
            json!({"source": "HUBBLE_RING_BUFFER", "num_events_lost": "6"})
        );
        assert_eq!((lines.len(), counts.lost.load(Ordering::Relaxed)), (5, 6));
    }
}
