//! What a planned restart hands over of a connection: the state of both directions, once the SYN has been answered. A
//! connection that is being closed, or that is answered in an end's place, is not handed over.

use palisade_abi::{CtKey, Reason};

use super::{
    super::{
        half::{Half, START},
        shared::{Shared, TcpCx},
        side::PerSide,
    },
    Announcement, Connection, Phase,
};
use crate::{
    Millis, Sink,
    handover::wire::{Reader, Wire},
};

/// What happens to a connection at a planned restart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::tcp) enum Transfer {
    /// Its state can be handed over.
    Possible,
    /// Its state cannot be handed over, so the connection is reset after the restart.
    Impossible,
    /// It has ended.
    Over,
}

impl<F> Connection<F> {
    /// Returns what happens to the connection at a planned restart.
    pub(in crate::tcp) fn transfer(&self) -> Transfer {
        match self.phase {
            Phase::Responded(_) | Phase::Aborted(_) => Transfer::Over,
            // A reset has not ended the connection if its receiver has refused it.
            Phase::Open if self.is_done() && !(self.is_reset && self.closed == Announcement::No) => {
                Transfer::Over
            }
            // Only a connection whose conntrack entry is known to have its serial is recognised after the restart.
            Phase::Open if self.is_answered() && self.is_known && self.closed == Announcement::No => {
                Transfer::Possible
            }
            Phase::Open | Phase::Responding(_) | Phase::Offloaded => Transfer::Impossible,
        }
    }

    /// Returns whether the server has answered the SYN. The client can have the answer and count the connection as open, so
    /// its next packet would be one of an unknown connection. Before the answer, the client repeats its SYN.
    fn is_answered(&self) -> bool {
        self.halves.server.isn.is_some() && self.halves.client.acked > START
    }

    /// Drops the held packets, whose senders repeat them ([`Half::take_held`]).
    pub(in crate::tcp) fn drop_held<S: Sink<F>>(&mut self, cx: &mut TcpCx<'_, F, S>) {
        for half in self.halves.both_mut() {
            for frame in half.take_held() {
                cx.sink.discard(frame, Reason::TcpHeld);
            }
        }
    }

    /// Appends the state without held packets.
    pub(in crate::tcp) fn write(&self, out: &mut Vec<u8>) {
        self.key.write(out);
        self.slot.write(out);
        self.serial.write(out);
        (self.opened == Announcement::Sent).write(out);
        self.began.write(out);
        self.about.write(out);
        for flag in [
            self.is_shared,
            self.is_audit,
            self.command,
            self.is_near,
            self.is_reset,
        ] {
            flag.write(out);
        }
        self.suspended.write(out);
        self.windows.write(out);
        self.codes.write(out);
        self.offers.write(out);
        self.window_ends.write(out);
        self.rest.write(out);
        self.seen.write(out);
        for half in self.halves.both() {
            half.write(out);
        }
    }

    /// Reads a state that [`Connection::write`] has written; `None` if the bytes are no such state, or if the state
    /// exceeds the limits. `now`: time of the call, ms.
    pub(in crate::tcp) fn read(from: &mut Reader<'_>, now: Millis, shared: &mut Shared) -> Option<Self> {
        let (key, slot, serial) = (CtKey::read(from)?, Wire::read(from)?, Wire::read(from)?);
        let is_announced = bool::read(from)?;
        let mut connection = Self {
            halves: PerSide::new(Half::new(), Half::new()),
            phase: Phase::Open,
            key,
            slot,
            serial,
            before: None,
            is_known: true,
            opened: Announcement::No,
            closed: Announcement::No,
            began: u64::read(from)?.min(now),
            about: Wire::read(from)?,
            is_shared: Wire::read(from)?,
            is_audit: Wire::read(from)?,
            command: Wire::read(from)?,
            is_near: Wire::read(from)?,
            is_reset: Wire::read(from)?,
            suspended: Wire::read(from)?,
            windows: Wire::read(from)?,
            codes: Wire::read(from)?,
            offers: Wire::read(from)?,
            put_off: PerSide::default(),
            window_ends: Wire::read(from)?,
            rest: Wire::read(from)?,
            seen: u64::read(from)?.min(now),
            counted: (0, 0),
            reported: None,
        };
        for half in connection.halves.both_mut() {
            *half = Half::read(from, now)?;
        }
        connection.is_plausible(shared).then_some(())?;
        if connection.is_opened() {
            connection.opened = if is_announced {
                Announcement::Sent
            } else {
                Announcement::Next
            };
        } else {
            // The short timeout of a half-open connection begins again.
            connection.seen = now;
        }
        connection.count(shared);
        Some(connection)
    }

    fn is_plausible(&self, shared: &Shared) -> bool {
        /// Longest rest of a body that is skipped, bytes.
        const LONGEST: u64 = 1 << 62;
        let (key, limits) = (&self.key, &shared.limits);
        let ends = ((key.local, key.local_port), (key.remote, key.remote_port));
        let kept = self.halves.both().map(Half::kept);
        let links = self.halves.both().map(|half| half.link);
        self.slot.endpoint == key.endpoint
            && self.is_answered()
            && (self.is_reset || !self.is_done())
            && self.rest.both().into_iter().all(|rest| *rest <= LONGEST)
            && links
                .into_iter()
                .flatten()
                .all(|link| link.is_between(ends.0, ends.1))
            && kept.iter().all(|kept| *kept <= limits.bytes_per_direction)
            && shared.stats.bytes + kept.iter().sum::<usize>() as u64 <= limits.bytes as u64
    }

    pub(in crate::tcp) const fn key(&self) -> CtKey {
        self.key
    }
}
