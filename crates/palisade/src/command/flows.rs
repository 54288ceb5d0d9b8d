//! `palisade observe`.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, Read as _, StdoutLock, Write as _},
    path::Path,
};

use anyhow::{Context as _, bail};
use palisade_flowlog::{
    Filters, Flow,
    filter::{ApiFilter, ApiFilters},
    format::{Listing, RawFlow},
    input::{self, Line},
};

use super::{
    flow_api::FlowApi,
    follow::{FollowOutput, Recent, buffered, follow},
    output::{EXIT_NO, EXIT_OK},
};
use crate::{
    cli::ObserveArgs,
    control::{
        api::{Answer, ObserveRequest, Request},
        client::Client,
    },
};

/// Flows shown without `--last`.
const DEFAULT_COUNT: usize = 20;
/// Longest line of a flow file, bytes. Flows of Palisade have a few KiB.
const MAX_LINE: u64 = 1 << 20;
/// Largest `--last` with `--input-file`.
const MAX_LAST_OF_FILE: usize = 1_000_000;

/// Runs `palisade observe`. `socket` returns the path of the control socket; it is not called if no daemon is needed.
pub(super) fn observe<S: AsRef<Path>>(
    socket: impl FnOnce() -> anyhow::Result<S>,
    args: &ObserveArgs,
) -> anyhow::Result<u8> {
    let query = args.query.clone();
    let mut output = Printed {
        out: buffered(),
        listing: Some(Listing::new(args.printer.clone())),
        silent: args.silent,
    };
    if args.print_raw_filters {
        output.out.write_all(raw_filters(&query)?.as_bytes())?;
        return Ok(EXIT_OK);
    }
    if let Some(path) = &args.input_file {
        if args.last.is_some_and(|last| last > MAX_LAST_OF_FILE) {
            bail!(
                "--last of --input-file is at most {MAX_LAST_OF_FILE}, since these flows are kept in memory: use --since"
            );
        }
        return read_file(path, args, &Filters::compile(&query)?, output);
    }
    if args.server.server.is_some() {
        return ask_server(args, output);
    }
    let last = last(args);
    let request = ObserveRequest {
        query,
        follow: args.follow,
        first: args.first,
        last,
        ..ObserveRequest::default()
    };
    let socket = socket()?;
    if args.follow {
        return follow(socket.as_ref(), request, args.now, &mut output);
    }
    let mut client = Client::send(socket.as_ref(), &Request::Observe(request))?;
    loop {
        match client.next()? {
            Some(Answer::Flow(flow)) => output.flow(&flow, None)?,
            Some(Answer::Lost(lost)) => output.lost(lost.source.as_ref(), lost.count)?,
            Some(
                Answer::Ok(_)
                | Answer::Capture(_)
                | Answer::Connections(_)
                | Answer::Agent(_)
                | Answer::Alive,
            ) => break,
            Some(Answer::Error(message)) => bail!(message),
            None => bail!("the daemon closed the connection before the end of the answer"),
        }
    }
    output.finish()?;
    Ok(EXIT_OK)
}

/// Returns the number of the most recent flows to show; `None` for all.
fn last(args: &ObserveArgs) -> Option<usize> {
    let in_time = args.query.since.is_some() || args.query.until.is_some();
    match args.last {
        Some(last) => Some(last),
        None if args.all || in_time || args.first.is_some() => None,
        None if args.follow => Some(0),
        None => Some(DEFAULT_COUNT),
    }
}

/// Prints the flows of a server of the flow API.
fn ask_server(args: &ObserveArgs, mut output: Printed) -> anyhow::Result<u8> {
    if args.last == Some(0) && !args.follow {
        output.finish()?;
        return Ok(EXIT_OK);
    }
    let request = server_request(args)?;
    let mut server = FlowApi::connect(&args.server)?;
    server.stream("GetFlows", &request, args.follow, |response| {
        match input::line(&response.to_string()) {
            Ok(Line::Flow { flow, json }) => output.flow(&flow, Some(&json))?,
            Ok(Line::Lost { source, count }) => output.lost(&source, count)?,
            Ok(Line::Other) => {
                if let Some(status) = response.get("node_status") {
                    output.warn(&format!("state of nodes: {status}"))?;
                }
            }
            Err(error) => output.warn(&format!("not a flow: {error}"))?,
        }
        if args.follow {
            output.flush()?;
        }
        Ok(())
    })?;
    output.finish()?;
    Ok(EXIT_OK)
}

