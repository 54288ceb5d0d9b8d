//! Requests that are answered from the published view and the maps.

use palisade_abi::{Counter, Identity, LearnedKey};
use palisade_fqdn::{SelectorId, Selectors};
use palisade_model::rule::FqdnPattern;
use palisade_protocols::dns::Name;

use super::{
    super::{
        map_rows::{ipcache_rows, policy_rows},
        message::ClientRequest,
    },
    Handlers, map_error,
};
use crate::control::api::{Endpoint, FqdnRow, IdentityRow, IpcacheRow, PolicyRow, PolicySummary};

impl Handlers {
    pub(super) fn policies(&self, name: Option<String>) -> Result<Vec<PolicySummary>, String> {
        let mut policies = self.look_up(|reply| ClientRequest::Policies { name, reply })?;
        let counters = self.datapath.counters().rules().map_err(map_error)?;
        for rule in policies.iter_mut().flat_map(|policy| &mut policy.rules) {
            let Counter { packets, bytes } = counters.get(&rule.id).copied().unwrap_or_default();
            (rule.packets, rule.bytes) = (packets, bytes);
        }
        Ok(policies)
    }

    pub(super) fn identities(&self) -> Vec<IdentityRow> {
        let view = self.shared.get();
        let row = |id: &Identity| IdentityRow {
            id: *id,
            labels: view.labels(*id),
        };
        view.snapshot.identities.keys().map(row).collect()
    }

    pub(super) fn identity(&self, identity: Identity) -> Result<IdentityRow, String> {
        let view = self.shared.get();
        if !view.snapshot.identities.contains_key(&identity) {
            return Err(format!(
                "identity {identity} is not in use; `palisade identity list` shows which are"
            ));
        }
        Ok(IdentityRow {
            id: identity,
            labels: view.labels(identity),
        })
    }

    pub(super) fn policy_table(&self, endpoint: String) -> Result<Vec<PolicyRow>, String> {
        let endpoint = self.endpoint(endpoint)?;
        let view = self.shared.get();
        let states = self.datapath.endpoint_states();
        let Some(state) = states.get(&endpoint.id) else {
            return Err(format!("endpoint {} has no policy table yet", endpoint.id));
        };
        let entries = self.datapath.policy_entries().map_err(map_error)?;
        let counters = self.datapath.counters().rules().map_err(map_error)?;
        let classes = &view.snapshot.classes;
        Ok(policy_rows(entries, state.policy, &counters, classes, &*view))
    }

    /// Returns an endpoint that is given by number, name or address.
    pub(super) fn endpoint(&self, endpoint: String) -> Result<Endpoint, String> {
        self.look_up(|reply| ClientRequest::Endpoint { endpoint, reply })
    }

    /// Returns the number of an endpoint that is given by number, name or address; `None` if none is given.
    pub(super) fn endpoint_number(&self, endpoint: Option<String>) -> Result<Option<u16>, String> {
        let Some(endpoint) = endpoint else { return Ok(None) };
        Ok(Some(self.endpoint(endpoint)?.id))
    }

    pub(super) fn learned_names(&self, endpoint: Option<String>) -> Result<Vec<FqdnRow>, String> {
        let endpoint = self.endpoint_number(endpoint)?;
        let endpoints = self.look_up(ClientRequest::Endpoints)?;
        let view = self.shared.get();
        let identities = self.names.identities();
        let mut rows = Vec::new();
        for (name, sources) in self.names.list(endpoint) {
            let list = view.snapshot.fqdn.get(&name.endpoint);
            let text = |selector: &SelectorId| {
                let patterns = list.into_iter().flat_map(|list| list.iter());
                let mut found = patterns.filter(|(number, _)| *number == selector.0);
                found.next().map_or_else(
                    || format!("selector {}", selector.0),
                    |(_, pattern)| match pattern {
                        FqdnPattern::Name(text) | FqdnPattern::Pattern(text) => text.clone(),
                    },
                )
            };
            let selectors: Vec<String> = name.selectors.iter().map(text).collect();
            let mut owners = endpoints.iter().filter(|owner| owner.id == name.endpoint);
            let owner = owners.next().map(|owner| owner.name.clone()).unwrap_or_default();
            for (address, source) in name.addresses.iter().zip(sources) {
                let key = LearnedKey {
                    addr: address.ip.into(),
                    endpoint: name.endpoint.into(),
                };
                rows.push(FqdnRow {
                    endpoint: name.endpoint,
                    endpoint_name: owner.clone(),
                    name: name.name.clone(),
                    address: address.ip.to_string(),
                    selectors: selectors.clone(),
                    identity: identities.get(&key).copied().unwrap_or_default(),
                    ttl_seconds: address.left.map_or(0, |left| left.div_ceil(1_000)),
                    state: match (address.left, address.in_use) {
                        (Some(_), _) => "live",
                        (None, true) => "expired-in-use",
                        (None, false) => "expired",
                    }
                    .to_owned(),
                    source: source.text().to_owned(),
                });
            }
        }
        Ok(rows)
    }

    pub(super) fn clean_names(
        &self,
        endpoint: Option<String>,
        name: Option<String>,
        pattern: Option<String>,
    ) -> Result<u64, String> {
        let endpoint = self.endpoint_number(endpoint)?;
        let pattern = match (name, pattern) {
            (Some(name), _) => Some(FqdnPattern::Name(name)),
            (None, Some(pattern)) => Some(FqdnPattern::Pattern(pattern)),
            (None, None) => None,
        };
        let filter = match &pattern {
            Some(pattern) => {
                let selectors = Selectors::new([(SelectorId(0), pattern)]);
                Some(selectors.map_err(|error| error.to_string())?)
            }
            None => None,
        };
        let wanted = |name: &Name| {
            filter
                .as_ref()
                .is_none_or(|filter| !filter.matching(name).is_empty())
        };
        Ok(self.names.clean(endpoint, wanted))
    }

    pub(super) fn ipcache(&self) -> Result<Vec<IpcacheRow>, String> {
        let view = self.shared.get();
        let addresses = self.datapath.addresses().map_err(map_error)?;
        let prefixes = self.datapath.prefixes().map_err(map_error)?;
        Ok(ipcache_rows(addresses, prefixes, &*view))
    }
}
