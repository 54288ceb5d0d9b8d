//! A DNS message, parsed as query, as answer and as a TCP stream. Run: `cargo +nightly fuzz run dns` in tests/.
#![no_main]

use libfuzzer_sys::fuzz_target;
use palisade_protocols::dns::{Answer, Head, Limits, ParseError, Query, Rcode, first_message, reply};

fuzz_target!(|bytes: &[u8]| {
    let _ = Query::parse(bytes, &Limits::QUERY);
    if let Ok(answer) = Answer::parse(bytes, &Limits::ANSWER) {
        // The parser of the header alone must agree.
        let head = Head::read(bytes).expect("an answer has a head");
        assert_eq!((head.id, head.question), (answer.id, answer.question));
    }
    let mut out = [0; 512];
    if let Ok(len) = reply(bytes, Rcode::Refused, &mut out) {
        // The opcode of the answer is the query's.
        assert!(matches!(
            Answer::parse(&out[..len], &Limits::ANSWER),
            Ok(_) | Err(ParseError::Opcode)
        ));
    }
    let mut rest = bytes;
    while let Ok(Some(message)) = first_message(rest, 4096) {
        assert!(message.len() >= 12);
        rest = &rest[2 + message.len()..];
    }
});
