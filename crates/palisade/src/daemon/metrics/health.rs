//! Answers of `/healthz` and `/readyz`.

use std::time::Duration;

use serde_json::{Value, json};

use super::super::watchdog::{ControlActivity, WorkerHeartbeats, hanging};

/// Duration from which a task of the control thread counts as a hang. A compilation of thousands of policies takes
/// seconds.
const CONTROL_HANG_TIMEOUT: Duration = Duration::from_secs(60);

/// State of the daemon, and what is wrong.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Health {
    pub(super) is_good: bool,
    pub(super) body: Value,
}

/// Returns whether the control thread and the workers are alive. `heartbeats`: `None` without workers; `now`: coarse
/// monotonic clock, ns.
pub(super) fn alive(activity: &ControlActivity, heartbeats: Option<&WorkerHeartbeats>, now: u64) -> Health {
    let hangs = hanging(activity, heartbeats, CONTROL_HANG_TIMEOUT, now);
    health(hangs.into_iter().collect(), "alive", "hanging")
}

/// Returns whether everything is attached and in force. `missing`: what is not.
pub(super) fn ready(missing: Vec<String>) -> Health {
    health(missing, "ready", "not ready")
}

fn health(missing: Vec<String>, good: &str, bad: &str) -> Health {
    let is_good = missing.is_empty();
    Health {
        is_good,
        body: json!({ "status": if is_good { good } else { bad }, "missing": missing }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_without_a_heartbeat_is_not_alive() {
        const SECOND: u64 = 1_000_000_000;
        let (activity, heartbeats) = (ControlActivity::default(), WorkerHeartbeats::new(2));
        heartbeats.heartbeat(0, 100 * SECOND);
        heartbeats.heartbeat(1, 109 * SECOND);
        // A task that has just begun is no hang.
        activity.begin("reading policies");
        let good = json!({"status": "alive", "missing": []});
        for (heartbeats, now) in [(Some(&heartbeats), 109), (None, 1_000)] {
            let health = alive(&activity, heartbeats, now * SECOND);
            assert_eq!((health.is_good, &health.body), (true, &good));
        }
        let health = alive(&activity, Some(&heartbeats), 112 * SECOND);
        let bad = json!({"status": "hanging", "missing": ["worker 0 has written no heartbeat for 12s"]});
        assert_eq!((health.is_good, health.body), (false, bad));
        // A worker that has ended starts again by itself.
        heartbeats.heartbeat(0, 0);
        assert!(alive(&activity, Some(&heartbeats), 112 * SECOND).is_good);
    }
}
