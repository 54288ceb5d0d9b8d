//! What a planned restart hands over of a DNS connection.

use super::{Flow, Streams};
use crate::{
    Millis, Sink,
    context::Cx,
    handover::{
        Entries, Kind,
        wire::{Reader, Wire},
    },
    tcp::Transferable,
};

impl Transferable for Flow {
    fn write(&self, out: &mut Vec<u8>) -> bool {
        self.is_shared.write(out);
        self.asked.write(out);
        self.leaving.write(out);
        self.sent.write(out);
        self.answered.write(out);
        self.forwarded.write(out);
        self.rest.write(out);
        // An answer whose addresses are being committed, a refused query, and a zone transfer are not handed over.
        self.answers.is_empty()
            && self.inspected == self.forwarded
            && self.refused.is_none()
            && self.transfers.is_empty()
            && self.broken.is_none()
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        let mut flow = Self::new(0);
        flow.is_shared = Wire::read(from)?;
        flow.asked = Wire::read(from)?;
        flow.leaving = Wire::read(from)?;
        flow.sent = Wire::read(from)?;
        flow.answered = Wire::read(from)?;
        flow.forwarded = Wire::read(from)?;
        flow.inspected = flow.forwarded;
        flow.rest = Wire::read(from)?;
        Some(flow)
    }
}

impl<F> Streams<F> {
    /// Writes the connections that can be handed over.
    pub(crate) fn hand_over<S: Sink<F>>(&mut self, into: &mut Entries, cx: &mut Cx<'_, F, S>) {
        self.connections.hand_over(Kind::DNS, into, cx);
    }

    /// Takes a connection over. Returns whether it was taken over.
    pub(crate) fn take_over(&mut self, bytes: &[u8], now: Millis) -> bool {
        let Self { connections, numbers } = self;
        connections.take_over(bytes, now, |flow| {
            *numbers += 1;
            flow.number = *numbers;
        })
    }

    /// Takes an offloaded connection over. Returns whether the bytes are one.
    pub(crate) fn take_over_offloaded(&mut self, bytes: &[u8]) -> bool {
        self.connections.take_over_offloaded(bytes)
    }
}
