//! Effects: the actions that an inspector requests for a packet. An inspector can forward or discard held packets, send
//! generated packets, and send commands to the programs.
//!
//! While an inspector runs, it borrows the packet's frame, so it cannot send that frame. The inspector queues effects
//! instead, and the worker runs the effects when the inspector has returned (`inspection.rs`). Start at [`Effects`],
//! which is the inspectors' [`Sink`].

use std::{collections::VecDeque, sync::Arc, time::SystemTime};

use palisade_abi::{FlowCommand, Reason};
use palisade_inspect::{CommitRequest, CommitResult, Route, Sink, commit::Committer, record::Record, steps};

use crate::{context::TimedRecord, counters::Counters, header, held::Handle, queue};

/// Maximum number of bytes of generated packets in the queue.
const MAX_GENERATED_BYTES: usize = 256 * 1024;

/// An action that an inspector requests.
pub(crate) enum Effect {
    /// Forward a held packet, with the flow command if there is one. If the policies of both endpoints inspect the
    /// packet (workload and node), the first policy's inspector thereby passes it to the second policy's inspector.
    Release(Handle, Option<FlowCommand>),
    /// Lower the window field of the TCP segment in the held frame with this number to this value.
    LimitWindow(u32, u16),
    /// Drop a held packet.
    Discard(Handle, Reason),
    /// Drop a held packet whose bytes are delivered in generated packets.
    Absorb(Handle),
    /// Send a flow command without a packet.
    Command(FlowCommand),
    /// Send a generated packet. `start` and `length` are its range in [`Effects::generated`].
    Emit {
        start: usize,
        length: usize,
        route: Route,
    },
}

/// The sink of a worker's inspectors. It queues effects in their order, and passes learned addresses and records on at
/// once.
pub(crate) struct Effects {
    queue: VecDeque<Effect>,
    /// Bytes of the generated packets, one after the other.
    generated: Vec<u8>,
    /// Sends learned addresses to the thread that commits them, and receives the results.
    committer: Committer,
    records: queue::Sender<TimedRecord>,
    /// Time of the last wake-up of the records' reader, ns.
    records_flushed: u64,
    /// Time at which refreshes were last passed to the thread that commits addresses, ns. A refresh is an answer whose
    /// addresses are committed already; a refresh extends the lifetime of these addresses.
    refreshes_flushed: u64,
    counters: Arc<Counters>,
}

impl Effects {
    /// Creates an empty queue. `frames`: number of frames of the socket, each of which can have an effect.
    pub(crate) fn new(
        frames: usize,
        committer: Committer,
        records: queue::Sender<TimedRecord>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            queue: VecDeque::with_capacity(frames),
            generated: Vec::with_capacity(MAX_GENERATED_BYTES),
            committer,
            records,
            records_flushed: 0,
            refreshes_flushed: 0,
            counters,
        }
    }

    /// Removes and returns the next effect. If no effect is left, returns `None` and discards the bytes of the
    /// generated packets.
    pub(crate) fn next(&mut self) -> Option<Effect> {
        let effect = self.queue.pop_front();
        if effect.is_none() {
            self.generated.clear();
        }
        effect
    }

    /// Returns the bytes of a generated packet.
    pub(crate) fn generated(&self, start: usize, length: usize) -> Option<&[u8]> {
        self.generated.get(start..start + length)
    }

    /// Returns the next result of a commit of learned addresses.
    pub(crate) fn next_committed(&mut self) -> Option<CommitResult> {
        self.committer.take()
    }

    /// Returns whether a result of a commit is waiting.
    pub(crate) fn has_committed(&self) -> bool {
        self.committer.is_answered()
    }

    /// Wakes the reader of the records and passes refreshes on, each usually at most once per tick of the coarse
    /// clock. `now`: ns.
    ///
    /// A wake-up is a system call, and the woken thread would compete for the CPU with the receiver of the forwarded
    /// packet. If the record queue is more than a quarter full, the reader of the records is woken without waiting for
    /// the next tick.
    pub(crate) fn flush(&mut self, now: u64) {
        if self.records.has_unflushed() && (now != self.records_flushed || self.records.is_filling_up()) {
            self.records.wake();
            self.records_flushed = now;
        }
        if self.committer.has_refreshes() && now != self.refreshes_flushed {
            self.committer.flush();
            self.refreshes_flushed = now;
        }
    }

    /// Returns whether records or refreshes wait for [`Effects::flush`].
    pub(crate) fn has_unflushed(&self) -> bool {
        self.records.has_unflushed() || self.committer.has_refreshes()
    }
}

impl Sink<Handle> for Effects {
    fn release(&mut self, frame: Handle) {
        self.queue.push_back(Effect::Release(frame, None));
    }

    fn release_with(&mut self, frame: Handle, command: &FlowCommand) {
        self.queue.push_back(Effect::Release(frame, Some(*command)));
    }

    fn limit_window(&mut self, frame: &Handle, window: u16) {
        self.queue.push_back(Effect::LimitWindow(frame.number(), window));
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
        if start + frame.len() > MAX_GENERATED_BYTES || frame.len() < header::ETHERNET_HEADER {
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

    fn commit(&mut self, learn: CommitRequest) -> Result<(), CommitRequest> {
        self.committer.submit(learn)
    }

    fn refresh(&mut self, learn: CommitRequest) -> Result<(), CommitRequest> {
        self.committer.refresh(learn)
    }

    fn epoch(&self) -> u64 {
        self.committer.epoch()
    }

    fn record(&mut self, record: &Record) {
        steps::record(record);
        // Use the precise clock, as for the programs' events. With the coarse clock, a record could seem older than the
        // packet that caused it.
        if self.records.push((SystemTime::now(), *record)).is_err() {
            self.counters.records_lost.add(1);
        }
    }
}
