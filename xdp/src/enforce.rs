//! The verdict for one endpoint. The same code serves XDP and tc, NICs and workloads' interfaces, and both directions.
//!
//! Depends on `conntrack`, `identity`, `link` and `policy` for its steps. Start at [`enforce_endpoint`].

use palisade_abi::{
    Addr, Decision, Direction, EndpointState, EventKind, Inspector, Reason, TracePoint, class_slot,
    class_slot_unknown_port, ct_flags, endpoint_flags, entry_flags, event_flags, protocol, punt_flags, role,
    tcp_flags,
};
use palisade_packet::{Bytes as _, Quote, decode_quote, flags, icmp, icmpv6};

use crate::calls::Calls;
use crate::conntrack::{self, Ends};
use crate::counters;
use crate::entry::Entry;
use crate::event;
use crate::hook::Hook;
use crate::icmp_error;
use crate::identity::{self, IpcacheHit};
use crate::link;
use crate::maps::ENDPOINTS;
use crate::packet_context::{PacketContext, hook_point, opposite};
use crate::policy;
use crate::proxy;
use crate::punt;

/// Gives the verdict on a packet by the policy of `pkt.endpoint`: steps 3 to 8 of the pipeline. For a packet of a live
/// flow, step 4 gives the verdict. `IN_PLACE`: `pkt` is on the stack of the program's main function.
#[inline(always)]
pub fn enforce_endpoint<C: Calls, const IN_PLACE: bool>(ctx: C, pkt: &mut PacketContext) {
    let Some(state) = ENDPOINTS.get_ptr(pkt.endpoint & 0xffff) else {
        return pkt.set(Reason::NoPolicy);
    };
    (pkt.policy, pkt.revision) = policy_of(state);
    // SAFETY: `state` points to a map value, which lives as long as the map, and `flags` is aligned; the read is
    // volatile because user space can write the field. User space can set LEARNS after the policy; until LEARNS is set,
    // the endpoint has no learned addresses.
    pkt.learns =
        unsafe { core::ptr::read_volatile(&raw const (*state).flags) } as u8 & endpoint_flags::LEARNS as u8;
    pkt.event_flags = event_flags::REPLY_UNKNOWN;
    pkt.stateful = !pkt.ports_unknown && !is_plain_icmp(pkt);
    if pkt.headers.is(flags::ICMP_ERROR) {
        ctx.match_icmp_error(pkt);
        if pkt.is_dropped() && pkt.reason != Reason::UnrelatedIcmp as u8 {
            return;
        }
        if pkt.reason == Reason::Related as u8
            && let Some(entry) = conntrack::find(&pkt.key, pkt.now)
        {
            if recheck_flow(ctx, pkt, entry) {
                if entry.inspector() != 0 && !entry.is_offloaded() {
                    ctx.take(pkt);
                    if icmp_error::cut(ctx, pkt) != 0 {
                        return pkt.set(Reason::UnrelatedIcmp);
                    }
                    // The worker compares the quoted sequence number with the segments in flight, and must learn that a
                    // segment it generated is too big. After `cut`, an error about a DNS datagram quotes only the UDP
                    // header, in which the worker has nothing to check.
                    if pkt.key.protocol == protocol::TCP {
                        punt::request_punt_of_flow(ctx, pkt, entry);
                    }
                }
                conntrack::count(entry, &pkt.headers);
                pkt.flow_flags = entry.flags();
                pkt.set(Reason::Related);
            }
            return;
        }
    }
    // Step 4: conntrack. The key contains the endpoint's address, so an entry exists only for an address that is valid
    // at this endpoint. A packet of a known flow needs no step 3.
    if pkt.stateful {
        let ingress = pkt.is_ingress();
        conntrack::write_key(&mut pkt.key, pkt.endpoint, ingress, conntrack::ends(&pkt.headers));
        let entry = if IN_PLACE {
            conntrack::find_in_place(&pkt.key, pkt.now)
        } else {
            conntrack::find(&pkt.key, pkt.now)
        };
        if let Some(entry) = entry
            && !conntrack::begins_another(entry, &pkt.headers, ingress)
            && !(conntrack::is_simultaneous_open(entry, &pkt.headers, ingress)
                && would_be_inspected(pkt, ingress))
        {
            if !recheck_flow(ctx, pkt, entry) {
                return;
            }
            // If this machine generated the packet although the peer is not the node, the packet can be the reply to a
            // translated packet (see `is_translated`).
            if pkt.hook_point == hook_point::TO_WORKLOAD
                && ctx.is_local()
                && entry.flags() & ct_flags::REMOTE_IS_HOST == 0
                && is_translated(ctx, pkt)
            {
                return pkt.set(Reason::Translated);
            }
            let is_inspected = conntrack::is_inspected(entry, &pkt.headers);
            conntrack::note(ctx, pkt, entry, is_inspected && !conntrack::is_intercepted(entry));
            conntrack::count(entry, &pkt.headers);
            pkt.flow_flags = entry.flags();
            if is_inspected {
                punt::request_punt_of_flow(ctx, pkt, entry);
            }
            return pkt.set(Reason::Established);
        }
    }
    ctx.admit_new_flow(pkt);
}

