//! Forged packets: TCP segments, UDP datagrams and ICMP messages with any field, on the link of a namespace.
//!
//! A [`Wire`] is a packet socket on one interface. Its frames bypass the routing, the neighbour lookup and the IP
//! netfilter hooks of its namespace, so they can have any IP and MAC addresses. tc and the other end of the link treat
//! them as ordinary frames. [`Wire::wait`] returns the packets that arrive on the link.
//!
//! The network stack of the namespace also receives the packets that arrive. The stack answers a TCP segment to an
//! address of the namespace with a reset if no socket has the connection. To prevent that, use a local port of
//! [`PORTS`] after [`prepare`](crate::rawtcp::prepare), or an address that the namespace does not have.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    ops::Range,
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use socket2::Socket;

use crate::{
    capture,
    ns::{Ns, wait_until},
    packet::{Packet, checksum, parse, protocol},
    rawtcp::flags,
};

/// Local ports for which [`prepare`](crate::rawtcp::prepare) drops the kernel's resets.
pub const PORTS: Range<u16> = 20_000..30_000;

/// The MAC address of one end.
pub type Mac = [u8; 6];

/// The value of a checksum field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// The correct checksum.
    #[default]
    Right,
    /// A wrong checksum.
    Wrong,
    /// This value.
    Is(u16),
}

impl Checksum {
    fn of(self, right: u16) -> u16 {
        match self {
            Self::Right => right,
            Self::Wrong => right ^ 0x1111,
            Self::Is(value) => value,
        }
    }
}

/// A TCP segment with any field.
#[derive(Clone, Debug)]
pub struct Tcp {
    /// Source port.
    pub source: u16,
    /// Destination port.
    pub destination: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number, written also without the ACK flag.
    pub ack: u32,
    /// See [`flags`].
    pub flags: u8,
    /// Window, not scaled.
    pub window: u16,
    /// Urgent pointer.
    pub urgent: u16,
    /// Options, see [`option`]. They are written unchanged and padded with zeros to a multiple of four bytes.
    pub options: Vec<u8>,
    /// Payload.
    pub payload: Vec<u8>,
    /// Checksum of the segment.
    pub checksum: Checksum,
}

impl Tcp {
    /// Creates a segment without payload and without flags.
    #[must_use]
    pub fn new(source: u16, destination: u16) -> Self {
        Self {
            source,
            destination,
            seq: 0,
            ack: 0,
            flags: 0,
            window: 0xfaf0,
            urgent: 0,
            options: Vec::new(),
            payload: Vec::new(),
            checksum: Checksum::Right,
        }
    }

    /// Sets the flags.
    #[must_use]
    pub fn flags(mut self, flags: u8) -> Self {
        self.flags = flags;
        self
    }

    /// Sets the sequence number.
    #[must_use]
    pub fn seq(mut self, seq: u32) -> Self {
        self.seq = seq;
        self
    }

    /// Sets the acknowledgement number and the ACK flag.
    #[must_use]
    pub fn ack(mut self, ack: u32) -> Self {
        self.ack = ack;
        self.flags |= flags::ACK;
        self
    }

    /// Appends options.
    #[must_use]
    pub fn option(mut self, option: &[u8]) -> Self {
        self.options.extend_from_slice(option);
        self
    }

    /// Sets the payload and the PSH flag.
    #[must_use]
    pub fn payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.into();
        self.flags |= flags::PSH;
        self
    }

    /// Sets the checksum.
    #[must_use]
    pub fn checksum(mut self, checksum: Checksum) -> Self {
        self.checksum = checksum;
        self
    }

    /// Returns the bytes of the segment. The addresses are part of the checksum's pseudo header.
    #[must_use]
    pub fn bytes(&self, from: IpAddr, to: IpAddr) -> Vec<u8> {
        let options = self.options.len().next_multiple_of(4);
        let mut tcp = Vec::with_capacity(20 + options + self.payload.len());
        tcp.extend_from_slice(&self.source.to_be_bytes());
        tcp.extend_from_slice(&self.destination.to_be_bytes());
        tcp.extend_from_slice(&self.seq.to_be_bytes());
        tcp.extend_from_slice(&self.ack.to_be_bytes());
        tcp.extend_from_slice(&[((20 + options) << 2) as u8, self.flags]);
        tcp.extend_from_slice(&self.window.to_be_bytes());
        tcp.extend_from_slice(&[0, 0]);
        tcp.extend_from_slice(&self.urgent.to_be_bytes());
        tcp.extend_from_slice(&self.options);
        tcp.resize(20 + options, 0);
        tcp.extend_from_slice(&self.payload);
        let sum = self
            .checksum
            .of(transport_checksum(from, to, protocol::TCP, &tcp));
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        tcp
    }
}

