//! Inspects the bytes of both sides and forwards those that are allowed.

use std::sync::atomic::Ordering::Relaxed;

use palisade_abi::Reason;
use palisade_inspect::{
    Millis, Side,
    record::{Record, Verdict, What},
    stream::StreamAction,
};
use palisade_protocols::{
    http1::{HeaderBuffer, Request},
    http2::PREFACE,
};

use super::{Connection, Cx, Phase, Step, Stop};
use crate::{
    answer,
    end::{EndError, Ending, FOREVER, INPUT},
    failure::{Failure, FailureKind},
    protocol::Protocol,
    settings::Reports,
    stats::{Counters, count},
};

/// Time after which a request looks its flow up even without a removal: an entry that a newer flow of its share has
/// evicted is made again by the next packet, which can find another identity at the peer's address. ms.
const LOOKUP_INTERVAL: Millis = 1_000;

impl Connection {
    /// Receives, inspects and forwards once. Returns whether there was progress.
    pub(super) fn relay(&mut self, cx: &mut Cx<'_>) -> Step {
        if self.client.is_blocked() {
            self.blocked_at = cx.now;
        }
        for side in Side::BOTH {
            let (Some(own), other) = self.ends(side) else {
                continue;
            };
            // The rest of a head cannot arrive while the side is not read.
            if other.is_some_and(|other| other.is_blocked()) {
                own.head_since = own.head_since.map(|_| cx.now);
            }
        }
        // A side counts as blocked while bytes are queued for it, so queued bytes are written first.
        self.flush(cx)?;
        let mut progress = self.receive(Side::Client, cx)?;
        progress |= self.receive(Side::Server, cx)?;
        if matches!(self.phase, Phase::Relay) {
            progress |= self.inspect(cx)?;
        }
        if !matches!(self.phase, Phase::Relay) {
            return Ok(true);
        }
        self.note_wait(cx.now);
        let is_written = self.flush(cx)?;
        let is_ended = |side: Side| match side {
            Side::Client => self.client.is_forwarded,
            Side::Server => self.server.as_ref().is_none_or(|server| server.is_forwarded),
        };
        if is_written && Side::BOTH.into_iter().all(is_ended) {
            return Err(Stop::Close);
        }
        Ok(progress)
    }

    /// Writes the queued bytes of both sides. Returns whether all are written.
    fn flush(&mut self, cx: &mut Cx<'_>) -> Step {
        let client = self.client.flush().map_err(|_| Stop::Reset)?;
        let server = match self.server.as_mut().map(crate::end::End::flush) {
            None => true,
            Some(Ok(is_written)) => is_written,
            Some(Err(error)) => {
                self.server_failed(error, cx)?;
                true
            }
        };
        Ok(client && server)
    }

    fn receive(&mut self, side: Side, cx: &mut Cx<'_>) -> Step {
        let (Some(own), other) = self.ends(side) else {
            return Ok(false);
        };
        if !own.can_receive() || other.as_ref().is_some_and(|other| other.is_blocked()) {
            return Ok(false);
        }
        let before = own.received;
        let result = own.receive_for(cx.bytes, other);
        let counter = match side {
            Side::Client => &cx.counters.bytes_from_clients,
            Side::Server => &cx.counters.bytes_from_servers,
        };
        counter.fetch_add(own.received - before, Relaxed);
        match (result, side) {
            (Ok(progress), _) => Ok(progress),
            (Err(error), Side::Server) => self.server_failed(error, cx),
            (Err(_), Side::Client) => {
                // TLS has queued an alert for the client.
                let _ = own.flush();
                Err(Stop::Reset)
            }
        }
    }

    /// Handles an error of the server's side.
    pub(super) fn server_failed(&mut self, error: EndError, cx: &mut Cx<'_>) -> Step {
        if let Some(server) = &mut self.server {
            // TLS has queued an alert for the server.
            let _ = server.flush();
        }
        let failure = match error {
            EndError::Io(_) => FailureKind::ResponseReset.into(),
            EndError::Tls(error) => Failure::of_tls(&error),
        };
        if self.fail_before_response(failure, cx)? {
            Ok(true)
        } else {
            Err(Stop::Reset)
        }
    }

