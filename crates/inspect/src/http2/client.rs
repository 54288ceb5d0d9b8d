//! Frames of the client: requests get their verdict, and their header blocks are encoded again.

use std::mem;

use palisade_abi::Reason;
use palisade_protocols::{
    http1::Request,
    http2::{
        ErrorCode, FieldBuffer, Fields, FrameHeader, ParseError, Piece, RequestHead, Settings, encode, flags,
        fragment_of, headers_of, kind, request, trailers,
    },
};

use super::{
    connection::{Connection, OpenBlock, RESERVE},
    context::{Buffers, Context, Output},
    respond::Refusal,
    settings,
    streams::{Report, Stream, Tunnel},
};
use crate::{
    Side,
    http::{has_refused_body, may_become, redact},
    record::{Record, Text, Verdict, What, Word},
    rules::{HeaderEdit, HttpDenial, HttpVerdict},
    steps::{self, Detail},
};

/// Maximum length of a generated frame, bytes: the value that every peer accepts.
pub(super) const GENERATED_FRAME: usize = 16_384;

impl Connection {
    /// Handles the next part of the client's bytes.
    pub(super) fn client_piece(
        &mut self,
        piece: Piece<'_>,
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        self.client.check_order(&piece)?;
        match piece {
            Piece::Content { bytes, .. } => {
                if let Some(id) = self.content(Side::Client, bytes, out) {
                    self.client_ends(id, cx);
                }
                Ok(())
            }
            Piece::Data {
                header,
                padding,
                rest,
            } => self.client_data(header, padding, rest, cx, out),
            Piece::Unknown(_) => self.client.control(cx.now),
            Piece::Frame(header, payload) => match header.kind {
                kind::HEADERS => self.client_headers(header, payload, cx, out),
                kind::CONTINUATION => {
                    self.client.continue_block(payload, self.limits.block, cx.now)?;
                    self.client_block(header.has(flags::END_HEADERS), cx, out)
                }
                kind::SETTINGS => self.settings_of(Side::Client, header, payload, cx, out),
                kind::PUSH_PROMISE => Err(ParseError::Push),
                kind::RST_STREAM => self.client_reset(header, payload, cx, out),
                _ => self.client_control(header, payload, cx, out),
            },
        }
    }

    fn client_data(
        &mut self,
        header: FrameHeader,
        padding: Option<u8>,
        rest: u32,
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        let id = header.stream;
        if id == 0 {
            return Err(ParseError::FrameStream);
        }
        if self.streams.is_idle(id) {
            return Err(ParseError::IdleStream);
        }
        self.client.take_window(header.length)?;
        let content = rest.saturating_sub(padding.unwrap_or(0).into());
        let ends = header.has(flags::END_STREAM);
        if content > 0 {
            self.credit();
        } else if !ends {
            self.client.control(cx.now)?;
        }
        let error = match self.streams.open.get_mut(&id) {
            Some(stream) if !stream.client_open => ParseError::ClosedStream,
            Some(stream) => {
                let left = stream.left.map(|left| left.checked_sub(content.into()));
                match left {
                    // If the content differed from its announced length, a server that translates the request to
                    // HTTP/1 could read a part of it as the next request.
                    Some(None) => ParseError::ContentLength,
                    Some(Some(1..)) if ends => ParseError::ContentLength,
                    _ => {
                        stream.left = left.flatten();
                        let is_forwarded = self.forward_data(Side::Client, header, padding, rest, out);
                        if ends && is_forwarded {
                            self.client_ends(id, cx);
                        }
                        return Ok(());
                    }
                }
            }
            None => {
                self.drop_data(header.length, out);
                return match self.streams.count_drained(id, header.length) {
                    Some(may_continue) => {
                        self.drain_data(header, may_continue, out);
                        Ok(())
                    }
                    None => self.client_frame_on_closed(id, cx, out),
                };
            }
        };
        self.drop_data(header.length, out);
        self.fail_stream(id, error, cx, out)
    }

    /// Handles the end of the client's side of a stream, which was forwarded.
    fn client_ends(&mut self, id: u32, cx: &mut Context<'_>) {
        match self.streams.open.get_mut(&id) {
            Some(stream) => stream.client_open = false,
            None => self.streams.close_by_client(id),
        }
        self.streams.begin_wait(id, cx.now);
        self.end_stream(id, cx);
    }

