//! Tests of Kafka requests and responses.

use proptest::prelude::*;

use super::*;

/// One line for each API key and version: a request that names topics, its topics, and the response that denies the
/// request. An independent implementation has written the requests and has decoded the responses.
const VECTORS: &str = include_str!("vectors.txt");

struct Vector {
    key: i16,
    version: i16,
    request: Vec<u8>,
    topics: Vec<String>,
    response: Option<Vec<u8>>,
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(hex.get(at..at + 2).unwrap(), 16).unwrap())
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn vectors() -> Vec<Vector> {
    VECTORS
        .lines()
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            Vector {
                key: words[0].parse().unwrap(),
                version: words[1].parse().unwrap(),
                request: bytes(words[2]),
                topics: words[3]
                    .split(',')
                    .filter(|topic| *topic != "-")
                    .map(str::to_owned)
                    .collect(),
                response: words.get(4).filter(|hex| **hex != "-").map(|hex| bytes(hex)),
            }
        })
        .collect()
}

fn broker() -> Broker {
    Broker {
        host: "192.0.2.1".into(),
        port: 9092,
    }
}

fn topics(request: &Request<'_>) -> Result<Vec<String>, ParseError> {
    let mut topics = Vec::new();
    request.walk(&mut |item| match item {
        Item::Topic(name) => topics.push(String::from_utf8_lossy(name).into_owned()),
        Item::TopicId(id) => topics.push(format!("#{}", hex(&id))),
        Item::AllTopics => topics.push("*".into()),
        _ => {}
    })?;
    Ok(topics)
}

#[test]
fn each_version_of_each_request_is_read_completely() {
    let mut read = 0;
    for vector in vectors() {
        let name = format!("{} {}", vector.key, vector.version);
        let request = Request::parse(&vector.request).unwrap();
        let header = request.header;
        assert_eq!((header.key, header.version), (vector.key, vector.version));
        assert_eq!(
            header.correlation,
            i32::from(vector.key) * 1000 + i32::from(vector.version)
        );
        assert_eq!(header.client, Some(&b"client-1"[..]), "{name}");
        match topics_of(vector.key, vector.version) {
            Some(Topics::Read) => {
                read += 1;
                let mut topics = topics(&request).unwrap();
                // The heartbeat has names and a pattern, which stands for all topics.
                topics.retain(|topic| topic != "*");
                assert_eq!(topics, vector.topics, "{name}");
            }
            Some(Topics::None | Topics::Admin) => assert_eq!(vector.topics, [""; 0], "{name}"),
            Some(Topics::Unread) => {}
            None => panic!("{name} is not known"),
        }
    }
    assert!(read > 90, "{read}");
}

#[test]
fn a_response_that_denies_is_one_that_clients_decode() {
    for vector in vectors() {
        let request = Request::parse(&vector.request).unwrap();
        let denied = deny(&request, None, &broker());
        let name = format!("{} {}: {denied:?}", vector.key, vector.version);
        let response = denied.ok().map(|denied| denied.response);
        assert_eq!(response, vector.response, "{name}");
    }
}

#[test]
fn the_outcome_of_a_denied_response_is_its_error_code() {
    for vector in vectors() {
        let Some(response) = &vector.response else {
            continue;
        };
        let request = Request::parse(&vector.request).unwrap();
        let error = deny(&request, None, &broker()).unwrap().error;
        // The first versions of DescribeLogDirs have no place for an error: the broker leaves denied topics out.
        let error = if vector.key == 35 && vector.version < 3 {
            0
        } else {
            error
        };
        let outcome = outcome(vector.key, vector.version, &response[SIZE..]);
        assert_eq!(outcome.error, error, "{} {}", vector.key, vector.version);
    }
}

#[test]
fn a_request_that_ends_early_or_late_is_refused() {
    for vector in vectors() {
        if topics_of(vector.key, vector.version) != Some(Topics::Read) {
            continue;
        }
        let name = format!("{} {}", vector.key, vector.version);
        for length in 0..vector.request.len() {
            let read = Request::parse(&vector.request[..length]).and_then(|request| topics(&request));
            assert!(read.is_err(), "{name} {length}");
        }
        let mut longer = vector.request.clone();
        longer.push(0);
        let read = Request::parse(&longer).and_then(|request| topics(&request));
        assert_eq!(read, Err(ParseError::TrailingBytes), "{name}");
    }
}

