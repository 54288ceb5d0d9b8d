//! What an inspector wants done after a packet: forward, discard, send, command. Inspectors queue effects while they
//! borrow the frame; the worker runs them afterwards (`inspection.rs`).

use std::{collections::VecDeque, sync::Arc, time::SystemTime};

use palisade_abi::{FlowCommand, Reason};
use palisade_inspect::{Learn, Learned, Route, Sink, learning::Learner, record::Record};

use crate::{context::Stamped, counters::Counters, header, held::Handle, queue};

/// Most bytes of generated packets that can be queued at once.
const MAX_GENERATED_BYTES: usize = 256 * 1024;

/// What an inspector wants done.
pub enum Effect {
    /// Forward a held packet unchanged, with a flow command if there is one.
    Release(Handle, Option<FlowCommand>),
    /// Drop a held packet.
    Discard(Handle, Reason),
    /// Drop a held packet whose bytes are delivered in generated packets.
    Absorb(Handle),
    /// Send a flow command without a packet.
    Command(FlowCommand),
    /// Send a generated packet: a range of [`Effects::generated`].
    Emit {
        start: usize,
        length: usize,
        route: Route,
    },
}

/// The queued effects, in the order in which the inspector wants them. Also the inspectors' way to the queues of
/// commits and records, which do not wait for the frame.
pub struct Effects {
    queue: VecDeque<Effect>,
    /// Bytes of the generated packets, one after the other.
    generated: Vec<u8>,
    learner: Learner,
    records: queue::Sender<Stamped>,
    /// Time of the last wake-up of the records' reader, ns.
    records_flushed: u64,
    /// Time of the last flush of TTL refreshes to the name cache, ns.
    refreshes_flushed: u64,
    counters: Arc<Counters>,
}

impl Effects {
    /// Creates an empty queue. `frames`: number of frames of the socket, each of which can have an effect.
    pub fn new(
        frames: usize,
        learner: Learner,
        records: queue::Sender<Stamped>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            queue: VecDeque::with_capacity(frames),
            generated: Vec::with_capacity(MAX_GENERATED_BYTES),
            learner,
            records,
            records_flushed: 0,
            refreshes_flushed: 0,
            counters,
        }
    }

    /// Removes and returns the next effect. When none is left, the generated packets are forgotten.
    pub fn next(&mut self) -> Option<Effect> {
        let effect = self.queue.pop_front();
        if effect.is_none() {
            self.generated.clear();
        }
        effect
    }

    /// Returns the bytes of a generated packet.
    pub fn generated(&self, start: usize, length: usize) -> Option<&[u8]> {
        self.generated.get(start..start + length)
    }

    /// Returns the next result of a commit.
    pub fn next_committed(&mut self) -> Option<Learned> {
        self.learner.take()
    }

    /// Returns whether a result of a commit is waiting.
    pub fn has_committed(&self) -> bool {
        self.learner.is_answered()
    }

    /// Wakes the reader of the records, and passes the refreshes on.
    ///
    /// At most once per tick of the coarse clock: a wake-up is a system call, and the reader would compete for the CPU
    /// just when the packet's receiver needs it. Earlier if a quarter of the record queue is used.
    pub fn flush(&mut self, now: u64) {
        if self.records.has_unflushed() && (now != self.records_flushed || self.records.is_filling_up()) {
            self.records.wake();
            self.records_flushed = now;
        }
        if self.learner.has_to_tell() && now != self.refreshes_flushed {
            self.learner.flush();
            self.refreshes_flushed = now;
        }
    }

    /// Returns whether records or refreshes wait for [`Effects::flush`].
    pub fn has_unflushed(&self) -> bool {
        self.records.has_unflushed() || self.learner.has_to_tell()
    }
}

impl Sink<Handle> for Effects {
    fn release(&mut self, frame: Handle) {
        self.queue.push_back(Effect::Release(frame, None));
    }

    fn release_with(&mut self, frame: Handle, command: &FlowCommand) {
        self.queue.push_back(Effect::Release(frame, Some(*command)));
    }

    fn command(&mut self, command: &FlowCommand) {
        self.queue.push_back(Effect::Command(*command));
    }

    fn absorb(&mut self, frame: Handle) {
        self.queue.push_back(Effect::Absorb(frame));
    }

    fn discard(&mut self, frame: Handle, reason: Reason) {
        self.queue.push_back(Effect::Discard(frame, reason));
    }

    fn emit(&mut self, frame: &[u8], route: Route) {
        let start = self.generated.len();
        if start + frame.len() > MAX_GENERATED_BYTES || frame.len() < header::ETHERNET {
            self.counters.generated_lost.add(1);
            return;
        }
        self.generated.extend_from_slice(frame);
        self.queue.push_back(Effect::Emit {
            start,
            length: frame.len(),
            route,
        });
    }

    fn learn(&mut self, learn: Learn) -> Result<(), Learn> {
        self.learner.ask(learn)
    }

    fn refresh(&mut self, learn: Learn) -> Result<(), Learn> {
        self.learner.tell(learn)
    }

    fn epoch(&self) -> u64 {
        self.learner.epoch()
    }

    fn record(&mut self, record: &Record) {
        // The precise clock, which also stamps the programs' events: with the coarse one, a record could seem older
        // than the packet that caused it.
        if self.records.push((SystemTime::now(), *record)).is_err() {
            self.counters.records_lost.add(1);
        }
    }
}
