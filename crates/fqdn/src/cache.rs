//! The cache of names and addresses of all endpoints.
//!
//! The caller passes an answer to [`Cache::learn`], writes the resulting changes to the maps, and then calls
//! [`Cache::commit`]. This module has the limits, statistics, save and restore; the entries of one endpoint are in
//! `endpoint.rs`.

use std::{collections::HashMap, mem::size_of, net::IpAddr, sync::Arc};

use palisade_protocols::dns::{Answer, CLASS_IN, Name, NameError};
use serde::Serialize;

use crate::{
    EndpointId, ListedPrefixes, Millis, SelectorId, Selectors, SniAddressIndex, Special,
    change::{Change, Committed, Pending, Uncommitted, Update},
    endpoint::{AddressEntry, Endpoint, LearnedTriple, Limits, NameEntry, Pair, Sink},
    is_special,
    saved::{SavedAddress, SavedName},
    special,
    stats::{Memory, Stats},
};

/// Limits on the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Minimum lifetime of an address, ms. It also applies if the answer has a shorter time to live, even 0, because a
    /// client connects only after it has received the answer.
    pub min_ttl: Millis,
    /// Maximum lifetime of an address, ms, even if the answer has a longer time to live. An address in use is kept
    /// after its lifetime.
    pub max_ttl: Millis,
    /// Maximum number of addresses of one name per endpoint.
    pub addresses_per_name: usize,
    /// Maximum number of addresses of all names together per endpoint.
    pub addresses_per_endpoint: usize,
    /// Maximum number of addresses of all names of all endpoints together. At the limit, unused addresses of the
    /// endpoint with the most addresses are evicted. If it has none, its addresses in use are evicted, provided that it
    /// has more than an equal share of the limit and the learning endpoint has less. Otherwise the new addresses are
    /// not learned.
    pub addresses_total: usize,
    /// Whether addresses are learned for the aliases in the CNAME chain as well as for the queried name.
    pub aliases: bool,
    /// Whether special-purpose addresses (RFC 6890) are learned.
    pub special: Special,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            min_ttl: 30_000,
            max_ttl: 7 * 86_400_000,
            addresses_per_name: 1000,
            addresses_per_endpoint: 100_000,
            addresses_total: usize::MAX,
            aliases: false,
            special: Special::Learn,
        }
    }
}

/// A name as `fqdn cache list` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CachedName {
    /// The endpoint that has learned the name.
    pub endpoint: EndpointId,
    /// The name as text.
    pub name: String,
    /// The selectors that the name matches.
    pub selectors: Vec<SelectorId>,
    /// The addresses of the name.
    pub addresses: Vec<CachedAddress>,
}

/// An address of a [`CachedName`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CachedAddress {
    /// The address.
    pub ip: IpAddr,
    /// Time until the address expires, ms; `None` if it has expired.
    pub left: Option<Millis>,
    /// Whether the address was marked as in use ([`Cache::mark_in_use`]) since the sweep before the last one.
    pub in_use: bool,
}

/// The learned names and addresses of all endpoints.
#[derive(Debug, Default)]
pub struct Cache {
    config: Config,
    endpoints: HashMap<EndpointId, Endpoint>,
    /// Number of (name, address) pairs of all endpoints: the sum of [`Endpoint::pairs`].
    total: usize,
    /// Number of the last answer or restored name.
    learnings: u64,
    /// Number of the last transition of an (endpoint, selector, address) triple between live and gone.
    turns: u64,
    stats: Stats,
    sni_index: Option<Arc<SniAddressIndex>>,
}

impl Cache {
    /// Creates an empty cache.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }

    /// Sets the index that the cache keeps up to date. The cache must be empty.
    #[must_use]
    pub fn with_sni_index(self, sni_index: Arc<SniAddressIndex>) -> Self {
        Self {
            sni_index: Some(sni_index),
            ..self
        }
    }