/// TCP options, as bytes of the header.
pub mod option {
    /// No operation.
    pub const NOP: [u8; 1] = [1];
    /// End of the list.
    pub const END: [u8; 1] = [0];
    /// Selective acknowledgements are permitted (RFC 2018).
    pub const SACK_PERMITTED: [u8; 2] = [4, 2];

    /// Returns an option of any kind with its length.
    #[must_use]
    pub fn any(kind: u8, data: &[u8]) -> Vec<u8> {
        [&[kind, 2 + data.len() as u8], data].concat()
    }

    /// Returns a maximum segment size option (RFC 9293, section 3.7.1).
    #[must_use]
    pub fn mss(size: u16) -> Vec<u8> {
        any(2, &size.to_be_bytes())
    }

    /// Returns a window scale option (RFC 7323, section 2).
    #[must_use]
    pub fn scale(shift: u8) -> Vec<u8> {
        any(3, &[shift])
    }

    /// Returns a timestamps option (RFC 7323, section 3).
    #[must_use]
    pub fn timestamp(value: u32, echo: u32) -> Vec<u8> {
        any(8, &[value.to_be_bytes(), echo.to_be_bytes()].concat())
    }

    /// Returns a selective acknowledgement option (RFC 2018).
    #[must_use]
    pub fn sack(blocks: &[(u32, u32)]) -> Vec<u8> {
        let data: Vec<u8> = blocks
            .iter()
            .flat_map(|(from, to)| [from.to_be_bytes(), to.to_be_bytes()].concat())
            .collect();
        any(5, &data)
    }

    /// Returns a TCP fast open option (RFC 7413); an empty cookie requests a cookie.
    #[must_use]
    pub fn fast_open(cookie: &[u8]) -> Vec<u8> {
        any(34, cookie)
    }

    /// Returns an MD5 signature option (RFC 2385).
    #[must_use]
    pub fn md5(digest: [u8; 16]) -> Vec<u8> {
        any(19, &digest)
    }

    /// Returns an MP_CAPABLE option of version 1 without checksums, with HMAC-SHA256 (RFC 8684, section 3.1). For a
    /// SYN, `keys` is empty. For the third packet of the handshake, `keys` has the keys of both ends, and `length` is
    /// the length of the packet's payload; `None` without payload.
    #[must_use]
    pub fn mp_capable(keys: &[[u8; 8]], length: Option<u16>) -> Vec<u8> {
        let mut data = vec![0x01, 0x01];
        data.extend(keys.iter().flatten());
        data.extend(length.iter().flat_map(|length| length.to_be_bytes()));
        any(30, &data)
    }

    /// Returns a DSS option without checksum (RFC 8684, section 3.3). It maps `length` bytes from byte `subflow` of the
    /// subflow (1 is the first byte after the SYN) to `data_seq` of the connection, and acknowledges `data_ack`.
    /// `data_seq` and `data_ack` have eight bytes if `wide` is set, otherwise four.
    #[must_use]
    pub fn dss(data_ack: Option<u64>, data_seq: u64, subflow: u32, length: u16, wide: bool) -> Vec<u8> {
        let number = |number: u64| {
            let bytes = number.to_be_bytes();
            if wide { bytes.to_vec() } else { bytes[4..].to_vec() }
        };
        let mut flags = 0x04 | if wide { 0x08 } else { 0 };
        let mut data = vec![0x20, 0];
        if let Some(ack) = data_ack {
            flags |= 0x01 | if wide { 0x02 } else { 0 };
            data.extend(number(ack));
        }
        data[1] = flags;
        data.extend(number(data_seq));
        data.extend_from_slice(&subflow.to_be_bytes());
        data.extend_from_slice(&length.to_be_bytes());
        any(30, &data)
    }
}

