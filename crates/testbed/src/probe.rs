//! One attempt to talk, and what came of it.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    ns::{Ns, serial},
    process::output,
};

/// What came of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The other end answered.
    Open,
    /// The other end (or its kernel) said no.
    Refused,
    /// Nothing came back.
    TimedOut,
    /// A router said that there is no way, or the own kernel did.
    Unreachable,
}

impl Outcome {
    fn of(error: &io::Error) -> Self {
        match error.kind() {
            ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                Self::Refused
            }
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Self::TimedOut,
            _ => Self::Unreachable,
        }
    }
}

/// How to talk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Open a connection.
    Tcp,
    /// Send a datagram of so many bytes, and hear its echo.
    Udp(usize),
    /// ICMP echo with so many bytes, by the `ping` program.
    Ping(usize),
}

/// An attempt to be made.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Who tries.
    pub from: Ns,
    /// From which of its addresses, if not the one its routes choose.
    pub source: Option<IpAddr>,
    /// To whom (ICMP: the port counts for nothing).
    pub to: SocketAddr,
    /// How.
    pub kind: Kind,
}

impl Probe {
    /// Tries.
    #[must_use]
    pub fn run(&self, timeout: Duration) -> Outcome {
        match self.kind {
            Kind::Tcp => connect_from(&self.from, self.source, self.to, timeout),
            Kind::Udp(size) => udp(&self.from, self.source, self.to, size, timeout),
            Kind::Ping(size) => ping(&self.from, self.source, self.to.ip(), size, timeout),
        }
    }
}

/// Tries all of them, many at the same time; each has its own deadline.
#[must_use]
pub fn run_all(probes: &[(Probe, Duration)]) -> Vec<Outcome> {
    // more than a neighbour's queue holds while its address is being resolved would lose datagrams
    const AT_ONCE: usize = 48;
    let mut outcomes = Vec::with_capacity(probes.len());
    for some in probes.chunks(AT_ONCE) {
        thread::scope(|scope| {
            let threads: Vec<_> = some
                .iter()
                .map(|(probe, timeout)| scope.spawn(|| probe.run(*timeout)))
                .collect();
            outcomes.extend(
                threads
                    .into_iter()
                    .map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))),
            );
        });
    }
    outcomes
}

fn any_of(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Opens a TCP connection and keeps it.
pub fn open(ns: &Ns, source: Option<IpAddr>, to: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    ns.enter(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
        if let Some(source) = source {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        socket.connect_timeout(&to.into(), timeout)?;
        Ok(socket.into())
    })
}

/// Opens a TCP connection, and closes it.
#[must_use]
pub fn connect(ns: &Ns, to: SocketAddr, timeout: Duration) -> Outcome {
    connect_from(ns, None, to, timeout)
}

fn connect_from(ns: &Ns, source: Option<IpAddr>, to: SocketAddr, timeout: Duration) -> Outcome {
    match open(ns, source, to, timeout) {
        Ok(_) => Outcome::Open,
        Err(error) => Outcome::of(&error),
    }
}

/// Sends a few bytes over an open connection to an echo server, and hears them.
pub fn exchange(stream: &mut TcpStream, timeout: Duration) -> Outcome {
    let question = nonce(16);
    let mut answer = vec![0; question.len()];
    let result = stream
        .set_read_timeout(Some(timeout))
        .and_then(|()| stream.set_write_timeout(Some(timeout)))
        .and_then(|()| stream.write_all(&question))
        .and_then(|()| stream.read_exact(&mut answer));
    match result {
        Ok(()) if answer == question => Outcome::Open,
        Ok(()) => Outcome::Refused,
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Outcome::Refused,
        Err(error) => Outcome::of(&error),
    }
}

/// Bytes that nobody else sends.
fn nonce(size: usize) -> Vec<u8> {
    let mut state =
        (u64::from(std::process::id()) << 32 | u64::from(serial())).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..size.max(8))
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// Sends a datagram to an echo server and waits for the same to come back. (At least 8 bytes.)
#[must_use]
pub fn udp(ns: &Ns, source: Option<IpAddr>, to: SocketAddr, size: usize, timeout: Duration) -> Outcome {
    let question = nonce(size);
    let attempt = || -> io::Result<Outcome> {
        let socket = std::net::UdpSocket::bind(SocketAddr::new(source.unwrap_or(any_of(to.ip())), 0))?;
        socket.connect(to)?;
        socket.send(&question)?;
        let deadline = Instant::now() + timeout;
        let mut answer = vec![0; 1 << 16];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Outcome::TimedOut);
            }
            socket.set_read_timeout(Some(left))?;
            let n = socket.recv(&mut answer)?;
            if answer[..n] == question {
                return Ok(Outcome::Open);
            }
        }
    };
    ns.enter(|| attempt().unwrap_or_else(|error| Outcome::of(&error)))
}