/// Returns whether a packet of a live flow still passes; sets the verdict otherwise. A flow whose revision is not that
/// of the endpoint is evaluated again by the policy in force.
#[inline(always)]
fn recheck_flow<C: Calls>(ctx: C, pkt: &mut PacketContext, entry: Entry) -> bool {
    // A bare SYN can open a new connection with the same addresses and ports. An inspected flow is then evaluated
    // again, because the peer's identity may have changed since the last policy lookup.
    let opens = entry.inspector() != 0 && conntrack::is_bare_syn(&pkt.headers);
    // An endpoint that has left the inventory has revision 0, as a denied flow has: its table decides, which denies all.
    let is_local = entry.flags() & ct_flags::REMOTE_IS_LOCAL != 0;
    // A flow that a packet from a NIC has opened gives the node's workloads nothing: failsafe ports hold at NICs only.
    let at_node = pkt.hook_point == hook_point::NODE && !is_local;
    if entry.revision() != pkt.revision || pkt.revision == 0 || opens || at_node {
        // A packet from a NIC with the address of a workload must not renew the verdict on the workload's flow.
        if pkt.hook_point == hook_point::NIC_IN
            && (known_remote(pkt).endpoint() != 0 || (is_local && identity::is_link_local(&pkt.key.remote)))
        {
            pkt.set(Reason::InvalidSourceIp);
            return false;
        }
        ctx.reevaluate_flow(pkt, entry);
        if pkt.is_dropped() {
            return false;
        }
    }
    if entry.flags() & ct_flags::REMOTE_IS_LOCAL == 0 {
        return true;
    }
    if pkt.hook_point == hook_point::NIC_IN {
        pkt.set(Reason::InvalidSourceIp);
        return false;
    }
    if pkt.hook_point == hook_point::TO_WORKLOAD && !ctx.is_local() && !left_its_workload(ctx) {
        pkt.set(Reason::Unguarded);
        return false;
    }
    true
}

/// Returns whether the SYN of the answering side would open a connection that needs inspection, if there were no entry.
#[inline(always)]
fn would_be_inspected(pkt: &mut PacketContext, ingress: bool) -> bool {
    let known = known_remote(pkt);
    probe_direction(pkt, known.into(), u32::from(ingress));
    pkt.opposite == opposite::INSPECTED
}

/// Returns the ipcache entry of the peer of the flow `pkt.key`.
#[inline(always)]
fn known_remote(pkt: &PacketContext) -> IpcacheHit {
    // See `forget_other_links`.
    if identity::is_link_local(&pkt.key.remote)
        && (pkt.hook_point == hook_point::NIC_IN || pkt.hook_point == hook_point::NIC_OUT)
    {
        return IpcacheHit::NONE;
    }
    identity::exact(&pkt.key.remote)
}

/// Looks up the policy for the flow `pkt.key` as if the flow had been opened in the given direction. `known`: the
/// ipcache entry of the peer.
#[inline(never)]
fn lookup_direction(pkt: &mut PacketContext, known: u64, ingress: u32) -> u32 {
    let identity = if pkt.learns != 0 && ingress == 0 {
        identity::learned(&pkt.key.remote, known, pkt.endpoint)
    } else {
        identity::identity(&pkt.key.remote, known)
    };
    let key = &pkt.key;
    let port = match key.protocol {
        protocol::ICMP => u16::from(icmp::ECHO_REQUEST),
        protocol::ICMPV6 => u16::from(icmpv6::ECHO_REQUEST),
        _ if ingress != 0 => key.local_port,
        _ => key.remote_port,
    };
    let slot = class_slot(key.protocol, port);
    policy::lookup(pkt, identity, slot, u32::from(ingress == 0));
    0
}

