//! ICMP errors about segments of inspected connections.
//!
//! ICMP has no authentication, so an error counts only if it quotes a sequence number that was sent and is not
//! acknowledged (RFC 5927, 4.1): an attacker that does not see the connection has to guess that number. The programs
//! have compared addresses and ports with the flow, and have cut the error to the quoted network header and eight bytes.

use palisade_abi::{CtKey, protocol, punt_flags};
use palisade_packet::{Quote, decode_quote, flags, icmp, icmpv6};

use super::Side;
use crate::PacketView;

/// Code of "destination unreachable" over IPv4: "fragmentation needed" (RFC 1191, 4).
const TOO_BIG: u16 = 4;
/// Length of an ICMP header.
const HEADER: usize = 8;

/// An ICMP error that quotes a TCP segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QuotedSegment {
    /// The conntrack key of its connection, as the slot's endpoint sees it.
    pub(super) key: CtKey,
    /// The end that sent the segment: to which the error goes.
    pub(super) sender: Side,
    /// Sequence number of the segment.
    pub(super) seq: u32,
    /// Of "packet too big": the MTU of the next hop; 0 if the router does not say.
    pub(super) mtu: Option<u32>,
}

impl QuotedSegment {
    /// Returns what an ICMP error quotes; none if that is no TCP segment in the form in which the programs punt errors:
    /// behind a network header without options and extension headers.
    pub(crate) fn read(view: &PacketView<'_>) -> Option<Self> {
        let PacketView { packet, frame, .. } = view;
        let is_ipv6 = packet.is(flags::IPV6);
        let mut quote = Quote::default();
        decode_quote(*frame, packet, &mut quote).ok()?;
        let network = view.transport + HEADER;
        let (header, is_plain) = if is_ipv6 {
            (40, *frame.get(network + 6)? == protocol::TCP)
        } else {
            (20, *frame.get(network)? == 0x45)
        };
        if quote.protocol != protocol::TCP || !is_plain || quote.source != packet.destination {
            return None;
        }
        let word = |at: usize| Some(u32::from_be_bytes(*frame.get(at..)?.first_chunk()?));
        let (kind, code) = (packet.source_port, packet.destination_port);
        let second = word(view.transport + 4)?;
        let mtu = if is_ipv6 {
            (kind == u16::from(icmpv6::PACKET_TOO_BIG)).then_some(second)
        } else {
            (kind == u16::from(icmp::UNREACHABLE) && code == TOO_BIG).then_some(second & 0xffff)
        };
        let source = (quote.source, quote.source_port);
        let destination = (quote.destination, quote.destination_port);
        // The quoted packet went the other way.
        let (local, remote) = if view.slot.flags & punt_flags::INGRESS != 0 {
            (source, destination)
        } else {
            (destination, source)
        };
        Some(Self {
            key: CtKey {
                local: local.0,
                remote: remote.0,
                local_port: local.1,
                remote_port: remote.1,
                endpoint: view.slot.endpoint,
                protocol: protocol::TCP,
                zero: 0,
            },
            sender: Side::of(view.slot).other(),
            seq: word(network + header + 4)?,
            mtu,
        })
    }
}
