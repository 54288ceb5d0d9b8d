//! All workers of a node.

use std::{
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use palisade_inspect::learning::{Lessons, lessons};

use palisade_xsk::handoff;

use crate::{
    Mode,
    context::{Stamped, WAKER, WorkerContext, WorkerControl},
    counters::{Counters, State},
    inspect::Inspect,
    port::Port,
    queue,
    supervisor::{Factories, supervise},
    watch,
};

/// Buffers between each two workers.
const HANDOFF_DEPTH: usize = 128;

/// What is needed to start workers.
pub struct Setup<P, E: Inspect> {
    /// How many: as many queues has the carrier.
    pub workers: usize,
    /// How they wait.
    pub mode: Mode,
    /// What proves that a packet is ours.
    pub cookie: u64,
    /// Coarse monotonic clock, ns.
    pub clock: fn() -> u64,
    /// Largest packet that is handed from one to another.
    pub largest: usize,
    /// Makes the socket of a worker, and says how many frames it has. On the worker's own thread, at each of its
    /// starts.
    pub port: Arc<dyn Fn(usize) -> io::Result<(P, usize)> + Send + Sync>,
    /// Makes the engine of a worker, at each of its starts.
    pub engine: Arc<dyn Fn(usize) -> E + Send + Sync>,
    /// Tells the programs that a worker lives: its number and the time, 0 if it does not.
    pub heartbeat: Arc<dyn Fn(usize, u64) + Send + Sync>,
    /// What packets are judged by at first.
    pub rules: Arc<E::Rules>,
    /// Answers that may wait to be learned, of one worker.
    pub learns: usize,
    /// Records that may wait to be read.
    pub records: usize,
}

/// The workers. Dropping it ends them.
pub struct Pool<R> {
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    wakers: Vec<Arc<mio::Waker>>,
    control: Vec<watch::Sender<WorkerControl<R>>>,
    counters: Vec<Arc<Counters>>,
}

impl<R> fmt::Debug for Pool<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool of {}", self.counters.len())
    }
}

impl<R: Send + Sync + 'static> Pool<R> {
    /// Starts all workers. They run once their sockets are there; see [`Pool::ready`]. What comes out beside packets:
    /// what is to be learned, and what was seen.
    ///
    /// # Errors
    /// A thread or a waker could not be made.
    pub fn start<P, E>(setup: Setup<P, E>) -> io::Result<(Self, Lessons, queue::Receiver<Stamped>)>
    where
        P: Port + 'static,
        E: Inspect<Rules = R> + 'static,
    {
        let workers = setup.workers.max(1);
        let (learners, lessons) = lessons(setup.learns * workers);
        let (records, seen) = queue::queue(setup.records);
        let mut polls = Vec::new();
        let mut wakers = Vec::new();
        for _ in 0..workers {
            let poll = mio::Poll::new()?;
            wakers.push(Arc::new(mio::Waker::new(poll.registry(), WAKER)?));
            polls.push(poll);
        }
        let (mut handoff_senders, mut handoff_receivers) = (rows(workers), rows(workers));
        for from in 0..workers {
            for to in (0..workers).filter(|to| *to != from) {
                let (sender, receiver) = handoff::ring(HANDOFF_DEPTH, setup.largest);
                handoff_senders[from][to] = Some(sender);
                handoff_receivers[to][from] = Some(receiver);
            }
        }
        let mut pool = Self {
            threads: Vec::new(),
            stop: Arc::default(),
            wakers,
            control: Vec::new(),
            counters: (0..workers).map(|_| Arc::default()).collect(),
        };
        let factories = Arc::new(Factories {
            port: setup.port,
            engine: setup.engine,
        });
        for (number, ((poll, handoff_senders), handoff_receivers)) in polls
            .into_iter()
            .zip(handoff_senders)
            .zip(handoff_receivers)
            .enumerate()
        {
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
                counters: Arc::clone(&pool.counters[number]),
                stop: Arc::clone(&pool.stop),
                control,
                handoff_senders,
                handoff_receivers,
                wakers: pool.wakers.clone(),
                poll,
                learners: learners.clone(),
                learns: setup.learns,
                records: records.clone(),
            };
            let factories = Arc::clone(&factories);
            let thread = thread::Builder::new()
                .name(format!("worker{number}"))
                .spawn(move || supervise(context, &factories))?;
            pool.threads.push(thread);
        }
        Ok((pool, lessons, seen))
    }

    /// Waits until every worker runs, or has failed once, but not longer than `patience`. Answers whether all run.
    pub fn ready(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
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

    /// Has packets judged by these rules from now on.
    pub fn set_rules(&self, rules: &Arc<R>) {
        self.control(|control| control.rules = Arc::clone(rules));
    }

    /// Says at which interfaces' ingress stands XDP.
    pub fn set_xdp(&self, interfaces: &[u32]) {
        let interfaces: Arc<[u32]> = interfaces.into();
        self.control(|control| control.xdp = Arc::clone(&interfaces));
    }

    /// Has everything dropped and forgotten that is held of endpoints that are no more.
    pub fn forget_endpoints(&self, endpoints: &[u16]) {
        self.control(|control| control.gone.extend_from_slice(endpoints));
    }

    fn control(&self, modify: impl Fn(&mut WorkerControl<R>)) {
        for control in &self.control {
            control.modify(&modify);
        }
        self.wake();
    }

    fn wake(&self) {
        for waker in &self.wakers {
            // A worker looks by itself at each heartbeat.
            let _ = waker.wake();
        }
    }

    /// What the workers count, by their numbers.
    #[must_use]
    pub fn counters(&self) -> &[Arc<Counters>] {
        &self.counters
    }

    /// Ends all workers and waits for that.
    pub fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.wake();
        for thread in self.threads.drain(..) {
            // It catches its own panics.
            let _ = thread.join();
        }
    }
}

impl<R> Drop for Pool<R> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for waker in &self.wakers {
            let _ = waker.wake();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn rows<T>(workers: usize) -> Vec<Vec<Option<T>>> {
    (0..workers)
        .map(|_| (0..workers).map(|_| None).collect())
        .collect()
}
