//! Events: what happened, into the ring, within a budget.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use palisade_abi::{CtEntry, Event, EventKind, TracePoint, budget_slot, event_flags};
use palisade_packet::{Bytes, flags};

use crate::ctx::Context;
use crate::maps::{BUDGETS, CONFIG, ENDPOINTS, EVENTS};
use crate::packet_context::PacketContext;

const SECOND: u64 = 1_000_000_000;

/// Kind and trace point of an event in one word.
#[inline(always)]
pub const fn what(kind: EventKind, point: TracePoint) -> u32 {
    (kind as u32) << 8 | point as u32
}

/// The budget of an event about `frame`.
#[inline(always)]
fn slot(frame: &PacketContext, what: u32) -> u32 {
    budget_slot(what >> 8, frame.reason)
}

/// Takes a token from the budget of this kind and reason. A bucket is filled once a second. Asked before [`send`] is
/// called: in a flood nearly no event is sent, and the call is what it would cost.
#[inline(always)]
pub fn may_send(frame: &PacketContext, what: u32) -> bool {
    let (slot, now) = (slot(frame, what), frame.now);
    let (Some(budget), Some(config)) = (BUDGETS.get_ptr_mut(slot), CONFIG.get(0)) else {
        return false;
    };
    // SAFETY: a map value of this CPU, which lives as long as the map.
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

/// Sends an event about `frame`, for which there is budget. `flow` gives a trace its numbers.
#[inline(always)]
pub fn send<C: Context>(ctx: C, frame: &PacketContext, what: u32, flow: Option<&CtEntry>) {
    let kind = what >> 8;
    let Some(mut record) = EVENTS.reserve_untyped::<Event>(0) else {
        if let Some(budget) = BUDGETS.get_ptr_mut(slot(frame, what)) {
            // SAFETY: a map value of this CPU, which lives as long as the map.
            unsafe { (*budget).lost += 1 };
        }
        return;
    };
    let packet = &frame.packet;
    // The endpoint that is asked has no identity in the ipcache lookups of the packet path: it has it here.
    let own_identity = match ENDPOINTS.get(frame.endpoint & 0xffff) {
        Some(state) => state.identity,
        None => 0,
    };
    let mut event_flags = frame.event_flags;
    if packet.is(flags::IPV6) {
        event_flags |= event_flags::IPV6;
    }
    if frame.ports_unknown {
        event_flags |= event_flags::FRAGMENT;
    }
    if !frame.is_ingress() {
        event_flags |= event_flags::EGRESS;
    }
    let event = record.as_mut_ptr();
    // SAFETY: `event` is a reserved record of exactly this type. Every field is written: the ring's memory holds
    // what was there before.
    unsafe {
        (*event).time = bpf_ktime_get_ns();
        (*event).source = packet.source;
        (*event).destination = packet.destination;
        (*event).source_port = packet.source_port;
        (*event).destination_port = packet.destination_port;
        if frame.is_ingress() {
            (*event).source_identity = frame.remote_identity;
            (*event).destination_identity = own_identity;
        } else {
            (*event).source_identity = own_identity;
            (*event).destination_identity = frame.remote_identity;
        }
        (*event).rule = frame.rule;
        (*event).ifindex = frame.ifindex;
        (*event).length = packet.length;
        (*event).endpoint = frame.endpoint as u16;
        (*event).kind = kind as u8;
        (*event).reason = frame.reason;
        (*event).flags = event_flags;
        (*event).protocol = packet.protocol;
        (*event).tcp_flags = packet.tcp_flags;
        (*event).match_kind = frame.match_kind;
        (*event).trace_point = what as u8;
        (*event).decision = frame.decision;
        (*event).ether_type = if packet.is(flags::NOT_IP) {
            packet.ether_type
        } else {
            0
        };
        (*event).source_mac = [0; 6];
        (*event).destination_mac = [0; 6];
        if frame.layer3 == 0
            && let Some(mac) = ctx.bytes(false).array::<12>(0)
        {
            (*event).destination_mac = [mac[0], mac[1], mac[2], mac[3], mac[4], mac[5]];
            (*event).source_mac = [mac[6], mac[7], mac[8], mac[9], mac[10], mac[11]];
        }
        if let Some(flow) = flow {
            (*event).forward_packets = flow.forward_packets;
            (*event).forward_bytes = flow.forward_bytes;
            (*event).reply_packets = flow.reply_packets;
            (*event).reply_bytes = flow.reply_bytes;
        } else if what as u8 == TracePoint::Start as u8 {
            (*event).forward_packets = 1;
            (*event).forward_bytes = u64::from(packet.length);
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