/// Looks up the policy for the flow `pkt.key` in the given direction. Stores the result in `pkt.opposite`, and clears
/// the decision.
#[inline(never)]
fn probe_direction(pkt: &mut PacketContext, known: u64, ingress: u32) -> u32 {
    pkt.clear_decision();
    lookup_direction(pkt, known, ingress);
    pkt.opposite = if pkt.decision == Decision::Inspect as u8 && pkt.entry_flags & entry_flags::AUDIT == 0 {
        opposite::INSPECTED
    } else if pkt.reason == Reason::PolicyDeniedByDenylist as u8 {
        opposite::DENIED
    } else {
        opposite::NONE
    };
    pkt.clear_decision();
    pkt.set(Reason::Allowed);
    0
}

/// Returns whether it is uncertain which end opened a flow of TCP, UDP or SCTP: only a bare SYN shows the opener.
#[inline(always)]
fn direction_is_uncertain(flow_protocol: u8, is_opened_by_syn: bool) -> bool {
    match flow_protocol {
        protocol::TCP => !is_opened_by_syn,
        p => p == protocol::UDP || p == protocol::SCTP,
    }
}

/// Returns whether the policy of `pkt` neither inspects nor denies explicitly in the given direction, so that
/// [`probe_direction`] is not needed. User space writes the policy and the flags one after the other: the flags are
/// valid only if policy and revision, read after the flags, are still those of `pkt`.
#[inline(always)]
fn is_plain(pkt: &PacketContext, ingress: u32) -> bool {
    let Some(state) = ENDPOINTS.get_ptr(pkt.endpoint & 0xffff) else {
        return false;
    };
    // SAFETY: `state` points to a map value, which lives as long as the map, and `flags` is aligned; the read is
    // volatile because user space can write the field.
    let flags = unsafe { core::ptr::read_volatile(&raw const (*state).flags) };
    let (policy, revision) = policy_of(state);
    let plain = if ingress != 0 {
        endpoint_flags::PLAIN_INGRESS
    } else {
        endpoint_flags::PLAIN_EGRESS
    };
    flags & plain != 0 && policy == pkt.policy && revision == pkt.revision
}

/// Returns policy and revision of an endpoint, read by one load: user space writes both by one 8-byte store.
#[inline(always)]
fn policy_of(state: *const EndpointState) -> (u32, u32) {
    // SAFETY: `state` points to a map value of 16 bytes, aligned to 8, which lives as long as the map; the read is
    // volatile because user space can write the value.
    let word = unsafe { core::ptr::read_volatile(state.cast::<u64>()) }.to_ne_bytes();
    (
        u32::from_ne_bytes([word[0], word[1], word[2], word[3]]),
        u32::from_ne_bytes([word[4], word[5], word[6], word[7]]),
    )
}

/// Returns whether a packet with the source address of a workload entered the node by a guarded interface of a
/// workload, where its source address was checked, or by an interface above such an interface (bridge, VRF, VLAN).
#[inline(always)]
fn left_its_workload<H: Hook>(ctx: H) -> bool {
    matches!(link::role_of(ctx.entered_by()), role::ENDPOINT | role::LINK)
}

/// Returns whether a packet to a workload's address can leave the node only by a guarded interface or by an interface
/// above a guarded one. A packet that the kernel delivers locally or refuses to forward leaves by no interface.
#[inline(always)]
fn reaches_its_workload<H: Hook>(ctx: H, pkt: &PacketContext) -> bool {
    match identity::route(ctx, pkt) {
        0 | identity::NOWHERE => true,
        ifindex => matches!(link::role_of(ifindex), role::ENDPOINT | role::LINK | role::HOST),
    }
}

