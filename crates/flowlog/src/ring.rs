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
    collections::HashSet,
    hash::{BuildHasher as _, RandomState},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use palisade_inspect::record::Record;
use serde::{Deserialize, Serialize};
use strum::AsRefStr;

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

/// Where flows were lost: `LostEventSource` of the flow API.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, AsRefStr)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum LostSource {
    /// Between the programs and the daemon: the BPF ring buffer was full.
    PerfEventRingBuffer = 1,
    /// Between workers or proxy threads and the flow ring: their queue was full.
    ObserverEventsQueue = 2,
    /// Between the flow ring and a reader: the reader was too slow.
    HubbleRingBuffer = 3,
}

/// Report that flows were lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Lost {
    /// Where the flows were lost.
    pub source: LostSource,
    /// Number of flows.
    pub count: u64,
}

impl Lost {
    /// Returns the report for a reader that is too slow.
    const fn by_reader(count: u64) -> Self {
        Self {
            source: LostSource::HubbleRingBuffer,
            count,
        }
    }
}

/// A flow, or a report that flows were lost before they reached the ring.
#[derive(Clone, PartialEq, Debug)]
pub enum Item {
    /// A flow.
    Flow(Arc<Flow>),
    /// The report, and its time.
    Lost(Lost, Timestamp),
}

#[derive(Clone)]
enum Entry {
    Flow(Arc<Flow>),
    Record(Arc<Deferred>),
    Lost(Lost, Timestamp),
}

impl Entry {
    fn time(&self) -> Timestamp {
        match self {
            Self::Flow(flow) => flow.time,
            Self::Record(deferred) => deferred.time,
            Self::Lost(_, time) => *time,
        }
    }

    fn item(&self) -> Item {
        match self {
            Self::Flow(flow) => Item::Flow(Arc::clone(flow)),
            Self::Record(deferred) => Item::Flow(Arc::clone(deferred.flow())),
            Self::Lost(lost, time) => Item::Lost(*lost, *time),
        }
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
    /// Flows that were overwritten before this reader read them, or that did not reach the ring.
    Lost(Lost),
}

/// A flow of the ring as [`Cursor::read_raw`] passes it to a reader.
#[derive(Clone, Copy, Debug)]
pub enum Raw<'a> {
    /// A flow.
    Flow(&'a Flow),
    /// A record whose flow was not needed so far, and its time.
    Record(&'a Record, Timestamp),
    /// Flows that were overwritten before this reader read them, or that did not reach the ring.
    Lost(Lost),
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

    /// Adds a report that flows were lost before they reached the ring. It takes the place of a flow, and all readers get
    /// it. Returns its number.
    pub fn push_lost(&self, lost: Lost, time: Timestamp) -> u64 {
        self.put(|_| Entry::Lost(lost, time))
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
            let Item::Flow(flow) = entry.item() else {
                continue;
            };
            let mut slot = lock(slot);
            if slot.number == number {
                slot.entry = Some(Entry::Flow(flow));
            }
        }
    }

    /// Returns the numbers of the rules that the flows in the ring name.
    #[must_use]
    pub fn rules(&self) -> HashSet<u32> {
        let rule = |slot: &Mutex<Slot>| match &lock(slot).entry {
            Some(Entry::Flow(flow)) => flow.palisade.rule.as_ref().map(|rule| rule.id),
            Some(Entry::Record(deferred)) => Some(deferred.record.rule),
            Some(Entry::Lost(..)) | None => None,
        };
        self.slots.iter().filter_map(rule).collect()
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
        match self.item(number)? {
            Item::Flow(flow) => Some(flow),
            Item::Lost(..) => None,
        }
    }

    /// Returns the flow or report with a number, if it is still in the ring.
    #[must_use]
    pub fn item(&self, number: u64) -> Option<Item> {
        self.entry(number).map(|entry| entry.item())
    }
}

impl Cursor {
    /// Returns the next flow, or the number of flows that this reader has lost; `None` if there is no newer flow.
    pub fn read(&mut self) -> Option<Next> {
        self.next().map(|next| match next {
            Ok(entry) => match entry.item() {
                Item::Flow(flow) => Next::Flow(flow),
                Item::Lost(lost, _) => Next::Lost(lost),
            },
            Err(lost) => Next::Lost(Lost::by_reader(lost)),
        })
    }

    /// Passes the next flow to `read` as the ring has it. Unlike [`Self::read`], makes no flow from a record. Returns
    /// `None` if there is no newer flow.
    pub fn read_raw<T>(&mut self, read: impl FnOnce(Raw<'_>) -> T) -> Option<T> {
        self.next().map(|next| match &next {
            Ok(Entry::Flow(flow)) => read(Raw::Flow(flow)),
            Ok(Entry::Record(deferred)) => read(Raw::Record(&deferred.record, deferred.time)),
            Ok(Entry::Lost(lost, _)) => read(Raw::Lost(*lost)),
            Err(lost) => read(Raw::Lost(Lost::by_reader(*lost))),
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

    /// Lets flows gather for `time`, or until a quarter of the ring is after the cursor. Unlike in [`Self::wait`], writers
    /// do not wake the reader, which would cost them a system call for each flow. Returns whether there is a flow after
    /// the cursor.
    pub fn gather(&self, time: Duration) -> bool {
        const STEPS: u32 = 4;
        // No truncation: the capacity is a usize.
        let many = (self.ring.capacity() as u64).div_ceil(4);
        for _ in 0..STEPS {
            if self.behind() >= many {
                break;
            }
            thread::sleep(time / STEPS);
        }
        self.behind() > 0
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
