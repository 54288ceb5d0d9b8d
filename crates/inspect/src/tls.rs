//! TLS: a connection is forwarded if a rule allows its server name. It is offloaded once the response of the server
//! rules out a second ClientHello (RFC 8446, 4.1.4).

mod handover;

use std::sync::Arc;

use palisade_abi::{PuntRequest, Reason, punt_flags};
use palisade_fqdn::SniAddressIndex;
use palisade_protocols::tls::{
    ClientHello, ClientReader, ClientStep, ParseError, ServerName, ServerReader, ServerStep,
};

use crate::{
    Millis, PacketView, Rules, Sink,
    context::Cx,
    handover::{Entries, Kind},
    record::{About, Record, Text, Verdict, What},
    rules::TlsRules,
    tcp::{
        Action, Connections, Offloadable, Side, StreamInspector, TcpLimits, TcpStats, quote::QuotedSegment,
    },
};

/// Handling of a ClientHello that carries an encrypted ClientHello (ECH). Only the server name of the outer hello can
/// be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Ech {
    /// The server name of the outer hello decides.
    #[default]
    AllowOuter,
    /// The connection is aborted.
    Deny,
}

/// Limits and options of TLS inspection, per worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TlsLimits {
    /// Limits of TLS connections. Their `deadline` applies to an incomplete hello.
    pub tcp: TcpLimits,
    /// Handling of encrypted hellos.
    pub ech: Ech,
}

impl Default for TlsLimits {
    fn default() -> Self {
        Self {
            tcp: TcpLimits {
                // Room for a hello, and for early data of the client until the server has answered.
                bytes_per_direction: 256 << 10,
                bytes: 64 << 20,
                deadline: 10_000,
                ..TcpLimits::default()
            },
            ech: Ech::default(),
        }
    }
}

/// Counters of TLS inspection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TlsStats {
    /// Counters of TLS connections.
    pub tcp: TcpStats,
    /// Well-formed ClientHellos.
    pub hellos: u64,
    /// Hellos that no rule allows, without those in `ech_denied` and `sni_mismatches`.
    pub denied: u64,
    /// Hellos that were denied because they carry an encrypted ClientHello.
    pub ech_denied: u64,
    /// Hellos with an allowed name, to an address that the endpoint has not learned by that name.
    pub sni_mismatches: u64,
    /// Malformed streams, by [`ParseError`].
    pub malformed: [u64; ParseError::ALL.len()],
    /// Connections that were forwarded only because of audit mode.
    pub audited: u64,
}

impl Default for TlsStats {
    fn default() -> Self {
        Self {
            tcp: TcpStats::default(),
            hellos: 0,
            denied: 0,
            ech_denied: 0,
            sni_mismatches: 0,
            malformed: [0; _],
            audited: 0,
        }
    }
}

/// State of a connection.
#[derive(Default)]
struct Flow {
    client: ClientReader,
    server: ServerReader,
    /// Of the client's bytes that have no verdict yet, the number that the parser has read.
    fed: usize,
    /// Whether a hello has been forwarded.
    begun: bool,
    /// Record fields of the client's packets.
    about: Option<About>,
    /// The last hello.
    evaluated: Option<Evaluated>,
}

/// A ClientHello, and the rule set and mode with which it was evaluated.
struct Evaluated {
    ruleset: u32,
    audit: bool,
    hello: Box<ClientHello>,
    /// Result of [`TlsStream::is_known`] for the hello.
    known: bool,
}

impl Offloadable for Flow {
    /// `None` if audit mode has offloaded the connection before a hello was inspected.
    type OffloadVerdict = Option<Evaluated>;
    fn remember(&mut self) -> Self::OffloadVerdict {
        self.evaluated.take()
    }
}

pub(crate) struct Tls<F> {
    ech: Ech,
    names: Option<Arc<SniAddressIndex>>,
    connections: Connections<F, Flow>,
    stats: TlsStats,
}

/// Inspector of one connection for one call.
struct TlsStream<'a> {
    flow: &'a mut Flow,
    names: Option<&'a SniAddressIndex>,
    stats: &'a mut TlsStats,
    ech: Ech,
    slot: &'a PuntRequest,
}

impl<F> Tls<F> {
    pub(crate) fn new(limits: &TlsLimits) -> Self {
        Self {
            ech: limits.ech,
            names: None,
            connections: Connections::new(&limits.tcp),
            stats: TlsStats::default(),
        }
    }

    pub(crate) fn verify(&mut self, names: Arc<SniAddressIndex>) {
        self.names = Some(names);
    }

    pub(crate) fn stats(&self) -> TlsStats {
        TlsStats {
            tcp: self.connections.stats(),
            ..self.stats
        }
    }

