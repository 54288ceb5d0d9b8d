//! HTTP/2: all bytes of both sides pass a filter, which can add frames for either side.

use palisade_abi::Reason;
use palisade_inspect::{
    Side,
    http2::{Context, Output},
    record::Record,
};

use super::{Connection, Cx, Step, Stop};
use crate::{
    end::Ending,
    failure::{Failure, FailureKind},
    protocol::{Http2, Protocol},
    unavailable::Unavailable,
};

/// Number of bytes that may wait for a client while its requests are read.
const BACKLOG: usize = 256 << 10;

impl Connection {
    /// Filters the bytes of one side that have arrived. Returns whether there were bytes or the end of the stream.
    pub(super) fn filter(&mut self, side: Side, cx: &mut Cx<'_>) -> Step {
        if self.server.is_none() && self.failure.is_none() {
            return Err(Stop::Reset);
        }
        let (Some(own), other) = self.ends(side) else {
            return Ok(false);
        };
        if own.is_forwarded || (own.input.is_empty() && own.eof.is_none()) {
            return Ok(false);
        }
        if other.is_some_and(|other| other.is_blocked()) {
            return Ok(false);
        }
        // The filter can generate frames for the peer that has sent the bytes. Some peers read only after they have
        // written, so bytes that wait for a peer must not stop the processing of bytes from that peer. Bytes of the
        // server cause at most one GOAWAY for the server, but each request of the client can cause a response.
        if side == Side::Client && own.is_blocked() && own.pending().map_err(|_| Stop::Reset)? > BACKLOG {
            return Ok(false);
        }
        if own.input.is_empty() {
            return self.forward_end(side, cx);
        }
        let input = std::mem::take(&mut own.input);
        if side == Side::Client {
            self.find_or_leave(cx)?;
        } else {
            self.responded = true;
        }
        let mut output = std::mem::take(&mut cx.scratch.output);
        let before = self.incomplete(side);
        let result = self.run_filter(side, input.bytes(), &mut output, cx);
        let after = self.incomplete(side);
        if let (Some(own), _) = self.ends(side) {
            own.head_since = match after {
                0 => None,
                // All bytes belong to what was incomplete before. A trickle of bytes does not extend the deadline.
                _ if after >= before + input.len() => own.head_since.or(Some(cx.now)),
                _ => Some(cx.now),
            };
        }
        let ended = match result {
            Some(is_ended) => is_ended,
            None => return Err(Stop::Reset),
        };
        self.deliver(output, cx)?;
        if ended {
            self.close_after_answer(cx.now);
        }
        Ok(true)
    }

    /// Returns the number of bytes of a side that belong to an incomplete preface, frame or header block.
    fn incomplete(&self, side: Side) -> usize {
        match &self.protocol {
            Protocol::Http2(http2) => http2.filter.incomplete(side),
            _ => 0,
        }
    }

    /// Passes bytes to the filter. If the server cannot be reached, the filter's output for the server goes to
    /// `Unavailable`, which responds in the server's place. Returns whether the connection ends; `None` if there is no
    /// filter.
    fn run_filter(&mut self, side: Side, bytes: &[u8], out: &mut Output, cx: &mut Cx<'_>) -> Option<bool> {
        let Protocol::Http2(http2) = &mut self.protocol else {
            return None;
        };
        let Http2 { filter, unavailable } = &mut **http2;
        let (counters, reports, requests) = (cx.counters, cx.reports, &mut self.requests);
        let mut record = |record: &Record| super::relay::note(record, requests, counters, reports);
        let scratch = &mut *cx.scratch;
        let mut context = Context {
            now: cx.now,
            rules: &cx.settings.rules,
            stream: &self.context,
            scratch: &mut scratch.stream.http,
            buffers: &mut scratch.buffers,
            stats: &mut scratch.http2,
            record: &mut record,
        };
        let result = match side {
            Side::Client => filter.client(bytes, &mut context, out),
            Side::Server => filter.server(bytes, &mut context, out),
        };
        let mut is_ended = result.is_err();
        if let (Some(failure), None) = (&self.failure, &self.server) {
            let server = unavailable.get_or_insert_with(Unavailable::new);
            let mut answers = Vec::new();
            let served = server.serve(&out.to_server, filter.room(), failure, &mut answers);
            out.to_server.clear();
            is_ended |= served.is_err() || filter.server(&answers, &mut context, out).is_err();
            if server.has_answered() && filter.streams() == 0 {
                // All requests are answered, and the client can open another connection for further requests.
                filter.goaway(failure.reason(), out);
                is_ended = true;
            }
            out.to_server.clear();
        }
        Some(is_ended)
    }

