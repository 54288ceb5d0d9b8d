//! Tests of frames, header compression and heads.

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::http1::{Body, Target};

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn text(fields: &Fields) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    fields
        .iter()
        .map(|(name, value, sensitive)| {
            let mark = if sensitive { "!" } else { "" };
            format!("{mark}{}={} ", text(name), text(value))
        })
        .collect::<String>()
        .trim_end()
        .to_owned()
}

fn decode(decoder: &mut Decoder, hex: &str) -> Result<String, ParseError> {
    let mut fields = Fields::default();
    decoder.decode(&bytes(hex), 4_000, &mut fields)?;
    Ok(text(&fields))
}

#[test]
fn examples_of_rfc_7541_without_state_are_decoded() {
    for (block, expected) in [
        (
            "400a637573746f6d2d6b65790d637573746f6d2d686561646572",
            "custom-key=custom-header",
        ),
        ("040c2f73616d706c652f70617468", ":path=/sample/path"),
        ("100870617373776f726406736563726574", "!password=secret"),
        ("82", ":method=GET"),
    ] {
        assert_eq!(decode(&mut Decoder::strict(), block).as_deref(), Ok(expected));
    }
}

#[test]
fn requests_of_rfc_7541_are_decoded_with_and_without_huffman_code() {
    let expected = [
        ":method=GET :scheme=http :path=/ :authority=www.example.com",
        ":method=GET :scheme=http :path=/ :authority=www.example.com cache-control=no-cache",
        ":method=GET :scheme=https :path=/index.html :authority=www.example.com custom-key=custom-value",
    ];
    for blocks in [
        [
            "828684410f7777772e6578616d706c652e636f6d",
            "828684be58086e6f2d6361636865",
            "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565",
        ],
        [
            "828684418cf1e3c2e5f23a6ba0ab90f4ff",
            "828684be5886a8eb10649cbf",
            "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
        ],
    ] {
        let mut decoder = Decoder::strict();
        for (block, expected) in blocks.into_iter().zip(expected) {
            assert_eq!(decode(&mut decoder, block).as_deref(), Ok(expected));
        }
    }
}

#[test]
fn responses_of_rfc_7541_are_decoded_with_eviction() {
    let expected = [
        ":status=302 cache-control=private date=Mon, 21 Oct 2013 20:13:21 GMT location=https://www.example.com",
        ":status=307 cache-control=private date=Mon, 21 Oct 2013 20:13:21 GMT location=https://www.example.com",
        ":status=200 cache-control=private date=Mon, 21 Oct 2013 20:13:22 GMT location=https://www.example.com \
         content-encoding=gzip set-cookie=foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1",
    ];
    // The examples assume a table of 256 bytes, which the first block announces here.
    for blocks in [
        [
            "3fe101 488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3",
            "4883640effc1c0bf",
            "88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007",
        ],
        [
            "3fe101 4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d546e1768747470733a2f2f7777772e6578616d706c652e636f6d",
            "4803333037c1c0bf",
            "88c1611d4d6f6e2c203231204f637420323031332032303a31333a323220474d54c05a04677a69707738666f6f3d4153444a4b48514b425a584f5157454f50495541585157454f49553b206d61782d6167653d333630303b2076657273696f6e3d31",
        ],
    ] {
        let mut decoder = Decoder::strict();
        for (block, expected) in blocks.into_iter().zip(expected) {
            assert_eq!(decode(&mut decoder, block).as_deref(), Ok(expected));
        }
        // The first response was evicted; its location would be the oldest of five entries.
        assert_eq!(decode(&mut decoder, "c1"), Err(ParseError::Hpack));
    }
}

#[test]
fn malformed_blocks_are_refused() {
    for block in [
        // Index 0; an index beyond both tables; an integer of more than five bytes.
        "80",
        "be",
        "ffffffffff01",
        // A block that ends within a literal, in its name or in its value.
        "40",
        "400a6375",
        "4001610561",
        "04",
        // A size update after a field.
        "8220",
        // Huffman code: EOS; padding of eight bits; padding with zeros.
        "0484ffffffff",
        "0482 1fff",
        "0481 18",
    ] {
        assert_eq!(
            decode(&mut Decoder::strict(), block),
            Err(ParseError::Hpack),
            "{block}"
        );
    }
}

