//! HTTP/1: a request goes on if a rule allows it; its body and the answers do too, and long bodies are left to the
//! programs.

mod exchange;
mod redact;

use std::sync::Arc;

pub use palisade_policy::l7::{GetBodies, Paths};
use palisade_protocols::http1;

use crate::{
    Millis, PacketView, Rules, Sink,
    record::About,
    rules::HttpScratch,
    tcp::{Connections, Side, TcpLimits, TcpStats, quote::QuotedSegment},
};
use exchange::{Flow, HttpStream};
pub(crate) use exchange::{has_refused_body, status_of};

/// How HTTP is judged, and how much may be held of it. Of one worker.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HttpLimits {
    /// Connections. Their deadline is that of a head that does not end.
    pub tcp: TcpLimits,
    /// What a head may be at most.
    pub head: http1::Limits,
    /// In which form a path is judged.
    pub paths: Paths,
    /// Whether a GET may have a body.
    pub get_bodies: GetBodies,
    /// Names of the fields that records show, in any case. Those with secrets show that they were there.
    pub record_headers: Arc<[String]>,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            tcp: TcpLimits {
                bytes_per_direction: 256 << 10,
                window: 64 << 10,
                ..TcpLimits::default()
            },
            head: http1::Limits::default(),
            paths: Paths::default(),
            get_bodies: GetBodies::default(),
            record_headers: Arc::default(),
        }
    }
}

/// What has happened so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HttpStats {
    /// Connections.
    pub tcp: TcpStats,
    /// Requests that were read.
    pub requests: u64,
    /// Requests that no rule allows.
    pub denied: u64,
    /// Answers that were read.
    pub responses: u64,
    /// Unsolicited responses.
    pub unsolicited: u64,
    /// Connections that were handed over to another protocol.
    pub tunnels: u64,
    /// Streams that are not what they should be, by [`http1::ParseError`].
    pub malformed: [u64; http1::ParseError::ALL.len()],
    /// Requests and connections that would have been refused and go on because of audit mode.
    pub audited: u64,
}

impl Default for HttpStats {
    fn default() -> Self {
        Self {
            tcp: TcpStats::default(),
            requests: 0,
            denied: 0,
            responses: 0,
            unsolicited: 0,
            tunnels: 0,
            malformed: [0; _],
            audited: 0,
        }
    }
}

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
