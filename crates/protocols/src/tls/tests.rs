//! Tests of records and hellos, cut at every byte.

use proptest::prelude::*;

use super::*;
use crate::dns::Name;

fn vector16(content: &[u8]) -> Vec<u8> {
    let mut out = (content.len() as u16).to_be_bytes().to_vec();
    out.extend_from_slice(content);
    out
}

fn extension(kind: u16, data: &[u8]) -> Vec<u8> {
    let mut out = kind.to_be_bytes().to_vec();
    out.extend(vector16(data));
    out
}

fn name_extension(name: &[u8]) -> Vec<u8> {
    let mut entry = vec![0];
    entry.extend(vector16(name));
    extension(0, &vector16(&entry))
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![kind];
    out.extend_from_slice(&(body.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(body);
    out
}

fn hello_body(extensions: &[u8]) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.push(32);
    body.extend([9; 32]);
    body.extend(vector16(&[0x13, 0x01, 0x13, 0x02]));
    body.extend([1, 0]);
    body.extend(vector16(extensions));
    body
}

fn hello(extensions: &[u8]) -> Vec<u8> {
    message(1, &hello_body(extensions))
}

fn record(kind: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![kind, 3, 1];
    out.extend(vector16(content));
    out
}

fn records(kind: u8, content: &[u8], size: usize) -> Vec<u8> {
    content
        .chunks(size)
        .flat_map(|chunk| record(kind, chunk))
        .collect()
}

fn first(stream: &[u8]) -> Result<ClientStep, ParseError> {
    ClientReader::default().next(&mut &stream[..])
}

fn read(extensions: &[u8]) -> Result<ClientHello, ParseError> {
    match first(&record(22, &hello(extensions)))? {
        ClientStep::Hello(hello) => Ok(*hello),
        other => panic!("{other:?}"),
    }
}

fn name(text: &str) -> ServerName {
    ServerName::Name(text.parse::<Name>().unwrap())
}

#[test]
fn the_server_name_is_parsed() {
    for (sent, expected) in [
        ("example.com", name("example.com")),
        ("WWW.Example.COM", name("www.example.com")),
        ("example.com.", name("example.com")),
        ("_srv.a-b.example", name("_srv.a-b.example")),
        ("192.0.2.1", ServerName::Address("192.0.2.1".parse().unwrap())),
        ("2001:db8::1", ServerName::Address("2001:db8::1".parse().unwrap())),
    ] {
        assert_eq!(
            read(&name_extension(sent.as_bytes())).unwrap().server_name,
            expected,
            "{sent}"
        );
    }
    assert_eq!(read(&[]).unwrap().server_name, ServerName::Missing);
    // No extensions at all.
    let mut bare = hello_body(&[]);
    bare.truncate(bare.len() - 2);
    let stream = record(22, &message(1, &bare));
    let ClientStep::Hello(hello) = first(&stream).unwrap() else {
        panic!("no hello");
    };
    assert_eq!(hello.server_name, ServerName::Missing);
}

#[test]
fn ambiguous_server_names_are_refused() {
    let long = [b'a'; 300];
    for bad in [
        &b""[..],
        b".",
        b"a..b",
        b".example.com",
        b"good.example\0.evil.example",
        b"a\\.b.example",
        b"exa mple.com",
        "b\u{fc}cher.example".as_bytes(),
        b"\xff\xfe",
        &long,
    ] {
        assert_eq!(read(&name_extension(bad)), Err(ParseError::BadName), "{bad:?}");
    }
    let mut two = vec![0];
    two.extend(vector16(b"a.example"));
    two.push(0);
    two.extend(vector16(b"b.example"));
    assert_eq!(
        read(&extension(0, &vector16(&two))),
        Err(ParseError::SeveralNames)
    );
    let mut other = vec![1];
    other.extend(vector16(b"a.example"));
    assert_eq!(
        read(&extension(0, &vector16(&other))),
        Err(ParseError::SeveralNames)
    );
    let twice = [name_extension(b"a.example"), name_extension(b"b.example")].concat();
    assert_eq!(read(&twice), Err(ParseError::DuplicateExtension));
    // An empty list, or bytes after the list.
    assert_eq!(read(&extension(0, &[])), Err(ParseError::Malformed));
    assert_eq!(read(&extension(0, &[0, 0])), Err(ParseError::Malformed));
    assert_eq!(
        read(&extension(0, &[0, 4, 0, 0, 1, b'a', 0])),
        Err(ParseError::Malformed)
    );
}

#[test]
fn grease_versions_are_ignored() {
    assert_eq!(read(&[]).unwrap().version, 0x0303);
    let versions = extension(43, &[6, 0x7a, 0x7a, 3, 4, 3, 3]);
    assert_eq!(read(&versions).unwrap().version, 0x0304);
    let grease = [
        extension(0x2a2a, &[]),
        name_extension(b"a.example"),
        extension(0x4a4a, &[0]),
    ]
    .concat();
    assert_eq!(read(&grease).unwrap().server_name, name("a.example"));
}

#[test]
fn encrypted_hellos_and_early_data_are_detected() {
    let hello = read(
        &[
            name_extension(b"outer.example"),
            extension(0xfe0d, &[0; 40]),
            extension(42, &[]),
        ]
        .concat(),
    );
    let hello = hello.unwrap();
    assert!(hello.ech && hello.early_data);
    assert_eq!(hello.server_name, name("outer.example"));
}

#[test]
fn a_stream_that_is_not_tls_is_refused_at_its_first_bytes() {
    for (bytes, refusal) in [
        (&b"GET / HTTP/1.1\r\n"[..], ParseError::NotTls),
        (b"\x00", ParseError::NotTls),
        (b"\x16\x02", ParseError::NotTls),
        (b"\x80\x2e\x01\x03\x01", ParseError::Ssl2),
        (b"\x16\x03\x01\x40\x01", ParseError::RecordTooLong),
        (b"\x16\x03\x01\x00\x00", ParseError::EmptyRecord),
        (b"\x17\x03\x03\x00\x01x", ParseError::NotHello),
        (b"\x15\x03\x01\x00\x02\x01\x00", ParseError::NotHello),
        (b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", ParseError::NotHello),
        (b"\x16\x03\x01\x00\x04\x01\x01\x00\x00", ParseError::HelloTooLong),
    ] {
        assert_eq!(first(bytes), Err(refusal), "{bytes:?}");
    }
    assert_eq!(first(b""), Ok(ClientStep::More));
    assert_eq!(first(b"\x16\x03"), Ok(ClientStep::More));
}

#[test]
fn bytes_behind_or_records_within_a_hello_are_refused() {
    let hello = hello(&name_extension(b"a.example"));
    let mut trailing = hello.clone();
    trailing.push(0);
    assert_eq!(first(&record(22, &trailing)), Err(ParseError::Trailing));
    let twice = [hello.clone(), hello.clone()].concat();
    assert_eq!(first(&record(22, &twice)), Err(ParseError::Trailing));
    // The record has more bytes, which have not arrived.
    let mut promised = record(22, &trailing);
    promised.pop();
    assert_eq!(first(&promised), Err(ParseError::Trailing));
    let (a, b) = hello.split_at(20);
    let between = [record(22, a), record(20, &[1]), record(22, b)].concat();
    assert_eq!(first(&between), Err(ParseError::NotHello));
    let mut reader = ClientReader::default();
    let whole = [record(22, &hello), record(22, a), record(21, &[1, 0])].concat();
    let mut input = &whole[..];
    assert!(matches!(reader.next(&mut input), Ok(ClientStep::Hello(_))));
    assert_eq!(reader.next(&mut input), Err(ParseError::Interleaved));
}

#[test]
fn a_second_hello_is_parsed_like_the_first() {
    let stream = [
        record(22, &hello(&name_extension(b"a.example"))),
        record(20, &[1]),
        record(23, &[]),
        record(23, &[5; 100]),
        record(22, &hello(&name_extension(b"b.example"))),
    ]
    .concat();
    let mut reader = ClientReader::default();
    let mut input = &stream[..];
    let mut names = Vec::new();
    loop {
        match reader.next(&mut input).unwrap() {
            ClientStep::Hello(hello) => names.push(hello.server_name),
            ClientStep::Other => {}
            ClientStep::More => break,
        }
    }
    assert_eq!(names, [name("a.example"), name("b.example")]);
}

fn server_hello(random: [u8; 32], extensions: &[u8]) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend(random);
    body.push(0);
    body.extend([0x13, 0x01, 0]);
    body.extend(vector16(extensions));
    message(2, &body)
}

#[test]
fn the_server_reader_detects_whether_another_hello_follows() {
    let tls13 = extension(43, &[3, 4]);
    let read = |stream: &[u8]| ServerReader::default().next(&mut &stream[..]);
    let answer = record(22, &server_hello([1; 32], &tls13));
    assert_eq!(read(&answer), Ok(ServerStep::Answered(0x0304)));
    let old = record(22, &server_hello([1; 32], &[]));
    assert_eq!(read(&old), Ok(ServerStep::Answered(0x0303)));
    assert_eq!(read(&record(21, &[2, 40])), Ok(ServerStep::Refused));
    assert_eq!(read(&record(23, &[1])), Err(ParseError::NotHello));
    assert_eq!(read(b"HTTP/1.1 400"), Err(ParseError::NotTls));
    assert_eq!(read(&answer[..20]), Ok(ServerStep::More));
    // Certificate and further messages can be in the same record.
    let mut flight = server_hello([1; 32], &[]);
    flight.extend(message(11, &[0; 500]));
    assert_eq!(read(&record(22, &flight)), Ok(ServerStep::Answered(0x0303)));
    // Bytes after a HelloRetryRequest are refused, however the stream is segmented.
    let mut more = server_hello(record::RETRY_RANDOM, &tls13);
    let length = more.len();
    more.extend(server_hello([1; 32], &tls13));
    let more = record(22, &more);
    assert_eq!(read(&more), Err(ParseError::Trailing));
    assert_eq!(read(&more[..5 + length]), Err(ParseError::Trailing));

    let retry = [
        record(22, &server_hello(record::RETRY_RANDOM, &tls13)),
        record(20, &[1]),
        answer,
    ]
    .concat();
    let mut reader = ServerReader::default();
    let mut input = &retry[..];
    assert_eq!(reader.next(&mut input), Ok(ServerStep::Again));
    assert_eq!(reader.next(&mut input), Ok(ServerStep::Answered(0x0304)));
}

/// Returns the steps of a reader for a stream in pieces. Consecutive `Other` steps count as one, because there is one
/// per piece.
fn steps(stream: &[u8], cuts: &[usize]) -> Vec<Result<ClientStep, ParseError>> {
    let mut reader = ClientReader::default();
    let mut out = Vec::new();
    let mut from = 0;
    for to in cuts.iter().copied().chain([stream.len()]) {
        let mut input = &stream[from..to.max(from)];
        from = to.max(from);
        loop {
            match reader.next(&mut input) {
                Ok(ClientStep::More) => break,
                Ok(ClientStep::Other) if out.last() == Some(&Ok(ClientStep::Other)) => {}
                Ok(step) => out.push(Ok(step)),
                Err(refusal) => {
                    out.push(Err(refusal));
                    return out;
                }
            }
        }
    }
    out
}

proptest! {
    #[test]
    fn a_hello_parses_equally_however_the_stream_is_segmented(
        label in "[a-z]{1,20}",
        padding in 0_usize..3_000,
        size in 1_usize..600,
        mut cuts in prop::collection::vec(0_usize..5_000, 0..40),
    ) {
        let host = format!("{label}.example");
        let hello = hello(&[extension(21, &vec![0; padding]), name_extension(host.as_bytes())].concat());
        let stream = [records(22, &hello, size), record(23, b"data")].concat();
        cuts.retain(|cut| *cut < stream.len());
        cuts.sort_unstable();
        let whole = steps(&stream, &[]);
        prop_assert_eq!(whole.len(), 2);
        let Ok(ClientStep::Hello(read)) = &whole[0] else { panic!("{whole:?}") };
        prop_assert_eq!(&read.server_name, &name(&host));
        prop_assert_eq!(&steps(&stream, &cuts), &whole);
        // Byte by byte.
        let every: Vec<usize> = (0..stream.len()).collect();
        prop_assert_eq!(&steps(&stream, &every), &whole);
    }

    #[test]
    fn a_damaged_hello_parses_equally_in_one_piece_and_in_many(
        at in 0_usize..200,
        value in any::<u8>(),
        size in 1_usize..200,
    ) {
        let mut hello = hello(&[name_extension(b"a.example"), extension(43, &[2, 3, 4])].concat());
        let at = at % hello.len();
        hello[at] = value;
        let stream = records(22, &hello, size);
        let every: Vec<usize> = (0..stream.len()).collect();
        prop_assert_eq!(steps(&stream, &every), steps(&stream, &[]));
    }

    #[test]
    fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = steps(&bytes, &[]);
        let mut stream = vec![22, 3, 3];
        stream.extend(vector16(&message(1, &bytes)));
        let _ = steps(&stream, &[]);
        stream[5] = 2;
        let mut input = &stream[..];
        let mut reader = ServerReader::default();
        while let Ok(step) = reader.next(&mut input) {
            if step == ServerStep::More || input.is_empty() { break; }
        }
    }
}