    /// Drops a DATA frame. The server never sees the frame, so the filter returns its part of the connection window to
    /// the client.
    fn drop_data(&mut self, length: u32, out: &mut Output) {
        if length > 0 {
            self.client.window += i64::from(length);
            FrameHeader::window_update(0, length, self.client_out(out));
        }
    }

    /// Lets the client send the rest of a refused request. Some clients (curl 7.88, httpx) lose the response if the
    /// stream is reset, and others wait if the window of the stream is used up.
    fn drain_data(&mut self, header: FrameHeader, may_continue: bool, out: &mut Output) {
        let id = header.stream;
        if header.has(flags::END_STREAM) {
            self.streams.end_drain(id, true);
        } else if !may_continue {
            // The client need not send the rest of the request (RFC 9113, 8.1).
            FrameHeader::rst_stream(id, ErrorCode::NoError, self.client_out(out));
            self.streams.end_drain(id, false);
        } else if header.length > 0 {
            FrameHeader::window_update(id, header.length, self.client_out(out));
        }
    }

    /// Handles DATA on a closed stream. The frame is no error if the filter has refused the stream or the server has
    /// reset it: the client can have sent the frame before it learned of this.
    fn client_frame_on_closed(
        &mut self,
        id: u32,
        cx: &Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        if self.streams.closed(id).is_none_or(|closed| closed.by_client) {
            self.client.control(cx.now)?;
            FrameHeader::rst_stream(id, ErrorCode::StreamClosed, self.client_out(out));
        }
        Ok(())
    }

    /// Resets a stream on which the client has sent a frame that is not allowed.
    pub(super) fn fail_stream(
        &mut self,
        id: u32,
        error: ParseError,
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        self.reset(id, error.code(), out);
        cx.refuse(error, Verdict::Dropped);
        self.count_denial(cx)
    }

    fn client_headers(
        &mut self,
        header: FrameHeader,
        payload: &[u8],
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        let id = header.stream;
        if id.is_multiple_of(2) {
            return Err(if id == 0 {
                ParseError::FrameStream
            } else {
                ParseError::StreamId
            });
        }
        let (priority, fragment) = fragment_of(header, payload)?;
        if priority.is_some_and(|priority| dependency(&priority) == Some(id)) {
            return Err(ParseError::Dependency);
        }
        let end_stream = header.has(flags::END_STREAM);
        self.client.begin_block(header, end_stream, priority, fragment);
        self.client_block(header.has(flags::END_HEADERS), cx, out)
    }

    /// Handles the header block once it is complete.
    fn client_block(
        &mut self,
        complete: bool,
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        if !complete {
            return Ok(());
        }
        let Some(open) = self.client.open.take() else {
            return Err(ParseError::Continuation);
        };
        let mut buffers = mem::take(cx.buffers);
        let result = self.client_fields(open, &mut buffers, cx, out);
        *cx.buffers = buffers;
        self.client.end_block();
        result
    }

    fn client_fields(
        &mut self,
        open: OpenBlock,
        buffers: &mut Buffers,
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        let Buffers {
            fields,
            cookie,
            block,
        } = buffers;
        let updates = self
            .requests
            .decode(&self.client.block, self.limits.head.block, fields)?;
        self.updates.merge(updates);
        let id = open.stream;
        if self.streams.end_drain(id, open.end_stream) {
            if !open.end_stream {
                FrameHeader::rst_stream(id, ErrorCode::ProtocolError, self.client_out(out));
            }
            return Ok(());
        }
        if !self.streams.is_idle(id) {
            return match self.streams.open.get(&id) {
                Some(stream) if stream.client_open => self.client_trailers(open, fields, block, cx, out),
                Some(_) => self.fail_stream(id, ParseError::ClosedStream, cx, out),
                None => match self.streams.closed(id) {
                    Some(closed) if !closed.by_client => self.client.control(cx.now),
                    Some(_) => Err(ParseError::ClosedStream),
                    None => Err(ParseError::StreamId),
                },
            };
        }
        self.streams.last = id;
        self.credit();
        if self.streams.open.len() >= self.limits.streams as usize {
            cx.refuse(ParseError::TooManyStreams, Verdict::Dropped);
            self.refuse_stream(id, ErrorCode::RefusedStream, open.end_stream, out);
            return self.count_denial(cx);
        }
        if let Some(error) = self.exceeded(fields) {
            cx.refuse(error, Verdict::Dropped);
            return self.respond(open, Refusal::of_error(error), block, cx, out);
        }
        let mut buffer = FieldBuffer::new();
        let checked =
            request(fields, open.end_stream, cookie, &mut buffer).and_then(|head| match head.protocol {
                Some(protocol) if !may_become(protocol.as_bytes()) => Err(ParseError::Protocol),
                _ => Ok(head),
            });
        match checked {
            Ok(head) => self.client_request(open, &head, fields, block, cx, out),
            Err(error) if cx.stream.is_audit() => {
                cx.stats.audited += 1;
                cx.refuse(error, Verdict::Audit);
                let report = self.report_of(fields, cx);
                self.forward_block(open, fields, &[], block, out);
                let is_connect = fields.value(b":method") == Some(b"CONNECT");
                let tunnel = Tunnel {
                    ruleset: cx.request().ruleset,
                    audit: true,
                };
                self.open_stream(open, report, None, is_connect.then_some(tunnel));
                Ok(())
            }
            Err(error) => {
                cx.refuse(error, Verdict::Dropped);
                self.refuse_stream(id, error.code(), open.end_stream, out);
                self.count_denial(cx)
            }
        }
    }

