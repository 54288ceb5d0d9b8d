//! Checksums of punted packets. A transport checksum that the local sender left to its device is completed; other
//! checksums are verified, except those that [`complete_or_verify`] lists.
//!
//! [`palisade_packet::checksum`] computes the sums.

use palisade_abi::{Reason, protocol};
use palisade_packet::{Packet, checksum::Sum, flags};

/// Verifies the IPv4 header checksum of a frame, and completes or verifies its TCP or UDP checksum. The transport
/// checksums of fragments and of other protocols are not verified, and a UDP datagram over IPv4 can be without a
/// checksum.
///
/// # Errors
/// A checksum is wrong, or a mandatory checksum is missing. The receiver will discard the packet, so inspecting it
/// would allow an insertion attack: the inspector would process bytes that the receiver ignores.
pub fn complete_or_verify(frame: &mut [u8], packet: &Packet) -> Result<(), Reason> {
    let network = usize::from(packet.network_offset);
    let transport = usize::from(packet.transport_offset);
    let end = network + packet.length as usize;
    let ipv6 = packet.is(flags::IPV6);
    if !ipv6 {
        let header = frame.get(network..transport).filter(|header| header.len() >= 20);
        if header.is_none_or(|header| Sum::default().add(header).fold() != 0xffff) {
            return Err(Reason::InvalidIpv4);
        }
    }
    if packet.is(flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER) {
        return Ok(());
    }
    let (at, length) = match packet.protocol {
        protocol::TCP => (16, end.saturating_sub(transport)),
        protocol::UDP => {
            let stated = frame.get(transport + 4..).and_then(<[u8]>::first_chunk);
            (
                6,
                stated.map_or(0, |bytes| usize::from(u16::from_be_bytes(*bytes))),
            )
        }
        _ => return Ok(()),
    };
    let addresses = if ipv6 {
        network + 8..network + 40
    } else {
        network + 12..network + 20
    };
    // The decoder has checked these lengths, so this error does not occur; it is returned instead of a panic.
    let malformed = Reason::TruncatedL4;
    let pseudo = Sum::default()
        .add(frame.get(addresses).ok_or(malformed)?)
        .add_pseudo_tail(packet.protocol, length);
    let segment = frame.get_mut(transport..transport + length).ok_or(malformed)?;
    let field = segment.get(at..).and_then(<[u8]>::first_chunk);
    let field = u16::from_be_bytes(*field.ok_or(malformed)?);
    if field == 0 && packet.protocol == protocol::UDP {
        // Only UDP over IPv4 may omit the checksum (RFC 768; RFC 8200, section 8.1).
        return if ipv6 { Err(Reason::BadChecksum) } else { Ok(()) };
    }
    if field == pseudo.fold() {
        // CHECKSUM_PARTIAL: the kernel has left the checksum to the device and has written only the sum of the pseudo
        // header. AF_XDP does not pass `skb->ip_summed`, so the value is the only sign. One valid checksum in 65,536
        // has this value by chance; completing that checksum gives the same value again.
        let complete = match !Sum::default().add(segment).fold() {
            0 if packet.protocol == protocol::UDP => 0xffff,
            complete => complete,
        };
        let field = segment.get_mut(at..).and_then(<[u8]>::first_chunk_mut);
        *field.ok_or(malformed)? = complete.to_be_bytes();
        return Ok(());
    }
    if pseudo.add(segment).fold() == 0xffff {
        Ok(())
    } else {
        Err(Reason::BadChecksum)
    }
}