/// Returns whether the packet must be dropped because this machine generated it with a source address that the machine
/// does not have.
///
/// Such a packet replies to a packet that passed the ingress hook as forwarded, but was then translated (DNAT) or
/// redirected (TPROXY, routing by fwmark) to the node. The node's policy has not allowed that flow, so the reply is
/// dropped if the node's ingress is enforced. A reset passes, because netfilter rules of the node can reject forwarded
/// packets with a reset.
#[inline(always)]
fn is_translated<H: Hook>(ctx: H, pkt: &PacketContext) -> bool {
    let source = &pkt.headers.source;
    ctx.is_local()
        && pkt.headers.tcp_flags & tcp_flags::RST == 0
        && *source != Addr::UNSPECIFIED
        && *source != Addr::from_v4([0; 4])
        && link::is_enforced(identity::host_endpoint(), Direction::Ingress as u32)
        && identity::route_back(ctx, pkt) != 0
}

/// Returns whether the packet is an ICMP message other than echo. Such a message creates no flow. The policy decides
/// about the message by its type, unless it is an error about a live flow.
#[inline(always)]
fn is_plain_icmp(pkt: &PacketContext) -> bool {
    matches!(pkt.headers.protocol, protocol::ICMP | protocol::ICMPV6)
        && !pkt.headers.is(flags::ECHO_REQUEST | flags::ECHO_REPLY)
}

/// Returns the slot of the class table for a packet that opens a flow.
#[inline(always)]
fn slot(pkt: &PacketContext) -> u32 {
    let packet = &pkt.headers;
    match packet.protocol {
        p if pkt.ports_unknown => class_slot_unknown_port(p),
        p @ (protocol::ICMP | protocol::ICMPV6) => class_slot(p, packet.source_port),
        p => class_slot(p, packet.destination_port),
    }
}

/// Gives the verdict on a packet that belongs to no live flow: steps 3 and 5 to 8. Creates the conntrack entry if the
/// packet begins a flow.
#[inline(always)]
pub fn admit_new_flow<C: Calls>(ctx: C, pkt: &mut PacketContext) {
    // Step 3: addresses.
    if !check_addresses(ctx, pkt) {
        return;
    }
    // Step 5: identity of the peer.
    let ingress = pkt.is_ingress();
    let other = if ingress {
        &pkt.headers.source
    } else {
        &pkt.headers.destination
    };
    let identity = if pkt.learns != 0 && !ingress {
        identity::learned(other, pkt.ipcache_hit, pkt.endpoint)
    } else {
        identity::identity(other, pkt.ipcache_hit)
    };
    // Step 6: class of protocol and port.
    let slot = slot(pkt);
    // Only a bare SYN shows which end opened the flow. For any other packet of TCP, UDP or SCTP the opposite direction
    // is looked up too: otherwise an attacker that sends the first packet would choose the direction whose rules apply
    // to the flow.
    pkt.opposite = opposite::NONE;
    if pkt.stateful
        && direction_is_uncertain(pkt.headers.protocol, conntrack::is_bare_syn(&pkt.headers))
        && !is_plain(pkt, u32::from(!ingress))
    {
        probe_direction(pkt, pkt.ipcache_hit, u32::from(!ingress));
    }
    // Step 7: policy table.
    policy::lookup(pkt, identity, slot, u32::from(pkt.direction));
    if pkt.opposite != opposite::NONE && pkt.reason == Reason::Allowed as u8 && pkt.inspector == 0 {
        reverse_flow(pkt, u32::from(!ingress));
    }
    let packet = &pkt.headers;
    let tcp_flags = packet.tcp_flags & (tcp_flags::SYN | tcp_flags::RST | tcp_flags::ACK);
    let is_tcp = packet.protocol == protocol::TCP;
    // Default deny: report the more specific cause, if there is one.
    if pkt.reason == Reason::PolicyDenied as u8 {
        if pkt.ports_unknown {
            pkt.set(Reason::FragmentNotFound);
        } else if packet.is(flags::ICMP_ERROR) {
            pkt.set(Reason::UnrelatedIcmp);
        } else if is_tcp && tcp_flags == tcp_flags::SYN | tcp_flags::ACK {
            pkt.set(Reason::CtInvalidState);
        }
    }
    // Step 8: allowed, denied, or inspect.
    let packet = &pkt.headers;
    if ingress == pkt.reversed {
        pkt.event_flags |= event_flags::FLOW_EGRESS;
    } else {
        pkt.flow_flags |= ct_flags::INGRESS;
    }
    if pkt.reason == Reason::Audited as u8 {
        pkt.event_flags |= event_flags::AUDIT;
        pkt.flow_flags |= ct_flags::AUDIT;
    }
    if pkt.rule != 0 {
        counters::rule(pkt.rule, packet.length);
    }
    // Neither a SYN+ACK nor a reset creates a flow. A SYN+ACK whose SYN took another route passes without a flow, if
    // its direction is allowed without inspection and `reverse_flow` does not drop it.
    let answers = tcp_flags & tcp_flags::RST != 0 || tcp_flags == tcp_flags::SYN | tcp_flags::ACK;
    let begins = pkt.stateful && !packet.is(flags::ECHO_REPLY) && !(is_tcp && answers);
    // A packet without a flow cannot be inspected.
    if !begins && pkt.inspector != 0 && !pkt.is_dropped() {
        pkt.set(Reason::CtInvalidState);
    }
    if begins && !pkt.is_dropped() {
        if is_tcp && pkt.headers.tcp_flags & conntrack::STATE_FLAGS != tcp_flags::SYN {
            pkt.flow_flags |= ct_flags::MIDSTREAM;
        }
        if conntrack::claim_slot(pkt) == 0 {
            return pkt.set(Reason::CtInsertionFailed);
        }
        conntrack::insert(pkt);
        if pkt.is_dropped() {
            return;
        }
        // The event is sent here and not by `insert`, because the entry on the stack of `insert` leaves no room for the
        // call.
        let start = event::what(EventKind::Trace, TracePoint::Start);
        ctx.send(pkt, start, core::ptr::null_mut());
        if pkt.inspector != 0 {
            let opens = !is_tcp || tcp_flags == tcp_flags::SYN;
            let midstream = if opens { 0 } else { punt_flags::MIDSTREAM };
            let reply = if pkt.reversed { punt_flags::REPLY } else { 0 };
            pkt.must_punt = true;
            punt::request_punt(pkt, punt_flags::NEW | midstream | reply);
            if pkt.inspector == Inspector::TlsTerminate as u8
                && let Some(entry) = conntrack::find(&pkt.key, pkt.now)
            {
                proxy::note_path(ctx, pkt, entry);
            }
        }
    }
    ctx.send(
        pkt,
        event::what(EventKind::PolicyVerdict, TracePoint::None),
        core::ptr::null_mut(),
    );
}

