//! Shares of the conntrack and fragment maps: the flows of one endpoint evict no flows of another.
//!
//! A new flow takes a slot of its endpoint and direction; the flow that held the slot is deleted unless it is
//! protected. A flow that both ends use becomes protected if the budget of protected flows (the guaranteed number of
//! the share, then the pool) is not used up. It counts against the budget until it closes. So a flood, even one of
//! complete handshakes, evicts only unprotected flows of the same endpoint and direction.
//!
//! A new flow in general takes the slot of the oldest flow among [`SHARE_WAYS`] slots at a random place. This
//! approximates "the oldest of all" without a cursor that all CPUs share, and without atomic additions, which the BPF
//! target of Rust lacks. The counts of protected flows are plain additions: if two CPUs change a count at the same
//! instant, the count can be off by one until the next sweep counts the flows again. The map has room for the excess
//! flows, because the shares leave some of its entries unused (`datapath::shares`).

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use palisade_abi::{CtKey, FlowSlot, FragmentKey, SHARE_SLOTS, SHARE_WAYS, Share, ct_flags};

use crate::counters;
use crate::entry::Entry;
use crate::maps::{CONNTRACK, FLOW_SLOTS, FRAGMENT_SLOTS, FRAGMENTS, SHARES};

/// Index of the pool in SHARES. A share borrows from the pool if its guaranteed number of protected flows is reached.
const POOL: u32 = 0;

/// Returns the share of an endpoint's flows of a direction (0 ingress, 1 egress).
#[inline(always)]
fn share(endpoint: u32, direction: u32) -> Option<*mut Share> {
    SHARES.get_ptr_mut(((endpoint << 1) | direction) & (SHARE_SLOTS as u32 - 1))
}

/// Returns the direction of a flow: 0 ingress, 1 egress.
#[inline(always)]
fn direction(entry: Entry) -> u32 {
    u32::from(entry.flags() & ct_flags::INGRESS == 0)
}

/// Returns a random number.
#[inline(always)]
pub fn random() -> u32 {
    // SAFETY: the helper has no parameters and changes nothing.
    unsafe { bpf_get_prandom_u32() }
}

/// Returns the first of [`SHARE_WAYS`] adjacent slots among `slots`, chosen by a random number. If `slots` is not a
/// multiple of [`SHARE_WAYS`], the last slots are not used.
#[inline(always)]
fn place(slots: u32, random: u32) -> u32 {
    let sets = slots / SHARE_WAYS;
    ((u64::from(random) * u64::from(sets)) >> 32) as u32 * SHARE_WAYS
}

/// Takes a slot at a random place for a flow. Deletes the flow that held the slot unless that flow is protected.
/// Returns 0 if the endpoint has no share.
#[inline(never)]
pub fn claim_slot(key: &CtKey, direction: u32, created: u64, random: u32) -> u32 {
    let Some(share) = share(u32::from(key.endpoint), direction) else {
        return 0;
    };
    // SAFETY: `share` points to a map value, which lives as long as the map; the reads are volatile because user space
    // can write the fields, each by one store.
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
    // During an upgrade the old programs can have a smaller map than the one that the shares are computed for. The flow
    // then has no slot and lives until its timeout.
    let Some(mut oldest) = FLOW_SLOTS.get_ptr_mut(first) else {
        return 1;
    };
    // The time of creation in each slot is read once: if another CPU takes the slot afterwards, that time does not
    // match the other CPU's flow, which is then not deleted.
    let mut oldest_at = created_at(oldest);
    let (mut second, mut second_at) = (oldest, u64::MAX);
    for way in 1..SHARE_WAYS {
        // Stop at a slot that was never used: it holds no flow to evict.
        if way >= slots || oldest_at == 0 {
            break;
        }
        if let Some(other) = FLOW_SLOTS.get_ptr_mut(first.wrapping_add(way)) {
            let at = created_at(other);
            if at < oldest_at {
                (second, second_at) = (oldest, oldest_at);
                (oldest, oldest_at) = (other, at);
            } else if at < second_at {
                (second, second_at) = (other, at);
            }
        }
    }
    // If the two oldest flows are live, the one that was used last stays: the oldest flow could belong to a resolver
    // that has just reused the port.
    let (mut slot, mut holder) = (oldest, holder(oldest, oldest_at));
    if let Some(flow) = holder
        && second_at != u64::MAX
        && flow.expires() > created
    {
        let other = self::holder(second, second_at);
        if other.is_none_or(|other| other.expires() < flow.expires()) {
            (slot, holder) = (second, other);
        }
    }
    // SAFETY: `slot` points to a map value, which lives as long as the map; the kernel only reads the key. If another
    // CPU writes the key at the same time, the helper finds no flow or deletes the other CPU's flow, whose next packet
    // gets a new verdict.
    if holder.is_some() && CONNTRACK.remove(unsafe { &(*slot).key }).is_ok() {
        counters::conntrack_evicted();
    }
    // SAFETY: `slot` points to a map value, which lives as long as the map; the writes are volatile because other CPUs
    // can access the value. If two CPUs take the slot at the same instant, one of the two flows has no slot and lives
    // until its timeout.
    unsafe {
        core::ptr::write_volatile(&raw mut (*slot).key, *key);
        core::ptr::write_volatile(&raw mut (*slot).created, created);
    }
    1
}

