//! `palisade policy test --flows` and `palisade policy suggest`: commands about policies and recorded flows.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use palisade_advice::{
    record::Recorded,
    replay::{Candidate, Problems, Replay, Report},
    suggest::{DeniedDirection, Suggestion},
};
use palisade_flowlog::{Filters, input};
use palisade_inspect::Inspectors;
use palisade_model::request::HttpOptions;
use serde::Serialize;

use super::{
    output::{EXIT_FAILED, EXIT_NO, EXIT_OK, load_config, show},
    policy::policy_files,
    recorded::Lines,
};
use crate::{
    cli::{FilterArgs, Output, SuggestArgs, SuggestOutput},
    control::{
        api::{Answer, ObserveRequest, Request},
        client::Client,
    },
    daemon,
    text::count,
};

/// Interval at which progress is shown on a terminal.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);
/// Number of lines after which the clock is read.
const LINES_PER_CHECK: u64 = 1_024;
/// Largest number of flows that are kept in memory, of an input that can be read only once.
const MAX_KEPT: usize = 1_000_000;
/// Largest number of rounds in which suggested policies are widened.
const MAX_ROUNDS: usize = 8;

/// Runs `palisade policy test --flows`.
pub(super) fn test(
    config: Option<&Path>,
    flows: &Path,
    policies: &[PathBuf],
    report_only: bool,
    filters: &FilterArgs,
    output: Output,
) -> anyhow::Result<u8> {
    let mut candidate = Candidate {
        files: policy_files(policies)?,
        ..Candidate::default()
    };
    let mut inspectors = Inspectors::default();
    if let Some(path) = config {
        let Some(config) = load_config(path) else {
            return Ok(EXIT_NO);
        };
        candidate.inventory = daemon::inventory_offline(&config)?;
        candidate.http = HttpOptions {
            paths: config.http.paths,
            get_bodies: config.http.get_bodies,
        };
        inspectors.head = config.http.head;
    }
    let mut replay = Replay::new(candidate, &inspectors);
    let mut source = Source::File(flows.to_owned(), wanted(filters)?);
    source.each(&mut |flow| match flow {
        Some(flow) => replay.push(flow).map_err(problems),
        None => {
            replay.skip("messages that are no flows");
            Ok(())
        }
    })?;
    let report = replay.finish().map_err(problems)?;
    show(&report, output, |report, out| write!(out, "{}", text(report)))?;
    Ok(if report.changed == 0 || report_only {
        EXIT_OK
    } else {
        EXIT_NO
    })
}

/// Returns the error for policies that do not compile.
fn problems(problems: Problems) -> anyhow::Error {
    let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
    anyhow::anyhow!("{}", lines.join("\n"))
}

/// Returns a report as text.
fn text(report: &Report) -> String {
    let flows = |number: u64| count(usize::try_from(number).unwrap_or(usize::MAX), "flow", "flows");
    let mut out = String::new();
    for change in &report.changes {
        let (from, to) = if change.direction == "egress" {
            (&change.endpoint, &change.peer)
        } else {
            (&change.peer, &change.endpoint)
        };
        // Writing to a string does not fail.
        let _ = writeln!(
            out,
            "{} -> {}: {}, {} of {from} -> {to} {}",
            change.now.text(),
            change.then.text(),
            flows(change.flows),
            change.direction,
            change.port,
        );
        if !change.now_by.is_empty() {
            let _ = writeln!(out, "  now by {}", change.now_by);
        }
        let _ = writeln!(out, "  then by {}", change.then_by);
        for request in &change.requests {
            let _ = writeln!(out, "  such as {request}");
        }
    }
    if report.not_listed > 0 {
        let _ = writeln!(out, "{} more change and are not listed", flows(report.not_listed));
    }
    for (reason, number) in &report.skipped {
        let _ = writeln!(out, "not evaluated: {number} {reason}");
    }
    if report.inspected > 0 {
        let _ = writeln!(
            out,
            "{} would be inspected: their requests decide, which have records of their own",
            flows(report.inspected)
        );
    }
    let _ = writeln!(
        out,
        "{} read, {} evaluated: {} unchanged, {} changed",
        flows(report.flows),
        report.evaluated,
        report.unchanged,
        report.changed
    );
    out
}

