//! What the crate does, seen from outside.

mod filters;
mod lines;
mod ring;
mod world;
