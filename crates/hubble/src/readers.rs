//! The streams that are open. Their number is bounded, and a stream that is not read for `STALL_DEADLINE` does not
//! count any more: it has lost its place.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tonic::Status;

use crate::connection::{ConnectionId, OpenStream};

/// Time without any progress after which a stream counts as abandoned.
const STALL_DEADLINE: Duration = Duration::from_secs(60);

/// Counters of readers, for reports.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Streams of flows and events that are open.
    pub readers: usize,
    /// Events that readers lost because they were too slow.
    pub lost: u64,
    /// Readers that were refused because there were too many.
    pub refused: u64,
    /// Readers that were ended because they did not read.
    pub cut: u64,
}

#[derive(Debug)]
struct Entry {
    /// Time of the last progress, ms since `Readers::start`.
    progress: AtomicU64,
    /// Whether the stream has lost its place.
    cut: AtomicBool,
    connection: Option<ConnectionId>,
    /// Held until the stream ends.
    _open: Option<OpenStream>,
}

#[derive(Debug, Default)]
struct Lists {
    active: Vec<Arc<Entry>>,
    /// Streams that have lost their place and are still open, the oldest first. The stream of a peer that grants no
    /// HTTP/2 window cannot be ended alone.
    abandoned: Vec<Arc<Entry>>,
}

/// All open streams.
#[derive(Debug)]
pub(crate) struct Readers {
    start: Instant,
    most: usize,
    lists: Mutex<Lists>,
    pub(crate) lost: AtomicU64,
    refused: AtomicU64,
    cut: AtomicU64,
}

impl Readers {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            start: Instant::now(),
            most,
            lists: Mutex::default(),
            lost: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            cut: AtomicU64::new(0),
        })
    }

    /// Returns the place of a new stream.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` if there are too many streams.
    pub(crate) fn enter(self: &Arc<Self>, connection: Option<ConnectionId>) -> Result<Place, Status> {
        let mut lists = self.lists();
        if lists.active.len() >= self.most {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Err(Status::resource_exhausted(format!(
                "{} clients read flows or events already ([hubble] max_readers); end one of them",
                self.most
            )));
        }
        let entry = Arc::new(Entry {
            progress: AtomicU64::new(self.elapsed(Instant::now())),
            cut: AtomicBool::new(false),
            _open: connection.as_ref().map(ConnectionId::open),
            connection,
        });
        lists.active.push(Arc::clone(&entry));
        drop(lists);
        Ok(Place {
            readers: Arc::clone(self),
            entry,
        })
    }

    pub(crate) fn counts(&self) -> Counts {
        Counts {
            readers: self.lists().active.len(),
            lost: self.lost.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            cut: self.cut.load(Ordering::Relaxed),
        }
    }

    /// Takes the place of each stream without progress since [`STALL_DEADLINE`]. If too many such streams are open, the
    /// connections of the oldest ones are closed.
    pub(crate) fn sweep(&self, now: Instant) {
        let stall = u64::try_from(STALL_DEADLINE.as_millis()).unwrap_or(u64::MAX);
        let now = self.elapsed(now);
        let mut lists = self.lists();
        let Lists { active, abandoned } = &mut *lists;
        let stalled = active.extract_if(.., |entry| {
            now.saturating_sub(entry.progress.load(Ordering::Relaxed)) > stall
        });
        for entry in stalled {
            entry.cut.store(true, Ordering::Relaxed);
            self.cut.fetch_add(1, Ordering::Relaxed);
            abandoned.push(entry);
        }
        let excess = abandoned.len().saturating_sub(self.most);
        for entry in abandoned.drain(..excess) {
            if let Some(connection) = &entry.connection {
                connection.close();
            }
        }
    }

    fn elapsed(&self, now: Instant) -> u64 {
        let elapsed = now.saturating_duration_since(self.start);
        u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
    }

    fn lists(&self) -> MutexGuard<'_, Lists> {
        // A poisoned lock is used all the same: no code under it leaves the lists half changed if it panics.
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of one stream among those that count; free again when the value is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    readers: Arc<Readers>,
    entry: Arc<Entry>,
}

impl Place {
    /// Notes that the stream is being read.
    ///
    /// # Errors
    /// `DEADLINE_EXCEEDED` if the stream has lost its place.
    pub(crate) fn progress(&self) -> Result<(), Status> {
        if self.entry.cut.load(Ordering::Relaxed) {
            return Err(Status::deadline_exceeded(format!(
                "the client has read nothing for {} s",
                STALL_DEADLINE.as_secs()
            )));
        }
        let now = self.readers.elapsed(Instant::now());
        self.entry.progress.store(now, Ordering::Relaxed);
        Ok(())
    }

    /// Counts events that the stream has lost.
    pub(crate) fn lost(&self, count: u64) {
        self.readers.lost.fetch_add(count, Ordering::Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut lists = self.readers.lists();
        lists.active.retain(|entry| !Arc::ptr_eq(entry, &self.entry));
        lists.abandoned.retain(|entry| !Arc::ptr_eq(entry, &self.entry));
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn the_number_of_readers_is_bounded() {
        let readers = Readers::new(2);
        let first = readers.enter(None).unwrap();
        let _second = readers.enter(None).unwrap();
        let refused = readers.enter(None).unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        drop(first);
        let _third = readers.enter(None).unwrap();
        let counts = readers.counts();
        assert_eq!((counts.readers, counts.refused), (2, 1));
    }

    #[test]
    fn a_reader_that_does_not_read_loses_its_place() {
        let readers = Readers::new(1);
        let connections: Vec<_> = (0..3).map(|_| ConnectionId::default()).collect();
        let mut silent = Vec::new();
        for (round, connection) in (1_u64..).zip(&connections) {
            let place = readers.enter(Some(connection.clone())).unwrap();
            readers.sweep(Instant::now());
            assert!(place.progress().is_ok());
            readers.sweep(Instant::now() + STALL_DEADLINE + Duration::from_secs(1));
            assert_eq!(place.progress().unwrap_err().code(), Code::DeadlineExceeded);
            assert_eq!(readers.counts().cut, round);
            silent.push(place);
        }
        // One abandoned stream may stay; the connections of the older ones are closed.
        let closed: Vec<_> = connections.iter().map(ConnectionId::is_closed).collect();
        assert_eq!(closed, [true, true, false]);
        drop(silent);
        assert_eq!(readers.counts().readers, 0);
        assert!(readers.lists().abandoned.is_empty());
    }
}
