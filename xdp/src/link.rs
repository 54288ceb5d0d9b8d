//! What a link needs to work: passes by rule, whatever the policies say. And frames that are not IP.
//!
//! The rule is for messages that stay on the link: their hop limit is one that no router lets through, their
//! destination is one that the node does not forward, they are no longer than their type is, and they name no address
//! that belongs to another endpoint. Every other message is judged like any packet, or dropped if it names such an
//! address.

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use palisade_abi::{
    Addr, CLASS_ANY, Decision, ETHER_TYPE_LLC, EventKind, ID_SLOTS, Interface, PolicyKey, Reason, TracePoint,
    entry_flags, event_flags, identity as identities, interface_flags, protocol, role,
};
use palisade_packet::{Bytes, ETHER_TYPE_ARP, Packet, flags, icmpv6};

use crate::ctx::{Context, Linear, Skb, Xdp};
use crate::event;
use crate::identity;
use crate::maps::{ENDPOINTS, INTERFACES, POLICY};
use crate::packet_context::{PacketContext, hook_point};

/// An ARP packet of Ethernet and IPv4 in the shortest frame, 60 bytes without checksum, and two VLAN tags.
const MAX_ARP: u32 = 46 + 8;
/// IPv6 header.
const IPV6: u32 = 40;
/// IPv4 header with the Router Alert option, which IGMP has (RFC 3376, 4).
const IPV4_ALERT: u32 = 24;
/// IPv6 header and a hop-by-hop header with Router Alert, which MLD has (RFC 3810, 5).
const IPV6_ALERT: u32 = 48;

/// The verdict is left to the policy. ([`Reason::Allowed`], as it stands before anything was judged.)
const JUDGE: u32 = Reason::Allowed as u32;
const PASS: u32 = Reason::LinkControl as u32;
const SPOOFED: u32 = Reason::InvalidSourceIp as u32;

/// [`judge`] as a global function, see `ctx.rs`.
pub trait Judge {
    /// Judges a frame that is not IP, an IGMP or an ICMPv6 message, as far as the link is concerned.
    fn link(self, frame: &mut PacketContext);
}

macro_rules! global_function {
    ($context:ident, $raw:ty, $name:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(ctx: *mut $raw, frame: *mut PacketContext) -> u32 {
            // SAFETY: the caller below passes a reference; the verifier wants the comparison with null.
            let Some(frame) = (unsafe { frame.as_mut() }) else {
                return 0;
            };
            judge($context(ctx), frame);
            0
        }

        impl Judge for $context {
            #[inline(always)]
            fn link(self, frame: &mut PacketContext) {
                $name(self.0, frame);
            }
        }
    };
}

global_function!(Xdp, xdp_md, xdp_link);
global_function!(Skb, __sk_buff, tc_link);

#[inline(always)]
fn judge<C: Context>(ctx: C, frame: &mut PacketContext) {
    let packet = &frame.packet;
    let reason = if packet.is(flags::NOT_IP) {
        not_ip(ctx, frame)
    } else if packet.is(flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER) {
        // Neighbour discovery in fragments is not accepted (RFC 6980).
        JUDGE
    } else if packet.protocol == protocol::IGMP {
        igmp(ctx, frame)
    } else {
        icmpv6(ctx, frame)
    };
    frame.reason = reason as u8;
    if frame.reason == Reason::Audited as u8 {
        frame.event_flags = event_flags::REPLY_UNKNOWN | event_flags::AUDIT;
        ctx.send(
            frame,
            event::what(EventKind::PolicyVerdict, TracePoint::None),
            core::ptr::null(),
        );
    }
}

#[inline(always)]
fn is_nic(frame: &PacketContext) -> bool {
    frame.hook_point == hook_point::NIC_IN || frame.hook_point == hook_point::NIC_OUT
}

/// The interface that a frame is at.
#[inline(always)]
fn interface(ifindex: u32) -> Option<&'static Interface> {
    match INTERFACES.get(ifindex & (ID_SLOTS as u32 - 1)) {
        Some(interface) if interface.ifindex == ifindex => Some(interface),
        _ => None,
    }
}

/// The role of an interface; none if the daemon has not looked at it, or is only attaching its programs.
#[inline(always)]
pub fn role_of(ifindex: u32) -> u8 {
    match interface(ifindex) {
        Some(interface) if interface.flags & interface_flags::PENDING == 0 => interface.role,
        _ => role::NONE,
    }
}

/// `N` bytes, made readable if they are not.
#[inline(always)]
fn read<C: Context, const N: usize>(ctx: C, at: u32) -> Option<[u8; N]> {
    if let Some(found) = ctx.bytes(false).array::<N>(at) {
        return Some(*found);
    }
    if !ctx.pull_headers() {
        return None;
    }
    ctx.bytes(false).array::<N>(at).copied()
}

