//! Access to the conntrack table: listing, sweeping and seeding.

use std::{
    ops::ControlFlow,
    sync::atomic::{AtomicU64, Ordering},
};

use palisade_abi::{
    Counter, CtEntry, CtKey, Direction, ProxyPath, PuntRequest, counter_slot, ct_flags, punt_flags,
};

use crate::{
    Datapath, MapError,
    counters::sum,
    maps::{Map, PerCpuArray},
    shares::{ProtectedCounts, Shares},
};

/// Conntrack table of the programs.
#[derive(Debug)]
pub struct Conntrack<'a> {
    map: &'a Map<CtKey, CtEntry>,
    counters: &'a PerCpuArray<Counter>,
    shares: &'a Shares,
    removals: &'a AtomicU64,
}

/// What [`Conntrack::remove_if`] has done with a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// The flow was removed. If its last entry has the flag [`palisade_abi::ct_flags::CLOSED`], the programs have already
    /// reported the end.
    Removed,
    /// The flow stays.
    Stays,
}

/// Numbers of flows after [`Conntrack::remove_if`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Removal {
    /// Removed flows.
    pub removed: u64,
    /// Remaining flows.
    pub present: u64,
}

/// Numbers of entries of the conntrack map.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ConntrackCounts {
    /// Entries that the programs have created since the maps were created.
    pub made: u64,
    /// Entries that were created from the kernel's own tables.
    pub seeded: u64,
    /// Entries that sweeps have removed.
    pub swept: u64,
    /// Entries in the map.
    pub present: u64,
    /// Entries that a newer flow of the same share, or the LRU of the kernel, has replaced. Approximate while traffic
    /// flows.
    pub evicted: u64,
    /// Protected flows: both ends use them, and no new flow evicts them.
    pub protected: u64,
    /// Capacity of the map, entries.
    pub max_entries: u64,
}

impl Datapath {
    /// Returns the conntrack table.
    #[must_use]
    pub fn conntrack(&self) -> Conntrack<'_> {
        Conntrack {
            map: &self.conntrack,
            counters: &self.counters,
            shares: &self.shares,
            removals: &self.removals,
        }
    }
}

