//! The part of a change on the control thread, which owns the timer. Start at [`Control::begin_change`].

use std::{
    collections::BTreeMap,
    sync::mpsc::Receiver,
    time::{Duration, Instant},
};

use tracing::{error, info, warn};

use super::{
    PolicyBase, Texts,
    deadline::Now,
    journal::Change,
    plan::{changed_files, compile_texts},
    queue::Enforced,
    store::{StoreEvent, Switch},
    switch::Current,
};
use crate::{
    control::api::{Author, ChangeKind, ChangeState, PolicyApplied, Session},
    daemon::{
        control::Control,
        message::{Message, Reply},
        watcher,
    },
};

impl Control {
    /// Returns a copy of the policies in force.
    pub(in crate::daemon) fn policy_base(&self) -> PolicyBase {
        let folder = self.files.folder_problem().map(ToOwned::to_owned);
        PolicyBase {
            compiler: self.enforcer.compiler.clone(),
            http: self.config.http.clone(),
            texts: self.texts_in_force(),
            broken: self.files.broken(),
            refusal: self.policy_changes.refusal().or(folder),
        }
    }

    fn texts_in_force(&self) -> Texts {
        let files = self.files.to_keep().into_iter();
        files.filter_map(|(name, text)| Some((name, text?))).collect()
    }

    /// Puts a prepared change in force, and has its files written into the folder.
    pub(in crate::daemon) fn begin_change(&mut self, switch: Switch, reply: Reply<PolicyApplied>) {
        let Switch { change, from, to, of } = switch;
        let refusal = self.policy_changes.refusal().or_else(|| {
            (self.texts_in_force() != from).then(|| {
                "the policies have changed meanwhile; nothing was applied: run the command again".to_owned()
            })
        });
        let outcome = match refusal {
            Some(refusal) => Err(refusal),
            None => self.enforce_texts(&to).map_err(|problem| {
                if let Err(problem) = self.enforce_texts(&from) {
                    error!(
                        error = problem,
                        "the policies from before a failed change are not in force completely"
                    );
                }
                self.files.pin(None);
                format!("the change was not applied: {problem}")
            }),
        };
        if let Err(problem) = outcome {
            self.policy_changes.store.abandon();
            return reply.send(Err(problem));
        }
        let kind = if of.is_some() {
            ChangeKind::Rollback
        } else {
            ChangeKind::Apply
        };
        info!(
            event = "policy-change",
            number = change.number,
            user = change.author.user,
            sudo_user = change.author.sudo_user.as_deref().unwrap_or_default(),
            message = change.message,
            to_confirm = change.deadline.is_some(),
            revision = self.changes,
            "a command has changed the policies"
        );
        self.record_change(&change, kind, of, to.clone());
        let confirm_within_seconds = change.deadline.as_ref().map(|deadline| {
            let left = deadline.left(&Now::read()).unwrap_or_default();
            (left + Duration::from_millis(500)).as_secs()
        });
        let applied = PolicyApplied {
            number: change.number,
            revision: self.changes,
            confirm_within_seconds,
            files: changed_files(&from, &to),
            aside: Vec::new(),
        };
        self.policy_changes.notes.clear();
        self.policy_changes.aside.clear();
        self.policy_changes.store.write(change.clone(), to);
        self.policy_changes.current = Some(Current::Writing {
            change,
            from,
            reply,
            applied,
        });
    }

    /// Enforces policies from memory, in place of the files of the folder.
    ///
    /// # Errors
    /// Why they are not completely in force.
    fn enforce_texts(&mut self, texts: &Texts) -> Result<(), String> {
        let begun = Instant::now();
        let before = self.enforcer.compiler.snapshot().endpoints.clone();
        self.policy_changes.switching = true;
        self.files.pin(Some(texts.clone()));
        self.files.update(&watcher::Changes::all());
        self.enforcer.compile(None, &mut self.files);
        self.enforce(begun);
        self.log_policies(&before, begun);
        self.policy_changes.switching = false;
        self.changed();
        if let Some(problem) = &self.enforcer.problem {
            return Err(problem.clone());
        }
        let broken: Vec<String> = self
            .files
            .report()
            .into_iter()
            .filter(|file| file.state != crate::control::api::PolicyFileState::InForce)
            .flat_map(|file| file.diagnostics)
            .collect();
        if broken.is_empty() {
            Ok(())
        } else {
            Err(broken.join("\n"))
        }
    }

