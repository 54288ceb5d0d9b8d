//! TCP connections of the kernel's tables.

use std::{io, path::PathBuf};

use palisade_abi::{
    Addr,
    tcp_flags::{ACK, FIN, SYN},
};

use crate::SyscallError;

/// The connections could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// A network namespace could not be entered.
    #[error("{path}: cannot enter the network namespace: {source}")]
    Netns {
        /// Where it is mounted.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A table could not be read.
    #[error("reading the kernel's connections: {0}")]
    Syscall(#[from] SyscallError),
}

/// One end of a connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct End {
    /// Its address.
    pub addr: Addr,
    /// Its port.
    pub port: u16,
}

/// A TCP connection of the kernel's tables.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Connection {
    /// Who opened it.
    pub opener: End,
    /// Whom.
    pub responder: End,
    /// What TCP has done so far.
    pub progress: Progress,
}

/// How far a connection is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Progress {
    /// One side has sent.
    Opening,
    /// Both sides have sent.
    Established,
    /// The opener has sent FIN.
    OpenerClosed,
    /// The responder has sent FIN.
    ResponderClosed,
    /// Both have sent FIN.
    Closed,
}

impl Progress {
    /// The TCP flags that the opener and the responder must have sent.
    pub(super) fn tcp_flags(self) -> (u8, u8) {
        match self {
            Self::Opening => (SYN, 0),
            Self::Established => (SYN | ACK, SYN | ACK),
            Self::OpenerClosed => (SYN | ACK | FIN, SYN | ACK),
            Self::ResponderClosed => (SYN | ACK, SYN | ACK | FIN),
            Self::Closed => (SYN | ACK | FIN, SYN | ACK | FIN),
        }
    }
}

/// A connection whose tuples (source, destination) are given for both directions.
pub(super) fn both_views(
    progress: Progress,
    original: (End, End),
    reply: (End, End),
) -> [Option<Connection>; 2] {
    let of_opener = Connection {
        opener: original.0,
        responder: original.1,
        progress,
    };
    let of_responder = Connection {
        opener: reply.1,
        responder: reply.0,
        progress,
    };
    [
        Some(of_opener),
        (of_responder != of_opener).then_some(of_responder),
    ]
}
