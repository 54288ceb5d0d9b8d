//! The policy files: what each says, what of it is in force, and its last good content on disk.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use palisade_policy::{
    diagnostic::{Diagnostic, Severity},
    parse::{Parsed, parse},
    rule::{CidrGroup, Location, Policy, PolicyKind},
};
use tracing::{error, info, warn};

use super::{
    files::write_atomic,
    watcher::{Changes, is_policy_file},
};
use crate::control::api::{PolicyFile, PolicyFileState};

/// A larger file is no policy somebody wrote.
const MAX_FILE: u64 = 64 << 20;

/// The files of the folder.
#[derive(Debug)]
pub struct PolicyFiles {
    dir: PathBuf,
    /// Where the last good content of each file is kept.
    good_dir: PathBuf,
    files: BTreeMap<String, File>,
    /// Why the folder could not be read last time.
    folder_problem: Option<String>,
}

#[derive(Debug)]
struct File {
    /// What the file said when it was last without errors.
    good: Option<Good>,
    /// What there is to say about its present content.
    diagnostics: Vec<Diagnostic>,
    /// Its present content cannot be used.
    broken: bool,
}

#[derive(Clone, Debug)]
struct Good {
    text: Arc<str>,
    parsed: Arc<Parsed>,
    saved: bool,
}

impl File {
    fn kept(good: Good, broken: bool) -> Self {
        Self {
            diagnostics: good.parsed.diagnostics.clone(),
            good: Some(good),
            broken,
        }
    }
}

/// What the files say together.
#[derive(Debug, Default)]
pub struct Collected {
    /// Every policy, in the order of the files' names.
    pub policies: Vec<Policy>,
    /// Every group of prefixes.
    pub cidr_groups: Vec<CidrGroup>,
    /// Resources that are there twice, by file: the later ones are not used.
    pub doubles: BTreeMap<String, Vec<Diagnostic>>,
}

