//! All workers of a node. [`Pool`] starts their threads, connects them, and is the interface of the control plane to
//! the workers. Start at [`Pool::start`].

use std::{
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use mio::{Poll, Waker};
use palisade_inspect::{
    commit::{self, CommitReceiver},
    handover::HandedOver,
};
use palisade_xsk::{Mode, handoff};

use crate::{
    context::{HandOver, TimedRecord, WAKER, WorkerContext, WorkerControl},
    counters::{Counters, State},
    inspect::Inspect,
    port::Port,
    queue,
    supervisor::{Factories, supervise},
    watch,
};

/// Slots of each hand-off ring.
const HANDOFF_DEPTH: usize = 128;

/// The configuration of a pool.
pub struct Setup<P, E: Inspect> {
    /// Number of workers: one for each queue of the punt link.
    pub workers: usize,
    /// How workers wait for packets.
    pub mode: Mode,
    /// Secret number in each punt header. Frames with another number were not punted by the programs.
    pub cookie: u64,
    /// Function that returns the coarse monotonic time, ns.
    pub clock: fn() -> u64,
    /// Maximum length of a packet that one worker hands off to another, bytes.
    pub max_handoff: usize,
    /// Callback that makes a socket for a worker and returns the socket and its number of frames. The worker's thread
    /// calls this callback at each start of the worker.
    pub port: Arc<dyn Fn(usize) -> io::Result<(P, usize)> + Send + Sync>,
    /// Callback that makes the inspectors of a worker. The worker's thread calls this callback at each start of the
    /// worker.
    pub engine: Arc<dyn Fn(usize) -> E + Send + Sync>,
    /// Callback that publishes the number of a worker and the time of its heartbeat, ns. A time of 0 means that the
    /// worker does not run.
    pub heartbeat: Arc<dyn Fn(usize, u64) + Send + Sync>,
    /// The application rules at the start.
    pub rules: Arc<E::Rules>,
    /// Maximum number of commits of learned addresses that one worker can have open at a time.
    pub max_commits: usize,
    /// Capacity of the queue of records.
    pub records: usize,
}

/// The workers. Dropping the pool stops them.
pub struct Pool<R> {
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    hand_over: Arc<HandOver>,
    wakers: Vec<Arc<Waker>>,
    control: Vec<watch::Sender<WorkerControl<R>>>,
    counters: Vec<Arc<Counters>>,
}

impl<R> fmt::Debug for Pool<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool of {}", self.counters.len())
    }
}

