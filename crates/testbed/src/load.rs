//! Traffic generators that count lost, changed and repeated data, and measure interruptions.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    capture::Capture,
    ns::{Ns, wait_until},
    packet::protocol,
    probe,
};

/// Length of a block or datagram, bytes.
const BLOCK: usize = 1024;
const TICK: Duration = Duration::from_millis(20);

type Block = [u8; BLOCK];

/// Returns block number `n`: the number, 1,008 bytes derived from it, and a checksum of both.
fn block(n: u64) -> Block {
    let mut bytes = [0; BLOCK];
    bytes[..8].copy_from_slice(&n.to_be_bytes());
    let mut state = (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in bytes[16..].chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_be_bytes());
    }
    let sum = fnv(&bytes);
    bytes[8..16].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// Returns the number of a block; `None` if its checksum or its contents are wrong.
fn number(bytes: &[u8]) -> Option<u64> {
    let n = u64::from_be_bytes(bytes.get(..8)?.try_into().ok()?);
    (bytes == block(n)).then_some(n)
}

/// Returns the 64-bit FNV-1a hash.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Measures the longest time between two consecutive events. The start counts as an event.
#[derive(Debug)]
struct Gap {
    last: Mutex<(Instant, Duration)>,
}

impl Gap {
    fn new() -> Self {
        Self {
            last: Mutex::new((Instant::now(), Duration::ZERO)),
        }
    }

    fn event(&self) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.1 = last.1.max(last.0.elapsed());
        last.0 = Instant::now();
    }

    fn longest(&self) -> Duration {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).1
    }
}

/// The result of a [`TcpLoad`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpReport {
    /// Number of blocks sent.
    pub sent: u64,
    /// Number of blocks that the server has received in order and unchanged.
    pub received: u64,
    /// Number of blocks that the client has received back in order and unchanged.
    pub returned: u64,
    /// Number of blocks that either end has received changed or out of order.
    pub changed: u64,
    /// Number of retransmitted segments, the sum of both ends.
    pub retransmitted: u32,
    /// Longest time that the client waited for the next block to come back.
    pub longest_gap: Duration,
    /// The error that ended the connection early.
    pub broken: Option<ErrorKind>,
}

impl TcpReport {
    /// Returns whether all blocks arrived unchanged at both ends. Retransmissions are allowed.
    #[must_use]
    pub fn whole(&self) -> bool {
        self.broken.is_none() && self.changed == 0 && self.received == self.sent && self.returned == self.sent
    }
}

/// A TCP connection that sends numbered blocks at a constant rate to an echo server.
#[derive(Debug)]
pub struct TcpLoad {
    stream: TcpStream,
    shared: Arc<TcpShared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct TcpShared {
    stop: AtomicBool,
    sent: AtomicU64,
    received: AtomicU64,
    returned: AtomicU64,
    changed: AtomicU64,
    server_retransmitted: AtomicU64,
    gap: Gap,
    broken: Mutex<Option<ErrorKind>>,
}

impl TcpShared {
    fn broke(&self, error: &io::Error) {
        self.broken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(error.kind());
    }
}

impl TcpLoad {
    /// Starts a server at `to` in `server`, connects `client` to it, and sends a block every `pace`.
    pub fn start(client: &Ns, server: &Ns, to: SocketAddr, pace: Duration) -> Result<Self> {
        let listener = server
            .enter(|| TcpListener::bind(to))
            .with_context(|| format!("tcp {to}"))?;
        let shared = Arc::new(TcpShared {
            stop: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            returned: AtomicU64::new(0),
            changed: AtomicU64::new(0),
            server_retransmitted: AtomicU64::new(0),
            gap: Gap::new(),
            broken: Mutex::new(None),
        });
        let stream = probe::open(client, None, to, Duration::from_secs(5))
            .with_context(|| format!("load connection to {to}"))?;
        let (accepted, _) = listener.accept()?;
        for socket in [&stream, &accepted] {
            socket.set_nodelay(true)?;
        }
        let (mut writer, mut reader) = (stream.try_clone()?, stream.try_clone()?);
        let (for_server, for_writer, for_reader) = (shared.clone(), shared.clone(), shared.clone());
        let threads = vec![
            thread::spawn(move || serve(accepted, &for_server)),
            thread::spawn(move || {
                while !for_writer.stop.load(Relaxed) {
                    if let Err(error) = writer.write_all(&block(for_writer.sent.load(Relaxed))) {
                        for_writer.broke(&error);
                        return;
                    }
                    for_writer.sent.fetch_add(1, Relaxed);
                    thread::sleep(pace);
                }
                let _ = writer.shutdown(Shutdown::Write);
            }),
            thread::spawn(move || {
                let mut bytes = [0; BLOCK];
                loop {
                    match reader.read_exact(&mut bytes) {
                        Ok(()) => {}
                        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return,
                        Err(error) => return for_reader.broke(&error),
                    }
                    for_reader.gap.event();
                    count(&bytes, &for_reader.returned, &for_reader.changed);
                }
            }),
        ];
        Ok(Self {
            stream,
            shared,
            threads,
        })
    }

