//! Length of the headers of a packet: what a capture without `--snaplen` writes.

use palisade_abi::protocol;
use palisade_packet::{Bytes, Packet, Start, decode, flags};

/// Largest number of bytes of headers that are written. Longer chains of extension headers are cut.
pub(super) const MAX_BYTES: u32 = 512;
/// Bytes that are written of a packet that cannot be decoded: an Ethernet and an IPv6 header.
const UNDECODED_BYTES: u32 = 54;
/// Bytes that are written of a frame that is not IP, from its network header on: an ARP packet (RFC 826).
const NOT_IP_BYTES: u32 = 28;

/// The copied part of a frame.
struct Copied<'a> {
    bytes: &'a [u8],
    length: u32,
}

impl Bytes for Copied<'_> {
    fn len(&self) -> u32 {
        self.length
    }

    fn array<const N: usize>(&self, offset: u32) -> Option<&[u8; N]> {
        self.bytes.array(offset)
    }
}

/// Returns the length of the headers of a frame, including those that an ICMP error quotes, bytes. `length`: length of
/// the whole frame. `is_layer3`: the frame begins with the network header.
pub(super) fn length(frame: &[u8], length: u32, is_layer3: bool) -> u32 {
    let mut packet = Packet::default();
    let start = if is_layer3 {
        Start::Network
    } else {
        Start::Ethernet { tags_removed: 0 }
    };
    let copied = Copied { bytes: frame, length };
    if decode(&copied, start, &mut packet).is_err() {
        return UNDECODED_BYTES;
    }
    let network = u32::from(packet.network_offset);
    if packet.is(flags::NOT_IP) {
        return network + NOT_IP_BYTES;
    }
    let transport = u32::from(packet.transport_offset);
    if packet.is(flags::FRAGMENT_LATER) || transport == 0 {
        // No transport header: the headers are followed by data of the datagram.
        return transport.max(network + if packet.is(flags::IPV6) { 40 } else { 20 });
    }
    let header = match packet.protocol {
        protocol::TCP => {
            // The data offset, in words of four bytes.
            let offset = frame.get(usize::from(packet.transport_offset) + 12);
            offset.map_or(20, |byte| 4 * u32::from(byte >> 4)).max(20)
        }
        protocol::UDP => 8,
        protocol::SCTP => 12,
        protocol::ICMP | protocol::ICMPV6 if packet.is(flags::ICMP_ERROR) => {
            // The quoted network header and its first eight bytes.
            8 + if packet.is(flags::IPV6) { 40 } else { 20 } + 8
        }
        // Neighbour discovery: the target and one link-layer address.
        protocol::ICMPV6 if (133..=137).contains(&packet.source_port) => 32,
        protocol::ICMP | protocol::ICMPV6 | protocol::IGMP => 8,
        _ => 0,
    };
    transport + header
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns an Ethernet frame with an IPv4 packet.
    fn v4(protocol: u8, transport: &[u8]) -> Vec<u8> {
        let total = u16::try_from(20 + transport.len()).unwrap().to_be_bytes();
        let mut frame = vec![2; 12];
        frame.extend([8, 0]);
        frame.extend([0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, protocol, 0, 0]);
        frame.extend([192, 0, 2, 1, 192, 0, 2, 2]);
        frame.extend(transport);
        frame
    }

    /// Returns an Ethernet frame with an IPv6 packet.
    fn v6(protocol: u8, transport: &[u8]) -> Vec<u8> {
        let payload = u16::try_from(transport.len()).unwrap().to_be_bytes();
        let mut frame = vec![2; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, payload[0], payload[1], protocol, 64]);
        for last in [1, 2] {
            frame.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        }
        frame.extend(transport);
        frame
    }

    fn headers(frame: &[u8]) -> u32 {
        length(frame, u32::try_from(frame.len()).unwrap(), false)
    }

    /// Returns a TCP segment with 12 bytes of options and a payload.
    fn tcp() -> Vec<u8> {
        let mut segment = vec![
            0x0f, 0xa0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x80, 0x18, 1, 0, 0, 0, 0, 0,
        ];
        segment.extend([1; 12]);
        segment.extend(b"GET /secret HTTP/1.1\r\n");
        segment
    }

    #[test]
    fn the_payload_of_a_tcp_segment_is_not_written() {
        assert_eq!(headers(&v4(6, &tcp())), 14 + 20 + 32);
        assert_eq!(headers(&v6(6, &tcp())), 14 + 40 + 32);
    }

    #[test]
    fn the_payload_of_a_datagram_is_not_written() {
        let datagram = [&[0, 53, 0, 53, 0, 24, 0, 0][..], &[7; 16]].concat();
        assert_eq!(headers(&v4(17, &datagram)), 14 + 20 + 8);
        assert_eq!(headers(&v6(17, &datagram)), 14 + 40 + 8);
    }

    #[test]
    fn the_payload_of_an_unknown_protocol_or_of_a_later_fragment_is_not_written() {
        assert_eq!(headers(&v4(47, &[7; 30])), 14 + 20);
        let mut fragment = v4(17, &[7; 32]);
        fragment[14 + 7] = 100;
        assert_eq!(headers(&fragment), 14 + 20);
    }

    #[test]
    fn a_frame_that_cannot_be_decoded_is_written_up_to_54_bytes() {
        let mut frame = v4(6, &tcp());
        frame[14] = 0x41;
        assert_eq!(headers(&frame), UNDECODED_BYTES);
        assert_eq!(headers(&[]), UNDECODED_BYTES);
    }

    #[test]
    fn an_arp_packet_is_written_whole() {
        let mut frame = vec![2; 12];
        frame.extend([8, 6]);
        frame.extend([0; 46]);
        assert_eq!(headers(&frame), 14 + 28);
    }
}