impl<R: Send + Sync + 'static> Pool<R> {
    /// Starts all workers. Returns the pool, the queue of the addresses to commit, and the queue of the records.
    ///
    /// The workers run once their sockets are made; see [`Pool::wait_until_running`].
    ///
    /// # Errors
    /// A thread, an epoll instance or its waker could not be made.
    pub fn start<P, E>(setup: Setup<P, E>) -> io::Result<(Self, CommitReceiver, queue::Receiver<TimedRecord>)>
    where
        P: Port + 'static,
        E: Inspect<Rules = R> + 'static,
    {
        let workers = setup.workers.max(1);
        let (commit_queue, commits) = commit::commit_queue(setup.max_commits * workers);
        let (record_sender, records) = queue::queue(setup.records);
        let mut polls = Vec::new();
        let mut wakers = Vec::new();
        for _ in 0..workers {
            let poll = Poll::new()?;
            wakers.push(Arc::new(Waker::new(poll.registry(), WAKER)?));
            polls.push(poll);
        }
        // Row `from` of `senders` has the senders of worker `from`, row `to` of `receivers` the receivers of worker
        // `to`.
        let mut senders: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
        let mut receivers: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
        for (from, senders) in senders.iter_mut().enumerate() {
            for (to, receivers) in receivers.iter_mut().enumerate() {
                let (sender, receiver) = (to != from)
                    .then(|| handoff::ring(HANDOFF_DEPTH, setup.max_handoff))
                    .unzip();
                senders.push(sender);
                receivers.push(receiver);
            }
        }
        let mut pool = Self {
            threads: Vec::new(),
            stop: Arc::default(),
            hand_over: Arc::default(),
            wakers,
            control: Vec::new(),
            counters: (0..workers).map(|_| Arc::default()).collect(),
        };
        let factories = Arc::new(Factories {
            port: setup.port,
            engine: setup.engine,
        });
        let counters = pool.counters.clone();
        let parts = polls.into_iter().zip(senders).zip(receivers).zip(counters);
        for (number, (((poll, senders), receivers), counters)) in parts.enumerate() {
            let (sender, control) = watch::watch(WorkerControl {
                rules: Arc::clone(&setup.rules),
                xdp: [].into(),
                gone: Vec::new(),
            });
            pool.control.push(sender);
            let context = WorkerContext {
                number,
                workers,
                cookie: setup.cookie,
                mode: setup.mode,
                clock: setup.clock,
                heartbeat: Arc::clone(&setup.heartbeat),
                counters,
                stop: Arc::clone(&pool.stop),
                hand_over: Arc::clone(&pool.hand_over),
                control,
                handoff_senders: senders,
                handoff_receivers: receivers,
                wakers: pool.wakers.clone(),
                poll,
                commit_queue: commit_queue.clone(),
                max_commits: setup.max_commits,
                records: record_sender.clone(),
            };
            let factories = Arc::clone(&factories);
            let thread = thread::Builder::new()
                .name(format!("worker{number}"))
                .spawn(move || supervise(context, &factories))?;
            pool.threads.push(thread);
        }
        Ok((pool, commits, records))
    }

    /// Waits until every worker runs or has failed once, at most for `timeout`. Returns whether all workers run.
    pub fn wait_until_running(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        loop {
            let mut states = self.counters.iter().map(|counters| counters.state());
            if states.clone().all(|state| state == State::Running) {
                return true;
            }
            if states.all(|state| state != State::Starting) || Instant::now() > until {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Replaces the application rules.
    pub fn set_rules(&self, rules: &Arc<R>) {
        self.modify(|control| control.rules = Arc::clone(rules));
    }

    /// Sets the indices of the interfaces with an XDP program at ingress.
    pub fn set_xdp(&self, interfaces: &[u32]) {
        let interfaces: Arc<[u32]> = interfaces.into();
        self.modify(|control| control.xdp = Arc::clone(&interfaces));
    }

    /// Makes the workers drop the state and the held packets of deleted endpoints.
    pub fn forget_endpoints(&self, endpoints: &[u16]) {
        self.modify(|control| control.gone.extend_from_slice(endpoints));
    }

    /// Changes the settings of each worker and wakes it.
    fn modify(&self, modify: impl Fn(&mut WorkerControl<R>)) {
        for control in &self.control {
            control.modify(&modify);
        }
        self.wake();
    }

    /// Returns the counters of the workers, by number.
    #[must_use]
    pub fn counters(&self) -> &[Arc<Counters>] {
        &self.counters
    }
}

impl<R> Pool<R> {
    fn wake(&self) {
        for waker in &self.wakers {
            // If waking fails, the worker finds the change at its next heartbeat.
            let _ = waker.wake();
        }
    }

    /// Stops all workers as [`Pool::stop`], and returns what they hand over, with their numbers. A worker that does not
    /// run hands over nothing. From the call on, the programs punt to no worker.
    pub fn stop_for_restart(&mut self) -> Vec<(usize, HandedOver)> {
        self.hand_over.request();
        self.stop();
        self.hand_over.take()
    }

    /// Stops all workers and waits for their threads.
    pub fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.wake();
        for thread in self.threads.drain(..) {
            // `supervise` catches panics of the worker, so `join` does not fail.
            let _ = thread.join();
        }
    }
}

impl<R> Drop for Pool<R> {
    fn drop(&mut self) {
        self.stop();
    }
}
