//! The header of a request, and the size in front of a message.

use super::{
    error::ParseError,
    numbers::{CONTROLLED_SHUTDOWN, SIZE},
    reader::Reader,
    table,
};

/// Longest tagged fields of a header, bytes. Kafka defines none for requests. An inspector reads the header of an
/// incomplete request again with each packet, so the limit bounds the work for each packet.
const MAX_HEADER_TAGS: usize = 4096;

/// Header of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header<'a> {
    /// API key.
    pub key: i16,
    /// API version.
    pub version: i16,
    /// Correlation id, which the response repeats.
    pub correlation: i32,
    /// Client id; none for null.
    pub client: Option<&'a [u8]>,
}

/// A request: its header, and its unread body.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Header.
    pub header: Header<'a>,
    pub(super) body: Reader<'a>,
}

/// Returns the length of the message behind the first four bytes, bytes; none if they have not arrived.
///
/// # Errors
/// [`ParseError::NotKafka`] if no message has that length.
pub fn message_length(bytes: &[u8], shortest: usize, longest: usize) -> Result<Option<usize>, ParseError> {
    let Some(size) = bytes.first_chunk::<SIZE>() else {
        return Ok(None);
    };
    usize::try_from(i32::from_be_bytes(*size))
        .ok()
        .filter(|length| (shortest..=longest).contains(length))
        .map(Some)
        .ok_or(ParseError::NotKafka)
}

impl<'a> Request<'a> {
    /// Parses the header of a request. `message`: the bytes behind the size, perhaps without their end.
    ///
    /// # Errors
    /// [`ParseError::Truncated`] if the header is longer than `message`; [`ParseError::TooLong`] if its tagged fields are
    /// longer than the limit; other errors if it is malformed.
    pub fn parse(message: &'a [u8]) -> Result<Self, ParseError> {
        let mut body = Reader::new(message, false);
        let (key, version, correlation) = (body.i16()?, body.i16()?, body.i32()?);
        if key < 0 || version < 0 {
            return Err(ParseError::NotKafka);
        }
        // Version 0 of ControlledShutdown is the only request with header version 0, which has no client id.
        let client = if (key, version) == (CONTROLLED_SHUTDOWN, 0) {
            None
        } else {
            body.header_text()?
        };
        if table::is_flexible(key, version) {
            body.set_flexible(true);
            body.skip_tags_within(MAX_HEADER_TAGS)?;
        }
        let header = Header {
            key,
            version,
            correlation,
            client,
        };
        Ok(Self { header, body })
    }
}
