//! Finds the end of a head in a stream, and refuses bytes that are not allowed in a head.

use std::sync::Arc;

use super::ParseError;

/// Limits on a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Maximum length of a line including its CR LF, bytes.
    pub line: usize,
    /// Maximum length of a head including its empty line, bytes.
    pub block: usize,
}

impl Default for Limits {
    /// Returns limits that are higher than those of common servers, and lower than a receiver's usual initial TCP
    /// window. The worker holds the segments of a head until the head is complete, so the whole head must fit into that
    /// window.
    fn default() -> Self {
        Self {
            line: 16_384,
            block: 32_768,
        }
    }
}

/// First line of the preface of HTTP/2 (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0";
/// Maximum number of empty lines before a start line. By RFC 9112, section 2.2, servers should ignore at least one.
const LEADING_LINES: usize = 4;

/// A search for the end of a head. Each byte is examined once, however the stream is segmented.
#[derive(Clone, Debug, Default)]
pub struct Head {
    /// Number of examined bytes.
    seen: usize,
    /// Offset of the current line.
    line: usize,
    /// Number of empty lines before the start line.
    leading: usize,
    /// Whether the start line is complete.
    begun: bool,
    /// Whether the last byte was a CR.
    carriage: bool,
}

impl Head {
    /// Continues the search and returns the length of the head once the head is complete. `stream`: the bytes received
    /// so far, from the start of the head on; no shorter than at the last call.
    ///
    /// # Errors
    /// [`ParseError`] if no further bytes can make this a valid head.
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
                // A start line begins with a method or with `HTTP`. Both are tokens, so a stream whose first byte is
                // not allowed in a token is not HTTP.
                _ if !self.begun && at == self.line && !is_token(byte) => return Err(ParseError::NotHttp),
                b'\t' | 0x20..=0x7e | 0x80.. => {}
                _ => {
                    // A start line with a space is most likely HTTP, so the error names the control character.
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

    /// Returns how many of the next bytes need no check of their own: they are within a line and within all limits, and
    /// none is a control character.
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

    /// Returns the length of the empty lines before the start line, bytes.
    #[must_use]
    pub fn skipped(&self) -> usize {
        self.leading * 2
    }
}

/// A field name reduced to its letters and digits in lower case. Some servers treat names as equal if their reduced
/// forms are equal.
///
/// CGI, WSGI, Rack and PHP replace `-` by `_`; some implementations replace every byte that is not a letter or a digit.
/// So `Transfer_Encoding`, `Transfer.Encoding` and `Transfer-Encoding` become the same field.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Folded {
    bytes: [u8; 24],
    length: usize,
    /// Hash of the whole reduced name.
    hash: u64,
}

impl Folded {
    pub(crate) fn of(name: &str) -> Self {
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
        // FNV-1a, with another start. A planned restart hands the hashes over, so with another function the version of its
        // encoding must be raised. A name that is made to collide with one of `TrailerNames` is only refused.
        self.hash = (self.hash ^ u64::from(byte.to_ascii_lowercase())).wrapping_mul(0x0100_0000_01b3);
    }

    /// Returns whether the reduced name is one of `names`. `names`: reduced names of at most 24 bytes.
    pub(crate) fn is_among(&self, names: &[&[u8]]) -> bool {
        self.bytes
            .get(..self.length)
            .is_some_and(|bytes| names.contains(&bytes))
    }
}

/// Names of header fields that rules read or change. A request must not repeat them in its trailers, because some servers
/// merge trailer fields into the header fields (RFC 9110, section 6.5.1), and would get another value than the one that
/// the verdict was for. Names with the same letters and digits count as equal, in any case.
#[derive(Clone, Debug, Default)]
pub struct TrailerNames(Option<Arc<[u64]>>);

impl TrailerNames {
    /// Returns the set of these names.
    pub fn new<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let mut hashes: Vec<u64> = names.map(|name| Folded::of(name).hash).collect();
        hashes.sort_unstable();
        hashes.dedup();
        Self::from_hashes(hashes)
    }

    /// Returns the hashes of the names, in the order of [`TrailerNames::from_hashes`].
    #[must_use]
    pub fn hashes(&self) -> &[u64] {
        self.0.as_deref().unwrap_or_default()
    }

    /// Returns the set of the names with these hashes.
    #[must_use]
    pub fn from_hashes(hashes: Vec<u64>) -> Self {
        Self((!hashes.is_empty()).then(|| hashes.into()))
    }

    pub(crate) fn has(&self, name: &Folded) -> bool {
        self.0.as_ref().is_some_and(|hashes| hashes.contains(&name.hash))
    }
}

/// Returns whether the byte is allowed in a token (RFC 9110, section 5.6.2).
pub(crate) fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}
