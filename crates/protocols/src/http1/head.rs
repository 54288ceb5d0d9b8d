//! Finds the end of a head in a stream, and refuses bytes that no head may have.

use super::ParseError;

/// What a head may be at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest line, bytes, with its end.
    pub line: usize,
    /// Longest head, bytes, with the empty line.
    pub block: usize,
}

impl Default for Limits {
    /// Somewhat above what common servers take, and below what receivers take at first: a head is held until it is whole.
    fn default() -> Self {
        Self {
            line: 16_384,
            block: 32_768,
        }
    }
}

/// First line of the preface of HTTP/2 (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0";
/// Empty lines that may stand before a request (RFC 9112, 2.2: at least one).
const LEADING_LINES: usize = 4;

/// Looks for the end of a head. Each byte is looked at once, however the stream is cut.
#[derive(Clone, Debug, Default)]
pub struct Head {
    /// Bytes that have been looked at.
    seen: usize,
    /// Where the line at hand begins.
    line: usize,
    /// Empty lines before the first line.
    leading: usize,
    /// A first line has been seen.
    begun: bool,
    /// The last byte was a carriage return.
    carriage: bool,
}

impl Head {
    /// Looks at `stream`, the bytes from where the head begins, as far as they have come: each call with at least
    /// what the last one had. Gives the length of the head once it is whole.
    ///
    /// # Errors
    /// This is no head, whatever follows.
    pub fn find(&mut self, stream: &[u8], limits: &Limits) -> Result<Option<usize>, ParseError> {
        loop {
            self.seen += self.plain(stream, limits);
            let Some(&byte) = stream.get(self.seen) else {
                return Ok(None);
            };
            if self.seen >= limits.block {
                return Err(ParseError::HeadTooLong);
            }
            if self.seen - self.line >= limits.line {
                return Err(if self.begun {
                    ParseError::LineTooLong
                } else {
                    ParseError::StartLineTooLong
                });
            }
            let at = self.seen;
            self.seen += 1;
            if self.carriage {
                self.carriage = false;
                if byte != b'\n' {
                    return Err(ParseError::BareLineEnd);
                }
                let empty = at - 1 == self.line;
                self.line = self.seen;
                if !empty {
                    self.begun = true;
                } else if self.begun {
                    return Ok(Some(self.seen));
                } else {
                    self.leading += 1;
                    if self.leading > LEADING_LINES {
                        return Err(ParseError::NotHttp);
                    }
                }
                continue;
            }
            match byte {
                b'\r' => {
                    if !self.begun && self.is_preface(stream, at) {
                        return Err(ParseError::Http2);
                    }
                    self.carriage = true;
                }
                b'\n' => return Err(ParseError::BareLineEnd),
                b' ' | b'\t' if at == self.line => {
                    return Err(if self.begun {
                        ParseError::Folding
                    } else {
                        ParseError::NotHttp
                    });
                }
                // A method or a version is a token (RFC 9110, 5.6.2): what begins otherwise is something else.
                _ if !self.begun && at == self.line && !is_token(byte) => return Err(ParseError::NotHttp),
                b'\t' | 0x20..=0x7e | 0x80.. => {}
                _ => {
                    // Behind a method and a space it is HTTP that somebody has put it into.
                    return Err(
                        if self.begun || stream.get(self.line..at).is_some_and(|line| line.contains(&b' ')) {
                            ParseError::ControlCharacter
                        } else {
                            ParseError::NotHttp
                        },
                    );
                }
            }
        }
    }

    /// How many bytes within a line come next that have nothing to say, as far as no limit is reached.
    fn plain(&self, stream: &[u8], limits: &Limits) -> usize {
        if self.carriage || self.seen == self.line {
            return 0;
        }
        let end = limits.block.min(self.line + limits.line).min(stream.len());
        let rest = stream.get(self.seen..end).unwrap_or_default();
        let is_plain = |byte: &u8| *byte >= 0x20 && *byte != 0x7f;
        rest.iter().position(|byte| !is_plain(byte)).unwrap_or(rest.len())
    }

    fn is_preface(&self, stream: &[u8], end: usize) -> bool {
        stream.get(self.line..end) == Some(PREFACE)
    }

    /// Empty lines that stood before the head, bytes.
    #[must_use]
    pub fn skipped(&self) -> usize {
        self.leading * 2
    }
}

/// A field name as the least careful servers compare it: its letters and digits, in lower case.
///
/// CGI and the interfaces made after it (WSGI, Rack, PHP) turn `-` into `_`, some turn every byte but letters and
/// digits into `_`, and gateways turn that back. So `Transfer_Encoding`, `Transfer.Encoding` and `Transfer-Encoding`
/// become one field there.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Folded {
    bytes: [u8; 24],
    length: usize,
}

impl Folded {
    pub(super) fn of(name: &str) -> Self {
        let mut folded = Self::default();
        name.bytes().for_each(|byte| folded.push(byte));
        folded
    }

    pub(super) fn push(&mut self, byte: u8) {
        if !byte.is_ascii_alphanumeric() {
            return;
        }
        if let Some(place) = self.bytes.get_mut(self.length) {
            *place = byte.to_ascii_lowercase();
        }
        self.length += 1;
    }

    /// Whether it is one of these, which have less than 24 bytes: a longer name is none of them.
    pub(super) fn is_among(&self, names: &[&[u8]]) -> bool {
        self.bytes
            .get(..self.length)
            .is_some_and(|bytes| names.contains(&bytes))
    }
}

/// Bytes of a token (RFC 9110, 5.6.2).
pub(super) fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}
