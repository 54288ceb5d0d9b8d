//! Tests of the TCP reader with a reader that lets a given number of bytes pass.

mod errors;

use std::collections::BTreeMap;

use palisade_abi::{FlowCommand, Inspector, PuntRequest, Reason, flow_op, punt_flags, punt_hook};
use palisade_packet::{Packet, Start, decode};
use proptest::prelude::*;

use super::{Action, Connections, Offloadable, Side, StreamInspector, TcpLimits};
use crate::{
    CommitRequest, Millis, PacketView, Route, Rules, Sink,
    context::Cx,
    frames::Spare,
    record::{Record, Verdict, What},
};

pub(crate) use palisade_abi::tcp_flags::{ACK, FIN, RST, SYN, URG};

const CLIENT_ISN: u32 = 0xffff_ff00;
const SERVER_ISN: u32 = 0x7fff_fff0;

/// A segment as its sender means it.
#[derive(Clone, Debug)]
pub(crate) struct Seg {
    pub(crate) from: Side,
    pub(crate) flags: u8,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    window: u16,
    options: Vec<u8>,
    pub(crate) data: Vec<u8>,
    /// The client's address, but for its last byte, which is 1.
    peer: [u8; 3],
}

impl Seg {
    pub(crate) fn new(from: Side, flags: u8, seq: u32, ack: u32, data: &[u8]) -> Self {
        Self {
            from,
            flags,
            seq,
            ack,
            window: 60_000,
            options: vec![],
            data: data.to_vec(),
            peer: [10, 0, 0],
        }
    }

    /// As a frame between 10.0.0.1:1000 and 10.0.0.2:80. Its checksums are not looked at.
    fn frame(&self) -> Vec<u8> {
        let mut f = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
        let [x, y, z] = self.peer;
        let (a, b) = ([x, y, z, 1], [10, 0, 0, 2]);
        let (mut ports, mut addrs) = ([3, 0xe8, 0, 80], [a, b]);
        if self.from == Side::Server {
            f[..12].rotate_left(6);
            ports.rotate_left(2);
            addrs.swap(0, 1);
        }
        let tcp = 20 + self.options.len() + self.data.len();
        f.extend([0x45, 0]);
        f.extend(((20 + tcp) as u16).to_be_bytes());
        f.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
        f.extend(addrs.concat());
        f.extend(ports);
        f.extend(self.seq.to_be_bytes());
        f.extend(self.ack.to_be_bytes());
        f.extend([((20 + self.options.len()) as u8) << 2, self.flags]);
        f.extend(self.window.to_be_bytes());
        f.extend([0; 4]);
        f.extend(&self.options);
        f.extend(&self.data);
        f
    }

