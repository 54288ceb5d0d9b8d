//! The entry points of the BPF programs. `crates/datapath/build.rs` builds this crate for the BPF target.
//!
//! Depends on `palisade-abi` and `palisade-packet`. Start at [`palisade_xdp`]; `pipeline.rs` holds the eight steps of
//! the verdict (docs/ARCHITECTURE.md, "The packet path"), `enforce.rs` the verdict for one endpoint.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "a key that is passed by value is copied to the stack, of which there are 512 bytes"
)]

#[cfg(feature = "bench")]
mod bench;
mod calls;
#[cfg(feature = "capture")]
mod capture;
mod conntrack;
mod counters;
mod enforce;
mod entry;
mod event;
mod fragment;
mod hook;
mod icmp_error;
mod identity;
mod link;
mod maps;
mod offload;
mod packet_context;
mod pipeline;
mod policy;
mod proxy;
mod punt;
mod reinject;
mod share;
mod subprog;

use aya_ebpf::bindings::{TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action};
use aya_ebpf::macros::{classifier, sk_lookup, xdp};
use aya_ebpf::programs::{SkLookupContext, TcContext, XdpContext};

use crate::hook::{Skb, Xdp};
use crate::pipeline::{Action, process};

/// XDP, ingress of a NIC or of a workload's interface.
#[xdp(frags)]
pub fn palisade_xdp(ctx: XdpContext) -> u32 {
    match process(Xdp(ctx.ctx), false) {
        Action::Pass => xdp_action::XDP_PASS,
        Action::Punt => xdp_action::XDP_REDIRECT,
        Action::Drop => xdp_action::XDP_DROP,
    }
}

/// tc, ingress of a NIC or of a workload's interface. A packet that passes goes to the next program of the hook.
#[classifier]
pub fn palisade_in(ctx: TcContext) -> i32 {
    process_skb(Skb(ctx.skb.skb), false)
}

/// tc, egress of a NIC or of a workload's interface. A packet that passes goes to the next program of the hook.
#[classifier]
pub fn palisade_out(ctx: TcContext) -> i32 {
    process_skb(Skb(ctx.skb.skb), true)
}

#[inline(always)]
fn process_skb(ctx: Skb, egress: bool) -> i32 {
    if reinject::is_reinjected(ctx) || (egress && proxy::is_from_proxy(ctx)) {
        return TC_ACT_UNSPEC;
    }
    match process(ctx, egress) {
        Action::Pass => TC_ACT_UNSPEC,
        Action::Punt => TC_ACT_REDIRECT,
        Action::Drop => TC_ACT_SHOT,
    }
}

/// XDP, ingress of the workers' end of the punt link.
#[xdp(frags)]
pub fn palisade_punt(ctx: XdpContext) -> u32 {
    punt::to_worker(Xdp(ctx.ctx))
}

/// tc, ingress of the node's end of the punt link.
#[classifier]
pub fn palisade_reinject(ctx: TcContext) -> i32 {
    reinject::reinject(Skb(ctx.skb.skb))
}

/// tc, egress of both ends of the punt link.
#[classifier]
pub fn palisade_punt_filter(ctx: TcContext) -> i32 {
    punt::only_punted(Skb(ctx.skb.skb))
}

/// XDP, ingress of the node's end of the punt link, attached only on kernels that need it.
///
/// Linux 6.16.8 to 6.17.10 keep data for the destructor of an AF_XDP frame in `skb->cb`; tc and the IP layer overwrite
/// `skb->cb`, and the kernel panics (caused by commit 30f241fcf52a, fixed by 0ebc27a4c67d). With this program, veth
/// copies an AF_XDP frame, which has no headroom, into a buffer of its own and frees the original before tc sees the
/// copy.
#[xdp(frags)]
pub fn palisade_pass(_: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// tc, ingress of the node's end of a proxy link.
#[classifier]
pub fn palisade_proxy(ctx: TcContext) -> i32 {
    proxy::from_proxy(Skb(ctx.skb.skb))
}

/// tc, egress of the node's end of a proxy link.
#[classifier]
pub fn palisade_proxy_filter(ctx: TcContext) -> i32 {
    proxy::only_redirected(Skb(ctx.skb.skb))
}

/// sk_lookup, in the network namespaces of the proxy.
#[sk_lookup]
pub fn palisade_lookup(ctx: SkLookupContext) -> u32 {
    proxy::assign_listener(&ctx)
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
