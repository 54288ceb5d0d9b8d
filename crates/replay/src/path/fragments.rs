//! Fragments: later fragments get the ports of the first fragment, as in `xdp/src/fragment.rs`.

use std::collections::{HashMap, VecDeque};

use foldhash::fast::RandomState;
use palisade_abi::{FragmentKey, FragmentPorts, Reason, protocol};
use palisade_packet::{flags, icmp_kind};

use super::state::PacketState;

/// Number of the IPv6 fragment header, the protocol in the key of every IPv6 datagram.
const IPV6_FRAGMENT: u32 = 44;

/// Bit of the key that is in no index of an interface.
const UNKNOWN_INTERFACE: u32 = 1 << 30;

/// The ports of datagrams whose first fragment was seen.
#[derive(Debug)]
pub(crate) struct Fragments {
    ports: HashMap<FragmentKey, FragmentPorts, RandomState>,
    /// Keys in the order in which they were stored.
    order: VecDeque<FragmentKey>,
    limit: usize,
}

/// Returns the key of a fragment's datagram. If the index of the interface is not known, the number of the endpoint
/// with [`UNKNOWN_INTERFACE`] is in its place.
fn key(pkt: &PacketState<'_>) -> FragmentKey {
    let packet = &pkt.headers;
    let interface = match pkt.site.ifindex {
        0 => UNKNOWN_INTERFACE | u32::from(pkt.site.endpoint),
        ifindex => ifindex,
    };
    FragmentKey {
        source: packet.source,
        destination: packet.destination,
        id: packet.fragment_id,
        hook: interface << 1 | u32::from(pkt.site.point.is_egress_hook()),
        protocol: if packet.is(flags::IPV6) {
            IPV6_FRAGMENT
        } else {
            u32::from(packet.protocol)
        },
    }
}

impl Fragments {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            ports: HashMap::default(),
            order: VecDeque::new(),
            limit: limit.max(1),
        }
    }

    /// Stores the ports of a first fragment that a policy has allowed or denied.
    pub(super) fn remember(&mut self, pkt: &PacketState<'_>, lifetime: u64) {
        if (pkt.is_dropped() && pkt.rule == 0) || pkt.reason == Reason::Forwarded {
            return;
        }
        let packet = &pkt.headers;
        let is_icmp = matches!(packet.protocol, protocol::ICMP | protocol::ICMPV6);
        let ports = FragmentPorts {
            expires: pkt.now.saturating_add(lifetime),
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
        let key = key(pkt);
        if self.ports.insert(key, ports).is_none() {
            self.order.push_back(key);
            if self.order.len() > self.limit
                && let Some(oldest) = self.order.pop_front()
            {
                self.ports.remove(&oldest);
            }
        }
    }

    /// Sets the ports of a later fragment to those of the first fragment, or marks them as unknown.
    pub(super) fn resolve(&self, pkt: &mut PacketState<'_>) {
        let ports = self.ports.get(&key(pkt)).filter(|ports| ports.expires > pkt.now);
        let Some(ports) = ports else {
            pkt.ports_unknown = true;
            return;
        };
        let packet = &mut pkt.headers;
        packet.protocol = ports.protocol;
        packet.tcp_flags = ports.tcp_flags;
        packet.source_port = ports.source;
        if matches!(ports.protocol, protocol::ICMP | protocol::ICMPV6) {
            packet.destination_port = 0;
            packet.echo_id = ports.destination;
            let [kind, _] = ports.source.to_le_bytes();
            packet.flags |= icmp_kind(packet.is(flags::IPV6), kind) & !flags::ICMP_ERROR;
        } else {
            packet.destination_port = ports.destination;
        }
    }
}
