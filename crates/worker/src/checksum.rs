//! Transport checksums: completed where a local sender left that to its device, verified everywhere else.

use palisade_abi::{Reason, protocol};
use palisade_packet::{Packet, flags};

/// The ones' complement sum of RFC 1071, not folded. Machine order: folded, it is what stands in memory.
fn sum(bytes: &[u8]) -> u64 {
    let mut total: u64 = 0;
    let words = bytes.chunks_exact(4);
    let rest = words.remainder();
    for word in words {
        // A frame is far too short for 2^32 of them.
        total += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
    }
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    total + u64::from(u32::from_ne_bytes(last))
}

/// Folds a sum of [`sum`]s to sixteen bits.
const fn fold(mut total: u64) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// Whether the header of an IPv4 packet has a right checksum: who receives it will look.
fn ipv4_header(header: &[u8]) -> bool {
    fold(sum(header)) == 0xffff
}

/// Sees to the checksums of a frame: afterwards they are right, or nobody can know (fragments, protocols that have
/// none, UDP over IPv4 without one).
///
/// # Errors
/// The receiver would drop the packet. Or somebody says so who wants only us to read it.
pub fn settle(frame: &mut [u8], packet: &Packet) -> Result<(), Reason> {
    let network = usize::from(packet.network_offset);
    let transport = usize::from(packet.transport_offset);
    let end = network + packet.length as usize;
    let ipv6 = packet.is(flags::IPV6);
    if !ipv6
        && !frame
            .get(network..transport)
            .is_some_and(|header| header.len() >= 20 && ipv4_header(header))
    {
        return Err(Reason::InvalidIpv4);
    }
    if packet.is(flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER) {
        return Ok(());
    }
    let (at, length) = match packet.protocol {
        protocol::TCP => (16, end.saturating_sub(transport)),
        protocol::UDP => {
            let stated = frame.get(transport + 4..transport + 6);
            let stated = stated.map_or(0, |bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
            (6, usize::from(stated))
        }
        _ => return Ok(()),
    };
    let addresses = if ipv6 {
        network + 8..network + 40
    } else {
        network + 12..network + 20
    };
    // The decoder has seen to all of this.
    let malformed = Reason::TruncatedL4;
    let length_sum = u64::from((length as u32).to_be());
    let pseudo = sum(frame.get(addresses).ok_or(malformed)?)
        + length_sum
        + u64::from(u16::from(packet.protocol).to_be());
    let segment = frame.get_mut(transport..transport + length).ok_or(malformed)?;
    let field = segment.get(at..at + 2).ok_or(malformed)?;
    let field = u16::from_ne_bytes([field[0], field[1]]);
    if field == 0 && packet.protocol == protocol::UDP {
        // Only over IPv4 may it be missing (RFC 768; RFC 8200, 8.1).
        return if ipv6 { Err(Reason::BadChecksum) } else { Ok(()) };
    }
    if field == fold(pseudo) {
        // Nothing says that a checksum is unfinished but that it is the sum of the pseudo header alone. One in 65,536
        // finished ones is, too, and comes out of this as it went in.
        let complete = match !fold(sum(segment)) {
            0 if packet.protocol == protocol::UDP => 0xffff,
            complete => complete,
        };
        segment[at..at + 2].copy_from_slice(&complete.to_ne_bytes());
        return Ok(());
    }
    if fold(pseudo + sum(segment)) == 0xffff {
        Ok(())
    } else {
        Err(Reason::BadChecksum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_rfc_1071() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&bytes)).to_ne_bytes(), [0xdd, 0xf2]);
    }

    #[test]
    fn odd_bytes_count_as_if_a_zero_followed() {
        for length in 0..40 {
            let bytes: Vec<u8> = (0..length).map(|n: u8| n.wrapping_mul(37) ^ 0x5a).collect();
            let mut padded = bytes.clone();
            padded.resize(bytes.len().next_multiple_of(2), 0);
            let plain = padded.chunks(2).fold(0u64, |total, pair| {
                total + u64::from(u16::from_be_bytes([pair[0], pair[1]]))
            });
            assert_eq!(fold(sum(&bytes)).to_be(), fold(plain), "{length}");
        }
    }
}
