//! What a planned restart hands over of one direction.

use std::collections::VecDeque;

use super::{Half, LARGEST, MAX_PIECES, NARROWINGS, Piece, Position, START, SendLimit};
use crate::{
    Millis,
    handover::wire::{Reader, Wire, wire},
};

/// Highest position that a state may have, so that sums of positions and lengths do not overflow.
const HIGHEST: Position = 1 << 60;
/// Smallest payload size of generated packets, bytes.
const SMALLEST: u16 = 64;
/// Highest number of retransmissions of a state.
const MOST_TRIES: u32 = 16;
/// Longest time until a retransmission, ms.
const LONGEST_WAIT: Millis = 60_000;

wire!(SendLimit {
    end,
    allowance,
    is_passed
});

impl Wire for Piece {
    fn write(&self, out: &mut Vec<u8>) {
        self.start.write(out);
        self.slice(self.start, self.end()).to_vec().write(out);
        self.have.iter().copied().collect::<VecDeque<_>>().write(out);
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        let piece = Self {
            start: Wire::read(from)?,
            bytes: Wire::read(from)?,
            gone: 0,
            have: VecDeque::read(from)?.into(),
        };
        let is_valid = piece.start <= HIGHEST
            && piece.have.iter().all(|(from, to)| from < to)
            && piece.have.is_sorted_by(|a, b| a.1 < b.0)
            && piece.have.first().is_none_or(|(from, _)| *from >= piece.start)
            && piece.have.last().is_none_or(|(_, to)| *to <= piece.end());
        is_valid.then_some(piece)
    }
}

impl<F> Half<F> {
    /// Takes the held packets out, and forgets their bytes that neither end has been promised: bytes that were neither
    /// allowed nor forwarded nor acknowledged. Their sender repeats them, since no acknowledgement has reached it; without
    /// this step the repeated bytes would count as known, and their packet would be dropped.
    pub(in crate::tcp) fn take_held(&mut self) -> impl Iterator<Item = F> + use<F> {
        // An allowed byte is kept even if it was not forwarded: with another value it would pass without a verdict.
        let promised = self.forward_limit().max(self.sent).max(self.proxy_acked);
        if let Some(piece) = self.pieces.back_mut()
            && piece.end() > promised
        {
            piece.cut(promised);
        }
        self.next = self.next.min(promised);
        self.highest = self.highest.min(promised);
        if !self.end_read && self.fin.is_some_and(|fin| self.sent <= fin) {
            self.fin = None;
        }
        self.ack_at = None;
        std::mem::take(&mut self.held).into_iter().map(|held| held.frame)
    }

    /// Appends the state without held packets.
    pub(in crate::tcp) fn write(&self, out: &mut Vec<u8>) {
        self.isn.write(out);
        self.link.write(out);
        self.scale.write(out);
        for number in [self.mss, self.path, self.window] {
            number.write(out);
        }
        self.narrowings.write(out);
        for number in [self.recent, self.latest] {
            number.write(out);
        }
        for flag in [self.has_timestamps, self.end_read, self.awaits_peer] {
            flag.write(out);
        }
        for position in self.positions() {
            position.write(out);
        }
        for number in [self.widest, self.offered] {
            number.write(out);
        }
        self.again.write(out);
        self.limit.write(out);
        self.fin.write(out);
        self.pieces.write(out);
    }

    /// Returns the positions that are handed over, in the order of [`Half::read`].
    const fn positions(&self) -> [Position; 11] {
        [
            self.next,
            self.allowed,
            self.ahead,
            self.sent,
            self.highest,
            self.acked,
            self.proxy_acked,
            self.lost,
            self.resent,
            self.edge,
            self.granted,
        ]
    }

    /// Reads a state. Returns `None` if the bytes are no state that [`Half::write`] writes. `now`: time of the call, ms.
    pub(in crate::tcp) fn read(from: &mut Reader<'_>, now: Millis) -> Option<Self> {
        let mut half = Self::new();
        half.isn = Some(Option::read(from)??);
        half.link = Wire::read(from)?;
        half.scale = Wire::read(from)?;
        for number in [&mut half.mss, &mut half.path, &mut half.window] {
            *number = Wire::read(from)?;
        }
        half.narrowings = Wire::read(from)?;
        for number in [&mut half.recent, &mut half.latest] {
            *number = Wire::read(from)?;
        }
        for flag in [
            &mut half.has_timestamps,
            &mut half.end_read,
            &mut half.awaits_peer,
        ] {
            *flag = Wire::read(from)?;
        }
        for position in [
            &mut half.next,
            &mut half.allowed,
            &mut half.ahead,
            &mut half.sent,
            &mut half.highest,
            &mut half.acked,
            &mut half.proxy_acked,
            &mut half.lost,
            &mut half.resent,
            &mut half.edge,
            &mut half.granted,
        ] {
            *position = Wire::read(from)?;
        }
        for number in [&mut half.widest, &mut half.offered] {
            *number = Wire::read(from)?;
        }
        half.again =
            Option::<(Millis, u32)>::read(from)?.map(|(at, tries)| (at.min(now + LONGEST_WAIT), tries));
        half.limit = Wire::read(from)?;
        half.fin = Wire::read(from)?;
        half.pieces = Wire::read(from)?;
        if !half.is_consistent() {
            return None;
        }
        if !half.undecided().is_empty() {
            half.since = Some(now);
        }
        Some(half)
    }

    /// Returns whether the fields fit each other, as far as the other functions rely on it.
    fn is_consistent(&self) -> bool {
        let in_range = |position: Position| (START..HIGHEST).contains(&position);
        let follows = |(a, b): (&Piece, &Piece)| a.end() <= b.start;
        let last = self.pieces.back().map(|piece| piece.start);
        self.positions().into_iter().all(in_range)
            && (self.offered == Position::MAX || in_range(self.offered))
            && self.fin.is_none_or(in_range)
            && self
                .limit
                .is_none_or(|limit| in_range(limit.end) && limit.allowance < HIGHEST)
            && self.widest <= 1 << 32
            && self.acked <= self.proxy_acked
            && self.acked <= self.sent
            && self.scale.is_none_or(|scale| scale <= 14)
            && (SMALLEST..=LARGEST).contains(&self.path)
            && self.narrowings <= NARROWINGS
            && self.again.is_none_or(|(_, tries)| tries <= MOST_TRIES)
            && (1..=MAX_PIECES).contains(&self.pieces.len())
            && self.pieces.iter().zip(self.pieces.iter().skip(1)).all(follows)
            && last.is_some_and(|last| last <= self.allowed.max(self.next))
    }
}
