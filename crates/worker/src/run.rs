//! The loop of one worker.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant, SystemTime},
};

use mio::{Events, Interest, Token, unix::SourceFd};
use palisade_abi::{Carried, CarrySlot, FlowCommand, Reason, Released, carry_flags, order, release};
use palisade_inspect::{
    Learn, Millis, Route, Sink,
    learning::{Learner, Wake},
    record::{Record, Verdict, What},
};
use palisade_packet::Packet;

use crate::{
    context::{Stamped, WorkerContext},
    counters::Counters,
    fair::Fair,
    header::{self, Ready},
    idle::{self, Idle, Pending},
    inspect::Inspect,
    port::{Port, PortStatistics},
    queue,
    slab::{Handle, Slab},
};

/// Packets that are taken from the ring at once.
const BATCH: usize = 64;
/// Packets of other workers that are taken at once.
const HANDED: usize = 64;
/// Packets that an engine may make in one go, in bytes.
const MADE: usize = 256 * 1024;
/// Whether packets can still come is looked at so often, ns.
const CHECK: u64 = 50_000_000;
/// What the rings have lost is read so often, ns.
const STATISTICS: u64 = 1_000_000_000;
/// Reports of packets that the worker itself refuses, a second.
const REPORTS: u32 = 200;

const SOCKET: Token = Token(0);

/// What is known of a frame that a handle stands for.
struct Caught<F> {
    frame: F,
    start: usize,
    length: usize,
    ifindex: u32,
    hook: u8,
    /// Who else asks for it to be read, once the first lets it go.
    second: Option<CarrySlot>,
    /// What the first has ordered, if the packet must not go on without it.
    first_command: Option<FlowCommand>,
}

/// What an engine wants done, in its order.
enum Wish {
    Release(Handle, Option<FlowCommand>),
    Discard(Handle, Reason),
    /// Its bytes go on in packets that are made.
    Absorb(Handle),
    Command(FlowCommand),
    /// So many bytes of those that were made, from there.
    Emit(usize, usize, Route),
}

/// Takes down what an engine wants while it still looks at a frame.
struct Wishes {
    wishes: VecDeque<Wish>,
    made: Vec<u8>,
    learner: Learner,
    records: queue::Sender<Stamped>,
    counters: Arc<Counters>,
}

impl Sink<Handle> for Wishes {
    fn release(&mut self, frame: Handle) {
        self.wishes.push_back(Wish::Release(frame, None));
    }

    fn release_with(&mut self, frame: Handle, command: &FlowCommand) {
        self.wishes.push_back(Wish::Release(frame, Some(*command)));
    }

    fn command(&mut self, command: &FlowCommand) {
        self.wishes.push_back(Wish::Command(*command));
    }

    fn absorb(&mut self, frame: Handle) {
        self.wishes.push_back(Wish::Absorb(frame));
    }

    fn discard(&mut self, frame: Handle, reason: Reason) {
        self.wishes.push_back(Wish::Discard(frame, reason));
    }

    fn emit(&mut self, frame: &[u8], route: Route) {
        if self.made.len() + frame.len() > MADE || frame.len() < header::ETHERNET {
            self.counters.unmade.add(1);
            return;
        }
        let at = self.made.len();
        self.made.extend_from_slice(frame);
        self.wishes.push_back(Wish::Emit(at, frame.len(), route));
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
        // By the precise clock, as the programs stamp their events: an effect must not seem to be before its cause.
        if self.records.put((SystemTime::now(), *record)).is_err() {
            self.counters.records_lost.add(1);
        }
    }
}

