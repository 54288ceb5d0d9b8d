//! Conntrack: the flows that the policy of an endpoint has allowed. One entry holds both directions of a flow.
//!
//! Programs change entries in place without atomics ([`Entry`]). When two CPUs handle packets of one flow, a count can
//! be lost, and the time and flags of the last writer stay. If a FIN or RST is lost in this way, the entry stays alive
//! until its timeout.

use core::sync::atomic::{Ordering, compiler_fence};

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_coarse_ns};
use palisade_abi::{
    Addr, Config, CtEntry, CtKey, Inspector, Reason, TracePoint, ct_flags, event_flags, protocol, tcp_flags,
};
use palisade_packet::{Packet, flags};

use crate::calls::Calls;
use crate::counters;
use crate::entry::Entry;
use crate::event;
use crate::maps::{CLOCK, CONFIG, CONNTRACK};
use crate::packet_context::PacketContext;
use crate::share;

/// Age from which an answered flow of a protocol other than TCP is protected, ns. A single query and its answer take
/// less time.
const SETTLES_AFTER: u64 = 2_000_000_000;

/// The TCP flags that change the state of a connection.
pub const STATE_FLAGS: u8 = tcp_flags::FIN | tcp_flags::SYN | tcp_flags::RST | tcp_flags::ACK;

/// Returns the coarse monotonic clock, ns: the clock of all timeouts, which advances with the tick. Each CPU reads it
/// once per jiffy, because the helper takes 13 of the 100 ns that a packet of a known flow costs; the result can lag by
/// a tick.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper has no parameters and changes nothing.
    let jiffy = unsafe { bpf_jiffies64() };
    let clock = CLOCK.get_ptr_mut(0);
    if let Some(clock) = clock {
        // SAFETY: `clock` points to a value of a per-CPU map, which lives as long as the map; only the programs of this
        // CPU use it.
        let (time, read_in) = unsafe { ((*clock).time, (*clock).jiffy) };
        if read_in == jiffy {
            return time;
        }
    }
    // SAFETY: the helper has no parameters and changes nothing.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    if let Some(clock) = clock {
        // SAFETY: `clock` points to a value of a per-CPU map, which lives as long as the map; only the programs of this
        // CPU use it.
        unsafe {
            (*clock).time = now;
            (*clock).jiffy = jiffy;
        }
    }
    now
}

/// Source and destination of a packet, or of the packet that an ICMP error quotes.
#[derive(Clone, Copy)]
pub struct Ends<'a> {
    /// Source address.
    pub source: &'a Addr,
    /// Destination address.
    pub destination: &'a Addr,
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// ICMP echo identifier.
    pub echo_id: u16,
    /// IP protocol.
    pub protocol: u8,
    /// [`palisade_packet::flags`].
    pub flags: u8,
}

/// Writes the key of the flow of a packet that goes to `endpoint` (`ingress`) or comes from it.
#[inline(always)]
pub fn write_key(key: &mut CtKey, endpoint: u32, ingress: bool, ends: Ends<'_>) {
    key.endpoint = endpoint as u16;
    key.protocol = ends.protocol;
    let (mut source_port, mut destination_port) = match ends.protocol {
        protocol::TCP | protocol::UDP | protocol::SCTP => (ends.source_port, ends.destination_port),
        _ => (0, 0),
    };
    if ends.flags & (flags::ECHO_REQUEST | flags::ECHO_REPLY) != 0 {
        // The remote port of the key shows which end sent the echo request: 0 for the endpoint, 1 for the peer.
        let by_peer = u16::from((ends.flags & flags::ECHO_REQUEST != 0) == ingress);
        (source_port, destination_port) = if ingress {
            (by_peer, ends.echo_id)
        } else {
            (ends.echo_id, by_peer)
        };
    }
    if ingress {
        key.local = *ends.destination;
        key.remote = *ends.source;
        key.local_port = destination_port;
        key.remote_port = source_port;
    } else {
        key.local = *ends.source;
        key.remote = *ends.destination;
        key.local_port = source_port;
        key.remote_port = destination_port;
    }
}

