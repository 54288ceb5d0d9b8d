//! Priority of the threads of the flow API.

use tracing::warn;

/// Added to the nice value (setpriority(2)) of the API's threads.
const NICE: i32 = 10;

/// Lowers the priority of the calling thread.
pub(super) fn lower_priority() {
    // Linux has a nice value for each thread. If it cannot be raised, the threads of the API have the
    // same priority as the others.
    if let Err(problem) = rustix::process::nice(NICE) {
        warn!(error = %problem, "the priority of a thread of the flow API cannot be lowered");
    }
}