    /// Answers the first request with 503 if the server has failed before the head of its response. Returns false if
    /// the failure must be passed on to the client instead: a response has begun, or the server has closed an idle
    /// connection.
    fn fail_before_response(&mut self, failure: Failure, cx: &mut Cx<'_>) -> Step {
        if let Protocol::Http2(_) = self.protocol {
            return self.fail_http2(failure, cx);
        }
        let Protocol::Http1(session) = &self.protocol else {
            return Ok(false);
        };
        if self.responded || self.offloaded {
            return Ok(false);
        }
        if !session.awaits_response() {
            // With TLS 1.3, a server refuses the client's certificate only after the handshake. The first request gets
            // the answer.
            if self.requests > 0 || failure.kind == FailureKind::ResponseClosed {
                return Ok(false);
            }
            self.report_failure(&failure, cx);
            self.server = None;
            self.failure = Some(failure);
            return Ok(true);
        }
        let is_head = session.is_head();
        self.answer_failure(failure, is_head, cx)?;
        Ok(true)
    }

    /// Answers a request in the place of the server, which is reset.
    pub(super) fn answer_failure(
        &mut self,
        failure: Failure,
        is_head: bool,
        cx: &mut Cx<'_>,
    ) -> Result<(), Stop> {
        let bytes = answer::unavailable(&failure, is_head);
        self.report_failure(&failure, cx);
        if let Some(server) = &self.server {
            server.reset();
        }
        self.server = None;
        self.failure = Some(failure);
        self.respond(&bytes, cx)
    }

    /// Sends an answer in the server's place, and ends both streams.
    fn respond(&mut self, bytes: &[u8], cx: &Cx<'_>) -> Result<(), Stop> {
        self.client.send(bytes).map_err(|_| Stop::Reset)?;
        self.close_after_answer(cx.now);
        Ok(())
    }

    /// Inspects both sides until neither has further bytes with a verdict.
    fn inspect(&mut self, cx: &mut Cx<'_>) -> Step {
        let mut progress = false;
        let mut again = true;
        while std::mem::take(&mut again) {
            for side in Side::BOTH {
                while matches!(self.phase, Phase::Relay) && self.inspect_once(side, cx)? {
                    again = true;
                    progress = true;
                }
            }
        }
        Ok(progress)
    }

    /// Makes one decision about the bytes of one side. Returns whether a further call can decide about more bytes.
    fn inspect_once(&mut self, side: Side, cx: &mut Cx<'_>) -> Step {
        if side == Side::Client {
            if self.answer.is_some() {
                return self.answer_when_due(cx);
            }
            self.choose_protocol(cx);
            self.check_flow(cx)?;
        }
        if let Protocol::Http2(_) = self.protocol {
            return self.filter(side, cx);
        }
        let (Some(own), other) = self.ends(side) else {
            return Ok(false);
        };
        if own.is_forwarded || (own.input.is_empty() && own.eof.is_none()) {
            return Ok(false);
        }
        if let Some(other) = other
            && !other.has_room()
        {
            match (other.flush(), side) {
                (Ok(true), _) => {}
                (Ok(false), _) => return Ok(false),
                (Err(error), Side::Client) => return self.server_failed(error, cx),
                (Err(_), Side::Server) => return Err(Stop::Reset),
            }
        }
        let action = self.decide(side, cx);
        let (Some(own), _) = self.ends(side) else {
            return Ok(false);
        };
        own.head_since = match action {
            StreamAction::NeedMore if !own.input.is_empty() => own.head_since.or(Some(cx.now)),
            _ => None,
        };
        let available = own.input.len();
        match action {
            StreamAction::NeedMore if available >= INPUT => {
                self.drop_record(Reason::InspectLimit, Reason::InspectLimit.text(), cx);
                Err(Stop::Reset)
            }
            StreamAction::NeedMore | StreamAction::AwaitPeer => Ok(false),
            StreamAction::Forward(0) if available == 0 => self.forward_end(side, cx),
            StreamAction::Forward(n) => {
                self.forward(side, n.min(available), None, cx)?;
                Ok(n > 0)
            }
            StreamAction::ForwardHead {
                consumed,
                replacement,
            } => {
                self.forward(side, consumed.min(available), Some(&replacement), cx)?;
                Ok(true)
            }
            StreamAction::Bypass(n) => {
                let now = n.min(available as u64);
                own.bypass = if n == FOREVER { n } else { n - now };
                self.forward(side, now as usize, None, cx)?;
                Ok(n > 0)
            }
            StreamAction::Offload => {
                self.offloaded = true;
                self.stop_inspection();
                Ok(true)
            }
            StreamAction::Abort(_) => {
                // No byte of an incomplete response head was forwarded, so the client can still get a 503.
                let is_cut = side == Side::Server && own.eof.is_some();
                if is_cut && self.fail_before_response(FailureKind::ResponseClosed.into(), cx)? {
                    return Ok(true);
                }
                Err(Stop::Reset)
            }
            StreamAction::Respond(_, bytes) => {
                self.answer = Some(bytes);
                Ok(true)
            }
        }
    }

