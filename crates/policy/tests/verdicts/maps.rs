//! The BPF maps as ordinary maps, with the lookups of the programs.

use std::collections::{BTreeMap, HashMap};

use palisade_abi::{
    Addr, CLASS_ANY, CLASS_SLOTS, Class, Decision, Direction, EndpointState, IpcacheEntry, LearnedKey,
    PolicyEntry, PolicyKey, PrefixKey, class_slot, class_slot_unknown_port, endpoint_flags, identity,
};
use palisade_model::{
    op::Op,
    snapshot::{MapContents, Snapshot},
};

use crate::random::Packet;

#[derive(Clone, Default)]
pub struct Maps {
    addresses: HashMap<Addr, IpcacheEntry>,
    prefixes: HashMap<PrefixKey, IpcacheEntry>,
    pub learned: BTreeMap<LearnedKey, u32>,
    classes: Vec<Class>,
    policy: HashMap<PolicyKey, PolicyEntry>,
    endpoints: HashMap<u16, EndpointState>,
    /// Identities of the world (IPv4, IPv6), from the configuration of the programs.
    world: (u32, u32),
}

impl Maps {
    pub fn empty(world_ipv4: u32, world_ipv6: u32) -> Self {
        Self {
            classes: vec![0; CLASS_SLOTS],
            world: (world_ipv4, world_ipv6),
            ..Self::default()
        }
    }

    /// Carries out an operation, and calls `look` after every write.
    pub fn apply(&mut self, op: &Op, mut look: impl FnMut(&Self)) {
        match op {
            Op::PolicyPut(entries) => {
                for (number, (key, entry)) in entries.iter().enumerate() {
                    self.policy.insert(*key, *entry);
                    // A write to a table that no endpoint uses changes no verdict.
                    if number % 16 == 0 || self.endpoints.values().any(|state| state.policy == key.policy) {
                        look(self);
                    }
                }
            }
            Op::PolicyDelete(keys) => {
                for (number, key) in keys.iter().enumerate() {
                    self.policy.remove(key);
                    if number % 16 == 0 || self.endpoints.values().any(|state| state.policy == key.policy) {
                        look(self);
                    }
                }
            }
            Op::ClassPut(slots) => {
                for (slot, class) in slots {
                    self.classes[*slot as usize] = *class;
                }
                look(self);
            }
            Op::AddressPut(addr, entry) => {
                self.addresses.insert(*addr, *entry);
            }
            Op::AddressDelete(addr) => {
                self.addresses.remove(addr);
            }
            Op::PrefixPut(key, entry) => {
                self.prefixes.insert(*key, *entry);
            }
            Op::PrefixDelete(key) => {
                self.prefixes.remove(key);
            }
            Op::LearnedPut(key, identity) => {
                self.learned.insert(*key, *identity);
            }
            Op::LearnedDelete(key) => {
                self.learned.remove(key);
            }
            Op::EndpointPut(id, state) => {
                if *state == EndpointState::default() {
                    self.endpoints.remove(id);
                } else {
                    self.endpoints.insert(*id, *state);
                }
            }
        }
        look(self);
    }

    /// Returns the identity of an address.
    pub fn identity(&self, address: Addr) -> u32 {
        if let Some(entry) = self.addresses.get(&address) {
            return entry.identity;
        }
        let inside = |key: &PrefixKey| {
            let shift = 128 - key.length;
            let bits = |addr: Addr| u128::from_be_bytes(addr.bytes()).checked_shr(shift).unwrap_or(0);
            bits(key.addr) == bits(address)
        };
        let longest = self
            .prefixes
            .iter()
            .filter(|(key, _)| inside(key))
            .max_by_key(|(key, _)| key.length);
        match longest {
            Some((_, entry)) => entry.identity,
            None if address.is_v4() => self.world.0,
            None => self.world.1,
        }
    }

    /// Returns the entry that the programs find; `None` if the endpoint has no policy (the packet is dropped).
    pub fn entry(&self, packet: &Packet) -> Option<PolicyEntry> {
        self.entry_from(self.identity(packet.remote.into()), packet)
    }

