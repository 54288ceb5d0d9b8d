//! Limits and counters of TCP inspection.

use crate::Millis;

/// Limits of TCP inspection, per worker and inspector.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TcpLimits {
    /// Maximum number of open connections.
    pub connections: usize,
    /// Maximum number of open connections of one endpoint. In addition, the open connections of an endpoint must not
    /// exceed three times the number of free places (`connections` minus all open connections).
    pub connections_per_endpoint: usize,
    /// Maximum number of half-open connections, whose handshake is not complete. At the limit, a new one evicts the
    /// oldest one of the endpoint with the most half-open connections, because the source address of a SYN can be
    /// forged.
    pub half_open: usize,
    /// Idle timeout of a half-open connection, ms.
    pub half_open_idle: Millis,
    /// Maximum number of bytes kept for one direction of a connection.
    pub bytes_per_direction: usize,
    /// Maximum number of bytes kept for all connections.
    pub bytes: usize,
    /// Maximum number of packets held for one direction of a connection.
    pub frames_per_direction: usize,
    /// Maximum number of packets held for all connections.
    pub frames: usize,
    /// Maximum time that bytes wait for a verdict, ms. After that, the connection is aborted; in audit mode, it is
    /// offloaded.
    pub deadline: Millis,
    /// Time after which held bytes are acknowledged on behalf of the receiver, ms.
    pub acknowledge: Millis,
    /// Maximum number of offloaded connections that are remembered, so that a change of their rules can end them.
    pub offloaded_flows: usize,
    /// Idle timeout of an open connection, ms.
    pub idle: Millis,
    /// Idle timeout of a connection that is closed, aborted or offloaded, ms.
    pub idle_closed: Millis,
    /// Minimum length of an offload window, bytes.
    pub window: u64,
    /// Whether the sender of a long message may send only a few segments behind it, until the message that follows has
    /// a verdict (`connection/send_limit.rs`).
    pub limits_senders: bool,
    /// Whether the packets are those of a capture, whose ends have exchanged them without the inspection: they acknowledge
    /// bytes that the inspection has not forwarded, and are not sent what it generates. Nothing is then acknowledged on
    /// behalf of a receiver after [`Self::acknowledge`], and nothing is retransmitted.
    pub of_capture: bool,
}

impl Default for TcpLimits {
    fn default() -> Self {
        Self {
            connections: 131_072,
            connections_per_endpoint: usize::MAX,
            half_open: 16_384,
            half_open_idle: 10_000,
            bytes_per_direction: 1 << 20,
            bytes: 256 << 20,
            frames_per_direction: 512,
            frames: 4096,
            deadline: 30_000,
            acknowledge: 10,
            offloaded_flows: 65_536,
            idle: 6 * 3600 * 1000,
            idle_closed: 60_000,
            window: u64::MAX,
            limits_senders: false,
            of_capture: false,
        }
    }
}

/// Counters of TCP inspection.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TcpStats {
    /// Connections that were added, half-open.
    pub opened: u64,
    /// Connections in the table now, including half-open ones but not candidates.
    pub connections: u64,
    /// Half-open connections now, including candidates, which can replace a connection that is in the table.
    pub half_open: u64,
    /// Half-open connections that were removed because of `TcpLimits::half_open`.
    pub half_open_evicted: u64,
    /// Connections that were replaced by a new one with the same addresses and ports, after the server had acknowledged
    /// the new SYN.
    pub replaced: u64,
    /// Bytes that are kept now.
    pub bytes: u64,
    /// Packets that are held now.
    pub frames: u64,
    /// Retransmitted segments.
    pub retransmitted: u64,
    /// Segments that contradict earlier ones: other bytes at the same position, or bytes after the FIN.
    pub overlaps: u64,
    /// Segments whose sequence number, acknowledgement or timestamp is out of range.
    pub out_of_window: u64,
    /// Segments that are malformed, or not valid in the state of the connection.
    pub invalid: u64,
    /// Packets of connections whose handshake was not seen.
    pub midstream: u64,
    /// Packets that exceeded a limit.
    pub limited: u64,
    /// Connections whose verdict took longer than the deadline.
    pub overdue: u64,
    /// Connections that were aborted.
    pub cut: u64,
    /// Connections that were ended by a response in the server's place.
    pub answered: u64,
    /// Connections that were offloaded.
    pub offloaded: u64,
    /// Flow commands that set or removed offload windows.
    pub windows: u64,
    /// Acknowledgements that were sent on behalf of a receiver.
    pub acknowledged: u64,
    /// Generated packets that deliver bytes acknowledged on behalf of a receiver.
    pub delivered: u64,
    /// Generated packets that forward the allowed part of a held packet.
    pub split: u64,
    /// ICMP errors that quote a segment of a connection.
    pub icmp_errors: u64,
    /// ICMP errors that quote no sequence number in flight.
    pub icmp_unrelated: u64,
    /// ICMP errors that lowered the size of generated packets.
    pub icmp_narrowed: u64,
    /// Retransmission timeouts of bytes acknowledged on behalf of a receiver.
    pub repeated: u64,
    /// Offloaded connections that are remembered now.
    pub offloaded_flows: u64,
}
