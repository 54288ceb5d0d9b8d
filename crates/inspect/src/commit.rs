//! The queues between the workers and the thread that writes learned addresses to the maps. [`CommitRequest`]s go to
//! that thread, [`CommitResult`]s go back to the workers.
//!
//! All workers share one queue of requests. Each worker has its own queue of results. All these queues are bounded, and
//! no sender blocks: a request that does not fit is returned, and every result fits, because a worker has at most as
//! many requests open as its queue of results can hold.
//!
//! Depends on `crossbeam-channel`. Start at [`commit_queue`].

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};

use palisade_protocols::dns::Answer;

use crate::Millis;

/// Request to write the addresses of an answer to the maps before the answer is forwarded; or a refresh, which requests
/// a new lease for addresses that are in the maps already.
#[derive(Debug)]
pub struct CommitRequest {
    /// The engine's number of the request. [`CommitResult`] repeats it.
    pub ticket: u64,
    /// Number of the endpoint that learns the addresses.
    pub endpoint: u16,
    /// The answer. [`CommitResult`] returns its allocation for reuse.
    pub answer: Box<Answer>,
}

impl CommitRequest {
    /// Returns the result of this request.
    #[must_use]
    pub fn done(self, committed: bool, lease: Option<Lease>) -> CommitResult {
        CommitResult {
            ticket: self.ticket,
            endpoint: self.endpoint,
            committed,
            lease,
            answer: self.answer,
        }
    }
}

/// Result of a [`CommitRequest`].
#[derive(Debug)]
pub struct CommitResult {
    /// Number of the request.
    pub ticket: u64,
    /// Number of the endpoint that learns the addresses.
    pub endpoint: u16,
    /// Whether every address of the answer is in the maps. If not, the answer must not be forwarded.
    pub committed: bool,
    /// Lease of the addresses; `None` if they can leave the maps at any time.
    pub lease: Option<Lease>,
    /// The answer of the request, whose allocation can be reused.
    pub answer: Box<Answer>,
}

/// Time for which the addresses of a committed answer stay in the maps, and the epoch in which this holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Time for which the addresses stay in the maps unless the epoch ends before, ms.
    pub good_for: Millis,
    /// Epoch of the lease: see [`crate::Sink::epoch`].
    pub epoch: u64,
}

/// Callback that wakes a sleeping worker after a result was queued for the worker.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// Maximum number of a worker's refreshes that wait for [`Committer::flush`].
const MAX_REFRESHES: usize = 64;

/// Sending end of the queue of requests. Creates a [`Committer`] for each worker.
#[derive(Clone, Debug)]
pub struct CommitQueue {
    requests: Sender<CommitTask>,
    epoch: Epoch,
}

/// Receiving end of the queue of requests.
#[derive(Debug)]
pub struct CommitReceiver {
    requests: Receiver<CommitTask>,
    epoch: Epoch,
}

/// A counter whose increment ends all leases. The thread that writes the maps increments it when a learned address
/// leaves them before its lease ends; workers compare it with the epoch of a lease.
#[derive(Clone, Debug, Default)]
pub struct Epoch(Arc<AtomicU64>);

impl Epoch {
    /// Returns the current epoch.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Begins the next epoch.
    pub fn end(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// A worker's ends of the queue of requests and of its queue of results.
#[derive(Debug)]
pub struct Committer {
    requests: Sender<CommitTask>,
    results: Receiver<CommitResult>,
    back: ReplyPath,
    open: usize,
    limit: usize,
    /// Refreshes that are sent as a batch, so that the receiver is not woken for each of them.
    refreshes: VecDeque<CommitTask>,
    epoch: Epoch,
}

/// A request, and the queue for its result.
#[derive(Debug)]
pub struct CommitTask {
    /// The request.
    pub request: CommitRequest,
    back: ReplyPath,
    /// Whether the result wakes the worker. The result of a refresh does not, because no answer is held for it.
    wakes: bool,
}

/// Queue of a worker's results.
#[derive(Clone)]
struct ReplyPath(Arc<(Sender<CommitResult>, Wake)>);

impl fmt::Debug for ReplyPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReplyPath")
    }
}

