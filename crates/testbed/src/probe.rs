//! Connection attempts and their outcomes.

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

/// The outcome of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The destination has responded.
    Open,
    /// The destination has refused or closed the connection, has sent an ICMP port unreachable message, or has echoed
    /// other bytes over TCP.
    Refused,
    /// No response within the timeout.
    TimedOut,
    /// The attempt has failed in another way: for example, the destination is unreachable.
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

/// The kind of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Open a TCP connection.
    Tcp,
    /// Send a datagram of this length in bytes and wait for its echo.
    Udp(usize),
    /// Run `ping` with this payload length in bytes.
    Ping(usize),
}

/// An attempt to be made.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The namespace that sends.
    pub from: Ns,
    /// Source address; `None` for the address that routing selects.
    pub source: Option<IpAddr>,
    /// Destination; the port is ignored for ICMP.
    pub to: SocketAddr,
    /// The kind.
    pub kind: Kind,
}

impl Probe {
    /// Runs the attempt.
    #[must_use]
    pub fn run(&self, timeout: Duration) -> Outcome {
        match self.kind {
            Kind::Tcp => connect_from(&self.from, self.source, self.to, timeout),
            Kind::Udp(size) => udp(&self.from, self.source, self.to, size, timeout),
            Kind::Ping(size) => ping(&self.from, self.source, self.to.ip(), size, timeout),
        }
    }
}

/// Runs attempts concurrently in batches, each attempt with its own timeout. Returns the outcomes in the order of
/// `probes`.
#[must_use]
pub fn run_all(probes: &[(Probe, Duration)]) -> Vec<Outcome> {
    // While the kernel resolves a neighbour, it queues a limited number of packets and drops the others.
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

/// Opens a TCP connection and returns it.
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

/// Opens a TCP connection and closes it.
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

/// Sends some bytes over an open connection to an echo server and waits for their echo.
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

/// Returns at least eight pseudo-random bytes, different ones for each call.
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

/// Sends a datagram of `size` bytes (at least 8) to an echo server and waits for its echo.
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

/// Sends one ICMP echo request with `ping`.
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

/// Sends one packet of any IP protocol. The kernel writes the network header.
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

/// A receiver of all packets of one IP protocol that reach the network stack of a namespace, that is, after the XDP and
/// tc hooks of its interfaces. A [`crate::capture::Capture`] receives packets before the tc ingress hook.
#[derive(Debug)]
pub struct RawReceiver {
    socket: Socket,
}

impl RawReceiver {
    /// Starts to receive packets of the family of `address`.
    pub fn start(ns: &Ns, address: IpAddr, protocol: u8) -> Result<Self> {
        let to = SocketAddr::new(address, 0);
        let protocol = Protocol::from(i32::from(protocol));
        let socket = ns.enter(|| Socket::new(Domain::for_address(to), Type::RAW, Some(protocol)))?;
        Ok(Self { socket })
    }

    /// Waits for a packet from `source` whose first byte after the network header is `first`. Returns whether such a
    /// packet came within `timeout`. The source of IPv6 packets is not checked.
    pub fn receives(&self, source: IpAddr, first: u8, timeout: Duration) -> Result<bool> {
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
            // A raw socket returns IPv4 packets with their header and IPv6 packets without it (raw(7), ipv6(7)).
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

/// Sends one packet with the given network header. The kernel sets the checksum of an IPv4 header, and the
/// identification if it is 0.
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

/// Sets the hop limit of the packets that an IPv6 socket sends.
pub fn set_hop_limit_v6(socket: &std::net::UdpSocket, hops: u32) -> io::Result<()> {
    socket2::SockRef::from(socket).set_unicast_hops_v6(hops)
}
