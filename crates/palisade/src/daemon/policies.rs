//! The policy files: their present content, the content in force, and the last good copies on disk.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use palisade_model::{
    diagnostic::{Diagnostic, Severity},
    rule::{Location, Policy},
};
use palisade_policy::{
    compile::{FileContent, ResourceName, already_there},
    parse::{Parsed, decode, is_blank, parse},
};
use tracing::{error, info, warn};

use super::{
    checked_file,
    keeper::{POLICIES, PolicyTexts},
    watcher::{Changes, is_policy_file, policy_file_names, subfolder_names},
};
use crate::control::api::{PolicyFile, PolicyFileState};

/// Largest policy file that is read, bytes.
pub(super) const MAX_FILE: u64 = 64 << 20;

/// Content of files for the compiler, by name; `None` if the file was removed.
pub(super) type ParsedFiles = BTreeMap<String, Option<FileContent>>;

/// Texts of policy files by name, which are enforced in place of the files of the folder.
pub(super) type PinnedTexts = BTreeMap<String, Arc<str>>;

/// The files of the policy folder.
#[derive(Debug)]
pub(super) struct PolicyFiles {
    dir: PathBuf,
    /// Texts that are read in place of the files of the folder, while a command changes the folder.
    pinned: Option<PinnedTexts>,
    /// Directory of the last good copies.
    good_dir: PathBuf,
    files: BTreeMap<String, File>,
    /// Removed files whose content the compiler still has.
    removed: BTreeSet<String>,
    /// Error of the last attempt to read the folder.
    folder_problem: Option<String>,
    /// Subfolders, which are not read.
    subfolders: BTreeSet<String>,
    /// Whether no policy is known: the folder could not be read since the start, and there are no copies.
    never_read: bool,
    /// Files that were broken at the start and have no usable last good copy.
    lost: BTreeSet<String>,
    /// Events since the last [`Self::take_news`].
    news: Vec<News>,
}

/// Event of a file.
#[derive(Debug)]
pub(super) struct News {
    /// Name of the file in the folder.
    pub file: String,
    /// Kind of the event.
    pub event: Event,
    /// Names of the policies of the file: the accepted ones; after a removal, those that were in force before; after a
    /// refusal, those that stay in force.
    pub policies: Arc<[String]>,
}

/// Kind of event of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The compiler has accepted a new file.
    Applied,
    /// The compiler has accepted the changed content of a known file.
    Changed,
    /// The file was removed.
    Removed,
    /// The content has errors, or the compiler has refused it.
    Refused,
}

impl Event {
    /// Returns the name of the event in the log.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Changed => "changed",
            Self::Removed => "removed",
            Self::Refused => "refused",
        }
    }
}

/// State of one file.
#[derive(Debug, Default)]
struct File {
    /// Content that is in force.
    good: Option<Good>,
    /// Content that is to be in force.
    candidate: Option<Candidate>,
    /// Content that has no errors of its own, but that the compiler refused together with the other files. It is
    /// offered again with each change.
    rejected: Option<Arc<str>>,
    /// Diagnostics of the present content.
    diagnostics: Vec<Diagnostic>,
    /// Why the compiler refused the present content.
    refusals: Vec<Diagnostic>,
    /// Whether the present content has errors or was refused.
    broken: bool,
    /// Whether the next [`PolicyFiles::parsed_files`] leaves out `rejected`.
    postponed: bool,
}

#[derive(Debug)]
struct Good {
    text: Arc<str>,
    policies: Arc<[String]>,
}

#[derive(Debug)]
struct Candidate {
    text: Arc<str>,
    policies: Arc<[String]>,
    /// Parsed content; `None` once it was offered to the compiler.
    content: Option<FileContent>,
    /// Whether this is the last good copy and not the present content.
    kept: bool,
}

impl Candidate {
    fn new(text: Arc<str>, parsed: Parsed) -> Self {
        Self {
            kept: false,
            text,
            policies: parsed.policies.iter().map(Policy::qualified_name).collect(),
            content: Some(FileContent {
                policies: parsed.policies,
                cidr_groups: parsed.cidr_groups,
            }),
        }
    }
}