impl PolicyFiles {
    /// Knows nothing yet.
    pub fn new(dir: &Path, state_dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            good_dir: state_dir.join("policies"),
            files: BTreeMap::new(),
            folder_problem: None,
        }
    }

    /// Reads every file for the first time. For one that is broken the content that was last good counts.
    ///
    /// # Errors
    /// If the folder cannot be read and nothing is known of what it held before.
    pub fn load(&mut self) -> io::Result<()> {
        let kept = policy_file_names(&self.good_dir).unwrap_or_default();
        match policy_file_names(&self.dir) {
            Ok(names) => {
                for name in names {
                    if kept.contains(&name)
                        && let Some(good) = self.read_kept(&name)
                    {
                        self.files.insert(name.clone(), File::kept(good, false));
                    }
                    self.read(&name);
                }
            }
            Err(error) if kept.is_empty() => return Err(error),
            Err(error) => {
                for name in kept {
                    if let Some(good) = self.read_kept(&name) {
                        self.files.insert(name, File::kept(good, true));
                    }
                }
                self.folder_failed(&error);
            }
        }
        Ok(())
    }

    /// Reads what changed. Answers whether what the files say together may be something else now.
    pub fn update(&mut self, changes: &Changes) -> bool {
        let mut names = changes.files.clone();
        if changes.rescan {
            match policy_file_names(&self.dir) {
                Ok(found) => {
                    self.folder_problem = None;
                    names.extend(found);
                    names.extend(self.files.keys().cloned());
                }
                Err(error) => {
                    self.folder_failed(&error);
                    return false;
                }
            }
        }
        // Every one has to be read, whatever came of those before.
        names
            .iter()
            .fold(false, |changed, name| self.read(name) || changed)
    }

    /// An unreadable folder is not an empty one: what was in force stays.
    fn folder_failed(&mut self, problem: &io::Error) {
        error!(
            "{}: {problem}; the policies that were read last stay in force",
            self.dir.display()
        );
        self.folder_problem = Some(format!(
            "{}: {problem}; the policies that were read last stay in force",
            self.dir.display()
        ));
    }

    fn read(&mut self, name: &str) -> bool {
        let path = self.dir.join(name);
        let shown = path.display().to_string();
        let text = match read_text(&path) {
            Ok(text) => text,
            Err(problem) if problem.kind() == io::ErrorKind::NotFound && !is_dangling(&path) => {
                return match self.files.remove(name) {
                    Some(file) => {
                        info!("{shown}: removed");
                        file.good.is_some()
                    }
                    None => false,
                };
            }
            Err(problem) => {
                self.broken(name, vec![problem_of_file(&shown, &problem)]);
                return false;
            }
        };
        let known = self.files.get(name);
        if let Some(File {
            good: Some(good),
            broken: false,
            ..
        }) = known
            && *good.text == *text
            && good.saved
        {
            return false;
        }
        let parsed = parse(&shown, &text);
        if parsed.has_errors() {
            self.broken(name, parsed.diagnostics);
            return false;
        }
        for diagnostic in &parsed.diagnostics {
            match diagnostic.severity {
                Severity::Note => info!("{diagnostic}"),
                Severity::Warning | Severity::Error => warn!("{diagnostic}"),
            }
        }
        let same = known
            .and_then(|file| file.good.as_ref())
            .is_some_and(|good| *good.text == *text);
        let saved = same
            && known
                .and_then(|file| file.good.as_ref())
                .is_some_and(|good| good.saved);
        let diagnostics = parsed.diagnostics.clone();
        self.files.insert(
            name.to_owned(),
            File {
                good: Some(Good {
                    text: text.into(),
                    parsed: Arc::new(parsed),
                    saved,
                }),
                diagnostics,
                broken: false,
            },
        );
        !same
    }

    fn broken(&mut self, name: &str, diagnostics: Vec<Diagnostic>) {
        let file = self.files.entry(name.to_owned()).or_insert_with(|| File {
            good: None,
            diagnostics: Vec::new(),
            broken: true,
        });
        for diagnostic in &diagnostics {
            error!("{diagnostic}");
        }
        if file.good.is_some() {
            error!("{name}: broken; what it said before stays in force");
        } else {
            error!("{name}: broken, and it never was good: NOTHING of this file is in force");
        }
        file.diagnostics = diagnostics;
        file.broken = true;
    }

    fn read_kept(&self, name: &str) -> Option<Good> {
        let path = self.good_dir.join(name);
        let text = read_text(&path)
            .inspect_err(|problem| warn!("{}: {problem}", path.display()))
            .ok()?;
        // Under the name of the file it was, so that rules are where people look for them.
        let parsed = parse(&self.dir.join(name).display().to_string(), &text);
        if parsed.has_errors() {
            warn!(
                "{}: this version cannot read what was good before",
                path.display()
            );
            return None;
        }
        Some(Good {
            text: text.into(),
            parsed: Arc::new(parsed),
            saved: true,
        })
    }

    /// What is to be in force.
    pub fn collect(&self) -> Collected {
        let mut collected = Collected::default();
        let mut policies: HashMap<(PolicyKind, Option<String>, String), Location> = HashMap::new();
        let mut groups: HashMap<String, Location> = HashMap::new();
        for (name, file) in &self.files {
            let Some(good) = &file.good else { continue };
            let mut doubles = Vec::new();
            for policy in &good.parsed.policies {
                let key = (policy.kind, policy.namespace.clone(), policy.name.clone());
                match policies.get(&key) {
                    Some(first) => doubles.push(double(
                        &policy.location,
                        &format!("policy {}", policy.qualified_name()),
                        first,
                    )),
                    None => {
                        policies.insert(key, policy.location.clone());
                        collected.policies.push(policy.clone());
                    }
                }
            }
            for group in &good.parsed.cidr_groups {
                match groups.get(&group.name) {
                    Some(first) => doubles.push(double(
                        &group.location,
                        &format!("CiliumCIDRGroup {}", group.name),
                        first,
                    )),
                    None => {
                        groups.insert(group.name.clone(), group.location.clone());
                        collected.cidr_groups.push(group.clone());
                    }
                }
            }
            if !doubles.is_empty() {
                collected.doubles.insert(name.clone(), doubles);
            }
        }
        collected
    }

    /// Keeps the content of good files for a restart that finds them broken, and forgets files that are gone.
    pub fn save(&mut self) -> io::Result<()> {
        fs::create_dir_all(&self.good_dir)?;
        for (name, file) in &mut self.files {
            if let Some(good) = &mut file.good
                && !good.saved
            {
                write_atomic(&self.good_dir.join(name), good.text.as_bytes())?;
                good.saved = true;
            }
        }
        for name in policy_file_names(&self.good_dir)? {
            if !self.files.contains_key(&name) {
                fs::remove_file(self.good_dir.join(name))?;
            }
        }
        Ok(())
    }

    /// The files, for `status`.
    pub fn report(&self, doubles: &BTreeMap<String, Vec<Diagnostic>>) -> Vec<PolicyFile> {
        let mut report = Vec::new();
        for (name, file) in &self.files {
            let doubles = doubles.get(name).map_or(&[][..], Vec::as_slice);
            report.push(PolicyFile {
                file: name.clone(),
                state: match (&file.good, file.broken) {
                    (_, false) => PolicyFileState::InForce,
                    (Some(_), true) => PolicyFileState::LastGood,
                    (None, true) => PolicyFileState::Unused,
                },
                policies: file
                    .good
                    .as_ref()
                    .map_or(0, |good| good.parsed.policies.len().saturating_sub(doubles.len())),
                diagnostics: file
                    .diagnostics
                    .iter()
                    .chain(doubles)
                    .map(ToString::to_string)
                    .collect(),
            });
        }
        report
    }

    /// Why the folder could not be read last time.
    pub fn folder_problem(&self) -> Option<&str> {
        self.folder_problem.as_deref()
    }
}

