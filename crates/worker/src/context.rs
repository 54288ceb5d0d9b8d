//! What a worker thread keeps when its socket or its inspectors fail and are made anew: queues, counters, control.

use std::sync::{Arc, atomic::AtomicBool};
use std::time::SystemTime;

use mio::{Poll, Token, Waker};
use palisade_inspect::{learning::Learners, record::Record};
use palisade_xsk::{Mode, handoff};

use crate::{counters::Counters, queue, watch};

/// The mio token of a worker's [`Waker`].
pub const WAKER: Token = Token(1);

/// What the control plane sets for a worker.
#[derive(Debug)]
pub struct WorkerControl<R> {
    /// The application rules in force.
    pub rules: Arc<R>,
    /// Interfaces with an XDP program at ingress, by index.
    pub xdp: Arc<[u32]>,
    /// Deleted endpoints whose state the worker has to drop, once.
    pub gone: Vec<u16>,
}

/// A record with the time at which it was made.
pub type Stamped = (SystemTime, Record);

/// The state of a worker thread that outlives its restarts.
pub struct WorkerContext<R> {
    pub number: usize,
    pub workers: usize,
    /// Proves that a frame on the carrier was put there by the programs.
    pub cookie: u64,
    pub mode: Mode,
    /// Returns the coarse monotonic time, ns.
    pub clock: fn() -> u64,
    /// Publishes the worker's number and the time of its heartbeat in ns, or 0 when it does not run.
    pub heartbeat: Arc<dyn Fn(usize, u64) + Send + Sync>,
    pub counters: Arc<Counters>,
    pub stop: Arc<AtomicBool>,
    pub control: watch::Receiver<WorkerControl<R>>,
    /// Hand-off rings to the other workers, by number; `None` at the worker's own number.
    pub handoff_senders: Vec<Option<handoff::Sender<()>>>,
    /// Hand-off rings from the other workers, by number; `None` at the worker's own number.
    pub handoff_receivers: Vec<Option<handoff::Receiver<()>>>,
    /// Wakers of all workers, by number.
    pub wakers: Vec<Arc<Waker>>,
    pub poll: Poll,
    pub learners: Learners,
    /// Most commits of learned addresses that this worker may have open.
    pub learns: usize,
    pub records: queue::Sender<Stamped>,
}
