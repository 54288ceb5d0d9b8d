//! Limits, options and counters of HTTP/2 inspection.

use std::sync::Arc;

use palisade_model::request::{GetBodies, Paths};
use palisade_protocols::{http1, http2::ParseError};

use crate::HttpLimits;

/// A rate limit: `burst` events at once, and `per_second` events in the long run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate {
    /// Number of events at once.
    pub burst: u32,
    /// Number of events per second.
    pub per_second: u32,
}

/// Limits and options of one HTTP/2 connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Http2Limits {
    /// Limits of a request head. `line` limits the path and each field, `block` the header list (RFC 9113, 6.5.2).
    pub head: http1::Limits,
    /// Form in which a path is matched.
    pub paths: Paths,
    /// Handling of a request that has a body although requests with its method usually have no body.
    pub get_bodies: GetBodies,
    /// Names of the header fields that records show, compared without regard to case.
    pub record_headers: Arc<[String]>,
    /// Maximum number of open streams.
    pub streams: u32,
    /// Maximum length of a frame, bytes. At least 16,384, the initial value of SETTINGS_MAX_FRAME_SIZE.
    pub frame: u32,
    /// Maximum length of an encoded header block, bytes.
    pub block: u32,
    /// Requests that the client resets before their response.
    pub resets: Rate,
    /// Denied and malformed requests.
    pub denials: Rate,
    /// Frames of one peer without content: PING, SETTINGS, WINDOW_UPDATE, empty DATA and others. Each frame with
    /// content, of either peer, permits four more, because peers update windows and measure bandwidth for such frames.
    pub control: Rate,
}

impl Default for Http2Limits {
    fn default() -> Self {
        Self::of(&HttpLimits::default())
    }
}

impl Http2Limits {
    /// Returns the limits of HTTP/2 that belong to limits of HTTP/1.
    #[must_use]
    pub fn of(http: &HttpLimits) -> Self {
        Self {
            head: http.head,
            paths: http.paths,
            get_bodies: http.get_bodies,
            record_headers: http.record_headers.clone(),
            streams: 256,
            frame: 65_536,
            block: 65_536,
            resets: Rate {
                burst: 1_000,
                per_second: 200,
            },
            denials: Rate {
                burst: 100_000,
                per_second: 100_000,
            },
            control: Rate {
                burst: 10_000,
                per_second: 1_000,
            },
        }
    }
}

/// Counters of HTTP/2 inspection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Http2Stats {
    /// Well-formed requests.
    pub requests: u64,
    /// Requests that no rule allows.
    pub denied: u64,
    /// Final responses of servers.
    pub responses: u64,
    /// Streams that became a tunnel (CONNECT).
    pub tunnels: u64,
    /// Requests that were forwarded only because of audit mode.
    pub audited: u64,
    /// Streams and connections that were refused, by [`ParseError`].
    pub malformed: [u64; ParseError::ALL.len()],
}

impl Default for Http2Stats {
    fn default() -> Self {
        Self {
            requests: 0,
            denied: 0,
            responses: 0,
            tunnels: 0,
            audited: 0,
            malformed: [0; _],
        }
    }
}

impl Http2Stats {
    pub(super) fn count(&mut self, error: ParseError) {
        if let Some(count) = self.malformed.get_mut(error as usize) {
            *count += 1;
        }
    }
}
