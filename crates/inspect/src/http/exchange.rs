//! One HTTP connection: the position of both sides in their messages, and the requests that wait for a response.

mod handover;

use std::{collections::VecDeque, mem};

use palisade_abi::{PuntRequest, Reason, punt_flags};
use palisade_model::request::GetBodies;
use palisade_protocols::http1::{
    Body, Chunks, Head, HeaderBuffer, ParseError, Piece, Request, Response, TrailerNames,
};

use super::{
    config::{HttpLimits, HttpStats},
    redact,
};
use crate::{
    Millis, Sink,
    context::Cx,
    record::{About, Record, Text, Verdict, What, Word},
    rules::{HttpDenial, HttpScratch, HttpVerdict},
    steps::{self, Detail},
    tcp::{Action, Offloadable, Side, StreamInspector},
};

/// Maximum number of forwarded requests per connection that have no response yet. Further requests are held.
const MOST_PENDING: usize = 32;
/// Number of bytes to bypass for a body that ends with the connection: more than any connection carries.
const ENDLESS: u64 = 1 << 62;

/// Position of a side in its messages.
enum Place {
    /// In a head.
    Head(Head),
    /// At the start of a body with this length, bytes.
    Body(u64),
    /// In the framing of a chunked body.
    Chunks(Chunks),
    /// At the start of the content of a chunk with this length, bytes.
    Content(Chunks, u64),
    /// In a response whose body ends with the connection.
    Rest,
}

impl Default for Place {
    fn default() -> Self {
        Self::Head(Head::default())
    }
}

impl Place {
    /// `chunks`: the parser of a chunked body.
    fn of(body: Body, chunks: impl FnOnce() -> Chunks) -> Self {
        match body {
            Body::None | Body::Tunnel | Body::Length(0) => Self::default(),
            Body::Length(n) => Self::Body(n),
            Body::Chunked => Self::Chunks(chunks()),
            Body::UntilClose => Self::Rest,
        }
    }

    fn is_between_messages(&self) -> bool {
        matches!(self, Self::Head(_))
    }

    /// Handles bytes after a head. Returns the action, and whether the message ends with the bytes of the action. The
    /// content of a body is not inspected, but all of its framing is.
    fn follow(&mut self, bytes: &[u8]) -> Result<(Action, bool), ParseError> {
        match mem::take(self) {
            Self::Body(n) => Ok((Action::Bypass(n), true)),
            Self::Rest => {
                *self = Self::Rest;
                Ok((Action::Bypass(ENDLESS), false))
            }
            Self::Content(chunks, n) => {
                *self = Self::Chunks(chunks);
                Ok((Action::Bypass(n), false))
            }
            Self::Chunks(mut chunks) => {
                let mut rest = bytes;
                let piece = chunks.next(&mut rest)?;
                let step = Action::Forward(bytes.len() - rest.len());
                match piece {
                    Piece::More => *self = Self::Chunks(chunks),
                    Piece::Content(n) => *self = Self::Content(chunks, n),
                    Piece::End => return Ok((step, true)),
                }
                Ok((step, false))
            }
            Self::Head(head) => {
                *self = Self::Head(head);
                Ok((Action::NeedMore, false))
            }
        }
    }
}

/// A request that was forwarded and has no final response.
struct Exchange {
    url: Text,
    method: Word,
    since: Millis,
    /// Whether the server may switch to another protocol after this request (Upgrade, CONNECT).
    may_switch: bool,
    /// Protocols to which a 101 may switch, in lower case, each preceded by a comma.
    upgrades: Vec<u8>,
}

/// State of a body that was announced with `Expect: 100-continue`.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Announced {
    /// No body was announced, or the server has sent 100, or the body has begun.
    #[default]
    No,
    /// No byte of the body has arrived.
    Waits,
    /// The final response has arrived before the body.
    Late,
}

/// Response to a refused request, which ends the connection.
#[derive(Clone, Copy)]
struct Refused {
    reason: Reason,
    status: u16,
    /// Whether the response has no body, because the request is HEAD.
    bodiless: bool,
    /// Number of forwarded requests that this response answers: 1 if the head of the refused request was forwarded and
    /// its body is malformed, else 0.
    own: usize,
}

