//! Inspection of streams without packets, for a proxy that terminates TCP: the HTTP/1 inspector and the check of a
//! ClientHello, with the same verdicts and records as for packets.
//!
//! Start at [`HttpSession`].

use std::net::SocketAddr;

use palisade_abi::{Direction, FlowCommand, PuntRequest, Reason, punt_flags};
use palisade_fqdn::SniAddressIndex;
use palisade_protocols::tls::{ClientHello, ServerName};

use crate::{
    Ech, HttpLimits, HttpScratch, HttpStats, Millis, Route, Rules, Side, Sink,
    commit::CommitRequest,
    context::Cx,
    frames::Spare,
    http::{Flow, HttpStream, edited},
    record::{About, Record, Text, Verdict, What},
    steps::{self, Detail},
    tcp::{Action, StreamInspector, log_action},
    tls,
};

/// Decision about the bytes of one side.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StreamAction {
    /// The inspector needs more bytes of this side, or the end of its stream.
    NeedMore,
    /// The other side has to send first. The inspector must be called again after each byte of the other side.
    AwaitPeer,
    /// The first `n` bytes are allowed. With `n = 0` for a stream without further bytes, its end is allowed.
    Forward(usize),
    /// The first `consumed` bytes, the head of a request, are allowed, but the rule requires other header fields: the
    /// replacement is sent in their place.
    ForwardHead {
        /// Length of the head, bytes.
        consumed: usize,
        /// The head with the header fields that the rule requires.
        replacement: Vec<u8>,
    },
    /// The next `n` bytes are allowed without inspection. `n` can exceed the number of bytes that have arrived.
    Bypass(u64),
    /// From now on neither side is inspected.
    Offload,
    /// No further byte is forwarded. Both ends are reset.
    Abort(Reason),
    /// This side gets the given bytes and the end of the stream, once all allowed bytes of the other side are
    /// delivered. No further byte of this side is forwarded.
    Respond(Reason, Vec<u8>),
}

impl From<Action> for StreamAction {
    fn from(action: Action) -> Self {
        match action {
            Action::NeedMore => Self::NeedMore,
            Action::AwaitPeer => Self::AwaitPeer,
            Action::Forward(n) | Action::ForwardUndecided(n) => Self::Forward(n),
            Action::Bypass(n) => Self::Bypass(n),
            Action::Offload => Self::Offload,
            Action::Abort(reason) => Self::Abort(reason),
            // Without packets, both reach the client in one stream.
            Action::Respond(reason, bytes) | Action::RespondThenEnd(reason, bytes) => {
                Self::Respond(reason, bytes)
            }
        }
    }
}

/// A connection whose streams are inspected: its ends, and the endpoint whose policy requires the inspection.
#[derive(Clone, Copy, Debug)]
pub struct StreamContext {
    /// The request of the policy.
    pub request: PuntRequest,
    /// Direction of the verdict: egress if the client is the endpoint.
    pub direction: Direction,
    /// Address and port of the client.
    pub client: SocketAddr,
    /// Address and port of the server, as the client knows them.
    pub server: SocketAddr,
    /// Index of the interface that the flow uses.
    pub ifindex: u32,
}

impl StreamContext {
    pub(crate) fn about(&self) -> About {
        About::of_stream(
            &self.request,
            self.direction == Direction::Ingress,
            (self.client.ip().into(), self.client.port()),
            (self.server.ip().into(), self.server.port()),
            self.ifindex,
        )
    }

    /// Takes a step of the debug log about the connection.
    #[inline]
    pub fn step(&self, text: impl FnOnce() -> String) {
        if steps::is_on(Detail::Debug) {
            steps::of(&self.about(), Detail::Debug, None, text);
        }
    }

    /// Returns whether audit mode forwards what the application rules deny.
    #[must_use]
    pub const fn is_audit(&self) -> bool {
        self.request.flags & punt_flags::AUDIT != 0
    }

    /// Returns a record about the connection, as for a packet of the server.
    #[must_use]
    pub fn response_record(&self, verdict: Verdict, reason: Reason, what: What) -> Record {
        Record {
            verdict,
            reason,
            ..Record::about(&self.about().turned(), what)
        }
    }

    /// Returns a record about the connection, as for a packet of the client.
    #[must_use]
    pub fn record(&self, verdict: Verdict, reason: Reason, what: What) -> Record {
        Record {
            verdict,
            reason,
            ..Record::about(&self.about(), what)
        }
    }
}

/// What a stream inspector shares between connections: one per thread.
#[derive(Debug, Default)]
pub struct StreamScratch {
    /// Buffers of the HTTP rules.
    pub http: HttpScratch,
    /// Counters of HTTP inspection.
    pub stats: HttpStats,
}

/// State of the HTTP/1 inspection of one connection.
pub struct HttpSession {
    flow: Box<Flow>,
}

impl std::fmt::Debug for HttpSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpSession").finish_non_exhaustive()
    }
}

impl HttpSession {
    /// Creates the state of a connection. `secure`: whether records show `https` as the scheme.
    #[must_use]
    pub fn new(context: &StreamContext, secure: bool) -> Self {
        let mut flow = Box::<Flow>::default();
        flow.about = Some(context.about());
        flow.secure = secure;
        Self { flow }
    }

