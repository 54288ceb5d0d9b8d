//! Step 2, link control: messages that a link needs to work pass regardless of the policies. This module also decides
//! about frames that are not IP.
//!
//! An IP message passes only if no router has forwarded it and the node will not forward it; at a workload's interface
//! its length is limited too. A message that is malformed, or that names the address of another endpoint as the
//! sender's own, is dropped. The policy decides about the remaining messages.

use palisade_abi::{
    Addr, CLASS_ANY, Decision, ETHER_TYPE_LLC, EventKind, ID_SLOTS, Interface, PolicyKey, Reason, TracePoint,
    entry_flags, event_flags, identity as identities, interface_flags, protocol, role,
};
use palisade_packet::{Bytes, ETHER_TYPE_ARP, Packet, flags, icmpv6};

use crate::calls::Calls;
use crate::event;
use crate::hook::{Hook, Linear};
use crate::identity;
use crate::maps::{ENDPOINTS, INTERFACES, POLICY};
use crate::packet_context::{PacketContext, hook_point};

/// Maximum length of an ARP packet, bytes: the payload of the shortest Ethernet frame, and room for two VLAN tags.
const MAX_ARP: u32 = 46 + 8;
/// Length of an IPv6 header, bytes.
const IPV6: u32 = 40;
/// Length of an IPv4 header with the Router Alert option, as IGMP uses it (RFC 3376, section 4), bytes.
const IPV4_ALERT: u32 = 24;
/// Length of an IPv6 header and a hop-by-hop header with Router Alert, as MLD uses them (RFC 3810, section 5), bytes.
const IPV6_ALERT: u32 = 48;

/// Result of a check that leaves the verdict to the policy. The number is 0, the initial value of
/// [`PacketContext::reason`].
const BY_POLICY: u32 = Reason::Allowed as u32;
const PASS: u32 = Reason::LinkControl as u32;
const SPOOFED: u32 = Reason::InvalidSourceIp as u32;

/// Gives the verdict on a frame that is not IP. On an IGMP or ICMPv6 message, gives a verdict only if link control
/// decides; otherwise the reason stays 0, and the policy decides.
#[inline(always)]
pub fn check<C: Calls>(ctx: C, pkt: &mut PacketContext) {
    let packet = &pkt.headers;
    let reason = if packet.is(flags::NOT_IP) {
        not_ip(ctx, pkt)
    } else if packet.is(flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER) {
        // Receivers ignore fragmented neighbour discovery (RFC 6980).
        BY_POLICY
    } else if packet.protocol == protocol::IGMP {
        igmp(ctx, pkt)
    } else {
        icmpv6(ctx, pkt)
    };
    pkt.reason = reason as u8;
    if pkt.reason == Reason::Audited as u8 {
        pkt.event_flags = event_flags::REPLY_UNKNOWN | event_flags::AUDIT;
        ctx.send(
            pkt,
            event::what(EventKind::PolicyVerdict, TracePoint::None),
            core::ptr::null_mut(),
        );
    }
}

#[inline(always)]
fn is_nic(pkt: &PacketContext) -> bool {
    pkt.hook_point == hook_point::NIC_IN || pkt.hook_point == hook_point::NIC_OUT
}

/// Returns the state of an interface.
#[inline(always)]
fn interface(ifindex: u32) -> Option<&'static Interface> {
    match INTERFACES.get(ifindex & (ID_SLOTS as u32 - 1)) {
        Some(interface) if interface.ifindex == ifindex => Some(interface),
        _ => None,
    }
}

/// Returns the role of an interface; [`role::NONE`] if the daemon does not know the interface yet, or is still
/// attaching its programs.
#[inline(always)]
pub fn role_of(ifindex: u32) -> u8 {
    match interface(ifindex) {
        Some(interface) if interface.flags & interface_flags::PENDING == 0 => interface.role,
        _ => role::NONE,
    }
}

/// Returns the `N` bytes of the frame at offset `at`; `None` if they cannot be made readable.
#[inline(always)]
fn read<H: Hook, const N: usize>(ctx: H, at: u32) -> Option<[u8; N]> {
    if let Some(found) = ctx.bytes(false).array::<N>(at) {
        return Some(*found);
    }
    if !ctx.pull_headers() {
        return None;
    }
    ctx.bytes(false).array::<N>(at).copied()
}

/// Returns the word at offset `at` of a header, without a byte swap.
#[inline(always)]
fn word<const N: usize>(header: &[u8; N], at: usize) -> u32 {
    <Linear as Bytes>::word(header, at)
}

