//! The loop of a worker. [`Worker::turn`] serves each source of work once; [`Worker::run`] repeats turns and waits in
//! between.
//!
//! The parts of a turn are in `rx.rs`, `inspection.rs` and `tx.rs`; the waiting strategy is in `idle.rs`.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mio::{Events, Interest, Poll, Token, unix::SourceFd};
use palisade_inspect::commit::Wake;
use palisade_xsk::Mode;

use crate::{
    context::{HandOver, WorkerContext},
    counters::Counters,
    effects::Effects,
    idle::{self, Idle, Pending},
    inspect::Inspect,
    inspection::Inspection,
    port::{Port, PortStatistics},
    rx::{Peers, Rx},
};

/// Interval of checks that the socket's interface is still up, ns.
const LINK_CHECK_INTERVAL: u64 = 50_000_000;
/// Interval at which the losses in the rings and the inspectors' metrics are read, ns.
const STATISTICS_INTERVAL: u64 = 1_000_000_000;

/// Longest time for which a worker that hands over its connections still inspects packets.
const LAST_TURNS: Duration = Duration::from_millis(100);
/// Number of last turns without a packet, 1 ms apart, after which nothing more is expected: packets that the programs had
/// punted before the heartbeat was withdrawn, packets of other workers, results of commits.
const QUIET_TURNS: u32 = 5;

/// The mio token of the socket.
const SOCKET: Token = Token(0);

/// A worker with its socket and its engine. A restart makes a new `Worker`; the state that survives a restart is
/// borrowed from the [`WorkerContext`].
pub(crate) struct Worker<'a, P: Port, E: Inspect> {
    number: usize,
    clock: fn() -> u64,
    heartbeat: &'a (dyn Fn(usize, u64) + Send + Sync),
    stop: &'a AtomicBool,
    hand_over: &'a HandOver,
    /// Whether the heartbeat is withdrawn, because the worker ends.
    is_ending: bool,
    poll: &'a mut Poll,
    events: Events,
    mode: Mode,
    /// Start of the clock of the waiting strategy.
    started: Instant,
    port: P,
    rx: Rx<'a, P::Frame>,
    inspection: Inspection<'a, P, E>,
    counters: Arc<Counters>,
    /// Time of this turn on the coarse monotonic clock, ns.
    now: u64,
    /// Time of the last link check, ns.
    checked: u64,
    /// Time at which the statistics of the socket were last read, ns, and their values at that time.
    statistics: (u64, PortStatistics),
    /// The metrics of the engine at the last statistics.
    counted: Vec<u64>,
    /// Whether the transmit ring has packets that the kernel did not take.
    unsent: bool,
}

impl<'a, P: Port, E: Inspect> Worker<'a, P, E> {
    /// Creates a worker. `frames`: number of frames of the socket.
    pub(crate) fn new(context: &'a mut WorkerContext<E::Rules>, port: P, engine: E, frames: usize) -> Self {
        let waker = context.wakers.get(context.number).map(Arc::clone);
        let wake: Wake = Arc::new(move || {
            // If waking fails, the worker finds the result at its next heartbeat.
            let _ = waker.as_ref().map(|waker| waker.wake());
        });
        let counters = Arc::clone(&context.counters);
        let effects = Effects::new(
            frames,
            context.commit_queue.committer(context.max_commits, wake),
            context.records.clone(),
            Arc::clone(&counters),
        );
        counters.frames.set(frames as u64);
        let mut counted = Vec::new();
        counters.update_metrics(&engine, &mut counted);
        let now = (context.clock)();
        let peers = Peers {
            number: context.number,
            workers: context.workers,
            senders: &mut context.handoff_senders,
            receivers: &mut context.handoff_receivers,
            wakers: &context.wakers,
        };
        Self {
            number: context.number,
            clock: context.clock,
            heartbeat: &*context.heartbeat,
            stop: &context.stop,
            hand_over: &context.hand_over,
            is_ending: false,
            poll: &mut context.poll,
            events: Events::with_capacity(8),
            mode: context.mode,
            started: Instant::now(),
            rx: Rx::new(context.cookie, peers, port.rx_capacity(), Arc::clone(&counters)),
            inspection: Inspection::new(
                &mut context.control,
                engine,
                frames,
                effects,
                context.cookie,
                Arc::clone(&counters),
            ),
            port,
            counters,
            now,
            checked: 0,
            statistics: (now, PortStatistics::default()),
            counted,
            unsent: false,
        }
    }

