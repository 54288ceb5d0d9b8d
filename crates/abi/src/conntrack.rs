//! Conntrack: key and entry of a flow, shares, slots, fragments.
//!
//! Start at [`CtKey`] (one key for both directions of a flow) and [`CtEntry`]. `xdp/src/conntrack.rs` writes the entries,
//! `palisade-datapath` lists, seeds and sweeps them.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Addr;

/// Key of a connection as one endpoint sees it. The same for both directions: local is the endpoint's side.
///
/// A connection between two endpoints of this node has two entries, one for each endpoint's policy.
/// ICMP echo: `local_port` is the echo identifier, `remote_port` is 0 if the endpoint asked, 1 if the other
/// end did (so that a request never passes as the answer to another). Protocols without ports: both 0.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CtKey {
    /// The endpoint's address.
    pub local: Addr,
    /// The other end's address.
    pub remote: Addr,
    /// The endpoint's port (machine order).
    pub local_port: u16,
    /// The other end's port (machine order).
    pub remote_port: u16,
    /// The endpoint.
    pub endpoint: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub zero: u8,
}

/// Flags of a [`CtEntry`].
pub mod ct_flags {
    /// The other end opened the flow: it is ingress for the endpoint.
    pub const INGRESS: u8 = 1;
    /// Passes only because of audit mode.
    pub const AUDIT: u8 = 2;
    /// A packet of the other direction has been seen.
    pub const REPLIED: u8 = 4;
    /// Made from the kernel's own tables when Palisade first attached, not from a packet.
    pub const SEEDED: u8 = 8;
    /// The other end is this node itself: on an endpoint's interface the node's policy is asked too.
    pub const REMOTE_IS_HOST: u8 = 16;
    /// The other end is an endpoint of this node (or the node): never valid on a NIC.
    pub const REMOTE_IS_LOCAL: u8 = 32;
    /// First seen in mid-stream (TCP without SYN).
    pub const MIDSTREAM: u8 = 64;
    /// The end of the flow has been reported.
    pub const CLOSED: u8 = 128;
}

/// State of a TCP connection, from the flags both sides sent.
pub type TcpState = u8;

/// A connection.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CtEntry {
    /// Dead after this time, ns of the coarse monotonic clock.
    pub expires: u64,
    /// When it was made, same clock.
    pub created: u64,
    /// When it was last reported, same clock.
    pub reported: u64,
    /// From the side that opened it.
    pub forward_packets: u64,
    /// From the side that opened it, from the network header on.
    pub forward_bytes: u64,
    /// From the other side.
    pub reply_packets: u64,
    /// From the other side.
    pub reply_bytes: u64,
    /// [`crate::EndpointState::revision`] under which it was judged.
    pub revision: u32,
    /// The rule that let it through.
    pub rule: u32,
    /// Identity of the other end when it was judged.
    pub remote_identity: u32,
    /// Interface on which it was first seen.
    pub ifindex: u32,
    /// [`ct_flags`].
    pub flags: u8,
    /// TCP flags seen from the side that opened it, or-ed (FIN 1, SYN 2, RST 4, ACK 16).
    pub forward_tcp: u8,
    /// TCP flags seen from the other side, or-ed.
    pub reply_tcp: u8,
    /// [`crate::MatchKind`] of the rule.
    pub match_kind: u8,
    /// Random: tells this connection from another one with the same key.
    pub serial: u32,
    /// The set of application rules, if an inspector reads the flow.
    pub ruleset: u32,
    /// [`crate::Inspector`] that reads the flow; 0: nobody does.
    pub inspector: u8,
    /// [`crate::punt_flags::AUDIT`] if what the application rules deny passes.
    pub punt_flags: u8,
    /// Not 0: the inspector has seen the connection end. What a packet of a flow that is read says about its end does
    /// not count before: its checksum and its place in the stream are known to the inspector only.
    pub over: u8,
    /// Not 0: the flow is in use by both ends and counts in [`Share::protected`]; no new flow evicts it.
    pub protected: u8,
    /// TCP sequence numbers that need no reading: from the side that opened it [0, 1), from the other side [2, 3).
    /// Equal: none.
    pub windows: [u32; 4],
    /// What the inspector has decided last, for which connection, and by which rules: [`CtEntry::offload`] or
    /// [`CtEntry::windowed`].
    pub decided: u64,
}

/// One round of the hash of an order: a multiplication carries upwards, the shift brings the upper bits down.
#[inline(always)]
const fn mix(hash: u64, word: u64) -> u64 {
    let product = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    product ^ (product >> 32)
}

