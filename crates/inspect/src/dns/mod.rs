//! DNS: a query is allowed or denied by its name, an answer must belong to an open question, and its addresses are in
//! the maps before the answer is forwarded.
//!
//! `query` and `answer` return the verdict on a message. This module holds answers until their addresses are committed.
//! `stream` inspects messages over TCP.

use std::{collections::HashMap, net::SocketAddr};

use palisade_abi::{PuntRequest, Reason, punt_flags};
use palisade_fqdn::{Flow, OpenQuestion, Tracker};
use palisade_protocols::dns::Answer;

mod answer;
mod committed;
mod config;
mod handover;
mod query;
mod records;
pub(crate) mod stream;
mod types;

pub use config::{Denial, DnsLimits, DnsStats};

use crate::{
    CommitRequest, CommitResult, Millis, PacketView, Sink,
    context::Cx,
    expiry_queue::ExpiryQueue,
    frames::Frames,
    record::{Record, Verdict},
};
use committed::CommittedAnswers;
use types::{AnswerVerdict, Note, QueryVerdict, Resolved, Waiting};

/// Ticket of a refresh, for which no answer is held.
const REFRESH: u64 = u64::MAX;

/// An answer that is held until its addresses are committed.
struct Held<F> {
    what: Waiting<F>,
    audit: bool,
    record: Record,
}

pub(crate) struct Dns<F> {
    limits: DnsLimits,
    tracker: Tracker<Note>,
    held: ExpiryQueue<Held<F>>,
    held_by: HashMap<u16, usize>,
    committed: CommittedAnswers,
    #[expect(
        clippy::vec_box,
        reason = "a `CommitRequest` takes the box and its result returns it"
    )]
    answers: Vec<Box<Answer>>,
    /// Verdicts of held answers in streams, for the streams to take.
    resolved: Vec<Resolved>,
    /// Buffer for the response that is built.
    out: Vec<u8>,
    stats: DnsStats,
}

impl<F> Dns<F> {
    pub(crate) fn new(limits: &DnsLimits) -> Self {
        Self {
            limits: *limits,
            tracker: Tracker::new(limits.track),
            held: ExpiryQueue::new(),
            held_by: HashMap::new(),
            committed: CommittedAnswers::new(),
            answers: Vec::new(),
            resolved: Vec::new(),
            out: Vec::new(),
            stats: DnsStats::default(),
        }
    }

    pub(crate) fn stats(&self) -> DnsStats {
        DnsStats {
            held: self.held.len() as u64,
            ..self.stats
        }
    }

