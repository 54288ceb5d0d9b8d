//! What the packet path and the policy compiler cost, measured so that the figures can be made again.
//!
//! `scripts/bench` runs everything and writes `bench/results/`. Each measure takes its variants in turn, again and
//! again, so that whatever else the machine does meets all of them, and reports medians. Traffic only flows in
//! network namespaces that the measure has made.
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
pub mod latency;
pub mod machine;
pub mod memory;
pub mod parsers;
pub mod policies;
pub mod program;
pub mod punt;
pub mod report;
pub mod traffic;
pub mod web;
pub mod wire;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Fewer and shorter samples, fewer sizes.
    pub quick: bool,
}

impl Effort {
    /// One of two values.
    pub fn pick<T>(self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// Says what is being done.
pub fn progress(text: std::fmt::Arguments<'_>) {
    eprintln!("bench: {text}");
}
