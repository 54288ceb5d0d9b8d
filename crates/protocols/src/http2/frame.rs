//! Frames (RFC 9113, sections 4 and 6).

use std::mem;

use super::{ErrorCode, ParseError};

/// The bytes that a client sends first (RFC 9113, section 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Length of a frame header, bytes.
pub const HEADER_LENGTH: usize = 9;

/// Frame types.
pub mod kind {
    /// Content of a request or response.
    pub const DATA: u8 = 0;
    /// Opens a stream; carries a header block.
    pub const HEADERS: u8 = 1;
    /// Priority of a stream (deprecated).
    pub const PRIORITY: u8 = 2;
    /// Ends a stream at once.
    pub const RST_STREAM: u8 = 3;
    /// Parameters of the connection.
    pub const SETTINGS: u8 = 4;
    /// Announces a stream of the server.
    pub const PUSH_PROMISE: u8 = 5;
    /// Measures the round-trip time.
    pub const PING: u8 = 6;
    /// Announces the end of the connection.
    pub const GOAWAY: u8 = 7;
    /// Flow control.
    pub const WINDOW_UPDATE: u8 = 8;
    /// Continues a header block.
    pub const CONTINUATION: u8 = 9;
}

/// Frame flags.
pub mod flags {
    /// DATA, HEADERS: the last frame of the sender on the stream.
    pub const END_STREAM: u8 = 1;
    /// SETTINGS, PING: an acknowledgement.
    pub const ACK: u8 = 1;
    /// HEADERS, CONTINUATION: the header block is complete.
    pub const END_HEADERS: u8 = 4;
    /// DATA, HEADERS: the frame has padding.
    pub const PADDED: u8 = 8;
    /// HEADERS: the frame has a priority.
    pub const PRIORITY: u8 = 0x20;
}

/// Identifiers of settings (RFC 9113, section 6.5.2).
pub mod setting {
    /// Maximum size of the dynamic table of the peer's encoder, bytes.
    pub const HEADER_TABLE_SIZE: u16 = 1;
    /// Whether the server may push.
    pub const ENABLE_PUSH: u16 = 2;
    /// Maximum number of streams that the peer may have open.
    pub const MAX_CONCURRENT_STREAMS: u16 = 3;
    /// Flow-control window of a new stream, bytes.
    pub const INITIAL_WINDOW_SIZE: u16 = 4;
    /// Maximum length of a frame, bytes.
    pub const MAX_FRAME_SIZE: u16 = 5;
    /// Maximum size of a header list, bytes.
    pub const MAX_HEADER_LIST_SIZE: u16 = 6;
    /// Whether the client may use extended CONNECT (RFC 8441).
    pub const ENABLE_CONNECT_PROTOCOL: u16 = 8;
    /// Whether the priorities of RFC 7540 are not used (RFC 9218).
    pub const NO_RFC7540_PRIORITIES: u16 = 9;
}

/// A frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Length of the payload, bytes.
    pub length: u32,
    /// Frame type.
    pub kind: u8,
    /// Flags.
    pub flags: u8,
    /// Stream identifier; 0 for the connection.
    pub stream: u32,
}

impl FrameHeader {
    /// Reads a frame header.
    #[must_use]
    pub const fn parse(bytes: [u8; HEADER_LENGTH]) -> Self {
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = bytes;
        Self {
            length: u32::from_be_bytes([0, l0, l1, l2]),
            kind,
            flags,
            // The first bit is reserved; receivers ignore it.
            stream: u32::from_be_bytes([s0, s1, s2, s3]) & 0x7fff_ffff,
        }
    }

    /// Appends the header.
    pub fn write(&self, out: &mut Vec<u8>) {
        let [_, l0, l1, l2] = self.length.to_be_bytes();
        out.extend_from_slice(&[l0, l1, l2, self.kind, self.flags]);
        out.extend_from_slice(&self.stream.to_be_bytes());
    }

