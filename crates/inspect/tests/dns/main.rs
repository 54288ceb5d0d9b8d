//! DNS through the engine: the verdict and reason of each packet.

#[path = "../common/mod.rs"]
mod common;

mod datagrams;
mod fragments;
mod histories;
mod rule_sets;
mod streams;
