//! The port that is a socket.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd as _, RawFd},
};

use palisade_xsk::{Frame, Socket};

use crate::port::{Port, PortStatistics};

/// What the kernel says of a socket whose interface is gone or down, in words that an operator can use.
fn told(problem: io::Error) -> io::Error {
    match problem.raw_os_error() {
        Some(libc::ENETDOWN | libc::ENXIO | libc::ENODEV) => {
            io::Error::new(problem.kind(), format!("the carrier is down or gone: {problem}"))
        }
        _ => problem,
    }
}

impl Port for Socket {
    type Frame = Frame;

    fn receive(&mut self, into: &mut VecDeque<Frame>, most: usize) -> io::Result<usize> {
        Self::receive(self, into, most).map_err(told)
    }

    fn waiting(&mut self) -> usize {
        Self::rx_available(self)
    }

    fn capacity(&self) -> usize {
        Self::rx_capacity(self)
    }

    fn data<'a>(&'a self, frame: &'a Frame) -> &'a [u8] {
        frame.data()
    }

    fn room<'a>(&'a mut self, frame: &'a mut Frame) -> &'a mut [u8] {
        frame.data_and_tail_mut()
    }

    fn set_length(&mut self, frame: &mut Frame, length: usize) {
        // Whoever has written so much has seen that there is room.
        let _ = frame.set_len(length);
    }

    fn take(&mut self) -> Option<Frame> {
        Self::alloc(self)
    }

    fn give(&mut self, frame: Frame) {
        drop(frame);
    }

    fn transmit(&mut self, mut frame: Frame, start: usize, length: usize) -> Result<(), Frame> {
        if frame.set_len(start + length).is_err() || frame.strip(start).is_err() {
            return Err(frame);
        }
        self.send(frame)
    }

    fn flush(&mut self) -> io::Result<usize> {
        Self::flush(self).map_err(told)
    }

    fn busy_poll(&mut self) -> io::Result<()> {
        self.busy_poll_once().map_err(told)
    }

    fn check(&mut self) -> io::Result<()> {
        // It is the socket's interface that the kernel looks at first, before it looks for packets.
        self.busy_poll_once().map_err(told)
    }

    fn fd(&self) -> Option<RawFd> {
        Some(self.as_raw_fd())
    }

    fn statistics(&mut self) -> io::Result<PortStatistics> {
        let statistics = Self::statistics(self).map_err(told)?;
        Ok(PortStatistics {
            rx_dropped: statistics.rx_dropped,
            rx_ring_full: statistics.rx_ring_full,
            rx_fill_ring_empty: statistics.rx_fill_ring_empty,
            invalid: statistics.rx_invalid + statistics.tx_invalid + statistics.unexpected,
        })
    }
}