#[test]
fn a_reduced_table_must_be_announced_by_the_next_block() {
    let mut decoder = Decoder::strict();
    decoder.set_limit(100);
    decoder.set_limit(4_096);
    assert_eq!(decoder.required_update(), Some(100));
    assert_eq!(decode(&mut decoder.clone(), "82"), Err(ParseError::TableSize));
    // 101 bytes, then 4,096 bytes: the lowest size was not announced.
    assert_eq!(
        decode(&mut decoder.clone(), "3f46 3fe11f 82"),
        Err(ParseError::TableSize)
    );
    assert_eq!(
        decode(&mut decoder.clone(), "3f45 3fe11f 82").as_deref(),
        Ok(":method=GET")
    );
    assert_eq!(
        decode(&mut decoder.clone(), "20 20 20 82"),
        Err(ParseError::TableSize)
    );
    // A size beyond the limit.
    assert_eq!(
        decode(&mut Decoder::strict(), "3fe21f 82"),
        Err(ParseError::TableSize)
    );
    let mut lenient = Decoder::lenient();
    lenient.set_limit(0);
    assert_eq!(decode(&mut lenient, "82").as_deref(), Ok(":method=GET"));
}

#[test]
fn a_long_list_is_cut_and_leaves_the_table_valid() {
    let mut decoder = Decoder::strict();
    let mut block = Vec::new();
    for n in 0..100_u8 {
        // A literal with incremental indexing: name `n`, value of 60 bytes.
        block.extend([0x40, 1, b'n', 60]);
        block.extend([n; 60]);
    }
    let mut fields = Fields::default();
    decoder.decode(&block, 3_000, &mut fields).unwrap();
    assert!(fields.is_truncated());
    assert_eq!((fields.size(), fields.iter().count()), (9_300, 32));
    // The newest entry is the last field of the block.
    let mut fields = Fields::default();
    decoder.decode(&[0xbe], 3_000, &mut fields).unwrap();
    assert_eq!(fields.value(b"n"), Some(&[99; 60][..]));
}

#[test]
fn a_block_that_refers_to_a_long_entry_again_and_again_is_refused_early() {
    let mut decoder = Decoder::strict();
    let mut block = vec![0x40, 1, b'n', 0x7f, 0x81, 0x1e];
    block.extend([b'v'; 127 + 1 + (30 << 7)]);
    let mut fields = Fields::default();
    decoder.decode(&block, 8_000, &mut fields).unwrap();
    assert_eq!(fields.size(), 1 + 127 + 1 + (30 << 7) + 32);
    // 60,000 references would be 240 MB.
    let bomb = vec![0xbe; 60_000];
    assert_eq!(
        decoder.decode(&bomb, 8_000, &mut fields),
        Err(ParseError::ListTooLong)
    );
    assert!(fields.size() < 40_000);
    assert!(fields.end() <= 8_000);
}

/// A frame header and its payload; of an unknown frame only the header.
type Read = Vec<(FrameHeader, Vec<u8>)>;

fn read(stream: &[u8], step: usize) -> (Read, Option<ParseError>, usize) {
    let mut frames = Frames::new(1_000);
    let (mut read, mut most) = (Read::new(), 0);
    for part in stream.chunks(step.max(1)) {
        let mut input = part;
        loop {
            match frames.next(&mut input) {
                Ok(Some(Piece::Frame(header, payload))) => read.push((header, payload.to_vec())),
                Ok(Some(Piece::Unknown(header))) => read.push((header, Vec::new())),
                Ok(Some(Piece::Data { header, padding, .. })) => {
                    read.push((header, padding.into_iter().collect()));
                }
                Ok(Some(Piece::Content { bytes, .. })) => {
                    read.last_mut().unwrap().1.extend_from_slice(bytes);
                }
                Ok(None) => break,
                Err(error) => return (read, Some(error), most),
            }
            most = most.max(frames.held());
        }
        assert!(input.is_empty());
        most = most.max(frames.held());
    }
    (read, None, most)
}

