//! Acknowledges held bytes on behalf of the receiver, and delivers them with retransmissions (RFC 3135, 2.4: a split
//! connection, but only while bytes are held).

use palisade_abi::Reason;

use super::{
    super::{
        half::{Position, START},
        segment::OutSegment,
        shared::TcpCx,
        side::Side,
    },
    Connection, FIRST_TRY, TRIES,
};
use crate::{Sink, record::Verdict};

/// Maximum number of packets in flight when lost bytes are retransmitted.
const AGAIN: u64 = 8;
/// Detail of the record when the receiver acknowledges none of the retransmissions.
const UNDELIVERED: &str = "Bytes acknowledged on behalf of the receiver cannot be delivered";

impl<F> Connection<F> {
    /// Acknowledges the held bytes of one side on behalf of the receiver, and returns their frames to the caller of the
    /// engine. The bytes are kept in memory, and are later delivered in generated packets.
    pub(super) fn ack_on_behalf<S: Sink<F>>(&mut self, side: Side, cx: &mut TcpCx<'_, F, S>) {
        let half = &mut self.halves[side];
        half.ack_at = None;
        if half.next <= half.proxy_acked || half.held.is_empty() || !half.is_contiguous() {
            return;
        }
        half.proxy_acked = half.next;
        while let Some(held) = half.held.pop_front_if(|held| held.end <= half.proxy_acked) {
            cx.sink.absorb(held.frame);
        }
        self.acknowledge(side, cx);
        // The inspector has possibly allowed the first bytes already.
        self.deliver(side, cx);
    }

    /// Sends one side an acknowledgement of all its bytes that the receiver, or the worker on its behalf, has
    /// acknowledged.
    pub(super) fn acknowledge<S: Sink<F>>(&self, side: Side, cx: &mut TcpCx<'_, F, S>) {
        cx.shared.stats.acknowledged += 1;
        let (own, other) = (&self.halves[side], &self.halves[side.other()]);
        let shift = self.scale_of(side.other());
        let window = self.right_edge(side, own.proxy_acked).min(own.edge);
        let window = window.saturating_sub(own.proxy_acked) >> shift;
        let segment = OutSegment {
            seq: other.seq(other.sent),
            ack: Some(own.seq(own.proxy_acked)),
            window: window.min(u64::from(u16::MAX)) as u16,
            timestamp: self.timestamp(side),
            ..OutSegment::default()
        };
        self.emit(side, &segment, cx);
    }

