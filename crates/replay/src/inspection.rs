//! The inspectors: the engine of the workers over the packets that the path punts.
//!
//! Checksums, TCP options and payload are prepared by the functions of the workers (`palisade_worker::header`).

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    hash::{BuildHasher as _, Hash as _, Hasher as _},
    sync::Arc,
};

use foldhash::fast::RandomState;
use palisade_abi::{
    Addr, FlowCommand, Inspector, PuntHeader, PuntRequest, Reason, protocol, punt_flags, tcp_flags,
};
use palisade_inspect::{
    CommitRequest, CommitResult, Engine, Limits, Millis, PacketView, Route, Rules, Sink, SniAddressIndex,
    record::{Record, Verdict, What},
};
use palisade_model::snapshot::RuleSet;
use palisade_packet::{Packet, Start, decode, flags};
use palisade_worker::header::{self, PUNT_HEADER, Prepared};
use slab::Slab;

use crate::capture::{Frame, Network};

/// Maximum number of generated packets that are kept until the capture shows them.
const MAX_GENERATED: usize = 65_536;
/// Maximum number of connections that are kept as not inspected.
const MAX_UNDECIDED: usize = 1 << 20;

/// Rule sets by number.
pub type RuleSets = BTreeMap<u32, Arc<RuleSet>>;
/// Prepares the rule sets of a snapshot for the engine. The second argument is the previous result.
pub type Prepare = Box<dyn Fn(&RuleSets, Option<&Rules>) -> Rules>;

/// A flow without its direction.
type Ends = ((Addr, u16), (Addr, u16), u8);

/// A frame that the engine holds.
#[derive(Debug)]
struct Held {
    /// The request of the second policy, and the frame; `None` if only one policy inspects the packet.
    second: Option<(PuntRequest, Vec<u8>)>,
    ifindex: u32,
    hook: u8,
}

/// An effect that the engine has requested.
#[derive(Debug)]
enum Effect {
    Release(usize, Option<FlowCommand>),
    Discard(usize, Reason),
    Absorb(usize),
    Command(FlowCommand),
    Commit(CommitRequest),
}

/// Collects what the engine requests.
#[derive(Debug, Default)]
struct Effects {
    queue: VecDeque<Effect>,
    records: Vec<Record>,
    generated: Generated,
    epoch: u64,
}

/// The packets that the engine has built. If the capture was made while Palisade enforced, it contains them too, and
/// they must not be inspected as packets of the server or client.
#[derive(Debug, Default)]
struct Generated {
    hasher: RandomState,
    known: HashSet<u64, RandomState>,
    order: VecDeque<u64>,
    /// Number of packets that the engine has built.
    built: u64,
}

impl Generated {
    /// Returns a hash of flow, flags, payload and, for TCP, sequence number. Without the sequence number, a segment of
    /// the server with the bytes of a refusal would be taken for the refusal.
    fn hash(&self, frame: &[u8], packet: &Packet, payload: &[u8]) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        packet.source.hash(&mut hasher);
        packet.destination.hash(&mut hasher);
        (packet.source_port, packet.destination_port, packet.protocol).hash(&mut hasher);
        (packet.tcp_flags & (tcp_flags::SYN | tcp_flags::FIN | tcp_flags::RST)).hash(&mut hasher);
        if packet.protocol == protocol::TCP {
            sequence(frame, packet).hash(&mut hasher);
        }
        payload.hash(&mut hasher);
        hasher.finish()
    }

    fn remember(&mut self, frame: &[u8]) {
        self.built += 1;
        let mut packet = Packet::default();
        if decode(frame, Start::Ethernet { tags_removed: 0 }, &mut packet).is_err() {
            return;
        }
        let payload = payload(frame, &packet);
        // A bare acknowledgment looks like any other acknowledgment of the connection.
        let is_bare = payload.is_empty() && packet.tcp_flags & (tcp_flags::RST | tcp_flags::FIN) == 0;
        let hash = self.hash(frame, &packet, payload);
        if !is_bare && self.known.insert(hash) {
            self.order.push_back(hash);
            if self.order.len() > MAX_GENERATED
                && let Some(oldest) = self.order.pop_front()
            {
                self.known.remove(&oldest);
            }
        }
    }

    fn contains(&self, frame: &[u8], packet: &Packet) -> bool {
        !self.known.is_empty()
            && self
                .known
                .contains(&self.hash(frame, packet, payload(frame, packet)))
    }
}

/// Returns the sequence number of a TCP segment; `None` if the frame ends before it.
fn sequence(frame: &[u8], packet: &Packet) -> Option<u32> {
    let at = usize::from(packet.transport_offset) + 4;
    frame
        .get(at..)?
        .first_chunk()
        .map(|bytes| u32::from_be_bytes(*bytes))
}

