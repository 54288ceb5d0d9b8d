//! What a worker counts. It alone writes; anybody may read.

use std::sync::{
    Arc, Mutex, OnceLock, PoisonError,
    atomic::{AtomicU8, AtomicU64, Ordering},
};

use palisade_abi::Reason;
use palisade_inspect::Number;

use crate::{failure::Failure, inspect::Inspect, port::PortStatistics};

/// A number that one thread writes.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// More of them.
    pub(crate) fn add(&self, more: u64) {
        // Nobody else writes: no exchange is needed.
        self.0
            .store(self.0.load(Ordering::Relaxed) + more, Ordering::Relaxed);
    }

    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The number.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a worker does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum State {
    /// It is being set up.
    #[default]
    Starting = 0,
    /// It carries packets.
    Running = 1,
    /// It failed, and tries again. What it should have carried is dropped meanwhile.
    Down = 2,
    /// It has been ended.
    Ended = 3,
}

/// Counters of one worker.
#[derive(Debug)]
#[repr(align(128))]
pub struct Counters {
    state: AtomicU8,
    /// Packets that came in.
    pub packets_in: Count,
    /// Bytes of them, from the Ethernet header on.
    pub bytes_in: Count,
    /// Packets that went on.
    pub packets_out: Count,
    /// Bytes of them.
    pub bytes_out: Count,
    /// Packets that the worker made: refusals, resets, answers.
    pub made: Count,
    /// Packets whose bytes went on in others that the worker made.
    pub absorbed: Count,
    /// Packets of which TCP options were taken out.
    pub mended: Count,
    /// Packets that could not be made for want of a frame.
    pub unmade: Count,
    /// Packets of other workers that came in by this one's queue.
    pub handed_on: Count,
    /// Packets that came by another worker's queue.
    pub handed_in: Count,
    /// Frames that it has: most of them wait for a verdict.
    pub held: Count,
    /// Flows that are known.
    pub flows: Count,
    /// Records that nobody took.
    pub records_lost: Count,
    /// Times that it slept.
    pub sleeps: Count,
    /// Times that it was started again.
    pub restarts: Count,
    /// Frames that the socket has.
    pub frames: Count,
    dropped: [Count; 256],
    ring: [Count; 4],
    /// What its engines have counted. Which numbers there are is known once the first of them is there.
    numbers: OnceLock<Box<[(Number, Count)]>>,
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
            made: Count::default(),
            absorbed: Count::default(),
            mended: Count::default(),
            unmade: Count::default(),
            handed_on: Count::default(),
            handed_in: Count::default(),
            held: Count::default(),
            flows: Count::default(),
            records_lost: Count::default(),
            sleeps: Count::default(),
            restarts: Count::default(),
            frames: Count::default(),
            dropped: std::array::from_fn(|_| Count::default()),
            ring: Default::default(),
            numbers: OnceLock::default(),
            failure: Mutex::default(),
        }
    }
}

impl Counters {
    pub(crate) fn dropped(&self, reason: Reason) {
        self.dropped[reason as usize].add(1);
    }

    /// Packets that ended here, by the number of the reason.
    pub fn drops(&self) -> impl Iterator<Item = (u8, u64)> {
        (0..=u8::MAX)
            .zip(self.dropped.iter().map(Count::get))
            .filter(|(_, count)| *count != 0)
    }

    pub(crate) fn set_ring(&self, before: &PortStatistics, now: &PortStatistics) {
        let of = |statistics: &PortStatistics| {
            [
                statistics.rx_dropped,
                statistics.rx_ring_full,
                statistics.rx_fill_ring_empty,
                statistics.invalid,
            ]
        };
        // The socket's own begin anew with each socket.
        for ((count, before), now) in self.ring.iter().zip(of(before)).zip(of(now)) {
            count.add(now.saturating_sub(before));
        }
    }

    /// What the rings of all its sockets have lost.
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

