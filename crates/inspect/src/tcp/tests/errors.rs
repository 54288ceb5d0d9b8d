//! ICMP errors about inspected connections.

use super::*;
use crate::{
    record::Verdict,
    tcp::{half::Half, quote::QuotedSegment},
};

/// Verdict on an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    Passed,
    /// The error was consumed.
    Taken,
    Dropped(Reason),
}

use Fate::{Dropped, Passed, Taken};

const FORGED: Fate = Dropped(Reason::UnrelatedIcmp);

/// An ICMP error of a router to the sender of a segment with this sequence number.
#[derive(Clone, Copy)]
struct Error {
    to: Side,
    kind: u8,
    code: u8,
    mtu: u16,
    seq: u32,
}

/// Returns an error "fragmentation needed".
fn too_big(to: Side, mtu: u16, seq: u32) -> Error {
    Error {
        to,
        kind: 3,
        code: 4,
        mtu,
        seq,
    }
}

/// Returns an error "port unreachable", which ends a connection in SYN-SENT (RFC 1122, 4.2.3.9).
fn hard(to: Side, seq: u32) -> Error {
    Error {
        code: 3,
        ..too_big(to, 0, seq)
    }
}

/// Returns the sequence number of a byte of the client's stream.
fn c(at: u32) -> u32 {
    CLIENT_ISN.wrapping_add(1).wrapping_add(at)
}

fn s(at: u32) -> u32 {
    SERVER_ISN.wrapping_add(1).wrapping_add(at)
}

impl Error {
    /// Returns the frame of the error, in the form in which the BPF programs punt it.
    fn frame(&self) -> Vec<u8> {
        let quoted = Seg::new(self.to, ACK, self.seq, 0, &[7; 1_400]).frame();
        let mut f = quoted[..14].to_vec();
        f[..12].rotate_left(6);
        f.extend([0x45, 0, 0, 56, 0, 0, 0, 0, 60, 1, 0, 0, 203, 0, 113, 9]);
        f.extend(&quoted[26..30]);
        f.extend([self.kind, self.code, 0, 0, 0, 0]);
        f.extend(self.mtu.to_be_bytes());
        f.extend(&quoted[14..42]);
        f
    }
}

impl Bench {
    /// Returns a table with one connection whose MSS is 1,460 bytes.
    fn open_large() -> Self {
        let mut bench = Self::new(TcpLimits::default());
        let with_mss = |seg: Seg| Seg {
            options: vec![2, 4, 5, 0xb4],
            ..seg
        };
        bench.put(&with_mss(Seg::new(Side::Client, SYN, CLIENT_ISN, 0, b"")));
        bench.put(&with_mss(Seg::new(
            Side::Server,
            SYN | ACK,
            SERVER_ISN,
            c(0),
            b"",
        )));
        bench.put(&client(0, b""));
        bench.take();
        bench
    }

    fn error(&mut self, error: Error) -> Fate {
        self.error_as(error, PuntRequest::default())
    }

    /// Handles an error. A serial of 0 in `slot` stands for the serial of the connection.
    fn error_as(&mut self, error: Error, slot: PuntRequest) -> Fate {
        let frame = error.frame();
        let mut packet = Packet::default();
        decode(&frame[..], Start::Ethernet { tags_removed: 0 }, &mut packet).unwrap();
        let direction = match error.to {
            Side::Client => punt_flags::REPLY,
            Side::Server => punt_flags::INGRESS,
        };
        let slot = PuntRequest {
            inspector: Inspector::Http as u8,
            endpoint: 7,
            serial: if slot.serial == 0 { 99 } else { slot.serial },
            flags: slot.flags | direction,
            ..slot
        };
        let view = PacketView {
            slot: &slot,
            ifindex: 5,
            hook: punt_hook::TC_EGRESS,
            packet: &packet,
            frame: &frame,
            network: 14,
            transport: 34,
            payload: (42, frame.len()),
        };
        let quoted = QuotedSegment::read(&view).unwrap();
        let (errors, discarded) = (self.out.errors, self.out.discarded.len());
        let table = &mut self.table;
        with_context(self.now, &mut self.out, |cx| {
            table.error(&view, &quoted, frame.clone(), cx);
        });
        self.check();
        match (self.out.errors - errors, self.out.discarded.len() - discarded) {
            (1, 0) => Passed,
            (0, 1) => match self.out.discarded.pop() {
                Some(Reason::TcpHeld) => Taken,
                reason => Dropped(reason.unwrap()),
            },
            other => panic!("{other:?}"),
        }
    }

