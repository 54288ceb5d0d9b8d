//! The inspection of the packets whose flow a worker owns. This module prepares a packet, passes it to the inspectors,
//! and runs the effects that the inspectors queue.
//!
//! [`Inspection::packet`] drops a packet, or holds it as a [`HeldFrame`] until an effect forwards or drops it.

use std::sync::Arc;

use palisade_abi::{FlowCommand, Inspector, PuntHeader, PuntRequest, Reason, flow_op, punt_flags};
use palisade_inspect::{
    Millis, Sink as _,
    handover::HandedOver,
    record::{Record, Verdict, What},
};
use palisade_packet::Packet;

use crate::{
    checksum,
    context::WorkerControl,
    counters::Counters,
    effects::{Effect, Effects},
    header::{self, Prepared},
    held::{Handle, HeldFrame, HeldFrames},
    inspect::Inspect,
    port::Port,
    tx::Tx,
    watch,
};

/// Maximum number of records per second about packets that are dropped before an inspector sees them.
const MAX_REPORTS_PER_SECOND: u32 = 200;

/// The inspection stage of a worker: the engine, the frames that it holds, and the transmit side, which effects use.
pub(crate) struct Inspection<'a, P: Port, E: Inspect> {
    control: &'a mut watch::Receiver<WorkerControl<E::Rules>>,
    engine: E,
    held: HeldFrames<P::Frame>,
    effects: Effects,
    tx: Tx,
    /// Rate limit of records about refused packets.
    reports: RateLimit,
    counters: Arc<Counters>,
    /// Time of this turn, ns.
    now: u64,
}

impl<'a, P: Port, E: Inspect> Inspection<'a, P, E> {
    /// Creates the inspection around an engine. `frames`: number of frames of the socket.
    pub(crate) fn new(
        control: &'a mut watch::Receiver<WorkerControl<E::Rules>>,
        mut engine: E,
        frames: usize,
        effects: Effects,
        cookie: u64,
        counters: Arc<Counters>,
    ) -> Self {
        let (rules, xdp) = control.read(|control| {
            // A new engine has no state of deleted endpoints.
            control.gone.clear();
            (Arc::clone(&control.rules), Arc::clone(&control.xdp))
        });
        engine.set_rules(rules);
        Self {
            control,
            engine,
            held: HeldFrames::new(frames),
            effects,
            tx: Tx::new(cookie, xdp, Arc::clone(&counters)),
            reports: RateLimit::default(),
            counters,
            now: 0,
        }
    }

    /// Returns the engine.
    pub(crate) fn engine(&self) -> &E {
        &self.engine
    }

    /// Returns the number of held frames.
    pub(crate) fn held(&self) -> usize {
        self.held.len()
    }

    /// Starts a turn: applies changes of the control plane's settings.
    pub(crate) fn begin_turn(&mut self, port: &mut P, now: u64) {
        self.now = now;
        self.apply_control();
        self.run_effects(port);
    }

    /// Applies the control plane's settings if they have changed.
    fn apply_control(&mut self) {
        if !self.control.has_changed() {
            return;
        }
        let (rules, xdp, gone) = self.control.read(|control| {
            let gone = std::mem::take(&mut control.gone);
            (Arc::clone(&control.rules), Arc::clone(&control.xdp), gone)
        });
        self.tx.set_xdp(xdp);
        self.engine.set_rules(rules);
        for endpoint in gone {
            self.engine.forget_endpoint(endpoint, &mut self.effects);
        }
    }

