//! Frames of the server: forwarded unchanged except for SETTINGS, and read for the records and the state of the
//! streams.

use palisade_abi::Reason;
use palisade_protocols::http2::{
    ErrorCode, FrameHeader, ParseError, Piece, encode, flags, fragment_of, headers_of, kind, response,
};

use super::{
    client::{GENERATED_FRAME, check_connection_frame, check_length, increment_of},
    connection::{Connection, KEPT_CAPACITY},
    context::{Buffers, Context, Output},
    streams::{Report, Stream},
};
use crate::{
    Side,
    http::redact,
    record::{Record, Text, Verdict, What},
};
use std::{fmt::Write as _, mem};

impl Connection {
    /// Handles the next part of the server's bytes.
    pub(super) fn server_piece(
        &mut self,
        piece: Piece<'_>,
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        self.server.check_order(&piece)?;
        match piece {
            Piece::Content { bytes, .. } => {
                if let Some(id) = self.content(Side::Server, bytes, out) {
                    self.server_ends(id, cx);
                }
                Ok(())
            }
            Piece::Data {
                header,
                padding,
                rest,
            } => self.server_data(header, padding, rest, cx, out),
            Piece::Unknown(_) => self.server.control(cx.now),
            Piece::Frame(header, payload) => match header.kind {
                kind::HEADERS => {
                    self.check_known(header)?;
                    let (_, fragment) = fragment_of(header, payload)?;
                    let end_stream = header.has(flags::END_STREAM);
                    self.server.begin_block(header, end_stream, None, fragment);
                    self.server_block(header, payload, cx, out)
                }
                kind::CONTINUATION => {
                    self.server.continue_block(payload, self.limits.block, cx.now)?;
                    self.server_block(header, payload, cx, out)
                }
                kind::SETTINGS => self.server_settings(header, payload, cx, out),
                kind::PUSH_PROMISE => Err(ParseError::Push),
                _ => self.server_control(header, payload, cx, out),
            },
        }
    }

    /// Returns an error if the server cannot know the stream.
    fn check_known(&self, header: FrameHeader) -> Result<(), ParseError> {
        let id = header.stream;
        if id == 0 {
            Err(ParseError::FrameStream)
        } else if self.streams.open.contains_key(&id) || self.streams.can_be_under_way(id) {
            Ok(())
        } else {
            Err(ParseError::Unsolicited)
        }
    }

    fn server_data(
        &mut self,
        header: FrameHeader,
        padding: Option<u8>,
        rest: u32,
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        self.check_known(header)?;
        self.server.take_window(header.length)?;
        if self.streams.is_answered(header.stream) {
            if header.length == 0 {
                self.server.control(cx.now)?;
            }
            return self.drop_late_data(header.length, out);
        }
        let ends = header.has(flags::END_STREAM);
        if rest > u32::from(padding.unwrap_or(0)) {
            self.credit();
        } else if !ends {
            self.server.control(cx.now)?;
        }
        let stream = self.streams.open.get(&header.stream);
        if stream.is_some_and(|stream| !stream.server_open) {
            return Err(ParseError::ClosedStream);
        }
        // DATA of a stream that the client has reset is forwarded too: the client ignores it, and returns the
        // connection window.
        if self.forward_data(Side::Server, header, padding, rest, out) && ends {
            self.server_ends(header.stream, cx);
        }
        Ok(())
    }

    /// Handles the end of the server's side of a stream, which was forwarded.
    fn server_ends(&mut self, id: u32, cx: &mut Context<'_>) {
        if let Some(stream) = self.streams.open.get_mut(&id) {
            stream.server_open = false;
        }
        self.end_stream(id, cx);
    }

