//! Senders of long messages that may send only a few segments behind them.

use palisade_abi::{SEND_LIMIT_DISTANCE, limited_window};

use super::*;

const MSS: u32 = 1_448;
/// Window scale with which a receiver offers less than a long message, so that its sender is limited.
const SCALE: u8 = 4;
/// Most that a sender may send behind a long message.
const ALLOWANCE: u32 = MSS + 512 + (1 << SCALE);

/// Bytes of a message of this kind, with `body` bytes behind its head.
fn message(body: u32, head: usize) -> Vec<u8> {
    let [_, a, b, c] = body.to_be_bytes();
    let mut bytes = vec![head as u8, b'B', a, b, c];
    bytes.resize(1 + head + body as usize, 0);
    bytes
}

fn limits() -> TcpLimits {
    TcpLimits {
        window: 64 << 10,
        limits_senders: true,
        ..TcpLimits::default()
    }
}

/// A sender, the programs and a worker, and a receiver. Sequence numbers are relative to the first byte of the client.
struct Path {
    bench: Bench,
    scale: u8,
    stream: Vec<u8>,
    /// Window field of the receiver.
    window: u16,
    /// What the sender has sent, and the right edge of its window.
    sent: u32,
    edge: u32,
    /// What the receiver has received in order, and what it has acknowledged.
    received: u32,
    /// Offload window of the client, and whether its sender is limited.
    open: Option<([u32; 2], bool)>,
    /// Bytes that were punted.
    punted: u64,
    /// Largest number of bytes beyond the end of the offload window that were sent before the next one was set.
    beyond: u32,
}

impl Path {
    fn new(limits: TcpLimits, scale: u8, window: u16, took: Millis) -> Self {
        let mut bench = Bench::new(limits);
        let [high, low] = (MSS as u16).to_be_bytes();
        let options = vec![2, 4, high, low, 3, 3, scale, 1];
        let syn = |side, flags, seq, ack| Seg {
            options: options.clone(),
            window,
            ..Seg::new(side, flags, seq, ack, b"")
        };
        bench.now = 1_000;
        bench.put(&syn(Side::Client, SYN, CLIENT_ISN, 0));
        bench.now += took;
        bench.put(&syn(
            Side::Server,
            SYN | ACK,
            SERVER_ISN,
            CLIENT_ISN.wrapping_add(1),
        ));
        bench.put(&client(0, b""));
        bench.take();
        Self {
            bench,
            scale,
            stream: Vec::new(),
            window,
            sent: 0,
            edge: 0,
            received: 0,
            open: None,
            punted: 0,
            beyond: 0,
        }
    }

    /// Runs the commands of the worker, and delivers what it has forwarded.
    fn deliver(&mut self) {
        let out = self.bench.take();
        assert!(out.discarded.is_empty(), "{:?}", out.discarded);
        for command in out.commands.into_iter().chain(out.bare_commands) {
            if matches!(command.op, flow_op::WINDOWS | flow_op::LIMITED_WINDOWS) {
                let [from, to, ..] = command.windows;
                self.open = Some(([from, to], command.op == flow_op::LIMITED_WINDOWS));
            }
        }
        let emitted = out.emitted.into_iter().map(|(seg, _)| seg);
        for seg in out.released.into_iter().chain(emitted) {
            if seg.from == Side::Server {
                self.acknowledged(seg.ack, seg.window);
                continue;
            }
            let at = seg.seq.wrapping_sub(CLIENT_ISN.wrapping_add(1));
            assert!(at <= self.received, "a gap at {}", self.received);
            self.received = self.received.max(at + seg.data.len() as u32);
        }
    }

    /// The sender gets an acknowledgement.
    fn acknowledged(&mut self, ack: u32, window: u16) {
        let at = ack.wrapping_sub(CLIENT_ISN.wrapping_add(1));
        let edge = at + (u32::from(window) << self.scale);
        assert!(
            edge + (1 << self.scale) > self.edge,
            "the window was taken back from {} to {edge}",
            self.edge
        );
        self.edge = self.edge.max(edge);
    }