/// Returns the request of the flow API, as JSON.
fn server_request(args: &ObserveArgs) -> anyhow::Result<serde_json::Value> {
    let mut request = serde_json::to_value(&args.query)?;
    let Some(fields) = request.as_object_mut() else {
        bail!("the filters are no object");
    };
    let own = fields.values().filter_map(serde_json::Value::as_array).flatten();
    let mut own = own.filter_map(|filter| filter["palisade"].as_object()).flatten();
    if let Some((name, _)) = own.next() {
        bail!("the flow API has no filter {name}: --server takes the filters of Hubble only");
    }
    // The API kept the earlier names of these fields.
    for (name, of_api) in [("allowlist", "whitelist"), ("denylist", "blacklist")] {
        if let Some(list) = fields.remove(name) {
            fields.insert(of_api.to_owned(), list);
        }
    }
    let number = args.first.or(last(args)).unwrap_or(0);
    fields.insert("number".to_owned(), number.into());
    fields.insert("first".to_owned(), args.first.is_some().into());
    fields.insert("follow".to_owned(), args.follow.into());
    Ok(request)
}

/// The output of `palisade observe`.
struct Printed {
    out: BufWriter<StdoutLock<'static>>,
    /// `None` after the end.
    listing: Option<Listing>,
    /// Whether to print no warnings.
    silent: bool,
}

impl Printed {
    fn flow(&mut self, flow: &Flow, original: Option<&serde_json::Value>) -> io::Result<()> {
        let text = self.listing.as_mut().map(|listing| listing.flow(flow, original));
        self.out.write_all(text.unwrap_or_default().as_bytes())
    }

    fn finish(mut self) -> io::Result<()> {
        let text = self.listing.take().map(Listing::finish).unwrap_or_default();
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }
}

impl FollowOutput for Printed {
    fn received(&mut self, json: &str, recent: &mut Recent) -> io::Result<Result<(), serde_json::Error>> {
        let is_raw = self.listing.as_ref().is_some_and(Listing::is_raw);
        if is_raw {
            let flow = match RawFlow::new(json) {
                Ok(flow) => flow,
                Err(error) => return Ok(Err(error)),
            };
            if recent.is_new(flow.time, &flow.uuid, self)? {
                let text = self.listing.as_ref().map(|listing| listing.raw(&flow));
                self.out.write_all(text.unwrap_or_default().as_bytes())?;
            }
        } else {
            let flow: Flow = match serde_json::from_str(json) {
                Ok(flow) => flow,
                Err(error) => return Ok(Err(error)),
            };
            if recent.is_new(flow.time, &flow.uuid, self)? {
                self.flow(&flow, None)?;
            }
        }
        Ok(Ok(()))
    }

    fn lost(&mut self, source: &str, count: u64) -> io::Result<()> {
        if self.silent {
            return Ok(());
        }
        let text = self.listing.as_mut().map(|listing| listing.lost(source, count));
        self.out.write_all(text.unwrap_or_default().as_bytes())
    }

