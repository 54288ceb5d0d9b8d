//! DNS over TCP (RFC 7766): the inspector of one connection. A query is forwarded once it is allowed, an answer once it
//! is matched with a question and its addresses are committed. A query that is denied gets a response, which ends the
//! connection. An answer that is dropped resets the connection.
//!
//! The messages of a zone transfer (RFC 5936, RFC 1995) are forwarded. A message belongs to the transfer if it has the
//! ID of the query and repeats no other question. A transfer is a copy for a secondary server, not a lookup, so its
//! addresses are not learned.

mod handover;

use std::collections::VecDeque;

use palisade_abi::{CtKey, Reason, punt_flags};
use palisade_protocols::dns::{Head, Limits, ParseError, Query, Rcode, first_message, reply};

use super::{
    Dns, is_audit,
    query::is_allowed,
    records,
    types::{AnswerVerdict, Place, QueryVerdict, Transfer, Waiting},
};
use crate::{
    Millis, PacketView, Sink,
    context::Cx,
    record::{Record, What},
    tcp::{
        Action, Connections, Offloadable, Side, StreamInspector, TcpLimits, TcpStats, key,
        quote::QuotedSegment,
    },
};

/// Length of the length field in front of a message, bytes.
const PREFIX: usize = 2;
/// Once the responses to denied queries have this total length, bytes, further denied queries get no response.
const REPLIES: usize = 4096;
/// Maximum number of zone transfers of one connection that are tracked.
const TRANSFERS: usize = 16;

/// State of a connection. Offsets count from the first byte of a stream.
struct Flow {
    number: u64,
    /// Whether two policies inspect the packets: that of a workload and that of the node.
    is_shared: bool,
    /// Offset up to which the client's messages may be forwarded.
    asked: u64,
    /// Offsets of the ends of allowed queries whose forwarding is not confirmed yet.
    leaving: VecDeque<u64>,
    /// Number of queries that were forwarded.
    sent: u64,
    /// Number of answers that may be forwarded.
    answered: u64,
    /// The denied queries. From the first denied query on, no byte of the client is forwarded.
    refused: Option<Refused>,
    transfers: Vec<Transfer>,
    /// Offset up to which the server's messages are forwarded.
    forwarded: u64,
    /// Offset of the first message that is not inspected yet.
    inspected: u64,
    /// Number of missing bytes of a transfer message whose beginning was forwarded.
    rest: usize,
    /// Inspected messages between `forwarded` and `inspected`.
    answers: VecDeque<Inspected>,
    /// Reason for which the connection must be aborted.
    broken: Option<Reason>,
}

/// Denied queries.
struct Refused {
    /// Reason of the first denied query.
    reason: Reason,
    /// Responses to the denied queries.
    replies: Vec<u8>,
    /// Number of inspected bytes, from the beginning of the first denied query; `usize::MAX` after a query for which no
    /// response can be built.
    inspected: usize,
}

/// An answer that was inspected.
struct Inspected {
    end: u64,
    /// Whether the answer may be forwarded. If not, its addresses are not committed yet.
    passes: bool,
    /// Whether this message is the first one that answers a query.
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
            inspected: 0,
            rest: 0,
            answers: VecDeque::new(),
            broken: None,
        }
    }

    /// Returns the transfer to which a message belongs. An ordinary query can have the same ID. The answer to that
    /// query does not belong to the transfer, because it repeats another question.
    fn transfer(&mut self, head: &Head) -> Option<&mut Transfer> {
        self.transfers.iter_mut().find(|transfer| {
            transfer.id == head.id && head.question.as_ref().is_none_or(|q| *q == transfer.question)
        })
    }

    /// Stores the verdict of a held answer.
    fn settle(&mut self, place: Place, passes: Result<(), Reason>) {
        if self.number != place.number {
            return;
        }
        let Some(inspected) = self
            .answers
            .iter_mut()
            .find(|inspected| inspected.end == place.end)
        else {
            return;
        };
        match passes {
            Ok(()) => inspected.passes = true,
            Err(reason) => self.broken = Some(reason),
        }
    }
}

impl Offloadable for Flow {
    /// DNS connections are offloaded in audit mode only, so there is no verdict to keep.
    type OffloadVerdict = ();
    fn remember(&mut self) {}
}

