//! What every step of the path needs: tables, timeouts, and the events so far.

use palisade_abi::Event;

use crate::tables::Tables;

/// Lifetimes of flows and fragments, ns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    /// Idle timeout of a half-open TCP connection.
    pub tcp_opening: u64,
    /// Idle timeout of an established TCP connection.
    pub tcp_established: u64,
    /// Idle timeout of a TCP connection that was reset, or closed by both ends.
    pub tcp_closing: u64,
    /// Idle timeout of a UDP or SCTP flow.
    pub udp: u64,
    /// Idle timeout of ICMP echo and of protocols without ports.
    pub other: u64,
    /// Lifetime of the ports of a fragmented datagram.
    pub fragment: u64,
    /// Interval between trace events of a flow in use; 0 for none.
    pub trace_interval: u64,
    /// Interval between two sweeps of expired flows.
    pub sweep: u64,
}

/// What every step of the path needs.
#[derive(Debug)]
pub(crate) struct Cx {
    pub tables: Tables,
    pub timeouts: Timeouts,
    /// Number of the node's own endpoint.
    pub host: u16,
    /// Available inspectors: bit n for the [`palisade_abi::Inspector`] with number n.
    pub inspectors: u32,
    /// Events of the packets processed so far, taken by the caller.
    pub events: Vec<Event>,
}
