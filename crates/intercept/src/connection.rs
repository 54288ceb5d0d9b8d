//! One connection on its path: hello, connect, handshake with the server, handshake with the client, relay. The failure
//! of each state is a decision with a reason.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use mio::{Interest, Registry, Token};
use palisade_abi::{Inspector, Reason};
use palisade_inspect::{
    Millis, Side,
    record::{Record, Verdict, What},
    stream::{HttpSession, StreamAction, StreamContext, StreamScratch, evaluate_hello, hello_record, text},
};
use palisade_model::snapshot::RuleSet;
use palisade_protocols::tls::{ClientHello, ClientReader, ClientStep, ServerName};
use rustls::server::Acceptor;
use tracing::info;

use crate::{
    answer,
    end::{End, EndError, Ending, INPUT},
    failure::{Failure, FailureKind, alert_name},
    listen::{Place, connect},
    settings::{Flows, Options, Reports, Settings},
    stats::{Counters, count},
    tls::{Contexts, PeerName},
};

/// Maximum number of bytes that a client may still send after an answer in the server's place.
const SPILL: u64 = 1 << 20;
/// Time that a client has to close the connection after an answer in the server's place, ms.
const LINGER: Millis = 5_000;
/// Number of reads of one side before other connections have their turn.
const TURNS: usize = 16;

/// What a thread lends to a connection for one call.
pub(crate) struct Cx<'a> {
    pub(crate) now: Millis,
    pub(crate) settings: &'a Arc<Settings>,
    pub(crate) flows: &'a dyn Flows,
    pub(crate) reports: &'a dyn Reports,
    pub(crate) contexts: &'a Contexts,
    pub(crate) counters: &'a Counters,
    pub(crate) scratch: &'a mut [u8],
    pub(crate) stream: &'a mut StreamScratch,
    pub(crate) registry: &'a Registry,
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
#[derive(Debug)]
enum Stop {
    /// Both sides are reset.
    Reset,
    /// Both sides are closed; what they were sent is delivered.
    Close,
}

/// Result of one step: whether there was progress.
type Step = Result<bool, Stop>;