/// One life of a worker.
pub struct Worker<'a, P: Port, E: Inspect> {
    context: &'a mut WorkerContext<E::Rules>,
    port: P,
    engine: E,
    slab: Slab<Caught<P::Frame>>,
    wishes: Wishes,
    batch: VecDeque<P::Frame>,
    fair: Fair,
    shed: Vec<bool>,
    xdp: Arc<[u32]>,
    /// ns of the coarse monotonic clock.
    now: u64,
    statistics: (u64, PortStatistics),
    /// When it was last looked whether packets can come.
    checked: u64,
    /// What the engine had counted when that was looked at last.
    counted: Vec<u64>,
    reports: (u64, u32),
    handed: Vec<bool>,
    /// When who reads the records was woken.
    told: u64,
    /// When who keeps what was learned was told of answers that teach nothing new.
    retold: u64,
    /// The kernel has not taken all that is to be sent.
    unsent: bool,
    started: Instant,
    events: Events,
}

impl<'a, P: Port, E: Inspect> Worker<'a, P, E> {
    pub fn new(context: &'a mut WorkerContext<E::Rules>, port: P, mut engine: E, frames: usize) -> Self {
        let (rules, xdp) = context.control.read(|control| {
            control.gone.clear();
            (Arc::clone(&control.rules), Arc::clone(&control.xdp))
        });
        engine.set_rules(rules);
        let waker = Arc::clone(&context.wakers[context.number]);
        let wake: Wake = Arc::new(move || {
            // Woken late, it finds the answer all the same.
            let _ = waker.wake();
        });
        let wishes = Wishes {
            wishes: VecDeque::with_capacity(frames),
            made: Vec::with_capacity(MADE),
            learner: context.learners.learner(context.learns, wake),
            records: context.records.clone(),
            counters: Arc::clone(&context.counters),
        };
        context.counters.frames.set(frames as u64);
        let mut counted = Vec::new();
        context.counters.set_numbers(&engine, &mut counted);
        let now = (context.clock)();
        Self {
            handed: vec![false; context.workers],
            unsent: false,
            started: Instant::now(),
            events: Events::with_capacity(8),
            slab: Slab::new(frames),
            batch: VecDeque::with_capacity(BATCH.max(port.rx_capacity())),
            fair: Fair::new(BATCH),
            shed: Vec::with_capacity(BATCH),
            statistics: (now, PortStatistics::default()),
            checked: 0,
            counted,
            reports: (now, REPORTS),
            told: now,
            retold: now,
            now,
            context,
            port,
            engine,
            wishes,
            xdp,
        }
    }

    fn millis(&self) -> Millis {
        self.now / 1_000_000
    }

    /// Everything that there is to do now. Answers whether there was something.
    pub fn turn(&mut self) -> io::Result<bool> {
        self.now = (self.context.clock)();
        // Before the sign of life: what the programs send to a socket that gets nothing would be lost without a reason.
        if self.now.saturating_sub(self.checked) >= CHECK {
            self.port.check()?;
            self.checked = self.now;
        }
        (self.context.heartbeat)(self.context.number, self.now);
        self.apply_control();
        self.fulfil();
        let mut busy = self.port.receive(&mut self.batch, BATCH)? != 0;
        let overloaded = self.port.rx_available() + self.batch.len() > self.port.rx_capacity() / 2;
        self.fair.at(self.now);
        if overloaded {
            self.shed();
        }
        while let Some(frame) = self.batch.pop_front() {
            self.received(frame);
        }
        busy |= self.take_handed();
        busy |= self.take_learned();
        let now = self.millis();
        if self.engine.deadline().is_some_and(|deadline| deadline <= now) {
            self.engine.tick(now, &mut self.wishes);
            self.fulfil();
        }
        self.unsent = self.port.flush()? != 0;
        self.wake_others();
        let counters = &self.context.counters;
        counters.held.set(self.slab.len() as u64);
        if self.now.saturating_sub(self.statistics.0) >= STATISTICS {
            let now = self.port.statistics()?;
            counters.set_ring(&self.statistics.1, &now);
            counters.flows.set(self.engine.flows());
            counters.set_numbers(&self.engine, &mut self.counted);
            self.statistics = (self.now, now);
        }
        Ok(busy)
    }

