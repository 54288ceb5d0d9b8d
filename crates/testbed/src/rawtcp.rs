//! A TCP client in user space that can send any segment.
//!
//! No TCP socket of the kernel has the client's port, so the kernel would answer the segments of the other end with
//! resets; an nftables rule in the namespace drops these resets ([`prepare`]). The client sends through a raw socket,
//! so that routing, tc and offloads apply as for other programs. It receives the packets that reach the network stack
//! of the namespace, that is, after the XDP and tc hooks.

use std::{
    io,
    mem::MaybeUninit,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
pub use palisade_abi::tcp_flags as flags;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    ns::{Ns, serial},
    packet::{checksum, protocol},
};

/// First of the ports that the clients use; [`LAST_PORT`] is the last one.
const FIRST_PORT: u16 = 20_000;
const LAST_PORT: u16 = 29_999;
/// Mark of the clients' packets, which distinguishes them from the kernel's resets.
const MARK: u32 = 0x7a;

/// A segment to be sent.
#[derive(Clone, Debug)]
pub struct Segment {
    at: i64,
    data: Vec<u8>,
    flags: u8,
    ack: Option<u32>,
    window: u16,
    ttl: u8,
    checksum: bool,
    urgent: u16,
    options: Vec<u8>,
    timestamp: Option<u32>,
    fragment: Option<usize>,
    backwards: bool,
}

impl Segment {
    /// Creates a segment with payload. `at`: offset of the payload in the stream; 0 is the first byte after the SYN.
    #[must_use]
    pub fn data(at: i64, data: &[u8]) -> Self {
        Self {
            at,
            data: data.into(),
            flags: flags::ACK | if data.is_empty() { 0 } else { flags::PSH },
            ack: None,
            window: 0xfaf0,
            ttl: 64,
            checksum: true,
            urgent: 0,
            options: Vec::new(),
            timestamp: None,
            fragment: None,
            backwards: false,
        }
    }

    /// Sets the flags.
    #[must_use]
    pub fn flags(mut self, flags: u8) -> Self {
        self.flags = flags;
        self
    }

    /// Sets the acknowledgement number. By default a segment with the ACK flag acknowledges all received bytes.
    #[must_use]
    pub fn ack(mut self, ack: u32) -> Self {
        self.ack = Some(ack);
        self
    }

    /// Sets the window.
    #[must_use]
    pub fn window(mut self, window: u16) -> Self {
        self.window = window;
        self
    }

    /// Sets the time to live.
    #[must_use]
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// Makes the checksum wrong.
    #[must_use]
    pub fn bad_checksum(mut self) -> Self {
        self.checksum = false;
        self
    }

    /// Sets the urgent pointer and the URG flag.
    #[must_use]
    pub fn urgent(mut self, pointer: u16) -> Self {
        self.flags |= flags::URG;
        self.urgent = pointer;
        self
    }

    /// Sets the options; their length must be a multiple of four bytes.
    #[must_use]
    pub fn options(mut self, options: &[u8]) -> Self {
        self.options = options.into();
        self
    }

    /// Sets the value of the timestamps option, on a connection with timestamps. By default the value increases by one
    /// each millisecond.
    #[must_use]
    pub fn timestamp(mut self, value: u32) -> Self {
        self.timestamp = Some(value);
        self
    }

    /// Sends the segment in IP fragments that each contain at most `size` bytes of the segment. `size`: a multiple of
    /// eight.
    #[must_use]
    pub fn fragments(mut self, size: usize) -> Self {
        self.fragment = Some(size);
        self
    }

    /// Sends the fragments in reverse order.
    #[must_use]
    pub fn backwards(mut self) -> Self {
        self.backwards = true;
        self
    }
}

/// The result of [`RawTcp::deliver`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// The other end has acknowledged all bytes.
    Whole,
    /// The connection was reset.
    Reset,
    /// The timeout has passed without a reset and without an acknowledgement of all bytes.
    Not,
}

