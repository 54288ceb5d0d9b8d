//! DNS over TCP.

use palisade_abi::{PuntRequest, Reason, punt_flags};
use palisade_inspect::{Denial, DnsLimits, Limits, TcpLimits, TcpStats, record::Verdict};
use palisade_packet::{Packet, Start, decode};
use proptest::prelude::*;

use crate::common::*;

/// Initial sequence numbers, shortly before they wrap around.
const CLIENT: u32 = u32::MAX - 9;
const RESOLVER: u32 = u32::MAX - 29;

/// Returns the limits of connections.
fn tcp(change: impl FnOnce(&mut TcpLimits)) -> Limits {
    let mut limits = Limits::default();
    change(&mut limits.dns.tcp);
    limits
}

/// A segment that the engine has built.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Made {
    to_client: bool,
    /// Offset of the segment in the stream of its apparent sender.
    at: u32,
    /// Acknowledged offset in the other stream.
    acknowledges: Option<u32>,
    flags: u8,
    payload: Vec<u8>,
}

/// A connection of endpoint 1.
struct Connection {
    world: World,
    v6: bool,
    slots: [PuntRequest; 2],
    /// Whether a conntrack entry exists, so that no packet of the client makes one.
    is_tracked: bool,
}

impl Connection {
    fn new() -> Self {
        Self::with(&Limits::default(), false, [asks(1), is_told(1)])
    }

    fn with(limits: &Limits, v6: bool, slots: [PuntRequest; 2]) -> Self {
        let mut connection = Self {
            world: World::new(limits),
            v6,
            slots,
            is_tracked: false,
        };
        connection.greet();
        connection
    }

    fn greet(&mut self) {
        let syn = self.client(-1, SYN, &[]);
        let syn_ack = self.resolver(-1, SYN | ACK, &[]);
        let ack = self.client(0, ACK, &[]);
        for handle in [syn, syn_ack, ack] {
            assert_eq!(self.fate(handle), Some(&Fate::Released));
        }
    }

    fn fate(&self, handle: usize) -> Option<&Fate> {
        self.world.fate(handle)
    }

    fn addresses(&self) -> Udp {
        let addresses = to_server(4000, &[]);
        if self.v6 { addresses.v6() } else { addresses }
    }

    /// Sends a segment of the client at this offset.
    fn client(&mut self, at: i64, flags: u8, payload: &[u8]) -> usize {
        self.client_acknowledges(at, 0, flags, payload)
    }

    fn client_acknowledges(&mut self, at: i64, acknowledged: u32, flags: u8, payload: &[u8]) -> usize {
        let sequence = CLIENT.wrapping_add(1).wrapping_add(at as u32);
        let acknowledgment = RESOLVER.wrapping_add(1).wrapping_add(acknowledged);
        let frame = segment(&self.addresses(), sequence, acknowledgment, flags, payload);
        let slot = if self.is_tracked {
            self.slots[0]
        } else {
            new(self.slots[0])
        };
        self.is_tracked = true;
        self.send(&slot, &frame)
    }

    /// Sends a frame. Executes a `REPLACE` command like the BPF programs: the entry gets another serial.
    fn send(&mut self, slot: &PuntRequest, frame: &[u8]) -> usize {
        let handle = self.world.send(slot, frame);
        if let Some((before, serial)) = self.world.sink.replaced.take() {
            for slot in &mut self.slots {
                assert_eq!(slot.serial, before);
                slot.serial = serial;
            }
        }
        handle
    }

    /// Sends a segment of the resolver that acknowledges only the SYN.
    fn resolver(&mut self, at: i64, flags: u8, payload: &[u8]) -> usize {
        self.resolver_acknowledges(at, 0, flags, payload)
    }

    fn resolver_acknowledges(&mut self, at: i64, acknowledged: u32, flags: u8, payload: &[u8]) -> usize {
        let sequence = RESOLVER.wrapping_add(1).wrapping_add(at as u32);
        let acknowledgment = CLIENT.wrapping_add(1).wrapping_add(acknowledged);
        let addresses = self.addresses().turned(&[]);
        let frame = segment(&addresses, sequence, acknowledgment, flags, payload);
        let slot = self.slots[1];
        self.send(&slot, &frame)
    }

    /// Sends an allowed query and an acknowledgement of it. Returns its length in the stream.
    fn asked(&mut self, id: u16) -> i64 {
        let query = framed(&[query(id, "allowed.test", A)]);
        let handle = self.client(0, ACK, &query);
        assert_eq!(self.fate(handle), Some(&Fate::Released));
        query.len() as i64
    }

    /// Returns the segments that were built since the last call.
    fn made(&mut self) -> Vec<Made> {
        let emitted = std::mem::take(&mut self.world.sink.emitted);
        emitted.iter().map(|(frame, _)| self.read(frame)).collect()
    }

    fn read(&self, frame: &[u8]) -> Made {
        let mut packet = Packet::default();
        decode(frame, Start::Ethernet { tags_removed: 0 }, &mut packet).unwrap();
        let there = self.addresses();
        let to_client = packet.destination_port == there.source.1;
        let (from, to, to_mac) = if to_client {
            (there.destination, there.source, CLIENT_MAC)
        } else {
            (there.source, there.destination, SERVER_MAC)
        };
        assert_eq!((packet.source, packet.source_port), (from.0.into(), from.1));
        assert_eq!((packet.destination, packet.destination_port), (to.0.into(), to.1));
        assert_eq!(frame[..6], to_mac);
        let tcp = &frame[usize::from(packet.transport_offset)..];
        // The checksum with the protocol number of TCP.
        let sum = udp_sum(from.0, to.0, tcp);
        let expected = naive_sum(&[
            &(!sum).to_be_bytes(),
            &(6_u16).to_be_bytes(),
            &(!17_u16).to_be_bytes(),
        ]);
        assert_eq!(expected, 0);
        let word = |at: usize| u32::from_be_bytes(tcp[at..at + 4].try_into().unwrap());
        let (own, other) = if to_client {
            (RESOLVER, CLIENT)
        } else {
            (CLIENT, RESOLVER)
        };
        Made {
            to_client,
            at: word(4).wrapping_sub(own).wrapping_sub(1),
            acknowledges: (tcp[13] & ACK != 0).then(|| word(8).wrapping_sub(other).wrapping_sub(1)),
            flags: tcp[13],
            payload: tcp[usize::from(tcp[12] >> 4) * 4..].to_vec(),
        }
    }

    /// Checks that the last two built packets are resets to the client and to the resolver, at these offsets.
    fn resets(&mut self, from_resolver: u32, from_client: u32) {
        let made = self.made();
        let [to_client, to_resolver] = made.last_chunk().expect("two resets");
        assert_eq!((to_client.to_client, to_client.at), (true, from_resolver));
        assert_eq!((to_resolver.to_client, to_resolver.at), (false, from_client));
        assert!(to_client.flags & to_resolver.flags & RST != 0);
    }

    /// Checks that the built packets are a response with a FIN to the client, and a FIN to the resolver. The
    /// arguments are the offset of the response, its acknowledged offset, and the offset of the FIN to the resolver.
    /// Returns the messages.
    fn answered(&mut self, at: u32, acknowledges: u32, sent: u32) -> Vec<u8> {
        let made = self.made();
        let [to_client, to_resolver] = &made[..] else {
            panic!("{made:?}")
        };
        assert_eq!(
            (to_client.to_client, to_client.at, to_client.acknowledges),
            (true, at, Some(acknowledges))
        );
        assert_eq!(to_client.flags & (FIN | RST | SYN), FIN);
        assert_eq!((to_resolver.to_client, to_resolver.at), (false, sent));
        assert_eq!(to_resolver.flags & (FIN | RST | SYN), FIN);
        assert!(to_resolver.payload.is_empty());
        to_client.payload.clone()
    }

    fn tcp(&self) -> TcpStats {
        self.world.engine.stats().dns.tcp
    }

    fn cut(&self, reason: Reason) {
        assert_eq!(self.world.verdict().1, reason);
        assert_eq!(self.tcp().cut, 1);
    }
}

/// Returns the slot of the packet that makes the conntrack entry.
fn new(slot: PuntRequest) -> PuntRequest {
    PuntRequest {
        flags: slot.flags | punt_flags::NEW,
        ..slot
    }
}

/// Returns the three packets of the handshake of another connection.
struct Other(u16, u16);