    /// Inspects the bytes of one side that have arrived and have no verdict yet. `end`: whether the stream ends after
    /// these bytes. `request` is the current request of the policy, so that each HTTP request gets the verdict of the
    /// rules in force.
    #[allow(
        clippy::too_many_arguments,
        reason = "the caller owns all of them, and no two of them belong together"
    )]
    pub fn read(
        &mut self,
        side: Side,
        bytes: &[u8],
        end: bool,
        now: Millis,
        request: &PuntRequest,
        rules: &Rules,
        limits: &HttpLimits,
        scratch: &mut StreamScratch,
        record: &mut dyn FnMut(&Record),
    ) -> StreamAction {
        let mut spare = Spare::new();
        let mut stream = HttpStream {
            flow: &mut self.flow,
            slot: request,
            limits,
            scratch: &mut scratch.http,
            stats: &mut scratch.stats,
        };
        let mut cx = Cx {
            now,
            rules,
            spare: &mut spare,
            sink: &mut Records(record),
        };
        let is_head = side == Side::Client && stream.flow.is_at_request();
        let action = StreamInspector::<()>::read(&mut stream, side, bytes, end, &mut cx);
        if let Some(about) = &self.flow.about {
            log_action(about, side, bytes.len(), &action);
        }
        match action {
            Action::Forward(length) if is_head && length > 0 && !scratch.http.edits().is_empty() => {
                let head = bytes.get(..length).unwrap_or_default();
                StreamAction::ForwardHead {
                    consumed: length,
                    replacement: edited(head, scratch.http.edits()),
                }
            }
            action => action.into(),
        }
    }

    /// Returns whether the next byte of the client is the first byte of a request.
    #[must_use]
    pub fn is_at_request(&self) -> bool {
        self.flow.is_at_request()
    }

    /// Returns whether a request was forwarded of whose response no byte was forwarded.
    #[must_use]
    pub fn awaits_response(&self) -> bool {
        self.flow.awaits_response()
    }

    /// Returns whether a request was forwarded as a whole, or announced its body (`Expect: 100-continue`), of whose response
    /// no byte was forwarded. `body`: whether the client is within a body that is forwarded without inspection.
    #[must_use]
    pub fn awaits_head(&self, body: bool) -> bool {
        self.flow.awaits_response() && self.flow.has_whole_request(body)
    }

    /// Returns whether a side is within a message after its head. Bodies that [`StreamAction::Bypass`] forwards do not
    /// count from then on.
    #[must_use]
    pub fn is_within(&self, side: Side) -> bool {
        self.flow.is_within(side)
    }

    /// Returns whether all forwarded requests but the last one have their whole responses, and the last one has no byte of
    /// its response.
    #[must_use]
    pub fn awaits_last_only(&self) -> bool {
        self.flow.awaits_last_only()
    }

    /// Returns whether the oldest request without a response is HEAD.
    #[must_use]
    pub fn is_head(&self) -> bool {
        self.flow.is_head()
    }

    /// Returns an error if a connection that was offloaded must end under the current request of the policy.
    ///
    /// # Errors
    /// The reason for which the connection is aborted.
    pub fn may_stay_offloaded(&self, request: &PuntRequest) -> Result<(), Reason> {
        self.flow.may_stay_offloaded(request)
    }
}

/// Sink that takes only records: without packets there are no other effects.
struct Records<'a>(&'a mut dyn FnMut(&Record));

impl Sink<()> for Records<'_> {
    fn release(&mut self, (): ()) {}
    fn release_with(&mut self, (): (), _command: &FlowCommand) {}
    fn discard(&mut self, (): (), _reason: Reason) {}
    fn emit(&mut self, _frame: &[u8], _route: Route) {}
    fn commit(&mut self, learn: CommitRequest) -> Result<(), CommitRequest> {
        Err(learn)
    }
    fn record(&mut self, record: &Record) {
        (self.0)(record);
    }
}

/// Returns the rule that allows a ClientHello to a terminated connection.
///
/// If the rule set reads server names only, one of its alternatives must allow the name. If the rule set reads another
/// protocol inside TLS, `serverNames` must match. `names` are the learned addresses of each endpoint, if the address of
/// the server must be one that the endpoint has learned by the server name.
///
/// # Errors
/// The reason for which the connection is refused.
pub fn evaluate_hello(
    hello: &ClientHello,
    context: &StreamContext,
    rules: &Rules,
    ech: Ech,
    names: Option<&SniAddressIndex>,
) -> Result<u32, Reason> {
    let is_known = match (&hello.server_name, names) {
        (ServerName::Name(name), Some(names)) if context.direction == Direction::Egress => {
            names.has(context.request.endpoint, context.server.ip(), name)
        }
        _ => true,
    };
    let ruleset = context.request.ruleset;
    let set = rules.source(ruleset).ok_or(Reason::UnknownRuleset)?;
    if set.reads == palisade_abi::Inspector::Tls as u8 {
        return tls::evaluate(hello, rules, ruleset, ech, is_known);
    }
    if hello.ech && ech == Ech::Deny {
        return Err(Reason::AppDenied);
    }
    // Without `serverNames` the verdict does not depend on the name, so a false name gains nothing.
    let Some(names) = rules.server_names(ruleset) else {
        return Ok(context.request.rule);
    };
    match &hello.server_name {
        ServerName::Name(name) if names.first(name).is_none() => Err(Reason::AppDenied),
        ServerName::Name(_) if is_known => Ok(context.request.rule),
        ServerName::Name(_) => Err(Reason::SniAddress),
        ServerName::Missing | ServerName::Address(_) => Err(Reason::AppDenied),
    }
}

/// Returns the content of the record of a hello.
#[must_use]
pub fn hello_record(hello: &ClientHello) -> What {
    tls::what(hello)
}

/// Returns a text for a record, truncated at its maximum length.
#[must_use]
pub fn text(text: &str) -> Text {
    Text::from(text.as_bytes())
}
