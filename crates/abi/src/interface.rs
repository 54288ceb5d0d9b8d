//! Values of the arrays: guarded interfaces, states of endpoints and the programs' configuration, which user space
//! writes; counters, budgets and clock, which the programs write.
//!
//! Start at [`Interface`], [`EndpointState`] and [`Config`].

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Roles of an [`Interface`].
pub mod role {
    /// No role: the daemon has not written a state for the interface. A program at an interface that has neither the
    /// role HOST nor the role ENDPOINT drops every packet ([`crate::Reason::NoInterface`]).
    pub const NONE: u8 = 0;
    /// A NIC of this node: packets that enter are for the node or forwarded, packets that leave are the node's or
    /// forwarded.
    pub const HOST: u8 = 1;
    /// The host side of a workload's veth: packets that enter come *from* the endpoint, packets that leave go *to* it.
    pub const ENDPOINT: u8 = 2;
    /// An unguarded interface that is stacked on a workload's guarded interface, directly or indirectly: a bridge, a
    /// VRF or a VLAN device. The workload's packets enter the node's stack by the upper interface, after their verdict
    /// at the guarded interface.
    pub const LINK: u8 = 3;
    /// An unguarded interface that the daemon knows. The programs let a packet that entered by such an interface be
    /// forwarded, unless the packet's source address is a workload's. An interface that the daemon does not know yet
    /// has no role, and the programs drop a forwarded packet that entered by it.
    pub const SEEN: u8 = 4;
}

/// Number of EtherTypes that the configuration of one interface can allow.
pub const ETHER_TYPES: usize = 16;
/// Pseudo EtherType of all frames with an IEEE 802.3 length and an LLC header instead of an EtherType.
pub const ETHER_TYPE_LLC: u16 = 1;

/// Flags of an [`Interface`].
pub mod interface_flags {
    /// Frames have no Ethernet header (a tunnel or another layer-3 device).
    pub const LAYER3: u8 = 1;
    /// The XDP program runs in generic mode, where it would process a reinjected packet again and punt it in a loop.
    pub const XDP_GENERIC: u8 = 2;
    /// The daemon is still attaching the programs: until it has finished, packets can enter without a verdict.
    pub const PENDING: u8 = 4;
    /// The ingress hook is XDP: no tc program at ingress removes the mark of a reinjected packet.
    pub const XDP: u8 = 8;
    /// Failsafe ports of the node do not pass here, although the interface is a NIC.
    pub const NO_FAILSAFE: u8 = 16;
}

/// State of an interface, at slot `ifindex & 0xffff`. If the slot has another `ifindex`, the interface has no state.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Interface {
    /// The interface's index.
    pub ifindex: u32,
    /// The endpoint behind the interface (role endpoint), or the node's own endpoint (role host).
    pub endpoint: u16,
    /// [`role`].
    pub role: u8,
    /// [`interface_flags`].
    pub flags: u8,
    /// Index of the interface that has the addresses of the link: the bridge or VRF of which `ifindex` is a port,
    /// otherwise `ifindex`.
    pub link: u32,
    /// EtherTypes that pass without a policy lookup (role host): host byte order, [`ETHER_TYPE_LLC`], or 0 for an
    /// unused slot.
    pub ether_types: [u16; ETHER_TYPES],
}

/// Flags of an [`EndpointState`].
pub mod endpoint_flags {
    /// The policy selects peers by DNS name, so learned addresses are looked up.
    pub const LEARNS: u32 = 1;
    /// The policy table has no ingress entry that inspects or denies by a deny rule, so for an egress flow the programs
    /// need not look up the ingress direction. The flag is valid only for the policy in the same
    /// [`super::EndpointState`].
    pub const PLAIN_INGRESS: u32 = 2;
    /// The policy table has no egress entry that inspects or denies by a deny rule, so for an ingress flow the programs
    /// need not look up the egress direction. The flag is valid only for the policy in the same
    /// [`super::EndpointState`].
    pub const PLAIN_EGRESS: u32 = PLAIN_INGRESS << 1;
}

