//! The state of one packet on the path, and the events about it.
//!
//! The counterpart of `xdp/src/packet_context.rs` and `xdp/src/event.rs`.

use palisade_abi::{
    CtEntry, CtKey, Decision, ETHER_TYPES, Event, EventKind, IpcacheEntry, MatchKind, PuntRequest, Reason,
    TracePoint, event_flags,
};
use palisade_packet::{Packet, flags};

use super::context::Cx;
use crate::capture::{Frame, Network};

/// Place of a program: the role of the interface, the hook, and the endpoint whose policy is looked up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum HookPoint {
    /// Ingress of a NIC.
    NicIn,
    /// Egress of a NIC.
    NicOut,
    /// Ingress of a workload's interface: the packet comes from the workload.
    FromWorkload,
    /// Egress of a workload's interface: the packet goes to the workload.
    ToWorkload,
    /// At a workload's interface, while the node's own policy is looked up.
    Node,
}

impl HookPoint {
    /// Returns whether the interface is a NIC.
    pub(crate) const fn is_nic(self) -> bool {
        matches!(self, Self::NicIn | Self::NicOut)
    }

    /// Returns whether the hook is the egress of its interface.
    pub(crate) const fn is_egress_hook(self) -> bool {
        matches!(self, Self::NicOut | Self::ToWorkload)
    }

    /// Returns whether the packet goes to the endpoint of the interface.
    pub(crate) const fn is_ingress(self) -> bool {
        matches!(self, Self::NicIn | Self::ToWorkload)
    }
}

/// Interface and hook at which the packet path would have processed a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Site {
    /// Index of the interface; 0 if it is not known.
    pub ifindex: u32,
    /// The endpoint of the interface.
    pub endpoint: u16,
    /// The hook.
    pub point: HookPoint,
    /// Whether this node has generated the packet.
    pub is_local: bool,
    /// EtherTypes of frames that pass at this interface.
    pub ether_types: [u16; ETHER_TYPES],
    /// Whether failsafe ports do not pass at the interface.
    pub no_failsafe: bool,
}

/// Result of the policy lookup for a flow in the direction opposite to that in which it is evaluated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Opposite {
    /// Allowed, denied by default, or not looked up.
    None,
    /// The flow would be inspected.
    Inspected,
    /// A deny rule matches.
    Denied,
}

/// The state of one packet.
#[derive(Clone, Debug)]
pub(crate) struct PacketState<'a> {
    pub frame: Frame<'a>,
    pub site: Site,
    pub headers: Packet,
    pub key: CtKey,
    /// Time of the conntrack, ns. Never runs backwards.
    pub now: u64,
    /// Time of the packet, ns.
    pub time: u64,
    /// Exact ipcache entry of the peer.
    pub known: IpcacheEntry,
    pub endpoint: u16,
    pub policy: u32,
    pub revision: u32,
    pub rule: u32,
    pub remote_identity: u32,
    pub ruleset: u32,
    pub serial: u32,
    pub event_flags: u8,
    pub reason: Reason,
    /// Whether the packet goes to the endpoint whose policy is looked up.
    pub ingress: bool,
    pub point: HookPoint,
    pub flow_flags: u8,
    pub ports_unknown: bool,
    pub stateful: bool,
    pub decision: u8,
    pub match_kind: u8,
    pub inspector: u8,
    pub entry_flags: u8,
    /// Requests of the policies that inspect the packet.
    pub requests: [PuntRequest; 2],
    pub request_count: usize,
    pub must_punt: bool,
    /// Flags of the endpoint: [`palisade_abi::endpoint_flags`].
    pub endpoint_flags: u32,
    pub punt_flags: u8,
    pub opposite: Opposite,
    /// Whether the packet creates a flow and is in the reply direction of that flow.
    pub reversed: bool,
    /// Whether the packet has created a flow whose first packet the capture does not contain.
    pub is_midstream: bool,
}

