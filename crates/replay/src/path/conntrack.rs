//! The table of flows: which packet belongs to a live flow, states, timeouts.
//!
//! The rules are those of `xdp/src/conntrack.rs`; each function has the name of its counterpart. The table is bounded
//! in another way: it evicts the flow that began first, while the packet path evicts within the share of an endpoint.

use std::collections::{HashMap, VecDeque};

use foldhash::fast::RandomState;
use palisade_abi::{
    Addr, CtEntry, CtKey, FlowCommand, Inspector, TracePoint, ct_flags, event_flags, flow_op, protocol,
    tcp_flags,
};
use palisade_packet::{Packet, Quote, flags};

use super::{
    context::{Cx, Timeouts},
    state::PacketState,
};

/// The TCP flags that change the state of a connection.
pub(super) const STATE_FLAGS: u8 = tcp_flags::FIN | tcp_flags::SYN | tcp_flags::RST | tcp_flags::ACK;

/// The flows.
#[derive(Debug)]
pub(crate) struct Flows {
    entries: HashMap<CtKey, CtEntry, RandomState>,
    /// Flows in the order in which they began, with their serials. Contains flows that have ended meanwhile.
    order: VecDeque<(CtKey, u32)>,
    limit: usize,
    serial: u32,
    /// Number of live flows that were evicted because the table was full.
    pub evicted: u64,
}

impl Flows {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            entries: HashMap::default(),
            order: VecDeque::new(),
            limit: limit.max(1),
            serial: 0,
            evicted: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns the live entry of a key.
    pub(super) fn find(&mut self, key: &CtKey, now: u64) -> Option<&mut CtEntry> {
        self.entries.get_mut(key).filter(|entry| entry.expires > now)
    }

    /// Returns a number for a new flow.
    pub(super) const fn next_serial(&mut self) -> u32 {
        self.serial = self.serial.wrapping_add(1);
        self.serial
    }

    /// Adds an entry. If the table is full, the flow that began first is removed.
    pub(super) fn insert(&mut self, key: CtKey, entry: CtEntry) {
        while self.entries.len() >= self.limit && !self.entries.contains_key(&key) {
            let Some((oldest, serial)) = self.order.pop_front() else {
                break;
            };
            if self
                .entries
                .get(&oldest)
                .is_some_and(|entry| entry.serial == serial)
            {
                self.entries.remove(&oldest);
                self.evicted += 1;
            }
        }
        self.append(key, entry.serial);
        self.entries.insert(key, entry);
    }

    /// Appends a flow to the order. Flows that have ended are removed from the order before it gets longer than twice
    /// the limit of the table.
    fn append(&mut self, key: CtKey, serial: u32) {
        if self.order.len() >= self.limit.saturating_mul(2) {
            self.prune();
        }
        self.order.push_back((key, serial));
    }

    /// Removes the flows that have ended from the order.
    fn prune(&mut self) {
        let entries = &self.entries;
        self.order
            .retain(|(key, serial)| entries.get(key).is_some_and(|entry| entry.serial == *serial));
    }

    /// Removes the flows that have expired at `now`, and calls `ended` with each of them.
    pub(super) fn sweep(&mut self, now: u64, mut ended: impl FnMut(&CtKey, &CtEntry)) {
        self.entries.retain(|key, entry| {
            if entry.expires <= now {
                ended(key, entry);
            }
            entry.expires > now
        });
        self.prune();
    }

    /// Returns the peers of all live flows, each with the endpoint of the flow.
    pub(crate) fn peers(&self) -> impl Iterator<Item = (u16, Addr)> + '_ {
        self.entries.keys().map(|key| (key.endpoint, key.remote))
    }

    /// Applies a command of an inspector, as `xdp/src/reinject.rs` does. Returns whether the command had an effect.
    pub(super) fn apply(&mut self, command: &FlowCommand, now: u64, timeouts: &Timeouts) -> bool {
        let Some(entry) = self.entries.get_mut(&command.key) else {
            return false;
        };
        if entry.serial != command.serial {
            return false;
        }
        match command.op {
            flow_op::CLOSE => {
                entry.forward_tcp |= tcp_flags::RST;
                entry.over = 1;
                entry.expires = entry.expires.min(now.saturating_add(timeouts.tcp_closing));
            }
            flow_op::OPENED => opened(entry, now, timeouts),
            flow_op::REPLACE => {
                entry.serial = command.windows[0];
                entry.decided = 0;
                entry.over = 0;
                entry.forward_tcp = tcp_flags::SYN;
                entry.reply_tcp = tcp_flags::SYN | tcp_flags::ACK;
                entry.flags &= !(ct_flags::MIDSTREAM | ct_flags::SEEDED | ct_flags::CLOSED);
                entry.expires = now.saturating_add(timeouts.tcp_opening);
                self.append(command.key, command.windows[0]);
            }
            _ if entry.ruleset != command.ruleset || u32::from(entry.punt_flags) != command.punt_flags => {
                return false;
            }
            op => {
                opened(entry, now, timeouts);
                let (serial, ruleset, flags) = (command.serial, command.ruleset, entry.punt_flags);
                entry.decided = if op == flow_op::OFFLOAD {
                    CtEntry::offload(serial, ruleset, flags)
                } else {
                    entry.windows = command.windows;
                    let is_limited = op == flow_op::LIMITED_WINDOWS;
                    CtEntry::windowed(serial, ruleset, flags, command.windows)
                        ^ if is_limited { CtEntry::LIMITED } else { 0 }
                };
            }
        }
        true
    }
}

