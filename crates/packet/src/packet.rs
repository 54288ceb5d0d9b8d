//! The decoded headers of a packet.

use palisade_abi::{Addr, protocol};

/// Bits of [`Packet::flags`]: the kind of a packet.
pub mod flags {
    /// IPv6.
    pub const IPV6: u8 = 1;
    /// Not IP; [`super::Packet::ether_type`] is the protocol.
    pub const NOT_IP: u8 = 2;
    /// The first of several fragments.
    pub const FRAGMENT_FIRST: u8 = 4;
    /// A fragment other than the first: it has no transport header.
    pub const FRAGMENT_LATER: u8 = 8;
    /// ICMP or ICMPv6 echo request.
    pub const ECHO_REQUEST: u8 = 16;
    /// ICMP or ICMPv6 echo reply.
    pub const ECHO_REPLY: u8 = 32;
    /// An ICMP or ICMPv6 error, which quotes a packet.
    pub const ICMP_ERROR: u8 = 64;
}

/// The fields of a packet's headers that a verdict depends on.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Packet {
    /// Source address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// Source port, host byte order; ICMP: the type; otherwise 0.
    pub source_port: u16,
    /// Destination port, host byte order; ICMP: the code; otherwise 0.
    pub destination_port: u16,
    /// Identifier of an ICMP echo message.
    pub echo_id: u16,
    /// EtherType after any VLAN tags; a value below 1536 is an IEEE 802.3 length.
    pub ether_type: u16,
    /// Length from the network header on, without Ethernet padding, bytes.
    pub length: u32,
    /// Identification field of a fragment, host byte order.
    pub fragment_id: u32,
    /// Offset of the network header in the frame, bytes.
    pub network_offset: u16,
    /// Offset of the transport header in the frame, if there is one, bytes.
    pub transport_offset: u16,
    /// IP protocol. Later IPv6 fragments: the next header of the fragment header, which can be an extension header.
    pub protocol: u8,
    /// TCP flags.
    pub tcp_flags: u8,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// [`flags`].
    pub flags: u8,
}

impl Packet {
    /// Returns whether any of the given [`flags`] is set.
    #[inline(always)]
    #[must_use]
    pub const fn is(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }

    /// Returns the offset of the packet's end in the frame, bytes.
    #[inline(always)]
    pub(crate) const fn end(&self) -> u32 {
        self.network_offset as u32 + self.length
    }
}

/// Returns whether protocol `p` is the ICMP of the address family: ICMPv6 over IPv6, ICMP over IPv4.
#[inline(always)]
pub(crate) const fn is_icmp(p: u8, ipv6: bool) -> bool {
    if ipv6 {
        p == protocol::ICMPV6
    } else {
        p == protocol::ICMP
    }
}
