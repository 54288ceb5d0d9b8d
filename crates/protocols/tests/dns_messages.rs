//! DNS messages: valid ones compared with hickory-proto, malformed ones, and responses to refused queries.

use std::{net::IpAddr, str::FromStr};

use hickory_proto::{
    op::{Edns as HickoryEdns, Message, MessageType, OpCode, Query as HickoryQuery, ResponseCode},
    rr::{
        DNSClass, Name as HickoryName, RData, Record, RecordType,
        rdata::{
            A, AAAA, CNAME, HTTPS, SVCB, TXT,
            svcb::{IpHint, SvcParamKey, SvcParamValue},
        },
    },
};
use palisade_protocols::dns::{
    Address, Answer, Flags, Head, Limits, Name, ParseError, Query, Rcode, Source, first_message, reply, rtype,
};
use proptest::prelude::*;

fn hickory_name(text: &str) -> HickoryName {
    let mut name = HickoryName::from_ascii(text).unwrap();
    name.set_fqdn(true);
    name
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn a(owner: &str, ttl: u32, ip: &str) -> Record {
    let data = match IpAddr::from_str(ip).unwrap() {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    };
    Record::from_rdata(hickory_name(owner), ttl, data)
}

fn cname(owner: &str, ttl: u32, target: &str) -> Record {
    Record::from_rdata(
        hickory_name(owner),
        ttl,
        RData::CNAME(CNAME(hickory_name(target))),
    )
}

fn svcb(owner: &str, ttl: u32, priority: u16, v4: &[&str], v6: &[&str]) -> Record {
    let mut params = vec![];
    if !v4.is_empty() {
        let hints = IpHint(v4.iter().map(|ip| A(ip.parse().unwrap())).collect());
        params.push((SvcParamKey::Ipv4Hint, SvcParamValue::Ipv4Hint(hints)));
    }
    if !v6.is_empty() {
        let hints = IpHint(v6.iter().map(|ip| AAAA(ip.parse().unwrap())).collect());
        params.push((SvcParamKey::Ipv6Hint, SvcParamValue::Ipv6Hint(hints)));
    }
    let svcb = SVCB::new(priority, hickory_name("."), params);
    Record::from_rdata(hickory_name(owner), ttl, RData::HTTPS(HTTPS(svcb)))
}

fn question(asked: &str, kind: RecordType) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(HickoryQuery::query(hickory_name(asked), kind));
    message
}

fn response(asked: &str, kind: RecordType, answers: Vec<Record>) -> Message {
    let mut message = question(asked, kind);
    message.metadata.message_type = MessageType::Response;
    message.add_answers(answers);
    message
}

fn parse(message: &Message) -> Answer {
    Answer::parse(&message.to_vec().unwrap(), &Limits::ANSWER).unwrap()
}

fn ips(answer: &Answer) -> Vec<String> {
    answer
        .addresses
        .iter()
        .map(|address| address.ip.to_string())
        .collect()
}

#[test]
fn a_query_is_parsed() {
    let mut message = question("WWW.Example.com.", RecordType::HTTPS);
    let mut edns = HickoryEdns::new();
    edns.set_max_payload(4096).set_dnssec_ok(true);
    message.set_edns(edns);
    let query = Query::parse(&message.to_vec().unwrap(), &Limits::QUERY).unwrap();
    assert_eq!(query.id, 7);
    assert_eq!(query.question.name, name("www.example.com"));
    assert_eq!((query.question.rtype, query.question.class), (rtype::HTTPS, 1));
    assert!(query.flags.recursion_desired() && !query.flags.response());
    let edns = query.edns.unwrap();
    assert_eq!((edns.udp_payload, edns.version, edns.dnssec_ok), (4096, 0, true));
}

