//! TCP segments: read, and made.

use palisade_abi::{Addr, protocol};
use palisade_packet::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, flags};

use super::options;
use crate::{PacketView, Route, packet_builder::Sum};

const URGENT: u8 = 32;
const PUSH: u8 = 8;
/// Largest shift of a window (RFC 7323, 2.3).
const MAX_SCALE: u8 = 14;

/// Options that matter here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) mss: Option<u16>,
    pub(super) scale: Option<u8>,
    /// Value and echo.
    pub(super) timestamp: Option<(u32, u32)>,
    /// Right edges of selective acknowledgements.
    pub(super) sack: [Option<u32>; 4],
}

/// A TCP segment of a whole packet.
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
    /// None: receivers could read it differently.
    pub(super) fn read(view: &PacketView<'a>) -> Option<Self> {
        let header = view.frame.get(view.transport..view.payload.0)?;
        let fixed: &[u8; 20] = header.first_chunk()?;
        let word = |at: usize| u32::from_be_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
        let flags = fixed[13];
        // Urgent data is taken out of the stream by some receivers and left in by others (RFC 6093).
        if flags & URGENT != 0 {
            return None;
        }
        Some(Self {
            seq: word(4),
            ack: word(8),
            window: u16::from_be_bytes([fixed[14], fixed[15]]),
            flags,
            options: Options::read(&header[20..])?,
            payload: view.frame.get(view.payload.0..view.payload.1)?,
        })
    }

    pub(super) const fn is_syn(&self) -> bool {
        self.flags & TCP_SYN != 0
    }

    pub(super) const fn is_ack(&self) -> bool {
        self.flags & TCP_ACK != 0
    }

    pub(super) const fn is_fin(&self) -> bool {
        self.flags & TCP_FIN != 0
    }

    pub(super) const fn is_rst(&self) -> bool {
        self.flags & TCP_RST != 0
    }
}

impl Options {
    /// None: a length does not fit, or a receiver could do something with an option that is not done here.
    /// [`options::normalise`] leaves no such option in a packet.
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
            bytes = &bytes[length..];
            let word = |at: usize| {
                data.get(at..at + 4)
                    .and_then(|word| Some(u32::from_be_bytes(*word.first_chunk()?)))
            };
            match (kind, data.len()) {
                (options::MSS, 2) => options.mss = Some(u16::from_be_bytes([data[0], data[1]])),
                (options::SCALE, 1) => options.scale = Some(data[0].min(MAX_SCALE)),
                (options::SACK_PERMITTED, 0) => {}
                (options::SACK, length) if length % 8 == 0 && length <= 32 => {
                    for (block, edge) in options.sack.iter_mut().enumerate() {
                        *edge = word(block * 8 + 4);
                    }
                }
                (options::TIMESTAMP, 8) => options.timestamp = word(0).zip(word(4)),
                _ => return None,
            }
        }
        Some(options)
    }
}

/// How packets of one direction look below TCP, and where they go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    header: [u8; Self::LONGEST],
    length: u8,
    ipv6: bool,
    source: (Addr, u16),
    destination: (Addr, u16),
    route: Route,
}

/// A segment to be made.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Make<'a> {
    pub(super) seq: u32,
    /// None: no acknowledgement.
    pub(super) ack: Option<u32>,
    pub(super) window: u16,
    pub(super) rst: bool,
    pub(super) fin: bool,
    pub(super) timestamp: Option<(u32, u32)>,
    pub(super) payload: &'a [u8],
}

impl Link {
    /// Ethernet with two tags.
    const LONGEST: usize = 22;

    pub(super) fn of(view: &PacketView<'_>) -> Option<Self> {
        let from = view.frame.get(..view.network)?;
        let mut header = [0; Self::LONGEST];
        header.get_mut(..from.len())?.copy_from_slice(from);
        if from.len() < 14 {
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

    /// The way back.
    pub(super) fn turned(&self) -> Self {
        let mut turned = *self;
        turned.header[..6].copy_from_slice(&self.header[6..12]);
        turned.header[6..12].copy_from_slice(&self.header[..6]);
        (turned.source, turned.destination) = (self.destination, self.source);
        turned.route.back = !self.route.back;
        turned
    }

    pub(super) const fn is_ipv6(&self) -> bool {
        self.ipv6
    }

    pub(super) const fn route(&self) -> Route {
        self.route
    }

    /// Writes the whole frame.
    pub(super) fn write(&self, make: &Make<'_>, out: &mut Vec<u8>) {
        const HOP_LIMIT: u8 = 64;
        out.clear();
        out.extend_from_slice(&self.header[..usize::from(self.length)]);
        let options = if make.timestamp.is_some() { 12 } else { 0 };
        // No caller makes a segment that long.
        let length = u16::try_from(20 + options + make.payload.len()).unwrap_or(u16::MAX);
        let (from, to) = (self.source.0.bytes(), self.destination.0.bytes());
        if self.ipv6 {
            out.extend_from_slice(&[0x60, 0, 0, 0]);
            out.extend_from_slice(&length.to_be_bytes());
            out.extend_from_slice(&[protocol::TCP, HOP_LIMIT]);
            out.extend_from_slice(&from);
            out.extend_from_slice(&to);
        } else {
            let at = out.len();
            out.extend_from_slice(&[0x45, 0]);
            out.extend_from_slice(&length.saturating_add(20).to_be_bytes());
            // Not to be fragmented, so no identification is needed (RFC 6864).
            out.extend_from_slice(&[0, 0, 0x40, 0, HOP_LIMIT, protocol::TCP, 0, 0]);
            out.extend_from_slice(&from[12..]);
            out.extend_from_slice(&to[12..]);
            let sum = !Sum::default().add(&out[at..]).fold();
            out[at + 10..at + 12].copy_from_slice(&sum.to_be_bytes());
        }
        let at = out.len();
        let mut flags = 0;
        for (set, flag) in [
            (make.ack.is_some(), TCP_ACK),
            (make.rst, TCP_RST),
            (make.fin, TCP_FIN),
            (!make.payload.is_empty(), PUSH),
        ] {
            if set {
                flags |= flag;
            }
        }
        out.extend_from_slice(&self.source.1.to_be_bytes());
        out.extend_from_slice(&self.destination.1.to_be_bytes());
        out.extend_from_slice(&make.seq.to_be_bytes());
        out.extend_from_slice(&make.ack.unwrap_or(0).to_be_bytes());
        out.extend_from_slice(&[((20 + options) as u8) << 2, flags]);
        out.extend_from_slice(&make.window.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        if let Some((value, echo)) = make.timestamp {
            out.extend_from_slice(&[1, 1, 8, 10]);
            out.extend_from_slice(&value.to_be_bytes());
            out.extend_from_slice(&echo.to_be_bytes());
        }
        out.extend_from_slice(make.payload);
        let sum = Sum::pseudo(
            self.source.0,
            self.destination.0,
            protocol::TCP,
            usize::from(length),
        );
        let sum = !sum.add(&out[at..]).fold();
        out[at + 16..at + 18].copy_from_slice(&sum.to_be_bytes());
    }
}
