//! Network namespaces, veth pairs, real servers and clients for tests, benches and the demo.
//!
//! A testbed does not change the machine's own interfaces, routes or firewall. Everything is in namespaces whose names
//! contain the pid of the process that made them (`pal-<pid>-<n>-<label>`). Dropping a testbed removes its namespaces,
//! even during a panic. If the process was killed, the next process that starts a testbed removes the namespaces.
//!
//! ```text
//!   workload ns            node ns                         internet ns
//!   eth0 10.0.1.10 ── veth-<name> 10.0.1.1    nic0 ── eth0 198.51.100.2
//!        fd00:1::10               fd00:1::1   198.51.100.1      2001:db8:f::2
//!                                             2001:db8:f::1
//! ```
//!
//! The crate depends on `palisade-abi` for the TCP flags. Start reading at [`topology`] and [`daemon`].
#![allow(unsafe_code, reason = "setns and raw sockets")]

pub mod attached;
pub mod capture;
pub mod daemon;
pub mod demo;
pub mod dns;
pub mod forge;
pub mod load;
pub mod ns;
pub mod packet;
pub mod probe;
pub mod process;
pub mod rawtcp;
pub mod recorder;
pub mod server;
pub mod tls;
pub mod topology;
pub mod units;
pub mod web;

pub use daemon::Daemon;
pub use ns::Ns;
pub use probe::Outcome;
pub use process::{Process, output};
pub use topology::{Topology, Workload};