proptest! {
    #[test]
    fn frames_are_the_same_wherever_the_stream_is_cut(
        frames in vec((0_u8..12, any::<u8>(), 0_u32..5, vec(any::<u8>(), 0..300)), 0..8),
        step in 1_usize..400,
    ) {
        let mut stream = Vec::new();
        for (kind, flags, id, payload) in &frames {
            FrameHeader { length: 0, kind: *kind, flags: *flags, stream: *id }.write_with(payload, &mut stream);
        }
        let whole = read(&stream, stream.len());
        let cut = read(&stream, step);
        prop_assert_eq!((&cut.0, cut.1), (&whole.0, whole.1));
        prop_assert!(cut.2 <= 310);
        if whole.1.is_none() {
            for ((header, payload), (kind, flags, id, sent)) in whole.0.iter().zip(&frames) {
                prop_assert_eq!((header.kind, header.flags, header.stream), (*kind, *flags, *id));
                if *kind < 10 {
                    prop_assert_eq!(payload, sent);
                }
            }
            prop_assert_eq!(whole.0.len(), frames.len());
        }
    }

    #[test]
    fn encoded_fields_are_decoded_without_state(
        fields in vec(("[:a-z-]{1,12}|:method|:status|:path|accept-encoding", vec(any::<u8>(), 0..200), any::<bool>()), 0..10),
    ) {
        let mut block = Vec::new();
        for (name, value, sensitive) in &fields {
            encode::field(name.as_bytes(), value, *sensitive, &mut block);
        }
        let mut decoded = Fields::default();
        let mut decoder = Decoder::strict();
        decoder.set_limit(0);
        encode::size_updates(SizeUpdates { least: Some(0), last: Some(0) }, &mut block);
        // The size update stands first.
        let update = block.pop().unwrap();
        block.insert(0, update);
        decoder.decode(&block, 1 << 20, &mut decoded).unwrap();
        let decoded: Vec<_> = decoded
            .iter()
            .map(|(name, value, sensitive)| (String::from_utf8(name.to_vec()).unwrap(), value.to_vec(), sensitive))
            .collect();
        prop_assert_eq!(decoded, fields);
    }

    #[test]
    fn header_blocks_are_split_into_frames_of_the_permitted_length(
        block in vec(any::<u8>(), 0..400),
        max in 8_usize..100,
        has_priority in any::<bool>(),
    ) {
        let mut out = Vec::new();
        let priority = has_priority.then_some([1, 2, 3, 4, 5]);
        headers_of(7, true, priority, &block, max, &mut out);
        let (frames, error, _) = read(&out, out.len());
        prop_assert_eq!(error, None);
        let mut joined = Vec::new();
        for (place, (header, payload)) in frames.iter().enumerate() {
            prop_assert!(payload.len() <= max);
            prop_assert_eq!(header.has(flags::END_HEADERS), place + 1 == frames.len());
            if place == 0 {
                let (found, fragment) = fragment_of(*header, payload).unwrap();
                prop_assert_eq!(found, priority);
                prop_assert!(header.has(flags::END_STREAM));
                joined.extend_from_slice(fragment);
            } else {
                prop_assert_eq!(header.kind, kind::CONTINUATION);
                joined.extend_from_slice(payload);
            }
        }
        prop_assert_eq!(joined, block);
    }
}

#[test]
fn invalid_frames_are_refused() {
    for (frame, error) in [
        // DATA of 16,385 bytes.
        ("004001 00 00 00000001", ParseError::FrameSize),
        // Padded DATA without a Pad Length field; with a padding as long as the payload.
        ("000000 00 08 00000001", ParseError::FrameSize),
        ("000002 00 08 00000001 02 00", ParseError::Padding),
        // HEADERS beyond what is buffered.
        ("0003e9 01 04 00000001", ParseError::BlockTooLong),
        ("0003ea 04 00 00000000", ParseError::FrameSize),
    ] {
        assert_eq!(read(&bytes(frame), 100).1, Some(error), "{frame}");
    }
    let headers = |flags, payload: &str| {
        let header = FrameHeader {
            length: 0,
            kind: kind::HEADERS,
            flags,
            stream: 1,
        };
        fragment_of(header, &bytes(payload)).map(|(_, fragment)| fragment.to_vec())
    };
    assert_eq!(
        headers(flags::PADDED | flags::PRIORITY, "01 0000000010 82 00"),
        Ok(vec![0x82])
    );
    assert_eq!(headers(flags::PADDED, "02 82"), Err(ParseError::Padding));
    assert_eq!(headers(flags::PADDED, ""), Err(ParseError::FrameSize));
    assert_eq!(headers(flags::PRIORITY, "00000000"), Err(ParseError::FrameSize));
    assert!(Settings::parse(&[0; 7]).is_err());
}

