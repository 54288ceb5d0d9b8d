//! The connection to the server, and the TLS handshakes with the server and then with the client.

use std::io;

use mio::Interest;
use palisade_abi::Reason;
use palisade_inspect::{Millis, Side, stream::StreamContext};

use super::{Connection, Cx, Phase, Retry, Step, Stop, token};
use crate::{
    end::{End, EndError, Handshake},
    failure::{Failure, FailureKind, alert_name, plain_alert},
    listen::{connect, enter},
    protocol::Protocol,
    stats::count,
};

/// The alert internal_error (RFC 8446, section 6.2).
const INTERNAL_ERROR: u8 = 80;

/// Time until the second attempt to open a connection whose port is still in use, ms. It is doubled for each further
/// attempt.
const FIRST_RETRY: Millis = 4;
/// Longest time between two attempts, ms.
const LAST_RETRY: Millis = 512;

impl Connection {
    /// Opens the connection to the server, and begins TLS once it is open.
    pub(super) fn connect(&mut self, cx: &mut Cx<'_>) -> Step {
        let Some(server) = &mut self.server else {
            return self.begin_connect(cx);
        };
        match server.is_connected() {
            Ok(false) => return Ok(false),
            Ok(true) => {}
            Err(error) => {
                self.fail(Failure::of_connect(&error), cx);
                return Ok(true);
            }
        }
        self.connect_time = cx.now - self.phase_since;
        let Some(context) = self.set.originating_tls.clone() else {
            cx.upstreams
                .note_success(&self.name, self.context.server, self.connect_time, None);
            self.begin_client_tls(cx);
            return Ok(true);
        };
        let tls = cx.settings.secrets.trust(&context).and_then(|trust| {
            let config = cx.contexts.client(&trust, &self.name, self.offered.clone());
            config.map_err(|problem| of_secret(&context.secret, &problem))
        });
        match tls {
            Ok(tls) => {
                server.tls = Some(Box::new(tls.into()));
                self.set_phase(Phase::UpstreamTls, cx.now);
            }
            Err(problem) => self.fail(Failure::new(FailureKind::Secret, problem), cx),
        }
        Ok(true)
    }

    /// Opens the socket to the server. If the client's address and port are still in use, another attempt follows: a
    /// client can use its port again as soon as its own connection is closed, but the proxy's earlier connection from
    /// that port is closed only after the server has closed it too.
    fn begin_connect(&mut self, cx: &mut Cx<'_>) -> Step {
        let Phase::Connect(Retry { at, wait }) = self.phase else {
            return Err(Stop::Reset);
        };
        if at > cx.now {
            return Ok(false);
        }
        // A socket belongs to the namespace in which its thread creates it. The thread stays there, because most
        // connections are of one direction.
        let direction = self.context.direction;
        if *cx.entered != Some(direction) {
            *cx.entered = None;
            enter(&self.place).map_err(|_| Stop::Reset)?;
            *cx.entered = Some(direction);
        }
        match connect(&self.place, direction, self.context.client, self.context.server) {
            Ok(mut socket) => {
                let interest = Interest::READABLE | Interest::WRITABLE;
                cx.registry
                    .register(&mut socket, token(self.key, Side::Server), interest)
                    .map_err(|_| Stop::Reset)?;
                let mut server = End::new(socket);
                server.set_connecting();
                self.server = Some(server);
                Ok(false)
            }
            Err(error) if is_in_use(&error) => {
                let wait = (wait * 2).clamp(FIRST_RETRY, LAST_RETRY);
                let at = cx.now + wait;
                self.phase = Phase::Connect(Retry { at, wait });
                Ok(false)
            }
            Err(error) => {
                self.fail(Failure::of_connect(&error), cx);
                Ok(true)
            }
        }
    }

    /// Returns the failure of a connection whose client uses a port that is still in use towards the server.
    pub(super) fn port_in_use(&self) -> Failure {
        let StreamContext { client, server, .. } = self.context;
        let words = format!("the earlier connection from {client} to {server} is not closed yet");
        Failure::new(FailureKind::PortInUse, words)
    }

    /// Continues the TLS handshake with the server.
    pub(super) fn upstream_tls(&mut self, cx: &mut Cx<'_>) -> Step {
        let server = self.server.as_mut().ok_or(Stop::Reset)?;
        let failure = match server.handshake(cx.bytes) {
            Ok(Handshake::Wait) => return Ok(false),
            Ok(Handshake::Done) => {
                count(&cx.counters.upstream_handshakes);
                let time = cx.now - self.phase_since;
                cx.upstreams
                    .note_success(&self.name, self.context.server, self.connect_time, Some(time));
                self.begin_client_tls(cx);
                return Ok(true);
            }
            Ok(Handshake::Closed) => FailureKind::HandshakeClosed.into(),
            Err(EndError::Io(error)) => Failure::of_handshake_io(&error),
            Err(EndError::Tls(error)) => Failure::of_tls(&error),
        };
        self.fail(failure, cx);
        Ok(true)
    }