/// Handles a packet that could be a reply (it is not a bare SYN and belongs to no flow), that its own direction allows
/// without inspection, and whose opposite direction is inspected or denied by a deny rule. A default deny of the
/// opposite direction does not count: for an ordinary client, the opposite direction is denied by default.
///
/// If the opposite direction is inspected, TCP in mid-stream becomes a flow of that direction: the inspector has not
/// seen the start of the connection and resets both ends. A SYN+ACK, a reset, UDP and SCTP are dropped. If the opposite
/// direction is denied, TCP is dropped; UDP and SCTP pass.
#[inline(never)]
fn reverse_flow(pkt: &mut PacketContext, ingress: u32) -> u32 {
    let packet = &pkt.headers;
    let is_tcp = packet.protocol == protocol::TCP;
    if !is_tcp && pkt.opposite != opposite::INSPECTED {
        return 0;
    }
    if is_tcp
        && pkt.opposite == opposite::INSPECTED
        && packet.tcp_flags & (tcp_flags::SYN | tcp_flags::RST) == 0
    {
        pkt.clear_decision();
        lookup_direction(pkt, pkt.ipcache_hit, ingress);
        pkt.reversed = true;
        return 0;
    }
    pkt.set(Reason::CtInvalidState);
    0
}

/// Step 3: checks the addresses and the path of the packet. Returns whether the policy of the endpoint must decide
/// about the packet; sets the verdict otherwise. Writes the ipcache entry of the peer into `pkt`.
// The function is not inlined: its spilled registers would take stack space while `insert` runs, and on Linux 6.1 the
// chain of calls has none left.
#[inline(never)]
fn check_addresses<H: Hook>(ctx: H, pkt: &mut PacketContext) -> bool {
    const LOCAL: u8 = ct_flags::REMOTE_IS_LOCAL;
    const HOST: u8 = ct_flags::REMOTE_IS_HOST;
    let mut source = identity::exact_here(&pkt.headers.source);
    let mut destination = identity::exact_here(&pkt.headers.destination);
    forget_other_links(ctx, pkt, &mut source, &mut destination);
    let from = source.endpoint();
    let to = destination.endpoint();
    let host = identity::host_endpoint();
    let from_host = from != 0 && from == host;
    let to_host = to != 0 && to == host;
    pkt.ipcache_hit = if pkt.is_ingress() {
        source.into()
    } else {
        destination.into()
    };
    match pkt.hook_point {
        hook_point::NIC_IN => {
            pkt.flow_flags = 0;
            if from != 0 {
                pkt.set(Reason::InvalidSourceIp);
                return false;
            }
            if !to_host && (to != 0 || identity::is_forwarded(ctx, pkt)) {
                let guarded = to == 0 || reaches_its_workload(ctx, pkt);
                pkt.set(if guarded {
                    Reason::Forwarded
                } else {
                    Reason::Unguarded
                });
                return false;
            }
        }
        hook_point::NIC_OUT => {
            if !ctx.is_local() {
                let guarded = if from != 0 && !from_host {
                    left_its_workload(ctx)
                } else {
                    link::role_of(ctx.entered_by()) != role::NONE
                };
                if !guarded {
                    pkt.set(Reason::Unguarded);
                    return false;
                }
                if !from_host {
                    pkt.set(Reason::Forwarded);
                    return false;
                }
            } else if !from_host && is_translated(ctx, pkt) {
                pkt.set(Reason::Translated);
                return false;
            }
            pkt.flow_flags = if to != 0 { LOCAL } else { 0 };
        }
        hook_point::FROM_WORKLOAD => {
            if from == 0 || from != pkt.endpoint {
                pkt.set(Reason::InvalidSourceIp);
                return false;
            }
            pkt.flow_flags = if to_host {
                HOST | LOCAL
            } else if to != 0 {
                if !reaches_its_workload(ctx, pkt) {
                    pkt.set(Reason::Unguarded);
                    return false;
                }
                LOCAL
            } else if identity::is_forwarded(ctx, pkt) {
                0
            } else {
                HOST
            };
        }
        hook_point::TO_WORKLOAD => {
            if to != pkt.endpoint && !(to == 0 && identity::is_link_local(&pkt.headers.destination)) {
                if !is_to_group(ctx, pkt, to) {
                    pkt.set(Reason::NotTheEndpoints);
                    return false;
                }
                // The packet creates no entry: the entry would have the group as its local address, and the endpoint
                // could then send packets with the group as their source address.
                pkt.stateful = false;
            }
            let guarded = if from != 0 && !from_host {
                left_its_workload(ctx)
            } else {
                link::role_of(ctx.entered_by()) != role::NONE
            };
            if !ctx.is_local() && !guarded {
                pkt.set(Reason::Unguarded);
                return false;
            }
            if !from_host && is_translated(ctx, pkt) {
                pkt.set(Reason::Translated);
                return false;
            }
            pkt.flow_flags = if from_host || (from == 0 && ctx.is_local()) {
                HOST | LOCAL
            } else if from != 0 {
                LOCAL
            } else {
                0
            };
        }
        _ => pkt.flow_flags = LOCAL,
    }
    true
}

