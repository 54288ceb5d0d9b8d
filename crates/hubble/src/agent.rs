//! Events of the daemon: changes of policies, endpoints and the ipcache. A bounded ring keeps the most recent ones.

use std::{
    collections::VecDeque,
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
};

use palisade_flowlog::Timestamp;
use prost::Message as _;

use crate::{
    convert::{encode, time},
    proto::{
        flow::{self as pb, AgentEventType, agent_event::Notification},
        observer::GetAgentEventsResponse,
    },
    range::Source,
    wire::Encoded,
};

/// Number of events that are kept.
const CAPACITY: usize = 4_096;
/// Maximum number of labels of an event, apart from the text that says how many others there are.
const MAX_LABELS: usize = 64;
/// Longest text of an error in an event, bytes.
const MAX_ERROR_BYTES: usize = 1 << 10;

/// Event of the daemon.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AgentEvent {
    /// The daemon has started.
    Started,
    /// Policies have changed.
    PolicyUpdated {
        /// Names of the policies, or of the file.
        labels: Vec<String>,
        /// Revision of the policies.
        revision: u64,
        /// Number of rules.
        rules: u64,
    },
    /// Policies were removed.
    PolicyDeleted {
        /// Names of the policies, or of the file.
        labels: Vec<String>,
        /// Revision of the policies.
        revision: u64,
        /// Number of rules.
        rules: u64,
    },
    /// An endpoint has a new policy.
    EndpointRegenerated {
        /// Number of the endpoint.
        id: u16,
        /// Labels of its identity.
        labels: Vec<String>,
        /// Why the policy is not in force; `None` if it is.
        error: Option<String>,
    },
    /// An endpoint has appeared.
    EndpointCreated(EndpointName),
    /// An endpoint has gone.
    EndpointDeleted(EndpointName),
    /// An address or prefix has an identity.
    IpcacheUpserted(IpcacheChange),
    /// An address or prefix has lost its identity.
    IpcacheDeleted(IpcacheChange),
    /// An endpoint has learned an address by a DNS name. The API has no type for this event.
    NameLearned {
        /// Number of the endpoint.
        endpoint: u16,
        /// Name of the question.
        name: String,
        /// Address in the answer.
        address: IpAddr,
    },
}

impl AgentEvent {
    /// Returns the event with a bounded length: policies choose the number of their names and the texts of errors, and
    /// the events that are kept are bounded by their number only.
    #[must_use]
    pub fn bounded(mut self) -> Self {
        match &mut self {
            Self::PolicyUpdated { labels, .. } | Self::PolicyDeleted { labels, .. } => bound_labels(labels),
            Self::EndpointRegenerated { labels, error, .. } => {
                bound_labels(labels);
                if let Some(error) = error
                    && error.len() > MAX_ERROR_BYTES
                {
                    error.truncate(error.floor_char_boundary(MAX_ERROR_BYTES));
                    error.shrink_to_fit();
                }
            }
            Self::EndpointCreated(name) | Self::EndpointDeleted(name) => bound_labels(&mut name.labels),
            Self::Started | Self::IpcacheUpserted(_) | Self::IpcacheDeleted(_) | Self::NameLearned { .. } => {
            }
        }
        self
    }
}

fn bound_labels(labels: &mut Vec<String>) {
    let others = labels.len().saturating_sub(MAX_LABELS);
    if others > 0 {
        labels.truncate(MAX_LABELS);
        labels.push(format!("and {others} others"));
        labels.shrink_to_fit();
    }
}

/// Endpoint in an event.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EndpointName {
    /// Number.
    pub id: u16,
    /// Labels of its identity.
    pub labels: Vec<String>,
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
}

/// Change of the identity of an address or prefix.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct IpcacheChange {
    /// Address or prefix, with its length.
    pub cidr: String,
    /// Identity now, or the last one.
    pub identity: u32,
    /// Identity before.
    pub old_identity: Option<u32>,
    /// Name of the endpoint or peer, or the DNS name of a learned address.
    pub name: String,
    /// Namespace.
    pub namespace: String,
}

