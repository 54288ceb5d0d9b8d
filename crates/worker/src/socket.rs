//! The AF_XDP socket as a [`Port`].

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd as _, RawFd},
};

use palisade_xsk::{Frame, Socket};

use crate::port::{Port, PortStatistics};

/// Names the punt link in the error of a socket whose interface is down or gone.
fn explain(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENETDOWN | libc::ENXIO | libc::ENODEV) => {
            io::Error::new(error.kind(), format!("the punt link is down or gone: {error}"))
        }
        _ => error,
    }
}

impl Port for Socket {
    type Frame = Frame;

    fn receive(&mut self, into: &mut VecDeque<Frame>, limit: usize) -> io::Result<usize> {
        Self::receive(self, into, limit).map_err(explain)
    }

    fn rx_available(&mut self) -> usize {
        Self::rx_available(self)
    }

    fn rx_capacity(&self) -> usize {
        Self::rx_capacity(self)
    }

    fn data<'a>(&'a self, frame: &'a Frame) -> &'a [u8] {
        frame.data()
    }

    fn buffer_mut<'a>(&'a mut self, frame: &'a mut Frame) -> &'a mut [u8] {
        frame.data_and_tail_mut()
    }

    fn set_length(&mut self, frame: &mut Frame, length: usize) {
        // The caller has written `length` bytes to `buffer_mut`, so they fit.
        let _ = frame.set_len(length);
    }

    fn alloc(&mut self) -> Option<Frame> {
        Self::alloc(self)
    }

    fn free(&mut self, frame: Frame) {
        drop(frame);
    }

    fn transmit(&mut self, mut frame: Frame, start: usize, length: usize) -> Result<(), Frame> {
        if frame.set_len(start + length).is_err() || frame.strip(start).is_err() {
            return Err(frame);
        }
        self.send(frame)
    }

    fn flush(&mut self) -> io::Result<usize> {
        Self::flush(self).map_err(explain)
    }

    fn busy_poll(&mut self) -> io::Result<()> {
        self.busy_poll_once().map_err(explain)
    }

    fn check(&mut self) -> io::Result<()> {
        // `recvfrom` fails at once if the interface is down; otherwise the call only polls the driver.
        self.busy_poll_once().map_err(explain)
    }

    fn fd(&self) -> Option<RawFd> {
        Some(self.as_raw_fd())
    }

    fn statistics(&mut self) -> io::Result<PortStatistics> {
        let statistics = Self::statistics(self).map_err(explain)?;
        Ok(PortStatistics {
            rx_dropped: statistics.rx_dropped,
            rx_ring_full: statistics.rx_ring_full,
            rx_fill_ring_empty: statistics.rx_fill_ring_empty,
            invalid: statistics.rx_invalid + statistics.tx_invalid + statistics.unexpected,
        })
    }
}
