//! DNS over UDP: queries and answers, one datagram each.

use palisade_abi::{PuntRequest, Reason, punt_hook};
use palisade_inspect::{
    Denial, DnsLimits, Lease, Limits, Route, TrackLimits, Unsolicited,
    record::{Verdict, What},
};
use palisade_packet::{Packet, Start, decode};
use palisade_protocols::dns::{Answer, Limits as MessageLimits, ParseError};

use crate::common::*;

const DROPPED: Verdict = Verdict::Dropped;

fn world() -> World {
    World::new(&Limits::default())
}

fn ask(world: &mut World, id: u16, name: &str) -> usize {
    world.send(&asks(1), &to_server(4000, &query(id, name, A)).frame())
}

fn tell(world: &mut World, message: &[u8]) -> usize {
    world.send(&is_told(1), &to_client(4000, message).frame())
}

#[test]
fn an_allowed_query_passes_and_is_reported_with_its_rule() {
    let mut world = world();
    let frame = ask(&mut world, 7, "alloWed.test");
    assert_eq!(world.fate(frame), Some(&Fate::Released));
    let record = *world.last();
    assert_eq!((record.endpoint, record.ingress, record.reply), (1, false, false));
    assert_eq!((record.source.1, record.destination.1), (4000, 53));
    assert_eq!(
        (record.remote_identity, record.ifindex, record.protocol),
        (1234, IFINDEX, 17)
    );
    assert_eq!(world.verdict(), (Verdict::Forwarded, Reason::Allowed, 41));
    let What::DnsQuery { name, kind } = record.what else {
        panic!("{record:?}")
    };
    assert_eq!((name.bytes(), kind), (&b"allowed.test"[..], A));
    ask(&mut world, 8, "x.wild.test");
    assert_eq!(world.verdict(), (Verdict::Forwarded, Reason::Allowed, 42));
    assert_eq!(world.engine.stats().dns.queries, 2);
    world.end();
}

/// Checks a response: addresses and ports swapped, valid checksums. Returns its response code.
fn check_reply(world: &World, asked: &Udp, id: u16) -> u16 {
    let (frame, route) = world.sink.emitted.last().expect("a reply");
    assert_eq!(
        *route,
        Route {
            ifindex: IFINDEX,
            hook: punt_hook::TC_EGRESS,
            back: true
        }
    );
    let mut packet = Packet::default();
    decode(&frame[..], Start::Ethernet { tags_removed: 0 }, &mut packet).unwrap();
    assert_eq!((&frame[..6], &frame[6..12]), (&CLIENT_MAC[..], &SERVER_MAC[..]));
    assert_eq!(packet.source, asked.destination.0.into());
    assert_eq!(packet.destination, asked.source.0.into());
    assert_eq!(
        (packet.source_port, packet.destination_port),
        (53, asked.source.1)
    );
    assert_eq!(packet.hop_limit, 64);
    let network = usize::from(packet.network_offset);
    assert_eq!(network, if asked.vlan.is_some() { 18 } else { 14 });
    assert_eq!(network + packet.length as usize, frame.len());
    let transport = usize::from(packet.transport_offset);
    if asked.source.0.is_ipv4() {
        assert_eq!(naive_sum(&[&frame[network..transport]]), 0);
    }
    assert_eq!(
        udp_sum(asked.destination.0, asked.source.0, &frame[transport..]),
        0
    );
    let answer = Answer::parse(&frame[transport + 8..], &MessageLimits::ANSWER).unwrap();
    assert_eq!(answer.id, id);
    answer.rcode
}

