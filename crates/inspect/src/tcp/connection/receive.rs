//! Handles a segment that arrives (RFC 9293, 3.10.7.4, in the order of the RFC). SYN and RST have their own files.
//!
//! A segment is checked against the acknowledgements and windows of its receiver. Where TCP implementations differ, the
//! strictest one is assumed: a dropped segment is retransmitted, but a wrongly accepted one could carry bytes that the
//! receiver discards.

use palisade_abi::Reason;

use super::{
    super::{
        half::{Arrival, Held, Position},
        segment::{Arrived, Link},
        shared::TcpCx,
        side::Side,
    },
    Connection, Phase,
};
use crate::Sink;

/// Sequence space of a segment.
#[derive(Clone, Copy)]
struct Extent {
    /// Position of the first byte.
    start: Position,
    /// Position after the last data byte.
    end: Position,
    /// Position after the last data byte or the FIN.
    behind: Position,
}

impl Extent {
    const fn is_empty(self) -> bool {
        self.behind == self.start
    }
}

/// Result of the checks of a segment.
enum Checked {
    /// The segment is acceptable. It acknowledges the stream of the other end up to this position.
    Acceptable(Extent, Position),
    /// The segment acknowledges bytes that another policy's inspector has sent.
    AcksOtherInspector,
}

impl<F> Connection<F> {
    /// Handles a segment. Returns whether [`Connection::inspect`] must run.
    ///
    /// # Errors
    /// Returns the frame and the reason if the caller must reject the segment ([`Connection::reject`]).
    pub(super) fn receive<S: Sink<F>>(
        &mut self,
        arrived: &Arrived<'_, '_>,
        frame: F,
        cx: &mut TcpCx<'_, F, S>,
    ) -> Result<bool, (Reason, F)> {
        if arrived.segment.is_syn() {
            return self.open(arrived, frame, cx).map(|()| false);
        }
        if arrived.segment.is_rst() {
            return self.reset(arrived, frame, cx).map(|()| false);
        }
        let (at, acked) = match self.check(arrived, cx.shared.limits.of_capture) {
            Ok(Checked::Acceptable(at, acked)) => (at, acked),
            Ok(Checked::AcksOtherInspector) => {
                // The inspector of the other policy has presumably responded in the server's place and needs the
                // acknowledgement. Forwarding the segment is harmless in any case, because the server drops a segment
                // that acknowledges more than it has sent.
                self.is_reset = true;
                self.suspend_windows();
                self.release(frame, cx);
                return Ok(false);
            }
            Err(reason) => {
                // The segment can be within a window that the worker has not seen.
                if let Some(end) = self.end_of(arrived) {
                    self.suspend_for_acks(arrived.side, end, cx);
                }
                return Err((reason, frame));
            }
        };
        self.take_ack(arrived, acked);
        if !at.is_empty() {
            self.suspend_for_acks(arrived.side, at.behind, cx);
        }
        if let Some(window) = self.limited_window(arrived.side, acked) {
            cx.sink.limit_window(&frame, window);
        }
        // A response can become due because more is acknowledged.
        let progress = matches!(self.phase, Phase::Responding(_));
        if at.is_empty() {
            self.release(frame, cx);
            return Ok(progress);
        }
        if self.contradicts_fin(arrived, at) {
            return Err((Reason::TcpOverlap, frame));
        }
        if at.start < self.halves[arrived.side].acked {
            return self.on_retransmission(arrived, at, frame, cx);
        }
        self.accept_data(arrived, at, frame, cx)
    }

    /// Checks the sequence number, the acknowledgement and the timestamp of a segment.
    #[inline(always)]
    fn check(&mut self, arrived: &Arrived<'_, '_>, of_capture: bool) -> Result<Checked, Reason> {
        let at = self.check_sequence(arrived)?;
        let Some(acked) = self.check_ack(arrived, of_capture)? else {
            return Ok(Checked::AcksOtherInspector);
        };
        self.check_timestamp(arrived, at.start)?;
        Ok(Checked::Acceptable(at, acked))
    }

    /// "First, check sequence number": a segment is acceptable if it lies in the window that the receiver has offered,
    /// or below the window but not below `Half::oldest`. One byte beyond the window is accepted too, as a zero-window
    /// probe (RFC 9293, 3.8.6.1).
    #[inline]
    fn check_sequence(&self, arrived: &Arrived<'_, '_>) -> Result<Extent, Reason> {
        let (own, other) = (&self.halves[arrived.side], &self.halves[arrived.side.other()]);
        let segment = arrived.segment;
        // In the synchronized states every segment carries an ACK; a segment without ACK is dropped.
        if own.isn.is_none() || other.isn.is_none() || !segment.is_ack() {
            return Err(Reason::TcpInvalid);
        }
        let start = own.position(segment.seq);
        let end = start + segment.payload.len() as u64;
        let behind = end + u64::from(segment.is_fin());
        if start < own.oldest() || behind > own.edge + 1 {
            return Err(Reason::TcpOutOfWindow);
        }
        Ok(Extent { start, end, behind })
    }