    /// Returns the identity of the peer for the endpoint of a packet, given its identity in the ipcache.
    fn as_learned(&self, other: u32, packet: &Packet) -> u32 {
        let addr = Addr::from(packet.remote);
        let learns = self
            .endpoints
            .get(&packet.endpoint)
            .is_some_and(|state| state.flags & endpoint_flags::LEARNS != 0);
        let is_identified = self
            .addresses
            .get(&addr)
            .is_some_and(|entry| entry.identity < identity::FIRST_LOCAL);
        if packet.direction == Direction::Ingress || !learns || is_identified {
            return other;
        }
        let key = LearnedKey {
            addr,
            endpoint: packet.endpoint.into(),
        };
        self.learned.get(&key).copied().unwrap_or(other)
    }

    /// Returns the same as [`Self::entry`], given the identity of the peer in the ipcache.
    pub fn entry_from(&self, other: u32, packet: &Packet) -> Option<PolicyEntry> {
        let other = self.as_learned(other, packet);
        let state = self.endpoints.get(&packet.endpoint)?;
        let slot = match packet.port {
            Some(port) => class_slot(packet.protocol, port),
            None => class_slot_unknown_port(packet.protocol),
        };
        let class = self.classes[slot as usize];
        [
            (other, class),
            (other, CLASS_ANY),
            (identity::ANY, class),
            (identity::ANY, CLASS_ANY),
        ]
        .into_iter()
        .find_map(|(identity, class)| {
            self.policy
                .get(&PolicyKey {
                    policy: state.policy,
                    identity,
                    class,
                    direction: packet.direction as u8,
                    zero: 0,
                })
                .copied()
        })
    }

    /// Returns the snapshot that a restarted daemon reads back.
    pub fn read_back(&self) -> Snapshot {
        let mut snapshot = Snapshot::from_maps(MapContents {
            addresses: self.addresses.clone(),
            prefixes: self.prefixes.clone(),
            classes: self.classes.clone(),
            policy: self.policy.iter().map(|(key, entry)| (*key, *entry)).collect(),
            endpoints: self.endpoints.iter().map(|(id, state)| (*id, *state)).collect(),
            world_ipv4: self.world.0,
            world_ipv6: self.world.1,
        });
        snapshot.learned.entries.clone_from(&self.learned);
        snapshot
    }

    /// Panics if the maps differ from a snapshot.
    pub fn assert_equal(&self, snapshot: &Snapshot) {
        assert_eq!(self.addresses, *snapshot.addresses);
        assert_eq!(self.prefixes, *snapshot.prefixes);
        assert_eq!(self.learned, snapshot.learned.entries);
        assert!(self.classes == *snapshot.classes, "classes differ");
        let mut policy = HashMap::new();
        for (id, table) in &snapshot.tables {
            for (key, entry) in &table.entries {
                policy.insert(key.with_policy(*id), *entry);
            }
        }
        assert_eq!(self.policy, policy);
        assert_eq!(
            self.endpoints,
            snapshot.endpoints.iter().map(|(id, s)| (*id, *s)).collect()
        );
        // Entries that the flags keep the programs from reading may differ.
        for state in snapshot.endpoints.values() {
            for (key, entry) in &snapshot.tables[&state.policy].entries {
                let plain = if key.direction == Direction::Ingress as u8 {
                    endpoint_flags::PLAIN_INGRESS
                } else {
                    endpoint_flags::PLAIN_EGRESS
                };
                let excluded = [Decision::Inspect, Decision::DenyExplicit].map(|decision| decision as u8);
                assert!(
                    state.flags & plain == 0 || !excluded.contains(&entry.decision),
                    "{state:?} {key:?} {entry:?}"
                );
            }
        }
    }

    pub fn endpoint(&self, id: u16) -> Option<EndpointState> {
        self.endpoints.get(&id).copied()
    }
}
