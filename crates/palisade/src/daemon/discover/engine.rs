//! A container engine: its address and the table of its running containers, which a thread keeps
//! ([`super::follow`]). Answers have deadlines and limits.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use nix::sys::eventfd::EventFd;
use tracing::{info, warn};

use super::place::Described;
use crate::config::EngineApi;

/// Longest time for one answer of the engine.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);
/// Time after which all containers are listed again, in case an event was lost.
pub(super) const LIST_INTERVAL: Duration = Duration::from_secs(30);
/// Longest description of a container or an image, and longest event, bytes.
pub(super) const MAX_ANSWER: usize = 4 << 20;

/// The containers of one engine.
#[derive(Debug)]
pub(super) struct Engine {
    pub socket: PathBuf,
    pub api: EngineApi,
    /// Maximum number of containers in the table.
    pub limit: usize,
    wake: Arc<EventFd>,
    is_ended: AtomicBool,
    table: Mutex<Table>,
}

/// What is known of an engine.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    pub containers: Arc<BTreeMap<String, Described>>,
    /// Whether the engine has listed its containers since the daemon began.
    pub has_answered: bool,
    /// Why the engine does not answer, and since when.
    pub problem: Option<(String, Timestamp)>,
    /// Why containers are missing in the table although the engine answers.
    pub notice: Option<String>,
}

impl Engine {
    pub(super) fn new(socket: PathBuf, api: EngineApi, limit: usize, wake: Arc<EventFd>) -> Self {
        Self {
            socket,
            api,
            limit,
            wake,
            is_ended: AtomicBool::new(false),
            table: Mutex::default(),
        }
    }

    /// Returns whether the engine is used with these options.
    pub(super) fn is_for(&self, socket: &Path, api: &EngineApi, limit: usize) -> bool {
        self.socket == socket && self.api == *api && self.limit == limit
    }

    /// Ends the thread at its next step.
    pub(super) fn end(&self) {
        self.is_ended.store(true, Ordering::Relaxed);
    }

    /// Returns what is known now.
    pub(super) fn table(&self) -> Table {
        self.lock().clone()
    }

    /// Returns whether the thread has to end.
    pub(super) fn is_ended(&self) -> bool {
        self.is_ended.load(Ordering::Relaxed)
    }

    /// Replaces the table by a whole list. `count`: number of containers, including those beyond the limit.
    pub(super) fn listed(&self, containers: BTreeMap<String, Described>, count: usize) {
        let was_away = {
            let table = self.lock();
            table.problem.is_some() || !table.has_answered
        };
        if was_away {
            info!(
                socket = %self.socket.display(),
                containers = containers.len(),
                "the container engine has listed its containers"
            );
        }
        let notice = (count > self.limit).then(|| {
            format!(
                "{} has {count} containers, more than [limits] discovered = {}; the others stay denied",
                self.socket.display(),
                self.limit
            )
        });
        self.change(|table| {
            table.containers = Arc::new(containers);
            table.has_answered = true;
            table.problem = None;
            table.notice = notice;
        });
    }

    /// Writes to the table that the engine does not answer, which leaves the containers as they are.
    pub(super) fn failed(&self, problem: String) {
        let is_new = self.lock().problem.as_ref().map(|(known, _)| known) != Some(&problem);
        if is_new {
            warn!(
                socket = %self.socket.display(),
                error = problem,
                "the container engine does not answer; what was found stays, new containers stay denied"
            );
        }
        self.change(|table| {
            let since = table
                .problem
                .take()
                .map_or_else(Timestamp::now, |(_, since)| since);
            table.problem = Some((problem, since));
        });
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the table, and wakes the thread that reads it.
    pub(super) fn change(&self, change: impl FnOnce(&mut Table)) {
        change(&mut self.lock());
        // The write fails only if the counter is at its maximum, and then the thread is woken anyway (eventfd(2)).
        let _ = self.wake.write(1);
    }
}
