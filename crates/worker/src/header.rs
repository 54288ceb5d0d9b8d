//! The punt header in front of a punted packet, and the reinject trailer after a forwarded packet. The functions only
//! convert bytes; they do no I/O.
//!
//! A packet goes through [`parse`], [`prepare`] and [`normalise_options`] before it is inspected, and through
//! [`trailer`] and [`append_trailer`] before it is sent.

use palisade_abi::{
    FlowCommand, MAX_ON_PUNT_LINK, MAX_PUNT_MSS, MAX_TRAILER, PuntHeader, PuntRequest, Reason,
    ReinjectTrailer, protocol, punt_hook, reinject_flags, reinject_path,
};
use palisade_inspect::{OptionProblem, PacketView, Route};
use palisade_packet::{Packet, Start, flags};
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::checksum;

/// Length of the punt header, bytes.
pub const PUNT_HEADER: usize = size_of::<PuntHeader>();
/// Greatest length of the trailer with its flow commands, bytes.
pub const MAX_TRAILER_BYTES: usize = MAX_TRAILER as usize;
/// Length of an Ethernet header, bytes.
pub const ETHERNET_HEADER: usize = 14;

/// Parses the punt header.
///
/// # Errors
/// [`Reason::PuntForeign`] if the frame is too short, the cookie is wrong, the hook is unknown, the interface is zero,
/// or no slot requests inspection. Such a frame was not punted by the programs.
pub fn parse(bytes: &[u8], cookie: u64) -> Result<PuntHeader, Reason> {
    let (punted, frame) = PuntHeader::read_from_prefix(bytes).map_err(|_| Reason::PuntForeign)?;
    if punted.cookie != cookie || frame.len() < ETHERNET_HEADER {
        return Err(Reason::PuntForeign);
    }
    let known = matches!(
        punted.hook,
        punt_hook::XDP_INGRESS | punt_hook::TC_INGRESS | punt_hook::TC_EGRESS
    );
    let requested = punted.slots.iter().any(|slot| slot.endpoint != 0);
    if !known || !requested || punted.ifindex == 0 {
        return Err(Reason::PuntForeign);
    }
    Ok(punted)
}

/// Returns the flow hash of the punt header without validating the header; 0 if the frame is shorter than a punt
/// header.
#[must_use]
pub fn flow_hash(bytes: &[u8]) -> u32 {
    PuntHeader::read_from_prefix(bytes).map_or(0, |(punted, _)| punted.hash)
}

/// A packet that is ready for inspection.
#[derive(Clone, Copy, Debug)]
pub struct Prepared {
    /// Offset of the Ethernet header in the frame.
    pub start: usize,
    /// The decoded headers, with offsets from the Ethernet header.
    pub packet: Packet,
}