impl Other {
    fn syn(&self, it: &mut Connection) -> Fate {
        let Self(endpoint, port) = *self;
        let frame = segment(&to_server(port, &[]), 1, 0, SYN, &[]);
        self.send(it, &new(asks(endpoint)), &frame)
    }

    fn syn_ack(&self, it: &mut Connection) -> Fate {
        let Self(endpoint, port) = *self;
        let frame = segment(&to_client(port, &[]), 1, 2, SYN | ACK, &[]);
        self.send(it, &is_told(endpoint), &frame)
    }

    fn ack(&self, it: &mut Connection) -> Fate {
        let Self(endpoint, port) = *self;
        let frame = segment(&to_server(port, &[]), 2, 2, ACK, &[]);
        self.send(it, &asks(endpoint), &frame)
    }

    fn send(&self, it: &mut Connection, slot: &PuntRequest, frame: &[u8]) -> Fate {
        let handle = it.world.send(slot, frame);
        it.fate(handle).expect("a handshake is not held").clone()
    }

    /// Opens the connection. Returns the verdict of the SYN. The handshake continues if the SYN was forwarded.
    fn open(&self, it: &mut Connection) -> Fate {
        let fate = self.syn(it);
        if fate == Fate::Released {
            assert_eq!((self.syn_ack(it), self.ack(it)), (Fate::Released, Fate::Released));
        }
        fate
    }
}

/// Returns a response to a message with this code and no records, with its length in front.
fn refusal(query: &[u8], rcode: u8) -> Vec<u8> {
    let mut reply = query.to_vec();
    // QR, RD of the query, RA.
    (reply[2], reply[3]) = (0x81, 0x80 | rcode);
    framed(&[reply])
}

#[test]
fn a_query_and_its_answer_are_forwarded() {
    for v6 in [false, true] {
        let mut it = Connection::with(&Limits::default(), v6, [asks(1), is_told(1)]);
        let asked = it.asked(7);
        assert_eq!(it.world.verdict(), (Verdict::Forwarded, Reason::Allowed, 41));
        assert_eq!(it.world.last().protocol, 6);
        let answer = framed(&[address(7, "allowed.test")]);
        let told = it.resolver_acknowledges(0, asked as u32, ACK, &answer);
        assert_eq!(it.fate(told), None);
        // Later answers wait for the held one.
        let fin = it.resolver(answer.len() as i64, FIN | ACK, &[]);
        assert_eq!(it.fate(fin), None);
        it.world.sink.released.clear();
        it.world.committed(true);
        assert_eq!(it.world.sink.released, [told, fin]);
        assert_eq!(it.world.verdict(), (Verdict::Forwarded, Reason::Allowed, 41));
        let last = it.client_acknowledges(asked, answer.len() as u32 + 1, FIN | ACK, &[]);
        assert_eq!(it.fate(last), Some(&Fate::Released));
        it.resolver_acknowledges(answer.len() as i64 + 1, asked as u32 + 1, ACK, &[]);
        // Another connection between the same addresses.
        it.greet();
        it.asked(8);
        let stats = it.tcp();
        assert_eq!((stats.opened, stats.connections, stats.cut), (2, 1, 0));
        assert!(it.made().is_empty());
        it.world.end();
    }
}

#[test]
fn a_denied_query_gets_a_response_and_ends_the_connection() {
    for v6 in [false, true] {
        let mut it = Connection::with(&Limits::default(), v6, [asks(1), is_told(1)]);
        let denied = query(8, "denied.test", A);
        let bytes = framed(std::slice::from_ref(&denied));
        let length = bytes.len() as u32;
        let first = it.client(0, ACK, &bytes[..20]);
        assert_eq!(it.fate(first), None);
        let second = it.client(20, ACK, &bytes[20..]);
        let fate = Fate::Discarded(Reason::AppDenied);
        assert_eq!((it.fate(first), it.fate(second)), (Some(&fate), Some(&fate)));
        assert_eq!(it.world.verdict(), (Verdict::Dropped, Reason::AppDenied, ASKING));
        let reply = it.answered(0, length, 0);
        assert_eq!(reply, refusal(&denied, 5));
        // Nothing is forwarded any more, and both ends close in order.
        let from_resolver = it.resolver(0, ACK, &framed(&[address(8, "denied.test")]));
        assert_eq!(it.fate(from_resolver), Some(&fate));
        let end = length.wrapping_add(1);
        let from_client = it.client_acknowledges(i64::from(length), reply.len() as u32 + 1, FIN | ACK, &[]);
        assert_eq!(it.fate(from_client), Some(&fate));
        let made = it.made();
        assert_eq!(made.last().unwrap().acknowledges, Some(end));
        assert!(made.iter().all(|made| made.flags & RST == 0));
        let stats = it.world.engine.stats().dns;
        assert_eq!(
            (stats.replies, stats.denied, stats.tcp.answered, stats.tcp.cut),
            (1, 1, 1, 0)
        );
        // The client may connect again.
        it.greet();
        it.asked(9);
        it.world.end();
    }
}

#[test]
fn a_response_follows_the_answers_to_earlier_queries() {
    let mut it = Connection::new();
    let both = framed(&[query(1, "allowed.test", A), query(2, "x.wild.test", A)]);
    it.client(0, ACK, &both);
    let denied = query(3, "denied.test", A);
    let refused = framed(std::slice::from_ref(&denied));
    let at = both.len();
    let held = it.client(at as i64, ACK, &refused);
    assert_eq!(it.world.verdict(), (Verdict::Dropped, Reason::AppDenied, ASKING));
    // Denied queries behind it get responses too, up to the first allowed one.
    let also = query(4, "also-denied.test", A);
    let rest = framed(&[
        also.clone(),
        query(5, "allowed.test", A),
        query(6, "denied.test", A),
    ]);
    let behind = it.client((at + refused.len()) as i64, ACK, &rest);
    let records = it.world.sink.records.len();
    assert_eq!((it.fate(held), it.fate(behind)), (None, None));
    let first = framed(&[answer(2, "x.wild.test", A, 3, &[])]);
    let second = framed(&[address(1, "allowed.test")]);
    let one = it.resolver_acknowledges(0, at as u32, ACK, &first);
    let two = it.resolver(first.len() as i64, ACK, &second);
    assert_eq!((it.fate(one), it.fate(two)), (Some(&Fate::Released), None));
    assert!(it.made().is_empty());
    it.world.committed(true);
    assert_eq!(it.fate(two), Some(&Fate::Released));
    assert!(it.made().is_empty(), "the client does not have them yet");
    let told = (first.len() + second.len()) as u32;
    let (end, all) = (at + refused.len(), it.world.sent);
    it.client_acknowledges(end as i64, told, ACK, &[]);
    let both = [refusal(&denied, 5), refusal(&also, 5)].concat();
    assert_eq!(it.answered(told, (end + rest.len()) as u32, at as u32), both);
    let fate = Some(&Fate::Discarded(Reason::AppDenied));
    assert_eq!((it.fate(held), it.fate(behind)), (fate, fate));
    assert_eq!(it.world.sink.records.len(), records + 2, "of the two answers");
    assert_eq!(all + 1, it.world.sent);
    it.world.end();
}

#[test]
fn a_response_behind_unanswered_queries_has_a_deadline() {
    // The resolver does not answer, or closes the connection.
    for ends in [false, true] {
        let mut it = Connection::new();
        let asked = it.asked(1);
        let held = it.client(asked, ACK, &framed(&[query(2, "denied.test", A)]));
        assert_eq!(it.fate(held), None);
        if ends {
            it.resolver_acknowledges(0, asked as u32, FIN | ACK, &[]);
            assert_eq!(it.fate(held), Some(&Fate::Discarded(Reason::AppDenied)));
        } else {
            it.world.wait(10);
            assert_eq!(
                it.fate(held),
                Some(&Fate::Absorbed),
                "acknowledged, not passed on"
            );
            it.world.wait(10_000);
            assert_eq!(it.world.verdict().1, Reason::InspectDeadline);
        }
        assert_eq!(it.tcp().cut, 1);
        it.resets(0, asked as u32);
        it.world.end();
    }
}

