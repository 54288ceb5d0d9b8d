//! Repair of the `:authority` of requests.
//!
//! Clients that are built on the C core of gRPC send the percent-encoded path of a unix socket as `:authority`. That is no
//! authority (RFC 3986, section 3.2), and the HTTP/2 implementation refuses such requests. The API does not use the
//! authority, so the bytes that are not allowed are replaced before the requests are parsed. The length stays the same.

use bytes::{Buf as _, BytesMut};

use crate::budget;

/// Length of a frame header (RFC 9113, section 4.1), bytes.
const HEADER_BYTES: usize = 9;
/// Type of a HEADERS frame.
const HEADERS: u8 = 1;
/// Flag of a HEADERS frame: the payload begins with the length of the padding.
const PADDED: u8 = 0x8;
/// Flag of a HEADERS frame: 5 bytes of a priority precede the header block.
const PRIORITY: u8 = 0x20;
/// Longest frame that the server accepts (the initial SETTINGS_MAX_FRAME_SIZE), bytes. A longer one is passed on
/// unchanged, and refused by the HTTP/2 implementation.
const MAX_FRAME_BYTES: usize = 16_384;
/// Index of `:authority` in the static table (RFC 7541, appendix A).
const AUTHORITY_INDEX: usize = 1;

/// Bytes that a client has sent, on their way to the HTTP/2 implementation.
#[derive(Debug)]
pub(crate) struct Repair {
    /// Bytes that are not complete frames yet.
    waiting: BytesMut,
    /// Bytes that can be passed on.
    ready: BytesMut,
    /// Number of next bytes that are passed on without being parsed: the connection preface, and the payload of
    /// frames without header fields.
    plain: usize,
}

impl Repair {
    /// Returns the state at the start of a connection. `preface`: length of the connection preface, bytes.
    pub(crate) fn new(preface: usize) -> Self {
        Self {
            waiting: BytesMut::new(),
            ready: BytesMut::new(),
            plain: preface,
        }
    }

    /// Adds received bytes. Returns the cost of the frames whose first bytes are among them.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> u32 {
        self.waiting.extend_from_slice(bytes);
        let mut cost = 0_u32;
        loop {
            let plain = self.plain.min(self.waiting.len());
            self.plain -= plain;
            self.pass(plain);
            let [a, b, c, kind, flags, ..] = self.waiting[..] else {
                return cost;
            };
            if self.waiting.len() < HEADER_BYTES {
                return cost;
            }
            let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
            if kind != HEADERS || length > MAX_FRAME_BYTES {
                cost = cost.saturating_add(budget::cost(kind));
                self.plain = HEADER_BYTES + length;
                continue;
            }
            let end = HEADER_BYTES + length;
            if self.waiting.len() < end {
                return cost;
            }
            cost = cost.saturating_add(budget::cost(kind));
            repair_payload(flags, &mut self.waiting[HEADER_BYTES..end]);
            self.pass(end);
        }
    }

    /// Passes on what has arrived of an incomplete frame: no more bytes follow.
    pub(crate) fn end(&mut self) {
        self.pass(self.waiting.len());
    }

    fn pass(&mut self, count: usize) {
        self.ready.extend_from_slice(&self.waiting[..count]);
        self.waiting.advance(count);
    }

    /// Returns the bytes that can be passed on; the caller removes them with [`Self::consume`].
    pub(crate) fn ready(&self) -> &[u8] {
        &self.ready
    }

    pub(crate) fn consume(&mut self, count: usize) {
        self.ready.advance(count);
    }
}

fn repair_payload(flags: u8, mut payload: &mut [u8]) {
    if flags & PADDED != 0 {
        payload = payload.get_mut(1..).unwrap_or_default();
    }
    if flags & PRIORITY != 0 {
        payload = payload.get_mut(5..).unwrap_or_default();
    }
    // `None` stands for the end of the block, or for a block that the HTTP/2 implementation refuses.
    let mut at = 0;
    while let Some(next) = repair_field(payload, at) {
        at = next;
    }
}

