//! Commands that print flows as they arrive, also after a restart of the daemon.

use std::{
    collections::{HashSet, VecDeque},
    io::{self, BufWriter, StdoutLock},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::bail;
use palisade_flowlog::{Timestamp, Uuid};

use super::output::EXIT_OK;
use crate::{
    control::{
        api::{AgentNotice, Answer, ObserveRequest, Request},
        client::{Client, ClientError, Received, ask},
    },
    priority,
};

/// First and longest wait before the next attempt to reach the daemon while following.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Number of received flows whose identifiers are kept while following.
const MAX_RECENT: usize = 16_384;
/// Size of the buffer of the standard output, bytes.
const OUTPUT_BUFFER: usize = 64 * 1024;
/// Time before the newest flow in which a flow that was recorded earlier can still be missing, ns. The daemon sorts flows
/// within a much shorter time.
const LATE_NS: i64 = 1_000_000_000;

/// Returns the standard output with a buffer. Without it, each line would be a system call.
pub(super) fn buffered() -> BufWriter<StdoutLock<'static>> {
    BufWriter::with_capacity(OUTPUT_BUFFER, io::stdout().lock())
}

/// The output of a command that follows flows.
pub(super) trait FollowOutput {
    /// Prints a flow in JSON, unless [`Recent::is_new`] returns false. The inner error is that of the JSON.
    fn received(&mut self, json: &str, recent: &mut Recent) -> io::Result<Result<(), serde_json::Error>>;
    /// Prints how many flows were lost, and where.
    fn lost(&mut self, source: &str, count: u64) -> io::Result<()>;
    /// Prints an event of the daemon.
    fn agent(&mut self, _: &AgentNotice) -> io::Result<()> {
        Ok(())
    }
    /// Prints a warning.
    fn warn(&mut self, text: &str) -> io::Result<()>;
    /// Writes what is in the buffer.
    fn flush(&mut self) -> io::Result<()>;
}

/// Prints flows as they arrive. When the daemon ends, waits for the next one and continues after the last flow.
/// `begun`: the time of the command line.
pub(super) fn follow(
    socket: &Path,
    mut request: ObserveRequest,
    begun: Timestamp,
    output: &mut impl FollowOutput,
) -> anyhow::Result<u8> {
    priority::lower();
    let mut recent = Recent::default();
    let mut client = Client::send(socket, &Request::Observe(request.clone()))?;
    loop {
        let why = match follow_once(&mut client, &mut recent, output)? {
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
        request.agent_events = request.agent_events.map(|since| since.max(recent.agent_event));
        client = reconnect(socket, &request)?;
        output.warn("the daemon answers again")?;
        recent.reconnected = true;
    }
}

/// Prints flows until the connection ends, and returns why; `None` if the daemon has sent everything.
fn follow_once(
    client: &mut Client,
    recent: &mut Recent,
    output: &mut impl FollowOutput,
) -> anyhow::Result<Option<String>> {
    loop {
        if !client.has_next() {
            output.flush()?;
        }
        match client.next_raw() {
            Ok(Some(Received::Flow(json))) => {
                if let Err(error) = output.received(json, recent)? {
                    return Ok(Some(format!("a flow cannot be read: {error}")));
                }
            }
            Ok(Some(Received::Other(answer))) => match answer {
                Answer::Lost(lost) => output.lost(lost.source.as_ref(), lost.count)?,
                Answer::Agent(event) => {
                    recent.agent_event = recent.agent_event.max(event.time);
                    output.agent(&event)?;
                }
                Answer::Error(message) => bail!(message),
                Answer::Ok(_)
                | Answer::Capture(_)
                | Answer::Connections(_)
                | Answer::Alive
                | Answer::Flow(_) => return Ok(None),
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
pub(super) struct Recent {
    order: VecDeque<(Timestamp, Uuid)>,
    known: HashSet<Uuid>,
    last: Option<Uuid>,
    reconnected: bool,
    /// Time of the newest event of the daemon.
    agent_event: Timestamp,
}

impl Recent {
    /// Returns whether a flow was not received before. Warns about flows that were lost because the daemon was restarted.
    pub(super) fn is_new(
        &mut self,
        time: Timestamp,
        uuid: &Uuid,
        output: &mut impl FollowOutput,
    ) -> io::Result<bool> {
        if std::mem::take(&mut self.reconnected) && self.is_other_ring(uuid) {
            output.warn("the daemon was restarted: flows that it had not sent before are lost")?;
        }
        Ok(self.insert(time, uuid))
    }

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
}
