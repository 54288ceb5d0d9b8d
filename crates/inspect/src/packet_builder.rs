//! Packets that the engine makes.

use palisade_abi::{Addr, protocol};
pub(crate) use palisade_packet::checksum::Sum;
use palisade_packet::{Packet, flags};

use crate::PacketView;

/// TTL or hop limit of packets that are made here (RFC 1700's default).
const HOP_LIMIT: u8 = 64;
const UDP_HEADER: usize = 8;

/// Makes the datagram that answers the one in `view`: addresses and ports swapped. False if it is not to be
/// answered: it was sent to a group, or from nobody.
pub(crate) fn datagram_back(view: &PacketView<'_>, payload: &[u8], out: &mut Vec<u8>) -> bool {
    let packet = view.packet;
    let Some(link) = view.frame.get(..view.network).filter(|link| link.len() >= 14) else {
        return false;
    };
    if link[0] & 1 != 0 || is_group_or_nobody(packet.source) || is_group_or_nobody(packet.destination) {
        return false;
    }
    let length = UDP_HEADER + payload.len();
    let Ok(length16) = u16::try_from(length) else {
        return false;
    };
    out.clear();
    out.extend_from_slice(&link[6..12]);
    out.extend_from_slice(&link[..6]);
    out.extend_from_slice(&link[12..]);
    network_header(packet, protocol::UDP, length16, out);
    let [length0, length1] = length16.to_be_bytes();
    let [source0, source1] = packet.destination_port.to_be_bytes();
    let [destination0, destination1] = packet.source_port.to_be_bytes();
    let transport = out.len();
    out.extend_from_slice(&[
        source0,
        source1,
        destination0,
        destination1,
        length0,
        length1,
        0,
        0,
    ]);
    out.extend_from_slice(payload);
    let sum = Sum::pseudo(packet.destination, packet.source, protocol::UDP, length)
        .add(&out[transport..])
        .fold();
    // zero says that there is none
    let sum = if sum == 0xffff { 0xffff } else { !sum };
    out[transport + 6..transport + 8].copy_from_slice(&sum.to_be_bytes());
    true
}

/// The header in front of `length` bytes that answer `packet`.
fn network_header(packet: &Packet, protocol: u8, length: u16, out: &mut Vec<u8>) {
    let (from, to) = (packet.destination.bytes(), packet.source.bytes());
    if packet.is(flags::IPV6) {
        let [length0, length1] = length.to_be_bytes();
        out.extend_from_slice(&[0x60, 0, 0, 0, length0, length1, protocol, HOP_LIMIT]);
        out.extend_from_slice(&from);
        out.extend_from_slice(&to);
        return;
    }
    let at = out.len();
    let [length0, length1] = length.saturating_add(20).to_be_bytes();
    // not to be fragmented, so that no identification is needed (RFC 6864)
    out.extend_from_slice(&[
        0x45, 0, length0, length1, 0, 0, 0x40, 0, HOP_LIMIT, protocol, 0, 0,
    ]);
    out.extend_from_slice(&from[12..]);
    out.extend_from_slice(&to[12..]);
    let sum = !Sum::default().add(&out[at..]).fold();
    out[at + 10..at + 12].copy_from_slice(&sum.to_be_bytes());
}

fn is_group_or_nobody(addr: Addr) -> bool {
    let ip = std::net::IpAddr::from(addr);
    ip.is_multicast() || ip.is_unspecified() || ip == std::net::Ipv4Addr::BROADCAST
}
