//! The state of a worker thread that survives restarts of the worker: its connections to other threads, and its
//! counters. The supervisor owns this state and lends it to each run of the worker.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

use mio::{Poll, Token, Waker};
use palisade_inspect::{commit::CommitQueue, handover::HandedOver, record::Record};
use palisade_xsk::{Mode, handoff};

use crate::{counters::Counters, queue, watch};

/// The mio token of a worker's [`Waker`].
pub(crate) const WAKER: Token = Token(1);

/// The control plane's settings for a worker.
#[derive(Debug)]
pub(crate) struct WorkerControl<R> {
    /// The application rules in force.
    pub rules: Arc<R>,
    /// Indices of the interfaces with an XDP program at ingress.
    pub xdp: Arc<[u32]>,
    /// Endpoints that were deleted since the worker last read the settings. The worker drops their state and empties
    /// the list.
    pub gone: Vec<u16>,
}

/// A record with the time at which it was made.
pub type TimedRecord = (SystemTime, Record);

/// Where workers that end put what they hand over.
#[derive(Debug, Default)]
pub(crate) struct HandOver {
    is_wanted: AtomicBool,
    /// Number of a worker, and what it hands over.
    states: Mutex<Vec<(usize, HandedOver)>>,
}

impl HandOver {
    /// Makes the workers hand over their connections when they end.
    pub(crate) fn request(&self) {
        self.is_wanted.store(true, Ordering::Release);
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.is_wanted.load(Ordering::Acquire)
    }

    pub(crate) fn put(&self, number: usize, state: HandedOver) {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        states.push((number, state));
    }

    /// Removes and returns what the workers have put here.
    pub(crate) fn take(&self) -> Vec<(usize, HandedOver)> {
        std::mem::take(&mut *self.states.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The state of a worker thread that survives restarts of the worker.
pub(crate) struct WorkerContext<R> {
    /// Number of the worker and of its queue of the punt link, from 0.
    pub number: usize,
    /// Number of workers.
    pub workers: usize,
    /// Secret number in each punt header. Frames with another number were not punted by the programs.
    pub cookie: u64,
    /// How the worker waits for packets.
    pub mode: Mode,
    /// Function that returns the coarse monotonic time, ns.
    pub clock: fn() -> u64,
    /// Callback that publishes the number of a worker and the time of its heartbeat, ns. A time of 0 means that the
    /// worker does not run.
    pub heartbeat: Arc<dyn Fn(usize, u64) + Send + Sync>,
    pub counters: Arc<Counters>,
    /// Whether the worker must stop.
    pub stop: Arc<AtomicBool>,
    /// Where the worker puts what it hands over when it stops.
    pub hand_over: Arc<HandOver>,
    pub control: watch::Receiver<WorkerControl<R>>,
    /// Hand-off rings to the other workers, by number; `None` at the worker's own number.
    pub handoff_senders: Vec<Option<handoff::Sender<()>>>,
    /// Hand-off rings from the other workers, by number; `None` at the worker's own number.
    pub handoff_receivers: Vec<Option<handoff::Receiver<()>>>,
    /// Wakers of all workers, by number.
    pub wakers: Vec<Arc<Waker>>,
    /// The epoll instance with the worker's waker.
    pub poll: Poll,
    /// The queue of learned addresses to commit.
    pub commit_queue: CommitQueue,
    /// Maximum number of commits of learned addresses that this worker can have open at a time.
    pub max_commits: usize,
    pub records: queue::Sender<TimedRecord>,
}
