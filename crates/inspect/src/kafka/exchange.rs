//! One Kafka connection: the requests that wait for a response, the fetch session, and the verdicts.

mod handover;

use std::{collections::VecDeque, fmt::Write as _, net::SocketAddr};

use palisade_abi::{PuntRequest, Reason, identity, punt_flags};
use palisade_protocols::kafka::{
    self, Broker, CONSUMER_GROUP_HEARTBEAT, FETCH, FETCH_SESSION_ID_NOT_FOUND, Header, Item, MAX_REQUEST,
    METADATA, NOT_COORDINATOR, PRODUCE, ParseError, Request, SASL_HANDSHAKE, SIZE, UNKNOWN_TOPIC_ID,
};

use super::{
    config::KafkaStats,
    session::{Session, SessionTopics},
    topics::{Owner, Told, TopicNames},
};
use crate::{
    Millis, Sink,
    context::Cx,
    record::{About, Record, Text, Verdict, What},
    rules::{KafkaRules, KafkaVerdict},
    tcp::{Action, Offloadable, Side, StreamInspector},
};

/// Maximum number of forwarded requests of a connection without a response. Further requests are held.
const MOST_PENDING: usize = 128;
/// Shortest request: API key, version, correlation id.
const SHORTEST_REQUEST: usize = 8;
/// Shortest response: its correlation id.
const SHORTEST_RESPONSE: usize = 4;
/// Longest header of a request, bytes: a client id of the greatest length, and tagged fields.
const MAX_HEADER: usize = 64 << 10;
/// First bytes of an incomplete request in which topics are sought, and of a response in which its error code is, bytes.
/// They bound the work for each packet.
const PREFIX: usize = 4096;
/// First bytes of a response that are held until its error code is known, bytes.
const OUTCOME: usize = 256;

/// A request that was forwarded and has no response.
struct Pending {
    key: i16,
    version: i16,
    correlation: i32,
    topic: Text,
    since: Millis,
    /// Topics of the fetch session that the response may begin.
    session: Option<SessionTopics>,
}

/// A denied request. Its bytes are not allowed, and the response is made from them when its turn comes.
#[derive(Clone, Copy)]
struct Refused {
    error: Option<i16>,
    reason: Reason,
}

/// State of a connection.
#[derive(Default)]
pub(super) struct Flow {
    pending: VecDeque<Pending>,
    session: Option<Session>,
    refused: Option<Refused>,
    /// Bytes of the last forwarded request that had not arrived when it was forwarded.
    rest: u64,
    /// Whether the server has sent a FIN.
    ended: bool,
    /// State of an offload.
    left: Left,
    /// Record fields of the client's packets.
    pub(super) about: Option<About>,
}

/// State of an offloaded connection: SASL without framing under a rule that allows everything, or a stream that cannot
/// be parsed and that audit mode forwards.
#[derive(Clone, Copy, Default)]
pub(super) struct Left {
    ruleset: u32,
    audit: bool,
}

impl Left {
    /// Evaluates an offloaded connection again. Its requests are not read any more, so it ends when its rule set changes.
    pub(super) fn may_go_on(self, slot: &PuntRequest) -> Result<(), Reason> {
        let audit = slot.flags & punt_flags::AUDIT != 0;
        if audit || (self.ruleset == slot.ruleset && !self.audit) {
            Ok(())
        } else {
            Err(Reason::TcpMidstream)
        }
    }
}

impl Offloadable for Flow {
    type OffloadVerdict = Left;
    fn remember(&mut self) -> Left {
        self.left
    }
}

/// Inspector of one connection for one call.
pub(super) struct KafkaStream<'a> {
    pub(super) flow: &'a mut Flow,
    pub(super) slot: &'a PuntRequest,
    pub(super) max_request: usize,
    pub(super) share_topic_ids: bool,
    pub(super) names: &'a mut TopicNames,
    pub(super) stats: &'a mut KafkaStats,
}

