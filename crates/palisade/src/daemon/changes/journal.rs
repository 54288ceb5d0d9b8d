//! The change that is being made to the policy folder, as a file of the state directory, and what a start of the daemon
//! makes of it.
//!
//! The file is written before the first file of the folder is touched, and removed once the change is over. So a process
//! that ends at any moment leaves either no file, and an untouched or completely changed folder, or a file by which the
//! next start completes or undoes the change. The contents of both sets are on the disk before. A change that was only
//! prepared is never completed: its client can have been told that nothing was changed.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use super::{
    deadline::{Deadline, Now},
    disk::{Content, Disk, Replaced},
    history::{Digest, Set},
};
use crate::{
    control::api::Author,
    daemon::checked_file::{seal, unseal},
};

/// File of the change.
pub(super) const JOURNAL: &str = "policy-change.json";
/// Directory of the history.
const HISTORY: &str = "policy-history";
/// Mode of files in the state directory.
pub(super) const PRIVATE: u32 = 0o600;

/// How far a change is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::daemon) enum Phase {
    /// The contents are on the disk; nothing is changed yet.
    Prepared,
    /// The folder is being changed.
    Writing,
    /// The folder is changed; the change waits for its confirmation.
    Waiting,
    /// The folder is being put back.
    Undoing,
}

/// A change of the policy folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::daemon) struct Change {
    /// Number in the history.
    pub number: u64,
    /// Number of the set before.
    pub before: Option<u64>,
    /// How far the change is.
    pub phase: Phase,
    /// The policy folder that is changed.
    pub folder: PathBuf,
    /// Time until which it must be confirmed; `None`: it need not be.
    pub deadline: Option<Deadline>,
    /// Who made it.
    pub author: Author,
    /// The author's message.
    pub message: String,
    /// Files before the change.
    pub from: Set,
    /// Files after the change.
    pub to: Set,
}

/// Contents by digest.
pub(super) type Contents = BTreeMap<Digest, Arc<str>>;

/// Texts of policy files, by name.
pub(in crate::daemon) type Texts = BTreeMap<String, Arc<str>>;

/// Returns the digest of a content.
pub(super) fn digest_of(text: impl AsRef<[u8]>) -> Digest {
    use std::fmt::Write as _;
    let mut digits = String::with_capacity(64);
    for byte in digest(&SHA256, text.as_ref()).as_ref() {
        // Writing to a string does not fail.
        let _ = write!(digits, "{byte:02x}");
    }
    digits
}

/// Paths in the state directory.
#[derive(Clone, Debug)]
pub(super) struct Paths {
    state: PathBuf,
    /// The policy folder.
    pub folder: PathBuf,
}

impl Paths {
    pub(super) fn new(state: &Path, folder: &Path) -> Self {
        Self {
            state: state.to_owned(),
            folder: folder.to_owned(),
        }
    }

    /// Returns the path of the journal.
    pub(super) fn journal(&self) -> PathBuf {
        self.state.join(JOURNAL)
    }

    /// Returns the directory of the history.
    pub(super) fn history(&self) -> PathBuf {
        self.state.join(HISTORY)
    }

    /// Returns the directory of the contents.
    pub(super) fn contents(&self) -> PathBuf {
        self.history().join("contents")
    }

    /// Returns the path of the list of entries.
    pub(super) fn index(&self) -> PathBuf {
        self.history().join("index.json")
    }

