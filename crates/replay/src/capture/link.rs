//! Captured packets and their link layers: where the network header begins, and which way the packet went.

use std::fmt;

use palisade_packet::{Bytes, ETHER_TYPE_IPV4, ETHER_TYPE_IPV6, MAX_HEADERS};

/// Link type of a capture (LINKTYPE_* of <https://www.tcpdump.org/linktypes.html>).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct LinkType(pub i32);

impl LinkType {
    /// BSD loopback: the address family in the byte order of the capturing host.
    pub const NULL: Self = Self(0);
    /// Ethernet.
    pub const ETHERNET: Self = Self(1);
    /// Raw IP, as some libpcap versions number it.
    const RAW_BSD: Self = Self(12);
    const RAW_OPENBSD: Self = Self(14);
    /// Raw IP.
    pub const RAW: Self = Self(101);
    /// OpenBSD loopback: the address family in network order.
    pub const LOOP: Self = Self(108);
    /// Linux cooked capture, version 1.
    pub const LINUX_SLL: Self = Self(113);
    /// Raw IPv4.
    pub const IPV4: Self = Self(228);
    /// Raw IPv6.
    pub const IPV6: Self = Self(229);
    /// Linux cooked capture, version 2.
    pub const LINUX_SLL2: Self = Self(276);
}

impl fmt::Display for LinkType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::NULL => "NULL",
            Self::ETHERNET => "ETHERNET",
            Self::RAW | Self::RAW_BSD | Self::RAW_OPENBSD => "RAW",
            Self::LOOP => "LOOP",
            Self::LINUX_SLL => "LINUX_SLL",
            Self::IPV4 => "IPV4",
            Self::IPV6 => "IPV6",
            Self::LINUX_SLL2 => "LINUX_SLL2",
            Self(other) => return write!(f, "link type {other}"),
        };
        f.write_str(name)
    }
}

/// A packet of a capture file.
#[derive(Clone, Copy, Debug)]
pub struct Captured<'a> {
    /// Time of the packet, ns since 1970; `None` if the file does not contain it (simple packet blocks).
    pub time: Option<u64>,
    /// Number of the interface in the file, counted over all sections.
    pub interface: usize,
    /// Name of the interface; empty if the file does not contain it.
    pub interface_name: &'a str,
    /// Link type of the interface.
    pub link: LinkType,
    /// Direction that the file states for the packet.
    pub hint: PathHint,
    /// Captured bytes.
    pub data: &'a [u8],
    /// Length of the packet before the capture truncated it, bytes.
    pub length: u32,
}

/// Direction of a packet at the interface that captured it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PathHint {
    /// The file does not state it.
    #[default]
    Unknown,
    /// The interface received the packet.
    Inbound,
    /// The interface sent the packet.
    Outbound,
}

/// First header of a [`Frame`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Network {
    /// An Ethernet header.
    Ethernet,
    /// A network header.
    Ip,
    /// Another protocol with this EtherType (0 if there is none).
    Other(u16),
}

/// A captured packet without a link header other than Ethernet.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// First header of `data`.
    pub network: Network,
    /// Captured bytes.
    pub data: &'a [u8],
    /// Length before the capture truncated the packet, bytes; at least that of `data`.
    pub length: u32,
    /// Direction that the link header states.
    pub hint: PathHint,
}

impl Frame<'_> {
    /// Returns whether the capture truncated the packet.
    #[must_use]
    pub fn is_truncated(&self) -> bool {
        u64::from(self.length) > self.data.len() as u64
    }
}

/// The length is the one before the truncation, so the decoder compares the length fields of the headers with it and
/// reports [`palisade_abi::Reason::PullFailed`] if a header was not captured.
impl Bytes for Frame<'_> {
    fn len(&self) -> u32 {
        self.length
    }

    fn array<const N: usize>(&self, offset: u32) -> Option<&[u8; N]> {
        if offset > MAX_HEADERS {
            return None;
        }
        self.data.get(offset as usize..)?.first_chunk()
    }
}

impl Captured<'_> {
    /// Returns the frame of the packet; `None` if the link type is not supported, or the link header was not captured
    /// completely.
    #[must_use]
    pub fn frame(&self) -> Option<Frame<'_>> {
        let whole = |network| Frame {
            network,
            data: self.data,
            length: self.length,
            hint: self.hint,
        };
        let after = |header: usize, network, hint| {
            Some(Frame {
                network,
                data: self.data.get(header..)?,
                length: self.length.saturating_sub(u32::try_from(header).ok()?),
                hint,
            })
        };
        let ether_type = |at: usize| {
            let field: Option<&[u8; 2]> = self.data.get(at..)?.first_chunk();
            Some(match u16::from_be_bytes(*field?) {
                ETHER_TYPE_IPV4 | ETHER_TYPE_IPV6 => Network::Ip,
                other => Network::Other(other),
            })
        };
        // The packet type of a cooked capture (`sll_pkttype`): 4 is a packet that this host has sent, the others are
        // received.
        let cooked = |kind: u8| match kind {
            4 => PathHint::Outbound,
            _ => PathHint::Inbound,
        };
        match self.link {
            LinkType::ETHERNET => Some(whole(Network::Ethernet)),
            LinkType::RAW | LinkType::RAW_BSD | LinkType::RAW_OPENBSD | LinkType::IPV4 | LinkType::IPV6 => {
                Some(whole(Network::Ip))
            }
            LinkType::LINUX_SLL => after(16, ether_type(14)?, cooked(*self.data.get(1)?)),
            LinkType::LINUX_SLL2 => after(20, ether_type(0)?, cooked(*self.data.get(10)?)),
            LinkType::NULL | LinkType::LOOP => {
                // The address family fits into one byte, so either byte order can be recognised. AF_INET is 2
                // everywhere; AF_INET6 is 10, 24, 28 or 30.
                let family = match *self.data.first_chunk::<4>()? {
                    [0, 0, 0, family] | [family, 0, 0, 0] => family,
                    _ => 0,
                };
                let network = match family {
                    2 | 10 | 24 | 28 | 30 => Network::Ip,
                    _ => Network::Other(0),
                };
                after(4, network, self.hint)
            }
            _ => None,
        }
    }
}
