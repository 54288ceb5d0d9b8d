//! Inspects application traffic and decides: hold, forward, drop, respond. Sans-IO: no sockets, no clock of its own.
//!
//! The worker gives [`Engine::packet`] each punted packet together with a handle `F` to its frame. The engine either
//! returns the handle to the [`Sink`] at once (forward or drop), or keeps it until the verdict is known. Held frames
//! are bounded in number, bytes and time. The sink also receives packets that the engine builds, commit requests for
//! DNS answers, and records.
//!
//! Depends on `palisade-packet`, `palisade-protocols`, `palisade-fqdn` and `palisade-model` (rule sets). Start at
//! [`Engine::packet`]. [`Rules`] is the prepared form of the rule sets, [`Sink`] is the trait that a caller implements.
#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]
#![warn(unreachable_pub)]

pub mod commit;
mod context;
mod dns;
mod engine;
mod evaluator;
mod expiry_queue;
mod fragments;
mod frames;
pub mod handover;
mod http;
pub mod http2;
mod kafka;
mod metrics;
mod packet;
mod packet_builder;
pub mod record;
mod rules;
mod sink;
pub mod steps;
pub mod stream;
mod tcp;
mod tls;

pub use commit::{CommitRequest, CommitResult, Lease};
pub use dns::{Denial, DnsLimits, DnsStats};
pub use engine::{Engine, Limits, Stats};
pub use evaluator::Inspectors;
pub use fragments::{FragmentLimits, FragmentStats};
pub use http::{GetBodies, HttpLimits, HttpStats, Paths};
pub use kafka::{KafkaLimits, KafkaStats, TopicIds};
pub use metrics::Metric;
pub use packet::{PacketView, Route};
pub use palisade_fqdn::{SniAddressIndex, TrackLimits, Unsolicited};
pub use rules::{
    DnsRules, HeaderEdit, HttpDenial, HttpRules, HttpScratch, HttpVerdict, KafkaRules, KafkaVerdict, Problem,
    Rules, TlsRules,
};
pub use sink::Sink;
pub use tcp::{
    Side, TcpLimits, TcpStats,
    options::{OptionProblem, normalise as normalise_options},
};
pub use tls::{Ech, TlsLimits, TlsStats};

/// Time of one monotonic clock, ms.
pub type Millis = u64;
