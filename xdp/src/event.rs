//! Events to user space: written to the ring buffer, limited by a token bucket for each kind of event and reason.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use palisade_abi::{Event, EventKind, TracePoint, budget_slot, event_flags};
use palisade_packet::{Bytes, flags};

use crate::entry::Entry;
use crate::hook::Hook;
use crate::maps::{BUDGETS, CONFIG, ENDPOINTS, EVENTS};
use crate::packet_context::PacketContext;

const SECOND: u64 = 1_000_000_000;

/// Returns kind and trace point of an event in one word.
#[inline(always)]
pub const fn what(kind: EventKind, point: TracePoint) -> u32 {
    (kind as u32) << 8 | point as u32
}

/// Returns [`what`] of a trace event whose trace point has the number `point`.
#[inline(always)]
pub const fn what_trace(point: u32) -> u32 {
    (EventKind::Trace as u32) << 8 | point
}

/// Returns the slot of an event's budget.
#[inline(always)]
fn slot(pkt: &PacketContext, what: u32) -> u32 {
    budget_slot(what >> 8, pkt.reason)
}

/// Takes a token from the budget of this kind and reason. Returns whether the event can be sent. A bucket is refilled
/// once a second.
#[inline(always)]
pub fn may_send(pkt: &PacketContext, what: u32) -> bool {
    let (slot, now) = (slot(pkt, what), pkt.now);
    let (Some(budget), Some(config)) = (BUDGETS.get_ptr_mut(slot), CONFIG.get(0)) else {
        return false;
    };
    // SAFETY: `budget` points to a value of a per-CPU map, which lives as long as the map; only the programs of this
    // CPU write it.
    unsafe {
        if now.saturating_sub((*budget).filled_at) >= SECOND {
            (*budget).filled_at = now;
            (*budget).tokens = config.events_per_second;
        }
        if (*budget).tokens == 0 {
            (*budget).suppressed += 1;
            return false;
        }
        (*budget).tokens -= 1;
    }
    true
}

/// Writes an event about a packet to the ring buffer. `flow`: the entry whose counters a trace reports.
#[inline(always)]
pub fn send<H: Hook>(ctx: H, pkt: &PacketContext, what: u32, flow: Option<Entry>) {
    let Some(mut record) = EVENTS.reserve_untyped::<Event>(0) else {
        if let Some(budget) = BUDGETS.get_ptr_mut(slot(pkt, what)) {
            // SAFETY: `budget` points to a value of a per-CPU map, which lives as long as the map; only the programs of
            // this CPU write it.
            unsafe { (*budget).lost += 1 };
        }
        return;
    };
    let event = record.as_mut_ptr();
    // SAFETY: `event` points to a reserved record of this type.
    unsafe { describe(event, pkt, what) };
    // SAFETY: `event` points to a reserved record of this type.
    unsafe {
        (*event).source_mac = [0; 6];
        (*event).destination_mac = [0; 6];
        if pkt.layer3 == 0
            && let Some(mac) = ctx.bytes(false).array::<12>(0)
        {
            (*event).destination_mac = [mac[0], mac[1], mac[2], mac[3], mac[4], mac[5]];
            (*event).source_mac = [mac[6], mac[7], mac[8], mac[9], mac[10], mac[11]];
        }
        if let Some(flow) = flow {
            (*event).forward_packets = flow.forward_packets();
            (*event).forward_bytes = flow.forward_bytes();
            (*event).reply_packets = flow.reply_packets();
            (*event).reply_bytes = flow.reply_bytes();
        } else if what as u8 == TracePoint::Start as u8 {
            (*event).forward_packets = 1;
            (*event).forward_bytes = u64::from(pkt.headers.length);
            (*event).reply_packets = 0;
            (*event).reply_bytes = 0;
        } else {
            (*event).forward_packets = 0;
            (*event).forward_bytes = 0;
            (*event).reply_packets = 0;
            (*event).reply_bytes = 0;
        }
    }
    record.submit(0);
}

/// Writes the fields of an event other than the MAC addresses and the counters of a flow. The memory can hold an older
/// record, so every field is written.
///
/// # Safety
/// `event` points to writable memory of an event.
#[inline(always)]
pub unsafe fn describe(event: *mut Event, pkt: &PacketContext, what: u32) {
    let packet = &pkt.headers;
    // The packet path looks up only the peer's identity; the endpoint's identity is in its `EndpointState`.
    let own_identity = match ENDPOINTS.get(pkt.endpoint & 0xffff) {
        Some(state) => state.identity,
        None => 0,
    };
    let mut event_flags = pkt.event_flags;
    if packet.is(flags::IPV6) {
        event_flags |= event_flags::IPV6;
    }
    if pkt.ports_unknown {
        event_flags |= event_flags::FRAGMENT;
    }
    if !pkt.is_ingress() {
        event_flags |= event_flags::EGRESS;
    }
    // SAFETY: the caller passes memory of an event.
    unsafe {
        (*event).time = bpf_ktime_get_ns();
        (*event).source = packet.source;
        (*event).destination = packet.destination;
        (*event).source_port = packet.source_port;
        (*event).destination_port = packet.destination_port;
        if pkt.is_ingress() {
            (*event).source_identity = pkt.remote_identity;
            (*event).destination_identity = own_identity;
        } else {
            (*event).source_identity = own_identity;
            (*event).destination_identity = pkt.remote_identity;
        }
        (*event).rule = pkt.rule;
        (*event).ifindex = pkt.ifindex;
        (*event).length = packet.length;
        (*event).endpoint = pkt.endpoint as u16;
        (*event).kind = (what >> 8) as u8;
        (*event).reason = pkt.reason;
        (*event).flags = event_flags;
        (*event).protocol = packet.protocol;
        (*event).tcp_flags = packet.tcp_flags;
        (*event).match_kind = pkt.match_kind;
        (*event).trace_point = what as u8;
        (*event).decision = pkt.decision;
        (*event).ether_type = if packet.is(flags::NOT_IP) {
            packet.ether_type
        } else {
            0
        };
    }
}