#[test]
fn a_malformed_query_gets_a_response_or_a_reset() {
    let mut two = query(7, "allowed.test", A);
    two[5] = 2;
    two.extend(&query(7, "allowed.test", A)[12..]);
    let mut update = query(7, "allowed.test", A);
    update[2] |= 5 << 3;
    let bare = |flags: u8, rcode: u8| vec![0, 7, 0x81 | flags, 0x80 | rcode, 0, 0, 0, 0, 0, 0, 0, 0];
    for (message, reply) in [(two, bare(0, 1)), (update, bare(5 << 3, 4))] {
        let mut it = Connection::new();
        let bytes = framed(&[message]);
        let handle = it.client(0, ACK, &bytes);
        assert_eq!(it.fate(handle), Some(&Fate::Discarded(Reason::AppMalformed)));
        assert_eq!(it.answered(0, bytes.len() as u32, 0), framed(&[reply]));
        it.world.end();
    }
    // An answer, and a truncated query: they get no response.
    let query = query(7, "allowed.test", A);
    for message in [address(7, "allowed.test"), query[..query.len() - 1].to_vec()] {
        let mut it = Connection::new();
        let handle = it.client(0, ACK, &framed(&[message]));
        assert_eq!(it.fate(handle), Some(&Fate::Discarded(Reason::AppMalformed)));
        it.cut(Reason::AppMalformed);
        it.resets(0, 0);
        it.world.end();
    }
}

#[test]
fn the_denial_is_configurable() {
    let limits = Limits {
        dns: DnsLimits {
            denial: Denial::NxDomain,
            ..DnsLimits::default()
        },
        ..Limits::default()
    };
    let mut it = Connection::with(&limits, false, [asks(1), is_told(1)]);
    let denied = query(8, "denied.test", A);
    let bytes = framed(std::slice::from_ref(&denied));
    it.client(0, ACK, &bytes);
    assert_eq!(it.answered(0, bytes.len() as u32, 0), refusal(&denied, 3));
    it.world.end();
}

#[test]
fn denied_queries_for_both_families_get_responses_together() {
    let mut it = Connection::new();
    let (v4, v6) = (query(1, "denied.test", A), query(2, "denied.test", AAAA));
    let bytes = framed(&[v4.clone(), v6.clone()]);
    it.client(0, ACK, &bytes);
    let both = [refusal(&v4, 5), refusal(&v6, 5)].concat();
    assert_eq!(it.answered(0, bytes.len() as u32, 0), both);
    assert_eq!(it.world.engine.stats().dns.replies, 2);
    it.world.end();
    // Only up to a limit.
    let mut it = Connection::new();
    let many: Vec<_> = (0..1000).map(|id| query(id, "d.test", A)).collect();
    it.client(0, ACK, &framed(&many));
    let replies: usize = it.made().iter().map(|made| made.payload.len()).sum();
    assert!((4096..4200).contains(&replies), "{replies}");
    it.world.end();
}

#[test]
fn queries_before_a_denied_one_in_the_same_segment_are_forwarded() {
    let mut it = Connection::new();
    let both = framed(&[query(1, "allowed.test", A), query(2, "x.wild.test", A)]);
    let passes = it.client(0, ACK, &both);
    assert_eq!(it.fate(passes), Some(&Fate::Released));
    it.world.end();
    let denied = query(4, "denied.test", A);
    let mixed = framed(&[query(3, "allowed.test", A), denied.clone()]);
    let asked = framed(&[query(3, "allowed.test", A)]);
    // Also if the denied query is incomplete.
    for cut in [mixed.len(), mixed.len() - 7] {
        let mut it = Connection::new();
        let held = it.client(0, ACK, &mixed[..cut]);
        assert_eq!(it.fate(held), None);
        it.world.wait(10);
        assert_eq!(it.fate(held), Some(&Fate::Absorbed));
        let made = it.made();
        assert_eq!(
            (made[0].to_client, made[0].acknowledges),
            (true, Some(cut as u32))
        );
        assert_eq!(
            (made[1].to_client, made[1].at, &made[1].payload),
            (false, 0, &asked)
        );
        assert_eq!(made.len(), 2);
        if cut < mixed.len() {
            it.client(cut as i64, ACK, &mixed[cut..]);
        }
        let told = framed(&[answer(3, "allowed.test", A, 3, &[])]);
        let handle = it.resolver_acknowledges(0, asked.len() as u32, ACK, &told);
        assert_eq!(it.fate(handle), Some(&Fate::Released));
        assert!(it.made().is_empty());
        it.client_acknowledges(mixed.len() as i64, told.len() as u32, ACK, &[]);
        assert_eq!(
            it.answered(told.len() as u32, mixed.len() as u32, asked.len() as u32),
            refusal(&denied, 5)
        );
        it.world.end();
    }
}

/// Returns a slot with a second policy that inspects the same packets.
fn shared(slot: PuntRequest) -> PuntRequest {
    PuntRequest {
        flags: slot.flags | punt_flags::SHARED,
        ..slot
    }
}

/// Packets that the other policy's inspector builds are not seen here, but the packets that they cause are.
#[test]
fn the_other_policy_may_end_the_connection() {
    for is_shared in [false, true] {
        let slots = [asks(1), is_told(1)];
        let slots = if is_shared { slots.map(shared) } else { slots };
        let mut it = Connection::with(&Limits::default(), false, slots);
        let asked = it.asked(7);
        let dropped = Some(&Fate::Discarded(Reason::TcpOutOfWindow));
        let with_data = it.client_acknowledges(asked, 40, ACK, b"data");
        assert_eq!(it.fate(with_data), dropped);
        for flags in [ACK, FIN | ACK] {
            let handle = it.client_acknowledges(asked, 40, flags, &[]);
            let fate = if is_shared { Some(&Fate::Released) } else { dropped };
            assert_eq!(it.fate(handle), fate);
        }
        it.world.wait(60_000);
        assert_eq!(it.tcp().connections, u64::from(!is_shared));
        it.world.end();
    }
}

#[test]
fn with_two_inspectors_a_segment_is_forwarded_whole_or_dropped() {
    let slots = [shared(asks(1)), shared(is_told(1))];
    let mut it = Connection::with(&Limits::default(), false, slots);
    let denied = query(4, "denied.test", A);
    let mixed = framed(&[query(3, "allowed.test", A), denied.clone()]);
    let refused = it.client(0, ACK, &mixed);
    assert_eq!(it.fate(refused), Some(&Fate::Discarded(Reason::AppDenied)));
    // No query was forwarded, so no answer is awaited.
    assert_eq!(it.answered(0, mixed.len() as u32, 0), refusal(&denied, 5));
    it.world.end();
}

#[test]
fn only_the_length_of_a_query_is_forwarded_early() {
    let mut it = Connection::new();
    let query = framed(&[query(7, "allowed.test", A)]);
    let length = it.client(0, ACK, &query[..2]);
    assert_eq!(it.fate(length), Some(&Fate::Released));
    let parts: Vec<_> = (2..query.len())
        .map(|at| {
            let handle = it.client(at as i64, ACK, &query[at..=at]);
            assert_eq!(it.fate(handle).is_none(), at + 1 < query.len());
            handle
        })
        .collect();
    assert_eq!(it.world.sink.released[4..], parts);
    it.world.end();
}

#[test]
fn the_end_of_a_long_answer_is_held() {
    let mut it = Connection::new();
    it.asked(7);
    let addresses: Vec<[u8; 4]> = (0..1000_u32).map(u32::to_be_bytes).collect();
    let records: Vec<_> = addresses
        .iter()
        .map(|data| ("allowed.test", A, 60, &data[..]))
        .collect();
    let answer = framed(&[answer(7, "allowed.test", A, 0, &records)]);
    let chunks: Vec<_> = answer.chunks(1400).collect();
    let mut last = 0;
    for (number, chunk) in chunks.iter().enumerate() {
        last = it.resolver(number as i64 * 1400, ACK, chunk);
        let is_last = number + 1 == chunks.len();
        assert_eq!(it.fate(last).is_none(), is_last, "{number}");
        let received = (number as u32 + 1) * 1400;
        if !is_last {
            it.client_acknowledges(0, received, ACK, &[]);
        }
    }
    assert_eq!(it.world.sink.learns[0].answer.addresses.len(), 1000);
    it.world.committed(true);
    assert_eq!(it.fate(last), Some(&Fate::Released));
    it.world.end();
}

