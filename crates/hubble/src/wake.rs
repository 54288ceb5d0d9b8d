//! Wakes streams when the ring has new flows, and measures the rate of flows.
//!
//! The ring notifies threads, not tasks. One thread waits for the ring, and only while streams wait. It sleeps after
//! each notification, so that the writers of the ring notify it at most once per [`BATCH_INTERVAL`].

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use palisade_flowlog::Ring;
use tokio::sync::Notify;

use crate::readers::Readers;

/// Shortest time between two notifications of streams.
const BATCH_INTERVAL: Duration = Duration::from_millis(5);
/// Longest time between two notifications: a stream checks its deadline then.
const TICK: Duration = Duration::from_millis(500);
/// Interval between two samples of the number of flows.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// Number of samples: the rate is that of the last minute.
const SAMPLES: usize = 61;

/// Notifies streams.
#[derive(Debug)]
pub(crate) struct Wake {
    notify: Arc<Notify>,
    /// Streams that follow.
    followers: AtomicUsize,
    samples: Mutex<VecDeque<(Instant, u64)>>,
    thread: Mutex<Option<thread::Thread>>,
}

impl Wake {
    /// Starts the thread. It ends when the result is dropped.
    pub(crate) fn start(ring: &Arc<Ring>, readers: &Arc<Readers>) -> io::Result<Arc<Self>> {
        let wake = Arc::new(Self {
            notify: Arc::default(),
            followers: AtomicUsize::new(0),
            samples: Mutex::new(VecDeque::from([(Instant::now(), ring.seen())])),
            thread: Mutex::new(None),
        });
        let (weak, ring, readers) = (Arc::downgrade(&wake), Arc::clone(ring), Arc::clone(readers));
        let thread = thread::Builder::new()
            .name("hubble-wake".into())
            .spawn(move || run(&weak, &ring, &readers))?;
        *wake.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread.thread().clone());
        Ok(wake)
    }

    /// Returns a handle that makes the thread wait for the ring until it is dropped.
    pub(crate) fn follow(self: &Arc<Self>) -> Follower {
        self.followers.fetch_add(1, Ordering::SeqCst);
        if let Some(thread) = &*self.thread.lock().unwrap_or_else(PoisonError::into_inner) {
            thread.unpark();
        }
        Follower(Arc::clone(self))
    }

    /// Returns the notification of new flows.
    pub(crate) const fn notify(&self) -> &Arc<Notify> {
        &self.notify
    }

    /// Returns the flows per second in the last minute, or since the start.
    pub(crate) fn rate(&self, seen: u64) -> f64 {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((time, before)) = samples.front() else {
            return 0.0;
        };
        let seconds = time.elapsed().as_secs_f64();
        if seconds <= 0.0 {
            return 0.0;
        }
        // The precision of a double is enough for a rate.
        seen.saturating_sub(*before) as f64 / seconds
    }

    fn sample(&self, seen: u64) {
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let due = samples
            .back()
            .is_none_or(|(time, _)| time.elapsed() >= SAMPLE_INTERVAL);
        if due {
            if samples.len() >= SAMPLES {
                samples.pop_front();
            }
            samples.push_back((Instant::now(), seen));
        }
    }
}

/// While a value exists, the thread waits for the ring and notifies streams.
#[derive(Debug)]
pub(crate) struct Follower(Arc<Wake>);

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.followers.fetch_sub(1, Ordering::SeqCst);
    }
}

fn run(wake: &Weak<Wake>, ring: &Arc<Ring>, readers: &Readers) {
    while let Some(wake) = wake.upgrade() {
        wake.sample(ring.seen());
        readers.sweep(Instant::now());
        if wake.followers.load(Ordering::SeqCst) == 0 {
            drop(wake);
            thread::park_timeout(SAMPLE_INTERVAL);
            continue;
        }
        // Streams that wait have read all flows up to this point or are notified at once, since this cursor begins
        // before the notification.
        let cursor = ring.follow();
        wake.notify.notify_waiters();
        drop(wake);
        cursor.wait(TICK);
        thread::sleep(BATCH_INTERVAL);
    }
}
