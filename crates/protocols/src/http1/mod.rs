//! HTTP/1.0 and HTTP/1.1 messages (RFC 9110, RFC 9112): where a head ends, what it says, how its body is framed.
//!
//! [`Head`] looks for the end of a head in a stream, wherever that is cut, and refuses on the way what two readers
//! could read differently. [`Request`] and [`Response`] are what a whole head says. [`Chunks`] follows a chunked body.
//! [`resolved`] is a path as a server would resolve it.
//!
//! A firewall that reads a message in another way than the server behind it is no firewall. So everything
//! ambiguous is refused, also where the RFC lets a recipient repair it.

mod chunked;
mod head;
mod message;

pub use chunked::{Chunks, Piece};
pub use head::{Head, Limits};
pub use message::{Body, HeaderBuffer, Headers, MAX_HEADERS, Request, Response, Target};
pub use palisade_policy::path::{PathError, resolved};

use strum::{Display, IntoStaticStr, VariantArray};

/// The reason why a stream is refused. Each has a counter of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Display, IntoStaticStr, VariantArray)]
pub enum ParseError {
    /// The first bytes are no HTTP.
    #[strum(serialize = "not HTTP")]
    NotHttp,
    /// The preface of HTTP/2 (RFC 9113, 3.4).
    #[strum(serialize = "HTTP/2 preface")]
    Http2,
    /// A carriage return that no line feed follows, or a line feed without one (RFC 9112, 2.2).
    #[strum(serialize = "bare CR or LF")]
    BareLineEnd,
    /// A NUL or another control character.
    #[strum(serialize = "control character in a head")]
    ControlCharacter,
    /// A line that begins with white space: folding (RFC 9112, 5.2).
    #[strum(serialize = "folded header line")]
    Folding,
    /// White space between a field's name and its colon (RFC 9112, 5.1), or no colon at all.
    #[strum(serialize = "malformed header name")]
    BadName,
    /// A request or status line that is malformed, or has white space beside the single spaces.
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
    /// A head longer than [`Limits::block`].
    #[strum(serialize = "head too long")]
    HeadTooLong,
    /// A field that some servers read as one that frames or routes the message: `Transfer_Encoding`.
    #[strum(serialize = "header name that some servers read as a framing header")]
    DisguisedName,
    /// `Connection` names a field that frames or routes the message: a proxy would take it out.
    #[strum(serialize = "Connection names a framing header")]
    BadConnection,
    /// An Expect other than `100-continue` (RFC 9110, 10.1.1).
    #[strum(serialize = "Expect other than 100-continue")]
    BadExpect,
    /// A final answer came before any of the body that was announced with `Expect`: the receiver may take the body
    /// for a request.
    #[strum(serialize = "body behind the final answer to Expect")]
    LateBody,
    /// A body of a method whose body many servers do not read.
    #[strum(serialize = "body of a method that has none")]
    UnexpectedBody,
    /// More fields than [`MAX_HEADERS`].
    #[strum(serialize = "too many headers")]
    TooManyHeaders,
    /// Content-Length beside Transfer-Encoding (RFC 9112, 6.1).
    #[strum(serialize = "Content-Length with Transfer-Encoding")]
    LengthAndEncoding,
    /// A Content-Length that is no number, or several of them.
    #[strum(serialize = "malformed or repeated Content-Length")]
    BadLength,
    /// A Transfer-Encoding other than a single `chunked`, or one in HTTP/1.0.
    #[strum(serialize = "Transfer-Encoding other than chunked")]
    BadEncoding,
    /// A request of HTTP/1.1 without Host (RFC 9112, 3.2).
    #[strum(serialize = "no Host")]
    NoHost,
    /// More than one Host.
    #[strum(serialize = "several Hosts")]
    SeveralHosts,
    /// A Host that is no host.
    #[strum(serialize = "malformed Host")]
    BadHost,
    /// A target in absolute form that names another host than Host does.
    #[strum(serialize = "target and Host disagree")]
    HostDiffers,
    /// A target of no form that its method has (RFC 9112, 3.2).
    #[strum(serialize = "malformed request target")]
    BadTarget,
    /// A chunk size that is no number or is too large, or a malformed chunk extension.
    #[strum(serialize = "malformed chunk size")]
    BadChunk,
    /// A field in a trailer that frames or routes a message (RFC 9110, 6.5.1), or is malformed.
    #[strum(serialize = "trailer that may not be one")]
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
