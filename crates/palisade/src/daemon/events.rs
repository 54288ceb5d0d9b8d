//! Reads the event ring of the programs and the records of the workers into the flow ring.

use std::{
    io,
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use palisade_datapath::{Clock, EventReader};
use palisade_flowlog::{Flow, Resolver, Ring, Timestamp};
use palisade_worker::{Receiver, RecvError, TimedRecord};
use tracing::error;

use super::{
    record_queue,
    view::{EventNames, Shared},
};

/// Maximum number of events between two checks for a new view.
const MAX_BATCH: usize = 512;
/// Time without a new record after which the records in the ring are converted to flow records.
const SETTLE_IDLE_TIME: Duration = Duration::from_millis(20);
/// Age at which records are converted to flow records even while new records arrive.
const MAX_UNSETTLED_AGE: Duration = Duration::from_secs(1);
/// Longest sleep of the thread that takes records.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Age at which the offset between the monotonic and the wall clock is read again.
const MAX_CLOCK_AGE: Duration = Duration::from_secs(1);

/// Starts the thread that reads events. Returns the counter of events that the thread increments.
pub(super) fn read(
    mut reader: EventReader,
    ring: Arc<Ring>,
    shared: Arc<Shared>,
) -> io::Result<Arc<AtomicU64>> {
    let count = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&count);
    thread::Builder::new().name("events".into()).spawn(move || {
        let mut names = EventNames::with_units(shared.get());
        let mut clock = (clock_offset(), Instant::now());
        loop {
            let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
            if let Err(problem) = poll(&mut fds, PollTimeout::NONE)
                && problem != nix::errno::Errno::EINTR
            {
                error!(error = %problem, "the event ring cannot be polled");
                thread::sleep(Duration::from_secs(1));
            }
            loop {
                let view = shared.get();
                if !names.is_of(&view) {
                    names = EventNames::with_units(view);
                }
                if clock.1.elapsed() > MAX_CLOCK_AGE {
                    clock = (clock_offset(), Instant::now());
                }
                let read = reader.drain(MAX_BATCH, |event| {
                    ring.push(Flow::from_event(event, &names, clock.0));
                });
                counter.fetch_add(read as u64, Ordering::Relaxed);
                if read < MAX_BATCH {
                    break;
                }
            }
        }
    })?;
    Ok(count)
}

/// A queue of records with one reader.
pub(super) trait RecordQueue: Send + 'static {
    /// Waits for a record, at most `timeout`.
    ///
    /// # Errors
    /// [`RecvError`] if no record arrived in time, or all senders are gone.
    fn recv_timeout(&self, timeout: Duration) -> Result<TimedRecord, RecvError>;
    /// Returns a record that has arrived.
    fn try_next(&self) -> Option<TimedRecord>;
}

impl RecordQueue for Receiver<TimedRecord> {
    fn recv_timeout(&self, timeout: Duration) -> Result<TimedRecord, RecvError> {
        Self::recv_timeout(self, timeout)
    }

    fn try_next(&self) -> Option<TimedRecord> {
        self.try_recv().ok()
    }
}

impl RecordQueue for record_queue::Receiver<TimedRecord> {
    fn recv_timeout(&self, timeout: Duration) -> Result<TimedRecord, RecvError> {
        Self::recv_timeout(self, timeout)
    }

    fn try_next(&self) -> Option<TimedRecord> {
        self.try_recv().ok()
    }
}

/// Starts the thread that moves records of workers or of proxy threads into the flow ring. The thread ends with them.
///
/// The ring converts a record to a flow record when a client reads it. This thread converts the remaining records: when
/// the view changes, with the names of the old view; when no record arrives; and at intervals, because names of
/// addresses expire.
pub(super) fn records(records: impl RecordQueue, ring: Arc<Ring>, shared: Arc<Shared>) -> io::Result<()> {
    thread::Builder::new().name("records".into()).spawn(move || {
        let mut view = shared.get();
        let mut names: Resolver = Arc::new(EventNames::with_units(Arc::clone(&view)));
        // Time since which the ring has records that are not converted yet.
        let mut unsettled: Option<Instant> = None;
        loop {
            let timeout = if unsettled.is_some() {
                SETTLE_IDLE_TIME
            } else {
                IDLE_TIMEOUT
            };
            let first = records.recv_timeout(timeout);
            if matches!(first, Err(RecvError::Disconnected)) {
                ring.settle(Timestamp::MAX);
                return;
            }
            let now = Timestamp::from_system_time(SystemTime::now());
            let now_view = shared.get();
            let changed = !Arc::ptr_eq(&view, &now_view);
            if unsettled.is_some() && (changed || first.is_err()) {
                ring.settle(Timestamp::MAX);
                unsettled = None;
            } else if unsettled.is_some_and(|since| since.elapsed() > MAX_UNSETTLED_AGE) {
                // Under load newer records overwrite older ones before those reach this age, so this call converts few
                // records.
                ring.settle(now.before(MAX_UNSETTLED_AGE));
                unsettled = Some(Instant::now());
            }
            if changed {
                view = now_view;
                names = Arc::new(EventNames::with_units(Arc::clone(&view)));
            }
            let others = std::iter::from_fn(|| records.try_next()).take(MAX_BATCH);
            for (time, record) in first.into_iter().chain(others) {
                ring.push_record(&record, &names, Timestamp::from_system_time(time));
                unsettled.get_or_insert_with(Instant::now);
            }
        }
    })?;
    Ok(())
}

/// Returns the time since 1970 minus the time of the monotonic clock, ns.
pub(super) fn clock_offset() -> i64 {
    let zero = Clock::now().wall(0);
    match zero.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => -i64::try_from(before.duration().as_nanos()).unwrap_or(i64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_offset_yields_the_wall_clock() {
        let monotonic = i64::try_from(palisade_datapath::monotonic_coarse()).unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        let off = i128::from(monotonic + clock_offset()) - i128::try_from(now).unwrap();
        assert!(off.abs() < 1_000_000_000, "{off}");
    }
}
