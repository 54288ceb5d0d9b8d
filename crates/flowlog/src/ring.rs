//! Ring of the most recent flows, with one writer at a time and any number of readers.
//!
//! Every flow has a number. The flow with number *n* is in slot *n mod capacity* until flow *n + capacity* overwrites
//! it; a reader that is late gets the number of flows that it missed. A slot is locked only to copy or replace one
//! pointer, not while a flow is filtered, formatted or sent, so a slow reader does not delay the writer.
//!
//! The ring is hand-written, since readers of a broadcast channel can neither begin at a given time nor read backwards.
//!
//! Inspectors can produce many more records than are ever read. The ring stores the records, and makes a flow with its
//! texts only when a reader needs it ([`Ring::push_record`]).

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use palisade_inspect::record::Record;

use crate::{Filters, Flow, FlowResolver, Timestamp, Uuid};

/// Largest number of positions in the ring by which a flow can be late, for [`Ring::first`].
const FIRST_REORDERED: usize = 1_024;

/// Resolver of the numbers in records.
pub type Resolver = Arc<dyn FlowResolver + Send + Sync>;

/// Record of an inspector, and its flow after the first read.
struct Deferred {
    record: Record,
    time: Timestamp,
    uuid: Uuid,
    names: Resolver,
    flow: OnceLock<Arc<Flow>>,
}

impl Deferred {
    fn flow(&self) -> &Arc<Flow> {
        let make = || {
            let mut flow = Flow::from_record(&self.record, &*self.names, self.time);
            flow.uuid = self.uuid.clone();
            Arc::new(flow)
        };
        self.flow.get_or_init(make)
    }
}

#[derive(Clone)]
enum Entry {
    Flow(Arc<Flow>),
    Record(Arc<Deferred>),
}

impl Entry {
    fn time(&self) -> Timestamp {
        match self {
            Self::Flow(flow) => flow.time,
            Self::Record(deferred) => deferred.time,
        }
    }

    fn flow(&self) -> Arc<Flow> {
        Arc::clone(match self {
            Self::Flow(flow) => flow,
            Self::Record(deferred) => deferred.flow(),
        })
    }
}

struct Slot {
    number: u64,
    entry: Option<Entry>,
}

/// Bounded ring of flows.
pub struct Ring {
    /// Random value in the identifiers of all flows of this ring.
    key: u64,
    slots: Box<[Mutex<Slot>]>,
    /// Number of the next flow. All flows with lower numbers are in their slots or overwritten.
    next: AtomicU64,
    /// Serializes writers.
    writing: Mutex<()>,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    awake: Condvar,
}

/// Result of a read.
#[derive(Clone, PartialEq, Debug)]
pub enum Next {
    /// The next flow.
    Flow(Arc<Flow>),
    /// Number of flows that were overwritten before this reader read them.
    Lost(u64),
}

