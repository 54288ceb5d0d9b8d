//! Step 2, link control: messages that a link needs to work pass regardless of the policies.
//!
//! The rules are those of `xdp/src/link.rs`; each function has the name of its counterpart. What a capture does not
//! contain counts in favour of the message: MAC addresses of a cooked capture, and the interface by which a message
//! entered the node.

use palisade_abi::{
    Addr, Decision, Direction, ETHER_TYPE_LLC, EventKind, Reason, TracePoint, entry_flags, event_flags,
    protocol,
};
use palisade_packet::{Bytes as _, ETHER_TYPE_ARP, Packet, flags, icmpv6};

use super::{
    context::Cx,
    enforce::is_link_local,
    state::{HookPoint, PacketState},
};
use crate::capture::Network;

/// Maximum length of an ARP packet, bytes.
const MAX_ARP: u32 = 46 + 8;
/// Length of an IPv6 header, bytes.
const IPV6: u32 = 40;
/// Length of an IPv4 header with the Router Alert option, bytes.
const IPV4_ALERT: u32 = 24;
/// Length of an IPv6 header and a hop-by-hop header with Router Alert, bytes.
const IPV6_ALERT: u32 = 48;

/// Result of a check that leaves the verdict to the policy.
const BY_POLICY: Reason = Reason::Allowed;
const PASS: Reason = Reason::LinkControl;
const SPOOFED: Reason = Reason::InvalidSourceIp;

/// Gives the verdict on a frame that is not IP. On an IGMP or ICMPv6 message, gives a verdict only if link control
/// decides; otherwise the reason stays [`Reason::Allowed`], and the policy decides.
pub(super) fn check(cx: &mut Cx, pkt: &mut PacketState<'_>) {
    let packet = &pkt.headers;
    pkt.reason = if packet.is(flags::NOT_IP) {
        not_ip(cx, pkt)
    } else if packet.is(flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER) {
        BY_POLICY
    } else if packet.protocol == protocol::IGMP {
        igmp(cx, pkt)
    } else {
        icmpv6(cx, pkt)
    };
    if pkt.reason == Reason::Audited {
        pkt.event_flags = event_flags::REPLY_UNKNOWN | event_flags::AUDIT;
        let event = pkt.event(cx, EventKind::PolicyVerdict, TracePoint::None, None);
        cx.events.push(event);
    }
}

fn not_ip(cx: &Cx, pkt: &PacketState<'_>) -> Reason {
    if pkt.headers.ether_type == ETHER_TYPE_ARP {
        return arp(cx, pkt);
    }
    let is_control_group =
        matches!(pkt.macs(), Some(([0x01, 0x80, 0xc2, 0, 0, last], _)) if last & 0xf0 == 0);
    if pkt.point.is_nic() && (is_control_group || is_configured(pkt)) {
        return PASS;
    }
    unenforced(cx, pkt)
}

fn is_configured(pkt: &PacketState<'_>) -> bool {
    let ether_type = if pkt.headers.ether_type < 1536 {
        ETHER_TYPE_LLC
    } else {
        pkt.headers.ether_type
    };
    pkt.site.ether_types.contains(&ether_type)
}

/// Returns the reason for a frame without address and port: the policy's entry for any peer and any port decides.
fn unenforced(cx: &Cx, pkt: &PacketState<'_>) -> Reason {
    let own = default_reason(cx, pkt.endpoint, pkt.ingress);
    let node = if pkt.point.is_nic() || cx.host == 0 {
        BY_POLICY
    } else {
        default_reason(cx, cx.host, !pkt.ingress)
    };
    own.max(node)
}

fn default_reason(cx: &Cx, endpoint: u16, ingress: bool) -> Reason {
    let direction = if ingress {
        Direction::Ingress
    } else {
        Direction::Egress
    };
    match cx.tables.default_entry(endpoint, direction) {
        Some(entry)
            if entry.flags & entry_flags::UNENFORCED != 0 && entry.decision == Decision::Allow as u8 =>
        {
            Reason::Allowed
        }
        Some(entry) if entry.flags & entry_flags::AUDIT != 0 => Reason::Audited,
        _ => Reason::UnsupportedL3,
    }
}

