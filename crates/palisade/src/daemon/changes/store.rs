//! The thread that writes the history and the journal, and the policy folder for a change. The control thread never
//! waits for the disk: it sends jobs, and gets an event when a job is done.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, SystemTime},
};

use palisade_flowlog::Timestamp;
use tracing::{error, info};

use super::{
    deadline::{Deadline, Now},
    disk::{Disk, mode_of, unsuitable},
    history::{Digest, Entry, History, Set, StoredFile},
    journal::{Change, Contents, PRIVATE, Paths, Phase, Recovered, Texts, digest_of, recover},
    queue::{Enforced, Job, Next, Preparation, Queue},
};
use crate::{
    control::api::{ChangeState, FileChanges},
    daemon::checked_file,
};

/// A prepared change.
pub(in crate::daemon) struct Switch {
    /// The change in the journal.
    pub change: Change,
    /// Files in force when it was prepared.
    pub from: Texts,
    /// Files to put in force.
    pub to: Texts,
    /// Number of the entry that is put back.
    pub of: Option<u64>,
}

/// Interval between two attempts after a failed write.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// Longest time to wait for the disk.
const DISK_DEADLINE: Duration = Duration::from_secs(30);

/// Result of a job.
#[derive(Debug)]
pub(in crate::daemon) enum StoreEvent {
    /// The folder has the files of the change, or could not be written.
    Written(Result<(), String>),
    /// The change is confirmed on the disk, or could not be.
    Confirmed(Result<(), String>),
    /// The folder has the files from before the change again.
    Undone,
    /// Files of the folder that the daemon had not read were put aside under these names. Comes before the result of
    /// the job.
    Aside(Vec<PathBuf>),
}

