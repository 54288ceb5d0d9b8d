//! Queues to threads that wait. Putting something in is one atomic exchange; the reader is woken by a call of its own,
//! once for many items, and only if it sleeps.

use std::{
    cell::Cell,
    sync::{Arc, OnceLock},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use crossbeam_channel::{TryRecvError, TrySendError, bounded};

/// A queue for `capacity` items.
#[must_use]
pub fn queue<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let (sender, receiver) = bounded(capacity);
    let reader = Arc::new(OnceLock::new());
    (
        Sender {
            inner: sender,
            reader: Arc::clone(&reader),
            told: Cell::new(true),
        },
        Receiver {
            inner: receiver,
            reader,
        },
    )
}

/// Where items go in.
#[derive(Debug)]
pub struct Sender<T> {
    inner: crossbeam_channel::Sender<T>,
    reader: Arc<OnceLock<Thread>>,
    told: Cell<bool>,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            reader: Arc::clone(&self.reader),
            told: Cell::new(true),
        }
    }
}

impl<T> Sender<T> {
    /// Puts an item in; the reader is not woken yet.
    ///
    /// # Errors
    /// The queue is full, or nobody reads: the item comes back.
    pub fn put(&self, item: T) -> Result<(), T> {
        match self.inner.try_send(item) {
            Ok(()) => {
                self.told.set(false);
                Ok(())
            }
            Err(TrySendError::Full(item) | TrySendError::Disconnected(item)) => Err(item),
        }
    }

    /// Whether something was put in since the reader was woken.
    #[must_use]
    pub fn pending(&self) -> bool {
        !self.told.get()
    }

    /// Whether so much waits that the reader should not be left asleep.
    #[must_use]
    pub fn crowded(&self) -> bool {
        self.inner.len() * 4 > self.inner.capacity().unwrap_or(usize::MAX)
    }

    /// Wakes the reader if something was put in since.
    pub fn wake(&self) {
        if !self.told.replace(true)
            && let Some(reader) = self.reader.get()
        {
            reader.unpark();
        }
    }
}

/// Where items come out, for one thread.
#[derive(Debug)]
pub struct Receiver<T> {
    inner: crossbeam_channel::Receiver<T>,
    reader: Arc<OnceLock<Thread>>,
}

/// There is nothing to be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Nothing {
    /// Not now.
    Yet,
    /// All senders are gone.
    Ever,
}

impl<T> Receiver<T> {
    /// The next item if there is one.
    ///
    /// # Errors
    /// There is none.
    pub fn try_next(&self) -> Result<T, Nothing> {
        self.inner.try_recv().map_err(|error| match error {
            TryRecvError::Empty => Nothing::Yet,
            TryRecvError::Disconnected => Nothing::Ever,
        })
    }

    /// The next item, waited for. Only ever by the same thread.
    ///
    /// # Errors
    /// There was none for so long.
    pub fn next(&self, patience: Duration) -> Result<T, Nothing> {
        // Parked, not blocked in the queue: its senders would have to take a lock to wake somebody there.
        self.reader.get_or_init(thread::current);
        match self.try_next() {
            Err(Nothing::Yet) => {}
            other => return other,
        }
        let until = Instant::now() + patience;
        loop {
            match self.try_next() {
                Err(Nothing::Yet) => {}
                other => return other,
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Nothing::Yet);
            }
            // Whoever is gone does not wake anybody.
            thread::park_timeout(left.min(Duration::from_millis(250)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_comes_back() {
        let (sender, receiver) = queue(2);
        assert_eq!(sender.put(1), Ok(()));
        assert_eq!(sender.put(2), Ok(()));
        assert_eq!(sender.put(3), Err(3));
        assert_eq!(receiver.try_next(), Ok(1));
        assert_eq!(sender.put(3), Ok(()));
        drop(sender);
        assert_eq!(receiver.try_next(), Ok(2));
        assert_eq!(receiver.try_next(), Ok(3));
        assert_eq!(receiver.try_next(), Err(Nothing::Ever));
    }

    #[test]
    fn a_reader_that_waits_is_woken() {
        let (sender, receiver) = queue(100);
        let reader = thread::spawn(move || {
            let mut got = Vec::new();
            while let Ok(n) = receiver.next(Duration::from_secs(20)) {
                got.push(n);
            }
            got
        });
        let begun = Instant::now();
        for n in 0..50 {
            sender.put(n).unwrap();
            sender.wake();
            thread::sleep(Duration::from_millis(1));
        }
        drop(sender);
        assert_eq!(reader.join().unwrap(), (0..50).collect::<Vec<_>>());
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}
