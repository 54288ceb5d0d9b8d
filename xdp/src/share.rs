//! Shares of the conntrack and fragment maps, so that no endpoint's flows push out those of another one.
//!
//! A new flow takes a slot among those of its endpoint and direction; the flow that had the slot is deleted unless it
//! is protected. A flow is protected once both ends use it: it counts against the endpoint's budget of protected flows, and gives its
//! place back when it closes. Where the budget is used up the flow stays in its slot. So a flood, also one of flows
//! that are opened as the protocol wants it, takes the place of other new flows of the same endpoint and direction and
//! of nothing else.
//!
//! The slot is that of the oldest flow of [`SHARE_WAYS`] at a random place: close to "the oldest of all" without a
//! cursor that all CPUs would have to share (and without atomic additions, which the BPF target of Rust does not have).
//! Counts of protected flows are plain additions: where two CPUs change one at the same instant it is wrong by one until
//! the next sweep has counted. The map has room for more such errors than ten seconds can make (`datapath::shares`).

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use palisade_abi::{CtEntry, CtKey, FlowSlot, FragmentKey, SHARE_SLOTS, SHARE_WAYS, Share, ct_flags};

use crate::counters;
use crate::maps::{CONNTRACK, FLOW_SLOTS, FRAGMENT_SLOTS, FRAGMENTS, SHARES};

/// Slot of the pool.
const POOL: u32 = 0;

/// The share of an endpoint's flows of a direction (0 ingress, 1 egress).
#[inline(always)]
fn share(endpoint: u32, direction: u32) -> Option<*mut Share> {
    SHARES.get_ptr_mut(((endpoint << 1) | direction) & (SHARE_SLOTS as u32 - 1))
}

/// The share that a flow counts at.
#[inline(always)]
fn share_of(key: &CtKey, entry: &CtEntry) -> Option<*mut Share> {
    share(
        u32::from(key.endpoint),
        u32::from(entry.flags & ct_flags::INGRESS == 0),
    )
}

/// A random number.
#[inline(always)]
pub fn random() -> u32 {
    // SAFETY: takes and changes nothing.
    unsafe { bpf_get_prandom_u32() }
}

/// A place among `slots`, at a multiple of [`SHARE_WAYS`], by a random number; what is left behind the last such place is
/// not used.
#[inline(always)]
fn place(slots: u32, random: u32) -> u32 {
    let sets = slots / SHARE_WAYS;
    ((u64::from(random) * u64::from(sets)) >> 32) as u32 * SHARE_WAYS
}

/// Takes a slot for a flow, at a random place, before its entry is made. The flow that had the slot is deleted unless it
/// is protected.
///
/// Returns 0 if the endpoint has no share.
#[inline(never)]
pub fn claim_slot(key: &CtKey, direction: u32, created: u64, random: u32) -> u32 {
    let Some(share) = share(u32::from(key.endpoint), direction) else {
        return 0;
    };
    // SAFETY: a map value; user space may write its fields meanwhile, each of them by one store.
    let (first, slots) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*share).flows),
            core::ptr::read_volatile(&raw const (*share).flow_slots),
        )
    };
    if slots == 0 {
        return 0;
    }
    let first = first.wrapping_add(place(slots, random));
    // A program that is about to be replaced may have a smaller map than the shares are cut for. Then the flow has no
    // slot and lives until its timeout.
    let Some(mut oldest) = FLOW_SLOTS.get_ptr_mut(first) else {
        return 1;
    };
    // SAFETY: map values, which live as long as the map, here and below. The times are read once: if another CPU takes
    // a slot meanwhile, the time that was read does not fit its new flow, and that flow is left alone.
    let mut oldest_at = unsafe { core::ptr::read_volatile(&raw const (*oldest).created) };
    let (mut second, mut second_at) = (oldest, u64::MAX);
    for way in 1..SHARE_WAYS {
        // A slot that no flow has had yet is as good as any.
        if way >= slots || oldest_at == 0 {
            break;
        }
        if let Some(other) = FLOW_SLOTS.get_ptr_mut(first.wrapping_add(way)) {
            // SAFETY: see above.
            let at = unsafe { core::ptr::read_volatile(&raw const (*other).created) };
            if at < oldest_at {
                (second, second_at) = (oldest, oldest_at);
                (oldest, oldest_at) = (other, at);
            } else if at < second_at {
                (second, second_at) = (other, at);
            }
        }
    }
    // Of two flows that would have to go, the one that was used last stays: the oldest may be a port that a resolver's
    // client has just used again.
    let (mut slot, mut holder) = (oldest, holder(oldest, oldest_at));
    // SAFETY: see `conntrack::find`.
    if !holder.is_null() && second_at != u64::MAX && unsafe { (*holder).expires > created } {
        let other = self::holder(second, second_at);
        // SAFETY: see `conntrack::find`.
        if other.is_null() || unsafe { (*other).expires < (*holder).expires } {
            (slot, holder) = (second, other);
        }
    }
    // SAFETY: a map value. When another CPU takes it in the same moment, one of the two flows has no slot.
    let slot = unsafe { &mut *slot };
    if !holder.is_null() && CONNTRACK.remove(&slot.key).is_ok() {
        counters::conntrack_evicted();
    }
    slot.key = *key;
    slot.created = created;
    1
}

