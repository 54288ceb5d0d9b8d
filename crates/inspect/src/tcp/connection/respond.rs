//! Responds to one end in the other end's place, and ends the connection for both.

use super::{
    super::{
        segment::{Arrived, OutSegment},
        shared::TcpCx,
    },
    Connection, Phase,
    phase::{Closing, FIRST_TRY, Response, TRIES},
};
use crate::Sink;

/// Maximum number of bytes that an end may still send after the response. If it sends more, it is reset.
const SPILL: u64 = 1 << 20;

impl<F> Connection<F> {
    /// Sends the response once all earlier bytes of both ends are delivered and acknowledged.
    pub(super) fn respond_when_due<S: Sink<F>>(&mut self, cx: &mut TcpCx<'_, F, S>) {
        if let Phase::Responding(response) = &self.phase {
            let before = &self.halves[response.to.other()];
            // Allowed bytes that have not arrived yet belong to a message before the response.
            if before.acked < before.sent || before.allowed > before.next {
                return;
            }
            // The allowed bytes from the receiver of the response are delivered first, because they are not
            // retransmitted after the response.
            let own = &self.halves[response.to];
            if own.acked < own.sent {
                return;
            }
        }
        match std::mem::replace(&mut self.phase, Phase::Open) {
            Phase::Responding(response) => self.respond(response, cx),
            other => self.phase = other,
        }
    }

    /// Sends the response and a FIN to its receiver, and a FIN to the other end.
    fn respond<S: Sink<F>>(&mut self, mut response: Box<Response>, cx: &mut TcpCx<'_, F, S>) {
        cx.shared.stats.answered += 1;
        let (own, other) = (&self.halves[response.to], &self.halves[response.to.other()]);
        response.start = other.sent;
        response.other = Closing {
            fin: own.sent,
            next: other.acked,
            first: other.acked,
            done: false,
        };
        response.next = own.next + u64::from(own.fin.is_some_and(|fin| fin == own.next));
        response.first = response.next;
        response.again = cx.now + FIRST_TRY;
        self.close(response.reason, cx);
        self.halves[response.to].next = response.next;
        self.send_response(&response, cx);
        self.send_fin(&response, cx);
        self.phase = Phase::Responded(response);
    }

    /// Sends the response if it has waited too long for an acknowledgement of earlier bytes, or retransmits a response
    /// that was sent.
    pub(super) fn retransmit_response<S: Sink<F>>(&mut self, cx: &mut TcpCx<'_, F, S>) {
        match std::mem::replace(&mut self.phase, Phase::Open) {
            Phase::Responding(response) if response.again <= cx.now => {
                let before = &self.halves[response.to.other()];
                // The response would continue the message before it.
                if before.allowed > before.next {
                    self.abort(response.reason, cx);
                } else {
                    self.respond(response, cx);
                }
            }
            Phase::Responded(mut response) if response.tries < TRIES && response.again <= cx.now => {
                response.tries += 1;
                response.holds_fin = false;
                response.again = cx.now + (FIRST_TRY << response.tries);
                if response.tries > 1 {
                    let is_ipv6 = self.link_to(response.to).is_some_and(|link| link.is_ipv6());
                    self.halves[response.to].shrink(is_ipv6);
                }
                self.send_response(&response, cx);
                self.send_fin(&response, cx);
                self.phase = Phase::Responded(response);
            }
            other => self.phase = other,
        }
    }

    /// Sends the part of the response that its receiver has not acknowledged, and a FIN after it.
    pub(super) fn send_response<S: Sink<F>>(&self, response: &Response, cx: &mut TcpCx<'_, F, S>) {
        let to = response.to;
        let (from, own) = (&self.halves[to.other()], &self.halves[to]);
        let timestamp = self.timestamp(to);
        let length = own.payload_size(timestamp.is_some());
        let done = from.acked.saturating_sub(response.start) as usize;
        let Some(mut rest) = response.bytes.get(done..) else {
            return;
        };
        let mut at = response.start + done as u64;
        loop {
            let (payload, later) = rest.split_at_checked(length).unwrap_or((rest, &[]));
            let segment = OutSegment {
                seq: from.seq(at),
                ack: Some(own.seq(response.next)),
                window: from.window,
                fin: later.is_empty() && !response.holds_fin,
                timestamp,
                payload,
                ..OutSegment::default()
            };
            self.emit(to, &segment, cx);
            if later.is_empty() {
                return;
            }
            at += payload.len() as u64;
            rest = later;
        }
    }

