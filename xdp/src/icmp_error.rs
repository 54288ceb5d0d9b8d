//! ICMP errors about inspected flows.
//!
//! The sender of an error chooses the quoted bytes, so an error could carry data past the inspector: up to 576 bytes,
//! or 1,280 over IPv6. [`cut`] truncates the error to the quote that RFC 792 requires, the network header and eight
//! bytes. These eight bytes are the ports, which are compared with the flow, and for TCP the sequence number, for UDP
//! length and checksum. Path MTU discovery needs no more. The worker compares the TCP sequence number
//! (`inspect::tcp::quote`).

use aya_ebpf::helpers::generated::bpf_csum_diff;
use palisade_abi::protocol;
use palisade_packet::{flags, icmp, icmpv6};

use crate::hook::Hook;
use crate::packet_context::PacketContext;

/// Length of an ICMP header, and of the quote after the quoted network header, bytes.
const HEADER: u32 = 8;
/// The code "fragmentation needed" of the type "destination unreachable" (RFC 1191).
const TOO_BIG: u16 = 4;

/// Folds a sum to 16 bits and returns its complement: the checksum (RFC 1071).
#[inline(always)]
fn folded(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// Returns the ones' complement sum of `seed` and the `length` bytes at `words`. `length` is a multiple of four.
#[inline(always)]
fn sum(words: *mut u32, length: u32, seed: u32) -> u64 {
    // SAFETY: callers pass memory of `length` bytes, and the verifier checks it again.
    let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, words, length, seed) };
    sum as u64 & 0xffff_ffff
}

/// Truncates an ICMP error that quotes a packet of the flow `pkt.key`. Returns 0 on success, and 1 on failure, for
/// example if the error is a fragment.
#[inline(never)]
pub fn cut<H: Hook>(ctx: H, pkt: &mut PacketContext) -> u32 {
    let network = u32::from(pkt.headers.network_offset);
    let transport = u32::from(pkt.headers.transport_offset);
    let ipv6 = pkt.headers.is(flags::IPV6);
    let quoted_header = if ipv6 { 40 } else { 20 };
    // IPv4: the word with the length of the quoted header. IPv6: the word with the next-header field of the quoted
    // header.
    let mut word = [0_u32; 1];
    if !ctx.load(transport + HEADER + if ipv6 { 4 } else { 0 }, &mut word) {
        return 1;
    }
    let bytes = word[0].to_ne_bytes();
    let plain = if ipv6 {
        bytes[2] == pkt.key.protocol
    } else {
        bytes[0] == 0x45
    };
    if pkt.headers.is(flags::FRAGMENT_FIRST) || !plain {
        return 1;
    }
    let message = HEADER + quoted_header + HEADER;
    let length = transport - network + message;
    if pkt.headers.length < length {
        return 1;
    }
    let before = pkt.headers.length;
    if !ctx.cut(network + length) {
        return 1;
    }
    pkt.headers.length = length;
    if ipv6 {
        let mut stated = [u32::from(((length - 40) as u16).to_be())];
        if !ctx.store(network + 4, &mut stated, 2) {
            return 1;
        }
        return rewrite::<H, 14>(ctx, pkt, transport);
    }
    let mut header = [0_u32; 3];
    if !ctx.load(network, &mut header) {
        return 1;
    }
    // Update the header checksum for the new length (RFC 1624, equation 3).
    let stated = |length: u32| u64::from((length as u16).to_be());
    let old = u64::from(!(header[2] >> 16) as u16);
    let sum = folded(old + (!stated(before) & 0xffff) + stated(length));
    let mut stated = [stated(length) as u32];
    let mut checksum = [u32::from(sum)];
    if !ctx.store(network + 2, &mut stated, 2) || !ctx.store(network + 10, &mut checksum, 2) {
        return 1;
    }
    rewrite::<H, 9>(ctx, pkt, transport)
}

/// Clears the bits of the ICMP header at `transport` that the type of the message does not use, and sets the checksum.
/// `WORDS`: length of the message in words of 32 bits.
#[inline(always)]
fn rewrite<H: Hook, const WORDS: usize>(ctx: H, pkt: &mut PacketContext, transport: u32) -> u32 {
    let length = 4 * WORDS as u32;
    let mut message = [0_u32; WORDS];
    if !ctx.load(transport, &mut message) {
        return 1;
    }
    let ipv6 = pkt.headers.is(flags::IPV6);
    let (kind, code) = (pkt.headers.source_port as u8, pkt.headers.destination_port);
    // The second word holds an MTU or a pointer, or it is unused (RFC 792, RFC 4443). The length field of RFC 4884 is
    // cleared, because it describes bytes that were cut off.
    let used = match kind {
        icmpv6::PACKET_TOO_BIG | icmpv6::PARAMETER_PROBLEM if ipv6 => [0xff; 4],
        icmp::UNREACHABLE if !ipv6 && code == TOO_BIG => [0, 0, 0xff, 0xff],
        icmp::PARAMETER_PROBLEM if !ipv6 => [0xff, 0, 0, 0],
        _ => [0; 4],
    };
    message[1] &= u32::from_ne_bytes(used);
    message[0] &= u32::from_ne_bytes([0xff, 0xff, 0, 0]);
    let mut total = sum(message.as_mut_ptr(), length, 0);
    if ipv6 {
        // The pseudo header (RFC 8200, section 8.1). `source` and `destination` are adjacent fields.
        let addresses = (&raw mut pkt.headers.source).cast::<u32>();
        total += sum(addresses, 16, 0) + sum(addresses.wrapping_add(4), 16, 0);
        total += u64::from(length.to_be()) + u64::from(u32::from(protocol::ICMPV6).to_be());
    }
    let checksum = folded(total).to_ne_bytes();
    message[0] |= u32::from_ne_bytes([0, 0, checksum[0], checksum[1]]);
    u32::from(!ctx.store(transport, &mut message, length))
}
