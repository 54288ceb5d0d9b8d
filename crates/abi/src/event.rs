//! The record that the programs write to the event ring, and its enumerations. `palisade-flowlog` converts an [`Event`]
//! to a flow record.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::reason::REASONS;
use crate::{Addr, CtEntry, CtKey, Decision, Reason, ct_flags};

/// Kind of an event.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum EventKind {
    /// A policy has decided on a packet that belongs to no known flow, or the deciding rule or the audit flag of a
    /// known flow has changed.
    PolicyVerdict = 0,
    /// A packet was dropped.
    Drop = 1,
    /// A flow began, is still in use, or ended.
    Trace = 2,
}

/// Number of slots of the BUDGETS map: kinds of events × reasons.
pub const BUDGET_SLOTS: usize = 3 * REASONS;

/// Returns the slot of the BUDGETS map for a kind of event (an [`EventKind`] as a number) and a reason.
#[inline(always)]
#[must_use]
pub const fn budget_slot(kind: u32, reason: u8) -> u32 {
    kind * REASONS as u32 + reason as u32
}

/// Returns the kind of event (an [`EventKind`] as a number) and the reason to which a slot of the BUDGETS map belongs.
#[must_use]
pub const fn budget_of(slot: u32) -> (u32, u8) {
    (slot / REASONS as u32, (slot % REASONS as u32) as u8)
}

/// Specificity of the deciding rule. The names are those of Hubble's flow API.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MatchKind {
    /// No rule matched (default deny), or no policy enforces the direction.
    None = 0,
    /// The peer, any port.
    L3Only = 1,
    /// The peer and the port.
    L3L4 = 2,
    /// Any peer, the port.
    L4Only = 3,
    /// Any peer, any port.
    All = 4,
    /// The peer and the protocol, any port.
    L3Proto = 5,
    /// Any peer, the protocol, any port.
    ProtoOnly = 6,
}

/// The moment in a flow's life that a trace event reports.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TracePoint {
    /// The event is no trace.
    None = 0,
    /// The conntrack entry of the flow was created.
    Start = 1,
    /// The flow is in use; reported at most once per interval.
    Interval = 2,
    /// The flow was reset, or closed by both ends.
    End = 3,
}

/// Flags of an [`Event`].
pub mod event_flags {
    /// The packet is of the reply direction.
    pub const REPLY: u8 = 1;
    /// The packet passed only because of audit mode.
    pub const AUDIT: u8 = 2;
    /// The addresses are IPv6.
    pub const IPV6: u8 = 4;
    /// The packet leaves the endpoint (egress); otherwise it goes to the endpoint.
    pub const EGRESS: u8 = 8;
    /// The programs do not know whether the packet is of the original or of the reply direction, for example if they
    /// drop a packet that belongs to no known flow.
    pub const REPLY_UNKNOWN: u8 = 16;
    /// The packet is an ICMP error about a live flow.
    pub const RELATED: u8 = 32;
    /// The ports are not known (a later fragment).
    pub const FRAGMENT: u8 = 64;
    /// The flow is egress for the endpoint.
    pub const FLOW_EGRESS: u8 = 128;
}

/// A record of the event ring.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Event {
    /// Time of the event, ns of the monotonic clock (not the coarse one).
    pub time: u64,
    /// Source address of the packet.
    pub source: Addr,
    /// Destination address of the packet.
    pub destination: Addr,
    /// Source port, host byte order; ICMP: the type.
    pub source_port: u16,
    /// Destination port, host byte order; ICMP: the code.
    pub destination_port: u16,
    /// Identity of the source; 0 if it is not known.
    pub source_identity: u32,
    /// Identity of the destination; 0 if it is not known.
    pub destination_identity: u32,
    /// Number of the deciding rule or of the default deny; 0 if no policy decided.
    pub rule: u32,
    /// Index of the interface.
    pub ifindex: u32,
    /// Length of the packet from the network header on, bytes.
    pub length: u32,
    /// Number of the endpoint whose policy applies to the packet; 0 if the interface is not guarded.
    pub endpoint: u16,
    /// [`EventKind`].
    pub kind: u8,
    /// [`crate::Reason`].
    pub reason: u8,
    /// [`event_flags`].
    pub flags: u8,
    /// IP protocol, 0 if not known.
    pub protocol: u8,
    /// TCP flags.
    pub tcp_flags: u8,
    /// [`MatchKind`].
    pub match_kind: u8,
    /// [`TracePoint`].
    pub trace_point: u8,
    /// [`crate::Decision`] of a policy verdict.
    pub decision: u8,
    /// EtherType of a frame that is not IP, else 0.
    pub ether_type: u16,
    /// Source MAC address.
    pub source_mac: [u8; 6],
    /// Destination MAC address.
    pub destination_mac: [u8; 6],
    /// Packets of the original direction so far, this one included (traces only).
    pub forward_packets: u64,
    /// Bytes of the original direction so far (traces only).
    pub forward_bytes: u64,
    /// Packets of the reply direction so far (traces only).
    pub reply_packets: u64,
    /// Bytes of the reply direction so far (traces only).
    pub reply_bytes: u64,
}

