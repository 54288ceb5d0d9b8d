//! Maps that a daemon has left pinned, read while no daemon runs.

use std::{collections::BTreeMap, ops::ControlFlow, path::Path};

use palisade_abi::{
    Addr, Class, Counter, CtEntry, CtKey, EndpointState, IpcacheEntry, PolicyEntry, PolicyKey, PrefixKey,
    maps as names,
};

use crate::{
    MapError, OpenError,
    counters::by_rule,
    maps::{Classes, Endpoints, Map, PerCpuArray, RawMap},
    pin::{version_dir, versions},
    sys::bpf,
};

/// The maps that decide verdicts, opened only to be read: nothing is loaded, made or changed.
#[derive(Debug)]
pub struct PinnedMaps {
    policy: Map<PolicyKey, PolicyEntry>,
    addresses: Map<Addr, IpcacheEntry>,
    prefixes: Map<PrefixKey, IpcacheEntry>,
    conntrack: Map<CtKey, CtEntry>,
    classes: Classes,
    endpoints: Endpoints,
    rules: PerCpuArray<Counter>,
}

impl PinnedMaps {
    /// Opens the maps of a pin directory; `None` if there are none of any version.
    ///
    /// # Errors
    /// [`OpenError`] if a map cannot be opened or is missing, for example because the maps are those of another version.
    pub fn open(pin_dir: &Path) -> Result<Option<Self>, OpenError> {
        let found = versions(pin_dir)?;
        if found.is_empty() {
            return Ok(None);
        }
        let dir = version_dir(pin_dir);
        let open = |name: &str| -> Result<RawMap, OpenError> {
            let path = dir.join(name);
            let missing = || OpenError::Missing {
                what: format!(
                    "map {}: this program has version {} of the maps, and {} has {}",
                    path.display(),
                    palisade_abi::VERSION,
                    pin_dir.display(),
                    found
                        .iter()
                        .map(ToString::to_string)
                        .collect::<Vec<_>>()
                        .join(", ")
                ),
            };
            let pin = bpf::get_pinned(&path)?.ok_or_else(missing)?;
            Ok(RawMap::new(name, pin)?)
        };
        Ok(Some(Self {
            policy: Map::new(open(names::POLICY)?)?,
            addresses: Map::new(open(names::IPCACHE)?)?,
            prefixes: Map::new(open(names::PREFIXES)?)?,
            conntrack: Map::new(open(names::CONNTRACK)?)?,
            classes: Classes::new(&open(names::CLASSES)?)?,
            endpoints: Endpoints::new(open(names::ENDPOINTS)?)?,
            rules: PerCpuArray::new(open(names::RULES)?)?,
        }))
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
        self.addresses.entries()
    }

    /// Returns the ipcache entries of prefixes, in no particular order.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn prefixes(&self) -> Result<Vec<(PrefixKey, IpcacheEntry)>, MapError> {
        self.prefixes.entries()
    }

    /// Returns the port class of each of the [`palisade_abi::CLASS_SLOTS`] slots.
    #[must_use]
    pub fn classes(&self) -> Vec<Class> {
        self.classes.all()
    }

    /// Returns the states of endpoints, without those that are all zero.
    #[must_use]
    pub fn endpoint_states(&self) -> BTreeMap<u16, EndpointState> {
        self.endpoints.states()
    }

    /// Returns packets and bytes by rule. Counters that are zero are omitted.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn rules(&self) -> Result<BTreeMap<u32, Counter>, MapError> {
        by_rule(&self.rules)
    }

    /// Passes all conntrack entries to `each` in chunks of bounded size, expired ones included, in no particular order,
    /// until it returns a break.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn for_each_connection(
        &self,
        mut each: impl FnMut(&[(CtKey, CtEntry)]) -> ControlFlow<()>,
    ) -> Result<(), MapError> {
        self.conntrack.for_each_chunk(|chunk| Ok(each(chunk)))
    }
}