    /// Returns the limit of a request head that the fields exceed.
    fn exceeded(&self, fields: &Fields) -> Option<ParseError> {
        if fields.is_truncated() {
            return Some(ParseError::ListTooLong);
        }
        let line = self.limits.head.line;
        fields.iter().find_map(|(name, value, _)| {
            if name.len() + value.len() < line {
                return None;
            }
            Some(if name == b":path" {
                ParseError::PathTooLong
            } else {
                ParseError::ListTooLong
            })
        })
    }

    /// Evaluates a well-formed request.
    fn client_request(
        &mut self,
        open: OpenBlock,
        head: &RequestHead<'_>,
        fields: &Fields,
        block: &mut Vec<u8>,
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        let request = &head.request;
        cx.stats.requests += 1;
        let mut url = Text::default();
        let scheme = if self.secure { "https" } else { "http" };
        redact::url(scheme, request.host, request.path, &mut url);
        let is_audit = cx.stream.is_audit();
        let refusal = Refusal::denied(head);
        let rules = cx.rules;
        let Some(rules) = rules.http(cx.request().ruleset) else {
            self.report_request(request, Err(Reason::UnknownRuleset), url, cx);
            return self.respond(open, refusal, block, cx, out);
        };
        let verdict = rules.evaluate(request, self.limits.paths, cx.scratch);
        if steps::is_on(Detail::Debug) {
            let set = cx.rules.source(cx.request().ruleset);
            rules.explain(request, &cx.stream.about(), set, cx.scratch);
        }
        let reported = verdict.map_err(HttpDenial::reason);
        self.report_request(request, reported, url, cx);
        if reported.is_err() {
            cx.stats.denied += 1;
            if !is_audit {
                return self.respond(open, refusal, block, cx, out);
            }
            cx.stats.audited += 1;
        }
        if has_refused_body(request, verdict, self.limits.get_bodies) {
            if !is_audit {
                cx.refuse(ParseError::UnexpectedBody, Verdict::Dropped);
                return self.respond(
                    open,
                    Refusal::of_error(ParseError::UnexpectedBody),
                    block,
                    cx,
                    out,
                );
            }
            cx.stats.audited += 1;
            cx.refuse(ParseError::UnexpectedBody, Verdict::Audit);
        }
        let report = Report {
            method: Word::from(request.method.as_bytes()),
            url,
            since: cx.now,
            grpc: head.is_grpc,
            status: None,
        };
        let left = match request.body {
            palisade_protocols::http1::Body::Length(length) => Some(length),
            _ => None,
        };
        let tunnel = Tunnel {
            ruleset: cx.request().ruleset,
            audit: reported.is_err(),
        };
        let tunnel = (request.method == "CONNECT").then_some(tunnel);
        self.forward_block(open, fields, cx.scratch.edits(), block, out);
        self.open_stream(open, report, left, tunnel);
        Ok(())
    }

    /// Returns the report of a malformed request that audit mode forwards.
    fn report_of(&self, fields: &Fields, cx: &Context<'_>) -> Report {
        Report {
            method: Word::from(fields.value(b":method").unwrap_or_default()),
            url: Text::default(),
            since: cx.now,
            grpc: false,
            status: None,
        }
    }

    /// Adds a stream whose request was forwarded. `left`: Content-Length, bytes.
    fn open_stream(&mut self, open: OpenBlock, report: Report, left: Option<u64>, tunnel: Option<Tunnel>) {
        let since = report.since;
        self.streams.open.insert(
            open.stream,
            Stream {
                client_open: !open.end_stream,
                server_open: true,
                left,
                responded: false,
                report: Some(report),
                tunnel,
                since,
            },
        );
        self.streams.begin_wait(open.stream, since);
    }

