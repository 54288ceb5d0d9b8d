//! Offload windows that are put off: their number, and senders that contradict themselves while windows are open or put
//! off.

use super::{super::table::MOST_UNSETTLED, *};

const MSS: u32 = 1_448;
/// Window scale with which a receiver offers less than a long message, so that its sender is limited.
const SCALE: u8 = 4;
/// Length of the body of a long message.
const BODY: u32 = 1 << 20;
/// Length of a long message with its head.
const LONG: u32 = 6 + BODY;

/// Returns the beginning of a long message: its head, and as much of its body as a segment holds.
fn head() -> Vec<u8> {
    let [_, a, b, c] = BODY.to_be_bytes();
    let mut bytes = vec![5, b'B', a, b, c, 0];
    bytes.resize(MSS as usize, 0);
    bytes
}

fn limits() -> TcpLimits {
    TcpLimits {
        window: 64 << 10,
        limits_senders: true,
        ..TcpLimits::default()
    }
}

/// Opens the connection of a client, and sends a long message and the head of another one, whose window is put off because
/// the sender may send more.
fn put_off(bench: &mut Bench, peer: u32) {
    let [_, x, y, z] = peer.to_be_bytes();
    let of = |seg: Seg| Seg {
        peer: [x, y, z],
        ..seg
    };
    let [high, low] = (MSS as u16).to_be_bytes();
    let syn = |side, flags, seq, ack| Seg {
        options: vec![2, 4, high, low, 3, 3, SCALE, 1],
        ..Seg::new(side, flags, seq, ack, b"")
    };
    let open = CLIENT_ISN.wrapping_add(1);
    for seg in [
        syn(Side::Client, SYN, CLIENT_ISN, 0),
        syn(Side::Server, SYN | ACK, SERVER_ISN, open),
        client(0, b""),
        server(0),
        client(0, &head()),
        // The rest of the message is in the offload window.
        server(LONG),
        client(LONG, &head()),
    ] {
        bench.put(&of(seg));
    }
}

fn windows(out: &Out) -> usize {
    let commands = out.commands.iter().chain(&out.bare_commands);
    commands
        .filter(|command| command.op == flow_op::LIMITED_WINDOWS)
        .count()
}

#[test]
fn a_worker_that_never_settles_puts_off_a_bounded_number_of_windows() {
    let mut bench = Bench::new(limits());
    for peer in 0..MOST_UNSETTLED as u32 {
        put_off(&mut bench, peer);
        assert_eq!(windows(&bench.take()), 1, "only that of the first message");
    }
    assert_eq!(bench.table.unsettled(), MOST_UNSETTLED);
    // The next packet of any connection sets all of them.
    bench.put(&Seg {
        peer: [9, 9, 9],
        ..syn_of(0)
    });
    assert_eq!(windows(&bench.take()), MOST_UNSETTLED);
    assert_eq!(bench.table.unsettled(), 0);
    put_off(&mut bench, 1 << 20);
    assert_eq!(bench.table.unsettled(), 1);
    bench.take();
    bench.settle();
    assert_eq!(windows(&bench.take()), 1);
}

#[test]
fn keys_of_removed_connections_do_not_collect() {
    let mut bench = Bench::new(limits());
    for round in 0..3 * MOST_UNSETTLED {
        put_off(&mut bench, 1);
        assert!(bench.table.unsettled() <= MOST_UNSETTLED, "{round}");
        bench.forget();
    }
    assert_eq!(bench.table.stats().connections, 0);
    put_off(&mut bench, 1);
    bench.take();
    bench.settle();
    assert_eq!(windows(&bench.take()), 1, "that of the connection that is left");
    assert_eq!(bench.table.unsettled(), 0);
}

/// Number of long messages, and the length of each with its head: a message on which the verdict depends, then one that is
/// bypassed.
const MESSAGES: u32 = 3;
const WHOLE: u32 = 7 + (400 << 10);

/// A receiver: which ranges it has, and the byte of each head by which a denied message differs from an allowed one.
struct Receiver {
    /// Whether a repeated byte replaces one that has not been read.
    last_wins: bool,
    ranges: Vec<(u32, u32)>,
    heads: [Option<u8>; MESSAGES as usize],
}

