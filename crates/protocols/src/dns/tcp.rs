//! DNS over TCP: the length of each message, two bytes, precedes the message (RFC 1035, section 4.2.2).

use super::{HEADER_LEN, error::ParseError};

/// Returns the first message of a stream, without its length prefix; `None` if the stream does not hold all of it yet.
///
/// # Errors
/// The length is less than a DNS header or greater than `longest`. The connection must be aborted, because later
/// messages of the stream cannot be found.
pub fn first_message(stream: &[u8], longest: usize) -> Result<Option<&[u8]>, ParseError> {
    let Some((prefix, rest)) = stream.split_first_chunk() else {
        return Ok(None);
    };
    let length = usize::from(u16::from_be_bytes(*prefix));
    if length < HEADER_LEN {
        return Err(ParseError::BadTcpLength);
    }
    if length > longest {
        return Err(ParseError::TooLong);
    }
    Ok(rest.get(..length))
}
