//! The addresses that endpoints have learned, and the content of the map of learned addresses.
//!
//! The cache knows the selectors that an address of an endpoint matches, the policy in force knows the identity of such
//! an address, and the map holds that identity. A change of an address is first noted here and makes the entry of the
//! address *unwritten*. No answer is committed while an entry of one of its addresses is unwritten.

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

/// Maximum number of attempts to commit an answer. An attempt fails if the policy was replaced or another write failed
/// since the entries of the answer were written.
const MAX_COMMIT_RETRIES: usize = 4;

/// A set of selectors of an address, in ascending order.
pub(super) type Set = Arc<[SelectorId]>;

/// Resolves learned addresses to identities, according to one policy.
pub(crate) trait IdentityResolver {
    /// Returns the identity of an address with these selectors (at least one); `None` if no identity was made for this
    /// set yet.
    fn identity(&self, address: IpAddr, selectors: &[SelectorId]) -> Option<Identity>;
}

/// Writes the map of learned addresses.
pub(crate) trait Writer {
    /// Adds or replaces entries. After success all of them are in the map.
    fn put(&self, entries: &[(LearnedKey, Identity)]) -> Result<(), String>;
    /// Removes entries.
    fn remove(&self, keys: &[LearnedKey]) -> Result<(), String>;
}

/// Content of the map for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum InMap {
    Nothing,
    Identity(Identity),
    /// A write failed, so it is unknown whether the map has the entry.
    Unknown,
}

#[derive(Debug)]
struct Entry {
    selectors: Set,
    map: InMap,
}

/// Result of settling an answer.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The maps hold all addresses of the answer.
    Committed(Committed),
    /// The answer must not be forwarded.
    Refused,
    /// The answer needs an identity that the policy in force does not have yet.
    Waits(Pending),
}

/// The cache of learned names, and the content of the map. See the documentation of the module.
#[derive(Debug, Default)]
pub(crate) struct LearnedMap {
    /// Names and addresses. Every change must be passed to [`Self::update`] or [`Self::settle`].
    pub cache: Cache,
    entries: HashMap<LearnedKey, Entry>,
    /// Entries whose map content is missing, outdated, or unknown after a failed write.
    unwritten: HashSet<LearnedKey>,
    /// Interned sets: there are far fewer sets than addresses.
    sets: HashSet<Set>,
    /// Number of failed writes.
    pub failures: u64,
    /// Error of the last failed write.
    pub failure: Option<String>,
}

/// Changes of the map from one policy to the next.
#[derive(Debug, Default)]
pub(crate) struct Transition {
    /// Content of the map before.
    pub old: Learned,
    /// Content of the map afterwards.
    pub new: Learned,
    /// Entries of unknown content that must be removed.
    purge: Vec<LearnedKey>,
}

impl LearnedMap {
    /// Returns the state of a map that holds `found`, with the given cache.
    pub(crate) fn new(cache: Cache, found: impl IntoIterator<Item = (LearnedKey, Identity)>) -> Self {
        let mut learned_map = Self {
            cache,
            ..Self::default()
        };
        let no_selectors = learned_map.intern(&[]);
        for (key, identity) in found {
            learned_map.unwritten.insert(key);
            learned_map.entries.insert(
                key,
                Entry {
                    selectors: Arc::clone(&no_selectors),
                    map: InMap::Identity(identity),
                },
            );
        }
        learned_map
    }

    /// Writes the addresses of an answer and commits the answer if all of them are written. `again`: whether this is a
    /// retry, which does not note the changes of the answer a second time, because newer changes can have been noted
    /// since.
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

    /// Writes changes that do not come from an answer. A later sweep repeats the changes that could not be written.
    pub(crate) fn update(&mut self, update: Update, resolver: &impl IdentityResolver, writer: &impl Writer) {
        self.note(update.changes());
        let keys: BTreeSet<LearnedKey> = keys_of(&update).collect();
        let failed = self.write(keys.iter().copied(), resolver, writer).is_err();
        if !failed && !keys.iter().any(|key| self.unwritten.contains(key)) {
            self.cache.written(update);
        }
    }

    /// Notes changes without writing them.
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
                // The cache repeats a change until the change is marked as written. A repeated change is noted already.
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

    /// Writes the unwritten entries among `keys` that have an identity, and removes the entries without selectors. An
    /// entry whose identity is not made yet stays unwritten.
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
        // Removals are tried even if the insertions failed, because they free space.
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

    /// Returns the learned addresses for which a policy has no identity. `all`: whether to check all addresses instead
    /// of only those with unwritten entries.
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

    /// Returns all addresses that need an identity.
    pub(crate) fn in_use(&self) -> impl Iterator<Item = (EndpointId, IpAddr, &Set)> {
        self.entries
            .iter()
            .filter(|(_, entry)| !entry.selectors.is_empty())
            .map(|(key, entry)| (key.endpoint as EndpointId, key.addr.into(), &entry.selectors))
    }

    /// Returns the changes that make the map conform to another policy. `all`: whether to include written entries,
    /// whose identities can differ under that policy.
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
                // The entry keeps its identity until a new one is made.
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

    /// Notes that the map holds the new state of a transition.
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
        // A failure leaves the entry unwritten, so that the write is tried again.
        let _ = self.write(transition.purge.iter().copied(), resolver, writer);
        self.sets.retain(|set| Arc::strong_count(set) > 1);
    }

    /// Notes that a transition was not completed: every entry that the transition changes becomes `Unknown`.
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
        // A failure leaves the entries unwritten.
        let _ = self.write(keys.into_iter(), resolver, writer);
    }

    /// Marks an update in the cache as written, if the map holds all of its entries.
    pub(crate) fn written(&mut self, update: Update) {
        if !keys_of(&update).any(|key| self.unwritten.contains(&key)) {
            self.cache.written(update);
        }
    }

    /// Returns the number of addresses in the map, entries of unknown content included.
    pub(crate) fn len(&self) -> usize {
        self.entries
            .values()
            .filter(|entry| entry.map != InMap::Nothing)
            .count()
    }

    /// Returns the number of unwritten addresses.
    pub(crate) fn unwritten(&self) -> usize {
        self.unwritten.len()
    }

    /// Returns the identities in the map, by endpoint and address.
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
    /// No identity was made for the selectors yet.
    Unknown,
}

fn keys_of(update: &Update) -> impl Iterator<Item = LearnedKey> + '_ {
    update
        .changes()
        .iter()
        .map(|change| key(change.endpoint, change.address))
}

/// Returns the key of an address in the map.
pub(super) fn key(endpoint: EndpointId, address: IpAddr) -> LearnedKey {
    LearnedKey {
        addr: address.into(),
        endpoint: endpoint.into(),
    }
}
