//! Transport headers: ports of TCP, UDP and SCTP, TCP flags, types of ICMP and ICMPv6.

use palisade_abi::{Reason, protocol, tcp_flags};

use crate::bytes::{Bytes, take};
use crate::packet::{Packet, flags, is_icmp};

/// ICMP types (RFC 792).
pub mod icmp {
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 0;
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 3;
    /// Echo request.
    pub const ECHO_REQUEST: u8 = 8;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 11;
    /// Parameter problem.
    pub const PARAMETER_PROBLEM: u8 = 12;
}

/// ICMPv6 types (RFC 4443, RFC 4861, RFC 2710, RFC 3810).
pub mod icmpv6 {
    /// Destination unreachable, the lowest type of an error.
    pub const UNREACHABLE: u8 = 1;
    /// Packet too big.
    pub const PACKET_TOO_BIG: u8 = 2;
    /// Parameter problem, the highest type of an error.
    pub const PARAMETER_PROBLEM: u8 = 4;
    /// Echo request.
    pub const ECHO_REQUEST: u8 = 128;
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 129;
    /// Multicast listener query.
    pub const LISTENER_QUERY: u8 = 130;
    /// Multicast listener done.
    pub const LISTENER_DONE: u8 = 132;
    /// Router solicitation.
    pub const ROUTER_SOLICITATION: u8 = 133;
    /// Router advertisement.
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    /// Neighbour solicitation.
    pub const NEIGHBOUR_SOLICITATION: u8 = 135;
    /// Neighbour advertisement.
    pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    /// Version 2 multicast listener report.
    pub const LISTENER_REPORT_V2: u8 = 143;
}

/// Returns whether a TCP implementation sends this combination of flags (RFC 9293, sections 3.5 and 3.10). PSH, URG and
/// the congestion flags (RFC 3168) are ignored.
#[inline(always)]
#[must_use]
pub const fn valid_tcp_flags(set: u8) -> bool {
    const VALID: u32 = 1 << tcp_flags::SYN
        | 1 << (tcp_flags::SYN | tcp_flags::ACK)
        | 1 << tcp_flags::RST
        | 1 << (tcp_flags::RST | tcp_flags::ACK)
        | 1 << (tcp_flags::FIN | tcp_flags::ACK)
        | 1 << tcp_flags::ACK;
    VALID >> (set & (tcp_flags::FIN | tcp_flags::SYN | tcp_flags::RST | tcp_flags::ACK)) & 1 != 0
}

/// Decodes the transport header; a later fragment has none.
#[inline(always)]
pub(crate) fn decode<B: Bytes + ?Sized>(bytes: &B, packet: &mut Packet) -> Result<(), Reason> {
    let ipv6 = packet.is(flags::IPV6);
    let of_other_family = is_icmp(packet.protocol, !ipv6);
    if of_other_family {
        return Err(Reason::UnknownL4);
    }
    if packet.is(flags::FRAGMENT_LATER) {
        return Ok(());
    }
    let first = packet.is(flags::FRAGMENT_FIRST);
    let short = if first {
        Reason::InvalidFragment
    } else {
        Reason::TruncatedL4
    };
    let (offset, end) = (u32::from(packet.transport_offset), packet.end());
    match packet.protocol {
        protocol::TCP => {
            let header = take::<20, B>(bytes, offset, end, short)?;
            ports(packet, [header[0], header[1], header[2], header[3]]);
            packet.tcp_flags = header[13];
            let length = u32::from(header[12] >> 4) * 4;
            if length < 20 {
                return Err(Reason::CtInvalidHeader);
            }
            if offset + length > end {
                return Err(short);
            }
            if !valid_tcp_flags(packet.tcp_flags) {
                return Err(Reason::CtInvalidHeader);
            }
        }
        protocol::UDP => {
            let header = take::<8, B>(bytes, offset, end, short)?;
            ports(packet, [header[0], header[1], header[2], header[3]]);
            let length = u32::from(u16::from_be_bytes([header[4], header[5]]));
            // Length 0: the datagram is too long for the field (RFC 2675). In a first fragment the field is the length
            // of the whole datagram.
            if length < 8 && !(length == 0 && end - offset > 65_535) {
                return Err(Reason::CtInvalidHeader);
            }
            if !first && offset + length > end {
                return Err(Reason::TruncatedL4);
            }
        }
        protocol::SCTP => {
            let header = take::<12, B>(bytes, offset, end, short)?;
            ports(packet, [header[0], header[1], header[2], header[3]]);
        }
        protocol::ICMP | protocol::ICMPV6 => {
            let header = take::<8, B>(bytes, offset, end, short)?;
            packet.source_port = u16::from(header[0]);
            packet.destination_port = u16::from(header[1]);
            packet.echo_id = u16::from_be_bytes([header[4], header[5]]);
            packet.flags |= icmp_kind(ipv6, header[0]);
        }
        _ => {}
    }
    Ok(())
}

#[inline(always)]
fn ports(packet: &mut Packet, b: [u8; 4]) {
    packet.source_port = u16::from_be_bytes([b[0], b[1]]);
    packet.destination_port = u16::from_be_bytes([b[2], b[3]]);
}

/// Returns the [`flags`] of an ICMP or ICMPv6 message by its type. Redirect and source quench do not count as errors:
/// they change the behaviour of a host, so a rule must allow them (RFC 6633; RFC 4861, section 8.1).
#[inline(always)]
#[must_use]
pub const fn icmp_kind(ipv6: bool, kind: u8) -> u8 {
    if ipv6 {
        match kind {
            icmpv6::UNREACHABLE..=icmpv6::PARAMETER_PROBLEM => flags::ICMP_ERROR,
            icmpv6::ECHO_REQUEST => flags::ECHO_REQUEST,
            icmpv6::ECHO_REPLY => flags::ECHO_REPLY,
            _ => 0,
        }
    } else {
        match kind {
            icmp::UNREACHABLE | icmp::TIME_EXCEEDED | icmp::PARAMETER_PROBLEM => flags::ICMP_ERROR,
            icmp::ECHO_REQUEST => flags::ECHO_REQUEST,
            icmp::ECHO_REPLY => flags::ECHO_REPLY,
            _ => 0,
        }
    }
}
