//! Connections that begin with a TLS hello and then carry arbitrary bytes.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use palisade_testbed::{
    Ns,
    ns::wait_until,
    probe,
    recorder::Recorder,
    tls::{Hello, server_hello},
};

/// Starts a server that responds to a hello and then echoes everything, on `ports` of these addresses.
pub fn server(ns: &Ns, addresses: &[IpAddr], ports: &[u16]) -> Result<Recorder> {
    Recorder::start(ns, addresses, ports, |dealt_with, all| {
        if *dealt_with == 0 {
            let Some(length) = first_record(all) else {
                return Vec::new();
            };
            *dealt_with = length;
            return server_hello();
        }
        let said = all[*dealt_with..].to_vec();
        *dealt_with = all.len();
        said
    })
}

/// Returns the length of the first record, once it is complete.
fn first_record(bytes: &[u8]) -> Option<usize> {
    let length = 5 + usize::from(u16::from_be_bytes([*bytes.get(3)?, *bytes.get(4)?]));
    (bytes.len() >= length).then_some(length)
}

/// A connection in use: the client sends a number and the server echoes it, over and over.
#[derive(Debug)]
pub struct Secret {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Address of the client's end.
    pub local: SocketAddr,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    rounds: AtomicU64,
    ended: AtomicBool,
    reset: AtomicBool,
    longest: AtomicU64,
}

impl Secret {
    /// Opens the connection with a hello for a name.
    pub fn open(ns: &Ns, to: SocketAddr, name: &str) -> Result<Self> {
        let mut stream = probe::open(ns, None, to, Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(&Hello::to(name).bytes())?;
        let mut answer = vec![0; server_hello().len()];
        stream.read_exact(&mut answer).context("the server's hello")?;
        stream.set_read_timeout(Some(Duration::from_millis(50)))?;
        let shared = Arc::new(Shared::default());
        let local = stream.local_addr()?;
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                if let Err(error) = rounds(&stream, &shared) {
                    let reset = matches!(
                        error.kind(),
                        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted
                    );
                    shared.reset.store(reset, Relaxed);
                    shared.ended.store(true, Relaxed);
                }
            }
        });
        Ok(Self {
            shared,
            thread: Some(thread),
            local,
        })
    }

    /// Returns how many numbers have come back.
    #[must_use]
    pub fn rounds(&self) -> u64 {
        self.shared.rounds.load(Relaxed)
    }

    /// Returns whether this many more numbers come back before the timeout.
    #[must_use]
    pub fn moves(&self, more: u64, timeout: Duration) -> bool {
        let wanted = self.rounds() + more;
        wait_until("it moves", timeout, || self.rounds() >= wanted).is_ok()
    }

    /// Returns whether the connection is reset before the timeout.
    #[must_use]
    pub fn is_cut(&self, timeout: Duration) -> bool {
        wait_until("it is cut", timeout, || self.shared.reset.load(Relaxed)).is_ok()
    }

    /// Returns whether the connection has ended or its bytes were changed.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.shared.ended.load(Relaxed)
    }

    /// Returns the longest time that a number took to come back.
    #[must_use]
    pub fn longest(&self) -> Duration {
        Duration::from_millis(self.shared.longest.load(Relaxed))
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn rounds(mut stream: &TcpStream, shared: &Shared) -> io::Result<()> {
    let mut n = 0_u64;
    while !shared.stop.load(Relaxed) {
        let begin = Instant::now();
        let said = n.to_be_bytes();
        stream.write_all(&said)?;
        let (mut heard, mut have) = ([0; 8], 0);
        while have < 8 {
            match stream.read(&mut heard[have..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(more) => have += more,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if shared.stop.load(Relaxed) {
                        return Ok(());
                    }
                }
                Err(error) => return Err(error),
            }
        }
        if heard != said {
            return Err(ErrorKind::InvalidData.into());
        }
        n += 1;
        shared.rounds.store(n, Relaxed);
        shared
            .longest
            .fetch_max(begin.elapsed().as_millis() as u64, Relaxed);
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