/// The word at `at` of a header, in memory order.
#[inline(always)]
fn word<const N: usize>(header: &[u8; N], at: usize) -> u32 {
    <Linear as Bytes>::word(header, at)
}

/// Whether a frame passes that is not IP: ARP; on a NIC the link-local control group 01:80:C2:00:00:0x (spanning tree,
/// LACP, LLDP, 802.1X; IEEE 802.1Q, table 8-1) and what the configuration names; and everything where no policy enforces
/// the direction.
#[inline(always)]
fn not_ip<C: Context>(ctx: C, frame: &PacketContext) -> u32 {
    if frame.layer3 == 0 {
        if frame.packet.ether_type == ETHER_TYPE_ARP {
            return arp(ctx, frame);
        }
        if is_nic(frame) && (is_control_group(ctx) || is_configured(frame)) {
            return PASS;
        }
    }
    unenforced(frame)
}

#[inline(always)]
fn is_control_group<C: Context>(ctx: C) -> bool {
    match ctx.bytes(false).array::<6>(0) {
        Some(to) => matches!(to, [0x01, 0x80, 0xc2, 0, 0, last] if last & 0xf0 == 0),
        None => false,
    }
}

#[inline(always)]
fn is_configured(frame: &PacketContext) -> bool {
    let Some(interface) = interface(frame.ifindex) else {
        return false;
    };
    // IEEE 802.3, 3.2.6: less than 1,536 is a length.
    let ether_type = if frame.packet.ether_type < 1536 {
        ETHER_TYPE_LLC
    } else {
        frame.packet.ether_type
    };
    let mut found = false;
    for allowed in interface.ether_types {
        found |= allowed == ether_type;
    }
    found
}

/// A frame that has neither address nor port: what the policy says of every peer and port decides. On a workload's
/// interface the other end may be the node, so the node's policy must let it pass too.
#[inline(always)]
fn unenforced(frame: &PacketContext) -> u32 {
    let own = otherwise(frame.endpoint, u32::from(frame.direction));
    let host = identity::host_endpoint();
    let node = if is_nic(frame) || host == 0 {
        JUDGE
    } else {
        otherwise(host, u32::from(frame.direction ^ 1))
    };
    // What passes is 0 or Audited; the larger number is the stricter.
    if own > node { own } else { node }
}

/// Whether the policy of an endpoint denies, of one direction, what no rule allows.
#[inline(always)]
pub fn is_enforced(endpoint: u32, direction: u32) -> bool {
    otherwise(endpoint, direction) == Reason::UnsupportedL3 as u32
}

/// What becomes of a packet of every peer and port: [`Reason::Allowed`] if nothing is enforced, [`Reason::Audited`] if the
/// policy only reports, else [`Reason::UnsupportedL3`].
#[inline(never)]
fn otherwise(endpoint: u32, direction: u32) -> u32 {
    let denied = Reason::UnsupportedL3 as u32;
    let Some(state) = ENDPOINTS.get_ptr(endpoint & 0xffff) else {
        return denied;
    };
    // SAFETY: an aligned word of a map value; user space may write it meanwhile, hence volatile.
    let policy = unsafe { core::ptr::read_volatile(&raw const (*state).policy) };
    let key = PolicyKey {
        policy,
        identity: identities::ANY,
        class: CLASS_ANY,
        direction: direction as u8,
        zero: 0,
    };
    // SAFETY: entries are replaced, never changed in place.
    let Some(entry) = (unsafe { POLICY.get(&key) }) else {
        return denied;
    };
    if policy == 0 {
        denied
    } else if entry.flags & entry_flags::UNENFORCED != 0 && entry.decision == Decision::Allow as u8 {
        Reason::Allowed as u32
    } else if entry.flags & entry_flags::AUDIT != 0 {
        Reason::Audited as u32
    } else {
        denied
    }
}

/// Whether the sender of a message may name an address as its own.
///
/// From a workload: one of the endpoint, or a link-local one that the node does not have. From a NIC: any that no workload
/// has; the node's own pass, so that the kernel sees address conflicts (RFC 5227, RFC 4862, 5.4). Towards a workload and
/// out of a NIC: what the node itself says (also for others: proxy ARP), and what was checked at a guarded interface.
#[inline(always)]
fn may_name<C: Context>(ctx: C, frame: &PacketContext, addr: &Addr) -> bool {
    let owner = identity::exact(addr).endpoint();
    match frame.hook_point {
        hook_point::FROM_WORKLOAD if owner == 0 => identity::is_link_local(addr),
        hook_point::FROM_WORKLOAD => owner == frame.endpoint,
        hook_point::NIC_IN => owner == 0 || owner == identity::host_endpoint(),
        _ => {
            ctx.is_local()
                || owner == 0
                || (owner != identity::host_endpoint() && role_of(ctx.entered_by()) == role::ENDPOINT)
        }
    }
}

