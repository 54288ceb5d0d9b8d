//! Addresses and prefixes whose ipcache entry changes.

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
};

use palisade_abi::{Addr, Identity, IpcacheEntry, LearnedKey, PrefixKey, endpoint_flags, identity};
use palisade_model::{op::Op, snapshot::Snapshot};

use super::choice::Choices;

/// Key of an ipcache entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum AddressKey {
    Address(Addr),
    Prefix(PrefixKey),
    /// A learned address, which applies to one endpoint only. [`choose`](super::choice::choose) compares the entries of
    /// the old and of the new identity in all changed tables, not only in the table of that endpoint. So the plan can
    /// copy more entries than necessary, never fewer.
    Learned(LearnedKey),
}

impl AddressKey {
    /// Returns the rank of the key: a higher rank is more specific. The rank of a prefix is its length in bits.
    fn length(&self) -> u32 {
        match self {
            Self::Learned(_) => 130,
            Self::Address(_) => 129,
            Self::Prefix(key) => key.length,
        }
    }

    pub(super) fn put(self, entry: IpcacheEntry) -> Op {
        match self {
            Self::Address(addr) => Op::AddressPut(addr, entry),
            Self::Prefix(key) => Op::PrefixPut(key, entry),
            Self::Learned(key) => Op::LearnedPut(key, entry.identity),
        }
    }

    pub(super) fn delete(self) -> Op {
        match self {
            Self::Address(addr) => Op::AddressDelete(addr),
            Self::Prefix(key) => Op::PrefixDelete(key),
            Self::Learned(key) => Op::LearnedDelete(key),
        }
    }

    /// Returns the entry that `in_state` holds under this key.
    fn kept(self, in_state: &Snapshot) -> Option<IpcacheEntry> {
        match self {
            Self::Address(addr) => in_state.addresses.get(&addr).copied(),
            Self::Prefix(key) => in_state.prefixes.get(&key).copied(),
            Self::Learned(key) => in_state
                .learned
                .entries
                .get(&key)
                .map(|&identity| learned_entry(identity)),
        }
    }

    /// Returns the entry that a lookup in `in_state` finds for an address of this key, if nothing more specific than
    /// the key matches.
    fn effective(self, in_state: &Snapshot) -> IpcacheEntry {
        let (addr, below) = match self {
            Self::Address(addr) => (addr, 128),
            Self::Prefix(key) => (key.addr, key.length),
            Self::Learned(key) => {
                let unlearned = || learned_entry(Self::Address(key.addr).effective(in_state).identity);
                let hidden = in_state.addresses.get(&key.addr).is_some_and(hides_learned);
                if hidden || !learns(in_state, key) {
                    return unlearned();
                }
                return self.kept(in_state).unwrap_or_else(unlearned);
            }
        };
        self.kept(in_state)
            .or_else(|| in_state.longest_prefix(addr, below))
            .unwrap_or(IpcacheEntry {
                identity: if addr.is_v4() && below >= 96 {
                    in_state.world_ipv4
                } else {
                    in_state.world_ipv6
                },
                ..IpcacheEntry::default()
            })
    }
}

/// Returns a learned address as an ipcache entry. The map of learned addresses holds only the identity.
pub(super) fn learned_entry(identity: Identity) -> IpcacheEntry {
    IpcacheEntry {
        identity,
        ..IpcacheEntry::default()
    }
}

/// Returns whether an ipcache entry takes precedence over learned addresses in the programs.
pub(super) fn hides_learned(entry: &IpcacheEntry) -> bool {
    entry.identity < identity::FIRST_LOCAL
}

/// Returns whether the programs look up learned addresses for the endpoint of `key`.
pub(super) fn learns(state: &Snapshot, key: LearnedKey) -> bool {
    let endpoint = u16::try_from(key.endpoint).ok();
    endpoint
        .and_then(|id| state.endpoints.get(&id))
        .is_some_and(|state| state.flags & endpoint_flags::LEARNS != 0)
}

