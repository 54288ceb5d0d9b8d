//! Threads that terminate intercepted TCP connections: TLS on both sides, and inspection of the requests in between.
//!
//! ```text
//! client ── listen ── thread ── connection ─┬─ end (client) ── tls
//!                                           ├─ http (verdicts of palisade-inspect)
//!                                           └─ end (server) ── tls ── server
//! ```
//!
//! The sockets live in network namespaces in which every address is local. A connection is accepted at the server's
//! address, and the connection to the server comes from the client's own address and port, so that both ends see the
//! addresses that they would see without interception.
//!
//! Each thread has its own listeners, connections and deadlines; threads share only settings and TLS configurations. A
//! thread that panics is restarted, and its connections are reset.
//!
//! Start at [`Proxy`]. The phases of a connection are in `connection/mod.rs`.
#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]
#![warn(unreachable_pub)]

mod answer;
mod authority;
mod chain;
mod check;
mod connection;
mod end;
mod failure;
#[doc(hidden)]
pub mod fuzzing;
mod listen;
mod lru;
mod overflow;
mod printable;
mod protocol;
mod proxy;
mod secrets;
mod settings;
mod stats;
mod thread;
mod tls;
mod unavailable;
mod upstreams;
mod view;

pub use check::{CheckRequest, CheckStep};
pub use failure::{Failure, FailureKind};
pub use listen::Resolver;
pub use proxy::{Proxy, ThreadState};
pub use secrets::{Secrets, Trust};
pub use settings::{Flow, Flows, Listeners, Namespace, Options, Reports, Settings};
pub use stats::Stats;
pub use upstreams::Upstream;
pub use view::{ConnectionView, TlsView};
