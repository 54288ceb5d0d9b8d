//! Commands about policy files, most of which need no daemon.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use palisade_inspect::Inspectors;
use palisade_model::{
    diagnostic::{Diagnostic, Severity},
    rule::{L7, Location, Policy, Ports},
};
use palisade_policy::{
    cases::{self, Report},
    compile::{FileContent, ResourceName, already_there, conflicts},
    parse::{Parsed, decode, parse},
};
use palisade_secrets::{Store, check_policies};

use super::output::{EXIT_NO, EXIT_OK, load_config};
use crate::{
    config::Config,
    daemon::{self, policy_file_names, subfolder_names},
};

/// What is wrong with policy files.
#[derive(Debug)]
pub(super) struct Diagnosis {
    /// Number of files.
    pub files: usize,
    /// Number of policies.
    pub policies: usize,
    /// Number of CIDR groups.
    pub groups: usize,
    /// Errors, warnings and notes.
    pub diagnostics: Vec<Diagnostic>,
    /// Remarks about the paths.
    pub notes: Vec<String>,
    /// Paths that cannot be read.
    pub problems: Vec<String>,
    /// Whether a rule needs inspection.
    pub inspects: bool,
}

/// Returns what is wrong with the policy files at these paths. With a configuration the policies are also compiled for its
/// endpoints and peers.
pub(super) fn diagnose(paths: &[PathBuf], config: Option<&Config>) -> anyhow::Result<Diagnosis> {
    let sources = read(paths);
    let mut diagnosis = Diagnosis {
        files: sources.files.len(),
        policies: 0,
        groups: 0,
        diagnostics: Vec::new(),
        notes: sources.notes,
        problems: sources.problems,
        inspects: false,
    };
    for (_, parsed) in &sources.files {
        diagnosis.policies += parsed.policies.len();
        diagnosis.groups += parsed.cidr_groups.len();
        diagnosis.diagnostics.extend(parsed.diagnostics.iter().cloned());
    }
    let contents = contents(&sources.files);
    let all: Vec<Policy> = contents
        .iter()
        .flat_map(|(_, content)| content.policies.iter().cloned())
        .collect();
    diagnosis.inspects = all.iter().any(needs_inspection);
    let mut together = conflicts(&all);
    let doubles = doubles(&contents);
    let compiles = together.is_empty() && doubles.is_empty();
    together.extend(doubles);
    if let Some(config) = config {
        if compiles {
            let parsed = contents
                .into_iter()
                .map(|(path, content)| (path.display().to_string(), Some(content)));
            together.extend(daemon::remarks_offline(config, parsed.collect())?);
        }
        together.extend(secrets(config, &all));
    }
    diagnosis.diagnostics.extend(together);
    Ok(diagnosis)
}

/// Returns whether a rule of the policy has application rules.
fn needs_inspection(policy: &Policy) -> bool {
    let rules = policy.specs.iter().flat_map(|spec| spec.all_rules());
    rules.into_iter().any(|rule| match &rule.ports {
        Ports::OneOf(entries) => entries.iter().any(|entry| entry.l7 != L7::default()),
        Ports::Any => false,
    })
}

/// Runs `palisade policy validate`. With a configuration the policies are also compiled for its endpoints and peers.
pub(super) fn validate(paths: &[PathBuf], quiet: bool, config: Option<&Path>) -> anyhow::Result<u8> {
    let config = match config.map(load_config) {
        Some(None) => return Ok(EXIT_NO),
        Some(config) => config,
        None => None,
    };
    let found = diagnose(paths, config.as_ref())?;
    let mut out = io::stdout().lock();
    let count = |severity| {
        let all = found.diagnostics.iter();
        all.filter(|diagnostic| diagnostic.severity == severity).count()
    };
    for diagnostic in &found.diagnostics {
        if !quiet || diagnostic.severity == Severity::Error {
            writeln!(out, "{diagnostic}")?;
        }
    }
    let errors = count(Severity::Error);
    if !quiet {
        for note in &found.notes {
            writeln!(out, "{note}")?;
        }
        writeln!(
            out,
            "{}, {}, {}: {}, {}",
            plural(found.files, "file"),
            plural(found.policies, "policy"),
            plural(found.groups, "CIDR group"),
            plural(errors, "error"),
            plural(count(Severity::Warning), "warning"),
        )?;
    }
    if !found.problems.is_empty() {
        bail!("{}", found.problems.join("\n"));
    }
    Ok(if errors == 0 { EXIT_OK } else { EXIT_NO })
}

