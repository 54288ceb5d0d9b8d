//! What the endpoints have learned, and what of it the map of learned addresses holds.
//!
//! The cache says which selectors an address of an endpoint belongs to; the policy in force says which identity
//! such an address has; the map holds that identity. Every change goes the same way: it is noted here, the entry it
//! touches is out of step until it was written, and nothing that touches an unwritten entry is committed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use palisade_abi::{Identity, LearnedKey};
use palisade_fqdn::{
    Cache, Change, ChangeKind, Committed, EndpointId, Pending, SelectorId, Uncommitted, Update,
};
use palisade_model::snapshot::Learned;

/// What was committed may lack something that came to be implied meanwhile; under one lock that happens once.
const MAX_COMMIT_RETRIES: usize = 4;

/// A set of selectors that an address belongs to, ascending.
pub(super) type Set = Arc<[SelectorId]>;

/// Who a learned address is, by a policy.
pub(crate) trait IdentityResolver {
    /// The identity of an address that belongs to selectors (one at least). `None`: nobody has needed it yet.
    fn identity(&self, address: IpAddr, selectors: &[SelectorId]) -> Option<Identity>;
}

/// The map of learned addresses.
pub(crate) trait Writer {
    /// Adds or replaces entries. When it returns they are all in the map.
    fn put(&self, entries: &[(LearnedKey, Identity)]) -> Result<(), String>;
    /// Removes entries.
    fn remove(&self, keys: &[LearnedKey]) -> Result<(), String>;
}

/// What the map holds for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum InMap {
    Nothing,
    Identity(Identity),
    /// A write failed.
    Unknown,
}

#[derive(Debug)]
struct Entry {
    selectors: Set,
    map: InMap,
}

/// What became of an answer.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The maps hold everything that it implies.
    Committed(Committed),
    /// It must not be released.
    Refused,
    /// It implies an identity that the policy in force does not have yet.
    Waits(Pending),
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct LearnedMap {
    /// FqdnManager and addresses. Whoever changes it gives the changes to [`Self::update`] or [`Self::settle`].
    pub cache: Cache,
    entries: HashMap<LearnedKey, Entry>,
    /// Entries that the map is not known to hold as they should be.
    unwritten: HashSet<LearnedKey>,
    /// Each set once: there are far fewer than addresses.
    sets: HashSet<Set>,
    /// Writes that failed.
    pub failures: u64,
    /// Why the last one did.
    pub failure: Option<String>,
}

/// What has to happen to the entries of the map on the way from one policy to the next.
#[derive(Debug, Default)]
pub(crate) struct Transition {
    /// What it holds.
    pub old: Learned,
    /// What it is to hold.
    pub new: Learned,
    /// Nobody knows what it holds there, and it is to hold nothing.
    purge: Vec<LearnedKey>,
}

impl LearnedMap {
    /// A book whose map holds `found`, nothing of which is remembered yet.
    pub(crate) fn new(cache: Cache, found: impl IntoIterator<Item = (LearnedKey, Identity)>) -> Self {
        let mut learned_map = Self {
            cache,
            ..Self::default()
        };
        let nobody = learned_map.intern(&[]);
        for (key, identity) in found {
            learned_map.unwritten.insert(key);
            learned_map.entries.insert(
                key,
                Entry {
                    selectors: Arc::clone(&nobody),
                    map: InMap::Identity(identity),
                },
            );
        }
        learned_map
    }

    /// Brings an answer to an end, or as far as it goes. `again`: it has waited. What it changes was noted when it
    /// came, and something newer may have been noted since.
    pub(crate) fn settle(
        &mut self,
        mut pending: Pending,
        again: bool,
        resolver: &impl IdentityResolver,
        writer: &impl Writer,
    ) -> Outcome {
        let mut noted = again;
        for _ in 0..MAX_COMMIT_RETRIES {
            if !std::mem::take(&mut noted) {
                self.note(pending.changes());
            }
            let endpoint = pending.endpoint();
            let touched: Vec<LearnedKey> = pending
                .addresses()
                .map(|address| key(endpoint, address))
                .collect();
            let others = pending
                .changes()
                .iter()
                .map(|change| key(change.endpoint, change.address));
            let keys: BTreeSet<LearnedKey> = touched.into_iter().chain(others).collect();
            let failed = self.write(keys.iter().copied(), resolver, writer).is_err();
            if keys.iter().any(|key| self.unwritten.contains(key)) {
                if failed {
                    self.cache.abort(pending);
                    return Outcome::Refused;
                }
                return Outcome::Waits(pending);
            }
            match self.cache.commit(pending) {
                Ok(committed) => return Outcome::Committed(committed),
                Err(Uncommitted::Superseded) => return Outcome::Refused,
                Err(Uncommitted::Missing(missing)) => pending = missing,
            }
        }
        self.cache.abort(pending);
        Outcome::Refused
    }