    /// Inspects a packet of a flow that this worker owns.
    pub(crate) fn packet(&mut self, port: &mut P, mut frame: P::Frame, punted: &PuntHeader) {
        let length = port.data(&frame).len();
        let buffer = port.buffer_mut(&mut frame).get_mut(..length).unwrap_or_default();
        let prepared = match header::prepare(buffer, punted) {
            Ok(prepared) => prepared,
            Err((reason, packet)) => {
                self.refuse(punted, reason, reason.text(), &packet);
                port.free(frame);
                return;
            }
        };
        match header::normalise_options(buffer, &prepared) {
            Ok(changed) => self.counters.options_rewritten.add(u64::from(changed)),
            // In audit mode the inspector reports the packet and, if possible, forwards it.
            Err(_) if is_audit(punted) => {}
            Err(error) => {
                self.refuse(punted, Reason::TcpInvalid, error.text(), &prepared.packet);
                port.free(frame);
                return;
            }
        }
        let mut slots = punted.slots;
        if slots.iter().all(|slot| slot.endpoint != 0) {
            for slot in &mut slots {
                slot.flags |= punt_flags::SHARED;
            }
        }
        let mut slots = slots.iter().filter(|slot| slot.endpoint != 0);
        let Some(first) = slots.next() else {
            self.counters.count_drop(Reason::PuntForeign);
            port.free(frame);
            return;
        };
        let held = HeldFrame {
            start: prepared.start,
            length: length - prepared.start,
            transport: usize::from(prepared.packet.transport_offset),
            ifindex: punted.ifindex,
            hook: punted.hook,
            second: slots.next().copied(),
            first_command: None,
            frame,
        };
        match self.held.insert(held) {
            Ok(handle) => self.inspect(port, handle, first, &prepared),
            Err(held) => {
                // This cannot happen: the slab has room for every frame of the socket.
                self.counters.count_drop(Reason::WorkerOverload);
                port.free(held.frame);
            }
        }
        self.run_effects(port);
    }

    /// Passes a held packet to the inspector of a slot.
    fn inspect(&mut self, port: &mut P, handle: Handle, slot: &PuntRequest, prepared: &Prepared) {
        // The proxy, not a worker, reads an intercepted flow.
        let is_read = slot.inspector != Inspector::TlsTerminate as u8;
        if is_read && !self.engine.knows(slot.ruleset) {
            // The control plane sends rules to the workers before it writes the numbers of their rule sets to the maps.
            // So the rules for this packet have been sent, but possibly after this turn began.
            self.apply_control();
            if !self.engine.knows(slot.ruleset) {
                self.effects.discard(handle, Reason::UnknownRuleset);
                return;
            }
        }
        let Some(held) = self.held.get(&handle) else {
            return;
        };
        let (ifindex, hook) = (held.ifindex, held.hook);
        let packet = port.data(&held.frame).get(held.start..held.start + held.length);
        let Some(packet) = packet else {
            self.effects.discard(handle, Reason::PuntFailed);
            return;
        };
        let view = prepared.view(slot, ifindex, hook, packet);
        self.engine
            .packet(millis(self.now), &view, handle, &mut self.effects);
    }

    /// Runs the queued effects in their order.
    fn run_effects(&mut self, port: &mut P) {
        while let Some(effect) = self.effects.next() {
            match effect {
                Effect::Release(handle, command) => self.release(port, handle, command.as_ref()),
                Effect::LimitWindow(number, window) => {
                    if let Some(held) = self.held.numbered_mut(number) {
                        let at = held.start + held.transport;
                        let segment = port.buffer_mut(&mut held.frame).get_mut(at..);
                        checksum::limit_window(segment.unwrap_or_default(), window);
                    }
                }
                Effect::Discard(handle, reason) => {
                    if let Some(held) = self.held.remove(handle) {
                        self.counters.count_drop(reason);
                        port.free(held.frame);
                    }
                }
                Effect::Absorb(handle) => {
                    if let Some(held) = self.held.remove(handle) {
                        self.counters.absorbed.add(1);
                        port.free(held.frame);
                    }
                }
                Effect::Command(command) => self.tx.send_command(port, &command),
                Effect::Emit { start, length, route } => {
                    self.tx.emit(port, self.effects.generated(start, length), route);
                }
            }
        }
    }

    /// Passes a held packet on: from the first policy's inspector to the second policy's, if the policies of both
    /// endpoints inspect the packet (workload and node); otherwise out of the worker.
    fn release(&mut self, port: &mut P, handle: Handle, command: Option<&FlowCommand>) {
        let Some(held) = self.held.get_mut(&handle) else {
            return;
        };
        let Some(slot) = held.second.take() else {
            if let Some(held) = self.held.remove(handle) {
                self.tx.forward(port, held, command);
            }
            return;
        };
        // Each policy has a flow of its own. A command for the first policy's flow is sent now, because the second
        // inspector can hold the packet for long. `REPLACE` is sent with the packet, because the programs must drop the
        // packet if they cannot apply the command.
        match command {
            Some(command) if command.op == flow_op::REPLACE => held.first_command = Some(*command),
            Some(command) => self.tx.send_command(port, command),
            None => {}
        }
        let start = held.start;
        let packet = port
            .data(&held.frame)
            .get(start..start + held.length)
            .unwrap_or_default();
        match header::decode(packet) {
            Ok(packet) => self.inspect(port, handle, &slot, &Prepared { start, packet }),
            // This cannot happen: the same bytes were decoded for the first inspector.
            Err((reason, _)) => self.effects.discard(handle, reason),
        }
    }

