//! What the thread that counts flows and the searches for ended time series share.

use palisade_flowlog::{Lost, LostSource};
use palisade_metrics::Hubble;

/// The counters, and how many flows were overwritten before they were counted.
#[derive(Debug)]
pub(super) struct Counted {
    pub(super) hubble: Hubble,
    pub(super) lost: u64,
}

impl Counted {
    /// Counts flows that were overwritten. Losses before the ring are counted where they happen.
    pub(super) const fn lost(&mut self, lost: Lost) {
        if matches!(lost.source, LostSource::HubbleRingBuffer) {
            self.lost += lost.count;
        }
    }
}
