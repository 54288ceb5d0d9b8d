//! The streams of a connection: those that are open, and the last ones that were closed.

use std::collections::VecDeque;

use foldhash::HashMap;

use crate::{
    Millis,
    record::{Text, Word},
};

/// Number of closed streams that are remembered. Frames of an older stream are handled as if the client had closed it.
const CLOSED: usize = 256;

/// Number of streams whose memory a connection without open streams keeps.
const KEPT_STREAMS: usize = 16;

/// A stream whose request was forwarded.
#[derive(Debug)]
pub(super) struct Stream {
    /// Whether the client can send further frames.
    pub(super) client_open: bool,
    /// Whether the server can send further frames.
    pub(super) server_open: bool,
    /// Number of bytes that Content-Length announces and that have not arrived.
    pub(super) left: Option<u64>,
    /// Whether the server has sent a final response.
    pub(super) responded: bool,
    /// Record of the response; `None` once it is reported.
    pub(super) report: Option<Report>,
    /// For CONNECT, what allows the tunnel.
    pub(super) tunnel: Option<Tunnel>,
    /// Time of the whole request, or of the last interim response (1xx), ms.
    pub(super) since: Millis,
}

impl Stream {
    /// Returns whether the server has to send the head of the final response. The data of a CONNECT follow its response.
    pub(super) const fn waits(&self) -> bool {
        !self.responded && (!self.client_open || self.tunnel.is_some())
    }
}

/// What allows a tunnel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tunnel {
    /// The rule set of the request.
    pub(super) ruleset: u32,
    /// Whether only audit mode allows the tunnel.
    pub(super) audit: bool,
}

/// Fields of the record of a response.
#[derive(Clone, Copy, Debug)]
pub(super) struct Report {
    pub(super) method: Word,
    pub(super) url: Text,
    pub(super) since: Millis,
    /// For gRPC, whose result is in the trailers.
    pub(super) grpc: bool,
    /// Status and Content-Length of the response, if the record waits for the trailers.
    pub(super) status: Option<(u16, Option<u64>)>,
}

/// A closed stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Closed {
    pub(super) id: u32,
    /// Whether the client has ended or reset the stream, so that no further frames can be under way.
    pub(super) by_client: bool,
    /// Whether the server knows the stream.
    pub(super) forwarded: bool,
    /// Whether the filter has responded after the server got the request. Frames of the server that are under way must
    /// not follow that response.
    pub(super) answered: bool,
}

#[derive(Debug)]
pub(super) struct Streams {
    pub(super) open: HashMap<u32, Stream>,
    /// Streams with a response of the filter whose client still sends, and the number of bytes that it may send.
    draining: HashMap<u32, u64>,
    closed: VecDeque<Closed>,
    /// Highest identifier that the client has used.
    pub(super) last: u32,
    /// No open stream has waited for its response since an earlier time, ms. The time can be too early, because a
    /// response does not change it: the search for the earliest stream would cost time for each response.
    waits_since: Millis,
}

impl Default for Streams {
    fn default() -> Self {
        Self {
            open: HashMap::default(),
            draining: HashMap::default(),
            closed: VecDeque::new(),
            last: 0,
            waits_since: Millis::MAX,
        }
    }
}

impl Streams {
    /// Notes that the wait of a stream for its response begins now, if it waits.
    pub(super) fn begin_wait(&mut self, id: u32, now: Millis) {
        if let Some(stream) = self.open.get_mut(&id)
            && stream.waits()
        {
            stream.since = now;
            self.waits_since = self.waits_since.min(now);
        }
    }

    /// Returns a time before which no stream began to wait; `None` if no stream waits.
    pub(super) const fn waits_since(&self) -> Option<Millis> {
        if self.waits_since == Millis::MAX {
            None
        } else {
            Some(self.waits_since)
        }
    }

