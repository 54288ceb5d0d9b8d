//! `palisade policy apply`, `confirm`, `cancel`, `diff`, `history` and `rollback`.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use palisade_flowlog::duration;
use serde::Serialize;

use super::{
    output::{EXIT_NO, EXIT_OK, confirmed, load_config, show},
    session::{author, sessions},
};
use crate::{
    cli::{ChangeArgs, DiffArgs, Output},
    control::{
        api::{
            ApplyRequest, CandidateFile, ChangeKind, ChangeState, FileChanges, HistoryRow, PlanRequest,
            PolicyApplied, PolicyPlan, PolicySet, Request,
        },
        client::{ClientError, ask},
    },
    daemon::{self, policy_file_names},
    table::Table,
    text::count,
};

/// Largest size of all files of a request together, bytes; the daemon reads no longer request.
const MAX_TEXT: u64 = 6 << 20;
/// Rows of a table that are shown; `-o json` has more.
const MAX_SHOWN: usize = 60;

/// The answer of `palisade policy apply -o json`.
#[derive(Serialize)]
struct Outcome<'a> {
    plan: &'a PolicyPlan,
    applied: Option<&'a PolicyApplied>,
}

/// Runs `palisade policy apply`.
pub(super) fn apply(socket: &Path, path: &Path, args: &ChangeArgs) -> anyhow::Result<u8> {
    change(socket, candidate(path)?, args)
}

/// Runs `palisade policy rollback`.
pub(super) fn rollback(socket: &Path, number: u64, args: &ChangeArgs) -> anyhow::Result<u8> {
    change(socket, PolicySet::Number(number), args)
}

fn change(socket: &Path, set: PolicySet, args: &ChangeArgs) -> anyhow::Result<u8> {
    let sessions = sessions();
    let plan: PolicyPlan = ask(
        socket,
        &Request::PolicyPlan(PlanRequest {
            from: PolicySet::Current,
            to: set.clone(),
            sessions: sessions.clone(),
            dry_run: true,
        }),
    )?;
    let output = args.output.output;
    let is_table = matches!(output, Output::Table);
    let finish = |applied: Option<&PolicyApplied>, code: u8| -> anyhow::Result<u8> {
        if !is_table {
            show(&Outcome { plan: &plan, applied }, output, |_, _| Ok(()))?;
        }
        Ok(code)
    };
    if !plan.errors.is_empty() {
        plan.errors.iter().for_each(|error| eprintln!("{error}"));
        eprintln!("palisade: the policies have errors; nothing was changed");
        return finish(None, EXIT_NO);
    }
    if is_table {
        write_plan(&plan, &mut io::stdout().lock())?;
    }
    if let Some(refused) = &plan.refused {
        eprintln!("palisade: {refused}");
        return finish(None, EXIT_NO);
    }
    for denied in &plan.denied_sessions {
        eprintln!(
            "palisade: these policies DENY YOUR OWN SESSION {} ({})",
            denied.session, denied.decided_by
        );
    }
    if args.dry_run {
        return finish(None, EXIT_OK);
    }
    if !plan.denied_sessions.is_empty() && !args.force {
        eprintln!("palisade: nothing was changed: allow the session, or use --force");
        return finish(None, EXIT_NO);
    }
    if plan.files.is_empty() {
        if is_table {
            writeln!(io::stdout(), "these policies are in force already")?;
        }
        return finish(None, EXIT_OK);
    }
    if !args.yes && !args.force && !confirmed("apply?", "to apply it, or --dry-run to see what it changes")? {
        eprintln!("palisade: nothing was changed");
        return finish(None, EXIT_NO);
    }
    let applied: PolicyApplied = match ask(
        socket,
        &Request::PolicyApply(ApplyRequest {
            set,
            confirm_ms: args
                .confirm
                .map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)),
            message: args.message.clone(),
            author: author(),
            sessions,
            force: args.force,
            base: Some(plan.number),
        }),
    ) {
        Ok(applied) => applied,
        Err(ClientError::Refused(problem)) => {
            eprintln!("palisade: {problem}");
            return finish(None, EXIT_NO);
        }
        Err(error) => return Err(error.into()),
    };
    if is_table {
        let mut out = io::stdout().lock();
        writeln!(
            out,
            "change {} is in force (revision {})",
            applied.number, applied.revision
        )?;
        if let Some(within) = applied.confirm_within_seconds {
            writeln!(
                out,
                "it is ROLLED BACK in {} unless you run: palisade policy confirm {}",
                duration::format(Duration::from_secs(within)),
                applied.number
            )?;
        }
        for kept in &applied.aside {
            writeln!(
                out,
                "a file in the policy folder had an edit that the daemon had not read; it is kept as {kept}"
            )?;
        }
    }
    finish(Some(&applied), EXIT_OK)
}

