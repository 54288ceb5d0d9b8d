//! TLS records, and the handshake messages in them: [`ClientReader`] and [`ServerReader`].

use super::{ClientHello, MAX_HELLO, ParseError};

/// Content types of records (RFC 8446, section 5.1).
const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

const CLIENT_HELLO: u8 = 1;
const SERVER_HELLO: u8 = 2;

const RECORD_HEADER: usize = 5;
const MESSAGE_HEADER: usize = 4;
/// Maximum length of a plaintext record, bytes (RFC 8446, section 5.1).
const MAX_RECORD: usize = 1 << 14;
/// Maximum length of a protected record, bytes. This is the limit of TLS 1.2 (RFC 5246, section 6.2.3), which is higher
/// than that of TLS 1.3.
const MAX_PROTECTED: usize = MAX_RECORD + 2_048;

/// The random of a HelloRetryRequest: the SHA-256 of "HelloRetryRequest" (RFC 8446, section 4.1.3).
pub(super) const RETRY_RANDOM: [u8; 32] = [
    0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91, 0xc2,
    0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
];

/// Splits a stream into the contents of its records.
#[derive(Clone, Debug, Default)]
struct Records {
    header: [u8; RECORD_HEADER],
    /// Number of header bytes received.
    have: usize,
    /// Content type of the record; valid once the header is complete.
    kind: u8,
    /// Number of content bytes that have not arrived yet.
    left: usize,
}

/// A piece of a record's content.
struct Piece<'a> {
    kind: u8,
    bytes: &'a [u8],
    /// Whether the record ends with this piece.
    last: bool,
}

impl Records {
    /// Removes the next piece from the front of `input`. Returns `None` if more bytes are needed.
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
                // Refuse a stream that is not TLS at its first wrong byte, without waiting for the rest of the header,
                // which might never arrive.
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
                // Only application data records may be empty (RFC 8446, section 5.1).
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
            // No content has arrived yet, so the next call starts with the complete header.
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

    /// Returns whether all bytes so far are of complete records.
    const fn is_between(&self) -> bool {
        self.have == 0 && self.left == 0
    }

    /// Marks the complete header as unprocessed, so that the next call processes it again.
    fn restart(&mut self) {
        self.have = RECORD_HEADER;
        self.left = 0;
    }
}

/// The result of reading bytes of the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientStep {
    /// The hello is not complete; its bytes must be held.
    More,
    /// A complete hello. The rest of the input starts after it.
    Hello(Box<ClientHello>),
    /// A piece of a record that is not a handshake record, but an alert, application data or ChangeCipherSpec. Such
    /// records need no inspection.
    Other,
}

/// Reads the hellos in the client's direction of a connection.
#[derive(Clone, Debug, Default)]
pub struct ClientReader {
    records: Records,
    /// The bytes of the incomplete handshake message.
    held: Vec<u8>,
    /// Whether a hello has been read. Only then are records accepted that are not handshake records.
    begun: bool,
}

impl ClientReader {
    /// Removes bytes from the front of `input` up to the end of the next hello, or of the next piece of a record that
    /// is not a handshake record. `input` is empty after [`ClientStep::More`].
    ///
    /// # Errors
    /// [`ParseError`]; the rest of the stream cannot be parsed.
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

    /// Appends bytes to the handshake message. Returns the length of the message if it is complete.
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

    /// Returns a reader for the records behind a hello.
    #[must_use]
    pub fn behind_hello() -> Self {
        Self {
            begun: true,
            ..Self::default()
        }
    }

    /// Returns whether the next byte begins a record and no handshake message is incomplete.
    #[must_use]
    pub const fn is_between_records(&self) -> bool {
        self.records.is_between() && self.held.is_empty()
    }

    /// Returns the number of buffered bytes of an incomplete hello.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.len()
    }
}

/// The result of reading bytes of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerStep {
    /// The first message is not complete.
    More,
    /// A HelloRetryRequest: the server requests another ClientHello (RFC 8446, section 4.1.4).
    Again,
    /// A ServerHello with this version. No unencrypted ClientHello can follow.
    Answered(u16),
    /// An alert: the server refuses the handshake.
    Refused,
}

/// Reads the first handshake message in the server's direction of a connection.
#[derive(Clone, Debug, Default)]
pub struct ServerReader {
    records: Records,
    /// The received bytes of the message.
    held: Vec<u8>,
}

/// Length of message header, version and random of a ServerHello, bytes.
const SERVER_HELLO_FIXED: usize = MESSAGE_HEADER + 2 + 32;

impl ServerReader {
    /// Removes bytes from the front of `input` until the first message is complete. After [`ServerStep::Answered`] and
    /// [`ServerStep::Refused`] no further bytes need to be read.
    ///
    /// # Errors
    /// [`ParseError`] if the bytes are not the start of a TLS server's handshake.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<ServerStep, ParseError> {
        loop {
            let Some(piece) = self.records.next(input)? else {
                return Ok(ServerStep::More);
            };
            match piece.kind {
                ALERT => return Ok(ServerStep::Refused),
                HANDSHAKE => {}
                // Servers send ChangeCipherSpec after a HelloRetryRequest, for middleboxes (RFC 8446, appendix D.4).
                CHANGE_CIPHER_SPEC if self.held.is_empty() => continue,
                _ => return Err(ParseError::NotHello),
            }
            if let Some(step) = self.take(&piece)? {
                return Ok(step);
            }
        }
    }

    /// Returns whether the next byte begins a record and no handshake message is incomplete. A reader in that state is as
    /// a new one.
    #[must_use]
    pub const fn is_between_records(&self) -> bool {
        self.records.is_between() && self.held.is_empty()
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
        // A server sends nothing after a HelloRetryRequest in the same record. Whether such bytes were parsed would
        // depend on the segmentation of the stream, so they are refused.
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

/// Returns the version of a ServerHello: that of the supported_versions extension if there is one (RFC 8446, section
/// 4.2.1).
fn server_version(body: &[u8]) -> u16 {
    let legacy = body
        .first_chunk()
        .map_or(0, |version| u16::from_be_bytes(*version));
    let chosen = || -> Option<u16> {
        let (session, rest) = body.get(34..)?.split_first()?;
        // Skip session id, cipher suite, compression method and the length of the extensions.
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