#[test]
fn only_records_of_the_queried_name_and_its_aliases_count() {
    let mut message = response(
        "www.shop.test.",
        RecordType::A,
        vec![
            a("elsewhere.test.", 5, "192.0.2.66"),
            a("EDGE.cdn.test.", 60, "192.0.2.1"),
            cname("lb.cdn.test.", 30, "edge.cdn.test."),
            cname("www.shop.test.", 300, "lb.cdn.test."),
            cname("other.test.", 1, "unrelated.test."),
            a("unrelated.test.", 1, "192.0.2.67"),
            a("edge.cdn.test.", 90, "192.0.2.2"),
            a("www.shop.test.", 200, "192.0.2.3"),
        ],
    );
    message.add_authority(a("edge.cdn.test.", 2, "192.0.2.68"));
    message.add_additional(a("www.shop.test.", 3, "192.0.2.69"));
    let answer = parse(&message);
    assert_eq!(ips(&answer), ["192.0.2.1", "192.0.2.2", "192.0.2.3"]);
    assert_eq!(answer.aliases, [name("lb.cdn.test"), name("edge.cdn.test")]);
    assert_eq!(answer.ttl, Some(30));
    assert_eq!(answer.question.unwrap().name, name("www.shop.test"));
}

/// musl, c-ares and Go use these addresses. If they were not learned, connections to them would be dropped.
#[test]
fn addresses_of_another_owner_count_if_the_name_has_none() {
    let strays = || vec![a("real.test.", 9, "192.0.2.1"), a("real.test.", 7, "2001:db8::1")];
    for (kind, counts) in [
        (RecordType::A, true),
        (RecordType::AAAA, true),
        (RecordType::ANY, true),
        (RecordType::HTTPS, false),
        (RecordType::MX, false),
    ] {
        let answer = parse(&response("asked.test.", kind, strays()));
        assert_eq!(answer.addresses.len(), if counts { 2 } else { 0 }, "{kind}");
        assert_eq!(answer.ttl, counts.then_some(7), "{kind}");
    }
    let mut with_own = strays();
    with_own.push(a("asked.test.", 60, "192.0.2.9"));
    assert_eq!(
        ips(&parse(&response("asked.test.", RecordType::A, with_own))),
        ["192.0.2.9"]
    );
    let only_hints = vec![svcb("other.test.", 9, 1, &["192.0.2.1"], &[])];
    assert!(
        parse(&response("asked.test.", RecordType::A, only_hints))
            .addresses
            .is_empty()
    );
}

#[test]
fn hints_of_service_bindings_count_as_addresses() {
    let answer = parse(&response(
        "x.test.",
        RecordType::HTTPS,
        vec![
            svcb("x.test.", 40, 1, &["192.0.2.1", "192.0.2.2"], &["2001:db8::1"]),
            svcb("y.test.", 10, 1, &["192.0.2.9"], &[]),
            svcb("x.test.", 20, 2, &[], &[]),
            svcb("x.test.", 15, 0, &["192.0.2.8"], &[]),
        ],
    ));
    assert_eq!(ips(&answer), ["192.0.2.1", "192.0.2.2", "2001:db8::1"]);
    assert!(
        answer
            .addresses
            .iter()
            .all(|address| address.source == Source::Hint)
    );
    assert_eq!(answer.ttl, Some(40));
}

#[test]
fn a_ttl_with_the_most_significant_bit_is_zero() {
    let answer = parse(&response(
        "x.test.",
        RecordType::A,
        vec![a("x.test.", 0x8000_0001, "192.0.2.1")],
    ));
    assert_eq!(answer.ttl, Some(0));
}

#[test]
fn records_of_other_classes_are_ignored() {
    let mut record = a("x.test.", 9, "192.0.2.1");
    record.dns_class = DNSClass::CH;
    let answer = parse(&response(
        "x.test.",
        RecordType::A,
        vec![record, a("x.test.", 9, "192.0.2.2")],
    ));
    assert_eq!(ips(&answer), ["192.0.2.2"]);
}

#[test]
fn response_codes_include_the_upper_bits_of_edns() {
    let mut message = response("x.test.", RecordType::A, vec![]);
    message.metadata.response_code = ResponseCode::BADVERS;
    message.set_edns(HickoryEdns::new());
    assert_eq!(parse(&message).rcode, 16);
    message.metadata.response_code = ResponseCode::NXDomain;
    message.metadata.truncation = true;
    let answer = parse(&message);
    assert!(answer.truncated());
    assert_eq!((answer.rcode, answer.ttl), (3, None));
}

/// Returns a message with these record counts and these bytes behind the header.
fn raw(flags: u16, counts: [u16; 4], body: &[u8]) -> Vec<u8> {
    let mut message = vec![0, 7];
    message.extend(flags.to_be_bytes());
    message.extend(counts.iter().flat_map(|count| count.to_be_bytes()));
    message.extend(body);
    message
}