#[test]
fn a_refused_answer_resets_the_connection() {
    let uncommitted = |it: &mut Connection| it.world.committed(false);
    let overdue = |it: &mut Connection| it.world.wait(2000);
    for settle in [&uncommitted as &dyn Fn(&mut Connection), &overdue] {
        let mut it = Connection::new();
        let asked = it.asked(7);
        let told = it.resolver(0, ACK, &framed(&[address(7, "allowed.test")]));
        settle(&mut it);
        assert_eq!(it.fate(told), Some(&Fate::Discarded(Reason::DnsUncommitted)));
        it.cut(Reason::DnsUncommitted);
        it.resets(0, asked as u32);
        it.world.end();
    }
    let malformed = vec![0; 13];
    for (message, reason) in [
        (address(8, "allowed.test"), Reason::DnsUnsolicited),
        (malformed, Reason::AppMalformed),
    ] {
        let mut it = Connection::new();
        it.asked(7);
        let told = it.resolver(0, ACK, &framed(&[message]));
        assert_eq!(it.fate(told), Some(&Fate::Discarded(reason)));
        it.cut(reason);
        it.world.end();
    }
}

#[test]
fn answers_are_forwarded_in_stream_order() {
    let mut it = Connection::new();
    it.client(
        0,
        ACK,
        &framed(&[query(1, "allowed.test", A), query(2, "x.wild.test", A)]),
    );
    let first = framed(&[address(1, "allowed.test")]);
    let one = it.resolver(0, ACK, &first);
    let two = it.resolver(first.len() as i64, ACK, &framed(&[address(2, "x.wild.test")]));
    let learn = it.world.sink.learns.pop_back().unwrap();
    it.world.learned_one(learn, true);
    assert_eq!((it.fate(one), it.fate(two)), (None, None));
    it.world.committed(true);
    assert_eq!(it.fate(one), Some(&Fate::Released));
    assert_eq!(it.fate(two), Some(&Fate::Released));
    it.world.end();
}

#[test]
fn retransmissions_must_carry_the_same_bytes() {
    let mut it = Connection::new();
    let asked = it.asked(7);
    let said = framed(&[query(7, "allowed.test", A)]);
    let mut other = said.clone();
    *other.last_mut().unwrap() ^= 1;
    let again = it.client(0, ACK, &said);
    assert_eq!(it.fate(again), Some(&Fate::Released));
    let differs = it.client(0, ACK, &other);
    assert_eq!(it.fate(differs), Some(&Fate::Discarded(Reason::TcpOverlap)));
    // A part of the bytes again, and new ones.
    let denied = framed(&[query(8, "denied.test", A)]);
    let over = it.client(asked - 3, ACK, &[&other[other.len() - 3..], &denied].concat());
    assert_eq!(it.fate(over), Some(&Fate::Discarded(Reason::TcpOverlap)));
    // Bytes that arrive early are held, and count as the first copy.
    let early = it.client(asked + 5, ACK, &denied[5..10]);
    assert_eq!(it.fate(early), None);
    let changed = it.client(asked + 4, ACK, &[denied[4], denied[5] ^ 1]);
    assert_eq!(it.fate(changed), Some(&Fate::Discarded(Reason::TcpOverlap)));
    // Nor if the resolver claims to have the bytes.
    it.resolver_acknowledges(0, asked as u32, ACK, &[]);
    for at in [0, -5] {
        let emitted = it.made().len();
        let acknowledged = it.client(at, ACK, &other);
        assert_eq!(emitted, 0);
        assert_eq!(it.fate(acknowledged), Some(&Fate::Discarded(Reason::TcpHeld)));
        // A sender that has lost the acknowledgement gets another one.
        let made = it.made();
        assert_eq!(
            (made[0].to_client, made[0].acknowledges),
            (true, Some(asked as u32))
        );
    }
    // A retransmission of held bytes is dropped.
    let part = it.client(asked, ACK, &denied[..5]);
    let part_again = it.client(asked, ACK, &denied[..5]);
    assert_eq!(it.fate(part), None);
    assert_eq!(it.fate(part_again), Some(&Fate::Discarded(Reason::TcpHeld)));
    let stats = it.tcp();
    assert_eq!((stats.overlaps, stats.frames), (3, 2));
    it.world.end();
}

#[test]
fn old_retransmissions_are_not_forwarded() {
    let mut it = Connection::new();
    let mut at = 0;
    // More bytes than may be in flight.
    for id in 0..2500 {
        let query = framed(&[query(id, "allowed.test", A)]);
        let handle = it.client(at, ACK, &query);
        assert_eq!(it.fate(handle), Some(&Fate::Released), "{id}");
        let again = it.client(at, ACK, &query);
        assert_eq!(it.fate(again), Some(&Fate::Released), "{id}");
        at += query.len() as i64;
        it.resolver_acknowledges(0, at as u32, ACK, &[]);
        assert!(it.tcp().bytes < 100);
    }
    assert!(at > 70_000);
    let long_gone = it.client(0, ACK, &framed(&[query(0, "allowed.test", A)]));
    assert_eq!(it.fate(long_gone), Some(&Fate::Discarded(Reason::TcpOutOfWindow)));
    it.world.end();
}

#[test]
fn an_incomplete_message_ends_the_connection() {
    let mut it = Connection::new();
    let query = framed(&[query(7, "allowed.test", A)]);
    let part = it.client(0, ACK, &query[..9]);
    // The bytes are acknowledged, since the client may wait for that. None is forwarded.
    it.world.wait(10);
    assert_eq!(it.fate(part), Some(&Fate::Absorbed));
    let made = it.made();
    assert_eq!(made.len(), 1);
    assert_eq!((made[0].to_client, made[0].acknowledges), (true, Some(9)));
    it.world.wait(9_989);
    assert_eq!(it.tcp().cut, 0);
    assert_eq!(it.world.engine.deadline(), Some(it.world.now + 1));
    it.world.wait(1);
    it.cut(Reason::InspectDeadline);
    it.resets(0, 0);
    it.world.end();
    // A FIN within a message, a length that is too short, and one that is too long.
    for (payload, flags) in [
        (&query[..9], FIN | ACK),
        (&[0, 11][..], ACK),
        (&[0x10, 1][..], ACK),
    ] {
        let mut it = Connection::new();
        let part = it.client(0, flags, payload);
        assert_eq!(it.fate(part), Some(&Fate::Discarded(Reason::AppMalformed)));
        it.cut(Reason::AppMalformed);
        it.world.end();
    }
}

#[test]
fn connections_without_a_seen_handshake_are_reset() {
    let mut it = Connection::new();
    it.world.engine.forget_endpoint(1, &mut it.world.sink);
    let asked = framed(&[query(7, "allowed.test", A)]);
    let handle = it.client(5, ACK, &asked);
    assert_eq!(it.fate(handle), Some(&Fate::Discarded(Reason::TcpMidstream)));
    // The resolver gets a probe with a sequence number below its window.
    let made = it.made();
    let [ask] = &made[..] else { panic!("{made:?}") };
    assert_eq!((ask.to_client, ask.at, ask.acknowledges), (false, 4, Some(0)));
    assert_eq!((ask.flags, ask.payload.len()), (ACK, 0));
    let told = it.resolver_acknowledges(0, 7, ACK, &[]);
    assert_eq!(it.fate(told), Some(&Fate::Discarded(Reason::TcpMidstream)));
    assert_eq!(it.world.last().reason, Reason::TcpMidstream);
    let made = it.made();
    let ends: Vec<_> = made.iter().map(|made| (made.to_client, made.at)).collect();
    assert_eq!(ends, [(false, 7), (true, 0), (true, 1)]);
    assert!(made.iter().all(|made| made.flags & RST != 0));
    // A reset gets no answer. It is forwarded, because it comes from an end that knows the sequence number.
    let reset = it.client(5, RST, &[]);
    assert_eq!(it.fate(reset), Some(&Fate::Released));
    assert!(it.made().is_empty());
    // No packet arrives for longer than the idle timeout.
    it.greet();
    it.world.wait(120_000);
    assert_eq!(it.tcp().connections, 0);
    // Another connection, by its serial.
    it.greet();
    it.slots[0].serial = 100;
    let stranger = it.client(0, ACK, &asked);
    assert_eq!(it.fate(stranger), Some(&Fate::Discarded(Reason::TcpMidstream)));
    it.world.end();
}