/// Returns the reason for a frame that is not IP. [`arp`] decides about ARP. On a NIC, frames to the link-local control
/// group 01:80:C2:00:00:0x (spanning tree, LACP, LLDP, 802.1X; IEEE 802.1Q, table 8-1) and frames of the configured
/// EtherTypes pass. Any other frame passes only if no policy enforces the direction, or in audit mode.
#[inline(always)]
fn not_ip<H: Hook>(ctx: H, pkt: &PacketContext) -> u32 {
    if pkt.layer3 == 0 {
        if pkt.headers.ether_type == ETHER_TYPE_ARP {
            return arp(ctx, pkt);
        }
        if is_nic(pkt) && (is_control_group(ctx) || is_configured(pkt)) {
            return PASS;
        }
    }
    unenforced(pkt)
}

#[inline(always)]
fn is_control_group<H: Hook>(ctx: H) -> bool {
    match ctx.bytes(false).array::<6>(0) {
        Some(to) => matches!(to, [0x01, 0x80, 0xc2, 0, 0, last] if last & 0xf0 == 0),
        None => false,
    }
}

#[inline(always)]
fn is_configured(pkt: &PacketContext) -> bool {
    let Some(interface) = interface(pkt.ifindex) else {
        return false;
    };
    // A value below 1,536 is a length and no EtherType (IEEE 802.3, section 3.2.6).
    let ether_type = if pkt.headers.ether_type < 1536 {
        ETHER_TYPE_LLC
    } else {
        pkt.headers.ether_type
    };
    let mut found = false;
    for allowed in interface.ether_types {
        found |= allowed == ether_type;
    }
    found
}

/// Returns the reason for a frame without address and port: the policy's entry for any peer and any port decides. At a
/// workload's interface the peer can be the node, so the node's policy must allow the frame too.
#[inline(always)]
fn unenforced(pkt: &PacketContext) -> u32 {
    let own = default_reason(pkt.endpoint, u32::from(pkt.direction));
    let host = identity::host_endpoint();
    let node = if is_nic(pkt) || host == 0 {
        BY_POLICY
    } else {
        default_reason(host, u32::from(pkt.direction ^ 1))
    };
    // Each value is Allowed, Audited or UnsupportedL3: the larger number is the stricter verdict.
    if own > node { own } else { node }
}

/// Returns whether an endpoint's policy drops packets of a direction by default; false in audit mode.
#[inline(always)]
pub fn is_enforced(endpoint: u32, direction: u32) -> bool {
    default_reason(endpoint, direction) == Reason::UnsupportedL3 as u32
}

