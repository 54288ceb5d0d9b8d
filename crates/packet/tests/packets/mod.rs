//! Packets, made with etherparse. Also for the tests of the BPF programs.
#![allow(dead_code, reason = "each test file uses a part")]

use std::net::IpAddr;

use etherparse::{
    EtherType, Ethernet2Header, IcmpEchoHeader, Icmpv4Type, Icmpv6Type, IpFragOffset, IpHeaders, IpNumber,
    Ipv4Header, Ipv6FragmentHeader, Ipv6Header, PacketBuilder, PacketBuilderStep,
};

pub const MAC_A: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MAC_B: [u8; 6] = [2, 0, 0, 0, 0, 2];

pub use palisade_abi::tcp_flags::{ACK, FIN, RST, SYN};

/// Ethernet and IP of a packet between two addresses.
fn ip(source: &str, destination: &str, hop_limit: u8) -> PacketBuilderStep<IpHeaders> {
    let ethernet = PacketBuilder::ethernet2(MAC_A, MAC_B);
    match (source.parse().unwrap(), destination.parse().unwrap()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            ethernet.ipv4(source.octets(), destination.octets(), hop_limit)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            ethernet.ipv6(source.octets(), destination.octets(), hop_limit)
        }
        _ => panic!("two families"),
    }
}

pub fn tcp(source: (&str, u16), destination: (&str, u16), flags: u8) -> Vec<u8> {
    segment(source, destination, flags, &[])
}

/// TCP with data, sequence number 1000.
pub fn segment(source: (&str, u16), destination: (&str, u16), flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut step = ip(source.0, destination.0, 64).tcp(source.1, destination.1, 1000, 4096);
    if flags & FIN != 0 {
        step = step.fin();
    }
    if flags & SYN != 0 {
        step = step.syn();
    }
    if flags & RST != 0 {
        step = step.rst();
    }
    if flags & ACK != 0 {
        step = step.ack(1);
    }
    let mut frame = Vec::new();
    step.write(&mut frame, payload).unwrap();
    frame
}

pub fn udp(source: (&str, u16), destination: (&str, u16), payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    ip(source.0, destination.0, 64)
        .udp(source.1, destination.1)
        .write(&mut frame, payload)
        .unwrap();
    frame
}

/// A packet of any protocol.
pub fn raw(source: &str, destination: &str, protocol: u8, hop_limit: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    // The builder wants to write extension headers itself: it is told an experimental protocol (RFC 3692).
    ip(source, destination, hop_limit)
        .write(&mut frame, IpNumber(253), payload)
        .unwrap();
    frame[if source.contains(':') { 14 + 6 } else { 14 + 9 }] = protocol;
    frame
}

/// ICMP or ICMPv6 by the addresses' family.
pub fn echo(source: &str, destination: &str, id: u16, reply: bool) -> Vec<u8> {
    let header = IcmpEchoHeader { id, seq: 1 };
    let mut frame = Vec::new();
    let step = ip(source, destination, 64);
    if source.contains(':') {
        let kind = if reply {
            Icmpv6Type::EchoReply(header)
        } else {
            Icmpv6Type::EchoRequest(header)
        };
        step.icmpv6(kind).write(&mut frame, &[0; 8]).unwrap();
    } else {
        let kind = if reply {
            Icmpv4Type::EchoReply(header)
        } else {
            Icmpv4Type::EchoRequest(header)
        };
        step.icmpv4(kind).write(&mut frame, &[0; 8]).unwrap();
    }
    frame
}

/// An ICMP message of any type, code 0.
pub fn icmp(source: &str, destination: &str, kind: u8, hop_limit: u8, body: &[u8]) -> Vec<u8> {
    let protocol = if source.contains(':') { 58 } else { 1 };
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(body);
    raw(source, destination, protocol, hop_limit, &message)
}

/// "Port unreachable" or the like, from `source` to `destination`, about `quoted` (a frame with Ethernet).
pub fn unreachable(source: &str, destination: &str, quoted: &[u8]) -> Vec<u8> {
    icmp(
        source,
        destination,
        if source.contains(':') { 1 } else { 3 },
        64,
        &quoted[14..],
    )
}

