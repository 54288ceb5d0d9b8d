//! Packets to the workers and back: what stands before them, what stands behind them (`palisade_abi::punt`).

use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action};
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_skb_change_tail, bpf_skb_load_bytes};
use palisade_abi::{
    Addr, CtEntry, CtKey, Direction, FlowCommand, PuntRequest, Reason, ReinjectTrailer, config_flags,
    ct_flags, flow_op, protocol, punt_flags, reinject_flags, reinject_path, tcp_flags,
};
use palisade_packet::{Bytes, flags};

use crate::conntrack;
use crate::counters;
use crate::ctx::{Context, Skb, Xdp};
use crate::maps::{CONFIG, CONNTRACK, PUNT, WORKERS, XSKS};
use crate::packet_context::PacketContext;

/// Notes that a policy wants a packet of an older flow read.
#[inline(always)]
pub fn request_punt_of_flow<C: Context>(ctx: C, frame: &mut PacketContext, entry: &CtEntry) {
    check_window(ctx, frame, entry);
    let mut flags = 0;
    if conntrack::is_reply(entry, frame.is_ingress()) {
        flags |= punt_flags::REPLY;
    }
    if entry.flags & ct_flags::MIDSTREAM != 0 {
        flags |= punt_flags::MIDSTREAM;
    }
    frame.rule = entry.rule;
    frame.ruleset = entry.ruleset;
    frame.remote_identity = entry.remote_identity;
    frame.serial = entry.serial;
    frame.inspector = entry.inspector;
    frame.punt_flags = entry.punt_flags;
    request_punt(frame, flags);
}

/// Notes that a policy wants a packet read.
#[inline(never)]
pub fn request_punt(frame: &mut PacketContext, flags: u8) -> u32 {
    let Some(carried) = PUNT.get_ptr_mut(0) else {
        return 0;
    };
    let mut flags = flags | frame.punt_flags;
    if frame.is_ingress() {
        flags |= punt_flags::INGRESS;
    }
    let slot = PuntRequest {
        rule: frame.rule,
        ruleset: frame.ruleset,
        remote_identity: frame.remote_identity,
        revision: frame.revision,
        serial: frame.serial,
        endpoint: frame.endpoint as u16,
        inspector: frame.inspector,
        flags,
    };
    // SAFETY: a map value of this CPU, which lives as long as the map. Nobody else writes it while this packet is
    // judged: a program is not interrupted by another of its CPU.
    unsafe {
        if frame.punt_requests == 0 {
            (*carried).slots[0] = slot;
            frame.hash = hash(&frame.key);
        } else {
            (*carried).slots[1] = slot;
        }
    }
    frame.punt_requests += 1;
    0
}

/// One round: a multiplication spreads upwards, the shift brings the upper bits down.
#[inline(always)]
fn mix(hash: u32, word: u32) -> u32 {
    let product = (hash ^ word).wrapping_mul(0x9e37_79b1);
    product ^ product >> 15
}

#[inline(always)]
fn end(seed: u32, addr: &Addr, port: u16) -> u32 {
    let [a, b, c, d] = addr.0;
    mix(mix(mix(mix(mix(seed, a), b), c), d), u32::from(port))
}

/// The same for both directions, and for both endpoints that a flow may have at one interface: whichever of them still
/// wants it read, it goes to one worker. Seeded, or a peer could choose its worker.
#[inline(always)]
fn hash(key: &CtKey) -> u32 {
    let seed = match CONFIG.get(0) {
        Some(config) => config.cookie as u32,
        None => 0,
    };
    let local = end(seed, &key.local, key.local_port);
    let remote = end(seed, &key.remote, key.remote_port);
    mix(local.wrapping_add(remote), u32::from(key.protocol))
}

/// Both bounds of a window by one load, so that nobody sees one old and one new.
#[inline(always)]
fn window(entry: &CtEntry, reply: bool) -> (u32, u32) {
    let at = &raw const entry.windows[if reply { 2 } else { 0 }];
    // SAFETY: two fields that lie together at a multiple of eight bytes; others may write them meanwhile, hence
    // volatile.
    let word = unsafe { core::ptr::read_volatile(at.cast::<u64>()) }.to_ne_bytes();
    (
        u32::from_ne_bytes([word[0], word[1], word[2], word[3]]),
        u32::from_ne_bytes([word[4], word[5], word[6], word[7]]),
    )
}

