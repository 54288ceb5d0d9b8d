//! Port classes: every (protocol, port) that no rule tells apart from another has the same class, so that a
//! rule about a range of 40,000 ports is one table entry.

/// A port class. 0 is [`CLASS_ANY`]; ids are given out once and keep their meaning while a policy uses them.
pub type Class = u16;

/// In a policy key: "whatever the protocol and the port". No packet has this class.
pub const CLASS_ANY: Class = 0;

/// What a slot of the class map holds before the first policy is written: matches only [`CLASS_ANY`] entries.
pub const CLASS_UNKNOWN: Class = 0;

/// The first class that the compiler gives out.
pub const FIRST_DYNAMIC_CLASS: Class = 1;

/// Slots for each protocol with ports: the 65,536 ports, and one for "the port cannot be known"
/// (a fragment whose first fragment was not seen), which only rules about every port of the protocol cover.
pub const PORT_SLOTS: usize = 65_537;
/// Slots for ICMP types, each for ICMP and ICMPv6; and one for "type unknown" (a later fragment).
pub const ICMP_SLOTS: usize = 257;
/// Slots for protocols by number.
pub const PROTOCOL_SLOTS: usize = 256;
/// Length of the class table.
pub const CLASS_SLOTS: usize = 3 * PORT_SLOTS + 2 * ICMP_SLOTS + PROTOCOL_SLOTS + 1;

const UDP_BASE: u32 = PORT_SLOTS as u32;
const SCTP_BASE: u32 = 2 * PORT_SLOTS as u32;
const ICMP_BASE: u32 = 3 * PORT_SLOTS as u32;
const ICMPV6_BASE: u32 = ICMP_BASE + ICMP_SLOTS as u32;
const PROTOCOL_BASE: u32 = ICMPV6_BASE + ICMP_SLOTS as u32;

/// The slot of the class table for a protocol and a destination port (for ICMP: the type; else ignored).
/// Always less than [`CLASS_SLOTS`].
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

/// The slot for a packet of `protocol` whose port or type cannot be known.
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