/// Returns a UDP datagram.
#[must_use]
pub fn udp(from: SocketAddr, to: SocketAddr, payload: &[u8], sum: Checksum) -> Vec<u8> {
    let mut udp = Vec::with_capacity(8 + payload.len());
    for field in [from.port(), to.port(), 8 + payload.len() as u16, 0] {
        udp.extend_from_slice(&field.to_be_bytes());
    }
    udp.extend_from_slice(payload);
    let right = match transport_checksum(from.ip(), to.ip(), protocol::UDP, &udp) {
        0 => 0xffff,
        right => right,
    };
    udp[6..8].copy_from_slice(&sum.of(right).to_be_bytes());
    udp
}

/// Returns an ICMP message, or an ICMPv6 message if the addresses are IPv6. `body`: the bytes that follow the checksum.
#[must_use]
pub fn icmp(from: IpAddr, to: IpAddr, kind: u8, code: u8, body: &[u8], sum: Checksum) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0];
    message.extend_from_slice(body);
    let right = if from.is_ipv6() {
        transport_checksum(from, to, protocol::ICMPV6, &message)
    } else {
        checksum(0, &message)
    };
    message[2..4].copy_from_slice(&sum.of(right).to_be_bytes());
    message
}

/// Returns a message that the IP packet `quoted` is too long: ICMP "fragmentation needed" (RFC 1191), or ICMPv6 "packet
/// too big" (RFC 8201) if the addresses are IPv6.
#[must_use]
pub fn too_big(from: IpAddr, to: IpAddr, mtu: u16, quoted: &[u8]) -> Vec<u8> {
    let quoted = &quoted[..quoted.len().min(1_200)];
    let head = [[0, 0], mtu.to_be_bytes()].concat();
    let body = [&head, quoted].concat();
    let kind = if from.is_ipv6() { (2, 0) } else { (3, 4) };
    icmp(from, to, kind.0, kind.1, &body, Checksum::Right)
}

/// Returns the checksum of a segment, datagram or ICMPv6 message with its pseudo header. The checksum field in `bytes`
/// must be zero.
#[must_use]
pub fn transport_checksum(from: IpAddr, to: IpAddr, protocol: u8, bytes: &[u8]) -> u16 {
    let mut all = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
        (IpAddr::V6(from), IpAddr::V6(to)) => [from.octets(), to.octets()].concat(),
        _ => Vec::new(),
    };
    all.extend_from_slice(bytes);
    checksum(bytes.len() as u32 + u32::from(protocol), &all)
}

/// Returns an IP packet with a correct header checksum. An IPv4 packet has the DF flag.
///
/// # Panics
/// Panics if the addresses have different families.
#[must_use]
pub fn ip(from: IpAddr, to: IpAddr, protocol: u8, hop_limit: u8, contents: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(40 + contents.len());
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet.extend_from_slice(&[0x45, 0]);
            packet.extend_from_slice(&(20 + contents.len() as u16).to_be_bytes());
            packet.extend_from_slice(&[0, 0, 0x40, 0, hop_limit, protocol, 0, 0]);
            packet.extend_from_slice(&from.octets());
            packet.extend_from_slice(&to.octets());
            let sum = checksum(0, &packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet.extend_from_slice(&[0x60, 0, 0, 0]);
            packet.extend_from_slice(&(contents.len() as u16).to_be_bytes());
            packet.extend_from_slice(&[protocol, hop_limit]);
            packet.extend_from_slice(&from.octets());
            packet.extend_from_slice(&to.octets());
        }
        _ => panic!("from {from} to {to}"),
    }
    packet.extend_from_slice(contents);
    packet
}

