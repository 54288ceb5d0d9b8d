//! The flows that were seen last. One writer, any number of readers, each at its own pace.
//!
//! Every flow has a number. The flow with number *n* lives in slot *n mod capacity* until flow *n + capacity*
//! takes its place; a reader who comes later learns how many flows it has missed. A slot is locked only to copy or
//! to replace one pointer, never while a flow is filtered, formatted or sent: the writer does not wait for a
//! reader's work, however slow that is.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::{Filters, Flow, Timestamp};

struct Slot {
    number: u64,
    flow: Option<Arc<Flow>>,
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
                flow: None,
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
        let flow = Arc::new(flow);
        let turn = lock(&self.writing);
        let number = self.next.load(Ordering::SeqCst);
        let before = std::mem::replace(
            &mut *lock(self.slot(number)),
            Slot {
                number,
                flow: Some(flow),
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
            match self.get(cursor.at) {
                Some(flow) if flow.time >= time => break,
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

    fn get(&self, number: u64) -> Option<Arc<Flow>> {
        let slot = lock(self.slot(number));
        if slot.number == number {
            slot.flow.clone()
        } else {
            None
        }
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
