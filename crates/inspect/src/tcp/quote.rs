//! ICMP errors about segments of inspected connections.
//!
//! ICMP has no authentication, so an error counts only if it quotes a sequence number that was sent and is not
//! acknowledged (RFC 5927, 4.1): an attacker that does not see the connection has to guess that number. The BPF
//! programs have compared addresses and ports with the flow, and have truncated the error to the quoted network header
//! and eight bytes.

use palisade_abi::{CtKey, protocol, punt_flags};
use palisade_packet::{Quote, decode_quote, flags, icmp, icmpv6};

use super::{flow::key_of, side::Side};
use crate::PacketView;

/// ICMP code "fragmentation needed" of the type "destination unreachable" (RFC 1191, 4).
const TOO_BIG: u16 = 4;
/// Length of an ICMP header, bytes.
const HEADER: usize = 8;

/// Verdict on an ICMP error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Quoted {
    /// The error is dropped: it quotes no sequence number in flight.
    Unrelated,
    /// The error is consumed: the bytes are acknowledged to their sender, so only the worker can retransmit them.
    Ours,
    /// The error is forwarded to the sender of the quoted segment.
    Theirs,
}

/// An ICMP error that quotes a TCP segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QuotedSegment {
    /// Conntrack key of the connection, as the endpoint of the punt request sees it.
    pub(super) key: CtKey,
    /// Sender of the segment, and so the receiver of the error.
    pub(super) sender: Side,
    /// Sequence number of the segment.
    pub(super) seq: u32,
    /// MTU of the next hop, bytes, from a Packet Too Big or Fragmentation Needed message; 0 if the router did not set
    /// it. `None` for other errors.
    pub(super) mtu: Option<u32>,
}

impl QuotedSegment {
    /// Returns the segment that an ICMP error quotes, or `None` if the quote is not usable. The BPF programs punt only
    /// errors that quote TCP without IP options or extension headers.
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
        // The error goes to the sender of the quoted packet, in the opposite direction.
        let (local, remote) = if view.slot.flags & punt_flags::INGRESS != 0 {
            (source, destination)
        } else {
            (destination, source)
        };
        Some(Self {
            key: key_of(local, remote, view.slot.endpoint),
            sender: Side::of(view.slot).other(),
            seq: word(network + header + 4)?,
            mtu,
        })
    }
}
