//! A queue of values that expire in the order in which they were added, with access by number. It is used for fragments
//! and for held DNS answers. The question tracker of `palisade-fqdn` does not use this queue, because the slots of the
//! tracker are also linked by key.

use crate::Millis;

const NONE: u32 = u32::MAX;

/// Queue of values, linked by age. Slots are reused, so the steady state allocates nothing.
#[derive(Debug)]
pub(crate) struct ExpiryQueue<T> {
    slots: Vec<Slot<T>>,
    len: usize,
    free: u32,
    oldest: u32,
    newest: u32,
}

#[derive(Debug)]
struct Slot<T> {
    value: Option<T>,
    /// Number of uses of the slot, so that the number of a removed value does not find the next value in the slot.
    generation: u32,
    since: Millis,
    older: u32,
    /// Index of the next newer slot; in a free slot, index of the next free one.
    newer: u32,
}

impl<T> ExpiryQueue<T> {
    pub(crate) const fn new() -> Self {
        Self {
            slots: Vec::new(),
            len: 0,
            free: NONE,
            oldest: NONE,
            newest: NONE,
        }
    }

    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// Adds a value as the newest one. Returns its number.
    pub(crate) fn push(&mut self, value: T, now: Millis) -> u64 {
        let newest = self.newest;
        let (at, generation) = match self.slots.get_mut(self.free as usize) {
            Some(slot) => {
                let at = std::mem::replace(&mut self.free, slot.newer);
                slot.generation = slot.generation.wrapping_add(1);
                slot.value = Some(value);
                slot.since = now;
                slot.older = newest;
                slot.newer = NONE;
                (at, slot.generation)
            }
            None => {
                self.slots.push(Slot {
                    value: Some(value),
                    generation: 1,
                    since: now,
                    older: newest,
                    newer: NONE,
                });
                ((self.slots.len() - 1) as u32, 1)
            }
        };
        let number = u64::from(generation) << 32 | u64::from(at);
        match self.slots.get_mut(newest as usize) {
            Some(slot) => slot.newer = at,
            None => self.oldest = at,
        }
        self.newest = at;
        self.len += 1;
        number
    }

    fn slot_mut(&mut self, number: u64) -> Option<&mut Slot<T>> {
        let slot = self.slots.get_mut(number as u32 as usize)?;
        (slot.generation == (number >> 32) as u32).then_some(slot)
    }

    pub(crate) fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        self.slot_mut(number)?.value.as_mut()
    }

    pub(crate) fn remove(&mut self, number: u64) -> Option<T> {
        let at = number as u32;
        let free = self.free;
        let slot = self.slot_mut(number)?;
        let value = slot.value.take()?;
        let (older, newer) = (slot.older, slot.newer);
        slot.newer = free;
        self.free = at;
        match self.slots.get_mut(older as usize) {
            Some(slot) => slot.newer = newer,
            None => self.oldest = newer,
        }
        match self.slots.get_mut(newer as usize) {
            Some(slot) => slot.older = older,
            None => self.newest = older,
        }
        self.len -= 1;
        Some(value)
    }

    /// Returns the time at which the oldest value was added, ms.
    pub(crate) fn since(&self) -> Option<Millis> {
        self.slots.get(self.oldest as usize).map(|slot| slot.since)
    }

    /// Removes the oldest value if it was added at `limit` or before.
    pub(crate) fn pop_since(&mut self, limit: Millis) -> Option<T> {
        let slot = self.slots.get(self.oldest as usize)?;
        if slot.since > limit {
            return None;
        }
        self.remove(u64::from(slot.generation) << 32 | u64::from(self.oldest))
    }

    /// Removes the oldest value for which `wanted` holds.
    pub(crate) fn pop_if(&mut self, mut wanted: impl FnMut(&T) -> bool) -> Option<T> {
        let mut at = self.oldest;
        while let Some(slot) = self.slots.get(at as usize) {
            if slot.value.as_ref().is_some_and(&mut wanted) {
                return self.remove(u64::from(slot.generation) << 32 | u64::from(at));
            }
            at = slot.newer;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_queue_behaves_like_a_list(steps in prop::collection::vec((0_u8..5, any::<prop::sample::Index>()), 1..200)) {
            let mut aged = ExpiryQueue::new();
            let mut list: Vec<(u64, u32, Millis)> = vec![];
            let mut gone = vec![];
            for (now, (step, index)) in steps.into_iter().enumerate() {
                let now = now as Millis;
                match step {
                    0 | 1 => {
                        let value = now as u32;
                        let number = aged.push(value, now);
                        prop_assert!(!gone.contains(&number));
                        list.push((number, value, now));
                    }
                    2 if !list.is_empty() => {
                        let (number, value, _) = list.remove(index.index(list.len()));
                        prop_assert_eq!(aged.get_mut(number).copied(), Some(value));
                        prop_assert_eq!(aged.remove(number), Some(value));
                        gone.push(number);
                    }
                    3 => {
                        let limit = index.index(now as usize + 1) as Millis;
                        let expected = list.first().filter(|(_, _, since)| *since <= limit).copied();
                        prop_assert_eq!(aged.pop_since(limit), expected.map(|(_, value, _)| value));
                        if expected.is_some() {
                            gone.push(list.remove(0).0);
                        }
                    }
                    _ => {
                        let at = list.iter().position(|(_, value, _)| value % 3 == 0);
                        let expected = at.map(|at| list.remove(at));
                        prop_assert_eq!(aged.pop_if(|value| value % 3 == 0), expected.map(|(_, value, _)| value));
                        gone.extend(expected.map(|(number, _, _)| number));
                    }
                }
                prop_assert_eq!(aged.len(), list.len());
                prop_assert_eq!(aged.since(), list.first().map(|(_, _, since)| *since));
                for number in &gone {
                    prop_assert!(aged.get_mut(*number).is_none());
                }
            }
        }
    }
}
