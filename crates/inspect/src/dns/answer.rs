//! Handles DNS answers: matches them with open questions, and commits their addresses if the endpoint is the client.

use palisade_abi::{Addr, Reason};
use palisade_protocols::dns::Limits;

use super::{
    Dns, REFRESH, endpoint_asks, flow, is_audit, records,
    types::{AnswerVerdict, Transfer},
};
use crate::{
    CommitRequest, PacketView, Sink,
    context::Cx,
    record::{Record, Text, What},
};

impl<F> Dns<F> {
    /// Returns the verdict on an answer, which must belong to an open question.
    pub(crate) fn answer<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        message: &[u8],
        cx: &mut Cx<'_, F, S>,
    ) -> AnswerVerdict {
        let mut answer = self.answers.pop().unwrap_or_default();
        if let Err(error) = answer.read(message, &Limits::ANSWER) {
            self.recycle(answer);
            if let Some(count) = self.stats.malformed.get_mut(error as usize) {
                *count += 1;
            }
            let detail = error.text();
            let record = Record::of(view, What::Unreadable { detail });
            return self.refuse_answer(view, record, Reason::AppMalformed, cx);
        }
        let asked = match self.tracker.answered(flow(view), &answer, cx.now) {
            Ok(asked) => asked,
            Err(unsolicited) => {
                if let Some(count) = self.stats.unsolicited.get_mut(unsolicited as usize) {
                    *count += 1;
                }
                let record = Record::of(view, records::answer(&answer));
                self.recycle(answer);
                return self.refuse_answer(view, record, Reason::DnsUnsolicited, cx);
            }
        };
        self.stats.answers += 1;
        if answer.addresses.is_empty() || !endpoint_asks(view.slot) {
            cx.sink.record(&records::of_answer(cx.now, view, &answer, asked));
            self.recycle(answer);
            return AnswerVerdict::Pass;
        }
        let endpoint = view.slot.endpoint;
        if !self.committed.has(endpoint, &answer, cx.sink.epoch(), cx.now) {
            return AnswerVerdict::Commit(answer, asked);
        }
        let record = records::of_answer(cx.now, view, &answer, asked);
        let refresh = CommitRequest {
            ticket: REFRESH,
            endpoint,
            answer,
        };
        match cx.sink.refresh(refresh) {
            Ok(()) => {
                self.stats.committed += 1;
                self.stats.fast_path += 1;
                cx.sink.record(&record);
                AnswerVerdict::Pass
            }
            Err(request) => AnswerVerdict::Commit(request.answer, asked),
        }
    }

    /// Counts and records the first message of a zone transfer.
    pub(super) fn transfer_begins<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        transfer: &Transfer,
        rcode: u16,
        cx: &mut Cx<'_, F, S>,
    ) {
        self.stats.answers += 1;
        let what = What::DnsAnswer {
            name: Text::of(&transfer.question.name),
            kind: transfer.question.rtype,
            rcode,
            addresses: [Addr::UNSPECIFIED; 8],
            count: 0,
            ttl: 0,
            cname: Text::default(),
        };
        cx.sink.record(&Record {
            rule: transfer.note.rule,
            latency: u32::try_from(cx.now.saturating_sub(transfer.at)).ok(),
            ..Record::of(view, what)
        });
    }

    fn refuse_answer<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        record: Record,
        reason: Reason,
        cx: &mut Cx<'_, F, S>,
    ) -> AnswerVerdict {
        if self.refused(is_audit(view.slot), record, reason, cx) {
            AnswerVerdict::Refuse(reason)
        } else {
            AnswerVerdict::Pass
        }
    }
}
