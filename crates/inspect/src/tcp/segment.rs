//! Parses and builds TCP segments.

use palisade_abi::{Addr, protocol, tcp_flags};
use palisade_packet::flags;

use super::{options, side::Side};
use crate::{
    PacketView, Route,
    handover::wire::{Reader, Wire},
    packet_builder::{Sum, network_header},
};

/// Maximum shift of a window (RFC 7323, 2.3).
const MAX_SCALE: u8 = 14;

/// Values of the TCP options that the inspection uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// MSS, bytes.
    pub(super) mss: Option<u16>,
    /// Shift of the window.
    pub(super) scale: Option<u8>,
    /// TSval and TSecr.
    pub(super) timestamp: Option<(u32, u32)>,
    /// Right edges of the SACK blocks.
    pub(super) sack: [Option<u32>; 4],
}

/// A TCP segment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment<'a> {
    pub(super) seq: u32,
    pub(super) ack: u32,
    pub(super) window: u16,
    flags: u8,
    pub(super) options: Options,
    pub(super) payload: &'a [u8],
}

impl<'a> Segment<'a> {
    /// Parses the TCP segment of a packet. Returns `None` if the header is malformed, or if receivers could interpret
    /// the segment differently.
    pub(super) fn read(view: &PacketView<'a>) -> Option<Self> {
        let header = view.frame.get(view.transport..view.payload.0)?;
        let (fixed, options) = header.split_first_chunk::<20>()?;
        let [_, _, _, _, s0, s1, s2, s3, a0, a1, a2, a3, _, flags, w0, w1, ..] = *fixed;
        // Some receivers take urgent data out of the stream, others leave it in (RFC 6093).
        if flags & tcp_flags::URG != 0 {
            return None;
        }
        Some(Self {
            seq: u32::from_be_bytes([s0, s1, s2, s3]),
            ack: u32::from_be_bytes([a0, a1, a2, a3]),
            window: u16::from_be_bytes([w0, w1]),
            flags,
            options: Options::read(options)?,
            payload: view.frame.get(view.payload.0..view.payload.1)?,
        })
    }

    pub(super) const fn is_syn(&self) -> bool {
        self.flags & tcp_flags::SYN != 0
    }

    pub(super) const fn is_ack(&self) -> bool {
        self.flags & tcp_flags::ACK != 0
    }

    pub(super) const fn is_fin(&self) -> bool {
        self.flags & tcp_flags::FIN != 0
    }

    pub(super) const fn is_rst(&self) -> bool {
        self.flags & tcp_flags::RST != 0
    }
}

impl Options {
    /// Parses the options. Returns `None` if a length is wrong or a kind is unknown, because the receiver might support
    /// that kind. An unknown kind is not expected: [`options::normalise`] has overwritten such options with NOPs.
    fn read(mut bytes: &[u8]) -> Option<Self> {
        let mut options = Self::default();
        while let Some((&kind, rest)) = bytes.split_first() {
            match kind {
                options::END => break,
                options::NOP => {
                    bytes = rest;
                    continue;
                }
                _ => {}
            }
            let length = usize::from(*rest.first()?);
            let data = bytes.get(2..length)?;
            bytes = bytes.get(length..)?;
            match (kind, data) {
                (options::MSS, &[high, low]) => options.mss = Some(u16::from_be_bytes([high, low])),
                (options::SCALE, &[scale]) => options.scale = Some(scale.min(MAX_SCALE)),
                (options::SACK_PERMITTED, []) => {}
                (options::SACK, blocks) if blocks.len() % 8 == 0 && blocks.len() <= 32 => {
                    options.sack = [None; 4];
                    for (edge, block) in options.sack.iter_mut().zip(blocks.chunks_exact(8)) {
                        *edge = block.last_chunk().map(|right| u32::from_be_bytes(*right));
                    }
                }
                (options::TIMESTAMP, &[v0, v1, v2, v3, e0, e1, e2, e3]) => {
                    let value = u32::from_be_bytes([v0, v1, v2, v3]);
                    options.timestamp = Some((value, u32::from_be_bytes([e0, e1, e2, e3])));
                }
                _ => return None,
            }
        }
        Some(options)
    }
}

/// A received segment, its packet and its sender.
pub(super) struct Arrived<'a, 'p> {
    pub(super) side: Side,
    pub(super) view: &'a PacketView<'p>,
    pub(super) segment: &'a Segment<'p>,
}

/// Link header, addresses, ports and route of the packets of one direction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    header: [u8; Self::LONGEST],
    length: u8,
    ipv6: bool,
    source: (Addr, u16),
    destination: (Addr, u16),
    route: Route,
}

/// A generated segment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OutSegment<'a> {
    pub(super) seq: u32,
    /// Acknowledgement number; `None` for a segment without ACK.
    pub(super) ack: Option<u32>,
    pub(super) window: u16,
    pub(super) rst: bool,
    pub(super) fin: bool,
    /// TSval and TSecr.
    pub(super) timestamp: Option<(u32, u32)>,
    pub(super) payload: &'a [u8],
}

