//! Division of the conntrack and fragment maps into shares, one for each endpoint and direction
//! (`palisade_abi::Share`).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use palisade_abi::{CtEntry, CtKey, Share, ct_flags};

use crate::{
    MapError,
    maps::{RawMap, Shared, check_layout},
};

/// Maximum number of free nodes that an LRU map keeps for each CPU (`LOCAL_FREE_TARGET` in kernel/bpf/bpf_lru_list.c).
/// A CPU without free nodes takes them from the common list, and the kernel evicts entries if that list has too few. So
/// the shares leave at least this number of entries unused for each CPU and once more for the common list, but not more
/// than a quarter of the map.
const FREE_PER_CPU: u32 = 128;

/// Sizes of the maps that are divided into shares, entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    /// Size of CONNTRACK.
    pub flows: u32,
    /// Size of FLOW_SLOTS.
    pub flow_table: u32,
    /// Size of FRAGMENT_SLOTS.
    pub fragment_table: u32,
    /// Number of possible CPUs.
    pub cpus: u32,
}

/// Returns the index of a share in SHARES.
#[must_use]
pub fn share_slot(endpoint: u16, direction: usize) -> u32 {
    u32::from(endpoint) * 2 + direction as u32
}

/// Returns the shares of these endpoints by index in SHARES; index 0 is the pool.
///
/// Half of CONNTRACK is for flows that are not protected. The other half, less the entries that the kernel keeps free,
/// is for protected flows: one half of these entries is guaranteed to the shares in equal parts, the other half is the
/// pool, from which every share can borrow.
#[must_use]
pub fn shares(endpoints: &BTreeSet<u16>, sizes: Sizes) -> BTreeMap<u32, Share> {
    let free = (sizes.flows / 16)
        .max(FREE_PER_CPU.saturating_mul(sizes.cpus.saturating_add(1)))
        .min(sizes.flows / 4);
    let protected = sizes.flows.saturating_sub(sizes.flow_table + free);
    let count = (endpoints.len() as u32 * 2).max(1);
    let guaranteed = protected / 2 / count;
    let mut shares = BTreeMap::new();
    let pool = Share {
        guaranteed: protected - guaranteed * count,
        ..Share::default()
    };
    shares.insert(0, pool);
    let (flow_slots, fragment_slots) = (
        (sizes.flow_table / count).max(1),
        (sizes.fragment_table / count).max(1),
    );
    let slots = endpoints
        .iter()
        .flat_map(|&endpoint| [0, 1].map(|direction| share_slot(endpoint, direction)));
    for (slot, position) in slots.zip(0_u32..) {
        let share = Share {
            // If there are more shares than slots, several shares use the same slot.
            flows: position.wrapping_mul(flow_slots) % sizes.flow_table.max(1),
            flow_slots,
            fragments: position.wrapping_mul(fragment_slots) % sizes.fragment_table.max(1),
            fragment_slots,
            guaranteed,
            ..Share::default()
        };
        shares.insert(slot, share);
    }
    shares
}

/// Numbers of protected flows that a walk through CONNTRACK has found, by index of the share.
#[derive(Debug, Default)]
pub(crate) struct ProtectedCounts(BTreeMap<u32, i64>);

impl ProtectedCounts {
    pub(crate) fn add(&mut self, key: &CtKey, entry: &CtEntry) {
        if entry.protected != 0 {
            *self.0.entry(slot_of(key, entry)).or_default() += 1;
        }
    }
}

fn slot_of(key: &CtKey, entry: &CtEntry) -> u32 {
    share_slot(key.endpoint, usize::from(entry.flags & ct_flags::INGRESS == 0))
}

/// All shares: the map SHARES, memory-mapped.
#[derive(Debug)]
pub(crate) struct Shares {
    memory: Shared,
    count: u32,
}

/// Indexes of the 32-bit fields of a [`Share`].
mod field {
    pub(super) const FLOWS: usize = 0;
    pub(super) const FLOW_SLOTS: usize = 1;
    pub(super) const FRAGMENTS: usize = 2;
    pub(super) const FRAGMENT_SLOTS: usize = 3;
    pub(super) const GUARANTEED: usize = 4;
}

impl Shares {
    pub(crate) fn new(raw: &RawMap) -> Result<Self, MapError> {
        check_layout(raw, size_of::<u32>(), size_of::<Share>())?;
        Ok(Self {
            memory: Shared::new(raw)?,
            count: raw.info.max_entries,
        })
    }

    fn at(&self, slot: u32, field: usize) -> &AtomicU32 {
        self.memory
            .at(slot as usize * size_of::<Share>() + field * size_of::<u32>())
    }

    fn protected_at(&self, slot: u32) -> &AtomicU64 {
        self.memory
            .at(slot as usize * size_of::<Share>() + std::mem::offset_of!(Share, protected))
    }

    fn guaranteed(&self, slot: u32) -> i64 {
        i64::from(self.at(slot, field::GUARANTEED).load(Ordering::Relaxed))
    }

    /// Writes the sizes of all shares; the counts of protected flows do not change. An endpoint without a share can
    /// open no flow.
    pub(crate) fn cut(&self, shares: &BTreeMap<u32, Share>) {
        for slot in 0..self.count {
            let share = shares.get(&slot).copied().unwrap_or_default();
            // Only changed fields are written, so that the cache lines that the programs read on other CPUs stay valid.
            for (field, value) in [
                (field::FLOWS, share.flows),
                (field::FRAGMENTS, share.fragments),
                (field::FRAGMENT_SLOTS, share.fragment_slots),
                (field::GUARANTEED, share.guaranteed),
                (field::FLOW_SLOTS, share.flow_slots),
            ] {
                let at = self.at(slot, field);
                if at.load(Ordering::Relaxed) != value {
                    at.store(value, Ordering::Relaxed);
                }
            }
        }
    }

