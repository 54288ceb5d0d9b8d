//! Look-up of intercepted flows for the proxy.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use palisade_abi::{
    Addr, CtEntry, CtKey, Direction, Inspector, IpcacheEntry, ProxiedFlow, ProxiedKey, ProxyPath,
    PuntRequest, ct_flags, protocol, punt_flags,
};

use crate::{Datapath, MapError, maps::Map};

/// The maps of flows and addresses, for threads of the proxy.
#[derive(Debug)]
pub struct ProxiedFlows {
    conntrack: Map<CtKey, CtEntry>,
    ipcache: Map<Addr, IpcacheEntry>,
    host: u16,
    removals: Arc<AtomicU64>,
}

impl Datapath {
    /// Returns the look-up of intercepted flows. `host_endpoint`: number of the node's own endpoint.
    ///
    /// # Errors
    /// [`MapError`] if a descriptor cannot be duplicated.
    pub fn proxied_flows(&self, host_endpoint: u16) -> Result<ProxiedFlows, MapError> {
        Ok(ProxiedFlows {
            conntrack: self.conntrack.duplicate()?,
            ipcache: self.ipcache.duplicate()?,
            host: host_endpoint,
            removals: Arc::clone(&self.removals),
        })
    }
}

impl ProxiedFlows {
    /// Returns a number that is raised after each removal of flows by this process. A flow that was found stays as it is
    /// until this number is raised, or the policy changes, or the flow's share evicts it.
    #[must_use]
    pub fn removals(&self) -> u64 {
        self.removals.load(Ordering::Acquire)
    }

    /// Returns an intercepted flow; `None` if no policy intercepts the flow (any more).
    ///
    /// A flow that a new policy denies, or allows without interception, is evaluated with its next packet of either
    /// end. Until then the flow is returned under the old policy.
    ///
    /// # Errors
    /// [`MapError`] if a map cannot be read.
    pub fn find(&self, key: &ProxiedKey) -> Result<Option<ProxiedFlow>, MapError> {
        let client = (key.client, key.client_port);
        let server = (key.server, key.server_port);
        let (local, remote) = match key.direction {
            Direction::Ingress => (server, client),
            Direction::Egress => (client, server),
        };
        // As in `xdp/src/proxy.rs`: an address that the ipcache does not have yet counts as the node's.
        let endpoint = match self.ipcache.get(&local.0)? {
            Some(entry) if entry.endpoint != 0 => entry.endpoint,
            _ => self.host,
        };
        let flow = CtKey {
            local: local.0,
            remote: remote.0,
            local_port: local.1,
            remote_port: remote.1,
            endpoint,
            protocol: protocol::TCP,
            zero: 0,
        };
        let Some(entry) = self.conntrack.get(&flow)? else {
            return Ok(None);
        };
        let is_ingress = entry.flags & ct_flags::INGRESS != 0;
        if entry.inspector != Inspector::TlsTerminate as u8
            || is_ingress != (key.direction == Direction::Ingress)
            // The policy in force denies the flow.
            || entry.revision == 0
        {
            return Ok(None);
        }
        let mut flags = entry.punt_flags & punt_flags::AUDIT;
        if is_ingress {
            flags |= punt_flags::INGRESS;
        }
        if entry.flags & ct_flags::MIDSTREAM != 0 {
            flags |= punt_flags::MIDSTREAM;
        }
        Ok(Some(ProxiedFlow {
            request: PuntRequest {
                rule: entry.rule,
                ruleset: entry.ruleset,
                remote_identity: entry.remote_identity,
                revision: entry.revision,
                serial: entry.serial,
                endpoint,
                inspector: entry.inspector,
                flags,
            },
            ifindex: entry.windows[3] & !ProxyPath::RESOLVED,
        }))
    }
}