/// Returns a request with this header, without client id, and a body.
fn request(key: i16, version: i16, body: &[u8]) -> Vec<u8> {
    let mut request = Vec::new();
    request.extend(key.to_be_bytes());
    request.extend(version.to_be_bytes());
    request.extend(7_i32.to_be_bytes());
    request.extend((-1_i16).to_be_bytes());
    if table::is_flexible(key, version) {
        request.push(0);
    }
    request.extend(body);
    request
}

fn topics_in(key: i16, version: i16, body: &[u8]) -> Result<Vec<String>, ParseError> {
    topics(&Request::parse(&request(key, version, body))?)
}

#[test]
fn old_versions_are_read() {
    // Produce 0: acks, timeout, one topic with one partition.
    let produce = b"\0\x01\0\0\0\x01\0\0\0\x01\0\x01a\0\0\0\x01\0\0\0\x05\0\0\0\x02rr";
    assert_eq!(topics_in(PRODUCE, 0, produce), Ok(vec!["a".into()]));
    assert_eq!(topics_in(PRODUCE, 2, produce), Ok(vec!["a".into()]));
    // Fetch 0: replica, wait, minimum, one topic with one partition.
    let fetch = b"\xff\xff\xff\xff\0\0\0\x01\0\0\0\x01\0\0\0\x01\0\x01a\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\x09";
    assert_eq!(topics_in(FETCH, 0, fetch), Ok(vec!["a".into()]));
    assert_eq!(topics_in(FETCH, 2, fetch), Ok(vec!["a".into()]));
}

#[test]
fn metadata_of_all_topics_is_told_from_that_of_none() {
    assert_eq!(topics_in(METADATA, 0, &[0; 4]), Ok(vec!["*".into()]));
    assert_eq!(topics_in(METADATA, 1, &[0; 4]), Ok(vec![]));
    assert_eq!(topics_in(METADATA, 1, &[0xff; 4]), Ok(vec!["*".into()]));
    assert_eq!(topics_in(METADATA, 12, &[0, 1, 1, 0]), Ok(vec!["*".into()]));
    assert_eq!(topics_in(METADATA, 12, &[1, 1, 1, 0]), Ok(vec![]));
}

#[test]
fn a_description_of_no_topic_partitions_is_one_of_all_topics() {
    // DescribeTopicPartitions 0: topics, limit, cursor (-1 for null), tags.
    let topics = |body: &[u8]| topics_in(75, 0, body);
    assert_eq!(topics(b"\x01\0\0\0\x64\xff\0"), Ok(vec!["*".into()]));
    assert_eq!(topics(b"\x00\0\0\0\x64\xff\0"), Ok(vec!["*".into()]));
    let cursor = b"\x01\0\0\0\x64\0\x02a\0\0\0\0\0\0";
    assert_eq!(topics(cursor), Ok(vec!["*".into(), "a".into()]));
    assert_eq!(topics(b"\x02\x02a\0\0\0\0\x64\xff\0"), Ok(vec!["a".into()]));
}

#[test]
fn a_list_of_config_resources_passes_no_topic_rule() {
    for version in [0, 1] {
        assert_eq!(topics_of(74, version), Some(Topics::Unread), "{version}");
    }
}

#[test]
fn a_topic_without_name_and_id_is_refused() {
    let mut body = vec![2];
    body.extend([0; 16]);
    body.extend([0, 0, 1, 1, 0]);
    assert_eq!(topics_in(METADATA, 12, &body), Err(ParseError::Length));
}

#[test]
fn forged_lengths_are_refused() {
    let metadata = |body: &[u8]| topics_in(METADATA, 4, body);
    // More elements than there are bytes, negative numbers, a negative text.
    assert_eq!(metadata(b"\x7f\xff\xff\xff\0"), Err(ParseError::Truncated));
    assert_eq!(metadata(b"\x80\0\0\0\0"), Err(ParseError::Length));
    assert_eq!(metadata(b"\xff\xff\xff\xfe\0"), Err(ParseError::Length));
    assert_eq!(metadata(b"\0\0\0\x01\xff\xfe\0"), Err(ParseError::Length));
    assert_eq!(metadata(b"\0\0\0\x01\x7f\xff\0"), Err(ParseError::Truncated));
    let flexible = |body: &[u8]| topics_in(METADATA, 9, body);
    assert_eq!(flexible(b"\xff\xff\xff\xff\x1f\0\0\0\0"), Err(ParseError::Varint));
    assert_eq!(
        flexible(b"\xff\xff\xff\xff\xff\x01\0\0\0"),
        Err(ParseError::Varint)
    );
    assert_eq!(flexible(b"\xff\xff\xff\xff\x0f\0\0\0\0"), Err(ParseError::Length));
    assert_eq!(
        flexible(b"\xff\xff\xff\xff\x07\0\0\0\0"),
        Err(ParseError::Truncated)
    );
    // Tagged fields: known, twice the same, longer than the message.
    assert_eq!(flexible(b"\x01\0\0\0\x01\x05\x01x"), Ok(vec![]));
    assert_eq!(flexible(b"\x01\0\0\0\x02\x05\0\x05\0"), Err(ParseError::Tags));
    assert_eq!(flexible(b"\x01\0\0\0\x01\x05\x09x"), Err(ParseError::Truncated));
}