/// Sets each window by one store.
#[inline(always)]
pub fn set_windows(entry: &mut CtEntry, windows: [u32; 4]) {
    for at in [0, 2] {
        let (from, to) = (windows[at].to_ne_bytes(), windows[at + 1].to_ne_bytes());
        let word = u64::from_ne_bytes([from[0], from[1], from[2], from[3], to[0], to[1], to[2], to[3]]);
        // SAFETY: see `window`.
        unsafe { core::ptr::write_volatile((&raw mut entry.windows[at]).cast::<u64>(), word) };
    }
}

/// Notes that the flow's inspector needs the packet, if it does. Both flows of a packet keep their slots: what the one
/// does not need, the other may.
#[inline(never)]
fn check_window<C: Context>(ctx: C, frame: &mut PacketContext, entry: &CtEntry) -> u32 {
    if !is_in_window(ctx, frame, entry) {
        frame.must_punt = true;
    }
    0
}

/// Whether the inspector of the flow has said that it need not see this packet: a segment whose bytes all lie in the
/// window of its direction, or an acknowledgment without data while the other direction has a window.
#[inline(always)]
fn is_in_window<C: Context>(ctx: C, frame: &PacketContext, entry: &CtEntry) -> bool {
    let packet = &frame.packet;
    if packet.protocol != protocol::TCP
        || packet.is(flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER)
        || packet.tcp_flags
            & (tcp_flags::ACK | tcp_flags::SYN | tcp_flags::FIN | tcp_flags::RST | tcp_flags::URG)
            != tcp_flags::ACK
    {
        return false;
    }
    let reply = conntrack::is_reply(entry, frame.is_ingress());
    let (from, to) = window(entry, reply);
    let (other_from, other_to) = window(entry, !reply);
    if from == to && other_from == other_to {
        return false;
    }
    // The order that made these very windows, for this very connection.
    let windows = if reply {
        [other_from, other_to, from, to]
    } else {
        [from, to, other_from, other_to]
    };
    if entry.decided != CtEntry::windowed(entry.serial, entry.ruleset, entry.punt_flags, windows) {
        return false;
    }
    let bytes = ctx.bytes(false);
    let Some(header) = bytes.array::<14>(u32::from(packet.transport_offset)) else {
        return false;
    };
    let headers = u32::from(packet.transport_offset)
        .wrapping_sub(u32::from(packet.network_offset))
        .wrapping_add(u32::from(header[12] >> 4) * 4);
    if headers > packet.length {
        return false;
    }
    let payload = packet.length - headers;
    if payload == 0 {
        // The inspector wants to know when the other side has all of it.
        let acked = u32::from_be_bytes([header[8], header[9], header[10], header[11]]);
        let room = other_to.wrapping_sub(other_from);
        return room < 1 << 31 && acked.wrapping_sub(other_from) < room;
    }
    let room = to.wrapping_sub(from);
    let at = u32::from_be_bytes([header[4], header[5], header[6], header[7]]).wrapping_sub(from);
    room < 1 << 31 && at < room && payload <= room - at
}

