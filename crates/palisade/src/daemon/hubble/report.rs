//! What the flow API reports about its listeners in `status`.

use std::sync::{Mutex, MutexGuard, PoisonError};

use palisade_secrets::Expiry;
use tracing::{info, warn};

/// State of the listeners, for `status`.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// Unix socket, while it is served.
    pub(super) socket: Option<String>,
    /// TCP address, while it is served.
    pub(super) listen: Option<String>,
    /// Problems by listener, or of the certificates.
    pub(super) problems: Vec<(&'static str, String)>,
    /// Certificates of the TCP listener in use, that of the server first.
    pub(super) certificates: Vec<Expiry>,
    /// Connections that were refused because there were too many, or because the client is not allowed to connect.
    pub(super) refused: u64,
}

#[derive(Debug, Default)]
pub(super) struct Reports(Mutex<Report>);

impl Reports {
    pub(super) fn get(&self) -> MutexGuard<'_, Report> {
        // A poisoned lock is used all the same: no code under it leaves the report half changed if it panics.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the problem of one part of the API. Logs a new problem once.
    pub(super) fn set_problem(&self, part: &'static str, problem: Option<String>) {
        let mut report = self.get();
        let before = report.problems.iter().position(|(of, _)| *of == part);
        let same = before.map(|at| &report.problems[at].1) == problem.as_ref();
        if same {
            return;
        }
        if let Some(at) = before {
            report.problems.remove(at);
        }
        match problem {
            Some(problem) => {
                warn!(part, problem, "the flow API has a problem");
                report.problems.push((part, problem));
            }
            None => info!(part, "the flow API has recovered"),
        }
    }
}
