//! Watches the policy folder (inotify) and reports changed files in batches.

use std::{
    collections::BTreeSet,
    fs, io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent},
};
use tracing::warn;

/// Longest time from the first change of a batch to the report of the batch, in debounce periods.
const MAX_DEBOUNCE_PERIODS: u32 = 10;
/// Interval at which a missing folder is looked up.
const DIR_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Returns whether a file of this name is a policy file. Temporary and backup files of editors are not.
pub(super) fn is_policy_file(name: &str) -> bool {
    let hidden = name.starts_with(['.', '#']);
    let extension = Path::new(name)
        .extension()
        .and_then(|extension| extension.to_str());
    !hidden && matches!(extension, Some("yaml" | "yml" | "json"))
}

/// Returns the names of the policy files of a folder.
pub(crate) fn policy_file_names(dir: &Path) -> io::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        if let Ok(name) = entry?.file_name().into_string()
            && is_policy_file(&name)
        {
            names.insert(name);
        }
    }
    Ok(names)
}

/// Returns the names of the subfolders of a folder, which are not read. Hidden ones are left out, such as those of a
/// mounted ConfigMap.
pub(crate) fn subfolder_names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| {
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            !hidden && entry.file_type().is_ok_and(|kind| kind.is_dir())
        })
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Changes of the folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// Names of changed files.
    pub files: BTreeSet<String>,
    /// Whether every file can have changed, so that all files must be read again.
    pub rescan: bool,
    /// Time of the first event of these changes; `None` if they were requested.
    pub since: Option<Instant>,
}

impl Changes {
    /// Returns the change after which all files are read again.
    pub(super) fn all() -> Self {
        Self {
            files: BTreeSet::new(),
            rescan: true,
            since: None,
        }
    }

    fn is_empty(&self) -> bool {
        self.files.is_empty() && !self.rescan
    }
}

