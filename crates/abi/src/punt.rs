//! Packets on their way to a worker and back.
//!
//! A packet that must be read is sent through the *carrier*, a veth pair of Palisade's own: `<name>0` and
//! `<name>1`. The programs put a [`PuntHeader`] in front of it and redirect it to `<name>0`; at `<name>1` an XDP program
//! gives it to the AF_XDP socket of its queue. A worker sends it back on the same socket with a [`ReinjectTrailer`]
//! behind it; the program at the ingress of `<name>0` takes that off and redirects the packet to where it was.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Addr, CtKey};

/// Flags of a [`PuntRequest`].
pub mod punt_flags {
    /// The packet goes *to* the endpoint of the slot; else it comes from it.
    pub const INGRESS: u8 = 1;
    /// The packet is of the direction that answers the flow.
    pub const REPLY: u8 = 2;
    /// What the application rules deny passes, and is reported as AUDIT.
    pub const AUDIT: u8 = 4;
    /// The flow was first seen in mid-stream (TCP without SYN).
    pub const MIDSTREAM: u8 = 8;
    /// The flow was made by this very packet.
    pub const NEW: u8 = 16;
    /// Set by the worker: another policy has the packet read too. What is made in its place would not be read by that.
    pub const SHARED: u8 = 32;
}

/// Where a carried packet was caught. Its way on is the same hook of the same interface.
pub mod punt_hook {
    /// XDP at the ingress of the interface: goes on into the local stack.
    pub const XDP_INGRESS: u8 = 1;
    /// tc at the ingress of the interface: goes on into the local stack.
    pub const TC_INGRESS: u8 = 2;
    /// tc at the egress of the interface: goes on out of it.
    pub const TC_EGRESS: u8 = 3;
}

/// Who wants a packet read, and by what.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PuntRequest {
    /// The deciding rule of the flow.
    pub rule: u32,
    /// The set of application rules.
    pub ruleset: u32,
    /// Identity of the other end.
    pub remote_identity: u32,
    /// The endpoint's revision.
    pub revision: u32,
    /// [`crate::CtEntry::serial`]: tells a connection from the next one with the same addresses and ports.
    pub serial: u32,
    /// The endpoint whose policy asks; 0: the slot is not used.
    pub endpoint: u16,
    /// [`crate::Inspector`].
    pub inspector: u8,
    /// [`punt_flags`].
    pub flags: u8,
}

/// What stands in front of a carried packet, directly before its Ethernet header.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PuntHeader {
    /// [`crate::Config::cookie`]: nobody else puts packets on the carrier.
    pub cookie: u64,
    /// The interface where it was caught.
    pub ifindex: u32,
    /// The same for both directions of a flow as one endpoint sees it; chooses the worker (`hash % workers`).
    pub hash: u32,
    /// VLAN tag that the kernel kept beside the frame (TCI), if `vlan_protocol` is not 0.
    pub vlan: u16,
    /// EtherType of that tag, machine order.
    pub vlan_protocol: u16,
    /// [`punt_hook`].
    pub hook: u8,
    /// Zero.
    pub zero: [u8; 3],
    /// Whose policy asks: first the interface's endpoint, then the node, in the order in which they judge.
    pub slots: [PuntRequest; 2],
}

/// Where a reinjected packet goes on, from the interface that its [`ReinjectTrailer`] names.
pub mod reinject_path {
    /// Into the local stack, as received on the interface.
    pub const INGRESS: u8 = 1;
    /// Out of the interface.
    pub const EGRESS: u8 = 2;
    /// Nowhere: the frame only brings commands.
    pub const NONE: u8 = 3;
}

/// Flags of a [`ReinjectTrailer`].
pub mod reinject_flags {
    /// The tc program of that direction at the interface lets the packet pass by [`crate::Config::mark`]. Not set where
    /// the ingress hook is XDP: no tc program would take the mark off again.
    pub const MARK: u8 = 1;
    /// A [`super::FlowCommand`] stands before the trailer.
    pub const COMMAND: u8 = 2;
    /// A second command stands before the first. Two policies may inspect one packet.
    pub const SECOND_COMMAND: u8 = 4;
}

