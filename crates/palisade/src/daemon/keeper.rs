//! Writes the state directory on a thread of its own, because fsync(2) can take seconds and a policy change must not
//! wait for it. Failed writes are retried and reported by `status`.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::Duration,
};

use tracing::{error, info};

use super::{
    checked_file,
    files::{sync_dir, write_atomic},
    watcher::policy_file_names,
};
use crate::trusted_path::private_dir;

/// Interval between two attempts after a failed write.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// Longest time to wait for the disk.
const FLUSH_DEADLINE: Duration = Duration::from_secs(10);
/// Largest number of files in a batch in which each file is flushed by its own `fsync`. A larger batch is flushed by
/// one `syncfs`.
const MAX_SINGLE_FSYNCS: usize = 16;

/// Last good policy files by name; `None` leaves the copy on the disk unchanged.
pub(super) type PolicyTexts = BTreeMap<String, Option<Arc<str>>>;

/// File of the endpoint numbers, the audit settings and the compiler's numbers.
pub(super) const STATE: &str = "state.json";
/// File of the last good configuration.
pub(super) const CONFIG: &str = "config.kept";
/// Directory of the last good policy files.
pub(super) const POLICIES: &str = "policies";

/// Handle of the thread that writes the state directory.
#[derive(Debug)]
pub(super) struct Keeper {
    requests: Sender<WriteRequest>,
    problem: Arc<Mutex<Option<String>>>,
}

#[derive(Debug)]
enum WriteRequest {
    State(String),
    Config(String),
    Policies(PolicyTexts),
    /// Send the result of the write after an attempt to write the files of all earlier requests.
    Flush(Sender<Result<(), String>>),
}

impl Keeper {
    /// Starts the thread.
    pub(super) fn start(dir: &Path) -> io::Result<Self> {
        let (requests, receiver) = mpsc::channel();
        let problem = Arc::<Mutex<Option<String>>>::default();
        let mut writing = Writing {
            dir: dir.to_owned(),
            state: None,
            config: None,
            policies: None,
            written: HashMap::new(),
            problem: Arc::clone(&problem),
        };
        thread::Builder::new()
            .name("state".into())
            .spawn(move || writing.serve(&receiver))?;
        Ok(Self { requests, problem })
    }

    // Sending cannot fail: the thread lives as long as this handle.

    /// Writes the state file.
    pub(super) fn state(&self, text: String) {
        let _ = self.requests.send(WriteRequest::State(text));
    }

    /// Writes the copy of the configuration.
    pub(super) fn config(&self, text: String) {
        let _ = self.requests.send(WriteRequest::Config(text));
    }

    /// Writes the last good policy files, and removes the copies of files that are not in `texts`.
    pub(super) fn policies(&self, texts: PolicyTexts) {
        let _ = self.requests.send(WriteRequest::Policies(texts));
    }