    fn apply_control(&mut self) {
        if !self.context.control.has_changed() {
            return;
        }
        let (rules, xdp, gone) = self.context.control.read(|control| {
            let gone = std::mem::take(&mut control.gone);
            (Arc::clone(&control.rules), Arc::clone(&control.xdp), gone)
        });
        self.xdp = xdp;
        self.engine.set_rules(rules);
        for endpoint in gone {
            self.engine.forget_endpoint(endpoint, &mut self.wishes);
        }
    }

    /// Gives half of what has come to nobody, fairly between flows. That is quick, so the queue gets shorter.
    fn shed(&mut self) {
        let Self {
            port,
            batch,
            fair,
            shed,
            ..
        } = self;
        shed.clear();
        shed.resize(batch.len(), false);
        fair.halve(
            batch.iter().map(|frame| header::hash(port.data(frame))),
            |place| {
                shed[place] = true;
            },
        );
        for refused in shed.iter() {
            let Some(frame) = batch.pop_front() else { break };
            if *refused {
                self.context.counters.packets_in.add(1);
                self.context.counters.dropped(Reason::WorkerOverload);
                port.free(frame);
            } else {
                batch.push_back(frame);
            }
        }
    }

    /// A frame that came in by this worker's queue.
    fn received(&mut self, frame: P::Frame) {
        let data = self.port.data(&frame);
        let counters = &self.context.counters;
        counters.packets_in.add(1);
        counters
            .bytes_in
            .add(data.len().saturating_sub(header::CARRIED) as u64);
        let carried = match header::carried(data, self.context.cookie) {
            Ok(carried) => carried,
            Err(reason) => {
                counters.dropped(reason);
                self.port.free(frame);
                return;
            }
        };
        let owner = carried.hash as usize % self.context.workers;
        if owner != self.context.number {
            let given = self.context.handoff_senders[owner]
                .as_mut()
                .is_some_and(|sender| sender.send((), data).is_ok());
            if given {
                counters.handed_on.add(1);
                self.handed[owner] = true;
            } else {
                counters.dropped(Reason::WorkerOverload);
            }
            self.port.free(frame);
            return;
        }
        self.own(frame, &carried);
    }

    /// A frame of a flow that this worker owns.
    fn own(&mut self, mut frame: P::Frame, carried: &Carried) {
        let length = self.port.data(&frame).len();
        let room = self.port.buffer_mut(&mut frame);
        let ready = match header::prepare(&mut room[..length], carried) {
            Ok(ready) => ready,
            Err((reason, packet)) => {
                self.refuse(carried, reason, reason.text(), &packet);
                self.port.free(frame);
                return;
            }
        };
        match header::normalise(&mut room[..length], &ready) {
            Ok(mended) => self.context.counters.mended.add(u64::from(mended)),
            // In audit mode the engine says what would become of it, and lets it pass if it can.
            Err(_) if is_audit(carried) => {}
            Err(problem) => {
                self.refuse(carried, Reason::TcpInvalid, problem.text(), &ready.packet);
                self.port.free(frame);
                return;
            }
        }
        let mut slots = carried.slots;
        if slots.iter().all(|slot| slot.endpoint != 0) {
            for slot in &mut slots {
                slot.flags |= carry_flags::SHARED;
            }
        }
        let mut slots = slots.iter().filter(|slot| slot.endpoint != 0);
        let Some(first) = slots.next() else {
            self.context.counters.dropped(Reason::CarryForeign);
            self.port.free(frame);
            return;
        };
        let caught = Caught {
            start: ready.start,
            length: length - ready.start,
            ifindex: carried.ifindex,
            hook: carried.hook,
            second: slots.next().copied(),
            first_command: None,
            frame,
        };
        match self.slab.insert(caught) {
            Ok(handle) => self.read(handle, first, &ready),
            Err(caught) => {
                // There is a place for every frame that the socket has.
                self.context.counters.dropped(Reason::WorkerOverload);
                self.port.free(caught.frame);
            }
        }
        self.fulfil();
    }

