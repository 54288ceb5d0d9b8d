//! Opens one connection to a server as the proxy would for an intercepted flow, and describes each step in words.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use mio::{Events, Interest, Poll, Token};
use palisade_inspect::stream::{StreamContext, evaluate_hello};
use palisade_protocols::tls::{ClientHello, ServerName};

use crate::{
    chain::describe,
    end::{End, EndError, Handshake},
    failure::{Failure, FailureKind},
    listen::{Place, connect, enter},
    settings::{Options, Settings},
    tls::{Contexts, PeerName},
    view::TlsView,
};

/// A connection to check.
#[derive(Clone, Debug)]
pub struct CheckRequest {
    /// The endpoint's address and an unused port, the server, and the request of the policy.
    pub context: StreamContext,
    /// Server name that the client would send; `None` for a client that sends none.
    pub name: Option<String>,
    /// Application protocols that the client would offer.
    pub protocols: Vec<String>,
    /// Whether the connection is opened by the node itself, from an address of its own. If not, the programs must know
    /// the flow between the addresses of `context`.
    pub from_node: bool,
}

/// One step of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckStep {
    /// Whether the step succeeded.
    pub is_ok: bool,
    /// What happened.
    pub text: String,
}

impl CheckStep {
    fn ok(text: impl Into<String>) -> Self {
        Self {
            is_ok: true,
            text: text.into(),
        }
    }

    pub(crate) fn failed(text: impl Into<String>) -> Self {
        Self {
            is_ok: false,
            text: text.into(),
        }
    }
}

/// Checks a connection. The calling thread enters the namespace of `place`.
pub(crate) fn check(
    request: &CheckRequest,
    place: &Place,
    options: &Options,
    settings: &Settings,
    contexts: &Contexts,
) -> Vec<CheckStep> {
    let mut steps = Vec::new();
    if let Err(step) = run(request, place, options, settings, contexts, &mut steps) {
        steps.push(step);
    }
    steps
}

fn run(
    request: &CheckRequest,
    place: &Place,
    options: &Options,
    settings: &Settings,
    contexts: &Contexts,
    steps: &mut Vec<CheckStep>,
) -> Result<(), CheckStep> {
    let context = &request.context;
    let set = settings
        .rules
        .source(context.request.ruleset)
        .ok_or_else(|| CheckStep::failed("the policy has no such rule set"))?;
    let name = name_of(request, settings, steps)?;
    if let Some(shown) = &set.terminating_tls {
        let issue = settings.interception_ca.as_deref() == Some(&*shown.secret);
        let certificate = settings
            .secrets
            .identity(shown)
            .and_then(|secret| {
                let certificate = contexts.shown(&secret, issue, &name);
                certificate.map_err(|problem| format!("secret {}: {problem}", shown.secret))
            })
            .map_err(|problem| CheckStep::failed(format!("certificate for the client: {problem}")))?;
        let made = if issue { ", made for the name" } else { "" };
        let text = certificate.cert.first().map_or_else(String::new, describe);
        steps.push(CheckStep::ok(format!(
            "the client gets the certificate of secret {}{made}: {text}",
            shown.secret
        )));
    } else {
        steps.push(CheckStep::ok("the client speaks without TLS"));
    }
    let failed = |failure: Failure| CheckStep::failed(failure.to_string());
    let place = if request.from_node { &Place::Node } else { place };
    enter(place).map_err(|error| CheckStep::failed(format!("namespace of the proxy: {error}")))?;
    let started = Instant::now();
    let mut socket = connect(place, context.direction, context.client, context.server)
        .map_err(|error| failed(Failure::of_connect(&error)))?;
    let mut wait = Wait::new(&mut socket).map_err(|error| CheckStep::failed(error.to_string()))?;
    let mut end = End::new(socket);
    end.set_connecting();
    wait.until(options.connect);
    while !end
        .is_connected()
        .map_err(|error| failed(Failure::of_connect(&error)))?
    {
        if !wait.event(&mut end) {
            return Err(failed(FailureKind::ConnectTimeout.into()));
        }
    }
    let ms = |since: Instant| since.elapsed().as_millis();
    steps.push(CheckStep::ok(format!(
        "TCP connection from {} to {} after {} ms",
        end.local_address().unwrap_or(context.client),
        context.server,
        ms(started)
    )));
    let Some(trusted) = &set.originating_tls else {
        steps.push(CheckStep::ok("the server gets the requests without TLS"));
        return Ok(());
    };
    let seen = Arc::default();
    let protocols = request
        .protocols
        .iter()
        .map(|protocol| protocol.as_bytes().to_vec());
    let tls = settings
        .secrets
        .trust(trusted)
        .and_then(|trust| contexts.observed_client(&trust, &name, protocols.collect(), &seen))
        .map_err(|problem| failed(Failure::new(FailureKind::Secret, problem)))?;
    end.tls = Some(Box::new(tls.into()));
    let sent = match &name {
        PeerName::Dns(name) => format!("server name {name}"),
        PeerName::Address(_) => "no server name".to_owned(),
    };
    let offered = match request.protocols.is_empty() {
        true => "no application protocols".to_owned(),
        false => format!("application protocols {}", request.protocols.join(", ")),
    };
    steps.push(CheckStep::ok(format!(
        "the server gets a ClientHello with {sent} and {offered}"
    )));
    let result = shake(&mut end, &mut wait, options.handshake);
    show_certificates(&seen, &name, &trusted.secret, &result, steps);
    result.map_err(failed)?;
    if let Some(view) = end.tls.as_ref().and_then(|tls| TlsView::of(tls)) {
        let alpn = match &*view.alpn {
            "" => "no application protocol".to_owned(),
            alpn => format!("application protocol {alpn}"),
        };
        let text = format!(
            "{} with {}, {alpn}, after {} ms",
            view.version,
            view.cipher,
            ms(started)
        );
        steps.push(CheckStep::ok(text));
    }
    // A refusal of the client certificate follows the handshake in TLS 1.3.
    wait.until(AFTER);
    let mut scratch = vec![0; 4096];
    while end.eof.is_none() && wait.event(&mut end) {
        match end.receive(&mut scratch) {
            Ok(_) => {}
            Err(EndError::Tls(error)) => return Err(failed(Failure::of_tls(&error))),
            Err(EndError::Io(_)) => return Err(failed(FailureKind::ResponseReset.into())),
        }
    }
    end.finish(crate::end::Ending::Clean);
    let _ = end.flush();
    Ok(())
}

