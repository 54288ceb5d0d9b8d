//! Arrays that user space writes and the programs read: guarded interfaces, state of endpoints, the programs'
//! configuration; and the counters that the programs write.
//!
//! Start at [`Interface`], [`EndpointState`] and [`Config`].

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Roles of a guarded interface.
pub mod role {
    /// Not guarded. A program that finds this drops ([`crate::Reason::NoInterface`]).
    pub const NONE: u8 = 0;
    /// A NIC of this node: what enters is for the node or forwarded; what leaves likewise.
    pub const HOST: u8 = 1;
    /// The host side of a workload's veth: what enters comes *from* the endpoint, what leaves goes *to* it.
    pub const ENDPOINT: u8 = 2;
    /// Not guarded, above a guarded interface of a workload: its bridge or VRF, a VLAN on it. What a workload sends enters
    /// the node's stack by this interface after it was judged at the guarded one.
    pub const LINK: u8 = 3;
    /// Present, and named by no configuration: packets that enter by it may be forwarded, but not with the address of a
    /// workload. An interface without any role has not been looked at by the daemon yet: nothing that enters by it is
    /// forwarded.
    pub const SEEN: u8 = 4;
}

/// EtherTypes of one interface that pass by configuration.
pub const ETHER_TYPES: usize = 16;
/// Stands for every frame with an IEEE 802.3 length and an LLC header instead of an EtherType.
pub const ETHER_TYPE_LLC: u16 = 1;

/// Flags of an [`Interface`].
pub mod interface_flags {
    /// Frames carry no Ethernet header (a tunnel or another layer-3 device).
    pub const LAYER3: u8 = 1;
    /// Its XDP program runs in generic mode, where a packet that comes back would meet it again, for ever.
    pub const XDP_GENERIC: u8 = 2;
    /// Its programs are being attached: what enters by it may not have been judged yet.
    pub const PENDING: u8 = 4;
}

/// A guarded interface. Lives at slot `ifindex & 0xffff`; another ifindex in the slot means "not ours".
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Interface {
    /// The interface's index.
    pub ifindex: u32,
    /// The endpoint behind it (role endpoint) or the node's own endpoint (role host).
    pub endpoint: u16,
    /// [`role`].
    pub role: u8,
    /// [`interface_flags`].
    pub flags: u8,
    /// The interface that holds the addresses of the link: the bridge or VRF that `ifindex` is a port of, else `ifindex`.
    pub link: u32,
    /// EtherTypes that pass unjudged (role host): machine order, [`ETHER_TYPE_LLC`], or 0 for none.
    pub ether_types: [u16; ETHER_TYPES],
}

/// Flags of an [`EndpointState`].
pub mod endpoint_flags {
    /// Its policy names peers by DNS names: addresses it has learned are looked up.
    pub const LEARNS: u32 = 1;
    /// No entry of its ingress table has anything read, and none denies by name: what that table says of a flow that was
    /// opened the other way need not be asked. Holds for the policy that stands beside it only.
    pub const PLAIN_INGRESS: u32 = 2;
    /// The same of its egress table.
    pub const PLAIN_EGRESS: u32 = PLAIN_INGRESS << 1;
}

/// Flags of a [`Config`].
pub mod config_flags {
    /// What cannot be carried because no worker lives passes unread instead of being dropped.
    pub const FAIL_OPEN: u32 = 1;
}

/// What changes about an endpoint while traffic flows. Written by one 8-byte store for the first two fields
/// (through the memory-mapped array), so that no packet sees a policy with another policy's revision.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EndpointState {
    /// The policy table that judges it. 0: none yet, everything is dropped ([`crate::Reason::NoPolicy`]).
    pub policy: u32,
    /// Changes with every change of its policy or of any identity; conntrack entries of another are judged again.
    pub revision: u32,
    /// The endpoint's own identity.
    pub identity: u32,
    /// [`endpoint_flags`].
    pub flags: u32,
}

/// Packets and bytes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Counter {
    /// Packets (a super-frame counts once).
    pub packets: u64,
    /// Bytes, from the network header on.
    pub bytes: u64,
}

/// Token bucket of one CPU for one kind of event.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct RateBudget {
    /// When the bucket was last filled, ns of the coarse monotonic clock.
    pub filled_at: u64,
    /// Events that may still be sent in this period.
    pub tokens: u64,
    /// Events that were not sent since the maps were made, for want of tokens.
    pub suppressed: u64,
    /// Events that were not sent because the ring was full.
    pub lost: u64,
}

/// The clock of one CPU's programs.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Clock {
    /// The coarse monotonic clock when it was last read, ns.
    pub time: u64,
    /// The jiffy in which it was read.
    pub jiffy: u64,
}

/// What the programs are told at run time. Times in ns.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Config {
    /// TCP connection of which only one side has been heard.
    pub tcp_opening: u64,
    /// TCP connection in use.
    pub tcp_established: u64,
    /// TCP connection that was reset or closed by both sides.
    pub tcp_closing: u64,
    /// UDP flow, and every other protocol with ports.
    pub udp: u64,
    /// ICMP echo and protocols without ports.
    pub other: u64,
    /// Ports of a fragmented datagram.
    pub fragment: u64,
    /// A flow in use is reported at most this often; 0: never.
    pub trace_interval: u64,
    /// Events of one kind and reason that one CPU may send in a second.
    pub events_per_second: u64,
    /// The node's own endpoint id.
    pub host_endpoint: u32,
    /// What an address is that neither the ipcache nor the trie knows, IPv4.
    pub world_ipv4: u32,
    /// The same for IPv6.
    pub world_ipv6: u32,
    /// Entries in the RULES map.
    pub rules: u32,
    /// What proves that a packet on the punt link is ours; another one after each start.
    pub cookie: u64,
    /// A worker that has not said for so long that it lives is taken for dead.
    pub worker_timeout: u64,
    /// The node's end of the punt link; 0: nothing is carried.
    pub punt_ifindex: u32,
    /// Workers, which is queues of the punt link.
    pub workers: u32,
    /// Mark of packets that come back to an interface where a tc program of ours stands. Never 0.
    pub mark: u32,
    /// [`config_flags`].
    pub flags: u32,
    /// The readers that there are: bit n for the [`crate::Inspector`] with number n. What others should read is
    /// dropped.
    pub inspectors: u32,
    /// Zero.
    pub zero: u32,
}
