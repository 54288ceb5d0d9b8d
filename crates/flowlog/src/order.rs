//! Sorting of flows by time. Events of the programs and records of the workers reach the ring by different threads, so
//! a flow can arrive some milliseconds after a flow that it caused.

use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{Flow, Timestamp};

/// Delayed flow.
struct Waiting {
    /// Time of the flow, so that a comparison reads no memory of the flow.
    time: Timestamp,
    flow: Arc<Flow>,
    /// Order of arrival, which decides between flows of the same time.
    number: u64,
    came: Instant,
}

impl Waiting {
    fn key(&self) -> (Timestamp, u64) {
        (self.time, self.number)
    }
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Waiting {}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

/// Queue that delays each flow by the same duration and returns the oldest flow first.
pub struct Ordered {
    waiting: BinaryHeap<Reverse<Waiting>>,
    window: Duration,
    most: usize,
    number: u64,
}

impl Ordered {
    /// Returns a queue that delays flows for `window`. While the queue has more than `most` flows, the oldest flow is
    /// due at once.
    #[must_use]
    pub const fn new(window: Duration, most: usize) -> Self {
        Self {
            waiting: BinaryHeap::new(),
            window,
            most,
            number: 0,
        }
    }

    /// Adds a flow that arrives at `now`.
    pub fn push(&mut self, flow: Arc<Flow>, now: Instant) {
        self.number += 1;
        self.waiting.push(Reverse(Waiting {
            time: flow.time,
            flow,
            number: self.number,
            came: now,
        }));
    }

    /// Returns the oldest flow if it is due. The delay is measured from the arrival on the monotonic clock, so setting
    /// the wall clock back does not lengthen it.
    pub fn due(&mut self, now: Instant) -> Option<Arc<Flow>> {
        let Reverse(oldest) = self.waiting.peek()?;
        let is_due = self.waiting.len() > self.most || now.duration_since(oldest.came) >= self.window;
        is_due
            .then(|| self.waiting.pop())?
            .map(|Reverse(waiting)| waiting.flow)
    }

    /// Returns whether the queue is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}