/// Handle of the thread.
pub(in crate::daemon) struct Store {
    jobs: Arc<Queue>,
    history: Arc<Mutex<History>>,
    problem: Arc<Mutex<Option<String>>>,
    paths: Paths,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// Completes or undoes the change of an earlier process, reads the history, and starts the thread. `event` gets the
    /// results of jobs.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(in crate::daemon) fn start(
        state_dir: &Path,
        folder: &Path,
        event: impl Fn(StoreEvent) + Send + 'static,
    ) -> io::Result<(Self, Recovered)> {
        let paths = Paths::new(state_dir, folder);
        let disk = Disk::default();
        let mut recovered = recover(&paths, &disk, &Now::read());
        let history = read_history(&paths).unwrap_or_else(|problem| {
            error!(error = problem, "the history of the policies cannot be read");
            recovered.problem.get_or_insert(problem);
            History::default()
        });
        let jobs = Arc::<Queue>::default();
        let waiting = Arc::clone(&jobs);
        let history = Arc::new(Mutex::new(history));
        let problem = Arc::<Mutex<Option<String>>>::default();
        let change = recovered.waiting.clone().or_else(|| recovered.undone.clone());
        let mut writing = Writing {
            paths: paths.clone(),
            disk,
            history: Arc::clone(&history),
            problem: Arc::clone(&problem),
            digests: HashMap::new(),
            unwritten: Contents::new(),
            dirty: false,
            change: change.filter(|_| recovered.waiting.is_some() || recovered.unwritten.is_some()),
            undo: None,
            event: Box::new(event),
        };
        thread::Builder::new()
            .name("history".into())
            .spawn(move || writing.serve(&waiting))?;
        let store = Self {
            jobs,
            history,
            problem,
            paths,
        };
        Ok((store, recovered))
    }

    /// Records a policy set that was put in force.
    pub(in crate::daemon) fn enforced(&self, enforced: Enforced) {
        let time = Timestamp::from_system_time(SystemTime::now()).0;
        self.jobs.push(Job::Enforced(enforced, time));
    }

    /// Records whether a policy set was confirmed or rolled back.
    pub(in crate::daemon) fn set_state(&self, number: u64, state: ChangeState) {
        self.jobs.push(Job::State(number, state));
    }

    /// Writes the contents of both sets and the journal, and returns the change. A start of the daemon completes it only
    /// after [`Self::write`].
    ///
    /// # Errors
    /// The disk could not be written; nothing has changed.
    pub(in crate::daemon) fn prepare(&self, preparation: Preparation) -> Result<Change, String> {
        let (reply, answer) = mpsc::channel();
        let ticket = self.jobs.push(Job::Prepare(Box::new(preparation), reply));
        match answer.recv_timeout(DISK_DEADLINE) {
            Ok(outcome) => outcome,
            Err(_) => {
                // A job that runs already is undone as soon as the disk answers. Until then the journal, if it is there,
                // has the phase in which no start completes it.
                if !self.jobs.withdraw(ticket) {
                    self.abandon();
                }
                Err(format!(
                    "the disk has not answered for {DISK_DEADLINE:?}; nothing was changed"
                ))
            }
        }
    }

    /// Removes the journal of a prepared change that was not made.
    pub(in crate::daemon) fn abandon(&self) {
        self.jobs.push(Job::Abandon);
    }

    /// Writes the files of a change into the folder; [`StoreEvent::Written`] follows.
    pub(in crate::daemon) fn write(&self, change: Change, texts: Texts) {
        self.jobs.push(Job::Write(Box::new(change), texts));
    }

    /// Removes the journal of a change that is confirmed; [`StoreEvent::Confirmed`] follows.
    pub(in crate::daemon) fn confirm(&self, change: Change) {
        self.jobs.push(Job::Confirm(Box::new(change)));
    }

    /// Writes the files from before a change into the folder, until that succeeds; [`StoreEvent::Undone`] follows.
    pub(in crate::daemon) fn undo(&self, change: Change, texts: Texts) {
        self.jobs.push(Job::Undo(Box::new(change), texts));
    }

    /// Waits until the jobs sent so far are done, for a limited time.
    pub(in crate::daemon) fn flush(&self) {
        let (done, wait) = mpsc::channel();
        let ticket = self.jobs.push(Job::Flush(done));
        // A disk that does not answer must not hold up the end of the daemon.
        if wait.recv_timeout(Duration::from_secs(10)).is_err() {
            self.jobs.withdraw(ticket);
        }
    }

    /// Returns the history.
    pub(in crate::daemon) fn history(&self) -> History {
        lock(&self.history).clone()
    }

    /// Returns why the disk cannot be written; `None` if it can.
    pub(in crate::daemon) fn problem(&self) -> Option<String> {
        lock(&self.problem).clone()
    }

    /// Returns the files of an entry of the history, and their modes.
    ///
    /// # Errors
    /// There is no such entry, or a content cannot be read.
    pub(in crate::daemon) fn texts(&self, number: u64) -> Result<(Texts, BTreeMap<String, u32>), String> {
        let history = self.history();
        let entry = history.get(number).ok_or_else(|| {
            let first = history.entries().first().map_or(0, |entry| entry.number);
            let last = history.last().map_or(0, |entry| entry.number);
            format!("there is no set {number} in the history, which has {first} to {last}; see `palisade policy history`")
        })?;
        let texts = self
            .paths
            .texts(&entry.set)
            .map_err(|error| format!("set {number} of the history: {error}"))?;
        let modes = entry.set.iter().map(|(name, file)| (name.clone(), file.mode));
        Ok((texts, modes.collect()))
    }

    /// Returns the texts from before a change.
    ///
    /// # Errors
    /// A content cannot be read.
    pub(in crate::daemon) fn texts_of(&self, set: &Set) -> Result<Texts, String> {
        self.paths.texts(set).map_err(|error| error.to_string())
    }

    /// Returns why commands do not change files of these names in the folder; `None` if they do.
    pub(in crate::daemon) fn refusal<'n>(&self, names: impl Iterator<Item = &'n String>) -> Option<String> {
        unsuitable(&self.paths.folder).or_else(|| {
            let mut links = names
                .map(|name| self.paths.folder.join(name))
                .filter(|path| path.is_symlink());
            links.next().map(|link| {
                format!(
                    "{} is a symbolic link to {}: change the file there, or remove the link first",
                    link.display(),
                    fs::read_link(&link).unwrap_or_default().display()
                )
            })
        })
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.jobs.close();
    }
}

