//! Responses in the server's place.

use palisade_protocols::http2::{
    ErrorCode, FrameHeader, ParseError, RequestHead, SizeUpdates, encode, flags, headers_of, kind,
};

use super::{
    connection::{Connection, OpenBlock},
    context::{Context, Output},
    streams::Closed,
};

/// Maximum number of bytes of a refused request that are read and dropped after its response.
const DRAINED: u64 = 64 << 20;

/// A response to a refused request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refusal {
    status: &'static str,
    text: &'static str,
    /// Length of `text`, bytes.
    length: &'static str,
    /// Whether the response has no content, because the request is HEAD.
    bodiless: bool,
    grpc: bool,
}

impl Refusal {
    /// Returns the response to a request that no rule allows.
    pub(super) fn denied(head: &RequestHead<'_>) -> Self {
        Self {
            status: "403",
            text: "Access denied\r\n",
            length: "15",
            bodiless: head.request.method == "HEAD",
            grpc: head.is_grpc,
        }
    }

    /// Returns the response to a request that is too long or has an unexpected body.
    pub(super) const fn of_error(error: ParseError) -> Self {
        let (status, text, length) = match error {
            ParseError::PathTooLong => ("414", "URI too long\r\n", "14"),
            ParseError::ListTooLong => ("431", "Request header fields too large\r\n", "33"),
            _ => ("400", "Bad request\r\n", "13"),
        };
        Self {
            status,
            text,
            length,
            bodiless: false,
            grpc: false,
        }
    }
}

/// Answer to requests that the server has got and not responded to.
#[derive(Clone, Copy, Debug)]
pub struct LateAnswer<'a> {
    /// Status of the response.
    pub status: &'a str,
    /// Status of the response to a gRPC request.
    pub grpc_status: &'a str,
    /// Value of the field `x-palisade-error`: visible ASCII and spaces.
    pub error: &'a str,
    /// Content.
    pub body: &'a str,
}

impl Connection {
    /// Responds to a request that the server does not see.
    pub(super) fn respond(
        &mut self,
        open: OpenBlock,
        refusal: Refusal,
        block: &mut Vec<u8>,
        cx: &Context<'_>,
        out: &mut Output,
    ) -> Result<(), ParseError> {
        let id = open.stream;
        self.begin_response(block);
        let text = refusal.text.as_bytes();
        let has_body = !refusal.grpc && !refusal.bodiless && self.take_room(text);
        let mut put = |name: &str, value: &str| {
            encode::field(name.as_bytes(), value.as_bytes(), false, block);
        };
        if refusal.grpc {
            // A response of trailers only (gRPC over HTTP/2, "Responses").
            put(":status", "200");
            put("content-type", "application/grpc");
            put("grpc-status", "7");
            put("grpc-message", "Access denied");
        } else {
            put(":status", refusal.status);
            put("content-type", "text/plain");
            let is_empty = !has_body && !refusal.bodiless;
            put("content-length", if is_empty { "0" } else { refusal.length });
        }
        let to_client = self.client_out(out);
        headers_of(id, !has_body, None, block, 16_384, to_client);
        if has_body {
            FrameHeader {
                length: 0,
                kind: kind::DATA,
                flags: flags::END_STREAM,
                stream: id,
            }
            .write_with(text, to_client);
        }
        let is_drained = !open.end_stream && self.streams.drain(id, DRAINED, self.limits.streams);
        if !is_drained {
            if !open.end_stream {
                FrameHeader::rst_stream(id, ErrorCode::NoError, self.client_out(out));
            }
            self.streams.close(Closed {
                id,
                by_client: open.end_stream,
                forwarded: false,
                answered: false,
            });
        }
        self.count_denial(cx)
    }

    /// Begins the header block of a response of the filter.
    ///
    /// The block must not change the dynamic table of the client's decoder, because the server's encoder has the same
    /// table and never sees this block. But the client can require a size update in the first block after an
    /// acknowledged reduction (RFC 9113, 4.3.1).
    fn begin_response(&self, block: &mut Vec<u8>) {
        block.clear();
        let required = self.responses.required_update();
        encode::size_updates(
            SizeUpdates {
                least: required,
                last: required,
            },
            block,
        );
    }

    /// Responds to a request that the server has got and not responded to, and resets its stream at the server.
    pub(super) fn respond_late(
        &mut self,
        id: u32,
        answer: &LateAnswer<'_>,
        block: &mut Vec<u8>,
        out: &mut Output,
    ) {
        let Some(stream) = self.streams.remove(id, false) else {
            return;
        };
        self.streams.note_answer(id);
        let report = stream.report.as_ref();
        let is_grpc = report.is_some_and(|report| report.grpc);
        let is_head = report.is_some_and(|report| report.method.bytes() == b"HEAD");
        self.begin_response(block);
        let text = answer.body.as_bytes();
        let has_body = !is_grpc && !is_head && self.take_room(text);
        let mut put = |name: &str, value: &str| {
            encode::field(name.as_bytes(), value.as_bytes(), false, block);
        };
        if is_grpc {
            // A response of trailers only. A percent sign would begin an escape.
            put(":status", "200");
            put("content-type", "application/grpc");
            put("grpc-status", answer.grpc_status);
            put("grpc-message", &answer.error.replace('%', "?"));
        } else {
            put(":status", answer.status);
            put("content-type", "text/plain; charset=utf-8");
            let length = if has_body || is_head { text.len() } else { 0 };
            put("content-length", &length.to_string());
        }
        put("x-palisade-error", answer.error);
        let to_client = self.client_out(out);
        headers_of(id, !has_body, None, block, 16_384, to_client);
        if has_body {
            FrameHeader {
                length: 0,
                kind: kind::DATA,
                flags: flags::END_STREAM,
                stream: id,
            }
            .write_with(text, to_client);
        }
        if stream.client_open {
            FrameHeader::rst_stream(id, ErrorCode::NoError, to_client);
        }
        FrameHeader::rst_stream(id, ErrorCode::Cancel, &mut out.to_server);
        self.drop_rest(id, out);
    }

    /// Charges the content of a response to the client's flow-control windows. Returns whether the windows suffice.
    ///
    /// The content counts towards the connection window, which the server uses for its own DATA. Only the reserve is
    /// available for responses, because the filter has withheld it from the server.
    fn take_room(&mut self, text: &[u8]) -> bool {
        let length = text.len() as u32;
        if self.reserve < length || self.least_window() < length {
            return false;
        }
        self.reserve -= length;
        true
    }

    /// Returns the lowest window that a new stream can have at the client, bytes: the client's settings can be under way.
    pub(super) fn least_window(&self) -> u32 {
        let outstanding = self
            .client
            .outstanding
            .iter()
            .map(|(announced, _)| announced.window);
        outstanding.fold(self.client.acknowledged.window, u32::min)
    }
}
