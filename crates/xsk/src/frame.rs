//! Frames: the chunks of a UMEM, each with room for one packet.
//!
//! A [`Frame`] owns its chunk: it cannot be cloned, sending it gives the chunk to the kernel, and dropping it frees the
//! chunk. This module depends on `frame_states` and xsk-rs; start at [`Frame`].

use std::{fmt, rc::Rc, slice};

use thiserror::Error;
use xsk_rs::umem::{Umem, frame::FrameDesc};

use crate::frame_states::{Counts, FrameState, FrameStates};

/// Size of a chunk, bytes: one page, because the kernel accepts larger chunks only in a UMEM of huge pages.
pub(crate) const CHUNK: usize = 4096;

/// The UMEM of a socket and the states of its frames. Each held frame keeps the pool alive.
pub(crate) struct Pool {
    umem: Umem,
    /// The descriptor of each frame, by frame number, with a data length of 0.
    blank: Box<[FrameDesc]>,
    states: FrameStates,
}

impl Pool {
    /// Creates the pool. `blank`: the descriptors of all frames of `umem`, in order of their addresses.
    pub(crate) fn new(umem: Umem, blank: Vec<FrameDesc>) -> Self {
        Self {
            states: FrameStates::new(blank.len() as u32),
            umem,
            blank: blank.into(),
        }
    }

    pub(crate) fn counts(&self) -> Counts {
        self.states.counts()
    }

    pub(crate) fn free(&self) -> usize {
        self.states.free()
    }

    /// Takes a free frame for the fill ring and returns its descriptor.
    pub(crate) fn take_to_fill(&self) -> Option<FrameDesc> {
        let index = self.states.take(FrameState::Receiving)?;
        self.blank.get(index as usize).copied()
    }

    /// Frees a frame that did not fit into the fill ring.
    pub(crate) fn unfilled(&self, desc: &FrameDesc) {
        self.states
            .transition(desc.addr() / CHUNK, FrameState::Receiving, FrameState::Free);
    }

    /// Frees a frame whose descriptor came from the completion ring. Returns false and changes nothing if the frame's
    /// state was not `Sending`.
    pub(crate) fn sent(&self, desc: &FrameDesc) -> bool {
        self.states
            .transition(desc.addr() / CHUNK, FrameState::Sending, FrameState::Free)
    }

    /// Takes a free frame for a packet that user space makes. Returns `None` if no frame is free.
    pub(crate) fn alloc(self: &Rc<Self>) -> Option<Frame> {
        let index = self.states.take(FrameState::Held)?;
        let desc = self.blank.get(index as usize)?;
        Some(Frame::new(self, *desc, 0))
    }

    /// Returns the frame of a descriptor from the receive ring; `None` if the frame's state was not `Receiving` or the
    /// packet is not within one chunk.
    pub(crate) fn received(self: &Rc<Self>, desc: FrameDesc) -> Option<Frame> {
        let (length, start) = (desc.lengths().data(), desc.addr() % CHUNK);
        if start + length > CHUNK {
            return None;
        }
        self.states
            .transition(desc.addr() / CHUNK, FrameState::Receiving, FrameState::Held)
            .then(|| Frame::new(self, desc, length))
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool {:?}", self.counts())
    }
}

/// The requested length does not fit: the frame is too small, or the packet is too short.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("no room in the frame")]
pub struct NoRoom;

/// A frame that user space owns, with a packet in it. Dropping it frees the chunk.
pub struct Frame {
    pool: Rc<Pool>,
    /// Descriptor of the usable part of the chunk, which extends to the end of the chunk. In a received frame, the
    /// usable part starts at the address at which the kernel put the packet.
    desc: FrameDesc,
    /// Offset of the packet in the usable part.
    start: usize,
    /// Length of the packet.
    length: usize,
}