/// Method, host, path, form, body and cookie of a request, or the reason why it is refused.
type Described = Result<(String, String, String, Target, Body, Option<String>), ParseError>;

/// Reads a request of lines `name: value`.
fn describe(head: &str, end_stream: bool) -> Described {
    let mut block = Vec::new();
    for line in head.lines().map(str::trim_start).filter(|line| !line.is_empty()) {
        let is_pseudo = line.starts_with(':');
        let (name, value) = line.trim_start_matches(':').split_once(':').unwrap();
        let name = format!("{}{name}", if is_pseudo { ":" } else { "" });
        let value = value.strip_prefix(' ').unwrap_or(value);
        let value = value.replace("\\r", "\r").replace("\\0", "\0");
        encode::field(name.as_bytes(), value.as_bytes(), false, &mut block);
    }
    let mut fields = Fields::default();
    Decoder::strict().decode(&block, 1 << 20, &mut fields).unwrap();
    let (mut cookie, mut buffer) = (Vec::new(), FieldBuffer::new());
    let head = request(&fields, end_stream, &mut cookie, &mut buffer)?;
    let request = head.request;
    let cookie = request.headers.values("cookie").next();
    Ok((
        request.method.into(),
        request.host.into(),
        request.path.into(),
        request.form,
        request.body,
        cookie.map(|value| String::from_utf8(value.to_vec()).unwrap()),
    ))
}

const GET: &str = ":method: GET\n:scheme: https\n:path: /a?b\n:authority: a.test\n";

#[test]
fn requests_get_the_form_of_http1() {
    let ok = |method: &str, host: &str, path: &str, form, body| {
        Ok((method.into(), host.into(), path.into(), form, body, None))
    };
    let get = |body| ok("GET", "a.test", "/a?b", Target::Origin, body);
    assert_eq!(describe(GET, true), get(Body::None));
    assert_eq!(describe(GET, false), get(Body::Chunked));
    assert_eq!(
        describe(&format!("{GET}content-length: 12"), false),
        get(Body::Length(12))
    );
    assert_eq!(
        describe(&format!("{GET}content-length: 0"), true),
        get(Body::Length(0))
    );
    assert_eq!(describe(&format!("{GET}host: A.test:443"), true), get(Body::None));
    assert_eq!(describe(&format!("{GET}te: trailers"), true), get(Body::None));
    let crumbs = describe(&format!("{GET}cookie: a=1\nx: y\ncookie: b=2"), true).unwrap();
    assert_eq!(crumbs.5.as_deref(), Some("a=1; b=2"));
    let host = ":method: GET\n:scheme: http\n:path: /\nhost: b.test";
    assert_eq!(
        describe(host, true),
        ok("GET", "b.test", "/", Target::Origin, Body::None)
    );
    let bare = host.replace("b.test", "fd00::1");
    assert_eq!(
        describe(&bare, true),
        ok("GET", "fd00::1", "/", Target::Origin, Body::None)
    );
    let options = ":method: OPTIONS\n:scheme: http\n:path: *\n:authority: b.test";
    assert_eq!(
        describe(options, true),
        ok("OPTIONS", "b.test", "*", Target::Asterisk, Body::None)
    );
    let connect = ":method: CONNECT\n:authority: b.test:22";
    assert_eq!(
        describe(connect, false),
        ok("CONNECT", "b.test:22", "", Target::Authority, Body::None)
    );
    let extended = ":method: CONNECT\n:protocol: websocket\n:scheme: https\n:path: /chat\n:authority: b.test";
    assert_eq!(
        describe(extended, false),
        ok("CONNECT", "b.test", "/chat", Target::Origin, Body::None)
    );
}