    /// Encodes fields without a dynamic table, with the changes of the rule that allows the request, and forwards them.
    fn forward_block(
        &mut self,
        open: OpenBlock,
        fields: &Fields,
        edits: &[HeaderEdit],
        block: &mut Vec<u8>,
        out: &mut Output,
    ) {
        block.clear();
        encode::size_updates(mem::take(&mut self.updates), block);
        for (name, value, sensitive) in fields.iter() {
            if !removes(edits, name) {
                encode::field(name, value, sensitive, block);
            }
        }
        for (place, edit) in edits.iter().enumerate() {
            let later = edits.get(place + 1..).unwrap_or_default();
            if let HeaderEdit::Add(name, value) | HeaderEdit::Set(name, value) = edit
                && !removes(later, name.as_bytes())
            {
                // The value can be a secret, which no dynamic table of a later hop must contain (RFC 7541, 7.1.3).
                encode::field(name.as_bytes(), value.reveal(), true, block);
            }
        }
        headers_of(
            open.stream,
            open.end_stream,
            open.priority,
            block,
            GENERATED_FRAME,
            &mut out.to_server,
        );
    }

    fn report_request(
        &self,
        request: &Request<'_>,
        verdict: Result<HttpVerdict, Reason>,
        url: Text,
        cx: &mut Context<'_>,
    ) {
        let mut headers = Text::default();
        redact::headers(request.headers.iter(), &self.limits.record_headers, &mut headers);
        let what = What::HttpRequest {
            method: Word::from(request.method.as_bytes()),
            version: request.version,
            url,
            headers,
            mismatch: verdict.is_ok_and(|verdict| verdict.log),
        };
        let record = match verdict {
            Ok(verdict) => Record {
                rule: verdict.rule,
                ..cx.stream.record(Verdict::Forwarded, Reason::Allowed, what)
            },
            Err(reason) => {
                let is_audit = cx.stream.is_audit() && reason != Reason::UnknownRuleset;
                let verdict = if is_audit {
                    Verdict::Audit
                } else {
                    Verdict::Dropped
                };
                cx.stream.record(verdict, reason, what)
            }
        };
        (cx.record)(&record);
    }

    fn client_trailers(
        &mut self,
        open: OpenBlock,
        fields: &Fields,
        block: &mut Vec<u8>,
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        let id = open.stream;
        let stream = self.streams.open.get(&id);
        let misses_content = stream.is_some_and(|stream| stream.left.is_some_and(|left| left > 0));
        let checked = if fields.is_truncated() {
            Err(ParseError::ListTooLong)
        } else if !open.end_stream {
            Err(ParseError::Trailers)
        } else if misses_content {
            Err(ParseError::ContentLength)
        } else {
            let rules = cx.rules.http(cx.request().ruleset);
            let guarded = rules.map(|rules| rules.trailer_names().clone());
            trailers(fields, &guarded.unwrap_or_default())
        };
        if let Err(error) = checked {
            return self.fail_stream(id, error, cx, out);
        }
        self.forward_block(open, fields, &[], block, out);
        self.client_ends(id, cx);
        Ok(())
    }

    /// Handles SETTINGS of either peer: forwards an acknowledgement, or the settings in the form that the filter can
    /// follow.
    pub(super) fn settings_of(
        &mut self,
        side: Side,
        header: FrameHeader,
        payload: &[u8],
        cx: &Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        check_settings(header, payload)?;
        let (from, to, decoder, out) = match side {
            Side::Client => (
                &mut self.client,
                &mut self.server,
                &mut self.requests,
                &mut out.to_server,
            ),
            Side::Server => (
                &mut self.server,
                &mut self.client,
                &mut self.responses,
                &mut out.to_client,
            ),
        };
        from.control(cx.now)?;
        if header.has(flags::ACK) {
            if from.announced.is_none() {
                return Err(ParseError::NoSettings);
            }
            to.acknowledge(decoder)?;
            header.write(out);
            return Ok(());
        }
        let mut rewritten = Vec::new();
        let settings = Settings::parse(payload)?;
        let is_client = side == Side::Client;
        let (announced, least) =
            settings::rewrite(settings, is_client, from.announced, &self.limits, &mut rewritten)?;
        from.announce(announced, least)?;
        header.write_with(&rewritten, out);
        Ok(())
    }

