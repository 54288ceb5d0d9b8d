//! Where each frame is. Types keep a frame from being in two hands; this keeps the account with the kernel, which
//! knows no types.

use std::cell::Cell;

/// Where a frame can be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Place {
    /// Nobody uses it.
    Free,
    /// In the fill ring, or filled and in the receive ring.
    Receiving,
    /// In the transmit ring, on its way, or in the completion ring.
    Sending,
    /// In somebody's hands.
    Held,
}

/// How many frames are where.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Nobody uses them.
    pub free: usize,
    /// With the kernel to be filled, or filled and not yet received.
    pub receiving: usize,
    /// With the kernel to be sent, or sent and not yet taken back.
    pub sending: usize,
    /// In somebody's hands.
    pub held: usize,
}

impl Counts {
    /// All of them together.
    #[must_use]
    pub fn total(&self) -> usize {
        self.free + self.receiving + self.sending + self.held
    }
}

/// The places of all frames, and the free ones as a stack: what was used last is still in the cache.
#[derive(Debug)]
pub struct Ledger {
    places: Box<[Cell<Place>]>,
    /// The first `depth` are the free ones.
    stack: Box<[Cell<u32>]>,
    depth: Cell<usize>,
    counts: [Cell<usize>; 4],
}

impl Ledger {
    /// `frames` frames, all free.
    pub fn new(frames: u32) -> Self {
        Self {
            places: (0..frames).map(|_| Cell::new(Place::Free)).collect(),
            // The lowest first.
            stack: (0..frames).rev().map(Cell::new).collect(),
            depth: Cell::new(frames as usize),
            counts: [
                Cell::new(frames as usize),
                Cell::new(0),
                Cell::new(0),
                Cell::new(0),
            ],
        }
    }

    /// How many are free.
    #[inline]
    pub fn free(&self) -> usize {
        self.depth.get()
    }

    /// Takes a free frame to another place.
    #[inline]
    pub fn take(&self, to: Place) -> Option<u32> {
        debug_assert_ne!(to, Place::Free);
        let depth = self.depth.get().checked_sub(1)?;
        let index = self.stack[depth].get();
        self.depth.set(depth);
        self.places[index as usize].set(to);
        self.count(Place::Free, to);
        Some(index)
    }

    /// Moves a frame on. False, and nothing happens: it is not where it is said to come from, or there is no such
    /// frame.
    #[inline]
    pub fn shift(&self, index: usize, from: Place, to: Place) -> bool {
        let Some(place) = self.places.get(index) else {
            return false;
        };
        if place.get() != from {
            return false;
        }
        if to == Place::Free {
            let depth = self.depth.get();
            let Some(top) = self.stack.get(depth) else {
                return false;
            };
            top.set(index as u32);
            self.depth.set(depth + 1);
        } else if from == Place::Free {
            // Only by `take`: it would have to be found in the stack.
            return false;
        }
        place.set(to);
        self.count(from, to);
        true
    }

    #[inline]
    fn count(&self, from: Place, to: Place) {
        let (from, to) = (&self.counts[from as usize], &self.counts[to as usize]);
        from.set(from.get() - 1);
        to.set(to.get() + 1);
    }

    /// How many frames are where.
    pub fn counts(&self) -> Counts {
        let [free, receiving, sending, held] = &self.counts;
        Counts {
            free: free.get(),
            receiving: receiving.get(),
            sending: sending.get(),
            held: held.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const FRAMES: u32 = 8;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Take(Place),
        Shift(usize, Place, Place),
    }

    fn place() -> impl Strategy<Value = Place> {
        prop_oneof![
            Just(Place::Free),
            Just(Place::Receiving),
            Just(Place::Sending),
            Just(Place::Held)
        ]
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            2 => place()
                .prop_filter("taken to be used", |to| *to != Place::Free)
                .prop_map(Step::Take),
            // Also frames that are not there, and from where they are not.
            3 => (0..FRAMES as usize + 2, place(), place())
                .prop_filter("a step", |(_, from, to)| from != to)
                .prop_map(|(index, from, to)| Step::Shift(index, from, to)),
        ]
    }

    proptest! {
        #[test]
        fn no_frame_is_twice_and_none_is_lost(steps in prop::collection::vec(step(), 0..200)) {
            let ledger = Ledger::new(FRAMES);
            let mut model: BTreeMap<usize, Place> = (0..FRAMES as usize).map(|n| (n, Place::Free)).collect();
            for step in steps {
                match step {
                    Step::Take(to) => match ledger.take(to) {
                        Some(index) => {
                            let was = model.insert(index as usize, to);
                            prop_assert_eq!(was, Some(Place::Free), "somebody had it");
                        }
                        None => prop_assert!(model.values().all(|place| *place != Place::Free)),
                    },
                    Step::Shift(index, from, to) => {
                        let right = from != Place::Free && model.get(&index) == Some(&from);
                        prop_assert_eq!(ledger.shift(index, from, to), right);
                        if right {
                            model.insert(index, to);
                        }
                    }
                }
                let count = |wanted| model.values().filter(|place| **place == wanted).count();
                let expected = Counts {
                    free: count(Place::Free),
                    receiving: count(Place::Receiving),
                    sending: count(Place::Sending),
                    held: count(Place::Held),
                };
                prop_assert_eq!(ledger.counts(), expected);
                prop_assert_eq!(ledger.free(), expected.free);
                prop_assert_eq!(expected.total(), FRAMES as usize);
            }
            // Everything that comes home can be had again, each once.
            for (index, place) in model {
                if place != Place::Free {
                    prop_assert!(ledger.shift(index, place, Place::Free));
                }
            }
            let mut all: Vec<u32> = std::iter::from_fn(|| ledger.take(Place::Held)).collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..FRAMES).collect::<Vec<_>>());
        }
    }
}
