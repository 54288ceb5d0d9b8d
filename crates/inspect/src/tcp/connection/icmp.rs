//! ICMP errors that quote a segment of a connection.

use super::{
    super::{
        half::{Position, START},
        quote::{Quoted, QuotedSegment},
        shared::TcpCx,
    },
    Connection, FIRST_TRY, Phase,
};
use crate::Sink;

impl<F> Connection<F> {
    /// Returns SND.NXT of the sender of the quoted segment, as the receiver sees it: generated packets count, held ones
    /// do not.
    fn sent_by(&self, quoted: &QuotedSegment) -> Position {
        match &self.phase {
            // The packets of an offloaded connection are not punted, so SND.NXT is unknown.
            Phase::Offloaded => Position::MAX,
            Phase::Responded(response) => response.end_of(quoted.sender),
            _ => self.halves[quoted.sender].sent,
        }
    }

    /// Handles an ICMP error. No error ends the connection here: in a synchronized state all errors are soft (RFC
    /// 5927, 5.2), and in any other state the end to which the error is addressed decides.
    ///
    /// The sequence number of a segment without data is normally SND.NXT. An error about such a segment is forwarded,
    /// as Linux accepts it (`tcp_v4_err`), but does not lower the size of generated packets, because no link is too
    /// small for a segment without data.
    pub(in crate::tcp) fn quoted<S: Sink<F>>(
        &mut self,
        quoted: &QuotedSegment,
        is_ipv6: bool,
        cx: &mut TcpCx<'_, F, S>,
    ) -> Quoted {
        let half = &self.halves[quoted.sender];
        let (at, sent) = (half.position(quoted.seq), self.sent_by(quoted));
        if half.isn.is_none() || !(half.acked..=sent).contains(&at) {
            return Quoted::Unrelated;
        }
        // The sender needs the MTU of a link only if it has to retransmit the quoted byte itself.
        let is_theirs = at >= half.proxy_acked || quoted.mtu.is_none();
        // An error lowers the size only if the quoted byte is in flight. In an offloaded connection, that is known only
        // for bytes that the worker has sent itself.
        let counted = match self.phase {
            Phase::Aborted(_) => 0,
            Phase::Offloaded => half.sent,
            _ => sent,
        };
        if let Some(mtu) = quoted.mtu.filter(|_| at < counted)
            && self.halves[quoted.sender.other()].narrow(mtu, is_ipv6)
        {
            cx.shared.stats.icmp_narrowed += 1;
            self.send_narrower(quoted, cx);
        }
        match self.phase {
            // In these phases no end has to retransmit anything: the worker acknowledges every byte of both ends, or
            // the connection was reset.
            Phase::Responded(_) | Phase::Aborted(_) => Quoted::Ours,
            _ if is_theirs => Quoted::Theirs,
            _ => Quoted::Ours,
        }
    }

    /// Retransmits, in smaller packets, unacknowledged bytes that the worker has sent in the sender's place.
    fn send_narrower<S: Sink<F>>(&mut self, quoted: &QuotedSegment, cx: &mut TcpCx<'_, F, S>) {
        let side = quoted.sender;
        if let Phase::Responded(response) = &self.phase {
            if response.to != side {
                self.send_response(response, cx);
            }
            return;
        }
        let half = &mut self.halves[side];
        if half.delivered() <= half.acked.max(START + 1) {
            return;
        }
        let tries = half.again.map_or(0, |(_, tries)| tries);
        half.lose();
        if self.recover(side, cx) {
            self.halves[side].again = Some((cx.now + (FIRST_TRY << tries), tries));
        }
    }
}
