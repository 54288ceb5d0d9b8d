//! URLs and header fields in records: each is one line of visible ASCII, without secrets.
//!
//! Records go to logs and terminals. So bytes of a peer that are not visible ASCII are escaped, and the value of a
//! parameter or field whose name suggests a secret is redacted. In doubt, a name counts as the name of a secret.

use std::fmt::Write as _;

use crate::record::{TEXT, Text};

/// Replacement of a secret value.
const REDACTED: &str = "[redacted]";

/// Header fields with a secret value, in addition to those whose names match the lists below.
const SECRET_FIELDS: [&str; 5] = [
    "authorization",
    "proxy-authorization",
    "cookie",
    "cookie2",
    "set-cookie",
];

/// Substrings that make a name the name of a secret.
const SECRET_PARTS: [&[u8]; 16] = [
    b"accesskey",
    b"apikey",
    b"authoriz",
    b"authtoken",
    b"bearer",
    b"cookie",
    b"credential",
    b"passcode",
    b"passphrase",
    b"passwd",
    b"password",
    b"secret",
    b"sessid",
    b"session",
    b"signature",
    b"token",
];

/// Words that make a name the name of a secret: `api_key` and `apiKey` contain the word `key`, `monkey` does not.
const SECRET_WORDS: [&[u8]; 12] = [
    b"auth", b"code", b"hmac", b"jwt", b"key", b"oauth", b"otp", b"pass", b"pin", b"pwd", b"sid", b"sig",
];

/// Writes `SCHEME://HOST/PATH?QUERY`, with `[redacted]` for the values of parameters whose names suggest a secret.
pub(crate) fn url(scheme: &str, host: &str, path: &str, out: &mut Text) {
    // Writing to a `Text` cannot fail: a long text is truncated.
    let _ = write!(out, "{scheme}://");
    visible(host.as_bytes(), Form::Url, out);
    without_secrets(path.as_bytes(), Form::Url, out);
}

/// Writes the chosen fields, one `Name: value` per line, with `[redacted]` for secret values. Names are written in the
/// spelling of `chosen`.
pub(crate) fn headers<'a>(
    fields: impl Iterator<Item = (&'a str, &'a [u8])>,
    chosen: &[String],
    out: &mut Text,
) {
    if chosen.is_empty() {
        return;
    }
    for (name, value) in fields {
        let Some(name) = chosen.iter().find(|chosen| chosen.eq_ignore_ascii_case(name)) else {
            continue;
        };
        visible(name.as_bytes(), Form::Field, out);
        let _ = out.write_str(": ");
        if is_secret_field(name) {
            let _ = out.write_str(REDACTED);
        } else {
            without_secrets(value, Form::Field, out);
        }
        let _ = out.write_str("\n");
    }
}

/// Form in which a byte is escaped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// `%1B`, as in any URL.
    Url,
    /// `\x1b`.
    Field,
}

impl Form {
    const fn is_plain(self, byte: u8) -> bool {
        match self {
            Self::Url => matches!(byte, 0x21..=0x7e),
            // A backslash is escaped too, so that a peer cannot forge an escape sequence.
            Self::Field => matches!(byte, 0x20..=0x7e) && byte != b'\\',
        }
    }
}

/// Writes bytes as visible ASCII. Non-ASCII letters are escaped too, because some non-ASCII characters change the text
/// direction of a line.
fn visible(bytes: &[u8], form: Form, out: &mut Text) {
    // Each byte takes at least one byte in the text.
    let bytes = part(bytes, 0, bytes.len().min(TEXT));
    for run in bytes.chunk_by(|a, b| form.is_plain(*a) == form.is_plain(*b)) {
        match str::from_utf8(run) {
            Ok(text) if run.iter().all(|byte| form.is_plain(*byte)) => {
                let _ = out.write_str(text);
            }
            _ => {
                for byte in run {
                    let _ = match form {
                        Form::Url => write!(out, "%{byte:02X}"),
                        Form::Field => write!(out, "\\x{byte:02x}"),
                    };
                }
            }
        }
    }
}

