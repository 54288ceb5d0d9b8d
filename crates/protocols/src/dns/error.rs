//! Reasons to refuse a DNS message, and the response code for each.

use strum::{Display, IntoStaticStr, VariantArray};

use super::rcode::Rcode;

/// The reason why a message is refused. Each reason has a counter of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Display, IntoStaticStr, VariantArray)]
pub enum ParseError {
    /// Shorter than a header.
    #[strum(serialize = "message shorter than its header")]
    Short,
    /// Longer than [`super::Limits::message`] or than a limit of the caller.
    #[strum(serialize = "message too long")]
    TooLong,
    /// A query where an answer is expected, or an answer where a query is expected.
    #[strum(serialize = "QR bit does not fit the direction")]
    WrongDirection,
    /// An opcode other than QUERY (NOTIFY, UPDATE, DSO, ...).
    #[strum(serialize = "opcode other than QUERY")]
    Opcode,
    /// No question.
    #[strum(serialize = "no question")]
    NoQuestion,
    /// More than one question. Servers differ in which of them they answer (RFC 9619).
    #[strum(serialize = "more than one question")]
    ManyQuestions,
    /// A query with an answer section, or with an authority section unless it requests an incremental zone transfer.
    #[strum(serialize = "query with answer or authority records")]
    RecordsInQuery,
    /// More records than [`super::Limits::records`].
    #[strum(serialize = "too many records")]
    TooManyRecords,
    /// The message ends within a name, a record or a question.
    #[strum(serialize = "message ends within a record")]
    Truncated,
    /// Bytes after the last record.
    #[strum(serialize = "bytes after the last record")]
    TrailingBytes,
    /// A label type other than literal and pointer. Extended labels are obsolete (RFC 6891, section 5).
    #[strum(serialize = "unknown label type")]
    LabelType,
    /// A name of more than 255 bytes.
    #[strum(serialize = "name longer than 255 bytes")]
    NameTooLong,
    /// A compression pointer into the header, or one that does not point backwards and so could form a loop.
    #[strum(serialize = "compression pointer that does not point backwards")]
    BadPointer,
    /// More compression pointers to follow than [`super::Limits::pointers`].
    #[strum(serialize = "too many compression pointers")]
    TooManyPointers,
    /// A, AAAA or CNAME data of the wrong length.
    #[strum(serialize = "record data of the wrong length")]
    BadRdata,
    /// Malformed SVCB or HTTPS parameters (RFC 9460, section 2.2).
    #[strum(serialize = "malformed service parameters")]
    BadSvcParams,
    /// A malformed or misplaced OPT record (RFC 6891, section 6.1.1).
    #[strum(serialize = "malformed EDNS record")]
    BadOpt,
    /// More than sixteen CNAME records.
    #[strum(serialize = "too many aliases")]
    TooManyAliases,
    /// A loop of CNAME records.
    #[strum(serialize = "loop of aliases")]
    AliasLoop,
    /// A length prefix of DNS over TCP that is shorter than a DNS header.
    #[strum(serialize = "TCP length prefix shorter than a header")]
    BadTcpLength,
}

impl ParseError {
    /// All reasons, in the order of their discriminants.
    pub const ALL: &[Self] = Self::VARIANTS;

    /// Returns the text of the reason, as logs and metrics show it.
    #[must_use]
    pub fn text(self) -> &'static str {
        self.into()
    }

    /// Returns the response code for a query that is refused for this reason; `None` if the query must be dropped
    /// without a response.
    #[must_use]
    pub const fn rcode(self) -> Option<Rcode> {
        match self {
            Self::Opcode => Some(Rcode::NotImp),
            Self::NoQuestion | Self::ManyQuestions | Self::RecordsInQuery => Some(Rcode::FormErr),
            _ => None,
        }
    }
}

impl std::error::Error for ParseError {}
