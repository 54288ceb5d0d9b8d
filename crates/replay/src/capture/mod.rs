//! Reads capture files: pcap and pcapng, both byte orders, one packet at a time.
//!
//! [`Reader`] buffers one block of the file and lets `pcap-parser` decode the block. It frames the blocks itself, so
//! that memory is bounded by [`MAX_BLOCK`] and every error names the offset of its block. `link.rs` decodes the link
//! layer of a captured packet.

mod link;
mod pcapng;
mod source;

use std::io::Read;

use pcap_parser::{
    PcapHeader,
    pcap::{parse_pcap_frame, parse_pcap_frame_be, parse_pcap_frame_modified, parse_pcap_header},
};

pub use link::{Captured, Frame, LinkType, Network, PathHint};
use pcapng::Section;
pub use source::{CaptureError, MAX_BLOCK};
use source::{SECTION_HEADER, Source};

/// Length of the header of a pcap file, bytes.
const PCAP_HEADER: usize = 24;
/// Format of the file, known after its first bytes.
#[derive(Debug)]
enum Format {
    Unknown,
    Pcap { header: PcapHeader, link: LinkType },
    Pcapng(Section),
}

/// Reads the packets of a capture file.
#[derive(Debug)]
pub struct Reader<R> {
    source: Source<R>,
    format: Format,
    /// Whether the reader has returned an error, after which the rest of the file cannot be interpreted.
    failed: bool,
}

impl<R: Read> Reader<R> {
    /// Returns a reader. Nothing is read yet.
    pub const fn new(source: R) -> Self {
        Self {
            source: Source::new(source),
            format: Format::Unknown,
            failed: false,
        }
    }

    /// Returns the offset of the next block, bytes.
    pub const fn offset(&self) -> u64 {
        self.source.offset
    }

    /// Returns the next packet; `None` at the end of the file, and after an error.
    ///
    /// # Errors
    /// The file cannot be read or is malformed. The packets before the error have been returned.
    pub fn packet(&mut self) -> Result<Option<Captured<'_>>, CaptureError> {
        if self.failed {
            return Ok(None);
        }
        self.failed = true;
        if matches!(self.format, Format::Unknown) {
            self.begin()?;
        }
        let found = match &mut self.format {
            Format::Unknown => None,
            Format::Pcap { header, link } => pcap_packet(&mut self.source, header, *link)?,
            Format::Pcapng(section) => section.packet(&mut self.source)?,
        };
        self.failed = false;
        Ok(found)
    }

    /// Determines the format, and reads the header of a pcap file.
    fn begin(&mut self) -> Result<(), CaptureError> {
        if !self.source.fill(4)? {
            return Err(CaptureError::UnknownFormat);
        }
        if u32::from_le_bytes(self.source.peek(0)) == SECTION_HEADER {
            self.format = Format::Pcapng(Section::default());
            return Ok(());
        }
        let enough = self.source.fill(PCAP_HEADER)?;
        let Ok((_, header)) = parse_pcap_header(self.source.available()) else {
            return Err(match self.source.peek(0) {
                [0xd4, 0xc3, 0xb2, 0xa1] | [0xa1, 0xb2, 0xc3, 0xd4] if !enough => CaptureError::Truncated {
                    offset: 0,
                    what: "the header of the file",
                },
                _ => CaptureError::UnknownFormat,
            });
        };
        self.source.take(PCAP_HEADER);
        // The upper bits hold the length of the frame check sequence, and flags.
        let link = LinkType(header.network.0 & 0xffff);
        self.format = Format::Pcap { header, link };
        Ok(())
    }
}

/// Returns the next packet of a pcap file.
fn pcap_packet<'a, R: Read>(
    source: &'a mut Source<R>,
    header: &PcapHeader,
    link: LinkType,
) -> Result<Option<Captured<'a>>, CaptureError> {
    let offset = source.offset;
    let truncated = CaptureError::Truncated {
        offset,
        what: "a packet",
    };
    let record = if header.is_modified_format() { 24 } else { 16 };
    if !source.fill(record)? {
        return if source.available().is_empty() {
            Ok(None)
        } else {
            Err(truncated)
        };
    }
    let captured: [u8; 4] = source.peek(8);
    let captured = if header.is_bigendian() {
        u32::from_be_bytes(captured)
    } else {
        u32::from_le_bytes(captured)
    };
    let captured = usize::try_from(captured).unwrap_or(usize::MAX);
    if captured > MAX_BLOCK {
        let what = "the length of a packet exceeds 16 MiB";
        return Err(CaptureError::Malformed { offset, what });
    }
    if !source.fill(record + captured)? {
        return Err(truncated);
    }
    let block = source.take(record + captured);
    let parsed = if header.is_modified_format() {
        parse_pcap_frame_modified(block)
    } else if header.is_bigendian() {
        parse_pcap_frame_be(block)
    } else {
        parse_pcap_frame(block)
    };
    let what = "a packet cannot be decoded";
    let (_, frame) = parsed.map_err(|_| CaptureError::Malformed { offset, what })?;
    let fraction = if header.is_nanosecond_precision() {
        u64::from(frame.ts_usec)
    } else {
        u64::from(frame.ts_usec) * 1_000
    };
    Ok(Some(Captured {
        time: Some(u64::from(frame.ts_sec) * 1_000_000_000 + fraction),
        interface: 0,
        interface_name: "",
        link,
        hint: PathHint::Unknown,
        data: frame.data,
        length: frame.origlen.max(frame.caplen),
    }))
}

#[cfg(test)]
mod tests;
