//! TLS records and the handshake messages in them: [`ClientReader`] and [`ServerReader`] take bytes as they come.

use super::{ClientHello, MAX_HELLO, ParseError};

/// Content types of records (RFC 8446, 5.1).
const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

const CLIENT_HELLO: u8 = 1;
const SERVER_HELLO: u8 = 2;

const RECORD_HEADER: usize = 5;
const MESSAGE_HEADER: usize = 4;
/// Longest plaintext record (RFC 8446, 5.1).
const MAX_RECORD: usize = 1 << 14;
/// Longest protected record (RFC 5246, 6.2.3), the longer of the two versions.
const MAX_PROTECTED: usize = MAX_RECORD + 2_048;

/// The random of a HelloRetryRequest (RFC 8446, 4.1.3): SHA-256 of "HelloRetryRequest".
pub(super) const RETRY_RANDOM: [u8; 32] = [
    0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91, 0xc2,
    0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
];

/// What is left of the record at hand, and how its header is coming along.
#[derive(Clone, Debug, Default)]
struct Records {
    header: [u8; RECORD_HEADER],
    have: usize,
    /// Content type of the record, once its header is complete.
    kind: u8,
    /// Bytes of its content that have not come.
    left: usize,
}

/// A piece of a record's content.
struct Piece<'a> {
    kind: u8,
    bytes: &'a [u8],
    /// The record ends with this piece.
    last: bool,
}

impl Records {
    /// Takes the next piece off the front of `input`; `None`: more bytes are needed.
    fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Piece<'a>>, ParseError> {
        let mut first = false;
        if self.left == 0 {
            while let Some(slot) = self.header.get_mut(self.have) {
                let Some((byte, rest)) = input.split_first() else {
                    return Ok(None);
                };
                *slot = *byte;
                self.have += 1;
                *input = rest;
                // What can be said by the first bytes is said at once: nobody waits for the rest of what is not TLS.
                match self.header.get(..self.have).unwrap_or_default() {
                    [first, ..] if first & 0x80 != 0 => return Err(ParseError::Ssl2),
                    [CHANGE_CIPHER_SPEC..=APPLICATION_DATA] => {}
                    [CHANGE_CIPHER_SPEC..=APPLICATION_DATA, 3, ..] => {}
                    _ => return Err(ParseError::NotTls),
                }
            }
            self.have = 0;
            self.kind = self.header[0];
            self.left = usize::from(u16::from_be_bytes([self.header[3], self.header[4]]));
            let longest = if self.kind == APPLICATION_DATA {
                MAX_PROTECTED
            } else {
                MAX_RECORD
            };
            if self.left > longest {
                return Err(ParseError::RecordTooLong);
            }
            first = true;
            if self.left == 0 {
                // Only application data may be empty (RFC 8446, 5.1).
                if self.kind != APPLICATION_DATA {
                    return Err(ParseError::EmptyRecord);
                }
                return Ok(Some(Piece {
                    kind: self.kind,
                    bytes: &[],
                    last: true,
                }));
            }
        }
        if input.is_empty() {
            // The header is complete, its content is not here yet: the next call begins the record.
            if first {
                self.restart();
            }
            return Ok(None);
        }
        let (bytes, rest) = input.split_at(self.left.min(input.len()));
        *input = rest;
        self.left -= bytes.len();
        Ok(Some(Piece {
            kind: self.kind,
            bytes,
            last: self.left == 0,
        }))
    }

    /// Puts a complete header back, so that it is looked at again when content comes.
    fn restart(&mut self) {
        self.have = RECORD_HEADER;
        self.left = 0;
    }
}

/// What the client's bytes say so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientStep {
    /// Nothing yet. None of the bytes may go on.
    More,
    /// A hello is complete with the byte before the rest of the input.
    Hello(Box<ClientHello>),
    /// Something that is no hello and needs no judgement: an alert, early data, a change of cipher.
    Other,
}

/// Reads the client's side of a connection, hello by hello.
#[derive(Clone, Debug, Default)]
pub struct ClientReader {
    records: Records,
    /// Handshake message as far as it has come.
    held: Vec<u8>,
    /// A hello has been read: other records may follow.
    begun: bool,
}