    /// Follows the folder again.
    fn follow_folder(&mut self) {
        self.files.pin(None);
        self.policies_changed(&watcher::Changes::all());
    }

    /// Handles the result of a job of the store.
    pub(in crate::daemon) fn store_event(&mut self, event: StoreEvent) {
        match (event, self.policy_changes.current.take()) {
            (StoreEvent::Aside(paths), mut current) => {
                if let Some(Current::Writing { applied, .. }) = &mut current {
                    applied
                        .aside
                        .extend(paths.iter().map(|path| path.display().to_string()));
                }
                self.policy_changes.aside.extend(paths);
                self.policy_changes.current = current;
            }
            (
                StoreEvent::Written(Ok(())),
                Some(Current::Writing {
                    change,
                    from,
                    reply,
                    applied,
                }),
            ) => {
                if change.deadline.is_some() {
                    self.policy_changes.current = Some(Current::Waiting { change, from });
                }
                self.follow_folder();
                reply.send(Ok(applied));
            }
            (
                StoreEvent::Written(Err(problem)),
                Some(Current::Writing {
                    change, from, reply, ..
                }),
            ) => {
                let number = change.number;
                self.undo(
                    change,
                    from,
                    &format!("its files could not be written: {problem}"),
                    None,
                    None,
                );
                reply.send(Err(format!(
                    "change {number} was rolled back, because its files could not be written: {problem}"
                )));
            }
            (StoreEvent::Confirmed(Ok(())), Some(Current::Confirming { change, reply, .. })) => {
                info!(
                    event = "policy-change-confirmed",
                    number = change.number,
                    "a change of the policies is confirmed"
                );
                reply.send(Ok(change.number));
            }
            (StoreEvent::Confirmed(Err(problem)), Some(Current::Confirming { change, from, reply })) => {
                reply.send(Err(format!(
                    "the confirmation of change {} could not be written: {problem}; it is still rolled back at its deadline",
                    change.number
                )));
                self.policy_changes.current = Some(Current::Waiting { change, from });
            }
            (StoreEvent::Undone, Some(Current::Undoing { change, reply })) => {
                self.follow_folder();
                if let Some(reply) = reply {
                    reply.send(Ok(change.number));
                }
            }
            (event, current) => {
                warn!(?event, "the result of a job belongs to no change");
                self.policy_changes.current = current;
            }
        }
    }

    /// Rolls back a change whose deadline has passed.
    pub(in crate::daemon) fn check_deadline(&mut self) {
        if !self.policy_changes.left().is_some_and(|left| left.is_zero()) {
            return;
        }
        match self.policy_changes.current.take() {
            Some(Current::Waiting { change, from }) => {
                self.undo(change, from, "it was not confirmed in time", None, None);
            }
            // The disk hangs. The rollback is enforced from memory now; its job waits behind the write, whose late
            // result then belongs to no change.
            Some(Current::Writing {
                change, from, reply, ..
            }) => {
                let number = change.number;
                let why = "its files were not written before its deadline";
                self.undo(change, from, why, None, None);
                reply.send(Err(format!("change {number} was rolled back, because {why}")));
            }
            other => self.policy_changes.current = other,
        }
    }

    /// Keeps the change that waits for its confirmation. `number`: the change that the client means; `None`: any.
    pub(in crate::daemon) fn confirm_change(&mut self, number: Option<u64>, reply: Reply<u64>) {
        self.check_deadline();
        if let Some(problem) = self.policy_changes.other_than(number) {
            return reply.send(Err(problem));
        }
        match self.policy_changes.current.take() {
            Some(Current::Waiting { change, from }) => {
                self.policy_changes.store.confirm(change.clone());
                self.policy_changes.current = Some(Current::Confirming { change, from, reply });
            }
            other => reply.send(Err(self.nothing_waits(other))),
        }
    }