fn message(event: AgentEvent, at: Timestamp) -> pb::AgentEvent {
    let endpoint = |name: EndpointName| {
        Notification::EndpointUpdate(pb::EndpointUpdateNotification {
            id: name.id.into(),
            labels: name.labels,
            error: String::new(),
            pod_name: name.name,
            namespace: name.namespace,
        })
    };
    let ipcache = |change: IpcacheChange| {
        Notification::IpcacheUpdate(pb::IpCacheNotification {
            cidr: change.cidr,
            identity: change.identity,
            old_identity: change.old_identity,
            namespace: change.namespace,
            pod_name: change.name,
            ..pb::IpCacheNotification::default()
        })
    };
    let policy = |labels, revision, rules| {
        Notification::PolicyUpdate(pb::PolicyUpdateNotification {
            labels,
            revision,
            rule_count: i64::try_from(rules).unwrap_or(i64::MAX),
        })
    };
    let (kind, notification) = match event {
        AgentEvent::Started => (
            AgentEventType::AgentStarted,
            Notification::AgentStart(pb::TimeNotification { time: Some(time(at)) }),
        ),
        AgentEvent::PolicyUpdated {
            labels,
            revision,
            rules,
        } => (AgentEventType::PolicyUpdated, policy(labels, revision, rules)),
        AgentEvent::PolicyDeleted {
            labels,
            revision,
            rules,
        } => (AgentEventType::PolicyDeleted, policy(labels, revision, rules)),
        AgentEvent::EndpointRegenerated { id, labels, error } => (
            if error.is_some() {
                AgentEventType::EndpointRegenerateFailure
            } else {
                AgentEventType::EndpointRegenerateSuccess
            },
            Notification::EndpointRegenerate(pb::EndpointRegenNotification {
                id: id.into(),
                labels,
                error: error.unwrap_or_default(),
            }),
        ),
        AgentEvent::EndpointCreated(name) => (AgentEventType::EndpointCreated, endpoint(name)),
        AgentEvent::EndpointDeleted(name) => (AgentEventType::EndpointDeleted, endpoint(name)),
        AgentEvent::IpcacheUpserted(change) => (AgentEventType::IpcacheUpserted, ipcache(change)),
        AgentEvent::IpcacheDeleted(change) => (AgentEventType::IpcacheDeleted, ipcache(change)),
        AgentEvent::NameLearned {
            endpoint,
            name,
            address,
        } => (
            AgentEventType::AgentEventUnknown,
            Notification::Unknown(pb::AgentEventUnknown {
                r#type: "name-learned".to_owned(),
                notification: format!("endpoint {endpoint} has learned {address} by the name {name}"),
            }),
        ),
    };
    pb::AgentEvent {
        r#type: kind.into(),
        notification: Some(notification),
    }
}

/// Result of a read of the events, see [`crate::Api::agent_events`].
#[derive(Clone, PartialEq, Debug, Default)]
pub struct AgentRead {
    /// The events with their times.
    pub events: Vec<(Timestamp, pb::AgentEvent)>,
    /// Number of the next event.
    pub next: u64,
    /// Number of events that were overwritten before this read.
    pub lost: u64,
}

/// The most recent events.
#[derive(Debug, Default)]
pub(crate) struct AgentRing(Mutex<Content>);

#[derive(Debug, Default)]
struct Content {
    /// Number of the oldest event.
    first: u64,
    events: VecDeque<(Timestamp, Encoded)>,
}

impl AgentRing {
    /// Adds an event; a full ring drops the oldest one.
    pub(crate) fn push(&self, event: AgentEvent, node: &str, at: Timestamp) {
        let encoded = encode(&GetAgentEventsResponse {
            agent_event: Some(message(event.bounded(), at)),
            node_name: node.to_owned(),
            time: Some(time(at)),
        });
        let mut content = self.content();
        if content.events.len() >= CAPACITY {
            content.events.pop_front();
            content.first += 1;
        }
        content.events.push_back((at, encoded));
    }

