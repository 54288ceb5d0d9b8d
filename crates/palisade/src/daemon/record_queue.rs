//! Queue from the proxy threads to the thread that moves their records into the flow ring.
//!
//! The items are in a `crossbeam-channel`. Its blocking `recv` is not used: with a receiver blocked there, each `send`
//! wakes the receiver by a system call, and a receiver that finds no item yields the CPU many times before it blocks.
//! Here, a receiver that has got records waits [`GATHER`] before it takes the next ones, and senders do not wake it in
//! that time unless the queue fills up. Start at [`queue`].

use std::{
    cell::Cell,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering, fence},
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

use crossbeam_channel::TryRecvError;
use palisade_worker::RecvError;

/// Time in which records gather after others were taken.
const GATHER: Duration = Duration::from_millis(5);
/// Longest sleep of a receiver. Dropping the last sender does not wake the receiver, so it has to check regularly.
const MAX_SLEEP: Duration = Duration::from_millis(250);

/// Returns the ends of a queue for `capacity` items.
pub(super) fn queue<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let (sender, receiver) = crossbeam_channel::bounded(capacity);
    let sleeper = Arc::<Sleeper>::default();
    let other = Arc::clone(&sleeper);
    (
        Sender {
            inner: sender,
            sleeper,
        },
        Receiver {
            inner: receiver,
            sleeper: other,
            took: Cell::new(false),
        },
    )
}

/// The receiving thread.
#[derive(Debug, Default)]
struct Sleeper {
    /// Set when the receiver waits for the first time.
    thread: OnceLock<Thread>,
    /// Whether the receiver sleeps until an item arrives.
    is_asleep: AtomicBool,
}

/// A sending end.
#[derive(Debug)]
pub(super) struct Sender<T> {
    inner: crossbeam_channel::Sender<T>,
    sleeper: Arc<Sleeper>,
}

impl<T> Sender<T> {
    /// Appends an item. Never blocks.
    ///
    /// # Errors
    /// The queue is full, or the receiver has been dropped. The error is the item.
    pub(super) fn push(&self, item: T) -> Result<(), T> {
        let pushed = self.inner.try_send(item).map_err(|error| error.into_inner());
        // Orders the item before the load. The receiver stores `is_asleep` before it looks for an item once more, so
        // that either the receiver finds the item or this thread finds the receiver asleep.
        fence(Ordering::SeqCst);
        let is_filling_up = self.inner.len() * 4 > self.inner.capacity().unwrap_or(usize::MAX);
        if (is_filling_up || self.sleeper.is_asleep.load(Ordering::Relaxed))
            && let Some(thread) = self.sleeper.thread.get()
        {
            // Without a system call if the receiver is awake, or was woken already.
            self.sleeper.is_asleep.store(false, Ordering::Relaxed);
            thread.unpark();
        }
        pushed
    }
}

/// The receiving end, for one thread.
#[derive(Debug)]
pub(super) struct Receiver<T> {
    inner: crossbeam_channel::Receiver<T>,
    sleeper: Arc<Sleeper>,
    /// Whether an item was taken since the receiver last waited.
    took: Cell<bool>,
}

impl<T> Receiver<T> {
    /// Returns the next item without waiting.
    ///
    /// # Errors
    /// [`RecvError`] if the queue is empty.
    pub(super) fn try_recv(&self) -> Result<T, RecvError> {
        match self.inner.try_recv() {
            Ok(item) => {
                self.took.set(true);
                Ok(item)
            }
            Err(TryRecvError::Empty) => Err(RecvError::Empty),
            Err(TryRecvError::Disconnected) => Err(RecvError::Disconnected),
        }
    }

    /// Waits for the next item, and before that for [`GATHER`] if an item was taken since the last wait. All calls must
    /// come from the same thread: senders wake the thread of the first call.
    ///
    /// # Errors
    /// [`RecvError`] if no item has arrived within `timeout`, or the queue is empty and all senders have been dropped.
    pub(super) fn recv_timeout(&self, timeout: Duration) -> Result<T, RecvError> {
        self.sleeper.thread.get_or_init(thread::current);
        let until = Instant::now() + timeout;
        if self.took.replace(false) && self.inner.len() < self.inner.capacity().unwrap_or(0) / 4 {
            thread::park_timeout(GATHER.min(timeout));
        }
        loop {
            match self.try_recv() {
                Err(RecvError::Empty) => {}
                outcome => return outcome,
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(RecvError::Empty);
            }
            self.sleeper.is_asleep.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if self.inner.is_empty() {
                thread::park_timeout(left.min(MAX_SLEEP));
            }
            self.sleeper.is_asleep.store(false, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn an_item_that_does_not_fit_is_returned() {
        let (sender, receiver) = queue(2);
        assert_eq!([1, 2, 3].map(|n| sender.push(n)), [Ok(()), Ok(()), Err(3)]);
        assert_eq!(receiver.try_recv(), Ok(1));
        assert_eq!(receiver.recv_timeout(LONG), Ok(2));
        assert_eq!(receiver.try_recv(), Err(RecvError::Empty));
        assert_eq!(
            receiver.recv_timeout(Duration::from_millis(1)),
            Err(RecvError::Empty)
        );
        drop(sender);
        assert_eq!(receiver.recv_timeout(LONG), Err(RecvError::Disconnected));
    }

    #[test]
    fn every_item_arrives_and_a_sleeping_receiver_is_woken() {
        const ITEMS: u32 = 20_000;
        let (sender, receiver) = queue(64);
        let reader = thread::spawn(move || {
            let mut received = Vec::new();
            while let Ok(n) = receiver.recv_timeout(LONG) {
                received.push(n);
            }
            received
        });
        thread::scope(|scope| {
            for first in [0, ITEMS] {
                let sender = &sender;
                scope.spawn(move || {
                    for n in first..first + ITEMS {
                        let mut item = n;
                        while let Err(back) = sender.push(item) {
                            item = back;
                            thread::yield_now();
                        }
                        if n % 1_000 == 0 {
                            // Long enough for the receiver to fall asleep.
                            thread::sleep(Duration::from_millis(12));
                        }
                    }
                });
            }
        });
        drop(sender);
        let mut received = reader.join().unwrap();
        received.sort_unstable();
        assert_eq!(received, (0..2 * ITEMS).collect::<Vec<_>>());
    }
}
