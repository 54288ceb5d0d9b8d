//! Phases of a connection, and the response that ends one.

use palisade_abi::Reason;

use super::super::{half::Position, side::Side};
use crate::{
    Millis,
    handover::wire::{Reader, Wire},
};

/// Maximum number of retransmissions of a generated packet.
pub(super) const TRIES: u32 = 6;
/// First retransmission timeout of a generated packet, ms. It doubles with each retransmission.
pub(super) const FIRST_TRY: Millis = 250;

/// Phase of a connection.
pub(super) enum Phase {
    Open,
    /// A response waits until earlier bytes of both ends are delivered and acknowledged, or until its time limit.
    Responding(Box<Response>),
    /// The response has been sent.
    Responded(Box<Response>),
    /// The rest of the connection needs no inspection.
    Offloaded,
    /// The connection has ended with a reset. Its packets are dropped.
    Aborted(Reason),
}

/// State of a notification to the BPF programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Announcement {
    No,
    /// The notification is sent with the next packet that is forwarded.
    Next,
    Sent,
}

/// Until when the offload windows are suspended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Suspended {
    /// They are in force.
    No,
    /// Until any segment is accepted.
    UntilSegment,
    /// Until a segment of this side is accepted.
    UntilSegmentOf(Side),
}

impl Wire for Suspended {
    fn write(&self, out: &mut Vec<u8>) {
        let number: u8 = match self {
            Self::No => 0,
            Self::UntilSegment => 1,
            Self::UntilSegmentOf(Side::Client) => 2,
            Self::UntilSegmentOf(Side::Server) => 3,
        };
        number.write(out);
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some(match u8::read(from)? {
            0 => Self::No,
            1 => Self::UntilSegment,
            2 => Self::UntilSegmentOf(Side::Client),
            3 => Self::UntilSegmentOf(Side::Server),
            _ => return None,
        })
    }
}

/// Response to one end in the other end's place.
pub(super) struct Response {
    pub(super) reason: Reason,
    /// Receiver of the response.
    pub(super) to: Side,
    pub(super) bytes: Vec<u8>,
    /// Whether the FIN is sent with the first retransmission, not with the response itself.
    pub(super) holds_fin: bool,
    /// Position of the response in the stream to `to`.
    pub(super) start: Position,
    /// Position up to which the stream from `to` is acknowledged.
    pub(super) next: Position,
    /// Value of `next` when the response was sent.
    pub(super) first: Position,
    /// Number of retransmissions.
    pub(super) tries: u32,
    /// Time of the next retransmission, ms; before the response is sent, the time at which it is sent at the latest.
    pub(super) again: Millis,
    pub(super) other: Closing,
}

/// State of the end that does not get the response. That end gets a FIN, as if the receiver of the response had closed
/// the connection.
#[derive(Default)]
pub(super) struct Closing {
    /// Position of the generated FIN in the stream to this end.
    pub(super) fin: Position,
    /// Position up to which the stream from this end is acknowledged.
    pub(super) next: Position,
    /// Value of `next` when the response was sent.
    pub(super) first: Position,
    /// Whether this end has acknowledged the FIN or has reset the connection.
    pub(super) done: bool,
}

impl Response {
    /// Returns a response that is sent at `again` at the latest.
    pub(super) fn new(reason: Reason, to: Side, bytes: Vec<u8>, again: Millis, holds_fin: bool) -> Self {
        Self {
            reason,
            to,
            bytes,
            holds_fin,
            start: 0,
            next: 0,
            first: 0,
            tries: 0,
            again,
            other: Closing::default(),
        }
    }

    /// Returns the position after the generated FIN of `side`.
    pub(super) fn end_of(&self, side: Side) -> Position {
        if side == self.to {
            self.other.fin + 1
        } else {
            self.start + self.bytes.len() as u64 + 1
        }
    }
}
