//! Policies as people write them, to the table of verdicts that the BPF programs look up.
//!
//! ```text
//! YAML ── parse ──> rule::Policy ── compile ──> Snapshot ── plan ──> Op… ── datapath ──> BPF maps
//!         (FILE:LINE:COL errors)    (selectors, identities, (an order in which
//!                                    precedence)             no packet notices)
//! ```
//!
//! Pure: no I/O, no maps, no clock. The same compiler answers `palisade policy test` and fills the maps.
//!
//! Depends on `palisade-model`, which holds the types at both ends, and on `palisade-protocols` for the paths and
//! regular expressions of HTTP rules. Start at [`compile::Compiler`]: its input are the
//! [`rule`](palisade_model::rule) types that [`parse`] makes, its output is a
//! [`Snapshot`](palisade_model::snapshot::Snapshot). [`plan::plan`] leads from one snapshot to the next.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![warn(unreachable_pub)]

pub mod cases;
pub mod classes;
pub mod compile;
pub mod identity;
pub mod l7;
pub mod parse;
pub mod plan;
pub mod suggest;
pub mod trace;
