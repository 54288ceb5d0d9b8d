//! An engine, packets for it, and a sink that stores all effects.
#![allow(dead_code, reason = "not every test uses all of it")]

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    net::IpAddr,
    sync::Arc,
};

use palisade_abi::{FlowCommand, Inspector, PuntRequest, Reason, flow_op, punt_flags, punt_hook};
use palisade_inspect::{
    CommitRequest, Engine, Lease, Limits, Millis, PacketView, Route, Rules, Sink,
    record::{Record, Verdict, What},
};
use palisade_model::{
    rule::FqdnPattern,
    snapshot::{Alternative, Matcher, RuleSet},
};
use palisade_packet::{Packet, Start, decode};

pub const IFINDEX: u32 = 7;
/// Number of a rule set that allows `allowed.test` by rule 41 and `*.wild.test` by rule 42.
pub const NAMES: u32 = 5;
/// Number of the rule that requires the inspection.
pub const ASKING: u32 = 9;
/// Number of a rule set that allows everything by rule 51.
pub const EVERYTHING: u32 = 6;

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fate {
    Released,
    /// The packet was consumed: its bytes are delivered in built packets.
    Absorbed,
    Discarded(Reason),
}

#[derive(Default)]
pub struct Fake {
    /// Verdict of each handle.
    pub fates: HashMap<usize, Fate>,
    /// Handles in the order in which they were forwarded.
    pub released: Vec<usize>,
    pub emitted: Vec<(Vec<u8>, Route)>,
    pub records: Vec<Record>,
    pub learns: VecDeque<CommitRequest>,
    /// Number of commit requests that the sink still accepts.
    pub room: Option<usize>,
    /// Refreshes that the sink has accepted.
    pub refreshes: Vec<CommitRequest>,
    /// Number of refreshes that the sink still accepts.
    pub refreshes_room: usize,
    pub epoch: u64,
    /// The last `REPLACE` command: the serial of the conntrack entry, and the serial that the entry gets.
    pub replaced: Option<(u32, u32)>,
}

impl Fake {
    fn fate(&mut self, frame: usize, fate: Fate) {
        assert!(
            self.fates.insert(frame, fate).is_none(),
            "handle {frame} came back twice"
        );
    }
}

impl Sink<usize> for Fake {
    fn release(&mut self, frame: usize) {
        self.released.push(frame);
        self.fate(frame, Fate::Released);
    }

    fn release_with(&mut self, frame: usize, command: &FlowCommand) {
        if command.op == flow_op::REPLACE {
            self.replaced = Some((command.serial, command.windows[0]));
        }
        self.release(frame);
    }

    fn absorb(&mut self, frame: usize) {
        self.fate(frame, Fate::Absorbed);
    }

    fn discard(&mut self, frame: usize, reason: Reason) {
        assert!(reason.is_drop(), "{reason:?} is no reason to drop");
        self.fate(frame, Fate::Discarded(reason));
    }

    fn emit(&mut self, frame: &[u8], route: Route) {
        self.emitted.push((frame.to_vec(), route));
    }

    fn commit(&mut self, learn: CommitRequest) -> Result<(), CommitRequest> {
        if let Some(room) = &mut self.room {
            if *room == 0 {
                return Err(learn);
            }
            *room -= 1;
        }
        self.learns.push_back(learn);
        Ok(())
    }

    fn refresh(&mut self, learn: CommitRequest) -> Result<(), CommitRequest> {
        if self.refreshes.len() >= self.refreshes_room {
            return Err(learn);
        }
        self.refreshes.push(learn);
        Ok(())
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn record(&mut self, record: &Record) {
        self.records.push(*record);
    }
}

pub struct World {
    pub engine: Engine<usize>,
    pub sink: Fake,
    pub now: Millis,
    pub sent: usize,
}

impl World {
    pub fn new(limits: &Limits) -> Self {
        let mut engine = Engine::new(limits);
        engine.set_rules(Arc::new(rules()));
        Self {
            engine,
            sink: Fake::default(),
            now: 1000,
            sent: 0,
        }
    }

