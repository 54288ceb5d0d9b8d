//! Counters and memory of the cache, for `status` and metrics.

use serde::Serialize;

/// Counters of the cache. The unit is (name, address) pairs, except for `special`, `superseded` and `aborted`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize)]
pub struct Stats {
    /// Pairs that were added.
    pub learned: u64,
    /// Pairs that the cache already had when an answer contained them.
    pub refreshed: u64,
    /// Pairs that were evicted because of a limit.
    pub evicted: u64,
    /// Pairs that were not added because of a limit.
    pub refused: u64,
    /// Addresses that were not learned because they are special-purpose addresses (RFC 6890).
    pub special: u64,
    /// Pairs that were removed because they had expired and were unused.
    pub expired: u64,
    /// Pairs that an operator has removed.
    pub cleaned: u64,
    /// Answers that were not forwarded because one of their addresses was removed before the commit.
    pub superseded: u64,
    /// Answers that the caller aborted ([`crate::Cache::abort`]).
    pub aborted: u64,
}

/// Number of entries in the cache, and an estimate of their memory from the capacities of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize)]
pub struct Memory {
    /// Number of endpoints.
    pub endpoints: usize,
    /// Number of names of all endpoints.
    pub names: usize,
    /// Number of (name, address) pairs.
    pub addresses: usize,
    /// Number of (endpoint, selector, address) triples.
    pub triples: usize,
    /// Memory, bytes.
    pub bytes: usize,
}
