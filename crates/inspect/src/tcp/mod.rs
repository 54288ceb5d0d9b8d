//! Inspection of TCP connections without terminating them: packets are held, forwarded unchanged, or dropped.
//!
//! A [`connection::Connection`] reassembles the streams of both directions and shows them to a [`StreamInspector`]. A
//! packet is forwarded once the inspector has allowed all of its bytes. If the last bytes of the packet are denied, or
//! wait for the other side, the allowed bytes are forwarded in a generated packet.
//!
//! The receiver gets exactly the bytes that were inspected. Bytes are kept until the receiver has acknowledged them,
//! and a retransmission with other bytes is dropped. So the inspection does not depend on which copy the receiver
//! takes, on the receiver's window or timestamp check, or on a TTL that expires on the path.
//!
//! A sender can need an acknowledgement of held bytes before it sends the rest (Nagle's algorithm, RFC 9293, 3.7.4; a
//! congestion window, RFC 5681). So bytes that are held longer than [`TcpLimits::acknowledge`] are acknowledged on
//! behalf of the receiver. The worker then delivers them itself, with retransmissions, until the receiver has
//! acknowledged them.
//!
//! [`Connections`] finds the connection of a packet and enforces limits and deadlines.

mod config;
mod connection;
mod flow;
mod half;
mod inspector;
pub(crate) mod options;
pub(crate) mod quote;
mod segment;
mod shared;
mod side;
mod table;
#[cfg(test)]
pub(crate) mod tests;

pub use config::{TcpLimits, TcpStats};
pub(crate) use flow::key;
pub(crate) use inspector::{Action, Offloadable, StreamInspector, Transferable, log_action};
pub use side::Side;
pub(crate) use table::Connections;