    /// Sends a FIN to the end that gets no response, as if the receiver of the response had closed the connection.
    fn send_fin<S: Sink<F>>(&self, response: &Response, cx: &mut TcpCx<'_, F, S>) {
        if response.other.done {
            return;
        }
        let (to, own) = (response.to.other(), &self.halves[response.to]);
        let is_ended = own.fin.is_some_and(|fin| response.other.fin > fin);
        let segment = OutSegment {
            seq: own.seq(response.other.fin),
            ack: Some(self.halves[to].seq(response.other.next)),
            window: own.window,
            fin: !is_ended,
            timestamp: self.timestamp(to),
            ..OutSegment::default()
        };
        self.emit(to, &segment, cx);
    }

    /// Handles a packet of a connection whose response was sent: drops it and acknowledges its bytes, so that both ends
    /// can close without a reset. Only an end that sends more than `SPILL` bytes is reset.
    pub(super) fn receive_after_response<S: Sink<F>>(
        &mut self,
        arrived: &Arrived<'_, '_>,
        frame: F,
        cx: &mut TcpCx<'_, F, S>,
    ) {
        let Phase::Responded(mut response) = std::mem::replace(&mut self.phase, Phase::Open) else {
            return;
        };
        cx.sink.discard(frame, response.reason);
        let is_aborted = if arrived.side == response.to {
            self.receive_from_recipient(arrived, &mut response, cx)
        } else {
            self.receive_from_other(arrived, &mut response, cx);
            false
        };
        self.phase = if is_aborted {
            Phase::Aborted(response.reason)
        } else {
            Phase::Responded(response)
        };
    }

    /// Handles a packet of the receiver of the response. Returns whether the connection is aborted.
    fn receive_from_recipient<S: Sink<F>>(
        &mut self,
        arrived: &Arrived<'_, '_>,
        response: &mut Response,
        cx: &mut TcpCx<'_, F, S>,
    ) -> bool {
        let (side, segment) = (arrived.side, arrived.segment);
        if segment.is_rst() {
            return true;
        }
        let (own, from) = self.halves.pair_mut(side);
        if let Some((value, _)) = segment.options.timestamp
            && value.wrapping_sub(own.recent) as i32 > 0
        {
            own.recent = value;
        }
        let end = response.end_of(side.other());
        let acked = from.position(segment.ack);
        if segment.is_ack() && acked <= end {
            from.acked = from.acked.max(acked);
        }
        if from.acked >= end {
            response.tries = TRIES;
        }
        let start = own.position(segment.seq);
        let behind = start + segment.payload.len() as u64 + u64::from(segment.is_fin());
        if behind == start {
            return false;
        }
        if start <= response.next && behind > response.next {
            response.next = behind;
            own.next = behind;
        }
        if response.next - response.first > SPILL {
            self.reset_to(side, cx);
            return true;
        }
        let (own, from) = (&self.halves[side], &self.halves[side.other()]);
        let ack = OutSegment {
            seq: from.seq(end),
            ack: Some(own.seq(response.next)),
            window: from.window,
            timestamp: self.timestamp(side),
            ..OutSegment::default()
        };
        self.emit(side, &ack, cx);
        false
    }

    /// Handles a packet of the end that gets no response.
    fn receive_from_other<S: Sink<F>>(
        &self,
        arrived: &Arrived<'_, '_>,
        response: &mut Response,
        cx: &mut TcpCx<'_, F, S>,
    ) {
        let (side, segment) = (arrived.side, arrived.segment);
        let closing = &mut response.other;
        if segment.is_rst() || segment.is_syn() {
            closing.done |= segment.is_rst();
            return;
        }
        let (own, other) = (&self.halves[side.other()], &self.halves[side]);
        if segment.is_ack() && own.position(segment.ack) > closing.fin {
            closing.done = true;
        }
        let start = other.position(segment.seq);
        let behind = start + segment.payload.len() as u64 + u64::from(segment.is_fin());
        if behind == start {
            return;
        }
        if start <= closing.next && behind > closing.next {
            closing.next = behind;
        }
        let ack = OutSegment {
            seq: own.seq(closing.fin + 1),
            ack: Some(other.seq(closing.next)),
            window: own.window,
            rst: closing.next - closing.first > SPILL,
            timestamp: self.timestamp(side),
            ..OutSegment::default()
        };
        self.emit(side, &ack, cx);
    }
}
