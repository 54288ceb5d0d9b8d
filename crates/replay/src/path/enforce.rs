//! The verdict for one endpoint: steps 3 to 8 of the packet path.
//!
//! The rules are those of `xdp/src/enforce.rs`, `punt.rs` and `offload.rs`; each function has the name of its
//! counterpart.

use palisade_abi::{
    Addr, CtEntry, Decision, Direction, EventKind, Inspector, IpcacheEntry, PuntRequest, Reason,
    SEND_LIMIT_DISTANCE, TracePoint, class_slot, class_slot_unknown_port, ct_flags, endpoint_flags,
    entry_flags, event_flags, protocol, punt_flags, tcp_flags,
};
use palisade_packet::{Bytes as _, Quote, decode_quote, flags, icmp, icmpv6};

use super::{
    conntrack::{self, Ends, Flows},
    context::Cx,
    state::{HookPoint, Opposite, PacketState},
};

const fn direction(ingress: bool) -> Direction {
    if ingress {
        Direction::Ingress
    } else {
        Direction::Egress
    }
}

/// Gives the verdict on a packet by the policy of `pkt.endpoint`.
pub(super) fn enforce_endpoint(cx: &mut Cx, flows: &mut Flows, pkt: &mut PacketState<'_>) {
    let Some(state) = cx.tables.endpoint(pkt.endpoint) else {
        pkt.reason = Reason::NoPolicy;
        return;
    };
    (pkt.policy, pkt.revision, pkt.endpoint_flags) = (state.policy, state.revision, state.flags);
    pkt.event_flags = event_flags::REPLY_UNKNOWN;
    pkt.stateful = !pkt.ports_unknown && !is_plain_icmp(pkt);
    if pkt.headers.is(flags::ICMP_ERROR) {
        match_icmp_error(cx, pkt);
        if pkt.is_dropped() && pkt.reason != Reason::UnrelatedIcmp {
            return;
        }
        if pkt.reason == Reason::Related
            && let Some(entry) = flows.find(&pkt.key, pkt.now)
        {
            if recheck_flow(cx, pkt, entry) {
                if entry.inspector != 0 && !entry.is_offloaded() && !can_be_cut(pkt) {
                    pkt.reason = Reason::UnrelatedIcmp;
                    return;
                }
                // A worker that inspects a TCP connection gets the errors about it. Here the error says nothing that
                // changes a verdict, so it passes.
                pkt.flow_flags = entry.flags;
                pkt.reason = Reason::Related;
            }
            return;
        }
    }
    if pkt.stateful {
        let ingress = pkt.ingress;
        pkt.key = conntrack::key(pkt.endpoint, ingress, Ends::from(&pkt.headers));
        if let Some(entry) = flows.find(&pkt.key, pkt.now)
            && !conntrack::begins_another(entry, &pkt.headers, ingress)
            && !(conntrack::is_simultaneous_open(entry, &pkt.headers, ingress)
                && would_be_inspected(cx, pkt, ingress))
        {
            if !recheck_flow(cx, pkt, entry) {
                return;
            }
            let is_inspected = conntrack::is_inspected(entry, &pkt.headers);
            conntrack::note(cx, pkt, entry, is_inspected && !conntrack::is_intercepted(entry));
            pkt.flow_flags = entry.flags;
            if is_inspected {
                request_punt_of_flow(pkt, entry);
            }
            pkt.reason = Reason::Established;
            return;
        }
    }
    admit_new_flow(cx, flows, pkt);
}

/// Returns whether a packet of a live flow still passes; sets the verdict otherwise.
fn recheck_flow(cx: &mut Cx, pkt: &mut PacketState<'_>, entry: &mut CtEntry) -> bool {
    let opens = entry.inspector != 0 && conntrack::is_bare_syn(&pkt.headers);
    let is_local = entry.flags & ct_flags::REMOTE_IS_LOCAL != 0;
    let at_node = pkt.point == HookPoint::Node && !is_local;
    if entry.revision != pkt.revision || pkt.revision == 0 || opens || at_node {
        if pkt.point == HookPoint::NicIn
            && (known_remote(cx, pkt).endpoint != 0 || (is_local && is_link_local(pkt.key.remote)))
        {
            pkt.reason = Reason::InvalidSourceIp;
            return false;
        }
        reevaluate_flow(cx, pkt, entry);
        if pkt.is_dropped() {
            return false;
        }
    }
    if entry.flags & ct_flags::REMOTE_IS_LOCAL != 0 && pkt.point == HookPoint::NicIn {
        pkt.reason = Reason::InvalidSourceIp;
        return false;
    }
    true
}

