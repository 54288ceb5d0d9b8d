//! Chunked bodies and their trailers (RFC 9112, section 7.1).

use super::{
    ParseError,
    head::{Folded, TrailerNames, is_token},
};

/// Maximum number of digits of a chunk size.
const MAX_DIGITS: u32 = 16;
/// Maximum length of the extensions of one chunk, bytes. Unlimited extensions let an attacker exhaust servers
/// (CVE-2024-22019).
const MAX_EXTENSION: usize = 1_024;
/// Maximum length of a trailer section, bytes.
const MAX_TRAILER: usize = 8_192;

/// The next part of a chunked body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// The input is used up; more bytes are needed.
    More,
    /// Length of the chunk content that follows, bytes. The caller removes the content from the stream.
    Content(u64),
    /// The body is complete.
    End,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
/// Position in the framing.
enum State {
    /// In a chunk size.
    #[default]
    Size,
    /// Before the first byte of an extension name.
    ExtensionStart,
    /// In an extension name.
    ExtensionName,
    /// Before the first byte of an extension value.
    ExtensionValue,
    /// In an extension value that is a token.
    ExtensionToken,
    /// In an extension value that is a quoted string.
    ExtensionQuoted,
    /// After a backslash in a quoted string.
    ExtensionEscape,
    /// After the closing quote of a quoted string.
    ExtensionClosed,
    /// In a chunk extension of a response, see [`Chunks::of_answer`].
    ExtensionOfAnswer,
    /// After the CR of a size line.
    SizeEnd,
    /// After the content of a chunk, before its CR.
    ContentReturn,
    /// After the CR that follows the content.
    ContentEnd,
    /// At the start of a line of the trailer section.
    Trailer,
    /// In the name of a trailer field.
    Name,
    /// In the value of a trailer field.
    Value,
    /// After the CR of a trailer field.
    ValueEnd,
    /// After the CR of the empty line that ends the trailer section.
    LastEnd,
    /// After the body.
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

/// Finds the chunks and the end of a chunked body (RFC 9112, section 7.1).
#[derive(Clone, Debug, Default)]
pub struct Chunks {
    state: State,
    size: u64,
    digits: u32,
    /// Length so far of the extensions of the current chunk, bytes.
    extension: usize,
    /// Length so far of the trailer section, bytes.
    trailer: usize,
    /// Name of the current trailer field.
    name: Folded,
    /// Names that the trailers must not have besides [`NO_TRAILERS`].
    guarded: TrailerNames,
    /// Whether this is the body of a response, see [`Chunks::of_answer`].
    is_answer: bool,
}

/// Fields that must not be in trailers (RFC 9110, section 6.5.1), because some servers merge trailer fields into the
/// header fields. The names are in the form of [`Folded`].
pub(crate) const NO_TRAILERS: [&[u8]; 11] = [
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

/// A position in a chunked body at which [`Chunks`] can continue in another process.
#[derive(Clone, Debug, Default)]
pub struct Boundary {
    /// Whether the body is that of a response, see [`Chunks::of_answer`].
    pub is_answer: bool,
    /// Whether the position is directly behind the content of a chunk, not at the beginning of a size line.
    pub is_behind_content: bool,
    /// Names that the trailers must not have, see [`Chunks::of_request`].
    pub guarded: TrailerNames,
}

impl Chunks {
    /// Creates a parser for the body of a request, whose trailers must not have these names.
    #[must_use]
    pub fn of_request(guarded: TrailerNames) -> Self {
        Self {
            guarded,
            ..Self::default()
        }
    }

    /// Creates a parser for the body of a response.
    ///
    /// Chunk extensions of a response can contain all bytes except control characters other than tab: recipients ignore
    /// extensions that they do not know (RFC 9112, section 7.1.1), and HTTP rules restrict requests only. Chunk
    /// extensions of a request must be tokens or quoted strings without white space around them, because servers differ
    /// in where a size line with other bytes ends.
    #[must_use]
    pub fn of_answer() -> Self {
        Self {
            is_answer: true,
            ..Self::default()
        }
    }

    /// Returns the position if it is at the beginning of a size line or directly behind the content of a chunk. `None`
    /// within the framing.
    #[must_use]
    pub fn boundary(&self) -> Option<Boundary> {
        let is_behind_content = match self.state {
            State::Size if self.digits == 0 => false,
            State::ContentReturn => true,
            _ => return None,
        };
        Some(Boundary {
            is_answer: self.is_answer,
            is_behind_content,
            guarded: self.guarded.clone(),
        })
    }

    /// Creates a parser that continues at a position that [`Chunks::boundary`] has returned.
    #[must_use]
    pub fn at_boundary(at: Boundary) -> Self {
        Self {
            state: if at.is_behind_content {
                State::ContentReturn
            } else {
                State::Size
            },
            is_answer: at.is_answer,
            guarded: at.guarded,
            ..Self::default()
        }
    }

    /// Removes framing from the front of `input`, up to the next content or the end of the body.
    ///
    /// # Errors
    /// [`ParseError`] if the framing is malformed, or servers could read it in different ways.
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
                if self.name.is_among(&NO_TRAILERS) || self.guarded.has(&self.name) {
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
