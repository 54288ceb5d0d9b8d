//! Errors of map operations.

use crate::sys::SyscallError;

/// Error of a map operation.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The map has no space for another entry.
    #[error("{map} map full: {present} of {max_entries} entries")]
    Full {
        /// Name of the map, in lower case.
        map: String,
        /// Number of entries.
        present: usize,
        /// Capacity, entries.
        max_entries: u32,
    },
    /// The system call failed.
    #[error("{map} map: {source}")]
    Syscall {
        /// Name of the map, in lower case.
        map: String,
        /// Failed system call.
        #[source]
        source: SyscallError,
    },
    /// The key or value size of the map differs from the size of the type in this program.
    #[error(
        "{map} map has keys of {key_size} and values of {value_size} bytes, this program wants {want_key} and \
         {want_value}: the BPF object and the daemon are of different versions"
    )]
    Layout {
        /// Name of the map, in lower case.
        map: String,
        /// Key size of the map, bytes.
        key_size: u32,
        /// Value size of the map, bytes.
        value_size: u32,
        /// Size of the key type, bytes.
        want_key: usize,
        /// Size of the value type, bytes.
        want_value: usize,
    },
}

impl MapError {
    /// Returns the map that is too small for the operation; `None` if the error has another cause.
    #[must_use]
    pub fn too_small(&self) -> Option<&str> {
        match self {
            Self::Full { map, .. } => Some(map),
            Self::Syscall { .. } | Self::Layout { .. } => None,
        }
    }
}