/// One connection.
#[derive(Debug)]
pub struct RawTcp {
    out: Socket,
    inward: Socket,
    local: SocketAddr,
    remote: SocketAddr,
    isn: u32,
    their_isn: u32,
    timestamps: bool,
    /// Last timestamp received from the other end.
    recent: u32,
    began: Instant,
    id: u16,
    /// Offset of the first byte that the other end has not acknowledged; -1 if the SYN is not acknowledged.
    acked: i64,
    received: Vec<u8>,
    early: Vec<(u32, Vec<u8>)>,
    reset: bool,
    finished: bool,
    /// Whether received data is acknowledged.
    pub acknowledges: bool,
}

/// Prepares a namespace for the clients of this module: an nftables rule drops the resets that the kernel sends from
/// the clients' ports. Can be called repeatedly.
pub fn prepare(ns: &Ns) -> Result<()> {
    ns.nft(&format!(
        "table inet rawtcp {{}}\ndelete table inet rawtcp\ntable inet rawtcp {{\nchain output {{\n\
         type filter hook output priority 0;\n\
         tcp sport {FIRST_PORT}-{LAST_PORT} meta mark != {MARK:#x} drop;\n}}\n}}\n"
    ))
}

impl RawTcp {
    /// Creates a client with the local address `source` and the remote address and port `to`. Does not send a packet
    /// yet. [`prepare`] must have been called for the namespace.
    pub fn new(ns: &Ns, source: IpAddr, to: SocketAddr) -> Result<Self> {
        let port = FIRST_PORT + (serial() % u32::from(LAST_PORT - FIRST_PORT)) as u16;
        let local = SocketAddr::new(source, port);
        let (out, inward) = ns
            .enter(|| sockets(local, to))
            .with_context(|| format!("raw sockets from {source} to {to}"))?;
        Ok(Self {
            out,
            inward,
            local,
            remote: to,
            isn: (serial().wrapping_add(1)).wrapping_mul(0x9e37_79b9),
            their_isn: 0,
            timestamps: false,
            recent: 0,
            began: Instant::now(),
            id: 1,
            acked: -1,
            received: Vec::new(),
            early: Vec::new(),
            reset: false,
            finished: false,
            acknowledges: true,
        })
    }

    /// Creates a client and opens its connection.
    pub fn connect(ns: &Ns, source: IpAddr, to: SocketAddr) -> Result<Self> {
        let mut client = Self::new(ns, source, to)?;
        client.open()?;
        Ok(client)
    }

    /// Creates a client and opens its connection with timestamps (RFC 7323).
    pub fn connect_with_timestamps(ns: &Ns, source: IpAddr, to: SocketAddr) -> Result<Self> {
        let mut client = Self::new(ns, source, to)?;
        client.timestamps = true;
        client.open()?;
        Ok(client)
    }

    /// Sets the initial sequence number. Must be called before the connection is opened.
    pub fn set_isn(&mut self, isn: u32) {
        self.isn = isn;
    }

    /// Drops the state of the connection. The next connection has the same ports and the initial sequence number `isn`.
    pub fn begin_anew(&mut self, isn: u32) {
        (self.isn, self.their_isn, self.acked) = (isn, 0, -1);
        self.received.clear();
        self.early.clear();
        (self.reset, self.finished) = (false, false);
    }

    /// Sets the local port.
    pub fn set_port(&mut self, port: u16) {
        self.local.set_port(port);
    }

    /// Opens the connection with a three-way handshake.
    pub fn open(&mut self) -> Result<()> {
        let syn = self.syn();
        for _ in 0..8 {
            self.send(&syn)?;
            if self.listen(Duration::from_millis(500), |own| own.acked >= 0 || own.reset)? {
                break;
            }
        }
        if self.reset || self.acked < 0 {
            bail!("{} does not answer {}", self.remote, self.local);
        }
        self.send(&Segment::data(0, b""))
    }

    /// Returns the SYN.
    #[must_use]
    pub fn syn(&self) -> Segment {
        let mut syn = Segment::data(-1, b"").flags(flags::SYN);
        syn.options = vec![2, 4, 0x05, 0x78]; // MSS 1400
        syn
    }

    /// Returns the local address and port.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Returns the received stream.
    #[must_use]
    pub fn received(&self) -> &[u8] {
        &self.received
    }

    /// Returns the offset of the first byte that the other end has not acknowledged; -1 if the SYN is not acknowledged.
    /// A FIN counts as one byte.
    #[must_use]
    pub fn acked(&self) -> i64 {
        self.acked
    }

