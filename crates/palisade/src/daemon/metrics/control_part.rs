//! The part of the status that only the control thread has.

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use super::super::message::Reply;
use crate::control::api::Status;

/// The last answer of the control thread, and the state of the requests to it.
#[derive(Default)]
pub(super) struct ControlPart {
    /// The last answer.
    pub(super) status: Option<Status>,
    /// Time and outcome of the last request.
    outcome: Option<(Instant, Result<(), String>)>,
    /// A request without an answer so far. As long as there is one, no other is sent: a control thread that has been busy
    /// for an hour would otherwise have to answer thousands of them first.
    pending: Option<Receiver<Result<Status, String>>>,
}

impl ControlPart {
    /// Sends a request to the control thread, unless the last one was sent less than `max_age` ago. `send` sends a
    /// request, `busy` returns why the thread does not answer.
    ///
    /// # Errors
    /// The reason for which there is no new answer. [`Self::status`] is then the last one.
    pub(super) fn ask(
        &mut self,
        max_age: Duration,
        deadline: Duration,
        send: impl FnOnce(Reply<Status>) -> bool,
        busy: impl FnOnce() -> String,
    ) -> Result<(), String> {
        if let Some((at, outcome)) = &self.outcome
            && at.elapsed() < max_age
        {
            return outcome.clone();
        }
        let outcome = self.request(deadline, send, busy);
        self.outcome = Some((Instant::now(), outcome.clone()));
        outcome
    }

    fn request(
        &mut self,
        deadline: Duration,
        send: impl FnOnce(Reply<Status>) -> bool,
        busy: impl FnOnce() -> String,
    ) -> Result<(), String> {
        let ending = || "the daemon is ending".to_owned();
        let receiver = match self.pending.take() {
            Some(receiver) => receiver,
            None => {
                let (reply, receiver) = Reply::channel();
                if !send(reply) {
                    return Err(ending());
                }
                receiver
            }
        };
        match receiver.recv_timeout(deadline) {
            Ok(answer) => {
                self.status = Some(answer?);
                Ok(())
            }
            Err(RecvTimeoutError::Timeout) => {
                self.pending = Some(receiver);
                Err(busy())
            }
            Err(RecvTimeoutError::Disconnected) => Err(ending()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_control_thread_gets_one_request_and_its_late_answer_is_used() {
        let mut part = ControlPart::default();
        let mut sent = Vec::new();
        let short = Duration::from_millis(1);
        for _ in 0..5 {
            let outcome = part.ask(
                Duration::ZERO,
                short,
                |reply| {
                    sent.push(reply);
                    true
                },
                || "busy".to_owned(),
            );
            assert_eq!(outcome, Err("busy".to_owned()));
        }
        assert_eq!(sent.len(), 1);
        let late = Status {
            revision: 7,
            ..Status::default()
        };
        sent.remove(0).send(Ok(late));
        let not_again = |_| panic!("no other request is sent");
        assert_eq!(part.ask(Duration::ZERO, short, not_again, String::new), Ok(()));
        assert_eq!(part.status.as_ref().map(|status| status.revision), Some(7));
        // Within `max_age` the outcome is that of the last request.
        assert_eq!(
            part.ask(Duration::from_secs(60), short, not_again, String::new),
            Ok(())
        );
        // After that, a request that fails leaves the last answer.
        assert!(part.ask(Duration::ZERO, short, |_| false, String::new).is_err());
        assert!(part.status.is_some());
    }
}
