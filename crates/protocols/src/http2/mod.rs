//! Frames of HTTP/2 (RFC 9113) and header compression (HPACK, RFC 7541), for an intermediary between two peers.
//!
//! [`Frames`] splits a byte stream into frames. [`Decoder`] decodes header blocks into [`Fields`], within the size that
//! the caller gives. [`encode`] writes header blocks that refer to no dynamic table, so that the receiver's decoder
//! needs no state of the sender. [`request`], [`trailers`] and [`response`] read decoded fields.
//!
//! ```
//! use palisade_protocols::http2::{Decoder, FieldBuffer, Fields, encode, request};
//!
//! let mut block = Vec::new();
//! for (name, value) in [(":method", "GET"), (":scheme", "https"), (":path", "/v1"), (":authority", "api.example")] {
//!     encode::field(name.as_bytes(), value.as_bytes(), false, &mut block);
//! }
//! let mut fields = Fields::default();
//! Decoder::strict().decode(&block, 1_000, &mut fields)?;
//! let (mut cookie, mut buffer) = (Vec::new(), FieldBuffer::new());
//! let head = request(&fields, true, &mut cookie, &mut buffer)?;
//! assert_eq!((head.request.method, head.request.host, head.request.path), ("GET", "api.example", "/v1"));
//! # Ok::<(), palisade_protocols::http2::ParseError>(())
//! ```

pub mod encode;
mod fields;
mod frame;
mod head;
mod hpack;
mod huffman;

pub use fields::Fields;
pub use frame::{
    FrameHeader, Frames, HEADER_LENGTH, PREFACE, Piece, Settings, flags, fragment_of, headers_of, kind,
    setting,
};
pub use head::{FieldBuffer, RequestHead, ResponseHead, request, response, trailers};
pub use hpack::{Decoder, SizeUpdates, TABLE_SIZE};

use strum::{Display, IntoStaticStr, VariantArray};

/// Error codes of RST_STREAM and GOAWAY frames (RFC 9113, section 7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ErrorCode {
    /// Not the result of an error.
    NoError = 0,
    /// Protocol error without a code of its own.
    ProtocolError = 1,
    /// Unexpected internal error.
    InternalError = 2,
    /// The peer violated flow control.
    FlowControlError = 3,
    /// A frame for a closed stream.
    StreamClosed = 5,
    /// A frame with an invalid size.
    FrameSizeError = 6,
    /// The stream was refused before any processing, so the client may retry the request.
    RefusedStream = 7,
    /// The stream is not needed any longer.
    Cancel = 8,
    /// The state of header compression cannot be maintained.
    CompressionError = 9,
    /// The peer generates excessive load.
    EnhanceYourCalm = 11,
}

