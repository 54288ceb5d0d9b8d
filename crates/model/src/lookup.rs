//! The lookups of the BPF programs, over a [`Snapshot`].

use std::net::IpAddr;

use palisade_abi::{
    Addr, Class, Direction, Identity, IpcacheEntry, PolicyEntry, PrefixKey, class_slot,
    class_slot_unknown_port,
};

use crate::snapshot::{Snapshot, Table};

impl Snapshot {
    /// Returns the ipcache entry of an address: by the exact address, else by the longest prefix, else the world.
    #[must_use]
    pub fn identity_of(&self, address: IpAddr) -> IpcacheEntry {
        let key = Addr::from(address);
        self.ipcache(key).unwrap_or(IpcacheEntry {
            identity: if key.is_v4() {
                self.world_ipv4
            } else {
                self.world_ipv6
            },
            ..IpcacheEntry::default()
        })
    }

    /// Returns the ipcache entry of an address; `None` if no prefix contains the address.
    #[must_use]
    pub fn ipcache(&self, address: Addr) -> Option<IpcacheEntry> {
        self.addresses
            .get(&address)
            .copied()
            .or_else(|| self.longest_prefix(address, 128))
    }

    /// Returns the entry of the longest prefix that contains the address and has at most `longest` bits.
    #[must_use]
    pub fn longest_prefix(&self, address: Addr, longest: u32) -> Option<IpcacheEntry> {
        if self.prefixes.is_empty() {
            return None;
        }
        (0..=longest.min(128)).rev().find_map(|length| {
            self.prefixes
                .get(&PrefixKey {
                    length,
                    addr: address.mask(length),
                })
                .copied()
        })
    }

    /// Returns the policy table entry that decides the first packet of a flow of an endpoint. `port` is the
    /// destination port or the ICMP type; `None` for a later fragment, whose port is unknown.
    #[must_use]
    pub fn policy_entry(
        &self,
        endpoint: u16,
        direction: Direction,
        other: Identity,
        protocol: u8,
        port: Option<u16>,
    ) -> Option<PolicyEntry> {
        let (table, class) = self.table_and_class(endpoint, protocol, port)?;
        table.lookup(direction, other, class).copied()
    }

    /// Returns the policy table entry as [`Self::policy_entry`] does, but for a packet between two endpoints of this node,
    /// which gets its verdict at the interface of a workload: failsafe ports do not apply there.
    #[must_use]
    pub fn policy_entry_inside(
        &self,
        endpoint: u16,
        direction: Direction,
        other: Identity,
        protocol: u8,
        port: Option<u16>,
    ) -> Option<PolicyEntry> {
        let (table, class) = self.table_and_class(endpoint, protocol, port)?;
        table.lookup_inside(direction, other, class).copied()
    }

    fn table_and_class(&self, endpoint: u16, protocol: u8, port: Option<u16>) -> Option<(&Table, Class)> {
        let table = self.tables.get(&self.endpoints.get(&endpoint)?.policy)?;
        let slot = match port {
            Some(port) => class_slot(protocol, port),
            None => class_slot_unknown_port(protocol),
        };
        Some((table, *self.classes.get(slot as usize)?))
    }
}
