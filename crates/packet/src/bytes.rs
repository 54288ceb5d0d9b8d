//! Access to the bytes of a frame.

use palisade_abi::Reason;

/// Limit of the offset of a header in a frame, bytes. A chain of IPv6 extension headers that exceeds the limit is
/// malformed, and an ICMP error that quotes such a chain matches no flow.
pub const MAX_HEADERS: u32 = 1024;

/// The bytes of a frame.
pub trait Bytes {
    /// Returns the length of the frame, including a part that is not readable in place.
    fn len(&self) -> u32;

    /// Returns whether the frame has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns `N` bytes at `offset`; `None` if not all of them are readable in place, or if `offset` exceeds
    /// [`MAX_HEADERS`].
    fn array<const N: usize>(&self, offset: u32) -> Option<&[u8; N]>;

    /// Returns the four bytes at offset `at` of a header from [`Self::array`] as one word, without a byte swap. Callers
    /// pass a constant `at`, even and at most `N - 4`.
    #[inline(always)]
    #[must_use]
    fn word<const N: usize>(header: &[u8; N], at: usize) -> u32 {
        let word = header.get(at..).and_then(<[u8]>::first_chunk);
        debug_assert!(word.is_some(), "a word at {at} of {N} bytes");
        u32::from_ne_bytes(word.copied().unwrap_or_default())
    }
}

impl Bytes for [u8] {
    #[inline(always)]
    fn len(&self) -> u32 {
        u32::try_from(<[u8]>::len(self)).unwrap_or(u32::MAX)
    }

    #[inline(always)]
    fn array<const N: usize>(&self, offset: u32) -> Option<&[u8; N]> {
        if offset > MAX_HEADERS {
            return None;
        }
        self.get(offset as usize..)?.first_chunk::<N>()
    }
}

/// Returns `N` bytes at `offset` of a packet that ends at `end`. Returns the reason `short` if the packet ends before
/// the last of these bytes, [`Reason::PullFailed`] if they are not readable in place.
#[inline(always)]
pub(crate) fn take<const N: usize, B: Bytes + ?Sized>(
    bytes: &B,
    offset: u32,
    end: u32,
    short: Reason,
) -> Result<&[u8; N], Reason> {
    if offset + N as u32 > end {
        return Err(short);
    }
    bytes.array::<N>(offset).ok_or(Reason::PullFailed)
}