enum Phase {
    /// The client's ClientHello arrives.
    Hello(Box<HelloReader>),
    /// The first request of a client without TLS arrives, whose Host names the server.
    Host,
    /// The connection to the server is being opened.
    Connect,
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

#[derive(Default)]
struct HelloReader {
    reader: ClientReader,
    /// Number of bytes of the client's input that the reader has taken.
    fed: usize,
    hello: Option<Box<ClientHello>>,
    acceptor: Acceptor,
}

/// The protocol inside the connection.
enum Protocol {
    /// Bytes are forwarded unread.
    Raw,
    Http1(HttpSession),
}

pub(crate) struct Connection {
    pub(crate) id: u64,
    key: usize,
    /// Endpoint that the connection counts for.
    pub(crate) endpoint: u16,
    /// Time of the connection's entry in the queue of deadlines.
    pub(crate) queued: Millis,
    place: Place,
    pub(crate) context: StreamContext,
    set: Arc<RuleSet>,
    client: End,
    server: Option<End>,
    phase: Phase,
    protocol: Protocol,
    /// What the server of the connection is called.
    name: PeerName,
    /// Application protocols that the client offers, in its order.
    offered: Vec<Vec<u8>>,
    accepted: Option<Box<rustls::server::Accepted>>,
    /// Why there is no server.
    failure: Option<Failure>,
    /// Answer in the server's place that waits for the rest of an earlier response.
    answer: Option<Vec<u8>>,
    /// Whether a byte of a response was forwarded.
    responded: bool,
    /// Whether the flow was looked up for the request whose head is arriving.
    checked: bool,
    /// Whether the connection was offloaded, so that later requests are not inspected.
    offloaded: bool,
    /// Time of the last progress, ms.
    active: Millis,
    /// Time since when a head is incomplete, ms.
    head_since: Option<Millis>,
    /// Time at which the current phase began, ms.
    phase_since: Millis,
}

impl Connection {
    /// Takes a connection that was accepted. `None`: the connection is reset.
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
            (None, Some(_)) => Phase::Host,
            (None, None) => Phase::Connect,
        };
        let mut client = End::new(socket);
        registry
            .register(
                client.socket_mut(),
                token(key, Side::Client),
                Interest::READABLE | Interest::WRITABLE,
            )
            .ok()?;
        Some(Self {
            id,
            key,
            place,
            name: PeerName::Address(context.server.ip()),
            context,
            set,
            client,
            server: None,
            phase,
            protocol: Protocol::Raw,
            offered: Vec::new(),
            accepted: None,
            failure: None,
            answer: None,
            responded: false,
            checked: false,
            offloaded: false,
            active: now,
            head_since: None,
            phase_since: now,
            endpoint: context.request.endpoint,
            queued: Millis::MAX,
        })
    }

    /// Returns the end of one side.
    pub(crate) const fn end(&mut self, side: Side) -> Option<&mut End> {
        match side {
            Side::Client => Some(&mut self.client),
            Side::Server => self.server.as_mut(),
        }
    }

    /// Resets both sides when the connection is dropped.
    pub(crate) fn reset(&self) {
        self.client.reset();
        if let Some(server) = &self.server {
            server.reset();
        }
    }

    /// Returns the time at which the connection must be called again even without an event.
    pub(crate) fn deadline(&self, options: &Options) -> Millis {
        let ms = |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let after = |since: Millis, duration| since.saturating_add(ms(duration));
        match &self.phase {
            Phase::Hello(_) | Phase::UpstreamTls | Phase::ClientTls => {
                after(self.phase_since, options.handshake)
            }
            Phase::Connect => after(self.phase_since, options.connect),
            Phase::Host => after(self.phase_since, options.head),
            Phase::Relay => {
                let idle = after(self.active, options.idle);
                self.head_since
                    .map_or(idle, |since| after(since, options.head).min(idle))
            }
            Phase::Linger { .. } => self.phase_since + LINGER,
        }
    }

    /// Returns the time of the last progress of a connection that only waits for further requests.
    pub(crate) fn idle_since(&self) -> Millis {
        self.active
    }

    fn set_phase(&mut self, phase: Phase, now: Millis) {
        self.phase = phase;
        self.phase_since = now;
        self.active = now;
    }

    /// Handles the deadline.
    pub(crate) fn expire(&mut self, cx: &mut Cx<'_>) -> Next {
        match self.phase {
            Phase::Connect => self.fail(FailureKind::ConnectTimeout.into(), cx),
            Phase::UpstreamTls => self.fail(FailureKind::HandshakeTimeout.into(), cx),
            Phase::Linger { .. } => return Next::Close,
            Phase::Relay if self.head_since.is_none() => {
                count(&cx.counters.timeouts);
                self.reset();
                return Next::Close;
            }
            Phase::Hello(_) | Phase::Host | Phase::ClientTls | Phase::Relay => {
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
            self.reset();
            return Next::Close;
        }
        Next::Wait
    }

    /// Updates the request of the policy from the flow.
    fn find(&mut self, cx: &Cx<'_>) -> Result<(), Stop> {
        let flow = cx
            .flows
            .find(self.context.direction, self.context.client, self.context.server);
        let Some(flow) = flow else {
            count(&cx.counters.cut);
            return Err(Stop::Reset);
        };
        self.context.request = flow.request;
        if let (true, Protocol::Http1(session)) = (self.offloaded, &self.protocol)
            && session.may_stay_offloaded(&flow.request).is_err()
        {
            count(&cx.counters.cut);
            return Err(Stop::Reset);
        }
        Ok(())
    }

    /// Works until the connection waits for an event.
    pub(crate) fn drive(&mut self, cx: &mut Cx<'_>) -> Next {
        for _ in 0..TURNS {
            let step = match &self.phase {
                Phase::Hello(_) => self.hello(cx),
                Phase::Host => self.host(cx),
                Phase::Connect => self.connect(cx),
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
                    self.reset();
                    return Next::Close;
                }
            }
        }
        Next::Again
    }

    // ---- hello ----

    fn hello(&mut self, cx: &mut Cx<'_>) -> Step {
        match self.client.can_receive().then(|| self.client.receive(cx.scratch)) {
            None => {}
            Some(Ok(_)) => {}
            Some(Err(_)) => return Err(Stop::Reset),
        }
        let Phase::Hello(reader) = &mut self.phase else {
            return Ok(false);
        };
        if reader.hello.is_none() {
            let bytes = self.client.input.bytes();
            let mut rest = bytes.get(reader.fed..).unwrap_or_default();
            match reader.reader.next(&mut rest) {
                Ok(ClientStep::Hello(hello)) => reader.hello = Some(hello),
                Ok(ClientStep::More | ClientStep::Other) if self.client.eof.is_some() => {
                    return Err(Stop::Close);
                }
                Ok(ClientStep::More | ClientStep::Other) => {
                    reader.fed = bytes.len() - rest.len();
                    return Ok(false);
                }
                Err(error) => {
                    count(&cx.counters.hellos_refused);
                    self.drop_record(Reason::AppMalformed, error.text(), cx);
                    return Err(Stop::Reset);
                }
            }
        }
        // Both parsers must agree on the name: the one whose result is judged, and the one that answers.
        let accepted = loop {
            let mut bytes = self.client.input.bytes();
            let all = bytes.len();
            let Ok(n) = reader.acceptor.read_tls(&mut bytes) else {
                return Err(Stop::Reset);
            };
            let taken = all - bytes.len();
            self.client.input.consume(taken);
            match reader.acceptor.accept() {
                Ok(Some(accepted)) => break accepted,
                Ok(None) if n == 0 => {
                    return Ok(false);
                }
                Ok(None) => {}
                Err((error, mut alert)) => {
                    let mut bytes = Vec::new();
                    let _ = alert.write_all(&mut bytes);
                    let words = format!("ClientHello: {error}");
                    count(&cx.counters.hellos_refused);
                    self.drop_intercept(Reason::AppMalformed, &words, cx);
                    return self.refuse_hello(&bytes);
                }
            }
        };
        let Some(hello) = reader.hello.take() else {
            return Err(Stop::Reset);
        };
        let name = match &hello.server_name {
            ServerName::Name(name) => Some(name.to_string()),
            ServerName::Missing | ServerName::Address(_) => None,
        };
        let sent = accepted
            .client_hello()
            .server_name()
            .map(|name| name.trim_end_matches('.').to_ascii_lowercase());
        if name != sent {
            count(&cx.counters.hellos_refused);
            self.drop_record(Reason::AppMalformed, "ambiguous server name", cx);
            return Err(Stop::Reset);
        }
        if let Some(name) = name {
            self.name = PeerName::Dns(name.into());
        }
        self.offered = accepted
            .client_hello()
            .alpn()
            .into_iter()
            .flatten()
            .filter(|protocol| {
                self.set.reads == Inspector::Tls as u8 || matches!(*protocol, b"h2" | b"http/1.1")
            })
            .map(<[u8]>::to_vec)
            .take(16)
            .collect();
        self.accepted = Some(Box::new(accepted));
        let verdict = match (&self.name, cx.settings.refuse_nameless) {
            (PeerName::Address(_), true) => Err(Reason::AppDenied),
            _ => evaluate_hello(
                &hello,
                &self.context,
                &cx.settings.rules,
                cx.settings.ech,
                cx.settings.names.as_deref(),
            ),
        };
        let what = hello_record(&hello);
        match verdict {
            Ok(rule) => {
                let record = self.context.record(Verdict::Forwarded, Reason::Allowed, what);
                cx.reports.record(&Record { rule, ..record });
            }
            Err(reason) if self.context.is_audit() => {
                cx.reports
                    .record(&self.context.record(Verdict::Audit, reason, what));
            }
            Err(reason) => {
                count(&cx.counters.hellos_refused);
                cx.reports
                    .record(&self.context.record(Verdict::Dropped, reason, what));
                return self.refuse_hello(&ACCESS_DENIED);
            }
        }
        self.begin_connect(cx);
        Ok(true)
    }

    /// Sends an alert in plain text, which is valid before the ServerHello, and ends the connection.
    fn refuse_hello(&mut self, alert: &[u8]) -> Step {
        if self.client.send(alert).is_err() {
            return Err(Stop::Reset);
        }
        self.client.input.clear();
        self.client.finish(Ending::Clean);
        self.phase = Phase::Linger { left: SPILL };
        Ok(true)
    }

    /// Waits for the first request of a client without TLS, whose Host names the server.
    fn host(&mut self, cx: &mut Cx<'_>) -> Step {
        // Kept for the next step: the name is taken from the first request.
        self.begin_connect(cx);
        Ok(true)
    }

    // ---- connect ----

    fn begin_connect(&mut self, cx: &mut Cx<'_>) {
        self.set_phase(Phase::Connect, cx.now);
    }

    fn connect(&mut self, cx: &mut Cx<'_>) -> Step {
        let Some(server) = &mut self.server else {
            match connect(&self.place, self.context.client, self.context.server) {
                Ok(mut socket) => {
                    let interest = Interest::READABLE | Interest::WRITABLE;
                    if cx
                        .registry
                        .register(&mut socket, token(self.key, Side::Server), interest)
                        .is_err()
                    {
                        return Err(Stop::Reset);
                    }
                    let mut server = End::new(socket);
                    server.set_connecting();
                    self.server = Some(server);
                }
                Err(error) => {
                    self.fail(Failure::of_connect(&error), cx);
                    return Ok(true);
                }
            }
            return Ok(false);
        };
        match server.is_connected() {
            Ok(false) => return Ok(false),
            Ok(true) => {}
            Err(error) => {
                self.server = None;
                self.fail(Failure::of_connect(&error), cx);
                return Ok(true);
            }
        }
        let Some(context) = self.set.originating_tls.clone() else {
            self.begin_client_tls(cx);
            return Ok(true);
        };
        let tls = cx
            .settings
            .secrets
            .trust(&context)
            .and_then(|trust| cx.contexts.client(&trust, &self.name, self.offered.clone()));
        match tls {
            Ok(tls) => {
                server.tls = Some(Box::new(tls.into()));
                self.set_phase(Phase::UpstreamTls, cx.now);
            }
            Err(problem) => {
                let words = format!("{}: {problem}", context.secret);
                self.fail(Failure::new(FailureKind::Secret, words), cx);
            }
        }
        Ok(true)
    }

    // ---- handshake with the server ----

    fn upstream_tls(&mut self, cx: &mut Cx<'_>) -> Step {
        let Some(server) = &mut self.server else {
            return Err(Stop::Reset);
        };
        let progress = match handshake(server, cx.scratch) {
            Ok(progress) => progress,
            Err(error) => {
                let failure = match error {
                    EndError::Io(error) => Failure::of_handshake_io(&error),
                    EndError::Tls(error) => Failure::of_tls(&error),
                };
                self.fail(failure, cx);
                return Ok(true);
            }
        };
        match progress {
            Progress::Done => {
                count(&cx.counters.upstream_handshakes);
                self.begin_client_tls(cx);
                Ok(true)
            }
            Progress::Closed => {
                self.fail(FailureKind::HandshakeClosed.into(), cx);
                Ok(true)
            }
            Progress::Wait => Ok(false),
        }
    }

    /// Notes that the server cannot be reached. The client learns of it from the answer to its first request.
    fn fail(&mut self, failure: Failure, cx: &mut Cx<'_>) {
        cx.counters.count_failure(failure.kind);
        self.drop_intercept(Reason::InterceptFailed, &failure.to_string(), cx);
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
        // Closing without a reset delivers the alert that TLS has sent to the server.
        self.server = None;
        self.failure = Some(failure);
        self.begin_client_tls(cx);
    }

    // ---- handshake with the client ----

    fn begin_client_tls(&mut self, cx: &mut Cx<'_>) {
        let Some(accepted) = self.accepted.take() else {
            self.begin_relay(cx);
            return;
        };
        self.set_phase(Phase::ClientTls, cx.now);
        let Some(context) = self.set.terminating_tls.clone() else {
            return;
        };
        let chosen = match &self.server {
            Some(server) if server.tls.is_some() => server
                .tls
                .as_ref()
                .and_then(|tls| tls.alpn_protocol())
                .map(<[u8]>::to_vec),
            // Without TLS to the server, and for the answer to a failure, HTTP/1.1 is the simplest.
            _ => self
                .offered
                .iter()
                .find(|protocol| *protocol == b"http/1.1")
                .or(self.offered.first())
                .cloned(),
        };
        let issue = cx.settings.interception_ca.as_deref() == Some(&*context.secret);
        let config = cx
            .settings
            .secrets
            .identity(&context)
            .and_then(|secret| cx.contexts.server(&secret, issue, &self.name, chosen.as_deref()));
        let error = match config {
            Ok(config) => match accepted.into_connection(config) {
                Ok(mut tls) => {
                    tls.set_buffer_limit(None);
                    self.client.tls = Some(Box::new(tls.into()));
                    return;
                }
                Err((error, mut alert)) => {
                    let mut bytes = Vec::new();
                    let _ = alert.write_all(&mut bytes);
                    let _ = self.client.send(&bytes);
                    format!("TLS handshake with the client: {error}")
                }
            },
            Err(problem) => {
                let _ = self.client.send(&INTERNAL_ERROR);
                format!("{}: {}: {problem}", FailureKind::Secret.text(), context.secret)
            }
        };
        count(&cx.counters.client_handshakes_failed);
        self.drop_intercept(Reason::InterceptFailed, &error, cx);
        self.client.input.clear();
        self.client.finish(Ending::Clean);
        self.close_server();
        self.phase = Phase::Linger { left: SPILL };
    }

    fn client_tls(&mut self, cx: &mut Cx<'_>) -> Step {
        let early = std::mem::take(&mut self.client.input);
        let result = if early.is_empty() {
            self.client.process_buffered()
        } else {
            self.client.feed(early.bytes())
        };
        let result = result.and_then(|()| handshake(&mut self.client, cx.scratch));
        match result {
            Ok(Progress::Done) => {
                count(&cx.counters.client_handshakes);
                self.begin_relay(cx);
                Ok(true)
            }
            Ok(Progress::Wait) => Ok(false),
            Ok(Progress::Closed) => {
                count(&cx.counters.client_handshakes_failed);
                self.drop_intercept(
                    Reason::InterceptFailed,
                    "the client closed the connection in the TLS handshake",
                    cx,
                );
                Err(Stop::Reset)
            }
            Err(error) => {
                let _ = self.client.flush();
                count(&cx.counters.client_handshakes_failed);
                let words = match error {
                    EndError::Tls(rustls::Error::AlertReceived(alert)) => {
                        format!("the client sent the alert {}", alert_name(alert))
                    }
                    EndError::Tls(error) => format!("TLS handshake with the client: {error}"),
                    EndError::Io(error) => format!("TLS handshake with the client: {error}"),
                };
                self.drop_intercept(Reason::InterceptFailed, &words, cx);
                self.close_server();
                Err(Stop::Close)
            }
        }
    }

    fn close_server(&mut self) {
        if let Some(server) = &mut self.server {
            server.finish(Ending::Clean);
            let _ = server.flush();
        }
    }

    // ---- relay ----

    fn begin_relay(&mut self, cx: &mut Cx<'_>) {
        let is_secure = self.set.terminating_tls.is_some() || self.set.originating_tls.is_some();
        if self.set.reads == Inspector::Http as u8 {
            self.protocol = Protocol::Http1(HttpSession::new(&self.context, is_secure));
        }
        self.set_phase(Phase::Relay, cx.now);
    }

    fn relay(&mut self, cx: &mut Cx<'_>) -> Step {
        let mut progress = false;
        progress |= self.receive(Side::Client, cx)?;
        progress |= self.receive(Side::Server, cx)?;
        progress |= self.inspect(cx)?;
        if let Phase::Linger { .. } = self.phase {
            return Ok(true);
        }
        let client = self.client.flush().map_err(|_| Stop::Reset)?;
        let server = match &mut self.server {
            Some(server) => server.flush().map_err(|_| Stop::Reset)?,
            None => true,
        };
        let is_ended =
            self.client.is_forwarded && self.server.as_ref().is_none_or(|server| server.is_forwarded);
        if client && server && is_ended {
            return Err(Stop::Close);
        }
        Ok(progress)
    }

    fn receive(&mut self, side: Side, cx: &mut Cx<'_>) -> Step {
        let (own, other) = match side {
            Side::Client => (Some(&mut self.client), self.server.as_mut()),
            Side::Server => (self.server.as_mut(), Some(&mut self.client)),
        };
        let Some(own) = own else {
            return Ok(false);
        };
        if !own.can_receive() || other.is_some_and(|other| other.is_blocked()) {
            return Ok(false);
        }
        let before = own.received;
        let result = own.receive(cx.scratch);
        let counter = match side {
            Side::Client => &cx.counters.bytes_from_clients,
            Side::Server => &cx.counters.bytes_from_servers,
        };
        counter.fetch_add(own.received - before, Relaxed);
        match result {
            Ok(progress) => Ok(progress),
            Err(error) => {
                // TLS has queued an alert for the peer.
                let _ = own.flush();
                if side == Side::Server {
                    let failure = match error {
                        EndError::Io(_) => FailureKind::ResponseReset.into(),
                        EndError::Tls(error) => Failure::of_tls(&error),
                    };
                    if self.fail_before_response(failure, cx) {
                        return Ok(true);
                    }
                }
                Err(Stop::Reset)
            }
        }
    }

    /// Answers the first request with 503 if the server has failed before the head of its response. Returns false if the
    /// client must see the failure as it is: a response has begun, or the server has closed an idle connection.
    fn fail_before_response(&mut self, failure: Failure, cx: &mut Cx<'_>) -> bool {
        let Protocol::Http1(session) = &self.protocol else {
            return false;
        };
        if self.responded || !session.awaits_response() || self.offloaded {
            return false;
        }
        let is_head = session.is_head();
        cx.counters.count_failure(failure.kind);
        self.drop_intercept(Reason::InterceptFailed, &failure.to_string(), cx);
        if let Some(server) = &self.server {
            server.reset();
        }
        self.server = None;
        let bytes = answer::unavailable(&failure, is_head);
        self.failure = Some(failure);
        self.respond(&bytes, cx).is_ok()
    }

    /// Sends an answer in the server's place, and ends both streams.
    fn respond(&mut self, bytes: &[u8], cx: &mut Cx<'_>) -> Result<(), EndError> {
        self.client.send(bytes)?;
        self.client.input.clear();
        self.client.finish(Ending::Clean);
        self.client.flush()?;
        self.close_server();
        self.set_phase(Phase::Linger { left: SPILL }, cx.now);
        Ok(())
    }

    /// Inspects both sides until neither has further bytes with a verdict.
    fn inspect(&mut self, cx: &mut Cx<'_>) -> Step {
        let mut progress = false;
        let mut again = true;
        while std::mem::take(&mut again) {
            for side in Side::BOTH {
                while matches!(self.phase, Phase::Relay) && self.inspect_once(side, cx)? {
                    again = true;
                    progress = true;
                }
            }
        }
        // A head that does not arrive as a whole must not keep memory for ever.
        let is_partial = self.client.bypass == 0 && !self.offloaded && !self.client.input.is_empty();
        if !matches!(self.protocol, Protocol::Raw) && is_partial {
            self.head_since.get_or_insert(cx.now);
        } else {
            self.head_since = None;
        }
        Ok(progress)
    }

    /// Makes one decision about the bytes of one side. Returns whether a further call can decide about more bytes.
    fn inspect_once(&mut self, side: Side, cx: &mut Cx<'_>) -> Step {
        if side == Side::Client {
            if let Some(answer) = self.answer.take() {
                // The response before the answer must be complete.
                if self
                    .server
                    .as_ref()
                    .is_some_and(|server| server.bypass > 0 && server.eof.is_none())
                {
                    self.answer = Some(answer);
                    return Ok(false);
                }
                return match self.respond(&answer, cx) {
                    Ok(()) => Ok(true),
                    Err(_) => Err(Stop::Reset),
                };
            }
            self.check_flow(cx)?;
        }
        let (own, other) = match side {
            Side::Client => (Some(&mut self.client), self.server.as_mut()),
            Side::Server => (self.server.as_mut(), Some(&mut self.client)),
        };
        let Some(own) = own else {
            return Ok(false);
        };
        if own.is_forwarded {
            return Ok(false);
        }
        if let Some(other) = other
            && other.is_blocked()
            && !other.flush().map_err(|_| Stop::Reset)?
        {
            return Ok(false);
        }
        let bytes = own.input.bytes();
        if bytes.is_empty() && own.eof.is_none() {
            return Ok(false);
        }
        let rest = own.bypass;
        let action = if self.offloaded || matches!(self.protocol, Protocol::Raw) {
            StreamAction::Forward(bytes.len())
        } else if rest > 0 && !bytes.is_empty() {
            StreamAction::Bypass(rest)
        } else if rest > 0 {
            StreamAction::Forward(0)
        } else {
            let Protocol::Http1(session) = &mut self.protocol else {
                return Ok(false);
            };
            let (counters, reports) = (cx.counters, cx.reports);
            let mut record = |record: &Record| {
                if let What::HttpRequest { .. } = record.what {
                    count(&counters.requests);
                    if record.verdict == Verdict::Dropped {
                        count(&counters.denied);
                    }
                }
                reports.record(record);
            };
            session.read(
                side,
                bytes,
                own.eof.is_some(),
                cx.now,
                &self.context.request,
                &cx.settings.rules,
                &cx.settings.http,
                cx.stream,
                &mut record,
            )
        };
        let available = bytes.len();
        match action {
            StreamAction::NeedMore | StreamAction::AwaitPeer => {
                if available >= INPUT && action == StreamAction::NeedMore {
                    self.drop_record(Reason::InspectLimit, Reason::InspectLimit.text(), cx);
                    return Err(Stop::Reset);
                }
                Ok(false)
            }
            StreamAction::Forward(0) if available == 0 => self.forward_end(side, cx),
            StreamAction::Forward(n) => {
                self.forward(side, n.min(available), cx)?;
                if side == Side::Client {
                    self.checked = false;
                }
                Ok(n > 0)
            }
            StreamAction::Bypass(n) => {
                let now = n.min(available as u64);
                own.bypass = n - now;
                self.forward(side, now as usize, cx)?;
                if side == Side::Client && n == now {
                    self.checked = false;
                }
                Ok(n > 0)
            }
            StreamAction::Offload => {
                self.offloaded = true;
                Ok(true)
            }
            StreamAction::Abort(_) => Err(Stop::Reset),
            StreamAction::Respond(_, bytes) => {
                self.answer = Some(bytes);
                Ok(true)
            }
        }
    }

    /// Looks the flow up when the first bytes of a request have arrived.
    fn check_flow(&mut self, cx: &Cx<'_>) -> Result<(), Stop> {
        let is_new = match &self.protocol {
            Protocol::Http1(session) => session.is_at_request() && self.client.bypass == 0,
            Protocol::Raw => false,
        };
        if is_new && !self.checked && !self.offloaded && !self.client.input.is_empty() {
            self.find(cx)?;
            self.checked = true;
        }
        Ok(())
    }

    /// Forwards allowed bytes. A request to a server that cannot be reached is answered instead.
    fn forward(&mut self, side: Side, n: usize, cx: &mut Cx<'_>) -> Result<(), Stop> {
        let (own, other) = match (side, &mut self.server) {
            (Side::Client, Some(server)) => (&mut self.client, server),
            (Side::Server, Some(server)) => (server, &mut self.client),
            (_, None) => {
                let failure = self.failure.clone();
                let is_head = match &self.protocol {
                    Protocol::Http1(session) => session.is_head(),
                    Protocol::Raw => false,
                };
                let Some(failure) = failure.filter(|_| !matches!(self.protocol, Protocol::Raw)) else {
                    return Err(Stop::Reset);
                };
                let bytes = answer::unavailable(&failure, is_head);
                return self.respond(&bytes, cx).map_err(|_| Stop::Reset);
            }
        };
        let bytes = own.input.bytes().get(..n).unwrap_or_default();
        if side == Side::Server && n > 0 {
            self.responded = true;
        }
        match other.send(bytes) {
            Ok(()) => {
                own.input.consume(n);
                Ok(())
            }
            Err(_) => Err(Stop::Reset),
        }
    }

    /// Forwards the end of a stream as it has arrived: with or without close_notify.
    fn forward_end(&mut self, side: Side, cx: &mut Cx<'_>) -> Step {
        if side == Side::Server {
            let failure = FailureKind::ResponseClosed.into();
            if self.fail_before_response(failure, cx) {
                return Ok(true);
            }
        }
        let (own, other) = match side {
            Side::Client => (Some(&mut self.client), self.server.as_mut()),
            Side::Server => (self.server.as_mut(), Some(&mut self.client)),
        };
        let (Some(own), Some(other)) = (own, other) else {
            // Without a server, the client has closed before its first request.
            return Err(Stop::Close);
        };
        let ending = own.eof.unwrap_or(Ending::Truncated);
        // A FIN without TLS would look like a clean end.
        if ending == Ending::Truncated && other.tls.is_none() {
            return Err(Stop::Reset);
        }
        other.finish(ending);
        own.is_forwarded = true;
        Ok(true)
    }

    fn linger(&mut self, cx: &mut Cx<'_>) -> Step {
        let written = self.client.flush().map_err(|_| Stop::Reset)?;
        if let Some(server) = &mut self.server
            && server.flush().is_ok_and(|done| done)
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
        let progress = self.client.receive(cx.scratch).map_err(|_| Stop::Reset)?;
        self.client.input.clear();
        let received = self.client.received - before;
        let Phase::Linger { left } = &mut self.phase else {
            return Ok(false);
        };
        *left = left.checked_sub(received).ok_or(Stop::Reset)?;
        Ok(progress)
    }

    // ---- records ----

    fn drop_record(&self, reason: Reason, detail: &'static str, cx: &Cx<'_>) {
        let what = What::Unreadable { detail };
        cx.reports
            .record(&self.context.record(Verdict::Dropped, reason, what));
    }

    fn drop_intercept(&self, reason: Reason, error: &str, cx: &Cx<'_>) {
        let name = match &self.name {
            PeerName::Dns(name) => text(name),
            PeerName::Address(_) => text(""),
        };
        let what = What::Intercept {
            name,
            error: text(error),
        };
        cx.reports
            .record(&self.context.record(Verdict::Dropped, reason, what));
    }
}

/// A fatal access_denied alert (RFC 8446, section 6.2) in plain text.
const ACCESS_DENIED: [u8; 7] = [21, 3, 3, 0, 2, 2, 49];
/// A fatal internal_error alert in plain text.
const INTERNAL_ERROR: [u8; 7] = [21, 3, 3, 0, 2, 2, 80];

enum Progress {
    Done,
    Wait,
    Closed,
}

/// Continues the TLS handshake of an end.
fn handshake(end: &mut End, scratch: &mut [u8]) -> Result<Progress, EndError> {
    loop {
        let is_done = end.tls.as_ref().is_none_or(|tls| !tls.is_handshaking());
        end.flush()?;
        if is_done {
            return Ok(Progress::Done);
        }
        if end.eof.is_some() {
            return Ok(Progress::Closed);
        }
        if !end.can_receive() {
            return Ok(Progress::Wait);
        }
        if let Err(error) = end.receive(scratch) {
            // TLS has queued an alert for the peer.
            let _ = end.flush();
            return Err(error);
        }
    }
}

/// Returns the token of one side of the connection with a key.
pub(crate) const fn token(key: usize, side: Side) -> Token {
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
