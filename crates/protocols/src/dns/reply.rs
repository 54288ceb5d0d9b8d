//! Responses to denied and malformed queries: REFUSED, NXDOMAIN, FORMERR, NOTIMP.

use super::{
    HEADER_LEN,
    error::ParseError,
    message::{Flags, Limits, Query},
    rcode::Rcode,
    rtype,
};

/// UDP payload size in the OPT record of responses, bytes (DNS flag day 2020).
const UDP_PAYLOAD: u16 = 1232;

/// Writes the response with code `rcode` to a query into `out` and returns its length.
///
/// The question is echoed byte for byte, because some clients randomise the letter case of the name and check it in the
/// response. If the query has an OPT record, so has the response (RFC 6891, section 7), with the same DO bit (RFC 3225,
/// section 3). The response to a malformed query is a header without a question.
///
/// # Errors
/// [`ParseError::Short`] or [`ParseError::WrongDirection`] if `query` does not begin with the header of a query.
/// [`ParseError::TooLong`] if `out` is too short; 512 bytes always suffice.
pub fn reply(query: &[u8], rcode: Rcode, out: &mut [u8]) -> Result<usize, ParseError> {
    let Some(&[id0, id1, flags0, flags1, ..]) = query.first_chunk::<HEADER_LEN>() else {
        return Err(ParseError::Short);
    };
    let flags = Flags(u16::from_be_bytes([flags0, flags1]));
    if flags.response() {
        return Err(ParseError::WrongDirection);
    }
    let parsed = Query::parse(query, &Limits::QUERY).ok();
    // The name of a question has no compression pointer, because no name precedes it. So the name takes as many bytes
    // in the message as in uncompressed form.
    let question = parsed
        .as_ref()
        .and_then(|parsed| query.get(HEADER_LEN..HEADER_LEN + parsed.question.name.wire().len() + 4))
        .unwrap_or_default();
    let edns = parsed.as_ref().and_then(|parsed| parsed.edns);
    let opt = edns.map(|edns| {
        let [size0, size1] = UDP_PAYLOAD.to_be_bytes();
        let dnssec_ok = if edns.dnssec_ok { 0x80 } else { 0 };
        // Root name, type, UDP size, extended response code, version, flags, length of the options.
        [0, 0, rtype::OPT as u8, size0, size1, 0, 0, dnssec_ok, 0, 0, 0]
    });
    // QR and RA are set; opcode, RD and CD are those of the query.
    let header_flags = 0x8080 | flags.0 & 0x7910 | rcode as u16;
    let [flags0, flags1] = header_flags.to_be_bytes();
    let questions = u8::from(!question.is_empty());
    let additionals = u8::from(opt.is_some());
    let header: [u8; HEADER_LEN] = [id0, id1, flags0, flags1, 0, questions, 0, 0, 0, 0, 0, additionals];
    let opt = opt.as_slice().as_flattened();
    let len = header.len() + question.len() + opt.len();
    let mut rest = out.get_mut(..len).ok_or(ParseError::TooLong)?;
    for part in [&header, question, opt] {
        let (target, tail) = rest.split_at_mut_checked(part.len()).ok_or(ParseError::TooLong)?;
        target.copy_from_slice(part);
        rest = tail;
    }
    Ok(len)
}