/// Sends a packet to the worker of its flow. The verdict changes if that cannot be done, and to
/// [`Reason::FailedOpen`] if the packet is to pass then.
#[inline(always)]
pub fn punt<C: Context>(ctx: C, frame: &mut PacketContext) {
    let (Some(config), Some(carried)) = (CONFIG.get(0), PUNT.get_ptr_mut(0)) else {
        return frame.set(Reason::PuntFailed);
    };
    if frame.layer3 != 0 || frame.generic != 0 {
        return frame.set(Reason::PuntUnsupported);
    }
    let queue = if config.workers == 0 {
        0
    } else {
        frame.hash % config.workers
    };
    let heartbeat = match WORKERS.get_ptr(queue) {
        // SAFETY: an aligned word of a map; user space writes it meanwhile, hence volatile.
        Some(heartbeat) => unsafe { core::ptr::read_volatile(heartbeat) },
        None => 0,
    };
    // A worker may have looked at the clock after this CPU did.
    if config.punt_ifindex == 0 || frame.now.saturating_sub(heartbeat) > config.worker_timeout {
        return frame.set(if config.flags & config_flags::FAIL_OPEN != 0 {
            Reason::FailedOpen
        } else {
            Reason::NoWorker
        });
    }
    // SAFETY: see `ask`.
    let carried = unsafe { &mut *carried };
    carried.cookie = config.cookie;
    carried.ifindex = frame.ifindex;
    carried.hash = frame.hash;
    carried.vlan = 0;
    carried.vlan_protocol = 0;
    carried.hook = ctx.hook(frame.egress != 0);
    carried.zero = [0; 3];
    if frame.punt_requests < 2 {
        carried.slots[1] = PuntRequest::default();
    }
    let failed = ctx.push(carried, queue, config.punt_ifindex);
    if failed != 0 {
        frame.reason = failed as u8;
    }
}

/// Whether a packet comes back from a worker: then it was judged before. Takes the mark off.
#[inline(always)]
pub fn is_reinjected(ctx: Skb) -> bool {
    // SAFETY: the context pointer is the one the kernel gave the program, valid while it runs.
    unsafe {
        let mark = (*ctx.0).mark;
        if mark == 0 {
            return false;
        }
        match CONFIG.get(0) {
            Some(config) if config.mark == mark => {
                (*ctx.0).mark = 0;
                true
            }
            _ => false,
        }
    }
}

/// Whether a frame begins with the cookie, as every frame that the programs put on the punt link does.
#[inline(always)]
fn has_cookie(bytes: &crate::ctx::Linear) -> bool {
    match (CONFIG.get(0), bytes.array::<8>(0)) {
        (Some(config), Some(cookie)) => {
            let cookie = u64::from(<crate::ctx::Linear as Bytes>::word(cookie, 0))
                | u64::from(<crate::ctx::Linear as Bytes>::word(cookie, 4)) << 32;
            cookie == config.cookie && cookie != 0
        }
        _ => false,
    }
}

/// Drops what a socket of this machine sends to an end of the punt link, before it takes a place in the queue of the
/// other end. The egress hook does not see what the programs redirect by XDP, nor what AF_XDP sends (it goes by
/// `dev_direct_xmit`); what a tc program redirects begins with the cookie.
#[inline(always)]
pub fn only_punted(ctx: Skb) -> i32 {
    let bytes = ctx.bytes(false);
    if has_cookie(&bytes) {
        return TC_ACT_UNSPEC;
    }
    count(Reason::PuntForeign, bytes.len());
    TC_ACT_SHOT
}

/// What enters the workers' end of the punt link goes to the socket of its queue, if it is ours.
#[inline(always)]
pub fn to_worker(ctx: Xdp) -> u32 {
    let bytes = ctx.bytes(false);
    let length = bytes.len();
    if !has_cookie(&bytes) {
        count(Reason::PuntForeign, length);
        return xdp_action::XDP_DROP;
    }
    // SAFETY: the context pointer is the one the kernel gave the program, valid while it runs.
    let queue = unsafe { (*ctx.0).rx_queue_index };
    match XSKS.redirect(queue, u64::from(xdp_action::XDP_DROP)) {
        Ok(action) => action,
        Err(_) => {
            count(Reason::NoWorker, length);
            xdp_action::XDP_DROP
        }
    }
}

/// Values that any bytes make.
trait Plain {}
impl Plain for ReinjectTrailer {}
impl Plain for FlowCommand {}

/// Reads a value out of a packet; whether it lies within.
#[inline(always)]
fn load<T: Plain>(ctx: Skb, at: u32, into: &mut T) -> bool {
    let size = size_of::<T>() as u32;
    // SAFETY: the context pointer is the one the kernel gave the program; the helper fills `size` bytes of a value for
    // which all bytes are values.
    unsafe { bpf_skb_load_bytes(ctx.0.cast(), at, core::ptr::from_mut(into).cast(), size) == 0 }
}

