//! The TCP connections of one inspector: finds the connection of a packet, adds new ones, enforces limits and
//! deadlines.
//!
//! Start at `Connections::packet`.

mod handover;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use foldhash::{HashMap, HashMapExt as _};

use palisade_abi::{CtKey, Reason, flow_op, punt_flags, tcp_flags};
use palisade_packet::flags;

use super::{
    config::{TcpLimits, TcpStats},
    connection::Connection,
    flow::{flow_command, key},
    inspector::{Offloadable, StreamInspector},
    quote::{Quoted, QuotedSegment},
    segment::Segment,
    shared::Shared,
    side::Side,
};
use crate::{
    Millis, PacketView, Sink,
    context::Cx,
    record::{Record, Verdict, What},
};

/// A connection, and the state that its inspector keeps.
struct Entry<F, T> {
    connection: Connection<F>,
    inspector: T,
    /// Time at which the connection is due in [`Connections::due`], ms.
    due: Millis,
    /// Number of the connection in [`Share::half_open`]; `None` if the connection is open.
    half_open: Option<u64>,
    /// Whether the connection is in [`Connections::unsettled`].
    is_unsettled: bool,
}

/// An offloaded connection: the BPF programs forward its packets as long as its rules do not change.
struct OffloadedFlow<M> {
    serial: u32,
    memory: M,
}

/// Connections of one endpoint.
#[derive(Default)]
struct Share {
    /// Number of open connections.
    open: usize,
    /// Half-open connections by their number, the oldest first.
    half_open: BTreeMap<u64, Key>,
}

/// Maximum number of keys in [`Connections::unsettled`]: a worker that always has packets would otherwise collect those of
/// removed connections.
pub(super) const MOST_UNSETTLED: usize = 1_024;

/// Detail of the record of an ICMP error that is dropped.
const NOT_IN_FLIGHT: &str = "ICMP error about a TCP segment that is not in flight";

/// Connection to which a packet belongs.
enum Place {
    /// A known connection of the key.
    Known(Slot),
    /// A new connection that the packet opens.
    New(Slot),
    /// An offloaded connection.
    OffloadedFlow,
    /// No connection: a segment with SYN that fits no known connection.
    Stray,
    /// No connection: a SYN that must not open one, because it carries data, FIN or RST.
    Invalid,
    /// No known connection.
    Unknown,
}

/// One of the two connections that a key can have.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Slot {
    /// The connection that is in use.
    Current,
    /// A half-open connection with the same ports, whose SYN arrived before the end of the current one was seen.
    Candidate,
}

/// The connections of one inspector. `T` is the state that the inspector keeps for each connection.
pub(crate) struct Connections<F, T: Offloadable> {
    entries: HashMap<CtKey, Box<Entry<F, T>>>,
    /// Connections whose SYN arrived while another connection with the same ports was known. Only the server knows
    /// whether the known connection has ended: a candidate replaces the known connection when the server acknowledges
    /// the candidate's SYN.
    candidates: HashMap<CtKey, Box<Entry<F, T>>>,
    shares: HashMap<u16, Share>,
    open: usize,
    half_open: usize,
    /// Number of the newest half-open connection. The numbers order half-open connections by age.
    number: u64,
    offloaded_flows: HashMap<CtKey, OffloadedFlow<T::OffloadVerdict>>,
    /// Keys and serials of `offloaded_flows`, the oldest first. Entries of removed flows stay until they are the
    /// oldest.
    oldest_first: VecDeque<(CtKey, u32)>,
    /// Deadlines of all connections, the earliest first.
    due: BTreeSet<(Millis, Key)>,
    /// Connections that wait for [`Connections::settle`]. Removed connections stay until then.
    unsettled: Vec<CtKey>,
    shared: Shared,
}

/// A conntrack key and one of its two connections, ordered for the `BTreeSet` of deadlines.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key(CtKey, Slot);

