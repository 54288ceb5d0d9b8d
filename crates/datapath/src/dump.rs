//! Reads the contents of the maps. The first plan after a restart starts from these contents.

use std::collections::BTreeMap;

use palisade_abi::{
    Addr, Class, Config, EndpointState, Interface, IpcacheEntry, PolicyEntry, PolicyKey, PrefixKey,
    maps as names, role,
};

use crate::{Datapath, MapError};

/// Contents of the maps that the daemon writes from its configuration and policies. Learned addresses are not included
/// ([`Datapath::learned`]).
#[derive(Clone, Debug, Default)]
pub struct Dump {
    /// Entries of all policy tables.
    pub policy: Vec<(PolicyKey, PolicyEntry)>,
    /// Entries of the ipcache for full-length addresses.
    pub addresses: Vec<(Addr, IpcacheEntry)>,
    /// Entries of the ipcache for prefixes.
    pub prefixes: Vec<(PrefixKey, IpcacheEntry)>,
    /// Port class of each of the [`palisade_abi::CLASS_SLOTS`] slots.
    pub classes: Vec<Class>,
    /// States of endpoints, without those that are all zero.
    pub endpoints: BTreeMap<u16, EndpointState>,
    /// Entries of the interface table.
    pub interfaces: Vec<Interface>,
    /// Configuration of the programs.
    pub config: Option<Config>,
}

/// Fill level of a map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fill {
    /// Name, one of [`palisade_abi::maps`].
    pub map: &'static str,
    /// Number of entries.
    pub entries: u64,
    /// Capacity, entries.
    pub max_entries: u64,
}

impl Datapath {
    /// Returns the fill levels of the maps that reject entries when they are full. Walks these maps.
    ///
    /// # Errors
    /// [`MapError`] if a map cannot be read.
    pub fn fill_levels(&self) -> Result<Vec<Fill>, MapError> {
        let level = |map, entries: usize, max_entries: u32| Fill {
            map,
            entries: entries as u64,
            max_entries: u64::from(max_entries),
        };
        Ok(vec![
            level(names::POLICY, self.policy.count()?, self.policy.max_entries()),
            level(names::IPCACHE, self.ipcache.count()?, self.ipcache.max_entries()),
            level(
                names::PREFIXES,
                self.prefixes.count()?,
                self.prefixes.max_entries(),
            ),
            level(names::LEARNED, self.learned.count()?, self.learned.max_entries()),
        ])
    }

    /// Reads the maps of which a [`Dump`] consists.
    ///
    /// # Errors
    /// [`MapError`] if a map cannot be read.
    pub fn dump(&self) -> Result<Dump, MapError> {
        Ok(Dump {
            policy: self.policy_entries()?,
            addresses: self.addresses()?,
            prefixes: self.prefixes()?,
            classes: self.classes.all(),
            endpoints: self.endpoint_states(),
            interfaces: self.interfaces()?,
            config: self.config()?,
        })
    }

    /// Returns the entries of all policy tables, in no particular order.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn policy_entries(&self) -> Result<Vec<(PolicyKey, PolicyEntry)>, MapError> {
        self.policy.entries()
    }

    /// Returns the ipcache entries of full-length addresses, in no particular order.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn addresses(&self) -> Result<Vec<(Addr, IpcacheEntry)>, MapError> {
        self.ipcache.entries()
    }

    /// Returns the ipcache entries of prefixes, in no particular order.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn prefixes(&self) -> Result<Vec<(PrefixKey, IpcacheEntry)>, MapError> {
        self.prefixes.entries()
    }

    /// Returns the states of endpoints, without those that are all zero.
    #[must_use]
    pub fn endpoint_states(&self) -> BTreeMap<u16, EndpointState> {
        self.endpoints.states()
    }

    /// Returns the entries of the interface table, for interfaces with and without programs, ordered by slot.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn interfaces(&self) -> Result<Vec<Interface>, MapError> {
        let mut interfaces = Vec::new();
        self.interfaces.for_each(|_, interface| {
            if interface.role != role::NONE {
                interfaces.push(interface);
            }
        })?;
        Ok(interfaces)
    }
}