    /// Hands a frame to the engine. Its handle is the number of the frame.
    pub fn send(&mut self, slot: &PuntRequest, frame: &[u8]) -> usize {
        let handle = self.sent;
        self.sent += 1;
        let mut packet = Packet::default();
        decode(frame, Start::Ethernet { tags_removed: 0 }, &mut packet).unwrap();
        let transport = usize::from(packet.transport_offset);
        let header = match packet.protocol {
            6 => usize::from(frame[transport + 12] >> 4) * 4,
            _ => 8,
        };
        let end = usize::from(packet.network_offset) + packet.length as usize;
        let view = PacketView {
            slot,
            ifindex: IFINDEX,
            hook: punt_hook::TC_EGRESS,
            packet: &packet,
            frame,
            network: usize::from(packet.network_offset),
            transport,
            payload: ((transport + header).min(end), end),
        };
        self.engine.packet(self.now, &view, handle, &mut self.sink);
        handle
    }

    /// Restarts the daemon: another engine takes over what this one hands over. Returns how many connections.
    pub fn hand_over(&mut self) -> u64 {
        let handed_over = self.engine.hand_over(&mut self.sink);
        self.engine = Engine::new(&Limits::default());
        self.engine.set_rules(Arc::new(rules()));
        let taken = self.engine.take_over(self.now, &handed_over.state);
        assert_eq!(
            (taken.connections, taken.cut),
            (handed_over.account.connections, 0)
        );
        taken.connections
    }

    /// Reports the result of the oldest commit request.
    pub fn committed(&mut self, committed: bool) {
        let learn = self.sink.learns.pop_front().expect("something to learn");
        self.learned_one(learn, committed);
    }

    pub fn learned_one(&mut self, learn: CommitRequest, committed: bool) {
        self.learned_for(learn, committed, None);
    }

    pub fn learned_for(&mut self, learn: CommitRequest, committed: bool, lease: Option<Lease>) {
        let learned = learn.done(committed, lease);
        self.engine.committed(self.now, learned, &mut self.sink);
    }

    pub fn wait(&mut self, time: Millis) {
        self.now += time;
        self.engine.tick(self.now, &mut self.sink);
    }

    pub fn fate(&self, handle: usize) -> Option<&Fate> {
        self.sink.fates.get(&handle)
    }

    pub fn last(&self) -> &Record {
        self.sink.records.last().expect("a record")
    }

    /// Returns the verdict, reason and rule of the last record.
    pub fn verdict(&self) -> (Verdict, Reason, u32) {
        let last = self.last();
        (last.verdict, last.reason, last.rule)
    }

    /// Returns the detail of the last record.
    pub fn detail(&self) -> &'static str {
        match self.last().what {
            What::Unreadable { detail } => detail,
            _ => panic!("{:?}", self.last()),
        }
    }

    /// Ends the engine. Each handle must have come back exactly once.
    pub fn end(mut self) {
        self.engine.drain(&mut self.sink);
        assert_eq!(self.sink.fates.len(), self.sent);
        let stats = self.engine.stats();
        assert_eq!((stats.dns.held, stats.fragments.held), (0, 0));
        assert_eq!(self.engine.deadline(), None);
    }
}

pub fn pattern(text: &str) -> FqdnPattern {
    if text.contains('*') {
        FqdnPattern::Pattern(text.into())
    } else {
        FqdnPattern::Name(text.into())
    }
}

pub fn rule_set(alternatives: &[(u32, &str)]) -> Arc<RuleSet> {
    Arc::new(RuleSet {
        reads: Inspector::Dns as u8,
        alternatives: alternatives
            .iter()
            .map(|&(rule, text)| Alternative {
                rule,
                matcher: if text.is_empty() {
                    Matcher::Everything
                } else {
                    Matcher::Dns(pattern(text))
                },
            })
            .collect(),
        ..RuleSet::default()
    })
}

pub fn rules() -> Rules {
    let sets = BTreeMap::from([
        (NAMES, rule_set(&[(41, "allowed.test"), (42, "*.wild.test")])),
        (EVERYTHING, rule_set(&[(51, "")])),
    ]);
    Rules::prepare(&sets, None)
}

