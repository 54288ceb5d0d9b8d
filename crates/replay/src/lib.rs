//! Replays a capture file against policies: the verdicts that the packet path and the inspectors give its packets.
//!
//! The crate does no I/O but reading the capture, and takes all times from the capture. [`Reader`] returns the packets
//! of a pcap or pcapng file. [`Replay`] gives each packet its verdicts: `sites.rs` determines at which interfaces the
//! packet path would have processed it, `path` is the model of the BPF programs, `inspection.rs` runs the inspectors,
//! `names.rs` learns the DNS answers. The results are [`Report`]s: the events and records of the packet path, from
//! which `palisade-flowlog` makes flows.
//!
//! Depends on `palisade-policy` (compiled policies), `palisade-packet` (decoder), `palisade-inspect` (engine),
//! `palisade-worker` (preparation of packets), `palisade-fqdn` (names) and `pcap-parser`. Start at [`Replay::packet`].
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![warn(unreachable_pub)]

pub mod capture;
mod inspection;
mod names;
mod path;
mod replay;
mod sites;
mod tables;

pub use capture::Reader;
pub use inspection::{Inspected, Prepare, RuleSets};
pub use names::NamePolicy;
pub use path::Timeouts;
pub use replay::{Replay, Report, Settings, Summary};
pub use sites::{Interface, Role};
