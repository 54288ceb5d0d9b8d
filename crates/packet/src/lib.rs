//! The packet decoder: Ethernet, up to two VLAN tags, IPv4 with options, IPv6 with extension headers, and what
//! a verdict needs of TCP, UDP, SCTP, ICMP and ICMPv6.
//!
//! One source for the BPF programs and for user space: what is tested here is what runs in the kernel. Bytes
//! are read through [`Bytes`]; nothing is copied, nothing is allocated, every loop is bounded.
//!
//! A packet that could mean one thing to the firewall and another to its receiver is malformed here, whatever
//! a receiver would make of it.
//!
//! Depends on `palisade-abi`. Start at [`decode`], which fills a [`Packet`].
#![no_std]
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg_attr(not(test), deny(clippy::indexing_slicing))]
#![warn(unreachable_pub)]

pub mod checksum;
mod ethernet;
mod fragment;
mod ip;
mod quote;
mod transport;

use palisade_abi::{Addr, Reason, protocol};

pub use ethernet::{ETHER_TYPE_ARP, ETHER_TYPE_IPV4, ETHER_TYPE_IPV6};
pub use quote::{Quote, decode_quote};
pub use transport::{icmp, icmp_kind, icmpv6, valid_tcp_flags};

/// How far into a frame headers may reach. What lies beyond is not followed: an IPv6 extension header chain
/// that long is dropped, a quoted packet that far is related to nothing.
pub const MAX_HEADERS: u32 = 1024;

/// Most IPv6 extension headers in one packet.
pub const MAX_EXTENSIONS: u32 = 8;

/// A frame whose bytes can be read.
pub trait Bytes {
    /// Length of the frame, also of a part that is not readable in place.
    fn len(&self) -> u32;

    /// Whether the frame has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `N` bytes at `offset`; none if they are not (all) readable in place.
    fn array<const N: usize>(&self, offset: u32) -> Option<&[u8; N]>;

    /// Returns the four bytes at offset `at` of a header from [`Self::array`], in memory order. Callers pass a constant
    /// `at`, even and at most `N - 4`.
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

/// What kind of packet it is: bits of [`Packet::flags`].
pub mod flags {
    /// IPv6.
    pub const IPV6: u8 = 1;
    /// Not IP at all; [`super::Packet::ether_type`] says what.
    pub const NOT_IP: u8 = 2;
    /// First fragment of several.
    pub const FRAGMENT_FIRST: u8 = 4;
    /// A fragment that is not the first: it has no transport header.
    pub const FRAGMENT_LATER: u8 = 8;
    /// ICMP or ICMPv6 echo request.
    pub const ECHO_REQUEST: u8 = 16;
    /// ICMP or ICMPv6 echo reply.
    pub const ECHO_REPLY: u8 = 32;
    /// An ICMP or ICMPv6 error: it quotes a packet.
    pub const ICMP_ERROR: u8 = 64;
}

/// What a verdict needs to know of a packet.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Packet {
    /// Source address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// Source port, machine order; ICMP: the type; else 0.
    pub source_port: u16,
    /// Destination port, machine order; ICMP: the code; else 0.
    pub destination_port: u16,
    /// ICMP echo: the identifier.
    pub echo_id: u16,
    /// EtherType of the innermost header, or below 1536 an 802.3 length.
    pub ether_type: u16,
    /// Length from the network header on, without link padding.
    pub length: u32,
    /// Identification of a fragment, machine order.
    pub fragment_id: u32,
    /// Where the network header starts.
    pub network_offset: u16,
    /// Where the transport header starts, if there is one.
    pub transport_offset: u16,
    /// IP protocol. Of a later IPv6 fragment: what its fragment header says, which may be an extension header.
    pub protocol: u8,
    /// TCP flags.
    pub tcp_flags: u8,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// See [`flags`].
    pub flags: u8,
}

impl Packet {
    /// Whether any of the given [`flags`] is set.
    #[inline(always)]
    #[must_use]
    pub const fn is(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }

    /// Where the packet ends, counted from the start of the frame.
    #[inline(always)]
    const fn end(&self) -> u32 {
        self.network_offset as u32 + self.length
    }
}

/// Where a frame begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// With an Ethernet header.
    Ethernet {
        /// VLAN tags that the kernel has already taken out of the frame.
        tags_removed: u32,
    },
    /// With the network header.
    Network,
}

/// Decodes a frame into `packet`, which must be [`Packet::default`].
///
/// What was understood before an error is in `packet` all the same, for the report.
///
/// # Errors
/// Why the packet cannot be judged. [`Reason::PullFailed`] means that bytes the frame has are not readable in
/// place: the caller makes the first [`MAX_HEADERS`] readable and tries again.
#[inline(always)]
pub fn decode<B: Bytes + ?Sized>(bytes: &B, start: Start, packet: &mut Packet) -> Result<(), Reason> {
    match start {
        Start::Ethernet { tags_removed } => ethernet::decode(bytes, tags_removed, packet)?,
        Start::Network => {
            // The shortest header there is. (One byte at offset 0 is what the verifier cannot follow.)
            let header = take::<20, B>(bytes, 0, bytes.len(), Reason::TruncatedL3)?;
            packet.ether_type = match header[0] >> 4 {
                4 => ETHER_TYPE_IPV4,
                6 => ETHER_TYPE_IPV6,
                _ => 0,
            };
        }
    }
    match packet.ether_type {
        ETHER_TYPE_IPV4 => ip::decode_v4(bytes, packet),
        ETHER_TYPE_IPV6 => ip::decode_v6(bytes, packet),
        _ => {
            packet.flags = flags::NOT_IP;
            packet.length = bytes.len().saturating_sub(u32::from(packet.network_offset));
            Ok(())
        }
    }
}

/// `N` bytes at `offset` of a packet that ends at `end`; `short` if it ends before.
#[inline(always)]
fn take<const N: usize, B: Bytes + ?Sized>(
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

/// Whether `p` is ICMP of the family, and not the other family's.
#[inline(always)]
const fn is_icmp(p: u8, ipv6: bool) -> bool {
    if ipv6 {
        p == protocol::ICMPV6
    } else {
        p == protocol::ICMP
    }
}