/// Returns both ends of the queue of requests. `capacity`: maximum number of queued requests.
#[must_use]
pub fn commit_queue(capacity: usize) -> (CommitQueue, CommitReceiver) {
    let (sender, receiver) = bounded(capacity);
    let epoch = Epoch::default();
    let queue = CommitQueue {
        requests: sender,
        epoch: epoch.clone(),
    };
    (
        queue,
        CommitReceiver {
            requests: receiver,
            epoch,
        },
    )
}

impl CommitQueue {
    /// Returns a worker's ends of the queue of requests and of its queue of results. The worker may have `limit`
    /// requests open. `wake` is called after a result was queued, unless the result belongs to a refresh.
    #[must_use]
    pub fn committer(&self, limit: usize, wake: Wake) -> Committer {
        let (sender, results) = bounded(limit);
        Committer {
            requests: self.requests.clone(),
            results,
            back: ReplyPath(Arc::new((sender, wake))),
            open: 0,
            limit,
            refreshes: VecDeque::with_capacity(MAX_REFRESHES),
            epoch: self.epoch.clone(),
        }
    }
}

impl Committer {
    /// Sends a request. Does not allocate or block.
    ///
    /// # Errors
    /// Returns the request if too many requests are open, the queue is full, or the receiver has ended.
    pub fn submit(&mut self, request: CommitRequest) -> Result<(), CommitRequest> {
        if self.open >= self.limit {
            return Err(request);
        }
        let task = CommitTask {
            request,
            back: self.back.clone(),
            wakes: true,
        };
        match self.requests.try_send(task) {
            Ok(()) => {
                self.open += 1;
                Ok(())
            }
            Err(TrySendError::Full(task) | TrySendError::Disconnected(task)) => Err(task.request),
        }
    }

    /// Requests a new lease for an answer whose addresses are in the maps. The request is sent by the next
    /// [`Committer::flush`]. Does not allocate or block.
    ///
    /// # Errors
    /// Returns the request if too many requests are open, or too many refreshes wait for [`Committer::flush`].
    pub fn refresh(&mut self, request: CommitRequest) -> Result<(), CommitRequest> {
        if self.refreshes.len() >= MAX_REFRESHES {
            self.flush();
        }
        if self.open >= self.limit || self.refreshes.len() >= MAX_REFRESHES {
            return Err(request);
        }
        self.refreshes.push_back(CommitTask {
            request,
            back: self.back.clone(),
            wakes: false,
        });
        self.open += 1;
        Ok(())
    }

    /// Returns whether refreshes wait to be sent.
    #[must_use]
    pub fn has_refreshes(&self) -> bool {
        !self.refreshes.is_empty()
    }

    /// Sends the refreshes. Those for which the queue has no room wait for the next call.
    pub fn flush(&mut self) {
        while let Some(task) = self.refreshes.pop_front() {
            match self.requests.try_send(task) {
                Ok(()) => {}
                Err(TrySendError::Full(task) | TrySendError::Disconnected(task)) => {
                    self.refreshes.push_front(task);
                    return;
                }
            }
        }
    }

    /// Returns the current epoch: see [`crate::Sink::epoch`].
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch.now()
    }

    /// Returns the next result, if there is one.
    pub fn take(&mut self) -> Option<CommitResult> {
        let result = self.results.try_recv().ok()?;
        self.open -= 1;
        Some(result)
    }

    /// Returns whether a result is queued.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        !self.results.is_empty()
    }

    /// Returns the number of requests whose result was not taken yet.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open
    }
}

impl CommitReceiver {
    /// Waits for the next request. Returns `None` after the timeout.
    ///
    /// # Errors
    /// [`QueueClosed`] if all workers have ended.
    pub fn wait(&self, timeout: std::time::Duration) -> Result<Option<CommitTask>, QueueClosed> {
        match self.requests.recv_timeout(timeout) {
            Ok(task) => Ok(Some(task)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(QueueClosed),
        }
    }

    /// Returns the epoch, for the thread that removes addresses from the maps.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch.clone()
    }