    /// Handles an unreachable server. The client gets the failure in the response to its first request or, if no
    /// requests are inspected, as a TLS alert.
    pub(super) fn fail(&mut self, failure: Failure, cx: &mut Cx<'_>) {
        self.report_failure(&failure, cx);
        // Closing without a reset delivers the alert that TLS has sent to the server.
        self.server = None;
        let alert = failure.alert.unwrap_or(INTERNAL_ERROR);
        self.failure = Some(failure);
        if self.accepted.is_some() && !self.reads_http() {
            let _ = self.client.send(&plain_alert(alert));
            self.close_after_answer(cx.now);
            return;
        }
        self.begin_client_tls(cx);
    }

    /// Begins the TLS handshake with the client, with the application protocol that the server has chosen.
    fn begin_client_tls(&mut self, cx: &mut Cx<'_>) {
        let (Some(accepted), Some(context)) = (self.accepted.take(), self.set.terminating_tls.clone()) else {
            self.begin_relay(cx);
            return;
        };
        self.set_phase(Phase::ClientTls, cx.now);
        let chosen = match self.server.as_ref().and_then(|server| server.tls.as_ref()) {
            Some(tls) => tls.alpn_protocol().map(<[u8]>::to_vec),
            None => {
                let first = self.offered.iter().find(|protocol| *protocol == b"http/1.1");
                first.or(self.offered.first()).cloned()
            }
        };
        let issue = cx.settings.interception_ca.as_deref() == Some(&*context.secret);
        let config = cx.settings.secrets.identity(&context).and_then(|secret| {
            let config = cx.contexts.server(&secret, issue, &self.name, chosen.as_deref());
            config.map_err(|problem| of_secret(&context.secret, &problem))
        });
        let mut reason = Reason::InterceptFailed;
        let (error, alert) = match config {
            Ok(config) => match accepted.into_connection(config) {
                Ok(tls) => {
                    if let Err(error) = self.client.accept_tls(tls) {
                        self.client_failed(Reason::InterceptFailed, &words(&error), cx);
                        self.close_after_answer(cx.now);
                    }
                    return;
                }
                Err((error, mut alert)) => {
                    let mut bytes = Vec::new();
                    let _ = alert.write_all(&mut bytes);
                    (format!("TLS handshake with the client: {error}"), bytes)
                }
            },
            Err(problem) => {
                let failure = Failure::new(FailureKind::Secret, problem);
                cx.counters.count_failure(failure.kind);
                reason = failure.reason();
                (failure.to_string(), plain_alert(INTERNAL_ERROR).to_vec())
            }
        };
        self.client_failed(reason, &error, cx);
        let _ = self.client.send(&alert);
        self.close_after_answer(cx.now);
    }

    /// Continues the TLS handshake with the client.
    pub(super) fn client_tls(&mut self, cx: &mut Cx<'_>) -> Step {
        let words = match self.client.handshake(cx.bytes) {
            Ok(Handshake::Wait) => return Ok(false),
            Ok(Handshake::Done) => {
                count(&cx.counters.client_handshakes);
                self.begin_relay(cx);
                return Ok(true);
            }
            Ok(Handshake::Closed) => "the client closed the connection in the TLS handshake".to_owned(),
            Err(error) => words(&error),
        };
        self.client_failed(Reason::InterceptFailed, &words, cx);
        Err(Stop::Close)
    }

    /// Counts and records a failure of the TLS handshake with the client.
    fn client_failed(&self, reason: Reason, words: &str, cx: &Cx<'_>) {
        count(&cx.counters.client_handshakes_failed);
        self.drop_intercept(reason, words, cx);
    }

    fn begin_relay(&mut self, cx: &mut Cx<'_>) {
        let is_secure = self.set.terminating_tls.is_some() || self.set.originating_tls.is_some();
        let alpn = self.client.tls.as_ref().and_then(|tls| tls.alpn_protocol());
        self.protocol = match (self.reads_http(), alpn) {
            (false, _) => {
                self.stop_inspection();
                Protocol::Bytes
            }
            (true, Some(b"h2")) => Protocol::http2(&cx.settings, is_secure),
            (true, None) if self.client.tls.is_none() => Protocol::Unknown,
            (true, _) => Protocol::http1(&self.context, is_secure),
        };
        self.set_phase(Phase::Relay, cx.now);
    }
}

/// Returns whether another connection still has the same addresses and ports: `connect` reports EADDRNOTAVAIL then, and
/// `bind` EADDRINUSE.
fn is_in_use(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse
    )
}

/// Returns a failure of the TLS handshake with the client in words.
fn words(error: &EndError) -> String {
    match error {
        EndError::Tls(rustls::Error::AlertReceived(alert)) => {
            format!(
                "the client refused the TLS handshake with the alert {}",
                alert_name(*alert)
            )
        }
        EndError::Tls(error) => format!("TLS handshake with the client: {error}"),
        EndError::Io(error) => format!("TLS handshake with the client: {error}"),
    }
}

/// Returns the text about a problem with the content of a secret.
fn of_secret(secret: &str, problem: &str) -> String {
    format!("secret {secret}: {problem}")
}
