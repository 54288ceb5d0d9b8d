//! One TCP connection: RFC 9293, 3.10.7 as far as a firewall between the ends has to follow it.
//!
//! Start at `Connection::packet`: a segment is checked against the state (`arrive`, `open`, `reset`), its payload goes to
//! the [`Half`] of its direction, and the [`StreamInspector`] says what of it may go on (`read`). `answer` replies in the server's
//! place, `delivery` delivers what was acknowledged to the sender.

mod answer;
mod delivery;
mod quoted;

use palisade_abi::{CtKey, FlowCommand, PuntRequest, Reason, flow_op, punt_flags};

use super::{
    Action, Shared, Side, StreamInspector, flow_command,
    half::{Arrival, Half, Held, Position, START},
    segment::{Link, Make, Segment},
};
use crate::{
    Millis, PacketView, Sink,
    record::{About, Record, Verdict, What},
};
use answer::Answer;
pub(super) use quoted::Quoted;

/// Longest stretch that is given to the programs at once: sequence numbers are compared modulo 2^32.
const LONGEST_WINDOW: u64 = 1 << 30;
/// A window is taken back when so many bytes have gone by behind it.
const WINDOW_AGE: u64 = 1 << 28;
/// How often what was made here is sent again, and after how long for the first time.
const TRIES: u32 = 6;
const FIRST_TRY: Millis = 250;
/// Packets of one connection that are dropped for one reason are reported so often, ms.
const REPORT_EVERY: Millis = 1_000;

/// What is being done with a connection.
enum Phase {
    Open,
    /// An answer waits until the client has all that the server sent before.
    Answering(Box<Answer>),
    /// The answer has been sent.
    Answered(Box<Answer>),
    /// Nothing needs reading any more.
    Offloaded,
    /// It has been cut.
    Aborted(Reason),
}

/// Something that the programs are told once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Announcement {
    No,
    /// With the next packet.
    Next,
    Yes,
}

/// Distance between the serials of two connections that follow each other in one entry.
const NEXT_SERIAL: u32 = 0x9e37_79b9;

/// Both directions of a connection.
pub(crate) struct Connection<F> {
    halves: [Half<F>; 2],
    phase: Phase,
    key: CtKey,
    /// Of the packet that was read last.
    slot: PuntRequest,
    /// The number by which the programs know it, or will once it has taken the place of the one before.
    serial: u32,
    /// The number of the entry that another connection by these ports has left. With the answer to the SYN the programs
    /// are told that nothing decided for that one holds for this one.
    before: Option<u32>,
    /// The programs know it by `serial`.
    is_known: bool,
    /// What else the programs have been told of it, or are to be told with the next packet that is released.
    opened: Announcement,
    closed: Announcement,
    about: About,
    /// Another policy has its packets read too, and must not miss any: none are made in their place.
    is_shared: bool,
    /// Audit mode: where it would be cut it goes on, unread.
    is_audit: bool,
    windows: [u32; 4],
    /// Where in each direction the window is to be taken back: long behind it, and before its numbers come again.
    window_ends: [Option<Position>; 2],
    /// To go with the next packet that is released.
    command: bool,
    /// What is left of a stretch that needs no reading, behind the part that was skipped.
    rest: [u64; 2],
    /// What of it is counted in [`Shared`]: bytes and packets.
    counted: (u64, u64),
    /// When a packet of it was last seen.
    pub(super) seen: Millis,
    /// A reset has gone through.
    reset: bool,
    /// When a dropped packet was reported last, and the reason.
    reported: Option<(Millis, Reason)>,
}

impl<F> Connection<F> {
    /// Of a connection whose first packet is just being looked at.
    pub(super) fn new(key: CtKey, view: &PacketView<'_>) -> Self {
        let serial = view.slot.serial;
        // An entry that was made by this packet has nothing decided yet.
        let is_known = view.slot.flags & punt_flags::NEW != 0;
        Self {
            serial: if is_known {
                serial
            } else {
                serial.wrapping_add(NEXT_SERIAL)
            },
            before: (!is_known).then_some(serial),
            is_known,
            opened: Announcement::No,
            closed: Announcement::No,
            halves: [Half::new(), Half::new()],
            phase: Phase::Open,
            key,
            slot: *view.slot,
            about: About::of(view),
            is_shared: false,
            is_audit: false,
            windows: [0; 4],
            window_ends: [None; 2],
            command: false,
            rest: [0; 2],
            counted: (0, 0),
            seen: 0,
            reset: false,
            reported: None,
        }
    }

    pub(super) const fn serial(&self) -> u32 {
        self.serial
    }

    /// Whether a packet with this serial belongs to it. One of the connection before it counts too: its place in the
    /// stream tells what it is.
    pub(super) fn is_of(&self, serial: u32) -> bool {
        serial == self.serial || self.before == Some(serial)
    }

    /// Whether both sides have acknowledged the other's SYN.
    pub(super) fn is_opened(&self) -> bool {
        self.halves.iter().all(|half| half.acked > START)
    }

