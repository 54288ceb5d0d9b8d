//! Limits how far a sender may send behind a long message.
//!
//! A long message has an offload window, so its segments stay in the programs, at many times the rate of a worker. A
//! sender that may send as much as its receiver permits would have sent most of the next message before the worker has
//! set the window of that one; all of these segments would be punted, and the worker would never catch up. So the
//! window that the receiver offers is lowered, in its acknowledgements: the sender may send the long message and, when it
//! has arrived but for the last [`SEND_LIMIT_DISTANCE`], an allowance behind it, in which the head of the next message
//! fits. The programs do this for acknowledgements inside the offload window (`xdp/src/offload.rs`), the worker for
//! those near its end and all others.
//!
//! - The sender may send the rest of a message only after the verdict on its head. The worker offers it that rest with
//!   the verdict, because a receiver can delay the acknowledgement of a head of one segment (RFC 9293, 3.8.6.3) until its
//!   application has read. The worker can do so because it has seen the newest acknowledgement; the sender ignores an
//!   older one (RFC 9293, 3.10.7.4).
//! - A right edge that was offered is not taken back (RFC 9293, 3.8.6), except by less than the unit of a scaled window
//!   (RFC 7323, 2.4).
//! - Only for connections with a short round-trip time, since the next message begins a round trip later.
//! - If the next messages are short, or their heads long, the sender may send [`FLOAT`] bytes beyond what has arrived.
//!
//! Start at [`Connection::limit_sender`].

use palisade_abi::{SEND_LIMIT_DISTANCE, flow_op, punt_hook, send_limit_code};

use super::{
    super::{
        half::{OffloadWindow, Position, SendLimit},
        segment::OutSegment,
        shared::{Shared, TcpCx},
        side::Side,
    },
    Connection, Phase, Suspended,
};
use crate::{Millis, Sink};

/// Longest handshake of a connection whose senders are limited, ms. The clock advances with the tick, at 250 Hz or more.
pub(super) const NEAR: Millis = 4;
/// Number of bytes beyond what has arrived that a limited sender may send while it sends short messages. It is also the
/// length from which a message counts as long, so that the end of a long message lies beyond all that was offered.
const FLOAT: u64 = 256 << 10;
/// Length of a head for which the allowance suffices, bytes. A sender sends only full segments (RFC 9293, 3.8.6.2.1), so
/// the allowance is a segment and this length.
const HEAD: u64 = 512;
/// Greatest [`send_limit_code`]: all low bits that hold it.
const CODES: u32 = 15;
/// Greatest window scale with which the allowance is more than a few units.
const MAX_SCALE: u8 = 10;

impl<F> Connection<F> {
    /// Returns the window scale of the windows that `side` offers (RFC 7323, 2.3).
    pub(super) fn scale_of(&self, side: Side) -> u8 {
        let is_scaled = self.halves.both().iter().all(|half| half.scale.is_some());
        self.halves[side].scale.filter(|_| is_scaled).unwrap_or(0).min(14)
    }

    /// Limits the sender of a message of which `missing` bytes have not arrived, and which ends at `Half::allowed`.
    /// Returns the code for the programs, 0 for no limit; `None` if the message must not have an offload window.
    pub(super) fn limit_sender(&mut self, side: Side, missing: u64, shared: &Shared) -> Option<u32> {
        let scale = self.scale_of(side.other());
        // XDP programs do not change the window: they do not know whether a checksum is complete.
        let is_tc = self.halves[side.other()]
            .link
            .is_some_and(|link| link.route().hook != punt_hook::XDP_INGRESS);
        let may =
            shared.limits.limits_senders && self.is_near && !self.is_shared && is_tc && scale <= MAX_SCALE;
        let segment = u64::from(self.halves[side.other()].mss);
        let half = &mut self.halves[side];
        match half.limit {
            // The message ends below what the sender may have been offered: the programs offer at most the allowance
            // behind the end of the last long message.
            Some(limit) if half.allowed < half.offered.max(limit.end + limit.allowance) => {
                return None;
            }
            None if !may || missing < FLOAT || half.offered > half.allowed => {
                half.offered = Position::MAX;
                return Some(0);
            }
            _ => {}
        }
        half.limit = Some(SendLimit {
            end: half.allowed,
            allowance: segment + HEAD + (1 << scale),
            is_passed: false,
        });
        Some(send_limit_code(scale))
    }

    /// Notes which senders are behind the end of their last long message.
    pub(super) fn note_progress(&mut self) {
        for half in self.halves.both_mut() {
            let (allowed, ahead, highest) = (half.allowed, half.ahead, half.highest);
            let Some(limit) = &mut half.limit else {
                continue;
            };
            let is_stuck = highest > limit.end + HEAD;
            limit.is_passed |= allowed.max(ahead) > limit.end || (is_stuck && !half.awaits_peer);
        }
    }

    /// Returns the right edge of the window that may be offered to `side` in an acknowledgement of all bytes below
    /// `acked`.
    pub(super) fn right_edge(&self, side: Side, acked: Position) -> Position {
        let half = &self.halves[side];
        let Some(limit) = half.limit.filter(|_| matches!(self.phase, Phase::Open)) else {
            return Position::MAX;
        };
        if self.put_off[side].is_some() {
            return half.offered;
        }
        let edge = if acked + u64::from(SEND_LIMIT_DISTANCE) < limit.end {
            limit.end
        } else {
            limit.end.max(acked) + limit.allowance
        };
        // Acknowledgements below the end of the long message stay in the programs, which know only that end: an edge
        // beyond it would be taken back by the next one.
        let floating = if limit.is_passed && acked >= limit.end {
            half.next + FLOAT
        } else {
            0
        };
        edge.max(floating).max(half.offered)
    }

