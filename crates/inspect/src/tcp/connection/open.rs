//! SYN and SYN+ACK: RFC 9293, 3.10.7.2 (LISTEN) and 3.10.7.3 (SYN-SENT).

use palisade_abi::{FlowCommand, Reason, flow_op};

use super::{
    super::{
        half::{Half, START},
        segment::{Arrived, Link, Segment},
        shared::TcpCx,
        side::Side,
    },
    Announcement, Connection,
    send_limit::NEAR,
};
use crate::Sink;

/// MSS of an end that does not send the option (RFC 9293, 3.7.1).
const DEFAULT_MSS: u16 = 536;

impl<F> Connection<F> {
    /// Handles a SYN or SYN+ACK.
    ///
    /// # Errors
    /// Returns the frame and the reason if the segment must be dropped.
    pub(super) fn open<S: Sink<F>>(
        &mut self,
        arrived: &Arrived<'_, '_>,
        frame: F,
        cx: &mut TcpCx<'_, F, S>,
    ) -> Result<(), (Reason, F)> {
        let (side, segment) = (arrived.side, arrived.segment);
        // Data in a SYN (RFC 7413) would need a verdict before the connection exists, so the SYN is dropped. Linux
        // retransmits the SYN without data.
        if !segment.payload.is_empty() || segment.is_fin() || segment.is_rst() {
            return Err((Reason::TcpInvalid, frame));
        }
        let (own, other) = self.halves.pair_mut(side);
        let is_expected = if segment.is_ack() {
            other.isn.is_some() && other.position(segment.ack) == START + 1
        } else {
            side == Side::Client || other.isn.is_some()
        };
        if !is_expected || !take_syn(own, other, side, segment) {
            return Err((Reason::TcpInvalid, frame));
        }
        own.link = Link::of(arrived.view).or(own.link);
        own.window = segment.window;
        // The window of a SYN is never scaled (RFC 7323, 2.2).
        let window = u64::from(segment.window);
        if segment.is_ack() {
            other.acknowledge(START + 1, window);
        } else {
            other.edge = other.edge.max(START + 1 + window);
        }
        let is_first = side == Side::Client && !segment.is_ack();
        match self.before.filter(|_| !is_first && !self.is_known) {
            // The command is in force before the client gets the SYN+ACK, and so before the client can send data.
            Some(before) => {
                let command = FlowCommand {
                    serial: before,
                    windows: [self.serial, 0, 0, 0],
                    ..self.flow_command(flow_op::REPLACE)
                };
                cx.sink.release_with(frame, &command);
            }
            None => {
                self.repeat_opened();
                self.release(frame, cx);
            }
        }
        Ok(())
    }

    /// Repeats the notification that the handshake is complete, because a segment is repeated: packets are lost, and the one
    /// that carried the notification can have been lost behind the worker. Without it the conntrack entry keeps the short
    /// timeout of a half-open connection.
    pub(super) fn repeat_opened(&mut self) {
        if self.opened == Announcement::Sent {
            self.opened = Announcement::Next;
        }
    }

    /// Schedules the notifications that tell the BPF programs about the state of the connection. The programs act on
    /// verified state only: a packet with a bad checksum or sequence number must not end a conntrack entry.
    pub(super) fn note_state(&mut self) {
        if self.opened == Announcement::No && self.is_opened() {
            self.opened = Announcement::Next;
            self.is_near = self.seen.saturating_sub(self.began) <= NEAR;
        }
        if self.closed == Announcement::No && self.halves.both().into_iter().all(Half::is_ended) {
            self.closed = Announcement::Next;
        }
        if self.closed == Announcement::No {
            // This segment was accepted. So if a RST or a response of another policy's inspector has set `is_reset`, it
            // has not ended the connection: a receiver can refuse a RST (RFC 5961, 3.2).
            self.is_reset = false;
        }
    }
}

/// Stores the initial sequence number and the options of a SYN. Returns whether the SYN is acceptable: it must not
/// change a sequence number or options that the ends can be using already.
fn take_syn<F>(own: &mut Half<F>, other: &Half<F>, side: Side, segment: &Segment<'_>) -> bool {
    let options = &segment.options;
    let has_timestamps = options.timestamp.is_some();
    let is_unanswered = own.acked == START && own.highest == START + 1 && own.sent == START + 1;
    if own.isn != Some(segment.seq) {
        if own.isn.is_some() && (!is_unanswered || (side == Side::Client && other.isn.is_some())) {
            return false;
        }
        own.isn = Some(segment.seq);
        own.scale = options.scale;
        own.mss = options.mss.unwrap_or(DEFAULT_MSS);
        own.has_timestamps = has_timestamps;
        own.recent = options.timestamp.map_or(0, |(value, _)| value);
        own.latest = own.recent;
    } else if own.scale != options.scale || own.has_timestamps != has_timestamps {
        // A stack can retransmit its SYN without options, in case a middlebox drops SYNs with options.
        if !is_unanswered || other.isn.is_some() {
            return false;
        }
        own.scale = options.scale;
        own.has_timestamps = has_timestamps;
    }
    true
}
