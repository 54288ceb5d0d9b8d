//! Input and output of a call of the filter.

use palisade_abi::{PuntRequest, Reason};
use palisade_protocols::http2::{Fields, ParseError};

use super::config::Http2Stats;
use crate::{
    Millis, Rules, Side,
    record::{Record, Verdict, What},
    rules::HttpScratch,
    stream::StreamContext,
};

/// Everything that one call of the filter needs besides the bytes.
pub struct Context<'a> {
    /// Time, ms.
    pub now: Millis,
    /// The rules in force.
    pub rules: &'a Rules,
    /// The connection, with the current request of the policy.
    pub stream: &'a StreamContext,
    /// Buffers of the HTTP rules.
    pub scratch: &'a mut HttpScratch,
    /// Buffers for one header block.
    pub buffers: &'a mut Buffers,
    /// Counters.
    pub stats: &'a mut Http2Stats,
    /// Takes the records.
    pub record: &'a mut dyn FnMut(&Record),
}

impl Context<'_> {
    /// Returns the current request of the policy.
    pub(super) const fn request(&self) -> &PuntRequest {
        &self.stream.request
    }

    /// Counts and records an error of the client or of one of its requests.
    pub(super) fn refuse(&mut self, error: ParseError, verdict: Verdict) {
        self.stats.count(error);
        let what = What::Unreadable { detail: error.text() };
        (self.record)(&self.stream.record(verdict, reason_of(error), what));
    }
}

/// Buffers for one header block, shared by all connections of a thread.
#[derive(Debug, Default)]
pub struct Buffers {
    pub(super) fields: Fields,
    pub(super) cookie: Vec<u8>,
    pub(super) block: Vec<u8>,
}

/// Bytes for both peers. The filter appends to them; the caller takes them out.
///
/// A call generates at most a constant multiple of its input. The caller can therefore bound its memory: it does not
/// read from the client while many bytes for the client or for the server wait, nor from the server while many bytes
/// for the client wait. [`super::Filter::server`] appends at most a GOAWAY for the server, and for 16 KiB of data on
/// streams that [`super::Filter::answer_overdue`] has answered a WINDOW_UPDATE. The caller should read from
/// the server even while bytes for the server wait, because a server that reads only after it has written would
/// otherwise wait forever.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Bytes for the client.
    pub to_client: Vec<u8>,
    /// Bytes for the server.
    pub to_server: Vec<u8>,
}

/// The end of a connection. The output has a GOAWAY for each peer. The caller delivers the output and closes both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionEnd {
    /// The reason, as records show it.
    pub reason: Reason,
    /// The error of a peer; `None` if the caller has ended the connection.
    pub error: Option<(Side, ParseError)>,
}

impl ConnectionEnd {
    /// Returns the reason in words.
    #[must_use]
    pub fn text(&self) -> &'static str {
        self.error.map_or(self.reason.text(), |(_, error)| error.text())
    }
}

/// Returns the reason of a verdict that an error causes.
pub(super) const fn reason_of(error: ParseError) -> Reason {
    match error {
        ParseError::BlockTooLong
        | ParseError::TooManyStreams
        | ParseError::TooManyResets
        | ParseError::TooManyDenied
        | ParseError::TooManyFrames
        | ParseError::Backlog => Reason::InspectLimit,
        _ => Reason::AppMalformed,
    }
}