    /// Sends what the window permits, before the worker handles any of it. Returns whether anything was sent.
    fn send(&mut self) -> bool {
        let mut any = false;
        let mut punted = Vec::new();
        while self.sent < self.stream.len() as u32 {
            let left = self.stream.len() as u32 - self.sent;
            let room = self.edge.saturating_sub(self.sent);
            // A sender avoids silly windows (RFC 9293, 3.8.6.2.1).
            if room < left.min(MSS) {
                break;
            }
            let length = left.min(room).min(MSS);
            let seg = client(
                self.sent,
                &self.stream[self.sent as usize..(self.sent + length) as usize],
            );
            self.sent += length;
            any = true;
            if let Some(([from, to], _)) = self.open {
                let at = seg.seq.wrapping_sub(from);
                let behind = seg.seq.wrapping_add(length).wrapping_sub(to);
                if behind < 1 << 31 {
                    self.beyond = self.beyond.max(behind);
                }
                if at < 1 << 31 && at + length <= to.wrapping_sub(from) {
                    self.received += length;
                    continue;
                }
            }
            self.punted += u64::from(length);
            punted.push(seg);
        }
        for seg in punted {
            self.inspect(&seg);
        }
        self.settle();
        any
    }

    /// The worker inspects a punted segment.
    fn inspect(&mut self, seg: &Seg) {
        self.bench.put(seg);
        self.deliver();
    }

    /// The worker has no packet left to inspect.
    fn settle(&mut self) {
        self.bench.settle();
        self.deliver();
    }

    /// The receiver acknowledges all that it has.
    fn acknowledge(&mut self) {
        let mut ack = server(self.received);
        ack.window = self.window;
        if let Some(([from, to], is_limited)) = self.open
            && ack.ack.wrapping_sub(from) < to.wrapping_sub(from)
        {
            let left = to.wrapping_sub(ack.ack);
            if !is_limited {
                self.acknowledged(ack.ack, ack.window);
                return;
            }
            if left > SEND_LIMIT_DISTANCE {
                let window = u32::from(ack.window).min(limited_window(from & 15, left));
                self.acknowledged(ack.ack, window as u16);
                return;
            }
        }
        self.bench.put(&ack);
        self.deliver();
    }

    /// Sends messages until the receiver has all of them. The clock does not advance, so no timer helps.
    fn run(&mut self, messages: &[Vec<u8>]) {
        self.stream.extend(messages.concat());
        let mut rounds = 0;
        while self.received < self.stream.len() as u32 {
            let before = self.received;
            let any = self.send();
            self.deliver();
            self.acknowledge();
            rounds += 1;
            assert!(rounds < 100_000, "stalled at {}", self.sent);
            assert!(
                any || self.received > before || self.edge >= self.sent + MSS,
                "stalled at {} of {}, edge {}, window {:?}",
                self.sent,
                self.stream.len(),
                self.edge,
                self.open
            );
        }
    }
}

#[test]
fn a_sender_of_long_messages_gets_only_an_allowance_behind_each() {
    let mut path = Path::new(limits(), SCALE, 60_000, 0);
    path.run(&[message(1 << 20, 10)]);
    assert!(path.open.is_some_and(|(_, is_limited)| is_limited));
    path.beyond = 0;
    path.punted = 0;
    path.run(&vec![message(1 << 20, 10); 5]);
    assert!(path.beyond <= ALLOWANCE, "{}", path.beyond);
    assert!(path.punted <= 5 * 2 * u64::from(ALLOWANCE), "{}", path.punted);
    assert_eq!(path.bench.table.stats().windows, 6);
}

#[test]
fn the_head_of_a_long_message_is_answered_with_the_window_for_the_rest() {
    let mut path = Path::new(limits(), SCALE, 60_000, 0);
    let long = message(1 << 20, 10);
    path.run(std::slice::from_ref(&long));
    path.stream.extend(message(300 << 10, 10));
    path.send();
    // The receiver has acknowledged nothing of the second message.
    let (before, after) = (long.len() as u32, path.stream.len() as u32);
    assert_eq!(path.edge, before + ((after - before) & !15));
}

#[test]
fn the_rest_is_not_offered_while_permitted_segments_can_wait_in_the_worker() {
    let mut path = Path::new(limits(), SCALE, 60_000, 0);
    let long = message(1 << 20, 10);
    path.run(std::slice::from_ref(&long));
    let (before, permitted) = (long.len() as u32, path.edge);
    path.stream.extend(&long);
    let bytes = |from: u32, to: u32| client(from, &path.stream[from as usize..to as usize]);
    let first = bytes(before, before + MSS);
    let last = bytes(before + MSS, permitted);
    path.inspect(&first);
    assert_eq!(path.edge, permitted, "the last segment would be overtaken");
    // The sender has sent all that was permitted, so the offer waits for nothing.
    path.inspect(&last);
    assert!(path.edge > permitted + (512 << 10), "{}", path.edge);
}