const QUESTION: &[u8] = b"\x01x\x04test\x00\x00\x01\x00\x01";
const RESPONSE: u16 = 0x8180;

fn record(owner: &[u8], kind: u16, data: &[u8]) -> Vec<u8> {
    let mut record = owner.to_vec();
    record.extend(kind.to_be_bytes());
    record.extend([0, 1, 0, 0, 0, 60]);
    record.extend((data.len() as u16).to_be_bytes());
    record.extend(data);
    record
}

fn answer_with(records: &[Vec<u8>]) -> Result<Answer, ParseError> {
    let body = [QUESTION, &records.concat()].concat();
    Answer::parse(
        &raw(RESPONSE, [1, records.len() as u16, 0, 0], &body),
        &Limits::ANSWER,
    )
}

#[test]
fn malformed_queries_are_refused() {
    let question = |bytes: &[u8]| raw(0x0100, [1, 0, 0, 0], bytes);
    let long_name = [
        [b"\x3f".as_slice(), &[b'a'; 63]].concat().repeat(4),
        b"\x00\x00\x01\x00\x01".to_vec(),
    ]
    .concat();
    let table: Vec<(Vec<u8>, ParseError)> = vec![
        (vec![], ParseError::Short),
        (vec![0; 11], ParseError::Short),
        (raw(0x0100, [0; 4], &[]), ParseError::NoQuestion),
        (raw(0x0100, [1, 0, 0, 0], &[0; 5000]), ParseError::TooLong),
        (raw(RESPONSE, [1, 0, 0, 0], QUESTION), ParseError::WrongDirection),
        (raw(0x2800, [1, 0, 0, 0], QUESTION), ParseError::Opcode),
        (
            raw(0x0100, [2, 0, 0, 0], &QUESTION.repeat(2)),
            ParseError::ManyQuestions,
        ),
        (
            raw(
                0x0100,
                [1, 1, 0, 0],
                &[QUESTION, &record(b"\xc0\x0c", 1, &[1; 4])].concat(),
            ),
            ParseError::RecordsInQuery,
        ),
        (
            raw(
                0x0100,
                [1, 0, 1, 0],
                &[QUESTION, &record(b"\xc0\x0c", 1, &[1; 4])].concat(),
            ),
            ParseError::RecordsInQuery,
        ),
        (raw(0x0100, [1, 0, 0, 9], QUESTION), ParseError::TooManyRecords),
        (raw(0x0100, [1, 0, 0, 1], QUESTION), ParseError::Truncated),
        (question(b"\x01x\x04te"), ParseError::Truncated),
        (question(b"\x01x\x00\x00\x01\x00"), ParseError::Truncated),
        (question(&[QUESTION, b"\x00"].concat()), ParseError::TrailingBytes),
        (question(b"\x41x\x00\x00\x01\x00\x01"), ParseError::LabelType),
        (question(b"\x81x\x00\x00\x01\x00\x01"), ParseError::LabelType),
        (question(b"\xc0\x0c\x00\x01\x00\x01"), ParseError::BadPointer),
        (question(b"\xc0\x00\x00\x01\x00\x01"), ParseError::BadPointer),
        (question(b"\x01x\xc0\x0c\x00\x01\x00\x01"), ParseError::BadPointer),
        (question(b"\x01x\xff\xff\x00\x01\x00\x01"), ParseError::BadPointer),
        (question(&long_name), ParseError::NameTooLong),
        (
            raw(
                0x0100,
                [1, 0, 0, 2],
                &[QUESTION, &record(b"\x00", 41, &[]).repeat(2)].concat(),
            ),
            ParseError::BadOpt,
        ),
        (
            raw(
                0x0100,
                [1, 0, 0, 1],
                &[QUESTION, &record(b"\xc0\x0c", 41, &[])].concat(),
            ),
            ParseError::BadOpt,
        ),
        (
            raw(
                0x0100,
                [1, 0, 0, 1],
                &[QUESTION, &record(b"\x00", 41, b"\x00\x0c\x00\x04x")].concat(),
            ),
            ParseError::Truncated,
        ),
        (
            raw(
                0x0100,
                [1, 0, 0, 2],
                &[
                    QUESTION,
                    &record(b"\x00", 41, b"\x00\x0c\x00\x04x"),
                    &record(b"\x00", 1, &[0; 8]),
                ]
                .concat(),
            ),
            ParseError::BadOpt,
        ),
    ];
    for (message, refusal) in table {
        assert_eq!(
            Query::parse(&message, &Limits::QUERY).unwrap_err(),
            refusal,
            "{message:x?}"
        );
    }
    // The query of an incremental zone transfer has an authority section.
    let ixfr = b"\x01x\x04test\x00\x00\xfb\x00\x01";
    let message = raw(
        0,
        [1, 0, 1, 0],
        &[ixfr, &record(b"\xc0\x0c", 6, &[0; 22])[..]].concat(),
    );
    assert_eq!(
        Query::parse(&message, &Limits::QUERY).unwrap().question.rtype,
        rtype::IXFR
    );
}

