//! Tests of TLS inspection: hellos in records and segments of every size.

use std::{collections::BTreeMap, sync::Arc};

use palisade_abi::{Inspector, PuntRequest};
use palisade_fqdn::{Cache, Config};
use palisade_model::{
    rule::FqdnPattern,
    snapshot::{Alternative, Matcher, RuleSet},
};
use palisade_protocols::dns::{Address, Answer, CLASS_IN, Question, Source, rtype};
use proptest::prelude::*;

use super::*;
use crate::{
    Engine, Limits,
    tcp::tests::{ACK, Out, RST, SYN, Seg},
};

const RULESET: u32 = 4;

fn vector16(data: &[u8]) -> Vec<u8> {
    [&(data.len() as u16).to_be_bytes()[..], data].concat()
}

fn record(kind: u8, data: &[u8]) -> Vec<u8> {
    [&[kind, 3, 1][..], &vector16(data)].concat()
}

/// Returns a hello in records of at most this length.
fn hello(name: Option<&str>, cut: usize) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.push(0);
    body.extend(vector16(&[0x13, 1]));
    body.extend([1, 0]);
    let mut extensions = vec![0, 43, 0, 3, 2, 3, 4];
    if let Some(name) = name {
        let entry = [&[0][..], &vector16(name.as_bytes())].concat();
        extensions.extend([0, 0]);
        extensions.extend(vector16(&vector16(&entry)));
    }
    body.extend(vector16(&extensions));
    let message = [&[1, 0][..], &vector16(&body)].concat();
    message.chunks(cut).flat_map(|part| record(22, part)).collect()
}

/// Returns a ServerHello. `again`: it is a HelloRetryRequest.
fn server_hello(again: bool) -> Vec<u8> {
    let mut body = vec![3, 3];
    if again {
        body.extend([
            0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91,
            0xc2, 0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
        ]);
    } else {
        body.extend([9; 32]);
    }
    body.extend([0, 0x13, 1, 0]);
    body.extend(vector16(&[0, 43, 0, 2, 3, 4]));
    record(22, &[&[2, 0][..], &vector16(&body)].concat())
}

struct Talk {
    engine: Engine<Vec<u8>>,
    out: Out,
    flags: u8,
    sent: [u32; 2],
}

impl Talk {
    fn new(everything: bool) -> Self {
        Self::start(everything, 0)
    }

    fn start(everything: bool, flags: u8) -> Self {
        let mut alternatives = vec![
            Matcher::ServerName(FqdnPattern::Name("a.test".into())),
            Matcher::ServerName(FqdnPattern::Pattern("*.b.test".into())),
        ];
        if everything {
            alternatives.push(Matcher::Everything);
        }
        let set = RuleSet {
            reads: Inspector::Tls as u8,
            alternatives: (11..)
                .zip(alternatives)
                .map(|(rule, matcher)| Alternative { rule, matcher })
                .collect(),
            ..RuleSet::default()
        };
        let sets = BTreeMap::from([(RULESET, Arc::new(set))]);
        let mut engine = Engine::new(&Limits::default());
        engine.set_rules(Arc::new(Rules::prepare(&sets, None)));
        let mut talk = Self {
            engine,
            out: Out::default(),
            flags,
            sent: [0, 0],
        };
        talk.put(Side::Client, SYN, b"");
        talk.put(Side::Server, SYN | ACK, b"");
        talk.put(Side::Client, ACK, b"");
        assert_eq!(talk.take().released.len(), 3);
        talk
    }

    fn put(&mut self, side: Side, flags: u8, data: &[u8]) {
        let seq = self.sent[side as usize];
        let ack = if flags & ACK == 0 {
            0
        } else {
            // Acknowledges the forwarded bytes; held ones are not acknowledged.
            self.sent[side.other() as usize]
        };
        let seg = Seg::new(side, flags, seq, ack, data);
        self.sent[side as usize] += data.len() as u32 + u32::from(flags & SYN != 0);
        let slot = PuntRequest {
            inspector: Inspector::Tls as u8,
            ruleset: RULESET,
            rule: 3,
            flags: self.flags,
            ..PuntRequest::default()
        };
        let (engine, out) = (&mut self.engine, &mut self.out);
        seg.view(slot, |view, frame| engine.packet(0, view, frame, out));
    }

    fn client(&mut self, data: &[u8]) -> Out {
        self.put(Side::Client, ACK, data);
        self.take()
    }

    fn server(&mut self, data: &[u8]) -> Out {
        self.put(Side::Server, ACK, data);
        self.take()
    }

    fn take(&mut self) -> Out {
        std::mem::take(&mut self.out)
    }
}

fn is_cut(out: &Out) -> bool {
    out.released.is_empty()
        && out.commands.is_empty()
        && out.emitted.iter().filter(|(seg, _)| seg.flags & RST != 0).count() == 2
}