/// State of a connection.
#[derive(Default)]
pub(crate) struct Flow {
    client: Place,
    server: Place,
    /// The request to which the next response belongs.
    current: Option<Exchange>,
    /// The forwarded requests after `current`.
    behind: VecDeque<Exchange>,
    announced: Announced,
    /// The refused request: its response is sent once all requests before it are answered.
    refused: Option<Refused>,
    /// Whether the client has sent a well-formed request.
    begun: bool,
    /// Whether the server has sent a FIN.
    ended: bool,
    /// State of an offload.
    left: Left,
    /// Record fields of the client's packets.
    pub(crate) about: Option<About>,
    /// Whether TLS protects the connection, so that records show `https` as the scheme.
    pub(crate) secure: bool,
}

/// State of an offloaded connection: an allowed tunnel, or a stream that cannot be parsed and that audit mode forwards.
#[derive(Clone, Copy, Default)]
pub(crate) struct Left {
    ruleset: u32,
    /// Whether audit mode was the cause.
    audit: bool,
}

impl Left {
    /// Returns an error if an offloaded connection must not continue. A tunnel has no further request to which new
    /// rules could apply, so it ends when its rule set changes, except in audit mode. A connection that was offloaded
    /// because of audit mode ends when audit mode is switched off.
    pub(crate) fn may_go_on(self, slot: &PuntRequest) -> Result<(), Reason> {
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

impl Flow {
    fn pending(&self) -> usize {
        usize::from(self.current.is_some()) + self.behind.len()
    }

    /// Returns whether the next byte of the client is the first byte of a request.
    pub(crate) fn is_at_request(&self) -> bool {
        self.client.is_between_messages()
    }

    /// Returns whether a forwarded request has no response, and no byte of its response has been forwarded.
    pub(crate) fn awaits_response(&self) -> bool {
        self.current.is_some() && self.server.is_between_messages()
    }

    /// Returns whether the server has the whole request to which the next response belongs, or has to ask for its body
    /// (`Expect: 100-continue`). `body`: whether the client is within a body that is forwarded without inspection.
    pub(crate) fn has_whole_request(&self, body: bool) -> bool {
        let is_within = body || !self.client.is_between_messages();
        self.current.is_some()
            && (!self.behind.is_empty() || !is_within || self.announced == Announced::Waits)
    }

    /// Returns whether a side is within a message after its head.
    pub(crate) fn is_within(&self, side: Side) -> bool {
        match side {
            Side::Client => !self.client.is_between_messages(),
            Side::Server => !self.server.is_between_messages(),
        }
    }

    /// Returns whether at most the last request has no response, and the next byte of the server begins a response.
    pub(crate) fn awaits_last_only(&self) -> bool {
        self.pending() <= 1 && self.server.is_between_messages()
    }

    /// Returns whether the oldest request without a response is HEAD, whose response has no body.
    pub(crate) fn is_head(&self) -> bool {
        self.current
            .as_ref()
            .is_some_and(|current| current.method.bytes() == b"HEAD")
    }

    /// Returns an error if a connection that was offloaded must not continue under `slot`.
    pub(crate) fn may_stay_offloaded(&self, slot: &PuntRequest) -> Result<(), Reason> {
        self.left.may_go_on(slot)
    }

    /// Adds a forwarded request. `guarded`: names that its trailers must not have.
    fn begin(
        &mut self,
        request: &Request<'_>,
        guarded: &TrailerNames,
        may_switch: bool,
        url: Text,
        now: Millis,
    ) {
        self.client = Place::of(request.body, || Chunks::of_request(guarded.clone()));
        self.announced = if request.expects_continue() && !self.client.is_between_messages() {
            Announced::Waits
        } else {
            Announced::No
        };
        let mut upgrades = Vec::new();
        for name in request.upgrades().filter(|name| may_become(name)) {
            upgrades.push(b',');
            upgrades.extend(name.iter().map(u8::to_ascii_lowercase));
        }
        self.push(Exchange {
            url,
            method: Word::from(request.method.as_bytes()),
            since: now,
            may_switch,
            upgrades,
        });
    }

    fn push(&mut self, exchange: Exchange) {
        if self.current.is_none() {
            self.current = Some(exchange);
        } else {
            self.behind.push_back(exchange);
        }
    }

    fn pop(&mut self) {
        self.current = self.behind.pop_front();
    }

    /// Returns whether the bytes after the last request can be of another protocol, depending on its response.
    fn may_switch(&self) -> bool {
        self.behind
            .back()
            .or(self.current.as_ref())
            .is_some_and(|last| last.may_switch)
    }
}

/// Inspector of one connection for one call.
pub(crate) struct HttpStream<'a> {
    pub(crate) flow: &'a mut Flow,
    pub(crate) slot: &'a PuntRequest,
    pub(crate) limits: &'a HttpLimits,
    pub(crate) scratch: &'a mut HttpScratch,
    pub(crate) stats: &'a mut HttpStats,
}

impl<F> StreamInspector<F> for HttpStream<'_> {
    fn read<S: Sink<F>>(&mut self, side: Side, bytes: &[u8], end: bool, cx: &mut Cx<'_, F, S>) -> Action {
        match side {
            Side::Client => self.client(bytes, end, cx),
            Side::Server => self.server(bytes, end, cx),
        }
    }
}

