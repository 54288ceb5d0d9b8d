//! Ends the time series of endpoints, peers and identities that were removed.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use palisade_flowlog::flow::Endpoint;
use palisade_metrics::{Ends, Hubble};

use super::{
    super::{
        measured::lock,
        view::{Shared, View},
    },
    counted::Counted,
};

/// Longest time between two searches for time series that end.
const MAX_INTERVAL: Duration = Duration::from_secs(10);
/// Part of the grace time between two searches.
const INTERVALS: u32 = 4;

/// The ends of flows that exist in the published view.
pub(super) struct KnownEnds {
    shared: Arc<Shared>,
    view: Arc<View>,
    ends: Ends,
    grace: Duration,
    started: Instant,
    /// Time of the last search.
    searched: Duration,
}

impl KnownEnds {
    /// Returns `None` if no label of the metrics shows an end.
    pub(super) fn new(hubble: &Hubble, shared: Arc<Shared>, grace: Duration) -> Option<Self> {
        hubble.shows_ends().then(|| Self {
            view: Arc::default(),
            ends: hubble.ends(),
            shared,
            grace,
            started: Instant::now(),
            searched: Duration::ZERO,
        })
    }

    /// Returns the time between two searches.
    pub(super) fn interval(&self) -> Duration {
        (self.grace / INTERVALS).min(MAX_INTERVAL)
    }

    /// Ends the time series whose ends do not exist any more, if a search is due.
    pub(super) fn end_series(&mut self, counted: &Mutex<Counted>) {
        let now = self.started.elapsed();
        if now.saturating_sub(self.searched) < self.interval() {
            return;
        }
        self.searched = now;
        let view = self.shared.get();
        if !Arc::ptr_eq(&view, &self.view) {
            let none = lock(counted).hubble.ends();
            let before = std::mem::replace(&mut self.ends, none);
            add(&view, &mut self.ends);
            self.ends.follow(before);
            self.view = view;
        }
        lock(counted).hubble.end(&self.ends, now, self.grace);
    }
}

/// Adds the ends of a view. A flow has the name of an endpoint or peer and the labels of an identity, which are not
/// those of the endpoint if the identity was another one when the packet was decided.
fn add(view: &View, ends: &mut Ends) {
    for (owner, address) in view.owners() {
        ends.add(&Endpoint {
            namespace: Arc::clone(&owner.namespace),
            pod_name: Arc::clone(&owner.name),
            workloads: Arc::clone(&owner.workloads),
            ..Endpoint::default()
        });
        if let Some(address) = address {
            ends.add_address(address);
        }
    }
    for identity in view.snapshot.identities.keys() {
        let labels = view.labels(*identity);
        ends.add(&Endpoint {
            labels: labels.into_iter().map(Into::into).collect(),
            ..Endpoint::default()
        });
    }
}
