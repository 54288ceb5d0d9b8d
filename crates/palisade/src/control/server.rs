//! Server of the control socket. It accepts only clients that run as root, and at most [`MAX_CLIENTS`] at a time. A
//! client that does not send or read in time is disconnected; earlier if another client needs its place.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io,
    io::{BufRead as _, BufReader, Write as _},
    net::Shutdown,
    os::fd::AsRawFd as _,
    os::unix::{
        fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use nix::{
    errno::Errno,
    fcntl::{Flock, OFlag},
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, recv, socket,
        sockopt::PeerCredentials,
    },
    unistd::{Gid, geteuid},
};
use palisade_flowlog::Flow;
use serde::Serialize;
use tracing::{debug, warn};

use crate::trusted_path::{lock_file, socket_dir};

use super::{
    MAX_REQUEST,
    api::{Answer, FlowAnswer, Request},
};

/// Maximum number of clients at the same time; each client has a thread.
const MAX_CLIENTS: usize = 64;
/// Time within which a client must send its whole request.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);
/// Size of the chunks in which an answer is sent, bytes.
const WRITE_CHUNK_BYTES: usize = 64 * 1024;
/// Time within which a client must read each chunk.
const WRITE_DEADLINE: Duration = Duration::from_secs(5);

/// Time after which a client that does not read a chunk gives its place to another client.
const STALL: Duration = Duration::from_millis(100);

/// Deadline for the whole answer; it does not apply to a client that follows flows.
const ANSWER_DEADLINE: Duration = Duration::from_secs(180);
/// Maximum number of clients that follow flows; the remaining connections stay free for other requests.
const MAX_FOLLOWERS: usize = MAX_CLIENTS - 16;

/// Longest wait for clients when the daemon ends. Clients that follow flows do not disconnect by themselves.
const CLOSE_GRACE_PERIOD: Duration = Duration::from_millis(300);

/// Writes the lines of an answer.
pub(crate) trait Sink {
    /// Sends a line now.
    fn send(&mut self, answer: &Answer) -> io::Result<()>;
    /// Appends a line to the buffer. The buffer is sent by the next [`Sink::send`] or [`Sink::flush`], or when it is
    /// full.
    fn queue(&mut self, answer: &Answer) -> io::Result<()>;
    /// Appends [`Answer::Flow`] with this flow, without a copy of the flow.
    fn queue_flow(&mut self, flow: &Flow) -> io::Result<()>;
    /// Sends the buffer.
    fn flush(&mut self) -> io::Result<()>;
    /// Returns whether the client has disconnected.
    fn closed(&self) -> bool;
    /// Marks the answer as a stream without an end. Returns false, and does nothing, if too many clients follow flows
    /// already.
    fn follow(&mut self) -> bool;
}

/// Answers requests, each on the thread of its client.
pub(crate) trait Handler: Send + Sync + 'static {
    /// Answers a request by at least one line.
    fn handle(&self, request: Request, sink: &mut dyn Sink) -> io::Result<()>;
}

/// Counters of the server.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Connected clients.
    pub clients: AtomicUsize,
    /// Clients that follow flows.
    pub followers: AtomicUsize,
    /// Clients that were disconnected because they did not send their request or read the answer in time.
    pub slow: AtomicU64,
    /// Clients that were refused because there were too many.
    pub refused: AtomicU64,
    /// Clients for which the server waits, in the order in which this began.
    waits: Mutex<VecDeque<Wait>>,
}

/// A client for which the server waits.
#[derive(Debug)]
struct Wait {
    client: Weak<UnixStream>,
    since: Instant,
    /// Whether the client must read; otherwise it must send its request.
    is_write: bool,
}

impl Counts {
    /// Disconnects the client for which the server has waited for the longest time. Returns whether there was one.
    fn disconnect_waiting(&self) -> bool {
        let mut waits = self.waits();
        let ends = |wait: &Wait| !wait.is_write || wait.since.elapsed() >= STALL;
        while let Some(at) = waits.iter().position(ends) {
            let client = waits.remove(at).and_then(|wait| wait.client.upgrade());
            // The thread of the client finds the stream at its end.
            if client.is_some_and(|stream| stream.shutdown(Shutdown::Both).is_ok()) {
                self.slow.fetch_add(1, Ordering::Relaxed);
                return true;
            }
        }
        false
    }