#[test]
fn a_denied_query_gets_a_response_and_is_dropped() {
    for (denial, rcode) in [(Denial::Refused, 5), (Denial::NxDomain, 3)] {
        let mut world = World::new(&Limits {
            dns: DnsLimits {
                denial,
                ..DnsLimits::default()
            },
            ..Limits::default()
        });
        // Names with an odd and an even length.
        for name in ["denied.test", "denied2.test"] {
            for v6 in [false, true] {
                for vlan in [None, Some(12)] {
                    let asked = Udp {
                        vlan,
                        ..to_server(4000, &query(7, name, A))
                    };
                    let asked = if v6 { asked.v6() } else { asked };
                    let frame = world.send(&asks(1), &asked.frame());
                    assert_eq!(world.fate(frame), Some(&Fate::Discarded(Reason::AppDenied)));
                    assert_eq!(world.verdict(), (DROPPED, Reason::AppDenied, ASKING));
                    assert_eq!(check_reply(&world, &asked, 7), rcode);
                }
            }
        }
        let stats = world.engine.stats().dns;
        assert_eq!((stats.queries, stats.denied, stats.replies), (8, 8, 8));
        // The denied query is not open, so an answer to it is unsolicited.
        let frame = tell(&mut world, &address(7, "denied.test"));
        assert_eq!(world.fate(frame), Some(&Fate::Discarded(Reason::DnsUnsolicited)));
        world.end();
    }
}

#[test]
fn no_response_goes_to_multicast_or_unspecified_addresses() {
    let mut world = world();
    let denied = query(7, "denied.test", A);
    let to_group = Udp {
        destination: ([224, 0, 0, 251].into(), 53),
        ..to_server(4000, &denied)
    };
    let from_nobody = Udp {
        source: ([0, 0, 0, 0].into(), 68),
        ..to_server(68, &denied)
    };
    let mut by_link = to_server(4000, &denied).frame();
    by_link[0] |= 1;
    for frame in [to_group.frame(), from_nobody.frame(), by_link] {
        let frame = world.send(&asks(1), &frame);
        assert_eq!(world.fate(frame), Some(&Fate::Discarded(Reason::AppDenied)));
    }
    assert!(world.sink.emitted.is_empty());
    world.end();
}

#[test]
fn malformed_queries_are_refused_by_kind() {
    let mut two_questions = query(7, "allowed.test", A);
    two_questions[5] = 2;
    two_questions.extend(wire("denied.test"));
    two_questions.extend([0, 1, 0, 1]);
    let mut update = query(7, "allowed.test", A);
    update[2] = 5 << 3;
    let mut cut = query(7, "allowed.test", A);
    cut.truncate(20);
    let mut none = query(7, "allowed.test", A);
    none[5] = 0;
    let with_tail = [query(7, "allowed.test", A), vec![0]].concat();
    for (message, refusal, rcode) in [
        (two_questions, ParseError::ManyQuestions, Some(1)),
        (none, ParseError::NoQuestion, Some(1)),
        (update, ParseError::Opcode, Some(4)),
        (cut, ParseError::Truncated, None),
        (with_tail, ParseError::TrailingBytes, None),
        (vec![0; 11], ParseError::Short, None),
        (vec![], ParseError::Short, None),
        (address(7, "allowed.test"), ParseError::WrongDirection, None),
    ] {
        let mut world = world();
        let asked = to_server(4000, &message);
        let frame = world.send(&asks(1), &asked.frame());
        assert_eq!(
            world.fate(frame),
            Some(&Fate::Discarded(Reason::AppMalformed)),
            "{refusal}"
        );
        assert_eq!(world.verdict(), (DROPPED, Reason::AppMalformed, ASKING));
        assert_eq!(world.detail(), refusal.text());
        let stats = world.engine.stats().dns;
        assert_eq!(stats.malformed[refusal as usize], 1);
        assert_eq!(stats.malformed.iter().sum::<u64>(), 1);
        match rcode {
            Some(4) => {
                // The opcode is echoed, so the response is no valid answer for the parser.
                let (frame, _) = &world.sink.emitted[0];
                assert_eq!(frame[42 + 2] >> 3 & 15, 5);
                assert_eq!(frame[42 + 3] & 15, 4);
            }
            Some(rcode) => assert_eq!(check_reply(&world, &asked, 7), rcode),
            None => assert!(world.sink.emitted.is_empty()),
        }
        world.end();
    }
}