    /// Returns whether the frame has this flag.
    #[must_use]
    pub const fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Appends a frame with this header and payload. The length of the header is ignored.
    pub fn write_with(&self, payload: &[u8], out: &mut Vec<u8>) {
        let length = payload.len() as u32;
        Self { length, ..*self }.write(out);
        out.extend_from_slice(payload);
    }
}

const fn control(kind: u8, stream: u32) -> FrameHeader {
    FrameHeader {
        length: 0,
        kind,
        flags: 0,
        stream,
    }
}

/// Frames that an intermediary generates.
impl FrameHeader {
    /// Appends a RST_STREAM.
    pub fn rst_stream(stream: u32, code: ErrorCode, out: &mut Vec<u8>) {
        control(kind::RST_STREAM, stream).write_with(&(code as u32).to_be_bytes(), out);
    }

    /// Appends a WINDOW_UPDATE.
    pub fn window_update(stream: u32, increment: u32, out: &mut Vec<u8>) {
        control(kind::WINDOW_UPDATE, stream).write_with(&increment.to_be_bytes(), out);
    }

    /// Appends a GOAWAY. `last`: highest stream that the receiver has opened and that can have been processed.
    pub fn goaway(last: u32, code: ErrorCode, out: &mut Vec<u8>) {
        let mut payload = [0; 8];
        let (first, second) = payload.split_at_mut(4);
        first.copy_from_slice(&last.to_be_bytes());
        second.copy_from_slice(&(code as u32).to_be_bytes());
        control(kind::GOAWAY, 0).write_with(&payload, out);
    }
}

/// Appends a header block as HEADERS and CONTINUATION frames. `priority` is the priority part of the HEADERS frame.
/// `max`: maximum length of a frame, bytes.
pub fn headers_of(
    stream: u32,
    end_stream: bool,
    priority: Option<[u8; 5]>,
    block: &[u8],
    max: usize,
    out: &mut Vec<u8>,
) {
    let priority = priority.as_ref().map_or(&[][..], |priority| &priority[..]);
    let room = max.saturating_sub(priority.len()).max(1);
    let (mut part, mut rest) = block.split_at(block.len().min(room));
    let mut header = FrameHeader {
        length: (priority.len() + part.len()) as u32,
        kind: kind::HEADERS,
        flags: if end_stream { flags::END_STREAM } else { 0 },
        stream,
    };
    if !priority.is_empty() {
        header.flags |= flags::PRIORITY;
    }
    if rest.is_empty() {
        header.flags |= flags::END_HEADERS;
    }
    header.write(out);
    out.extend_from_slice(priority);
    out.extend_from_slice(part);
    while !rest.is_empty() {
        (part, rest) = rest.split_at(rest.len().min(max.max(1)));
        let flags = if rest.is_empty() { flags::END_HEADERS } else { 0 };
        FrameHeader {
            flags,
            ..control(kind::CONTINUATION, stream)
        }
        .write_with(part, out);
    }
}

/// Returns the priority part and the header block fragment of a HEADERS frame.
///
/// # Errors
/// [`ParseError`] if the frame is too short for its padding or its priority.
pub fn fragment_of(header: FrameHeader, payload: &[u8]) -> Result<(Option<[u8; 5]>, &[u8]), ParseError> {
    let mut rest = payload;
    let mut padding = 0;
    if header.has(flags::PADDED) {
        let (&length, after) = rest.split_first().ok_or(ParseError::FrameSize)?;
        (padding, rest) = (usize::from(length), after);
    }
    let mut priority = None;
    if header.has(flags::PRIORITY) {
        let (begin, after) = rest.split_first_chunk::<5>().ok_or(ParseError::FrameSize)?;
        (priority, rest) = (Some(*begin), after);
    }
    let length = rest.len().checked_sub(padding).ok_or(ParseError::Padding)?;
    Ok((priority, rest.get(..length).unwrap_or_default()))
}

