//! HTTP/1: a request that a rule allows is forwarded with its body and its response. Long bodies are in offload
//! windows, so the BPF programs forward them without a punt.

mod config;
mod edits;
mod exchange;
pub(crate) mod redact;

use crate::{
    Millis, PacketView, Sink,
    context::Cx,
    handover::{Entries, Kind},
    record::About,
    rules::HttpScratch,
    tcp::{Connections, Side, quote::QuotedSegment},
};
pub use config::{HttpLimits, HttpStats};
pub(crate) use edits::edited;
pub(crate) use exchange::{Flow, HttpStream};
pub(crate) use exchange::{has_refused_body, may_become, status_of};
pub use palisade_model::request::{GetBodies, Paths};

pub(crate) struct Http<F> {
    limits: HttpLimits,
    connections: Connections<F, Flow>,
    scratch: HttpScratch,
    stats: HttpStats,
}

impl<F> Http<F> {
    pub(crate) fn new(limits: &HttpLimits) -> Self {
        Self {
            limits: limits.clone(),
            connections: Connections::new(&limits.tcp),
            scratch: HttpScratch::default(),
            stats: HttpStats::default(),
        }
    }

    pub(crate) fn stats(&self) -> HttpStats {
        HttpStats {
            tcp: self.connections.stats(),
            ..self.stats
        }
    }

    pub(crate) fn packet<S: Sink<F>>(&mut self, view: &PacketView<'_>, frame: F, cx: &mut Cx<'_, F, S>) {
        let Self {
            limits,
            connections,
            scratch,
            stats,
        } = self;
        connections.packet(
            view,
            frame,
            Flow::default,
            |flow| {
                flow.about = Some(match Side::of(view.slot) {
                    Side::Client => About::of(view),
                    Side::Server => About::of(view).turned(),
                });
                HttpStream {
                    flow,
                    slot: view.slot,
                    limits,
                    scratch,
                    stats,
                }
            },
            |left, _| left.may_go_on(view.slot),
            cx,
        );
    }

    /// Handles an ICMP error about a connection.
    pub(crate) fn error<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        quoted: &QuotedSegment,
        frame: F,
        cx: &mut Cx<'_, F, S>,
    ) {
        self.connections.error(view, quoted, frame, cx);
    }

    /// Writes the connections that can be handed over.
    pub(crate) fn hand_over<S: Sink<F>>(&mut self, into: &mut Entries, cx: &mut Cx<'_, F, S>) {
        self.connections.hand_over(Kind::HTTP, into, cx);
    }

    /// Takes a connection over. Returns whether it was taken over.
    pub(crate) fn take_over(&mut self, bytes: &[u8], now: Millis) -> bool {
        self.connections.take_over(bytes, now, |_| {})
    }

    /// Takes an offloaded connection over. Returns whether the bytes are one.
    pub(crate) fn take_over_offloaded(&mut self, bytes: &[u8]) -> bool {
        self.connections.take_over_offloaded(bytes)
    }

    pub(crate) fn tick<S: Sink<F>>(&mut self, cx: &mut Cx<'_, F, S>) {
        self.connections.tick(cx);
    }

    pub(crate) fn settle<S: Sink<F>>(&mut self, cx: &mut Cx<'_, F, S>) {
        self.connections.settle(cx);
    }

    pub(crate) fn deadline(&self) -> Option<Millis> {
        self.connections.deadline()
    }

    pub(crate) fn forget<S: Sink<F>>(&mut self, endpoint: Option<u16>, cx: &mut Cx<'_, F, S>) {
        self.connections.forget(endpoint, cx);
    }
}

#[cfg(test)]
mod tests;
