//! What is in the maps, read back: after a restart the next plan starts from this.

use std::collections::BTreeMap;

use palisade_abi::{
    Addr, Class, Config, EndpointState, Interface, IpcacheEntry, PolicyEntry, PolicyKey, PrefixKey,
    maps as names, role,
};

use crate::{Datapath, MapError};

/// The content of every map that user space writes.
#[derive(Clone, Debug, Default)]
pub struct Dump {
    /// The policy table.
    pub policy: Vec<(PolicyKey, PolicyEntry)>,
    /// Full-length addresses.
    pub addresses: Vec<(Addr, IpcacheEntry)>,
    /// Prefixes.
    pub prefixes: Vec<(PrefixKey, IpcacheEntry)>,
    /// The class of every slot, [`palisade_abi::CLASS_SLOTS`] of them.
    pub classes: Vec<Class>,
    /// Endpoints that are not all zero.
    pub endpoints: BTreeMap<u16, EndpointState>,
    /// Guarded interfaces.
    pub interfaces: Vec<Interface>,
    /// What the programs are told.
    pub config: Option<Config>,
}

/// How full a map is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fill {
    /// Its name, of [`palisade_abi::maps`].
    pub map: &'static str,
    /// Entries in it.
    pub entries: u64,
    /// Entries that it can have.
    pub max_entries: u64,
}

impl Datapath {
    /// How full the maps are that refuse entries when they are full. Walks them.
    ///
    /// # Errors
    /// If a map cannot be read.
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

    /// Reads everything back.
    ///
    /// # Errors
    /// If a map cannot be read.
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

    /// The policy table, in no order.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn policy_entries(&self) -> Result<Vec<(PolicyKey, PolicyEntry)>, MapError> {
        self.policy.entries()
    }

    /// Full-length addresses, in no order.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn addresses(&self) -> Result<Vec<(Addr, IpcacheEntry)>, MapError> {
        self.ipcache.entries()
    }

    /// Prefixes, in no order.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn prefixes(&self) -> Result<Vec<(PrefixKey, IpcacheEntry)>, MapError> {
        self.prefixes.entries()
    }

    /// Endpoints that are not all zero.
    #[must_use]
    pub fn endpoint_states(&self) -> BTreeMap<u16, EndpointState> {
        (0..=u16::MAX)
            .take(self.endpoints.len() as usize)
            .map(|id| (id, self.endpoints.get(id)))
            .filter(|(_, state)| *state != EndpointState::default())
            .collect()
    }

    /// What the programs are told of interfaces, guarded or not, by their slots.
    ///
    /// # Errors
    /// If the map cannot be read.
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
