//! What a link needs to work: passes by rule, whatever the policies say.

use palisade_abi::protocol;
use palisade_packet::{Bytes, ETHER_TYPE_ARP, Packet, flags, icmpv6};

use crate::ctx::Context;
use crate::frame::{Frame, place};

/// Whether a frame that is not IP passes: ARP anywhere, the link-local control group 01:80:C2:00:00:0x
/// (spanning tree, LACP, LLDP, 802.1X; IEEE 802.1Q, table 8-1) on a NIC.
#[inline(always)]
pub fn passes_frame<C: Context>(ctx: C, frame: &Frame) -> bool {
    if frame.layer3 != 0 {
        return false;
    }
    if frame.packet.ether_type == ETHER_TYPE_ARP {
        return true;
    }
    if frame.place != place::NIC_IN && frame.place != place::NIC_OUT {
        return false;
    }
    match ctx.bytes(false).array::<6>(0) {
        Some(to) => matches!(to, [0x01, 0x80, 0xc2, 0, 0, last] if last & 0xf0 == 0),
        None => false,
    }
}

/// Whether a packet is neighbour discovery or multicast group membership, and comes from this link: then its hop
/// limit is one that no router lets through. Fragmented discovery is not accepted (RFC 6980).
#[inline(always)]
pub fn passes_packet(frame: &Frame) -> bool {
    let packet = &frame.packet;
    if packet.is(flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER) {
        return false;
    }
    match packet.protocol {
        // RFC 3376, 4: sent with a TTL of 1; and to a group, which is not routed here. (A packet to one address that
        // had a TTL of 2 on the way has one of 1 when it is sent on.)
        protocol::IGMP => {
            !packet.is(flags::IPV6)
                && packet.hop_limit == 1
                && packet.destination.0[3].to_ne_bytes()[0] & 0xf0 == 224
        }
        protocol::ICMPV6 => match packet.source_port as u8 {
            icmpv6::NEIGHBOUR_SOLICITATION
            | icmpv6::NEIGHBOUR_ADVERTISEMENT
            | icmpv6::ROUTER_SOLICITATION => is_discovery(packet),
            // Nobody but a router of the NIC's link tells this node where to send.
            icmpv6::ROUTER_ADVERTISEMENT => frame.place == place::NIC_IN && is_discovery(packet),
            icmpv6::LISTENER_QUERY..=icmpv6::LISTENER_DONE | icmpv6::LISTENER_REPORT_V2 => {
                packet.hop_limit == 1 && is_link_source(packet)
            }
            _ => false,
        },
        _ => false,
    }
}

/// RFC 4861, 6.1 and 7.1: hop limit 255 and code 0.
#[inline(always)]
fn is_discovery(packet: &Packet) -> bool {
    packet.hop_limit == 255 && packet.destination_port == 0
}

/// RFC 2710, 3 and RFC 3590: a link-local source address, or none yet.
#[inline(always)]
fn is_link_source(packet: &Packet) -> bool {
    let source = packet.source.0;
    let b = source[0].to_ne_bytes();
    (b[0] == 0xfe && b[1] & 0xc0 == 0x80) || (source[0] | source[1] | source[2] | source[3]) == 0
}
