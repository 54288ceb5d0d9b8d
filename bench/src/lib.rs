//! Cost of the packet path and of the policy compiler, in measures that can be repeated.
//!
//! `scripts/bench` runs all of them and writes `bench/results/`. Each measure runs its variants in turn, many times, so
//! that other load on the machine affects all of them, and reports medians. Traffic stays in network namespaces that the
//! measure has made.
//!
//! Depends on the crates that it measures and on `palisade-testbed`. Start at `main.rs`, which lists the measures.
#![allow(unsafe_code, reason = "a counting allocator")]

pub mod bulk;
pub mod commit;
pub mod compile;
pub mod dns;
pub mod footprint;
pub mod forward;
pub mod http;
pub mod intercept;
pub mod kafka;
pub mod latency;
pub mod machine;
pub mod memory;
pub mod parsers;
pub mod policies;
pub mod program;
pub mod punt;
pub mod replay;
pub mod report;
mod tls_path;
pub mod traffic;
pub mod visibility;
pub mod web;
pub mod wire;

/// The size of a run.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Fewer and shorter samples, fewer sizes.
    pub quick: bool,
}

impl Effort {
    /// Returns one of two values.
    pub fn pick<T>(self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// Prints what is being measured.
pub fn progress(text: std::fmt::Arguments<'_>) {
    eprintln!("bench: {text}");
}
