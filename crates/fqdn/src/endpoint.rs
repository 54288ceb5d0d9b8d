//! Names, addresses and selectors of one endpoint: expiry, limits, and the changes that the maps still lack.
//!
//! Only [`crate::Cache`] uses this module.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use palisade_protocols::dns::Name;

use crate::{
    EndpointId, ListedPrefixes, Millis, SelectorId, Selectors, SniAddressIndex, Stats,
    change::{Change, ChangeKind},
};

/// Number of consecutive sweeps after which an expired and unused address is removed.
const IDLE_SWEEPS: u8 = 2;

/// Limits on the addresses of one endpoint while it learns an answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Maximum number of addresses of one name.
    pub(crate) per_name: usize,
    /// Maximum number of addresses of all names together.
    pub(crate) per_endpoint: usize,
}

/// The learned names and addresses of one endpoint.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) selectors: Option<Arc<Selectors>>,
    /// The special-purpose addresses that the endpoint's policy lists; `None` before the first
    /// [`crate::Cache::set_listed`].
    pub(crate) listed: Option<Arc<ListedPrefixes>>,
    pub(crate) names: HashMap<Arc<[u8]>, NameEntry>,
    pub(crate) addresses: HashMap<IpAddr, AddressEntry>,
    /// The names, the least recently learned first.
    ages: BTreeMap<u64, Arc<[u8]>>,
    /// Number of (name, address) pairs.
    pub(crate) pairs: usize,
    /// Number of the current round. Each sweep ends a round.
    round: u64,
    /// Whether the limit on the endpoint was reached while all addresses were in use, and since then no address was
    /// removed and no sweep has run. If so, the search for an unused address is skipped.
    exhausted: bool,
}

/// A name with its addresses.
#[derive(Debug)]
pub(crate) struct NameEntry {
    pub(crate) selectors: Box<[SelectorId]>,
    pub(crate) pairs: Vec<Pair>,
    /// Key in [`Endpoint::ages`].
    age: u64,
}

/// An address of a name.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) address: IpAddr,
    pub(crate) expires: Millis,
    /// Number of the last answer that contained the pair.
    learned: u64,
    /// Number of the answer that added the pair.
    born: u64,
    /// Number of consecutive sweeps at which the pair was expired and its address unused.
    idle: u8,
}

/// An address with its selectors.
#[derive(Debug)]
pub(crate) struct AddressEntry {
    /// Number of names that have the address.
    names: u32,
    /// The name for which the address was learned last.
    pub(crate) name: Arc<[u8]>,
    /// The round in which a connection last used the address; 0 if none has.
    used: u64,
    /// The selectors of the address, in ascending order.
    pub(crate) triples: Vec<LearnedTriple>,
}

/// One selector of an address, and whether the maps hold the (endpoint, selector, address) triple.
#[derive(Debug)]
pub(crate) struct LearnedTriple {
    selector: SelectorId,
    /// Number of the address's names that match the selector. The triple is live while this number is not 0.
    names: u32,
    map: MapState,
    /// Number of the last transition between live and gone.
    turn: u64,
}

/// Whether the maps hold a triple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MapState {
    Absent,
    Present,
    /// A change was returned to the caller; its write is not confirmed.
    Unsure,
}

/// Outputs of an operation on an endpoint.
pub(crate) struct Sink<'a> {
    pub(crate) endpoint: EndpointId,
    pub(crate) changes: &'a mut Vec<Change>,
    /// Number of the last transition of a triple.
    pub(crate) turns: &'a mut u64,
    pub(crate) stats: &'a mut Stats,
    /// The index that other threads read.
    pub(crate) sni_index: Option<&'a SniAddressIndex>,
}

impl Sink<'_> {
    fn emit(&mut self, address: IpAddr, triple: &mut LearnedTriple) {
        let kind = if triple.names > 0 {
            ChangeKind::Live
        } else {
            ChangeKind::Gone
        };
        triple.map = MapState::Unsure;
        self.changes.push(Change {
            endpoint: self.endpoint,
            selector: triple.selector,
            address,
            kind,
            turn: triple.turn,
        });
    }

    fn next_turn(&mut self) -> u64 {
        *self.turns += 1;
        *self.turns
    }
}

impl Default for Endpoint {
    fn default() -> Self {
        Self {
            selectors: None,
            listed: None,
            names: HashMap::new(),
            addresses: HashMap::new(),
            ages: BTreeMap::new(),
            pairs: 0,
            round: 1,
            exhausted: false,
        }
    }
}

