//! Why a DNS message is refused, and which response code says so.

use strum::{Display, IntoStaticStr, VariantArray};

use super::rcode::Rcode;

/// The reason why a message is refused. Each has a counter of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Display, IntoStaticStr, VariantArray)]
pub enum ParseError {
    /// Shorter than a header.
    #[strum(serialize = "message shorter than its header")]
    Short,
    /// Longer than [`super::Limits::message`].
    #[strum(serialize = "message too long")]
    TooLong,
    /// A query where an answer must be, or the other way round.
    #[strum(serialize = "QR bit does not fit the direction")]
    WrongDirection,
    /// An opcode other than QUERY (NOTIFY, UPDATE, DSO, ...).
    #[strum(serialize = "opcode other than QUERY")]
    Opcode,
    /// No question.
    #[strum(serialize = "no question")]
    NoQuestion,
    /// More than one question: nobody agrees on what that means.
    #[strum(serialize = "more than one question")]
    ManyQuestions,
    /// A query that carries answers, or an authority section outside an incremental zone transfer.
    #[strum(serialize = "query with records that no query has")]
    RecordsInQuery,
    /// More records than [`super::Limits::records`].
    #[strum(serialize = "too many records")]
    TooManyRecords,
    /// The message ends inside a name, a record or a question.
    #[strum(serialize = "message ends within a record")]
    Truncated,
    /// Bytes after the last record.
    #[strum(serialize = "bytes after the last record")]
    TrailingBytes,
    /// A label type other than literal and pointer (RFC 6891, 5: extended labels are obsolete).
    #[strum(serialize = "unknown label type")]
    LabelType,
    /// A name of more than 255 bytes.
    #[strum(serialize = "name longer than 255 bytes")]
    NameTooLong,
    /// A compression pointer that does not point to an earlier name: a loop, or into the header.
    #[strum(serialize = "compression pointer that does not point backwards")]
    BadPointer,
    /// More compression pointers in a message than [`super::Limits::pointers`].
    #[strum(serialize = "too many compression pointers")]
    TooManyPointers,
    /// A, AAAA or CNAME data whose length does not fit.
    #[strum(serialize = "record data of the wrong length")]
    BadRdata,
    /// SVCB or HTTPS parameters that are malformed (RFC 9460, 2.2).
    #[strum(serialize = "malformed service parameters")]
    BadSvcParams,
    /// A second OPT record, or one that does not stand at the root, or options that do not fit (RFC 6891, 6.1.1).
    #[strum(serialize = "malformed EDNS record")]
    BadOpt,
    /// More than sixteen CNAME records.
    #[strum(serialize = "too many aliases")]
    TooManyAliases,
    /// Aliases in a circle.
    #[strum(serialize = "aliases in a circle")]
    AliasLoop,
    /// A TCP message of less than a header.
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
