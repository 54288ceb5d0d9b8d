//! System calls that this crate makes without aya: bpf(2) for maps, pins and links, and netlink.

pub(crate) mod bpf;
pub(crate) mod clsact;
pub(crate) mod ethtool;
pub(crate) mod link;
pub(crate) mod netlink;
pub(crate) mod nft;
pub(crate) mod route;

use std::io;

/// Failed system call.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {io_error}")]
pub struct SyscallError {
    /// Name of the call, with its command and object.
    pub call: String,
    /// Error of the kernel.
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

    /// Returns the error number; 0 if the error does not come from the kernel.
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.io_error.raw_os_error().unwrap_or(0)
    }
}

/// Returns the release of the running kernel; empty without /proc.
pub(crate) fn kernel_release() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
}
