//! What a worker needs of an engine. A trait, so that the loop can be tested by itself.

use std::sync::Arc;

use palisade_inspect::{Engine, Learned, Millis, Number, Rules, Sink, View};

use crate::held::Handle;

/// Reads packets and decides. Without an engine of its own, a worker that died would take its flows into the next
/// life; so there is one for each life.
pub trait Inspect {
    /// What it judges by.
    type Rules: Send + Sync + 'static;

    /// From now on these rules hold.
    fn set_rules(&mut self, rules: Arc<Self::Rules>);
    /// Whether a set of application rules is known.
    fn knows(&self, ruleset: u32) -> bool;
    /// A packet to be read for one slot.
    fn packet(&mut self, now: Millis, view: &View<'_>, frame: Handle, sink: &mut impl Sink<Handle>);
    /// What became of an answer that was to be learned.
    fn learned(&mut self, now: Millis, learned: Learned, sink: &mut impl Sink<Handle>);
    /// Lets go what has waited too long.
    fn tick(&mut self, now: Millis, sink: &mut impl Sink<Handle>);
    /// When [`Inspect::tick`] has something to do.
    fn deadline(&self) -> Option<Millis>;
    /// An endpoint is no more.
    fn forget_endpoint(&mut self, endpoint: u16, sink: &mut impl Sink<Handle>);
    /// Flows that it knows of.
    fn flows(&self) -> u64 {
        0
    }
    /// Tells what it has counted: always as many numbers, in the same order.
    fn numbers(&self, _tell: &mut dyn FnMut(Number, u64)) {}
}

impl Inspect for Engine<Handle> {
    type Rules = Rules;

    fn set_rules(&mut self, rules: Arc<Rules>) {
        Self::set_rules(self, rules);
    }

    fn knows(&self, ruleset: u32) -> bool {
        Self::knows(self, ruleset)
    }

    fn packet(&mut self, now: Millis, view: &View<'_>, frame: Handle, sink: &mut impl Sink<Handle>) {
        Self::packet(self, now, view, frame, sink);
    }

    fn learned(&mut self, now: Millis, learned: Learned, sink: &mut impl Sink<Handle>) {
        Self::learned(self, now, learned, sink);
    }

    fn tick(&mut self, now: Millis, sink: &mut impl Sink<Handle>) {
        Self::tick(self, now, sink);
    }

    fn deadline(&self) -> Option<Millis> {
        Self::deadline(self)
    }

    fn forget_endpoint(&mut self, endpoint: u16, sink: &mut impl Sink<Handle>) {
        Self::forget_endpoint(self, endpoint, sink);
    }

    fn flows(&self) -> u64 {
        let stats = self.stats();
        stats.dns.tcp.connections + stats.http.tcp.connections + stats.tls.tcp.connections
    }

    fn numbers(&self, tell: &mut dyn FnMut(Number, u64)) {
        self.stats().each(tell);
    }
}
