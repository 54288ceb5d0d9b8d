//! An index of (endpoint, address, name) that workers read while the cache changes: which server names an address was
//! learned for (`[tls] verify_sni_address`).

use std::{
    array,
    collections::HashSet,
    hash::{BuildHasher as _, RandomState},
    mem::size_of,
    net::IpAddr,
    sync::{PoisonError, RwLock},
};

use palisade_protocols::dns::Name;

use crate::EndpointId;

/// Parts that are locked one by one. A power of two.
const PARTS: usize = 64;

/// Which endpoint knows which address by which name, for other threads to look at: always what the [`crate::Cache`]
/// holds that keeps it, so its limits are those of the cache.
///
/// Whoever looks waits at most for one pair to be written or taken out.
#[derive(Debug)]
pub struct SniAddressIndex {
    hashes: RandomState,
    parts: [RwLock<HashSet<Pair>>; PARTS],
}

/// The name is there by its hash only. That has 64 bits, by a key that nobody else has: nobody can find two names
/// that have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Pair {
    endpoint: EndpointId,
    address: IpAddr,
    name: u64,
}

impl Default for SniAddressIndex {
    fn default() -> Self {
        Self {
            hashes: RandomState::new(),
            parts: array::from_fn(|_| RwLock::default()),
        }
    }
}

impl SniAddressIndex {
    /// Whether the endpoint has learned the address by this name, and it is not forgotten.
    #[must_use]
    pub fn has(&self, endpoint: EndpointId, address: IpAddr, name: &Name) -> bool {
        let (part, pair) = self.place(endpoint, address, name.wire());
        let part = part.read().unwrap_or_else(PoisonError::into_inner);
        part.contains(&pair)
    }

    /// Addresses of names.
    #[must_use]
    pub fn len(&self) -> usize {
        let parts = self.parts.iter();
        parts
            .map(|part| part.read().unwrap_or_else(PoisonError::into_inner).len())
            .sum()
    }

    /// Whether nobody has learned anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What it takes, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        let parts = self.parts.iter();
        let places: usize = parts
            .map(|part| part.read().unwrap_or_else(PoisonError::into_inner).capacity())
            .sum();
        size_of::<Self>() + (places * 8 / 7) * (size_of::<Pair>() + 1)
    }

    pub(crate) fn add(&self, endpoint: EndpointId, address: IpAddr, name: &[u8]) {
        let (part, pair) = self.place(endpoint, address, name);
        part.write().unwrap_or_else(PoisonError::into_inner).insert(pair);
    }

    pub(crate) fn remove(&self, endpoint: EndpointId, address: IpAddr, name: &[u8]) {
        let (part, pair) = self.place(endpoint, address, name);
        part.write().unwrap_or_else(PoisonError::into_inner).remove(&pair);
    }

    fn place(&self, endpoint: EndpointId, address: IpAddr, name: &[u8]) -> (&RwLock<HashSet<Pair>>, Pair) {
        let name = self.hashes.hash_one(name);
        let pair = Pair {
            endpoint,
            // a connection to ::ffff:192.0.2.1 leaves as one to 192.0.2.1 (RFC 4291, 2.5.5.2)
            address: address.to_canonical(),
            name,
        };
        // Names with many addresses are spread too.
        let part = self.hashes.hash_one(pair) as usize % PARTS;
        (&self.parts[part], pair)
    }
}