    fn begin_wait(&self, stream: &Arc<UnixStream>, is_write: bool) {
        self.waits().push_back(Wait {
            client: Arc::downgrade(stream),
            since: Instant::now(),
            is_write,
        });
    }

    fn end_wait(&self, stream: &Arc<UnixStream>) {
        self.waits()
            .retain(|wait| !std::ptr::eq(wait.client.as_ptr(), Arc::as_ptr(stream)));
    }

    fn waits(&self) -> MutexGuard<'_, VecDeque<Wait>> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The exclusive right to listen at a path, until the value is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    path: PathBuf,
    _lock: Flock<File>,
}

/// Takes the exclusive right to listen at a path. Makes the directory of the path if it is missing.
///
/// # Errors
/// Fails if another process has the right or listens at the path, if another user could replace the socket, or if the
/// path cannot be used for another reason.
/// `setting`: the option that error messages name.
pub(crate) fn claim(path: &Path, setting: &str) -> anyhow::Result<Claim> {
    let shown = || format!("{setting} {}", path.display());
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        bail!("{}: not a path of a socket", shown());
    };
    let path = socket_dir(parent).with_context(shown)?.join(name);
    let mut lock = path.clone().into_os_string();
    lock.push(".lock");
    let lock = PathBuf::from(lock);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlag::O_NOFOLLOW.bits())
        .open(&lock)
        .with_context(|| lock.display().to_string())?;
    let owner = file.metadata().with_context(|| lock.display().to_string())?.uid();
    if owner != 0 && owner != geteuid().as_raw() {
        bail!(
            "{}: belongs to user {owner}, not to root: remove it",
            lock.display()
        );
    }
    let lock = lock_file(file, &lock, setting)?;
    match fs::symlink_metadata(&path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            bail!("{}: is there already and is not a socket", shown());
        }
        // An older version of the daemon listens without the lock.
        Ok(_) if is_alive(&path) => {
            bail!(
                "{}: a process listens there already; end it with `palisade stop`",
                shown()
            );
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).with_context(shown),
        Ok(_) | Err(_) => {}
    }
    Ok(Claim { path, _lock: lock })
}

/// Returns whether a process listens at a socket; also true if this cannot be determined. Does not wait if the queue of
/// the listener is full.
fn is_alive(path: &Path) -> bool {
    let connected = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        None,
    )
    .and_then(|socket| connect(socket.as_raw_fd(), &UnixAddr::new(path)?));
    // EAGAIN means a listener with a full queue (connect(2)). Only ECONNREFUSED and ENOENT mean that no process
    // listens.
    !matches!(connected, Err(Errno::ECONNREFUSED | Errno::ENOENT))
}

/// The socket at the path of a claim. It is removed when the value is dropped.
#[derive(Debug)]
pub(crate) struct Bound {
    claim: Claim,
    /// Device and inode of the socket.
    made: (u64, u64),
}

/// The listening socket. It is removed when the value is dropped.
#[derive(Debug)]
pub(crate) struct Socket {
    _bound: Bound,
    /// Counters of the server.
    pub counts: Arc<Counts>,
}

