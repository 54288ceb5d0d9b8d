//! Tests of Kafka inspection through the engine, with a client and a broker that exchange segments.

use std::{collections::BTreeMap, sync::Arc};

use palisade_abi::{Inspector, PuntRequest, Reason, punt_flags};
use palisade_model::{
    rule::KafkaRule,
    snapshot::{Alternative, Matcher, RuleSet},
};
use palisade_protocols::kafka::{
    API_VERSIONS, CONSUMER_GROUP_HEARTBEAT, FETCH, METADATA, PRODUCE, SASL_HANDSHAKE,
};
use proptest::prelude::*;

use super::*;
use crate::{
    Engine, Limits, Rules,
    record::{Record, Verdict, What},
    tcp::tests::{ACK, FIN, Out, RST, SYN, Seg},
};

const RULESET: u32 = 4;
const OTHER: u32 = 5;
const EVERYTHING: u32 = 6;
/// Rules of which one has a topic only, and one names an API key that administers the cluster.
const ADMIN: u32 = 7;
/// Rules for one version each of Produce, with a topic, and of Heartbeat.
const VERSIONED: u32 = 8;
/// API key of AlterClientQuotas.
const QUOTAS: i16 = 49;
/// API key of AlterUserScramCredentials.
const CREDENTIALS: i16 = 51;
/// API key of InitProducerId.
const INIT: i16 = 22;
/// API key of Heartbeat.
const HEARTBEAT: i16 = 12;

fn rule(keys: &[i16], topic: Option<&str>) -> Matcher {
    Matcher::Kafka(KafkaRule {
        api_keys: keys.to_vec(),
        topic: topic.map(str::to_owned),
        ..KafkaRule::default()
    })
}

/// Returns a rule for one version of an API key.
fn version_rule(key: i16, version: i16, topic: Option<&str>) -> Matcher {
    Matcher::Kafka(KafkaRule {
        api_keys: vec![key],
        api_version: Some(version),
        topic: topic.map(str::to_owned),
        ..KafkaRule::default()
    })
}

fn set(matchers: Vec<Matcher>) -> Arc<RuleSet> {
    Arc::new(RuleSet {
        reads: Inspector::Kafka as u8,
        alternatives: (11..)
            .zip(matchers)
            .map(|(rule, matcher)| Alternative { rule, matcher })
            .collect(),
        ..RuleSet::default()
    })
}

/// A client, a broker, and the engine between them. Each side acknowledges the bytes that reach it.
struct Talk {
    engine: Engine<Vec<u8>>,
    out: Out,
    ruleset: u32,
    flags: u8,
    /// Identity of the broker.
    broker: u32,
    /// Next sequence number of the client and of the broker.
    sent: [u32; 2],
    /// Bytes that have reached the other side.
    got: [Vec<u8>; 2],
    /// Payloads of all packets that the broker has got, also of retransmissions.
    wire: Vec<u8>,
    /// Whether the FIN has reached the other side.
    closed: [bool; 2],
    reset: bool,
}

impl Talk {
    fn new() -> Self {
        Self::with(KafkaLimits::default())
    }

    fn with(kafka: KafkaLimits) -> Self {
        let allowed = set(vec![
            rule(&[PRODUCE, METADATA], Some("a")),
            rule(&[PRODUCE, FETCH, METADATA], Some("b")),
            rule(&[API_VERSIONS, SASL_HANDSHAKE], None),
            Matcher::Kafka(KafkaRule {
                client_id: Some("admin".into()),
                ..KafkaRule::default()
            }),
        ]);
        let sets = BTreeMap::from([
            (RULESET, allowed),
            (OTHER, set(vec![rule(&[FETCH], Some("a"))])),
            (ADMIN, set(vec![rule(&[], Some("a")), rule(&[QUOTAS], Some("b"))])),
            (
                VERSIONED,
                set(vec![
                    version_rule(PRODUCE, 7, Some("a")),
                    version_rule(HEARTBEAT, 0, None),
                ]),
            ),
            (EVERYTHING, set(vec![Matcher::Everything])),
        ]);
        let mut engine = Engine::new(&Limits {
            kafka,
            ..Limits::default()
        });
        engine.set_rules(Arc::new(Rules::prepare(&sets, None)));
        let mut talk = Self {
            engine,
            out: Out::default(),
            ruleset: RULESET,
            flags: 0,
            broker: 0,
            sent: [0, 0],
            got: [vec![], vec![]],
            wire: vec![],
            closed: [false; 2],
            reset: false,
        };
        talk.open();
        talk
    }

    fn open(&mut self) {
        self.put(Side::Client, SYN, b"");
        self.put(Side::Server, SYN | ACK, b"");
        self.put(Side::Client, ACK, b"");
    }

    fn put(&mut self, side: Side, flags: u8, data: &[u8]) {
        let seq = self.sent[side as usize];
        let syn = u32::from(self.sent[side.other() as usize] != 0);
        let ack = syn + self.got[side.other() as usize].len() as u32 + u32::from(self.closed[side as usize]);
        let seg = Seg::new(side, flags, seq, if flags & ACK == 0 { 0 } else { ack }, data);
        self.sent[side as usize] += data.len() as u32 + u32::from(flags & (SYN | FIN) != 0);
        let slot = PuntRequest {
            inspector: Inspector::Kafka as u8,
            ruleset: self.ruleset,
            rule: 3,
            flags: self.flags,
            remote_identity: self.broker,
            ..PuntRequest::default()
        };
        let (engine, out) = (&mut self.engine, &mut self.out);
        seg.view(slot, |view, frame| engine.packet(0, view, frame, out));
        self.deliver();
    }

