//! Where packets come in and go out. A trait, so that the loop can be tested without privileges.

use std::{collections::VecDeque, io, os::fd::RawFd};

/// What a socket's rings have lost, since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PortStatistics {
    /// Packets that were dropped for another reason than a full ring.
    pub rx_dropped: u64,
    /// Packets that were dropped because the receive ring was full.
    pub rx_ring_full: u64,
    /// Packets that were dropped because the kernel had no frame for them.
    pub rx_fill_ring_empty: u64,
    /// Descriptors that were not valid, either way.
    pub invalid: u64,
}

/// A socket of one queue. A frame is in exactly one place: with whoever holds the [`Port::Frame`], or inside.
pub trait Port {
    /// A frame.
    type Frame;

    /// Takes up to `most` packets that have arrived.
    ///
    /// # Errors
    /// The socket is of no use any more.
    fn receive(&mut self, into: &mut VecDeque<Self::Frame>, most: usize) -> io::Result<usize>;

    /// Packets that have arrived and wait, as far as is known.
    fn waiting(&mut self) -> usize;

    /// As many can wait.
    fn capacity(&self) -> usize;

    /// The bytes of a received packet.
    fn data<'a>(&'a self, frame: &'a Self::Frame) -> &'a [u8];

    /// The frame's memory from where a received packet starts to its end, which is behind that of the packet.
    fn room<'a>(&'a mut self, frame: &'a mut Self::Frame) -> &'a mut [u8];

    /// Says how long the packet is that was written into a frame.
    fn set_length(&mut self, frame: &mut Self::Frame, length: usize);

    /// A frame that is free.
    fn take(&mut self) -> Option<Self::Frame>;

    /// A frame is not needed any more.
    fn give(&mut self, frame: Self::Frame);

    /// Sends the `length` bytes from `start` of [`Port::room`]; at the latest with the next [`Port::flush`].
    ///
    /// # Errors
    /// There is no room in the ring: the frame comes back.
    fn transmit(&mut self, frame: Self::Frame, start: usize, length: usize) -> Result<(), Self::Frame>;

    /// Gives the kernel what is to be sent, and takes back what has been sent. Answers how much it has not taken.
    ///
    /// # Errors
    /// The socket is of no use any more.
    fn flush(&mut self) -> io::Result<usize>;

    /// Has the kernel look for packets at once.
    ///
    /// # Errors
    /// The socket is of no use any more.
    fn busy_poll(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Whether packets can still come. Who only waits for them learns nowhere else that they cannot.
    ///
    /// # Errors
    /// The socket is of no use any more.
    fn check(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// What becomes readable when a packet arrives.
    fn fd(&self) -> Option<RawFd>;

    /// What the rings have lost.
    ///
    /// # Errors
    /// The kernel does not tell.
    fn statistics(&mut self) -> io::Result<PortStatistics>;
}