/// The settings of a SETTINGS frame.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a>(&'a [u8]);

impl<'a> Settings<'a> {
    /// Reads the payload of a SETTINGS frame.
    ///
    /// # Errors
    /// [`ParseError::FrameSize`] if the length is not a multiple of 6.
    pub const fn parse(payload: &'a [u8]) -> Result<Self, ParseError> {
        if payload.len().is_multiple_of(6) {
            Ok(Self(payload))
        } else {
            Err(ParseError::FrameSize)
        }
    }

    /// Returns the identifiers and values in order.
    pub fn iter(&self) -> impl Iterator<Item = (u16, u32)> + use<'a> {
        self.0.chunks_exact(6).filter_map(|setting| {
            let (id, value) = setting.split_first_chunk::<2>()?;
            Some((
                u16::from_be_bytes(*id),
                u32::from_be_bytes(value.try_into().ok()?),
            ))
        })
    }
}

/// The next part of a stream of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// A complete frame other than DATA, with its payload.
    Frame(FrameHeader, &'a [u8]),
    /// The start of a DATA frame. `rest` more bytes of the frame follow as [`Piece::Content`].
    Data {
        /// Frame header.
        header: FrameHeader,
        /// Pad Length field of a padded frame.
        padding: Option<u8>,
        /// Number of bytes of the frame after the Pad Length field.
        rest: u32,
    },
    /// Bytes of the current DATA frame; never empty.
    Content {
        /// The bytes.
        bytes: &'a [u8],
        /// Whether these are the last bytes of the frame.
        ends: bool,
    },
    /// A frame of an unknown type. Its payload is left out.
    Unknown(FrameHeader),
}

/// Splits a byte stream into frames, wherever the stream is cut. DATA is not buffered.
#[derive(Clone, Debug)]
pub struct Frames {
    /// Maximum length of a payload, bytes.
    limit: u32,
    /// Maximum length of the payload of a frame that is buffered, bytes.
    buffered: u32,
    state: State,
    /// Frame header of an incomplete frame, and the Pad Length field of a DATA frame.
    head: [u8; HEADER_LENGTH + 1],
    head_length: usize,
    payload: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Head,
    /// The buffer gets the payload.
    Payload(FrameHeader),
    /// The payload in the buffer has been returned.
    Returned,
    /// DATA with this number of bytes left.
    Content(u32),
    /// A frame of an unknown type with this number of bytes left.
    Skip(u32),
}

impl Frames {
    /// Returns a reader for the start of a stream, with the initial value of SETTINGS_MAX_FRAME_SIZE. `buffered`:
    /// maximum length of frames other than DATA, bytes.
    #[must_use]
    pub const fn new(buffered: u32) -> Self {
        Self {
            limit: 16_384,
            buffered,
            state: State::Head,
            head: [0; _],
            head_length: 0,
            payload: Vec::new(),
        }
    }

    /// Raises the maximum length of a frame to `limit` bytes. A lower limit has no effect, because frames of the peer
    /// can precede its acknowledgement.
    pub fn raise_limit(&mut self, limit: u32) {
        self.limit = self.limit.max(limit);
    }

    /// Returns the maximum length of a frame, bytes.
    #[must_use]
    pub const fn limit(&self) -> u32 {
        self.limit
    }