impl Ord for Key {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let parts = |key: &Self| {
            (
                key.0.local.0,
                key.0.remote.0,
                key.0.local_port,
                key.0.remote_port,
                key.0.endpoint,
                key.1,
            )
        };
        parts(self).cmp(&parts(other))
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// Sets the deadline of a connection. `known`: its previous deadline.
fn schedule(all: &mut BTreeSet<(Millis, Key)>, known: &mut Millis, due: Millis, key: Key) {
    all.remove(&(*known, key));
    all.insert((due, key));
    *known = due;
}

impl<F, T: Offloadable> Connections<F, T> {
    pub(crate) fn new(limits: &TcpLimits) -> Self {
        Self {
            entries: HashMap::new(),
            candidates: HashMap::new(),
            shares: HashMap::new(),
            open: 0,
            half_open: 0,
            number: 0,
            offloaded_flows: HashMap::new(),
            oldest_first: VecDeque::new(),
            due: BTreeSet::new(),
            unsettled: Vec::new(),
            shared: Shared::new(limits),
        }
    }

    pub(crate) fn stats(&self) -> TcpStats {
        TcpStats {
            connections: self.entries.len() as u64,
            half_open: self.half_open as u64,
            offloaded_flows: self.offloaded_flows.len() as u64,
            ..self.shared.stats
        }
    }