    /// Whether a segment of a side acknowledges the last SYN that is not acknowledged yet.
    pub(super) fn is_opened_by(&self, side: Side, segment: &Segment<'_>) -> bool {
        let (own, other) = (&self.halves[side as usize], &self.halves[side.other() as usize]);
        segment.is_ack()
            && !segment.is_rst()
            && own.acked > START
            && other.isn.is_some()
            && other.acked == START
            && (START + 1..=other.sent).contains(&other.position(segment.ack))
    }

    /// Whether it has been seen to end, so that a new connection by the same ports loses nothing.
    pub(super) fn is_closed(&self) -> bool {
        self.closed != Announcement::No || matches!(self.phase, Phase::Aborted(_))
    }

    /// Whether this SYN of a side has been here before, and may come again.
    pub(super) fn repeats(&self, side: Side, segment: &Segment<'_>) -> bool {
        self.halves[side as usize].isn == Some(segment.seq)
            && matches!(self.phase, Phase::Open | Phase::Answering(_))
    }

    /// Whether a segment of the server answers its SYN, and nothing else.
    pub(super) fn is_answered_by(&self, segment: &Segment<'_>) -> bool {
        let isn = self.halves[Side::Client as usize].isn;
        segment.is_ack() && isn.is_some_and(|isn| segment.ack == isn.wrapping_add(1))
    }

    /// An order to the programs about it.
    fn flow_command(&self, what: u32) -> FlowCommand {
        FlowCommand {
            serial: self.serial,
            ..flow_command(self.key, &self.slot, what)
        }
    }

    /// When nothing of it has been seen for how long it is forgotten.
    fn idle(&self, shared: &Shared) -> Millis {
        if self.is_done() {
            shared.limits.idle_closed
        } else if self.is_opened() {
            shared.limits.idle
        } else {
            shared.limits.half_open_idle
        }
    }

    /// Says that it is over, if the programs do not know.
    pub(super) fn forgotten<S: Sink<F>>(&mut self, sink: &mut S) {
        if self.is_done() && self.is_known && self.closed != Announcement::Yes {
            self.closed = Announcement::Yes;
            sink.command(&self.flow_command(flow_op::CLOSE));
        }
    }

    fn half(&mut self, side: Side) -> &mut Half<F> {
        &mut self.halves[side as usize]
    }

    /// Whether nothing more is expected of it.
    pub(super) fn is_done(&self) -> bool {
        self.reset
            || !matches!(self.phase, Phase::Open | Phase::Answering(_))
            || self
                .halves
                .iter()
                .all(|half| half.fin.is_some_and(|fin| half.acked > fin))
    }

    /// When [`Connection::tick`] has something to do.
    pub(super) fn deadline(&self, shared: &Shared) -> Millis {
        if self.is_over() {
            return self.seen;
        }
        let idle = self.idle(shared);
        let held = self
            .halves
            .iter()
            .filter_map(|half| half.due(shared.limits.deadline))
            .min();
        let again = match &self.phase {
            Phase::Answering(answer) | Phase::Answered(answer) if answer.tries < TRIES => Some(answer.again),
            _ => None,
        };
        [held, again]
            .into_iter()
            .flatten()
            .fold(self.seen.saturating_add(idle), Millis::min)
    }

    /// Does what is due. False: the connection is to be forgotten.
    pub(super) fn tick<S: Sink<F>>(&mut self, now: Millis, shared: &mut Shared, sink: &mut S) -> bool {
        match std::mem::replace(&mut self.phase, Phase::Open) {
            Phase::Answering(answer) if answer.again <= now => self.answer(now, answer, shared, sink),
            Phase::Answered(mut answer) if answer.tries < TRIES && answer.again <= now => {
                answer.tries += 1;
                answer.again = now + (FIRST_TRY << answer.tries);
                if answer.tries > 1 {
                    let is_ipv6 = self.link_to(answer.to).is_some_and(|link| link.is_ipv6());
                    self.half(answer.to).shrink(is_ipv6);
                }
                self.send_answer(&answer, shared, sink);
                self.send_end(&answer, shared, sink);
                self.phase = Phase::Answered(answer);
            }
            other => self.phase = other,
        }
        for side in [Side::Client, Side::Server] {
            if self.half(side).promise_at.is_some_and(|at| at <= now) {
                self.ack_on_behalf(side, shared, sink);
                self.deliver(side, shared, sink);
            }
            self.deliver_again(now, side, shared, sink);
        }
        self.arm(now, shared, sink);
        let late = |half: &Half<F>| {
            half.waits_since()
                .is_some_and(|since| since.saturating_add(shared.limits.deadline) <= now)
        };
        if self.halves.iter().any(late) {
            shared.stats.overdue += 1;
            if self.is_audit {
                self.pass_unread(Reason::InspectDeadline, shared, sink);
            } else {
                let reason = Reason::InspectDeadline;
                self.tell(Verdict::Dropped, reason, reason.text(), sink);
                self.abort(Reason::InspectDeadline, shared, sink);
            }
        }
        self.count(shared);
        self.seen.saturating_add(self.idle(shared)) > now
    }

