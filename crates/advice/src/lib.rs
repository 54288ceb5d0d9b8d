//! Answers about policies:
//!
//! - [`explain`](explain::explain) says why a packet gets its verdict, which rules nearly match, and which addition would
//!   allow it.
//! - [`Replay`](replay::Replay) shows which verdicts of recorded flows candidate policies would change.
//! - [`Suggestion`](suggest::Suggestion) makes the policies that recorded flows need.
//!
//! Every addition and every policy that this crate returns has been parsed, compiled together with the policies in
//! force, and evaluated again. Texts in them are emitted by [`yaml`]: names, labels and paths can come from the network.
//!
//! The crate does no I/O. It depends on `palisade-policy` for the parser, the compiler and the trace, and on
//! `palisade-flowlog` for recorded flows. Start at [`explain`].
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![warn(unreachable_pub)]

mod addition;
mod document;
pub mod explain;
mod labels;
mod near;
pub mod query;
pub mod record;
pub mod replay;
mod secrets;
pub mod suggest;
pub mod yaml;
