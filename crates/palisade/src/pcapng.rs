//! Blocks of the pcapng format (draft-ietf-opsawg-pcapng): section header, interfaces, packets with comments, interface
//! statistics.
//!
//! The daemon writes blocks, and the command copies whole blocks to files. Every file begins with the section header
//! and the interfaces, so the command keeps those to begin another file. Numbers have the byte order of the machine,
//! which the section header states. Start at [`Writer`] and [`blocks`].

use std::fmt::Write as _;

/// Types of blocks.
pub(crate) mod block_type {
    /// Section header.
    pub(crate) const SECTION: u32 = 0x0a0d_0d0a;
    /// Interface description.
    pub(crate) const INTERFACE: u32 = 1;
    /// Interface statistics.
    pub(crate) const STATISTICS: u32 = 5;
    /// Enhanced packet.
    pub(crate) const PACKET: u32 = 6;
}

/// Codes of options.
mod option_code {
    pub(super) const END: u16 = 0;
    pub(super) const COMMENT: u16 = 1;
    pub(super) const SHB_HARDWARE: u16 = 2;
    pub(super) const SHB_OS: u16 = 3;
    pub(super) const SHB_APPLICATION: u16 = 4;
    pub(super) const IF_NAME: u16 = 2;
    pub(super) const IF_DESCRIPTION: u16 = 3;
    pub(super) const IF_TSRESOL: u16 = 9;
    pub(super) const EPB_FLAGS: u16 = 2;
    pub(super) const EPB_PACKET_ID: u16 = 5;
    pub(super) const ISB_START: u16 = 2;
    pub(super) const ISB_END: u16 = 3;
    pub(super) const ISB_RECEIVED: u16 = 4;
    pub(super) const ISB_DROPPED: u16 = 5;
}

/// Resolution of all times: 10^-9 s.
const TSRESOL_NANOSECONDS: u8 = 9;
/// Longest text of an option, bytes. The length field has 16 bits; shorter texts keep files small.
const MAX_TEXT_BYTES: usize = 4096;

/// Type of the first header of a packet (`LINKTYPE_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub(crate) enum LinkType {
    /// Ethernet.
    Ethernet = 1,
    /// IPv4 or IPv6 without a link-layer header.
    Raw = 101,
}

/// Direction of a packet at its interface, as in bits 0 and 1 of `epb_flags`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum Direction {
    /// The packet entered by the interface.
    Inbound = 1,
    /// The packet leaves by the interface.
    Outbound = 2,
}

/// A packet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet<'a> {
    /// Number of the interface, in the order of [`Writer::interface`].
    pub interface: u32,
    /// Time, ns since 1970.
    pub time: u64,
    /// Captured bytes.
    pub bytes: &'a [u8],
    /// Length of the packet, bytes.
    pub length: u32,
    /// Direction.
    pub direction: Direction,
    /// Number of the packet in this capture.
    pub id: u64,
    /// Comment.
    pub comment: &'a str,
}

/// Counters of an interface.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Statistics<'a> {
    /// Number of the interface.
    pub interface: u32,
    /// Start of the capture, ns since 1970.
    pub start: u64,
    /// End of the capture, ns since 1970.
    pub end: u64,
    /// Packets that were written.
    pub received: u64,
    /// Packets that were lost; `None` if the number is not known for this interface.
    pub lost: Option<u64>,
    /// Comment; empty for none.
    pub comment: &'a str,
}

/// Appends blocks to a buffer.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    buffer: Vec<u8>,
}