    /// Delivers the forwarded and built packets to their receivers.
    fn deliver(&mut self) {
        let made = std::mem::take(&mut self.out.emitted);
        let released = std::mem::take(&mut self.out.released);
        let mut segs: Vec<Seg> = made.into_iter().map(|(seg, _)| seg).chain(released).collect();
        segs.sort_by_key(|seg| seg.seq.wrapping_sub(1));
        for seg in segs {
            self.reset |= seg.flags & RST != 0;
            if seg.from == Side::Client {
                self.wire.extend_from_slice(&seg.data);
            }
            let got = &mut self.got[seg.from as usize];
            let at = seg.seq.wrapping_sub(1) as usize;
            if seg.flags & (SYN | RST) != 0 || at > got.len() {
                continue;
            }
            let new = seg.data.get(got.len() - at..).unwrap_or_default();
            got.extend_from_slice(new);
            self.closed[seg.from.other() as usize] |= seg.flags & FIN != 0;
        }
    }

    /// Sends bytes of the client in segments of at most 1000 bytes, which the broker acknowledges.
    fn client(&mut self, data: &[u8]) {
        for part in data.chunks(1000) {
            self.put(Side::Client, ACK, part);
            self.put(Side::Server, ACK, b"");
        }
    }

    fn server(&mut self, data: &[u8]) {
        for part in data.chunks(1000) {
            self.put(Side::Server, ACK, part);
            self.put(Side::Client, ACK, b"");
        }
    }

    /// Lets the time pass after which a denied client gets the FIN.
    fn wait(&mut self) {
        self.engine.tick(1_000, &mut self.out);
        self.deliver();
    }

    fn records(&mut self) -> Vec<Record> {
        std::mem::take(&mut self.out.records)
    }

    fn stats(&self) -> KafkaStats {
        self.engine.stats().kafka
    }

    fn is_open(&self) -> bool {
        !self.reset && self.closed == [false; 2]
    }
}

/// Writes the fields of a message.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn i8(mut self, n: i8) -> Self {
        self.0.extend(n.to_be_bytes());
        self
    }
    fn i16(mut self, n: i16) -> Self {
        self.0.extend(n.to_be_bytes());
        self
    }
    fn i32(mut self, n: i32) -> Self {
        self.0.extend(n.to_be_bytes());
        self
    }
    fn text(self, text: &str) -> Self {
        self.i16(text.len() as i16).raw(text.as_bytes())
    }
    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
    /// Puts the size in front.
    fn framed(self) -> Vec<u8> {
        let mut message = (self.0.len() as i32).to_be_bytes().to_vec();
        message.extend(self.0);
        message
    }
}

/// Returns a request of the client `c` without its size.
fn head(key: i16, version: i16, correlation: i32) -> Message {
    Message::default()
        .i16(key)
        .i16(version)
        .i32(correlation)
        .text("c")
}

/// Returns a Produce request of version 7 with one partition of each topic.
fn produce(correlation: i32, acks: i16, topics: &[&str], records: usize) -> Vec<u8> {
    let head = head(PRODUCE, 7, correlation)
        .i16(-1)
        .i16(acks)
        .i32(1000)
        .i32(topics.len() as i32);
    let body = topics.iter().fold(head, |body, topic| {
        body.text(topic)
            .i32(1)
            .i32(0)
            .i32(records as i32)
            .raw(&vec![b'r'; records])
    });
    body.framed()
}

/// Returns a Metadata request of version 4.
fn metadata(correlation: i32, topics: &[&str]) -> Vec<u8> {
    let head = head(METADATA, 4, correlation).i32(topics.len() as i32);
    topics
        .iter()
        .fold(head, |body, topic| body.text(topic))
        .i8(0)
        .framed()
}

/// Returns a Fetch request of version 11.
fn fetch(correlation: i32, session: (i32, i32), topics: &[&str]) -> Vec<u8> {
    let head = head(FETCH, 11, correlation)
        .i32(-1)
        .i32(500)
        .i32(1)
        .i32(1000)
        .i8(0)
        .i32(session.0)
        .i32(session.1)
        .i32(topics.len() as i32);
    let body = topics.iter().fold(head, |body, topic| {
        body.text(topic)
            .i32(1)
            .i32(0)
            .i32(-1)
            .i32(0)
            .i32(0)
            .i32(0)
            .i32(0)
            .i32(100)
    });
    body.i32(0).text("").framed()
}

/// Returns a ConsumerGroupHeartbeat request of version 0 that subscribes to a topic and owns a partition of another one.
fn group_heartbeat(correlation: i32, topic: &str, id: [u8; 16]) -> Vec<u8> {
    head(CONSUMER_GROUP_HEARTBEAT, 0, correlation)
        .raw(b"\0\x02g\x02m\0\0\0\x01\0\0\0\0\0\x01\x02")
        .i8(topic.len() as i8 + 1)
        .raw(topic.as_bytes())
        .raw(b"\0\x02")
        .raw(&id)
        .raw(b"\x02\0\0\0\0\0\0")
        .framed()
}

/// Returns a Fetch response of version 11 without topics.
fn fetched(correlation: i32, session: i32) -> Vec<u8> {
    Message::default()
        .i32(correlation)
        .i32(0)
        .i16(0)
        .i32(session)
        .i32(0)
        .framed()
}

/// Returns a Fetch request of version 13, which names a topic by its id.
fn fetch_id(correlation: i32, id: [u8; 16]) -> Vec<u8> {
    head(FETCH, 13, correlation)
        .i8(0)
        .i32(-1)
        .i32(500)
        .i32(1)
        .i32(1000)
        .i8(0)
        .i32(0)
        .i32(-1)
        .i8(2)
        .raw(&id)
        .i8(2)
        .raw(&[0; 32])
        .i8(0)
        .i8(0)
        .i8(1)
        .i8(1)
        .i8(0)
        .framed()
}

/// Returns a response with a body that is not read.
fn response(correlation: i32, length: usize) -> Vec<u8> {
    Message::default().i32(correlation).raw(&vec![0; length]).framed()
}

