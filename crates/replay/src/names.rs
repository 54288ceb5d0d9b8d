//! Names that endpoints learn from the DNS answers of the capture.
//!
//! The daemon's counterpart is `crates/palisade/src/daemon/fqdn`, which writes a BPF map and can fail; here an answer is
//! committed at once. The cache, the selectors and the identities are the same.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use foldhash::fast::RandomState;
use palisade_abi::{Addr, LearnedKey};
use palisade_fqdn::{
    Cache, Change, ChangeKind, EndpointId, ListedPrefixes, Millis, SelectorId, Selectors, SniAddressIndex,
    Update,
};
use palisade_inspect::{CommitRequest, CommitResult, Lease};
use palisade_model::learned_identities::LearnedSet;
use palisade_policy::compile::Compiler;

use crate::tables::Tables;

/// Maximum number of selector sets of learned addresses per endpoint for which identities are made, as in
/// `crates/palisade/src/daemon/enforcer.rs`.
const MAX_SETS_PER_ENDPOINT: usize = 256;

/// The part of the policies that concerns names.
#[derive(Clone, Debug, Default)]
pub struct NamePolicy {
    /// Selectors by endpoint; endpoints without selectors can be missing.
    pub selectors: BTreeMap<EndpointId, Arc<Selectors>>,
    /// Selectors in deny rules, by endpoint.
    pub denied: HashSet<(EndpointId, SelectorId)>,
    /// Special-purpose addresses that the policy of an endpoint lists as prefixes.
    pub listed: BTreeMap<EndpointId, Arc<ListedPrefixes>>,
}

/// The learned names of all endpoints.
#[derive(Debug)]
pub(crate) struct Names {
    cache: Cache,
    compiler: Compiler,
    denied: HashSet<(EndpointId, SelectorId)>,
    /// Selectors of each learned address, ascending.
    selectors: HashMap<LearnedKey, Vec<u32>, RandomState>,
    granted: HashMap<EndpointId, HashSet<LearnedSet>>,
    /// Number of the lease epoch: see [`palisade_inspect::Sink::epoch`].
    pub epoch: u64,
    /// Whether the rule sets have changed since the caller last read them.
    pub rulesets_changed: bool,
    /// Answers whose addresses were not learned.
    pub refused: u64,
    /// Answers whose addresses were learned.
    pub committed: u64,
}

impl Names {
    pub(crate) fn new(
        compiler: Compiler,
        policy: &NamePolicy,
        config: palisade_fqdn::Config,
        sni_index: Option<Arc<SniAddressIndex>>,
    ) -> Self {
        let mut cache = Cache::new(config);
        if let Some(index) = sni_index {
            cache = cache.with_sni_index(index);
        }
        // The cache is empty, so that neither call changes an address.
        for (endpoint, listed) in &policy.listed {
            cache.written_at_once(|cache| cache.set_listed(*endpoint, Arc::clone(listed)));
        }
        for (endpoint, selectors) in &policy.selectors {
            cache.written_at_once(|cache| cache.set_selectors(*endpoint, Arc::clone(selectors)));
        }
        Self {
            cache,
            compiler,
            denied: policy.denied.clone(),
            selectors: HashMap::default(),
            granted: HashMap::new(),
            epoch: 0,
            rulesets_changed: false,
            refused: 0,
            committed: 0,
        }
    }

    /// Learns the addresses of an answer and returns the result for the engine.
    pub(crate) fn learn(&mut self, request: CommitRequest, now: Millis, tables: &mut Tables) -> CommitResult {
        let endpoint = request.endpoint;
        let evicted = self.cache.stats().evicted;
        let pending = self.cache.learn(endpoint, &request.answer, now);
        if self.cache.stats().evicted != evicted {
            self.epoch += 1;
        }
        let mut keys: BTreeSet<LearnedKey> = pending
            .addresses()
            .map(|address| key(endpoint, address))
            .collect();
        let changes = pending.changes();
        keys.extend(changes.iter().map(|change| key(change.endpoint, change.address)));
        let hits = |change: &Change| {
            change.kind == ChangeKind::Live && self.denied.contains(&(change.endpoint, change.selector))
        };
        let is_denied = changes.iter().any(hits);
        note(&mut self.selectors, changes);
        let lease = pending.lease();
        let mut committed = self.write(&keys, tables);
        if committed {
            committed = self.cache.commit(pending).is_ok();
        } else {
            self.cache.abort(pending);
        }
        if committed {
            self.committed += 1;
            if is_denied {
                // Connections to the address can exist already, under rules that allow it by its prefix.
                tables.bump(endpoint);
            }
        } else {
            self.refused += 1;
            self.epoch += 1;
        }
        let lease = lease.filter(|_| committed).map(|good_for| Lease {
            good_for,
            epoch: self.epoch,
        });
        request.done(committed, lease)
    }

