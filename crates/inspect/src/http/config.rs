//! Limits, options and counters of HTTP inspection.

use std::sync::Arc;

use palisade_model::request::{GetBodies, Paths};
use palisade_protocols::http1;

use crate::tcp::{TcpLimits, TcpStats};

/// Limits and options of HTTP inspection, per worker.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HttpLimits {
    /// Limits of HTTP connections. Their `deadline` applies to an incomplete head.
    pub tcp: TcpLimits,
    /// Limits of a message head.
    pub head: http1::Limits,
    /// Form in which a path is matched.
    pub paths: Paths,
    /// Handling of a request that has a body although requests with its method usually have no body.
    pub get_bodies: GetBodies,
    /// Names of the header fields that records show, compared without regard to case. A field with a secret is shown
    /// without its value.
    pub record_headers: Arc<[String]>,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            tcp: TcpLimits {
                bytes_per_direction: 256 << 10,
                window: 64 << 10,
                ..TcpLimits::default()
            },
            head: http1::Limits::default(),
            paths: Paths::default(),
            get_bodies: GetBodies::default(),
            record_headers: Arc::default(),
        }
    }
}

/// Counters of HTTP inspection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HttpStats {
    /// Counters of HTTP connections.
    pub tcp: TcpStats,
    /// Well-formed requests.
    pub requests: u64,
    /// Requests that no rule allows.
    pub denied: u64,
    /// Final responses to requests.
    pub responses: u64,
    /// Unsolicited responses.
    pub unsolicited: u64,
    /// Connections that became a tunnel (CONNECT) or switched to another protocol (101).
    pub tunnels: u64,
    /// Malformed streams, by [`http1::ParseError`].
    pub malformed: [u64; http1::ParseError::ALL.len()],
    /// Requests and connections that were forwarded only because of audit mode.
    pub audited: u64,
}

impl Default for HttpStats {
    fn default() -> Self {
        Self {
            tcp: TcpStats::default(),
            requests: 0,
            denied: 0,
            responses: 0,
            unsolicited: 0,
            tunnels: 0,
            malformed: [0; _],
            audited: 0,
        }
    }
}
