//! What a worker counts. It alone writes; anybody may read.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicU8, AtomicU64, Ordering},
};

use palisade_abi::Reason;

use crate::port::PortStatistics;

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
    problem: Mutex<Option<String>>,
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
            problem: Mutex::default(),
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

    pub(crate) fn set_state(&self, state: State, problem: Option<String>) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
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

    /// Why it is down.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.problem
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}