impl Receiver {
    fn new(last_wins: bool) -> Self {
        Self {
            last_wins,
            ranges: Vec::new(),
            heads: [None; MESSAGES as usize],
        }
    }

    /// Returns the end of what has been read.
    fn read(&self) -> u32 {
        self.ranges
            .first()
            .filter(|range| range.0 == 0)
            .map_or(0, |range| range.1)
    }

    fn take(&mut self, at: u32, data: &[u8]) {
        let (read, end) = (self.read(), at + data.len() as u32);
        for (number, head) in (0..).zip(&mut self.heads) {
            let place = number * WHOLE + 1;
            if (at..end).contains(&place) && place >= read && (head.is_none() || self.last_wins) {
                *head = Some(data[(place - at) as usize]);
            }
        }
        let (mut from, mut to) = (at, end);
        self.ranges.retain(|&(a, b)| {
            let is_apart = b < from || a > to;
            if !is_apart {
                (from, to) = (from.min(a), to.max(b));
            }
            is_apart
        });
        self.ranges.push((from, to));
        self.ranges.sort_unstable();
        for (number, head) in (0..).zip(&self.heads) {
            if number * WHOLE + 1 < self.read() {
                assert_eq!(
                    *head,
                    Some(b'g'),
                    "last wins: {}, message {number}",
                    self.last_wins
                );
            }
        }
    }
}

/// A sender of two streams that differ in the heads of their messages, the programs, a worker, and two receivers.
struct Liar {
    bench: Bench,
    streams: [Vec<u8>; 2],
    window: [u32; 2],
    receivers: [Receiver; 2],
    /// End of the bytes that were forwarded, lost or not.
    forwarded: u32,
    is_reset: bool,
    has_put_off: bool,
}

impl Liar {
    fn new() -> Self {
        let [_, a, b, c] = (WHOLE - 7).to_be_bytes();
        let streams = [b'g', b'X'].map(|kind| {
            let mut message = vec![1, kind, 4, b'B', a, b, c];
            message.resize(WHOLE as usize, b'x');
            message.repeat(MESSAGES as usize)
        });
        let mut bench = Bench::new(limits());
        let [high, low] = (MSS as u16).to_be_bytes();
        let syn = |side, flags, seq, ack| Seg {
            options: vec![2, 4, high, low, 3, 3, SCALE, 1],
            ..Seg::new(side, flags, seq, ack, b"")
        };
        bench.put(&syn(Side::Client, SYN, CLIENT_ISN, 0));
        let open = CLIENT_ISN.wrapping_add(1);
        bench.put(&syn(Side::Server, SYN | ACK, SERVER_ISN, open));
        bench.put(&client(0, b""));
        bench.take();
        Self {
            bench,
            streams,
            window: [0; 2],
            receivers: [false, true].map(Receiver::new),
            forwarded: 0,
            is_reset: false,
            has_put_off: false,
        }
    }

    fn is_in_window(&self, at: u32, length: u32) -> bool {
        let [from, to] = self.window;
        let (room, at) = (to.wrapping_sub(from), at.wrapping_sub(from));
        room < 1 << 31 && at < room && length <= room - at
    }

    /// Runs commands and delivers packets. `is_lost`: packets to the receivers are lost, with their commands.
    fn deliver(&mut self, is_lost: bool) {
        self.has_put_off |= self.bench.table.unsettled() > 0;
        let out = self.bench.take();
        let carried = out.commands.iter().filter(|_| !is_lost);
        for command in out.bare_commands.iter().chain(carried) {
            match command.op {
                flow_op::WINDOWS | flow_op::LIMITED_WINDOWS => {
                    self.window = [command.windows[0], command.windows[1]];
                }
                flow_op::OFFLOAD => panic!("offloaded"),
                _ => {}
            }
        }
        for seg in out
            .released
            .into_iter()
            .chain(out.emitted.into_iter().map(|(seg, _)| seg))
        {
            self.is_reset |= seg.flags & RST != 0 && seg.from == Side::Server;
            if seg.from == Side::Client && !seg.data.is_empty() {
                self.arrive(seg.seq, &seg.data, is_lost);
            }
        }
    }