    /// Has the engine read a frame for a slot.
    fn read(&mut self, handle: Handle, slot: &CarrySlot, ready: &Ready) {
        if !self.engine.knows(slot.ruleset) {
            // Rules come before the maps that name them, so they are here already; just not read.
            self.apply_control();
            if !self.engine.knows(slot.ruleset) {
                self.wishes.discard(handle, Reason::UnknownRuleset);
                return;
            }
        }
        let Some(caught) = self.slab.get(&handle) else {
            return;
        };
        let (ifindex, hook) = (caught.ifindex, caught.hook);
        let Some(frame) = self
            .port
            .data(&caught.frame)
            .get(caught.start..caught.start + caught.length)
        else {
            self.wishes.discard(handle, Reason::CarryFailed);
            return;
        };
        let view = ready.view(slot, ifindex, hook, frame);
        self.engine
            .packet(self.now / 1_000_000, &view, handle, &mut self.wishes);
    }

    /// Does what the engine wanted.
    fn fulfil(&mut self) {
        while let Some(wish) = self.wishes.wishes.pop_front() {
            match wish {
                Wish::Release(handle, command) => self.release(handle, command.as_ref()),
                Wish::Discard(handle, reason) => {
                    if let Some(caught) = self.slab.remove(handle) {
                        self.context.counters.dropped(reason);
                        self.port.free(caught.frame);
                    }
                }
                Wish::Command(command) => self.command(&command),
                Wish::Absorb(handle) => {
                    if let Some(caught) = self.slab.remove(handle) {
                        self.context.counters.absorbed.add(1);
                        self.port.free(caught.frame);
                    }
                }
                Wish::Emit(at, length, route) => self.emit(at, length, route),
            }
        }
        self.wishes.made.clear();
    }

    fn release(&mut self, handle: Handle, command: Option<&FlowCommand>) {
        let second = match self.slab.get_mut(&handle) {
            Some(caught) => caught.second.take(),
            None => return,
        };
        if let Some(slot) = second {
            // Each of the two has its own flow. A command goes ahead, since the second may hold the
            // packet; but one without which the packet must not go on stays with it.
            match command {
                Some(command) if command.order == order::REPLACE => {
                    if let Some(caught) = self.slab.get_mut(&handle) {
                        caught.first_command = Some(*command);
                    }
                }
                Some(command) => self.command(command),
                None => {}
            }
            let Some(caught) = self.slab.get(&handle) else {
                return;
            };
            let start = caught.start;
            let frame = self
                .port
                .data(&caught.frame)
                .get(start..start + caught.length)
                .unwrap_or_default();
            match header::decode(frame) {
                Ok(packet) => self.read(handle, &slot, &Ready { start, packet }),
                // It could be decoded before.
                Err((reason, _)) => self.wishes.discard(handle, reason),
            }
            return;
        }
        let Some(caught) = self.slab.remove(handle) else {
            return;
        };
        let route = Route {
            ifindex: caught.ifindex,
            hook: caught.hook,
            back: false,
        };
        let released = self.released(route);
        let length = caught.length as u64;
        let commands = [command, caught.first_command.as_ref()];
        if self.send(caught.frame, caught.start, caught.length, &released, commands) {
            self.context.counters.packets_out.add(1);
            self.context.counters.bytes_out.add(length);
        }
    }

    fn released(&self, route: Route) -> Released {
        header::released(self.context.cookie, route, self.xdp.contains(&route.ifindex))
    }

    /// Sends a frame with what belongs behind it.
    fn send(
        &mut self,
        mut frame: P::Frame,
        mut start: usize,
        length: usize,
        released: &Released,
        commands: [Option<&FlowCommand>; 2],
    ) -> bool {
        let room = self.port.buffer_mut(&mut frame);
        if room.len() - start < length + header::TRAILER && start > 0 {
            // What stood in front of it has been read: there is room.
            room.copy_within(start..start + length, 0);
            start = 0;
        }
        let Some(whole) = header::append(&mut room[start..], length, released, commands) else {
            self.context.counters.dropped(Reason::CarryUnsupported);
            self.port.free(frame);
            return false;
        };
        match self.port.transmit(frame, start, whole) {
            Ok(()) => true,
            Err(frame) => {
                self.context.counters.dropped(Reason::WorkerOverload);
                self.port.free(frame);
                false
            }
        }
    }