/// A request, as far as it has arrived.
struct Arrived<'a> {
    request: Request<'a>,
    /// Length with the size field, bytes.
    whole: usize,
    /// Bytes of the message that have arrived.
    bytes: &'a [u8],
    is_complete: bool,
    end: bool,
}

/// Parts of a request that the exchange needs beside the topics.
#[derive(Default)]
struct Facts {
    acks: Option<i16>,
    session: Option<(i32, i32)>,
    /// First topic, or the one that is denied.
    topic: Text,
    /// Topics of the request, for a fetch session that it may begin or extend.
    topics: SessionTopics,
}

/// Verdict on the topics of a request.
enum Decided {
    /// Each is allowed; the last one by this rule.
    Allowed(u32),
    /// One is denied, or the request is about all topics. The response has this error code, if not the usual one.
    Denied(Option<i16>),
}

impl<F> StreamInspector<F> for KafkaStream<'_> {
    fn read<S: Sink<F>>(&mut self, side: Side, bytes: &[u8], end: bool, cx: &mut Cx<'_, F, S>) -> Action {
        match side {
            Side::Client => self.client(bytes, end, cx),
            Side::Server => self.server(bytes, end, cx),
        }
    }
}

impl KafkaStream<'_> {
    fn is_audit(&self) -> bool {
        self.slot.flags & punt_flags::AUDIT != 0
    }

    /// Returns the owner of the topic ids of the connection, and the address of the server.
    fn owner(&self) -> Option<(Owner, SocketAddr)> {
        let about = self.flow.about.as_ref()?;
        let server = about.server().into();
        let is_server = about.reaches().is_none();
        let is_world = matches!(
            self.slot.remote_identity,
            identity::WORLD | identity::WORLD_IPV4 | identity::WORLD_IPV6
        );
        let owner = Owner {
            endpoint: self.slot.endpoint,
            ruleset: self.slot.ruleset,
            is_server,
            only: (!is_server && (is_world || !self.share_topic_ids)).then_some(server),
        };
        Some((owner, server))
    }

    fn client<F, S: Sink<F>>(&mut self, bytes: &[u8], end: bool, cx: &mut Cx<'_, F, S>) -> Action {
        if let Some(refused) = self.flow.refused {
            return self.refuse(refused, bytes);
        }
        if bytes.is_empty() {
            return Action::Forward(0);
        }
        if self.flow.rest > 0 {
            return Action::Bypass(std::mem::take(&mut self.flow.rest));
        }
        if self.flow.pending.len() >= MOST_PENDING {
            return Action::AwaitPeer;
        }
        let length = match kafka::message_length(bytes, SHORTEST_REQUEST, MAX_REQUEST) {
            Ok(Some(length)) => length,
            Ok(None) => return self.wait(end, cx),
            Err(error) => return self.malformed(error, cx),
        };
        let whole = SIZE + length;
        let is_complete = bytes.len() >= whole;
        let message = bytes.get(SIZE..whole.min(bytes.len())).unwrap_or_default();
        match Request::parse(message) {
            Ok(request) => {
                let arrived = Arrived {
                    request,
                    whole,
                    bytes: message,
                    is_complete,
                    end,
                };
                self.request(&arrived, cx)
            }
            Err(ParseError::Truncated) if !is_complete && message.len() <= MAX_HEADER => self.wait(end, cx),
            Err(error) => self.malformed(error, cx),
        }
    }

    /// Waits for more bytes of the client.
    fn wait<F, S: Sink<F>>(&mut self, end: bool, cx: &mut Cx<'_, F, S>) -> Action {
        if end {
            return self.malformed(ParseError::StreamEnds, cx);
        }
        Action::NeedMore
    }

    fn request<F, S: Sink<F>>(&mut self, arrived: &Arrived<'_>, cx: &mut Cx<'_, F, S>) -> Action {
        let rules = cx.rules;
        let Some(rules) = rules.kafka(self.slot.ruleset) else {
            return self.abort(Reason::UnknownRuleset, Reason::UnknownRuleset.text(), cx);
        };
        let header = &arrived.request.header;
        match rules.evaluate(header) {
            KafkaVerdict::Allowed { rule, unrestricted } => {
                self.allowed_by_header(arrived, rule, unrestricted, cx)
            }
            KafkaVerdict::ByTopics(rule) => self.by_topics(arrived, rules, rule, cx),
            // The body is read once, not with each packet.
            KafkaVerdict::Denied if !arrived.is_complete && arrived.whole <= self.max_request => {
                self.await_rest(arrived, cx)
            }
            KafkaVerdict::Denied => {
                let mut facts = Facts::default();
                // The topic is only recorded, and a body that cannot be read is denied like any other.
                let _ = collect(&arrived.request, &mut facts);
                self.denied(arrived, facts, None, cx)
            }
        }
    }

    /// Forwards a request whose header a rule allows.
    fn allowed_by_header<F, S: Sink<F>>(
        &mut self,
        arrived: &Arrived<'_>,
        rule: u32,
        unrestricted: bool,
        cx: &mut Cx<'_, F, S>,
    ) -> Action {
        let header = &arrived.request.header;
        let mut facts = Facts::default();
        let prefix = arrived.bytes.get(..PREFIX).unwrap_or(arrived.bytes);
        let first = Request::parse(prefix).unwrap_or(arrived.request);
        let read = collect(&first, &mut facts);
        if header.key == PRODUCE && facts.acks.is_none() {
            // Without `acks` it is not known whether a response follows. They are behind the transactional id.
            let whole = collect(&arrived.request, &mut facts);
            return match (facts.acks, read.and(whole)) {
                (Some(_), _) => self.forward(arrived, facts, rule, Verdict::Forwarded, cx),
                (None, Err(ParseError::Truncated))
                    if !arrived.is_complete && arrived.bytes.len() <= MAX_HEADER =>
                {
                    self.wait(arrived.end, cx)
                }
                (None, Err(error)) => self.malformed(error, cx),
                (None, Ok(())) => self.malformed(ParseError::Truncated, cx),
            };
        }
        // The SASL tokens behind version 0 have no header, so nothing behind them can be read.
        if (header.key, header.version) == (SASL_HANDSHAKE, 0) {
            if !unrestricted {
                return self.denied(arrived, facts, None, cx);
            }
            self.stats.requests += 1;
            self.report(header, &facts, Some(rule), Verdict::Forwarded, 0, cx);
            self.flow.left = Left {
                ruleset: self.slot.ruleset,
                audit: false,
            };
            return Action::Offload;
        }
        if header.key == FETCH {
            // The topics are not checked, so the session must not count as checked if the rules change.
            self.forget_session();
            facts.session = None;
        }
        self.forward(arrived, facts, rule, Verdict::Forwarded, cx)
    }

    /// Evaluates a request by its topics.
    fn by_topics<F, S: Sink<F>>(
        &mut self,
        arrived: &Arrived<'_>,
        rules: &KafkaRules,
        rule: u32,
        cx: &mut Cx<'_, F, S>,
    ) -> Action {
        let header = &arrived.request.header;
        if arrived.is_complete {
            let mut facts = Facts::default();
            return match self.evaluate_topics(&arrived.request, rules, rule, &mut facts) {
                Ok(Decided::Allowed(rule)) => self.forward(arrived, facts, rule, Verdict::Forwarded, cx),
                Ok(Decided::Denied(error)) => self.denied(arrived, facts, error, cx),
                Err(error) => self.malformed(error, cx),
            };
        }
        if header.key == PRODUCE
            && let Some(action) = self.by_only_topic(arrived, rules, cx)
        {
            return action;
        }
        if arrived.whole > self.max_request {
            return self.malformed(ParseError::TooLong, cx);
        }
        self.await_rest(arrived, cx)
    }

    /// Waits for the rest of an incomplete request. A broker handles a request when its last byte has arrived. All other
    /// bytes may flow, so that a request longer than the receive window of the broker can be completed.
    fn await_rest<F, S: Sink<F>>(&mut self, arrived: &Arrived<'_>, cx: &mut Cx<'_, F, S>) -> Action {
        if arrived.end {
            return self.malformed(ParseError::StreamEnds, cx);
        }
        Action::ForwardUndecided(SIZE + arrived.bytes.len())
    }

    /// Forwards an incomplete Produce request if its last topic has arrived and all are allowed: no further byte can
    /// name another topic, so a long request does not have to be kept.
    fn by_only_topic<F, S: Sink<F>>(
        &mut self,
        arrived: &Arrived<'_>,
        rules: &KafkaRules,
        cx: &mut Cx<'_, F, S>,
    ) -> Option<Action> {
        let header = &arrived.request.header;
        let first = Request::parse(arrived.bytes.get(..PREFIX).unwrap_or(arrived.bytes)).ok()?;
        let (mut facts, mut allowed, mut is_last, mut is_decided) = (Facts::default(), None, false, false);
        let owner = self.owner();
        let names = &mut *self.names;
        let _ = first.walk(&mut |item| {
            let of_id;
            let name = match item {
                Item::Topic(name) => Some(name),
                Item::TopicId(id) => {
                    of_id = owner.and_then(|(owner, server)| names.name(owner, server, id));
                    of_id.as_deref()
                }
                Item::LastTopic => {
                    is_last = true;
                    return;
                }
                Item::Acks(acks) => {
                    facts.acks = Some(acks);
                    return;
                }
                _ => return,
            };
            let rule = name.and_then(|name| rules.evaluate_topic(header, name));
            if facts.topic.bytes().is_empty() {
                facts.topic = Text::from(name.unwrap_or_default());
            }
            allowed = match (allowed, rule) {
                (None | Some(Some(_)), Some(rule)) => Some(Some(rule)),
                _ => Some(None),
            };
            is_decided |= is_last;
        });
        let rule = allowed.flatten().filter(|_| is_decided)?;
        Some(self.forward(arrived, facts, rule, Verdict::Forwarded, cx))
    }

    /// Evaluates the topics of a complete request. `rule`: the rule for a request that names none.
    fn evaluate_topics(
        &mut self,
        request: &Request<'_>,
        rules: &KafkaRules,
        rule: u32,
        facts: &mut Facts,
    ) -> Result<Decided, ParseError> {
        let header = &request.header;
        let (mut denied, mut unknown, mut allowed) = (None, None, rule);
        let owner = self.owner();
        let names = &mut *self.names;
        let mut session = (0, 0);
        request.walk(&mut |item| {
            let of_id;
            let name = match item {
                Item::Topic(name) => name,
                Item::TopicId(id) => {
                    of_id = owner.and_then(|(owner, server)| names.name(owner, server, id));
                    let Some(name) = &of_id else {
                        unknown.get_or_insert_with(|| id_text(&id));
                        return;
                    };
                    name
                }
                Item::AllTopics => {
                    denied.get_or_insert_with(|| Text::from(&b"*"[..]));
                    return;
                }
                Item::Acks(acks) => {
                    facts.acks = Some(acks);
                    return;
                }
                Item::SessionId(id) => {
                    session.0 = id;
                    return;
                }
                Item::SessionEpoch(epoch) => {
                    session.1 = epoch;
                    facts.session = Some(session);
                    return;
                }
                Item::Partition(_) | Item::Group(_) | Item::LastTopic => return,
            };
            if facts.topic.bytes().is_empty() {
                facts.topic = Text::from(name);
            }
            match rules.evaluate_topic(header, name) {
                Some(rule) => allowed = rule,
                None => {
                    denied.get_or_insert_with(|| Text::from(name));
                }
            }
            if header.key == FETCH {
                facts.topics.add(name);
            }
        })?;
        self.stats.unknown_topic_ids += u64::from(unknown.is_some());
        // A denied name stays denied, so the client must not ask for the names of the ids and try again.
        if let Some(topic) = denied {
            facts.topic = topic;
            return Ok(Decided::Denied(None));
        }
        if let Some(topic) = unknown {
            facts.topic = topic;
            let error = if header.key == CONSUMER_GROUP_HEARTBEAT {
                NOT_COORDINATOR
            } else {
                UNKNOWN_TOPIC_ID
            };
            return Ok(Decided::Denied(Some(error)));
        }
        if let Some((id, epoch)) = facts.session
            && !matches!(epoch, 0 | -1)
        {
            let known = self.flow.session.as_mut().filter(|session| session.id == id);
            let Some(session) = known else {
                self.stats.unknown_sessions += 1;
                return Ok(Decided::Denied(Some(FETCH_SESSION_ID_NOT_FOUND)));
            };
            if let Some(topic) = session.denied_topic(rules, header) {
                facts.topic = Text::from(topic);
                self.stats.unknown_sessions += 1;
                return Ok(Decided::Denied(Some(FETCH_SESSION_ID_NOT_FOUND)));
            }
            if facts.topic.bytes().is_empty()
                && let Some(topic) = session.topics().first()
            {
                facts.topic = Text::from(topic);
            }
        }
        Ok(Decided::Allowed(allowed))
    }

    /// Records a request and forwards it.
    fn forward<F, S: Sink<F>>(
        &mut self,
        arrived: &Arrived<'_>,
        facts: Facts,
        rule: u32,
        verdict: Verdict,
        cx: &mut Cx<'_, F, S>,
    ) -> Action {
        let header = &arrived.request.header;
        self.stats.requests += 1;
        if verdict == Verdict::Forwarded {
            self.report(header, &facts, Some(rule), verdict, 0, cx);
        }
        let mut begun = None;
        match facts.session {
            // A session whose topics are not all kept stays unknown, and the client has to begin another one.
            Some((_, 0)) if !facts.topics.is_empty() && facts.topics.is_complete() => {
                begun = Some(facts.topics);
            }
            Some((_, 0 | -1)) | None => {}
            Some(_) => {
                let session = self.flow.session.take();
                self.flow.session =
                    session.and_then(|mut session| session.extend(&facts.topics).then_some(session));
            }
        }
        if (header.key, facts.acks) != (PRODUCE, Some(0)) {
            self.flow.pending.push_back(Pending {
                key: header.key,
                version: header.version,
                correlation: header.correlation,
                topic: facts.topic,
                since: cx.now,
                session: begun,
            });
        }
        // The bytes that the verdict depends on are not bypassed: otherwise a retransmission could have others.
        let inspected = arrived.whole.min(SIZE + arrived.bytes.len());
        self.flow.rest = (arrived.whole - inspected) as u64;
        Action::Forward(inspected)
    }

    /// Forgets the fetch session of the connection, also one that an awaited response may begin.
    fn forget_session(&mut self) {
        self.flow.session = None;
        for pending in &mut self.flow.pending {
            pending.session = None;
        }
    }

    /// Denies a request that no rule allows, once it is complete: the response repeats its topics.
    fn denied<F, S: Sink<F>>(
        &mut self,
        arrived: &Arrived<'_>,
        facts: Facts,
        error: Option<i16>,
        cx: &mut Cx<'_, F, S>,
    ) -> Action {
        if !arrived.is_complete && arrived.whole <= self.max_request {
            return self.await_rest(arrived, cx);
        }
        let header = &arrived.request.header;
        self.stats.denied += 1;
        let audit = self.is_audit();
        let shown = kafka::denial_error(&arrived.request, error).unwrap_or_default();
        let verdict = if audit { Verdict::Audit } else { Verdict::Dropped };
        self.report(header, &facts, None, verdict, shown, cx);
        if audit {
            self.stats.audited += 1;
            // A request whose response cannot be foreseen ends the inspection, as a malformed stream does.
            let is_unknown = header.key == PRODUCE && facts.acks.is_none()
                || (header.key, header.version) == (SASL_HANDSHAKE, 0);
            if is_unknown {
                self.flow.left = Left {
                    ruleset: self.slot.ruleset,
                    audit: true,
                };
                return Action::Offload;
            }
            if header.key == FETCH {
                // The session at the broker may now have the denied topic, whose records later requests would get.
                self.forget_session();
            }
            let facts = Facts {
                session: None,
                ..facts
            };
            return self.forward(arrived, facts, 0, verdict, cx);
        }
        self.stats.requests += 1;
        if header.key == PRODUCE && facts.acks.is_none_or(|acks| acks == 0) || !arrived.is_complete {
            return Action::Abort(Reason::AppDenied);
        }
        let refused = Refused {
            error,
            reason: Reason::AppDenied,
        };
        self.flow.refused = Some(refused);
        self.respond(refused, &arrived.request)
    }

    /// Responds to the refused request in front of `bytes`.
    fn refuse(&mut self, refused: Refused, bytes: &[u8]) -> Action {
        let whole = kafka::message_length(bytes, SHORTEST_REQUEST, MAX_REQUEST);
        let message = whole
            .ok()
            .flatten()
            .and_then(|length| bytes.get(SIZE..SIZE + length));
        match message.map(Request::parse) {
            Some(Ok(request)) => self.respond(refused, &request),
            _ => Action::Abort(refused.reason),
        }
    }

    /// Responds in the server's place, once all requests before the refused one are answered.
    fn respond(&mut self, refused: Refused, request: &Request<'_>) -> Action {
        if self.flow.ended {
            return Action::Abort(refused.reason);
        }
        if !self.flow.pending.is_empty() {
            return Action::AwaitPeer;
        }
        let broker = self.flow.about.as_ref().map_or_else(Broker::default, |about| {
            let (address, port) = about.server();
            Broker {
                host: address.to_string(),
                port,
            }
        });
        match kafka::deny(request, refused.error, &broker) {
            Ok(denied) => Action::RespondThenEnd(refused.reason, denied.response),
            Err(_) => Action::Abort(refused.reason),
        }
    }

    fn server<F, S: Sink<F>>(&mut self, bytes: &[u8], end: bool, cx: &mut Cx<'_, F, S>) -> Action {
        if bytes.is_empty() {
            self.flow.ended = true;
            return Action::Forward(0);
        }
        let Some(pending) = self.flow.pending.front() else {
            return self.malformed(ParseError::Unsolicited, cx);
        };
        let length = match kafka::message_length(bytes, SHORTEST_RESPONSE, i32::MAX as usize) {
            Ok(Some(length)) => length,
            Ok(None) => return self.wait(end, cx),
            Err(error) => return self.malformed(error, cx),
        };
        let whole = SIZE + length;
        let message = bytes.get(SIZE..whole.min(bytes.len())).unwrap_or_default();
        let correlation = message.first_chunk().map(|id| i32::from_be_bytes(*id));
        if correlation.is_some_and(|correlation| correlation != pending.correlation) {
            return self.malformed(ParseError::Unsolicited, cx);
        }
        if bytes.len() < whole.min(SIZE + OUTCOME) {
            return self.wait(end, cx);
        }
        if pending.key == METADATA && whole <= self.max_request {
            if bytes.len() < whole {
                if end {
                    return self.malformed(ParseError::StreamEnds, cx);
                }
                // The client uses the ids when it has the last byte. They are learned before.
                return Action::ForwardUndecided(bytes.len());
            }
            let version = pending.version;
            let rules = cx.rules.kafka(self.slot.ruleset);
            let mut count = 0;
            if let Some((owner, server)) = self.owner() {
                self.stats.contradicting_topic_ids += self.names.learn(owner, server, |learn| {
                    // A response that cannot be read to its end is the client's to refuse. It tells no names behind the
                    // fault.
                    let _ = kafka::learned_topics(version, message, &mut |id, name| {
                        count += 1;
                        learn(Told {
                            id,
                            name,
                            is_in_rules: rules.is_some_and(|rules| rules.has_topic(name)),
                        });
                    });
                });
            }
            self.stats.topic_ids += count;
        }
        let Some(pending) = self.flow.pending.pop_front() else {
            return self.malformed(ParseError::Unsolicited, cx);
        };
        self.response(&pending, message, cx);
        if bytes.len() >= whole {
            Action::Forward(whole)
        } else {
            Action::Bypass(whole as u64)
        }
    }

    /// Records a response.
    fn response<F, S: Sink<F>>(&mut self, pending: &Pending, message: &[u8], cx: &mut Cx<'_, F, S>) {
        self.stats.responses += 1;
        let prefix = message.get(..PREFIX).unwrap_or(message);
        let outcome = kafka::outcome(pending.key, pending.version, prefix);
        if let (Some(topics), Some(id)) = (&pending.session, outcome.session)
            && id != 0
        {
            self.flow.session = Some(Session::new(id, topics.clone()));
        }
        if let Some(about) = &self.flow.about {
            let what = What::Kafka {
                key: pending.key,
                version: pending.version,
                correlation: pending.correlation,
                error: outcome.error,
                topic: pending.topic,
                client: Text::default(),
            };
            cx.sink.record(&Record {
                latency: u32::try_from(cx.now.saturating_sub(pending.since)).ok(),
                ..Record::about(&about.turned(), what)
            });
        }
    }

    /// Records a request. `rule`: the rule that allows it.
    fn report<F, S: Sink<F>>(
        &self,
        header: &Header<'_>,
        facts: &Facts,
        rule: Option<u32>,
        verdict: Verdict,
        error: i16,
        cx: &mut Cx<'_, F, S>,
    ) {
        let Some(about) = &self.flow.about else {
            return;
        };
        let what = What::Kafka {
            key: header.key,
            version: header.version,
            correlation: header.correlation,
            error,
            topic: facts.topic,
            client: Text::from(header.client.unwrap_or_default()),
        };
        let record = Record::about(about, what);
        cx.sink.record(&match rule {
            Some(rule) => Record { rule, ..record },
            None => Record {
                verdict,
                reason: Reason::AppDenied,
                ..record
            },
        });
    }

    /// Ends a connection whose stream is malformed. Audit mode offloads it instead.
    fn malformed<F, S: Sink<F>>(&mut self, error: ParseError, cx: &mut Cx<'_, F, S>) -> Action {
        if let Some(count) = self.stats.malformed.get_mut(error as usize) {
            *count += 1;
        }
        self.abort(Reason::AppMalformed, error.text(), cx)
    }

    fn abort<F, S: Sink<F>>(
        &mut self,
        reason: Reason,
        detail: &'static str,
        cx: &mut Cx<'_, F, S>,
    ) -> Action {
        let audit = self.is_audit();
        if let Some(about) = &self.flow.about {
            cx.sink.record(&Record {
                verdict: if audit { Verdict::Audit } else { Verdict::Dropped },
                reason,
                ..Record::about(about, What::Unreadable { detail })
            });
        }
        if audit {
            self.stats.audited += 1;
            self.flow.left = Left {
                ruleset: self.slot.ruleset,
                audit: true,
            };
            return Action::Offload;
        }
        Action::Abort(reason)
    }
}

/// Reads the parts of a request that are recorded or decide about its response, without a verdict on its topics.
fn collect(request: &Request<'_>, facts: &mut Facts) -> Result<(), ParseError> {
    request.walk(&mut |item| match item {
        Item::Topic(name) if facts.topic.bytes().is_empty() => facts.topic = Text::from(name),
        Item::TopicId(id) if facts.topic.bytes().is_empty() => facts.topic = id_text(&id),
        Item::Acks(acks) => facts.acks = Some(acks),
        _ => {}
    })
}

/// Returns a topic id in the form of a UUID.
fn id_text(id: &[u8]) -> Text {
    let mut text = Text::default();
    for (index, byte) in id.iter().enumerate() {
        let dash = if matches!(index, 4 | 6 | 8 | 10) { "-" } else { "" };
        // Writing to a `Text` cannot fail.
        let _ = write!(text, "{dash}{byte:02x}");
    }
    text
}