fn read_history(paths: &Paths) -> Result<History, String> {
    let path = paths.index();
    let text = match checked_file::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(History::default()),
        Err(error) => return Err(aside(&path, &error.to_string())),
    };
    History::parse(&text).map_err(|error| aside(&path, &error))
}

/// Renames a file that cannot be used, and returns the problem.
fn aside(path: &Path, why: &str) -> String {
    let aside = path.with_extension("json.broken");
    let put = match fs::rename(path, &aside) {
        Ok(()) => format!("renamed to {}", aside.display()),
        Err(error) => format!("it cannot be renamed either ({error})"),
    };
    format!(
        "{}: {why}; {put}: the history of the policies begins anew",
        path.display()
    )
}

struct Writing {
    paths: Paths,
    disk: Disk,
    history: Arc<Mutex<History>>,
    problem: Arc<Mutex<Option<String>>>,
    /// Digest of the last content of each file.
    digests: HashMap<String, (Arc<str>, Digest)>,
    /// Contents that are not on the disk yet.
    unwritten: Contents,
    /// Whether the list of entries differs from that on the disk.
    dirty: bool,
    /// Change whose contents are kept.
    change: Option<Change>,
    /// Change that is being undone.
    undo: Option<(Change, Texts)>,
    event: Box<dyn Fn(StoreEvent) + Send>,
}

impl Writing {
    fn serve(&mut self, jobs: &Queue) {
        loop {
            let retry = self.dirty || self.undo.is_some();
            let job = match jobs.next(retry.then_some(RETRY_INTERVAL)) {
                Next::Job(job) => Some(job),
                Next::Timeout => None,
                Next::Closed => return,
            };
            let mut outcome = Ok(());
            let mut waiting = None;
            match job {
                Some(Job::Enforced(enforced, time)) => self.record(enforced, time),
                Some(Job::State(number, state)) => self.set_state(number, state),
                Some(Job::Prepare(preparation, reply)) => {
                    let prepared = self.prepare(*preparation).map_err(|error| {
                        format!("the state directory cannot be written, so nothing was changed: {error}")
                    });
                    let _ = reply.send(prepared);
                }
                Some(Job::Abandon) => outcome = self.abandon(),
                Some(Job::Write(change, texts)) => {
                    let written = self.write(*change, &texts).map_err(|error| error.to_string());
                    self.report_aside();
                    (self.event)(StoreEvent::Written(written));
                }
                Some(Job::Confirm(change)) => {
                    self.set_state(change.number, ChangeState::Confirmed);
                    let confirmed = self.paths.remove_journal(&self.disk);
                    match &confirmed {
                        Ok(()) => self.change = None,
                        Err(_) => self.set_state(change.number, ChangeState::Pending),
                    }
                    (self.event)(StoreEvent::Confirmed(
                        confirmed.map_err(|error| error.to_string()),
                    ));
                }
                Some(Job::Undo(change, texts)) => {
                    self.set_state(change.number, ChangeState::RolledBack);
                    self.undo = Some((*change, texts));
                }
                Some(Job::Flush(done)) => waiting = Some(done),
                None => {}
            }
            if let Some((change, texts)) = self.undo.take() {
                let put_back = self.put_back(change.clone(), &texts);
                self.report_aside();
                match put_back {
                    Ok(()) => {
                        self.change = None;
                        (self.event)(StoreEvent::Undone);
                    }
                    Err(error) => {
                        outcome = Err(error);
                        self.undo = Some((change, texts));
                    }
                }
            }
            if self.dirty {
                let saved = self.save();
                outcome = outcome.and(saved);
            }
            self.note(outcome.err());
            if let Some(done) = waiting {
                let _ = done.send(());
            }
        }
    }

    fn report_aside(&self) {
        let aside = self.disk.take_aside();
        if !aside.is_empty() {
            (self.event)(StoreEvent::Aside(aside));
        }
    }

    fn note(&self, error: Option<io::Error>) {
        let error = error.map(|error| error.to_string());
        let mut known = lock(&self.problem);
        match &error {
            Some(error) if known.as_ref() != Some(error) => error!(
                error,
                "the history of the policies cannot be written; the policies are enforced, and the write is retried"
            ),
            None if known.is_some() => info!("the history of the policies can be written again"),
            _ => {}
        }
        *known = error;
    }

