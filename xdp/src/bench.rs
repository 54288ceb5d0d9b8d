//! Baseline programs of the benchmark: the minimum cost of a verdict. Only the object that `bench/` loads contains
//! these programs; they are never attached.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};

use crate::calls::Calls;
use crate::conntrack;
use crate::hook::{Skb, Xdp};
use crate::packet_context::PacketContext;

/// Decodes the packet and looks up one connection, in XDP.
#[xdp(frags)]
pub fn bench_baseline(ctx: XdpContext) -> u32 {
    if is_known(Xdp(ctx.ctx)) {
        xdp_action::XDP_PASS
    } else {
        xdp_action::XDP_DROP
    }
}

/// Decodes the packet and looks up one connection, in tc.
#[classifier]
pub fn bench_baseline_tc(ctx: TcContext) -> i32 {
    if is_known(Skb(ctx.skb.skb)) {
        TC_ACT_UNSPEC
    } else {
        TC_ACT_SHOT
    }
}

/// Returns whether the packet belongs to a connection of endpoint 1.
#[inline(always)]
fn is_known<C: Calls>(ctx: C) -> bool {
    let mut pkt = PacketContext::new(ctx.ifindex());
    ctx.decode(&mut pkt);
    if pkt.reason != 0 {
        return false;
    }
    conntrack::write_key(&mut pkt.key, 1, true, conntrack::ends(&pkt.headers));
    conntrack::find_in_place(&pkt.key, 0).is_some()
}
