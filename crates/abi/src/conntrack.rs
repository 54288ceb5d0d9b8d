//! Conntrack: key and entry of a flow, shares of the map, fragmented datagrams.
//!
//! Start at [`CtKey`] (one key for both directions of a flow) and [`CtEntry`]. `xdp/src/conntrack.rs` writes the
//! entries, `palisade-datapath` lists, seeds and sweeps them.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Addr;

/// Key of a flow as one endpoint sees it, the same for both directions: "local" is the endpoint.
///
/// A flow between two endpoints of this node has two entries, one for each endpoint's policy. ICMP echo: `local_port`
/// is the echo identifier; `remote_port` is 0 if the endpoint sent the request and 1 if the peer did, so a request
/// never passes as a reply. Both ports are 0 for protocols without ports.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CtKey {
    /// The endpoint's address.
    pub local: Addr,
    /// The peer's address.
    pub remote: Addr,
    /// The endpoint's port (host byte order).
    pub local_port: u16,
    /// The peer's port (host byte order).
    pub remote_port: u16,
    /// Number of the endpoint.
    pub endpoint: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub zero: u8,
}

/// Flags of a [`CtEntry`].
pub mod ct_flags {
    /// The peer opened the flow: it is ingress for the endpoint.
    pub const INGRESS: u8 = 1;
    /// The flow passes only because of audit mode.
    pub const AUDIT: u8 = 2;
    /// A packet of the reply direction has passed.
    pub const REPLIED: u8 = 4;
    /// Seeded: made from the kernel's own tables when Palisade was first attached, not from a packet.
    pub const SEEDED: u8 = 8;
    /// The peer is this node: at a workload's interface the node's policy is looked up too.
    pub const REMOTE_IS_HOST: u8 = 16;
    /// The peer is an endpoint of this node, or the node itself. A packet from such a peer that arrives by a NIC has a
    /// spoofed source address.
    pub const REMOTE_IS_LOCAL: u8 = 32;
    /// The first packet was not a SYN (TCP in mid-stream).
    pub const MIDSTREAM: u8 = 64;
    /// The programs have seen the end of the flow and do not report it again.
    pub const CLOSED: u8 = 128;
}

/// A conntrack entry: one flow of one endpoint.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CtEntry {
    /// Time when the entry expires, ns of the coarse monotonic clock.
    pub expires: u64,
    /// Time when the entry was made, ns of the coarse monotonic clock.
    pub created: u64,
    /// Time of the last trace event, ns of the coarse monotonic clock.
    pub reported: u64,
    /// Packets of the original direction.
    pub forward_packets: u64,
    /// Bytes of the original direction, from the network header on.
    pub forward_bytes: u64,
    /// Packets of the reply direction.
    pub reply_packets: u64,
    /// Bytes of the reply direction, from the network header on.
    pub reply_bytes: u64,
    /// [`crate::EndpointState::revision`] under which the flow was last allowed; 0 if the flow was denied since then.
    pub revision: u32,
    /// Number of the rule that decided about the flow.
    pub rule: u32,
    /// Identity of the peer when the policy was looked up.
    pub remote_identity: u32,
    /// Index of the interface of the first packet.
    pub ifindex: u32,
    /// [`ct_flags`].
    pub flags: u8,
    /// [`crate::tcp_flags`] of the original direction, or-ed.
    pub forward_tcp: u8,
    /// [`crate::tcp_flags`] of the reply direction, or-ed.
    pub reply_tcp: u8,
    /// [`crate::MatchKind`] of the rule.
    pub match_kind: u8,
    /// Random number that distinguishes this connection from another one with the same key.
    pub serial: u32,
    /// Number of the rule set, if the flow is inspected; otherwise 0.
    pub ruleset: u32,
    /// [`crate::Inspector`] of the flow; 0: not inspected.
    pub inspector: u8,
    /// [`crate::punt_flags::AUDIT`] if the application rules only audit.
    pub punt_flags: u8,
    /// Not 0: the inspector has verified the end of the connection. The programs ignore FIN and RST of an inspected
    /// connection, because only the inspector checks checksum and sequence number.
    pub over: u8,
    /// Not 0: both ends use the flow, it counts in [`Share::protected`], and no new flow evicts it.
    pub protected: u8,
    /// Offload windows, TCP sequence numbers: `windows[0]..windows[1]` of the original direction,
    /// `windows[2]..windows[3]` of the reply direction. The upper bound is excluded. Equal bounds: no window. An
    /// intercepted flow ([`crate::Inspector::TlsTerminate`]) has no windows, and holds its [`crate::ProxyPath`] here.
    pub windows: [u32; 4],
    /// The inspector's last decision, as a hash of [`CtEntry::offload`] or [`CtEntry::windowed`]. The hash covers the
    /// connection and the rules for which the decision is valid. 0: no decision.
    pub decided: u64,
}

/// Distance from the end of an offload window of a limited sender, bytes, within which acknowledgements are punted. The
/// length of a super-frame: while more is unacknowledged, the sender may send up to the end only, so that few
/// super-frames have bytes on both sides of it.
pub const SEND_LIMIT_DISTANCE: u32 = 64 << 10;

/// Returns the low four bits of the start of an offload window of a flow with a limited sender
/// ([`crate::flow_op::LIMITED_WINDOWS`]): the window scale of the receiver, plus one, if the sender in the window is
/// limited; otherwise 0.
#[must_use]
pub const fn send_limit_code(scale: u8) -> u32 {
    scale as u32 + 1
}