#[test]
fn an_answer_is_forwarded_once_its_addresses_are_committed() {
    let mut world = world();
    ask(&mut world, 7, "allowed.test");
    world.wait(12);
    let frame = tell(
        &mut world,
        &answer(
            7,
            "allowed.test",
            A,
            0,
            &[
                ("allowed.test", CNAME, 50, &wire("real.test")),
                ("real.test", A, 300, &[192, 0, 2, 1]),
                ("real.test", A, 200, &[192, 0, 2, 2]),
                ("other.test", A, 1, &[192, 0, 2, 3]),
            ],
        ),
    );
    assert_eq!(world.fate(frame), None);
    assert_eq!(world.engine.stats().dns.held, 1);
    assert_eq!(world.engine.deadline(), Some(world.now + 2000));
    let learn = world.sink.learns.front().unwrap();
    assert_eq!(learn.endpoint, 1);
    assert_eq!(learn.answer.addresses.len(), 2);
    assert_eq!(
        learn.answer.question.as_ref().unwrap().name.to_string(),
        "allowed.test"
    );
    let records = world.sink.records.len();
    world.wait(3);
    world.committed(true);
    assert_eq!(world.fate(frame), Some(&Fate::Released));
    assert_eq!(world.sink.records.len(), records + 1);
    assert_eq!(world.verdict(), (Verdict::Forwarded, Reason::Allowed, 41));
    let record = *world.last();
    assert_eq!(
        (record.ingress, record.reply, record.latency),
        (true, true, Some(12))
    );
    let What::DnsAnswer {
        name,
        kind,
        rcode,
        addresses,
        count,
        ttl,
        cname,
    } = record.what
    else {
        panic!("{record:?}")
    };
    assert_eq!(
        (name.bytes(), kind, rcode, count, ttl),
        (&b"allowed.test"[..], A, 0, 2, 50)
    );
    assert_eq!(addresses[1], std::net::IpAddr::from([192, 0, 2, 2]).into());
    assert_eq!(cname.bytes(), b"real.test");
    let stats = world.engine.stats().dns;
    assert_eq!((stats.answers, stats.committed, stats.held), (1, 1, 0));
    world.end();
}

#[test]
fn an_answer_whose_commit_fails_is_dropped() {
    let mut world = world();
    ask(&mut world, 7, "allowed.test");
    let refused = tell(&mut world, &address(7, "allowed.test"));
    world.committed(false);
    assert_eq!(
        world.fate(refused),
        Some(&Fate::Discarded(Reason::DnsUncommitted))
    );
    assert_eq!(world.verdict(), (DROPPED, Reason::DnsUncommitted, 41));
    // No result arrives.
    ask(&mut world, 8, "allowed.test");
    let overdue = tell(&mut world, &address(8, "allowed.test"));
    world.wait(1999);
    assert_eq!(world.fate(overdue), None);
    world.wait(1);
    assert_eq!(
        world.fate(overdue),
        Some(&Fate::Discarded(Reason::DnsUncommitted))
    );
    // The result arrives too late.
    world.committed(true);
    // The queue of requests is full.
    world.sink.room = Some(0);
    ask(&mut world, 9, "allowed.test");
    let full = tell(&mut world, &address(9, "allowed.test"));
    assert_eq!(world.fate(full), Some(&Fate::Discarded(Reason::DnsUncommitted)));
    let stats = world.engine.stats().dns;
    assert_eq!((stats.uncommitted, stats.overdue, stats.committed), (2, 1, 0));
    world.end();
}

