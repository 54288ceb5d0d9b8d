//! TCP connections as the kernel's tables describe them.

use std::{io, path::PathBuf};

use palisade_abi::{
    Addr,
    tcp_flags::{ACK, FIN, SYN},
};

use crate::SyscallError;

/// Error of reading the connections of the kernel.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// A network namespace could not be entered.
    #[error("{path}: cannot enter the network namespace: {source}")]
    Netns {
        /// Path of the namespace.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A table could not be read.
    #[error("reading the kernel's connections: {0}")]
    Syscall(#[from] SyscallError),
}

/// End of a connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct End {
    /// Address.
    pub addr: Addr,
    /// Port.
    pub port: u16,
}

/// TCP connection of a kernel table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Connection {
    /// End that sent the first SYN.
    pub opener: End,
    /// End that received the first SYN.
    pub responder: End,
    /// State of the connection.
    pub progress: Progress,
}

/// State of a TCP connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Progress {
    /// Only the opener has sent packets.
    Opening,
    /// Both ends have sent packets.
    Established,
    /// The opener has sent FIN.
    OpenerClosed,
    /// The responder has sent FIN.
    ResponderClosed,
    /// Both ends have sent FIN.
    Closed,
}

impl Progress {
    /// Returns the TCP flags that opener and responder have sent in this state.
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

/// Returns the connection as the opener sees it and, if NAT translates it, also as the responder sees it. `original`
/// and `reply` are (source, destination) of the two directions.
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

#[cfg(test)]
pub(super) mod fixtures {
    //! Ends and connections for the tests of the tables' parsers.

    use super::*;

    /// Parses `address:port`.
    pub(in crate::seed) fn end(text: &str) -> End {
        let at: std::net::SocketAddr = text.parse().unwrap();
        End {
            addr: at.ip().into(),
            port: at.port(),
        }
    }

    /// Returns an established connection.
    pub(in crate::seed) fn tcp(opener: &str, responder: &str) -> Connection {
        Connection {
            opener: end(opener),
            responder: end(responder),
            progress: Progress::Established,
        }
    }
}
