//! IPv4 with options, IPv6 with extension headers. Rejects source routes, which send the packet to an address other
//! than the one that the policy has checked, and headers that receivers could interpret differently.

use palisade_abi::{Addr, Reason};

use crate::bytes::{Bytes, MAX_HEADERS, take};
use crate::packet::{Packet, flags};
use crate::{fragment, transport};

/// Maximum number of IPv6 extension headers in one packet.
pub const MAX_EXTENSIONS: u32 = 8;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

/// Types of routing headers that are accepted if no segments are left: source route (deprecated by RFC 5095), mobility
/// (RFC 6275), RPL (RFC 6554), segment routing (RFC 8754).
const ROUTING_TYPES: [u8; 4] = [0, 2, 3, 4];

/// IPv4 options (RFC 791, section 3.1).
mod option {
    pub(super) const END: u8 = 0;
    pub(super) const NO_OPERATION: u8 = 1;
    pub(super) const LOOSE_SOURCE_ROUTE: u8 = 131;
    pub(super) const STRICT_SOURCE_ROUTE: u8 = 137;
    /// Maximum number of options in a header. A header could hold forty options of one byte; real headers hold one or
    /// two, and padding to a multiple of four bytes.
    pub(super) const MAX: u32 = 12;
}

#[inline(always)]
pub(crate) fn v4_addr<B: Bytes + ?Sized>(header: &[u8; 20], at: usize) -> Addr {
    Addr::from_v4_word(B::word(header, at))
}

#[inline(always)]
pub(crate) fn v6_addr<B: Bytes + ?Sized>(header: &[u8; 40], at: usize) -> Addr {
    Addr([
        B::word(header, at),
        B::word(header, at + 4),
        B::word(header, at + 8),
        B::word(header, at + 12),
    ])
}

