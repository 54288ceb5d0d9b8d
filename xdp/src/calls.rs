//! The steps of the pipeline that run in global functions. `subprog.rs` implements [`Calls`]; the comment of each
//! method names the function that does the work.
//!
//! With the trait, the module of a step does not depend on the modules of later steps.

use palisade_abi::{CtEntry, TracePoint};

use crate::entry::Entry;
use crate::hook::Hook;
use crate::packet_context::PacketContext;

/// The pipeline's steps, for the programs of one hook.
pub trait Calls: Hook {
    /// Calls `pipeline::decode_frame`.
    fn decode(self, pkt: &mut PacketContext);
    /// Calls `link::check`.
    fn link(self, pkt: &mut PacketContext);
    /// Calls `enforce::enforce_endpoint`.
    fn enforce_endpoint(self, pkt: &mut PacketContext);
    /// Calls `enforce::admit_new_flow`.
    fn admit_new_flow(self, pkt: &mut PacketContext);
    /// Calls `enforce::reevaluate_flow`.
    fn reevaluate_flow(self, pkt: &mut PacketContext, entry: Entry);
    /// Calls `enforce::match_icmp_error`.
    fn match_icmp_error(self, pkt: &mut PacketContext);
    /// Calls `conntrack::set_protected`.
    fn set_protected(self, pkt: &PacketContext, entry: Entry);
    /// Calls `conntrack::trace`.
    fn trace(self, pkt: &mut PacketContext, entry: Entry, point: TracePoint);
    /// Calls `offload::limit_window`.
    fn limit_window(self, pkt: &mut PacketContext);
    /// Calls `punt::punt`.
    fn punt(self, pkt: &mut PacketContext);
    /// Calls `event::send` if the budget allows it. `flow`: null, or the entry whose counters a trace reports.
    fn send(self, pkt: &PacketContext, what: u32, flow: *mut CtEntry);
    /// Calls `capture::take` before a program changes the packet. Does nothing without the feature `capture`.
    fn take(self, pkt: &mut PacketContext);
    /// Calls `capture::report` after the verdict. Does nothing without the feature `capture`.
    fn report_captured(self, pkt: &mut PacketContext);
}