    /// Makes the directories of the history.
    pub(super) fn make(&self) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt as _;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(self.contents())
    }

    /// Returns the content with a digest.
    ///
    /// # Errors
    /// It cannot be read, or is not what was written.
    pub(super) fn content(&self, digest: &Digest) -> io::Result<Arc<str>> {
        let path = self.contents().join(digest);
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let text = fs::read_to_string(&path).map_err(named)?;
        if digest_of(&text) != *digest {
            let damaged = io::Error::new(io::ErrorKind::InvalidData, "it is not what was written to it");
            return Err(named(damaged));
        }
        Ok(text.into())
    }

    /// Returns the texts of a set.
    ///
    /// # Errors
    /// A content cannot be read.
    pub(super) fn texts(&self, set: &Set) -> io::Result<Texts> {
        set.iter()
            .map(|(name, file)| Ok((name.clone(), self.content(&file.digest)?)))
            .collect()
    }

    /// Writes contents that are not on the disk yet.
    pub(super) fn write_contents(&self, disk: &Disk, contents: &Contents) -> io::Result<()> {
        self.make()?;
        let dir = self.contents();
        let mut written = false;
        for (digest, text) in contents {
            let path = dir.join(digest);
            let size = fs::metadata(&path).map(|metadata| metadata.len());
            if size.is_ok_and(|size| size == text.len() as u64) && self.content(digest).is_ok() {
                continue;
            }
            disk.write(&path, text.as_bytes(), PRIVATE)?;
            written = true;
        }
        if written {
            disk.sync(&dir)?;
        }
        Ok(())
    }

    /// Writes the journal.
    pub(super) fn write_journal(&self, disk: &Disk, change: &Change) -> io::Result<()> {
        let text = serde_json::to_string(change)?;
        disk.write(&self.journal(), seal(&text).as_bytes(), PRIVATE)?;
        disk.sync(&self.state)
    }

    /// Removes the journal.
    pub(super) fn remove_journal(&self, disk: &Disk) -> io::Result<()> {
        disk.remove(&self.journal())?;
        disk.sync(&self.state)
    }

    /// Returns the journal; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be read, or is not what was written.
    pub(super) fn read_journal(&self) -> io::Result<Option<Change>> {
        let path = self.journal();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let text = unseal(&bytes).map_err(|damaged| io::Error::new(io::ErrorKind::InvalidData, damaged))?;
        Ok(Some(serde_json::from_str(text)?))
    }

    /// Makes the policy folder have exactly the files of a set of a change. Files with a content that neither the change
    /// nor the history has are put aside ([`Disk::take_aside`]).
    pub(super) fn make_folder(
        &self,
        disk: &Disk,
        change: &Change,
        set: &Set,
        texts: &Texts,
    ) -> io::Result<()> {
        let files: BTreeMap<&str, Content<'_>> = set
            .iter()
            .filter_map(|(name, file)| Some((name.as_str(), (&**texts.get(name)?, file.mode))))
            .collect();
        let is_stored = |content: &[u8]| {
            let digest = digest_of(content);
            let mut own = change.from.values().chain(change.to.values());
            own.any(|file| file.digest == digest) || self.contents().join(&digest).exists()
        };
        let replaced = Replaced {
            number: change.number,
            is_stored: &is_stored,
        };
        disk.make(&self.folder, &files, &replaced)
    }
}

/// What a start has made of the journal.
#[derive(Debug, Default)]
pub(in crate::daemon) struct Recovered {
    /// Change that waits for its confirmation.
    pub waiting: Option<Change>,
    /// Change that was completed.
    pub completed: Option<Change>,
    /// Change that was rolled back.
    pub undone: Option<Change>,
    /// Number of a change that was prepared only, and was not made.
    pub dropped: Option<u64>,
    /// New paths of files of the folder that were put aside.
    pub aside: Vec<PathBuf>,
    /// Files from before `undone` that are to be enforced in place of those of the folder, because the folder could not
    /// be written.
    pub unwritten: Option<Texts>,
    /// Problem for `palisade status`.
    pub problem: Option<String>,
}

/// Completes or undoes the change of an earlier process, before the policies are read.
pub(super) fn recover(paths: &Paths, disk: &Disk, now: &Now) -> Recovered {
    let mut recovered = recover_change(paths, disk, now);
    recovered.aside = disk.take_aside();
    recovered
}

fn recover_change(paths: &Paths, disk: &Disk, now: &Now) -> Recovered {
    let mut change = match paths.read_journal() {
        Ok(None) => return Recovered::default(),
        Ok(Some(change)) if change.phase == Phase::Prepared => {
            // If the journal cannot be removed, the next change replaces it, or the next start drops it.
            let _ = paths.remove_journal(disk);
            return Recovered {
                dropped: Some(change.number),
                ..Recovered::default()
            };
        }
        // The files of one folder must not replace those of another one.
        Ok(Some(change)) if change.folder != paths.folder => {
            let why = format!(
                "change {} was made in the policy folder {}, but [policy] dir is {} now",
                change.number,
                change.folder.display(),
                paths.folder.display()
            );
            return put_aside(paths, &why);
        }
        Ok(Some(change)) => change,
        Err(error) => return put_aside(paths, &error.to_string()),
    };
    let expired = change
        .deadline
        .as_ref()
        .is_some_and(|deadline| deadline.left(now).is_none());
    let undo = expired || change.phase == Phase::Undoing;
    if !undo && change.phase == Phase::Waiting {
        return Recovered {
            waiting: Some(change),
            ..Recovered::default()
        };
    }
    let mut problem = None;
    if !undo {
        match complete(paths, disk, &mut change) {
            Ok(()) if change.deadline.is_some() => {
                return Recovered {
                    waiting: Some(change),
                    ..Recovered::default()
                };
            }
            Ok(()) => {
                return Recovered {
                    completed: Some(change),
                    ..Recovered::default()
                };
            }
            Err(error) => problem = Some(format!("change {} cannot be completed: {error}", change.number)),
        }
    }
    let texts = match paths.texts(&change.from) {
        Ok(texts) => texts,
        Err(error) => {
            return Recovered {
                problem: Some(format!(
                    "change {} of the policies cannot be rolled back: {error}; the files of {} are in force as they are",
                    change.number,
                    paths.folder.display()
                )),
                ..Recovered::default()
            };
        }
    };
    change.phase = Phase::Undoing;
    let written = paths
        .make_folder(disk, &change, &change.from, &texts)
        .and_then(|()| paths.remove_journal(disk));
    let mut recovered = Recovered::default();
    if let Err(error) = written {
        problem = Some(format!(
            "the policy folder cannot be written: {error}; the policies from before change {} are enforced from {}, and \
             the write is retried",
            change.number,
            paths.history().display()
        ));
        recovered.unwritten = Some(texts);
    }
    recovered.problem = problem;
    recovered.undone = Some(change);
    recovered
}

