//! An answer in the other side's place, and the end of the connection for both.

use palisade_abi::Reason;

use super::{
    super::{
        Shared, Side,
        half::Position,
        segment::{Make, Segment},
    },
    Connection, FIRST_TRY, Phase, TRIES,
};
use crate::{Millis, Sink};

/// What a side may still send that was answered here, bytes; then it is reset.
const SPILL: u64 = 1 << 20;

pub(super) struct Answer {
    pub(super) reason: Reason,
    /// Who gets it.
    pub(super) to: Side,
    pub(super) bytes: Vec<u8>,
    /// Where it stands in the stream to `to`.
    start: Position,
    /// What `to` has sent, to be acknowledged.
    next: Position,
    /// Where that began.
    first: Position,
    pub(super) tries: u32,
    pub(super) again: Millis,
    other: Closing,
}

/// The side that does not get the answer: for it, the one that does has closed.
#[derive(Default)]
struct Closing {
    /// Where the end made here stands in the stream to it.
    fin: Position,
    /// What it has sent, to be acknowledged, and where that began.
    next: Position,
    first: Position,
    /// It needs nothing any more.
    done: bool,
}

impl Answer {
    /// One that waits, until `again` at the latest.
    pub(super) fn new(reason: Reason, to: Side, bytes: Vec<u8>, again: Millis) -> Self {
        Self {
            reason,
            to,
            bytes,
            start: 0,
            next: 0,
            first: 0,
            tries: 0,
            again,
            other: Closing::default(),
        }
    }
}

impl Answer {
    /// Behind the last byte, or the end, of what was sent in a side's place.
    pub(super) fn end_of(&self, side: Side) -> Position {
        if side == self.to {
            self.other.fin + 1
        } else {
            self.start + self.bytes.len() as u64 + 1
        }
    }
}

impl<F> Connection<F> {
    /// Answers if the client has all that the server sent.
    pub(super) fn answer_when_due<S: Sink<F>>(&mut self, now: Millis, shared: &mut Shared, sink: &mut S) {
        if let Phase::Answering(answer) = &self.phase {
            let before = &self.halves[answer.to.other() as usize];
            // What may go and has not come belongs to what the server says before.
            if before.acked < before.sent || before.judged > before.next {
                return;
            }
            // What may go of the side that is answered is delivered first: behind the answer nothing is sent again.
            let own = &self.halves[answer.to as usize];
            if own.acked < own.sent {
                return;
            }
        }
        match std::mem::replace(&mut self.phase, Phase::Open) {
            Phase::Answering(answer) => self.answer(now, answer, shared, sink),
            other => self.phase = other,
        }
    }

    pub(super) fn answer<S: Sink<F>>(
        &mut self,
        now: Millis,
        mut answer: Box<Answer>,
        shared: &mut Shared,
        sink: &mut S,
    ) {
        shared.stats.answered += 1;
        let other = &self.halves[answer.to.other() as usize];
        answer.start = other.sent;
        answer.other = Closing {
            fin: self.halves[answer.to as usize].sent,
            next: other.acked,
            first: other.acked,
            done: false,
        };
        let own = &self.halves[answer.to as usize];
        answer.next = own.next + u64::from(own.fin.is_some_and(|fin| fin == own.next));
        answer.first = answer.next;
        answer.again = now + FIRST_TRY;
        self.close(answer.reason, shared, sink);
        self.half(answer.to).next = answer.next;
        self.send_answer(&answer, shared, sink);
        self.send_end(&answer, shared, sink);
        self.phase = Phase::Answered(answer);
    }

    /// Sends what has not been acknowledged of an answer.
    pub(super) fn send_answer<S: Sink<F>>(&self, answer: &Answer, shared: &mut Shared, sink: &mut S) {
        let to = answer.to;
        let (from, own) = (&self.halves[to.other() as usize], &self.halves[to as usize]);
        let timestamp = self.timestamp(to);
        let length = own.payload_size(timestamp.is_some());
        let done = from.acked.saturating_sub(answer.start) as usize;
        let mut at = done.min(answer.bytes.len());
        if done > answer.bytes.len() {
            return;
        }
        loop {
            let end = (at + length).min(answer.bytes.len());
            let make = Make {
                seq: from.seq(answer.start + at as u64),
                ack: Some(own.seq(answer.next)),
                window: from.window,
                fin: end == answer.bytes.len(),
                timestamp,
                payload: &answer.bytes[at..end],
                ..Make::default()
            };
            self.emit(to, &make, shared, sink);
            at = end;
            if at == answer.bytes.len() {
                return;
            }
        }
    }