/// The answer of `palisade policy suggest -o json`.
#[derive(Serialize)]
struct Suggested<'a> {
    /// The policies, as YAML documents.
    yaml: &'a str,
    /// Numbers of flows.
    #[serde(flatten)]
    counts: &'a palisade_advice::suggest::Counts,
    /// Number of groups of flows that the policies do not allow.
    denied: usize,
    /// Directions of which policies have denied every flow.
    denied_only: &'a [DeniedDirection],
}

/// Runs `palisade policy suggest`.
pub(super) fn suggest(
    socket: impl FnOnce() -> anyhow::Result<PathBuf>,
    args: &SuggestArgs,
) -> anyhow::Result<u8> {
    let mut source = match &args.input_file {
        Some(path) if path.as_os_str() == "-" => {
            Source::keep(Lines::open(path)?, wanted(&args.filters)?.as_ref())?
        }
        Some(path) => Source::File(path.clone(), wanted(&args.filters)?),
        None => Source::of_ring(&socket()?, &args.filters)?,
    };
    let mut suggestion =
        Suggestion::new(args.include_dropped).with_secrets_of(&policy_files(&args.policies)?);
    source.each(&mut |flow| {
        match flow {
            Some(flow) => suggestion.push(flow),
            None => suggestion.skip("messages that are no flows"),
        }
        Ok(())
    })?;
    // What is proposed must allow every flow: it is widened until it does.
    let inspectors = Inspectors::default();
    let mut denied = 0;
    for _ in 0..MAX_ROUNDS {
        let mut check = suggestion.replay(&inspectors).map_err(problems)?;
        source.each(&mut |flow| match flow {
            Some(flow) => check.push(&suggestion, flow).map_err(problems),
            None => Ok(()),
        })?;
        denied = suggestion.widen(check).map_err(problems)?;
        if denied == 0 {
            break;
        }
    }
    let yaml = suggestion.policies();
    let counts = suggestion.counts();
    let denied_only = suggestion.denied();
    if denied > 0 {
        eprintln!(
            "palisade: no policy was found that allows all flows: {denied} groups of them are denied; nothing is printed"
        );
        return Ok(EXIT_FAILED);
    }
    match args.output {
        SuggestOutput::Yaml => write!(io::stdout(), "{yaml}")?,
        SuggestOutput::Json => {
            let answer = Suggested {
                yaml: &yaml,
                counts,
                denied,
                denied_only: &denied_only,
            };
            show(&answer, Output::Json, |_, _| Ok(()))?;
        }
    }
    for DeniedDirection {
        endpoints,
        direction,
        flows,
        ..
    } in &denied_only
    {
        let flows = count(usize::try_from(*flows).unwrap_or(usize::MAX), "flow", "flows");
        eprintln!(
            "palisade: {direction} of {endpoints}: policies have denied all of it ({flows}), and nothing is proposed for it; \
             --include-dropped proposes what would allow it"
        );
    }
    for (reason, number) in &counts.skipped {
        eprintln!("palisade: without a rule: {number} {reason}");
    }
    if counts.flows == 0 {
        eprintln!("palisade: there is no flow that needs a rule");
        return Ok(EXIT_NO);
    }
    Ok(EXIT_OK)
}

/// Returns the filters; `None` if all flows count.
fn wanted(filters: &FilterArgs) -> anyhow::Result<Option<Filters>> {
    if filters.is_empty() {
        return Ok(None);
    }
    Ok(Some(Filters::compile(&filters.query)?))
}

/// Flows that can be read several times.
enum Source {
    /// A file, and filters if not all of its flows count.
    File(PathBuf, Option<Filters>),
    Kept(Vec<Recorded>),
}

impl Source {
    /// Keeps the flows of an input that can be read only once.
    fn keep(mut lines: Lines, filters: Option<&Filters>) -> anyhow::Result<Self> {
        let mut kept = Vec::new();
        read(&mut lines, filters, &mut |flow| {
            if kept.len() >= MAX_KEPT {
                bail!("more than {MAX_KEPT} flows: write them to a file and name it");
            }
            kept.extend(flow.cloned());
            Ok(())
        })?;
        Ok(Self::Kept(kept))
    }

