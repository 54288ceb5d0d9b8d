//! Hands over the connections of one inspector, and takes them over after a planned restart.

use palisade_abi::CtKey;

use super::{Connection, Connections, Entry, Key, OffloadedFlow, Slot, schedule};
use crate::{
    Millis, Sink,
    context::Cx,
    handover::{
        Entries, Kind,
        wire::{Reader, Wire},
    },
    tcp::{connection::Transfer, inspector::Transferable},
};

impl<F, T: Transferable> Connections<F, T> {
    /// Writes the connections that can be handed over, and drops the held packets of all of them. `kind`: kind of the
    /// entries of open connections; those of offloaded ones follow it.
    pub(crate) fn hand_over<S: Sink<F>>(&mut self, kind: Kind, into: &mut Entries, cx: &mut Cx<'_, F, S>) {
        self.settle(cx);
        let over: Vec<CtKey> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.connection.is_over())
            .map(|(key, _)| *key)
            .collect();
        for key in over {
            self.remember_offloaded(key);
        }
        for entry in self.entries.values_mut() {
            entry.connection.drop_held(&mut self.shared.context(cx));
            let transfer = entry.connection.transfer();
            // The client of a connection whose SYN has no answer repeats its SYN.
            let is_opened_again = entry.half_open.is_some() && transfer == Transfer::Impossible;
            if is_opened_again || transfer == Transfer::Over {
                continue;
            }
            let is_written = transfer == Transfer::Possible
                && into.add(kind.open, |out| {
                    entry.connection.write(out);
                    entry.inspector.write(out)
                });
            if is_written {
                into.account.connections += 1;
            } else {
                into.account.cut += 1;
            }
        }
        // The oldest first, as they are added again.
        while let Some((key, serial)) = self.oldest_first.pop_front() {
            let Some(flow) = self.offloaded_flows.remove(&key) else {
                continue;
            };
            if flow.serial == serial {
                into.add(kind.offloaded, |out| {
                    key.write(out);
                    serial.write(out);
                    flow.memory.write(out);
                    true
                });
            }
        }
    }

    /// Takes a connection over that [`Connections::hand_over`] has written. `adopt` completes the inspector's state.
    /// Returns whether the connection was taken over.
    pub(crate) fn take_over(&mut self, bytes: &[u8], now: Millis, adopt: impl FnOnce(&mut T)) -> bool {
        let mut from = Reader::new(bytes);
        let Some(mut connection) = Connection::read(&mut from, now, &mut self.shared) else {
            return false;
        };
        let key = connection.key();
        let inspector = T::read(&mut from).filter(|_| from.is_empty());
        let is_open = connection.is_opened();
        let has_room = if is_open {
            !self.is_full(&key)
        } else {
            self.half_open < self.shared.limits.half_open
        };
        let Some(mut inspector) = inspector.filter(|_| has_room && !self.entries.contains_key(&key)) else {
            // The state no longer counts against the limits.
            connection.account(&mut self.shared);
            return false;
        };
        adopt(&mut inspector);
        self.offloaded_flows.remove(&key);
        let share = self.shares.entry(key.endpoint).or_default();
        let half_open = if is_open {
            share.open += 1;
            self.open += 1;
            None
        } else {
            self.number += 1;
            self.half_open += 1;
            share.half_open.insert(self.number, Key(key, Slot::Current));
            Some(self.number)
        };
        let due = connection.deadline(&self.shared);
        let mut entry = Box::new(Entry {
            connection,
            inspector,
            due: Millis::MAX,
            half_open,
            is_unsettled: false,
        });
        schedule(&mut self.due, &mut entry.due, due, Key(key, Slot::Current));
        self.entries.insert(key, entry);
        true
    }

    /// Takes an offloaded connection over. Returns whether the bytes are one.
    pub(crate) fn take_over_offloaded(&mut self, bytes: &[u8]) -> bool {
        let mut from = Reader::new(bytes);
        let mut read = || {
            Some((
                CtKey::read(&mut from)?,
                u32::read(&mut from)?,
                Wire::read(&mut from)?,
            ))
        };
        let Some((key, serial, memory)) = read() else {
            return false;
        };
        if !from.is_empty() || self.entries.contains_key(&key) {
            return false;
        }
        self.add_offloaded(key, OffloadedFlow { serial, memory });
        true
    }
}
