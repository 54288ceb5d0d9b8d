//! RST: resets that arrive (RFC 9293, 3.10.7.4, "second, check the RST bit"; RFC 5961, 3.2), and generated resets.

use palisade_abi::{Reason, flow_op};

use super::{
    super::{
        half::START,
        segment::{Arrived, Link, OutSegment, Segment},
        shared::TcpCx,
        side::Side,
    },
    Announcement, Connection, Phase,
};
use crate::{PacketView, Sink};

impl<F> Connection<F> {
    /// Handles a reset. If its receiver is in SYN-SENT, the reset is forwarded only if it acknowledges the SYN. In any
    /// other state, the receiver accepts only the sequence number that it expects next (RFC 5961, 3.2). So the reset is
    /// forwarded if its sequence number can be that one: not below the acknowledged bytes and not beyond the forwarded
    /// ones. A reset that follows held bytes is replaced by a generated one.
    ///
    /// # Errors
    /// Returns the frame and the reason if the reset is neither forwarded nor replaced, so that the caller drops it.
    pub(super) fn reset<S: Sink<F>>(
        &mut self,
        arrived: &Arrived<'_, '_>,
        frame: F,
        cx: &mut TcpCx<'_, F, S>,
    ) -> Result<(), (Reason, F)> {
        let (side, segment) = (arrived.side, arrived.segment);
        let (own, other) = (&self.halves[side], &self.halves[side.other()]);
        if own.isn.is_none() {
            // In SYN-SENT a reset counts only if it acknowledges the SYN (RFC 9293, 3.10.7.3).
            let acks_syn =
                other.isn.is_some() && segment.is_ack() && other.position(segment.ack) == START + 1;
            if !acks_syn {
                return Err((Reason::TcpOutOfWindow, frame));
            }
            self.is_reset = true;
            self.closed = Announcement::Next;
            self.release(frame, cx);
            return Ok(());
        }
        let position = own.position(segment.seq);
        if (own.acked..=own.sent).contains(&position) {
            self.is_reset = true;
            // With bytes in flight, the receiver possibly expects another sequence number and answers with a challenge
            // ACK (RFC 5961, 3.2). The connection can then continue, so its end is not reported.
            if own.acked == own.sent && self.closed == Announcement::No {
                self.closed = Announcement::Next;
            } else {
                // The challenge ACK must not stay in the programs.
                self.suspend_windows();
            }
            self.release(frame, cx);
            return Ok(());
        }
        if position != own.highest && own.fin.is_none_or(|fin| position != fin + 1) {
            return Err((Reason::TcpOutOfWindow, frame));
        }
        // The reset follows held bytes, which the receiver does not have, so the receiver would not accept its sequence
        // number. A reset with the sequence number after the last forwarded byte is sent instead.
        cx.sink.discard(frame, Reason::TcpHeld);
        self.reset_to(side.other(), cx);
        self.is_reset = true;
        self.end(Reason::TcpHeld, cx);
        Ok(())
    }

    /// Resets the connection at both ends.
    pub(super) fn abort<S: Sink<F>>(&mut self, reason: Reason, cx: &mut TcpCx<'_, F, S>) {
        if matches!(self.phase, Phase::Aborted(_)) {
            return;
        }
        cx.shared.stats.cut += 1;
        self.reset_to(Side::Client, cx);
        self.reset_to(Side::Server, cx);
        self.end(reason, cx);
    }

    /// Drops the held packets and reports the end of the connection to the BPF programs.
    fn end<S: Sink<F>>(&mut self, reason: Reason, cx: &mut TcpCx<'_, F, S>) {
        self.phase = Phase::Aborted(reason);
        self.close(reason, cx);
        self.closed = Announcement::Sent;
        cx.sink.command(&self.flow_command(flow_op::CLOSE));
    }

    /// Sends a reset to one end, as if from the other end.
    pub(super) fn reset_to<S: Sink<F>>(&self, to: Side, cx: &mut TcpCx<'_, F, S>) {
        let (from, own) = (&self.halves[to.other()], &self.halves[to]);
        if to == Side::Server && from.sent == from.acked && own.isn.is_none() {
            return;
        }
        let segment = OutSegment {
            seq: from.isn.map_or(0, |_| from.seq(from.sent)),
            ack: own.isn.map(|_| own.seq(own.next)),
            rst: true,
            ..OutSegment::default()
        };
        self.emit(to, &segment, cx);
    }

    /// Answers a packet with a reset, as an end without that connection does (RFC 9293, 3.10.7.1). A reset gets no
    /// answer.
    pub(in crate::tcp) fn refuse<S: Sink<F>>(view: &PacketView<'_>, cx: &mut TcpCx<'_, F, S>) {
        if let (Some(link), Some(segment)) = (Link::of(view), Segment::read(view))
            && !segment.is_rst()
        {
            let length =
                segment.payload.len() as u32 + u32::from(segment.is_syn()) + u32::from(segment.is_fin());
            let reset = OutSegment {
                seq: if segment.is_ack() { segment.ack } else { 0 },
                ack: (!segment.is_ack()).then(|| segment.seq.wrapping_add(length)),
                rst: true,
                ..OutSegment::default()
            };
            cx.emit(&link.reversed(), &reset);
        }
    }

    /// Resets, at both ends, a connection of which only the packet of `view` is known. Returns false if the receiver of
    /// the packet gets a probe first.
    ///
    /// A reset is accepted only if its sequence number is exactly the one that its receiver expects (RFC 5961, 3.2).
    /// For the sender of the packet that is the acknowledgement number of the packet. The number that the receiver of
    /// the packet expects is not known, because the packet can be a retransmission. So if the packet occupies sequence
    /// space, the receiver gets an empty segment with a sequence number below its window, and answers with an
    /// acknowledgement (RFC 9293, 3.10.7.4), or with a reset if it has no such connection. That acknowledgement is
    /// punted too. It occupies no sequence space and has both numbers, so both ends are reset then. If the probe is
    /// lost, the sender's retransmission causes another probe.
    pub(in crate::tcp) fn reset_unknown<S: Sink<F>>(view: &PacketView<'_>, cx: &mut TcpCx<'_, F, S>) -> bool {
        let (Some(link), Some(segment)) = (Link::of(view), Segment::read(view)) else {
            return true;
        };
        let is_plain_ack = segment.is_ack() && !segment.is_syn() && !segment.is_rst();
        if is_plain_ack && (segment.is_fin() || !segment.payload.is_empty()) {
            let probe = OutSegment {
                seq: segment.seq.wrapping_sub(1),
                ack: Some(segment.ack),
                window: segment.window,
                // A receiver can drop a segment without timestamps or with older ones (RFC 7323, 3.2 and 5.3).
                timestamp: segment.options.timestamp,
                ..OutSegment::default()
            };
            cx.emit(&link, &probe);
            return false;
        }
        Self::refuse(view, cx);
        // An empty segment can be a keepalive probe, whose sequence number is one below the expected one (RFC 9293,
        // 3.8.4).
        for more in 0..=u32::from(is_plain_ack) {
            let reset = OutSegment {
                seq: segment.seq.wrapping_add(more),
                ack: segment.is_ack().then_some(segment.ack),
                rst: true,
                ..OutSegment::default()
            };
            cx.emit(&link, &reset);
        }
        true
    }
}
