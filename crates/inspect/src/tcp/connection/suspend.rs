//! Suspends offload windows, so that the worker sees packets that the programs would otherwise forward.
//!
//! While an offload window is open, the worker sees neither the segments in it nor bare acknowledgements of its bytes. It
//! then does not know
//! - whether a reset has ended the connection: a receiver refuses most resets (RFC 5961, 3.2), and any host can forge one,
//!   but without a further packet the connection would be removed as one that has ended;
//! - whether the connection is in use, if that takes longer than the idle timeout;
//! - which bytes of the other direction the sender of these segments has acknowledged in them, so that more bytes of that
//!   direction would exceed its window, or the number of bytes that may be kept.
//!
//! In these cases the windows are removed from the conntrack entry until the next segment that is accepted.

use super::{
    super::{half::Position, shared::TcpCx, side::Side},
    Announcement, Connection, Phase, Suspended, WINDOW_AGE,
};
use crate::Sink;

impl<F> Connection<F> {
    /// Returns whether the programs forward segments or acknowledgements without the worker.
    pub(super) fn has_windows(&self) -> bool {
        self.suspended == Suspended::No
            && matches!(self.phase, Phase::Open)
            && self.windows.both().into_iter().any(|[from, to]| from != to)
    }

    /// Suspends the offload windows. The next packet that is forwarded carries the command.
    pub(super) fn suspend_windows(&mut self) {
        if self.has_windows() {
            self.suspended = Suspended::UntilSegment;
            self.command = true;
        }
    }

    /// Suspends the offload windows of a connection of which the worker has seen nothing for long.
    pub(super) fn suspend_unseen<S: Sink<F>>(&mut self, cx: &mut TcpCx<'_, F, S>) {
        self.suspend_until(Suspended::UntilSegment, cx);
    }

    /// Suspends the offload windows if the other side acknowledges the bytes of `side` below `end` possibly in segments that
    /// the programs forward, and has acknowledged less than half of those that it permits as far as the worker knows.
    pub(super) fn suspend_for_acks<S: Sink<F>>(
        &mut self,
        side: Side,
        end: Position,
        cx: &mut TcpCx<'_, F, S>,
    ) {
        let (own, other) = (&self.halves[side], &self.halves[side.other()]);
        let is_open = self.window_ends[side.other()]
            .is_some_and(|window_end| other.highest.max(other.acked) + WINDOW_AGE < window_end);
        let room = (own.edge.saturating_sub(own.acked)).min(cx.shared.limits.bytes_per_direction as u64);
        // A segment far behind is not of the sender.
        let is_near = end <= own.edge + own.widest;
        if is_open && is_near && end > own.acked + room / 2 && self.has_windows() {
            self.suspend_until(Suspended::UntilSegmentOf(side.other()), cx);
        }
    }

    /// Suspends the offload windows at once: no packet need be forwarded soon that could carry the command.
    fn suspend_until<S: Sink<F>>(&mut self, until: Suspended, cx: &mut TcpCx<'_, F, S>) {
        self.suspended = until;
        self.command = false;
        let command = self.next_command(cx);
        cx.sink.command(&command);
    }

    /// Puts suspended offload windows in force again because of an accepted segment of `side`, which carries the command.
    pub(super) fn resume_windows(&mut self, side: Side) {
        let is_due = match self.suspended {
            Suspended::No => false,
            Suspended::UntilSegment => true,
            Suspended::UntilSegmentOf(other) => other == side,
        };
        if is_due && self.closed == Announcement::No {
            self.suspended = Suspended::No;
            self.command = true;
        }
    }
}
