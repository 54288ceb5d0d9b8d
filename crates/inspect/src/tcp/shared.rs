//! State that all connections of one inspector share, and the context in which a connection runs.

use super::{
    config::{TcpLimits, TcpStats},
    half::Position,
    segment::{Link, OutSegment},
    side::Side,
};
use crate::{Millis, Sink, context::Cx, frames::Spare, rules::Rules};

/// Maximum number of records about dropped packets per second.
const REPORTS: u32 = 200;

/// State that all connections of one inspector share.
pub(crate) struct Shared {
    pub(super) limits: TcpLimits,
    pub(super) stats: TcpStats,
    /// Buffer for a generated packet.
    out: Vec<u8>,
    /// Start of a period of one second, ms, and number of records that are still allowed in that period.
    reports: (Millis, u32),
    /// Buffer for the allowed part of a packet.
    pub(super) part: Vec<u8>,
    /// Allowed bytes of the segment that the inspector is about to see.
    pub(super) start: AllowedStart,
}

/// Allowed bytes at the beginning of a segment whose last bytes have no verdict yet, if no [`super::half::Half`] keeps
/// them.
#[derive(Default)]
pub(super) struct AllowedStart {
    at: Option<(Side, Position)>,
    bytes: Vec<u8>,
}

impl AllowedStart {
    /// Keeps a copy of `bytes`, which begin at a position of the stream of `side`.
    pub(super) fn set(&mut self, side: Side, at: Position, bytes: &[u8]) {
        self.at = Some((side, at));
        self.bytes.clear();
        self.bytes.extend_from_slice(bytes);
    }

    /// Removes and returns the position and the bytes, if they are of `side`. The caller gives the buffer back with
    /// [`AllowedStart::give_back`].
    pub(super) fn take(&mut self, side: Side) -> Option<(Position, Vec<u8>)> {
        let (_, at) = self.at.take_if(|(of, _)| *of == side)?;
        Some((at, std::mem::take(&mut self.bytes)))
    }

    /// Takes the buffer of [`AllowedStart::take`] back, so that the next segment needs no allocation.
    pub(super) fn give_back(&mut self, buffer: Vec<u8>) {
        self.bytes = buffer;
    }
}

impl Shared {
    pub(super) fn new(limits: &TcpLimits) -> Self {
        Self {
            limits: *limits,
            stats: TcpStats::default(),
            out: Vec::new(),
            reports: (0, REPORTS),
            part: Vec::new(),
            start: AllowedStart::default(),
        }
    }

    /// Returns the context for a connection: the engine's context and this state.
    pub(super) const fn context<'a, F, S>(&'a mut self, cx: &'a mut Cx<'_, F, S>) -> TcpCx<'a, F, S> {
        TcpCx {
            now: cx.now,
            rules: cx.rules,
            spare: cx.spare,
            sink: cx.sink,
            shared: self,
        }
    }

    /// Returns whether one more dropped packet may be recorded, and counts it. The limit [`REPORTS`] prevents a sender
    /// from flooding the records.
    pub(super) const fn may_report(&mut self, now: Millis) -> bool {
        if now.saturating_sub(self.reports.0) >= 1_000 {
            self.reports = (now, REPORTS);
        }
        if self.reports.1 == 0 {
            return false;
        }
        self.reports.1 -= 1;
        true
    }
}

/// Context in which a connection runs: that of the engine, and the state that all connections share.
pub(super) struct TcpCx<'a, F, S> {
    /// Time of the call, ms.
    pub(super) now: Millis,
    rules: &'a Rules,
    spare: &'a mut Spare<F>,
    pub(super) sink: &'a mut S,
    pub(super) shared: &'a mut Shared,
}

impl<F, S: Sink<F>> TcpCx<'_, F, S> {
    /// Returns the context of the engine, for an inspector.
    pub(super) const fn engine(&mut self) -> Cx<'_, F, S> {
        Cx {
            now: self.now,
            rules: self.rules,
            spare: self.spare,
            sink: self.sink,
        }
    }

    /// Builds a segment and sends it.
    pub(super) fn emit(&mut self, link: &Link, segment: &OutSegment<'_>) {
        link.write(segment, &mut self.shared.out);
        self.sink.emit(&self.shared.out, link.route());
    }
}
