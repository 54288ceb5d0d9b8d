//! `palisade log`.

use std::{io, path::Path, time::Duration};

use palisade_flowlog::duration;

use super::output::{EXIT_OK, show};
use crate::{
    cli::{Output, log::LogCommand},
    control::{
        api::{LogSetRequest, LogStatus, Request},
        client::ask,
    },
    table::Table,
};

/// Runs `palisade log`.
pub(super) fn run(socket: &Path, command: &LogCommand) -> anyhow::Result<u8> {
    let (request, output) = match command {
        LogCommand::Set {
            levels,
            endpoint,
            address,
            time,
        } => {
            let request = LogSetRequest {
                levels: levels.iter().cloned().collect(),
                endpoint: endpoint.clone(),
                address: *address,
                seconds: time.as_secs(),
            };
            (Request::LogSet(request), Output::Table)
        }
        LogCommand::Get { output } => (Request::LogGet, output.output),
        LogCommand::Reset => {
            let _: LogStatus = ask(socket, &Request::LogReset)?;
            return Ok(EXIT_OK);
        }
    };
    let status: LogStatus = ask(socket, &request)?;
    show(&status, output, write_status)
}

fn write_status(status: &LogStatus, out: &mut dyn io::Write) -> io::Result<()> {
    let mut table = Table::new(&["COMPONENT", "LEVEL", ""]);
    for component in &status.components {
        let set = if component.is_set { "set" } else { "" };
        table.row([
            component.component.clone(),
            component.level.clone(),
            set.to_owned(),
        ]);
    }
    write!(out, "{table}")?;
    let Some(left) = status.remaining_seconds else {
        return Ok(());
    };
    let endpoint = status
        .endpoint
        .as_ref()
        .map(|name| format!(" of endpoint {name}"));
    let address = status.address.map(|address| format!(" with address {address}"));
    writeln!(
        out,
        "\nFor another {}. Steps of connections{}{}: {} logged, {} suppressed.",
        duration::format(Duration::from_secs(left)),
        endpoint.unwrap_or_default(),
        address.unwrap_or_default(),
        status.written,
        status.suppressed
    )
}