    /// Returns a segment from `side` with `payload` at position `at`.
    fn data_segment<'p>(&self, side: Side, at: Position, payload: &'p [u8]) -> OutSegment<'p> {
        let (own, receiver) = (&self.halves[side], &self.halves[side.other()]);
        OutSegment {
            seq: own.seq(at),
            ack: Some(receiver.seq(receiver.proxy_acked.max(START + 1))),
            window: own.window,
            timestamp: self.timestamp(side.other()),
            payload,
            ..OutSegment::default()
        }
    }

    /// Returns the maximum payload of a generated packet to `to`, bytes.
    fn payload_to(&self, to: Side) -> usize {
        self.halves[to].payload_size(self.has_timestamps())
    }

    /// Sends one generated packet with bytes of `side` that were acknowledged on behalf of the receiver, beginning at
    /// position `from`. Returns the number of bytes sent.
    fn send_acknowledged<S: Sink<F>>(&self, side: Side, from: Position, cx: &mut TcpCx<'_, F, S>) -> u64 {
        let payload = self.halves[side].undelivered(from, self.payload_to(side.other()));
        if payload.is_empty() {
            return 0;
        }
        self.emit(side.other(), &self.data_segment(side, from, payload), cx);
        cx.shared.stats.delivered += 1;
        payload.len() as u64
    }

    /// Forwards the allowed bytes of a held packet whose last bytes have no verdict yet. If the generated packet is
    /// lost, the sender recovers the bytes: it retransmits its packet until all of it is acknowledged.
    ///
    /// Does nothing if two policies inspect the packets, because the inspector of the second policy would not see the
    /// generated packet.
    pub(super) fn split<S: Sink<F>>(&mut self, side: Side, cx: &mut TcpCx<'_, F, S>) {
        self.send_allowed_start(side, cx);
        while let Some((from, to)) = self.halves[side].part().filter(|_| !self.is_shared) {
            let part = self.halves[side].bytes(from, to);
            if part.is_empty() {
                return;
            }
            let mut bytes = std::mem::take(&mut cx.shared.part);
            bytes.clear();
            bytes.extend_from_slice(part);
            self.send_part(side, from, &bytes, cx);
            cx.shared.part = bytes;
        }
    }

    /// Forwards the allowed bytes at the beginning of the segment that the inspector has just seen, if the segment is
    /// still held. [`Connection::split`] forwards those that a [`Half`](super::super::half::Half) keeps.
    pub(super) fn send_allowed_start<S: Sink<F>>(&mut self, side: Side, cx: &mut TcpCx<'_, F, S>) {
        let Some((at, bytes)) = cx.shared.start.take(side) else {
            return;
        };
        if self.halves[side].held.iter().any(|held| held.start == at) {
            self.send_part(side, at, &bytes, cx);
        }
        cx.shared.start.give_back(bytes);
    }

    /// Sends bytes of `side` in generated packets, beginning at position `from`.
    pub(super) fn send_part<S: Sink<F>>(
        &mut self,
        side: Side,
        from: Position,
        bytes: &[u8],
        cx: &mut TcpCx<'_, F, S>,
    ) {
        let mut at = from;
        for payload in bytes.chunks(self.payload_to(side.other())) {
            self.emit(side.other(), &self.data_segment(side, at, payload), cx);
            cx.shared.stats.split += 1;
            at += payload.len() as u64;
        }
        let own = &mut self.halves[side];
        own.sent = own.sent.max(at);
    }

    /// Sends the bytes of `side` that were acknowledged on behalf of the receiver, may be forwarded and were not sent yet.
    /// Bytes that may be forwarded before their verdict are sent too: their message can be longer than the window of the
    /// receiver, and would otherwise never be complete.
    pub(super) fn deliver<S: Sink<F>>(&mut self, side: Side, cx: &mut TcpCx<'_, F, S>) {
        loop {
            let half = &self.halves[side];
            if half.sent >= half.proxy_acked.min(half.forward_limit()) {
                return;
            }
            let n = self.send_acknowledged(side, half.sent, cx);
            if n == 0 {
                return;
            }
            self.halves[side].sent += n;
        }
    }

    /// Retransmits bytes of `side` that were acknowledged on behalf of the receiver, after a timeout. From the second
    /// timeout on the packets are smaller, since a link can drop large packets without an ICMP error (RFC 2923, 2.1).
    /// After `TRIES` retransmissions the connection is aborted.
    pub(super) fn retransmit<S: Sink<F>>(&mut self, side: Side, cx: &mut TcpCx<'_, F, S>) {
        let Some((_, tries)) = self.halves[side].again.filter(|(at, _)| *at <= cx.now) else {
            return;
        };
        if tries >= TRIES {
            self.halves[side].again = None;
            self.report_end(Verdict::Dropped, Reason::InspectDeadline, UNDELIVERED, cx);
            self.abort(Reason::InspectDeadline, cx);
            return;
        }
        if tries > 0 {
            let is_ipv6 = self.link_to(side.other()).is_some_and(|link| link.is_ipv6());
            self.halves[side.other()].shrink(is_ipv6);
        }
        cx.shared.stats.repeated += 1;
        self.halves[side].lose();
        let is_sent = self.recover(side, cx);
        self.halves[side].again = is_sent.then(|| (cx.now + (FIRST_TRY << (tries + 1)), tries + 1));
    }

    /// Retransmits bytes that are presumed lost, at most [`AGAIN`] packets ahead of the receiver's acknowledgement.
    /// Returns whether anything was sent.
    pub(super) fn recover<S: Sink<F>>(&mut self, side: Side, cx: &mut TcpCx<'_, F, S>) -> bool {
        let half = &self.halves[side];
        let start = half.acked.max(START + 1);
        let size = self.halves[side.other()].payload_size(false) as u64;
        let end = half.lost.min(half.delivered()).min(start + AGAIN * size);
        let from = half.resent.max(start);
        let mut at = from;
        while at < end {
            let n = self.send_acknowledged(side, at, cx);
            if n == 0 {
                break;
            }
            at += n;
        }
        self.halves[side].resent = at;
        at > from
    }

    /// Continues the retransmission of lost bytes, and sets the timers for retransmissions and for acknowledgements on
    /// behalf of a receiver. Acknowledges at once if too many packets are held.
    pub(super) fn arm<S: Sink<F>>(&mut self, cx: &mut TcpCx<'_, F, S>) {
        for side in Side::BOTH {
            // Bytes are acknowledged once half of the permitted number of packets is held, because further packets need
            // room until the acknowledgement reaches the sender.
            let most = cx.shared.limits.frames_per_direction / 2;
            if self.halves[side].is_recovering() {
                self.recover(side, cx);
            }
            let is_shared = self.is_shared;
            let of_capture = cx.shared.limits.of_capture;
            let half = &mut self.halves[side];
            if half.delivered() > half.acked.max(START + 1) && !of_capture {
                half.again.get_or_insert((cx.now + FIRST_TRY, 0));
            }
            if is_shared || half.held.is_empty() || half.next <= half.proxy_acked {
                half.ack_at = None;
            } else if half.held.len() > most {
                self.ack_on_behalf(side, cx);
            } else if half.ack_at.is_none() && !of_capture {
                half.ack_at = Some(cx.now + cx.shared.limits.acknowledge);
            }
        }
    }
}
