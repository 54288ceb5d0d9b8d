//! Parsed packets for assertions, and packets that ordinary sockets cannot send.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IP protocol numbers.
pub mod protocol {
    #![allow(missing_docs, reason = "the names are those of IANA")]
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const GRE: u8 = 47;
    pub const ICMPV6: u8 = 58;
    pub const SCTP: u8 = 132;
}

/// A captured packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Whether the packet was outgoing; otherwise it was incoming.
    pub outgoing: bool,
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// IP protocol.
    pub protocol: u8,
    /// Source and destination port; `None` for protocols without ports and for later fragments.
    pub ports: Option<(u16, u16)>,
    /// ICMP type and code.
    pub icmp: Option<(u8, u8)>,
    /// TCP flags.
    pub tcp_flags: u8,
    /// Whether the packet is a fragment, including a first fragment.
    pub fragment: bool,
    /// Length from the network header on, bytes.
    pub length: usize,
    /// The bytes that follow the network header.
    pub payload: Vec<u8>,
}

/// Parses an Ethernet frame; `None` if the frame is not IP or its headers are truncated.
#[must_use]
pub fn parse(frame: &[u8], outgoing: bool) -> Option<Packet> {
    let ether_type = u16::from_be_bytes(frame.get(12..14)?.try_into().ok()?);
    let ip = frame.get(14..)?;
    let (source, destination, protocol, payload, fragment, first): (IpAddr, IpAddr, u8, &[u8], bool, bool);
    match ether_type {
        0x0800 => {
            let header = usize::from(ip.first()? & 15) * 4;
            let total = usize::from(u16::from_be_bytes(ip.get(2..4)?.try_into().ok()?));
            let offset = u16::from_be_bytes(ip.get(6..8)?.try_into().ok()?);
            source = Ipv4Addr::from(<[u8; 4]>::try_from(ip.get(12..16)?).ok()?).into();
            destination = Ipv4Addr::from(<[u8; 4]>::try_from(ip.get(16..20)?).ok()?).into();
            protocol = *ip.get(9)?;
            payload = ip.get(header..total.min(ip.len()))?;
            fragment = offset & 0x3fff != 0;
            first = offset & 0x1fff == 0;
        }
        0x86dd => {
            source = Ipv6Addr::from(<[u8; 16]>::try_from(ip.get(8..24)?).ok()?).into();
            destination = Ipv6Addr::from(<[u8; 16]>::try_from(ip.get(24..40)?).ok()?).into();
            let next = *ip.get(6)?;
            let rest = ip.get(40..)?;
            if next == 44 {
                let offset = u16::from_be_bytes(rest.get(2..4)?.try_into().ok()?);
                protocol = *rest.first()?;
                payload = rest.get(8..)?;
                fragment = true;
                first = offset >> 3 == 0;
            } else {
                protocol = next;
                payload = rest;
                fragment = false;
                first = true;
            }
        }
        _ => return None,
    }
    let mut packet = Packet {
        outgoing,
        source,
        destination,
        protocol,
        ports: None,
        icmp: None,
        tcp_flags: 0,
        fragment,
        length: ip.len(),
        payload: payload.to_vec(),
    };
    if first {
        match protocol {
            protocol::TCP | protocol::UDP | protocol::SCTP => {
                let b: [u8; 4] = payload.get(..4)?.try_into().ok()?;
                packet.ports = Some((u16::from_be_bytes([b[0], b[1]]), u16::from_be_bytes([b[2], b[3]])));
                if protocol == protocol::TCP {
                    packet.tcp_flags = *payload.get(13)?;
                }
            }
            protocol::ICMP | protocol::ICMPV6 => packet.icmp = Some((*payload.first()?, *payload.get(1)?)),
            _ => {}
        }
    }
    Some(packet)
}

