//! Who an address is that was learned by name.
//!
//! Every `toFQDNs` selector has a number. An address that an endpoint learned through some of them has the labels that
//! it has anyway (those of the world, or of the longest prefix that a policy mentions) and a label for each of the
//! selectors; such a set of labels has an identity, with its rows in the tables of the endpoints that use them all.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use palisade_abi::{Addr, Identity, IpcacheEntry, PrefixKey, identity};

use crate::rule::FqdnPattern;

/// Number of a `toFQDNs` selector. The same as long as a rule uses it; never given away again.
pub type SelectorNumber = u32;

/// The selectors that the egress rules of an endpoint use, by number.
pub type SelectorList = Arc<[(SelectorNumber, FqdnPattern)]>;

/// What there is to know of a learned address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LearnedSet {
    /// What it is without names.
    pub base: Identity,
    /// The selectors whose names it was learned by, ascending, at least one.
    pub selectors: Arc<[SelectorNumber]>,
}

/// Whether a name can add to what an address is. Addresses of endpoints, of the node and of labelled peers are who
/// they are, by whatever name.
#[must_use]
pub const fn learnable(base: Identity) -> bool {
    matches!(
        base,
        identity::WORLD | identity::WORLD_IPV4 | identity::WORLD_IPV6
    ) || base >= identity::FIRST_LOCAL
}

/// Identities of sets: by base, then by selectors.
pub type Sets = HashMap<Identity, HashMap<Arc<[SelectorNumber]>, Identity>>;

/// What is needed to tell who a learned address is. Cheap to copy, and made to be asked by another thread; it changes
/// with the [`Snapshot`](crate::snapshot::Snapshot) that it belongs to.
#[derive(Clone, Debug, Default)]
pub struct LearnedIdentities {
    /// Full-length addresses, as in the snapshot.
    pub addresses: Arc<HashMap<Addr, IpcacheEntry>>,
    /// Shorter prefixes, as in the snapshot.
    pub prefixes: Arc<HashMap<PrefixKey, IpcacheEntry>>,
    /// The lengths that prefixes have, the longest first.
    pub lengths: Arc<[u32]>,
    /// Identities of addresses that no prefix contains: IPv4, IPv6.
    pub worlds: [Identity; 2],
    /// The selectors that somebody uses.
    pub selectors: Arc<BTreeSet<SelectorNumber>>,
    /// Sets that are always there.
    pub standing: Arc<Sets>,
    /// Sets that were asked for.
    pub wanted: Arc<Sets>,
}

impl LearnedIdentities {
    /// Who an address is without names: the exact address, else the longest prefix, else the world.
    #[must_use]
    pub fn base(&self, address: IpAddr) -> Identity {
        let addr = Addr::from(address);
        if let Some(entry) = self.addresses.get(&addr) {
            return entry.identity;
        }
        let prefix = self.lengths.iter().find_map(|length| {
            self.prefixes.get(&PrefixKey {
                length: *length,
                addr: addr.mask(*length),
            })
        });
        match prefix {
            Some(entry) => entry.identity,
            None => self.worlds[usize::from(!addr.is_v4())],
        }
    }

    /// Who an address is that was learned through these selectors (ascending). `None`: nobody has asked for such an
    /// identity yet; [`Self::set`] says what to ask the compiler for.
    ///
    /// Selectors that nobody uses count for nothing. An address that no name can add to is who it is.
    #[must_use]
    pub fn identity(&self, address: IpAddr, selectors: &[SelectorNumber]) -> Option<Identity> {
        self.identity_on(self.base(address), selectors)
    }

    /// The same for an address that nothing else is known of (IPv4).
    #[must_use]
    pub fn identity_in_world(&self, selectors: &[SelectorNumber]) -> Option<Identity> {
        self.identity_on(self.worlds[0], selectors)
    }

    fn identity_on(&self, base: Identity, selectors: &[SelectorNumber]) -> Option<Identity> {
        if selectors.is_empty() || !learnable(base) {
            return Some(base);
        }
        let find = |sets: &Sets, selectors: &[SelectorNumber]| sets.get(&base)?.get(selectors).copied();
        let known = |selectors: &[SelectorNumber]| {
            find(&self.standing, selectors).or_else(|| find(&self.wanted, selectors))
        };
        known(selectors).or_else(|| {
            let used = self.used(selectors);
            match used.len() {
                0 => Some(base),
                n if n == selectors.len() => None,
                _ => known(&used),
            }
        })
    }

    /// The set that says all about an address; none if no name can add to it.
    #[must_use]
    pub fn set(&self, address: IpAddr, selectors: &[SelectorNumber]) -> Option<LearnedSet> {
        self.set_on(self.base(address), selectors)
    }

    /// The same for an address that nothing else is known of (IPv4).
    #[must_use]
    pub fn set_in_world(&self, selectors: &[SelectorNumber]) -> Option<LearnedSet> {
        self.set_on(self.worlds[0], selectors)
    }

    fn set_on(&self, base: Identity, selectors: &[SelectorNumber]) -> Option<LearnedSet> {
        let used = self.used(selectors);
        (learnable(base) && !used.is_empty()).then(|| LearnedSet {
            base,
            selectors: used.into(),
        })
    }

    /// The identity of a set, if it has one.
    #[must_use]
    pub fn identity_of_set(&self, set: &LearnedSet) -> Option<Identity> {
        let find = |sets: &Sets| sets.get(&set.base)?.get(&set.selectors).copied();
        find(&self.standing).or_else(|| find(&self.wanted))
    }

    fn used(&self, selectors: &[SelectorNumber]) -> Vec<SelectorNumber> {
        selectors
            .iter()
            .copied()
            .filter(|number| self.selectors.contains(number))
            .collect()
    }
}
