//! All TCP connections of one inspector: finds the connection of a packet, makes new ones, and enforces limits and deadlines.
//!
//! Start at `Connections::packet`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use foldhash::{HashMap, HashMapExt as _};

use palisade_abi::{CtKey, Reason, flow_op, protocol, punt_flags};
use palisade_packet::{TCP_RST, TCP_SYN, flags};

use super::{
    Connection, Offloadable, Shared, Side, StreamInspector, TcpLimits, TcpStats, connection::Quoted,
    flow_command, quote::QuotedSegment, segment::Segment,
};
use crate::{
    Millis, PacketView, Sink,
    record::{Record, Verdict, What},
};

/// A connection, and what its inspector knows of it.
struct Entry<F, T> {
    connection: Connection<F>,
    inspector: T,
    /// When it is looked at next, at the latest.
    due: Millis,
    /// Its place among the half-open ones, if it is one.
    half_open: Option<u64>,
}

/// A connection that is not read any more: its packets stay with the programs as long as the same rules hold for it.
struct OffloadedFlow<M> {
    serial: u32,
    memory: M,
}

/// Connections of one endpoint.
#[derive(Default)]
struct Share {
    /// Those that are open.
    open: usize,
    /// The others, oldest first.
    half_open: BTreeMap<u64, Key>,
}

/// What the record says of an ICMP error that is dropped.
const NOT_UNDER_WAY: &str = "ICMP error about a TCP segment that is not under way";

/// Where a packet belongs.
enum Place {
    /// To one of the two connections of its key.
    Known(bool),
    /// To one that begins with it.
    New(bool),
    /// To one that is not read any more.
    OffloadedFlow,
    /// To none: a SYN that nothing explains.
    Stray,
    /// To none: a SYN that opens nothing, because it carries data or a second meaning.
    Invalid,
    /// To none that is known.
    Unknown,
}

/// The connections that are read by one kind of inspector; `T` is what it keeps of each.
pub(crate) struct Connections<F, T: Offloadable> {
    entries: HashMap<CtKey, Box<Entry<F, T>>>,
    /// Those whose SYN has come while another connection by the same ports was known. The server decides: the new one
    /// takes the place of the old one when the server has acknowledged its SYN.
    candidates: HashMap<CtKey, Box<Entry<F, T>>>,
    shares: HashMap<u16, Share>,
    open: usize,
    half_open: usize,
    /// Counts the half-open ones, so that the oldest is known.
    number: u64,
    offloaded_flows: HashMap<CtKey, OffloadedFlow<T::OffloadVerdict>>,
    /// The keys of `past` in the order in which they got there, with serials: those that are gone linger.
    oldest_first: VecDeque<(CtKey, u32)>,
    /// When they are due, each once.
    due: BTreeSet<(Millis, Key)>,
    shared: Shared,
}

/// A key that has an order, and which of the two connections of that key is meant.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key(CtKey, bool);

/// In [`Key`]: the connection that is known, or the candidate for its place.
const CURRENT: bool = false;
const CANDIDATE: bool = true;

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

/// Notes when a connection is due. `known`: what was noted.
fn schedule(all: &mut BTreeSet<(Millis, Key)>, known: &mut Millis, due: Millis, key: Key) {
    all.remove(&(*known, key));
    all.insert((due, key));
    *known = due;
}

