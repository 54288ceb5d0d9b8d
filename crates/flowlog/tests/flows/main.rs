//! Tests of the public interface of the crate.

mod filters;
mod golden;
mod http;
mod lines;
mod records;
mod ring;
mod tls;
mod world;
