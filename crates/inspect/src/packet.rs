//! The engine's view of a punted packet, and the route of a packet that the engine builds.

use palisade_abi::PuntRequest;
use palisade_packet::Packet;

/// A punted packet together with one of its punt requests.
#[derive(Clone, Copy, Debug)]
pub struct PacketView<'a> {
    /// The punt request: endpoint, rule set and inspector.
    pub slot: &'a PuntRequest,
    /// Index of the interface at which the packet was punted.
    pub ifindex: u32,
    /// Hook at which the packet was punted: [`palisade_abi::punt_hook`].
    pub hook: u8,
    /// Decoded headers of `frame`.
    pub packet: &'a Packet,
    /// The frame from its Ethernet header on. Its transport checksum is complete and valid, except in a fragment.
    pub frame: &'a [u8],
    /// Offset of the network header in `frame`, bytes.
    pub network: usize,
    /// Offset of the transport header in `frame`, bytes.
    pub transport: usize,
    /// Start and end of the transport payload in `frame`, bytes. A frame can have padding after the end.
    pub payload: (usize, usize),
}

/// Destination of a packet that the engine builds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Route {
    /// Index of the interface at which the packet that caused the generated packet was punted.
    pub ifindex: u32,
    /// Hook at which the packet that caused the generated packet was punted: [`palisade_abi::punt_hook`].
    pub hook: u8,
    /// Whether the generated packet goes to the sender of the packet that caused it. If not, the generated packet takes
    /// the path of that packet.
    pub back: bool,
}
