//! A value that the control plane changes and one worker watches. Without a change, the worker pays one load per check.
//!
//! This is an equivalent of `tokio::sync::watch` for threads. `arc-swap` would replace whole values, but both ends must
//! modify this value: the settings include the list of deleted endpoints, to which the control plane appends and which
//! the worker empties. This module depends on nothing else in this crate; start at [`watch`].

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

#[derive(Debug)]
struct Shared<T> {
    version: AtomicU64,
    value: Mutex<T>,
}

/// The end that changes the value.
#[derive(Debug)]
pub(crate) struct Sender<T>(Arc<Shared<T>>);

/// The end that watches the value.
#[derive(Debug)]
pub(crate) struct Receiver<T> {
    shared: Arc<Shared<T>>,
    /// Version at the last read.
    seen: u64,
}

/// Returns the ends of a watched value that starts as `initial`.
#[must_use]
pub(crate) fn watch<T>(initial: T) -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        version: AtomicU64::new(0),
        value: Mutex::new(initial),
    });
    let receiver = Receiver {
        shared: Arc::clone(&shared),
        seen: 0,
    };
    (Sender(shared), receiver)
}

impl<T> Sender<T> {
    /// Changes the value in place.
    pub(crate) fn modify(&self, modify: impl FnOnce(&mut T)) {
        let mut value = self.0.value.lock().unwrap_or_else(PoisonError::into_inner);
        modify(&mut value);
        self.0.version.fetch_add(1, Ordering::Release);
    }
}

impl<T> Receiver<T> {
    /// Returns whether the value has changed since the last read.
    #[must_use]
    pub(crate) fn has_changed(&self) -> bool {
        self.shared.version.load(Ordering::Acquire) != self.seen
    }

    /// Calls `read` with the latest value. `read` can change the value, for example empty a list.
    pub(crate) fn read<R>(&mut self, read: impl FnOnce(&mut T) -> R) -> R {
        let mut value = self.shared.value.lock().unwrap_or_else(PoisonError::into_inner);
        self.seen = self.shared.version.load(Ordering::Acquire);
        read(&mut value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_gets_the_latest_value_and_can_empty_a_list_in_it() {
        let (sender, mut receiver) = watch((1, Vec::new()));
        assert!(!receiver.has_changed());
        for n in 2..4 {
            sender.modify(|value| {
                value.0 = n;
                value.1.push(n);
            });
        }
        assert!(receiver.has_changed());
        let read = |value: &mut (i32, Vec<i32>)| (value.0, std::mem::take(&mut value.1));
        assert_eq!(receiver.read(read), (3, vec![2, 3]));
        assert!(!receiver.has_changed());
        assert_eq!(receiver.read(read), (3, vec![]));
    }
}