#[test]
fn an_allowed_start_of_a_segment_is_forwarded_once() {
    let mut path = Path::new(limits(), SCALE, 60_000, 0);
    let long = message(1 << 20, 10);
    path.run(std::slice::from_ref(&long));
    // A segment with the end of a message and the head of the next one, on which the verdict is possible at once.
    path.stream.extend(long.repeat(2));
    let (end, behind) = (2 * long.len() as u32, 2 * long.len() as u32 + 500);
    path.send();
    path.received = end - 500;
    path.bench.put(&server(end - 500));
    path.deliver();
    path.bench.put(&client(
        end - 500,
        &path.stream[(end - 500) as usize..behind as usize],
    ));
    let out = path.bench.take();
    let sent: Vec<_> = out.released.iter().map(|seg| seg.data.len()).collect();
    assert_eq!(sent, [1_000], "the segment");
    assert!(
        out.emitted.iter().all(|(seg, _)| seg.data.is_empty()),
        "no part of it"
    );
}

#[test]
fn the_window_for_the_rest_is_not_more_than_the_receiver_has_offered() {
    let mut path = Path::new(limits(), SCALE, 60_000, 0);
    let long = message(1 << 20, 10);
    path.run(std::slice::from_ref(&long));
    path.stream.extend(&long);
    path.send();
    let offered = long.len() as u32 + (60_000 << SCALE);
    assert!(
        (offered - 15..=offered).contains(&path.edge),
        "{} {offered}",
        path.edge
    );
}

#[test]
fn a_sender_is_not_limited_over_a_long_path() {
    for (limits, took) in [
        (limits(), 20),
        (
            TcpLimits {
                limits_senders: false,
                ..limits()
            },
            0,
        ),
    ] {
        let mut path = Path::new(limits, 7, 60_000, took);
        path.run(&vec![message(1 << 20, 10); 5]);
        assert!(path.open.is_some_and(|(_, is_limited)| !is_limited));
    }
}

#[test]
fn a_sender_whose_receiver_has_offered_more_is_not_limited() {
    let mut path = Path::new(limits(), 7, 60_000, 0);
    // A receiver that has offered eight megabytes does not take them back.
    path.run(&[message(100, 10)]);
    path.run(&vec![message(1 << 20, 10); 3]);
    assert!(path.open.is_some_and(|(_, is_limited)| !is_limited));
}

#[test]
fn a_long_head_behind_a_long_message_arrives() {
    for head in [200, 255] {
        let mut path = Path::new(limits(), 10, 60_000, 0);
        let mut long = message(1 << 20, head);
        // A message of 30,000 bytes that is inspected as a whole.
        let mut whole = vec![3, b'L', 30_000_u16.to_be_bytes()[0], 30_000_u16.to_be_bytes()[1]];
        whole.resize(4 + 30_000, 0);
        long.extend(whole);
        path.stream.extend(long.repeat(3));
        let mut rounds = 0;
        while path.received < path.stream.len() as u32 {
            path.send();
            path.deliver();
            path.acknowledge();
            rounds += 1;
            if rounds % 50 == 0 {
                let now = path.bench.now + 20;
                path.bench.tick(now);
                path.deliver();
            }
            assert!(rounds < 10_000, "stalled at {}", path.sent);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the lengths of the messages and the window of the receiver, the sender never waits for a timer, and no
    /// window is taken back.
    #[test]
    fn limited_senders_finish(
        lengths in prop::collection::vec(prop_oneof![
            3 => 256_u32 << 10..2 << 20,
            2 => 64_u32 << 10..300 << 10,
            2 => 10_u32..10_000,
        ], 1..8),
        scale in 0_u8..=14,
        window in 3_000_u16..=65_535,
        head in 4_usize..200,
    ) {
        prop_assume!(u32::from(window) << scale < 1 << 29);
        let mut path = Path::new(limits(), scale, window, 0);
        let messages: Vec<_> = lengths.iter().map(|length| message(*length, head)).collect();
        path.run(&messages);
    }
}