#[test]
fn malformed_answers_are_refused() {
    let https = |data: &[u8]| record(b"\xc0\x0c", rtype::HTTPS, data);
    let table: Vec<(Vec<Vec<u8>>, ParseError)> = vec![
        (vec![record(b"\xc0\x0c", 1, &[1; 5])], ParseError::BadRdata),
        (vec![record(b"\xc0\x0c", 28, &[1; 4])], ParseError::BadRdata),
        (vec![record(b"\x01y\x00", 1, &[1; 3])], ParseError::BadRdata),
        (vec![record(b"\xc0\x0c", 5, b"\x01y\x00x")], ParseError::BadRdata),
        (vec![record(b"\xc0\x0c", 5, b"\xc0\x0c")], ParseError::AliasLoop),
        (
            vec![
                record(b"\xc0\x0c", 5, b"\x01y\x00"),
                record(b"\x01y\x00", 5, b"\xc0\x0c"),
            ],
            ParseError::AliasLoop,
        ),
        (
            vec![
                record(b"\xc0\x0c", 5, b"\x01y\x00"),
                record(b"\x01y\x00", 5, b"\x01y\x00"),
            ],
            ParseError::AliasLoop,
        ),
        (vec![record(b"\xc0\x0c", 41, &[])], ParseError::BadOpt),
        (vec![record(b"\xc0\x50", 1, &[1; 4])], ParseError::BadPointer),
        (vec![https(b"\x00\x01")], ParseError::BadSvcParams),
        (
            vec![https(b"\x00\x01\x00\x00\x04\x00\x00")],
            ParseError::BadSvcParams,
        ),
        (
            vec![https(b"\x00\x01\x00\x00\x04\x00\x05abcde")],
            ParseError::BadSvcParams,
        ),
        (
            vec![https(b"\x00\x01\x00\x00\x06\x00\x04abcd")],
            ParseError::BadSvcParams,
        ),
        (
            vec![https(b"\x00\x01\x00\x00\x04\x00\x04abcd\x00\x04\x00\x04abcd")],
            ParseError::BadSvcParams,
        ),
        (
            vec![https(b"\x00\x01\x00\x00\x04\x00\x04abcd\x00\x01\x00\x00")],
            ParseError::BadSvcParams,
        ),
        // The parameter ends in the next record.
        (
            vec![https(b"\x00\x01\x00\x00\x04\x00\x08abcd"), https(b"\x00\x01\x00")],
            ParseError::BadSvcParams,
        ),
        (
            vec![https(b"\x00\x01\x05a"), https(b"\x00\x01\x00")],
            ParseError::BadSvcParams,
        ),
    ];
    for (records, refusal) in table {
        assert_eq!(answer_with(&records).unwrap_err(), refusal, "{records:x?}");
    }
    let nothing_asked = raw(RESPONSE, [0, 1, 0, 0], &record(b"\x00", 1, &[1; 4]));
    assert_eq!(
        Answer::parse(&nothing_asked, &Limits::ANSWER).unwrap_err(),
        ParseError::NoQuestion
    );
    let query = raw(0x0100, [1, 0, 0, 0], QUESTION);
    assert_eq!(
        Answer::parse(&query, &Limits::ANSWER).unwrap_err(),
        ParseError::WrongDirection
    );
    let header_alone = raw(RESPONSE | 1, [0; 4], &[]);
    let answer = Answer::parse(&header_alone, &Limits::ANSWER).unwrap();
    assert_eq!((answer.rcode, answer.question), (1, None));
}