    /// Handles a packet. `make` returns the state of a new connection; `inspector` returns an inspector for this call;
    /// `recall` evaluates the current rules for an offloaded connection and returns the reason if the connection must
    /// end.
    pub(crate) fn packet<'t, S: Sink<F>, R: StreamInspector<F>>(
        &'t mut self,
        view: &PacketView<'_>,
        frame: F,
        make: impl FnOnce() -> T,
        inspector: impl FnOnce(&'t mut T) -> R,
        recall: impl FnOnce(&mut T::OffloadVerdict, &mut Cx<'_, F, S>) -> Result<(), Reason>,
        cx: &mut Cx<'_, F, S>,
    ) {
        if self.unsettled.len() >= MOST_UNSETTLED {
            self.settle(cx);
        }
        let key = key(view);
        let slot = match self.place(key, view, cx) {
            Place::Known(slot) => slot,
            Place::New(slot) => {
                // A SYN that is refused must not affect the existing connection.
                if self.is_full(&key) {
                    self.refuse_beyond_limit(view, frame, cx);
                    return;
                }
                self.begin(Key(key, slot), view, make(), cx);
                slot
            }
            Place::OffloadedFlow => {
                self.packet_of_offloaded(key, view, frame, recall, cx);
                return;
            }
            Place::Stray if is_audit(view) => {
                cx.sink.release(frame);
                return;
            }
            Place::Stray | Place::Invalid => {
                self.reject_syn(key, view, frame, cx);
                return;
            }
            Place::Unknown => {
                self.unknown(view, frame, cx);
                return;
            }
        };
        if slot == Slot::Current && self.is_opened_beyond_limit(&key, view) {
            if !is_audit(view) {
                self.refuse_beyond_limit(view, frame, cx);
                return;
            }
            self.offload_beyond_limit(&key, cx);
        }
        let all = match slot {
            Slot::Candidate => &mut self.candidates,
            Slot::Current => &mut self.entries,
        };
        let Some(entry) = all.get_mut(&key) else {
            // Not reached: `place` has found the connection, or `insert` has added it.
            cx.sink.discard(frame, Reason::TcpMidstream);
            return;
        };
        let mut inspector = inspector(&mut entry.inspector);
        let cx = &mut self.shared.context(cx);
        entry.connection.packet(view, frame, &mut inspector, cx);
        if entry.connection.is_unsettled() && !std::mem::replace(&mut entry.is_unsettled, true) {
            self.unsettled.push(key);
        }
        let due = entry.connection.deadline(cx.shared);
        if due < entry.due {
            schedule(&mut self.due, &mut entry.due, due, Key(key, slot));
        }
        if let Some(number) = entry.half_open
            && entry.connection.is_opened()
        {
            entry.half_open = None;
            let share = self.shares.entry(key.endpoint).or_default();
            share.half_open.remove(&number);
            share.open += 1;
            self.half_open -= 1;
            self.open += 1;
        }
    }

    /// Begins a connection. A new current connection replaces both connections of the key, a new candidate only the
    /// existing candidate.
    fn begin<S: Sink<F>>(&mut self, key: Key, view: &PacketView<'_>, inspector: T, cx: &mut Cx<'_, F, S>) {
        match key.1 {
            Slot::Current => self.forget_with_candidate(key.0, cx),
            Slot::Candidate => {
                self.remove(key);
            }
        }
        self.insert(key, Connection::new(key.0, view), inspector, cx);
    }

    /// Refuses a packet that would open a connection, because too many connections are open.
    fn refuse_beyond_limit<S: Sink<F>>(&mut self, view: &PacketView<'_>, frame: F, cx: &mut Cx<'_, F, S>) {
        self.shared.stats.limited += 1;
        self.refuse(view, frame, Reason::InspectLimit, cx);
    }

    /// Offloads, in audit mode, a connection that would otherwise be refused because too many connections are open.
    fn offload_beyond_limit<S: Sink<F>>(&mut self, key: &CtKey, cx: &mut Cx<'_, F, S>) {
        self.shared.stats.limited += 1;
        if let Some(entry) = self.entries.get_mut(key) {
            let cx = &mut self.shared.context(cx);
            entry.connection.pass_unread(Reason::InspectLimit, cx);
        }
    }

    /// Handles a packet of an offloaded connection. The BPF programs punt such a packet until they have the OFFLOAD
    /// command, and after a change of the rules.
    fn packet_of_offloaded<S: Sink<F>>(
        &mut self,
        key: CtKey,
        view: &PacketView<'_>,
        frame: F,
        recall: impl FnOnce(&mut T::OffloadVerdict, &mut Cx<'_, F, S>) -> Result<(), Reason>,
        cx: &mut Cx<'_, F, S>,
    ) {
        let verdict = match self.offloaded_flows.get_mut(&key) {
            Some(flow) => recall(&mut flow.memory, cx),
            // Not reached: `place` has found the flow.
            None => Err(Reason::TcpMidstream),
        };
        match verdict {
            Ok(()) => cx
                .sink
                .release_with(frame, &flow_command(key, view.slot, flow_op::OFFLOAD)),
            Err(reason) => {
                self.offloaded_flows.remove(&key);
                self.shared.stats.cut += 1;
                cx.sink.discard(frame, reason);
                if Connection::reset_unknown(view, &mut self.shared.context(cx)) {
                    cx.sink.command(&flow_command(key, view.slot, flow_op::CLOSE));
                }
            }
        }
    }

    /// Records and drops a segment with SYN that belongs to no connection ([`Place::Stray`], [`Place::Invalid`]).
    fn reject_syn<S: Sink<F>>(&mut self, key: CtKey, view: &PacketView<'_>, frame: F, cx: &mut Cx<'_, F, S>) {
        let reason = Reason::TcpInvalid;
        self.shared.stats.invalid += 1;
        if self.may_report(&key, reason, cx) {
            let detail = reason.text();
            cx.sink.record(&Record {
                verdict: Verdict::Dropped,
                reason,
                ..Record::of(view, What::Unreadable { detail })
            });
        }
        cx.sink.discard(frame, reason);
    }

    /// Returns whether a dropped packet is recorded. If the packet belongs to a connection, the limits of that
    /// connection apply too.
    fn may_report<S>(&mut self, key: &CtKey, reason: Reason, cx: &mut Cx<'_, F, S>) -> bool {
        match self.entries.get_mut(key) {
            Some(entry) => entry.connection.may_report(reason, &mut self.shared.context(cx)),
            None => self.shared.may_report(cx.now),
        }
    }

    /// Returns the connection to which a packet belongs.
    fn place<S: Sink<F>>(&mut self, key: CtKey, view: &PacketView<'_>, cx: &mut Cx<'_, F, S>) -> Place {
        let serial = view.slot.serial;
        let of_current = self
            .entries
            .get(&key)
            .map(|entry| entry.connection.is_of(serial) && !entry.connection.is_over());
        // The common case: one more segment of a known connection.
        if of_current == Some(true) && view.packet.tcp_flags & (tcp_flags::SYN | tcp_flags::RST) == 0 {
            return Place::Known(Slot::Current);
        }
        self.remove_outdated(key, serial, of_current, cx);
        let side = Side::of(view.slot);
        let segment = Segment::read(view);
        if let Some(segment) = segment
            && side == Side::Server
            && (segment.is_syn() || segment.is_rst())
            && self.is_answer_to_candidate(&key, serial, &segment)
        {
            if segment.is_rst() {
                return Place::Known(Slot::Candidate);
            }
            self.shared.stats.replaced += 1;
            self.forget_current(key, cx);
            self.offloaded_flows.remove(&key);
            self.promote(key);
            return Place::Known(Slot::Current);
        }
        let has_syn = view.packet.tcp_flags & tcp_flags::SYN != 0 && !view.packet.is(flags::FRAGMENT_LATER);
        if let Some(segment) = segment
            && has_syn
            && side == Side::Client
            && !segment.is_ack()
        {
            return self.place_of_syn(&key, serial, &segment);
        }
        let is_offloaded = self.offloaded_flows.contains_key(&key);
        match self.entries.get(&key).map(|entry| &entry.connection) {
            // Of segments with SYN, an open connection accepts only a retransmission.
            Some(current) if has_syn && current.is_opened() => {
                match segment.filter(|segment| current.repeats(side, segment)) {
                    Some(_) => Place::Known(Slot::Current),
                    None => Place::Stray,
                }
            }
            Some(_) => Place::Known(Slot::Current),
            None if is_offloaded && has_syn => Place::Stray,
            None if is_offloaded => Place::OffloadedFlow,
            None => Place::Unknown,
        }
    }

    /// Removes the connections with this key that belong to another conntrack entry than the packet. `serial`: number
    /// of the packet's entry. `of_current`: whether the packet belongs to the current connection.
    ///
    /// First moves the current connection to `offloaded_flows` if it is offloaded and has delivered all bytes.
    fn remove_outdated<S: Sink<F>>(
        &mut self,
        key: CtKey,
        serial: u32,
        of_current: Option<bool>,
        cx: &mut Cx<'_, F, S>,
    ) {
        if let Some(entry) = self.entries.get(&key) {
            if entry.connection.is_over() {
                self.remember_offloaded(key);
            } else if of_current == Some(false) {
                self.forget_with_candidate(key, cx);
            }
        }
        if self
            .offloaded_flows
            .get(&key)
            .is_some_and(|flow| flow.serial != serial)
        {
            self.offloaded_flows.remove(&key);
            self.remove(Key(key, Slot::Candidate));
        }
    }

    /// Returns whether a SYN+ACK or RST of the server answers the SYN of the candidate, and not that of the current
    /// connection.
    fn is_answer_to_candidate(&self, key: &CtKey, serial: u32, segment: &Segment<'_>) -> bool {
        let current = self.entries.get(key).map(|entry| &entry.connection);
        self.candidates.get(key).is_some_and(|candidate| {
            candidate.connection.is_of(serial) && candidate.connection.is_answered_by(segment)
        }) && !current.is_some_and(|current| current.repeats(Side::Server, segment))
    }

    /// Returns the connection to which a SYN of the client belongs.
    fn place_of_syn(&self, key: &CtKey, serial: u32, segment: &Segment<'_>) -> Place {
        if !segment.payload.is_empty() || segment.is_fin() || segment.is_rst() {
            return Place::Invalid;
        }
        if let Some(entry) = self.entries.get(key) {
            let current = &entry.connection;
            if current.repeats(Side::Client, segment) && !current.is_opened() {
                return Place::Known(Slot::Current);
            }
            if current.is_closed() {
                return Place::New(Slot::Current);
            }
        } else if !self.offloaded_flows.contains_key(key) {
            return Place::New(Slot::Current);
        }
        if let Some(candidate) = self.candidates.get(key)
            && candidate.connection.repeats(Side::Client, segment)
            && candidate.connection.is_of(serial)
        {
            return Place::Known(Slot::Candidate);
        }
        Place::New(Slot::Candidate)
    }

    /// Returns whether the limits forbid one more open connection of the endpoint. An open connection with the same
    /// key does not count, because the new one replaces it.
    fn is_full(&self, key: &CtKey) -> bool {
        let replaces = self
            .entries
            .get(key)
            .is_some_and(|entry| entry.half_open.is_none());
        let limits = &self.shared.limits;
        let of_endpoint = self.shares.get(&key.endpoint).map_or(0, |share| share.open);
        let others = of_endpoint - usize::from(replaces);
        let left = limits
            .connections
            .saturating_sub(self.open - usize::from(replaces));
        others >= limits.connections_per_endpoint.min(left.saturating_mul(3))
    }

    /// Returns whether a packet completes a handshake while the limits forbid one more open connection. The limit is
    /// checked here again because half-open connections do not count against it: SYNs with forged sources must take
    /// no room from open connections.
    fn is_opened_beyond_limit(&self, key: &CtKey, view: &PacketView<'_>) -> bool {
        self.entries.get(key).is_some_and(|entry| {
            entry.half_open.is_some()
                && Segment::read(view)
                    .is_some_and(|segment| entry.connection.is_opened_by(Side::of(view.slot), &segment))
        }) && self.is_full(key)
    }

    /// Adds a new connection. If there are too many half-open connections, evicts one: of the endpoint with the most
    /// half-open connections, the oldest.
    fn insert<S: Sink<F>>(
        &mut self,
        key: Key,
        connection: Connection<F>,
        inspector: T,
        cx: &mut Cx<'_, F, S>,
    ) {
        while self.half_open >= self.shared.limits.half_open.max(1) {
            let most = self.shares.values().max_by_key(|share| share.half_open.len());
            let Some((_, oldest)) = most.and_then(|share| share.half_open.first_key_value()) else {
                break;
            };
            let oldest = *oldest;
            self.shared.stats.half_open_evicted += 1;
            if let Some(mut entry) = self.remove(oldest) {
                let cx = &mut self.shared.context(cx);
                entry.connection.close(Reason::InspectLimit, cx);
            }
        }
        self.number += 1;
        self.half_open += 1;
        let share = self.shares.entry(key.0.endpoint).or_default();
        share.half_open.insert(self.number, key);
        self.shared.stats.opened += 1;
        let entry = Box::new(Entry {
            connection,
            inspector,
            due: Millis::MAX,
            half_open: Some(self.number),
            is_unsettled: false,
        });
        match key.1 {
            Slot::Candidate => self.candidates.insert(key.0, entry),
            Slot::Current => self.entries.insert(key.0, entry),
        };
    }

    /// Makes a candidate the current connection.
    fn promote(&mut self, key: CtKey) {
        let Some(mut entry) = self.candidates.remove(&key) else {
            return;
        };
        self.due.remove(&(entry.due, Key(key, Slot::Candidate)));
        if let Some(number) = entry.half_open
            && let Some(share) = self.shares.get_mut(&key.endpoint)
        {
            share.half_open.insert(number, Key(key, Slot::Current));
        }
        entry.due = Millis::MAX;
        self.entries.insert(key, entry);
    }

    /// Removes both connections of a key.
    fn forget_with_candidate<S: Sink<F>>(&mut self, key: CtKey, cx: &mut Cx<'_, F, S>) {
        self.forget_current(key, cx);
        self.remove(Key(key, Slot::Candidate));
    }

    fn forget_current<S: Sink<F>>(&mut self, key: CtKey, cx: &mut Cx<'_, F, S>) {
        if let Some(mut entry) = self.remove(Key(key, Slot::Current)) {
            let cx = &mut self.shared.context(cx);
            entry.connection.close(Reason::TcpMidstream, cx);
        }
    }

    /// Inspects a connection again without a packet, because its inspector has new information.
    pub(crate) fn resume<'t, S: Sink<F>, R: StreamInspector<F>>(
        &'t mut self,
        key: &CtKey,
        inspector: impl FnOnce(&'t mut T) -> R,
        cx: &mut Cx<'_, F, S>,
    ) {
        let Some(entry) = self.entries.get_mut(key) else {
            return;
        };
        let mut inspector = inspector(&mut entry.inspector);
        let cx = &mut self.shared.context(cx);
        entry.connection.resume(&mut inspector, cx);
        let due = entry.connection.deadline(cx.shared);
        if due < entry.due {
            schedule(&mut self.due, &mut entry.due, due, Key(*key, Slot::Current));
        }
    }

    /// Moves the current connection to `offloaded_flows`, with only the state for its evaluation after a change of the
    /// rules.
    fn remember_offloaded(&mut self, key: CtKey) {
        let Some(mut entry) = self.remove(Key(key, Slot::Current)) else {
            return;
        };
        entry.connection.account(&mut self.shared);
        let flow = OffloadedFlow {
            serial: entry.connection.serial(),
            memory: entry.inspector.remember(),
        };
        self.add_offloaded(key, flow);
    }

    fn add_offloaded(&mut self, key: CtKey, flow: OffloadedFlow<T::OffloadVerdict>) {
        self.oldest_first.push_back((key, flow.serial));
        self.offloaded_flows.insert(key, flow);
        let most = self.shared.limits.offloaded_flows;
        while self.offloaded_flows.len() > most || self.oldest_first.len() > 2 * most {
            let Some((key, serial)) = self.oldest_first.pop_front() else {
                break;
            };
            if self
                .offloaded_flows
                .get(&key)
                .is_some_and(|flow| flow.serial == serial)
            {
                self.offloaded_flows.remove(&key);
            }
        }
    }

    fn remove(&mut self, key: Key) -> Option<Box<Entry<F, T>>> {
        let entry = match key.1 {
            Slot::Candidate => self.candidates.remove(&key.0),
            Slot::Current => self.entries.remove(&key.0),
        }?;
        self.due.remove(&(entry.due, key));
        if let Some(share) = self.shares.get_mut(&key.0.endpoint) {
            if let Some(number) = entry.half_open {
                share.half_open.remove(&number);
                self.half_open -= 1;
            } else {
                share.open -= 1;
                self.open -= 1;
            }
            if share.open == 0 && share.half_open.is_empty() {
                self.shares.remove(&key.0.endpoint);
            }
        }
        Some(entry)
    }

    /// Records and drops a packet of a connection that cannot be inspected. In audit mode the connection is offloaded
    /// instead. Returns whether the packet was dropped.
    fn refuse<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        frame: F,
        reason: Reason,
        cx: &mut Cx<'_, F, S>,
    ) -> bool {
        let is_audit = is_audit(view);
        if self.shared.may_report(cx.now) {
            let detail = reason.text();
            cx.sink.record(&Record {
                verdict: verdict(is_audit),
                reason,
                ..Record::of(view, What::Unreadable { detail })
            });
        }
        if is_audit {
            let (key, serial) = (key(view), view.slot.serial);
            let memory = T::OffloadVerdict::default();
            self.add_offloaded(key, OffloadedFlow { serial, memory });
            cx.sink
                .release_with(frame, &flow_command(key, view.slot, flow_op::OFFLOAD));
        } else {
            cx.sink.discard(frame, reason);
        }
        !is_audit
    }

    /// Handles a packet of an unknown connection: its handshake was not seen, or the connection was removed.
    fn unknown<S: Sink<F>>(&mut self, view: &PacketView<'_>, frame: F, cx: &mut Cx<'_, F, S>) {
        let Some(segment) = Segment::read(view) else {
            self.shared.stats.invalid += 1;
            self.refuse(view, frame, Reason::TcpInvalid, cx);
            return;
        };
        self.shared.stats.midstream += 1;
        if segment.is_syn() && !is_audit(view) {
            // A SYN+ACK of an unknown connection: for example, the half-open connection was evicted. The server gets no
            // reset, so that the client's retransmitted SYN can open the connection.
            cx.sink.discard(frame, Reason::TcpMidstream);
            return;
        }
        // This reset can be the answer to the probe of [`Connection::reset_unknown`], from an end that has no such
        // connection. Forwarding it does no harm, because its receiver checks the sequence number (RFC 5961, 3.2).
        if segment.is_rst() && segment.payload.is_empty() {
            cx.sink.release(frame);
            return;
        }
        if self.refuse(view, frame, Reason::TcpMidstream, cx)
            && !segment.is_rst()
            && Connection::reset_unknown(view, &mut self.shared.context(cx))
        {
            cx.sink
                .command(&flow_command(key(view), view.slot, flow_op::CLOSE));
        }
    }

    /// Handles an ICMP error that quotes a segment of a connection: forwards, consumes or drops it ([`Quoted`]). The
    /// error is not a packet of the connection, so it does not restart the idle timeout.
    pub(crate) fn error<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        quoted: &QuotedSegment,
        frame: F,
        cx: &mut Cx<'_, F, S>,
    ) {
        let (key, serial) = (quoted.key, view.slot.serial);
        let is_ipv6 = view.packet.is(flags::IPV6);
        self.shared.stats.icmp_errors += 1;
        let mut is_known = false;
        for slot in [Slot::Current, Slot::Candidate] {
            let all = match slot {
                Slot::Candidate => &mut self.candidates,
                Slot::Current => &mut self.entries,
            };
            let Some(entry) = all.get_mut(&key).filter(|entry| entry.connection.is_of(serial)) else {
                continue;
            };
            if entry.connection.is_over() {
                cx.sink.release(frame);
                return;
            }
            is_known = true;
            let tcp = &mut self.shared.context(cx);
            let verdict = entry.connection.quoted(quoted, is_ipv6, tcp);
            let due = entry.connection.deadline(tcp.shared);
            if due < entry.due {
                schedule(&mut self.due, &mut entry.due, due, Key(key, slot));
            }
            match verdict {
                Quoted::Unrelated => {}
                Quoted::Ours => {
                    cx.sink.absorb(frame);
                    return;
                }
                Quoted::Theirs => {
                    cx.sink.release(frame);
                    return;
                }
            }
        }
        if self
            .offloaded_flows
            .get(&key)
            .is_some_and(|flow| flow.serial == serial)
        {
            cx.sink.release(frame);
            return;
        }
        self.reject_error(view, &key, is_known, frame, cx);
    }

