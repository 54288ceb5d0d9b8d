//! One TCP connection: RFC 9293, 3.10.7, as far as a firewall between the ends has to follow it.
//!
//! Start at `Connection::packet`. `receive` checks a segment against the state of both ends (`open` and `reset` for SYN
//! and RST) and stores its payload in the [`Half`] of its sender. `inspection` shows the stored bytes to the
//! [`StreamInspector`] and forwards the bytes that it allows. `ack_on_behalf` acknowledges held bytes on behalf of the
//! receiver and delivers them later, `respond` responds to one end in the other end's place, `icmp` handles ICMP
//! errors.

mod ack_on_behalf;
mod handover;
mod icmp;
mod inspection;
mod open;
mod phase;
mod receive;
mod reset;
mod respond;
mod send_limit;
mod suspend;

use palisade_abi::{CtKey, FlowCommand, PuntRequest, Reason, flow_op, punt_flags};

use super::{
    flow::flow_command,
    half::{Half, OffloadWindow, Position, START},
    inspector::StreamInspector,
    segment::{Arrived, Link, OutSegment, Segment},
    shared::{Shared, TcpCx},
    side::{PerSide, Side},
};
use crate::{
    Millis, PacketView, Sink,
    record::{About, Record, Verdict, What},
    steps::{self, Detail},
};
pub(super) use handover::Transfer;
use phase::{Announcement, FIRST_TRY, Phase, Suspended, TRIES};

/// Interval between two records of one connection about packets dropped for the same reason, ms.
const REPORT_EVERY: Millis = 1_000;

/// Number of bytes past the end of an offload window after which the window is removed.
const WINDOW_AGE: u64 = 1 << 28;

/// Difference between the serials of two connections that use the same conntrack entry one after the other.
const NEXT_SERIAL: u32 = 0x9e37_79b9;

/// Both directions of a connection.
pub(crate) struct Connection<F> {
    halves: PerSide<Half<F>>,
    phase: Phase,
    key: CtKey,
    /// Punt request of the last packet. It is not updated after the connection was offloaded or aborted.
    slot: PuntRequest,
    /// Serial of the conntrack entry, or the serial that the entry gets when this connection replaces the previous one.
    serial: u32,
    /// Serial that a previous connection with the same ports has left in the conntrack entry. The command that goes
    /// with the SYN+ACK replaces that serial, so that no offload of the previous connection applies to this one.
    before: Option<u32>,
    /// Whether the conntrack entry is known to have `serial`.
    is_known: bool,
    /// Notification to the BPF programs that the handshake is complete.
    opened: Announcement,
    /// Notification to the BPF programs that the connection has ended.
    closed: Announcement,
    about: About,
    /// Whether two policies inspect the packets: that of a workload and that of the node. The inspector of the second
    /// policy does not see generated packets, so held packets are neither split nor acknowledged on behalf of the
    /// receiver.
    is_shared: bool,
    /// Whether audit mode is on. A connection that exceeds the deadline is then offloaded instead of aborted.
    is_audit: bool,
    /// Offload window of each direction: sequence numbers of its start and end.
    windows: PerSide<[u32; 2]>,
    /// [`palisade_abi::send_limit_code`] of each offload window; 0: its sender is not limited.
    codes: PerSide<u32>,
    /// Whether the worker still has to offer an offload window to the sender.
    offers: PerSide<bool>,
    /// Offload windows that are put off ([`Connection::open_window`]).
    put_off: PerSide<Option<OffloadWindow>>,
    /// Position after which the offload window of each direction is removed, before its sequence numbers wrap around.
    window_ends: PerSide<Option<Position>>,
    /// Whether the offload windows are out of force.
    suspended: Suspended,
    /// Whether the next packet that is forwarded carries the flow command for the offload or the windows.
    command: bool,
    /// Number of bytes of each direction that need no inspection and are not marked as allowed yet.
    rest: PerSide<u64>,
    /// Bytes and packets of this connection that are counted in [`Shared`].
    counted: (u64, u64),
    /// Time of the first packet, ms.
    began: Millis,
    /// Whether the handshake has shown a short round-trip time.
    is_near: bool,
    /// Time of the last packet, ms.
    pub(super) seen: Millis,
    /// Whether a reset, or a response of another policy's inspector, has presumably ended the connection.
    is_reset: bool,
    /// Time and reason of the last record about a dropped packet.
    reported: Option<(Millis, Reason)>,
}

