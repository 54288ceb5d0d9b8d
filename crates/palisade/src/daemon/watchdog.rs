//! Whether the daemon's threads still do their work, for `status` and for the service manager's watchdog.

use std::{
    fmt::Write as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use palisade_datapath::monotonic_coarse;
use sd_notify::NotifyState;
use tracing::{error, info, warn};

/// A worker whose last sign of life is older than this hangs. It says that it lives twenty times a second, and the programs take
/// it for dead after one second; the rest is for a machine that is overloaded.
const WORKER_HANG_TIMEOUT: Duration = Duration::from_secs(10);
/// Calls of the watchdog in each of its intervals: one late call does no harm.
const NOTIFICATIONS_PER_INTERVAL: u32 = 4;

/// What the control thread is at.
#[derive(Debug, Default)]
pub(super) struct ControlActivity(Mutex<Option<(Instant, &'static str)>>);

impl ControlActivity {
    /// It begins something.
    pub(super) fn begin(&self, what: &'static str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), what));
    }

    /// It waits for something to do.
    pub(super) fn rest(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// What it is at, and for how long.
    pub(super) fn busy(&self) -> Option<(Duration, &'static str)> {
        let busy = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        busy.map(|(since, what)| (since.elapsed(), what))
    }
}

/// When each worker has said last that it lives: coarse monotonic clock, ns; 0: it does not.
#[derive(Debug)]
pub(super) struct WorkerHeartbeats(Box<[AtomicU64]>);

impl WorkerHeartbeats {
    /// Returns the heartbeats of `workers` workers.
    pub(super) fn new(workers: usize) -> Self {
        Self((0..workers).map(|_| AtomicU64::new(0)).collect())
    }

    /// A worker lives, or does not (0).
    pub(super) fn heartbeat(&self, number: usize, now: u64) {
        if let Some(last) = self.0.get(number) {
            last.store(now, Ordering::Relaxed);
        }
    }

    /// Workers that live and have been silent for too long. One that has ended for a reason that is known is none of
    /// them: it starts again by itself.
    pub(super) fn silent(&self, now: u64) -> Vec<(usize, Duration)> {
        let silent = self.0.iter().enumerate().filter_map(|(number, last)| {
            let last = last.load(Ordering::Relaxed);
            let for_long = Duration::from_nanos(now.saturating_sub(last));
            (last != 0 && for_long > WORKER_HANG_TIMEOUT).then_some((number, for_long))
        });
        silent.collect()
    }
}

/// What hangs, in words; `None`: nothing does.
pub(super) fn hanging(
    activity: &ControlActivity,
    heartbeats: Option<&WorkerHeartbeats>,
    patience: Duration,
    now: u64,
) -> Option<String> {
    let mut text = String::new();
    if let Some((since, what)) = activity.busy()
        && since > patience
    {
        let _ = write!(text, "the control thread has been busy for {since:.0?} ({what})");
    }
    for (number, since) in heartbeats
        .map(|heartbeats| heartbeats.silent(now))
        .unwrap_or_default()
    {
        let comma = if text.is_empty() { "" } else { "; " };
        let _ = write!(text, "{comma}worker {number} has been silent for {since:.0?}");
    }
    (!text.is_empty()).then_some(text)
}

/// Tells the service manager that the daemon lives, as often as it wants to be told (`WatchdogSec=`), for as long as
/// nothing hangs. It ends and restarts a daemon that does not say so.
pub(super) fn feed_watchdog(
    activity: Arc<ControlActivity>,
    heartbeats: Option<Arc<WorkerHeartbeats>>,
) -> std::io::Result<()> {
    let Some(interval) = sd_notify::watchdog_enabled() else {
        return Ok(());
    };
    thread::Builder::new().name("watchdog".into()).spawn(move || {
        let mut told = None;
        loop {
            let hangs = hanging(&activity, heartbeats.as_deref(), interval, monotonic_coarse());
            match &hangs {
                None => {
                    if told.is_some() {
                        info!("nothing hangs any more");
                    }
                    if let Err(problem) = sd_notify::notify(&[NotifyState::Watchdog]) {
                        warn!("telling the service manager: {problem}");
                    }
                }
                Some(hangs) if told.is_none() => {
                    error!(
                        "{hangs}: the service manager is not told that the daemon lives, and will restart it"
                    );
                }
                Some(_) => {}
            }
            told = hangs;
            thread::sleep(interval / NOTIFICATIONS_PER_INTERVAL);
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hangs_is_named_and_what_only_works_or_has_ended_is_not() {
        let second = Duration::from_secs(1).as_nanos() as u64;
        let (activity, heartbeats) = (ControlActivity::default(), WorkerHeartbeats::new(3));
        let hangs = |patience, now| hanging(&activity, Some(&heartbeats), patience, now);
        let now = 1_000 * second;
        heartbeats.heartbeat(0, now);
        heartbeats.heartbeat(1, now - 30 * second);
        heartbeats.heartbeat(1, 0);
        assert_eq!(hangs(Duration::ZERO, now), None);
        activity.begin("reading policies");
        assert_eq!(hangs(Duration::from_secs(60), now), None);
        thread::sleep(Duration::from_millis(2));
        let text = hangs(Duration::from_millis(1), now + 11 * second).unwrap();
        assert!(
            text.contains("the control thread")
                && text.contains("reading policies")
                && text.contains("worker 0"),
            "{text}"
        );
        assert!(!text.contains("worker 1") && !text.contains("worker 2"), "{text}");
        activity.rest();
        heartbeats.heartbeat(0, now + 11 * second);
        assert_eq!(hangs(Duration::ZERO, now + 12 * second), None);
    }
}