impl Conntrack<'_> {
    /// Returns all entries, expired ones included, in no particular order.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn entries(&self) -> Result<Vec<(CtKey, CtEntry)>, MapError> {
        self.map.entries()
    }

    /// Passes each entry to `each`, expired ones included, in no particular order. The entries are read in batches, so the
    /// memory does not depend on their number.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn for_each(&self, each: impl FnMut(CtKey, CtEntry)) -> Result<(), MapError> {
        self.map.for_each(each)
    }

    /// Returns the entry of a key.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn get(&self, key: &CtKey) -> Result<Option<CtEntry>, MapError> {
        self.map.get(key)
    }

    /// Passes all entries to `each` in chunks of bounded size, expired ones included, in no particular order, until it
    /// returns a break.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn for_each_chunk(
        &self,
        mut each: impl FnMut(&[(CtKey, CtEntry)]) -> ControlFlow<()>,
    ) -> Result<(), MapError> {
        self.map.for_each_chunk(|chunk| Ok(each(chunk)))
    }

    /// Removes the flows for which `dead` returns true, and passes each flow with its last entry to `each`. The entries are
    /// read and removed in batches, so the memory does not depend on their number.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read or written.
    pub fn remove_if(
        &self,
        dead: impl Fn(&CtKey, &CtEntry) -> bool,
        mut each: impl FnMut(Fate, &CtKey, &CtEntry),
    ) -> Result<Removal, MapError> {
        let mut outcome = Removal::default();
        let before = self.shares.counts();
        let mut protected = ProtectedCounts::default();
        let walk = self.map.for_each_chunk(|chunk| {
            for (key, entry) in chunk {
                let last = if dead(key, entry) {
                    match self.map.take(key)? {
                        None => continue,
                        Some(last) if dead(key, &last) => {
                            outcome.removed += 1;
                            each(Fate::Removed, key, &last);
                            continue;
                        }
                        // A packet has refreshed the flow since the lookup, so the entry is inserted again. If a program has
                        // created a new entry for the key meanwhile, the new entry stays.
                        Some(last) => {
                            self.map.insert_new(key, &last)?;
                            last
                        }
                    }
                } else {
                    *entry
                };
                protected.add(key, &last);
                outcome.present += 1;
                each(Fate::Stays, key, &last);
            }
            Ok(ControlFlow::Continue(()))
        });
        // Also after an error, because flows may be gone.
        if outcome.removed != 0 {
            self.removals.fetch_add(1, Ordering::Release);
            self.add(counter_slot::CONNTRACK_SWEPT, outcome.removed)?;
        }
        walk?;
        self.shares.correct(&before, &protected);
        Ok(outcome)
    }

    /// Adds seeded flows whose keys have no entry yet. Returns the number of added flows.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be written.
    pub fn seed(&self, flows: &[(CtKey, CtEntry)]) -> Result<usize, MapError> {
        let mut seeded = 0;
        for (key, entry) in flows {
            let mut entry = *entry;
            entry.protected = u8::from(self.shares.protect(key, &entry));
            seeded += usize::from(self.map.insert_new(key, &entry)?);
        }
        // `protect` has also counted flows that already had an entry. The walk of `remove_if` corrects the counts.
        self.remove_if(|_, _| false, |_, _, _| {})?;
        self.count_seeded(seeded)?;
        Ok(seeded)
    }

    /// Counts entries that come from the kernel's own tables or from an earlier conntrack table.
    pub(crate) fn count_seeded(&self, entries: usize) -> Result<(), MapError> {
        self.add(counter_slot::CONNTRACK_SEEDED, entries as u64)
    }

    /// Creates the entry of an intercepted flow that the daemon opens itself, so that the programs forward its packets
    /// as those of a flow from an endpoint, or to it. The entry expires at `expires`, a time of [`crate::monotonic_coarse`].
    /// Returns false if a flow with this key exists.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be written.
    pub fn insert_intercepted(
        &self,
        key: &CtKey,
        direction: Direction,
        request: &PuntRequest,
        path: ProxyPath,
        expires: u64,
    ) -> Result<bool, MapError> {
        let now = crate::monotonic_coarse();
        let entry = CtEntry {
            expires,
            created: now,
            reported: now,
            windows: zerocopy::transmute!(path),
            rule: request.rule,
            ruleset: request.ruleset,
            remote_identity: request.remote_identity,
            revision: request.revision,
            serial: request.serial,
            inspector: request.inspector,
            punt_flags: request.flags & punt_flags::AUDIT,
            flags: match direction {
                Direction::Ingress => ct_flags::INGRESS,
                Direction::Egress => 0,
            },
            ..CtEntry::default()
        };
        self.map.insert_new(key, &entry)
    }

    /// Removes a flow.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be written.
    pub fn remove(&self, key: &CtKey) -> Result<(), MapError> {
        self.map.take(key)?;
        self.removals.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Returns the endpoints that have used up the guaranteed part of a share while the pool is used up, too. New flows
    /// in such a share are not protected, so later flows evict them.
    #[must_use]
    pub fn exhausted(&self) -> Vec<u16> {
        self.shares.exhausted().into_iter().collect()
    }

    /// Returns the numbers of entries. Walks the map.
    ///
    /// # Errors
    /// [`MapError`] if a map cannot be read.
    pub fn counts(&self) -> Result<ConntrackCounts, MapError> {
        let made = self.counter(counter_slot::CONNTRACK_CREATED)?.packets;
        let seeded = self.counter(counter_slot::CONNTRACK_SEEDED)?.packets;
        let swept = self.counter(counter_slot::CONNTRACK_SWEPT)?.packets;
        let (mut present, mut protected) = (0, 0);
        self.map.for_each(|_, entry| {
            present += 1;
            protected += u64::from(entry.protected != 0);
        })?;
        Ok(ConntrackCounts {
            made,
            seeded,
            swept,
            present,
            evicted: (made + seeded).saturating_sub(swept + present),
            protected,
            max_entries: u64::from(self.map.max_entries()),
        })
    }

    fn counter(&self, slot: u32) -> Result<Counter, MapError> {
        Ok(sum(&mut self.counters.get(slot)?.into_iter()))
    }

    /// Adds to a counter that only user space writes.
    fn add(&self, slot: u32, entries: u64) -> Result<(), MapError> {
        if entries == 0 {
            return Ok(());
        }
        let mut counter = self.counter(slot)?;
        counter.packets += entries;
        self.counters.set(slot, &counter)
    }
}