/// Returns whether the SYN of the answering side would open a connection that needs inspection, if there were no entry.
fn would_be_inspected(cx: &Cx, pkt: &mut PacketState<'_>, ingress: bool) -> bool {
    let known = known_remote(cx, pkt);
    probe_direction(cx, pkt, known, ingress);
    pkt.opposite == Opposite::Inspected
}

/// Returns the ipcache entry of the peer of the flow `pkt.key`.
fn known_remote(cx: &Cx, pkt: &PacketState<'_>) -> IpcacheEntry {
    if is_link_local(pkt.key.remote) && pkt.point.is_nic() {
        return IpcacheEntry::default();
    }
    cx.tables.exact(pkt.key.remote)
}

/// Looks up the policy for the flow `pkt.key` as if the flow had been opened in the given direction.
fn lookup_direction(cx: &Cx, pkt: &mut PacketState<'_>, known: IpcacheEntry, ingress: bool) {
    let remote = pkt.key.remote;
    let identity = if pkt.endpoint_flags & endpoint_flags::LEARNS != 0 && !ingress {
        cx.tables.learned_identity(remote, known, pkt.endpoint)
    } else {
        cx.tables.identity(remote, known)
    };
    let key = &pkt.key;
    let port = match key.protocol {
        protocol::ICMP => u16::from(icmp::ECHO_REQUEST),
        protocol::ICMPV6 => u16::from(icmpv6::ECHO_REQUEST),
        _ if ingress => key.local_port,
        _ => key.remote_port,
    };
    let slot = class_slot(key.protocol, port);
    lookup(cx, pkt, identity, slot, ingress);
}

/// Looks up the policy for the flow `pkt.key` in the given direction. Stores the result in `pkt.opposite`, and clears
/// the decision.
fn probe_direction(cx: &Cx, pkt: &mut PacketState<'_>, known: IpcacheEntry, ingress: bool) {
    pkt.clear_decision();
    lookup_direction(cx, pkt, known, ingress);
    pkt.opposite = if pkt.decision == Decision::Inspect as u8 && pkt.entry_flags & entry_flags::AUDIT == 0 {
        Opposite::Inspected
    } else if pkt.reason == Reason::PolicyDeniedByDenylist {
        Opposite::Denied
    } else {
        Opposite::None
    };
    pkt.clear_decision();
    pkt.reason = Reason::Allowed;
}

/// Returns whether it is uncertain which end opened a flow of TCP, UDP or SCTP.
const fn direction_is_uncertain(flow_protocol: u8, is_opened_by_syn: bool) -> bool {
    match flow_protocol {
        protocol::TCP => !is_opened_by_syn,
        p => p == protocol::UDP || p == protocol::SCTP,
    }
}

/// Returns whether the policy of `pkt` neither inspects nor denies explicitly in the given direction.
const fn is_plain(pkt: &PacketState<'_>, ingress: bool) -> bool {
    let plain = if ingress {
        endpoint_flags::PLAIN_INGRESS
    } else {
        endpoint_flags::PLAIN_EGRESS
    };
    pkt.endpoint_flags & plain != 0
}

fn is_plain_icmp(pkt: &PacketState<'_>) -> bool {
    matches!(pkt.headers.protocol, protocol::ICMP | protocol::ICMPV6)
        && !pkt.headers.is(flags::ECHO_REQUEST | flags::ECHO_REPLY)
}