    fn set_state(&mut self, number: u64, state: ChangeState) {
        lock(&self.history).set_state(number, state);
        self.dirty = true;
    }

    /// Returns texts as a set. The digest of an unchanged text is not computed again.
    fn set(&mut self, texts: &Texts, modes: &BTreeMap<String, u32>) -> Set {
        let mut digests = HashMap::new();
        let mut set = Set::new();
        for (name, text) in texts {
            let known = self.digests.remove(name).filter(|(known, _)| known == text);
            let digest = known.map_or_else(|| digest_of(text.as_bytes()), |(_, digest)| digest);
            let path = self.paths.folder.join(name);
            let mode = match modes.get(name) {
                Some(mode) if fs::symlink_metadata(&path).is_err() => *mode,
                _ => mode_of(&path),
            };
            let file = StoredFile {
                digest: digest.clone(),
                size: text.len() as u64,
                mode,
            };
            set.insert(name.clone(), file);
            digests.insert(name.clone(), (Arc::clone(text), digest));
        }
        self.digests = digests;
        set
    }

    fn record(&mut self, enforced: Enforced, time: i64) {
        let set = self.set(&enforced.texts, &BTreeMap::new());
        let mut history = lock(&self.history);
        let is_known = |last: &Entry| {
            super::history::differing(&last.set, &set).is_empty() && last.state != ChangeState::RolledBack
        };
        if enforced.number.is_none() && history.last().is_some_and(is_known) {
            return;
        }
        for (name, text) in &enforced.texts {
            if let Some(file) = set.get(name) {
                self.unwritten.insert(file.digest.clone(), Arc::clone(text));
            }
        }
        let number = enforced.number.unwrap_or_else(|| history.take_number());
        let message = match enforced.left_out {
            0 => enforced.message,
            left_out => {
                format!("{left_out} versions before this one are left out, because the disk did not answer")
            }
        };
        history.push(Entry {
            number,
            time,
            kind: enforced.kind,
            author: enforced.author,
            message,
            of: enforced.of,
            revision: enforced.revision,
            state: enforced.state,
            files: FileChanges::default(),
            set,
        });
        self.dirty = true;
        let kept = self.kept();
        history.prune(&kept);
        let needed = history.digests();
        self.unwritten.retain(|digest, _| needed.contains(digest));
    }

    /// Returns the digests that are kept in addition to those of the history.
    fn kept(&self) -> BTreeSet<Digest> {
        let changes = self
            .change
            .iter()
            .chain(self.undo.iter().map(|(change, _)| change));
        changes
            .flat_map(|change| change.from.values().chain(change.to.values()))
            .map(|file| file.digest.clone())
            .collect()
    }

    fn prepare(&mut self, preparation: Preparation) -> io::Result<Change> {
        let now = Now::read();
        // The journal of this change would replace that of another one.
        if let Some(change) = self
            .change
            .as_ref()
            .filter(|change| change.phase != Phase::Prepared)
        {
            let number = change.number;
            return Err(io::Error::other(format!("change {number} is not over")));
        }
        if preparation.confirm.is_some() && now.boot.is_empty() {
            return Err(io::Error::other(
                "the boot id of the kernel (/proc/sys/kernel/random/boot_id) cannot be read, so there is no deadline that a boot \
                 ends",
            ));
        }
        let from = self.set(&preparation.from, &BTreeMap::new());
        let to = self.set(&preparation.to, &preparation.modes);
        let mut contents = Contents::new();
        for (set, texts) in [(&from, &preparation.from), (&to, &preparation.to)] {
            let all = set
                .iter()
                .filter_map(|(name, file)| Some((&file.digest, texts.get(name)?)));
            contents.extend(all.map(|(digest, text)| (digest.clone(), Arc::clone(text))));
        }
        let (number, before) = {
            let history = lock(&self.history);
            (history.next_number(), history.last().map(|entry| entry.number))
        };
        let deadline = preparation.confirm.map(|wait| Deadline::after(&now, wait));
        let change = Change {
            number,
            before,
            phase: Phase::Prepared,
            folder: self.paths.folder.clone(),
            deadline,
            author: preparation.author,
            message: preparation.message,
            from,
            to,
        };
        self.paths.write_contents(&self.disk, &contents)?;
        if let Err(error) = self.paths.write_journal(&self.disk, &change) {
            // The journal can be there although its directory could not be flushed.
            let _ = self.paths.remove_journal(&self.disk);
            return Err(error);
        }
        lock(&self.history).take_number();
        self.change = Some(change.clone());
        Ok(change)
    }