/// The last bytes of a reinjected frame.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ReinjectTrailer {
    /// [`crate::Config::cookie`].
    pub cookie: u64,
    /// The interface it goes to.
    pub ifindex: u32,
    /// [`reinject_path`].
    pub path: u8,
    /// [`reinject_flags`].
    pub flags: u8,
    /// Zero.
    pub zero: [u8; 2],
}

/// What a [`FlowCommand`] wants.
pub mod flow_op {
    /// What lies in the windows needs no reading.
    pub const WINDOWS: u32 = 0;
    /// Nothing needs reading any more. The windows are ignored.
    pub const OFFLOAD: u32 = 1;
    /// The connection is over: it was closed or reset in packets that the inspector has verified, or by the inspector.
    pub const CLOSE: u32 = 2;
    /// The opener has acknowledged the answering side's SYN.
    pub const OPENED: u32 = 3;
    /// Another connection by the same ports has taken the place of the one that the entry was made for. Nothing that
    /// was decided for that one holds for it, and it has a serial of its own: the first number of the windows. A packet
    /// that brings this order goes on only if it was obeyed.
    pub const REPLACE: u32 = 4;
}

/// What the programs are to do with a flow from now on. In force before the packet that carries it goes on.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FlowCommand {
    /// The flow.
    pub key: CtKey,
    /// Only if the entry still has this [`crate::CtEntry::serial`].
    pub serial: u32,
    /// [`order`].
    pub op: u32,
    /// The application rules by which the flow was read, and their flags ([`punt_flags::AUDIT`] or 0). If others hold
    /// for it by now, it is not left to the programs.
    pub ruleset: u32,
    /// See `ruleset`.
    pub punt_flags: u32,
    /// See [`crate::CtEntry::windows`].
    pub windows: [u32; 4],
}

/// Key of an address that an endpoint has learned by a name.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
pub struct LearnedKey {
    /// The address.
    pub addr: Addr,
    /// The endpoint.
    pub endpoint: u32,
}

/// MTU of the carrier: what native XDP on a veth takes in one page with everything that it puts around it.
pub const PUNT_MTU: u32 = 3_400;

/// Length of an Ethernet header, which a device's MTU does not count.
const ETHERNET: u32 = 14;

/// The most that stands behind a frame on its way back from a worker: two policies may have a command each.
pub const MAX_TRAILER: u32 = (size_of::<ReinjectTrailer>() + 2 * size_of::<FlowCommand>()) as u32;

/// Longest frame that can be carried, from its Ethernet header on. veth drops what is longer than its MTU without a
/// counter of ours (`is_skb_forwardable`), so the frame fits with what stands in front of it on its way to a worker, and
/// with what stands behind it on its way back.
pub const MAX_PUNT_FRAME: u32 = PUNT_MTU + ETHERNET - MAX_TRAILER;

const _: () = assert!(MAX_PUNT_FRAME + size_of::<PuntHeader>() as u32 <= PUNT_MTU + ETHERNET);
const _: () = assert!(MAX_PUNT_FRAME + MAX_TRAILER <= PUNT_MTU + ETHERNET);

/// Longest frame on the carrier with all that is around it. A VLAN tag that the kernel kept beside the frame on its way to
/// a worker stands in it on its way back; veth allows for one.
pub const MAX_ON_CARRIER: u32 = PUNT_MTU + ETHERNET + 4;

/// More than the headers of a segment take, Ethernet and IPv6 extension headers included. A super-frame is carried if
/// its segment size and these fit into [`MAX_PUNT_FRAME`].
pub const MAX_SEGMENT_HEADERS: u32 = 256;

/// Largest MSS of a connection whose segments can all be carried (RFC 9293, 3.7.1).
pub const MAX_PUNT_MSS: u16 = (MAX_PUNT_FRAME - MAX_SEGMENT_HEADERS) as u16;

/// Most workers that there can be: slots of the WORKERS and XSKS maps.
pub const MAX_WORKERS: usize = 64;
