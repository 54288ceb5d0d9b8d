//! DNS: queries are judged by name, answers must be asked for, and what they teach is in the maps before they go on.

use std::{collections::HashMap, net::SocketAddr};

use palisade_abi::{Addr, PuntRequest, Reason, punt_flags};
use palisade_fqdn::{Flow, OpenQuestion, Tracker};
use palisade_protocols::dns::{Answer, Limits, Name, Query, Question, Rcode, reply, rtype};

mod committed;
mod config;
pub(crate) mod stream;
mod types;

use committed::CommittedAnswers;
pub use config::{Denial, DnsLimits, DnsStats};
use types::{AnswerVerdict, Note, QueryVerdict, Resolved, Transfer, Waiting};

use crate::{
    CommitRequest, CommitResult, DnsRules, Millis, PacketView, Route, Rules, Sink,
    expiry_queue::ExpiryQueue,
    frames::{Frames, Spare},
    packet_builder,
    record::{Record, Text, Verdict, What},
};

/// The ticket of what nobody waits for.
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
        reason = "the boxes travel: they go out with a `CommitRequest` and come back"
    )]
    answers: Vec<Box<Answer>>,
    /// Of answers in streams: what became of them, for their streams to hear.
    resolved: Vec<Resolved>,
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

    /// One datagram.
    #[expect(
        clippy::too_many_arguments,
        reason = "the engine's parts, each borrowed for itself"
    )]
    pub(crate) fn datagram(
        &mut self,
        now: Millis,
        view: &PacketView<'_>,
        message: &[u8],
        frames: Frames<F>,
        rules: &Rules,
        spare: &mut Spare<F>,
        sink: &mut impl Sink<F>,
    ) {
        if view.slot.flags & punt_flags::REPLY == 0 {
            match self.query(now, view, message, rules, sink) {
                QueryVerdict::Pass | QueryVerdict::Transfer(_) => frames.release(spare, sink),
                QueryVerdict::Refuse(reason, rcode) => {
                    if let Some(rcode) = rcode {
                        self.reply(view, message, rcode, sink);
                    }
                    frames.discard(reason, spare, sink);
                }
            }
            return;
        }
        match self.answer(now, view, message, sink) {
            AnswerVerdict::Pass => frames.release(spare, sink),
            AnswerVerdict::Refuse(reason) => frames.discard(reason, spare, sink),
            AnswerVerdict::Commit(answer, asked) => {
                let what = Waiting::Datagram(frames);
                self.hold(now, view, answer, asked, what, spare, sink);
            }
        }
    }

    /// Judges a query, and takes note of it if it passes.
    pub(crate) fn query<S: Sink<F>>(
        &mut self,
        now: Millis,
        view: &PacketView<'_>,
        message: &[u8],
        rules: &Rules,
        sink: &mut S,
    ) -> QueryVerdict {
        let Some(rules) = rules.dns(view.slot.ruleset) else {
            let what = What::Unreadable {
                detail: Reason::UnknownRuleset.text(),
            };
            return self.refuse_query(view, Record::of(view, what), Reason::UnknownRuleset, None, sink);
        };
        let query = match Query::parse(message, &Limits::QUERY) {
            Ok(query) => query,
            Err(refusal) => {
                self.stats.malformed[refusal as usize] += 1;
                let what = What::Unreadable {
                    detail: refusal.text(),
                };
                return self.refuse_query(
                    view,
                    Record::of(view, what),
                    Reason::AppMalformed,
                    refusal.rcode(),
                    sink,
                );
            }
        };
        self.stats.queries += 1;
        let mut record = Record::of(view, describe_query(&query.question));
        let allowed = rules.judge(&query.question.name);
        if allowed.is_none() {
            self.stats.denied += 1;
            if !is_audit(view.slot) {
                let rcode = match self.limits.denial {
                    Denial::Refused if is_of_search_list(&query.question.name, rules) => Rcode::NxDomain,
                    Denial::Refused => Rcode::Refused,
                    Denial::NxDomain => Rcode::NxDomain,
                };
                return self.refuse_query(view, record, Reason::AppDenied, Some(rcode), sink);
            }
        }
        let rule = allowed.unwrap_or(view.slot.rule);
        let note = Note { rule };
        let is_transfer = view.packet.protocol == palisade_abi::protocol::TCP
            && matches!(query.question.rtype, rtype::AXFR | rtype::IXFR);
        let passes = if is_transfer {
            QueryVerdict::Transfer(note)
        } else if (self.tracker)
            .asked(flow(view), query.id, &query.question, note, now)
            .is_ok()
        {
            QueryVerdict::Pass
        } else {
            return self.too_many(view, record, sink);
        };
        if allowed.is_none() {
            // only in audit mode
            return match self.refuse_query(view, record, Reason::AppDenied, None, sink) {
                QueryVerdict::Pass => passes,
                refused => refused,
            };
        }
        record.rule = rule;
        sink.record(&record);
        passes
    }

    /// Refuses a query whose answers cannot be told from others.
    fn too_many<S: Sink<F>>(&mut self, view: &PacketView<'_>, record: Record, sink: &mut S) -> QueryVerdict {
        self.stats.too_many += 1;
        self.refuse_query(view, record, Reason::InspectLimit, None, sink)
    }

    /// Whether a message is a query that may go. Takes no note of it.
    fn allows(&self, view: &PacketView<'_>, message: &[u8], rules: &Rules) -> bool {
        let query = Query::parse(message, &Limits::QUERY);
        query.is_ok_and(|query| {
            let rules = rules.dns(view.slot.ruleset);
            rules.is_some_and(|rules| rules.judge(&query.question.name).is_some())
        })
    }

    fn refuse_query<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        record: Record,
        reason: Reason,
        rcode: Option<Rcode>,
        sink: &mut S,
    ) -> QueryVerdict {
        if self.refused(is_audit(view.slot), record, reason, sink) {
            QueryVerdict::Refuse(reason, rcode)
        } else {
            QueryVerdict::Pass
        }
    }

    /// Reports what is refused. False: audit mode lets it pass.
    pub(crate) fn refused<S: Sink<F>>(
        &mut self,
        audit: bool,
        mut record: Record,
        reason: Reason,
        sink: &mut S,
    ) -> bool {
        record.reason = reason;
        record.verdict = if audit {
            self.stats.audited += 1;
            Verdict::Audit
        } else {
            Verdict::Dropped
        };
        sink.record(&record);
        !audit
    }

    /// Answers a query that goes no further.
    fn reply<S: Sink<F>>(&mut self, view: &PacketView<'_>, query: &[u8], rcode: Rcode, sink: &mut S) {
        let mut message = [0; 512];
        if let Ok(length) = reply(query, rcode, &mut message)
            && packet_builder::datagram_back(view, &message[..length], &mut self.out)
        {
            self.stats.replies += 1;
            let route = Route {
                ifindex: view.ifindex,
                hook: view.hook,
                back: true,
            };
            sink.emit(&self.out, route);
        }
    }

    /// Judges an answer: somebody must have asked for it.
    pub(crate) fn answer<S: Sink<F>>(
        &mut self,
        now: Millis,
        view: &PacketView<'_>,
        message: &[u8],
        sink: &mut S,
    ) -> AnswerVerdict {
        let mut answer = self.answers.pop().unwrap_or_default();
        if let Err(refusal) = answer.read(message, &Limits::ANSWER) {
            self.recycle(answer);
            self.stats.malformed[refusal as usize] += 1;
            let what = What::Unreadable {
                detail: refusal.text(),
            };
            return self.refuse_answer(view, Record::of(view, what), Reason::AppMalformed, sink);
        }
        let asked = match self.tracker.answered(flow(view), &answer, now) {
            Ok(asked) => asked,
            Err(unsolicited) => {
                self.stats.unsolicited[unsolicited as usize] += 1;
                let record = Record::of(view, describe(&answer));
                self.recycle(answer);
                return self.refuse_answer(view, record, Reason::DnsUnsolicited, sink);
            }
        };
        self.stats.answers += 1;
        if !answer.addresses.is_empty() && endpoint_asks(view.slot) {
            let endpoint = view.slot.endpoint;
            if !self.committed.has(endpoint, &answer, sink.epoch(), now) {
                return AnswerVerdict::Commit(answer, asked);
            }
            let record = answer_record(now, view, &answer, asked);
            let refresh = CommitRequest {
                ticket: REFRESH,
                endpoint,
                answer,
            };
            return match sink.refresh(refresh) {
                Ok(()) => {
                    self.stats.committed += 1;
                    self.stats.fast_path += 1;
                    sink.record(&record);
                    AnswerVerdict::Pass
                }
                Err(learn) => AnswerVerdict::Commit(learn.answer, asked),
            };
        }
        sink.record(&answer_record(now, view, &answer, asked));
        self.recycle(answer);
        AnswerVerdict::Pass
    }

    /// The first message of a zone transfer.
    fn transfer_begins<S: Sink<F>>(
        &mut self,
        now: Millis,
        view: &PacketView<'_>,
        transfer: &Transfer,
        rcode: u16,
        sink: &mut S,
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
        sink.record(&Record {
            rule: transfer.note.rule,
            latency: u32::try_from(now.saturating_sub(transfer.at)).ok(),
            ..Record::of(view, what)
        });
    }

    fn refuse_answer<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        record: Record,
        reason: Reason,
        sink: &mut S,
    ) -> AnswerVerdict {
        if self.refused(is_audit(view.slot), record, reason, sink) {
            AnswerVerdict::Refuse(reason)
        } else {
            AnswerVerdict::Pass
        }
    }

    /// Keeps an answer until what it teaches is committed.
    #[expect(clippy::too_many_arguments, reason = "as `datagram`")]
    pub(crate) fn hold(
        &mut self,
        now: Millis,
        view: &PacketView<'_>,
        answer: Box<Answer>,
        asked: OpenQuestion<Note>,
        what: Waiting<F>,
        spare: &mut Spare<F>,
        sink: &mut impl Sink<F>,
    ) {
        let record = answer_record(now, view, &answer, asked);
        let endpoint = view.slot.endpoint;
        let by_endpoint = self.held_by.entry(endpoint).or_default();
        if self.held.len() >= self.limits.held || *by_endpoint >= self.limits.held_per_endpoint {
            if *by_endpoint == 0 {
                self.held_by.remove(&endpoint);
            }
            self.recycle(answer);
            self.stats.not_held += 1;
            let audit = is_audit(view.slot);
            self.drop_answer(Held { what, audit, record }, Reason::InspectLimit, spare, sink);
            return;
        }
        *by_endpoint += 1;
        let audit = is_audit(view.slot);
        let ticket = self.held.push(Held { what, audit, record }, now);
        let learn = CommitRequest {
            ticket,
            endpoint,
            answer,
        };
        if let Err(learn) = sink.commit(learn) {
            self.recycle(learn.answer);
            if let Some(held) = self.held.remove(ticket) {
                self.count_down(endpoint);
                self.stats.uncommitted += 1;
                self.drop_answer(held, Reason::DnsUncommitted, spare, sink);
            }
        }
    }

    /// What was asked to be learned is, or is not.
    pub(crate) fn committed(
        &mut self,
        now: Millis,
        learned: CommitResult,
        spare: &mut Spare<F>,
        sink: &mut impl Sink<F>,
    ) {
        if let (true, Some(lease)) = (learned.committed, learned.lease) {
            self.committed.note(learned.endpoint, &learned.answer, lease, now);
        }
        self.recycle(learned.answer);
        if learned.ticket == REFRESH {
            return;
        }
        // none: it was overdue, or its endpoint is gone
        let Some(held) = self.held.remove(learned.ticket) else {
            return;
        };
        self.count_down(held.record.endpoint);
        if learned.committed {
            self.stats.committed += 1;
            sink.record(&held.record);
            self.settle(held.what, Ok(()), spare, sink);
        } else {
            self.stats.uncommitted += 1;
            self.drop_answer(held, Reason::DnsUncommitted, spare, sink);
        }
    }

    fn drop_answer(&mut self, held: Held<F>, reason: Reason, spare: &mut Spare<F>, sink: &mut impl Sink<F>) {
        let passes = if self.refused(held.audit, held.record, reason, sink) {
            Err(reason)
        } else {
            Ok(())
        };
        self.settle(held.what, passes, spare, sink);
    }

    fn settle(
        &mut self,
        what: Waiting<F>,
        passes: Result<(), Reason>,
        spare: &mut Spare<F>,
        sink: &mut impl Sink<F>,
    ) {
        match (what, passes) {
            (Waiting::Datagram(frames), Ok(())) => frames.release(spare, sink),
            (Waiting::Datagram(frames), Err(reason)) => frames.discard(reason, spare, sink),
            (Waiting::Stream(place), passes) => self.resolved.push(Resolved { place, passes }),
        }
    }

    /// What became of an answer in a stream, if there is news.
    pub(crate) fn next_resolved(&mut self) -> Option<Resolved> {
        self.resolved.pop()
    }

    pub(crate) fn tick(&mut self, now: Millis, spare: &mut Spare<F>, sink: &mut impl Sink<F>) {
        self.tracker.expire(now);
        let Some(limit) = now.checked_sub(self.limits.deadline) else {
            return;
        };
        while let Some(held) = self.held.pop_since(limit) {
            self.count_down(held.record.endpoint);
            self.stats.overdue += 1;
            self.drop_answer(held, Reason::DnsUncommitted, spare, sink);
        }
    }

    pub(crate) fn deadline(&self) -> Option<Millis> {
        self.held
            .since()
            .map(|since| since.saturating_add(self.limits.deadline))
    }

    /// Drops what is held of an endpoint (of all: `None`), whatever its mode: nobody may judge for it any more.
    pub(crate) fn forget(&mut self, endpoint: Option<u16>, spare: &mut Spare<F>, sink: &mut impl Sink<F>) {
        if let Some(endpoint) = endpoint {
            self.tracker.remove_endpoint(endpoint);
        }
        while let Some(mut held) = self
            .held
            .pop_if(|held| endpoint.is_none_or(|endpoint| held.record.endpoint == endpoint))
        {
            self.count_down(held.record.endpoint);
            held.audit = false;
            self.drop_answer(held, Reason::DnsUncommitted, spare, sink);
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
        /// What an answer of common size needs.
        const ADDRESSES: usize = 64;
        if self.answers.len() < self.limits.held {
            answer.addresses.clear();
            answer.addresses.shrink_to(ADDRESSES);
            self.answers.push(answer);
        }
    }
}

