//! Counters and memory of the cache, for `status` and metrics.

use serde::Serialize;

/// What has happened so far, in addresses of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize)]
pub struct Stats {
    /// Learned anew.
    pub learned: u64,
    /// Told again.
    pub refreshed: u64,
    /// Removed because of a limit.
    pub evicted: u64,
    /// Not learned because of a limit, everything being in use.
    pub refused: u64,
    /// Not learned because they are special-purpose addresses (RFC 6890).
    pub special: u64,
    /// Removed after they expired and were seen unused.
    pub expired: u64,
    /// Removed by an operator.
    pub cleaned: u64,
    /// Answers that could not be released, because an address of theirs was removed before.
    pub superseded: u64,
    /// Answers that were aborted.
    pub aborted: u64,
}

/// What the cache holds, and what that takes. The bytes are computed from the capacities of its tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize)]
pub struct Memory {
    /// Endpoints.
    pub endpoints: usize,
    /// Names, of all endpoints.
    pub names: usize,
    /// Addresses of names.
    pub addresses: usize,
    /// (endpoint, selector, address).
    pub triples: usize,
    /// Bytes.
    pub bytes: usize,
}
