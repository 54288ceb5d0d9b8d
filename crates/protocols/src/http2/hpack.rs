//! Decoder of header blocks (RFC 7541), bounded in memory and time.

use std::collections::VecDeque;

use super::{
    ParseError,
    fields::{Fields, OVERHEAD},
    huffman,
};

/// Maximum size of a dynamic table, bytes: the initial value of SETTINGS_HEADER_TABLE_SIZE. An intermediary announces
/// at most this value, so that the memory of a decoder is bounded.
pub const TABLE_SIZE: u32 = 4_096;
/// A header list that exceeds the permitted size by this factor is not decoded further. Below that size, fields in
/// excess are decoded without being stored, so that the dynamic table stays valid for the next block.
const EXCESS: usize = 4;

pub(super) const STATIC_ENTRIES: usize = 61;

/// The static table (RFC 7541, appendix A). The first entry has index 1.
pub(super) const STATIC: [(&[u8], &[u8]); STATIC_ENTRIES] = [
    (b":authority", b""),
    (b":method", b"GET"),
    (b":method", b"POST"),
    (b":path", b"/"),
    (b":path", b"/index.html"),
    (b":scheme", b"http"),
    (b":scheme", b"https"),
    (b":status", b"200"),
    (b":status", b"204"),
    (b":status", b"206"),
    (b":status", b"304"),
    (b":status", b"400"),
    (b":status", b"404"),
    (b":status", b"500"),
    (b"accept-charset", b""),
    (b"accept-encoding", b"gzip, deflate"),
    (b"accept-language", b""),
    (b"accept-ranges", b""),
    (b"accept", b""),
    (b"access-control-allow-origin", b""),
    (b"age", b""),
    (b"allow", b""),
    (b"authorization", b""),
    (b"cache-control", b""),
    (b"content-disposition", b""),
    (b"content-encoding", b""),
    (b"content-language", b""),
    (b"content-length", b""),
    (b"content-location", b""),
    (b"content-range", b""),
    (b"content-type", b""),
    (b"cookie", b""),
    (b"date", b""),
    (b"etag", b""),
    (b"expect", b""),
    (b"expires", b""),
    (b"from", b""),
    (b"host", b""),
    (b"if-match", b""),
    (b"if-modified-since", b""),
    (b"if-none-match", b""),
    (b"if-range", b""),
    (b"if-unmodified-since", b""),
    (b"last-modified", b""),
    (b"link", b""),
    (b"location", b""),
    (b"max-forwards", b""),
    (b"proxy-authenticate", b""),
    (b"proxy-authorization", b""),
    (b"range", b""),
    (b"referer", b""),
    (b"refresh", b""),
    (b"retry-after", b""),
    (b"server", b""),
    (b"set-cookie", b""),
    (b"strict-transport-security", b""),
    (b"transfer-encoding", b""),
    (b"user-agent", b""),
    (b"vary", b""),
    (b"via", b""),
    (b"www-authenticate", b""),
];

/// The dynamic table size updates of a header block (RFC 7541, section 6.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SizeUpdates {
    /// The lowest size, bytes; `None` if the block has no update.
    pub least: Option<u32>,
    /// The last size, bytes.
    pub last: Option<u32>,
}

impl SizeUpdates {
    /// Adds the updates of a later block.
    pub fn merge(&mut self, later: Self) {
        self.least = [self.least, later.least].into_iter().flatten().min();
        self.last = later.last.or(self.last);
    }
}

/// Decoder of the header blocks of one direction of a connection.
#[derive(Clone, Debug)]
pub struct Decoder {
    table: Table,
    /// Maximum table size that the settings permit, bytes.
    limit: u32,
    /// The lowest limit since the last block, if the next block must begin with a size update.
    required: Option<u32>,
    strict: bool,
}

impl Decoder {
    /// Returns a decoder that refuses a block without the size update that a reduced limit requires.
    #[must_use]
    pub fn strict() -> Self {
        Self {
            table: Table {
                max: TABLE_SIZE as usize,
                ..Table::default()
            },
            limit: TABLE_SIZE,
            required: None,
            strict: true,
        }
    }