/// Writes a URL from its path on, or a field value, which can contain URLs or parameters.
///
/// Parameters begin after `?`, `&` and `;` (also in a path: `/a;jsessionid=1`), in fields also at the beginning and
/// after a comma. Percent-encoded delimiters count too, because a URL can be a parameter of another URL. A secret value
/// ends only at a delimiter that every parser treats as the end of the value. A user and password before a host are
/// redacted too.
fn without_secrets(bytes: &[u8], form: Form, out: &mut Text) {
    // Offset of the first byte that is not written.
    let mut from = 0;
    let mut hidden = false;
    let mut query = form == Form::Field;
    let mut name = (form == Form::Field).then(Name::default);
    let mut authority = None;
    let mut at = 0;
    while let Some((byte, length)) = next(part(bytes, at, bytes.len())) {
        let raw = length == 1;
        let after = at + length;
        if hidden {
            let ends = match byte {
                b'&' => true,
                // In a query both can be part of a value.
                b'/' | b'?' => !query,
                _ => false,
            };
            if !(raw && ends) {
                at = after;
                continue;
            }
            hidden = false;
            from = at;
        }
        match byte {
            b'?' | b'&' | b';' => {
                name = Some(Name::default());
                query |= raw && byte == b'?';
            }
            b',' if form == Form::Field => name = Some(Name::default()),
            b'=' if name.take().is_some_and(Name::is_secret) => {
                visible(part(bytes, from, after), form, out);
                let _ = out.write_str(REDACTED);
                hidden = true;
            }
            b'/' if raw && !query => name = None,
            b'@' => {
                if let Some(begin) = authority.take() {
                    visible(part(bytes, from, begin), form, out);
                    let _ = out.write_str(REDACTED);
                    from = at;
                }
            }
            _ => {
                if let Some(name) = &mut name {
                    name.push(byte);
                }
            }
        }
        match byte {
            b'/' if part(bytes, 0, at).ends_with(b":/") => authority = Some(after),
            b'/' | b'?' | b'#' | b' ' => authority = None,
            _ => {}
        }
        at = after;
    }
    if !hidden {
        visible(part(bytes, from, bytes.len()), form, out);
    }
}

/// Returns a range of `bytes`. The result is empty if the range is out of bounds, so that no unredacted byte is
/// written.
fn part(bytes: &[u8], from: usize, to: usize) -> &[u8] {
    bytes.get(from..to).unwrap_or_default()
}

/// Returns the first byte, percent-decoded, and the number of bytes that encode it.
fn next(bytes: &[u8]) -> Option<(u8, usize)> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    if let [b'%', high, low, ..] = *bytes
        && let (Some(high), Some(low)) = (digit(high), digit(low))
    {
        return Some(((high << 4 | low) as u8, 3));
    }
    bytes.first().map(|byte| (*byte, 1))
}

fn is_secret_field(name: &str) -> bool {
    let mut words = Name::default();
    name.bytes().for_each(|byte| words.push(byte));
    SECRET_FIELDS
        .iter()
        .any(|secret| secret.eq_ignore_ascii_case(name))
        || words.is_secret()
}

/// Searches a name for signs of a secret, byte by byte.
#[derive(Clone, Copy, Default)]
struct Name {
    /// The last letters, in lower case.
    tail: [u8; Self::TAIL],
    /// Number of letters since the last byte that is no letter.
    letters: usize,
    /// Number of letters of the last word.
    word: usize,
    /// Whether the last letter is in upper case.
    upper: bool,
    /// Whether the letter before the last one is in upper case.
    run: bool,
    /// Whether a sign of a secret was found.
    secret: bool,
}

impl Name {
    /// Number of letters that are kept: at least the length of the longest entry of `SECRET_PARTS` and `SECRET_WORDS`.
    const TAIL: usize = 12;

    fn push(&mut self, byte: u8) {
        if self.secret {
            return;
        }
        if !byte.is_ascii_alphabetic() {
            self.end_word(0);
            (self.letters, self.word) = (0, 0);
            (self.upper, self.run) = (false, false);
            return;
        }
        let upper = byte.is_ascii_uppercase();
        if upper && !self.upper {
            // `fooBar`: a word begins at an upper-case letter.
            self.end_word(0);
            self.word = 0;
        } else if !upper && self.upper && self.run {
            // `APIKey`: a word begins at the last upper-case letter.
            self.end_word(1);
            self.word = 1;
        }
        self.run = self.upper;
        self.upper = upper;
        self.tail.copy_within(1.., 0);
        self.tail[Self::TAIL - 1] = byte.to_ascii_lowercase();
        self.letters += 1;
        self.word += 1;
        let tail = part(&self.tail, Self::TAIL.saturating_sub(self.letters), Self::TAIL);
        self.secret = SECRET_PARTS.iter().any(|part| tail.ends_with(part));
    }

    /// Checks whether the last word is a secret word. The last `before` letters of `tail` do not belong to the word.
    fn end_word(&mut self, before: usize) {
        let end = Self::TAIL - before;
        let word = Self::TAIL
            .checked_sub(self.word)
            .and_then(|begin| self.tail.get(begin..end));
        self.secret |= word.is_some_and(is_secret_word);
    }

    fn is_secret(mut self) -> bool {
        self.end_word(0);
        self.secret
    }
}

fn is_secret_word(word: &[u8]) -> bool {
    let one = word.strip_suffix(b"s").unwrap_or(word);
    SECRET_WORDS
        .iter()
        .any(|secret| *secret == word || *secret == one)
}

#[cfg(test)]
mod tests;
