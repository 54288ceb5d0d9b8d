//! The connections: listed, swept of what is dead, filled with what was there before us.

use palisade_abi::{Counter, CtEntry, CtKey, counter_slot};

use crate::{
    Datapath, MapError,
    counters::sum,
    maps::{Map, PerCpuArray},
    shares::{ProtectedCounts, Shares},
};

/// Works on the connections.
#[derive(Debug)]
pub struct Conntrack<'a> {
    map: &'a Map<CtKey, CtEntry>,
    counters: &'a PerCpuArray<Counter>,
    shares: &'a Shares,
}

/// A flow that was removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ended {
    /// Who with whom.
    pub key: CtKey,
    /// As it was last seen. [`palisade_abi::ct_flags::CLOSED`]: its end has been reported.
    pub entry: CtEntry,
}

/// What a sweep did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sweep {
    /// The flows that were removed.
    pub ended: Vec<Ended>,
    /// Flows that are still there.
    pub present: u64,
}

/// How full the map is, and what became of its entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ConntrackCounts {
    /// Made by the programs since the maps were made.
    pub made: u64,
    /// Made from the kernel's own tables.
    pub seeded: u64,
    /// Removed by sweeps.
    pub swept: u64,
    /// In the map.
    pub present: u64,
    /// Removed to make room: by a newer flow of the same share, or by the kernel. Approximate while traffic flows.
    pub evicted: u64,
    /// In use by both ends, so that no other flow takes their place.
    pub protected: u64,
    /// Size of the map.
    pub max_entries: u64,
}

impl Datapath {
    /// The connections.
    #[must_use]
    pub fn conntrack(&self) -> Conntrack<'_> {
        Conntrack {
            map: &self.conntrack,
            counters: &self.counters,
            shares: &self.shares,
        }
    }

    /// After the map was made anew with another size: takes over what programs of before wrote to the old one in the
    /// meantime. Called whenever an interface has got its new programs.
    pub(crate) fn follow_old_conntrack(&self) -> Result<(), MapError> {
        if let Some(old) = &self.old_conntrack {
            let now = crate::monotonic_coarse();
            for (key, entry) in old.entries()? {
                if entry.expires > now {
                    self.conntrack.insert_new(&key, &entry)?;
                }
            }
        }
        Ok(())
    }
}

impl Conntrack<'_> {
    /// All entries, the dead ones as well, in no order.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn entries(&self) -> Result<Vec<(CtKey, CtEntry)>, MapError> {
        self.map.entries()
    }

    /// One entry.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn get(&self, key: &CtKey) -> Result<Option<CtEntry>, MapError> {
        self.map.get(key)
    }

    /// Removes what is dead at `now` (of [`crate::monotonic_coarse`]).
    ///
    /// # Errors
    /// If the map cannot be read or refuses.
    pub fn sweep(&self, now: u64) -> Result<Sweep, MapError> {
        self.remove_if(|_, entry| entry.expires <= now)
    }

    /// Removes the flows that `dead` says: of an endpoint that is gone, say.
    ///
    /// # Errors
    /// If the map cannot be read or refuses.
    pub fn remove_if(&self, dead: impl Fn(&CtKey, &CtEntry) -> bool) -> Result<Sweep, MapError> {
        let mut sweep = Sweep::default();
        let mut keys = Vec::new();
        let before = self.shares.counts();
        let mut protected = ProtectedCounts::default();
        self.map.for_each(|key, entry| {
            if dead(&key, &entry) {
                keys.push(key);
            } else {
                protected.add(&key, &entry);
                sweep.present += 1;
            }
        })?;
        for key in keys {
            let Some(entry) = self.map.take(&key)? else {
                continue;
            };
            if dead(&key, &entry) {
                sweep.ended.push(Ended { key, entry });
            } else {
                // A packet came in between and the flow lives again. What the programs may have made meanwhile
                // is newer than this.
                self.map.insert_new(&key, &entry)?;
                protected.add(&key, &entry);
                sweep.present += 1;
            }
        }
        self.shares.correct(&before, &protected);
        self.add(counter_slot::CONNTRACK_SWEPT, sweep.ended.len() as u64)?;
        Ok(sweep)
    }

    /// Adds flows that were there before the programs, where there is no entry yet; answers how many.
    ///
    /// # Errors
    /// If the map refuses.
    pub fn seed(&self, flows: &[(CtKey, CtEntry)]) -> Result<usize, MapError> {
        let mut seeded = 0;
        for (key, entry) in flows {
            let mut entry = *entry;
            entry.protected = u8::from(self.shares.protect(key, &entry));
            seeded += usize::from(self.map.insert_new(key, &entry)?);
        }
        // Of those that were there already, a place was taken too many.
        self.remove_if(|_, _| false)?;
        self.add(counter_slot::CONNTRACK_SEEDED, seeded as u64)?;
        Ok(seeded)
    }

    /// Endpoints that have used up their share of one direction and the pool: what they open beyond gives way to newer
    /// flows of theirs.
    #[must_use]
    pub fn exhausted(&self) -> Vec<u16> {
        self.shares.exhausted().into_iter().collect()
    }

    /// How full the map is. Walks it.
    ///
    /// # Errors
    /// If a map cannot be read.
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
