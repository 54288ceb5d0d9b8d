//! The threads that receive carried packets, have them read, and put them back.
//!
//! Each worker owns its socket with all its frames, its engine and its timers. What it shares are queues that nobody
//! waits at: packets of other workers' flows ([`palisade_xsk::handoff`]), answers to be learned, records, and orders of
//! the control plane of which the last one counts. In the steady state a packet costs no lock, no allocation and no
//! system call of its own.
//!
//! A worker that panics or whose socket fails is started again with a new socket and a new engine: its flows are cut,
//! since nobody knows any more what they had said. Meanwhile nobody says that it lives, and the programs drop what it
//! should have read.
#![forbid(unsafe_code)]

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

pub use context::Stamped;
pub use counters::{Count, Counters, State};
pub use failure::Failure;
pub use held::Handle;
pub use inspect::Inspect;
pub use palisade_inspect::Number;
pub use pool::{Pool, Setup};
pub use port::{Port, PortStatistics};
pub use queue::{Receiver, RecvError};

/// How a worker waits for packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// Looks for packets for a short while, then sleeps until one comes.
    #[default]
    Poll,
    /// Never sleeps.
    Spin,
    /// Has the kernel look for packets for a short while, then sleeps.
    BusyPoll,
}
