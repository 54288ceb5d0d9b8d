//! Workloads that are found without an `[[endpoint]]` of the configuration: what sources report (named network
//! namespaces, Docker, containerd, CNI) becomes endpoints with labels. No I/O: the daemon reads the sources and the
//! interfaces.
//!
//! ```text
//! /run/netns, engines, CNI ──> Workload ─ find ─ Rule (mapping), Taken (configuration) ──> Found, Problem
//! ```
//!
//! Start at [`find`]. [`Wildcard`], [`InterfacePattern`] and [`Template`] are options of `[[discover]]`.

#![forbid(unsafe_code)]

pub mod cni;
pub mod containerd;
pub mod docker;
mod find;
mod initial;
mod interface_pattern;
mod label;
mod labelled;
mod own_address;
mod template;
mod wildcard;
mod workload;

pub use find::{Outcome, Problem, Taken, find};
pub use interface_pattern::InterfacePattern;
pub use label::{MAX_KEY_BYTES, MAX_VALUE_BYTES, check_key, check_value};
pub use labelled::Labelled;
pub use template::{Subject, Template};
pub use wildcard::Wildcard;
pub use workload::{
    Found, Interface, LabelTemplate, Link, MAX_ADDRESSES, MAX_LABELS, Rule, Unknown, Workload,
};
