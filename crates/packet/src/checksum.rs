//! The Internet checksum (RFC 1071), for user space. The BPF programs use the kernel's helpers instead.

use palisade_abi::Addr;

/// A ones' complement sum.
///
/// Words are added in host byte order, so no word needs a byte swap. A ones' complement sum has the byte order of its
/// words (RFC 1071, section 2 (B)), so one swap in [`Sum::fold`] suffices.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes. If several slices are added, all except the last must have an even length. An odd last byte is
    /// padded with zero.
    #[must_use]
    #[expect(
        clippy::should_implement_trait,
        reason = "`sum + bytes` would read as arithmetic on the bytes"
    )]
    pub fn add(mut self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        for word in words {
            // A u64 cannot overflow before 2^32 such words, and no packet is that long.
            self.0 += u64::from(u32::from_ne_bytes(*word));
        }
        let mut last = [0; 4];
        for (to, from) in last.iter_mut().zip(rest) {
            *to = *from;
        }
        self.0 += u64::from(u32::from_ne_bytes(last));
        self
    }

    /// Returns the sum of the pseudo header of a transport protocol (RFC 768; RFC 9293, section 3.1; RFC 8200, section
    /// 8.1).
    ///
    /// For IPv4-mapped addresses the result is the sum of the IPv4 pseudo header: the `ffff` of the mapping is zero in
    /// ones' complement.
    #[must_use]
    pub fn pseudo(source: Addr, destination: Addr, protocol: u8, length: usize) -> Self {
        Self::default()
            .add(&source.bytes())
            .add(&destination.bytes())
            .add_pseudo_tail(protocol, length)
    }

    /// Adds the fields of a pseudo header that follow the addresses: the length of the transport segment and the
    /// protocol number.
    #[must_use]
    pub fn add_pseudo_tail(self, protocol: u8, length: usize) -> Self {
        let mut tail = [0; 8];
        tail[..4].copy_from_slice(&(length as u32).to_be_bytes());
        tail[7] = protocol;
        self.add(&tail)
    }

    /// Returns the sum folded to sixteen bits, in host byte order. The result is `0xffff` if the bytes include a valid
    /// checksum.
    #[must_use]
    pub const fn fold(self) -> u16 {
        let mut sum = self.0;
        while sum >> 16 != 0 {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        u16::from_be(sum as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_rfc_1071() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::default().add(&bytes).fold(), 0xddf2);
    }

    #[test]
    fn the_sum_equals_that_of_sixteen_bit_words_padded_with_zero() {
        let mut bytes = [0; 40];
        for (n, byte) in (0u8..).zip(&mut bytes) {
            *byte = n.wrapping_mul(37) ^ 0x5a;
        }
        for length in 0..bytes.len() {
            let mut expected = 0u32;
            for pair in bytes[..length].chunks(2) {
                expected += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |byte| u32::from(*byte));
            }
            while expected > 0xffff {
                expected = (expected & 0xffff) + (expected >> 16);
            }
            let sum = Sum::default().add(&bytes[..length]);
            assert_eq!(u32::from(sum.fold()), expected, "{length}");
            for split in (0..length).step_by(2) {
                let sum = Sum::default().add(&bytes[..split]).add(&bytes[split..length]);
                assert_eq!(u32::from(sum.fold()), expected, "{split} of {length}");
            }
        }
    }

    #[test]
    fn the_pseudo_header_of_rfc_768() {
        // 10.0.0.1 -> 10.0.0.2, UDP, 12 bytes: 0a00 + 0001 + 0a00 + 0002 + 0011 + 000c.
        let addr = |last| Addr::from(core::net::IpAddr::from([10, 0, 0, last]));
        assert_eq!(Sum::pseudo(addr(1), addr(2), 17, 12).fold(), 0x1420);
    }
}