    /// Returns the number of blocks that have come back so far.
    #[must_use]
    pub fn returned(&self) -> u64 {
        self.shared.returned.load(Relaxed)
    }

    /// Waits for `more` further blocks to come back. Returns whether they did within `timeout`.
    #[must_use]
    pub fn moves(&self, more: u64, timeout: Duration) -> bool {
        let start = self.returned();
        wait_until("blocks come back", timeout, || self.returned() >= start + more).is_ok()
    }

    /// Stops sending, waits at most `grace` for blocks in flight, and returns the result.
    pub fn finish(mut self, grace: Duration) -> TcpReport {
        self.shared.stop.store(true, Relaxed);
        let complete = || self.shared.returned.load(Relaxed) + self.shared.changed.load(Relaxed);
        let _ = wait_until("the rest comes back", grace, || {
            self.threads.iter().all(JoinHandle::is_finished) || complete() >= self.shared.sent.load(Relaxed)
        });
        let own = retransmits(&self.stream);
        let deadline = Instant::now() + Duration::from_secs(1);
        while !self.threads.iter().all(JoinHandle::is_finished) {
            if Instant::now() > deadline {
                let _ = self.stream.shutdown(Shutdown::Both);
            }
            if Instant::now() > deadline + Duration::from_secs(1) {
                // A thread is still blocked on its socket, for example because the policy drops the client's FIN or
                // reset. Do not join the threads; they end with the process.
                self.threads.clear();
                break;
            }
            thread::sleep(TICK);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        let s = &self.shared;
        TcpReport {
            sent: s.sent.load(Relaxed),
            received: s.received.load(Relaxed),
            returned: s.returned.load(Relaxed),
            changed: s.changed.load(Relaxed),
            retransmitted: own + s.server_retransmitted.load(Relaxed) as u32,
            longest_gap: s.gap.longest(),
            broken: *s.broken.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }
}

fn count(bytes: &[u8], good: &AtomicU64, changed: &AtomicU64) {
    if number(bytes) == Some(good.load(Relaxed)) {
        good.fetch_add(1, Relaxed);
    } else {
        changed.fetch_add(1, Relaxed);
    }
}

/// Runs the server's side: checks each block and sends it back.
fn serve(mut stream: TcpStream, shared: &TcpShared) {
    let mut bytes = [0; BLOCK];
    while stream.read_exact(&mut bytes).is_ok() {
        count(&bytes, &shared.received, &shared.changed);
        if let Err(error) = stream.write_all(&bytes) {
            shared.broke(&error);
            break;
        }
        shared
            .server_retransmitted
            .store(retransmits(&stream).into(), Relaxed);
    }
    let _ = stream.shutdown(Shutdown::Both);
}

/// Returns the number of segments that this end has retransmitted (`TCP_INFO`, tcp(7)).
fn retransmits(stream: &TcpStream) -> u32 {
    let mut info = std::mem::MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which is the size of `info`.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return 0;
    }
    // SAFETY: `info` was zeroed, and every bit pattern is valid.
    unsafe { info.assume_init() }.tcpi_total_retrans
}

/// The result of a [`UdpLoad`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UdpReport {
    /// Number of datagrams sent.
    pub sent: u64,
    /// Number of different datagrams that arrived unchanged.
    pub received: u64,
    /// Number of datagrams that arrived again.
    pub duplicated: u64,
    /// Number of datagrams that arrived changed.
    pub changed: u64,
    /// Number of datagrams that the sender's kernel refused.
    pub refused: u64,
}

impl UdpReport {
    /// Returns the number of datagrams that were sent and did not arrive unchanged.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.sent - self.received
    }
}