    /// Keeps a frame of a header block, and forwards the block once it is complete.
    fn server_block(
        &mut self,
        header: FrameHeader,
        payload: &[u8],
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        if !header.has(flags::END_HEADERS) {
            header.write_with(payload, &mut self.held);
            return Ok(());
        }
        let Some(open) = self.server.open.take() else {
            return Err(ParseError::Continuation);
        };
        let Buffers { fields, block, .. } = &mut *cx.buffers;
        let updates = self
            .responses
            .decode(&self.server.block, self.limits.head.block, fields)?;
        let head = response(fields);
        self.server.end_block();
        if self.streams.is_answered(open.stream) {
            self.rewrites = true;
            self.response_updates.merge(updates);
            self.held.clear();
            self.held.shrink_to(KEPT_CAPACITY);
            return self.server.control(cx.now);
        }
        self.credit();
        if self.rewrites {
            self.response_updates.merge(updates);
            self.held.clear();
            if fields.is_truncated() {
                cx.refuse(ParseError::ListTooLong, Verdict::Dropped);
                self.reset(open.stream, ErrorCode::InternalError, out);
                return Ok(());
            }
            block.clear();
            encode::size_updates(mem::take(&mut self.response_updates), block);
            for (name, value, sensitive) in fields.iter() {
                encode::field(name, value, sensitive, block);
            }
            headers_of(
                open.stream,
                open.end_stream,
                None,
                block,
                GENERATED_FRAME,
                &mut out.to_client,
            );
        } else {
            out.to_client.append(&mut self.held);
            header.write_with(payload, &mut out.to_client);
        }
        self.held.shrink_to(KEPT_CAPACITY);
        let Some(stream) = self.streams.open.get_mut(&open.stream) else {
            return Ok(());
        };
        if !stream.server_open {
            return Err(ParseError::ClosedStream);
        }
        stream.server_open = !open.end_stream;
        let is_final = head.status.is_none_or(|status| !(100..200).contains(&status));
        if is_final {
            let is_first = !stream.responded;
            stream.responded = true;
            if is_first
                && stream.tunnel.is_some()
                && head.status.is_some_and(|status| (200..300).contains(&status))
            {
                cx.stats.tunnels += 1;
            }
            if let (Some(report), Some(status)) = (&mut stream.report, head.status) {
                report.status = Some((status, head.length));
            }
            // The result of a gRPC call is in its trailers.
            let waits = stream.report.as_ref().is_some_and(|report| report.grpc) && !open.end_stream;
            if !waits && let Some(report) = stream.report.take() {
                self.report_response(&report, head.grpc_status, true, cx);
            }
        } else {
            self.streams.begin_wait(open.stream, cx.now);
        }
        self.end_stream(open.stream, cx);
        Ok(())
    }

    /// Records the response of a stream that ends, unless it was recorded before.
    pub(super) fn report_end(&self, stream: Stream, cx: &mut Context<'_>) {
        if let Some(report) = stream.report {
            self.report_response(&report, None, false, cx);
        }
    }

    /// Records a response. `has_fields`: whether the buffers have its fields.
    fn report_response(
        &self,
        report: &Report,
        grpc_status: Option<u32>,
        has_fields: bool,
        cx: &mut Context<'_>,
    ) {
        let Some((status, length)) = report.status else {
            return;
        };
        cx.stats.responses += 1;
        let mut headers = Text::default();
        if let Some(status) = grpc_status {
            let _ = writeln!(headers, "grpc-status: {status}");
        }
        if has_fields {
            let fields = cx.buffers.fields.iter();
            let fields = fields.filter_map(|(name, value, _)| Some((std::str::from_utf8(name).ok()?, value)));
            redact::headers(fields, &self.limits.record_headers, &mut headers);
        }
        let what = What::HttpResponse {
            method: report.method,
            url: report.url,
            version: 2,
            status,
            length,
            headers,
        };
        let record = cx
            .stream
            .response_record(Verdict::Forwarded, Reason::Allowed, what);
        (cx.record)(&Record {
            latency: u32::try_from(cx.now.saturating_sub(report.since)).ok(),
            ..record
        });
    }

    fn server_settings(
        &mut self,
        header: FrameHeader,
        payload: &[u8],
        cx: &Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        self.settings_of(Side::Server, header, payload, cx, out)?;
        if !header.has(flags::ACK) {
            // Generated responses wait for the first SETTINGS of the server.
            out.to_client.append(&mut self.early);
        }
        Ok(())
    }

    /// Handles frames of the server that carry no content.
    fn server_control(
        &mut self,
        header: FrameHeader,
        payload: &[u8],
        cx: &mut Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        self.server.control(cx.now)?;
        let id = header.stream;
        match header.kind {
            kind::PING | kind::GOAWAY => {
                check_connection_frame(header, payload)?;
                header.write_with(payload, &mut out.to_client);
            }
            kind::WINDOW_UPDATE => {
                let increment = increment_of(payload)?;
                if increment == 0 {
                    return Err(ParseError::Increment);
                }
                if id == 0 {
                    self.client.window += i64::from(increment);
                    header.write_with(payload, &mut out.to_client);
                } else {
                    self.check_known(header)?;
                    if self.streams.open.contains_key(&id) {
                        header.write_with(payload, &mut out.to_client);
                    }
                }
            }
            kind::RST_STREAM => {
                check_length(payload, 4)?;
                self.check_known(header)?;
                if let Some(stream) = self.streams.remove(id, false) {
                    self.report_end(stream, cx);
                    header.write_with(payload, &mut out.to_client);
                }
            }
            // A server has no priorities.
            _ => {}
        }
        Ok(())
    }
}