    /// Handles a datagram. `message` is its payload, `frames` are its frames.
    pub(crate) fn datagram<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        message: &[u8],
        frames: Frames<F>,
        cx: &mut Cx<'_, F, S>,
    ) {
        if view.slot.flags & punt_flags::REPLY == 0 {
            match self.query(view, message, cx) {
                QueryVerdict::Pass | QueryVerdict::Transfer(_) => frames.release(cx.spare, cx.sink),
                QueryVerdict::Refuse(reason, rcode) => {
                    if let Some(rcode) = rcode {
                        self.reply(view, message, rcode, cx);
                    }
                    frames.discard(reason, cx.spare, cx.sink);
                }
            }
            return;
        }
        match self.answer(view, message, cx) {
            AnswerVerdict::Pass => frames.release(cx.spare, cx.sink),
            AnswerVerdict::Refuse(reason) => frames.discard(reason, cx.spare, cx.sink),
            AnswerVerdict::Commit(answer, asked) => {
                self.hold(view, answer, asked, Waiting::Datagram(frames), cx);
            }
        }
    }

    /// Records a refused message. Returns false if audit mode lets it pass.
    pub(crate) fn refused<S: Sink<F>>(
        &mut self,
        audit: bool,
        mut record: Record,
        reason: Reason,
        cx: &mut Cx<'_, F, S>,
    ) -> bool {
        record.reason = reason;
        record.verdict = if audit {
            self.stats.audited += 1;
            Verdict::Audit
        } else {
            Verdict::Dropped
        };
        cx.sink.record(&record);
        !audit
    }

    /// Holds an answer until its addresses are committed. An answer that cannot be held or committed is dropped, or
    /// forwarded in audit mode.
    pub(crate) fn hold<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        answer: Box<Answer>,
        asked: OpenQuestion<Note>,
        what: Waiting<F>,
        cx: &mut Cx<'_, F, S>,
    ) {
        let held = Held {
            what,
            audit: is_audit(view.slot),
            record: records::of_answer(cx.now, view, &answer, asked),
        };
        let endpoint = view.slot.endpoint;
        let by_endpoint = self.held_by.entry(endpoint).or_default();
        if self.held.len() >= self.limits.held || *by_endpoint >= self.limits.held_per_endpoint {
            if *by_endpoint == 0 {
                self.held_by.remove(&endpoint);
            }
            self.recycle(answer);
            self.stats.not_held += 1;
            self.drop_answer(held, Reason::InspectLimit, cx);
            return;
        }
        *by_endpoint += 1;
        let ticket = self.held.push(held, cx.now);
        let request = CommitRequest {
            ticket,
            endpoint,
            answer,
        };
        if let Err(request) = cx.sink.commit(request) {
            self.recycle(request.answer);
            if let Some(held) = self.held.remove(ticket) {
                self.count_down(endpoint);
                self.stats.uncommitted += 1;
                self.drop_answer(held, Reason::DnsUncommitted, cx);
            }
        }
    }

    /// Handles the result of a commit request: stores the lease, and forwards or drops the held answer, if any.
    pub(crate) fn committed<S: Sink<F>>(&mut self, result: CommitResult, cx: &mut Cx<'_, F, S>) {
        if let (true, Some(lease)) = (result.committed, result.lease) {
            self.committed
                .note(result.endpoint, &result.answer, lease, cx.now);
        }
        self.recycle(result.answer);
        if result.ticket == REFRESH {
            return;
        }
        // If no answer is held for the ticket, the answer was overdue, or its endpoint was removed.
        let Some(held) = self.held.remove(result.ticket) else {
            return;
        };
        self.count_down(held.record.endpoint);
        if result.committed {
            self.stats.committed += 1;
            cx.sink.record(&held.record);
            self.settle(held.what, Ok(()), cx);
        } else {
            self.stats.uncommitted += 1;
            self.drop_answer(held, Reason::DnsUncommitted, cx);
        }
    }

    fn drop_answer<S: Sink<F>>(&mut self, held: Held<F>, reason: Reason, cx: &mut Cx<'_, F, S>) {
        let passes = if self.refused(held.audit, held.record, reason, cx) {
            Err(reason)
        } else {
            Ok(())
        };
        self.settle(held.what, passes, cx);
    }

    fn settle<S: Sink<F>>(&mut self, what: Waiting<F>, passes: Result<(), Reason>, cx: &mut Cx<'_, F, S>) {
        match (what, passes) {
            (Waiting::Datagram(frames), Ok(())) => frames.release(cx.spare, cx.sink),
            (Waiting::Datagram(frames), Err(reason)) => frames.discard(reason, cx.spare, cx.sink),
            (Waiting::Stream(place), passes) => self.resolved.push(Resolved { place, passes }),
        }
    }

    /// Returns the next verdict of a held answer in a stream.
    pub(crate) fn next_resolved(&mut self) -> Option<Resolved> {
        self.resolved.pop()
    }

    pub(crate) fn tick<S: Sink<F>>(&mut self, cx: &mut Cx<'_, F, S>) {
        self.tracker.expire(cx.now);
        let Some(limit) = cx.now.checked_sub(self.limits.deadline) else {
            return;
        };
        while let Some(held) = self.held.pop_since(limit) {
            self.count_down(held.record.endpoint);
            self.stats.overdue += 1;
            self.drop_answer(held, Reason::DnsUncommitted, cx);
        }
    }

    pub(crate) fn deadline(&self) -> Option<Millis> {
        self.held
            .since()
            .map(|since| since.saturating_add(self.limits.deadline))
    }

    /// Drops the held answers of one endpoint, or all held answers, even in audit mode: an endpoint that was removed
    /// has no policy that could let them pass.
    pub(crate) fn forget<S: Sink<F>>(&mut self, endpoint: Option<u16>, cx: &mut Cx<'_, F, S>) {
        if let Some(endpoint) = endpoint {
            self.tracker.remove_endpoint(endpoint);
        }
        while let Some(mut held) = self
            .held
            .pop_if(|held| endpoint.is_none_or(|endpoint| held.record.endpoint == endpoint))
        {
            self.count_down(held.record.endpoint);
            held.audit = false;
            self.drop_answer(held, Reason::DnsUncommitted, cx);
        }
    }

    fn count_down(&mut self, endpoint: u16) {
        if let Some(count) = self.held_by.get_mut(&endpoint) {
            *count -= 1;
            if *count == 0 {
                self.held_by.remove(&endpoint);
            }
        }
    }

    fn recycle(&mut self, mut answer: Box<Answer>) {
        /// Capacity that is kept, addresses: enough for most answers.
        const ADDRESSES: usize = 64;
        if self.answers.len() < self.limits.held {
            answer.addresses.clear();
            answer.addresses.shrink_to(ADDRESSES);
            self.answers.push(answer);
        }
    }
}

/// Returns whether the endpoint is the client of the flow. Only a client learns the addresses of answers.
const fn endpoint_asks(slot: &PuntRequest) -> bool {
    (slot.flags & punt_flags::INGRESS != 0) == (slot.flags & punt_flags::REPLY != 0)
}

pub(crate) const fn is_audit(slot: &PuntRequest) -> bool {
    slot.flags & punt_flags::AUDIT != 0
}

/// Returns the flow of a packet: endpoint, client and resolver.
fn flow(view: &PacketView<'_>) -> Flow {
    let packet = view.packet;
    let source = SocketAddr::new(packet.source.into(), packet.source_port);
    let destination = SocketAddr::new(packet.destination.into(), packet.destination_port);
    let (client, resolver) = if view.slot.flags & punt_flags::REPLY == 0 {
        (source, destination)
    } else {
        (destination, source)
    };
    Flow {
        endpoint: view.slot.endpoint,
        tcp: packet.protocol == palisade_abi::protocol::TCP,
        client,
        resolver,
    }
}