/// Returns the frame without the bytes after the end of its IP packet. The limits of the engine do not count these
/// bytes, and a file can have many of them behind each packet.
fn trimmed<'a>(frame: &'a [u8], packet: &Packet) -> &'a [u8] {
    let length = usize::try_from(packet.length).unwrap_or(usize::MAX);
    let end = usize::from(packet.network_offset).saturating_add(length);
    frame.get(..end).unwrap_or(frame)
}

fn payload<'a>(frame: &'a [u8], packet: &Packet) -> &'a [u8] {
    let slot = PuntRequest::default();
    let prepared = Prepared {
        start: 0,
        packet: *packet,
    };
    let (from, to) = prepared.view(&slot, 0, 0, frame).payload;
    frame.get(from..to).unwrap_or_default()
}

impl Sink<usize> for Effects {
    fn release(&mut self, frame: usize) {
        self.queue.push_back(Effect::Release(frame, None));
    }

    fn release_with(&mut self, frame: usize, command: &FlowCommand) {
        self.queue.push_back(Effect::Release(frame, Some(*command)));
    }

    fn command(&mut self, command: &FlowCommand) {
        self.queue.push_back(Effect::Command(*command));
    }

    fn absorb(&mut self, frame: usize) {
        self.queue.push_back(Effect::Absorb(frame));
    }

    fn discard(&mut self, frame: usize, reason: Reason) {
        self.queue.push_back(Effect::Discard(frame, reason));
    }

    fn emit(&mut self, frame: &[u8], _route: Route) {
        self.generated.remember(frame);
    }

    fn commit(&mut self, learn: CommitRequest) -> Result<(), CommitRequest> {
        self.queue.push_back(Effect::Commit(learn));
        Ok(())
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn record(&mut self, record: &Record) {
        self.records.push(*record);
    }
}

/// Counters of the inspection.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Inspected {
    /// Packets that inspectors got.
    pub packets: u64,
    /// Packets of intercepted connections: what is inside TLS is not in the capture.
    pub intercepted: u64,
    /// Packets of connections that begin before the capture.
    pub midstream: u64,
    /// Packets that the capture has truncated.
    pub truncated: u64,
    /// Further packets of connections that are not inspected any more.
    pub undecided: u64,
    /// Connections that are not inspected any more, because they begin before the capture or a packet is truncated.
    pub undecided_flows: u64,
    /// Packets of the capture that Palisade itself has sent, such as refusals.
    pub generated: u64,
    /// Packets that inspectors drop, by reason.
    pub drops: BTreeMap<Reason, u64>,
}

impl Inspected {
    fn drop(&mut self, reason: Reason) {
        *self.drops.entry(reason).or_default() += 1;
    }
}

/// What the inspection needs from the rest of the replay.
pub(crate) trait Surroundings {
    /// Applies a flow command to the path.
    fn apply(&mut self, command: &FlowCommand);
    /// Learns the addresses of an answer.
    fn learn(&mut self, request: CommitRequest) -> CommitResult;
    /// Returns the rule sets if learning has changed them since the last call.
    fn changed_rulesets(&mut self) -> Option<Arc<RuleSets>>;
    /// Returns the number of the lease epoch.
    fn epoch(&self) -> u64;
    /// Reports a record.
    fn record(&mut self, record: &Record);
}

/// A punted packet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Punted<'a> {
    pub frame: Frame<'a>,
    pub headers: &'a Packet,
    pub requests: &'a [PuntRequest],
    pub ifindex: u32,
    pub hook: u8,
    pub now: Millis,
}

/// The inspection stage.
pub(crate) struct Inspection {
    engine: Engine<usize>,
    prepare: Prepare,
    rules: Arc<Rules>,
    effects: Effects,
    held: Slab<Held>,
    /// Reused memory of a frame with room for a punt header.
    buffer: Vec<u8>,
    /// Connections that are not inspected any more, and their order.
    undecided: HashSet<Ends, RandomState>,
    undecided_order: VecDeque<Ends>,
    deadline: Millis,
    pub counts: Inspected,
}

impl Inspection {
    pub(crate) fn new(
        limits: &Limits,
        prepare: Prepare,
        rulesets: &RuleSets,
        sni_index: Option<Arc<SniAddressIndex>>,
    ) -> Self {
        let mut limits = limits.clone();
        for tcp in [
            &mut limits.dns.tcp,
            &mut limits.http.tcp,
            &mut limits.tls.tcp,
            &mut limits.kafka.tcp,
        ] {
            tcp.of_capture = true;
        }
        let mut engine = Engine::new(&limits);
        let rules = Arc::new(prepare(rulesets, None));
        engine.set_rules(Arc::clone(&rules));
        if let Some(index) = sni_index {
            engine.verify_server_names(index);
        }
        Self {
            engine,
            prepare,
            rules,
            effects: Effects::default(),
            held: Slab::new(),
            buffer: Vec::new(),
            undecided: HashSet::default(),
            undecided_order: VecDeque::new(),
            deadline: Millis::MAX,
            counts: Inspected::default(),
        }
    }