/// Returns the internet checksum (RFC 1071) of `bytes`. `sum`: a partial sum to add, such as that of a pseudo header.
#[must_use]
pub fn checksum(sum: u32, bytes: &[u8]) -> u16 {
    let mut sum = u64::from(sum);
    for pair in bytes.chunks(2) {
        sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Returns an ICMP message with its checksum. On a raw ICMPv6 socket the kernel replaces the checksum (RFC 3542,
/// section 3.1).
#[must_use]
pub fn icmp(kind: u8, code: u8, body: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0];
    message.extend_from_slice(body);
    let sum = checksum(0, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// Returns a UDP datagram with its network header. The UDP checksum is zero over IPv4, and correct over IPv6, which
/// requires a checksum.
#[must_use]
pub fn whole_udp(source: IpAddr, destination: IpAddr, from: u16, to: u16, contents: &[u8]) -> Vec<u8> {
    let length = 8 + contents.len() as u16;
    let mut datagram = Vec::new();
    for field in [from, to, length, 0] {
        datagram.extend_from_slice(&field.to_be_bytes());
    }
    datagram.extend_from_slice(contents);
    let mut packet = Vec::new();
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            packet.extend_from_slice(&[0x45, 0]);
            packet.extend_from_slice(&(20 + length).to_be_bytes());
            packet.extend_from_slice(&[0, 0, 0, 0, 64, protocol::UDP, 0, 0]);
            packet.extend_from_slice(&source.octets());
            packet.extend_from_slice(&destination.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet.extend_from_slice(&[0x60, 0, 0, 0]);
            packet.extend_from_slice(&length.to_be_bytes());
            packet.extend_from_slice(&[protocol::UDP, 64]);
            packet.extend_from_slice(&source.octets());
            packet.extend_from_slice(&destination.octets());
            // The checksum also covers the addresses, the length and the protocol (RFC 8200, section 8.1).
            let sum = checksum(
                u32::from(length) + u32::from(protocol::UDP),
                &[&packet[8..], &datagram].concat(),
            );
            datagram[6..8].copy_from_slice(&sum.to_be_bytes());
        }
        _ => {}
    }
    packet.extend_from_slice(&datagram);
    packet
}

/// Returns the last fragment of a UDP datagram, with its network header (RFC 791, section 3.1; RFC 8200, section 4.5).
/// `offset`: position of `contents` in the datagram, a multiple of 8.
#[must_use]
pub fn later_fragment(source: IpAddr, destination: IpAddr, id: u32, offset: u16, contents: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            packet.extend_from_slice(&[0x45, 0]);
            packet.extend_from_slice(&(20 + contents.len() as u16).to_be_bytes());
            packet.extend_from_slice(&(id as u16).to_be_bytes());
            packet.extend_from_slice(&(offset / 8).to_be_bytes());
            packet.extend_from_slice(&[64, protocol::UDP, 0, 0]);
            packet.extend_from_slice(&source.octets());
            packet.extend_from_slice(&destination.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet.extend_from_slice(&[0x60, 0, 0, 0]);
            packet.extend_from_slice(&(8 + contents.len() as u16).to_be_bytes());
            packet.extend_from_slice(&[44, 64]);
            packet.extend_from_slice(&source.octets());
            packet.extend_from_slice(&destination.octets());
            packet.extend_from_slice(&[protocol::UDP, 0]);
            packet.extend_from_slice(&offset.to_be_bytes());
            packet.extend_from_slice(&id.to_be_bytes());
        }
        _ => {}
    }
    packet.extend_from_slice(contents);
    packet
}

/// Returns an SCTP INIT (RFC 9260, section 3.3.2).
#[must_use]
pub fn sctp_init(source: u16, destination: u16) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend_from_slice(&source.to_be_bytes());
    packet.extend_from_slice(&destination.to_be_bytes());
    packet.extend_from_slice(&[0; 8]); // no verification tag yet; checksum below
    packet.extend_from_slice(&[1, 0, 0, 20]); // INIT, 20 bytes
    packet.extend_from_slice(&0x5041_4c49u32.to_be_bytes()); // initiate tag
    packet.extend_from_slice(&65_535u32.to_be_bytes()); // window
    packet.extend_from_slice(&[0, 1, 0, 1]); // one stream each way
    packet.extend_from_slice(&1u32.to_be_bytes()); // first TSN
    let sum = crc32c(&packet);
    packet[8..12].copy_from_slice(&sum.to_le_bytes());
    packet
}

/// Returns the CRC32c of SCTP (RFC 9260, appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 {
                (crc >> 1) ^ 0x82f6_3b78
            } else {
                crc >> 1
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_of_the_known_string() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn checksum_of_a_message_with_its_checksum_is_zero() {
        assert_eq!(checksum(0, &icmp(8, 0, b"abcde")), 0);
    }

    #[test]
    fn a_truncated_frame_is_no_packet_or_a_shorter_one() {
        let mut frame = vec![0; 12];
        frame.extend_from_slice(&[
            0x08, 0x00, 0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
        frame.extend_from_slice(&[0x12, 0x34, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4]);
        let whole = parse(&frame, false).expect("a packet");
        assert_eq!(whole.ports, Some((0x1234, 53)));
        assert_eq!(whole.payload.len(), 12);
        for n in 0..frame.len() {
            assert!(
                parse(&frame[..n], false).is_none_or(|p| p.payload.len() < 12),
                "{n}"
            );
        }
    }
}