/// Repairs one field of a header block (RFC 7541, section 6) if it is `:authority`. Returns the offset of the next
/// field.
fn repair_field(block: &mut [u8], at: usize) -> Option<usize> {
    let first = *block.get(at)?;
    // Indexed field, or a change of the size of the dynamic table: a number alone.
    if first & 0x80 != 0 {
        return integer(block, at, 7).map(|(_, next)| next);
    }
    if first & 0xe0 == 0x20 {
        return integer(block, at, 5).map(|(_, next)| next);
    }
    let prefix = if first & 0x40 != 0 { 6 } else { 4 };
    let (index, mut next) = integer(block, at, prefix)?;
    let mut is_authority = index == AUTHORITY_INDEX;
    if index == 0 {
        let (encoded, begin, end) = string(block, next)?;
        is_authority = !encoded && &block[begin..end] == b":authority";
        next = end;
    }
    let (encoded, begin, end) = string(block, next)?;
    if is_authority && !encoded {
        for byte in &mut block[begin..end] {
            if !(byte.is_ascii_alphanumeric() || b".-:[]".contains(byte)) {
                *byte = b'-';
            }
        }
    }
    Some(end)
}

/// Decodes an integer with a prefix of some bits (RFC 7541, section 5.1). Returns the number and the offset after it.
fn integer(block: &[u8], mut at: usize, prefix: u32) -> Option<(usize, usize)> {
    let mask = (1_usize << prefix) - 1;
    let mut value = usize::from(*block.get(at)?) & mask;
    at += 1;
    if value < mask {
        return Some((value, at));
    }
    // Larger numbers exceed every frame.
    for shift in [0, 7, 14] {
        let byte = usize::from(*block.get(at)?);
        at += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((value, at));
        }
    }
    None
}

/// Returns whether a string is Huffman-encoded, and the offsets of its first byte and after its last one (RFC 7541,
/// section 5.2).
fn string(block: &[u8], at: usize) -> Option<(bool, usize, usize)> {
    let encoded = block.get(at)? & 0x80 != 0;
    let (length, begin) = integer(block, at, 7)?;
    let end = begin.checked_add(length).filter(|end| *end <= block.len())?;
    Some((encoded, begin, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).unwrap();
        [&[0, 0, length, kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// The bytes of a connection, passed in pieces of a size.
    fn repaired(bytes: &[u8], size: usize) -> Vec<u8> {
        let mut repair = Repair::new(PREFACE.len());
        let mut out = Vec::new();
        for piece in bytes.chunks(size) {
            repair.push(piece);
            out.extend_from_slice(repair.ready());
            repair.consume(repair.ready().len());
        }
        repair.end();
        out.extend_from_slice(repair.ready());
        out
    }

    #[test]
    fn only_the_authority_changes_wherever_the_bytes_are_cut() {
        let block = |authority: &[u8], by_index: &[u8]| {
            let path = b"\x40\x05:path\x0e/a.B/%2Fc-%-%-";
            [
                &path[..],
                b"\x40\x0a:authority\x0d",
                authority,
                b"\x83\x3f\x21\x41\x05",
                by_index,
            ]
            .concat()
        };
        let other = b"\x0a:authority\x03a%b";
        let whole = |authority: &[u8], by_index: &[u8]| {
            let block = block(authority, by_index);
            let padded = [&[2, 0, 0, 0, 0, 9], &block[..], &[0, 0]].concat();
            [
                PREFACE,
                &frame(4, 0, b"123456"),
                &frame(1, 4, &block),
                &frame(0, 1, other),
                &frame(1, 0x2c, &padded),
            ]
            .concat()
        };
        let (sent, wanted) = (
            whole(b"tmp%2Fhy.sock", b"a%[:]"),
            whole(b"tmp-2Fhy.sock", b"a-[:]"),
        );
        for size in 1..sent.len() {
            assert_eq!(repaired(&sent, size), wanted, "{size}");
        }
    }

    #[test]
    fn broken_blocks_and_frames_pass_unchanged() {
        for block in [
            &b"\x40\x7fxx"[..],
            b"\x40\xff\xff\xff\xff\xff\x01",
            b"\x41",
            b"\x40\x8aabc",
            b"",
        ] {
            let bytes = [PREFACE, &frame(1, 4, block), &frame(1, 0x28, block)].concat();
            assert_eq!(repaired(&bytes, 7), bytes);
        }
        // A frame that is longer than the server accepts, cut off.
        let bytes = [PREFACE, &[1, 0, 0, 1, 4, 0, 0, 0, 1], b"\x41\x03a%b"].concat();
        assert_eq!(repaired(&bytes, 5), bytes);
    }
}
