//! Jobs for the thread that writes, in their order. The queue is bounded although a disk can hang for hours: versions of
//! the policies that wait to be recorded are merged, and a preparation whose client has given up is taken out again.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Condvar, Mutex, MutexGuard, PoisonError, mpsc::Sender},
    time::{Duration, Instant},
};

use super::journal::{Change, Texts};
use crate::control::api::{Author, ChangeKind, ChangeState};

/// Number of waiting jobs from which on a version replaces the one that waits before it.
pub(super) const MAX_WAITING: usize = 16;

/// A policy set that was put in force.
#[derive(Debug)]
pub(in crate::daemon) struct Enforced {
    /// Number that [`super::store::Store::prepare`] has assigned; `None` for a new one. Without a number, a set that
    /// equals the last one is not recorded.
    pub number: Option<u64>,
    /// What caused it.
    pub kind: ChangeKind,
    /// The user of the command; `None` without a command.
    pub author: Option<Author>,
    /// The author's message.
    pub message: String,
    /// Number of the entry that was put back.
    pub of: Option<u64>,
    /// Revision of the datapath.
    pub revision: u64,
    /// Whether it waits for its confirmation.
    pub state: ChangeState,
    /// The files.
    pub texts: Texts,
    /// Number of versions before this one that are not recorded, because the disk did not answer.
    pub left_out: u64,
}

/// A change to prepare.
#[derive(Debug)]
pub(in crate::daemon) struct Preparation {
    /// Files in force.
    pub from: Texts,
    /// Files to be in force.
    pub to: Texts,
    /// Modes of files that are not in the folder.
    pub modes: BTreeMap<String, u32>,
    /// Time within which the change must be confirmed.
    pub confirm: Option<Duration>,
    /// The user of the command.
    pub author: Author,
    /// The author's message.
    pub message: String,
}

/// A job.
pub(super) enum Job {
    /// Record a policy set with its time, ns since 1970.
    Enforced(Enforced, i64),
    /// Set the state of an entry.
    State(u64, ChangeState),
    /// Write contents and journal of a change.
    Prepare(Box<Preparation>, Sender<Result<Change, String>>),
    /// Remove the journal of a prepared change.
    Abandon,
    /// Write the files of a change into the folder.
    Write(Box<Change>, Texts),
    /// Remove the journal of a confirmed change.
    Confirm(Box<Change>),
    /// Put the folder back.
    Undo(Box<Change>, Texts),
    /// Report that the jobs before are done.
    Flush(Sender<()>),
}

/// Identifies a job that waits.
pub(super) type Ticket = u64;

/// Result of [`Queue::next`].
pub(super) enum Next {
    /// The first job.
    Job(Job),
    /// No job came in time.
    Timeout,
    /// The handle is gone, and all jobs are done.
    Closed,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<(Ticket, Job)>,
    next: Ticket,
    closed: bool,
}

/// The jobs.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a job.
    pub(super) fn push(&self, job: Job) -> Ticket {
        let mut state = self.lock();
        let is_full = state.jobs.len() >= MAX_WAITING;
        let job = match (job, state.jobs.back_mut()) {
            (Job::Enforced(mut new, time), Some((ticket, Job::Enforced(last, last_time))))
                if is_full && new.kind == ChangeKind::FileChange && last.kind == ChangeKind::FileChange =>
            {
                new.left_out = last.left_out + 1;
                *last = new;
                *last_time = time;
                return *ticket;
            }
            (job, _) => job,
        };
        let ticket = state.next;
        state.next += 1;
        state.jobs.push_back((ticket, job));
        self.changed.notify_all();
        ticket
    }

    /// Removes a job that still waits. Returns whether it was removed.
    pub(super) fn withdraw(&self, ticket: Ticket) -> bool {
        let mut state = self.lock();
        let before = state.jobs.len();
        state.jobs.retain(|(known, _)| *known != ticket);
        state.jobs.len() < before
    }

    /// Waits for the first job, for a limited time if there is a limit.
    pub(super) fn next(&self, limit: Option<Duration>) -> Next {
        let end = limit.map(|limit| Instant::now() + limit);
        let mut state = self.lock();
        loop {
            if let Some((_, job)) = state.jobs.pop_front() {
                return Next::Job(job);
            }
            if state.closed {
                return Next::Closed;
            }
            state = match end {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(end) => {
                    let Some(left) = end.checked_duration_since(Instant::now()) else {
                        return Next::Timeout;
                    };
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Ends the thread once all jobs are done.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(number: u64) -> Job {
        let enforced = Enforced {
            number: None,
            kind: ChangeKind::FileChange,
            author: None,
            message: String::new(),
            of: None,
            revision: number,
            state: ChangeState::Enforced,
            texts: Texts::new(),
            left_out: 0,
        };
        Job::Enforced(enforced, 0)
    }

    #[test]
    fn versions_that_wait_are_merged_and_counted_when_there_are_too_many() {
        let queue = Queue::default();
        for number in 1..=1_000 {
            queue.push(version(number));
        }
        // A job of a command is never left out, and ends the merging.
        queue.push(Job::State(7, ChangeState::RolledBack));
        queue.push(version(1_001));
        queue.push(version(1_002));
        queue.close();
        let mut versions = Vec::new();
        let mut states = 0;
        loop {
            match queue.next(None) {
                Next::Job(Job::Enforced(enforced, _)) => {
                    versions.push((enforced.revision, enforced.left_out))
                }
                Next::Job(_) => states += 1,
                Next::Timeout | Next::Closed => break,
            }
        }
        assert_eq!((versions.len(), states), (MAX_WAITING + 1, 1));
        assert_eq!(
            versions[MAX_WAITING - 2..],
            [(15, 0), (1_000, 1_000 - MAX_WAITING as u64), (1_002, 1)]
        );
    }

    #[test]
    fn a_job_that_waits_can_be_taken_out_once() {
        let queue = Queue::default();
        queue.push(Job::Abandon);
        let ticket = queue.push(version(1));
        assert!(queue.withdraw(ticket));
        assert!(!queue.withdraw(ticket));
        assert!(matches!(queue.next(None), Next::Job(Job::Abandon)));
        assert!(matches!(
            queue.next(Some(Duration::from_millis(1))),
            Next::Timeout
        ));
    }
}
