//! One connection and its phases: hello, connect, handshake with the server, handshake with the client, relay. A
//! failure in any phase is recorded with a reason.

mod handshake;
mod hello;
mod hello_reader;
mod http2;
mod overdue;
mod relay;

use std::{sync::Arc, time::Duration};

use mio::{Interest, Registry, Token};
use palisade_abi::{Direction, Inspector, Reason};
use palisade_inspect::{
    Millis, Side,
    record::{Verdict, What},
    stream::{StreamContext, evaluate_hello, text},
};
use palisade_model::snapshot::RuleSet;
use palisade_protocols::{http1::Head, tls::ClientHello};
use rustls::server::Accepted;
use tracing::info;

pub(crate) use self::{
    hello::agreed_name,
    hello_reader::{HelloError, HelloReader},
};
use crate::{
    end::{End, Ending},
    failure::Failure,
    listen::Place,
    protocol::{Protocol, Scratch},
    settings::{Flows, Options, Reports, Settings},
    stats::{Counters, count},
    tls::{Contexts, PeerName},
    unavailable::Unavailable,
    upstreams::Upstreams,
    view::{ConnectionView, TlsView},
};

/// Maximum number of bytes that a client may still send after an answer in the server's place.
const SPILL: u64 = 1 << 20;
/// Time that a client has to close the connection after an answer in the server's place, ms.
const LINGER: Millis = 5_000;
/// Maximum number of steps in one call, so that other connections are not delayed.
const TURNS: usize = 16;

/// State of a thread that a connection uses during one call.
pub(crate) struct Cx<'a> {
    pub(crate) now: Millis,
    pub(crate) settings: Arc<Settings>,
    /// Returns the newest settings.
    pub(crate) newest: &'a dyn Fn() -> Arc<Settings>,
    pub(crate) flows: &'a dyn Flows,
    pub(crate) reports: &'a dyn Reports,
    pub(crate) options: &'a Options,
    pub(crate) contexts: &'a Contexts,
    pub(crate) counters: &'a Counters,
    /// Buffer for bytes from sockets.
    pub(crate) bytes: &'a mut [u8],
    pub(crate) scratch: &'a mut Scratch,
    pub(crate) registry: &'a Registry,
    pub(crate) upstreams: &'a mut Upstreams,
    /// Direction whose namespace the thread is in.
    pub(crate) entered: &'a mut Option<Direction>,
    /// Number of log lines that are still allowed in this second.
    pub(crate) log: &'a mut u32,
}

/// What the thread does next with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Wait for an event or the deadline.
    Wait,
    /// Call again after the other connections.
    Again,
    /// Remove the connection.
    Close,
}

/// How a connection ends at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// Both sides are reset.
    Reset,
    /// Both sides are closed; bytes that were sent to them are delivered.
    Close,
}

/// Result of one step: whether there was progress.
type Step = Result<bool, Stop>;

enum Phase {
    /// The client's ClientHello arrives.
    Hello(Box<HelloReader>),
    /// The first request of a client without TLS arrives, whose Host names the server.
    Host(Box<Head>),
    /// The connection to the server is being opened.
    Connect(Retry),
    /// TLS handshake with the server.
    UpstreamTls,
    /// TLS handshake with the client.
    ClientTls,
    /// Bytes are inspected and forwarded.
    Relay,
    /// The client has an answer, and everything that it still sends is discarded.
    Linger {
        /// Bytes that the client may still send.
        left: u64,
    },
}

impl Phase {
    const fn text(&self) -> &'static str {
        match self {
            Self::Hello(_) => "waits for the ClientHello",
            Self::Host(_) => "waits for the first request",
            Self::Connect(_) => "connects to the server",
            Self::UpstreamTls => "TLS handshake with the server",
            Self::ClientTls => "TLS handshake with the client",
            Self::Relay => "open",
            Self::Linger { .. } => "closes",
        }
    }
}

/// When the connection to the server is tried again because the client's address and port are still in use.
#[derive(Clone, Copy, Debug, Default)]
struct Retry {
    /// Time of the next attempt, ms.
    at: Millis,
    /// Time between the last attempt and the next one, ms.
    wait: Millis,
}

