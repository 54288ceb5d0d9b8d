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

use std::fmt;

macro_rules! parse_errors {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// Why a stream was not taken. Each kind is a counter of its own.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum ParseError {
            $($(#[$doc])* $name,)*
        }

        impl ParseError {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The text that people read.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

parse_errors! {
    /// The first bytes are no HTTP.
    NotHttp = "not HTTP";
    /// The preface of HTTP/2 (RFC 9113, 3.4).
    Http2 = "HTTP/2 preface";
    /// A carriage return that no line feed follows, or a line feed without one (RFC 9112, 2.2).
    BareLineEnd = "bare CR or LF";
    /// A NUL or another control character.
    ControlCharacter = "control character in a head";
    /// A line that begins with white space: folding (RFC 9112, 5.2).
    Folding = "folded header line";
    /// White space between a field's name and its colon (RFC 9112, 5.1), or no colon at all.
    BadName = "malformed header name";
    /// A request or status line that is malformed, or has white space beside the single spaces.
    BadStartLine = "malformed start line";
    /// A version other than 1.0 and 1.1.
    Version = "version other than HTTP/1.0 and 1.1";
    /// A first line longer than [`Limits::line`].
    StartLineTooLong = "start line too long";
    /// A field longer than [`Limits::line`].
    LineTooLong = "line too long";
    /// A head longer than [`Limits::block`].
    HeadTooLong = "head too long";
    /// A field that some servers read as one that frames or routes the message: `Transfer_Encoding`.
    DisguisedName = "header name that some servers read as a framing header";
    /// `Connection` names a field that frames or routes the message: a proxy would take it out.
    BadConnection = "Connection names a framing header";
    /// An Expect other than `100-continue` (RFC 9110, 10.1.1).
    BadExpect = "Expect other than 100-continue";
    /// A final answer came before any of the body that was announced with `Expect`: the receiver may take the body
    /// for a request.
    LateBody = "body behind the final answer to Expect";
    /// A body of a method whose body many servers do not read.
    UnexpectedBody = "body of a method that has none";
    /// More fields than [`MAX_HEADERS`].
    TooManyHeaders = "too many headers";
    /// Content-Length beside Transfer-Encoding (RFC 9112, 6.1).
    LengthAndEncoding = "Content-Length with Transfer-Encoding";
    /// A Content-Length that is no number, or several of them.
    BadLength = "malformed or repeated Content-Length";
    /// A Transfer-Encoding other than a single `chunked`, or one in HTTP/1.0.
    BadEncoding = "Transfer-Encoding other than chunked";
    /// A request of HTTP/1.1 without Host (RFC 9112, 3.2).
    NoHost = "no Host";
    /// More than one Host.
    SeveralHosts = "several Hosts";
    /// A Host that is no host.
    BadHost = "malformed Host";
    /// A target in absolute form that names another host than Host does.
    HostDiffers = "target and Host disagree";
    /// A target of no form that its method has (RFC 9112, 3.2).
    BadTarget = "malformed request target";
    /// A chunk size that is no number or is too large, or a malformed chunk extension.
    BadChunk = "malformed chunk size";
    /// A field in a trailer that frames or routes a message (RFC 9110, 6.5.1), or is malformed.
    BadTrailer = "trailer that may not be one";
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl std::error::Error for ParseError {}

#[cfg(test)]
mod tests;