    /// Learns the addresses of an answer for an endpoint. Error responses and answers of a class other than IN add no
    /// address, but they too are forwarded only after [`Cache::commit`].
    pub fn learn(&mut self, endpoint: EndpointId, answer: &Answer, now: Millis) -> Pending {
        self.learnings += 1;
        let number = self.learnings;
        let mut pending = Pending {
            number,
            endpoint,
            changes: Vec::new(),
            pairs: Vec::new(),
            refused: 0,
            lease: 0,
        };
        let question = answer
            .question
            .as_ref()
            .filter(|question| question.class == CLASS_IN);
        let (Some(question), 0, Some(ttl)) = (question, answer.rcode, answer.ttl) else {
            return pending;
        };
        let ttl = (Millis::from(ttl) * 1000)
            .min(self.config.max_ttl)
            .max(self.config.min_ttl);
        pending.lease = ttl;
        let mut addresses: Vec<(IpAddr, Millis)> = Vec::with_capacity(answer.addresses.len());
        // A connection to ::ffff:192.0.2.1 is sent as IPv4 to 192.0.2.1 (RFC 4291, section 2.5.5.2).
        addresses.extend(
            answer
                .addresses
                .iter()
                .map(|a| (a.ip.to_canonical(), now.saturating_add(ttl))),
        );
        addresses.sort_unstable();
        addresses.dedup();
        let aliases = if self.config.aliases {
            &answer.aliases[..]
        } else {
            &[]
        };
        self.refuse_special(endpoint, &question.name, aliases, &mut addresses);
        if addresses.is_empty() {
            return pending;
        }
        let names = || std::iter::once(&question.name).chain(aliases);
        let state = self.endpoints.entry(endpoint).or_default();
        let new = names().map(|name| state.count_new(name, &addresses)).sum();
        let room = self.make_room(endpoint, new, &mut pending.changes);
        let state = self.endpoints.entry(endpoint).or_default();
        let before = state.pairs;
        let limits = Limits {
            per_name: self.config.addresses_per_name,
            per_endpoint: self.config.addresses_per_endpoint.min(before + room),
        };
        let mut sink = Sink {
            endpoint,
            changes: &mut pending.changes,
            turns: &mut self.turns,
            stats: &mut self.stats,
            sni_index: self.sni_index.as_deref(),
        };
        for name in names() {
            state.learn(
                name,
                &addresses,
                number,
                &limits,
                &mut sink,
                |key, address, taken| {
                    if taken {
                        pending.pairs.push((key.clone(), address));
                    } else {
                        pending.refused += 1;
                    }
                },
            );
        }
        self.total = self.total - before + state.pairs;
        pending
    }

    /// Removes from `addresses` the special-purpose addresses that the endpoint must not learn, see [`Special::Refuse`]
    /// and [`ListedPrefixes`].
    fn refuse_special(
        &mut self,
        endpoint: EndpointId,
        name: &Name,
        aliases: &[Name],
        addresses: &mut Vec<(IpAddr, Millis)>,
    ) {
        let Special::Refuse(except) = &self.config.special else {
            return;
        };
        if !addresses.iter().any(|(address, _)| is_special(*address)) {
            return;
        }
        let state = self.endpoints.get(&endpoint);
        let listed = state.and_then(|state| state.listed.clone()).unwrap_or_default();
        let selectors: Vec<SelectorId> = state
            .and_then(|state| state.selectors.as_ref())
            .map(|all| {
                let names = std::iter::once(name).chain(aliases);
                names.flat_map(|name| all.matching(name)).collect()
            })
            .unwrap_or_default();
        let before = addresses.len();
        addresses.retain(|(address, _)| {
            !is_special(*address) || special::lists(except, *address) || listed.takes(*address, &selectors)
        });
        self.stats.special += (before - addresses.len()) as u64;
    }

    /// Evicts addresses if the limit on all endpoints requires it, and appends the removals to `changes`. Returns the
    /// number of addresses that `endpoint` can add, at most `wanted`.
    fn make_room(&mut self, endpoint: EndpointId, wanted: usize, changes: &mut Vec<Change>) -> usize {
        /// Number of addresses to evict beyond those needed, because finding the largest endpoint takes a scan of all
        /// endpoints.
        const BATCH: usize = 64;
        let limit = self.config.addresses_total;
        if self.total.saturating_add(wanted) <= limit {
            return wanted;
        }
        let share = limit / self.endpoints.len().max(1);
        let mut need = (self.total + wanted).saturating_sub(limit).saturating_add(BATCH);
        while need > 0 {
            let Some((&giver, state)) = self.endpoints.iter_mut().max_by_key(|(_, state)| state.pairs) else {
                break;
            };
            let mut sink = Sink {
                endpoint: giver,
                changes,
                turns: &mut self.turns,
                stats: &mut self.stats,
                sni_index: self.sni_index.as_deref(),
            };
            let gone = state.evict(need, &mut sink);
            self.total -= gone;
            need -= gone;
            if gone > 0 {
                continue;
            }
            let (most, own) = (
                state.pairs,
                self.endpoints.get(&endpoint).map_or(0, |own| own.pairs),
            );
            let over = most
                .saturating_sub(share)
                .min(need)
                .min(share.saturating_sub(own));
            let Some(state) = self.endpoints.get_mut(&giver).filter(|_| over > 0) else {
                break;
            };
            let mut sink = Sink {
                endpoint: giver,
                changes,
                turns: &mut self.turns,
                stats: &mut self.stats,
                sni_index: self.sni_index.as_deref(),
            };
            let gone = state.evict_in_use(over, &mut sink);
            self.total -= gone;
            if gone == 0 {
                break;
            }
            need -= gone;
        }
        limit.saturating_sub(self.total).min(wanted)
    }