/// Changes that are held until the folder is quiet.
#[derive(Debug)]
struct Batch {
    changes: Changes,
    debounce: Duration,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Batch {
    fn new(debounce: Duration) -> Self {
        Self {
            changes: Changes::default(),
            debounce,
            first: None,
            last: None,
        }
    }

    fn file(&mut self, name: &str, now: Instant) {
        self.changes.files.insert(name.to_owned());
        self.touch(now);
    }

    fn rescan(&mut self, now: Instant) {
        self.changes.rescan = true;
        self.touch(now);
    }

    fn touch(&mut self, now: Instant) {
        self.first.get_or_insert(now);
        self.last = Some(now);
    }

    /// Returns how long to wait for more changes; `None` if the batch is empty.
    fn wait(&self, now: Instant) -> Option<Duration> {
        let quiet = self.last? + self.debounce;
        let timeout = self.first? + self.debounce * MAX_DEBOUNCE_PERIODS;
        Some(quiet.min(timeout).saturating_duration_since(now))
    }

    /// Returns the changes if they are due.
    fn take(&mut self, now: Instant) -> Option<Changes> {
        let due = !self.changes.is_empty() && self.wait(now).is_some_and(|left| left.is_zero());
        due.then(|| {
            let since = self.first;
            (self.first, self.last) = (None, None);
            Changes {
                since,
                ..std::mem::take(&mut self.changes)
            }
        })
    }
}

fn events_of_folder() -> AddWatchFlags {
    // A file is complete when its writer closes it or when it is moved into the folder. A link is complete when it is
    // made.
    AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF
        | AddWatchFlags::IN_ONLYDIR
}

fn note(batch: &mut Batch, dir: &Path, event: &InotifyEvent, now: Instant) {
    let Some(name) = &event.name else {
        // The folder itself has changed, or the kernel's queue has overflowed (IN_Q_OVERFLOW).
        batch.rescan(now);
        return;
    };
    let name = name.to_string_lossy();
    if !is_policy_file(&name) {
        // A mounted ConfigMap is updated by replacing the link `..data`, through which all files are reached. A scan finds
        // subfolders, which are not read and of which `status` warns.
        if name.starts_with("..") || event.mask.contains(AddWatchFlags::IN_ISDIR) {
            batch.rescan(now);
        }
        return;
    }
    if event.mask.contains(AddWatchFlags::IN_CREATE) {
        // A new regular file is empty; its close event follows. A new link is complete.
        let link = fs::symlink_metadata(dir.join(&*name))
            .is_ok_and(|metadata| metadata.file_type().is_symlink() || metadata.nlink() > 1);
        if !link {
            return;
        }
    }
    batch.file(&name, now);
}

/// Starts a thread that passes the changes of the folder to `changed` until `changed` returns false. If the folder is
/// missing, the thread waits for it.
pub(super) fn watch(
    dir: PathBuf,
    debounce: Duration,
    mut changed: impl FnMut(Changes) -> bool + Send + 'static,
) -> io::Result<()> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let mut watched = inotify.add_watch(&dir, events_of_folder()).ok();
    thread::Builder::new().name("policies".into()).spawn(move || {
        let mut batch = Batch::new(debounce);
        loop {
            let now = Instant::now();
            if watched.is_none() {
                watched = inotify.add_watch(&dir, events_of_folder()).ok();
                if watched.is_some() {
                    batch.rescan(now);
                }
            }
            let look_again = watched.is_none().then_some(DIR_POLL_INTERVAL);
            let wait = [batch.wait(now), look_again].into_iter().flatten().min();
            // The timeout is rounded up to whole milliseconds. If it were rounded down, the loop would spin in the last
            // millisecond.
            let timeout = wait.map_or(PollTimeout::NONE, |wait| {
                PollTimeout::try_from(wait.as_micros().div_ceil(1_000)).unwrap_or(PollTimeout::MAX)
            });
            let mut fds = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
            if let Err(error) = poll(&mut fds, timeout)
                && error != Errno::EINTR
            {
                warn!(dir = %dir.display(), %error, "changes of the policy folder cannot be received");
                thread::sleep(DIR_POLL_INTERVAL);
            }
            let now = Instant::now();
            // EAGAIN means that there are no events.
            for event in inotify.read_events().unwrap_or_default() {
                note(&mut batch, &dir, &event, now);
                let gone = AddWatchFlags::IN_IGNORED | AddWatchFlags::IN_MOVE_SELF;
                if event.mask.intersects(gone) && watched == Some(event.wd) {
                    if event.mask.contains(AddWatchFlags::IN_MOVE_SELF) {
                        // The daemon watches the folder at this path, not the folder that was moved away.
                        let _ = inotify.rm_watch(event.wd);
                    }
                    watched = None;
                }
            }
            if let Some(changes) = batch.take(now)
                && !changed(changes)
            {
                return;
            }
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, sync::mpsc};

    use super::*;

    #[test]
    fn temporary_files_of_editors_are_no_policies() {
        for name in ["web.yaml", "a.b.yml", "x.json"] {
            assert!(is_policy_file(name), "{name}");
        }
        for name in [
            ".web.yaml.swp",
            "web.yaml~",
            "4913",
            ".#web.yaml",
            "#web.yaml#",
            "web.yaml.tmp",
            "web.txt",
            ".yaml",
            "yaml",
            "..data",
        ] {
            assert!(!is_policy_file(name), "{name}");
        }
    }

    #[test]
    fn a_batch_waits_for_quiet_within_a_limit() {
        let ms = Duration::from_millis;
        let start = Instant::now();
        let mut batch = Batch::new(ms(5));
        assert_eq!(batch.wait(start), None);
        assert_eq!(batch.take(start + ms(100)), None);
        batch.file("a.yaml", start);
        batch.file("b.yaml", start + ms(3));
        batch.file("a.yaml", start + ms(4));
        assert_eq!(batch.take(start + ms(8)), None);
        let changes = batch.take(start + ms(9)).unwrap();
        assert_eq!(
            changes.files.into_iter().collect::<Vec<_>>(),
            ["a.yaml", "b.yaml"]
        );
        assert_eq!(batch.wait(start), None);
        // Continuous writes are reported after ten debounce periods.
        for n in 0..100 {
            batch.file("a.yaml", start + ms(n));
            let told = batch.take(start + ms(n)).is_some();
            assert_eq!(told, n == 50, "{n}");
            if told {
                break;
            }
        }
    }

    fn watched(dir: &Path) -> mpsc::Receiver<Changes> {
        let (sender, receiver) = mpsc::channel();
        watch(dir.to_owned(), Duration::from_millis(5), move |changes| {
            sender.send(changes).is_ok()
        })
        .unwrap();
        receiver
    }

    fn next(receiver: &mpsc::Receiver<Changes>) -> Changes {
        let told = receiver
            .recv_timeout(Duration::from_secs(60))
            .expect("nothing was told");
        assert!(told.since.is_some_and(|since| since <= Instant::now()));
        Changes { since: None, ..told }
    }

    fn files(names: &[&str]) -> Changes {
        Changes {
            files: names.iter().map(ToString::to_string).collect(),
            ..Changes::default()
        }
    }

    #[test]
    fn writes_renames_links_and_removals_are_reported() {
        let dir = tempfile::tempdir().unwrap();
        let told = watched(dir.path());
        fs::write(dir.path().join("a.yaml"), "a").unwrap();
        assert_eq!(next(&told), files(&["a.yaml"]));
        // Editors and deployment tools replace a file in this way.
        fs::write(dir.path().join(".a.yaml.tmp"), "b").unwrap();
        fs::rename(dir.path().join(".a.yaml.tmp"), dir.path().join("a.yaml")).unwrap();
        assert_eq!(next(&told), files(&["a.yaml"]));
        symlink("a.yaml", dir.path().join("b.yaml")).unwrap();
        assert_eq!(next(&told), files(&["b.yaml"]));
        fs::rename(dir.path().join("a.yaml"), dir.path().join("a.yaml.off")).unwrap();
        fs::remove_file(dir.path().join("b.yaml")).unwrap();
        let mut seen = next(&told).files;
        if seen.len() < 2 {
            seen.extend(next(&told).files);
        }
        assert_eq!(seen, files(&["a.yaml", "b.yaml"]).files);
        fs::write(dir.path().join("notes.txt"), "x").unwrap();
        symlink("x", dir.path().join("..data")).unwrap();
        assert_eq!(next(&told), Changes::all());
    }

    #[test]
    fn a_file_is_reported_when_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let told = watched(dir.path());
        let file = fs::File::create(dir.path().join("a.yaml")).unwrap();
        assert!(told.recv_timeout(Duration::from_millis(200)).is_err());
        drop(file);
        assert_eq!(next(&told), files(&["a.yaml"]));
    }

    #[test]
    fn a_replaced_folder_is_watched_again() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("policies.d");
        fs::create_dir(&dir).unwrap();
        let told = watched(&dir);
        fs::rename(&dir, parent.path().join("old")).unwrap();
        assert_eq!(next(&told), Changes::all());
        fs::create_dir(&dir).unwrap();
        assert_eq!(next(&told), Changes::all());
        fs::write(dir.join("a.yaml"), "a").unwrap();
        assert_eq!(next(&told), files(&["a.yaml"]));
        fs::write(parent.path().join("old/b.yaml"), "b").unwrap();
        assert!(told.recv_timeout(Duration::from_millis(200)).is_err());
    }
}
