//! An HTTP/2 server that answers every request with 503 or 504, for connections whose server cannot be reached. It reads the
//! output of the filter for the server, so denied requests never reach it.

use palisade_inspect::http2::Unanswered;
use palisade_protocols::http2::{
    Decoder, ErrorCode, FieldBuffer, Fields, FrameHeader, Frames, PREFACE, ParseError, Piece, encode, flags,
    fragment_of, headers_of, kind, request,
};

use crate::{answer, failure::Failure};

/// Maximum size of a header list, bytes. The filter has checked the size before.
const LIST: usize = 64 << 10;
/// Maximum number of bytes of unfinished requests that are read and dropped after their answers, for one connection.
const DRAINED: u64 = 64 << 20;
/// Last stream of a GOAWAY that announces another one (RFC 9113, section 6.8).
const ANY_STREAM: u32 = (1 << 31) - 1;

/// State of the server of one connection.
pub(crate) struct Unavailable {
    frames: Frames,
    decoder: Decoder,
    fields: Fields,
    /// Number of bytes of the preface that have arrived.
    preface: usize,
    /// Header block that is arriving, with the header of its first frame.
    block: Option<(FrameHeader, Vec<u8>)>,
    has_greeted: bool,
    has_answered: bool,
    /// Whether the client was told to open no further streams.
    has_announced: bool,
    /// Number of bytes of unfinished requests that are still read.
    left: u64,
    /// Number of bytes of content that the client's flow-control windows permit.
    room: u32,
}

impl Unavailable {
    pub(crate) fn new() -> Self {
        let mut frames = Frames::new(LIST as u32);
        // The filter has checked the lengths.
        frames.raise_limit(u32::MAX);
        Self {
            frames,
            decoder: Decoder::lenient(),
            fields: Fields::default(),
            preface: 0,
            block: None,
            has_greeted: false,
            has_answered: false,
            has_announced: false,
            left: DRAINED,
            room: 0,
        }
    }

    /// Takes the place of a server that has failed: appends answers to all of `streams`, which have no response yet.
    /// `room`: number of bytes of content that the client's flow-control windows permit.
    pub(crate) fn resume(streams: &[Unanswered], room: u32, failure: &Failure, out: &mut Vec<u8>) -> Self {
        let mut own = Self::new();
        own.preface = PREFACE.len();
        own.has_greeted = true;
        own.room = room;
        // The server can have failed before its SETTINGS, which must come first (RFC 9113, section 3.4).
        frame(kind::SETTINGS, 0).write_with(&[], out);
        for stream in streams {
            own.respond(*stream, failure, out);
        }
        own
    }

    /// Returns whether a request was answered.
    pub(crate) const fn has_answered(&self) -> bool {
        self.has_answered
    }

    /// Answers a request.
    fn respond(&mut self, to: Unanswered, failure: &Failure, out: &mut Vec<u8>) {
        respond(to, failure, &mut self.room, out);
        self.has_answered = true;
        if !to.is_complete && !self.has_announced {
            // The connection stays open for the rest of the request. Further requests need a connection of their own.
            self.has_announced = true;
            FrameHeader::goaway(ANY_STREAM, ErrorCode::NoError, out);
        }
    }

    /// Drops the content of a request that is answered. The client gets its windows back and can send the rest: some
    /// clients (curl 7.88, httpx) lose an early answer that a reset of the stream follows.
    fn drain(&mut self, header: FrameHeader, out: &mut Vec<u8>) {
        let length = header.length;
        if length == 0 {
            return;
        }
        FrameHeader::window_update(0, length, out);
        self.left = self.left.saturating_sub(length.into());
        if header.has(flags::END_STREAM) {
            return;
        }
        if self.left > 0 {
            FrameHeader::window_update(header.stream, length, out);
        } else {
            // The client need not send the rest of the request (RFC 9113, section 8.1).
            FrameHeader::rst_stream(header.stream, ErrorCode::NoError, out);
        }
    }

