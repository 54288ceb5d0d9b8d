//! Limits and counters of Kafka inspection.

use palisade_protocols::kafka::ParseError;

use crate::tcp::{TcpLimits, TcpStats};

/// Limits of Kafka inspection, per worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KafkaLimits {
    /// Limits of Kafka connections. Their deadline is that of an incomplete request.
    pub tcp: TcpLimits,
    /// Longest request whose topics get a verdict, bytes, and longest Metadata response whose topic ids are learned.
    pub max_request: usize,
    /// Whether the name of a topic id that one server tells counts at other servers under the same rules, except servers in
    /// the world.
    pub share_topic_ids: bool,
}

impl KafkaLimits {
    /// Returns the limits with this longest request, for which a connection has to keep that many bytes.
    #[must_use]
    pub fn with_max_request(self, max_request: usize) -> Self {
        /// Room for a packet beside the longest request, bytes.
        const ROOM: usize = 64 << 10;
        Self {
            max_request,
            share_topic_ids: self.share_topic_ids,
            tcp: TcpLimits {
                bytes_per_direction: max_request.saturating_add(ROOM),
                ..self.tcp
            },
        }
    }
}

impl Default for KafkaLimits {
    fn default() -> Self {
        let limits = Self {
            tcp: TcpLimits {
                frames_per_direction: 2048,
                window: 64 << 10,
                limits_senders: true,
                ..TcpLimits::default()
            },
            max_request: 0,
            share_topic_ids: true,
        };
        // Clients send requests of a little more than 1 MiB by default (`max.request.size`, `message.max.bytes`).
        limits.with_max_request(2 << 20)
    }
}

/// Counters of Kafka inspection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KafkaStats {
    /// Counters of Kafka connections.
    pub tcp: TcpStats,
    /// Requests with a well-formed header.
    pub requests: u64,
    /// Requests that no rule allows.
    pub denied: u64,
    /// Denied requests that name a topic by an id that no Metadata response has told.
    pub unknown_topic_ids: u64,
    /// Denied Fetch requests that continue a session whose begin was not seen.
    pub unknown_sessions: u64,
    /// Responses to requests.
    pub responses: u64,
    /// Topic ids that Metadata responses have told, also if they were known.
    pub topic_ids: u64,
    /// Topic ids that Metadata responses have told with another name than a known one.
    pub contradicting_topic_ids: u64,
    /// Malformed streams, by [`ParseError`].
    pub malformed: [u64; ParseError::ALL.len()],
    /// Requests and connections that were forwarded only because of audit mode.
    pub audited: u64,
}

impl Default for KafkaStats {
    fn default() -> Self {
        Self {
            tcp: TcpStats::default(),
            requests: 0,
            denied: 0,
            unknown_topic_ids: 0,
            unknown_sessions: 0,
            responses: 0,
            topic_ids: 0,
            contradicting_topic_ids: 0,
            malformed: [0; _],
            audited: 0,
        }
    }
}
