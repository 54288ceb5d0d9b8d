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

use strum::{Display, IntoStaticStr, VariantArray};

/// Longest ClientHello that is read, bytes. Post-quantum key shares make one of about 1,800; some thousand of
/// padding or tickets may come on top. The protocol itself allows 16 MiB.
pub const MAX_HELLO: usize = 16_384;

/// The reason why a stream is refused. Each has a counter of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Display, IntoStaticStr, VariantArray)]
pub enum ParseError {
    /// The first bytes are no TLS record.
    #[strum(serialize = "not TLS")]
    NotTls,
    /// A hello in the form of SSL 2 (RFC 6101, appendix E.1).
    #[strum(serialize = "hello in the form of SSL 2")]
    Ssl2,
    /// A record of more than 2^14 bytes (RFC 8446, 5.1).
    #[strum(serialize = "record too long")]
    RecordTooLong,
    /// A handshake record without content (RFC 8446, 5.1).
    #[strum(serialize = "handshake record without content")]
    EmptyRecord,
    /// A record of another kind before the hello is complete (RFC 8446, 5.1).
    #[strum(serialize = "record of another kind within the hello")]
    Interleaved,
    /// A handshake message that is no hello where one must be.
    #[strum(serialize = "handshake message other than a hello")]
    NotHello,
    /// Longer than [`MAX_HELLO`].
    #[strum(serialize = "hello too long")]
    HelloTooLong,
    /// Bytes behind the hello in its last record: a message that nobody read.
    #[strum(serialize = "bytes behind the hello in its record")]
    Trailing,
    /// A length that does not fit, a vector that is cut short or empty where it may not be.
    #[strum(serialize = "malformed hello")]
    Malformed,
    /// An extension twice (RFC 8446, 4.2).
    #[strum(serialize = "extension twice")]
    DuplicateExtension,
    /// More than one server name, or one of an unknown kind (RFC 6066, 3).
    #[strum(serialize = "several server names")]
    SeveralNames,
    /// A server name that is no name: empty, too long, or of bytes that no host name has.
    #[strum(serialize = "malformed server name")]
    BadName,
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