/// RFC 826. At a workload only requests and replies for IPv4 over Ethernet, whose sender is the workload or has no
/// address yet (RFC 5227, 2.1.1).
#[inline(always)]
fn arp<C: Context>(ctx: C, frame: &PacketContext) -> u32 {
    const ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
    let is_workload = !is_nic(frame);
    let malformed = if is_workload {
        Reason::InvalidPacket as u32
    } else {
        PASS
    };
    let Some(header) = read::<C, 28>(ctx, u32::from(frame.packet.network_offset)) else {
        return malformed;
    };
    if header[..6] != ETHERNET_IPV4 {
        return malformed;
    }
    let sender = Addr::from_v4_word(word(&header, 14));
    if is_workload {
        let is_known = header[6] == 0 && matches!(header[7], 1 | 2);
        if !is_known || frame.packet.length > MAX_ARP {
            return malformed;
        }
        if frame.hook_point == hook_point::FROM_WORKLOAD
            && !is_source_mac(
                ctx,
                [
                    header[8], header[9], header[10], header[11], header[12], header[13],
                ],
            )
        {
            return SPOOFED;
        }
    }
    if sender != Addr::from_v4([0; 4]) && !may_name(ctx, frame, &sender) {
        return SPOOFED;
    }
    PASS
}

/// Whether the frame comes from this hardware address, which is no group's: else a switch would deliver what is sent to
/// it to others too.
#[inline(always)]
fn is_source_mac<C: Context>(ctx: C, mac: [u8; 6]) -> bool {
    match ctx.bytes(false).array::<12>(0) {
        Some(header) => header[6..12] == mac && mac[0] & 1 == 0,
        None => false,
    }
}

/// RFC 3376, 4: sent with a TTL of 1; and to a group, which is not routed here. (A packet to one address that had a TTL
/// of 2 on the way has one of 1 when it is sent on.)
#[inline(always)]
fn igmp<C: Context>(ctx: C, frame: &PacketContext) -> u32 {
    let packet = &frame.packet;
    if packet.is(flags::IPV6)
        || packet.hop_limit != 1
        || packet.destination.0[3].to_ne_bytes()[0] & 0xf0 != 224
    {
        return JUDGE;
    }
    if packet.source != Addr::from_v4([0; 4]) && !may_name(ctx, frame, &packet.source) {
        return SPOOFED;
    }
    if is_nic(frame) {
        return PASS;
    }
    let Some(header) = read::<C, 8>(ctx, u32::from(packet.transport_offset)) else {
        return JUDGE;
    };
    // A query without sources, reports and leaves of versions 1 and 2, a report of version 3 with two sources a group.
    let longest = match header[0] {
        0x11 => 12,
        0x12 | 0x16 | 0x17 => 8,
        0x22 => 8 + 16 * u32::from(u16::from_be_bytes([header[6], header[7]])),
        _ => return JUDGE,
    };
    if headers(packet) <= IPV4_ALERT && packet.length <= headers(packet) + longest {
        PASS
    } else {
        JUDGE
    }
}

/// Bytes before the transport header.
#[inline(always)]
fn headers(packet: &Packet) -> u32 {
    u32::from(packet.transport_offset).wrapping_sub(u32::from(packet.network_offset))
}

#[inline(always)]
fn icmpv6<C: Context>(ctx: C, frame: &PacketContext) -> u32 {
    match frame.packet.source_port as u8 {
        icmpv6::NEIGHBOUR_SOLICITATION | icmpv6::NEIGHBOUR_ADVERTISEMENT | icmpv6::ROUTER_SOLICITATION => {
            discovery(ctx, frame)
        }
        // Only a router of the NIC's link may tell this node where to send.
        icmpv6::ROUTER_ADVERTISEMENT if frame.hook_point == hook_point::NIC_IN => discovery(ctx, frame),
        icmpv6::LISTENER_QUERY..=icmpv6::LISTENER_DONE | icmpv6::LISTENER_REPORT_V2 => listener(ctx, frame),
        _ => JUDGE,
    }
}