/// Returns a Metadata response of version 12 with one topic.
fn metadata_response(correlation: i32, name: &str, id: [u8; 16]) -> Vec<u8> {
    Message::default()
        .i32(correlation)
        .i8(0)
        .i32(0)
        .i8(1)
        .i8(0)
        .i32(1)
        .i8(2)
        .i16(0)
        .i8(name.len() as i8 + 1)
        .raw(name.as_bytes())
        .raw(&id)
        .i8(0)
        .i8(1)
        .i32(0)
        .i8(0)
        .i8(0)
        .framed()
}

/// Reads the fields of a response, independent of the parser under test.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (taken, rest) = self.0.split_at(N);
        self.0 = rest;
        taken.try_into().unwrap()
    }
    fn i16(&mut self) -> i16 {
        i16::from_be_bytes(self.take())
    }
    fn i32(&mut self) -> i32 {
        i32::from_be_bytes(self.take())
    }
    fn text(&mut self) -> String {
        let length = self.i16() as usize;
        let (text, rest) = self.0.split_at(length);
        self.0 = rest;
        String::from_utf8(text.to_vec()).unwrap()
    }
}

fn topic_of(record: &Record) -> String {
    let What::Kafka { topic, .. } = record.what else {
        panic!("{record:?}")
    };
    String::from_utf8(topic.bytes().to_vec()).unwrap()
}

#[test]
fn an_allowed_request_and_its_response_are_forwarded() {
    let mut talk = Talk::new();
    let request = produce(77, 1, &["a"], 10);
    talk.client(&request);
    assert_eq!(talk.got[0], request);
    let answer = response(77, 30);
    talk.server(&answer);
    assert_eq!(talk.got[1], answer);
    let records = talk.records();
    let What::Kafka {
        key,
        version,
        correlation,
        error,
        topic,
        client,
    } = records[0].what
    else {
        panic!("{:?}", records[0])
    };
    assert_eq!((key, version, correlation, error), (PRODUCE, 7, 77, 0));
    assert_eq!((topic.bytes(), client.bytes()), (&b"a"[..], &b"c"[..]));
    assert_eq!((records[0].verdict, records[0].rule), (Verdict::Forwarded, 11));
    assert!(records[1].reply && records[1].latency == Some(0));
    let stats = talk.stats();
    assert_eq!((stats.requests, stats.denied, stats.responses), (1, 0, 1));
    assert!(talk.is_open());
}

#[test]
fn a_denied_produce_request_gets_error_29_and_is_not_forwarded() {
    let mut talk = Talk::new();
    talk.client(&produce(78, -1, &["a", "secret"], 10));
    assert_eq!(talk.got[0], b"");
    let mut fields = Fields(&talk.got[1]);
    assert_eq!(fields.i32() as usize + 4, talk.got[1].len());
    assert_eq!((fields.i32(), fields.i32()), (78, 2));
    for topic in ["a", "secret"] {
        assert_eq!(fields.text(), topic);
        assert_eq!((fields.i32(), fields.i32(), fields.i16()), (1, 0, 29));
        // Base offset, append time, log start offset.
        assert_eq!(fields.take::<24>(), [0xff; 24]);
    }
    assert_eq!((fields.i32(), fields.0), (0, &[][..]));
    assert_eq!(
        talk.closed,
        [false, true],
        "the client reads the response before the end"
    );
    talk.wait();
    assert_eq!(talk.closed, [true, true]);
    assert!(!talk.reset);
    let records = talk.records();
    assert_eq!(
        (records[0].verdict, records[0].reason, records[0].rule),
        (Verdict::Dropped, Reason::AppDenied, 3)
    );
    assert_eq!(topic_of(&records[0]), "secret");
    assert!(matches!(records[0].what, What::Kafka { error: 29, .. }));
}

#[test]
fn a_denied_request_without_topics_gets_error_31() {
    let mut talk = Talk::new();
    talk.client(&head(HEARTBEAT, 3, 5).text("g").i32(1).text("m").i16(-1).framed());
    let mut fields = Fields(&talk.got[1]);
    assert_eq!(
        (fields.i32(), fields.i32(), fields.i32(), fields.i16()),
        (10, 5, 0, 31)
    );
    assert_eq!(talk.got[0], b"");
    let mut talk = Talk::new();
    talk.client(&head(INIT, 1, 6).i16(-1).i32(0).framed());
    let mut fields = Fields(&talk.got[1]);
    assert_eq!(
        (fields.i32(), fields.i32(), fields.i32(), fields.i16()),
        (20, 6, 0, 31)
    );
    assert_eq!(fields.0, [0xff; 10]);
}

#[test]
fn a_denied_metadata_request_names_the_broker() {
    let mut talk = Talk::new();
    talk.client(&metadata(9, &["a", "secret"]));
    let mut fields = Fields(&talk.got[1]);
    let (_, correlation, throttle) = (fields.i32(), fields.i32(), fields.i32());
    assert_eq!((correlation, throttle, fields.i32()), (9, 0, 1));
    let (id, host, port) = (fields.i32(), fields.text(), fields.i32());
    assert!(
        id > 100_000 && host.parse::<std::net::IpAddr>().is_ok() && port > 0,
        "{id} {host} {port}"
    );
    // Rack, cluster id, controller.
    assert_eq!((fields.i16(), fields.i16(), fields.i32()), (-1, -1, -1));
    assert_eq!(fields.i32(), 2);
    for topic in ["a", "secret"] {
        assert_eq!((fields.i16(), fields.text().as_str()), (29, topic));
        assert_eq!((fields.take(), fields.i32()), ([0], 0));
    }
    assert_eq!(fields.0, b"");
}