    /// Rolls back the change that waits for its confirmation. `number`: the change that the client means; `None`: any.
    /// `sessions`: those of the client's user; a rollback that denies one is refused.
    pub(in crate::daemon) fn cancel_change(
        &mut self,
        author: Author,
        number: Option<u64>,
        sessions: &[Session],
        reply: Reply<u64>,
    ) {
        self.check_deadline();
        if let Some(problem) = self.policy_changes.other_than(number) {
            return reply.send(Err(problem));
        }
        if let Some(denied) = self.sessions_denied_by_rollback(sessions) {
            return reply.send(Err(format!(
                "the policies from before the change deny your own session {denied}; nothing was rolled back. Wait until the \
                 deadline, or use --force"
            )));
        }
        let why = "it was cancelled";
        match self.policy_changes.current.take() {
            Some(Current::Waiting { change, from }) => {
                self.undo(change, from, why, Some(author), Some(reply));
            }
            // As in `check_deadline`: a disk that hangs does not keep the change in force.
            Some(Current::Writing {
                change,
                from,
                reply: applying,
                ..
            }) if change.deadline.is_some() => {
                let number = change.number;
                self.undo(change, from, why, Some(author), Some(reply));
                applying.send(Err(format!("change {number} was rolled back, because {why}")));
            }
            other => reply.send(Err(self.nothing_waits(other))),
        }
    }

    /// Ends the change that is not over, before the daemon ends. A change that needs a confirmation is rolled back: the
    /// programs stay attached, and without a daemon the change would not be rolled back at its deadline. A change that
    /// needs no confirmation, or whose confirmation is being written, is completed if the disk answers.
    pub(in crate::daemon) fn end_change(&mut self, messages: &Receiver<Message>) {
        // Of a change whose message to this thread comes too late.
        self.policy_changes.store.abandon();
        let completes = match &self.policy_changes.current {
            Some(Current::Confirming { .. }) => true,
            Some(Current::Writing { change, .. }) => change.deadline.is_none(),
            _ => false,
        };
        if completes {
            self.finish_jobs(messages);
        }
        let why = "the daemon was stopped before it was confirmed";
        match self.policy_changes.current.take() {
            Some(Current::Waiting { change, from }) => self.undo(change, from, why, None, None),
            Some(Current::Writing {
                change, from, reply, ..
            }) if change.deadline.is_some() => {
                let number = change.number;
                self.undo(change, from, why, None, None);
                reply.send(Err(format!("change {number} was rolled back, because {why}")));
            }
            // The disk hangs. The job of the rollback waits behind that of the confirmation.
            Some(Current::Confirming { change, from, reply }) => {
                let number = change.number;
                self.undo(change, from, why, None, None);
                reply.send(Err(format!("change {number} was rolled back, because {why}")));
            }
            other => self.policy_changes.current = other,
        }
        self.finish_jobs(messages);
        self.write_netfilter();
    }

    /// Waits until the jobs sent so far are done, for a limited time, and handles their results. Other messages are left
    /// out, so their clients learn that the daemon ends.
    fn finish_jobs(&mut self, messages: &Receiver<Message>) {
        self.policy_changes.store.flush();
        for message in messages.try_iter() {
            if let Message::Store(event) = message {
                self.store_event(event);
            }
        }
    }

    /// Returns in words the sessions that the policies from before the change that waits deny, and those in force do not.
    fn sessions_denied_by_rollback(&self, sessions: &[Session]) -> Option<String> {
        if sessions.is_empty() {
            return None;
        }
        let from = self.policy_changes.current.as_ref()?.before()?;
        // The rollback itself reports such errors.
        let candidate = compile_texts(&self.policy_base(), from, &BTreeMap::new()).ok()?;
        self.newly_denied(&candidate, sessions, |_| false)
    }

    fn nothing_waits(&mut self, current: Option<Current>) -> String {
        self.policy_changes.current = current;
        self.policy_changes.nothing_waits()
    }

