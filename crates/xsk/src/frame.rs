//! Frames: pieces of the memory that is shared with the kernel, each with room for one packet.

use std::{fmt, rc::Rc, slice};

use thiserror::Error;
use xsk_rs::umem::{Umem, frame::FrameDesc};

use crate::ledger::{Counts, Ledger, Place};

/// Bytes of a frame's chunk. A page: the kernel takes no larger one.
pub const CHUNK: usize = 4096;

/// All frames of a socket. It lives as long as one of them is held somewhere.
pub struct Pool {
    umem: Umem,
    /// Each frame as it is when nothing is in it, by its number.
    blank: Box<[FrameDesc]>,
    ledger: Ledger,
}

impl Pool {
    /// `blank` are all frames of `umem`, in their order.
    pub fn new(umem: Umem, blank: Vec<FrameDesc>) -> Self {
        Self {
            ledger: Ledger::new(blank.len() as u32),
            umem,
            blank: blank.into(),
        }
    }

    pub fn counts(&self) -> Counts {
        self.ledger.counts()
    }

    pub fn free(&self) -> usize {
        self.ledger.free()
    }

    /// A free frame, to be given to the kernel.
    pub fn take_to_fill(&self) -> Option<FrameDesc> {
        let index = self.ledger.take(Place::Receiving)?;
        Some(self.blank[index as usize])
    }

    /// A frame that the kernel did not take after all.
    pub fn unfilled(&self, desc: &FrameDesc) {
        self.ledger
            .shift(desc.addr() / CHUNK, Place::Receiving, Place::Free);
    }

    /// The kernel says that it has sent a frame. False: it never had it.
    pub fn sent(&self, desc: &FrameDesc) -> bool {
        self.ledger
            .shift(desc.addr() / CHUNK, Place::Sending, Place::Free)
    }

    /// A free frame for a packet of our own.
    pub fn take(self: &Rc<Self>) -> Option<Frame> {
        let index = self.ledger.take(Place::Held)?;
        Some(Frame::new(self, self.blank[index as usize], 0))
    }

    /// A frame as the kernel has filled it. None: the kernel never had it, or says nonsense of it.
    pub fn received(self: &Rc<Self>, desc: FrameDesc) -> Option<Frame> {
        let (length, start) = (desc.lengths().data(), desc.addr() % CHUNK);
        if start + length > CHUNK {
            return None;
        }
        self.ledger
            .shift(desc.addr() / CHUNK, Place::Receiving, Place::Held)
            .then(|| Frame::new(self, desc, length))
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool {:?}", self.counts())
    }
}

/// There is no room in a frame for so much.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("no room in the frame")]
pub struct NoRoom;

/// A frame in somebody's hands, with a packet in it. Dropped, it can be used for another packet.
pub struct Frame {
    pool: Rc<Pool>,
    /// Says where the frame's room begins. Its length is that of the whole room, up to the end of the chunk.
    desc: FrameDesc,
    /// The packet's place in the room.
    start: usize,
    length: usize,
}

impl Frame {
    /// The ledger must say that it is held, and nobody else may have it.
    fn new(pool: &Rc<Pool>, mut desc: FrameDesc, length: usize) -> Self {
        set_length(&pool.umem, &mut desc, CHUNK);
        desc.set_options(0);
        Self {
            pool: Rc::clone(pool),
            desc,
            start: 0,
            length,
        }
    }

    fn room(&self) -> &[u8] {
        // SAFETY: `desc` came from this pool's UMEM, and the ledger says that it is held, so the kernel does not touch
        // it; there is but one `Frame` of it, which is borrowed for as long as the slice.
        unsafe { self.pool.umem.data(&self.desc) }.contents()
    }