#[inline(always)]
pub(crate) fn decode_v4<B: Bytes + ?Sized>(bytes: &B, packet: &mut Packet) -> Result<(), Reason> {
    let offset = u32::from(packet.network_offset);
    let available = bytes.len().saturating_sub(offset);
    packet.length = available;
    let header = take::<20, B>(bytes, offset, bytes.len(), Reason::TruncatedL3)?;
    packet.source = v4_addr::<B>(header, 12);
    packet.destination = v4_addr::<B>(header, 16);
    packet.protocol = header[9];
    packet.hop_limit = header[8];
    let header_length = u32::from(header[0] & 15) * 4;
    let total = stated_length(u32::from(u16::from_be_bytes([header[2], header[3]])), available);
    if header[0] >> 4 != 4 || header_length < 20 || total < header_length || total > available {
        return Err(Reason::InvalidIpv4);
    }
    packet.length = total;
    packet.transport_offset = (offset + header_length) as u16;
    if header_length > 20 {
        let mut options = Options {
            zero: 0,
            offset: (offset + 20) as u16,
        };
        for _ in 0..option::MAX {
            if u32::from(options.offset) >= offset + header_length {
                break;
            }
            options.step(bytes, offset + header_length)?;
        }
        if u32::from(options.offset) < offset + header_length {
            return Err(Reason::InvalidIpv4);
        }
    }
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
    packet.source = v6_addr::<B>(header, 8);
    packet.destination = v6_addr::<B>(header, 24);
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
    // An IPv4-mapped address is not valid in a header on the wire (RFC 4291, section 2.5.5.2; RFC 6890). The maps would
    // treat it as the IPv4 address.
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

/// Returns the length of the packet according to the length field of its header. A super-frame of more than 65,535
/// bytes (BIG TCP) has 0 in the field, and the packet fills the frame.
#[inline(always)]
fn stated_length(stated: u32, available: u32) -> u32 {
    if stated == 0 && available > 65_535 {
        available
    } else {
        stated
    }
}

/// Returns whether a next-header value is an extension header that the decoder follows, as `ipv6_skip_exthdr` of Linux
/// does. IANA's registry also lists mobility (135), HIP (139) and shim6 (140). Linux treats these as upper-layer
/// protocols and looks for no transport header after them.
#[inline(always)]
pub(crate) const fn is_extension(next: u8) -> bool {
    matches!(
        next,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION
    )
}

/// Position in the options of an IPv4 header. The state is in memory and each step is a call, as in [`Chain`].
#[repr(C, align(8))]
struct Options {
    zero: u16,
    /// Offset of the next option in the frame, bytes.
    offset: u16,
}

impl Options {
    /// Skips the option at `offset` in a header that ends at `end`. Rejects a source route, which sends the packet to
    /// an address other than the destination that the policy has checked. Rejects an option that exceeds the header, as
    /// `__ip_options_compile` of Linux does.
    #[inline(never)]
    fn step<B: Bytes + ?Sized>(&mut self, bytes: &B, end: u32) -> Result<(), Reason> {
        let offset = u32::from(self.offset);
        // The read includes the byte before the option, because the verifier derives no bound from the comparison for a
        // single byte (docs/VERIFIER.md).
        let kind = take::<2, B>(bytes, offset - 1, end, Reason::InvalidIpv4)?[1];
        let length = match kind {
            option::END => end - offset,
            option::NO_OPERATION => 1,
            option::LOOSE_SOURCE_ROUTE | option::STRICT_SOURCE_ROUTE => return Err(Reason::InvalidIpv4),
            _ => {
                let length = u32::from(take::<2, B>(bytes, offset, end, Reason::InvalidIpv4)?[1]);
                if length < 2 || offset + length > end {
                    return Err(Reason::InvalidIpv4);
                }
                length
            }
        };
        self.offset = (offset + length) as u16;
        Ok(())
    }
}

/// Position in a chain of extension headers.
///
/// The state is in memory and each step is a call, so the verifier checks each step by itself; otherwise it would
/// follow every sequence of headers to its end. The verifier forgets most values that are stored at an offset other
/// than a multiple of eight; the field `zero` gives `offset`, `next`, `fragments` and `fragment` such offsets, so the
/// verifier has fewer states to tell apart.
#[repr(C, align(8))]
#[derive(Default)]
pub(crate) struct Chain {
    zero: u16,
    /// Offset of the next header in the frame, bytes.
    pub offset: u16,
    /// Type of the next header.
    pub next: u8,
    /// Number of fragment headers so far.
    pub fragments: u8,
    /// Fragment offset, bytes, and in bit 0 the more-fragments flag; 0 without a fragment header.
    pub fragment: u16,
    /// Identification field of the fragment header.
    pub id: u32,
}

impl Chain {
    #[inline(always)]
    pub(crate) fn new(next: u8, offset: u32) -> Self {
        Self {
            next,
            offset: offset as u16,
            ..Self::default()
        }
    }

    /// Returns the fragment offset, bytes; 0 for a first fragment and for a whole packet.
    #[inline(always)]
    pub(crate) const fn fragment_offset(&self) -> u32 {
        (self.fragment & 0xfff8) as u32
    }

    /// Returns whether more fragments follow.
    #[inline(always)]
    const fn more(&self) -> bool {
        self.fragment & 1 != 0
    }

    /// Skips the header at `offset` in a packet that ends at `end`. `position`: number of extension headers before that
    /// header.
    #[inline(never)]
    pub(crate) fn step<B: Bytes + ?Sized>(
        &mut self,
        bytes: &B,
        end: u32,
        position: u32,
    ) -> Result<(), Reason> {
        let offset = u32::from(self.offset);
        if offset > MAX_HEADERS - 64 {
            return Err(Reason::InvalidIpv6Extension);
        }
        let kind = self.next;
        // Hop-by-hop options are valid only as the first extension header (RFC 8200, section 4.1).
        if kind == HOP_BY_HOP && position != 0 {
            return Err(Reason::InvalidIpv6Extension);
        }
        let header = take::<8, B>(bytes, offset, end, Reason::TruncatedL3)?;
        let length = match kind {
            FRAGMENT => 8,
            AUTHENTICATION => (u32::from(header[1]) + 2) * 4,
            _ => (u32::from(header[1]) + 1) * 8,
        };
        // If segments are left, the node at the destination address sends the packet on to another address, which the
        // policy has not checked (RFC 8200, section 4.4; RFC 5095 for type 0). A receiver could do the same for a type
        // that the decoder does not know.
        if kind == ROUTING && (header[3] != 0 || !ROUTING_TYPES.contains(&header[2])) {
            return Err(Reason::InvalidIpv6Extension);
        }
        if kind == FRAGMENT {
            self.fragments += 1;
            self.fragment = u16::from_be_bytes([header[2], header[3]]) & 0xfff9;
            self.id = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        }
        self.next = header[0];
        self.offset = (offset + length) as u16;
        if offset + length > end {
            return Err(Reason::TruncatedL3);
        }
        Ok(())
    }
}

/// Follows the extension headers to the transport header.
#[inline(always)]
fn extensions<B: Bytes + ?Sized>(bytes: &B, packet: &mut Packet) -> Result<(), Reason> {
    let end = packet.end();
    let mut chain = Chain::new(packet.protocol, u32::from(packet.transport_offset));
    for position in 0..MAX_EXTENSIONS {
        if !is_extension(chain.next) || chain.fragment_offset() != 0 {
            break;
        }
        if let Err(reason) = chain.step(bytes, end, position) {
            // A first fragment must hold all headers (RFC 7112).
            let cut = reason == Reason::TruncatedL3 && chain.more();
            return Err(if cut { Reason::InvalidFragment } else { reason });
        }
    }
    packet.protocol = chain.next;
    packet.transport_offset = chain.offset;
    // Fragment offset 0 without more fragments is an atomic fragment: a whole packet (RFC 6946).
    if chain.fragment != 0 {
        let payload = end - u32::from(chain.offset);
        fragment::note(
            packet,
            chain.id,
            chain.next,
            chain.fragment_offset(),
            chain.more(),
            payload,
        )?;
        if chain.fragment_offset() != 0 {
            return if chain.fragments > 1 {
                Err(Reason::InvalidIpv6Extension)
            } else {
                Ok(())
            };
        }
    }
    if is_extension(chain.next) || chain.fragments > 1 || u32::from(chain.offset) > MAX_HEADERS - 64 {
        return Err(Reason::InvalidIpv6Extension);
    }
    Ok(())
}
