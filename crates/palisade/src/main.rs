//! `palisade`: the daemon and its command line.
#![forbid(unsafe_code)]
mod config;
mod duration;
fn main() {}