fn opened(entry: &mut CtEntry, now: u64, timeouts: &Timeouts) {
    if !is_closing(entry.forward_tcp, entry.reply_tcp) {
        entry.forward_tcp |= tcp_flags::SYN | tcp_flags::ACK;
        entry.reply_tcp |= tcp_flags::SYN | tcp_flags::ACK;
        entry.flags |= ct_flags::REPLIED;
        entry.expires = now.saturating_add(timeouts.tcp_established);
    }
}

/// Source and destination of a packet, or of the packet that an ICMP error quotes.
#[derive(Clone, Copy)]
pub(super) struct Ends {
    source: Addr,
    destination: Addr,
    source_port: u16,
    destination_port: u16,
    echo_id: u16,
    protocol: u8,
    flags: u8,
}

impl From<&Packet> for Ends {
    fn from(packet: &Packet) -> Self {
        Self {
            source: packet.source,
            destination: packet.destination,
            source_port: packet.source_port,
            destination_port: packet.destination_port,
            echo_id: packet.echo_id,
            protocol: packet.protocol,
            flags: packet.flags,
        }
    }
}

impl From<&Quote> for Ends {
    fn from(quote: &Quote) -> Self {
        Self {
            source: quote.source,
            destination: quote.destination,
            source_port: quote.source_port,
            destination_port: quote.destination_port,
            echo_id: quote.echo_id,
            protocol: quote.protocol,
            flags: quote.flags,
        }
    }
}

/// Returns the key of the flow of a packet that goes to `endpoint` (`ingress`) or comes from it.
pub(super) fn key(endpoint: u16, ingress: bool, ends: Ends) -> CtKey {
    let (mut source_port, mut destination_port) = match ends.protocol {
        protocol::TCP | protocol::UDP | protocol::SCTP => (ends.source_port, ends.destination_port),
        _ => (0, 0),
    };
    if ends.flags & (flags::ECHO_REQUEST | flags::ECHO_REPLY) != 0 {
        let by_peer = u16::from((ends.flags & flags::ECHO_REQUEST != 0) == ingress);
        (source_port, destination_port) = if ingress {
            (by_peer, ends.echo_id)
        } else {
            (ends.echo_id, by_peer)
        };
    }
    let source = (ends.source, source_port);
    let destination = (ends.destination, destination_port);
    let (local, remote) = if ingress {
        (destination, source)
    } else {
        (source, destination)
    };
    CtKey {
        local: local.0,
        remote: remote.0,
        local_port: local.1,
        remote_port: remote.1,
        endpoint,
        protocol: ends.protocol,
        zero: 0,
    }
}

/// Returns whether a packet is in the reply direction of the flow. `ingress`: the packet goes to the endpoint.
pub(super) const fn is_reply(entry: &CtEntry, ingress: bool) -> bool {
    (entry.flags & ct_flags::INGRESS != 0) != ingress
}

const fn is_closing(forward: u8, reply: u8) -> bool {
    (forward | reply) & tcp_flags::RST != 0 || forward & reply & tcp_flags::FIN != 0
}

/// Returns whether the packet opens a new connection with the addresses and ports of the entry.
pub(super) fn begins_another(entry: &CtEntry, packet: &Packet, ingress: bool) -> bool {
    if !is_bare_syn(packet) {
        return false;
    }
    if entry.inspector != 0 && !is_intercepted(entry) {
        return entry.over != 0;
    }
    let (forward, reply) = (entry.forward_tcp, entry.reply_tcp);
    is_closing(forward, reply) || (is_reply(entry, ingress) && (forward | reply) & tcp_flags::ACK != 0)
}

/// Returns whether the packet opens a TCP connection: SYN without ACK.
pub(super) const fn is_bare_syn(packet: &Packet) -> bool {
    packet.protocol == protocol::TCP
        && packet.tcp_flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN
        && !packet.is(flags::FRAGMENT_LATER)
}

/// Returns whether the packet is a SYN of the answering side of a flow without an inspector.
pub(super) const fn is_simultaneous_open(entry: &CtEntry, packet: &Packet, ingress: bool) -> bool {
    is_bare_syn(packet) && entry.inspector == 0 && is_reply(entry, ingress)
}

/// Returns whether the flow has an inspector that needs the packet.
pub(super) const fn is_inspected(entry: &CtEntry, packet: &Packet) -> bool {
    entry.inspector != 0
        && (!entry.is_offloaded()
            || (packet.protocol == protocol::TCP && packet.tcp_flags & tcp_flags::SYN != 0))
}