/// MLD: hop limit 1, to a group, from a link-local source address or none yet (RFC 2710, 3; RFC 3590).
#[inline(always)]
fn listener<C: Context>(ctx: C, frame: &PacketContext) -> u32 {
    let packet = &frame.packet;
    let is_link_source = identity::is_link_local(&packet.source) || packet.source == Addr::UNSPECIFIED;
    if packet.hop_limit != 1 || packet.destination.0[0].to_ne_bytes()[0] != 0xff || !is_link_source {
        return JUDGE;
    }
    if packet.source != Addr::UNSPECIFIED && !may_name(ctx, frame, &packet.source) {
        return SPOOFED;
    }
    if is_nic(frame) {
        return PASS;
    }
    let Some(header) = read::<C, 8>(ctx, u32::from(packet.transport_offset)) else {
        return JUDGE;
    };
    // A query of version 2 without sources is the longest of the first; a report has 20 bytes a group, and here room for
    // two sources.
    let longest = match header[0] {
        icmpv6::LISTENER_QUERY => 28,
        icmpv6::LISTENER_REPORT_V2 => 8 + 52 * u32::from(u16::from_be_bytes([header[6], header[7]])),
        _ => 24,
    };
    if headers(packet) <= IPV6_ALERT && packet.length <= headers(packet) + longest {
        PASS
    } else {
        JUDGE
    }
}

/// Neighbour discovery (RFC 4861). Receivers take it with hop limit 255 and code 0 only, and a packet that was forwarded
/// has a smaller one.
#[inline(always)]
fn discovery<C: Context>(ctx: C, frame: &PacketContext) -> u32 {
    let packet = &frame.packet;
    if packet.hop_limit != 255 || packet.destination_port != 0 {
        return JUDGE;
    }
    let kind = packet.source_port as u8;
    let is_solicitation = kind == icmpv6::NEIGHBOUR_SOLICITATION;
    let is_advertisement = kind == icmpv6::NEIGHBOUR_ADVERTISEMENT;
    let at = u32::from(packet.transport_offset);
    let length = packet.length.wrapping_sub(headers(packet));
    let has_source = packet.source != Addr::UNSPECIFIED;
    if has_source && !may_name(ctx, frame, &packet.source) {
        return SPOOFED;
    }
    let mut options = 8;
    if is_solicitation || is_advertisement {
        options = 24;
        if length < 24 {
            return Reason::InvalidPacket as u32;
        }
        let Some(target) = read::<C, 16>(ctx, at + 8) else {
            return Reason::PullFailed as u32;
        };
        let target = Addr([
            word(&target, 0),
            word(&target, 4),
            word(&target, 8),
            word(&target, 12),
        ]);
        // An advertisement says who has the target; a solicitation without a source address, who is about to
        // (RFC 4862, 5.4). Any other solicitation asks.
        if (is_advertisement || !has_source) && !may_name(ctx, frame, &target) {
            return SPOOFED;
        }
    }
    if !is_nic(frame) {
        // The option with the sender's hardware address; in a solicitation also a nonce (RFC 7527).
        let room = if is_solicitation { 16 } else { 8 };
        if headers(packet) != IPV6 || length > options + room {
            return JUDGE;
        }
    }
    if frame.hook_point == hook_point::FROM_WORKLOAD {
        let first = names_another_mac(ctx, at + options, length >= options + 8);
        let second = names_another_mac(ctx, at + options + 8, length >= options + 16);
        if first || second {
            return SPOOFED;
        }
    }
    if stays_on_link(ctx, frame) { PASS } else { JUDGE }
}

/// Whether the option at `at` is a link-layer address (types 1 and 2, RFC 4861, 4.6.1) and not the frame's source.
#[inline(always)]
fn names_another_mac<C: Context>(ctx: C, at: u32, present: bool) -> bool {
    if !present {
        return false;
    }
    let Some(option) = read::<C, 8>(ctx, at) else {
        return true;
    };
    matches!(option[0], 1 | 2)
        && !is_source_mac(
            ctx,
            [option[2], option[3], option[4], option[5], option[6], option[7]],
        )
}

/// Whether the node does not send the packet on to another link: link-local destinations, those of ff02::/16, and what the
/// routing table delivers here or to this very link.
#[inline(always)]
fn stays_on_link<C: Context>(ctx: C, frame: &PacketContext) -> bool {
    let to = &frame.packet.destination;
    let first = to.0[0].to_ne_bytes();
    if first[0] == 0xff {
        return first[1] & 0x0f == 2;
    }
    if identity::is_link_local(to) {
        return true;
    }
    let owner = identity::exact(to).endpoint();
    match frame.hook_point {
        hook_point::NIC_OUT => ctx.is_local(),
        hook_point::TO_WORKLOAD => owner == frame.endpoint,
        _ if owner != 0 && owner == identity::host_endpoint() => true,
        hook_point::NIC_IN if owner != 0 => false,
        _ => {
            let link = match interface(frame.ifindex) {
                Some(interface) => interface.link,
                None => 0,
            };
            let way = identity::route(ctx, frame);
            way == 0
                || (frame.hook_point == hook_point::FROM_WORKLOAD && (way == frame.ifindex || way == link))
        }
    }
}