/// Looks up the policy table, and writes the verdict and the fields of the deciding entry into `pkt`.
fn lookup(cx: &Cx, pkt: &mut PacketState<'_>, identity: u32, slot: u32, ingress: bool) {
    pkt.remote_identity = identity;
    pkt.reason = Reason::NoPolicy;
    if pkt.policy == 0 {
        return;
    }
    let at_nic = matches!(pkt.point, HookPoint::NicIn | HookPoint::NicOut) && !pkt.site.no_failsafe;
    let Some(entry) = cx
        .tables
        .policy(pkt.policy, direction(ingress), identity, slot, at_nic)
    else {
        return;
    };
    pkt.rule = entry.rule;
    pkt.decision = entry.decision;
    pkt.match_kind = entry.match_kind;
    pkt.entry_flags = entry.flags;
    pkt.inspector = 0;
    pkt.ruleset = 0;
    pkt.punt_flags = 0;
    let decision = Decision::from_u8(entry.decision);
    if decision == Decision::Inspect && cx.inspectors >> (entry.inspector & 31) & 1 != 0 {
        pkt.inspector = entry.inspector;
        pkt.ruleset = entry.ruleset;
        if entry.flags & entry_flags::AUDIT != 0 {
            pkt.punt_flags = punt_flags::AUDIT;
        }
        pkt.reason = Reason::Allowed;
        return;
    }
    pkt.reason = match decision {
        Decision::Allow if entry.flags & entry_flags::FAILSAFE != 0 => Reason::Failsafe,
        Decision::Allow => Reason::Allowed,
        _ if entry.flags & entry_flags::AUDIT != 0 => Reason::Audited,
        Decision::DenyExplicit => Reason::PolicyDeniedByDenylist,
        Decision::AuthRequired => Reason::AuthRequired,
        Decision::DenyQuic => Reason::QuicIntercepted,
        Decision::Inspect => match entry.inspector {
            n if n == Inspector::Dns as u8 => Reason::NoDnsInspector,
            n if n == Inspector::Tls as u8 => Reason::NoTlsInspector,
            n if n == Inspector::Kafka as u8 => Reason::NoKafkaInspector,
            n if n == Inspector::Listener as u8 => Reason::NoListener,
            n if n == Inspector::TlsTerminate as u8 => Reason::NoTlsTermination,
            _ => Reason::NoHttpInspector,
        },
        Decision::Deny => Reason::PolicyDenied,
    };
}

/// Returns the slot of the class table for a packet that opens a flow.
const fn slot(pkt: &PacketState<'_>) -> u32 {
    let packet = &pkt.headers;
    match packet.protocol {
        p if pkt.ports_unknown => class_slot_unknown_port(p),
        p @ (protocol::ICMP | protocol::ICMPV6) => class_slot(p, packet.source_port),
        p => class_slot(p, packet.destination_port),
    }
}

/// Gives the verdict on a packet that belongs to no live flow. Creates the conntrack entry if the packet begins a flow.
fn admit_new_flow(cx: &mut Cx, flows: &mut Flows, pkt: &mut PacketState<'_>) {
    if !check_addresses(cx, pkt) {
        return;
    }
    let ingress = pkt.ingress;
    let other = if ingress {
        pkt.headers.source
    } else {
        pkt.headers.destination
    };
    let known = pkt.known;
    let identity = if pkt.endpoint_flags & endpoint_flags::LEARNS != 0 && !ingress {
        cx.tables.learned_identity(other, known, pkt.endpoint)
    } else {
        cx.tables.identity(other, known)
    };
    let slot = slot(pkt);
    pkt.opposite = Opposite::None;
    if pkt.stateful
        && direction_is_uncertain(pkt.headers.protocol, conntrack::is_bare_syn(&pkt.headers))
        && !is_plain(pkt, !ingress)
    {
        probe_direction(cx, pkt, known, !ingress);
    }
    lookup(cx, pkt, identity, slot, ingress);
    if pkt.opposite != Opposite::None && pkt.reason == Reason::Allowed && pkt.inspector == 0 {
        reverse_flow(cx, pkt, !ingress);
    }
    let packet = &pkt.headers;
    let seen = packet.tcp_flags & (tcp_flags::SYN | tcp_flags::RST | tcp_flags::ACK);
    let is_tcp = packet.protocol == protocol::TCP;
    if pkt.reason == Reason::PolicyDenied {
        if pkt.ports_unknown {
            pkt.reason = Reason::FragmentNotFound;
        } else if packet.is(flags::ICMP_ERROR) {
            pkt.reason = Reason::UnrelatedIcmp;
        } else if is_tcp && seen == tcp_flags::SYN | tcp_flags::ACK {
            pkt.reason = Reason::CtInvalidState;
        }
    }
    if ingress == pkt.reversed {
        pkt.event_flags |= event_flags::FLOW_EGRESS;
    } else {
        pkt.flow_flags |= ct_flags::INGRESS;
    }
    if pkt.reason == Reason::Audited {
        pkt.event_flags |= event_flags::AUDIT;
        pkt.flow_flags |= ct_flags::AUDIT;
    }
    let answers = seen & tcp_flags::RST != 0 || seen == tcp_flags::SYN | tcp_flags::ACK;
    let begins = pkt.stateful && !packet.is(flags::ECHO_REPLY) && !(is_tcp && answers);
    if !begins && pkt.inspector != 0 && !pkt.is_dropped() {
        pkt.reason = Reason::CtInvalidState;
    }
    if is_tcp && pkt.stateful && seen != tcp_flags::SYN {
        pkt.is_midstream = true;
    }
    if begins && !pkt.is_dropped() {
        if is_tcp && packet.tcp_flags & conntrack::STATE_FLAGS != tcp_flags::SYN {
            pkt.flow_flags |= ct_flags::MIDSTREAM;
        }
        pkt.serial = flows.next_serial();
        insert(cx, flows, pkt);
        let event = pkt.event(cx, EventKind::Trace, TracePoint::Start, None);
        cx.events.push(event);
        if pkt.inspector != 0 {
            let opens = !is_tcp || seen == tcp_flags::SYN;
            let midstream = if opens { 0 } else { punt_flags::MIDSTREAM };
            let reply = if pkt.reversed { punt_flags::REPLY } else { 0 };
            pkt.must_punt = true;
            request_punt(pkt, punt_flags::NEW | midstream | reply);
        }
    }
    let event = pkt.event(cx, EventKind::PolicyVerdict, TracePoint::None, None);
    cx.events.push(event);
}