/// Returns whether the proxy terminates the flow.
pub(super) const fn is_intercepted(entry: &CtEntry) -> bool {
    entry.inspector == Inspector::TlsTerminate as u8
}

const fn timeout(timeouts: &Timeouts, protocol: u8, flow_flags: u8, forward_tcp: u8, closing: bool) -> u64 {
    match protocol {
        protocol::TCP if closing => timeouts.tcp_closing,
        protocol::TCP if flow_flags & ct_flags::REPLIED != 0 && forward_tcp & tcp_flags::ACK != 0 => {
            timeouts.tcp_established
        }
        protocol::TCP => timeouts.tcp_opening,
        protocol::UDP | protocol::SCTP => timeouts.udp,
        _ => timeouts.other,
    }
}

/// Returns the lifetime of a new flow.
pub(super) const fn first_timeout(timeouts: &Timeouts, protocol: u8) -> u64 {
    timeout(timeouts, protocol, 0, 0, false)
}

/// Updates the entry for a packet that passes. `is_inspected`: a worker inspects the packet, so that the packet's TCP
/// flags do not change the entry.
pub(super) fn note(cx: &mut Cx, pkt: &mut PacketState<'_>, entry: &mut CtEntry, is_inspected: bool) {
    let packet = &pkt.headers;
    let (protocol, length) = (packet.protocol, packet.length);
    let reply = is_reply(entry, pkt.ingress);
    let has_state = protocol == protocol::TCP && !is_inspected && !packet.is(flags::FRAGMENT_LATER);
    let counts = if reply {
        (&mut entry.reply_packets, &mut entry.reply_bytes)
    } else {
        (&mut entry.forward_packets, &mut entry.forward_bytes)
    };
    *counts.0 += 1;
    *counts.1 += u64::from(length);
    let mut seen = packet.tcp_flags & STATE_FLAGS;
    if reply {
        entry.flags |= ct_flags::REPLIED;
        if has_state {
            entry.reply_tcp = (entry.reply_tcp & !tcp_flags::RST) | seen;
        }
    } else if has_state {
        if entry.forward_tcp & tcp_flags::SYN != 0 && entry.reply_tcp == 0 {
            seen &= !tcp_flags::ACK;
        }
        entry.forward_tcp = (entry.forward_tcp & !tcp_flags::RST) | seen;
    }
    let closing = is_closing(entry.forward_tcp, entry.reply_tcp);
    let timeouts = &cx.timeouts;
    if closing && entry.flags & ct_flags::CLOSED == 0 {
        entry.flags |= ct_flags::CLOSED;
        entry.expires =
            pkt.now
                .saturating_add(timeout(timeouts, protocol, entry.flags, entry.forward_tcp, true));
        return trace(cx, pkt, entry, TracePoint::End);
    }
    entry.expires = pkt.now.saturating_add(timeout(
        timeouts,
        protocol,
        entry.flags,
        entry.forward_tcp,
        closing,
    ));
    let interval = timeouts.trace_interval;
    if interval != 0 && pkt.now.saturating_sub(entry.reported) >= interval {
        trace(cx, pkt, entry, TracePoint::Interval);
    }
}

fn trace(cx: &mut Cx, pkt: &mut PacketState<'_>, entry: &mut CtEntry, point: TracePoint) {
    entry.reported = pkt.now;
    pkt.rule = entry.rule;
    pkt.match_kind = entry.match_kind;
    pkt.remote_identity = entry.remote_identity;
    pkt.event_flags = direction_flags(entry, pkt.ingress);
    pkt.reason = palisade_abi::Reason::Established;
    let event = pkt.event(cx, palisade_abi::EventKind::Trace, point, Some(entry));
    cx.events.push(event);
}

/// Returns the event flags of a packet that belongs to a flow.
pub(super) const fn direction_flags(entry: &CtEntry, ingress: bool) -> u8 {
    let mut out = 0;
    if is_reply(entry, ingress) {
        out |= event_flags::REPLY;
    }
    if entry.flags & ct_flags::INGRESS == 0 {
        out |= event_flags::FLOW_EGRESS;
    }
    if entry.flags & ct_flags::AUDIT != 0 {
        out |= event_flags::AUDIT;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaced_flows_do_not_make_the_order_grow() {
        let timeouts = Timeouts {
            tcp_opening: 60,
            tcp_established: 60,
            tcp_closing: 60,
            udp: 60,
            other: 60,
            fragment: 60,
            trace_interval: 0,
            sweep: 60,
        };
        let mut flows = Flows::new(4);
        let key = CtKey::default();
        let entry = CtEntry {
            serial: 1,
            expires: 60,
            ..CtEntry::default()
        };
        flows.insert(key, entry);
        for serial in 1..100 {
            let command = FlowCommand {
                key,
                serial,
                op: flow_op::REPLACE,
                windows: [serial + 1; 4],
                ..FlowCommand::default()
            };
            assert!(flows.apply(&command, 0, &timeouts));
        }
        assert!(flows.order.len() <= 8, "{}", flows.order.len());
        assert_eq!(flows.len(), 1);
    }
}