    /// Returns the streams that have waited for their response since `time` or longer, by their identifiers.
    pub(super) fn overdue(&mut self, time: Millis) -> Vec<u32> {
        let mut overdue = Vec::new();
        self.waits_since = Millis::MAX;
        for (&id, stream) in self.open.iter().filter(|(_, stream)| stream.waits()) {
            if stream.since <= time {
                overdue.push(id);
            } else {
                self.waits_since = self.waits_since.min(stream.since);
            }
        }
        overdue.sort_unstable();
        overdue
    }

    /// Notes that the filter has responded to a closed stream.
    pub(super) fn note_answer(&mut self, id: u32) {
        if let Some(closed) = self.closed.iter_mut().rev().find(|closed| closed.id == id) {
            closed.answered = true;
        }
    }

    /// Returns whether the filter has responded to a stream after the server got its request.
    pub(super) fn is_answered(&self, id: u32) -> bool {
        !self.open.contains_key(&id) && self.closed(id).is_some_and(|closed| closed.answered)
    }

    /// Returns whether the client has not used the identifier.
    pub(super) const fn is_idle(&self, id: u32) -> bool {
        id > self.last || id.is_multiple_of(2)
    }

    /// Keeps a refused stream until its client has sent `bytes` more bytes. Returns false if there are too many such
    /// streams.
    pub(super) fn drain(&mut self, id: u32, bytes: u64, most: u32) -> bool {
        let fits = self.draining.len() < most as usize;
        if fits {
            self.draining.insert(id, bytes);
        }
        fits
    }

    /// Counts content of a refused stream. Returns whether the client may send more; `None` if the stream is not being
    /// drained.
    pub(super) fn count_drained(&mut self, id: u32, bytes: u32) -> Option<bool> {
        let left = self.draining.get_mut(&id)?;
        *left = left.saturating_sub(bytes.into());
        Some(*left > 0)
    }

    /// Ends the draining of a refused stream. Returns whether the stream was drained.
    pub(super) fn end_drain(&mut self, id: u32, by_client: bool) -> bool {
        let was_drained = self.draining.remove(&id).is_some();
        if was_drained {
            self.close(Closed {
                id,
                by_client,
                forwarded: false,
                answered: false,
            });
        }
        was_drained
    }

    pub(super) fn close(&mut self, closed: Closed) {
        if self.closed.len() >= CLOSED {
            self.closed.pop_front();
        }
        self.closed.push_back(closed);
    }

    /// Notes that the client has reset a stream that is closed.
    pub(super) fn close_by_client(&mut self, id: u32) {
        if let Some(closed) = self.closed.iter_mut().rev().find(|closed| closed.id == id) {
            closed.by_client = true;
        }
    }

    /// Removes an open stream whose request was forwarded.
    pub(super) fn remove(&mut self, id: u32, by_client: bool) -> Option<Stream> {
        let stream = self.open.remove(&id)?;
        if self.open.is_empty() {
            // An idle connection keeps little memory.
            self.open.shrink_to(KEPT_STREAMS);
        }
        self.close(Closed {
            id,
            by_client: by_client || !stream.client_open,
            forwarded: true,
            answered: false,
        });
        Some(stream)
    }

    /// Removes a stream that both sides have ended.
    pub(super) fn remove_ended(&mut self, id: u32) -> Option<Stream> {
        let stream = self.open.get(&id)?;
        if stream.client_open || stream.server_open {
            return None;
        }
        self.remove(id, true)
    }

    pub(super) fn closed(&self, id: u32) -> Option<Closed> {
        self.closed.iter().rev().find(|closed| closed.id == id).copied()
    }

    /// Returns whether the server can send frames on a stream that is not open. The client can have reset the stream
    /// while frames of the server were under way.
    pub(super) fn can_be_under_way(&self, id: u32) -> bool {
        !self.is_idle(id)
            && !self.draining.contains_key(&id)
            && self.closed(id).is_none_or(|closed| closed.forwarded)
    }
}