impl Socket {
    /// Waits up to [`CLOSE_GRACE_PERIOD`] until all clients have their answers, because the threads of the clients end
    /// with the process. Then removes the socket.
    pub(crate) fn close(self) {
        let until = Instant::now() + CLOSE_GRACE_PERIOD;
        while self.counts.clients.load(Ordering::SeqCst) > 0 && Instant::now() < until {
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        // If another process has bound a new socket at this path, that socket must stay.
        let there = fs::symlink_metadata(&self.claim.path);
        if there.is_ok_and(|there| (there.dev(), there.ino()) == self.made) {
            let _ = fs::remove_file(&self.claim.path);
        }
    }
}

/// Makes the socket at the path of the claim. Only root and the members of `group` can connect to it.
pub(crate) fn bind(claim: Claim, group: Option<Gid>) -> io::Result<(UnixListener, Bound)> {
    // The socket is bound under a temporary name, made private and then renamed, so that no other user can ever
    // connect.
    let private = claim.path.with_extension(format!("{}", std::process::id()));
    let _ = fs::remove_file(&private);
    let listener = UnixListener::bind(&private)?;
    fs::set_permissions(&private, fs::Permissions::from_mode(0o600))?;
    if let Some(group) = group {
        std::os::unix::fs::chown(&private, None, Some(group.as_raw()))?;
        fs::set_permissions(&private, fs::Permissions::from_mode(0o660))?;
    }
    let made = fs::symlink_metadata(&private)?;
    fs::rename(&private, &claim.path)?;
    let bound = Bound {
        claim,
        made: (made.dev(), made.ino()),
    };
    Ok((listener, bound))
}

/// Listens at the path of the claim and starts the thread that accepts clients.
pub(crate) fn listen(claim: Claim, handler: Arc<impl Handler>) -> io::Result<Socket> {
    let (listener, bound) = bind(claim, None)?;
    let counts = Arc::new(Counts::default());
    let socket = Socket {
        _bound: bound,
        counts: Arc::clone(&counts),
    };
    thread::Builder::new().name("control".into()).spawn(move || {
        for stream in listener.incoming() {
            match stream {
                Ok(stream) => accept(stream, &handler, &counts),
                Err(error) => {
                    warn!(%error, "a client cannot be accepted");
                    // The process probably has no free file descriptor (EMFILE). An immediate retry would fail too.
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    })?;
    Ok(socket)
}

fn accept<H: Handler>(stream: UnixStream, handler: &Arc<H>, counts: &Arc<Counts>) {
    // Besides the file's mode, the user id that the kernel reports for the client's process is checked (SO_PEERCRED).
    let root = getsockopt(&stream, PeerCredentials).is_ok_and(|credentials| credentials.uid() == 0);
    if !root {
        refuse(stream, "only root may talk to the daemon");
        return;
    }
    if counts.clients.fetch_add(1, Ordering::SeqCst) >= MAX_CLIENTS && !counts.disconnect_waiting() {
        counts.clients.fetch_sub(1, Ordering::SeqCst);
        counts.refused.fetch_add(1, Ordering::Relaxed);
        refuse(stream, "too many clients at the same time; try again");
        return;
    }
    let stream = Arc::new(stream);
    counts.begin_wait(&stream, false);
    let (handler, counts_of_client) = (Arc::clone(handler), Arc::clone(counts));
    let spawned = thread::Builder::new().name("client".into()).spawn(move || {
        if let Err(error) = serve(stream, handler.as_ref(), &counts_of_client) {
            if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) {
                counts_of_client.slow.fetch_add(1, Ordering::Relaxed);
            }
            debug!(%error, "a client is disconnected");
        }
        counts_of_client.clients.fetch_sub(1, Ordering::SeqCst);
    });
    if let Err(error) = spawned {
        counts.clients.fetch_sub(1, Ordering::SeqCst);
        warn!(%error, "no thread can be started for a client");
    }
}

fn refuse(stream: UnixStream, why: &str) {
    let mut line = serde_json::to_vec(&Answer::Error(why.to_owned())).unwrap_or_default();
    line.push(b'\n');
    // An error is ignored, because a refused client can have disconnected.
    let _ = write_all(&stream, &line, Duration::from_millis(100), None);
}

fn serve(stream: Arc<UnixStream>, handler: &impl Handler, counts: &Counts) -> io::Result<()> {
    let line = read_request(&stream);
    counts.end_wait(&stream);
    let line = line?;
    let mut sink = StreamSink {
        stream,
        buffer: Vec::new(),
        until: Some(Instant::now() + ANSWER_DEADLINE),
        counts,
    };
    match line {
        Line::Request(line) => match serde_json::from_slice::<Request>(&line) {
            Ok(request) => handler.handle(request, &mut sink),
            Err(error) => sink.send(&Answer::Error(format!(
                "the request cannot be read ({error}); are the command and the daemon of the same version?"
            ))),
        },
        Line::TooLong => sink.send(&Answer::Error(format!(
            "the request is longer than {MAX_REQUEST} bytes"
        ))),
        Line::Closed => Ok(()),
    }
}

enum Line {
    Request(Vec<u8>),
    TooLong,
    Closed,
}

/// Reads one line. The deadline is for the whole line, so that a client that sends single bytes cannot prolong it.
fn read_request(stream: &UnixStream) -> io::Result<Line> {
    let deadline = Instant::now() + REQUEST_DEADLINE;
    let mut line = Vec::new();
    let mut reader = BufReader::new(stream);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(Line::Closed);
        }
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(buffer.len(), |end| end + 1);
        if line.len() + taken > MAX_REQUEST {
            return Ok(Line::TooLong);
        }
        line.extend_from_slice(&buffer[..taken]);
        reader.consume(taken);
        if end.is_some() {
            return Ok(Line::Request(line));
        }
    }
}

/// Writes all bytes in chunks. The deadline is for a whole chunk, so that a client that reads single bytes also counts
/// as slow.
fn write_all(
    mut stream: &UnixStream,
    bytes: &[u8],
    deadline: Duration,
    at_last: Option<Instant>,
) -> io::Result<()> {
    for piece in bytes.chunks(WRITE_CHUNK_BYTES) {
        let until = Instant::now() + deadline;
        let until = at_last.map_or(until, |at_last| until.min(at_last));
        let mut rest = piece;
        while !rest.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            stream.set_write_timeout(Some(left))?;
            match stream.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

struct StreamSink<'a> {
    stream: Arc<UnixStream>,
    buffer: Vec<u8>,
    /// Deadline of the whole answer; `None` if the client follows flows.
    until: Option<Instant>,
    counts: &'a Counts,
}

impl Drop for StreamSink<'_> {
    fn drop(&mut self) {
        if self.until.is_none() {
            self.counts.followers.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl StreamSink<'_> {
    /// Appends a line to the buffer, and sends a full buffer.
    fn line(&mut self, answer: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.buffer, answer)?;
        self.buffer.push(b'\n');
        if self.buffer.len() >= WRITE_CHUNK_BYTES {
            self.flush()
        } else {
            Ok(())
        }
    }
}

impl Sink for StreamSink<'_> {
    fn send(&mut self, answer: &Answer) -> io::Result<()> {
        self.queue(answer)?;
        self.flush()
    }

    fn queue(&mut self, answer: &Answer) -> io::Result<()> {
        self.line(answer)
    }

    fn queue_flow(&mut self, flow: &Flow) -> io::Result<()> {
        self.line(&FlowAnswer::Flow(flow))
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.counts.begin_wait(&self.stream, true);
        let written = write_all(&self.stream, &self.buffer, WRITE_DEADLINE, self.until);
        self.counts.end_wait(&self.stream);
        self.buffer.clear();
        written
    }

    fn follow(&mut self) -> bool {
        if self.until.is_none() {
            return true;
        }
        if self.counts.followers.fetch_add(1, Ordering::SeqCst) >= MAX_FOLLOWERS {
            self.counts.followers.fetch_sub(1, Ordering::SeqCst);
            return false;
        }
        self.until = None;
        true
    }

    fn closed(&self) -> bool {
        // Clients send nothing after their request, so readable data, an end of file or an error counts as a
        // disconnect.
        let nothing = recv(
            self.stream.as_raw_fd(),
            &mut [0; 1],
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK,
        );
        nothing != Err(Errno::EAGAIN)
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, sync::Mutex};

    use super::*;
    use crate::control::client::{self, Client, ClientError};

    /// Limit for steps that need only CPU time, on a machine under load.
    const LONG: Duration = Duration::from_secs(60);
    const SETTING: &str = "[node] socket";

    struct Echo(Mutex<Vec<Request>>);

    impl Handler for Echo {
        fn handle(&self, request: Request, sink: &mut dyn Sink) -> io::Result<()> {
            let flood = matches!(&request, Request::Observe(_));
            // A long preparation of the answer.
            while request == Request::PolicySelectors && !sink.closed() {
                thread::sleep(Duration::from_millis(2));
            }
            self.0.lock().unwrap().push(request);
            if flood {
                assert!(sink.follow());
                let big = Answer::Ok("x".repeat(1 << 16).into());
                while !sink.closed() {
                    sink.send(&big)?;
                }
            }
            sink.send(&Answer::Ok(serde_json::json!({"answer": 42})))
        }
    }

    fn server() -> (tempfile::TempDir, PathBuf, Arc<Echo>, Socket) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("palisade.sock");
        let handler = Arc::new(Echo(Mutex::default()));
        let socket = listen(claim(&path, SETTING).unwrap(), Arc::clone(&handler)).unwrap();
        (dir, path, handler, socket)
    }

