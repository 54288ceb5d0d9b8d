//! Punts packets to the workers: the punt header in front of a packet, the redirect to the punt link, and the programs
//! at both ends of the link (`palisade_abi::punt`).

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action};
use palisade_abi::{
    Addr, CtKey, PROXY_MAC, PuntRequest, Reason, config_flags, ct_flags, punt_flags, punt_hook,
};
use palisade_packet::Bytes;

use crate::conntrack;
use crate::counters;
use crate::entry::Entry;
use crate::hook::{Hook, Linear, Skb, Xdp};
use crate::maps::{CONFIG, PUNT, WORKERS, XSKS};
use crate::offload;
use crate::packet_context::PacketContext;
use crate::proxy;

/// Requests a punt of a packet that belongs to a live flow with an inspector.
#[inline(always)]
pub fn request_punt_of_flow<H: Hook>(ctx: H, pkt: &mut PacketContext, entry: Entry) {
    if conntrack::is_intercepted(entry) {
        pkt.must_punt = true;
        proxy::note_path(ctx, pkt, entry);
    } else {
        offload::check_window(ctx, pkt, entry);
    }
    let mut flags = 0;
    if conntrack::is_reply(entry, pkt.is_ingress()) {
        flags |= punt_flags::REPLY;
    }
    if entry.flags() & ct_flags::MIDSTREAM != 0 {
        flags |= punt_flags::MIDSTREAM;
    }
    pkt.rule = entry.rule();
    pkt.ruleset = entry.ruleset();
    pkt.remote_identity = entry.remote_identity();
    pkt.serial = entry.serial();
    pkt.inspector = entry.inspector();
    pkt.punt_flags = entry.punt_flags();
    request_punt(pkt, flags);
}

/// Writes the request of one policy into the punt header of this CPU.
#[inline(never)]
pub fn request_punt(pkt: &mut PacketContext, flags: u8) -> u32 {
    let Some(header) = PUNT.get_ptr_mut(0) else {
        return 0;
    };
    let mut flags = flags | pkt.punt_flags;
    if pkt.is_ingress() {
        flags |= punt_flags::INGRESS;
    }
    let request = PuntRequest {
        rule: pkt.rule,
        ruleset: pkt.ruleset,
        remote_identity: pkt.remote_identity,
        revision: pkt.revision,
        serial: pkt.serial,
        endpoint: pkt.endpoint as u16,
        inspector: pkt.inspector,
        flags,
    };
    // SAFETY: `header` points to a value of a per-CPU map, which lives as long as the map. Only the programs of this
    // CPU use it, and none of them interrupts another (softirqs are off).
    unsafe {
        if pkt.punt_requests == 0 {
            (*header).slots[0] = request;
            pkt.hash = hash(&pkt.key);
        } else {
            (*header).slots[1] = request;
        }
    }
    pkt.punt_requests += 1;
    0
}

/// Mixes a word into a hash: the multiplication carries differences to the upper bits, the shift brings them down
/// again.
#[inline(always)]
fn mix(hash: u32, word: u32) -> u32 {
    let product = (hash ^ word).wrapping_mul(0x9e37_79b1);
    product ^ product >> 15
}

/// Returns the hash of one end of a flow.
#[inline(always)]
fn hash_end(seed: u32, addr: &Addr, port: u16) -> u32 {
    let [a, b, c, d] = addr.0;
    mix(mix(mix(mix(mix(seed, a), b), c), d), u32::from(port))
}

/// Returns the hash that chooses the worker of a flow. The hash is symmetric in both ends, so one worker gets both
/// directions of a flow. If a packet between a workload and the node is punted for both endpoints, the same worker gets
/// both punts. The hash is seeded with the cookie, so a peer cannot choose a worker.
#[inline(always)]
fn hash(key: &CtKey) -> u32 {
    let seed = match CONFIG.get(0) {
        Some(config) => config.cookie as u32,
        None => 0,
    };
    let local = hash_end(seed, &key.local, key.local_port);
    let remote = hash_end(seed, &key.remote, key.remote_port);
    mix(local.wrapping_add(remote), u32::from(key.protocol))
}

