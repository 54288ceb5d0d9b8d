//! Deadlines of an open connection: responses that do not begin, heads that do not end, and idle connections.

use palisade_abi::Reason;
use palisade_inspect::{Millis, Side, http2::LateAnswer};

use super::{Connection, Cx, Step, Stop, after};
use crate::{
    answer,
    failure::{Failure, FailureKind},
    protocol::Protocol,
    settings::Options,
    stats::count,
};

impl Connection {
    /// Notes whether a whole HTTP/1 request waits for the head of its response.
    pub(super) fn note_wait(&mut self, now: Millis) {
        if self.awaits_head() {
            self.waits_since.get_or_insert(now);
        } else {
            self.waits_since = None;
        }
    }

    /// Returns whether the server has a whole HTTP/1 request, and no byte of the head of its response was forwarded.
    fn awaits_head(&self) -> bool {
        let is_within_body = self.client.bypass > 0;
        let Some(server) = &self.server else {
            return false;
        };
        match &self.protocol {
            Protocol::Http1(session) => {
                !self.offloaded && server.bypass == 0 && session.awaits_head(is_within_body)
            }
            _ => false,
        }
    }

    /// Returns the time at which a request is answered because its response has not begun, ms. While bytes wait for the
    /// client, no response is read, so that time does not count.
    pub(super) fn response_deadline(&self, options: &Options) -> Millis {
        if options.response.is_zero() || self.server.is_none() || self.client.is_blocked() {
            return Millis::MAX;
        }
        let since = match &self.protocol {
            Protocol::Http1(_) => self.waits_since,
            // Without the server's SETTINGS, the answer can still begin with those of the proxy.
            Protocol::Http2(http2) => http2.filter.waits_since(),
            Protocol::Bytes | Protocol::Unknown => None,
        };
        since.map_or(Millis::MAX, |since| {
            after(since.max(self.blocked_at), options.response)
        })
    }

    /// Handles a deadline of an open connection.
    ///
    /// # Errors
    /// [`Stop`] if both sides must be reset.
    pub(super) fn expire_relay(&mut self, cx: &mut Cx<'_>) -> Result<(), Stop> {
        let options = cx.options;
        if self.response_deadline(options) <= cx.now {
            let detail = format!("no head of a response within {:?}", options.response);
            let failure = Failure::new(FailureKind::ResponseTimeout, detail);
            return self.answer_overdue(failure, cx);
        }
        let is_due = |since: Millis| after(since, options.head) <= cx.now;
        if self.head_since().is_some_and(is_due) || (self.is_within_frame() && is_due(self.active)) {
            count(&cx.counters.timeouts);
            let of_server = self.server.as_ref().and_then(|server| server.head_since);
            if of_server.is_some_and(is_due) && self.answer_incomplete(cx)? {
                return Ok(());
            }
            self.drop_record(Reason::InspectDeadline, Reason::InspectDeadline.text(), cx);
            return Err(Stop::Reset);
        }
        self.end_idle(cx)
    }

    /// Answers the requests without a response because the server's frame or head did not end in time. Returns false if
    /// there are none.
    fn answer_incomplete(&mut self, cx: &mut Cx<'_>) -> Step {
        let head = cx.options.head;
        let failed = |what: &str| {
            let detail = format!("the {what} did not end within {head:?}");
            Failure::new(FailureKind::ResponseTimeout, detail)
        };
        match &self.protocol {
            Protocol::Http1(session) if self.awaits_head() => {
                let is_head = session.is_head();
                self.answer_failure(failed("head of the response"), is_head, cx)?;
                Ok(true)
            }
            Protocol::Http2(_) => self.fail_http2(failed("frame of the server"), cx),
            _ => Ok(false),
        }
    }

    /// Answers the requests whose responses have not begun in time.
    fn answer_overdue(&mut self, failure: Failure, cx: &mut Cx<'_>) -> Result<(), Stop> {
        let http2 = match &mut self.protocol {
            Protocol::Http1(session) => {
                let is_head = session.is_head();
                count(&cx.counters.timeouts);
                return self.answer_failure(failure, is_head, cx);
            }
            Protocol::Http2(http2) => http2,
            Protocol::Bytes | Protocol::Unknown => return Err(Stop::Reset),
        };
        if !http2.filter.has_server_begun() {
            count(&cx.counters.timeouts);
            return if self.fail_http2(failure, cx)? {
                Ok(())
            } else {
                Err(Stop::Reset)
            };
        }
        let response = u64::try_from(cx.options.response.as_millis()).unwrap_or(u64::MAX);
        let mut output = std::mem::take(&mut cx.scratch.output);
        let (error, body) = (answer::header(&failure), answer::body(&failure));
        let late = LateAnswer {
            status: failure.status().0,
            grpc_status: failure.grpc_status(),
            error: &error,
            body: &body,
        };
        let before = cx.now.saturating_sub(response);
        let number = http2
            .filter
            .answer_overdue(before, &late, &mut cx.scratch.buffers, &mut output);
        for _ in 0..number {
            self.report_failure(&failure, cx);
        }
        self.deliver(output, cx)
    }

    /// Ends an idle connection. A message or a tunnel that is cut is recorded; the end of a connection between its messages
    /// needs no record.
    fn end_idle(&mut self, cx: &mut Cx<'_>) -> Result<(), Stop> {
        count(&cx.counters.timeouts);
        let idle = cx.options.idle;
        let is_answered = self.is_answered() || self.server.is_none();
        if is_answered {
            return Err(Stop::Reset);
        }
        if self.client.is_blocked() {
            self.drop_record(
                Reason::InspectDeadline,
                "the client does not take the response",
                cx,
            );
            return Err(Stop::Reset);
        }
        let detail = format!("no byte within {idle:?}");
        let stalled = Failure::new(FailureKind::ResponseStalled, &detail);
        let timeout = Failure::new(FailureKind::ResponseTimeout, &detail);
        let server_bypass = self.server.as_ref().map_or(0, |server| server.bypass);
        match &self.protocol {
            Protocol::Http1(_) if self.offloaded => {
                self.drop_record(Reason::InspectDeadline, "no byte of the tunnel in time", cx);
            }
            Protocol::Http1(session) => {
                if session.is_within(Side::Server) || server_bypass > 0 {
                    self.report_failure(&stalled, cx);
                } else if session.awaits_response() && (self.awaits_head() || self.is_blocked(Side::Server)) {
                    let is_head = session.is_head();
                    return self.answer_failure(timeout, is_head, cx);
                } else if session.is_within(Side::Client) || self.client.bypass > 0 {
                    self.drop_record(Reason::InspectDeadline, "stream stops within a request", cx);
                }
            }
            Protocol::Http2(http2) => {
                let streams = http2.filter.streams();
                let is_unanswered = !http2.filter.unanswered().is_empty();
                if is_unanswered && self.fail_http2(timeout, cx)? {
                    return Ok(());
                }
                if streams > 0 {
                    self.report_failure(&stalled, cx);
                }
            }
            Protocol::Bytes => {
                self.drop_record(Reason::InspectDeadline, "no byte of the connection in time", cx);
            }
            Protocol::Unknown => {}
        }
        Err(Stop::Reset)
    }
}
