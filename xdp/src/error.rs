//! ICMP errors about flows that are read.
//!
//! What such an error quotes is whatever its sender writes: a message of up to 576 bytes (1,280 over IPv6) in each. So
//! it is cut to what every error has to quote (RFC 792): the network header and eight bytes, which for TCP and UDP are
//! the ports, that are compared with the flow, and the sequence number or length and checksum, by which the receiver's
//! stack finds its socket. Path MTU discovery needs no more. The sequence number of TCP is compared by the worker
//! (`inspect::tcp::quote`).

use aya_ebpf::helpers::generated::bpf_csum_diff;
use palisade_abi::protocol;
use palisade_packet::{flags, icmp, icmpv6};

use crate::ctx::Context;
use crate::packet_context::PacketContext;

/// Bytes of an ICMP header, and quoted bytes behind the quoted network header.
const HEADER: u32 = 8;
/// "Fragmentation needed": a code of "destination unreachable" (RFC 1191).
const TOO_BIG: u16 = 4;

/// Adds up to the 16 bits of a checksum and complements.
#[inline(always)]
fn folded(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// Sums up memory of a multiple of four bytes.
#[inline(always)]
fn sum(words: *mut u32, length: u32, seed: u32) -> u64 {
    // SAFETY: callers pass memory of that length; the kernel's verifier checks it again.
    let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, words, length, seed) };
    sum as u64 & 0xffff_ffff
}

/// Cuts the error of `frame`, which quotes a packet of the flow `frame.key`. Returns 0 if that worked. What quotes
/// options or extension headers is not cut but refused, and so is a fragment.
#[inline(never)]
pub fn cut<C: Context>(ctx: C, frame: &mut PacketContext) -> u32 {
    let network = u32::from(frame.packet.network_offset);
    let transport = u32::from(frame.packet.transport_offset);
    let ipv6 = frame.packet.is(flags::IPV6);
    let quoted_header = if ipv6 { 40 } else { 20 };
    // The word with the header's length, or with the next header.
    let mut word = [0_u32; 1];
    if !ctx.load(transport + HEADER + if ipv6 { 4 } else { 0 }, &mut word) {
        return 1;
    }
    let bytes = word[0].to_ne_bytes();
    let plain = if ipv6 {
        bytes[2] == frame.key.protocol
    } else {
        bytes[0] == 0x45
    };
    if frame.packet.is(flags::FRAGMENT_FIRST) || !plain {
        return 1;
    }
    let message = HEADER + quoted_header + HEADER;
    let length = transport - network + message;
    if frame.packet.length < length {
        return 1;
    }
    let before = frame.packet.length;
    if !ctx.cut(network + length) {
        return 1;
    }
    frame.packet.length = length;
    if ipv6 {
        let mut stated = [u32::from(((length - 40) as u16).to_be())];
        if !ctx.store(network + 4, &mut stated, 2) {
            return 1;
        }
        return rewrite::<C, 14>(ctx, frame, transport);
    }
    let mut header = [0_u32; 3];
    if !ctx.load(network, &mut header) {
        return 1;
    }
    // RFC 1624, equation 3.
    let stated = |length: u32| u64::from((length as u16).to_be());
    let old = u64::from(!(header[2] >> 16) as u16);
    let sum = folded(old + (!stated(before) & 0xffff) + stated(length));
    let mut stated = [stated(length) as u32];
    let mut checksum = [u32::from(sum)];
    if !ctx.store(network + 2, &mut stated, 2) || !ctx.store(network + 10, &mut checksum, 2) {
        return 1;
    }
    rewrite::<C, 9>(ctx, frame, transport)
}

/// Makes the message of `WORDS` words at `transport` say what its type needs and no more, with its checksum.
#[inline(always)]
fn rewrite<C: Context, const WORDS: usize>(ctx: C, frame: &mut PacketContext, transport: u32) -> u32 {
    let length = 4 * WORDS as u32;
    let mut message = [0_u32; WORDS];
    if !ctx.load(transport, &mut message) {
        return 1;
    }
    let ipv6 = frame.packet.is(flags::IPV6);
    let (kind, code) = (frame.packet.source_port as u8, frame.packet.destination_port);
    // Of the second word: a next hop's MTU, a pointer; else it is unused (RFC 792, RFC 4443), or the length of
    // what is cut off (RFC 4884).
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
        // RFC 8200, 8.1. Both addresses stand one after the other.
        let addresses = (&raw mut frame.packet.source).cast::<u32>();
        total += sum(addresses, 16, 0) + sum(addresses.wrapping_add(4), 16, 0);
        total += u64::from(length.to_be()) + u64::from(u32::from(protocol::ICMPV6).to_be());
    }
    let checksum = folded(total).to_ne_bytes();
    message[0] |= u32::from_ne_bytes([0, 0, checksum[0], checksum[1]]);
    u32::from(!ctx.store(transport, &mut message, length))
}
