//! What the crate does, seen from outside.

mod filters;
mod http;
mod lines;
mod records;
mod ring;
mod tls;
mod world;
