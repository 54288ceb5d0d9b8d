//! A TCP server that records all received bytes. Tests use it to check which bytes the firewall has passed.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};

use crate::ns::{Ns, wait_until};

const TICK: Duration = Duration::from_millis(20);

/// The state of a connection at the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The connection is open.
    Open,
    /// The client has sent a FIN.
    Finished,
    /// The connection was reset, or writing to it failed.
    Reset,
}

/// A connection to the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedConnection {
    /// Address and port of the client.
    pub from: SocketAddr,
    /// Address and port of the server.
    pub to: SocketAddr,
    /// All bytes received from the client.
    pub bytes: Vec<u8>,
    /// The state.
    pub end: End,
}

/// A function that returns the bytes to send. The first parameter is the number of received bytes that the function has
/// processed; the function updates this number. The second parameter is all bytes received so far.
pub type Answer = dyn Fn(&mut usize, &[u8]) -> Vec<u8> + Send + Sync;

/// A server that records its connections, with one thread per connection.
#[derive(Debug)]
pub struct Recorder {
    heard: Arc<Mutex<Vec<RecordedConnection>>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Recorder {
    /// Starts a server on each of `ports` at each of `addresses`. The server responds with the output of `answer`.
    pub fn start(
        ns: &Ns,
        addresses: &[IpAddr],
        ports: &[u16],
        answer: impl Fn(&mut usize, &[u8]) -> Vec<u8> + Send + Sync + 'static,
    ) -> Result<Self> {
        let mut listeners = Vec::new();
        for at in addresses
            .iter()
            .flat_map(|address| ports.iter().map(|port| SocketAddr::new(*address, *port)))
        {
            let listener = ns
                .enter(|| TcpListener::bind(at))
                .with_context(|| format!("tcp {at}"))?;
            listeners.push(listener);
        }
        Self::on(listeners, answer)
    }

    /// Starts a server on existing listeners, TCP or MPTCP.
    pub fn on(
        listeners: Vec<TcpListener>,
        answer: impl Fn(&mut usize, &[u8]) -> Vec<u8> + Send + Sync + 'static,
    ) -> Result<Self> {
        let heard = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let answer: Arc<Answer> = Arc::new(answer);
        let mut threads = Vec::new();
        for listener in listeners {
            let at = listener.local_addr()?;
            listener.set_nonblocking(true)?;
            let (heard, stop, answer) = (Arc::clone(&heard), Arc::clone(&stop), Arc::clone(&answer));
            threads.push(thread::spawn(move || {
                accept(&listener, at, &heard, &stop, &answer)
            }));
        }
        Ok(Self { heard, stop, threads })
    }

    /// Returns all connections so far.
    #[must_use]
    pub fn heard(&self) -> Vec<RecordedConnection> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the last connection from `from`; `None` if there is none.
    #[must_use]
    pub fn from(&self, from: SocketAddr) -> Option<RecordedConnection> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.iter().rev().find(|heard| heard.from == from).cloned()
    }

    /// Returns the bytes of the last connection from `from`; empty if there is none.
    #[must_use]
    pub fn bytes(&self, from: SocketAddr) -> Vec<u8> {
        self.from(from).map(|heard| heard.bytes).unwrap_or_default()
    }

    /// Waits until `wanted` returns true for the last connection from `from`.
    pub fn wait(
        &self,
        from: SocketAddr,
        what: &str,
        timeout: Duration,
        wanted: impl Fn(&RecordedConnection) -> bool,
    ) -> Result<RecordedConnection> {
        let mut found = None;
        wait_until(what, timeout, || {
            found = self.from(from);
            found.as_ref().is_some_and(&wanted)
        })
        .with_context(|| format!("{found:?}"))?;
        found.context("no connection")
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn accept(
    listener: &TcpListener,
    to: SocketAddr,
    heard: &Arc<Mutex<Vec<RecordedConnection>>>,
    stop: &Arc<AtomicBool>,
    answer: &Arc<Answer>,
) {
    let mut threads = Vec::new();
    while !stop.load(Relaxed) {
        let Ok((stream, from)) = listener.accept() else {
            thread::sleep(Duration::from_millis(1));
            continue;
        };
        let at = {
            let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
            heard.push(RecordedConnection {
                from,
                to,
                bytes: Vec::new(),
                end: End::Open,
            });
            heard.len() - 1
        };
        let (heard, stop, answer) = (Arc::clone(heard), Arc::clone(stop), Arc::clone(answer));
        threads.push(thread::spawn(move || {
            serve(stream, at, &heard, &stop, answer.as_ref())
        }));
    }
    for thread in threads {
        let _ = thread.join();
    }
}

fn serve(
    mut stream: TcpStream,
    at: usize,
    heard: &Mutex<Vec<RecordedConnection>>,
    stop: &AtomicBool,
    answer: &Answer,
) {
    let note = |change: &mut dyn FnMut(&mut RecordedConnection)| {
        if let Some(own) = heard.lock().unwrap_or_else(PoisonError::into_inner).get_mut(at) {
            change(own);
        }
    };
    // The read timeout lets the thread check `stop`. Without Nagle's algorithm each response is sent at once.
    let prepared = stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_read_timeout(Some(TICK)))
        .and_then(|()| stream.set_write_timeout(Some(Duration::from_secs(2))))
        .and_then(|()| stream.set_nodelay(true));
    if prepared.is_err() {
        return;
    }
    let (mut all, mut dealt_with) = (Vec::new(), 0);
    let mut buffer = vec![0; 1 << 16];
    while !stop.load(Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) => {
                note(&mut |own| own.end = End::Finished);
                return;
            }
            Ok(n) => {
                all.extend_from_slice(&buffer[..n]);
                note(&mut |own| own.bytes.extend_from_slice(&buffer[..n]));
                let said = answer(&mut dealt_with, &all);
                if stream.write_all(&said).is_err() {
                    note(&mut |own| own.end = End::Reset);
                    return;
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => {
                note(&mut |own| own.end = End::Reset);
                return;
            }
        }
    }
}