/// Redirects a packet to the worker of its flow. If that fails, sets the reason of the drop, or [`Reason::FailedOpen`]
/// if that worker does not run and the configuration lets such packets pass without inspection.
#[inline(always)]
pub fn punt<H: Hook>(ctx: H, pkt: &mut PacketContext) {
    let (Some(config), Some(header)) = (CONFIG.get(0), PUNT.get_ptr_mut(0)) else {
        return pkt.set(Reason::PuntFailed);
    };
    if pkt.layer3 != 0 || pkt.generic != 0 {
        return pkt.set(Reason::PuntUnsupported);
    }
    let (mut ifindex, mut hook) = (pkt.ifindex, ctx.number(pkt.egress != 0));
    let proxy_link = proxy::link_of(ctx, pkt, header);
    if proxy_link != 0 {
        if pkt.is_dropped() {
            return;
        }
        if !ctx.set_destination_mac(PROXY_MAC) {
            return pkt.set(Reason::PuntFailed);
        }
        if !H::BY_WORKER {
            if !ctx.send_to_proxy(pkt.egress != 0, proxy_link, config.mark) {
                pkt.set(Reason::PuntFailed);
            }
            return;
        }
        // The worker completes the checksum and sends the packet on as if it had been punted at the proxy link.
        (ifindex, hook) = (proxy_link, punt_hook::TC_EGRESS);
    }
    let queue = if config.workers == 0 {
        0
    } else {
        pkt.hash % config.workers
    };
    let heartbeat = match WORKERS.get_ptr(queue) {
        // SAFETY: `heartbeat` points to an aligned word of a map, which lives as long as the map; the read is volatile
        // because the worker writes the word.
        Some(heartbeat) => unsafe { core::ptr::read_volatile(heartbeat) },
        None => 0,
    };
    // The subtraction saturates, because the worker may have read a later time than this CPU has cached.
    if config.punt_ifindex == 0 || pkt.now.saturating_sub(heartbeat) > config.worker_timeout {
        return pkt.set(
            if config.flags & config_flags::FAIL_OPEN != 0 && proxy_link == 0 {
                Reason::FailedOpen
            } else {
                Reason::NoWorker
            },
        );
    }
    // SAFETY: `header` points to a value of a per-CPU map, which lives as long as the map. Only the programs of this
    // CPU use it, and none of them interrupts another (softirqs are off).
    unsafe {
        (*header).cookie = config.cookie;
        (*header).ifindex = ifindex;
        (*header).hash = pkt.hash;
        (*header).vlan = 0;
        (*header).vlan_protocol = 0;
        (*header).hook = hook;
        (*header).zero = [0; 3];
        if pkt.punt_requests < 2 {
            (*header).slots[1] = PuntRequest::default();
        }
    }
    let failed = ctx.push(header, queue, config.punt_ifindex);
    if failed != 0 {
        pkt.reason = failed as u8;
    }
}

/// Returns whether a frame begins with the cookie, as every punted frame does.
#[inline(always)]
fn has_cookie(bytes: &Linear) -> bool {
    match (CONFIG.get(0), bytes.array::<8>(0)) {
        (Some(config), Some(cookie)) => {
            let cookie = u64::from(<Linear as Bytes>::word(cookie, 0))
                | u64::from(<Linear as Bytes>::word(cookie, 4)) << 32;
            cookie == config.cookie && cookie != 0
        }
        _ => false,
    }
}

/// Drops frames that the programs have not punted, for example from a packet socket, before they fill the receive queue
/// of the other end of the punt link. The tc egress hook sees neither XDP redirects nor AF_XDP transmission
/// (`dev_direct_xmit`); a frame that a tc program redirects begins with the cookie.
#[inline(always)]
pub fn only_punted(ctx: Skb) -> i32 {
    let bytes = ctx.bytes(false);
    if has_cookie(&bytes) {
        return TC_ACT_UNSPEC;
    }
    counters::punt_drop(Reason::PuntForeign, bytes.len());
    TC_ACT_SHOT
}

/// Redirects a punted frame at the workers' end of the punt link to the AF_XDP socket of the receive queue. Drops other
/// frames.
#[inline(always)]
pub fn to_worker(ctx: Xdp) -> u32 {
    let bytes = ctx.bytes(false);
    let length = bytes.len();
    if !has_cookie(&bytes) {
        counters::punt_drop(Reason::PuntForeign, length);
        return xdp_action::XDP_DROP;
    }
    // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
    let queue = unsafe { (*ctx.0).rx_queue_index };
    match XSKS.redirect(queue, u64::from(xdp_action::XDP_DROP)) {
        Ok(action) => action,
        Err(_) => {
            counters::punt_drop(Reason::NoWorker, length);
            xdp_action::XDP_DROP
        }
    }
}