    /// Waits until the files of all earlier requests are on the disk.
    ///
    /// # Errors
    /// Text of the first failed write, or the reason why there is no result in time. Failed writes are retried.
    pub(super) fn flush(&self) -> Result<(), String> {
        let (done, wait) = mpsc::channel();
        let _ = self.requests.send(WriteRequest::Flush(done));
        match wait.recv_timeout(FLUSH_DEADLINE) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => {
                Err(format!("the disk has not answered for {FLUSH_DEADLINE:?}"))
            }
            Err(RecvTimeoutError::Disconnected) => Err("the thread that writes has ended".to_owned()),
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
    // Requests that are not on the disk yet.
    state: Option<String>,
    config: Option<String>,
    policies: Option<PolicyTexts>,
    /// Content of the policy files that this thread has written to the disk or found there.
    written: HashMap<String, Arc<str>>,
    problem: Arc<Mutex<Option<String>>>,
}

impl Writing {
    fn serve(&mut self, requests: &Receiver<WriteRequest>) {
        loop {
            let failing = self.state.is_some() || self.config.is_some() || self.policies.is_some();
            let first = if failing {
                match requests.recv_timeout(RETRY_INTERVAL) {
                    Ok(request) => Some(request),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            } else {
                let Ok(request) = requests.recv() else { return };
                Some(request)
            };
            let mut waiting = Vec::new();
            // Only the last request of each kind counts.
            for request in first.into_iter().chain(requests.try_iter()) {
                match request {
                    WriteRequest::State(text) => self.state = Some(text),
                    WriteRequest::Config(text) => self.config = Some(text),
                    WriteRequest::Policies(texts) => self.policies = Some(texts),
                    WriteRequest::Flush(done) => waiting.push(done),
                }
            }
            let outcome = self.write();
            self.note_problem(outcome.as_ref().err());
            for done in waiting {
                // The receiver is gone if its wait has timed out.
                let _ = done.send(outcome.clone());
            }
        }
    }

    fn note_problem(&self, problem: Option<&String>) {
        let mut told = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        match problem {
            Some(problem) if told.as_ref() != Some(problem) => error!(
                error = problem,
                "the state is NOT KEPT and is lost at the next start, unless a retry (every {RETRY_INTERVAL:?}) succeeds"
            ),
            None if told.is_some() => {
                info!(dir = %self.dir.display(), "the state can be written again and is kept")
            }
            _ => {}
        }
        *told = problem.cloned();
    }

    fn write(&mut self) -> Result<(), String> {
        if self.state.is_none() && self.config.is_none() && self.policies.is_none() {
            return Ok(());
        }
        if !self.dir.exists() {
            // The directory could not be made at the start, or was removed later.
            private_dir(&self.dir, "[node] state_dir").map_err(|refusal| refusal.to_string())?;
        }
        let mut outcome = Ok(());
        let mut note = |path: &Path, result: io::Result<()>| {
            let kept = result.is_ok();
            if let (Err(problem), Ok(())) = (result, &outcome) {
                outcome = Err(format!("{}: {problem}", path.display()));
            }
            kept
        };
        for (name, text) in [(STATE, &mut self.state), (CONFIG, &mut self.config)] {
            let path = self.dir.join(name);
            if let Some(content) = &*text
                && note(&path, write_atomic(&path, checked_file::seal(content).as_bytes()))
            {
                *text = None;
            }
        }
        if let Some(texts) = &self.policies {
            let dir = self.dir.join(POLICIES);
            if note(&dir, keep_policies(&dir, texts, &mut self.written)) {
                self.policies = None;
            }
        }
        outcome
    }
}

/// Makes a directory hold the copies of exactly these policy files. The copy of a file whose text is `None` is left
/// unchanged.
pub(super) fn keep_policies(
    dir: &Path,
    texts: &PolicyTexts,
    written: &mut HashMap<String, Arc<str>>,
) -> io::Result<()> {
    if !dir.is_dir() {
        fs::create_dir(dir)?;
    }
    let mut beside = Vec::new();
    let mut outcome = Ok(());
    for (name, text) in texts {
        let Some(text) = text else { continue };
        if written.get(name) == Some(text) {
            continue;
        }
        let path = dir.join(name);
        // A previous daemon can have written the same content.
        if checked_file::read(&path).is_ok_and(|there| there == **text) {
            written.insert(name.clone(), Arc::clone(text));
            continue;
        }
        match checked_file::write_beside(&path, text) {
            Ok(temporary) => beside.push((name, text, temporary, path)),
            Err(problem) => {
                outcome = Err(problem);
                break;
            }
        }
    }
    let synced = match beside.as_slice() {
        [] => Ok(()),
        few if few.len() <= MAX_SINGLE_FSYNCS => few
            .iter()
            .try_for_each(|(_, _, temporary, _)| fs::File::open(temporary)?.sync_all()),
        _ => nix::unistd::syncfs(fs::File::open(dir)?).map_err(io::Error::from),
    };
    for (name, text, temporary, path) in &beside {
        let put = if synced.is_ok() && outcome.is_ok() {
            fs::rename(temporary, path)
        } else {
            // After a failed write or flush no file of the batch is replaced. The temporary files are removed, because
            // the disk can be full.
            fs::remove_file(temporary)
        };
        match put {
            Ok(()) if synced.is_ok() && outcome.is_ok() => {
                written.insert((*name).clone(), Arc::clone(text));
            }
            Ok(()) => {}
            Err(problem) => outcome = Err(problem),
        }
    }
    outcome.and(synced)?;
    let mut removed = false;
    for name in policy_file_names(dir)? {
        if !texts.contains_key(&name) {
            fs::remove_file(dir.join(&name))?;
            written.remove(&name);
            removed = true;
        }
    }
    if removed || !beside.is_empty() {
        sync_dir(dir)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(list: &[(&str, Option<&str>)]) -> PolicyTexts {
        list.iter()
            .map(|(name, text)| ((*name).to_owned(), text.map(Into::into)))
            .collect()
    }

    #[test]
    fn copies_of_policies_are_written_replaced_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("policies");
        let mut written = HashMap::new();
        let mut keep =
            |list: &[(&str, Option<&str>)]| keep_policies(&dir, &texts(list), &mut written).unwrap();
        keep(&[("a.yaml", Some("a")), ("b.yaml", Some("b"))]);
        keep(&[("a.yaml", Some("c")), ("b.yaml", None)]);
        let read = |name| checked_file::read(&dir.join(name)).ok();
        assert_eq!(
            (read("a.yaml").as_deref(), read("b.yaml").as_deref()),
            (Some("c"), Some("b"))
        );
        let many: Vec<String> = (0..40).map(|n| format!("{n}.yaml")).collect();
        let many: Vec<(&str, Option<&str>)> = many.iter().map(|name| (name.as_str(), Some("x"))).collect();
        keep(&many);
        assert_eq!((read("a.yaml"), read("39.yaml").as_deref()), (None, Some("x")));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 40);
    }

    #[test]
    fn a_failed_write_is_reported_and_retried() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("state");
        // A directory in place of the file makes the write fail for root too.
        fs::create_dir_all(dir.join(STATE).join("x")).unwrap();
        let keeper = Keeper::start(&dir).unwrap();
        keeper.state("{}".to_owned());
        keeper.config("[node]".to_owned());
        let problem = keeper.flush().unwrap_err();
        assert!(problem.contains("state.json: "), "{problem}");
        assert_eq!(keeper.problem(), Some(problem));
        assert_eq!(checked_file::read(&dir.join(CONFIG)).unwrap(), "[node]");
        fs::remove_dir_all(dir.join(STATE)).unwrap();
        let until = std::time::Instant::now() + RETRY_INTERVAL * 30;
        while keeper.problem().is_some() {
            assert!(std::time::Instant::now() < until, "{:?}", keeper.problem());
            thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(checked_file::read(&dir.join(STATE)).unwrap(), "{}");
        keeper.flush().unwrap();
    }
}
