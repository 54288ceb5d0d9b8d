//! A sender whose segments contradict each other, against two models of receivers: in one the first copy of a byte wins, in
//! the other the last. Whatever is sent, reordered or lost, neither may read a denied request or server name.
//!
//! The input: the contents (one byte), which of them are denied in each of two streams (one byte), then events of four
//! bytes each.

use palisade_abi::{
    PuntRequest, punt_flags,
    tcp_flags::{ACK, FIN, RST, SYN, URG},
};
use palisade_inspect::{Engine, Limits, normalise_options};

#[path = "packets.rs"]
mod packets;

use packets::{Done, HTTP, Passed, TLS, give, inspector, prepare};

const CLIENT: ([u8; 4], u16) = ([10, 0, 0, 1], 40_000);
const SERVER: ([u8; 4], u16) = ([10, 0, 0, 2], 443);
const ISN: [u32; 2] = [0xffff_ff80, 0x1000];
const ETHERNET: usize = 14;
const IP: usize = 20;
const TCP: usize = 20;

/// A segment of either side; `at` counts from the byte after the SYN.
struct Segment<'a> {
    client: bool,
    flags: u8,
    at: i64,
    ack: u32,
    /// TCP options; the length is a multiple of four bytes.
    options: &'a [u8],
    data: &'a [u8],
}

impl Segment<'_> {
    fn frame(&self) -> Vec<u8> {
        let (from, to) = if self.client {
            (CLIENT, SERVER)
        } else {
            (SERVER, CLIENT)
        };
        let isn = ISN[usize::from(!self.client)];
        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0];
        frame.extend_from_slice(&((IP + TCP + self.options.len() + self.data.len()) as u16).to_be_bytes());
        frame.extend_from_slice(&[0, 0, 0x40, 0, 64, 6, 0, 0]);
        frame.extend_from_slice(&from.0);
        frame.extend_from_slice(&to.0);
        frame.extend_from_slice(&from.1.to_be_bytes());
        frame.extend_from_slice(&to.1.to_be_bytes());
        frame.extend_from_slice(&isn.wrapping_add(1).wrapping_add(self.at as u32).to_be_bytes());
        frame.extend_from_slice(&self.ack.to_be_bytes());
        let header = ((TCP + self.options.len()) << 2) as u8;
        frame.extend_from_slice(&[header, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        frame.extend_from_slice(self.options);
        frame.extend_from_slice(self.data);
        frame
    }
}

/// A receiver's part of the client's stream.
struct Receiver {
    /// Whether a repeated byte replaces one that has not been read.
    last_wins: bool,
    bytes: Vec<Option<u8>>,
    /// Bytes that have been read.
    read: usize,
    closed: bool,
}

impl Receiver {
    fn take(&mut self, frame: &[u8]) {
        let tcp = &frame[ETHERNET + IP..];
        let seq = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        let (flags, header) = (tcp[13], usize::from(tcp[12] >> 4) * 4);
        let at = i64::from(seq.wrapping_sub(ISN[0].wrapping_add(1)) as i32);
        // A receiver with MPTCP places payload by the mapping, not by the sequence number.
        let at = mapped(&tcp[TCP..header]).unwrap_or(at);
        // A reset or FIN ends the connection if its sequence number is valid.
        if flags & RST != 0 {
            self.closed |= at == self.read as i64;
            return;
        }
        if flags & SYN != 0 || self.closed {
            return;
        }
        let total = usize::from(u16::from_be_bytes([frame[ETHERNET + 2], frame[ETHERNET + 3]])) - IP;
        for (n, byte) in tcp[header..total].iter().enumerate() {
            let Ok(place) = usize::try_from(at + n as i64) else {
                continue;
            };
            if place >= 4_096 || place < self.read {
                continue;
            }
            if self.bytes.len() <= place {
                self.bytes.resize(place + 1, None);
            }
            if self.bytes[place].is_none() || self.last_wins {
                self.bytes[place] = Some(*byte);
            }
        }
        while self.bytes.get(self.read).is_some_and(Option::is_some) {
            self.read += 1;
        }
    }

    fn stream(&self) -> Vec<u8> {
        self.bytes[..self.read].iter().flatten().copied().collect()
    }
}

/// Returns where an option of kind 30 places the payload. Continues after the end of the option list, as a careless
/// receiver may.
fn mapped(options: &[u8]) -> Option<i64> {
    let mut at = 0;
    while let Some(&[kind, length]) = options.get(at..at + 2) {
        match kind {
            0 | 1 => at += 1,
            30 => return options.get(at + 2).map(|place| i64::from(*place)),
            _ => at += usize::from(length).max(2),
        }
    }
    None
}

