//! What was acknowledged here is this end's to deliver.

use palisade_abi::Reason;

use super::{
    super::{
        Shared, Side,
        half::{Position, START},
        segment::Make,
    },
    Connection, FIRST_TRY, TRIES,
};
use crate::{Millis, Sink, record::Verdict};

/// Packets of one direction that are sent again at once.
const AGAIN: u64 = 8;
/// What the record says of a connection that was cut because of that.
const UNDELIVERED: &str = "What was acknowledged for the receiver does not reach it";

impl<F> Connection<F> {
    /// Acknowledges to a side what it has sent and what is held of that: it may wait for it (see the module). The
    /// packets are not needed any more then.
    pub(super) fn ack_on_behalf<S: Sink<F>>(&mut self, side: Side, shared: &mut Shared, sink: &mut S) {
        let half = &mut self.halves[side as usize];
        half.promise_at = None;
        if half.next <= half.proxy_acked || half.held.is_empty() || !half.is_contiguous() {
            return;
        }
        half.proxy_acked = half.next;
        while let Some(held) = half.held.front()
            && held.end <= half.proxy_acked
            && let Some(held) = half.held.pop_front()
        {
            sink.absorb(held.frame);
        }
        self.acknowledge(side, shared, sink);
        // A part of it may go already.
        self.deliver(side, shared, sink);
    }

    /// Says to a side what was acknowledged to it here.
    pub(super) fn acknowledge<S: Sink<F>>(&self, side: Side, shared: &mut Shared, sink: &mut S) {
        shared.stats.acknowledged += 1;
        let (own, other) = (&self.halves[side as usize], &self.halves[side.other() as usize]);
        let scales = self.halves.iter().all(|half| half.scale.is_some());
        let shift = other.scale.filter(|_| scales).unwrap_or(0);
        let window = own.edge.saturating_sub(own.proxy_acked) >> shift;
        let make = Make {
            seq: other.seq(other.sent),
            ack: Some(own.seq(own.proxy_acked)),
            window: window.min(u64::from(u16::MAX)) as u16,
            timestamp: self.timestamp(side),
            ..Make::default()
        };
        self.emit(side, &make, shared, sink);
    }

    /// One packet of what a side was told has come, from a position on. How many bytes it has.
    pub(super) fn deliver_missing<S: Sink<F>>(
        &self,
        side: Side,
        from: Position,
        shared: &mut Shared,
        sink: &mut S,
    ) -> u64 {
        let to = side.other();
        let (own, receiver) = (&self.halves[side as usize], &self.halves[to as usize]);
        let timestamp = self.timestamp(to);
        let payload = own.undelivered(from, receiver.payload_size(timestamp.is_some()));
        if payload.is_empty() {
            return 0;
        }
        let make = Make {
            seq: own.seq(from),
            ack: Some(receiver.seq(receiver.proxy_acked.max(START + 1))),
            window: own.window,
            timestamp,
            payload,
            ..Make::default()
        };
        self.emit(to, &make, shared, sink);
        shared.stats.delivered += 1;
        payload.len() as u64
    }

    /// Sends on the bytes of a packet that may go while the rest of it may not. They stay the sender's to deliver: it
    /// sends the packet again until all of it is acknowledged.
    ///
    /// Not if another policy has its packets read too: it would not see what is made here.
    pub(super) fn split<S: Sink<F>>(&mut self, side: Side, shared: &mut Shared, sink: &mut S) {
        while let Some((from, to)) = self.halves[side as usize].part().filter(|_| !self.is_shared) {
            let n = self.halves[side as usize].bytes(from, to).len();
            if n == 0 {
                return;
            }
            let mut bytes = std::mem::take(&mut shared.part);
            bytes.clear();
            bytes.extend_from_slice(self.halves[side as usize].bytes(from, to));
            self.send_part(side, from, &bytes, shared, sink);
            shared.part = bytes;
        }
    }

