//! DNS over UDP through the engine: what becomes of each packet, and why.

#[path = "../common/mod.rs"]
mod common;

mod datagrams;
mod fragments;
mod histories;
mod rule_sets;
mod streams;
