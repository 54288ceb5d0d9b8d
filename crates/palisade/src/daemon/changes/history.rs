//! The history of the policy sets that were enforced. Pure: [`super::store`] writes it to the state directory.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::control::api::{Author, ChangeKind, ChangeState, FileChanges};

/// Largest number of entries that are kept.
pub(super) const MAX_ENTRIES: usize = 50;
/// Largest size of all kept contents together, bytes. The present set and one that can be rolled back to are kept even
/// if they are larger.
pub(super) const MAX_BYTES: u64 = 128 << 20;
/// Version of the layout.
const VERSION: u32 = 1;

/// SHA-256 of a content, as hexadecimal digits.
pub(in crate::daemon) type Digest = String;

/// A policy file of a set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::daemon) struct StoredFile {
    /// Digest of the content.
    pub digest: Digest,
    /// Size of the content, bytes.
    pub size: u64,
    /// Permission bits of the file.
    pub mode: u32,
}

/// The files of a policy set, by name.
pub(in crate::daemon) type Set = BTreeMap<String, StoredFile>;

/// A policy set that was enforced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::daemon) struct Entry {
    /// Number, ascending from 1.
    pub number: u64,
    /// Time at which it was enforced, ns since 1970.
    pub time: i64,
    /// What caused it.
    pub kind: ChangeKind,
    /// Who caused it; `None` if the daemon does not know.
    pub author: Option<Author>,
    /// The author's message.
    pub message: String,
    /// Number of the entry that was put back, for a rollback.
    pub of: Option<u64>,
    /// Revision of the datapath.
    pub revision: u64,
    /// Whether it was confirmed or rolled back.
    pub state: ChangeState,
    /// Names of the files that differ from the entry before.
    pub files: FileChanges,
    /// The files.
    pub set: Set,
}

/// The entries, oldest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::daemon) struct History {
    version: u32,
    /// Number of the next entry.
    next: u64,
    entries: Vec<Entry>,
}

impl Default for History {
    fn default() -> Self {
        Self {
            version: VERSION,
            next: 1,
            entries: Vec::new(),
        }
    }
}

impl History {
    /// Returns the history in a text.
    ///
    /// # Errors
    /// The text is not one that [`Self::text`] has returned.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let history: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        match history.version {
            VERSION => Ok(history),
            other => Err(format!("version {other}, this is version {VERSION}")),
        }
    }

    /// Returns the history as text.
    pub(super) fn text(&self) -> serde_json::Result<String> {
        serde_json::to_string(self)
    }

    /// Returns the entries, oldest first.
    pub(in crate::daemon) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Returns an entry.
    pub(in crate::daemon) fn get(&self, number: u64) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.number == number)
    }

    /// Returns the last entry.
    pub(in crate::daemon) fn last(&self) -> Option<&Entry> {
        self.entries.last()
    }

    /// Returns the number that [`Self::take_number`] returns next.
    pub(super) const fn next_number(&self) -> u64 {
        self.next
    }

    /// Returns a number for an entry and does not return it again.
    pub(super) fn take_number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    /// Adds an entry. The names of changed files are those that differ from the last entry.
    pub(super) fn push(&mut self, mut entry: Entry) {
        let empty = Set::new();
        let before = self.last().map_or(&empty, |last| &last.set);
        entry.files = differing(before, &entry.set);
        self.next = self.next.max(entry.number + 1);
        self.entries.push(entry);
    }

    /// Sets whether an entry was confirmed or rolled back.
    pub(super) fn set_state(&mut self, number: u64, state: ChangeState) {
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.number == number) {
            entry.state = state;
        }
    }

    /// Removes the oldest entries beyond the limits. The last entry stays; contents of `kept` count for nothing.
    pub(super) fn prune(&mut self, kept: &BTreeSet<Digest>) {
        let excess = self.entries.len().saturating_sub(MAX_ENTRIES);
        self.entries.drain(..excess);
        while self.entries.len() > 1 && self.bytes(kept) > MAX_BYTES {
            self.entries.remove(0);
        }
    }

    fn bytes(&self, kept: &BTreeSet<Digest>) -> u64 {
        let sizes: BTreeMap<&Digest, u64> = self
            .entries
            .iter()
            .flat_map(|entry| entry.set.values())
            .filter(|file| !kept.contains(&file.digest))
            .map(|file| (&file.digest, file.size))
            .collect();
        sizes.values().sum()
    }

    /// Returns the digests of all entries.
    pub(super) fn digests(&self) -> BTreeSet<&Digest> {
        let files = self.entries.iter().flat_map(|entry| entry.set.values());
        files.map(|file| &file.digest).collect()
    }
}

/// Returns the names of files that were added, changed and removed. The mode of a file does not count.
pub(super) fn differing(before: &Set, after: &Set) -> FileChanges {
    let mut files = FileChanges::default();
    for (name, file) in after {
        match before.get(name) {
            None => files.added.push(name.clone()),
            Some(old) if old.digest != file.digest => files.changed.push(name.clone()),
            Some(_) => {}
        }
    }
    let gone = before.keys().filter(|name| !after.contains_key(*name));
    files.removed.extend(gone.cloned());
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: u64, files: &[(&str, &str, u64)]) -> Entry {
        Entry {
            number,
            time: 0,
            kind: ChangeKind::Apply,
            author: None,
            message: String::new(),
            of: None,
            revision: number,
            state: ChangeState::Enforced,
            files: FileChanges::default(),
            set: files
                .iter()
                .map(|(name, digest, size)| {
                    let file = StoredFile {
                        digest: (*digest).to_owned(),
                        size: *size,
                        mode: 0o644,
                    };
                    ((*name).to_owned(), file)
                })
                .collect(),
        }
    }

    #[test]
    fn an_entry_names_the_files_that_differ_from_the_entry_before() {
        let mut history = History::default();
        history.push(entry(1, &[("a", "1", 1), ("b", "2", 1)]));
        history.push(entry(2, &[("b", "3", 1), ("c", "1", 1)]));
        let files = &history.last().unwrap().files;
        assert_eq!(
            (&files.added, &files.changed, &files.removed),
            (
                &vec!["c".to_owned()],
                &vec!["b".to_owned()],
                &vec!["a".to_owned()]
            )
        );
        assert_eq!(history.take_number(), 3);
        let text = history.text().unwrap();
        assert_eq!(History::parse(&text).unwrap(), history);
        assert!(History::parse(&text.replace("\"version\":1", "\"version\":7")).is_err());
    }

    #[test]
    fn old_entries_go_when_there_are_too_many_or_their_contents_are_too_large() {
        let mut history = History::default();
        for number in 1..=60 {
            history.push(entry(number, &[("a", "same", 10)]));
        }
        history.prune(&BTreeSet::new());
        assert_eq!(
            (history.entries().len(), history.entries()[0].number),
            (MAX_ENTRIES, 11)
        );
        for number in 61..=64 {
            history.push(entry(number, &[("a", &number.to_string(), MAX_BYTES / 2)]));
        }
        history.prune(&BTreeSet::from(["64".to_owned()]));
        let numbers: Vec<u64> = history.entries().iter().map(|entry| entry.number).collect();
        assert_eq!(numbers, [62, 63, 64]);
        // One set that alone exceeds the limit stays.
        history.push(entry(65, &[("a", "65", MAX_BYTES * 2)]));
        history.prune(&BTreeSet::new());
        assert_eq!(history.entries().len(), 1);
    }
}
