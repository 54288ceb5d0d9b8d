//! The packet decoder: Ethernet, up to two VLAN tags, IPv4 with options, IPv6 with extension headers, and the fields of
//! TCP, UDP, SCTP, ICMP and ICMPv6 that a verdict depends on.
//!
//! The BPF programs and user space share this source: tests in user space test the code that runs in the kernel. The
//! decoder reads the frame in place through [`Bytes`], allocates nothing, and bounds every loop.
//!
//! A packet counts as malformed if the firewall and the receiver could interpret it differently, even if some receivers
//! accept it.
//!
//! Depends on `palisade-abi`. Start at [`decode`], which fills a [`Packet`].
#![no_std]
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg_attr(not(test), deny(clippy::indexing_slicing))]
#![warn(unreachable_pub)]

mod bytes;
pub mod checksum;
mod ethernet;
mod fragment;
mod ip;
mod packet;
mod quote;
mod transport;

use palisade_abi::Reason;

pub use bytes::{Bytes, MAX_HEADERS};
pub use ethernet::{ETHER_TYPE_ARP, ETHER_TYPE_IPV4, ETHER_TYPE_IPV6};
pub use ip::MAX_EXTENSIONS;
pub use packet::{Packet, flags};
pub use quote::{Quote, decode_quote};
pub use transport::{icmp, icmp_kind, icmpv6, valid_tcp_flags};

use bytes::take;

/// The first header of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// An Ethernet header.
    Ethernet {
        /// Number of VLAN tags that are in `skb->vlan_tci` and not in the frame: 0 or 1.
        tags_removed: u32,
    },
    /// A network header.
    Network,
}

/// Decodes a frame into `packet`, which must be [`Packet::default`].
///
/// After an error, `packet` holds the fields that were decoded before the error; the drop event contains these fields.
///
/// # Errors
/// The reason why the packet is malformed. [`Reason::PullFailed`]: a header is not readable in place; the caller makes
/// the first [`MAX_HEADERS`] bytes of the frame readable and tries again.
#[inline(always)]
pub fn decode<B: Bytes + ?Sized>(bytes: &B, start: Start, packet: &mut Packet) -> Result<(), Reason> {
    match start {
        Start::Ethernet { tags_removed } => ethernet::decode(bytes, tags_removed, packet)?,
        Start::Network => {
            // Read 20 bytes, the shortest network header: the verifier derives no bound from a comparison for a single
            // byte at offset 0 (docs/VERIFIER.md).
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