/// Returns an Ethernet frame with an IP packet.
#[must_use]
pub fn frame(from: Mac, to: Mac, packet: &[u8]) -> Vec<u8> {
    let ether_type: [u8; 2] = match packet.first().map(|first| first >> 4) {
        Some(6) => [0x86, 0xdd],
        _ => [0x08, 0x00],
    };
    [&to[..], &from, &ether_type, packet].concat()
}

/// A received TCP segment.
#[derive(Clone, Debug)]
pub struct ReceivedSegment {
    /// The sender.
    pub from: SocketAddr,
    /// The receiver.
    pub to: SocketAddr,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// See [`flags`].
    pub flags: u8,
    /// Window, not scaled.
    pub window: u16,
    /// Options with padding.
    pub options: Vec<u8>,
    /// Payload.
    pub payload: Vec<u8>,
}

impl ReceivedSegment {
    /// Parses the segment in a packet; `None` if the packet is a fragment or has no valid TCP header.
    #[must_use]
    pub fn read(packet: &Packet) -> Option<Self> {
        if packet.protocol != protocol::TCP || packet.fragment {
            return None;
        }
        let (source, destination) = packet.ports?;
        let tcp = &packet.payload;
        let word = |at: usize| Some(u32::from_be_bytes(tcp.get(at..at + 4)?.try_into().ok()?));
        let header = usize::from(tcp.get(12)? >> 4) * 4;
        Some(Self {
            from: SocketAddr::new(packet.source, source),
            to: SocketAddr::new(packet.destination, destination),
            seq: word(4)?,
            ack: word(8)?,
            flags: packet.tcp_flags,
            window: (word(12)? & 0xffff) as u16,
            options: tcp.get(20..header)?.into(),
            payload: tcp.get(header..)?.into(),
        })
    }

    /// Returns the data of the first option of a kind.
    #[must_use]
    pub fn option(&self, wanted: u8) -> Option<&[u8]> {
        let mut rest = &self.options[..];
        loop {
            match rest {
                [] | [0, ..] => return None,
                [1, more @ ..] => rest = more,
                [kind, length, ..] => {
                    let (option, more) = rest.split_at_checked(usize::from(*length).max(2))?;
                    if *kind == wanted {
                        return Some(&option[2..]);
                    }
                    rest = more;
                }
                [_] => return None,
            }
        }
    }
}

/// A packet socket on one interface of a namespace.
#[derive(Debug)]
pub struct Wire {
    socket: Socket,
    /// The MAC address of the interface.
    pub own: Mac,
    /// The MAC address at the other end of the link.
    pub gateway: Mac,
}

impl Wire {
    /// Opens a packet socket on `interface` of `ns`. [`Wire::send`] sends to the MAC address of `gateway`, which is an
    /// IP address on the link.
    ///
    /// # Errors
    /// Returns an error if the socket cannot be opened, or if the MAC address of `gateway` cannot be resolved.
    pub fn open(ns: &Ns, interface: &str, gateway: IpAddr) -> Result<Self> {
        let index = ns.ifindex(interface)?;
        let socket = ns.enter(|| capture::open(index)).context("packet socket")?;
        let own = ns.run("ip", &["-o", "link", "show", "dev", interface])?;
        let own = mac_behind(&own, "link/ether").with_context(|| format!("no MAC in {own}"))?;
        let gateway_text = gateway.to_string();
        let mut found = None;
        // Send a datagram to make the kernel resolve the neighbour.
        wait_until("the gateway's MAC", Duration::from_secs(60), || {
            let _ = ns.enter(|| -> io::Result<usize> {
                let any: IpAddr = match gateway {
                    IpAddr::V4(_) => [0, 0, 0, 0].into(),
                    IpAddr::V6(_) => [0u16; 8].into(),
                };
                std::net::UdpSocket::bind((any, 0))?.send_to(b"", (gateway, 9))
            });
            let args = ["neigh", "get", &gateway_text, "dev", interface];
            found = ns
                .run("ip", &args)
                .ok()
                .and_then(|text| mac_behind(&text, "lladdr"));
            found.is_some()
        })?;
        let gateway = found.context("the gateway's MAC")?;
        Ok(Self { socket, own, gateway })
    }

