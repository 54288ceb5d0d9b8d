//! `palisade monitor`.

use std::{
    io::{self, BufWriter, StdoutLock, Write as _},
    path::Path,
    time::SystemTime,
};

use anyhow::bail;
use palisade_flowlog::{
    FilterBuilder, Flow, Timestamp,
    filter::{ApiFilter, ApiFilters},
    format::{self, ReservedAs},
};
use serde_json::{Value, json};

use super::follow::{FollowOutput, Recent, buffered, follow};
use crate::{
    cli::{MonitorArgs, MonitorType, Output},
    control::{
        api::{AgentNotice, Endpoint, ObserveRequest, Request},
        client::ask,
    },
};

/// Runs `palisade monitor`.
pub(super) fn monitor(socket: &Path, args: &MonitorArgs) -> anyhow::Result<u8> {
    // Without a look-up the command would wait for events of an endpoint that does not exist.
    let numbers = |names: &[String]| -> anyhow::Result<Vec<String>> {
        let number = |name: &String| {
            let endpoint = name.trim().to_owned();
            let endpoint: Endpoint = ask(socket, &Request::EndpointGet { endpoint })?;
            Ok(endpoint.id.to_string())
        };
        names.iter().map(number).collect()
    };
    let (from, to, related_to) = (
        numbers(&args.from)?,
        numbers(&args.to)?,
        numbers(&args.related_to)?,
    );
    let now = Timestamp::from_system_time(SystemTime::now());
    let mut builder = FilterBuilder::new(now);
    for kind in args.types.iter().filter_map(|kind| kind.of_flows()) {
        builder.flag("type", kind)?;
    }
    let types = builder.finish_api()?.allowlist.pop().unwrap_or_default();
    let has = |wanted: MonitorType| args.types.is_empty() || args.types.contains(&wanted);
    // Events of the daemon have no source and no destination.
    let are_all_ends = from.is_empty() && to.is_empty() && related_to.is_empty();
    let only_agent = !args.types.is_empty() && args.types.iter().all(|kind| kind.of_flows().is_none());
    let query = if only_agent {
        if !are_all_ends {
            bail!("events of the type agent have no endpoint: leave out --from, --to and --related-to");
        }
        ApiFilters {
            denylist: vec![ApiFilter::default()],
            ..ApiFilters::default()
        }
    } else {
        let allowlist = ends(&from, &to, &related_to, &types);
        if allowlist.is_empty() {
            bail!("no event can match: --related-to names none of the endpoints of --from and --to");
        }
        ApiFilters {
            allowlist,
            ..ApiFilters::default()
        }
    };
    let request = ObserveRequest {
        query,
        follow: true,
        last: Some(0),
        agent_events: (has(MonitorType::Agent) && are_all_ends).then_some(now),
        ..ObserveRequest::default()
    };
    let mut output = Printed {
        out: buffered(),
        output: args.output.output,
        is_verbose: args.verbose > 0,
        reserved: if args.numeric {
            ReservedAs::Numbers
        } else {
            ReservedAs::Names
        },
    };
    follow(socket, request, now, &mut output)
}

/// Returns the filters for events with a source in `from`, a destination in `to`, and one end in `related_to`; an empty
/// list stands for any endpoint. None if no event can match.
fn ends(from: &[String], to: &[String], related_to: &[String], types: &ApiFilter) -> Vec<ApiFilter> {
    let filter = |from: &[String], to: &[String]| {
        let mut filter = types.clone();
        filter.palisade.source_endpoint = from.to_vec();
        filter.palisade.destination_endpoint = to.to_vec();
        filter
    };
    if related_to.is_empty() {
        return vec![filter(from, to)];
    }
    let common = |list: &[String]| -> Vec<String> {
        let is_wanted = |number: &&String| list.is_empty() || list.contains(number);
        related_to.iter().filter(is_wanted).cloned().collect()
    };
    let (sources, destinations) = (common(from), common(to));
    let mut filters = Vec::new();
    if !sources.is_empty() {
        filters.push(filter(&sources, to));
    }
    if !destinations.is_empty() {
        filters.push(filter(from, &destinations));
    }
    filters
}

