//! Takes packets and flow commands back from the workers: the program at the node's end of the punt link
//! (`palisade_abi::punt`).

use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_REDIRECT, TC_ACT_SHOT};
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_skb_change_tail, bpf_skb_load_bytes};
use palisade_abi::{CtEntry, FlowCommand, Reason, ReinjectTrailer, flow_op, reinject_flags, reinject_path};

use crate::conntrack;
use crate::counters;
use crate::hook::Skb;
use crate::maps::CONFIG;

/// Length of an Ethernet header: the shortest frame in front of commands and trailer.
const ETHERNET: u32 = 14;

/// Returns whether a worker reinjected the packet, which then has its verdict already. Removes the mark of a reinjected
/// packet.
#[inline(always)]
pub fn is_reinjected(ctx: Skb) -> bool {
    // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
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

/// Types for which any bytes are a valid value.
trait Plain {}
impl Plain for ReinjectTrailer {}
impl Plain for FlowCommand {}

/// Copies a value out of a packet. Returns whether the packet has these bytes.
#[inline(always)]
fn load<T: Plain>(ctx: Skb, at: u32, into: &mut T) -> bool {
    let size = size_of::<T>() as u32;
    // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs. The helper
    // fills `size` bytes of a type for which any bytes are a valid value, or fails.
    unsafe { bpf_skb_load_bytes(ctx.0.cast(), at, core::ptr::from_mut(into).cast(), size) == 0 }
}

/// Applies the commands of a reinjected frame, removes them and the trailer, and redirects the packet to the interface
/// and path that the trailer names. Drops frames without the cookie.
#[inline(always)]
pub fn reinject(ctx: Skb) -> i32 {
    const TRAILER: u32 = size_of::<ReinjectTrailer>() as u32;
    const COMMAND: u32 = size_of::<FlowCommand>() as u32;
    let skb = ctx.0;
    // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
    let length = unsafe { (*skb).len };
    let mut trailer = ReinjectTrailer::default();
    let loaded = length >= TRAILER + ETHERNET && load(ctx, length - TRAILER, &mut trailer);
    let (true, Some(config)) = (loaded, CONFIG.get(0)) else {
        counters::punt_drop(Reason::PuntForeign, length);
        return TC_ACT_SHOT;
    };
    if trailer.cookie != config.cookie || config.cookie == 0 {
        counters::punt_drop(Reason::PuntForeign, length);
        return TC_ACT_SHOT;
    }
    let mut tail = TRAILER;
    let mut command = FlowCommand::default();
    let mut more = trailer.flags & reinject_flags::COMMAND;
    while more != 0 {
        tail += COMMAND;
        let loaded = length >= tail + ETHERNET && load(ctx, length - tail, &mut command);
        if !loaded {
            counters::punt_drop(Reason::PuntForeign, length);
            return TC_ACT_SHOT;
        }
        if apply_command(&command) == 0 && command.op == flow_op::REPLACE {
            // The packet opens a new connection. If it passed, the decisions for the old connection would apply to the
            // new one.
            counters::punt_drop(Reason::CtInvalidState, length);
            return TC_ACT_SHOT;
        }
        more = if tail == TRAILER + COMMAND {
            trailer.flags & reinject_flags::SECOND_COMMAND
        } else {
            0
        };
    }
    if trailer.path == reinject_path::NONE {
        return TC_ACT_SHOT;
    }
    // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
    unsafe {
        if bpf_skb_change_tail(skb, length - tail, 0) != 0 {
            counters::punt_drop(Reason::PuntFailed, length);
            return TC_ACT_SHOT;
        }
        (*skb).mark = if trailer.flags & reinject_flags::MARK != 0 {
            config.mark
        } else {
            0
        };
        let flags = if trailer.path == reinject_path::INGRESS {
            u64::from(BPF_F_INGRESS)
        } else {
            0
        };
        if bpf_redirect(trailer.ifindex, flags) != i64::from(TC_ACT_REDIRECT) {
            counters::punt_drop(Reason::PuntFailed, length);
            return TC_ACT_SHOT;
        }
    }
    TC_ACT_REDIRECT
}

/// Applies a flow command. Returns 1 on success. Returns 0 if the entry is gone or belongs to another connection, or,
/// for WINDOWS and OFFLOAD, if the rules of the flow have changed.
#[inline(never)]
fn apply_command(command: &FlowCommand) -> u32 {
    let Some(entry) = conntrack::entry(&command.key) else {
        return 0;
    };
    if entry.serial() != command.serial {
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
    // The rules may have changed since the programs punted the packet on which the command is based.
    if entry.ruleset() != command.ruleset || u32::from(entry.punt_flags()) != command.punt_flags {
        return 0;
    }
    // WINDOWS and OFFLOAD imply OPENED: a worker sends these commands only for an open connection.
    conntrack::opened(entry);
    // `decided` is a hash of the connection and its rules: if another CPU changes the entry now, the command has no
    // effect.
    let (serial, ruleset, flags) = (command.serial, command.ruleset, command.punt_flags as u8);
    entry.set_decided(if command.op == flow_op::OFFLOAD {
        CtEntry::offload(serial, ruleset, flags)
    } else {
        entry.set_windows(command.windows);
        let limited = if command.op == flow_op::LIMITED_WINDOWS {
            CtEntry::LIMITED
        } else {
            0
        };
        CtEntry::windowed(serial, ruleset, flags, command.windows) ^ limited
    });
    1
}