#[test]
fn an_allowed_hello_is_forwarded_and_offloaded_after_the_servers_answer() {
    let mut talk = Talk::new(false);
    let out = talk.client(&hello(Some("A.test."), 10_000));
    assert_eq!((out.released.len(), out.commands.len()), (1, 0));
    assert!(matches!(
        out.records[..],
        [Record { rule: 11, verdict: Verdict::Forwarded, what: What::TlsHello { name, version: 0x304, ech: false }, .. }]
            if name.bytes() == b"a.test"
    ));
    let out = talk.server(&server_hello(false));
    assert_eq!((out.released.len(), out.commands.len()), (1, 1));
    assert_eq!(
        (
            out.commands[0].op,
            out.commands[0].serial,
            out.commands[0].key.endpoint
        ),
        (1, 99, 7)
    );
    assert_eq!(talk.engine.stats().tls.tcp.bytes, 0);
}

#[test]
fn other_names_missing_names_and_other_protocols_are_reset() {
    for bytes in [
        hello(Some("x.test"), 10_000),
        hello(Some("x.y.b.test"), 10_000),
        hello(Some("192.0.2.1"), 10_000),
        hello(None, 10_000),
        b"GET / HTTP/1.1\r\n".to_vec(),
        [hello(Some("a.test"), 10_000), hello(Some("x.test"), 10_000)].concat(),
    ] {
        let mut talk = Talk::new(false);
        let out = talk.client(&bytes);
        assert!(is_cut(&out), "{bytes:?}");
        let last = out.records.last().unwrap();
        assert_eq!((last.verdict, last.rule), (Verdict::Dropped, 3));
    }
    let mut talk = Talk::new(true);
    let out = talk.client(&hello(None, 10_000));
    assert_eq!((out.released.len(), out.records[0].rule), (1, 13));
    // A server that sends first.
    let mut talk = Talk::new(true);
    assert!(is_cut(&talk.server(b"220 hello\r\n")));
}

#[test]
fn a_second_hello_is_evaluated_like_the_first() {
    for (name, fine) in [("a.test", true), ("x.test", false)] {
        let mut talk = Talk::new(false);
        talk.client(&hello(Some("c.b.test"), 10_000));
        let out = talk.server(&server_hello(true));
        assert_eq!((out.released.len(), out.commands.len()), (1, 0));
        let out = talk.client(&hello(Some(name), 10_000));
        assert_eq!((out.released.len() == 1, is_cut(&out)), (fine, !fine));
        if fine {
            assert_eq!(talk.server(&server_hello(false)).commands.len(), 1);
        }
    }
}

#[test]
fn audit_mode_offloads_and_records() {
    let mut talk = Talk::new(false);
    talk.flags = punt_flags::AUDIT;
    let out = talk.client(&hello(Some("x.test"), 10_000));
    assert_eq!((out.released.len(), out.commands.len()), (1, 1));
    assert_eq!(
        (out.records[0].verdict, out.records[0].reason),
        (Verdict::Audit, Reason::AppDenied)
    );
}

/// Returns an index in which endpoint 7 has learned 10.0.0.2, the server of all tests, by the names `c.b.test` and
/// `x.test`.
fn learned() -> Arc<SniAddressIndex> {
    let known = Arc::<SniAddressIndex>::default();
    let mut cache = Cache::new(Config::default()).with_sni_index(Arc::clone(&known));
    for (endpoint, name, ip) in [
        (7, "c.b.test", [10, 0, 0, 2]),
        (7, "x.test", [10, 0, 0, 2]),
        (7, "a.test", [10, 0, 0, 3]),
        (8, "a.test", [10, 0, 0, 2]),
    ] {
        let answer = Answer {
            question: Some(Question {
                name: name.parse().unwrap(),
                rtype: rtype::A,
                class: CLASS_IN,
            }),
            addresses: vec![Address {
                ip: ip.into(),
                ttl: 60,
                source: Source::Record,
            }],
            ttl: Some(60),
            ..Answer::default()
        };
        let pending = cache.learn(endpoint, &answer, 0);
        drop(cache.commit(pending).unwrap());
    }
    known
}

