//! The receive side of a worker. It takes batches from the receive ring, sheds packets under overload, and hands
//! packets of other workers' flows off to those workers.
//!
//! XDP can redirect a packet only to a socket of the queue that the packet arrived at, and the queue depends on the
//! CPU. So a packet can arrive at any worker; the flow hash in its punt header selects the worker that owns the flow.

use std::{collections::VecDeque, io, sync::Arc};

use mio::Waker;
use palisade_abi::{PuntHeader, Reason};
use palisade_xsk::handoff;

use crate::{counters::Counters, fair::Fair, header, port::Port};

/// Maximum number of packets taken from the receive ring per turn.
const BATCH: usize = 64;
/// Maximum number of packets taken from each hand-off ring per turn.
const HANDOFF_BATCH: usize = 64;

/// A worker's connections to the other workers.
pub(crate) struct Peers<'a> {
    /// This worker's number.
    pub number: usize,
    /// Number of workers.
    pub workers: usize,
    /// Hand-off rings to the other workers, by number.
    pub senders: &'a mut [Option<handoff::Sender<()>>],
    /// Hand-off rings from the other workers, by number.
    pub receivers: &'a mut [Option<handoff::Receiver<()>>],
    /// Wakers of all workers, by number.
    pub wakers: &'a [Arc<Waker>],
}

/// The receive side of a worker.
pub(crate) struct Rx<'a, F> {
    cookie: u64,
    peers: Peers<'a>,
    /// The packets of this turn.
    batch: VecDeque<F>,
    fair: Fair,
    /// For each packet of the batch, whether it is shed.
    shed: Vec<bool>,
    /// For each worker, whether a packet was handed off to it since this worker last woke it.
    to_wake: Vec<bool>,
    counters: Arc<Counters>,
}

impl<'a, F> Rx<'a, F> {
    /// Creates the receive side. `rx_capacity`: size of the receive ring.
    pub(crate) fn new(cookie: u64, peers: Peers<'a>, rx_capacity: usize, counters: Arc<Counters>) -> Self {
        Self {
            cookie,
            batch: VecDeque::with_capacity(BATCH.max(rx_capacity)),
            fair: Fair::new(BATCH),
            shed: Vec::with_capacity(BATCH),
            to_wake: vec![false; peers.workers],
            peers,
            counters,
        }
    }

    /// Takes a batch from the receive ring and sheds half of it under overload. Returns whether a packet has arrived.
    ///
    /// # Errors
    /// The socket failed.
    pub(crate) fn receive<P: Port<Frame = F>>(&mut self, port: &mut P, now: u64) -> io::Result<bool> {
        let received = port.receive(&mut self.batch, BATCH)?;
        self.fair.advance(now);
        if port.rx_available() + self.batch.len() > port.rx_capacity() / 2 {
            self.shed(port);
        }
        Ok(received != 0)
    }

    /// Drops half of the batch, mostly packets of the flows that have had the most packets admitted ([`Fair::halve`]).
    /// Dropping takes far less time than inspecting, which lets the receive ring drain.
    fn shed<P: Port<Frame = F>>(&mut self, port: &mut P) {
        self.shed.clear();
        self.shed.resize(self.batch.len(), false);
        let hashes = self.batch.iter().map(|frame| header::flow_hash(port.data(frame)));
        self.fair.halve(hashes, |index| {
            if let Some(shed) = self.shed.get_mut(index) {
                *shed = true;
            }
        });
        for shed in &self.shed {
            let Some(frame) = self.batch.pop_front() else {
                break;
            };
            if *shed {
                self.counters.packets_in.add(1);
                self.counters.count_drop(Reason::WorkerOverload);
                port.free(frame);
            } else {
                self.batch.push_back(frame);
            }
        }
    }

    /// Calls `own` with each packet of the batch whose flow this worker owns, and hands off the others.
    pub(crate) fn dispatch<P: Port<Frame = F>>(
        &mut self,
        port: &mut P,
        mut own: impl FnMut(&mut P, F, &PuntHeader),
    ) {
        while let Some(frame) = self.batch.pop_front() {
            let data = port.data(&frame);
            self.counters.packets_in.add(1);
            self.counters
                .bytes_in
                .add(data.len().saturating_sub(header::PUNT_HEADER) as u64);
            let punted = match header::parse(data, self.cookie) {
                Ok(punted) => punted,
                Err(reason) => {
                    self.counters.count_drop(reason);
                    port.free(frame);
                    continue;
                }
            };
            let owner = punted.hash as usize % self.peers.workers;
            if owner == self.peers.number {
                own(port, frame, &punted);
            } else {
                self.hand_off(owner, port.data(&frame));
                port.free(frame);
            }
        }
    }

    /// Copies a packet to its flow's worker.
    fn hand_off(&mut self, owner: usize, packet: &[u8]) {
        let sender = self.peers.senders.get_mut(owner).and_then(Option::as_mut);
        if sender.is_some_and(|sender| sender.send((), packet).is_ok()) {
            self.counters.handoff_out.add(1);
            if let Some(to_wake) = self.to_wake.get_mut(owner) {
                *to_wake = true;
            }
        } else {
            self.counters.count_drop(Reason::WorkerOverload);
        }
    }

    /// Calls `own` with the packets that other workers have handed off to this one. Returns whether there was a packet.
    pub(crate) fn receive_handoffs<P: Port<Frame = F>>(
        &mut self,
        port: &mut P,
        mut own: impl FnMut(&mut P, F, &PuntHeader),
    ) -> bool {
        let mut any = false;
        for receiver in self.peers.receivers.iter_mut().flatten() {
            for _ in 0..HANDOFF_BATCH {
                let Some(frame) = receiver.receive(|(), bytes| copy_to_frame(port, bytes)) else {
                    break;
                };
                any = true;
                let Some(frame) = frame else {
                    self.counters.count_drop(Reason::WorkerOverload);
                    continue;
                };
                self.counters.handoff_in.add(1);
                // The sending worker has validated the header, so this does not fail.
                match header::parse(port.data(&frame), self.cookie) {
                    Ok(punted) => own(port, frame, &punted),
                    Err(reason) => {
                        self.counters.count_drop(reason);
                        port.free(frame);
                    }
                }
            }
        }
        any
    }

    /// Returns whether a packet that another worker has handed off is waiting.
    pub(crate) fn has_handoffs(&mut self) -> bool {
        let mut receivers = self.peers.receivers.iter_mut().flatten();
        receivers.any(|receiver| receiver.available() != 0)
    }

    /// Wakes the workers to which packets were handed off.
    pub(crate) fn wake_peers(&mut self) {
        for (to_wake, waker) in self.to_wake.iter_mut().zip(self.peers.wakers) {
            if std::mem::take(to_wake) {
                // If waking fails, the other worker finds the packets at its next heartbeat.
                let _ = waker.wake();
            }
        }
    }
}

/// Copies a packet into a free frame of this worker's socket. Returns `None` if no frame is free, or the packet is
/// larger than a frame.
fn copy_to_frame<P: Port>(port: &mut P, bytes: &[u8]) -> Option<P::Frame> {
    let mut frame = port.alloc()?;
    let Some(buffer) = port.buffer_mut(&mut frame).get_mut(..bytes.len()) else {
        port.free(frame);
        return None;
    };
    buffer.copy_from_slice(bytes);
    port.set_length(&mut frame, bytes.len());
    Some(frame)
}