#[test]
fn an_answer_with_committed_addresses_is_not_held() {
    let mut world = world();
    world.sink.refreshes_room = 2;
    world.sink.epoch = 3;
    let lease = |epoch| {
        Some(Lease {
            good_for: 60_000,
            epoch,
        })
    };
    let mut number = 0;
    let mut told = |world: &mut World| {
        number += 1;
        ask(world, number, "allowed.test");
        tell(world, &address(number, "allowed.test"))
    };
    let first = told(&mut world);
    assert_eq!(world.fate(first), None, "nobody knows it yet");
    let learn = world.sink.learns.pop_front().unwrap();
    world.learned_for(learn, true, lease(3));
    assert_eq!(world.fate(first), Some(&Fate::Released));
    // The same answer again: it is forwarded and recorded, and its lease is refreshed.
    let records = world.sink.records.len();
    let again = told(&mut world);
    assert_eq!(world.fate(again), Some(&Fate::Released));
    assert_eq!(world.sink.records.len(), records + 2);
    assert_eq!(world.verdict(), (Verdict::Forwarded, Reason::Allowed, 41));
    assert_eq!((world.sink.refreshes.len(), world.sink.learns.len()), (1, 0));
    let refresh = world.sink.refreshes.pop().unwrap();
    assert_eq!(refresh.answer.addresses.len(), 1);
    world.learned_for(refresh, true, lease(3));
    // The refresh cannot be sent: the answer is held.
    world.sink.refreshes_room = 0;
    let full = told(&mut world);
    assert_eq!(world.fate(full), None);
    world.sink.refreshes_room = 2;
    let learn = world.sink.learns.pop_front().unwrap();
    world.learned_for(learn, true, None);
    // The epoch has changed: the answer must be committed again.
    world.sink.epoch = 4;
    let after = told(&mut world);
    assert_eq!(world.fate(after), None);
    let learn = world.sink.learns.pop_front().unwrap();
    // The lease is of the previous epoch.
    world.learned_for(learn, true, lease(3));
    let stale = told(&mut world);
    assert_eq!(world.fate(stale), None);
    let learn = world.sink.learns.pop_front().unwrap();
    world.learned_for(learn, true, lease(4));
    let fresh = told(&mut world);
    assert_eq!(world.fate(fresh), Some(&Fate::Released));
    // The lease is over.
    world.wait(60_000);
    let late = told(&mut world);
    assert_eq!(world.fate(late), None);
    world.committed(false);
    assert_eq!(world.fate(late), Some(&Fate::Discarded(Reason::DnsUncommitted)));
    let stats = world.engine.stats().dns;
    assert_eq!((stats.answers, stats.committed, stats.fast_path), (7, 6, 2));
    assert_eq!((stats.uncommitted, stats.held), (1, 0));
    world.end();
}

#[test]
fn hints_and_both_families_are_learned() {
    let mut world = world();
    let service = [&[0, 1, 0, 0, 4, 0, 4][..], &[192, 0, 2, 9]].concat();
    for (id, kind, data) in [(1, HTTPS, &service[..]), (2, AAAA, &[0x20; 16])] {
        let query = query(id, "allowed.test", kind);
        world.send(&asks(1), &to_server(4000, &query).v6().frame());
        let message = answer(id, "allowed.test", kind, 0, &[("allowed.test", kind, 60, data)]);
        let frame = world.send(&is_told(1), &to_client(4000, &message).v6().frame());
        assert_eq!(world.fate(frame), None);
        assert_eq!(world.sink.learns[0].answer.addresses.len(), 1);
        world.committed(true);
        assert_eq!(world.fate(frame), Some(&Fate::Released));
    }
    world.end();
}

#[test]
fn answers_without_addresses_are_not_held() {
    let mut world = world();
    let mut truncated = answer(3, "allowed.test", A, 0, &[]);
    truncated[2] |= 2;
    for (id, message) in [
        (1, answer(1, "allowed.test", A, 3, &[])),
        (2, answer(2, "allowed.test", A, 0, &[])),
        (3, truncated),
    ] {
        ask(&mut world, id, "allowed.test");
        let frame = tell(&mut world, &message);
        assert_eq!(world.fate(frame), Some(&Fate::Released), "{id}");
        assert_eq!(world.verdict(), (Verdict::Forwarded, Reason::Allowed, 41));
    }
    assert!(world.sink.learns.is_empty());
    assert_eq!(world.engine.stats().dns.answers, 3);
    world.end();
}

