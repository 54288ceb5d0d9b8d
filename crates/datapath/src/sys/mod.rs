//! The system calls that aya has no words for: bpf(2) beyond loading, and netlink.

pub(crate) mod bpf;
pub(crate) mod clsact;
pub(crate) mod link;
pub(crate) mod netlink;
pub(crate) mod nft;

use std::io;

/// A system call that failed.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {io_error}")]
pub struct SyscallError {
    /// The call, with its command and what it was about.
    pub call: String,
    /// What the kernel answered.
    #[source]
    pub io_error: io::Error,
}

impl SyscallError {
    pub(crate) fn last(call: impl Into<String>) -> Self {
        Self {
            call: call.into(),
            io_error: io::Error::last_os_error(),
        }
    }

    pub(crate) fn new(call: impl Into<String>, io_error: io::Error) -> Self {
        Self {
            call: call.into(),
            io_error,
        }
    }

    /// The error number, 0 if the error is not one of the kernel's.
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.io_error.raw_os_error().unwrap_or(0)
    }
}

/// The release of the running kernel.
pub(crate) fn kernel_release() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
}
