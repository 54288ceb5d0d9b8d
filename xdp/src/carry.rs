//! Packets to the workers and back: what stands before them, what stands behind them (`palisade_abi::carry`).

use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_REDIRECT, TC_ACT_SHOT, xdp_action};
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_skb_change_tail, bpf_skb_load_bytes};
use palisade_abi::{
    CarrySlot, CtEntry, CtKey, Direction, FlowCommand, Reason, Released, carry_flags, config_flags, ct_flags,
    release,
};
use palisade_packet::Bytes;

use crate::conntrack;
use crate::counters;
use crate::ctx::{Context, Skb, Xdp};
use crate::frame::Frame;
use crate::maps::{CARRY, CONFIG, CONNTRACK, WORKERS, XSKS};

/// Notes that a policy wants a packet of an older flow read.
#[inline(always)]
pub fn ask_again(frame: &mut Frame, entry: &CtEntry) {
    let mut flags = 0;
    if conntrack::is_reply(entry, frame.is_ingress()) {
        flags |= carry_flags::REPLY;
    }
    if entry.flags & ct_flags::MIDSTREAM != 0 {
        flags |= carry_flags::MIDSTREAM;
    }
    frame.rule = entry.rule;
    frame.ruleset = entry.ruleset;
    frame.remote_identity = entry.remote_identity;
    frame.serial = entry.serial;
    frame.inspector = entry.inspector;
    frame.carry_flags = entry.carry_flags;
    ask(frame, flags);
}

/// Notes that a policy wants a packet read.
#[inline(never)]
pub fn ask(frame: &mut Frame, flags: u8) -> u32 {
    let Some(carried) = CARRY.get_ptr_mut(0) else {
        return 0;
    };
    let mut flags = flags | frame.carry_flags;
    if frame.is_ingress() {
        flags |= carry_flags::INGRESS;
    }
    let slot = CarrySlot {
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
        if frame.asks == 0 {
            (*carried).slots[0] = slot;
            frame.hash = hash(&frame.key);
        } else {
            (*carried).slots[1] = slot;
        }
    }
    frame.asks += 1;
    0
}

/// The same for both directions of a flow as one endpoint sees it, since its key is.
#[inline(always)]
fn hash(key: &CtKey) -> u32 {
    let mut hash = u32::from(key.endpoint) | u32::from(key.protocol) << 16;
    let ports = u32::from(key.local_port) << 16 | u32::from(key.remote_port);
    let words = [
        key.local.0[0],
        key.local.0[1],
        key.local.0[2],
        key.local.0[3],
        key.remote.0[0],
        key.remote.0[1],
        key.remote.0[2],
        key.remote.0[3],
        ports,
    ];
    for word in words {
        hash = (hash ^ word).wrapping_mul(0x9e37_79b1).rotate_left(15);
    }
    (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b) >> 3
}