    fn room_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `room`, and the one `Frame` is borrowed mutably.
        let mut room = unsafe { self.pool.umem.data_mut(&mut self.desc) };
        let room = room.contents_mut();
        let (begin, length) = (room.as_mut_ptr(), room.len());
        // SAFETY: these are begin and length of a slice of the UMEM, which lives as long as the pool that `self` keeps;
        // only the lifetime gets longer than that of the wrapper on the stack, up to that of the borrow of `self`.
        unsafe { slice::from_raw_parts_mut(begin, length) }
    }

    /// The packet.
    #[must_use]
    #[inline]
    pub fn data(&self) -> &[u8] {
        &self.room()[self.start..self.start + self.length]
    }

    /// The packet.
    #[inline]
    pub fn data_mut(&mut self) -> &mut [u8] {
        let (start, end) = (self.start, self.start + self.length);
        &mut self.room_mut()[start..end]
    }

    /// The packet, and behind it whatever is in the rest of the chunk.
    #[inline]
    pub fn data_and_tail_mut(&mut self) -> &mut [u8] {
        let start = self.start;
        &mut self.room_mut()[start..]
    }

    /// Bytes of the packet.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing is in it.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes that can still be appended.
    #[must_use]
    #[inline]
    pub fn tailroom(&self) -> usize {
        self.desc.lengths().data() - self.start - self.length
    }

    /// Says how long the packet is. What comes in at its end is what has been in the chunk before.
    ///
    /// # Errors
    /// The chunk ends before.
    #[inline]
    pub fn set_len(&mut self, length: usize) -> Result<(), NoRoom> {
        if self.start + length > self.desc.lengths().data() {
            return Err(NoRoom);
        }
        self.length = length;
        Ok(())
    }

    /// Cuts bytes off at the front.
    ///
    /// # Errors
    /// There are not so many.
    #[inline]
    pub fn strip(&mut self, bytes: usize) -> Result<(), NoRoom> {
        self.length = self.length.checked_sub(bytes).ok_or(NoRoom)?;
        self.start += bytes;
        Ok(())
    }

    /// Puts bytes in front. Cheap if so many have been stripped before; otherwise the packet is moved.
    ///
    /// # Errors
    /// The frame is too small.
    pub fn prepend(&mut self, bytes: &[u8]) -> Result<(), NoRoom> {
        if bytes.len() > self.start {
            if bytes.len() + self.length > self.desc.lengths().data() {
                return Err(NoRoom);
            }
            let packet = self.start..self.start + self.length;
            self.room_mut().copy_within(packet, bytes.len());
            self.start = bytes.len();
        }
        let (from, to) = (self.start - bytes.len(), self.start);
        self.room_mut()[from..to].copy_from_slice(bytes);
        self.start = from;
        self.length += bytes.len();
        Ok(())
    }

    /// Puts bytes behind. If there is no room but at the front, the packet is moved.
    ///
    /// # Errors
    /// The frame is too small.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), NoRoom> {
        if bytes.len() > self.tailroom() {
            if bytes.len() + self.length > self.desc.lengths().data() {
                return Err(NoRoom);
            }
            self.move_to_front();
        }
        let end = self.start + self.length;
        self.room_mut()[end..end + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
        Ok(())
    }

    /// Makes this the packet.
    ///
    /// # Errors
    /// The frame is too small; nothing has happened.
    pub fn set(&mut self, packet: &[u8]) -> Result<(), NoRoom> {
        let room = self.room_mut().get_mut(..packet.len()).ok_or(NoRoom)?;
        room.copy_from_slice(packet);
        self.start = 0;
        self.length = packet.len();
        Ok(())
    }

    fn move_to_front(&mut self) {
        if self.start != 0 {
            let packet = self.start..self.start + self.length;
            self.room_mut().copy_within(packet, 0);
            self.start = 0;
        }
    }

    /// Whether it is one of this pool's.
    pub(crate) fn is_of(&self, pool: &Rc<Pool>) -> bool {
        Rc::ptr_eq(&self.pool, pool)
    }

    /// How the kernel is told to send it. The packet is at the front then: descriptors cannot be made to begin
    /// elsewhere, so what has been stripped is paid for with a move inside of the chunk.
    pub(crate) fn prepare_to_send(&mut self) -> FrameDesc {
        self.move_to_front();
        let mut desc = self.desc;
        set_length(&self.pool.umem, &mut desc, self.length);
        desc
    }

    /// The kernel has it.
    pub(crate) fn handed_over(self) {
        let index = self.desc.addr() / CHUNK;
        self.pool.ledger.shift(index, Place::Held, Place::Sending);
        // The rest is dropping it, which finds that it is not held.
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        let index = self.desc.addr() / CHUNK;
        self.pool.ledger.shift(index, Place::Held, Place::Free);
    }
}

impl AsRef<[u8]> for Frame {
    fn as_ref(&self) -> &[u8] {
        self.data()
    }
}

impl AsMut<[u8]> for Frame {
    fn as_mut(&mut self) -> &mut [u8] {
        self.data_mut()
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = self.desc.addr() / CHUNK;
        write!(f, "Frame {number} of {} bytes", self.length)
    }
}

/// Says how long the data of a descriptor is; no longer than up to the end of its chunk.
fn set_length(umem: &Umem, desc: &mut FrameDesc, length: usize) {
    // SAFETY: the descriptor is one of this UMEM's and nobody else has the frame: both callers hold it. Nothing of the
    // memory is read or written here.
    unsafe { umem.data_mut(desc) }.cursor().set_pos(length);
}