    /// Returns the next part and removes its bytes from `input`; `None` if more bytes are needed.
    ///
    /// # Errors
    /// [`ParseError`] if the frame is too long, or a DATA frame too short for its padding.
    pub fn next<'a, 'i: 'a>(&'a mut self, input: &mut &'i [u8]) -> Result<Option<Piece<'a>>, ParseError> {
        if matches!(self.state, State::Returned) {
            self.payload.clear();
            self.state = State::Head;
        }
        if let State::Content(left) | State::Skip(left) = &mut self.state {
            let length = input.len().min(*left as usize);
            let (bytes, rest) = input.split_at(length);
            *input = rest;
            *left -= length as u32;
            let ends = *left == 0;
            let is_content = matches!(self.state, State::Content(_));
            if ends {
                self.state = State::Head;
            }
            if length > 0 && is_content {
                return Ok(Some(Piece::Content { bytes, ends }));
            }
            if !ends {
                return Ok(None);
            }
        }
        let header = match self.state {
            State::Payload(header) => header,
            _ => {
                let Some(header) = self.header(input)? else {
                    return Ok(None);
                };
                match header.kind {
                    kind::DATA => return self.data(header).map(Some),
                    10.. => {
                        self.state = State::Skip(header.length);
                        return Ok(Some(Piece::Unknown(header)));
                    }
                    _ => {}
                }
                if header.length > self.buffered {
                    return Err(match header.kind {
                        kind::HEADERS | kind::CONTINUATION => ParseError::BlockTooLong,
                        _ => ParseError::FrameSize,
                    });
                }
                // A complete frame need not be copied.
                if let Some((payload, rest)) = input.split_at_checked(header.length as usize) {
                    *input = rest;
                    return Ok(Some(Piece::Frame(header, payload)));
                }
                header
            }
        };
        let missing = (header.length as usize).saturating_sub(self.payload.len());
        let (bytes, rest) = input.split_at(input.len().min(missing));
        self.payload.extend_from_slice(bytes);
        *input = rest;
        if bytes.len() < missing {
            self.state = State::Payload(header);
            return Ok(None);
        }
        self.state = State::Returned;
        Ok(Some(Piece::Frame(header, &self.payload)))
    }

    /// Returns a complete frame header. The Pad Length field of a DATA frame is part of the head that is buffered.
    fn header(&mut self, input: &mut &[u8]) -> Result<Option<FrameHeader>, ParseError> {
        if self.head_length < HEADER_LENGTH && !self.fill(HEADER_LENGTH, input) {
            return Ok(None);
        }
        let header = FrameHeader::parse(*self.head.first_chunk().unwrap_or(&[0; HEADER_LENGTH]));
        if header.length > self.limit {
            return Err(ParseError::FrameSize);
        }
        if header.kind == kind::DATA && header.has(flags::PADDED) {
            if header.length == 0 {
                return Err(ParseError::FrameSize);
            }
            if !self.fill(HEADER_LENGTH + 1, input) {
                return Ok(None);
            }
        }
        self.head_length = 0;
        Ok(Some(header))
    }

    fn fill(&mut self, length: usize, input: &mut &[u8]) -> bool {
        let room = self.head.get_mut(self.head_length..length).unwrap_or_default();
        let count = room.len().min(input.len());
        let (bytes, rest) = input.split_at(count);
        if let Some(room) = room.get_mut(..count) {
            room.copy_from_slice(bytes);
        }
        *input = rest;
        self.head_length += count;
        self.head_length == length
    }

    fn data(&mut self, header: FrameHeader) -> Result<Piece<'static>, ParseError> {
        let padding = header
            .has(flags::PADDED)
            .then(|| self.head.last().copied().unwrap_or(0));
        let rest = header.length.saturating_sub(padding.is_some().into());
        if u32::from(padding.unwrap_or(0)) > rest {
            return Err(ParseError::Padding);
        }
        self.state = if rest == 0 {
            State::Head
        } else {
            State::Content(rest)
        };
        Ok(Piece::Data {
            header,
            padding,
            rest,
        })
    }

    /// Returns the number of bytes in the buffer.
    #[must_use]
    pub fn held(&self) -> usize {
        self.payload.len() + self.head_length
    }

    /// Releases the buffer if it is empty.
    pub fn release(&mut self) {
        if !matches!(self.state, State::Payload(_)) && self.payload.capacity() > 1 << 12 {
            if matches!(self.state, State::Returned) {
                self.state = State::Head;
            }
            drop(mem::take(&mut self.payload));
        }
    }
}