#[test]
fn ambiguous_segments_are_dropped() {
    let mut it = Connection::new();
    let asked = framed(&[query(7, "allowed.test", A)]);
    let invalid = Some(&Fate::Discarded(Reason::TcpInvalid));
    let reported = |it: &mut Connection| {
        let records = std::mem::take(&mut it.world.sink.records);
        assert!(records.iter().all(|record| record.verdict == Verdict::Dropped));
        records.iter().map(|record| record.reason).collect::<Vec<_>>()
    };
    // Another SYN is forwarded as a candidate. A SYN with data is dropped, whether or not the SYN itself was
    // forwarded before.
    let opened = it.tcp().opened;
    let syn = it.client(8, SYN, &[]);
    assert_eq!(it.fate(syn), Some(&Fate::Released));
    let with_data = it.client(8, SYN, &asked);
    assert_eq!(it.fate(with_data), invalid);
    assert_eq!(reported(&mut it), [Reason::TcpInvalid]);
    let stats = it.tcp();
    assert_eq!((stats.opened, stats.half_open), (opened + 1, 1));
    // The record of that SYN counts for the open connection: one per second and reason.
    it.world.wait(1_000);
    // A SYN+ACK that acknowledges neither SYN, or acknowledges the first with another sequence number; a SYN that
    // acknowledges nothing.
    let neither = it.resolver_acknowledges(-1, 3, SYN | ACK, &[]);
    let of_another = it.resolver(8, SYN | ACK, &[]);
    let without = it.resolver(8, SYN, &[]);
    for handle in [neither, of_another, without] {
        assert_eq!(it.fate(handle), invalid);
    }
    // One record per second and reason.
    assert_eq!(reported(&mut it), [Reason::TcpInvalid]);
    it.world.wait(1_000);
    let again = it.resolver(8, SYN | ACK, &[]);
    assert_eq!(it.fate(again), invalid);
    assert_eq!(reported(&mut it), [Reason::TcpInvalid]);
    let with_data = it.client(-1, SYN, &asked);
    assert_eq!(it.fate(with_data), invalid);
    // The connection is unchanged: the same handshake again is forwarded, and so are the segments behind it.
    assert_eq!((it.tcp().connections, it.tcp().replaced), (1, 0));
    assert_eq!(it.slots[0].serial, 99);
    it.greet();
    let fin = it.client(0, FIN | ACK, &asked);
    assert_eq!(it.fate(fin), Some(&Fate::Released));
    let behind = it.client(asked.len() as i64, ACK, &asked);
    let before = it.client(0, FIN | ACK, &asked[..5]);
    let overlap = Some(&Fate::Discarded(Reason::TcpOverlap));
    assert_eq!((it.fate(behind), it.fate(before)), (overlap, overlap));
    let urgent = it.resolver(0, URG | ACK, &framed(&[address(7, "allowed.test")]));
    assert_eq!(it.fate(urgent), invalid);
    assert!(it.world.sink.learns.is_empty());
    it.world.end();
}

#[test]
fn a_syn_on_an_open_connection_takes_its_place_once_the_resolver_acknowledges_it() {
    for v6 in [false, true] {
        let mut it = Connection::with(&Limits::default(), v6, [asks(1), is_told(1)]);
        let syn = it.client(8, SYN, &[]);
        assert_eq!(it.fate(syn), Some(&Fate::Released));
        // Until then packets belong to the open connection, on which the resolver has not sent the bytes that the
        // candidate's data acknowledges.
        it.asked(7);
        let early = it.client_acknowledges(9, 501, ACK, &framed(&[query(8, "denied.test", A)]));
        assert_eq!(it.fate(early), Some(&Fate::Discarded(Reason::TcpOutOfWindow)));
        assert_eq!((it.tcp().connections, it.tcp().replaced), (1, 0));
        // An acknowledgement number that is one too low, one too high, and the right one.
        for (acknowledged, fate) in [
            (8, Fate::Discarded(Reason::TcpInvalid)),
            (10, Fate::Discarded(Reason::TcpInvalid)),
            (9, Fate::Released),
        ] {
            assert_eq!((it.tcp().replaced, it.slots[0].serial), (0, 99));
            let answer = it.resolver_acknowledges(500, acknowledged, SYN | ACK, &[]);
            assert_eq!(it.fate(answer), Some(&fate), "{acknowledged}");
        }
        assert_eq!((it.tcp().connections, it.tcp().replaced), (1, 1));
        assert_ne!(it.slots[0].serial, 99);
        // The new connection is inspected from its first byte.
        let ack = it.client_acknowledges(9, 501, ACK, &[]);
        assert_eq!(it.fate(ack), Some(&Fate::Released));
        let denied = framed(&[query(8, "denied.test", A)]);
        let handle = it.client_acknowledges(9, 501, ACK, &denied);
        assert_eq!(it.fate(handle), Some(&Fate::Discarded(Reason::AppDenied)));
        it.world.end();
    }
}

#[test]
fn only_an_acceptable_reset_is_forwarded() {
    let mut it = Connection::new();
    let asked = it.asked(7);
    let told = it.resolver(0, ACK, &framed(&[address(7, "allowed.test")]));
    let wild = it.client(asked + 1000, RST, &[]);
    let out_of_window = Some(&Fate::Discarded(Reason::TcpOutOfWindow));
    assert_eq!((it.fate(wild), it.fate(told)), (out_of_window, None));
    let right = it.client(asked, RST, &[]);
    assert_eq!(it.fate(right), Some(&Fate::Released));
    // Held bytes are still forwarded only if they are allowed.
    it.world.committed(false);
    assert_eq!(it.fate(told), Some(&Fate::Discarded(Reason::DnsUncommitted)));
    // The same ports again.
    it.greet();
    it.asked(8);
    it.world.end();
    // A reset behind held bytes: the resolver would not accept it.
    let mut it = Connection::new();
    let part = it.client(0, ACK, &[0, 30, 1, 2]);
    let reset = it.client(4, RST, &[]);
    let held = Some(&Fate::Discarded(Reason::TcpHeld));
    assert_eq!((it.fate(part), it.fate(reset)), (held, held));
    let made = it.made();
    assert_eq!(made.len(), 1);
    assert_eq!((made[0].to_client, made[0].at), (false, 0));
    it.world.end();
}

#[test]
fn limits_hold() {
    let limits = tcp(|limits| {
        limits.connections = 2;
        limits.connections_per_endpoint = 1;
        limits.bytes_per_direction = 100;
        limits.frames_per_direction = 3;
    });
    let limit = Some(&Fate::Discarded(Reason::InspectLimit));
    // With two inspectors nothing is acknowledged on behalf of the resolver.
    let mut it = Connection::with(&limits, false, [shared(asks(1)), shared(is_told(1))]);
    let refused = Fate::Discarded(Reason::InspectLimit);
    for (endpoint, fate) in [(1, &refused), (2, &Fate::Released), (3, &refused)] {
        assert_eq!(Other(endpoint, 4001).open(&mut it), *fate, "{endpoint}");
        if *fate == refused {
            let (verdict, reason, _) = it.world.verdict();
            assert_eq!((verdict, reason), (Verdict::Dropped, Reason::InspectLimit));
        }
    }
    assert_eq!((it.tcp().connections, it.tcp().limited), (2, 2));
    // A removed connection makes room.
    it.world.engine.forget_endpoint(2, &mut it.world.sink);
    assert_eq!(Other(3, 4001).open(&mut it), Fate::Released);
    assert_eq!(Other(2, 4001).open(&mut it), refused);
    let long = framed(&[query(7, &"a-label.".repeat(20), A)]);
    let mut at = 0;
    for number in 0..4 {
        let handle = it.client(at, ACK, &long[at as usize..][..10]);
        assert_eq!(it.fate(handle), if number == 3 { limit } else { None });
        at += if number == 3 { 0 } else { 10 };
    }
    let mut it = Connection::with(&limits, false, [asks(1), is_told(1)]);
    let handle = it.client(0, ACK, &long[..101]);
    assert_eq!(it.fate(handle), limit);
    assert_eq!(it.tcp().limited, 1);
    // An answer beyond the limit of held answers ends the connection.
    let mut it = Connection::with(
        &Limits {
            dns: DnsLimits {
                held: 0,
                ..DnsLimits::default()
            },
            ..Limits::default()
        },
        false,
        [asks(1), is_told(1)],
    );
    it.asked(7);
    let told = it.resolver(0, ACK, &framed(&[address(7, "allowed.test")]));
    assert_eq!(it.fate(told), limit);
    it.cut(Reason::InspectLimit);
    it.world.end();
}

/// Of eight connections endpoint 1 has one. Another endpoint may have six: then one is left, and three times one is
/// less than six.
#[test]
fn an_endpoint_gets_at_most_three_times_the_connections_that_are_left() {
    let limits = tcp(|limits| limits.connections = 8);
    let mut it = Connection::with(&limits, false, [asks(1), is_told(1)]);
    let refused = Fate::Discarded(Reason::InspectLimit);
    for port in 4001..=4006 {
        assert_eq!(Other(2, port).open(&mut it), Fate::Released, "{port}");
    }
    assert_eq!(Other(2, 4007).open(&mut it), refused);
    assert_eq!(Other(3, 4001).open(&mut it), Fate::Released);
    // No connection is left.
    assert_eq!(Other(4, 4001).open(&mut it), refused);
    let stats = it.tcp();
    assert_eq!((stats.connections, stats.half_open, stats.limited), (8, 0, 2));
    it.asked(7);
    it.world.end();
}

