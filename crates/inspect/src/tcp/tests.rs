//! Tests of TCP inspection with an inspector of simple length-prefixed messages.

mod errors;
mod put_off;
mod send_limit;
mod suspend;

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

/// A segment that a test sends, or one that the table has forwarded or built.
#[derive(Clone, Debug)]
pub(crate) struct Seg {
    pub(crate) from: Side,
    pub(crate) flags: u8,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    window: u16,
    options: Vec<u8>,
    pub(crate) data: Vec<u8>,
    /// First three bytes of the client's address. The last byte is 1.
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

    /// Returns the frame between PEER.1:1000 and 10.0.0.2:80. Its checksums are not checked.
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

    /// Calls `f` with the segment as a punted packet. The client's packets go to the endpoint, unless INGRESS is set in
    /// the slot's flags: then the server's packets go to the endpoint.
    pub(crate) fn view(&self, slot: PuntRequest, f: impl FnOnce(&PacketView<'_>, Vec<u8>)) {
        let frame = self.frame();
        let mut packet = Packet::default();
        decode(&frame[..], Start::Ethernet { tags_removed: 0 }, &mut packet).unwrap();
        let answers = self.from == Side::Server;
        // The BPF programs make a conntrack entry for a SYN, unless the test gives the serial of an existing one.
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
    /// Number of forwarded ICMP errors.
    errors: usize,
    pub(crate) discarded: Vec<Reason>,
    pub(crate) emitted: Vec<(Seg, Route)>,
    pub(crate) commands: Vec<FlowCommand>,
    /// Flow commands without a packet.
    bare_commands: Vec<FlowCommand>,
    /// Window field to which the next released segment was lowered.
    lowered: Option<u16>,
    pub(crate) records: Vec<Record>,
}

impl Sink<Vec<u8>> for Out {
    fn release(&mut self, frame: Vec<u8>) {
        if frame[23] == 1 {
            self.errors += 1;
            return;
        }
        let mut seg = Seg::read(&frame);
        if let Some(window) = self.lowered.take() {
            seg.window = seg.window.min(window);
        }
        self.released.push(seg);
    }
    fn limit_window(&mut self, _: &Vec<u8>, window: u16) {
        self.lowered = Some(window);
    }
    fn release_with(&mut self, frame: Vec<u8>, command: &FlowCommand) {
        self.commands.push(*command);
        self.release(frame);
    }
    fn command(&mut self, command: &FlowCommand) {
        self.bare_commands.push(*command);
    }
    fn discard(&mut self, _: Vec<u8>, reason: Reason) {
        self.discarded.push(reason);
    }
    fn emit(&mut self, frame: &[u8], route: Route) {
        // Generated packets must have valid checksums.
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

/// Inspector of messages that begin with their length. A message that begins with `X` is denied, `A` gets a response,
/// `O` offloads the connection, `S` bypasses the following bytes (a number of 16 bits), `B` too (a number of 24
/// bits), `L` makes them part of the message.
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
            [b'B', a, b, c, ..] => {
                let n = u64::from(u32::from_be_bytes([0, *a, *b, *c]));
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

    /// Returns a table with one connection after its handshake.
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

    /// Handles a segment of this endpoint. A serial other than 0 belongs to a conntrack entry that an earlier segment
    /// has made.
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

    /// Checks that the gauges are plausible.
    fn check(&self) {
        let stats = self.table.stats();
        assert!(stats.frames < 10_000 && stats.bytes < 1 << 30);
    }

    fn tick(&mut self, now: Millis) {
        self.now = now;
        with_context(now, &mut self.out, |cx| self.table.tick(cx));
    }

    /// Lets the connections know that no packet is left to inspect.
    fn settle(&mut self) {
        with_context(self.now, &mut self.out, |cx| self.table.settle(cx));
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

/// Returns a SYN of the client with this number.
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
fn a_packet_waits_until_all_its_bytes_are_evaluated() {
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
fn a_denied_message_resets_both_ends() {
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
    // Later segments are refused too.
    bench.put(&client(7, b"\x01a"));
    let out = bench.take();
    assert_eq!((out.released.len(), out.emitted.len()), (0, 1));
    assert_eq!(out.emitted[0].0.seq, SERVER_ISN.wrapping_add(1));
}

#[test]
fn a_retransmission_with_other_bytes_is_dropped() {
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x03ab"));
    bench.put(&client(0, b"\x03ab"));
    assert_eq!(bench.take().discarded, [Reason::TcpHeld]);
    bench.put(&client(1, b"X"));
    assert_eq!(bench.take().discarded, [Reason::TcpOverlap]);
    bench.put(&client(3, b"c"));
    assert_eq!(bench.take().released.len(), 2);
    // Forwarded bytes are compared until they are acknowledged.
    bench.put(&client(1, b"abc"));
    bench.put(&client(0, b"\x03Xbc"));
    bench.put(&client(2, b"bX\x01d"));
    let out = bench.take();
    assert_eq!(
        (out.released.len(), &out.discarded[..]),
        (1, &[Reason::TcpOverlap; 2][..])
    );
    // Acknowledged bytes are no longer compared and not forwarded. The sender gets an acknowledgement, also for the new
    // bytes after them.
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
    // A keepalive probe is forwarded, because only the receiver can answer it.
    bench.put(&client(5, b"?"));
    assert_eq!(bench.take().released.len(), 1);
}

#[test]
fn out_of_window_and_ambiguous_segments_are_dropped() {
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
    // A selective acknowledgement of bytes that were never sent is dropped.
    let mut sack = client(0, b"");
    sack.options = [
        &[1, 1, 5, 10][..],
        &SERVER_ISN.to_be_bytes(),
        &SERVER_ISN.wrapping_add(9).to_be_bytes(),
    ]
    .concat();
    bench.put(&sack);
    assert_eq!(bench.take().discarded, [Reason::TcpInvalid; 4]);
    // Bytes after the FIN are dropped.
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
fn a_reset_is_forwarded_only_with_the_expected_sequence_number() {
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x01a"));
    bench.put(&client(2, b"\x01"));
    bench.take();
    let rst = |at: u32| Seg::new(Side::Client, RST, CLIENT_ISN.wrapping_add(1 + at), 0, b"");
    bench.put(&rst(100));
    assert_eq!(bench.take().discarded, [Reason::TcpOutOfWindow]);
    bench.put(&rst(2));
    assert_eq!(bench.take().released.len(), 1);
    // A reset after held bytes: the receiver gets a reset with a sequence number that it accepts.
    bench.put(&rst(3));
    let out = bench.take();
    assert_eq!(out.discarded, [Reason::TcpHeld; 2]);
    assert_eq!(out.emitted.len(), 1);
    assert_eq!(out.emitted[0].0.seq, CLIENT_ISN.wrapping_add(3));
    assert_eq!(bench.table.stats().frames, 0);
}

#[test]
fn a_connection_without_a_seen_handshake_is_reset() {
    let mut bench = Bench::new(TcpLimits::default());
    bench.put(&client(0, b"\x01a"));
    // The server gets a probe in the client's place.
    let out = bench.take();
    assert_eq!(out.discarded, [Reason::TcpMidstream]);
    let [(ask, on)] = &out.emitted[..] else {
        panic!("{:?}", out.emitted)
    };
    assert_eq!((ask.from, ask.flags, ask.data.len()), (Side::Client, ACK, 0));
    assert_eq!(ask.seq, CLIENT_ISN);
    assert!(!on.back && out.commands.is_empty());
    // The server has received more than the client retransmits.
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
    // An end without the connection answers with a reset, which the other end accepts.
    bench.put(&client(0, b"\x01a"));
    bench.put(&Seg::new(Side::Server, RST, SERVER_ISN.wrapping_add(1), 0, b""));
    let out = bench.take();
    assert_eq!((out.released.len(), out.emitted.len()), (1, 1));
    assert_eq!(out.released[0].seq, SERVER_ISN.wrapping_add(1));
    // But a reset with a payload is dropped.
    bench.put(&Seg::new(
        Side::Server,
        RST,
        SERVER_ISN.wrapping_add(1),
        0,
        b"secret",
    ));
    assert_eq!(bench.take().released.len(), 0);
    // The server refuses the connection.
    bench.put(&Seg::new(Side::Client, SYN, 7, 0, b""));
    bench.put(&Seg::new(Side::Server, RST | ACK, 0, 8, b""));
    assert_eq!(bench.take().released.len(), 2);
    // The client connects again with the same ports.
    bench.put(&Seg::new(Side::Client, SYN, 900, 0, b""));
    bench.put(&Seg::new(Side::Server, SYN | ACK, 5, 8, b""));
    bench.put(&Seg::new(Side::Server, SYN | ACK, 5, 901, b""));
    let out = bench.take();
    assert_eq!(
        (out.released.len(), &out.discarded[..]),
        (2, &[Reason::TcpInvalid][..])
    );
    // Data in a SYN is dropped.
    bench.put(&Seg::new(Side::Client, SYN, 900, 0, b"\x01a"));
    assert_eq!(bench.take().discarded, [Reason::TcpInvalid]);
}

/// For two ends with any sequence numbers and lost packets: both get a reset with the number that they expect,
/// whichever end sends first.
#[test]
fn both_ends_of_an_unknown_connection_get_an_acceptable_reset() {
    for first in [Side::Client, Side::Server] {
        // Number of bytes that each end has sent, and number of them that the other has received.
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
            // Returns a segment with all bytes that `side` has sent: the end does not know that the other one has them.
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
                        // The segment is not acceptable, or a reset that causes a challenge ACK.
                        sent_packets.push(Seg::new(side, ACK, seq(side, sent[side as usize]), next, b""));
                    }
                }
            }
            assert_eq!(alive, [false, false], "{first:?} {sent:?}");
        }
    }
}

/// A path with a small MTU and no ICMP errors.
#[test]
fn lost_packets_on_behalf_are_sent_again_in_smaller_packets() {
    for limit in [1_440, 1_300, 1_232, 1_220, 900, 536] {
        let mut bench = Bench::open();
        let message = vec![b'm'; 250];
        let stream: Vec<u8> = std::iter::repeat_n([&[250], &message[..]].concat(), 40)
            .flatten()
            .collect();
        // All but the end of the last message is held and acknowledged on behalf of the server.
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
fn bytes_that_never_arrive_end_the_connection_with_a_record() {
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
            "Bytes acknowledged on behalf of the receiver cannot be delivered"
        )
    );
}

#[test]
fn records_of_dropped_packets_are_rate_limited() {
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
    // A drop for another reason is recorded at once, a drop for the same reason after a second.
    bench.put(&client(90_000, b"zz"));
    bench.now += 1_000;
    bench.put(&client(90_000, b"zz"));
    let reasons: Vec<_> = bench.take().records.iter().map(|record| record.reason).collect();
    assert_eq!(reasons, [Reason::TcpOutOfWindow; 2]);
    // A SYN+ACK that answers no SYN, while the connection is open.
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
    // Packets of unknown connections.
    let mut bench = Bench::new(TcpLimits::default());
    for n in 0..1_000 {
        bench.put(&client(n, b"x"));
    }
    let out = bench.take();
    assert_eq!((out.discarded.len(), out.records.len()), (1_000, 200));
}

#[test]
fn simultaneous_open_is_allowed() {
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
fn a_response_follows_the_servers_bytes_and_is_retransmitted_until_acknowledged() {
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
    // Half of the response is lost.
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
    // The server closes too.
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
fn an_offloaded_connection_stays_in_the_programs() {
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
fn bypassed_bytes_are_forwarded_and_later_ones_are_inspected() {
    let mut bench = Bench::new(TcpLimits {
        window: 10_000,
        ..TcpLimits::default()
    });
    bench.handshake();
    // 20,000 bytes after the message
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
        "the bypassed bytes are not evaluated, the later ones are"
    );
    bench.put(&client(1, b"Z\x4e\x20"));
    assert_eq!(bench.take().released.len(), 1, "skipped with the rest");
    bench.put(&client(20_006, b"y"));
    assert_eq!(bench.take().discarded, [Reason::AppDenied; 2]);
}

#[test]
fn held_packets_have_a_deadline_and_a_limit() {
    let limits = TcpLimits {
        frames_per_direction: 3,
        bytes_per_direction: 100,
        deadline: 1000,
        ..TcpLimits::default()
    };
    let mut bench = Bench::new(limits);
    bench.handshake();
    for at in 0..4 {
        // The segments have gaps between them, so that no byte can be acknowledged.
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

/// A sender that waits for an acknowledgement gets one, and the acknowledged bytes are delivered.
#[test]
fn held_bytes_are_acknowledged_on_behalf_and_then_delivered() {
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
    // The sender retransmits if the acknowledgement is lost.
    bench.put(&client(0, b"\x04ab"));
    let out = bench.take();
    assert_eq!(out.emitted[0].0.ack, CLIENT_ISN.wrapping_add(4));
    assert!(out.released.is_empty());
    // The rest arrives: both messages are forwarded.
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
    // The first packet is lost: the worker retransmits it until it is acknowledged.
    bench.tick(bench.table.deadline().unwrap());
    assert_eq!(bench.take().emitted[0].0.data, b"\x04ab");
    bench.put(&server(5));
    assert_eq!(bench.table.stats().bytes, 0);
    bench.tick(5_000);
    assert!(bench.take().emitted.is_empty());
    // The worker forwards no byte of a denied message.
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
fn built_packets_carry_the_latest_timestamp() {
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
    // Two messages are forwarded. The server has possibly accepted both, with their timestamps, although it has not
    // acknowledged them.
    bench.put(&stamped(client(0, b"\x02ab"), 100, 5000));
    bench.put(&stamped(client(3, b"\x02cd"), 110, 5000));
    assert_eq!(bench.take().released.len(), 2);
    // A part of a message is acknowledged on behalf of the server, and delivered once the rest has arrived.
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
fn a_receiver_that_acknowledges_nothing_ends_the_connection() {
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

/// Many small packets do not exceed the limit of held frames: they are acknowledged, and only their bytes are kept.
#[test]
fn many_small_held_packets_are_acknowledged_before_the_timer() {
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

/// A sender that has lost acknowledgements retransmits acknowledged bytes together with new ones.
#[test]
fn new_bytes_behind_acknowledged_ones_are_delivered() {
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
    // A retransmission with other bytes at an unacknowledged position is dropped.
    bench.put(&client(0, b"\x02ab\x02cX\x03efg"));
    assert_eq!(bench.take().discarded, [Reason::TcpOverlap]);
}

/// An offloaded connection is remembered until a new connection with the same ports replaces it.
#[test]
fn offloaded_connections_are_remembered_within_a_limit() {
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
    // A new connection with the same ports replaces the offloaded one.
    bench.handshake();
    assert_eq!(bench.table.stats().offloaded_flows, 0);
}

/// The client uses the same ports again before the end of the old connection was seen: the server decides whether the
/// SYN opens a new connection. With the SYN+ACK the BPF programs get the command that no offload of the old connection
/// applies to the new one.
#[test]
fn a_connection_that_replaces_another_is_inspected_from_its_start() {
    // The old connection is offloaded, is offloaded with undelivered bytes, has an offload window, or has an incomplete
    // message.
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
            // A SYN with data or urgent data opens no connection.
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
            // Until the server answers, the old connection continues.
            bench.put_as(&client(first.len() as u32, b"x"), 99, 0);
            let out = bench.take();
            assert!(
                out.commands.iter().all(|command| command.serial == 99),
                "{:?}",
                out.commands
            );
            // The repeated byte can repeat the notification of the handshake.
            let decisions = out
                .commands
                .iter()
                .filter(|command| command.op != flow_op::OPENED);
            assert_eq!(decisions.count(), usize::from(offloaded));
            // SYN+ACKs that do not acknowledge the new SYN.
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
            // The SYN+ACK is retransmitted.
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
        // Segments of the old connection are out of the window of the new one.
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
        assert_eq!(
            (out.bare_commands[0].op, out.bare_commands[0].serial),
            (flow_op::CLOSE, serial)
        );
    }
}

/// Without the notification, the conntrack entry ends as that of a half-open connection.
#[test]
fn a_lost_notification_of_the_handshake_is_repeated() {
    let ops = |out: &Out| out.commands.iter().map(|command| command.op).collect::<Vec<_>>();
    for first in Side::BOTH {
        let mut bench = Bench::open();
        let data = |at: u32, data: &[u8]| match first {
            Side::Client => client(at, data),
            Side::Server => Seg {
                seq: SERVER_ISN.wrapping_add(1 + at),
                data: data.to_vec(),
                ..server(0)
            },
        };
        // The acknowledgement of the SYN+ACK was lost behind the worker, so the server repeats the SYN+ACK.
        let answer = Seg::new(
            Side::Server,
            SYN | ACK,
            SERVER_ISN,
            CLIENT_ISN.wrapping_add(1),
            b"",
        );
        bench.put(&answer);
        assert_eq!(ops(&bench.take()), [flow_op::OPENED]);
        bench.put(&data(0, b"\x01a"));
        assert_eq!(ops(&bench.take()), []);
        // These bytes are repeated, so packets are lost.
        for _ in 0..2 {
            bench.put(&data(0, b"\x01a"));
            assert_eq!(ops(&bench.take()), [flow_op::OPENED], "{first:?}");
        }
        bench.put(&data(2, b"\x01b"));
        assert_eq!(ops(&bench.take()), []);
    }
}

/// The conntrack entry is older than the state of the worker, which has restarted or has evicted the connection.
#[test]
fn a_decision_of_an_earlier_worker_does_not_hold_for_a_new_connection() {
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
    // A SYN+ACK to an unknown SYN causes no reset, so that the client retransmits its SYN.
    bench.forget();
    bench.put_as(&Seg::new(Side::Server, SYN | ACK, SERVER_ISN, isn, b""), 41, 0);
    let out = bench.take();
    assert_eq!(
        (out.discarded.len(), out.emitted.len(), out.commands.len()),
        (1, 0, 0)
    );
}

/// A client that has lost its connection connects again with the same ports (RFC 5961, 4; RFC 9293, 3.10.7.4).
#[test]
fn a_challenge_ack_of_the_server_lets_the_client_reset_the_old_connection() {
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x01a"));
    bench.put(&server(2));
    bench.take();
    let syn = Seg::new(Side::Client, SYN, 900_000, 0, b"");
    bench.put_as(&syn, 99, 0);
    // The challenge ACK.
    bench.put(&server(2));
    let reset = |at: u32| Seg::new(Side::Client, RST, CLIENT_ISN.wrapping_add(1 + at), 0, b"");
    bench.put(&reset(70_000));
    assert_eq!(bench.out.discarded, [Reason::TcpOutOfWindow]);
    bench.put(&reset(2));
    let out = bench.take();
    assert_eq!((out.released.len(), out.commands.len()), (3, 1));
    assert_eq!((out.commands[0].op, out.commands[0].serial), (flow_op::CLOSE, 99));
    // The BPF programs make a new conntrack entry for the retransmitted SYN.
    bench.put(&syn);
    let answer = Seg::new(Side::Server, SYN | ACK, 77, 900_001, b"");
    bench.put(&answer);
    bench.put(&Seg::new(Side::Client, ACK, 900_001, 78, b"\x02Xa"));
    let out = bench.take();
    assert_eq!((out.released.len(), out.discarded), (2, vec![Reason::AppDenied]));
    // A server without the old connection refuses the new one, or accepts it at once.
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
fn the_end_of_a_connection_is_reported_once_it_is_certain() {
    // Both ends have closed, and have acknowledged the FIN of the other.
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
    // With bytes in flight, the receiver can answer a reset with a challenge ACK.
    let mut bench = Bench::open();
    bench.put(&client(0, b"\x01a"));
    bench.put(&Seg::new(Side::Client, RST, CLIENT_ISN.wrapping_add(1), 0, b""));
    let out = bench.take();
    assert_eq!((out.released.len(), out.commands.len()), (2, 0));
    // The connection continues. Without a further segment its idle timeout is short.
    bench.put(&server(2));
    bench.tick(61_000);
    assert_eq!(bench.table.stats().connections, 1);
    bench.put(&Seg::new(Side::Client, RST, CLIENT_ISN.wrapping_add(3), 0, b""));
    bench.take();
    bench.tick(200_000);
    assert_eq!(bench.table.stats().connections, 0);
}

#[test]
fn a_syn_flood_takes_no_room_from_other_endpoints() {
    let mut bench = Bench::new(TcpLimits::default());
    let before = resident();
    let mut served = 0;
    for n in 0..200_000 {
        bench.put_as(&syn_of(n), 0, 7);
        if n % 1000 == 999 {
            // The handshake of another endpoint is slow.
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
    // The half-open connections are removed after their idle timeout.
    bench.tick(10_001);
    assert_eq!(bench.table.stats().half_open, 0);
    assert_eq!(bench.table.stats().connections, 200);
}

#[test]
fn answered_syns_are_half_open_until_the_clients_ack() {
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
    // The server does not answer for a minute: each retransmitted SYN belongs to the connection.
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
fn one_endpoint_cannot_use_all_connections() {
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

/// More handshakes can begin than connections may be open, so the limit is checked again when a handshake completes.
#[test]
fn half_open_connections_that_complete_stay_within_the_limit() {
    const HALF_OPEN: u32 = 200;
    for limits in [
        TcpLimits {
            connections_per_endpoint: 10,
            ..TcpLimits::default()
        },
        // An endpoint may have at most three times as many open connections as the table has free places.
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
        // The data of the refused connection is dropped too, and an open connection continues.
        complete(&mut bench, 199, b"\x01a");
        complete(&mut bench, 0, b"\x01a");
        let out = bench.take();
        assert_eq!(
            (out.discarded, out.released.len()),
            (vec![Reason::InspectLimit], 1)
        );
        // A reset of a connection beyond the limit removes it.
        let reset = Seg {
            peer: syn_of(198).peer,
            ..Seg::new(Side::Client, RST, 2, 0, b"")
        };
        bench.put_as(&reset, 99, 7);
        assert_eq!(bench.take().released.len(), 1);
        // Once one connection has ended, another one may open.
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

/// In audit mode a connection beyond the limit is offloaded and recorded.
#[test]
fn audit_mode_offloads_connections_beyond_the_limit() {
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

/// A refused SYN does not replace a candidate that waits for the server.
#[test]
fn a_refused_syn_does_not_affect_a_waiting_candidate() {
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
    // A SYN with data is refused.
    bench.put_as(&syn(6000, b"x"), 99, 7);
    assert_eq!(bench.take().discarded, [Reason::TcpInvalid]);
    // A SYN is refused because other connections have used the rest of the limit.
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

/// A receiver that reassembles the packets which reach it.
struct Receiver {
    bytes: BTreeMap<u32, u8>,
    /// Whether later bytes overwrite earlier ones; if not, the first ones are kept.
    last_wins: bool,
}

impl Receiver {
    fn take(&mut self, seg: &Seg) {
        let at = seg.seq.wrapping_sub(CLIENT_ISN.wrapping_add(1));
        let next = self.next();
        for (i, byte) in seg.data.iter().enumerate() {
            let at = at.wrapping_add(i as u32);
            // Acknowledged bytes never change.
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

/// Returns the end of the last whole message before a denied one, and whether there is a denied one.
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

    /// For any segmentation, order, duplication and loss the verdict is the same, and the receiver gets exactly the
    /// forwarded bytes.
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
        // Position up to which the sender has an acknowledgement: it does not retransmit these bytes.
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
        // The sender retransmits unacknowledged bytes until nothing more is acknowledged.
        for _ in 0..5 {
            // Retransmission timers of lost packets expire.
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

    /// Whatever bytes a sender puts at the same position, no receiver gets a denied message.
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