/// A flow of the ring as [`Cursor::read_raw`] passes it to a reader.
#[derive(Clone, Copy, Debug)]
pub enum Raw<'a> {
    /// A flow.
    Flow(&'a Flow),
    /// A record whose flow was not needed so far.
    Record(&'a Record),
    /// Number of flows that were overwritten before this reader read them.
    Lost(u64),
}

/// Position of a reader in the ring.
pub struct Cursor {
    ring: Arc<Ring>,
    at: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned lock is used all the same: no code under these locks leaves data half changed if it panics.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ring {
    /// Returns an empty ring for `capacity` flows, at least one.
    #[must_use]
    pub fn new(capacity: usize) -> Arc<Self> {
        let slot = |_| {
            Mutex::new(Slot {
                number: 0,
                entry: None,
            })
        };
        Arc::new(Self {
            // The keys of `RandomState` are random. The value need not be secret, only different from that of other
            // daemons and of this daemon before a restart.
            key: RandomState::new().hash_one(()),
            slots: (0..capacity.max(1)).map(slot).collect(),
            next: AtomicU64::new(0),
            writing: Mutex::new(()),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            awake: Condvar::new(),
        })
    }

    /// Returns the capacity, flows.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// Returns how many flows were ever written.
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.next.load(Ordering::SeqCst)
    }

    /// Returns how many flows are in the ring.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::try_from(self.seen()).map_or(self.capacity(), |seen| seen.min(self.capacity()))
    }

    /// Returns whether no flow was ever written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.seen() == 0
    }

    /// Adds a flow; a full ring overwrites the oldest flow. Returns the number of the new flow.
    pub fn push(&self, flow: Flow) -> u64 {
        // Allocated before the lock is taken.
        let mut flow = Arc::new(flow);
        self.put(|uuid| {
            if let Some(flow) = Arc::get_mut(&mut flow) {
                flow.uuid = uuid;
            }
            Entry::Flow(flow)
        })
    }

    /// Adds a record of an inspector. Its flow is made at the first read or by [`Ring::settle`], whichever is first,
    /// with the names that `names` returns at that time. Returns the number of the flow.
    pub fn push_record(&self, record: &Record, names: &Resolver, time: Timestamp) -> u64 {
        let mut deferred = Arc::new(Deferred {
            record: *record,
            time,
            uuid: Uuid::None,
            names: Arc::clone(names),
            flow: OnceLock::new(),
        });
        self.put(|uuid| {
            if let Some(deferred) = Arc::get_mut(&mut deferred) {
                deferred.uuid = uuid;
            }
            Entry::Record(deferred)
        })
    }

    /// Returns the flow with this identifier, if the flow is still in the ring.
    #[must_use]
    pub fn get_by_uuid(&self, uuid: &str) -> Option<Arc<Flow>> {
        let number = Uuid::parse(uuid)?.number_of(self.key)?;
        // Slots that were never written have number 0 and no entry.
        self.get(number)
    }

    /// Replaces each record that is older than `until` by its flow, and so releases the resolver of the record.
    pub fn settle(&self, until: Timestamp) {
        for slot in &self.slots {
            let (number, entry) = {
                let slot = lock(slot);
                match &slot.entry {
                    Some(entry @ Entry::Record(_)) if entry.time() < until => (slot.number, entry.clone()),
                    _ => continue,
                }
            };
            let flow = entry.flow();
            let mut slot = lock(slot);
            if slot.number == number {
                slot.entry = Some(Entry::Flow(flow));
            }
        }
    }

    fn put(&self, make: impl FnOnce(Uuid) -> Entry) -> u64 {
        let turn = lock(&self.writing);
        let number = self.next.load(Ordering::SeqCst);
        let entry = make(Uuid::new(self.key, number));
        let before = std::mem::replace(
            &mut *lock(self.slot(number)),
            Slot {
                number,
                entry: Some(entry),
            },
        );
        self.next.store(number + 1, Ordering::SeqCst);
        drop(turn);
        drop(before); // frees the old flow with no lock held
        // A reader increments `sleepers` before it checks `next` for the last time. So either the reader sees the new
        // flow, or this load sees that the reader sleeps.
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.sleep));
            self.awake.notify_all();
        }
        number
    }

    /// Returns a cursor at the oldest flow.
    #[must_use]
    pub fn oldest(self: &Arc<Self>) -> Cursor {
        self.cursor(self.oldest_number())
    }

    /// Returns a cursor after the newest flow.
    #[must_use]
    pub fn follow(self: &Arc<Self>) -> Cursor {
        self.cursor(self.seen())
    }

    /// Returns a cursor at the first flow that is not older than `time`.
    #[must_use]
    pub fn since(self: &Arc<Self>, time: Timestamp) -> Cursor {
        let mut cursor = self.oldest();
        while cursor.at < self.seen() {
            match self.entry(cursor.at) {
                Some(entry) if entry.time() >= time => break,
                _ => cursor.at += 1,
            }
        }
        cursor
    }

    /// Returns a cursor after the flow with this identifier, if the flow is or was in this ring.
    #[must_use]
    pub fn after(self: &Arc<Self>, uuid: &str) -> Option<Cursor> {
        let number = Uuid::parse(uuid)?.number_of(self.key)?;
        (number < self.seen()).then(|| self.cursor(number + 1))
    }

    /// Returns the first `count` flows that pass the filters, ordered by time.
    #[must_use]
    pub fn first(self: &Arc<Self>, count: usize, filters: &Filters) -> Vec<Arc<Flow>> {
        // Flows reach the ring nearly in the order of their times. So the oldest flows are sought among some more.
        let some_more = count.saturating_add(FIRST_REORDERED);
        let numbers = self.oldest_number()..self.seen();
        let flows = numbers.filter_map(|number| self.get(number));
        let mut flows: Vec<_> = flows
            .filter(|flow| filters.matches(flow))
            .take(some_more)
            .collect();
        flows.sort_by_key(|flow| flow.time);
        flows.truncate(count);
        flows
    }

    /// Returns the last `count` flows that pass the filters, the oldest first, and a cursor after the newest flow.
    #[must_use]
    pub fn last(self: &Arc<Self>, count: usize, filters: &Filters) -> (Vec<Arc<Flow>>, Cursor) {
        let end = self.seen();
        let backwards = (self.oldest_number()..end)
            .rev()
            .filter_map(|number| self.get(number));
        let mut flows: Vec<_> = backwards
            .filter(|flow| filters.matches(flow))
            .take(count)
            .collect();
        flows.reverse();
        (flows, self.cursor(end))
    }

    fn cursor(self: &Arc<Self>, at: u64) -> Cursor {
        Cursor {
            ring: Arc::clone(self),
            at,
        }
    }

    /// Returns the number of the oldest flow.
    #[must_use]
    pub fn oldest_number(&self) -> u64 {
        self.seen().saturating_sub(self.slots.len() as u64)
    }

    fn slot(&self, number: u64) -> &Mutex<Slot> {
        // No truncation: the remainder is less than the number of slots, a usize.
        &self.slots[(number % self.slots.len() as u64) as usize]
    }

    fn entry(&self, number: u64) -> Option<Entry> {
        let slot = lock(self.slot(number));
        if slot.number == number {
            slot.entry.clone()
        } else {
            None
        }
    }

    /// Returns the flow with a number, if the flow is still in the ring.
    #[must_use]
    pub fn get(&self, number: u64) -> Option<Arc<Flow>> {
        self.entry(number).map(|entry| entry.flow())
    }
}

