//! Port classes. All (protocol, port) pairs that no rule distinguishes share one class, so a rule for a range of 40,000
//! ports needs a few entries in the policy table instead of 40,000.

/// Number of a port class; 0 is [`CLASS_ANY`]. A number keeps its meaning while a policy uses it.
pub type Class = u16;

/// Wildcard of a policy key: any protocol and any port. The compiler assigns this class to no port.
pub const CLASS_ANY: Class = 0;

/// Class of all slots before the first policy is written. The number equals [`CLASS_ANY`], so packets with this class
/// match only entries for any protocol and any port.
pub const CLASS_UNKNOWN: Class = 0;

/// The first class that the compiler assigns.
pub const FIRST_DYNAMIC_CLASS: Class = 1;

/// Number of slots for each protocol with ports: 65,536 ports, and one slot for an unknown port (a later fragment whose
/// first fragment was not seen). Only rules for all ports match an unknown port.
pub const PORT_SLOTS: usize = 65_537;
/// Number of slots for each of ICMP and ICMPv6: 256 types, and one slot for an unknown type (a later fragment).
pub const ICMP_SLOTS: usize = 257;
/// Number of slots for protocols without ports.
pub const PROTOCOL_SLOTS: usize = 256;
/// Number of slots of the class table.
pub const CLASS_SLOTS: usize = 3 * PORT_SLOTS + 2 * ICMP_SLOTS + PROTOCOL_SLOTS + 1;

const UDP_BASE: u32 = PORT_SLOTS as u32;
const SCTP_BASE: u32 = 2 * PORT_SLOTS as u32;
const ICMP_BASE: u32 = 3 * PORT_SLOTS as u32;
const ICMPV6_BASE: u32 = ICMP_BASE + ICMP_SLOTS as u32;
const PROTOCOL_BASE: u32 = ICMPV6_BASE + ICMP_SLOTS as u32;

/// Returns the slot of the class table for a protocol and a destination port. For ICMP and ICMPv6, `port` is the type;
/// for protocols without ports, `port` is ignored. The slot is always less than [`CLASS_SLOTS`].
#[inline(always)]
#[must_use]
pub const fn class_slot(protocol: u8, port: u16) -> u32 {
    match protocol {
        crate::protocol::TCP => port as u32,
        crate::protocol::UDP => UDP_BASE + port as u32,
        crate::protocol::SCTP => SCTP_BASE + port as u32,
        crate::protocol::ICMP => ICMP_BASE + (port & 0xff) as u32,
        crate::protocol::ICMPV6 => ICMPV6_BASE + (port & 0xff) as u32,
        other => PROTOCOL_BASE + other as u32,
    }
}

/// Returns the slot of the class table for a packet of `protocol` whose port or type is unknown.
#[inline(always)]
#[must_use]
pub const fn class_slot_unknown_port(protocol: u8) -> u32 {
    match protocol {
        crate::protocol::TCP => 65_536,
        crate::protocol::UDP => UDP_BASE + 65_536,
        crate::protocol::SCTP => SCTP_BASE + 65_536,
        crate::protocol::ICMP => ICMP_BASE + 256,
        crate::protocol::ICMPV6 => ICMPV6_BASE + 256,
        other => PROTOCOL_BASE + other as u32,
    }
}