    /// Returns a decoder that does not require size updates.
    #[must_use]
    pub fn lenient() -> Self {
        Self {
            strict: false,
            ..Self::strict()
        }
    }

    /// Sets the maximum table size once the encoder has acknowledged the setting. `limit`: bytes, at most
    /// [`TABLE_SIZE`].
    pub fn set_limit(&mut self, limit: u32) {
        self.limit = limit.min(TABLE_SIZE);
        // RFC 7541, section 4.2: if the limit changes several times, the encoder announces the lowest value.
        if (self.limit as usize) < self.table.max {
            self.required = Some(self.required.map_or(self.limit, |least| least.min(self.limit)));
        }
    }

    /// Returns the lowest limit since the last block, if the next block must begin with a size update.
    #[must_use]
    pub const fn required_update(&self) -> Option<u32> {
        self.required
    }

    /// Replaces `fields` by the fields of a complete header block. Fields beyond a size of `max` bytes are left out.
    ///
    /// # Errors
    /// [`ParseError`] if the block is malformed or exceeds `max` several times over. The decoder must not be used
    /// afterwards.
    pub fn decode(
        &mut self,
        block: &[u8],
        max: usize,
        fields: &mut Fields,
    ) -> Result<SizeUpdates, ParseError> {
        fields.clear();
        let mut input = block;
        let updates = self.size_updates(&mut input)?;
        while let Some(&first) = input.first() {
            let begin = fields.end();
            let (indexed, sensitive, prefix) = match first {
                0x80.. => {
                    let (name, value) = self.entry(integer(&mut input, 7)?)?;
                    if fields.admit(name.len() + value.len(), max) {
                        let buffer = fields.buffer();
                        buffer.extend_from_slice(name);
                        let middle = buffer.len();
                        buffer.extend_from_slice(value);
                        fields.add(begin, middle, false);
                    }
                    check_excess(fields, max)?;
                    continue;
                }
                0x40.. => (true, false, 6),
                // A size update is allowed only at the start of a block.
                0x20.. => return Err(ParseError::Hpack),
                0x10.. => (false, true, 4),
                _ => (false, false, 4),
            };
            match integer(&mut input, prefix)? {
                0 => string(&mut input, fields.buffer())?,
                index => {
                    let (name, _) = self.entry(index)?;
                    fields.buffer().extend_from_slice(name);
                }
            }
            let middle = fields.end();
            string(&mut input, fields.buffer())?;
            let end = fields.end();
            if indexed {
                self.table
                    .insert(fields.part(begin..middle), fields.part(middle..end));
            }
            if fields.admit(end - begin, max) {
                fields.add(begin, middle, sensitive);
            } else {
                fields.buffer().truncate(begin);
            }
            check_excess(fields, max)?;
        }
        Ok(updates)
    }

    fn size_updates(&mut self, input: &mut &[u8]) -> Result<SizeUpdates, ParseError> {
        let mut updates = SizeUpdates::default();
        let mut count = 0;
        while input.first().is_some_and(|byte| byte & 0xe0 == 0x20) {
            let size = integer(input, 5).map_err(|_| ParseError::TableSize)?;
            count += 1;
            // Two updates are enough to announce the lowest and the last size (RFC 7541, section 4.2).
            if size > self.limit || count > 2 {
                return Err(ParseError::TableSize);
            }
            self.table.resize(size as usize);
            updates.merge(SizeUpdates {
                least: Some(size),
                last: Some(size),
            });
        }
        match (self.required.take(), updates.least) {
            (Some(required), least) if self.strict && least.is_none_or(|least| least > required) => {
                Err(ParseError::TableSize)
            }
            _ => Ok(updates),
        }
    }

