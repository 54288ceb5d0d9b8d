//! DNS over TCP (RFC 7766): a reader of connections. A query goes on when it is judged, an answer when it belongs to a
//! question and what it teaches is committed. A query that is refused is answered on its connection, which ends with
//! that; an answer that must not pass ends it at once.
//!
//! Of a zone transfer (RFC 5936, RFC 1995) all messages go on: from the question on, whatever has its number. It is a
//! copy for a secondary, not a lookup, and teaches nothing.

use std::collections::VecDeque;

use palisade_abi::{CtKey, Reason, punt_flags};
use palisade_protocols::dns::{Head, Limits, ParseError, Query, Rcode, first_message, reply};

use super::{
    Dns, describe_query, is_audit,
    types::{AnswerVerdict, Place, QueryVerdict, Transfer, Waiting},
};
use crate::{
    Millis, PacketView, Rules, Sink,
    frames::Spare,
    record::{Record, What},
    tcp::{
        Action, Connections, Offloadable, Side, StreamInspector, TcpLimits, TcpStats, key,
        quote::QuotedSegment,
    },
};

/// Length in front of a message.
const PREFIX: usize = 2;
/// Bytes of answers made here after which queries behind are not answered any more.
const REPLIES: usize = 4096;
/// Zone transfers of one connection that are remembered.
const TRANSFERS: usize = 16;

/// What is kept of a connection. Places in a stream count from its first byte.
struct Flow {
    number: u64,
    /// Another policy has its packets read too.
    is_shared: bool,
    /// So far the client's messages may go.
    asked: u64,
    /// Ends of queries that may go and are not known to be on their way.
    leaving: VecDeque<u64>,
    /// How many have been on their way, and how many answers may go.
    sent: u64,
    answered: u64,
    /// From here on nothing of the client goes any further.
    refused: Option<Refused>,
    transfers: Vec<Transfer>,
    /// Position up to which the server's messages are forwarded.
    forwarded: u64,
    /// Position of the first message that is not judged yet.
    judged: u64,
    /// What is to come of a message of a transfer whose beginning may go.
    rest: usize,
    /// Its messages between the two.
    answers: VecDeque<Judged>,
    /// It must not go on.
    broken: Option<Reason>,
}

/// Queries that go no further.
struct Refused {
    /// Why the first does not.
    reason: Reason,
    /// Their answers.
    replies: Vec<u8>,
    /// How far they have been judged, from the beginning of the first.
    judged: usize,
}

/// An answer that was judged.
struct Judged {
    end: u64,
    /// It may go; else it waits to be committed.
    passes: bool,
    /// It answers a query.
    closes: bool,
}

impl Flow {
    fn new(number: u64) -> Self {
        Self {
            number,
            is_shared: false,
            asked: 0,
            leaving: VecDeque::new(),
            sent: 0,
            answered: 0,
            refused: None,
            transfers: Vec::new(),
            forwarded: 0,
            judged: 0,
            rest: 0,
            answers: VecDeque::new(),
            broken: None,
        }
    }

    /// The transfer that a message belongs to. An ordinary question may have the number of one; its answer repeats it.
    fn transfer(&mut self, head: &Head) -> Option<&mut Transfer> {
        self.transfers.iter_mut().find(|transfer| {
            transfer.id == head.id && head.question.as_ref().is_none_or(|q| *q == transfer.question)
        })
    }

    /// What became of an answer that waits.
    fn settle(&mut self, place: Place, passes: Result<(), Reason>) {
        if self.number != place.number {
            return;
        }
        let Some(judged) = self.answers.iter_mut().find(|judged| judged.end == place.end) else {
            return;
        };
        match passes {
            Ok(()) => judged.passes = true,
            Err(reason) => self.broken = Some(reason),
        }
    }
}

impl Offloadable for Flow {
    /// It went on unread because of audit mode.
    type OffloadVerdict = ();
    fn remember(&mut self) {}
}

/// The connections of one worker.
pub(crate) struct Streams<F> {
    connections: Connections<F, Flow>,
    numbers: u64,
}

/// Reads one connection for the time of a call.
struct DnsStream<'a, 'v, F> {
    flow: &'a mut Flow,
    dns: &'a mut Dns<F>,
    spare: &'a mut Spare<F>,
    key: CtKey,
    now: Millis,
    /// The packet that has come, if it is one, and by what it is judged. Every message is judged when the packet that
    /// completes it is here.
    packet: Option<(&'a PacketView<'v>, &'a Rules)>,
}

impl<F> Streams<F> {
    pub(crate) fn new(limits: &TcpLimits) -> Self {
        Self {
            connections: Connections::new(limits),
            numbers: 0,
        }
    }

