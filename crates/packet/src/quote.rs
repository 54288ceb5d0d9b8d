//! The packet that an ICMP error quotes: the fields that identify the flow of that packet.

use palisade_abi::{Addr, Reason, protocol};

use crate::bytes::{Bytes, take};
use crate::ip::{self, MAX_EXTENSIONS};
use crate::packet::{Packet, flags, is_icmp};
use crate::transport::{icmp, icmpv6};

/// Maximum length of an ICMP error, from the network header on, bytes (RFC 1812, section 4.3.2.3).
const MAX_ERROR_V4: u32 = 576;
/// Maximum length of an ICMPv6 error, from the network header on, bytes (RFC 4443, section 2.4).
const MAX_ERROR_V6: u32 = 1280;

/// Fields of the packet that an ICMP error quotes (RFC 792; RFC 4443, section 3).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Quote {
    /// Source address; a valid error is sent to this address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// Source port; 0 if the protocol has none.
    pub source_port: u16,
    /// Destination port; 0 if the protocol has none.
    pub destination_port: u16,
    /// Identifier of an ICMP echo message.
    pub echo_id: u16,
    /// IP protocol.
    pub protocol: u8,
    /// [`flags::ECHO_REQUEST`] or [`flags::ECHO_REPLY`], or 0.
    pub flags: u8,
}

/// Decodes the packet that an ICMP error quotes into `quote`, which must be [`Quote::default`].
///
/// # Errors
/// [`Reason::UnrelatedIcmp`] if the error is too long, or if the quoted packet identifies no flow, for example because
/// it is a later fragment. [`Reason::InvalidIpv6Extension`] or [`Reason::TruncatedL3`] if the extension headers of the
/// quoted packet are invalid. [`Reason::PullFailed`] as in [`crate::decode`].
#[inline(always)]
pub fn decode_quote<B: Bytes + ?Sized>(bytes: &B, packet: &Packet, quote: &mut Quote) -> Result<(), Reason> {
    let short = Reason::UnrelatedIcmp;
    let end = packet.end();
    let longest = if packet.is(flags::IPV6) {
        MAX_ERROR_V6
    } else {
        MAX_ERROR_V4
    };
    if packet.length > longest {
        return Err(short);
    }
    let mut offset = u32::from(packet.transport_offset) + 8;
    let ipv6 = packet.is(flags::IPV6);
    if ipv6 {
        let header = take::<40, B>(bytes, offset, end, short)?;
        quote.source = ip::v6_addr::<B>(header, 8);
        quote.destination = ip::v6_addr::<B>(header, 24);
        quote.protocol = header[6];
        if header[0] >> 4 != 6 {
            return Err(short);
        }
        offset += 40;
        let mut chain = ip::Chain::new(quote.protocol, offset);
        for position in 0..MAX_EXTENSIONS {
            if !ip::is_extension(chain.next) {
                break;
            }
            chain.step(bytes, end, position)?;
        }
        if ip::is_extension(chain.next) || chain.fragment_offset() != 0 {
            return Err(short);
        }
        quote.protocol = chain.next;
        offset = u32::from(chain.offset);
    } else {
        let header = take::<20, B>(bytes, offset, end, short)?;
        quote.source = ip::v4_addr::<B>(header, 12);
        quote.destination = ip::v4_addr::<B>(header, 16);
        quote.protocol = header[9];
        let header_length = u32::from(header[0] & 15) * 4;
        let fragment_offset = u16::from_be_bytes([header[6], header[7]]) & 0x1fff;
        if header[0] >> 4 != 4 || header_length < 20 || fragment_offset != 0 {
            return Err(short);
        }
        offset += header_length;
    }
    match quote.protocol {
        protocol::TCP | protocol::UDP | protocol::SCTP => {
            // An error quotes at least eight bytes of the transport header (RFC 792). Linux ignores a shorter quote.
            let b = take::<8, B>(bytes, offset, end, short)?;
            quote.source_port = u16::from_be_bytes([b[0], b[1]]);
            quote.destination_port = u16::from_be_bytes([b[2], b[3]]);
        }
        p if is_icmp(p, ipv6) => {
            let b = take::<8, B>(bytes, offset, end, short)?;
            quote.echo_id = u16::from_be_bytes([b[4], b[5]]);
            quote.flags = match (ipv6, b[0]) {
                (false, icmp::ECHO_REQUEST) | (true, icmpv6::ECHO_REQUEST) => flags::ECHO_REQUEST,
                (false, icmp::ECHO_REPLY) | (true, icmpv6::ECHO_REPLY) => flags::ECHO_REPLY,
                _ => return Err(short),
            };
        }
        _ => {}
    }
    Ok(())
}