    /// Sends a message of this length. All but its last ten bytes are acknowledged on behalf of the server before the
    /// last ten arrive.
    fn deliver(&mut self, length: usize) {
        self.deliver_with(length, b"");
    }

    /// Like [`Bench::deliver`], with further bytes in the packet that completes the message.
    fn deliver_with(&mut self, length: usize, behind: &[u8]) {
        let message = [
            &[3, b'L', ((length - 4) >> 8) as u8, (length - 4) as u8][..],
            &vec![b'm'; length - 4],
        ]
        .concat();
        let (held, end) = message.split_at(length - 10);
        for (n, part) in held.chunks(1_400).enumerate() {
            self.put(&client(n as u32 * 1_400, part));
        }
        self.tick(self.now + 20);
        self.take();
        self.put(&client(held.len() as u32, &[end, behind].concat()));
        assert_eq!(self.out.released.len(), 1, "the client's own packet");
    }

    /// Returns the position and length of each packet that was generated in the client's place.
    fn made(&mut self) -> Vec<(u32, usize)> {
        let made = self.take().emitted;
        made.iter()
            .map(|(seg, _)| seg)
            .filter(|seg| seg.from == Side::Client && !seg.data.is_empty())
            .map(|seg| (seg.seq.wrapping_sub(c(0)), seg.data.len()))
            .collect()
    }
}

#[test]
fn an_error_counts_only_if_it_quotes_bytes_in_flight() {
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x03abc"));
    bench.put(&client(4, b"\x05ab"));
    assert_eq!(bench.out.released.len(), 1, "the second one is held");
    // Bytes 0 to 3 of the client are in flight. A bare acknowledgement has the sequence number of byte 4.
    for (at, fate) in [
        (0, Passed),
        (3, Passed),
        (4, Passed),
        (5, FORGED),
        (6, FORGED),
        (u32::MAX, FORGED),
        (1 << 31, FORGED),
        (1 << 30, FORGED),
        (0_u32.wrapping_sub(100_000), FORGED),
    ] {
        assert_eq!(bench.error(hard(Side::Client, c(at))), fate, "{at}");
        assert_eq!(bench.error(too_big(Side::Client, 1_300, c(at))), fate, "{at}");
    }
    // No byte of the server is in flight.
    for (at, fate) in [
        (0, Passed),
        (1, FORGED),
        (u32::MAX, FORGED),
        (c(0).wrapping_sub(s(0)), FORGED),
    ] {
        assert_eq!(bench.error(hard(Side::Server, s(at))), fate, "{at}");
    }
    bench.put(&server(4));
    for (at, fate) in [(0, FORGED), (3, FORGED), (4, Passed), (5, FORGED)] {
        assert_eq!(bench.error(hard(Side::Client, c(at))), fate, "{at}");
    }
    let mut answer = server(4);
    answer.data = b"hello".to_vec();
    bench.put(&answer);
    for (at, fate) in [(0, Passed), (4, Passed), (5, Passed), (6, FORGED)] {
        assert_eq!(bench.error(hard(Side::Server, s(at))), fate, "{at}");
    }
    // No error has ended the connection.
    bench.put(&client(7, b"cde"));
    assert_eq!(bench.table.stats().cut, 0);
    assert_eq!(bench.take().released.len(), 5);
    let stats = bench.table.stats();
    assert_eq!((stats.icmp_errors, stats.icmp_narrowed), (30, 0));
    assert_eq!(stats.icmp_unrelated, 19);
}

