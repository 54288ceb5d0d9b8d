//! DNS messages (RFC 1035), as far as a firewall must understand them.
//!
//! A [`Query`] has exactly one question. An [`Answer`] has the addresses that a resolver returns for the queried name:
//! the addresses in records of the answer section whose owner is that name or one of its aliases. If there are none and
//! the query is for A, AAAA or ANY, an answer has the addresses of the A and AAAA records with other owners. Addresses
//! in the authority and additional sections are ignored, because stub resolvers do not use them.
//!
//! The parsers check all sections up to the last byte. So an accepted message has no record that the parser has not
//! checked.
//!
//! ```
//! use palisade_protocols::dns::{Limits, ParseError, Query, Rcode, reply, rtype};
//!
//! // id 7, RD, one question: example.com A IN
//! let message = b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x07Example\x03com\0\0\x01\0\x01";
//! let query = Query::parse(message, &Limits::QUERY)?;
//! assert_eq!((query.id, query.question.rtype), (7, rtype::A));
//! assert_eq!(query.question.name, "example.com".parse()?);
//!
//! // A denied query gets a response that echoes the question.
//! let mut buffer = [0; 512];
//! let length = reply(message, Rcode::Refused, &mut buffer)?;
//! assert_eq!(buffer[3] & 15, Rcode::Refused as u8);
//! assert_eq!(buffer[12..length], message[12..]);
//!
//! assert_eq!(Query::parse(&message[..20], &Limits::QUERY), Err(ParseError::Truncated));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod error;
mod message;
mod name;
mod pattern;
mod rcode;
mod reply;
mod tcp;

pub use error::ParseError;
pub use message::{Address, Answer, Edns, Flags, Head, Limits, Query, Question, Source};
pub use name::{Labels, Name, NameError};
pub use pattern::{NameSet, PatternError};
pub use rcode::Rcode;
pub use reply::reply;
pub use tcp::first_message;

/// Length of the message header, bytes (RFC 1035, section 4.1.1).
pub const HEADER_LEN: usize = 12;

/// Resource record types.
pub mod rtype {
    /// IPv4 address, RFC 1035.
    pub const A: u16 = 1;
    /// Canonical name of an alias, RFC 1035.
    pub const CNAME: u16 = 5;
    /// Signature of a message, RFC 2931.
    pub const SIG: u16 = 24;
    /// IPv6 address, RFC 3596.
    pub const AAAA: u16 = 28;
    /// EDNS, RFC 6891.
    pub const OPT: u16 = 41;
    /// Service binding, RFC 9460.
    pub const SVCB: u16 = 64;
    /// Service binding of HTTP, RFC 9460.
    pub const HTTPS: u16 = 65;
    /// Signature of a transaction, RFC 8945.
    pub const TSIG: u16 = 250;
    /// Incremental zone transfer, RFC 1995.
    pub const IXFR: u16 = 251;
    /// Zone transfer, RFC 5936.
    pub const AXFR: u16 = 252;
    /// All types, RFC 8482.
    pub const ANY: u16 = 255;

    /// Returns the mnemonic of a type; `None` for a type that is not in this table.
    #[must_use]
    pub const fn name(rtype: u16) -> Option<&'static str> {
        Some(match rtype {
            A => "A",
            2 => "NS",
            CNAME => "CNAME",
            6 => "SOA",
            12 => "PTR",
            13 => "HINFO",
            15 => "MX",
            16 => "TXT",
            SIG => "SIG",
            AAAA => "AAAA",
            29 => "LOC",
            33 => "SRV",
            35 => "NAPTR",
            39 => "DNAME",
            OPT => "OPT",
            43 => "DS",
            44 => "SSHFP",
            46 => "RRSIG",
            47 => "NSEC",
            48 => "DNSKEY",
            50 => "NSEC3",
            52 => "TLSA",
            SVCB => "SVCB",
            HTTPS => "HTTPS",
            TSIG => "TSIG",
            IXFR => "IXFR",
            AXFR => "AXFR",
            255 => "ANY",
            257 => "CAA",
            _ => return None,
        })
    }
}

/// The class of the Internet, RFC 1035.
pub const CLASS_IN: u16 = 1;
