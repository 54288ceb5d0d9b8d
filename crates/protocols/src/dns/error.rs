//! Why a DNS message is refused, and which response code says so.

use std::fmt;

use super::Rcode;

macro_rules! parse_errors {
    ($($(#[$doc:meta])* $name:ident = $text:literal $(=> $rcode:ident)?;)*) => {
        /// Why a message was not taken. Each kind is a counter of its own.
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

            /// What to answer to a query that was refused so; `None`: it is not worth an answer, drop it.
            #[must_use]
            pub const fn rcode(self) -> Option<Rcode> {
                #[allow(unused_mut, unused_assignments, reason = "most kinds have no answer")]
                match self {
                    $(Self::$name => {
                        let mut rcode = None;
                        $(rcode = Some(Rcode::$rcode);)?
                        rcode
                    })*
                }
            }
        }
    };
}

parse_errors! {
    /// Shorter than a header.
    Short = "message shorter than its header";
    /// Longer than [`super::Limits::message`].
    TooLong = "message too long";
    /// A query where an answer must be, or the other way round.
    WrongDirection = "QR bit does not fit the direction";
    /// An opcode other than QUERY (NOTIFY, UPDATE, DSO, ...).
    Opcode = "opcode other than QUERY" => NotImp;
    /// No question.
    NoQuestion = "no question" => FormErr;
    /// More than one question: nobody agrees on what that means.
    ManyQuestions = "more than one question" => FormErr;
    /// A query that carries answers, or an authority section outside an incremental zone transfer.
    RecordsInQuery = "query with records that no query has" => FormErr;
    /// More records than [`super::Limits::records`].
    TooManyRecords = "too many records";
    /// The message ends inside a name, a record or a question.
    Truncated = "message ends within a record";
    /// Bytes after the last record.
    TrailingBytes = "bytes after the last record";
    /// A label type other than literal and pointer (RFC 6891, 5: extended labels are obsolete).
    LabelType = "unknown label type";
    /// A name of more than 255 bytes.
    NameTooLong = "name longer than 255 bytes";
    /// A compression pointer that does not point to an earlier name: a loop, or into the header.
    BadPointer = "compression pointer that does not point backwards";
    /// More compression pointers in a message than [`super::Limits::pointers`].
    TooManyPointers = "too many compression pointers";
    /// A, AAAA or CNAME data whose length does not fit.
    BadRdata = "record data of the wrong length";
    /// SVCB or HTTPS parameters that are malformed (RFC 9460, 2.2).
    BadSvcParams = "malformed service parameters";
    /// A second OPT record, or one that does not stand at the root, or options that do not fit (RFC 6891, 6.1.1).
    BadOpt = "malformed EDNS record";
    /// More than sixteen CNAME records.
    TooManyAliases = "too many aliases";
    /// Aliases in a circle.
    AliasLoop = "aliases in a circle";
    /// A TCP message of less than a header.
    BadTcpLength = "TCP length prefix shorter than a header";
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl std::error::Error for ParseError {}