#[test]
fn half_open_connections_have_a_limit_of_their_own() {
    let limits = tcp(|limits| {
        limits.connections = 3;
        limits.connections_per_endpoint = 1;
        limits.half_open = 3;
    });
    let mut it = Connection::with(&limits, false, [asks(1), is_told(1)]);
    // More connections than the endpoint may have open.
    for port in 4001..=4003 {
        assert_eq!(Other(2, port).syn(&mut it), Fate::Released, "{port}");
    }
    let stats = it.tcp();
    assert_eq!(
        (stats.connections, stats.half_open, stats.half_open_evicted),
        (4, 3, 0)
    );
    // One more evicts the oldest of the endpoint that has most.
    assert_eq!(Other(3, 4001).syn(&mut it), Fate::Released);
    let stats = it.tcp();
    assert_eq!(
        (stats.half_open, stats.half_open_evicted, stats.limited),
        (3, 1, 0)
    );
    let forgotten = Fate::Discarded(Reason::TcpMidstream);
    assert_eq!(Other(2, 4001).syn_ack(&mut it), forgotten);
    for other in [Other(2, 4002), Other(2, 4003), Other(3, 4001)] {
        assert_eq!(other.syn_ack(&mut it), Fate::Released);
    }
    // With the SYN+ACK acknowledged a connection counts as open.
    assert_eq!(Other(3, 4001).ack(&mut it), Fate::Released);
    assert_eq!(it.tcp().half_open, 2);
    assert_eq!(
        Other(3, 4002).syn(&mut it),
        Fate::Discarded(Reason::InspectLimit),
        "endpoint 3 has the one that it may have"
    );
    // Idle half-open connections are removed, open ones are not.
    it.world.wait(9_999);
    assert_eq!(it.tcp().half_open, 2);
    it.world.wait(1);
    assert_eq!((it.tcp().connections, it.tcp().half_open), (2, 0));
    it.asked(7);
    it.world.end();
}

/// Returns a message of a zone transfer with this number of records.
fn zone(id: u16, kind: u16, records: u16, with_question: bool) -> Vec<u8> {
    let mut message = query(id, "allowed.test", kind);
    message[2] = 0x84;
    message[6..8].copy_from_slice(&records.to_be_bytes());
    if !with_question {
        message.truncate(12);
        message[5] = 0;
    }
    for number in 0..records {
        message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, number as u8]);
    }
    message
}

#[test]
fn all_messages_of_a_zone_transfer_are_forwarded_and_none_is_learned() {
    for kind in [251, 252] {
        let mut it = Connection::new();
        let asked = framed(&[query(7, "allowed.test", kind), query(8, "allowed.test", A)]);
        it.client(0, ACK, &asked);
        // More records than an answer may have, without a question from the second message on; then the answer.
        let stream = framed(&[
            zone(7, kind, 2100, true),
            zone(7, kind, 9, false),
            zone(7, kind, 2100, true),
            address(8, "allowed.test"),
            zone(7, kind, 9, false),
        ]);
        let answer = framed(&[zone(7, kind, 9, false)]).len();
        let own = stream.len() - answer - framed(&[address(8, "allowed.test")]).len();
        for at in (0..own).step_by(1400) {
            let told = it.resolver(at as i64, ACK, &stream[at..(at + 1400).min(own)]);
            assert_eq!(it.fate(told), Some(&Fate::Released), "{at}");
            it.client_acknowledges(asked.len() as i64, (at + 1400).min(own) as u32, ACK, &[]);
        }
        assert!(it.world.sink.learns.is_empty());
        let rest = it.resolver(own as i64, ACK, &stream[own..]);
        assert_eq!(it.fate(rest), None, "behind an answer that waits, it waits");
        it.world.committed(true);
        assert_eq!(it.fate(rest), Some(&Fate::Released));
        let stats = it.world.engine.stats().dns;
        assert_eq!((stats.transferred, stats.answers, stats.committed), (4, 2, 1));
        // Two questions, the first message, and the answer.
        assert_eq!(it.world.sink.records.len(), 4);
        assert!(it.world.sink.records.iter().all(|record| record.rule == 41));
        it.world.end();
    }
}

#[test]
fn a_message_of_no_transfer_resets_the_connection() {
    for message in [
        zone(8, 252, 1, true),
        zone(8, 252, 1, false),
        zone(7, 251, 1, true),
        answer(7, "denied.test", A, 0, &[]),
        query(7, "allowed.test", 252),
    ] {
        let mut it = Connection::new();
        it.client(0, ACK, &framed(&[query(7, "allowed.test", 252)]));
        let fine = framed(&[zone(7, 252, 1, true)]);
        let one = it.resolver(0, ACK, &fine);
        assert_eq!(it.fate(one), Some(&Fate::Released));
        let other = it.resolver(fine.len() as i64, ACK, &framed(&[message]));
        assert!(matches!(it.fate(other), Some(Fate::Discarded(_))));
        assert_eq!(it.tcp().cut, 1);
        it.world.end();
    }
    // Nor without a question.
    let mut it = Connection::new();
    let unsolicited = it.resolver(0, ACK, &framed(&[zone(7, 252, 1, true)]));
    assert!(matches!(it.fate(unsolicited), Some(Fate::Discarded(_))));
    it.world.end();
    // A zone that no rule allows.
    let mut it = Connection::new();
    let denied = query(7, "denied.test", 252);
    let bytes = framed(std::slice::from_ref(&denied));
    it.client(0, ACK, &bytes);
    assert_eq!(it.answered(0, bytes.len() as u32, 0), refusal(&denied, 5));
    it.world.end();
}

#[test]
fn the_number_of_open_transfers_is_limited() {
    let mut it = Connection::new();
    let (mut at, mut back) = (0, 0);
    for id in 0..100 {
        let asked = framed(&[query(id, "allowed.test", 252)]);
        let handle = it.client_acknowledges(at, back as u32, ACK, &asked);
        assert_eq!(it.fate(handle), Some(&Fate::Released), "{id}");
        at += asked.len() as i64;
        let told = framed(&[zone(id, 252, 3, true)]);
        let handle = it.resolver_acknowledges(back, at as u32, ACK, &told);
        assert_eq!(it.fate(handle), Some(&Fate::Released), "{id}");
        back += told.len() as i64;
    }
    for id in 100..=116 {
        let asked = framed(&[query(id, "allowed.test", 252)]);
        let handle = it.client_acknowledges(at, back as u32, ACK, &asked);
        let fate = match id {
            116 => Fate::Discarded(Reason::InspectLimit),
            _ => Fate::Released,
        };
        assert_eq!(it.fate(handle), Some(&fate), "{id}");
        at += asked.len() as i64;
    }
    it.world.end();
}

