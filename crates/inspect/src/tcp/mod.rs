//! TCP connections that are read without being ended here: packets are held, go on unchanged, or are dropped.
//!
//! A [`Connection`] puts the bytes of both directions into their order and shows them to a [`StreamInspector`]. A packet goes
//! on when the reader has let go all of its bytes. If the rest of it is refused, or waits for the other side, the part
//! that may go does so in a packet made here. What was read is what the receiver gets: bytes
//! that have been here are kept until the receiver has acknowledged them, and a packet that says something else at
//! their place is dropped. So it does not matter whether the receiver took the first packet, and nothing about
//! receivers has to be guessed: neither their windows, nor how they treat timestamps or short-lived packets.
//!
//! A sender may wait for the acknowledgement of what is held here before it sends the rest (Nagle's algorithm, RFC
//! 9293, 3.7.4; a congestion window, RFC 5681). So what has been held for a moment is acknowledged here, and is from
//! then on this end's to deliver: it goes on in packets made here, again and again until the receiver has it.
//!
//! [`Connections`] holds them by their keys, with their limits and deadlines.

mod connection;
mod half;
pub(crate) mod options;
pub(crate) mod quote;
mod segment;
mod table;
#[cfg(test)]
pub(crate) mod tests;

use palisade_abi::{CtKey, FlowCommand, PuntRequest, Reason, punt_flags};

pub(crate) use connection::Connection;
pub(crate) use table::{Connections, key};

use crate::{Millis, Sink};

/// What the programs are to do with a flow.
fn flow_command(key: CtKey, slot: &PuntRequest, op: u32) -> FlowCommand {
    FlowCommand {
        key,
        serial: slot.serial,
        op,
        ruleset: slot.ruleset,
        punt_flags: u32::from(slot.flags & punt_flags::AUDIT),
        windows: [0; 4],
    }
}

/// One end of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Side {
    /// It opened the connection.
    Client = 0,
    /// The other.
    Server = 1,
}

impl Side {
    /// Who sent a packet.
    pub(crate) const fn of(slot: &PuntRequest) -> Self {
        if slot.flags & punt_flags::REPLY == 0 {
            Self::Client
        } else {
            Self::Server
        }
    }

    /// The other end.
    #[must_use]
    pub(crate) const fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// What an inspector decides of bytes that it was shown.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Action {
    /// The first byte cannot be judged yet. The inspector is called again when either side has sent more.
    NeedMore,
    /// As `NeedMore`, but the other side has to send first, so no deadline runs.
    AwaitPeer,
    /// The first bytes, this many, are forwarded but stay unjudged and are shown again: for messages that can be judged
    /// only as a whole, of which the end is held.
    ForwardUnjudged(usize),
    /// The first bytes, this many, are judged and forwarded.
    Forward(usize),
    /// The first bytes, this many, are forwarded without inspection, also when a retransmission carries other bytes. May
    /// be more than have arrived.
    Bypass(u64),
    /// From now on neither side is inspected.
    Offload,
    /// Nothing more is forwarded; both ends are reset.
    Abort(Reason),
    /// Nothing more of this side is forwarded. It gets these bytes as if from the other side, behind what that side has
    /// sent so far, and the end of the stream; the other side gets the end too.
    Respond(Reason, Vec<u8>),
}

/// What is kept of a connection while it is read.
pub(crate) trait Offloadable {
    /// What is kept once nothing of it needs reading any more, to judge it again if its rules change. The default: it
    /// was never read, because of audit mode.
    type OffloadVerdict: Default;
    /// Takes it out.
    fn remember(&mut self) -> Self::OffloadVerdict;
}

/// Reads what both sides of a connection send.
pub(crate) trait StreamInspector<F> {
    /// Looks at the bytes of one side that have come and have not been let go. `end`: nothing follows them. With
    /// `end` and no bytes, `Forward(0)` lets the end go.
    fn read<S: Sink<F>>(&mut self, side: Side, bytes: &[u8], end: bool, sink: &mut S) -> Action;

    /// Says, before each `read`, how many bytes of the side have been sent on, of all that it has sent.
    fn sent(&mut self, _side: Side, _to: u64) {}
}