impl HttpStream<'_> {
    fn is_audit(&self) -> bool {
        self.slot.flags & punt_flags::AUDIT != 0
    }

    fn client<F, S: Sink<F>>(&mut self, bytes: &[u8], end: bool, cx: &mut Cx<'_, F, S>) -> Action {
        if let Some(refused) = self.flow.refused {
            return self.refuse(refused);
        }
        if bytes.is_empty() {
            return Action::Forward(0);
        }
        if !self.flow.client.is_between_messages() {
            // If the final response precedes an announced body, some servers discard the body, and others parse it as
            // the next request.
            if mem::take(&mut self.flow.announced) == Announced::Late {
                return self.malformed(ParseError::LateBody, 0, cx);
            }
            return match self.flow.client.follow(bytes) {
                Ok((step, _)) => step,
                Err(refusal) => self.malformed(refusal, 1, cx),
            };
        }
        if self.flow.may_switch() || self.flow.pending() >= MOST_PENDING {
            return Action::AwaitPeer;
        }
        let Place::Head(head) = &mut self.flow.client else {
            return Action::NeedMore;
        };
        match head.find(bytes, &self.limits.head) {
            Ok(Some(length)) => {
                self.flow.client = Place::default();
                let head = bytes.get(..length).unwrap_or_default();
                match Request::parse(head, &mut HeaderBuffer::new()) {
                    Ok(request) => self.request(&request, length, cx),
                    Err(refusal) => self.malformed(refusal, 0, cx),
                }
            }
            Ok(None) if end => self.abort(Reason::AppMalformed, "stream ends within a request", cx),
            Ok(None) => Action::NeedMore,
            Err(refusal) => self.malformed(refusal, 0, cx),
        }
    }

    /// Evaluates a request with a complete head of `length` bytes.
    fn request<F, S: Sink<F>>(
        &mut self,
        request: &Request<'_>,
        length: usize,
        cx: &mut Cx<'_, F, S>,
    ) -> Action {
        let may_switch = request.may_upgrade() || request.method == "CONNECT";
        // A 101 or 200 to this request offloads the connection. So all earlier requests must be answered first: a
        // faulty server can send more than one response to an earlier request (for example a body to HEAD), and the
        // surplus must not be taken for the response to this request.
        if may_switch && self.flow.pending() > 0 {
            return Action::AwaitPeer;
        }
        self.stats.requests += 1;
        self.flow.begun = true;
        let mut url = Text::default();
        let scheme = if self.flow.secure { "https" } else { "http" };
        redact::url(scheme, request.host, request.path, &mut url);
        let Some(rules) = cx.rules.http(self.slot.ruleset) else {
            return self.abort(Reason::UnknownRuleset, Reason::UnknownRuleset.text(), cx);
        };
        let verdict = rules.evaluate(request, self.limits.paths, self.scratch);
        if let Some(about) = &self.flow.about
            && steps::is_on(Detail::Debug)
        {
            rules.explain(request, about, cx.rules.source(self.slot.ruleset), self.scratch);
        }
        let audit = self.is_audit();
        self.report_request(request, verdict, url, cx);
        if let Err(denial) = verdict {
            self.stats.denied += 1;
            if !audit {
                return self.refuse(Refused {
                    reason: denial.reason(),
                    status: 403,
                    bodiless: request.method == "HEAD",
                    own: 0,
                });
            }
            self.stats.audited += 1;
        }
        if has_refused_body(request, verdict, self.limits.get_bodies) {
            if !audit {
                return self.malformed(ParseError::UnexpectedBody, 0, cx);
            }
            self.count_malformed(ParseError::UnexpectedBody);
            self.stats.audited += 1;
            self.report(
                Reason::AppMalformed,
                ParseError::UnexpectedBody.text(),
                Verdict::Audit,
                cx,
            );
        }
        self.flow
            .begin(request, rules.trailer_names(), may_switch, url, cx.now);
        Action::Forward(length)
    }

    /// Records a request with its verdict.
    fn report_request<F, S: Sink<F>>(
        &self,
        request: &Request<'_>,
        verdict: Result<HttpVerdict, HttpDenial>,
        url: Text,
        cx: &mut Cx<'_, F, S>,
    ) {
        let Some(about) = &self.flow.about else {
            return;
        };
        let mut headers = Text::default();
        redact::headers(request.headers.iter(), &self.limits.record_headers, &mut headers);
        let what = What::HttpRequest {
            method: Word::from(request.method.as_bytes()),
            version: request.version,
            url,
            headers,
            mismatch: verdict.is_ok_and(|verdict| verdict.log),
        };
        let record = Record::about(about, what);
        cx.sink.record(&match verdict {
            Ok(verdict) => Record {
                rule: verdict.rule,
                ..record
            },
            Err(denial) => Record {
                verdict: if self.is_audit() {
                    Verdict::Audit
                } else {
                    Verdict::Dropped
                },
                reason: denial.reason(),
                ..record
            },
        });
    }

    /// Responds in the server's place once all requests before the refused one are answered. Aborts the connection
    /// instead if the server has sent a FIN, or the body of its last response ends with the connection.
    fn refuse(&mut self, refused: Refused) -> Action {
        self.flow.refused = Some(refused);
        if self.flow.ended || matches!(self.flow.server, Place::Rest) {
            return Action::Abort(refused.reason);
        }
        if self.flow.pending() > refused.own || !self.flow.server.is_between_messages() {
            return Action::AwaitPeer;
        }
        let (phrase, body) = match refused.status {
            403 => ("Forbidden", "Access denied\r\n"),
            414 => ("URI Too Long", "URI too long\r\n"),
            417 => ("Expectation Failed", "Expectation failed\r\n"),
            431 => (
                "Request Header Fields Too Large",
                "Request header fields too large\r\n",
            ),
            _ => ("Bad Request", "Bad request\r\n"),
        };
        let text = format!(
            "HTTP/1.1 {} {phrase}\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{}",
            refused.status,
            body.len(),
            if refused.bodiless { "" } else { body }
        );
        Action::Respond(refused.reason, text.into_bytes())
    }

    /// Refuses a stream of the client that is not HTTP/1 or is ambiguous. `own`: see [`Refused::own`].
    fn malformed<F, S: Sink<F>>(&mut self, refusal: ParseError, own: usize, cx: &mut Cx<'_, F, S>) -> Action {
        self.count_malformed(refusal);
        let reason = match refusal {
            ParseError::Http2 => Reason::AppHttp2,
            _ => Reason::AppMalformed,
        };
        let Some(status) = status_of(refusal, self.flow.begun) else {
            return self.abort(reason, refusal.text(), cx);
        };
        if self.is_audit() {
            return self.leave(reason, refusal.text(), cx);
        }
        self.report(reason, refusal.text(), Verdict::Dropped, cx);
        self.refuse(Refused {
            reason,
            status,
            bodiless: false,
            own,
        })
    }

    fn report<F, S: Sink<F>>(
        &self,
        reason: Reason,
        detail: &'static str,
        verdict: Verdict,
        cx: &mut Cx<'_, F, S>,
    ) {
        if let Some(about) = &self.flow.about {
            cx.sink.record(&Record {
                verdict,
                reason,
                ..Record::about(about, What::Unreadable { detail })
            });
        }
    }

    /// Records a stream that cannot be parsed, and offloads the connection because of audit mode.
    fn leave<F, S: Sink<F>>(
        &mut self,
        reason: Reason,
        detail: &'static str,
        cx: &mut Cx<'_, F, S>,
    ) -> Action {
        self.stats.audited += 1;
        self.report(reason, detail, Verdict::Audit, cx);
        self.flow.left = Left {
            ruleset: self.slot.ruleset,
            audit: true,
        };
        Action::Offload
    }

    fn abort<F, S: Sink<F>>(
        &mut self,
        reason: Reason,
        detail: &'static str,
        cx: &mut Cx<'_, F, S>,
    ) -> Action {
        if self.is_audit() {
            return self.leave(reason, detail, cx);
        }
        self.report(reason, detail, Verdict::Dropped, cx);
        Action::Abort(reason)
    }

    fn server<F, S: Sink<F>>(&mut self, bytes: &[u8], end: bool, cx: &mut Cx<'_, F, S>) -> Action {
        if bytes.is_empty() {
            self.flow.ended = true;
            return Action::Forward(0);
        }
        if !self.flow.server.is_between_messages() {
            return match self.flow.server.follow(bytes) {
                Ok((step, ends)) => {
                    if ends {
                        self.flow.pop();
                    }
                    step
                }
                Err(refusal) => self.bad_answer(refusal, cx),
            };
        }
        let Place::Head(head) = &mut self.flow.server else {
            return Action::NeedMore;
        };
        match head.find(bytes, &self.limits.head) {
            Ok(Some(length)) => {
                self.flow.server = Place::default();
                let method = self.flow.current.as_ref().map(|current| current.method);
                let method = method.unwrap_or_default();
                let method = std::str::from_utf8(method.bytes()).unwrap_or_default();
                match Response::parse(
                    bytes.get(..length).unwrap_or_default(),
                    method,
                    &mut HeaderBuffer::new(),
                ) {
                    Ok(response) => self.response(&response, length, cx),
                    Err(refusal) => self.bad_answer(refusal, cx),
                }
            }
            Ok(None) if end => self.abort(Reason::AppMalformed, "stream ends within a response", cx),
            Ok(None) => Action::NeedMore,
            Err(refusal) => self.bad_answer(refusal, cx),
        }
    }

    fn count_malformed(&mut self, error: ParseError) {
        if let Some(count) = self.stats.malformed.get_mut(error as usize) {
            *count += 1;
        }
    }

    fn bad_answer<F, S: Sink<F>>(&mut self, refusal: ParseError, cx: &mut Cx<'_, F, S>) -> Action {
        self.count_malformed(refusal);
        self.abort(Reason::AppMalformed, refusal.text(), cx)
    }

    /// Handles a response with a complete head of `length` bytes.
    fn response<F, S: Sink<F>>(
        &mut self,
        response: &Response<'_>,
        length: usize,
        cx: &mut Cx<'_, F, S>,
    ) -> Action {
        let Some(current) = &self.flow.current else {
            return self.unsolicited(response, length, cx);
        };
        let is_announced = self.flow.behind.is_empty() && self.flow.announced == Announced::Waits;
        if response.is_interim() {
            if is_announced && response.status == 100 {
                self.flow.announced = Announced::No;
            }
            return Action::Forward(length);
        }
        if is_announced {
            self.flow.announced = Announced::Late;
        }
        self.stats.responses += 1;
        if let Some(about) = &self.flow.about {
            let mut headers = Text::default();
            redact::headers(response.headers.iter(), &self.limits.record_headers, &mut headers);
            let what = What::HttpResponse {
                method: current.method,
                url: current.url,
                version: response.version,
                status: response.status,
                length: match response.body {
                    Body::Length(n) => Some(n),
                    Body::None => Some(0),
                    _ => None,
                },
                headers,
            };
            cx.sink.record(&Record {
                latency: u32::try_from(cx.now.saturating_sub(current.since)).ok(),
                ..Record::about(&about.turned(), what)
            });
        }
        if response.body == Body::Tunnel {
            if response.status == 101 && !is_asked_for(response, &current.upgrades) {
                return self.abort(Reason::AppMalformed, "unsolicited 101", cx);
            }
            self.stats.tunnels += 1;
            self.flow.left = Left {
                ruleset: self.slot.ruleset,
                audit: false,
            };
            return Action::Offload;
        }
        self.flow.server = Place::of(response.body, Chunks::of_answer);
        if self.flow.server.is_between_messages() {
            self.flow.pop();
        }
        Action::Forward(length)
    }

    /// Handles a response without a request. Only 408 is forwarded: servers send it when they have waited too long
    /// for a request, and close the connection (RFC 9110, 15.5.9).
    fn unsolicited<F, S: Sink<F>>(
        &mut self,
        response: &Response<'_>,
        length: usize,
        cx: &mut Cx<'_, F, S>,
    ) -> Action {
        self.stats.unsolicited += 1;
        if response.status != 408 {
            return self.abort(Reason::AppMalformed, "unsolicited response", cx);
        }
        self.flow.refused = Some(Refused {
            reason: Reason::AppMalformed,
            status: 400,
            bodiless: false,
            own: 0,
        });
        self.flow.server = Place::Rest;
        Action::Forward(length)
    }
}