#[test]
fn forged_errors_fill_neither_records_nor_memory() {
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x03ab"));
    let before = bench.table.stats();
    let due = bench.table.deadline();
    for n in 0..100_000_u32 {
        let error = too_big(Side::Client, 576, c(3 + n.wrapping_mul(40_503)));
        assert!(n == 0 || bench.error(error) == FORGED);
    }
    let stats = bench.table.stats();
    assert_eq!(
        (
            stats.bytes,
            stats.frames,
            stats.connections,
            bench.table.deadline()
        ),
        (before.bytes, before.frames, before.connections, due)
    );
    let out = bench.take();
    let [record] = &out.records[..] else {
        panic!("{:?}", out.records.len())
    };
    assert_eq!(
        (record.verdict, record.reason, record.protocol),
        (Verdict::Dropped, Reason::UnrelatedIcmp, 1)
    );
    let identity = |error: Error| {
        let mut bench = Bench::new(TcpLimits::default());
        let slot = PuntRequest {
            remote_identity: 1_234,
            ..PuntRequest::default()
        };
        bench.error_as(error, slot);
        bench.out.records[0].remote_identity
    };
    assert_eq!(
        identity(hard(Side::Client, 1)),
        1_234,
        "the error goes to the peer"
    );
    assert_eq!(
        identity(hard(Side::Server, 1)),
        0,
        "a router is not the other end"
    );
    assert!(out.emitted.is_empty());
    // Errors about unknown connections have the same rate limit as packets.
    let mut bench = Bench::new(TcpLimits::default());
    for n in 0..1_000 {
        let fate = bench.error(hard(Side::Client, n));
        assert_eq!(fate, Dropped(Reason::TcpMidstream));
    }
    assert_eq!(bench.take().records.len(), 200);
    assert_eq!(bench.table.stats().connections, 0);
}

/// A router reports a smaller MTU: the acknowledged bytes arrive without a retransmission timeout.
#[test]
fn packet_too_big_lowers_the_size_of_delivered_packets() {
    for mtu in [1_479, 1_420, 1_280, 900, 576] {
        let mut bench = Bench::open_large();
        bench.deliver(20_000);
        let mut arrived = vec![false; 20_000];
        arrived[19_990..].fill(true);
        let mut before = 0;
        loop {
            let made = bench.made();
            for &(at, length) in &made {
                if length + 40 > usize::from(mtu) {
                    let fate = bench.error(too_big(Side::Client, mtu, c(at)));
                    assert_eq!(fate, Taken, "the client has had it acknowledged");
                } else {
                    arrived[at as usize..at as usize + length].fill(true);
                }
            }
            let has = arrived.iter().take_while(|arrived| **arrived).count();
            if has == arrived.len() {
                break;
            }
            if has > before {
                before = has;
                bench.put(&server(has as u32));
            } else {
                assert!(!bench.out.emitted.is_empty(), "{mtu}: {has} bytes");
            }
        }
        let stats = bench.table.stats();
        assert_eq!((stats.icmp_narrowed, stats.repeated), (1, 0), "{mtu}");
    }
}