    /// Takes over what an engine has counted. `before` is what it had counted the last time; it begins empty with
    /// each engine.
    pub(crate) fn set_numbers(&self, engine: &impl Inspect, before: &mut Vec<u64>) {
        let numbers = self.numbers.get_or_init(|| {
            let mut list = Vec::new();
            engine.numbers(&mut |number, _| list.push((number, Count::default())));
            list.into()
        });
        before.resize(numbers.len(), 0);
        let mut places = numbers.iter().zip(before);
        engine.numbers(&mut |number, value| {
            let Some(((_, count), before)) = places.next() else {
                return;
            };
            if number.now {
                count.set(value);
            } else {
                // An engine's own begin anew with each engine.
                count.add(value.saturating_sub(*before));
                *before = value;
            }
        });
    }

    /// The engine is gone, with what it held.
    pub(crate) fn nothing_held(&self) {
        self.held.set(0);
        self.flows.set(0);
        let numbers = self.numbers.get().into_iter().flatten();
        for (_, count) in numbers.filter(|(number, _)| number.now) {
            count.set(0);
        }
    }

    /// What its engines have counted, some moments ago.
    pub fn numbers(&self) -> impl Iterator<Item = (Number, u64)> {
        let numbers = self.numbers.get().into_iter().flatten();
        numbers.map(|(number, count)| (*number, count.get()))
    }

    pub(crate) fn set_state(&self, state: State, failure: Option<Failure>) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = failure.map(Arc::new);
        self.state.store(state as u8, Ordering::Release);
    }

    /// What it does.
    #[must_use]
    pub fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            0 => State::Starting,
            1 => State::Running,
            2 => State::Down,
            _ => State::Ended,
        }
    }

    /// Returns why the worker is down.
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
    use palisade_inspect::{Engine, Learned, Limits, Millis, Sink, View};

    use super::*;
    use crate::held::Handle;

    #[test]
    fn numbers_outlive_engines() {
        /// Has counted some, and holds some.
        struct Counting(u64, u64);

        impl Inspect for Counting {
            type Rules = ();

            fn set_rules(&mut self, _: Arc<()>) {}
            fn knows(&self, _: u32) -> bool {
                false
            }
            fn packet(&mut self, _: Millis, _: &View<'_>, _: Handle, _: &mut impl Sink<Handle>) {}
            fn learned(&mut self, _: Millis, _: Learned, _: &mut impl Sink<Handle>) {}
            fn tick(&mut self, _: Millis, _: &mut impl Sink<Handle>) {}
            fn deadline(&self) -> Option<Millis> {
                None
            }
            fn forget_endpoint(&mut self, _: u16, _: &mut impl Sink<Handle>) {}
            fn numbers(&self, tell: &mut dyn FnMut(Number, u64)) {
                let number = |name, now| Number {
                    group: "test",
                    name,
                    now,
                };
                tell(number("counted", false), self.0);
                tell(number("held", true), self.1);
            }
        }

        let counters = Counters::default();
        let values = || counters.numbers().map(|(_, value)| value).collect::<Vec<_>>();
        assert!(values().is_empty());
        let mut before = Vec::new();
        counters.set_numbers(&Counting(0, 0), &mut before);
        counters.set_numbers(&Counting(5, 2), &mut before);
        counters.set_numbers(&Counting(7, 1), &mut before);
        assert_eq!(values(), [7, 1]);
        counters.nothing_held();
        assert_eq!(values(), [7, 0]);
        let mut before = Vec::new();
        counters.set_numbers(&Counting(0, 0), &mut before);
        counters.set_numbers(&Counting(3, 4), &mut before);
        assert_eq!(values(), [10, 4]);
    }

    #[test]
    fn an_engine_tells_its_numbers() {
        let counters = Counters::default();
        counters.set_numbers(&Engine::<Handle>::new(&Limits::default()), &mut Vec::new());
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
                counters.numbers().any(|(number, _)| number.group == group),
                "{group}"
            );
        }
    }
}
