//! TLS as far as it can be read without keys: the ClientHello, and whether the server asks for another.
//!
//! [`ClientReader`] takes the bytes of the client's side of a connection and gives its hello once that is complete,
//! however many records and segments it is spread over. [`ServerReader`] takes the server's side and says whether its
//! first message leaves room for a second hello. Neither copies more than one hello, and both refuse what two
//! readers could read differently: hidden bytes behind a hello, records of another kind between its parts, an
//! extension that stands twice.
//!
//! RFC 8446 (TLS 1.3), RFC 5246 (TLS 1.2), RFC 6066 (server names), RFC 9849 (ECH).

mod hello;
mod record;

pub use hello::{ClientHello, ServerName};
pub use record::{ClientReader, ClientStep, ServerReader, ServerStep};

use std::fmt;

/// Longest ClientHello that is read, bytes. Post-quantum key shares make one of about 1,800; some thousand of
/// padding or tickets may come on top. The protocol itself allows 16 MiB.
pub const MAX_HELLO: usize = 16_384;

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
    /// The first bytes are no TLS record.
    NotTls = "not TLS";
    /// A hello in the form of SSL 2 (RFC 6101, appendix E.1).
    Ssl2 = "hello in the form of SSL 2";
    /// A record of more than 2^14 bytes (RFC 8446, 5.1).
    RecordTooLong = "record too long";
    /// A handshake record without content (RFC 8446, 5.1).
    EmptyRecord = "handshake record without content";
    /// A record of another kind before the hello is complete (RFC 8446, 5.1).
    Interleaved = "record of another kind within the hello";
    /// A handshake message that is no hello where one must be.
    NotHello = "handshake message other than a hello";
    /// Longer than [`MAX_HELLO`].
    HelloTooLong = "hello too long";
    /// Bytes behind the hello in its last record: a message that nobody read.
    Trailing = "bytes behind the hello in its record";
    /// A length that does not fit, a vector that is cut short or empty where it may not be.
    Malformed = "malformed hello";
    /// An extension twice (RFC 8446, 4.2).
    DuplicateExtension = "extension twice";
    /// More than one server name, or one of an unknown kind (RFC 6066, 3).
    SeveralNames = "several server names";
    /// A server name that is no name: empty, too long, or of bytes that no host name has.
    BadName = "malformed server name";
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl std::error::Error for ParseError {}

#[cfg(test)]
mod tests;
