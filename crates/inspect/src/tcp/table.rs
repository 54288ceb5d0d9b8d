use std::collections::{BTreeSet, VecDeque};

use foldhash::{HashMap, HashMapExt as _};

use palisade_abi::{CtKey, Reason, carry_flags, order, protocol};

use super::{Connection, Reader, Remember, Shared, TcpLimits, TcpStats, order, segment::Segment};
use crate::{
    Millis, Sink, View,
    record::{Record, Verdict, What},
};

/// A connection, and what its reader knows of it.
struct Entry<F, T> {
    connection: Connection<F>,
    reader: T,
    /// When it is looked at next, at the latest.
    due: Millis,
}

/// A connection that is not read any more: its packets stay with the programs as long as the same rules hold for it.
struct Past<M> {
    serial: u32,
    memory: M,
}

/// The connections that are read by one kind of reader; `T` is what it keeps of each.
pub(crate) struct Connections<F, T: Remember> {
    entries: HashMap<CtKey, Box<Entry<F, T>>>,
    /// How many an endpoint has.
    by_endpoint: HashMap<u16, usize>,
    past: HashMap<CtKey, Past<T::Memory>>,
    /// The keys of `past` in the order in which they got there, with serials: those that are gone linger.
    order: VecDeque<(CtKey, u32)>,
    /// When they are due, each once.
    due: BTreeSet<(Millis, Key)>,
    shared: Shared,
}

/// A key that has an order.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key(CtKey);

impl Ord for Key {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let parts = |key: &CtKey| {
            (
                key.local.0,
                key.remote.0,
                key.local_port,
                key.remote_port,
                key.endpoint,
            )
        };
        parts(&self.0).cmp(&parts(&other.0))
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// Notes when a connection is due. `known`: what was noted.
fn schedule(all: &mut BTreeSet<(Millis, Key)>, known: &mut Millis, due: Millis, key: CtKey) {
    all.remove(&(*known, Key(key)));
    all.insert((due, Key(key)));
    *known = due;
}

/// The conntrack key of a packet, as the slot's endpoint sees it.
pub(crate) fn key(view: &View<'_>) -> CtKey {
    let packet = view.packet;
    let source = (packet.source, packet.source_port);
    let destination = (packet.destination, packet.destination_port);
    let (local, remote) = if view.slot.flags & carry_flags::INGRESS != 0 {
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

impl<F, T: Remember> Connections<F, T> {
    pub(crate) fn new(limits: &TcpLimits) -> Self {
        Self {
            entries: HashMap::new(),
            by_endpoint: HashMap::new(),
            past: HashMap::new(),
            order: VecDeque::new(),
            due: BTreeSet::new(),
            shared: Shared::new(limits),
        }
    }

    pub(crate) fn stats(&self) -> TcpStats {
        TcpStats {
            connections: self.entries.len() as u64,
            past: self.past.len() as u64,
            ..self.shared.stats
        }
    }

    /// A packet. `make` makes what is kept of a new connection; `reader` a reader of it, for this call; `recall` says
    /// whether a connection that is not read any more may go on, and else why not.
    #[expect(
        clippy::too_many_arguments,
        reason = "a packet, who reads it, and where it goes"
    )]
    pub(crate) fn packet<'t, S: Sink<F>, R: Reader<F>>(
        &'t mut self,
        now: Millis,
        view: &View<'_>,
        frame: F,
        make: impl FnOnce() -> T,
        reader: impl FnOnce(&'t mut T) -> R,
        recall: impl FnOnce(&mut T::Memory, &mut S) -> Result<(), Reason>,
        sink: &mut S,
    ) {
        let key = key(view);
        let opens = Segment::read(view).is_some_and(|s| s.is_syn() && !s.is_ack())
            && view.slot.flags & carry_flags::REPLY == 0;
        let serial = view.slot.serial;
        let known = self.entries.get(&key).map(|entry| {
            let connection = &entry.connection;
            let other = connection.serial() != serial || (opens && connection.is_done());
            (connection.is_over(), other)
        });
        // Nearly always it is one that goes on.
        if known != Some((false, false)) {
            match known {
                Some((true, _)) => self.put_past(key),
                Some(_) => {
                    if let Some(mut entry) = self.remove(&key) {
                        let shared = &mut self.shared;
                        entry.connection.close(Reason::TcpMidstream, shared, sink);
                    }
                }
                None => {}
            }
            if let Some(past) = self.past.get_mut(&key) {
                if past.serial == serial && !opens {
                    match recall(&mut past.memory, sink) {
                        Ok(()) => sink.release_with(frame, &order(key, view.slot, order::OFFLOAD)),
                        Err(reason) => {
                            self.past.remove(&key);
                            self.shared.stats.cut += 1;
                            sink.discard(frame, reason);
                            if Connection::<F>::disown(view, &mut self.shared, sink) {
                                sink.command(&order(key, view.slot, order::CLOSE));
                            }
                        }
                    }
                    return;
                }
                self.past.remove(&key);
            }
            if !opens {
                self.unknown(now, view, frame, sink);
                return;
            }
            let of_endpoint = self.by_endpoint.get(&key.endpoint).copied().unwrap_or(0);
            if self.entries.len() >= self.shared.limits.connections
                || of_endpoint >= self.shared.limits.connections_per_endpoint
            {
                self.shared.stats.limited += 1;
                self.refuse(now, view, frame, Reason::InspectLimit, sink);
                return;
            }
            self.by_endpoint.insert(key.endpoint, of_endpoint + 1);
            self.shared.stats.opened += 1;
            let entry = Entry {
                connection: Connection::new(key, view),
                reader: make(),
                due: Millis::MAX,
            };
            self.entries.insert(key, Box::new(entry));
        }
        let Some(entry) = self.entries.get_mut(&key) else {
            return;
        };
        let mut reader = reader(&mut entry.reader);
        entry
            .connection
            .packet(now, view, frame, &mut reader, &mut self.shared, sink);
        let due = entry.connection.deadline(&self.shared);
        if due < entry.due {
            schedule(&mut self.due, &mut entry.due, due, key);
        }
    }

    /// Has a connection read again, without a packet of it: its reader knows something new.
    pub(crate) fn resume<'t, S: Sink<F>, R: Reader<F>>(
        &'t mut self,
        now: Millis,
        key: &CtKey,
        reader: impl FnOnce(&'t mut T) -> R,
        sink: &mut S,
    ) {
        let Some(entry) = self.entries.get_mut(key) else {
            return;
        };
        let mut reader = reader(&mut entry.reader);
        entry.connection.resume(now, &mut reader, &mut self.shared, sink);
        let due = entry.connection.deadline(&self.shared);
        if due < entry.due {
            schedule(&mut self.due, &mut entry.due, due, *key);
        }
    }

    /// Keeps no more of a connection than what has to be known if its rules change.
    fn put_past(&mut self, key: CtKey) {
        let Some(mut entry) = self.remove(&key) else {
            return;
        };
        entry.connection.account(&mut self.shared);
        let past = Past {
            serial: entry.connection.serial(),
            memory: entry.reader.remember(),
        };
        self.add_past(key, past);
    }

    fn add_past(&mut self, key: CtKey, past: Past<T::Memory>) {
        self.order.push_back((key, past.serial));
        self.past.insert(key, past);
        let most = self.shared.limits.past;
        while self.past.len() > most || self.order.len() > 2 * most {
            let Some((key, serial)) = self.order.pop_front() else {
                break;
            };
            if self.past.get(&key).is_some_and(|past| past.serial == serial) {
                self.past.remove(&key);
            }
        }
    }

    fn remove(&mut self, key: &CtKey) -> Option<Box<Entry<F, T>>> {
        let entry = self.entries.remove(key)?;
        self.due.remove(&(entry.due, Key(*key)));
        if let Some(count) = self.by_endpoint.get_mut(&key.endpoint) {
            *count -= 1;
            if *count == 0 {
                self.by_endpoint.remove(&key.endpoint);
            }
        }
        Some(entry)
    }

    /// Reports and drops a packet of a connection that is not read. False: audit mode lets the connection pass,
    /// unread.
    fn refuse<S: Sink<F>>(
        &mut self,
        now: Millis,
        view: &View<'_>,
        frame: F,
        reason: Reason,
        sink: &mut S,
    ) -> bool {
        let audit = view.slot.flags & carry_flags::AUDIT != 0;
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
            let memory = T::Memory::default();
            self.add_past(key, Past { serial, memory });
            sink.release_with(frame, &order(key, view.slot, order::OFFLOAD));
        } else {
            sink.discard(frame, reason);
        }
        !audit
    }

