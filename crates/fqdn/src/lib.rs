//! Names -> addresses: what an answer allows an endpoint to reach, and for how long.
//!
//! [`Cache`] holds what the endpoints have learned, each for itself: an address that one endpoint was told opens
//! nothing for another. Its output are [`Change`]s: (endpoint, selector, address) becomes reachable, or stops
//! being so. The promise is that no answer is released before the maps hold everything it implies; so
//! [`Cache::learn`] gives a [`Pending`], and only [`Cache::commit`] turns it into the [`Committed`] that whoever
//! releases the answer must ask for.
//!
//! [`Tracker`] knows which questions are open, so that an unsolicited answer is never parsed.
//!
//! Nothing here does I/O or looks at a clock: time is a parameter, in milliseconds of one monotonic clock.
//!
//! Depends on `palisade-protocols` (names, answers) and `palisade-policy` (patterns).
#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::string_slice
)]
#![warn(unreachable_pub)]

mod cache;
mod change;
mod endpoint;
mod saved;
mod selectors;
mod sni_index;
mod special;
mod stats;
mod track;

pub use cache::{Cache, CachedAddress, CachedName, Config};
pub use change::{Change, ChangeKind, Committed, Pending, Uncommitted, Update};
pub use saved::{SavedAddress, SavedName};
pub use selectors::{SelectorId, Selectors};
pub use sni_index::SniAddressIndex;
pub use special::{ListedPrefixes, Special, is_special, is_special_prefix};
pub use stats::{Memory, Stats};
pub use track::{Flow, OpenQuestion, TrackLimits, Tracker, Unsolicited};

/// Milliseconds of one monotonic clock.
pub type Millis = u64;

/// Number of an endpoint, as the maps know it.
pub type EndpointId = u16;
