//! AF_XDP: how packets get to user space and back without being copied twice.
//!
//! A [`Socket`] is bound to one queue of one interface and owns the memory its packets lie in, cut into frames. A
//! [`Frame`] in somebody's hands is a value that cannot be copied: sending it gives it to the kernel, dropping it
//! gives it back, so that a frame is always in exactly one place. Nothing here is shared between threads but the
//! rings of [`spsc`] and [`handoff`].
//!
//! No program is loaded and no map is written: whoever attaches the program puts the socket into its `XSKMAP`.

pub mod handoff;
pub mod spsc;

#[cfg(not(loom))]
mod frame;
#[cfg(not(loom))]
mod ledger;
#[cfg(not(loom))]
pub mod schedule;
#[cfg(not(loom))]
mod socket;

#[cfg(not(loom))]
pub use frame::{Frame, NoRoom};
#[cfg(not(loom))]
pub use ledger::Counts;
#[cfg(not(loom))]
pub use socket::{Config, Copying, Error, Mode, Socket, Statistics};
