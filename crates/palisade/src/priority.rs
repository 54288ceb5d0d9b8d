//! Priority of what only shows flows: threads of the flow API, of clients that read flows and of exports, and commands
//! that follow flows. On a busy node they get the CPU time that inspection leaves. If that is too little, they lose
//! flows and report how many.

use tracing::warn;

/// Added to the nice value (setpriority(2)).
const NICE: i32 = 10;

/// Lowers the priority of the calling thread, and of threads that it starts afterwards.
pub(crate) fn lower() {
    // Linux has a nice value for each thread. If it cannot be raised, the thread has the same priority as the others.
    if let Err(problem) = rustix::process::nice(NICE) {
        warn!(error = %problem, "the priority of a thread that reads flows cannot be lowered");
    }
}