/// Both the worker and the client have bytes in flight on a path whose MTU is lowered.
#[test]
fn the_sender_gets_errors_about_bytes_that_it_must_retransmit() {
    let mut bench = Bench::open_large();
    bench.deliver(6_000);
    let first = bench.made();
    assert_eq!(first[..2], [(0, 1_440), (1_440, 1_440)]);
    // The client itself has sent the last packet.
    assert_eq!(bench.error(too_big(Side::Client, 1_400, c(5_990))), Passed);
    let again = bench.made();
    assert_eq!(again[..2], [(0, 1_360), (1_360, 1_360)]);
    assert_eq!(again.iter().map(|made| made.1).sum::<usize>(), 5_990);
    // Further errors are about the same link, or claim a larger MTU.
    for mtu in [1_400, 1_401, 1_500, 65_535] {
        assert_eq!(bench.error(too_big(Side::Client, mtu, c(1_440))), Taken);
    }
    assert!(bench.made().is_empty());
    // A later link of the path has a smaller MTU.
    assert_eq!(bench.error(too_big(Side::Client, 1_300, c(1_360))), Taken);
    assert_eq!(bench.made()[0], (0, 1_260));
    // Errors of other kinds go to the sender.
    assert_eq!(bench.error(hard(Side::Client, c(1_360))), Passed);
    assert_eq!(bench.table.stats().icmp_narrowed, 2);
    // The retransmission timer continues.
    bench.tick(bench.now + 249);
    assert!(bench.made().is_empty());
    bench.tick(bench.now + 1);
    assert_eq!(bench.made()[0], (0, 1_260));
    assert_eq!(bench.table.stats().repeated, 1);
}

#[test]
fn forged_mtus_are_bounded_in_size_and_number() {
    for mtu in [1, 68, 575, 576] {
        let mut bench = Bench::open_large();
        bench.deliver(6_000);
        bench.take();
        assert_eq!(bench.error(too_big(Side::Client, mtu, c(0))), Taken);
        assert_eq!(bench.made()[0], (0, 536), "{mtu}");
        assert_eq!(bench.error(too_big(Side::Client, mtu, c(0))), Taken);
        assert!(bench.made().is_empty());
    }
    // A router that reports no MTU (RFC 1191, 5).
    let mut bench = Bench::open_large();
    bench.deliver(6_000);
    bench.take();
    for size in [1_006, 576] {
        assert_eq!(bench.error(too_big(Side::Client, 0, c(0))), Taken);
        assert_eq!(bench.made()[0], (0, size - 40));
    }
    assert_eq!(bench.error(too_big(Side::Client, 0, c(0))), Taken);
    assert!(bench.made().is_empty());
    // The MTU is one byte smaller each time.
    let mut bench = Bench::open_large();
    bench.deliver(20_000);
    bench.take();
    let mut made = 0;
    for n in 1..800 {
        assert_eq!(bench.error(too_big(Side::Client, 1_480 - n, c(0))), Taken);
        made += bench.made().len();
    }
    assert_eq!((made, bench.table.stats().icmp_narrowed), (8 * 8, 8));
    let half = |mtu: u32| {
        let mut half = Half::<()>::new();
        half.mss = 9_000;
        let narrowed = half.narrow(mtu, true);
        (narrowed, half.payload_size(false))
    };
    assert_eq!(half(1_500), (false, 1_440));
    assert_eq!(half(1_492), (true, 1_432));
    for mtu in [0, 1, 576, 1_279, 1_280] {
        assert_eq!(half(mtu), (true, 1_220), "RFC 8200, 5");
    }
    assert_eq!(half(u32::MAX), (false, 1_440));
}

/// In SYN-SENT the end that receives the error decides whether to abort.
#[test]
fn errors_about_a_syn_pass_and_forged_ones_do_not() {
    let mut bench = Bench::new(TcpLimits::default());
    bench.put(&Seg::new(Side::Client, SYN, CLIENT_ISN, 0, b""));
    assert_eq!(bench.error(hard(Side::Client, CLIENT_ISN)), Passed);
    for at in [1, 2, 60_000, 1 << 31] {
        assert_eq!(bench.error(hard(Side::Client, c(at))), FORGED);
    }
    // The server has not sent any segment.
    for seq in [0, SERVER_ISN, s(0)] {
        assert_eq!(bench.error(hard(Side::Server, seq)), FORGED);
    }
    // The error does not extend the idle timeout.
    bench.now = 9_000;
    assert_eq!(bench.error(hard(Side::Client, CLIENT_ISN)), Passed);
    bench.tick(10_001);
    assert_eq!(bench.table.stats().half_open, 0);
    assert_eq!(
        bench.error(hard(Side::Client, CLIENT_ISN)),
        Dropped(Reason::TcpMidstream)
    );
    // An error about the SYN of a candidate is forwarded too.
    let mut bench = Bench::open();
    let other = Seg::new(Side::Client, SYN, 5_000, 0, b"");
    bench.put_as(&other, 99, 7);
    assert_eq!(bench.error(hard(Side::Client, 5_000)), Passed);
    assert_eq!(bench.error(hard(Side::Client, c(0))), Passed);
    assert_eq!(bench.error(hard(Side::Client, 5_002)), FORGED);
}