    /// Handles bytes for the server, and appends the answers. `room`: as for [`Self::resume`].
    ///
    /// # Errors
    /// [`ParseError`] if the bytes are malformed, which the filter's output is not.
    pub(crate) fn serve(
        &mut self,
        bytes: &[u8],
        room: u32,
        failure: &Failure,
        out: &mut Vec<u8>,
    ) -> Result<(), ParseError> {
        self.room = room;
        let mut input = bytes;
        let missing = PREFACE.len() - self.preface;
        let taken = input.len().min(missing);
        self.preface += taken;
        input = input.get(taken..).unwrap_or_default();
        if !self.has_greeted {
            self.has_greeted = true;
            frame(kind::SETTINGS, 0).write_with(&[], out);
        }
        while let Some(piece) = self.frames.next(&mut input)? {
            let (header, payload) = match piece {
                Piece::Frame(header, payload) => (header, payload),
                Piece::Data { header, .. } => {
                    self.drain(header, out);
                    continue;
                }
                Piece::Content { .. } | Piece::Unknown(_) => continue,
            };
            match header.kind {
                kind::SETTINGS if !header.has(flags::ACK) => {
                    frame(kind::SETTINGS, flags::ACK).write_with(&[], out);
                }
                kind::PING if !header.has(flags::ACK) => {
                    frame(kind::PING, flags::ACK).write_with(payload, out);
                }
                kind::HEADERS => {
                    let (_, part) = fragment_of(header, payload)?;
                    self.block = Some((header, part.to_vec()));
                }
                kind::CONTINUATION => {
                    if let Some((_, block)) = &mut self.block {
                        block.extend_from_slice(payload);
                    }
                }
                _ => {}
            }
            if header.has(flags::END_HEADERS)
                && matches!(header.kind, kind::HEADERS | kind::CONTINUATION)
                && let Some((first, block)) = self.block.take()
            {
                self.decoder.decode(&block, LIST, &mut self.fields)?;
                // Trailers have no method, and belong to a request that is answered already.
                if self.fields.value(b":method").is_some() {
                    self.respond(read(first, &self.fields), failure, out);
                }
            }
        }
        Ok(())
    }
}

const fn frame(kind: u8, flags: u8) -> FrameHeader {
    FrameHeader {
        length: 0,
        kind,
        flags,
        stream: 0,
    }
}

/// Returns the properties of a request that its answer depends on.
fn read(first: FrameHeader, fields: &Fields) -> Unanswered {
    let is_complete = first.has(flags::END_STREAM);
    let (mut cookie, mut buffer) = (Vec::new(), FieldBuffer::new());
    let head = request(fields, is_complete, &mut cookie, &mut buffer);
    Unanswered {
        id: first.stream,
        is_complete,
        is_head: head.as_ref().is_ok_and(|head| head.request.method == "HEAD"),
        is_grpc: head.as_ref().is_ok_and(|head| head.is_grpc),
    }
}

/// Appends the answer to a request. Its content is left out if it exceeds `room`.
fn respond(to: Unanswered, failure: &Failure, room: &mut u32, out: &mut Vec<u8>) {
    let mut block = Vec::new();
    let mut put = |name: &[u8], value: &[u8]| encode::field(name, value, false, &mut block);
    let error = answer::header(failure);
    let body = answer::body(failure);
    let left = room.checked_sub(body.len() as u32);
    let has_body = !to.is_grpc && !to.is_head && left.is_some();
    if to.is_grpc {
        // A response of trailers only. A percent sign would begin an escape.
        put(b":status", b"200");
        put(b"content-type", b"application/grpc");
        put(b"grpc-status", failure.grpc_status().as_bytes());
        put(b"grpc-message", error.replace('%', "?").as_bytes());
    } else {
        put(b":status", failure.status().0.as_bytes());
        put(b"content-type", b"text/plain; charset=utf-8");
        let length = if has_body || to.is_head { body.len() } else { 0 };
        put(b"content-length", length.to_string().as_bytes());
    }
    put(b"x-palisade-error", error.as_bytes());
    headers_of(to.id, !has_body, None, &block, 16_384, out);
    if let Some(left) = left.filter(|_| has_body) {
        *room = left;
        let header = FrameHeader {
            stream: to.id,
            ..frame(kind::DATA, flags::END_STREAM)
        };
        header.write_with(body.as_bytes(), out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::FailureKind;

    #[test]
    fn the_rest_of_a_request_is_read_up_to_a_limit() {
        let mut server = Unavailable::new();
        server.left = 250;
        let mut input = PREFACE.to_vec();
        let mut block = Vec::new();
        for (name, value) in [(":method", "POST"), (":scheme", "https"), (":path", "/")] {
            encode::field(name.as_bytes(), value.as_bytes(), false, &mut block);
        }
        headers_of(1, false, None, &block, 16_384, &mut input);
        for _ in 0..3 {
            let header = FrameHeader {
                stream: 1,
                ..frame(kind::DATA, 0)
            };
            header.write_with(&[0; 100], &mut input);
        }
        let mut out = Vec::new();
        let failure = FailureKind::Refused.into();
        server.serve(&input, 1_000, &failure, &mut out).expect("frames");
        let mut frames = Frames::new(LIST as u32);
        let mut rest = &out[..];
        let mut seen = Vec::new();
        while let Some(piece) = frames.next(&mut rest).expect("frames") {
            if let Piece::Frame(header, _) = piece {
                seen.push((header.kind, header.stream));
            }
        }
        let update = kind::WINDOW_UPDATE;
        assert_eq!(
            seen[..3],
            [(kind::SETTINGS, 0), (kind::HEADERS, 1), (kind::GOAWAY, 0)]
        );
        assert_eq!(
            seen[3..],
            [
                (update, 0),
                (update, 1),
                (update, 0),
                (update, 1),
                (update, 0),
                (kind::RST_STREAM, 1)
            ]
        );
    }
}
