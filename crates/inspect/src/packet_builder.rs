//! Builds UDP datagrams that the engine sends, and the IP headers of all generated packets.

use std::net::{IpAddr, Ipv4Addr};

use palisade_abi::{Addr, protocol};
pub(crate) use palisade_packet::checksum::Sum;
use palisade_packet::flags;

use crate::PacketView;

/// TTL or hop limit of generated packets (the default of RFC 1700).
const HOP_LIMIT: u8 = 64;
/// Length of a UDP header, bytes.
const UDP_HEADER: usize = 8;
/// Offset of the checksum in an IPv4 header, bytes.
const IPV4_CHECKSUM: usize = 10;

/// Builds the datagram that answers the one in `view`, with addresses and ports swapped. Returns whether the answer was
/// built: a datagram from or to a multicast, broadcast or unspecified address is never answered.
pub(crate) fn datagram_back(view: &PacketView<'_>, payload: &[u8], out: &mut Vec<u8>) -> bool {
    let packet = view.packet;
    let Some(([to, from], rest)) = view
        .frame
        .get(..view.network)
        .and_then(|link| link.split_at_checked(12))
        .and_then(|(addresses, rest)| Some((addresses.as_chunks::<6>().0.first_chunk::<2>()?, rest)))
        .filter(|(_, rest)| rest.len() >= 2)
    else {
        return false;
    };
    if to[0] & 1 != 0 || !is_unicast(packet.source) || !is_unicast(packet.destination) {
        return false;
    }
    let length = UDP_HEADER + payload.len();
    let Ok(length16) = u16::try_from(length) else {
        return false;
    };
    let (source, destination) = (packet.destination, packet.source);
    out.clear();
    out.extend_from_slice(from);
    out.extend_from_slice(to);
    out.extend_from_slice(rest);
    network_header(
        source,
        destination,
        packet.is(flags::IPV6),
        protocol::UDP,
        length16,
        out,
    );
    let [length0, length1] = length16.to_be_bytes();
    let [source0, source1] = packet.destination_port.to_be_bytes();
    let [destination0, destination1] = packet.source_port.to_be_bytes();
    let ports_and_length = [source0, source1, destination0, destination1, length0, length1];
    let sum = Sum::pseudo(source, destination, protocol::UDP, length)
        .add(&ports_and_length)
        .add(payload)
        .fold();
    // A checksum field of zero would mean that the datagram has no checksum (RFC 768).
    let sum = if sum == 0xffff { 0xffff } else { !sum };
    out.extend_from_slice(&ports_and_length);
    out.extend_from_slice(&sum.to_be_bytes());
    out.extend_from_slice(payload);
    true
}

/// Appends an IP header without options, for a payload of `length` bytes.
pub(crate) fn network_header(
    source: Addr,
    destination: Addr,
    is_ipv6: bool,
    protocol: u8,
    length: u16,
    out: &mut Vec<u8>,
) {
    let (from, to) = (source.bytes(), destination.bytes());
    if is_ipv6 {
        let [length0, length1] = length.to_be_bytes();
        out.extend_from_slice(&[0x60, 0, 0, 0, length0, length1, protocol, HOP_LIMIT]);
        out.extend_from_slice(&from);
        out.extend_from_slice(&to);
        return;
    }
    let [length0, length1] = length.saturating_add(20).to_be_bytes();
    // DF is set, so no identification is needed (RFC 6864, 4.1).
    let mut header = [
        0x45, 0, length0, length1, 0, 0, 0x40, 0, HOP_LIMIT, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    header[12..16].copy_from_slice(&from[12..]);
    header[16..].copy_from_slice(&to[12..]);
    let sum = !Sum::default().add(&header).fold();
    header[IPV4_CHECKSUM..IPV4_CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
    out.extend_from_slice(&header);
}

fn is_unicast(addr: Addr) -> bool {
    let ip = IpAddr::from(addr);
    !ip.is_multicast() && !ip.is_unspecified() && ip != Ipv4Addr::BROADCAST
}
