//! Reports in the flow ring about flows that were lost before it: the programs found the BPF ring buffer full, or the
//! queue of records was full. Start at [`watch`].

use std::{
    io,
    sync::Arc,
    thread,
    time::{Duration, SystemTime},
};

use palisade_datapath::Datapath;
use palisade_flowlog::{Lost, LostSource, Ring, Timestamp};
use palisade_worker::Counters;
use tracing::warn;

use super::interception;
use crate::priority;

/// Interval between two reads of the counters.
const INTERVAL: Duration = Duration::from_secs(1);
/// Shortest time between two lines of the log about losses, in intervals.
const LOG_INTERVALS: u32 = 60;

/// Starts the thread that reads the counters of lost events and records.
pub(super) fn watch(
    ring: Arc<Ring>,
    datapath: Arc<Datapath>,
    workers: Vec<Arc<Counters>>,
    intercepted: Arc<interception::View>,
) -> io::Result<()> {
    thread::Builder::new().name("losses".into()).spawn(move || {
        priority::lower();
        let events = || {
            let unsent = datapath.counters().unsent_events();
            unsent.map(|unsent| unsent.iter().map(|(.., budget)| budget.lost).sum())
        };
        let records = || {
            let of_workers: u64 = workers.iter().map(|worker| worker.records_lost.get()).sum();
            of_workers + intercepted.records_lost()
        };
        let mut losses = Losses::new(events().ok());
        loop {
            thread::sleep(INTERVAL);
            let now = Timestamp::from_system_time(SystemTime::now());
            losses.report(&ring, events().ok(), records(), now);
        }
    })?;
    Ok(())
}

/// The counters of losses, and when the log has last named one.
struct Losses {
    in_programs: Since,
    in_queues: Since,
    /// Intervals without a line of the log.
    quiet: u32,
}

impl Losses {
    /// `events`: lost events so far; `None` if the map cannot be read.
    const fn new(events: Option<u64>) -> Self {
        Self {
            // The map has the counts of earlier daemons. If it cannot be read now, the first read that succeeds counts.
            in_programs: Since::new(events),
            in_queues: Since::new(Some(0)),
            quiet: 0,
        }
    }

    /// Adds a report to the ring for each counter that has grown. `events`: lost events so far, `None` if the map cannot
    /// be read; `records`: lost records so far.
    fn report(&mut self, ring: &Ring, events: Option<u64>, records: u64, now: Timestamp) {
        let losses = [
            (
                LostSource::PerfEventRingBuffer,
                events.and_then(|total| self.in_programs.advance(total)),
            ),
            (LostSource::ObserverEventsQueue, self.in_queues.advance(records)),
        ];
        self.quiet = self.quiet.saturating_sub(1);
        for (source, count) in losses {
            let Some(count) = count else { continue };
            ring.push_lost(Lost { source, count }, now);
            if self.quiet == 0 {
                warn!(
                    component = "flows",
                    count,
                    source = source.as_ref(),
                    "flows are lost before the flow ring; no verdict is affected"
                );
                self.quiet = LOG_INTERVALS;
            }
        }
    }
}

/// A counter that only grows, and its last value.
struct Since(Option<u64>);

impl Since {
    const fn new(last: Option<u64>) -> Self {
        Self(last)
    }

    /// Returns by how much the counter has grown since the last call, unless that is 0 or unknown.
    fn advance(&mut self, total: u64) -> Option<u64> {
        let last = self.0.replace(total)?;
        total.checked_sub(last).filter(|grown| *grown > 0)
    }
}

#[cfg(test)]
mod tests {
    use palisade_flowlog::Next;

    use super::*;

    #[test]
    fn both_counters_are_reported_to_the_readers_of_the_ring() {
        let ring = Ring::new(16);
        let mut reader = ring.follow();
        // The counts of an earlier daemon are no losses of this one.
        let mut losses = Losses::new(Some(40));
        for (events, records) in [
            (Some(40), 0),
            (Some(47), 0),
            (None, 3),
            (Some(49), 3),
            (Some(50), 8),
        ] {
            losses.report(&ring, events, records, Timestamp(1));
        }
        let (programs, queues) = (LostSource::PerfEventRingBuffer, LostSource::ObserverEventsQueue);
        for (source, count) in [
            (programs, 7),
            (queues, 3),
            (programs, 2),
            (programs, 1),
            (queues, 5),
        ] {
            assert_eq!(reader.read(), Some(Next::Lost(Lost { source, count })));
        }
        assert_eq!(reader.read(), None);
    }

    #[test]
    fn only_the_growth_of_a_counter_is_reported() {
        let mut since = Since::new(None);
        assert_eq!(since.advance(5), None);
        assert_eq!(since.advance(5), None);
        assert_eq!(since.advance(12), Some(7));
        // A worker that restarts begins at zero.
        assert_eq!(since.advance(2), None);
        assert_eq!(since.advance(3), Some(1));
    }
}
