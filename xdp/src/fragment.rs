//! Fragments: the later ones take the ports of the first.

use palisade_abi::{FragmentKey, FragmentPorts, ID_SLOTS, Reason, protocol};
use palisade_packet::{flags, icmp_kind};

use crate::maps::{CONFIG, FRAGMENTS, INTERFACES};
use crate::packet_context::PacketContext;
use crate::share;

/// IPv6 fragment header: stands for "whatever the datagram's protocol is".
const IPV6_FRAGMENT: u32 = 44;

/// The datagram of a fragment, at the interface and hook where the program stands.
#[inline(always)]
fn key(frame: &PacketContext) -> FragmentKey {
    let packet = &frame.packet;
    FragmentKey {
        source: packet.source,
        destination: packet.destination,
        id: packet.fragment_id,
        hook: (frame.ifindex << 1) | u32::from(frame.egress),
        protocol: if packet.is(flags::IPV6) {
            IPV6_FRAGMENT
        } else {
            u32::from(packet.protocol)
        },
    }
}

/// Remembers the ports of a first fragment that was judged by rules. The later fragments of a denied datagram are then
/// denied by the same rule. What has a spoofed source, is malformed or is only forwarded leaves nothing here.
#[inline(never)]
pub fn remember(frame: &mut PacketContext) -> u32 {
    let judged = !frame.is_dropped() || frame.rule != 0;
    if !judged || frame.reason == Reason::Forwarded as u8 {
        return 0;
    }
    // Where the node's policy was asked too, the endpoint is the node by now.
    let Some(interface) = INTERFACES.get(frame.ifindex & (ID_SLOTS as u32 - 1)) else {
        return 0;
    };
    let key = key(frame);
    let packet = &frame.packet;
    let lifetime = match CONFIG.get(0) {
        Some(config) => config.fragment,
        None => 0,
    };
    let is_icmp = matches!(packet.protocol, protocol::ICMP | protocol::ICMPV6);
    let ports = FragmentPorts {
        expires: frame.now + lifetime,
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
        // Where the map takes nothing the later fragments have no ports.
        let _ = FRAGMENTS.insert(&key, &ports, 0);
    }
    0
}

/// Gives a later fragment the ports of the first.
#[inline(never)]
pub fn resolve(frame: &mut PacketContext) -> u32 {
    let key = key(frame);
    let packet = &mut frame.packet;
    let ipv6 = packet.is(flags::IPV6);
    // SAFETY: entries are replaced, never changed in place; what is needed is copied at once.
    match unsafe { FRAGMENTS.get(&key) } {
        Some(ports) if ports.expires > frame.now => {
            packet.protocol = ports.protocol;
            packet.tcp_flags = ports.tcp_flags;
            packet.source_port = ports.source;
            if matches!(ports.protocol, protocol::ICMP | protocol::ICMPV6) {
                packet.destination_port = 0;
                packet.echo_id = ports.destination;
                // An error's quote is in the first fragment only: the later ones are judged by type.
                packet.flags |= icmp_kind(ipv6, ports.source as u8) & !flags::ICMP_ERROR;
            } else {
                packet.destination_port = ports.destination;
            }
        }
        _ => frame.ports_unknown = true,
    }
    0
}
