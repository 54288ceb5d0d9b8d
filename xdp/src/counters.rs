//! Counters of packets and bytes. The counters are per CPU and not atomic: softirqs are off while a program runs, so no
//! other program interrupts it on the same CPU. On PREEMPT_RT another program can, and a count can be lost, which does
//! no harm.

use palisade_abi::{Counter, Direction, Reason, counter_slot};

use crate::maps::{COUNTERS, RULES};

/// Counts a packet by the reason of its verdict and its direction.
#[inline(always)]
pub fn reason(reason: u32, direction: u32, bytes: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut((reason << 1) | direction) {
        add(counter, bytes);
    }
}

/// Counts a packet at the rule that decided about the packet; at rule 0 if the rule's number exceeds the map.
#[inline(always)]
pub fn rule(rule: u32, bytes: u32) {
    if let Some(counter) = RULES.get_ptr_mut(rule) {
        add(counter, bytes);
    } else if let Some(counter) = RULES.get_ptr_mut(0) {
        add(counter, bytes);
    }
}

/// Counts an entry that was added to the conntrack map.
#[inline(always)]
pub fn conntrack_created() {
    if let Some(counter) = COUNTERS.get_ptr_mut(counter_slot::CONNTRACK_CREATED) {
        add(counter, 0);
    }
}

/// Counts an entry that was deleted for a newer flow.
#[inline(always)]
pub fn conntrack_evicted() {
    if let Some(counter) = COUNTERS.get_ptr_mut(counter_slot::CONNTRACK_EVICTED) {
        add(counter, 0);
    }
}

/// Counts a drop on the punt link.
#[inline(always)]
pub fn punt_drop(reason: Reason, length: u32) {
    self::reason(reason as u32, Direction::Ingress as u32, length);
}

#[inline(always)]
fn add(counter: *mut Counter, bytes: u32) {
    // SAFETY: `counter` points to a value of a per-CPU map, which lives as long as the map; only the programs of this
    // CPU write it.
    unsafe {
        (*counter).packets += 1;
        (*counter).bytes += u64::from(bytes);
    }
}