/// The reason why a stream or a connection is refused. Each reason has a counter of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Display, IntoStaticStr, VariantArray)]
pub enum ParseError {
    /// The client does not begin with the preface of RFC 9113, section 3.4.
    #[strum(serialize = "no HTTP/2 preface")]
    Preface,
    /// The first frame of a peer is not SETTINGS (RFC 9113, section 3.4).
    #[strum(serialize = "first frame is not SETTINGS")]
    NoSettings,
    /// A frame longer than the announced maximum, or with a length that its type does not permit.
    #[strum(serialize = "invalid frame size")]
    FrameSize,
    /// A frame on a stream on which its type is not permitted, or on stream 0.
    #[strum(serialize = "frame on a stream that its type does not permit")]
    FrameStream,
    /// Padding that is longer than the frame (RFC 9113, section 6.1).
    #[strum(serialize = "padding exceeds the frame")]
    Padding,
    /// A setting with an invalid value (RFC 9113, section 6.5.2).
    #[strum(serialize = "invalid value of a setting")]
    Setting,
    /// An acknowledgement of SETTINGS that were not sent.
    #[strum(serialize = "SETTINGS acknowledgement without SETTINGS")]
    SettingsAck,
    /// A WINDOW_UPDATE with an increment of 0.
    #[strum(serialize = "window increment of 0")]
    Increment,
    /// DATA that exceeds the flow-control window of the connection.
    #[strum(serialize = "DATA exceeds the flow-control window")]
    Window,
    /// A new stream with an even identifier, or with one that is not higher than the identifiers before.
    #[strum(serialize = "invalid stream identifier")]
    StreamId,
    /// A frame other than HEADERS or PRIORITY on an idle stream.
    #[strum(serialize = "frame on an idle stream")]
    IdleStream,
    /// HEADERS or DATA on a stream that the sender has ended.
    #[strum(serialize = "frame on a closed stream")]
    ClosedStream,
    /// A stream that depends on itself (RFC 7540, section 5.3.1).
    #[strum(serialize = "stream depends on itself")]
    Dependency,
    /// A header block that another frame interrupts, or a CONTINUATION without a header block.
    #[strum(serialize = "unexpected or missing CONTINUATION")]
    Continuation,
    /// A header block that is too long, or has too many CONTINUATION frames.
    #[strum(serialize = "header block too long")]
    BlockTooLong,
    /// A header block that cannot be decoded.
    #[strum(serialize = "malformed header block")]
    Hpack,
    /// A header block without the size update that must follow a reduction of SETTINGS_HEADER_TABLE_SIZE (RFC 9113,
    /// section 4.3.1), or with a size update beyond the setting.
    #[strum(serialize = "missing or invalid table size update")]
    TableSize,
    /// A PUSH_PROMISE. Server push is switched off by SETTINGS.
    #[strum(serialize = "PUSH_PROMISE")]
    Push,
    /// A header list longer than the limit.
    #[strum(serialize = "header list too long")]
    ListTooLong,
    /// A path longer than the limit.
    #[strum(serialize = "path too long")]
    PathTooLong,
    /// A malformed field name, or one with an upper-case letter (RFC 9113, section 8.2).
    #[strum(serialize = "malformed field name")]
    FieldName,
    /// A field value with a control character, or with white space at its start or end.
    #[strum(serialize = "malformed field value")]
    FieldValue,
    /// A connection-specific field (RFC 9113, section 8.2.2).
    #[strum(serialize = "connection-specific field")]
    ConnectionField,
    /// A field name such as `content_length`, which some servers read as a field that frames or routes the message.
    #[strum(serialize = "field name that some servers read as a framing header")]
    DisguisedName,
    /// A pseudo-header field that is missing, repeated, misplaced or undefined (RFC 9113, section 8.3).
    #[strum(serialize = "missing, repeated or invalid pseudo-header field")]
    PseudoHeader,
    /// A malformed method, or a misspelt HEAD or CONNECT.
    #[strum(serialize = "malformed method")]
    Method,
    /// A malformed path.
    #[strum(serialize = "malformed path")]
    Path,
    /// A scheme other than `http` and `https`.
    #[strum(serialize = "scheme other than http and https")]
    Scheme,
    /// A malformed `:authority` or Host, or neither of both.
    #[strum(serialize = "malformed or missing authority")]
    Authority,
    /// `:authority` and Host differ, or there are several Hosts.
    #[strum(serialize = "authority and Host disagree")]
    HostDiffers,
    /// A Content-Length that is malformed, repeated, or differs from the length of the DATA frames.
    #[strum(serialize = "Content-Length is malformed or differs from the content")]
    ContentLength,
    /// An Expect other than a single `100-continue` (RFC 9110, section 10.1.1).
    #[strum(serialize = "Expect other than 100-continue")]
    Expect,
    /// A trailer field that is not allowed in trailers, or trailers that do not end the stream.
    #[strum(serialize = "malformed trailers")]
    Trailers,
    /// A body in a request whose method defines no use of a body; many servers do not read such a body.
    #[strum(serialize = "body of a method without a body")]
    UnexpectedBody,
    /// An extended CONNECT to a protocol that carries requests which are not inspected.
    #[strum(serialize = "CONNECT to a protocol that is not inspected")]
    Protocol,
    /// HEADERS, DATA or a reset of the server on a stream that the client has not opened.
    #[strum(serialize = "response without a request")]
    Unsolicited,
    /// More streams at the same time than permitted.
    #[strum(serialize = "too many concurrent streams")]
    TooManyStreams,
    /// The client resets streams too fast (CVE-2023-44487).
    #[strum(serialize = "too many resets")]
    TooManyResets,
    /// The client opens denied streams too fast.
    #[strum(serialize = "too many denied requests")]
    TooManyDenied,
    /// Too many frames that carry no content: PING, SETTINGS, WINDOW_UPDATE, empty DATA.
    #[strum(serialize = "too many frames without content")]
    TooManyFrames,
    /// Too many bytes wait for the end of a DATA frame of the other peer.
    #[strum(serialize = "too many bytes wait for a frame to end")]
    Backlog,
}

impl ParseError {
    /// All reasons, in the order of their discriminants.
    pub const ALL: &[Self] = Self::VARIANTS;

    /// Returns the text of the reason, as logs and metrics show it.
    #[must_use]
    pub fn text(self) -> &'static str {
        self.into()
    }

    /// Returns the error code that tells a peer the reason.
    #[must_use]
    pub const fn code(self) -> ErrorCode {
        match self {
            Self::FrameSize => ErrorCode::FrameSizeError,
            Self::Window => ErrorCode::FlowControlError,
            Self::ClosedStream => ErrorCode::StreamClosed,
            Self::Hpack | Self::TableSize => ErrorCode::CompressionError,
            Self::TooManyStreams => ErrorCode::RefusedStream,
            Self::BlockTooLong
            | Self::ListTooLong
            | Self::TooManyResets
            | Self::TooManyDenied
            | Self::TooManyFrames
            | Self::Backlog => ErrorCode::EnhanceYourCalm,
            _ => ErrorCode::ProtocolError,
        }
    }
}

impl std::error::Error for ParseError {}

#[cfg(test)]
mod tests;