    fn entry(&self, index: u32) -> Result<(&[u8], &[u8]), ParseError> {
        let index = (index as usize).checked_sub(1).ok_or(ParseError::Hpack)?;
        match STATIC.get(index) {
            Some(entry) => Ok(*entry),
            None => self.table.get(index - STATIC_ENTRIES).ok_or(ParseError::Hpack),
        }
    }
}

fn check_excess(fields: &Fields, max: usize) -> Result<(), ParseError> {
    if fields.size() > max.saturating_mul(EXCESS) {
        Err(ParseError::ListTooLong)
    } else {
        Ok(())
    }
}

/// Reads an integer with a prefix of `prefix` bits (RFC 7541, section 5.1).
fn integer(input: &mut &[u8], prefix: u32) -> Result<u32, ParseError> {
    let mut next = || {
        let (&byte, rest) = input.split_first().ok_or(ParseError::Hpack)?;
        *input = rest;
        Ok(byte)
    };
    let mask = (1_u32 << prefix) - 1;
    let mut value = u32::from(next()?) & mask;
    if value < mask {
        return Ok(value);
    }
    // Four further bytes hold any length or index that is possible here.
    for shift in [0, 7, 14, 21] {
        let byte = next()?;
        value += u32::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(ParseError::Hpack)
}

/// Appends a string literal to `out` (RFC 7541, section 5.2).
fn string(input: &mut &[u8], out: &mut Vec<u8>) -> Result<(), ParseError> {
    let is_huffman = input.first().is_some_and(|byte| byte & 0x80 != 0);
    let length = integer(input, 7)? as usize;
    let (text, rest) = input.split_at_checked(length).ok_or(ParseError::Hpack)?;
    *input = rest;
    if is_huffman {
        huffman::decode(text, out).ok_or(ParseError::Hpack)
    } else {
        out.extend_from_slice(text);
        Ok(())
    }
}

/// A dynamic table (RFC 7541, section 2.3.2). The entries are consecutive in one buffer, the oldest entry first.
#[derive(Clone, Debug, Default)]
struct Table {
    bytes: Vec<u8>,
    /// Number of bytes that were removed from the start of `bytes`.
    removed: usize,
    entries: VecDeque<Entry>,
    size: usize,
    max: usize,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Offset of the name, counted from the first byte that the buffer ever had.
    at: usize,
    name: usize,
    value: usize,
}

impl Table {
    fn get(&self, index: usize) -> Option<(&[u8], &[u8])> {
        let place = self.entries.len().checked_sub(index.checked_add(1)?)?;
        let entry = self.entries.get(place)?;
        let rest = self.bytes.get(entry.at.wrapping_sub(self.removed)..)?;
        let (name, rest) = rest.split_at_checked(entry.name)?;
        Some((name, rest.get(..entry.value)?))
    }

    fn insert(&mut self, name: &[u8], value: &[u8]) {
        let size = name.len() + value.len() + OVERHEAD;
        self.evict(self.max.saturating_sub(size));
        if size > self.max {
            return;
        }
        // The buffer is compacted only when half of it is unused, so that a byte moves once on average.
        let oldest = self
            .entries
            .front()
            .map(|entry| entry.at.wrapping_sub(self.removed));
        let unused = oldest.unwrap_or(self.bytes.len());
        if unused > TABLE_SIZE as usize {
            self.bytes.drain(..unused);
            self.removed = self.removed.wrapping_add(unused);
        }
        self.entries.push_back(Entry {
            at: self.removed.wrapping_add(self.bytes.len()),
            name: name.len(),
            value: value.len(),
        });
        self.bytes.extend_from_slice(name);
        self.bytes.extend_from_slice(value);
        self.size += size;
    }

    fn resize(&mut self, max: usize) {
        self.max = max;
        self.evict(max);
    }

    /// Evicts the oldest entries until the size is at most `max`.
    fn evict(&mut self, max: usize) {
        while self.size > max
            && let Some(entry) = self.entries.pop_front()
        {
            self.size = self.size.saturating_sub(entry.name + entry.value + OVERHEAD);
        }
    }
}
