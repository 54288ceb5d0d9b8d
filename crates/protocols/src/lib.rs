//! Parsers of application protocols: DNS, HTTP/1, HTTP/2, TLS hellos and Kafka.
//!
//! The input comes from the network, so an attacker can craft it. The parsers do no I/O, read no clock and do not
//! panic. They refuse malformed or ambiguous input with an error that has a text and a counter of its own.
//!
//! This crate depends on `palisade-model` for the type of patterns. Start at [`dns::Query`] and [`dns::Answer`],
//! [`http1::Request`], [`http2::Frames`], [`kafka::Request`], [`tls::ClientReader`].
#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::string_slice
)]
#![warn(unreachable_pub)]

pub mod dns;
pub mod http1;
pub mod http2;
pub mod kafka;
pub mod tls;
