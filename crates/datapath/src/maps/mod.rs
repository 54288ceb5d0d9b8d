//! Access to the maps: by bytes where key and value sizes are known only at run time, typed everywhere else.
//!
//! The key and value sizes of a map are compared with those of the types once, when the map is opened. The system calls
//! are sound only if the sizes match.

mod error;
mod mmap;
mod percpu;
mod raw;
mod typed;

pub use error::MapError;
pub(crate) use mmap::{Classes, Endpoints, Heartbeats, Shared};
pub(crate) use percpu::PerCpuArray;
pub(crate) use raw::{RawMap, check_layout, possible_cpus};
pub(crate) use typed::Map;
