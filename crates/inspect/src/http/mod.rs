//! HTTP/1: a request goes on if a rule allows it; its body and the answers do too, and long bodies are left to the
//! programs.

mod config;
mod exchange;
mod redact;

use crate::{
    Millis, PacketView, Rules, Sink,
    record::About,
    rules::HttpScratch,
    tcp::{Connections, Side, quote::QuotedSegment},
};
pub use config::{HttpLimits, HttpStats};
use exchange::{Flow, HttpStream};
pub(crate) use exchange::{has_refused_body, status_of};
pub use palisade_policy::l7::{GetBodies, Paths};

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

    pub(crate) fn packet<S: Sink<F>>(
        &mut self,
        now: Millis,
        view: &PacketView<'_>,
        frame: F,
        rules: &Rules,
        sink: &mut S,
    ) {
        let Self {
            limits,
            connections,
            scratch,
            stats,
        } = self;
        connections.packet(
            now,
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
                    now,
                    slot: view.slot,
                    rules,
                    limits,
                    scratch,
                    stats,
                }
            },
            |left, _| left.may_go_on(view.slot),
            sink,
        );
    }

    /// An ICMP error about a connection.
    pub(crate) fn error<S: Sink<F>>(
        &mut self,
        now: Millis,
        view: &PacketView<'_>,
        quoted: &QuotedSegment,
        frame: F,
        sink: &mut S,
    ) {
        self.connections.error(now, view, quoted, frame, sink);
    }

    pub(crate) fn tick<S: Sink<F>>(&mut self, now: Millis, sink: &mut S) {
        self.connections.tick(now, sink);
    }

    pub(crate) fn deadline(&self) -> Option<Millis> {
        self.connections.deadline()
    }

    pub(crate) fn forget<S: Sink<F>>(&mut self, endpoint: Option<u16>, sink: &mut S) {
        self.connections.forget(endpoint, sink);
    }
}

#[cfg(test)]
mod tests;