    fn emit(&mut self, at: usize, length: usize, route: Route) {
        let released = self.released(route);
        let Some(mut frame) = self.port.alloc() else {
            self.context.counters.unmade.add(1);
            return;
        };
        let room = self.port.buffer_mut(&mut frame);
        let made = self.wishes.made.get(at..at + length);
        let sent = match (room.get_mut(..length), made) {
            (Some(room), Some(made)) => {
                room.copy_from_slice(made);
                self.send(frame, 0, length, &released, [None; 2])
            }
            _ => {
                self.port.free(frame);
                false
            }
        };
        let counters = &self.context.counters;
        if sent {
            counters.made.add(1);
        } else {
            counters.unmade.add(1);
        }
    }

    /// Sends a command that no packet carries.
    fn command(&mut self, command: &FlowCommand) {
        let released = Released {
            cookie: self.context.cookie,
            ifindex: 0,
            way: release::NOWHERE,
            flags: 0,
            zero: [0; 2],
        };
        // Without a free frame the flow goes on being read, which is slower and no worse.
        if let Some(mut frame) = self.port.alloc() {
            if let Some(head) = self.port.buffer_mut(&mut frame).get_mut(..header::ETHERNET) {
                head.fill(0);
            }
            self.send(frame, 0, header::ETHERNET, &released, [Some(command), None]);
        }
    }

    /// A packet that no engine gets to see.
    fn refuse(&mut self, carried: &Carried, reason: Reason, detail: &'static str, packet: &Packet) {
        self.context.counters.dropped(reason);
        if self.now.saturating_sub(self.reports.0) >= 1_000_000_000 {
            self.reports = (self.now, REPORTS);
        }
        if self.reports.1 == 0 {
            return;
        }
        self.reports.1 -= 1;
        let Some(slot) = carried.slots.iter().find(|slot| slot.endpoint != 0) else {
            return;
        };
        let record = unreadable(carried, slot, packet, reason, detail);
        self.wishes.record(&record);
    }

    fn take_handed(&mut self) -> bool {
        let mut any = false;
        for number in 0..self.context.workers {
            for _ in 0..HANDED {
                let Self { context, port, .. } = self;
                let Some(receiver) = &mut context.handoff_receivers[number] else {
                    break;
                };
                let taken = receiver.receive(|(), bytes| {
                    port.alloc().and_then(|mut frame| {
                        match port.buffer_mut(&mut frame).get_mut(..bytes.len()) {
                            Some(room) => {
                                room.copy_from_slice(bytes);
                                Some((frame, bytes.len()))
                            }
                            None => {
                                port.free(frame);
                                None
                            }
                        }
                    })
                });
                let Some(taken) = taken else { break };
                any = true;
                let Some((frame, length)) = taken else {
                    self.context.counters.dropped(Reason::WorkerOverload);
                    continue;
                };
                self.context.counters.handed_in.add(1);
                self.own_handed(frame, length);
            }
        }
        any
    }

    fn own_handed(&mut self, mut frame: P::Frame, length: usize) {
        self.port.set_length(&mut frame, length);
        let data = self.port.data(&frame);
        // The worker that handed it on has looked at it; the cookie is the same.
        match header::carried(data, self.context.cookie) {
            Ok(carried) => self.own(frame, &carried),
            Err(reason) => {
                self.context.counters.dropped(reason);
                self.port.free(frame);
            }
        }
    }

