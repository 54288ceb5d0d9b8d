//! The BPF programs: one verdict function for XDP and tc (docs/ARCHITECTURE.md, "The packet path"). Built for
//! the BPF target by `crates/datapath/build.rs`.
//!
//! The parts are global functions (`ctx.rs`): the verifier takes each once. Where a path is short and hot it is
//! inlined.
//!
//! Depends on `palisade-abi` and `palisade-packet`. Start at [`palisade_xdp`]: below it, `process` and `classify` are the
//! frame of the pipeline, `enforce.rs` gives the verdict for one endpoint, `policy.rs` looks the policy table up. Comments
//! number the steps as docs/ARCHITECTURE.md does.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "a key that is handed over by value is copied to the stack, of which there are 512 bytes"
)]

mod conntrack;
mod counters;
mod ctx;
mod enforce;
mod error;
mod event;
mod fragment;
mod identity;
mod link;
mod maps;
mod packet_context;
mod policy;
mod punt;
mod share;

use aya_ebpf::bindings::{TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use palisade_abi::{EventKind, ID_SLOTS, Reason, TracePoint, ct_flags, interface_flags, protocol, role};
use palisade_packet::{Packet, Start, decode, flags};

use crate::ctx::{Context, Skb, Xdp};
use crate::maps::INTERFACES;
use crate::packet_context::{PacketContext, hook_point};

/// XDP, ingress of an interface of either role.
#[xdp(frags)]
pub fn palisade_xdp(ctx: XdpContext) -> u32 {
    match process(Xdp(ctx.ctx), false) {
        Action::Pass => xdp_action::XDP_PASS,
        Action::Punt => xdp_action::XDP_REDIRECT,
        Action::Drop => xdp_action::XDP_DROP,
    }
}

/// tc, ingress of an interface of either role. What passes goes on to the next program of the hook.
#[classifier]
pub fn palisade_in(ctx: TcContext) -> i32 {
    process_skb(Skb(ctx.skb.skb), false)
}

/// tc, egress of an interface of either role.
#[classifier]
pub fn palisade_out(ctx: TcContext) -> i32 {
    process_skb(Skb(ctx.skb.skb), true)
}

/// XDP, ingress of the workers' end of the punt link.
#[xdp(frags)]
pub fn palisade_punt(ctx: XdpContext) -> u32 {
    punt::to_worker(Xdp(ctx.ctx))
}

/// tc, ingress of the node's end of the punt link.
#[classifier]
pub fn palisade_reinject(ctx: TcContext) -> i32 {
    punt::reinject(Skb(ctx.skb.skb))
}

/// tc, egress of both ends of the punt link.
#[classifier]
pub fn palisade_punt_filter(ctx: TcContext) -> i32 {
    punt::only_punted(Skb(ctx.skb.skb))
}

/// XDP, ingress of the node's end of the punt link, only on kernels that need it.
///
/// Native XDP on veth has a frame of AF_XDP, which has no headroom, copied into a buffer of its own, and frees the
/// original: its destructor runs before tc and the IP layer write to `skb->cb`, where Linux 6.16.8 to 6.17.10 keep what
/// the destructor reads (upstream commits 30f241fcf52a, which brought it, and 0ebc27a4c67d, which mended it).
#[xdp(frags)]
pub fn palisade_pass(_: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

#[inline(always)]
fn process_skb(ctx: Skb, egress: bool) -> i32 {
    if punt::is_reinjected(ctx) {
        return TC_ACT_UNSPEC;
    }
    match process(ctx, egress) {
        Action::Pass => TC_ACT_UNSPEC,
        Action::Punt => TC_ACT_REDIRECT,
        Action::Drop => TC_ACT_SHOT,
    }
}

/// What a verdict costs at the least, in XDP. The yardstick of the benchmark; never attached.
#[xdp(frags)]
pub fn bench_baseline(ctx: XdpContext) -> u32 {
    if is_known(Xdp(ctx.ctx)) {
        xdp_action::XDP_PASS
    } else {
        xdp_action::XDP_DROP
    }
}

/// The same in tc.
#[classifier]
pub fn bench_baseline_tc(ctx: TcContext) -> i32 {
    if is_known(Skb(ctx.skb.skb)) {
        TC_ACT_UNSPEC
    } else {
        TC_ACT_SHOT
    }
}

/// Decodes, and looks the connection up as one of endpoint 1.
#[inline(always)]
fn is_known<C: Context>(ctx: C) -> bool {
    let mut frame = PacketContext::new(ctx.ifindex());
    ctx.decode(&mut frame);
    if frame.reason != 0 {
        return false;
    }
    conntrack::write_key(&mut frame.key, 1, true, conntrack::ends(&frame.packet));
    conntrack::find_in_place(&frame.key, 0).is_some()
}

/// What the hook does with a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    /// The packet goes on as without a program.
    Pass,
    /// It is redirected to the punt link.
    Punt,
    /// It is dropped.
    Drop,
}

/// Gives the verdict on a packet, counts it by its reason, and reports a drop.
#[inline(always)]
fn process<C: Context>(ctx: C, egress: bool) -> Action {
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
        core::ptr::null(),
    );
    Action::Drop
}

/// Finds the interface, its endpoint and the direction, and applies the policies of up to two endpoints: the interface's
/// and, at a workload's interface, the node's.
#[inline(always)]
fn classify<C: Context>(ctx: C, frame: &mut PacketContext, egress: u32) {
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
    // From a workload's interface comes what leaves the workload.
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
    // Steps 3 to 8. Inlined here because every packet comes this way; called below.
    enforce::enforce_endpoint::<C, true>(ctx, frame);
    if frame.is_dropped() || !is_workload || frame.flow_flags & ct_flags::REMOTE_IS_HOST == 0 {
        return;
    }
    // The peer is the node: egress of the workload is ingress of the node, and the other way round.
    frame.endpoint = identity::host_endpoint();
    frame.direction ^= 1;
    frame.hook_point = hook_point::NODE;
    frame.clear_decision();
    ctx.enforce_endpoint(frame);
}

/// Decodes the frame; the reason is 0 if that works.
#[inline(always)]
fn decode_frame<C: Context>(ctx: C, frame: &mut PacketContext) {
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

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
