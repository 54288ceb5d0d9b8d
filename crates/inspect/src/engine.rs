//! The entry point of the crate: one [`Engine`] for each worker.
//!
//! [`Engine::packet`] dispatches a packet to the reader of its rule set: DNS datagrams to `dns`, TCP to the connection
//! tables of `dns::stream`, `http` and `tls`, fragments to `fragments` first.

use std::sync::Arc;

use palisade_abi::{Inspector, Reason, protocol, punt_flags};
use palisade_fqdn::SniAddressIndex;
use palisade_packet::flags;

use crate::{
    CommitResult, DnsLimits, DnsStats, FragmentLimits, FragmentStats, HttpLimits, HttpStats, Millis,
    PacketView, Rules, Sink, TlsLimits, TlsStats,
    dns::{Dns, stream::Streams},
    fragments::Reassembler,
    frames::{Frames, Spare},
    http::Http,
    record::{Record, Verdict, What},
    tcp::quote::QuotedSegment,
    tls::Tls,
};

/// What an engine may hold. Of one worker.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// DNS.
    pub dns: DnsLimits,
    /// HTTP.
    pub http: HttpLimits,
    /// TLS.
    pub tls: TlsLimits,
    /// Fragmented datagrams.
    pub fragments: FragmentLimits,
}

/// What has happened so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// DNS.
    pub dns: DnsStats,
    /// HTTP.
    pub http: HttpStats,
    /// TLS.
    pub tls: TlsStats,
    /// Fragmented datagrams.
    pub fragments: FragmentStats,
    /// Packets of a protocol that no reader takes.
    pub unsupported: u64,
}

/// Reads what a worker is given, and decides. One for each worker.
pub struct Engine<F> {
    rules: Arc<Rules>,
    dns: Dns<F>,
    streams: Streams<F>,
    http: Http<F>,
    tls: Tls<F>,
    fragments: Reassembler<F>,
    spare: Spare<F>,
    unsupported: u64,
}