    /// Puts the policies from before a change in force, and has their files written into the folder.
    fn undo(
        &mut self,
        change: Change,
        from: Texts,
        why: &str,
        author: Option<Author>,
        reply: Option<Reply<u64>>,
    ) {
        let mut notes = Vec::new();
        if let Err(problem) = self.enforce_texts(&from) {
            error!(
                number = change.number,
                error = problem,
                "the policies from before a change are not in force completely"
            );
            notes.push(format!(
                "the rollback of change {} did not put the policies from before it in force completely: {problem}",
                change.number
            ));
        }
        warn!(
            event = "policy-change-rolled-back",
            number = change.number,
            why,
            revision = self.changes,
            "a change of the policies is rolled back"
        );
        // Refused confirmations quote the last note.
        notes.push(format!(
            "change {} of the policies was rolled back: {why}",
            change.number
        ));
        self.policy_changes.notes = notes;
        self.record_rollback(&change, why, author, from.clone());
        self.policy_changes.store.undo(change.clone(), from);
        self.policy_changes.current = Some(Current::Undoing { change, reply });
    }

    fn record_change(&mut self, change: &Change, kind: ChangeKind, of: Option<u64>, texts: Texts) {
        self.policy_changes.recorded.clone_from(&texts);
        self.policy_changes.store.enforced(Enforced {
            number: Some(change.number),
            kind,
            author: Some(change.author.clone()),
            message: change.message.clone(),
            of,
            revision: self.changes,
            state: match change.deadline {
                Some(_) => ChangeState::Pending,
                None => ChangeState::Enforced,
            },
            texts,
            left_out: 0,
        });
    }

    fn record_rollback(&mut self, change: &Change, why: &str, author: Option<Author>, texts: Texts) {
        self.policy_changes.recorded.clone_from(&texts);
        self.policy_changes
            .store
            .set_state(change.number, ChangeState::RolledBack);
        self.policy_changes.store.enforced(Enforced {
            number: None,
            kind: ChangeKind::RolledBack,
            author,
            message: format!("change {} was rolled back: {why}", change.number),
            of: change.before,
            revision: self.changes,
            state: ChangeState::Enforced,
            texts,
            left_out: 0,
        });
    }

    /// Records the policies in force, if files of the folder have changed.
    pub(in crate::daemon) fn record_policies(&mut self) {
        let is_command = matches!(
            self.policy_changes.current,
            Some(Current::Writing { .. } | Current::Undoing { .. })
        );
        if is_command || self.policy_changes.switching || self.enforcer.problem.is_some() {
            return;
        }
        let texts = self.texts_in_force();
        if texts == self.policy_changes.recorded {
            return;
        }
        self.policy_changes.recorded.clone_from(&texts);
        self.policy_changes.store.enforced(Enforced {
            number: None,
            kind: ChangeKind::FileChange,
            author: None,
            message: String::new(),
            of: None,
            revision: self.changes,
            state: ChangeState::Enforced,
            texts,
            left_out: 0,
        });
    }

    /// Records what the start of the daemon has found, once the first policies are in force.
    pub(in crate::daemon) fn record_start(&mut self) {
        let recovered = std::mem::take(&mut self.policy_changes.recovered);
        let known = self.policy_changes.store.history();
        for change in [recovered.waiting, recovered.completed].into_iter().flatten() {
            if known.get(change.number).is_none() {
                self.record_change(&change, ChangeKind::Apply, None, self.texts_in_force());
            }
        }
        if let Some(number) = recovered.dropped {
            info!(
                event = "policy-change-dropped",
                number, "a change of the policies that was prepared but not begun is dropped"
            );
        }
        if let Some(change) = recovered.undone {
            let why = "it was not confirmed before the daemon or the node was started again";
            warn!(
                event = "policy-change-rolled-back",
                number = change.number,
                why,
                "a change of the policies was rolled back before the policies were read"
            );
            let note = format!("change {} of the policies was rolled back: {why}", change.number);
            self.policy_changes.notes.push(note);
            self.record_rollback(&change, why, None, self.texts_in_force());
        }
        self.record_policies();
    }
}