/// Returns the problems of the secrets that the policies name. Without such a secret, the folder is not read: it can be
/// readable by root alone.
fn secrets(config: &Config, policies: &[Policy]) -> Vec<Diagnostic> {
    let interception_ca = config.tls.interception_ca.as_deref();
    if check_policies(policies, &Store::default(), interception_ca).is_empty() {
        return Vec::new();
    }
    let (store, problems) = Store::load(&config.tls.secrets_dir, None);
    let mut found: Vec<Diagnostic> = problems.iter().map(Diagnostic::from).collect();
    found.extend(check_policies(policies, &store, interception_ca));
    found
}

/// Runs `palisade policy test`.
pub(super) fn test(paths: &[PathBuf]) -> anyhow::Result<u8> {
    let mut out = io::stdout().lock();
    let mut total = Report::default();
    for path in paths {
        let shown = path.display().to_string();
        let bytes = fs::read(path).with_context(|| shown.clone())?;
        let report = match decode(&shown, bytes) {
            Ok(text) => cases::run(&shown, &text, &Inspectors::default()),
            Err(problem) => Report {
                lines: vec![problem.to_string()],
                passed: 0,
                failed: 1,
            },
        };
        for line in &report.lines {
            writeln!(out, "{line}")?;
        }
        total.passed += report.passed;
        total.failed += report.failed;
    }
    writeln!(out, "{}", total.summary())?;
    Ok(if total.failed == 0 { EXIT_OK } else { EXIT_NO })
}

/// Returns the contents of the policy files at these paths. Prints the diagnostics of the files.
///
/// # Errors
/// A file cannot be read, or has errors.
pub(super) fn policy_files(paths: &[PathBuf]) -> anyhow::Result<BTreeMap<String, Option<FileContent>>> {
    let sources = read(paths);
    for (_, parsed) in &sources.files {
        for diagnostic in &parsed.diagnostics {
            eprintln!("{diagnostic}");
        }
    }
    for problem in &sources.problems {
        eprintln!("{problem}");
    }
    if sources.has_errors() {
        bail!("the policies have errors; a packet is only explained by policies that could be in force");
    }
    let files = contents(&sources.files).into_iter();
    Ok(files
        .map(|(path, content)| (path.display().to_string(), Some(content)))
        .collect())
}

fn plural(count: usize, what: &str) -> String {
    match (count, what.strip_suffix('y')) {
        (1, _) => format!("1 {what}"),
        (_, Some(stem)) => format!("{count} {stem}ies"),
        (_, None) => format!("{count} {what}s"),
    }
}

/// Policy files at the paths of a command line.
#[derive(Debug, Default)]
struct Sources {
    files: Vec<(PathBuf, Parsed)>,
    /// Paths without a readable policy file.
    problems: Vec<String>,
    /// Files that were skipped.
    notes: Vec<String>,
}

impl Sources {
    fn has_errors(&self) -> bool {
        !self.problems.is_empty() || self.files.iter().any(|(_, parsed)| parsed.has_errors())
    }

    fn add(&mut self, path: PathBuf, bytes: io::Result<Vec<u8>>) {
        let shown = path.display().to_string();
        match bytes.map(|bytes| decode(&shown, bytes)) {
            Ok(Ok(text)) => self.files.push((path, parse(&shown, &text))),
            Ok(Err(problem)) => {
                let parsed = Parsed {
                    diagnostics: vec![problem],
                    ..Parsed::default()
                };
                self.files.push((path, parsed));
            }
            Err(error) => self.problems.push(format!("{shown}: {error}")),
        }
    }