    /// Returns the next request, if there is one.
    #[must_use]
    pub fn next_waiting(&self) -> Option<CommitTask> {
        self.requests.try_recv().ok()
    }
}

/// Error: all workers have ended, so no request will follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueClosed;

impl CommitTask {
    /// Queues the result for its worker. Discards it if the worker has ended.
    pub fn done(self, committed: bool, lease: Option<Lease>) {
        let Self { request, back, wakes } = self;
        let result = request.done(committed, lease);
        let (sender, wake) = &*back.0;
        // The queue of results cannot be full, because it has room for every open request of its worker.
        if sender.try_send(result).is_ok() && wakes {
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

    fn request(ticket: u64) -> CommitRequest {
        CommitRequest {
            ticket,
            endpoint: 7,
            answer: Box::default(),
        }
    }

    #[test]
    fn a_refresh_is_sent_by_flush_and_its_result_wakes_no_worker() {
        let (queue, receiver) = commit_queue(2);
        let woken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&woken);
        let wake = move || {
            count.fetch_add(1, Ordering::Relaxed);
        };
        let mut committer = queue.committer(MAX_REFRESHES + 8, Arc::new(wake));
        committer.refresh(request(1)).unwrap();
        assert!(committer.has_refreshes() && receiver.next_waiting().is_none());
        committer.flush();
        assert!(!committer.has_refreshes());
        receiver.next_waiting().unwrap().done(true, None);
        assert!(
            committer.is_answered(),
            "the result returns the box of the answer"
        );
        assert_eq!(committer.take().unwrap().ticket, 1);
        assert_eq!((committer.open(), woken.load(Ordering::Relaxed)), (0, 0));
        // While the receiver takes no request, the number of refreshes is bounded, and none is lost.
        let mut accepted = 0;
        while committer.refresh(request(accepted)).is_ok() {
            accepted += 1;
        }
        assert_eq!(
            accepted,
            MAX_REFRESHES as u64 + 2,
            "unsent refreshes, and those in the queue"
        );
        assert_eq!(committer.open(), MAX_REFRESHES + 2);
        let mut received = Vec::new();
        while committer.open() > 0 {
            committer.flush();
            while let Some(task) = receiver.next_waiting() {
                received.push(task.request.ticket);
                task.done(true, None);
            }
            while committer.take().is_some() {}
        }
        assert_eq!(received, (0..accepted).collect::<Vec<_>>());
    }

    #[test]
    fn a_result_goes_to_the_worker_of_its_request_and_wakes_it() {
        let (queue, receiver) = commit_queue(8);
        let woken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&woken);
        let mut one = queue.committer(
            2,
            Arc::new(move || {
                count.fetch_add(1, Ordering::Relaxed);
            }),
        );
        let mut other = queue.committer(2, Arc::new(|| {}));
        one.submit(request(1)).unwrap();
        one.submit(request(2)).unwrap();
        other.submit(request(1)).unwrap();
        assert_eq!(
            one.submit(request(3)).unwrap_err().ticket,
            3,
            "at most two requests are open"
        );
        let first = receiver.wait(Duration::ZERO).unwrap().unwrap();
        assert_eq!((first.request.ticket, first.request.endpoint), (1, 7));
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
        one.submit(request(3)).unwrap();
        receiver.next_waiting().unwrap().done(false, None);
        assert!(!one.take().unwrap().committed);
        // The second worker has ended.
        drop(other);
        receiver.next_waiting().unwrap().done(true, None);
        receiver.next_waiting().unwrap().done(true, None);
        assert_eq!(one.take().unwrap().ticket, 3);
        assert!(receiver.next_waiting().is_none());
    }

    #[test]
    fn a_full_or_closed_queue_does_not_block() {
        let (queue, receiver) = commit_queue(1);
        let mut one = queue.committer(9, Arc::new(|| {}));
        one.submit(request(1)).unwrap();
        assert!(one.submit(request(2)).is_err());
        assert_eq!(one.open(), 1);
        drop(receiver);
        assert!(one.submit(request(3)).is_err());
    }
}
