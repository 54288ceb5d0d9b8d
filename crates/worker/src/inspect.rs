//! The interface to the inspectors of a worker. It is a trait so that the loop can be tested without inspectors.
//!
//! [`palisade_inspect::Engine`] implements the trait.

use std::sync::Arc;

use palisade_inspect::{CommitResult, Engine, Metric, Millis, PacketView, Rules, Sink, handover::HandedOver};

use crate::held::Handle;

/// The engine of a worker: its inspectors with their state. Each start of a worker makes a new engine, so no inspection
/// state survives the failure that ended the previous run.
pub trait Inspect {
    /// The application rules.
    type Rules: Send + Sync + 'static;

    /// Replaces the rules.
    fn set_rules(&mut self, rules: Arc<Self::Rules>);
    /// Returns whether the rules contain a rule set.
    fn knows(&self, ruleset: u32) -> bool;
    /// Inspects a packet for one policy, whose request is `view.slot`. Passes effects on this frame and on other held
    /// frames to `sink`.
    fn packet(&mut self, now: Millis, view: &PacketView<'_>, frame: Handle, sink: &mut impl Sink<Handle>);
    /// Takes the result of a commit of learned addresses.
    fn committed(&mut self, now: Millis, learned: CommitResult, sink: &mut impl Sink<Handle>);
    /// Acts on the deadlines that have passed.
    fn tick(&mut self, now: Millis, sink: &mut impl Sink<Handle>);
    /// Sends what was put off until no packet is left to inspect.
    fn settle(&mut self, _now: Millis, _sink: &mut impl Sink<Handle>) {}
    /// Returns the time of the next deadline; `None` if there is no deadline.
    fn deadline(&self) -> Option<Millis>;
    /// Drops the state and the held packets of a deleted endpoint.
    fn forget_endpoint(&mut self, endpoint: u16, sink: &mut impl Sink<Handle>);
    /// Returns what a planned restart hands over. The engine gets no packet afterwards.
    fn hand_over(&mut self, _sink: &mut impl Sink<Handle>) -> HandedOver {
        HandedOver::default()
    }
    /// Returns the number of tracked connections.
    fn flows(&self) -> u64 {
        0
    }
    /// Calls `visit` with each metric, always with the same metrics in the same order.
    fn metrics(&self, _visit: &mut dyn FnMut(Metric, u64)) {}
}

impl Inspect for Engine<Handle> {
    type Rules = Rules;

    fn set_rules(&mut self, rules: Arc<Rules>) {
        Self::set_rules(self, rules);
    }

    fn knows(&self, ruleset: u32) -> bool {
        Self::knows(self, ruleset)
    }

    fn packet(&mut self, now: Millis, view: &PacketView<'_>, frame: Handle, sink: &mut impl Sink<Handle>) {
        Self::packet(self, now, view, frame, sink);
    }

    fn committed(&mut self, now: Millis, learned: CommitResult, sink: &mut impl Sink<Handle>) {
        Self::committed(self, now, learned, sink);
    }

    fn tick(&mut self, now: Millis, sink: &mut impl Sink<Handle>) {
        Self::tick(self, now, sink);
    }

    fn settle(&mut self, now: Millis, sink: &mut impl Sink<Handle>) {
        Self::settle(self, now, sink);
    }

    fn deadline(&self) -> Option<Millis> {
        Self::deadline(self)
    }

    fn forget_endpoint(&mut self, endpoint: u16, sink: &mut impl Sink<Handle>) {
        Self::forget_endpoint(self, endpoint, sink);
    }

    fn hand_over(&mut self, sink: &mut impl Sink<Handle>) -> HandedOver {
        Self::hand_over(self, sink)
    }

    fn flows(&self) -> u64 {
        let stats = self.stats();
        let of_tcp = [stats.dns.tcp, stats.http.tcp, stats.tls.tcp, stats.kafka.tcp];
        of_tcp.iter().map(|tcp| tcp.connections).sum()
    }

    fn metrics(&self, visit: &mut dyn FnMut(Metric, u64)) {
        self.stats().visit(visit);
    }
}