/// One ICMP echo, by the `ping` program.
#[must_use]
pub fn ping(ns: &Ns, source: Option<IpAddr>, to: IpAddr, size: usize, timeout: Duration) -> Outcome {
    let mut command = ns.command("ping");
    command.args([
        "-n",
        "-c",
        "1",
        "-s",
        &size.to_string(),
        "-W",
        &format!("{:.3}", timeout.as_secs_f64()),
    ]);
    if let Some(source) = source {
        command.args(["-I", &source.to_string()]);
    }
    command.arg(to.to_string());
    match output(&mut command, timeout + Duration::from_secs(2)) {
        Ok(out) if out.status.success() => Outcome::Open,
        Ok(out) if String::from_utf8_lossy(&out.stdout).contains("Unreachable") => Outcome::Unreachable,
        Ok(out) if out.status.code() == Some(1) => Outcome::TimedOut,
        _ => Outcome::Unreachable,
    }
}

/// Sends one packet of any protocol: the kernel writes the network header only.
pub fn send_raw(ns: &Ns, source: Option<IpAddr>, to: IpAddr, protocol: u8, payload: &[u8]) -> Result<()> {
    ns.enter(|| -> io::Result<()> {
        let to = SocketAddr::new(to, 0);
        let socket = Socket::new(
            Domain::for_address(to),
            Type::RAW,
            Some(Protocol::from(i32::from(protocol))),
        )?;
        if let Some(source) = source {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        socket.send_to(payload, &to.into())?;
        Ok(())
    })
    .with_context(|| format!("raw packet of protocol {protocol} to {to}"))
}

/// What the network stack of a namespace gets of one protocol: behind every hook at its interfaces, where a
/// [`crate::capture::Capture`] stands before those of tc.
#[derive(Debug)]
pub struct RawReceiver {
    socket: Socket,
}

impl RawReceiver {
    /// Listens from now on, to packets for `address`' family.
    pub fn start(ns: &Ns, address: IpAddr, protocol: u8) -> Result<Self> {
        let to = SocketAddr::new(address, 0);
        let protocol = Protocol::from(i32::from(protocol));
        let socket = ns.enter(|| Socket::new(Domain::for_address(to), Type::RAW, Some(protocol)))?;
        Ok(Self { socket })
    }

    /// Whether a packet from `source` that starts with the byte `first` (after its network header) comes in time.
    pub fn hears(&self, source: IpAddr, first: u8, timeout: Duration) -> Result<bool> {
        let deadline = Instant::now() + timeout;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.socket.set_read_timeout(Some(left))?;
            let mut socket = &self.socket;
            let Ok(n) = socket.read(&mut buffer) else { continue };
            // raw(7): IPv4 packets come with their header, IPv6 ones without (and the source is not told here)
            let (from, payload) = match source {
                IpAddr::V4(_) => {
                    let header = usize::from(buffer[0] & 15) * 4;
                    let from: [u8; 4] = [buffer[12], buffer[13], buffer[14], buffer[15]];
                    (Some(IpAddr::from(from)), &buffer[header.min(n)..n])
                }
                IpAddr::V6(_) => (None, &buffer[..n]),
            };
            if from.is_none_or(|from| from == source) && payload.first() == Some(&first) {
                return Ok(true);
            }
        }
    }
}

/// Sends one packet with its network header as given (the kernel fills in IPv4's checksum, and an identification
/// that is 0).
pub fn send_ip(ns: &Ns, to: IpAddr, packet: &[u8]) -> Result<()> {
    ns.enter(|| -> io::Result<()> {
        let to = SocketAddr::new(to, 0);
        let socket = Socket::new(
            Domain::for_address(to),
            Type::RAW,
            Some(Protocol::from(libc::IPPROTO_RAW)),
        )?;
        if to.is_ipv6() {
            socket.set_header_included_v6(true)?;
        }
        socket.send_to(packet, &to.into())?;
        Ok(())
    })
    .with_context(|| format!("packet to {to}"))
}

/// The hop limit of what an IPv6 socket sends.
pub fn set_hop_limit_v6(socket: &std::net::UdpSocket, hops: u32) -> io::Result<()> {
    socket2::SockRef::from(socket).set_unicast_hops_v6(hops)
}
