//! Counts the flows of the ring.

use std::{
    io,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use palisade_flowlog::{Next, Raw, Ring};
use palisade_metrics::{Batch, Hubble, Sample};

use super::{
    super::{measured::lock, view::Shared},
    counted::Counted,
    ends::KnownEnds,
};
use crate::config::Metrics;

/// Longest wait for a flow.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Time between two reads while flows arrive. Without it, each flow would wake the thread, and its writer would pay for
/// the system call.
const READ_INTERVAL: Duration = Duration::from_millis(20);
/// Largest number of flows that are counted before a scrape can read the counters.
const MAX_BATCH: usize = 512;

/// Starts the thread that counts.
pub(super) fn run(config: &Metrics, ring: &Arc<Ring>, view: &Arc<Shared>) -> io::Result<Arc<Mutex<Counted>>> {
    let counted = Arc::new(Mutex::new(Counted {
        hubble: Hubble::new(config.hubble.clone(), config.series_per_metric),
        lost: 0,
    }));
    if config.hubble.is_empty() {
        return Ok(counted);
    }
    let shared = Arc::clone(&counted);
    let mut cursor = ring.oldest();
    let mut ends = KnownEnds::new(&lock(&counted).hubble, Arc::clone(view), config.series_grace);
    thread::Builder::new()
        .name("metrics-flows".into())
        .spawn(move || {
            let needs_names = lock(&shared).hubble.needs_names();
            let mut batch = Batch::default();
            loop {
                cursor.wait(ends.as_ref().map_or(IDLE_TIMEOUT, KnownEnds::interval));
                loop {
                    let mut counted = lock(&shared);
                    let mut read = 0;
                    for _ in 0..MAX_BATCH {
                        let more = if needs_names {
                            cursor.read().map(|next| match next {
                                Next::Flow(flow) => counted.hubble.count(&Sample::of_flow(&flow)),
                                Next::Lost(lost) => counted.lost(lost),
                            })
                        } else {
                            cursor.read_raw(|next| match next {
                                Raw::Flow(flow) => counted.hubble.count(&Sample::of_flow(flow)),
                                Raw::Record(record, _) => batch.add(record, &mut counted.hubble),
                                Raw::Lost(lost) => counted.lost(lost),
                            })
                        };
                        if more.is_none() {
                            break;
                        }
                        read += 1;
                    }
                    batch.finish(&mut counted.hubble);
                    drop(counted);
                    if read < MAX_BATCH {
                        break;
                    }
                }
                if let Some(ends) = &mut ends {
                    ends.end_series(&shared);
                }
                thread::sleep(READ_INTERVAL);
            }
        })?;
    Ok(counted)
}