/// Returns the highest window field of an acknowledgement that leaves `left` bytes of an offload window
/// unacknowledged, for a code of [`send_limit_code`]; `u16::MAX` for code 0.
#[inline(always)]
#[must_use]
pub const fn limited_window(code: u32, left: u32) -> u32 {
    if code == 0 {
        return u16::MAX as u32;
    }
    let window = left >> ((code - 1) & 15);
    if window > u16::MAX as u32 {
        u16::MAX as u32
    } else {
        window
    }
}

/// Mixes a word into the hash of a command: the multiplication carries differences to the upper bits, the shift brings
/// them down again.
#[inline(always)]
const fn mix(hash: u64, word: u64) -> u64 {
    let product = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    product ^ (product >> 32)
}

impl CtEntry {
    /// Returns the value of [`Self::decided`] after an OFFLOAD command.
    ///
    /// The hash matches only an entry with the connection (`serial`), the rule set and the flags for which the worker
    /// sent the command. Another CPU can write other rules, another connection, or (LRU maps recycle elements at once)
    /// another flow to the entry at the same time. The command then has no effect, whichever CPU writes first.
    #[inline(always)]
    #[must_use]
    pub const fn offload(serial: u32, ruleset: u32, punt_flags: u8) -> u64 {
        mix(mix(1, serial as u64 | (ruleset as u64) << 32), punt_flags as u64) | 1
    }

    /// Returns the value of [`Self::decided`] after a WINDOWS command with these windows.
    #[inline(always)]
    #[must_use]
    pub const fn windowed(serial: u32, ruleset: u32, punt_flags: u8, windows: [u32; 4]) -> u64 {
        let flow = mix(mix(2, serial as u64 | (ruleset as u64) << 32), punt_flags as u64);
        let forward = windows[0] as u64 | (windows[1] as u64) << 32;
        let reply = windows[2] as u64 | (windows[3] as u64) << 32;
        mix(mix(flow, forward), reply) | 1
    }

    /// Difference between the values of [`Self::decided`] after a WINDOWS and a LIMITED_WINDOWS command with the same
    /// windows.
    pub const LIMITED: u64 = 2;

    /// Returns whether the inspector has offloaded the connection under the rules in force.
    #[inline(always)]
    #[must_use]
    pub const fn is_offloaded(&self) -> bool {
        self.decided == Self::offload(self.serial, self.ruleset, self.punt_flags)
    }
}

/// The part of the conntrack and fragment maps that the flows of one endpoint and direction can use: slot `endpoint * 2
/// + direction` of SHARES. Slot 0 is the pool, which counts the protected flows beyond the guarantees of their shares.
///
/// Only user space writes the first five fields.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Share {
    /// Index of the first slot in FLOW_SLOTS.
    pub flows: u32,
    /// Number of slots in FLOW_SLOTS. 0: no flow of this endpoint and direction can begin.
    pub flow_slots: u32,
    /// Index of the first slot in FRAGMENT_SLOTS.
    pub fragments: u32,
    /// Number of slots in FRAGMENT_SLOTS.
    pub fragment_slots: u32,
    /// Number of protected flows that do not count against the pool. In the pool's slot: the size of the pool.
    pub guaranteed: u32,
    /// Zero.
    pub zero: u32,
    /// Number of protected flows. In the pool's slot: protected flows beyond the guarantees of their shares. If two
    /// CPUs change the number at once, it can be wrong, even negative, until the next sweep.
    pub protected: i64,
}

/// Slots of the SHARES map: endpoint × direction.
pub const SHARE_SLOTS: usize = 2 * crate::ID_SLOTS;

/// A new flow or datagram takes one of this many adjacent slots of FLOW_SLOTS or FRAGMENT_SLOTS, in general the slot of
/// the oldest flow or datagram.
pub const SHARE_WAYS: u32 = 4;

/// Slot of FLOW_SLOTS. A new flow that takes the slot evicts the flow that held the slot, unless that flow is
/// protected.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FlowSlot {
    /// Key of the flow. Endpoint 0: the slot is free.
    pub key: CtKey,
    /// [`CtEntry::created`] of the flow, which distinguishes the flow from a later one with the same key.
    pub created: u64,
}

/// Slot of FRAGMENT_SLOTS.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FragmentSlot {
    /// Key of the datagram. Hook 0: the slot is free.
    pub key: FragmentKey,
    /// Zero.
    pub zero: u32,
    /// [`FragmentPorts::expires`] of the datagram, which distinguishes the datagram from a later one with the same key.
    pub expires: u64,
}

/// Key of a fragmented datagram whose first fragment has been seen (RFC 791, section 3.2; RFC 8200, section 4.5).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FragmentKey {
    /// Source address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// Identification field; IPv4: in the low 16 bits.
    pub id: u32,
    /// Interface and hook of the first fragment: `ifindex << 1 | egress`. A fragment at one interface cannot set the
    /// ports of a datagram at another interface.
    pub hook: u32,
    /// IP protocol. IPv6: 44, the fragment header itself, because the fragments of one datagram can name different next
    /// headers, and only the next header in the first fragment counts (RFC 8200, section 4.5).
    pub protocol: u32,
}

/// Ports of a fragmented datagram.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FragmentPorts {
    /// Time when the entry expires, ns of the coarse monotonic clock.
    pub expires: u64,
    /// Source port (ICMP: the type), host byte order.
    pub source: u16,
    /// Destination port (ICMP: the echo identifier), host byte order.
    pub destination: u16,
    /// TCP flags of the first fragment.
    pub tcp_flags: u8,
    /// IP protocol of the datagram.
    pub protocol: u8,
    /// Zero.
    pub zero: [u8; 2],
}
