//! Connections. One entry for both directions of a flow, for each endpoint whose policy lets it through.
//!
//! Entries are changed in place without atomics: when two CPUs handle one flow a count may get lost, and the
//! last one's time and flags stay. Nothing that a verdict depends on is written so, but the TCP flags, and a
//! connection whose end was overlooked by that dies of its timeout.

use core::sync::atomic::{Ordering, compiler_fence};

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_coarse_ns};
use palisade_abi::{
    Config, CtEntry, CtKey, EventKind, Reason, TracePoint, ct_flags, event_flags, protocol, tcp_flags,
};
use palisade_packet::{Packet, flags};

use crate::counters;
use crate::ctx::Context;
use crate::event;
use crate::maps::{CLOCK, CONFIG, CONNTRACK};
use crate::packet_context::PacketContext;
use crate::share;

/// A flow without a handshake is protected once the other side has answered and it has lasted this long, ns. A question
/// and its answer take less.
const SETTLES_AFTER: u64 = 2_000_000_000;

/// The flags that say something about a connection's state.
pub const STATE_FLAGS: u8 = tcp_flags::FIN | tcp_flags::SYN | tcp_flags::RST | tcp_flags::ACK;

/// The clock of all timeouts: the coarse monotonic clock, which advances with the tick. Asking the kernel for it
/// costs 13 of the 100 ns that a packet of a known flow takes, so each CPU asks once a jiffy. It may lag by a tick.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: takes and changes nothing.
    let jiffy = unsafe { bpf_jiffies64() };
    let clock = CLOCK.get_ptr_mut(0);
    if let Some(clock) = clock {
        // SAFETY: a map value of this CPU, which lives as long as the map.
        let clock = unsafe { &*clock };
        if clock.jiffy == jiffy {
            return clock.time;
        }
    }
    // SAFETY: as above.
    unsafe {
        let now = bpf_ktime_get_coarse_ns();
        if let Some(clock) = clock {
            (*clock).time = now;
            (*clock).jiffy = jiffy;
        }
        now
    }
}

/// One end of a flow in each role, as a packet or a quoted packet names them.
#[derive(Clone, Copy)]
pub struct Ends<'a> {
    /// Addresses.
    pub source: &'a palisade_abi::Addr,
    /// Addresses.
    pub destination: &'a palisade_abi::Addr,
    /// Ports.
    pub source_port: u16,
    /// Ports.
    pub destination_port: u16,
    /// ICMP echo identifier.
    pub echo_id: u16,
    /// IP protocol.
    pub protocol: u8,
    /// `palisade_packet::flags`.
    pub flags: u8,
}

/// Writes the key of a packet that goes to (`ingress`) or comes from `endpoint`.
#[inline(always)]
pub fn write_key(key: &mut CtKey, endpoint: u32, ingress: bool, ends: Ends<'_>) {
    key.endpoint = endpoint as u16;
    key.protocol = ends.protocol;
    let (mut source_port, mut destination_port) = match ends.protocol {
        protocol::TCP | protocol::UDP | protocol::SCTP => (ends.source_port, ends.destination_port),
        _ => (0, 0),
    };
    if ends.flags & (flags::ECHO_REQUEST | flags::ECHO_REPLY) != 0 {
        // The second port says who asked: 0 the endpoint, 1 the other end.
        let asked_by_other = u16::from((ends.flags & flags::ECHO_REQUEST != 0) == ingress);
        (source_port, destination_port) = if ingress {
            (asked_by_other, ends.echo_id)
        } else {
            (ends.echo_id, asked_by_other)
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

/// The ends of a packet.
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

/// Returns the entry of a key, dead or alive; null without one.
///
/// The key is copied to the stack of a function of its own. [`PacketContext`] is memory of a global function's parameter, and
/// the verifier of Linux 6.1 takes a map key from the stack, a packet or a map value only. The copy would take 40 bytes
/// of every caller's stack, and the longest chain of calls leaves no room for them.
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
pub fn find(key: &CtKey, now: u64) -> Option<&'static mut CtEntry> {
    live(lookup(key), now)
}

/// The same for a key that is on the stack of the program's main function, where no verifier wants a copy of it. A call
/// less: a known flow's packet takes few calls, and where the kernel makes returns safe from speculation (SRSO,
/// retbleed) each costs some nanoseconds.
#[inline(always)]
pub fn find_in_place(key: &CtKey, now: u64) -> Option<&'static mut CtEntry> {
    live(CONNTRACK.get_ptr_mut(key)?, now)
}

#[inline(always)]
fn live(entry: *mut CtEntry, now: u64) -> Option<&'static mut CtEntry> {
    if entry.is_null() {
        return None;
    }
    // SAFETY: a value of an LRU map stays readable and writable while the program runs (RCU); if it is given to
    // another key meanwhile, what is written is overwritten or is a wrong count of a new entry.
    let entry = unsafe { &mut *entry };
    if entry.expires > now { Some(entry) } else { None }
}