/// Creates the entry of a flow.
fn insert(cx: &Cx, flows: &mut Flows, pkt: &PacketState<'_>) {
    let packet = &pkt.headers;
    let now = pkt.now;
    flows.insert(
        pkt.key,
        CtEntry {
            expires: now.saturating_add(conntrack::first_timeout(&cx.timeouts, packet.protocol)),
            created: now,
            reported: now,
            forward_packets: 1,
            forward_bytes: u64::from(packet.length),
            revision: pkt.revision,
            rule: pkt.rule,
            remote_identity: pkt.remote_identity,
            ifindex: pkt.site.ifindex,
            flags: pkt.flow_flags,
            forward_tcp: packet.tcp_flags & conntrack::STATE_FLAGS,
            match_kind: pkt.match_kind,
            serial: pkt.serial,
            ruleset: pkt.ruleset,
            inspector: pkt.inspector,
            punt_flags: pkt.punt_flags,
            ..CtEntry::default()
        },
    );
}

/// Handles a packet that could be a reply, that its own direction allows without inspection, and whose opposite
/// direction is inspected or denied by a deny rule.
fn reverse_flow(cx: &Cx, pkt: &mut PacketState<'_>, ingress: bool) {
    let packet = &pkt.headers;
    let is_tcp = packet.protocol == protocol::TCP;
    if !is_tcp && pkt.opposite != Opposite::Inspected {
        return;
    }
    if is_tcp
        && pkt.opposite == Opposite::Inspected
        && packet.tcp_flags & (tcp_flags::SYN | tcp_flags::RST) == 0
    {
        pkt.clear_decision();
        lookup_direction(cx, pkt, pkt.known, ingress);
        pkt.reversed = true;
        return;
    }
    pkt.reason = Reason::CtInvalidState;
}

