//! The transmit side of a worker. It appends the reinject trailer to a packet and puts the packet into the transmit
//! ring.
//!
//! Each frame passed to [`Tx`] is either put into the transmit ring, or freed and counted as dropped. Start at
//! [`Tx::forward`].

use std::sync::Arc;

use palisade_abi::{FlowCommand, Reason, ReinjectTrailer, reinject_path};
use palisade_inspect::Route;

use crate::{counters::Counters, header, held::HeldFrame, port::Port};

/// The transmit side of a worker.
pub(crate) struct Tx {
    cookie: u64,
    /// Indices of the interfaces with an XDP program at ingress.
    xdp: Arc<[u32]>,
    counters: Arc<Counters>,
}

impl Tx {
    /// Creates the transmit side.
    pub(crate) fn new(cookie: u64, xdp: Arc<[u32]>, counters: Arc<Counters>) -> Self {
        Self {
            cookie,
            xdp,
            counters,
        }
    }

    /// Sets the interfaces with an XDP program at ingress.
    pub(crate) fn set_xdp(&mut self, xdp: Arc<[u32]>) {
        self.xdp = xdp;
    }

    /// Forwards a held packet, with up to two flow commands, from the hook that punted it.
    pub(crate) fn forward<P: Port>(
        &self,
        port: &mut P,
        held: HeldFrame<P::Frame>,
        command: Option<&FlowCommand>,
    ) {
        let route = Route {
            ifindex: held.ifindex,
            hook: held.hook,
            back: false,
        };
        let trailer = self.trailer(route);
        let commands = [command, held.first_command.as_ref()];
        if self.send(port, held.frame, held.start, held.length, &trailer, commands) {
            self.counters.packets_out.add(1);
            self.counters.bytes_out.add(held.length as u64);
        }
    }

    /// Sends a generated packet, and counts the packet as lost if it cannot be sent or if `packet` is `None`.
    pub(crate) fn emit<P: Port>(&self, port: &mut P, packet: Option<&[u8]>, route: Route) {
        if packet.is_some_and(|packet| self.try_emit(port, packet, route)) {
            self.counters.generated.add(1);
        } else {
            self.counters.generated_lost.add(1);
        }
    }

    fn try_emit<P: Port>(&self, port: &mut P, packet: &[u8], route: Route) -> bool {
        let Some(mut frame) = port.alloc() else {
            return false;
        };
        let Some(buffer) = port.buffer_mut(&mut frame).get_mut(..packet.len()) else {
            port.free(frame);
            return false;
        };
        buffer.copy_from_slice(packet);
        self.send(port, frame, 0, packet.len(), &self.trailer(route), [None; 2])
    }

    /// Sends a flow command in a frame that has only a zeroed Ethernet header. The programs apply the command and drop
    /// the frame.
    ///
    /// A command can be lost, for example because no frame is free. The flow then continues to be punted, which is
    /// slower but not wrong.
    pub(crate) fn send_command<P: Port>(&self, port: &mut P, command: &FlowCommand) {
        let trailer = ReinjectTrailer {
            cookie: self.cookie,
            ifindex: 0,
            path: reinject_path::NONE,
            flags: 0,
            zero: [0; 2],
        };
        let Some(mut frame) = port.alloc() else { return };
        if let Some(header) = port.buffer_mut(&mut frame).get_mut(..header::ETHERNET_HEADER) {
            header.fill(0);
        }
        self.send(
            port,
            frame,
            0,
            header::ETHERNET_HEADER,
            &trailer,
            [Some(command), None],
        );
    }

    fn trailer(&self, route: Route) -> ReinjectTrailer {
        header::trailer(self.cookie, route, self.xdp.contains(&route.ifindex))
    }

    /// Appends commands and trailer to a packet and puts the packet into the transmit ring. Returns whether that
    /// succeeded.
    fn send<P: Port>(
        &self,
        port: &mut P,
        mut frame: P::Frame,
        mut start: usize,
        length: usize,
        trailer: &ReinjectTrailer,
        commands: [Option<&FlowCommand>; 2],
    ) -> bool {
        let buffer = port.buffer_mut(&mut frame);
        if buffer.len() - start < length + header::MAX_TRAILER_BYTES && start > 0 {
            // The trailer does not fit after the packet. The punt header in front of the packet has been parsed and can
            // be overwritten.
            buffer.copy_within(start..start + length, 0);
            start = 0;
        }
        let packet = buffer.get_mut(start..).unwrap_or_default();
        let Some(total) = header::append_trailer(packet, length, trailer, commands) else {
            self.counters.count_drop(Reason::PuntUnsupported);
            port.free(frame);
            return false;
        };
        match port.transmit(frame, start, total) {
            Ok(()) => true,
            Err(frame) => {
                self.counters.count_drop(Reason::WorkerOverload);
                port.free(frame);
                false
            }
        }
    }
}
