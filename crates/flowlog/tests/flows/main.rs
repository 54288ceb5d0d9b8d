//! What the crate does, seen from outside.

mod filters;
mod lines;
mod records;
mod ring;
mod world;