/// Returns the end of a frame's payload in the client's stream; 0 without payload.
fn end_of(frame: &[u8]) -> usize {
    let tcp = &frame[ETHERNET + IP..];
    let seq = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
    let at = i64::from(seq.wrapping_sub(ISN[0].wrapping_add(1)) as i32);
    let total = usize::from(u16::from_be_bytes([frame[ETHERNET + 2], frame[ETHERNET + 3]])) - IP;
    let length = total - usize::from(tcp[12] >> 4) * 4;
    if length == 0 || at < 0 {
        return 0;
    }
    at as usize + length
}

/// A place in a stream that must hold an allowed value.
struct Slot {
    at: usize,
    allowed: &'static [u8],
}

/// Returns both streams, which differ only in denied values, and the places of these values.
fn streams(said: u8, denied: u8) -> (Vec<u8>, Vec<u8>, Vec<Slot>) {
    let (mut one, mut two, mut slots) = (Vec::new(), Vec::new(), Vec::new());
    let tls = said & 0x80 != 0;
    for n in 0..4 {
        let (before, allowed, refused, behind): (Vec<u8>, &'static [u8], &[u8], Vec<u8>) = if tls {
            if n > 1 {
                break;
            }
            (hello(0), b"good.test", b"evil.test", hello(1))
        } else {
            // The highest bit has another use.
            let kind = (said & 0x7f) >> (n * 2) & 3;
            // The body of a request may look like a denied request.
            let body = "GET /evil HTTP/1.1\r\nHost: x\r\n\r\n";
            let (method, behind) = match kind {
                0 | 1 => ("GET ", " HTTP/1.1\r\nHost: x\r\n\r\n".to_owned()),
                2 => (
                    "POST ",
                    format!(
                        " HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
                        body.len()
                    ),
                ),
                _ => (
                    "POST ",
                    format!(
                        " HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\nA: b\r\n\r\n",
                        body.len()
                    ),
                ),
            };
            (method.into(), b"/good", b"/evil", behind.into_bytes())
        };
        slots.push(Slot {
            at: one.len() + before.len(),
            allowed,
        });
        for (stream, bit) in [(&mut one, n), (&mut two, n + 4)] {
            let path = if denied >> bit & 1 == 0 { allowed } else { refused };
            stream.extend_from_slice(&before);
            stream.extend_from_slice(path);
            stream.extend_from_slice(&behind);
        }
    }
    (one, two, slots)
}

/// Returns a ClientHello up to its name, and the rest of it.
fn hello(part: usize) -> Vec<u8> {
    const NAME: usize = 9;
    let mut body = vec![3, 3];
    body.extend_from_slice(&[7; 32]);
    body.extend_from_slice(&[0, 0, 2, 0x13, 1, 1, 0]);
    // Server name, then supported versions.
    let extensions = 9 + NAME + 7;
    body.extend_from_slice(&(extensions as u16).to_be_bytes());
    body.extend_from_slice(&[0, 0, 0, NAME as u8 + 5, 0, NAME as u8 + 3, 0, 0, NAME as u8]);
    let behind = vec![0, 43, 0, 3, 2, 3, 4];
    let length = (body.len() + NAME + behind.len()) as u8;
    let head = [&[22, 3, 1, 0, length + 4, 1, 0, 0, length][..], &body].concat();
    [head, behind][part].clone()
}

/// Returns a HelloRetryRequest.
fn retry() -> Vec<u8> {
    let mut hello = vec![22, 3, 3, 0, 50, 2, 0, 0, 46, 3, 3];
    hello.extend_from_slice(&[
        0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91, 0xc2,
        0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
    ]);
    hello.extend_from_slice(&[0, 0x13, 1, 0, 0, 6, 0, 43, 0, 2, 3, 4]);
    hello
}

/// A connection through the engine.
struct Session {
    engine: Engine<usize>,
    done: Done,
    now: u64,
    frames: Vec<Vec<u8>>,
    given: usize,
    ruleset: u32,
    receivers: [Receiver; 2],
    slots: Vec<Slot>,
    /// Bytes that the server has sent.
    said: usize,
    /// Number of the next packets to the server that are lost.
    lost: u8,
    /// End of the bytes that were forwarded to the server, lost or not.
    forwarded: usize,
}

