//! Parser of the unencrypted part of TLS handshakes: the ClientHello, and the server's first message.
//!
//! [`ClientReader`] assembles the ClientHello from any number of records and segments. [`ServerReader`] determines
//! whether the server requests a second ClientHello. Each reader buffers at most one handshake message. The readers
//! refuse streams that implementations could read in different ways: bytes after a ClientHello in the same record,
//! records of another type between fragments of a ClientHello, duplicate extensions.
//!
//! The specifications are RFC 8446 (TLS 1.3), RFC 5246 (TLS 1.2), RFC 6066 (server names) and RFC 9849 (ECH).
//!
//! ```
//! use palisade_protocols::tls::{ClientReader, ClientStep, ParseError};
//!
//! // The header of a handshake record arrives alone, so the reader needs more bytes.
//! let mut reader = ClientReader::default();
//! assert_eq!(reader.next(&mut &b"\x16\x03\x01\x01\x00"[..])?, ClientStep::More);
//!
//! // A stream that is not TLS is refused at its first byte.
//! assert_eq!(ClientReader::default().next(&mut &b"GET"[..]), Err(ParseError::NotTls));
//! # Ok::<(), ParseError>(())
//! ```

mod hello;
mod record;

pub use hello::{ClientHello, ServerName};
pub use record::{ClientReader, ClientStep, ServerReader, ServerStep};

use strum::{Display, IntoStaticStr, VariantArray};

/// Maximum length of a ClientHello, bytes. A ClientHello with post-quantum key shares has about 1,800 bytes; padding
/// and session tickets can add several thousand. The protocol allows 16 MiB.
pub const MAX_HELLO: usize = 16_384;

/// The reason why a stream is refused. Each reason has a counter of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Display, IntoStaticStr, VariantArray)]
pub enum ParseError {
    /// The first bytes are not a TLS record.
    #[strum(serialize = "not TLS")]
    NotTls,
    /// A ClientHello in SSL 2 format (RFC 6101, appendix E.1).
    #[strum(serialize = "hello in the form of SSL 2")]
    Ssl2,
    /// A record whose content is longer than 2^14 bytes (RFC 8446, section 5.1), or than 2^14 + 2,048 bytes if it is
    /// protected.
    #[strum(serialize = "record too long")]
    RecordTooLong,
    /// An empty record of a type other than application data (RFC 8446, section 5.1).
    #[strum(serialize = "handshake record without content")]
    EmptyRecord,
    /// A record that is not a handshake record, between the records of a second or later ClientHello (RFC 8446, section
    /// 5.1).
    #[strum(serialize = "record of another type within the hello")]
    Interleaved,
    /// A record that is not a handshake record, or a handshake message that is not a hello, where a hello is required.
    #[strum(serialize = "handshake message other than a hello")]
    NotHello,
    /// A ClientHello longer than [`MAX_HELLO`].
    #[strum(serialize = "hello too long")]
    HelloTooLong,
    /// Bytes after the hello in its last record: another message, which the parser would not check.
    #[strum(serialize = "bytes behind the hello in its record")]
    Trailing,
    /// A malformed hello, for example with a length that does not fit or with too many extensions.
    #[strum(serialize = "malformed hello")]
    Malformed,
    /// A duplicate extension (RFC 8446, section 4.2).
    #[strum(serialize = "duplicate extension")]
    DuplicateExtension,
    /// More than one server name, or a name of an unknown type (RFC 6066, section 3).
    #[strum(serialize = "several server names")]
    SeveralNames,
    /// A server name that is empty, too long, or has bytes that are not allowed in host names.
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
