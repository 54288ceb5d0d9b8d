//! TLS: a connection goes on if its server name may be asked for. Once the server has answered so that no other hello
//! can follow, nothing is read any more.

use palisade_abi::{Reason, carry_flags};
use palisade_protocols::tls::{
    ClientHello, ClientReader, ClientStep, Refusal, ServerName, ServerReader, ServerStep,
};

use crate::{
    Millis, Rules, Sink, View,
    record::{Record, Text, Verdict, What},
    tcp::{Connections, Reader, Side, Step, TcpLimits, TcpStats},
};

/// What to do with a hello that carries an encrypted one. Its outer name is all that can be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Ech {
    /// Judged by its outer name.
    #[default]
    AllowOuter,
    /// Refused.
    Deny,
}

/// How TLS is judged, and how much may be held of it. Of one worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TlsLimits {
    /// Connections. Their deadline is that of an unfinished hello.
    pub tcp: TcpLimits,
    /// Encrypted hellos.
    pub ech: Ech,
}

impl Default for TlsLimits {
    fn default() -> Self {
        Self {
            tcp: TcpLimits {
                // A hello, and what comes until the server has answered it.
                bytes_per_direction: 256 << 10,
                bytes: 64 << 20,
                deadline: 10_000,
                ..TcpLimits::default()
            },
            ech: Ech::default(),
        }
    }
}

/// What has happened so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TlsStats {
    /// Connections.
    pub tcp: TcpStats,
    /// Hellos that were read.
    pub hellos: u64,
    /// Hellos whose name is not allowed.
    pub denied: u64,
    /// Hellos with an encrypted one that were refused for that.
    pub ech_denied: u64,
    /// Streams that are not what they should be, by [`Refusal`].
    pub malformed: [u64; Refusal::ALL.len()],
    /// Connections that would have been cut and go on because of audit mode.
    pub audited: u64,
}

impl Default for TlsStats {
    fn default() -> Self {
        Self {
            tcp: TcpStats::default(),
            hellos: 0,
            denied: 0,
            ech_denied: 0,
            malformed: [0; _],
            audited: 0,
        }
    }
}

/// What is kept of a connection.
#[derive(Default)]
struct Flow {
    client: ClientReader,
    server: ServerReader,
    /// Bytes of the client that wait and have been read.
    fed: usize,
    /// A hello has been let go.
    begun: bool,
    /// What a record of the client's packets says.
    record: Option<Record>,
}

pub(crate) struct Tls<F> {
    ech: Ech,
    connections: Connections<F, Flow>,
    stats: TlsStats,
}

/// Reads one connection for the time of a call.
struct Reading<'a> {
    flow: &'a mut Flow,
    rules: &'a Rules,
    stats: &'a mut TlsStats,
    ech: Ech,
    slot: &'a palisade_abi::CarrySlot,
}

impl<F> Tls<F> {
    pub(crate) fn new(limits: &TlsLimits) -> Self {
        Self {
            ech: limits.ech,
            connections: Connections::new(&limits.tcp),
            stats: TlsStats::default(),
        }
    }

    pub(crate) fn stats(&self) -> TlsStats {
        TlsStats {
            tcp: self.connections.stats(),
            ..self.stats
        }
    }

    pub(crate) fn packet<S: Sink<F>>(
        &mut self,
        now: Millis,
        view: &View<'_>,
        frame: F,
        rules: &Rules,
        sink: &mut S,
    ) {
        let Self {
            ech,
            connections,
            stats,
        } = self;
        let reader = |flow: &mut Flow| {
            if Side::of(view.slot) == Side::Client {
                let detail = Reason::AppDenied.text();
                flow.record = Some(Record::of(view, What::Unreadable { detail }));
            }
        };
        connections.packet(
            now,
            view,
            frame,
            Flow::default,
            |flow| {
                reader(flow);
                Reading {
                    flow,
                    rules,
                    stats,
                    ech: *ech,
                    slot: view.slot,
                }
            },
            sink,
        );
    }

    pub(crate) fn tick<S: Sink<F>>(&mut self, now: Millis, sink: &mut S) {
        self.connections.tick(now, sink);
    }

    pub(crate) fn deadline(&self) -> Option<Millis> {
        self.connections.deadline()
    }

    pub(crate) fn forget<S: Sink<F>>(&mut self, endpoint: Option<u16>, sink: &mut S) {
        self.connections.forget(endpoint, sink);
    }
}

