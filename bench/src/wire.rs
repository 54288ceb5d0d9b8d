//! Packets and messages for measures that need no network.

use std::net::Ipv4Addr;

use palisade_abi::{FlowCommand, PuntRequest, Reason, punt_hook};
use palisade_inspect::{CommitRequest, Engine, Millis, PacketView, Route, Sink, record::Record};
use palisade_packet::{Packet, Start, decode};
use palisade_testbed::packet;

/// Address and port of one end.
pub type End = (Ipv4Addr, u16);

/// TCP flags.
pub mod flags {
    pub use palisade_abi::tcp_flags::{ACK, SYN};
    use palisade_abi::tcp_flags::{FIN, PSH};

    /// The last segment of its sender.
    pub const END: u8 = FIN | ACK;
    /// A segment whose data goes to the application at once.
    pub const PUSH: u8 = PSH | ACK;
}

/// Returns an Ethernet frame around a segment whose checksum is at `sum_at`.
fn frame(protocol: u8, from: End, to: End, mut segment: Vec<u8>, sum_at: usize) -> Vec<u8> {
    let mut pseudo = [from.0.octets(), to.0.octets()].concat();
    pseudo.extend([0, protocol]);
    pseudo.extend((segment.len() as u16).to_be_bytes());
    pseudo.extend(&segment);
    let sum = packet::checksum(0, &pseudo);
    segment[sum_at..sum_at + 2].copy_from_slice(&sum.to_be_bytes());
    let mut ip = vec![0x45, 0];
    ip.extend((segment.len() as u16 + 20).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    ip.extend(from.0.octets());
    ip.extend(to.0.octets());
    let sum = packet::checksum(0, &ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    // Addressed to another host: the receiver counts the frame and drops it at once.
    let mut frame = vec![2, 0, 0x5e, 0, 0x53, 1, 2, 0, 0x5e, 0, 0x53, 2, 8, 0];
    frame.extend(ip);
    frame.extend(segment);
    frame
}

/// Returns a UDP datagram.
#[must_use]
pub fn udp(from: End, to: End, payload: &[u8]) -> Vec<u8> {
    let mut segment = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    segment.extend((payload.len() as u16 + 8).to_be_bytes());
    segment.extend([0, 0]);
    segment.extend(payload);
    frame(17, from, to, segment, 6)
}

/// Returns a TCP segment.
#[must_use]
pub fn tcp(from: End, to: End, sequence: u32, acknowledged: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut segment = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    segment.extend(sequence.to_be_bytes());
    segment.extend(acknowledged.to_be_bytes());
    segment.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(payload);
    frame(6, from, to, segment, 16)
}

fn vector(data: &[u8]) -> Vec<u8> {
    [&(data.len() as u16).to_be_bytes()[..], data].concat()
}

fn record(message: &[u8]) -> Vec<u8> {
    [&[22, 3, 1][..], &vector(message)].concat()
}

/// Returns a ClientHello of a browser's size, with a post-quantum key share (X25519MLKEM768, 1,216 bytes).
#[must_use]
pub fn client_hello(name: &str) -> Vec<u8> {
    let mut extensions = vec![0, 43, 0, 3, 2, 3, 4];
    let mut extension = |kind: u16, data: &[u8]| {
        extensions.extend(kind.to_be_bytes());
        extensions.extend(vector(data));
    };
    let entry = [&[0][..], &vector(name.as_bytes())].concat();
    extension(0, &vector(&entry));
    extension(10, &vector(&[0x11, 0xec, 0, 0x1d, 0, 0x17]));
    extension(13, &vector(&[4, 3, 8, 4, 4, 1, 5, 3, 8, 5, 5, 1]));
    extension(16, &vector(b"\x02h2\x08http/1.1"));
    let hybrid = [&[0x11, 0xec][..], &vector(&[7; 1_216])].concat();
    let classic = [&[0, 0x1d][..], &vector(&[9; 32])].concat();
    extension(51, &vector(&[hybrid, classic].concat()));
    extension(45, &[1, 1]);
    // Instead of a browser's tickets, GREASE ECH and experiments.
    extension(21, &[0; 320]);
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.push(32);
    body.extend([8; 32]);
    body.extend(vector(&[0x13, 1, 0x13, 2, 0x13, 3]));
    body.extend([1, 0]);
    body.extend(vector(&extensions));
    record(&[&[1, 0][..], &vector(&body)].concat())
}

/// Returns a ServerHello of TLS 1.3.
#[must_use]
pub fn server_hello() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([9; 32]);
    body.extend([0, 0x13, 1, 0]);
    body.extend(vector(&[0, 43, 0, 2, 3, 4]));
    record(&[&[2, 0][..], &vector(&body)].concat())
}

/// Returns the head of a browser's request.
#[must_use]
pub fn request(path: &str) -> Vec<u8> {
    format!(
        "GET {path} HTTP/1.1\r\n\
         Host: www.bench.example\r\n\
         User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\r\n\
         Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n\
         Accept-Language: en-GB,en;q=0.5\r\n\
         Accept-Encoding: gzip, deflate, br, zstd\r\n\
         Connection: keep-alive\r\n\
         Cookie: session=0123456789abcdef0123456789abcdef; theme=dark\r\n\
         Upgrade-Insecure-Requests: 1\r\n\
         Sec-Fetch-Dest: document\r\n\
         Sec-Fetch-Mode: navigate\r\n\
         Priority: u=0, i\r\n\r\n"
    )
    .into_bytes()
}

/// Returns a response of 1,000 bytes on a persistent connection.
#[must_use]
pub fn response() -> Vec<u8> {
    let head = "HTTP/1.1 200 OK\r\n\
                Server: nginx\r\n\
                Date: Fri, 27 Nov 2026 08:49:37 GMT\r\n\
                Content-Type: application/json\r\n\
                Content-Length: 1000\r\n\
                Cache-Control: private, max-age=0\r\n\
                Vary: Accept-Encoding\r\n\
                Connection: keep-alive\r\n\r\n";
    [head.as_bytes(), &[b'x'; 1_000]].concat()
}

/// Counts the effects of an engine. Commits learned addresses at once.
#[derive(Default)]
pub struct Outcome {
    learn: Option<CommitRequest>,
    /// Packets that were forwarded.
    pub released: u64,
    /// Packets that were dropped.
    pub discarded: u64,
}

impl Sink<()> for Outcome {
    fn release(&mut self, (): ()) {
        self.released += 1;
    }

    fn release_with(&mut self, (): (), _: &FlowCommand) {
        self.released += 1;
    }

    fn discard(&mut self, (): (), _: Reason) {
        self.discarded += 1;
    }

    fn emit(&mut self, _: &[u8], _: Route) {}

    fn commit(&mut self, learn: CommitRequest) -> Result<(), CommitRequest> {
        self.learn = Some(learn);
        Ok(())
    }

    fn record(&mut self, _: &Record) {}
}

/// Passes a frame with a punt request to an engine.
pub fn read(engine: &mut Engine<()>, outcome: &mut Outcome, now: Millis, slot: &PuntRequest, frame: &[u8]) {
    let mut packet = Packet::default();
    if decode(frame, Start::Ethernet { tags_removed: 0 }, &mut packet).is_err() {
        outcome.discarded += 1;
        return;
    }
    let (network, transport) = (
        usize::from(packet.network_offset),
        usize::from(packet.transport_offset),
    );
    let header = match packet.protocol {
        6 => usize::from(frame[transport + 12] >> 4) * 4,
        _ => 8,
    };
    let view = PacketView {
        slot,
        ifindex: 1,
        hook: punt_hook::TC_INGRESS,
        packet: &packet,
        frame,
        network,
        transport,
        payload: (transport + header, network + packet.length as usize),
    };
    engine.packet(now, &view, (), outcome);
    if let Some(learn) = outcome.learn.take() {
        let learned = learn.done(true, None);
        engine.committed(now, learned, outcome);
    }
}
