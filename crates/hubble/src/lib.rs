//! The flow API: the observer, peer and health services over gRPC, with the names and numbers of the public
//! definitions, so that existing clients can read the flows of this node.
//!
//! The crate opens no sockets. The daemon makes an [`Api`] of the flow ring and passes connections to [`serve`]. A
//! reader of flows is a stream over the ring that converts a flow when the connection has room for the flow: a reader
//! that is slow, or that stopped reading, delays no other reader and no writer, and its memory is bounded.
//!
//! Depends on `palisade-flowlog` (flows, ring, filters). Start at [`Api`] and [`serve`].
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![warn(unreachable_pub)]

pub mod agent;
mod authority;
mod budget;
mod connection;
mod convert;
mod filter;
mod health;
pub mod json;
mod mask;
mod namespaces;
mod observer;
mod origin;
mod peer;
mod places;
pub mod proto;
mod range;
mod readers;
mod schema;
mod server;
mod stream;
mod wake;
pub mod wire;

pub use connection::{Connection, ConnectionId};
pub use origin::Origin;
pub use places::{ConnectionPlace, Places};
pub use readers::Counts;
pub use server::{Api, Limits, Node, serve};

/// Longest text of a request that an error repeats, characters.
const MAX_ECHO_CHARS: usize = 100;

/// Returns the beginning of a text of a request, for an error: the client chooses the length.
fn echo(text: &str) -> &str {
    let end = text.char_indices().nth(MAX_ECHO_CHARS).map(|(end, _)| end);
    &text[..end.unwrap_or(text.len())]
}
