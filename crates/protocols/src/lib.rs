//! Parsers of application protocols: bytes in, facts out.
//!
//! Every byte here comes from the network and is hostile. Nothing in this crate does I/O, looks at a clock or
//! panics on input; what a parser does not take, it refuses with a kind that has a text and can be counted.
//!
//! Depends on `palisade-policy` for the types of patterns and paths. Start at [`dns::Query`] and [`dns::Answer`],
//! [`http1::Request`], [`tls::ClientReader`].
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
pub mod tls;