/// Returns the ends of a packet.
#[inline(always)]
pub fn ends(packet: &Packet) -> Ends<'_> {
    Ends {
        source: &packet.source,
        destination: &packet.destination,
        source_port: packet.source_port,
        destination_port: packet.destination_port,
        echo_id: packet.echo_id,
        protocol: packet.protocol,
        flags: packet.flags,
    }
}

/// Returns the entry of a key, live or expired; null if there is none.
///
/// The function copies the key to its own stack. [`PacketContext`] is memory of a global function's parameter, and the
/// verifier of Linux 6.1 accepts a map key only on the stack, in a packet or in a map value. Inlined, the copy would
/// take 40 bytes of each caller's stack, and the deepest chain of calls has no room for them.
#[inline(never)]
fn lookup(key: &CtKey) -> *mut CtEntry {
    let key = *key;
    match CONNTRACK.get_ptr_mut(&key) {
        Some(entry) => entry,
        None => core::ptr::null_mut(),
    }
}

/// Returns the live entry of a key.
#[inline(always)]
pub fn find(key: &CtKey, now: u64) -> Option<Entry> {
    // SAFETY: `lookup` returns null or a pointer to a map value that the running program has just looked up.
    live(unsafe { Entry::new(lookup(key)) }, now)
}

/// Returns the live entry of a key that is on the stack of a program's main function, where no copy is needed. Compared
/// with [`find`], this saves a call on the path of a known flow: where the kernel protects returns from speculation
/// (SRSO, retbleed), each call costs some nanoseconds.
#[inline(always)]
pub fn find_in_place(key: &CtKey, now: u64) -> Option<Entry> {
    live(entry(key), now)
}

/// Returns the entry of a key that is on the stack or in a map value, live or expired.
#[inline(always)]
pub fn entry(key: &CtKey) -> Option<Entry> {
    // SAFETY: the pointer is to a map value that the running program has just looked up.
    unsafe { Entry::new(CONNTRACK.get_ptr_mut(key)?) }
}

#[inline(always)]
fn live(entry: Option<Entry>, now: u64) -> Option<Entry> {
    match entry {
        Some(entry) if entry.expires() > now => Some(entry),
        _ => None,
    }
}

/// Returns whether a packet is in the reply direction of the flow. `ingress`: the packet goes to the endpoint.
#[inline(always)]
pub fn is_reply(entry: Entry, ingress: bool) -> bool {
    (entry.flags() & ct_flags::INGRESS != 0) != ingress
}

/// Returns whether a connection was reset, or closed by both ends.
#[inline(always)]
fn is_closing(forward: u8, reply: u8) -> bool {
    (forward | reply) & tcp_flags::RST != 0 || forward & reply & tcp_flags::FIN != 0
}

/// Returns whether the packet opens a new connection with the addresses and ports of the entry.
///
/// A bare SYN after the end of a connection reuses its ports. A bare SYN in the reply direction opens a connection in
/// the opposite direction, unless it is a simultaneous open (RFC 9293, section 3.5, figure 7; see
/// [`is_simultaneous_open`]).
///
/// An inspected connection ends only when its inspector closes it ([`CtEntry::over`]); until then each SYN goes to the
/// inspector. Otherwise a forged RST and a forged SYN, both with wrong checksums, would replace the entry of a live
/// connection.
#[inline(always)]
pub fn begins_another(entry: Entry, packet: &Packet, ingress: bool) -> bool {
    if !is_bare_syn(packet) {
        return false;
    }
    if entry.inspector() != 0 && !is_intercepted(entry) {
        return entry.over() != 0;
    }
    let (forward, reply) = (entry.forward_tcp(), entry.reply_tcp());
    is_closing(forward, reply) || (is_reply(entry, ingress) && (forward | reply) & tcp_flags::ACK != 0)
}

/// Returns whether the packet opens a TCP connection: SYN without ACK.
#[inline(always)]
pub fn is_bare_syn(packet: &Packet) -> bool {
    packet.protocol == protocol::TCP
        && packet.tcp_flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN
        && !packet.is(flags::FRAGMENT_LATER)
}

