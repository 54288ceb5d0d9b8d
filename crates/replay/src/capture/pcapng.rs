//! Blocks of pcapng (draft-ietf-opsawg-pcapng): sections, interfaces and packets.

use std::io::Read;

use pcap_parser::{Block, OptionCode, PcapNGOption, parse_block_be, parse_block_le};

use super::{
    link::{Captured, LinkType, PathHint},
    source::{CaptureError, MAX_BLOCK, SECTION_HEADER, Source},
};

/// Length of the shortest block, bytes: type, length, and length again.
const SHORTEST: usize = 12;
/// Largest number of interfaces of a file. A file names a few; the limit bounds the memory for a forged file.
const MAX_INTERFACES: usize = 65_536;
/// Longest name of an interface that is kept, bytes.
const MAX_NAME: usize = 256;
/// Longest options of a block, bytes. The decoder makes a list of them, with several times the memory of short options.
const MAX_OPTIONS: usize = 1 << 20;
/// Length of an interface description block without options, bytes.
const INTERFACE_BLOCK: usize = 20;
/// Offset of the packet in an enhanced packet block, bytes.
const ENHANCED_DATA: usize = 28;
/// Offset of the packet in a simple packet block, bytes.
const SIMPLE_DATA: usize = 12;
/// Option `epb_flags` of an enhanced packet block.
const EPB_FLAGS: OptionCode = OptionCode(2);

/// The section that is being read.
#[derive(Debug, Default)]
pub(super) struct Section {
    big_endian: bool,
    /// Interfaces of this section.
    interfaces: Vec<Interface>,
    /// Number of interfaces of the file so far.
    known: usize,
}

#[derive(Clone, Debug)]
struct Interface {
    /// Name of the interface; empty if the file does not contain it.
    name: String,
    /// Number of the interface in the file.
    number: usize,
    link: LinkType,
    snap_length: u32,
    /// Length of the unit of time stamps.
    unit: Unit,
    /// Seconds to add to time stamps.
    offset: i64,
}

/// Unit of time stamps (option `if_tsresol`).
#[derive(Clone, Copy, Debug)]
enum Unit {
    /// 10^-n s.
    Decimal(u32),
    /// 2^-n s.
    Binary(u32),
}

impl Unit {
    const fn of(resolution: u8) -> Self {
        let exponent = (resolution & 0x7f) as u32;
        if resolution & 0x80 == 0 {
            Self::Decimal(exponent)
        } else {
            Self::Binary(exponent)
        }
    }

    /// Returns a time stamp in ns.
    fn nanoseconds(self, stamp: u64) -> u64 {
        let stamp = u128::from(stamp);
        let time = match self {
            Self::Decimal(exponent @ 0..=9) => stamp * 10_u128.pow(9 - exponent),
            Self::Decimal(exponent @ 10..=38) => stamp / 10_u128.pow(exponent - 9),
            Self::Decimal(_) => 0,
            // 2^64 × 10^9 is less than 2^94.
            Self::Binary(exponent) => (stamp * 1_000_000_000) >> exponent,
        };
        u64::try_from(time).unwrap_or(u64::MAX)
    }
}