/// The conntrack key of a packet, as the slot's endpoint sees it.
pub(crate) fn key(view: &PacketView<'_>) -> CtKey {
    let packet = view.packet;
    let source = (packet.source, packet.source_port);
    let destination = (packet.destination, packet.destination_port);
    let (local, remote) = if view.slot.flags & punt_flags::INGRESS != 0 {
        (destination, source)
    } else {
        (source, destination)
    };
    CtKey {
        local: local.0,
        remote: remote.0,
        local_port: local.1,
        remote_port: remote.1,
        endpoint: view.slot.endpoint,
        protocol: protocol::TCP,
        zero: 0,
    }
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

    /// A packet. `make` makes what is kept of a new connection; `inspector` a inspector of it, for this call; `recall` says
    /// whether a connection that is not read any more may go on, and else why not.
    #[expect(
        clippy::too_many_arguments,
        reason = "a packet, who reads it, and where it goes"
    )]
    pub(crate) fn packet<'t, S: Sink<F>, R: StreamInspector<F>>(
        &'t mut self,
        now: Millis,
        view: &PacketView<'_>,
        frame: F,
        make: impl FnOnce() -> T,
        inspector: impl FnOnce(&'t mut T) -> R,
        recall: impl FnOnce(&mut T::OffloadVerdict, &mut S) -> Result<(), Reason>,
        sink: &mut S,
    ) {
        let key = key(view);
        let serial = view.slot.serial;
        let of_current = self
            .entries
            .get(&key)
            .map(|entry| entry.connection.is_of(serial) && !entry.connection.is_over());
        let has_syn = view.packet.tcp_flags & TCP_SYN != 0 && !view.packet.is(flags::FRAGMENT_LATER);
        // Nearly always it is one that goes on.
        let goes_on = view.packet.tcp_flags & (TCP_SYN | TCP_RST) == 0;
        let which = if of_current == Some(true) && goes_on {
            CURRENT
        } else {
            match self.place(key, view, of_current, has_syn, sink) {
                Place::Known(which) => which,
                Place::New(which) => {
                    // A SYN that is refused changes nothing: what waits by the same ports goes on to wait.
                    if self.is_full(&key) {
                        self.shared.stats.limited += 1;
                        self.refuse(now, view, frame, Reason::InspectLimit, sink);
                        return;
                    }
                    if which == CURRENT {
                        self.forget_with_candidate(key, sink);
                    } else {
                        self.remove(Key(key, CANDIDATE));
                    }
                    self.insert(Key(key, which), Connection::new(key, view), make(), sink);
                    which
                }
                Place::OffloadedFlow => {
                    let Some(flow) = self.offloaded_flows.get_mut(&key) else {
                        return;
                    };
                    match recall(&mut flow.memory, sink) {
                        Ok(()) => sink.release_with(frame, &flow_command(key, view.slot, flow_op::OFFLOAD)),
                        Err(reason) => {
                            self.offloaded_flows.remove(&key);
                            self.shared.stats.cut += 1;
                            sink.discard(frame, reason);
                            if Connection::<F>::reset_unknown(view, &mut self.shared, sink) {
                                sink.command(&flow_command(key, view.slot, flow_op::CLOSE));
                            }
                        }
                    }
                    return;
                }
                Place::Stray if view.slot.flags & punt_flags::AUDIT != 0 => {
                    sink.release(frame);
                    return;
                }
                Place::Stray | Place::Invalid => {
                    let reason = Reason::TcpInvalid;
                    self.shared.stats.invalid += 1;
                    let reports = match self.entries.get_mut(&key) {
                        Some(entry) => entry.connection.may_report(now, reason, &mut self.shared),
                        None => self.shared.may_report(now),
                    };
                    if reports {
                        let detail = reason.text();
                        sink.record(&Record {
                            verdict: Verdict::Dropped,
                            reason,
                            ..Record::of(view, What::Unreadable { detail })
                        });
                    }
                    sink.discard(frame, reason);
                    return;
                }
                Place::Unknown => {
                    self.unknown(now, view, frame, sink);
                    return;
                }
            }
        };
        if which == CURRENT && self.is_opened_beyond_limit(&key, view) {
            self.shared.stats.limited += 1;
            match self.entries.get_mut(&key) {
                Some(entry) if view.slot.flags & punt_flags::AUDIT != 0 => {
                    let reason = Reason::InspectLimit;
                    entry.connection.pass_unread(reason, &mut self.shared, sink);
                }
                _ => {
                    self.refuse(now, view, frame, Reason::InspectLimit, sink);
                    return;
                }
            }
        }
        let all = if which == CANDIDATE {
            &mut self.candidates
        } else {
            &mut self.entries
        };
        let Some(entry) = all.get_mut(&key) else {
            return;
        };
        let mut inspector = inspector(&mut entry.inspector);
        entry
            .connection
            .packet(now, view, frame, &mut inspector, &mut self.shared, sink);
        let due = entry.connection.deadline(&self.shared);
        if due < entry.due {
            schedule(&mut self.due, &mut entry.due, due, Key(key, which));
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

    /// Where a packet belongs that is not simply one more of a connection that goes on. `of_current`: whether it names
    /// the connection that is known, if one is.
    fn place<S: Sink<F>>(
        &mut self,
        key: CtKey,
        view: &PacketView<'_>,
        of_current: Option<bool>,
        has_syn: bool,
        sink: &mut S,
    ) -> Place {
        let (slot, side) = (view.slot, Side::of(view.slot));
        let segment = Segment::read(view);
        let opens = has_syn && side == Side::Client && segment.is_some_and(|s| !s.is_ack());
        if let Some(entry) = self.entries.get(&key) {
            if entry.connection.is_over() {
                self.remember_offloaded(key);
            } else if of_current == Some(false) {
                // The programs have made another entry since.
                self.forget_with_candidate(key, sink);
            }
        }
        if self
            .offloaded_flows
            .get(&key)
            .is_some_and(|flow| flow.serial != slot.serial)
        {
            self.offloaded_flows.remove(&key);
            self.remove(Key(key, CANDIDATE));
        }
        let is_offloaded = self.offloaded_flows.contains_key(&key);
        let current = self.entries.get(&key).map(|entry| &entry.connection);
        if let Some(segment) = segment
            && let Some(candidate) = self.candidates.get(&key)
            && side == Side::Server
            && (segment.is_syn() || segment.is_rst())
            && candidate.connection.is_of(slot.serial)
            && candidate.connection.is_answered_by(&segment)
            && !current.is_some_and(|current| current.repeats(side, &segment))
        {
            if segment.is_rst() {
                return Place::Known(CANDIDATE);
            }
            self.shared.stats.replaced += 1;
            self.forget_current(key, sink);
            self.offloaded_flows.remove(&key);
            self.promote(key);
            return Place::Known(CURRENT);
        }
        if opens && let Some(segment) = segment {
            if !segment.payload.is_empty() || segment.is_fin() || segment.is_rst() {
                return Place::Invalid;
            }
            if let Some(current) = current {
                if current.repeats(side, &segment) && !current.is_opened() {
                    return Place::Known(CURRENT);
                }
                if current.is_closed() {
                    return Place::New(CURRENT);
                }
            } else if !is_offloaded {
                return Place::New(CURRENT);
            }
            if let Some(candidate) = self.candidates.get(&key)
                && candidate.connection.repeats(side, &segment)
                && candidate.connection.is_of(slot.serial)
            {
                return Place::Known(CANDIDATE);
            }
            return Place::New(CANDIDATE);
        }
        match current {
            // A SYN that answers nothing that was let through is no part of a connection that is open.
            Some(current) if has_syn && current.is_opened() => {
                match segment.filter(|segment| current.repeats(side, segment)) {
                    Some(_) => Place::Known(CURRENT),
                    None => Place::Stray,
                }
            }
            Some(_) => Place::Known(CURRENT),
            None if is_offloaded && has_syn => Place::Stray,
            None if is_offloaded => Place::OffloadedFlow,
            None => Place::Unknown,
        }
    }

    /// Whether the endpoint of a connection has as many open ones as it may have beside this one: a connection in the
    /// place of an open one with the same ports takes that one's share.
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

    /// Whether a packet completes the handshake of a connection for which there is no room among the open ones. More
    /// connections can be half-open than may open, so that SYNs with forged sources take no room from the others.
    fn is_opened_beyond_limit(&self, key: &CtKey, view: &PacketView<'_>) -> bool {
        self.entries.get(key).is_some_and(|entry| {
            entry.half_open.is_some()
                && Segment::read(view)
                    .is_some_and(|segment| entry.connection.is_opened_by(Side::of(view.slot), &segment))
        }) && self.is_full(key)
    }

    /// Adds a connection that begins.
    fn insert<S: Sink<F>>(&mut self, key: Key, connection: Connection<F>, inspector: T, sink: &mut S) {
        while self.half_open >= self.shared.limits.half_open.max(1) {
            let most = self.shares.values().max_by_key(|share| share.half_open.len());
            let Some((_, oldest)) = most.and_then(|share| share.half_open.first_key_value()) else {
                break;
            };
            let oldest = *oldest;
            self.shared.stats.half_open_evicted += 1;
            if let Some(mut entry) = self.remove(oldest) {
                entry
                    .connection
                    .close(Reason::InspectLimit, &mut self.shared, sink);
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
        });
        if key.1 == CANDIDATE {
            self.candidates.insert(key.0, entry);
        } else {
            self.entries.insert(key.0, entry);
        }
    }

    /// Gives a candidate the place that it wanted.
    fn promote(&mut self, key: CtKey) {
        let Some(mut entry) = self.candidates.remove(&key) else {
            return;
        };
        self.due.remove(&(entry.due, Key(key, CANDIDATE)));
        if let Some(number) = entry.half_open
            && let Some(share) = self.shares.get_mut(&key.endpoint)
        {
            share.half_open.insert(number, Key(key, CURRENT));
        }
        entry.due = Millis::MAX;
        self.entries.insert(key, entry);
    }

    /// Forgets a connection, and who wants its place.
    fn forget_with_candidate<S: Sink<F>>(&mut self, key: CtKey, sink: &mut S) {
        self.forget_current(key, sink);
        self.remove(Key(key, CANDIDATE));
    }

    fn forget_current<S: Sink<F>>(&mut self, key: CtKey, sink: &mut S) {
        if let Some(mut entry) = self.remove(Key(key, CURRENT)) {
            entry
                .connection
                .close(Reason::TcpMidstream, &mut self.shared, sink);
        }
    }

    /// Has a connection read again, without a packet of it: its inspector knows something new.
    pub(crate) fn resume<'t, S: Sink<F>, R: StreamInspector<F>>(
        &'t mut self,
        now: Millis,
        key: &CtKey,
        inspector: impl FnOnce(&'t mut T) -> R,
        sink: &mut S,
    ) {
        let Some(entry) = self.entries.get_mut(key) else {
            return;
        };
        let mut inspector = inspector(&mut entry.inspector);
        entry
            .connection
            .resume(now, &mut inspector, &mut self.shared, sink);
        let due = entry.connection.deadline(&self.shared);
        if due < entry.due {
            schedule(&mut self.due, &mut entry.due, due, Key(*key, CURRENT));
        }
    }

    /// Keeps no more of a connection than what has to be known if its rules change.
    fn remember_offloaded(&mut self, key: CtKey) {
        let Some(mut entry) = self.remove(Key(key, CURRENT)) else {
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
        let all = if key.1 == CANDIDATE {
            &mut self.candidates
        } else {
            &mut self.entries
        };
        let entry = all.remove(&key.0)?;
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

    /// Reports and drops a packet of a connection that is not read. False: audit mode lets the connection pass,
    /// unread.
    fn refuse<S: Sink<F>>(
        &mut self,
        now: Millis,
        view: &PacketView<'_>,
        frame: F,
        reason: Reason,
        sink: &mut S,
    ) -> bool {
        let audit = view.slot.flags & punt_flags::AUDIT != 0;
        if self.shared.may_report(now) {
            let detail = reason.text();
            sink.record(&Record {
                verdict: if audit { Verdict::Audit } else { Verdict::Dropped },
                reason,
                ..Record::of(view, What::Unreadable { detail })
            });
        }
        if audit {
            let (key, serial) = (key(view), view.slot.serial);
            let memory = T::OffloadVerdict::default();
            self.add_offloaded(key, OffloadedFlow { serial, memory });
            sink.release_with(frame, &flow_command(key, view.slot, flow_op::OFFLOAD));
        } else {
            sink.discard(frame, reason);
        }
        !audit
    }

    /// A packet of a connection that is not known: it is older than what is known, or was forgotten.
    fn unknown<S: Sink<F>>(&mut self, now: Millis, view: &PacketView<'_>, frame: F, sink: &mut S) {
        let Some(segment) = Segment::read(view) else {
            self.shared.stats.invalid += 1;
            self.refuse(now, view, frame, Reason::TcpInvalid, sink);
            return;
        };
        self.shared.stats.midstream += 1;
        let is_audit = view.slot.flags & punt_flags::AUDIT != 0;
        if segment.is_syn() && !is_audit {
            // The answer to a SYN that was forgotten, or came to a worker that is no more. Its sender hears nothing, so the
            // client sends its SYN again, and that is known.
            sink.discard(frame, Reason::TcpMidstream);
            return;
        }
        // The answer of an end that has no such connection, perhaps to what [`Connection::disown`] asked; it names what
        // the other end waits for.
        if segment.is_rst() && segment.payload.is_empty() {
            sink.release(frame);
            return;
        }
        if self.refuse(now, view, frame, Reason::TcpMidstream, sink)
            && !segment.is_rst()
            && Connection::<F>::reset_unknown(view, &mut self.shared, sink)
        {
            sink.command(&flow_command(key(view), view.slot, flow_op::CLOSE));
        }
    }

    /// An ICMP error that quotes a segment of a connection. It goes on, ends here, or is dropped ([`Quoted`]).
    ///
    /// It is no packet of the connection, so it resets no timeout.
    pub(crate) fn error<S: Sink<F>>(
        &mut self,
        now: Millis,
        view: &PacketView<'_>,
        quoted: &QuotedSegment,
        frame: F,
        sink: &mut S,
    ) {
        let (key, serial) = (quoted.key, view.slot.serial);
        let is_ipv6 = view.packet.is(flags::IPV6);
        self.shared.stats.icmp_errors += 1;
        let mut is_known = false;
        for which in [CURRENT, CANDIDATE] {
            let all = if which == CANDIDATE {
                &mut self.candidates
            } else {
                &mut self.entries
            };
            let Some(entry) = all.get_mut(&key).filter(|entry| entry.connection.is_of(serial)) else {
                continue;
            };
            if entry.connection.is_over() {
                sink.release(frame);
                return;
            }
            is_known = true;
            let quoted = entry
                .connection
                .quoted(now, quoted, is_ipv6, &mut self.shared, sink);
            let due = entry.connection.deadline(&self.shared);
            if due < entry.due {
                schedule(&mut self.due, &mut entry.due, due, Key(key, which));
            }
            match quoted {
                Quoted::Unrelated => {}
                Quoted::Ours => {
                    sink.absorb(frame);
                    return;
                }
                Quoted::Theirs => {
                    sink.release(frame);
                    return;
                }
            }
        }
        if self
            .offloaded_flows
            .get(&key)
            .is_some_and(|flow| flow.serial == serial)
        {
            sink.release(frame);
            return;
        }
        self.shared.stats.icmp_unrelated += 1;
        let (reason, detail) = if is_known {
            (Reason::UnrelatedIcmp, NOT_UNDER_WAY)
        } else {
            (Reason::TcpMidstream, Reason::TcpMidstream.text())
        };
        let is_audit = view.slot.flags & punt_flags::AUDIT != 0;
        let reports = match self.entries.get_mut(&key) {
            Some(entry) => entry.connection.may_report(now, reason, &mut self.shared),
            None => self.shared.may_report(now),
        };
        if reports {
            let record = Record::of(view, What::Unreadable { detail });
            // The slot names the identity of the connection's other end; a router is not that end.
            let is_end = [view.packet.source, view.packet.destination].contains(&key.remote);
            sink.record(&Record {
                verdict: if is_audit {
                    Verdict::Audit
                } else {
                    Verdict::Dropped
                },
                reason,
                remote_identity: if is_end { record.remote_identity } else { 0 },
                ..record
            });
        }
        if is_audit {
            sink.release(frame);
        } else {
            sink.discard(frame, reason);
        }
    }

    /// When [`Connections::tick`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Millis> {
        self.due.first().map(|(due, _)| *due)
    }

    /// Does what is due.
    pub(crate) fn tick<S: Sink<F>>(&mut self, now: Millis, sink: &mut S) {
        while let Some(&(due, key)) = self.due.first()
            && due <= now
        {
            let all = if key.1 == CANDIDATE {
                &mut self.candidates
            } else {
                &mut self.entries
            };
            let Some(entry) = all.get_mut(&key.0) else {
                self.due.pop_first();
                continue;
            };
            let stays = entry.connection.tick(now, &mut self.shared, sink);
            if entry.connection.is_over() {
                self.remember_offloaded(key.0);
            } else if stays {
                let due = entry.connection.deadline(&self.shared).max(now + 1);
                schedule(&mut self.due, &mut entry.due, due, key);
            } else {
                entry
                    .connection
                    .close(Reason::InspectDeadline, &mut self.shared, sink);
                entry.connection.forgotten(sink);
                self.remove(key);
            }
        }
    }

    /// Forgets the connections of an endpoint, or all; what is held of them is dropped.
    pub(crate) fn forget<S: Sink<F>>(&mut self, endpoint: Option<u16>, sink: &mut S) {
        self.offloaded_flows
            .retain(|key, _| endpoint.is_some_and(|endpoint| endpoint != key.endpoint));
        let all = self.entries.keys().map(|key| Key(*key, CURRENT));
        let all = all.chain(self.candidates.keys().map(|key| Key(*key, CANDIDATE)));
        let gone: Vec<Key> = all
            .filter(|key| endpoint.is_none_or(|endpoint| endpoint == key.0.endpoint))
            .collect();
        for key in gone {
            if let Some(mut entry) = self.remove(key) {
                entry
                    .connection
                    .close(Reason::TcpMidstream, &mut self.shared, sink);
            }
        }
    }
}