/// Whether a packet with the entry's direction `ingress` answers the flow.
#[inline(always)]
pub fn is_reply(entry: &CtEntry, ingress: bool) -> bool {
    (entry.flags & ct_flags::INGRESS != 0) != ingress
}

/// Whether a connection has been reset, or closed by both sides.
#[inline(always)]
fn is_closing(forward: u8, reply: u8) -> bool {
    (forward | reply) & tcp_flags::RST != 0 || forward & reply & tcp_flags::FIN != 0
}

/// Whether the packet begins another connection than the one of the entry it hits.
///
/// A bare SYN on a connection that is over re-uses its ports. A bare SYN of the answering side is a connection
/// in the other direction, unless both sides open at the same time (RFC 9293, 3.5, figure 7: see [`crosses`]).
///
/// A connection that is read is over when its inspector says so, and until then each SYN goes to the inspector:
/// otherwise a forged reset and a forged SYN, both with wrong checksums, would replace the entry of a live connection.
#[inline(always)]
pub fn begins_another(entry: &CtEntry, packet: &Packet, ingress: bool) -> bool {
    if !is_bare_syn(packet) {
        return false;
    }
    if entry.inspector != 0 {
        return entry.over != 0;
    }
    if is_closing(entry.forward_tcp, entry.reply_tcp) {
        return true;
    }
    is_reply(entry, ingress) && (entry.forward_tcp | entry.reply_tcp) & tcp_flags::ACK != 0
}

/// Whether the packet opens a connection.
#[inline(always)]
pub fn is_bare_syn(packet: &Packet) -> bool {
    packet.protocol == protocol::TCP
        && packet.tcp_flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN
        && !packet.is(flags::FRAGMENT_LATER)
}

/// Whether the packet is the SYN of the side that is to answer, where nothing has been acknowledged and nothing is
/// read: both sides open at the same time, or the first SYN was forged in the name of the other end.
#[inline(always)]
pub fn crosses(entry: &CtEntry, packet: &Packet, ingress: bool) -> bool {
    is_bare_syn(packet) && entry.inspector == 0 && is_reply(entry, ingress)
}

/// Whether the inspector of the flow, if it has one, needs to see the packet, as far as the program can say without
/// looking at windows. A SYN always: it may be the begin of another connection by the same ports, for which nothing has
/// been decided.
#[inline(always)]
pub fn is_inspected(entry: &CtEntry, packet: &Packet) -> bool {
    entry.inspector != 0
        && (!entry.is_unread()
            || (packet.protocol == protocol::TCP && packet.tcp_flags & tcp_flags::SYN != 0))
}

/// How long a flow in this state lives without a packet.
#[inline(always)]
fn timeout(config: &Config, protocol: u8, flow_flags: u8, forward_tcp: u8, reply_tcp: u8) -> u64 {
    match protocol {
        protocol::TCP if is_closing(forward_tcp, reply_tcp) => config.tcp_closing,
        // An answered SYN proves nothing: its source may be forged. The opener's acknowledgment does.
        protocol::TCP if flow_flags & ct_flags::REPLIED != 0 && forward_tcp & tcp_flags::ACK != 0 => {
            config.tcp_established
        }
        protocol::TCP => config.tcp_opening,
        protocol::UDP | protocol::SCTP => config.udp,
        _ => config.other,
    }
}

/// Whether both ends use the flow, so that it is worth more than a new one. TCP: the opener has acknowledged what the
/// other side said; a SYN is answered also if it is forged. What has no handshake: it has been answered and goes on.
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