    pub(crate) fn stats(&self) -> TcpStats {
        self.connections.stats()
    }

    /// A segment.
    #[expect(
        clippy::too_many_arguments,
        reason = "the engine's parts, each borrowed for itself"
    )]
    pub(crate) fn segment<S: Sink<F>>(
        &mut self,
        now: Millis,
        view: &PacketView<'_>,
        frame: F,
        dns: &mut Dns<F>,
        rules: &Rules,
        spare: &mut Spare<F>,
        sink: &mut S,
    ) {
        let Self { connections, numbers } = self;
        connections.packet(
            now,
            view,
            frame,
            || {
                *numbers += 1;
                Flow::new(*numbers)
            },
            |flow| {
                flow.is_shared |= view.slot.flags & punt_flags::SHARED != 0;
                DnsStream {
                    flow,
                    dns: &mut *dns,
                    spare: &mut *spare,
                    key: key(view),
                    now,
                    packet: Some((view, rules)),
                }
            },
            |(), _| {
                if is_audit(view.slot) {
                    Ok(())
                } else {
                    Err(Reason::TcpMidstream)
                }
            },
            sink,
        );
        self.resolve(now, dns, spare, sink);
    }

    /// An ICMP error about a connection.
    pub(crate) fn error<S: Sink<F>>(
        &mut self,
        now: Millis,
        view: &PacketView<'_>,
        quoted: &QuotedSegment,
        frame: F,
        sink: &mut S,
    ) {
        self.connections.error(now, view, quoted, frame, sink);
    }

    /// Tells the connections what became of their answers.
    pub(crate) fn resolve<S: Sink<F>>(
        &mut self,
        now: Millis,
        dns: &mut Dns<F>,
        spare: &mut Spare<F>,
        sink: &mut S,
    ) {
        while let Some(resolved) = dns.next_resolved() {
            let place = resolved.place;
            self.connections.resume(
                now,
                &place.key,
                |flow| {
                    flow.settle(place, resolved.passes);
                    DnsStream {
                        flow,
                        dns: &mut *dns,
                        spare: &mut *spare,
                        key: place.key,
                        now,
                        packet: None,
                    }
                },
                sink,
            );
        }
    }

    /// Does what is due.
    pub(crate) fn tick<S: Sink<F>>(
        &mut self,
        now: Millis,
        dns: &mut Dns<F>,
        spare: &mut Spare<F>,
        sink: &mut S,
    ) {
        self.resolve(now, dns, spare, sink);
        self.connections.tick(now, sink);
    }

    pub(crate) fn deadline(&self) -> Option<Millis> {
        self.connections.deadline()
    }

    /// Drops what is held of an endpoint, or of all.
    pub(crate) fn forget<S: Sink<F>>(&mut self, endpoint: Option<u16>, dns: &mut Dns<F>, sink: &mut S) {
        self.connections.forget(endpoint, sink);
        // their connections are gone
        while dns.next_resolved().is_some() {}
    }
}

impl<F> StreamInspector<F> for DnsStream<'_, '_, F> {
    fn read<S: Sink<F>>(&mut self, side: Side, bytes: &[u8], end: bool, sink: &mut S) -> Action {
        if let Some(reason) = self.flow.broken {
            return Action::Abort(reason);
        }
        match side {
            Side::Client => self.client(bytes, end, sink),
            Side::Server => self.server(bytes, end, sink),
        }
    }

    fn sent(&mut self, side: Side, to: u64) {
        let flow = &mut *self.flow;
        while side == Side::Client && flow.leaving.pop_front_if(|end| *end <= to).is_some() {
            flow.sent += 1;
        }
    }
}

impl<'a, 'v, F> DnsStream<'a, 'v, F> {
    /// Reports what cannot be read as messages. Audit mode lets it pass; then nothing more can be read.
    fn refuse<S: Sink<F>>(&mut self, detail: &'static str, sink: &mut S) -> Action {
        const REASON: Reason = Reason::AppMalformed;
        let Some((view, _)) = self.packet else {
            return Action::Abort(REASON);
        };
        let record = Record::of(view, What::Unreadable { detail });
        if self.dns.refused(is_audit(view.slot), record, REASON, sink) {
            Action::Abort(REASON)
        } else {
            Action::Offload
        }
    }

    fn malformed<S: Sink<F>>(&mut self, refusal: ParseError, sink: &mut S) -> Action {
        self.dns.stats.malformed[refusal as usize] += 1;
        self.refuse(refusal.text(), sink)
    }

