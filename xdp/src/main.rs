//! The BPF programs. Built for the BPF target by `crates/datapath/build.rs`.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

mod maps;

use aya_ebpf::bindings::{TC_ACT_UNSPEC, xdp_action};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use maps::*;

#[xdp]
pub fn palisade_xdp(ctx: XdpContext) -> u32 {
    touch(ctx.ingress_ifindex() as u32);
    xdp_action::XDP_PASS
}

#[classifier]
pub fn palisade_in(_: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

#[classifier]
pub fn palisade_out(_: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

#[inline(always)]
fn touch(slot: u32) {
    let addr = palisade_abi::Addr([slot; 4]);
    let _ = INTERFACES.get_ptr(slot);
    let _ = ENDPOINTS.get_ptr(slot);
    let _ = IPCACHE.get_ptr(&addr);
    let _ = PREFIXES.get(&aya_ebpf::btf_maps::lpm_trie::Key::new(128, addr));
    let _ = CLASSES.get_ptr(slot);
    let _ = CONFIG.get_ptr(slot);
    let _ = RULES.get_ptr(slot);
    let _ = COUNTERS.get_ptr(slot);
    let _ = BUDGETS.get_ptr(slot);
    if let Some(entry) = EVENTS.reserve_untyped::<palisade_abi::Event>(0) {
        entry.discard(0);
    }
    let _ = CONNTRACK.get_ptr(&palisade_abi::CtKey::default());
    let _ = FRAGMENTS.get_ptr(&palisade_abi::FragmentKey::default());
    let _ = POLICY.get_ptr(&palisade_abi::PolicyKey {
        policy: slot,
        identity: 0,
        class: 0,
        direction: 0,
        zero: 0,
    });
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