/// A fragment: `offset` in units of eight bytes.
pub fn fragment(
    source: &str,
    destination: &str,
    protocol: u8,
    id: u32,
    offset: u16,
    more: bool,
    payload: &[u8],
) -> Vec<u8> {
    let offset = IpFragOffset::try_new(offset).unwrap();
    let mut frame = Vec::new();
    match (source.parse().unwrap(), destination.parse().unwrap()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = Ipv4Header::new(
                payload.len() as u16,
                64,
                IpNumber(protocol),
                source.octets(),
                destination.octets(),
            )
            .unwrap();
            header.identification = id as u16;
            header.dont_fragment = false;
            header.more_fragments = more;
            header.fragment_offset = offset;
            header.header_checksum = header.calc_header_checksum();
            ethernet(EtherType::IPV4).write(&mut frame).unwrap();
            header.write(&mut frame).unwrap();
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let header = Ipv6Header {
                payload_length: payload.len() as u16 + 8,
                next_header: IpNumber::IPV6_FRAGMENTATION_HEADER,
                hop_limit: 64,
                source: source.octets(),
                destination: destination.octets(),
                ..Ipv6Header::default()
            };
            ethernet(EtherType::IPV6).write(&mut frame).unwrap();
            header.write(&mut frame).unwrap();
            Ipv6FragmentHeader::new(IpNumber(protocol), offset, more, id)
                .write(&mut frame)
                .unwrap();
        }
        _ => panic!("two families"),
    }
    frame.extend_from_slice(payload);
    frame
}

fn ethernet(ether_type: EtherType) -> Ethernet2Header {
    Ethernet2Header {
        source: MAC_A,
        destination: MAC_B,
        ether_type,
    }
}

/// A frame that is not IP.
pub fn frame(destination: [u8; 6], ether_type: u16) -> Vec<u8> {
    let mut frame = Vec::new();
    Ethernet2Header {
        source: MAC_A,
        destination,
        ether_type: EtherType(ether_type),
    }
    .write(&mut frame)
    .unwrap();
    frame.extend_from_slice(&[0; 46]);
    frame
}

/// The same frame with VLAN tags, the outermost first.
pub fn tagged(frame: &[u8], tags: &[u16]) -> Vec<u8> {
    let mut out = frame[..12].to_vec();
    for tag in tags {
        out.extend_from_slice(&tag.to_be_bytes());
        out.extend_from_slice(&[0, 7]);
    }
    out.extend_from_slice(&frame[12..]);
    out
}

/// fe80::1, as a message holds it.
pub const FE80_1: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// An ARP packet from the frame's source: `operation` 1 asks, 2 answers.
pub fn arp(operation: u8, sender: &str, target: &str) -> Vec<u8> {
    let v4 = |addr: &str| addr.parse::<std::net::Ipv4Addr>().unwrap().octets();
    let mut out = frame([255; 6], 0x0806);
    out[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, operation]);
    out[22..28].copy_from_slice(&MAC_A);
    out[28..32].copy_from_slice(&v4(sender));
    out[38..42].copy_from_slice(&v4(target));
    out
}

/// A neighbour solicitation (135) or advertisement (136) for `target`, with the frame's source as link-layer address.
pub fn neighbour(kind: u8, source: &str, destination: &str, target: &str) -> Vec<u8> {
    let mut body = target.parse::<std::net::Ipv6Addr>().unwrap().octets().to_vec();
    body.extend_from_slice(&[if kind == 135 { 1 } else { 2 }, 1]);
    body.extend_from_slice(&MAC_A);
    icmp(source, destination, kind, 255, &body)
}

/// A report of one group.
pub fn mld_report(source: &str, hop_limit: u8, record: &[u8]) -> Vec<u8> {
    let mut out = icmp(source, "ff02::16", 143, hop_limit, record);
    out[14 + 40 + 7] = 1;
    out
}