impl Section {
    /// Returns the next packet; `None` at the end of the file.
    pub(super) fn packet<'a, R: Read>(
        &'a mut self,
        source: &'a mut Source<R>,
    ) -> Result<Option<Captured<'a>>, CaptureError> {
        loop {
            let offset = source.offset;
            let malformed = |what| CaptureError::Malformed { offset, what };
            let truncated = CaptureError::Truncated {
                offset,
                what: "a block",
            };
            if !source.fill(SHORTEST)? {
                return if source.available().is_empty() {
                    Ok(None)
                } else {
                    Err(truncated)
                };
            }
            if u32::from_le_bytes(source.peek(0)) == SECTION_HEADER {
                self.big_endian = match source.peek(8) {
                    [0x1a, 0x2b, 0x3c, 0x4d] => true,
                    [0x4d, 0x3c, 0x2b, 0x1a] => false,
                    _ => return Err(malformed("a section header without a valid byte-order magic")),
                };
                self.interfaces.clear();
            }
            let word = |bytes: [u8; 4]| {
                if self.big_endian {
                    u32::from_be_bytes(bytes)
                } else {
                    u32::from_le_bytes(bytes)
                }
            };
            let kind = word(source.peek(0));
            let length = usize::try_from(word(source.peek(4))).unwrap_or(usize::MAX);
            if length < SHORTEST || !length.is_multiple_of(4) {
                return Err(malformed("the length of a block is not valid"));
            }
            if length > MAX_BLOCK {
                return Err(malformed("a block is longer than 16 MiB"));
            }
            if !source.fill(length)? {
                return Err(truncated);
            }
            // Blocks without packets or interfaces are skipped without being decoded: their content does not matter.
            let before_options = match kind {
                1 => INTERFACE_BLOCK,
                3 => length,
                6 => {
                    let captured = usize::try_from(word(source.peek(20))).unwrap_or(usize::MAX);
                    captured.saturating_add(ENHANCED_DATA + 4)
                }
                _ => {
                    source.take(length);
                    continue;
                }
            };
            if length.saturating_sub(before_options) > MAX_OPTIONS {
                return Err(malformed("the options of a block are longer than 1 MiB"));
            }
            let parse = if self.big_endian {
                parse_block_be
            } else {
                parse_block_le
            };
            let parsed = parse(source.available().get(..length).unwrap_or_default());
            let (_, block) = parsed.map_err(|_| malformed("a block cannot be decoded"))?;
            match block {
                Block::InterfaceDescription(block) => {
                    if self.known >= MAX_INTERFACES {
                        return Err(malformed("the file has more than 65,536 interfaces"));
                    }
                    let option = |code| block.options.iter().find(|option| option.code == code);
                    let name = option(OptionCode::IfName).map(PcapNGOption::as_bytes);
                    let name = name.and_then(Result::ok).unwrap_or_default();
                    let name = name.get(..MAX_NAME).unwrap_or(name);
                    let link = LinkType(block.linktype.0);
                    self.interfaces.push(Interface {
                        name: String::from_utf8_lossy(name).trim_end_matches('\0').to_owned(),
                        number: self.known,
                        link,
                        snap_length: block.snaplen,
                        unit: Unit::of(block.if_tsresol),
                        offset: option(OptionCode::IfTsoffset)
                            .and_then(|option| option.value().first_chunk())
                            .map_or(0, |bytes| {
                                if self.big_endian {
                                    i64::from_be_bytes(*bytes)
                                } else {
                                    i64::from_le_bytes(*bytes)
                                }
                            }),
                    });
                    self.known += 1;
                }
                Block::EnhancedPacket(packet) => {
                    let id = usize::try_from(packet.if_id).unwrap_or(usize::MAX);
                    let interface = self.interfaces.get(id).ok_or(malformed(
                        "a packet of an interface that the section does not describe",
                    ))?;
                    let flags = packet
                        .options
                        .iter()
                        .find(|option| option.code == EPB_FLAGS)
                        .and_then(|option| option.value().first_chunk())
                        .map_or(0, |bytes| word(*bytes));
                    let (length_on_wire, captured) = (packet.origlen.max(packet.caplen), packet.caplen);
                    let stamp = u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low);
                    let captured = usize::try_from(captured).unwrap_or(usize::MAX);
                    let data = source.take(length).get(ENHANCED_DATA..).unwrap_or_default();
                    let time = interface.unit.nanoseconds(stamp);
                    let added = interface.offset.saturating_mul(1_000_000_000);
                    return Ok(Some(Captured {
                        time: Some(time.saturating_add_signed(added)),
                        interface: interface.number,
                        interface_name: &interface.name,
                        link: interface.link,
                        hint: match flags & 3 {
                            1 => PathHint::Inbound,
                            2 => PathHint::Outbound,
                            _ => PathHint::Unknown,
                        },
                        data: data.get(..captured.min(data.len())).unwrap_or_default(),
                        length: length_on_wire,
                    }));
                }
                Block::SimplePacket(packet) => {
                    let interface = self
                        .interfaces
                        .first()
                        .ok_or(malformed("a packet in a section without an interface"))?;
                    let on_wire = packet.origlen;
                    let limit = match interface.snap_length {
                        0 => on_wire,
                        limit => on_wire.min(limit),
                    };
                    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
                    let block = source.take(length);
                    let data = block.get(SIMPLE_DATA..length - 4).unwrap_or_default();
                    return Ok(Some(Captured {
                        time: None,
                        interface: interface.number,
                        interface_name: &interface.name,
                        link: interface.link,
                        hint: PathHint::Unknown,
                        data: data.get(..limit.min(data.len())).unwrap_or_default(),
                        length: on_wire,
                    }));
                }
                _ => {
                    source.take(length);
                    continue;
                }
            }
            source.take(length);
        }
    }
}