#[test]
fn malformed_requests_are_refused() {
    use ParseError as E;
    let of = |fields: &str| format!("{GET}{fields}");
    for (head, error) in [
        // RFC 9113, 8.2.1: names and values.
        (of("X-Upper: 1"), E::FieldName),
        (of("a b: 1"), E::FieldName),
        (of("a\u{e9}: 1"), E::FieldName),
        (of("a: b\\rc: d"), E::FieldValue),
        (of("a: b\\0"), E::FieldValue),
        (of("a:  b"), E::FieldValue),
        (of("a: b\t"), E::FieldValue),
        // 8.2.2: fields of one connection.
        (of("connection: close"), E::ConnectionField),
        (of("transfer-encoding: chunked"), E::ConnectionField),
        (of("keep-alive: 1"), E::ConnectionField),
        (of("proxy-connection: close"), E::ConnectionField),
        (of("upgrade: h2c"), E::ConnectionField),
        (of("http2-settings: AAMAAABk"), E::ConnectionField),
        (of("te: trailers, deflate"), E::ConnectionField),
        // A server that translates names finds a framing field.
        (of("content_length: 5"), E::DisguisedName),
        (of("transfer_encoding: chunked"), E::DisguisedName),
        // 8.3: pseudo-header fields.
        (of("a: b\n:path: /c"), E::PseudoHeader),
        (of(":path: /c"), E::PseudoHeader),
        (of(":method: GET"), E::PseudoHeader),
        (of(":authority: a.test"), E::PseudoHeader),
        (of(":status: 200"), E::PseudoHeader),
        (of(":unknown: 1"), E::PseudoHeader),
        (of(":protocol: websocket"), E::PseudoHeader),
        (GET.replace(":method: GET\n", ""), E::PseudoHeader),
        (GET.replace(":scheme: https\n", ""), E::PseudoHeader),
        (GET.replace(":path: /a?b\n", ""), E::PseudoHeader),
        (GET.replace(":authority: a.test\n", ""), E::Authority),
        (GET.replace("a.test", "user@a.test"), E::Authority),
        (GET.replace("a.test", ""), E::Authority),
        (GET.replace("a.test", "a.test/x"), E::Authority),
        (GET.replace("https", "ftp"), E::Scheme),
        (GET.replace("/a?b", ""), E::Path),
        (GET.replace("/a?b", "*"), E::Path),
        (GET.replace("/a?b", "a"), E::Path),
        (GET.replace("/a?b", "http://b.test/"), E::Path),
        (GET.replace("/a?b", "/a b"), E::Path),
        (GET.replace("/a?b", "/a#b"), E::Path),
        (GET.replace("/a?b", "/\u{e9}"), E::Path),
        (GET.replace("GET", "G ET"), E::Method),
        (GET.replace("GET", ""), E::Method),
        (GET.replace("GET", "head"), E::Method),
        (GET.replace("GET", "Connect"), E::Method),
        (":method: CONNECT\n:authority: a.test".into(), E::Authority),
        (
            ":method: CONNECT\n:authority: a.test:1\n:path: /".into(),
            E::PseudoHeader,
        ),
        (":method: CONNECT\nhost: a.test:1".into(), E::PseudoHeader),
        (GET.replace("GET", "CONNECT"), E::PseudoHeader),
        // Host, Content-Length and Expect.
        (of("host: b.test"), E::HostDiffers),
        (of("host: a.test:80"), E::HostDiffers),
        (of("host: a.test\nhost: a.test"), E::HostDiffers),
        (of("content-length: 5"), E::ContentLength),
        (of("content-length: +5"), E::ContentLength),
        (of("content-length: 0\ncontent-length: 0"), E::ContentLength),
        (of("expect: 200-ok"), E::Expect),
    ] {
        assert_eq!(describe(&head, true), Err(error), "{head}");
    }
    let many: String = (0..200).map(|n| format!("x-{n}: 1\n")).collect();
    assert_eq!(describe(&of(&many), true), Err(E::ListTooLong));
}