    /// Serves each source of work once. Returns whether there was a packet or the result of a commit.
    ///
    /// # Errors
    /// The socket failed.
    pub(crate) fn turn(&mut self) -> io::Result<bool> {
        self.now = (self.clock)();
        self.check_link()?;
        if !self.is_ending {
            (self.heartbeat)(self.number, self.now);
        }
        self.inspection.begin_turn(&mut self.port, self.now);
        let mut busy = self.rx.receive(&mut self.port, self.now)?;
        self.inspect_batch();
        busy |= self.inspect_handoffs();
        busy |= self.inspection.take_commits(&mut self.port);
        self.inspection.expire(&mut self.port);
        if !busy {
            self.inspection.settle(&mut self.port);
        }
        self.unsent = self.port.flush()? != 0;
        self.inspection.flush();
        self.rx.wake_peers();
        self.update_counters()?;
        Ok(busy)
    }

    /// Checks every [`LINK_CHECK_INTERVAL`] that the interface is up. The check must run before the heartbeat: a recent
    /// heartbeat makes the programs punt, and packets punted to a dead socket would be lost without a drop reason.
    fn check_link(&mut self) -> io::Result<()> {
        if self.now.saturating_sub(self.checked) >= LINK_CHECK_INTERVAL {
            self.port.check()?;
            self.checked = self.now;
        }
        Ok(())
    }

    /// Inspects the packets of the batch whose flow this worker owns, and hands off the others.
    fn inspect_batch(&mut self) {
        let Self {
            port, rx, inspection, ..
        } = self;
        rx.dispatch(port, |port, frame, punted| {
            inspection.packet(port, frame, punted);
        });
    }

    /// Inspects the packets that other workers have handed off. Returns whether there was a packet.
    fn inspect_handoffs(&mut self) -> bool {
        let Self {
            port, rx, inspection, ..
        } = self;
        rx.receive_handoffs(port, |port, frame, punted| {
            inspection.packet(port, frame, punted);
        })
    }

    fn update_counters(&mut self) -> io::Result<()> {
        self.counters.held.set(self.inspection.held() as u64);
        if self.now.saturating_sub(self.statistics.0) >= STATISTICS_INTERVAL {
            let statistics = self.port.statistics()?;
            let engine = self.inspection.engine();
            self.counters.add_ring_losses(&self.statistics.1, &statistics);
            self.counters.flows.set(engine.flows());
            self.counters.update_metrics(engine, &mut self.counted);
            self.statistics = (self.now, statistics);
        }
        Ok(())
    }

    /// Runs turns until `stop` is set.
    ///
    /// # Errors
    /// The socket failed.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        let fd = self.port.fd();
        if let Some(fd) = fd {
            self.poll
                .registry()
                .register(&mut SourceFd(&fd), SOCKET, Interest::READABLE)?;
        }
        let outcome = self.run_turns();
        if let Some(fd) = fd {
            // If deregistering fails, closing the descriptor removes it from the epoll set.
            let _ = self.poll.registry().deregister(&mut SourceFd(&fd));
        }
        outcome
    }

    fn run_turns(&mut self) -> io::Result<()> {
        let mut idle = Idle::new(self.mode);
        while !self.stop.load(Ordering::Relaxed) {
            if !self.turn()? {
                idle.wait(self)?;
            }
        }
        if self.hand_over.is_wanted() {
            self.end()?;
        }
        Ok(())
    }

    /// Withdraws the heartbeat, inspects what the programs have punted before, and hands over the connections.
    fn end(&mut self) -> io::Result<()> {
        self.is_ending = true;
        (self.heartbeat)(self.number, 0);
        let until = Instant::now() + LAST_TURNS;
        let mut quiet = 0;
        while quiet < QUIET_TURNS && Instant::now() < until {
            if self.turn()? {
                quiet = 0;
            } else {
                quiet += 1;
                thread::sleep(Duration::from_millis(1));
            }
        }
        let state = self.inspection.hand_over(&mut self.port);
        self.port.flush()?;
        self.hand_over.put(self.number, state);
        Ok(())
    }
}

impl<P: Port, E: Inspect> idle::Host for Worker<'_, P, E> {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn has_work(&mut self) -> bool {
        self.port.rx_available() != 0 || self.inspection.has_committed() || self.rx.has_handoffs()
    }

    fn pause(&mut self) {
        std::hint::spin_loop();
    }

    fn yield_now(&mut self) {
        thread::yield_now();
    }

    fn busy_poll(&mut self) -> io::Result<bool> {
        self.port.busy_poll()?;
        self.turn()
    }

    fn sleep(&mut self) -> io::Result<()> {
        let timeout = idle::sleep_timeout(&Pending {
            unsent: self.unsent,
            unflushed: self.inspection.has_unflushed(),
            deadline: self.inspection.time_to_deadline().map(Duration::from_millis),
        });
        self.counters.sleeps.add(1);
        match self.poll.poll(&mut self.events, Some(timeout)) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