impl Endpoint {
    /// Returns whether the endpoint has no selectors, names and addresses.
    pub(crate) fn is_empty(&self) -> bool {
        self.selectors.is_none() && self.names.is_empty() && self.addresses.is_empty()
    }

    /// Returns whether a connection has used the address in this round or the previous one.
    pub(crate) fn in_use(&self, address: IpAddr) -> bool {
        self.addresses
            .get(&address)
            .is_some_and(|entry| entry.used > 0 && entry.used + 1 >= self.round)
    }

    pub(crate) fn mark(&mut self, address: IpAddr) {
        if let Some(entry) = self.addresses.get_mut(&address).filter(|entry| entry.names > 0) {
            entry.used = self.round;
        }
    }

    /// Returns the number of `addresses` that the name does not have yet.
    pub(crate) fn count_new(&self, name: &Name, addresses: &[(IpAddr, Millis)]) -> usize {
        let known = self.names.get(name.wire()).map_or(&[][..], |name| &name.pairs);
        let is_new = |(address, _): &&(IpAddr, Millis)| known.iter().all(|pair| pair.address != *address);
        addresses.iter().filter(is_new).count()
    }

    /// Learns addresses of a name. Calls `taken` for each address, with the key of the name, the address, and whether
    /// the cache now has the pair.
    pub(crate) fn learn(
        &mut self,
        name: &Name,
        addresses: &[(IpAddr, Millis)],
        number: u64,
        limits: &Limits,
        sink: &mut Sink<'_>,
        mut taken: impl FnMut(&Arc<[u8]>, IpAddr, bool),
    ) {
        let key = match self.names.get_key_value(name.wire()) {
            Some((key, _)) => key.clone(),
            None => {
                let key: Arc<[u8]> = name.wire().into();
                let selectors = self
                    .selectors
                    .as_ref()
                    .map(|all| all.matching(name))
                    .unwrap_or_default();
                self.names.insert(
                    key.clone(),
                    NameEntry {
                        selectors,
                        pairs: Vec::with_capacity(addresses.len().min(limits.per_name)),
                        age: 0,
                    },
                );
                key
            }
        };
        let mut any = false;
        for &(address, expires) in addresses {
            let known = self.refresh(&key, address, expires, number, sink);
            let ok = known || {
                let room = self.make_room(&key, number, limits, sink);
                if room {
                    self.add_pair(
                        &key,
                        Pair {
                            address,
                            expires,
                            learned: number,
                            born: number,
                            idle: 0,
                        },
                        sink,
                    );
                }
                room
            };
            any |= ok;
            taken(&key, address, ok);
        }
        if any {
            self.renew_age(&key, number);
        }
        self.drop_name_if_empty(&key);
    }

    /// Extends the lifetime of a known pair, and returns its unconfirmed changes again. Returns whether the pair
    /// is known.
    fn refresh(
        &mut self,
        key: &Arc<[u8]>,
        address: IpAddr,
        expires: Millis,
        number: u64,
        sink: &mut Sink<'_>,
    ) -> bool {
        let Some(name) = self.names.get_mut(key) else {
            return false;
        };
        let Some(pair) = name.pairs.iter_mut().find(|pair| pair.address == address) else {
            return false;
        };
        pair.expires = pair.expires.max(expires);
        pair.learned = number;
        pair.idle = 0;
        if let Some(entry) = self.addresses.get_mut(&address) {
            entry.name = key.clone();
            entry.complete(address, &name.selectors, sink);
        }
        sink.stats.refreshed += 1;
        true
    }

    /// Makes room for one more pair of the name: evicts an unused pair for each limit that is reached. Pairs of the
    /// answer `number` are not evicted. Returns whether there is room.
    fn make_room(&mut self, key: &Arc<[u8]>, number: u64, limits: &Limits, sink: &mut Sink<'_>) -> bool {
        let full = self
            .names
            .get(key)
            .is_some_and(|name| name.pairs.len() >= limits.per_name);
        if full {
            let Some(victim) = self.victim_of(key, number) else {
                sink.stats.refused += 1;
                return false;
            };
            self.remove_pair(key, victim, sink);
            sink.stats.evicted += 1;
        }
        if self.pairs < limits.per_endpoint {
            return true;
        }
        let victim = if self.exhausted {
            None
        } else {
            self.ages
                .values()
                .find_map(|name| Some((name.clone(), self.victim_of(name, number)?)))
        };
        let Some((name, victim)) = victim else {
            // The next answer can evict pairs of this answer, so `exhausted` depends only on addresses in use.
            self.exhausted = self
                .names
                .values()
                .flat_map(|name| &name.pairs)
                .all(|p| self.in_use(p.address));
            sink.stats.refused += 1;
            return false;
        };
        self.remove_pair(&name, victim, sink);
        if name != *key {
            self.drop_name_if_empty(&name);
        }
        sink.stats.evicted += 1;
        true
    }