    /// Sets the offload window that was put off, if all bytes have arrived that its sender was permitted to send.
    ///
    /// The window of a sender that was limited before is put off, because some of these bytes can wait in the worker.
    /// The rest of the message, which the programs forward, would overtake them. A sender takes that for a loss and
    /// reduces its congestion window: at first it waits only for a quarter of the minimum round-trip time (RFC 8985,
    /// 6.2), less than a worker needs for a segment. A sender can send less than is permitted, so the window is put off
    /// at most until no packet waits in the worker ([`Connection::settle`]), or until the receiver has acknowledged all
    /// that has arrived.
    pub(super) fn open_window(&mut self, side: Side) {
        let half = &self.halves[side];
        let is_due = half.highest >= half.offered;
        if let Some(window) = self.put_off[side].take_if(|_| is_due) {
            self.begin_window(side, window);
        }
    }

    /// Sets the window that was put off, and offers it.
    fn open_and_offer<S: Sink<F>>(&mut self, side: Side, cx: &mut TcpCx<'_, F, S>) {
        if let Some(window) = self.put_off[side].take() {
            self.begin_window(side, window);
            self.offer_window(side, cx);
        }
    }

    /// Sets a window that was put off. It begins behind the bytes that have arrived: acknowledgements of these are still
    /// punted, so that the programs do not permit the rest of the message while such bytes wait in the worker.
    fn begin_window(&mut self, side: Side, mut window: OffloadWindow) {
        // Bytes may have been acknowledged on behalf of a receiver since the window was put off (`Connection::skip`).
        if !matches!(self.phase, Phase::Open) || !self.is_drained() {
            self.offers[side] = false;
            return;
        }
        let arrived = self.halves[side].highest.min(window.end);
        // The next segment must lie in the window as a whole, and [`coded`] raises the start.
        window.from = window.from.max(arrived - 2 * u64::from(CODES));
        self.set_window(side, &window);
    }

    /// Sets the window that was put off once the receiver has acknowledged all that has arrived.
    pub(super) fn settle_acknowledged<S: Sink<F>>(&mut self, side: Side, cx: &mut TcpCx<'_, F, S>) {
        let half = &self.halves[side];
        if half.acked >= half.highest {
            self.open_and_offer(side, cx);
        }
    }

    /// Returns whether [`Connection::settle`] must be called.
    pub(in super::super) const fn is_unsettled(&self) -> bool {
        self.put_off.client.is_some() || self.put_off.server.is_some()
    }

    /// Sets the windows that were put off, because no segment waits in the worker.
    pub(in super::super) fn settle<S: Sink<F>>(&mut self, cx: &mut TcpCx<'_, F, S>) {
        for side in Side::BOTH {
            self.open_and_offer(side, cx);
        }
    }

    /// Offers a limited sender whose message has got an offload window as much of it as the receiver has offered.
    pub(super) fn offer_window<S: Sink<F>>(&mut self, side: Side, cx: &mut TcpCx<'_, F, S>) {
        if self.put_off[side].is_some() || !std::mem::take(&mut self.offers[side]) {
            return;
        }
        if !matches!(self.phase, Phase::Open) {
            return;
        }
        // The window must be set before the sender fills it.
        if std::mem::take(&mut self.command) {
            let command = self.next_command(cx);
            cx.sink.command(&command);
        }
        let acked = self.halves[side].acked;
        let edge = self.right_edge(side, acked).min(self.halves[side].granted);
        if edge <= self.halves[side].offered {
            return;
        }
        let shift = self.scale_of(side.other());
        let window = u16::try_from(edge.saturating_sub(acked) >> shift).unwrap_or(u16::MAX);
        let segment = OutSegment {
            seq: self.halves[side.other()].seq(self.halves[side.other()].sent),
            ack: Some(self.halves[side].seq(acked)),
            window,
            timestamp: self.timestamp(side),
            ..OutSegment::default()
        };
        self.emit(side, &segment, cx);
        self.halves[side].offered = acked + (u64::from(window) << shift);
    }

    /// Returns the operation and the windows of the command that sets the offload windows.
    pub(super) fn windows_command(&self) -> (u32, [u32; 4]) {
        if self.suspended != Suspended::No {
            return (flow_op::WINDOWS, [0; 4]);
        }
        let ([a, b], [c, d]) = (self.windows.client, self.windows.server);
        if self.codes.client == 0 && self.codes.server == 0 {
            return (flow_op::WINDOWS, [a, b, c, d]);
        }
        let (a, c) = (coded(a, self.codes.client), coded(c, self.codes.server));
        (flow_op::LIMITED_WINDOWS, [a, b, c, d])
    }

    /// Returns the value to which the window field of a segment from `side` must be lowered, if any. The segment
    /// acknowledges all bytes of the other side below `acked`.
    pub(super) fn limited_window(&mut self, side: Side, acked: Position) -> Option<u16> {
        let sender = side.other();
        let shift = self.scale_of(side);
        let window = self.halves[side].window;
        let limit = self.right_edge(sender, acked);
        let edge = acked + (u64::from(window) << shift);
        let half = &mut self.halves[sender];
        if edge <= limit {
            half.offered = half.offered.max(edge);
            return None;
        }
        // Not more than the window of the segment, since the limit is below the edge.
        let lowered = (limit.saturating_sub(acked) >> shift) as u16;
        half.offered = half.offered.max(acked + (u64::from(lowered) << shift));
        self.halves[side].window = lowered;
        Some(lowered)
    }
}

/// Returns the start of an offload window that begins at or shortly behind `from`, with a code in its low bits.
const fn coded(from: u32, code: u32) -> u32 {
    (from.wrapping_add(CODES) & !CODES).wrapping_add(code)
}
