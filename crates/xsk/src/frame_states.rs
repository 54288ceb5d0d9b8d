//! The state of each frame of a UMEM: free, with the kernel, or held by user space.
//!
//! In user space the type [`Frame`](crate::Frame) guarantees that a frame has one owner. The kernel returns frames as
//! bare descriptors; this module checks that each descriptor names a frame that the kernel owned. This module depends
//! on no other module; start at [`FrameStates`].

use std::cell::Cell;

/// The state of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum FrameState {
    /// Unused.
    Free,
    /// In the fill ring, or filled and in the receive ring.
    Receiving,
    /// In the transmit ring, being sent, or in the completion ring.
    Sending,
    /// Owned by a [`Frame`](crate::Frame).
    Held,
}

/// The number of frames in each state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Unused.
    pub free: usize,
    /// In the fill ring, or filled and not yet taken from the receive ring.
    pub receiving: usize,
    /// In the transmit ring, or sent and not yet taken from the completion ring.
    pub sending: usize,
    /// Owned by a [`Frame`](crate::Frame).
    pub held: usize,
}

impl Counts {
    /// Returns the number of all frames.
    #[must_use]
    pub fn total(&self) -> usize {
        self.free + self.receiving + self.sending + self.held
    }
}

/// The states of all frames, and a stack of the free frames. The frame that was freed last is reused first, because it
/// is most likely still in the CPU's cache.
#[derive(Debug)]
pub(crate) struct FrameStates {
    states: Box<[Cell<FrameState>]>,
    /// The first `depth` elements are the numbers of the free frames.
    stack: Box<[Cell<u32>]>,
    depth: Cell<usize>,
    counts: [Cell<usize>; 4],
}

impl FrameStates {
    /// Creates the states of `frames` frames, all of them free.
    pub(crate) fn new(frames: u32) -> Self {
        Self {
            states: (0..frames).map(|_| Cell::new(FrameState::Free)).collect(),
            // Reversed, so that the lowest number is on top.
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

    /// Returns the number of free frames.
    #[inline]
    pub(crate) fn free(&self) -> usize {
        self.depth.get()
    }

    /// Takes a free frame, sets its state to `to`, and returns its number. Returns `None` if no frame is free.
    #[inline]
    pub(crate) fn take(&self, to: FrameState) -> Option<u32> {
        debug_assert_ne!(to, FrameState::Free);
        let depth = self.depth.get().checked_sub(1)?;
        let index = self.stack.get(depth)?.get();
        self.states.get(index as usize)?.set(to);
        self.depth.set(depth);
        self.count(FrameState::Free, to);
        Some(index)
    }

    /// Changes the state of a frame from `from`, which must not be [`FrameState::Free`], to `to`. Returns false and
    /// changes nothing if the state was not `from` or if the frame does not exist.
    #[inline]
    pub(crate) fn transition(&self, index: usize, from: FrameState, to: FrameState) -> bool {
        let Some(state) = self.states.get(index) else {
            return false;
        };
        if state.get() != from {
            return false;
        }
        if to == FrameState::Free {
            let depth = self.depth.get();
            let Some(top) = self.stack.get(depth) else {
                return false;
            };
            top.set(index as u32);
            self.depth.set(depth + 1);
        } else if from == FrameState::Free {
            // A free frame is on the stack, and only `take` removes frames from the stack.
            return false;
        }
        state.set(to);
        self.count(from, to);
        true
    }

    #[inline]
    fn count(&self, from: FrameState, to: FrameState) {
        let [free, receiving, sending, held] = &self.counts;
        let count = |state| match state {
            FrameState::Free => free,
            FrameState::Receiving => receiving,
            FrameState::Sending => sending,
            FrameState::Held => held,
        };
        let (from, to) = (count(from), count(to));
        from.set(from.get() - 1);
        to.set(to.get() + 1);
    }

    /// Returns the number of frames in each state.
    pub(crate) fn counts(&self) -> Counts {
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
        Take(FrameState),
        Transition(usize, FrameState, FrameState),
    }

    fn state() -> impl Strategy<Value = FrameState> {
        prop_oneof![
            Just(FrameState::Free),
            Just(FrameState::Receiving),
            Just(FrameState::Sending),
            Just(FrameState::Held)
        ]
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            2 => state()
                .prop_filter("a taken frame is not free", |to| *to != FrameState::Free)
                .prop_map(Step::Take),
            // Includes frames that do not exist and states that the frame is not in.
            3 => (0..FRAMES as usize + 2, state(), state())
                .prop_filter("a transition changes the state", |(_, from, to)| from != to)
                .prop_map(|(index, from, to)| Step::Transition(index, from, to)),
        ]
    }

    proptest! {
        #[test]
        fn no_frame_is_duplicated_or_lost(steps in prop::collection::vec(step(), 0..200)) {
            let states = FrameStates::new(FRAMES);
            let mut model: BTreeMap<usize, FrameState> = (0..FRAMES as usize).map(|n| (n, FrameState::Free)).collect();
            for step in steps {
                match step {
                    Step::Take(to) => match states.take(to) {
                        Some(index) => {
                            let was = model.insert(index as usize, to);
                            prop_assert_eq!(was, Some(FrameState::Free), "the frame was taken already");
                        }
                        None => prop_assert!(model.values().all(|state| *state != FrameState::Free)),
                    },
                    Step::Transition(index, from, to) => {
                        let right = from != FrameState::Free && model.get(&index) == Some(&from);
                        prop_assert_eq!(states.transition(index, from, to), right);
                        if right {
                            model.insert(index, to);
                        }
                    }
                }
                let count = |wanted| model.values().filter(|state| **state == wanted).count();
                let expected = Counts {
                    free: count(FrameState::Free),
                    receiving: count(FrameState::Receiving),
                    sending: count(FrameState::Sending),
                    held: count(FrameState::Held),
                };
                prop_assert_eq!(states.counts(), expected);
                prop_assert_eq!(states.free(), expected.free);
                prop_assert_eq!(expected.total(), FRAMES as usize);
            }
            // Every frame that is freed can be taken again, once.
            for (index, state) in model {
                if state != FrameState::Free {
                    prop_assert!(states.transition(index, state, FrameState::Free));
                }
            }
            let mut all: Vec<u32> = std::iter::from_fn(|| states.take(FrameState::Held)).collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..FRAMES).collect::<Vec<_>>());
        }
    }
}
