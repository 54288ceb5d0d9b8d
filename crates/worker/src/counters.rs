//! The counters of a worker. Only the worker writes the counters; any thread can read them. Start at [`Counters`].

use std::sync::{
    Arc, Mutex, OnceLock, PoisonError,
    atomic::{AtomicU8, AtomicU64, Ordering},
};

use palisade_abi::Reason;
use palisade_inspect::Metric;

use crate::{failure::Failure, inspect::Inspect, port::PortStatistics};

/// A counter with a single writer.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds `more` to the counter.
    pub(crate) fn add(&self, more: u64) {
        // There is only one writer, so a load and a store suffice; an atomic add would cost a locked instruction.
        self.0
            .store(self.0.load(Ordering::Relaxed) + more, Ordering::Relaxed);
    }

    /// Sets a gauge.
    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Returns the value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The state of a worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum State {
    /// The worker makes its socket and inspectors for the first time.
    #[default]
    Starting = 0,
    /// The worker inspects packets.
    Running = 1,
    /// The worker has failed and will be restarted. The programs do not punt to it meanwhile.
    Down = 2,
    /// The worker has stopped as requested.
    Ended = 3,
}

/// Counters of one worker.
#[derive(Debug)]
#[repr(align(128))]
pub struct Counters {
    state: AtomicU8,
    /// Packets received from the socket.
    pub packets_in: Count,
    /// Bytes of the received packets without their punt headers. Packets shed under overload are not included.
    pub bytes_in: Count,
    /// Punted packets that were forwarded.
    pub packets_out: Count,
    /// Bytes of the forwarded packets.
    pub bytes_out: Count,
    /// Generated packets that were put into the transmit ring.
    pub generated: Count,
    /// Generated packets that were discarded, for example because no frame was free.
    pub generated_lost: Count,
    /// Held packets that were dropped because generated packets deliver their bytes.
    pub absorbed: Count,
    /// Packets whose TCP options were rewritten.
    pub options_rewritten: Count,
    /// Packets handed off to the workers that own their flows.
    pub handoff_out: Count,
    /// Packets that this worker copied from hand-off rings to its own frames.
    pub handoff_in: Count,
    /// Frames that the inspectors hold now.
    pub held: Count,
    /// TCP connections that the inspectors track now.
    pub flows: Count,
    /// Records that could not be queued.
    pub records_lost: Count,
    /// Number of times that the worker slept in `epoll_wait`.
    pub sleeps: Count,
    /// Number of failures of the worker. After each failure the worker is restarted unless it must stop.
    pub restarts: Count,
    /// Frames of the socket.
    pub frames: Count,
    /// Dropped packets by the number of the drop reason.
    dropped: [Count; 256],
    /// Losses in the rings of all sockets of this worker, in the order of the fields of [`PortStatistics`].
    ring: [Count; 4],
    /// The metrics of all engines of this worker, in the order in which the first engine listed them.
    metrics: OnceLock<Box<[(Metric, Count)]>>,
    /// The failure that ended the worker's last run.
    failure: Mutex<Option<Arc<Failure>>>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            state: AtomicU8::default(),
            packets_in: Count::default(),
            bytes_in: Count::default(),
            packets_out: Count::default(),
            bytes_out: Count::default(),
            generated: Count::default(),
            absorbed: Count::default(),
            options_rewritten: Count::default(),
            generated_lost: Count::default(),
            handoff_out: Count::default(),
            handoff_in: Count::default(),
            held: Count::default(),
            flows: Count::default(),
            records_lost: Count::default(),
            sleeps: Count::default(),
            restarts: Count::default(),
            frames: Count::default(),
            dropped: std::array::from_fn(|_| Count::default()),
            ring: Default::default(),
            metrics: OnceLock::default(),
            failure: Mutex::default(),
        }
    }
}

impl Counters {
    /// Counts a dropped packet.
    pub(crate) fn count_drop(&self, reason: Reason) {
        self.count_drops(reason, 1);
    }

    fn count_drops(&self, reason: Reason, packets: u64) {
        if let Some(count) = self.dropped.get(reason as usize) {
            count.add(packets);
        }
    }

    /// Returns the number of dropped packets for each drop reason that has occurred, by the number of the reason.
    pub fn drops(&self) -> impl Iterator<Item = (u8, u64)> {
        (0..=u8::MAX)
            .zip(self.dropped.iter().map(Count::get))
            .filter(|(_, count)| *count != 0)
    }

    /// Adds the losses of a socket between two readings. The kernel drops these packets because the worker does not take
    /// packets out of the rings in time, so they are counted as drops of an overloaded worker too.
    pub(crate) fn add_ring_losses(&self, before: &PortStatistics, now: &PortStatistics) {
        let of = |statistics: &PortStatistics| {
            [
                statistics.rx_dropped,
                statistics.rx_ring_full,
                statistics.rx_fill_ring_empty,
                statistics.invalid,
            ]
        };
        for ((count, before), now) in self.ring.iter().zip(of(before)).zip(of(now)) {
            count.add(now.saturating_sub(before));
        }
        let lost = |statistics: &PortStatistics| statistics.rx_dropped + statistics.rx_ring_full;
        self.count_drops(Reason::WorkerOverload, lost(now).saturating_sub(lost(before)));
    }

    /// Returns the losses in the rings of all sockets of this worker.
    #[must_use]
    pub fn ring(&self) -> PortStatistics {
        let [rx_dropped, rx_ring_full, rx_fill_ring_empty, invalid] = &self.ring;
        PortStatistics {
            rx_dropped: rx_dropped.get(),
            rx_ring_full: rx_ring_full.get(),
            rx_fill_ring_empty: rx_fill_ring_empty.get(),
            invalid: invalid.get(),
        }
    }