/// Protects the flow if both ends use it by now, and ends the protection of a flow that is closing.
#[inline(never)]
fn set_protected(frame: &PacketContext, entry: &mut CtEntry) -> u32 {
    let age = frame.now.saturating_sub(entry.created);
    let protocol = frame.packet.protocol;
    let settled = is_settled(protocol, entry.flags, entry.forward_tcp, entry.reply_tcp, age);
    if settled != (entry.protected != 0) {
        share::set_protected(&frame.key, entry, u32::from(settled));
    }
    0
}

/// Has a flow give up the place of one that both ends use.
#[inline(always)]
pub fn unprotect(key: &CtKey, entry: &mut CtEntry) {
    if entry.protected != 0 {
        share::set_protected(key, entry, 0);
    }
}

/// Notes that a connection that is read is over.
#[inline(always)]
pub fn close(key: &CtKey, entry: &mut CtEntry) {
    if let Some(config) = CONFIG.get(0) {
        entry.forward_tcp |= tcp_flags::RST;
        entry.over = 1;
        unprotect(key, entry);
        let expires = now() + config.tcp_closing;
        if expires < entry.expires {
            entry.expires = expires;
        }
    }
}

/// Notes that the opener of a connection that is read has acknowledged the answer.
#[inline(always)]
pub fn opened(entry: &mut CtEntry) {
    if let Some(config) = CONFIG.get(0)
        && !is_closing(entry.forward_tcp, entry.reply_tcp)
    {
        entry.forward_tcp |= tcp_flags::SYN | tcp_flags::ACK;
        entry.reply_tcp |= tcp_flags::SYN | tcp_flags::ACK;
        entry.flags |= ct_flags::REPLIED;
        entry.expires = now() + config.tcp_established;
    }
}

/// Gives an entry to another connection by the same ports, whose SYN has just been answered.
#[inline(always)]
pub fn replace(key: &CtKey, entry: &mut CtEntry, serial: u32) {
    if let Some(config) = CONFIG.get(0) {
        // First of all: what was decided for the old one holds only together with its serial.
        // SAFETY: an aligned field of the entry; other CPUs read it meanwhile, hence volatile: one store.
        unsafe { core::ptr::write_volatile(&raw mut entry.serial, serial) };
        entry.decided = 0;
        entry.over = 0;
        entry.forward_tcp = tcp_flags::SYN;
        entry.reply_tcp = tcp_flags::SYN | tcp_flags::ACK;
        entry.flags &= !(ct_flags::MIDSTREAM | ct_flags::SEEDED | ct_flags::CLOSED);
        entry.expires = now() + config.tcp_opening;
        // Half open, it has the place of a new flow.
        unprotect(key, entry);
    }
}

/// Notes a packet of a flow that is let through. `is_read`: its inspector sees it. Then it says nothing about the state
/// of the connection here: only the inspector knows whether the receiver would take it.
#[inline(always)]
pub fn note<C: Context>(ctx: C, frame: &mut PacketContext, entry: &mut CtEntry, is_inspected: bool) {
    let Some(config) = CONFIG.get(0) else { return };
    let packet = &frame.packet;
    let reply = is_reply(entry, frame.is_ingress());
    let mut flow_flags = entry.flags;
    if reply {
        flow_flags |= ct_flags::REPLIED;
        entry.reply_packets += 1;
        entry.reply_bytes += u64::from(packet.length);
    } else {
        entry.forward_packets += 1;
        entry.forward_bytes += u64::from(packet.length);
    }
    let (mut forward_tcp, mut reply_tcp) = (entry.forward_tcp, entry.reply_tcp);
    if packet.protocol == protocol::TCP && !is_inspected && !packet.is(flags::FRAGMENT_LATER) {
        // A side that goes on sending has not reset the connection: somebody else claimed that it had. So a
        // forged reset shortens a timeout until the next packet, and a real one until the entry is gone.
        let mut seen = packet.tcp_flags & STATE_FLAGS;
        if reply {
            reply_tcp = (reply_tcp & !tcp_flags::RST) | seen;
            entry.reply_tcp = reply_tcp;
        } else {
            // What acknowledges an answer that has not come opens nothing.
            if forward_tcp & tcp_flags::SYN != 0 && reply_tcp == 0 {
                seen &= !tcp_flags::ACK;
            }
            forward_tcp = (forward_tcp & !tcp_flags::RST) | seen;
            entry.forward_tcp = forward_tcp;
        }
    }
    let ended = flow_flags & ct_flags::CLOSED == 0 && is_closing(forward_tcp, reply_tcp);
    if ended {
        flow_flags |= ct_flags::CLOSED;
    }
    if flow_flags != entry.flags {
        entry.flags = flow_flags;
    }
    entry.expires = frame.now + timeout(config, packet.protocol, flow_flags, forward_tcp, reply_tcp);
    if ended || (entry.protected == 0 && flow_flags & ct_flags::REPLIED != 0) {
        set_protected(frame, entry);
    }
    let interval = config.trace_interval;
    if ended || (interval != 0 && frame.now.saturating_sub(entry.reported) >= interval) {
        entry.reported = frame.now;
        trace(
            ctx,
            frame,
            entry,
            if ended {
                TracePoint::End
            } else {
                TracePoint::Interval
            },
        );
    }
}

