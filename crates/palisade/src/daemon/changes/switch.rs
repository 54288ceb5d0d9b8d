//! The state of a change while the daemon runs. [`super::control`] changes it.

use std::{path::PathBuf, sync::Arc, time::Duration};

use super::{Recovered, Texts, deadline::Now, journal::Change, store::Store};
use crate::{
    control::api::{PendingChange, PolicyApplied},
    daemon::message::Reply,
};

/// Changes of the policies by commands.
pub(in crate::daemon) struct Changes {
    /// Writes journal, folder and history.
    pub store: Arc<Store>,
    pub(super) current: Option<Current>,
    /// Files that were recorded last.
    pub(super) recorded: Texts,
    /// Whether policies are enforced from memory right now; they are recorded once they are in force completely.
    pub(super) switching: bool,
    /// What a start of the daemon has found, until the first policies are in force.
    pub(super) recovered: Recovered,
    /// The last rollback and a problem at the start, for `palisade status`.
    pub(super) notes: Vec<String>,
    /// Files of the folder that the last change has put aside.
    pub(super) aside: Vec<PathBuf>,
}

/// The change that is not over.
pub(super) enum Current {
    /// Enforced; the folder is being written.
    Writing {
        change: Change,
        from: Texts,
        reply: Reply<PolicyApplied>,
        applied: PolicyApplied,
    },
    /// Waits for its confirmation.
    Waiting { change: Change, from: Texts },
    /// Confirmed; the journal is being removed.
    Confirming {
        change: Change,
        from: Texts,
        reply: Reply<u64>,
    },
    /// Rolled back; the folder is being put back.
    Undoing {
        change: Change,
        reply: Option<Reply<u64>>,
    },
}

impl Current {
    const fn change(&self) -> &Change {
        match self {
            Self::Writing { change, .. }
            | Self::Waiting { change, .. }
            | Self::Confirming { change, .. }
            | Self::Undoing { change, .. } => change,
        }
    }

    /// Returns the policies from before a change that can be cancelled.
    pub(super) const fn before(&self) -> Option<&Texts> {
        match self {
            Self::Waiting { from, .. } => Some(from),
            Self::Writing { change, from, .. } if change.deadline.is_some() => Some(from),
            _ => None,
        }
    }
}

impl Changes {
    /// Returns the changes after a start.
    pub(in crate::daemon) fn new(store: Store, mut recovered: Recovered) -> Self {
        let mut notes: Vec<String> = recovered.problem.take().into_iter().collect();
        let mut current = None;
        if let Some(change) = recovered.waiting.clone() {
            match store.texts_of(&change.from) {
                Ok(from) => current = Some(Current::Waiting { change, from }),
                Err(problem) => notes.push(format!(
                    "change {} waits for its confirmation but cannot be rolled back: {problem}",
                    change.number
                )),
            }
        }
        if let (Some(change), Some(texts)) = (recovered.undone.clone(), &recovered.unwritten) {
            store.undo(change.clone(), texts.clone());
            current = Some(Current::Undoing { change, reply: None });
        }
        Self {
            store: Arc::new(store),
            current,
            recorded: Texts::new(),
            switching: false,
            aside: std::mem::take(&mut recovered.aside),
            recovered,
            notes,
        }
    }

    /// Returns the time until the change in progress is rolled back.
    pub(in crate::daemon) fn left(&self) -> Option<Duration> {
        match &self.current {
            // A folder whose write hangs must not keep an unconfirmed change in force.
            Some(Current::Writing { change, .. } | Current::Waiting { change, .. }) => {
                let deadline = change.deadline.as_ref()?;
                Some(deadline.left(&Now::read()).unwrap_or_default())
            }
            _ => None,
        }
    }

    /// Returns the change that waits for its confirmation.
    pub(in crate::daemon) fn pending(&self) -> Option<PendingChange> {
        match &self.current {
            Some(Current::Waiting { change, .. } | Current::Confirming { change, .. }) => {
                Some(PendingChange {
                    number: change.number,
                    remaining_seconds: self.left().unwrap_or_default().as_secs(),
                    author: change.author.clone(),
                    message: change.message.clone(),
                })
            }
            _ => None,
        }
    }

    /// Returns warnings for `palisade status`.
    pub(in crate::daemon) fn warnings(&self) -> Vec<String> {
        let mut warnings = self.notes.clone();
        if !self.aside.is_empty() {
            let kept: Vec<String> = self.aside.iter().map(|path| path.display().to_string()).collect();
            warnings.push(format!(
                "the last change of the policies by a command has replaced files that the daemon had not read; they are \
                 kept as {}: take over what is needed, and remove them",
                kept.join(", ")
            ));
        }
        if let Some(problem) = self.store.problem() {
            warnings.push(format!(
                "the history of the policies cannot be written: {problem}; the policies are enforced, and the write is retried"
            ));
        }
        if let Some(Current::Writing { change, .. }) = &self.current {
            warnings.push(format!(
                "change {} is enforced, but its files are not in the policy folder yet",
                change.number
            ));
        }
        if let Some(Current::Undoing { change, .. }) = &self.current {
            warnings.push(format!(
                "change {} is rolled back: the policies from before it are enforced, but their files are not back in the \
                 policy folder yet",
                change.number
            ));
        }
        warnings
    }

    /// Returns why a command that names a change is not carried out: another change is in progress; `None` if the command
    /// names no change or this one.
    pub(super) fn other_than(&self, number: Option<u64>) -> Option<String> {
        let (Some(number), Some(current)) = (number, &self.current) else {
            return None;
        };
        let change = current.change();
        (change.number != number).then(|| {
            let author = &change.author;
            let who = author.sudo_user.as_deref().unwrap_or(&author.user);
            let message = match &*change.message {
                "" => String::new(),
                message => format!(" ({message:?})"),
            };
            format!(
                "change {number} does not wait for its confirmation; pending is change {} of {who}{message}",
                change.number
            )
        })
    }

    /// Returns why there is no change that can be confirmed or cancelled.
    pub(super) fn nothing_waits(&self) -> String {
        let last = self.notes.last().map(|note| format!("; {note}"));
        match &self.current {
            Some(Current::Writing { change, .. }) if change.deadline.is_none() => format!(
                "change {} needs no confirmation; its files are being written. `palisade policy rollback` goes back",
                change.number
            ),
            Some(Current::Writing { change, .. }) => format!(
                "the files of change {} are still being written: confirm it when `palisade status` shows that it waits",
                change.number
            ),
            Some(Current::Confirming { change, .. }) => {
                format!("change {} is being confirmed", change.number)
            }
            Some(Current::Undoing { change, .. }) => format!(
                "change {} is being rolled back{}; see `palisade status`",
                change.number,
                last.unwrap_or_default()
            ),
            Some(Current::Waiting { .. }) | None => {
                format!("no change waits for its confirmation{}", last.unwrap_or_default())
            }
        }
    }

    /// Returns why no change can be begun now; `None` if one can.
    pub(super) fn refusal(&self) -> Option<String> {
        Some(match self.current.as_ref()? {
            Current::Writing { change, .. } => format!("change {} is being applied", change.number),
            Current::Waiting { change, .. } | Current::Confirming { change, .. } => format!(
                "change {} waits for its confirmation: first run `palisade policy confirm` or `palisade policy cancel`",
                change.number
            ),
            Current::Undoing { change, .. } => {
                format!(
                    "change {} is being rolled back; see `palisade status`",
                    change.number
                )
            }
        })
    }
}