    /// Counts the drop of a packet that no inspector sees, and queues a record of it unless the rate limit is exceeded.
    fn refuse(&mut self, punted: &PuntHeader, reason: Reason, detail: &'static str, packet: &Packet) {
        self.counters.count_drop(reason);
        let Some(slot) = punted.slots.iter().find(|slot| slot.endpoint != 0) else {
            return;
        };
        if self.reports.admit(self.now) {
            let record = unreadable(punted, slot, packet, reason, detail);
            self.effects.record(&record);
        }
    }

    /// Passes the results of commits of learned addresses to the engine, which decides about the DNS answers that it
    /// holds until their addresses are committed. Returns whether there was a result.
    pub(crate) fn take_commits(&mut self, port: &mut P) -> bool {
        let mut any = false;
        while let Some(learned) = self.effects.next_committed() {
            any = true;
            self.engine
                .committed(millis(self.now), learned, &mut self.effects);
            self.run_effects(port);
        }
        any
    }

    /// Calls [`Inspect::tick`] if a deadline has passed.
    pub(crate) fn expire(&mut self, port: &mut P) {
        let now = millis(self.now);
        if self.engine.deadline().is_some_and(|deadline| deadline <= now) {
            self.engine.tick(now, &mut self.effects);
            self.run_effects(port);
        }
    }

    /// Calls [`Inspect::settle`].
    pub(crate) fn settle(&mut self, port: &mut P) {
        self.engine.settle(millis(self.now), &mut self.effects);
        self.run_effects(port);
    }

    /// Returns what the engine hands over at a planned restart, and drops all held packets.
    pub(crate) fn hand_over(&mut self, port: &mut P) -> HandedOver {
        let handed_over = self.engine.hand_over(&mut self.effects);
        self.run_effects(port);
        handed_over
    }

    /// Returns the time until the engine's next deadline, ms.
    pub(crate) fn time_to_deadline(&self) -> Option<Millis> {
        let deadline = self.engine.deadline()?;
        Some(deadline.saturating_sub(millis(self.now)))
    }

    /// Wakes the readers of records and refreshes. See [`Effects::flush`].
    pub(crate) fn flush(&mut self) {
        self.effects.flush(self.now);
    }

    /// Returns whether records or refreshes wait for [`Inspection::flush`].
    pub(crate) fn has_unflushed(&self) -> bool {
        self.effects.has_unflushed()
    }

    /// Returns whether a result of a commit is waiting.
    pub(crate) fn has_committed(&self) -> bool {
        self.effects.has_committed()
    }
}

/// A limit of events per second.
#[derive(Debug, Default)]
struct RateLimit {
    /// Start of the current second, ns.
    since: u64,
    /// Events in the current second.
    count: u32,
}

impl RateLimit {
    /// Counts an event at time `now` and returns whether it is within the limit.
    fn admit(&mut self, now: u64) -> bool {
        if now.saturating_sub(self.since) >= 1_000_000_000 {
            *self = Self { since: now, count: 0 };
        }
        self.count = self.count.saturating_add(1);
        self.count <= MAX_REPORTS_PER_SECOND
    }
}

const fn millis(ns: u64) -> Millis {
    ns / 1_000_000
}

/// Returns whether every policy that requests inspection of the packet is in audit mode.
fn is_audit(punted: &PuntHeader) -> bool {
    punted
        .slots
        .iter()
        .filter(|slot| slot.endpoint != 0)
        .all(|slot| slot.flags & punt_flags::AUDIT != 0)
}

/// Returns the record of a packet that no inspector sees.
fn unreadable(
    punted: &PuntHeader,
    slot: &PuntRequest,
    packet: &Packet,
    reason: Reason,
    detail: &'static str,
) -> Record {
    Record {
        endpoint: slot.endpoint,
        ingress: slot.flags & punt_flags::INGRESS != 0,
        reply: slot.flags & punt_flags::REPLY != 0,
        source: (packet.source, packet.source_port),
        destination: (packet.destination, packet.destination_port),
        protocol: packet.protocol,
        remote_identity: slot.remote_identity,
        ifindex: punted.ifindex,
        verdict: Verdict::Dropped,
        reason,
        rule: slot.rule,
        latency: None,
        what: What::Unreadable { detail },
    }
}