    /// Records that the changes of an answer have been written to the maps. Returns a [`Committed`] if the maps now
    /// hold all addresses of the answer under the current policy.
    ///
    /// # Errors
    /// [`Uncommitted`] if the answer must not be forwarded, or not yet.
    pub fn commit(&mut self, mut pending: Pending) -> Result<Committed, Uncommitted> {
        self.note_written(&pending.changes);
        pending.changes.clear();
        let number = pending.number;
        if pending.pairs.is_empty() {
            return Ok(Committed { number });
        }
        let Some(state) = self.endpoints.get_mut(&pending.endpoint) else {
            self.stats.superseded += 1;
            return Err(Uncommitted::Superseded);
        };
        let mut sink = Sink {
            endpoint: pending.endpoint,
            changes: &mut pending.changes,
            turns: &mut self.turns,
            stats: &mut self.stats,
            sni_index: self.sni_index.as_deref(),
        };
        let mut complete = true;
        for (key, address) in &pending.pairs {
            match state.check(key, *address, &mut sink) {
                Some(there) => complete &= there,
                None => {
                    self.stats.superseded += 1;
                    return Err(Uncommitted::Superseded);
                }
            }
        }
        if complete {
            Ok(Committed { number })
        } else {
            Err(Uncommitted::Missing(pending))
        }
    }

    /// Aborts an answer that will not be forwarded. Removes the addresses that only this answer has given; the next
    /// sweep returns the resulting changes.
    pub fn abort(&mut self, pending: Pending) {
        self.stats.aborted += 1;
        let Some(state) = self.endpoints.get_mut(&pending.endpoint) else {
            return;
        };
        let mut changes = Vec::new();
        let mut sink = Sink {
            endpoint: pending.endpoint,
            changes: &mut changes,
            turns: &mut self.turns,
            stats: &mut self.stats,
            sni_index: self.sni_index.as_deref(),
        };
        let before = state.pairs;
        for (key, address) in &pending.pairs {
            state.unlearn(pending.number, key, *address, &mut sink);
        }
        self.total = self.total - before + state.pairs;
    }

    /// Records that the changes of an update have been written to the maps.
    pub fn written(&mut self, update: Update) {
        self.note_written(&update.changes);
    }

    fn note_written(&mut self, changes: &[Change]) {
        for change in changes {
            if let Some(state) = self.endpoints.get_mut(&change.endpoint) {
                state.written(change);
                if state.is_empty() {
                    self.endpoints.remove(&change.endpoint);
                }
            }
        }
    }

    /// Sets the selectors of an endpoint's policy. The selectors also apply to names that were learned before.
    pub fn set_selectors(&mut self, endpoint: EndpointId, selectors: Arc<Selectors>) -> Update {
        self.endpoints.entry(endpoint).or_default();
        self.update(endpoint, |state, sink| state.set_selectors(Some(selectors), sink))
    }

    /// Sets the special-purpose addresses that the policy of an endpoint lists. Removes special-purpose addresses that
    /// were learned earlier and are no longer allowed, even if they are in use. Does nothing with [`Special::Learn`].
    pub fn set_listed(&mut self, endpoint: EndpointId, listed: Arc<ListedPrefixes>) -> Update {
        let Special::Refuse(except) = self.config.special.clone() else {
            return Update::default();
        };
        self.endpoints.entry(endpoint).or_default();
        self.update(endpoint, |state, sink| {
            if state.listed.as_ref() == Some(&listed) {
                return;
            }
            state.remove_addresses(
                |selectors, address| {
                    is_special(address)
                        && !special::lists(&except, address)
                        && !listed.takes(address, selectors)
                },
                sink,
            );
            state.listed = Some(listed);
        })
    }

    /// Removes an endpoint.
    pub fn remove_endpoint(&mut self, endpoint: EndpointId) -> Update {
        let update = self.update(endpoint, |state, sink| {
            state.clean(|_| true, sink);
            state.selectors = None;
            state.listed = None;
        });
        if self.endpoints.get(&endpoint).is_some_and(Endpoint::is_empty) {
            self.endpoints.remove(&endpoint);
        }
        update
    }