pub(crate) struct Connection {
    pub(crate) id: u64,
    key: usize,
    /// Endpoint that the connection counts for.
    pub(crate) endpoint: u16,
    /// Time of the connection's entry in the queue of deadlines, ms.
    pub(crate) queued: Millis,
    place: Place,
    pub(crate) context: StreamContext,
    set: Arc<RuleSet>,
    client: End,
    server: Option<End>,
    phase: Phase,
    protocol: Protocol,
    /// Name of the server, or its address.
    name: PeerName,
    /// Application protocols that the client offers, in its order.
    offered: Vec<Vec<u8>>,
    accepted: Option<Box<Accepted>>,
    /// The ClientHello, for its verdict by later rules.
    hello: Option<Box<ClientHello>>,
    /// Why there is no server.
    failure: Option<Failure>,
    /// Answer in the server's place that waits for the rest of an earlier response.
    answer: Option<Vec<u8>>,
    /// Whether a byte of a response was forwarded.
    responded: bool,
    /// Whether the flow was looked up for the request whose head is arriving.
    checked: bool,
    /// [`crate::Flows::removals`] before the last lookup of the flow; `None` if the next request needs a lookup.
    removals: Option<u64>,
    /// Time of the last lookup, ms.
    found_at: Millis,
    /// Whether later bytes are forwarded without inspection.
    offloaded: bool,
    /// Time since which a whole HTTP/1 request waits for the head of its response, ms.
    waits_since: Option<Millis>,
    /// Last time at which bytes waited for the client's socket, so that no response could be read, ms.
    blocked_at: Millis,
    /// HTTP requests of the connection.
    requests: u64,
    /// Time at which the connection was accepted, ms.
    since: Millis,
    /// Time at which the current phase began, ms.
    phase_since: Millis,
    /// Duration of the connect, ms.
    connect_time: Millis,
    /// Time of the last progress, ms.
    active: Millis,
}