    /// Returns the position after the last data byte of a segment that has data.
    fn end_of(&self, arrived: &Arrived<'_, '_>) -> Option<Position> {
        let own = &self.halves[arrived.side];
        let length = arrived.segment.payload.len() as u64;
        (own.isn.is_some() && length > 0).then(|| own.position(arrived.segment.seq) + length)
    }

    /// "Fifth, check the ACK field": the segment must acknowledge neither more than the other end has sent nor a
    /// position far below earlier acknowledgements (RFC 5961, 5.2). A selective acknowledgement must not cover more
    /// than the other end has sent either.
    ///
    /// In a capture, bytes that have arrived count as sent, and the acknowledged position is that of the forwarded ones.
    ///
    /// Returns `None` if the segment acknowledges bytes that another policy's inspector has sent.
    #[inline]
    fn check_ack(&self, arrived: &Arrived<'_, '_>, of_capture: bool) -> Result<Option<Position>, Reason> {
        let other = &self.halves[arrived.side.other()];
        let segment = arrived.segment;
        let sent = if of_capture { other.arrived() } else { other.sent };
        let acked = other.position(segment.ack);
        if acked > sent && self.is_shared && segment.payload.is_empty() {
            return Ok(None);
        }
        if acked > sent || acked < other.oldest() {
            return Err(Reason::TcpOutOfWindow);
        }
        let acked = acked.min(other.sent);
        let mut edges = segment.options.sack.iter().flatten();
        if edges.any(|edge| other.position(*edge) > sent) {
            return Err(Reason::TcpInvalid);
        }
        Ok(Some(acked))
    }

    /// Protection against wrapped sequences (RFC 7323, 5.3): if both ends have agreed on timestamps, a segment without
    /// a timestamp, or with one older than TS.Recent, is dropped.
    #[inline]
    fn check_timestamp(&mut self, arrived: &Arrived<'_, '_>, start: Position) -> Result<(), Reason> {
        let is_agreed = self.has_timestamps();
        let segment = arrived.segment;
        if is_agreed && segment.options.timestamp.is_none() {
            return Err(Reason::TcpInvalid);
        }
        if self.halves[arrived.side].is_stale(segment, start, is_agreed) {
            return Err(Reason::TcpOutOfWindow);
        }
        Ok(())
    }

    /// "Fifth, check the ACK field", continued: SND.UNA and the send window of the other end are updated. The window is
    /// scaled if both SYNs carried the window scale option (RFC 7323, 2.3).
    #[inline]
    fn take_ack(&mut self, arrived: &Arrived<'_, '_>, acked: Position) {
        let shift = self.scale_of(arrived.side);
        let (own, other) = self.halves.pair_mut(arrived.side);
        own.window = arrived.segment.window;
        own.link = Link::of(arrived.view).or(own.link);
        // More than 0 only in a capture: the window begins behind bytes that were not forwarded.
        let ahead = other.position(arrived.segment.ack).saturating_sub(acked);
        other.acknowledge(acked, (u64::from(arrived.segment.window) << shift) + ahead);
        self.note_state();
        self.resume_windows(arrived.side);
    }

    /// "Eighth, check the FIN bit": returns whether the segment has bytes after the known FIN, a FIN at another
    /// position, or a FIN before bytes that have arrived.
    fn contradicts_fin(&self, arrived: &Arrived<'_, '_>, at: Extent) -> bool {
        let own = &self.halves[arrived.side];
        let has_fin = arrived.segment.is_fin();
        own.fin
            .is_some_and(|fin| at.end > fin || (has_fin && at.end != fin))
            || (has_fin && own.highest > at.end)
    }

    /// Handles a segment that begins with acknowledged bytes, of which no copy is kept for comparison. A receiver can
    /// acknowledge bytes that it does not have yet, and would then take uninspected bytes from this segment. So only a
    /// keepalive probe is forwarded. For any other segment, the sender gets an acknowledgement, and new bytes after the
    /// acknowledged ones are delivered, if possible, in generated packets.
    fn on_retransmission<S: Sink<F>>(
        &mut self,
        arrived: &Arrived<'_, '_>,
        at: Extent,
        frame: F,
        cx: &mut TcpCx<'_, F, S>,
    ) -> Result<bool, (Reason, F)> {
        let (side, segment) = (arrived.side, arrived.segment);
        let progress = matches!(self.phase, Phase::Responding(_));
        cx.shared.stats.retransmitted += 1;
        let own = &mut self.halves[side];
        // A keepalive probe can repeat the last acknowledged byte (RFC 9293, 3.8.4).
        if at.behind == own.acked && segment.payload.len() <= 1 {
            self.release(frame, cx);
            return Ok(progress);
        }
        let limits = &cx.shared.limits;
        let has_room = at.end <= own.reach(limits.bytes_per_direction as u64)
            && cx.shared.stats.bytes <= limits.bytes as u64;
        let new = segment
            .payload
            .get((own.acked - at.start) as usize..)
            .filter(|new| !new.is_empty() && has_room && !self.is_shared && own.is_contiguous());
        let Some(new) = new else {
            cx.sink.discard(frame, Reason::TcpHeld);
            self.acknowledge(side, cx);
            return Ok(progress);
        };
        if own.take(own.acked, new) == Arrival::Differs {
            return Err((Reason::TcpOverlap, frame));
        }
        own.proxy_acked = own.proxy_acked.max(own.next);
        cx.sink.absorb(frame);
        self.acknowledge(side, cx);
        Ok(true)
    }

