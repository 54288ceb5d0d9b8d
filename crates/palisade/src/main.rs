//! `palisade`: the daemon and its command line.
#![forbid(unsafe_code)]
mod cli;
mod config;
mod control;
mod daemon;
mod duration;
mod table;
fn main() {}
