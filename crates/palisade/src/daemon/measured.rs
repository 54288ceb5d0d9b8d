//! Values that the threads of the daemon write for the metrics.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use palisade_metrics::{Histogram, own};
use palisade_secrets::Expiry;

/// Values that other threads write for the metrics.
#[derive(Debug)]
pub(super) struct Measured {
    /// Times from the first event of a changed policy file to its enforcement.
    pub(super) enforcement: Mutex<Histogram>,
    /// Problems of the server by option of `[metrics]`.
    problems: Mutex<BTreeMap<&'static str, String>>,
    /// Certificates of the server in use, its own first.
    pub(super) certificates: Mutex<Vec<Expiry>>,
}

impl Default for Measured {
    fn default() -> Self {
        Self {
            enforcement: Mutex::new(Histogram::new(own::ENFORCEMENT_BOUNDS)),
            problems: Mutex::default(),
            certificates: Mutex::default(),
        }
    }
}

impl Measured {
    /// Notes the time from the first event of a changed policy file to its enforcement.
    pub(super) fn enforced_after(&self, time: Duration) {
        lock(&self.enforcement).observe(time.as_secs_f64());
    }

    /// Sets or clears the problem of an option of `[metrics]`.
    pub(super) fn set_problem(&self, option: &'static str, problem: Option<String>) {
        let mut problems = lock(&self.problems);
        match problem {
            Some(problem) => problems.insert(option, problem),
            None => problems.remove(option),
        };
    }

    /// Returns the problems of the server, for `status`.
    pub(super) fn problems(&self) -> Vec<String> {
        let problems = lock(&self.problems);
        let shown = |(option, problem): (&&str, &String)| format!("[metrics] {option}: {problem}");
        problems.iter().map(shown).collect()
    }
}

/// Locks the mutex. A poisoned mutex is used too: no panic can leave the values inconsistent.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
