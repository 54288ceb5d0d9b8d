//! Limits, options and counters of DNS inspection.

use palisade_fqdn::{TrackLimits, Unsolicited};
use palisade_protocols::dns::ParseError;

use crate::{
    Millis,
    tcp::{TcpLimits, TcpStats},
};

/// Response to a query for a name that no rule allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Denial {
    /// REFUSED: the policy denies the query.
    #[default]
    Refused,
    /// NXDOMAIN: the name does not exist. Some clients then do not try their other resolvers.
    NxDomain,
}

/// Limits of DNS inspection, per worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DnsLimits {
    /// Response to a denied query.
    pub denial: Denial,
    /// Limits of the table of open questions.
    pub track: TrackLimits,
    /// Maximum number of answers held until their addresses are committed.
    pub held: usize,
    /// Maximum number of held answers of one endpoint.
    pub held_per_endpoint: usize,
    /// Maximum time that an answer is held, ms. After that, the answer is dropped.
    pub deadline: Millis,
    /// Limits of DNS connections. Their `deadline` applies to an incomplete message.
    pub tcp: TcpLimits,
}

impl Default for DnsLimits {
    fn default() -> Self {
        Self {
            denial: Denial::default(),
            track: TrackLimits::default(),
            held: 4096,
            held_per_endpoint: 1024,
            deadline: 2000,
            tcp: TcpLimits {
                connections: 4096,
                connections_per_endpoint: 1024,
                // Room for a message of 64 KiB, and for further queries and answers that arrive while that message is
                // incomplete.
                bytes_per_direction: 160 << 10,
                bytes: 64 << 20,
                frames_per_direction: 256,
                deadline: 10_000,
                idle: 120_000,
                ..TcpLimits::default()
            },
        }
    }
}

/// Counters of DNS inspection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DnsStats {
    /// Counters of DNS connections.
    pub tcp: TcpStats,
    /// Well-formed queries.
    pub queries: u64,
    /// Queries for a name that no rule allows.
    pub denied: u64,
    /// Queries that were refused because no further open question or zone transfer can be tracked.
    pub too_many: u64,
    /// Responses that the engine has sent to clients.
    pub replies: u64,
    /// Answers that belong to an open question, and first messages of zone transfers.
    pub answers: u64,
    /// Messages of zone transfers that were forwarded.
    pub transferred: u64,
    /// Answers that were forwarded after their addresses were committed.
    pub committed: u64,
    /// Answers that were not held, because their addresses were in the maps already. Such answers are counted in
    /// `committed` too.
    pub fast_path: u64,
    /// Answers whose commit failed or could not be requested.
    pub uncommitted: u64,
    /// Answers whose commit took too long.
    pub overdue: u64,
    /// Answers that could not be held because too many are held.
    pub not_held: u64,
    /// Answers that are held now.
    pub held: u64,
    /// Malformed messages, by [`ParseError`].
    pub malformed: [u64; ParseError::ALL.len()],
    /// Unsolicited answers, by [`Unsolicited`].
    pub unsolicited: [u64; Unsolicited::ALL.len()],
    /// Messages that were forwarded only because of audit mode.
    pub audited: u64,
}

impl Default for DnsStats {
    fn default() -> Self {
        Self {
            tcp: TcpStats::default(),
            queries: 0,
            denied: 0,
            too_many: 0,
            replies: 0,
            answers: 0,
            transferred: 0,
            committed: 0,
            fast_path: 0,
            uncommitted: 0,
            overdue: 0,
            not_held: 0,
            held: 0,
            malformed: [0; _],
            unsolicited: [0; _],
            audited: 0,
        }
    }
}
