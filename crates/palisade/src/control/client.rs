//! Client of the control socket.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::{fd::AsRawFd as _, unix::net::UnixStream},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, setsockopt, socket,
            sockopt::{PeerCredentials, SendTimeout},
        },
        time::{TimeVal, TimeValLike as _},
    },
    unistd::geteuid,
};
use serde::de::DeserializeOwned;

use super::{
    MAX_ANSWER,
    api::{Answer, Request},
};

/// Longest wait for a connection, and for each part of an answer unless [`CHANGE_TIMEOUT`] applies.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for each part of the answer to a stop, a reload, a change of options, a flush of a large table or a capture,
/// whose programs the control thread attaches. The daemon itself gives up after a minute.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(70);
/// Lower limit of the wait for a daemon, even if the caller asks for less.
const MIN_TIMEOUT: Duration = Duration::from_millis(500);

/// Error of a request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// The client cannot connect to the socket, probably because no daemon runs.
    #[error(
        "the daemon is not running ({socket}: {error}); start it with `systemctl start palisade` or `palisade run`"
    )]
    NotRunning {
        /// Path of the socket.
        socket: PathBuf,
        /// Error of connect(2).
        error: io::Error,
    },
    /// The user of this process has no permission to connect to the socket.
    #[error("{socket}: {error}; the daemon answers only root: use sudo")]
    NotPermitted {
        /// Path of the socket.
        socket: PathBuf,
        /// Error of connect(2).
        error: io::Error,
    },
    /// A process of another user listens at the socket.
    #[error("{socket}: belongs to a process of user {uid}, not to a daemon of root: remove it")]
    NotRoot {
        /// Path of the socket.
        socket: PathBuf,
        /// User of the process.
        uid: u32,
    },
    /// The daemon does not accept the connection or does not answer in time.
    #[error(
        "the daemon (process {pid}) has not answered for {:.1} s: it hangs, is stopped, or the node is overloaded. What \
         it attached goes on enforcing the last policy. `systemctl restart palisade` starts it anew", waited.as_secs_f64()
    )]
    Hangs {
        /// Process id of the daemon, from the socket's credentials; 0 if the connection was not accepted.
        pid: i32,
        /// Time that the client has waited.
        waited: Duration,
    },
    /// The connection has failed, or the answer violates the protocol.
    #[error("the daemon's answer cannot be read: {0}")]
    Broken(io::Error),
    /// The daemon has refused the request, for this reason.
    #[error("{0}")]
    Refused(String),
}

/// Size of the buffer for what the daemon sends: one of the chunks in which it sends flows, bytes.
const READ_BUFFER: usize = 64 * 1024;
/// What is before and after the flow in a line of [`Answer::Flow`].
const FLOW_BEGIN: &[u8] = b"{\"flow\":";
const FLOW_END: &[u8] = b"}\n";

fn is_flow(line: &[u8]) -> bool {
    line.len() > FLOW_BEGIN.len() + FLOW_END.len() && line.starts_with(FLOW_BEGIN) && line.ends_with(FLOW_END)
}

/// A line of an answer.
#[derive(Debug)]
pub(crate) enum Received<'a> {
    /// A flow in JSON.
    Flow(&'a str),
    /// Another line.
    Other(Answer),
}

/// A connection on which a request was sent.
#[derive(Debug)]
pub(crate) struct Client {
    reader: BufReader<UnixStream>,
    /// The last line.
    line: Vec<u8>,
    pid: i32,
}

