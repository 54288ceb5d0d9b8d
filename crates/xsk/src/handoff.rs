//! A ring that hands packets from one worker to another by copy.
//!
//! A frame belongs to the UMEM of one socket, and a socket to one thread, so a frame that arrives at the queue of a
//! worker that does not own the flow cannot be moved to the owner. The packet is copied into a slot of this ring
//! instead; slots are allocated once. [`spsc`] implements the ring.

use crate::spsc;

/// A copied packet with metadata.
#[derive(Debug)]
struct Slot<H> {
    header: H,
    bytes: Box<[u8]>,
    length: usize,
}

/// The sending end of a hand-off ring.
#[derive(Debug)]
pub struct Sender<H>(spsc::Writer<Slot<H>>);

/// The receiving end of a hand-off ring.
#[derive(Debug)]
pub struct Receiver<H>(spsc::Reader<Slot<H>>);

/// The reason why a packet was not handed off.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SendError {
    /// No slot is free, because the receiver has not yet read the earlier packets.
    #[error("the hand-off ring is full")]
    Full,
    /// The packet is larger than a slot.
    #[error("the packet is too large for the hand-off ring")]
    TooLarge,
}

/// Returns the ends of a ring with at least `depth` slots of `size` bytes.
#[must_use]
pub fn ring<H: Default>(depth: usize, size: usize) -> (Sender<H>, Receiver<H>) {
    let (writer, reader) = spsc::ring(depth, || Slot {
        header: H::default(),
        bytes: vec![0; size].into(),
        length: 0,
    });
    (Sender(writer), Receiver(reader))
}

impl<H> Sender<H> {
    /// Copies a packet into the ring.
    ///
    /// # Errors
    /// [`SendError`]: the ring is unchanged.
    pub fn send(&mut self, header: H, packet: &[u8]) -> Result<(), SendError> {
        // The sender does not store the size of the slots, so a packet is compared with the slot that it would be
        // copied into. If the packet is too large, `write_if` does not publish the slot.
        let written = self.0.write_if(|slot| {
            let Some(room) = slot.bytes.get_mut(..packet.len()) else {
                return false;
            };
            room.copy_from_slice(packet);
            slot.length = packet.len();
            slot.header = header;
            true
        });
        match written {
            Some(true) => Ok(()),
            Some(false) => Err(SendError::TooLarge),
            None => Err(SendError::Full),
        }
    }
}

impl<H> Receiver<H> {
    /// Calls `f` with the oldest packet and removes it. Returns `None` if the ring is empty.
    pub fn receive<R>(&mut self, f: impl FnOnce(&H, &[u8]) -> R) -> Option<R> {
        self.0.read(|slot| {
            let packet = slot.bytes.get(..slot.length).unwrap_or_default();
            f(&slot.header, packet)
        })
    }

    /// Returns a lower bound of the number of packets in the ring; zero only if the ring is empty.
    pub fn available(&mut self) -> usize {
        self.0.available()
    }
}