    fn raw(path: &Path, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).unwrap();
        // The server can answer and close the connection before all bytes are sent.
        let _ = stream.write_all(bytes);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    #[test]
    fn a_request_is_answered_on_a_private_socket() {
        let (_dir, path, handler, socket) = server();
        let answer: serde_json::Value = client::ask(&path, &Request::IdentityGet { identity: 7 }).unwrap();
        assert_eq!(answer["answer"], 42);
        assert_eq!(*handler.0.lock().unwrap(), [Request::IdentityGet { identity: 7 }]);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(socket);
        assert!(!path.exists());
        let error = client::ask::<()>(&path, &Request::Status).unwrap_err();
        assert!(matches!(error, ClientError::NotRunning { .. }), "{error}");
    }

    #[test]
    fn malformed_requests_are_refused_and_the_server_continues() {
        let (_dir, path, handler, _socket) = server();
        let too_long = vec![b'x'; MAX_REQUEST * 2];
        for (hostile, wanted) in [
            (&b"\n"[..], "cannot be read"),
            (
                b"{\"command\":\"identity-get\",\"identity\":-1}\n",
                "cannot be read",
            ),
            (b"{\"command\":\"format-disk\"}\n", "cannot be read"),
            (b"\xff\xfe\x00\n", "cannot be read"),
            (b"[[[[[[[[[[[[[[[[[[[[[[[[[\n", "cannot be read"),
            (&too_long, "longer than"),
            (&[b'['; 60_000], ""),
        ] {
            let stream_answer = if wanted.is_empty() {
                let mut stream = UnixStream::connect(&path).unwrap();
                stream.write_all(hostile).unwrap();
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                answer
            } else {
                raw(&path, hostile)
            };
            assert!(stream_answer.contains(wanted), "{stream_answer:?}");
        }
        assert!(handler.0.lock().unwrap().is_empty());
        client::ask::<serde_json::Value>(&path, &Request::Status).unwrap();
    }