/// Step 3: checks the addresses of the packet. Returns whether the policy of the endpoint must decide about the packet;
/// sets the verdict otherwise. Writes the ipcache entry of the peer into `pkt`.
fn check_addresses(cx: &Cx, pkt: &mut PacketState<'_>) -> bool {
    const LOCAL: u8 = ct_flags::REMOTE_IS_LOCAL;
    const HOST: u8 = ct_flags::REMOTE_IS_HOST;
    let mut source = cx.tables.exact(pkt.headers.source);
    let mut destination = cx.tables.exact(pkt.headers.destination);
    forget_other_links(cx, pkt, &mut source, &mut destination);
    let (from, to, host) = (source.endpoint, destination.endpoint, cx.host);
    let from_host = from != 0 && from == host;
    let to_host = to != 0 && to == host;
    pkt.known = if pkt.ingress { source } else { destination };
    let is_local = pkt.site.is_local;
    match pkt.point {
        HookPoint::NicIn => {
            pkt.flow_flags = 0;
            if from != 0 {
                pkt.reason = Reason::InvalidSourceIp;
                return false;
            }
            if !to_host && (to != 0 || is_forwarded(pkt)) {
                pkt.reason = Reason::Forwarded;
                return false;
            }
        }
        HookPoint::NicOut => {
            if !is_local && !from_host {
                pkt.reason = Reason::Forwarded;
                return false;
            }
            pkt.flow_flags = if to != 0 { LOCAL } else { 0 };
        }
        HookPoint::FromWorkload => {
            if from == 0 || from != pkt.endpoint {
                pkt.reason = Reason::InvalidSourceIp;
                return false;
            }
            pkt.flow_flags = if to_host {
                HOST | LOCAL
            } else if to != 0 {
                LOCAL
            } else if is_forwarded(pkt) {
                0
            } else {
                HOST
            };
        }
        HookPoint::ToWorkload => {
            if to != pkt.endpoint && !(to == 0 && is_link_local(pkt.headers.destination)) {
                if !is_to_group(pkt, to) {
                    pkt.reason = Reason::NotTheEndpoints;
                    return false;
                }
                pkt.stateful = false;
            }
            pkt.flow_flags = if from_host || (from == 0 && is_local) {
                HOST | LOCAL
            } else if from != 0 {
                LOCAL
            } else {
                0
            };
        }
        HookPoint::Node => pkt.flow_flags = LOCAL,
    }
    true
}

/// Discards ipcache entries of link-local addresses that belong to another link.
fn forget_other_links(
    cx: &Cx,
    pkt: &PacketState<'_>,
    source: &mut IpcacheEntry,
    destination: &mut IpcacheEntry,
) {
    let packet = &pkt.headers;
    match pkt.point {
        HookPoint::NicIn if is_link_local(packet.source) => *source = IpcacheEntry::default(),
        HookPoint::NicOut if is_link_local(packet.destination) => *destination = IpcacheEntry::default(),
        HookPoint::ToWorkload
            if is_link_local(packet.source) && !pkt.site.is_local && source.endpoint == cx.host =>
        {
            *source = IpcacheEntry::default();
        }
        _ => {}
    }
}

/// Returns whether the node would forward the packet. A capture contains no routing table: unicast packets to addresses
/// that are not the node's count as forwarded.
pub(super) fn is_forwarded(pkt: &PacketState<'_>) -> bool {
    !is_group(pkt.headers.destination, pkt.headers.is(flags::IPV6))
}

/// Returns whether an address is multicast, reserved or the limited broadcast address, to which nothing is routed.
pub(crate) fn is_group(addr: Addr, ipv6: bool) -> bool {
    let bytes = addr.bytes();
    if ipv6 { bytes[0] == 0xff } else { bytes[12] >= 224 }
}

/// Returns whether a packet towards a workload is multicast or broadcast.
fn is_to_group(pkt: &PacketState<'_>, to: u16) -> bool {
    let bytes = pkt.headers.destination.bytes();
    if pkt.headers.is(flags::IPV6) {
        return bytes[0] == 0xff;
    }
    if bytes[12] & 0xf0 == 224 || bytes[12..] == [0xff; 4] {
        return true;
    }
    to == 0
        && pkt
            .macs()
            .is_some_and(|(destination, _)| destination == [0xff; 6])
}

pub(super) fn is_link_local(addr: Addr) -> bool {
    let bytes = addr.bytes();
    bytes[0] == 0xfe && bytes[1] & 0xc0 == 0x80
}

