use palisade_abi::{Addr, Reason};

use crate::{Bytes, MAX_EXTENSIONS, MAX_HEADERS, Packet, flags, fragment, take, transport};

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
const MOBILITY: u8 = 135;
const HOST_IDENTITY: u8 = 139;
const SHIM6: u8 = 140;

#[inline(always)]
pub(crate) fn v4_addr(b: &[u8; 20], at: usize) -> Addr {
    Addr::from_v4([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

#[inline(always)]
pub(crate) fn v6_addr(b: &[u8; 40], at: usize) -> Addr {
    Addr([
        u32::from_ne_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]),
        u32::from_ne_bytes([b[at + 4], b[at + 5], b[at + 6], b[at + 7]]),
        u32::from_ne_bytes([b[at + 8], b[at + 9], b[at + 10], b[at + 11]]),
        u32::from_ne_bytes([b[at + 12], b[at + 13], b[at + 14], b[at + 15]]),
    ])
}

#[inline(always)]
pub(crate) fn decode_v4<B: Bytes + ?Sized>(bytes: &B, packet: &mut Packet) -> Result<(), Reason> {
    let offset = u32::from(packet.network_offset);
    let available = bytes.len().saturating_sub(offset);
    packet.length = available;
    let header = take::<20, B>(bytes, offset, bytes.len(), Reason::TruncatedL3)?;
    packet.source = v4_addr(header, 12);
    packet.destination = v4_addr(header, 16);
    packet.protocol = header[9];
    packet.hop_limit = header[8];
    let header_length = u32::from(header[0] & 15) * 4;
    let total = stated_length(u32::from(u16::from_be_bytes([header[2], header[3]])), available);
    if header[0] >> 4 != 4 || header_length < 20 || total < header_length || total > available {
        return Err(Reason::InvalidIpv4);
    }
    packet.length = total;
    packet.transport_offset = (offset + header_length) as u16;
    let fragment = u32::from(u16::from_be_bytes([header[6], header[7]]));
    let (more, fragment_offset) = (fragment & 0x2000 != 0, (fragment & 0x1fff) * 8);
    if more || fragment_offset != 0 {
        let id = u32::from(u16::from_be_bytes([header[4], header[5]]));
        fragment::note(
            packet,
            id,
            header[9],
            fragment_offset,
            more,
            total - header_length,
        )?;
    }
    transport::decode(bytes, packet)
}

#[inline(always)]
pub(crate) fn decode_v6<B: Bytes + ?Sized>(bytes: &B, packet: &mut Packet) -> Result<(), Reason> {
    packet.flags = flags::IPV6;
    let offset = u32::from(packet.network_offset);
    let available = bytes.len().saturating_sub(offset);
    packet.length = available;
    let header = take::<40, B>(bytes, offset, bytes.len(), Reason::TruncatedL3)?;
    packet.source = v6_addr(header, 8);
    packet.destination = v6_addr(header, 24);
    packet.protocol = header[6];
    packet.hop_limit = header[7];
    let stated = u32::from(u16::from_be_bytes([header[4], header[5]]));
    let total = if stated == 0 {
        stated_length(0, available).max(40)
    } else {
        stated + 40
    };
    if header[0] >> 4 != 6 || total > available {
        return Err(Reason::InvalidIpv6);
    }
    // An IPv4-mapped address never stands in a header on the wire (RFC 4291, 2.5.5.2; RFC 6890). Here it would
    // be taken for the IPv4 address.
    if packet.source.is_v4() || packet.destination.is_v4() {
        return Err(Reason::InvalidIpv6);
    }
    packet.length = total;
    packet.transport_offset = (offset + 40) as u16;
    if is_extension(header[6]) {
        extensions(bytes, packet)?;
    }
    transport::decode(bytes, packet)
}

/// The length that a header states. A super-frame of more than 65,535 bytes (BIG TCP) cannot state it and says
/// 0; every other header means what it says.
#[inline(always)]
fn stated_length(stated: u32, available: u32) -> u32 {
    if stated == 0 && available > 65_535 {
        available
    } else {
        stated
    }
}

/// Whether a next-header value is an extension header that is followed (RFC 8200, 4.1; the IANA registry).
#[inline(always)]
pub(crate) const fn is_extension(next: u8) -> bool {
    matches!(
        next,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION | MOBILITY | HOST_IDENTITY | SHIM6
    )
}

/// One extension header.
pub(crate) struct Extension {
    /// What follows it.
    pub next: u8,
    /// Where that starts.
    pub offset: u32,
    /// Offset in bytes, more-fragments bit and identification, if it is a fragment header.
    pub fragment: Option<(u32, bool, u32)>,
}

/// Reads the extension header of kind `kind` at `offset`.
#[inline(always)]
pub(crate) fn extension<B: Bytes + ?Sized>(
    bytes: &B,
    kind: u8,
    offset: u32,
    end: u32,
    short: Reason,
) -> Result<Extension, Reason> {
    if offset > MAX_HEADERS - 64 {
        return Err(Reason::InvalidIpv6Extension);
    }
    let header = take::<8, B>(bytes, offset, end, short)?;
    let length = match kind {
        FRAGMENT => 8,
        AUTHENTICATION => (u32::from(header[1]) + 2) * 4,
        _ => (u32::from(header[1]) + 1) * 8,
    };
    // A routing header of type 0 sends the packet somewhere else than its destination says: RFC 5095.
    if kind == ROUTING && header[2] == 0 && header[3] != 0 {
        return Err(Reason::InvalidIpv6Extension);
    }
    let fragment = if kind == FRAGMENT {
        let field = u32::from(u16::from_be_bytes([header[2], header[3]]));
        let id = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        Some((field & 0xfff8, field & 1 != 0, id))
    } else {
        None
    };
    Ok(Extension {
        next: header[0],
        offset: offset + length,
        fragment,
    })
}

/// Follows the extension headers to the transport header.
#[inline(always)]
fn extensions<B: Bytes + ?Sized>(bytes: &B, packet: &mut Packet) -> Result<(), Reason> {
    let end = packet.end();
    let mut next = packet.protocol;
    let mut offset = u32::from(packet.transport_offset);
    let mut short = Reason::TruncatedL3;
    let mut fragmented = false;
    for position in 0..MAX_EXTENSIONS {
        // Hop-by-hop options come first or not at all (RFC 8200, 4.1).
        if next == HOP_BY_HOP {
            if position != 0 {
                return Err(Reason::InvalidIpv6Extension);
            }
            packet.flags |= flags::HOP_BY_HOP;
        }
        let header = extension(bytes, next, offset, end, short)?;
        next = header.next;
        offset = header.offset;
        packet.protocol = next;
        if offset > end {
            return Err(short);
        }
        if let Some((fragment_offset, more, id)) = header.fragment {
            if fragmented {
                return Err(Reason::InvalidIpv6Extension);
            }
            fragmented = true;
            // Offset 0 and no more to come: a whole packet with a fragment header (RFC 6946).
            if more || fragment_offset != 0 {
                short = Reason::InvalidFragment;
                packet.transport_offset = offset as u16;
                fragment::note(packet, id, next, fragment_offset, more, end - offset)?;
                if fragment_offset != 0 {
                    return Ok(());
                }
            }
        }
        if !is_extension(next) {
            if offset > MAX_HEADERS - 64 {
                return Err(Reason::InvalidIpv6Extension);
            }
            packet.transport_offset = offset as u16;
            return Ok(());
        }
    }
    Err(Reason::InvalidIpv6Extension)
}