/// Runs `palisade policy confirm`.
pub(super) fn confirm(socket: &Path, number: Option<u64>) -> anyhow::Result<u8> {
    end(
        socket,
        &Request::PolicyConfirm { number },
        "is confirmed: it stays in force",
    )
}

/// Runs `palisade policy cancel`.
pub(super) fn cancel(socket: &Path, number: Option<u64>, force: bool) -> anyhow::Result<u8> {
    let author = author();
    let sessions = if force { Vec::new() } else { sessions() };
    end(
        socket,
        &Request::PolicyCancel {
            author,
            number,
            sessions,
        },
        "is rolled back: the policies from before it are in force",
    )
}

fn end(socket: &Path, request: &Request, text: &str) -> anyhow::Result<u8> {
    match ask::<u64>(socket, request) {
        Ok(number) => {
            writeln!(io::stdout(), "change {number} {text}")?;
            Ok(EXIT_OK)
        }
        Err(ClientError::Refused(problem)) => {
            eprintln!("palisade: {problem}");
            Ok(EXIT_NO)
        }
        Err(error) => Err(error.into()),
    }
}

/// Runs `palisade policy diff`.
pub(super) fn diff(
    config: &Path,
    socket: impl FnOnce() -> anyhow::Result<PathBuf>,
    args: &DiffArgs,
) -> anyhow::Result<u8> {
    let (from, to) = match &args.second {
        None => (PolicySet::Current, set(&args.first)?),
        Some(second) => (set(&args.first)?, set(second)?),
    };
    let plan: PolicyPlan = if args.offline {
        let Some(config) = load_config(config) else {
            return Ok(EXIT_NO);
        };
        daemon::diff_offline(&config, &from, &to)?
    } else {
        ask(
            &socket()?,
            &Request::PolicyPlan(PlanRequest {
                from,
                to,
                sessions: Vec::new(),
                dry_run: false,
            }),
        )?
    };
    if !plan.errors.is_empty() {
        plan.errors.iter().for_each(|error| eprintln!("{error}"));
        return Ok(EXIT_NO);
    }
    show(&plan, args.output.output, write_plan)?;
    let same = plan.files.is_empty() && plan.verdicts.is_empty();
    Ok(if same { EXIT_OK } else { EXIT_NO })
}

/// Runs `palisade policy history`.
pub(super) fn history(socket: &Path, output: Output) -> anyhow::Result<u8> {
    let rows: Vec<HistoryRow> = ask(socket, &Request::PolicyHistory)?;
    show(&rows, output, |rows, out| {
        let mut table = Table::new(&["N", "TIME", "BY", "STATE", "REVISION", "FILES", "MESSAGE"]);
        for row in rows {
            let state = match row.state {
                _ if row.in_force && row.state == ChangeState::Pending => "IN FORCE, to be confirmed",
                _ if row.in_force => "in force",
                ChangeState::Enforced => "",
                ChangeState::Pending => "to be confirmed",
                ChangeState::Confirmed => "confirmed",
                ChangeState::RolledBack => "rolled back",
            };
            let of = match (row.kind, row.of) {
                (ChangeKind::Rollback, Some(of)) => format!("rollback to {of}. "),
                _ => String::new(),
            };
            table.row([
                row.number.to_string(),
                row.time.clone(),
                by(row),
                state.to_owned(),
                row.revision.to_string(),
                files(&row.files, 3),
                format!("{of}{}", printable(&row.message)),
            ]);
        }
        write!(out, "{table}")
    })
}