/// A sender of numbered datagrams at a constant rate.
#[derive(Debug)]
pub struct UdpLoad {
    shared: Arc<UdpShared>,
    sender: Option<JoinHandle<()>>,
    sink: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct UdpShared {
    stop_sending: AtomicBool,
    stop: AtomicBool,
    sent: AtomicU64,
    refused: AtomicU64,
    seen: Mutex<Vec<bool>>,
    received: AtomicU64,
    duplicated: AtomicU64,
    changed: AtomicU64,
}

impl UdpLoad {
    /// Starts a receiver at `to` in `server`, and sends a datagram from `client` to it every `pace`.
    pub fn start(client: &Ns, server: &Ns, to: SocketAddr, pace: Duration) -> Result<Self> {
        let sink = server
            .enter(|| -> io::Result<UdpSocket> {
                let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
                socket.set_recv_buffer_size(4 << 20)?;
                socket.bind(&to.into())?;
                Ok(socket.into())
            })
            .with_context(|| format!("udp {to}"))?;
        sink.set_read_timeout(Some(TICK))?;
        let source: SocketAddr = if to.is_ipv4() {
            ([0; 4], 0).into()
        } else {
            ([0u16; 8], 0).into()
        };
        let socket = client.enter(|| -> io::Result<UdpSocket> {
            let socket = UdpSocket::bind(source)?;
            socket.connect(to)?;
            Ok(socket)
        })?;
        let shared = Arc::new(UdpShared::default());
        let (for_sender, for_sink) = (shared.clone(), shared.clone());
        Ok(Self {
            sender: Some(thread::spawn(move || {
                while !for_sender.stop_sending.load(Relaxed) {
                    match socket.send(&block(for_sender.sent.load(Relaxed))) {
                        Ok(_) => for_sender.sent.fetch_add(1, Relaxed),
                        Err(_) => for_sender.refused.fetch_add(1, Relaxed),
                    };
                    thread::sleep(pace);
                }
            })),
            sink: Some(thread::spawn(move || {
                let mut bytes = [0; 2 * BLOCK];
                while !for_sink.stop.load(Relaxed) {
                    let Ok(n) = sink.recv(&mut bytes) else { continue };
                    let Some(at) = number(&bytes[..n]).and_then(|n| usize::try_from(n).ok()) else {
                        for_sink.changed.fetch_add(1, Relaxed);
                        continue;
                    };
                    let mut seen = for_sink.seen.lock().unwrap_or_else(PoisonError::into_inner);
                    if seen.len() <= at {
                        seen.resize(at + 1, false);
                    }
                    if std::mem::replace(&mut seen[at], true) {
                        for_sink.duplicated.fetch_add(1, Relaxed);
                    } else {
                        for_sink.received.fetch_add(1, Relaxed);
                    }
                }
            })),
            shared,
        })
    }

    /// Returns the number of datagrams that have arrived so far.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.shared.received.load(Relaxed)
    }

    /// Waits for `more` further datagrams to arrive. Returns whether they did within `timeout`.
    #[must_use]
    pub fn moves(&self, more: u64, timeout: Duration) -> bool {
        let start = self.received();
        wait_until("datagrams arrive", timeout, || self.received() >= start + more).is_ok()
    }

    /// Stops sending, waits for datagrams in flight, and returns the result.
    pub fn finish(mut self) -> UdpReport {
        self.halt();
        let s = &self.shared;
        UdpReport {
            sent: s.sent.load(Relaxed),
            received: s.received.load(Relaxed),
            duplicated: s.duplicated.load(Relaxed),
            changed: s.changed.load(Relaxed),
            refused: s.refused.load(Relaxed),
        }
    }