/// Reports a flow.
#[inline(always)]
fn trace<C: Context>(ctx: C, frame: &mut PacketContext, entry: &CtEntry, point: TracePoint) {
    frame.rule = entry.rule;
    frame.match_kind = entry.match_kind;
    frame.remote_identity = entry.remote_identity;
    frame.event_flags = direction_flags(entry, frame.is_ingress());
    frame.set(Reason::Established);
    ctx.send(frame, event::what(EventKind::Trace, point), entry);
}

/// The event flags that an entry gives a packet.
#[inline(always)]
pub fn direction_flags(entry: &CtEntry, ingress: bool) -> u8 {
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

/// Takes a slot for the flow whose first packet is `frame`'s, and gives it its serial. Returns 0 if there is none. A
/// function beside [`insert`] and not in it for the stack that both take.
#[inline(always)]
pub fn claim_slot(frame: &mut PacketContext) -> u32 {
    frame.serial = share::random();
    let egress = u32::from(frame.flow_flags & ct_flags::INGRESS == 0);
    share::claim_slot(&frame.key, egress, frame.now, frame.serial)
}

/// Makes the entry of a flow that has a slot. The verdict changes only if the map takes nothing.
#[inline(never)]
pub fn insert(frame: &mut PacketContext) {
    let Some(config) = CONFIG.get(0) else {
        return frame.set(Reason::CtInsertionFailed);
    };
    let packet = &frame.packet;
    // No answer has been seen, and a reset begins nothing.
    let lifetime = match packet.protocol {
        protocol::TCP => config.tcp_opening,
        protocol::UDP | protocol::SCTP => config.udp,
        _ => config.other,
    };
    let now = frame.now;
    let mut entry = CtEntry {
        expires: now + lifetime,
        created: now,
        reported: now,
        forward_packets: 1,
        forward_bytes: u64::from(packet.length),
        revision: frame.revision,
        rule: frame.rule,
        remote_identity: frame.remote_identity,
        ..CtEntry::default()
    };
    // Half of the fields at a time: LLVM loads all of them first and spills them, and the longest chain of calls leaves no
    // room for that many on the stack (`no_chain_of_calls_takes_more_stack_than_the_oldest_kernel_gives`).
    compiler_fence(Ordering::SeqCst);
    entry.ifindex = frame.ifindex;
    entry.flags = frame.flow_flags;
    entry.forward_tcp = frame.packet.tcp_flags & STATE_FLAGS;
    entry.match_kind = frame.match_kind;
    entry.serial = frame.serial;
    entry.ruleset = frame.ruleset;
    entry.inspector = frame.inspector;
    entry.punt_flags = frame.punt_flags;
    // On the stack, as in `lookup`.
    let key = frame.key;
    // What takes the place of a flow that is over adds nothing to the map.
    if CONNTRACK.insert(&key, &entry, u64::from(BPF_NOEXIST)).is_ok() {
        counters::conntrack_created();
    } else {
        release_protection(&key);
        if CONNTRACK.insert(&key, &entry, 0).is_err() {
            frame.set(Reason::CtInsertionFailed);
        }
    }
}

/// The entry of a key is about to be overwritten. The key is on the stack of the caller.
#[inline(never)]
fn release_protection(key: &CtKey) -> u32 {
    if let Some(old) = CONNTRACK.get_ptr_mut(key) {
        // SAFETY: see `find`.
        share::release_protection(key, unsafe { &mut *old });
    }
    0
}

/// Counts a packet of a flow to the flow's rule.
#[inline(always)]
pub fn count(entry: &CtEntry, packet: &Packet) {
    counters::rule(entry.rule, packet.length);
}
