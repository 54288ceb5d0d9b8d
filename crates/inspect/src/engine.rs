//! Entry point of the crate: one [`Engine`] for each worker.
//!
//! [`Engine::packet`] dispatches a packet by form, inspector and protocol: fragments to `fragments` first, DNS
//! datagrams to `dns`, TCP to the connection tables of `dns::stream`, `http`, `tls` and `kafka`.

use std::sync::Arc;

use palisade_abi::{Inspector, Reason, protocol, punt_flags};
use palisade_fqdn::SniAddressIndex;
use palisade_packet::{Packet, flags};

use crate::{
    CommitResult, DnsLimits, DnsStats, FragmentLimits, FragmentStats, HttpLimits, HttpStats, KafkaLimits,
    KafkaStats, Millis, PacketView, Rules, Sink, TlsLimits, TlsStats, TopicIds,
    context::Cx,
    dns::{Dns, stream::Streams},
    fragments::Reassembler,
    frames::{Frames, Spare},
    handover::{self, Account, Entries, HandedOver, Kind},
    http::Http,
    kafka::Kafka,
    record::{Record, Verdict, What},
    tcp::quote::QuotedSegment,
    tls::Tls,
};

const DNS: u8 = Inspector::Dns as u8;
const HTTP: u8 = Inspector::Http as u8;
const TLS: u8 = Inspector::Tls as u8;
const KAFKA: u8 = Inspector::Kafka as u8;
const TERMINATE: u8 = Inspector::TlsTerminate as u8;

/// Limits of an engine. There is one engine for each worker.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// Limits of DNS inspection.
    pub dns: DnsLimits,
    /// Limits of HTTP inspection.
    pub http: HttpLimits,
    /// Limits of TLS inspection.
    pub tls: TlsLimits,
    /// Limits of Kafka inspection.
    pub kafka: KafkaLimits,
    /// Limits of fragment reassembly.
    pub fragments: FragmentLimits,
}

/// Counters of an engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Counters of DNS inspection.
    pub dns: DnsStats,
    /// Counters of HTTP inspection.
    pub http: HttpStats,
    /// Counters of TLS inspection.
    pub tls: TlsStats,
    /// Counters of Kafka inspection.
    pub kafka: KafkaStats,
    /// Counters of fragment reassembly.
    pub fragments: FragmentStats,
    /// Packets for which there is no inspector.
    pub unsupported: u64,
}

/// Form of a packet, by which it is dispatched.
#[derive(Clone, Copy)]
enum Form {
    Whole,
    Fragment,
    IcmpError,
}

impl Form {
    fn of(packet: &Packet) -> Self {
        if packet.is(flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER) {
            Self::Fragment
        } else if packet.is(flags::ICMP_ERROR) {
            Self::IcmpError
        } else {
            Self::Whole
        }
    }
}

/// Inspects the packets of one worker.
pub struct Engine<F> {
    rules: Arc<Rules>,
    spare: Spare<F>,
    inspectors: InspectorSet<F>,
}

/// The inspectors of an engine, separate from the fields that a [`Cx`] borrows.
struct InspectorSet<F> {
    dns: Dns<F>,
    streams: Streams<F>,
    http: Http<F>,
    tls: Tls<F>,
    kafka: Kafka<F>,
    fragments: Reassembler<F>,
    unsupported: u64,
}