    /// Tells the side that gets no answer that the other has closed. What that had sent in its stead counts as sent.
    pub(super) fn send_end<S: Sink<F>>(&self, answer: &Answer, shared: &mut Shared, sink: &mut S) {
        if answer.other.done {
            return;
        }
        let (to, own) = (answer.to.other(), &self.halves[answer.to as usize]);
        let is_ended = own.fin.is_some_and(|fin| answer.other.fin > fin);
        let make = Make {
            seq: own.seq(answer.other.fin),
            ack: Some(self.halves[to as usize].seq(answer.other.next)),
            window: own.window,
            fin: !is_ended,
            timestamp: self.timestamp(to),
            ..Make::default()
        };
        self.emit(to, &make, shared, sink);
    }

    /// A packet of the side that gets no answer: acknowledged, so that it ends in peace.
    pub(super) fn closing<S: Sink<F>>(
        &mut self,
        answer: &mut Answer,
        segment: &Segment<'_>,
        shared: &mut Shared,
        sink: &mut S,
    ) {
        let closing = &mut answer.other;
        if segment.is_rst() || segment.is_syn() {
            closing.done |= segment.is_rst();
            return;
        }
        let own = &self.halves[answer.to as usize];
        if segment.is_ack() && own.position(segment.ack) > closing.fin {
            closing.done = true;
        }
        let other = &self.halves[answer.to.other() as usize];
        let start = other.position(segment.seq);
        let behind = start + segment.payload.len() as u64 + u64::from(segment.is_fin());
        if behind == start {
            return;
        }
        if start <= closing.next && behind > closing.next {
            closing.next = behind;
        }
        let is_too_much = closing.next - closing.first > SPILL;
        let make = Make {
            seq: own.seq(closing.fin + 1),
            ack: Some(other.seq(closing.next)),
            window: own.window,
            rst: is_too_much,
            timestamp: self.timestamp(answer.to.other()),
            ..Make::default()
        };
        self.emit(answer.to.other(), &make, shared, sink);
    }

    /// A packet of a connection that was answered here.
    pub(super) fn answered<S: Sink<F>>(
        &mut self,
        side: Side,
        segment: &Segment<'_>,
        frame: F,
        shared: &mut Shared,
        sink: &mut S,
    ) {
        let Phase::Answered(mut answer) = std::mem::replace(&mut self.phase, Phase::Open) else {
            return;
        };
        sink.discard(frame, answer.reason);
        if side != answer.to {
            self.closing(&mut answer, segment, shared, sink);
            self.phase = Phase::Answered(answer);
            return;
        }
        if segment.is_rst() {
            self.phase = Phase::Aborted(answer.reason);
            return;
        }
        if let Some((value, _)) = segment.options.timestamp
            && value.wrapping_sub(self.half(side).recent) as i32 > 0
        {
            self.half(side).recent = value;
        }
        let end = answer.start + answer.bytes.len() as u64 + 1;
        let from = self.half(side.other());
        let acked = from.position(segment.ack);
        if segment.is_ack() && acked <= end {
            from.acked = from.acked.max(acked);
        }
        if from.acked >= end {
            answer.tries = TRIES;
        }
        let own = self.half(side);
        let start = own.position(segment.seq);
        let behind = start + segment.payload.len() as u64 + u64::from(segment.is_fin());
        if behind > start {
            if start <= answer.next && behind > answer.next {
                answer.next = behind;
                own.next = behind;
            }
            if answer.next - answer.first > SPILL {
                self.reset_to(side, shared, sink);
                self.phase = Phase::Aborted(answer.reason);
                return;
            }
            let make = Make {
                seq: self.halves[side.other() as usize].seq(end),
                ack: Some(self.halves[side as usize].seq(answer.next)),
                window: self.halves[side.other() as usize].window,
                timestamp: self.timestamp(side),
                ..Make::default()
            };
            self.emit(side, &make, shared, sink);
        }
        self.phase = Phase::Answered(answer);
    }
}