impl Cursor {
    /// Returns the next flow, or the number of flows that this reader has lost; `None` if there is no newer flow.
    pub fn read(&mut self) -> Option<Next> {
        self.next().map(|next| match next {
            Ok(entry) => Next::Flow(entry.flow()),
            Err(lost) => Next::Lost(lost),
        })
    }

    /// Passes the next flow to `read` as the ring has it. Unlike [`Self::read`], makes no flow from a record. Returns
    /// `None` if there is no newer flow.
    pub fn read_raw<T>(&mut self, read: impl FnOnce(Raw<'_>) -> T) -> Option<T> {
        self.next().map(|next| match &next {
            Ok(Entry::Flow(flow)) => read(Raw::Flow(flow)),
            Ok(Entry::Record(deferred)) => read(Raw::Record(&deferred.record)),
            Err(lost) => read(Raw::Lost(*lost)),
        })
    }

    /// Returns the next entry, or as an error the number of flows that this reader has lost.
    fn next(&mut self) -> Option<Result<Entry, u64>> {
        loop {
            let end = self.ring.seen();
            if self.at >= end {
                return None;
            }
            let first = self.ring.oldest_number();
            if self.at < first {
                let lost = first - self.at;
                self.at = first;
                return Some(Err(lost));
            }
            if let Some(entry) = self.ring.entry(self.at) {
                self.at += 1;
                return Some(Ok(entry));
            }
            // The flow was overwritten after `first` was read; try again from the new first flow.
        }
    }

    /// Returns how many flows in the ring are after the cursor.
    #[must_use]
    pub fn behind(&self) -> u64 {
        let end = self.ring.seen();
        end.saturating_sub(self.at.max(self.ring.oldest_number()))
    }

    /// Waits for a flow after the cursor, at most for `timeout`. Returns whether there is such a flow.
    pub fn wait(&self, timeout: Duration) -> bool {
        let ready = |ring: &Ring| ring.seen() > self.at;
        if ready(&self.ring) {
            return true;
        }
        self.ring.sleepers.fetch_add(1, Ordering::SeqCst);
        let asleep = lock(&self.ring.sleep);
        let result = self
            .ring
            .awake
            .wait_timeout_while(asleep, timeout, |()| !ready(&self.ring));
        drop(result);
        self.ring.sleepers.fetch_sub(1, Ordering::SeqCst);
        ready(&self.ring)
    }
}