    /// Shows it as a carried packet: towards the endpoint is what the client sends, or the server if the slot's
    /// flags have INGRESS.
    pub(crate) fn view(&self, slot: PuntRequest, f: impl FnOnce(&PacketView<'_>, Vec<u8>)) {
        let frame = self.frame();
        let mut packet = Packet::default();
        decode(&frame[..], Start::Ethernet { tags_removed: 0 }, &mut packet).unwrap();
        let answers = self.from == Side::Server;
        // The programs make an entry for a SYN, unless the test says which connection is meant.
        let is_new = !answers && self.flags & (SYN | ACK) == SYN && slot.serial == 0;
        let slot = PuntRequest {
            endpoint: if slot.endpoint == 0 { 7 } else { slot.endpoint },
            serial: if slot.serial == 0 { 99 } else { slot.serial },
            flags: slot.flags
                ^ if answers {
                    punt_flags::REPLY
                } else {
                    punt_flags::INGRESS
                }
                | if is_new { punt_flags::NEW } else { 0 },
            ..slot
        };
        let header = usize::from(frame[46] >> 4) * 4;
        let view = PacketView {
            slot: &slot,
            ifindex: 5,
            hook: if answers {
                punt_hook::TC_EGRESS
            } else {
                punt_hook::TC_INGRESS
            },
            packet: &packet,
            frame: &frame,
            network: 14,
            transport: 34,
            payload: (34 + header, frame.len()),
        };
        f(&view, frame.clone());
    }

    fn read(frame: &[u8]) -> Self {
        let word = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
        let header = usize::from(frame[46] >> 4) * 4;
        Self {
            from: if frame[29] == 1 {
                Side::Client
            } else {
                Side::Server
            },
            flags: frame[47],
            seq: word(38),
            ack: word(42),
            window: u16::from_be_bytes([frame[48], frame[49]]),
            options: frame[54..34 + header].to_vec(),
            data: frame[34 + header..].to_vec(),
            peer: [10, 0, 0],
        }
    }
}

#[derive(Default)]
pub(crate) struct Out {
    pub(crate) released: Vec<Seg>,
    /// ICMP errors that go on.
    errors: usize,
    pub(crate) discarded: Vec<Reason>,
    pub(crate) emitted: Vec<(Seg, Route)>,
    pub(crate) commands: Vec<FlowCommand>,
    /// Those without a packet.
    told: Vec<FlowCommand>,
    pub(crate) records: Vec<Record>,
}

impl Sink<Vec<u8>> for Out {
    fn release(&mut self, frame: Vec<u8>) {
        if frame[23] == 1 {
            self.errors += 1;
            return;
        }
        self.released.push(Seg::read(&frame));
    }
    fn release_with(&mut self, frame: Vec<u8>, command: &FlowCommand) {
        self.commands.push(*command);
        self.release(frame);
    }
    fn command(&mut self, command: &FlowCommand) {
        self.told.push(*command);
    }
    fn discard(&mut self, _: Vec<u8>, reason: Reason) {
        self.discarded.push(reason);
    }
    fn emit(&mut self, frame: &[u8], route: Route) {
        // What is made here has right sums.
        let sum = |bytes: &[u8], start: u32| {
            let mut sum = start;
            for pair in bytes.chunks(2) {
                sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            }
            while sum >> 16 != 0 {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            sum
        };
        assert_eq!(sum(&frame[14..34], 0), 0xffff);
        let tcp = &frame[34..];
        assert_eq!(sum(tcp, sum(&frame[26..34], 6 + tcp.len() as u32)), 0xffff);
        self.emitted.push((Seg::read(frame), route));
    }
    fn commit(&mut self, learn: CommitRequest) -> Result<(), CommitRequest> {
        Err(learn)
    }
    fn record(&mut self, record: &Record) {
        self.records.push(*record);
    }
}

/// Messages with their length before them. One that begins with `X` is refused, `A` is answered, `O` ends the
/// reading, `S` says that the following bytes (a number of 16 bits) are not to be read, `L` that they belong to it.
#[derive(Default)]
struct Messages;

impl Offloadable for Messages {
    type OffloadVerdict = ();
    fn remember(&mut self) {}
}

impl StreamInspector<Vec<u8>> for &mut Messages {
    fn read<S: Sink<Vec<u8>>>(
        &mut self,
        side: Side,
        bytes: &[u8],
        end: bool,
        _: &mut Cx<'_, Vec<u8>, S>,
    ) -> Action {
        if side == Side::Server {
            return Action::Forward(bytes.len());
        }
        let Some((&length, rest)) = bytes.split_first() else {
            return Action::Forward(0);
        };
        let Some(message) = rest.get(..usize::from(length)) else {
            return if end {
                Action::Abort(Reason::AppMalformed)
            } else {
                Action::NeedMore
            };
        };
        match message {
            [b'X', ..] => Action::Abort(Reason::AppDenied),
            [b'A', ..] => Action::Respond(Reason::AppDenied, b"no".repeat(400)),
            [b'O', ..] => Action::Offload,
            [b'S', high, low, ..] => {
                let n = u64::from(*high) << 8 | u64::from(*low);
                Action::Bypass(1 + u64::from(length) + n)
            }
            [b'L', high, low, ..] => {
                let n = 1 + usize::from(length) + (usize::from(*high) << 8 | usize::from(*low));
                if bytes.len() < n {
                    Action::NeedMore
                } else {
                    Action::Forward(n)
                }
            }
            _ => Action::Forward(1 + usize::from(length)),
        }
    }
}

/// Calls `f` with a context without rules.
fn with_context(now: Millis, out: &mut Out, f: impl FnOnce(&mut Cx<'_, Vec<u8>, Out>)) {
    f(&mut Cx {
        now,
        rules: &Rules::default(),
        spare: &mut Spare::new(),
        sink: out,
    });
}

struct Bench {
    table: Connections<Vec<u8>, Messages>,
    out: Out,
    now: Millis,
    is_audit: bool,
}

impl Bench {
    fn new(limits: TcpLimits) -> Self {
        Self {
            table: Connections::new(&limits),
            out: Out::default(),
            now: 0,
            is_audit: false,
        }
    }

    /// One that has shaken hands.
    fn open() -> Self {
        let mut bench = Self::new(TcpLimits::default());
        bench.handshake();
        bench
    }

    fn handshake(&mut self) {
        self.put(&Seg::new(Side::Client, SYN, CLIENT_ISN, 0, b""));
        self.put(&Seg::new(
            Side::Server,
            SYN | ACK,
            SERVER_ISN,
            CLIENT_ISN.wrapping_add(1),
            b"",
        ));
        self.put(&client(0, b""));
        assert_eq!(self.out.released.len(), 3);
        self.out = Out::default();
    }

    fn put(&mut self, seg: &Seg) {
        self.put_as(seg, 0, 0);
    }

    /// A packet of an entry with this serial, if it is not 0, that the packet has not made; of this endpoint.
    fn put_as(&mut self, seg: &Seg, serial: u32, endpoint: u16) {
        let (table, out, now) = (&mut self.table, &mut self.out, self.now);
        let slot = PuntRequest {
            inspector: Inspector::Http as u8,
            serial,
            endpoint,
            flags: if self.is_audit { punt_flags::AUDIT } else { 0 },
            ..PuntRequest::default()
        };
        seg.view(slot, |view, frame| {
            with_context(now, out, |cx| {
                table.packet(view, frame, Messages::default, |m| m, |(), _| Ok(()), cx);
            });
        });
        self.check();
    }

    /// What is counted is what there is.
    fn check(&self) {
        let stats = self.table.stats();
        assert!(stats.frames < 10_000 && stats.bytes < 1 << 30);
    }

    fn tick(&mut self, now: Millis) {
        self.now = now;
        with_context(now, &mut self.out, |cx| self.table.tick(cx));
    }

    /// Removes all connections.
    fn forget(&mut self) {
        with_context(self.now, &mut self.out, |cx| self.table.forget(None, cx));
    }

    fn take(&mut self) -> Out {
        std::mem::take(&mut self.out)
    }
}

/// Resident memory of this process, bytes.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// A SYN from the client with this number.
fn syn_of(peer: u32) -> Seg {
    let [_, x, y, z] = peer.to_be_bytes();
    Seg {
        peer: [x, y, z],
        ..Seg::new(Side::Client, SYN, 1, 0, b"")
    }
}

fn client(at: u32, data: &[u8]) -> Seg {
    Seg::new(
        Side::Client,
        ACK,
        CLIENT_ISN.wrapping_add(1 + at),
        SERVER_ISN.wrapping_add(1),
        data,
    )
}

fn server(acks: u32) -> Seg {
    Seg::new(
        Side::Server,
        ACK,
        SERVER_ISN.wrapping_add(1),
        CLIENT_ISN.wrapping_add(1 + acks),
        b"",
    )
}

#[test]
fn a_packet_waits_until_all_its_bytes_are_judged() {
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x03ab"));
    bench.put(&client(3, b"c\x02d"));
    assert!(
        bench.out.released.len() == 1,
        "a frame that ends in a message waits"
    );
    assert_eq!(bench.table.stats().frames, 1);
    bench.put(&client(6, b"e"));
    let out = bench.take();
    let data: Vec<_> = out.released.iter().map(|s| s.data.clone()).collect();
    assert_eq!(data, [&b"\x03ab"[..], b"c\x02d", b"e"]);
    assert!(out.discarded.is_empty() && out.emitted.is_empty());
    assert_eq!(bench.table.stats().frames, 0);
    bench.put(&server(7));
    assert_eq!(bench.table.stats().bytes, 0, "what is acknowledged is not kept");
}

#[test]
fn what_is_refused_resets_both_sides() {
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x02ok\x03Xyz"));
    let out = bench.take();
    assert_eq!(
        (out.released.len(), &out.discarded[..]),
        (0, &[Reason::AppDenied][..])
    );
    let [(part, _), (to_client, back), (to_server, on)] = &out.emitted[..] else {
        panic!("{:?}", out.emitted)
    };
    assert_eq!((part.from, &part.data[..]), (Side::Client, &b"\x02ok"[..]));
    assert_eq!(part.seq, CLIENT_ISN.wrapping_add(1));
    assert_eq!(to_client.from, Side::Server);
    assert_eq!(to_client.flags, RST | ACK);
    assert_eq!(to_client.seq, SERVER_ISN.wrapping_add(1));
    assert_eq!(to_client.ack, CLIENT_ISN.wrapping_add(1 + 7));
    assert_eq!(
        (back.ifindex, back.hook, back.back),
        (5, punt_hook::TC_EGRESS, false)
    );
    assert_eq!((to_server.from, to_server.flags & RST), (Side::Client, RST));
    assert_eq!(
        to_server.seq,
        CLIENT_ISN.wrapping_add(1 + 3),
        "what the server expects next"
    );
    assert_eq!((on.hook, on.back), (punt_hook::TC_INGRESS, false));
    // what comes later is refused, too
    bench.put(&client(7, b"\x01a"));
    let out = bench.take();
    assert_eq!((out.released.len(), out.emitted.len()), (0, 1));
    assert_eq!(out.emitted[0].0.seq, SERVER_ISN.wrapping_add(1));
}

#[test]
fn retransmissions_say_the_same_or_nothing() {
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x03ab"));
    bench.put(&client(0, b"\x03ab"));
    assert_eq!(bench.take().discarded, [Reason::TcpHeld]);
    bench.put(&client(1, b"X"));
    assert_eq!(bench.take().discarded, [Reason::TcpOverlap]);
    bench.put(&client(3, b"c"));
    assert_eq!(bench.take().released.len(), 2);
    // released, not acknowledged: compared
    bench.put(&client(1, b"abc"));
    bench.put(&client(0, b"\x03Xbc"));
    bench.put(&client(2, b"bX\x01d"));
    let out = bench.take();
    assert_eq!(
        (out.released.len(), &out.discarded[..]),
        (1, &[Reason::TcpOverlap; 2][..])
    );
    // acknowledged: nobody compares it any more, so it does not go on; the sender is told how far it has come, what is
    // new behind it included
    bench.put(&server(4));
    bench.take();
    for (at, data, next) in [(0, &b"\x03Xbc"[..], 5), (2, b"zz\x01d", 7)] {
        bench.put(&client(at, data));
        let out = bench.take();
        assert_eq!(
            (out.released.len(), &out.discarded[..]),
            (0, &[Reason::TcpHeld][..])
        );
        let (made, _) = &out.emitted[0];
        assert_eq!(
            (made.from, made.flags, made.ack),
            (Side::Server, ACK, CLIENT_ISN.wrapping_add(next))
        );
        assert!(out.emitted[1..].iter().all(|(seg, _)| seg.data == b"\x01d"));
    }
    bench.put(&server(6));
    bench.take();
    // whether the receiver is still there, only it can say
    bench.put(&client(5, b"?"));
    assert_eq!(bench.take().released.len(), 1);
}

#[test]
fn nobody_sends_out_of_the_window_or_what_is_read_in_two_ways() {
    let mut bench = Bench::open();
    let mut far = client(70_000, b"a");
    bench.put(&far);
    far.seq = CLIENT_ISN.wrapping_sub(200_000);
    bench.put(&far);
    let mut early = client(0, b"\x01a");
    early.ack = SERVER_ISN.wrapping_add(2);
    bench.put(&early);
    assert_eq!(bench.take().discarded, [Reason::TcpOutOfWindow; 3]);
    let mut odd = client(0, b"\x01a");
    odd.flags |= URG;
    bench.put(&odd);
    odd.flags = 0;
    odd.flags = SYN;
    bench.put(&odd);
    let mut bad = client(0, b"\x01a");
    bad.options = vec![2, 0, 0, 0];
    bench.put(&bad);
    // a selective acknowledgement of what was never sent
    let mut sack = client(0, b"");
    sack.options = [
        &[1, 1, 5, 10][..],
        &SERVER_ISN.to_be_bytes(),
        &SERVER_ISN.wrapping_add(9).to_be_bytes(),
    ]
    .concat();
    bench.put(&sack);
    assert_eq!(bench.take().discarded, [Reason::TcpInvalid; 4]);
    // after the end there is nothing
    let mut end = client(0, b"\x01a");
    end.flags |= FIN;
    bench.put(&end);
    assert_eq!(bench.take().released.len(), 1);
    bench.put(&client(2, b"\x01b"));
    end.data = b"\x01".to_vec();
    bench.put(&end);
    assert_eq!(bench.take().discarded, [Reason::TcpOverlap; 2]);
}

#[test]
fn resets_name_the_byte_that_is_expected() {
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x01a"));
    bench.put(&client(2, b"\x01"));
    bench.take();
    let rst = |at: u32| Seg::new(Side::Client, RST, CLIENT_ISN.wrapping_add(1 + at), 0, b"");
    bench.put(&rst(100));
    assert_eq!(bench.take().discarded, [Reason::TcpOutOfWindow]);
    bench.put(&rst(2));
    assert_eq!(bench.take().released.len(), 1);
    // behind what is held: the receiver gets one that it believes
    bench.put(&rst(3));
    let out = bench.take();
    assert_eq!(out.discarded, [Reason::TcpHeld; 2]);
    assert_eq!(out.emitted.len(), 1);
    assert_eq!(out.emitted[0].0.seq, CLIENT_ISN.wrapping_add(3));
    assert_eq!(bench.table.stats().frames, 0);
}

#[test]
fn connections_are_seen_from_their_start_or_cut() {
    let mut bench = Bench::new(TcpLimits::default());
    bench.put(&client(0, b"\x01a"));
    // The server is asked what it waits for, in the client's place.
    let out = bench.take();
    assert_eq!(out.discarded, [Reason::TcpMidstream]);
    let [(ask, on)] = &out.emitted[..] else {
        panic!("{:?}", out.emitted)
    };
    assert_eq!((ask.from, ask.flags, ask.data.len()), (Side::Client, ACK, 0));
    assert_eq!(ask.seq, CLIENT_ISN);
    assert!(!on.back && out.commands.is_empty());
    // It has had more than what the client repeats.
    bench.put(&server(2));
    let out = bench.take();
    assert_eq!(out.discarded, [Reason::TcpMidstream]);
    assert!(out.emitted.iter().all(|(seg, _)| seg.flags & RST != 0));
    let (to_server, back) = &out.emitted[0];
    assert_eq!((to_server.from, back.back), (Side::Client, true));
    assert_eq!(to_server.seq, CLIENT_ISN.wrapping_add(3));
    let (to_client, on) = &out.emitted[1];
    assert_eq!((to_client.from, on.back), (Side::Server, false));
    assert_eq!(to_client.seq, SERVER_ISN.wrapping_add(1));
    // An end without the connection answers by a reset, which the other end believes.
    bench.put(&client(0, b"\x01a"));
    bench.put(&Seg::new(Side::Server, RST, SERVER_ISN.wrapping_add(1), 0, b""));
    let out = bench.take();
    assert_eq!((out.released.len(), out.emitted.len()), (1, 1));
    assert_eq!(out.released[0].seq, SERVER_ISN.wrapping_add(1));
    // But a reset with a payload does not pass.
    bench.put(&Seg::new(
        Side::Server,
        RST,
        SERVER_ISN.wrapping_add(1),
        0,
        b"secret",
    ));
    assert_eq!(bench.take().released.len(), 0);
    // refused by the server
    bench.put(&Seg::new(Side::Client, SYN, 7, 0, b""));
    bench.put(&Seg::new(Side::Server, RST | ACK, 0, 8, b""));
    assert_eq!(bench.take().released.len(), 2);
    // and again, by the same ports
    bench.put(&Seg::new(Side::Client, SYN, 900, 0, b""));
    bench.put(&Seg::new(Side::Server, SYN | ACK, 5, 8, b""));
    bench.put(&Seg::new(Side::Server, SYN | ACK, 5, 901, b""));
    let out = bench.take();
    assert_eq!(
        (out.released.len(), &out.discarded[..]),
        (2, &[Reason::TcpInvalid][..])
    );
    // data in a SYN
    bench.put(&Seg::new(Side::Client, SYN, 900, 0, b"\x01a"));
    assert_eq!(bench.take().discarded, [Reason::TcpInvalid]);
}

/// Two ends that have any numbers of each other, of which some packets got lost: both are reset with the number that
/// each waits for, whoever sends first.
#[test]
fn both_ends_of_a_connection_that_is_not_known_are_reset_so_that_they_believe_it() {
    for first in [Side::Client, Side::Server] {
        // Bytes that have been sent by each, and that the other has of them.
        for (sent, has) in [
            ([5, 9], [5, 9]),
            ([5, 9], [3, 9]),
            ([5, 9], [5, 4]),
            ([8, 8], [0, 0]),
        ] {
            let mut bench = Bench::new(TcpLimits::default());
            let isn = [CLIENT_ISN, SERVER_ISN];
            let seq = |side: Side, at: u32| isn[side as usize].wrapping_add(1 + at);
            let mut alive = [true, true];
            let has = |side: Side| has[side as usize];
            let acks = |side: Side| seq(side.other(), has(side.other()));
            // What it believes that the other has not.
            let repeats = |side: Side| {
                let data = vec![1; sent[side as usize] as usize];
                Seg::new(side, ACK, seq(side, 0), acks(side), &data)
            };
            let mut sent_packets = vec![repeats(first)];
            for round in 0..20 {
                let Some(packet) = sent_packets.pop() else {
                    let alive = [Side::Client, Side::Server]
                        .into_iter()
                        .find(|side| alive[*side as usize]);
                    let Some(side) = alive else { break };
                    assert!(round < 15, "{first:?} {sent:?}");
                    sent_packets.push(repeats(side));
                    continue;
                };
                bench.put(&packet);
                let out = bench.take();
                for got in out.released.iter().chain(out.emitted.iter().map(|(seg, _)| seg)) {
                    let side = got.from.other();
                    let next = acks(side);
                    if !alive[side as usize] {
                        if got.flags & RST == 0 {
                            sent_packets.push(Seg::new(side, RST, got.ack, 0, b""));
                        }
                    } else if got.flags & RST != 0 && got.seq == next {
                        alive[side as usize] = false;
                    } else if got.seq.wrapping_sub(next) as i32 != 0 && got.flags & RST == 0
                        || (got.seq.wrapping_sub(next) as i32) > 0
                    {
                        // Not acceptable, or a reset to be challenged.
                        sent_packets.push(Seg::new(side, ACK, seq(side, sent[side as usize]), next, b""));
                    }
                }
            }
            assert_eq!(alive, [false, false], "{first:?} {sent:?}");
        }
    }
}

/// A path that takes packets of some size only, and does not say so.
#[test]
fn what_is_delivered_from_here_gets_smaller_until_it_arrives() {
    for limit in [1_440, 1_300, 1_232, 1_220, 900, 536] {
        let mut bench = Bench::open();
        let message = vec![b'm'; 250];
        let stream: Vec<u8> = std::iter::repeat_n([&[250], &message[..]].concat(), 40)
            .flatten()
            .collect();
        // All but the end of the last message: held, acknowledged here.
        let held = stream.len() - 10;
        for (n, part) in stream[..held].chunks(1_400).enumerate() {
            bench.put(&client(n as u32 * 1_400, part));
        }
        bench.out.released.clear();
        bench.tick(20);
        bench.put(&client(held as u32, &stream[held..]));
        let mut got = vec![false; stream.len()];
        let mut waited = 0;
        while got.contains(&false) {
            let out = bench.take();
            let made = out.emitted.into_iter().map(|(seg, _)| seg);
            let before = got.iter().take_while(|got| **got).count();
            for seg in out.released.into_iter().chain(made) {
                if seg.from == Side::Client && seg.data.len() <= limit && !seg.data.is_empty() {
                    let at = seg.seq.wrapping_sub(CLIENT_ISN.wrapping_add(1)) as usize;
                    assert_eq!(seg.data[..], stream[at..at + seg.data.len()]);
                    got[at..at + seg.data.len()].fill(true);
                }
            }
            let has = got.iter().take_while(|got| **got).count();
            if has > before {
                bench.put(&server(has as u32));
            } else {
                waited += 10;
                assert!(waited < 4_000, "{limit}: {has} bytes");
                let now = bench.now + 10;
                bench.tick(now);
            }
        }
    }
}

#[test]
fn what_never_arrives_ends_the_connection_and_the_record_says_why() {
    let mut bench = Bench::open();
    bench.put(&client(0, &[&[255][..], &[b'm'; 255]].concat()[..200]));
    bench.tick(20);
    bench.put(&client(200, &[b'm'; 56]));
    bench.take();
    let mut records = Vec::new();
    let mut reset = false;
    for _ in 0..4_000 {
        let now = bench.now + 10;
        bench.tick(now);
        let out = bench.take();
        reset |= out.emitted.iter().any(|(seg, _)| seg.flags & RST != 0);
        records.extend(out.records);
    }
    assert!(reset);
    let [record] = &records[..] else {
        panic!("{records:?}")
    };
    let What::Unreadable { detail } = record.what else {
        panic!("{record:?}")
    };
    assert_eq!(
        (record.reason, detail),
        (
            Reason::InspectDeadline,
            "What was acknowledged for the receiver does not reach it"
        )
    );
}

#[test]
fn dropped_packets_have_records_and_cannot_fill_them() {
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x04ab"));
    for _ in 0..1_000 {
        bench.put(&client(1, b"zz"));
    }
    let out = bench.take();
    assert_eq!(out.discarded, [Reason::TcpOverlap; 1_000]);
    let [record] = &out.records[..] else {
        panic!("{:?}", out.records)
    };
    assert_eq!((record.reason, record.source.1), (Reason::TcpOverlap, 1_000));
    // Another reason is told at once, and the same one later.
    bench.put(&client(90_000, b"zz"));
    bench.now += 1_000;
    bench.put(&client(90_000, b"zz"));
    let reasons: Vec<_> = bench.take().records.iter().map(|record| record.reason).collect();
    assert_eq!(reasons, [Reason::TcpOutOfWindow; 2]);
    // A SYN+ACK of another server's connection, while the connection is open.
    let stray = Seg::new(Side::Server, SYN | ACK, 1, 900, b"");
    for _ in 0..2 {
        bench.put(&stray);
    }
    bench.now += 1_000;
    bench.put(&stray);
    let out = bench.take();
    assert_eq!(out.discarded, [Reason::TcpInvalid; 3]);
    let reasons: Vec<_> = out.records.iter().map(|record| record.reason).collect();
    assert_eq!(reasons, [Reason::TcpInvalid; 2]);
    // Packets of connections that are not known.
    let mut bench = Bench::new(TcpLimits::default());
    for n in 0..1_000 {
        bench.put(&client(n, b"x"));
    }
    let out = bench.take();
    assert_eq!((out.discarded.len(), out.records.len()), (1_000, 200));
}

#[test]
fn both_may_open() {
    let mut bench = Bench::new(TcpLimits::default());
    bench.put(&Seg::new(Side::Client, SYN, CLIENT_ISN, 0, b""));
    bench.put(&Seg::new(Side::Server, SYN, SERVER_ISN, 0, b""));
    let (c, s) = (CLIENT_ISN.wrapping_add(1), SERVER_ISN.wrapping_add(1));
    bench.put(&Seg::new(Side::Client, SYN | ACK, CLIENT_ISN, s, b""));
    bench.put(&Seg::new(Side::Server, SYN | ACK, SERVER_ISN, c, b""));
    bench.put(&client(0, b"\x01a"));
    let out = bench.take();
    assert_eq!((out.released.len(), out.discarded.len()), (5, 0));
}

#[test]
fn an_answer_comes_after_what_the_server_said_and_until_it_is_taken() {
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x02hi"));
    let mut hello = server(3);
    hello.data = b"hello".to_vec();
    bench.put(&hello);
    bench.put(&client(3, b"\x02Ab"));
    let out = bench.take();
    assert_eq!(
        (out.released.len(), out.emitted.len()),
        (2, 0),
        "the client has not said that it has the hello"
    );
    let mut ack = client(6, b"");
    ack.ack = ack.ack.wrapping_add(5);
    bench.put(&ack);
    let out = bench.take();
    let kinds: Vec<_> = out
        .emitted
        .iter()
        .map(|(seg, _)| (seg.from, seg.flags & (RST | FIN), seg.data.len()))
        .collect();
    assert_eq!(
        kinds,
        [
            (Side::Server, 0, 536),
            (Side::Server, FIN, 264),
            (Side::Client, FIN, 0),
        ]
    );
    assert_eq!(
        out.emitted[2].0.seq,
        CLIENT_ISN.wrapping_add(4),
        "nothing of it reached the server"
    );
    assert_eq!(out.emitted[0].0.seq, SERVER_ISN.wrapping_add(6));
    assert_eq!(out.emitted[0].0.ack, CLIENT_ISN.wrapping_add(7));
    assert_eq!(out.discarded, [Reason::AppDenied]);
    // half of it is lost
    ack.ack = ack.ack.wrapping_add(536);
    bench.put(&ack);
    bench.tick(300);
    let out = bench.take();
    assert_eq!(out.emitted.len(), 2, "and the end for the server");
    assert_eq!(
        (out.emitted[0].0.data.len(), out.emitted[0].0.flags & FIN),
        (264, FIN)
    );
    assert_eq!(
        (out.emitted[1].0.from, out.emitted[1].0.flags & FIN),
        (Side::Client, FIN)
    );
    // the server closes too
    let mut end = server(4);
    (end.seq, end.flags) = (end.seq.wrapping_add(5), ACK | FIN);
    bench.put(&end);
    let out = bench.take();
    assert_eq!(
        (out.released.len(), &out.discarded[..]),
        (0, &[Reason::AppDenied][..])
    );
    let [(to_server, _)] = &out.emitted[..] else {
        panic!("{:?}", out.emitted)
    };
    assert_eq!((to_server.from, to_server.flags), (Side::Client, ACK));
    assert_eq!(to_server.ack, SERVER_ISN.wrapping_add(7));
    assert_eq!(to_server.seq, CLIENT_ISN.wrapping_add(5));
    ack.ack = ack.ack.wrapping_add(265);
    ack.flags |= FIN;
    bench.put(&ack);
    let out = bench.take();
    assert_eq!(out.emitted.len(), 1);
    assert_eq!(out.emitted[0].0.ack, CLIENT_ISN.wrapping_add(8));
    bench.tick(20_000);
    assert!(bench.take().emitted.is_empty());
    bench.tick(120_000);
    assert_eq!(bench.table.stats().connections, 0);
}

#[test]
fn what_needs_no_reading_is_left_to_the_programs() {
    let mut bench = Bench::open();
    bench.put(&client(2, b"x"));
    bench.put(&client(0, b"\x01O"));
    let out = bench.take();
    assert_eq!((out.released.len(), out.commands.len()), (2, 1));
    let command = out.commands[0];
    assert_eq!((command.op, command.serial, command.key.endpoint), (1, 99, 7));
    assert_eq!((command.key.local_port, command.key.remote_port), (80, 1000));
    bench.put(&client(3, b"\x01X"));
    let out = bench.take();
    assert_eq!((out.released.len(), out.commands.len()), (1, 1));
    assert_eq!(bench.table.stats().bytes, 0);
}

#[test]
fn stretches_that_need_no_reading_go_by_and_what_is_behind_is_read() {
    let mut bench = Bench::new(TcpLimits {
        window: 10_000,
        ..TcpLimits::default()
    });
    bench.handshake();
    // 20,000 bytes behind the message
    bench.put(&client(0, b"\x03S\x4e\x20"));
    let out = bench.take();
    assert_eq!((out.released.len(), out.commands.len()), (1, 1));
    let begin = CLIENT_ISN.wrapping_add(1);
    assert_eq!(
        (out.commands[0].op, out.commands[0].windows),
        (0, [begin, begin.wrapping_add(20_004), 0, 0])
    );
    bench.put(&client(1000, b"anything"));
    bench.put(&client(1000, b"any-thing"));
    bench.put(&client(20_004, b"\x02X"));
    let out = bench.take();
    assert_eq!(
        (out.released.len(), bench.table.stats().frames),
        (2, 1),
        "its content is nobody's concern, what follows is"
    );
    bench.put(&client(1, b"Z\x4e\x20"));
    assert_eq!(bench.take().released.len(), 1, "skipped with the rest");
    bench.put(&client(20_006, b"y"));
    assert_eq!(bench.take().discarded, [Reason::AppDenied; 2]);
}

#[test]
fn nothing_waits_for_ever_and_what_is_held_is_bounded() {
    let limits = TcpLimits {
        frames_per_direction: 3,
        bytes_per_direction: 100,
        deadline: 1000,
        ..TcpLimits::default()
    };
    let mut bench = Bench::new(limits);
    bench.handshake();
    for at in 0..4 {
        // with gaps, so that nothing of it can be acknowledged
        bench.put(&client(2 * at + 1, b"\xff"));
    }
    bench.put(&client(50, &[1; 60]));
    assert_eq!(bench.take().discarded, [Reason::InspectLimit; 2]);
    assert_eq!(bench.table.deadline(), Some(1000));
    bench.tick(1000);
    let out = bench.take();
    assert_eq!(out.discarded, [Reason::InspectDeadline; 3]);
    assert_eq!(out.emitted.len(), 2);
    assert_eq!(out.records.len(), 1, "it is named");
    assert_eq!((bench.table.stats().bytes, bench.table.stats().frames), (0, 0));
    bench.forget();
    assert_eq!(bench.table.stats().connections, 0);
}

/// A sender that waits for the acknowledgement of what it has sent gets it, and what was acknowledged is delivered.
#[test]
fn what_is_held_is_acknowledged_and_then_delivered() {
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x04ab"));
    assert_eq!(bench.table.deadline(), Some(10));
    bench.tick(10);
    let out = bench.take();
    let [(ack, _)] = &out.emitted[..] else {
        panic!("{:?}", out.emitted)
    };
    assert_eq!(
        (ack.from, ack.flags, &ack.data[..]),
        (Side::Server, ACK, &b""[..])
    );
    assert_eq!(
        (ack.seq, ack.ack),
        (SERVER_ISN.wrapping_add(1), CLIENT_ISN.wrapping_add(4))
    );
    assert_eq!(bench.table.stats().frames, 0, "the packet is not needed any more");
    // it comes again if the acknowledgement got lost
    bench.put(&client(0, b"\x04ab"));
    let out = bench.take();
    assert_eq!(out.emitted[0].0.ack, CLIENT_ISN.wrapping_add(4));
    assert!(out.released.is_empty());
    // the rest comes: both go on
    bench.put(&client(3, b"cd"));
    let out = bench.take();
    let [(made, _)] = &out.emitted[..] else {
        panic!("{:?}", out.emitted)
    };
    assert_eq!(
        (made.from, made.seq, &made.data[..]),
        (Side::Client, CLIENT_ISN.wrapping_add(1), &b"\x04ab"[..])
    );
    assert_eq!(out.released[0].data, b"cd");
    // the first is lost on the way: sent again until it is there
    bench.tick(bench.table.deadline().unwrap());
    assert_eq!(bench.take().emitted[0].0.data, b"\x04ab");
    bench.put(&server(5));
    assert_eq!(bench.table.stats().bytes, 0);
    bench.tick(5_000);
    assert!(bench.take().emitted.is_empty());
    // the same, and nothing goes on of what is refused
    bench.put(&client(5, b"\x04X"));
    bench.tick(5_010);
    assert_eq!(bench.take().emitted.len(), 1);
    bench.put(&client(7, b"abc"));
    assert!(
        bench
            .take()
            .emitted
            .iter()
            .all(|(seg, _)| seg.data.is_empty() && seg.flags & RST != 0)
    );
}

/// Adds a timestamp option to a segment (RFC 7323, 3).
fn stamped(seg: Seg, value: u32, echo: u32) -> Seg {
    let options = [&[1, 1, 8, 10][..], &value.to_be_bytes(), &echo.to_be_bytes()].concat();
    Seg { options, ..seg }
}

#[test]
fn what_is_made_here_is_no_older_than_what_the_receiver_may_have_taken() {
    let mut bench = Bench::new(TcpLimits::default());
    bench.put(&stamped(Seg::new(Side::Client, SYN, CLIENT_ISN, 0, b""), 90, 0));
    let syn_ack = Seg::new(
        Side::Server,
        SYN | ACK,
        SERVER_ISN,
        CLIENT_ISN.wrapping_add(1),
        b"",
    );
    bench.put(&stamped(syn_ack, 5000, 90));
    bench.put(&stamped(client(0, b""), 95, 5000));
    bench.take();
    // Two messages go on. No acknowledgement has been seen, but the server may have taken both, and their timestamps.
    bench.put(&stamped(client(0, b"\x02ab"), 100, 5000));
    bench.put(&stamped(client(3, b"\x02cd"), 110, 5000));
    assert_eq!(bench.take().released.len(), 2);
    // A part of a message is acknowledged here, and delivered from here once the rest has come.
    bench.put(&stamped(client(6, b"\x05e"), 120, 5000));
    bench.tick(20);
    bench.put(&stamped(client(8, b"fghi"), 130, 5000));
    bench.tick(400);
    let made: Vec<_> = bench
        .take()
        .emitted
        .into_iter()
        .map(|(seg, _)| seg)
        .filter(|seg| seg.from == Side::Client && !seg.data.is_empty())
        .collect();
    assert!(!made.is_empty());
    for seg in made {
        let value = u32::from_be_bytes(seg.options[4..8].try_into().unwrap());
        assert!(value >= 110, "{seg:?}");
    }
}

#[test]
fn a_receiver_that_takes_nothing_ends_it() {
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x04ab"));
    bench.tick(10);
    bench.put(&client(3, b"cd"));
    let mut sent = 0;
    while bench.table.stats().cut == 0 {
        bench.tick(bench.table.deadline().unwrap());
        sent += 1;
        assert!(sent < 20);
    }
    let out = bench.take();
    assert!(
        out.records
            .iter()
            .any(|record| record.reason == Reason::InspectDeadline)
    );
}

/// Many small packets are no reason to give up: their bytes are kept, not they.
#[test]
fn small_packets_are_taken_over_when_they_are_many() {
    let mut bench = Bench::new(TcpLimits {
        frames_per_direction: 8,
        ..TcpLimits::default()
    });
    bench.handshake();
    let message = [&[200][..], &[b'a'; 200]].concat();
    for (at, byte) in message.iter().enumerate() {
        bench.put(&client(at as u32, &[*byte]));
    }
    let out = bench.take();
    assert!(!out.discarded.contains(&Reason::InspectLimit));
    let mut got = Receiver {
        bytes: BTreeMap::new(),
        last_wins: true,
    };
    for seg in out.emitted.iter().map(|(seg, _)| seg).chain(&out.released) {
        if seg.from == Side::Client {
            got.take(seg);
        }
    }
    assert_eq!(got.stream(), message);
}

/// A sender that has not heard what the receiver has begins again, and adds to it.
#[test]
fn what_is_new_behind_what_the_receiver_has_goes_on() {
    let mut bench = Bench::open();
    let stream = b"\x02ab\x02cd\x03efg";
    bench.put(&client(0, &stream[..3]));
    bench.put(&server(3));
    bench.take();
    bench.put(&client(0, &stream[..8]));
    let out = bench.take();
    assert!(out.released.is_empty());
    let [(ack, _), (made, _)] = &out.emitted[..] else {
        panic!("{:?}", out.emitted)
    };
    assert_eq!((ack.from, ack.ack), (Side::Server, CLIENT_ISN.wrapping_add(9)));
    assert_eq!(
        (made.from, made.seq, &made.data[..]),
        (Side::Client, CLIENT_ISN.wrapping_add(4), &stream[3..6])
    );
    bench.put(&client(0, stream));
    let out = bench.take();
    assert!(out.emitted.iter().any(|(seg, _)| seg.data == stream[6..]));
    // with something else in place of what is not acknowledged
    bench.put(&client(0, b"\x02ab\x02cX\x03efg"));
    assert_eq!(bench.take().discarded, [Reason::TcpOverlap]);
}

/// A connection that is not read any more is judged again when its rules change, and only then.
#[test]
fn what_is_not_read_any_more_is_remembered_within_limits() {
    let mut bench = Bench::new(TcpLimits {
        offloaded_flows: 1,
        ..TcpLimits::default()
    });
    bench.handshake();
    bench.put(&client(0, b"\x01O"));
    bench.tick(1);
    let stats = bench.table.stats();
    assert_eq!(
        (stats.connections, stats.offloaded_flows, stats.offloaded),
        (0, 1, 1)
    );
    bench.take();
    bench.put(&client(2, b"x"));
    let out = bench.take();
    assert_eq!((out.released.len(), out.commands.len()), (1, 1));
    // other ports take its place
    bench.handshake();
    assert_eq!(bench.table.stats().offloaded_flows, 0);
}

/// The same ports again, by a SYN that the programs know no end before: the server decides whether it begins another
/// connection, and with its answer the programs learn that nothing of the old one holds for the new one.
#[test]
fn a_connection_in_the_place_of_another_is_read_from_its_start() {
    // Left to the programs and forgotten; left to them and still owed something; with a window; waiting for its rest.
    for (first, offloaded) in [
        (&b"\x01O"[..], true),
        (b"\x03S\x4e\x20", false),
        (b"\x05ab", false),
    ] {
        let mut bench = Bench::new(TcpLimits {
            window: 10_000,
            ..TcpLimits::default()
        });
        bench.handshake();
        bench.put(&client(0, first));
        bench.tick(1);
        bench.take();
        for isn in [CLIENT_ISN, 5000] {
            // Data in a SYN, or urgent data, is no way in.
            let syn = Seg::new(Side::Client, SYN, isn, 0, b"");
            for odd in [
                Seg {
                    data: b"\x01a".into(),
                    ..syn.clone()
                },
                Seg {
                    flags: SYN | URG,
                    ..syn.clone()
                },
            ] {
                bench.put_as(&odd, 99, 0);
                assert_eq!(bench.take().discarded, [Reason::TcpInvalid]);
            }
            bench.put_as(&syn, 99, 0);
            bench.put_as(&syn, 99, 0);
            let out = bench.take();
            assert_eq!((out.released.len(), out.commands.len()), (2, 0));
            // Until the server has answered the old one goes on.
            bench.put_as(&client(first.len() as u32, b"x"), 99, 0);
            let out = bench.take();
            assert!(
                out.commands.iter().all(|command| command.serial == 99),
                "{:?}",
                out.commands
            );
            assert_eq!(out.commands.len(), usize::from(offloaded));
            // Answers to something else.
            for ack in [isn, isn.wrapping_add(2)] {
                bench.put_as(&Seg::new(Side::Server, SYN | ACK, 777, ack, b""), 99, 0);
                assert_eq!(bench.take().discarded, [Reason::TcpInvalid]);
            }
            bench.put_as(&Seg::new(Side::Server, SYN, 777, 0, b""), 99, 0);
            assert_eq!(bench.take().discarded, [Reason::TcpInvalid]);
        }
        let answer = Seg::new(Side::Server, SYN | ACK, 777, 5001, b"");
        let mut serial = 0;
        for _ in 0..2 {
            // Again if it gets lost.
            bench.put_as(&answer, 99, 0);
            let out = bench.take();
            assert_eq!((out.released.len(), out.commands.len()), (1, 1));
            let command = out.commands[0];
            assert_eq!((command.op, command.serial), (flow_op::REPLACE, 99));
            serial = command.windows[0];
            assert_ne!(serial, 99);
        }
        assert_eq!(bench.table.stats().replaced, 1);
        assert_eq!(bench.table.stats().offloaded_flows, 0);
        // What was under way of the old one is not in its place.
        bench.put_as(&client(2, b"x"), 99, 0);
        assert_eq!(bench.take().released.len(), 0);
        let data = |at: u32, data: &[u8]| Seg::new(Side::Client, ACK, 5001 + at, 778, data);
        bench.put_as(&data(0, b""), serial, 0);
        let out = bench.take();
        assert_eq!((out.released.len(), out.commands.len()), (1, 1));
        assert_eq!(
            (out.commands[0].op, out.commands[0].serial),
            (flow_op::OPENED, serial)
        );
        bench.put_as(&data(0, b"\x02Xy"), serial, 0);
        let out = bench.take();
        assert_eq!(out.discarded, [Reason::AppDenied]);
        assert_eq!((out.told[0].op, out.told[0].serial), (flow_op::CLOSE, serial));
    }
}

/// The entry is older than what the worker remembers: it began anew, or has forgotten.
#[test]
fn what_was_decided_before_the_worker_began_does_not_hold_for_a_new_connection() {
    let mut bench = Bench::new(TcpLimits::default());
    bench.put_as(&Seg::new(Side::Client, SYN, CLIENT_ISN, 0, b""), 41, 0);
    assert_eq!(bench.take().commands.len(), 0);
    let isn = CLIENT_ISN.wrapping_add(1);
    bench.put_as(&Seg::new(Side::Server, SYN | ACK, SERVER_ISN, isn, b""), 41, 0);
    let out = bench.take();
    assert_eq!(
        (out.commands[0].op, out.commands[0].serial),
        (flow_op::REPLACE, 41)
    );
    // The answer to a SYN that is not known here causes no reset: the SYN comes again.
    bench.forget();
    bench.put_as(&Seg::new(Side::Server, SYN | ACK, SERVER_ISN, isn, b""), 41, 0);
    let out = bench.take();
    assert_eq!(
        (out.discarded.len(), out.emitted.len(), out.commands.len()),
        (1, 0, 0)
    );
}

/// A client that has lost its connection opens it again by the same ports (RFC 5961, 4; RFC 9293, 3.10.7.4).
#[test]
fn a_server_that_still_has_the_connection_says_so_and_the_client_resets_it() {
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x01a"));
    bench.put(&server(2));
    bench.take();
    let syn = Seg::new(Side::Client, SYN, 900_000, 0, b"");
    bench.put_as(&syn, 99, 0);
    // the challenge
    bench.put(&server(2));
    let reset = |at: u32| Seg::new(Side::Client, RST, CLIENT_ISN.wrapping_add(1 + at), 0, b"");
    bench.put(&reset(70_000));
    assert_eq!(bench.out.discarded, [Reason::TcpOutOfWindow]);
    bench.put(&reset(2));
    let out = bench.take();
    assert_eq!((out.released.len(), out.commands.len()), (3, 1));
    assert_eq!((out.commands[0].op, out.commands[0].serial), (flow_op::CLOSE, 99));
    // The programs begin another entry for the SYN when it comes again.
    bench.put(&syn);
    let answer = Seg::new(Side::Server, SYN | ACK, 77, 900_001, b"");
    bench.put(&answer);
    bench.put(&Seg::new(Side::Client, ACK, 900_001, 78, b"\x02Xa"));
    let out = bench.take();
    assert_eq!((out.released.len(), out.discarded), (2, vec![Reason::AppDenied]));
    // A server that has forgotten it refuses, or answers at once.
    let mut bench = Bench::open();
    bench.put_as(&syn, 99, 0);
    bench.put(&Seg::new(Side::Server, RST | ACK, 0, 900_001, b""));
    assert_eq!(
        bench.take().released.len(),
        2,
        "the client hears that it is refused"
    );
}

#[test]
fn the_end_of_a_connection_is_told_once_it_is_sure() {
    // Both have closed, and know it.
    let mut bench = Bench::open();
    let mut end = client(0, b"");
    end.flags |= FIN;
    bench.put(&end);
    let mut answer = server(1);
    answer.flags |= FIN;
    bench.put(&answer);
    assert!(bench.take().commands.is_empty());
    let mut last = client(1, b"");
    last.ack = last.ack.wrapping_add(1);
    bench.put(&last);
    let out = bench.take();
    assert_eq!((out.released.len(), out.commands[0].op), (1, flow_op::CLOSE));
    // A reset that may be a challenged one: with bytes under way it is not known what the receiver waits for.
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x01a"));
    bench.put(&Seg::new(Side::Client, RST, CLIENT_ISN.wrapping_add(1), 0, b""));
    let out = bench.take();
    assert_eq!((out.released.len(), out.commands.len()), (2, 0));
    // The connection goes on; without that it is forgotten soon.
    bench.put(&server(2));
    bench.tick(61_000);
    assert_eq!(bench.table.stats().connections, 1);
    bench.put(&Seg::new(Side::Client, RST, CLIENT_ISN.wrapping_add(3), 0, b""));
    bench.take();
    bench.tick(200_000);
    assert_eq!(bench.table.stats().connections, 0);
}

#[test]
fn a_flood_of_syns_takes_nothing_from_anybody_else() {
    let mut bench = Bench::new(TcpLimits::default());
    let before = resident();
    let mut served = 0;
    for n in 0..200_000 {
        bench.put_as(&syn_of(n), 0, 7);
        if n % 1000 == 999 {
            // The connection of another endpoint needs a while.
            let (syn, peer) = (syn_of(0x00ff_0000 + n), syn_of(0x00ff_0000 + n).peer);
            bench.put_as(&syn, 0, 8);
            for n in 0..100 {
                bench.put_as(&syn_of(0x00e0_0000 + n), 0, 7);
            }
            bench.take();
            let answer = Seg {
                peer,
                ..Seg::new(Side::Server, SYN | ACK, 9, 2, b"")
            };
            bench.put_as(&answer, 99, 8);
            let ack = Seg {
                peer,
                ..Seg::new(Side::Client, ACK, 2, 10, b"\x01a")
            };
            bench.put_as(&ack, 99, 8);
            served += bench.take().released.len();
        }
        bench.take();
    }
    assert_eq!(served, 400, "all of the other endpoint's");
    let stats = bench.table.stats();
    assert_eq!(
        (stats.half_open, stats.connections, stats.limited),
        (16_383, 16_383 + 200, 0)
    );
    let grown = resident().saturating_sub(before);
    println!(
        "{} MiB for {} half-open connections",
        grown >> 20,
        stats.half_open
    );
    assert!(grown < 64 << 20, "{grown} bytes");
    // They are gone soon.
    bench.tick(10_001);
    assert_eq!(bench.table.stats().half_open, 0);
    assert_eq!(bench.table.stats().connections, 200);
}

#[test]
fn answered_syns_are_half_open_too_and_late_answers_are_waited_for() {
    let mut bench = Bench::new(TcpLimits {
        half_open: 100,
        ..TcpLimits::default()
    });
    for n in 0..1000 {
        let peer = syn_of(n).peer;
        bench.put_as(&syn_of(n), 0, 7);
        let answer = Seg {
            peer,
            ..Seg::new(Side::Server, SYN | ACK, 9, 2, b"")
        };
        bench.put_as(&answer, 99, 7);
    }
    assert_eq!(bench.table.stats().connections, 100);
    // A server that is silent for a minute: each SYN that is sent again is known.
    let mut bench = Bench::new(TcpLimits::default());
    let syn = Seg::new(Side::Client, SYN, CLIENT_ISN, 0, b"");
    for at in [0, 1, 3, 7, 15, 31, 63] {
        bench.tick(at * 1000);
        bench.put_as(&syn, if at == 0 { 0 } else { 99 }, 0);
    }
    let isn = CLIENT_ISN.wrapping_add(1);
    bench.put(&Seg::new(Side::Server, SYN | ACK, SERVER_ISN, isn, b""));
    bench.put(&client(0, b"\x01a"));
    let out = bench.take();
    assert_eq!((out.released.len(), out.discarded.len()), (9, 0));
    bench.tick(3_600_000);
    assert_eq!(bench.table.stats().connections, 1);
}

#[test]
fn no_endpoint_takes_all_connections() {
    let mut bench = Bench::new(TcpLimits {
        connections: 64,
        ..TcpLimits::default()
    });
    let mut open = |n: u32, endpoint: u16| {
        let peer = syn_of(n).peer;
        bench.put_as(&syn_of(n), 0, endpoint);
        let opened = bench.out.discarded.is_empty();
        let answer = Seg {
            peer,
            ..Seg::new(Side::Server, SYN | ACK, 9, 2, b"")
        };
        bench.put_as(&answer, 99, endpoint);
        let ack = Seg {
            peer,
            ..Seg::new(Side::Client, ACK, 2, 10, b"\x01a")
        };
        bench.put_as(&ack, 99, endpoint);
        bench.take();
        opened
    };
    let took = |open: &mut dyn FnMut(u32, u16) -> bool, endpoint: u16| {
        (0..64)
            .filter(|n| open(u32::from(endpoint) << 8 | n, endpoint))
            .count()
    };
    let shares: Vec<_> = (7..11).map(|endpoint| took(&mut open, endpoint)).collect();
    assert_eq!(shares[0], 48);
    assert!(shares.windows(2).all(|pair| pair[1] < pair[0]), "{shares:?}");
    assert!(shares[1] >= 12 && shares[2] >= 3 && shares[3] >= 1, "{shares:?}");
}

/// Half-open connections may be more than there is room for when they open: each is counted when its handshake
/// completes, not only when its SYN comes.
#[test]
fn half_open_connections_that_complete_stay_within_the_limit() {
    const HALF_OPEN: u32 = 200;
    for limits in [
        TcpLimits {
            connections_per_endpoint: 10,
            ..TcpLimits::default()
        },
        // Of what is left for the others an endpoint gets three times as much.
        TcpLimits {
            connections: 13,
            ..TcpLimits::default()
        },
    ] {
        let mut bench = Bench::new(limits);
        for n in 0..HALF_OPEN {
            let peer = syn_of(n).peer;
            bench.put_as(&syn_of(n), 0, 7);
            let answer = Seg {
                peer,
                ..Seg::new(Side::Server, SYN | ACK, 9, 2, b"")
            };
            bench.put_as(&answer, 99, 7);
        }
        assert_eq!(bench.take().discarded, []);
        let complete = |bench: &mut Bench, n: u32, data: &[u8]| {
            let ack = Seg {
                peer: syn_of(n).peer,
                ..Seg::new(Side::Client, ACK, 2, 10, data)
            };
            bench.put_as(&ack, 99, 7);
        };
        for n in 0..HALF_OPEN {
            complete(&mut bench, n, b"");
        }
        let out = bench.take();
        assert_eq!(out.released.len(), 10);
        assert_eq!(out.discarded, vec![Reason::InspectLimit; HALF_OPEN as usize - 10]);
        assert!(
            out.records
                .iter()
                .all(|record| record.reason == Reason::InspectLimit)
        );
        assert!(!out.records.is_empty());
        let stats = bench.table.stats();
        assert_eq!((stats.limited, stats.half_open), (190, 190));
        // Its data is not let through either, and an open connection goes on.
        complete(&mut bench, 199, b"\x01a");
        complete(&mut bench, 0, b"\x01a");
        let out = bench.take();
        assert_eq!(
            (out.discarded, out.released.len()),
            (vec![Reason::InspectLimit], 1)
        );
        // A reset of a connection that may not open ends it.
        let reset = Seg {
            peer: syn_of(198).peer,
            ..Seg::new(Side::Client, RST, 2, 0, b"")
        };
        bench.put_as(&reset, 99, 7);
        assert_eq!(bench.take().released.len(), 1);
        // Once one has ended another one may open.
        let cut = Seg {
            peer: syn_of(0).peer,
            ..Seg::new(Side::Client, ACK, 4, 10, b"\x01X")
        };
        bench.put_as(&cut, 99, 7);
        bench.tick(60_001);
        assert_eq!(bench.table.stats().connections, 9);
        bench.take();
        for (n, opens) in [(300, true), (301, false)] {
            bench.put_as(&syn_of(n), 0, 7);
            let answer = Seg {
                peer: syn_of(n).peer,
                ..Seg::new(Side::Server, SYN | ACK, 9, 2, b"")
            };
            bench.put_as(&answer, 99, 7);
            complete(&mut bench, n, b"\x01a");
            assert_eq!(bench.take().discarded.is_empty(), opens);
        }
    }
}

/// In audit mode a connection for which there is no room goes on, unread and reported.
#[test]
fn in_audit_mode_what_would_open_beyond_the_limit_goes_on_unread() {
    let mut bench = Bench::new(TcpLimits {
        connections_per_endpoint: 1,
        ..TcpLimits::default()
    });
    bench.is_audit = true;
    let segment = |n: u32, from: Side, flags: u8, seq: u32, ack: u32, data: &[u8]| Seg {
        peer: syn_of(n).peer,
        ..Seg::new(from, flags, seq, ack, data)
    };
    for n in 0..2 {
        bench.put_as(&syn_of(n), 0, 7);
        bench.put_as(&segment(n, Side::Server, SYN | ACK, 9, 2, b""), 99, 7);
    }
    for n in 0..2 {
        bench.put_as(&segment(n, Side::Client, ACK, 2, 10, b""), 99, 7);
    }
    let out = bench.take();
    assert_eq!((out.released.len(), out.discarded.len()), (6, 0));
    let audited: Vec<_> = out
        .records
        .iter()
        .map(|record| (record.verdict, record.reason))
        .collect();
    assert_eq!(audited, [(Verdict::Audit, Reason::InspectLimit)]);
    assert_eq!(
        out.commands.iter().map(|command| command.op).collect::<Vec<_>>(),
        [flow_op::OPENED, flow_op::OFFLOAD]
    );
    bench.tick(1);
    let stats = bench.table.stats();
    assert_eq!(
        (stats.connections, stats.half_open, stats.offloaded_flows),
        (1, 0, 1)
    );
}

/// A SYN that is refused leaves the SYN that waits for the server's answer in its place.
#[test]
fn a_syn_that_is_refused_leaves_the_one_that_waits() {
    let mut bench = Bench::new(TcpLimits {
        connections: 8,
        ..TcpLimits::default()
    });
    let open = |bench: &mut Bench, n: u32, endpoint: u16| {
        let segment = |from: Side, flags: u8, seq: u32, ack: u32| Seg {
            peer: syn_of(n).peer,
            ..Seg::new(from, flags, seq, ack, b"")
        };
        bench.put_as(&syn_of(n), 0, endpoint);
        bench.put_as(&segment(Side::Server, SYN | ACK, 9, 2), 99, endpoint);
        bench.put_as(&segment(Side::Client, ACK, 2, 10), 99, endpoint);
    };
    for n in 0..6 {
        open(&mut bench, n, 7);
    }
    let syn = |isn: u32, data: &[u8]| Seg {
        peer: syn_of(0).peer,
        ..Seg::new(Side::Client, SYN, isn, 0, data)
    };
    bench.put_as(&syn(5000, b""), 99, 7);
    assert_eq!(bench.take().discarded, []);
    // Refused for what it is: data in a SYN.
    bench.put_as(&syn(6000, b"x"), 99, 7);
    assert_eq!(bench.take().discarded, [Reason::TcpInvalid]);
    // Refused for want of room: others have taken what was left.
    for n in 100..102 {
        open(&mut bench, n, 8);
    }
    assert_eq!(bench.take().discarded, []);
    bench.put_as(&syn(7000, b""), 99, 7);
    assert_eq!(bench.take().discarded, [Reason::InspectLimit]);
    let answer = Seg {
        peer: syn_of(0).peer,
        ..Seg::new(Side::Server, SYN | ACK, 777, 5001, b"")
    };
    bench.put_as(&answer, 99, 7);
    let out = bench.take();
    assert_eq!((out.released.len(), out.commands.len()), (1, 1));
    assert_eq!(out.commands[0].op, flow_op::REPLACE);
}

/// What a receiver makes of the packets that reach it.
struct Receiver {
    bytes: BTreeMap<u32, u8>,
    /// What comes later counts, else what came first.
    last_wins: bool,
}

impl Receiver {
    fn take(&mut self, seg: &Seg) {
        let at = seg.seq.wrapping_sub(CLIENT_ISN.wrapping_add(1));
        let next = self.next();
        for (i, byte) in seg.data.iter().enumerate() {
            let at = at.wrapping_add(i as u32);
            // What was acknowledged is never changed.
            if at < next || at > 1 << 30 {
                continue;
            }
            if self.last_wins {
                self.bytes.insert(at, *byte);
            } else {
                self.bytes.entry(at).or_insert(*byte);
            }
        }
    }

    fn next(&self) -> u32 {
        (0..).find(|at| !self.bytes.contains_key(at)).unwrap_or_default()
    }

    fn stream(&self) -> Vec<u8> {
        (0..self.next()).map(|at| self.bytes[&at]).collect()
    }
}

/// How far a stream is let go: behind its last whole message that is not refused. And whether one is.
fn allowed(stream: &[u8]) -> (usize, bool) {
    let mut at = 0;
    while let Some(&length) = stream.get(at) {
        let Some(message) = stream.get(at + 1..at + 1 + usize::from(length)) else {
            break;
        };
        if message.first() == Some(&b'X') {
            return (at, true);
        }
        at += 1 + usize::from(length);
    }
    (at, false)
}

fn messages() -> impl Strategy<Value = Vec<u8>> {
    let message = (
        prop::collection::vec(b'a'..=b'e', 0..12),
        prop::bool::weighted(0.05),
    );
    prop::collection::vec(message, 1..20).prop_map(|messages| {
        messages
            .into_iter()
            .flat_map(|(mut message, bad)| {
                if bad {
                    message.insert(0, b'X');
                }
                message.insert(0, message.len() as u8);
                message
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// For any segmentation, order, duplication and loss the verdict is the same, and the receiver gets what was let
    /// through, byte for byte.
    #[test]
    fn the_verdict_does_not_depend_on_how_bytes_come(
        stream in messages(),
        moves in prop::collection::vec(
            (any::<prop::sample::Index>(), 1_usize..15, 0_u8..10, any::<bool>(), 0_u64..30), 0..60),
        last_wins in any::<bool>(),
    ) {
        let (fine, refused) = allowed(&stream);
        let mut bench = Bench::open();
        let mut receiver = Receiver { bytes: BTreeMap::new(), last_wins };
        let mut acknowledged = 0;
        // What the sender was told has come: it does not send that again.
        let mut proxy_acked = 0;
        let mut send = |bench: &mut Bench, receiver: &mut Receiver, from: usize, to: usize, lost: bool, acks: bool| {
            let from = from.max(proxy_acked);
            if from <= to {
                let mut seg = client(from as u32, &stream[from..to]);
                if to == stream.len() { seg.flags |= FIN; }
                bench.put(&seg);
            }
            let out = bench.take();
            for (seg, _) in &out.emitted {
                if seg.from == Side::Server && seg.flags == ACK {
                    proxy_acked = proxy_acked.max(seg.ack.wrapping_sub(CLIENT_ISN.wrapping_add(1)) as usize);
                }
            }
            let made = out.emitted.iter().map(|(seg, _)| seg).filter(|seg| seg.from == Side::Client);
            for seg in made.chain(&out.released).filter(|_| !lost) {
                receiver.take(seg);
            }
            for reason in out.discarded {
                assert!(matches!(reason, Reason::TcpHeld | Reason::AppDenied), "{reason:?}");
            }
            if acks {
                acknowledged = receiver.next();
                bench.put(&server(acknowledged));
                bench.take();
            }
        };
        for (index, length, luck, acks, pause) in moves {
            bench.tick(bench.now + pause);
            let from = index.index(stream.len());
            send(&mut bench, &mut receiver, from, (from + length).min(stream.len()), luck < 3, acks);
        }
        // The sender sends again what was not acknowledged, until it gets no further.
        for _ in 0..5 {
            // Clocks of lost packets run out.
            if let Some(due) = bench.table.deadline().filter(|due| *due < bench.now + 10_000) {
                bench.tick(due);
            }
            let mut from = receiver.next() as usize;
            while from < stream.len() {
                let to = (from + 5).min(stream.len());
                send(&mut bench, &mut receiver, from, to, false, true);
                from = to;
            }
        }
        let got = receiver.stream();
        prop_assert_eq!(&got[..], &stream[..got.len()]);
        prop_assert!(got.len() <= fine);
        prop_assert_eq!(bench.table.stats().cut > 0, refused);
        if !refused {
            prop_assert_eq!(got.len(), stream.len());
        }
        if bench.table.stats().cut > 0 {
            prop_assert_eq!(bench.table.stats().frames, 0);
        }
    }

    /// Whatever a sender says at the same place, no receiver gets what is refused.
    #[test]
    fn no_receiver_gets_what_is_refused(
        streams in prop::collection::vec(messages(), 2..4),
        moves in prop::collection::vec(
            (any::<prop::sample::Index>(), any::<prop::sample::Index>(), 1_usize..15, 0_u8..10, any::<bool>()), 0..80),
        last_wins in any::<bool>(),
    ) {
        let mut bench = Bench::open();
        let mut receiver = Receiver { bytes: BTreeMap::new(), last_wins };
        for (which, index, length, luck, acks) in moves {
            let stream = which.get(&streams);
            let from = index.index(stream.len().min(40));
            bench.put(&client(from as u32, &stream[from..(from + length).min(stream.len())]));
            bench.tick(bench.now + u64::from(luck) * 5);
            let out = bench.take();
            let made = out.emitted.iter().map(|(seg, _)| seg).filter(|seg| seg.from == Side::Client);
            for seg in made.chain(&out.released).filter(|_| luck > 2) {
                receiver.take(seg);
            }
            if acks {
                let acks = receiver.next();
                bench.put(&server(acks));
                bench.take();
            }
            let got = receiver.stream();
            let (_, refused) = allowed(&got);
            prop_assert!(!refused, "{:?}", got);
            let stats = bench.table.stats();
            prop_assert!(stats.bytes < 1000 && stats.frames < 1000);
        }
        bench.forget();
        prop_assert_eq!((bench.table.stats().bytes, bench.table.stats().frames), (0, 0));
    }
}