    /// Inspects a packet.
    pub(crate) fn packet(&mut self, punted: &Punted<'_>, around: &mut impl Surroundings) {
        let packet = punted.headers;
        let ends = ends(
            (packet.source, packet.source_port),
            (packet.destination, packet.destination_port),
            packet.protocol,
        );
        if punted
            .requests
            .iter()
            .any(|request| request.inspector == Inspector::TlsTerminate as u8)
        {
            self.counts.intercepted += 1;
            return;
        }
        if punted
            .requests
            .iter()
            .any(|request| request.flags & punt_flags::MIDSTREAM != 0)
        {
            self.counts.midstream += 1;
            self.give_up(ends);
            return;
        }
        if self.undecided.contains(&ends) {
            if opens(packet) {
                self.undecided.remove(&ends);
            } else {
                self.counts.undecided += 1;
                return;
            }
        }
        if punted.frame.is_truncated() {
            self.counts.truncated += 1;
            self.give_up(ends);
            return;
        }
        self.fill_buffer(&punted.frame, packet);
        let slots = slots(punted.requests);
        let header = PuntHeader {
            ifindex: punted.ifindex,
            hook: punted.hook,
            slots,
            ..PuntHeader::default()
        };
        let prepared = match header::prepare(&mut self.buffer, &header) {
            Ok(prepared) => prepared,
            Err((reason, packet)) => return self.refuse(punted, &packet, reason, reason.text(), around),
        };
        let is_generated = {
            let frame = self.buffer.get(prepared.start..).unwrap_or_default();
            self.effects.generated.contains(frame, &prepared.packet)
        };
        if is_generated {
            self.counts.generated += 1;
            return;
        }
        let is_audit = punted
            .requests
            .iter()
            .all(|request| request.flags & punt_flags::AUDIT != 0);
        if let Err(error) = header::normalise_options(&mut self.buffer, &prepared)
            && !is_audit
        {
            return self.refuse(punted, &prepared.packet, Reason::TcpInvalid, error.text(), around);
        }
        self.counts.packets += 1;
        let [first, second] = slots;
        let frame = self.buffer.get(prepared.start..).unwrap_or_default();
        let handle = self.held.insert(Held {
            second: (second.endpoint != 0).then(|| (second, trimmed(frame, &prepared.packet).to_vec())),
            ifindex: punted.ifindex,
            hook: punted.hook,
        });
        self.effects.epoch = around.epoch();
        let view = prepared.view(&first, punted.ifindex, punted.hook, frame);
        inspect(&mut self.engine, &mut self.effects, punted.now, &view, handle);
        self.run_effects(punted.now, around);
    }

    /// Handles the timeouts that are due.
    pub(crate) fn tick(&mut self, now: Millis, around: &mut impl Surroundings) {
        if self.deadline > now {
            return;
        }
        self.effects.epoch = around.epoch();
        self.engine.tick(now, &mut self.effects);
        self.run_effects(now, around);
    }

    /// Returns the number of packets that the engine still holds.
    pub(crate) fn held(&self) -> usize {
        self.held.len()
    }

    /// Returns the number of packets that the engine has built.
    pub(crate) const fn built(&self) -> u64 {
        self.effects.generated.built
    }

    /// Copies a frame behind room for a punt header, with an Ethernet header if the capture does not contain one.
    fn fill_buffer(&mut self, frame: &Frame<'_>, packet: &Packet) {
        self.buffer.clear();
        self.buffer.resize(PUNT_HEADER, 0);
        if frame.network != Network::Ethernet {
            self.buffer.extend_from_slice(&[0; 12]);
            self.buffer.extend_from_slice(&packet.ether_type.to_be_bytes());
        }
        self.buffer.extend_from_slice(frame.data);
    }

    /// Marks a connection as not inspected from here on.
    fn give_up(&mut self, ends: Ends) {
        if self.undecided.insert(ends) {
            self.counts.undecided_flows += 1;
            self.undecided_order.push_back(ends);
        }
        while self.undecided_order.len() > MAX_UNDECIDED
            && let Some(oldest) = self.undecided_order.pop_front()
        {
            self.undecided.remove(&oldest);
        }
    }

    /// Records the drop of a packet that no inspector gets.
    fn refuse(
        &mut self,
        punted: &Punted<'_>,
        packet: &Packet,
        reason: Reason,
        detail: &'static str,
        around: &mut impl Surroundings,
    ) {
        let Some(slot) = punted.requests.first() else {
            return;
        };
        self.counts.drop(reason);
        around.record(&Record {
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
        });
    }