    /// Sends an Ethernet frame unchanged.
    ///
    /// # Errors
    /// Returns an error if the kernel does not accept the frame, for example because the frame is too long.
    pub fn send_frame(&self, frame: &[u8]) -> Result<()> {
        self.socket
            .send(frame)
            .with_context(|| format!("a frame of {} bytes", frame.len()))?;
        Ok(())
    }

    /// Sends an IP packet to the other end of the link.
    ///
    /// # Errors
    /// See [`Wire::send_frame`].
    pub fn send(&self, packet: &[u8]) -> Result<()> {
        self.send_frame(&frame(self.own, self.gateway, packet))
    }

    /// Sends a TCP segment from any address to any other.
    ///
    /// # Errors
    /// See [`Wire::send_frame`].
    pub fn tcp(&self, from: IpAddr, to: IpAddr, segment: &Tcp) -> Result<()> {
        self.send(&ip(from, to, protocol::TCP, 64, &segment.bytes(from, to)))
    }

    /// Sends a UDP datagram from any address to any other.
    ///
    /// # Errors
    /// See [`Wire::send_frame`].
    pub fn udp(&self, from: SocketAddr, to: SocketAddr, payload: &[u8], sum: Checksum) -> Result<()> {
        let udp = udp(from, to, payload, sum);
        self.send(&ip(from.ip(), to.ip(), protocol::UDP, 64, &udp))
    }

    /// Sends an ICMP message that [`icmp`] or [`too_big`] made.
    ///
    /// # Errors
    /// See [`Wire::send_frame`].
    pub fn icmp(&self, from: IpAddr, to: IpAddr, message: &[u8]) -> Result<()> {
        let protocol = if from.is_ipv6() {
            protocol::ICMPV6
        } else {
            protocol::ICMP
        };
        self.send(&ip(from, to, protocol, 255, message))
    }

    /// Waits for an incoming packet for which `wanted` returns `Some`, and returns that value; `None` after `timeout`.
    /// Considers all packets that have not been received or drained before.
    pub fn wait<T>(&self, timeout: Duration, mut wanted: impl FnMut(&Packet) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + timeout;
        let mut buffer = vec![0; 1 << 16];
        loop {
            if let Some(n) = self.receive(&mut buffer)
                && let Some(packet) = parse(&buffer[..n], false)
                && let Some(found) = wanted(&packet)
            {
                return Some(found);
            }
            if Instant::now() >= deadline {
                return None;
            }
        }
    }

    /// Waits for a TCP segment from `from` to `to` for which `wanted` returns true; `None` after `timeout`.
    pub fn wait_tcp(
        &self,
        timeout: Duration,
        from: SocketAddr,
        to: SocketAddr,
        mut wanted: impl FnMut(&ReceivedSegment) -> bool,
    ) -> Option<ReceivedSegment> {
        self.wait(timeout, |packet| {
            ReceivedSegment::read(packet)
                .filter(|heard| heard.from == from && heard.to == to && wanted(heard))
        })
    }

    /// Discards the packets that have arrived.
    pub fn drain(&self) {
        let mut buffer = vec![0; 1 << 16];
        while self.receive_with(&mut buffer, libc::MSG_DONTWAIT).is_some() {}
    }

    /// Receives one frame, waiting at most the read timeout of the socket (50 ms). Returns its length; `None` after the
    /// timeout or for an outgoing frame.
    fn receive(&self, buffer: &mut [u8]) -> Option<usize> {
        self.receive_with(buffer, 0).flatten()
    }