#[test]
fn a_client_must_have_learned_the_address_by_the_server_name() {
    let talk = |everything, flags| {
        let mut talk = Talk::start(everything, flags);
        talk.engine.verify_server_names(learned());
        talk
    };
    let egress = punt_flags::INGRESS;
    // The name is allowed, and the endpoint has learned the address by it.
    let mut known = talk(false, egress);
    let out = known.client(&hello(Some("C.B.test."), 10_000));
    assert_eq!((out.released.len(), out.records[0].rule), (1, 12));
    // The address was learned by another name, or by another endpoint.
    for bytes in [
        hello(Some("a.test"), 10_000),
        hello(Some("d.b.test"), 10_000),
        [hello(Some("c.b.test"), 10_000), hello(Some("a.test"), 10_000)].concat(),
    ] {
        let mut talk = talk(false, egress);
        let out = talk.client(&bytes);
        assert!(is_cut(&out));
        let last = out.records.last().unwrap();
        assert_eq!(
            (last.verdict, last.reason),
            (Verdict::Dropped, Reason::SniAddress)
        );
        assert_eq!(
            (
                talk.engine.stats().tls.sni_mismatches,
                talk.engine.stats().tls.denied
            ),
            (1, 0)
        );
    }
    // A name that no rule allows is denied for that reason.
    let mut other = talk(false, egress);
    let out = other.client(&hello(Some("x.test"), 10_000));
    assert_eq!(out.records[0].reason, Reason::AppDenied);
    // The address does not matter if every name is allowed, or if the endpoint is the server.
    let mut anybody = talk(true, egress);
    let out = anybody.client(&hello(Some("a.test"), 10_000));
    assert_eq!((out.released.len(), out.records[0].rule), (1, 13));
    let mut ingress = talk(false, 0);
    let out = ingress.client(&hello(Some("a.test"), 10_000));
    assert_eq!((out.released.len(), out.records[0].rule), (1, 11));
    // Audit mode records the mismatch.
    let mut audited = talk(false, egress | punt_flags::AUDIT);
    let out = audited.client(&hello(Some("a.test"), 10_000));
    assert_eq!((out.released.len(), out.commands.len()), (1, 1));
    assert_eq!(
        (out.records[0].verdict, out.records[0].reason),
        (Verdict::Audit, Reason::SniAddress)
    );
}

#[test]
fn an_incomplete_hello_ends_at_the_deadline() {
    let mut talk = Talk::new(false);
    let bytes = hello(Some("a.test"), 10_000);
    assert!(talk.client(&bytes[..40]).released.is_empty());
    // The bytes are acknowledged on behalf of the server, in case the client waits for the acknowledgement.
    talk.engine.tick(10, &mut talk.out);
    assert!(!is_cut(&talk.take()));
    let due = talk.engine.deadline().unwrap();
    assert_eq!(due, 10_000);
    talk.engine.tick(due, &mut talk.out);
    let out = talk.take();
    assert!(is_cut(&out));
    assert_eq!(out.records[0].reason, Reason::InspectDeadline);
}

proptest! {
    #[test]
    fn the_verdict_of_a_hello_does_not_depend_on_segmentation(
        fine in any::<bool>(),
        records in 1_usize..200,
        packets in prop::collection::vec(1_usize..60, 1..40),
    ) {
        let bytes = hello(Some(if fine { "a.test" } else { "x.test" }), records);
        let mut talk = Talk::new(false);
        let (mut rest, mut sizes) = (&bytes[..], packets.iter().cycle());
        let (mut released, mut resets) = (0, 0);
        while !rest.is_empty() {
            let (part, tail) = rest.split_at(rest.len().min(*sizes.next().unwrap()));
            rest = tail;
            let out = talk.client(part);
            released += out.released.iter().map(|seg| seg.data.len()).sum::<usize>();
            resets += out.emitted.len();
            prop_assert!(released == 0 || rest.is_empty());
        }
        prop_assert_eq!((released, resets), if fine { (bytes.len(), 0) } else { (0, 2) });
    }
}

impl Talk {
    fn restart(&mut self) {
        self.engine = self.engine.restarted(0, &mut self.out);
        self.take();
    }
}

#[test]
fn a_handshake_goes_on_after_a_restart() {
    for (name, is_allowed) in [("a.test", true), ("x.test", false)] {
        // Before a hello, within one, after one, and between two.
        for at in [0, 1, 5, 20] {
            let mut talk = Talk::new(false);
            let hello = hello(Some(name), 10_000);
            if at > 0 {
                assert_eq!(talk.client(&hello[..at]).released.len(), 0);
            }
            talk.restart();
            // The client repeats the bytes that are not acknowledged.
            talk.sent[0] -= at as u32;
            let out = talk.client(&hello);
            assert_eq!(
                (out.released.len() == 1, is_cut(&out)),
                (is_allowed, !is_allowed),
                "{at}"
            );
        }
        let mut talk = Talk::new(false);
        talk.client(&hello(Some("c.b.test"), 10_000));
        talk.restart();
        assert_eq!(talk.server(&server_hello(true)).released.len(), 1);
        talk.restart();
        let out = talk.client(&hello(Some(name), 10_000));
        assert_eq!((out.released.len() == 1, is_cut(&out)), (is_allowed, !is_allowed));
    }
}

#[test]
fn an_offloaded_connection_is_evaluated_by_its_name_after_a_restart() {
    let mut talk = Talk::new(false);
    talk.client(&hello(Some("a.test"), 10_000));
    talk.server(&server_hello(false));
    talk.client(b"");
    talk.restart();
    assert_eq!(talk.engine.stats().tls.tcp.offloaded_flows, 1);
    let out = talk.client(b"data");
    assert_eq!((out.released.len(), out.commands.len()), (1, 1));
}