    fn client<S: Sink<F>>(&mut self, bytes: &[u8], end: bool, sink: &mut S) -> Action {
        if self.flow.refused.is_some() {
            return self.answer(bytes, sink);
        }
        if bytes.is_empty() {
            return Action::Forward(0);
        }
        let message = match first_message(bytes, Limits::QUERY.message) {
            Ok(Some(message)) => message,
            Ok(None) if end => return self.refuse("the end within a message", sink),
            // Some clients send the length by itself, and wait.
            Ok(None) if bytes.len() <= PREFIX => return Action::ForwardUnjudged(bytes.len()),
            Ok(None) => return Action::NeedMore,
            Err(refusal) => return self.malformed(refusal, sink),
        };
        match self.query(message, sink) {
            None => Action::NeedMore,
            Some(QueryVerdict::Pass | QueryVerdict::Transfer(_)) => {
                let length = PREFIX + message.len();
                self.flow.asked += length as u64;
                self.flow.leaving.push_back(self.flow.asked);
                Action::Forward(length)
            }
            Some(QueryVerdict::Refuse(reason, rcode)) => {
                let Some(replies) = rcode.and_then(|rcode| framed_reply(message, rcode)) else {
                    return Action::Abort(reason);
                };
                self.dns.stats.replies += 1;
                self.flow.refused = Some(Refused {
                    reason,
                    replies,
                    judged: PREFIX + message.len(),
                });
                self.answer(bytes, sink)
            }
        }
    }

    /// Answers the queries that go no further, once those before them are answered. Who asks for the addresses of both
    /// families at once gets an answer for both.
    fn answer<S: Sink<F>>(&mut self, bytes: &[u8], sink: &mut S) -> Action {
        let packet = self.packet_of(Side::Client);
        let flow = &mut *self.flow;
        if let Some((view, rules)) = packet
            && let Some(refused) = &mut flow.refused
        {
            while refused.replies.len() < REPLIES
                && let rest = bytes.get(refused.judged..).unwrap_or_default()
                && let Ok(Some(message)) = first_message(rest, Limits::QUERY.message)
                && !self.dns.allows(view, message, rules)
            {
                let verdict = self.dns.query(self.now, view, message, rules, sink);
                let reply = match verdict {
                    QueryVerdict::Refuse(_, Some(rcode)) => framed_reply(message, rcode),
                    _ => None,
                };
                let Some(reply) = reply else {
                    refused.judged = usize::MAX;
                    break;
                };
                self.dns.stats.replies += 1;
                refused.replies.extend(reply);
                refused.judged += PREFIX + message.len();
            }
        }
        // What stands before them in the same packet is sent on by itself after a moment, if one may make packets here.
        let comes_late = !flow.leaving.is_empty() && !flow.is_shared;
        if comes_late || flow.answered < flow.sent {
            return Action::NeedMore;
        }
        match flow.refused.take() {
            Some(refused) => Action::Respond(refused.reason, refused.replies),
            None => Action::NeedMore,
        }
    }

    /// The packet that has come, if it is this side's.
    fn packet_of(&self, side: Side) -> Option<(&'a PacketView<'v>, &'a Rules)> {
        self.packet.filter(|(view, _)| Side::of(view.slot) == side)
    }

    fn query<S: Sink<F>>(&mut self, message: &[u8], sink: &mut S) -> Option<QueryVerdict> {
        let (view, rules) = self.packet_of(Side::Client)?;
        let verdict = self.dns.query(self.now, view, message, rules, sink);
        if let QueryVerdict::Transfer(note) = verdict
            && let Ok(query) = Query::parse(message, &Limits::QUERY)
        {
            let transfers = &mut self.flow.transfers;
            transfers.retain(|known| known.id != query.id || known.question != query.question);
            if transfers.len() >= TRANSFERS {
                // Where another ends is not read: the oldest that has begun is over by now.
                let oldest = transfers.iter().position(|transfer| transfer.begun);
                let Some(oldest) = oldest else {
                    let record = Record::of(view, describe_query(&query.question));
                    return Some(self.dns.too_many(view, record, sink));
                };
                transfers.remove(oldest);
            }
            transfers.push(Transfer {
                id: query.id,
                question: query.question,
                note,
                at: self.now,
                begun: false,
            });
        }
        Some(verdict)
    }

