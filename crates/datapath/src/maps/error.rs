//! Errors of map operations.

use crate::sys::SyscallError;

/// An operation on a map that failed.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// No room for another entry.
    #[error("{map} map full: {present} of {max_entries} entries")]
    Full {
        /// The map, in lower case.
        map: String,
        /// Entries in it.
        present: usize,
        /// Its size.
        max_entries: u32,
    },
    /// The kernel refused.
    #[error("{map} map: {source}")]
    Syscall {
        /// The map.
        map: String,
        /// What it said.
        #[source]
        source: SyscallError,
    },
    /// The object and this code do not agree about a map.
    #[error(
        "{map} map has keys of {key_size} and values of {value_size} bytes, this program wants {want_key} and \
         {want_value}: the BPF object and the daemon are of different versions"
    )]
    Layout {
        /// The map.
        map: String,
        /// Its size of keys.
        key_size: u32,
        /// Its size of values.
        value_size: u32,
        /// What the type has.
        want_key: usize,
        /// What the type has.
        want_value: usize,
    },
}

impl MapError {
    /// Returns the map that has to be larger for the operation to succeed, if that is the cause.
    #[must_use]
    pub fn too_small(&self) -> Option<&str> {
        match self {
            Self::Full { map, .. } => Some(map),
            Self::Syscall { .. } | Self::Layout { .. } => None,
        }
    }
}
