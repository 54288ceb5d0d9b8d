//! The pipeline from a packet to its verdict, in eight steps.
//!
//! 1. parse: `palisade_packet::decode`
//! 2. link control: `link.rs`
//! 3. addresses, 4. conntrack, 5. identity, 6. port class, 7. policy table, 8. verdict: `enforce.rs`
//!
//! docs/ARCHITECTURE.md, "The verdict function", says what each step decides. Start at [`process`].

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

/// What the program does with a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Leaves the packet to the kernel.
    Pass,
    /// Redirects the packet to the punt link.
    Punt,
    /// Drops the packet.
    Drop,
}

/// Gives the verdict on a packet, counts it by its reason, and reports a drop.
#[inline(always)]
pub fn process<C: Calls>(ctx: C, egress: bool) -> Action {
    let mut frame = PacketContext::new(ctx.ifindex());
    frame.now = conntrack::now();
    frame.direction = u8::from(egress);
    frame.egress = u8::from(egress);
    classify(ctx, &mut frame, u32::from(egress));
    if frame.packet.is(flags::FRAGMENT_FIRST) {
        fragment::remember(&mut frame);
    }
    let mut action = Action::Pass;
    if frame.must_punt && !frame.is_dropped() {
        ctx.punt(&mut frame);
        if frame.reason != Reason::FailedOpen as u8 {
            action = Action::Punt;
        }
    }
    counters::reason(
        u32::from(frame.reason),
        u32::from(frame.direction & 1),
        frame.packet.length,
    );
    if !frame.is_dropped() {
        return action;
    }
    ctx.send(
        &frame,
        event::what(EventKind::Drop, TracePoint::None),
        core::ptr::null_mut(),
    );
    Action::Drop
}

/// Finds the interface, its endpoint and the direction, and applies the policies of up to two endpoints: the
/// interface's and, at a workload's interface, the node's.
#[inline(always)]
fn classify<C: Calls>(ctx: C, frame: &mut PacketContext, egress: u32) {
    let egress = egress != 0;
    let interface = match INTERFACES.get(frame.ifindex & (ID_SLOTS as u32 - 1)) {
        Some(interface)
            if interface.ifindex == frame.ifindex
                && matches!(interface.role, role::HOST | role::ENDPOINT) =>
        {
            interface
        }
        _ => return frame.set(Reason::NoInterface),
    };
    let is_workload = interface.role == role::ENDPOINT;
    frame.endpoint = u32::from(interface.endpoint);
    frame.layer3 = interface.flags & interface_flags::LAYER3;
    frame.generic = interface.flags & interface_flags::XDP_GENERIC;
    // The interface is the host side of the workload's veth: ingress of the interface is egress of the workload.
    frame.direction = u8::from(is_workload != egress);
    frame.hook_point = match (is_workload, egress) {
        (false, false) => hook_point::NIC_IN,
        (false, true) => hook_point::NIC_OUT,
        (true, false) => hook_point::FROM_WORKLOAD,
        (true, true) => hook_point::TO_WORKLOAD,
    };
    // Step 1: parse. The headers may lie outside the linear part of the frame: pull them in and decode once more.
    ctx.decode(frame);
    if frame.reason != 0 {
        if ctx.pull_headers() {
            frame.full_length = true;
            ctx.decode(frame);
        }
        if frame.reason != 0 {
            return;
        }
    }
    // Step 2: link control.
    if frame.packet.is(flags::NOT_IP) {
        return ctx.link(frame);
    }
    if matches!(frame.packet.protocol, protocol::ICMPV6 | protocol::IGMP) {
        ctx.link(frame);
        if frame.reason != 0 {
            return;
        }
    }
    if frame.packet.is(flags::FRAGMENT_LATER) {
        fragment::resolve(frame);
    }
    // Steps 3 to 8 for the endpoint of the interface, inlined because every packet takes this path.
    enforce::enforce_endpoint::<C, true>(ctx, frame);
    if frame.is_dropped() || !is_workload || frame.flow_flags & ct_flags::REMOTE_IS_HOST == 0 {
        return;
    }
    // Steps 3 to 8 once more: the peer is the node, so egress of the workload is ingress of the node and vice versa.
    frame.endpoint = identity::host_endpoint();
    frame.direction ^= 1;
    frame.hook_point = hook_point::NODE;
    frame.clear_decision();
    ctx.enforce_endpoint(frame);
}

/// Step 1: decodes the frame. The reason is 0 afterwards if the frame is well-formed.
#[inline(always)]
pub fn decode_frame<H: Hook>(ctx: H, frame: &mut PacketContext) {
    frame.packet = Packet::default();
    let start = if frame.layer3 != 0 {
        Start::Network
    } else {
        Start::Ethernet {
            tags_removed: ctx.tags_removed(),
        }
    };
    match decode(&ctx.bytes(frame.full_length), start, &mut frame.packet) {
        Ok(()) => frame.reason = 0,
        Err(reason) => frame.set(reason),
    }
}