impl<F> Engine<F> {
    /// Returns an engine without rules.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        Self {
            rules: Arc::default(),
            spare: Spare::new(),
            inspectors: InspectorSet {
                dns: Dns::new(&limits.dns),
                streams: Streams::new(&limits.dns.tcp),
                http: Http::new(&limits.http),
                tls: Tls::new(&limits.tls),
                kafka: Kafka::new(&limits.kafka),
                fragments: Reassembler::new(&limits.fragments),
                unsupported: 0,
            },
        }
    }

    /// Replaces the rules. Must be called before the first packet whose punt request names a new rule set.
    pub fn set_rules(&mut self, rules: Arc<Rules>) {
        self.rules = rules;
    }

    /// Requires from now on that an endpoint that opens a TLS connection has learned the destination address of the
    /// connection by the server name in its ClientHello.
    pub fn verify_server_names(&mut self, known: Arc<SniAddressIndex>) {
        self.inspectors.tls.verify(known);
    }

    /// Uses the names of topic ids that all workers share. Without this call the engine has names of its own.
    pub fn share_topic_ids(&mut self, topics: Arc<TopicIds>) {
        self.inspectors.kafka.share(topics);
    }

    /// Returns whether a rule set is known.
    #[must_use]
    pub fn knows(&self, ruleset: u32) -> bool {
        self.rules.knows(ruleset)
    }

    /// Returns the context of a call, and the inspectors.
    fn parts<'a, S>(&'a mut self, now: Millis, sink: &'a mut S) -> (Cx<'a, F, S>, &'a mut InspectorSet<F>) {
        let cx = Cx {
            now,
            rules: &self.rules,
            spare: &mut self.spare,
            sink,
        };
        (cx, &mut self.inspectors)
    }

    /// Inspects a packet for one punt request. The sink gets the frame's handle back in this call or in a later one.
    pub fn packet(&mut self, now: Millis, view: &PacketView<'_>, frame: F, sink: &mut impl Sink<F>) {
        let (mut cx, inspectors) = self.parts(now, sink);
        inspectors.packet(view, frame, &mut cx);
    }

    /// Handles the result of a commit request.
    pub fn committed(&mut self, now: Millis, result: CommitResult, sink: &mut impl Sink<F>) {
        let (mut cx, inspectors) = self.parts(now, sink);
        inspectors.dns.committed(result, &mut cx);
        inspectors.streams.resolve(&mut inspectors.dns, &mut cx);
    }

    /// Handles the timeouts that are due. Must be called at [`Engine::deadline`], and may be called at any time.
    pub fn tick(&mut self, now: Millis, sink: &mut impl Sink<F>) {
        let (mut cx, inspectors) = self.parts(now, sink);
        let cx = &mut cx;
        inspectors.dns.tick(cx);
        inspectors.streams.tick(&mut inspectors.dns, cx);
        inspectors.http.tick(cx);
        inspectors.tls.tick(cx);
        inspectors.kafka.tick(cx);
        inspectors.fragments.tick(cx);
    }

    /// Sends what was put off until no packet waits in the worker. Must be called when no packet is left to inspect.
    ///
    /// Only HTTP and Kafka have messages with an offload window.
    pub fn settle(&mut self, now: Millis, sink: &mut impl Sink<F>) {
        let (mut cx, inspectors) = self.parts(now, sink);
        inspectors.http.settle(&mut cx);
        inspectors.kafka.settle(&mut cx);
    }

    /// Returns the time of the next timeout, ms.
    #[must_use]
    pub fn deadline(&self) -> Option<Millis> {
        let inspectors = &self.inspectors;
        [
            inspectors.dns.deadline(),
            inspectors.streams.deadline(),
            inspectors.http.deadline(),
            inspectors.tls.deadline(),
            inspectors.kafka.deadline(),
            inspectors.fragments.deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Drops the held packets of an endpoint that was removed, and removes its connections and its open DNS questions.
    pub fn forget_endpoint(&mut self, endpoint: u16, sink: &mut impl Sink<F>) {
        self.forget(Some(endpoint), sink);
    }

    /// Drops all held packets, because the worker ends.
    pub fn drain(&mut self, sink: &mut impl Sink<F>) {
        self.forget(None, sink);
    }

    /// Writes what a planned restart hands over, and drops all held packets, whose senders repeat them. The engine must
    /// get no packet afterwards.
    pub fn hand_over(&mut self, sink: &mut impl Sink<F>) -> HandedOver {
        let mut into = Entries::default();
        // No timer starts here, so the time does not matter.
        let (mut cx, inspectors) = self.parts(0, sink);
        let cx = &mut cx;
        inspectors.http.hand_over(&mut into, cx);
        inspectors.kafka.hand_over(&mut into, cx);
        inspectors.tls.hand_over(&mut into, cx);
        inspectors.streams.hand_over(&mut into, cx);
        inspectors.dns.hand_over(&mut into);
        self.drain(sink);
        into.finish()
    }

    /// Takes over what an engine has handed over. Must be called before the first packet, and only in the same boot and
    /// with the same maps. `now`: time of the call, ms, on the clock of that engine. Returns how many connections were
    /// taken over, and how many not: those that exceed the limits, and bytes that are no connection.
    pub fn take_over(&mut self, now: Millis, state: &[u8]) -> Account {
        const fn is_open(kind: u8) -> bool {
            kind & 1 == 0
        }
        let mut account = Account::default();
        let InspectorSet {
            http,
            tls,
            kafka,
            streams,
            dns,
            ..
        } = &mut self.inspectors;
        handover::for_each(state, |kind, bytes| {
            let is_taken = match kind {
                _ if kind == Kind::HTTP.open => http.take_over(bytes, now),
                _ if kind == Kind::HTTP.offloaded => http.take_over_offloaded(bytes),
                _ if kind == Kind::TLS.open => tls.take_over(bytes, now),
                _ if kind == Kind::TLS.offloaded => tls.take_over_offloaded(bytes),
                _ if kind == Kind::KAFKA.open => kafka.take_over(bytes, now),
                _ if kind == Kind::KAFKA.offloaded => kafka.take_over_offloaded(bytes),
                _ if kind == Kind::DNS.open => streams.take_over(bytes, now),
                _ if kind == Kind::DNS.offloaded => streams.take_over_offloaded(bytes),
                Kind::TOPIC_IDS => kafka.take_over_topic_ids(bytes),
                Kind::QUESTIONS => dns.take_over(bytes, now),
                _ => false,
            };
            match (is_open(kind), is_taken) {
                (true, true) => account.connections += 1,
                (true, false) => account.cut += 1,
                (false, _) => {}
            }
        });
        account
    }

    /// Returns the engine of the process after a planned restart, with the same rules. All connections must have been
    /// handed over.
    #[cfg(test)]
    pub(crate) fn restarted(&mut self, now: Millis, sink: &mut impl Sink<F>) -> Self {
        let HandedOver { state, account } = self.hand_over(sink);
        let mut engine = Self::new(&Limits::default());
        engine.set_rules(Arc::clone(&self.rules));
        let taken = engine.take_over(now, &state);
        assert_eq!((taken.connections, taken.cut), (account.connections, account.cut));
        assert_eq!(taken.cut, 0);
        engine
    }

    fn forget(&mut self, endpoint: Option<u16>, sink: &mut impl Sink<F>) {
        // No timer starts here, so the time does not matter.
        let (mut cx, inspectors) = self.parts(0, sink);
        let cx = &mut cx;
        inspectors.dns.forget(endpoint, cx);
        inspectors.streams.forget(endpoint, &mut inspectors.dns, cx);
        inspectors.http.forget(endpoint, cx);
        inspectors.tls.forget(endpoint, cx);
        inspectors.kafka.forget(endpoint, cx);
        inspectors.fragments.forget(endpoint, cx);
    }

    /// Returns the counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let inspectors = &self.inspectors;
        Stats {
            dns: DnsStats {
                tcp: inspectors.streams.stats(),
                ..inspectors.dns.stats()
            },
            http: inspectors.http.stats(),
            tls: inspectors.tls.stats(),
            kafka: inspectors.kafka.stats(),
            fragments: inspectors.fragments.stats(),
            unsupported: inspectors.unsupported,
        }
    }
}

