//! Identities of addresses that endpoints learned by name.
//!
//! Every `toFQDNs` selector has a number. The label set of a learned address consists of the labels that the address
//! has without learned names (for example those of the world, or of the longest prefix that a policy names) and of one
//! label for each selector that matches a learned name. The label set of one selector and the world always has an
//! identity; any other label set gets an identity when the daemon requests it. The entries of the identity are in the
//! policy tables of the endpoints that use all of its selectors.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use palisade_abi::{Addr, Identity, IpcacheEntry, PrefixKey, identity};

use crate::rule::FqdnPattern;

/// Number of a `toFQDNs` selector. It is stable while a rule uses the selector, and never reused.
pub type SelectorNumber = u32;

/// The selectors that the egress rules of an endpoint use, by number.
pub type SelectorList = Arc<[(SelectorNumber, FqdnPattern)]>;

/// Key of the identity of a learned address: the identity that the address has without learned names, and the selectors
/// that match the learned names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LearnedSet {
    /// Identity of the address without learned names.
    pub base: Identity,
    /// Selectors that the learned names match, ascending; at least one.
    pub selectors: Arc<[SelectorNumber]>,
}

/// Returns whether learned names can change the identity of an address that has the identity `base` without them.
/// Addresses of endpoints, of the node and of labelled peers outside the world keep their identity, whatever names
/// resolve to them.
#[must_use]
pub const fn learnable(base: Identity) -> bool {
    matches!(
        base,
        identity::WORLD | identity::WORLD_IPV4 | identity::WORLD_IPV6
    ) || base >= identity::FIRST_LOCAL
}

/// Identities of learned sets: by base, then by selectors.
pub type Sets = HashMap<Identity, HashMap<Arc<[SelectorNumber]>, Identity>>;

/// Data to find the identity of a learned address. Cloning is cheap, so other threads can have copies. The data belongs
/// to one [`Snapshot`](crate::snapshot::Snapshot).
#[derive(Clone, Debug, Default)]
pub struct LearnedIdentities {
    /// Single addresses, as in the snapshot.
    pub addresses: Arc<HashMap<Addr, IpcacheEntry>>,
    /// Prefixes that are shorter than an address, as in the snapshot.
    pub prefixes: Arc<HashMap<PrefixKey, IpcacheEntry>>,
    /// Lengths of the prefixes, bits, the longest first.
    pub lengths: Arc<[u32]>,
    /// Identities of addresses that no prefix contains: IPv4, IPv6.
    pub worlds: [Identity; 2],
    /// Selectors that the policies of at least one endpoint use.
    pub selectors: Arc<BTreeSet<SelectorNumber>>,
    /// Sets that always have an identity: one selector, and the world as base.
    pub standing: Arc<Sets>,
    /// Other sets, which have an identity because the daemon requested them.
    pub wanted: Arc<Sets>,
}

impl LearnedIdentities {
    /// Returns the identity that an address has without learned names: that of the exact address, else of the longest
    /// prefix, else of the world.
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

    /// Returns the identity of an address that was learned through `selectors` (ascending). `None` if the combination
    /// has no identity yet; [`Self::set`] returns the set to request from the compiler.
    ///
    /// Selectors that no endpoint uses are ignored. Learned names do not change an identity that is not [`learnable`].
    #[must_use]
    pub fn identity(&self, address: IpAddr, selectors: &[SelectorNumber]) -> Option<Identity> {
        self.identity_on(self.base(address), selectors)
    }

    /// Returns the result of [`Self::identity`] for an IPv4 address of the world.
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

    /// Returns the learned set of an address if its identity exists only on request; `None` if learned names do not
    /// change the identity of the address, or the set always has an identity.
    #[must_use]
    pub fn requested_set(&self, address: IpAddr, selectors: &[SelectorNumber]) -> Option<LearnedSet> {
        self.set(address, selectors).filter(|set| {
            let standing = self.standing.get(&set.base);
            !standing.is_some_and(|sets| sets.contains_key(&set.selectors))
        })
    }

    /// Returns the learned set of an address; `None` if learned names do not change its identity.
    #[must_use]
    pub fn set(&self, address: IpAddr, selectors: &[SelectorNumber]) -> Option<LearnedSet> {
        self.set_on(self.base(address), selectors)
    }

    /// Returns the result of [`Self::set`] for an IPv4 address of the world.
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

    /// Returns the identity of a set, if it has one.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_that_always_has_an_identity_is_not_requested() {
        let one: Arc<[SelectorNumber]> = [7].into();
        let standing = Sets::from([(identity::WORLD_IPV4, HashMap::from([(one, 300)]))]);
        let identities = LearnedIdentities {
            worlds: [identity::WORLD_IPV4, identity::WORLD_IPV6],
            selectors: Arc::new([7, 8].into()),
            standing: Arc::new(standing),
            ..LearnedIdentities::default()
        };
        let world: IpAddr = "192.0.2.1".parse().unwrap();
        assert!(identities.set(world, &[7]).is_some());
        assert_eq!(identities.requested_set(world, &[7]), None);
        // Selector 9 is used by no endpoint, so the set is the standing one.
        assert_eq!(identities.requested_set(world, &[7, 9]), None);
        let two = identities.requested_set(world, &[7, 8]).unwrap();
        assert_eq!((two.base, &*two.selectors), (identity::WORLD_IPV4, &[7, 8][..]));
    }
}