#[test]
fn pipelined_requests_get_responses_in_order() {
    let mut talk = Talk::new();
    let fine = [produce(1, 1, &["a"], 3), produce(2, 1, &["b"], 3)].concat();
    let stream = [&fine[..], &produce(3, 1, &["x"], 3), &produce(4, 1, &["a"], 3)].concat();
    talk.client(&stream);
    assert_eq!(talk.got[0], fine);
    talk.server(&response(1, 30));
    assert_eq!(talk.got[1], response(1, 30), "the second is not answered yet");
    talk.server(&response(2, 300));
    let answered = [response(1, 30), response(2, 300)].concat();
    assert!(talk.got[1].starts_with(&answered));
    let mut fields = Fields(&talk.got[1][answered.len()..]);
    fields.i32();
    assert_eq!(fields.i32(), 3);
    talk.wait();
    assert_eq!(talk.closed, [true, true]);
    assert_eq!(
        talk.got[0], fine,
        "what follows a denied request is not forwarded"
    );
}

#[test]
fn requests_with_the_same_correlation_id_get_responses_in_order() {
    let mut talk = Talk::new();
    let fine = [produce(1, 1, &["a"], 3), fetch(1, (0, -1), &["b"])].concat();
    talk.client(&[&fine[..], &produce(1, 1, &["x"], 3)].concat());
    assert_eq!(talk.got[0], fine);
    let answers = [response(1, 30), fetched(1, 0)];
    talk.server(&answers[0]);
    assert_eq!(talk.got[1], answers[0]);
    talk.server(&answers[1]);
    let denied = talk.got[1].strip_prefix(&answers.concat()[..]).unwrap();
    let mut fields = Fields(denied);
    assert_eq!((fields.i32(), fields.i32(), fields.i32()), (49, 1, 1));
    assert_eq!(fields.text(), "x");
}

/// A long response flows while a denied request waits behind it.
#[test]
fn a_denied_request_waits_for_the_end_of_a_response() {
    for length in [300, 3_000, 300_000] {
        let mut talk = Talk::new();
        let (fine, answer) = (fetch(1, (0, -1), &["b"]), response(1, length));
        talk.client(&[&fine[..], &produce(2, 1, &["x"], 3)].concat());
        talk.server(&answer[..answer.len() - 1]);
        assert_eq!(talk.got[1], answer[..answer.len() - 1], "{length}");
        talk.server(&answer[answer.len() - 1..]);
        let denied = talk.got[1].strip_prefix(&answer[..]).unwrap();
        assert_eq!(Fields(&denied[4..]).i32(), 2, "{length}");
        assert!(!talk.reset);
    }
}

/// The server stops within a response. The response to the denied request behind it must not continue that one.
#[test]
fn a_denied_request_behind_a_response_without_an_end_resets_the_connection() {
    let mut talk = Talk::new();
    let (fine, answer) = (fetch(1, (0, -1), &["b"]), response(1, 3_000));
    talk.client(&[&fine[..], &produce(2, 1, &["x"], 3)].concat());
    talk.server(&answer[..1_000]);
    talk.engine.tick(60_000, &mut talk.out);
    talk.deliver();
    assert!(talk.got[1] == answer[..1_000] && talk.reset);
}

#[test]
fn a_client_that_has_closed_its_half_gets_its_response() {
    let mut talk = Talk::new();
    let request = fetch(1, (0, -1), &["b"]);
    talk.put(Side::Client, ACK | FIN, &request);
    assert_eq!((&talk.got[0], talk.closed[1]), (&request, true));
    talk.put(Side::Server, ACK, b"");
    talk.server(&response(1, 3_000));
    assert_eq!(talk.got[1], response(1, 3_000));
    talk.put(Side::Server, ACK | FIN, b"");
    assert_eq!((talk.closed, talk.reset), ([true, true], false));
}

#[test]
fn a_denied_request_with_a_fin_gets_its_response_and_is_not_forwarded() {
    let mut talk = Talk::new();
    talk.put(Side::Client, ACK | FIN, &produce(3, 1, &["x"], 3));
    assert_eq!(talk.got[0], b"");
    assert_eq!(Fields(&talk.got[1][4..]).i32(), 3);
    talk.wait();
    assert!(!talk.reset);
}

#[test]
fn records_are_not_read() {
    // Compressed records that end within a block, and ones with a length beyond the request.
    for garbage in [
        &b"\x1f\x8b\x08\xff\xff\xff"[..],
        &[0xff; 61],
        &[0x28, 0xb5, 0x2f, 0xfd, 0x80],
    ] {
        for (topic, passes) in [("a", true), ("x", false)] {
            let mut request = produce(1, 1, &[topic], 400);
            let at = request.len() - 400;
            request[at..at + garbage.len()].copy_from_slice(garbage);
            let mut talk = Talk::new();
            talk.client(&request);
            assert_eq!(talk.got[0] == request, passes, "{topic}");
            assert!(!talk.reset);
        }
    }
}

#[test]
fn a_denied_produce_request_without_acks_resets_the_connection() {
    let mut talk = Talk::new();
    talk.client(&produce(1, 0, &["a"], 3));
    talk.client(&produce(2, 0, &["secret"], 3));
    assert_eq!(talk.got[0], produce(1, 0, &["a"], 3));
    assert_eq!(talk.got[1], b"");
    assert!(talk.reset);
}

#[test]
fn no_response_is_awaited_to_a_produce_request_without_acks() {
    let mut talk = Talk::new();
    talk.client(&produce(1, 0, &["a"], 3));
    talk.client(&produce(2, 1, &["a"], 3));
    talk.server(&response(2, 30));
    assert_eq!(talk.got[1], response(2, 30));
    assert!(talk.is_open());
}

#[test]
fn a_request_is_evaluated_however_it_is_cut() {
    let requests = [produce(1, 1, &["a", "b"], 40), metadata(2, &["a", "b"])].concat();
    for size in [1, 2, 3, 7, 40] {
        let mut talk = Talk::new();
        for part in requests.chunks(size) {
            talk.client(part);
        }
        assert_eq!(talk.got[0], requests, "{size}");
        let mut talk = Talk::new();
        for part in produce(3, 1, &["a", "secret"], 40).chunks(size) {
            talk.client(part);
        }
        assert!(
            talk.got[0].len() < produce(3, 1, &["a", "secret"], 40).len(),
            "{size}"
        );
        assert_eq!(Fields(&talk.got[1][4..]).i32(), 3, "{size}");
    }
}