    fn client_reset(
        &mut self,
        header: FrameHeader,
        payload: &[u8],
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        check_length(payload, 4)?;
        let id = header.stream;
        if id == 0 {
            return Err(ParseError::FrameStream);
        }
        if self.streams.is_idle(id) {
            return Err(ParseError::IdleStream);
        }
        let Some(stream) = self.streams.remove(id, true) else {
            if !self.streams.end_drain(id, true) {
                self.streams.close_by_client(id);
            }
            return self.client.control(cx.now);
        };
        let responded = stream.responded;
        self.report_end(stream, cx);
        header.write_with(payload, &mut out.to_server);
        if responded || self.resets.take(cx.now) {
            Ok(())
        } else {
            Err(ParseError::TooManyResets)
        }
    }

    /// Handles frames of the client that carry no content.
    fn client_control(
        &mut self,
        header: FrameHeader,
        payload: &[u8],
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        self.client.control(cx.now)?;
        let id = header.stream;
        match header.kind {
            kind::PING | kind::GOAWAY => {
                check_connection_frame(header, payload)?;
                header.write_with(payload, &mut out.to_server);
            }
            kind::WINDOW_UPDATE => {
                let increment = increment_of(payload)?;
                if id == 0 {
                    if increment == 0 {
                        return Err(ParseError::Increment);
                    }
                    let kept = increment.min(RESERVE.saturating_sub(self.reserve));
                    self.reserve += kept;
                    if increment > kept {
                        self.server.window += i64::from(increment - kept);
                        FrameHeader::window_update(0, increment - kept, &mut out.to_server);
                    }
                } else if self.streams.is_idle(id) {
                    return Err(ParseError::IdleStream);
                } else if increment == 0 {
                    return self.fail_stream(id, ParseError::Increment, cx, out);
                } else if self.streams.open.contains_key(&id) {
                    header.write_with(payload, &mut out.to_server);
                }
            }
            _ => {
                let priority = payload.try_into().map_err(|_| ParseError::FrameSize)?;
                if id == 0 {
                    return Err(ParseError::FrameStream);
                }
                if dependency(&priority) == Some(id) {
                    return Err(ParseError::Dependency);
                }
                // Priorities of idle and closed streams would tell the server about streams that it must not see.
                if self.streams.open.contains_key(&id) {
                    header.write_with(payload, &mut out.to_server);
                }
            }
        }
        Ok(())
    }

    /// Forgets a stream that both sides have ended.
    pub(super) fn end_stream(&mut self, id: u32, cx: &mut Context<'_>) {
        if let Some(stream) = self.streams.remove_ended(id) {
            self.report_end(stream, cx);
        }
    }
}

/// Returns whether one of the changes removes the fields of this name.
fn removes(edits: &[HeaderEdit], name: &[u8]) -> bool {
    edits.iter().any(|edit| match edit {
        HeaderEdit::Remove(removed) | HeaderEdit::Set(removed, _) => removed.as_bytes() == name,
        HeaderEdit::Add(..) => false,
    })
}

/// Returns the stream on which a stream depends.
fn dependency(priority: &[u8; 5]) -> Option<u32> {
    priority
        .first_chunk()
        .map(|stream| u32::from_be_bytes(*stream) & 0x7fff_ffff)
}

pub(super) fn check_length(payload: &[u8], length: usize) -> Result<(), ParseError> {
    if payload.len() == length {
        Ok(())
    } else {
        Err(ParseError::FrameSize)
    }
}

pub(super) fn check_settings(header: FrameHeader, payload: &[u8]) -> Result<(), ParseError> {
    if header.stream != 0 {
        return Err(ParseError::FrameStream);
    }
    if header.has(flags::ACK) && !payload.is_empty() {
        return Err(ParseError::FrameSize);
    }
    Ok(())
}

/// Checks a PING or GOAWAY.
pub(super) fn check_connection_frame(header: FrameHeader, payload: &[u8]) -> Result<(), ParseError> {
    if header.stream != 0 {
        return Err(ParseError::FrameStream);
    }
    let is_valid = match header.kind {
        kind::PING => payload.len() == 8,
        _ => payload.len() >= 8,
    };
    if is_valid {
        Ok(())
    } else {
        Err(ParseError::FrameSize)
    }
}

pub(super) fn increment_of(payload: &[u8]) -> Result<u32, ParseError> {
    let bytes = payload.try_into().map_err(|_| ParseError::FrameSize)?;
    Ok(u32::from_be_bytes(bytes) & settings::MAX_WINDOW)
}