/// Whether the endpoint is the one who asks: then the answers teach it addresses. Else it is the one who is asked.
const fn endpoint_asks(slot: &PuntRequest) -> bool {
    (slot.flags & punt_flags::INGRESS != 0) == (slot.flags & punt_flags::REPLY != 0)
}

pub(crate) const fn is_audit(slot: &PuntRequest) -> bool {
    slot.flags & punt_flags::AUDIT != 0
}

/// Between whom the packet goes.
pub(crate) fn flow(view: &PacketView<'_>) -> Flow {
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

fn describe_query(question: &Question) -> What {
    What::DnsQuery {
        name: Text::of(&question.name),
        kind: question.rtype,
    }
}

fn describe(answer: &Answer) -> What {
    let mut addresses = [Addr::UNSPECIFIED; 8];
    let mut count = 0;
    for (slot, address) in addresses.iter_mut().zip(&answer.addresses) {
        *slot = address.ip.into();
        count += 1;
    }
    What::DnsAnswer {
        name: answer
            .question
            .as_ref()
            .map_or_else(Text::default, |question| Text::of(&question.name)),
        kind: answer.question.as_ref().map_or(0, |question| question.rtype),
        rcode: answer.rcode,
        addresses,
        count,
        ttl: answer.ttl.unwrap_or(0),
        cname: answer.aliases.last().map_or_else(Text::default, Text::of),
    }
}

fn answer_record(now: Millis, view: &PacketView<'_>, answer: &Answer, asked: OpenQuestion<Note>) -> Record {
    Record {
        rule: asked.note.rule,
        latency: u32::try_from(now.saturating_sub(asked.at)).ok(),
        ..Record::of(view, describe(answer))
    }
}

/// Whether a name is one that may be asked for, with a domain of a search list behind it (`ndots` in resolv.conf(5)).
/// Some resolvers go on with the next domain, and at last with the name itself, only if such a name does not exist.
fn is_of_search_list(name: &Name, rules: &DnsRules) -> bool {
    /// More labels than search domains have.
    const MOST: usize = 8;
    let count = name.labels().count();
    (1..=MOST.min(count.saturating_sub(1))).any(|cut| {
        let length: usize = name.labels().take(count - cut).map(|label| label.len() + 1).sum();
        let mut wire = [0; 256];
        let Some((kept, room)) = name.wire().get(..length).zip(wire.get_mut(..length)) else {
            return false;
        };
        room.copy_from_slice(kept);
        Name::from_wire(&wire[..=length]).is_ok_and(|name| rules.judge(&name).is_some())
    })
}