/// Returns whether a message may name `addr` as the address of its sender.
fn may_name(cx: &Cx, pkt: &PacketState<'_>, addr: Addr) -> bool {
    let owner = cx.tables.exact(addr).endpoint;
    match pkt.point {
        HookPoint::FromWorkload if owner == 0 => is_link_local(addr),
        HookPoint::FromWorkload => owner == pkt.endpoint,
        HookPoint::NicIn => owner == 0 || owner == cx.host,
        // The node itself can have generated the message, which a capture does not show.
        HookPoint::NicOut | HookPoint::ToWorkload | HookPoint::Node => true,
    }
}

/// Returns the `N` bytes of the frame at offset `at`.
fn read<const N: usize>(pkt: &PacketState<'_>, at: u32) -> Option<[u8; N]> {
    pkt.frame.array(at).copied()
}

fn arp(cx: &Cx, pkt: &PacketState<'_>) -> Reason {
    const ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
    let is_workload = !pkt.point.is_nic();
    let malformed = if is_workload { Reason::InvalidPacket } else { PASS };
    let Some(header) = read::<28>(pkt, u32::from(pkt.headers.network_offset)) else {
        return malformed;
    };
    if header[..6] != ETHERNET_IPV4 {
        return malformed;
    }
    let sender = Addr::from_v4([header[14], header[15], header[16], header[17]]);
    if is_workload {
        let is_known = header[6] == 0 && matches!(header[7], 1 | 2);
        if !is_known || pkt.headers.length > MAX_ARP {
            return malformed;
        }
        if pkt.point == HookPoint::FromWorkload && !is_source_mac(pkt, &header[8..14]) {
            return SPOOFED;
        }
    }
    if sender != Addr::from_v4([0; 4]) && !may_name(cx, pkt, sender) {
        return SPOOFED;
    }
    PASS
}

/// Returns whether `mac` is the frame's source address and not a group address; true if the capture does not contain
/// the source address.
fn is_source_mac(pkt: &PacketState<'_>, mac: &[u8]) -> bool {
    let is_group = mac.first().is_none_or(|first| first & 1 != 0);
    pkt.macs()
        .map_or(pkt.frame.network != Network::Ethernet, |(_, source)| {
            source == mac && !is_group
        })
}

fn igmp(cx: &Cx, pkt: &PacketState<'_>) -> Reason {
    let packet = &pkt.headers;
    let to = packet.destination.bytes();
    if packet.is(flags::IPV6) || packet.hop_limit != 1 || to[12] & 0xf0 != 224 {
        return BY_POLICY;
    }
    if packet.source != Addr::from_v4([0; 4]) && !may_name(cx, pkt, packet.source) {
        return SPOOFED;
    }
    if pkt.point.is_nic() {
        return PASS;
    }
    let Some(header) = read::<8>(pkt, u32::from(packet.transport_offset)) else {
        return BY_POLICY;
    };
    let longest = match header[0] {
        0x11 => 12,
        0x12 | 0x16 | 0x17 => 8,
        0x22 => 8 + 16 * u32::from(u16::from_be_bytes([header[6], header[7]])),
        _ => return BY_POLICY,
    };
    if headers(packet) <= IPV4_ALERT && packet.length <= headers(packet) + longest {
        PASS
    } else {
        BY_POLICY
    }
}

/// Returns the length of the network headers, bytes.
fn headers(packet: &Packet) -> u32 {
    u32::from(packet.transport_offset.wrapping_sub(packet.network_offset))
}

fn icmpv6(cx: &Cx, pkt: &PacketState<'_>) -> Reason {
    let [kind, _] = pkt.headers.source_port.to_le_bytes();
    match kind {
        icmpv6::NEIGHBOUR_SOLICITATION | icmpv6::NEIGHBOUR_ADVERTISEMENT | icmpv6::ROUTER_SOLICITATION => {
            discovery(cx, pkt, kind)
        }
        icmpv6::ROUTER_ADVERTISEMENT if pkt.point == HookPoint::NicIn => discovery(cx, pkt, kind),
        icmpv6::LISTENER_QUERY..=icmpv6::LISTENER_DONE | icmpv6::LISTENER_REPORT_V2 => listener(cx, pkt),
        _ => BY_POLICY,
    }
}

