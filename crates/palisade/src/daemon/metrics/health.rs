//! Answers of `/healthz` and `/readyz`.

use std::time::Duration;

use palisade_datapath::monotonic_coarse;
use serde_json::{Value, json};

use super::super::{handlers::Handlers, watchdog::hanging};

/// Duration from which a task of the control thread counts as a hang. A compilation of thousands of policies takes
/// seconds.
const CONTROL_HANG_TIMEOUT: Duration = Duration::from_secs(60);

/// State of the daemon, and what is wrong.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Health {
    pub(super) is_good: bool,
    pub(super) body: Value,
}

/// Returns whether the control thread and the workers are alive.
pub(super) fn alive(handlers: &Handlers) -> Health {
    let hangs = hanging(
        &handlers.activity,
        handlers.heartbeats.as_deref(),
        CONTROL_HANG_TIMEOUT,
        monotonic_coarse(),
    );
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