impl<F> Engine<F> {
    /// Knows no rules yet.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        Self {
            rules: Arc::default(),
            dns: Dns::new(&limits.dns),
            streams: Streams::new(&limits.dns.tcp),
            http: Http::new(&limits.http),
            tls: Tls::new(&limits.tls),
            fragments: Reassembler::new(&limits.fragments),
            spare: Spare::new(),
            unsupported: 0,
        }
    }

    /// From now on these rules hold. To be called before a packet can name a set that is new in them.
    pub fn set_rules(&mut self, rules: Arc<Rules>) {
        self.rules = rules;
    }

    /// From now on, who connects by a server name that a rule allows must have learned the address by that name.
    pub fn verify_server_names(&mut self, known: Arc<SniAddressIndex>) {
        self.tls.verify(known);
    }

    /// Whether a set of rules is known.
    #[must_use]
    pub fn knows(&self, ruleset: u32) -> bool {
        self.rules.knows(ruleset)
    }

    /// A packet to be read for one slot. Its handle comes back to the sink: now, or later from any other call.
    pub fn packet(&mut self, now: Millis, view: &PacketView<'_>, frame: F, sink: &mut impl Sink<F>) {
        if view.packet.is(flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER) {
            self.fragment(now, view, frame, sink);
            return;
        }
        if view.packet.is(flags::ICMP_ERROR) {
            self.error(now, view, frame, sink);
            return;
        }
        let is_dns = view.slot.inspector == Inspector::Dns as u8;
        if is_dns && view.packet.protocol == protocol::TCP {
            self.streams.segment(
                now,
                view,
                frame,
                &mut self.dns,
                &self.rules,
                &mut self.spare,
                sink,
            );
            return;
        }
        if view.slot.inspector == Inspector::Http as u8 && view.packet.protocol == protocol::TCP {
            self.http.packet(now, view, frame, &self.rules, sink);
            return;
        }
        if view.slot.inspector == Inspector::Tls as u8 && view.packet.protocol == protocol::TCP {
            self.tls.packet(now, view, frame, &self.rules, sink);
            return;
        }
        if !is_dns || view.packet.protocol != protocol::UDP {
            self.unsupported += 1;
            refuse(
                view,
                Frames::One(frame),
                Reason::AppUnsupported,
                &mut self.spare,
                sink,
            );
            return;
        }
        let Some(message) = datagram_payload(view) else {
            refuse(
                view,
                Frames::One(frame),
                Reason::AppMalformed,
                &mut self.spare,
                sink,
            );
            return;
        };
        let frames = Frames::One(frame);
        self.dns
            .datagram(now, view, message, frames, &self.rules, &mut self.spare, sink);
    }

    /// An ICMP error. The programs punt those about TCP connections only.
    fn error(&mut self, now: Millis, view: &PacketView<'_>, frame: F, sink: &mut impl Sink<F>) {
        const DNS: u8 = Inspector::Dns as u8;
        const HTTP: u8 = Inspector::Http as u8;
        const TLS: u8 = Inspector::Tls as u8;
        let Some(quoted) = QuotedSegment::read(view) else {
            self.unsupported += 1;
            sink.discard(frame, Reason::UnrelatedIcmp);
            return;
        };
        match view.slot.inspector {
            DNS => self.streams.error(now, view, &quoted, frame, sink),
            HTTP => self.http.error(now, view, &quoted, frame, sink),
            TLS => self.tls.error(now, view, &quoted, frame, sink),
            _ => {
                self.unsupported += 1;
                sink.discard(frame, Reason::AppUnsupported);
            }
        }
    }

    /// A fragment: once its datagram is complete, that is read like one that came in one piece.
    fn fragment(&mut self, now: Millis, view: &PacketView<'_>, frame: F, sink: &mut impl Sink<F>) {
        let mut whole = match self.fragments.take(now, view, frame, &mut self.spare, sink) {
            Ok(Some(whole)) => whole,
            Ok(None) => return,
            Err((frame, reason)) => {
                refuse(view, Frames::One(frame), reason, &mut self.spare, sink);
                return;
            }
        };
        // the frame gives the link header; everything else is what the first fragment says
        let view = PacketView {
            slot: &whole.slot,
            packet: &whole.packet,
            ..*view
        };
        let frames = Frames::Many(std::mem::take(&mut whole.frames));
        if view.slot.inspector != Inspector::Dns as u8 || view.packet.protocol != protocol::UDP {
            self.unsupported += 1;
            refuse(&view, frames, Reason::AppUnsupported, &mut self.spare, sink);
        } else {
            match whole.message() {
                Ok(message) => {
                    self.dns
                        .datagram(now, &view, message, frames, &self.rules, &mut self.spare, sink);
                }
                Err(reason) => refuse(&view, frames, reason, &mut self.spare, sink),
            }
        }
        self.fragments.recycle(whole);
    }

    /// What became of an answer that was to be learned.
    pub fn committed(&mut self, now: Millis, learned: CommitResult, sink: &mut impl Sink<F>) {
        self.dns.committed(now, learned, &mut self.spare, sink);
        self.streams.resolve(now, &mut self.dns, &mut self.spare, sink);
    }

    /// Lets go what has waited too long. To be called when [`Engine::deadline`] has come; at any time, too.
    pub fn tick(&mut self, now: Millis, sink: &mut impl Sink<F>) {
        self.dns.tick(now, &mut self.spare, sink);
        self.streams.tick(now, &mut self.dns, &mut self.spare, sink);
        self.http.tick(now, sink);
        self.tls.tick(now, sink);
        self.fragments.tick(now, &mut self.spare, sink);
    }

    /// When [`Engine::tick`] has something to do, if nothing happens before.
    #[must_use]
    pub fn deadline(&self) -> Option<Millis> {
        [
            self.dns.deadline(),
            self.streams.deadline(),
            self.http.deadline(),
            self.tls.deadline(),
            self.fragments.deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Drops what is held of an endpoint that is no more, and forgets its questions.
    pub fn forget_endpoint(&mut self, endpoint: u16, sink: &mut impl Sink<F>) {
        self.dns.forget(Some(endpoint), &mut self.spare, sink);
        self.streams.forget(Some(endpoint), &mut self.dns, sink);
        self.http.forget(Some(endpoint), sink);
        self.tls.forget(Some(endpoint), sink);
        self.fragments.forget(Some(endpoint), &mut self.spare, sink);
    }

    /// Drops everything that is held: the worker ends.
    pub fn drain(&mut self, sink: &mut impl Sink<F>) {
        self.dns.forget(None, &mut self.spare, sink);
        self.streams.forget(None, &mut self.dns, sink);
        self.http.forget(None, sink);
        self.tls.forget(None, sink);
        self.fragments.forget(None, &mut self.spare, sink);
    }

    /// What has happened so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            dns: DnsStats {
                tcp: self.streams.stats(),
                ..self.dns.stats()
            },
            http: self.http.stats(),
            tls: self.tls.stats(),
            fragments: self.fragments.stats(),
            unsupported: self.unsupported,
        }
    }
}

/// What a UDP datagram carries, by its own length.
fn datagram_payload<'a>(view: &PacketView<'a>) -> Option<&'a [u8]> {
    let datagram = view.frame.get(view.transport..)?;
    let length = usize::from(u16::from_be_bytes(*datagram.get(4..6)?.first_chunk()?));
    datagram.get(8..length)
}

/// Refuses a packet that cannot be read; audit mode lets it pass.
fn refuse<F>(
    view: &PacketView<'_>,
    frames: Frames<F>,
    reason: Reason,
    spare: &mut Spare<F>,
    sink: &mut impl Sink<F>,
) {
    let audit = view.slot.flags & punt_flags::AUDIT != 0;
    let what = What::Unreadable {
        detail: reason.text(),
    };
    sink.record(&Record {
        verdict: if audit { Verdict::Audit } else { Verdict::Dropped },
        reason,
        ..Record::of(view, what)
    });
    if audit {
        frames.release(spare, sink);
    } else {
        frames.discard(reason, spare, sink);
    }
}