/// What enters the node's end of the punt link goes where its last bytes say, if they are ours.
#[inline(always)]
pub fn reinject(ctx: Skb) -> i32 {
    const TRAILER: u32 = size_of::<ReinjectTrailer>() as u32;
    const COMMAND: u32 = size_of::<FlowCommand>() as u32;
    let skb = ctx.0;
    // SAFETY: the context pointer is the one the kernel gave the program, valid while it runs.
    let length = unsafe { (*skb).len };
    let mut released = ReinjectTrailer::default();
    let ours = length >= TRAILER + 14 && load(ctx, length - TRAILER, &mut released);
    let (true, Some(config)) = (ours, CONFIG.get(0)) else {
        count(Reason::PuntForeign, length);
        return TC_ACT_SHOT;
    };
    if released.cookie != config.cookie || config.cookie == 0 {
        count(Reason::PuntForeign, length);
        return TC_ACT_SHOT;
    }
    let mut tail = TRAILER;
    let mut command = FlowCommand::default();
    let mut more = released.flags & reinject_flags::COMMAND;
    while more != 0 {
        tail += COMMAND;
        let loaded = length >= tail + 14 && load(ctx, length - tail, &mut command);
        if !loaded {
            count(Reason::PuntForeign, length);
            return TC_ACT_SHOT;
        }
        if apply_command(&command) == 0 && command.op == flow_op::REPLACE {
            // What was decided for the connection before might hold for the one that this packet opens.
            count(Reason::CtInvalidState, length);
            return TC_ACT_SHOT;
        }
        more = if tail == TRAILER + COMMAND {
            released.flags & reinject_flags::SECOND_COMMAND
        } else {
            0
        };
    }
    if released.path == reinject_path::NONE {
        return TC_ACT_SHOT;
    }
    // SAFETY: as above.
    unsafe {
        if bpf_skb_change_tail(skb, length - tail, 0) != 0 {
            count(Reason::PuntFailed, length);
            return TC_ACT_SHOT;
        }
        (*skb).mark = if released.flags & reinject_flags::MARK != 0 {
            config.mark
        } else {
            0
        };
        let flags = if released.path == reinject_path::INGRESS {
            u64::from(BPF_F_INGRESS)
        } else {
            0
        };
        if bpf_redirect(released.ifindex, flags) != i64::from(TC_ACT_REDIRECT) {
            count(Reason::PuntFailed, length);
            return TC_ACT_SHOT;
        }
    }
    TC_ACT_REDIRECT
}

/// Changes how a flow is read. Whether the flow is the one that is meant.
#[inline(never)]
fn apply_command(command: &FlowCommand) -> u32 {
    let Some(entry) = CONNTRACK.get_ptr_mut(&command.key) else {
        return 0;
    };
    // SAFETY: a value of an LRU map stays readable and writable while the program runs; see `conntrack::find`.
    let entry = unsafe { &mut *entry };
    if entry.serial != command.serial {
        return 0;
    }
    match command.op {
        flow_op::CLOSE => {
            conntrack::close(&command.key, entry);
            return 1;
        }
        flow_op::OPENED => {
            conntrack::opened(entry);
            return 1;
        }
        flow_op::REPLACE => {
            conntrack::replace(&command.key, entry, command.windows[0]);
            return 1;
        }
        _ => {}
    }
    // Rules may have changed since the worker got the packet that it decided by.
    if entry.ruleset != command.ruleset || u32::from(entry.punt_flags) != command.punt_flags {
        return 0;
    }
    // Data is sent after the handshake only.
    conntrack::opened(entry);
    // If the entry changes now, on another CPU, `decided` says what it was decided for: it will not count.
    let (serial, ruleset, flags) = (command.serial, command.ruleset, command.punt_flags as u8);
    let decided = if command.op == flow_op::OFFLOAD {
        CtEntry::offload(serial, ruleset, flags)
    } else {
        set_windows(entry, command.windows);
        CtEntry::windowed(serial, ruleset, flags, command.windows)
    };
    // SAFETY: an aligned field of the entry; other CPUs write it meanwhile, hence volatile: one store.
    unsafe { core::ptr::write_volatile(&raw mut entry.decided, decided) };
    1
}

#[inline(always)]
fn count(reason: Reason, length: u32) {
    counters::reason(reason as u32, Direction::Ingress as u32, length);
}