/// Evaluates a live flow by the policy in force, in the direction of the flow, whatever direction the packet has.
fn reevaluate_flow(cx: &mut Cx, pkt: &mut PacketState<'_>, entry: &mut CtEntry) {
    let known = known_remote(cx, pkt);
    if matches!(pkt.point, HookPoint::FromWorkload | HookPoint::ToWorkload) {
        let owner = cx.tables.exact(pkt.key.local).endpoint;
        if owner != pkt.endpoint && !(owner == 0 && is_link_local(pkt.key.local)) {
            pkt.reason = Reason::InvalidSourceIp;
            return;
        }
    }
    let old_flags = entry.flags;
    let mut flow_flags = old_flags & !(ct_flags::AUDIT | ct_flags::REMOTE_IS_LOCAL);
    let ingress = flow_flags & ct_flags::INGRESS != 0;
    pkt.opposite = Opposite::None;
    let by_syn = flow_flags & (ct_flags::MIDSTREAM | ct_flags::SEEDED) == 0;
    if direction_is_uncertain(pkt.key.protocol, by_syn) && !is_plain(pkt, !ingress) {
        probe_direction(cx, pkt, known, !ingress);
    }
    lookup_direction(cx, pkt, known, ingress);
    if pkt.opposite != Opposite::None && pkt.reason == Reason::Allowed && pkt.inspector == 0 {
        if pkt.key.protocol != protocol::TCP {
            if pkt.opposite == Opposite::Inspected {
                pkt.reason = Reason::CtInvalidState;
            }
        } else if pkt.opposite == Opposite::Inspected {
            pkt.clear_decision();
            lookup_direction(cx, pkt, known, !ingress);
            flow_flags = (flow_flags ^ ct_flags::INGRESS) | ct_flags::MIDSTREAM;
        } else {
            pkt.reason = Reason::CtInvalidState;
        }
    }
    if pkt.reason == Reason::Audited {
        flow_flags |= ct_flags::AUDIT;
    }
    if known.endpoint != 0 || pkt.point == HookPoint::Node {
        flow_flags |= ct_flags::REMOTE_IS_LOCAL;
    }
    if known.endpoint != 0 && known.endpoint == cx.host {
        flow_flags |= ct_flags::REMOTE_IS_HOST;
    }
    let changed = entry.rule != pkt.rule || (old_flags ^ flow_flags) & ct_flags::AUDIT != 0;
    entry.rule = pkt.rule;
    entry.match_kind = pkt.match_kind;
    entry.remote_identity = pkt.remote_identity;
    let old_ruleset = entry.ruleset;
    if old_ruleset != pkt.ruleset || entry.punt_flags != pkt.punt_flags {
        entry.windows = [0; 4];
        entry.decided = 0;
        entry.over = 0;
        entry.inspector = pkt.inspector;
    } else if old_ruleset == 0 {
        entry.inspector = pkt.inspector;
    }
    if old_ruleset != 0 && pkt.ruleset == 0 && !pkt.is_dropped() {
        entry.serial = entry.serial.wrapping_add(1);
    }
    entry.ruleset = pkt.ruleset;
    entry.punt_flags = pkt.punt_flags;
    entry.flags = flow_flags;
    pkt.event_flags = conntrack::direction_flags(entry, pkt.ingress);
    // A flow with revision 0 is evaluated again for each packet (`recheck_flow`).
    entry.revision = if pkt.is_dropped() { 0 } else { pkt.revision };
    if changed {
        let event = pkt.event(cx, EventKind::PolicyVerdict, TracePoint::None, None);
        cx.events.push(event);
    }
}

/// Writes the key of the flow that an ICMP error quotes, and sets [`Reason::Related`]. Sets another reason if the error
/// is invalid or its quote identifies no flow.
fn match_icmp_error(cx: &Cx, pkt: &mut PacketState<'_>) {
    let mut quote = Quote::default();
    pkt.reason = Reason::UnrelatedIcmp;
    if decode_quote(&pkt.frame, &pkt.headers, &mut quote).is_err() || quote.source != pkt.headers.destination
    {
        return;
    }
    let source = cx.tables.exact(pkt.headers.source).endpoint;
    match pkt.point {
        HookPoint::NicIn if source != 0 && !is_link_local(pkt.headers.source) => {
            pkt.reason = Reason::InvalidSourceIp;
            return;
        }
        HookPoint::FromWorkload if source == 0 || source != pkt.endpoint => {
            pkt.reason = Reason::InvalidSourceIp;
            return;
        }
        HookPoint::Node if pkt.ingress && source != cx.tables.exact(quote.destination).endpoint => return,
        _ => {}
    }
    // The quoted packet has the opposite direction.
    pkt.key = conntrack::key(pkt.endpoint, !pkt.ingress, Ends::from(&quote));
    pkt.reason = Reason::Related;
}