    /// Writes what comes from elsewhere than an answer. What cannot be written comes again with a sweep.
    pub(crate) fn update(&mut self, update: Update, resolver: &impl IdentityResolver, writer: &impl Writer) {
        self.note(update.changes());
        let keys: BTreeSet<LearnedKey> = keys_of(&update).collect();
        let failed = self.write(keys.iter().copied(), resolver, writer).is_err();
        if !failed && !keys.iter().any(|key| self.unwritten.contains(key)) {
            self.cache.written(update);
        }
    }

    /// Takes note of changes, without writing them.
    pub(crate) fn note(&mut self, changes: &[Change]) {
        for change in changes {
            let key = key(change.endpoint, change.address);
            let known = self.entries.get(&key).map(|entry| Arc::clone(&entry.selectors));
            let known = known.as_deref().unwrap_or_default();
            let place = known.binary_search(&change.selector);
            let selectors = match (change.kind, place) {
                (ChangeKind::Live, Err(at)) => {
                    let mut selectors = known.to_vec();
                    selectors.insert(at, change.selector);
                    self.intern(&selectors)
                }
                (ChangeKind::Gone, Ok(at)) => {
                    let mut selectors = known.to_vec();
                    selectors.remove(at);
                    self.intern(&selectors)
                }
                // Told again: the cache does not know that it was written. Neither has to.
                (ChangeKind::Live, Ok(_)) | (ChangeKind::Gone, Err(_)) => continue,
            };
            self.unwritten.insert(key);
            self.entries
                .entry(key)
                .or_insert_with(|| Entry {
                    selectors: Arc::default(),
                    map: InMap::Nothing,
                })
                .selectors = selectors;
        }
    }

    fn intern(&mut self, selectors: &[SelectorId]) -> Set {
        if let Some(set) = self.sets.get(selectors) {
            return Arc::clone(set);
        }
        let set: Set = selectors.into();
        self.sets.insert(Arc::clone(&set));
        set
    }

    /// Writes those of the entries that are unwritten and have an identity.
    fn write(
        &mut self,
        keys: impl Iterator<Item = LearnedKey>,
        resolver: &impl IdentityResolver,
        writer: &impl Writer,
    ) -> Result<(), ()> {
        let mut puts = Vec::new();
        let mut removes = Vec::new();
        for key in keys
            .filter(|key| self.unwritten.contains(key))
            .collect::<Vec<_>>()
        {
            match self.wanted(&key, resolver) {
                Wanted::Identity(identity) => puts.push((key, identity)),
                Wanted::Nothing => removes.push(key),
                Wanted::Unknown => {}
            }
        }
        let mut failure = None;
        if !puts.is_empty() {
            match writer.put(&puts) {
                Ok(()) => puts
                    .iter()
                    .for_each(|(key, identity)| self.is_in_map(key, InMap::Identity(*identity))),
                Err(problem) => {
                    puts.iter().for_each(|(key, _)| self.mark_unknown(key));
                    failure = Some(problem);
                }
            }
        }
        // Also if the other failed: what makes room must not wait for it.
        if !removes.is_empty() {
            match writer.remove(&removes) {
                Ok(()) => removes.iter().for_each(|key| self.is_in_map(key, InMap::Nothing)),
                Err(problem) => {
                    removes.iter().for_each(|key| self.mark_unknown(key));
                    failure = Some(problem);
                }
            }
        }
        match failure {
            None => {
                self.failure = None;
                Ok(())
            }
            Some(problem) => {
                self.failures += 1;
                self.failure = Some(problem);
                Err(())
            }
        }
    }

    fn wanted(&self, key: &LearnedKey, resolver: &impl IdentityResolver) -> Wanted {
        match self.entries.get(key) {
            Some(entry) if !entry.selectors.is_empty() => resolver
                .identity(key.addr.into(), &entry.selectors)
                .map_or(Wanted::Unknown, Wanted::Identity),
            _ => Wanted::Nothing,
        }
    }

    fn is_in_map(&mut self, key: &LearnedKey, map: InMap) {
        self.unwritten.remove(key);
        if let Some(entry) = self.entries.get_mut(key) {
            entry.map = map;
            if map == InMap::Nothing && entry.selectors.is_empty() {
                self.entries.remove(key);
            }
        }
    }

    fn mark_unknown(&mut self, key: &LearnedKey) {
        self.unwritten.insert(*key);
        if let Some(entry) = self.entries.get_mut(key) {
            entry.map = InMap::Unknown;
        }
    }

    /// What of the book a policy has no identity for. `all`: also of what was in step with the policy before.
    pub(crate) fn missing(
        &self,
        resolver: &impl IdentityResolver,
        all: bool,
    ) -> Vec<(EndpointId, IpAddr, Set)> {
        let mut missing = Vec::new();
        let mut look = |key: &LearnedKey, entry: &Entry| {
            if !entry.selectors.is_empty() && resolver.identity(key.addr.into(), &entry.selectors).is_none() {
                missing.push((
                    key.endpoint as EndpointId,
                    key.addr.into(),
                    Arc::clone(&entry.selectors),
                ));
            }
        };
        if all {
            self.entries.iter().for_each(|(key, entry)| look(key, entry));
        } else {
            for key in &self.unwritten {
                if let Some(entry) = self.entries.get(key) {
                    look(key, entry);
                }
            }
        }
        missing
    }

