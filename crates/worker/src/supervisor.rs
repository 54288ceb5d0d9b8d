//! The thread of a worker. It makes the worker's socket and engine, runs the worker, and restarts the worker after a
//! failure, with a back-off.
//!
//! Start at [`supervise`].

use std::{
    any::Any,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use mio::Events;
use palisade_abi::Reason;
use palisade_xsk::schedule::set_sched_slice;
use tracing::{debug, error, info};

use crate::{
    context::WorkerContext, counters::State, failure::Failure, inspect::Inspect, port::Port, run::Worker,
};

/// EEVDF slice to request. Workers run in short, latency-critical bursts.
const SCHED_SLICE: Duration = Duration::from_micros(100);
/// Delay before the first restart. The delay doubles with each further restart, up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_millis(10);
/// Longest delay before a restart.
const MAX_BACKOFF: Duration = Duration::from_secs(1);
/// Run time after which the delay of the next restart is [`MIN_BACKOFF`] again.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);

/// Callbacks that make the socket and the engine of a worker at each start.
pub(crate) struct Factories<P, E> {
    /// Callback that returns the socket of a worker and its number of frames.
    pub port: Arc<dyn Fn(usize) -> io::Result<(P, usize)> + Send + Sync>,
    /// Callback that returns the engine of a worker.
    pub engine: Arc<dyn Fn(usize) -> E + Send + Sync>,
}

/// Runs a worker until `stop` is set, and restarts the worker when it fails.
pub(crate) fn supervise<P: Port, E: Inspect>(
    mut context: WorkerContext<E::Rules>,
    factories: &Factories<P, E>,
) {
    if let Err(error) = set_sched_slice(SCHED_SLICE) {
        debug!(worker = context.number, %error, "the scheduler's slice stays at its default");
    }
    let mut delay = MIN_BACKOFF;
    while !context.stop.load(Ordering::Relaxed) {
        let started = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| run_once(&mut context, factories)));
        // Withdraw the heartbeat, so that the programs do not punt to a socket that no thread reads.
        (context.heartbeat)(context.number, 0);
        let failure = match outcome {
            Ok(Ok(())) => break,
            Ok(Err(error)) => Failure::Socket(error),
            Err(panic) => Failure::Panic(panic_message(&*panic).to_owned()),
        };
        if started.elapsed() > HEALTHY_AFTER {
            delay = MIN_BACKOFF;
        }
        // If a worker fails repeatedly without running in between, log a failure only if its text differs from that of
        // the previous failure.
        let last = context.counters.failure();
        if last.is_none_or(|last| last.to_string() != failure.to_string()) {
            error!(
                worker = context.number,
                error = %failure,
                "worker failed, its flows are reset; restarting"
            );
        }
        context.counters.reset_gauges();
        context.counters.set_state(State::Down, Some(failure));
        context.counters.restarts.add(1);
        back_off(&mut context, delay);
        delay = (delay * 2).min(MAX_BACKOFF);
    }
    (context.heartbeat)(context.number, 0);
    context.counters.set_state(State::Ended, None);
}

/// Makes the socket and the engine, and runs the worker until `stop` is set or the socket fails.
fn run_once<P: Port, E: Inspect>(
    context: &mut WorkerContext<E::Rules>,
    factories: &Factories<P, E>,
) -> io::Result<()> {
    let (port, frames) = (factories.port)(context.number)?;
    // Drop the packets that were handed off to the previous run: the engine with the state of their flows is gone.
    for receiver in context.handoff_receivers.iter_mut().flatten() {
        while receiver
            .receive(|(), _| context.counters.count_drop(Reason::NoWorker))
            .is_some()
        {}
    }
    let engine = (factories.engine)(context.number);
    if context.counters.restarts.get() != 0 {
        info!(worker = context.number, "worker runs again");
    }
    let counters = Arc::clone(&context.counters);
    let mut worker = Worker::new(context, port, engine, frames);
    // The first turn publishes the heartbeat, so that the programs punt to this worker before its state is `Running`.
    worker.turn()?;
    counters.set_state(State::Running, None);
    worker.run()
}

/// Waits at most for `delay`; returns early if `stop` is set.
fn back_off<R>(context: &mut WorkerContext<R>, delay: Duration) {
    let until = Instant::now() + delay;
    let mut events = Events::with_capacity(8);
    while !context.stop.load(Ordering::Relaxed) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || context.poll.poll(&mut events, Some(left)).is_err() {
            return;
        }
    }
}

/// Returns the message of a panic.
fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