    pub(crate) fn packet<S: Sink<F>>(&mut self, view: &PacketView<'_>, frame: F, cx: &mut Cx<'_, F, S>) {
        let Self {
            ech,
            names,
            connections,
            stats,
        } = self;
        let (ech, names) = (*ech, names.as_deref());
        connections.packet(
            view,
            frame,
            Flow::default,
            |flow| TlsStream::new(flow, view, names, ech, stats),
            |evaluated, cx| match evaluated {
                Some(evaluated) => recall(evaluated, view, ech, cx),
                // Audit mode has offloaded the connection before a hello was inspected.
                None if is_audit(view.slot) => Ok(()),
                None => Err(Reason::TcpMidstream),
            },
            cx,
        );
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

    /// Writes the connections that can be handed over.
    pub(crate) fn hand_over<S: Sink<F>>(&mut self, into: &mut Entries, cx: &mut Cx<'_, F, S>) {
        self.connections.hand_over(Kind::TLS, into, cx);
    }

    /// Takes a connection over. Returns whether it was taken over.
    pub(crate) fn take_over(&mut self, bytes: &[u8], now: Millis) -> bool {
        self.connections.take_over(bytes, now, |_| {})
    }

    /// Takes an offloaded connection over. Returns whether the bytes are one.
    pub(crate) fn take_over_offloaded(&mut self, bytes: &[u8]) -> bool {
        self.connections.take_over_offloaded(bytes)
    }

    pub(crate) fn tick<S: Sink<F>>(&mut self, cx: &mut Cx<'_, F, S>) {
        self.connections.tick(cx);
    }

    pub(crate) fn deadline(&self) -> Option<Millis> {
        self.connections.deadline()
    }

    pub(crate) fn forget<S: Sink<F>>(&mut self, endpoint: Option<u16>, cx: &mut Cx<'_, F, S>) {
        self.connections.forget(endpoint, cx);
    }
}

fn is_audit(slot: &PuntRequest) -> bool {
    slot.flags & punt_flags::AUDIT != 0
}

/// Returns the rule that allows a hello, or the reason of its denial. `known`: whether the endpoint has learned the
/// destination address by the server name.
pub(crate) fn evaluate(
    hello: &ClientHello,
    rules: &Rules,
    ruleset: u32,
    ech: Ech,
    known: bool,
) -> Result<u32, Reason> {
    let rules = rules.tls(ruleset).ok_or(Reason::UnknownRuleset)?;
    if hello.ech && ech == Ech::Deny {
        return Err(Reason::AppDenied);
    }
    evaluate_name(&hello.server_name, rules, known)
}

/// Returns the rule that allows a hello with this name, or the reason of its denial.
pub(crate) fn evaluate_name(name: &ServerName, rules: &TlsRules, known: bool) -> Result<u32, Reason> {
    match name {
        // A rule that allows every server name does not depend on the name, so a false name gains nothing.
        ServerName::Name(name) if !known && rules.evaluate(name).is_some() => {
            rules.allow_all().ok_or(Reason::SniAddress)
        }
        ServerName::Name(name) => rules.evaluate(name).ok_or(Reason::AppDenied),
        ServerName::Missing | ServerName::Address(_) => rules.allow_all().ok_or(Reason::AppDenied),
    }
}

/// Evaluates the hello of an offloaded connection with the rule set of a later packet.
fn recall<F, S: Sink<F>>(
    evaluated: &mut Evaluated,
    view: &PacketView<'_>,
    ech: Ech,
    cx: &mut Cx<'_, F, S>,
) -> Result<(), Reason> {
    let audit = is_audit(view.slot);
    if (evaluated.ruleset, evaluated.audit) == (view.slot.ruleset, audit) {
        return Ok(());
    }
    (evaluated.ruleset, evaluated.audit) = (view.slot.ruleset, audit);
    let Err(reason) = evaluate(
        &evaluated.hello,
        cx.rules,
        view.slot.ruleset,
        ech,
        evaluated.known,
    ) else {
        return Ok(());
    };
    let about = About::of(view);
    cx.sink.record(&Record {
        verdict: if audit { Verdict::Audit } else { Verdict::Dropped },
        reason,
        ..Record::about(
            &if Side::of(view.slot) == Side::Client {
                about
            } else {
                about.turned()
            },
            what(&evaluated.hello),
        )
    });
    if audit { Ok(()) } else { Err(reason) }
}

/// Returns the content of the record of a hello.
pub(crate) fn what(hello: &ClientHello) -> What {
    What::TlsHello {
        name: match &hello.server_name {
            ServerName::Name(name) => Text::of(name),
            ServerName::Address(address) => Text::from(address.to_string().as_bytes()),
            ServerName::Missing => Text::default(),
        },
        version: hello.version,
        ech: hello.ech,
    }
}

impl<F> StreamInspector<F> for TlsStream<'_> {
    fn read<S: Sink<F>>(&mut self, side: Side, bytes: &[u8], end: bool, cx: &mut Cx<'_, F, S>) -> Action {
        match side {
            Side::Client => self.client(bytes, end, cx),
            Side::Server => self.server(bytes, cx),
        }
    }
}

impl<'a> TlsStream<'a> {
    fn new(
        flow: &'a mut Flow,
        view: &PacketView<'a>,
        names: Option<&'a SniAddressIndex>,
        ech: Ech,
        stats: &'a mut TlsStats,
    ) -> Self {
        if Side::of(view.slot) == Side::Client {
            flow.about = Some(About::of(view));
        }
        Self {
            flow,
            names,
            stats,
            ech,
            slot: view.slot,
        }
    }