/// Returns whether an ICMP error about an inspected flow can be truncated to the quoted network header and eight bytes,
/// as `xdp/src/icmp_error.rs::cut` does. The programs drop other errors: fragments, and errors that quote IPv4 options,
/// IPv6 extension headers or too few bytes.
fn can_be_cut(pkt: &PacketState<'_>) -> bool {
    const HEADER: u32 = 8;
    let packet = &pkt.headers;
    let quoted = u32::from(packet.transport_offset) + HEADER;
    let (network_header, is_plain) = if packet.is(flags::IPV6) {
        let next_header: Option<&[u8; 1]> = pkt.frame.array(quoted + 6);
        (40, next_header == Some(&[pkt.key.protocol]))
    } else {
        let version_and_length: Option<&[u8; 1]> = pkt.frame.array(quoted);
        (20, version_and_length == Some(&[0x45]))
    };
    let needed = quoted + network_header + HEADER - u32::from(packet.network_offset);
    is_plain && !packet.is(flags::FRAGMENT_FIRST) && packet.length >= needed
}

/// Requests a punt of a packet that belongs to a live flow with an inspector.
fn request_punt_of_flow(pkt: &mut PacketState<'_>, entry: &CtEntry) {
    if conntrack::is_intercepted(entry) || !is_in_window(pkt, entry) {
        pkt.must_punt = true;
    }
    let mut flags = 0;
    if conntrack::is_reply(entry, pkt.ingress) {
        flags |= punt_flags::REPLY;
    }
    if entry.flags & ct_flags::MIDSTREAM != 0 {
        flags |= punt_flags::MIDSTREAM;
    }
    pkt.rule = entry.rule;
    pkt.ruleset = entry.ruleset;
    pkt.remote_identity = entry.remote_identity;
    pkt.serial = entry.serial;
    pkt.inspector = entry.inspector;
    pkt.punt_flags = entry.punt_flags;
    request_punt(pkt, flags);
}

fn request_punt(pkt: &mut PacketState<'_>, flags: u8) {
    let mut flags = flags | pkt.punt_flags;
    if pkt.ingress {
        flags |= punt_flags::INGRESS;
    }
    let request = PuntRequest {
        rule: pkt.rule,
        ruleset: pkt.ruleset,
        remote_identity: pkt.remote_identity,
        revision: pkt.revision,
        serial: pkt.serial,
        endpoint: pkt.endpoint,
        inspector: pkt.inspector,
        flags,
    };
    if let Some(slot) = pkt.requests.get_mut(pkt.request_count) {
        *slot = request;
        pkt.request_count += 1;
    }
}

/// Returns whether the offload windows exempt the packet from inspection.
fn is_in_window(pkt: &PacketState<'_>, entry: &CtEntry) -> bool {
    const STATE: u8 = tcp_flags::ACK | tcp_flags::SYN | tcp_flags::FIN | tcp_flags::RST | tcp_flags::URG;
    let packet = &pkt.headers;
    if packet.protocol != protocol::TCP
        || packet.is(flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER)
        || packet.tcp_flags & STATE != tcp_flags::ACK
    {
        return false;
    }
    let [forward_from, forward_to, reply_from, reply_to] = entry.windows;
    if forward_from == forward_to && reply_from == reply_to {
        return false;
    }
    let windowed = CtEntry::windowed(entry.serial, entry.ruleset, entry.punt_flags, entry.windows);
    if (entry.decided ^ windowed) & !CtEntry::LIMITED != 0 {
        return false;
    }
    let (window, other) = if conntrack::is_reply(entry, pkt.ingress) {
        ((reply_from, reply_to), (forward_from, forward_to))
    } else {
        ((forward_from, forward_to), (reply_from, reply_to))
    };
    let Some(header) = pkt.frame.array::<14>(u32::from(packet.transport_offset)) else {
        return false;
    };
    let headers = u32::from(packet.transport_offset)
        .wrapping_sub(u32::from(packet.network_offset))
        .wrapping_add(u32::from(header[12] >> 4) * 4);
    if headers > packet.length {
        return false;
    }
    let word = |at: usize| {
        let bytes = header.get(at..).and_then(<[u8]>::first_chunk).copied();
        u32::from_be_bytes(bytes.unwrap_or_default())
    };
    let payload = packet.length - headers;
    if payload == 0 {
        let room = other.1.wrapping_sub(other.0);
        let acked = word(8);
        let is_near_end = entry.decided != windowed
            && other.0 & 15 != 0
            && other.1.wrapping_sub(acked) <= SEND_LIMIT_DISTANCE;
        return room < 1 << 31 && acked.wrapping_sub(other.0) < room && !is_near_end;
    }
    let room = window.1.wrapping_sub(window.0);
    let at = word(4).wrapping_sub(window.0);
    room < 1 << 31 && at < room && payload <= room - at
}
