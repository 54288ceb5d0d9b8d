//! HTTP/2 between a client and a server: a filter that reads every request and gives it the verdict that the same
//! request has in HTTP/1.
//!
//! The filter is no endpoint: stream identifiers, flow-control windows, settings and their acknowledgements are those of
//! the peers. The client's header blocks are decoded and encoded again without a dynamic table, so that a denied
//! request leaves no gap in the state of the server's decoder. All other frames are forwarded unchanged, except:
//! - What has arrived of a DATA frame is forwarded as a frame of its own, so a peer that stalls within a frame does not
//!   delay frames of the filter.
//! - A denied request gets a response in the server's place, and the server never sees its stream. DATA on it is
//!   dropped, and the client gets its connection window back.
//! - A request whose response is overdue gets one in the server's place, and the server gets a reset of the stream. What
//!   the server has sent on the stream is dropped; from then on its header blocks are encoded again as well.
//! - Settings are rewritten to what the filter can follow. Server push is switched off.
//! - Frames of unknown types are dropped (RFC 9113, 5.5), and frames on streams that the server does not know.
//!
//! Start at [`Filter`].

mod budget;
mod client;
mod config;
mod connection;
mod context;
mod respond;
mod server;
mod settings;
mod streams;

use palisade_abi::Reason;
use palisade_protocols::http2::{ErrorCode, Frames, PREFACE, ParseError};

use crate::{
    Millis, Side,
    record::{Verdict, What},
};
pub use config::{Http2Limits, Http2Stats, Rate};
use connection::Connection;
use context::reason_of;
pub use context::{Buffers, ConnectionEnd, Context, Output};
pub use respond::LateAnswer;
use streams::Tunnel;

/// A stream without a final response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unanswered {
    /// Identifier of the stream.
    pub id: u32,
    /// Whether the client has sent its whole request.
    pub is_complete: bool,
    /// Whether the request is HEAD, whose response has no content.
    pub is_head: bool,
    /// Whether the request is one of gRPC.
    pub is_grpc: bool,
}

/// Filter of one connection.
#[derive(Debug)]
pub struct Filter {
    client: Frames,
    server: Frames,
    connection: Connection,
    /// Number of bytes of the preface that have arrived.
    preface: usize,
    end: Option<ConnectionEnd>,
}

impl Filter {
    /// Returns the filter of a new connection. `secure`: whether records show `https` as the scheme.
    #[must_use]
    pub fn new(limits: &Http2Limits, secure: bool) -> Self {
        Self {
            client: Frames::new(limits.block),
            server: Frames::new(limits.block),
            connection: Connection::new(limits, secure),
            preface: 0,
            end: None,
        }
    }

