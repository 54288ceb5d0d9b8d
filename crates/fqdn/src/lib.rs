//! The addresses that endpoints learn from DNS answers, and for how long these addresses are allowed.
//!
//! [`Cache`] stores learned addresses per endpoint: an address that one endpoint has learned is not allowed for
//! another. The cache outputs [`Change`]s: a selector allows, or no longer allows, an endpoint to reach an address. An
//! answer must not be forwarded before the maps hold all of its changes. Therefore [`Cache::learn`] returns a
//! [`Pending`], and only [`Cache::commit`] turns it into a [`Committed`], which the caller needs to forward the answer.
//!
//! [`Tracker`] stores the open questions, so that the caller can drop answers that match none of them.
//!
//! This crate does no I/O and reads no clock: all times are parameters, in ms of one monotonic clock.
//!
//! ```
//! use std::net::{IpAddr, Ipv4Addr};
//!
//! use palisade_fqdn::{Cache, Config};
//! use palisade_protocols::dns::{Address, Answer, CLASS_IN, Question, Source, rtype};
//!
//! let ip = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
//! let answer = Answer {
//!     question: Some(Question { name: "example.com".parse()?, rtype: rtype::A, class: CLASS_IN }),
//!     addresses: vec![Address { ip, ttl: 300, source: Source::Record }],
//!     ttl: Some(300),
//!     ..Answer::default()
//! };
//!
//! let (endpoint, now) = (7, 0);
//! let mut cache = Cache::new(Config::default());
//! let pending = cache.learn(endpoint, &answer, now);
//! for change in pending.changes() {
//!     // Write the change to the maps.
//! }
//! let committed = cache.commit(pending)?;
//! // Now forward the answer.
//! assert!(cache.has(endpoint, ip));
//! assert!(!cache.has(8, ip));
//! # let _ = committed;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! This crate depends on `palisade-protocols` (names, answers) and `palisade-model` (patterns).
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
pub use track::{Flow, HandedOverQuestion, OpenQuestion, QuestionKey, TrackLimits, Tracker, Unsolicited};

/// A time or a duration on the caller's monotonic clock, ms.
pub type Millis = u64;

/// Number of an endpoint, as in the maps.
pub type EndpointId = u16;