impl<'a> PacketState<'a> {
    pub(crate) fn new(frame: Frame<'a>, site: Site, headers: Packet, now: u64, time: u64) -> Self {
        Self {
            frame,
            site,
            headers,
            key: CtKey::default(),
            now,
            time,
            known: IpcacheEntry::default(),
            endpoint: site.endpoint,
            policy: 0,
            revision: 0,
            rule: 0,
            remote_identity: 0,
            ruleset: 0,
            serial: 0,
            event_flags: 0,
            reason: Reason::Allowed,
            ingress: site.point.is_ingress(),
            point: site.point,
            flow_flags: 0,
            ports_unknown: false,
            stateful: false,
            decision: Decision::Deny as u8,
            match_kind: MatchKind::None as u8,
            inspector: 0,
            entry_flags: 0,
            requests: [PuntRequest::default(); 2],
            request_count: 0,
            must_punt: false,
            endpoint_flags: 0,
            punt_flags: 0,
            opposite: Opposite::None,
            reversed: false,
            is_midstream: false,
        }
    }

    pub(crate) const fn is_dropped(&self) -> bool {
        self.reason.is_drop()
    }

    /// Clears the result of an earlier policy lookup.
    pub(crate) const fn clear_decision(&mut self) {
        self.rule = 0;
        self.remote_identity = 0;
        self.decision = Decision::Deny as u8;
        self.match_kind = MatchKind::None as u8;
        self.inspector = 0;
        self.ruleset = 0;
        self.punt_flags = 0;
        self.entry_flags = 0;
        self.reversed = false;
    }

    /// Returns destination and source MAC address; `None` if the capture does not contain them.
    pub(crate) fn macs(&self) -> Option<([u8; 6], [u8; 6])> {
        if self.frame.network != Network::Ethernet {
            return None;
        }
        let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5] = *self.frame.data.first_chunk::<12>()?;
        Some(([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5]))
    }

    /// Returns an event about the packet. `flow`: the entry whose counters a trace reports.
    pub(crate) fn event(&self, cx: &Cx, kind: EventKind, point: TracePoint, flow: Option<&CtEntry>) -> Event {
        let headers = &self.headers;
        let own_identity = cx
            .tables
            .endpoint(self.endpoint)
            .map_or(0, |state| state.identity);
        let mut event_flags = self.event_flags;
        if headers.is(flags::IPV6) {
            event_flags |= event_flags::IPV6;
        }
        if self.ports_unknown {
            event_flags |= event_flags::FRAGMENT;
        }
        if !self.ingress {
            event_flags |= event_flags::EGRESS;
        }
        let (source_identity, destination_identity) = if self.ingress {
            (self.remote_identity, own_identity)
        } else {
            (own_identity, self.remote_identity)
        };
        let (destination_mac, source_mac) = self.macs().unwrap_or_default();
        let counts = match flow {
            Some(flow) => [
                flow.forward_packets,
                flow.forward_bytes,
                flow.reply_packets,
                flow.reply_bytes,
            ],
            None if point == TracePoint::Start => [1, u64::from(headers.length), 0, 0],
            None => [0; 4],
        };
        Event {
            time: self.time,
            source: headers.source,
            destination: headers.destination,
            source_port: headers.source_port,
            destination_port: headers.destination_port,
            source_identity,
            destination_identity,
            rule: self.rule,
            ifindex: self.site.ifindex,
            length: headers.length,
            endpoint: self.endpoint,
            kind: kind as u8,
            reason: self.reason as u8,
            flags: event_flags,
            protocol: headers.protocol,
            tcp_flags: headers.tcp_flags,
            match_kind: self.match_kind,
            trace_point: point as u8,
            decision: self.decision,
            ether_type: if headers.is(flags::NOT_IP) {
                headers.ether_type
            } else {
                0
            },
            source_mac,
            destination_mac,
            forward_packets: counts[0],
            forward_bytes: counts[1],
            reply_packets: counts[2],
            reply_bytes: counts[3],
        }
    }
}