/// Sends a packet to the worker of its flow. The verdict changes if that cannot be done, and to
/// [`Reason::PassedUnread`] if the packet is to pass then.
#[inline(always)]
pub fn carry<C: Context>(ctx: C, frame: &mut Frame) {
    let (Some(config), Some(carried)) = (CONFIG.get(0), CARRY.get_ptr_mut(0)) else {
        return frame.set(Reason::CarryFailed);
    };
    if frame.layer3 != 0 || frame.generic != 0 {
        return frame.set(Reason::CarryUnsupported);
    }
    let queue = if config.workers == 0 {
        0
    } else {
        frame.hash % config.workers
    };
    let beat = match WORKERS.get_ptr(queue) {
        // SAFETY: an aligned word of a map; user space writes it meanwhile, hence volatile.
        Some(beat) => unsafe { core::ptr::read_volatile(beat) },
        None => 0,
    };
    // A worker may have looked at the clock after this CPU did.
    if config.carrier == 0 || frame.now.saturating_sub(beat) > config.worker_patience {
        return frame.set(if config.flags & config_flags::PASS_WITHOUT_WORKER != 0 {
            Reason::PassedUnread
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
    if frame.asks < 2 {
        carried.slots[1] = CarrySlot::default();
    }
    if !ctx.push(carried, queue, config.carrier) {
        frame.set(Reason::CarryFailed);
    }
}

/// Whether a packet comes back from a worker: then it was judged before. Takes the mark off.
#[inline(always)]
pub fn is_back(ctx: Skb) -> bool {
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

/// What enters the workers' end of the carrier goes to the socket of its queue, if it is ours.
#[inline(always)]
pub fn to_worker(ctx: Xdp) -> u32 {
    let bytes = ctx.bytes(false);
    let length = bytes.len();
    let ours = match (CONFIG.get(0), bytes.array::<8>(0)) {
        (Some(config), Some(cookie)) => {
            let cookie = u64::from(<crate::ctx::Linear as Bytes>::word(cookie, 0))
                | u64::from(<crate::ctx::Linear as Bytes>::word(cookie, 4)) << 32;
            cookie == config.cookie && cookie != 0
        }
        _ => false,
    };
    if !ours {
        count(Reason::CarryForeign, length);
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

/// What enters the node's end of the carrier goes where its last bytes say, if they are ours.
#[inline(always)]
pub fn from_worker(ctx: Skb) -> i32 {
    const TRAILER: u32 = size_of::<Released>() as u32;
    const COMMAND: u32 = size_of::<FlowCommand>() as u32;
    let skb = ctx.0;
    // SAFETY (both blocks): the context pointer is the one the kernel gave the program; the helpers fill memory of the
    // length that they are told.
    let length = unsafe { (*skb).len };
    let mut released = Released::default();
    let ours = length >= TRAILER + 14
        && unsafe { bpf_skb_load_bytes(skb.cast(), length - TRAILER, (&raw mut released).cast(), TRAILER) }
            == 0;
    let (true, Some(config)) = (ours, CONFIG.get(0)) else {
        count(Reason::CarryForeign, length);
        return TC_ACT_SHOT;
    };
    if released.cookie != config.cookie || config.cookie == 0 {
        count(Reason::CarryForeign, length);
        return TC_ACT_SHOT;
    }
    let mut tail = TRAILER;
    if released.flags & release::COMMAND != 0 {
        let mut command = FlowCommand::default();
        tail += COMMAND;
        // SAFETY: as above.
        let loaded = length >= tail + 14
            && unsafe { bpf_skb_load_bytes(skb.cast(), length - tail, (&raw mut command).cast(), COMMAND) }
                == 0;
        if !loaded {
            count(Reason::CarryForeign, length);
            return TC_ACT_SHOT;
        }
        obey(&command);
    }
    if released.way == release::NOWHERE {
        return TC_ACT_SHOT;
    }
    // SAFETY: as above.
    unsafe {
        if bpf_skb_change_tail(skb, length - tail, 0) != 0 {
            count(Reason::CarryFailed, length);
            return TC_ACT_SHOT;
        }
        (*skb).mark = if released.flags & release::MARK != 0 {
            config.mark
        } else {
            0
        };
        let flags = if released.way == release::INGRESS {
            u64::from(BPF_F_INGRESS)
        } else {
            0
        };
        if bpf_redirect(released.ifindex, flags) != i64::from(TC_ACT_REDIRECT) {
            count(Reason::CarryFailed, length);
            return TC_ACT_SHOT;
        }
    }
    TC_ACT_REDIRECT
}

/// Changes how a flow is read.
#[inline(never)]
fn obey(command: &FlowCommand) -> u32 {
    let Some(entry) = CONNTRACK.get_ptr_mut(&command.key) else {
        return 0;
    };
    // SAFETY: a value of an LRU map stays readable and writable while the program runs; see `conntrack::find`.
    let entry = unsafe { &mut *entry };
    if entry.serial != command.serial {
        return 0;
    }
    if command.offload != 0 {
        entry.inspector = 0;
    }
    entry.windows = command.windows;
    0
}

#[inline(always)]
fn count(reason: Reason, length: u32) {
    counters::reason(reason as u32, Direction::Ingress as u32, length);
}
