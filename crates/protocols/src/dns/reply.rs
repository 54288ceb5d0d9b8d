//! Answers that are made here: REFUSED, NXDOMAIN, FORMERR, NOTIMP.

use super::{HEADER_LEN, Limits, ParseError, Query, message::Flags, name::MAX_NAME};

/// Response codes of answers that are made here (RFC 1035, 4.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Rcode {
    /// The query was malformed.
    FormErr = 1,
    /// Something failed inside.
    ServFail = 2,
    /// The name does not exist.
    NxDomain = 3,
    /// The opcode is not served.
    NotImp = 4,
    /// Policy says no.
    Refused = 5,
}

/// Length of the longest reply: header, question, EDNS.
const REPLY_MAX: usize = HEADER_LEN + MAX_NAME + 4 + OPT_LEN;
const OPT_LEN: usize = 11;
/// The UDP size that replies announce (DNS flag day 2020).
const UDP_PAYLOAD: u16 = 1232;

/// Makes the answer `rcode` to a query, into `out`; returns its length.
///
/// The question is echoed byte for byte (clients compare its case, too), EDNS is answered with EDNS
/// (RFC 6891, 7), the DO bit is copied (RFC 3225, 3). A query that was refused as malformed gets the header alone.
///
/// # Errors
/// If the message has no header of a query: there is nothing to answer. [`ParseError::TooLong`] if `out` is shorter
/// than the reply; 512 bytes always suffice.
pub fn reply(query: &[u8], rcode: Rcode, out: &mut [u8]) -> Result<usize, ParseError> {
    let Some(&[id0, id1, flags0, flags1, ..]) = query.first_chunk::<HEADER_LEN>() else {
        return Err(ParseError::Short);
    };
    let flags = Flags(u16::from_be_bytes([flags0, flags1]));
    if flags.response() {
        return Err(ParseError::WrongDirection);
    }
    let mut reply = [0; REPLY_MAX];
    let mut len = HEADER_LEN;
    let parsed = Query::parse(query, &Limits::QUERY).ok();
    if let Some(parsed) = &parsed {
        // the question of a query has no pointer to follow: it stands there as long as its name is
        let end = HEADER_LEN + parsed.question.name.wire().len() + 4;
        if let Some(question) = query.get(HEADER_LEN..end) {
            reply[HEADER_LEN..end].copy_from_slice(question);
            len = end;
        }
    }
    let edns = parsed.as_ref().and_then(|parsed| parsed.edns);
    if let Some(edns) = edns {
        let [size0, size1] = UDP_PAYLOAD.to_be_bytes();
        let dnssec_ok = if edns.dnssec_ok { 0x80 } else { 0 };
        // root, OPT, size, extended code, version, flags, no options
        reply[len..len + OPT_LEN].copy_from_slice(&[0, 0, 41, size0, size1, 0, 0, dnssec_ok, 0, 0, 0]);
        len += OPT_LEN;
    }
    // QR, the query's opcode and RD, RA; CD as it was
    let header_flags = 0x8080 | flags.0 & 0x7910 | rcode as u16;
    let [flags0, flags1] = header_flags.to_be_bytes();
    let counts = [
        0,
        u8::from(parsed.is_some()),
        0,
        0,
        0,
        0,
        0,
        u8::from(edns.is_some()),
    ];
    reply[..4].copy_from_slice(&[id0, id1, flags0, flags1]);
    reply[4..HEADER_LEN].copy_from_slice(&counts);
    out.get_mut(..len)
        .ok_or(ParseError::TooLong)?
        .copy_from_slice(&reply[..len]);
    Ok(len)
}