/// The DNS connections of one worker.
pub(crate) struct Streams<F> {
    connections: Connections<F, Flow>,
    /// Number of the last connection.
    numbers: u64,
}

/// Inspector of one connection for one call.
struct DnsStream<'a, 'v, F> {
    flow: &'a mut Flow,
    dns: &'a mut Dns<F>,
    key: CtKey,
    /// The packet that has arrived; `None` if the call is for the result of a commit. A message is inspected when the
    /// packet that completes it arrives.
    packet: Option<&'a PacketView<'v>>,
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

    /// Handles a segment.
    pub(crate) fn segment<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        frame: F,
        dns: &mut Dns<F>,
        cx: &mut Cx<'_, F, S>,
    ) {
        let Self { connections, numbers } = self;
        connections.packet(
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
                    key: key(view),
                    packet: Some(view),
                }
            },
            |(), _| {
                if is_audit(view.slot) {
                    Ok(())
                } else {
                    Err(Reason::TcpMidstream)
                }
            },
            cx,
        );
        self.resolve(dns, cx);
    }

    /// Handles an ICMP error about a connection.
    pub(crate) fn error<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        quoted: &QuotedSegment,
        frame: F,
        cx: &mut Cx<'_, F, S>,
    ) {
        self.connections.error(view, quoted, frame, cx);
    }

    /// Passes the verdicts on held answers to their connections.
    pub(crate) fn resolve<S: Sink<F>>(&mut self, dns: &mut Dns<F>, cx: &mut Cx<'_, F, S>) {
        while let Some(resolved) = dns.next_resolved() {
            let place = resolved.place;
            self.connections.resume(
                &place.key,
                |flow| {
                    flow.settle(place, resolved.passes);
                    DnsStream {
                        flow,
                        dns: &mut *dns,
                        key: place.key,
                        packet: None,
                    }
                },
                cx,
            );
        }
    }

    /// Handles the timeouts that are due.
    pub(crate) fn tick<S: Sink<F>>(&mut self, dns: &mut Dns<F>, cx: &mut Cx<'_, F, S>) {
        self.resolve(dns, cx);
        self.connections.tick(cx);
    }

    pub(crate) fn deadline(&self) -> Option<Millis> {
        self.connections.deadline()
    }

    /// Removes the connections of one endpoint, or all connections, and drops their held packets.
    pub(crate) fn forget<S: Sink<F>>(
        &mut self,
        endpoint: Option<u16>,
        dns: &mut Dns<F>,
        cx: &mut Cx<'_, F, S>,
    ) {
        self.connections.forget(endpoint, cx);
        // These verdicts belong to connections that were removed.
        while dns.next_resolved().is_some() {}
    }
}