    fn client<F, S: Sink<F>>(&mut self, bytes: &[u8], end: bool, cx: &mut Cx<'_, F, S>) -> Action {
        if bytes.is_empty() {
            return Action::Forward(0);
        }
        let mut input = bytes.get(self.flow.fed..).unwrap_or_default();
        match self.flow.client.next(&mut input) {
            Ok(ClientStep::More) if end => {
                // The client has sent a FIN before its hello is complete.
                self.refuse(Reason::AppMalformed, "stream ends within a hello or a record", cx)
            }
            Ok(ClientStep::More) => {
                self.flow.fed = bytes.len();
                Action::NeedMore
            }
            Ok(ClientStep::Other) => self.pass(bytes, input),
            Ok(ClientStep::Hello(hello)) => match self.evaluate_hello(hello, cx) {
                Ok(()) => {
                    self.flow.begun = true;
                    self.pass(bytes, input)
                }
                Err(step) => step,
            },
            Err(refusal) => {
                self.count_malformed(refusal);
                self.refuse(Reason::AppMalformed, refusal.text(), cx)
            }
        }
    }

    /// Forwards the bytes before `rest`.
    fn pass(&mut self, bytes: &[u8], rest: &[u8]) -> Action {
        self.flow.fed = 0;
        Action::Forward(bytes.len() - rest.len())
    }

    fn evaluate_hello<F, S: Sink<F>>(
        &mut self,
        hello: Box<ClientHello>,
        cx: &mut Cx<'_, F, S>,
    ) -> Result<(), Action> {
        self.stats.hellos += 1;
        let what = what(&hello);
        let known = self.is_known(&hello);
        let verdict = evaluate(&hello, cx.rules, self.slot.ruleset, self.ech, known);
        if verdict == Err(Reason::SniAddress) {
            self.stats.sni_mismatches += 1;
        }
        if verdict == Err(Reason::AppDenied) {
            if hello.ech && self.ech == Ech::Deny {
                self.stats.ech_denied += 1;
            } else {
                self.stats.denied += 1;
            }
        }
        self.flow.evaluated = Some(Evaluated {
            ruleset: self.slot.ruleset,
            audit: is_audit(self.slot),
            hello,
            known,
        });
        match (verdict, &self.flow.about) {
            (Ok(rule), Some(about)) => {
                cx.sink.record(&Record {
                    rule,
                    ..Record::about(about, what)
                });
                Ok(())
            }
            (Ok(_), None) => Ok(()),
            (Err(reason), _) => Err(self.deny(reason, what, cx)),
        }
    }

    /// Returns whether the endpoint has learned the address of the server by the server name. Also true if that is not
    /// required: if names are not verified, the hello has no name, or the endpoint is the server.
    fn is_known(&self, hello: &ClientHello) -> bool {
        let (Some(names), ServerName::Name(name)) = (self.names, &hello.server_name) else {
            return true;
        };
        let Some(about) = &self.flow.about else {
            return false;
        };
        about
            .reaches()
            .is_none_or(|(endpoint, address)| names.has(endpoint, address, name))
    }

    fn refuse<F, S: Sink<F>>(
        &mut self,
        reason: Reason,
        detail: &'static str,
        cx: &mut Cx<'_, F, S>,
    ) -> Action {
        self.deny(reason, What::Unreadable { detail }, cx)
    }

    /// Records the denial of a connection and aborts the connection. Audit mode offloads the connection instead.
    fn deny<F, S: Sink<F>>(&mut self, reason: Reason, what: What, cx: &mut Cx<'_, F, S>) -> Action {
        let audit = is_audit(self.slot);
        if let Some(about) = &self.flow.about {
            cx.sink.record(&Record {
                verdict: if audit { Verdict::Audit } else { Verdict::Dropped },
                reason,
                ..Record::about(about, what)
            });
        }
        if audit {
            self.stats.audited += 1;
            Action::Offload
        } else {
            Action::Abort(reason)
        }
    }

    fn count_malformed(&mut self, error: ParseError) {
        if let Some(count) = self.stats.malformed.get_mut(error as usize) {
            *count += 1;
        }
    }

    fn server<F, S: Sink<F>>(&mut self, bytes: &[u8], cx: &mut Cx<'_, F, S>) -> Action {
        if bytes.is_empty() {
            return Action::Forward(0);
        }
        // The client sends first (RFC 8446, 2).
        if !self.flow.begun {
            return self.refuse(Reason::AppMalformed, ParseError::NotTls.text(), cx);
        }
        let mut input = bytes;
        match self.flow.server.next(&mut input) {
            Ok(ServerStep::Answered(_)) => Action::Offload,
            // The parser keeps its state, so the inspector does not need these bytes again.
            Ok(ServerStep::More) => Action::Forward(bytes.len()),
            Ok(ServerStep::Again | ServerStep::Refused) => Action::Forward(bytes.len() - input.len()),
            Err(refusal) => {
                self.count_malformed(refusal);
                self.refuse(Reason::AppMalformed, refusal.text(), cx)
            }
        }
    }
}

#[cfg(test)]
mod tests;