fn double(location: &Location, what: &str, first: &Location) -> Diagnostic {
    let diagnostic = Diagnostic {
        severity: Severity::Error,
        location: location.clone(),
        message: format!("{what} is in {first} already; this one is not used: give it another name"),
    };
    error!("{diagnostic}");
    diagnostic
}

fn problem_of_file(file: &str, problem: &io::Error) -> Diagnostic {
    Diagnostic {
        severity: Severity::Error,
        location: Location {
            file: file.into(),
            line: 1,
            column: 1,
        },
        message: format!("cannot be read: {problem}"),
    }
}

/// A link whose target is missing is a broken file, not a removed one.
fn is_dangling(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

fn read_text(path: &Path) -> io::Result<String> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        // A pipe would block the reader for ever.
        return Err(io::Error::other("not a regular file"));
    }
    if metadata.len() > MAX_FILE {
        return Err(io::Error::other(format!("larger than {} MiB", MAX_FILE >> 20)));
    }
    fs::read_to_string(path)
}

/// Names of the policy files of a folder.
pub fn policy_file_names(dir: &Path) -> io::Result<BTreeSet<String>> {
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

#[cfg(test)]
mod tests {
    use super::*;

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

        fn loaded(&self) -> PolicyFiles {
            let mut files = self.files();
            files.load().unwrap();
            files
        }

        fn write(&self, name: &str, text: &str) -> Changes {
            fs::write(self.dir.join(name), text).unwrap();
            changed(name)
        }
    }

    fn changed(name: &str) -> Changes {
        Changes {
            files: [name.to_owned()].into(),
            rescan: false,
        }
    }

    fn policy(name: &str) -> String {
        format!(
            "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata:\n  name: {name}\n\
             spec:\n  endpointSelector: {{}}\n  ingress:\n  - fromEndpoints:\n    - {{}}\n"
        )
    }

    const BROKEN: &str = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: [\n";

    fn names(files: &PolicyFiles) -> Vec<String> {
        files
            .collect()
            .policies
            .iter()
            .map(|policy| policy.name.clone())
            .collect()
    }

    fn state(files: &PolicyFiles, name: &str) -> PolicyFileState {
        let report = files.report(&BTreeMap::new());
        report.iter().find(|file| file.file == name).unwrap().state
    }

    #[test]
    fn a_broken_file_leaves_its_last_good_content_also_over_a_restart() {
        let folder = folder();
        folder.write("a.yaml", &policy("a"));
        let mut files = folder.loaded();
        files.save().unwrap();
        assert_eq!(names(&files), ["a"]);
        assert!(!files.update(&folder.write("a.yaml", BROKEN)));
        assert_eq!(names(&files), ["a"]);
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::LastGood);
        let report = files.report(&BTreeMap::new());
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
    fn a_file_that_never_was_good_is_reported_and_the_others_count() {
        let folder = folder();
        folder.write("a.yaml", &policy("a"));
        folder.write("b.yaml", BROKEN);
        let files = folder.loaded();
        assert_eq!(names(&files), ["a"]);
        assert_eq!(state(&files, "b.yaml"), PolicyFileState::Unused);
    }

    #[test]
    fn a_removed_file_is_gone_for_good() {
        let folder = folder();
        folder.write("a.yaml", &policy("a"));
        folder.write("b.yaml", &policy("b"));
        let mut files = folder.loaded();
        files.save().unwrap();
        fs::remove_file(folder.dir.join("a.yaml")).unwrap();
        assert!(files.update(&changed("a.yaml")));
        files.save().unwrap();
        assert_eq!(names(&files), ["b"]);
        // Removed while nobody looked.
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
    fn nothing_changes_when_a_file_is_written_as_it_was() {
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
    fn a_folder_that_cannot_be_read_is_not_an_empty_one() {
        let folder = folder();
        folder.write("a.yaml", &policy("a"));
        let mut files = folder.loaded();
        files.save().unwrap();
        let away = folder.dir.with_extension("away");
        fs::rename(&folder.dir, &away).unwrap();
        assert!(!files.update(&Changes::all()));
        assert_eq!(names(&files), ["a"]);
        assert!(files.folder_problem().is_some());
        // Nor at the next start.
        let mut files = folder.loaded();
        assert_eq!(names(&files), ["a"]);
        fs::rename(&away, &folder.dir).unwrap();
        files.update(&Changes::all());
        assert_eq!(
            (names(&files), files.folder_problem()),
            (vec!["a".to_owned()], None)
        );
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::InForce);
        // A node that never had policies is told that the folder is missing.
        fs::remove_dir_all(&folder.dir).unwrap();
        fs::remove_dir_all(&folder.state).unwrap();
        assert!(folder.files().load().is_err());
    }

    #[test]
    fn of_two_policies_with_a_name_the_later_is_an_error() {
        let folder = folder();
        folder.write("a.yaml", &policy("same"));
        folder.write("b.yaml", &format!("{}---\n{}", policy("same"), policy("other")));
        let files = folder.loaded();
        let collected = files.collect();
        assert_eq!(names(&files), ["same", "other"]);
        let report = files.report(&collected.doubles);
        assert_eq!((report[0].policies, report[1].policies), (1, 1));
        assert!(
            report[1].diagnostics[0].contains("policy default/same is in"),
            "{report:?}"
        );
    }

    #[test]
    fn links_that_lead_nowhere_and_folders_are_broken_files() {
        let folder = folder();
        std::os::unix::fs::symlink("nowhere", folder.dir.join("a.yaml")).unwrap();
        fs::create_dir(folder.dir.join("b.yaml")).unwrap();
        let files = folder.loaded();
        assert_eq!(state(&files, "a.yaml"), PolicyFileState::Unused);
        assert_eq!(state(&files, "b.yaml"), PolicyFileState::Unused);
    }
}
