//! The frames that inspectors hold, and the handles by which inspectors refer to them.
//!
//! The frames are in a `slab`. This module adds a bound, so that the slab never grows, and handles that can be used
//! only once. Start at [`HeldFrames`].

use palisade_abi::{FlowCommand, PuntRequest};

/// A handle on a held frame. A handle cannot be cloned, and the effect that forwards or drops the frame consumes the
/// handle, so each frame is forwarded or dropped at most once.
#[derive(Debug, PartialEq, Eq)]
pub struct Handle(u32);

impl Handle {
    fn key(&self) -> usize {
        self.0 as usize
    }

    /// Returns the number of the frame, for an effect that changes the frame and leaves it held.
    pub(crate) const fn number(&self) -> u32 {
        self.0
    }
}

/// A punted packet in its frame, and how to reinject it.
pub(crate) struct HeldFrame<F> {
    /// The frame.
    pub frame: F,
    /// Offset of the Ethernet header in the frame.
    pub start: usize,
    /// Length of the packet.
    pub length: usize,
    /// Offset of the transport header, from the Ethernet header on.
    pub transport: usize,
    /// Interface of the hook that punted the packet.
    pub ifindex: u32,
    /// The hook that punted the packet.
    pub hook: u8,
    /// Punt request of the second policy, if the policies of both endpoints inspect the packet (workload and node).
    /// `None` otherwise, and as soon as the packet is passed to the second policy's inspector.
    pub second: Option<PuntRequest>,
    /// Command of the first policy's inspector, if that command must be sent with the packet.
    pub first_command: Option<FlowCommand>,
}

/// The held frames of a worker.
pub(crate) struct HeldFrames<F> {
    frames: slab::Slab<HeldFrame<F>>,
    capacity: usize,
}

impl<F> HeldFrames<F> {
    /// Creates a slab for `capacity` frames. Inserting frames does not allocate.
    #[must_use]
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            frames: slab::Slab::with_capacity(capacity),
            capacity,
        }
    }

    /// Returns the number of held frames.
    #[must_use]
    pub(crate) fn len(&self) -> usize {
        self.frames.len()
    }

    /// Inserts a frame and returns its handle.
    ///
    /// # Errors
    /// The slab is full. Returns the frame.
    #[expect(
        clippy::result_large_err,
        reason = "the frame goes back to its owner; a box would be an allocation per packet"
    )]
    pub(crate) fn insert(&mut self, frame: HeldFrame<F>) -> Result<Handle, HeldFrame<F>> {
        if self.frames.len() >= self.capacity {
            return Err(frame);
        }
        Ok(Handle(self.frames.insert(frame) as u32))
    }

    /// Returns the frame of a handle.
    #[must_use]
    pub(crate) fn get(&self, handle: &Handle) -> Option<&HeldFrame<F>> {
        self.frames.get(handle.key())
    }

    /// Returns the frame of a handle.
    pub(crate) fn get_mut(&mut self, handle: &Handle) -> Option<&mut HeldFrame<F>> {
        self.frames.get_mut(handle.key())
    }

    /// Returns the frame with a number ([`Handle::number`]).
    pub(crate) fn numbered_mut(&mut self, number: u32) -> Option<&mut HeldFrame<F>> {
        self.frames.get_mut(number as usize)
    }

    /// Removes and returns the frame of a handle.
    pub(crate) fn remove(&mut self, handle: Handle) -> Option<HeldFrame<F>> {
        self.frames.try_remove(handle.key())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(number: u32) -> HeldFrame<u32> {
        HeldFrame {
            frame: number,
            start: 0,
            length: 0,
            transport: 0,
            ifindex: 1,
            hook: 1,
            second: None,
            first_command: None,
        }
    }

    #[test]
    fn a_full_slab_returns_the_frame_and_a_removed_frame_makes_room() {
        let mut frames = HeldFrames::new(2);
        let first = frames.insert(frame(1)).ok().unwrap();
        let second = frames.insert(frame(2)).ok().unwrap();
        assert_eq!(frames.insert(frame(3)).err().unwrap().frame, 3);
        assert_eq!(frames.len(), 2);
        assert_eq!(frames.remove(first).unwrap().frame, 1);
        let third = frames.insert(frame(3)).ok().unwrap();
        assert_eq!(frames.get(&second).unwrap().frame, 2);
        assert_eq!(frames.get_mut(&third).unwrap().frame, 3);
        assert_eq!(frames.len(), 2);
    }
}