/// Returns whether the packet is a SYN of the answering side of a flow without an inspector: either both ends opened
/// the connection at once, or the source address of the first SYN was forged.
#[inline(always)]
pub fn is_simultaneous_open(entry: Entry, packet: &Packet, ingress: bool) -> bool {
    is_bare_syn(packet) && entry.inspector() == 0 && is_reply(entry, ingress)
}

/// Returns whether the flow has an inspector that needs the packet. The offload windows are checked later
/// (`offload.rs`). An inspector needs each SYN, even of an offloaded flow: the SYN can open a new connection with the
/// same addresses and ports, on which there is no verdict yet.
#[inline(always)]
pub fn is_inspected(entry: Entry, packet: &Packet) -> bool {
    entry.inspector() != 0
        && (!entry.is_offloaded()
            || (packet.protocol == protocol::TCP && packet.tcp_flags & tcp_flags::SYN != 0))
}

/// Returns whether the proxy terminates the flow. Its packets do not reach a worker's inspector, so the programs keep
/// the state of the connection as for a flow without an inspector.
#[inline(always)]
pub fn is_intercepted(entry: Entry) -> bool {
    entry.inspector() == Inspector::TlsTerminate as u8
}

/// Returns the idle timeout of a flow, ns. `closing`: the connection was reset, or closed by both ends.
#[inline(always)]
fn timeout(config: &Config, protocol: u8, flow_flags: u8, forward_tcp: u8, closing: bool) -> u64 {
    match protocol {
        protocol::TCP if closing => config.tcp_closing,
        // A SYN+ACK does not show that the opener exists, because the source of the SYN can be forged. The opener's ACK
        // shows it.
        protocol::TCP if flow_flags & ct_flags::REPLIED != 0 && forward_tcp & tcp_flags::ACK != 0 => {
            config.tcp_established
        }
        protocol::TCP => config.tcp_opening,
        protocol::UDP | protocol::SCTP => config.udp,
        _ => config.other,
    }
}

/// Returns whether both ends use the flow, so that new flows must not evict it. TCP: the opener has acknowledged the
/// SYN+ACK, and the connection is not closing. The SYN+ACK is not enough, because a forged SYN causes one too. Other
/// protocols: the flow has been answered and is older than [`SETTLES_AFTER`].
#[inline(always)]
fn is_settled(protocol: u8, flow_flags: u8, forward_tcp: u8, reply_tcp: u8, age: u64) -> bool {
    if flow_flags & ct_flags::REPLIED == 0 {
        return false;
    }
    if protocol == protocol::TCP {
        forward_tcp & tcp_flags::ACK != 0 && !is_closing(forward_tcp, reply_tcp)
    } else {
        age >= SETTLES_AFTER
    }
}

/// Protects the flow if both ends use it, and ends the protection of a flow that is closing.
#[inline(always)]
pub fn set_protected(pkt: &PacketContext, entry: Entry) {
    let age = pkt.now.saturating_sub(entry.created());
    let protocol = pkt.headers.protocol;
    let settled = is_settled(
        protocol,
        entry.flags(),
        entry.forward_tcp(),
        entry.reply_tcp(),
        age,
    );
    if settled != (entry.protected() != 0) {
        share::set_protected(&pkt.key, entry, u32::from(settled));
    }
}

/// Ends the protection of a flow and gives the flow a slot of its share instead.
#[inline(always)]
pub fn unprotect(key: &CtKey, entry: Entry) {
    if entry.protected() != 0 {
        share::set_protected(key, entry, 0);
    }
}

/// Marks an inspected connection as over.
#[inline(always)]
pub fn close(key: &CtKey, entry: Entry) {
    if let Some(config) = CONFIG.get(0) {
        entry.set_forward_tcp(entry.forward_tcp() | tcp_flags::RST);
        entry.set_over(1);
        unprotect(key, entry);
        let expires = now() + config.tcp_closing;
        if expires < entry.expires() {
            entry.set_expires(expires);
        }
    }
}