impl Session {
    fn send(&mut self, segment: &Segment<'_>) {
        let mut frame = segment.frame();
        // The worker normalises options before inspection.
        let is_understood = normalise_options(&mut frame[ETHERNET + IP..], None).is_ok();
        let slot = PuntRequest {
            rule: 9,
            ruleset: self.ruleset,
            endpoint: 1,
            inspector: inspector(self.ruleset),
            // The first packet makes the conntrack entry.
            flags: match (segment.client, self.frames.is_empty()) {
                (true, true) => punt_flags::NEW,
                (true, false) => 0,
                (false, _) => punt_flags::REPLY | punt_flags::INGRESS,
            },
            ..PuntRequest::default()
        };
        let handle = self.frames.len();
        // The programs do not punt what no receiver accepts.
        if is_understood && give(&mut self.engine, self.now, &slot, &frame, handle, &mut self.done) {
            self.given += 1;
        }
        self.frames.push(frame);
        self.deliver();
    }

    /// Passes an ICMP error of a router about a segment of one end.
    fn error(&mut self, about_client: bool, seq: u32, kind: [u8; 2], mtu: u16) {
        let segment = Segment {
            client: about_client,
            flags: ACK,
            at: i64::from(seq.wrapping_sub(ISN[usize::from(!about_client)].wrapping_add(1)) as i32),
            ack: 0,
            options: b"",
            data: b"",
        };
        let quoted = segment.frame();
        let mut frame = quoted[..ETHERNET].to_vec();
        frame.extend_from_slice(&[0x45, 0, 0, 56, 0, 0, 0, 0, 60, 1, 0, 0, 203, 0, 113, 9]);
        // To the source of the quoted packet.
        frame.extend_from_slice(&quoted[ETHERNET + 12..ETHERNET + 16]);
        frame.extend_from_slice(&[kind[0], kind[1], 0, 0, 0, 0]);
        frame.extend_from_slice(&mtu.to_be_bytes());
        frame.extend_from_slice(&quoted[ETHERNET..ETHERNET + IP + 8]);
        let slot = PuntRequest {
            rule: 9,
            ruleset: self.ruleset,
            endpoint: 1,
            inspector: inspector(self.ruleset),
            // The endpoint is the client.
            flags: if about_client {
                punt_flags::REPLY | punt_flags::INGRESS
            } else {
                0
            },
            ..PuntRequest::default()
        };
        let handle = self.frames.len();
        if give(&mut self.engine, self.now, &slot, &frame, handle, &mut self.done) {
            self.given += 1;
        }
        self.frames.push(frame);
        self.deliver();
    }

    fn tick(&mut self, ms: u64) {
        self.now += ms;
        self.engine.tick(self.now, &mut self.done);
        self.deliver();
    }

    /// Restarts the daemon: another engine takes the connection over, if it can be handed over.
    fn hand_over(&mut self) {
        let handed_over = self.engine.hand_over(&mut self.done);
        self.engine = Engine::new(&Limits::default());
        prepare(&mut self.engine);
        let taken = self.engine.take_over(self.now, &handed_over.state);
        assert_eq!(taken.connections, handed_over.account.connections);
        assert_eq!(taken.cut, 0);
        self.deliver();
    }

    /// Delivers forwarded packets to the receivers.
    fn deliver(&mut self) {
        for passed in std::mem::take(&mut self.done.passed) {
            let frame = match passed {
                Passed::Packet(handle) => std::mem::take(&mut self.frames[handle]),
                Passed::Made(frame) => frame,
            };
            if frame[ETHERNET + 12..ETHERNET + 16] != CLIENT.0 {
                continue;
            }
            self.forwarded = self.forwarded.max(end_of(&frame));
            if self.lost > 0 {
                self.lost -= 1;
                continue;
            }
            for receiver in &mut self.receivers {
                receiver.take(&frame);
            }
        }
        for receiver in &self.receivers {
            let stream = receiver.stream();
            for slot in &self.slots {
                let there = stream.get(slot.at..).unwrap_or_default();
                let there = &there[..there.len().min(slot.allowed.len())];
                assert!(
                    slot.allowed.starts_with(there),
                    "last wins: {}, at {}: {:?}",
                    receiver.last_wins,
                    slot.at,
                    String::from_utf8_lossy(&stream)
                );
            }
        }
    }

    /// Returns the end of what both receivers have read.
    fn acknowledged(&self) -> u32 {
        let read = self.receivers.iter().map(|r| r.read).min().unwrap_or(0);
        ISN[0].wrapping_add(1 + read as u32)
    }