    /// A packet of a connection that is not known: it is older than what is known, or was forgotten.
    fn unknown<S: Sink<F>>(&mut self, now: Millis, view: &View<'_>, frame: F, sink: &mut S) {
        let Some(segment) = Segment::read(view) else {
            self.shared.stats.invalid += 1;
            self.refuse(now, view, frame, Reason::TcpInvalid, sink);
            return;
        };
        self.shared.stats.midstream += 1;
        // The answer of an end that has no such connection, perhaps to what [`Connection::disown`] asked; it names what
        // the other end waits for.
        if segment.is_rst() && segment.payload.is_empty() {
            sink.release(frame);
            return;
        }
        if self.refuse(now, view, frame, Reason::TcpMidstream, sink)
            && !segment.is_rst()
            && Connection::<F>::disown(view, &mut self.shared, sink)
        {
            sink.command(&order(key(view), view.slot, order::CLOSE));
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
            let Some(entry) = self.entries.get_mut(&key.0) else {
                self.due.pop_first();
                continue;
            };
            let stays = entry.connection.tick(now, &mut self.shared, sink);
            if entry.connection.is_over() {
                self.put_past(key.0);
            } else if stays {
                let due = entry.connection.deadline(&self.shared).max(now + 1);
                schedule(&mut self.due, &mut entry.due, due, key.0);
            } else {
                entry
                    .connection
                    .close(Reason::InspectDeadline, &mut self.shared, sink);
                self.remove(&key.0);
            }
        }
    }

    /// Forgets the connections of an endpoint, or all; what is held of them is dropped.
    pub(crate) fn forget<S: Sink<F>>(&mut self, endpoint: Option<u16>, sink: &mut S) {
        self.past
            .retain(|key, _| endpoint.is_some_and(|endpoint| endpoint != key.endpoint));
        match endpoint {
            Some(endpoint) => _ = self.by_endpoint.remove(&endpoint),
            None => self.by_endpoint.clear(),
        }
        let (shared, due) = (&mut self.shared, &mut self.due);
        self.entries.retain(|key, entry| {
            let stays = endpoint.is_some_and(|endpoint| endpoint != key.endpoint);
            if !stays {
                entry.connection.close(Reason::TcpMidstream, shared, sink);
                due.remove(&(entry.due, Key(*key)));
            }
            stays
        });
    }
}
