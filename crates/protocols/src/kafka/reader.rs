//! Reads the primitive types of the Kafka protocol. Every read is bounded by the slice of one message.

use super::error::ParseError;

/// Unread part of a message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
    /// Whether lengths are varints and structures end with tagged fields (KIP-482).
    flexible: bool,
}

impl<'a> Reader<'a> {
    pub(super) const fn new(rest: &'a [u8], flexible: bool) -> Self {
        Self { rest, flexible }
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(super) const fn set_flexible(&mut self, flexible: bool) {
        self.flexible = flexible;
    }

    pub(super) fn take(&mut self, n: usize) -> Result<&'a [u8], ParseError> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or(ParseError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], ParseError> {
        let taken = self.take(N)?;
        taken.first_chunk().copied().ok_or(ParseError::Truncated)
    }

    pub(super) fn i8(&mut self) -> Result<i8, ParseError> {
        self.array().map(i8::from_be_bytes)
    }

    pub(super) fn i16(&mut self) -> Result<i16, ParseError> {
        self.array().map(i16::from_be_bytes)
    }

    pub(super) fn i32(&mut self) -> Result<i32, ParseError> {
        self.array().map(i32::from_be_bytes)
    }

    /// Reads an unsigned varint of at most 32 bits. Bits beyond 32 are refused, because implementations differ in
    /// whether they ignore them.
    pub(super) fn varint(&mut self) -> Result<u32, ParseError> {
        let mut value = 0;
        for shift in [0, 7, 14, 21, 28] {
            let [byte] = self.array()?;
            if shift == 28 && byte > 0x0f {
                break;
            }
            value |= u32::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(ParseError::Varint)
    }

    /// Reads the length of a text; none for null.
    fn text_length(&mut self) -> Result<Option<usize>, ParseError> {
        if self.flexible {
            return self.compact_length();
        }
        Self::length(self.i16()?.into())
    }

    fn compact_length(&mut self) -> Result<Option<usize>, ParseError> {
        let length = self.varint()?.checked_sub(1);
        // Implementations that hold lengths in an `i32` read a larger one as negative.
        length
            .map(|n| {
                i32::try_from(n)
                    .ok()
                    .and_then(|n| usize::try_from(n).ok())
                    .ok_or(ParseError::Length)
            })
            .transpose()
    }

    /// Returns a length with a sign: -1 is null, and all other negative lengths are refused.
    fn length(length: i32) -> Result<Option<usize>, ParseError> {
        match usize::try_from(length) {
            Ok(length) => Ok(Some(length)),
            Err(_) if length == -1 => Ok(None),
            Err(_) => Err(ParseError::Length),
        }
    }

    /// Reads a text; none for null.
    pub(super) fn text(&mut self) -> Result<Option<&'a [u8]>, ParseError> {
        self.text_length()?.map(|length| self.take(length)).transpose()
    }

    /// Reads a text of the header, which has no compact form in any version.
    pub(super) fn header_text(&mut self) -> Result<Option<&'a [u8]>, ParseError> {
        Self::length(self.i16()?.into())?
            .map(|length| self.take(length))
            .transpose()
    }

    /// Skips bytes or records, which may be null.
    pub(super) fn skip_bytes(&mut self) -> Result<(), ParseError> {
        if let Some(length) = self.long_length()? {
            self.take(length)?;
        }
        Ok(())
    }

    fn long_length(&mut self) -> Result<Option<usize>, ParseError> {
        if self.flexible {
            return self.compact_length();
        }
        Self::length(self.i32()?)
    }

    /// Reads the number of elements of an array; none for null. Each element has at least one byte, so a larger number
    /// than there are bytes is refused before any element is read.
    pub(super) fn count(&mut self) -> Result<Option<usize>, ParseError> {
        let count = self.long_length()?;
        if count.is_some_and(|count| count > self.rest.len()) {
            return Err(ParseError::Truncated);
        }
        Ok(count)
    }

    /// Skips the tagged fields at the end of a structure. Their tags must increase (KIP-482), so that no field occurs
    /// twice.
    pub(super) fn skip_tags(&mut self) -> Result<(), ParseError> {
        if !self.flexible {
            return Ok(());
        }
        let mut least = 0;
        for _ in 0..self.varint()? {
            let tag = self.varint()?;
            if tag < least {
                return Err(ParseError::Tags);
            }
            least = tag.checked_add(1).ok_or(ParseError::Tags)?;
            let length = self.compact_size()?;
            self.take(length)?;
        }
        Ok(())
    }

    /// Skips tagged fields of at most `limit` bytes.
    pub(super) fn skip_tags_within(&mut self, limit: usize) -> Result<(), ParseError> {
        let Some((first, _)) = self.rest.split_at_checked(limit) else {
            return self.skip_tags();
        };
        let mut tags = Self::new(first, self.flexible);
        tags.skip_tags().map_err(|error| match error {
            ParseError::Truncated => ParseError::TooLong,
            other => other,
        })?;
        self.take(limit - tags.rest.len()).map(|_| ())
    }

    /// Reads the size of a tagged field. It is a plain varint, without the offset of a compact length.
    fn compact_size(&mut self) -> Result<usize, ParseError> {
        usize::try_from(self.varint()?).map_err(|_| ParseError::Length)
    }
}