#[test]
fn a_refused_answer_leaves_the_value_empty() {
    let mut answer = answer_with(&[record(b"\xc0\x0c", 1, &[1; 4])]).unwrap();
    assert_eq!(answer.addresses.len(), 1);
    let body = [
        QUESTION,
        &record(b"\xc0\x0c", 1, &[1; 4]),
        &record(b"\xc0\x0c", 1, &[1; 3]),
    ]
    .concat();
    assert!(
        answer
            .read(&raw(RESPONSE, [1, 2, 0, 0], &body), &Limits::ANSWER)
            .is_err()
    );
    assert!(answer.addresses.is_empty() && answer.question.is_none() && answer.ttl.is_none());
}

#[test]
fn chains_of_aliases_are_limited() {
    let label = |n: u8| vec![2, b'n', b'a' + n, 0];
    let chain = |n: u8| {
        let mut records = vec![record(b"\xc0\x0c", 5, &label(0))];
        records.extend((1..n).map(|i| record(&label(i - 1), 5, &label(i))));
        records.push(record(&label(n - 1), 1, &[192, 0, 2, 1]));
        answer_with(&records)
    };
    assert_eq!(chain(16).unwrap().addresses.len(), 1);
    assert_eq!(chain(17).unwrap_err(), ParseError::TooManyAliases);
}

/// A chain of compression pointers, and 2,000 records whose names each follow the whole chain.
#[test]
fn a_compression_bomb_is_refused_early() {
    // The data of a TXT record is not parsed as a name, but pointers may point into it.
    let start = 12 + QUESTION.len() + 12;
    let mut pointers = vec![1, b'x', 0];
    for i in 0..4000_usize {
        let previous = if i == 0 { start } else { start + 3 + 2 * (i - 1) };
        pointers.extend((0xc000 | previous as u16).to_be_bytes());
    }
    let last = start + 3 + 2 * 3999;
    let mut records = vec![record(b"\xc0\x0c", 16, &pointers)];
    let to_last = (0xc000 | last as u16).to_be_bytes();
    records.extend((0..2000).map(|_| record(&to_last, 1, &[1; 4])));
    assert_eq!(answer_with(&records).unwrap_err(), ParseError::TooManyPointers);
    records.truncate(4);
    assert_eq!(answer_with(&records).unwrap().addresses.len(), 3);
}

#[test]
fn records_are_accepted_up_to_the_limit() {
    let records = |n| answer_with(&vec![record(b"\xc0\x0c", 1, &[1; 4]); n]);
    assert_eq!(records(2048).unwrap().addresses.len(), 2048);
    assert_eq!(records(2049).unwrap_err(), ParseError::TooManyRecords);
}

#[test]
fn replies_echo_the_question_and_answer_edns() {
    let mut message = question("wWw.ExAmple.com.", RecordType::AAAA);
    message.metadata.checking_disabled = true;
    for edns in [false, true] {
        if edns {
            let mut edns = HickoryEdns::new();
            edns.set_dnssec_ok(true);
            message.set_edns(edns);
        }
        let query = message.to_vec().unwrap();
        for (rcode, expected) in [
            (Rcode::Refused, ResponseCode::Refused),
            (Rcode::NxDomain, ResponseCode::NXDomain),
            (Rcode::ServFail, ResponseCode::ServFail),
        ] {
            let mut out = [0; 512];
            let len = reply(&query, rcode, &mut out).unwrap();
            let made = Message::from_vec(&out[..len]).unwrap();
            assert_eq!(made.metadata.message_type, MessageType::Response);
            assert_eq!((made.metadata.id, made.metadata.response_code), (7, expected));
            assert!(made.metadata.recursion_desired && made.metadata.checking_disabled);
            assert!(made.metadata.recursion_available && !made.metadata.authoritative);
            assert_eq!(made.queries, message.queries);
            // The question is echoed with its case.
            assert_eq!(out[12..12 + 21], query[12..12 + 21]);
            assert_eq!(made.edns.map(|edns| edns.flags().dnssec_ok), edns.then_some(true));
            assert_eq!(
                Answer::parse(&out[..len], &Limits::ANSWER).unwrap().rcode,
                rcode as u16
            );
        }
    }
}

