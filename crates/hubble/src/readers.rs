//! The streams that are open. Their number is bounded, and a stream that is not read for `STALL_DEADLINE` does not
//! count any more: it has lost its place. A new stream takes the place of one of the client that has the most.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tonic::Status;

use crate::{
    connection::{ConnectionId, OpenStream},
    origin::{Origin, greediest},
};

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
    /// Readers that were ended because they did not read, or in favour of other clients.
    pub cut: u64,
}

/// A stream has its place.
const PLACED: u8 = 0;
/// A stream has lost its place since its client did not read.
const STALLED: u8 = 1;
/// A stream has lost its place in favour of another client.
const DISPLACED: u8 = 2;

#[derive(Debug)]
struct Entry {
    /// Time of the last progress, ms since `Readers::start`.
    progress: AtomicU64,
    /// Whether the stream has lost its place, and why.
    lost_place: AtomicU8,
    connection: Option<ConnectionId>,
    /// Held until the stream ends.
    _open: Option<OpenStream>,
}

impl Entry {
    fn origin(&self) -> Origin {
        self.connection
            .as_ref()
            .map(ConnectionId::origin)
            .unwrap_or_default()
    }

    fn is_of(&self, connection: &ConnectionId) -> bool {
        self.connection.as_ref().is_some_and(|own| own.is(connection))
    }
}

#[derive(Debug, Default)]
struct Lists {
    active: Vec<Arc<Entry>>,
    /// Streams that have lost their place and are still open, the oldest first. The stream of a peer that grants no
    /// HTTP/2 window cannot be ended alone.
    abandoned: Vec<Arc<Entry>>,
}

impl Lists {
    /// Returns the newest stream of the connection with the most streams of an origin; `None` if the connection of the
    /// newcomer would then have as many.
    fn greedy_connection(&self, origin: Origin, newcomer: Option<&ConnectionId>) -> Option<usize> {
        let streams = |connection: &ConnectionId| {
            let entries = self.active.iter();
            entries.filter(|entry| entry.is_of(connection)).count()
        };
        let own = newcomer.map(streams).unwrap_or_default();
        let of_origin = self.active.iter().enumerate();
        let of_origin = of_origin.filter(|(_, entry)| entry.origin() == origin);
        let counted = of_origin.filter_map(|(at, entry)| Some((streams(entry.connection.as_ref()?), at)));
        // The last one of those with the most.
        let (most, at) = counted.max()?;
        (most > own + 1).then_some(at)
    }
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
        if lists.active.len() >= self.most && !self.displace(&mut lists, connection.as_ref()) {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Err(Status::resource_exhausted(format!(
                "{} clients read flows or events already ([hubble] max_readers); end one of them",
                self.most
            )));
        }
        let entry = Arc::new(Entry {
            progress: AtomicU64::new(self.elapsed(Instant::now())),
            lost_place: AtomicU8::new(PLACED),
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

    /// Takes the place of the newest stream of the origin with the most streams, or, if that is the origin of
    /// `newcomer`, of its connection with the most. Returns false if that would leave it fewer streams than the newcomer.
    fn displace(&self, lists: &mut Lists, newcomer: Option<&ConnectionId>) -> bool {
        let origin = newcomer.map(ConnectionId::origin).unwrap_or_default();
        let from = match greediest(lists.active.iter().map(|entry| entry.origin()), origin) {
            Some(greedy) => lists.active.iter().rposition(|entry| entry.origin() == greedy),
            None => lists.greedy_connection(origin, newcomer),
        };
        let Some(from) = from else {
            return false;
        };
        let entry = lists.active.remove(from);
        entry.lost_place.store(DISPLACED, Ordering::Relaxed);
        self.cut.fetch_add(1, Ordering::Relaxed);
        lists.abandoned.push(entry);
        self.close_excess(lists);
        true
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
            entry.lost_place.store(STALLED, Ordering::Relaxed);
            self.cut.fetch_add(1, Ordering::Relaxed);
            abandoned.push(entry);
        }
        self.close_excess(&mut lists);
    }

    /// Closes the connections of the oldest streams without a place that are still open, if there are too many.
    fn close_excess(&self, lists: &mut Lists) {
        let excess = lists.abandoned.len().saturating_sub(self.most);
        for entry in lists.abandoned.drain(..excess) {
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
    /// `DEADLINE_EXCEEDED` or `RESOURCE_EXHAUSTED` if the stream has lost its place.
    pub(crate) fn progress(&self) -> Result<(), Status> {
        match self.entry.lost_place.load(Ordering::Relaxed) {
            PLACED => {}
            DISPLACED => {
                return Err(Status::resource_exhausted(format!(
                    "another client with fewer streams has taken the place of this one: {} are read at a time ([hubble] \
                     max_readers)",
                    self.readers.most
                )));
            }
            _ => {
                return Err(Status::deadline_exceeded(format!(
                    "the client has read nothing for {} s",
                    STALL_DEADLINE.as_secs()
                )));
            }
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
    fn the_client_with_the_most_streams_makes_room() {
        let readers = Readers::new(4);
        let from = |number: i32| ConnectionId::new(Origin::Process(number));
        let (greedy, other) = (from(1), from(2));
        let enter = |connection: &ConnectionId| readers.enter(Some(connection.clone()));
        let held: Vec<_> = (0..4).map(|_| enter(&greedy).unwrap()).collect();
        assert!(enter(&greedy).is_err());
        let first = enter(&other).unwrap();
        let second = enter(&other).unwrap();
        // The newest streams of the first process have lost their places.
        let codes: Vec<_> = held
            .iter()
            .map(|place| place.progress().map_err(|status| status.code()))
            .collect();
        let lost = Err(Code::ResourceExhausted);
        assert_eq!(codes, [Ok(()), Ok(()), lost, lost]);
        assert!(first.progress().is_ok() && second.progress().is_ok());
        assert!(enter(&other).is_err() && enter(&greedy).is_err());
        assert_eq!(readers.counts().readers, 4);
        // Within one process, a connection with fewer streams gets a place.
        let (again, fresh) = (from(1), from(1));
        drop((first, second, held));
        let _held: Vec<_> = (0..4).map(|_| enter(&again).unwrap()).collect();
        let _fresh = enter(&fresh).unwrap();
        let _fresh = (enter(&fresh).unwrap(), _fresh);
        assert!(enter(&fresh).is_err());
        // Streams that are never read again do not gather without end.
        assert!(readers.lists().abandoned.len() <= 4);
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