    fn abandon(&mut self) -> io::Result<()> {
        match self.change.take_if(|change| change.phase == Phase::Prepared) {
            Some(_) => self.paths.remove_journal(&self.disk),
            None => Ok(()),
        }
    }

    fn write(&mut self, mut change: Change, texts: &Texts) -> io::Result<()> {
        change.phase = Phase::Writing;
        self.change = Some(change.clone());
        self.paths.write_journal(&self.disk, &change)?;
        self.paths.make_folder(&self.disk, &change, &change.to, texts)?;
        if change.deadline.is_some() {
            change.phase = Phase::Waiting;
            self.paths.write_journal(&self.disk, &change)
        } else {
            self.paths.remove_journal(&self.disk)?;
            self.change = None;
            Ok(())
        }
    }

    /// Puts the folder back to the files from before the change.
    fn put_back(&self, mut change: Change, texts: &Texts) -> io::Result<()> {
        change.phase = Phase::Undoing;
        // On a full disk the journal stays as it is. The next start then undoes a change whose deadline has passed, drops
        // one that is prepared only, and completes one without a deadline: a set, not a mixture, in all cases.
        let _ = self.paths.write_journal(&self.disk, &change);
        self.paths.make_folder(&self.disk, &change, &change.from, texts)?;
        self.paths.remove_journal(&self.disk)
    }

