//! The flows that were seen last. One writer, any number of readers, each at its own pace.
//!
//! Every flow has a number. The flow with number *n* lives in slot *n mod capacity* until flow *n + capacity*
//! takes its place; a reader who comes later learns how many flows it has missed. A slot is locked only to copy or
//! to replace one pointer, never while a flow is filtered, formatted or sent: the writer does not wait for a
//! reader's work, however slow that is.
//!
//! Of what inspectors read there may be far more than anybody looks at. So the ring takes their records as they are,
//! and a flow, with all its texts, is made of one when somebody wants to see it ([`Ring::push_record`]).

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use palisade_inspect::record::Record;

use crate::{Filters, Flow, FlowResolver, Timestamp};

/// What knows the names that a record's numbers stand for.
pub type Resolver = Arc<dyn FlowResolver + Send + Sync>;

/// A record that nobody has looked at, or its flow if somebody has.
struct Unseen {
    record: Record,
    time: Timestamp,
    names: Resolver,
    flow: OnceLock<Arc<Flow>>,
}

impl Unseen {
    fn flow(&self) -> &Arc<Flow> {
        let make = || Arc::new(Flow::from_record(&self.record, &*self.names, self.time));
        self.flow.get_or_init(make)
    }
}

#[derive(Clone)]
enum Seen {
    Flow(Arc<Flow>),
    Record(Arc<Unseen>),
}

impl Seen {
    fn time(&self) -> Timestamp {
        match self {
            Self::Flow(flow) => flow.time,
            Self::Record(unseen) => unseen.time,
        }
    }

    fn flow(&self) -> Arc<Flow> {
        Arc::clone(match self {
            Self::Flow(flow) => flow,
            Self::Record(unseen) => unseen.flow(),
        })
    }
}

struct Slot {
    number: u64,
    seen: Option<Seen>,
}

/// A bounded ring of flows.
pub struct Ring {
    slots: Box<[Mutex<Slot>]>,
    /// Number of the next flow: all before it are written.
    next: AtomicU64,
    /// Writers take turns.
    writing: Mutex<()>,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    awake: Condvar,
}

/// What a cursor finds.
#[derive(Clone, PartialEq, Debug)]
pub enum Next {
    /// The next flow.
    Flow(Arc<Flow>),
    /// So many flows were overwritten before they could be read here.
    Lost(u64),
}

/// A place in the ring. Reads on from there.
pub struct Cursor {
    ring: Arc<Ring>,
    at: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that is done under these locks can panic half way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ring {
    /// An empty ring that holds `capacity` flows, at least one.
    #[must_use]
    pub fn new(capacity: usize) -> Arc<Self> {
        let slot = |_| {
            Mutex::new(Slot {
                number: 0,
                seen: None,
            })
        };
        Arc::new(Self {
            slots: (0..capacity.max(1)).map(slot).collect(),
            next: AtomicU64::new(0),
            writing: Mutex::new(()),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            awake: Condvar::new(),
        })
    }

    /// How many flows it can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// How many flows were ever written.
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.next.load(Ordering::SeqCst)
    }

    /// How many flows it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::try_from(self.seen()).map_or(self.capacity(), |seen| seen.min(self.capacity()))
    }

    /// Whether nothing was ever written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.seen() == 0
    }

    /// Adds a flow; the oldest one makes room for it. Returns its number.
    pub fn push(&self, flow: Flow) -> u64 {
        self.put(Seen::Flow(Arc::new(flow)))
    }

    /// Adds what an inspector read at `time`, of which a flow is made when it is looked at: by the names that `names`
    /// knows then, or, if they are about to change, at [`Ring::settle`].
    pub fn push_record(&self, record: &Record, names: &Resolver, time: Timestamp) -> u64 {
        self.put(Seen::Record(Arc::new(Unseen {
            record: *record,
            time,
            names: Arc::clone(names),
            flow: OnceLock::new(),
        })))
    }

    /// Makes a flow of each record before `until` that nobody has looked at, and lets go of what knows the names. For
    /// the time when there is nothing else to do, and before the names change.
    pub fn settle(&self, until: Timestamp) {
        for slot in &self.slots {
            let (number, seen) = {
                let slot = lock(slot);
                match &slot.seen {
                    Some(seen @ Seen::Record(_)) if seen.time() < until => (slot.number, seen.clone()),
                    _ => continue,
                }
            };
            let flow = seen.flow();
            let mut slot = lock(slot);
            if slot.number == number {
                slot.seen = Some(Seen::Flow(flow));
            }
        }
    }

    fn put(&self, seen: Seen) -> u64 {
        let turn = lock(&self.writing);
        let number = self.next.load(Ordering::SeqCst);
        let before = std::mem::replace(
            &mut *lock(self.slot(number)),
            Slot {
                number,
                seen: Some(seen),
            },
        );
        self.next.store(number + 1, Ordering::SeqCst);
        drop(turn);
        drop(before); // frees the old flow with no lock held
        // A reader counts itself in before it looks at `next` for the last time: either it sees the flow, or it is
        // seen here.
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.sleep));
            self.awake.notify_all();
        }
        number
    }

    /// From the oldest flow there is.
    #[must_use]
    pub fn oldest(self: &Arc<Self>) -> Cursor {
        self.cursor(self.first())
    }

    /// From the next flow to come.
    #[must_use]
    pub fn follow(self: &Arc<Self>) -> Cursor {
        self.cursor(self.seen())
    }

    /// From the first flow that is not older than `time`.
    #[must_use]
    pub fn since(self: &Arc<Self>, time: Timestamp) -> Cursor {
        let mut cursor = self.oldest();
        while cursor.at < self.seen() {
            match self.seen_as(cursor.at) {
                Some(seen) if seen.time() >= time => break,
                _ => cursor.at += 1,
            }
        }
        cursor
    }

    /// The last `count` flows that pass the filters, oldest first, and a cursor that goes on where they end.
    #[must_use]
    pub fn last(self: &Arc<Self>, count: usize, filters: &Filters) -> (Vec<Arc<Flow>>, Cursor) {
        let end = self.seen();
        let backwards = (self.first()..end).rev().filter_map(|number| self.get(number));
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

    fn first(&self) -> u64 {
        self.seen().saturating_sub(self.slots.len() as u64)
    }

    fn slot(&self, number: u64) -> &Mutex<Slot> {
        // The remainder is less than the length, which is a usize.
        &self.slots[(number % self.slots.len() as u64) as usize]
    }

    fn seen_as(&self, number: u64) -> Option<Seen> {
        let slot = lock(self.slot(number));
        if slot.number == number {
            slot.seen.clone()
        } else {
            None
        }
    }

    fn get(&self, number: u64) -> Option<Arc<Flow>> {
        self.seen_as(number).map(|seen| seen.flow())
    }
}

impl Cursor {
    /// What comes next; `None` if there is nothing yet.
    pub fn read(&mut self) -> Option<Next> {
        loop {
            let end = self.ring.seen();
            if self.at >= end {
                return None;
            }
            let first = self.ring.first();
            if self.at < first {
                let lost = first - self.at;
                self.at = first;
                return Some(Next::Lost(lost));
            }
            if let Some(flow) = self.ring.get(self.at) {
                self.at += 1;
                return Some(Next::Flow(flow));
            }
            // Overwritten since `first` was read.
        }
    }

    /// Waits until there is something, at most for `timeout`. Whether there is.
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
