//! Buffered reading of a capture file, block by block.

use std::io::{self, Read};

/// Largest block of a file, bytes. A captured packet has at most 256 KiB (libpcap's `MAXIMUM_SNAPLEN`); other blocks,
/// for example decryption secrets, can be longer.
pub const MAX_BLOCK: usize = 16 << 20;
/// Bytes that are read from the source at a time.
const READ: usize = 256 << 10;
/// Type of a section header block; it begins a pcapng file, and reads the same in both byte orders.
pub(super) const SECTION_HEADER: u32 = 0x0a0d_0d0a;

/// Error of a capture file.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The source cannot be read.
    #[error("at byte {offset}: {error}")]
    Io {
        /// Offset of the first byte that could not be read.
        offset: u64,
        /// The error.
        error: io::Error,
    },
    /// The file does not have a known format.
    #[error("at byte 0: the file is neither pcap nor pcapng; compressed captures must be decompressed first")]
    UnknownFormat,
    /// The file ends within a block.
    #[error("at byte {offset}: the file ends within {what}")]
    Truncated {
        /// Offset of the block.
        offset: u64,
        /// Kind of the block.
        what: &'static str,
    },
    /// A block is malformed.
    #[error("at byte {offset}: {what}")]
    Malformed {
        /// Offset of the block.
        offset: u64,
        /// Description of the error.
        what: &'static str,
    },
}

impl CaptureError {
    /// Returns the offset of the block with the error, bytes.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        match self {
            Self::Io { offset, .. } | Self::Truncated { offset, .. } | Self::Malformed { offset, .. } => {
                *offset
            }
            Self::UnknownFormat => 0,
        }
    }
}

/// A buffered source of bytes.
#[derive(Debug)]
pub(super) struct Source<R> {
    inner: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Offset of `start` in the file, bytes.
    pub(super) offset: u64,
}

impl<R> Source<R> {
    pub(super) const fn new(inner: R) -> Self {
        Self {
            inner,
            buffer: Vec::new(),
            start: 0,
            end: 0,
            offset: 0,
        }
    }
}

impl<R: Read> Source<R> {
    /// Makes `length` bytes available. Returns whether the file has that many.
    pub(super) fn fill(&mut self, length: usize) -> Result<bool, CaptureError> {
        while self.end - self.start < length {
            if self.start > 0 && self.start + length > self.buffer.len() {
                self.buffer.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            }
            if self.buffer.len() < self.start + length.max(READ) {
                self.buffer.resize(self.start + length.max(READ), 0);
            }
            let room = self.buffer.get_mut(self.end..).unwrap_or_default();
            match self.inner.read(room) {
                Ok(0) => return Ok(false),
                Ok(read) => self.end += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let offset = self.offset + (self.end - self.start) as u64;
                    return Err(CaptureError::Io { offset, error });
                }
            }
        }
        Ok(true)
    }

    pub(super) fn available(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// Returns the `N` bytes at `at` of the available bytes; zeros if there are fewer.
    pub(super) fn peek<const N: usize>(&self, at: usize) -> [u8; N] {
        let bytes = self.available().get(at..).and_then(<[u8]>::first_chunk);
        bytes.copied().unwrap_or([0; N])
    }

    /// Consumes `length` available bytes and returns them.
    pub(super) fn take(&mut self, length: usize) -> &[u8] {
        let start = self.start;
        self.start = (start + length).min(self.end);
        self.offset += (self.start - start) as u64;
        self.buffer.get(start..self.start).unwrap_or_default()
    }
}