    /// Lets the connection go on unread, as audit mode does where it would otherwise end.
    pub(super) fn pass_unread<S: Sink<F>>(&mut self, reason: Reason, shared: &mut Shared, sink: &mut S) {
        self.tell(Verdict::Audit, reason, reason.text(), sink);
        shared.stats.offloaded += 1;
        self.phase = Phase::Offloaded;
        self.flush(Side::Client, shared, sink);
    }

    /// Drops what is held.
    pub(super) fn close<S: Sink<F>>(&mut self, reason: Reason, shared: &mut Shared, sink: &mut S) {
        for half in &mut self.halves {
            for held in half.held.drain(..) {
                sink.discard(held.frame, reason);
            }
            half.clear();
        }
        self.count(shared);
    }

    /// Ends the connection for both sides.
    pub(crate) fn abort<S: Sink<F>>(&mut self, reason: Reason, shared: &mut Shared, sink: &mut S) {
        if matches!(self.phase, Phase::Aborted(_)) {
            return;
        }
        shared.stats.cut += 1;
        self.reset_to(Side::Client, shared, sink);
        self.reset_to(Side::Server, shared, sink);
        self.phase = Phase::Aborted(reason);
        self.close(reason, shared, sink);
        self.closed = Announcement::Yes;
        sink.command(&self.flow_command(flow_op::CLOSE));
    }

    /// Names a connection that is cut for a reason that no inspector has told.
    fn tell<S: Sink<F>>(&self, verdict: Verdict, reason: Reason, detail: &'static str, sink: &mut S) {
        sink.record(&Record {
            verdict,
            reason,
            ..Record::about(&self.about, What::Unreadable { detail })
        });
    }

    /// Whether a packet that is dropped for a reason is reported: of one connection the first for that reason and one a
    /// second, of all connections as many as [`Shared::may_report`] allows.
    pub(super) fn may_report(&mut self, now: Millis, reason: Reason, shared: &mut Shared) -> bool {
        if self
            .reported
            .is_some_and(|(at, last)| last == reason && now < at + REPORT_EVERY)
        {
            return false;
        }
        self.reported = Some((now, reason));
        shared.may_report(now)
    }

