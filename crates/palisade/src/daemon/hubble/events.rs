//! Events of the daemon for the flow API. The control thread only notifies a thread of the API that a view was
//! published, and never waits; the thread of the API compares the published views.

use std::{
    collections::HashMap,
    fmt::Display,
    hash::Hash,
    io,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use palisade_abi::{EndpointState, IpcacheEntry};
use palisade_hubble::{
    Api,
    agent::{AgentEvent, EndpointName, IpcacheChange},
};
use tracing::warn;

use super::super::view::{Shared, View, prefix_text};
use crate::priority;

/// Shortest time between two messages about lost events.
const LOSS_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Notices that wait for the thread of the API.
const QUEUED_NOTICES: usize = 256;

#[derive(Debug)]
enum Notice {
    /// A new view was published.
    View,
    /// An event that is complete.
    Event(Box<AgentEvent>),
}

/// Takes notices of the control thread and of the FQDN manager.
#[derive(Clone, Debug)]
pub(crate) struct AgentEvents {
    notices: SyncSender<Notice>,
    /// Notices for which the queue had no room.
    lost: Arc<AtomicU64>,
}

/// The other end of [`AgentEvents`].
#[derive(Debug)]
pub(crate) struct AgentQueue {
    notices: Receiver<Notice>,
    lost: Arc<AtomicU64>,
}

impl AgentEvents {
    pub(crate) fn new() -> (Self, AgentQueue) {
        let (sender, notices) = sync_channel(QUEUED_NOTICES);
        let lost = Arc::<AtomicU64>::default();
        let queue = AgentQueue {
            notices,
            lost: Arc::clone(&lost),
        };
        (
            Self {
                notices: sender,
                lost,
            },
            queue,
        )
    }

    /// Notifies the thread that a new view was published. If the queue is full, the thread compares the newest view after
    /// one of the notices that it contains.
    pub(crate) fn view_published(&self) {
        let _ = self.notices.try_send(Notice::View);
    }

    /// Reports an event. Never waits: the event is lost if the queue is full.
    pub(crate) fn report(&self, event: AgentEvent) {
        if let Err(TrySendError::Full(_)) = self.notices.try_send(Notice::Event(Box::new(event.bounded()))) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Reports that a change of the policies is not in force.
    pub(crate) fn failed(&self, endpoints: impl Iterator<Item = u16>, problem: &str) {
        for id in endpoints {
            self.report(AgentEvent::EndpointRegenerated {
                id,
                labels: Vec::new(),
                error: Some(problem.to_owned()),
            });
        }
    }
}

impl AgentQueue {
    /// Starts the thread that takes the notices.
    pub(super) fn serve(self, api: Api, shared: Arc<Shared>) -> io::Result<()> {
        thread::Builder::new()
            .name("hubble-events".into())
            .spawn(move || {
                priority::lower();
                api.report(AgentEvent::Started);
                let mut known = Arc::<View>::default();
                let mut lost = 0;
                let mut warned = None;
                for notice in self.notices {
                    if let Notice::Event(event) = notice {
                        api.report(*event);
                    }
                    // After each notice, since that of a view is lost if the queue is full.
                    let now = shared.get();
                    if !Arc::ptr_eq(&known, &now) {
                        changes(&known, &now, |event| api.report(event));
                        known = now;
                    }
                    let now_lost = self.lost.load(Ordering::Relaxed);
                    // DNS servers choose how many names are learned, so the message is limited.
                    let due = warned.is_none_or(|at: Instant| at.elapsed() > LOSS_LOG_INTERVAL);
                    if now_lost != lost && due {
                        warned = Some(Instant::now());
                        warn!(count = now_lost - lost, "agent events of the flow API were lost");
                        lost = now_lost;
                    }
                }
            })
            .map(drop)
    }
}

/// Reports the differences between two views: endpoints, then the ipcache.
fn changes(before: &View, now: &View, mut report: impl FnMut(AgentEvent)) {
    let name = |view: &View, id: u16, state: &EndpointState| {
        let owner = view.owner(id);
        EndpointName {
            id,
            labels: view.labels(state.identity),
            name: owner.map(|owner| owner.name.to_string()).unwrap_or_default(),
            namespace: owner.map(|owner| owner.namespace.to_string()).unwrap_or_default(),
        }
    };
    let (old, new) = (&before.snapshot.endpoints, &now.snapshot.endpoints);
    for (id, state) in old.iter().filter(|(id, _)| !new.contains_key(id)) {
        report(AgentEvent::EndpointDeleted(name(before, *id, state)));
    }
    for (id, state) in new {
        let known = old.get(id);
        if known.is_none() {
            report(AgentEvent::EndpointCreated(name(now, *id, state)));
        }
        if known != Some(state) {
            report(AgentEvent::EndpointRegenerated {
                id: *id,
                labels: now.labels(state.identity),
                error: None,
            });
        }
    }
    let address = |address: &palisade_abi::Addr| IpNet::from(IpAddr::from(*address));
    if !Arc::ptr_eq(&before.snapshot.addresses, &now.snapshot.addresses) {
        let entries = (&*before.snapshot.addresses, &*now.snapshot.addresses);
        ipcache((before, now), entries, address, &mut report);
    }
    if !Arc::ptr_eq(&before.snapshot.prefixes, &now.snapshot.prefixes) {
        let entries = (&*before.snapshot.prefixes, &*now.snapshot.prefixes);
        ipcache((before, now), entries, |key| prefix_text(*key), &mut report);
    }
}

fn ipcache<K: Eq + Hash, T: Display>(
    (before, now): (&View, &View),
    (old, new): (&HashMap<K, IpcacheEntry>, &HashMap<K, IpcacheEntry>),
    text: impl Fn(&K) -> T,
    mut report: impl FnMut(AgentEvent),
) {
    let change = |view: &View, key: &K, identity: u32, old_identity: Option<u32>| {
        let cidr = text(key).to_string();
        let net = cidr.parse::<IpNet>().ok();
        let address = net.filter(|net| net.prefix_len() == net.max_prefix_len());
        let owner = address.and_then(|net| view.owner_of(net.addr()));
        IpcacheChange {
            cidr,
            identity,
            old_identity,
            name: owner.map(|owner| owner.name.to_string()).unwrap_or_default(),
            namespace: owner.map(|owner| owner.namespace.to_string()).unwrap_or_default(),
        }
    };
    for (key, entry) in old.iter().filter(|(key, _)| !new.contains_key(key)) {
        report(AgentEvent::IpcacheDeleted(change(
            before,
            key,
            entry.identity,
            None,
        )));
    }
    for (key, entry) in new {
        let known = old.get(key).map(|entry| entry.identity);
        if known != Some(entry.identity) {
            report(AgentEvent::IpcacheUpserted(change(
                now,
                key,
                entry.identity,
                known,
            )));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use palisade_abi::PrefixKey;
    use palisade_model::{
        inventory::{Endpoint, Inventory},
        labels::{Labels, parse_label},
        snapshot::Snapshot,
    };

    use super::*;

    const WEB: u32 = 1_000;
    const DB: u32 = 1_001;
    const CACHE: u32 = 1_002;

    /// Returns a view with endpoints (number, name, identity, revision) whose addresses are 10.0.0.NUMBER, and with IPv4
    /// prefixes of 24 bits and their identities.
    fn view(endpoints: &[(u16, &str, u32, u32)], prefixes: &[(&str, u32)]) -> View {
        let address = |id: u16| format!("10.0.0.{id}").parse::<IpAddr>().unwrap();
        let mut snapshot = Snapshot::default();
        let (mut identities, mut addresses) = (BTreeMap::new(), HashMap::new());
        let mut inventory = Inventory::default();
        for (id, name, identity, revision) in endpoints {
            let labels = Labels::new([parse_label(&format!("k8s:app={name}"))]);
            identities.insert(*identity, labels.clone());
            let entry = IpcacheEntry {
                identity: *identity,
                endpoint: *id,
                flags: 0,
            };
            addresses.insert(address(*id).into(), entry);
            let state = EndpointState {
                policy: 1,
                revision: *revision,
                identity: *identity,
                flags: 0,
            };
            snapshot.endpoints.insert(*id, state);
            inventory.endpoints.push(Endpoint {
                id: *id,
                name: (*name).to_owned(),
                namespace: "shop".to_owned(),
                labels,
                named_ports: BTreeMap::new(),
                addresses: vec![address(*id)],
                audit: false,
            });
        }
        let prefixes = prefixes.iter().map(|(text, identity)| {
            let key = PrefixKey {
                length: 96 + 24,
                addr: text.parse::<IpAddr>().unwrap().into(),
            };
            let entry = IpcacheEntry {
                identity: *identity,
                ..IpcacheEntry::default()
            };
            (key, entry)
        });
        snapshot.prefixes = Arc::new(prefixes.collect());
        snapshot.identities = Arc::new(identities);
        snapshot.addresses = Arc::new(addresses);
        View::new("node1", snapshot, &inventory, &BTreeMap::new(), (None, None), 1)
    }

    fn reported(before: &View, now: &View) -> Vec<AgentEvent> {
        let mut events = Vec::new();
        changes(before, now, |event| events.push(event));
        events
    }

    fn endpoint(id: u16, name: &str) -> EndpointName {
        EndpointName {
            id,
            labels: vec![format!("k8s:app={name}")],
            name: name.to_owned(),
            namespace: "shop".to_owned(),
        }
    }

    fn regenerated(id: u16, name: &str) -> AgentEvent {
        AgentEvent::EndpointRegenerated {
            id,
            labels: vec![format!("k8s:app={name}")],
            error: None,
        }
    }

    fn change(cidr: &str, identity: u32, old_identity: Option<u32>, name: &str) -> IpcacheChange {
        IpcacheChange {
            cidr: cidr.to_owned(),
            identity,
            old_identity,
            name: name.to_owned(),
            namespace: if name.is_empty() { "" } else { "shop" }.to_owned(),
        }
    }

    #[test]
    fn each_difference_of_two_views_is_one_event() {
        let before = view(
            &[(2, "web", WEB, 2), (3, "db", DB, 2)],
            &[("192.0.2.0", 4_000), ("198.51.100.0", 4_001)],
        );
        // The policy of web changes, db disappears, cache appears, one prefix changes its identity and one disappears.
        let now = view(
            &[(2, "web", WEB, 4), (4, "cache", CACHE, 4)],
            &[("192.0.2.0", 4_002)],
        );
        assert_eq!(
            reported(&before, &now),
            [
                AgentEvent::EndpointDeleted(endpoint(3, "db")),
                regenerated(2, "web"),
                AgentEvent::EndpointCreated(endpoint(4, "cache")),
                regenerated(4, "cache"),
                AgentEvent::IpcacheDeleted(change("10.0.0.3/32", DB, None, "db")),
                AgentEvent::IpcacheUpserted(change("10.0.0.4/32", CACHE, None, "cache")),
                AgentEvent::IpcacheDeleted(change("198.51.100.0/24", 4_001, None, "")),
                AgentEvent::IpcacheUpserted(change("192.0.2.0/24", 4_002, Some(4_000), "")),
            ]
        );
        assert_eq!(reported(&now, &now), []);
        // At the start everything is new; at the end everything is deleted.
        let none = View::default();
        let kinds = |events: Vec<AgentEvent>| {
            let deletes = |event: &&AgentEvent| {
                matches!(
                    event,
                    AgentEvent::EndpointDeleted(_) | AgentEvent::IpcacheDeleted(_)
                )
            };
            let deleted = events.iter().filter(deletes).count();
            (events.len() - deleted, deleted)
        };
        assert_eq!(kinds(reported(&none, &now)), (7, 0));
        assert_eq!(kinds(reported(&now, &none)), (0, 5));
    }
}