fn listener(cx: &Cx, pkt: &PacketState<'_>) -> Reason {
    let packet = &pkt.headers;
    let is_link_source = is_link_local(packet.source) || packet.source == Addr::UNSPECIFIED;
    if packet.hop_limit != 1 || packet.destination.bytes()[0] != 0xff || !is_link_source {
        return BY_POLICY;
    }
    if packet.source != Addr::UNSPECIFIED && !may_name(cx, pkt, packet.source) {
        return SPOOFED;
    }
    if pkt.point.is_nic() {
        return PASS;
    }
    let Some(header) = read::<8>(pkt, u32::from(packet.transport_offset)) else {
        return BY_POLICY;
    };
    let longest = match header[0] {
        icmpv6::LISTENER_QUERY => 28,
        icmpv6::LISTENER_REPORT_V2 => 8 + 52 * u32::from(u16::from_be_bytes([header[6], header[7]])),
        _ => 24,
    };
    if headers(packet) <= IPV6_ALERT && packet.length <= headers(packet) + longest {
        PASS
    } else {
        BY_POLICY
    }
}

fn discovery(cx: &Cx, pkt: &PacketState<'_>, kind: u8) -> Reason {
    let packet = &pkt.headers;
    if packet.hop_limit != 255 || packet.destination_port != 0 {
        return BY_POLICY;
    }
    let is_solicitation = kind == icmpv6::NEIGHBOUR_SOLICITATION;
    let is_advertisement = kind == icmpv6::NEIGHBOUR_ADVERTISEMENT;
    let at = u32::from(packet.transport_offset);
    let length = packet.length.wrapping_sub(headers(packet));
    let has_source = packet.source != Addr::UNSPECIFIED;
    if has_source && !may_name(cx, pkt, packet.source) {
        return SPOOFED;
    }
    let mut options = 8;
    if is_solicitation || is_advertisement {
        options = 24;
        if length < 24 {
            return Reason::InvalidPacket;
        }
        let Some(target) = read::<16>(pkt, at + 8) else {
            return Reason::PullFailed;
        };
        if (is_advertisement || !has_source) && !may_name(cx, pkt, Addr::from_bytes(target)) {
            return SPOOFED;
        }
    }
    if !pkt.point.is_nic() {
        let room = if is_solicitation { 16 } else { 8 };
        if headers(packet) != IPV6 || length > options + room {
            return BY_POLICY;
        }
    }
    if pkt.point == HookPoint::FromWorkload {
        let first = names_another_mac(pkt, at + options, length >= options + 8);
        let second = names_another_mac(pkt, at + options + 8, length >= options + 16);
        if first || second {
            return SPOOFED;
        }
    }
    if stays_on_link(cx, pkt) { PASS } else { BY_POLICY }
}

fn names_another_mac(pkt: &PacketState<'_>, at: u32, present: bool) -> bool {
    if !present {
        return false;
    }
    let Some(option) = read::<8>(pkt, at) else {
        return true;
    };
    matches!(option[0], 1 | 2) && !is_source_mac(pkt, &option[2..])
}

/// Returns whether it is certain that the node does not forward the packet to another link.
fn stays_on_link(cx: &Cx, pkt: &PacketState<'_>) -> bool {
    let to = pkt.headers.destination;
    let first = to.bytes();
    if first[0] == 0xff {
        return first[1] & 0x0f == 2;
    }
    if is_link_local(to) {
        return true;
    }
    let owner = cx.tables.exact(to).endpoint;
    match pkt.point {
        HookPoint::NicOut => pkt.site.is_local,
        HookPoint::ToWorkload => owner == pkt.endpoint,
        _ => owner != 0 && owner == cx.host,
    }
}