    /// Returns the endpoints that have a share.
    pub(crate) fn present(&self) -> BTreeSet<u16> {
        (1..self.count)
            .filter(|&slot| self.at(slot, field::FLOW_SLOTS).load(Ordering::Relaxed) != 0)
            .filter_map(|slot| u16::try_from(slot / 2).ok())
            .collect()
    }

    /// Counts a seeded flow as protected. Returns whether its share or the pool had space for it.
    pub(crate) fn protect(&self, key: &CtKey, entry: &CtEntry) -> bool {
        let slot = slot_of(key, entry);
        if self.at(slot, field::FLOW_SLOTS).load(Ordering::Relaxed) == 0 {
            return false;
        }
        let (protected, lent) = (self.protected_at(slot), self.protected_at(0));
        if (protected.fetch_add(1, Ordering::Relaxed) as i64) < self.guaranteed(slot)
            || (lent.fetch_add(1, Ordering::Relaxed) as i64) < self.guaranteed(0)
        {
            return true;
        }
        lent.fetch_sub(1, Ordering::Relaxed);
        protected.fetch_sub(1, Ordering::Relaxed);
        false
    }

    /// Returns the number of protected flows of a share.
    pub(crate) fn protected(&self, slot: u32) -> i64 {
        self.protected_at(slot).load(Ordering::Relaxed) as i64
    }

    /// Corrects the counts of protected flows after a walk: flows that user space has deleted are still counted, and
    /// two CPUs can have counted the same flow. A flow that the programs count during the walk can be counted twice
    /// until the next walk. `before`: the counts at the start of the walk.
    pub(crate) fn correct(&self, before: &BTreeMap<u32, i64>, protected: &ProtectedCounts) {
        let slots: BTreeSet<u32> = before.keys().chain(protected.0.keys()).copied().collect();
        for slot in slots.into_iter().filter(|&slot| slot != 0 && slot < self.count) {
            let was = before.get(&slot).copied().unwrap_or_default();
            let is = protected.0.get(&slot).copied().unwrap_or_default();
            if is != was {
                self.protected_at(slot)
                    .fetch_add((is - was) as u64, Ordering::Relaxed);
            }
        }
        let was = self.protected(0);
        let is: i64 = (1..self.count)
            .map(|slot| (self.protected(slot) - self.guaranteed(slot)).max(0))
            .sum();
        self.protected_at(0)
            .fetch_add((is - was) as u64, Ordering::Relaxed);
    }

    /// Returns the number of protected flows of each share. Shares without protected flows are omitted.
    pub(crate) fn counts(&self) -> BTreeMap<u32, i64> {
        (1..self.count)
            .map(|slot| (slot, self.protected(slot)))
            .filter(|&(_, protected)| protected != 0)
            .collect()
    }

    /// Returns the endpoints that have used up the guaranteed part of a share while the pool is used up, too.
    pub(crate) fn exhausted(&self) -> BTreeSet<u16> {
        let used_up = |slot| {
            self.protected(slot) as i32 >= self.at(slot, field::GUARANTEED).load(Ordering::Relaxed) as i32
        };
        if !used_up(0) {
            return BTreeSet::new();
        }
        (1..self.count)
            .filter(|&slot| self.protected(slot) != 0 && used_up(slot))
            .filter_map(|slot| u16::try_from(slot / 2).ok())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use palisade_abi::DIRECTIONS;

    use super::*;

    const SIZES: Sizes = Sizes {
        flows: 262_144,
        flow_table: 131_072,
        fragment_table: 4_096,
        cpus: 8,
    };

    #[test]
    fn shares_do_not_overlap_and_fit_into_the_map() {
        for count in [1_u16, 2, 3, 10, 77, 1000] {
            let endpoints: BTreeSet<u16> = (1..=count).collect();
            let cut = shares(&endpoints, SIZES);
            assert_eq!(cut.len(), usize::from(count) * 2 + 1);
            let pool = cut[&0];
            let of_endpoints: Vec<Share> = cut.range(1..).map(|(_, &share)| share).collect();
            let mut end = 0;
            let mut fragments = 0;
            for share in &of_endpoints {
                assert_eq!((share.flows, share.fragments), (end, fragments));
                assert!(share.flow_slots > 0 && share.guaranteed > 0 && share.fragment_slots > 0);
                end += share.flow_slots;
                fragments += share.fragment_slots;
            }
            assert!(end <= SIZES.flow_table && fragments <= SIZES.fragment_table);
            let protected: u32 = of_endpoints.iter().map(|share| share.guaranteed).sum();
            assert!(end + protected + pool.guaranteed + SIZES.flows / 16 <= SIZES.flows);
        }
    }

    #[test]
    fn the_smallest_map_has_a_slot_for_every_endpoint() {
        let sizes = Sizes {
            flows: 64,
            flow_table: 32,
            fragment_table: 1,
            cpus: 128,
        };
        let endpoints: BTreeSet<u16> = (1..=100).collect();
        for (slot, share) in shares(&endpoints, sizes) {
            assert!(slot == 0 || share.flow_slots == 1, "{slot}: {share:?}");
            assert!(share.flows < 32 && share.fragments < 1);
        }
    }

    #[test]
    fn directions_are_numbered_as_in_the_programs() {
        assert_eq!(DIRECTIONS.map(|direction| direction as u32), [0, 1]);
        assert_eq!([share_slot(7, 0), share_slot(7, 1)], [14, 15]);
    }
}
