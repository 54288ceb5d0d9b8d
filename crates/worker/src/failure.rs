//! The failure that ended a run of a worker. `palisade status` shows the failure until the worker runs again.

use std::io;

use thiserror::Error;

/// The failure that ended a run of a worker.
#[derive(Debug, Error)]
pub enum Failure {
    /// The socket could not be made, or failed.
    #[error(transparent)]
    Socket(#[from] io::Error),
    /// The worker panicked with this message.
    #[error("panic: {0}")]
    Panic(String),
}