    /// Returns the events from a number on.
    pub(crate) fn read(&self, from: u64) -> AgentRead {
        let content = self.content();
        let lost = content.first.saturating_sub(from);
        let skipped = usize::try_from(from.saturating_sub(content.first)).unwrap_or(usize::MAX);
        let next = content.first + content.events.len() as u64;
        let encoded: Vec<_> = content.events.iter().skip(skipped).cloned().collect();
        // Writers do not wait while the events are decoded.
        drop(content);
        let events = encoded.into_iter().filter_map(|(time, encoded)| {
            let response = GetAgentEventsResponse::decode(encoded.0).ok()?;
            Some((time, response.agent_event?))
        });
        AgentRead {
            events: events.collect(),
            next,
            lost,
        }
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        // A poisoned lock is used all the same: no code under it leaves the ring half changed if it panics.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Source for AgentRing {
    type Event = (Timestamp, Encoded);

    fn first(&self) -> u64 {
        self.content().first
    }

    fn next(&self) -> u64 {
        let content = self.content();
        content.first + content.events.len() as u64
    }

    fn get(&self, number: u64) -> Option<Self::Event> {
        let content = self.content();
        let at = usize::try_from(number.checked_sub(content.first)?).ok()?;
        content.events.get(at).cloned()
    }

    fn time(event: &Self::Event) -> Timestamp {
        event.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_newest_events_with_their_numbers() {
        let ring = AgentRing::default();
        for id in 0..=u16::try_from(CAPACITY).unwrap() {
            let created = AgentEvent::EndpointCreated(EndpointName {
                id,
                name: "web".into(),
                ..EndpointName::default()
            });
            ring.push(created, "node", Timestamp(7));
        }
        assert_eq!((ring.first(), ring.next()), (1, CAPACITY as u64 + 1));
        assert!(ring.get(0).is_none());
        let (at, encoded) = ring.get(1).unwrap();
        assert_eq!(at, Timestamp(7));
        let said = GetAgentEventsResponse::decode(encoded.0).unwrap();
        assert_eq!(said.node_name, "node");
        let event = said.agent_event.unwrap();
        assert_eq!(event.r#type(), AgentEventType::EndpointCreated);
        let Some(Notification::EndpointUpdate(update)) = event.notification else {
            panic!("{event:?}");
        };
        assert_eq!((update.id, &*update.pod_name), (1, "web"));
    }

    #[test]
    fn a_read_continues_after_the_last_one_and_counts_lost_events() {
        let ring = AgentRing::default();
        assert_eq!(ring.read(0), AgentRead::default());
        ring.push(AgentEvent::Started, "node", Timestamp(1));
        let read = ring.read(0);
        assert_eq!((read.events.len(), read.next, read.lost), (1, 1, 0));
        assert_eq!(read.events[0].0, Timestamp(1));
        assert_eq!(read.events[0].1.r#type(), AgentEventType::AgentStarted);
        assert!(ring.read(1).events.is_empty());
        for time in 0..=CAPACITY as i64 {
            ring.push(AgentEvent::Started, "node", Timestamp(time));
        }
        let read = ring.read(1);
        assert_eq!((read.events.len(), read.lost), (CAPACITY, 1));
        assert_eq!(read.next, CAPACITY as u64 + 2);
    }

    #[test]
    fn a_failed_regeneration_is_a_failure() {
        let failed = AgentEvent::EndpointRegenerated {
            id: 3,
            labels: vec!["k8s:app=web".into()],
            error: Some("the policy map is full".into()),
        };
        let event = message(failed, Timestamp(0));
        assert_eq!(event.r#type(), AgentEventType::EndpointRegenerateFailure);
    }

    #[test]
    fn labels_and_errors_of_events_are_bounded() {
        let updated = AgentEvent::PolicyUpdated {
            labels: vec!["shop/web".into(); MAX_LABELS + 7],
            revision: 1,
            rules: 1,
        };
        let AgentEvent::PolicyUpdated { labels, .. } = updated.bounded() else {
            unreachable!()
        };
        assert_eq!(labels.len(), MAX_LABELS + 1);
        assert_eq!(labels[MAX_LABELS], "and 7 others");
        let failed = AgentEvent::EndpointRegenerated {
            id: 3,
            labels: Vec::new(),
            error: Some("é".repeat(MAX_ERROR_BYTES)),
        };
        let AgentEvent::EndpointRegenerated { error, .. } = failed.bounded() else {
            unreachable!()
        };
        assert_eq!(error.unwrap().len(), MAX_ERROR_BYTES);
    }
}
