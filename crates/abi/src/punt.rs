//! The header of punted packets, the trailer of reinjected packets, and the commands of workers to the programs.
//!
//! A packet that needs inspection goes over the punt link, a veth pair of Palisade's own: `<name>0` and `<name>1`. The
//! programs put a [`PuntHeader`] in front of the packet and redirect it to `<name>0`; at `<name>1` an XDP program
//! redirects the packet into the AF_XDP socket of the receive queue. The worker sends the packet from the same socket
//! with a [`ReinjectTrailer`] after it; the program at the ingress of `<name>0` removes the trailer and redirects the
//! packet to the interface where it was punted.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::CtKey;

/// Flags of a [`PuntRequest`].
pub mod punt_flags {
    /// The packet goes *to* the endpoint of the request; otherwise it comes from that endpoint.
    pub const INGRESS: u8 = 1;
    /// The packet is of the reply direction of the flow.
    pub const REPLY: u8 = 2;
    /// Audit mode: a request that the application rules deny passes and is reported as AUDIT.
    pub const AUDIT: u8 = 4;
    /// The flow was first seen in mid-stream (TCP without SYN).
    pub const MIDSTREAM: u8 = 8;
    /// This packet created the flow.
    pub const NEW: u8 = 16;
    /// Set by the worker: the policies of both endpoints inspect the packet. A packet that the inspector of one policy
    /// generates does not pass the inspector of the other policy.
    pub const SHARED: u8 = 32;
}

/// The hook that punted a packet. If the packet passes, it continues at the same interface in the same direction.
pub mod punt_hook {
    /// XDP at the ingress of the interface. The reinjected packet enters the local stack.
    pub const XDP_INGRESS: u8 = 1;
    /// tc at the ingress of the interface. The reinjected packet enters the local stack.
    pub const TC_INGRESS: u8 = 2;
    /// tc at the egress of the interface. The reinjected packet leaves by the interface.
    pub const TC_EGRESS: u8 = 3;
}

/// A request of one policy to inspect a packet.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PuntRequest {
    /// Number of the rule that decided about the flow.
    pub rule: u32,
    /// Number of the rule set.
    pub ruleset: u32,
    /// Identity of the peer.
    pub remote_identity: u32,
    /// The endpoint's revision.
    pub revision: u32,
    /// [`crate::CtEntry::serial`], which distinguishes a connection from the next one with the same addresses and
    /// ports.
    pub serial: u32,
    /// The endpoint whose policy requests inspection; 0: no request.
    pub endpoint: u16,
    /// [`crate::Inspector`].
    pub inspector: u8,
    /// [`punt_flags`].
    pub flags: u8,
}

/// The header of a punted packet, directly before its Ethernet header.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PuntHeader {
    /// [`crate::Config::cookie`], which only programs and workers know. The cookie distinguishes punted packets from
    /// other frames.
    pub cookie: u64,
    /// Index of the interface where the packet was punted.
    pub ifindex: u32,
    /// Hash of the flow, the same for both directions; chooses the worker (`hash % workers`).
    pub hash: u32,
    /// VLAN tag (TCI) from `skb->vlan_tci`, which the frame itself does not contain. Valid if `vlan_protocol` is not 0.
    pub vlan: u16,
    /// EtherType of the VLAN tag, host byte order; 0: no tag.
    pub vlan_protocol: u16,
    /// [`punt_hook`].
    pub hook: u8,
    /// Zero.
    pub zero: [u8; 3],
    /// The requests, in the order in which the policies decide: that of the interface's endpoint before that of the
    /// node. With only one request, the second slot is unused.
    pub slots: [PuntRequest; 2],
}

/// Path of a reinjected packet at the interface that its [`ReinjectTrailer`] names.
pub mod reinject_path {
    /// The packet enters the local stack as if received on the interface.
    pub const INGRESS: u8 = 1;
    /// The packet leaves by the interface.
    pub const EGRESS: u8 = 2;
    /// The frame only brings commands; it is dropped afterwards.
    pub const NONE: u8 = 3;
}

/// Flags of a [`ReinjectTrailer`].
pub mod reinject_flags {
    /// The program sets `skb->mark` to [`crate::Config::mark`], so that the tc program on the packet's path at the
    /// interface lets the packet pass. The flag is not set if the hook on that path is XDP, because no tc program would
    /// remove the mark.
    pub const MARK: u8 = 1;
    /// A [`super::FlowCommand`] precedes the trailer.
    pub const COMMAND: u8 = 2;
    /// A second command precedes the first one, because two policies can inspect one packet.
    pub const SECOND_COMMAND: u8 = 4;
}

