//! The command line's side of the control socket.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::de::DeserializeOwned;

use super::{
    MAX_ANSWER,
    api::{Answer, Request},
};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "the daemon is not running ({socket}: {error}); start it with `systemctl start palisade` or `palisade run`"
    )]
    NotRunning {
        /// The socket.
        socket: PathBuf,
        /// What connecting gave.
        error: io::Error,
    },
    /// The socket is not for this user.
    #[error("{socket}: {error}; the daemon answers only root: use sudo")]
    NotPermitted {
        /// The socket.
        socket: PathBuf,
        /// What connecting gave.
        error: io::Error,
    },
    /// The connection broke, or what came is not the protocol.
    #[error("the daemon's answer cannot be read: {0}")]
    Broken(io::Error),
    /// The daemon says what is wrong with the request.
    #[error("{0}")]
    Refused(String),
}

/// A connection on which a request was sent.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects and sends the request.
    pub fn send(socket: &Path, request: &Request) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(socket).map_err(|error| {
            let socket = socket.to_owned();
            match error.kind() {
                io::ErrorKind::PermissionDenied => ClientError::NotPermitted { socket, error },
                _ => ClientError::NotRunning { socket, error },
            }
        })?;
        let mut line = serde_json::to_vec(request).map_err(|error| ClientError::Broken(error.into()))?;
        line.push(b'\n');
        (&stream).write_all(&line).map_err(ClientError::Broken)?;
        Ok(Self {
            reader: BufReader::new(stream),
        })
    }

    /// How long to wait for each line; by default for ever.
    pub fn set_timeout(&self, timeout: Duration) -> Result<(), ClientError> {
        let stream = self.reader.get_ref();
        stream
            .set_read_timeout(Some(timeout))
            .map_err(ClientError::Broken)
    }

    /// The next line; `None` once the daemon has closed the connection.
    pub fn next(&mut self) -> Result<Option<Answer>, ClientError> {
        let mut line = Vec::new();
        let limit = MAX_ANSWER as u64;
        let read = io::Read::take(&mut self.reader, limit).read_until(b'\n', &mut line);
        match read.map_err(ClientError::Broken)? {
            0 => Ok(None),
            _ => serde_json::from_slice(&line)
                .map(Some)
                .map_err(|error| ClientError::Broken(error.into())),
        }
    }

    /// The answer to a request that has one.
    pub fn answer<T: DeserializeOwned>(mut self) -> Result<T, ClientError> {
        match self.next()? {
            Some(Answer::Ok(value)) => {
                serde_json::from_value(value).map_err(|error| ClientError::Broken(error.into()))
            }
            Some(Answer::Error(message)) => Err(ClientError::Refused(message)),
            Some(Answer::Flow(_) | Answer::Lost(_)) => Err(ClientError::Broken(io::Error::other(
                "a stream came where one answer was expected",
            ))),
            None => Err(ClientError::Broken(io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

/// One request, one answer.
pub fn ask<T: DeserializeOwned>(socket: &Path, request: &Request) -> Result<T, ClientError> {
    Client::send(socket, request)?.answer()
}
