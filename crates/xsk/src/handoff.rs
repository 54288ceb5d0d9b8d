//! Packets from one worker to another. They are copied, since a frame belongs to its socket and a socket to its
//! thread; the places they are copied into are made once.

use crate::spsc;

/// A copied packet, and something about it.
#[derive(Debug)]
pub struct Parcel<H> {
    header: H,
    bytes: Box<[u8]>,
    length: usize,
}

/// The end that hands on.
#[derive(Debug)]
pub struct Giver<H>(spsc::Writer<Parcel<H>>);

/// The end that takes.
#[derive(Debug)]
pub struct Taker<H>(spsc::Reader<Parcel<H>>);

/// A packet could not be handed on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotGiven {
    /// The other end is behind.
    #[error("the hand-off ring is full")]
    Full,
    /// Larger than what was agreed.
    #[error("the packet is too large for the hand-off ring")]
    TooLarge,
}

/// A ring of at least `depth` packets of up to `size` bytes.
#[must_use]
pub fn ring<H: Default>(depth: usize, size: usize) -> (Giver<H>, Taker<H>) {
    let (writer, reader) = spsc::ring(depth, || Parcel {
        header: H::default(),
        bytes: vec![0; size].into(),
        length: 0,
    });
    (Giver(writer), Taker(reader))
}

impl<H> Giver<H> {
    /// Hands a copy on.
    ///
    /// # Errors
    /// See [`NotGiven`]; nothing was handed on.
    pub fn give(&mut self, header: H, packet: &[u8]) -> Result<(), NotGiven> {
        // All places are of one size, but which is known only from a place: so an offer of what is too large must not
        // count as written.
        let given = self.0.write_if(|parcel| {
            let Some(room) = parcel.bytes.get_mut(..packet.len()) else {
                return false;
            };
            room.copy_from_slice(packet);
            parcel.length = packet.len();
            parcel.header = header;
            true
        });
        match given {
            Some(true) => Ok(()),
            Some(false) => Err(NotGiven::TooLarge),
            None => Err(NotGiven::Full),
        }
    }
}

impl<H> Taker<H> {
    /// Has a look at the oldest packet. None: there is none.
    pub fn take<R>(&mut self, look: impl FnOnce(&H, &[u8]) -> R) -> Option<R> {
        self.0
            .read(|parcel| look(&parcel.header, &parcel.bytes[..parcel.length]))
    }

    /// As many wait, at least.
    pub fn waiting(&mut self) -> usize {
        self.0.waiting()
    }
}
