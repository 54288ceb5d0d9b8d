//! The lookups of the BPF programs in a compiled snapshot: ipcache, learned addresses, prefixes, policy table.
//!
//! The same lookups as in `xdp/src/identity.rs` and `xdp/src/policy.rs`, over the snapshot instead of BPF maps.

use std::collections::HashMap;

use foldhash::fast::RandomState;
use palisade_abi::{
    Addr, CLASS_ANY, Direction, EndpointState, Identity, IpcacheEntry, LearnedKey, PolicyEntry, identity,
};
use palisade_model::snapshot::Snapshot;

/// The content of the maps.
#[derive(Debug)]
pub(crate) struct Tables {
    snapshot: Snapshot,
    /// Single addresses, with a faster hash than that of the snapshot: every packet needs two lookups.
    addresses: HashMap<Addr, IpcacheEntry, RandomState>,
    /// Lengths of the prefixes of the snapshot, the longest first.
    lengths: Vec<u32>,
    /// Identities of learned addresses.
    learned: HashMap<LearnedKey, Identity, RandomState>,
    /// Number by which the revision of an endpoint exceeds that of the snapshot.
    bumps: HashMap<u16, u32>,
}

impl Tables {
    pub(crate) fn new(snapshot: Snapshot) -> Self {
        let mut tables = Self {
            snapshot: Snapshot::default(),
            addresses: HashMap::default(),
            lengths: Vec::new(),
            learned: HashMap::default(),
            bumps: HashMap::new(),
        };
        tables.set_snapshot(snapshot);
        tables
    }

    /// Replaces the snapshot; the learned addresses stay.
    pub(crate) fn set_snapshot(&mut self, snapshot: Snapshot) {
        self.addresses = snapshot
            .addresses
            .iter()
            .map(|(addr, entry)| (*addr, *entry))
            .collect();
        self.lengths = snapshot.prefixes.keys().map(|key| key.length).collect();
        self.lengths.sort_unstable();
        self.lengths.dedup();
        self.lengths.reverse();
        self.snapshot = snapshot;
    }

    pub(crate) const fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Returns the exact ipcache entry of an address; all zeros if there is none.
    pub(crate) fn exact(&self, addr: Addr) -> IpcacheEntry {
        self.addresses.get(&addr).copied().unwrap_or_default()
    }

    /// Returns the identity of an address whose exact ipcache entry is `known`.
    pub(crate) fn identity(&self, addr: Addr, known: IpcacheEntry) -> Identity {
        if known.identity != 0 {
            return known.identity;
        }
        let by_prefix = self.lengths.iter().find_map(|length| {
            let key = palisade_abi::PrefixKey {
                length: *length,
                addr: addr.mask(*length),
            };
            self.snapshot.prefixes.get(&key)
        });
        match by_prefix {
            Some(entry) => entry.identity,
            None if addr.is_v4() => self.snapshot.world_ipv4,
            None => self.snapshot.world_ipv6,
        }
    }

    /// Returns the identity of the peer of a flow that `endpoint` opens.
    pub(crate) fn learned_identity(&self, addr: Addr, known: IpcacheEntry, endpoint: u16) -> Identity {
        if (known.identity == 0 || known.identity >= identity::FIRST_LOCAL)
            && let Some(identity) = self.learned.get(&LearnedKey {
                addr,
                endpoint: endpoint.into(),
            })
        {
            return *identity;
        }
        self.identity(addr, known)
    }

    /// Sets or removes the identity of a learned address.
    pub(crate) fn set_learned(&mut self, key: LearnedKey, identity: Option<Identity>) {
        match identity {
            Some(identity) => drop(self.learned.insert(key, identity)),
            None => drop(self.learned.remove(&key)),
        }
    }

    /// Returns the state of an endpoint.
    pub(crate) fn endpoint(&self, id: u16) -> Option<EndpointState> {
        let mut state = *self.snapshot.endpoints.get(&id)?;
        if let Some(bump) = self.bumps.get(&id) {
            state.revision = state.revision.wrapping_add(*bump);
        }
        Some(state)
    }

    /// Gives an endpoint a new revision, so that its flows are evaluated again.
    pub(crate) fn bump(&mut self, endpoint: u16) {
        *self.bumps.entry(endpoint).or_default() += 2;
    }

    /// Returns the entry that decides: the first existing key of (identity, class), (identity, any), (any, class),
    /// (any, any). `at_nic`: whether failsafe ports apply.
    pub(crate) fn policy(
        &self,
        policy: u32,
        direction: Direction,
        identity: Identity,
        slot: u32,
        at_nic: bool,
    ) -> Option<PolicyEntry> {
        let class = self
            .snapshot
            .classes
            .get(slot as usize)
            .copied()
            .unwrap_or(CLASS_ANY);
        let table = self.snapshot.tables.get(&policy)?;
        if at_nic {
            table.lookup(direction, identity, class).copied()
        } else {
            table.lookup_inside(direction, identity, class).copied()
        }
    }

    /// Returns the entry for any peer and any port.
    pub(crate) fn default_entry(&self, endpoint: u16, direction: Direction) -> Option<PolicyEntry> {
        let state = self.snapshot.endpoints.get(&endpoint)?;
        let table = self.snapshot.tables.get(&state.policy)?;
        table.lookup(direction, identity::ANY, CLASS_ANY).copied()
    }
}