impl<F> Connection<F> {
    /// Returns a connection that begins with the packet of `view`.
    pub(super) fn new(key: CtKey, view: &PacketView<'_>) -> Self {
        let serial = view.slot.serial;
        let about = About::of(view);
        steps::of(&about, Detail::Debug, Some(view.slot.rule), || {
            format!(
                "the inspection of a connection begins, rule set {}",
                view.slot.ruleset
            )
        });
        // A conntrack entry that this packet has created holds no offload of an earlier connection.
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
            halves: PerSide::new(Half::new(), Half::new()),
            phase: Phase::Open,
            key,
            slot: *view.slot,
            about,
            is_shared: false,
            is_audit: false,
            windows: PerSide::default(),
            codes: PerSide::default(),
            offers: PerSide::default(),
            put_off: PerSide::default(),
            window_ends: PerSide::default(),
            suspended: Suspended::No,
            command: false,
            rest: PerSide::default(),
            counted: (0, 0),
            began: 0,
            is_near: false,
            seen: 0,
            is_reset: false,
            reported: None,
        }
    }

    pub(super) const fn serial(&self) -> u32 {
        self.serial
    }

    /// Returns whether a packet with this serial can belong to the connection. The serial of the previous connection
    /// counts too: until the conntrack entry is replaced, only sequence numbers distinguish the two connections.
    pub(super) fn is_of(&self, serial: u32) -> bool {
        serial == self.serial || self.before == Some(serial)
    }

    /// Returns whether both ends have acknowledged the SYN of the other end.
    pub(super) fn is_opened(&self) -> bool {
        self.halves.both().iter().all(|half| half.acked > START)
    }

    /// Returns whether a segment of `side` completes the handshake.
    pub(super) fn is_opened_by(&self, side: Side, segment: &Segment<'_>) -> bool {
        let (own, other) = (&self.halves[side], &self.halves[side.other()]);
        segment.is_ack()
            && !segment.is_rst()
            && own.acked > START
            && other.isn.is_some()
            && other.acked == START
            && (START + 1..=other.sent).contains(&other.position(segment.ack))
    }

    /// Returns whether the end of the connection was seen, so that a new connection with the same ports can replace it.
    pub(super) fn is_closed(&self) -> bool {
        self.closed != Announcement::No || matches!(self.phase, Phase::Aborted(_))
    }

    /// Returns whether a SYN of `side` is a retransmission.
    pub(super) fn repeats(&self, side: Side, segment: &Segment<'_>) -> bool {
        self.halves[side].isn == Some(segment.seq) && matches!(self.phase, Phase::Open | Phase::Responding(_))
    }

    /// Returns whether a segment of the server acknowledges exactly the SYN of the client.
    pub(super) fn is_answered_by(&self, segment: &Segment<'_>) -> bool {
        let isn = self.halves.client.isn;
        segment.is_ack() && isn.is_some_and(|isn| segment.ack == isn.wrapping_add(1))
    }

    /// Returns a flow command about this connection.
    fn flow_command(&self, op: u32) -> FlowCommand {
        FlowCommand {
            serial: self.serial,
            ..flow_command(self.key, &self.slot, op)
        }
    }

    /// Returns the time without a packet after which the connection is removed, or after which the offload windows are
    /// suspended, ms.
    fn idle(&self, shared: &Shared) -> Millis {
        if self.has_windows() && !self.is_done() {
            shared.limits.idle / 2
        } else if self.is_done() {
            shared.limits.idle_closed
        } else if self.is_opened() {
            shared.limits.idle
        } else {
            shared.limits.half_open_idle
        }
    }

    /// Sends the CLOSE command, unless it was sent before, if the connection is done and the conntrack entry has the
    /// serial of the connection.
    pub(super) fn forgotten<S: Sink<F>>(&mut self, cx: &mut TcpCx<'_, F, S>) {
        if self.is_done() && self.is_known && self.closed != Announcement::Sent {
            self.closed = Announcement::Sent;
            cx.sink.command(&self.flow_command(flow_op::CLOSE));
        }
    }

    /// Returns whether the connection has ended or no longer needs inspection.
    pub(super) fn is_done(&self) -> bool {
        self.is_reset
            || !matches!(self.phase, Phase::Open | Phase::Responding(_))
            || self.halves.both().into_iter().all(Half::is_ended)
    }

    /// Returns the time at which [`Connection::tick`] must be called, ms.
    pub(super) fn deadline(&self, shared: &Shared) -> Millis {
        if self.is_over() {
            return self.seen;
        }
        let idle = self.idle(shared);
        let held = self
            .halves
            .both()
            .into_iter()
            .filter_map(|half| half.due(shared.limits.deadline))
            .min();
        let again = match &self.phase {
            Phase::Responding(response) | Phase::Responded(response) if response.tries < TRIES => {
                Some(response.again)
            }
            _ => None,
        };
        [held, again]
            .into_iter()
            .flatten()
            .fold(self.seen.saturating_add(idle), Millis::min)
    }

    /// Handles timeouts. Returns whether the connection stays in the table.
    pub(super) fn tick<S: Sink<F>>(&mut self, cx: &mut TcpCx<'_, F, S>) -> bool {
        self.retransmit_response(cx);
        for side in Side::BOTH {
            if self.halves[side].ack_at.is_some_and(|at| at <= cx.now) {
                self.ack_on_behalf(side, cx);
                self.deliver(side, cx);
            }
            self.retransmit(side, cx);
        }
        self.arm(cx);
        let is_idle = self.seen.saturating_add(self.idle(cx.shared)) <= cx.now;
        if is_idle && self.has_windows() && !self.is_done() {
            self.suspend_unseen(cx);
        }
        let is_late = |half: &&Half<F>| {
            half.waits_since()
                .is_some_and(|since| since.saturating_add(cx.shared.limits.deadline) <= cx.now)
        };
        if self.halves.both().iter().any(is_late) {
            let reason = Reason::InspectDeadline;
            cx.shared.stats.overdue += 1;
            if self.is_audit {
                self.pass_unread(reason, cx);
            } else {
                self.report_end(Verdict::Dropped, reason, reason.text(), cx);
                self.abort(reason, cx);
            }
        }
        self.count(cx.shared);
        self.seen.saturating_add(self.idle(cx.shared)) > cx.now
    }

    /// Offloads a connection that would be aborted or refused without audit mode.
    pub(super) fn pass_unread<S: Sink<F>>(&mut self, reason: Reason, cx: &mut TcpCx<'_, F, S>) {
        self.report_end(Verdict::Audit, reason, reason.text(), cx);
        cx.shared.stats.offloaded += 1;
        self.phase = Phase::Offloaded;
        self.flush(Side::Client, cx);
    }

    /// Drops the held packets and the kept bytes, and stops the timers.
    pub(super) fn close<S: Sink<F>>(&mut self, reason: Reason, cx: &mut TcpCx<'_, F, S>) {
        for half in self.halves.both_mut() {
            for held in half.held.drain(..) {
                cx.sink.discard(held.frame, reason);
            }
            half.clear();
        }
        self.count(cx.shared);
    }

    /// Records that the connection ends, or would end without audit mode, for a reason other than an inspector's
    /// verdict.
    fn report_end<S: Sink<F>>(
        &self,
        verdict: Verdict,
        reason: Reason,
        detail: &'static str,
        cx: &mut TcpCx<'_, F, S>,
    ) {
        cx.sink.record(&Record {
            verdict,
            reason,
            ..Record::about(&self.about, What::Unreadable { detail })
        });
    }

    /// Records a dropped packet, within the limits of [`Connection::may_report`].
    pub(super) fn report_drop<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        reason: Reason,
        cx: &mut TcpCx<'_, F, S>,
    ) {
        if self.may_report(reason, cx) {
            let detail = reason.text();
            cx.sink.record(&Record {
                verdict: Verdict::Dropped,
                reason,
                ..Record::of(view, What::Unreadable { detail })
            });
        }
    }

    /// Returns whether a dropped packet is recorded. A packet that was dropped for the same reason as the last recorded
    /// one is recorded only after [`REPORT_EVERY`]. [`Shared::may_report`] limits all records.
    pub(super) fn may_report<S>(&mut self, reason: Reason, cx: &mut TcpCx<'_, F, S>) -> bool {
        if self
            .reported
            .is_some_and(|(at, last)| last == reason && cx.now < at + REPORT_EVERY)
        {
            return false;
        }
        self.reported = Some((cx.now, reason));
        cx.shared.may_report(cx.now)
    }

    /// Returns whether the connection is offloaded and every byte acknowledged on behalf of a receiver has reached that
    /// receiver.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Offloaded) && self.is_drained()
    }

    fn is_drained(&self) -> bool {
        self.halves.both().into_iter().all(Half::is_drained)
    }

    /// Returns the link header and route of packets to `side`.
    fn link_to(&self, side: Side) -> Option<Link> {
        let from = self.halves[side.other()].link;
        from.or_else(|| self.halves[side].link.map(|link| link.reversed()))
    }

    fn emit<S: Sink<F>>(&self, to: Side, segment: &OutSegment<'_>, cx: &mut TcpCx<'_, F, S>) {
        if let Some(link) = self.link_to(to) {
            cx.emit(&link, segment);
        }
    }

    /// Returns the timestamp option (value, echo) of a generated segment to `to`, if both ends have agreed on
    /// timestamps.
    fn timestamp(&self, to: Side) -> Option<(u32, u32)> {
        self.has_timestamps()
            .then(|| (self.halves[to.other()].latest, self.halves[to].recent))
    }

    /// Returns whether both SYNs carried the timestamp option (RFC 7323, 3.2).
    fn has_timestamps(&self) -> bool {
        self.halves.both().iter().all(|half| half.has_timestamps)
    }

    /// Clears both halves before an offloaded connection leaves the table.
    pub(super) fn account(&mut self, shared: &mut Shared) {
        for half in self.halves.both_mut() {
            half.clear();
        }
        self.count(shared);
    }

    fn count(&mut self, shared: &mut Shared) {
        let halves = self.halves.both();
        let bytes = halves.iter().map(|half| half.kept() as u64).sum();
        let frames = halves.iter().map(|half| half.held.len() as u64).sum();
        shared.stats.bytes = shared.stats.bytes + bytes - self.counted.0;
        shared.stats.frames = shared.stats.frames + frames - self.counted.1;
        self.counted = (bytes, frames);
    }

    /// Handles a packet of the connection.
    pub(super) fn packet<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        frame: F,
        inspector: &mut impl StreamInspector<F>,
        cx: &mut TcpCx<'_, F, S>,
    ) {
        if self.seen == 0 {
            self.began = cx.now;
        }
        self.seen = cx.now;
        self.is_known |= view.slot.serial == self.serial;
        let side = Side::of(view.slot);
        self.is_audit = view.slot.flags & punt_flags::AUDIT != 0;
        self.is_shared |= view.slot.flags & punt_flags::SHARED != 0;
        if side == Side::Client {
            self.about = About::of(view);
        }
        match &self.phase {
            Phase::Offloaded => {
                self.pass_offloaded(side, view, frame, cx);
                return;
            }
            Phase::Aborted(reason) => {
                cx.sink.discard(frame, *reason);
                Self::refuse(view, cx);
                return;
            }
            _ => {}
        }
        self.slot = *view.slot;
        let Some(segment) = Segment::read(view) else {
            cx.shared.stats.invalid += 1;
            self.report_drop(view, Reason::TcpInvalid, cx);
            cx.sink.discard(frame, Reason::TcpInvalid);
            return;
        };
        let segment = &segment;
        let arrived = Arrived { side, view, segment };
        if matches!(self.phase, Phase::Responded(_)) {
            self.receive_after_response(&arrived, frame, cx);
            return;
        }
        match self.receive(&arrived, frame, cx) {
            Ok(true) => self.inspect(inspector, cx),
            Ok(false) => self.settle_acknowledged(side.other(), cx),
            Err((reason, frame)) => self.reject(&arrived, reason, frame, cx),
        }
        self.arm(cx);
        self.count(cx.shared);
    }

    /// Handles a packet of an offloaded connection. Such packets are punted until the BPF programs have the OFFLOAD
    /// command.
    fn pass_offloaded<S: Sink<F>>(
        &mut self,
        side: Side,
        view: &PacketView<'_>,
        frame: F,
        cx: &mut TcpCx<'_, F, S>,
    ) {
        // Bytes that were acknowledged on behalf of a receiver are retransmitted until the receiver acknowledges them.
        if let Some(segment) = Segment::read(view).filter(Segment::is_ack) {
            let other = &mut self.halves[side.other()];
            let acked = other.position(segment.ack).min(other.proxy_acked);
            other.acknowledge(acked, 0);
        }
        // If the rules or audit mode have changed since the offload, the packet is dropped. The new rules decide about
        // its retransmission, once all bytes acknowledged on behalf of receivers are delivered and the connection has
        // left this table.
        if (view.slot.ruleset, view.slot.flags & punt_flags::AUDIT)
            != (self.slot.ruleset, self.slot.flags & punt_flags::AUDIT)
        {
            cx.sink.discard(frame, Reason::TcpHeld);
            return;
        }
        self.command = self.is_drained();
        self.release(frame, cx);
        if !self.is_drained() {
            self.arm(cx);
        }
    }

    /// Inspects the connection again without a packet, because its inspector has new information.
    pub(super) fn resume<S: Sink<F>>(
        &mut self,
        inspector: &mut impl StreamInspector<F>,
        cx: &mut TcpCx<'_, F, S>,
    ) {
        self.inspect(inspector, cx);
        self.arm(cx);
        self.count(cx.shared);
    }

    /// Forwards a packet, with the flow command or the notification that is due.
    fn release<S: Sink<F>>(&mut self, frame: F, cx: &mut TcpCx<'_, F, S>) {
        if !std::mem::take(&mut self.command) {
            let op = if self.closed == Announcement::Next {
                self.closed = Announcement::Sent;
                flow_op::CLOSE
            } else if self.opened == Announcement::Next {
                self.opened = Announcement::Sent;
                flow_op::OPENED
            } else {
                cx.sink.release(frame);
                return;
            };
            cx.sink.release_with(frame, &self.flow_command(op));
            return;
        }
        let command = self.next_command(cx);
        cx.sink.release_with(frame, &command);
    }

    /// Returns the command for the offload or the windows.
    fn next_command<S>(&mut self, cx: &mut TcpCx<'_, F, S>) -> FlowCommand {
        // OFFLOAD and WINDOWS imply OPENED.
        self.opened = Announcement::Sent;
        if matches!(self.phase, Phase::Offloaded) {
            steps::of(&self.about, Detail::Debug, None, || {
                "the programs forward the rest of the connection without inspection".to_owned()
            });
            return self.flow_command(flow_op::OFFLOAD);
        }
        if self.suspended == Suspended::No {
            cx.shared.stats.windows += 1;
        }
        let (op, windows) = self.windows_command();
        let [a, b, c, d] = windows;
        let is_suspended = self.suspended != Suspended::No;
        steps::of(&self.about, Detail::Debug, None, || {
            if is_suspended {
                return "the programs forward nothing without inspection until a further segment".to_owned();
            }
            format!(
                "the programs forward sequence numbers {a} to {b} of the client and {c} to {d} of the server without \
                 inspection"
            )
        });
        FlowCommand {
            windows,
            ..self.flow_command(op)
        }
    }
}
