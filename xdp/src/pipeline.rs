//! The pipeline from a packet to its verdict, in eight steps.
//!
//! 1. parse: `palisade_packet::decode`
//! 2. link control: `link.rs`
//! 3. addresses, 4. conntrack, 5. identity, 6. port class, 7. policy table, 8. verdict: `enforce.rs`
//!
//! docs/ARCHITECTURE.md, "The packet path", describes the decision of each step. Start at [`process`].

use palisade_abi::{EventKind, ID_SLOTS, Reason, TracePoint, ct_flags, interface_flags, protocol, role};
use palisade_packet::{Packet, Start, decode, flags};

use crate::calls::Calls;
use crate::conntrack;
use crate::counters;
use crate::enforce;
use crate::event;
use crate::fragment;
use crate::hook::Hook;
use crate::identity;
use crate::maps::INTERFACES;
use crate::packet_context::{PacketContext, hook_point};

/// The program's treatment of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Leaves the packet to the kernel.
    Pass,
    /// Redirects the packet to the punt link.
    Punt,
    /// Drops the packet.
    Drop,
}

/// Gives the verdict on a packet, punts it if a worker must inspect it, counts it by its reason, and reports a drop.
#[inline(always)]
pub fn process<C: Calls>(ctx: C, egress: bool) -> Action {
    let mut pkt = PacketContext::new(ctx.ifindex());
    pkt.now = conntrack::now();
    pkt.direction = u8::from(egress);
    pkt.egress = u8::from(egress);
    classify(ctx, &mut pkt, u32::from(egress));
    if pkt.headers.is(flags::FRAGMENT_FIRST) {
        fragment::remember(&mut pkt);
    }
    ctx.take(&mut pkt);
    let mut action = Action::Pass;
    if pkt.must_punt && !pkt.is_dropped() {
        ctx.punt(&mut pkt);
        if pkt.reason != Reason::FailedOpen as u8 {
            action = Action::Punt;
        }
    } else if C::LIMITS_WINDOWS && pkt.window_limit != 0 {
        ctx.limit_window(&mut pkt);
    }
    counters::reason(
        u32::from(pkt.reason),
        u32::from(pkt.direction & 1),
        pkt.headers.length,
    );
    ctx.report_captured(&mut pkt);
    if !pkt.is_dropped() {
        return action;
    }
    ctx.send(
        &pkt,
        event::what(EventKind::Drop, TracePoint::None),
        core::ptr::null_mut(),
    );
    Action::Drop
}

/// Finds the interface, its endpoint and the direction, and applies the policy of that endpoint. If the endpoint is a
/// workload and the peer is the node, applies the node's policy too.
#[inline(always)]
fn classify<C: Calls>(ctx: C, pkt: &mut PacketContext, egress: u32) {
    let egress = egress != 0;
    let interface = match INTERFACES.get(pkt.ifindex & (ID_SLOTS as u32 - 1)) {
        Some(interface)
            if interface.ifindex == pkt.ifindex && matches!(interface.role, role::HOST | role::ENDPOINT) =>
        {
            interface
        }
        _ => return pkt.set(Reason::NoInterface),
    };
    let is_workload = interface.role == role::ENDPOINT;
    pkt.endpoint = u32::from(interface.endpoint);
    pkt.layer3 = interface.flags & interface_flags::LAYER3;
    pkt.generic = interface.flags & interface_flags::XDP_GENERIC;
    pkt.no_failsafe = interface.flags & interface_flags::NO_FAILSAFE;
    // The interface is the host side of the workload's veth: ingress of the interface is egress of the workload.
    pkt.direction = u8::from(is_workload != egress);
    pkt.hook_point = match (is_workload, egress) {
        (false, false) => hook_point::NIC_IN,
        (false, true) => hook_point::NIC_OUT,
        (true, false) => hook_point::FROM_WORKLOAD,
        (true, true) => hook_point::TO_WORKLOAD,
    };
    // Step 1: parse. If that fails, the headers may lie outside the linear part: pull them in and decode once more.
    ctx.decode(pkt);
    if pkt.reason != 0 {
        if ctx.pull_headers() {
            pkt.full_length = true;
            ctx.decode(pkt);
        }
        if pkt.reason != 0 {
            return;
        }
    }
    // Step 2: link control.
    if pkt.headers.is(flags::NOT_IP) {
        return ctx.link(pkt);
    }
    if matches!(pkt.headers.protocol, protocol::ICMPV6 | protocol::IGMP) {
        ctx.link(pkt);
        if pkt.reason != 0 {
            return;
        }
    }
    if pkt.headers.is(flags::FRAGMENT_LATER) {
        fragment::resolve(pkt);
    }
    // Steps 3 to 8 for the endpoint of the interface, inlined because every packet takes this path.
    enforce::enforce_endpoint::<C, true>(ctx, pkt);
    if pkt.is_dropped() || !is_workload || pkt.flow_flags & ct_flags::REMOTE_IS_HOST == 0 {
        return;
    }
    // Steps 3 to 8 once more: the peer is the node, so egress of the workload is ingress of the node and vice versa.
    pkt.endpoint = identity::host_endpoint();
    pkt.direction ^= 1;
    pkt.hook_point = hook_point::NODE;
    pkt.clear_decision();
    ctx.enforce_endpoint(pkt);
}

/// Step 1: decodes the frame. The reason is 0 afterwards if the frame is well-formed.
#[inline(always)]
pub fn decode_frame<H: Hook>(ctx: H, pkt: &mut PacketContext) {
    pkt.headers = Packet::default();
    let start = if pkt.layer3 != 0 {
        Start::Network
    } else {
        Start::Ethernet {
            tags_removed: ctx.tags_removed(),
        }
    };
    match decode(&ctx.bytes(pkt.full_length), start, &mut pkt.headers) {
        Ok(()) => pkt.reason = 0,
        Err(reason) => pkt.set(reason),
    }
}
