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
    /// It quotes nothing that is under way.
    Unrelated,
    /// It is about what was sent here only: the end that it is addressed to has had all of that acknowledged.
    Ours,
    /// The end that it is addressed to is to have it.
    Theirs,
}

impl<F> Connection<F> {
    /// Behind the last byte of the sender that may be under way.
    fn sent_by(&self, quoted: &QuotedSegment) -> Position {
        match &self.phase {
            // Packets of it are not counted any more.
            Phase::Offloaded => Position::MAX,
            Phase::Answered(answer) => answer.end_of(quoted.sender),
            _ => self.halves[quoted.sender as usize].sent,
        }
    }

    /// Takes note of an ICMP error. Whatever it says, the connection goes on: errors are hints (RFC 5927, 5.2), and
    /// what the end makes of one is its own affair.
    ///
    /// What a bare acknowledgement has as its sequence number is one behind the last byte that was sent. Linux takes an
    /// error about that, too. Such a packet is too big for no link.
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
        // Only what is not acknowledged yet to the end that has sent it can be in a packet of its own.
        let is_theirs = at >= half.promised || quoted.mtu.is_none();
        // What is counted of an offloaded connection is what was sent from here.
        let counted = match self.phase {
            Phase::Cut(_) => 0,
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
            // Both ends have had all acknowledged, or have been reset.
            Phase::Answered(_) | Phase::Cut(_) => Quoted::Ours,
            _ if is_theirs => Quoted::Theirs,
            _ => Quoted::Ours,
        }
    }

    /// Sends again, in smaller packets, what of the sender's bytes was sent here and has not been acknowledged.
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
