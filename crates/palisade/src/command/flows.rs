//! `palisade observe` and `palisade monitor`.

use std::{
    collections::{HashSet, VecDeque},
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, Read as _, StdoutLock, Write as _},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail};
use palisade_flowlog::{
    FilterBuilder, Filters, Flow, Timestamp, Uuid,
    filter::{ApiFilter, ApiFilters},
    format::{self, Listing, RawFlow},
    input::{self, Line},
};

use super::output::{EXIT_NO, EXIT_OK};
use crate::{
    cli::{ObserveArgs, Output},
    control::{
        api::{Answer, ObserveRequest, Request},
        client::{Client, ClientError, Received, ask},
    },
    priority,
};

/// Flows shown without `--last`.
const DEFAULT_COUNT: usize = 20;
/// Longest line of a flow file, bytes. Flows of Palisade have a few KiB.
const MAX_LINE: u64 = 1 << 20;
/// Largest `--last` with `--input-file`.
const MAX_LAST_OF_FILE: usize = 1_000_000;
/// First and longest wait before the next attempt to reach the daemon while following.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Number of received flows whose identifiers are kept while following.
const MAX_RECENT: usize = 16_384;
/// Size of the buffer of the standard output, bytes.
const OUTPUT_BUFFER: usize = 64 * 1024;
/// Time before the newest flow in which a flow that was recorded earlier can still be missing, ns. The daemon sorts flows
/// within a much shorter time.
const LATE_NS: i64 = 1_000_000_000;

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
    let in_time = query.since.is_some() || query.until.is_some();
    let last = match args.last {
        Some(last) => Some(last),
        None if args.all || in_time || args.first.is_some() => None,
        None if args.follow => Some(0),
        None => Some(DEFAULT_COUNT),
    };
    let request = ObserveRequest {
        query,
        follow: args.follow,
        first: args.first,
        last,
        after: None,
    };
    let socket = socket()?;
    if args.follow {
        return follow(socket.as_ref(), request, args.now, output);
    }
    let mut client = Client::send(socket.as_ref(), &Request::Observe(request))?;
    loop {
        match client.next()? {
            Some(Answer::Flow(flow)) => output.flow(&flow, None)?,
            Some(Answer::Lost(lost)) => output.lost(lost.source.as_ref(), lost.count)?,
            Some(Answer::Ok(_) | Answer::Capture(_) | Answer::Alive) => break,
            Some(Answer::Error(message)) => bail!(message),
            None => bail!("the daemon closed the connection before the end of the answer"),
        }
    }
    output.finish()?;
    Ok(EXIT_OK)
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
        let _: crate::control::api::Endpoint = ask(socket, &request)?;
    }
    let mut builder = FilterBuilder::new(Timestamp::default());
    for kind in types {
        builder.flag("type", kind)?;
    }
    if let Some(endpoint) = related_to {
        builder.flag("endpoint", endpoint)?;
    }
    let request = ObserveRequest {
        query: builder.finish_api()?,
        follow: true,
        last: Some(0),
        ..ObserveRequest::default()
    };
    let mut client = Client::send(socket, &Request::Observe(request))?;
    priority::lower();
    let mut out = buffered();
    loop {
        if !client.has_next() {
            out.flush()?;
        }
        match client.next()? {
            Some(Answer::Flow(flow)) => {
                let text = match output {
                    Output::Table => format::monitor(&flow),
                    Output::Json => format::json(&flow),
                    Output::JsonPath(template) => {
                        let value = serde_json::from_str(&format::json(&flow))?;
                        template.render(&value) + "\n"
                    }
                };
                out.write_all(text.as_bytes())?;
            }
            Some(Answer::Lost(lost)) => {
                let (count, source) = (lost.count, lost.source.as_ref());
                eprintln!("palisade: {count} flows were lost ({source})");
            }
            Some(Answer::Ok(_) | Answer::Capture(_) | Answer::Alive) => {
                out.flush()?;
                return Ok(EXIT_OK);
            }
            Some(Answer::Error(message)) => bail!(message),
            None => bail!(
                "the daemon has ended, or has disconnected this command because it did not read fast enough"
            ),
        }
    }
}

