//! `palisade explain`.

use std::{
    io::{self, Write as _},
    path::Path,
};

use anyhow::{Context as _, bail};
use palisade_advice::record::Recorded;

use super::{
    output::{EXIT_NO, EXIT_OK, load_config, show},
    policy::policy_files,
    recorded::Lines,
    trace::trace_request,
};
use crate::{
    cli::{ExplainArgs, Output},
    control::{
        api::{ExplainAnswer, ExplainRequest, Request},
        client::ask,
    },
    daemon,
};

/// Runs `palisade explain`. `config`: the path of the configuration, and whether the command line names it.
pub(super) fn explain(
    (config, is_named): (&Path, bool),
    socket: impl FnOnce() -> anyhow::Result<std::path::PathBuf>,
    args: &ExplainArgs,
) -> anyhow::Result<u8> {
    let request = match (&args.flow, &args.from, &args.input_file) {
        (Some(uuid), _, Some(file)) => ExplainRequest::Record(find(file, uuid)?),
        (Some(uuid), _, None) => {
            if !args.policies.is_empty() {
                bail!("the daemon has the flow {uuid}; with --policies, name a file of flows (--input-file)");
            }
            ExplainRequest::Flow(uuid.clone())
        }
        (None, Some(from), _) => {
            if args.to.is_none() && args.packet.to_fqdn.is_none() {
                bail!("--from needs --to or --to-fqdn");
            }
            ExplainRequest::Packet(Box::new(trace_request(from, args.to.as_deref(), &args.packet)?))
        }
        (None, None, _) => bail!("name a flow, or describe a packet with --from and --to"),
    };
    let answer: ExplainAnswer = if args.policies.is_empty() {
        ask(&socket()?, &Request::Explain { request })?
    } else {
        let files = policy_files(&args.policies)?;
        match (&request, is_named) {
            (ExplainRequest::Record(line), false) => daemon::explain_record(files, line)?,
            _ => {
                let Some(config) = load_config(config) else {
                    return Ok(EXIT_NO);
                };
                daemon::explain_offline(&config, files, &request)?
            }
        }
    };
    match args.output.output {
        Output::Table => {
            write!(io::stdout(), "{}", answer.text)?;
            EXIT_OK
        }
        output => show(&answer.explanation, output, |_, _| Ok(()))?,
    };
    Ok(if answer.passes { EXIT_OK } else { EXIT_NO })
}

/// Returns the line of a file that records the flow.
fn find(file: &Path, uuid: &str) -> anyhow::Result<String> {
    let mut lines = Lines::open(file)?;
    while let Some((_, line)) = lines.next_line()? {
        // Most lines are of other flows: only those with the text are parsed.
        if line.contains(uuid)
            && let Ok(Some(flow)) = Recorded::parse(line)
            && flow.uuid == uuid
        {
            return Ok(line.to_owned());
        }
    }
    Err(anyhow::anyhow!("{}: there is no flow {uuid}", file.display())).context("palisade explain")
}