    /// Returns the decision about the bytes of one side, or about the end of its stream if there are no bytes.
    fn decide(&mut self, side: Side, cx: &mut Cx<'_>) -> StreamAction {
        let own = match (side, &self.server) {
            (Side::Server, Some(server)) => server,
            _ => &self.client,
        };
        let bytes = own.input.bytes();
        let is_ended = own.eof.is_some();
        if own.bypass > 0 {
            return if bytes.is_empty() {
                StreamAction::Forward(0)
            } else {
                StreamAction::Bypass(own.bypass)
            };
        }
        let session = match &mut self.protocol {
            Protocol::Bytes => return StreamAction::Forward(bytes.len()),
            Protocol::Unknown if is_ended => return StreamAction::Abort(Reason::AppMalformed),
            Protocol::Unknown => return StreamAction::NeedMore,
            Protocol::Http1(session) => session,
            Protocol::Http2(_) => return StreamAction::Abort(Reason::AppMalformed),
        };
        let (counters, reports, requests) = (cx.counters, cx.reports, &mut self.requests);
        let mut record = |record: &Record| note(record, requests, counters, reports);
        session.read(
            side,
            bytes,
            is_ended,
            cx.now,
            &self.context.request,
            &cx.settings.rules,
            &cx.settings.http,
            &mut cx.scratch.stream,
            &mut record,
        )
    }

    /// Forwards all further bytes of both sides without inspection.
    pub(super) fn stop_inspection(&mut self) {
        self.client.bypass = FOREVER;
        if let Some(server) = &mut self.server {
            server.bypass = FOREVER;
        }
    }

    /// Sends the answer in the server's place once the response before it is complete.
    fn answer_when_due(&mut self, cx: &Cx<'_>) -> Step {
        if let Some(server) = &self.server {
            if server.is_forwarded {
                // The client has the end of the stream, and nothing can follow.
                self.answer = None;
                self.close_after_answer(cx.now);
                return Ok(true);
            }
            let is_due = match &self.protocol {
                Protocol::Http1(session) => session.awaits_last_only(),
                _ => true,
            };
            if server.bypass > 0 || !is_due {
                return Ok(false);
            }
        }
        let Some(answer) = self.answer.take() else {
            return Ok(false);
        };
        self.respond(&answer, cx)?;
        Ok(true)
    }

    /// Decides about the version of HTTP of a client without TLS.
    fn choose_protocol(&mut self, cx: &Cx<'_>) {
        let bytes = self.client.input.bytes();
        if !matches!(self.protocol, Protocol::Unknown) || bytes.is_empty() {
            return;
        }
        let is_secure = self.set.originating_tls.is_some();
        if bytes.starts_with(PREFACE) {
            self.protocol = Protocol::http2(&cx.settings, is_secure);
        } else if !PREFACE.starts_with(bytes) {
            self.protocol = Protocol::http1(&self.context, is_secure);
        }
    }