    /// Everything that an identity is needed for.
    pub(crate) fn in_use(&self) -> impl Iterator<Item = (EndpointId, IpAddr, &Set)> {
        self.entries
            .iter()
            .filter(|(_, entry)| !entry.selectors.is_empty())
            .map(|(key, entry)| (key.endpoint as EndpointId, key.addr.into(), &entry.selectors))
    }

    /// The way of the map to what another policy wants of it. `all`: the identities of what is in step may be others.
    pub(crate) fn plan(&self, resolver: &impl IdentityResolver, all: bool) -> Transition {
        let mut transition = Transition::default();
        let mut others = BTreeSet::new();
        for (key, entry) in &self.entries {
            if !all && !self.unwritten.contains(key) {
                if let InMap::Identity(identity) = entry.map {
                    others.insert(identity);
                }
                continue;
            }
            let wanted = self.wanted(key, resolver);
            match entry.map {
                InMap::Identity(identity) => {
                    transition.old.entries.insert(*key, identity);
                }
                InMap::Unknown if wanted == Wanted::Nothing => transition.purge.push(*key),
                InMap::Unknown | InMap::Nothing => {}
            }
            match wanted {
                Wanted::Identity(identity) => {
                    transition.new.entries.insert(*key, identity);
                }
                Wanted::Nothing => {}
                // Stays what it is.
                Wanted::Unknown => {
                    if let InMap::Identity(identity) = entry.map {
                        transition.new.entries.insert(*key, identity);
                    }
                }
            }
        }
        transition.old.others.clone_from(&others);
        transition.new.others = others;
        transition
    }

    /// A way was gone to its end: the map holds what it was to.
    pub(crate) fn committed(
        &mut self,
        transition: &Transition,
        resolver: &impl IdentityResolver,
        writer: &impl Writer,
    ) {
        let keys: BTreeSet<LearnedKey> = transition
            .old
            .entries
            .keys()
            .chain(transition.new.entries.keys())
            .copied()
            .collect();
        for key in keys {
            let now = transition
                .new
                .entries
                .get(&key)
                .map_or(InMap::Nothing, |n| InMap::Identity(*n));
            let wanted = self.wanted(&key, resolver);
            let in_step = match (wanted, now) {
                (Wanted::Identity(a), InMap::Identity(b)) => a == b,
                (Wanted::Nothing, InMap::Nothing) => true,
                _ => false,
            };
            if in_step {
                self.is_in_map(&key, now);
            } else {
                self.unwritten.insert(key);
                if let Some(entry) = self.entries.get_mut(&key) {
                    entry.map = now;
                }
            }
        }
        // A failure is noted and tried again.
        let _ = self.write(transition.purge.iter().copied(), resolver, writer);
        self.sets.retain(|set| Arc::strong_count(set) > 1);
    }

    /// A way was not gone to its end: what it touches may be as it was, or not.
    pub(crate) fn aborted(&mut self, transition: &Transition) {
        let keys: BTreeSet<LearnedKey> = transition
            .old
            .entries
            .keys()
            .chain(transition.new.entries.keys())
            .copied()
            .collect();
        for key in keys {
            if transition.old.entries.get(&key) != transition.new.entries.get(&key) {
                self.mark_unknown(&key);
            }
        }
    }

    /// Retries the unwritten entries.
    pub(crate) fn retry(&mut self, resolver: &impl IdentityResolver, writer: &impl Writer) {
        let keys: Vec<LearnedKey> = self.unwritten.iter().copied().collect();
        // A failure is noted and tried again.
        let _ = self.write(keys.into_iter(), resolver, writer);
    }

    /// Takes note that an update is in the map, if all of it is.
    pub(crate) fn written(&mut self, update: Update) {
        if !keys_of(&update).any(|key| self.unwritten.contains(&key)) {
            self.cache.written(update);
        }
    }

    /// Addresses in the map.
    pub(crate) fn len(&self) -> usize {
        self.entries
            .values()
            .filter(|entry| entry.map != InMap::Nothing)
            .count()
    }

    /// Addresses that the map is not known to hold as it should.
    pub(crate) fn unwritten(&self) -> usize {
        self.unwritten.len()
    }

    /// Identities by address, for those who explain.
    pub(crate) fn identities(&self) -> BTreeMap<LearnedKey, Identity> {
        let known = self.entries.iter().filter_map(|(key, entry)| match entry.map {
            InMap::Identity(identity) => Some((*key, identity)),
            InMap::Nothing | InMap::Unknown => None,
        });
        known.collect()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Nothing,
    Identity(Identity),
    /// There is no identity for it yet.
    Unknown,
}

fn keys_of(update: &Update) -> impl Iterator<Item = LearnedKey> + '_ {
    update
        .changes()
        .iter()
        .map(|change| key(change.endpoint, change.address))
}

/// The key of an address in the map.
pub(super) fn key(endpoint: EndpointId, address: IpAddr) -> LearnedKey {
    LearnedKey {
        addr: address.into(),
        endpoint: endpoint.into(),
    }
}