impl Prepared {
    /// Returns the packet as an inspector sees it. `frame`: the bytes from the Ethernet header on.
    #[must_use]
    pub fn view<'a>(
        &'a self,
        slot: &'a PuntRequest,
        ifindex: u32,
        hook: u8,
        frame: &'a [u8],
    ) -> PacketView<'a> {
        let transport = usize::from(self.packet.transport_offset);
        PacketView {
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

/// Rewrites the TCP options of a packet in place ([`palisade_inspect::normalise_options`]) and limits the MSS of a SYN
/// to [`MAX_PUNT_MSS`], so that segments fit on the punt link. The packet is forwarded with the new options. Returns
/// whether a byte was changed; always false for fragments and for protocols other than TCP.
///
/// # Errors
/// [`OptionProblem`] if the options are malformed or must not be forwarded.
pub fn normalise_options(bytes: &mut [u8], prepared: &Prepared) -> Result<bool, OptionProblem> {
    let packet = &prepared.packet;
    if packet.protocol != protocol::TCP || packet.is(flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER) {
        return Ok(false);
    }
    let start = prepared.start + usize::from(packet.transport_offset);
    let end = prepared.start + usize::from(packet.network_offset) + packet.length as usize;
    let segment = bytes.get_mut(start..end).ok_or(OptionProblem::Length)?;
    palisade_inspect::normalise_options(segment, Some(MAX_PUNT_MSS))
}

/// Returns the offsets of the start and the end of the transport payload. All bytes of a later fragment count as
/// payload.
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

/// Prepares a punted packet for inspection: inserts a VLAN tag that was in `skb->vlan_tci` into the frame, decodes the
/// headers, and completes or verifies the checksums.
///
/// # Errors
/// The packet cannot be decoded, or its receiver would discard it. Returns the drop reason and the headers that were
/// decoded.
pub fn prepare(bytes: &mut [u8], punted: &PuntHeader) -> Result<Prepared, (Reason, Packet)> {
    let mut start = PUNT_HEADER;
    match punted.vlan_protocol {
        0 => {}
        0x8100 | 0x88a8 => {
            // The tag's four bytes overwrite the end of the punt header, which has been parsed.
            start -= 4;
            bytes.copy_within(PUNT_HEADER..PUNT_HEADER + 12, start);
            let [p0, p1] = punted.vlan_protocol.to_be_bytes();
            let [t0, t1] = punted.vlan.to_be_bytes();
            if let Some(tag) = bytes.get_mut(start + 12..start + 16) {
                tag.copy_from_slice(&[p0, p1, t0, t1]);
            }
        }
        _ => return Err((Reason::PuntUnsupported, Packet::default())),
    }
    let frame = bytes.get_mut(start..).unwrap_or_default();
    let packet = decode(frame)?;
    checksum::complete_or_verify(frame, &packet).map_err(|reason| (reason, packet))?;
    Ok(Prepared { start, packet })
}

/// Decodes an Ethernet frame with an IP packet.
///
/// # Errors
/// The frame is malformed or not IP. Returns the drop reason and the headers that were decoded.
pub fn decode(frame: &[u8]) -> Result<Packet, (Reason, Packet)> {
    let mut packet = Packet::default();
    match palisade_packet::decode(frame, Start::Ethernet { tags_removed: 0 }, &mut packet) {
        Ok(()) if packet.is(flags::NOT_IP) => Err((Reason::PuntUnsupported, packet)),
        Ok(()) => Ok(packet),
        Err(reason) => Err((reason, packet)),
    }
}

/// Returns the trailer of a packet that is sent on from the hook of `route`, or to the sender of the packet that was
/// punted there (`route.back`).
///
/// The tc program that processes the reinjected packet passes the packet if it has the mark. A packet that is
/// reinjected to ingress is not marked if XDP is the ingress hook of the interface (`xdp`): a reinjected packet does
/// not go through XDP again, so no program would clear the mark.
#[must_use]
pub fn trailer(cookie: u64, route: Route, xdp: bool) -> ReinjectTrailer {
    let ingress = (route.hook == punt_hook::TC_EGRESS) == route.back;
    let mark = !(ingress && (xdp || route.hook == punt_hook::XDP_INGRESS));
    ReinjectTrailer {
        cookie,
        ifindex: route.ifindex,
        path: if ingress {
            reinject_path::INGRESS
        } else {
            reinject_path::EGRESS
        },
        flags: if mark { reinject_flags::MARK } else { 0 },
        zero: [0; 2],
    }
}

/// Appends flow commands and trailer to a packet of `length` bytes at the start of `room`. Returns the new length, or
/// `None` if there is not enough room or the frame would exceed the MTU of the punt link.
pub fn append_trailer(
    room: &mut [u8],
    length: usize,
    trailer: &ReinjectTrailer,
    commands: [Option<&FlowCommand>; 2],
) -> Option<usize> {
    let mut trailer = *trailer;
    let mut at = length;
    for command in commands.into_iter().flatten() {
        trailer.flags |= if trailer.flags & reinject_flags::COMMAND == 0 {
            reinject_flags::COMMAND
        } else {
            reinject_flags::SECOND_COMMAND
        };
        let bytes = command.as_bytes();
        room.get_mut(at..at + bytes.len())?.copy_from_slice(bytes);
        at += bytes.len();
    }
    let bytes = trailer.as_bytes();
    room.get_mut(at..at + bytes.len())?.copy_from_slice(bytes);
    Some(at + bytes.len()).filter(|total| *total <= MAX_ON_PUNT_LINK as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_continues_at_its_hook_and_a_response_takes_the_opposite_path() {
        let route = |hook, back| Route {
            ifindex: 7,
            hook,
            back,
        };
        let way = |hook, back, xdp| {
            let trailer = trailer(5, route(hook, back), xdp);
            assert_eq!((trailer.cookie, trailer.ifindex), (5, 7));
            (trailer.path, trailer.flags)
        };
        use punt_hook::{TC_EGRESS, TC_INGRESS, XDP_INGRESS};
        assert_eq!(way(XDP_INGRESS, false, true), (reinject_path::INGRESS, 0));
        assert_eq!(way(XDP_INGRESS, false, false), (reinject_path::INGRESS, 0));
        assert_eq!(
            way(XDP_INGRESS, true, true),
            (reinject_path::EGRESS, reinject_flags::MARK)
        );
        assert_eq!(
            way(TC_INGRESS, false, false),
            (reinject_path::INGRESS, reinject_flags::MARK)
        );
        assert_eq!(
            way(TC_INGRESS, true, false),
            (reinject_path::EGRESS, reinject_flags::MARK)
        );
        assert_eq!(
            way(TC_EGRESS, false, true),
            (reinject_path::EGRESS, reinject_flags::MARK)
        );
        assert_eq!(
            way(TC_EGRESS, true, false),
            (reinject_path::INGRESS, reinject_flags::MARK)
        );
        assert_eq!(way(TC_EGRESS, true, true), (reinject_path::INGRESS, 0));
    }

    #[test]
    fn a_frame_without_a_valid_punt_header_is_refused() {
        let good = PuntHeader {
            cookie: 9,
            ifindex: 3,
            hook: punt_hook::TC_INGRESS,
            slots: [
                PuntRequest {
                    endpoint: 4,
                    ..PuntRequest::default()
                },
                PuntRequest::default(),
            ],
            ..PuntHeader::default()
        };
        let bytes = |punted: &PuntHeader, frame: usize| {
            let mut bytes = punted.as_bytes().to_vec();
            bytes.resize(bytes.len() + frame, 0);
            bytes
        };
        assert_eq!(parse(&bytes(&good, 14), 9), Ok(good));
        for (bad, frame, cookie) in [
            (good, 14, 8),
            (good, 13, 9),
            (PuntHeader { hook: 0, ..good }, 14, 9),
            (PuntHeader { hook: 4, ..good }, 14, 9),
            (PuntHeader { ifindex: 0, ..good }, 14, 9),
            (
                PuntHeader {
                    slots: [PuntRequest::default(); 2],
                    ..good
                },
                14,
                9,
            ),
        ] {
            assert_eq!(parse(&bytes(&bad, frame), cookie), Err(Reason::PuntForeign));
        }
        assert_eq!(parse(&[0; 20], 0), Err(Reason::PuntForeign));
    }
}