    /// Marks addresses as used by connections of an endpoint. Between two sweeps the caller must pass all addresses
    /// that connections use, because [`Cache::sweep`] treats the others as unused.
    pub fn mark_in_use(&mut self, endpoint: EndpointId, addresses: impl IntoIterator<Item = IpAddr>) {
        if let Some(state) = self.endpoints.get_mut(&endpoint) {
            addresses
                .into_iter()
                .for_each(|address| state.mark(address.to_canonical()));
        }
    }

    /// Removes the addresses that both this sweep and the previous one have found expired and unused. The returned
    /// update also repeats changes whose write was not confirmed.
    pub fn sweep(&mut self, endpoint: EndpointId, now: Millis) -> Update {
        self.update(endpoint, |state, sink| state.sweep(now, sink))
    }

    /// Removes the names for which `filter` returns true, of one endpoint or of all, even if connections use their
    /// addresses.
    pub fn clean(&mut self, endpoint: Option<EndpointId>, mut filter: impl FnMut(&Name) -> bool) -> Update {
        let mut changes = Vec::new();
        for id in self.select(endpoint) {
            let mut cleaned = 0;
            let mut update = self.update(id, |state, sink| cleaned = state.clean(&mut filter, sink));
            self.stats.cleaned += cleaned as u64;
            changes.append(&mut update.changes);
        }
        Update { changes }
    }

    fn update(&mut self, endpoint: EndpointId, change: impl FnOnce(&mut Endpoint, &mut Sink<'_>)) -> Update {
        let mut changes = Vec::new();
        if let Some(state) = self.endpoints.get_mut(&endpoint) {
            let mut sink = Sink {
                endpoint,
                changes: &mut changes,
                turns: &mut self.turns,
                stats: &mut self.stats,
                sni_index: self.sni_index.as_deref(),
            };
            let before = state.pairs;
            change(state, &mut sink);
            self.total = self.total - before + state.pairs;
        }
        Update { changes }
    }

    fn select(&self, endpoint: Option<EndpointId>) -> Vec<EndpointId> {
        let mut all: Vec<_> = self
            .endpoints
            .keys()
            .copied()
            .filter(|id| endpoint.is_none_or(|wanted| wanted == *id))
            .collect();
        all.sort_unstable();
        all
    }

    /// Returns all endpoints of the cache, in ascending order.
    #[must_use]
    pub fn endpoints(&self) -> Vec<EndpointId> {
        self.select(None)
    }

    /// Returns the cached names of one endpoint or of all, sorted by endpoint and name.
    #[must_use]
    pub fn list(&self, endpoint: Option<EndpointId>, now: Millis) -> Vec<CachedName> {
        let mut list = Vec::new();
        for id in self.select(endpoint) {
            let Some(state) = self.endpoints.get(&id) else {
                continue;
            };
            let first = list.len();
            list.extend(state.names.iter().map(|(key, entry)| {
                CachedName {
                    endpoint: id,
                    name: text(key),
                    selectors: entry.selectors.to_vec(),
                    addresses: entry
                        .pairs
                        .iter()
                        .map(|pair| CachedAddress {
                            ip: pair.address,
                            left: pair.expires.checked_sub(now).filter(|left| *left > 0),
                            in_use: state.in_use(pair.address),
                        })
                        .collect(),
                }
            }));
            if let Some(added) = list.get_mut(first..) {
                added.sort_by(|a, b| a.name.cmp(&b.name));
            }
        }
        list
    }

    /// Returns whether the cache has the address for any name that the endpoint has learned.
    #[must_use]
    pub fn has(&self, endpoint: EndpointId, address: IpAddr) -> bool {
        let entry = self
            .endpoints
            .get(&endpoint)
            .and_then(|state| state.addresses.get(&address.to_canonical()));
        entry.is_some_and(AddressEntry::is_named)
    }

    /// Returns the name for which an endpoint has most recently learned the address.
    #[must_use]
    pub fn name_of(&self, endpoint: EndpointId, address: IpAddr) -> Option<Name> {
        let entry = self
            .endpoints
            .get(&endpoint)?
            .addresses
            .get(&address.to_canonical())?;
        Name::from_wire(&entry.name).ok()
    }

    /// Returns all names in the form that survives a restart.
    pub fn save(&self, now: Millis) -> impl Iterator<Item = SavedName> + '_ {
        self.endpoints.iter().flat_map(move |(&endpoint, state)| {
            state.names.iter().map(move |(key, entry)| SavedName {
                endpoint,
                name: text(key),
                addresses: entry.pairs.iter().map(|pair| saved(pair, now)).collect(),
            })
        })
    }