    /// Sends bytes of a side's packet on in packets made here.
    pub(super) fn send_part<S: Sink<F>>(
        &mut self,
        side: Side,
        from: Position,
        bytes: &[u8],
        shared: &mut Shared,
        sink: &mut S,
    ) {
        let to = side.other();
        let timestamp = self.timestamp(to);
        let (own, receiver) = (&self.halves[side as usize], &self.halves[to as usize]);
        let mut at = from;
        for payload in bytes.chunks(receiver.payload_size(timestamp.is_some())) {
            let make = Make {
                seq: own.seq(at),
                ack: Some(receiver.seq(receiver.proxy_acked.max(START + 1))),
                window: own.window,
                timestamp,
                payload,
                ..Make::default()
            };
            self.emit(to, &make, shared, sink);
            shared.stats.split += 1;
            at += payload.len() as u64;
        }
        let own = self.half(side);
        own.sent = own.sent.max(at);
    }

    /// Sends on what was promised and may go.
    pub(super) fn deliver<S: Sink<F>>(&mut self, side: Side, shared: &mut Shared, sink: &mut S) {
        loop {
            let half = &self.halves[side as usize];
            if half.sent >= half.proxy_acked.min(half.judged) {
                return;
            }
            let n = self.deliver_missing(side, half.sent, shared, sink);
            if n == 0 {
                return;
            }
            self.half(side).sent += n;
        }
    }

    /// Sends again what was promised and has not been acknowledged in time: smaller from the second time on, since the
    /// path may not take packets of that size and not say so (RFC 2923, 2.1).
    pub(super) fn deliver_again<S: Sink<F>>(
        &mut self,
        now: Millis,
        side: Side,
        shared: &mut Shared,
        sink: &mut S,
    ) {
        let half = &self.halves[side as usize];
        let Some((_, tries)) = half.again.filter(|(at, _)| *at <= now) else {
            return;
        };
        if tries >= TRIES {
            self.half(side).again = None;
            self.tell(Verdict::Dropped, Reason::InspectDeadline, UNDELIVERED, sink);
            self.abort(Reason::InspectDeadline, shared, sink);
            return;
        }
        if tries > 0 {
            let is_ipv6 = self.link_to(side.other()).is_some_and(|link| link.is_ipv6());
            self.half(side.other()).shrink(is_ipv6);
        }
        shared.stats.repeated += 1;
        self.half(side).lose();
        let sent = self.recover(side, shared, sink);
        self.half(side).again = sent.then(|| (now + (FIRST_TRY << (tries + 1)), tries + 1));
    }

    /// Sends again what may have been lost of what was promised, a few packets ahead of what the receiver has
    /// acknowledged. Returns whether anything was sent.
    pub(super) fn recover<S: Sink<F>>(&mut self, side: Side, shared: &mut Shared, sink: &mut S) -> bool {
        let half = &self.halves[side as usize];
        let start = half.acked.max(START + 1);
        let end = half.lost.min(half.delivered());
        let size = self.halves[side.other() as usize].payload_size(false) as u64;
        let end = end.min(start + AGAIN * size);
        let from = half.resent.max(start);
        let mut at = from;
        while at < end {
            let n = self.deliver_missing(side, at, shared, sink);
            if n == 0 {
                break;
            }
            at += n;
        }
        self.half(side).resent = at;
        at > from
    }

    /// Sets the clocks of what is held and of what is owed.
    pub(super) fn arm<S: Sink<F>>(&mut self, now: Millis, shared: &mut Shared, sink: &mut S) {
        for side in [Side::Client, Side::Server] {
            let most = shared.limits.frames_per_direction / 2;
            let is_shared = self.is_shared;
            if self.halves[side as usize].is_recovering() {
                self.recover(side, shared, sink);
            }
            let half = self.half(side);
            if half.delivered() > half.acked.max(START + 1) {
                half.again.get_or_insert((now + FIRST_TRY, 0));
            }
            if is_shared || half.held.is_empty() || half.next <= half.proxy_acked {
                half.promise_at = None;
            } else if half.held.len() > most {
                self.ack_on_behalf(side, shared, sink);
            } else if half.promise_at.is_none() {
                half.promise_at = Some(now + shared.limits.acknowledge);
            }
        }
    }
}