/// Flags of a [`Config`].
pub mod config_flags {
    /// Fail open: while no worker runs, packets that need inspection pass without it and are not dropped.
    pub const FAIL_OPEN: u32 = 1;
}

/// The part of an endpoint's configuration that can change while traffic flows. User space writes the first two fields
/// by one 8-byte store to the memory-mapped array, so no packet sees a policy with another policy's revision.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EndpointState {
    /// Number of the policy table. 0: none yet, every packet is dropped ([`crate::Reason::NoPolicy`]).
    pub policy: u32,
    /// Revision: changes when the policy or any identity changes. Flows with another revision are evaluated again.
    pub revision: u32,
    /// The endpoint's own identity.
    pub identity: u32,
    /// [`endpoint_flags`].
    pub flags: u32,
}

/// Counter of packets and bytes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Counter {
    /// Packets; a super-frame (GSO) counts once.
    pub packets: u64,
    /// Bytes, from the network header on.
    pub bytes: u64,
}

/// Token bucket of one CPU for events of one kind and reason.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct RateBudget {
    /// Time when the bucket was last refilled, ns of the coarse monotonic clock.
    pub filled_at: u64,
    /// Number of events that can still be sent before the next refill.
    pub tokens: u64,
    /// Events suppressed for lack of tokens, since the maps were made.
    pub suppressed: u64,
    /// Events lost because the ring buffer was full, since the maps were made.
    pub lost: u64,
}

/// The clock of one CPU's programs.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Clock {
    /// The coarse monotonic clock when it was last read, ns.
    pub time: u64,
    /// The jiffy in which `time` was read.
    pub jiffy: u64,
}

/// Configuration of the programs. Times in ns.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Config {
    /// Idle timeout of a half-open TCP connection.
    pub tcp_opening: u64,
    /// Idle timeout of an established TCP connection.
    pub tcp_established: u64,
    /// Idle timeout of a TCP connection that was reset, or closed by both ends.
    pub tcp_closing: u64,
    /// Idle timeout of a UDP or SCTP flow.
    pub udp: u64,
    /// Idle timeout of ICMP echo and of protocols without ports.
    pub other: u64,
    /// Lifetime of the ports of a fragmented datagram.
    pub fragment: u64,
    /// Interval between trace events of a flow in use; 0: no trace event is sent while the flow is in use.
    pub trace_interval: u64,
    /// Number of events of one kind and reason that one CPU can send per second.
    pub events_per_second: u64,
    /// Number of the node's own endpoint.
    pub host_endpoint: u32,
    /// Identity of an IPv4 address that neither the ipcache nor the prefix trie contains.
    pub world_ipv4: u32,
    /// Identity of an IPv6 address that neither the ipcache nor the prefix trie contains.
    pub world_ipv6: u32,
    /// Number of entries of the RULES map.
    pub rules: u32,
    /// Secret that marks frames of programs and workers on the punt link; drawn at each start of the daemon.
    pub cookie: u64,
    /// Maximum age of a worker's last heartbeat. A worker with an older heartbeat counts as dead.
    pub worker_timeout: u64,
    /// Index of the node's end of the punt link; 0: no packet is punted.
    pub punt_ifindex: u32,
    /// Number of workers, which is the number of queues of the punt link.
    pub workers: u32,
    /// Value of `skb->mark` of packets that are reinjected at an interface with a tc program, so that the program lets
    /// them pass. Never 0.
    pub mark: u32,
    /// [`config_flags`].
    pub flags: u32,
    /// Available inspectors: bit n for the [`crate::Inspector`] with number n. A packet whose policy entry requires
    /// another inspector is dropped, unless the entry is in audit mode.
    pub inspectors: u32,
    /// Zero.
    pub zero: u32,
    /// Indexes of the node's ends of the proxy links, by [`crate::Direction`] of the intercepted flow; 0: no such link,
    /// and the flow's packets are dropped.
    pub proxy_ifindex: [u32; 2],
}