/// Returns the pairs (old identity, new identity) of ipcache addresses that an endpoint has also learned, if one of the
/// two identities hides the learned one ([`hides_learned`]). While the tables are switched, such an ipcache entry gets
/// a spare identity if one is left. A spare identity hides no learned identity: an endpoint that learned the address
/// then uses the learned entry, whose identity the plan chooses separately.
pub(super) fn contested(
    addresses: &[AddressChange],
    old: &Snapshot,
    new: &Snapshot,
) -> BTreeSet<(Identity, Identity)> {
    let learned = || old.learned.entries.keys().chain(new.learned.entries.keys());
    let addrs: HashSet<Addr> = learned().map(|key| key.addr).collect();
    addresses
        .iter()
        .filter(|change| matches!(change.key, AddressKey::Address(addr) if addrs.contains(&addr)))
        .filter_map(AddressChange::pair)
        .filter(|(from, to)| *from < identity::FIRST_LOCAL || *to < identity::FIRST_LOCAL)
        .collect()
}

/// A key whose own entry changes, or a learned address for which a lookup finds another identity than before.
#[derive(Debug)]
pub(super) struct AddressChange {
    pub(super) key: AddressKey,
    pub(super) found: Option<IpcacheEntry>,
    pub(super) wanted: Option<IpcacheEntry>,
    pub(super) from: IpcacheEntry,
    pub(super) to: IpcacheEntry,
}

impl AddressChange {
    pub(super) fn pair(&self) -> Option<(Identity, Identity)> {
        let pair = (self.from.identity, self.to.identity);
        (pair.0 != pair.1).then_some(pair)
    }

    /// Returns the entry that the key has while the tables are switched.
    pub(super) fn between(&self, choices: &Choices<Identity>) -> IpcacheEntry {
        let Some((from, to)) = self.pair() else {
            return self.to;
        };
        let number = choices.number(from, to);
        IpcacheEntry {
            identity: number,
            ..if number == from { self.from } else { self.to }
        }
    }
}

/// Returns the changes, the most specific key first.
pub(super) fn changed_addresses(old: &Snapshot, new: &Snapshot) -> Vec<AddressChange> {
    let mut keys: Vec<AddressKey> = Vec::new();
    if !Arc::ptr_eq(&old.addresses, &new.addresses) {
        let all = old.addresses.keys().chain(
            new.addresses
                .keys()
                .filter(|key| !old.addresses.contains_key(key)),
        );
        keys.extend(all.map(|addr| AddressKey::Address(*addr)));
    }
    if !Arc::ptr_eq(&old.prefixes, &new.prefixes) {
        let all = old
            .prefixes
            .keys()
            .chain(new.prefixes.keys().filter(|key| !old.prefixes.contains_key(key)));
        keys.extend(all.map(|key| AddressKey::Prefix(*key)));
    }
    let all = old.learned.entries.keys().chain(
        new.learned
            .entries
            .keys()
            .filter(|key| !old.learned.entries.contains_key(key)),
    );
    keys.extend(all.map(|key| AddressKey::Learned(*key)));
    let mut changes: Vec<AddressChange> = keys
        .into_iter()
        .map(|key| AddressChange {
            key,
            found: key.kept(old),
            wanted: key.kept(new),
            from: key.effective(old),
            to: key.effective(new),
        })
        // A change of the ipcache, or of the endpoint flag LEARNS (the programs look up learned addresses), can change
        // what a lookup of a learned address finds, although the entry of the learned address does not change.
        .filter(|change| {
            change.found != change.wanted
                || (matches!(change.key, AddressKey::Learned(_)) && change.pair().is_some())
        })
        .collect();
    changes.sort_by_key(|change| std::cmp::Reverse(change.key.length()));
    changes
}

pub(super) fn settle_addresses(addresses: &[AddressChange], choices: &Choices<Identity>, ops: &mut Vec<Op>) {
    for change in addresses {
        if let Some(wanted) = change.wanted
            && wanted != change.between(choices)
        {
            ops.push(change.key.put(wanted));
        }
    }
    for change in addresses.iter().rev().filter(|change| change.wanted.is_none()) {
        ops.push(change.key.delete());
    }
}