    /// Reads the flows of the daemon's ring.
    fn of_ring(socket: &Path, filters: &FilterArgs) -> anyhow::Result<Self> {
        let mut client = Client::send(
            socket,
            &Request::Observe(ObserveRequest {
                query: filters.query.clone(),
                last: None,
                ..ObserveRequest::default()
            }),
        )?;
        let mut kept = Vec::new();
        loop {
            match client.next()? {
                Some(Answer::Flow(flow)) => {
                    if kept.len() >= MAX_KEPT {
                        bail!(
                            "the ring has more than {MAX_KEPT} flows: export them to a file and name it (--input-file)"
                        );
                    }
                    kept.push(Recorded::of_flow(&flow).map_err(anyhow::Error::msg)?);
                }
                Some(Answer::Lost(_) | Answer::Agent(_)) => {}
                Some(Answer::Ok(_) | Answer::Capture(_) | Answer::Connections(_) | Answer::Alive) => {
                    return Ok(Self::Kept(kept));
                }
                Some(Answer::Error(message)) => bail!(message),
                None => bail!("the daemon closed the connection before the end of the answer"),
            }
        }
    }

    /// Calls `each` with every flow; with `None` for other messages.
    fn each(&mut self, each: &mut dyn FnMut(Option<&Recorded>) -> anyhow::Result<()>) -> anyhow::Result<()> {
        match self {
            Self::File(path, filters) => read(&mut Lines::open(path)?, filters.as_ref(), each),
            Self::Kept(flows) => flows.iter().try_for_each(|flow| each(Some(flow))),
        }
    }
}

/// Reads the flows that pass the filters from lines, with progress on a terminal.
fn read(
    lines: &mut Lines,
    filters: Option<&Filters>,
    each: &mut dyn FnMut(Option<&Recorded>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let is_terminal = io::stderr().is_terminal();
    let mut shown = Instant::now();
    let mut any = false;
    let mut number = 0;
    let outcome = loop {
        if is_terminal && number % LINES_PER_CHECK == 0 && shown.elapsed() >= PROGRESS_INTERVAL {
            shown = Instant::now();
            any = true;
            match lines.percent() {
                Some(percent) => eprint!("\r{number} lines, {percent} %"),
                None => eprint!("\r{number} lines"),
            }
        }
        let place = lines.place();
        match lines.next_line() {
            Err(error) => break Err(error),
            Ok(None) => break Ok(()),
            Ok(Some((at, line))) => {
                number = at;
                if filters.is_some_and(|filters| !passes(line, filters)) {
                    continue;
                }
                let done = Recorded::parse(line)
                    .map_err(anyhow::Error::msg)
                    .with_context(|| format!("{place}:{at}: this line is no flow in JSON"))
                    .and_then(|flow| each(flow.as_ref()));
                if let Err(error) = done {
                    break Err(error);
                }
            }
        }
    };
    if any {
        eprint!("\r\x1b[K");
    }
    outcome
}

/// Returns whether the flow of a line passes the filters. Lines that are no flow pass: they are counted, or an error.
fn passes(line: &str, filters: &Filters) -> bool {
    match input::line(line) {
        Ok(input::Line::Flow { flow, .. }) => filters.matches(&flow),
        Ok(input::Line::Lost { .. } | input::Line::Other) | Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use palisade_flowlog::{FilterBuilder, Timestamp};

    use super::*;

    #[test]
    fn filters_choose_flows_and_leave_other_lines() {
        let mut builder = FilterBuilder::new(Timestamp(0));
        builder.flag("verdict", "audit").unwrap();
        let filters = Filters::compile(&builder.finish_api().unwrap()).unwrap();
        for (line, expected) in [
            (
                r#"{"flow":{"time":"2026-01-01T00:00:00Z","verdict":"AUDIT"}}"#,
                true,
            ),
            (
                r#"{"flow":{"time":"2026-01-01T00:00:00Z","verdict":"DROPPED"}}"#,
                false,
            ),
            (
                r#"{"lost_events":{"source":"HUBBLE_RING_BUFFER","num_events_lost":"1"}}"#,
                true,
            ),
            ("no JSON", true),
        ] {
            assert_eq!(passes(line, &filters), expected, "{line}");
        }
    }
}