/// Renames a journal that cannot be used, and returns the problem.
fn put_aside(paths: &Paths, why: &str) -> Recovered {
    let journal = paths.journal();
    let aside = journal.with_extension("json.broken");
    // If the renaming fails too, the next start reports the same.
    let _ = fs::rename(&journal, &aside);
    Recovered {
        problem: Some(format!(
            "{}: {why}; renamed to {}: a change of policies that waited for its confirmation, if there was one, is NOT \
             rolled back; `palisade policy history` shows the sets before",
            journal.display(),
            aside.display()
        )),
        ..Recovered::default()
    }
}

/// Writes the files of a change into the folder.
fn complete(paths: &Paths, disk: &Disk, change: &mut Change) -> io::Result<()> {
    paths.make_folder(disk, change, &change.to, &paths.texts(&change.to)?)?;
    if change.deadline.is_none() {
        return paths.remove_journal(disk);
    }
    change.phase = Phase::Waiting;
    paths.write_journal(disk, change)
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, os::unix::fs::PermissionsExt as _, time::Duration};

    use proptest::prelude::*;

    use super::*;
    use crate::daemon::{changes::history::StoredFile, watcher::policy_file_names};

    struct Place {
        _root: tempfile::TempDir,
        paths: Paths,
    }

    fn place() -> Place {
        let root = tempfile::tempdir().unwrap();
        let (state, folder) = (root.path().join("state"), root.path().join("policies.d"));
        fs::create_dir(&state).unwrap();
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        Place {
            paths: Paths::new(&state, &folder),
            _root: root,
        }
    }

    fn set(texts: &Texts) -> Set {
        let files = texts.iter().map(|(name, text)| {
            let file = StoredFile {
                digest: digest_of(text.as_bytes()),
                size: text.len() as u64,
                mode: 0o644,
            };
            (name.clone(), file)
        });
        files.collect()
    }

    fn contents(texts: &Texts) -> Contents {
        texts
            .values()
            .map(|text| (digest_of(text.as_bytes()), Arc::clone(text)))
            .collect()
    }

    fn texts(list: &[(&str, &str)]) -> Texts {
        list.iter()
            .map(|(name, text)| ((*name).to_owned(), (*text).into()))
            .collect()
    }

    fn folder(paths: &Paths) -> Texts {
        let names = policy_file_names(&paths.folder).unwrap().into_iter();
        names
            .map(|name| {
                let text = fs::read_to_string(paths.folder.join(&name)).unwrap();
                (name, text.into())
            })
            .collect()
    }

    fn at(seconds: u64, boot: &str) -> Now {
        Now {
            boot: boot.to_owned(),
            since_boot: seconds * 1_000,
        }
    }

    /// Makes a change as the store does, until the disk fails.
    fn apply(paths: &Paths, disk: &Disk, from: &Texts, to: &Texts, confirm: bool) -> io::Result<()> {
        let mut change = Change {
            number: 2,
            before: Some(1),
            phase: Phase::Prepared,
            folder: paths.folder.clone(),
            deadline: confirm.then(|| Deadline::after(&at(100, "a"), Duration::from_secs(60))),
            author: Author::default(),
            message: String::new(),
            from: set(from),
            to: set(to),
        };
        paths.write_contents(disk, &contents(from))?;
        paths.write_contents(disk, &contents(to))?;
        paths.write_journal(disk, &change)?;
        change.phase = Phase::Writing;
        paths.write_journal(disk, &change)?;
        paths.make_folder(disk, &change, &change.to, to)?;
        if confirm {
            change.phase = Phase::Waiting;
            paths.write_journal(disk, &change)
        } else {
            paths.remove_journal(disk)
        }
    }

    fn undo(paths: &Paths, disk: &Disk) -> io::Result<()> {
        let mut change = paths.read_journal()?.unwrap();
        change.phase = Phase::Undoing;
        let texts = paths.texts(&change.from)?;
        paths.write_journal(disk, &change)?;
        paths.make_folder(disk, &change, &change.from, &texts)?;
        paths.remove_journal(disk)
    }

    fn interrupted(steps: usize) -> Disk {
        Disk {
            steps_left: Some(Cell::new(steps)),
            ..Disk::default()
        }
    }

    fn sets() -> (Texts, Texts) {
        (
            texts(&[("a.yaml", "old a"), ("b.yaml", "same"), ("gone.yaml", "old")]),
            texts(&[("a.yaml", "new a"), ("b.yaml", "same"), ("c.yaml", "new")]),
        )
    }

    fn fill(paths: &Paths, files: &Texts) {
        for (name, text) in files {
            fs::write(paths.folder.join(name), &**text).unwrap();
        }
    }

    #[test]
    fn an_interruption_at_any_step_leaves_the_old_or_the_new_set() {
        let (old, new) = sets();
        let (mut olds, mut news) = (0, 0);
        for steps in 0.. {
            let Place { paths, _root } = place();
            fill(&paths, &old);
            let done = apply(&paths, &interrupted(steps), &old, &new, false);
            let recovered = recover(&paths, &Disk::default(), &at(101, "a"));
            assert_eq!((recovered.problem, recovered.unwritten), (None, None), "{steps}");
            let found = folder(&paths);
            assert!(found == old || found == new, "{steps}: {found:?}");
            assert!(!paths.journal().exists(), "{steps}");
            if done.is_ok() {
                assert_eq!(found, new);
                break;
            }
            if found == old { olds += 1 } else { news += 1 }
        }
        assert!(olds > 10 && news > 5, "{olds} {news}");
    }

    #[test]
    fn an_unconfirmed_change_is_undone_whenever_and_wherever_it_is_interrupted() {
        let (old, new) = sets();
        for steps in 0.. {
            for now in [at(160, "a"), at(101, "b"), at(10, "a")] {
                let Place { paths, _root } = place();
                fill(&paths, &old);
                let done = apply(&paths, &interrupted(steps), &old, &new, true);
                let recovered = recover(&paths, &Disk::default(), &now);
                assert_eq!(recovered.problem, None);
                assert_eq!(folder(&paths), old, "{steps} {now:?}");
                assert!(!paths.journal().exists());
                if done.is_ok() {
                    assert!(recovered.undone.is_some());
                    return;
                }
            }
        }
    }

    #[test]
    fn a_change_that_was_prepared_only_is_never_made() {
        let (old, new) = sets();
        for confirm in [false, true] {
            let mut dropped = 0;
            for steps in 0.. {
                let Place { paths, _root } = place();
                fill(&paths, &old);
                let done = apply(&paths, &interrupted(steps), &old, &new, confirm).is_ok();
                let prepared = paths.read_journal().unwrap();
                if prepared.is_none_or(|change| change.phase != Phase::Prepared) {
                    if done {
                        break;
                    }
                    continue;
                }
                dropped += 1;
                let recovered = recover(&paths, &Disk::default(), &at(101, "a"));
                assert_eq!((recovered.dropped, recovered.problem), (Some(2), None));
                assert!(recovered.completed.is_none() && recovered.waiting.is_none());
                assert_eq!(folder(&paths), old);
                assert!(!paths.journal().exists());
            }
            assert!(dropped > 2, "{dropped}");
        }
    }

    #[test]
    fn edits_that_no_daemon_has_read_are_put_aside_by_a_rollback_at_the_start() {
        let (old, new) = sets();
        let Place { paths, _root } = place();
        fill(&paths, &old);
        apply(&paths, &Disk::default(), &old, &new, true).unwrap();
        fs::write(paths.folder.join("a.yaml"), "edited").unwrap();
        fs::write(paths.folder.join("d.yaml"), "made by hand").unwrap();
        let recovered = recover(&paths, &Disk::default(), &at(200, "a"));
        assert_eq!(folder(&paths), old);
        let kept = ["a.yaml.edited-2", "d.yaml.edited-2"].map(|name| paths.folder.join(name));
        assert_eq!(recovered.aside, kept);
        assert_eq!(fs::read_to_string(&kept[0]).unwrap(), "edited");
        assert_eq!(fs::read_to_string(&kept[1]).unwrap(), "made by hand");
    }

    #[test]
    fn a_change_before_its_deadline_goes_on_waiting_after_a_start() {
        let (old, new) = sets();
        let Place { paths, _root } = place();
        fill(&paths, &old);
        apply(&paths, &Disk::default(), &old, &new, true).unwrap();
        let recovered = recover(&paths, &Disk::default(), &at(120, "a"));
        let left = recovered.waiting.unwrap().deadline.unwrap().left(&at(120, "a"));
        assert_eq!(left, Some(Duration::from_secs(40)));
        assert_eq!(folder(&paths), new);
        assert!(paths.journal().exists());
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_enforced_from_the_history() {
        let (old, new) = sets();
        let Place { paths, _root } = place();
        fill(&paths, &old);
        apply(&paths, &Disk::default(), &old, &new, true).unwrap();
        let recovered = recover(&paths, &interrupted(0), &at(200, "a"));
        assert_eq!(recovered.unwritten, Some(old.clone()));
        assert!(recovered.problem.unwrap().contains("cannot be written"));
        assert_eq!(recover(&paths, &Disk::default(), &at(201, "a")).problem, None);
        assert_eq!(folder(&paths), old);
    }

    #[test]
    fn a_change_of_another_folder_is_reported_and_changes_nothing() {
        let (old, new) = sets();
        for confirm in [false, true] {
            // Without a confirmation the journal is still there if the write is interrupted.
            let disk = if confirm { Disk::default() } else { interrupted(35) };
            let Place { paths, _root } = place();
            fill(&paths, &old);
            let _ = apply(&paths, &disk, &old, &new, confirm);
            assert!(paths.journal().exists());
            let before = folder(&paths);
            let other = Paths::new(&paths.state, &paths.folder.with_file_name("other.d"));
            fs::create_dir(&other.folder).unwrap();
            fs::set_permissions(&other.folder, fs::Permissions::from_mode(0o755)).unwrap();
            let mine = texts(&[("mine.yaml", "mine")]);
            fill(&other, &mine);
            let recovered = recover(&other, &Disk::default(), &at(200, "a"));
            let problem = recovered.problem.unwrap();
            assert!(
                problem.contains("policies.d") && problem.contains("other.d"),
                "{problem}"
            );
            assert!(recovered.waiting.is_none() && recovered.undone.is_none());
            assert_eq!((folder(&other), folder(&paths)), (mine, before));
            assert!(!paths.journal().exists());
            assert!(paths.journal().with_extension("json.broken").exists());
        }
    }

    #[test]
    fn damaged_files_are_reported_and_change_nothing() {
        let (old, new) = sets();
        let Place { paths, _root } = place();
        fill(&paths, &old);
        apply(&paths, &Disk::default(), &old, &new, true).unwrap();
        let content = paths.contents().join(digest_of("old a"));
        fs::write(content, "old b").unwrap();
        let recovered = recover(&paths, &Disk::default(), &at(200, "a"));
        assert!(recovered.problem.unwrap().contains("cannot be rolled back"));
        assert_eq!(folder(&paths), new);
        fs::write(paths.journal(), "# kept by palisade 1 00000000\nx").unwrap();
        let recovered = recover(&paths, &Disk::default(), &at(200, "a"));
        assert!(recovered.problem.unwrap().contains("NOT rolled back"));
        assert!(!paths.journal().exists());
        assert_eq!(folder(&paths), new);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Change, rollback, and the starts between them are each interrupted somewhere; the last start is not.
        #[test]
        fn repeated_interruptions_never_leave_a_mixture(
            first in 0_usize..80, undone in proptest::option::of(0_usize..40), starts in proptest::collection::vec(0_usize..30, 0..4),
            confirm in any::<bool>(), last in prop_oneof![Just(at(101, "a")), Just(at(200, "a")), Just(at(101, "b"))],
        ) {
            let (old, new) = sets();
            let Place { paths, _root } = place();
            fill(&paths, &old);
            let done = apply(&paths, &interrupted(first), &old, &new, confirm).is_ok();
            if let (true, true, Some(steps)) = (done, confirm, undone) {
                let _ = undo(&paths, &interrupted(steps));
            }
            for steps in starts {
                let _ = recover(&paths, &interrupted(steps), &at(101, "a"));
            }
            let recovered = recover(&paths, &Disk::default(), &last);
            prop_assert_eq!(recovered.problem, None);
            let found = folder(&paths);
            prop_assert!(found == old || found == new, "{:?}", found);
            if confirm && last != at(101, "a") {
                prop_assert_eq!(found, old);
            }
        }
    }
}