    /// Runs the effects in their order.
    fn run_effects(&mut self, now: Millis, around: &mut impl Surroundings) {
        loop {
            for record in std::mem::take(&mut self.effects.records) {
                let ends = ends(record.source, record.destination, record.protocol);
                // The connection lacks bytes that the capture does not contain, so a timeout is no verdict.
                if self.undecided.contains(&ends) && record.reason == Reason::InspectDeadline {
                    continue;
                }
                around.record(&record);
            }
            let Some(effect) = self.effects.queue.pop_front() else {
                break;
            };
            match effect {
                Effect::Release(handle, command) => self.release(now, handle, command, around),
                Effect::Discard(handle, reason) => {
                    if self.held.try_remove(handle).is_some() {
                        self.counts.drop(reason);
                    }
                }
                Effect::Absorb(handle) => drop(self.held.try_remove(handle)),
                Effect::Command(command) => around.apply(&command),
                Effect::Commit(request) => {
                    let result = around.learn(request);
                    if let Some(rulesets) = around.changed_rulesets() {
                        self.rules = Arc::new((self.prepare)(&rulesets, Some(&self.rules)));
                        self.engine.set_rules(Arc::clone(&self.rules));
                    }
                    self.effects.epoch = around.epoch();
                    self.engine.committed(now, result, &mut self.effects);
                }
            }
        }
        self.deadline = self.engine.deadline().unwrap_or(Millis::MAX);
    }

    /// Passes a held packet on: from the first policy's inspector to the second policy's, or out of the inspection.
    fn release(
        &mut self,
        now: Millis,
        handle: usize,
        command: Option<FlowCommand>,
        around: &mut impl Surroundings,
    ) {
        if let Some(command) = &command {
            around.apply(command);
        }
        let Some(held) = self.held.get_mut(handle) else {
            return;
        };
        let (ifindex, hook) = (held.ifindex, held.hook);
        let Some((slot, frame)) = held.second.take() else {
            self.held.try_remove(handle);
            return;
        };
        match header::decode(&frame) {
            Ok(packet) => {
                let prepared = Prepared { start: 0, packet };
                let view = prepared.view(&slot, ifindex, hook, &frame);
                inspect(&mut self.engine, &mut self.effects, now, &view, handle);
            }
            Err((reason, _)) => self.effects.discard(handle, reason),
        }
    }
}

fn inspect(
    engine: &mut Engine<usize>,
    effects: &mut Effects,
    now: Millis,
    view: &PacketView<'_>,
    handle: usize,
) {
    if engine.knows(view.slot.ruleset) {
        engine.packet(now, view, handle, effects);
    } else {
        effects.discard(handle, Reason::UnknownRuleset);
    }
}

/// Returns the requests as the two slots of a punt header. If both policies inspect the packet, each request has the
/// flag that says so.
fn slots(requests: &[PuntRequest]) -> [PuntRequest; 2] {
    let mut slots = [PuntRequest::default(); 2];
    for (slot, request) in slots.iter_mut().zip(requests) {
        *slot = *request;
        if requests.len() > 1 {
            slot.flags |= punt_flags::SHARED;
        }
    }
    slots
}

fn ends(one: (Addr, u16), other: (Addr, u16), protocol: u8) -> Ends {
    if one <= other {
        (one, other, protocol)
    } else {
        (other, one, protocol)
    }
}

/// Returns whether a packet is the first of a connection, after which a connection that was not inspected can be.
fn opens(packet: &Packet) -> bool {
    packet.protocol == protocol::TCP
        && packet.tcp_flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN
        && !packet.is(flags::FRAGMENT_LATER)
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    /// Returns a segment of a server with data, and its headers.
    fn segment(seq: u32) -> (Vec<u8>, Packet) {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([192, 0, 2, 7], [10, 0, 1, 10], 64)
            .tcp(80, 4000, seq, 4096)
            .ack(1)
            .write(&mut frame, b"HTTP/1.1 403 Forbidden")
            .unwrap();
        let mut packet = Packet::default();
        decode(&*frame, Start::Ethernet { tags_removed: 0 }, &mut packet).unwrap();
        (frame, packet)
    }

    #[test]
    fn a_segment_with_the_bytes_of_a_generated_one_and_another_sequence_number_is_not_generated() {
        let mut generated = Generated::default();
        let (own, own_headers) = segment(1_000);
        generated.remember(&own);
        assert!(generated.contains(&own, &own_headers));
        let (other, other_headers) = segment(2_000);
        assert!(!generated.contains(&other, &other_headers));
    }

    #[test]
    fn bytes_after_the_ip_packet_are_not_kept() {
        let packet = Packet {
            network_offset: 14,
            length: 40,
            ..Packet::default()
        };
        assert_eq!(trimmed(&[0; 60_000], &packet).len(), 54);
        assert_eq!(trimmed(&[0; 20], &packet).len(), 20);
    }
}
