//! Priority of threads and commands that only report flows: threads of the flow API, of clients that read flows and of
//! exports, and commands that follow flows. On a busy node they get the CPU time that the packet path leaves. If that
//! is too little, they lose flows and report how many.

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    thread,
    time::{Duration, Instant},
};

use palisade_xsk::schedule::set_batch;
use tracing::warn;

/// Nice value (setpriority(2)): the lowest priority. Beside one thread that always runs, a thread of this nice value gets
/// about 1.5 % of a CPU.
const NICE: i32 = 19;
/// EEVDF slice. A thread of normal priority that becomes runnable may have to wait for the end of the slice.
const SLICE: Duration = Duration::from_micros(100);
/// Time over which [`Pace`] measures, and of which it leaves [`BUSY_WORK`] to the thread.
const PERIOD: Duration = Duration::from_millis(100);
/// Time over which [`Pace`] measures while the CPUs are busy. A thread that works 1 ms of [`PERIOD`] often does not have to
/// wait in it, so a measure as short would lift the limit several times a second.
const BUSY_MEASURE: Duration = Duration::from_secs(2);
/// Time per [`PERIOD`] for which a thread works while the CPUs are busy.
const BUSY_WORK: Duration = Duration::from_millis(1);
/// The kernel's counters of the calling thread: time running and time waiting for a CPU, ns, and number of time slices.
const SCHEDULING_FILE: &str = "/proc/thread-self/schedstat";

/// Lowers the priority of the calling thread, and of threads that it starts afterwards.
///
/// `SCHED_IDLE` would give other threads more, but it is too low: threads of the daemon share locks with the threads of
/// events and records, and a command that gets no CPU for the write deadline of the control socket is disconnected.
pub(crate) fn lower() {
    // If the priority cannot be lowered, the thread has the same as the others.
    if let Err(problem) = set_batch(NICE, SLICE) {
        warn!(error = %problem, "the priority of a thread that reads flows cannot be lowered");
    }
}

/// Limits the CPU time of the calling thread while the CPUs are busy.
///
/// A low priority is not enough: the kernel still wakes a thread of the packet path on the CPU of a thread of low
/// priority, where it waits for the end of the slice. The time for which this thread itself has waited for a CPU shows
/// that the CPUs are busy.
pub(crate) struct Pace {
    /// `None` if the kernel does not count the times: then the thread is never limited.
    times: Option<File>,
    /// Time running and waiting at the begin of the measure, ns.
    before: [u64; 2],
    measure: Instant,
    period: Instant,
    /// Since when the thread works without a rest.
    work: Instant,
    is_busy: bool,
}

impl Pace {
    /// Must be called by the thread that works.
    pub(crate) fn new() -> Self {
        let times = File::open(SCHEDULING_FILE).ok();
        let now = Instant::now();
        Self {
            before: times.as_ref().and_then(read).unwrap_or_default(),
            times,
            measure: now,
            period: now,
            work: now,
            is_busy: false,
        }
    }

    /// Returns whether the thread should [`Self::rest`] now.
    pub(crate) fn is_over(&self) -> bool {
        self.is_busy && self.work.elapsed() >= BUSY_WORK
    }

    /// Sleeps for the rest of the period if the CPUs are busy. Returns whether they are.
    pub(crate) fn rest(&mut self) -> bool {
        if self.is_busy {
            thread::sleep(PERIOD.saturating_sub(self.period.elapsed()));
        }
        let over = if self.is_busy { BUSY_MEASURE } else { PERIOD };
        if self.measure.elapsed() >= over
            && let Some(now) = self.times.as_ref().and_then(read)
        {
            self.is_busy = is_busy(self.is_busy, self.before, now);
            self.before = now;
            self.measure = Instant::now();
        }
        if self.period.elapsed() >= PERIOD {
            self.period = Instant::now();
        }
        self.work = Instant::now();
        self.is_busy
    }
}

fn read(file: &File) -> Option<[u64; 2]> {
    let mut buffer = [0; 96];
    let length = file.read_at(&mut buffer, 0).ok()?;
    parse(std::str::from_utf8(buffer.get(..length)?).ok()?)
}

fn parse(text: &str) -> Option<[u64; 2]> {
    let mut numbers = text.split_ascii_whitespace().map(str::parse);
    Some([numbers.next()?.ok()?, numbers.next()?.ok()?])
}

/// Returns whether the CPUs are busy: a thread has waited for a CPU for more than half of the time for which it has run.
/// If they were busy before (`was_busy`), more than a tenth suffices, since a thread that is limited waits less.
const fn is_busy(was_busy: bool, before: [u64; 2], now: [u64; 2]) -> bool {
    let (ran, waited) = (now[0].saturating_sub(before[0]), now[1].saturating_sub(before[1]));
    waited > ran / if was_busy { 10 } else { 2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpus_are_busy_if_a_thread_waits_more_than_half_of_the_time_that_it_runs() {
        assert_eq!(parse("1200 34 5\n"), Some([1_200, 34]));
        assert_eq!(parse("x 34 5"), None);
        assert!(!is_busy(false, [0, 0], [100, 50]));
        assert!(is_busy(false, [1_000, 500], [1_100, 551]));
        // A thread that did not run.
        assert!(!is_busy(false, [7, 7], [7, 7]));
    }

    #[test]
    fn the_cpus_stay_busy_while_a_thread_waits_more_than_a_tenth_of_the_time_that_it_runs() {
        assert!(is_busy(true, [0, 0], [100, 11]));
        assert!(!is_busy(true, [0, 0], [100, 10]));
        assert!(!is_busy(true, [7, 7], [7, 7]));
    }

    #[test]
    fn a_thread_is_limited_only_while_the_cpus_are_busy() {
        let mut pace = Pace::new();
        assert!(pace.times.is_some() && !pace.is_over());
        pace.is_busy = true;
        pace.work = Instant::now() - BUSY_WORK;
        assert!(pace.is_over());
        // The time until the end of the period, in which the thread runs but hardly waits. That does not lift the limit yet.
        let begun = pace.period;
        assert!(pace.rest());
        assert!(begun.elapsed() >= PERIOD);
        // Over the longer time it does.
        pace.measure = Instant::now() - BUSY_MEASURE;
        pace.before = [u64::MAX; 2];
        assert!(!pace.rest());
        pace.work = Instant::now() - 2 * PERIOD;
        assert!(!pace.is_over());
        // A kernel that does not count the times.
        pace.times = None;
        assert!(!pace.rest());
    }
}