/// Discards ipcache entries of link-local addresses that belong to another link. An address of fe80::/10 is unique on
/// its link only (RFC 4007, section 6), and the ipcache holds the node's link-local addresses of all links. So the
/// link-local source of a packet that this machine did not generate is not the node's, and the link-local destination
/// of a packet that leaves by a NIC is not the node's either.
#[inline(always)]
fn forget_other_links<H: Hook>(
    ctx: H,
    pkt: &PacketContext,
    source: &mut IpcacheHit,
    destination: &mut IpcacheHit,
) {
    let packet = &pkt.headers;
    match pkt.hook_point {
        hook_point::NIC_IN if identity::is_link_local(&packet.source) => *source = IpcacheHit::NONE,
        hook_point::NIC_OUT if identity::is_link_local(&packet.destination) => {
            *destination = IpcacheHit::NONE
        }
        hook_point::TO_WORKLOAD
            if identity::is_link_local(&packet.source)
                && !ctx.is_local()
                && source.endpoint() == identity::host_endpoint() =>
        {
            *source = IpcacheHit::NONE;
        }
        _ => {}
    }
}

/// Returns whether a packet towards a workload is multicast or broadcast. A directed broadcast to a subnet is
/// recognized by the broadcast MAC address, because the programs do not know the subnet's prefix length.
#[inline(always)]
fn is_to_group<H: Hook>(ctx: H, pkt: &PacketContext, to: u32) -> bool {
    let to_addr = pkt.headers.destination.0;
    if pkt.headers.is(flags::IPV6) {
        return to_addr[0].to_ne_bytes()[0] == 0xff;
    }
    let first = to_addr[3].to_ne_bytes()[0];
    if first & 0xf0 == 224 || to_addr[3] == u32::MAX {
        return true;
    }
    if to != 0 || pkt.layer3 != 0 {
        return false;
    }
    match ctx.bytes(false).array::<6>(0) {
        Some(mac) => mac[0] & mac[1] & mac[2] & mac[3] & mac[4] & mac[5] == 0xff,
        None => false,
    }
}