/// Returns a message as one line without control characters.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// Returns the set of an argument of `palisade policy diff`.
fn set(argument: &Path) -> anyhow::Result<PolicySet> {
    match argument.to_str().and_then(|text| text.parse().ok()) {
        Some(number) => Ok(PolicySet::Number(number)),
        None => candidate(argument),
    }
}

/// Reads a file or a folder.
fn candidate(path: &Path) -> anyhow::Result<PolicySet> {
    let shown = || path.display().to_string();
    let metadata = fs::metadata(path).with_context(shown)?;
    let mut left = MAX_TEXT;
    let mut read = |path: &Path, name: &str, files: &mut BTreeMap<String, CandidateFile>| {
        let shown = || path.display().to_string();
        let metadata = fs::metadata(path).with_context(shown)?;
        if !metadata.is_file() {
            bail!("{}: not a regular file", shown());
        }
        left = left.checked_sub(metadata.len()).with_context(|| {
            format!(
                "{}: the files are larger than {} MiB together; copy them into [policy] dir",
                shown(),
                MAX_TEXT >> 20
            )
        })?;
        let bytes = fs::read(path).with_context(shown)?;
        let text = palisade_policy::parse::decode(&shown(), bytes)
            .map_err(|problem| anyhow::anyhow!("{problem}"))?;
        let file = CandidateFile { path: shown(), text };
        files.insert(name.to_owned(), file);
        Ok(())
    };
    let mut files = BTreeMap::new();
    if metadata.is_dir() {
        let names = policy_file_names(path).with_context(shown)?;
        if names.is_empty() {
            bail!(
                "{}: there is no policy file (*.yaml, *.yml, *.json) in this folder; to take all policies away, remove the \
                 files of [policy] dir",
                shown()
            );
        }
        for name in names {
            read(&path.join(&name), &name, &mut files)?;
        }
        return Ok(PolicySet::Only(files));
    }
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .with_context(|| format!("{}: the name is not UTF-8", shown()))?;
    read(path, name, &mut files)?;
    Ok(PolicySet::With(files))
}

/// Returns changed files in words, at most `most` of each kind.
fn files(files: &FileChanges, most: usize) -> String {
    let mut parts = Vec::new();
    for (sign, names) in [("+", &files.added), ("~", &files.changed), ("-", &files.removed)] {
        parts.extend(names.iter().take(most).map(|name| format!("{sign}{name}")));
        if names.len() > most {
            parts.push(format!("{sign}{} more", names.len() - most));
        }
    }
    parts.join(" ")
}

/// Returns the author of an entry of the history, or what caused the entry.
fn by(row: &HistoryRow) -> String {
    match (&row.author, row.kind) {
        (Some(author), _) => match &author.sudo_user {
            Some(before) => format!("{before} ({})", author.user),
            None => author.user.clone(),
        },
        (None, ChangeKind::RolledBack) => "palisade".to_owned(),
        (None, _) => "file change".to_owned(),
    }
}

