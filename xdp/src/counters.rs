//! Counters. All are per CPU and plain: a program is not interrupted by another of its CPU (softirqs are off
//! while it runs), and where it can be (PREEMPT_RT) a lost count does no harm.

use palisade_abi::{Counter, counter_slot};

use crate::maps::{COUNTERS, RULES};

/// Counts a packet by reason and direction.
#[inline(always)]
pub fn reason(reason: u32, direction: u32, bytes: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut((reason << 1) | direction) {
        add(counter, bytes);
    }
}

/// Counts a packet to the rule that decided it; to rule 0 if the map has no room for the rule.
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

/// Counts an entry that gave way to a newer flow.
#[inline(always)]
pub fn conntrack_evicted() {
    if let Some(counter) = COUNTERS.get_ptr_mut(counter_slot::CONNTRACK_EVICTED) {
        add(counter, 0);
    }
}

#[inline(always)]
fn add(counter: *mut Counter, bytes: u32) {
    // SAFETY: a map value of this CPU, which lives as long as the map.
    unsafe {
        (*counter).packets += 1;
        (*counter).bytes += u64::from(bytes);
    }
}
