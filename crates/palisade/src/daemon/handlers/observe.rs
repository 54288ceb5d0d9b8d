//! Flows for `palisade observe` and `palisade monitor`.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use palisade_flowlog::{Cursor, Filters, Flow, Next, Ordered, Ring, Timestamp};
use palisade_hubble::Api;
use serde_json::{Value, json};

use super::agent::notice;
use crate::{
    control::{
        ALIVE_INTERVAL,
        api::{AgentNotice, Answer, ObserveRequest},
        server::Sink,
    },
    priority::{self, Pace},
};

/// Interval at which a handler checks whether a following client has disconnected, while no flow arrives.
const FOLLOW_POLL_INTERVAL: Duration = Duration::from_millis(250);
/// Time for which followed flows are held back so that they can be sorted. Records of workers and events of the
/// programs can reach the ring in the wrong order; their times then differ by at most a tick of the coarse clock plus
/// the scheduling delay of the threads.
const REORDER_WINDOW: Duration = Duration::from_millis(50);
/// Time in which flows gather between two reads of the ring, while flows are held back. It delays no flow, since it is a
/// part of the window.
const GATHER_TIME: Duration = Duration::from_millis(10);
/// Largest number of flows that are held back for sorting.
const MAX_REORDERED_FLOWS: usize = 4_096;

/// Flows between two checks of [`Pace`].
const FLOWS_PER_CHECK: u32 = 64;

/// Sends the flows of a request, and the events of the daemon if the request asks for them. `agent`: where these events
/// are kept; `None` if the flow API does not work.
pub(super) fn observe(
    ring: &Arc<Ring>,
    agent: Option<&Api>,
    request: &ObserveRequest,
    sink: &mut dyn Sink,
) -> io::Result<()> {
    // The thread serves no other request.
    priority::lower();
    let filters = match Filters::compile(&request.query) {
        Ok(filters) => filters,
        Err(error) => return sink.send(&Answer::Error(error.to_string())),
    };
    let (mut flows, mut cursor) = match (&request.after, request.first) {
        (Some(uuid), _) => {
            let mut cursor = ring.after(uuid).unwrap_or_else(|| ring.oldest());
            (recorded(&mut cursor, &filters, sink)?, cursor)
        }
        (None, Some(count)) => (ring.first(count, &filters), ring.follow()),
        (None, None) => ring.last(request.last.unwrap_or(usize::MAX), &filters),
    };
    flows.sort_by_key(|flow| flow.time);
    for flow in flows {
        sink.queue_flow(&flow)?;
    }
    sink.flush()?;
    if !request.follow {
        return sink.send(&Answer::Ok(Value::Null));
    }
    if !sink.follow() {
        let why = "too many clients follow flows at the same time; end one of them".to_owned();
        return sink.send(&Answer::Error(why));
    }
    let mut agent = match (request.agent_events, agent) {
        (None, _) => None,
        (Some(since), Some(api)) => Some(AgentCursor {
            api,
            number: 0,
            since,
        }),
        (Some(_), None) => {
            let why = "events of the type agent are not kept, because the flow API could not be started; see \
                       `palisade status`";
            return sink.send(&Answer::Error(why.to_owned()));
        }
    };
    let mut said = Instant::now();
    let mut ordered = Ordered::new(REORDER_WINDOW, MAX_REORDERED_FLOWS);
    let mut pace = Pace::new();
    loop {
        for read in 1_u32.. {
            match cursor.read() {
                Some(Next::Flow(flow)) if filters.matches(&flow) => ordered.push(flow, Instant::now()),
                Some(Next::Flow(_)) => {}
                Some(Next::Lost(lost)) => sink.queue(&Answer::Lost(lost))?,
                None => break,
            }
            if read.is_multiple_of(FLOWS_PER_CHECK) && pace.is_over() {
                break;
            }
        }
        while let Some(flow) = ordered.due(Instant::now()) {
            sink.queue_flow(&flow)?;
        }
        if let Some(agent) = &mut agent {
            agent.send(sink)?;
        }
        sink.flush()?;
        pace.rest();
        let more = if ordered.is_empty() {
            cursor.wait(FOLLOW_POLL_INTERVAL)
        } else {
            cursor.gather(GATHER_TIME)
        };
        if !more && sink.closed() {
            return Ok(());
        }
        if said.elapsed() >= ALIVE_INTERVAL {
            sink.send(&Answer::Alive)?;
            said = Instant::now();
        }
    }
}

/// Position in the events of the daemon.
struct AgentCursor<'a> {
    api: &'a Api,
    /// Number of the next event.
    number: u64,
    /// Events up to this time are not sent.
    since: Timestamp,
}

impl AgentCursor<'_> {
    /// Sends the events that are new.
    fn send(&mut self, sink: &mut dyn Sink) -> io::Result<()> {
        let read = self.api.agent_events(self.number);
        // The first read begins before the oldest event, and nothing was lost by that.
        if read.lost > 0 && self.number > 0 {
            let notice = AgentNotice {
                time: self.since,
                subtype: "Message".into(),
                message: json!(format!("{} events of the daemon were lost", read.lost)),
            };
            sink.queue(&Answer::Agent(Box::new(notice)))?;
        }
        self.number = read.next;
        for (time, event) in read.events {
            if time > self.since {
                sink.queue(&Answer::Agent(Box::new(notice(event, time))))?;
            }
        }
        Ok(())
    }
}

/// Returns the flows from the cursor on that pass the filters, at most as many as the ring has, and reports lost ones.
fn recorded(cursor: &mut Cursor, filters: &Filters, sink: &mut dyn Sink) -> io::Result<Vec<Arc<Flow>>> {
    let mut flows = Vec::new();
    // One read more, since lost flows take one. Flows that arrive meanwhile are left to the loop of the caller.
    for _ in 0..=cursor.behind() {
        match cursor.read() {
            Some(Next::Flow(flow)) if filters.matches(&flow) => flows.push(flow),
            Some(Next::Flow(_)) => {}
            Some(Next::Lost(lost)) => sink.queue(&Answer::Lost(lost))?,
            None => break,
        }
    }
    Ok(flows)
}