    /// Whether the connection is offloaded or ended, and every byte acknowledged on behalf of a receiver has reached it.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Offloaded) && self.is_drained()
    }

    fn is_drained(&self) -> bool {
        self.halves.iter().all(Half::is_drained)
    }

    /// How packets to `side` look.
    fn link_to(&self, side: Side) -> Option<Link> {
        let from = self.halves[side.other() as usize].link;
        from.or_else(|| self.halves[side as usize].link.map(|link| link.turned()))
    }

    fn emit<S: Sink<F>>(&self, to: Side, make: &Make<'_>, shared: &mut Shared, sink: &mut S) {
        if let Some(link) = self.link_to(to) {
            link.write(make, &mut shared.out);
            sink.emit(&shared.out, link.route());
        }
    }

    /// A reset to one side, as if from the other.
    fn reset_to<S: Sink<F>>(&self, to: Side, shared: &mut Shared, sink: &mut S) {
        let (from, own) = (&self.halves[to.other() as usize], &self.halves[to as usize]);
        if to == Side::Server && from.sent == from.acked && own.isn.is_none() {
            return;
        }
        let make = Make {
            seq: from.isn.map_or(0, |_| from.seq(from.sent)),
            ack: own.isn.map(|_| own.seq(own.next)),
            rst: true,
            ..Make::default()
        };
        self.emit(to, &make, shared, sink);
    }

    /// A reset in answer to a packet of a connection that is no more (RFC 9293, 3.10.7.1).
    pub(super) fn refuse<S: Sink<F>>(view: &PacketView<'_>, shared: &mut Shared, sink: &mut S) {
        if let (Some(link), Some(segment)) = (Link::of(view), Segment::read(view))
            && !segment.is_rst()
        {
            let length =
                segment.payload.len() as u32 + u32::from(segment.is_syn()) + u32::from(segment.is_fin());
            let make = Make {
                seq: if segment.is_ack() { segment.ack } else { 0 },
                ack: (!segment.is_ack()).then(|| segment.seq.wrapping_add(length)),
                rst: true,
                ..Make::default()
            };
            let back = link.turned();
            back.write(&make, &mut shared.out);
            sink.emit(&shared.out, back.route());
        }
    }

    /// Ends a connection of which only a packet in hand is known, for both sides. Returns whether that is done: false if
    /// the other side had to be asked first.
    ///
    /// A reset counts only if its sequence number is the very one that its receiver waits for (RFC 5961, 3.2). For the
    /// sender of the packet that is the acknowledgement number. What the other side waits for is not known: the packet
    /// may repeat what the other side has had and has acknowledged. So if the packet takes up sequence numbers, an empty
    /// segment goes on that stands before what the other side can be waiting for; the other side answers with an
    /// acknowledgement (RFC 9293, 3.10.7.4), or with a reset if it has no such connection. The acknowledgement comes
    /// here as a packet that takes up nothing, and gives both numbers. The sender of the packet repeats it until then,
    /// so a loss does not matter.
    pub(super) fn reset_unknown<S: Sink<F>>(
        view: &PacketView<'_>,
        shared: &mut Shared,
        sink: &mut S,
    ) -> bool {
        let (Some(link), Some(segment)) = (Link::of(view), Segment::read(view)) else {
            return true;
        };
        let asks = segment.is_ack() && !segment.is_syn() && !segment.is_rst();
        if asks && (segment.is_fin() || !segment.payload.is_empty()) {
            let make = Make {
                seq: segment.seq.wrapping_sub(1),
                ack: Some(segment.ack),
                window: segment.window,
                // A receiver may drop what lacks them, or has older ones (RFC 7323, 3.2 and 5.3).
                timestamp: segment.options.timestamp,
                ..Make::default()
            };
            link.write(&make, &mut shared.out);
            sink.emit(&shared.out, link.route());
            return false;
        }
        Self::refuse(view, shared, sink);
        // A keepalive probe names the byte before the next one (RFC 9293, 3.8.4).
        for more in 0..=u32::from(asks) {
            let make = Make {
                seq: segment.seq.wrapping_add(more),
                ack: segment.is_ack().then_some(segment.ack),
                rst: true,
                ..Make::default()
            };
            link.write(&make, &mut shared.out);
            sink.emit(&shared.out, link.route());
        }
        true
    }

    /// Counts it for the last time: it is going to be dropped, and holds nothing.
    pub(super) fn account(&mut self, shared: &mut Shared) {
        for half in &mut self.halves {
            half.clear();
        }
        self.count(shared);
    }

    fn count(&mut self, shared: &mut Shared) {
        let bytes = self.halves.iter().map(|half| half.kept() as u64).sum();
        let frames = self.halves.iter().map(|half| half.held.len() as u64).sum();
        shared.stats.bytes = shared.stats.bytes + bytes - self.counted.0;
        shared.stats.frames = shared.stats.frames + frames - self.counted.1;
        self.counted = (bytes, frames);
    }

    /// A packet.
    pub(super) fn packet<S: Sink<F>>(
        &mut self,
        now: Millis,
        view: &PacketView<'_>,
        frame: F,
        inspector: &mut impl StreamInspector<F>,
        shared: &mut Shared,
        sink: &mut S,
    ) {
        self.seen = now;
        self.is_known |= view.slot.serial == self.serial;
        let side = Side::of(view.slot);
        self.is_audit = view.slot.flags & punt_flags::AUDIT != 0;
        self.is_shared |= view.slot.flags & punt_flags::SHARED != 0;
        if side == Side::Client {
            self.about = About::of(view);
        }
        match &self.phase {
            Phase::Offloaded => {
                // Until the receivers have every byte acknowledged on their behalf, this module has to know what they have.
                if let Some(segment) = Segment::read(view).filter(Segment::is_ack) {
                    let other = self.half(side.other());
                    let acked = other.position(segment.ack);
                    if acked <= other.proxy_acked {
                        other.acknowledge(acked, 0);
                    } else {
                        other.acknowledge(other.proxy_acked, 0);
                    }
                }
                // Judged by the old rules; by the new ones once every byte acknowledged on behalf of a receiver is delivered.
                if (view.slot.ruleset, view.slot.flags & punt_flags::AUDIT)
                    != (self.slot.ruleset, self.slot.flags & punt_flags::AUDIT)
                {
                    sink.discard(frame, Reason::TcpHeld);
                    return;
                }
                self.command = self.is_drained();
                self.release(frame, shared, sink);
                if !self.is_drained() {
                    self.arm(now, shared, sink);
                }
                return;
            }
            Phase::Aborted(reason) => {
                sink.discard(frame, *reason);
                Self::refuse(view, shared, sink);
                return;
            }
            _ => {}
        }
        self.slot = *view.slot;
        let Some(segment) = Segment::read(view) else {
            shared.stats.invalid += 1;
            let reason = Reason::TcpInvalid;
            if self.may_report(now, reason, shared) {
                let detail = reason.text();
                sink.record(&Record {
                    verdict: Verdict::Dropped,
                    reason,
                    ..Record::of(view, What::Unreadable { detail })
                });
            }
            sink.discard(frame, reason);
            return;
        };
        if matches!(self.phase, Phase::Answered(_)) {
            self.answered(side, &segment, frame, shared, sink);
            return;
        }
        match self.receive(now, side, view, &segment, frame, shared, sink) {
            Ok(false) => {}
            Ok(true) => self.read(now, inspector, shared, sink),
            Err((reason, frame)) => {
                let half = &self.halves[side as usize];
                if reason == Reason::TcpHeld && half.proxy_acked > half.acked {
                    self.acknowledge(side, shared, sink);
                }
                match reason {
                    Reason::TcpOutOfWindow => shared.stats.out_of_window += 1,
                    Reason::TcpOverlap => shared.stats.overlaps += 1,
                    Reason::TcpHeld => shared.stats.retransmitted += 1,
                    Reason::InspectLimit => shared.stats.limited += 1,
                    _ => shared.stats.invalid += 1,
                }
                // A repetition of what is held is no loss: the first one goes on.
                if reason != Reason::TcpHeld && self.may_report(now, reason, shared) {
                    let detail = reason.text();
                    sink.record(&Record {
                        verdict: Verdict::Dropped,
                        reason,
                        ..Record::of(view, What::Unreadable { detail })
                    });
                }
                sink.discard(frame, reason);
            }
        }
        self.arm(now, shared, sink);
        self.count(shared);
    }

    /// The inspector knows something new.
    pub(super) fn resume<S: Sink<F>>(
        &mut self,
        now: Millis,
        inspector: &mut impl StreamInspector<F>,
        shared: &mut Shared,
        sink: &mut S,
    ) {
        self.read(now, inspector, shared, sink);
        self.arm(now, shared, sink);
        self.count(shared);
    }

    /// Takes a packet into its place. Ok: whether there may be something to read.
    #[expect(clippy::too_many_arguments, reason = "a packet and where it goes")]
    fn receive<S: Sink<F>>(
        &mut self,
        now: Millis,
        side: Side,
        view: &PacketView<'_>,
        segment: &Segment<'_>,
        frame: F,
        shared: &mut Shared,
        sink: &mut S,
    ) -> Result<bool, (Reason, F)> {
        if segment.is_syn() {
            return self
                .open(side, view, segment, frame, shared, sink)
                .map(|()| false);
        }
        let is_agreed = self.halves.iter().all(|half| half.has_timestamps);
        let scales = self.halves.iter().all(|half| half.scale.is_some());
        let [client, server] = &mut self.halves;
        let (own, other) = match side {
            Side::Client => (client, server),
            Side::Server => (server, client),
        };
        if segment.is_rst() {
            return self.reset(side, segment, frame, shared, sink).map(|()| false);
        }
        // Both have sent their SYN, and everything behind a SYN acknowledges something (RFC 9293, 3.10.7.4).
        if own.isn.is_none() || other.isn.is_none() || !segment.is_ack() {
            return Err((Reason::TcpInvalid, frame));
        }
        let start = own.position(segment.seq);
        let end = start + segment.payload.len() as u64;
        let behind = end + u64::from(segment.is_fin());
        // One byte more is a probe of a closed window.
        if start < own.oldest() || behind > own.edge + 1 {
            return Err((Reason::TcpOutOfWindow, frame));
        }
        let acked = other.position(segment.ack);
        if acked > other.sent && self.is_shared && segment.payload.is_empty() {
            // The other policy's inspector has sent it, and has to hear that; a receiver drops what acknowledges more than
            // it has sent (RFC 9293, 3.10.7.4). So the connection ends.
            self.reset = true;
            self.release(frame, shared, sink);
            return Ok(false);
        }
        if acked > other.sent || acked < other.oldest() {
            return Err((Reason::TcpOutOfWindow, frame));
        }
        if is_agreed && segment.options.timestamp.is_none() {
            return Err((Reason::TcpInvalid, frame));
        }
        for edge in segment.options.sack.iter().flatten() {
            if other.position(*edge) > other.sent {
                return Err((Reason::TcpInvalid, frame));
            }
        }
        if own.is_stale(segment, start, is_agreed) {
            return Err((Reason::TcpOutOfWindow, frame));
        }
        let shift = if scales { own.scale.unwrap_or(0) } else { 0 };
        own.window = segment.window;
        own.link = Link::of(view).or(own.link);
        let judged = other.judged;
        other.acknowledge(acked, u64::from(segment.window) << shift);
        self.note_state();
        let [client, server] = &mut self.halves;
        let (own, other) = match side {
            Side::Client => (client, server),
            Side::Server => (server, client),
        };
        let progress = matches!(self.phase, Phase::Answering(_)) || judged != other.judged;
        if behind == start {
            self.release(frame, shared, sink);
            return Ok(progress);
        }
        if own
            .fin
            .is_some_and(|fin| end > fin || (segment.is_fin() && end != fin))
            || (segment.is_fin() && own.highest > end)
        {
            return Err((Reason::TcpOverlap, frame));
        }
        if start < own.acked {
            // The receiver says that it has the beginning. It takes nothing of that again, or it lies to get bytes that
            // nobody has read; so the sender is told here how far it has come. But one byte at the end of what the
            // receiver has asks whether that is still there (RFC 9293, 3.8.4).
            shared.stats.retransmitted += 1;
            if behind == own.acked && segment.payload.len() <= 1 {
                self.release(frame, shared, sink);
                return Ok(progress);
            }
            let has_room = end <= own.reach(shared.limits.bytes_per_direction as u64)
                && shared.stats.bytes <= shared.limits.bytes as u64;
            let new = segment.payload.get((own.acked - start) as usize..);
            if let Some(new) =
                new.filter(|new| !new.is_empty() && has_room && !self.is_shared && own.is_contiguous())
            {
                // What it has beyond that goes on in packets made here.
                if own.take(own.acked, new) == Arrival::Differs {
                    return Err((Reason::TcpOverlap, frame));
                }
                own.proxy_acked = own.proxy_acked.max(own.next);
                sink.absorb(frame);
                self.acknowledge(side, shared, sink);
                return Ok(true);
            }
            sink.discard(frame, Reason::TcpHeld);
            self.acknowledge(side, shared, sink);
            return Ok(progress);
        }
        let waits = behind > own.forward_limit();
        if end > own.reach(shared.limits.bytes_per_direction as u64)
            || shared.stats.bytes > shared.limits.bytes as u64
            || (waits
                && (own.held.len() >= shared.limits.frames_per_direction
                    || shared.stats.frames >= shared.limits.frames as u64))
        {
            return Err((Reason::InspectLimit, frame));
        }
        let fresh = match own.take(start, segment.payload) {
            Arrival::Differs => return Err((Reason::TcpOverlap, frame)),
            Arrival::New => true,
            Arrival::Known => segment.is_fin() && own.fin.is_none(),
        };
        if segment.is_fin() {
            own.fin = Some(end);
        }
        if !waits {
            own.sent = own.sent.max(behind);
            if !fresh {
                shared.stats.retransmitted += 1;
            }
            self.release(frame, shared, sink);
            return Ok(true);
        }
        // The part that may go is sent on in a packet made here: now if its bytes are not kept, because they need no reading;
        // once more if the sender sends it again.
        let (goes, sent, is_kept) = (own.judged, own.sent, !own.bytes(start, end).is_empty());
        if !self.is_shared && start < goes && (!is_kept || (!fresh && sent > start)) {
            let part = &segment.payload[..((goes - start) as usize).min(segment.payload.len())];
            self.send_part(side, start, part, shared, sink);
        }
        if !fresh {
            return Err((Reason::TcpHeld, frame));
        }
        let own = self.half(side);
        own.hold(Held {
            frame,
            start,
            end: behind,
            since: now,
        });
        Ok(true)
    }

    /// A SYN.
    fn open<S: Sink<F>>(
        &mut self,
        side: Side,
        view: &PacketView<'_>,
        segment: &Segment<'_>,
        frame: F,
        shared: &mut Shared,
        sink: &mut S,
    ) -> Result<(), (Reason, F)> {
        // Data in a SYN (RFC 7413) would have to be judged before there is a connection; without an answer the client
        // sends it again in its place.
        if !segment.payload.is_empty() || segment.is_fin() || segment.is_rst() {
            return Err((Reason::TcpInvalid, frame));
        }
        let [client, server] = &mut self.halves;
        let (own, other) = match side {
            Side::Client => (client, server),
            Side::Server => (server, client),
        };
        if segment.is_ack() {
            let position = other.position(segment.ack);
            if other.isn.is_none() || position != START + 1 {
                return Err((Reason::TcpInvalid, frame));
            }
        } else if side == Side::Server && other.isn.is_none() {
            return Err((Reason::TcpInvalid, frame));
        }
        // Another one may take the place of a SYN that nobody has answered.
        let unanswered = own.acked == START && own.highest == START + 1 && own.sent == START + 1;
        if own.isn != Some(segment.seq) {
            if own.isn.is_some() && (!unanswered || (side == Side::Client && other.isn.is_some())) {
                return Err((Reason::TcpInvalid, frame));
            }
            own.isn = Some(segment.seq);
            own.scale = segment.options.scale;
            own.mss = segment.options.mss.unwrap_or(536);
            own.has_timestamps = segment.options.timestamp.is_some();
            own.recent = segment.options.timestamp.map_or(0, |(value, _)| value);
            own.latest = own.recent;
        } else if own.scale != segment.options.scale
            || own.has_timestamps != segment.options.timestamp.is_some()
        {
            // A stack may give options up when nobody answers, before anybody has.
            if !unanswered || other.isn.is_some() {
                return Err((Reason::TcpInvalid, frame));
            }
            own.scale = segment.options.scale;
            own.has_timestamps = segment.options.timestamp.is_some();
        }
        own.link = Link::of(view).or(own.link);
        own.window = segment.window;
        // The window of a SYN is never scaled (RFC 7323, 2.2).
        let window = u64::from(segment.window);
        if segment.is_ack() {
            other.acknowledge(START + 1, window);
        } else {
            other.edge = other.edge.max(START + 1 + window);
        }
        let is_first = side == Side::Client && !segment.is_ack();
        match self.before.filter(|_| !is_first && !self.is_known) {
            // In force before the client hears of it, and so before anything can be sent on the connection.
            Some(before) => {
                let command = FlowCommand {
                    serial: before,
                    windows: [self.serial, 0, 0, 0],
                    ..self.flow_command(flow_op::REPLACE)
                };
                sink.release_with(frame, &command);
            }
            None => self.release(frame, shared, sink),
        }
        Ok(())
    }

    /// Notes what the programs are to be told of its state: they believe only what was verified here.
    fn note_state(&mut self) {
        if self.opened == Announcement::No && self.is_opened() {
            self.opened = Announcement::Next;
        }
        let is_ended = |half: &Half<F>| half.fin.is_some_and(|fin| half.acked > fin);
        if self.closed == Announcement::No && self.halves.iter().all(is_ended) {
            self.closed = Announcement::Next;
        }
        if self.closed == Announcement::No {
            // Its ends go on: the reset did not name the byte that its receiver waited for.
            self.reset = false;
        }
    }

    /// A reset: believed if it names a byte that the receiver may be waiting for (RFC 5961, 3.2).
    fn reset<S: Sink<F>>(
        &mut self,
        side: Side,
        segment: &Segment<'_>,
        frame: F,
        shared: &mut Shared,
        sink: &mut S,
    ) -> Result<(), (Reason, F)> {
        let other = &self.halves[side.other() as usize];
        let own = &self.halves[side as usize];
        if own.isn.is_none() {
            // A refusal: it acknowledges the SYN.
            let answers = other.isn.is_some() && segment.is_ack() && other.position(segment.ack) == START + 1;
            if !answers {
                return Err((Reason::TcpOutOfWindow, frame));
            }
            self.reset = true;
            self.closed = Announcement::Next;
            self.release(frame, shared, sink);
            return Ok(());
        }
        let position = own.position(segment.seq);
        if (own.acked..=own.sent).contains(&position) {
            self.reset = true;
            // What the receiver has of the bytes that are under way is not known here. If some are, it may answer with a
            // challenge instead (RFC 5961, 3.2).
            if own.acked == own.sent && self.closed == Announcement::No {
                self.closed = Announcement::Next;
            }
            self.release(frame, shared, sink);
            return Ok(());
        }
        if position != own.highest && own.fin.is_none_or(|fin| position != fin + 1) {
            return Err((Reason::TcpOutOfWindow, frame));
        }
        // Behind bytes that are held: those never go on, so the receiver would not believe it.
        sink.discard(frame, Reason::TcpHeld);
        self.reset_to(side.other(), shared, sink);
        self.reset = true;
        self.phase = Phase::Aborted(Reason::TcpHeld);
        self.close(Reason::TcpHeld, shared, sink);
        self.closed = Announcement::Yes;
        sink.command(&self.flow_command(flow_op::CLOSE));
        Ok(())
    }

    fn release<S: Sink<F>>(&mut self, frame: F, shared: &mut Shared, sink: &mut S) {
        if !std::mem::take(&mut self.command) {
            let told = [
                (&mut self.closed, flow_op::CLOSE),
                (&mut self.opened, flow_op::OPENED),
            ];
            let next = told.into_iter().find(|(told, _)| **told == Announcement::Next);
            match next.map(|(told, what)| {
                *told = Announcement::Yes;
                what
            }) {
                Some(what) => sink.release_with(frame, &self.flow_command(what)),
                None => sink.release(frame),
            }
            return;
        }
        // Either says that it is open, too.
        self.opened = Announcement::Yes;
        if matches!(self.phase, Phase::Offloaded) {
            sink.release_with(frame, &self.flow_command(flow_op::OFFLOAD));
            return;
        }
        shared.stats.windows += 1;
        let command = FlowCommand {
            windows: self.windows,
            ..self.flow_command(flow_op::WINDOWS)
        };
        sink.release_with(frame, &command);
    }

    /// Shows the inspector what there is, until nothing more happens.
    fn read<S: Sink<F>>(
        &mut self,
        now: Millis,
        inspector: &mut impl StreamInspector<F>,
        shared: &mut Shared,
        sink: &mut S,
    ) {
        if matches!(self.phase, Phase::Answering(_)) {
            self.answer_when_due(now, shared, sink);
            return;
        }
        self.take_windows_back();
        let judged = self.halves.each_ref().map(|half| half.judged);
        let mut again = true;
        while std::mem::take(&mut again) {
            for side in [Side::Client, Side::Server] {
                while matches!(self.phase, Phase::Open) && self.read_once(now, side, inspector, shared, sink)
                {
                    again = true;
                }
                self.flush(side, shared, sink);
            }
        }
        for (half, judged) in self.halves.iter_mut().zip(judged) {
            if half.unjudged().is_empty() {
                half.since = None;
            } else if half.since.is_none() || half.judged > judged {
                half.since = Some(now);
            }
        }
    }

    /// Sequence numbers come again after 2^32 bytes. A window that is long over is taken back, more than once in case
    /// the packet is lost that says so.
    fn take_windows_back(&mut self) {
        for side in [0, 1] {
            if let Some(end) = self.window_ends[side]
                && self.halves[side].judged > end
            {
                self.windows[side * 2] = 0;
                self.windows[side * 2 + 1] = 0;
                self.command = true;
                self.window_ends[side] = Some(end + WINDOW_AGE);
            }
        }
    }

    /// Asks the inspector once. Whether something came of it.
    fn read_once<S: Sink<F>>(
        &mut self,
        now: Millis,
        side: Side,
        inspector: &mut impl StreamInspector<F>,
        shared: &mut Shared,
        sink: &mut S,
    ) -> bool {
        let half = &mut self.halves[side as usize];
        let end = half.is_whole();
        let bytes = half.unjudged();
        let there = bytes.len();
        if there == 0 && (!end || half.end_read || half.judged > half.next) {
            return false;
        }
        let step = match std::mem::take(&mut self.rest[side as usize]) {
            0 => {
                inspector.sent(side, half.sent.saturating_sub(START + 1));
                inspector.read(side, bytes, end, sink)
            }
            rest => Action::Bypass(rest),
        };
        // What may go of a shared connection's packet goes with the rest of it only; the other side may wait for just that.
        half.is_patient = matches!(step, Action::AwaitPeer) && !(self.is_shared && half.part().is_some());
        match step {
            Action::NeedMore | Action::AwaitPeer => false,
            Action::ForwardUnjudged(n) => {
                half.ahead = half.judged + n.min(there) as u64;
                false
            }
            Action::Forward(n) => {
                half.pass(n.min(there) as u64);
                if there == 0 {
                    half.end_read = true;
                    half.judged += 1;
                    return true;
                }
                n > 0
            }
            Action::Bypass(n) => {
                self.skip(side, n, there as u64, shared);
                n > 0
            }
            Action::Offload => {
                shared.stats.offloaded += 1;
                self.phase = Phase::Offloaded;
                false
            }
            Action::Abort(reason) => {
                self.flush(side, shared, sink);
                self.split(side, shared, sink);
                self.abort(reason, shared, sink);
                false
            }
            Action::Respond(reason, bytes) => {
                self.flush(side, shared, sink);
                self.split(side, shared, sink);
                let until = now.saturating_add(shared.limits.deadline / 2);
                self.phase = Phase::Answering(Box::new(Answer::new(reason, side, bytes, until)));
                self.answer_when_due(now, shared, sink);
                false
            }
        }
    }

    fn skip(&mut self, side: Side, n: u64, there: u64, shared: &Shared) {
        const SMALL: u64 = 4096;
        let half = &mut self.halves[side as usize];
        // What is to be delivered from here is kept.
        let undelivered = half.proxy_acked.saturating_sub(half.judged).min(n);
        if undelivered > 0 {
            half.pass(undelivered);
            self.rest[side as usize] = n - undelivered;
            return;
        }
        let taken = n.min(LONGEST_WINDOW);
        if n <= there + SMALL {
            half.pass(n);
            return;
        }
        let from = half.seq(half.judged);
        let is_apart = half.skip(taken);
        self.rest[side as usize] = n - taken;
        // The acknowledgements of bytes in a window are not seen here.
        if is_apart && n - there >= shared.limits.window && self.is_drained() {
            let at = side as usize * 2;
            self.windows[at] = from;
            let end = self.halves[side as usize].judged;
            self.windows[at + 1] = self.halves[side as usize].seq(end);
            self.window_ends[side as usize] = Some(end + WINDOW_AGE);
            self.command = true;
        }
    }

    /// Lets go what may go.
    fn flush<S: Sink<F>>(&mut self, side: Side, shared: &mut Shared, sink: &mut S) {
        if matches!(self.phase, Phase::Offloaded) {
            for side in [Side::Client, Side::Server] {
                let half = self.half(side);
                half.judged = half.judged.max(half.proxy_acked);
                self.deliver(side, shared, sink);
            }
            let is_drained = self.is_drained();
            // The last one takes the command along: what the programs let pass from then on is not before these.
            let mut rest = self.halves[0].held.len() + self.halves[1].held.len();
            for side in [Side::Client, Side::Server] {
                while let Some(held) = self.half(side).held.pop_front() {
                    rest -= 1;
                    self.command = rest == 0 && is_drained;
                    self.release(held.frame, shared, sink);
                }
            }
            if is_drained {
                self.close(Reason::Allowed, shared, sink);
            }
            return;
        }
        self.deliver(side, shared, sink);
        while let Some(held) = self.half(side).releasable() {
            self.release(held.frame, shared, sink);
        }
        let half = &self.halves[side as usize];
        // Else the rest is about to come, or all of it is acknowledged here in a moment.
        if half.is_patient || !half.is_contiguous() {
            self.split(side, shared, sink);
        }
    }

    /// Timestamps of a packet to one side.
    fn timestamp(&self, to: Side) -> Option<(u32, u32)> {
        let agreed = self.halves.iter().all(|half| half.has_timestamps);
        agreed.then(|| {
            (
                self.halves[to.other() as usize].latest,
                self.halves[to as usize].recent,
            )
        })
    }
}
