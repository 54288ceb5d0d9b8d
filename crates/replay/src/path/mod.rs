//! The model of the packet path: the verdict that the BPF programs give a packet at one interface.
//!
//! The BPF programs cannot run outside the kernel, so this module repeats their rules over ordinary maps; the decoder,
//! the types and the numbers are shared with them. Each file has a counterpart in `xdp/src`, whose comments give the
//! reasons, and `crates/datapath/tests/program_replay.rs` compares both for random packets. A capture shows no routes,
//! so the checks of the routing table ([`Reason::Unguarded`], [`Reason::Translated`]) do not exist here.
//!
//! Start at [`Path::process`], the counterpart of `xdp/src/pipeline.rs`.

mod conntrack;
mod context;
mod enforce;
mod fragments;
mod link_control;
mod state;

use palisade_abi::{Event, EventKind, FlowCommand, PuntRequest, Reason, TracePoint, ct_flags, protocol};
use palisade_packet::{Packet, flags};

use conntrack::Flows;
pub(crate) use context::Cx;
pub use context::Timeouts;
use enforce::enforce_endpoint;
pub(crate) use enforce::is_group;
use fragments::Fragments;
use state::PacketState;
pub(crate) use state::{HookPoint, Site};

use crate::capture::Frame;

/// The packet path.
#[derive(Debug)]
pub(crate) struct Path {
    pub cx: Cx,
    pub flows: Flows,
    fragments: Fragments,
}

/// Verdict on a packet at one interface.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Verdict {
    pub reason: Reason,
    /// Requests of the policies that inspect the packet; without any, no worker gets the packet.
    pub requests: [PuntRequest; 2],
    pub request_count: usize,
    /// Whether the packet has created a flow whose first packet the capture does not contain.
    pub is_midstream: bool,
    /// The decoded headers; for a later fragment with the ports of the first one.
    pub headers: Packet,
}

impl Path {
    pub(crate) fn new(cx: Cx, max_flows: usize, max_fragments: usize) -> Self {
        Self {
            cx,
            flows: Flows::new(max_flows),
            fragments: Fragments::new(max_fragments),
        }
    }

    /// Gives the verdict on a decoded packet at one interface. `now`: time of the conntrack, ns, which never runs
    /// backwards; `time`: time of the packet.
    pub(crate) fn process(
        &mut self,
        site: Site,
        frame: Frame<'_>,
        headers: Packet,
        now: u64,
        time: u64,
    ) -> Verdict {
        let mut pkt = PacketState::new(frame, site, headers, now, time);
        self.classify(&mut pkt);
        if pkt.headers.is(flags::FRAGMENT_FIRST) {
            self.fragments.remember(&pkt, self.cx.timeouts.fragment);
        }
        self.finish(&pkt)
    }

    /// Reports a packet that the decoder refuses. `headers`: the fields that were decoded before the error.
    pub(crate) fn malformed(
        &mut self,
        site: Site,
        frame: Frame<'_>,
        headers: Packet,
        reason: Reason,
        time: u64,
    ) -> Verdict {
        let mut pkt = PacketState::new(frame, site, headers, time, time);
        pkt.reason = reason;
        self.finish(&pkt)
    }

    fn finish(&mut self, pkt: &PacketState<'_>) -> Verdict {
        let is_dropped = pkt.is_dropped();
        if is_dropped {
            let event = pkt.event(&self.cx, EventKind::Drop, TracePoint::None, None);
            self.cx.events.push(event);
        }
        Verdict {
            reason: pkt.reason,
            requests: pkt.requests,
            request_count: if pkt.must_punt && !is_dropped {
                pkt.request_count
            } else {
                0
            },
            is_midstream: pkt.is_midstream,
            headers: pkt.headers,
        }
    }

    fn classify(&mut self, pkt: &mut PacketState<'_>) {
        if pkt.headers.is(flags::NOT_IP) {
            return link_control::check(&mut self.cx, pkt);
        }
        if matches!(pkt.headers.protocol, protocol::ICMPV6 | protocol::IGMP) {
            link_control::check(&mut self.cx, pkt);
            if pkt.reason != Reason::Allowed {
                return;
            }
        }
        if pkt.headers.is(flags::FRAGMENT_LATER) {
            self.fragments.resolve(pkt);
        }
        enforce_endpoint(&mut self.cx, &mut self.flows, pkt);
        let is_workload = !pkt.site.point.is_nic();
        if pkt.is_dropped() || !is_workload || pkt.flow_flags & ct_flags::REMOTE_IS_HOST == 0 {
            return;
        }
        // The peer is the node, so egress of the workload is ingress of the node and vice versa.
        pkt.endpoint = self.cx.host;
        pkt.ingress = !pkt.ingress;
        pkt.point = HookPoint::Node;
        pkt.clear_decision();
        enforce_endpoint(&mut self.cx, &mut self.flows, pkt);
    }

    /// Applies a command of an inspector. Returns whether it had an effect.
    pub(crate) fn apply(&mut self, command: &FlowCommand, now: u64) -> bool {
        self.flows.apply(command, now, &self.cx.timeouts)
    }

    /// Removes expired flows and reports the end of those that ended without FIN or RST.
    pub(crate) fn sweep(&mut self, now: u64) {
        let events = &mut self.cx.events;
        self.flows.sweep(now, |key, entry| {
            events.extend(Event::of_expired(key, entry, entry.expires))
        });
    }
}