    /// Adds a file that the command line names. Such a file without any text comes from a command that has failed, or a
    /// wrong path, so it is a problem; in the policy folder an empty file is one without policies.
    fn add_named(&mut self, path: PathBuf, bytes: io::Result<Vec<u8>>) {
        match &bytes {
            Ok(bytes) if bytes.trim_ascii().is_empty() => {
                self.problems
                    .push(format!("{}: is empty: there is no policy", path.display()));
            }
            _ => self.add(path, bytes),
        }
    }

    fn add_folder(&mut self, path: &Path) {
        let shown = path.display();
        let names = match policy_file_names(path) {
            Ok(names) => names,
            Err(error) => return self.problems.push(format!("{shown}: {error}")),
        };
        if names.is_empty() {
            self.problems.push(format!(
                "{shown}: there is no policy file (*.yaml, *.yml, *.json) in this folder"
            ));
        }
        for name in names {
            let file = path.join(name);
            // A directory that is named like a policy file counts as a broken policy file, as in the daemon.
            self.add(file.clone(), fs::read(file));
        }
        let folders: Vec<String> = subfolder_names(path).into_iter().collect();
        if !folders.is_empty() {
            self.notes.push(format!(
                "{shown}: note: subfolders are not read: {}",
                folders.join(", ")
            ));
        }
    }
}

/// Reads and parses files, the policy files of folders, and for `-` the standard input. After a path that cannot be
/// read, the other paths are still read.
fn read(paths: &[PathBuf]) -> Sources {
    let mut sources = Sources::default();
    for path in paths {
        if path.as_os_str() == "-" {
            let mut bytes = Vec::new();
            let read = io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes);
            sources.add_named("<stdin>".into(), read);
        } else if path.is_dir() {
            sources.add_folder(path);
        } else {
            sources.add_named(path.clone(), fs::read(path));
        }
    }
    sources
}

fn contents(files: &[(PathBuf, Parsed)]) -> Vec<(PathBuf, FileContent)> {
    let content = |parsed: &Parsed| FileContent {
        policies: parsed.policies.clone(),
        cidr_groups: parsed.cidr_groups.clone(),
    };
    files
        .iter()
        .map(|(path, parsed)| (path.clone(), content(parsed)))
        .collect()
}

/// Returns an error for each resource that several files contain. The daemon takes the first file and refuses the
/// others.
fn doubles(files: &[(PathBuf, FileContent)]) -> Vec<Diagnostic> {
    let mut seen: BTreeMap<ResourceName, &Location> = BTreeMap::new();
    let mut found = Vec::new();
    for (resource, location) in files.iter().flat_map(|(_, content)| content.resources()) {
        match seen.get(&resource) {
            Some(first) => found.push(already_there(&resource, location, first)),
            None => {
                seen.insert(resource, location);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_that_is_named_is_a_problem() {
        let mut sources = Sources::default();
        for text in ["", " \n\t\n"] {
            sources.add_named("<stdin>".into(), Ok(text.into()));
            assert_eq!(
                sources.problems.pop().unwrap(),
                "<stdin>: is empty: there is no policy"
            );
        }
        // The policy file of the package has comments only.
        sources.add_named("example.yaml".into(), Ok("# nothing\n".into()));
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("empty.yaml"), "").unwrap();
        sources.add_folder(dir.path());
        assert!(
            sources.problems.is_empty() && sources.files.len() == 2,
            "{sources:?}"
        );
    }

    #[test]
    fn nouns_follow_their_number() {
        assert_eq!(plural(1, "policy"), "1 policy");
        assert_eq!(plural(2, "policy"), "2 policies");
        assert_eq!(plural(0, "file"), "0 files");
    }
}