impl<F> StreamInspector<F> for DnsStream<'_, '_, F> {
    fn read<S: Sink<F>>(&mut self, side: Side, bytes: &[u8], end: bool, cx: &mut Cx<'_, F, S>) -> Action {
        if let Some(reason) = self.flow.broken {
            return Action::Abort(reason);
        }
        match side {
            Side::Client => self.client(bytes, end, cx),
            Side::Server => self.server(bytes, end, cx),
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
    /// Records a stream that is not a valid sequence of messages, and aborts the connection. Audit mode offloads the
    /// connection instead, because the next message cannot be found.
    fn refuse<S: Sink<F>>(&mut self, detail: &'static str, cx: &mut Cx<'_, F, S>) -> Action {
        const REASON: Reason = Reason::AppMalformed;
        let Some(view) = self.packet else {
            return Action::Abort(REASON);
        };
        let record = Record::of(view, What::Unreadable { detail });
        if self.dns.refused(is_audit(view.slot), record, REASON, cx) {
            Action::Abort(REASON)
        } else {
            Action::Offload
        }
    }

    fn malformed<S: Sink<F>>(&mut self, error: ParseError, cx: &mut Cx<'_, F, S>) -> Action {
        if let Some(count) = self.dns.stats.malformed.get_mut(error as usize) {
            *count += 1;
        }
        self.refuse(error.text(), cx)
    }

    fn client<S: Sink<F>>(&mut self, bytes: &[u8], end: bool, cx: &mut Cx<'_, F, S>) -> Action {
        if self.flow.refused.is_some() {
            return self.respond(bytes, cx);
        }
        if bytes.is_empty() {
            return Action::Forward(0);
        }
        let message = match first_message(bytes, Limits::QUERY.message) {
            Ok(Some(message)) => message,
            Ok(None) if end => return self.refuse("stream ends within a message", cx),
            // Some clients send the length in a segment of its own and wait for its acknowledgement.
            Ok(None) if bytes.len() <= PREFIX => return Action::ForwardUndecided(bytes.len()),
            Ok(None) => return Action::NeedMore,
            Err(refusal) => return self.malformed(refusal, cx),
        };
        match self.query(message, cx) {
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
                    inspected: PREFIX + message.len(),
                });
                self.respond(bytes, cx)
            }
        }
    }

    /// Responds to the denied queries once all queries before them are answered. Denied queries that follow directly
    /// get a response too, so that a client which asks for A and AAAA at once gets both responses.
    fn respond<S: Sink<F>>(&mut self, bytes: &[u8], cx: &mut Cx<'_, F, S>) -> Action {
        let packet = self.packet_of(Side::Client);
        let flow = &mut *self.flow;
        if let Some(view) = packet
            && let Some(refused) = &mut flow.refused
        {
            while refused.replies.len() < REPLIES
                && let rest = bytes.get(refused.inspected..).unwrap_or_default()
                && let Ok(Some(message)) = first_message(rest, Limits::QUERY.message)
                && !is_allowed(view, message, cx)
            {
                let verdict = self.dns.query(view, message, cx);
                let reply = match verdict {
                    QueryVerdict::Refuse(_, Some(rcode)) => framed_reply(message, rcode),
                    _ => None,
                };
                let Some(reply) = reply else {
                    refused.inspected = usize::MAX;
                    break;
                };
                self.dns.stats.replies += 1;
                refused.replies.extend(reply);
                refused.inspected += PREFIX + message.len();
            }
        }
        // Queries in the same packet before the denied one are forwarded in a generated packet, once they are
        // acknowledged on behalf of the resolver. If two policies inspect the connection, no packet is generated,
        // so the response does not wait for these queries.
        let comes_late = !flow.leaving.is_empty() && !flow.is_shared;
        if comes_late || flow.answered < flow.sent {
            return Action::NeedMore;
        }
        match flow.refused.take() {
            Some(refused) => Action::Respond(refused.reason, refused.replies),
            None => Action::NeedMore,
        }
    }

    /// Returns the packet that has arrived, if `side` has sent it.
    fn packet_of(&self, side: Side) -> Option<&'a PacketView<'v>> {
        self.packet.filter(|view| Side::of(view.slot) == side)
    }

    fn query<S: Sink<F>>(&mut self, message: &[u8], cx: &mut Cx<'_, F, S>) -> Option<QueryVerdict> {
        let view = self.packet_of(Side::Client)?;
        let verdict = self.dns.query(view, message, cx);
        if let QueryVerdict::Transfer(note) = verdict
            && let Ok(query) = Query::parse(message, &Limits::QUERY)
        {
            let transfers = &mut self.flow.transfers;
            transfers.retain(|known| known.id != query.id || known.question != query.question);
            if transfers.len() >= TRANSFERS {
                // The end of a transfer is not tracked. The oldest transfer that has begun is taken for complete.
                let oldest = transfers.iter().position(|transfer| transfer.begun);
                let Some(oldest) = oldest else {
                    let record = Record::of(view, records::query(&query.question));
                    return Some(self.dns.too_many(view, record, cx));
                };
                transfers.remove(oldest);
            }
            transfers.push(Transfer {
                id: query.id,
                question: query.question,
                note,
                at: cx.now,
                begun: false,
            });
        }
        Some(verdict)
    }

    fn server<S: Sink<F>>(&mut self, bytes: &[u8], end: bool, cx: &mut Cx<'_, F, S>) -> Action {
        let flow = &mut *self.flow;
        if bytes.is_empty() {
            // No bytes: the server has closed the connection. The queries before a denied one then stay unanswered, so
            // the response to it would never be due.
            return match &flow.refused {
                Some(refused) => Action::Abort(refused.reason),
                None => Action::Forward(0),
            };
        }
        if flow.rest > 0 {
            let n = flow.rest.min(bytes.len());
            flow.rest -= n;
            flow.forwarded += n as u64;
            flow.inspected = flow.forwarded;
            return Action::Forward(n);
        }
        loop {
            let at = (self.flow.inspected - self.flow.forwarded) as usize;
            let unevaluated = bytes.get(at..).unwrap_or_default();
            let message = match first_message(unevaluated, Limits::ANSWER.message) {
                Ok(Some(message)) => message,
                Ok(None) if end && !unevaluated.is_empty() => {
                    return self.refuse("stream ends within a message", cx);
                }
                Ok(None) => match self.begin(unevaluated, cx) {
                    Some(n) => return Action::Forward(n),
                    None => break,
                },
                Err(refusal) => return self.malformed(refusal, cx),
            };
            match self.evaluate_answer(message, cx) {
                Ok(true) => {}
                Ok(false) => break,
                Err(reason) => return Action::Abort(reason),
            }
        }
        let flow = &mut *self.flow;
        let before = flow.forwarded;
        while let Some(inspected) = flow.answers.pop_front_if(|inspected| inspected.passes) {
            flow.forwarded = inspected.end;
            flow.answered += u64::from(inspected.closes);
        }
        if flow.forwarded > before {
            return Action::Forward((flow.forwarded - before) as usize);
        }
        // A server can wait for an acknowledgement of the beginning of a long answer before it sends the end.
        // Forwarding the beginning does no harm, because the client cannot use a message without its end.
        let last = flow
            .answers
            .front()
            .map(|inspected| (inspected.end - flow.forwarded) as usize - 1);
        Action::ForwardUndecided(last.unwrap_or(bytes.len()))
    }

    /// Inspects a message of the server. Returns false if the call is not for a packet of the server; the message is
    /// then inspected later.
    ///
    /// # Errors
    /// Returns the reason if the connection must be aborted.
    fn evaluate_answer<S: Sink<F>>(&mut self, message: &[u8], cx: &mut Cx<'_, F, S>) -> Result<bool, Reason> {
        let Some(view) = self.packet_of(Side::Server) else {
            return Ok(false);
        };
        let end = self.flow.inspected + (PREFIX + message.len()) as u64;
        let (passes, closes) = if let Some(closes) = self.transferred(view, message, cx) {
            (true, closes)
        } else {
            match self.dns.answer(view, message, cx) {
                AnswerVerdict::Pass => (true, true),
                AnswerVerdict::Refuse(reason) => return Err(reason),
                AnswerVerdict::Commit(answer, asked) => {
                    let place = Place {
                        key: self.key,
                        number: self.flow.number,
                        end,
                    };
                    let what = Waiting::Stream(place);
                    self.dns.hold(view, answer, asked, what, cx);
                    (false, true)
                }
            }
        };
        self.flow.inspected = end;
        self.flow.answers.push_back(Inspected { end, passes, closes });
        Ok(true)
    }

    /// Forwards the beginning of a transfer message before its end has arrived, if no earlier message waits. Returns
    /// the number of bytes to forward, or `None` if no byte may be forwarded yet.
    fn begin<S: Sink<F>>(&mut self, bytes: &[u8], cx: &mut Cx<'_, F, S>) -> Option<usize> {
        let view = self.packet_of(Side::Server)?;
        let (prefix, message) = bytes.split_first_chunk::<PREFIX>()?;
        if !self.flow.answers.is_empty() {
            return None;
        }
        let closes = self.transferred(view, message, cx)?;
        let flow = &mut *self.flow;
        flow.answered += u64::from(closes);
        flow.rest = usize::from(u16::from_be_bytes(*prefix)) - message.len();
        flow.forwarded += bytes.len() as u64;
        flow.inspected = flow.forwarded;
        Some(bytes.len())
    }

    /// Counts a message, or the beginning of one, as part of a transfer. Returns whether the message is the first of
    /// its transfer, or `None` if it belongs to no transfer.
    fn transferred<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        message: &[u8],
        cx: &mut Cx<'_, F, S>,
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
            self.dns.transfer_begins(view, transfer, head.rcode, cx);
        }
        Some(is_first)
    }
}

/// Returns the response to a query with its length in front, or `None` if no response can be built.
fn framed_reply(query: &[u8], rcode: Rcode) -> Option<Vec<u8>> {
    let mut message = [0; 512];
    let length = reply(query, rcode, &mut message).ok()?;
    let prefix = u16::try_from(length).ok()?.to_be_bytes();
    Some([&prefix[..], message.get(..length)?].concat())
}