    fn server(&mut self, data: &[u8], lies: bool) {
        let ack = if lies {
            ISN[0].wrapping_add(1 + self.forwarded as u32)
        } else {
            self.acknowledged()
        };
        let segment = Segment {
            client: false,
            flags: ACK,
            at: self.said as i64,
            ack,
            options: b"",
            data,
        };
        self.said += data.len();
        self.send(&segment);
    }
}

/// Runs one connection.
pub fn run(input: &[u8]) {
    let Some((&[said, denied], mut rest)) = input.split_first_chunk() else {
        return;
    };
    let (one, two, slots) = streams(said, denied);
    let mut session = Session {
        engine: Engine::new(&Limits::default()),
        done: Done::default(),
        now: 0,
        frames: Vec::new(),
        given: 0,
        ruleset: if said & 0x80 == 0 { HTTP } else { TLS },
        receivers: [false, true].map(|last_wins| Receiver {
            last_wins,
            bytes: Vec::new(),
            read: 0,
            closed: false,
        }),
        slots,
        said: 0,
        lost: 0,
        forwarded: 0,
    };
    prepare(&mut session.engine);
    for (client, flags) in [(true, SYN), (false, SYN | ACK), (true, ACK)] {
        session.send(&Segment {
            client,
            flags,
            at: if flags & SYN == 0 { 0 } else { -1 },
            ack: if flags & ACK == 0 {
                0
            } else {
                ISN[usize::from(client)].wrapping_add(1)
            },
            options: if flags & SYN == 0 { b"" } else { &[30, 4, 1, 1] },
            data: b"",
        });
    }
    while let Some((&[what, at, length, more], after)) = rest.split_first_chunk() {
        rest = after;
        if session.done.offloaded {
            break;
        }
        let ack = ISN[1].wrapping_add(1 + session.said as u32);
        let stream = if what & 1 == 0 { &one } else { &two };
        let from = usize::from(at) * stream.len() / 256;
        let to = (from + 1 + usize::from(length)).min(stream.len());
        let data = &stream[from..to];
        let (mapped, behind, hidden) = ([30, 4, more, 0], [0, 30, 4, more], [253, 4, 30, 4, more, 0, 0, 0]);
        let twice = [1, 1, 8, 10, 30, 4, more, 0, 0, 0, 0, 0, 30, 4, more, 0];
        let options = match what >> 5 {
            1 => &mapped[..],
            2 => &behind,
            3 => &hidden,
            4 => &twice,
            _ => b"",
        };
        let mut segment = Segment {
            client: true,
            flags: ACK,
            at: from as i64,
            ack,
            options,
            data,
        };
        match what >> 1 & 15 {
            // An error about a segment in flight, or close to one, or about any number.
            6 => {
                let (client, wild) = (what & 1 == 0, what >> 5 == 7);
                let near = if client { session.forwarded } else { session.said };
                let seq =
                    ISN[usize::from(!client)].wrapping_add((near as u32).wrapping_sub(u32::from(at) % 64));
                let kind = [[3, 4], [3, 4], [3, 3], [11, 0], [12, 0]][usize::from(more % 5)];
                let seq = if wild { seq.wrapping_mul(0x0101_0101) } else { seq };
                session.error(client, seq, kind, u16::from(length) * 8);
            }
            // A part of either stream.
            0..=5 => {
                if more & 1 != 0 && to == stream.len() {
                    segment.flags |= FIN;
                }
                session.send(&segment);
            }
            // The same, lost after the engine.
            7 => {
                session.lost = 1 + more % 3;
                session.send(&segment);
            }
            // A segment that receivers discard.
            8 => {
                segment.flags = [0, ACK | URG, ACK | SYN, ACK | SYN | FIN, FIN, SYN][usize::from(more % 6)];
                session.send(&segment);
            }
            9 => {
                segment.ack = ack.wrapping_add(u32::from(more) << 16 | 1);
                session.send(&segment);
            }
            10 => {
                segment.flags = if more & 1 == 0 { RST } else { RST | ACK };
                segment.data = b"";
                session.send(&segment);
            }
            // The receiver may acknowledge bytes that were lost.
            11 => session.server(b"", more & 1 != 0),
            12 => session.server(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", false),
            13 => session.server(&retry(), false),
            14 => {
                // The client acknowledges the server's bytes.
                segment.data = b"";
                session.send(&segment);
            }
            _ if what >> 5 == 7 => session.hand_over(),
            _ => session.tick(if more & 1 == 0 { 15 } else { u64::from(more) * 100 }),
        }
    }
    session.engine.drain(&mut session.done);
    assert_eq!(session.done.returned.len(), session.given);
}