#[test]
fn the_header_version_follows_the_api_version() {
    // ControlledShutdown 0 has no client id; all other requests have one.
    let parsed =
        |message: &[u8]| Request::parse(message).map(|request| request.header.client.map(<[u8]>::to_vec));
    assert_eq!(parsed(b"\0\x07\0\0\0\0\0\x01\0\0\0\x09"), Ok(None));
    assert_eq!(
        parsed(b"\0\x07\0\x01\0\0\0\x01\0\x01c\0\0\0\x09"),
        Ok(Some(b"c".to_vec()))
    );
    // The client id is not compact in flexible versions, and tagged fields follow it.
    assert_eq!(
        parsed(b"\0\x12\0\x03\0\0\0\x01\0\x01c\0"),
        Ok(Some(b"c".to_vec()))
    );
    assert_eq!(
        parsed(b"\0\x12\0\x03\0\0\0\x01\0\x01c"),
        Err(ParseError::Truncated)
    );
    assert_eq!(
        parsed(b"\xff\xff\0\0\0\0\0\x01\0\x01c"),
        Err(ParseError::NotKafka)
    );
}

#[test]
fn tagged_fields_of_a_header_have_a_limit() {
    // Metadata 9 with a null client id, and one tagged field of `length` bytes behind a number, a tag and a size.
    let parse = |length: usize, rest: usize| {
        let mut message = b"\0\x03\0\x09\0\0\0\x01\xff\xff\x01\0".to_vec();
        message.extend([length as u8 | 0x80, (length >> 7) as u8]);
        message.resize(message.len() + length + rest, 0);
        Request::parse(&message).map(|request| request.header.correlation)
    };
    for rest in [0, 1, 10_000] {
        assert_eq!(parse(4096 - 4, rest), Ok(1), "{rest}");
        assert_eq!(parse(4096 - 3, rest), Err(ParseError::TooLong), "{rest}");
    }
}

#[test]
fn other_protocols_are_told_by_their_first_bytes() {
    let length = |bytes: &[u8]| message_length(bytes, 8, MAX_REQUEST);
    assert_eq!(length(b"\x16\x03\x01\x02\0\x01"), Err(ParseError::NotKafka));
    assert_eq!(length(b"GET / HTTP/1.1"), Err(ParseError::NotKafka));
    assert_eq!(length(b"\x7f\xff\xff\xff"), Err(ParseError::NotKafka));
    assert_eq!(length(b"\xff\xff\xff\xff"), Err(ParseError::NotKafka));
    assert_eq!(length(b"\0\0\0\x07"), Err(ParseError::NotKafka));
    assert_eq!(length(b"\0\0\0"), Ok(None));
    assert_eq!(length(b"\0\0\0\x08"), Ok(Some(8)));
}

#[test]
fn the_last_topic_of_a_produce_request_is_announced() {
    let body = b"\0\x01\0\0\0\x01\0\0\0\x02\0\x01a\0\0\0\0\0\x01b\0\0\0\x01\0\0\0\x05\0\0\0\x02rr";
    let mut items = Vec::new();
    let request = request(PRODUCE, 2, body);
    Request::parse(&request)
        .unwrap()
        .walk(&mut |item| items.push(item))
        .unwrap();
    assert_eq!(
        items,
        [
            Item::Acks(1),
            Item::Topic(b"a"),
            Item::LastTopic,
            Item::Topic(b"b"),
            Item::Partition(5),
        ]
    );
}

