//! Access to the maps: by bytes where sizes are known at run time only, by type everywhere else.
//!
//! Sizes are checked once, when a map is opened; after that a buffer of the wrong size cannot be made.

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
