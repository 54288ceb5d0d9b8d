//! Messages and services, generated from the files in `proto`.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::nursery,
    clippy::allow_attributes_without_reason,
    reason = "generated code; the definition files have the comments"
)]

include!(concat!(env!("OUT_DIR"), "/messages.rs"));

/// Service traits and servers.
pub mod services {
    include!(concat!(env!("OUT_DIR"), "/services/observer.Observer.rs"));
    include!(concat!(env!("OUT_DIR"), "/services/peer.Peer.rs"));
    include!(concat!(env!("OUT_DIR"), "/services/grpc.health.v1.Health.rs"));
}
