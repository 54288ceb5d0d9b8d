//! DNS over TCP: messages behind their two-byte length.

use super::{HEADER_LEN, error::ParseError};

/// The first message of a stream (RFC 1035, 4.2.2: each stands behind its length, of two bytes); `None`: it is not
/// all there.
///
/// # Errors
/// On a length that no message has, or above `longest`: the stream cannot be read any further, and must be cut.
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