/// Returns the entry of the flow that has needed its slot since `created`; null if the slot is free, or its flow is gone
/// or protected.
#[inline(always)]
fn holder(slot: *mut FlowSlot, created: u64) -> *mut CtEntry {
    // SAFETY: a map value, which lives as long as the map.
    let slot = unsafe { &*slot };
    if slot.key.endpoint == 0 {
        return core::ptr::null_mut();
    }
    match CONNTRACK.get_ptr_mut(&slot.key) {
        // SAFETY: see `conntrack::find`.
        Some(entry) if unsafe { (*entry).created == created && (*entry).protected == 0 } => entry,
        _ => core::ptr::null_mut(),
    }
}

/// Notes that a flow is in use by both ends, or is no more. Where the budget is used up nothing changes.
#[inline(never)]
pub fn set_protected(key: &CtKey, entry: &mut CtEntry, settled: u32) -> u32 {
    if settled != 0 {
        protect(key, entry);
    } else {
        release_protection(key, entry);
        claim_slot(
            key,
            u32::from(entry.flags & ct_flags::INGRESS == 0),
            entry.created,
            random(),
        );
    }
    0
}

#[inline(always)]
fn protect(key: &CtKey, entry: &mut CtEntry) {
    let (Some(share), Some(pool)) = (share_of(key, entry), SHARES.get_ptr_mut(POOL)) else {
        return;
    };
    // SAFETY: map values, which live as long as the map; each field is read and written by one access.
    unsafe {
        if (*share).protected >= i64::from((*share).guaranteed) {
            if (*pool).protected >= i64::from((*pool).guaranteed) {
                return;
            }
            (*pool).protected += 1;
        }
        (*share).protected += 1;
    }
    entry.protected = 1;
}

/// A protected flow is over, or its entry is about to be overwritten.
#[inline(always)]
pub fn release_protection(key: &CtKey, entry: &mut CtEntry) {
    if entry.protected == 0 {
        return;
    }
    entry.protected = 0;
    let (Some(share), Some(pool)) = (share_of(key, entry), SHARES.get_ptr_mut(POOL)) else {
        return;
    };
    // SAFETY: see `keep`.
    unsafe {
        if (*share).protected > i64::from((*share).guaranteed) {
            (*pool).protected -= 1;
        }
        (*share).protected -= 1;
    }
}

/// Takes a slot for a fragmented datagram that is seen at an interface of `endpoint`, before its entry is made. The
/// datagram that had the slot is forgotten.
///
/// Returns 0 if the endpoint has no share.
#[inline(never)]
pub fn claim_fragment_slot(key: &FragmentKey, endpoint: u32, expires: u64) -> u32 {
    let Some(share) = share(endpoint, key.hook & 1) else {
        return 0;
    };
    // SAFETY: see `enter`.
    let (first, slots) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*share).fragments),
            core::ptr::read_volatile(&raw const (*share).fragment_slots),
        )
    };
    if slots == 0 {
        return 0;
    }
    let first = first.wrapping_add(place(slots, random()));
    let Some(mut slot) = FRAGMENT_SLOTS.get_ptr_mut(first) else {
        return 1;
    };
    for way in 1..SHARE_WAYS {
        if way >= slots {
            break;
        }
        if let Some(other) = FRAGMENT_SLOTS.get_ptr_mut(first.wrapping_add(way)) {
            // SAFETY: see `enter`.
            if unsafe { (*other).expires < (*slot).expires } {
                slot = other;
            }
        }
    }
    // SAFETY: see `enter`.
    let slot = unsafe { &mut *slot };
    if slot.key.hook != 0 {
        // SAFETY: the value is only compared.
        let old = unsafe { FRAGMENTS.get(&slot.key) };
        if old.is_some_and(|old| old.expires == slot.expires) {
            let _ = FRAGMENTS.remove(&slot.key);
        }
    }
    slot.key = *key;
    slot.expires = expires;
    1
}
