//! Response codes (RFC 1035, section 4.1.1).

/// Response code of a response that Palisade generates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Rcode {
    /// The query was malformed.
    FormErr = 1,
    /// The server failed.
    ServFail = 2,
    /// The name does not exist.
    NxDomain = 3,
    /// The server does not implement the opcode.
    NotImp = 4,
    /// The policy denies the query.
    Refused = 5,
}
