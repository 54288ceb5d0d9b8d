//! The record that the programs write for each captured packet, and the settings of a capture. Only the object for
//! captures (`palisade_datapath::CAPTURE_OBJECT`) uses them.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Addr, Event};

/// Largest number of bytes of a packet that a capture can copy.
pub const MAX_CAPTURED: u32 = 65_536;

/// Flags of [`CaptureCondition`].
pub mod capture_flags {
    /// Only dropped packets are captured.
    pub const DROPS_ONLY: u32 = 1;
}

/// Addresses and ports that a packet can have at one end.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CaptureEnd {
    /// Address after [`Self::mask`] was applied.
    pub addr: Addr,
    /// Bits of the address that are compared; all zero accepts every address.
    pub mask: Addr,
    /// First port, host byte order.
    pub first_port: u16,
    /// Last port, host byte order.
    pub last_port: u16,
}

impl CaptureEnd {
    /// Every address and port.
    pub const ANY: Self = Self {
        addr: Addr([0; 4]),
        mask: Addr([0; 4]),
        first_port: 0,
        last_port: u16::MAX,
    };

    /// Returns whether an address is accepted.
    #[inline(always)]
    #[must_use]
    pub const fn has_addr(&self, addr: &Addr) -> bool {
        let (mask, wanted, addr) = (&self.mask.0, &self.addr.0, &addr.0);
        (addr[0] & mask[0]) ^ wanted[0]
            | (addr[1] & mask[1]) ^ wanted[1]
            | (addr[2] & mask[2]) ^ wanted[2]
            | (addr[3] & mask[3]) ^ wanted[3]
            == 0
    }

    /// Returns whether a port is accepted.
    #[inline(always)]
    #[must_use]
    pub const fn has_port(&self, port: u16) -> bool {
        self.first_port <= port && port <= self.last_port
    }
}

/// A condition that a packet must satisfy to be copied.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CaptureCondition {
    /// [`capture_flags`].
    pub flags: u32,
    /// Index of the interface; 0 for every interface.
    pub ifindex: u32,
    /// IP protocol plus one; 0 for every protocol and for frames that are not IP.
    pub protocol: u32,
    /// Condition for the source.
    pub source: CaptureEnd,
    /// Condition for the destination.
    pub destination: CaptureEnd,
}

impl CaptureCondition {
    /// The condition that every packet satisfies.
    pub const ANY: Self = Self {
        flags: 0,
        ifindex: 0,
        protocol: 0,
        source: CaptureEnd::ANY,
        destination: CaptureEnd::ANY,
    };
}

/// Value of the CAPTURE map: which packets the programs copy. The reader of the records applies the complete filters;
/// these conditions only save copies.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CaptureSettings {
    /// Time at which the capture ends, ns of the coarse monotonic clock. The programs then copy nothing, even if no
    /// process ends the capture.
    pub until: u64,
    /// Largest number of bytes that are copied of a packet, from 1 to [`MAX_CAPTURED`].
    pub snap_length: u32,
    /// Zero.
    pub zero: u32,
    /// Conditions, one of which a packet must satisfy. Filters for either direction of a connection need two.
    pub conditions: [CaptureCondition; 2],
}

impl CaptureSettings {
    /// Returns settings that accept every packet.
    #[must_use]
    pub const fn all(until: u64, snap_length: u32) -> Self {
        Self {
            until,
            snap_length,
            zero: 0,
            conditions: [CaptureCondition::ANY; 2],
        }
    }
}

/// Flags of [`CaptureHeader`].
pub mod captured_flags {
    /// The packet was punted to a worker or to the proxy, which decides.
    pub const PUNTED: u8 = 1;
    /// The frame begins with the network header.
    pub const LAYER3: u8 = 2;
}

/// First part of a record of the CAPTURED ring. [`Self::captured`] bytes of the packet follow.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CaptureHeader {
    /// The packet and its verdict. The MAC addresses are zero; they are in the copied bytes.
    pub event: Event,
    /// Length of the frame as it came, without a tag in [`Self::vlan_tci`], bytes.
    pub frame_length: u32,
    /// Number of copied bytes, which begin with the first header of the frame.
    pub captured: u32,
    /// TCI of a VLAN tag that the kernel has removed from the frame.
    pub vlan_tci: u16,
    /// EtherType of that tag; 0: none.
    pub vlan_protocol: u16,
    /// [`crate::punt_hook`] of the program.
    pub hook: u8,
    /// [`captured_flags`].
    pub flags: u8,
    /// [`crate::Inspector`] of a punted packet.
    pub inspector: u8,
    /// Zero.
    pub zero: u8,
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().map(Addr::from).unwrap_or_default()
    }

    #[test]
    fn an_end_without_conditions_accepts_everything() {
        for text in ["192.0.2.1", "2001:db8::1", "::", "255.255.255.255"] {
            assert!(CaptureEnd::ANY.has_addr(&addr(text)), "{text}");
        }
        assert!(CaptureEnd::ANY.has_port(0) && CaptureEnd::ANY.has_port(u16::MAX));
    }

    #[test]
    fn an_end_accepts_the_addresses_of_its_prefix_and_the_ports_of_its_range() {
        let mask = addr("ffff:ffff::");
        let end = CaptureEnd {
            addr: addr("2001:db8::"),
            mask,
            first_port: 80,
            last_port: 90,
        };
        assert!(end.has_addr(&addr("2001:db8:1::5")));
        assert!(!end.has_addr(&addr("2001:db9::5")));
        assert!(!end.has_addr(&addr("192.0.2.1")));
        assert!(end.has_port(80) && end.has_port(90));
        assert!(!end.has_port(79) && !end.has_port(91));
    }
}