    /// Removes addresses that have expired and are not in use. `in_use`: peers of live flows, with their endpoints.
    pub(crate) fn sweep(
        &mut self,
        in_use: impl Iterator<Item = (EndpointId, Addr)>,
        now: Millis,
        tables: &mut Tables,
    ) {
        if self.selectors.is_empty() {
            return;
        }
        let mut used: HashMap<EndpointId, Vec<IpAddr>> = HashMap::new();
        for (endpoint, address) in in_use {
            used.entry(endpoint).or_default().push(address.into());
        }
        for endpoint in self.cache.endpoints() {
            self.cache
                .mark_in_use(endpoint, used.remove(&endpoint).unwrap_or_default());
            let update = self.cache.sweep(endpoint, now);
            let keys = update
                .changes()
                .iter()
                .map(|change| key(change.endpoint, change.address))
                .collect();
            note(&mut self.selectors, update.changes());
            if self.write(&keys, tables) {
                self.cache.written(update);
            }
        }
    }

    /// Returns the name by which an endpoint has learned an address last.
    pub(crate) fn name_of(&self, endpoint: EndpointId, address: IpAddr) -> Option<String> {
        self.cache.name_of(endpoint, address).map(|name| name.to_string())
    }

    /// Writes the identities of learned addresses. Returns whether every address has one.
    fn write(&mut self, keys: &BTreeSet<LearnedKey>, tables: &mut Tables) -> bool {
        let mut complete = true;
        for key in keys {
            let Some(selectors) = self.selectors.get(key) else {
                tables.set_learned(*key, None);
                continue;
            };
            let address = IpAddr::from(key.addr);
            let mut identity = self.compiler.snapshot().names.identity(address, selectors);
            if identity.is_none() {
                let set = self.compiler.snapshot().names.requested_set(address, selectors);
                let endpoint = u16::try_from(key.endpoint).unwrap_or_default();
                if let Some(set) = set
                    && grant(&mut self.granted, endpoint, set)
                {
                    let wanted = self.granted.values().flatten().cloned().collect();
                    if let Ok(update) = self.compiler.learned(&wanted) {
                        self.rulesets_changed |= update.rulesets;
                        tables.set_snapshot(self.compiler.snapshot().clone());
                    }
                    let selectors = self.selectors.get(key).map(Vec::as_slice);
                    identity = self
                        .compiler
                        .snapshot()
                        .names
                        .identity(address, selectors.unwrap_or_default());
                }
            }
            complete &= identity.is_some();
            tables.set_learned(*key, identity);
        }
        complete
    }
}

/// A change of the cache that nothing has to write, because the tables hold no learned address yet.
trait WrittenAtOnce {
    fn written_at_once(&mut self, change: impl FnOnce(&mut Self) -> Update);
}

impl WrittenAtOnce for Cache {
    fn written_at_once(&mut self, change: impl FnOnce(&mut Self) -> Update) {
        let update = change(self);
        self.written(update);
    }
}

fn key(endpoint: EndpointId, address: IpAddr) -> LearnedKey {
    LearnedKey {
        addr: address.into(),
        endpoint: endpoint.into(),
    }
}

/// Grants an identity to a selector set of an endpoint. Returns whether the set is granted.
fn grant(
    granted: &mut HashMap<EndpointId, HashSet<LearnedSet>>,
    endpoint: EndpointId,
    set: LearnedSet,
) -> bool {
    let granted = granted.entry(endpoint).or_default();
    granted.contains(&set) || (granted.len() < MAX_SETS_PER_ENDPOINT && granted.insert(set))
}

/// Notes the changes of the cache.
fn note(known: &mut HashMap<LearnedKey, Vec<u32>, RandomState>, changes: &[Change]) {
    for change in changes {
        let key = key(change.endpoint, change.address);
        let selector = change.selector.0;
        match change.kind {
            ChangeKind::Live => {
                let selectors = known.entry(key).or_default();
                if let Err(at) = selectors.binary_search(&selector) {
                    selectors.insert(at, selector);
                }
            }
            ChangeKind::Gone => {
                if let Some(selectors) = known.get_mut(&key) {
                    selectors.retain(|other| *other != selector);
                    if selectors.is_empty() {
                        known.remove(&key);
                    }
                }
            }
        }
    }
}
