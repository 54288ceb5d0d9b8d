//! Parses any bytes as Kafka requests and responses, and writes the responses that deny the requests.
//!
//! The first byte of the input selects whether it is read as a request, or as a response of the key and version that
//! follow.

use palisade_protocols::kafka::{
    Broker, Item, Request, deny, learned_topics, message_length, outcome, topics_of,
};

/// Reads one message.
pub fn run(input: &[u8]) {
    let Some((&kind, message)) = input.split_first() else {
        return;
    };
    if kind % 4 == 0 {
        response(message);
    } else {
        request(message);
    }
}

fn response(message: &[u8]) {
    let Some((&[key, version], message)) = message.split_first_chunk() else {
        return;
    };
    let (key, version) = (i16::from(key), i16::from(version % 32));
    let _ = outcome(key, version, message);
    let mut topics = 0;
    let _ = learned_topics(version, message, &mut |_, _| topics += 1);
    assert!(topics * 16 <= message.len());
}

fn request(message: &[u8]) {
    let Ok(request) = Request::parse(message) else {
        return;
    };
    let mut items = 0;
    let read = request.walk(&mut |item| {
        items += 1;
        if let Item::Topic(name) = item {
            assert!(name.len() <= message.len());
        }
    });
    // Each item is at least one byte of the message, but for the marks in front of elements.
    assert!(items <= 3 * message.len());
    if read.is_ok() {
        assert!(topics_of(request.header.key, request.header.version).is_some());
    }
    let Ok(denied) = deny(&request, None, &Broker::default()) else {
        return;
    };
    assert_ne!(denied.error, 0);
    let size = message_length(&denied.response, 4, usize::MAX).ok().flatten();
    assert_eq!(size.map(|size| size + 4), Some(denied.response.len()));
    assert_eq!(denied.response.get(4..8), message.get(4..8), "the correlation id");
}