impl ClientReader {
    /// Takes bytes off the front of `input` up to the next thing to be said; `input` is empty after
    /// [`ClientStep::More`].
    ///
    /// # Errors
    /// The stream cannot be read any further.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<ClientStep, ParseError> {
        loop {
            let Some(piece) = self.records.next(input)? else {
                return Ok(ClientStep::More);
            };
            if piece.kind != HANDSHAKE {
                if !self.begun {
                    return Err(ParseError::NotHello);
                }
                if !self.held.is_empty() {
                    return Err(ParseError::Interleaved);
                }
                return Ok(ClientStep::Other);
            }
            let length = self.take(piece.bytes)?;
            let Some(length) = length else {
                continue;
            };
            if self.held.len() > length || !piece.last {
                return Err(ParseError::Trailing);
            }
            let hello = ClientHello::parse(self.held.get(MESSAGE_HEADER..).unwrap_or_default())?;
            self.held.clear();
            self.begun = true;
            return Ok(ClientStep::Hello(Box::new(hello)));
        }
    }

    /// Adds to the message; its length if it is complete.
    fn take(&mut self, bytes: &[u8]) -> Result<Option<usize>, ParseError> {
        if self.held.is_empty() && bytes.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
            return Err(ParseError::NotHello);
        }
        if self.held.len() + bytes.len() > MESSAGE_HEADER + MAX_HELLO {
            return Err(ParseError::HelloTooLong);
        }
        self.held.extend_from_slice(bytes);
        let [_, a, b, c, ..] = self.held[..] else {
            return Ok(None);
        };
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        if length > MAX_HELLO {
            return Err(ParseError::HelloTooLong);
        }
        let length = MESSAGE_HEADER + length;
        Ok((self.held.len() >= length).then_some(length))
    }

    /// Bytes held of a hello that is not complete.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.len()
    }
}

/// What the server's bytes say so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerStep {
    /// Not enough to say.
    More,
    /// It asks for another hello (RFC 8446, 4.1.4).
    Again,
    /// It has answered with this version: no other hello can follow in the clear.
    Answered(u16),
    /// It has refused with an alert.
    Refused,
}

/// Reads the first message of the server's side.
#[derive(Clone, Debug, Default)]
pub struct ServerReader {
    records: Records,
    /// The beginning of the message, as far as it has come.
    held: Vec<u8>,
}

/// Header, version and random of a ServerHello.
const SERVER_HELLO_FIXED: usize = MESSAGE_HEADER + 2 + 32;

impl ServerReader {
    /// Takes bytes off the front of `input`; see [`ServerStep`]. After [`ServerStep::Answered`] and
    /// [`ServerStep::Refused`] nothing more needs reading.
    ///
    /// # Errors
    /// This is no TLS server.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<ServerStep, ParseError> {
        loop {
            let Some(piece) = self.records.next(input)? else {
                return Ok(ServerStep::More);
            };
            match piece.kind {
                ALERT => return Ok(ServerStep::Refused),
                HANDSHAKE => {}
                // Behind a HelloRetryRequest, for middleboxes (RFC 8446, appendix D.4).
                CHANGE_CIPHER_SPEC if self.held.is_empty() => continue,
                _ => return Err(ParseError::NotHello),
            }
            if let Some(step) = self.take(&piece)? {
                return Ok(step);
            }
        }
    }

    fn take(&mut self, piece: &Piece<'_>) -> Result<Option<ServerStep>, ParseError> {
        let bytes = piece.bytes;
        let missing = MESSAGE_HEADER + MAX_HELLO - self.held.len();
        self.held.extend_from_slice(bytes.get(..missing).unwrap_or(bytes));
        if self.held.first() != Some(&SERVER_HELLO) {
            return Err(ParseError::NotHello);
        }
        let [_, a, b, c, ..] = self.held[..] else {
            return Ok(None);
        };
        let length = MESSAGE_HEADER + (usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c));
        if !(SERVER_HELLO_FIXED..=MESSAGE_HEADER + MAX_HELLO).contains(&length) {
            return Err(ParseError::Malformed);
        }
        let Some(body) = self.held.get(MESSAGE_HEADER..length) else {
            return Ok(None);
        };
        let again = body.get(2..34) == Some(&RETRY_RANDOM[..]);
        let version = server_version(body);
        // A server that asks for another hello has nothing more to say: what stands behind it would be read or not,
        // depending on how the stream is cut.
        if again && (self.held.len() > length || !piece.last) {
            return Err(ParseError::Trailing);
        }
        self.held.clear();
        Ok(Some(if again {
            ServerStep::Again
        } else {
            ServerStep::Answered(version)
        }))
    }
}

/// The version that a ServerHello chooses: of its extension if it has one (RFC 8446, 4.2.1).
fn server_version(body: &[u8]) -> u16 {
    let legacy = body
        .first_chunk()
        .map_or(0, |version| u16::from_be_bytes(*version));
    let chosen = || -> Option<u16> {
        let (session, rest) = body.get(34..)?.split_first()?;
        // Session id, cipher suite, compression method, length of the extensions.
        let mut rest = rest.get(usize::from(*session) + 3 + 2..)?;
        loop {
            let (header, tail) = rest.split_first_chunk::<4>()?;
            let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
            let (data, tail) = tail.split_at_checked(length)?;
            if u16::from_be_bytes([header[0], header[1]]) == 43 {
                return Some(u16::from_be_bytes(*data.first_chunk()?));
            }
            rest = tail;
        }
    };
    chosen().unwrap_or(legacy)
}