#[test]
fn audit_mode_forwards_what_it_records() {
    let mut it = Connection::with(&Limits::default(), false, [audit(asks(1)), audit(is_told(1))]);
    let denied = framed(&[query(7, "denied.test", A)]);
    let asked = it.client(0, ACK, &denied);
    assert_eq!(it.fate(asked), Some(&Fate::Released));
    assert_eq!(it.world.verdict(), (Verdict::Audit, Reason::AppDenied, ASKING));
    let told = it.resolver(0, ACK, &framed(&[address(7, "denied.test")]));
    assert_eq!(it.fate(told), None);
    it.world.committed(false);
    assert_eq!(it.fate(told), Some(&Fate::Released));
    // The bytes are no message: the connection is offloaded.
    let garbage = it.client(denied.len() as i64, ACK, &[0, 0, 0]);
    assert_eq!(it.fate(garbage), Some(&Fate::Released));
    assert_eq!(it.world.verdict(), (Verdict::Audit, Reason::AppMalformed, ASKING));
    let records = it.world.sink.records.len();
    let unread = it.client(9999, ACK, &denied);
    assert_eq!(it.fate(unread), Some(&Fate::Released));
    assert_eq!(it.world.sink.records.len(), records);
    // A connection without a seen handshake is recorded once.
    it.slots[0].serial = 55;
    for _ in 0..2 {
        let unknown = it.client(77, ACK, &denied);
        assert_eq!(it.fate(unknown), Some(&Fate::Released));
    }
    assert_eq!(it.world.sink.records.len(), records + 1);
    assert_eq!(it.world.last().reason, Reason::TcpMidstream);
    assert!(it.world.sink.emitted.is_empty());
    it.world.end();
    // An incomplete message is forwarded and the connection offloaded at the deadline.
    let mut it = Connection::with(&Limits::default(), false, [audit(asks(1)), audit(is_told(1))]);
    let part = it.client(0, ACK, &denied[..9]);
    it.world.wait(10);
    assert_eq!(it.fate(part), Some(&Fate::Absorbed));
    it.made();
    it.world.wait(9_990);
    assert_eq!(
        it.world.verdict(),
        (Verdict::Audit, Reason::InspectDeadline, ASKING)
    );
    assert_eq!(it.made()[0].payload, denied[..9]);
    let unread = it.client(9, ACK, b"anything");
    assert_eq!(it.fate(unread), Some(&Fate::Released));
    assert_eq!(it.tcp().cut, 0);
    it.world.end();
    // A limit does not stop them either.
    let limits = tcp(|limits| limits.connections = 0);
    let mut it = Connection::with(&limits, false, [audit(asks(1)), audit(is_told(1))]);
    assert_eq!(it.world.verdict(), (Verdict::Audit, Reason::InspectLimit, ASKING));
    let unread = it.client(0, ACK, &denied);
    assert_eq!(it.fate(unread), Some(&Fate::Released));
    it.world.end();
}

/// A receiver that reassembles segments and keeps the first copy of each byte.
#[derive(Default)]
struct Receiver {
    bytes: Vec<u8>,
    early: Vec<(usize, Vec<u8>)>,
}