#[test]
fn errors_about_offloaded_connections_and_in_audit_mode_pass() {
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x02Ox"));
    assert_eq!(bench.take().commands.last().map(|c| c.op), Some(flow_op::OFFLOAD));
    for seq in [c(0), c(70_000)] {
        assert_eq!(bench.error(hard(Side::Client, seq)), Passed);
        assert_eq!(bench.error(too_big(Side::Client, 1_300, seq)), Passed);
    }
    // An error about another connection.
    let other = PuntRequest {
        serial: 98,
        ..PuntRequest::default()
    };
    let unknown = Dropped(Reason::TcpMidstream);
    assert_eq!(bench.error_as(hard(Side::Client, c(0)), other), unknown);
    // Acknowledged bytes are delivered first, in smaller packets.
    let mut bench = Bench::open_large();
    bench.deliver_with(6_000, b"\x01O");
    assert!(bench.out.commands.is_empty(), "it is not offloaded yet");
    assert_eq!(bench.made()[0], (0, 1_440));
    assert_eq!(bench.error(too_big(Side::Client, 1_300, c(0))), Taken);
    assert_eq!(bench.made()[0], (0, 1_260));
    for at in [6_002, 90_000, 1 << 30] {
        assert_eq!(bench.error(too_big(Side::Client, 1_200, c(at))), Passed);
    }
    assert!(bench.made().is_empty());
    assert_eq!(bench.table.stats().icmp_narrowed, 1);
    // Audit mode.
    let audit = PuntRequest {
        flags: punt_flags::AUDIT,
        ..PuntRequest::default()
    };
    let mut bench = Bench::open();
    assert_eq!(bench.error_as(hard(Side::Client, c(50)), audit), Passed);
    let out = bench.take();
    assert_eq!(
        (out.records[0].verdict, out.records[0].reason),
        (Verdict::Audit, Reason::UnrelatedIcmp)
    );
}

#[test]
fn errors_about_built_packets_do_not_reach_the_apparent_sender() {
    // A response of 800 bytes and a FIN in the server's place.
    let mut bench = Bench::open_large();
    bench.put(&client(0, b"\x02Ab"));
    let answer: Vec<_> = bench.take().emitted;
    assert_eq!(answer[0].0.data.len(), 800);
    assert_eq!(bench.error(too_big(Side::Server, 700, s(0))), Taken);
    let again: Vec<_> = bench.take().emitted;
    let lengths: Vec<_> = again.iter().map(|(seg, _)| seg.data.len()).collect();
    assert_eq!(lengths, [660, 140]);
    assert_eq!((again[0].0.from, again[0].0.seq), (Side::Server, s(0)));
    for (at, fate) in [(0, Taken), (800, Taken), (801, Taken), (802, FORGED)] {
        assert_eq!(bench.error(hard(Side::Server, s(at))), fate, "{at}");
    }
    // Resets.
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x01a\x01X"));
    bench.take();
    assert_eq!(bench.table.stats().cut, 1);
    assert_eq!(bench.error(hard(Side::Client, c(0))), Taken);
    assert_eq!(bench.error(too_big(Side::Client, 576, c(0))), Taken);
    assert_eq!(bench.error(hard(Side::Client, c(9))), FORGED);
    assert!(bench.take().emitted.is_empty());
}
