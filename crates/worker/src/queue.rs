//! A bounded queue from many threads to one thread that sleeps. Appending is lock-free and never wakes the receiver. A
//! separate call wakes the receiver, once for many items.
//!
//! The items are in a `crossbeam-channel`. Its blocking `recv` is not used: with a receiver blocked there, each `send`
//! takes a lock and makes a system call to wake the receiver. Here the receiver parks, and [`Sender::wake`] unparks it.

use std::{
    cell::Cell,
    sync::{Arc, OnceLock},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use crossbeam_channel::{TryRecvError, TrySendError, bounded};

/// Longest park of a receiver. Dropping the last sender does not unpark the receiver, so it has to check regularly.
const MAX_PARK: Duration = Duration::from_millis(250);

/// Returns the ends of a queue for `capacity` items.
#[must_use]
pub(crate) fn queue<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let (sender, receiver) = bounded(capacity);
    let thread = Arc::new(OnceLock::new());
    (
        Sender {
            inner: sender,
            receiver: Arc::clone(&thread),
            unflushed: Cell::new(false),
        },
        Receiver {
            inner: receiver,
            thread,
        },
    )
}

/// A sending end.
#[derive(Debug)]
pub(crate) struct Sender<T> {
    inner: crossbeam_channel::Sender<T>,
    /// The receiving thread; set when it waits for the first time.
    receiver: Arc<OnceLock<Thread>>,
    /// Whether this end has appended an item since it last woke the receiver.
    unflushed: Cell<bool>,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            receiver: Arc::clone(&self.receiver),
            unflushed: Cell::new(false),
        }
    }
}

impl<T> Sender<T> {
    /// Appends an item without waking the receiver.
    ///
    /// # Errors
    /// The queue is full, or the receiver has been dropped. The error is the item.
    pub(crate) fn push(&self, item: T) -> Result<(), T> {
        match self.inner.try_send(item) {
            Ok(()) => {
                self.unflushed.set(true);
                Ok(())
            }
            Err(TrySendError::Full(item) | TrySendError::Disconnected(item)) => Err(item),
        }
    }

    /// Returns whether this end has appended an item since it last woke the receiver.
    #[must_use]
    pub(crate) fn has_unflushed(&self) -> bool {
        self.unflushed.get()
    }

    /// Returns whether more than a quarter of the queue is used, so that the receiver should be woken at once.
    #[must_use]
    pub(crate) fn is_filling_up(&self) -> bool {
        self.inner.len() * 4 > self.inner.capacity().unwrap_or(usize::MAX)
    }

    /// Wakes the receiver if this end has appended an item since the last call.
    pub(crate) fn wake(&self) {
        if self.unflushed.replace(false)
            && let Some(receiver) = self.receiver.get()
        {
            receiver.unpark();
        }
    }
}

/// The receiving end, for one thread.
#[derive(Debug)]
pub struct Receiver<T> {
    inner: crossbeam_channel::Receiver<T>,
    thread: Arc<OnceLock<Thread>>,
}

/// The reason why no item was received.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RecvError {
    /// The queue is empty.
    Empty,
    /// The queue is empty, and all senders have been dropped.
    Disconnected,
}

impl<T> Receiver<T> {
    /// Returns the next item without waiting.
    ///
    /// # Errors
    /// [`RecvError`] if the queue is empty.
    pub fn try_recv(&self) -> Result<T, RecvError> {
        self.inner.try_recv().map_err(|error| match error {
            TryRecvError::Empty => RecvError::Empty,
            TryRecvError::Disconnected => RecvError::Disconnected,
        })
    }

    /// Waits for the next item. All calls must come from the same thread: senders wake the thread of the first call.
    ///
    /// # Errors
    /// [`RecvError`] if no item has arrived within `timeout`, or the queue is empty and all senders have been dropped.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<T, RecvError> {
        self.thread.get_or_init(thread::current);
        let mut until = None;
        loop {
            match self.try_recv() {
                Err(RecvError::Empty) => {}
                outcome => return outcome,
            }
            // Read the clock only if there is no item.
            let until = *until.get_or_insert_with(|| Instant::now() + timeout);
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(RecvError::Empty);
            }
            thread::park_timeout(left.min(MAX_PARK));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_item_that_does_not_fit_is_returned() {
        let (sender, receiver) = queue(2);
        assert_eq!(sender.push(1), Ok(()));
        assert_eq!(sender.push(2), Ok(()));
        assert_eq!(sender.push(3), Err(3));
        assert_eq!(receiver.try_recv(), Ok(1));
        assert_eq!(sender.push(3), Ok(()));
        drop(sender);
        assert_eq!(receiver.try_recv(), Ok(2));
        assert_eq!(receiver.try_recv(), Ok(3));
        assert_eq!(receiver.try_recv(), Err(RecvError::Disconnected));
    }

    #[test]
    fn a_waiting_receiver_is_woken() {
        let (sender, receiver) = queue(100);
        let reader = thread::spawn(move || {
            let mut received = Vec::new();
            while let Ok(n) = receiver.recv_timeout(Duration::from_secs(20)) {
                received.push(n);
            }
            received
        });
        let started = Instant::now();
        for n in 0..50 {
            sender.push(n).unwrap();
            sender.wake();
            thread::sleep(Duration::from_millis(1));
        }
        drop(sender);
        assert_eq!(reader.join().unwrap(), (0..50).collect::<Vec<_>>());
        assert!(started.elapsed() < Duration::from_secs(60));
    }
}
