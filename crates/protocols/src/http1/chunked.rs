use super::{Refusal, head::is_token};

/// Longest size line: sixteen digits. Extensions are refused, so there is nothing else in it.
const MAX_DIGITS: u32 = 16;
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

/// Follows a chunked body (RFC 9112, 7.1).
#[derive(Clone, Debug, Default)]
pub struct Chunks {
    state: State,
    size: u64,
    digits: u32,
    /// Bytes of the trailer section.
    trailer: usize,
    /// The beginning of a trailer field's name.
    name: [u8; 32],
    name_len: usize,
}

/// Fields that frame or route a message must not come in a trailer (RFC 9110, 6.5.1).
const NO_TRAILERS: [&[u8]; 9] = [
    b"content-length",
    b"transfer-encoding",
    b"host",
    b"connection",
    b"upgrade",
    b"te",
    b"trailer",
    b"content-encoding",
    b"content-type",
];

impl Chunks {
    /// Takes framing off the front of `input` up to the next content, or the end.
    ///
    /// # Errors
    /// This is no chunked body that all read alike.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Piece, Refusal> {
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

    fn step(&mut self, byte: u8) -> Result<Option<Piece>, Refusal> {
        self.state = match (&self.state, byte) {
            (State::Size, b'\r') if self.digits > 0 => State::SizeEnd,
            (State::Size, _) => {
                let digit = char::from(byte).to_digit(16).ok_or(Refusal::BadChunk)?;
                self.digits += 1;
                if self.digits > MAX_DIGITS {
                    return Err(Refusal::BadChunk);
                }
                self.size = self.size << 4 | u64::from(digit);
                State::Size
            }
            (State::SizeEnd, b'\n') => {
                let size = std::mem::take(&mut self.size);
                self.digits = 0;
                if size == 0 {
                    State::Trailer
                } else if size > i64::MAX as u64 {
                    return Err(Refusal::BadChunk);
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
                self.name_len = 0;
                self.name(byte)?
            }
            (State::Name, b':') => {
                let name = &self.name[..self.name_len];
                if NO_TRAILERS.contains(&name) {
                    return Err(Refusal::BadTrailer);
                }
                State::Value
            }
            (State::Name, _) => self.name(byte)?,
            (State::Value, b'\r') => State::ValueEnd,
            (State::Value, b'\t' | 0x20..=0x7e | 0x80..) => State::Value,
            (State::ValueEnd, b'\n') => State::Trailer,
            (State::SizeEnd | State::ContentReturn | State::ContentEnd, _) => return Err(Refusal::BadChunk),
            _ => return Err(Refusal::BadTrailer),
        };
        if matches!(self.state, State::Name | State::Value | State::ValueEnd) {
            self.trailer += 1;
            if self.trailer > MAX_TRAILER {
                return Err(Refusal::HeadTooLong);
            }
        }
        Ok(None)
    }

    fn name(&mut self, byte: u8) -> Result<State, Refusal> {
        if !is_token(byte) {
            return Err(Refusal::BadTrailer);
        }
        // A longer name is none of those that are looked for.
        if self.name_len < self.name.len() {
            self.name[self.name_len] = byte.to_ascii_lowercase();
            self.name_len += 1;
        }
        Ok(State::Name)
    }
}