#[test]
fn the_response_to_a_malformed_query_is_a_header() {
    let mut out = [0; 512];
    let update = raw(0x2900, [1, 0, 0, 0], QUESTION);
    let len = reply(&update, Rcode::NotImp, &mut out).unwrap();
    assert_eq!(out[..len], raw(0xa984, [0; 4], &[]));
    assert_eq!(ParseError::Opcode.rcode(), Some(Rcode::NotImp));
    assert_eq!(
        reply(&update[..11], Rcode::NotImp, &mut out),
        Err(ParseError::Short)
    );
    assert_eq!(
        reply(&raw(RESPONSE, [0; 4], &[]), Rcode::Refused, &mut out),
        Err(ParseError::WrongDirection)
    );
    assert_eq!(
        reply(&update, Rcode::NotImp, &mut out[..11]),
        Err(ParseError::TooLong)
    );
}

#[test]
fn tcp_streams_are_split_into_messages() {
    let first = raw(0x0100, [1, 0, 0, 0], QUESTION);
    let second = raw(0x0100, [0; 4], &[]);
    let mut stream = vec![];
    for message in [&first, &second, &first] {
        stream.extend((message.len() as u16).to_be_bytes());
        stream.extend(message.iter());
    }
    let mut rest = &stream[..];
    let mut found = vec![];
    while let Some(message) = first_message(rest, 4096).unwrap() {
        found.push(message.to_vec());
        rest = &rest[2 + message.len()..];
    }
    assert_eq!(found, [first.clone(), second, first.clone()]);
    assert!(rest.is_empty());
    for end in 0..2 + first.len() {
        assert_eq!(first_message(&stream[..end], 4096), Ok(None), "{end}");
    }
    assert_eq!(first_message(&[0, 11, 1], 100), Err(ParseError::BadTcpLength));
    assert_eq!(first_message(&[0, 101], 100), Err(ParseError::TooLong));
}

#[test]
fn the_head_of_an_answer_parses_without_the_rest() {
    let answer = raw(RESPONSE | 5, [1, 9999, 9999, 9999], QUESTION);
    for more in [&[][..], b"whatever"] {
        let head = Head::read(&[&answer[..], more].concat()).unwrap();
        assert_eq!((head.id, head.rcode), (7, 5));
        assert_eq!(head.question.unwrap().rtype, rtype::A);
    }
    for end in 0..answer.len() {
        let short = if end < 12 {
            ParseError::Short
        } else {
            ParseError::Truncated
        };
        assert_eq!(Head::read(&answer[..end]), Err(short));
    }
    let head = Head::read(&raw(RESPONSE, [0, 9, 0, 0], &[])).unwrap();
    assert_eq!(head.question, None);
    for (flags, questions, refusal) in [
        (0x0100, 1, ParseError::WrongDirection),
        (RESPONSE | 0x2800, 1, ParseError::Opcode),
        (RESPONSE, 2, ParseError::ManyQuestions),
    ] {
        assert_eq!(
            Head::read(&raw(flags, [questions, 0, 0, 0], QUESTION)),
            Err(refusal)
        );
    }
}

// --- against hickory ---

fn owner() -> impl Strategy<Value = String> {
    // There are few names, so that chains and shared owners occur.
    prop::sample::select(vec![
        "a.test.",
        "b.test.",
        "c.test.",
        "D.test.",
        "www.A.test.",
        "x.y.z.a.test.",
        "test.",
        ".",
        "a\\.b.test.",
    ])
    .prop_map(str::to_owned)
}

fn any_record() -> impl Strategy<Value = Record> {
    let ttl = prop_oneof![0..600_u32, any::<u32>()];
    (owner(), ttl, 0..8_u8, owner(), any::<u8>()).prop_map(|(owner, ttl, kind, target, last)| match kind {
        0 | 1 => a(&owner, ttl, &format!("192.0.2.{last}")),
        2 => a(&owner, ttl, &format!("2001:db8::{last:x}")),
        3 | 4 => cname(&owner, ttl, &target),
        5 => svcb(
            &owner,
            ttl,
            u16::from(last % 3),
            &["198.51.100.1"],
            &["2001:db8:1::1"],
        ),
        6 => svcb(&owner, ttl, 1, &[], &["2001:db8:2::1", "2001:db8:2::2"]),
        _ => Record::from_rdata(hickory_name(&owner), ttl, RData::TXT(TXT::new(vec![target]))),
    })
}

type LabelList = Vec<Vec<u8>>;
type Told = (IpAddr, u32, Source);

