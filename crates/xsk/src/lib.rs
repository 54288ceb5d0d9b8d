//! AF_XDP sockets, which move packets between the kernel and user space without a system call for each packet.
//!
//! A [`Socket`] is bound to one queue of one interface and owns a UMEM, which is divided into chunks of a page. A
//! [`Frame`] owns one chunk: it cannot be cloned, sending it gives the chunk to the kernel, and dropping it frees the
//! chunk. So a chunk has one owner at any time. Sockets and frames stay on the thread that made them; threads share
//! only the rings of [`spsc`] and [`handoff`].
//!
//! This crate loads no program and writes no map. The caller attaches the XDP program and inserts the socket into the
//! program's `XSKMAP`.
//!
//! This crate depends on no other crate of Palisade; xsk-rs implements the rings that are shared with the kernel. Start
//! at [`Socket`].
#![allow(
    unsafe_code,
    reason = "memory that is shared with the kernel, and rings between threads"
)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]
#![warn(unreachable_pub)]

pub mod handoff;
pub mod spsc;

#[cfg(not(loom))]
mod frame;
#[cfg(not(loom))]
mod frame_states;
#[cfg(not(loom))]
pub mod schedule;
#[cfg(not(loom))]
mod socket;

#[cfg(not(loom))]
pub use frame::{Frame, NoRoom};
#[cfg(not(loom))]
pub use frame_states::Counts;
#[cfg(not(loom))]
pub use socket::{Config, CopyMode, Error, Mode, Socket, Statistics};
