//! Intercepted flows: TCP flows whose policy entry requires [`crate::Inspector::TlsTerminate`].
//!
//! The packets of an intercepted flow go to sockets of the proxy in a network namespace of Palisade's own, and packets
//! of these sockets continue where the flow was intercepted. Each [`crate::Direction`] of the verdict has a namespace
//! and a veth pair (a proxy link), so that a flow that the policies of both its ends intercept has its sockets in two
//! namespaces. Which hook intercepted the flow is in its conntrack entry: [`ProxyPath`].

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Addr, Direction, PuntRequest};

/// MAC address of the proxy's end of each proxy link (locally administered). The programs write it into the frames that
/// they redirect to a proxy link, because the proxy's end accepts no other destination.
pub const PROXY_MAC: [u8; 6] = [0x02, 0x50, 0x61, 0x6c, 0x69, 0x01];

/// Index of the proxy's end of the proxy link of [`Direction::Ingress`], in its namespace; the index of
/// [`Direction::Egress`] is one more. `palisade_lookup` tells the directions apart by it.
pub const PROXY_IFINDEX: u32 = 1_000;

/// Returns the slot of a listening socket in the PROXY_LISTENERS map.
#[inline(always)]
#[must_use]
pub const fn listener_slot(direction: Direction, ipv6: bool) -> u32 {
    2 * direction as u32 + ipv6 as u32
}

/// The interface at which a flow was intercepted, and the MAC addresses of its frames there. Stored in
/// [`crate::CtEntry::windows`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ProxyPath {
    /// MAC address on the interface's own side: the destination of frames that enter by the interface.
    pub near: [u8; 6],
    /// MAC address on the far side: the destination of frames that leave by the interface.
    pub far: [u8; 6],
    /// Index of the interface, and [`Self::RESOLVED`]; 0: no path is known yet.
    pub ifindex: u32,
}

impl ProxyPath {
    /// Bit of [`Self::ifindex`]: the MAC address of the far side can be used. It is a workload's, or the kernel has
    /// resolved it. The source MAC address of a frame that entered by a NIC cannot be used: any host of the link can
    /// send it with a foreign source address and would get the answers.
    pub const RESOLVED: u32 = 1 << 31;
}

/// Addresses and ports of an intercepted flow, and the direction of the verdict.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ProxiedKey {
    /// Address of the opener.
    pub client: Addr,
    /// Address of the answering end.
    pub server: Addr,
    /// Port of the opener, host byte order.
    pub client_port: u16,
    /// Port of the answering end, host byte order.
    pub server_port: u16,
    /// Direction of the flow, seen from the endpoint whose policy intercepts it.
    pub direction: Direction,
}

/// An intercepted flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProxiedFlow {
    /// The request of the policy. Its flags are those of the flow and not of a packet: INGRESS, AUDIT and MIDSTREAM.
    pub request: PuntRequest,
    /// Index of the interface at which the flow is intercepted; 0: not known yet.
    pub ifindex: u32,
}
