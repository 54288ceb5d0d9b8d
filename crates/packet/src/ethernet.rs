//! The Ethernet header and up to two VLAN tags.

use palisade_abi::Reason;

use crate::bytes::{Bytes, take};
use crate::packet::Packet;

/// IPv4.
pub const ETHER_TYPE_IPV4: u16 = 0x0800;
/// IPv6.
pub const ETHER_TYPE_IPV6: u16 = 0x86dd;
/// Address resolution.
pub const ETHER_TYPE_ARP: u16 = 0x0806;
/// Customer VLAN tag, IEEE 802.1Q.
const ETHER_TYPE_VLAN: u16 = 0x8100;
/// Service VLAN tag, IEEE 802.1ad.
const ETHER_TYPE_SERVICE_VLAN: u16 = 0x88a8;

/// Maximum number of VLAN tags in a frame.
const MAX_TAGS: u32 = 2;

/// Finds the EtherType and the network header.
#[inline(always)]
pub(crate) fn decode<B: Bytes + ?Sized>(
    bytes: &B,
    tags_removed: u32,
    packet: &mut Packet,
) -> Result<(), Reason> {
    let header = take::<14, B>(bytes, 0, bytes.len(), Reason::TruncatedL2)?;
    let mut ether_type = u16::from_be_bytes([header[12], header[13]]);
    let mut offset = 14;
    let mut tags_left = MAX_TAGS.saturating_sub(tags_removed);
    // `tags_left` bounds the loop already; the counter shows the verifier the bound.
    for _ in 0..=MAX_TAGS {
        if !matches!(ether_type, ETHER_TYPE_VLAN | ETHER_TYPE_SERVICE_VLAN) {
            break;
        }
        if tags_left == 0 {
            packet.ether_type = ether_type;
            return Err(Reason::TooManyVlans);
        }
        tags_left -= 1;
        let tag = take::<4, B>(bytes, offset, bytes.len(), Reason::TruncatedL2)?;
        ether_type = u16::from_be_bytes([tag[2], tag[3]]);
        offset += 4;
    }
    packet.ether_type = ether_type;
    packet.network_offset = offset as u16;
    Ok(())
}
