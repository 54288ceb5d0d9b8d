//! Detects threads that hang, for `status` and for the service manager's watchdog.

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

/// Age of the last heartbeat at which a worker is reported as hanging. Workers write a heartbeat every 50 ms, and the
/// programs stop punting after one second; the rest is tolerance for an overloaded machine.
const WORKER_HANG_TIMEOUT: Duration = Duration::from_secs(10);
/// Notifications in each watchdog interval. With four, one late notification does not cause a restart.
const NOTIFICATIONS_PER_INTERVAL: u32 = 4;
/// Interval of the watchdog during a planned restart, in which the new program starts: `TimeoutStartSec=` of the unit.
const RESTART_INTERVAL: Duration = Duration::from_mins(5);

/// Task of the control thread and its start; `None` while the thread waits for a message.
#[derive(Debug, Default)]
pub(super) struct ControlActivity(Mutex<Option<(Instant, &'static str)>>);

impl ControlActivity {
    /// Notes the beginning of a task.
    pub(super) fn begin(&self, what: &'static str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), what));
    }

    /// Notes that the thread waits for a message.
    pub(super) fn rest(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Returns the current task and its duration.
    pub(super) fn busy(&self) -> Option<(Duration, &'static str)> {
        let busy = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        busy.map(|(since, what)| (since.elapsed(), what))
    }
}

/// Time of the last heartbeat of each worker: coarse monotonic clock, ns; 0 while the worker does not run.
#[derive(Debug)]
pub(super) struct WorkerHeartbeats(Box<[AtomicU64]>);

impl WorkerHeartbeats {
    /// Returns the heartbeats of `workers` workers.
    pub(super) fn new(workers: usize) -> Self {
        Self((0..workers).map(|_| AtomicU64::new(0)).collect())
    }

    /// Sets the last heartbeat of a worker; `now` is 0 when the worker has ended.
    pub(super) fn heartbeat(&self, number: usize, now: u64) {
        if let Some(last) = self.0.get(number) {
            last.store(now, Ordering::Relaxed);
        }
    }

    /// Returns the workers that run and have written no heartbeat for [`WORKER_HANG_TIMEOUT`], each with the age of its
    /// last heartbeat. Ended workers are left out, because they start again by themselves.
    pub(super) fn silent(&self, now: u64) -> Vec<(usize, Duration)> {
        let silent = self.0.iter().enumerate().filter_map(|(number, last)| {
            let last = last.load(Ordering::Relaxed);
            let for_long = Duration::from_nanos(now.saturating_sub(last));
            (last != 0 && for_long > WORKER_HANG_TIMEOUT).then_some((number, for_long))
        });
        silent.collect()
    }
}

/// Returns a text that names the hanging threads; `None` if there are none. `timeout`: duration from which a task of
/// the control thread counts as a hang.
pub(super) fn hanging(
    activity: &ControlActivity,
    heartbeats: Option<&WorkerHeartbeats>,
    timeout: Duration,
    now: u64,
) -> Option<String> {
    let mut text = String::new();
    if let Some((since, what)) = activity.busy()
        && since > timeout
    {
        let _ = write!(text, "the control thread has been busy for {since:.0?} ({what})");
    }
    for (number, since) in heartbeats
        .map(|heartbeats| heartbeats.silent(now))
        .unwrap_or_default()
    {
        let comma = if text.is_empty() { "" } else { "; " };
        let _ = write!(
            text,
            "{comma}worker {number} has written no heartbeat for {since:.0?}"
        );
    }
    (!text.is_empty()).then_some(text)
}

/// Lengthens the interval of the service manager's watchdog for a planned restart. Without that, a start that takes longer
/// than `WatchdogSec=`, as the unit permits, would be killed.
pub(super) fn allow_for_restart() {
    if sd_notify::watchdog_enabled().is_some() {
        set_interval(RESTART_INTERVAL);
    }
}

fn set_interval(interval: Duration) {
    // More than 71 minutes do not fit.
    let micros = u32::try_from(interval.as_micros()).unwrap_or(u32::MAX);
    notify(&[NotifyState::WatchdogUsec(micros), NotifyState::Watchdog]);
}

/// Notifies systemd, if it started the daemon.
pub(super) fn notify(states: &[NotifyState<'_>]) {
    if let Err(problem) = sd_notify::notify(states) {
        warn!(error = %problem, "the service manager cannot be notified");
    }
}

/// Starts the thread that notifies the service manager's watchdog (`WatchdogSec=`) while no thread hangs. The service
/// manager restarts a daemon that stops notifying.
pub(super) fn feed_watchdog(
    activity: Arc<ControlActivity>,
    heartbeats: Option<Arc<WorkerHeartbeats>>,
) -> std::io::Result<()> {
    let Some(interval) = sd_notify::watchdog_enabled() else {
        return Ok(());
    };
    // The program before has lengthened it if this is a planned restart.
    set_interval(interval);
    thread::Builder::new().name("watchdog".into()).spawn(move || {
        let mut told = None;
        loop {
            let hangs = hanging(&activity, heartbeats.as_deref(), interval, monotonic_coarse());
            match &hangs {
                None => {
                    if told.is_some() {
                        info!("no thread hangs any more");
                    }
                    notify(&[NotifyState::Watchdog]);
                }
                Some(hangs) if told.is_none() => {
                    error!(
                        threads = hangs,
                        "a thread hangs; the watchdog is not notified, so the service manager will restart the daemon"
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
    fn only_hanging_threads_are_reported() {
        let second = Duration::from_secs(1).as_nanos() as u64;
        let (activity, heartbeats) = (ControlActivity::default(), WorkerHeartbeats::new(3));
        let hangs = |timeout, now| hanging(&activity, Some(&heartbeats), timeout, now);
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
