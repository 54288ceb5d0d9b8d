//! `palisade observe` and `palisade monitor`.

use std::{
    io::{self, Write as _},
    path::Path,
    time::SystemTime,
};

use anyhow::bail;
use palisade_flowlog::{FilterBuilder, Timestamp, format};

use super::output::EXIT_OK;
use crate::{
    cli::{ObserveArgs, Output},
    control::{
        api::{Answer, ObserveRequest, Request},
        client::Client,
    },
};

/// Flows shown without `--last`.
const DEFAULT_COUNT: usize = 20;

/// Runs `palisade observe`.
pub(super) fn observe(socket: &Path, args: &ObserveArgs) -> anyhow::Result<u8> {
    // The daemon builds the filters from the flags. The command builds the filters too, so that errors are reported
    // without a daemon.
    let mut builder = FilterBuilder::new(Timestamp::from_system_time(SystemTime::now()));
    for (flag, value) in &args.filters {
        builder.flag(flag, value)?;
    }
    builder.finish()?;
    let in_time = args.filters.iter().any(|(flag, _)| flag == "since");
    let last = match args.last {
        Some(last) => Some(last),
        None if args.all || in_time => None,
        None if args.follow => Some(0),
        None => Some(DEFAULT_COUNT),
    };
    let request = ObserveRequest {
        filters: args.filters.clone(),
        follow: args.follow,
        last,
    };
    stream(socket, request, |flow| args.printer.flow(flow))
}

/// Runs `palisade monitor`.
pub(super) fn monitor(
    socket: &Path,
    types: &[String],
    related_to: Option<&str>,
    output: Output,
) -> anyhow::Result<u8> {
    // Without this check the command would wait for flows of an endpoint that does not exist.
    for endpoint in related_to.iter().flat_map(|list| list.split(',')) {
        let request = Request::EndpointGet {
            endpoint: endpoint.trim().to_owned(),
        };
        let _: crate::control::api::Endpoint = crate::control::client::ask(socket, &request)?;
    }
    let mut filters: Vec<(String, String)> = Vec::new();
    filters.extend(types.iter().map(|kind| ("type".to_owned(), kind.clone())));
    filters.extend(related_to.map(|endpoint| ("endpoint".to_owned(), endpoint.to_owned())));
    let request = ObserveRequest {
        filters,
        follow: true,
        last: Some(0),
    };
    stream(socket, request, |flow| match output {
        Output::Table => format::monitor(flow),
        Output::Json => format::json(flow),
    })
}

fn stream(
    socket: &Path,
    request: ObserveRequest,
    write: impl Fn(&palisade_flowlog::Flow) -> String,
) -> anyhow::Result<u8> {
    let follow = request.follow;
    let mut client = Client::send(socket, &Request::Observe(request))?;
    let mut out = io::stdout().lock();
    loop {
        match client.next()? {
            Some(Answer::Flow(flow)) => {
                let text = write(&flow);
                out.write_all(text.as_bytes())?;
                if !text.ends_with('\n') {
                    out.write_all(b"\n")?;
                }
                if follow {
                    out.flush()?;
                }
            }
            Some(Answer::Lost(count)) => {
                out.flush()?;
                eprintln!("palisade: {count} flows were overwritten before this command could read them");
            }
            Some(Answer::Ok(_) | Answer::Capture(_) | Answer::Alive) => return Ok(EXIT_OK),
            Some(Answer::Error(message)) => bail!(message),
            None if follow => {
                bail!(
                    "the daemon has ended, or has disconnected this command because it did not read fast enough"
                )
            }
            None => bail!("the daemon closed the connection before the end of the answer"),
        }
    }
}
