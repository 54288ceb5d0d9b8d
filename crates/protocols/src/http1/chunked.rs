//! Chunked bodies and their trailers (RFC 9112, 7.1).

use super::{
    ParseError,
    head::{Folded, is_token},
};

/// Longest chunk size, digits.
const MAX_DIGITS: u32 = 16;
/// Longest extension of one chunk, bytes. Servers that allow more have been made to read without end (CVE-2024-22019).
const MAX_EXTENSION: usize = 1_024;
/// Longest trailer section, bytes.
const MAX_TRAILER: usize = 8_192;

/// What comes next in a chunked body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// More bytes are needed.
    More,
    /// So many bytes of content follow now, with no framing between them. The caller takes them off.
    Content(u64),
    /// The body ends here.
    End,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum State {
    /// In a size, after so many digits.
    #[default]
    Size,
    /// In an extension: at the first byte of its name, in its name, at the first byte of its value, in a token as its
    /// value, in a quoted string, behind a backslash there, behind its closing quote.
    ExtensionStart,
    ExtensionName,
    ExtensionValue,
    ExtensionToken,
    ExtensionQuoted,
    ExtensionEscape,
    ExtensionClosed,
    /// In whatever a server wrote behind a chunk size.
    ExtensionOfAnswer,
    /// Behind the carriage return of a size line.
    SizeEnd,
    /// Behind content: its line end.
    ContentReturn,
    ContentEnd,
    /// At the beginning of a line of the trailer section.
    Trailer,
    /// In the name of a trailer field.
    Name,
    /// In the value of a trailer field.
    Value,
    /// Behind the carriage return of a trailer field.
    ValueEnd,
    /// Behind the carriage return of the empty line.
    LastEnd,
    Done,
}

impl State {
    const fn is_extension(&self) -> bool {
        matches!(
            self,
            Self::ExtensionStart
                | Self::ExtensionName
                | Self::ExtensionValue
                | Self::ExtensionToken
                | Self::ExtensionQuoted
                | Self::ExtensionEscape
                | Self::ExtensionClosed
                | Self::ExtensionOfAnswer
        )
    }
}

/// Follows a chunked body (RFC 9112, 7.1).
#[derive(Clone, Debug, Default)]
pub struct Chunks {
    state: State,
    size: u64,
    digits: u32,
    /// Bytes of the extension at hand.
    extension: usize,
    /// Bytes of the trailer section.
    trailer: usize,
    /// The name of the trailer field at hand.
    name: Folded,
    /// The body of an answer: see [`Chunks::of_answer`].
    is_answer: bool,
}

/// Fields that frame or route a message must not come in a trailer (RFC 9110, 6.5.1), as [`Folded`]: some servers
/// merge trailers into the fields of the head.
const NO_TRAILERS: [&[u8]; 11] = [
    b"contentlength",
    b"transferencoding",
    b"host",
    b"connection",
    b"upgrade",
    b"expect",
    b"te",
    b"trailer",
    b"contentencoding",
    b"contenttype",
    b"http2settings",
];

impl Chunks {
    /// Follows the body of an answer. Its chunk extensions may be anything but control characters: a recipient ignores
    /// them (RFC 9112, 7.1.1), and the server that wrote them is not the side that the policy is about. A request's
    /// extensions must be tokens or quoted strings without white space around them, because servers differ in what else
    /// they take for the end of a size line.
    #[must_use]
    pub fn of_answer() -> Self {
        Self {
            is_answer: true,
            ..Self::default()
        }
    }