impl Client {
    /// Connects and sends the request.
    pub(crate) fn send(socket: &Path, request: &Request) -> Result<Self, ClientError> {
        let changes = matches!(
            request,
            Request::Stop { .. }
                | Request::Restart
                | Request::Reload { .. }
                | Request::EndpointConfig { .. }
                | Request::BpfCtFlush(_)
                | Request::Capture(_)
                | Request::PolicyPlan(_)
                | Request::PolicyApply(_)
                | Request::PolicyConfirm { .. }
                | Request::PolicyCancel { .. }
        );
        if changes {
            // A ping shows within `READ_TIMEOUT` whether the daemon hangs, before the longer wait for a change.
            match ask_within::<serde_json::Value>(socket, &Request::Ping, READ_TIMEOUT) {
                // A daemon of an older version refuses the unknown request, which shows that the daemon answers.
                Ok(_) | Err(ClientError::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Self::send_within(
            socket,
            request,
            if changes { CHANGE_TIMEOUT } else { READ_TIMEOUT },
        )
    }

    fn send_within(path: &Path, request: &Request, timeout: Duration) -> Result<Self, ClientError> {
        let begun = Instant::now();
        let timeout = timeout.max(MIN_TIMEOUT);
        let failed = |error: Errno| {
            let (socket, error) = (path.to_owned(), io::Error::from(error));
            match error.kind() {
                io::ErrorKind::PermissionDenied => ClientError::NotPermitted { socket, error },
                // The queue of the listener was full until the timeout.
                io::ErrorKind::WouldBlock => ClientError::Hangs {
                    pid: 0,
                    waited: begun.elapsed(),
                },
                _ => ClientError::NotRunning { socket, error },
            }
        };
        let address = UnixAddr::new(path).map_err(failed)?;
        let socket = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .map_err(failed)?;
        // SO_SNDTIMEO also limits how long connect(2) waits for space in the listener's queue (`unix_stream_connect`).
        let send =
            TimeVal::milliseconds(i64::try_from(timeout.min(READ_TIMEOUT).as_millis()).unwrap_or(10_000));
        setsockopt(&socket, SendTimeout, &send).map_err(failed)?;
        connect(socket.as_raw_fd(), &address).map_err(failed)?;
        // Another user's process could have made the socket, and root must not trust the answers of that process.
        let peer = getsockopt(&socket, PeerCredentials).map_err(failed)?;
        if peer.uid() != 0 && peer.uid() != geteuid().as_raw() {
            return Err(ClientError::NotRoot {
                socket: path.to_owned(),
                uid: peer.uid(),
            });
        }
        let client = Self {
            reader: BufReader::with_capacity(READ_BUFFER, UnixStream::from(socket)),
            line: Vec::new(),
            pid: peer.pid(),
        };
        let set = client.reader.get_ref().set_read_timeout(Some(timeout));
        set.map_err(|error| client.broken(error, begun))?;
        let mut line = serde_json::to_vec(request).map_err(|error| ClientError::Broken(error.into()))?;
        line.push(b'\n');
        client
            .reader
            .get_ref()
            .write_all(&line)
            .map_err(|error| client.broken(error, begun))?;
        Ok(client)
    }

    fn broken(&self, error: io::Error, since: Instant) -> ClientError {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Hangs {
                pid: self.pid,
                waited: since.elapsed(),
            },
            _ => ClientError::Broken(error),
        }
    }

    /// Returns another handle of the connection.
    ///
    /// # Errors
    /// The error of dup(2).
    pub(crate) fn stream(&self) -> io::Result<UnixStream> {
        self.reader.get_ref().try_clone()
    }

    /// Returns the next line other than [`Answer::Alive`]; `None` once the daemon has closed the connection.
    pub(crate) fn next(&mut self) -> Result<Option<Answer>, ClientError> {
        loop {
            self.read_line()?;
            if self.line.is_empty() {
                return Ok(None);
            }
            match self.parsed()? {
                Answer::Alive => {}
                answer => return Ok(Some(answer)),
            }
        }
    }

    /// Like [`Self::next`], but returns a flow as the daemon has sent it, in JSON.
    pub(crate) fn next_raw(&mut self) -> Result<Option<Received<'_>>, ClientError> {
        loop {
            self.read_line()?;
            if self.line.is_empty() {
                return Ok(None);
            }
            if is_flow(&self.line) {
                let json = &self.line[FLOW_BEGIN.len()..self.line.len() - FLOW_END.len()];
                let json = std::str::from_utf8(json);
                return match json {
                    Ok(json) => Ok(Some(Received::Flow(json))),
                    Err(error) => Err(ClientError::Broken(io::Error::other(error))),
                };
            }
            match self.parsed()? {
                Answer::Alive => {}
                answer => return Ok(Some(Received::Other(answer))),
            }
        }
    }

    /// Returns whether another line has arrived, so that the next read does not wait.
    pub(crate) fn has_next(&self) -> bool {
        self.reader.buffer().contains(&b'\n')
    }

    fn parsed(&self) -> Result<Answer, ClientError> {
        serde_json::from_slice(&self.line).map_err(|error| ClientError::Broken(error.into()))
    }

    /// Reads the next line into `line`, or only its beginning if the connection ends or the line exceeds [`MAX_ANSWER`].
    /// The timeout restarts with each part of the line that arrives.
    fn read_line(&mut self) -> Result<(), ClientError> {
        self.line.clear();
        loop {
            // A read does not wait while the buffer has bytes, so most lines need no clock.
            let begun = self.reader.buffer().is_empty().then(Instant::now);
            let bytes = match self.reader.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.broken(error, begun.unwrap_or_else(Instant::now))),
                Ok(bytes) => bytes,
            };
            let end = bytes.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(bytes.len(), |end| end + 1);
            self.line.extend_from_slice(&bytes[..taken]);
            self.reader.consume(taken);
            if end.is_some() || taken == 0 || self.line.len() > MAX_ANSWER {
                return Ok(());
            }
        }
    }

    /// Returns the answer to a request that has exactly one.
    pub(crate) fn answer<T: DeserializeOwned>(mut self) -> Result<T, ClientError> {
        match self.next()? {
            Some(Answer::Ok(value)) => {
                serde_json::from_value(value).map_err(|error| ClientError::Broken(error.into()))
            }
            Some(Answer::Error(message)) => Err(ClientError::Refused(message)),
            Some(
                Answer::Flow(_)
                | Answer::Lost(_)
                | Answer::Agent(_)
                | Answer::Capture(_)
                | Answer::Connections(_)
                | Answer::Alive,
            ) => Err(ClientError::Broken(io::Error::other(
                "a stream came where one answer was expected",
            ))),
            None => Err(ClientError::Broken(io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

/// Sends a request and returns its answer.
pub(crate) fn ask<T: DeserializeOwned>(socket: &Path, request: &Request) -> Result<T, ClientError> {
    Client::send(socket, request)?.answer()
}

/// Sends a request and returns its answer. Fails if the daemon sends nothing for `timeout`, which is limited to the
/// range from [`MIN_TIMEOUT`] to [`READ_TIMEOUT`].
pub(crate) fn ask_within<T: DeserializeOwned>(
    socket: &Path,
    request: &Request,
    timeout: Duration,
) -> Result<T, ClientError> {
    Client::send_within(socket, request, timeout.min(READ_TIMEOUT))?.answer()
}