/// How much TCP inspection may hold, and for how long. Of one worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TcpLimits {
    /// Connections.
    pub connections: usize,
    /// Of them, those of one endpoint. None gets more than three times what is left for the others, either.
    pub connections_per_endpoint: usize,
    /// Connections of which the client has not acknowledged the server's SYN, beside those. If there are more, the
    /// oldest of the endpoint that has most is forgotten: its sources may be forged.
    pub half_open: usize,
    /// Such a connection is forgotten when nothing of it is seen for so long. A SYN that comes later begins anew.
    pub half_open_idle: Millis,
    /// Bytes that are kept of one direction of a connection.
    pub bytes_per_direction: usize,
    /// Bytes of all connections.
    pub bytes: usize,
    /// Packets held of one direction of a connection.
    pub frames_per_direction: usize,
    /// Packets held of all connections.
    pub frames: usize,
    /// A connection is cut when a packet has waited so long for a verdict.
    pub deadline: Millis,
    /// What is held so long is acknowledged to its sender.
    pub acknowledge: Millis,
    /// Connections that are not read any more, and are remembered in case the rules change.
    pub offloaded_flows: usize,
    /// A connection whose packets are not seen for so long is forgotten.
    pub idle: Millis,
    /// The same of one that is closed, cut, or not read any more.
    pub idle_closed: Millis,
    /// Bytes that need no reading are left to the programs if at least so many are to come.
    pub window: u64,
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
        }
    }
}

/// What has happened so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TcpStats {
    /// Connections that were opened.
    pub opened: u64,
    /// Connections that are known now.
    pub connections: u64,
    /// Of them, and of those that want to take the place of one of them, those of which the client has not
    /// acknowledged the server's SYN.
    pub half_open: u64,
    /// Such connections that were forgotten to make room.
    pub half_open_evicted: u64,
    /// Connections whose ports were used again before they had been seen to end.
    pub replaced: u64,
    /// Bytes that are kept now.
    pub bytes: u64,
    /// Packets that are held now.
    pub frames: u64,
    /// Packets whose bytes had all been here, the same.
    pub retransmitted: u64,
    /// Packets that said something else than what had been here.
    pub overlaps: u64,
    /// Packets outside the window.
    pub out_of_window: u64,
    /// Packets that receivers could read differently.
    pub invalid: u64,
    /// Packets of connections not seen from their start.
    pub midstream: u64,
    /// Packets that were not held because a limit is reached.
    pub limited: u64,
    /// Connections that were cut because a packet waited too long.
    pub overdue: u64,
    /// Connections that were cut.
    pub cut: u64,
    /// Connections that were ended with an answer.
    pub answered: u64,
    /// Connections that need no reading any more.
    pub offloaded: u64,
    /// Windows that were left to the programs.
    pub windows: u64,
    /// Acknowledgements made here for what is held.
    pub acknowledged: u64,
    /// Packets made here of bytes that were acknowledged before they went on.
    pub delivered: u64,
    /// Packets made here of a part of a packet whose rest may not go.
    pub split: u64,
    /// ICMP errors that quote a segment of a connection.
    pub icmp_errors: u64,
    /// Of them, those that quote no sequence number that is under way.
    pub icmp_unrelated: u64,
    /// Of them, those by which packets that are made here became smaller.
    pub icmp_narrowed: u64,
    /// How often what was acknowledged here was not acknowledged by its receiver in time, and was sent again.
    pub repeated: u64,
    /// Connections that are not read any more and are remembered.
    pub offloaded_flows: u64,
}

/// Dropped packets that are reported a second.
const REPORTS: u32 = 200;

/// What all connections share.
pub(crate) struct Shared {
    pub(crate) limits: TcpLimits,
    pub(crate) stats: TcpStats,
    out: Vec<u8>,
    /// Since when dropped packets are reported, and how many more may be in this second.
    reports: (Millis, u32),
    /// Bytes of a packet of which a part goes on.
    part: Vec<u8>,
}

impl Shared {
    pub(crate) fn new(limits: &TcpLimits) -> Self {
        Self {
            limits: *limits,
            stats: TcpStats::default(),
            out: Vec::new(),
            reports: (0, REPORTS),
            part: Vec::new(),
        }
    }

    /// Whether one more dropped packet is reported: a sender must not be able to fill the records.
    pub(crate) const fn may_report(&mut self, now: Millis) -> bool {
        if now.saturating_sub(self.reports.0) >= 1_000 {
            self.reports = (now, REPORTS);
        }
        if self.reports.1 == 0 {
            return false;
        }
        self.reports.1 -= 1;
        true
    }
}