impl CtEntry {
    /// Returns what [`Self::decided`] holds after an order that nothing of the connection needs reading any more.
    ///
    /// An order counts only while all that it was made for still stands in the entry: the connection (`serial`), the
    /// rules and their flags, and, for windows, the windows. So an order that comes in the very moment in which another
    /// CPU gives the entry other rules, another connection, or (the map recycles its entries at once) another flow
    /// changes nothing, whichever of the two writes first.
    #[inline(always)]
    #[must_use]
    pub const fn offload(serial: u32, ruleset: u32, punt_flags: u8) -> u64 {
        mix(mix(1, serial as u64 | (ruleset as u64) << 32), punt_flags as u64) | 1
    }

    /// Returns what [`Self::decided`] holds after an order that what lies in these windows needs no reading.
    #[inline(always)]
    #[must_use]
    pub const fn windowed(serial: u32, ruleset: u32, punt_flags: u8, windows: [u32; 4]) -> u64 {
        let flow = mix(mix(2, serial as u64 | (ruleset as u64) << 32), punt_flags as u64);
        let forward = windows[0] as u64 | (windows[1] as u64) << 32;
        let reply = windows[2] as u64 | (windows[3] as u64) << 32;
        mix(mix(flow, forward), reply) | 1
    }

    /// Whether the inspector needs to see nothing of the connection any more, by the rules in force.
    #[inline(always)]
    #[must_use]
    pub const fn is_unread(&self) -> bool {
        self.decided == Self::offload(self.serial, self.ruleset, self.punt_flags)
    }
}

/// The part of the conntrack and fragment maps that the flows of one endpoint and direction may take. Slot
/// `endpoint * 2 + direction` of SHARES. Slot 0 is the pool: what of the map is left when every share has what it is
/// guaranteed.
///
/// The first five fields are written by user space only.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Share {
    /// First slot in FLOW_SLOTS.
    pub flows: u32,
    /// Slots in FLOW_SLOTS. 0: no flow of this endpoint and direction can begin.
    pub flow_slots: u32,
    /// First slot in FRAGMENT_SLOTS.
    pub fragments: u32,
    /// Slots in FRAGMENT_SLOTS.
    pub fragment_slots: u32,
    /// Kept flows that need nothing of the pool. Of the pool: its size.
    pub guaranteed: u32,
    /// Zero.
    pub zero: u32,
    /// Number of protected flows. Of the pool: protected flows beyond what their shares are guaranteed. May be below zero
    /// for a moment.
    pub protected: i64,
}

/// Slots of the SHARES map: endpoint × direction.
pub const SHARE_SLOTS: usize = 2 * crate::ID_SLOTS;

/// Slots of FLOW_SLOTS and FRAGMENT_SLOTS among which a new flow or datagram takes that of the oldest.
pub const SHARE_WAYS: u32 = 4;

/// Slot of FLOW_SLOTS: a flow that is evicted when its slot is taken again, unless it is protected by then.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FlowSlot {
    /// The flow. Endpoint 0: none.
    pub key: CtKey,
    /// [`CtEntry::created`]: tells it from a later flow with the same key.
    pub created: u64,
}

/// Slot of FRAGMENT_SLOTS.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FragmentSlot {
    /// The datagram. Hook 0: none.
    pub key: FragmentKey,
    /// Zero.
    pub zero: u32,
    /// [`FragmentPorts::expires`]: tells it from a later datagram with the same key.
    pub expires: u64,
}

/// Key of a fragmented datagram whose first fragment has been seen (RFC 791, 3.2; RFC 8200, 4.5).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FragmentKey {
    /// Source address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// Identification, IPv4 in the low 16 bits.
    pub id: u32,
    /// Interface and hook it was seen at: `ifindex << 1 | egress`, so that nobody speaks for another interface.
    pub hook: u32,
    /// IP protocol. IPv6: 44, the fragment header itself, since the fragments of one datagram may name different
    /// protocols and only the first one's counts (RFC 8200, 4.5).
    pub protocol: u32,
}

/// Ports of a fragmented datagram.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FragmentPorts {
    /// Forgotten after this time, ns of the coarse monotonic clock.
    pub expires: u64,
    /// Source port (ICMP: the type), machine order.
    pub source: u16,
    /// Destination port (ICMP: the echo identifier), machine order.
    pub destination: u16,
    /// TCP flags of the first fragment.
    pub tcp_flags: u8,
    /// IP protocol of the datagram.
    pub protocol: u8,
    /// Zero.
    pub zero: [u8; 2],
}
