//! Loads and attaches the BPF programs, and owns their maps and the nftables table. No other crate uses aya.
//!
//! ```text
//! <pin_dir>/v1/POLICY, CONNTRACK, ...      maps, of one version of palisade_abi
//! <pin_dir>/links/<ifindex>/xdp, ...       links of the programs at an interface
//! nftables: table inet <name>              rules for packets that escape the programs
//! ```
//!
//! Attached programs stay attached when the process ends or crashes. A later [`Datapath::open`] opens the pinned maps,
//! and [`Datapath::attach`] replaces the programs atomically.
//!
//! Two processes must not use a pin directory at the same time; the daemon holds a lock on its run file. Network
//! interfaces are those of the network namespace of the calling thread. bpffs belongs to the mount namespace, so
//! daemons of several network namespaces need a `pin_dir` each.
//!
//! Depends on `palisade-abi` and, for plans, on `palisade-model`. Start at [`Datapath::open`], [`Datapath::apply`] and
//! [`Datapath::attach`].
#![allow(
    unsafe_code,
    reason = "system calls that aya does not wrap, and memory-mapped maps"
)]
#![warn(unreachable_pub)]

mod apply;
mod attach;
mod capture;
mod clock;
mod conntrack;
mod counters;
mod dump;
mod error;
mod events;
mod hook;
mod learned;
mod local_sockets;
mod maps;
mod netfilter;
mod object;
mod occupants;
mod open;
mod options;
mod pin;
mod pinned;
mod present;
mod probe;
mod programs;
mod proxied;
mod proxy_link;
mod punt_link;
mod seed;
mod shares;
mod support;
mod sys;
mod take_over;
mod teardown;
mod upgrade;

pub use apply::ApplyError;
pub use capture::{Capture, CapturePrograms};
pub use clock::{Clock, is_clock_synchronised, monotonic_coarse};
pub use conntrack::{Conntrack, ConntrackCounts, Fate, Removal};
pub use counters::{Counters, EventBudget};
pub use dump::{Dump, Fill};
pub use error::OpenError;
pub use events::EventReader;
pub use hook::{AttachError, Attached, Attachment, Hook, HookKind, Role, TcMode, XdpMode};
pub use local_sockets::LocalSockets;
pub use maps::MapError;
pub use netfilter::{NamePattern, Netfilter, NetfilterError, Rules, nftables};
#[cfg(feature = "bench-object")]
pub use object::BENCH_OBJECT;
pub use object::{CAPTURE_OBJECT, OBJECT};
pub use occupants::{Occupant, occupants};
pub use open::Datapath;
pub use options::{Limits, Options};
pub use pin::check_pin_dir;
pub use pinned::PinnedMaps;
pub use probe::{Answer, Feature, Offloads, offloads, probe};
pub use proxied::ProxiedFlows;
pub use proxy_link::{ProxyLinks, proxy_link_names};
pub use punt_link::{PuntLink, SocketMap, panics_after_reinjection};
pub use seed::{
    Connection, End, LocalEndpoints, Progress, Scope, SeedError, connections, connections_of_netns, seeds,
};
pub use shares::{Sizes, share_slot, shares};
pub use support::{Support, XdpSupport, support, xdp_support};
pub use sys::SyscallError;
pub use teardown::{detach_all, left_links, remove_left_links};
