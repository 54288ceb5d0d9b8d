//! Flows in the order of their times. Events of the programs and records of the workers come to the ring by different
//! threads, so that one may come some milliseconds after another that it was the cause of.

use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::Flow;

/// A flow that waits for older ones.
struct Waiting {
    flow: Arc<Flow>,
    /// Of flows of the same time, that which came first goes first.
    number: u64,
    came: Instant,
}

impl Waiting {
    fn key(&self) -> (crate::Timestamp, u64) {
        (self.flow.time, self.number)
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

/// Holds each flow back for a while, and gives them out oldest first.
pub struct Ordered {
    waiting: BinaryHeap<Reverse<Waiting>>,
    window: Duration,
    most: usize,
    number: u64,
}

impl Ordered {
    /// Holds a flow back for `window`, and at most `most` of them: then the oldest goes at once.
    #[must_use]
    pub const fn new(window: Duration, most: usize) -> Self {
        Self {
            waiting: BinaryHeap::new(),
            window,
            most,
            number: 0,
        }
    }

    /// Takes a flow that came at `now`.
    pub fn push(&mut self, flow: Arc<Flow>, now: Instant) {
        self.number += 1;
        self.waiting.push(Reverse(Waiting {
            flow,
            number: self.number,
            came: now,
        }));
    }

    /// The oldest flow, if it has been held back long enough. By when it came, so that a clock that was set holds back
    /// nothing.
    pub fn due(&mut self, now: Instant) -> Option<Arc<Flow>> {
        let Reverse(oldest) = self.waiting.peek()?;
        let is_due = self.waiting.len() > self.most || now.duration_since(oldest.came) >= self.window;
        is_due
            .then(|| self.waiting.pop())?
            .map(|Reverse(waiting)| waiting.flow)
    }

    /// Whether nothing is held back.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}
