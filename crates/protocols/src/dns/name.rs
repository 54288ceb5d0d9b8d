//! Domain names in wire form.

use std::{
    borrow::Borrow,
    fmt,
    hash::{Hash, Hasher},
    str::FromStr,
};

/// Maximum length of a name in wire form, with its root label, bytes (RFC 1035, section 3.1).
pub(super) const MAX_NAME: usize = 255;
/// Maximum length of a label without its length byte, bytes (RFC 1035, section 3.1).
pub(super) const MAX_LABEL: usize = 63;

/// A domain name in wire form: length-prefixed labels and the root label, in lower case and uncompressed.
///
/// In text a dot within a label looks like a separator; in wire form it does not. A comparison of two names is one
/// comparison of slices. The bytes are stored inline, so a name needs no allocation.
#[derive(Clone)]
pub struct Name {
    len: u8,
    wire: [u8; MAX_NAME],
}

impl Name {
    /// The root name.
    pub const ROOT: Self = Self {
        len: 1,
        wire: [0; MAX_NAME],
    };

    /// Returns the wire form, with the root label.
    #[must_use]
    pub fn wire(&self) -> &[u8] {
        self.wire.get(..usize::from(self.len)).unwrap_or_default()
    }

    /// Returns whether this is the root name.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.len == 1
    }

    /// Returns the labels from left to right, without the root label.
    #[must_use]
    pub fn labels(&self) -> Labels<'_> {
        Labels { rest: self.wire() }
    }

    /// Parses the wire form that [`Name::wire`] returns.
    ///
    /// # Errors
    /// [`NameError`] if the bytes are not exactly one uncompressed name.
    pub fn from_wire(wire: &[u8]) -> Result<Self, NameError> {
        let mut builder = NameBuilder::new();
        let mut rest = wire;
        loop {
            match rest.split_first() {
                Some((0, [])) => return Ok(builder.finish()),
                Some((&n, tail)) if n > 0 && tail.len() >= usize::from(n) => {
                    let (label, tail) = tail.split_at(usize::from(n));
                    builder.push(label)?;
                    rest = tail;
                }
                _ => return Err(NameError::NotWire),
            }
        }
    }
}

impl Default for Name {
    fn default() -> Self {
        Self::ROOT
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.wire() == other.wire()
    }
}

impl Eq for Name {}

impl Hash for Name {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.wire().hash(state);
    }
}

impl Borrow<[u8]> for Name {
    fn borrow(&self) -> &[u8] {
        self.wire()
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Name({self})")
    }
}

/// Formats the name as text without the trailing dot; the root name is `.`. Dots within labels, backslashes and bytes
/// other than visible ASCII are escaped (RFC 4343, section 2.1).
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write as _;
        if self.is_root() {
            return f.write_char('.');
        }
        for (i, label) in self.labels().enumerate() {
            if i > 0 {
                f.write_char('.')?;
            }
            for &byte in label {
                match byte {
                    b'.' | b'\\' => write!(f, "\\{}", char::from(byte))?,
                    0x21..=0x7e => f.write_char(char::from(byte))?,
                    _ => write!(f, "\\{byte:03}")?,
                }
            }
        }
        Ok(())
    }
}

/// Parses text, with or without the trailing dot. Accepts the escapes that `Display` writes.
impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text == "." {
            return Ok(Self::ROOT);
        }
        let mut builder = NameBuilder::new();
        let mut label = [0; MAX_LABEL];
        let mut len = 0;
        let mut bytes = text.bytes();
        while let Some(byte) = bytes.next() {
            let byte = match byte {
                b'.' => {
                    if len == 0 {
                        return Err(NameError::EmptyLabel);
                    }
                    builder.push(label.get(..len).ok_or(NameError::LabelTooLong)?)?;
                    len = 0;
                    continue;
                }
                b'\\' => match bytes.next().ok_or(NameError::Escape)? {
                    hundreds @ b'0'..=b'9' => {
                        let mut value = u16::from(hundreds - b'0');
                        for _ in 0..2 {
                            let digit = bytes.next().filter(u8::is_ascii_digit).ok_or(NameError::Escape)?;
                            value = value * 10 + u16::from(digit - b'0');
                        }
                        u8::try_from(value).map_err(|_| NameError::Escape)?
                    }
                    other => other,
                },
                other => other,
            };
            *label.get_mut(len).ok_or(NameError::LabelTooLong)? = byte;
            len += 1;
        }
        if len > 0 {
            builder.push(label.get(..len).ok_or(NameError::LabelTooLong)?)?;
        } else if text.is_empty() {
            return Err(NameError::EmptyLabel);
        }
        Ok(builder.finish())
    }
}