/// Marks an inspected connection as established: the opener has acknowledged the SYN+ACK.
#[inline(always)]
pub fn opened(entry: Entry) {
    let (forward, reply) = (entry.forward_tcp(), entry.reply_tcp());
    if let Some(config) = CONFIG.get(0)
        && !is_closing(forward, reply)
    {
        entry.set_forward_tcp(forward | tcp_flags::SYN | tcp_flags::ACK);
        entry.set_reply_tcp(reply | tcp_flags::SYN | tcp_flags::ACK);
        entry.set_flags(entry.flags() | ct_flags::REPLIED);
        entry.set_expires(now() + config.tcp_established);
    }
}

/// Reuses an entry for a new connection with the same addresses and ports, whose SYN has been answered.
#[inline(always)]
pub fn replace(key: &CtKey, entry: Entry, serial: u32) {
    if let Some(config) = CONFIG.get(0) {
        // The serial changes before all other fields, because the decisions for the old connection are valid only with
        // its serial.
        entry.set_serial(serial);
        entry.set_decided(0);
        entry.set_over(0);
        entry.set_forward_tcp(tcp_flags::SYN);
        entry.set_reply_tcp(tcp_flags::SYN | tcp_flags::ACK);
        entry.set_flags(entry.flags() & !(ct_flags::MIDSTREAM | ct_flags::SEEDED | ct_flags::CLOSED));
        entry.set_expires(now() + config.tcp_opening);
        // A half-open connection is not protected, like any new flow.
        unprotect(key, entry);
    }
}

/// Updates the entry for a packet that passes. `is_inspected`: a worker inspects the packet. If true, the packet's TCP
/// flags do not change the entry: only the inspector knows whether the receiver accepts the segment.
#[inline(always)]
pub fn note<C: Calls>(ctx: C, pkt: &mut PacketContext, entry: Entry, is_inspected: bool) {
    let Some(config) = CONFIG.get(0) else { return };
    let packet = &pkt.headers;
    let old_flags = entry.flags();
    let reply = (old_flags & ct_flags::INGRESS != 0) != pkt.is_ingress();
    let mut flow_flags = old_flags;
    let (mut forward_tcp, mut reply_tcp) = (entry.forward_tcp(), entry.reply_tcp());
    let has_state = packet.protocol == protocol::TCP && !is_inspected && !packet.is(flags::FRAGMENT_LATER);
    entry.count(reply, packet.length);
    let mut seen = packet.tcp_flags & STATE_FLAGS;
    // An end that sends a packet without RST has not reset the connection, so an earlier RST from that end was forged.
    // A forged RST thus shortens the timeout only until the next packet from that end. After a real RST no such packet
    // comes, and the entry expires.
    if reply {
        flow_flags |= ct_flags::REPLIED;
        if has_state {
            reply_tcp = (reply_tcp & !tcp_flags::RST) | seen;
            entry.set_reply_tcp(reply_tcp);
        }
    } else {
        if has_state {
            // An ACK before any reply acknowledges nothing and does not complete the handshake.
            if forward_tcp & tcp_flags::SYN != 0 && reply_tcp == 0 {
                seen &= !tcp_flags::ACK;
            }
            forward_tcp = (forward_tcp & !tcp_flags::RST) | seen;
            entry.set_forward_tcp(forward_tcp);
        }
    }
    let closing = is_closing(forward_tcp, reply_tcp);
    if closing && flow_flags & ct_flags::CLOSED == 0 {
        flow_flags |= ct_flags::CLOSED;
        entry.set_flags(flow_flags);
        entry.set_expires(pkt.now + timeout(config, packet.protocol, flow_flags, forward_tcp, true));
        ctx.set_protected(pkt, entry);
        return ctx.trace(pkt, entry, TracePoint::End);
    }
    if flow_flags != old_flags {
        entry.set_flags(flow_flags);
    }
    entry.set_expires(pkt.now + timeout(config, packet.protocol, flow_flags, forward_tcp, closing));
    if flow_flags & ct_flags::REPLIED != 0 && entry.protected() == 0 {
        ctx.set_protected(pkt, entry);
    }
    let interval = config.trace_interval;
    if interval != 0 && pkt.now.saturating_sub(entry.reported()) >= interval {
        ctx.trace(pkt, entry, TracePoint::Interval);
    }
}

