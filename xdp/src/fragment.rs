//! Fragments: later fragments get the ports of the first fragment.

use palisade_abi::{FragmentKey, FragmentPorts, ID_SLOTS, Reason, protocol};
use palisade_packet::{flags, icmp_kind};

use crate::maps::{CONFIG, FRAGMENTS, INTERFACES};
use crate::packet_context::PacketContext;
use crate::share;

/// Number of the IPv6 fragment header. It is the protocol in the key of every IPv6 datagram, because the fragments of
/// one datagram can name different next headers.
const IPV6_FRAGMENT: u32 = 44;

/// Returns the key of a fragment's datagram. The key contains interface and hook.
#[inline(always)]
fn key(pkt: &PacketContext) -> FragmentKey {
    let packet = &pkt.headers;
    FragmentKey {
        source: packet.source,
        destination: packet.destination,
        id: packet.fragment_id,
        hook: (pkt.ifindex << 1) | u32::from(pkt.egress),
        protocol: if packet.is(flags::IPV6) {
            IPV6_FRAGMENT
        } else {
            u32::from(packet.protocol)
        },
    }
}

/// Stores the ports of a first fragment that a policy has allowed or denied, so that the same rules apply to the later
/// fragments. The ports of a first fragment that is malformed, forwarded, or has a spoofed source are not stored.
#[inline(never)]
pub fn remember(pkt: &mut PacketContext) -> u32 {
    let evaluated = !pkt.is_dropped() || pkt.rule != 0;
    if !evaluated || pkt.reason == Reason::Forwarded as u8 {
        return 0;
    }
    // `pkt.endpoint` is the node if the node's policy was looked up too, but the slot belongs to the share of the
    // interface's endpoint.
    let Some(interface) = INTERFACES.get(pkt.ifindex & (ID_SLOTS as u32 - 1)) else {
        return 0;
    };
    let key = key(pkt);
    let packet = &pkt.headers;
    let lifetime = match CONFIG.get(0) {
        Some(config) => config.fragment,
        None => 0,
    };
    let is_icmp = matches!(packet.protocol, protocol::ICMP | protocol::ICMPV6);
    let ports = FragmentPorts {
        expires: pkt.now + lifetime,
        source: packet.source_port,
        destination: if is_icmp {
            packet.echo_id
        } else {
            packet.destination_port
        },
        tcp_flags: packet.tcp_flags,
        protocol: packet.protocol,
        zero: [0; 2],
    };
    if share::claim_fragment_slot(&key, u32::from(interface.endpoint), ports.expires) != 0 {
        // If the map rejects the element, the later fragments have no ports and only rules for all ports apply.
        let _ = FRAGMENTS.insert(&key, &ports, 0);
    }
    0
}

/// Sets the ports of a later fragment to those of the first fragment, or marks them as unknown.
#[inline(never)]
pub fn resolve(pkt: &mut PacketContext) -> u32 {
    let key = key(pkt);
    let packet = &mut pkt.headers;
    let ipv6 = packet.is(flags::IPV6);
    // SAFETY: the value stays readable while the program runs. The fields are copied at once, because the LRU map can
    // recycle the element for another datagram.
    match unsafe { FRAGMENTS.get(&key) } {
        Some(ports) if ports.expires > pkt.now => {
            packet.protocol = ports.protocol;
            packet.tcp_flags = ports.tcp_flags;
            packet.source_port = ports.source;
            if matches!(ports.protocol, protocol::ICMP | protocol::ICMPV6) {
                packet.destination_port = 0;
                packet.echo_id = ports.destination;
                // Only the first fragment contains the quote of an ICMP error, so the policy decides about later
                // fragments by the ICMP type.
                packet.flags |= icmp_kind(ipv6, ports.source as u8) & !flags::ICMP_ERROR;
            } else {
                packet.destination_port = ports.destination;
            }
        }
        _ => pkt.ports_unknown = true,
    }
    0
}