    /// Returns the names and addresses of an answer, for the journal. The journal holds the names and addresses that
    /// were learned since the last complete save, so those of an answer must be appended to the journal before the
    /// answer is forwarded.
    #[must_use]
    pub fn journal(&self, pending: &Pending, now: Millis) -> Vec<SavedName> {
        let Some(state) = self.endpoints.get(&pending.endpoint) else {
            return Vec::new();
        };
        let mut lines: Vec<SavedName> = Vec::new();
        let mut last = None;
        for (key, address) in &pending.pairs {
            let pairs = state.names.get(key).map_or(&[][..], |entry| &entry.pairs);
            let Some(pair) = pairs.iter().find(|pair| pair.address == *address) else {
                continue;
            };
            if last != Some(key) {
                lines.push(SavedName {
                    endpoint: pending.endpoint,
                    name: text(key),
                    addresses: Vec::new(),
                });
                last = Some(key);
            }
            if let Some(line) = lines.last_mut() {
                line.addresses.push(saved(pair, now));
            }
        }
        lines
    }

    /// Restores a name that was saved `elapsed` ms ago, as far as the limits allow. Restores expired addresses too,
    /// because connections can still use them after the restart; sweeps remove the unused addresses.
    ///
    /// # Errors
    /// [`NameError`] if the saved text is not a name.
    pub fn restore(&mut self, saved: &SavedName, elapsed: Millis, now: Millis) -> Result<Update, NameError> {
        let name: Name = saved.name.parse()?;
        self.learnings += 1;
        let number = self.learnings;
        let addresses: Vec<_> = saved
            .addresses
            .iter()
            .map(|address| {
                let left = address.left.min(self.config.max_ttl).saturating_sub(elapsed);
                (address.ip.to_canonical(), now.saturating_add(left))
            })
            .collect();
        let state = self.endpoints.entry(saved.endpoint).or_default();
        let new = state.count_new(&name, &addresses);
        let mut changes = Vec::new();
        let room = self.make_room(saved.endpoint, new, &mut changes);
        let (per_name, per_endpoint) = (self.config.addresses_per_name, self.config.addresses_per_endpoint);
        let mut update = self.update(saved.endpoint, |state, sink| {
            let limits = Limits {
                per_name,
                per_endpoint: per_endpoint.min(state.pairs + room),
            };
            state.learn(&name, &addresses, number, &limits, sink, |_, _, _| {});
        });
        changes.append(&mut update.changes);
        Ok(Update { changes })
    }

    /// Returns the counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Returns the number of entries and the memory that they take.
    #[must_use]
    pub fn memory(&self) -> Memory {
        // hashbrown has one control byte per slot and fills at most seven of eight slots.
        let table = |capacity: usize, entry: usize| (capacity * 8 / 7) * (entry + 1);
        // glibc's malloc adds a header of eight bytes, and rounds sizes up to a multiple of 16 bytes and to at least
        // 32.
        let heap = |bytes: usize| {
            if bytes == 0 {
                0
            } else {
                (bytes + 8).next_multiple_of(16).max(32)
            }
        };
        let mut memory = Memory {
            endpoints: self.endpoints.len(),
            bytes: table(self.endpoints.capacity(), size_of::<(EndpointId, Endpoint)>())
                + self.sni_index.as_ref().map_or(0, |index| index.bytes()),
            ..Memory::default()
        };
        for state in self.endpoints.values() {
            memory.names += state.names.len();
            memory.addresses += state.pairs;
            memory.bytes += table(state.names.capacity(), size_of::<(Arc<[u8]>, NameEntry)>())
                + table(state.addresses.capacity(), size_of::<(IpAddr, AddressEntry)>())
                // The nodes of a B-tree are about two thirds full.
                + state.names.len() * size_of::<(u64, Arc<[u8]>)>() * 3 / 2;
            for (key, entry) in &state.names {
                memory.bytes += heap(2 * size_of::<usize>() + key.len())
                    + heap(size_of_val(&entry.selectors[..]))
                    + heap(entry.pairs.capacity() * size_of::<Pair>());
            }
            for entry in state.addresses.values() {
                memory.triples += entry.triples.len();
                memory.bytes += heap(entry.triples.capacity() * size_of::<LearnedTriple>());
            }
        }
        memory
    }
}

fn text(key: &[u8]) -> String {
    Name::from_wire(key).unwrap_or_default().to_string()
}

fn saved(pair: &Pair, now: Millis) -> SavedAddress {
    SavedAddress {
        ip: pair.address,
        left: pair.expires.saturating_sub(now),
    }
}
