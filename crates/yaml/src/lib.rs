//! The reader of YAML and JSON files that users write: policies and secrets.
//!
//! The text is untrusted. [`documents`] bounds nesting and the copies that aliases make, refuses characters that YAML
//! parsers interpret differently, and returns trees whose nodes have line and column, so that each message about a file
//! names a place.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![warn(unreachable_pub)]

mod node;
#[cfg(test)]
mod tests;
mod text;

pub use node::{Entry, Node, Position, Value, quoted};
#[cfg(any(test, feature = "count"))]
pub use text::work;
pub use text::{MAX_ALIASED_NODES, YamlError, documents, position_at};
