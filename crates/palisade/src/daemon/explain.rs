//! `palisade explain`: the explanation of a recorded flow or of a packet that the operator describes.

use anyhow::bail;
use palisade_advice::{
    explain::explain,
    query::{inventory_of, question},
    record::{Happened, Recorded},
    replay::differs,
};
use palisade_inspect::Inspectors;
use palisade_model::{inventory::Options, request::HttpOptions};
use palisade_policy::{
    compile::{Changes, Compiler},
    trace::{Outcome, Question},
};

use super::{compile_offline, policies::ParsedFiles, trace, workers::INSPECTORS};
use crate::{
    config::{self, Config},
    control::api::{ExplainAnswer, ExplainRequest},
};

/// Explains a request with the policies of a compiler. [`ExplainRequest::Flow`] must have been replaced by the record.
///
/// # Errors
/// The request names an endpoint, a peer or a name that does not exist, is contradictory, or is about a record that
/// policies do not decide.
pub(super) fn answer(
    compiler: &Compiler,
    http: &config::Http,
    request: &ExplainRequest,
) -> Result<ExplainAnswer, String> {
    match request {
        ExplainRequest::Flow(uuid) => Err(format!("there is no flow {uuid} in the ring")),
        ExplainRequest::Packet(packet) => of_question(
            compiler,
            &trace::question(http, packet),
            trace::inspectors(http),
            None,
        ),
        ExplainRequest::Record(line) => {
            of_record(compiler, trace::http_options(http), trace::inspectors(http), line)
        }
    }
}

/// Explains a recorded flow with the policies in `files`, which are not put in force, and with the ends as recorded.
pub(crate) fn explain_record(files: ParsedFiles, line: &str) -> anyhow::Result<ExplainAnswer> {
    let recorded = parse(line).map_err(anyhow::Error::msg)?;
    let mut compiler = Compiler::default();
    let changes = Changes {
        inventory: Some(inventory_of(&recorded, Options::default())),
        files,
    };
    if let Err(problems) = compiler.update(changes) {
        let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
        bail!("{}", lines.join("\n"));
    }
    of_record(&compiler, HttpOptions::default(), Inspectors::default(), line).map_err(anyhow::Error::msg)
}

/// Explains a request with the policies in `files`, which are not put in force, and the endpoints and peers of `config`.
pub(crate) fn explain_offline(
    config: &Config,
    files: ParsedFiles,
    request: &ExplainRequest,
) -> anyhow::Result<ExplainAnswer> {
    match compile_offline(config, files)? {
        Ok(compiler) => answer(&compiler, &config.http, request).map_err(anyhow::Error::msg),
        Err(problems) => {
            let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
            bail!("{}", lines.join("\n"));
        }
    }
}

fn parse(line: &str) -> Result<Recorded, String> {
    Recorded::parse(line)?.ok_or_else(|| "the record is not a flow".to_owned())
}

fn of_record(
    compiler: &Compiler,
    http: HttpOptions,
    inspectors: Inspectors,
    line: &str,
) -> Result<ExplainAnswer, String> {
    let recorded = parse(line)?;
    let question = Question {
        http,
        readers: Some(INSPECTORS),
        ..question(&recorded, compiler.inventory())?
    };
    let happened = match recorded.verdict {
        Happened::Forwarded | Happened::Passed => "FORWARDED",
        Happened::Audited => "AUDIT",
        Happened::Inspected => "REDIRECTED",
        Happened::Dropped => "DROPPED",
        Happened::Unknown => "UNKNOWN",
    };
    let direction = recorded.ends().map_or("", |(direction, ..)| match direction {
        palisade_abi::Direction::Ingress => "ingress",
        palisade_abi::Direction::Egress => "egress",
    });
    let mut said = format!(
        "flow {} of {}: {} -> {}, {direction} {happened}",
        recorded.uuid,
        recorded.time,
        recorded.source.text(),
        recorded.destination.text(),
    );
    for unit in [&recorded.source.unit, &recorded.destination.unit] {
        if !unit.is_empty() {
            said.push_str(", socket of ");
            said.push_str(unit);
        }
    }
    if !recorded.decided_by.is_empty() {
        said.push_str(", decided by ");
        said.push_str(&recorded.decided_by);
    }
    of_question(compiler, &question, inspectors, Some((said, recorded.verdict)))
}

fn of_question(
    compiler: &Compiler,
    question: &Question,
    inspectors: Inspectors,
    recorded: Option<(String, Happened)>,
) -> Result<ExplainAnswer, String> {
    let mut explanation = explain(compiler, question, &inspectors)?;
    let passes = explanation.trace.verdict != Outcome::Denied;
    if let Some((mut said, happened)) = recorded {
        if differs(happened, explanation.trace.verdict.into()) {
            said.push_str("\nthe policies in force now decide otherwise:");
        }
        explanation.recorded = Some(said);
    }
    Ok(ExplainAnswer {
        passes,
        text: explanation.to_string(),
        explanation: serde_json::to_value(&explanation).map_err(|error| error.to_string())?,
    })
}
