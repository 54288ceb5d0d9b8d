//! DNS messages (RFC 1035), as far as a firewall must understand them.
//!
//! A [`Query`] is what a client asks: exactly one question. An [`Answer`] is what a resolver says about the name
//! that was asked: the records of the answer section that the question reaches through aliases, and nothing of
//! the authority or additional section, which a resolver may fill with whatever it likes.
//!
//! The parsers take a message whole or refuse it: all sections are walked to the last byte, so that nobody reads
//! in it what was not read here.

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

/// Length of the fixed header (RFC 1035, 4.1.1).
pub const HEADER_LEN: usize = 12;

/// Resource record types that are told apart here.
pub mod rtype {
    /// IPv4 address, RFC 1035.
    pub const A: u16 = 1;
    /// Alias, RFC 1035.
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
    /// All kinds that the server has at hand, RFC 8482.
    pub const ANY: u16 = 255;

    /// The name that people and flow clients know a type by; `None` for one without a name here.
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
