//! An ICMP error that quotes a segment of a connection.

use super::{
    super::{
        Shared,
        half::{Position, START},
        quote::QuotedSegment,
    },
    Connection, FIRST_TRY, Phase,
};
use crate::{Millis, Sink};

/// What becomes of an ICMP error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::tcp) enum Quoted {
    /// It is dropped: it quotes no sequence number that is under way.
    Unrelated,
    /// It ends here: the bytes have been acknowledged to their sender, so only the worker can send them again.
    Ours,
    /// It goes on to the sender of the quoted segment.
    Theirs,
}

impl<F> Connection<F> {
    /// Returns SND.NXT of the sender as the receiver of its segments sees it: what the worker made counts, what it holds
    /// does not.
    fn sent_by(&self, quoted: &QuotedSegment) -> Position {
        match &self.phase {
            // The programs let its packets pass, so how far it has come is not known here.
            Phase::Offloaded => Position::MAX,
            Phase::Answered(answer) => answer.end_of(quoted.sender),
            _ => self.halves[quoted.sender as usize].sent,
        }
    }

    /// Takes an ICMP error. No error ends the connection: in a synchronized state all are soft (RFC 5927, 5.2). In any
    /// other state the end that the error is addressed to decides.
    ///
    /// A segment without data has SND.NXT as its sequence number. An error about one passes, as it does in Linux
    /// (`tcp_v4_err`), but such a segment is too big for no link.
    pub(in crate::tcp) fn quoted<S: Sink<F>>(
        &mut self,
        now: Millis,
        quoted: &QuotedSegment,
        is_ipv6: bool,
        shared: &mut Shared,
        sink: &mut S,
    ) -> Quoted {
        let half = &self.halves[quoted.sender as usize];
        let (at, sent) = (half.position(quoted.seq), self.sent_by(quoted));
        if half.isn.is_none() || !(half.acked..=sent).contains(&at) {
            return Quoted::Unrelated;
        }
        // The sender needs to hear of a link's MTU only if it has to send the byte again itself.
        let is_theirs = at >= half.proxy_acked || quoted.mtu.is_none();
        // An error lowers sizes only if the number is known to be under way: of an offloaded connection, what the worker
        // has sent itself.
        let counted = match self.phase {
            Phase::Aborted(_) => 0,
            Phase::Offloaded => half.sent,
            _ => sent,
        };
        if let Some(mtu) = quoted.mtu.filter(|_| at < counted)
            && self.half(quoted.sender.other()).narrow(mtu, is_ipv6)
        {
            shared.stats.icmp_narrowed += 1;
            self.send_narrower(now, quoted, shared, sink);
        }
        match self.phase {
            // All that both ends have sent is acknowledged, or they have been reset: there is no byte to be sent again.
            Phase::Answered(_) | Phase::Aborted(_) => Quoted::Ours,
            _ if is_theirs => Quoted::Theirs,
            _ => Quoted::Ours,
        }
    }

    /// Sends again, in smaller packets, what the worker has sent of the sender's bytes and the receiver has not
    /// acknowledged.
    fn send_narrower<S: Sink<F>>(
        &mut self,
        now: Millis,
        quoted: &QuotedSegment,
        shared: &mut Shared,
        sink: &mut S,
    ) {
        let side = quoted.sender;
        if let Phase::Answered(answer) = &self.phase {
            if answer.to != side {
                self.send_answer(answer, shared, sink);
            }
            return;
        }
        let half = &self.halves[side as usize];
        if half.delivered() <= half.acked.max(START + 1) {
            return;
        }
        let tries = half.again.map_or(0, |(_, tries)| tries);
        self.half(side).lose();
        if self.recover(side, shared, sink) {
            self.half(side).again = Some((now + (FIRST_TRY << tries), tries));
        }
    }
}