impl<F> Reader<F> for Reading<'_> {
    fn read<S: Sink<F>>(&mut self, side: Side, bytes: &[u8], end: bool, sink: &mut S) -> Step {
        match side {
            Side::Client => self.client(bytes, end, sink),
            Side::Server => self.server(bytes, sink),
        }
    }
}

impl Reading<'_> {
    fn client<F, S: Sink<F>>(&mut self, bytes: &[u8], end: bool, sink: &mut S) -> Step {
        if bytes.is_empty() {
            return Step::Release(0);
        }
        let mut input = bytes.get(self.flow.fed..).unwrap_or_default();
        match self.flow.client.next(&mut input) {
            Ok(ClientStep::More) if end => {
                // The half-closed rest of a connection that needs no hello any more holds nobody up.
                self.refuse(Reason::AppMalformed, "the end within a hello or a record", sink)
            }
            Ok(ClientStep::More) => {
                self.flow.fed = bytes.len();
                Step::More
            }
            Ok(ClientStep::Other) => self.pass(bytes, input),
            Ok(ClientStep::Hello(hello)) => match self.judge(&hello, sink) {
                Ok(()) => {
                    self.flow.begun = true;
                    self.pass(bytes, input)
                }
                Err(step) => step,
            },
            Err(refusal) => {
                self.stats.malformed[refusal as usize] += 1;
                self.refuse(Reason::AppMalformed, refusal.text(), sink)
            }
        }
    }

    /// Lets go what is before the rest.
    fn pass(&mut self, bytes: &[u8], rest: &[u8]) -> Step {
        self.flow.fed = 0;
        Step::Release(bytes.len() - rest.len())
    }

    fn judge<F, S: Sink<F>>(&mut self, hello: &ClientHello, sink: &mut S) -> Result<(), Step> {
        self.stats.hellos += 1;
        let name = match &hello.server_name {
            ServerName::Name(name) => Text::of(name),
            ServerName::Address(address) => Text::from(address.to_string().as_bytes()),
            ServerName::Missing => Text::default(),
        };
        let what = What::TlsHello {
            name,
            version: hello.version,
            ech: hello.ech,
        };
        let Some(rules) = self.rules.tls(self.slot.ruleset) else {
            return Err(self.deny(Reason::UnknownRuleset, what, sink));
        };
        if hello.ech && self.ech == Ech::Deny {
            self.stats.ech_denied += 1;
            return Err(self.deny(Reason::AppDenied, what, sink));
        }
        let rule = match &hello.server_name {
            ServerName::Name(name) => rules.judge(name),
            ServerName::Missing | ServerName::Address(_) => rules.anyone(),
        };
        let Some(rule) = rule else {
            self.stats.denied += 1;
            return Err(self.deny(Reason::AppDenied, what, sink));
        };
        if let Some(record) = self.flow.record {
            sink.record(&Record { rule, what, ..record });
        }
        Ok(())
    }

    fn refuse<F, S: Sink<F>>(&mut self, reason: Reason, detail: &'static str, sink: &mut S) -> Step {
        self.deny(reason, What::Unreadable { detail }, sink)
    }

    /// Reports what is refused. Audit mode lets it go on; then nothing more needs reading.
    fn deny<F, S: Sink<F>>(&mut self, reason: Reason, what: What, sink: &mut S) -> Step {
        let audit = self.slot.flags & carry_flags::AUDIT != 0;
        if let Some(record) = self.flow.record {
            sink.record(&Record {
                verdict: if audit { Verdict::Audit } else { Verdict::Dropped },
                reason,
                rule: self.slot.rule,
                what,
                ..record
            });
        }
        if audit {
            self.stats.audited += 1;
            Step::Offload
        } else {
            Step::Cut(reason)
        }
    }

    fn server<F, S: Sink<F>>(&mut self, bytes: &[u8], sink: &mut S) -> Step {
        if bytes.is_empty() {
            return Step::Release(0);
        }
        // A server speaks second (RFC 8446, 2).
        if !self.flow.begun {
            return self.refuse(Reason::AppMalformed, Refusal::NotTls.text(), sink);
        }
        let mut input = bytes;
        match self.flow.server.next(&mut input) {
            Ok(ServerStep::Answered(_)) => Step::Offload,
            // What was read is gone: it is not shown again.
            Ok(ServerStep::More) => Step::Release(bytes.len()),
            Ok(ServerStep::Again | ServerStep::Refused) => Step::Release(bytes.len() - input.len()),
            Err(refusal) => {
                self.stats.malformed[refusal as usize] += 1;
                self.refuse(Reason::AppMalformed, refusal.text(), sink)
            }
        }
    }
}

#[cfg(test)]
mod tests;