    fn halt(&mut self) {
        self.shared.stop_sending.store(true, Relaxed);
        if let Some(sender) = self.sender.take() {
            let _ = sender.join();
        }
        let s = &self.shared;
        let _ = wait_until("the rest arrives", Duration::from_millis(500), || {
            s.received.load(Relaxed) >= s.sent.load(Relaxed)
        });
        self.shared.stop.store(true, Relaxed);
        if let Some(sink) = self.sink.take() {
            let _ = sink.join();
        }
    }
}

impl Drop for UdpLoad {
    fn drop(&mut self) {
        self.halt();
    }
}

/// The result of a [`Leak`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeakReport {
    /// Number of datagrams and connection attempts sent.
    pub tried: u64,
    /// Number of packets of these attempts that reached the receiver's interface; 0 if the firewall drops all of them.
    pub leaked: usize,
    /// Descriptions of some of these packets.
    pub examples: Vec<String>,
}

/// A sender of denied traffic, with a capture on the receiver's interface.
#[derive(Debug)]
pub struct Leak {
    capture: Capture,
    stop: Arc<AtomicBool>,
    tried: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Leak {
    /// Sends a datagram and a SYN from `source` in `from` to `to` every `pace`. `receiver`: namespace and name of the
    /// receiver's interface; no socket needs to listen there.
    pub fn start(
        from: &Ns,
        source: IpAddr,
        receiver: (&Ns, &str),
        to: SocketAddr,
        pace: Duration,
    ) -> Result<Self> {
        let capture = Capture::start_where(receiver.0, receiver.1, move |p| {
            !p.outgoing
                && p.source == source
                && p.destination == to.ip()
                && matches!(p.protocol, protocol::TCP | protocol::UDP)
                && p.ports.is_none_or(|(_, destination)| destination == to.port())
        })?;
        let udp = from.enter(|| -> io::Result<UdpSocket> {
            let socket = UdpSocket::bind((source, 0))?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })?;
        let stop = Arc::new(AtomicBool::new(false));
        let tried = Arc::new(AtomicU64::new(0));
        let thread = thread::spawn({
            let (from, stop, tried) = (from.clone(), stop.clone(), tried.clone());
            move || {
                if from.join().is_err() {
                    return; // The result shows that nothing was sent.
                }
                while !stop.load(Relaxed) {
                    if udp.send_to(&block(0), to).is_ok() {
                        tried.fetch_add(1, Relaxed);
                    }
                    if attempt(source, to).is_ok() {
                        tried.fetch_add(1, Relaxed);
                    }
                    thread::sleep(pace);
                }
            }
        });
        Ok(Self {
            capture,
            stop,
            tried,
            thread: Some(thread),
        })
    }

    /// Returns the number of attempts so far.
    #[must_use]
    pub fn tried(&self) -> u64 {
        self.tried.load(Relaxed)
    }

    /// Waits until `more` further attempts have been made.
    pub fn keep_trying(&self, more: u64, timeout: Duration) -> Result<()> {
        let start = self.tried();
        wait_until("attempts are made", timeout, || self.tried() >= start + more)
    }

    /// Stops sending and returns the result.
    pub fn finish(mut self) -> LeakReport {
        self.halt();
        // Wait for packets in flight.
        thread::sleep(TICK * 3);
        let packets = self.capture.packets();
        LeakReport {
            tried: self.tried(),
            leaked: packets.len(),
            examples: packets
                .iter()
                .take(3)
                .map(|p| {
                    format!(
                        "protocol {} ports {:?} flags {:#x} {} bytes",
                        p.protocol, p.ports, p.tcp_flags, p.length
                    )
                })
                .collect(),
        }
    }

    fn halt(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Leak {
    fn drop(&mut self) {
        self.halt();
    }
}

/// Sends one SYN.
fn attempt(source: IpAddr, to: SocketAddr) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.bind(&SocketAddr::new(source, 0).into())?;
    socket.set_nonblocking(true)?;
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_with_a_flipped_bit_is_rejected() {
        let good = block(7);
        assert_eq!(number(&good), Some(7));
        for at in 0..BLOCK {
            let mut bad = good;
            bad[at] ^= 1;
            assert_eq!(number(&bad), None, "byte {at}");
        }
    }
}