impl Receiver {
    fn take(&mut self, at: usize, payload: &[u8]) {
        self.early.push((at, payload.to_vec()));
        while let Some((at, payload)) = self
            .early
            .iter()
            .find(|(at, payload)| *at <= self.bytes.len() && at + payload.len() > self.bytes.len())
            .cloned()
        {
            self.bytes.extend(&payload[self.bytes.len() - at..]);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sender {
    Client,
    Resolver,
}

/// A client, and a resolver that answers its queries.
#[derive(Default)]
struct Talk {
    /// Sender, offset and bytes of each segment, by its handle.
    sent: Vec<(usize, Sender, usize, Vec<u8>)>,
    at_client: Receiver,
    at_resolver: Receiver,
    /// Offset up to which the client's bytes are acknowledged to it.
    client_acknowledged: usize,
    /// Number of queries that the resolver has answered.
    answers: usize,
    /// Bytes that the resolver has sent.
    told: Vec<u8>,
}

impl Talk {
    /// Delivers all packets in flight, and those that they cause.
    fn settle(&mut self, it: &mut Connection, messages: &[Vec<u8>], size: usize, waits: bool) {
        if waits {
            it.world.wait(10);
        }
        for _ in 0..100 {
            let released: Vec<_> = it.world.sink.released.drain(..).collect();
            let made = it.made();
            let (client, resolver) = (self.at_client.bytes.len(), self.at_resolver.bytes.len());
            for handle in released {
                if let Some((_, from, at, payload)) = self.sent.iter().find(|(known, ..)| *known == handle) {
                    match from {
                        Sender::Client => self.at_resolver.take(*at, payload),
                        Sender::Resolver => self.at_client.take(*at, payload),
                    }
                }
            }
            for made in made {
                if made.to_client {
                    self.at_client.take(made.at as usize, &made.payload);
                    let acknowledged = made.acknowledges.unwrap_or(0) as usize;
                    self.client_acknowledged = self.client_acknowledged.max(acknowledged);
                } else {
                    self.at_resolver.take(made.at as usize, &made.payload);
                }
            }
            self.client_acknowledged = self.client_acknowledged.max(self.at_resolver.bytes.len());
            let asked = |count: usize| framed(&messages[..count]).len();
            let mut news = (client, resolver) != (self.at_client.bytes.len(), self.at_resolver.bytes.len());
            while self.answers < messages.len() && asked(self.answers + 1) <= self.at_resolver.bytes.len() {
                let id = self.answers as u16;
                self.answers += 1;
                let name = if messages[usize::from(id)][12] == 7 {
                    "allowed.test"
                } else {
                    "x.wild.test"
                };
                let says = framed(&[if id.is_multiple_of(2) {
                    address(id, name)
                } else {
                    answer(id, name, A, 3, &[])
                }]);
                for part in says.chunks(size) {
                    let at = self.told.len();
                    self.told.extend(part);
                    let acknowledged = self.at_resolver.bytes.len() as u32;
                    let handle = it.resolver_acknowledges(at as i64, acknowledged, ACK, part);
                    self.sent.push((handle, Sender::Resolver, at, part.to_vec()));
                }
                news = true;
            }
            while let Some(learn) = it.world.sink.learns.pop_front() {
                it.world.learned_one(learn, true);
                news = true;
            }
            if !news {
                return;
            }
            let (client, resolver) = (self.at_client.bytes.len(), self.at_resolver.bytes.len());
            it.resolver_acknowledges(self.told.len() as i64, resolver as u32, ACK, &[]);
            it.client_acknowledges(self.client_acknowledged as i64, client as u32, ACK, &[]);
        }
        panic!("they do not come to an end");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// For random segments in any order, with losses and contradicting retransmissions, and any acknowledgement of the
    /// resolver: it gets exactly the allowed bytes, and of a denied query at most the length.
    #[test]
    fn the_resolver_gets_what_is_allowed_and_nothing_else(
        names in prop::collection::vec(prop::sample::select(vec!["allowed.test", "x.wild.test", "denied.test"]), 1..5),
        pieces in prop::collection::vec((any::<prop::sample::Index>(), 1_usize..60, prop::bool::weighted(0.1), any::<bool>(), any::<bool>()), 0..60),
        lies in any::<bool>(),
    ) {
        let messages: Vec<_> = names.iter().enumerate().map(|(id, name)| query(id as u16, name, A)).collect();
        let stream = framed(&messages);
        let denied = names.iter().position(|name| *name == "denied.test");
        let allowed = framed(&messages[..denied.unwrap_or(messages.len())]).len();
        let mut it = Connection::new();
        let mut receiver = Receiver::default();
        let mut sent = vec![];
        let mut next = 0;
        // Random pieces first. Then all bytes from the acknowledged offset on, in order, until nothing is left.
        let in_order = (0..2 * stream.len().div_ceil(20)).map(|number| (number * 20 % (stream.len().div_ceil(20) * 20), 20, false, false, number % 3 == 0));
        let random = pieces.iter().map(|(at, length, changed, follows, lost)| {
            (if *follows { usize::MAX } else { at.index(stream.len()) }, *length, *changed, *lost, *lost && *follows)
        });
        for (number, (at, length, changed, lost, waits)) in random.chain(in_order).enumerate() {
            let at = if at == usize::MAX { next } else { at };
            let end = (at + length).min(stream.len());
            let at = if number < pieces.len() { at } else { at.max(receiver.bytes.len()) };
            if at >= end {
                continue;
            }
            let mut payload = stream[at..end].to_vec();
            if changed && at < next {
                // Only bytes that were sent before are changed. Changed new bytes would be the first copy.
                payload[0] ^= 0x20;
            }
            let handle = it.client(at as i64, ACK, &payload);
            prop_assert_eq!(handle + 1, it.world.sent);
            if waits {
                it.world.wait(10);
            }
            if !it.fate(handle).is_some_and(|fate| matches!(fate, Fate::Discarded(_))) && at <= next {
                next = next.max(end);
            }
            sent.push((handle, at, payload));
            let released: Vec<_> = it.world.sink.released.drain(..).collect();
            for handle in released {
                // Loss: a forwarded segment does not arrive.
                if !lost && let Some((_, at, payload)) = sent.iter().find(|(known, ..)| *known == handle) {
                    receiver.take(*at, payload);
                }
            }
            for made in it.made() {
                if !made.to_client && !lost {
                    receiver.take(made.at as usize, &made.payload);
                }
            }
            let got = receiver.bytes.len();
            prop_assert_eq!(&receiver.bytes, &stream[..got]);
            prop_assert!(got <= allowed + 2 * usize::from(denied.is_some()), "{} bytes", got);
            it.resolver_acknowledges(0, if lies { stream.len() } else { got } as u32, ACK, &[]);
        }
        // Lost bytes that were acknowledged on behalf of the resolver are retransmitted.
        for wait in [300, 600, 1200, 2400] {
            it.world.wait(wait);
            for made in it.made() {
                if !made.to_client {
                    receiver.take(made.at as usize, &made.payload);
                }
            }
            it.resolver_acknowledges(0, receiver.bytes.len() as u32, ACK, &[]);
        }
        prop_assert_eq!(&receiver.bytes, &stream[..receiver.bytes.len()]);
        if denied.is_none() {
            // A resolver that has acknowledged lost bytes does not get them again.
            prop_assert!(receiver.bytes.len() == stream.len() || lies);
        } else {
            // The queries before it get no answer.
            it.world.wait(10_000);
            prop_assert_eq!(it.tcp().answered + it.tcp().cut, 1);
        }
        it.world.end();
    }

    /// For any segmentation and order of both streams the client gets the answers to the queries that have reached the
    /// resolver, and behind them a response to the first denied one.
    #[test]
    fn the_client_gets_answers_and_then_a_refusal(
        names in prop::collection::vec(prop::sample::select(vec!["allowed.test", "x.wild.test", "denied.test"]), 1..6),
        sizes in prop::collection::vec(1_usize..50, 1..20),
        swaps in prop::collection::vec(any::<bool>(), 1..20),
        waits in prop::collection::vec(prop::bool::weighted(0.2), 1..20),
    ) {
        let messages: Vec<_> = names.iter().enumerate().map(|(id, name)| query(id as u16, name, A)).collect();
        let stream = framed(&messages);
        let denied = names.iter().position(|name| *name == "denied.test");
        let mut it = Connection::new();
        let mut talk = Talk::default();
        let (mut sizes, mut swaps, mut waits) = (sizes.iter().cycle(), swaps.iter().cycle(), waits.iter().cycle());
        // Perhaps in another order first, then from the acknowledged offset on until nothing changes.
        for round in 0..40 {
            let mut pieces = vec![];
            let mut at = talk.client_acknowledged;
            while at < stream.len() {
                let end = (at + sizes.next().unwrap()).min(stream.len());
                pieces.push((at, end));
                at = end;
            }
            if round == 0 {
                for index in 1..pieces.len() {
                    if *swaps.next().unwrap() {
                        pieces.swap(index - 1, index);
                    }
                }
            }
            for (at, end) in pieces {
                if at < talk.client_acknowledged && talk.client_acknowledged < end {
                    continue;
                }
                let acknowledged = talk.at_client.bytes.len() as u32;
                let handle = it.client_acknowledges(at as i64, acknowledged, ACK, &stream[at..end]);
                talk.sent.push((handle, Sender::Client, at, stream[at..end].to_vec()));
                talk.settle(&mut it, &messages, *sizes.next().unwrap(), *waits.next().unwrap());
            }
            talk.settle(&mut it, &messages, 9, round > 0);
        }
        let at_resolver = &talk.at_resolver.bytes;
        prop_assert_eq!(at_resolver, &stream[..at_resolver.len()]);
        let allowed = framed(&messages[..denied.unwrap_or(messages.len())]);
        prop_assert!(at_resolver.starts_with(&allowed));
        prop_assert!(at_resolver.len() <= allowed.len() + 2 * usize::from(denied.is_some()));
        let mut refusals = vec![];
        if let Some(denied) = denied {
            let refused = names.iter().zip(&messages).skip(denied);
            for (_, message) in refused.take_while(|(name, _)| **name == "denied.test") {
                refusals.push(refusal(message, 5));
            }
            prop_assert_eq!((it.tcp().answered, it.tcp().cut), (1, 0));
        } else {
            prop_assert_eq!(at_resolver, &stream);
            prop_assert_eq!((it.tcp().answered, it.tcp().cut), (0, 0));
        }
        let told = talk.told.len();
        prop_assert_eq!(&talk.at_client.bytes[..told], &talk.told);
        // Denied queries behind the first get responses with it if they have arrived by then.
        let answered = (usize::from(denied.is_some())..=refusals.len())
            .any(|count| talk.at_client.bytes[told..] == refusals[..count].concat());
        prop_assert!(answered);
        it.world.end();
    }
}

impl Connection {
    /// Returns an ICMP error of a router about a segment of the client or the resolver, in the form in which the BPF
    /// programs punt it, without the last `cut` bytes.
    fn error(&mut self, of_client: bool, at: i64, kind: [u8; 2], second: u32, cut: usize) -> usize {
        let (own, addresses) = if of_client {
            (CLIENT, self.addresses())
        } else {
            (RESOLVER, self.addresses().turned(&[]))
        };
        let sequence = own.wrapping_add(1).wrapping_add(at as u32);
        let quoted = segment(&addresses, sequence, 0, ACK, &[7; 500]);
        let mut frame = quoted[..14].to_vec();
        let header = if self.v6 { 40 } else { 20 };
        let quote = &quoted[14..14 + header + 8 - cut];
        if self.v6 {
            frame.extend([0x60, 0, 0, 0, 0, (8 + quote.len()) as u8, 58, 64]);
            frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 9]);
            frame.extend(&quoted[22..38]);
        } else {
            frame.extend([
                0x45,
                0,
                0,
                (28 + quote.len()) as u8,
                0,
                0,
                0,
                0,
                64,
                1,
                0,
                0,
                203,
                0,
                113,
                9,
            ]);
            frame.extend(&quoted[26..30]);
        }
        frame.extend([kind[0], kind[1], 0, 0]);
        frame.extend(second.to_be_bytes());
        frame.extend(quote);
        // The error has the direction of the other end's packets.
        let slot = self.slots[usize::from(of_client)];
        self.send(&slot, &frame)
    }
}

#[test]
fn errors_are_compared_with_the_bytes_in_flight() {
    let forged = Some(&Fate::Discarded(Reason::UnrelatedIcmp));
    for (v6, slots) in [false, true]
        .into_iter()
        .flat_map(|v6| [[asks(1), is_told(1)], [is_asked(1), tells(1)]].map(|slots| (v6, slots)))
    {
        let mut it = Connection::with(&Limits::default(), v6, slots);
        let kinds: &[[u8; 2]] = if v6 {
            &[[1, 0], [1, 4], [2, 0], [3, 0], [4, 1]]
        } else {
            &[[3, 0], [3, 3], [3, 4], [11, 0], [12, 0]]
        };
        let sent = it.asked(7);
        for kind in kinds {
            for (of_client, at, passes) in [
                (true, 0, true),
                (true, sent - 1, true),
                (true, sent + 1, false),
                (true, -1, false),
                (false, 0, true),
                (false, 1, false),
            ] {
                let handle = it.error(of_client, at, *kind, 1_280, 0);
                let fate = if passes { Some(&Fate::Released) } else { forged };
                assert_eq!(it.fate(handle), fate, "{kind:?} of client: {of_client}, {at}");
            }
        }
        assert_eq!(it.world.verdict().0, Verdict::Dropped);
        assert_eq!((it.tcp().icmp_errors, it.tcp().icmp_unrelated), (30, 15));
        // Such an error is not punted.
        let short = it.error(true, 0, kinds[0], 0, 1);
        assert_eq!(it.fate(short), forged);
        // The connection is unchanged.
        let denied = framed(&[query(8, "denied.test", A)]);
        let handle = it.client(sent, ACK, &denied);
        assert_eq!(it.fate(handle), None, "the first query waits for its answer");
        it.world.end();
    }
}

#[test]
fn a_connection_goes_on_after_a_restart_with_a_query_under_way() {
    for v6 in [false, true] {
        let mut connection = Connection::with(&Limits::default(), v6, [asks(1), is_told(1)]);
        let query = framed(&[query(7, "allowed.test", A)]);
        let asked = connection.client(0, ACK, &query);
        assert_eq!(connection.fate(asked), Some(&Fate::Released));
        assert_eq!(connection.world.hand_over(), 1);
        let answer = framed(&[answer(7, "allowed.test", A, 3, &[])]);
        let told = connection.resolver_acknowledges(0, query.len() as u32, ACK, &answer);
        assert_eq!(connection.fate(told), Some(&Fate::Released));
        assert_eq!(connection.world.hand_over(), 1);
        let denied = framed(&[self::query(8, "denied.test", A)]);
        let denied = connection.client_acknowledges(query.len() as i64, answer.len() as u32, ACK, &denied);
        assert_ne!(connection.fate(denied), Some(&Fate::Released));
    }
}