/// Time to wait for an alert after the handshake.
const AFTER: Duration = Duration::from_millis(200);

/// Evaluates the server name that the client would send. Returns the name that the server's certificate must have.
fn name_of(
    request: &CheckRequest,
    settings: &Settings,
    steps: &mut Vec<CheckStep>,
) -> Result<PeerName, CheckStep> {
    let server_name = match &request.name {
        None => ServerName::Missing,
        Some(name) => ServerName::of_host(name.as_bytes())
            .map_err(|_| CheckStep::failed(format!("\"{name}\" is not a valid server name")))?,
    };
    let name = match &server_name {
        ServerName::Name(name) => PeerName::Dns(name.to_string().into()),
        ServerName::Missing | ServerName::Address(_) => PeerName::Address(request.context.server.ip()),
    };
    if settings.refuse_nameless && matches!(name, PeerName::Address(_)) {
        return Err(CheckStep::failed("a client without a server name is refused"));
    }
    let hello = ClientHello {
        version: 0x0304,
        server_name,
        ech: false,
        early_data: false,
    };
    let names = settings.names.as_deref();
    match evaluate_hello(&hello, &request.context, &settings.rules, settings.ech, names) {
        Ok(rule) => steps.push(CheckStep::ok(format!(
            "the rules allow a ClientHello for {name} (rule {rule})"
        ))),
        Err(reason) => {
            let text = format!("the rules refuse a ClientHello for {name}: {}", reason.text());
            return Err(CheckStep::failed(text));
        }
    }
    Ok(name)
}

/// Runs the handshake with the server.
fn shake(end: &mut End, wait: &mut Wait, time: Duration) -> Result<(), Failure> {
    let mut scratch = vec![0; 16 << 10];
    wait.until(time);
    loop {
        match end.handshake(&mut scratch) {
            Ok(Handshake::Done) => return Ok(()),
            Ok(Handshake::Closed) => return Err(FailureKind::HandshakeClosed.into()),
            Ok(Handshake::Wait) if wait.event(end) => {}
            Ok(Handshake::Wait) => return Err(FailureKind::HandshakeTimeout.into()),
            Err(EndError::Io(error)) => return Err(Failure::of_handshake_io(&error)),
            Err(EndError::Tls(error)) => return Err(Failure::of_tls(&error)),
        }
    }
}

/// Shows the certificates that the server has sent, and the result of their check.
fn show_certificates(
    seen: &Mutex<Vec<rustls::pki_types::CertificateDer<'static>>>,
    name: &PeerName,
    secret: &str,
    result: &Result<(), Failure>,
    steps: &mut Vec<CheckStep>,
) {
    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    for (number, der) in seen.iter().enumerate() {
        let what = if number == 0 { "certificate" } else { "issuer" };
        steps.push(CheckStep::ok(format!(
            "{what} from the server: {}",
            describe(der)
        )));
    }
    if !seen.is_empty() && result.is_ok() {
        let text = format!("the certificate is valid for {name}, by the CAs of secret {secret}");
        steps.push(CheckStep::ok(text));
    }
}

/// Waits for events of one socket.
struct Wait {
    poll: Poll,
    events: Events,
    until: Instant,
}

impl Wait {
    fn new(socket: &mut mio::net::TcpStream) -> io::Result<Self> {
        let poll = Poll::new()?;
        poll.registry()
            .register(socket, Token(0), Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self {
            poll,
            events: Events::with_capacity(8),
            until: Instant::now(),
        })
    }

    /// Sets the time from now after which waiting ends.
    fn until(&mut self, time: Duration) {
        self.until = Instant::now() + time;
    }

    /// Waits for an event. Returns false if the time is over.
    fn event(&mut self, end: &mut End) -> bool {
        let left = self.until.saturating_duration_since(Instant::now());
        let polled = self.poll.poll(&mut self.events, Some(left));
        for event in &self.events {
            end.note(event);
        }
        !left.is_zero() && polled.is_ok()
    }
}