    /// Takes framing off the front of `input` up to the next content, or the end.
    ///
    /// # Errors
    /// This is no chunked body that all read alike.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Piece, ParseError> {
        while self.state != State::Done {
            let Some((&byte, rest)) = input.split_first() else {
                return Ok(Piece::More);
            };
            *input = rest;
            if let Some(piece) = self.step(byte)? {
                return Ok(piece);
            }
        }
        Ok(Piece::End)
    }

    fn step(&mut self, byte: u8) -> Result<Option<Piece>, ParseError> {
        self.state = match (&self.state, byte) {
            (State::Size, b'\r') if self.digits > 0 => State::SizeEnd,
            (State::Size, b';' | b' ' | b'\t') if self.digits > 0 && self.is_answer => {
                State::ExtensionOfAnswer
            }
            (State::Size, b';') if self.digits > 0 => State::ExtensionStart,
            (State::Size, _) => {
                let digit = char::from(byte).to_digit(16).ok_or(ParseError::BadChunk)?;
                self.digits += 1;
                if self.digits > MAX_DIGITS {
                    return Err(ParseError::BadChunk);
                }
                self.size = self.size << 4 | u64::from(digit);
                State::Size
            }
            (State::ExtensionStart | State::ExtensionName, _) if is_token(byte) => State::ExtensionName,
            (State::ExtensionName, b'=') => State::ExtensionValue,
            (State::ExtensionValue, b'"') => State::ExtensionQuoted,
            (State::ExtensionValue | State::ExtensionToken, _) if is_token(byte) => State::ExtensionToken,
            (State::ExtensionQuoted, b'"') => State::ExtensionClosed,
            (State::ExtensionQuoted, b'\\') => State::ExtensionEscape,
            (State::ExtensionQuoted | State::ExtensionEscape, b'\t' | 0x20..=0x7e) => State::ExtensionQuoted,
            (State::ExtensionName | State::ExtensionToken | State::ExtensionClosed, b';') => {
                State::ExtensionStart
            }
            (
                State::ExtensionName
                | State::ExtensionToken
                | State::ExtensionClosed
                | State::ExtensionOfAnswer,
                b'\r',
            ) => State::SizeEnd,
            (State::ExtensionOfAnswer, b'\t' | 0x20..=0x7e | 0x80..) => State::ExtensionOfAnswer,
            (
                State::ExtensionStart
                | State::ExtensionName
                | State::ExtensionValue
                | State::ExtensionToken
                | State::ExtensionQuoted
                | State::ExtensionEscape
                | State::ExtensionClosed
                | State::ExtensionOfAnswer,
                _,
            ) => return Err(ParseError::BadChunk),
            (State::SizeEnd, b'\n') => {
                let size = std::mem::take(&mut self.size);
                self.digits = 0;
                self.extension = 0;
                if size == 0 {
                    State::Trailer
                } else if size > i64::MAX as u64 {
                    return Err(ParseError::BadChunk);
                } else {
                    self.state = State::ContentReturn;
                    return Ok(Some(Piece::Content(size)));
                }
            }
            (State::ContentReturn, b'\r') => State::ContentEnd,
            (State::ContentEnd, b'\n') => State::Size,
            (State::Trailer, b'\r') => State::LastEnd,
            (State::LastEnd, b'\n') => {
                self.state = State::Done;
                return Ok(Some(Piece::End));
            }
            (State::Trailer, _) => {
                self.name = Folded::default();
                self.name(byte)?
            }
            (State::Name, b':') => {
                if self.name.is_among(&NO_TRAILERS) {
                    return Err(ParseError::BadTrailer);
                }
                State::Value
            }
            (State::Name, _) => self.name(byte)?,
            (State::Value, b'\r') => State::ValueEnd,
            (State::Value, b'\t' | 0x20..=0x7e | 0x80..) => State::Value,
            (State::ValueEnd, b'\n') => State::Trailer,
            (State::SizeEnd | State::ContentReturn | State::ContentEnd, _) => {
                return Err(ParseError::BadChunk);
            }
            _ => return Err(ParseError::BadTrailer),
        };
        if self.state.is_extension() {
            self.extension += 1;
            if self.extension > MAX_EXTENSION {
                return Err(ParseError::BadChunk);
            }
        }
        if matches!(self.state, State::Name | State::Value | State::ValueEnd) {
            self.trailer += 1;
            if self.trailer > MAX_TRAILER {
                return Err(ParseError::HeadTooLong);
            }
        }
        Ok(None)
    }

    fn name(&mut self, byte: u8) -> Result<State, ParseError> {
        if !is_token(byte) {
            return Err(ParseError::BadTrailer);
        }
        self.name.push(byte);
        Ok(State::Name)
    }
}
