//! Whole packets through the decoder and the inspectors of HTTP and TLS.
//!
//! The input is a list of steps: flags (one byte), the length of a frame (two bytes), the frame. For every input, the
//! engine returns each handle exactly once, and the decoder accepts each frame that the engine makes.

use palisade_abi::{PuntRequest, punt_flags};
use palisade_inspect::{Engine, Limits};

#[path = "packets.rs"]
mod packets;

use packets::{Done, HTTP, OTHER_HTTP, OTHER_TLS, TLS, give, inspector, prepare};

/// Bits of the first byte of a step.
mod what {
    pub const INGRESS: u8 = 1;
    pub const REPLY: u8 = 2;
    pub const AUDIT: u8 = 4;
    pub const TLS: u8 = 8;
    pub const OTHER_RULES: u8 = 16;
    pub const WAIT: u8 = 32;
    pub const FORGET: u8 = 64;
    pub const OTHER_SERIAL: u8 = 128;
}

/// Runs one list of steps.
pub fn run(bytes: &[u8]) {
    let mut engine = Engine::new(&Limits::default());
    prepare(&mut engine);
    let mut done = Done::default();
    let (mut now, mut given, mut rest) = (0, 0, bytes);
    while let Some((&[happens, length0, length1], after)) = rest.split_first_chunk() {
        let length = usize::from(u16::from_be_bytes([length0, length1])).min(after.len());
        let (frame, after) = after.split_at(length);
        rest = after;
        let is = |bit| happens & bit != 0;
        let flag = |bit, flag| if is(bit) { flag } else { 0 };
        let ruleset = match (is(what::TLS), is(what::OTHER_RULES)) {
            (false, false) => HTTP,
            (false, true) => OTHER_HTTP,
            (true, false) => TLS,
            (true, true) => OTHER_TLS,
        };
        let slot = PuntRequest {
            rule: 9,
            ruleset,
            serial: u32::from(is(what::OTHER_SERIAL)),
            endpoint: 1,
            inspector: inspector(ruleset),
            flags: flag(what::INGRESS, punt_flags::INGRESS)
                | flag(what::REPLY, punt_flags::REPLY)
                | flag(what::AUDIT, punt_flags::AUDIT),
            ..PuntRequest::default()
        };
        if give(&mut engine, now, &slot, frame, given, &mut done) {
            given += 1;
        }
        if is(what::WAIT) {
            now += if is(what::FORGET) { 70_000 } else { 300 };
            engine.tick(now, &mut done);
        } else if is(what::FORGET) {
            engine.forget_endpoint(1, &mut done);
        }
    }
    engine.drain(&mut done);
    assert_eq!(done.returned.len(), given);
}