    /// Receives a frame and returns its length. Returns `None` if there is no frame, `Some(None)` for an outgoing
    /// frame.
    #[expect(clippy::option_option, reason = "outgoing frames are looked at by no caller")]
    fn receive_with(&self, buffer: &mut [u8], how: i32) -> Option<Option<usize>> {
        let mut from = std::mem::MaybeUninit::<libc::sockaddr_ll>::zeroed();
        let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: `buffer` and `from` are valid for writes of the lengths that are passed with them, and outlive the
        // call.
        let n = unsafe {
            libc::recvfrom(
                self.socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                how,
                from.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let n = usize::try_from(n).ok()?;
        // SAFETY: `from` was zeroed, and every bit pattern is a valid `sockaddr_ll`.
        let from = unsafe { from.assume_init() };
        Some((from.sll_pkttype != libc::PACKET_OUTGOING).then_some(n))
    }
}

/// A TCP connection with forged segments. [`Forged::open`] does the handshake; the caller sends all further segments.
#[derive(Debug)]
pub struct Forged {
    /// The packet socket that sends and receives the segments.
    pub wire: Wire,
    /// Local address and port.
    pub local: SocketAddr,
    /// Remote address and port.
    pub remote: SocketAddr,
    /// Sequence number of the SYN.
    pub isn: u32,
    /// The received SYN+ACK.
    pub syn_ack: ReceivedSegment,
}

impl Forged {
    /// Opens a connection. `in_syn`: options of the SYN. `in_ack`: returns the options of the third segment of the
    /// handshake, given the received SYN+ACK.
    ///
    /// # Errors
    /// Returns an error if a segment cannot be sent, or if the other end does not send a SYN+ACK in time.
    pub fn open(
        wire: Wire,
        local: SocketAddr,
        remote: SocketAddr,
        in_syn: &[u8],
        in_ack: impl FnOnce(&ReceivedSegment) -> Vec<u8>,
    ) -> Result<Self> {
        let isn = crate::ns::serial().wrapping_add(1).wrapping_mul(0x9e37_79b9);
        let syn = Tcp::new(local.port(), remote.port())
            .flags(flags::SYN)
            .seq(isn)
            .option(in_syn);
        let mut answer = None;
        for _ in 0..8 {
            wire.tcp(local.ip(), remote.ip(), &syn)?;
            answer = wire.wait_tcp(Duration::from_millis(700), remote, local, |heard| {
                heard.flags & (flags::SYN | flags::ACK) == flags::SYN | flags::ACK
                    && heard.ack == isn.wrapping_add(1)
            });
            if answer.is_some() {
                break;
            }
        }
        let syn_ack = answer.with_context(|| format!("{remote} does not answer {local}"))?;
        let options = in_ack(&syn_ack);
        let own = Self {
            wire,
            local,
            remote,
            isn,
            syn_ack,
        };
        own.send(&own.segment(1).option(&options))?;
        Ok(own)
    }

    /// Returns a segment that acknowledges the SYN+ACK. `at`: its sequence number relative to the SYN; 1 is the first
    /// byte of the stream.
    #[must_use]
    pub fn segment(&self, at: u32) -> Tcp {
        Tcp::new(self.local.port(), self.remote.port())
            .seq(self.isn.wrapping_add(at))
            .ack(self.syn_ack.seq.wrapping_add(1))
    }

    /// Sends a segment from the local to the remote address.
    ///
    /// # Errors
    /// See [`Wire::send_frame`].
    pub fn send(&self, segment: &Tcp) -> Result<()> {
        self.wire.tcp(self.local.ip(), self.remote.ip(), segment)
    }

    /// Waits for a segment of the other end for which `wanted` returns true; `None` after `timeout`.
    pub fn wait(
        &self,
        timeout: Duration,
        wanted: impl FnMut(&ReceivedSegment) -> bool,
    ) -> Option<ReceivedSegment> {
        self.wire.wait_tcp(timeout, self.remote, self.local, wanted)
    }
}

/// Returns the MAC address that follows a word in the output of `ip`.
fn mac_behind(text: &str, word: &str) -> Option<Mac> {
    let mut words = text.split_ascii_whitespace().skip_while(|w| *w != word);
    let text = words.nth(1)?;
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}
