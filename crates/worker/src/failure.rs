//! Why a worker stopped. `status` shows it until the worker runs again.

use std::io;

use thiserror::Error;

/// Why a worker stopped.
#[derive(Debug, Error)]
pub enum Failure {
    /// Its socket could not be made, or failed.
    #[error(transparent)]
    Socket(#[from] io::Error),
    /// It panicked with this message.
    #[error("panic: {0}")]
    Panic(String),
}
