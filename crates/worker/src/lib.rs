//! The workers: threads that receive punted packets, inspect them, and reinject them.
//!
//! Each worker owns an AF_XDP socket with its UMEM, an engine (the inspectors of its flows with their state), and
//! timers. It shares hand-off rings with the other workers ([`palisade_xsk::handoff`]). With the control plane it
//! shares two queues (learned addresses to commit, records) and a watched value (the settings). In the steady state a
//! packet costs no lock, no allocation and no system call of its own.
//!
//! A worker that panics or whose socket fails is restarted with a new socket and a new engine. The connections that it
//! inspected are reset, because their state is lost. Until the worker runs again its heartbeat is withdrawn, and the
//! programs do not punt to it: they drop the packets that need inspection, or pass them (`[worker] on_failure =
//! "pass"`).
//!
//! This crate depends on `palisade-inspect` (inspectors), `palisade-packet` (decoder) and `palisade-xsk` (sockets).
//! Start at [`Pool`], which runs the workers; the loop of one worker is in `run.rs`.
#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]
#![warn(unreachable_pub)]

pub mod checksum;
mod context;
mod counters;
mod effects;
mod failure;
mod fair;
pub mod header;
mod held;
mod idle;
mod inspect;
mod inspection;
mod pool;
mod port;
mod queue;
mod run;
mod rx;
mod socket;
mod supervisor;
mod tx;
mod watch;

pub use context::TimedRecord;
pub use counters::{Count, Counters, State};
pub use failure::Failure;
pub use held::Handle;
pub use inspect::Inspect;
pub use palisade_inspect::Metric;
pub use palisade_xsk::Mode;
pub use pool::{Pool, Setup};
pub use port::{Port, PortStatistics};
pub use queue::{Receiver, RecvError};
