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

/// Lowers the window field of a TCP segment to `window`, and corrects its complete checksum by the difference (RFC 1624).
/// Does nothing if the field has this value or a lower one, or if the segment has no whole TCP header.
pub fn limit_window(segment: &mut [u8], window: u16) {
    let Some(header) = segment.first_chunk_mut::<20>() else {
        return;
    };
    let old = u16::from_be_bytes([header[14], header[15]]);
    if old <= window {
        return;
    }
    let checksum = u16::from_be_bytes([header[16], header[17]]);
    let sum = Sum::default()
        .add(&(!checksum).to_be_bytes())
        .add(&(!old).to_be_bytes())
        .add(&window.to_be_bytes());
    header[14..16].copy_from_slice(&window.to_be_bytes());
    header[16..18].copy_from_slice(&(!sum.fold()).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lowered_window_has_a_valid_checksum() {
        for seed in 0..2_000_u32 {
            let mut segment: Vec<u8> = (0..20_u32)
                .map(|at| (seed.wrapping_mul(0x9e37_79b1).rotate_left(at) ^ (at * seed)) as u8)
                .collect();
            segment[16..18].fill(0);
            let sum = !Sum::default().add(&segment).fold();
            segment[16..18].copy_from_slice(&sum.to_be_bytes());
            let before = segment.clone();
            let old = u16::from_be_bytes([before[14], before[15]]);
            let window = (seed * 37) as u16;
            limit_window(&mut segment, window);
            assert_eq!(Sum::default().add(&segment).fold(), 0xffff, "{seed}");
            assert_eq!(u16::from_be_bytes([segment[14], segment[15]]), old.min(window));
            if old <= window {
                assert_eq!(segment, before);
            }
            assert_eq!((&segment[..14], &segment[18..]), (&before[..14], &before[18..]));
        }
        limit_window(&mut [0; 19], 0);
        limit_window(&mut [], 0);
    }
}
