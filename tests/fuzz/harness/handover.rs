//! States that a planned restart hands over: run by the fuzzer, and by a test with mutations of its corpus.
//!
//! The input is a state. Whatever it holds, the engine that takes it over does not panic, returns each handle once, and
//! hands over what another engine takes over. The packets are of the connection in the corpus.

use palisade_abi::{
    PuntRequest, punt_flags,
    tcp_flags::{ACK, FIN},
};
use palisade_inspect::{Engine, Limits};

#[path = "packets.rs"]
mod packets;

use packets::{Done, HTTP, give, inspector, prepare};

const NOW: u64 = 5_000;

/// A segment of either side, whose sequence numbers begin with 1.
fn frame(is_client: bool, seq: u32, ack: u32, flags: u8, data: &[u8]) -> Vec<u8> {
    let (client, server) = (([10, 0, 0, 1], 1000_u16), ([10, 0, 0, 2], 80_u16));
    let (from, to) = if is_client {
        (client, server)
    } else {
        (server, client)
    };
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0];
    frame.extend_from_slice(&(40 + data.len() as u16).to_be_bytes());
    frame.extend_from_slice(&[0, 0, 0x40, 0, 64, 6, 0, 0]);
    frame.extend_from_slice(&from.0);
    frame.extend_from_slice(&to.0);
    frame.extend_from_slice(&from.1.to_be_bytes());
    frame.extend_from_slice(&to.1.to_be_bytes());
    frame.extend_from_slice(&seq.to_be_bytes());
    frame.extend_from_slice(&ack.to_be_bytes());
    frame.extend_from_slice(&[5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    frame.extend_from_slice(data);
    frame
}

fn engine() -> Engine<usize> {
    let mut engine = Engine::new(&Limits::default());
    prepare(&mut engine);
    engine
}

/// Takes over one state.
pub fn run(state: &[u8]) {
    let (mut engine, mut done) = (engine(), Done::default());
    engine.take_over(NOW, state);
    let (mut given, mut now) = (0, NOW);
    for step in 0..8_u32 {
        // Allowed and denied requests, responses and acknowledgements at some places of the streams.
        let at = 1 + 32 * (step / 2);
        for (is_client, flags, data) in [
            (true, ACK, &b"GET /good HTTP/1.1\r\nHost: x\r\n\r\n"[..]),
            (false, ACK, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
            (true, ACK, b""),
            (false, if step == 7 { ACK | FIN } else { ACK }, b""),
        ] {
            let slot = PuntRequest {
                ruleset: HTTP,
                inspector: inspector(HTTP),
                endpoint: 7,
                serial: 99,
                flags: if is_client {
                    punt_flags::INGRESS
                } else {
                    punt_flags::REPLY
                },
                ..PuntRequest::default()
            };
            let frame = frame(is_client, at, at, flags, data);
            if give(&mut engine, now, &slot, &frame, given, &mut done) {
                given += 1;
            }
        }
        now += [1, 15, 300, 40_000][step as usize % 4];
        engine.tick(now, &mut done);
    }
    let handed_over = engine.hand_over(&mut done);
    assert_eq!(done.returned.len(), given);
    let taken = self::engine().take_over(now, &handed_over.state);
    // A state that no engine writes can become one that is refused.
    assert_eq!(taken.connections + taken.cut, handed_over.account.connections);
}