#[test]
fn a_long_request_for_one_topic_flows_without_being_kept() {
    let mut talk = Talk::with(KafkaLimits::default().with_max_request(8000));
    let request = produce(1, 1, &["a"], 100_000);
    talk.client(&request);
    assert_eq!(talk.got[0].len(), request.len());
    assert_eq!(talk.stats().tcp.bytes, 0);
    talk.server(&response(1, 30));
    assert!(talk.is_open());
    // A longer one for several topics cannot be evaluated as a whole.
    talk.client(&produce(2, 1, &["a", "b"], 9000));
    assert!(talk.reset);
    assert_eq!(
        talk.stats().malformed[palisade_protocols::kafka::ParseError::TooLong as usize],
        1
    );
    // The first topic is denied.
    let mut talk = Talk::with(KafkaLimits::default().with_max_request(8000));
    talk.client(&produce(1, 1, &["secret"], 100_000));
    assert!(talk.reset && talk.got[0].len() < 100_000);
}

#[test]
fn the_last_byte_of_a_request_waits_for_the_verdict() {
    let mut talk = Talk::new();
    let request = produce(1, 1, &["a", "b"], 3000);
    talk.client(&request[..request.len() - 1]);
    assert_eq!(talk.got[0].len(), request.len() - 1, "all others flow");
    talk.client(&request[request.len() - 1..]);
    assert_eq!(talk.got[0], request);
    let mut talk = Talk::new();
    let request = produce(1, 1, &["a", "secret"], 3000);
    talk.client(&request);
    assert!(talk.got[0].len() < request.len());
    assert!(talk.closed[1], "the broker gets the end of the connection");
    assert_eq!(Fields(&talk.got[1][4..]).i32(), 1);
}

#[test]
fn a_long_request_that_the_header_denies_gets_its_response() {
    let mut talk = Talk::new();
    // Its rules allow only Fetch.
    talk.ruleset = OTHER;
    let request = produce(1, 1, &["a"], 200_000);
    let (rest, last) = request.split_at(request.len() - 1);
    talk.client(rest);
    assert_eq!(
        talk.got[0].len(),
        rest.len(),
        "the receive window of the broker does not have to hold the request"
    );
    talk.client(last);
    assert_eq!(talk.got[0].len(), rest.len());
    assert_eq!(Fields(&talk.got[1][4..]).i32(), 1);
    assert!(matches!(talk.records()[0].what, What::Kafka { error: 29, .. }));
}

/// A segment repeats acknowledged bytes and continues with new ones, which the worker then acknowledges on behalf of the
/// broker. The broker must get them although the request is incomplete: its window can be shorter than the request.
#[test]
fn new_bytes_behind_repeated_ones_arrive_before_the_request_is_complete() {
    let request = produce(1, 1, &["a", "b"], 10_000);
    let mut talk = Talk::new();
    let first = talk.sent[0];
    talk.client(&request[..900]);
    assert_eq!(talk.got[0], request[..900]);
    talk.sent[0] = first + 400;
    talk.put(Side::Client, ACK, &request[400..1_400]);
    assert_eq!(talk.got[0], request[..1_400]);
    talk.client(&request[1_400..2_300]);
    assert_eq!(talk.got[0], request[..2_300]);
    talk.client(&request[2_300..]);
    assert_eq!(talk.got[0], request);
    // Not so if the request is denied.
    let request = produce(1, 1, &["a", "x"], 450);
    let mut talk = Talk::new();
    talk.client(&request[..900]);
    talk.sent[0] = first + 400;
    talk.put(Side::Client, ACK, &request[400..]);
    assert_eq!(talk.got[0], request[..900]);
    assert_eq!(Fields(&talk.got[1][4..]).i32(), 1);
}

/// The first packet of an allowed request is lost behind the node, and the client sends another one instead.
#[test]
fn a_evaluated_request_cannot_be_replaced_by_a_retransmission() {
    for length in [1_000, 20_000, 200_000] {
        let by_topic = produce(1, 1, &["b"], length);
        let mut by_client = Message::default().i16(FETCH).i16(11).i32(1).text("admin");
        by_client.0.resize(length, 7);
        for (request, allowed, denied) in [
            (by_topic, &b"\0\x01b"[..], &b"\0\x01x"[..]),
            (by_client.framed(), b"admin", b"other"),
        ] {
            let mut parts = request.windows(allowed.len());
            let at = parts.position(|part| part == allowed).unwrap();
            let mut other = request[..900].to_vec();
            other[at..at + denied.len()].copy_from_slice(denied);
            let mut talk = Talk::new();
            let first = talk.sent[0];
            talk.put(Side::Client, ACK, &request[..900]);
            assert_eq!(talk.got[0], request[..900], "{length}");
            for part in request[900..].chunks(900) {
                talk.put(Side::Client, ACK, part);
                let next = std::mem::replace(&mut talk.sent[0], first);
                talk.put(Side::Client, ACK, &other);
                talk.sent[0] = next;
            }
            let mut parts = talk.wire.windows(denied.len());
            assert!(parts.all(|part| part != denied), "{length}");
            assert_eq!(talk.got[0], request, "{length}");
        }
    }
}

#[test]
fn the_client_id_and_unknown_keys_are_evaluated() {
    let named = |key: i16, version: i16, client: &str| {
        Message::default()
            .i16(key)
            .i16(version)
            .i32(1)
            .text(client)
            .raw(&[0; 20])
            .framed()
    };
    let passes = |request: &[u8], ruleset: u32| {
        let mut talk = Talk::new();
        talk.ruleset = ruleset;
        talk.client(request);
        talk.got[0] == request
    };
    assert!(passes(&named(INIT, 1, "admin"), RULESET));
    assert!(!passes(&named(INIT, 1, "c"), RULESET));
    assert!(
        !passes(&named(93, 0, "admin"), RULESET),
        "an unknown key needs a rule for everything"
    );
    assert!(passes(&named(93, 0, "admin"), EVERYTHING));
    assert!(
        passes(&named(API_VERSIONS, 99, "c"), RULESET),
        "any version of a key without topics"
    );
    assert!(
        !passes(&named(METADATA, 99, "c"), RULESET),
        "a version whose topics cannot be read"
    );
    assert!(
        !passes(&named(PRODUCE, 99, "admin"), RULESET),
        "its acks are not known"
    );
}

