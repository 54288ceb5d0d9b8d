//! Journal of learned names in the state directory. The file begins with all names that were known when it was made,
//! followed by one line for each name that was learned or renewed later. A thread writes each line to the kernel at
//! once, so that lines survive a crash of the daemon, and flushes the file at intervals.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, BufReader, BufWriter, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use palisade_fqdn::SavedName;
use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};

/// Interval at which the file is flushed to the disk.
const SYNC_INTERVAL: Duration = Duration::from_secs(5);
/// The journal is compacted when the appended bytes exceed both this number and the length of the initial names.
const MIN_COMPACTION_BYTES: u64 = 4 << 20;
/// Interval between two attempts after a failed write.
const RETRY_INTERVAL: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });
/// Longest time to wait for the disk.
const FLUSH_DEADLINE: Duration = Duration::from_secs(10);
/// Maximum number of requests that wait for the thread.
const MAX_QUEUED_WRITES: usize = 1_024;

/// One line of the file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Line {
    /// Names of endpoints by number. At the next start a number can belong to another endpoint.
    Endpoints(BTreeMap<u16, String>),
    /// Time of writing, ms since 1970, and a learned name.
    Name(u64, SavedName),
}

/// Content of the journal at the start.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Learned names in the order of the file, each with its age, ms.
    pub names: Vec<(SavedName, u64)>,
    /// Number of lines that could not be read.
    pub broken: usize,
    /// Number of names that were skipped because their endpoint number now belongs to another endpoint or to none.
    pub orphaned: usize,
}

/// Handle of the thread that writes the journal.
#[derive(Clone, Debug)]
pub(super) struct Journal {
    requests: SyncSender<WriteRequest>,
    appended: Arc<AtomicU64>,
    begun: Arc<AtomicU64>,
    problem: Arc<Mutex<Option<String>>>,
}

#[derive(Debug)]
enum WriteRequest {
    Append(u64, Vec<SavedName>),
    Begin(u64, BTreeMap<u16, String>, Vec<SavedName>),
    /// Flush the file, then send a message, even if the flush has failed.
    Flush(Sender<()>),
}

fn path_of(dir: &Path) -> PathBuf {
    dir.join("names.journal")
}