    /// Checks when the first bytes of a request have arrived that the flow still exists, so that the rules in force decide
    /// about the request. After a change of policies the thread has looked up all flows before it handles events. A flow
    /// that the programs have not evaluated since is looked up for each request.
    fn check_flow(&mut self, cx: &mut Cx<'_>) -> Result<(), Stop> {
        let Protocol::Http1(session) = &self.protocol else {
            return Ok(());
        };
        let is_at_request = session.is_at_request() && self.client.bypass == 0;
        if !is_at_request || self.offloaded {
            self.checked = false;
        } else if !self.checked && !self.client.input.is_empty() {
            let is_known = self.removals == Some(cx.flows.removals());
            if !is_known || cx.now.saturating_sub(self.found_at) >= LOOKUP_INTERVAL {
                self.find(cx)?;
            }
            self.checked = true;
        }
        Ok(())
    }

    /// Applies a change of the policy to tunnels and offloaded connections.
    pub(super) fn recheck_protocol(&mut self, cx: &mut Cx<'_>) -> Result<(), Stop> {
        self.recheck_filter(cx)?;
        match &self.protocol {
            Protocol::Http1(session) if self.offloaded => session
                .may_stay_offloaded(&self.context.request)
                .map_err(|_| Stop::Reset),
            _ => Ok(()),
        }
    }

    /// Forwards the first `n` bytes of a side, which are allowed. A request to a server that cannot be reached is
    /// answered instead. `replacement`: bytes to send in place of these bytes.
    fn forward(
        &mut self,
        side: Side,
        n: usize,
        replacement: Option<&[u8]>,
        cx: &mut Cx<'_>,
    ) -> Result<(), Stop> {
        if side == Side::Client {
            if let (Some(failure), Protocol::Http1(session)) = (&self.failure, &self.protocol) {
                let bytes = answer::unavailable(failure, session.is_head());
                return self.respond(&bytes, cx);
            }
            if self.is_misdirected(n) {
                let what = What::Unreadable {
                    detail: "request for another host than that of the TLS connection",
                };
                let record = self.context.record(Verdict::Dropped, Reason::AppDenied, what);
                cx.reports.record(&record);
                self.answer = Some(answer::MISDIRECTED.to_vec());
                return Ok(());
            }
            self.checked = false;
        } else if n > 0 {
            self.responded = true;
            // An interim response (1xx) begins the wait again.
            self.waits_since = None;
        }
        let (Some(own), Some(other)) = self.ends(side) else {
            return Err(Stop::Reset);
        };
        let bytes = own.input.bytes().get(..n).unwrap_or_default();
        let sent = other.send(replacement.unwrap_or(bytes));
        own.input.consume(n);
        match (sent, side) {
            (Ok(()), _) => Ok(()),
            (Err(error), Side::Client) => self.server_failed(error, cx).map(|_| ()),
            (Err(_), Side::Server) => Err(Stop::Reset),
        }
    }

    /// Returns whether a request of a client without TLS is for another host than the one whose certificate was checked.
    /// `n`: length of the request's head, if the bytes begin with one.
    fn is_misdirected(&self, n: usize) -> bool {
        if self.set.originating_tls.is_none() || self.set.terminating_tls.is_some() || !self.checked {
            return false;
        }
        let head = self.client.input.bytes().get(..n).unwrap_or_default();
        Request::parse(head, &mut HeaderBuffer::new())
            .is_ok_and(|request| self.name_of(request.host) != self.name)
    }

    /// Forwards the end of a stream as it has arrived: with or without close_notify.
    pub(super) fn forward_end(&mut self, side: Side, cx: &mut Cx<'_>) -> Step {
        if side == Side::Server && self.fail_before_response(FailureKind::ResponseClosed.into(), cx)? {
            return Ok(true);
        }
        let (Some(own), Some(other)) = self.ends(side) else {
            // Without a server, the client has closed before its first request.
            return Err(Stop::Close);
        };
        let ending = own.eof.unwrap_or(Ending::Truncated);
        // Without TLS, a FIN would look like a clean end.
        if ending == Ending::Truncated && other.tls.is_none() {
            return Err(Stop::Reset);
        }
        other.finish(ending);
        own.is_forwarded = true;
        Ok(true)
    }
}

/// Counts and reports a record of an inspector.
pub(super) fn note(record: &Record, requests: &mut u64, counters: &Counters, reports: &dyn Reports) {
    if let What::HttpRequest { .. } = record.what {
        *requests += 1;
        count(&counters.requests);
        if record.verdict == Verdict::Dropped {
            count(&counters.denied);
        }
    }
    reports.record(record);
}