impl Connection {
    /// Takes a connection that was accepted. Returns `None` if the rule set is unknown or the socket cannot be polled.
    #[allow(
        clippy::too_many_arguments,
        reason = "each is a fact about the new connection"
    )]
    pub(crate) fn new(
        id: u64,
        key: usize,
        place: Place,
        context: StreamContext,
        socket: mio::net::TcpStream,
        registry: &Registry,
        settings: &Settings,
        now: Millis,
    ) -> Option<Self> {
        let set = Arc::clone(settings.rules.source(context.request.ruleset)?);
        let phase = match (&set.terminating_tls, &set.originating_tls) {
            (Some(_), _) => Phase::Hello(Box::default()),
            (None, Some(_)) => Phase::Host(Box::default()),
            (None, None) => Phase::Connect(Retry::default()),
        };
        context.step(|| {
            format!(
                "the proxy has accepted the connection, rule set {}: {}",
                context.request.ruleset,
                phase.text()
            )
        });
        let mut client = End::new(socket);
        let interest = Interest::READABLE | Interest::WRITABLE;
        registry
            .register(client.socket_mut(), token(key, Side::Client), interest)
            .ok()?;
        Some(Self {
            id,
            key,
            endpoint: context.request.endpoint,
            queued: Millis::MAX,
            place,
            name: PeerName::Address(context.server.ip()),
            context,
            set,
            client,
            server: None,
            phase,
            protocol: Protocol::Bytes,
            offered: Vec::new(),
            accepted: None,
            hello: None,
            failure: None,
            answer: None,
            responded: false,
            checked: false,
            // The policy can have changed since the connection was accepted.
            removals: None,
            found_at: now,
            offloaded: false,
            waits_since: None,
            blocked_at: now,
            requests: 0,
            since: now,
            phase_since: now,
            connect_time: 0,
            active: now,
        })
    }

    /// Returns the end of one side.
    pub(crate) const fn end(&mut self, side: Side) -> Option<&mut End> {
        match side {
            Side::Client => Some(&mut self.client),
            Side::Server => self.server.as_mut(),
        }
    }

    /// Returns one side and the other one.
    const fn ends(&mut self, side: Side) -> (Option<&mut End>, Option<&mut End>) {
        match side {
            Side::Client => (Some(&mut self.client), self.server.as_mut()),
            Side::Server => (self.server.as_mut(), Some(&mut self.client)),
        }
    }

    /// Resets both sides when the connection is dropped.
    pub(crate) fn reset(&self) {
        self.client.reset();
        if let Some(server) = &self.server {
            server.reset();
        }
    }

    /// Returns the time at which the connection must be called again even without an event, ms.
    pub(crate) fn deadline(&self, options: &Options) -> Millis {
        match &self.phase {
            Phase::Hello(_) | Phase::UpstreamTls | Phase::ClientTls => {
                after(self.phase_since, options.handshake)
            }
            Phase::Connect(retry) => {
                let timeout = after(self.phase_since, options.connect);
                if self.server.is_none() {
                    timeout.min(retry.at)
                } else {
                    timeout
                }
            }
            Phase::Host(_) => after(self.phase_since, options.head),
            Phase::Relay => self
                .head_since()
                .map_or(Millis::MAX, |since| after(since, options.head))
                .min(after(self.active, options.idle))
                .min(self.response_deadline(options))
                .min(if self.is_within_frame() || self.is_answered() {
                    after(self.active, options.head)
                } else {
                    Millis::MAX
                }),
            Phase::Linger { .. } => self.phase_since + LINGER,
        }
    }

    /// Returns whether an HTTP/2 peer has sent a part of the preface, of a frame or of a header block.
    fn is_within_frame(&self) -> bool {
        match &self.protocol {
            Protocol::Http2(http2) => {
                (!http2.filter.has_begun() || http2.filter.held() > 0)
                    && !Side::BOTH.into_iter().any(|side| self.is_blocked(side))
            }
            _ => false,
        }
    }

    /// Returns whether HTTP/2 requests were answered in the server's place, so that only the rest of these requests may
    /// follow.
    fn is_answered(&self) -> bool {
        match &self.protocol {
            Protocol::Http2(http2) => http2.unavailable.as_ref().is_some_and(Unavailable::has_answered),
            _ => false,
        }
    }

    /// Returns the time since which a message head is incomplete.
    fn head_since(&self) -> Option<Millis> {
        let client = self.client.head_since.filter(|_| !self.is_blocked(Side::Server));
        let server = self.server.as_ref().and_then(|server| server.head_since);
        let server = server.filter(|_| !self.is_blocked(Side::Client));
        [client, server].into_iter().flatten().min()
    }

    /// Returns whether bytes wait for the socket of a side, so that the other side is not read.
    fn is_blocked(&self, side: Side) -> bool {
        match side {
            Side::Client => self.client.is_blocked(),
            Side::Server => self.server.as_ref().is_some_and(End::is_blocked),
        }
    }

    /// Returns the addresses of the connection and the request of the policy.
    pub(crate) const fn context(&self) -> &StreamContext {
        &self.context
    }

    /// Returns the time of the last progress, ms.
    pub(crate) const fn idle_since(&self) -> Millis {
        self.active
    }

    fn set_phase(&mut self, phase: Phase, now: Millis) {
        self.context.step(|| format!("the proxy: {}", phase.text()));
        self.phase = phase;
        self.phase_since = now;
        self.active = now;
    }

    /// Returns whether HTTP requests are inspected, so that a failure can be answered.
    fn reads_http(&self) -> bool {
        self.set.reads == Inspector::Http as u8
    }

    /// Handles the deadline.
    pub(crate) fn expire(&mut self, cx: &mut Cx<'_>) -> Next {
        use crate::failure::FailureKind as Kind;
        match self.phase {
            // The next attempt comes first, even if the timeout has passed too: only the attempt can tell why the
            // connection cannot be opened.
            Phase::Connect(retry) if self.server.is_none() && retry.at <= cx.now => {}
            Phase::Connect(_) if self.server.is_none() => self.fail(self.port_in_use(), cx),
            Phase::Connect(_) => self.fail(Kind::ConnectTimeout.into(), cx),
            Phase::UpstreamTls => self.fail(Kind::HandshakeTimeout.into(), cx),
            Phase::Linger { .. } => return Next::Close,
            Phase::Relay => {
                if self.expire_relay(cx).is_err() {
                    // Bytes that were allowed before are still sent.
                    let _ = self.client.flush();
                    self.reset();
                    return Next::Close;
                }
            }
            Phase::Hello(_) | Phase::Host(_) | Phase::ClientTls => {
                count(&cx.counters.timeouts);
                self.drop_record(Reason::InspectDeadline, Reason::InspectDeadline.text(), cx);
                self.reset();
                return Next::Close;
            }
        }
        self.drive(cx)
    }

    /// Looks the flow up after a change of policies. Ends the connection if the flow is no longer intercepted.
    pub(crate) fn recheck(&mut self, cx: &mut Cx<'_>) -> Next {
        if self.find(cx).is_err() {
            let is_http2 = matches!(self.protocol, Protocol::Http2(_));
            // A close without a reset delivers the GOAWAY.
            if !is_http2 || self.say_goaway(cx).is_err() {
                self.reset();
            }
            return Next::Close;
        }
        if self.recheck_protocol(cx).is_err() {
            count(&cx.counters.cut);
            self.reset();
            return Next::Close;
        }
        self.drive(cx)
    }

    /// Updates the request of the policy from the flow.
    fn find(&mut self, cx: &mut Cx<'_>) -> Result<(), Stop> {
        // Read before the lookup: a removal during the lookup leads to another one.
        let removals = cx.flows.removals();
        let (direction, client, server) = (self.context.direction, self.context.client, self.context.server);
        let Some(flow) = cx.flows.find(direction, client, server) else {
            count(&cx.counters.cut);
            return Err(Stop::Reset);
        };
        self.removals = flow.is_evaluated.then_some(removals);
        self.found_at = cx.now;
        let was_audit = self.context.is_audit();
        self.context.request = flow.request;
        // The policy can have changed since the thread last took new settings.
        if !cx.settings.rules.knows(flow.request.ruleset) {
            cx.settings = (cx.newest)();
        }
        if self.follow_rules(was_audit, cx) {
            return Ok(());
        }
        count(&cx.counters.cut);
        Err(Stop::Reset)
    }

    /// Applies the rule set in force to what was decided before the first request. Returns whether the connection may
    /// go on: the rule set terminates and originates TLS in the same way, and allows the server name.
    fn follow_rules(&mut self, was_audit: bool, cx: &Cx<'_>) -> bool {
        let Some(set) = cx.settings.rules.source(self.context.request.ruleset) else {
            // The inspector refuses the next request. Without an inspector there is none.
            return self.reads_http();
        };
        let is_audit = self.context.is_audit();
        if Arc::ptr_eq(set, &self.set) && was_audit == is_audit {
            return true;
        }
        let is_same = set.reads == self.set.reads
            && set.terminating_tls == self.set.terminating_tls
            && set.originating_tls == self.set.originating_tls;
        // Addresses that were learned by the name can have expired since.
        let allows =
            |hello| evaluate_hello(hello, &self.context, &cx.settings.rules, cx.settings.ech, None).is_ok();
        let is_allowed = is_audit || self.hello.as_deref().is_none_or(allows);
        self.set = Arc::clone(set);
        is_same && is_allowed
    }

    /// Works until the connection waits for an event.
    pub(crate) fn drive(&mut self, cx: &mut Cx<'_>) -> Next {
        if self.is_abandoned() {
            self.reset();
            return Next::Close;
        }
        for _ in 0..TURNS {
            let step = match &self.phase {
                Phase::Hello(_) => self.hello(cx),
                Phase::Host(_) => self.host(cx),
                Phase::Connect(_) => self.connect(cx),
                Phase::UpstreamTls => self.upstream_tls(cx),
                Phase::ClientTls => self.client_tls(cx),
                Phase::Relay => self.relay(cx),
                Phase::Linger { .. } => self.linger(cx),
            };
            match step {
                Ok(true) => self.active = cx.now,
                Ok(false) => {
                    self.client.release();
                    if let Some(server) = &mut self.server {
                        server.release();
                    }
                    return Next::Wait;
                }
                Err(Stop::Close) => return Next::Close,
                Err(Stop::Reset) => {
                    // Bytes that were allowed before are still sent.
                    let _ = self.client.flush();
                    let _ = self.server.as_mut().map(End::flush);
                    self.reset();
                    return Next::Close;
                }
            }
        }
        Next::Again
    }

    /// Returns whether the client has reset the connection, and no read of the client's socket would report the reset,
    /// because the server is not ready for the client's bytes.
    fn is_abandoned(&self) -> bool {
        self.client.has_failed
            && match &self.phase {
                Phase::Connect(_) | Phase::UpstreamTls => true,
                Phase::Relay => {
                    let is_blocked = self.server.as_ref().is_some_and(End::is_blocked);
                    is_blocked || !self.client.can_receive()
                }
                _ => false,
            }
    }

    /// Discards what the client still sends after an answer, so that the close does not reset the connection before the
    /// client has read the answer.
    fn linger(&mut self, cx: &mut Cx<'_>) -> Step {
        let written = self.client.flush().map_err(|_| Stop::Reset)?;
        if let Some(server) = &mut self.server
            && server.flush().unwrap_or(true)
        {
            self.server = None;
        }
        if written && self.client.eof.is_some() {
            return Err(Stop::Close);
        }
        if !self.client.can_receive() {
            return Ok(false);
        }
        let before = self.client.received;
        let progress = self.client.receive(cx.bytes).map_err(|_| Stop::Reset)?;
        self.client.input.clear();
        let received = self.client.received - before;
        if let Phase::Linger { left } = &mut self.phase {
            *left = left.checked_sub(received).ok_or(Stop::Reset)?;
        }
        Ok(progress)
    }

    /// Ends both streams after the bytes that are queued, and discards what the client still sends.
    fn close_after_answer(&mut self, now: Millis) {
        self.client.input.clear();
        self.client.finish(Ending::Clean);
        if let Some(server) = &mut self.server {
            server.finish(Ending::Clean);
        }
        self.set_phase(Phase::Linger { left: SPILL }, now);
    }

    // Records.

    fn drop_record(&self, reason: Reason, detail: &'static str, cx: &Cx<'_>) {
        let what = What::Unreadable { detail };
        cx.reports
            .record(&self.context.record(Verdict::Dropped, reason, what));
    }

    /// Records the failure of the interception.
    fn drop_intercept(&self, reason: Reason, error: &str, cx: &Cx<'_>) {
        let name = match &self.name {
            PeerName::Dns(name) => text(name),
            PeerName::Address(_) => text(""),
        };
        let error = text(error);
        let what = What::Intercept { name, error };
        cx.reports
            .record(&self.context.record(Verdict::Dropped, reason, what));
    }

    /// Counts, records and logs a failure of the server.
    fn report_failure(&self, failure: &Failure, cx: &mut Cx<'_>) {
        cx.counters.count_failure(failure.kind);
        cx.upstreams
            .note_failure(&self.name, self.context.server, failure);
        self.drop_intercept(failure.reason(), &failure.to_string(), cx);
        if *cx.log > 0 {
            *cx.log -= 1;
            info!(
                client = %self.context.client,
                server = %self.context.server,
                name = %self.name,
                endpoint = self.context.request.endpoint,
                error = %failure,
                "upstream connection failed"
            );
        }
    }

    /// Returns the state of the connection, for display.
    pub(crate) fn view(&self, thread: usize, now: Millis) -> ConnectionView {
        let tls = |end: &End| end.tls.as_ref().and_then(|tls| TlsView::of(tls));
        ConnectionView {
            thread,
            id: self.id,
            endpoint: self.endpoint,
            direction: self.context.direction,
            client: self.context.client,
            server: self.context.server,
            name: self.name.to_string(),
            state: self.phase.text(),
            protocol: self.protocol.text(),
            failure: self.failure.as_ref().map(ToString::to_string),
            client_tls: tls(&self.client),
            server_tls: self.server.as_ref().and_then(tls),
            bytes_from_client: self.client.received,
            bytes_from_server: self.server.as_ref().map_or(0, |server| server.received),
            requests: self.requests,
            age: now.saturating_sub(self.since),
            idle: now.saturating_sub(self.active),
        }
    }
}

/// Returns the time a duration after another time, ms.
fn after(since: Millis, duration: Duration) -> Millis {
    since.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

/// Returns the token of one side of the connection with a key.
const fn token(key: usize, side: Side) -> Token {
    Token(key << 1 | side as usize)
}

/// Returns key and side of a token.
pub(crate) const fn of_token(token: Token) -> (usize, Side) {
    let side = if token.0 & 1 == 0 {
        Side::Client
    } else {
        Side::Server
    };
    (token.0 >> 1, side)
}
