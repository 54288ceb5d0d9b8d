//! Kafka: a request is forwarded if a rule allows it by its header, or each of its topics. A denied request gets a
//! response of its own type, and the connection ends.

mod config;
mod exchange;
mod session;
mod topics;

use std::sync::Arc;

use crate::{
    Millis, PacketView, Sink,
    context::Cx,
    handover::{Entries, Kind},
    record::About,
    tcp::{Connections, Side, quote::QuotedSegment},
};
pub use config::{KafkaLimits, KafkaStats};
use exchange::{Flow, KafkaStream};
pub use topics::TopicIds;
use topics::TopicNames;

pub(crate) struct Kafka<F> {
    max_request: usize,
    share_topic_ids: bool,
    connections: Connections<F, Flow>,
    names: TopicNames,
    stats: KafkaStats,
}

impl<F> Kafka<F> {
    pub(crate) fn new(limits: &KafkaLimits) -> Self {
        Self {
            max_request: limits.max_request,
            share_topic_ids: limits.share_topic_ids,
            connections: Connections::new(&limits.tcp),
            names: TopicNames::default(),
            stats: KafkaStats::default(),
        }
    }

    pub(crate) fn share(&mut self, topics: Arc<TopicIds>) {
        self.names.share(topics);
    }

    pub(crate) fn stats(&self) -> KafkaStats {
        KafkaStats {
            tcp: self.connections.stats(),
            ..self.stats
        }
    }

    pub(crate) fn packet<S: Sink<F>>(&mut self, view: &PacketView<'_>, frame: F, cx: &mut Cx<'_, F, S>) {
        let Self {
            max_request,
            share_topic_ids,
            connections,
            names,
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
                KafkaStream {
                    flow,
                    slot: view.slot,
                    max_request: *max_request,
                    share_topic_ids: *share_topic_ids,
                    names,
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
        self.connections.hand_over(Kind::KAFKA, into, cx);
        into.add(Kind::TOPIC_IDS, |out| self.names.hand_over(out));
    }

    /// Takes the names of topic ids over. Returns whether the bytes are names.
    pub(crate) fn take_over_topic_ids(&self, bytes: &[u8]) -> bool {
        self.names.take_over(bytes)
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
        if let Some(endpoint) = endpoint {
            self.names.forget(endpoint);
        }
        self.connections.forget(endpoint, cx);
    }
}

#[cfg(test)]
mod tests;