    /// Evicts up to `count` pairs whose address no connection uses, starting with the least recently learned name.
    /// Returns the number of evicted pairs.
    pub(crate) fn evict(&mut self, count: usize, sink: &mut Sink<'_>) -> usize {
        self.take(count, |state, pair| !state.in_use(pair.address), sink)
    }

    /// Evicts up to `count` pairs even if connections use their addresses. Returns the number of evicted pairs.
    pub(crate) fn evict_in_use(&mut self, count: usize, sink: &mut Sink<'_>) -> usize {
        self.take(count, |_, _| true, sink)
    }

    fn take(&mut self, count: usize, may: impl Fn(&Self, &Pair) -> bool, sink: &mut Sink<'_>) -> usize {
        let mut gone = Vec::new();
        'names: for key in self.ages.values() {
            for pair in self.names.get(key).map_or(&[][..], |name| &name.pairs) {
                if gone.len() >= count {
                    break 'names;
                }
                if may(self, pair) {
                    gone.push((key.clone(), pair.address));
                }
            }
        }
        for (key, address) in &gone {
            self.remove_pair(key, *address, sink);
            self.drop_name_if_empty(key);
            sink.stats.evicted += 1;
        }
        gone.len()
    }

    /// Removes the addresses for which `filter` returns true, of all names.
    pub(crate) fn remove_addresses(
        &mut self,
        filter: impl Fn(&[SelectorId], IpAddr) -> bool,
        sink: &mut Sink<'_>,
    ) {
        let mut gone = Vec::new();
        for (key, name) in &self.names {
            let addresses = name.pairs.iter().map(|pair| pair.address);
            let addresses = addresses.filter(|address| filter(&name.selectors, *address));
            gone.extend(addresses.map(|address| (key.clone(), address)));
        }
        for (key, address) in gone {
            self.remove_pair(&key, address, sink);
            self.drop_name_if_empty(&key);
        }
    }

    /// Returns the least recently learned address of a name, among those that no connection uses and that the answer
    /// `number` does not contain.
    fn victim_of(&self, name: &Arc<[u8]>, number: u64) -> Option<IpAddr> {
        let pairs = &self.names.get(name)?.pairs;
        pairs
            .iter()
            .filter(|pair| pair.learned != number && !self.in_use(pair.address))
            .min_by_key(|pair| pair.learned)
            .map(|pair| pair.address)
    }

    fn add_pair(&mut self, key: &Arc<[u8]>, pair: Pair, sink: &mut Sink<'_>) {
        let Some(name) = self.names.get_mut(key) else {
            return;
        };
        let address = pair.address;
        name.pairs.push(pair);
        self.pairs += 1;
        sink.stats.learned += 1;
        if let Some(index) = sink.sni_index {
            index.add(sink.endpoint, address, key);
        }
        let entry = self.addresses.entry(address).or_insert_with(|| AddressEntry {
            names: 0,
            name: key.clone(),
            used: 0,
            triples: Vec::new(),
        });
        entry.names += 1;
        entry.name = key.clone();
        for &selector in &name.selectors {
            entry.acquire(address, selector, sink);
        }
    }

    /// Removes an address of a name. The name remains, even without addresses.
    fn remove_pair(&mut self, key: &Arc<[u8]>, address: IpAddr, sink: &mut Sink<'_>) {
        let Some(name) = self.names.get_mut(key) else {
            return;
        };
        let Some(at) = name.pairs.iter().position(|pair| pair.address == address) else {
            return;
        };
        name.pairs.remove(at);
        self.pairs -= 1;
        self.exhausted = false;
        if let Some(index) = sink.sni_index {
            index.remove(sink.endpoint, address, key);
        }
        if let Some(entry) = self.addresses.get_mut(&address) {
            entry.names -= 1;
            if entry.names == 0 {
                entry.used = 0;
            }
            for selector in &name.selectors {
                entry.release(address, *selector, sink);
            }
            self.drop_address_if_empty(address);
        }
    }

    /// Removes an address that has no names, unless the maps can still hold one of its triples.
    fn drop_address_if_empty(&mut self, address: IpAddr) {
        if self
            .addresses
            .get(&address)
            .is_some_and(|entry| entry.names == 0 && entry.triples.is_empty())
        {
            self.addresses.remove(&address);
        }
    }

    fn drop_name_if_empty(&mut self, key: &Arc<[u8]>) {
        if self.names.get(key).is_some_and(|name| name.pairs.is_empty())
            && let Some(name) = self.names.remove(key)
        {
            self.ages.remove(&name.age);
        }
    }

    /// Moves a name to the end of the age order. An answer with aliases has several names with the same `number`; each
    /// gets the next free key from `number << 8`.
    fn renew_age(&mut self, key: &Arc<[u8]>, number: u64) {
        let Some(name) = self.names.get_mut(key) else {
            return;
        };
        self.ages.remove(&name.age);
        let mut age = number << 8;
        while self.ages.contains_key(&age) {
            age += 1;
        }
        name.age = age;
        self.ages.insert(age, key.clone());
    }

    /// Ends a round: removes the pairs that have been expired and unused for [`IDLE_SWEEPS`] sweeps, and repeats the
    /// changes that are not confirmed.
    pub(crate) fn sweep(&mut self, now: Millis, sink: &mut Sink<'_>) {
        let round = self.round;
        let mut dead = Vec::new();
        for (key, name) in &mut self.names {
            for pair in &mut name.pairs {
                let used = self
                    .addresses
                    .get(&pair.address)
                    .is_some_and(|entry| entry.used == round);
                if used || pair.expires > now {
                    pair.idle = 0;
                    continue;
                }
                pair.idle += 1;
                if pair.idle >= IDLE_SWEEPS {
                    dead.push((key.clone(), pair.address));
                }
            }
        }
        for (key, address) in dead {
            self.remove_pair(&key, address, sink);
            self.drop_name_if_empty(&key);
            sink.stats.expired += 1;
        }
        self.round += 1;
        self.exhausted = false;
        self.repair(sink);
    }

    /// Repeats the changes that are not confirmed.
    fn repair(&mut self, sink: &mut Sink<'_>) {
        // `sink` already has the changes of this operation, which must not be repeated.
        let from = sink
            .changes
            .iter()
            .map(|change| change.turn)
            .collect::<std::collections::HashSet<_>>();
        for (&address, entry) in &mut self.addresses {
            for triple in &mut entry.triples {
                if triple.map == MapState::Unsure && !from.contains(&triple.turn) {
                    sink.emit(address, triple);
                }
            }
        }
    }

    /// Replaces the selectors. Additions precede removals, so that an address that both the old and the new policy
    /// allow remains reachable.
    pub(crate) fn set_selectors(&mut self, selectors: Option<Arc<Selectors>>, sink: &mut Sink<'_>) {
        let mut old = Vec::new();
        for (key, name) in &mut self.names {
            let Ok(text) = Name::from_wire(key) else { continue };
            let new = selectors
                .as_ref()
                .map(|all| all.matching(&text))
                .unwrap_or_default();
            if new == name.selectors {
                continue;
            }
            let before = std::mem::replace(&mut name.selectors, new);
            for pair in &name.pairs {
                let Some(entry) = self.addresses.get_mut(&pair.address) else {
                    continue;
                };
                for &selector in name
                    .selectors
                    .iter()
                    .filter(|id| before.binary_search(id).is_err())
                {
                    entry.acquire(pair.address, selector, sink);
                }
            }
            old.push((key.clone(), before));
        }
        for (key, before) in old {
            let Some(name) = self.names.get(&key) else {
                continue;
            };
            for pair in &name.pairs {
                let Some(entry) = self.addresses.get_mut(&pair.address) else {
                    continue;
                };
                for &selector in before
                    .iter()
                    .filter(|id| name.selectors.binary_search(id).is_err())
                {
                    entry.release(pair.address, selector, sink);
                }
            }
        }
        self.selectors = selectors;
    }

    /// Removes the names for which `filter` returns true, even if connections use their addresses. Returns the number
    /// of removed pairs.
    pub(crate) fn clean(&mut self, mut filter: impl FnMut(&Name) -> bool, sink: &mut Sink<'_>) -> usize {
        let before = self.pairs;
        let keys: Vec<_> = self
            .names
            .keys()
            .filter(|key| Name::from_wire(key).is_ok_and(|name| filter(&name)))
            .cloned()
            .collect();
        for key in keys {
            while let Some(address) = self
                .names
                .get(&key)
                .and_then(|name| name.pairs.last())
                .map(|pair| pair.address)
            {
                self.remove_pair(&key, address, sink);
            }
            self.drop_name_if_empty(&key);
        }
        before - self.pairs
    }

    /// Removes a pair that the answer `number` has added, unless another answer has contained it since.
    pub(crate) fn unlearn(&mut self, number: u64, key: &Arc<[u8]>, address: IpAddr, sink: &mut Sink<'_>) {
        let own = |pair: &Pair| pair.address == address && pair.born == number && pair.learned == number;
        if self.names.get(key).is_some_and(|name| name.pairs.iter().any(own)) {
            self.remove_pair(key, address, sink);
            self.drop_name_if_empty(key);
        }
    }

    /// Records that a change has been written to the maps.
    pub(crate) fn written(&mut self, change: &Change) {
        let Some(entry) = self.addresses.get_mut(&change.address) else {
            return;
        };
        let Ok(at) = entry.find(change.selector) else {
            return;
        };
        let Some(triple) = entry.triples.get_mut(at) else {
            return;
        };
        triple.map = match change.kind {
            // The triple has changed again after `change` was returned, so this write does not confirm its current
            // state.
            _ if triple.turn != change.turn => MapState::Unsure,
            ChangeKind::Live => MapState::Present,
            ChangeKind::Gone => MapState::Absent,
        };
        if triple.map == MapState::Absent {
            entry.triples.remove(at);
            self.drop_address_if_empty(change.address);
        }
    }

    /// Returns whether the maps hold all triples of a pair, and repeats the changes that are not confirmed. Returns
    /// `None` if the pair was removed.
    pub(crate) fn check(&mut self, key: &Arc<[u8]>, address: IpAddr, sink: &mut Sink<'_>) -> Option<bool> {
        let name = self.names.get(key)?;
        name.pairs.iter().find(|pair| pair.address == address)?;
        let entry = self.addresses.get_mut(&address)?;
        Some(entry.complete(address, &name.selectors, sink))
    }
}

