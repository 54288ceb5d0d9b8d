//! Parser of HTTP/1.0 and HTTP/1.1 messages (RFC 9110, RFC 9112): heads and the framing of bodies.
//!
//! [`Head`] finds the end of a head in a stream of segments. [`Request`] and [`Response`] parse a complete head.
//! [`Chunks`] finds the end of a chunked body. [`resolved`] removes dot segments and escapes from a path as a server
//! would. [`re2`] compiles the regular expressions of HTTP rules.
//!
//! If the inspector and the server disagreed about where a message ends, the client could hide a request from the
//! inspector (request smuggling). So ambiguous messages are refused, even where an RFC lets the recipient repair them.
//!
//! ```
//! use palisade_protocols::http1::{Body, Head, HeaderBuffer, Limits, ParseError, Request};
//!
//! let stream = b"GET /v1?a=b HTTP/1.1\r\nHost: api.example\r\n\r\nGET /next";
//! let mut head = Head::default();
//! assert_eq!(head.find(&stream[..30], &Limits::default())?, None);
//! let length = head.find(stream, &Limits::default())?.expect("the head is complete");
//!
//! let mut buffer = HeaderBuffer::new();
//! let request = Request::parse(&stream[..length], &mut buffer)?;
//! assert_eq!((request.method, request.host, request.path), ("GET", "api.example", "/v1?a=b"));
//! assert_eq!(request.body, Body::None);
//!
//! let folded = b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n";
//! assert_eq!(Head::default().find(folded, &Limits::default()), Err(ParseError::Folding));
//! # Ok::<(), ParseError>(())
//! ```

mod chunked;
mod head;
mod message;
mod path;
pub mod re2;

pub(crate) use chunked::NO_TRAILERS;
pub use chunked::{Boundary, Chunks, Piece};
pub(crate) use head::{Folded, is_token};
pub use head::{Head, Limits, TrailerNames};
pub use message::{Body, HeaderBuffer, Headers, MAX_HEADERS, Request, Response, Target};
pub(crate) use message::{FRAMING, is_authority};
pub use path::{PathError, resolved};

use strum::{Display, IntoStaticStr, VariantArray};

/// The reason why a stream is refused. Each reason has a counter of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Display, IntoStaticStr, VariantArray)]
pub enum ParseError {
    /// The first bytes are not HTTP.
    #[strum(serialize = "not HTTP")]
    NotHttp,
    /// The connection preface of HTTP/2 (RFC 9113, section 3.4).
    #[strum(serialize = "HTTP/2 preface")]
    Http2,
    /// A CR without LF, or an LF without CR (RFC 9112, section 2.2).
    #[strum(serialize = "bare CR or LF")]
    BareLineEnd,
    /// A NUL or another control character.
    #[strum(serialize = "control character in a head")]
    ControlCharacter,
    /// A line that starts with white space: obsolete line folding (RFC 9112, section 5.2).
    #[strum(serialize = "folded header line")]
    Folding,
    /// A malformed field name, for example with white space before its colon (RFC 9112, section 5.1).
    #[strum(serialize = "malformed header name")]
    BadName,
    /// A malformed request or status line, or a request line with white space other than two single spaces.
    #[strum(serialize = "malformed start line")]
    BadStartLine,
    /// A version other than 1.0 and 1.1.
    #[strum(serialize = "version other than HTTP/1.0 and 1.1")]
    Version,
    /// A first line longer than [`Limits::line`].
    #[strum(serialize = "start line too long")]
    StartLineTooLong,
    /// A field longer than [`Limits::line`].
    #[strum(serialize = "line too long")]
    LineTooLong,
    /// A head longer than [`Limits::block`], or a trailer section that is too long.
    #[strum(serialize = "head too long")]
    HeadTooLong,
    /// A field name such as `Transfer_Encoding`, which some servers read as a field that frames or routes the message.
    #[strum(serialize = "header name that some servers read as a framing header")]
    DisguisedName,
    /// A `Connection` field that makes a proxy remove a field that frames or routes the message.
    #[strum(serialize = "Connection names a framing header")]
    BadConnection,
    /// An Expect other than a single `100-continue` (RFC 9110, section 10.1.1).
    #[strum(serialize = "Expect other than 100-continue")]
    BadExpect,
    /// A body that follows the final response to a request with `Expect`. The server can read the body as the next
    /// request.
    #[strum(serialize = "body after the final response to Expect")]
    LateBody,
    /// A body in a request whose method defines no use of a body; many servers do not read such a body.
    #[strum(serialize = "body of a method without a body")]
    UnexpectedBody,
    /// More fields than [`MAX_HEADERS`].
    #[strum(serialize = "too many headers")]
    TooManyHeaders,
    /// Content-Length together with Transfer-Encoding (RFC 9112, section 6.1).
    #[strum(serialize = "Content-Length with Transfer-Encoding")]
    LengthAndEncoding,
    /// A Content-Length that is not a number, or more than one Content-Length.
    #[strum(serialize = "malformed or repeated Content-Length")]
    BadLength,
    /// A Transfer-Encoding other than a single `chunked`, or any Transfer-Encoding in HTTP/1.0.
    #[strum(serialize = "Transfer-Encoding other than chunked")]
    BadEncoding,
    /// An HTTP/1.1 request without Host (RFC 9112, section 3.2).
    #[strum(serialize = "no Host")]
    NoHost,
    /// More than one Host.
    #[strum(serialize = "several Hosts")]
    SeveralHosts,
    /// A Host that is not a host with an optional port.
    #[strum(serialize = "malformed Host")]
    BadHost,
    /// A request target whose host differs from the Host field.
    #[strum(serialize = "target and Host disagree")]
    HostDiffers,
    /// A malformed request target, or one in a form that its method does not have (RFC 9112, section 3.2).
    #[strum(serialize = "malformed request target")]
    BadTarget,
    /// A malformed chunk size, chunk extension or line end, or a chunk that is too large.
    #[strum(serialize = "malformed chunk size")]
    BadChunk,
    /// A trailer field that is malformed or not allowed in trailers (RFC 9110, section 6.5.1).
    #[strum(serialize = "field that is not allowed in a trailer")]
    BadTrailer,
}

impl ParseError {
    /// All reasons, in the order of their discriminants.
    pub const ALL: &[Self] = Self::VARIANTS;

    /// Returns the text of the reason, as logs and metrics show it.
    #[must_use]
    pub fn text(self) -> &'static str {
        self.into()
    }
}

impl std::error::Error for ParseError {}

#[cfg(test)]
mod tests;