pub fn slot(endpoint: u16, flags: u8) -> PuntRequest {
    PuntRequest {
        rule: ASKING,
        ruleset: NAMES,
        remote_identity: 1234,
        revision: 1,
        serial: 99,
        endpoint,
        inspector: Inspector::Dns as u8,
        flags,
    }
}

/// Returns the slot of a query of the endpoint.
pub fn asks(endpoint: u16) -> PuntRequest {
    slot(endpoint, 0)
}

/// Returns the slot of an answer to the endpoint.
pub fn is_told(endpoint: u16) -> PuntRequest {
    slot(endpoint, punt_flags::INGRESS | punt_flags::REPLY)
}

/// Returns the slot of a query to the endpoint.
pub fn is_asked(endpoint: u16) -> PuntRequest {
    slot(endpoint, punt_flags::INGRESS)
}

/// Returns the slot of an answer of the endpoint.
pub fn tells(endpoint: u16) -> PuntRequest {
    slot(endpoint, punt_flags::REPLY)
}

pub fn audit(slot: PuntRequest) -> PuntRequest {
    PuntRequest {
        flags: slot.flags | punt_flags::AUDIT,
        ..slot
    }
}

/// A datagram to be built.
#[derive(Clone, Debug)]
pub struct Udp {
    pub source: (IpAddr, u16),
    pub destination: (IpAddr, u16),
    pub vlan: Option<u16>,
    pub payload: Vec<u8>,
}

pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const SERVER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Returns a datagram from a client to its server over IPv4.
pub fn to_server(port: u16, payload: &[u8]) -> Udp {
    Udp {
        source: ([10, 0, 0, 1].into(), port),
        destination: ([10, 0, 0, 53].into(), 53),
        vlan: None,
        payload: payload.to_vec(),
    }
}

/// Returns a datagram of the opposite direction.
pub fn to_client(port: u16, payload: &[u8]) -> Udp {
    to_server(port, payload).turned(payload)
}

impl Udp {
    pub fn v6(self) -> Self {
        let v6 = |ip: IpAddr| match ip {
            IpAddr::V4(v4) => {
                let [.., last] = v4.octets();
                IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)])
            }
            v6 => v6,
        };
        Self {
            source: (v6(self.source.0), self.source.1),
            destination: (v6(self.destination.0), self.destination.1),
            ..self
        }
    }

    pub fn turned(&self, payload: &[u8]) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            vlan: self.vlan,
            payload: payload.to_vec(),
        }
    }

    fn is_v6(&self) -> bool {
        self.source.0.is_ipv6()
    }

    pub fn datagram(&self) -> Vec<u8> {
        let mut udp = vec![];
        udp.extend(self.source.1.to_be_bytes());
        udp.extend(self.destination.1.to_be_bytes());
        udp.extend((self.payload.len() as u16 + 8).to_be_bytes());
        udp.extend([0, 0]);
        udp.extend(&self.payload);
        let sum = udp_sum(self.source.0, self.destination.0, &udp);
        udp[6..8].copy_from_slice(&sum.to_be_bytes());
        udp
    }

    fn link(&self) -> Vec<u8> {
        let (from, to) = if self.destination.1 == 53 {
            (CLIENT_MAC, SERVER_MAC)
        } else {
            (SERVER_MAC, CLIENT_MAC)
        };
        let mut frame = vec![];
        frame.extend(to);
        frame.extend(from);
        if let Some(vlan) = self.vlan {
            frame.extend([0x81, 0]);
            frame.extend(vlan.to_be_bytes());
        }
        frame.extend(if self.is_v6() { [0x86, 0xdd] } else { [8, 0] });
        frame
    }

    /// Returns the frame of a part of the datagram. `fragment`: offset in bytes, more-fragments flag, identification.
    pub fn around(&self, bytes: &[u8], fragment: Option<(usize, bool, u16)>) -> Vec<u8> {
        let mut frame = self.link();
        match (self.source.0, self.destination.0) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let (word, id) = match fragment {
                    Some((offset, more, id)) => ((offset / 8) as u16 | u16::from(more) << 13, id),
                    None => (0, 0),
                };
                let mut header = vec![0x45, 0];
                header.extend((bytes.len() as u16 + 20).to_be_bytes());
                header.extend(id.to_be_bytes());
                header.extend(word.to_be_bytes());
                header.extend([64, 17, 0, 0]);
                header.extend(source.octets());
                header.extend(destination.octets());
                let sum = naive_sum(&[&header]);
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                frame.extend(header);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let extra = if fragment.is_some() { 8 } else { 0 };
                frame.extend([0x60, 0, 0, 0]);
                frame.extend((bytes.len() as u16 + extra).to_be_bytes());
                frame.extend([if fragment.is_some() { 44 } else { 17 }, 64]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
                if let Some((offset, more, id)) = fragment {
                    frame.extend([17, 0]);
                    frame.extend((offset as u16 | u16::from(more)).to_be_bytes());
                    frame.extend(u32::from(id).to_be_bytes());
                }
            }
            _ => unreachable!("two families"),
        }
        frame.extend(bytes);
        frame
    }

    pub fn frame(&self) -> Vec<u8> {
        self.around(&self.datagram(), None)
    }
}

