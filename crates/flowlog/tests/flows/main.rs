//! Tests of the public interface of the crate.

mod filters;
mod http;
mod lines;
mod records;
mod ring;
mod tls;
mod world;