impl Event {
    /// Returns the end event of a flow that expired without FIN or RST; `None` if the programs have reported its end.
    /// When a flow falls silent the programs see no packet, so the sweep reports the end. `time`: the time of the event.
    #[must_use]
    pub fn of_expired(key: &CtKey, entry: &CtEntry, time: u64) -> Option<Self> {
        if entry.flags & ct_flags::CLOSED != 0 {
            return None;
        }
        let ingress = entry.flags & ct_flags::INGRESS != 0;
        let mut flags = 0;
        if !ingress {
            flags |= event_flags::FLOW_EGRESS | event_flags::EGRESS;
        }
        if entry.flags & ct_flags::AUDIT != 0 {
            flags |= event_flags::AUDIT;
        }
        if !key.local.is_v4() {
            flags |= event_flags::IPV6;
        }
        let local = (key.local, key.local_port, 0);
        let remote = (key.remote, key.remote_port, entry.remote_identity);
        let (from, to) = if ingress { (remote, local) } else { (local, remote) };
        Some(Self {
            time,
            source: from.0,
            destination: to.0,
            source_port: from.1,
            destination_port: to.1,
            source_identity: from.2,
            destination_identity: to.2,
            rule: entry.rule,
            ifindex: entry.ifindex,
            length: 0,
            endpoint: key.endpoint,
            kind: EventKind::Trace as u8,
            reason: Reason::Established as u8,
            flags,
            protocol: key.protocol,
            tcp_flags: entry.forward_tcp,
            match_kind: entry.match_kind,
            trace_point: TracePoint::End as u8,
            decision: Decision::Allow as u8,
            ether_type: 0,
            source_mac: [0; 6],
            destination_mac: [0; 6],
            forward_packets: entry.forward_packets,
            forward_bytes: entry.forward_bytes,
            reply_packets: entry.reply_packets,
            reply_bytes: entry.reply_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expired(flags: u8) -> Option<Event> {
        let v4 = |last: u8| Addr::from_v4([10, 0, 0, last]);
        let key = CtKey {
            local: v4(1),
            remote: v4(2),
            local_port: 53,
            remote_port: 4711,
            endpoint: 7,
            protocol: 17,
            zero: 0,
        };
        let entry = CtEntry {
            flags,
            remote_identity: 300,
            rule: 9,
            forward_packets: 3,
            ..CtEntry::default()
        };
        Event::of_expired(&key, &entry, 1)
    }

    #[test]
    fn the_end_that_opened_a_flow_is_its_source() {
        let event = expired(ct_flags::INGRESS).unwrap();
        assert_eq!((event.source_port, event.destination_port), (4711, 53));
        assert_eq!((event.source_identity, event.destination_identity), (300, 0));
        assert_eq!(event.flags & event_flags::FLOW_EGRESS, 0);
        let event = expired(0).unwrap();
        assert_eq!((event.source_port, event.destination_port), (53, 4711));
        assert_ne!(event.flags & event_flags::FLOW_EGRESS, 0);
    }

    #[test]
    fn a_reported_end_is_not_repeated() {
        assert!(expired(ct_flags::CLOSED).is_none());
    }
}