    /// Returns whether a valid reset has arrived: one with the next expected sequence number, or any reset before the
    /// other end has acknowledged the SYN.
    #[must_use]
    pub fn is_reset(&self) -> bool {
        self.reset
    }

    /// Returns whether the other end has sent a FIN.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Returns the sequence number of an offset in the sent stream.
    #[must_use]
    pub fn seq(&self, at: i64) -> u32 {
        self.isn.wrapping_add(1).wrapping_add(at as u32)
    }

    /// Returns the sequence number of the next byte that the client expects from the other end.
    #[must_use]
    pub fn next(&self) -> u32 {
        self.their_isn
            .wrapping_add(1 + self.received.len() as u32 + u32::from(self.finished))
    }

    /// Sends one segment.
    pub fn send(&mut self, segment: &Segment) -> Result<()> {
        let tcp = self.write(segment);
        let packets = self.packets(&tcp, segment);
        let to = SocketAddr::new(self.remote.ip(), 0).into();
        for packet in packets {
            self.out
                .send_to(&packet, &to)
                .with_context(|| format!("{} bytes to {}", packet.len(), self.remote))?;
        }
        Ok(())
    }

    /// Returns the bytes of a segment with its TCP header.
    fn write(&self, segment: &Segment) -> Vec<u8> {
        let mut options = segment.options.clone();
        if self.timestamps {
            let value = segment
                .timestamp
                .unwrap_or(0x1000_0000 + self.began.elapsed().as_millis() as u32);
            options.extend_from_slice(&[1, 1, 8, 10]);
            options.extend_from_slice(&value.to_be_bytes());
            options.extend_from_slice(&self.recent.to_be_bytes());
        }
        let ack = match segment.ack {
            Some(ack) => ack,
            None if segment.flags & flags::ACK != 0 => self.next(),
            None => 0,
        };
        let mut tcp = Vec::with_capacity(20 + options.len() + segment.data.len());
        tcp.extend_from_slice(&self.local.port().to_be_bytes());
        tcp.extend_from_slice(&self.remote.port().to_be_bytes());
        tcp.extend_from_slice(&self.seq(segment.at).to_be_bytes());
        tcp.extend_from_slice(&ack.to_be_bytes());
        tcp.extend_from_slice(&[((20 + options.len()) << 2) as u8, segment.flags]);
        tcp.extend_from_slice(&segment.window.to_be_bytes());
        tcp.extend_from_slice(&[0, 0]);
        tcp.extend_from_slice(&segment.urgent.to_be_bytes());
        tcp.extend_from_slice(&options);
        tcp.extend_from_slice(&segment.data);
        let mut pseudo = Vec::new();
        match (self.local.ip(), self.remote.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                pseudo.extend_from_slice(&from.octets());
                pseudo.extend_from_slice(&to.octets());
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                pseudo.extend_from_slice(&from.octets());
                pseudo.extend_from_slice(&to.octets());
            }
            _ => {}
        }
        pseudo.extend_from_slice(&tcp);
        let mut sum = checksum(tcp.len() as u32 + u32::from(protocol::TCP), &pseudo);
        if !segment.checksum {
            sum = sum.wrapping_add(0x1111);
        }
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        tcp
    }

    /// Returns the packets of a segment: one, or its fragments.
    fn packets(&mut self, tcp: &[u8], segment: &Segment) -> Vec<Vec<u8>> {
        let Some(size) = segment.fragment.filter(|size| *size < tcp.len()) else {
            return vec![self.packet(tcp, segment.ttl, None)];
        };
        self.id = self.id.wrapping_add(1).max(1);
        let mut packets = Vec::new();
        let mut at = 0;
        for part in tcp.chunks(size & !7) {
            let more = at + part.len() < tcp.len();
            packets.push(self.packet(part, segment.ttl, Some((at as u16, more))));
            at += part.len();
        }
        if segment.backwards {
            packets.reverse();
        }
        packets
    }

    /// Returns an IP packet. `fragment`: offset of the fragment in bytes, and whether more fragments follow; `None` for
    /// a whole packet.
    fn packet(&self, contents: &[u8], ttl: u8, fragment: Option<(u16, bool)>) -> Vec<u8> {
        let mut packet = Vec::new();
        let id = if fragment.is_some() { self.id } else { 0 };
        let (offset, more) = fragment.unwrap_or_default();
        match (self.local.ip(), self.remote.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                packet.extend_from_slice(&[0x45, 0]);
                packet.extend_from_slice(&(20 + contents.len() as u16).to_be_bytes());
                packet.extend_from_slice(&id.to_be_bytes());
                let flags = if more { 0x2000 } else { 0 };
                packet.extend_from_slice(&(flags | (offset / 8)).to_be_bytes());
                // The kernel sets the header checksum.
                packet.extend_from_slice(&[ttl, protocol::TCP, 0, 0]);
                packet.extend_from_slice(&from.octets());
                packet.extend_from_slice(&to.octets());
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let header = if fragment.is_some() { 8 } else { 0 };
                packet.extend_from_slice(&[0x60, 0, 0, 0]);
                packet.extend_from_slice(&(header + contents.len() as u16).to_be_bytes());
                let next = if fragment.is_some() { 44 } else { protocol::TCP };
                packet.extend_from_slice(&[next, ttl]);
                packet.extend_from_slice(&from.octets());
                packet.extend_from_slice(&to.octets());
                if fragment.is_some() {
                    packet.extend_from_slice(&[protocol::TCP, 0]);
                    packet.extend_from_slice(&(offset | u16::from(more)).to_be_bytes());
                    packet.extend_from_slice(&u32::from(id).to_be_bytes());
                }
            }
            _ => {}
        }
        packet.extend_from_slice(contents);
        packet
    }

    /// Sends segments, and retransmits those that are not acknowledged, until all bytes before offset `end` are
    /// acknowledged, the connection is reset, or `timeout` has passed.
    pub fn deliver(&mut self, segments: &[Segment], end: i64, timeout: Duration) -> Result<Delivered> {
        let deadline = Instant::now() + timeout;
        loop {
            for segment in segments {
                if segment.at + segment.data.len() as i64 > self.acked || segment.flags & flags::FIN != 0 {
                    self.send(segment)?;
                }
                self.drain()?;
                if self.reset {
                    return Ok(Delivered::Reset);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            self.listen(left.min(Duration::from_millis(200)), |own| {
                own.acked >= end || own.reset
            })?;
            if self.reset {
                return Ok(Delivered::Reset);
            }
            if self.acked >= end {
                return Ok(Delivered::Whole);
            }
            if left.is_zero() {
                return Ok(Delivered::Not);
            }
        }
    }

    /// Delivers bytes from offset `at` in segments of at most `size` bytes.
    pub fn deliver_pieces(
        &mut self,
        at: i64,
        bytes: &[u8],
        size: usize,
        timeout: Duration,
    ) -> Result<Delivered> {
        self.deliver(&pieces(at, bytes, size), at + bytes.len() as i64, timeout)
    }

    /// Receives packets until `done` returns true, at most for `timeout`. Returns whether `done` returned true.
    pub fn listen(&mut self, timeout: Duration, done: impl Fn(&Self) -> bool) -> Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            if done(self) {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.inward
                .set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            self.process_packet(false)?;
        }
    }

    /// Processes the packets that have arrived, without waiting.
    fn drain(&mut self) -> Result<()> {
        while self.process_packet(true)? {}
        Ok(())
    }

    /// Processes one packet. Returns whether there was a packet.
    fn process_packet(&mut self, at_once: bool) -> Result<bool> {
        let mut buffer = [MaybeUninit::uninit(); 1 << 16];
        let flags = if at_once { libc::MSG_DONTWAIT } else { 0 };
        let n = match self.inward.recv_with_flags(&mut buffer, flags) {
            Ok(n) => n,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
                ) =>
            {
                return Ok(false);
            }
            Err(error) => return Err(error).context("raw socket"),
        };
        // SAFETY: the kernel has initialised the first `n` bytes.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), n) };
        // A raw socket returns IPv4 packets with their header and IPv6 packets without it (raw(7), ipv6(7)).
        let tcp = match self.remote {
            SocketAddr::V4(_) => usize::from(bytes.first().copied().unwrap_or(0) & 15) * 4,
            SocketAddr::V6(_) => 0,
        };
        if let Some(tcp) = bytes.get(tcp..).filter(|tcp| tcp.len() >= 20) {
            self.take(tcp)?;
        }
        Ok(true)
    }

    fn take(&mut self, tcp: &[u8]) -> Result<()> {
        let half = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
        let word = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
        if (half(0), half(2)) != (self.remote.port(), self.local.port()) {
            return Ok(());
        }
        let (seq, ack, set) = (word(4), word(8), tcp[13]);
        let header = usize::from(tcp[12] >> 4) * 4;
        let Some(data) = tcp.get(header..) else {
            return Ok(());
        };
        if let Some(at) = find_timestamp(&tcp[20..header.max(20)]) {
            self.recent = word(20 + at);
        }
        if set & flags::RST != 0 {
            self.reset |= self.acked < 0 || seq == self.next();
            return Ok(());
        }
        if set & flags::ACK != 0 {
            let at = i64::from(ack.wrapping_sub(self.isn.wrapping_add(1)) as i32);
            if self.acked < 0 && set & flags::SYN != 0 && at == 0 {
                self.their_isn = seq;
            }
            self.acked = self.acked.max(at);
        }
        if set & flags::SYN != 0 {
            return Ok(());
        }
        if !data.is_empty() {
            self.early.push((seq, data.into()));
        }
        let mut again = true;
        while std::mem::take(&mut again) {
            let next = self.next();
            self.early.retain(|(seq, data)| {
                let before = next.wrapping_sub(*seq) as i32;
                if before < 0 {
                    return true;
                }
                if let Some(new) = data.get(before as usize..)
                    && !new.is_empty()
                    && !again
                {
                    self.received.extend_from_slice(new);
                    again = true;
                }
                false
            });
        }
        let end = seq.wrapping_add(data.len() as u32);
        if set & flags::FIN != 0 && !self.finished && end == self.next() {
            self.finished = true;
        }
        // A zero-window probe requires an acknowledgement (RFC 9293, section 3.8.6.1). Linux sends probes without data
        // that have an acknowledged sequence number (`tcp_xmit_probe_skb`).
        let is_probe = seq.wrapping_add(1) == self.next();
        if self.acknowledges && (!data.is_empty() || set & flags::FIN != 0 || is_probe) {
            let at = self.acked.max(0);
            self.send(&Segment::data(at, b""))?;
        }
        Ok(())
    }
}