/// musl, c-ares and Go accept such addresses, and would connect to them without success.
#[test]
fn an_address_of_another_owner_is_committed_before_the_answer_is_forwarded() {
    for (kind, data) in [
        (A, &[192, 0, 2, 4][..]),
        (AAAA, &[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
    ] {
        let mut world = world();
        world.send(
            &asks(1),
            &to_server(4000, &query(4, "allowed.test", kind)).frame(),
        );
        let message = answer(4, "allowed.test", kind, 0, &[("other.test", kind, 9, data)]);
        let frame = tell(&mut world, &message);
        assert_eq!(world.fate(frame), None);
        assert_eq!(world.sink.learns[0].answer.addresses.len(), 1);
        world.committed(true);
        assert_eq!(world.fate(frame), Some(&Fate::Released));
        world.end();
    }
}

/// After REFUSED a stub resolver does not try the rest of its search list (musl). Without the firewall it would get
/// NXDOMAIN.
#[test]
fn a_denied_name_from_a_search_list_gets_nxdomain() {
    for (name, rcode) in [
        ("allowed.test.corp.example", 3),
        ("allowed.test.svc.cluster.local", 3),
        ("denied.test", 5),
        ("denied.test.corp.example", 5),
        ("xallowed.test.corp.example", 5),
        ("corp.example", 5),
    ] {
        let mut world = world();
        ask(&mut world, 7, name);
        let (reply, _) = world.sink.emitted.last().expect("a reply");
        assert_eq!(reply[42 + 3] & 15, rcode, "{name}");
        world.end();
    }
}

#[test]
fn unsolicited_answers_are_dropped() {
    let mut world = world();
    let kinds = |world: &World| {
        let unsolicited = world.engine.stats().dns.unsolicited;
        (
            unsolicited[Unsolicited::NoQuestion as usize],
            unsolicited[Unsolicited::Duplicate as usize],
        )
    };
    ask(&mut world, 7, "allowed.test");
    for (port, message) in [
        (4001, address(7, "allowed.test")),
        (4000, address(8, "allowed.test")),
        (4000, address(7, "x.wild.test")),
        (4000, answer(7, "allowed.test", AAAA, 0, &[])),
    ] {
        let frame = world.send(&is_told(1), &to_client(port, &message).frame());
        assert_eq!(world.fate(frame), Some(&Fate::Discarded(Reason::DnsUnsolicited)));
        assert_eq!(world.verdict(), (DROPPED, Reason::DnsUnsolicited, ASKING));
    }
    let elsewhere = Udp {
        source: ([10, 0, 0, 54].into(), 53),
        ..to_client(4000, &address(7, "allowed.test"))
    };
    world.send(&is_told(1), &elsewhere.frame());
    // A question of another endpoint.
    world.send(&is_told(2), &to_client(4000, &address(7, "allowed.test")).frame());
    assert_eq!(kinds(&world), (6, 0));
    assert!(world.sink.learns.is_empty());
    // The right answer, and a duplicate.
    tell(&mut world, &address(7, "allowed.test"));
    let again = tell(&mut world, &address(7, "allowed.test"));
    assert_eq!(world.fate(again), Some(&Fate::Discarded(Reason::DnsUnsolicited)));
    assert_eq!(kinds(&world), (6, 1));
    // too late
    ask(&mut world, 9, "allowed.test");
    world.wait(10_001);
    let late = tell(&mut world, &address(9, "allowed.test"));
    assert_eq!(world.fate(late), Some(&Fate::Discarded(Reason::DnsUnsolicited)));
    world.end();
}

#[test]
fn malformed_answers_are_dropped_and_their_question_stays_open() {
    let mut world = world();
    ask(&mut world, 7, "allowed.test");
    let mut bad = address(7, "allowed.test");
    bad.pop();
    let frame = tell(&mut world, &bad);
    assert_eq!(world.fate(frame), Some(&Fate::Discarded(Reason::AppMalformed)));
    assert_eq!(world.detail(), ParseError::Truncated.text());
    let a_query = tell(&mut world, &query(7, "allowed.test", A));
    assert_eq!(world.fate(a_query), Some(&Fate::Discarded(Reason::AppMalformed)));
    assert_eq!(
        world.engine.stats().dns.malformed[ParseError::WrongDirection as usize],
        1
    );
    let right = tell(&mut world, &address(7, "allowed.test"));
    world.committed(true);
    assert_eq!(world.fate(right), Some(&Fate::Released));
    world.end();
}

#[test]
fn queries_to_the_endpoints_own_server_are_evaluated_and_teach_nothing() {
    let mut world = world();
    let ask =
        |world: &mut World, name| world.send(&is_asked(3), &to_server(4000, &query(7, name, A)).frame());
    let denied = ask(&mut world, "denied.test");
    assert_eq!(world.fate(denied), Some(&Fate::Discarded(Reason::AppDenied)));
    assert_eq!(world.sink.emitted.len(), 1);
    assert!(world.last().ingress);
    let allowed = ask(&mut world, "allowed.test");
    assert_eq!(world.fate(allowed), Some(&Fate::Released));
    let answer = to_client(4000, &address(7, "allowed.test"));
    let first = world.send(&tells(3), &answer.frame());
    assert_eq!(world.fate(first), Some(&Fate::Released));
    assert!(!world.last().ingress && world.last().reply);
    let second = world.send(&tells(3), &answer.frame());
    assert_eq!(world.fate(second), Some(&Fate::Discarded(Reason::DnsUnsolicited)));
    assert!(world.sink.learns.is_empty());
    world.end();
}

#[test]
fn a_rule_that_allows_everything_still_learns() {
    let mut world = world();
    let everything = |slot: PuntRequest| PuntRequest {
        ruleset: EVERYTHING,
        ..slot
    };
    let ask = to_server(4000, &query(7, "denied.test", A)).frame();
    let frame = world.send(&everything(asks(1)), &ask);
    assert_eq!(world.fate(frame), Some(&Fate::Released));
    assert_eq!(world.last().rule, 51);
    let frame = world.send(
        &everything(is_told(1)),
        &to_client(4000, &address(7, "denied.test")).frame(),
    );
    assert_eq!(world.fate(frame), None);
    world.committed(true);
    assert_eq!(world.fate(frame), Some(&Fate::Released));
    let garbage = world.send(&everything(asks(1)), &to_server(4000, b"garbage").frame());
    assert_eq!(world.fate(garbage), Some(&Fate::Discarded(Reason::AppMalformed)));
    world.end();
}

#[test]
fn an_unknown_rule_set_denies_everything() {
    let mut world = world();
    let unknown = |slot: PuntRequest| PuntRequest { ruleset: 77, ..slot };
    assert!(!world.engine.knows(77) && world.engine.knows(NAMES));
    let ask = to_server(4000, &query(7, "allowed.test", A)).frame();
    let frame = world.send(&unknown(asks(1)), &ask);
    assert_eq!(world.fate(frame), Some(&Fate::Discarded(Reason::UnknownRuleset)));
    assert_eq!(world.verdict(), (DROPPED, Reason::UnknownRuleset, ASKING));
    assert!(world.sink.emitted.is_empty());
    world.end();
}

#[test]
fn packets_without_an_inspector_are_dropped() {
    let mut world = world();
    let ask = to_server(4000, &query(7, "allowed.test", A));
    let http = PuntRequest {
        inspector: palisade_abi::Inspector::Http as u8,
        ..asks(1)
    };
    let mut sctp = ask.frame();
    sctp[23] = 132;
    for (slot, frame) in [(http, ask.frame()), (asks(1), sctp)] {
        let frame = world.send(&slot, &frame);
        assert_eq!(world.fate(frame), Some(&Fate::Discarded(Reason::AppUnsupported)));
        assert_eq!(world.verdict(), (DROPPED, Reason::AppUnsupported, ASKING));
    }
    assert_eq!(world.engine.stats().unsupported, 2);
    world.end();
}

#[test]
fn audit_mode_forwards_what_it_records() {
    let mut world = World::new(&Limits {
        dns: DnsLimits {
            held_per_endpoint: 1,
            track: TrackLimits {
                per_endpoint: 4,
                ..TrackLimits::default()
            },
            ..DnsLimits::default()
        },
        ..Limits::default()
    });
    let mut audited = 0;
    let mut check = |world: &World, frame: usize, reason: Reason| {
        audited += 1;
        assert_eq!(world.fate(frame), Some(&Fate::Released), "{reason:?}");
        let (verdict, said, _) = world.verdict();
        assert_eq!((verdict, said), (Verdict::Audit, reason));
        assert_eq!(world.engine.stats().dns.audited, audited);
    };
    let ask =
        |world: &mut World, message: &[u8]| world.send(&audit(asks(1)), &to_server(4000, message).frame());
    let tell =
        |world: &mut World, message: &[u8]| world.send(&audit(is_told(1)), &to_client(4000, message).frame());
    let denied = ask(&mut world, &query(7, "denied.test", A));
    check(&world, denied, Reason::AppDenied);
    // The addresses of its answer are learned.
    let held = tell(&mut world, &address(7, "denied.test"));
    assert_eq!(world.fate(held), None);
    ask(&mut world, &query(8, "allowed.test", A));
    let not_held = tell(&mut world, &address(8, "allowed.test"));
    check(&world, not_held, Reason::InspectLimit);
    world.committed(false);
    check(&world, held, Reason::DnsUncommitted);
    let unsolicited = tell(&mut world, &address(9, "denied.test"));
    check(&world, unsolicited, Reason::DnsUnsolicited);
    for garbage in [ask(&mut world, b"garbage"), tell(&mut world, b"garbage")] {
        assert_eq!(world.fate(garbage), Some(&Fate::Released));
    }
    assert_eq!(world.engine.stats().dns.audited, 6);
    for id in 20..24 {
        ask(&mut world, &query(id, "allowed.test", A));
    }
    let too_many = ask(&mut world, &query(24, "allowed.test", A));
    assert_eq!(world.fate(too_many), Some(&Fate::Released));
    assert_eq!(world.last().reason, Reason::InspectLimit);
    let overdue = tell(&mut world, &address(20, "allowed.test"));
    world.wait(2000);
    assert_eq!(world.fate(overdue), Some(&Fate::Released));
    assert_eq!(world.verdict(), (Verdict::Audit, Reason::DnsUncommitted, 41));
    assert!(world.sink.emitted.is_empty());
    // A removed endpoint has no audit mode.
    let held = tell(&mut world, &address(21, "allowed.test"));
    world.engine.forget_endpoint(1, &mut world.sink);
    assert_eq!(world.fate(held), Some(&Fate::Discarded(Reason::DnsUncommitted)));
    world.end();
}

#[test]
fn limits_hold_for_all_and_for_each_endpoint() {
    let mut world = World::new(&Limits {
        dns: DnsLimits {
            held: 3,
            held_per_endpoint: 2,
            track: TrackLimits {
                total: 8,
                per_endpoint: 5,
                ..TrackLimits::default()
            },
            ..DnsLimits::default()
        },
        ..Limits::default()
    });
    let ask = |world: &mut World, endpoint, id| {
        let frame = to_server(4000, &query(id, "allowed.test", A)).frame();
        world.send(&asks(endpoint), &frame)
    };
    let tell = |world: &mut World, endpoint, id| {
        let frame = to_client(4000, &address(id, "allowed.test")).frame();
        world.send(&is_told(endpoint), &frame)
    };
    let limited = Some(&Fate::Discarded(Reason::InspectLimit));
    for id in 0..5 {
        ask(&mut world, 1, id);
    }
    let sixth = ask(&mut world, 1, 5);
    assert_eq!(world.fate(sixth), limited);
    let other = ask(&mut world, 2, 0);
    assert_eq!(world.fate(other), Some(&Fate::Released));
    ask(&mut world, 2, 1);
    ask(&mut world, 2, 2);
    let ninth = ask(&mut world, 3, 0);
    assert_eq!(world.fate(ninth), limited);
    let answers: Vec<_> = (0..3).map(|id| tell(&mut world, 1, id)).collect();
    assert_eq!(world.fate(answers[1]), None);
    assert_eq!(world.fate(answers[2]), limited);
    let third = tell(&mut world, 2, 0);
    assert_eq!(world.fate(third), None);
    let fourth = tell(&mut world, 2, 1);
    assert_eq!(world.fate(fourth), limited);
    let stats = world.engine.stats().dns;
    assert_eq!((stats.too_many, stats.not_held, stats.held), (2, 2, 3));
    // One answer is dropped, so another one can be held.
    world.committed(true);
    let next = tell(&mut world, 2, 2);
    assert_eq!(world.fate(next), None);
    world.end();
}

#[test]
fn held_answers_of_a_removed_endpoint_are_dropped() {
    let mut world = world();
    let mut frames = vec![];
    for endpoint in [1, 2] {
        let ask = to_server(4000, &query(7, "allowed.test", A)).frame();
        world.send(&asks(endpoint), &ask);
        world.send(
            &asks(endpoint),
            &to_server(4001, &query(8, "allowed.test", A)).frame(),
        );
        let tell = to_client(4000, &address(7, "allowed.test")).frame();
        frames.push(world.send(&is_told(endpoint), &tell));
    }
    world.engine.forget_endpoint(1, &mut world.sink);
    assert_eq!(
        world.fate(frames[0]),
        Some(&Fate::Discarded(Reason::DnsUncommitted))
    );
    assert_eq!(world.fate(frames[1]), None);
    // The result for an answer of the removed endpoint forwards nothing.
    world.committed(true);
    assert_eq!(world.fate(frames[1]), None);
    world.committed(true);
    assert_eq!(world.fate(frames[1]), Some(&Fate::Released));
    let forgotten = world.send(&is_told(1), &to_client(4001, &address(8, "allowed.test")).frame());
    assert_eq!(
        world.fate(forgotten),
        Some(&Fate::Discarded(Reason::DnsUnsolicited))
    );
    world.end();
}

#[test]
fn padding_is_not_part_of_the_message() {
    let mut world = world();
    let udp = to_server(4000, &query(7, "allowed.test", A));
    // Padding behind the packet, and bytes behind the datagram but within the packet.
    let padded = [udp.frame(), vec![0; 9]].concat();
    let within = udp.around(&[udp.datagram(), vec![1; 9]].concat(), None);
    for frame in [padded, within] {
        let frame = world.send(&asks(1), &frame);
        assert_eq!(world.fate(frame), Some(&Fate::Released));
    }
    world.end();
}

#[test]
fn an_answer_to_a_query_before_a_restart_is_accepted_once() {
    for is_v6 in [false, true] {
        let mut world = world();
        let family = |udp: Udp| if is_v6 { udp.v6() } else { udp };
        for (id, name) in [(7, "allowed.test"), (8, "x.wild.test")] {
            let asked = family(to_server(4000, &query(id, name, A)));
            world.send(&asks(1), &asked.frame());
        }
        let answered = |world: &mut World, message: &[u8]| {
            world.send(&is_told(1), &family(to_client(4000, message)).frame())
        };
        let first = answered(&mut world, &answer(7, "allowed.test", A, 3, &[]));
        assert_eq!(world.fate(first), Some(&Fate::Released));
        world.hand_over();
        for (id, name, fate) in [
            (7, "allowed.test", Fate::Discarded(Reason::DnsUnsolicited)),
            (9, "x.wild.test", Fate::Discarded(Reason::DnsUnsolicited)),
            (8, "y.wild.test", Fate::Discarded(Reason::DnsUnsolicited)),
            (8, "x.wild.test", Fate::Released),
            (8, "x.wild.test", Fate::Discarded(Reason::DnsUnsolicited)),
        ] {
            let handle = answered(&mut world, &answer(id, name, A, 3, &[]));
            assert_eq!(world.fate(handle), Some(&fate), "{id} {name}");
        }
        world.end();
    }
}

#[test]
fn a_query_before_a_restart_still_times_out() {
    let mut world = world();
    ask(&mut world, 7, "allowed.test");
    world.wait(9_000);
    world.hand_over();
    world.wait(2_000);
    let handle = tell(&mut world, &answer(7, "allowed.test", A, 3, &[]));
    assert_eq!(world.fate(handle), Some(&Fate::Discarded(Reason::DnsUnsolicited)));
    world.end();
}