    /// Answers all requests that have no response with 503 or 504, because the server has failed. Returns false if the
    /// failure must be passed on to the client instead: there is no such request, or the server has closed the connection
    /// (its GOAWAY names the last stream that it has processed).
    pub(super) fn fail_http2(&mut self, failure: Failure, cx: &mut Cx<'_>) -> Step {
        let Protocol::Http2(http2) = &mut self.protocol else {
            return Ok(false);
        };
        if failure.kind == FailureKind::ResponseClosed {
            return Ok(false);
        }
        let streams = http2.filter.unanswered();
        let is_first = self.requests == 0 && !self.responded;
        if streams.is_empty() && !is_first {
            return Ok(false);
        }
        // A response that has begun cannot be completed, so the client must see the end of the connection.
        let is_cut = http2.filter.streams() > streams.len();
        let mut output = std::mem::take(&mut cx.scratch.output);
        http2.filter.leave_server(&mut output);
        let mut answers = Vec::new();
        if !streams.is_empty() {
            let room = http2.filter.room();
            http2.unavailable = Some(Unavailable::resume(&streams, room, &failure, &mut answers));
        }
        if failure.kind == FailureKind::ResponseTimeout {
            self.leave_server(&output.to_server);
        }
        output.to_server.clear();
        self.report_failure(&failure, cx);
        self.server = None;
        self.failure = Some(failure);
        if streams.is_empty() {
            cx.scratch.output = output;
            // The first request gets the answer.
            return Ok(true);
        }
        let result = self.run_filter(Side::Server, &answers, &mut output, cx);
        self.deliver(output, cx)?;
        if result.ok_or(Stop::Reset)? || is_cut {
            self.close_after_answer(cx.now);
        }
        Ok(true)
    }

    /// Sends the last bytes to a server that is late, which has the connection still open. A server that does not take
    /// them at once gets a reset.
    fn leave_server(&mut self, bytes: &[u8]) {
        let Some(server) = &mut self.server else {
            return;
        };
        let sent = server.send(bytes);
        server.finish(Ending::Clean);
        if sent.is_err() || !server.flush().unwrap_or(false) {
            server.reset();
        }
    }

    /// Sends the output of the filter to both sides, and puts its buffers back for the next call.
    pub(super) fn deliver(&mut self, mut output: Output, cx: &mut Cx<'_>) -> Result<(), Stop> {
        if !output.to_client.is_empty() {
            self.client.send(&output.to_client).map_err(|_| Stop::Reset)?;
        }
        if let Some(server) = &mut self.server
            && !output.to_server.is_empty()
            && let Err(error) = server.send(&output.to_server)
        {
            self.server_failed(error, cx)?;
        }
        output.to_client.clear();
        output.to_server.clear();
        cx.scratch.output = output;
        Ok(())
    }

    /// Looks the flow up. If it is no longer intercepted, the peers get a GOAWAY before the connection ends.
    fn find_or_leave(&mut self, cx: &mut Cx<'_>) -> Result<(), Stop> {
        if self.find(cx).is_ok() {
            return Ok(());
        }
        self.say_goaway(cx)?;
        Err(Stop::Close)
    }

    /// Sends a GOAWAY to both peers, if they can still take it.
    pub(super) fn say_goaway(&mut self, cx: &mut Cx<'_>) -> Result<(), Stop> {
        let mut output = std::mem::take(&mut cx.scratch.output);
        if let Protocol::Http2(http2) = &mut self.protocol {
            http2.filter.goaway(Reason::TcpMidstream, &mut output);
        }
        self.deliver(output, cx)?;
        self.client.finish(Ending::Clean);
        let _ = self.client.flush();
        if let Some(server) = &mut self.server {
            server.finish(Ending::Clean);
            let _ = server.flush();
        }
        Ok(())
    }

    /// Applies a change of the policy to tunnels.
    pub(super) fn recheck_filter(&mut self, cx: &mut Cx<'_>) -> Result<(), Stop> {
        let Protocol::Http2(http2) = &mut self.protocol else {
            return Ok(());
        };
        let mut output = std::mem::take(&mut cx.scratch.output);
        let scratch = &mut *cx.scratch;
        let reports = cx.reports;
        let mut record = |record: &Record| reports.record(record);
        let mut context = Context {
            now: cx.now,
            rules: &cx.settings.rules,
            stream: &self.context,
            scratch: &mut scratch.stream.http,
            buffers: &mut scratch.buffers,
            stats: &mut scratch.http2,
            record: &mut record,
        };
        http2.filter.recheck(&mut context, &mut output);
        self.deliver(output, cx)
    }
}