    fn take_learned(&mut self) -> bool {
        let mut any = false;
        while let Some(learned) = self.wishes.learner.take() {
            any = true;
            let now = self.now / 1_000_000;
            self.engine.learned(now, learned, &mut self.wishes);
            self.fulfil();
        }
        any
    }

    fn wake_others(&mut self) {
        // Not for each packet: that costs a system call, and the reader would want a processor in the very moment in
        // which the packet's receiver does. Once a tick of the coarse clock is enough.
        let Wishes { records, learner, .. } = &mut self.wishes;
        if records.pending() && (self.now != self.told || records.crowded()) {
            records.wake();
            self.told = self.now;
        }
        if learner.has_to_tell() && self.now != self.retold {
            learner.flush();
            self.retold = self.now;
        }
        for (handed, waker) in self.handed.iter_mut().zip(&self.context.wakers) {
            if std::mem::take(handed) {
                // It looks by itself soon, if this should fail.
                let _ = waker.wake();
            }
        }
    }

    /// Carries packets until it is told to stop.
    pub fn run(&mut self) -> io::Result<()> {
        let fd = self.port.fd();
        if let Some(fd) = fd {
            self.context
                .poll
                .registry()
                .register(&mut SourceFd(&fd), SOCKET, Interest::READABLE)?;
        }
        let outcome = self.run_turns();
        if let Some(fd) = fd {
            // Its descriptor is closed with the socket in any case.
            let _ = self.context.poll.registry().deregister(&mut SourceFd(&fd));
        }
        outcome
    }

    fn run_turns(&mut self) -> io::Result<()> {
        let mut idle = Idle::new(self.context.mode);
        while !self.context.stop.load(Ordering::Relaxed) {
            if !self.turn()? {
                idle.wait(self)?;
            }
        }
        Ok(())
    }
}

impl<P: Port, E: Inspect> idle::Host for Worker<'_, P, E> {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn has_work(&mut self) -> bool {
        let mut receivers = self.context.handoff_receivers.iter_mut().flatten();
        self.port.rx_available() != 0
            || self.wishes.learner.is_answered()
            || receivers.any(|receiver| receiver.available() != 0)
    }

    fn pause(&mut self) {
        std::hint::spin_loop();
    }

    fn yield_now(&mut self) {
        thread::yield_now();
    }

    fn busy_poll(&mut self) -> io::Result<bool> {
        self.port.busy_poll()?;
        self.turn()
    }

    fn sleep(&mut self) -> io::Result<()> {
        let deadline = self.engine.deadline();
        let timeout = idle::sleep_timeout(&Pending {
            unsent: self.unsent,
            unflushed: self.wishes.records.pending() || self.wishes.learner.has_to_tell(),
            deadline: deadline.map(|deadline| Duration::from_millis(deadline.saturating_sub(self.millis()))),
        });
        self.context.counters.sleeps.add(1);
        match self.context.poll.poll(&mut self.events, Some(timeout)) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }
}

/// Whether every policy that asks for the packet to be read is in audit mode.
fn is_audit(carried: &Carried) -> bool {
    carried
        .slots
        .iter()
        .filter(|slot| slot.endpoint != 0)
        .all(|slot| slot.flags & carry_flags::AUDIT != 0)
}

/// The report of a packet that no engine gets to see.
fn unreadable(
    carried: &Carried,
    slot: &CarrySlot,
    packet: &Packet,
    reason: Reason,
    detail: &'static str,
) -> Record {
    Record {
        endpoint: slot.endpoint,
        ingress: slot.flags & carry_flags::INGRESS != 0,
        reply: slot.flags & carry_flags::REPLY != 0,
        source: (packet.source, packet.source_port),
        destination: (packet.destination, packet.destination_port),
        protocol: packet.protocol,
        remote_identity: slot.remote_identity,
        ifindex: carried.ifindex,
        verdict: Verdict::Dropped,
        reason,
        rule: slot.rule,
        latency: None,
        what: What::Unreadable { detail },
    }
}

#[cfg(test)]
mod tests;