impl Writer {
    /// Returns the blocks that were written since the last call.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.buffer)
    }

    /// Writes the header of the section.
    pub(crate) fn section(&mut self, hardware: &str, os: &str, application: &str, comment: &str) {
        self.block(block_type::SECTION, |block| {
            block.u32(0x1a2b_3c4d); // byte order
            block.u16(1); // major version
            block.u16(0); // minor version
            block.u64(u64::MAX); // the length of the section is not known
            block.text(option_code::SHB_HARDWARE, hardware);
            block.text(option_code::SHB_OS, os);
            block.text(option_code::SHB_APPLICATION, application);
            block.text(option_code::COMMENT, comment);
            block.option(option_code::END, &[]);
        });
    }

    /// Writes the description of an interface. The first one has number 0.
    pub(crate) fn interface(&mut self, link_type: LinkType, name: &str, description: &str, snap_length: u32) {
        self.block(block_type::INTERFACE, |block| {
            block.u16(link_type as u16);
            block.u16(0); // reserved
            block.u32(snap_length);
            block.text(option_code::IF_NAME, name);
            block.text(option_code::IF_DESCRIPTION, description);
            block.option(option_code::IF_TSRESOL, &[TSRESOL_NANOSECONDS]);
            block.option(option_code::END, &[]);
        });
    }

    /// Writes a packet.
    pub(crate) fn packet(&mut self, packet: &Packet<'_>) {
        self.block(block_type::PACKET, |block| {
            block.u32(packet.interface);
            block.time(packet.time);
            block.u32(u32::try_from(packet.bytes.len()).unwrap_or(u32::MAX));
            block.u32(packet.length);
            block.padded(packet.bytes);
            block.option(option_code::EPB_FLAGS, &(packet.direction as u32).to_ne_bytes());
            block.option(option_code::EPB_PACKET_ID, &packet.id.to_ne_bytes());
            block.text(option_code::COMMENT, packet.comment);
            block.option(option_code::END, &[]);
        });
    }

    /// Writes the counters of an interface.
    pub(crate) fn statistics(&mut self, statistics: &Statistics<'_>) {
        self.block(block_type::STATISTICS, |block| {
            block.u32(statistics.interface);
            block.time(statistics.end);
            block.time_option(option_code::ISB_START, statistics.start);
            block.time_option(option_code::ISB_END, statistics.end);
            block.option(option_code::ISB_RECEIVED, &statistics.received.to_ne_bytes());
            if let Some(lost) = statistics.lost {
                block.option(option_code::ISB_DROPPED, &lost.to_ne_bytes());
            }
            block.text(option_code::COMMENT, statistics.comment);
            block.option(option_code::END, &[]);
        });
    }

    /// Writes a block. Its length is before and after its content, so that a reader can read a file backwards.
    fn block(&mut self, block_type: u32, content: impl FnOnce(&mut Block<'_>)) {
        let start = self.buffer.len();
        let mut block = Block(&mut self.buffer);
        block.u32(block_type);
        block.u32(0);
        content(&mut block);
        let length = u32::try_from(self.buffer.len() - start + 4).unwrap_or(u32::MAX);
        self.buffer.extend_from_slice(&length.to_ne_bytes());
        self.buffer[start + 4..start + 8].copy_from_slice(&length.to_ne_bytes());
    }
}

/// The content of a block.
struct Block<'a>(&'a mut Vec<u8>);

impl Block<'_> {
    fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_ne_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_ne_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_ne_bytes());
    }

    /// Writes a time: the high half, then the low half, in every byte order.
    fn time(&mut self, time: u64) {
        for half in halves(time) {
            self.u32(half);
        }
    }

    fn padded(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        let padding = bytes.len().next_multiple_of(4) - bytes.len();
        self.0.extend_from_slice(&[0; 3][..padding]);
    }

    fn option(&mut self, code: u16, value: &[u8]) {
        self.u16(code);
        self.u16(u16::try_from(value.len()).unwrap_or(u16::MAX));
        self.padded(value);
    }

    fn time_option(&mut self, code: u16, time: u64) {
        let [high, low] = halves(time).map(u32::to_ne_bytes);
        self.option(code, &[high, low].concat());
    }

    /// Writes a text, unless it is empty. Control characters are escaped: readers print comments to terminals.
    fn text(&mut self, code: u16, text: &str) {
        if text.is_empty() {
            return;
        }
        let mut visible = String::with_capacity(text.len());
        for character in text.chars() {
            let shown = if character.is_control() {
                write!(visible, "{}", character.escape_default())
            } else {
                visible.write_char(character)
            };
            // Writing to a string does not fail.
            let _ = shown;
            if visible.len() > MAX_TEXT_BYTES {
                break;
            }
        }
        self.option(code, visible.as_bytes());
    }
}

/// Returns the high and the low half of a time.
fn halves(time: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = time.to_be_bytes();
    [u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h])]
}

/// Splits bytes of [`Writer`] into blocks, each with its type. The result ends early at bytes that are no whole block.
pub(crate) fn blocks(bytes: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let word = |at: usize| Some(u32::from_ne_bytes(rest.get(at..at + 4)?.try_into().ok()?));
        let (block_type, length) = (word(0)?, usize::try_from(word(4)?).ok()?);
        if length < 12 || length % 4 != 0 {
            return None;
        }
        let (block, others) = rest.split_at_checked(length)?;
        rest = others;
        Some((block_type, block))
    })
}