#[test]
fn a_rule_for_a_version_allows_no_other_version() {
    // Requests of these versions have the same fields.
    let produce = |version: i16, topic: &str| {
        let mut request = produce(1, 1, &[topic], 10);
        request[6..8].copy_from_slice(&version.to_be_bytes());
        request
    };
    let heartbeat = |version: i16| head(HEARTBEAT, version, 1).text("g").i32(1).text("m").framed();
    for (request, error) in [
        (produce(7, "a"), None),
        (produce(6, "a"), Some(29)),
        (produce(8, "a"), Some(29)),
        (produce(7, "b"), Some(29)),
        (heartbeat(0), None),
        (heartbeat(1), Some(31)),
        (heartbeat(2), Some(31)),
    ] {
        let mut talk = Talk::new();
        talk.ruleset = VERSIONED;
        talk.client(&request);
        let case = format!("{request:?}");
        let expected = if error.is_none() { &request[..] } else { b"" };
        assert_eq!(talk.got[0], expected, "{case}");
        let record = talk.records()[0];
        let What::Kafka { error: told, .. } = record.what else {
            panic!("{record:?}")
        };
        assert_eq!(told, error.unwrap_or(0), "{case}");
        assert_eq!(record.verdict == Verdict::Dropped, error.is_some(), "{case}");
    }
}

#[test]
fn a_rule_for_a_topic_does_not_allow_to_administer_the_cluster() {
    let passes = |key: i16| {
        let mut talk = Talk::new();
        talk.ruleset = ADMIN;
        let request = head(key, 0, 1).raw(&[0; 20]).framed();
        talk.client(&request);
        talk.got[0] == request
    };
    assert!(passes(HEARTBEAT) && passes(INIT), "clients of a topic need these");
    assert!(passes(QUOTAS), "a rule names this key");
    // Tokens, groups, credentials, features, brokers.
    for key in [38, 39, 40, 42, 48, 50, CREDENTIALS, 57, 64, 67, i16::MIN, -1] {
        assert!(!passes(key), "{key}");
    }
}

#[test]
fn metadata_of_all_topics_is_denied_by_a_rule_for_one() {
    for request in [
        head(METADATA, 4, 1).i32(-1).i8(0).framed(),
        head(METADATA, 0, 1).i32(0).framed(),
    ] {
        let mut talk = Talk::new();
        talk.client(&request);
        assert_eq!(talk.got[0], b"");
        assert_eq!(topic_of(&talk.records()[0]), "*");
    }
    let mut talk = Talk::new();
    talk.client(&metadata(1, &[]));
    assert_eq!(
        talk.got[0],
        metadata(1, &[]),
        "clients ask for no topic to get the brokers"
    );
}