/// The output of `palisade monitor`.
struct Printed {
    out: BufWriter<StdoutLock<'static>>,
    output: Output,
    is_verbose: bool,
    reserved: ReservedAs,
}

impl FollowOutput for Printed {
    fn received(&mut self, json: &str, recent: &mut Recent) -> io::Result<Result<(), serde_json::Error>> {
        let flow: Flow = match serde_json::from_str(json) {
            Ok(flow) => flow,
            Err(error) => return Ok(Err(error)),
        };
        if !recent.is_new(flow.time, &flow.uuid, self)? {
            return Ok(Ok(()));
        }
        let text = match &self.output {
            Output::Table if self.is_verbose => format::monitor_verbose(&flow, self.reserved),
            Output::Table => format::monitor(&flow, self.reserved),
            Output::Json => format::json(&flow),
            Output::JsonPath(template) => match serde_json::from_str(&format::json(&flow)) {
                Ok(value) => template.render(&value) + "\n",
                Err(error) => return Ok(Err(error)),
            },
        };
        self.out.write_all(text.as_bytes())?;
        Ok(Ok(()))
    }

    fn lost(&mut self, source: &str, count: u64) -> io::Result<()> {
        self.warn(&format!("{count} flows were lost ({source})"))
    }

    fn agent(&mut self, event: &AgentNotice) -> io::Result<()> {
        let line = match &self.output {
            Output::Table => event_line(event),
            Output::Json => event_json(event).to_string(),
            Output::JsonPath(template) => template.render(&event_json(event)),
        };
        writeln!(self.out, "{line}")
    }

    fn warn(&mut self, text: &str) -> io::Result<()> {
        // The warning appears after the events that were received before it.
        self.out.flush()?;
        eprintln!("palisade: {text}");
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Returns an event of the daemon as a line.
fn event_line(event: &AgentNotice) -> String {
    format!(">> {}: {}", event.subtype, event.message)
}

fn event_json(event: &AgentNotice) -> Value {
    json!({"type": "agent", "subtype": event.subtype, "message": event.message})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_combined() {
        let list = |numbers: &str| -> Vec<String> { numbers.split_whitespace().map(str::to_owned).collect() };
        let combined = |from: &str, to: &str, related_to: &str| -> Vec<(Vec<String>, Vec<String>)> {
            ends(&list(from), &list(to), &list(related_to), &ApiFilter::default())
                .into_iter()
                .map(|filter| {
                    (
                        filter.palisade.source_endpoint,
                        filter.palisade.destination_endpoint,
                    )
                })
                .collect()
        };
        for (from, to, related_to, expected) in [
            ("", "", "", &[("", "")][..]),
            ("1 2", "3", "", &[("1 2", "3")]),
            ("", "", "1 2", &[("1 2", ""), ("", "1 2")]),
            ("1 2", "", "2 3", &[("2", ""), ("1 2", "2 3")]),
            ("1", "2", "2", &[("1", "2")]),
            ("1", "2", "3", &[]),
        ] {
            let expected: Vec<_> = expected.iter().map(|(from, to)| (list(from), list(to))).collect();
            assert_eq!(
                combined(from, to, related_to),
                expected,
                "{from:?} {to:?} {related_to:?}"
            );
        }
    }

    #[test]
    fn events_of_the_daemon_are_lines_and_objects() {
        let event = AgentNotice {
            time: Timestamp(0),
            subtype: "Policy updated".into(),
            message: json!({"labels": ["shop/web\n"], "revision": 2, "rule_count": 1}),
        };
        assert_eq!(
            event_line(&event),
            ">> Policy updated: {\"labels\":[\"shop/web\\n\"],\"revision\":2,\"rule_count\":1}"
        );
        assert_eq!(
            event_json(&event).to_string(),
            "{\"type\":\"agent\",\"subtype\":\"Policy updated\",\"message\":{\"labels\":[\"shop/web\\n\"],\"revision\":2,\"rule_count\":1}}"
        );
    }
}
