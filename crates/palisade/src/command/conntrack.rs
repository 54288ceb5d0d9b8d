//! `palisade bpf ct list` and `palisade bpf ct flush`.

use std::{
    io::{self, Write},
    path::Path,
};

use anyhow::bail;

use super::{
    output::{EXIT_NO, EXIT_OK, confirmed, show},
    pinned::or_pinned,
};
use crate::{
    cli::{ConnectionArgs, Output},
    control::{
        api::{Answer, ConnectionFilter, ConnectionRow, Flushed, Request},
        client::{Client, ask},
    },
    text::count,
};

/// Largest number of connections that are sorted. More are printed as the daemon reads them, so that the memory of this
/// command does not depend on their number.
const MAX_SORTED: usize = 10_000;

/// Runs `palisade bpf ct list`.
pub(super) fn list(
    socket: &Path,
    config: &Path,
    args: &ConnectionArgs,
    output: Output,
) -> anyhow::Result<u8> {
    let filter = filter(args)?;
    let mut rows: Vec<ConnectionRow> = Vec::new();
    // Values of a JSON path refer to the whole list.
    let is_whole = matches!(output, Output::JsonPath(_));
    let mut listing = Listing::new(io::stdout().lock(), output == Output::Json);
    let mut take = |more: Vec<ConnectionRow>| {
        rows.extend(more);
        if !is_whole && rows.len() > MAX_SORTED {
            rows.drain(..).try_for_each(|row| listing.row(&row))?;
        }
        Ok(())
    };
    match Client::send(socket, &Request::BpfCtList(filter.clone())) {
        Ok(client) => receive(client, &mut take)?,
        Err(error) => or_pinned(config, Err(error), |pinned| {
            pinned.connections(&filter, &mut take)
        })?,
    }
    if is_whole {
        drop(listing);
        return show(&rows, output, |_, _| Ok(()));
    }
    rows.sort_by(|a, b| {
        let key = |row: &ConnectionRow| (row.endpoint, row.protocol.clone());
        (key(a), &a.source, &a.destination).cmp(&(key(b), &b.source, &b.destination))
    });
    rows.iter().try_for_each(|row| listing.row(row))?;
    listing.finish()?;
    Ok(EXIT_OK)
}

/// Passes the connections that the daemon sends to `take`.
fn receive(
    mut client: Client,
    mut take: impl FnMut(Vec<ConnectionRow>) -> io::Result<()>,
) -> anyhow::Result<()> {
    loop {
        match client.next()? {
            Some(Answer::Connections(more)) => take(more)?,
            Some(Answer::Ok(_)) => return Ok(()),
            Some(Answer::Error(message)) => bail!(message),
            Some(
                Answer::Flow(_) | Answer::Lost(_) | Answer::Agent(_) | Answer::Capture(_) | Answer::Alive,
            ) => {}
            None => bail!("the daemon closed the connection before the end of the answer"),
        }
    }
}

/// Runs `palisade bpf ct flush`.
pub(super) fn flush(socket: &Path, args: &ConnectionArgs, yes: bool, output: Output) -> anyhow::Result<u8> {
    let filter = filter(args)?;
    let question = "remove the entries of ALL connections? Inspected and intercepted ones are reset";
    let instead = "to remove the entries of all connections, or name an endpoint or a filter";
    if filter.is_empty() && !yes && !confirmed(question, instead)? {
        eprintln!("palisade: nothing was removed");
        return Ok(EXIT_NO);
    }
    let flushed: Flushed = ask(socket, &Request::BpfCtFlush(filter))?;
    show(&flushed, output, |flushed, out| {
        let entries = |number: u64| {
            let number = usize::try_from(number).unwrap_or(usize::MAX);
            count(number, "conntrack entry", "conntrack entries")
        };
        writeln!(out, "{} removed", entries(flushed.flushed))?;
        if flushed.kept > 0 {
            writeln!(
                out,
                "{} of connections that the policies in force deny stay until they expire",
                entries(flushed.kept)
            )?;
        }
        Ok(())
    })
}

fn filter(args: &ConnectionArgs) -> anyhow::Result<ConnectionFilter> {
    let protocol = args
        .protocol
        .as_deref()
        .map(palisade_policy::cases::protocol_number);
    Ok(ConnectionFilter {
        endpoint: args
            .scope
            .as_deref()
            .filter(|scope| *scope != "global")
            .or(args.endpoint.as_deref())
            .map(ToOwned::to_owned),
        addresses: args.addresses.clone(),
        ports: args.ports.clone(),
        protocol: protocol.transpose().map_err(anyhow::Error::msg)?,
        ingress: args.direction.map(|direction| direction.is_ingress()),
        identity: args.identity,
    })
}

/// Writes connections one by one: lines, or the elements of a JSON list.
struct Listing<W: Write> {
    out: io::BufWriter<W>,
    is_json: bool,
    is_empty: bool,
}

impl<W: Write> Listing<W> {
    fn new(out: W, is_json: bool) -> Self {
        Self {
            out: io::BufWriter::new(out),
            is_json,
            is_empty: true,
        }
    }

    fn row(&mut self, row: &ConnectionRow) -> io::Result<()> {
        let is_first = std::mem::replace(&mut self.is_empty, false);
        if self.is_json {
            let json = serde_json::to_string_pretty(row).map_err(io::Error::from)?;
            let before = if is_first { "[\n  " } else { ",\n  " };
            return write!(self.out, "{before}{}", json.replace('\n', "\n  "));
        }
        writeln!(
            self.out,
            "{} {} {} -> {} expires={} Packets={} Bytes={} ReplyPackets={} ReplyBytes={} \
             TxFlagsSeen={:#04x} RxFlagsSeen={:#04x} Flags=[ {} ] Endpoint={} Identity={} Revision={} Rule={}",
            row.protocol,
            row.direction,
            row.source,
            row.destination,
            row.expires_in_seconds,
            row.forward_packets,
            row.forward_bytes,
            row.reply_packets,
            row.reply_bytes,
            row.forward_tcp,
            row.reply_tcp,
            row.flags.join(" "),
            row.endpoint,
            row.identity,
            row.revision,
            row.rule,
        )
    }

    fn finish(mut self) -> io::Result<()> {
        match (self.is_json, self.is_empty) {
            (false, _) => {}
            (true, true) => writeln!(self.out, "[]")?,
            (true, false) => writeln!(self.out, "\n]")?,
        }
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_streamed_list_is_the_json_of_the_whole_list() {
        for number in [0, 1, 3] {
            let rows: Vec<ConnectionRow> = (0..number)
                .map(|endpoint| ConnectionRow {
                    endpoint,
                    flags: vec!["Replied".into()],
                    ..ConnectionRow::default()
                })
                .collect();
            let mut text = Vec::new();
            let mut listing = Listing::new(&mut text, true);
            rows.iter().try_for_each(|row| listing.row(row)).unwrap();
            listing.finish().unwrap();
            let whole = serde_json::to_string_pretty(&rows).unwrap();
            assert_eq!(String::from_utf8(text).unwrap(), format!("{whole}\n"));
        }
    }
}