impl Link {
    /// Maximum length of the link header, bytes: Ethernet with two VLAN tags.
    const LONGEST: usize = 22;
    /// Minimum length of the link header, bytes: Ethernet.
    const SHORTEST: usize = 14;

    /// Returns the `Link` for the direction of a packet; `None` if the link header of the packet is too short or too
    /// long.
    pub(super) fn of(view: &PacketView<'_>) -> Option<Self> {
        let from = view.frame.get(..view.network)?;
        let mut header = [0; Self::LONGEST];
        header.get_mut(..from.len())?.copy_from_slice(from);
        if from.len() < Self::SHORTEST {
            return None;
        }
        let packet = view.packet;
        Some(Self {
            header,
            length: from.len() as u8,
            ipv6: packet.is(flags::IPV6),
            source: (packet.source, packet.source_port),
            destination: (packet.destination, packet.destination_port),
            route: Route {
                ifindex: view.ifindex,
                hook: view.hook,
                back: false,
            },
        })
    }

    /// Returns the `Link` of the opposite direction.
    pub(super) fn reversed(&self) -> Self {
        let mut reversed = *self;
        reversed.header[..6].copy_from_slice(&self.header[6..12]);
        reversed.header[6..12].copy_from_slice(&self.header[..6]);
        (reversed.source, reversed.destination) = (self.destination, self.source);
        reversed.route.back = !self.route.back;
        reversed
    }

    /// Returns whether the packets go from one of these ends to the other.
    pub(super) fn is_between(&self, a: (Addr, u16), b: (Addr, u16)) -> bool {
        (self.source, self.destination) == (a, b) || (self.source, self.destination) == (b, a)
    }

    pub(super) const fn is_ipv6(&self) -> bool {
        self.ipv6
    }

    pub(super) const fn route(&self) -> Route {
        self.route
    }

    /// Writes the frame of a segment to `out`, with valid checksums.
    pub(super) fn write(&self, segment: &OutSegment<'_>, out: &mut Vec<u8>) {
        out.clear();
        out.extend_from_slice(
            self.header
                .get(..usize::from(self.length))
                .unwrap_or(&self.header),
        );
        let options = if segment.timestamp.is_some() { 12 } else { 0 };
        // The length fits 16 bits, because callers limit the payload to the MSS.
        let length = u16::try_from(20 + options + segment.payload.len()).unwrap_or(u16::MAX);
        let (source, destination) = (self.source.0, self.destination.0);
        network_header(source, destination, self.ipv6, protocol::TCP, length, out);
        let mut flags = 0;
        for (is_set, flag) in [
            (segment.ack.is_some(), tcp_flags::ACK),
            (segment.rst, tcp_flags::RST),
            (segment.fin, tcp_flags::FIN),
            (!segment.payload.is_empty(), tcp_flags::PSH),
        ] {
            if is_set {
                flags |= flag;
            }
        }
        let mut header = [0; 20];
        header[..2].copy_from_slice(&self.source.1.to_be_bytes());
        header[2..4].copy_from_slice(&self.destination.1.to_be_bytes());
        header[4..8].copy_from_slice(&segment.seq.to_be_bytes());
        header[8..12].copy_from_slice(&segment.ack.unwrap_or(0).to_be_bytes());
        header[12] = ((20 + options) as u8) << 2;
        header[13] = flags;
        header[14..16].copy_from_slice(&segment.window.to_be_bytes());
        let mut timestamp = [0; 12];
        if let Some((value, echo)) = segment.timestamp {
            timestamp[..4].copy_from_slice(&[options::NOP, options::NOP, options::TIMESTAMP, 10]);
            timestamp[4..8].copy_from_slice(&value.to_be_bytes());
            timestamp[8..].copy_from_slice(&echo.to_be_bytes());
        }
        let timestamp = timestamp.get(..options).unwrap_or(&timestamp);
        let sum = Sum::pseudo(source, destination, protocol::TCP, usize::from(length))
            .add(&header)
            .add(timestamp)
            .add(segment.payload);
        header[16..18].copy_from_slice(&(!sum.fold()).to_be_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(timestamp);
        out.extend_from_slice(segment.payload);
    }
}

impl Wire for Link {
    fn write(&self, out: &mut Vec<u8>) {
        self.header
            .get(..usize::from(self.length))
            .unwrap_or_default()
            .to_vec()
            .write(out);
        self.ipv6.write(out);
        self.source.write(out);
        self.destination.write(out);
        self.route.ifindex.write(out);
        self.route.hook.write(out);
        self.route.back.write(out);
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        let bytes = Vec::<u8>::read(from)?;
        let mut header = [0; Self::LONGEST];
        header.get_mut(..bytes.len())?.copy_from_slice(&bytes);
        (bytes.len() >= Self::SHORTEST).then_some(())?;
        Some(Self {
            header,
            length: bytes.len() as u8,
            ipv6: Wire::read(from)?,
            source: Wire::read(from)?,
            destination: Wire::read(from)?,
            route: Route {
                ifindex: Wire::read(from)?,
                hook: Wire::read(from)?,
                back: Wire::read(from)?,
            },
        })
    }
}
