//! Fragments: the later ones take the ports of the first.

use palisade_abi::{FragmentKey, FragmentPorts, protocol};
use palisade_packet::{flags, icmp_kind};

use crate::frame::Frame;
use crate::maps::{CONFIG, FRAGMENTS};

/// IPv6 fragment header: stands for "whatever the datagram's protocol is".
const IPV6_FRAGMENT: u32 = 44;

/// Remembers the ports of a first fragment, or gives them to a later one. `hook` is `ifindex << 1 | egress`.
///
/// Remembered before it is judged: the later fragments of a denied datagram are then denied by the same rule.
#[inline(never)]
pub fn resolve(frame: &mut Frame, hook: u32) -> u32 {
    let packet = &mut frame.packet;
    let ipv6 = packet.is(flags::IPV6);
    let key = FragmentKey {
        source: packet.source,
        destination: packet.destination,
        id: packet.fragment_id,
        hook,
        protocol: if ipv6 {
            IPV6_FRAGMENT
        } else {
            u32::from(packet.protocol)
        },
    };
    let is_icmp = matches!(packet.protocol, protocol::ICMP | protocol::ICMPV6);
    if packet.is(flags::FRAGMENT_FIRST) {
        let lifetime = match CONFIG.get(0) {
            Some(config) => config.fragment,
            None => 0,
        };
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
        // Where the map takes nothing the later fragments have no ports, and are dropped as such.
        let _ = FRAGMENTS.insert(&key, &ports, 0);
        return 0;
    }
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
