//! Decoded header fields, in one buffer.

use std::ops::Range;

/// Overhead of a field in the size of a header list or of a dynamic table, bytes (RFC 7541, section 4.1).
pub(super) const OVERHEAD: usize = 32;

/// The fields of one decoded header block, in order. The buffers are kept from one block to the next.
#[derive(Clone, Debug, Default)]
pub struct Fields {
    bytes: Vec<u8>,
    list: Vec<Place>,
    size: usize,
    truncated: bool,
}

#[derive(Clone, Debug)]
struct Place {
    name: Range<usize>,
    value: Range<usize>,
    sensitive: bool,
}

impl Fields {
    /// Returns names and values, and whether the field must never be indexed (RFC 7541, section 6.2.3).
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8], bool)> {
        self.list.iter().map(|place| {
            let part = |range: &Range<usize>| self.bytes.get(range.clone()).unwrap_or_default();
            (part(&place.name), part(&place.value), place.sensitive)
        })
    }

    /// Returns the value of the first field with this name.
    #[must_use]
    pub fn value(&self, name: &[u8]) -> Option<&[u8]> {
        self.iter()
            .find_map(|(known, value, _)| (known == name).then_some(value))
    }

    /// Returns the size of all decoded fields, bytes (RFC 9113, section 6.5.2), including those that were left out.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.size
    }

    /// Returns whether fields were left out because they exceed the permitted size.
    #[must_use]
    pub const fn is_truncated(&self) -> bool {
        self.truncated
    }

    /// Removes all fields.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.list.clear();
        self.size = 0;
        self.truncated = false;
    }

    /// Returns the number of bytes in the buffer.
    pub(super) const fn end(&self) -> usize {
        self.bytes.len()
    }

    pub(super) const fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Returns the bytes from `from` to `to`.
    pub(super) fn part(&self, range: Range<usize>) -> &[u8] {
        self.bytes.get(range).unwrap_or_default()
    }

    /// Counts a field of `length` bytes. Returns whether the field fits into `max`.
    pub(super) const fn admit(&mut self, length: usize, max: usize) -> bool {
        self.size = self.size.saturating_add(length.saturating_add(OVERHEAD));
        self.truncated |= self.size > max;
        !self.truncated
    }

    /// Adds the field whose name and value are the bytes from `begin` on; the value begins at `middle`.
    pub(super) fn add(&mut self, begin: usize, middle: usize, sensitive: bool) {
        self.list.push(Place {
            name: begin..middle,
            value: middle..self.bytes.len(),
            sensitive,
        });
    }
}
