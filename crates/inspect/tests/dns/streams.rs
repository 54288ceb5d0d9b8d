//! DNS over TCP.

use palisade_abi::{CarrySlot, Reason};
use palisade_inspect::{Limits, StreamLimits, record::Verdict};
use palisade_packet::{Packet, Start, decode};
use proptest::prelude::*;

use crate::common::*;

/// Initial sequence numbers: both wrap soon.
const CLIENT: u32 = u32::MAX - 9;
const RESOLVER: u32 = u32::MAX - 29;

/// A connection of endpoint 1.
struct Connection {
    world: World,
    v6: bool,
    slots: [CarrySlot; 2],
}

impl Connection {
    fn new() -> Self {
        Self::with(&Limits::default(), false, [asks(1), is_told(1)])
    }

    fn with(limits: &Limits, v6: bool, slots: [CarrySlot; 2]) -> Self {
        let mut connection = Self {
            world: World::new(limits),
            v6,
            slots,
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

    /// From the client, so many bytes behind its first one.
    fn client(&mut self, at: i64, flags: u8, payload: &[u8]) -> usize {
        self.client_acknowledges(at, 0, flags, payload)
    }

    fn client_acknowledges(&mut self, at: i64, acknowledged: u32, flags: u8, payload: &[u8]) -> usize {
        let sequence = CLIENT.wrapping_add(1).wrapping_add(at as u32);
        let acknowledgment = RESOLVER.wrapping_add(1).wrapping_add(acknowledged);
        let frame = segment(&self.addresses(), sequence, acknowledgment, flags, payload);
        self.world.send(&self.slots[0], &frame)
    }

    /// From the resolver; acknowledges nothing but the SYN.
    fn resolver(&mut self, at: i64, flags: u8, payload: &[u8]) -> usize {
        self.resolver_acknowledges(at, 0, flags, payload)
    }

    fn resolver_acknowledges(&mut self, at: i64, acknowledged: u32, flags: u8, payload: &[u8]) -> usize {
        let sequence = RESOLVER.wrapping_add(1).wrapping_add(at as u32);
        let acknowledgment = CLIENT.wrapping_add(1).wrapping_add(acknowledged);
        let addresses = self.addresses().turned(&[]);
        let frame = segment(&addresses, sequence, acknowledgment, flags, payload);
        self.world.send(&self.slots[1], &frame)
    }

    /// An allowed query and an acknowledgment of it; gives its length in the stream.
    fn asked(&mut self, id: u16) -> i64 {
        let query = framed(&[query(id, "allowed.test", A)]);
        let handle = self.client(0, ACK, &query);
        assert_eq!(self.fate(handle), Some(&Fate::Released));
        query.len() as i64
    }

    /// The last two packets that were made: a reset to the client and one to the resolver, with these bytes between
    /// their first and what they name.
    fn resets(&self, from_resolver: u32, from_client: u32) {
        let emitted = &self.world.sink.emitted;
        let [to_client, to_resolver] = emitted.last_chunk().expect("two resets");
        for ((frame, route), back, sequence) in [
            (
                to_client,
                true,
                RESOLVER.wrapping_add(1).wrapping_add(from_resolver),
            ),
            (
                to_resolver,
                false,
                CLIENT.wrapping_add(1).wrapping_add(from_client),
            ),
        ] {
            assert_eq!(route.back, back);
            let mut packet = Packet::default();
            decode(&frame[..], Start::Ethernet { tags_removed: 0 }, &mut packet).unwrap();
            let addresses = self.addresses();
            let (from, to) = if back {
                (addresses.destination, addresses.source)
            } else {
                (addresses.source, addresses.destination)
            };
            assert_eq!((packet.source, packet.source_port), (from.0.into(), from.1));
            assert_eq!((packet.destination, packet.destination_port), (to.0.into(), to.1));
            assert_eq!(packet.tcp_flags & RST, RST);
            let to_mac = if back { CLIENT_MAC } else { SERVER_MAC };
            assert_eq!(frame[..6], to_mac);
            let tcp = &frame[usize::from(packet.transport_offset)..];
            assert_eq!(tcp[4..8], sequence.to_be_bytes(), "to the client: {back}");
            // the sum, with TCP's number in the place of UDP's
            let sum = udp_sum(from.0, to.0, tcp);
            let expected = naive_sum(&[
                &(!sum).to_be_bytes(),
                &(6_u16).to_be_bytes(),
                &(!17_u16).to_be_bytes(),
            ]);
            assert_eq!(expected, 0);
        }
    }

    fn cut(&self, reason: Reason) {
        assert_eq!(self.world.verdict().1, reason);
        assert_eq!(self.world.engine.stats().streams.cut, 1);
    }
}

#[test]
fn a_query_and_its_answer() {
    for v6 in [false, true] {
        let mut it = Connection::with(&Limits::default(), v6, [asks(1), is_told(1)]);
        let asked = it.asked(7);
        assert_eq!(it.world.verdict(), (Verdict::Forwarded, Reason::Allowed, 41));
        assert_eq!(it.world.last().protocol, 6);
        let answer = framed(&[address(7, "allowed.test")]);
        let told = it.resolver_acknowledges(0, asked as u32, ACK, &answer);
        assert_eq!(it.fate(told), None);
        // what comes behind it waits with it
        let fin = it.resolver(answer.len() as i64, FIN | ACK, &[]);
        assert_eq!(it.fate(fin), None);
        it.world.sink.released.clear();
        it.world.learned(true);
        assert_eq!(it.world.sink.released, [told, fin]);
        assert_eq!(it.world.verdict(), (Verdict::Forwarded, Reason::Allowed, 41));
        let last = it.client_acknowledges(asked, answer.len() as u32 + 1, FIN | ACK, &[]);
        assert_eq!(it.fate(last), Some(&Fate::Released));
        // another connection between the same
        it.greet();
        it.asked(8);
        let stats = it.world.engine.stats().streams;
        assert_eq!((stats.begun, stats.open, stats.cut), (2, 1, 0));
        it.world.end();
    }
}

#[test]
fn a_denied_query_ends_the_connection() {
    for v6 in [false, true] {
        let mut it = Connection::with(&Limits::default(), v6, [asks(1), is_told(1)]);
        let asked = it.asked(7);
        let denied = framed(&[query(8, "denied.test", A)]);
        let first = it.client(asked, ACK, &denied[..20]);
        assert_eq!(it.fate(first), None);
        let second = it.client(asked + 20, ACK, &denied[20..]);
        let fate = Fate::Discarded(Reason::AppDenied);
        assert_eq!((it.fate(first), it.fate(second)), (Some(&fate), Some(&fate)));
        it.cut(Reason::AppDenied);
        it.resets(0, asked as u32);
        // nothing passes any more, and who does not know is told again
        let emitted = it.world.sink.emitted.len();
        let from_client = it.client(asked, ACK, &denied);
        let from_resolver = it.resolver(0, ACK, &framed(&[address(7, "allowed.test")]));
        assert_eq!(it.fate(from_client), Some(&fate));
        assert_eq!(it.fate(from_resolver), Some(&fate));
        assert_eq!(it.world.sink.emitted.len(), emitted + 2);
        it.resets(0, asked as u32);
        // the client may come again
        it.greet();
        it.asked(9);
        it.world.end();
    }
}

#[test]
fn several_queries_in_one_segment_pass_only_if_all_do() {
    let mut it = Connection::new();
    let both = framed(&[query(1, "allowed.test", A), query(2, "x.wild.test", A)]);
    let passes = it.client(0, ACK, &both);
    assert_eq!(it.fate(passes), Some(&Fate::Released));
    let mixed = framed(&[query(3, "allowed.test", A), query(4, "denied.test", A)]);
    let cut = it.client(both.len() as i64, ACK, &mixed);
    assert_eq!(it.fate(cut), Some(&Fate::Discarded(Reason::AppDenied)));
    it.cut(Reason::AppDenied);
    it.world.end();
}

#[test]
fn of_a_query_only_its_length_goes_ahead() {
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
fn a_long_answer_goes_on_but_for_its_end() {
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
    it.world.learned(true);
    assert_eq!(it.fate(last), Some(&Fate::Released));
    it.world.end();
}

#[test]
fn an_answer_that_may_not_pass_ends_the_connection() {
    let uncommitted = |it: &mut Connection| it.world.learned(false);
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
        (address(8, "allowed.test"), Reason::DnsUnasked),
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
fn answers_out_of_their_order_wait_for_each_other() {
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
    it.world.learned(true);
    assert_eq!(it.fate(one), Some(&Fate::Released));
    assert_eq!(it.fate(two), Some(&Fate::Released));
    it.world.end();
}

#[test]
fn what_is_said_again_must_be_the_same() {
    let mut it = Connection::new();
    let asked = it.asked(7);
    let said = framed(&[query(7, "allowed.test", A)]);
    let mut other = said.clone();
    *other.last_mut().unwrap() ^= 1;
    let again = it.client(0, ACK, &said);
    assert_eq!(it.fate(again), Some(&Fate::Released));
    let differs = it.client(0, ACK, &other);
    assert_eq!(it.fate(differs), Some(&Fate::Discarded(Reason::TcpOverlap)));
    // a part again, and what follows
    let denied = framed(&[query(8, "denied.test", A)]);
    let over = it.client(asked - 3, ACK, &[&other[other.len() - 3..], &denied].concat());
    assert_eq!(it.fate(over), Some(&Fate::Discarded(Reason::TcpOverlap)));
    let early = it.client(asked + 1, ACK, &denied[1..]);
    assert_eq!(it.fate(early), Some(&Fate::Discarded(Reason::TcpOutOfWindow)));
    // nor if the resolver claims to have it
    it.resolver_acknowledges(0, asked as u32, ACK, &[]);
    let acknowledged = it.client(0, ACK, &other);
    assert_eq!(it.fate(acknowledged), Some(&Fate::Discarded(Reason::TcpOverlap)));
    let before_all = it.client(-5, ACK, &said);
    assert_eq!(
        it.fate(before_all),
        Some(&Fate::Discarded(Reason::TcpOutOfWindow))
    );
    // what waits is not said again
    let part = it.client(asked, ACK, &denied[..9]);
    let part_again = it.client(asked, ACK, &denied[..9]);
    assert_eq!(it.fate(part), None);
    assert_eq!(
        it.fate(part_again),
        Some(&Fate::Discarded(Reason::InspectDeadline))
    );
    let stats = it.world.engine.stats().streams;
    assert_eq!((stats.contradicting, stats.early, stats.held), (3, 1, 1));
    it.world.end();
}

#[test]
fn what_is_long_gone_is_not_passed_again() {
    let limits = Limits {
        streams: StreamLimits {
            bytes: 800,
            ..StreamLimits::default()
        },
        ..Limits::default()
    };
    let mut it = Connection::with(&limits, false, [asks(1), is_told(1)]);
    let mut at = 0;
    // more than is kept
    for id in 0..100 {
        let query = framed(&[query(id, "allowed.test", A)]);
        let handle = it.client(at, ACK, &query);
        assert_eq!(it.fate(handle), Some(&Fate::Released), "{id}");
        let again = it.client(at, ACK, &query);
        assert_eq!(it.fate(again), Some(&Fate::Released), "{id}");
        at += query.len() as i64;
        it.resolver_acknowledges(0, at as u32, ACK, &[]);
    }
    let long_gone = it.client(0, ACK, &framed(&[query(0, "allowed.test", A)]));
    assert_eq!(it.fate(long_gone), Some(&Fate::Discarded(Reason::TcpOutOfWindow)));
    it.world.end();
}

#[test]
fn a_message_that_nobody_completes_ends_the_connection() {
    let mut it = Connection::new();
    let query = framed(&[query(7, "allowed.test", A)]);
    let part = it.client(0, ACK, &query[..9]);
    it.world.wait(9_999);
    assert_eq!(it.fate(part), None);
    assert!(
        it.world
            .engine
            .deadline()
            .is_some_and(|at| at <= it.world.now + 250)
    );
    it.world.wait(250);
    assert_eq!(it.fate(part), Some(&Fate::Discarded(Reason::InspectDeadline)));
    it.cut(Reason::InspectDeadline);
    it.resets(0, 0);
    it.world.end();
    // a FIN in the middle, a length that no message has, and one that is too long
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
fn connections_that_were_not_seen_from_their_start_begin_anew() {
    let mut it = Connection::new();
    it.world.engine.forget_endpoint(1, &mut it.world.sink);
    let asked = framed(&[query(7, "allowed.test", A)]);
    let handle = it.client(5, ACK, &asked);
    assert_eq!(it.fate(handle), Some(&Fate::Discarded(Reason::TcpMidstream)));
    it.resets(0, 5);
    let told = it.resolver(0, ACK, &asked);
    assert_eq!(it.fate(told), Some(&Fate::Discarded(Reason::TcpMidstream)));
    // nobody resets a reset
    let emitted = it.world.sink.emitted.len();
    let reset = it.client(5, RST, &[]);
    assert_eq!(it.fate(reset), Some(&Fate::Discarded(Reason::TcpMidstream)));
    assert_eq!(it.world.sink.emitted.len(), emitted);
    // nothing happens for long
    it.greet();
    it.world.wait(120_000);
    assert_eq!(it.world.engine.stats().streams.open, 0);
    // another connection, by its serial
    it.greet();
    it.slots[0].serial = 100;
    let stranger = it.client(0, ACK, &asked);
    assert_eq!(it.fate(stranger), Some(&Fate::Discarded(Reason::TcpMidstream)));
    it.world.end();
}

#[test]
fn what_receivers_could_read_differently_is_dropped() {
    let mut it = Connection::new();
    let asked = framed(&[query(7, "allowed.test", A)]);
    let invalid = Some(&Fate::Discarded(Reason::TcpInvalid));
    // another SYN, data in one, another SYN from the resolver, one of the wrong direction
    let syn = it.client(8, SYN, &[]);
    let with_data = it.client(-1, SYN, &asked);
    let syn_ack = it.resolver(8, SYN | ACK, &[]);
    let not_acknowledged = it.resolver_acknowledges(-1, 3, SYN | ACK, &[]);
    let both = it.resolver(-1, SYN, &[]);
    for handle in [syn, with_data, syn_ack, not_acknowledged, both] {
        assert_eq!(it.fate(handle), invalid);
    }
    // the same again is none of that
    it.greet();
    let fin = it.client(0, FIN | ACK, &asked);
    assert_eq!(it.fate(fin), Some(&Fate::Released));
    let behind = it.client(asked.len() as i64, ACK, &asked);
    let before = it.client(0, FIN | ACK, &asked[..5]);
    assert_eq!((it.fate(behind), it.fate(before)), (invalid, invalid));
    let urgent = it.resolver(0, URG | ACK, &asked);
    assert_eq!(it.fate(urgent), invalid);
    it.cut(Reason::TcpInvalid);
    it.world.end();
}

#[test]
fn a_reset_that_is_believed_ends_what_is_held() {
    let mut it = Connection::new();
    let asked = it.asked(7);
    let told = it.resolver(0, ACK, &framed(&[address(7, "allowed.test")]));
    let wild = it.client(asked + 1000, RST, &[]);
    assert_eq!((it.fate(wild), it.fate(told)), (Some(&Fate::Released), None));
    let right = it.client(asked, RST, &[]);
    assert_eq!(it.fate(right), Some(&Fate::Released));
    assert_eq!(it.fate(told), Some(&Fate::Discarded(Reason::TcpInvalid)));
    it.world.learned(true);
    assert_eq!(it.world.engine.stats().streams.open, 0);
    it.world.end();
}

#[test]
fn limits_hold() {
    let limits = Limits {
        streams: StreamLimits {
            streams: 2,
            streams_per_endpoint: 1,
            bytes: 100,
            segments: 3,
            ..StreamLimits::default()
        },
        ..Limits::default()
    };
    let limit = Some(&Fate::Discarded(Reason::InspectLimit));
    let mut it = Connection::with(&limits, false, [asks(1), is_told(1)]);
    let syn = |port| segment(&to_server(port, &[]), 1, 0, SYN, &[]);
    for (endpoint, port, fate) in [
        (1, 4001, limit),
        (2, 4001, Some(&Fate::Released)),
        (3, 4001, limit),
    ] {
        let handle = it.world.send(&asks(endpoint), &syn(port));
        assert_eq!(it.fate(handle), fate);
    }
    let long = framed(&[query(7, &"a-label.".repeat(20), A)]);
    let mut at = 0;
    for number in 0..4 {
        let handle = it.client(at, ACK, &long[at as usize..][..10]);
        assert_eq!(
            it.fate(handle),
            (number == 3).then_some(&Fate::Discarded(Reason::InspectLimit))
        );
        at += if number == 3 { 0 } else { 10 };
    }
    let mut it = Connection::with(&limits, false, [asks(1), is_told(1)]);
    let handle = it.client(0, ACK, &long[..101]);
    assert_eq!(it.fate(handle), limit);
    assert_eq!(it.world.engine.stats().streams.limited, 1);
    it.world.end();
}

#[test]
fn audit_mode_lets_pass_what_it_reports() {
    let mut it = Connection::with(&Limits::default(), false, [audit(asks(1)), audit(is_told(1))]);
    let denied = framed(&[query(7, "denied.test", A)]);
    let asked = it.client(0, ACK, &denied);
    assert_eq!(it.fate(asked), Some(&Fate::Released));
    assert_eq!(it.world.verdict(), (Verdict::Audit, Reason::AppDenied, ASKING));
    let told = it.resolver(0, ACK, &framed(&[address(7, "denied.test")]));
    assert_eq!(it.fate(told), None);
    it.world.learned(false);
    assert_eq!(it.fate(told), Some(&Fate::Released));
    // no message at all: from here on nothing is read
    let garbage = it.client(denied.len() as i64, ACK, &[0, 0, 0]);
    assert_eq!(it.fate(garbage), Some(&Fate::Released));
    assert_eq!(it.world.verdict(), (Verdict::Audit, Reason::AppMalformed, ASKING));
    let records = it.world.sink.records.len();
    let unread = it.client(9999, ACK, &denied);
    assert_eq!(it.fate(unread), Some(&Fate::Released));
    assert_eq!(it.world.sink.records.len(), records);
    // not seen from its start: reported once
    it.slots[0].serial = 55;
    for _ in 0..2 {
        let unknown = it.client(77, ACK, &denied);
        assert_eq!(it.fate(unknown), Some(&Fate::Released));
    }
    assert_eq!(it.world.sink.records.len(), records + 1);
    assert_eq!(it.world.last().reason, Reason::TcpMidstream);
    assert!(it.world.sink.emitted.is_empty());
    it.world.end();
}

/// What a receiver makes of segments: the first to say a byte is believed, in order.
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever is sent, in whatever pieces and order, lost, and said differently again, and whatever the resolver claims
    /// to have: it gets what policy allows, byte for byte, and of a denied query nothing but its length.
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
        // random pieces, then everything in order until it is through
        let in_order = (0..2 * stream.len().div_ceil(20)).map(|number| (number * 20 % (stream.len().div_ceil(20) * 20), 20, false, false));
        let random = pieces.iter().map(|(at, length, changed, follows, lost)| {
            (if *follows { usize::MAX } else { at.index(stream.len()) }, *length, *changed, *lost)
        });
        for (at, length, changed, lost) in random.chain(in_order) {
            let at = if at == usize::MAX { next } else { at };
            let end = (at + length).min(stream.len());
            if at >= end {
                continue;
            }
            let mut payload = stream[at..end].to_vec();
            if changed && at < next {
                // only what was said before is changed: else it is what is said
                payload[0] ^= 0x20;
            }
            let handle = it.client(at as i64, ACK, &payload);
            prop_assert_eq!(handle + 1, it.world.sent);
            if !it.fate(handle).is_some_and(|fate| matches!(fate, Fate::Discarded(_))) && at <= next {
                next = next.max(end);
            }
            sent.push((handle, at, payload));
            let released: Vec<_> = it.world.sink.released.drain(..).collect();
            for handle in released {
                // lost: a released segment does not arrive
                if !lost && let Some((_, at, payload)) = sent.iter().find(|(known, ..)| *known == handle) {
                    receiver.take(*at, payload);
                }
            }
            let got = receiver.bytes.len();
            prop_assert_eq!(&receiver.bytes, &stream[..got]);
            prop_assert!(got <= allowed + 2 * usize::from(denied.is_some()), "{} bytes", got);
            it.resolver_acknowledges(0, if lies { stream.len() } else { got } as u32, ACK, &[]);
        }
        if denied.is_none() {
            prop_assert_eq!(receiver.bytes.len(), stream.len());
        } else {
            prop_assert_eq!(it.world.engine.stats().streams.cut, 1);
        }
        it.world.end();
    }
}
