//! The way of a [`Learn`] from a worker to whoever writes the maps, and of the [`Learned`] back.
//!
//! One queue for all workers on the way there, one for each worker on the way back. Both are bounded, and neither
//! end ever waits for the other: a worker has at most as many questions open as its way back can hold.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};

use crate::{Learn, Learned, Lease};

/// Wakes a worker that sleeps: something came back for it.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// Answers that teach nothing new may wait at a worker, so many of them.
const LATER: usize = 64;

/// Makes [`Learner`]s.
#[derive(Clone, Debug)]
pub struct Learners {
    asks: Sender<Lesson>,
    epoch: Epoch,
}

/// Where lessons arrive.
#[derive(Debug)]
pub struct Lessons {
    asks: Receiver<Lesson>,
    epoch: Epoch,
}

/// Changes whenever something learned is taken out of the maps before its time. Who keeps what was learned ends an
/// epoch, and each worker sees that.
#[derive(Clone, Debug, Default)]
pub struct Epoch(Arc<AtomicU64>);

impl Epoch {
    /// The number of this one.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Ends it.
    pub fn end(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// A worker's end.
#[derive(Debug)]
pub struct Learner {
    asks: Sender<Lesson>,
    answers: Receiver<Learned>,
    back: Back,
    open: usize,
    limit: usize,
    /// What may wait for a moment, so that nobody is woken for each.
    later: VecDeque<Lesson>,
    epoch: Epoch,
}

/// Something to learn, and the way back to whoever waits for it.
#[derive(Debug)]
pub struct Lesson {
    /// What.
    pub learn: Learn,
    back: Back,
    /// Somebody waits for it: the worker is woken.
    waits: bool,
}

/// The way back to a worker.
#[derive(Clone)]
struct Back(Arc<(Sender<Learned>, Wake)>);

impl fmt::Debug for Back {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Back")
    }
}

/// The queue for all workers together. `capacity`: questions that may wait in it.
#[must_use]
pub fn lessons(capacity: usize) -> (Learners, Lessons) {
    let (sender, receiver) = bounded(capacity);
    let epoch = Epoch::default();
    let learners = Learners {
        asks: sender,
        epoch: epoch.clone(),
    };
    (
        learners,
        Lessons {
            asks: receiver,
            epoch,
        },
    )
}

impl Learners {
    /// The end of a worker that may have so many questions open. `wake` is called after something came back.
    #[must_use]
    pub fn learner(&self, limit: usize, wake: Wake) -> Learner {
        let (sender, answers) = bounded(limit);
        Learner {
            asks: self.asks.clone(),
            answers,
            back: Back(Arc::new((sender, wake))),
            open: 0,
            limit,
            later: VecDeque::with_capacity(LATER),
            epoch: self.epoch.clone(),
        }
    }
}

impl Learner {
    /// Asks. Allocates nothing and never waits.
    ///
    /// # Errors
    /// Gives the question back if there are too many, or nobody is there to answer any.
    pub fn ask(&mut self, learn: Learn) -> Result<(), Learn> {
        if self.open >= self.limit {
            return Err(learn);
        }
        let lesson = Lesson {
            learn,
            back: self.back.clone(),
            waits: true,
        };
        match self.asks.try_send(lesson) {
            Ok(()) => {
                self.open += 1;
                Ok(())
            }
            Err(TrySendError::Full(lesson) | TrySendError::Disconnected(lesson)) => Err(lesson.learn),
        }
    }

    /// Tells of an answer that teaches nothing new, by the next [`Learner::flush`] at the latest. Allocates nothing and
    /// never waits.
    ///
    /// # Errors
    /// Gives the answer back if too much waits already, or nobody is there to hear it.
    pub fn tell(&mut self, learn: Learn) -> Result<(), Learn> {
        if self.later.len() >= LATER {
            self.flush();
        }
        if self.open >= self.limit || self.later.len() >= LATER {
            return Err(learn);
        }
        self.later.push_back(Lesson {
            learn,
            back: self.back.clone(),
            waits: false,
        });
        self.open += 1;
        Ok(())
    }

    /// Whether [`Learner::flush`] has something to do.
    #[must_use]
    pub fn has_to_tell(&self) -> bool {
        !self.later.is_empty()
    }

    /// Tells what was to be told. What nobody can take now stays for the next time.
    pub fn flush(&mut self) {
        while let Some(lesson) = self.later.pop_front() {
            match self.asks.try_send(lesson) {
                Ok(()) => {}
                Err(TrySendError::Full(lesson) | TrySendError::Disconnected(lesson)) => {
                    self.later.push_front(lesson);
                    return;
                }
            }
        }
    }

    /// See [`crate::Sink::epoch`].
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch.now()
    }