/// Iterator over the labels of a [`Name`], from left to right.
#[derive(Clone, Debug)]
pub struct Labels<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Labels<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (&n, tail) = self.rest.split_first()?;
        if n == 0 {
            return None;
        }
        let (label, tail) = tail.split_at_checked(usize::from(n))?;
        self.rest = tail;
        Some(label)
    }
}

/// The reason why text or bytes are not a valid name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameError {
    /// More than 255 bytes.
    TooLong,
    /// A label of more than 63 bytes.
    LabelTooLong,
    /// Two adjacent dots, a leading dot, or empty text.
    EmptyLabel,
    /// A backslash at the end of the text, or a numeric escape other than `\000` to `\255`.
    Escape,
    /// Bytes that are not an uncompressed name in wire form.
    NotWire,
}

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "name longer than 255 bytes",
            Self::LabelTooLong => "label longer than 63 bytes",
            Self::EmptyLabel => "empty label",
            Self::Escape => "bad escape",
            Self::NotWire => "not the wire form of a name",
        })
    }
}

impl std::error::Error for NameError {}

/// Builds a name from its labels, from left to right.
pub(super) struct NameBuilder {
    len: usize,
    wire: [u8; MAX_NAME],
}

impl NameBuilder {
    pub(super) fn new() -> Self {
        Self {
            len: 0,
            wire: [0; MAX_NAME],
        }
    }

    /// Appends a label, which must not be empty, in lower case. A label of more than 63 bytes is an error.
    pub(super) fn push(&mut self, label: &[u8]) -> Result<(), NameError> {
        if label.len() > MAX_LABEL {
            return Err(NameError::LabelTooLong);
        }
        let end = self.len + 1 + label.len();
        // One byte is reserved for the root label.
        if end >= MAX_NAME {
            return Err(NameError::TooLong);
        }
        let Some([length, bytes @ ..]) = self.wire.get_mut(self.len..end) else {
            return Err(NameError::TooLong);
        };
        *length = label.len() as u8;
        bytes.copy_from_slice(label);
        bytes.make_ascii_lowercase();
        self.len = end;
        Ok(())
    }

    pub(super) fn finish(self) -> Name {
        // The root label is the zero byte that `push` has reserved.
        Name {
            len: (self.len + 1) as u8,
            wire: self.wire,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trip() {
        for (text, shown) in [
            ("Example.COM.", "example.com"),
            ("example.com", "example.com"),
            (".", "."),
            ("a\\.b.c", "a\\.b.c"),
            ("\\000\\255x.y", "\\000\\255x.y"),
            ("_dns.resolver.arpa", "_dns.resolver.arpa"),
        ] {
            let name: Name = text.parse().unwrap();
            assert_eq!(name.to_string(), shown);
            assert_eq!(shown.parse::<Name>().unwrap(), name);
            assert_eq!(Name::from_wire(name.wire()).unwrap(), name);
        }
    }

    #[test]
    fn a_dot_inside_a_label_is_no_separator() {
        assert_ne!("a\\.b".parse::<Name>().unwrap(), "a.b".parse::<Name>().unwrap());
    }

    #[test]
    fn limits() {
        let label = "a".repeat(63);
        assert_eq!(
            format!("{label}a.x").parse::<Name>(),
            Err(NameError::LabelTooLong)
        );
        // 3 × 64 + 62 + root = 255
        let longest = format!("{label}.{label}.{label}.{}", "b".repeat(61));
        assert_eq!(longest.parse::<Name>().unwrap().wire().len(), 255);
        let over = format!("{label}.{label}.{label}.{}", "b".repeat(62));
        assert_eq!(over.parse::<Name>(), Err(NameError::TooLong));
        for bad in ["", "..", "a..b", ".a"] {
            assert_eq!(bad.parse::<Name>(), Err(NameError::EmptyLabel), "{bad}");
        }
        for bad in ["\\", "\\25", "\\256", "\\2x5"] {
            assert_eq!(bad.parse::<Name>(), Err(NameError::Escape), "{bad}");
        }
        for bad in [&b""[..], b"\x01a", b"\x00\x00", b"\x02a\x00", b"\xc0\x0c"] {
            assert!(Name::from_wire(bad).is_err(), "{bad:?}");
        }
    }
}
