//! What stands in front of a carried packet, and what is put behind one that goes on. Pure: bytes in, bytes out.

use palisade_abi::{
    Carried, CarrySlot, FlowCommand, MAX_CARRIED_MSS, Reason, Released, carry_hook, protocol, release,
};
use palisade_inspect::{OptionProblem, Route, View};
use palisade_packet::{Packet, Start, flags};
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::checksum;

/// Length of a [`Carried`].
pub const CARRIED: usize = size_of::<Carried>();
/// The most that is put behind a packet.
pub const TRAILER: usize = size_of::<Released>() + 2 * size_of::<FlowCommand>();
/// Shortest Ethernet frame that is one: its header.
pub const ETHERNET: usize = 14;

/// Reads what stands in front.
///
/// # Errors
/// Nobody of ours put this frame on the carrier, or not as agreed.
pub fn carried(bytes: &[u8], cookie: u64) -> Result<Carried, Reason> {
    let (carried, frame) = Carried::read_from_prefix(bytes).map_err(|_| Reason::CarryForeign)?;
    if carried.cookie != cookie || frame.len() < ETHERNET {
        return Err(Reason::CarryForeign);
    }
    let known = matches!(
        carried.hook,
        carry_hook::XDP_INGRESS | carry_hook::TC_INGRESS | carry_hook::TC_EGRESS
    );
    let asked = carried.slots.iter().any(|slot| slot.endpoint != 0);
    if !known || !asked || carried.ifindex == 0 {
        return Err(Reason::CarryForeign);
    }
    Ok(carried)
}

/// The flow's hash as it stands in front, whoever wrote it.
#[must_use]
pub fn hash(bytes: &[u8]) -> u32 {
    Carried::read_from_prefix(bytes).map_or(0, |(carried, _)| carried.hash)
}

/// A packet that can be read: where its parts are, counted from the start of the Ethernet header.
#[derive(Clone, Copy, Debug)]
pub struct Ready {
    /// Where in the bytes the Ethernet header starts.
    pub start: usize,
    /// What was decoded.
    pub packet: Packet,
}

impl Ready {
    /// As the engine sees it.
    #[must_use]
    pub fn view<'a>(&'a self, slot: &'a CarrySlot, ifindex: u32, hook: u8, frame: &'a [u8]) -> View<'a> {
        let transport = usize::from(self.packet.transport_offset);
        View {
            slot,
            ifindex,
            hook,
            packet: &self.packet,
            frame,
            network: usize::from(self.packet.network_offset),
            transport,
            payload: payload(frame, &self.packet),
        }
    }
}

/// Rewrites the TCP options of a packet that will be read ([`palisade_inspect::normalise_options`]); it goes on
/// changed, if it goes on. A SYN offers no larger segments than the carrier takes. Returns whether anything was
/// changed; false for what is no whole TCP segment.
///
/// # Errors
/// The packet must not go on.
pub fn normalise(bytes: &mut [u8], ready: &Ready) -> Result<bool, OptionProblem> {
    let packet = &ready.packet;
    if packet.protocol != protocol::TCP || packet.is(flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER) {
        return Ok(false);
    }
    let start = ready.start + usize::from(packet.transport_offset);
    let end = ready.start + usize::from(packet.network_offset) + packet.length as usize;
    let segment = bytes.get_mut(start..end).ok_or(OptionProblem::Length)?;
    palisade_inspect::normalise_options(segment, Some(MAX_CARRIED_MSS))
}

/// Where the payload of the transport starts and ends; of a later fragment, what it carries.
fn payload(frame: &[u8], packet: &Packet) -> (usize, usize) {
    let transport = usize::from(packet.transport_offset);
    let end = (usize::from(packet.network_offset) + packet.length as usize).min(frame.len());
    let byte = |at: usize| frame.get(transport + at).copied().unwrap_or(0);
    let (header, length) = if packet.is(flags::FRAGMENT_LATER) {
        (0, None)
    } else {
        match packet.protocol {
            protocol::TCP => (usize::from(byte(12) >> 4) * 4, None),
            protocol::UDP if packet.is(flags::FRAGMENT_FIRST) => (8, None),
            protocol::UDP => (8, Some(usize::from(u16::from_be_bytes([byte(4), byte(5)])))),
            protocol::SCTP => (12, None),
            protocol::ICMP | protocol::ICMPV6 => (8, None),
            _ => (0, None),
        }
    };
    let end = length.map_or(end, |length| end.min(transport + length));
    ((transport + header).min(end), end)
}

/// Makes a carried packet whole: the VLAN tag that was beside it stands in it again, its checksums are right.
///
/// # Errors
/// The packet cannot be read, or its receiver would not.
pub fn prepare(bytes: &mut [u8], carried: &Carried) -> Result<Ready, (Reason, Packet)> {
    let mut start = CARRIED;
    match carried.vlan_protocol {
        0 => {}
        0x8100 | 0x88a8 => {
            // What stands in front has been read: there is room.
            start -= 4;
            bytes.copy_within(CARRIED..CARRIED + 12, start);
            bytes[start + 12..start + 14].copy_from_slice(&carried.vlan_protocol.to_be_bytes());
            bytes[start + 14..start + 16].copy_from_slice(&carried.vlan.to_be_bytes());
        }
        _ => return Err((Reason::CarryUnsupported, Packet::default())),
    }
    let packet = decode(&bytes[start..])?;
    checksum::complete_or_verify(&mut bytes[start..], &packet).map_err(|reason| (reason, packet))?;
    Ok(Ready { start, packet })
}