/// Returns the number of the interface in a packet block.
pub(crate) fn interface_of(packet: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(packet.get(8..12)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet<'a>(bytes: &'a [u8], comment: &'a str) -> Packet<'a> {
        Packet {
            interface: 0,
            time: 0x0123_4567_89ab_cdef,
            bytes,
            length: 1500,
            direction: Direction::Outbound,
            id: 7,
            comment,
        }
    }

    /// Returns the options in `bytes`, each as code and value.
    fn options(mut bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            let number = |at: usize| u16::from_ne_bytes(bytes[at..at + 2].try_into().unwrap());
            let (code, length) = (number(0), usize::from(number(2)));
            if code == option_code::END {
                assert_eq!((length, bytes.len()), (0, 4));
                return found;
            }
            found.push((code, bytes[4..4 + length].to_vec()));
            bytes = &bytes[4 + length.next_multiple_of(4)..];
        }
    }

    #[test]
    fn a_block_has_its_length_at_both_ends_and_is_aligned() {
        let mut writer = Writer::default();
        for length in 0..9_u8 {
            let bytes: Vec<u8> = (0..length).collect();
            writer.packet(&packet(&bytes, "a"));
            let block = writer.take();
            let ends = [&block[4..8], &block[block.len() - 4..]];
            for end in ends {
                assert_eq!(u32::from_ne_bytes(end.try_into().unwrap()) as usize, block.len());
            }
            assert_eq!(block.len() % 4, 0);
            assert_eq!(block[28..28 + bytes.len()], bytes);
        }
    }

    #[test]
    fn a_packet_has_time_lengths_direction_id_and_comment() {
        let mut writer = Writer::default();
        writer.packet(&packet(&[1, 2, 3, 4, 5], "verdict DROPPED"));
        let block = writer.take();
        let word = |at: usize| u32::from_ne_bytes(block[at..at + 4].try_into().unwrap());
        assert_eq!(word(0), block_type::PACKET);
        assert_eq!(interface_of(&block), Some(0));
        assert_eq!((word(12), word(16)), (0x0123_4567, 0x89ab_cdef));
        assert_eq!((word(20), word(24)), (5, 1500));
        assert_eq!(
            options(&block[28 + 8..block.len() - 4]),
            [
                (2, 2_u32.to_ne_bytes().to_vec()),
                (5, 7_u64.to_ne_bytes().to_vec()),
                (1, b"verdict DROPPED".to_vec()),
            ]
        );
    }

    #[test]
    fn the_times_of_an_interface_have_the_resolution_of_nanoseconds() {
        let mut writer = Writer::default();
        writer.interface(LinkType::Raw, "tun0", "NIC", 128);
        let block = writer.take();
        assert_eq!(block[8..10], 101_u16.to_ne_bytes());
        assert_eq!(block[12..16], 128_u32.to_ne_bytes());
        assert_eq!(
            options(&block[16..block.len() - 4]),
            [
                (2, b"tun0".to_vec()),
                (3, b"NIC".to_vec()),
                (9, vec![TSRESOL_NANOSECONDS]),
            ]
        );
    }

    #[test]
    fn statistics_tell_the_lost_packets() {
        let mut writer = Writer::default();
        writer.statistics(&Statistics {
            interface: 3,
            start: 1,
            end: 1 << 32,
            received: 10,
            lost: Some(4),
            comment: "",
        });
        let block = writer.take();
        let found = options(&block[20..block.len() - 4]);
        let time = |high: u32, low: u32| [high.to_ne_bytes(), low.to_ne_bytes()].concat();
        assert_eq!(
            found,
            [
                (2, time(0, 1)),
                (3, time(1, 0)),
                (4, 10_u64.to_ne_bytes().to_vec()),
                (5, 4_u64.to_ne_bytes().to_vec()),
            ]
        );
    }

    #[test]
    fn control_characters_in_comments_are_escaped() {
        let mut writer = Writer::default();
        writer.packet(&packet(&[], "a\u{1b}[31m\nb\u{9b}"));
        let block = writer.take();
        let (_, comment) = options(&block[28..block.len() - 4]).pop().unwrap();
        assert_eq!(String::from_utf8(comment).unwrap(), r"a\u{1b}[31m\nb\u{9b}");
    }

    #[test]
    fn a_long_comment_is_cut() {
        let mut writer = Writer::default();
        writer.packet(&packet(&[], &"ü".repeat(100_000)));
        let block = writer.take();
        let (_, comment) = options(&block[28..block.len() - 4]).pop().unwrap();
        assert!(comment.len() <= MAX_TEXT_BYTES + 4);
        assert!(String::from_utf8(comment).is_ok());
    }

    #[test]
    fn written_blocks_are_split_again() {
        let mut writer = Writer::default();
        writer.section("x86_64", "Linux", "palisade", "");
        writer.interface(LinkType::Ethernet, "eth0", "", 64);
        writer.packet(&packet(&[9; 61], ""));
        let bytes = writer.take();
        let types: Vec<u32> = blocks(&bytes).map(|(block_type, _)| block_type).collect();
        assert_eq!(
            types,
            [block_type::SECTION, block_type::INTERFACE, block_type::PACKET]
        );
        assert_eq!(
            blocks(&bytes).map(|(_, block)| block.len()).sum::<usize>(),
            bytes.len()
        );
        // Bytes that are no whole block end the list.
        assert_eq!(blocks(&bytes[..bytes.len() - 1]).count(), 2);
        assert_eq!(blocks(&[0; 12]).count(), 0);
    }
}