    /// Records and drops an ICMP error that quotes a segment of an unknown connection (`is_known` is false), or one
    /// that is not in flight. Audit mode forwards the error.
    fn reject_error<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        key: &CtKey,
        is_known: bool,
        frame: F,
        cx: &mut Cx<'_, F, S>,
    ) {
        self.shared.stats.icmp_unrelated += 1;
        let (reason, detail) = if is_known {
            (Reason::UnrelatedIcmp, NOT_IN_FLIGHT)
        } else {
            (Reason::TcpMidstream, Reason::TcpMidstream.text())
        };
        let is_audit = is_audit(view);
        if self.may_report(key, reason, cx) {
            let record = Record::of(view, What::Unreadable { detail });
            // The punt request contains the identity of the connection's peer. If a router has sent the error, the
            // record shows no identity, because the router is not that peer.
            let is_of_peer = [view.packet.source, view.packet.destination].contains(&key.remote);
            cx.sink.record(&Record {
                verdict: verdict(is_audit),
                reason,
                remote_identity: if is_of_peer { record.remote_identity } else { 0 },
                ..record
            });
        }
        if is_audit {
            cx.sink.release(frame);
        } else {
            cx.sink.discard(frame, reason);
        }
    }

    /// Returns the time at which [`Connections::tick`] must be called, ms.
    pub(crate) fn deadline(&self) -> Option<Millis> {
        self.due.first().map(|(due, _)| *due)
    }