/// Evaluates a live flow by the policy in force, in the direction of the flow, whatever direction the packet has. A
/// denied flow keeps its entry, so that it is denied in both directions: without the entry, the next packet of the
/// reply direction would open a flow of its own.
#[inline(always)]
pub fn reevaluate_flow<C: Calls>(ctx: C, pkt: &mut PacketContext, entry: Entry) {
    let known = known_remote(pkt);
    // A new configuration may have assigned the address to another endpoint.
    if matches!(
        pkt.hook_point,
        hook_point::FROM_WORKLOAD | hook_point::TO_WORKLOAD
    ) {
        let owner = identity::exact(&pkt.key.local).endpoint();
        if owner != pkt.endpoint && !(owner == 0 && identity::is_link_local(&pkt.key.local)) {
            return pkt.set(Reason::InvalidSourceIp);
        }
    }
    let old_flags = entry.flags();
    let mut flow_flags = old_flags & !(ct_flags::AUDIT | ct_flags::REMOTE_IS_LOCAL);
    let ingress = u32::from(flow_flags & ct_flags::INGRESS != 0);
    pkt.opposite = opposite::NONE;
    let by_syn = flow_flags & (ct_flags::MIDSTREAM | ct_flags::SEEDED) == 0;
    if direction_is_uncertain(pkt.key.protocol, by_syn) && !is_plain(pkt, ingress ^ 1) {
        probe_direction(pkt, known.into(), ingress ^ 1);
    }
    lookup_direction(pkt, known.into(), ingress);
    // As in `reverse_flow`.
    if pkt.opposite != opposite::NONE && pkt.reason == Reason::Allowed as u8 && pkt.inspector == 0 {
        if pkt.key.protocol != protocol::TCP {
            if pkt.opposite == opposite::INSPECTED {
                pkt.set(Reason::CtInvalidState);
            }
        } else if pkt.opposite == opposite::INSPECTED {
            pkt.clear_decision();
            lookup_direction(pkt, known.into(), ingress ^ 1);
            // The flow counts in the share of its direction, and the direction changes below.
            conntrack::unprotect(&pkt.key, entry);
            flow_flags = (flow_flags ^ ct_flags::INGRESS) | ct_flags::MIDSTREAM;
        } else {
            pkt.set(Reason::CtInvalidState);
        }
    }
    if pkt.reason == Reason::Audited as u8 {
        flow_flags |= ct_flags::AUDIT;
    }
    if known.endpoint() != 0 || pkt.hook_point == hook_point::NODE {
        flow_flags |= ct_flags::REMOTE_IS_LOCAL;
    }
    if known.endpoint() != 0 && known.endpoint() == identity::host_endpoint() {
        flow_flags |= ct_flags::REMOTE_IS_HOST;
    }
    let changed = entry.rule() != pkt.rule || (old_flags ^ flow_flags) & ct_flags::AUDIT != 0;
    entry.set_rule(pkt.rule);
    entry.set_match_kind(pkt.match_kind);
    entry.set_remote_identity(pkt.remote_identity);
    let old_ruleset = entry.ruleset();
    if old_ruleset != pkt.ruleset || entry.punt_flags() != pkt.punt_flags {
        // The windows and the offload decision belong to the old rules.
        entry.set_windows([0; 4]);
        entry.set_decided(0);
        entry.set_over(0);
        entry.set_inspector(pkt.inspector);
    } else if old_ruleset == 0 {
        entry.set_inspector(pkt.inspector);
    }
    // Otherwise the rules are the same, and the decisions of the inspector stay valid.
    if old_ruleset != 0 && pkt.ruleset == 0 && !pkt.is_dropped() {
        // The flow is no longer inspected. With a new serial, a later inspection of the flow starts without the old
        // state.
        entry.set_serial(entry.serial().wrapping_add(1));
    }
    entry.set_ruleset(pkt.ruleset);
    entry.set_punt_flags(pkt.punt_flags);
    entry.set_flags(flow_flags);
    pkt.event_flags = conntrack::direction_flags(entry, pkt.is_ingress());
    if pkt.is_dropped() {
        counters::rule(pkt.rule, pkt.headers.length);
        // A flow with revision 0 is evaluated again for each packet (`recheck_flow`).
        entry.set_revision(0);
    } else {
        entry.set_revision(pkt.revision);
    }
    if changed {
        let what = event::what(EventKind::PolicyVerdict, TracePoint::None);
        ctx.send(pkt, what, core::ptr::null_mut());
    }
}

