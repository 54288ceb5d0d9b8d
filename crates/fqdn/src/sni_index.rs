//! An index of (endpoint, address, name) triples that workers read while the cache changes. A worker uses it to check
//! that the address of a TLS connection was learned for the server name in its ClientHello (`[tls]
//! verify_sni_address`).

use std::{
    hash::{BuildHasher as _, RandomState},
    mem::size_of,
    net::IpAddr,
};

use dashmap::DashSet;
use palisade_protocols::dns::Name;

use crate::EndpointId;

/// The (endpoint, address, name) triples of a [`crate::Cache`], for other threads. The index always has the same
/// triples as the cache, so the limits of the cache bound the index too.
///
/// A lookup takes the read lock of a shard, so only insertions and removals in that shard can delay it.
#[derive(Debug)]
pub struct SniAddressIndex {
    hashes: RandomState,
    entries: DashSet<Entry, RandomState>,
}

/// An entry has a 64-bit hash of the name instead of the name. The key of the hash is random, so an attacker cannot
/// construct two names with the same hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Entry {
    endpoint: EndpointId,
    address: IpAddr,
    name: u64,
}

impl Default for SniAddressIndex {
    fn default() -> Self {
        let hashes = RandomState::new();
        Self {
            entries: DashSet::with_hasher(hashes.clone()),
            hashes,
        }
    }
}

impl SniAddressIndex {
    /// Returns whether the endpoint has learned the address for this name, and the cache still holds it.
    #[must_use]
    pub fn has(&self, endpoint: EndpointId, address: IpAddr, name: &Name) -> bool {
        self.entries.contains(&self.entry(endpoint, address, name.wire()))
    }

    /// Returns the number of triples.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns whether the index has no triples.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns the memory that the index takes, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        // hashbrown has one control byte per slot and fills at most seven of eight slots.
        size_of::<Self>() + (self.entries.capacity() * 8 / 7) * (size_of::<Entry>() + 1)
    }

    pub(crate) fn add(&self, endpoint: EndpointId, address: IpAddr, name: &[u8]) {
        self.entries.insert(self.entry(endpoint, address, name));
    }

    pub(crate) fn remove(&self, endpoint: EndpointId, address: IpAddr, name: &[u8]) {
        self.entries.remove(&self.entry(endpoint, address, name));
    }

    fn entry(&self, endpoint: EndpointId, address: IpAddr, name: &[u8]) -> Entry {
        Entry {
            endpoint,
            // A connection to ::ffff:192.0.2.1 is sent as IPv4 to 192.0.2.1 (RFC 4291, section 2.5.5.2).
            address: address.to_canonical(),
            name: self.hashes.hash_one(name),
        }
    }
}