/// Returns the time of creation of the flow in a slot, ns; 0 if the slot was never used.
#[inline(always)]
fn created_at(slot: *mut FlowSlot) -> u64 {
    // SAFETY: callers pass a pointer to a map value, which lives as long as the map; the read is volatile because other
    // CPUs can write the field.
    unsafe { core::ptr::read_volatile(&raw const (*slot).created) }
}

/// Returns the flow that was created at `created` and holds a slot; `None` if the slot is free, or its flow is gone or
/// protected.
#[inline(always)]
fn holder(slot: *mut FlowSlot, created: u64) -> Option<Entry> {
    // SAFETY: callers pass a pointer to a map value, which lives as long as the map; the read is volatile because other
    // CPUs can write the field.
    if unsafe { core::ptr::read_volatile(&raw const (*slot).key.endpoint) } == 0 {
        return None;
    }
    // SAFETY: `slot` points to a map value, which lives as long as the map; the kernel only reads the key. If another
    // CPU writes the key at the same time, an entry found by that key has another time of creation.
    let entry = CONNTRACK.get_ptr_mut(unsafe { &(*slot).key })?;
    // SAFETY: `entry` points to a map value that the running program has just looked up.
    let entry = unsafe { Entry::new(entry) }?;
    (entry.created() == created && entry.protected() == 0).then_some(entry)
}

/// Protects a flow that both ends use (`settled`), or ends its protection and takes a slot for it. If the budget is
/// used up, the flow stays unprotected.
#[inline(never)]
pub fn set_protected(key: &CtKey, entry: Entry, settled: u32) -> u32 {
    if settled != 0 {
        protect(key, entry);
    } else {
        release_protection(key, entry);
        claim_slot(key, direction(entry), entry.created(), random());
    }
    0
}

#[inline(always)]
fn protect(key: &CtKey, entry: Entry) {
    let share = share(u32::from(key.endpoint), direction(entry));
    let (Some(share), Some(pool)) = (share, SHARES.get_ptr_mut(POOL)) else {
        return;
    };
    // SAFETY: `share` and `pool` point to map values, which live as long as the map. Other CPUs can change the counts
    // at the same time; see the module comment.
    unsafe {
        if (*share).protected >= i64::from((*share).guaranteed) {
            if (*pool).protected >= i64::from((*pool).guaranteed) {
                return;
            }
            (*pool).protected += 1;
        }
        (*share).protected += 1;
    }
    entry.set_protected(1);
}

/// Ends the protection of a flow that is over, or whose entry is about to be overwritten.
#[inline(always)]
pub fn release_protection(key: &CtKey, entry: Entry) {
    if entry.protected() == 0 {
        return;
    }
    entry.set_protected(0);
    let share = share(u32::from(key.endpoint), direction(entry));
    let (Some(share), Some(pool)) = (share, SHARES.get_ptr_mut(POOL)) else {
        return;
    };
    // SAFETY: `share` and `pool` point to map values, which live as long as the map. Other CPUs can change the counts
    // at the same time; see the module comment.
    unsafe {
        if (*share).protected > i64::from((*share).guaranteed) {
            (*pool).protected -= 1;
        }
        (*share).protected -= 1;
    }
}

/// Takes a slot for a fragmented datagram at an interface of `endpoint`. Deletes the ports of the datagram that held
/// the slot. Returns 0 if the endpoint has no share.
#[inline(never)]
pub fn claim_fragment_slot(key: &FragmentKey, endpoint: u32, expires: u64) -> u32 {
    let Some(share) = share(endpoint, key.hook & 1) else {
        return 0;
    };
    // SAFETY: `share` points to a map value, which lives as long as the map; the reads are volatile because user space
    // can write the fields, each by one store.
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
    // SAFETY: `slot` points to a map value, which lives as long as the map; the read is volatile because other CPUs can
    // write the field.
    let mut slot_expires = unsafe { core::ptr::read_volatile(&raw const (*slot).expires) };
    for way in 1..SHARE_WAYS {
        if way >= slots {
            break;
        }
        if let Some(other) = FRAGMENT_SLOTS.get_ptr_mut(first.wrapping_add(way)) {
            // SAFETY: `other` points to a map value, which lives as long as the map; the read is volatile because other
            // CPUs can write the field.
            let other_expires = unsafe { core::ptr::read_volatile(&raw const (*other).expires) };
            if other_expires < slot_expires {
                (slot, slot_expires) = (other, other_expires);
            }
        }
    }
    // SAFETY: `slot` points to a map value, which lives as long as the map; the read is volatile because other CPUs can
    // write the field.
    if unsafe { core::ptr::read_volatile(&raw const (*slot).key.hook) } != 0 {
        // SAFETY: `slot` points to a map value, which lives as long as the map; the kernel only reads the key.
        let old_key = unsafe { &(*slot).key };
        // SAFETY: the value stays readable while the program runs. The time is copied at once, because the LRU map can
        // recycle the element for another datagram.
        let old = unsafe { FRAGMENTS.get(old_key) };
        if old.is_some_and(|old| old.expires == slot_expires) {
            let _ = FRAGMENTS.remove(old_key);
        }
    }
    // SAFETY: `slot` points to a map value, which lives as long as the map; the writes are volatile because other CPUs
    // can access the value. If two CPUs take the slot at the same instant, one of the two datagrams has no slot and
    // lives until its timeout.
    unsafe {
        core::ptr::write_volatile(&raw mut (*slot).key, *key);
        core::ptr::write_volatile(&raw mut (*slot).expires, expires);
    }
    1
}