    fn arrive(&mut self, seq: u32, data: &[u8], is_lost: bool) {
        let at = seq.wrapping_sub(CLIENT_ISN.wrapping_add(1));
        // A repetition of bytes below the stream: for example, a keepalive probe.
        if at >= 1 << 31 {
            return;
        }
        self.forwarded = self.forwarded.max(at + data.len() as u32);
        if !is_lost {
            for receiver in &mut self.receivers {
                receiver.take(at, data);
            }
        }
    }

    fn send(&mut self, stream: usize, from: u32, length: u32, is_lost: bool) {
        let stream = &self.streams[stream];
        let from = from.min(stream.len() as u32 - 1);
        let to = (from + length.clamp(1, 60_000)).min(stream.len() as u32);
        let seg = client(from, &stream[from as usize..to as usize]);
        if self.is_in_window(seg.seq, to - from) {
            self.arrive(seg.seq, &seg.data, is_lost);
        } else {
            self.bench.put(&seg);
            self.deliver(is_lost);
        }
    }

    /// The receiver acknowledges what it has read, or all that was forwarded.
    fn acknowledge(&mut self, lies: bool, window: u16) {
        let read = self.receivers.iter().map(Receiver::read).min().unwrap_or(0);
        let ack = Seg {
            window,
            ..server(if lies { self.forwarded } else { read })
        };
        if !self.is_in_window(ack.ack, 0) {
            self.bench.put(&ack);
            self.deliver(false);
        }
    }

    /// Performs an event. Most of them send the next bytes of the allowed stream.
    fn step(&mut self, kind: u8, which: u8, length: u16) {
        let next = self.receivers[0].read();
        // Close to the begin of a message.
        let near = u32::from(which % 4) * WHOLE + u32::from(length % 40);
        let near = near.saturating_sub(20);
        let length = u32::from(length);
        match kind % 16 {
            0..=3 => self.send(0, next, length, false),
            4 | 5 => self.send(0, next, length % 2_000, false),
            6 => self.send(0, next, WHOLE - next % WHOLE, which.is_multiple_of(4)),
            7 => self.send(0, next, length, true),
            8 => self.send(1, near.min(next), length, false),
            9 => self.send(1, near, length, which.is_multiple_of(8)),
            10 => self.send(usize::from(which % 2), next + length % 3_000, length, false),
            11 => self.acknowledge(false, 10_000),
            12 => self.acknowledge(which.is_multiple_of(4), u16::from(which) * 64),
            13 => {
                self.bench.settle();
                self.deliver(which.is_multiple_of(8));
            }
            14 => {
                let now = self.bench.now + u64::from(which) * 3;
                self.bench.tick(now);
                self.deliver(false);
            }
            _ => {
                let at = near + length;
                let forged = Seg::new(Side::Client, RST, CLIENT_ISN.wrapping_add(1 + at), 0, b"");
                self.bench.put(&forged);
                self.deliver(false);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever a sender repeats, reorders, loses or forges, no receiver reads the head of a denied message.
    #[test]
    fn no_receiver_reads_a_denied_head_around_a_window(
        events in prop::collection::vec((any::<u8>(), any::<u8>(), any::<u16>()), 20..80),
    ) {
        let mut liar = Liar::new();
        for (kind, which, length) in events {
            if !liar.is_reset {
                liar.step(kind, which, length);
            }
        }
    }
}

/// The sender of the property test reaches what it is about.
#[test]
fn the_sender_that_contradicts_itself_has_windows_open_and_put_off() {
    let mut liar = Liar::new();
    for message in 0..MESSAGES {
        liar.send(0, message * WHOLE, MSS, false);
        liar.bench.settle();
        liar.deliver(false);
        let behind = CLIENT_ISN.wrapping_add(1 + message * WHOLE + 70_000);
        assert!(liar.is_in_window(behind, 1), "message {message}");
        for part in 0..7 {
            liar.send(
                0,
                message * WHOLE + part * 60_000,
                60_000.min(WHOLE - part * 60_000),
                false,
            );
        }
        liar.acknowledge(false, 10_000);
    }
    assert!(liar.has_put_off);
    assert!(
        liar.receivers
            .iter()
            .all(|receiver| receiver.read() == MESSAGES * WHOLE)
    );
}