#[test]
fn a_topic_id_is_evaluated_by_the_name_that_metadata_has_told() {
    let (known, other, strange) = ([1; 16], [2; 16], [3; 16]);
    let mut talk = Talk::new();
    let ask = head(METADATA, 12, 1).i8(0).i8(1).i8(0).i8(0).i8(0).framed();
    talk.client(&[&ask[..], &ask].concat());
    talk.server(&metadata_response(1, "b", known));
    talk.server(&metadata_response(1, "a", other));
    talk.client(&fetch_id(2, known));
    assert!(
        talk.got[0].ends_with(&fetch_id(2, known)),
        "topic b may be fetched"
    );
    talk.server(&response(2, 30));
    let before = talk.got[1].len();
    talk.client(&fetch_id(3, other));
    assert!(!talk.got[0].ends_with(&fetch_id(3, other)), "topic a may not");
    let denied = talk.got[1][before..].to_vec();
    // Size, correlation id, tags, throttle, error, session, two: the length of an array with one topic.
    assert_eq!(denied[4..20], [0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    assert_eq!(denied[19..36][1..], other);
    assert_eq!(denied[36..43], [2, 0, 0, 0, 0, 0, 29]);
    let mut talk = Talk::new();
    talk.client(&fetch_id(4, strange));
    assert_eq!(talk.got[0], b"");
    assert_eq!(talk.got[1][36..43], [2, 0, 0, 0, 0, 0, 100]);
    assert_eq!(talk.stats().unknown_topic_ids, 1);
    assert_eq!(
        topic_of(&talk.records()[0]),
        "03030303-0303-0303-0303-030303030303"
    );
}

#[test]
fn a_topic_id_is_known_at_all_brokers_of_a_rule_set() {
    let shared = Arc::new(TopicIds::default());
    let talk_to = |broker: u32, ruleset: u32| {
        let mut talk = Talk::new();
        talk.engine.share_topic_ids(shared.clone());
        (talk.broker, talk.ruleset) = (broker, ruleset);
        talk
    };
    let id = [1; 16];
    let mut first = talk_to(1001, RULESET);
    first.client(&head(METADATA, 12, 1).i8(0).i8(1).i8(0).i8(0).i8(0).framed());
    first.server(&metadata_response(1, "b", id));
    // A policy names the brokers by address, so each has an identity of its own.
    let mut second = talk_to(1002, RULESET);
    second.client(&fetch_id(2, id));
    assert_eq!(second.got[0], fetch_id(2, id));
    let mut other = talk_to(1002, OTHER);
    other.client(&fetch_id(2, id));
    assert_eq!(other.got[0], b"");
}

#[test]
fn a_denied_name_beside_an_unknown_topic_id_gets_error_29() {
    let errors = |topic: &str| {
        let request = head(METADATA, 12, 1)
            .raw(b"\0\x03")
            .raw(&[3; 16])
            .raw(b"\0\0")
            .raw(&[0; 16])
            .i8(topic.len() as i8 + 1)
            .raw(topic.as_bytes())
            .raw(&[0; 4])
            .framed();
        let mut talk = Talk::new();
        talk.client(&request);
        assert_eq!(talk.got[0], b"");
        let record = talk.records()[0];
        let What::Kafka { error, .. } = record.what else {
            panic!("{record:?}")
        };
        (error, topic_of(&record))
    };
    assert_eq!(errors("secret"), (29, "secret".into()));
    assert_eq!(errors("a"), (100, "03030303-0303-0303-0303-030303030303".into()));
}

#[test]
fn a_group_heartbeat_with_an_unknown_topic_id_is_sent_again() {
    let error = |topic: &str| {
        let mut talk = Talk::new();
        talk.ruleset = ADMIN;
        talk.client(&group_heartbeat(1, topic, [3; 16]));
        assert_eq!(talk.got[0], b"");
        // Size, correlation id, tags, throttle time, error.
        Fields(&talk.got[1][13..]).i16()
    };
    assert_eq!(error("a"), 16, "not the coordinator");
    assert_eq!(error("secret"), 29);
}

#[test]
fn a_fetch_session_is_continued_only_with_its_topics() {
    let mut talk = Talk::new();
    talk.client(&fetch(1, (0, 0), &["b"]));
    talk.server(&fetched(1, 55));
    talk.client(&fetch(2, (55, 1), &[]));
    assert!(talk.got[0].ends_with(&fetch(2, (55, 1), &[])));
    assert_eq!(topic_of(talk.records().last().unwrap()), "b");
    talk.server(&fetched(2, 55));
    // The rules no longer allow topic b.
    talk.ruleset = OTHER;
    talk.client(&fetch(3, (55, 2), &[]));
    assert!(!talk.got[0].ends_with(&fetch(3, (55, 2), &[])));
    // A session of another connection.
    let mut talk = Talk::new();
    talk.client(&fetch(4, (56, 1), &[]));
    assert_eq!(talk.got[0], b"");
    let mut fields = Fields(&talk.got[1]);
    assert_eq!(
        (fields.i32(), fields.i32(), fields.i32(), fields.i16()),
        (18, 4, 0, 70)
    );
    assert_eq!(talk.stats().unknown_sessions, 1);
}

#[test]
fn a_fetch_session_to_which_audit_mode_lets_a_denied_topic_is_unknown() {
    let (begin, more) = (fetch(1, (0, 0), &["b"]), fetch(2, (55, 1), &["secret"]));
    let next = fetch(3, (55, 2), &[]);
    // The denied topic comes behind the response that begins the session, or before it.
    for is_early in [false, true] {
        let mut talk = Talk::new();
        talk.client(&begin);
        if !is_early {
            talk.server(&fetched(1, 55));
        }
        talk.flags = punt_flags::AUDIT;
        talk.client(&more);
        assert!(talk.got[0].ends_with(&more), "{is_early}");
        if is_early {
            talk.server(&fetched(1, 55));
        }
        talk.server(&fetched(2, 55));
        talk.flags = 0;
        talk.client(&next);
        assert!(!talk.got[0].ends_with(&next), "{is_early}");
        assert_eq!(talk.stats().unknown_sessions, 1, "{is_early}");
    }
}

#[test]
fn unframed_sasl_is_denied_where_a_rule_restricts() {
    let handshake = head(SASL_HANDSHAKE, 0, 1).text("PLAIN").framed();
    let mut talk = Talk::new();
    talk.client(&handshake);
    assert_eq!(talk.got[0], b"");
    assert_eq!(talk.got[1], Message::default().i32(1).i16(31).i32(0).framed());
    let mut talk = Talk::new();
    talk.ruleset = EVERYTHING;
    talk.client(&handshake);
    talk.client(b"\0\0\0\x05token");
    assert!(talk.got[0].ends_with(b"token"));
    let handshake = head(SASL_HANDSHAKE, 1, 1).text("PLAIN").framed();
    let mut talk = Talk::new();
    talk.client(&handshake);
    assert_eq!(talk.got[0], handshake);
}

#[test]
fn other_protocols_are_refused() {
    for bytes in [
        &b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03"[..],
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x7f\xff\xff\xff\0\x03\0\0",
        b"\xff\xff\xff\xff\0\x03\0\0",
        b"\0\0\0\0\0\x03\0\0",
    ] {
        let mut talk = Talk::new();
        talk.ruleset = EVERYTHING;
        talk.client(bytes);
        assert!(talk.reset && talk.got[0].is_empty(), "{bytes:?}");
        let records = talk.records();
        assert_eq!(records[0].reason, Reason::AppMalformed);
    }
}

#[test]
fn responses_that_do_not_fit_are_refused() {
    for wrong in [
        &response(2, 10)[..],
        b"\0\0\0\x03\0\0\0",
        b"\x80\0\0\0\0\0\0\x01",
        b"HTTP/1.1 200 OK\r\n",
    ] {
        let mut talk = Talk::new();
        talk.client(&produce(1, 1, &["a"], 3));
        talk.server(wrong);
        assert!(talk.reset && talk.got[1].is_empty(), "{wrong:?}");
    }
    let mut talk = Talk::new();
    talk.server(&response(1, 10));
    assert!(talk.reset, "a response without a request");
    let mut talk = Talk::new();
    talk.client(&produce(1, 1, &["a"], 3));
    talk.server(&response(1, 10));
    talk.server(&response(1, 10));
    assert!(talk.reset, "a second response");
}

#[test]
fn requests_beyond_the_limit_wait_for_responses() {
    let mut talk = Talk::new();
    for correlation in 0..200 {
        talk.put(Side::Client, ACK, &produce(correlation, 1, &["a"], 3));
    }
    let one = produce(0, 1, &["a"], 3).len();
    assert_eq!(talk.got[0].len(), 128 * one);
    talk.server(&response(0, 30));
    assert_eq!(talk.got[0].len(), 129 * one);
}

#[test]
fn audit_mode_forwards_denied_requests() {
    let mut talk = Talk::new();
    talk.flags = punt_flags::AUDIT;
    talk.client(&produce(1, 1, &["secret"], 3));
    talk.server(&response(1, 30));
    assert_eq!(talk.got[0], produce(1, 1, &["secret"], 3));
    assert_eq!(talk.got[1], response(1, 30));
    assert_eq!(talk.records()[0].verdict, Verdict::Audit);
    talk.client(b"garbage garbage");
    assert!(talk.got[0].ends_with(b"garbage"));
    assert!(talk.is_open());
}

#[test]
fn a_stream_that_ends_within_a_request_is_refused() {
    let mut talk = Talk::new();
    let request = metadata(1, &["a"]);
    talk.put(Side::Client, ACK | FIN, &request[..request.len() - 1]);
    assert!(talk.reset);
}

#[test]
fn a_change_of_the_rules_evaluates_the_next_request() {
    let mut talk = Talk::new();
    talk.client(&produce(1, 1, &["a"], 3));
    talk.server(&response(1, 30));
    talk.ruleset = OTHER;
    talk.client(&produce(2, 1, &["a"], 3));
    assert_eq!(talk.got[0], produce(1, 1, &["a"], 3));
    talk.wait();
    assert_eq!(talk.closed, [true, true]);
}

proptest! {
    /// Whatever bytes both sides send in whatever pieces, no complete request that names the denied topic arrives.
    #[test]
    fn a_denied_topic_never_arrives(
        parts in prop::collection::vec((0..8_usize, 0..60_usize, any::<u8>(), any::<bool>()), 1..20),
        size in 1..200_usize,
    ) {
        let mut talk = Talk::new();
        for (kind, at, value, server) in parts {
            let mut bytes = match kind {
                0 => produce(1, 1, &["a"], 5),
                1 => produce(2, 1, &["a", "secret"], 5),
                2 => fetch(3, (0, 0), &["secret"]),
                3 => metadata(4, &["secret", "b"]),
                4 => fetch_id(5, [3; 16]),
                5 => response(i32::from(value) % 5, at),
                6 => metadata_response(i32::from(value) % 5, "b", [3; 16]),
                _ => metadata(6, &[]),
            };
            if at < bytes.len() && value.is_multiple_of(3) {
                bytes[at] = value;
            }
            for part in bytes.chunks(size) {
                if server { talk.server(part) } else { talk.client(part) }
            }
        }
        // Complete requests that reached the broker.
        let mut rest = &talk.got[0][..];
        while let Some(size) = rest.first_chunk::<4>() {
            let length = u32::from_be_bytes(*size) as usize;
            let Some(request) = rest.get(4..4 + length) else { break };
            prop_assert!(!request.windows(6).any(|name| name == b"secret"));
            rest = &rest[4 + length..];
        }
    }
}

#[test]
fn topic_ids_keep_their_names_over_a_restart() {
    let (known, other) = ([1; 16], [2; 16]);
    let mut talk = Talk::new();
    let ask = head(METADATA, 12, 1).i8(0).i8(1).i8(0).i8(0).i8(0).framed();
    talk.client(&[&ask[..], &ask].concat());
    talk.server(&metadata_response(1, "b", known));
    talk.server(&metadata_response(1, "a", other));
    for correlation in 2..4 {
        talk.engine = talk.engine.restarted(0, &mut talk.out);
        talk.client(&fetch_id(correlation, known));
        assert!(talk.got[0].ends_with(&fetch_id(correlation, known)));
        talk.server(&response(correlation, 30));
    }
    let before = talk.got[1].len();
    talk.client(&fetch_id(4, other));
    let denied = talk.got[1][before..].to_vec();
    assert_eq!(denied[36..43], [2, 0, 0, 0, 0, 0, 29], "denied, not unknown");
    // Under other rules the name has to be told again.
    let mut talk = Talk::new();
    talk.client(&ask);
    talk.server(&metadata_response(1, "a", known));
    talk.engine = talk.engine.restarted(0, &mut talk.out);
    talk.ruleset = OTHER;
    talk.client(&fetch_id(2, known));
    assert!(!talk.got[0].ends_with(&fetch_id(2, known)));
}

#[test]
fn a_connection_goes_on_after_a_restart() {
    let mut talk = Talk::new();
    let restart = |talk: &mut Talk| {
        talk.engine = talk.engine.restarted(0, &mut talk.out);
    };
    // A request without a response, and a fetch session.
    talk.client(&fetch(1, (0, 0), &["b"]));
    restart(&mut talk);
    talk.server(&fetched(1, 9));
    restart(&mut talk);
    talk.client(&fetch(2, (9, 1), &[]));
    talk.server(&fetched(2, 9));
    // A request whose last byte has not arrived. All others are forwarded.
    let whole = produce(3, 1, &["a", "b"], 10);
    let (first, last) = whole.split_at(whole.len() - 5);
    let before = talk.got[0].len();
    talk.client(first);
    restart(&mut talk);
    let (missing, got) = (
        before + first.len() - talk.got[0].len(),
        talk.got[0].len() - before,
    );
    assert!(missing <= 1, "{missing}");
    talk.sent[0] -= missing as u32;
    talk.client(&whole[got..]);
    assert_eq!(talk.got[0][before..], whole[..]);
    assert_eq!(last.len(), 5);
    talk.server(&response(3, 30));
    assert!(talk.is_open());
    let denied = produce(4, 1, &["secret"], 10);
    restart(&mut talk);
    talk.client(&denied);
    assert!(!talk.got[0].ends_with(&denied));
    assert_eq!(
        talk.records().last().map(|record| record.verdict),
        Some(Verdict::Dropped)
    );
}
