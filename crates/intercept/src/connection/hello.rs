//! The name of the server: from the client's ClientHello, or from the first request of a client without TLS.

use std::sync::Arc;

use palisade_abi::{Inspector, Reason};
use palisade_inspect::{
    record::{Record, Verdict},
    stream::{evaluate_hello, hello_record},
};
use palisade_protocols::{
    http1::{HeaderBuffer, Request},
    tls::{ClientHello, ServerName},
};
use rustls::server::Accepted;

use super::{Connection, Cx, HelloError, Phase, Retry, Step, Stop};
use crate::{failure::plain_alert, stats::count, tls::PeerName};

/// Maximum number of application protocols of a client that are offered to the server.
const PROTOCOLS: usize = 16;
/// The alert access_denied (RFC 8446, section 6.2).
const ACCESS_DENIED: u8 = 49;

impl Connection {
    /// Reads from the client. Returns whether bytes or the end of the stream have arrived.
    fn receive_from_client(&mut self, cx: &mut Cx<'_>) -> Step {
        if !self.client.can_receive() {
            return Ok(false);
        }
        self.client.receive(cx.bytes).map_err(|_| Stop::Reset)
    }

    /// Reads the ClientHello, and evaluates it once it is complete.
    pub(super) fn hello(&mut self, cx: &mut Cx<'_>) -> Step {
        let received = self.receive_from_client(cx)?;
        let Phase::Hello(reader) = &mut self.phase else {
            return Err(Stop::Reset);
        };
        match reader.read(&mut self.client.input) {
            Ok(Some((hello, accepted))) => self.evaluate(hello, accepted, cx),
            Ok(None) if self.client.eof.is_some() && !reader.has_hello() => Err(Stop::Close),
            Ok(None) => Ok(received),
            Err(HelloError::Malformed(detail)) => {
                count(&cx.counters.hellos_refused);
                self.drop_record(Reason::AppMalformed, detail, cx);
                Err(Stop::Reset)
            }
            Err(HelloError::Tls(error, alert)) => {
                count(&cx.counters.hellos_refused);
                self.drop_intercept(Reason::AppMalformed, &format!("ClientHello: {error}"), cx);
                self.refuse_hello(&alert, cx)
            }
            Err(HelloError::Full) => Err(Stop::Reset),
        }
    }

    /// Evaluates a complete ClientHello.
    fn evaluate(&mut self, hello: Box<ClientHello>, accepted: Accepted, cx: &mut Cx<'_>) -> Step {
        let Ok(name) = agreed_name(&hello, &accepted) else {
            count(&cx.counters.hellos_refused);
            self.drop_record(Reason::AppMalformed, "ambiguous server name", cx);
            return Err(Stop::Reset);
        };
        if let Some(name) = name {
            self.name = PeerName::Dns(name.into());
        }
        let any = self.set.reads == Inspector::Tls as u8;
        self.offered = accepted
            .client_hello()
            .alpn()
            .into_iter()
            .flatten()
            .filter(|protocol| any || matches!(*protocol, b"h2" | b"http/1.1"))
            .map(<[u8]>::to_vec)
            .take(PROTOCOLS)
            .collect();
        self.accepted = Some(Box::new(accepted));
        let settings = Arc::clone(&cx.settings);
        let verdict = if settings.refuse_nameless && matches!(self.name, PeerName::Address(_)) {
            Err(Reason::AppDenied)
        } else {
            evaluate_hello(
                &hello,
                &self.context,
                &settings.rules,
                settings.ech,
                settings.names.as_deref(),
            )
        };
        let what = hello_record(&hello);
        self.hello = Some(hello);
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
                return self.refuse_hello(&plain_alert(ACCESS_DENIED), cx);
            }
        }
        self.set_phase(Phase::Connect(Retry::default()), cx.now);
        Ok(true)
    }

    /// Sends an alert in plain text, which is valid before the ServerHello, and ends the connection.
    pub(super) fn refuse_hello(&mut self, alert: &[u8], cx: &Cx<'_>) -> Step {
        self.client.send(alert).map_err(|_| Stop::Reset)?;
        self.close_after_answer(cx.now);
        Ok(true)
    }

    /// Returns the name of the server for a client without TLS: that of a request's authority, else the address.
    pub(super) fn name_of(&self, authority: &str) -> PeerName {
        host_name(authority).unwrap_or(PeerName::Address(self.context.server.ip()))
    }

    /// Waits for the first request of a client without TLS: its Host is the name of the server. If a well-formed
    /// request has no host name, the server's certificate is checked against the server's address.
    pub(super) fn host(&mut self, cx: &mut Cx<'_>) -> Step {
        let received = self.receive_from_client(cx)?;
        let Phase::Host(head) = &mut self.phase else {
            return Err(Stop::Reset);
        };
        let bytes = self.client.input.bytes();
        match head.find(bytes, &cx.settings.http.head) {
            Ok(None) if self.client.eof.is_some() => return Err(Stop::Close),
            Ok(None) => return Ok(received),
            Ok(Some(length)) => {
                let head = bytes.get(..length).unwrap_or_default();
                if let Ok(request) = Request::parse(head, &mut HeaderBuffer::new()) {
                    self.name = self.name_of(request.host);
                }
            }
            // The inspector refuses the stream before any byte is forwarded.
            Err(_) => {}
        }
        self.set_phase(Phase::Connect(Retry::default()), cx.now);
        Ok(true)
    }
}

/// The parser of the rules and the TLS library read different server names.
pub(crate) struct AmbiguousName;

/// Returns the server name of a hello, which must be the one that the TLS library uses.
pub(crate) fn agreed_name(hello: &ClientHello, accepted: &Accepted) -> Result<Option<String>, AmbiguousName> {
    let name = match &hello.server_name {
        ServerName::Name(name) => Some(name.to_string()),
        ServerName::Missing | ServerName::Address(_) => None,
    };
    let tls_name = accepted.client_hello().server_name().map(|name| {
        let name = name.strip_suffix('.').unwrap_or(name);
        name.to_ascii_lowercase()
    });
    if name == tls_name {
        Ok(name)
    } else {
        Err(AmbiguousName)
    }
}

/// Returns the name in the authority of a request.
fn host_name(authority: &str) -> Option<PeerName> {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?.0,
        None => authority.split_once(':').map_or(authority, |(host, _)| host),
    };
    match ServerName::of_host(host.as_bytes()).ok()? {
        ServerName::Name(name) => Some(PeerName::Dns(name.to_string().into())),
        ServerName::Address(address) => Some(PeerName::Address(address)),
        ServerName::Missing => None,
    }
}
