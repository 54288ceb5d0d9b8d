//! Reads application traffic and decides: hold, release, refuse, answer. Sans-IO: no sockets, no clock of its own.
//!
//! The worker gives [`Engine::packet`] each carried packet together with a handle `F` on its frame. The engine
//! either gives the handle back to the [`Sink`] at once (release or discard), or keeps it until it can decide; held
//! frames are bounded in number, bytes and time. What else is to happen goes to the sink too: packets that the engine
//! makes, answers to be learned, records of what was seen.
//!
//! Depends on `palisade-packet`, `palisade-protocols`, `palisade-fqdn` and `palisade-policy` (rule sets). Start at
//! [`Engine::packet`]; [`Rules`] is the prepared form of the rule sets, [`Sink`] is what a caller implements.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![warn(unreachable_pub)]

pub mod commit;
mod dns;
mod engine;
mod expiry_queue;
mod fragments;
mod http;
mod judge;
mod metrics;
mod packet_builder;
pub mod record;
mod rules;
mod tcp;
mod tls;

use palisade_abi::{FlowCommand, PuntRequest, Reason};
use palisade_packet::Packet;
use palisade_protocols::dns::Answer;

pub use dns::{Denial, DnsLimits, DnsStats};
pub use engine::{Engine, Limits, Stats};
pub use fragments::{FragmentLimits, FragmentStats};
pub use http::{GetBodies, HttpLimits, HttpStats, Paths};
pub use judge::Inspectors;
pub use metrics::Metric;
pub use palisade_fqdn::{SniAddressIndex, TrackLimits, Unsolicited};
pub use rules::{DnsRules, HttpDenial, HttpRules, HttpScratch, HttpVerdict, Problem, Rules, TlsRules};
pub use tcp::{
    TcpLimits, TcpStats,
    options::{OptionProblem, normalise as normalise_options},
};
pub use tls::{Ech, TlsLimits, TlsStats};

/// Milliseconds of one monotonic clock.
pub type Millis = u64;

/// A carried packet, seen by the engine for one of its slots.
#[derive(Clone, Copy, Debug)]
pub struct PacketView<'a> {
    /// Who asks for the reading, and by which rules.
    pub slot: &'a PuntRequest,
    /// The interface where it was caught.
    pub ifindex: u32,
    /// Where it was caught: [`palisade_abi::punt_hook`].
    pub hook: u8,
    /// What was decoded of `frame`.
    pub packet: &'a Packet,
    /// The frame from its Ethernet header on; its transport checksum is complete and right (a fragment's is not
    /// known).
    pub frame: &'a [u8],
    /// Where in `frame` the network header starts.
    pub network: usize,
    /// Where in `frame` the transport header starts.
    pub transport: usize,
    /// Where in `frame` the transport's payload starts, and where it ends (a frame may be padded).
    pub payload: (usize, usize),
}

/// Where a packet that the engine makes is to go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Route {
    /// The interface of the packet that it is about.
    pub ifindex: u32,
    /// Where that was caught: [`palisade_abi::punt_hook`].
    pub hook: u8,
    /// Back to where that packet came from; else onward, as that packet would have gone.
    pub back: bool,
}

/// An answer whose addresses have to be reachable before it may go on.
#[derive(Debug)]
pub struct CommitRequest {
    /// The engine's number for it; comes back in [`CommitResult`].
    pub ticket: u64,
    /// Who learns.
    pub endpoint: u16,
    /// What. Comes back, to be used again.
    pub answer: Box<Answer>,
}

impl CommitRequest {
    /// What became of it.
    #[must_use]
    pub fn done(self, committed: bool, lease: Option<Lease>) -> CommitResult {
        CommitResult {
            ticket: self.ticket,
            endpoint: self.endpoint,
            committed,
            lease,
            answer: self.answer,
        }
    }
}

/// What became of a [`CommitRequest`].
#[derive(Debug)]
pub struct CommitResult {
    /// The number of the question.
    pub ticket: u64,
    /// Who was to learn.
    pub endpoint: u16,
    /// Everything that the answer implies is in the maps: it may be released. Else it must not be.
    pub committed: bool,
    /// And it stays there for a while; none if that cannot be said.
    pub lease: Option<Lease>,
    /// The same box.
    pub answer: Box<Answer>,
}

/// For how long what an answer taught stays in the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// So many milliseconds, if nothing is taken out of the maps before its time,
    pub good_for: Millis,
    /// and if it is, this is not the epoch any more: see [`Sink::epoch`].
    pub epoch: u64,
}

/// What the engine wants done. Called in the order in which things are to happen.
pub trait Sink<F> {
    /// The packet goes on, unchanged.
    fn release(&mut self, frame: F);
    /// The packet goes on, unchanged, and with it what the programs are to do with its flow from now on.
    fn release_with(&mut self, frame: F, command: &FlowCommand);
    /// What the programs are to do with a flow, without a packet to go along.
    fn command(&mut self, _command: &FlowCommand) {}
    /// The packet has been acknowledged to its sender and its bytes go on in others that the engine makes, or it was an
    /// ICMP error about such packets.
    fn absorb(&mut self, frame: F) {
        self.discard(frame, Reason::TcpHeld);
    }
    /// The packet ends here.
    fn discard(&mut self, frame: F, reason: Reason);
    /// A packet that the engine made: a whole Ethernet frame with right checksums.
    fn emit(&mut self, frame: &[u8], route: Route);
    /// Asks for an answer to be learned.
    ///
    /// # Errors
    /// The queue is full: nothing will come back.
    fn commit(&mut self, learn: CommitRequest) -> Result<(), CommitRequest>;
    /// Tells of an answer that teaches nothing new, so that what it taught before is kept for as long as it says. Its
    /// box comes back at some time.
    ///
    /// # Errors
    /// The queue is full: nothing will come back.
    fn refresh(&mut self, learn: CommitRequest) -> Result<(), CommitRequest> {
        Err(learn)
    }
    /// Changes whenever something learned is taken out of the maps before its time.
    fn epoch(&self) -> u64 {
        0
    }
    /// Something to report.
    fn record(&mut self, record: &record::Record);
}