/// Returns the Internet checksum by its definition: 16-bit words, end-around carry.
pub fn naive_sum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let mut sum = 0_u32;
    for word in bytes.chunks(2) {
        let word = u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]);
        sum += u32::from(word);
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Returns the checksum over a datagram that contains one: 0 if that is valid.
pub fn udp_sum(source: IpAddr, destination: IpAddr, udp: &[u8]) -> u16 {
    let bytes = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let length = (udp.len() as u16).to_be_bytes();
    naive_sum(&[&bytes(source), &bytes(destination), &[0, 17], &length, udp])
}

/// Returns a name in wire format.
pub fn wire(name: &str) -> Vec<u8> {
    let mut wire = vec![];
    for label in name.split('.').filter(|label| !label.is_empty()) {
        wire.push(label.len() as u8);
        wire.extend(label.as_bytes());
    }
    wire.push(0);
    wire
}

pub const A: u16 = 1;
pub const CNAME: u16 = 5;
pub const AAAA: u16 = 28;
pub const HTTPS: u16 = 65;

pub fn query(id: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut message = vec![];
    message.extend(id.to_be_bytes());
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    message.extend(wire(name));
    message.extend(kind.to_be_bytes());
    message.extend([0, 1]);
    message
}

/// Returns an answer with records: owner, type, TTL, data.
pub fn answer(id: u16, name: &str, kind: u16, rcode: u8, records: &[(&str, u16, u32, &[u8])]) -> Vec<u8> {
    let mut message = query(id, name, kind);
    message[2] = 0x81;
    message[3] = 0x80 | rcode;
    message[6..8].copy_from_slice(&(records.len() as u16).to_be_bytes());
    for (owner, kind, ttl, data) in records {
        message.extend(wire(owner));
        message.extend(kind.to_be_bytes());
        message.extend([0, 1]);
        message.extend(ttl.to_be_bytes());
        message.extend((data.len() as u16).to_be_bytes());
        message.extend(*data);
    }
    message
}

/// Returns an answer with one address.
pub fn address(id: u16, name: &str) -> Vec<u8> {
    answer(id, name, A, 0, &[(name, A, 60, &[192, 0, 2, 1])])
}

#[allow(unused_imports, reason = "not every test uses all of them")]
pub use palisade_abi::tcp_flags::{ACK, FIN, RST, SYN, URG};

/// A segment to be built.
pub fn segment(addresses: &Udp, sequence: u32, acknowledgment: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut tcp = vec![];
    tcp.extend(addresses.source.1.to_be_bytes());
    tcp.extend(addresses.destination.1.to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend(acknowledgment.to_be_bytes());
    tcp.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    tcp.extend(payload);
    let mut frame = addresses.around(&tcp, None);
    let protocol = if addresses.source.0.is_ipv4() {
        14 + 9
    } else {
        14 + 6
    };
    frame[protocol] = 6;
    frame
}

/// Returns messages with their lengths in front.
pub fn framed(messages: &[Vec<u8>]) -> Vec<u8> {
    let mut stream = vec![];
    for message in messages {
        stream.extend((message.len() as u16).to_be_bytes());
        stream.extend(message);
    }
    stream
}
