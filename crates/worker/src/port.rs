//! The interface to the socket of a worker. It is a trait so that the loop can be tested without an AF_XDP socket.
//!
//! [`palisade_xsk::Socket`] implements it in `socket.rs`.

use std::{collections::VecDeque, io, os::fd::RawFd};

/// Losses in the rings of a socket since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PortStatistics {
    /// Packets dropped because they were larger than a frame or, in copy mode, because the fill ring was empty.
    pub rx_dropped: u64,
    /// Packets dropped because the receive ring was full.
    pub rx_ring_full: u64,
    /// Number of times that the kernel needed a frame and found the fill ring empty. In copy mode, it drops a packet
    /// each time.
    pub rx_fill_ring_empty: u64,
    /// Invalid descriptors in any of the rings.
    pub invalid: u64,
}

/// A socket on one queue. Each frame is owned either by a [`Port::Frame`] or by the port.
pub trait Port {
    /// The owner of a frame.
    type Frame;

    /// Moves at most `limit` received packets to the end of `into`. Returns the number of descriptors removed from the
    /// receive ring.
    ///
    /// # Errors
    /// A system call failed, for example because the interface is down.
    fn receive(&mut self, into: &mut VecDeque<Self::Frame>, limit: usize) -> io::Result<usize>;

    /// Returns the number of packets in the receive ring.
    fn rx_available(&mut self) -> usize;

    /// Returns the size of the receive ring.
    fn rx_capacity(&self) -> usize;

    /// Returns the bytes of a packet.
    fn data<'a>(&'a self, frame: &'a Self::Frame) -> &'a [u8];

    /// Returns the frame's memory from the start of the packet to the end of the frame.
    fn buffer_mut<'a>(&'a mut self, frame: &'a mut Self::Frame) -> &'a mut [u8];

    /// Sets the length of a packet that was written to [`Port::buffer_mut`].
    fn set_length(&mut self, frame: &mut Self::Frame, length: usize);

    /// Returns a free frame; `None` if all are in use.
    fn alloc(&mut self) -> Option<Self::Frame>;

    /// Frees a frame.
    fn free(&mut self, frame: Self::Frame);

    /// Puts a frame into the transmit ring; the packet is `length` bytes from offset `start` of [`Port::buffer_mut`].
    /// The packet can remain in the ring until the next call of [`Port::flush`].
    ///
    /// # Errors
    /// The packet could not be put into the ring, for example because the ring is full. Returns the frame.
    fn transmit(&mut self, frame: Self::Frame, start: usize, length: usize) -> Result<(), Self::Frame>;

    /// Wakes the kernel to send the packets in the transmit ring, and frees the frames of sent packets. Returns the
    /// number of packets left in the transmit ring.
    ///
    /// # Errors
    /// A system call failed, for example because the interface is down.
    fn flush(&mut self) -> io::Result<usize>;

    /// Polls the driver once in this thread (busy polling).
    ///
    /// # Errors
    /// A system call failed, for example because the interface is down.
    fn busy_poll(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Checks that the interface is up. A worker that only waits for packets would not notice that its interface is
    /// gone.
    ///
    /// # Errors
    /// A system call failed, for example because the interface is down.
    fn check(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Returns the file descriptor that becomes readable when a packet arrives; `None` if there is no such descriptor.
    fn fd(&self) -> Option<RawFd>;

    /// Returns the losses in the rings.
    ///
    /// # Errors
    /// The statistics could not be read.
    fn statistics(&mut self) -> io::Result<PortStatistics>;
}
