use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
};

use palisade_abi::{CtKey, Reason, carry_flags, order, protocol};

use super::{Connection, Reader, Remember, Shared, TcpLimits, TcpStats, order, segment::Segment};
use crate::{Millis, Sink, View, record::About};

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
    past: HashMap<CtKey, Past<T::Memory>>,
    /// The keys of `past` in the order in which they got there, with serials: those that are gone linger.
    order: VecDeque<(CtKey, u32)>,
    /// When they are due. An entry may stand here more than once; the earliest counts.
    due: BinaryHeap<Reverse<(Millis, Key)>>,
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
            past: HashMap::new(),
            order: VecDeque::new(),
            due: BinaryHeap::new(),
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
        if self
            .entries
            .get(&key)
            .is_some_and(|entry| entry.connection.is_over())
        {
            self.put_past(key);
        }
        if let Some(past) = self.past.get_mut(&key) {
            if past.serial == serial && !opens {
                match recall(&mut past.memory, sink) {
                    Ok(()) => sink.release_with(frame, &order(key, serial, order::OFFLOAD)),
                    Err(reason) => {
                        self.past.remove(&key);
                        self.shared.stats.cut += 1;
                        sink.discard(frame, reason);
                        sink.command(&order(key, serial, order::CLOSE));
                        Connection::<F>::refuse(view, &mut self.shared, sink);
                        Connection::<F>::abandon(view, &mut self.shared, sink);
                    }
                }
                return;
            }
            self.past.remove(&key);
        }
        if let Some(entry) = self.entries.get_mut(&key)
            && (entry.connection.serial() != serial || (opens && entry.connection.is_done()))
        {
            entry
                .connection
                .close(Reason::TcpMidstream, &mut self.shared, sink);
            self.entries.remove(&key);
        }
        if !self.entries.contains_key(&key) {
            if !opens {
                self.unknown(view, frame, sink);
                return;
            }
            if self.entries.len() >= self.shared.limits.connections {
                self.shared.stats.limited += 1;
                sink.discard(frame, Reason::InspectLimit);
                return;
            }
            self.shared.stats.opened += 1;
            let entry = Entry {
                connection: Connection::new(key, serial, About::of(view)),
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
            entry.due = due;
            self.due.push(Reverse((due, Key(key))));
        }
    }

    /// Keeps no more of a connection than what has to be known if its rules change.
    fn put_past(&mut self, key: CtKey) {
        let Some(mut entry) = self.entries.remove(&key) else {
            return;
        };
        entry.connection.account(&mut self.shared);
        let past = Past {
            serial: entry.connection.serial(),
            memory: entry.reader.remember(),
        };
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

    /// A packet of a connection that is not known: it is older than what is known, or was forgotten.
    fn unknown<S: Sink<F>>(&mut self, view: &View<'_>, frame: F, sink: &mut S) {
        let Some(segment) = Segment::read(view) else {
            self.shared.stats.invalid += 1;
            sink.discard(frame, Reason::TcpInvalid);
            return;
        };
        self.shared.stats.midstream += 1;
        sink.discard(frame, Reason::TcpMidstream);
        if !segment.is_rst() {
            Connection::<F>::refuse(view, &mut self.shared, sink);
            Connection::<F>::abandon(view, &mut self.shared, sink);
            sink.command(&order(key(view), view.slot.serial, order::CLOSE));
        }
    }

    /// When [`Connections::tick`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Millis> {
        self.due.peek().map(|Reverse((due, _))| *due)
    }

    /// Does what is due.
    pub(crate) fn tick<S: Sink<F>>(&mut self, now: Millis, sink: &mut S) {
        while let Some(&Reverse((due, key))) = self.due.peek()
            && due <= now
        {
            self.due.pop();
            let Some(entry) = self.entries.get_mut(&key.0) else {
                continue;
            };
            if entry.due != due {
                continue;
            }
            let stays = entry.connection.tick(now, &mut self.shared, sink);
            if entry.connection.is_over() {
                self.put_past(key.0);
            } else if stays {
                entry.due = entry.connection.deadline(&self.shared).max(now + 1);
                self.due.push(Reverse((entry.due, key)));
            } else {
                entry
                    .connection
                    .close(Reason::InspectDeadline, &mut self.shared, sink);
                self.entries.remove(&key.0);
            }
        }
    }

    /// Forgets the connections of an endpoint, or all; what is held of them is dropped.
    pub(crate) fn forget<S: Sink<F>>(&mut self, endpoint: Option<u16>, sink: &mut S) {
        self.past
            .retain(|key, _| endpoint.is_some_and(|endpoint| endpoint != key.endpoint));
        let shared = &mut self.shared;
        self.entries.retain(|key, entry| {
            let stays = endpoint.is_some_and(|endpoint| endpoint != key.endpoint);
            if !stays {
                entry.connection.close(Reason::TcpMidstream, shared, sink);
            }
            stays
        });
    }
}