fn write_plan(plan: &PolicyPlan, out: &mut dyn Write) -> io::Result<()> {
    for row in [&plan.from, &plan.to].into_iter().flatten() {
        let message = match &*printable(&row.message) {
            "" => String::new(),
            message => format!(": {message}"),
        };
        writeln!(out, "Set {}: {} by {}{message}", row.number, row.time, by(row))?;
    }
    if plan.files.is_empty() {
        writeln!(out, "no file differs")?;
    } else {
        writeln!(out, "Files:    {}", files(&plan.files, 50))?;
    }
    let policies = &plan.policies;
    for (sign, names) in [
        ("+", &policies.added),
        ("~", &policies.changed),
        ("-", &policies.removed),
    ] {
        for name in names.iter().take(MAX_SHOWN) {
            writeln!(out, "  {sign} {name}")?;
        }
        if names.len() > MAX_SHOWN {
            writeln!(out, "  {sign} {} more", names.len() - MAX_SHOWN)?;
        }
    }
    for (old, new) in policies.renamed.iter().take(MAX_SHOWN) {
        writeln!(out, "  {old} -> {new} (renamed)")?;
    }
    let short = |names: &[String]| match names {
        [] => String::new(),
        few if few.len() <= 4 => few.join(" "),
        [a, b, c, rest @ ..] => format!("{a} {b} {c} and {} more", rest.len()),
        _ => String::new(),
    };
    if plan.verdicts.is_empty() {
        writeln!(out, "Verdicts: none changes")?;
    } else {
        writeln!(out, "Verdicts:")?;
        let mut table = Table::new(&["ENDPOINT", "DIRECTION", "PEER", "PORTS", "NOW", "THEN", "BY"]);
        for row in plan.verdicts.iter().take(MAX_SHOWN) {
            table.row([
                short(&row.endpoints),
                row.direction.clone(),
                short(&row.peers),
                short(&row.ports),
                row.from.clone(),
                row.to.clone(),
                row.decided_by.clone(),
            ]);
        }
        write!(out, "{table}")?;
        let more = plan.verdicts.len().saturating_sub(MAX_SHOWN) as u64 + plan.not_listed;
        if more > 0 {
            writeln!(out, "and {more} more rows (-o json lists up to 500)")?;
        }
    }
    if plan.incomplete {
        writeln!(
            out,
            "there are too many verdicts to compare all of them: the list is not complete"
        )?;
    }
    if let Some(since) = &plan.flows_since {
        let lost = match plan.flows_lost {
            0 => String::new(),
            lost => format!(", {lost} more lost"),
        };
        let result = if plan.flows.is_empty() {
            "none gets another verdict"
        } else {
            "with another verdict:"
        };
        let evaluated = plan.flows_evaluated;
        writeln!(
            out,
            "Recorded flows: {evaluated} since {since} evaluated{lost}; {result}"
        )?;
    }
    if !plan.flows.is_empty() {
        let mut table = Table::new(&[
            "FLOWS",
            "DIRECTION",
            "ENDPOINT",
            "PEER",
            "PORT",
            "WAS",
            "WOULD BE",
        ]);
        for row in plan.flows.iter().take(MAX_SHOWN) {
            table.row([
                row.flows.to_string(),
                row.direction.clone(),
                row.endpoint.clone(),
                row.peer.clone(),
                row.port.clone(),
                row.now.clone(),
                row.then.clone(),
            ]);
        }
        write!(out, "{table}")?;
    }
    if plan.cut > 0 {
        writeln!(
            out,
            "It would CUT {}:",
            count(plan.cut, "live connection", "live connections")
        )?;
        let mut table = Table::new(&["ENDPOINT", "PROTOCOL", "FROM", "TO", "EFFECT", "BY"]);
        for row in plan.cuts.iter().take(MAX_SHOWN) {
            table.row([
                row.endpoint_name.clone(),
                row.protocol.clone(),
                row.source.clone(),
                row.destination.clone(),
                row.effect.clone(),
                row.decided_by.clone(),
            ]);
        }
        write!(out, "{table}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_added_a_folder_replaces_and_a_number_is_of_the_history() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("7");
        fs::create_dir(&dir).unwrap();
        assert!(
            candidate(&dir)
                .unwrap_err()
                .to_string()
                .contains("no policy file")
        );
        fs::write(dir.join("a.yaml"), "x: 1").unwrap();
        fs::write(dir.join("notes.txt"), "n").unwrap();
        let PolicySet::Only(files) = candidate(&dir).unwrap() else {
            panic!("a folder replaces all files")
        };
        assert_eq!(files.keys().collect::<Vec<_>>(), ["a.yaml"]);
        let PolicySet::With(files) = candidate(&dir.join("a.yaml")).unwrap() else {
            panic!("a file is added")
        };
        assert_eq!(files["a.yaml"].text, "x: 1");
        assert_eq!(set(Path::new("7")).unwrap(), PolicySet::Number(7));
        assert!(set(&dir).is_ok_and(|set| matches!(set, PolicySet::Only(_))));
        let error = candidate(&dir.join("gone.yaml")).unwrap_err().to_string();
        assert!(error.contains("gone.yaml"), "{error}");
    }

    #[test]
    fn changed_files_are_named_up_to_a_limit() {
        let names = |count: usize| (0..count).map(|n| format!("{n}.yaml")).collect::<Vec<_>>();
        let changes = FileChanges {
            added: names(1),
            changed: names(3),
            removed: Vec::new(),
        };
        assert_eq!(files(&changes, 2), "+0.yaml ~0.yaml ~1.yaml ~1 more");
    }
}
