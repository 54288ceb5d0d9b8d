//! Copies of packets for a capture.
//!
//! The code is only in the object that is built with the feature `capture`; the daemon attaches its programs while a
//! capture runs. [`take`] copies a packet before a program changes it, [`report`] adds the verdict and writes both to
//! the ring. `palisade_abi::capture` describes the record.

use core::hint::black_box;

use aya_ebpf::helpers::generated::bpf_get_smp_processor_id;
use palisade_abi::{
    CaptureCondition, CaptureHeader, CaptureSettings, EventKind, MAX_CAPTURED, Reason, TracePoint,
    capture_flags, captured_flags, event_flags,
};
use palisade_packet::Bytes as _;

use crate::conntrack;
use crate::event;
use crate::hook::Hook;
use crate::maps::capture::{Buffer, CAPTURE, CAPTURE_BUFFERS, CAPTURE_LOST, CAPTURED};
use crate::packet_context::PacketContext;

/// Returns the buffer of this CPU.
#[inline(always)]
fn buffer() -> Option<*mut Buffer> {
    // SAFETY: the helper has no parameters and changes nothing.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    CAPTURE_BUFFERS.get_ptr_mut(cpu)
}

/// Copies the packet into the buffer of this CPU, unless the buffer has it already or the settings exclude the packet.
#[inline(always)]
pub fn take<H: Hook>(ctx: H, pkt: &mut PacketContext) {
    let Some(settings) = CAPTURE.get(0) else { return };
    if pkt.captured || settings.until <= pkt.now || !is_wanted(settings, pkt) {
        return;
    }
    let Some(buffer) = buffer() else { return };
    let frame_length = ctx.bytes(true).len();
    if frame_length == 0 {
        return;
    }
    let mut length = settings.snap_length;
    if length > frame_length {
        length = frame_length;
    }
    let (vlan_tci, vlan_protocol) = ctx.removed_tag();
    let mut flags = 0;
    if pkt.layer3 != 0 {
        flags |= captured_flags::LAYER3;
    }
    // SAFETY: `buffer` points to a value of a map, which lives as long as the map. Only the programs of this CPU use
    // it, and none of them interrupts another (softirqs are off).
    unsafe {
        let header = &raw mut (*buffer).header;
        (*header).frame_length = frame_length;
        (*header).captured = length;
        (*header).vlan_tci = vlan_tci;
        (*header).vlan_protocol = vlan_protocol;
        (*header).hook = ctx.number(pkt.egress != 0);
        (*header).flags = flags;
        (*header).inspector = 0;
        (*header).zero = 0;
        if ctx.copy((&raw mut (*buffer).data).cast(), bounded(length)) {
            pkt.captured = true;
        }
    }
}

/// Writes the record of a copied packet, with the verdict, to the ring.
#[inline(always)]
pub fn report(pkt: &mut PacketContext) {
    let (Some(settings), Some(buffer)) = (CAPTURE.get(0), buffer()) else {
        return;
    };
    // A packet that had to be punted, or a related ICMP error, was copied because it could have been dropped later.
    let [first, second] = &settings.conditions;
    if first.flags & second.flags & capture_flags::DROPS_ONLY != 0 && !pkt.is_dropped() {
        return;
    }
    let known = pkt.reason == Reason::Established as u8 || pkt.reason == Reason::Related as u8;
    let kind = if pkt.is_dropped() {
        EventKind::Drop
    } else if known || pkt.reason == Reason::LinkControl as u8 {
        EventKind::Trace
    } else {
        EventKind::PolicyVerdict
    };
    // The path of a known flow does not read the entry's rule and identity.
    if known && let Some(entry) = conntrack::find(&pkt.key, pkt.now) {
        pkt.rule = entry.rule();
        pkt.match_kind = entry.match_kind();
        pkt.remote_identity = entry.remote_identity();
        if pkt.reason == Reason::Established as u8 {
            pkt.event_flags = conntrack::direction_flags(entry, pkt.is_ingress());
        } else {
            pkt.event_flags |= event_flags::RELATED;
        }
    }
    // SAFETY: `buffer` points to a value of a map, which lives as long as the map. Only the programs of this CPU use
    // it, and none of them interrupts another (softirqs are off). The record has at most the length of a buffer, since
    // `bounded` returns at most `MAX_CAPTURED`.
    let record = unsafe {
        let header = &raw mut (*buffer).header;
        event::describe(&raw mut (*header).event, pkt, event::what(kind, TracePoint::None));
        (*header).event.source_mac = [0; 6];
        (*header).event.destination_mac = [0; 6];
        (*header).event.forward_packets = 0;
        (*header).event.forward_bytes = 0;
        (*header).event.reply_packets = 0;
        (*header).event.reply_bytes = 0;
        if pkt.must_punt && !pkt.is_dropped() && pkt.reason != Reason::FailedOpen as u8 {
            (*header).flags |= captured_flags::PUNTED;
            (*header).inspector = pkt.inspector;
        }
        let length = size_of::<CaptureHeader>() + bounded((*header).captured) as usize;
        core::slice::from_raw_parts(buffer.cast::<u8>(), length)
    };
    if CAPTURED.output_untyped::<[u8]>(record, 0).is_err()
        && let Some(lost) = CAPTURE_LOST.get_ptr_mut(0)
    {
        // SAFETY: `lost` points to a value of a per-CPU map, which lives as long as the map; only the programs of this
        // CPU write it.
        unsafe { *lost += 1 };
    }
}

/// Returns a length from 1 to [`MAX_CAPTURED`] unchanged, in a form whose bounds the verifier derives without the
/// comparisons of the caller. LLVM would remove the mask without `black_box`.
#[inline(always)]
fn bounded(length: u32) -> u32 {
    (black_box(length.wrapping_sub(1)) & (MAX_CAPTURED - 1)) + 1
}

/// Returns whether the settings accept the packet.
#[inline(always)]
fn is_wanted(settings: &CaptureSettings, pkt: &PacketContext) -> bool {
    let [first, second] = &settings.conditions;
    satisfies(first, pkt) || satisfies(second, pkt)
}

/// Returns whether the packet satisfies a condition.
#[inline(always)]
fn satisfies(condition: &CaptureCondition, pkt: &PacketContext) -> bool {
    let packet = &pkt.headers;
    // The reason of a punted packet can still become a drop. So can that of a related ICMP error, which
    // `icmp_error::cut` truncates before its punt can fail or the second policy can drop it.
    (condition.flags & capture_flags::DROPS_ONLY == 0
        || pkt.is_dropped()
        || pkt.must_punt
        || pkt.reason == Reason::Related as u8)
        && (condition.ifindex == 0 || condition.ifindex == pkt.ifindex)
        && (condition.protocol == 0 || condition.protocol == u32::from(packet.protocol) + 1)
        && condition.source.has_addr(&packet.source)
        && condition.source.has_port(packet.source_port)
        && condition.destination.has_addr(&packet.destination)
        && condition.destination.has_port(packet.destination_port)
}