/// Returns the standard output with a buffer. Without it, each line would be a system call.
fn buffered() -> BufWriter<StdoutLock<'static>> {
    BufWriter::with_capacity(OUTPUT_BUFFER, io::stdout().lock())
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

    /// Prints a flow in JSON that a follower has received, unless it was printed before. The inner error is that of the
    /// JSON.
    fn received(&mut self, json: &str, recent: &mut Recent) -> io::Result<Result<(), serde_json::Error>> {
        let is_raw = self.listing.as_ref().is_some_and(Listing::is_raw);
        if is_raw {
            let flow = match RawFlow::new(json) {
                Ok(flow) => flow,
                Err(error) => return Ok(Err(error)),
            };
            if self.is_new(flow.time, &flow.uuid, recent)? {
                let text = self.listing.as_ref().map(|listing| listing.raw(&flow));
                self.out.write_all(text.unwrap_or_default().as_bytes())?;
            }
        } else {
            let flow: Flow = match serde_json::from_str(json) {
                Ok(flow) => flow,
                Err(error) => return Ok(Err(error)),
            };
            if self.is_new(flow.time, &flow.uuid, recent)? {
                self.flow(&flow, None)?;
            }
        }
        Ok(Ok(()))
    }

    /// Returns whether a flow was not received before.
    fn is_new(&mut self, time: Timestamp, uuid: &Uuid, recent: &mut Recent) -> io::Result<bool> {
        if std::mem::take(&mut recent.reconnected) && recent.is_other_ring(uuid) {
            self.warn("the daemon was restarted: flows that it had not sent before are lost")?;
        }
        Ok(recent.insert(time, uuid))
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

    fn finish(mut self) -> io::Result<()> {
        let text = self.listing.take().map(Listing::finish).unwrap_or_default();
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }
}

/// Prints flows as they arrive. When the daemon ends, waits for the next one and continues after the last flow.
fn follow(
    socket: &Path,
    mut request: ObserveRequest,
    begun: Timestamp,
    mut output: Printed,
) -> anyhow::Result<u8> {
    priority::lower();
    let mut recent = Recent::default();
    let mut client = Client::send(socket, &Request::Observe(request.clone()))?;
    loop {
        let why = match follow_once(&mut client, &mut recent, &mut output)? {
            None => return Ok(EXIT_OK),
            Some(why) => why,
        };
        output.warn(&format!(
            "the connection to the daemon has ended ({why}); waiting for the daemon"
        ))?;
        request.after = Some(recent.resume().map_or_else(String::new, |uuid| uuid.to_string()));
        // Without a flow to continue after, the flows since the start of this command are to be shown.
        if recent.last.is_none() {
            request.query.since = request.query.since.max(Some(begun));
        }
        client = reconnect(socket, &request)?;
        output.warn("the daemon answers again")?;
        recent.reconnected = true;
    }
}