/// The last bytes of a reinjected frame.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ReinjectTrailer {
    /// [`crate::Config::cookie`].
    pub cookie: u64,
    /// Index of the interface where the packet is reinjected.
    pub ifindex: u32,
    /// [`reinject_path`].
    pub path: u8,
    /// [`reinject_flags`].
    pub flags: u8,
    /// Zero.
    pub zero: [u8; 2],
}

/// Operations of a [`FlowCommand`].
pub mod flow_op {
    /// Sets the offload windows: sequence numbers inside them need no inspection.
    pub const WINDOWS: u32 = 0;
    /// Offloads the flow: neither direction needs inspection any more. The windows are ignored.
    pub const OFFLOAD: u32 = 1;
    /// The connection is over: the inspector has verified the close or reset of the connection, or has reset the
    /// connection.
    pub const CLOSE: u32 = 2;
    /// The opener has acknowledged the answering side's SYN.
    pub const OPENED: u32 = 3;
    /// A new connection with the same addresses and ports replaces the connection that the entry was made for. The
    /// decisions for the old connection become void; `windows[0]` is the serial of the new connection. A packet that
    /// carries this command is reinjected only if the command was applied.
    pub const REPLACE: u32 = 4;
    /// As [`WINDOWS`], and limits the sender of at least one direction: the low four bits of the start of each window are
    /// [`crate::send_limit_code`].
    pub const LIMITED_WINDOWS: u32 = 5;
}

/// An instruction of a worker to the programs about one flow. The command is applied before the packet that carries it
/// is reinjected.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FlowCommand {
    /// The flow.
    pub key: CtKey,
    /// [`crate::CtEntry::serial`] of the connection. The command is ignored if the entry has another serial.
    pub serial: u32,
    /// [`flow_op`].
    pub op: u32,
    /// The rule set by which the flow was inspected. [`flow_op::WINDOWS`] and [`flow_op::OFFLOAD`] are ignored if the
    /// entry has another rule set or other flags by now.
    pub ruleset: u32,
    /// Flags of the rule set: [`punt_flags::AUDIT`] or 0.
    pub punt_flags: u32,
    /// [`crate::CtEntry::windows`] to set. [`flow_op::REPLACE`]: the first word is the new serial.
    pub windows: [u32; 4],
}

/// MTU of the punt link, bytes. With native XDP on a veth, a frame of this MTU fits into one page, together with
/// headroom and `skb_shared_info`.
pub const PUNT_MTU: u32 = 3_400;

/// Length of an Ethernet header, bytes. The MTU of a device does not include this header.
const ETHERNET: u32 = 14;

/// Maximum length of the trailer of a reinjected frame with its commands, bytes. There is one command for each of two
/// policies.
pub const MAX_TRAILER: u32 = (size_of::<ReinjectTrailer>() + 2 * size_of::<FlowCommand>()) as u32;

/// Maximum length of a frame that can be punted, bytes from its Ethernet header on. A veth drops a frame that exceeds
/// its MTU (`is_skb_forwardable`), and no counter of Palisade shows this drop. So the frame must fit with the punt
/// header when it is punted, and with the trailer when it is reinjected.
pub const MAX_PUNT_FRAME: u32 = PUNT_MTU + ETHERNET - MAX_TRAILER;

const _: () = assert!(MAX_PUNT_FRAME + size_of::<PuntHeader>() as u32 <= PUNT_MTU + ETHERNET);
const _: () = assert!(MAX_PUNT_FRAME + MAX_TRAILER <= PUNT_MTU + ETHERNET);

/// Maximum length of a frame on the punt link, header or trailer included, bytes. The reinjected frame contains the
/// VLAN tag that was in `skb->vlan_tci` when the packet was punted; `is_skb_forwardable` allows 4 more bytes for a tag.
pub const MAX_ON_PUNT_LINK: u32 = PUNT_MTU + ETHERNET + 4;

/// Upper bound of the headers of a segment, bytes, Ethernet and IPv6 extension headers included. A super-frame (GSO) is
/// punted if its segment size and these headers fit into [`MAX_PUNT_FRAME`].
pub const MAX_SEGMENT_HEADERS: u32 = 256;

/// Largest MSS of a connection whose segments can all be punted (RFC 9293, section 3.7.1).
pub const MAX_PUNT_MSS: u16 = (MAX_PUNT_FRAME - MAX_SEGMENT_HEADERS) as u16;

/// Maximum number of workers: size of the WORKERS and XSKS maps.
pub const MAX_WORKERS: usize = 64;