/// Returns the verdict of the entry for any peer and any port: [`Reason::Allowed`] if the direction is not enforced,
/// [`Reason::Audited`] in audit mode, otherwise [`Reason::UnsupportedL3`].
#[inline(never)]
fn default_reason(endpoint: u32, direction: u32) -> u32 {
    let denied = Reason::UnsupportedL3 as u32;
    let Some(state) = ENDPOINTS.get_ptr(endpoint & 0xffff) else {
        return denied;
    };
    // SAFETY: `state` points to a map value, which lives as long as the map, and `policy` is aligned; the read is
    // volatile because user space can write the field.
    let policy = unsafe { core::ptr::read_volatile(&raw const (*state).policy) };
    let key = PolicyKey {
        policy,
        identity: identities::ANY,
        class: CLASS_ANY,
        direction: direction as u8,
        zero: 0,
    };
    // SAFETY: the value stays readable while the program runs (RCU), and an update of the map replaces the element
    // instead of writing to it.
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

/// Returns whether a message may name `addr` as the address of its sender.
///
/// From a workload: an address of its endpoint, or a link-local address that no endpoint has. From a NIC: any address
/// that no workload has; the node's own addresses pass, so that the kernel sees address conflicts (RFC 5227; RFC 4862,
/// section 5.4). Towards a workload and out of a NIC: any address if the node generated the message (proxy ARP);
/// otherwise an address that no endpoint has, or a workload's if the message entered by a workload's interface, where
/// it was checked.
#[inline(always)]
fn may_name<H: Hook>(ctx: H, pkt: &PacketContext, addr: &Addr) -> bool {
    let owner = identity::exact(addr).endpoint();
    match pkt.hook_point {
        hook_point::FROM_WORKLOAD if owner == 0 => identity::is_link_local(addr),
        hook_point::FROM_WORKLOAD => owner == pkt.endpoint,
        hook_point::NIC_IN => owner == 0 || owner == identity::host_endpoint(),
        _ => {
            ctx.is_local()
                || owner == 0
                || (owner != identity::host_endpoint() && role_of(ctx.entered_by()) == role::ENDPOINT)
        }
    }
}

/// Returns the reason for an ARP packet (RFC 826). At a workload's interface only requests and replies for IPv4 over
/// Ethernet pass, and a workload must name the source MAC address of the frame as its own. An IPv4 address of the
/// sender must satisfy [`may_name`] or be 0.0.0.0, as in a probe (RFC 5227, section 2.1.1).
#[inline(always)]
fn arp<H: Hook>(ctx: H, pkt: &PacketContext) -> u32 {
    const ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
    let is_workload = !is_nic(pkt);
    let malformed = if is_workload {
        Reason::InvalidPacket as u32
    } else {
        PASS
    };
    let Some(header) = read::<H, 28>(ctx, u32::from(pkt.headers.network_offset)) else {
        return malformed;
    };
    if header[..6] != ETHERNET_IPV4 {
        return malformed;
    }
    let sender = Addr::from_v4_word(word(&header, 14));
    if is_workload {
        let is_known = header[6] == 0 && matches!(header[7], 1 | 2);
        if !is_known || pkt.headers.length > MAX_ARP {
            return malformed;
        }
        if pkt.hook_point == hook_point::FROM_WORKLOAD
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
    if sender != Addr::from_v4([0; 4]) && !may_name(ctx, pkt, &sender) {
        return SPOOFED;
    }
    PASS
}

/// Returns whether `mac` is the frame's source address and not a group address. Switches would flood frames to a group
/// address.
#[inline(always)]
fn is_source_mac<H: Hook>(ctx: H, mac: [u8; 6]) -> bool {
    match ctx.bytes(false).array::<12>(0) {
        Some(header) => header[6..12] == mac && mac[0] & 1 == 0,
        None => false,
    }
}

/// Returns the reason for an IGMP message. Only messages with a TTL of 1 (RFC 3376, section 4) to a group pass without
/// a policy lookup: a unicast packet with a TTL of 1 can come from another link.
#[inline(always)]
fn igmp<H: Hook>(ctx: H, pkt: &PacketContext) -> u32 {
    let packet = &pkt.headers;
    if packet.is(flags::IPV6)
        || packet.hop_limit != 1
        || packet.destination.0[3].to_ne_bytes()[0] & 0xf0 != 224
    {
        return BY_POLICY;
    }
    if packet.source != Addr::from_v4([0; 4]) && !may_name(ctx, pkt, &packet.source) {
        return SPOOFED;
    }
    if is_nic(pkt) {
        return PASS;
    }
    let Some(header) = read::<H, 8>(ctx, u32::from(packet.transport_offset)) else {
        return BY_POLICY;
    };
    // Maximum lengths, in this order: a query without sources, a report or leave of version 1 or 2, a report of version
    // 3 with two sources per group.
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
#[inline(always)]
fn headers(packet: &Packet) -> u32 {
    u32::from(packet.transport_offset).wrapping_sub(u32::from(packet.network_offset))
}

#[inline(always)]
fn icmpv6<H: Hook>(ctx: H, pkt: &PacketContext) -> u32 {
    match pkt.headers.source_port as u8 {
        icmpv6::NEIGHBOUR_SOLICITATION | icmpv6::NEIGHBOUR_ADVERTISEMENT | icmpv6::ROUTER_SOLICITATION => {
            discovery(ctx, pkt)
        }
        // Only advertisements from a NIC's link pass without a policy lookup; a workload's advertisement could redirect
        // the node's traffic.
        icmpv6::ROUTER_ADVERTISEMENT if pkt.hook_point == hook_point::NIC_IN => discovery(ctx, pkt),
        icmpv6::LISTENER_QUERY..=icmpv6::LISTENER_DONE | icmpv6::LISTENER_REPORT_V2 => listener(ctx, pkt),
        _ => BY_POLICY,
    }
}

/// Returns the reason for an MLD message. Only messages with hop limit 1 to a group and with a link-local or
/// unspecified source (RFC 2710, section 3; RFC 3590) pass without a policy lookup.
#[inline(always)]
fn listener<H: Hook>(ctx: H, pkt: &PacketContext) -> u32 {
    let packet = &pkt.headers;
    let is_link_source = identity::is_link_local(&packet.source) || packet.source == Addr::UNSPECIFIED;
    if packet.hop_limit != 1 || packet.destination.0[0].to_ne_bytes()[0] != 0xff || !is_link_source {
        return BY_POLICY;
    }
    if packet.source != Addr::UNSPECIFIED && !may_name(ctx, pkt, &packet.source) {
        return SPOOFED;
    }
    if is_nic(pkt) {
        return PASS;
    }
    let Some(header) = read::<H, 8>(ctx, u32::from(packet.transport_offset)) else {
        return BY_POLICY;
    };
    // Maximum lengths, in this order: a query of version 2 without sources, a report of version 2 with two sources per
    // group, a message of version 1.
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

/// Returns the reason for a neighbour discovery message (RFC 4861). Receivers accept only hop limit 255 and code 0; a
/// forwarded packet has a smaller hop limit.
#[inline(always)]
fn discovery<H: Hook>(ctx: H, pkt: &PacketContext) -> u32 {
    let packet = &pkt.headers;
    if packet.hop_limit != 255 || packet.destination_port != 0 {
        return BY_POLICY;
    }
    let kind = packet.source_port as u8;
    let is_solicitation = kind == icmpv6::NEIGHBOUR_SOLICITATION;
    let is_advertisement = kind == icmpv6::NEIGHBOUR_ADVERTISEMENT;
    let at = u32::from(packet.transport_offset);
    let length = packet.length.wrapping_sub(headers(packet));
    let has_source = packet.source != Addr::UNSPECIFIED;
    if has_source && !may_name(ctx, pkt, &packet.source) {
        return SPOOFED;
    }
    let mut options = 8;
    if is_solicitation || is_advertisement {
        options = 24;
        if length < 24 {
            return Reason::InvalidPacket as u32;
        }
        let Some(target) = read::<H, 16>(ctx, at + 8) else {
            return Reason::PullFailed as u32;
        };
        let target = Addr([
            word(&target, 0),
            word(&target, 4),
            word(&target, 8),
            word(&target, 12),
        ]);
        // An advertisement claims the target; a solicitation without a source address is about to claim it (duplicate
        // address detection, RFC 4862, section 5.4). Any other solicitation only asks for the target.
        if (is_advertisement || !has_source) && !may_name(ctx, pkt, &target) {
            return SPOOFED;
        }
    }
    if !is_nic(pkt) {
        // Room for options: a solicitation can contain a link-layer address and a nonce (RFC 7527), any other message
        // only a link-layer address.
        let room = if is_solicitation { 16 } else { 8 };
        if headers(packet) != IPV6 || length > options + room {
            return BY_POLICY;
        }
    }
    if pkt.hook_point == hook_point::FROM_WORKLOAD {
        let first = names_another_mac(ctx, at + options, length >= options + 8);
        let second = names_another_mac(ctx, at + options + 8, length >= options + 16);
        if first || second {
            return SPOOFED;
        }
    }
    if stays_on_link(ctx, pkt) { PASS } else { BY_POLICY }
}

/// Returns whether the option at `at` cannot be read, or is a link-layer address (types 1 and 2; RFC 4861, section
/// 4.6.1) that differs from the frame's source; false if the option is not present.
#[inline(always)]
fn names_another_mac<H: Hook>(ctx: H, at: u32, present: bool) -> bool {
    if !present {
        return false;
    }
    let Some(option) = read::<H, 8>(ctx, at) else {
        return true;
    };
    matches!(option[0], 1 | 2)
        && !is_source_mac(
            ctx,
            [option[2], option[3], option[4], option[5], option[6], option[7]],
        )
}

/// Returns whether it is certain that the node does not forward the packet to another link. A packet to a link-local
/// destination, unicast or multicast, stays on the link; any other multicast can leave it. For other unicast
/// destinations, the result depends on the hook, the ipcache and the routing table.
#[inline(always)]
fn stays_on_link<H: Hook>(ctx: H, pkt: &PacketContext) -> bool {
    let to = &pkt.headers.destination;
    let first = to.0[0].to_ne_bytes();
    if first[0] == 0xff {
        return first[1] & 0x0f == 2;
    }
    if identity::is_link_local(to) {
        return true;
    }
    let owner = identity::exact(to).endpoint();
    match pkt.hook_point {
        hook_point::NIC_OUT => ctx.is_local(),
        hook_point::TO_WORKLOAD => owner == pkt.endpoint,
        _ if owner != 0 && owner == identity::host_endpoint() => true,
        hook_point::NIC_IN if owner != 0 => false,
        _ => {
            let link = match interface(pkt.ifindex) {
                Some(interface) => interface.link,
                None => 0,
            };
            let way = identity::route(ctx, pkt);
            way == 0 || (pkt.hook_point == hook_point::FROM_WORKLOAD && (way == pkt.ifindex || way == link))
        }
    }
}
