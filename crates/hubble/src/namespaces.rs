//! Namespaces that had flows in the last hour.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use palisade_flowlog::{Flow, Timestamp};

/// Time for which a namespace is reported after its last flow, ns.
const KEPT_NS: i64 = 3_600_000_000_000;

/// Namespaces of the flows that were read. Their number is bounded by the configuration, which defines the namespaces of
/// endpoints and peers.
#[derive(Debug, Default)]
pub(crate) struct Namespaces(Mutex<BTreeMap<Arc<str>, Timestamp>>);

impl Namespaces {
    /// Notes the namespaces of a flow.
    pub(crate) fn note(&self, flow: &Flow) {
        for end in [&flow.source, &flow.destination] {
            if end.namespace.is_empty() {
                continue;
            }
            let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match known.get_mut(&*end.namespace) {
                Some(last) => *last = flow.time.max(*last),
                None => {
                    known.insert(Arc::clone(&end.namespace), flow.time);
                }
            }
        }
    }

    /// Returns the namespaces with a flow in the last hour, sorted.
    pub(crate) fn list(&self, now: Timestamp) -> Vec<String> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, last| last.0 > now.0.saturating_sub(KEPT_NS));
        known.keys().map(ToString::to_string).collect()
    }
}

#[cfg(test)]
mod tests {
    use palisade_flowlog::flow::Endpoint;

    use super::*;

    #[test]
    fn a_namespace_is_reported_for_an_hour() {
        let namespaces = Namespaces::default();
        let flow = |source: &str, destination: &str, time| Flow {
            source: Endpoint {
                namespace: source.into(),
                ..Endpoint::default()
            },
            destination: Endpoint {
                namespace: destination.into(),
                ..Endpoint::default()
            },
            time: Timestamp(time),
            ..Flow::default()
        };
        namespaces.note(&flow("shop", "", 0));
        namespaces.note(&flow("db", "shop", 10));
        assert_eq!(namespaces.list(Timestamp(20)), ["db", "shop"]);
        namespaces.note(&flow("db", "", 20));
        assert_eq!(namespaces.list(Timestamp(KEPT_NS + 15)), ["db"]);
    }
}