    fn server<S: Sink<F>>(&mut self, bytes: &[u8], end: bool, sink: &mut S) -> Action {
        let flow = &mut *self.flow;
        if bytes.is_empty() {
            // Who waits behind others for an answer waits in vain.
            return match &flow.refused {
                Some(refused) => Action::Abort(refused.reason),
                None => Action::Forward(0),
            };
        }
        if flow.rest > 0 {
            let n = flow.rest.min(bytes.len());
            flow.rest -= n;
            flow.forwarded += n as u64;
            flow.judged = flow.forwarded;
            return Action::Forward(n);
        }
        loop {
            let at = (self.flow.judged - self.flow.forwarded) as usize;
            let unjudged = bytes.get(at..).unwrap_or_default();
            let message = match first_message(unjudged, Limits::ANSWER.message) {
                Ok(Some(message)) => message,
                Ok(None) if end && !unjudged.is_empty() => {
                    return self.refuse("the end within a message", sink);
                }
                Ok(None) => match self.begin(unjudged, sink) {
                    Some(n) => return Action::Forward(n),
                    None => break,
                },
                Err(refusal) => return self.malformed(refusal, sink),
            };
            match self.judge_answer(message, sink) {
                Ok(true) => {}
                Ok(false) => break,
                Err(reason) => return Action::Abort(reason),
            }
        }
        let flow = &mut *self.flow;
        let before = flow.forwarded;
        while let Some(judged) = flow.answers.pop_front_if(|judged| judged.passes) {
            flow.forwarded = judged.end;
            flow.answered += u64::from(judged.closes);
        }
        if flow.forwarded > before {
            return Action::Forward((flow.forwarded - before) as usize);
        }
        // A long answer is not sent to its end before its beginning is acknowledged; without its end nobody takes it
        // for one.
        let last = flow
            .answers
            .front()
            .map(|judged| (judged.end - flow.forwarded) as usize - 1);
        Action::ForwardUnjudged(last.unwrap_or(bytes.len()))
    }

    /// Judges a message of the server. False: not now. Err: why the connection ends.
    fn judge_answer<S: Sink<F>>(&mut self, message: &[u8], sink: &mut S) -> Result<bool, Reason> {
        let Some((view, _)) = self.packet_of(Side::Server) else {
            return Ok(false);
        };
        let end = self.flow.judged + (PREFIX + message.len()) as u64;
        let (passes, closes) = if let Some(closes) = self.transferred(view, message, sink) {
            (true, closes)
        } else {
            match self.dns.answer(self.now, view, message, sink) {
                AnswerVerdict::Pass => (true, true),
                AnswerVerdict::Refuse(reason) => return Err(reason),
                AnswerVerdict::Commit(answer, asked) => {
                    let place = Place {
                        key: self.key,
                        number: self.flow.number,
                        end,
                    };
                    let what = Waiting::Stream(place);
                    self.dns
                        .hold(self.now, view, answer, asked, what, self.spare, sink);
                    (false, true)
                }
            }
        };
        self.flow.judged = end;
        self.flow.answers.push_back(Judged { end, passes, closes });
        Ok(true)
    }

    /// The beginning of a message of a transfer need not wait for its end, if nothing before it waits. How much of it
    /// may go.
    fn begin<S: Sink<F>>(&mut self, bytes: &[u8], sink: &mut S) -> Option<usize> {
        let (view, _) = self.packet_of(Side::Server)?;
        let (prefix, message) = bytes.split_first_chunk::<PREFIX>()?;
        if !self.flow.answers.is_empty() {
            return None;
        }
        let closes = self.transferred(view, message, sink)?;
        let flow = &mut *self.flow;
        flow.answered += u64::from(closes);
        flow.rest = usize::from(u16::from_be_bytes(*prefix)) - message.len();
        flow.forwarded += bytes.len() as u64;
        flow.judged = flow.forwarded;
        Some(bytes.len())
    }

    /// Takes a message, or the beginning of one, as part of a transfer; `None` if it is not. Whether it is the first.
    fn transferred<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        message: &[u8],
        sink: &mut S,
    ) -> Option<bool> {
        if self.flow.transfers.is_empty() {
            return None;
        }
        let head = Head::read(message).ok()?;
        let transfer = self.flow.transfer(&head)?;
        self.dns.stats.transferred += 1;
        let is_first = !transfer.begun;
        if is_first {
            transfer.begun = true;
            self.dns
                .transfer_begins(self.now, view, transfer, head.rcode, sink);
        }
        Some(is_first)
    }
}

/// The answer to a query as it stands in a stream.
fn framed_reply(query: &[u8], rcode: Rcode) -> Option<Vec<u8>> {
    let mut message = [0; 512];
    let length = reply(query, rcode, &mut message).ok()?;
    let prefix = u16::try_from(length).ok()?.to_be_bytes();
    Some([&prefix[..], message.get(..length)?].concat())
}