    /// Updates the metrics from those of an engine. `before`: the engine's values at the last call; empty at the first
    /// call for an engine.
    pub(crate) fn update_metrics(&self, engine: &impl Inspect, before: &mut Vec<u64>) {
        let metrics = self.metrics.get_or_init(|| {
            let mut list = Vec::new();
            engine.metrics(&mut |number, _| list.push((number, Count::default())));
            list.into()
        });
        before.resize(metrics.len(), 0);
        let mut slots = metrics.iter().zip(before);
        engine.metrics(&mut |number, value| {
            let Some(((_, count), before)) = slots.next() else {
                return;
            };
            if number.now {
                count.set(value);
            } else {
                // A new engine counts from zero, but the counter continues across engines.
                count.add(value.saturating_sub(*before));
                *before = value;
            }
        });
    }

    /// Sets all gauges to zero, because the engine and the frames that it held no longer exist.
    pub(crate) fn reset_gauges(&self) {
        self.held.set(0);
        self.flows.set(0);
        let metrics = self.metrics.get().into_iter().flatten();
        for (_, count) in metrics.filter(|(number, _)| number.now) {
            count.set(0);
        }
    }

    /// Returns the metrics of all engines of this worker. A running worker updates them once per second.
    pub fn metrics(&self) -> impl Iterator<Item = (Metric, u64)> {
        let metrics = self.metrics.get().into_iter().flatten();
        metrics.map(|(number, count)| (*number, count.get()))
    }

    /// Sets the state and the failure that led to it.
    pub(crate) fn set_state(&self, state: State, failure: Option<Failure>) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = failure.map(Arc::new);
        self.state.store(state as u8, Ordering::Release);
    }

    /// Returns the state.
    #[must_use]
    pub fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            0 => State::Starting,
            1 => State::Running,
            2 => State::Down,
            _ => State::Ended,
        }
    }

    /// Returns the failure because of which the worker is down; `None` in all other states.
    #[must_use]
    pub fn failure(&self) -> Option<Arc<Failure>> {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

#[cfg(test)]
mod tests {
    use palisade_inspect::{CommitResult, Engine, Limits, Millis, PacketView, Sink};

    use super::*;
    use crate::held::Handle;

    #[test]
    fn packets_lost_at_the_rings_are_drops_with_a_reason() {
        let counters = Counters::default();
        let before = PortStatistics {
            rx_dropped: 5,
            rx_ring_full: 2,
            rx_fill_ring_empty: 5,
            invalid: 0,
        };
        let now = PortStatistics {
            rx_dropped: 8,
            rx_ring_full: 12,
            rx_fill_ring_empty: 8,
            invalid: 1,
        };
        counters.add_ring_losses(&PortStatistics::default(), &before);
        counters.add_ring_losses(&before, &now);
        assert_eq!(counters.ring(), now);
        assert_eq!(
            counters.drops().collect::<Vec<_>>(),
            [(Reason::WorkerOverload as u8, 20)]
        );
    }

    #[test]
    fn counters_continue_and_gauges_restart_with_a_new_engine() {
        /// An engine with one counter and one gauge.
        struct Counting(u64, u64);

        impl Inspect for Counting {
            type Rules = ();

            fn set_rules(&mut self, _: Arc<()>) {}
            fn knows(&self, _: u32) -> bool {
                false
            }
            fn packet(&mut self, _: Millis, _: &PacketView<'_>, _: Handle, _: &mut impl Sink<Handle>) {}
            fn committed(&mut self, _: Millis, _: CommitResult, _: &mut impl Sink<Handle>) {}
            fn tick(&mut self, _: Millis, _: &mut impl Sink<Handle>) {}
            fn deadline(&self) -> Option<Millis> {
                None
            }
            fn forget_endpoint(&mut self, _: u16, _: &mut impl Sink<Handle>) {}
            fn metrics(&self, visit: &mut dyn FnMut(Metric, u64)) {
                let number = |name, now| Metric {
                    group: "test",
                    name,
                    now,
                };
                visit(number("counted", false), self.0);
                visit(number("held", true), self.1);
            }
        }

        let counters = Counters::default();
        let values = || counters.metrics().map(|(_, value)| value).collect::<Vec<_>>();
        assert!(values().is_empty());
        let mut before = Vec::new();
        counters.update_metrics(&Counting(0, 0), &mut before);
        counters.update_metrics(&Counting(5, 2), &mut before);
        counters.update_metrics(&Counting(7, 1), &mut before);
        assert_eq!(values(), [7, 1]);
        counters.reset_gauges();
        assert_eq!(values(), [7, 0]);
        let mut before = Vec::new();
        counters.update_metrics(&Counting(0, 0), &mut before);
        counters.update_metrics(&Counting(3, 4), &mut before);
        assert_eq!(values(), [10, 4]);
    }

    #[test]
    fn the_engine_has_metrics_of_each_inspector() {
        let counters = Counters::default();
        counters.update_metrics(&Engine::<Handle>::new(&Limits::default()), &mut Vec::new());
        for group in [
            "dns",
            "dns.tcp",
            "http",
            "http.tcp",
            "tls",
            "tls.tcp",
            "fragments",
        ] {
            assert!(
                counters.metrics().any(|(number, _)| number.group == group),
                "{group}"
            );
        }
    }
}