#[test]
fn a_request_with_too_many_parts_gets_no_response() {
    // OffsetFetch 8: groups of an empty name, each with one topic of an empty name and no partitions.
    let offset_fetch = |groups: usize| {
        let count = groups as u32 + 1;
        let mut body = vec![
            count as u8 & 0x7f | 0x80,
            (count >> 7) as u8 & 0x7f | 0x80,
            (count >> 14) as u8,
        ];
        for _ in 0..groups {
            body.extend([1, 2, 1, 1, 0, 0]);
        }
        body.extend([0, 0]);
        request(9, 8, &body)
    };
    let denied = |groups| {
        let message = offset_fetch(groups);
        deny(&Request::parse(&message).unwrap(), None, &broker())
    };
    let most = respond::MAX_PARTS / 2;
    // Behind size, correlation id, tags, throttle time and array length, each group has its own topic.
    let response = denied(most).unwrap().response;
    assert_eq!(response[15..23], [1, 2, 1, 1, 0, 0, 0, 0]);
    assert_eq!(response.len(), 15 + 8 * most + 1);
    assert_eq!(denied(most + 1), Err(ParseError::TooLong));
}

#[test]
fn a_session_error_is_one_of_the_whole_response() {
    let vector = vectors()
        .into_iter()
        .find(|vector| (vector.key, vector.version) == (FETCH, 11))
        .unwrap();
    let request = Request::parse(&vector.request).unwrap();
    let denied = deny(&request, Some(FETCH_SESSION_ID_NOT_FOUND), &broker()).unwrap();
    // Size, correlation id, throttle time, error, session, no topics.
    let mut expected = Vec::new();
    for number in [18, 1011, 0] {
        expected.extend(i32::to_be_bytes(number));
    }
    expected.extend([0, 70, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(hex(&denied.response), hex(&expected));
}

#[test]
fn topic_ids_are_learned_from_a_metadata_response() {
    let id = [7; 16];
    let mut response = Vec::new();
    response.extend([0, 0, 0, 1, 0, 0, 0, 0, 0]);
    // One broker: number, host, port, rack.
    response.extend([2, 0, 0, 0, 1, 2, b'h', 0, 0, 0x23, 0x84, 0, 0]);
    // Cluster id, controller.
    response.extend([0, 0, 0, 0, 1]);
    // Two topics, of which the second has an error.
    response.push(3);
    for (error, name) in [(0, b'a'), (29, b'b')] {
        response.extend([0, error, 2, name]);
        response.extend(id);
        response.extend([0, 2]);
        response.extend([0; 14]);
        response.extend([2, 0, 0, 0, 1, 1, 1, 0]);
        response.extend([0x80, 0, 0, 0, 0]);
    }
    response.push(0);
    let mut learned = Vec::new();
    assert_eq!(
        learned_topics(12, &response, &mut |id, name| learned.push((id, name.to_vec()))),
        Ok(())
    );
    assert_eq!(learned, [(id, b"a".to_vec())]);
    for length in 0..response.len() - 1 {
        assert!(
            learned_topics(12, &response[..length], &mut |_, _| {}).is_err(),
            "{length}"
        );
    }
}

proptest! {
    /// No input makes the parser panic, and none makes it work longer than its length allows.
    #[test]
    fn any_bytes_are_read_or_refused(key in 0..93_i16, version in 0..20_i16, body in prop::collection::vec(any::<u8>(), 0..300)) {
        let message = request(key, version, &body);
        if let Ok(request) = Request::parse(&message) {
            let mut items = 0;
            let _ = request.walk(&mut |_| items += 1);
            prop_assert!(items <= 3 * message.len());
            let _ = deny(&request, None, &broker());
        }
        let _ = learned_topics(version, &body, &mut |_, _| {});
        let _ = outcome(key, version, &body);
    }

    /// A vector with one changed byte is read or refused, and its denial has the size that it announces.
    #[test]
    fn a_changed_request_is_read_or_refused(index in 0..10_000_usize, at in 0..10_000_usize, value: u8) {
        let vectors = vectors();
        let mut message = vectors[index % vectors.len()].request.clone();
        let at = at % message.len();
        message[at] = value;
        if let Ok(request) = Request::parse(&message)
            && let Ok(denied) = deny(&request, None, &broker())
        {
            let size = message_length(&denied.response, 4, usize::MAX).unwrap().unwrap();
            prop_assert_eq!(size + SIZE, denied.response.len());
        }
    }
}
