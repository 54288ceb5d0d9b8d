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
//! Depends on `palisade-abi`. Start at [`compile::Compiler`]; its input are the [`rule`] types that [`parse`] makes, its
//! output a [`snapshot::Snapshot`], from one of which to the next [`plan::plan`] leads.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![warn(unreachable_pub)]

pub mod cases;
pub mod classes;
pub mod compile;
mod conflict;
pub mod diagnostic;
pub mod identity;
pub mod l7;
pub mod labels;
pub mod lookup;
pub mod names;
pub mod parse;
pub mod path;
pub mod plan;
pub mod rule;
mod select;
pub mod snapshot;
mod table;
pub mod trace;
pub mod world;