fn lower(name: &HickoryName) -> LabelList {
    name.to_lowercase().iter().map(<[u8]>::to_vec).collect()
}

fn labels(name: &Name) -> LabelList {
    name.labels().map(<[u8]>::to_vec).collect()
}

/// Returns the CNAME chain and the addresses of the queried name, derived from the message as hickory parses it.
fn by_hickory(message: &Message) -> Option<(Vec<LabelList>, Vec<Told>)> {
    let class_in = |record: &&Record| record.dns_class == DNSClass::IN;
    let mut chain = vec![lower(&message.queries[0].name)];
    loop {
        let next = message
            .answers
            .iter()
            .filter(class_in)
            .find_map(|record| match &record.data {
                RData::CNAME(target) if lower(&record.name) == chain[chain.len() - 1] => {
                    Some(lower(&target.0))
                }
                _ => None,
            });
        match next {
            Some(next) if chain.contains(&next) => return None,
            Some(next) => chain.push(next),
            None => break,
        }
    }
    let of_chain = addresses_by_hickory(message, |record| chain.contains(&lower(&record.name)));
    // If no name of the chain has an address, a question for addresses gets those of all owners.
    let asked = u16::from(message.queries[0].query_type);
    let is_address = |record: &Record| matches!(&record.data, RData::A(_) | RData::AAAA(_));
    let addresses = if of_chain.is_empty() && [1, 28, 255].contains(&asked) {
        addresses_by_hickory(message, is_address)
    } else {
        of_chain
    };
    Some((chain, addresses))
}