impl AddressEntry {
    /// Returns whether at least one name has the address.
    pub(crate) fn is_named(&self) -> bool {
        self.names > 0
    }

    fn find(&self, selector: SelectorId) -> Result<usize, usize> {
        self.triples
            .binary_search_by_key(&selector, |triple| triple.selector)
    }

    /// Returns whether the maps hold the address for all of `selectors`, and repeats the changes that are not
    /// confirmed.
    fn complete(&mut self, address: IpAddr, selectors: &[SelectorId], sink: &mut Sink<'_>) -> bool {
        let mut complete = true;
        for &selector in selectors {
            if let Ok(at) = self.find(selector)
                && let Some(triple) = self.triples.get_mut(at)
                && triple.map != MapState::Present
            {
                complete = false;
                sink.emit(address, triple);
            }
        }
        complete
    }

    /// Adds one to the number of the address's names that match `selector`. Emits a change unless the maps hold the
    /// triple.
    fn acquire(&mut self, address: IpAddr, selector: SelectorId, sink: &mut Sink<'_>) {
        let at = self.find(selector).unwrap_or_else(|at| {
            // Most addresses have one selector, but `Vec` would reserve room for four.
            if self.triples.is_empty() {
                self.triples.reserve_exact(1);
            }
            self.triples.insert(
                at,
                LearnedTriple {
                    selector,
                    names: 0,
                    map: MapState::Absent,
                    turn: 0,
                },
            );
            at
        });
        let Some(triple) = self.triples.get_mut(at) else {
            return;
        };
        if triple.names == 0 {
            triple.turn = sink.next_turn();
        }
        triple.names += 1;
        if triple.map != MapState::Present {
            sink.emit(address, triple);
        }
    }

    /// Subtracts one from the number of the address's names that match `selector`. Emits a change if no such name is
    /// left.
    fn release(&mut self, address: IpAddr, selector: SelectorId, sink: &mut Sink<'_>) {
        let Ok(at) = self.find(selector) else { return };
        let Some(triple) = self.triples.get_mut(at) else {
            return;
        };
        triple.names -= 1;
        if triple.names == 0 {
            triple.turn = sink.next_turn();
            sink.emit(address, triple);
        }
    }
}