impl<F> InspectorSet<F> {
    /// Dispatches a packet.
    fn packet<S: Sink<F>>(&mut self, view: &PacketView<'_>, frame: F, cx: &mut Cx<'_, F, S>) {
        match (Form::of(view.packet), view.slot.inspector, view.packet.protocol) {
            // The worker only carries a packet of an intercepted flow to the proxy link, whose sockets reassemble
            // fragments and check ICMP errors.
            (_, TERMINATE, _) => cx.sink.release(frame),
            (Form::Fragment, _, _) => self.fragment(view, frame, cx),
            (Form::IcmpError, _, _) => self.error(view, frame, cx),
            (Form::Whole, DNS, protocol::UDP) => self.datagram(view, frame, cx),
            (Form::Whole, DNS, protocol::TCP) => self.streams.segment(view, frame, &mut self.dns, cx),
            (Form::Whole, HTTP, protocol::TCP) => self.http.packet(view, frame, cx),
            (Form::Whole, TLS, protocol::TCP) => self.tls.packet(view, frame, cx),
            (Form::Whole, KAFKA, protocol::TCP) => self.kafka.packet(view, frame, cx),
            (Form::Whole, _, _) => {
                self.unsupported += 1;
                refuse(view, Frames::One(frame), Reason::AppUnsupported, cx);
            }
        }
    }