    /// Returns the number of keys of connections that wait for [`Connections::settle`].
    #[cfg(test)]
    pub(super) const fn unsettled(&self) -> usize {
        self.unsettled.len()
    }

    /// Sends what connections have put off until no packet waits in the worker.
    pub(crate) fn settle<S: Sink<F>>(&mut self, cx: &mut Cx<'_, F, S>) {
        while let Some(key) = self.unsettled.pop() {
            if let Some(entry) = self.entries.get_mut(&key) {
                entry.is_unsettled = false;
                entry.connection.settle(&mut self.shared.context(cx));
            }
        }
    }

    /// Handles the timeouts that are due.
    pub(crate) fn tick<S: Sink<F>>(&mut self, cx: &mut Cx<'_, F, S>) {
        while let Some(&(due, key)) = self.due.first()
            && due <= cx.now
        {
            let all = match key.1 {
                Slot::Candidate => &mut self.candidates,
                Slot::Current => &mut self.entries,
            };
            let Some(entry) = all.get_mut(&key.0) else {
                self.due.pop_first();
                continue;
            };
            let tcp = &mut self.shared.context(cx);
            let stays = entry.connection.tick(tcp);
            if entry.connection.is_over() {
                self.remember_offloaded(key.0);
            } else if stays {
                let due = entry.connection.deadline(tcp.shared).max(tcp.now + 1);
                schedule(&mut self.due, &mut entry.due, due, key);
            } else {
                entry.connection.close(Reason::InspectDeadline, tcp);
                entry.connection.forgotten(tcp);
                self.remove(key);
            }
        }
    }

    /// Removes the connections of one endpoint, or all connections, and drops their held packets.
    pub(crate) fn forget<S: Sink<F>>(&mut self, endpoint: Option<u16>, cx: &mut Cx<'_, F, S>) {
        self.offloaded_flows
            .retain(|key, _| endpoint.is_some_and(|endpoint| endpoint != key.endpoint));
        let all = self.entries.keys().map(|key| Key(*key, Slot::Current));
        let all = all.chain(self.candidates.keys().map(|key| Key(*key, Slot::Candidate)));
        let gone: Vec<Key> = all
            .filter(|key| endpoint.is_none_or(|endpoint| endpoint == key.0.endpoint))
            .collect();
        for key in gone {
            if let Some(mut entry) = self.remove(key) {
                let cx = &mut self.shared.context(cx);
                entry.connection.close(Reason::TcpMidstream, cx);
            }
        }
    }
}

const fn is_audit(view: &PacketView<'_>) -> bool {
    view.slot.flags & punt_flags::AUDIT != 0
}

/// Returns the verdict that the record of a refused packet shows.
const fn verdict(is_audit: bool) -> Verdict {
    if is_audit {
        Verdict::Audit
    } else {
        Verdict::Dropped
    }
}