    /// "Seventh, process the segment text": stores the bytes and compares them with an earlier copy. The packet is
    /// forwarded if all of its bytes may be forwarded. Otherwise it is held, or dropped if all of its bytes have
    /// arrived before.
    fn accept_data<S: Sink<F>>(
        &mut self,
        arrived: &Arrived<'_, '_>,
        at: Extent,
        frame: F,
        cx: &mut TcpCx<'_, F, S>,
    ) -> Result<bool, (Reason, F)> {
        let (side, segment) = (arrived.side, arrived.segment);
        let own = &mut self.halves[side];
        let waits = at.behind > own.forward_limit();
        let (limits, stats) = (&cx.shared.limits, &cx.shared.stats);
        if at.end > own.reach(limits.bytes_per_direction as u64)
            || stats.bytes > limits.bytes as u64
            || (waits
                && (own.held.len() >= limits.frames_per_direction || stats.frames >= limits.frames as u64))
        {
            return Err((Reason::InspectLimit, frame));
        }
        let is_new = match own.take(at.start, segment.payload) {
            Arrival::Differs => return Err((Reason::TcpOverlap, frame)),
            Arrival::New => true,
            Arrival::Known => segment.is_fin() && own.fin.is_none(),
        };
        if segment.is_fin() {
            own.fin = Some(at.end);
        }
        if !is_new {
            self.repeat_opened();
        }
        let own = &mut self.halves[side];
        if !waits {
            own.sent = own.sent.max(at.behind);
            if !is_new {
                cx.shared.stats.retransmitted += 1;
            }
            self.release(frame, cx);
            return Ok(true);
        }
        self.send_allowed_part(side, at, segment.payload, is_new, cx);
        if !is_new {
            return Err((Reason::TcpHeld, frame));
        }
        self.halves[side].hold(Held {
            frame,
            start: at.start,
            end: at.behind,
            since: cx.now,
        });
        Ok(true)
    }

    /// Forwards, in generated packets, the allowed bytes at the beginning of a segment whose last bytes have no verdict
    /// yet. Bytes that are still kept are forwarded by [`Connection::split`]; this function forwards them again only if
    /// the sender retransmits them.
    ///
    /// The inspector sees a new segment first ([`Connection::send_allowed_start`]). If it decides about the last bytes
    /// at once, the segment is forwarded as a whole, and the receiver would report bytes that it has got before as
    /// duplicates (RFC 2883). Linux no longer reverts the window reduction after a spurious retransmission once its
    /// peer has reported more duplicates than were retransmitted (`tcp_dsack_seen`).
    fn send_allowed_part<S: Sink<F>>(
        &mut self,
        side: Side,
        at: Extent,
        payload: &[u8],
        is_new: bool,
        cx: &mut TcpCx<'_, F, S>,
    ) {
        let own = &self.halves[side];
        let is_kept = !own.bytes(at.start, at.end).is_empty();
        if self.is_shared || at.start >= own.allowed || (is_kept && (is_new || own.sent <= at.start)) {
            return;
        }
        let length = (own.allowed - at.start) as usize;
        let part = payload.get(..length).unwrap_or(payload);
        if is_new {
            cx.shared.start.set(side, at.start, part);
        } else {
            self.send_part(side, at.start, part, cx);
        }
    }

    /// Drops a segment that [`Connection::receive`] has refused. A retransmission of held bytes is not recorded,
    /// because the first copy is held.
    pub(super) fn reject<S: Sink<F>>(
        &mut self,
        arrived: &Arrived<'_, '_>,
        reason: Reason,
        frame: F,
        cx: &mut TcpCx<'_, F, S>,
    ) {
        let half = &self.halves[arrived.side];
        if reason == Reason::TcpHeld && half.proxy_acked > half.acked {
            self.acknowledge(arrived.side, cx);
        }
        let stats = &mut cx.shared.stats;
        match reason {
            Reason::TcpOutOfWindow => stats.out_of_window += 1,
            Reason::TcpOverlap => stats.overlaps += 1,
            Reason::TcpHeld => stats.retransmitted += 1,
            Reason::InspectLimit => stats.limited += 1,
            _ => stats.invalid += 1,
        }
        if reason != Reason::TcpHeld {
            self.report_drop(arrived.view, reason, cx);
        }
        cx.sink.discard(frame, reason);
    }
}