/// Decodes the packet that an ICMP error quotes. Returns 0 if the quote identifies a flow. The function is not inlined,
/// so that its stack is free again before the lookup.
#[inline(never)]
fn read_quote<H: Hook>(ctx: H, pkt: &PacketContext, quote: &mut Quote) -> u32 {
    // ICMP errors are rare, so the headers are pulled without an attempt to decode them first.
    ctx.pull_headers();
    u32::from(decode_quote(&ctx.bytes(true), &pkt.headers, quote).is_err())
}

/// Writes the key of the flow that an ICMP error quotes, and sets [`Reason::Related`]. Sets another reason if the error
/// is invalid or its quote identifies no flow. The caller looks the flow up, because the stack has no room for both the
/// quote and the lookup.
#[inline(always)]
pub fn match_icmp_error<H: Hook>(ctx: H, pkt: &mut PacketContext) {
    let mut quote = Quote::default();
    pkt.set(Reason::UnrelatedIcmp);
    if read_quote(ctx, pkt, &mut quote) != 0 {
        return;
    }
    // An error goes to the sender of the quoted packet (RFC 1122, section 3.2.2; RFC 4443, section 2.2).
    if quote.source != pkt.headers.destination {
        return;
    }
    // The source of an error is checked like that of any packet (step 3).
    let source = identity::exact(&pkt.headers.source).endpoint();
    match pkt.hook_point {
        hook_point::NIC_IN if source != 0 && !identity::is_link_local(&pkt.headers.source) => {
            return pkt.set(Reason::InvalidSourceIp);
        }
        hook_point::TO_WORKLOAD
            if source != 0
                && source != identity::host_endpoint()
                && !ctx.is_local()
                && !left_its_workload(ctx) =>
        {
            return pkt.set(Reason::Unguarded);
        }
        hook_point::FROM_WORKLOAD if source == 0 || source != pkt.endpoint => {
            return pkt.set(Reason::InvalidSourceIp);
        }
        // A workload reports errors about flows between itself and the node only, or it could renew the verdict on a
        // flow of the node with another peer.
        hook_point::NODE if pkt.is_ingress() && source != identity::exact(&quote.destination).endpoint() => {
            return;
        }
        _ => {}
    }
    // The quoted packet has the opposite direction.
    let ends = Ends {
        source: &quote.source,
        destination: &quote.destination,
        source_port: quote.source_port,
        destination_port: quote.destination_port,
        echo_id: quote.echo_id,
        protocol: quote.protocol,
        flags: quote.flags,
    };
    let quoted_ingress = !pkt.is_ingress();
    conntrack::write_key(&mut pkt.key, pkt.endpoint, quoted_ingress, ends);
    pkt.set(Reason::Related);
}
