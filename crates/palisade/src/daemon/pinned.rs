//! The maps that a daemon has left pinned, for `palisade bpf` while no daemon runs.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use palisade_abi::Identity;
use palisade_datapath::{PinnedMaps, monotonic_coarse};
use palisade_policy::compile::CompilerState;

use super::{
    map_rows::{Selected, connection_row, ipcache_rows, policy_rows},
    state::{self, NODE, State},
    view::MapNames,
};
use crate::{
    config::with_option,
    control::api::{ConnectionFilter, ConnectionRow, IpcacheRow, PolicyRow},
};

/// Name of the node's endpoint.
const HOST: &str = "host";

/// Pinned maps, and names from the state file.
#[derive(Debug)]
pub(crate) struct Pinned {
    maps: PinnedMaps,
    state: State<CompilerState>,
    /// Why there are no names.
    problem: Option<String>,
    pin_dir: PathBuf,
}

impl MapNames for State<CompilerState> {
    fn labels(&self, identity: Identity) -> Vec<String> {
        let labels = self.compiler.identities.identities.get(&identity);
        let labels = labels
            .cloned()
            .or_else(|| palisade_policy::identity::reserved(identity));
        labels.map_or_else(Vec::new, |labels| {
            labels.iter().map(ToString::to_string).collect()
        })
    }

    /// Texts of rules are only in the policies.
    fn rule(&self, rule: u32) -> String {
        format!("rule {rule}")
    }
}

impl Pinned {
    /// Opens the maps; `None` if nothing is pinned.
    ///
    /// # Errors
    /// The maps cannot be read, for example because they are those of another version.
    pub(crate) fn open(pin_dir: &Path, state_dir: &Path) -> anyhow::Result<Option<Self>> {
        let Some(maps) = PinnedMaps::open(pin_dir)? else {
            return Ok(None);
        };
        let (state, problem) = match state::read(state_dir) {
            Ok(state) => (state, None),
            Err(problem) => (State::default(), Some(problem)),
        };
        Ok(Some(Self {
            maps,
            state,
            problem,
            pin_dir: pin_dir.to_owned(),
        }))
    }

    /// Returns a text that says where the answers come from.
    pub(crate) fn remark(&self) -> String {
        let names = match &self.problem {
            None => "the texts of rules need the daemon".to_owned(),
            Some(problem) => format!("names are not known: {problem}"),
        };
        format!(
            "the daemon does not run; this is what its pinned maps in {} enforce ({names})",
            self.pin_dir.display()
        )
    }

    /// Returns the endpoints that have a policy table, with their names.
    pub(crate) fn endpoints(&self) -> Vec<(u16, String)> {
        let names: BTreeMap<u16, &str> = self
            .state
            .endpoints
            .iter()
            .map(|(name, id)| (*id, name.as_str()))
            .collect();
        let name = |id| match (names.get(&id), id) {
            (Some(name), _) => (*name).to_owned(),
            (None, NODE) => HOST.to_owned(),
            (None, _) => "-".to_owned(),
        };
        let states = self.maps.endpoint_states();
        states.into_keys().map(|id| (id, name(id))).collect()
    }

    /// Returns the number of the endpoint with this number, name or address.
    fn endpoint(&self, wanted: &str) -> anyhow::Result<u16> {
        let has_name = |name: &str| name == wanted || name.rsplit('/').next() == Some(wanted);
        let address = wanted
            .parse::<IpAddr>()
            .ok()
            .map(|address| address.to_canonical());
        let owner = match address {
            Some(wanted) => {
                let entries = self
                    .maps
                    .addresses()
                    .map_err(|error| anyhow::anyhow!(with_option(&error)))?;
                let found = entries
                    .into_iter()
                    .find(|(address, _)| IpAddr::from(*address) == wanted);
                found.map(|(_, entry)| entry.endpoint)
            }
            None => None,
        };
        let known = self.endpoints();
        let mut found = known.iter().filter(|(id, name)| {
            Some(*id) == owner || wanted.parse() == Ok(*id) || (address.is_none() && has_name(name))
        });
        match (found.next(), found.next()) {
            (Some((id, _)), None) => Ok(*id),
            (Some((_, one)), Some((_, other))) => anyhow::bail!("there is {one} and {other}: say which"),
            (None, _) => anyhow::bail!(
                "no endpoint '{wanted}' has a policy table in {}",
                self.pin_dir.display()
            ),
        }
    }

    /// Returns the policy table of an endpoint by its number, name or address.
    ///
    /// # Errors
    /// There is no such endpoint, or a map cannot be read.
    pub(crate) fn policy_table(&self, endpoint: &str) -> anyhow::Result<Vec<PolicyRow>> {
        let endpoint = self.endpoint(endpoint)?;
        let state = self.maps.endpoint_states().remove(&endpoint).unwrap_or_default();
        Ok(policy_rows(
            self.maps.policy_entries()?,
            state.policy,
            &self.maps.rules()?,
            &self.maps.classes(),
            &self.state,
        ))
    }

    /// Returns the ipcache.
    ///
    /// # Errors
    /// A map cannot be read.
    pub(crate) fn ipcache(&self) -> anyhow::Result<Vec<IpcacheRow>> {
        Ok(ipcache_rows(
            self.maps.addresses()?,
            self.maps.prefixes()?,
            &self.state,
        ))
    }

    /// Passes the conntrack entries to `each`, in no particular order, while the table is read.
    ///
    /// # Errors
    /// There is no such endpoint, the map cannot be read, or the first error of `each`.
    pub(crate) fn connections(
        &self,
        filter: &ConnectionFilter,
        mut each: impl FnMut(Vec<ConnectionRow>) -> std::io::Result<()>,
    ) -> anyhow::Result<()> {
        let endpoint = filter.endpoint.as_deref().map(|wanted| self.endpoint(wanted));
        let selected = Selected {
            filter,
            endpoint: endpoint.transpose()?,
        };
        let now = monotonic_coarse();
        let mut outcome = Ok(());
        self.maps.for_each_connection(|chunk| {
            let found = chunk.iter().filter(|(key, entry)| selected.has(key, entry));
            outcome = each(
                found
                    .map(|(key, entry)| connection_row(key, entry, now))
                    .collect(),
            );
            match outcome {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        })?;
        Ok(outcome?)
    }
}
