//! The global functions of the programs, made by one macro for XDP and for tc.
//!
//! The verifier checks a global function (exported, with the C calling convention) once, by the types of its
//! parameters; it walks any other function again for each path that calls the function. A global function gets
//! pointers, which can be null, to memory of unknown content, and returns a number.

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use palisade_abi::{CtEntry, TracePoint};

use crate::calls::Calls;
#[cfg(feature = "capture")]
use crate::capture;
use crate::entry::Entry;
use crate::hook::{Skb, Xdp};
use crate::packet_context::PacketContext;
use crate::{conntrack, enforce, event, link, offload, pipeline, punt};

/// Defines the global functions of one hook and implements [`Calls`] by calls of them.
macro_rules! global_functions {
    ($hook:ident, $raw:ty, $decode:ident, $link:ident, $enforce_endpoint:ident, $admit_new_flow:ident,
     $reevaluate_flow:ident, $match_icmp_error:ident, $trace:ident, $limit_window:ident, $punt:ident, $send:ident,
     $take:ident) => {
        global_functions!(@step $hook, $raw, $decode, pipeline::decode_frame);
        global_functions!(@step $hook, $raw, $link, link::check);
        global_functions!(@step $hook, $raw, $enforce_endpoint, enforce::enforce_endpoint::<$hook, false>);
        global_functions!(@step $hook, $raw, $admit_new_flow, enforce::admit_new_flow);
        global_functions!(@step $hook, $raw, $match_icmp_error, enforce::match_icmp_error);
        global_functions!(@step $hook, $raw, $limit_window, offload::limit_window);
        global_functions!(@step $hook, $raw, $punt, punt::punt);
        #[cfg(feature = "capture")]
        global_functions!(@step $hook, $raw, $take, capture::take);

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $reevaluate_flow(ctx: *mut $raw, pkt: *mut PacketContext, entry: *mut CtEntry) -> u32 {
            // SAFETY: `Calls::reevaluate_flow` passes a reference to the packet context and a pointer to a map value.
            // The verifier requires the comparisons with null.
            let (Some(pkt), Some(entry)) = (unsafe { (pkt.as_mut(), Entry::new(entry)) }) else {
                return 0;
            };
            enforce::reevaluate_flow($hook(ctx), pkt, entry);
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $trace(ctx: *mut $raw, pkt: *mut PacketContext, entry: *mut CtEntry, point: u32) -> u32 {
            // SAFETY: `Calls::trace` passes a reference to the packet context and a pointer to a map value. The
            // verifier requires the comparisons with null.
            let (Some(pkt), Some(entry)) = (unsafe { (pkt.as_mut(), Entry::new(entry)) }) else {
                return 0;
            };
            conntrack::trace($hook(ctx), pkt, entry, point);
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $send(ctx: *mut $raw, pkt: *const PacketContext, what: u32, flow: *mut CtEntry) -> u32 {
            // SAFETY: `Calls::send` passes a reference. The verifier requires the comparison with null.
            let Some(pkt) = (unsafe { pkt.as_ref() }) else {
                return 0;
            };
            // SAFETY: `Calls::send` passes null or a pointer to a map value.
            event::send($hook(ctx), pkt, what, unsafe { Entry::new(flow) });
            0
        }

        impl Calls for $hook {
            #[inline(always)]
            fn decode(self, pkt: &mut PacketContext) {
                $decode(self.0, pkt);
            }
            #[inline(always)]
            fn link(self, pkt: &mut PacketContext) {
                $link(self.0, pkt);
            }
            #[inline(always)]
            fn enforce_endpoint(self, pkt: &mut PacketContext) {
                $enforce_endpoint(self.0, pkt);
            }
            #[inline(always)]
            fn admit_new_flow(self, pkt: &mut PacketContext) {
                $admit_new_flow(self.0, pkt);
            }
            #[inline(always)]
            fn reevaluate_flow(self, pkt: &mut PacketContext, entry: Entry) {
                $reevaluate_flow(self.0, pkt, entry.as_ptr());
            }
            #[inline(always)]
            fn match_icmp_error(self, pkt: &mut PacketContext) {
                $match_icmp_error(self.0, pkt);
            }
            #[inline(always)]
            fn set_protected(self, pkt: &PacketContext, entry: Entry) {
                set_protected(pkt, entry.as_ptr());
            }
            #[inline(always)]
            fn trace(self, pkt: &mut PacketContext, entry: Entry, point: TracePoint) {
                $trace(self.0, pkt, entry.as_ptr(), point as u32);
            }
            #[inline(always)]
            fn limit_window(self, pkt: &mut PacketContext) {
                $limit_window(self.0, pkt);
            }
            #[inline(always)]
            fn punt(self, pkt: &mut PacketContext) {
                $punt(self.0, pkt);
            }
            #[inline(always)]
            fn send(self, pkt: &PacketContext, what: u32, flow: *mut CtEntry) {
                // The budget is checked before the call: in a flood the budget suppresses nearly every event, and the
                // call would be the main cost.
                if event::may_send(pkt, what) {
                    $send(self.0, pkt, what, flow);
                }
            }
            #[inline(always)]
            fn take(self, _pkt: &mut PacketContext) {
                #[cfg(feature = "capture")]
                $take(self.0, _pkt);
            }
            #[inline(always)]
            fn report_captured(self, _pkt: &mut PacketContext) {
                #[cfg(feature = "capture")]
                if _pkt.captured {
                    report_captured(_pkt);
                }
            }
        }
    };
    (@step $hook:ident, $raw:ty, $name:ident, $step:expr) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(ctx: *mut $raw, pkt: *mut PacketContext) -> u32 {
            // SAFETY: the methods of `Calls` pass a reference. The verifier requires the comparison with null.
            let Some(pkt) = (unsafe { pkt.as_mut() }) else {
                return 0;
            };
            $step($hook(ctx), pkt);
            0
        }
    };
}

/// The global function of `conntrack::set_protected`, the same for both hooks.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn set_protected(pkt: *const PacketContext, entry: *mut CtEntry) -> u32 {
    // SAFETY: `Calls::set_protected` passes a reference to the packet context and a pointer to a map value. The
    // verifier requires the comparisons with null.
    let (Some(pkt), Some(entry)) = (unsafe { (pkt.as_ref(), Entry::new(entry)) }) else {
        return 0;
    };
    conntrack::set_protected(pkt, entry);
    0
}

/// The global function of `capture::report`, the same for both hooks.
#[cfg(feature = "capture")]
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn report_captured(pkt: *mut PacketContext) -> u32 {
    // SAFETY: `Calls::report_captured` passes a reference. The verifier requires the comparison with null.
    if let Some(pkt) = unsafe { pkt.as_mut() } {
        capture::report(pkt);
    }
    0
}

global_functions!(
    Xdp,
    xdp_md,
    xdp_decode,
    xdp_link,
    xdp_enforce_endpoint,
    xdp_admit_new_flow,
    xdp_reevaluate_flow,
    xdp_match_icmp_error,
    xdp_trace,
    xdp_limit_window,
    xdp_punt,
    xdp_send,
    xdp_take
);
global_functions!(
    Skb,
    __sk_buff,
    tc_decode,
    tc_link,
    tc_enforce_endpoint,
    tc_admit_new_flow,
    tc_reevaluate_flow,
    tc_match_icmp_error,
    tc_trace,
    tc_limit_window,
    tc_punt,
    tc_send,
    tc_take
);
