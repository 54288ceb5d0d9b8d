//! The cache of names and addresses of all endpoints.
//!
//! An answer is taken in by [`Cache::learn`], written to the maps by the caller, and then confirmed by [`Cache::commit`].
//! Limits, statistics, save and restore are here; the entries of one endpoint are in `endpoint`.

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

/// How much is learned, and for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The least time that an address is kept, whatever the answer says: the connection that follows an answer
    /// with a time to live of 0 has to come through.
    pub min_ttl: Millis,
    /// The longest time that an answer can ask for.
    pub max_ttl: Millis,
    /// Addresses of one name that an endpoint keeps.
    pub addresses_per_name: usize,
    /// Addresses of all names together that an endpoint keeps.
    pub addresses_per_endpoint: usize,
    /// Addresses of all names of all endpoints together. When as many are kept, the endpoint that has most gives
    /// addresses that no connection uses; addresses in use only while it has more than an equal share and the learning
    /// endpoint has less than that.
    pub addresses_total: usize,
    /// Whether addresses are learned for the aliases on the way too, not only for the name that was asked.
    pub aliases: bool,
    /// What is done with special-purpose addresses (RFC 6890).
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
            special: Special::CommitRequest,
        }
    }
}

/// A name as `fqdn cache list` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CachedName {
    /// Who learned it.
    pub endpoint: EndpointId,
    /// The name, as people write it.
    pub name: String,
    /// The selectors it matches.
    pub selectors: Vec<SelectorId>,
    /// Its addresses.
    pub addresses: Vec<CachedAddress>,
}

/// An address of a [`CachedName`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CachedAddress {
    /// The address.
    pub ip: IpAddr,
    /// Milliseconds until it expires; none if it has.
    pub left: Option<Millis>,
    /// Whether a connection was seen to use it.
    pub in_use: bool,
}

/// The names that the endpoints have learned.
#[derive(Debug, Default)]
pub struct Cache {
    config: Config,
    endpoints: HashMap<EndpointId, Endpoint>,
    /// Addresses of names of all endpoints: the sum of [`Endpoint::pairs`].
    total: usize,
    /// Counts learnings.
    learnings: u64,
    /// Counts turns of triples, to live and to gone.
    turns: u64,
    stats: Stats,
    sni_index: Option<Arc<SniAddressIndex>>,
}

impl Cache {
    /// An empty cache.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }

    /// Keeps `known` up to date from now on. To be called while the cache is empty.
    #[must_use]
    pub fn with_sni_index(self, sni_index: Arc<SniAddressIndex>) -> Self {
        Self {
            sni_index: Some(sni_index),
            ..self
        }
    }

    /// Learns what an answer tells an endpoint. Only answers without an error, of the Internet class, teach
    /// something; but the answer is released by [`Cache::commit`] in any case.
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
        // a connection to ::ffff:192.0.2.1 leaves as one to 192.0.2.1 (RFC 4291, 2.5.5.2)
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

    /// Leaves out the special-purpose addresses that neither the configuration nor a rule of the endpoint lists.
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

    /// Returns how many addresses of names, up to `wanted`, the endpoint may add: makes room where there is none. The
    /// removals go to `changes`.
    fn make_room(&mut self, endpoint: EndpointId, wanted: usize, changes: &mut Vec<Change>) -> usize {
        /// Addresses that are removed at once beyond those that are needed: finding the endpoint that has most takes a
        /// look at all of them.
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

    /// Takes note that the changes of an answer are in the maps. If these hold everything that the answer implies
    /// now, it may be released.
    ///
    /// # Errors
    /// If it may not be released, or not yet: see [`Uncommitted`].
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

    /// Gives up an answer that is not going to be released. What only it told is forgotten; the changes that
    /// follow from that come with the next sweep.
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

    /// Takes note that the changes of an update are in the maps.
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

    /// Gives an endpoint the selectors of its policy. Names that it learned before count.
    pub fn set_selectors(&mut self, endpoint: EndpointId, selectors: Arc<Selectors>) -> Update {
        self.endpoints.entry(endpoint).or_default();
        self.update(endpoint, |state, sink| state.set_selectors(Some(selectors), sink))
    }

    /// Tells which special-purpose addresses the policy of an endpoint lists. Those that were learned before and are not
    /// listed any more are forgotten, in use or not.
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

    /// Forgets an endpoint.
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

    /// Tells which addresses live connections of an endpoint use. For a sweep to be right, it must be told all of
    /// them since the last one.
    pub fn mark_in_use(&mut self, endpoint: EndpointId, addresses: impl IntoIterator<Item = IpAddr>) {
        if let Some(state) = self.endpoints.get_mut(&endpoint) {
            addresses
                .into_iter()
                .for_each(|address| state.mark(address.to_canonical()));
        }
    }

    /// Removes what has expired and was not in use in this sweep nor in the one before; hands out again the
    /// changes that were not written.
    pub fn sweep(&mut self, endpoint: EndpointId, now: Millis) -> Update {
        self.update(endpoint, |state, sink| state.sweep(now, sink))
    }

    /// Forgets names, whether they are in use or not: of one endpoint or of all, those that `filter` takes.
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

    /// The endpoints that have selectors or names.
    #[must_use]
    pub fn endpoints(&self) -> Vec<EndpointId> {
        self.select(None)
    }

    /// What is cached, of one endpoint or of all, by endpoint and name.
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

    /// Whether an endpoint knows a name with this address.
    #[must_use]
    pub fn has(&self, endpoint: EndpointId, address: IpAddr) -> bool {
        let entry = self
            .endpoints
            .get(&endpoint)
            .and_then(|state| state.addresses.get(&address.to_canonical()));
        entry.is_some_and(AddressEntry::is_named)
    }

    /// The name by which an endpoint learned an address last, for reports.
    #[must_use]
    pub fn name_of(&self, endpoint: EndpointId, address: IpAddr) -> Option<Name> {
        let entry = self
            .endpoints
            .get(&endpoint)?
            .addresses
            .get(&address.to_canonical())?;
        Name::from_wire(&entry.name).ok()
    }

    /// Everything, to be kept over a restart.
    pub fn save(&self, now: Millis) -> impl Iterator<Item = SavedName> + '_ {
        self.endpoints.iter().flat_map(move |(&endpoint, state)| {
            state.names.iter().map(move |(key, entry)| SavedName {
                endpoint,
                name: text(key),
                addresses: entry.pairs.iter().map(|pair| saved(pair, now)).collect(),
            })
        })
    }

    /// What an answer taught, to be appended to a journal before it is released: read after the last whole save,
    /// it brings back what was learned since.
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

    /// Brings back what was saved `elapsed` milliseconds ago. What has expired meanwhile comes back too: a
    /// connection may have lived through the restart; sweeps find out. The limits hold.
    ///
    /// # Errors
    /// If the name is none.
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

    /// What has happened so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// What is held, and what it takes.
    #[must_use]
    pub fn memory(&self) -> Memory {
        // a table has a byte of control for each place, and is at most seven eighths full
        let table = |capacity: usize, entry: usize| (capacity * 8 / 7) * (entry + 1);
        // what an allocation takes besides its bytes, and how these are rounded
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
                // the nodes of a B-tree are about two thirds full
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
