//! Offload windows: sequence numbers of a flow that its inspector has declared to need no inspection.

use palisade_abi::{CtEntry, SEND_LIMIT_DISTANCE, limited_window, protocol, tcp_flags};
use palisade_packet::{Bytes, flags};

use crate::conntrack;
use crate::entry::Entry;
use crate::hook::Hook;
use crate::packet_context::PacketContext;

/// Sets [`PacketContext::must_punt`] if the flow's inspector needs the packet. Two policies can inspect a packet, each
/// with its own conntrack entry. Both requests stay in the punt header, because a packet inside the window of one entry
/// can lie outside the window of the other.
#[inline(never)]
pub fn check_window<H: Hook>(ctx: H, pkt: &mut PacketContext, entry: Entry) -> u32 {
    if !is_in_window(ctx, pkt, entry) {
        pkt.must_punt = true;
    }
    0
}

/// Returns whether the offload windows exempt the packet from inspection. They exempt a segment whose bytes all lie in
/// the window of its direction, and a segment without data whose acknowledgment number lies in the window of the other
/// direction. Fragments and segments with SYN, FIN, RST or URG are not exempt.
#[inline(always)]
fn is_in_window<H: Hook>(ctx: H, pkt: &mut PacketContext, entry: Entry) -> bool {
    const STATE: u8 = tcp_flags::ACK | tcp_flags::SYN | tcp_flags::FIN | tcp_flags::RST | tcp_flags::URG;
    let packet = &pkt.headers;
    if packet.protocol != protocol::TCP
        || packet.is(flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER)
        || packet.tcp_flags & STATE != tcp_flags::ACK
    {
        return false;
    }
    let reply = conntrack::is_reply(entry, pkt.is_ingress());
    let (from, to) = entry.window(reply);
    let (other_from, other_to) = entry.window(!reply);
    if from == to && other_from == other_to {
        return false;
    }
    // The windows are valid only if the last command set exactly these windows for this connection and these rules.
    let windows = if reply {
        [other_from, other_to, from, to]
    } else {
        [from, to, other_from, other_to]
    };
    let differs =
        entry.decided() ^ CtEntry::windowed(entry.serial(), entry.ruleset(), entry.punt_flags(), windows);
    if differs & !CtEntry::LIMITED != 0 {
        return false;
    }
    let bytes = ctx.bytes(false);
    let Some(header) = bytes.array::<16>(u32::from(packet.transport_offset)) else {
        return false;
    };
    let headers = u32::from(packet.transport_offset)
        .wrapping_sub(u32::from(packet.network_offset))
        .wrapping_add(u32::from(header[12] >> 4) * 4);
    if headers > packet.length {
        return false;
    }
    let payload = packet.length - headers;
    if payload == 0 {
        // The inspector needs the acknowledgment of the window's last byte, which shows that the receiver has all of
        // the window.
        let acked = u32::from_be_bytes([header[8], header[9], header[10], header[11]]);
        let room = other_to.wrapping_sub(other_from);
        if room >= 1 << 31 || acked.wrapping_sub(other_from) >= room {
            return false;
        }
        let code = other_from & 15;
        if H::LIMITS_WINDOWS && differs != 0 && code != 0 {
            let left = other_to.wrapping_sub(acked);
            // The worker permits the head of the next message, and must have seen the newest acknowledgement before it
            // offers a window itself: the sender ignores an older one (RFC 9293, 3.10.7.4).
            if left <= SEND_LIMIT_DISTANCE {
                return false;
            }
            let limit = limited_window(code, left);
            if u32::from(u16::from_be_bytes([header[14], header[15]])) > limit {
                pkt.window_limit = limit as u16;
            }
        }
        return true;
    }
    let room = to.wrapping_sub(from);
    let at = u32::from_be_bytes([header[4], header[5], header[6], header[7]]).wrapping_sub(from);
    room < 1 << 31 && at < room && payload <= room - at
}

/// Lowers the window field of a segment to [`PacketContext::window_limit`].
#[inline(always)]
pub fn limit_window<H: Hook>(ctx: H, pkt: &mut PacketContext) {
    let at = u32::from(pkt.headers.transport_offset);
    let old = match ctx.bytes(false).array::<16>(at) {
        Some(header) => u16::from_ne_bytes([header[14], header[15]]),
        None => return,
    };
    ctx.set_tcp_window(at, old, pkt.window_limit.to_be());
}