    fn warn(&mut self, text: &str) -> io::Result<()> {
        // The warning appears after the flows that were received before it.
        self.out.flush()?;
        if !self.silent {
            eprintln!("palisade: {text}");
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Prints the flows of a file that pass the filters, in the order of the file.
fn read_file(path: &Path, args: &ObserveArgs, filters: &Filters, mut output: Printed) -> anyhow::Result<u8> {
    let is_stream = path == Path::new("-");
    let (name, mut reader): (String, Box<dyn BufRead>) = if is_stream {
        ("standard input".to_owned(), Box::new(io::stdin().lock()))
    } else {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        (path.display().to_string(), Box::new(BufReader::new(file)))
    };
    let mut bad = 0_u64;
    let mut shown = 0;
    // The last flows of `--last`.
    let mut last = VecDeque::new();
    let mut number = 0_u64;
    let mut line = Vec::new();
    while args.first != Some(shown) {
        line.clear();
        number += 1;
        let read = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line);
        if read.with_context(|| name.clone())? == 0 {
            break;
        }
        let parsed = if line.len() as u64 == MAX_LINE && !line.ends_with(b"\n") {
            skip_line(&mut reader).with_context(|| name.clone())?;
            Err(format!("longer than {MAX_LINE} bytes"))
        } else {
            match std::str::from_utf8(&line) {
                Ok(text) if text.trim().is_empty() => continue,
                Ok(text) => input::line(text).map_err(|error| error.to_string()),
                Err(_) => Err("not UTF-8".to_owned()),
            }
        };
        match parsed {
            Ok(Line::Flow { flow, json }) if filters.matches(&flow) => match args.last {
                Some(0) => {}
                Some(count) => {
                    if last.len() == count {
                        last.pop_front();
                    }
                    last.push_back((flow, json));
                }
                None => {
                    output.flow(&flow, Some(&json))?;
                    if is_stream {
                        output.out.flush()?;
                    }
                    shown += 1;
                }
            },
            Ok(Line::Flow { .. } | Line::Other) => {}
            Ok(Line::Lost { source, count }) => output.lost(&source, count)?,
            Err(why) => {
                bad += 1;
                output.warn(&format!("{name}:{number}: not a flow in JSON: {why}"))?;
            }
        }
    }
    for (flow, json) in last {
        output.flow(&flow, Some(&json))?;
    }
    output.finish()?;
    Ok(if bad == 0 { EXIT_OK } else { EXIT_NO })
}

/// Reads up to the end of the line.
fn skip_line(reader: &mut dyn BufRead) -> io::Result<()> {
    loop {
        let bytes = reader.fill_buf()?;
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(bytes.len(), |end| end + 1);
        reader.consume(taken);
        if end.is_some() || taken == 0 {
            return Ok(());
        }
    }
}

/// Returns the filters as YAML, each filter as JSON in single quotes: the form in which Hubble prints them, and in which
/// the configuration of its exporter accepts them.
fn raw_filters(query: &ApiFilters) -> anyhow::Result<String> {
    let mut text = String::new();
    let mut list = |name: &str, filters: &[ApiFilter]| -> anyhow::Result<()> {
        if !filters.is_empty() {
            text.push_str(name);
            text.push_str(":\n");
        }
        for filter in filters {
            let filter = serde_json::to_string(filter)?.replace('\'', "''");
            text.push_str(&format!("    - '{filter}'\n"));
        }
        Ok(())
    };
    list("allowlist", &query.allowlist)?;
    list("denylist", &query.denylist)?;
    if text.is_empty() {
        text.push_str("{}\n");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use palisade_flowlog::{FilterBuilder, Timestamp};

    use super::*;

    #[test]
    fn a_request_to_a_server_is_one_of_the_flow_api() {
        let mut builder = FilterBuilder::new(Timestamp(0));
        builder.flag("from-label", "app=a").unwrap();
        builder.flag("not", "").unwrap();
        builder.flag("verdict", "dropped").unwrap();
        builder.flag("since", "1970-01-01T00:00:01Z").unwrap();
        let mut args = ObserveArgs {
            query: builder.finish_api().unwrap(),
            ..ObserveArgs::default()
        };
        let request = server_request(&args).unwrap();
        assert_eq!(
            request,
            serde_json::json!({
                "whitelist": [{"source_label": ["app=a"]}],
                "blacklist": [{"verdict": ["DROPPED"]}],
                "since": "1970-01-01T00:00:01Z",
                "number": 0, "first": false, "follow": false,
            })
        );
        palisade_hubble::json::encode("observer.GetFlowsRequest", &request).unwrap();
        let mut builder = FilterBuilder::new(Timestamp(0));
        builder.flag("sni", "a.example").unwrap();
        args.query = builder.finish_api().unwrap();
        let refused = server_request(&args).unwrap_err().to_string();
        assert!(
            refused.contains("sni") && refused.contains("--server"),
            "{refused}"
        );
        args.query = ApiFilters::default();
        assert_eq!(server_request(&args).unwrap()["number"], DEFAULT_COUNT);
        args.follow = true;
        assert_eq!(server_request(&args).unwrap()["number"], 0);
        (args.follow, args.first) = (false, Some(3));
        let request = server_request(&args).unwrap();
        assert_eq!((&request["number"], &request["first"]), (&3.into(), &true.into()));
    }

    #[test]
    fn raw_filters_are_yaml_with_json() {
        let mut builder = FilterBuilder::new(Timestamp(0));
        builder.flag("from-label", "app in ('a')").unwrap();
        builder.flag("not", "").unwrap();
        builder.flag("verdict", "dropped").unwrap();
        assert_eq!(
            raw_filters(&builder.finish_api().unwrap()).unwrap(),
            "allowlist:\n    - '{\"source_label\":[\"app in (''a'')\"]}'\ndenylist:\n    - '{\"verdict\":[\"DROPPED\"]}'\n"
        );
        assert_eq!(raw_filters(&ApiFilters::default()).unwrap(), "{}\n");
    }
}