    #[test]
    fn a_deeply_nested_request_does_not_overflow_the_stack() {
        let (_dir, path, _handler, _socket) = server();
        let mut nested = vec![b'['; 60_000];
        nested.push(b'\n');
        assert!(raw(&path, &nested).contains("cannot be read"));
    }

    #[test]
    fn clients_beyond_the_limit_are_refused() {
        let (_dir, path, _handler, socket) = server();
        let busy: Vec<_> = (0..MAX_CLIENTS)
            .map(|_| Client::send(&path, &Request::PolicySelectors).unwrap())
            .collect();
        // Their requests are complete.
        let until = Instant::now() + LONG;
        while socket.counts.clients.load(Ordering::SeqCst) < MAX_CLIENTS || !socket.counts.waits().is_empty()
        {
            assert!(Instant::now() < until, "they are not connected");
            thread::sleep(Duration::from_millis(5));
        }
        let error = client::ask::<()>(&path, &Request::Status).unwrap_err();
        assert!(error.to_string().contains("too many clients"), "{error}");
        assert_eq!(socket.counts.refused.load(Ordering::Relaxed), 1);
        drop(busy);
        let until = Instant::now() + LONG;
        while client::ask::<serde_json::Value>(&path, &Request::Status).is_err() {
            assert!(
                Instant::now() < until,
                "the places of clients that went are not free"
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn clients_without_a_complete_request_give_their_places_to_others() {
        let (_dir, path, _handler, socket) = server();
        let begun = Instant::now();
        let half = || {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(b"{\"command\"").unwrap();
            stream
        };
        let mut silent: Vec<UnixStream> = (0..2 * MAX_CLIENTS).map(|_| half()).collect();
        for _ in 0..10 {
            client::ask::<serde_json::Value>(&path, &Request::Status).unwrap();
            silent.push(half());
        }
        // Not by the deadline.
        assert!(begun.elapsed() < REQUEST_DEADLINE, "{:?}", begun.elapsed());
        let slow = socket.counts.slow.load(Ordering::Relaxed);
        assert!(slow >= MAX_CLIENTS as u64, "{slow}");
        assert_eq!(socket.counts.refused.load(Ordering::Relaxed), 0);
        let mut oldest = String::new();
        assert_eq!(silent[0].read_to_string(&mut oldest).unwrap(), 0);
        drop(silent);
        let until = Instant::now() + LONG;
        while socket.counts.clients.load(Ordering::SeqCst) > 0 {
            assert!(Instant::now() < until, "their places are not free");
            thread::sleep(Duration::from_millis(10));
        }
        assert!(socket.counts.waits().is_empty());
    }

    #[test]
    fn clients_that_do_not_read_give_their_places_to_others() {
        let (_dir, path, _handler, socket) = server();
        let begun = Instant::now();
        let deaf: Vec<_> = (0..MAX_FOLLOWERS)
            .map(|_| Client::send(&path, &Request::Observe(Default::default())).unwrap())
            .collect();
        // The other places have clients whose answers are prepared.
        socket
            .counts
            .clients
            .fetch_add(MAX_CLIENTS - MAX_FOLLOWERS, Ordering::SeqCst);
        let until = begun + LONG;
        let waiting = || {
            socket
                .counts
                .waits()
                .iter()
                .filter(|wait| wait.since.elapsed() >= STALL)
                .count()
        };
        while waiting() < MAX_FOLLOWERS {
            assert!(Instant::now() < until, "they are not waited for");
            thread::sleep(Duration::from_millis(5));
        }
        for _ in 0..3 {
            client::ask::<serde_json::Value>(&path, &Request::Status).unwrap();
        }
        assert_eq!(socket.counts.refused.load(Ordering::Relaxed), 0);
        assert!((1..=3).contains(&socket.counts.slow.load(Ordering::Relaxed)));
        // Not by the deadline.
        assert!(begun.elapsed() < WRITE_DEADLINE, "{:?}", begun.elapsed());
        drop(deaf);
    }

    #[test]
    fn a_client_that_does_not_read_is_disconnected_and_counted() {
        let (_dir, path, _handler, socket) = server();
        let client = Client::send(&path, &Request::Observe(Default::default())).unwrap();
        let until = Instant::now() + WRITE_DEADLINE + LONG;
        while socket.counts.slow.load(Ordering::Relaxed) == 0 {
            assert!(Instant::now() < until, "it was not cut off");
            thread::sleep(Duration::from_millis(50));
        }
        drop(client);
    }

    #[test]
    fn a_silent_client_is_disconnected() {
        let (_dir, path, _handler, socket) = server();
        let begun = Instant::now();
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(REQUEST_DEADLINE + LONG)).unwrap();
        stream.write_all(b"{").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "");
        // Disconnected by the deadline, not before.
        assert!(begun.elapsed() >= REQUEST_DEADLINE);
        let until = Instant::now() + LONG;
        while socket.counts.slow.load(Ordering::Relaxed) == 0 {
            assert!(Instant::now() < until, "it was not counted");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(claim(&path, SETTING).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn only_a_dead_socket_is_replaced() {
        let (_dir, path, _handler, socket) = server();
        let error = claim(&path, SETTING).unwrap_err().to_string();
        assert!(error.contains("another palisade daemon"), "{error}");
        client::ask::<serde_json::Value>(&path, &Request::Status).unwrap();
        drop(socket);

        // A listener that has not taken the lock, first with space in its queue, then with a full queue.
        let listener = UnixListener::bind(&path).unwrap();
        for _ in 0..3 {
            let error = claim(&path, SETTING).unwrap_err().to_string();
            assert!(error.contains("a process listens there already"), "{error}");
            nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        }
        drop(listener);
        assert!(path.exists());
        claim(&path, SETTING).unwrap();
    }

    #[test]
    fn the_socket_of_another_process_is_not_removed() {
        let (_dir, path, _handler, socket) = server();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
    }
}