    /// Writes contents and the list of entries, and removes contents that no entry has.
    fn save(&mut self) -> io::Result<()> {
        self.paths.write_contents(&self.disk, &self.unwritten)?;
        self.unwritten.clear();
        let (text, needed) = {
            let history = lock(&self.history);
            let needed: BTreeSet<Digest> = history.digests().into_iter().cloned().collect();
            (history.text()?, needed)
        };
        let index = self.paths.index();
        self.disk
            .write(&index, checked_file::seal(&text).as_bytes(), PRIVATE)?;
        self.disk.sync(&self.paths.history())?;
        self.dirty = false;
        let kept = self.kept();
        for entry in fs::read_dir(self.paths.contents())? {
            let entry = entry?;
            let name = entry.file_name();
            let is_needed = name
                .to_str()
                .is_some_and(|name| needed.contains(name) || kept.contains(name));
            if !is_needed {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt as _, sync::mpsc::Receiver};

    use super::*;
    use crate::control::api::{Author, ChangeKind};

    struct Place {
        root: tempfile::TempDir,
    }

    impl Place {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            for name in ["state", "policies.d"] {
                fs::create_dir(root.path().join(name)).unwrap();
            }
            let folder = root.path().join("policies.d");
            fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
            Self { root }
        }

        fn start(&self) -> (Store, Recovered, Receiver<StoreEvent>) {
            let (sender, events) = mpsc::channel();
            let (state, folder) = (
                self.root.path().join("state"),
                self.root.path().join("policies.d"),
            );
            let (store, recovered) = Store::start(&state, &folder, move |event| {
                let _ = sender.send(event);
            })
            .unwrap();
            (store, recovered, events)
        }

        fn read(&self, name: &str) -> Option<String> {
            fs::read_to_string(self.root.path().join("policies.d").join(name)).ok()
        }
    }

    fn texts(list: &[(&str, &str)]) -> Texts {
        list.iter()
            .map(|(name, text)| ((*name).to_owned(), (*text).into()))
            .collect()
    }

    fn edited(list: &[(&str, &str)]) -> Enforced {
        Enforced {
            number: None,
            kind: ChangeKind::FileChange,
            author: None,
            message: String::new(),
            of: None,
            revision: 1,
            state: ChangeState::Enforced,
            texts: texts(list),
            left_out: 0,
        }
    }

    fn preparation(from: &[(&str, &str)], to: &[(&str, &str)], confirm: Option<u64>) -> Preparation {
        Preparation {
            from: texts(from),
            to: texts(to),
            modes: BTreeMap::new(),
            confirm: confirm.map(Duration::from_secs),
            author: Author::default(),
            message: "why".to_owned(),
        }
    }

    #[test]
    fn every_enforced_set_is_kept_over_a_restart_and_equal_sets_once() {
        let place = Place::new();
        let (store, _, _events) = place.start();
        store.enforced(edited(&[("a.yaml", "1")]));
        store.enforced(edited(&[("a.yaml", "1")]));
        store.enforced(edited(&[("a.yaml", "2"), ("b.yaml", "1")]));
        store.flush();
        assert_eq!(store.problem(), None);
        drop(store);
        let (store, recovered, _events) = place.start();
        assert_eq!(recovered.problem, None);
        assert_eq!(store.history().entries().len(), 2);
        assert_eq!(store.texts(1).unwrap().0, texts(&[("a.yaml", "1")]));
        assert_eq!(
            store.texts(2).unwrap().0,
            texts(&[("a.yaml", "2"), ("b.yaml", "1")])
        );
        let error = store.texts(3).unwrap_err();
        assert!(error.contains("1 to 2"), "{error}");
        // Equal contents are stored once.
        let contents = place.root.path().join("state/policy-history/contents");
        assert_eq!(fs::read_dir(contents).unwrap().count(), 2);
    }

    #[test]
    fn a_change_is_written_confirmed_and_undone() {
        let place = Place::new();
        let (store, _, events) = place.start();
        let next = || events.recv_timeout(Duration::from_secs(60)).unwrap();
        let (old, new) = ([("a.yaml", "old")], [("b.yaml", "new")]);
        fs::write(place.root.path().join("policies.d/a.yaml"), "old").unwrap();
        let change = store.prepare(preparation(&old, &new, Some(600))).unwrap();
        assert_eq!(place.read("b.yaml"), None);
        store.write(change.clone(), texts(&new));
        assert!(matches!(next(), StoreEvent::Written(Ok(()))));
        assert_eq!(
            (place.read("a.yaml"), place.read("b.yaml").as_deref()),
            (None, Some("new"))
        );
        let (_, recovered, _events) = place.start();
        assert_eq!(recovered.waiting.unwrap().number, change.number);
        store.confirm(change);
        assert!(matches!(next(), StoreEvent::Confirmed(Ok(()))));
        let (_, recovered, _events) = place.start();
        assert!(recovered.waiting.is_none());
        let change = store.prepare(preparation(&new, &old, Some(600))).unwrap();
        store.write(change.clone(), texts(&old));
        assert!(matches!(next(), StoreEvent::Written(Ok(()))));
        store.undo(change, texts(&new));
        assert!(matches!(next(), StoreEvent::Undone));
        assert_eq!(
            (place.read("a.yaml"), place.read("b.yaml").as_deref()),
            (None, Some("new"))
        );
        let (_, recovered, _events) = place.start();
        assert!(recovered.waiting.is_none() && recovered.undone.is_none());
    }

    #[test]
    fn a_change_that_is_undone_before_it_is_written_is_undone_after_the_write() {
        let place = Place::new();
        let (store, _, events) = place.start();
        let next = || events.recv_timeout(Duration::from_secs(60)).unwrap();
        let (old, new) = ([("a.yaml", "old")], [("b.yaml", "new")]);
        fs::write(place.root.path().join("policies.d/a.yaml"), "old").unwrap();
        let change = store.prepare(preparation(&old, &new, Some(600))).unwrap();
        store.write(change.clone(), texts(&new));
        store.undo(change, texts(&old));
        assert!(matches!(next(), StoreEvent::Written(Ok(()))));
        assert!(matches!(next(), StoreEvent::Undone));
        assert_eq!(
            (place.read("a.yaml").as_deref(), place.read("b.yaml")),
            (Some("old"), None)
        );
        let (_, recovered, _events) = place.start();
        assert!(recovered.waiting.is_none() && recovered.undone.is_none());
    }

    #[test]
    fn edits_that_were_not_read_are_put_aside_and_those_of_the_history_are_not() {
        let place = Place::new();
        let (store, _, events) = place.start();
        let next = || events.recv_timeout(Duration::from_secs(60)).unwrap();
        let (old, new) = ([("a.yaml", "old")], [("a.yaml", "new")]);
        let path = |name: &str| place.root.path().join("policies.d").join(name);
        fs::write(path("a.yaml"), "old").unwrap();
        let change = store.prepare(preparation(&old, &new, Some(600))).unwrap();
        fs::write(path("a.yaml"), "edited before the write").unwrap();
        store.write(change.clone(), texts(&new));
        assert!(matches!(next(), StoreEvent::Aside(kept) if kept == [path("a.yaml.edited-1")]));
        assert!(matches!(next(), StoreEvent::Written(Ok(()))));
        assert_eq!(place.read("a.yaml.edited-1").unwrap(), "edited before the write");
        // The daemon has read this edit, so the history has it.
        store.enforced(edited(&[("a.yaml", "edited and read")]));
        store.flush();
        fs::write(path("a.yaml"), "edited and read").unwrap();
        fs::write(path("b.yaml"), "not read").unwrap();
        store.undo(change, texts(&old));
        assert!(matches!(next(), StoreEvent::Aside(kept) if kept == [path("b.yaml.edited-1")]));
        assert!(matches!(next(), StoreEvent::Undone));
        assert_eq!(
            (place.read("a.yaml").as_deref(), place.read("b.yaml")),
            (Some("old"), None)
        );
        assert_eq!(place.read("b.yaml.edited-1").unwrap(), "not read");
    }

    #[test]
    fn a_prepared_change_does_not_replace_the_journal_of_another_one() {
        let place = Place::new();
        let (store, _, events) = place.start();
        let (old, new) = ([("a.yaml", "old")], [("a.yaml", "new")]);
        // The client of this one gave up: it is replaced.
        store.prepare(preparation(&old, &new, None)).unwrap();
        let change = store.prepare(preparation(&old, &new, Some(600))).unwrap();
        store.write(change, texts(&new));
        assert!(matches!(
            events.recv_timeout(Duration::from_secs(60)).unwrap(),
            StoreEvent::Written(Ok(()))
        ));
        let error = store.prepare(preparation(&new, &old, None)).unwrap_err();
        assert!(error.contains("change 2 is not over"), "{error}");
        // Nor does the end of a client that has prepared nothing remove it.
        store.abandon();
        store.flush();
        let (_, recovered, _events) = place.start();
        assert_eq!(recovered.waiting.unwrap().number, 2);
    }

    #[test]
    fn versions_that_were_left_out_are_named_in_the_history() {
        let place = Place::new();
        let (store, _, _events) = place.start();
        store.enforced(Enforced {
            left_out: 3,
            ..edited(&[("a.yaml", "1")])
        });
        store.flush();
        let history = store.history();
        let message = &history.last().unwrap().message;
        assert!(
            message.starts_with("3 versions before this one are left out"),
            "{message}"
        );
    }

    #[test]
    fn a_disk_that_cannot_be_written_refuses_changes_and_names_the_problem() {
        let place = Place::new();
        // A file in place of the directory makes the write fail for root too.
        fs::write(place.root.path().join("state/policy-history"), "x").unwrap();
        let (store, _, _events) = place.start();
        let error = store
            .prepare(preparation(&[], &[("a.yaml", "new")], None))
            .unwrap_err();
        assert!(error.contains("nothing was changed"), "{error}");
        store.enforced(edited(&[("a.yaml", "1")]));
        store.flush();
        assert!(store.problem().is_some());
        assert_eq!(store.history().entries().len(), 1);
        fs::remove_file(place.root.path().join("state/policy-history")).unwrap();
        store.flush();
        assert_eq!(store.problem(), None);
        assert_eq!(store.texts(1).unwrap().0, texts(&[("a.yaml", "1")]));
    }
}
