//! Removes expired flows and learned addresses at intervals, on a thread of its own, because a walk through a large map
//! takes long.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use palisade_abi::{Event, ct_flags};
use palisade_datapath::{Datapath, Fate, MapError, monotonic_coarse};
use palisade_flowlog::{Flow, Ring};
use tracing::error;

use super::{
    events,
    fqdn::FqdnManager,
    rule_numbers::{Numbers, RecordedRules},
    view::{EventNames, Shared},
};

/// Largest number of flow records about ended flows that one sweep writes. More of them could push all other flow
/// records out of the ring.
const MAX_END_EVENTS: usize = 1_000;

/// Interval between two sweeps. It can be changed while the sweeper runs.
#[derive(Clone, Debug)]
pub(super) struct Interval(Arc<AtomicU64>);

impl Interval {
    pub(super) fn new(interval: Duration) -> Self {
        let new = Self(Arc::default());
        new.set(interval);
        new
    }

    pub(super) fn set(&self, interval: Duration) {
        let milliseconds = u64::try_from(interval.as_millis()).unwrap_or(u64::MAX);
        self.0.store(milliseconds, Ordering::Relaxed);
    }

    fn get(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// Starts the thread.
pub(super) fn run(
    datapath: Arc<Datapath>,
    interval: Interval,
    ring: Arc<Ring>,
    shared: Arc<Shared>,
    learned: Arc<FqdnManager>,
    recorded: Arc<RecordedRules>,
) -> io::Result<()> {
    thread::Builder::new().name("sweeper".into()).spawn(move || {
        loop {
            thread::sleep(interval.get());
            // While an attachment fails in an upgrade, programs of the earlier version refresh flows only in their table.
            let copied = datapath.take_over_flows();
            let begun = Instant::now();
            let swept = copied.and_then(|copied| {
                // Flows in the table of an earlier version can have numbers, too.
                let wants_numbers = copied.is_none() && recorded.is_wanted();
                sweep(&datapath, &ring, &shared, &learned, wants_numbers)
            });
            match swept {
                Ok(Swept { in_use, numbers }) => {
                    if let Some(mut numbers) = numbers {
                        numbers.rules.extend(ring.rules());
                        recorded.report(begun, numbers);
                    }
                    learned.sweep(&in_use);
                }
                // While the addresses in use are unknown, all learned names are kept.
                Err(error) => error!(
                    %error,
                    "expired connections and learned names are not swept, because the connections cannot be read"
                ),
            }
        }
    })?;
    Ok(())
}

/// What the remaining flows use.
struct Swept {
    /// Learned addresses of live egress connections, by endpoint.
    in_use: HashMap<u16, HashSet<IpAddr>>,
    /// Numbers of rules and rule sets, if they are wanted.
    numbers: Option<Numbers>,
}

/// Removes expired flows.
fn sweep(
    datapath: &Datapath,
    ring: &Ring,
    shared: &Shared,
    learned: &FqdnManager,
    wants_numbers: bool,
) -> Result<Swept, MapError> {
    let now = monotonic_coarse();
    let names = EventNames::with_units(shared.get());
    let offset = events::clock_offset();
    let mut reported = 0;
    let mut in_use: HashMap<u16, HashSet<IpAddr>> = HashMap::new();
    let mut numbers = wants_numbers.then(Numbers::default);
    datapath.conntrack().remove_if(
        |_, entry| entry.expires <= now,
        |fate, key, entry| match fate {
            Fate::Removed if reported < MAX_END_EVENTS => {
                if let Some(event) = Event::of_expired(key, entry, now) {
                    reported += 1;
                    ring.push(Flow::from_event(&event, &names, offset));
                }
            }
            Fate::Removed => {}
            Fate::Stays => {
                if let Some(numbers) = &mut numbers {
                    numbers.rules.insert(entry.rule);
                    numbers.rule_sets.insert(entry.ruleset);
                }
                let remote = key.remote.into();
                let is_outgoing = entry.flags & (ct_flags::INGRESS | ct_flags::CLOSED) == 0;
                if is_outgoing && learned.has_learned(key.endpoint, remote) {
                    in_use.entry(key.endpoint).or_default().insert(remote);
                }
            }
        },
    )?;
    Ok(Swept { in_use, numbers })
}