    /// Inspects a DNS datagram in one packet.
    fn datagram<S: Sink<F>>(&mut self, view: &PacketView<'_>, frame: F, cx: &mut Cx<'_, F, S>) {
        let frames = Frames::One(frame);
        match datagram_payload(view) {
            Some(message) => self.dns.datagram(view, message, frames, cx),
            None => refuse(view, frames, Reason::AppMalformed, cx),
        }
    }

    /// Handles an ICMP error. The BPF programs punt errors about TCP connections only.
    fn error<S: Sink<F>>(&mut self, view: &PacketView<'_>, frame: F, cx: &mut Cx<'_, F, S>) {
        let Some(quoted) = QuotedSegment::read(view) else {
            self.unsupported += 1;
            cx.sink.discard(frame, Reason::UnrelatedIcmp);
            return;
        };
        match view.slot.inspector {
            DNS => self.streams.error(view, &quoted, frame, cx),
            HTTP => self.http.error(view, &quoted, frame, cx),
            TLS => self.tls.error(view, &quoted, frame, cx),
            KAFKA => self.kafka.error(view, &quoted, frame, cx),
            _ => {
                self.unsupported += 1;
                cx.sink.discard(frame, Reason::AppUnsupported);
            }
        }
    }

    /// Handles a fragment. Once all fragments of its datagram have arrived, the datagram is inspected.
    fn fragment<S: Sink<F>>(&mut self, view: &PacketView<'_>, frame: F, cx: &mut Cx<'_, F, S>) {
        let mut whole = match self.fragments.take(view, frame, cx) {
            Ok(Some(whole)) => whole,
            Ok(None) => return,
            Err((frame, reason)) => {
                refuse(view, Frames::One(frame), reason, cx);
                return;
            }
        };
        // The `frame` of this view is the fragment that arrived last; only its link header is used. The decoded headers
        // and the punt request are those of the first fragment.
        let view = PacketView {
            slot: &whole.slot,
            packet: &whole.packet,
            ..*view
        };
        let frames = Frames::Many(std::mem::take(&mut whole.frames));
        match (view.slot.inspector, view.packet.protocol, whole.message()) {
            (DNS, protocol::UDP, Ok(message)) => self.dns.datagram(&view, message, frames, cx),
            (DNS, protocol::UDP, Err(reason)) => refuse(&view, frames, reason, cx),
            _ => {
                self.unsupported += 1;
                refuse(&view, frames, Reason::AppUnsupported, cx);
            }
        }
        self.fragments.recycle(whole);
    }
}

/// Returns the payload of a UDP datagram, by its length field.
fn datagram_payload<'a>(view: &PacketView<'a>) -> Option<&'a [u8]> {
    let datagram = view.frame.get(view.transport..)?;
    let length = usize::from(u16::from_be_bytes(*datagram.get(4..6)?.first_chunk()?));
    datagram.get(8..length)
}

/// Records and drops a packet that cannot be inspected. Audit mode forwards it.
fn refuse<F, S: Sink<F>>(view: &PacketView<'_>, frames: Frames<F>, reason: Reason, cx: &mut Cx<'_, F, S>) {
    let is_audit = view.slot.flags & punt_flags::AUDIT != 0;
    let detail = reason.text();
    cx.sink.record(&Record {
        verdict: if is_audit {
            Verdict::Audit
        } else {
            Verdict::Dropped
        },
        reason,
        ..Record::of(view, What::Unreadable { detail })
    });
    if is_audit {
        frames.release(cx.spare, cx.sink);
    } else {
        frames.discard(reason, cx.spare, cx.sink);
    }
}