/// Returns the path of the previous file. The file exists only until the current one is completely on the disk.
fn old_path_of(dir: &Path) -> PathBuf {
    dir.join("names.journal.old")
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Reads the journal. `endpoints`: current names of endpoints by number.
pub(super) fn read(dir: &Path, endpoints: &BTreeMap<u16, String>) -> io::Result<Found> {
    let mut found = Found::default();
    for path in [old_path_of(dir), path_of(dir)] {
        match File::open(&path) {
            Ok(file) => read_file(file, endpoints, &mut found)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    if found.broken > 0 {
        warn!(
            file = %path_of(dir).display(),
            lines = found.broken,
            "lines of the journal of learned names cannot be read and are skipped"
        );
    }
    Ok(found)
}

fn read_file(file: File, endpoints: &BTreeMap<u16, String>, found: &mut Found) -> io::Result<()> {
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    let mut known = BTreeMap::new();
    let now = now();
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        match serde_json::from_slice(&line) {
            Ok(Line::Endpoints(names)) => known = names,
            Ok(Line::Name(at, name)) => {
                let before = known.get(&name.endpoint);
                if before.is_some() && before == endpoints.get(&name.endpoint) {
                    // After the clock was set back, a line can come from the future; its age counts as zero.
                    found.names.push((name, now.saturating_sub(at)));
                } else {
                    found.orphaned += 1;
                }
            }
            Err(_) => found.broken += 1,
        }
    }
}

impl Journal {
    /// Makes a new file with these names and starts the thread. A failed write is retried; [`Self::problem`] returns
    /// its error.
    pub(super) fn begin(
        dir: &Path,
        endpoints: BTreeMap<u16, String>,
        all: Vec<SavedName>,
    ) -> io::Result<Self> {
        let (requests, receiver) = mpsc::sync_channel(MAX_QUEUED_WRITES);
        let journal = Self {
            requests,
            appended: Arc::default(),
            begun: Arc::default(),
            problem: Arc::default(),
        };
        let mut file = Writing {
            dir: dir.to_owned(),
            file: None,
            appended: Arc::clone(&journal.appended),
            begun: Arc::clone(&journal.begun),
            problem: Arc::clone(&journal.problem),
            unsynced: None,
            failed: None,
        };
        if let Err(problem) = file.begin(now(), &endpoints, &all) {
            file.failed(&problem);
        }
        thread::Builder::new()
            .name("names-journal".into())
            .spawn(move || file.serve(&receiver))?;
        Ok(journal)
    }

    /// Appends names.
    pub(super) fn append(&self, names: Vec<SavedName>) {
        if !names.is_empty() {
            self.enqueue(WriteRequest::Append(now(), names));
        }
    }

    /// Returns whether the journal has grown so much that it should be compacted.
    pub(super) fn is_long(&self) -> bool {
        let begun = self.begun.load(Ordering::Relaxed);
        self.appended.load(Ordering::Relaxed) > MIN_COMPACTION_BYTES.max(begun)
    }

    /// Compacts the journal: replaces it by a new file with these names.
    pub(super) fn compact(&self, endpoints: BTreeMap<u16, String>, all: Vec<SavedName>) {
        self.appended.store(0, Ordering::Relaxed);
        self.enqueue(WriteRequest::Begin(now(), endpoints, all));
    }

    /// Enqueues a request without waiting for the disk. If the queue is full, the request is dropped and the journal is
    /// marked for compaction, which also writes the dropped names.
    fn enqueue(&self, request: WriteRequest) {
        // The thread ends only when all handles are dropped, so an error means a full queue.
        if self.requests.try_send(request).is_err() {
            self.appended.store(u64::MAX / 2, Ordering::Relaxed);
        }
    }

    /// Waits up to [`FLUSH_DEADLINE`] until all earlier names are on the disk. Does not wait if the queue is full.
    pub(super) fn flush(&self) {
        let (done, wait) = mpsc::channel();
        if self.requests.try_send(WriteRequest::Flush(done)).is_ok() {
            // The caller goes on in any case: after the flush, or after the deadline.
            let _ = wait.recv_timeout(FLUSH_DEADLINE);
        }
    }

    /// Returns the error of the last write; `None` if that write succeeded.
    pub(super) fn problem(&self) -> Option<String> {
        self.problem
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

struct Writing {
    dir: PathBuf,
    problem: Arc<Mutex<Option<String>>>,
    file: Option<BufWriter<File>>,
    appended: Arc<AtomicU64>,
    begun: Arc<AtomicU64>,
    /// Time of the first write that is not flushed.
    unsynced: Option<Instant>,
    /// Time of the last failed write.
    failed: Option<Instant>,
}

impl Writing {
    fn serve(mut self, requests: &Receiver<WriteRequest>) {
        loop {
            if self.failed.is_some_and(|when| when.elapsed() >= RETRY_INTERVAL) {
                // The compaction also writes the names whose earlier write failed.
                self.failed = None;
                self.appended.store(u64::MAX / 2, Ordering::Relaxed);
            }
            let sync = self
                .unsynced
                .map(|since| SYNC_INTERVAL.saturating_sub(since.elapsed()));
            let again = self
                .failed
                .map(|when| RETRY_INTERVAL.saturating_sub(when.elapsed()));
            let timeout = [sync, again].into_iter().flatten().min();
            let timeout = timeout.unwrap_or(Duration::from_secs(3_600));
            let outcome = match requests.recv_timeout(timeout) {
                Ok(WriteRequest::Append(at, names)) => self.append(at, &names),
                Ok(WriteRequest::Begin(at, endpoints, all)) => self.begin(at, &endpoints, &all),
                Ok(WriteRequest::Flush(done)) => {
                    let outcome = self.sync();
                    // The receiver is gone if its wait has timed out.
                    let _ = done.send(());
                    outcome
                }
                Err(RecvTimeoutError::Timeout) => self.sync(),
                Err(RecvTimeoutError::Disconnected) => return,
            };
            match outcome {
                Err(problem) => self.failed(&problem),
                Ok(()) if self.file.is_some() => self.works(),
                Ok(()) => {}
            }
        }
    }

    fn failed(&mut self, problem: &io::Error) {
        self.failed = Some(Instant::now());
        let path = path_of(&self.dir);
        let text = format!(
            "{}: {problem}: newly learned names may not survive a restart",
            path.display()
        );
        let mut told = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none() {
            error!(file = %path.display(), error = %problem, "the journal of learned names cannot be written");
        }
        *told = Some(text);
    }

    fn works(&self) {
        let mut told = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        if told.take().is_some() {
            info!(file = %path_of(&self.dir).display(), "the journal of learned names can be written again");
        }
    }

    fn append(&mut self, at: u64, names: &[SavedName]) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut bytes = Vec::new();
        for name in names {
            line(&mut bytes, &Line::Name(at, name.clone()))?;
        }
        self.appended.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.unsynced.get_or_insert_with(Instant::now);
        file.write_all(&bytes)?;
        file.flush()
    }

    fn begin(&mut self, at: u64, endpoints: &BTreeMap<u16, String>, all: &[SavedName]) -> io::Result<()> {
        let (path, old) = (path_of(&self.dir), old_path_of(&self.dir));
        let temporary = self.dir.join(".names.journal.tmp");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        let mut file = BufWriter::new(file);
        let mut bytes = Vec::new();
        let mut length = 0;
        line(&mut bytes, &Line::Endpoints(endpoints.clone()))?;
        for name in all {
            line(&mut bytes, &Line::Name(at, name.clone()))?;
            if bytes.len() > 1 << 16 {
                length += bytes.len();
                file.write_all(&bytes)?;
                bytes.clear();
            }
        }
        length += bytes.len();
        file.write_all(&bytes)?;
        file.flush()?;
        // The previous file stays readable until the new one is on the disk.
        if path.exists() {
            fs::rename(&path, &old)?;
        }
        fs::rename(&temporary, &path)?;
        self.begun.store(length as u64, Ordering::Relaxed);
        self.file = Some(file);
        self.sync()?;
        match fs::remove_file(&old) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        self.unsynced = None;
        match &self.file {
            Some(file) => file.get_ref().sync_data(),
            None => Ok(()),
        }
    }
}

fn line(bytes: &mut Vec<u8>, line: &Line) -> io::Result<()> {
    serde_json::to_writer(&mut *bytes, line)?;
    bytes.push(b'\n');
    Ok(())
}

#[cfg(test)]
mod tests {
    use palisade_fqdn::SavedAddress;

    use super::*;

    fn name(endpoint: u16, name: &str) -> SavedName {
        SavedName {
            endpoint,
            name: name.into(),
            addresses: vec![SavedAddress {
                ip: "192.0.2.1".parse().unwrap(),
                left: 30_000,
            }],
        }
    }

    fn endpoints() -> BTreeMap<u16, String> {
        [(2, "default/a".to_owned()), (3, "default/b".to_owned())].into()
    }

    fn names(found: &Found) -> Vec<&str> {
        found.names.iter().map(|(name, _)| name.name.as_str()).collect()
    }

    #[test]
    fn appended_names_survive_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path(), &endpoints()).unwrap().names.is_empty());
        let journal = Journal::begin(dir.path(), endpoints(), vec![name(2, "old.test")]).unwrap();
        journal.append(vec![name(2, "a.test"), name(3, "b.test")]);
        journal.append(vec![name(2, "c.test")]);
        // There is no flush here: the thread must write the lines by itself.
        let begun = Instant::now();
        while read(dir.path(), &endpoints()).unwrap().names.len() < 4
            && begun.elapsed() < Duration::from_secs(60)
        {
            thread::sleep(Duration::from_millis(1));
        }
        let found = read(dir.path(), &endpoints()).unwrap();
        assert_eq!(names(&found), ["old.test", "a.test", "b.test", "c.test"]);
        assert!(found.names.iter().all(|(_, ago)| *ago < 60_000));
        journal.compact(endpoints(), vec![name(2, "new.test")]);
        journal.append(vec![name(2, "after.test")]);
        journal.flush();
        let found = read(dir.path(), &endpoints()).unwrap();
        assert_eq!((names(&found), found.broken), (vec!["new.test", "after.test"], 0));
        assert!(!old_path_of(dir.path()).exists());
    }

    #[test]
    fn the_journal_is_written_once_the_disk_allows_it() {
        let dir = tempfile::tempdir().unwrap();
        // A directory in place of the file makes the write fail for root too.
        let blocked = dir.path().join(".names.journal.tmp");
        fs::create_dir(&blocked).unwrap();
        let journal = Journal::begin(dir.path(), endpoints(), Vec::new()).unwrap();
        assert!(
            journal.problem().unwrap().contains("names.journal: "),
            "{:?}",
            journal.problem()
        );
        let until = Instant::now() + RETRY_INTERVAL * 30;
        let mut all = Vec::new();
        while journal.problem().is_some() {
            assert!(Instant::now() < until, "{:?}", journal.problem());
            if until.saturating_duration_since(Instant::now()) < RETRY_INTERVAL * 27 {
                let _ = fs::remove_dir(&blocked);
            }
            // Answers continue to arrive meanwhile.
            all.push(name(2, &format!("{}.test", all.len())));
            if journal.is_long() {
                journal.compact(endpoints(), all.clone());
            } else {
                journal.append(all[all.len() - 1..].to_vec());
            }
            thread::sleep(Duration::from_millis(100));
        }
        journal.flush();
        assert_eq!(read(dir.path(), &endpoints()).unwrap().names.len(), all.len());
    }

    #[test]
    fn the_readable_lines_of_a_broken_journal_are_used() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::begin(
            dir.path(),
            endpoints(),
            vec![name(2, "a.test"), name(2, "b.test")],
        )
        .unwrap();
        journal.flush();
        let path = path_of(dir.path());
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let found = read(dir.path(), &endpoints()).unwrap();
            assert!(found.names.len() <= 2 && found.broken <= 1, "{cut}");
        }
        let mut bytes = whole.clone();
        let at = whole.iter().position(|b| *b == b'\n').unwrap() + 3;
        bytes[at] = 0xff;
        fs::write(&path, &bytes).unwrap();
        let found = read(dir.path(), &endpoints()).unwrap();
        assert_eq!((names(&found), found.broken), (vec!["b.test"], 1));
        // If the current file is incomplete, the previous file is read too.
        fs::write(old_path_of(dir.path()), &whole).unwrap();
        fs::write(&path, b"").unwrap();
        assert_eq!(
            names(&read(dir.path(), &endpoints()).unwrap()),
            ["a.test", "b.test"]
        );
    }

    #[test]
    fn a_reused_endpoint_number_inherits_no_names() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::begin(
            dir.path(),
            endpoints(),
            vec![name(2, "a.test"), name(3, "b.test")],
        )
        .unwrap();
        journal.flush();
        let now = [(2, "default/b".to_owned()), (3, "default/b".to_owned())].into();
        let found = read(dir.path(), &now).unwrap();
        assert_eq!((names(&found), found.orphaned), (vec!["b.test"], 1));
        assert_eq!(read(dir.path(), &BTreeMap::new()).unwrap().orphaned, 2);
    }
}