    /// What has come back, if something has.
    pub fn take(&mut self) -> Option<Learned> {
        let learned = self.answers.try_recv().ok()?;
        self.open -= 1;
        Some(learned)
    }

    /// Whether something has come back.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        !self.answers.is_empty()
    }

    /// Questions that have not come back.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open
    }
}

impl Lessons {
    /// Waits for the next one. `Ok(None)`: none came in time.
    ///
    /// # Errors
    /// If there will never be another: nobody is left to ask.
    pub fn wait(&self, patience: std::time::Duration) -> Result<Option<Lesson>, Gone> {
        match self.asks.recv_timeout(patience) {
            Ok(lesson) => Ok(Some(lesson)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(Gone),
        }
    }

    /// For who takes something out of the maps.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch.clone()
    }

    /// The next one, if it is there.
    #[must_use]
    pub fn next_waiting(&self) -> Option<Lesson> {
        self.asks.try_recv().ok()
    }
}

/// Nobody is left to ask.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gone;

impl Lesson {
    /// Says what became of it. A worker that has ended meanwhile is not told.
    pub fn done(self, committed: bool, lease: Option<Lease>) {
        let Self { learn, back, waits } = self;
        let learned = learn.done(committed, lease);
        let (sender, wake) = &*back.0;
        // It has room for all that its worker may have open.
        if sender.try_send(learned).is_ok() && waits {
            wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use super::*;

    fn learn(ticket: u64) -> Learn {
        Learn {
            ticket,
            endpoint: 7,
            answer: Box::default(),
        }
    }

    #[test]
    fn what_teaches_nothing_new_is_told_later_and_wakes_nobody() {
        let (learners, lessons) = lessons(2);
        let woken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&woken);
        let wake = move || {
            count.fetch_add(1, Ordering::Relaxed);
        };
        let mut learner = learners.learner(LATER + 8, Arc::new(wake));
        learner.tell(learn(1)).unwrap();
        assert!(learner.has_to_tell() && lessons.next_waiting().is_none());
        learner.flush();
        assert!(!learner.has_to_tell());
        lessons.next_waiting().unwrap().done(true, None);
        assert!(learner.is_answered(), "its box comes back");
        assert_eq!(learner.take().unwrap().ticket, 1);
        assert_eq!((learner.open(), woken.load(Ordering::Relaxed)), (0, 0));
        // Nobody reads: what waits is bounded, and nothing of it is lost.
        let mut told = 0;
        while learner.tell(learn(told)).is_ok() {
            told += 1;
        }
        assert_eq!(told, LATER as u64 + 2, "those that wait, and those in the queue");
        assert_eq!(learner.open(), LATER + 2);
        let mut heard = Vec::new();
        while learner.open() > 0 {
            learner.flush();
            while let Some(lesson) = lessons.next_waiting() {
                heard.push(lesson.learn.ticket);
                lesson.done(true, None);
            }
            while learner.take().is_some() {}
        }
        assert_eq!(heard, (0..told).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_asked_comes_back_to_who_asked_and_wakes_it() {
        let (learners, lessons) = lessons(8);
        let woken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&woken);
        let mut one = learners.learner(
            2,
            Arc::new(move || {
                count.fetch_add(1, Ordering::Relaxed);
            }),
        );
        let mut other = learners.learner(2, Arc::new(|| {}));
        one.ask(learn(1)).unwrap();
        one.ask(learn(2)).unwrap();
        other.ask(learn(1)).unwrap();
        assert_eq!(one.ask(learn(3)).unwrap_err().ticket, 3, "two may be open");
        let first = lessons.wait(Duration::ZERO).unwrap().unwrap();
        assert_eq!((first.learn.ticket, first.learn.endpoint), (1, 7));
        first.done(true, None);
        let back = one.take().unwrap();
        assert_eq!(
            (
                back.ticket,
                back.committed,
                one.open(),
                woken.load(Ordering::Relaxed)
            ),
            (1, true, 1, 1)
        );
        assert!(one.take().is_none() && other.take().is_none());
        one.ask(learn(3)).unwrap();
        lessons.next_waiting().unwrap().done(false, None);
        assert!(!one.take().unwrap().committed);
        // a worker that has ended
        drop(other);
        lessons.next_waiting().unwrap().done(true, None);
        lessons.next_waiting().unwrap().done(true, None);
        assert_eq!(one.take().unwrap().ticket, 3);
        assert!(lessons.next_waiting().is_none());
    }

    #[test]
    fn nobody_waits_for_a_queue_that_is_full_or_gone() {
        let (learners, lessons) = lessons(1);
        let mut one = learners.learner(9, Arc::new(|| {}));
        one.ask(learn(1)).unwrap();
        assert!(one.ask(learn(2)).is_err());
        assert_eq!(one.open(), 1);
        drop(lessons);
        assert!(one.ask(learn(3)).is_err());
    }
}
