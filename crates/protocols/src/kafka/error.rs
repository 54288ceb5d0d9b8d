//! Reasons to refuse a Kafka stream.

use strum::{Display, IntoStaticStr, VariantArray};

/// The reason why a stream is refused. Each reason has a counter of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Display, IntoStaticStr, VariantArray)]
pub enum ParseError {
    /// A size that no Kafka message has: the stream is TLS, HTTP or another protocol.
    #[strum(serialize = "not Kafka")]
    NotKafka,
    /// A request whose topics get a verdict and that is longer than the limit.
    #[strum(serialize = "request too long")]
    TooLong,
    /// The message ends within a field.
    #[strum(serialize = "message ends within a field")]
    Truncated,
    /// Bytes after the last field.
    #[strum(serialize = "bytes after the last field")]
    TrailingBytes,
    /// A negative length, or null where the field must have a value.
    #[strum(serialize = "length that the field cannot have")]
    Length,
    /// A varint of more than 32 bits.
    #[strum(serialize = "varint of more than 32 bits")]
    Varint,
    /// Tagged fields that do not increase.
    #[strum(serialize = "tagged fields out of order")]
    Tags,
    /// An API key or version whose fields are not known.
    #[strum(serialize = "unknown API key or version")]
    Unknown,
    /// A response without a request, or with the correlation id of another one.
    #[strum(serialize = "response without its request")]
    Unsolicited,
    /// The stream ends within a message.
    #[strum(serialize = "stream ends within a message")]
    StreamEnds,
}

impl ParseError {
    /// All reasons, in the order of their counters.
    pub const ALL: &'static [Self] = Self::VARIANTS;

    /// Returns the reason as text.
    #[must_use]
    pub fn text(self) -> &'static str {
        self.into()
    }
}
