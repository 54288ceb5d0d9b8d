//! `palisade`: the daemon and its command line.
#![forbid(unsafe_code)]
mod config;
mod control;
mod duration;
mod table;
fn main() {}
