//! A DNS message, as query, as answer and as a TCP stream. Run: `cargo +nightly fuzz run dns` in tests/.
#![no_main]

use libfuzzer_sys::fuzz_target;
use palisade_protocols::dns::{Answer, Limits, MessageReader, Query, Rcode, Refusal, reply};

fuzz_target!(|bytes: &[u8]| {
    let _ = Query::parse(bytes, &Limits::QUERY);
    let _ = Answer::parse(bytes, &Limits::ANSWER);
    let mut out = [0; 512];
    if let Ok(len) = reply(bytes, Rcode::Refused, &mut out) {
        // the opcode is the query's
        assert!(matches!(Answer::parse(&out[..len], &Limits::ANSWER), Ok(_) | Err(Refusal::Opcode)));
    }
    let (mut reader, mut input) = (MessageReader::new(4096), bytes);
    while let Ok(Some(message)) = reader.next(&mut input) {
        assert!(message.len() >= 12);
    }
});
