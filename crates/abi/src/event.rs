//! The record that the programs write to the event ring, and its enumerations. `palisade-flowlog` turns an [`Event`] into a
//! flow record.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Addr;
use crate::reason::REASONS;

/// What an event tells.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum EventKind {
    /// A flow's first packet (or its first under a new policy) was judged.
    PolicyVerdict = 0,
    /// A packet was dropped.
    Drop = 1,
    /// A flow began, goes on, or ended.
    Trace = 2,
}

/// Slots of the BUDGETS map: kind of event × reason.
pub const BUDGET_SLOTS: usize = 3 * REASONS;

/// Returns the slot of the BUDGETS map for events of a kind (a number of [`EventKind`]) and a reason.
#[inline(always)]
#[must_use]
pub const fn budget_slot(kind: u32, reason: u8) -> u32 {
    kind * REASONS as u32 + reason as u32
}

/// Returns the kind (a number of [`EventKind`]) and the reason of a slot of the BUDGETS map.
#[must_use]
pub const fn budget_of(slot: u32) -> (u32, u8) {
    (slot / REASONS as u32, (slot % REASONS as u32) as u8)
}

/// How specific the deciding rule was. The names are those of the flow API.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MatchKind {
    /// Nothing matched (default deny), or nothing is enforced.
    None = 0,
    /// Peer, any port.
    L3Only = 1,
    /// Peer and port.
    L3L4 = 2,
    /// Any peer, a port.
    L4Only = 3,
    /// Any peer, any port.
    All = 4,
    /// Peer and protocol, any port of it.
    L3Proto = 5,
    /// Any peer, protocol, any port of it.
    ProtoOnly = 6,
}

/// Which moment of a flow a trace event tells of, and where.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TracePoint {
    /// Not a trace.
    None = 0,
    /// Begins; towards an endpoint.
    Start = 1,
    /// Goes on.
    Interval = 2,
    /// Ended (reset, or closed by both sides).
    End = 3,
}

/// Flags of an [`Event`].
pub mod event_flags {
    /// The packet is of the direction that answers the flow.
    pub const REPLY: u8 = 1;
    /// Would have been dropped, but for audit mode.
    pub const AUDIT: u8 = 2;
    /// Addresses are IPv6.
    pub const IPV6: u8 = 4;
    /// The packet *leaves* the endpoint (egress); else it goes to it.
    pub const EGRESS: u8 = 8;
    /// Whether it answers a flow is not known (a verdict at a flow's first packet, a drop before conntrack).
    pub const REPLY_UNKNOWN: u8 = 16;
    /// A related ICMP error.
    pub const RELATED: u8 = 32;
    /// Ports are not known (a later fragment).
    pub const FRAGMENT: u8 = 64;
    /// The verdict was on the flow's direction being egress for the endpoint.
    pub const FLOW_EGRESS: u8 = 128;
}

/// A record of the event ring.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Event {
    /// ns of the monotonic clock (not the coarse one).
    pub time: u64,
    /// Source address of the packet.
    pub source: Addr,
    /// Destination address of the packet.
    pub destination: Addr,
    /// Source port, machine order; ICMP: the type.
    pub source_port: u16,
    /// Destination port, machine order; ICMP: the code.
    pub destination_port: u16,
    /// Identity of the source, 0 if it was not looked up.
    pub source_identity: u32,
    /// Identity of the destination, 0 if it was not looked up.
    pub destination_identity: u32,
    /// Deciding rule, 0 if none was reached.
    pub rule: u32,
    /// Interface.
    pub ifindex: u32,
    /// Length of the packet from the network header on, bytes.
    pub length: u32,
    /// The endpoint whose policy was asked; 0 if none.
    pub endpoint: u16,
    /// [`EventKind`].
    pub kind: u8,
    /// [`crate::Reason`].
    pub reason: u8,
    /// [`event_flags`].
    pub flags: u8,
    /// IP protocol, 0 if not known.
    pub protocol: u8,
    /// TCP flags.
    pub tcp_flags: u8,
    /// [`MatchKind`].
    pub match_kind: u8,
    /// [`TracePoint`].
    pub trace_point: u8,
    /// [`crate::Decision`] of a policy verdict.
    pub decision: u8,
    /// EtherType of a frame that is not IP, else 0.
    pub ether_type: u16,
    /// Source MAC address.
    pub source_mac: [u8; 6],
    /// Destination MAC address.
    pub destination_mac: [u8; 6],
    /// Of the flow so far, this packet included (traces only).
    pub forward_packets: u64,
    /// Of the flow so far (traces only).
    pub forward_bytes: u64,
    /// Of the flow so far (traces only).
    pub reply_packets: u64,
    /// Of the flow so far (traces only).
    pub reply_bytes: u64,
}