    /// Filters bytes of the client. All of them are used up.
    ///
    /// # Errors
    /// [`ConnectionEnd`] if the connection must end, now or since an earlier call.
    pub fn client(
        &mut self,
        bytes: &[u8],
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ConnectionEnd> {
        self.check_open()?;
        self.client_bytes(bytes, cx, out)
            .map_err(|error| self.fail(Side::Client, error, cx, out))
    }

    /// Filters bytes of the server. All of them are used up.
    ///
    /// # Errors
    /// As [`Self::client`].
    pub fn server(
        &mut self,
        bytes: &[u8],
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ConnectionEnd> {
        self.check_open()?;
        self.server_bytes(bytes, cx, out)
            .map_err(|error| self.fail(Side::Server, error, cx, out))
    }

    /// Ends the connection, for example because the policy no longer allows it. Appends a GOAWAY for both peers.
    pub fn goaway(&mut self, reason: Reason, out: &mut Output) {
        if self.end.is_none() {
            self.write_goaway(ErrorCode::NoError, ErrorCode::NoError, out);
            self.end = Some(ConnectionEnd { reason, error: None });
        }
    }

    /// Resets the tunnels (CONNECT) whose rule set is no longer in force, and those that only audit mode allowed once it
    /// is switched off. A tunnel has no further request to which new rules could apply. The caller calls this function
    /// after a change of the policy.
    pub fn recheck(&mut self, cx: &mut Context<'_>, out: &mut Output) {
        if self.end.is_some() || cx.stream.is_audit() {
            return;
        }
        let ruleset = cx.stream.request.ruleset;
        let is_outdated = |tunnel: Tunnel| tunnel.audit || tunnel.ruleset != ruleset;
        let streams = self.connection.streams.open.iter();
        let mut outdated: Vec<u32> = streams
            .filter(|(_, stream)| stream.tunnel.is_some_and(is_outdated))
            .map(|(id, _)| *id)
            .collect();
        outdated.sort_unstable();
        for id in outdated {
            self.connection.reset(id, ErrorCode::Cancel, out);
        }
    }

    /// Returns the number of streams whose request was forwarded and that are not ended.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.connection.streams.open.len()
    }

    /// Returns the streams whose request was forwarded and that have no final response, by their identifiers.
    #[must_use]
    pub fn unanswered(&self) -> Vec<Unanswered> {
        let open = self.connection.streams.open.iter();
        let mut streams: Vec<Unanswered> = open
            .filter(|(_, stream)| !stream.responded)
            .map(|(&id, stream)| Unanswered {
                id,
                is_complete: !stream.client_open,
                is_head: stream
                    .report
                    .is_some_and(|report| report.method.bytes() == b"HEAD"),
                is_grpc: stream.report.is_some_and(|report| report.grpc),
            })
            .collect();
        streams.sort_unstable_by_key(|stream| stream.id);
        streams
    }

    /// Ends the connection to the server, in whose place the caller answers from now on by [`Self::server`]. What has
    /// arrived of an incomplete frame of the server is discarded. The output for the server has a reset of each open
    /// stream, so that the server stops its work for them, and a GOAWAY.
    pub fn leave_server(&mut self, out: &mut Output) {
        let limit = self.server.limit();
        self.server = Frames::new(self.connection.limits.block);
        self.server.raise_limit(limit);
        self.connection.leave_server(out);
    }

    /// Returns whether the server has sent its SETTINGS, which must precede all other frames for the client.
    #[must_use]
    pub const fn has_server_begun(&self) -> bool {
        self.connection.server.announced.is_some()
    }

    /// Returns a time before which no stream began to wait for the head of its response, ms; `None` if none waits.
    #[must_use]
    pub const fn waits_since(&self) -> Option<Millis> {
        if self.end.is_some() {
            return None;
        }
        self.connection.streams.waits_since()
    }

    /// Answers the requests that have waited for the head of their response since `time` or longer, and resets their
    /// streams at the server. Other streams go on. Returns the number of answers.
    pub fn answer_overdue(
        &mut self,
        time: Millis,
        answer: &LateAnswer<'_>,
        buffers: &mut Buffers,
        out: &mut Output,
    ) -> usize {
        if self.waits_since().is_none() {
            return 0;
        }
        let overdue = self.connection.streams.overdue(time);
        for id in &overdue {
            self.connection.respond_late(*id, answer, &mut buffers.block, out);
        }
        overdue.len()
    }

    /// Returns whether the client has sent the complete preface.
    #[must_use]
    pub const fn has_begun(&self) -> bool {
        self.preface == PREFACE.len()
    }

    /// Returns the number of bytes of content for the client that both its windows permit on a new response of the caller.
    #[must_use]
    pub fn room(&self) -> u32 {
        let window = u32::try_from(self.connection.server.window).unwrap_or(0);
        window.min(self.connection.least_window())
    }

    /// Returns the number of bytes that the filter holds: incomplete frames and header blocks, and generated frames that
    /// wait. Does not include the state of streams and dynamic tables.
    #[must_use]
    pub fn held(&self) -> usize {
        let Connection {
            client,
            server,
            held,
            early,
            ..
        } = &self.connection;
        let blocks = client.block.len() + server.block.len();
        self.client.held() + self.server.held() + held.len() + early.len() + blocks
    }

    /// Returns the number of bytes of the preface, the frame or the header block of a peer that is incomplete.
    #[must_use]
    pub fn incomplete(&self, side: Side) -> usize {
        let connection = &self.connection;
        match side {
            Side::Client if !self.has_begun() => self.preface,
            Side::Client => self.client.held() + connection.client.block.len(),
            Side::Server => self.server.held() + connection.server.block.len(),
        }
    }

    fn write_goaway(&mut self, client: ErrorCode, server: ErrorCode, out: &mut Output) {
        // Without the preface the client does not speak HTTP/2.
        if self.has_begun() {
            self.connection.goaway(client, server, out);
        }
    }

    const fn check_open(&self) -> Result<(), ConnectionEnd> {
        match self.end {
            None => Ok(()),
            Some(end) => Err(end),
        }
    }

    fn client_bytes(
        &mut self,
        bytes: &[u8],
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        let mut input = bytes;
        if self.preface < PREFACE.len() {
            let expected = PREFACE.get(self.preface..).unwrap_or_default();
            let (begin, rest) = input.split_at(input.len().min(expected.len()));
            if !expected.starts_with(begin) {
                return Err(ParseError::Preface);
            }
            self.preface += begin.len();
            input = rest;
            if self.preface == PREFACE.len() {
                out.to_server.extend_from_slice(PREFACE);
            }
        }
        while let Some(piece) = self.client.next(&mut input)? {
            self.connection.client_piece(piece, cx, out)?;
            if let Some(announced) = self.connection.client.announced {
                self.server.raise_limit(announced.frame);
            }
        }
        self.client.release();
        self.connection.check_early()
    }

    fn server_bytes(
        &mut self,
        bytes: &[u8],
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        let mut input = bytes;
        while let Some(piece) = self.server.next(&mut input)? {
            self.connection.server_piece(piece, cx, out)?;
            if let Some(announced) = self.connection.server.announced {
                self.client.raise_limit(announced.frame);
            }
        }
        self.server.release();
        Ok(())
    }

    /// Ends the connection because of an error of a peer.
    fn fail(
        &mut self,
        side: Side,
        error: ParseError,
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> ConnectionEnd {
        let reason = reason_of(error);
        cx.stats.count(error);
        let what = What::Unreadable { detail: error.text() };
        let record = match side {
            Side::Client => cx.stream.record(Verdict::Dropped, reason, what),
            Side::Server => cx.stream.response_record(Verdict::Dropped, reason, what),
        };
        (cx.record)(&record);
        let (client, server) = match side {
            Side::Client => (error.code(), ErrorCode::NoError),
            Side::Server => (ErrorCode::InternalError, error.code()),
        };
        self.write_goaway(client, server, out);
        let end = ConnectionEnd {
            reason,
            error: Some((side, error)),
        };
        self.end = Some(end);
        end
    }
}