/// Returns whether an allowed request is refused because of its body.
pub(crate) fn has_refused_body(
    request: &Request<'_>,
    verdict: Result<HttpVerdict, HttpDenial>,
    bodies: GetBodies,
) -> bool {
    let takes_bodies = bodies == GetBodies::Allow || verdict.is_ok_and(|verdict| verdict.takes_bodies);
    !takes_bodies && request.has_unexpected_body()
}

/// Returns the status of the response to a malformed request, or `None` if the connection is reset without a response,
/// because the client does not speak HTTP/1. `begun` is true if the client has sent a well-formed request before.
pub(crate) fn status_of(refusal: ParseError, begun: bool) -> Option<u16> {
    match refusal {
        ParseError::Http2 => None,
        ParseError::NotHttp if !begun => None,
        ParseError::StartLineTooLong => Some(414),
        ParseError::BadExpect => Some(417),
        ParseError::LineTooLong | ParseError::HeadTooLong | ParseError::TooManyHeaders => Some(431),
        _ => Some(400),
    }
}

/// Returns whether a connection may switch to a protocol (RFC 9110, 7.8: a name, perhaps with a version). HTTP/2, and
/// HTTP inside TLS (RFC 2817), would carry requests that are not inspected.
pub(crate) fn may_become(protocol: &[u8]) -> bool {
    let name = protocol.to_ascii_lowercase();
    ![&b"h2"[..], b"h3", b"http", b"tls", b"ssl"]
        .iter()
        .any(|unread| name.starts_with(unread))
}

/// Returns whether the request has offered all protocols that a 101 names. A 101 must name them (RFC 9110, 15.2.2).
fn is_asked_for(response: &Response<'_>, upgrades: &[u8]) -> bool {
    let mut chosen = response.headers.elements("upgrade").peekable();
    let is_asked = |name: &[u8]| {
        upgrades
            .split(|byte| *byte == b',')
            .any(|asked| asked.eq_ignore_ascii_case(name))
    };
    chosen.peek().is_some() && chosen.all(is_asked)
}
