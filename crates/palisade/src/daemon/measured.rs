//! Values that the threads of the daemon write for the metrics.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use palisade_metrics::{Histogram, own};

/// Values that other threads write for the metrics.
#[derive(Debug)]
pub(super) struct Measured {
    /// Times from the first event of a changed policy file to its enforcement.
    pub(super) enforcement: Mutex<Histogram>,
    /// Why the server does not listen.
    pub(super) problem: Mutex<Option<String>>,
}

impl Default for Measured {
    fn default() -> Self {
        Self {
            enforcement: Mutex::new(Histogram::new(own::ENFORCEMENT_BOUNDS)),
            problem: Mutex::default(),
        }
    }
}

impl Measured {
    /// Notes the time from the first event of a changed policy file to its enforcement.
    pub(super) fn enforced_after(&self, time: Duration) {
        lock(&self.enforcement).observe(time.as_secs_f64());
    }

    /// Returns why the server does not listen, for `status`.
    pub(super) fn problem(&self) -> Option<String> {
        lock(&self.problem).clone()
    }
}

/// Locks the mutex. A poisoned mutex is used too: no panic can leave the values inconsistent.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