/// Decodes a frame that must be IP.
///
/// # Errors
/// As the programs would say.
pub fn decode(frame: &[u8]) -> Result<Packet, (Reason, Packet)> {
    let mut packet = Packet::default();
    match palisade_packet::decode(frame, Start::Ethernet { tags_removed: 0 }, &mut packet) {
        Ok(()) if packet.is(flags::NOT_IP) => Err((Reason::CarryUnsupported, packet)),
        Ok(()) => Ok(packet),
        Err(reason) => Err((reason, packet)),
    }
}

/// Which way a packet goes that was caught at a hook, or one that is made because of it. `xdp`: at the ingress of
/// the interface stands XDP, so nobody there would take the mark off.
#[must_use]
pub fn released(cookie: u64, route: Route, xdp: bool) -> Released {
    let ingress = (route.hook == carry_hook::TC_EGRESS) == route.back;
    let mark = !(ingress && (xdp || route.hook == carry_hook::XDP_INGRESS));
    Released {
        cookie,
        ifindex: route.ifindex,
        way: if ingress {
            release::INGRESS
        } else {
            release::EGRESS
        },
        flags: if mark { release::MARK } else { 0 },
        zero: [0; 2],
    }
}

/// Writes what stands behind a packet of `length` bytes at the start of `room`; the length of all of it. `None`:
/// there is no room.
pub fn append(
    room: &mut [u8],
    length: usize,
    released: &Released,
    commands: [Option<&FlowCommand>; 2],
) -> Option<usize> {
    let mut released = *released;
    let mut at = length;
    for command in commands.into_iter().flatten() {
        released.flags |= if released.flags & release::COMMAND == 0 {
            release::COMMAND
        } else {
            release::SECOND_COMMAND
        };
        let bytes = command.as_bytes();
        room.get_mut(at..at + bytes.len())?.copy_from_slice(bytes);
        at += bytes.len();
    }
    let bytes = released.as_bytes();
    room.get_mut(at..at + bytes.len())?.copy_from_slice(bytes);
    Some(at + bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_on_is_the_hook_and_the_way_back_the_other_one() {
        let route = |hook, back| Route {
            ifindex: 7,
            hook,
            back,
        };
        let way = |hook, back, xdp| {
            let released = released(5, route(hook, back), xdp);
            assert_eq!((released.cookie, released.ifindex), (5, 7));
            (released.way, released.flags)
        };
        use carry_hook::{TC_EGRESS, TC_INGRESS, XDP_INGRESS};
        assert_eq!(way(XDP_INGRESS, false, true), (release::INGRESS, 0));
        assert_eq!(way(XDP_INGRESS, false, false), (release::INGRESS, 0));
        assert_eq!(way(XDP_INGRESS, true, true), (release::EGRESS, release::MARK));
        assert_eq!(way(TC_INGRESS, false, false), (release::INGRESS, release::MARK));
        assert_eq!(way(TC_INGRESS, true, false), (release::EGRESS, release::MARK));
        assert_eq!(way(TC_EGRESS, false, true), (release::EGRESS, release::MARK));
        assert_eq!(way(TC_EGRESS, true, false), (release::INGRESS, release::MARK));
        assert_eq!(way(TC_EGRESS, true, true), (release::INGRESS, 0));
    }

    #[test]
    fn what_nobody_of_ours_carried_is_refused() {
        let good = Carried {
            cookie: 9,
            ifindex: 3,
            hook: carry_hook::TC_INGRESS,
            slots: [
                CarrySlot {
                    endpoint: 4,
                    ..CarrySlot::default()
                },
                CarrySlot::default(),
            ],
            ..Carried::default()
        };
        let bytes = |carried: &Carried, frame: usize| {
            let mut bytes = carried.as_bytes().to_vec();
            bytes.resize(bytes.len() + frame, 0);
            bytes
        };
        assert_eq!(carried(&bytes(&good, 14), 9), Ok(good));
        for (bad, frame, cookie) in [
            (good, 14, 8),
            (good, 13, 9),
            (Carried { hook: 0, ..good }, 14, 9),
            (Carried { hook: 4, ..good }, 14, 9),
            (Carried { ifindex: 0, ..good }, 14, 9),
            (
                Carried {
                    slots: [CarrySlot::default(); 2],
                    ..good
                },
                14,
                9,
            ),
        ] {
            assert_eq!(carried(&bytes(&bad, frame), cookie), Err(Reason::CarryForeign));
        }
        assert_eq!(carried(&[0; 20], 0), Err(Reason::CarryForeign));
    }
}