/// Splits bytes at offset `at` into segments of at most `size` bytes.
#[must_use]
pub fn pieces(at: i64, bytes: &[u8], size: usize) -> Vec<Segment> {
    bytes
        .chunks(size.max(1))
        .enumerate()
        .map(|(n, part)| Segment::data(at + (n * size.max(1)) as i64, part))
        .collect()
}

/// Returns the offset of the value of the timestamp option.
fn find_timestamp(options: &[u8]) -> Option<usize> {
    let mut at = 0;
    while let Some(&kind) = options.get(at) {
        match kind {
            0 => return None,
            1 => at += 1,
            8 if options.len() >= at + 10 => return Some(at + 2),
            _ => at += usize::from(*options.get(at + 1)?).max(2),
        }
    }
    None
}

fn sockets(local: SocketAddr, remote: SocketAddr) -> io::Result<(Socket, Socket)> {
    let domain = Domain::for_address(remote);
    let out = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    if remote.is_ipv6() {
        out.set_header_included_v6(true)?;
    }
    out.set_mark(MARK)?;
    let inward = Socket::new(domain, Type::RAW, Some(Protocol::TCP))?;
    // Receive only TCP packets from the remote to the local address. The raw socket of each client gets a copy of each
    // of these packets; `take` checks the ports.
    inward.bind(&SocketAddr::new(local.ip(), 0).into())?;
    inward.connect(&SocketAddr::new(remote.ip(), 0).into())?;
    // The socket receives the packets of all clients at this address. If the buffer cannot be enlarged, some packets
    // can be lost; the other end retransmits them.
    let _ = inward.set_recv_buffer_size(4 << 20);
    Ok((out, inward))
}