fn addresses_by_hickory(message: &Message, counts: impl Fn(&Record) -> bool) -> Vec<Told> {
    let class_in = |record: &&Record| record.dns_class == DNSClass::IN;
    let cap = |ttl: u32| if ttl > i32::MAX as u32 { 0 } else { ttl };
    let mut addresses = vec![];
    for record in message.answers.iter().filter(class_in) {
        if !counts(record) {
            continue;
        }
        let ttl = cap(record.ttl);
        match &record.data {
            RData::A(ip) => addresses.push((ip.0.into(), ttl, Source::Record)),
            RData::AAAA(ip) => addresses.push((ip.0.into(), ttl, Source::Record)),
            RData::HTTPS(HTTPS(svcb)) | RData::SVCB(svcb) if svcb.svc_priority > 0 => {
                for (_, value) in &svcb.svc_params {
                    match value {
                        SvcParamValue::Ipv4Hint(hints) => {
                            addresses.extend(hints.0.iter().map(|ip| (ip.0.into(), ttl, Source::Hint)));
                        }
                        SvcParamValue::Ipv6Hint(hints) => {
                            addresses.extend(hints.0.iter().map(|ip| (ip.0.into(), ttl, Source::Hint)));
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    addresses
}

fn agrees_with_hickory(bytes: &[u8]) -> Result<(), TestCaseError> {
    let Ok(theirs) = Message::from_vec(bytes) else {
        return Ok(());
    };
    if theirs.metadata.message_type == MessageType::Query {
        if let Ok(query) = Query::parse(bytes, &Limits::QUERY) {
            prop_assert_eq!(theirs.metadata.id, query.id);
            prop_assert_eq!(theirs.queries.len(), 1);
            prop_assert_eq!(labels(&query.question.name), lower(&theirs.queries[0].name));
            prop_assert_eq!(query.question.rtype, u16::from(theirs.queries[0].query_type));
            prop_assert_eq!(query.edns.is_some(), theirs.edns.is_some());
        }
    } else if let Ok(answer) = Answer::parse(bytes, &Limits::ANSWER) {
        prop_assert_eq!(theirs.metadata.id, answer.id);
        prop_assert_eq!(theirs.metadata.truncation, answer.truncated());
        if let Some(question) = &answer.question {
            prop_assert_eq!(labels(&question.name), lower(&theirs.queries[0].name));
            if question.class == 1 {
                let (chain, addresses) = by_hickory(&theirs).expect("no loop was seen");
                let ours: Vec<_> = answer
                    .addresses
                    .iter()
                    .map(|&Address { ip, ttl, source }| (ip, ttl, source))
                    .collect();
                prop_assert_eq!(ours, addresses);
                let names: Vec<_> = answer.aliases.iter().map(labels).collect();
                prop_assert_eq!(&names[..], &chain[1..]);
            }
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn valid_queries_parse_as_in_hickory(
        asked in owner(), kind in any::<u16>(), id in any::<u16>(), edns in any::<bool>(), rd in any::<bool>(),
    ) {
        // hickory treats OPT, TSIG and the class bits of mDNS in a question in another way.
        prop_assume!(![rtype::OPT, rtype::TSIG].contains(&kind));
        let mut message = question(&asked, RecordType::from(kind));
        message.metadata.id = id;
        message.metadata.recursion_desired = rd;
        if edns {
            message.set_edns(HickoryEdns::new());
        }
        let bytes = message.to_vec().unwrap();
        let query = Query::parse(&bytes, &Limits::QUERY);
        prop_assert!(query.is_ok(), "{:?}", query);
        prop_assert_eq!(query.unwrap().flags, Flags(if rd { 0x0100 } else { 0 }));
        agrees_with_hickory(&bytes)?;
    }

    #[test]
    fn valid_answers_parse_as_in_hickory(
        asked in owner(),
        answers in prop::collection::vec(any_record(), 0..14),
        more in prop::collection::vec(any_record(), 0..6),
        edns in any::<bool>(),
    ) {
        let mut message = response(&asked, if edns { RecordType::A } else { RecordType::HTTPS }, answers);
        for (i, record) in more.into_iter().enumerate() {
            if i % 2 == 0 { message.add_authority(record); } else { message.add_additional(record); }
        }
        if edns {
            message.set_edns(HickoryEdns::new());
        }
        let bytes = message.to_vec().unwrap();
        match Answer::parse(&bytes, &Limits::ANSWER) {
            Ok(_) => agrees_with_hickory(&bytes)?,
            Err(refusal) => {
                prop_assert_eq!(refusal, ParseError::AliasLoop);
                prop_assert!(by_hickory(&message).is_none());
            }
        }
    }
}

/// Random changes to the fuzzing corpus with a fixed seed: no message causes a panic, and messages that both parsers
/// accept have the same contents in both.
#[test]
fn mutated_messages_never_panic_and_never_differ() {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus/dns");
    let mut seeds: Vec<Vec<u8>> = std::fs::read_dir(&corpus)
        .unwrap_or_else(|error| panic!("{}: {error}", corpus.display()))
        .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
        .collect();
    seeds.sort();
    assert!(
        seeds.len() >= 8,
        "the corpus in {} is too small",
        corpus.display()
    );
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below.max(1) as u64) as usize
    };
    let mut taken = 0;
    for _ in 0..60_000 {
        let mut bytes = seeds[random(seeds.len())].clone();
        for _ in 0..random(4) {
            let at = random(bytes.len());
            match random(6) {
                0 => bytes[at] = random(256) as u8,
                1 => bytes[at] ^= 1 << random(8),
                2 => bytes.truncate(at.max(1)),
                3 => bytes.insert(at, [0, 0xc0, 12, 63, 255][random(5)]),
                4 => {
                    let other = &seeds[random(seeds.len())];
                    bytes.truncate(at.max(1));
                    bytes.extend(&other[random(other.len())..]);
                }
                _ => bytes[at] = [0, 1, 5, 12, 28, 41, 64, 65, 0xc0, 0xff][random(10)],
            }
        }
        let mut out = [0; 512];
        if let Ok(len) = reply(&bytes, Rcode::Refused, &mut out) {
            // The response has the opcode of the query.
            let made = Answer::parse(&out[..len], &Limits::ANSWER);
            assert!(matches!(made, Ok(_) | Err(ParseError::Opcode)), "{bytes:x?}");
        }
        taken += usize::from(Query::parse(&bytes, &Limits::QUERY).is_ok());
        taken += usize::from(Answer::parse(&bytes, &Limits::ANSWER).is_ok());
        if let Err(error) = agrees_with_hickory(&bytes) {
            panic!("{error}: {bytes:x?}");
        }
        if let Ok(answer) = Answer::parse(&bytes, &Limits::ANSWER) {
            // The head parses equally without the rest of the message.
            let head = Head::read(&bytes).unwrap();
            assert_eq!((head.id, head.question), (answer.id, answer.question));
        }
    }
    assert!(
        taken > 10_000,
        "the changes leave too little that is taken: {taken}"
    );
}