impl Frame {
    /// Creates the owner of a frame. The frame's state must be `Held`, and there must be no other `Frame` for it.
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
        // SAFETY: `desc` is of this pool's UMEM, and its state is `Held`, so the kernel does not access the chunk.
        // There is one `Frame` for the chunk, and it stays borrowed for the lifetime of the slice.
        unsafe { self.pool.umem.data(&self.desc) }.contents()
    }

    fn room_mut(&mut self) -> &mut [u8] {
        // SAFETY: `desc` is of this pool's UMEM, and its state is `Held`, so the kernel does not access the chunk.
        // There is one `Frame` for the chunk, and it is borrowed mutably.
        let mut room = unsafe { self.pool.umem.data_mut(&mut self.desc) };
        let room = room.contents_mut();
        let (begin, length) = (room.as_mut_ptr(), room.len());
        // SAFETY: pointer and length come from a slice of the UMEM, which `self.pool` keeps alive. Only the lifetime of
        // the slice is extended, from the lifetime of the wrapper on the stack to the mutable borrow of `self`.
        unsafe { slice::from_raw_parts_mut(begin, length) }
    }

    /// Returns the packet.
    #[must_use]
    #[inline]
    pub fn data(&self) -> &[u8] {
        let packet = self.start..self.start + self.length;
        self.room().get(packet).unwrap_or_default()
    }

    /// Returns the packet.
    #[inline]
    pub fn data_mut(&mut self) -> &mut [u8] {
        let packet = self.start..self.start + self.length;
        self.room_mut().get_mut(packet).unwrap_or_default()
    }

    /// Returns the packet and the rest of the chunk after the packet. The rest has unspecified contents.
    #[inline]
    pub fn data_and_tail_mut(&mut self) -> &mut [u8] {
        let start = self.start;
        self.room_mut().get_mut(start..).unwrap_or_default()
    }

    /// Returns the length of the packet.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Returns whether the packet is empty.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Returns the number of bytes between the end of the packet and the end of the chunk.
    #[must_use]
    #[inline]
    pub fn tailroom(&self) -> usize {
        self.desc.lengths().data() - self.start - self.length
    }

    /// Sets the length of the packet. If the length grows, the added bytes keep their previous contents.
    ///
    /// # Errors
    /// The packet would reach beyond the chunk.
    #[inline]
    pub fn set_len(&mut self, length: usize) -> Result<(), NoRoom> {
        if self.start + length > self.desc.lengths().data() {
            return Err(NoRoom);
        }
        self.length = length;
        Ok(())
    }

    /// Removes the first `bytes` bytes of the packet.
    ///
    /// # Errors
    /// The packet is shorter than `bytes`.
    #[inline]
    pub fn strip(&mut self, bytes: usize) -> Result<(), NoRoom> {
        self.length = self.length.checked_sub(bytes).ok_or(NoRoom)?;
        self.start += bytes;
        Ok(())
    }

    /// Inserts bytes at the front of the packet. Moves the packet within the chunk if there is not enough space before
    /// the packet.
    ///
    /// # Errors
    /// The packet would not fit into the usable part of the chunk.
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
        let front = self.room_mut().get_mut(from..to).ok_or(NoRoom)?;
        front.copy_from_slice(bytes);
        self.start = from;
        self.length += bytes.len();
        Ok(())
    }

    /// Appends bytes to the packet. Moves the packet to the front of the usable part of the chunk if the tailroom is
    /// too small.
    ///
    /// # Errors
    /// The packet would not fit into the usable part of the chunk.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), NoRoom> {
        if bytes.len() > self.tailroom() {
            if bytes.len() + self.length > self.desc.lengths().data() {
                return Err(NoRoom);
            }
            self.move_to_front();
        }
        let end = self.start + self.length;
        let tail = self.room_mut().get_mut(end..end + bytes.len()).ok_or(NoRoom)?;
        tail.copy_from_slice(bytes);
        self.length += bytes.len();
        Ok(())
    }

    /// Replaces the packet.
    ///
    /// # Errors
    /// The new packet does not fit into the usable part of the chunk; the frame is unchanged.
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

    /// Returns whether the frame belongs to `pool`.
    pub(crate) fn is_of(&self, pool: &Rc<Pool>) -> bool {
        Rc::ptr_eq(&self.pool, pool)
    }

    /// Returns the descriptor for the transmit ring. Moves the packet to the front of the usable part first, because
    /// xsk-rs cannot make a descriptor that starts at another offset.
    pub(crate) fn prepare_to_send(&mut self) -> FrameDesc {
        self.move_to_front();
        let mut desc = self.desc;
        set_length(&self.pool.umem, &mut desc, self.length);
        desc
    }

    /// Passes ownership to the kernel. The caller has put the frame's descriptor into the transmit ring.
    pub(crate) fn into_tx(self) {
        let index = self.desc.addr() / CHUNK;
        self.pool
            .states
            .transition(index, FrameState::Held, FrameState::Sending);
        // `Drop` runs now, but does nothing because the state is no longer `Held`.
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        let index = self.desc.addr() / CHUNK;
        self.pool
            .states
            .transition(index, FrameState::Held, FrameState::Free);
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

/// Sets the data length of a descriptor, limited to the end of its chunk.
fn set_length(umem: &Umem, desc: &mut FrameDesc, length: usize) {
    // SAFETY: `desc` is of `umem`, and both callers own the frame of `desc`, so there is no other reference to the
    // chunk. `set_pos` changes the descriptor and accesses no packet memory.
    unsafe { umem.data_mut(desc) }.cursor().set_pos(length);
}