/// Reports a flow.
#[inline(always)]
pub fn trace<C: Calls>(ctx: C, pkt: &mut PacketContext, entry: Entry, point: u32) {
    entry.set_reported(pkt.now);
    pkt.rule = entry.rule();
    pkt.match_kind = entry.match_kind();
    pkt.remote_identity = entry.remote_identity();
    pkt.event_flags = direction_flags(entry, pkt.is_ingress());
    pkt.set(Reason::Established);
    ctx.send(pkt, event::what_trace(point), entry.as_ptr());
}

/// Returns the event flags of a packet that belongs to a flow.
#[inline(always)]
pub fn direction_flags(entry: Entry, ingress: bool) -> u8 {
    let flow_flags = entry.flags();
    let mut out = 0;
    if (flow_flags & ct_flags::INGRESS != 0) != ingress {
        out |= event_flags::REPLY;
    }
    if flow_flags & ct_flags::INGRESS == 0 {
        out |= event_flags::FLOW_EGRESS;
    }
    if flow_flags & ct_flags::AUDIT != 0 {
        out |= event_flags::AUDIT;
    }
    out
}

/// Draws the serial of a new flow and takes a slot of the share for the flow. Returns 0 if the endpoint has no share.
/// This function is not part of [`insert`], because one stack frame has no room for both.
#[inline(always)]
pub fn claim_slot(pkt: &mut PacketContext) -> u32 {
    pkt.serial = share::random();
    let egress = u32::from(pkt.flow_flags & ct_flags::INGRESS == 0);
    share::claim_slot(&pkt.key, egress, pkt.now, pkt.serial)
}

/// Creates the entry of a flow that has a slot. Sets the verdict only on failure.
#[inline(never)]
pub fn insert(pkt: &mut PacketContext) {
    let Some(config) = CONFIG.get(0) else {
        return pkt.set(Reason::CtInsertionFailed);
    };
    let packet = &pkt.headers;
    // The value that `timeout` returns for a new flow: unanswered, and not closing, because a reset creates no flow.
    let lifetime = match packet.protocol {
        protocol::TCP => config.tcp_opening,
        protocol::UDP | protocol::SCTP => config.udp,
        _ => config.other,
    };
    let now = pkt.now;
    let mut entry = CtEntry {
        expires: now + lifetime,
        created: now,
        reported: now,
        forward_packets: 1,
        forward_bytes: u64::from(packet.length),
        revision: pkt.revision,
        rule: pkt.rule,
        remote_identity: pkt.remote_identity,
        ..CtEntry::default()
    };
    // The fence splits the initialization. Otherwise LLVM would load all fields first and spill them, and the deepest
    // chain of calls has no stack left for the spilled registers
    // (`no_call_chain_exceeds_the_stack_of_the_oldest_kernel`).
    compiler_fence(Ordering::SeqCst);
    entry.ifindex = pkt.ifindex;
    entry.flags = pkt.flow_flags;
    entry.forward_tcp = pkt.headers.tcp_flags & STATE_FLAGS;
    entry.match_kind = pkt.match_kind;
    entry.serial = pkt.serial;
    entry.ruleset = pkt.ruleset;
    entry.inspector = pkt.inspector;
    entry.punt_flags = pkt.punt_flags;
    // The verifier of Linux 6.1 accepts a key on the stack, but not in the packet context; see `lookup`.
    let key = pkt.key;
    // An entry that replaces another one does not add to the map, so it is not counted.
    if CONNTRACK.insert(&key, &entry, u64::from(BPF_NOEXIST)).is_ok() {
        counters::conntrack_created();
    } else {
        release_protection(&key);
        if CONNTRACK.insert(&key, &entry, 0).is_err() {
            pkt.set(Reason::CtInsertionFailed);
        }
    }
}

/// Ends the protection of an entry that is about to be overwritten. The key is on the stack of the caller.
#[inline(never)]
fn release_protection(key: &CtKey) -> u32 {
    if let Some(old) = entry(key) {
        share::release_protection(key, old);
    }
    0
}

/// Counts a packet of a flow at the flow's rule.
#[inline(always)]
pub fn count(entry: Entry, packet: &Packet) {
    counters::rule(entry.rule(), packet.length);
}