/// Prints flows until the connection ends, and returns why; `None` if the daemon has sent everything.
fn follow_once(
    client: &mut Client,
    recent: &mut Recent,
    output: &mut Printed,
) -> anyhow::Result<Option<String>> {
    loop {
        if !client.has_next() {
            output.out.flush()?;
        }
        match client.next_raw() {
            Ok(Some(Received::Flow(json))) => {
                if let Err(error) = output.received(json, recent)? {
                    return Ok(Some(format!("a flow cannot be read: {error}")));
                }
            }
            Ok(Some(Received::Other(answer))) => match answer {
                Answer::Lost(lost) => output.lost(lost.source.as_ref(), lost.count)?,
                Answer::Error(message) => bail!(message),
                Answer::Ok(_) | Answer::Capture(_) | Answer::Alive | Answer::Flow(_) => return Ok(None),
            },
            Ok(None) => return Ok(Some("the daemon closed it".to_owned())),
            Err(ClientError::Broken(error)) => return Ok(Some(error.to_string())),
            Err(error @ ClientError::Hangs { .. }) => {
                output.warn(&error.to_string())?;
                return Ok(Some("no answer".to_owned()));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends the request as soon as a daemon answers. The kernel also connects clients to a daemon that hangs, as long as the
/// queue of its socket is not full, so an answer is required first.
fn reconnect(socket: &Path, request: &ObserveRequest) -> anyhow::Result<Client> {
    let (mut wait, longest) = RETRY;
    loop {
        thread::sleep(wait);
        let sent = ask::<serde_json::Value>(socket, &Request::Ping)
            .and_then(|_| Client::send(socket, &Request::Observe(request.clone())));
        match sent {
            Ok(client) => return Ok(client),
            Err(ClientError::NotRunning { .. } | ClientError::Broken(_) | ClientError::Hangs { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        wait = (wait * 2).min(longest);
    }
}

/// The flows that a follower has received last. They are not printed again after a reconnection.
#[derive(Default)]
struct Recent {
    order: VecDeque<(Timestamp, Uuid)>,
    known: HashSet<Uuid>,
    last: Option<Uuid>,
    reconnected: bool,
}

impl Recent {
    /// Returns whether the flow is new.
    fn insert(&mut self, time: Timestamp, uuid: &Uuid) -> bool {
        if uuid.is_none() {
            return true;
        }
        if !self.known.insert(uuid.clone()) {
            return false;
        }
        self.order.push_back((time, uuid.clone()));
        self.last = Some(uuid.clone());
        if self.order.len() > MAX_RECENT
            && let Some((_, oldest)) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        true
    }

    fn is_other_ring(&self, uuid: &Uuid) -> bool {
        self.last.as_ref().is_some_and(|last| !last.same_ring(uuid))
    }

    /// Returns the flow after which to continue: all flows before it were received. Flows are sorted by time within a short
    /// window, so a flow that was recorded shortly before the last one can be missing.
    fn resume(&self) -> Option<&Uuid> {
        let last = self.last.as_ref()?;
        let newest = self.order.iter().map(|(time, _)| time.0).max()?;
        let late = self
            .order
            .iter()
            .filter(|(time, uuid)| time.0 >= newest.saturating_sub(LATE_NS) && uuid.same_ring(last));
        late.map(|(_, uuid)| uuid)
            .min_by_key(|uuid| uuid.number())
            .or(Some(last))
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
    use super::*;

    fn insert(recent: &mut Recent, key: u64, number: u64, time: i64) -> bool {
        recent.insert(Timestamp(time), &Uuid::new(key, number))
    }

    #[test]
    fn flows_are_not_printed_twice_and_none_is_skipped() {
        let mut recent = Recent::default();
        assert!(recent.resume().is_none());
        let second = 1_000_000_000;
        for (number, time) in [
            (1, second),
            (5, 10 * second),
            (4, 10 * second + 1),
            (7, 10 * second + 2),
        ] {
            assert!(insert(&mut recent, 1, number, time));
        }
        assert!(!insert(&mut recent, 1, 4, 10 * second + 1));
        // 6 can still be missing, and 3 is older than every flow that can.
        assert_eq!(recent.resume().and_then(Uuid::number), Some(4));
        assert!(!recent.is_other_ring(&Uuid::new(1, 9)) && recent.is_other_ring(&Uuid::new(2, 9)));
        // After a restart of the daemon, flows of the new ring count.
        assert!(insert(&mut recent, 2, 4, 10 * second + 3));
        assert_eq!(recent.resume(), Some(&Uuid::new(2, 4)));
    }

    #[test]
    fn the_memory_of_a_follower_is_bounded() {
        let mut recent = Recent::default();
        for number in 0..MAX_RECENT as u64 + 10 {
            insert(&mut recent, 1, number, 0);
        }
        assert_eq!((recent.order.len(), recent.known.len()), (MAX_RECENT, MAX_RECENT));
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
