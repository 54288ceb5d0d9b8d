//! The frame handles of one datagram, and a pool of vectors for the frame handles of fragments.

use palisade_abi::Reason;

use crate::Sink;

/// Frames of one datagram: one, or one for each fragment in order of arrival.
pub(crate) enum Frames<F> {
    One(F),
    Many(Vec<F>),
}

/// Pool of empty vectors, so that fragments allocate nothing in the steady state.
pub(crate) struct Spare<F>(Vec<Vec<F>>);

impl<F> Spare<F> {
    /// Maximum number of vectors in the pool.
    const KEPT: usize = 64;

    pub(crate) const fn new() -> Self {
        Self(Vec::new())
    }

    pub(crate) fn take(&mut self) -> Vec<F> {
        self.0.pop().unwrap_or_default()
    }

    pub(crate) fn give(&mut self, used: Vec<F>) {
        if self.0.len() < Self::KEPT {
            self.0.push(used);
        }
    }
}

impl<F> Frames<F> {
    fn each(self, spare: &mut Spare<F>, mut f: impl FnMut(F)) {
        match self {
            Self::One(frame) => f(frame),
            Self::Many(mut frames) => {
                frames.drain(..).for_each(f);
                spare.give(frames);
            }
        }
    }

    pub(crate) fn release<S: Sink<F>>(self, spare: &mut Spare<F>, sink: &mut S) {
        self.each(spare, |frame| sink.release(frame));
    }

    pub(crate) fn discard<S: Sink<F>>(self, reason: Reason, spare: &mut Spare<F>, sink: &mut S) {
        self.each(spare, |frame| sink.discard(frame, reason));
    }
}