impl PolicyFiles {
    /// Returns a state that knows no file.
    pub(super) fn new(dir: &Path, state_dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            pinned: None,
            good_dir: state_dir.join(POLICIES),
            files: BTreeMap::new(),
            removed: BTreeSet::new(),
            folder_problem: None,
            subfolders: BTreeSet::new(),
            never_read: false,
            lost: BTreeSet::new(),
            news: Vec::new(),
        }
    }

    /// Makes the next [`Self::load`] and [`Self::update`] read these texts in place of the files of the folder; `None`:
    /// the folder again.
    pub(super) fn pin(&mut self, texts: Option<PinnedTexts>) {
        self.pinned = texts;
    }

    /// Looks for subfolders, which an operator can take for folders of policies.
    fn find_subfolders(&mut self) {
        let mut found = subfolder_names(&self.dir);
        // One that is named like a policy file counts as a broken file.
        found.retain(|name| !is_policy_file(name));
        if found != self.subfolders {
            self.subfolders = found;
            if let Some(warning) = self.subfolder_warning() {
                warn!(%warning, "a subfolder has no effect");
            }
        }
    }

    /// Returns a warning about subfolders for `status`.
    pub(super) fn subfolder_warning(&self) -> Option<String> {
        const MAX_NAMED: usize = 10;
        if self.subfolders.is_empty() {
            return None;
        }
        let named: Vec<&str> = self
            .subfolders
            .iter()
            .take(MAX_NAMED)
            .map(String::as_str)
            .collect();
        let more = match self.subfolders.len().saturating_sub(MAX_NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        Some(format!(
            "{}: subfolders are not read: {}{more}; move their policy files up",
            self.dir.display(),
            named.join(", ")
        ))
    }

    /// Returns the names of the files.
    fn names(&self) -> io::Result<BTreeSet<String>> {
        match &self.pinned {
            Some(texts) => Ok(texts.keys().cloned().collect()),
            None => policy_file_names(&self.dir),
        }
    }

    /// Returns the content of a file.
    fn content(&self, name: &str) -> io::Result<Vec<u8>> {
        match &self.pinned {
            Some(texts) => texts
                .get(name)
                .map(|text| text.as_bytes().to_vec())
                .ok_or_else(|| io::ErrorKind::NotFound.into()),
            None => read_bytes(&self.dir.join(name)),
        }
    }

    /// Returns the names of the files whose present content is not in force, and of removed files whose policies are.
    pub(super) fn broken(&self) -> Vec<String> {
        let broken = self.files.iter().filter(|(_, file)| file.broken);
        broken
            .map(|(name, _)| name)
            .chain(&self.removed)
            .cloned()
            .collect()
    }

    /// Returns the events since the last call.
    pub(super) fn take_news(&mut self) -> Vec<News> {
        std::mem::take(&mut self.news)
    }

    /// Reads all files for the first time. The last good copy replaces the content of a broken file, and of all files
    /// if the folder cannot be read.
    pub(super) fn load(&mut self) {
        self.find_subfolders();
        match self.names() {
            Ok(names) => {
                for name in names {
                    self.read(&name);
                    if self.files.get(&name).is_some_and(|file| file.broken) {
                        let kept = self.kept(&name);
                        if kept.is_none() {
                            self.lost.insert(name.clone());
                        }
                        self.files.entry(name.clone()).or_default().candidate = kept;
                        self.report_broken(&name);
                    }
                }
                self.keep_owners();
            }
            Err(error) => {
                for name in policy_file_names(&self.good_dir).unwrap_or_default() {
                    let file = File {
                        candidate: self.kept(&name),
                        broken: true,
                        ..File::default()
                    };
                    if file.candidate.is_none() {
                        self.lost.insert(name.clone());
                    }
                    self.files.insert(name, file);
                }
                self.never_read = self.files.is_empty();
                self.folder_failed(&error);
            }
        }
    }

    /// Returns why policies are unknown: the problem of the folder if no policy is known, or else the names of the
    /// files that have been broken since the start and have no last good copy. `None` if all policies are known.
    /// Unknown policies can have deny rules.
    pub(super) fn unknown(&self) -> Option<String> {
        if self.never_read {
            return self.folder_problem.clone();
        }
        let is_lost = |name: &&String| {
            self.files
                .get(*name)
                .is_some_and(|file| file.broken && file.good.is_none())
        };
        let lost: Vec<&str> = self.lost.iter().filter(is_lost).map(String::as_str).collect();
        (!lost.is_empty()).then(|| {
            format!(
                "{}: broken since the start, and no last good copy could be read in {}",
                lost.join(", "),
                self.good_dir.display()
            )
        })
    }

    /// Reads changed files. Returns whether there is a change to offer to the compiler.
    pub(super) fn update(&mut self, changes: &Changes) -> bool {
        let mut names = changes.files.clone();
        if changes.rescan {
            self.find_subfolders();
            match self.names() {
                Ok(found) => {
                    self.folder_problem = None;
                    self.never_read = false;
                    names.extend(found);
                    names.extend(self.files.keys().cloned());
                }
                Err(error) => self.folder_failed(&error),
            }
        }
        if self.folder_problem.is_none() {
            for name in &names {
                self.read(name);
                if self.files.get(name).is_some_and(|file| file.broken) {
                    self.report_broken(name);
                }
            }
        }
        let candidates = self.files.values().filter_map(|file| file.candidate.as_ref());
        !self.removed.is_empty()
            || candidates
                .into_iter()
                .any(|candidate| candidate.content.is_some())
    }

    /// Handles a folder that cannot be read. All policies stay in force. (If the folder is empty, in contrast, all
    /// policies are removed.)
    fn folder_failed(&mut self, problem: &io::Error) {
        let meaning = if self.never_read {
            "no policy is known and there are no copies; make the folder ([policy] dir)"
        } else {
            "the last policies stay in force"
        };
        let text = format!("{}: {problem}; {meaning}", self.dir.display());
        error!(dir = %self.dir.display(), error = %problem, "the policy folder cannot be read; {meaning}");
        self.folder_problem = Some(text);
    }

    /// Decides at a start which of several files with the same resource owns it: the file whose last good copy has the
    /// resource, or else the first by name. The content of the other files is refused. Without this rule, a duplicate
    /// that was refused while the daemon ran could replace the original at the next start.
    fn keep_owners(&mut self) {
        let mut places: BTreeMap<ResourceName, Vec<(String, Location)>> = BTreeMap::new();
        for (file, candidate) in self
            .files
            .iter()
            .filter_map(|(name, file)| Some((name, file.candidate.as_ref()?)))
        {
            for (resource, location) in candidate.content.iter().flat_map(FileContent::resources) {
                places
                    .entry(resource)
                    .or_default()
                    .push((file.clone(), location.clone()));
            }
        }
        for (resource, places) in places.into_iter().filter(|(_, places)| places.len() > 1) {
            let had_it = |file: &str| {
                self.kept(file)
                    .and_then(|kept| kept.content)
                    .is_some_and(|content| content.resources().any(|(name, _)| name == resource))
            };
            let owner = places.iter().position(|(file, _)| had_it(file)).unwrap_or(0);
            let first = places[owner].1.clone();
            for (file, location) in places
                .into_iter()
                .enumerate()
                .filter(|(at, _)| *at != owner)
                .map(|(_, place)| place)
            {
                let content = self.rejected(&file, vec![already_there(&resource, &location, &first)]);
                let Some(file) = self.files.get_mut(&file) else {
                    continue;
                };
                file.postponed = true;
                if let (Some(content), Some(candidate)) = (content, &mut file.candidate) {
                    candidate.content = Some(content);
                }
            }
        }
    }

    fn read(&mut self, name: &str) {
        let path = self.dir.join(name);
        let shown = path.display().to_string();
        let is_pinned = self.pinned.is_some();
        let text = match self.content(name).map(|bytes| decode(&shown, bytes)) {
            // A pinned text was not truncated: it is what a command, or the rollback of one, puts in force.
            Ok(Ok(text)) if is_blank(&text) && !is_pinned => self.unless_emptied(name, &shown, text),
            Ok(text) => text,
            Err(problem)
                if problem.kind() == io::ErrorKind::NotFound && (is_pinned || !is_dangling(&path)) =>
            {
                if let Some(file) = self.files.remove(name) {
                    self.news.push(News {
                        file: name.to_owned(),
                        event: Event::Removed,
                        policies: file
                            .good
                            .as_ref()
                            .map_or_else(|| [].into(), |good| Arc::clone(&good.policies)),
                    });
                    if file.good.is_some() {
                        self.removed.insert(name.to_owned());
                    }
                }
                return;
            }
            Err(problem) => Err(problem_of_file(&shown, format!("cannot be read: {problem}"))),
        };
        let text: Arc<str> = match text {
            Ok(text) => text.into(),
            Err(problem) => {
                let file = self.files.entry(name.to_owned()).or_default();
                file.candidate = None;
                file.rejected = None;
                file.refusals.clear();
                file.diagnostics = vec![problem];
                file.broken = true;
                return;
            }
        };
        let file = self.files.entry(name.to_owned()).or_default();
        let unchanged = file.good.as_ref().is_some_and(|good| good.text == text);
        if unchanged && !file.broken && file.candidate.is_none() {
            return;
        }
        let parsed = parse(&shown, &text);
        file.rejected = None;
        file.refusals.clear();
        file.candidate = None;
        file.broken = parsed.has_errors();
        file.diagnostics.clone_from(&parsed.diagnostics);
        if !file.broken {
            self.removed.remove(name);
            for diagnostic in &parsed.diagnostics {
                match diagnostic.severity {
                    Severity::Note => info!(file = name, %diagnostic, "a policy file has a note"),
                    Severity::Warning | Severity::Error => {
                        warn!(file = name, %diagnostic, "a policy file has a warning")
                    }
                }
            }
            if !unchanged {
                file.candidate = Some(Candidate::new(text, parsed));
            }
        }
    }

    /// Returns the content of a file that is blank now, or an error if the file had policies before. Such a file was
    /// truncated (an interrupted copy, a full disk, a power failure) or is being written. To remove policies, an
    /// operator deletes the file or leaves a comment in it.
    fn unless_emptied(&self, name: &str, shown: &str, text: String) -> Result<String, Diagnostic> {
        let good = self.files.get(name).and_then(|file| file.good.as_ref());
        let before = match good {
            Some(good) => good.policies.len(),
            None => self.kept(name).map_or(0, |kept| kept.policies.len()),
        };
        if before == 0 {
            return Ok(text);
        }
        let message = "the file is empty, and held policies before; to take them away remove the file, or leave a \
                       comment in it";
        Err(problem_of_file(shown, message.to_owned()))
    }

    fn report_broken(&mut self, name: &str) {
        let Some(file) = self.files.get(name) else { return };
        self.news.push(News {
            file: name.to_owned(),
            event: Event::Refused,
            policies: file
                .good
                .as_ref()
                .map_or_else(|| [].into(), |good| Arc::clone(&good.policies)),
        });
        for diagnostic in file.diagnostics.iter().chain(&file.refusals) {
            error!(file = name, %diagnostic, "a policy file has an error");
        }
        if file.good.is_some() || file.candidate.is_some() {
            error!(
                file = name,
                "a policy file is broken; its last good content stays in force"
            );
        } else {
            error!(
                file = name,
                "a policy file is broken and never was good; NOTHING of it is in force"
            );
        }
    }

    /// Returns the last good copy of a file; `None` if there is none or it cannot be used.
    fn kept(&self, name: &str) -> Option<Candidate> {
        let path = self.good_dir.join(name);
        if !path.exists() {
            return None;
        }
        let text = checked_file::read(&path)
            .inspect_err(|error| warn!(file = %path.display(), %error, "the last good copy of a policy file cannot be read"))
            .ok()?;
        // The copy is parsed under the name of the original file, so that the locations of rules refer to that file.
        let parsed = parse(&self.dir.join(name).display().to_string(), &text);
        if parsed.has_errors() {
            warn!(
                file = %path.display(),
                "the last good copy of a policy file has errors in this version"
            );
            return None;
        }
        Some(Candidate {
            kept: true,
            ..Candidate::new(text.into(), parsed)
        })
    }

    /// Returns the content for the compiler: removed files, changed files, and files that the compiler has refused
    /// before.
    pub(super) fn parsed_files(&mut self) -> ParsedFiles {
        let mut files = ParsedFiles::new();
        for name in std::mem::take(&mut self.removed) {
            files.insert(name, None);
        }
        for (name, file) in &mut self.files {
            if std::mem::take(&mut file.postponed) {
            } else if file.candidate.is_none()
                && let Some(text) = file.rejected.take()
            {
                let parsed = parse(&self.dir.join(name).display().to_string(), &text);
                file.candidate = Some(Candidate::new(text, parsed));
            }
            if let Some(content) = file
                .candidate
                .as_mut()
                .and_then(|candidate| candidate.content.take())
            {
                files.insert(name.clone(), Some(content));
            }
        }
        files
    }

    /// Returns again the content of a file whose offer the compiler has neither accepted nor refused yet; `None` if
    /// there is none, for example because the file was removed.
    pub(super) fn parsed(&self, name: &str) -> Option<FileContent> {
        let candidate = self.files.get(name)?.candidate.as_ref()?;
        let parsed = parse(&self.dir.join(name).display().to_string(), &candidate.text);
        Candidate::new(Arc::clone(&candidate.text), parsed).content
    }

    /// Notes that the compiler has accepted the offer of a file.
    pub(super) fn accepted(&mut self, name: &str) {
        let Some(file) = self.files.get_mut(name) else {
            return;
        };
        if let Some(candidate) = file.candidate.take() {
            if !candidate.kept {
                file.broken = false;
                file.refusals.clear();
            }
            self.news.push(News {
                file: name.to_owned(),
                event: if file.good.is_some() {
                    Event::Changed
                } else {
                    Event::Applied
                },
                policies: Arc::clone(&candidate.policies),
            });
            file.good = Some(Good {
                text: candidate.text,
                policies: candidate.policies,
            });
        }
    }

    /// Notes that the compiler has refused the offer of a file, with the errors. Returns the last good copy as a new
    /// offer, if nothing of the file is in force and the copy differs from the refused content.
    pub(super) fn rejected(&mut self, name: &str, problems: Vec<Diagnostic>) -> Option<FileContent> {
        let kept = match self.files.get(name) {
            Some(file) if file.good.is_none() && !file.broken => self.kept(name),
            _ => None,
        };
        let Some(file) = self.files.get_mut(name) else {
            // The file does not exist any more. Its refused removal is offered again; until then the policies of the
            // file stay in force.
            self.removed.insert(name.to_owned());
            return None;
        };
        let refused = file.candidate.take()?;
        if !file.broken {
            file.rejected = Some(Arc::clone(&refused.text));
        }
        file.broken = true;
        file.refusals = problems;
        file.candidate = kept.filter(|kept| kept.text != refused.text);
        let instead = file
            .candidate
            .as_mut()
            .and_then(|candidate| candidate.content.take());
        self.report_broken(name);
        instead
    }

    /// Returns the texts that a restart needs if it finds files broken: the content in force of each file. `None` means
    /// that the copy on the disk stays: for a file without content in force, and for a removed file whose policies are
    /// still in force.
    pub(super) fn to_keep(&self) -> PolicyTexts {
        let good = |file: &File| file.good.as_ref().map(|good| Arc::clone(&good.text));
        let there = self.files.iter().map(|(name, file)| (name.clone(), good(file)));
        let going = self.removed.iter().map(|name| (name.clone(), None));
        going.chain(there).collect()
    }

    /// Returns the state of each file, for `status`.
    pub(super) fn report(&self) -> Vec<PolicyFile> {
        let report = self.files.iter().map(|(name, file)| PolicyFile {
            file: name.clone(),
            state: match (&file.good, file.broken) {
                (_, false) => PolicyFileState::InForce,
                (Some(_), true) => PolicyFileState::LastGood,
                (None, true) => PolicyFileState::Unused,
            },
            policies: file.good.as_ref().map_or(0, |good| good.policies.len()),
            diagnostics: file
                .diagnostics
                .iter()
                .chain(&file.refusals)
                .map(ToString::to_string)
                .collect(),
        });
        report.collect()
    }

    /// Returns the content in force of a file. The present content of a broken file differs from it.
    pub(super) fn text_in_force(&self, name: &str) -> Option<Arc<str>> {
        let good = self.files.get(name)?.good.as_ref()?;
        Some(Arc::clone(&good.text))
    }

    /// Returns the path of a file, as messages name it.
    pub(super) fn shown(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// Returns the error of the last attempt to read the folder.
    pub(super) fn folder_problem(&self) -> Option<&str> {
        self.folder_problem.as_deref()
    }
}

fn problem_of_file(file: &str, message: String) -> Diagnostic {
    Diagnostic {
        severity: Severity::Error,
        location: Location {
            file: file.into(),
            line: 1,
            column: 1,
        },
        message,
    }
}

/// Returns whether a file that cannot be opened is a symbolic link without a target. Such a file is broken, not
/// removed.
fn is_dangling(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        // Opening a pipe would block.
        return Err(io::Error::other("not a regular file"));
    }
    if metadata.len() > MAX_FILE {
        return Err(io::Error::other(format!("larger than {} MiB", MAX_FILE >> 20)));
    }
    fs::read(path)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::daemon::keeper::keep_policies;

    struct Folder {
        _root: tempfile::TempDir,
        dir: PathBuf,
        state: PathBuf,
    }

    fn folder() -> Folder {
        let root = tempfile::tempdir().unwrap();
        let (dir, state) = (root.path().join("policies.d"), root.path().join("state"));
        fs::create_dir(&dir).unwrap();
        Folder {
            _root: root,
            dir,
            state,
        }
    }

    impl Folder {
        fn files(&self) -> PolicyFiles {
            PolicyFiles::new(&self.dir, &self.state)
        }

        fn loaded(&self) -> Compiled {
            let mut files = self.files();
            files.load();
            let mut compiled = Compiled {
                files,
                taken: BTreeMap::new(),
            };
            compiled.take();
            compiled
        }

        fn write(&self, name: &str, text: &str) -> Changes {
            fs::write(self.dir.join(name), text).unwrap();
            changed(name)
        }
    }

    /// The files with a compiler that accepts every policy but those named `refused`.
    struct Compiled {
        files: PolicyFiles,
        taken: BTreeMap<String, Vec<String>>,
    }

    impl Compiled {
        fn take(&mut self) {
            for (name, content) in self.files.parsed_files() {
                let mut content = content;
                loop {
                    let names = |content: &FileContent| -> Vec<String> {
                        content
                            .policies
                            .iter()
                            .map(|policy| policy.name.clone())
                            .collect()
                    };
                    match content {
                        None => drop(self.taken.remove(&name)),
                        Some(content) if !names(&content).contains(&"refused".to_owned()) => {
                            self.taken.insert(name.clone(), names(&content));
                        }
                        Some(_) => {
                            let problem = problem_of_file("x", "conflict".into());
                            content = self.files.rejected(&name, vec![problem]);
                            if content.is_none() {
                                break;
                            }
                            continue;
                        }
                    }
                    self.files.accepted(&name);
                    break;
                }
            }
        }

        fn update(&mut self, changes: &Changes) -> bool {
            let changed = self.files.update(changes);
            self.take();
            changed
        }

        fn save(&mut self) -> io::Result<()> {
            fs::create_dir_all(&self.files.good_dir)?;
            keep_policies(&self.files.good_dir, &self.files.to_keep(), &mut HashMap::new())
        }
    }

    fn changed(name: &str) -> Changes {
        Changes {
            files: [name.to_owned()].into(),
            ..Changes::default()
        }
    }

    fn policy(name: &str) -> String {
        format!(
            "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata:\n  name: {name}\n\
             spec:\n  endpointSelector: {{}}\n  ingress:\n  - fromEndpoints:\n    - {{}}\n"
        )
    }

    const BROKEN: &str = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: [\n";

    fn names(files: &Compiled) -> Vec<String> {
        files.taken.values().flatten().cloned().collect()
    }

    fn state(files: &Compiled, name: &str) -> PolicyFileState {
        let report = files.files.report();
        report.iter().find(|file| file.file == name).unwrap().state
    }

    #[test]
    fn a_broken_file_keeps_its_last_good_content_over_a_restart() {
        let folder = folder();
        folder.write("a.yaml", &policy("a"));
        let mut files = folder.loaded();
        files.save().unwrap();
        assert_eq!(names(&files), ["a"]);
        assert!(!files.update(&folder.write("a.yaml", BROKEN)));
        assert_eq!(names(&files), ["a"]);
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::LastGood);
        let report = files.files.report();
        let expected = format!("{}:4:1: ", folder.dir.join("a.yaml").display());
        assert!(report[0].diagnostics[0].starts_with(&expected), "{report:?}");

        let mut files = folder.loaded();
        assert_eq!(names(&files), ["a"]);
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::LastGood);
        assert!(files.update(&folder.write("a.yaml", &policy("b"))));
        assert_eq!(names(&files), ["b"]);
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::InForce);
    }

    #[test]
    fn a_file_that_never_was_good_does_not_affect_others() {
        let folder = folder();
        folder.write("a.yaml", &policy("a"));
        folder.write("b.yaml", BROKEN);
        let mut files = folder.loaded();
        assert_eq!(names(&files), ["a"]);
        assert_eq!(state(&files, "b.yaml"), PolicyFileState::Unused);
        assert!(
            files
                .files
                .unknown()
                .unwrap()
                .contains("b.yaml: broken since the start")
        );
        files.update(&folder.write("b.yaml", &policy("b")));
        assert_eq!(files.files.unknown(), None);
        // A new file that is broken was never in force, so nothing is lost.
        files.update(&folder.write("c.yaml", BROKEN));
        assert_eq!(files.files.unknown(), None);
    }

    #[test]
    fn a_damaged_last_good_copy_is_reported_and_not_used() {
        let folder = folder();
        folder.write("a.yaml", &policy("a"));
        let mut files = folder.loaded();
        files.save().unwrap();
        let kept = folder.state.join("policies/a.yaml");
        let whole = fs::read(&kept).unwrap();
        folder.write("a.yaml", BROKEN);
        for content in [&whole[..whole.len() - 9], &vec![0; whole.len()], b""] {
            fs::write(&kept, content).unwrap();
            let files = folder.loaded();
            assert!(names(&files).is_empty());
            assert!(files.files.unknown().unwrap().contains("a.yaml"));
        }
        fs::write(&kept, &whole).unwrap();
        let files = folder.loaded();
        assert_eq!(
            (names(&files), files.files.unknown()),
            (vec!["a".to_owned()], None)
        );
    }

    #[test]
    fn a_removed_file_does_not_come_back_after_a_restart() {
        let folder = folder();
        folder.write("a.yaml", &policy("a"));
        folder.write("b.yaml", &policy("b"));
        let mut files = folder.loaded();
        files.save().unwrap();
        fs::remove_file(folder.dir.join("a.yaml")).unwrap();
        assert!(files.update(&changed("a.yaml")));
        files.save().unwrap();
        assert_eq!(names(&files), ["b"]);
        // Removed while no daemon ran.
        fs::remove_file(folder.dir.join("b.yaml")).unwrap();
        let mut files = folder.loaded();
        assert!(names(&files).is_empty());
        files.save().unwrap();
        assert!(
            policy_file_names(&folder.state.join("policies"))
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn rewriting_the_same_content_changes_nothing() {
        let folder = folder();
        let change = folder.write("a.yaml", &policy("a"));
        let mut files = folder.loaded();
        assert!(!files.update(&change));
        files.save().unwrap();
        assert!(!files.update(&change));
        assert!(!files.update(&Changes::all()));
        assert!(!files.update(&folder.write("a.yaml", BROKEN)));
        assert!(!files.update(&folder.write("a.yaml", &policy("a"))));
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::InForce);
    }

    #[test]
    fn an_unreadable_folder_keeps_its_policies() {
        let folder = folder();
        folder.write("a.yaml", &policy("a"));
        let mut files = folder.loaded();
        files.save().unwrap();
        let away = folder.dir.with_extension("away");
        fs::rename(&folder.dir, &away).unwrap();
        assert!(!files.update(&Changes::all()));
        assert_eq!(names(&files), ["a"]);
        assert!(files.files.folder_problem().is_some());
        // After a restart the last good copies are used.
        let mut files = folder.loaded();
        assert_eq!(names(&files), ["a"]);
        fs::rename(&away, &folder.dir).unwrap();
        files.update(&Changes::all());
        assert_eq!(
            (names(&files), files.files.folder_problem()),
            (vec!["a".to_owned()], None)
        );
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::InForce);
        // On a node that never had policies a missing folder is reported.
        fs::remove_dir_all(&folder.dir).unwrap();
        fs::remove_dir_all(&folder.state).unwrap();
        let mut files = folder.files();
        files.load();
        assert!(files.folder_problem().unwrap().contains("make the folder"));
        assert_eq!(files.unknown().as_deref(), files.folder_problem());
        fs::create_dir(&folder.dir).unwrap();
        files.update(&Changes::all());
        assert_eq!(files.unknown(), None);
    }

    #[test]
    fn a_refused_file_keeps_its_old_policies_and_is_tried_again() {
        let folder = folder();
        folder.write("a.yaml", &policy("a"));
        let mut files = folder.loaded();
        files.save().unwrap();
        files.update(&folder.write("a.yaml", &policy("refused")));
        assert_eq!(names(&files), ["a"]);
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::LastGood);
        assert!(files.files.report()[0].diagnostics[0].contains("conflict"));
        files.save().unwrap();
        // At the next start the last good copy is used.
        let mut files = folder.loaded();
        assert_eq!(names(&files), ["a"]);
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::LastGood);
        assert!(
            files.files.parsed_files().contains_key("a.yaml"),
            "it is not tried again"
        );
        // Without a copy nothing of the file is in force.
        fs::remove_dir_all(&folder.state).unwrap();
        let files = folder.loaded();
        assert!(names(&files).is_empty());
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::Unused);
    }

    #[test]
    fn an_emptied_file_removes_no_policy() {
        let folder = folder();
        folder.write("a.yaml", &policy("a"));
        let mut files = folder.loaded();
        files.save().unwrap();
        for damaged in [
            "",
            "\n \n",
            "---\n",
            "\u{feff}",
            &"\0".repeat(4096),
            &format!("{}\0", policy("b")),
        ] {
            files.update(&folder.write("a.yaml", damaged));
            assert_eq!(names(&files), ["a"], "{damaged:?}");
            assert_eq!(state(&files, "a.yaml"), PolicyFileState::LastGood, "{damaged:?}");
            // The next start does not accept the emptied file either.
            let files = folder.loaded();
            assert_eq!(names(&files), ["a"], "{damaged:?}");
            assert_eq!(state(&files, "a.yaml"), PolicyFileState::LastGood, "{damaged:?}");
        }
        fs::write(folder.dir.join("a.yaml"), b"a: \xff").unwrap();
        files.update(&changed("a.yaml"));
        assert!(files.files.report()[0].diagnostics[0].contains("a.yaml:1:4: the byte 0xff"));
        assert_eq!(names(&files), ["a"]);
        files.update(&folder.write("a.yaml", "# nothing any more\n"));
        assert!(names(&files).is_empty());
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::InForce);
        files.save().unwrap();
        // An empty file that never had policies is accepted.
        files.update(&folder.write("b.yaml", ""));
        assert_eq!(state(&files, "b.yaml"), PolicyFileState::InForce);
    }

    #[test]
    fn a_blank_text_that_a_command_enforces_takes_the_policies_away() {
        let folder = folder();
        folder.write("a.yaml", &policy("a"));
        let mut files = folder.loaded();
        files.save().unwrap();
        let blank = PinnedTexts::from([("a.yaml".to_owned(), "\n".into())]);
        files.files.pin(Some(blank));
        files.update(&Changes::all());
        assert!(names(&files).is_empty());
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::InForce);
        // The rollback is over: the folder has the same text, and is followed again.
        folder.write("a.yaml", "\n");
        files.files.pin(None);
        files.update(&Changes::all());
        assert!(names(&files).is_empty());
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::InForce);
    }

    #[test]
    fn a_resource_stays_in_its_file_over_a_restart() {
        let folder = folder();
        folder.write("b.yaml", &policy("p"));
        let mut files = folder.loaded();
        files.save().unwrap();
        folder.write("a.yaml", &policy("p"));
        let mut files = folder.loaded();
        assert_eq!(files.taken.keys().collect::<Vec<_>>(), ["b.yaml"]);
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::Unused);
        assert_eq!(state(&files, "b.yaml"), PolicyFileState::InForce);
        files.save().unwrap();
        let report = files.files.report();
        assert!(
            report[0].diagnostics[0].contains("CiliumNetworkPolicy default/p is already in")
                && report[0].diagnostics[0].contains("b.yaml:1:1, which"),
            "{report:?}"
        );
        // Of two new files with the same resource the first by name owns it.
        fs::remove_dir_all(&folder.state).unwrap();
        let files = folder.loaded();
        assert_eq!(files.taken.keys().collect::<Vec<_>>(), ["a.yaml"]);
        assert_eq!(state(&files, "b.yaml"), PolicyFileState::Unused);
    }

    #[test]
    fn a_file_is_not_broken_once_the_compiler_accepts_it() {
        let folder = folder();
        folder.write("a.yaml", &policy("refused"));
        let mut files = folder.loaded();
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::Unused);
        for name in files.files.parsed_files().into_keys() {
            files.files.accepted(&name);
        }
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::InForce);
        assert!(files.files.report()[0].diagnostics.is_empty());
    }

    #[test]
    fn dangling_links_and_directories_are_broken_files() {
        let folder = folder();
        std::os::unix::fs::symlink("nowhere", folder.dir.join("a.yaml")).unwrap();
        fs::create_dir(folder.dir.join("b.yaml")).unwrap();
        let files = folder.loaded();
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::Unused);
        assert_eq!(state(&files, "b.yaml"), PolicyFileState::Unused);
    }
}
