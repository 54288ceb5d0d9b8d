//! Addresses as map keys, and the keys and values of the ipcache, the prefix trie and the learned addresses.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// An IP address as 16 bytes in network order; IPv4 as the IPv4-mapped `::ffff:a.b.c.d` (RFC 4291, section 2.5.5.2).
///
/// The type is four words instead of sixteen bytes, because the programs compare and copy words in registers. Each word
/// holds four bytes of the address in network order in memory, so its numeric value depends on the host's byte order.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Debug,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
pub struct Addr(pub [u32; 4]);

impl Addr {
    /// The unspecified address `::`, also the value of an unused field.
    pub const UNSPECIFIED: Self = Self([0; 4]);

    /// Makes an address from 16 bytes in network order.
    #[inline(always)]
    #[must_use]
    pub const fn from_bytes(b: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
            u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
            u32::from_ne_bytes([b[8], b[9], b[10], b[11]]),
            u32::from_ne_bytes([b[12], b[13], b[14], b[15]]),
        ])
    }

    /// Makes an address from the four bytes of an IPv4 address in network order.
    #[inline(always)]
    #[must_use]
    pub const fn from_v4(b: [u8; 4]) -> Self {
        Self::from_v4_word(u32::from_ne_bytes(b))
    }

    /// Makes an address from an IPv4 address in network order that was read as one word, without a byte swap.
    #[inline(always)]
    #[must_use]
    pub const fn from_v4_word(word: u32) -> Self {
        Self([0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), word])
    }

    /// Returns the 16 bytes in network order.
    #[inline(always)]
    #[must_use]
    pub const fn bytes(self) -> [u8; 16] {
        let (a, b, c, d) = (
            self.0[0].to_ne_bytes(),
            self.0[1].to_ne_bytes(),
            self.0[2].to_ne_bytes(),
            self.0[3].to_ne_bytes(),
        );
        [
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3],
        ]
    }

    /// Returns the first `length` bits of the address; the others are zero.
    #[must_use]
    pub const fn mask(self, length: u32) -> Self {
        let bits = u128::from_be_bytes(self.bytes());
        let kept = match length {
            0 => 0,
            1..=127 => bits & (u128::MAX << (128 - length)),
            _ => bits,
        };
        Self::from_bytes(kept.to_be_bytes())
    }

    /// Returns whether this is an IPv4-mapped address.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == u32::from_ne_bytes([0, 0, 0xff, 0xff])
    }
}

impl From<core::net::IpAddr> for Addr {
    fn from(ip: core::net::IpAddr) -> Self {
        match ip {
            core::net::IpAddr::V4(v4) => Self::from_v4(v4.octets()),
            core::net::IpAddr::V6(v6) => Self::from_bytes(v6.octets()),
        }
    }
}

impl From<Addr> for core::net::IpAddr {
    fn from(addr: Addr) -> Self {
        let b = addr.bytes();
        if addr.is_v4() {
            core::net::IpAddr::V4(core::net::Ipv4Addr::new(b[12], b[13], b[14], b[15]))
        } else {
            core::net::IpAddr::V6(core::net::Ipv6Addr::from(b))
        }
    }
}

/// Key of the prefix trie.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PrefixKey {
    /// Prefix length in bits of the 16-byte address, host byte order. An IPv4 prefix /n has the length 96 + n.
    pub length: u32,
    /// Address of the prefix; the bits after the first `length` are zero.
    pub addr: Addr,
}

/// Value of the ipcache and of the prefix trie: identity and endpoint of an address.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IpcacheEntry {
    /// Identity, see [`crate::identity`].
    pub identity: u32,
    /// Number of the endpoint of this node that has the address; 0 if no endpoint has it. The node itself is an
    /// endpoint too.
    pub endpoint: u16,
    /// Flags; none are defined, zero.
    pub flags: u16,
}

/// Key of the LEARNED map: an address that a DNS answer has given to an endpoint.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
pub struct LearnedKey {
    /// The learned address.
    pub addr: Addr,
    /// The endpoint to which the DNS answer was sent.
    pub endpoint: u32,
}
